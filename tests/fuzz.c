/* Fuzzes tern_model_load: clang -fsanitize=fuzzer,address,undefined -DFUZZER -I. tests/fuzz.c -pthread
   Without FUZZER a program that replays the files of its command line; without files it prints a seed. */
#define TERNARY_IMPLEMENTATION
#include "../ternary.h"

/* A model with something of everything. */
enum { FUZZ_PARAMS = 6 };
typedef struct fuzz_model { tern_context *c; tern_param p[FUZZ_PARAMS], *items[FUZZ_PARAMS]; tern_model m; } fuzz_model;

static void fuzz_add(fuzz_model *f, const char *name, int64_t rows, int64_t cols, tern_rule rule, int32_t grain, tern_type scales,
                     int32_t buffers)
{
    tern_param *p = &f->p[f->m.count];
    f->items[f->m.count++] = p;
    strcpy(p->name, name);
    p->rows = rows;
    p->cols = cols;
    p->rule = rule;
    p->grain = grain;
    p->buffer[TERN_SCALES].type = scales;
    p->buffer[TERN_SHADOW].type = rule == TERN_DENSE ? TERN_F32 : TERN_BF16;
    if (tern_param_alloc(f->c, p, buffers) != TERN_OK) abort();
}

static void fuzz_open(fuzz_model *f)
{
    memset(f, 0, sizeof *f);
    f->m.items = f->items;
    if (tern_open(&f->c, NULL, NULL) != TERN_OK) abort();
    fuzz_add(f, "a", 3, 17, TERN_ABSMEAN, TERN_PER_ROW, TERN_F32, TERN_FOR_ADAMW);
    fuzz_add(f, "b", 2, 9, TERN_TWN, 4, TERN_POW2, TERN_FOR_INFERENCE);
    fuzz_add(f, "d", 2, 9, TERN_ABSMEAN, 4, TERN_LOG, TERN_FOR_INFERENCE);
    fuzz_add(f, "c", 1, 5, TERN_DENSE, 0, TERN_F32, TERN_FOR_ADAMW);
    fuzz_add(f, "e", 3, 7, TERN_ABSMEAN, TERN_PER_ROW, TERN_POW2, TERN_FOR_FLIPS | 1 << TERN_VOTES);
    fuzz_add(f, "g", 2, 6, TERN_ABSMEAN, 5, TERN_LOG, TERN_FOR_FLIPS | 1 << TERN_VOTES);
    f->p[5].theta = 9;
}

static void fuzz_close(fuzz_model *f)
{
    int i;
    for (i = 0; i < FUZZ_PARAMS; i++) tern_param_free(f->c, &f->p[i], (1 << TERN_BUFFERS) - 1);
    tern_close(f->c);
}

static uint64_t fuzz_hash(const fuzz_model *f)
{
    uint64_t h = TERN__FNV_START;
    int i, b;
    for (i = 0; i < FUZZ_PARAMS; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_buffer *buffer = &f->p[i].buffer[b];
            if (buffer->data) h = tern__fnv(h, (const uint8_t *)buffer->data, buffer->count * (size_t)tern__type_bytes(buffer->type));
        }
    return h;
}

static int fuzz_ignore(void *user, const void *data, size_t bytes) { (void)user; (void)data; (void)bytes; return 0; }

/* A step from whatever was loaded: it may be refused, never be undefined. */
static void fuzz_step(fuzz_model *f)
{
    tern_step s = TERN_ZERO;
    int i;
    size_t j;
    for (i = 0; i < FUZZ_PARAMS; i++)
        for (j = 0; j < f->p[i].buffer[TERN_GRAD].count; j++) ((float *)f->p[i].buffer[TERN_GRAD].data)[j] = (float)((int)(j % 5) - 1);
    s.rate = 0.01f;
    s.step = 1;
    s.push = 127.0f;
    s.scale_step = 127;
    s.scale_push = 256;
    (void)tern_model_step(f->c, &f->m, &s);
}

/* With its hash set right, so that the parser behind it is reached, a file either loads, and can then be
   saved and trained, or leaves the model as it was. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const tern_sink sink = {fuzz_ignore, NULL};
    fuzz_model f;
    uint64_t before;
    uint8_t *file = (uint8_t *)malloc(size ? size : 1);
    if (!file) return 0;
    memcpy(file, data, size);
    if (size >= TERN__HASH_AT + 8) {
        memset(file + TERN__HASH_AT, 0, 8);
        tern__put_number(file + TERN__HASH_AT, tern__fnv(TERN__FNV_START, file, size), 8);
    }
    fuzz_open(&f);
    before = fuzz_hash(&f);
    if (tern_model_load(f.c, &f.m, file, size) != TERN_OK) {
        if (fuzz_hash(&f) != before) abort();
    } else if (tern_model_save(f.c, &f.m, TERN_FOR_TRAINING, &sink) != TERN_OK) abort();
    else fuzz_step(&f);
    fuzz_close(&f);
    free(file);
    return 0;
}

#ifndef FUZZER
static int fuzz_print(void *user, const void *data, size_t bytes) { return fwrite(data, 1, bytes, (FILE *)user) != bytes; }

static int fuzz_seed(void)
{
    fuzz_model f;
    tern_sink sink;
    tern_result r;
    sink.write = fuzz_print;
    sink.user = stdout;
    fuzz_open(&f);
    r = tern_model_save(f.c, &f.m, TERN_FOR_TRAINING, &sink);
    fuzz_close(&f);
    return r != TERN_OK;
}

int main(int argc, char **argv)
{
    int i;
    if (argc == 1) return fuzz_seed();
    for (i = 1; i < argc; i++) {
        static uint8_t data[1 << 20];
        size_t size;
        FILE *file = fopen(argv[i], "rb");
        if (!file) { fprintf(stderr, "cannot open %s\n", argv[i]); return 1; }
        size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d files replayed\n", argc - 1);
    return 0;
}
#endif
