/* A libFuzzer target for model files (`make fuzz`). An input with an odd first byte is a file as it stands;
   otherwise it is a list of edits to a good file, which gets past the checks that random bytes do not.
   Whatever the file, loading it fails cleanly and changes nothing, or succeeds. */
#define TERNARY_IMPLEMENTATION
#include "../ternary.h"
#include <stdlib.h>
#include <string.h>

enum { ROWS = 5, COLS = 33, MAX_FILE = 1 << 16 };

typedef struct file { unsigned char bytes[MAX_FILE]; size_t size; } file;

static int write_file(void *user, const void *data, size_t bytes)
{
    file *f = (file *)user;
    if (bytes > MAX_FILE - f->size) return 1;
    memcpy(f->bytes + f->size, data, bytes);
    f->size += bytes;
    return 0;
}

static void must(int condition) { if (!condition) abort(); }

static tern_context *context;
static tern_param matrix, gain, *items[] = {&matrix, &gain};
static const tern_model model = {items, 2};
static file good, saved;

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const tern_param a = {.name = "matrix", .rows = ROWS, .cols = COLS, .grain = TERN_PER_ROW};
    static const tern_param b = {.name = "gain", .rows = 1, .cols = COLS, .rule = TERN_DENSE};
    static float w[ROWS * COLS];
    const tern_sink sink = {write_file, &good};
    int i;
    (void)argc, (void)argv;
    for (i = 0; i < ROWS * COLS; i++) w[i] = (float)(i * 37 % 101 - 50);
    matrix = a;
    gain = b;
    must(tern_open(&context, NULL, NULL) == TERN_OK);
    must(tern_param_alloc(context, &matrix, TERN_FOR_GRADIENT) == TERN_OK);
    must(tern_param_alloc(context, &gain, TERN_FOR_GRADIENT) == TERN_OK);
    must(tern_param_set(context, &matrix, TERN_F32, w) == TERN_OK);
    must(tern_param_set(context, &gain, TERN_F32, w) == TERN_OK);
    must(tern_model_save(context, &model, 1 << TERN_SHADOW, &sink) == TERN_OK);
    return 0;
}

/* Three bytes an edit: position (16 bits) and value; position 65535 cuts the file to value 256ths. */
static size_t edit(unsigned char *to, const unsigned char *edits, size_t size)
{
    size_t length = good.size;
    memcpy(to, good.bytes, length);
    for (; size >= 3; edits += 3, size -= 3) {
        const size_t at = (size_t)(edits[0] | edits[1] << 8);
        if (at == 65535) length = good.size * edits[2] / 256;
        else to[at % good.size] = edits[2];
    }
    return length;
}

static void save(file *f)
{
    const tern_sink sink = {write_file, f};
    f->size = 0;
    must(tern_model_save(context, &model, 1 << TERN_SHADOW, &sink) == TERN_OK);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size)
{
    static file after;
    unsigned char *bytes;
    size_t length = size;
    if (size == 0) return 0;
    bytes = (unsigned char *)malloc(size + good.size); /* exactly `length` bytes are handed on in a block of their own */
    must(bytes != NULL);
    if (data[0] & 1) memcpy(bytes, data, size);
    else length = edit(bytes, data + 1, size - 1);
    bytes = (unsigned char *)realloc(bytes, length ? length : 1);
    must(bytes != NULL);
    save(&saved);
    if (tern_model_load(context, &model, bytes, length) != TERN_OK) {
        save(&after);
        must(after.size == saved.size && memcmp(after.bytes, saved.bytes, saved.size) == 0);
    }
    free(bytes);
    return 0;
}
