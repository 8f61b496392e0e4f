/* Model files: bit-equal round trips, refusals that change nothing, failures at every step, and ggml's
   known answers for the exported blocks. */

#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif

/* Bytes in memory; write number fail_at (from 0) fails. */
typedef struct file_bytes { unsigned char *data; size_t size, capacity; long writes, fail_at; } file_bytes;

static int file_write(void *user, const void *data, size_t bytes)
{
    file_bytes *f = (file_bytes *)user;
    if (f->writes++ == f->fail_at) return 1;
    if (f->size + bytes > f->capacity) {
        f->capacity = 2 * (f->size + bytes);
        f->data = (unsigned char *)realloc(f->data, f->capacity);
        if (!f->data) exit(2);
    }
    memcpy(f->data + f->size, data, bytes);
    f->size += bytes;
    return 0;
}

static tern_sink file_sink(file_bytes *f)
{
    tern_sink s;
    memset(f, 0, sizeof *f);
    f->fail_at = -1;
    s.write = file_write;
    s.user = f;
    return s;
}

/* Puts the right hash into a file that a test has changed. */
static void file_rehash(unsigned char *data, size_t size)
{
    uint64_t h;
    int i;
    memset(data + 48, 0, 8);
    h = test_hash_bytes(TEST_HASH, data, size);
    for (i = 0; i < 8; i++) data[48 + i] = (unsigned char)(h >> 8 * i);
}

/* A model of up to FILE_PARAMS parameters. */
enum { FILE_PARAMS = 8 };
typedef struct file_model { tern_param p[FILE_PARAMS]; tern_param *items[FILE_PARAMS]; tern_model m; } file_model;

static tern_param *file_add(file_model *f, const char *name, int64_t rows, int64_t cols, tern_rule rule, int32_t grain)
{
    tern_param *p = &f->p[f->m.count];
    f->m.items = f->items;
    f->items[f->m.count++] = p;
    memset(p, 0, sizeof *p);
    strcpy(p->name, name);
    p->rows = rows;
    p->cols = cols;
    p->rule = rule;
    p->grain = grain;
    return p;
}

static void file_alloc(tern_context *c, file_model *f, int32_t mask)
{
    int32_t i;
    for (i = 0; i < f->m.count; i++)
        CHECK_OK(c, tern_param_alloc(c, f->items[i], mask | (f->items[i]->rule == TERN_DENSE ? 1 << TERN_SHADOW : 0)));
}

static void file_free(tern_context *c, file_model *f)
{
    int32_t i;
    for (i = 0; i < f->m.count; i++) tern_param_free(c, f->items[i], (1 << TERN_BUFFERS) - 1);
}

static size_t file_buffer_bytes(const tern_param *p, int32_t b)
{
    return p->buffer[b].data ? p->buffer[b].count * (size_t)tern__type_bytes(tern__buffer_type(p, b)) : 0;
}

/* Every buffer gets bytes of its own: weights through the library, moments any bits at all. */
static void file_fill(tern_context *c, file_model *f)
{
    int32_t i, b;
    for (i = 0; i < f->m.count; i++) {
        tern_param *p = f->items[i];
        const int64_t n = p->rows * p->cols;
        float *w = (float *)malloc((size_t)n * sizeof *w);
        int64_t j;
        size_t k;
        for (j = 0; j < n; j++) w[j] = test_float() * (float)(1 + j % 7);
        CHECK_OK(c, tern_param_set(c, p, TERN_F32, w));
        for (b = TERN_GRAD; b < TERN_BUFFERS; b++)
            for (k = 0; k < file_buffer_bytes(p, b); k++) ((unsigned char *)p->buffer[b].data)[k] = (unsigned char)test_random();
        free(w);
    }
}

static uint64_t file_hash(const file_model *f)
{
    uint64_t h = TEST_HASH;
    int32_t i, b;
    for (i = 0; i < f->m.count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) h = test_hash_bytes(h, f->p[i].buffer[b].data, file_buffer_bytes(&f->p[i], b));
    return h;
}

/* What a file must bring back, bit by bit: trits and scales row by row, so that encodings may differ. */
static int file_equal(tern_context *c, const tern_param *a, const tern_param *b, int32_t mask)
{
    int8_t *t = (int8_t *)malloc((size_t)a->cols * 2);
    float *s = (float *)malloc((size_t)a->cols * 2 * sizeof *s);
    const size_t cols = (size_t)a->cols;
    int64_t i;
    int32_t k;
    int equal = 1;
    for (i = 0; a->rule != TERN_DENSE && i < a->rows; i++) {
        memset(s, 0, 2 * cols * sizeof *s);
        CHECK_OK(c, tern_param_get(c, a, i, t, s, NULL));
        CHECK_OK(c, tern_param_get(c, b, i, t + cols, s + cols, NULL));
        equal &= memcmp(t, t + cols, cols) == 0 && memcmp(s, s + cols, cols * sizeof *s) == 0;
    }
    for (k = TERN_SHADOW; k < TERN_BUFFERS; k++)
        if (k != TERN_GRAD && ((mask >> k & 1) || (k == TERN_SHADOW && a->rule == TERN_DENSE)))
            equal &= file_buffer_bytes(a, k) == file_buffer_bytes(b, k)
                     && (!file_buffer_bytes(a, k) || memcmp(a->buffer[k].data, b->buffer[k].data, file_buffer_bytes(a, k)) == 0);
    if (a->buffer[TERN_TRITS].type == b->buffer[TERN_TRITS].type)
        for (k = TERN_TRITS; k <= TERN_SCALES; k++)
            equal &= memcmp(a->buffer[k].data ? a->buffer[k].data : "", b->buffer[k].data ? b->buffer[k].data : "",
                            file_buffer_bytes(a, k)) == 0;
    free(t);
    free(s);
    return equal;
}

static void file_save(tern_context *c, const file_model *f, int32_t mask, file_bytes *out)
{
    const tern_sink s = file_sink(out);
    CHECK_OK(c, tern_model_save(c, &f->m, mask, &s));
}

/* A small model with something of everything. */
static void file_small(tern_context *c, file_model *f, int32_t mask)
{
    memset(f, 0, sizeof *f);
    file_add(f, "wide", 3, 17, TERN_ABSMEAN, TERN_PER_ROW);
    file_add(f, "grouped", 2, 9, TERN_TWN, 4)->buffer[TERN_SCALES].type = TERN_POW2;
    file_add(f, "gain", 1, 5, TERN_DENSE, 0);
    f->p[0].buffer[TERN_SHADOW].type = TERN_BF16;
    file_alloc(c, f, mask);
    file_fill(c, f);
}

/* -- round trips -- */

static void file_round_trip(tern_context *c, int64_t rows, int64_t cols, int32_t grain, tern_type scale, tern_type shadow,
                            tern_type from, tern_type to)
{
    file_model a, b;
    file_bytes f;
    int32_t i;
    unsigned char *unaligned;
    memset(&a, 0, sizeof a);
    file_add(&a, "layer", rows, cols, TERN_ABSMEAN, grain);
    file_add(&a, "layer.bias", 1, rows, TERN_DENSE, 0);
    a.p[0].buffer[TERN_SCALES].type = scale;
    a.p[0].buffer[TERN_SHADOW].type = shadow;
    a.p[0].buffer[TERN_TRITS].type = from;
    b = a;
    for (i = 0; i < 2; i++) b.items[i] = &b.p[i];
    b.m.items = b.items;
    b.p[0].buffer[TERN_TRITS].type = to;
    file_alloc(c, &a, TERN_FOR_ADAMW);
    file_alloc(c, &b, TERN_FOR_ADAMW);
    file_fill(c, &a);
    file_save(c, &a, TERN_FOR_TRAINING, &f);
    unaligned = (unsigned char *)malloc(f.size + 1);
    memcpy(unaligned + 1, f.data, f.size);
    CHECK_OK(c, tern_model_load(c, &b.m, unaligned + 1, f.size));
    for (i = 0; i < 2; i++)
        CHECK(file_equal(c, &a.p[i], &b.p[i], TERN_FOR_TRAINING), "%s %d x %d, grain %d, scales %d, shadow %d, encodings %d, %d",
              a.p[i].name, (int)rows, (int)cols, (int)grain, (int)scale, (int)shadow, (int)from, (int)to);
    free(unaligned);
    free(f.data);
    file_free(c, &a);
    file_free(c, &b);
}

static void files_round_trip(void)
{
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 1, 16, 20, 33, 200};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int r, k, g, e;
    if (!t.c) return;
    for (r = 0; r < TEST_SIZES; r++)
        for (k = 0; k < TEST_SIZES; k++)
            for (g = 0; g < (int)(sizeof grains / sizeof *grains); g++)
                for (e = 0; e < 4; e++)
                    file_round_trip(t.c, test_sizes[r], test_sizes[k], grains[g], every_scale_type[(r + e) % 4],
                                    (k + g) % 2 ? TERN_BF16 : TERN_F32, e % 2 ? TERN_2BIT : TERN_BASE3, e / 2 ? TERN_2BIT : TERN_BASE3);
    file_round_trip(t.c, 513, 1037, 96, TERN_POW2, TERN_BF16, TERN_2BIT, TERN_BASE3);
    file_round_trip(t.c, 1037, 513, TERN_PER_ROW, TERN_F32, TERN_F32, TERN_BASE3, TERN_BASE3);
    test_close(&t);
}

/* A trained model loads into a frozen one; tensors and keys of others are no matter. */
static void files_subsets(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a, b, one;
    file_bytes full, frozen;
    uint64_t before;
    int32_t i;
    if (!t.c) return;
    file_small(t.c, &a, TERN_FOR_ADAMW);
    file_small(t.c, &b, TERN_FOR_INFERENCE);
    file_save(t.c, &a, TERN_FOR_TRAINING, &full);
    file_save(t.c, &a, 0, &frozen);
    CHECK(frozen.size < full.size, "%d of %d bytes", (int)frozen.size, (int)full.size);
    CHECK_OK(t.c, tern_model_load(t.c, &b.m, full.data, full.size));
    for (i = 0; i < 3; i++) CHECK(file_equal(t.c, &a.p[i], &b.p[i], 0), "%s", a.p[i].name);

    /* Without the shadow a trainable parameter cannot be loaded; without moments it can, and keeps its own. */
    before = file_hash(&a);
    CHECK_FAILS(t.c, tern_model_load(t.c, &a.m, frozen.data, frozen.size), TERN_E_MISSING, "no tensor wide.shadow");
    CHECK(file_hash(&a) == before, "a refused file changed the model");
    free(frozen.data);
    file_save(t.c, &a, 1 << TERN_SHADOW, &frozen);
    file_fill(t.c, &b);
    before = file_hash(&a);
    CHECK_OK(t.c, tern_model_load(t.c, &a.m, frozen.data, frozen.size));
    CHECK(file_hash(&a) == before, "loading its own file changed the model");

    /* One parameter out of the middle of the file, and the same ones in another order. */
    memset(&one, 0, sizeof one);
    one.items[0] = &b.p[2];
    one.items[1] = &b.p[1];
    one.m.items = one.items;
    one.m.count = 2;
    CHECK_OK(t.c, tern_model_load(t.c, &one.m, full.data, full.size));
    CHECK(file_equal(t.c, &a.p[1], &b.p[1], 0) && file_equal(t.c, &a.p[2], &b.p[2], 0), "the other order");
    CHECK(!file_equal(t.c, &a.p[0], &b.p[0], 0), "a parameter that is not in the model was written");
    free(full.data);
    free(frozen.data);
    file_free(t.c, &a);
    file_free(t.c, &b);
    test_close(&t);
}

/* The bytes of a file are the same on every machine. */
static void files_golden(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a;
    file_bytes f;
    uint64_t h;
    if (!t.c) return;
    test_seed = 77;
    memset(&a, 0, sizeof a);
    file_add(&a, "wide", 3, 17, TERN_ABSMEAN, TERN_PER_ROW)->buffer[TERN_SHADOW].type = TERN_BF16;
    file_add(&a, "grouped", 2, 9, TERN_TWN, 4)->buffer[TERN_SCALES].type = TERN_POW2;
    file_add(&a, "gain", 1, 5, TERN_DENSE, 0);
    file_alloc(t.c, &a, TERN_FOR_GRADIENT);
    file_fill(t.c, &a);
    file_save(t.c, &a, 1 << TERN_SHADOW, &f);
    h = test_hash_bytes(TEST_HASH, f.data, f.size);
    CHECK(f.size == 1312 && h == UINT64_C(0x3a01d28a836d07f7), "%d bytes, hash %016llx", (int)f.size, (unsigned long long)h);
    free(f.data);
    file_free(t.c, &a);
    test_close(&t);
}

/* A parameter that crosses in three chunks, between others; saved twice over few copies. */
static void files_chunks(void)
{
    tern_backend table;
    tern_context *c = chunk_open(&table);
    file_model a, b;
    file_bytes f;
    int i;
    memset(&a, 0, sizeof a);
    file_add(&a, "small", 3, 17, TERN_ABSMEAN, TERN_PER_ROW);
    file_add(&a, "wide", CHUNK_ROWS, CHUNK_COLS, TERN_ABSMEAN, 1000);
    file_add(&a, "long", 1, TERN__TRANSFER / 4 + 3, TERN_DENSE, 0);
    b = a;
    b.m.items = b.items;
    for (i = 0; i < b.m.count; i++) b.items[i] = &b.p[i];
    file_alloc(c, &a, TERN_FOR_INFERENCE);
    file_alloc(c, &b, TERN_FOR_INFERENCE);
    file_fill(c, &a);
    chunk_copies = 0;
    file_save(c, &a, 0, &f);
    CHECK(chunk_copies == 2 * (2 + 6 + 2), "%ld copies to save", chunk_copies);
    CHECK_OK(c, tern_model_load(c, &b.m, f.data, f.size));
    CHECK(chunk_copies == 20 + 2 + 4 + 2, "%ld copies to save and load", chunk_copies);
    CHECK(file_hash(&a) == file_hash(&b), "the model that comes back is another");
    free(f.data);
    file_free(c, &a);
    file_free(c, &b);
    tern_close(c);
}

/* -- training goes on where it stopped -- */

enum { RESUME_TOKENS = 24, RESUME_PARAMS = 5 };

/* Every kind of state: learned scales of both rules, an average, noise, BF16 shadows and moments. */
static void resume_open(tern_context *c, file_model *f)
{
    tern_param *p;
    int32_t i;
    memset(f, 0, sizeof *f);
    file_add(f, "lsq", 20, 17, TERN_LSQ, TERN_PER_TENSOR)->alpha = &f->p[1];
    file_add(f, "lsq.alpha", 1, 1, TERN_DENSE, 0)->flags = TERN_NO_DECAY;
    p = file_add(f, "seq", 9, 20, TERN_SEQ, TERN_PER_ROW);
    p->alpha = &f->p[3];
    p->flags = TERN_PLAIN_ALPHA;
    file_add(f, "seq.alpha", 1, 9, TERN_DENSE, 0);
    p = file_add(f, "average", 5, 9, TERN_ABSMEAN, 4);
    p->rho = 0.8f;
    p->buffer[TERN_SHADOW].type = TERN_BF16;
    for (i = 0; i < RESUME_PARAMS; i += 2) {
        f->p[i].noise = 0.1f;
        f->p[i].zone = 0.3f;
        f->p[i].buffer[TERN_MOMENT1].type = f->p[i].buffer[TERN_MOMENT2].type = i < 4 ? TERN_BF16 : TERN_F32;
    }
    file_alloc(c, f, TERN_FOR_ADAMW);
}

/* Three layers, one after the other, whose gradient depends on the trits of this step. */
static void resume_steps(tern_context *c, file_model *f, uint32_t first, uint32_t last)
{
    float x[RESUME_TOKENS * 17], y[3][RESUME_TOKENS * 20], dy[2][RESUME_TOKENS * 20];
    tern_linear l[3];
    tern_step s = TERN_ZERO;
    void *saved[3];
    int i;
    s.rate = 0.02f;
    s.clip = 1.0f;
    s.decay = 0.05f;
    s.seed = 11;
    for (s.step = first; s.step <= last; s.step++) {
        test_seed = s.step;
        for (i = 0; i < RESUME_TOKENS * 17; i++) x[i] = test_float();
        for (i = 0; i < 3; i++) {
            tern_need need = TERN_ZERO;
            memset(&l[i], 0, sizeof l[i]);
            l[i].w = &f->p[2 * i];
            l[i].norm = TERN_NORM_RMS;
            CHECK_OK(c, tern_linear_need(c, &l[i], RESUME_TOKENS, &need));
            CHECK_OK(c, tern_reserve(c, need.scratch));
            saved[i] = malloc(need.saved);
            CHECK_OK(c, tern_linear_forward(c, &l[i], RESUME_TOKENS, i ? y[i - 1] : x, y[i], saved[i]));
        }
        for (i = 0; i < RESUME_TOKENS * 5; i++) dy[0][i] = y[2][i] - (float)(i % 3);
        for (i = 2; i >= 0; i--) {
            CHECK_OK(c, tern_linear_backward(c, &l[i], RESUME_TOKENS, i ? y[i - 1] : x, saved[i], dy[i & 1], i ? dy[1 - (i & 1)] : NULL));
            free(saved[i]);
        }
        CHECK_OK(c, tern_model_step(c, &f->m, &s));
    }
}

static void files_resume(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    file_model straight, half, fresh;
    file_bytes f;
    uint64_t middle;
    int32_t i;
    if (!t.c) return;
    resume_open(t.c, &straight);
    resume_open(t.c, &half);
    resume_open(t.c, &fresh);
    for (i = 0; i < RESUME_PARAMS; i++) {
        float *w = test_floats(straight.p[i].rows * straight.p[i].cols);
        if (straight.p[i].rule != TERN_DENSE) { /* learned scales start with their weights */
            CHECK_OK(t.c, tern_param_set(t.c, &straight.p[i], TERN_F32, w));
            CHECK_OK(t.c, tern_param_set(t.c, &half.p[i], TERN_F32, w));
        }
        free(w);
    }
    resume_steps(t.c, &straight, 1, 6);
    resume_steps(t.c, &half, 1, 3);
    middle = file_hash(&half);
    file_save(t.c, &half, TERN_FOR_TRAINING, &f);
    CHECK_OK(t.c, tern_model_load(t.c, &fresh.m, f.data, f.size));
    CHECK(file_hash(&fresh) == middle, "the model that comes back is another");
    resume_steps(t.c, &fresh, 4, 6);
    CHECK(file_hash(&fresh) == file_hash(&straight) && file_hash(&fresh) != middle, "three steps, a file and three more are not six");
    for (i = 0; i < RESUME_PARAMS; i++) CHECK(file_equal(t.c, &straight.p[i], &fresh.p[i], TERN_FOR_TRAINING), "%s", straight.p[i].name);
    free(f.data);
    file_free(t.c, &straight);
    file_free(t.c, &half);
    file_free(t.c, &fresh);
    test_close(&t);
}

/* -- refusals -- */

/* Loads a changed file. With its hash stated right a change may go unnoticed, but then all of it loads. */
static void file_load_changed(tern_context *c, const file_model *b, const unsigned char *data, size_t size, int refused,
                              const char *what, size_t at)
{
    const uint64_t before = file_hash(b);
    unsigned char *copy = (unsigned char *)malloc(size ? size : 1); /* its own block, so that sanitizers see its end */
    tern_result r;
    memcpy(copy, data, size);
    r = tern_model_load(c, &b->m, copy, size);
    free(copy);
    if (refused) CHECK(r == TERN_E_FORMAT, "%s %d: %s", what, (int)at, tern_result_text(r));
    if (r != TERN_OK) CHECK(file_hash(b) == before, "%s %d: refused (%s), yet the model changed", what, (int)at, tern_last_error(c)->text);
}

static void files_damaged(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a, b;
    file_bytes f;
    size_t i;
    int bit;
    if (!t.c) return;
    file_small(t.c, &a, TERN_FOR_ADAMW);
    file_small(t.c, &b, TERN_FOR_ADAMW);
    file_save(t.c, &a, TERN_FOR_TRAINING, &f);
    for (i = 0; i < f.size; i++) file_load_changed(t.c, &b, f.data, i, 1, "cut at", i);
    for (i = 0; i < f.size; i++) {
        f.data[i] ^= 0xFF;
        file_load_changed(t.c, &b, f.data, f.size, 1, "byte", i);
        f.data[i] ^= 0xFF;
    }
    /* The parser itself, behind the hash. */
    for (i = 56; i < f.size; i++) {
        file_rehash(f.data, i);
        file_load_changed(t.c, &b, f.data, i, i + 32 <= f.size, "rehashed, cut at", i);
    }
    for (i = 0; i < f.size; i++)
        for (bit = 0; bit < 8; bit++) {
            if (i >= 48 && i < 56) continue;
            f.data[i] ^= (unsigned char)(1 << bit);
            file_rehash(f.data, f.size);
            file_load_changed(t.c, &b, f.data, f.size, 0, "rehashed, byte", i);
            f.data[i] ^= (unsigned char)(1 << bit);
        }
    file_rehash(f.data, f.size);
    CHECK_OK(t.c, tern_model_load(t.c, &b.m, f.data, f.size));
    for (i = 0; i < 3; i++) CHECK(file_equal(t.c, &a.p[i], &b.p[i], TERN_FOR_TRAINING), "%s", a.p[i].name);
    free(f.data);
    file_free(t.c, &a);
    file_free(t.c, &b);
    test_close(&t);
}

/* The first place of a string in a file, after it. */
static unsigned char *file_after(file_bytes *f, const char *text)
{
    size_t i, n = strlen(text);
    for (i = 56; i + n <= f->size; i++)
        if (memcmp(f->data + i, text, n) == 0) return f->data + i + n;
    CHECK(0, "no %s in the file", text);
    return f->data;
}

/* Sets one byte, loads, expects the text and puts the byte back. */
static void file_refused(tern_context *c, const file_model *m, file_bytes *f, unsigned char *at, int value, tern_result code,
                         const char *text)
{
    const uint64_t before = file_hash(m);
    const unsigned char old = *at;
    *at = (unsigned char)value;
    file_rehash(f->data, f->size);
    CHECK_FAILS(c, tern_model_load(c, &m->m, f->data, f->size), code, text);
    CHECK(file_hash(m) == before, "refused (%s), yet the model changed", text);
    *at = old;
    file_rehash(f->data, f->size);
}

/* Little-endian numbers of a file. */
static uint64_t file_number(const unsigned char *p, int bytes) { uint64_t v = 0; while (bytes--) v = v << 8 | p[bytes]; return v; }

/* Logarithms lie as they are, little-endian; those that no store gives are refused. Seen: no check of them. */
static void files_logarithms(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f;
    unsigned char *scale;
    int16_t l;
    if (!t.c) return;
    memset(&m, 0, sizeof m);
    file_add(&m, "a", 1, 5, TERN_ABSMEAN, TERN_PER_TENSOR)->buffer[TERN_SCALES].type = TERN_LOG;
    file_alloc(t.c, &m, TERN_FOR_INFERENCE);
    file_fill(t.c, &m);
    file_save(t.c, &m, 0, &f);
    scale = f.data + f.size - 32;
    memcpy(&l, m.p[0].buffer[TERN_SCALES].data, 2);
    CHECK(file_number(file_after(&f, "a.scale") + 20, 4) == 25 && file_number(scale, 2) == (uint16_t)l,
          "L = %d in the file, %d in the parameter", (int)file_number(scale, 2), l);
    scale[0] = 1;
    file_refused(t.c, &m, &f, scale + 1, 0x80, TERN_E_FORMAT, "a.scale: logarithm 0 is -32767, not -32256 to 32767 or -32768");
    scale[0] = 255;
    file_refused(t.c, &m, &f, scale + 1, 0x81, TERN_E_FORMAT, "a.scale: logarithm 0 is -32257");
    for (l = -32256; l != 0; l = l == -32256 ? INT16_MAX : l == INT16_MAX ? INT16_MIN : 0) {
        tern__put_number(scale, (uint64_t)(int64_t)l, 2);
        file_rehash(f.data, f.size);
        CHECK_OK(t.c, tern_model_load(t.c, &m.m, f.data, f.size));
        CHECK(*(int16_t *)m.p[0].buffer[TERN_SCALES].data == l, "L = %d is loaded as %d", l, *(int16_t *)m.p[0].buffer[TERN_SCALES].data);
    }
    free(f.data);
    file_free(t.c, &m);
    test_close(&t);
}

/* Each refusal that the file's content can bring about, by its text. */
static void files_content(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f;
    unsigned char *tensors, *data, *p;
    int64_t shadow;
    if (!t.c) return;
    memset(&m, 0, sizeof m);
    file_add(&m, "a", 2, 7, TERN_ABSMEAN, TERN_PER_ROW);
    file_add(&m, "b", 1, 5, TERN_TWN, TERN_PER_TENSOR)->buffer[TERN_SCALES].type = TERN_POW2;
    file_add(&m, "c", 1, 3, TERN_DENSE, 0);
    file_alloc(t.c, &m, TERN_FOR_INFERENCE);
    file_fill(t.c, &m);
    file_save(t.c, &m, 0, &f);
    data = f.data + f.size - 5 * 32; /* a.trits, a.scale, b.trits, b.scale, c */
    tensors = file_after(&f, "a.trits");
    CHECK_OK(t.c, tern_model_load(t.c, &m.m, f.data, f.size));

    file_refused(t.c, &m, &f, f.data, 'X', TERN_E_FORMAT, "byte 0 is 88");
    file_refused(t.c, &m, &f, f.data + 4, 2, TERN_E_FORMAT, "version 2 is not 3");
    file_refused(t.c, &m, &f, f.data + 33, 'X', TERN_E_FORMAT, "not ternary.hash");
    file_refused(t.c, &m, &f, f.data + 15, 0x80, TERN_E_FORMAT, "byte ");                    /* 2^63 tensors: data are read as names */
    file_refused(t.c, &m, &f, f.data + 23, 0x80, TERN_E_FORMAT, "byte ");                    /* 2^63 keys */
    file_refused(t.c, &m, &f, f.data + 56 + 7, 0x80, TERN_E_FORMAT, "ends in the middle");   /* length of a key */
    file_refused(t.c, &m, &f, file_after(&f, "architecture"), 13, TERN_E_FORMAT, "unknown type");
    file_refused(t.c, &m, &f, tensors, 0, TERN_E_FORMAT, "1 to 4 dimensions");
    file_refused(t.c, &m, &f, tensors, 5, TERN_E_FORMAT, "1 to 4 dimensions");
    file_refused(t.c, &m, &f, tensors + 4, 4, TERN_E_SHAPE, "a.trits is 1 x 1 x 1 x 4 in the file and 1 x 3 in the parameter");
    file_refused(t.c, &m, &f, tensors + 4 + 7, 0x40, TERN_E_FORMAT, "larger than 2^62");
    file_refused(t.c, &m, &f, tensors + 4 + 6, 0x40, TERN_E_FORMAT, "past the end");
    file_refused(t.c, &m, &f, tensors + 20, 16, TERN_E_SHAPE, "a.trits has GGML type 16 in the file and 24 in the parameter");
    file_refused(t.c, &m, &f, tensors + 24, 1, TERN_E_FORMAT, "not aligned");
    file_refused(t.c, &m, &f, tensors + 24, 0xE0, TERN_E_FORMAT, "past the end");
    file_refused(t.c, &m, &f, tensors - 1, 'S', TERN_E_MISSING, "no tensor a.trits");
    file_refused(t.c, &m, &f, file_after(&f, "ternary.a.rule") - 6, 'X', TERN_E_MISSING, "no parameter a");
    file_refused(t.c, &m, &f, file_after(&f, "ternary.a.rule") + 12, 'X', TERN_E_SHAPE,
                 "a: rule is unknown in the file and absmean in the parameter");
    file_refused(t.c, &m, &f, file_after(&f, "ternary.b.rows") - 1, 'X', TERN_E_MISSING, "no key ternary.b.rows");
    file_refused(t.c, &m, &f, file_after(&f, "ternary.b.rows"), 11, TERN_E_FORMAT, "ternary.b.rows has GGUF type 11, not 10");
    file_refused(t.c, &m, &f, file_after(&f, "ternary.b.rows") + 4, 9, TERN_E_SHAPE, "b: rows is 9 in the file and 1 in the parameter");
    file_refused(t.c, &m, &f, data, 243, TERN_E_FORMAT, "a.trits: byte 0 is 243, above 242");
    file_refused(t.c, &m, &f, data + 2, 242, TERN_E_FORMAT, "after the 14 of the matrix");
    file_refused(t.c, &m, &f, data + 32 + 3, 0xBF, TERN_E_FORMAT, "a.scale: number 0 is negative");
    p = data + 32 + 4;
    p[2] |= 0x80;
    file_refused(t.c, &m, &f, p + 3, 0x7F, TERN_E_FORMAT, "a.scale: number 1 is negative or not finite");
    p[2] &= 0x7F;
    file_rehash(f.data, f.size);
    file_refused(t.c, &m, &f, data + 3 * 32, 127, TERN_E_FORMAT, "b.scale: exponent 0 is 127");
    file_refused(t.c, &m, &f, data + 3 * 32, 0x81, TERN_E_FORMAT, "b.scale: exponent 0 is -127");

    /* What the parameter wants and the file does not have. */
    m.p[0].rule = TERN_TWN;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE, "a: rule is absmean in the file and twn");
    m.p[0].rule = TERN_ABSMEAN;
    m.p[0].grain = 7;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE, "a: grain is -1 in the file and 7 in the parameter");
    m.p[0].grain = TERN_PER_ROW;
    m.p[0].cols = 6;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE, "a: cols is 7 in the file and 6 in the parameter");
    m.p[0].cols = 7;
    m.p[0].buffer[TERN_SCALES].type = TERN_POW2;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE,
                "a.scale has GGML type 0 in the file and 24 in the parameter");
    m.p[0].buffer[TERN_SCALES].type = TERN_F32;
    strcpy(m.p[2].name, "d");
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_MISSING, "no parameter d");
    strcpy(m.p[2].name, "c");
    CHECK_OK(t.c, tern_param_alloc(t.c, &m.p[0], 1 << TERN_SHADOW));
    free(f.data);
    file_save(t.c, &m, 1 << TERN_SHADOW, &f);
    m.p[0].buffer[TERN_SHADOW].type = TERN_BF16;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE,
                "a.shadow has GGML type 0 in the file and 30 in the parameter");
    m.p[0].buffer[TERN_SHADOW].type = TERN_F32;
    shadow = (int64_t)m.p[0].buffer[TERN_SHADOW].count;
    m.p[0].buffer[TERN_SHADOW].count = (size_t)shadow - 1;
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, f.data, f.size), TERN_E_SHAPE, "a: its shadow has 13 elements of 14");
    m.p[0].buffer[TERN_SHADOW].count = (size_t)shadow;
    free(f.data);
    file_free(t.c, &m);
    test_close(&t);
}

/* Keys of kinds that save does not write are skipped, and general.alignment moves the data. */
static void files_other_keys(void)
{
    static const unsigned char keys[] = {
        1, 0, 0, 0, 0, 0, 0, 0, 'a', 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,                            /* two strings */
        1, 0, 0, 0, 0, 0, 0, 0, 'x', 0, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0, 'b', 9, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6,          /* three int16 */
        1, 0, 0, 0, 0, 0, 0, 0, 'c', 12, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8,                                       /* a float64 */
        17, 0, 0, 0, 0, 0, 0, 0, 'g', 'e', 'n', 'e', 'r', 'a', 'l', '.', 'a', 'l', 'i', 'g', 'n', 'm', 'e', 'n', 't',
        4, 0, 0, 0, 0, 1, 0, 0                                                                                  /* 256 */
    };
    const size_t first = 56;
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f, g;
    size_t infos;
    uint64_t before;
    if (!t.c) return;
    memset(&m, 0, sizeof m);
    file_add(&m, "gain", 1, 5, TERN_DENSE, 0);
    file_alloc(t.c, &m, 0);
    file_fill(t.c, &m);
    before = file_hash(&m);
    file_save(t.c, &m, 0, &f);
    infos = (size_t)(file_after(&f, "ternary.gain.grain") + 8 - f.data) + 44; /* the end of one tensor's place */
    g.size = 512 + 32;
    g.data = (unsigned char *)calloc(g.size, 1);
    CHECK(infos + sizeof keys > 256 && infos + sizeof keys <= 512, "%d bytes before the data", (int)(infos + sizeof keys));
    memcpy(g.data, f.data, first);
    g.data[16] = (unsigned char)(g.data[16] + 4);
    memcpy(g.data + first, keys, sizeof keys);
    memcpy(g.data + first + sizeof keys, f.data + first, infos - first);
    memcpy(g.data + 512, f.data + f.size - 32, 32);
    file_rehash(g.data, g.size);
    memset(m.p[0].buffer[TERN_SHADOW].data, 0, 20);
    CHECK_OK(t.c, tern_model_load(t.c, &m.m, g.data, g.size));
    CHECK(file_hash(&m) == before, "other values");
    file_refused(t.c, &m, &g, g.data + first + 13, 9, TERN_E_FORMAT, "an array has elements of an unknown type");
    file_refused(t.c, &m, &g, g.data + first + 42 + 24, 1, TERN_E_FORMAT, "an array is longer than the file");
    file_refused(t.c, &m, &g, g.data + first + sizeof keys - 3, 3, TERN_E_FORMAT, "general.alignment");
    file_refused(t.c, &m, &g, g.data + first + sizeof keys - 3, 0, TERN_E_FORMAT, "general.alignment");
    file_refused(t.c, &m, &g, g.data + first + sizeof keys - 3, 4, TERN_E_FORMAT, "general.alignment"); /* 1024 */
    g.size = infos + sizeof keys;
    file_refused(t.c, &m, &g, g.data, 'G', TERN_E_FORMAT, "ends before the tensors' data");
    free(f.data);
    free(g.data);
    file_free(t.c, &m);
    test_close(&t);
}

/* Models and arguments that save, load and export refuse. */
static void files_arguments(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f;
    tern_sink s = file_sink(&f);
    if (!t.c) return;
    memset(&m, 0, sizeof m);
    file_add(&m, "a", 2, 7, TERN_ABSMEAN, TERN_PER_ROW);
    file_add(&m, "a.scale", 1, 5, TERN_DENSE, 0);
    CHECK_FAILS(t.c, tern_model_save(t.c, NULL, 0, &s), TERN_E_ARGUMENT, "the model is NULL");
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_ARGUMENT, "a.scale would also be the name of a tensor of a");
    strcpy(m.p[1].name, "a");
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, "", 0), TERN_E_ARGUMENT, "two parameters of the model have the name a");
    m.p[1].name[0] = 0;
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_ARGUMENT, "parameter 1 of the model has no name");
    memset(m.p[1].name, 'n', 56);
    m.p[1].name[56] = 0;
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_ARGUMENT, "56 bytes exceeds 55");
    m.p[1].name[55] = 0;
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_MISSING, "a has no trits");
    file_alloc(t.c, &m, TERN_FOR_INFERENCE);
    file_fill(t.c, &m);
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, NULL), TERN_E_ARGUMENT, "sink");
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, NULL, 100), TERN_E_ARGUMENT, "the file is NULL");
    CHECK_FAILS(t.c, tern_model_load(t.c, &m.m, "GGUF", 4), TERN_E_FORMAT, "4 bytes is too short");
    CHECK_FAILS(t.c, tern_model_export(t.c, &m.m, (tern_export)1, &s, NULL), TERN_E_ARGUMENT, "form 1 is not");
    CHECK_FAILS(t.c, tern_model_export(t.c, &m.m, TERN_TQ1_0, &s, NULL), TERN_E_SHAPE, "a: 7 columns are not whole TQ1_0 blocks of 256");
    CHECK_FAILS(t.c, tern_model_export(t.c, &m.m, TERN_Q2_0, &s, NULL), TERN_E_SHAPE, "a: 7 columns are not whole Q2_0 blocks of 64");
    ((float *)m.p[0].buffer[TERN_SCALES].data)[1] = -1.0f;
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_NONFINITE, "a: scales[1][0] is negative");
    ((unsigned char *)m.p[0].buffer[TERN_TRITS].data)[0] = 0xFF;
    CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, 0, &s), TERN_E_TRIT, "row 0");
    CHECK(f.writes == 0, "bytes were written of a model that cannot be saved");
    CHECK(tern_model_save_file(NULL, &m.m, 0, "x") == TERN_E_ARGUMENT, "a NULL context");
    CHECK(tern_model_load_file(NULL, &m.m, "x") == TERN_E_ARGUMENT, "a NULL context");
    free(f.data);
    file_free(t.c, &m);
    test_close(&t);
}

/* -- failures -- */

static void files_sink_fails(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f;
    tern_sink s;
    long i, writes = 0;
    if (!t.c) return;
    file_small(t.c, &m, TERN_FOR_ADAMW);
    for (i = 0; i == 0 || i < writes; i++) {
        if (i == 0) { /* how many there are */
            s = file_sink(&f);
            CHECK_OK(t.c, tern_model_save(t.c, &m.m, TERN_FOR_TRAINING, &s));
            writes = f.writes;
            free(f.data);
        }
        s = file_sink(&f);
        f.fail_at = i;
        CHECK_FAILS(t.c, tern_model_save(t.c, &m.m, TERN_FOR_TRAINING, &s), TERN_E_IO, "the sink refused");
        CHECK(f.writes == i + 1, "write %ld failed and %ld more followed", i, f.writes - i - 1);
        free(f.data);
    }
    printf("  %ld writes failed in turn\n", writes);
    CHECK(writes > 1, "one write is no test");
    file_free(t.c, &m);
    test_close(&t);
}

/* One call with each of its allocations failed in turn; `next` is what a call does. */
static void file_each_allocation(tern_context *c, const file_model *m, const file_bytes *from, int load)
{
    const uint64_t before = file_hash(m);
    tern_result r;
    long i, failures = 0;
    for (i = 0; ; i++) {
        const long blocks = test_blocks;
        file_bytes f;
        const tern_sink s = file_sink(&f);
        test_fail_at = test_allocations + i;
        r = load ? tern_model_load(c, &m->m, from->data, from->size) : tern_model_save(c, &m->m, TERN_FOR_TRAINING, &s);
        test_fail_at = -1;
        free(f.data);
        CHECK(test_blocks == blocks, "%ld blocks leaked", test_blocks - blocks);
        if (r == TERN_OK) break;
        failures++;
        CHECK(r == TERN_E_MEMORY, "allocation %ld: %s", i, tern_result_text(r));
        CHECK(file_hash(m) == before, "allocation %ld failed, yet the model changed", i);
        if (i > 10000) break;
    }
    printf("  %s: %ld allocations failed in turn\n", load ? "load" : "save", failures);
    CHECK(failures >= (load ? 5 : 2), "too few");
}

static void files_allocation_fails(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a, b;
    file_bytes f;
    if (!t.c) return;
    file_small(t.c, &a, TERN_FOR_ADAMW);
    file_small(t.c, &b, TERN_FOR_ADAMW);
    file_save(t.c, &a, TERN_FOR_TRAINING, &f);
    file_each_allocation(t.c, &a, &f, 0);
    file_each_allocation(t.c, &b, &f, 1);
    free(f.data);
    file_free(t.c, &a);
    file_free(t.c, &b);
    test_close(&t);
}

static void files_paths(void)
{
    static const char name[] = "tests_files.gguf";
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a, b;
    file_bytes f;
    FILE *file;
    if (!t.c) return;
    file_small(t.c, &a, TERN_FOR_ADAMW);
    file_small(t.c, &b, TERN_FOR_ADAMW);
    CHECK_FAILS(t.c, tern_model_save_file(t.c, &a.m, 0, "no/such/folder/x"), TERN_E_IO, "cannot write no/such/folder/x");
    CHECK_FAILS(t.c, tern_model_load_file(t.c, &a.m, "no/such/folder/x"), TERN_E_IO, "cannot open no/such/folder/x");
    CHECK_FAILS(t.c, tern_model_save_file(t.c, &a.m, 0, NULL), TERN_E_ARGUMENT, "path");
    CHECK_FAILS(t.c, tern_model_load_file(t.c, &a.m, NULL), TERN_E_ARGUMENT, "path");
    CHECK(tern_model_load_file(t.c, &a.m, ".") != TERN_OK, "a folder was read as a file");
    CHECK_OK(t.c, tern_model_save_file(t.c, &a.m, TERN_FOR_TRAINING, name));
    CHECK_OK(t.c, tern_model_load_file(t.c, &b.m, name));
    CHECK(file_equal(t.c, &a.p[0], &b.p[0], TERN_FOR_TRAINING) && file_equal(t.c, &a.p[1], &b.p[1], TERN_FOR_TRAINING), "the file on disk");

    /* A model that cannot be saved leaves the older file alone. */
    a.p[0].name[0] = 0;
    CHECK_FAILS(t.c, tern_model_save_file(t.c, &a.m, 0, name), TERN_E_ARGUMENT, "no name");
    strcpy(a.p[0].name, "wide");
    CHECK_OK(t.c, tern_model_load_file(t.c, &b.m, name));
    file_save(t.c, &a, TERN_FOR_TRAINING, &f);
    file = fopen(name, "wb");
    CHECK(file && fwrite(f.data, 1, f.size - 1, file) == f.size - 1, "cannot write");
    if (file) fclose(file);
    CHECK_FAILS(t.c, tern_model_load_file(t.c, &b.m, name), TERN_E_FORMAT, "truncated or corrupted");
    remove(name);
    free(f.data);
    file_free(t.c, &a);
    file_free(t.c, &b);
    test_close(&t);
}

#if defined(__unix__)
/* Another process reads the file and tells by its exit status whether it found the same bits. */
static void files_second_process(void)
{
    static const char name[] = "tests_files_process.gguf";
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model a;
    int status = -1;
    pid_t child;
    if (!t.c) return;
    file_small(t.c, &a, TERN_FOR_ADAMW);
    CHECK_OK(t.c, tern_model_save_file(t.c, &a.m, TERN_FOR_TRAINING, name));
    fflush(stdout);
    child = fork();
    if (child == 0) {
        test_context u = test_open(TERN_ISA_SCALAR, 1);
        file_model b;
        int equal = 1;
        int32_t i;
        test_seed = 4711; /* other weights than the parent's, until they are loaded */
        file_small(u.c, &b, TERN_FOR_ADAMW);
        equal &= !file_equal(u.c, &a.p[0], &b.p[0], TERN_FOR_TRAINING);
        equal &= tern_model_load_file(u.c, &b.m, name) == TERN_OK;
        for (i = 0; i < 3; i++) equal &= file_equal(u.c, &a.p[i], &b.p[i], TERN_FOR_TRAINING);
        file_free(u.c, &b);
        test_close(&u);
        file_free(t.c, &a); /* the child's copies, for the sake of leak checkers */
        test_close(&t);
        _exit(equal ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0, "the second process ended with %d", status);
    remove(name);
    file_free(t.c, &a);
    test_close(&t);
}
#endif

/* -- ggml's blocks -- */

/* ggml's quantizer of one block: d = max|w|, trits rounded half away from zero. */
static float file_ggml_block(const float *w, int n, int8_t *trits)
{
    float d = 0.0f, inverse;
    int i;
    for (i = 0; i < n; i++) d = tern__abs(w[i]) > d ? tern__abs(w[i]) : d;
    inverse = d > 0.0f ? 1.0f / d : 0.0f;
    for (i = 0; i < n; i++) {
        const float x = w[i] * inverse;
        trits[i] = (int8_t)(x >= 0.5f ? 1 : x <= -0.5f ? -1 : 0);
    }
    return d;
}

/* Hashes of what ggml's own quantizers write for these floats: FNV-1a from the start value below, which
   is not the usual one. */
static void files_known_answers(void)
{
    const uint64_t start = UINT64_C(1469598103934665603);
    static const uint64_t expected[3] = {UINT64_C(0x454ecf455d376f7a), UINT64_C(0x03d4d69de0c46d03), UINT64_C(0xdf80e9115b1278e7)};
    static const int sizes[3] = {864, 1056, 1152};
    static float w[4096];
    uint32_t s = 12345;
    int i, k;
    for (i = 0; i < 4096; i++) {
        s = s * 1664525u + 1013904223u;
        w[i] = (float)(s >> 8) / 16777216.0f * 2.0f - 1.0f;
    }
    for (k = 0; k < 3; k++) {
        const tern__block *b = &tern__blocks[k];
        uint64_t h = start;
        int bytes = 0;
        for (i = 0; i < 4096; i += b->weights) {
            int8_t trits[256];
            uint8_t out[TERN__BLOCK_BYTES];
            const float d = file_ggml_block(w + i, b->weights, trits);
            b->encode(trits, tern__to_f16(d), out);
            h = test_hash_bytes(h, out, (size_t)b->bytes);
            bytes += b->bytes;
        }
        CHECK(bytes == sizes[k] && h == expected[k], "%s: %d bytes, hash %016llx", b->name, bytes, (unsigned long long)h);
    }
}

/* A block back to trits, by the formats' own rules. */
static void file_decode(tern_export form, const unsigned char *b, int8_t *t, float *d)
{
    int i, n;
    if (form == TERN_TQ1_0) {
        int power = 1;
        for (n = 0; n < 5; n++, power *= 3)
            for (i = 0; i < 52; i++) {
                const int digit = (((b[i] * power) & 255) * 3) >> 8;
                if (i < 32) t[i + 32 * n] = (int8_t)(digit - 1);
                else if (i < 48) t[160 + i - 32 + 16 * n] = (int8_t)(digit - 1);
                else if (n < 4) t[240 + i - 48 + 4 * n] = (int8_t)(digit - 1);
            }
        *d = tern__from_f16((uint16_t)file_number(b + 52, 2));
    } else if (form == TERN_TQ2_0) {
        for (i = 0; i < 256; i++) t[i] = (int8_t)((b[i / 128 * 32 + i % 32] >> 2 * (i % 128 / 32) & 3) - 1);
        *d = tern__from_f16((uint16_t)file_number(b + 64, 2));
    } else {
        for (i = 0; i < 64; i++) t[i] = (int8_t)((b[2 + i / 4] >> 2 * (i % 4) & 3) - 1);
        *d = tern__from_f16((uint16_t)file_number(b, 2));
    }
}

static void file_export(tern_context *c, tern_export form, int32_t grain, tern_type scale)
{
    const tern__block *b = &tern__blocks[form == TERN_TQ1_0 ? 0 : form == TERN_TQ2_0 ? 1 : 2];
    const int64_t rows = 17, cols = 768, blocks = cols / b->weights, bytes = rows * blocks * b->bytes;
    const int64_t padded = (bytes + 31) / 32 * 32;
    file_model m;
    file_bytes f;
    tern_sink s = file_sink(&f);
    unsigned char *info, *data;
    int8_t row[768], trits[256];
    float scales[768], d, worst = 0.0f, reported = -1.0f;
    int64_t i, j, group = grain > 0 ? grain : cols;
    memset(&m, 0, sizeof m);
    file_add(&m, "w", rows, cols, TERN_ABSMEAN, grain)->buffer[TERN_SCALES].type = scale;
    file_add(&m, "bias", 1, 9, TERN_DENSE, 0);
    file_alloc(c, &m, TERN_FOR_INFERENCE);
    file_fill(c, &m);
    CHECK_OK(c, tern_model_export(c, &m.m, form, &s, &reported));
    CHECK(f.size % 32 == 0 && file_number(f.data + 8, 8) == 2 && file_number(f.data + 16, 8) == 3, "the header");
    info = f.data; /* the last key's value is the only 4-byte number before the first tensor */
    for (i = 0; i + 18 < (int64_t)f.size && memcmp(f.data + i, "quantization_version", 20) != 0; i++) info = f.data + i;
    info += 1 + 20 + 4 + 4;
    CHECK(file_number(info, 8) == 1 && info[8] == 'w', "the tensor's name");
    CHECK(file_number(info + 9, 4) == 2 && file_number(info + 13, 8) == (uint64_t)cols
          && file_number(info + 21, 8) == (uint64_t)rows, "its shape");
    CHECK(file_number(info + 29, 4) == (uint64_t)form && file_number(info + 33, 8) == 0, "its type");
    data = f.data + f.size - padded - 64;
    for (i = 0; i < rows; i++) {
        CHECK_OK(c, tern_param_get(c, &m.p[0], i, row, scales, NULL));
        for (j = 0; j < blocks; j++) {
            const float scale_here = scales[j * b->weights / group],
                        error = tern__abs(tern__from_f16(tern__to_f16(scale_here)) - scale_here) / scale_here;
            file_decode(form, data + (i * blocks + j) * b->bytes, trits, &d);
            CHECK(memcmp(trits, row + j * b->weights, (size_t)b->weights) == 0, "%s: trits of row %d, block %d", b->name, (int)i, (int)j);
            CHECK(d == tern__from_f16(tern__to_f16(scale_here)), "%s: scale of row %d, block %d", b->name, (int)i, (int)j);
            worst = error > worst ? error : worst;
        }
    }
    CHECK(reported == worst && (scale != TERN_POW2 || worst == 0.0f),
          "%s: largest error %g, reported %g", b->name, (double)worst, (double)reported);
    for (i = 0; i < 9; i++)
        CHECK(file_number(data + padded + 4 * i, 4) == tern__bits(((float *)m.p[1].buffer[TERN_SHADOW].data)[i]), "bias %d", (int)i);
    free(f.data);
    file_free(c, &m);
}

static void files_export(void)
{
    static const tern_export forms[] = {TERN_TQ1_0, TERN_TQ2_0, TERN_Q2_0};
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model m;
    file_bytes f;
    tern_sink s = file_sink(&f);
    int i;
    if (!t.c) return;
    for (i = 0; i < 3; i++) {
        file_export(t.c, forms[i], TERN_PER_TENSOR, TERN_F32);
        file_export(t.c, forms[i], TERN_PER_ROW, TERN_F32);
        file_export(t.c, forms[i], TERN_PER_ROW, TERN_POW2);
        file_export(t.c, forms[i], forms[i] == TERN_Q2_0 ? 64 : 256, TERN_F32);
        file_export(t.c, forms[i], 512, TERN_POW2); /* with a short last group */
        file_export(t.c, forms[i], 256, TERN_LOG);
    }
    memset(&m, 0, sizeof m);
    file_add(&m, "w", 1, 256, TERN_ABSMEAN, 128);
    file_alloc(t.c, &m, TERN_FOR_INFERENCE);
    file_fill(t.c, &m);
    CHECK_FAILS(t.c, tern_model_export(t.c, &m.m, TERN_TQ2_0, &s, NULL), TERN_E_SHAPE,
                "w: groups of 128 are not whole TQ2_0 blocks of 256");
    CHECK_OK(t.c, tern_model_export(t.c, &m.m, TERN_Q2_0, &s, NULL));
    free(f.data);
    s = file_sink(&f);
    ((float *)m.p[0].buffer[TERN_SCALES].data)[0] = 65520.0f;
    CHECK_FAILS(t.c, tern_model_export(t.c, &m.m, TERN_Q2_0, &s, NULL), TERN_E_OVERFLOW, "w: a scale exceeds 65504");
    CHECK(f.writes == 0, "bytes were written of a model that cannot be exported");
    file_free(t.c, &m);
    test_close(&t);
}

/* A rotation is part of the weights: saved with them, and of another seed, of none or in ggml's forms refused. */
static void file_rotated_model(tern_context *c, file_model *f, uint32_t first, uint32_t second)
{
    memset(f, 0, sizeof *f);
    file_add(f, "a", 5, 256, TERN_ABSMEAN, TERN_PER_ROW)->rotate = first;
    file_add(f, "b", 4, 256, TERN_ABSMEAN, TERN_PER_ROW)->rotate = second;
    file_alloc(c, f, TERN_FOR_GRADIENT);
    file_fill(c, f);
}

static void files_rotated(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    file_model f, g;
    file_bytes b, none;
    tern_sink sink = file_sink(&none);
    uint64_t before;
    file_rotated_model(t.c, &f, 5, 0);
    file_save(t.c, &f, TERN_FOR_TRAINING, &b);
    file_rotated_model(t.c, &g, 5, 0);
    CHECK_OK(t.c, tern_model_load(t.c, &g.m, b.data, b.size));
    CHECK(file_equal(t.c, &f.p[0], &g.p[0], 1 << TERN_SHADOW) && file_equal(t.c, &f.p[1], &g.p[1], 1 << TERN_SHADOW),
          "a rotated model came back otherwise");
    before = file_hash(&g);
    g.p[0].rotate = 6;
    CHECK_FAILS(t.c, tern_model_load(t.c, &g.m, b.data, b.size), TERN_E_SHAPE, "a: rotate is 5 in the file and 6 in the parameter");
    g.p[0].rotate = 0;
    CHECK_FAILS(t.c, tern_model_load(t.c, &g.m, b.data, b.size), TERN_E_SHAPE, "a: rotate is 5 in the file and 0 in the parameter");
    g.p[0].rotate = 5;
    g.p[1].rotate = 5;
    CHECK_FAILS(t.c, tern_model_load(t.c, &g.m, b.data, b.size), TERN_E_SHAPE, "b: rotate is 0 in the file and 5 in the parameter");
    CHECK(file_hash(&g) == before, "a refused file changed a parameter");
    CHECK_FAILS(t.c, tern_model_export(t.c, &f.m, TERN_TQ1_0, &sink, NULL), TERN_E_UNSUPPORTED, "a is rotated, which TQ1_0 cannot say");
    CHECK(none.size == 0, "a refused export wrote %d bytes", (int)none.size);
    file_free(t.c, &f);
    file_free(t.c, &g);
    free(b.data);
    test_close(&t);
}

static void suite_files(void)
{
    RUN(files_rotated);
    RUN(files_round_trip);
    RUN(files_chunks);
    RUN(files_resume);
    RUN(files_subsets);
    RUN(files_golden);
    RUN(files_damaged);
    RUN(files_logarithms);
    RUN(files_content);
    RUN(files_other_keys);
    RUN(files_arguments);
    RUN(files_sink_fails);
    RUN(files_allocation_fails);
    RUN(files_paths);
#if defined(__unix__)
    RUN(files_second_process);
#endif
    RUN(files_known_answers);
    RUN(files_export);
}
