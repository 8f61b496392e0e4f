/* Room 14, backends: every operation of the table. Forward results are the scalar single-thread result bit
   for bit on every tier, for any number of threads and any split of the batch, with hashes that hold on
   every machine; gradients stand beside float64 references.
   Mutations that test_bf16_products saw (with AVX512-BF16 or TEST_AMX): ties away from zero; truncation;
   scales left out; scales of groups taken from the first one; scales of rows rounded by themselves; the
   first 32 scales for all terms. */
#include <math.h>
#include <stddef.h>

/* -- memory of a test: exact sizes and no initial values, so that sanitizers see every slip -- */

static void *held[128];
static int held_count;

static void *hold(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p || held_count == 128) abort();
    return held[held_count++] = p;
}

static void release(void)
{
    while (held_count > 0) free(held[--held_count]);
}

static float *hold_output(int64_t n) { return (float *)hold((size_t)n * sizeof(float)); }

static float *hold_zeros(int64_t n) { return (float *)memset(hold((size_t)n * sizeof(float)), 0, (size_t)n * sizeof(float)); }

static float *hold_floats(int64_t n)
{
    float *x = hold_output(n);
    int64_t i;
    for (i = 0; i < n; i++) x[i] = test_float();
    return x;
}

static float *hold_copy(const float *x, int64_t n) { return (float *)memcpy(hold_output(n), x, (size_t)n * sizeof(float)); }

static int32_t *hold_ids(int64_t n, int32_t below)
{
    int32_t *ids = (int32_t *)hold((size_t)n * sizeof(int32_t));
    int64_t i;
    for (i = 0; i < n; i++) ids[i] = (int32_t)(test_random() % (uint32_t)below);
    return ids;
}

/* -- records: the outputs of a piece of work as bytes, words with their low byte first -- */

typedef struct record { unsigned char *data; size_t size, room; } record;
typedef void work(tern_context *c, record *r);

static void record_bytes(record *r, const void *x, int64_t n)
{
    const size_t bytes = (size_t)n;
    if (r->size + bytes > r->room) {
        r->room = 2 * (r->size + bytes);
        r->data = (unsigned char *)realloc(r->data, r->room);
        if (!r->data) abort();
    }
    memcpy(r->data + r->size, x, bytes);
    r->size += bytes;
}

static void record_words(record *r, const void *x, int64_t n)
{
    int64_t i;
    for (i = 0; i < n; i++) {
        uint32_t u;
        unsigned char b[4];
        memcpy(&u, (const unsigned char *)x + 4 * i, 4);
        b[0] = (unsigned char)u; b[1] = (unsigned char)(u >> 8); b[2] = (unsigned char)(u >> 16); b[3] = (unsigned char)(u >> 24);
        record_bytes(r, b, 4);
    }
}

static record record_of(work *f, tern_isa isa, int32_t threads)
{
    record r = {NULL, 0, 0};
    test_context t = test_open(isa, threads);
    if (t.c) {
        test_seed = 1;
        f(t.c, &r);
        CHECK_OK(t.c, tern_sync(t.c));
        release();
    }
    test_close(&t);
    return r;
}

/* With the thread counts from number `first` on. */
static void same_for_threads_as(work *f, tern_isa isa, const record *want, int first)
{
    int i;
    for (i = first; i < TEST_THREAD_COUNTS; i++) {
        record got = record_of(f, isa, test_threads[i]);
        CHECK(got.size == want->size && memcmp(got.data, want->data, got.size) == 0,
              "tier %d with %d threads differs", (int)isa, (int)test_threads[i]);
        free(got.data);
    }
}

/* The inference path: one result for every tier and thread count, with this hash on every machine. */
static void same_everywhere(work *f, uint64_t golden)
{
    record want = record_of(f, TERN_ISA_SCALAR, test_threads[0]);
    const uint64_t hash = test_hash_bytes(TEST_HASH, want.data, want.size);
    int isa;
    CHECK(hash == golden, "the hash is 0x%016llX", (unsigned long long)hash);
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        if (test_tier((tern_isa)isa)) same_for_threads_as(f, (tern_isa)isa, &want, isa == TERN_ISA_SCALAR);
    free(want.data);
}

/* Training: one result for every thread count of a tier. */
static void same_for_threads(work *f)
{
    int isa;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        record want;
        if (!test_tier((tern_isa)isa)) continue;
        want = record_of(f, (tern_isa)isa, test_threads[0]);
        same_for_threads_as(f, (tern_isa)isa, &want, 1);
        free(want.data);
    }
}

/* The same work once on each tier, with checks of its own. */
static void on_each_tier(work *f)
{
    int isa;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        if (test_tier((tern_isa)isa)) free(record_of(f, (tern_isa)isa, test_threads[0]).data);
}

/* -- ternary matrices and activations -- */

static tern_matrix hold_matrix(tern_context *c, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_type scale_type)
{
    tern_ternarize_args a = TERN_ZERO;
    size_t trits = 0, scales = 0;
    a.m.rows = rows; a.m.cols = cols;
    a.m.grain = grain;
    a.m.encoding = encoding;
    a.m.scale_type = scale_type;
    CHECK_OK(c, tern_matrix_bytes(c, &a.m, &trits, &scales));
    a.m.trits = hold(trits);
    a.m.scales = hold(scales);
    a.w = hold_floats(rows * cols);
    CHECK_OK(c, tern_ternarize(c, &a));
    return a.m;
}

static tern_quantize_args hold_activations(tern_context *c, tern_act act, const tern_matrix *m, int64_t n, const float *x,
                                           tern_norm_kind norm, const float *gain)
{
    tern_quantize_args a = TERN_ZERO;
    int64_t stride = 0, groups = 0;
    CHECK_OK(c, tern_activation_shape(c, m, &stride, &groups));
    a.m = *m;
    a.act = act;
    a.n = n;
    a.x = x;
    a.norm = norm;
    a.gain = gain;
    a.eps = 1e-6f;
    a.q = (int8_t *)hold((size_t)(n * stride));
    a.scale = hold_output(n);
    a.sum = (int32_t *)hold((size_t)(n * groups) * 4);
    CHECK_OK(c, tern_quantize(c, &a));
    return a;
}

static tern_quantize_args hold_quantized(tern_context *c, const tern_matrix *m, int64_t n, const float *x, tern_norm_kind norm,
                                         const float *gain)
{
    return hold_activations(c, TERN_ACT_INT8, m, n, x, norm, gain);
}

/* Floats of which one in `each` is not 0. */
static float *hold_sparse(int64_t n, uint32_t each)
{
    float *x = hold_floats(n);
    int64_t i;
    for (i = 0; i < n; i++) if (test_random() % each) x[i] = 0.0f;
    return x;
}

/* Where input `col` of a token lies in its int8 activations. */
static int64_t place_of(const tern_matrix *m, int64_t col)
{
    const int64_t unit = m->encoding == TERN_BASE3 ? 20 : 16;
    return m->grain > 0 ? col / m->grain * ((m->grain + unit - 1) / unit * unit) + col % m->grain : col;
}

static void record_quantized(tern_context *c, record *r, const tern_quantize_args *a)
{
    int64_t stride = 0, groups = 0, t, i;
    const tern__shape s = tern__shape_of(&a->m);
    CHECK_OK(c, tern_activation_shape(c, &a->m, &stride, &groups));
    for (t = 0; t < a->n; t++) {
        record_bytes(r, a->q + t * stride, s.units * s.unit); /* what the layout defines; the rest is padding */
        for (i = s.units * s.unit; i < stride; i++) CHECK(a->q[t * stride + i] == 0, "padding of token %d", (int)t);
    }
    record_words(r, a->scale, a->n);
    record_words(r, a->sum, a->n * groups);
}

static tern_matmul_args matmul_of(const tern_quantize_args *q, const float *bias, float *y)
{
    tern_matmul_args a = TERN_ZERO;
    a.m = q->m;
    a.act = q->act;
    a.n = q->n;
    a.q = q->q; a.scale = q->scale; a.sum = q->sum;
    a.bias = bias;
    a.y = y;
    return a;
}

static tern_matmul_args float_matmul_of(const tern_matrix *m, int64_t n, const float *x, const float *bias, float *y)
{
    tern_matmul_args a = TERN_ZERO;
    a.m = *m;
    a.n = n;
    a.x = x;
    a.bias = bias;
    a.y = y;
    return a;
}

/* One product in int8 and in float activations, with everything on the way. */
static void record_product(tern_context *c, record *r, const tern_matrix *m, int64_t n, int variant)
{
    const float *x = hold_floats(n * m->cols), *gain = hold_floats(m->cols), *bias = hold_floats(m->rows);
    tern_quantize_args q = hold_quantized(c, m, n, x, variant & 1 ? TERN_NORM_RMS : TERN_NORM_NONE, variant & 2 ? gain : NULL);
    tern_matmul_args a = matmul_of(&q, variant & 1 ? bias : NULL, hold_output(n * m->rows));
    record_quantized(c, r, &q);
    CHECK_OK(c, tern_matmul(c, &a));
    record_words(r, a.y, n * m->rows);
    a = float_matmul_of(m, n, x, variant & 1 ? bias : NULL, a.y);
    CHECK_OK(c, tern_matmul(c, &a));
    record_words(r, a.y, n * m->rows);
}

static void record_unpacked(tern_context *c, record *r, const tern_matrix *m)
{
    tern_unpack_args a = TERN_ZERO;
    a.m = *m;
    a.count = m->rows;
    a.trits = (int8_t *)hold((size_t)(m->rows * m->cols));
    a.values = hold_output(m->rows * m->cols);
    CHECK_OK(c, tern_unpack(c, &a));
    record_bytes(r, a.trits, m->rows * m->cols);
    record_words(r, a.values, m->rows * m->cols);
}

static const int32_t every_grain[] = {TERN_PER_TENSOR, TERN_PER_ROW, 1, 16, 50};
static const tern_type every_scale_type[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};

static void odd_products(tern_context *c, record *r)
{
    static const int64_t tokens[] = {1, 3, 70};
    int i, j, g, variant = 0;
    for (i = 0; i < TEST_SIZES; i++)
        for (j = 0; j < TEST_SIZES; j++)
            for (g = 0; g < 5; g++, variant++) {
                const tern_matrix m = hold_matrix(c, test_sizes[i], test_sizes[j], every_grain[g], variant & 1 ? TERN_BASE3 : TERN_2BIT,
                                                  every_scale_type[variant / 2 % 4]);
                record_unpacked(c, r, &m);
                record_product(c, r, &m, tokens[variant % 3], variant >> 2);
                release();
            }
}
static void test_odd_products(void) { same_everywhere(odd_products, UINT64_C(0xAD1CD6D04FD0CE04)); }

/* All logarithms, those that no store gives too: each the scale of one trit 1, and the input is 1. Seen: kernels that
   read what lies below the normal floats as a number. */
static void all_log_scales(tern_context *c, record *r)
{
    enum { ALL = 65536 };
    const float one = 1.0f;
    int8_t *ones = (int8_t *)memset(hold(ALL), 1, ALL);
    int variant;
    (void)r;
    for (variant = 0; variant < 4; variant++) {
        const tern_matrix m = hold_matrix(c, ALL, 1, variant & 1 ? 1 : TERN_PER_ROW, variant & 2 ? TERN_BASE3 : TERN_2BIT, TERN_LOG);
        const tern_quantize_args q = hold_quantized(c, &m, 1, &one, TERN_NORM_NONE, NULL);
        const tern_matmul_args a = matmul_of(&q, NULL, hold_output(ALL));
        tern_pack_args p = TERN_ZERO;
        int64_t i, wrong = 0;
        p.m = m;
        p.trits = ones;
        CHECK_OK(c, tern_pack(c, &p));
        for (i = 0; i < ALL; i++) ((int16_t *)m.scales)[i] = (int16_t)(i - 32768);
        q.q[0] = 1;
        q.sum[0] = 1;
        q.scale[0] = 1.0f;
        CHECK_OK(c, tern_matmul(c, &a));
        for (i = 0; i < ALL; i++) wrong += a.y[i] != tern__from_log((int16_t)(i - 32768));
        CHECK(wrong == 0, "variant %d: %d of the logarithms", variant, (int)wrong);
    }
    release();
}
static void test_log_scales(void) { on_each_tier(all_log_scales); }

/* Beyond every block: 4 panels of a dot call, 12 tokens and 2048 inputs of one with floats. */
static void large_products(tern_context *c, record *r)
{
    static const int32_t wide[] = {TERN_PER_TENSOR, TERN_PER_ROW, 700, 2100};
    int g;
    for (g = 0; g < 4; g++) {
        tern_matrix m = hold_matrix(c, 70, 4200, wide[g], g & 1 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
        record_product(c, r, &m, 67, g);
        release();
        m = hold_matrix(c, 35, 40, wide[g], g & 1 ? TERN_2BIT : TERN_BASE3, TERN_POW2);
        record_product(c, r, &m, 200, g);
        release();
    }
}
static void test_large_products(void) { same_everywhere(large_products, UINT64_C(0x0643D90C80E1489C)); }

/* Int4 and bits. A product of bits is that of the int8 activations 0 and 1; a token has the same y alone. */
static void record_kinds(tern_context *c, record *r, const tern_matrix *m, int64_t n, uint32_t each)
{
    const float *x = hold_sparse(n * m->cols, each), *bias = hold_floats(m->rows);
    const tern_quantize_args bits = hold_activations(c, TERN_ACT_BIT, m, n, x, TERN_NORM_NONE, NULL);
    const tern_quantize_args last = hold_activations(c, TERN_ACT_BIT, m, 1, x + (n - 1) * m->cols, TERN_NORM_NONE, NULL);
    const tern_quantize_args int4 = hold_activations(c, TERN_ACT_INT4, m, n, x, TERN_NORM_RMS, NULL);
    const tern_quantize_args ones = hold_activations(c, TERN_ACT_INT8, m, n, x, TERN_NORM_NONE, NULL);
    float *y = hold_output(n * m->rows);
    tern_matmul_args a = matmul_of(&bits, bias, y);
    int64_t stride = 0, groups = 0, t, col;
    CHECK_OK(c, tern_activation_shape(c, m, &stride, &groups));
    record_quantized(c, r, &bits);
    record_quantized(c, r, &int4);
    CHECK_OK(c, tern_matmul(c, &a));
    record_words(r, y, n * m->rows);
    a = matmul_of(&last, bias, hold_output(m->rows));
    CHECK_OK(c, tern_matmul(c, &a));
    CHECK(memcmp(a.y, y + (n - 1) * m->rows, (size_t)m->rows * 4) == 0, "the last of %d tokens differs", (int)n);
    for (t = 0; t < n; t++)
        for (col = 0; col < m->cols; col++) ones.q[t * stride + place_of(m, col)] = x[t * m->cols + col] != 0.0f;
    a = matmul_of(&ones, bias, hold_output(n * m->rows));
    a.scale = bits.scale;
    a.sum = bits.sum;
    CHECK_OK(c, tern_matmul(c, &a));
    CHECK(memcmp(a.y, y, (size_t)(n * m->rows) * 4) == 0,
          "%d x %d, grain %d, %d tokens: bits are not 0 and 1", (int)m->rows, (int)m->cols, (int)m->grain, (int)n);
    a = matmul_of(&int4, NULL, y);
    CHECK_OK(c, tern_matmul(c, &a));
    record_words(r, y, n * m->rows);
}

static void kind_products(tern_context *c, record *r)
{
    static const int64_t tokens[] = {1, 3, 70};
    int i, j, g, variant = 0;
    for (i = 0; i < TEST_SIZES; i++)
        for (j = 0; j < TEST_SIZES; j++)
            for (g = 0; g < 5; g++, variant++) {
                const tern_matrix m = hold_matrix(c, test_sizes[i], test_sizes[j], every_grain[g], variant & 1 ? TERN_BASE3 : TERN_2BIT,
                                                  every_scale_type[variant / 2 % 4]);
                record_kinds(c, r, &m, tokens[variant % 3], variant % 4 ? 2 : 40);
                release();
            }
    for (g = 0; g < 8; g++) {
        const tern_matrix m = hold_matrix(c, 70, g & 1 ? 4097 : 530, g & 1 ? 700 : TERN_PER_ROW, g & 2 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
        record_kinds(c, r, &m, g & 1 ? 35 : 300, g & 4 ? 2 : 50);
        release();
    }
}
static void test_kind_products(void) { same_everywhere(kind_products, UINT64_C(0x0F7D40772E13C744)); }

/* Both products of one shape on each tier, every input and output between pages that must not be touched. */
static void guarded_product(const test_context *t, int64_t rows, int64_t cols, int64_t n, int32_t grain, int variant)
{
    tern_context *c = t[TERN_ISA_SCALAR].c;
    const tern_matrix m = hold_matrix(c, rows, cols, grain, variant & 1 ? TERN_BASE3 : TERN_2BIT, variant & 2 ? TERN_F16 : TERN_F32);
    const float *x = hold_floats(n * cols), *bias = hold_floats(rows);
    const tern_quantize_args q = hold_quantized(c, &m, n, x, TERN_NORM_NONE, NULL);
    tern_matmul_args a = matmul_of(&q, bias, hold_output(n * rows)), b = float_matmul_of(&m, n, x, bias, hold_output(n * rows)), g;
    size_t size[8];
    const void *from[8];
    void *guarded[8];
    int64_t stride = 0, groups = 0;
    int isa, i;
    CHECK_OK(c, tern_matmul(c, &a));
    CHECK_OK(c, tern_matmul(c, &b));
    CHECK_OK(c, tern_matrix_bytes(c, &m, &size[0], &size[1]));
    CHECK_OK(c, tern_activation_shape(c, &m, &stride, &groups));
    size[2] = (size_t)(n * stride);
    size[3] = (size_t)n * 4;
    size[4] = (size_t)(n * groups) * 4;
    size[5] = (size_t)(n * cols) * 4;
    size[6] = (size_t)rows * 4;
    size[7] = (size_t)(n * rows) * 4;
    from[0] = m.trits; from[1] = m.scales; from[2] = a.q; from[3] = a.scale; from[4] = a.sum; from[5] = x; from[6] = bias; from[7] = a.y;
    for (i = 0; i < 8; i++) guarded[i] = test_guard(from[i], size[i], variant & 4);
    g = a;
    g.m.trits = guarded[0]; g.m.scales = guarded[1];
    g.q = (const int8_t *)guarded[2]; g.scale = (const float *)guarded[3]; g.sum = (const int32_t *)guarded[4];
    g.x = (const float *)guarded[5];
    g.bias = (const float *)guarded[6];
    g.y = (float *)guarded[7];
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        tern_quantize_args z = q;
        if (!t[isa].c) continue;
        z.x = g.x;
        z.q = (int8_t *)guarded[2]; z.scale = (float *)guarded[3]; z.sum = (int32_t *)guarded[4];
        for (i = 2; i < 5; i++) memset(guarded[i], 0x55, size[i]);
        CHECK_OK(t[isa].c, tern_quantize(t[isa].c, &z));
        for (i = 2; i < 5; i++)
            CHECK(memcmp(guarded[i], from[i], size[i]) == 0,
                  "%s: %d x %d, grain %d, %d tokens: activations differ", test_tier_name[isa], (int)rows, (int)cols, (int)grain, (int)n);
        g.q = z.q;
        CHECK_OK(t[isa].c, tern_matmul(t[isa].c, &g));
        CHECK(memcmp(g.y, a.y, size[7]) == 0, "%s: %d x %d, grain %d, %d tokens, variant %d: int8 differs", test_tier_name[isa], (int)rows,
              (int)cols, (int)grain, (int)n, variant);
        g.q = NULL;
        CHECK_OK(t[isa].c, tern_matmul(t[isa].c, &g));
        CHECK(memcmp(g.y, b.y, size[7]) == 0, "%s: %d x %d, grain %d, %d tokens, variant %d: float differs", test_tier_name[isa], (int)rows,
              (int)cols, (int)grain, (int)n, variant);
    }
    for (i = 0; i < 8; i++) test_unguard(guarded[i], size[i]);
    release();
}

static void test_every_shape(void)
{
    static const int64_t rows[] = {1, 7, 16, 17, 33}, cols[] = {1, 4, 20, 63, 128, 129, 4097}, tokens[] = {1, 2, 3, 8, 15, 16, 17, 33, 64};
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 20, 128};
    test_context t[TERN__ISA_END] = {{NULL, NULL}};
    int isa, i, j, n, g, base3;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) t[isa] = test_open((tern_isa)isa, 1);
    for (i = 0; i < 5; i++)
        for (j = 0; j < 7; j++)
            for (n = 0; n < 9; n++)
                for (g = 0; g < 4; g++)
                    for (base3 = 0; base3 < 2; base3++)
                        guarded_product(t, rows[i], cols[j], tokens[n], grains[g], base3 | (i + j + n + g) % 4 << 1);
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) test_close(&t[isa]);
}

/* Numbers of tokens around every tile and block, with groups of every kind; and a K beyond every chunk. */
static void record_tokens(tern_context *c, record *r, int64_t cols, int32_t grain, tern_type encoding, int64_t n)
{
    const tern_matrix m = hold_matrix(c, 33, cols, grain, encoding, TERN_F32);
    const tern_quantize_args q = hold_quantized(c, &m, n, hold_floats(n * cols), TERN_NORM_NONE, NULL);
    const tern_matmul_args a = matmul_of(&q, NULL, hold_output(n * m.rows));
    CHECK_OK(c, tern_matmul(c, &a));
    record_words(r, a.y, n * m.rows);
    release();
}

static void many_tokens(tern_context *c, record *r)
{
    static const int64_t tokens[] = {1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65, 255, 257};
    static const int32_t grains[] = {TERN_PER_ROW, 20, 64, 128};
    int i, g;
    for (i = 0; i < 16; i++)
        for (g = 0; g < 4; g++) record_tokens(c, r, 301, grains[g], (i + g) % 2 ? TERN_BASE3 : TERN_2BIT, tokens[i]);
    record_tokens(c, r, 4097, TERN_PER_ROW, TERN_2BIT, 5);
    record_tokens(c, r, 4097, TERN_PER_ROW, TERN_BASE3, 257);
}
static void test_many_tokens(void) { same_everywhere(many_tokens, UINT64_C(0x5B1BF63D9665C787)); }

/* Sums written out: float dots in order within segments of 2048 terms, segments and groups in order.
   volatile keeps the compiler from fusing what the library rounds twice. */
static float literal_dot(const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t n)
{
    float total = 0.0f;
    int64_t at, k;
    for (at = 0; at < n; at += 2048) {
        volatile float sum = 0.0f, product;
        for (k = at; k < n && k < at + 2048; k++) {
            product = a[k * a_step] * b[k * b_step];
            sum = sum + product;
        }
        total = at == 0 ? sum : total + sum;
    }
    return total;
}

static void literal_product(tern_context *c, const tern_matrix *m, int64_t n)
{
    const int64_t group = m->grain > 0 ? m->grain : m->cols;
    const float *x = hold_floats(n * m->cols), *bias = hold_floats(m->rows);
    tern_quantize_args q = hold_quantized(c, m, n, x, TERN_NORM_NONE, NULL);
    tern_matmul_args a = matmul_of(&q, bias, hold_output(n * m->rows)), f = float_matmul_of(m, n, x, bias, hold_output(n * m->rows));
    tern_unpack_args u = TERN_ZERO;
    float *trits = hold_output(m->rows * m->cols);
    int64_t stride = 0, groups = 0, t, r, g, k;
    u.m = *m;
    u.count = m->rows;
    u.trits = (int8_t *)hold((size_t)(m->rows * m->cols));
    CHECK_OK(c, tern_unpack(c, &u));
    for (k = 0; k < m->rows * m->cols; k++) trits[k] = (float)u.trits[k];
    CHECK_OK(c, tern_activation_shape(c, m, &stride, &groups));
    CHECK_OK(c, tern_matmul(c, &a));
    CHECK_OK(c, tern_matmul(c, &f));
    for (t = 0; t < n; t++)
        for (r = 0; r < m->rows; r++) {
            volatile float int8_sum = 0.0f, float_sum = 0.0f, part, scale = 0.0f;
            for (g = 0; g < groups; g++) {
                const int64_t from = g * group, len = from + group < m->cols ? group : m->cols - from;
                const int8_t *row = q.q + t * stride + g * group; /* the tests' groups fill whole units or are alone */
                int32_t dot = 0;
                for (k = 0; k < len; k++) dot += row[k] * u.trits[r * m->cols + from + k];
                scale = ((const float *)m->scales)[m->grain == TERN_PER_TENSOR ? 0 : (r / 16 * groups + g) * 16 + r % 16];
                part = m->grain > 0 ? (float)dot * scale : (float)dot;
                int8_sum = g == 0 ? part : int8_sum + part;
                part = literal_dot(x + t * m->cols + from, 1, trits + r * m->cols + from, 1, len) * scale;
                float_sum = g == 0 ? part : float_sum + part;
            }
            part = m->grain > 0 ? q.scale[t] : q.scale[t] * scale;
            int8_sum = int8_sum * part;
            int8_sum = int8_sum + bias[r];
            float_sum = float_sum + bias[r];
            part = a.y[t * m->rows + r];
            CHECK(part == int8_sum, "int8 [%d][%d]: %.9g, not %.9g", (int)t, (int)r, part, int8_sum);
            part = f.y[t * m->rows + r];
            CHECK(part == float_sum, "float [%d][%d]: %.9g, not %.9g", (int)t, (int)r, part, float_sum);
        }
}

static void literal_products(tern_context *c, record *unused)
{
    static const int32_t whole[] = {TERN_PER_TENSOR, TERN_PER_ROW, 80};
    int g;
    (void)unused;
    for (g = 0; g < 3; g++) {
        tern_matrix m = hold_matrix(c, 17, g == 2 ? 240 : 4500, whole[g], g & 1 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
        literal_product(c, &m, 3);
        release();
    }
}
static void test_literal_products(void) { on_each_tier(literal_products); }

/* -- dense -- */

static tern_dense_args dense_of(int64_t m, int64_t n, int64_t k, int a_transposed, int b_transposed)
{
    tern_dense_args a = TERN_ZERO;
    a.m = m; a.n = n; a.k = k;
    a.a = hold_floats(m * k);
    a.a_row = a_transposed ? 1 : k;
    a.a_col = a_transposed ? m : 1;
    a.b = hold_floats(k * n);
    a.b_row = b_transposed ? 1 : n;
    a.b_col = b_transposed ? k : 1;
    a.bias = hold_floats(n);
    a.c_row = n + 3;
    a.c = hold_floats(m * a.c_row);
    return a;
}

static const int64_t dense_shapes[][3] = {{1, 33, 130}, {3, 17, 5}, {200, 40, 161}, {5, 3, 4500}, {16, 1, 2048}};

static void dense_products(tern_context *c, record *r)
{
    int i, variant;
    for (i = 0; i < 5; i++)
        for (variant = 0; variant < 4; variant++) {
            tern_dense_args a = dense_of(dense_shapes[i][0], dense_shapes[i][1], dense_shapes[i][2], variant & 1, variant >> 1);
            a.add = variant == 1;
            if (variant == 2) a.bias = NULL;
            CHECK_OK(c, tern_dense(c, &a));
            record_words(r, a.c, a.m * a.c_row); /* with the gaps between rows, which stay */
            release();
        }
}
static void test_dense(void) { same_everywhere(dense_products, UINT64_C(0x8D0E7E061B78DB8D)); }

static void fused_products(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 5; i++) {
        tern_dense_args a = dense_of(dense_shapes[i][0], dense_shapes[i][1], dense_shapes[i][2], 0, 1);
        int64_t row, col, k;
        a.fused = 1;
        CHECK_OK(c, tern_dense(c, &a));
        for (row = 0; row < a.m; row++)
            for (col = 0; col < a.n; col++) {
                double sum = a.bias[col];
                for (k = 0; k < a.k; k++) sum += (double)a.a[row * a.k + k] * a.b[col * a.k + k];
                CHECK(fabs(a.c[row * a.c_row + col] - sum) < 1e-4,
                      "[%d][%d]: %g, not %g", (int)row, (int)col, a.c[row * a.c_row + col], sum);
            }
        record_words(r, a.c, a.m * a.c_row);
        release();
    }
}
static void test_dense_fused(void) { same_for_threads(fused_products); }

static void literal_dense(tern_context *c, record *unused)
{
    static const int64_t blocks[] = {2 * TERN__M_BLOCK, TERN__LANES + 1, TERN__K_BLOCK + 30}; /* two of each in every direction */
    int i, add;
    (void)unused;
    for (i = 0; i < 6; i++)
        for (add = 0; add < 2; add++) {
            const int64_t *shape = i < 5 ? dense_shapes[i] : blocks;
            tern_dense_args a = dense_of(shape[0], shape[1], shape[2], add, !add);
            const float *before = hold_copy(a.c, a.m * a.c_row);
            int64_t row, col;
            a.add = add;
            CHECK_OK(c, tern_dense(c, &a));
            for (row = 0; row < a.m; row++)
                for (col = 0; col < a.n; col++) {
                    volatile float want = literal_dot(a.a + row * a.a_row, a.a_col, a.b + col * a.b_col, a.b_row, a.k);
                    if (add) want = before[row * a.c_row + col] + want;
                    want = want + a.bias[col];
                    CHECK(a.c[row * a.c_row + col] == want, "[%d][%d]: %.9g, not %.9g", (int)row, (int)col, a.c[row * a.c_row + col], want);
                }
            release();
        }
}
static void test_dense_literal(void) { on_each_tier(literal_dense); }

/* -- int8 products: buffers end with the last element that may be touched -- */

static int8_t *hold_bytes(int64_t n, int32_t extreme)
{
    int8_t *x = (int8_t *)hold((size_t)n);
    int64_t i;
    for (i = 0; i < n; i++) x[i] = extreme ? -128 : (int8_t)((int32_t)(test_random() % 256) - 128);
    return x;
}

/* variant: transposed a, transposed b, a and b with gaps. */
static tern_dense_i8_args dense_i8_of(int64_t m, int64_t n, int64_t k, int32_t variant, int32_t extreme)
{
    const int64_t gap = variant & 4 ? 3 : 1;
    tern_dense_i8_args a = TERN_ZERO;
    int64_t i;
    a.m = m; a.n = n; a.k = k;
    a.a_row = gap * (variant & 1 ? 1 : k + 1);
    a.a_col = gap * (variant & 1 ? m + 1 : 1);
    a.b_row = gap * (variant & 2 ? 1 : n + 1);
    a.b_col = gap * (variant & 2 ? k + 1 : 1);
    a.a = hold_bytes((m - 1) * a.a_row + (k - 1) * a.a_col + 1, extreme);
    a.b = hold_bytes((k - 1) * a.b_row + (n - 1) * a.b_col + 1, extreme);
    a.c_row = n + 3;
    a.c = (int32_t *)hold((size_t)((m - 1) * a.c_row + n) * 4);
    for (i = 0; i < (m - 1) * a.c_row + n; i++) a.c[i] = (int32_t)(test_random() << 8 ^ test_random());
    return a;
}

/* The product by definition, in int64 and modulo 2^32; what lies between the rows of c stays. */
static void dense_i8_case(tern_context *c, tern_dense_i8_args a)
{
    const int64_t size = (a.m - 1) * a.c_row + a.n;
    int32_t *want = (int32_t *)memcpy(hold((size_t)size * 4), a.c, (size_t)size * 4);
    int64_t row, col, i;
    for (row = 0; row < a.m; row++)
        for (col = 0; col < a.n; col++) {
            const int8_t *x = a.a + row * a.a_row, *y = a.b + col * a.b_col;
            int64_t sum = a.add ? want[row * a.c_row + col] : 0;
            for (i = 0; i < a.k; i++) sum += x[i * a.a_col] * y[i * a.b_row];
            want[row * a.c_row + col] = (int32_t)(uint32_t)(uint64_t)sum;
        }
    CHECK_OK(c, tern_dense_i8(c, &a));
    CHECK(memcmp(a.c, want, (size_t)size * 4) == 0, "%s: [%d, %d] * [%d, %d], a %d %d, b %d %d, add %d", tern_backend_name(c), (int)a.m,
          (int)a.k, (int)a.k, (int)a.n, (int)a.a_row, (int)a.a_col, (int)a.b_row, (int)a.b_col, (int)a.add);
    release();
}

static const int64_t dense_i8_sizes[] = {1, 3, 15, 16, 17, 33, 65, 127};
static const int64_t dense_i8_shapes[][3] = { /* around each block, and beyond: rows 256, columns 64 and 1024, inputs 64 and 256 */
    {257, 65, 257}, {256, 64, 256}, {255, 1, 64}, {2, 1089, 5}, {7, 17, 4097}, {513, 130, 63}, {4097, 3, 2}, {1, 1, 4097}, {259, 1041, 3}
};

static void dense_i8_products(tern_context *c, record *unused)
{
    int32_t i, j, l, variant;
    (void)unused;
    for (i = 0; i < 8; i++)
        for (j = 0; j < 8; j++)
            for (l = 0; l < 8; l++) {
                tern_dense_i8_args a = dense_i8_of(dense_i8_sizes[i], dense_i8_sizes[j], dense_i8_sizes[l], (l + 3 * j + 5 * i) % 8, 0);
                a.add = (i + l) % 2;
                dense_i8_case(c, a);
            }
    for (i = 0; i < 9; i++)
        for (variant = i == 0 || i == 4 ? 0 : i % 4; variant < 8; variant += i == 0 || i == 4 ? 1 : 4) { /* of long sums every one */
            tern_dense_i8_args a = dense_i8_of(dense_i8_shapes[i][0], dense_i8_shapes[i][1], dense_i8_shapes[i][2], variant, 0);
            a.add = (variant / 4 + i) % 2;
            dense_i8_case(c, a);
        }
}

/* 2^14 k at the largest k; the same from a c that wraps; one row and one column for all. */
static void dense_i8_extremes(tern_context *c, record *unused)
{
    int32_t variant;
    (void)unused;
    for (variant = 0; variant < 4; variant++) {
        tern_dense_i8_args a = dense_i8_of(variant & 1 ? 5 : 2, variant & 1 ? 2 : 18, 131071, variant, 1);
        a.add = variant / 2;
        dense_i8_case(c, a);
        a = dense_i8_of(9, 35, 130, variant, variant / 2);
        a.a_row = a.b_col = 0;
        dense_i8_case(c, a);
    }
}

/* On every tier with every number of threads. */
static void dense_i8_threads(work *f)
{
    int isa, i;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (i = 0; i < TEST_THREAD_COUNTS && test_tier((tern_isa)isa); i++) free(record_of(f, (tern_isa)isa, test_threads[i]).data);
}
static void test_dense_i8(void) { dense_i8_threads(dense_i8_products); }
static void test_dense_i8_extremes(void) { dense_i8_threads(dense_i8_extremes); }

/* -- rows: gather, scatter, norm, rope, loss -- */

static void gathered_rows(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 8; i++) {
        const int64_t cols = test_sizes[i % TEST_SIZES], n = 33;
        tern_gather_args a = TERN_ZERO;
        tern_scatter_args s = TERN_ZERO;
        a.m = hold_matrix(c, 37, cols, i & 1 ? TERN_PER_ROW : 16, i & 2 ? TERN_BASE3 : TERN_2BIT, every_scale_type[i / 2]);
        a.n = s.n = n;
        a.ids = s.ids = hold_ids(n, 37);
        a.y = hold_output(n * cols);
        CHECK_OK(c, tern_gather(c, &a));
        record_words(r, a.y, n * cols);
        a.m.trits = NULL;
        a.w = hold_floats(37 * cols);
        CHECK_OK(c, tern_gather(c, &a));
        record_words(r, a.y, n * cols);
        s.rows = 37; s.cols = cols;
        s.dy = a.y;
        s.dw = hold_copy(a.w, 37 * cols);
        CHECK_OK(c, tern_scatter(c, &s));
        record_words(r, s.dw, 37 * cols);
        release();
    }
}
static void test_gather_scatter(void) { same_everywhere(gathered_rows, UINT64_C(0x71E448C05C44A950)); }

static void gathered_values(tern_context *c, record *unused)
{
    tern_gather_args a = TERN_ZERO;
    tern_scatter_args s = TERN_ZERO;
    tern_unpack_args u = TERN_ZERO;
    static const int32_t ids[] = {3, -1, 0, 19, 3, 20, INT32_MIN, INT32_MAX, 3};
    const int64_t n = (int64_t)(sizeof ids / sizeof ids[0]), cols = 21;
    float *want = hold_zeros(n * cols), *sum = hold_zeros(20 * cols);
    int64_t i, j;
    (void)unused;
    a.m = hold_matrix(c, 20, cols, 5, TERN_BASE3, TERN_F32);
    u.m = a.m;
    u.count = 20;
    u.values = hold_output(20 * cols);
    CHECK_OK(c, tern_unpack(c, &u));
    a.n = s.n = n;
    a.ids = s.ids = ids;
    a.y = hold_output(n * cols);
    s.rows = 20; s.cols = cols;
    s.dy = hold_floats(n * cols);
    s.dw = hold_zeros(20 * cols);
    for (i = 0; i < n; i++)
        for (j = 0; j < cols && ids[i] >= 0 && ids[i] < 20; j++) {
            want[i * cols + j] = u.values[ids[i] * cols + j];
            sum[ids[i] * cols + j] += s.dy[i * cols + j];
        }
    CHECK_OK(c, tern_gather(c, &a));
    CHECK(memcmp(a.y, want, (size_t)(n * cols) * 4) == 0, "gathered rows differ");
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "ids[1]");
    CHECK_OK(c, tern_sync(c)); /* reported once */
    CHECK_OK(c, tern_scatter(c, &s));
    CHECK(memcmp(s.dw, sum, (size_t)(20 * cols) * 4) == 0, "scattered rows differ");
}
static void test_gather_values(void) { on_each_tier(gathered_values); }

static const int64_t norm_cols[] = {1, 15, 130, 1024, 1025, 2500};

static tern_norm_args norm_of(int64_t n, int64_t cols)
{
    tern_norm_args a = TERN_ZERO;
    a.n = n; a.cols = cols;
    a.x = hold_floats(n * cols);
    a.gain = hold_floats(cols);
    a.eps = 1e-5f;
    a.y = hold_output(n * cols);
    return a;
}

static void norms(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 6; i++) {
        tern_norm_args a = norm_of(9, norm_cols[i]);
        CHECK_OK(c, tern_norm(c, &a));
        record_words(r, a.y, a.n * a.cols);
        a.gain = NULL;
        a.y = (float *)(uintptr_t)a.x; /* in place */
        CHECK_OK(c, tern_norm(c, &a));
        record_words(r, a.y, a.n * a.cols);
        release();
    }
}
static void test_norm(void) { same_everywhere(norms, UINT64_C(0x2A92FF2B17108A51)); }

static void norm_values(tern_context *c, record *unused)
{
    int i;
    (void)unused;
    for (i = 0; i < 6; i++) {
        tern_norm_args a = norm_of(3, norm_cols[i]);
        int64_t t, j;
        CHECK_OK(c, tern_norm(c, &a));
        for (t = 0; t < a.n; t++) {
            double squares = 0.0, want;
            for (j = 0; j < a.cols; j++) squares += (double)a.x[t * a.cols + j] * a.x[t * a.cols + j];
            for (j = 0; j < a.cols; j++) {
                want = a.x[t * a.cols + j] * (double)a.gain[j] / sqrt(squares / (double)a.cols + 1e-5);
                CHECK(fabs(a.y[t * a.cols + j] - want) <= 1e-6 * fabs(want), "%g, not %g", a.y[t * a.cols + j], want);
            }
        }
        release();
    }
}
static void test_norm_values(void) { on_each_tier(norm_values); }

/* A row with NaN or Inf becomes zeros and a fault; its neighbours keep their bits. */
static void norm_faults(tern_context *c, record *unused)
{
    tern_norm_args a = norm_of(4, 20);
    float *x = (float *)(uintptr_t)a.x, *clean = hold_output(4 * 20);
    int64_t j;
    (void)unused;
    CHECK_OK(c, tern_norm(c, &a));
    memcpy(clean, a.y, 4 * 20 * 4);
    x[20 + 7] = NAN;
    x[60 + 19] = -INFINITY;
    CHECK_OK(c, tern_norm(c, &a));
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "row 1");
    CHECK(memcmp(a.y, clean, 80) == 0 && memcmp(a.y + 40, clean + 40, 80) == 0, "a clean row changed");
    for (j = 0; j < 20; j++) CHECK(a.y[20 + j] == 0.0f && a.y[60 + j] == 0.0f, "column %d is not zero", (int)j);
    for (j = 0; j < 20; j++) x[j] = 1e25f; /* finite, but its mean square is not */
    CHECK_OK(c, tern_norm(c, &a));
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "row 0");
    CHECK(a.y[0] == 0.0f, "%g", a.y[0]);
}
static void test_norm_faults(void) { on_each_tier(norm_faults); }

static tern_rope_args rope_of(int64_t n, int32_t heads, int32_t dim)
{
    tern_rope_args a = TERN_ZERO;
    a.n = n;
    a.heads = heads; a.dim = dim;
    a.stride = heads * dim + 5;
    a.x = hold_floats(n * a.stride);
    a.period = n;
    return a;
}

static void ropes(tern_context *c, record *r)
{
    static const int32_t heads[] = {1, 3, 4}, dims[] = {2, 6, 64};
    int i;
    for (i = 0; i < 3; i++) {
        tern_rope_args a = rope_of(40, heads[i], dims[i]);
        a.start = 7 * i;
        a.period = i ? 10 : 1000;
        a.base = i == 2 ? 500.0f : 0.0f;
        CHECK_OK(c, tern_rope(c, &a));
        record_words(r, a.x, a.n * a.stride);
        release();
    }
}
static void test_rope(void) { same_everywhere(ropes, UINT64_C(0xC21E2B589993AEDC)); }

static void rope_values(tern_context *c, record *unused)
{
    tern_rope_args a = rope_of(40, 2, 16);
    const float *x = hold_copy(a.x, a.n * a.stride);
    int64_t t;
    int i, h;
    (void)unused;
    a.start = 2000;
    a.period = 30;
    CHECK_OK(c, tern_rope(c, &a));
    for (t = 0; t < a.n; t++)
        for (h = 0; h < 2; h++)
            for (i = 0; i < 8; i++) {
                const int64_t at = t * a.stride + h * 16 + i;
                const double angle = (double)(2000 + t % 30) * pow(10000.0, -2.0 * i / 16);
                CHECK(fabs(a.x[at] - (x[at] * cos(angle) - x[at + 8] * sin(angle))) < 1e-3, "token %d pair %d: %g", (int)t, i, a.x[at]);
                CHECK(fabs(a.x[at + 8] - (x[at] * sin(angle) + x[at + 8] * cos(angle))) < 1e-3,
                      "token %d pair %d: %g", (int)t, i, a.x[at + 8]);
            }
    a.inverse = 1;
    CHECK_OK(c, tern_rope(c, &a));
    for (t = 0; t < a.n * a.stride; t++) CHECK(fabs(a.x[t] - x[t]) < 1e-6, "[%d]: %g, not %g", (int)t, a.x[t], x[t]);
}
static void test_rope_values(void) { on_each_tier(rope_values); }

static tern_loss_args loss_of(int64_t n, int64_t classes)
{
    tern_loss_args a = TERN_ZERO;
    float *x = hold_floats(n * classes);
    int64_t i;
    for (i = 0; i < n * classes; i++) x[i] *= 9.0f;
    a.n = n;
    a.classes = classes;
    a.logits = x;
    a.targets = hold_ids(n, (int32_t)classes);
    a.losses = hold_output(n);
    a.dlogits = hold_output(n * classes);
    a.scale = 0.25f;
    return a;
}

static const int64_t loss_classes[] = {1, 2, 256, 1024, 1025, 3000};

static void losses(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 6; i++) {
        tern_loss_args a = loss_of(13, loss_classes[i]);
        CHECK_OK(c, tern_loss(c, &a));
        record_words(r, a.losses, a.n);
        record_words(r, a.dlogits, a.n * a.classes);
        a.dlogits = (float *)(uintptr_t)a.logits; /* in place */
        CHECK_OK(c, tern_loss(c, &a));
        record_words(r, a.dlogits, a.n * a.classes);
        release();
    }
}
static void test_loss(void) { same_everywhere(losses, UINT64_C(0x4F5C594A7EF321C3)); }

static void loss_values(tern_context *c, record *unused)
{
    int i;
    (void)unused;
    for (i = 0; i < 6; i++) {
        tern_loss_args a = loss_of(4, loss_classes[i]);
        int64_t t, j;
        CHECK_OK(c, tern_loss(c, &a));
        for (t = 0; t < a.n; t++) {
            const float *x = a.logits + t * a.classes;
            double sum = 0.0, want;
            for (j = 0; j < a.classes; j++) sum += exp(x[j]);
            want = log(sum) - x[a.targets[t]];
            CHECK(fabs(a.losses[t] - want) < 2e-6 * (1.0 + fabs(want)), "%g, not %g", a.losses[t], want);
            for (j = 0; j < a.classes; j++) {
                want = 0.25 * (exp(x[j]) / sum - (j == a.targets[t]));
                CHECK(fabs(a.dlogits[t * a.classes + j] - want) < 1e-6, "%g, not %g", a.dlogits[t * a.classes + j], want);
            }
        }
        release();
    }
}
static void test_loss_values(void) { on_each_tier(loss_values); }

static void loss_faults(tern_context *c, record *unused)
{
    tern_loss_args a = loss_of(5, 7);
    float *x = (float *)(uintptr_t)a.logits, *clean = hold_output(35);
    int32_t *targets = (int32_t *)(uintptr_t)a.targets;
    int j;
    (void)unused;
    CHECK_OK(c, tern_loss(c, &a));
    memcpy(clean, a.dlogits, 35 * 4);
    targets[1] = 7;
    targets[2] = -1;
    x[3 * 7 + 6] = NAN;
    CHECK_OK(c, tern_loss(c, &a));
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "row 1");
    for (j = 7; j < 28; j++) CHECK(a.dlogits[j] == 0.0f && a.losses[j / 7] == 0.0f, "row %d is not zero", j / 7);
    CHECK(memcmp(a.dlogits, clean, 28) == 0 && memcmp(a.dlogits + 28, clean + 28, 28) == 0, "a clean row changed");
}
static void test_loss_faults(void) { on_each_tier(loss_faults); }

/* -- element by element: fill, cast, map, sum -- */

static void elements(tern_context *c, record *r)
{
    static const tern_type types[] = {TERN_F32, TERN_BF16, TERN_F16};
    const int64_t n = 3001;
    const float *x = hold_floats(n);
    int i, j;
    tern_fill_args f = TERN_ZERO;
    f.count = n;
    f.x = hold_output(n);
    CHECK_OK(c, tern_fill(c, &f));
    record_words(r, f.x, n);
    f.deviation = 0.02f;
    f.seed = UINT64_C(0x123456789ABCDEF);
    f.stream = 9;
    CHECK_OK(c, tern_fill(c, &f));
    record_words(r, f.x, n);
    for (i = 0; i < 3; i++)
        for (j = 0; j < 3; j++) {
            tern_cast_args a = TERN_ZERO;
            a.count = n;
            a.to = types[i];
            a.src = x;
            a.dst = hold((size_t)n * (i ? 2 : 4));
            a.finite = 1;
            CHECK_OK(c, tern_cast(c, &a));
            a.from = types[i];
            a.src = a.dst;
            a.to = types[j];
            a.dst = hold((size_t)n * (j ? 2 : 4));
            CHECK_OK(c, tern_cast(c, &a));
            a.from = types[j];
            a.src = a.dst;
            a.to = TERN_F32;
            a.dst = hold_output(n);
            CHECK_OK(c, tern_cast(c, &a));
            record_words(r, a.dst, n);
        }
}
static void test_fill_and_cast(void) { same_everywhere(elements, UINT64_C(0x597DDD96982A2BBE)); }

static void fill_values(tern_context *c, record *unused)
{
    const int64_t n = 100000;
    tern_fill_args a = TERN_ZERO;
    double sum = 0.0, squares = 0.0, fourth = 0.0;
    float *shorter = hold_output(10);
    int64_t i;
    (void)unused;
    a.count = n;
    a.x = hold_output(n);
    a.deviation = 2.0f;
    a.seed = 5;
    CHECK_OK(c, tern_fill(c, &a));
    for (i = 0; i < n; i++) {
        const double z = a.x[i] / 2.0;
        sum += z;
        squares += z * z;
        fourth += z * z * z * z;
    }
    CHECK(fabs(sum / (double)n) < 0.015, "mean %g", sum / (double)n);
    CHECK(fabs(squares / (double)n - 1.0) < 0.02, "variance %g", squares / (double)n);
    CHECK(fabs(fourth / (double)n - 2.85) < 0.15, "fourth moment %g (2.85 for eight uniforms, 3 for a normal)", fourth / (double)n);
    memcpy(shorter, a.x, 40);
    a.count = 10;
    CHECK_OK(c, tern_fill(c, &a));
    CHECK(memcmp(shorter, a.x, 40) == 0, "elements depend on the count");
    a.stream = 1;
    CHECK_OK(c, tern_fill(c, &a));
    CHECK(memcmp(shorter, a.x, 40) != 0, "elements do not depend on the stream");
}
static void test_fill_values(void) { on_each_tier(fill_values); }

static void cast_refusals(tern_context *c, record *unused)
{
    float *x = hold_floats(50);
    tern_cast_args a = TERN_ZERO;
    uint16_t before[50], y[50];
    (void)unused;
    memset(before, 0x5A, sizeof before);
    memcpy(y, before, sizeof y);
    x[41] = INFINITY;
    a.count = 50;
    a.to = TERN_BF16;
    a.src = x;
    a.dst = y;
    a.finite = 1;
    CHECK_FAILS(c, tern_cast(c, &a), TERN_E_NONFINITE, "element 41");
    CHECK(memcmp(y, before, sizeof y) == 0, "a refused cast wrote");
    a.finite = 0;
    CHECK_OK(c, tern_cast(c, &a));
    CHECK(y[41] == 0x7F80, "Inf became %04x", (unsigned)y[41]);
}
static void test_cast_refusals(void) { on_each_tier(cast_refusals); }

static tern_map_args map_of(tern_map_fn fn, int64_t n)
{
    tern_map_args a = TERN_ZERO;
    float *x = hold_floats(n);
    int64_t i;
    for (i = 0; i < n; i++) x[i] *= 6.0f;
    a.fn = fn;
    a.count = n;
    a.alpha = -0.7f;
    a.a = x;
    a.b = hold_floats(n);
    a.y = hold_output(n);
    return a;
}

static void maps(tern_context *c, record *r)
{
    int fn;
    for (fn = TERN_MAP_ADD; fn <= TERN_MAP_GELU; fn++) {
        tern_map_args a = map_of((tern_map_fn)fn, 1003);
        CHECK_OK(c, tern_map(c, &a));
        record_words(r, a.y, a.count);
        a.y = (float *)(uintptr_t)a.a; /* in place */
        CHECK_OK(c, tern_map(c, &a));
        record_words(r, a.y, a.count);
        release();
    }
}
static void test_map(void) { same_everywhere(maps, UINT64_C(0xB685DBDCA7C66325)); }

static double map_literal(tern_map_fn fn, double x, double z)
{
    switch (fn) {
    case TERN_MAP_ADD: return x + (double)-0.7f * z;
    case TERN_MAP_MUL: return x * z;
    case TERN_MAP_SCALE: return (double)-0.7f * x;
    case TERN_MAP_RELU: return x > 0 ? x : 0;
    case TERN_MAP_RELU2: return x > 0 ? x * x : 0;
    case TERN_MAP_SILU: return x / (1.0 + exp(-x));
    default: return 0.5 * x * (1.0 + tanh(sqrt(2.0 / 3.14159265358979324) * (x + 0.044715 * x * x * x)));
    }
}

/* Values, and derivatives by central differences of the float64 function. */
static void map_values(tern_context *c, record *unused)
{
    int fn;
    (void)unused;
    for (fn = TERN_MAP_ADD; fn <= TERN_MAP_GELU; fn++) {
        tern_map_args a = map_of((tern_map_fn)fn, 300);
        const double h = 1e-5;
        int64_t i;
        CHECK_OK(c, tern_map(c, &a));
        a.dy = hold_floats(300);
        a.da = hold_output(300);
        if (fn == TERN_MAP_ADD || fn == TERN_MAP_MUL) a.db = hold_output(300);
        CHECK_OK(c, tern_map(c, &a));
        for (i = 0; i < 300; i++) {
            const double x = a.a[i], z = a.b[i], want = map_literal(a.fn, x, z);
            const double da = (map_literal(a.fn, x + h, z) - map_literal(a.fn, x - h, z)) / (2 * h) * a.dy[i];
            const double db = (map_literal(a.fn, x, z + h) - map_literal(a.fn, x, z - h)) / (2 * h) * a.dy[i];
            CHECK(fabs(a.y[i] - want) < 1e-6 * (1 + fabs(want)), "function %d of %g: %g, not %g", fn, x, a.y[i], want);
            CHECK(fabs(a.da[i] - da) < 1e-5 * (1 + fabs(da)), "function %d at %g: da %g, not %g", fn, x, a.da[i], da);
            if (a.db) CHECK(fabs(a.db[i] - db) < 1e-5 * (1 + fabs(db)), "function %d at %g: db %g, not %g", fn, x, a.db[i], db);
        }
        release();
    }
}
static void test_map_values(void) { on_each_tier(map_values); }

/* Saturation: far out the functions reach their limits and never NaN. */
static void map_limits(tern_context *c, record *unused)
{
    float x[4] = {-1e4f, -200.0f, 200.0f, 1e4f}, y[4];
    int fn, i;
    (void)unused;
    for (fn = TERN_MAP_SILU; fn <= TERN_MAP_GELU; fn++) {
        tern_map_args a = TERN_ZERO;
        a.fn = (tern_map_fn)fn;
        a.count = 4;
        a.a = x;
        a.y = y;
        CHECK_OK(c, tern_map(c, &a));
        for (i = 0; i < 4; i++) CHECK(y[i] == (x[i] > 0 ? x[i] : 0.0f), "function %d of %g is %g", fn, x[i], y[i]);
    }
}
static void test_map_limits(void) { on_each_tier(map_limits); }

/* NaN passes through every function, whatever its sign: machines make it with either. */
static void map_nan(tern_context *c, record *unused)
{
    float x[2], y[2];
    int fn;
    (void)unused;
    x[0] = tern__float(0x7FC00000u);
    x[1] = tern__float(0xFFC00000u);
    for (fn = TERN_MAP_ADD; fn <= TERN_MAP_GELU; fn++) {
        tern_map_args a = TERN_ZERO;
        a.fn = (tern_map_fn)fn;
        a.count = 2;
        a.alpha = 1.0f;
        a.a = a.b = x;
        a.y = y;
        CHECK_OK(c, tern_map(c, &a));
        CHECK(y[0] != y[0] && y[1] != y[1], "function %d of NaN is %g and %g", fn, y[0], y[1]);
    }
}
static void test_map_nan(void) { on_each_tier(map_nan); }

static const int64_t sum_counts[] = {1, 63, 64, 1023, 1024, 1025, 5000, 1024 * 1024 + 1025};

static void sums(tern_context *c, record *r)
{
    int i, kind;
    for (i = 0; i < 8; i++)
        for (kind = TERN_SUM; kind <= TERN_SUM_SQUARES; kind++) {
            tern_sum_args a = TERN_ZERO;
            float y[1] = {0.5f};
            double want = 0.5, size = 0.5;
            int64_t j;
            a.kind = (tern_sum_kind)kind;
            a.count = sum_counts[i];
            a.x = hold_floats(a.count);
            a.y = y;
            a.add = kind != TERN_SUM_ABS;
            if (!a.add) want = size = 0.0;
            for (j = 0; j < a.count; j++) {
                const double x = ((const float *)a.x)[j];
                want += kind == TERN_SUM ? x : kind == TERN_SUM_ABS ? fabs(x) : x * x;
                size += fabs(x);
            }
            CHECK_OK(c, tern_sum(c, &a));
            CHECK(fabs(y[0] - want) <= 1e-6 * size, "%d of %d: %g, not %g", kind, (int)a.count, y[0], want);
            record_words(r, y, 1);
            release();
        }
}
static void test_sums(void) { same_everywhere(sums, UINT64_C(0x764E2A3B11C33791)); }

/* -- attention -- */

/* q, k and v lie in one buffer per token, as a fused projection leaves them. */
static tern_attention_args attention_of(int64_t batch, int64_t queries, int64_t keys, int32_t heads, int32_t kv_heads, int32_t dim)
{
    tern_attention_args a = TERN_ZERO;
    const int64_t width = (int64_t)(heads + 2 * kv_heads) * dim + 1;
    float *qkv = hold_floats(batch * keys * width);
    a.batch = batch; a.queries = queries; a.keys = keys;
    a.heads = heads; a.kv_heads = kv_heads; a.dim = dim;
    a.q = queries == keys ? qkv : hold_floats(batch * queries * width);
    a.k = qkv + heads * dim;
    a.v = a.k + kv_heads * dim;
    a.q_stride = a.k_stride = a.v_stride = width;
    a.y = hold_output(batch * queries * heads * dim);
    a.p = hold_output(batch * heads * queries * keys);
    return a;
}

static const int64_t attention_shapes[][6] = {
    {1, 1, 1, 1, 1, 1}, {2, 5, 5, 4, 2, 6}, {3, 33, 33, 2, 2, 17}, {2, 3, 40, 6, 1, 8}, {1, 200, 200, 2, 1, 32}, {1, 2, 2100, 1, 1, 4}};

static tern_attention_args attention_case(int i)
{
    const int64_t *s = attention_shapes[i];
    return attention_of(s[0], s[1], s[2], (int32_t)s[3], (int32_t)s[4], (int32_t)s[5]);
}

static int64_t attention_outputs(const tern_attention_args *a) { return a->batch * a->queries * a->heads * a->dim; }

static void attentions(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 6; i++) {
        tern_attention_args a = attention_case(i);
        CHECK_OK(c, tern_attention(c, &a));
        record_words(r, a.y, attention_outputs(&a));
        record_words(r, a.p, a.batch * a.heads * a.queries * a.keys);
        release();
    }
}
static void test_attention(void) { same_everywhere(attentions, UINT64_C(0x938DA8664971EB3E)); }

/* The forward of one head and query in float64: probabilities into p, the output into y. */
static void attention_row(const tern_attention_args *a, const double *q, const double *k, const double *v, int64_t visible,
                          double *p, double *y)
{
    double sum = 0.0;
    int64_t j;
    int32_t d;
    for (j = 0; j < visible; j++) {
        for (p[j] = 0.0, d = 0; d < a->dim; d++) p[j] += q[d] * k[j * a->k_stride + d];
        p[j] = exp(p[j] / sqrt((double)a->dim));
        sum += p[j];
    }
    for (d = 0; d < a->dim; d++) y[d] = 0.0;
    for (j = 0; j < visible; j++) {
        p[j] /= sum;
        for (d = 0; d < a->dim; d++) y[d] += p[j] * v[j * a->v_stride + d];
    }
}

static double *hold_doubles(const float *x, int64_t n)
{
    double *wide = (double *)hold((size_t)n * sizeof(double));
    int64_t i;
    for (i = 0; i < n; i++) wide[i] = x[i];
    return wide;
}

static void attention_values(tern_context *c, record *unused)
{
    int i;
    (void)unused;
    for (i = 0; i < 4; i++) {
        tern_attention_args a = attention_case(i);
        const int64_t width = a.q_stride, k_at = a.heads * a.dim, v_at = k_at + a.kv_heads * a.dim;
        const double *q = hold_doubles(a.q, a.batch * a.queries * width), *kv = hold_doubles(a.k - k_at, a.batch * a.keys * width);
        double p[40], y[32];
        int64_t b, t, j;
        int32_t h;
        CHECK_OK(c, tern_attention(c, &a));
        for (b = 0; b < a.batch; b++)
            for (h = 0; h < a.heads; h++)
                for (t = 0; t < a.queries; t++) {
                    const int64_t visible = a.keys - a.queries + t + 1, kv_head = h / (a.heads / a.kv_heads) * a.dim;
                    const float *got = a.y + ((b * a.queries + t) * a.heads + h) * a.dim;
                    const float *row = a.p + ((b * a.heads + h) * a.queries + t) * a.keys;
                    attention_row(&a, q + (b * a.queries + t) * width + h * a.dim, kv + b * a.keys * width + k_at + kv_head,
                                  kv + b * a.keys * width + v_at + kv_head, visible, p, y);
                    for (j = 0; j < a.dim; j++) CHECK(fabs(got[j] - y[j]) < 2e-6, "y %g, not %g", got[j], y[j]);
                    for (j = 0; j < a.keys; j++) CHECK(fabs(row[j] - (j < visible ? p[j] : 0.0)) < 1e-6, "p %g, not %g", row[j], p[j]);
                }
        release();
    }
}
static void test_attention_values(void) { on_each_tier(attention_values); }

/* One query at a time against the keys so far (decoding) gives the rows of the full pass, bit for bit. */
static void decoding(tern_context *c, record *unused)
{
    static const int cases[] = {1, 2, 3, 4, 5};
    int i;
    (void)unused;
    for (i = 0; i < 5; i++) {
        tern_attention_args a = attention_case(cases[i]), one;
        const int64_t width = a.heads * a.dim;
        int64_t b, t;
        int32_t h;
        CHECK_OK(c, tern_attention(c, &a));
        one = a;
        one.batch = one.queries = 1;
        one.y = hold_output(width);
        one.p = hold_output(a.heads * a.keys);
        for (b = 0; b < a.batch; b++)
            for (t = 0; t < a.queries; t++) {
                one.keys = a.keys - a.queries + t + 1;
                one.q = a.q + (b * a.queries + t) * a.q_stride;
                one.k = a.k + b * a.keys * a.k_stride;
                one.v = a.v + b * a.keys * a.v_stride;
                CHECK_OK(c, tern_attention(c, &one));
                CHECK(memcmp(one.y, a.y + (b * a.queries + t) * width, (size_t)width * 4) == 0,
                      "case %d: output of query %d differs", cases[i], (int)t);
                for (h = 0; h < a.heads; h++)
                    CHECK(memcmp(one.p + h * one.keys, a.p + ((b * a.heads + h) * a.queries + t) * a.keys, (size_t)one.keys * 4) == 0,
                          "case %d: probabilities of query %d differ", cases[i], (int)t);
            }
        release();
    }
}
static void test_decoding(void) { on_each_tier(decoding); }

/* -- any split of the batch: n tokens at once are n tokens one by one -- */

static void batch_splits(tern_context *c, record *unused)
{
    const int64_t n = 67, cols = 130, rows = 50;
    const float *x = hold_floats(n * cols), *bias = hold_floats(rows);
    float *all = hold_output(n * cols), *one = hold_output(cols);
    int64_t t;
    int i;
    (void)unused;
    for (i = 0; i < 6; i++) {
        const tern_matrix m =
            hold_matrix(c, rows, cols, i < 3 ? every_grain[i] : every_grain[i - 1], i & 1 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
        tern_quantize_args q = hold_quantized(c, &m, n, x, TERN_NORM_RMS, NULL);
        tern_quantize_args p = hold_quantized(c, &m, 1, x, TERN_NORM_RMS, NULL);
        tern_matmul_args a = matmul_of(&q, bias, all), f;
        CHECK_OK(c, tern_matmul(c, &a));
        a = matmul_of(&p, bias, one);
        for (t = 0; t < n; t++, p.x += cols) {
            CHECK_OK(c, tern_quantize(c, &p));
            CHECK_OK(c, tern_matmul(c, &a));
            CHECK(memcmp(one, all + t * rows, (size_t)rows * 4) == 0, "int8 token %d differs", (int)t);
        }
        f = float_matmul_of(&m, n, x, bias, all);
        CHECK_OK(c, tern_matmul(c, &f));
        for (t = 0; t < n; t++) {
            f = float_matmul_of(&m, 1, x + t * cols, bias, one);
            CHECK_OK(c, tern_matmul(c, &f));
            CHECK(memcmp(one, all + t * rows, (size_t)rows * 4) == 0, "float token %d differs", (int)t);
        }
    }
}
static void test_batch_splits(void) { on_each_tier(batch_splits); }

static void row_splits(tern_context *c, record *unused)
{
    tern_dense_args d = dense_of(67, 40, 130, 0, 0), d1 = d;
    tern_norm_args n = norm_of(67, 130), n1 = n;
    tern_loss_args l = loss_of(67, 1100), l1 = l;
    tern_rope_args r = rope_of(67, 2, 8), r1 = r;
    int64_t t;
    (void)unused;
    d1.m = n1.n = l1.n = r1.n = 1;
    d1.c = hold_output(d.c_row);
    n1.y = hold_output(130);
    l1.losses = hold_output(1);
    l1.dlogits = hold_output(1100);
    r1.x = hold_copy(r.x, 67 * r.stride);
    CHECK_OK(c, tern_dense(c, &d));
    CHECK_OK(c, tern_norm(c, &n));
    CHECK_OK(c, tern_loss(c, &l));
    CHECK_OK(c, tern_rope(c, &r));
    for (t = 0; t < 67; t++, d1.a += 130, n1.x += 130, l1.logits += 1100, l1.targets++, r1.x += r.stride, r1.start++) {
        CHECK_OK(c, tern_dense(c, &d1));
        CHECK_OK(c, tern_norm(c, &n1));
        CHECK_OK(c, tern_loss(c, &l1));
        CHECK_OK(c, tern_rope(c, &r1));
        CHECK(memcmp(d1.c, d.c + t * d.c_row, 40 * 4) == 0, "dense row %d differs", (int)t);
        CHECK(memcmp(n1.y, n.y + t * 130, 130 * 4) == 0, "norm row %d differs", (int)t);
        CHECK(l1.losses[0] == l.losses[t] && memcmp(l1.dlogits, l.dlogits + t * 1100, 1100 * 4) == 0, "loss row %d differs", (int)t);
        CHECK(memcmp(r1.x, r.x + t * r.stride, (size_t)r.stride * 4) == 0, "rope row %d differs", (int)t);
    }
}
static void test_row_splits(void) { on_each_tier(row_splits); }

/* -- activation rows with NaN -- */

static void activation_faults(tern_context *c, record *unused)
{
    const int64_t n = 5, cols = 70, rows = 33;
    float *x = hold_floats(n * cols), *y = hold_output(n * rows), *clean = hold_output(n * rows);
    int mode, t, j;
    (void)unused;
    for (mode = 0; mode < 4; mode++) {
        const tern_matrix m = hold_matrix(c, rows, cols, mode & 2 ? 16 : TERN_PER_ROW, TERN_2BIT, TERN_F32);
        for (t = 0; t < 2; t++) { /* first clean, then with faults */
            x[cols + 60] = t ? NAN : 0.25f;
            x[3 * cols] = t ? INFINITY : 0.5f;
            if (mode & 1) {
                tern_quantize_args q = hold_quantized(c, &m, n, x, TERN_NORM_RMS, NULL);
                tern_matmul_args a = matmul_of(&q, NULL, y);
                CHECK_OK(c, tern_matmul(c, &a));
                if (t) CHECK(q.scale[1] == 0.0f && q.sum[q.m.grain > 0 ? 5 : 1] == 0, "the faulty row was not quantized to zero");
            } else {
                tern_matmul_args f = float_matmul_of(&m, n, x, NULL, y);
                CHECK_OK(c, tern_matmul(c, &f));
            }
            if (!t) memcpy(clean, y, (size_t)(n * rows) * 4);
        }
        CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "row 1");
        for (t = 0; t < n; t++)
            for (j = 0; j < rows; j++)
                CHECK(y[t * rows + j] == (t == 1 || t == 3 ? 0.0f : clean[t * rows + j]),
                      "mode %d [%d][%d] is %g", mode, t, j, y[t * rows + j]);
    }
}
static void test_activation_faults(void) { on_each_tier(activation_faults); }

/* -- backward: float64 references of the surrogate (the packed weights fixed, quantizers as identity) -- */

static void matmul_gradients(tern_context *c, record *r)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {3, 17, 35}, {70, 40, 130}, {200, 33, 20}, {2, 330, 100}}; /* n, rows, cols */
    int i, g;
    for (i = 0; i < 5; i++)
        for (g = 0; g < 10; g++) {
            const int64_t n = shapes[i][0], rows = shapes[i][1], cols = shapes[i][2];
            const tern_act act = g < 5 ? (i + g) & 1 ? TERN_ACT_INT8 : TERN_ACT_FLOAT : (i + g) & 1 ? TERN_ACT_INT4 : TERN_ACT_BIT;
            const tern_matrix m =
                hold_matrix(c, rows, cols, every_grain[g % 5], g & 1 ? TERN_2BIT : TERN_BASE3, every_scale_type[(g / 2 + i) % 4]);
            const float *x = act == TERN_ACT_BIT ? hold_sparse(n * cols, 2) : hold_floats(n * cols), *before = hold_floats(rows * cols);
            const tern_quantize_args q = hold_activations(c, act == TERN_ACT_FLOAT ? TERN_ACT_INT8 : act, &m, n, x,
                                                          act == TERN_ACT_BIT ? TERN_NORM_NONE : TERN_NORM_RMS, NULL);
            float *used = hold_copy(x, n * cols); /* the activations that the forward used */
            tern_unpack_args u = TERN_ZERO;
            tern_matmul_dx_args dx = TERN_ZERO;
            tern_matmul_dw_args dw = TERN_ZERO;
            int64_t t, row, col, stride = 0, groups = 0;
            CHECK_OK(c, tern_activation_shape(c, &m, &stride, &groups));
            for (t = 0; act != TERN_ACT_FLOAT && t < n; t++)
                for (col = 0; col < cols; col++)
                    used[t * cols + col] = (act == TERN_ACT_BIT ? (float)(x[t * cols + col] != 0.0f)
                                                                : (float)q.q[t * stride + place_of(&m, col)]) * q.scale[t];
            u.m = m;
            u.count = rows;
            u.values = hold_output(rows * cols);
            CHECK_OK(c, tern_unpack(c, &u));
            dx.m = dw.m = m;
            dx.n = dw.n = n;
            dx.dy = dw.dy = hold_floats(n * rows);
            dx.dx = hold_output(n * cols);
            dw.dw = hold_copy(before, rows * cols);
            dw.dbias = hold_zeros(rows);
            dw.act = q.act;
            if (act != TERN_ACT_FLOAT) { dw.q = q.q; dw.scale = q.scale; } else dw.x = x;
            CHECK_OK(c, tern_matmul_dx(c, &dx));
            CHECK_OK(c, tern_matmul_dw(c, &dw));
            for (t = 0; t < n; t++)
                for (col = 0; col < cols; col++) {
                    double want = 0.0;
                    for (row = 0; row < rows; row++) want += (double)dx.dy[t * rows + row] * u.values[row * cols + col];
                    CHECK(fabs(dx.dx[t * cols + col] - want) < 1e-5 * (1 + fabs(want)), "dx %g, not %g", dx.dx[t * cols + col], want);
                }
            for (row = 0; row < rows; row++) {
                double bias = 0.0;
                for (t = 0; t < n; t++) bias += dx.dy[t * rows + row];
                CHECK(fabs(dw.dbias[row] - bias) < 1e-5, "dbias %g, not %g", dw.dbias[row], bias);
                for (col = 0; col < cols; col++) {
                    double want = before[row * cols + col];
                    for (t = 0; t < n; t++) want += (double)dx.dy[t * rows + row] * used[t * cols + col];
                    CHECK(fabs(dw.dw[row * cols + col] - want) < 5e-5, "dw %g, not %g", dw.dw[row * cols + col], want);
                }
            }
            record_words(r, dx.dx, n * cols);
            record_words(r, dw.dw, rows * cols);
            record_words(r, dw.dbias, rows);
            release();
        }
}
static void test_matmul_gradients(void) { same_for_threads(matmul_gradients); }

/* -- factors of bf16: where the tier has them, float64 of the factors as they are rounded; elsewhere the bits of float -- */

static int has_pairs(const tern_context *c) { return ((const tern__kernels *)c->run.backend->data)->pairs != NULL; }

static double bf16(const tern_context *c, float x) { return has_pairs(c) ? (double)tern__from_bf16(tern__to_bf16(x)) : (double)x; }

/* Of `terms` products whose sizes add up to `size`: beside the sum of what was multiplied, which float sums stray from, and
   beside that of the unrounded, where `roundings` factors of each are off by 2^-8 at most. */
typedef struct factored { double sum, true_sum, size; } factored;
static void factored_add(factored *f, double product, double unrounded)
{
    f->sum += product;
    f->true_sum += unrounded;
    f->size += fabs(unrounded);
}
static void check_factored(const char *what, float got, const factored *f, int64_t terms, int roundings)
{
    const double sums = f->size * (double)(40 + terms) * 6e-8;
    CHECK(fabs((double)got - f->sum) <= sums, "%s: %g, not %g", what, (double)got, f->sum);
    CHECK(fabs((double)got - f->true_sum) <= sums + f->size * roundings / 255.0, "%s: %g, not about %g", what, (double)got, f->true_sum);
}

static void bf16_products_of(tern_context *c, record *r, int64_t n, int64_t rows, int64_t cols, int variant)
{
    const tern_act act = (tern_act)(variant % 4);
    const tern_matrix m =
        hold_matrix(c, rows, cols, every_grain[variant % 5], variant & 1 ? TERN_2BIT : TERN_BASE3, every_scale_type[variant / 2 % 4]);
    const tern__shape s = tern__shape_of(&m);
    const float *x = act == TERN_ACT_BIT ? hold_sparse(n * cols, 2) : hold_floats(n * cols), *before = hold_floats(rows * cols);
    const tern_quantize_args q = hold_activations(c, act == TERN_ACT_FLOAT ? TERN_ACT_INT8 : act, &m, n, x,
                                                  act == TERN_ACT_BIT ? TERN_NORM_NONE : TERN_NORM_RMS, NULL);
    tern_unpack_args u = TERN_ZERO;
    tern_matmul_dx_args dx = TERN_ZERO;
    tern_matmul_dw_args dw = TERN_ZERO;
    float buffer[TERN__ROWS], *scales = hold_output(rows), *other;
    int64_t t, row, col;
    for (row = 0; row < rows; row++) scales[row] = tern__panel_scales(&m, &s, row / TERN__ROWS, 0, buffer)[row % TERN__ROWS];
    u.m = m;
    u.count = rows;
    u.trits = (int8_t *)hold((size_t)(rows * cols));
    u.values = hold_output(rows * cols);
    CHECK_OK(c, tern_unpack(c, &u));
    dx.m = dw.m = m;
    dx.n = dw.n = n;
    dx.dy = dw.dy = hold_floats(n * rows);
    dx.dx = hold_output(n * cols);
    dw.dw = hold_copy(before, rows * cols);
    dw.act = q.act;
    dx.factors = dw.factors = TERN_BF16;
    if (act != TERN_ACT_FLOAT) { dw.q = q.q; dw.scale = q.scale; } else dw.x = x;
    CHECK_OK(c, tern_matmul_dx(c, &dx));
    CHECK_OK(c, tern_matmul_dw(c, &dw));
    for (t = 0; t < n; t++)
        for (col = 0; col < cols; col++) {
            factored f = {0.0, 0.0, 0.0};
            for (row = 0; row < rows; row++) {
                const float dy = dx.dy[t * rows + row], w = u.values[row * cols + col];
                factored_add(&f, s.groups > 1 ? bf16(c, dy) * bf16(c, w) : bf16(c, dy * scales[row]) * u.trits[row * cols + col],
                             (double)dy * (double)w);
            }
            check_factored("dx", dx.dx[t * cols + col], &f, rows, s.groups > 1 ? 2 : 1);
        }
    for (row = 0; row < rows; row++)
        for (col = 0; col < cols; col++) {
            factored f = {0.0, 0.0, 0.0};
            factored_add(&f, before[row * cols + col], before[row * cols + col]);
            for (t = 0; t < n; t++) {
                const float dy = dw.dy[t * rows + row], scale = q.scale[t];
                const double code = act == TERN_ACT_BIT ? (double)(x[t * cols + col] != 0.0f)
                                                        : (double)q.q[t * s.stride + place_of(&m, col)];
                if (act == TERN_ACT_FLOAT)
                    factored_add(&f, bf16(c, dy) * bf16(c, x[t * cols + col]), (double)dy * (double)x[t * cols + col]);
                else factored_add(&f, bf16(c, dy * scale) * code, (double)dy * (double)scale * code);
            }
            check_factored("dw", dw.dw[row * cols + col], &f, n, act == TERN_ACT_FLOAT ? 2 : 1);
        }
    record_words(r, dx.dx, n * cols);
    record_words(r, dw.dw, rows * cols);
    other = hold_copy(dx.dx, n * cols);
    dx.factors = dw.factors = TERN_F32;
    CHECK_OK(c, tern_matmul_dx(c, &dx));
    if (n > 1)
        CHECK((memcmp(other, dx.dx, (size_t)(n * cols) * 4) != 0) == has_pairs(c),
              "dx of %d x %d x %d: factors are those of the other type", (int)n, (int)rows, (int)cols);
    other = hold_copy(dw.dw, rows * cols);
    dw.dw = (float *)memcpy(hold_output(rows * cols), before, (size_t)(rows * cols) * 4);
    CHECK_OK(c, tern_matmul_dw(c, &dw));
    if (n > 1)
        CHECK((memcmp(other, dw.dw, (size_t)(rows * cols) * 4) != 0) == has_pairs(c),
              "dw of %d x %d x %d: factors are those of the other type", (int)n, (int)rows, (int)cols);
    release();
}

/* Around a tile, a block of rows, the 512 terms of a block and the 2048 of a segment. */
static void bf16_products(tern_context *c, record *r)
{
    static const int64_t shapes[][3] = { /* n, rows, cols */
        {1, 1, 1}, {3, 17, 35}, {70, 40, 130}, {340, 33, 50}, {20, 600, 40}, {2, 2100, 20}, {2100, 3, 36}};
    int i, variant;
    for (i = 0; i < 7; i++)
        for (variant = 0; variant < (i < 2 ? 20 : 3); variant++)
            bf16_products_of(c, r, shapes[i][0], shapes[i][1], shapes[i][2], variant + 7 * i);
}
static void test_bf16_products(void) { same_for_threads(bf16_products); }

static void bf16_dense_products(tern_context *c, record *r)
{
    static const int64_t shapes[][3] = {{1, 1, 1}, {17, 33, 70}, {70, 40, 530}, {330, 5, 40}, {3, 31, 2100}}; /* m, n, k */
    int i, variant;
    for (i = 0; i < 5; i++)
        for (variant = 0; variant < 5; variant++) {
            const int64_t m = shapes[i][0], n = shapes[i][1], k = shapes[i][2];
            tern_dense_args a = dense_of(m, n, k, variant & 1, variant & 2);
            const float *before = hold_copy(a.c, m * a.c_row);
            int64_t row, col, j;
            if (variant == 4) { /* neither side is contiguous */
                a.a = hold_floats(m * 3 * k);
                a.a_row = 3 * k; a.a_col = 3;
                a.b = hold_floats(k * 2 * n);
                a.b_row = 2 * n; a.b_col = 2;
            }
            a.add = variant % 3 == 1;
            a.factors = TERN_BF16;
            CHECK_OK(c, tern_dense(c, &a));
            for (row = 0; row < m; row++)
                for (col = 0; col < a.c_row; col++) {
                    factored f = {0.0, 0.0, 0.0};
                    const double from = col >= n || a.add ? (double)before[row * a.c_row + col] : 0.0;
                    factored_add(&f, from, from);
                    for (j = 0; col < n && j < k; j++) {
                        const float x = a.a[row * a.a_row + j * a.a_col], y = a.b[j * a.b_row + col * a.b_col];
                        factored_add(&f, bf16(c, x) * bf16(c, y), (double)x * (double)y);
                    }
                    if (col < n) factored_add(&f, a.bias[col], a.bias[col]);
                    check_factored("dense", a.c[row * a.c_row + col], &f, k, 2);
                }
            record_words(r, a.c, m * a.c_row);
            release();
        }
}
static void test_bf16_dense_products(void) { same_for_threads(bf16_dense_products); }

static double norm_literal(const tern_norm_args *a, const double *x, const double *gain, int64_t t)
{
    double squares = 0.0, total = 0.0;
    int64_t j;
    for (j = 0; j < a->cols; j++) squares += x[j] * x[j];
    for (j = 0; j < a->cols; j++) total += a->dy[t * a->cols + j] * x[j] * gain[j];
    return total / sqrt(squares / (double)a->cols + 1e-5);
}

static void norm_gradients(tern_context *c, record *r)
{
    static const int64_t cols[] = {1, 7, 130};
    const double h = 1e-5;
    int i, add;
    for (i = 0; i < 3; i++)
        for (add = 0; add < 2; add++) {
            tern_norm_args a = norm_of(6, cols[i]);
            double *x = hold_doubles(a.x, 6 * cols[i]), *gain = hold_doubles(a.gain, cols[i]);
            const float *before = hold_floats(6 * cols[i]), *gain_before = hold_floats(cols[i]);
            int64_t t, j;
            a.dy = hold_floats(6 * cols[i]);
            a.dx = hold_copy(before, 6 * cols[i]);
            a.dgain = hold_copy(gain_before, cols[i]);
            a.add = add;
            CHECK_OK(c, tern_norm(c, &a));
            for (j = 0; j < cols[i]; j++) {
                double want = gain_before[j];
                for (t = 0; t < 6; t++) {
                    double *row = x + t * cols[i], kept = row[j], up, down;
                    row[j] = kept + h; up = norm_literal(&a, row, gain, t);
                    row[j] = kept - h; down = norm_literal(&a, row, gain, t);
                    row[j] = kept;
                    up = (up - down) / (2 * h) + (add ? before[t * cols[i] + j] : 0.0f);
                    CHECK(fabs(a.dx[t * cols[i] + j] - up) < 2e-5 * (1 + fabs(up)), "dx %g, not %g", a.dx[t * cols[i] + j], up);
                    kept = gain[j];
                    gain[j] = kept + h; up = norm_literal(&a, row, gain, t);
                    gain[j] = kept - h; down = norm_literal(&a, row, gain, t);
                    gain[j] = kept;
                    want += (up - down) / (2 * h);
                }
                CHECK(fabs(a.dgain[j] - want) < 2e-5 * (1 + fabs(want)), "dgain %g, not %g", a.dgain[j], want);
            }
            record_words(r, a.dx, 6 * cols[i]);
            record_words(r, a.dgain, cols[i]);
            a.dx = (float *)(uintptr_t)a.dy; /* in place */
            CHECK_OK(c, tern_norm(c, &a));
            record_words(r, a.dx, 6 * cols[i]);
            release();
        }
}
static void test_norm_gradients(void) { same_for_threads(norm_gradients); }

/* <dy, y> in float64 over the fused buffer. */
static double attention_literal(const tern_attention_args *a, const double *qkv)
{
    double total = 0.0, p[16], y[16];
    int64_t b, t;
    int32_t h, d;
    for (b = 0; b < a->batch; b++)
        for (h = 0; h < a->heads; h++)
            for (t = 0; t < a->queries; t++) {
                const double *token0 = qkv + b * a->keys * a->k_stride + a->heads * a->dim + h / (a->heads / a->kv_heads) * a->dim;
                attention_row(a, qkv + (b * a->queries + t) * a->q_stride + h * a->dim, token0, token0 + a->kv_heads * a->dim, t + 1, p, y);
                for (d = 0; d < a->dim; d++) total += y[d] * a->dy[((b * a->queries + t) * a->heads + h) * a->dim + d];
            }
    return total;
}

static void attention_gradients(tern_context *c, record *r)
{
    tern_attention_args a = attention_of(2, 7, 7, 4, 2, 3);
    const int64_t n = 2 * 7 * a.q_stride;
    double *qkv = hold_doubles(a.q, n);
    float *d = hold_zeros(n);
    const double h = 1e-5;
    int64_t i;
    CHECK_OK(c, tern_attention(c, &a));
    a.dy = hold_floats(attention_outputs(&a));
    a.dq = d;
    a.dk = d + (a.k - a.q);
    a.dv = d + (a.v - a.q);
    CHECK_OK(c, tern_attention(c, &a));
    for (i = 0; i < n; i++) {
        const double kept = qkv[i];
        double up, down;
        qkv[i] = kept + h; up = attention_literal(&a, qkv);
        qkv[i] = kept - h; down = attention_literal(&a, qkv);
        qkv[i] = kept;
        CHECK(fabs(d[i] - (up - down) / (2 * h)) < 1e-5,
              "gradient %d of a token: %g, not %g", (int)(i % a.q_stride), d[i], (up - down) / (2 * h));
    }
    record_words(r, d, n);
}
static void test_attention_gradients(void) { same_for_threads(attention_gradients); }

/* Beyond the blocks of the backward (192 queries, 32 keys): against sums over all heads written out. */
static void large_attention_gradients(tern_context *c, record *r)
{
    tern_attention_args a = attention_of(1, 230, 230, 4, 2, 9);
    const int64_t n = 230 * a.q_stride;
    float *d = hold_zeros(n), *p = hold_output(4 * 230 * 230);
    const int32_t h = 2, kv = 1;
    int64_t i, j, e;
    CHECK_OK(c, tern_attention(c, &a));
    memcpy(p, a.p, 4 * 230 * 230 * 4);
    a.dy = hold_floats(attention_outputs(&a));
    a.dq = d;
    a.dk = d + (a.k - a.q);
    a.dv = d + (a.v - a.q);
    CHECK_OK(c, tern_attention(c, &a));
    record_words(r, d, n);
    for (i = 195; i < 230; i += 7) { /* dq of head 2: sum over keys of p (dy v - dy y) k / sqrt(dim) */
        double want[9] = {0.0};
        const float *dy = a.dy + (i * 4 + h) * 9, *y = a.y + (i * 4 + h) * 9;
        for (j = 0; j <= i; j++) {
            double ds = 0.0;
            for (e = 0; e < 9; e++) ds += dy[e] * ((double)a.v[j * a.v_stride + kv * 9 + e] - y[e]);
            for (e = 0; e < 9; e++) want[e] += p[(h * 230 + i) * 230 + j] * ds / 3.0 * a.k[j * a.k_stride + kv * 9 + e];
        }
        for (e = 0; e < 9; e++)
            CHECK(fabs(a.dq[i * a.q_stride + h * 9 + e] - want[e]) < 1e-5, "dq %g, not %g", a.dq[i * a.q_stride + h * 9 + e], want[e]);
    }
    for (j = 0; j < 230; j += 37) /* dv of key head 1: both query heads, every query */
        for (e = 0; e < 9; e++) {
            double want = 0.0;
            for (i = j; i < 230; i++)
                want += p[(2 * 230 + i) * 230 + j] * (double)a.dy[(i * 4 + 2) * 9 + e]
                        + p[(3 * 230 + i) * 230 + j] * (double)a.dy[(i * 4 + 3) * 9 + e];
            CHECK(fabs(a.dv[j * a.v_stride + 9 + e] - want) < 1e-4, "dv %g, not %g", a.dv[j * a.v_stride + 9 + e], want);
        }
}
static void test_large_attention_gradients(void) { same_for_threads(large_attention_gradients); }

/* -- rotation and dead zone -- */

static void rotated_rows(tern_context *c, record *r)
{
    static const int64_t cols[] = {1, 2, 3, 6, 15, 16, 17, 31, 96, 127, 512, 1040, 4097};
    int i, inverse;
    for (i = 0; i < 13; i++)
        for (inverse = 0; inverse < 2; inverse++) {
            const int64_t n = cols[i] > 1000 ? 3 : 40;
            tern_hadamard_args a = TERN_ZERO;
            float *kept;
            a.n = n;
            a.cols = cols[i];
            a.seed = 5;
            a.inverse = inverse;
            a.x = kept = hold_floats(n * cols[i]);
            a.y = hold_output(n * cols[i]);
            CHECK_OK(c, tern_hadamard(c, &a));
            record_words(r, a.y, n * cols[i]);
            a.y = kept; /* in place */
            CHECK_OK(c, tern_hadamard(c, &a));
            record_words(r, a.y, n * cols[i]);
            release();
        }
}
static void test_hadamard(void) { same_everywhere(rotated_rows, UINT64_C(0xCC7702DFE9038181)); }

/* x H of one row in float64, by the definition: signs, then the entries of Sylvester matrices one by one. */
static void rotate_literal(double *x, int64_t cols, uint32_t seed, int inverse)
{
    double *copy = (double *)malloc(sizeof(double) * (size_t)cols);
    int64_t p = 1, i, j, step;
    while (2 * p <= cols) p *= 2;
    for (step = 0; step < 3; step++) {
        const int64_t what = inverse ? 2 - step : step, from = what == 2 ? cols - p : 0;
        if (what == 2 && from == 0) continue; /* not twice */
        memcpy(copy, x, sizeof(double) * (size_t)cols);
        for (i = 0; what == 0 && i < cols; i++) {
            uint32_t word[4];
            tern__philox(seed, (uint64_t)(i / 128), 0, 0x48414441, word);
            if (word[i % 128 / 32] >> i % 32 & 1) x[i] = -x[i];
        }
        for (i = 0; what > 0 && i < p; i++) {
            x[from + i] = 0.0;
            for (j = 0; j < p; j++) {
                int64_t common = i & j, ones = 0;
                for (; common; common &= common - 1) ones++;
                x[from + i] += (ones % 2 ? -1.0 : 1.0) / sqrt((double)p) * copy[from + j];
            }
        }
    }
    free(copy);
}

static void test_hadamard_literal(void)
{
    static const int64_t cols[] = {1, 2, 3, 7, 8, 100, 128, 300};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i, inverse;
    for (i = 0; i < 8; i++)
        for (inverse = 0; inverse < 2; inverse++) {
            tern_hadamard_args a = TERN_ZERO;
            double *want;
            float changed = 0.0f;
            const float *x = hold_floats(cols[i]);
            int64_t j;
            a.n = 1;
            a.cols = cols[i];
            a.seed = 9;
            a.inverse = inverse;
            a.x = x;
            a.y = hold_output(cols[i]);
            want = (double *)hold(sizeof(double) * (size_t)cols[i]);
            for (j = 0; j < cols[i]; j++) want[j] = a.x[j];
            rotate_literal(want, cols[i], 9, inverse);
            CHECK_OK(t.c, tern_hadamard(t.c, &a));
            for (j = 0; j < cols[i]; j++)
                CHECK(fabs(a.y[j] - want[j]) < 2e-6, "%d columns: [%d] %g, not %g", (int)cols[i], (int)j, a.y[j], want[j]);
            a.inverse = !inverse; /* there and back */
            a.x = a.y;
            CHECK_OK(t.c, tern_hadamard(t.c, &a));
            for (j = 0; j < cols[i]; j++)
                CHECK(fabs(a.y[j] - x[j]) < 2e-6, "%d columns: back at [%d] %g, not %g", (int)cols[i], (int)j, a.y[j], x[j]);
            a.inverse = inverse;
            a.seed = 10; /* other signs */
            CHECK_OK(t.c, tern_hadamard(t.c, &a));
            for (j = 0; j < cols[i]; j++) changed += (float)fabs(a.y[j] - want[j]);
            CHECK(cols[i] < 7 || changed > 0.1f, "%d columns: the seed changes nothing", (int)cols[i]);
            release();
        }
    test_close(&t);
}

static void dead_zones(tern_context *c, record *r)
{
    static const int64_t cols[] = {1, 17, 130, 2500};
    int i, g;
    for (i = 0; i < 4; i++)
        for (g = 0; g < 5; g++) {
            const int64_t rows = 19;
            const tern_matrix m = hold_matrix(c, rows, cols[i], every_grain[g], g & 1 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
            const float *before = hold_floats(rows * cols[i]);
            tern_dead_zone_args a = TERN_ZERO;
            tern_unpack_args u = TERN_ZERO;
            int64_t row, col;
            u.m = a.m = m;
            u.count = rows;
            u.trits = (int8_t *)hold((size_t)(rows * cols[i]));
            CHECK_OK(c, tern_unpack(c, &u));
            a.lambda = 0.25f;
            a.w = hold_floats(rows * cols[i]);
            a.bias = hold_output(rows);
            a.dbias = hold_floats(rows);
            a.dw = hold_copy(before, rows * cols[i]);
            CHECK_OK(c, tern_dead_zone(c, &a));
            for (row = 0; row < rows; row++) {
                double want = 0.0;
                for (col = 0; col < cols[i]; col++) {
                    const int64_t at = row * cols[i] + col;
                    if (u.trits[at] == 0) want += 0.25 * (double)((const float *)a.w)[at];
                    CHECK(fabs(a.dw[at] - (before[at] + (u.trits[at] ? 0.0 : 0.25 * a.dbias[row]))) < 1e-6,
                          "dw[%d] is %g", (int)at, a.dw[at]);
                }
                CHECK(fabs(a.bias[row] - want) < 1e-5, "bias[%d] %g, not %g", (int)row, a.bias[row], want);
            }
            record_words(r, a.bias, rows);
            record_words(r, a.dw, rows * cols[i]);
            a.bias = NULL; /* each alone */
            CHECK_OK(c, tern_dead_zone(c, &a));
            record_words(r, a.dw, rows * cols[i]);
            release();
        }
}
static void test_dead_zone(void) { same_everywhere(dead_zones, UINT64_C(0xEF08ACBE1B30D295)); }

/* -- arguments: good ones for every operation, then one wrong field at a time -- */

#define CALL(op) \
    static tern_result call_##op(tern_context *c, const void *args) { return tern_##op(c, (const tern_##op##_args *)args); }
TERN_OPS(CALL)
#undef CALL

enum { ARENA = 4096 };
static float arena[ARENA]; /* every pointer of the good arguments points here */
static int32_t arena_used;

static float *arena_take(int32_t floats)
{
    float *p = arena + arena_used;
    arena_used += floats;
    if (arena_used > ARENA) abort();
    return p;
}

static int64_t edge_start[4];
#define GOOD(op) static tern_##op##_args good_##op;
TERN_OPS(GOOD)
static tern_aggregate_args good_aggregate_i8;
#undef GOOD

static tern_matrix good_matrix(void)
{
    tern_matrix m = TERN_ZERO;
    m.rows = 3; m.cols = 20;
    m.grain = TERN_PER_ROW;
    m.trits = memset(arena_take(64), 0x55, 256); /* all zeros in 2 bits */
    m.scales = memset(arena_take(16), 0, 64);
    return m;
}

static void make_good(void)
{
    const tern_matrix m = (arena_used = 0, good_matrix());
    int8_t *trits = (int8_t *)memset(arena_take(64), 0, 256);
    float *x = arena_take(64), *y = arena_take(64), *z = arena_take(64), *u = arena_take(64), *v = arena_take(64);
    int32_t *ids = (int32_t *)(void *)arena_take(16);
    int i;
    for (i = 0; i < 64; i++) x[i] = y[i] = z[i] = u[i] = v[i] = 0.125f;
    memset(ids, 0, 64);
#define CLEAR(op) memset(&good_##op, 0, sizeof good_##op);
    TERN_OPS(CLEAR)
#undef CLEAR
    good_ternarize.m = m; good_ternarize.w = x;
    good_pack.m = m; good_pack.trits = trits;
    good_unpack.m = m; good_unpack.count = 3; good_unpack.values = x; good_unpack.trits = trits;
    good_quantize.m = m; good_quantize.n = 1; good_quantize.x = x; good_quantize.gain = y;
    good_quantize.norm = TERN_NORM_RMS; good_quantize.eps = 1e-6f;
    good_quantize.q = trits; good_quantize.scale = z; good_quantize.sum = ids;
    good_matmul.m = m; good_matmul.n = 1; good_matmul.q = trits; good_matmul.scale = x; good_matmul.sum = ids;
    good_matmul.bias = z; good_matmul.y = y;
    good_matmul_fixed.m = m; good_matmul_fixed.m.scale_type = TERN_LOG; good_matmul_fixed.n = 1; good_matmul_fixed.x = trits;
    good_matmul_fixed.bias = ids; good_matmul_fixed.y = (int32_t *)(void *)u;
    good_matmul_dx.m = m; good_matmul_dx.n = 1; good_matmul_dx.dy = x; good_matmul_dx.dx = y;
    good_matmul_dw.m = m; good_matmul_dw.n = 1; good_matmul_dw.dy = x; good_matmul_dw.q = trits; good_matmul_dw.scale = y;
    good_matmul_dw.dw = z; good_matmul_dw.dbias = u;
    good_dense.m = 2; good_dense.n = 3; good_dense.k = 4; good_dense.a = x; good_dense.a_row = 4; good_dense.a_col = 1;
    good_dense.b = y; good_dense.b_row = 3; good_dense.b_col = 1; good_dense.bias = z; good_dense.c = u; good_dense.c_row = 3;
    good_dense_i8.m = 2; good_dense_i8.n = 3; good_dense_i8.k = 4; good_dense_i8.a = trits;
    good_dense_i8.a_row = 4; good_dense_i8.a_col = 1;
    good_dense_i8.b = trits; good_dense_i8.b_row = 3; good_dense_i8.b_col = 1; good_dense_i8.c = ids; good_dense_i8.c_row = 3;
    good_gather.m = m; good_gather.n = 1; good_gather.ids = ids; good_gather.y = y;
    good_scatter.rows = 3; good_scatter.cols = 5; good_scatter.n = 2; good_scatter.ids = ids; good_scatter.dy = x; good_scatter.dw = y;
    good_fill.count = 10; good_fill.x = x; good_fill.deviation = 1.0f;
    good_cast.count = 10; good_cast.src = x; good_cast.dst = y; good_cast.to = TERN_BF16;
    good_map.count = 10; good_map.a = x; good_map.b = y; good_map.y = z;
    good_norm.n = 2; good_norm.cols = 5; good_norm.x = x; good_norm.gain = y; good_norm.eps = 1e-6f; good_norm.y = z;
    good_hadamard.n = 2; good_hadamard.cols = 5; good_hadamard.x = x; good_hadamard.y = y; good_hadamard.seed = 3;
    good_dead_zone.m = m; good_dead_zone.lambda = 0.5f; good_dead_zone.w = x; good_dead_zone.bias = y;
    good_dead_zone.dbias = z; good_dead_zone.dw = u;
    good_rope.n = 2; good_rope.heads = 2; good_rope.dim = 4; good_rope.x = x; good_rope.stride = 8; good_rope.period = 2;
    good_attention.batch = 1; good_attention.queries = good_attention.keys = 2;
    good_attention.heads = good_attention.kv_heads = 2; good_attention.dim = 4;
    good_attention.q = x; good_attention.k = y; good_attention.v = z;
    good_attention.q_stride = good_attention.k_stride = good_attention.v_stride = 8;
    good_attention.y = u; good_attention.p = arena_take(16);
    good_loss.n = 2; good_loss.classes = 5; good_loss.logits = x; good_loss.targets = ids; good_loss.losses = y;
    good_loss.dlogits = z; good_loss.scale = 1.0f;
    good_sum.count = 10; good_sum.x = x; good_sum.y = y;
    good_optimize.kind = TERN_ADAMW; good_optimize.count = 10; good_optimize.w = x; good_optimize.grad = y;
    good_optimize.moment1 = z; good_optimize.moment2 = u;
    good_optimize.rate = 0.1f; good_optimize.beta1 = 0.9f; good_optimize.beta2 = 0.99f; good_optimize.eps = 1e-8f; good_optimize.step = 1;
    good_optimize.norm2 = arena_take(1);
    good_round_i8.n = 2; good_round_i8.cols = 3; good_round_i8.x = v; good_round_i8.m = m; good_round_i8.q = trits; good_round_i8.scale = y;
    good_dequantize.n = 2; good_dequantize.cols = 3; good_dequantize.x = ids; good_dequantize.scale = x;
    good_dequantize.y = y; good_dequantize.y_row = 3;
    good_flip.m = m; good_flip.m.scale_type = TERN_POW2; good_flip.grad = x; good_flip.accum = good_flip.votes = trits;
    good_flip.sum_abs = v; good_flip.theta = 32;
    good_flip.push = 3.0f; good_flip.sign_step = 1; good_flip.scale_step = 1; good_flip.scale_theta = 32;
    good_route.n = 2; good_route.count = 5; good_route.k = 2; good_route.logits = arena_take(16);
    good_route.ids = ids; good_route.weights = y;
    good_group.n = 2; good_group.count = 5; good_group.k = 2; good_group.ids = ids; good_group.weights = x;
    good_group.loads = (int32_t *)(void *)z; good_group.tokens = good_group.loads + 8;
    good_group.slots = good_group.loads + 16; good_group.sorted = y;
    good_row_dot.rows = 3; good_row_dot.cols = 5; good_row_dot.n = 2; good_row_dot.count = 2; good_row_dot.a = x; good_row_dot.b = y;
    good_row_dot.ids = good_row_dot.to = ids; good_row_dot.y = z;
    good_aggregate.edges.rows = 3; good_aggregate.edges.sources = 2; good_aggregate.edges.count = 1;
    good_aggregate.edges.hubs = good_aggregate.edges.parts = 1;
    good_aggregate.edges.start = edge_start; good_aggregate.edges.entry = (uint32_t *)(void *)ids;
    good_aggregate.edges.hub = ids; good_aggregate.edges.part = edge_start;
    good_aggregate.cols = 5; good_aggregate.x = x; good_aggregate.part = y; good_aggregate.y = z;
    good_gate.n = 2; good_gate.count = 1; good_gate.cols = 5; good_gate.h = good_gate.key = good_gate.value = arena_take(16);
    good_gate.gate = u; good_gate.y = v;
    good_nearest.n = 2; good_nearest.rows = 3; good_nearest.cols = 5; good_nearest.x = good_nearest.w = arena_take(16);
    good_nearest.ids = (int32_t *)(void *)u; good_nearest.distance = z;
    good_aggregate_i8 = good_aggregate; good_aggregate_i8.q = trits; good_aggregate_i8.q_row = 16; good_aggregate_i8.scale = x;
    good_scale_grad.m = m; good_scale_grad.rule = TERN_SEQ; good_scale_grad.w = x; good_scale_grad.dw = y; good_scale_grad.dalpha = z;
}

typedef enum { TO_NULL, OFF_BY_ONE, TO_INT64, TO_INT32, TO_FLOAT } change;
typedef struct wrong {
    tern_result (*call)(tern_context *c, const void *args);
    const void *good;
    size_t size, field;
    change how;
    double value;
    tern_result code;
    const char *part; /* of the text */
} wrong;

#define WRONG(op, field, how, value, code, part) \
    {call_##op, &good_##op, sizeof good_##op, offsetof(tern_##op##_args, field), how, value, code, part},
#define NEEDED(op, field) WRONG(op, field, TO_NULL, 0, TERN_E_ARGUMENT, #op ": " #field " is NULL") ALIGNED(op, field)
#define NEEDED_BYTES(op, field) WRONG(op, field, TO_NULL, 0, TERN_E_ARGUMENT, #op ": " #field " is NULL")
#define ALIGNED(op, field) WRONG(op, field, OFF_BY_ONE, 0, TERN_E_ALIGNMENT, #op ": " #field " is not aligned")
#define COUNTED(op, field)                                              \
    WRONG(op, field, TO_INT64, 0, TERN_E_SHAPE, #op ": ")               \
    WRONG(op, field, TO_INT64, -1, TERN_E_SHAPE, #op ": ")              \
    WRONG(op, field, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
#define RANGED32(op, field, value) WRONG(op, field, TO_INT32, value, TERN_E_ARGUMENT, #op ": ")
#define RANGED_FLOAT(op, field, value) WRONG(op, field, TO_FLOAT, value, TERN_E_ARGUMENT, #op ": ")
#define MATRIX(op)                                                                                          \
    WRONG(op, m.rows, TO_INT64, 0, TERN_E_SHAPE, #op ": matrix is 0 x 20")                                  \
    WRONG(op, m.rows, TO_INT64, -1, TERN_E_SHAPE, "-1 x 20")                                                \
    WRONG(op, m.rows, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")                                       \
    MATRIX_COLS(op)
#define MATRIX_COLS(op)                                                                                     \
    WRONG(op, m.cols, TO_INT64, 0, TERN_E_SHAPE, "both must be positive")                                   \
    WRONG(op, m.cols, TO_INT64, -20, TERN_E_SHAPE, "both must be positive")                                 \
    WRONG(op, m.cols, TO_INT64, 262145, TERN_E_SHAPE, #op ": K = 262145 exceeds 262144")                    \
    WRONG(op, m.grain, TO_INT32, -2, TERN_E_ARGUMENT, "grain -2")                                           \
    WRONG(op, m.grain, TO_INT32, 262145, TERN_E_ARGUMENT, "grain 262145")                                   \
    WRONG(op, m.encoding, TO_INT32, TERN_F32, TERN_E_ARGUMENT, "encoding 1")                                \
    WRONG(op, m.scale_type, TO_INT32, TERN_BF16, TERN_E_ARGUMENT, "scale type 2")
#define PACKED(op) MATRIX(op) NEEDED_BYTES(op, m.trits) NEEDED(op, m.scales)

static const wrong wrongs[] = {
    PACKED(ternarize) NEEDED(ternarize, w)
    RANGED32(ternarize, rule, TERN_DENSE) RANGED32(ternarize, rule, -1) RANGED32(ternarize, type, TERN_I8)
    MATRIX(pack) NEEDED_BYTES(pack, m.trits) NEEDED_BYTES(pack, trits)
    PACKED(unpack) ALIGNED(unpack, values)
    WRONG(unpack, row, TO_INT64, -1, TERN_E_SHAPE, "rows -1 to 2 of 3") WRONG(unpack, row, TO_INT64, 1, TERN_E_SHAPE, "rows 1 to 4 of 3")
    WRONG(unpack, count, TO_INT64, 0, TERN_E_SHAPE, "of 3") WRONG(unpack, count, TO_INT64, 9e18, TERN_E_SHAPE, "of 3")
    MATRIX_COLS(quantize) COUNTED(quantize, n) NEEDED(quantize, x) ALIGNED(quantize, gain) NEEDED_BYTES(quantize, q)
    NEEDED(quantize, scale) NEEDED(quantize, sum)
    RANGED32(quantize, norm, 2) RANGED32(quantize, act, TERN_ACT_FLOAT) RANGED32(quantize, act, TERN_ACT_BIT)
    RANGED_FLOAT(quantize, eps, 0) RANGED_FLOAT(quantize, eps, NAN) RANGED_FLOAT(quantize, eps, INFINITY)
    PACKED(matmul) COUNTED(matmul, n) NEEDED(matmul, scale) NEEDED(matmul, sum) ALIGNED(matmul, bias) NEEDED(matmul, y)
    WRONG(matmul, q, TO_NULL, 0, TERN_E_ARGUMENT, "x is NULL")
    RANGED32(matmul, act, TERN_ACT_FLOAT) RANGED32(matmul, act, 4) RANGED32(matmul, act, -1)
    PACKED(matmul_fixed) COUNTED(matmul_fixed, n) NEEDED_BYTES(matmul_fixed, x) ALIGNED(matmul_fixed, bias) NEEDED(matmul_fixed, y)
    RANGED32(matmul_fixed, m.scale_type, TERN_F32) RANGED32(matmul_fixed, m.scale_type, TERN_F16) RANGED32(matmul_fixed, point, 32)
    RANGED32(matmul_fixed, point, -32)
    RANGED32(matmul_dx, factors, TERN_F16) RANGED32(matmul_dw, factors, TERN_I8) RANGED32(dense, factors, -1)
    PACKED(matmul_dx) COUNTED(matmul_dx, n) NEEDED(matmul_dx, dy) NEEDED(matmul_dx, dx)
    MATRIX(matmul_dw) COUNTED(matmul_dw, n) NEEDED(matmul_dw, dy) ALIGNED(matmul_dw, dw) ALIGNED(matmul_dw, dbias) NEEDED(matmul_dw, scale)
    WRONG(matmul_dw, q, TO_NULL, 0, TERN_E_ARGUMENT, "x is NULL") RANGED32(matmul_dw, act, TERN_ACT_FLOAT) RANGED32(matmul_dw, act, 4)
    COUNTED(dense, m) NEEDED(dense, a) NEEDED(dense, b) ALIGNED(dense, bias) NEEDED(dense, c)
    WRONG(dense, n, TO_INT64, 0, TERN_E_SHAPE, "[2 x 4] * [4 x 0]") WRONG(dense, k, TO_INT64, 0, TERN_E_SHAPE, "[2 x 0]")
    WRONG(dense, k, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(dense, a_row, TO_INT64, -1, TERN_E_SHAPE, "strides") WRONG(dense, a_col, TO_INT64, -1, TERN_E_SHAPE, "strides")
    WRONG(dense, b_row, TO_INT64, -1, TERN_E_SHAPE, "strides") WRONG(dense, b_col, TO_INT64, -1, TERN_E_SHAPE, "strides")
    WRONG(dense, c_row, TO_INT64, 2, TERN_E_SHAPE, "c_row = 2 at least n = 3")
    WRONG(dense, a_row, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(dense, b_row, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows") WRONG(dense, b_col, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    COUNTED(dense_i8, m) NEEDED_BYTES(dense_i8, a) NEEDED_BYTES(dense_i8, b) NEEDED(dense_i8, c)
    WRONG(dense_i8, n, TO_INT64, 0, TERN_E_SHAPE, "[2 x 4] * [4 x 0]") WRONG(dense_i8, k, TO_INT64, 0, TERN_E_SHAPE, "[2 x 0]")
    WRONG(dense_i8, k, TO_INT64, 131072, TERN_E_SHAPE, "k = 131072 exceeds 131071")
    WRONG(dense_i8, n, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(dense_i8, a_row, TO_INT64, -1, TERN_E_SHAPE, "strides") WRONG(dense_i8, a_col, TO_INT64, -1, TERN_E_SHAPE, "strides")
    WRONG(dense_i8, b_row, TO_INT64, -1, TERN_E_SHAPE, "strides") WRONG(dense_i8, b_col, TO_INT64, -1, TERN_E_SHAPE, "strides")
    WRONG(dense_i8, c_row, TO_INT64, 2, TERN_E_SHAPE, "c_row = 2 at least n = 3")
    WRONG(dense_i8, a_row, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(dense_i8, b_row, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(dense_i8, b_col, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(gather, m.trits, TO_NULL, 0, TERN_E_ARGUMENT, "w is NULL") NEEDED(gather, m.scales) MATRIX(gather) COUNTED(gather, n)
    NEEDED(gather, ids) NEEDED(gather, y)
    COUNTED(scatter, rows) COUNTED(scatter, cols) COUNTED(scatter, n) NEEDED(scatter, ids) NEEDED(scatter, dy) NEEDED(scatter, dw)
    COUNTED(fill, count) NEEDED(fill, x)
    RANGED_FLOAT(fill, deviation, -1) RANGED_FLOAT(fill, deviation, NAN) RANGED_FLOAT(fill, deviation, INFINITY)
    COUNTED(cast, count) NEEDED(cast, src) NEEDED_BYTES(cast, dst) ALIGNED(cast, dst)
    RANGED32(cast, from, TERN_I8) RANGED32(cast, to, TERN_2BIT)
    COUNTED(map, count) NEEDED(map, a) NEEDED(map, b) NEEDED(map, y) RANGED32(map, fn, -1) RANGED32(map, fn, 7)
    COUNTED(norm, n) COUNTED(norm, cols) NEEDED(norm, x) ALIGNED(norm, gain) NEEDED(norm, y) ALIGNED(norm, dx) ALIGNED(norm, dgain)
    RANGED_FLOAT(norm, eps, 0) RANGED_FLOAT(norm, eps, NAN) RANGED_FLOAT(norm, eps, INFINITY)
    COUNTED(hadamard, n) NEEDED(hadamard, x) NEEDED(hadamard, y)
    WRONG(hadamard, cols, TO_INT64, 0, TERN_E_SHAPE, "cols = 0")
    WRONG(hadamard, cols, TO_INT64, 262145, TERN_E_SHAPE, "hadamard: rows of 262145; 262144 is the most")
    MATRIX(dead_zone) NEEDED_BYTES(dead_zone, m.trits) NEEDED(dead_zone, w) ALIGNED(dead_zone, bias) NEEDED(dead_zone, dbias)
    ALIGNED(dead_zone, dw)
    RANGED32(dead_zone, type, TERN_I8) RANGED_FLOAT(dead_zone, lambda, NAN) RANGED_FLOAT(dead_zone, lambda, INFINITY)
    COUNTED(rope, n) NEEDED(rope, x) WRONG(rope, heads, TO_INT32, 0, TERN_E_SHAPE, "heads = 0")
    WRONG(rope, stride, TO_INT64, 7, TERN_E_SHAPE, "stride 7 is below heads x dim = 8")
    WRONG(rope, dim, TO_INT32, 3, TERN_E_SHAPE, "dim = 3") WRONG(rope, dim, TO_INT32, 0, TERN_E_SHAPE, "dim = 0")
    WRONG(rope, dim, TO_INT32, 1026, TERN_E_SHAPE, "dim = 1026")
    WRONG(rope, start, TO_INT64, -1, TERN_E_ARGUMENT, "start -1") WRONG(rope, start, TO_INT64, 16777216, TERN_E_ARGUMENT, "start 16777216")
    WRONG(rope, period, TO_INT64, 0, TERN_E_ARGUMENT, "period 0")
    RANGED_FLOAT(rope, base, -1) RANGED_FLOAT(rope, base, 0.5f) RANGED_FLOAT(rope, base, NAN)
    COUNTED(attention, batch) NEEDED(attention, q) NEEDED(attention, k) NEEDED(attention, v) NEEDED(attention, y) NEEDED(attention, p)
    ALIGNED(attention, dy)
    WRONG(attention, queries, TO_INT64, 0, TERN_E_SHAPE, "0 queries")
    WRONG(attention, queries, TO_INT64, 3, TERN_E_SHAPE, "3 queries over 2 keys")
    WRONG(attention, keys, TO_INT64, 1, TERN_E_SHAPE, "2 queries over 1 keys")
    WRONG(attention, keys, TO_INT64, 4.6e18, TERN_E_OVERFLOW, "overflows")
    WRONG(attention, heads, TO_INT32, 3, TERN_E_SHAPE, "3 heads cannot share 2")
    WRONG(attention, heads, TO_INT32, 0, TERN_E_SHAPE, "0 heads") WRONG(attention, kv_heads, TO_INT32, 0, TERN_E_SHAPE, "share 0")
    WRONG(attention, dim, TO_INT32, 0, TERN_E_SHAPE, "dim = 0") WRONG(attention, dim, TO_INT32, 1025, TERN_E_SHAPE, "dim = 1025")
    WRONG(attention, q_stride, TO_INT64, 7, TERN_E_SHAPE, "strides 7") WRONG(attention, k_stride, TO_INT64, 7, TERN_E_SHAPE, "strides 8, 7")
    WRONG(attention, v_stride, TO_INT64, 7, TERN_E_SHAPE, "strides 8, 8, 7")
    COUNTED(loss, n) COUNTED(loss, classes) NEEDED(loss, logits) NEEDED(loss, targets) NEEDED(loss, losses) ALIGNED(loss, dlogits)
    COUNTED(sum, count) NEEDED(sum, x) NEEDED(sum, y) RANGED32(sum, kind, -1) RANGED32(sum, kind, 3) RANGED32(sum, type, TERN_I8)
    COUNTED(optimize, count) NEEDED(optimize, w) NEEDED(optimize, grad) NEEDED(optimize, moment1) NEEDED(optimize, moment2)
    ALIGNED(optimize, norm2)
    RANGED32(optimize, kind, 2) RANGED32(optimize, type, TERN_F16) RANGED32(optimize, step, 0)
    RANGED_FLOAT(optimize, rate, -1) RANGED_FLOAT(optimize, rate, NAN) RANGED_FLOAT(optimize, eps, 0) RANGED_FLOAT(optimize, beta1, 1)
    RANGED_FLOAT(optimize, beta1, -0.5)
    RANGED_FLOAT(optimize, beta2, 1) RANGED_FLOAT(optimize, beta2, NAN) RANGED_FLOAT(optimize, eps, -1)
    RANGED_FLOAT(optimize, decay, INFINITY)
    WRONG(optimize, moment_type, TO_INT32, TERN_F16, TERN_E_ARGUMENT, "moments of type 3")
    COUNTED(round_i8, n) COUNTED(round_i8, cols) NEEDED(round_i8, x) ALIGNED(round_i8, row) NEEDED_BYTES(round_i8, q)
    NEEDED(round_i8, scale) MATRIX(round_i8)
    ALIGNED(round_i8, m.scales) WRONG(round_i8, m.rows, TO_INT64, 4, TERN_E_SHAPE, "scales of 4 rows for 3 columns")
    WRONG(round_i8, group, TO_INT64, 1, TERN_E_SHAPE, "group 1 of 1") WRONG(round_i8, group, TO_INT64, -1, TERN_E_SHAPE, "group -1 of 1")
    COUNTED(dequantize, n) COUNTED(dequantize, cols) NEEDED(dequantize, x) NEEDED(dequantize, scale) NEEDED(dequantize, y)
    WRONG(dequantize, y_row, TO_INT64, 2, TERN_E_SHAPE, "y_row = 2 is below cols = 3")
    MATRIX(flip) NEEDED_BYTES(flip, m.trits) NEEDED_BYTES(flip, m.scales) NEEDED(flip, grad) NEEDED_BYTES(flip, accum) NEEDED(flip, sum_abs)
    ALIGNED(flip, counts)
    RANGED32(flip, rule, -1) RANGED32(flip, rule, 2) RANGED32(flip, theta, 1) RANGED32(flip, theta, 128) RANGED32(flip, scale_theta, 1)
    RANGED32(flip, scale_theta, 128)
    RANGED_FLOAT(flip, push, -1) RANGED_FLOAT(flip, push, NAN) RANGED_FLOAT(flip, push, 128)
    RANGED32(flip, sign_step, -1) RANGED32(flip, sign_step, 128)
    RANGED32(flip, scale_step, -1) RANGED32(flip, scale_step, 128)
    WRONG(flip, votes, TO_NULL, 0, TERN_E_ARGUMENT, "learn as TERN_POW2 or TERN_LOG with votes")
    WRONG(flip, m.scale_type, TO_INT32, TERN_F16, TERN_E_ARGUMENT, "learn as TERN_POW2 or TERN_LOG with votes; theirs is type 3")
    WRONG(flip, m.scale_type, TO_INT32, TERN_LOG, TERN_E_ARGUMENT, "scale_push is 0, not 1 to 256")
    COUNTED(route, n) NEEDED(route, logits) NEEDED(route, ids) NEEDED(route, weights) ALIGNED(route, dweights) ALIGNED(route, loads)
    RANGED32(route, kind, 3) RANGED32(route, kind, -1)
    WRONG(route, count, TO_INT32, 0, TERN_E_SHAPE, "route: 0 experts; 1 to 1024")
    WRONG(route, count, TO_INT32, 1025, TERN_E_SHAPE, "route: 1025 experts; 1 to 1024")
    WRONG(route, k, TO_INT32, 0, TERN_E_SHAPE, "route: k = 0 of 5 experts")
    WRONG(route, k, TO_INT32, 6, TERN_E_SHAPE, "route: k = 6 of 5 experts")
    WRONG(route, n, TO_INT64, 429496730, TERN_E_OVERFLOW, "route: n = 429496730 x 5")
    RANGED_FLOAT(route, balance, NAN) RANGED_FLOAT(route, balance, INFINITY)
    COUNTED(group, n) NEEDED(group, ids) NEEDED(group, weights) NEEDED(group, loads) NEEDED(group, tokens) NEEDED(group, slots)
    ALIGNED(group, sorted)
    WRONG(group, count, TO_INT32, -1, TERN_E_SHAPE, "group: -1 experts")
    WRONG(group, k, TO_INT32, 6, TERN_E_SHAPE, "group: k = 6 of 5 experts")
    COUNTED(row_dot, rows) COUNTED(row_dot, cols) COUNTED(row_dot, n) COUNTED(row_dot, count)
    NEEDED(row_dot, a) NEEDED(row_dot, b) NEEDED(row_dot, ids) NEEDED(row_dot, to) NEEDED(row_dot, y)
    ALIGNED(gather, weight) ALIGNED(scatter, weight)
    COUNTED(gate, n) COUNTED(gate, count) COUNTED(gate, cols)
    NEEDED(gate, h) NEEDED(gate, key) NEEDED(gate, value) NEEDED(gate, gate) NEEDED(gate, y)
    COUNTED(nearest, n) COUNTED(nearest, rows) COUNTED(nearest, cols) NEEDED(nearest, x) NEEDED(nearest, w) NEEDED(nearest, ids)
    ALIGNED(nearest, distance)
    COUNTED(aggregate, cols) COUNTED(aggregate, edges.rows) COUNTED(aggregate, edges.sources)
    NEEDED(aggregate, x) NEEDED(aggregate, y) NEEDED(aggregate, part)
    ALIGNED(aggregate, left) ALIGNED(aggregate, right)
    NEEDED(aggregate, edges.start) NEEDED(aggregate, edges.entry) NEEDED(aggregate, edges.hub) NEEDED(aggregate, edges.part)
    WRONG(aggregate, edges.count, TO_INT64, -1, TERN_E_SHAPE, "-1 edges")
    WRONG(aggregate, edges.parts, TO_INT64, 0, TERN_E_SHAPE, "1 hubs and 0 parts")
    {call_aggregate, &good_aggregate_i8, sizeof good_aggregate_i8, offsetof(tern_aggregate_args, q_row), TO_INT64, 24, TERN_E_SHAPE,
     "aggregate: q_row = 24; it must be a multiple of 16, at least cols = 5"},
    {call_aggregate, &good_aggregate_i8, sizeof good_aggregate_i8, offsetof(tern_aggregate_args, q_row), TO_INT64, 0,
     TERN_E_SHAPE, "q_row = 0"},
    {call_aggregate, &good_aggregate_i8, sizeof good_aggregate_i8, offsetof(tern_aggregate_args, scale), TO_NULL, 0, TERN_E_ARGUMENT,
     "scale is NULL"},
    PACKED(scale_grad) NEEDED(scale_grad, w) NEEDED(scale_grad, dw) NEEDED(scale_grad, dalpha) RANGED32(scale_grad, type, TERN_I8)
    WRONG(scale_grad, rule, TO_INT32, TERN_TWN, TERN_E_ARGUMENT, "rule 2 has no learned scale")
    WRONG(scale_grad, rule, TO_INT32, TERN_LSQ, TERN_E_ARGUMENT, "rule lsq learns one scale for the tensor; a grain of -1")
};

static void apply_change(const wrong *w, unsigned char *args)
{
    unsigned char *field = args + w->field;
    const int64_t i64 = w->how == TO_INT64 ? (int64_t)w->value : 0;
    const int32_t i32 = w->how == TO_INT32 ? (int32_t)w->value : 0;
    const float f = (float)w->value;
    unsigned char *p = NULL;
    switch (w->how) {
    case TO_NULL: memcpy(field, &p, sizeof p); break;
    case OFF_BY_ONE:
        memcpy(&p, field, sizeof p);
        p = p ? p + 1 : (unsigned char *)arena + 1; /* optional pointers are absent from some good arguments */
        memcpy(field, &p, sizeof p);
        break;
    case TO_INT64: memcpy(field, &i64, sizeof i64); break;
    case TO_INT32: memcpy(field, &i32, sizeof i32); break;
    case TO_FLOAT: memcpy(field, &f, sizeof f); break;
    }
}

static void test_wrong_arguments(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    static float before[ARENA];
    size_t i;
#define RUN_GOOD(op) make_good(); CHECK_OK(t.c, tern_##op(t.c, &good_##op)); CHECK_OK(t.c, tern_sync(t.c));
    TERN_OPS(RUN_GOOD)
#undef RUN_GOOD
    make_good();
    memcpy(before, arena, sizeof arena);
    for (i = 0; i < sizeof wrongs / sizeof wrongs[0]; i++) {
        const wrong *w = &wrongs[i];
        uint64_t args[64]; /* aligned for every struct */
        if (w->size > sizeof args) abort();
        memcpy(args, w->good, w->size);
        apply_change(w, (unsigned char *)args);
        CHECK_FAILS(t.c, w->call(t.c, args), w->code, w->part);
        CHECK(memcmp(before, arena, sizeof arena) == 0, "\"%s\" wrote something", w->part);
        CHECK_OK(t.c, tern_sync(t.c));
        memcpy(arena, before, sizeof arena);
    }
    test_close(&t);
}

/* Arguments that only a backward pass needs. */
static void test_wrong_backward_arguments(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_attention_args a;
    tern_map_args m;
    float *d;
    make_good();
    d = arena_take(64);
    a = good_attention;
    a.dy = a.dq = a.dk = a.dv = d;
    a.dq = NULL; CHECK_FAILS(t.c, tern_attention(t.c, &a), TERN_E_ARGUMENT, "dq is NULL");
    a.dq = d; a.dk = NULL; CHECK_FAILS(t.c, tern_attention(t.c, &a), TERN_E_ARGUMENT, "dk is NULL");
    a.dk = d; a.dv = NULL; CHECK_FAILS(t.c, tern_attention(t.c, &a), TERN_E_ARGUMENT, "dv is NULL");
    m = good_map;
    m.dy = d;
    m.fn = TERN_MAP_GELU;
    CHECK_FAILS(t.c, tern_map(t.c, &m), TERN_E_ARGUMENT, "da is NULL");
    m.fn = TERN_MAP_MUL;
    m.db = d;
    m.b = NULL;
    CHECK_FAILS(t.c, tern_map(t.c, &m), TERN_E_ARGUMENT, "b is NULL");
    test_close(&t);
}

/* No context is a code; no arguments is a text; a missing operation is an error with its name. */
static void test_missing_operations(void)
{
#define MISSING(op)                                                                            \
    {                                                                                          \
        tern_backend lacking = *tern_cpu_backend(TERN_ISA_SCALAR);                             \
        tern_context_desc d = TERN_ZERO;                                                       \
        tern_context *c;                                                                       \
        lacking.name = "lacking";                                                              \
        lacking.op = NULL;                                                                     \
        d.backend = &lacking;                                                                  \
        CHECK(tern_open(&c, &d, NULL) == TERN_OK, "cannot open");                              \
        make_good();                                                                           \
        CHECK_FAILS(c, tern_##op(c, &good_##op), TERN_E_UNSUPPORTED, "lacking has no operation " #op); \
        CHECK_FAILS(c, tern_##op(c, NULL), TERN_E_ARGUMENT, #op ": args is NULL");             \
        CHECK(tern_##op(NULL, &good_##op) == TERN_E_ARGUMENT, "no context");                   \
        tern_close(c);                                                                         \
    }
    TERN_OPS(MISSING)
#undef MISSING
}

static void suite_backends(void)
{
    RUN(test_odd_products);
    RUN(test_log_scales);
    RUN(test_large_products);
    RUN(test_kind_products);
    RUN_ALONE(test_every_shape);
    RUN(test_many_tokens);
    RUN(test_literal_products);
    RUN(test_dense);
    RUN(test_dense_fused);
    RUN(test_dense_literal);
    RUN(test_dense_i8);
    RUN(test_dense_i8_extremes);
    RUN(test_gather_scatter);
    RUN(test_gather_values);
    RUN(test_norm);
    RUN(test_norm_values);
    RUN(test_norm_faults);
    RUN(test_rope);
    RUN(test_rope_values);
    RUN(test_loss);
    RUN(test_loss_values);
    RUN(test_loss_faults);
    RUN(test_fill_and_cast);
    RUN(test_fill_values);
    RUN(test_cast_refusals);
    RUN(test_map);
    RUN(test_map_values);
    RUN(test_map_limits);
    RUN(test_map_nan);
    RUN(test_sums);
    RUN(test_attention);
    RUN(test_attention_values);
    RUN(test_decoding);
    RUN(test_batch_splits);
    RUN(test_row_splits);
    RUN(test_activation_faults);
    RUN(test_matmul_gradients);
    RUN(test_bf16_products);
    RUN(test_bf16_dense_products);
    RUN(test_norm_gradients);
    RUN(test_attention_gradients);
    RUN(test_large_attention_gradients);
    RUN(test_hadamard);
    RUN(test_hadamard_literal);
    RUN(test_dead_zone);
    RUN(test_wrong_arguments);
    RUN(test_wrong_backward_arguments);
    RUN(test_missing_operations);
}
