/* Room 15, parameters and BitLinear. Mutations that the tests of parameters see: no density or sqrt(2/pi) in the shadow of a given
   tensor, its alpha not set or (SEQ) without 1.5, rho applied to given weights or left out. Of layers, and in 14_backends.c and 21_files.c:
   the rotation left out of the forward, dx, set, rebuild or the file, its inverse in the forward's order; LoRA with
   another sign in forward or merge, without its scale in dlow, without dx, without the permission for factors of bf16; a
   merge that keeps B or writes before it has looked; arenas with another sign, without 1 + eps in dw, without dx; the
   dead zone left out of the bias, with another sign in sum or spread, not computed again, not spread, trained, without
   column sums, kept by give or fold. */

static tern_param param_of(const char *name, int64_t rows, int64_t cols, tern_rule rule, int32_t grain)
{
    tern_param p = TERN_ZERO;
    strcpy(p.name, name);
    p.rows = rows; p.cols = cols;
    p.rule = rule;
    p.grain = grain;
    return p;
}

static void set_random(tern_context *c, tern_param *p)
{
    int64_t i;
    float *w = (float *)malloc((size_t)(p->rows * p->cols) * 4);
    for (i = 0; i < p->rows * p->cols; i++) w[i] = test_float();
    CHECK_OK(c, tern_param_set(c, p, TERN_F32, w));
    free(w);
}

/* -- parameters -- */

static void test_param_buffers(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 17, 50, TERN_ABSMEAN, 20), d = param_of("gain", 1, 50, TERN_DENSE, 0);
    tern_matrix m;
    size_t trits = 0, scales = 0;
    const long before = test_blocks;
    p.buffer[TERN_SHADOW].type = TERN_BF16;
    p.buffer[TERN_SCALES].type = TERN_POW2;
    p.buffer[TERN_TRITS].type = TERN_BASE3;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW));
    m = tern_param_matrix(&p);
    CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trits, &scales));
    CHECK(m.encoding == TERN_BASE3 && m.scale_type == TERN_POW2 && m.rows == 17 && m.cols == 50 && m.grain == 20,
          "the matrix differs from the parameter");
    CHECK(p.buffer[TERN_TRITS].count == trits && p.buffer[TERN_SCALES].count == scales && p.buffer[TERN_SHADOW].count == 850
          && p.buffer[TERN_GRAD].count == 850, "counts");
    CHECK(p.buffer[TERN_SHADOW].type == TERN_BF16 && p.buffer[TERN_MOMENT2].type == TERN_F32, "types");
    CHECK(test_blocks == before + 6, "%ld allocations for 6 buffers", test_blocks - before);
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW));
    CHECK(test_blocks == before + 6, "what is there is not allocated again");
    tern_param_free(t.c, &p, TERN_FOR_TRAINING);
    CHECK(test_blocks == before + 2 && p.buffer[TERN_TRITS].data && p.buffer[TERN_SCALES].data && !p.buffer[TERN_SHADOW].data,
          "frozen is trits and scales");
    tern_param_free(t.c, &p, -1);
    CHECK_OK(t.c, tern_param_alloc(t.c, &d, TERN_FOR_ADAMW));
    CHECK(test_blocks == before + 4 && !d.buffer[TERN_TRITS].data && !d.buffer[TERN_SCALES].data, "a dense parameter has no trits");
    tern_param_free(t.c, &d, TERN_FOR_TRAINING);
    CHECK(test_blocks == before + 1 && d.buffer[TERN_SHADOW].data, "frozen dense values stay");
    tern_param_free(t.c, &d, -1);
    CHECK(test_blocks == before, "%ld left", test_blocks - before);
    test_close(&t);
}

/* Each allocation failed in turn: an error with the bytes, and nothing kept of what came before it. */
static void test_param_out_of_memory(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i;
    for (i = 0; i < 6; i++) {
        tern_param p = param_of("w", 3, 5, TERN_ABSMEAN, TERN_PER_ROW);
        const long before = test_blocks;
        int b;
        test_fail_at = test_allocations + i;
        CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW), TERN_E_MEMORY, "w: no memory for ");
        test_fail_at = -1;
        CHECK(test_blocks == before, "allocation %d: %ld kept", i, test_blocks - before);
        for (b = 0; b < TERN_BUFFERS; b++) CHECK(!p.buffer[b].data && !p.buffer[b].owned, "allocation %d: buffer %d stayed", i, b);
    }
    test_close(&t);
}

static void test_param_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 3, 5, TERN_ABSMEAN, TERN_PER_ROW), bad;
    tern_param gain = param_of("gain", 1, 5, TERN_DENSE, 0);
    const float w[15] = {1.0f};
    const int8_t trits[15] = {1};
    const float scales[3] = {1.0f, 1.0f, 1.0f};
    int8_t row[5];
    tern_stats stats;
    tern_verdict verdict;
    tern_audit audit;
    tern_model m = TERN_ZERO;
    CHECK(tern_param_alloc(NULL, &p, 1) == TERN_E_ARGUMENT && tern_param_set(NULL, &p, TERN_F32, w) == TERN_E_ARGUMENT, "no context");
    CHECK_FAILS(t.c, tern_param_alloc(t.c, NULL, 1), TERN_E_ARGUMENT, "a parameter is NULL");
    bad = p; memset(bad.name, 'x', sizeof bad.name);
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "name is not terminated");
    bad = p; bad.rule = (tern_rule)9; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "w: rule 9");
    bad = p; bad.rows = 0; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_SHAPE, "w: matrix is 0 x 5");
    bad = p; bad.cols = 300000; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_SHAPE, "w: K = 300000 exceeds 262144");
    bad = p; bad.rows = INT64_MAX / 2; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_OVERFLOW, "overflows");
    bad = p; bad.grain = -3; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "grain -3");
    bad = gain; bad.cols = 0; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_SHAPE, "gain: 1 x 0");
    bad = gain; bad.rows = INT64_MAX / 2; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_OVERFLOW, "overflows");
    bad = gain; bad.buffer[TERN_SHADOW].type = TERN_BF16;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "gain: a dense parameter is TERN_F32");
    bad = p; bad.buffer[TERN_TRITS].type = TERN_I8; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "w: trits of type 4");
    bad = p; bad.buffer[TERN_SCALES].type = TERN_BF16;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "w: scales of type 2");
    bad = p; bad.buffer[TERN_SHADOW].type = TERN_F16;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "w: shadow of type 3");
    bad = p; bad.buffer[TERN_GRAD].type = TERN_BF16;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, 1), TERN_E_ARGUMENT, "w: gradient of type 2");
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_MISSING, "w has no trits");
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, 1 << TERN_TRITS));
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_MISSING, "w has no scales");
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, NULL), TERN_E_MISSING, "w has no shadow");
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_I8, w), TERN_E_ARGUMENT, "type 4");
    CHECK_FAILS(t.c, tern_param_stats(t.c, &p, 0.1f, &stats), TERN_E_MISSING, "w has no shadow");
    CHECK_FAILS(t.c, tern_param_stats(t.c, &p, -0.1f, &stats), TERN_E_ARGUMENT, "band");
    CHECK_FAILS(t.c, tern_param_stats(t.c, &p, 0.1f, NULL), TERN_E_ARGUMENT, "out");
    CHECK_FAILS(t.c, tern_param_verify(t.c, &p, NULL, &verdict), TERN_E_ARGUMENT, "values");
    CHECK_FAILS(t.c, tern_param_verify(t.c, &p, w, NULL), TERN_E_ARGUMENT, "out");
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, NULL, scales), TERN_E_ARGUMENT, "trits or scales");
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, NULL), TERN_E_ARGUMENT, "trits or scales");
    CHECK_FAILS(t.c, tern_param_get(t.c, &p, 3, row, NULL, NULL), TERN_E_SHAPE, "w: row 3 of 3");
    CHECK_FAILS(t.c, tern_param_get(t.c, &p, -1, row, NULL, NULL), TERN_E_SHAPE, "w: row -1 of 3");
    CHECK_OK(t.c, tern_param_alloc(t.c, &gain, 1 << TERN_SHADOW));
    CHECK_FAILS(t.c, tern_param_give(t.c, &gain, trits, scales), TERN_E_ARGUMENT, "gain is dense");
    CHECK_FAILS(t.c, tern_param_get(t.c, &gain, 0, row, NULL, NULL), TERN_E_ARGUMENT, "gain is dense");
    CHECK_FAILS(t.c, tern_param_stats(t.c, &gain, 0.1f, &stats), TERN_E_ARGUMENT, "gain is dense");
    CHECK_FAILS(t.c, tern_param_verify(t.c, &gain, w, &verdict), TERN_E_ARGUMENT, "gain is dense");
    CHECK_FAILS(t.c, tern_model_audit(t.c, &m, &audit), TERN_E_ARGUMENT, "no parameters");
    tern_param_free(t.c, &p, -1);
    tern_param_free(t.c, &gain, -1);
    test_close(&t);
}

/* Memory lent by the caller is used where it is, checked for its size and alignment, and never freed. */
static void test_param_borrowed(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 16, 16, TERN_ABSMEAN, TERN_PER_ROW);
    unsigned char trits[64];
    float scales[17], shadow[256];
    const float *w = test_floats(256);
    p.buffer[TERN_TRITS].data = trits;
    p.buffer[TERN_TRITS].count = 63;
    p.buffer[TERN_SCALES].data = scales;
    p.buffer[TERN_SCALES].count = 16;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_SHAPE, "w: its trits has 63 elements of 64");
    p.buffer[TERN_TRITS].count = 64;
    p.buffer[TERN_SCALES].count = 15;
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_SHAPE, "w: its scales has 15 elements of 16");
    p.buffer[TERN_SCALES].count = 16;
    p.buffer[TERN_SCALES].data = (char *)scales + 1;
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_ALIGNMENT, "scales");
    p.buffer[TERN_SCALES].data = scales;
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, w));
    p.buffer[TERN_SHADOW].data = shadow;
    p.buffer[TERN_SHADOW].count = 255;
    memset(trits, 0, sizeof trits);
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_SHAPE, "w: its shadow has 255 elements of 256");
    CHECK(trits[0] == 0 && memcmp(trits, trits + 1, sizeof trits - 1) == 0, "trits were written beside a shadow that is too small");
    p.buffer[TERN_SHADOW].count = 256;
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, w));
    CHECK(memcmp(shadow, w, sizeof shadow) == 0, "the shadow is the weights");
    tern_param_free(t.c, &p, -1);
    CHECK(!p.buffer[TERN_TRITS].data && !p.buffer[TERN_SHADOW].data, "detached");
    free((void *)(uintptr_t)w);
    test_close(&t);
}

/* set: the same trits from any route; non-finite weights change nothing. */
static void test_param_set(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 20, 33, TERN_ABSMEAN, 10), frozen = p;
    float *w = test_floats(20 * 33);
    int8_t trits[33], other[33], before[33];
    float scales[4], other_scales[4], values[33];
    uint16_t bf16[20 * 33];
    tern_cast_args cast = TERN_ZERO;
    int64_t r;
    p.buffer[TERN_SHADOW].type = TERN_BF16;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
    CHECK_OK(t.c, tern_param_alloc(t.c, &frozen, TERN_FOR_INFERENCE));
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, w));
    cast.count = 20 * 33;
    cast.to = TERN_BF16;
    cast.src = w;
    cast.dst = bf16;
    CHECK_OK(t.c, tern_cast(t.c, &cast));
    CHECK(memcmp(bf16, p.buffer[TERN_SHADOW].data, sizeof bf16) == 0, "the shadow is the rounded weights");
    CHECK_OK(t.c, tern_param_set(t.c, &frozen, TERN_BF16, bf16));
    for (r = 0; r < 20; r++) { /* trits of a BF16 shadow are those of its own values */
        CHECK_OK(t.c, tern_param_get(t.c, &p, r, trits, scales, values));
        CHECK_OK(t.c, tern_param_get(t.c, &frozen, r, other, other_scales, NULL));
        CHECK(memcmp(trits, other, 33) == 0 && memcmp(scales, other_scales, sizeof scales) == 0, "row %d differs", (int)r);
        CHECK(values[0] == (float)trits[0] * scales[0] && values[32] == (float)trits[32] * scales[3], "values are trits times scales");
    }
    CHECK_OK(t.c, tern_param_get(t.c, &p, 7, before, NULL, NULL));
    memset(w, 0, 20 * 33 * 4);
    w[5 * 33 + 2] = NAN;
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_NONFINITE, "weights[5][2]");
    CHECK_OK(t.c, tern_param_get(t.c, &p, 7, trits, NULL, NULL));
    CHECK(memcmp(before, trits, 33) == 0 && memcmp(bf16, p.buffer[TERN_SHADOW].data, sizeof bf16) == 0, "a refused set changed something");
    memset(p.buffer[TERN_SHADOW].data, 0, sizeof bf16);
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_TYPE_DEFAULT, NULL)); /* from the shadow as it stands */
    CHECK_OK(t.c, tern_param_get(t.c, &p, 7, trits, scales, NULL));
    for (r = 0; r < 33; r++) CHECK(trits[r] == 0 && scales[r / 10] == 0.0f, "an all-zero group has scale 0");
    free(w);
    tern_param_free(t.c, &p, -1);
    tern_param_free(t.c, &frozen, -1);
    test_close(&t);
}

static void test_param_dense(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("bias", 2, 3, TERN_DENSE, 0);
    float w[6] = {1, 2, 3, 4, 5, 6}, row[3];
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_MISSING, "bias has no shadow");
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, w));
    CHECK_OK(t.c, tern_param_get(t.c, &p, 1, NULL, NULL, row));
    CHECK(memcmp(row, w + 3, sizeof row) == 0, "row 1 differs");
    w[4] = INFINITY;
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_NONFINITE, "element 4");
    CHECK_OK(t.c, tern_param_get(t.c, &p, 1, NULL, NULL, row));
    CHECK(row[1] == 5.0f, "a refused set wrote %g", row[1]);
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* give and get are inverse for every encoding, grain and scale type; a shadow becomes the product. */
static void test_param_give(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int g, variant;
    for (g = 0; g < 5; g++)
        for (variant = 0; variant < 16; variant++) {
            const int64_t rows = 35, cols = 43, groups = every_grain[g] > 0 ? (cols + every_grain[g] - 1) / every_grain[g] : 1;
            tern_param p = param_of("w", rows, cols, TERN_GIVEN, every_grain[g]);
            int8_t trits[35 * 43], row[43];
            float scales[35 * 43], row_scales[43], values[43], shadow[43];
            int64_t i, r;
            p.buffer[TERN_TRITS].type = variant & 1 ? TERN_BASE3 : TERN_2BIT;
            p.buffer[TERN_SCALES].type = every_scale_type[variant / 2 % 4];
            p.buffer[TERN_SHADOW].type = variant & 8 ? TERN_BF16 : TERN_F32;
            CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
            for (i = 0; i < rows * cols; i++) trits[i] = test_trit();
            for (i = 0; i < rows * groups; i++) scales[i] = (float)(1 << (i % 4)) * 0.125f;
            CHECK_OK(t.c, tern_param_give(t.c, &p, trits, scales));
            for (r = 0; r < rows; r++) {
                tern_cast_args cast = TERN_ZERO;
                CHECK_OK(t.c, tern_param_get(t.c, &p, r, row, row_scales, values));
                CHECK(memcmp(row, trits + r * cols, (size_t)cols) == 0, "trits of row %d", (int)r);
                CHECK(memcmp(row_scales, every_grain[g] == TERN_PER_TENSOR ? scales : scales + r * groups, (size_t)groups * 4) == 0,
                      "scales of row %d", (int)r);
                cast.count = cols;
                cast.from = p.buffer[TERN_SHADOW].type;
                cast.to = TERN_F32;
                cast.src = (char *)p.buffer[TERN_SHADOW].data + r * cols * (variant & 8 ? 2 : 4);
                cast.dst = shadow;
                CHECK_OK(t.c, tern_cast(t.c, &cast));
                for (i = 0; i < cols; i++)
                    CHECK(shadow[i] == values[i], "shadow[%d][%d] is %g, not %g", (int)r, (int)i, shadow[i], values[i]);
            }
            tern_param_free(t.c, &p, -1);
        }
    test_close(&t);
}

static void test_param_give_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 3, 5, TERN_GIVEN, TERN_PER_ROW);
    int8_t trits[15] = {0}, row[5];
    float scales[3] = {1.0f, 0.5f, 0.0f}, row_scale[1];
    int i;
    p.buffer[TERN_SCALES].type = TERN_POW2;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    trits[7] = 1;
    CHECK_OK(t.c, tern_param_give(t.c, &p, trits, scales));
    trits[7] = -1;
    trits[13] = 2;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_TRIT, "trits[2][3] is 2");
    trits[13] = 0;
    scales[1] = -1.0f;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_NONFINITE, "scales[1]");
    scales[1] = NAN;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_NONFINITE, "scales[1]");
    scales[1] = 0.75f;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_ARGUMENT, "scales[1] is not a power of two");
    scales[1] = 2.0f;
    for (i = 0; i < 2; i++) {
        test_fail_at = test_allocations + i;
        CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_MEMORY, "w: no memory");
        test_fail_at = test_allocations;
        CHECK_FAILS(t.c, tern_param_get(t.c, &p, 0, row, NULL, NULL), TERN_E_MEMORY, "w: no memory");
        test_fail_at = -1;
    }
    CHECK_OK(t.c, tern_param_get(t.c, &p, 1, row, row_scale, NULL));
    CHECK(row[2] == 1 && row_scale[0] == 0.5f, "a refused give changed row 1: %d, %g", row[2], row_scale[0]);
    tern_param_free(t.c, &p, -1);
    p.buffer[TERN_SCALES].type = TERN_F16;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    scales[1] = 65504.0f;
    CHECK_OK(t.c, tern_param_give(t.c, &p, trits, scales));
    scales[1] = 65536.0f;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_ARGUMENT, "scales[1] is not an f16");
    scales[1] = 1.0002f;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_ARGUMENT, "scales[1] is not an f16");
    tern_param_free(t.c, &p, -1);
    p.buffer[TERN_SCALES].type = TERN_LOG;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    scales[1] = 99.77582f;
    CHECK_FAILS(t.c, tern_param_give(t.c, &p, trits, scales), TERN_E_ARGUMENT, "scales[1] is not on the log lattice");
    scales[1] = tern__from_log(1700);
    CHECK_OK(t.c, tern_param_give(t.c, &p, trits, scales));
    CHECK(((int16_t *)p.buffer[TERN_SCALES].data)[1] == 1700, "L of 99.776 is %d", ((int16_t *)p.buffer[TERN_SCALES].data)[1]);
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* stats against counting by hand; the boundary is the rule's own threshold. */
static void test_param_stats(void)
{
    static const tern_rule rules[] = {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i, g;
    for (i = 0; i < 3; i++)
        for (g = 0; g < 5; g++) {
            const int64_t rows = 18, cols = 77, group = every_grain[g] > 0 ? every_grain[g] : cols;
            const float band = 0.06f;
            tern_param p = param_of("w", rows, cols, rules[i], every_grain[g]);
            const float *w;
            tern_stats s = TERN_ZERO;
            int8_t trits[77];
            float scales[77];
            double alpha = 0, neg = 0, pos = 0, boundary = 0, inner = 0, all = (double)(rows * cols), whole = 0;
            int64_t r, j, k, groups = 0;
            CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
            set_random(t.c, &p);
            w = (const float *)p.buffer[TERN_SHADOW].data;
            CHECK_OK(t.c, tern_param_stats(t.c, &p, band, &s));
            for (j = 0; j < rows * cols; j++) whole += fabs(w[j]) / all;
            for (r = 0; r < rows; r++) {
                CHECK_OK(t.c, tern_param_get(t.c, &p, r, trits, scales, NULL));
                for (j = 0; j < cols; j += group) {
                    const int64_t end = j + group < cols ? j + group : cols;
                    const double scale = scales[j / group];
                    double mean = 0, threshold;
                    for (k = j; k < end; k++) mean += fabs(w[r * cols + k]) / (double)(end - j);
                    threshold = rules[i] != TERN_TWN ? 0.5 : 0.7 * (every_grain[g] == TERN_PER_TENSOR ? whole : mean) / scale;
                    alpha += scale;
                    groups++;
                    for (k = j; k < end; k++) {
                        const double x = fabs(w[r * cols + k]) / scale;
                        neg += trits[k] < 0;
                        pos += trits[k] > 0;
                        boundary += fabs(x - threshold) < band;
                        inner += x > 0 && x < threshold - band;
                    }
                }
            }
            CHECK(fabs(s.alpha - alpha / (double)groups) < 1e-6, "alpha %g, not %g", s.alpha, alpha / (double)groups);
            CHECK(fabs(s.frac_neg * all - neg) < 0.01 && fabs(s.frac_pos * all - pos) < 0.01
                  && fabs(s.frac_zero * all - (all - neg - pos)) < 0.01, "signs");
            /* One may lie on the edge. */
            CHECK(fabs(s.frac_boundary * all - boundary) < 1.01, "boundary %g, not %g", s.frac_boundary * all, boundary);
            CHECK(fabs(s.frac_zero_inner * all - inner) < 1.01, "inner %g, not %g", s.frac_zero_inner * all, inner);
            tern_param_free(t.c, &p, -1);
        }
    test_close(&t);
}

static void test_param_verify(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 19, 45, TERN_ABSMEAN, 16); /* padded in both directions */
    float values[19 * 45];
    tern_verdict v = TERN_ZERO;
    int64_t r;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_INFERENCE));
    set_random(t.c, &p);
    for (r = 0; r < 19; r++) CHECK_OK(t.c, tern_param_get(t.c, &p, r, NULL, NULL, values + r * 45));
    CHECK_OK(t.c, tern_param_verify(t.c, &p, values, &v));
    CHECK(v.wrong == 0 && v.first_wrong == -1 && v.max_error == 0.0f, "%d wrong", (int)v.wrong);
    values[300] += 0.25f;
    values[800] -= 0.125f;
    CHECK_OK(t.c, tern_param_verify(t.c, &p, values, &v));
    CHECK(v.wrong == 2 && v.first_wrong == 300 && fabs(v.max_error - 0.25) < 1e-6,
          "%d wrong, first %d, %g", (int)v.wrong, (int)v.first_wrong, v.max_error);
    values[0] = NAN;
    CHECK_OK(t.c, tern_param_verify(t.c, &p, values, &v));
    CHECK(v.wrong == 3 && v.first_wrong == 0 && v.max_error != v.max_error, "a NaN stays");
    test_fail_at = test_allocations;
    CHECK_FAILS(t.c, tern_param_verify(t.c, &p, values, &v), TERN_E_MEMORY, "w: no memory for a row");
    test_fail_at = -1;
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* A table whose copies are counted. */
static long chunk_copies;
static tern_result chunk_copy(tern_run *r, void *dst, const void *src, size_t bytes, tern_direction direction)
{
    chunk_copies++;
    return tern_cpu_backend(TERN_ISA_BEST)->copy(r, dst, src, bytes, direction);
}

static tern_context *chunk_open(tern_backend *table)
{
    tern_context_desc d = TERN_ZERO;
    tern_context *c;
    *table = *tern_cpu_backend(TERN_ISA_BEST);
    table->copy = chunk_copy;
    d.backend = table;
    d.allocator.alloc = test_malloc;
    d.allocator.free = test_free;
    return tern_open(&c, &d, NULL) == TERN_OK ? c : NULL;
}

/* A parameter whose rows cross in three chunks: panels of 16, 16 and 3 rows. */
enum { CHUNK_ROWS = 35, CHUNK_COLS = TERN__TRANSFER / 32 + 1 };

static void chunk_give(tern_context *c, tern_param *p, int8_t *trits, float *values)
{
    const int64_t group = p->grain > 0 ? p->grain : CHUNK_COLS, groups = (CHUNK_COLS + group - 1) / group;
    float *scales = (float *)malloc((size_t)(CHUNK_ROWS * groups) * sizeof(float));
    int64_t i;
    for (i = 0; i < CHUNK_ROWS * groups; i++) scales[i] = i % 5 ? (float)(1 << i % 7) : 0.0f;
    for (i = 0; i < CHUNK_ROWS * CHUNK_COLS; i++) {
        trits[i] = (int8_t)(test_random() % 3) - 1;
        values[i] = (float)trits[i] * scales[p->grain == TERN_PER_TENSOR ? 0 : i / CHUNK_COLS * groups + i % CHUNK_COLS / group];
    }
    CHECK_OK(c, tern_param_give(c, p, trits, scales));
    free(scales);
}

/* Chunks meet without a seam, and few copies bring them. */
static void test_param_chunks(void)
{
    static const int32_t grains[] = {TERN_PER_TENSOR, 1000};
    static const int64_t rows[] = {0, 15, 16, 31, 32, 34};
    tern_backend table;
    tern_context *c = chunk_open(&table);
    int8_t *trits = (int8_t *)malloc(CHUNK_ROWS * CHUNK_COLS), *row = (int8_t *)malloc(CHUNK_COLS);
    float *values = (float *)malloc(CHUNK_ROWS * CHUNK_COLS * sizeof(float)), *read = (float *)malloc(CHUNK_COLS * sizeof(float));
    int g;
    for (g = 0; g < 2; g++) {
        tern_param p = param_of("w", CHUNK_ROWS, CHUNK_COLS, TERN_GIVEN, grains[g]);
        tern_verdict v = TERN_ZERO;
        tern_stats s = TERN_ZERO;
        int64_t i, neg = 0;
        p.buffer[TERN_SCALES].type = TERN_POW2;
        p.buffer[TERN_SHADOW].type = TERN_BF16;
        CHECK_OK(c, tern_param_alloc(c, &p, TERN_FOR_GRADIENT));
        chunk_copies = 0;
        chunk_give(c, &p, trits, values);
        CHECK(chunk_copies == 4, "%ld copies for 3 chunks and scales", chunk_copies); /* with a shadow, of 4 bytes per weight */
        for (i = 0; i < 6; i++) {
            CHECK_OK(c, tern_param_get(c, &p, rows[i], row, NULL, read));
            CHECK(memcmp(row, trits + rows[i] * CHUNK_COLS, CHUNK_COLS) == 0, "trits of row %d", (int)rows[i]);
            CHECK(memcmp(read, values + rows[i] * CHUNK_COLS, CHUNK_COLS * sizeof(float)) == 0, "values of row %d", (int)rows[i]);
        }
        for (i = 0; i < CHUNK_ROWS * CHUNK_COLS; i++) {
            CHECK(tern__from_bf16(((const uint16_t *)p.buffer[TERN_SHADOW].data)[i]) == values[i], "shadow %d", (int)i);
            neg += trits[i] < 0;
        }
        chunk_copies = 0;
        CHECK_OK(c, tern_param_verify(c, &p, values, &v));
        CHECK(chunk_copies == 6 && v.wrong == 0, "%ld copies, %d wrong", chunk_copies, (int)v.wrong);
        CHECK_OK(c, tern_param_stats(c, &p, 0.1f, &s));
        CHECK(chunk_copies == 15 && s.frac_neg == (float)neg / (float)(CHUNK_ROWS * CHUNK_COLS),
              "%ld copies, %g negative", chunk_copies, s.frac_neg);
        for (i = 0; i < 6; i++) values[rows[i] * CHUNK_COLS + i] += 1.0f;
        CHECK_OK(c, tern_param_verify(c, &p, values, &v));
        CHECK(v.wrong == 6 && v.first_wrong == 0, "%d wrong, the first %d", (int)v.wrong, (int)v.first_wrong);
        tern_param_free(c, &p, -1);
    }
    free(trits);
    free(row);
    free(values);
    free(read);
    tern_close(c);
}

static void test_model_audit(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param w = param_of("w", 32, 64, TERN_ABSMEAN, TERN_PER_ROW), b = param_of("b", 1, 32, TERN_DENSE, 0);
    tern_param *items[2];
    tern_model m = TERN_ZERO;
    tern_audit a;
    items[0] = &w;
    items[1] = &b;
    m.items = items;
    m.count = 2;
    w.buffer[TERN_SHADOW].type = TERN_BF16;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_ADAMW));
    CHECK_OK(t.c, tern_param_alloc(t.c, &b, TERN_FOR_GRADIENT));
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    CHECK(a.weights == 2048 + 32 && a.ternary == 2048, "%d weights", (int)a.weights);
    CHECK(a.bytes[TERN_TRITS] == 512 && a.bytes[TERN_SCALES] == 128 && a.bytes[TERN_SHADOW] == 2 * 2048 + 4 * 32, "bytes");
    CHECK(a.bytes[TERN_GRAD] == 4 * 2080 && a.bytes[TERN_MOMENT1] == 4 * 2048 && a.bytes[TERN_MOMENT2] == 4 * 2048, "bytes of training");
    CHECK(a.packed_bytes == 512 + 128 + 4 * 32, "%d packed", (int)a.packed_bytes);
    tern_param_free(t.c, &w, TERN_FOR_TRAINING);
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    CHECK(a.bytes[TERN_SHADOW] == 4 * 32 && a.bytes[TERN_MOMENT1] == 0, "frozen");
    CHECK_FAILS(t.c, tern_model_audit(t.c, &m, NULL), TERN_E_ARGUMENT, "out is NULL");
    tern_param_free(t.c, &w, -1);
    tern_param_free(t.c, &b, -1);
    test_close(&t);
}

/* -- BitLinear -- */

typedef struct layer { tern_param w, bias, gain, dead, lora_a, lora_b; tern_linear l; tern_need need; } layer;

enum { WITH_NORM = 1, WITH_BIAS = 2, WITH_FLOATS = 4, WITH_DENSE = 8, WITH_INT4 = 16, WITH_BITS = 20, VARIANTS = 24,
       WITH_ROTATE = 32, WITH_LORA = 64, WITH_DEAD = 128, WITH_ARENAS = 256, WITH_BF16 = 512, OPTIONS = 1024 };

/* With WITH_INT4, WITH_FLOATS tells bits from int4. Bits take no norm. */
static tern_act act_of(int variant)
{
    if (variant & WITH_INT4) return variant & WITH_FLOATS ? TERN_ACT_BIT : TERN_ACT_INT4;
    return variant & WITH_FLOATS ? TERN_ACT_FLOAT : TERN_ACT_INT8;
}
static float *layer_input(int64_t n, int variant) { return act_of(variant) == TERN_ACT_BIT ? hold_sparse(n, 3) : hold_floats(n); }

/* Whether a layer can have all these; for loops over OPTIONS. The other kinds of activations are int8's with another quantizer. */
static int layer_makes_sense(int variant)
{
    if (variant >= WITH_ROTATE && variant & WITH_INT4) return 0;
    if (variant % WITH_ROTATE >= VARIANTS) return 0;
    return !(variant & WITH_DENSE) || !(variant & (WITH_ROTATE | WITH_DEAD | WITH_ARENAS | WITH_BF16));
}

static void layer_open(tern_context *c, layer *o, int64_t rows, int64_t cols, int32_t grain, int variant, int64_t n)
{
    memset(o, 0, sizeof *o);
    o->w = param_of("w", rows, cols, variant & WITH_DENSE ? TERN_DENSE : TERN_ABSMEAN, grain);
    o->bias = param_of("bias", 1, rows, TERN_DENSE, 0);
    o->gain = param_of("gain", 1, cols, TERN_DENSE, 0);
    o->dead = param_of("dead", 1, rows, TERN_DENSE, 0);
    o->lora_a = param_of("lora_a", 3, cols, TERN_DENSE, 0);
    o->lora_b = param_of("lora_b", rows, 3, TERN_DENSE, 0);
    if (grain > 0) o->w.buffer[TERN_TRITS].type = TERN_BASE3;
    if (variant & WITH_BF16) o->w.buffer[TERN_SHADOW].type = TERN_BF16;
    if (variant & WITH_ROTATE) o->w.rotate = 11;
    if (variant & WITH_DEAD) { o->w.dead = &o->dead; o->w.lambda = 0.25f; }
    CHECK_OK(c, tern_param_alloc(c, &o->w, TERN_FOR_ADAMW));
    CHECK_OK(c, tern_param_alloc(c, &o->dead, TERN_FOR_GRADIENT));
    CHECK_OK(c, tern_param_alloc(c, &o->lora_a, TERN_FOR_ADAMW));
    CHECK_OK(c, tern_param_alloc(c, &o->lora_b, TERN_FOR_ADAMW));
    CHECK_OK(c, tern_param_alloc(c, &o->bias, TERN_FOR_ADAMW));
    CHECK_OK(c, tern_param_alloc(c, &o->gain, TERN_FOR_ADAMW));
    set_random(c, &o->w);
    set_random(c, &o->bias);
    set_random(c, &o->gain);
    if (variant & WITH_LORA) {
        set_random(c, &o->lora_a);
        set_random(c, &o->lora_b);
        o->l.lora_a = &o->lora_a;
        o->l.lora_b = &o->lora_b;
        o->l.lora_scale = 0.5f;
    }
    if (variant & WITH_ARENAS) o->l.arenas = 0.125f;
    o->l.w = &o->w;
    o->l.act = act_of(variant);
    if (variant & WITH_BIAS) o->l.bias = &o->bias;
    if (variant & WITH_NORM && o->l.act != TERN_ACT_BIT) { o->l.norm = TERN_NORM_RMS; o->l.gain = &o->gain; }
    CHECK_OK(c, tern_linear_need(c, &o->l, n, &o->need));
    CHECK_OK(c, tern_reserve(c, o->need.scratch));
}

static void layer_close(tern_context *c, layer *o)
{
    tern_param_free(c, &o->w, -1);
    tern_param_free(c, &o->bias, -1);
    tern_param_free(c, &o->gain, -1);
    tern_param_free(c, &o->dead, -1);
    tern_param_free(c, &o->lora_a, -1);
    tern_param_free(c, &o->lora_b, -1);
}

static float *grad_of(tern_param *p) { return (float *)p->buffer[TERN_GRAD].data; }

/* The forward written out in operations; returns the float activations where the layer uses them. */
static const float *composed_forward(tern_context *c, layer *o, int64_t n, const float *x, float *y)
{
    const float *bias = o->l.bias ? (const float *)o->bias.buffer[TERN_SHADOW].data : NULL;
    const float *gain = o->l.gain ? (const float *)o->gain.buffer[TERN_SHADOW].data : NULL;
    const tern_matrix m = tern_param_matrix(&o->w);
    tern_matmul_args a;
    if (o->l.act != TERN_ACT_FLOAT && o->w.rule != TERN_DENSE) {
        const tern_quantize_args q = hold_activations(c, o->l.act, &m, n, x, o->l.norm, gain);
        a = matmul_of(&q, bias, y);
        CHECK_OK(c, tern_matmul(c, &a));
        return NULL;
    }
    if (o->l.norm == TERN_NORM_RMS) {
        tern_norm_args norm = TERN_ZERO;
        norm.n = n; norm.cols = o->w.cols;
        norm.x = x;
        norm.gain = gain;
        norm.eps = 1e-6f;
        x = norm.y = hold_output(n * o->w.cols);
        CHECK_OK(c, tern_norm(c, &norm));
    }
    if (o->w.rule == TERN_DENSE) {
        tern_dense_args d = TERN_ZERO;
        d.m = n; d.n = o->w.rows; d.k = o->w.cols;
        d.a = x; d.a_row = d.k; d.a_col = 1;
        d.b = (const float *)o->w.buffer[TERN_SHADOW].data; d.b_row = 1; d.b_col = d.k;
        d.bias = bias;
        d.c = y; d.c_row = d.n;
        CHECK_OK(c, tern_dense(c, &d));
    } else {
        a = float_matmul_of(&m, n, x, bias, y);
        CHECK_OK(c, tern_matmul(c, &a));
    }
    return x;
}

/* A layer is its operations; training forward, inference forward and the frozen layer are one function. */
static void linear_forwards(tern_context *c, record *r)
{
    int variant;
    for (variant = 0; variant < VARIANTS; variant++) {
        const int64_t n = 1 + 6 * (variant % 3), rows = 33, cols = 70;
        const size_t bytes = (size_t)(n * rows) * 4;
        float *y = hold_output(n * rows), *other = hold_output(n * rows);
        const float *x = layer_input(n * cols, variant);
        layer o;
        layer_open(c, &o, rows, cols, variant & 1 ? 20 : TERN_PER_ROW, variant, n);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, y, hold(o.need.saved + 1)));
        composed_forward(c, &o, n, x, other);
        CHECK(memcmp(y, other, bytes) == 0, "variant %d is not its operations", variant);
        memset(other, 0, bytes);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, other, NULL));
        CHECK(memcmp(y, other, bytes) == 0, "variant %d: inference differs from training", variant);
        memset(other, 0, bytes);
        tern_param_free(c, &o.w, TERN_FOR_TRAINING);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, other, NULL));
        CHECK(memcmp(y, other, bytes) == 0, "variant %d: the frozen layer differs", variant);
        record_words(r, y, n * rows);
        layer_close(c, &o);
        release();
    }
}
/* The fused operation, a backend without it, and the operations it stands for; one token in the middle is NaN. */
static void linear_fusions(tern_context *c, record *r)
{
    const int64_t tokens[] = {1, 2, 31, 32, 63, 64, 65, 97, 130, 200};
    const tern_backend *whole = c->run.backend;
    tern_backend lacking = *whole;
    int i;
    lacking.linear = NULL;
    for (i = 0; i < 30; i++) {
        const int64_t n = tokens[i % 10], rows = i & 1 ? 33 : 5, cols = 70;
        const size_t bytes = (size_t)(n * rows) * 4;
        float *y = hold_output(n * rows), *other = hold_output(n * rows), *x = hold_floats(n * cols);
        char text[2][sizeof c->run.fault.text];
        layer o;
        layer_open(c, &o, rows, cols, i & 2 ? 20 : TERN_PER_ROW,
                   (i & (WITH_NORM | WITH_BIAS)) + (i < 10 ? 0 : i < 20 ? WITH_INT4 : WITH_BITS), n);
        x[n / 2 * cols + 3] = NAN;
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, y, NULL));
        CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "not finite");
        memcpy(text[0], tern_last_error(c)->text, sizeof text[0]);
        c->run.backend = &lacking;
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, other, NULL));
        CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "not finite");
        memcpy(text[1], tern_last_error(c)->text, sizeof text[1]);
        c->run.backend = whole;
        CHECK(memcmp(y, other, bytes) == 0, "%d tokens: without the fused operation the layer differs", (int)n);
        CHECK(strcmp(text[0], text[1]) == 0, "%d tokens: \"%s\" and \"%s\"", (int)n, text[0], text[1]);
        memset(other, 0, bytes);
        composed_forward(c, &o, n, x, other);
        CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "not finite");
        CHECK(memcmp(y, other, bytes) == 0, "%d tokens: the layer is not its operations", (int)n);
        record_words(r, y, n * rows);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_fused(void) { same_everywhere(linear_fusions, UINT64_C(0x8CA556BD8BC039C6)); }

static void test_linear_forward(void) { same_everywhere(linear_forwards, UINT64_C(0x74D5E3766C93A1B1)); }

/* <dy, y> in float64 with the quantizers as identity and the packed weights fixed. */
static double linear_literal(const layer *o, const double *w, int64_t n, const double *x, const double *gain, const double *bias,
                             const float *dy)
{
    const int64_t rows = o->w.rows, cols = o->w.cols;
    double total = 0.0;
    int64_t t, r, k;
    for (t = 0; t < n; t++) {
        double squares = 0.0, norm = 1.0;
        for (k = 0; k < cols; k++) squares += x[t * cols + k] * x[t * cols + k];
        if (o->l.norm == TERN_NORM_RMS) norm = 1.0 / sqrt(squares / (double)cols + 1e-6);
        for (r = 0; r < rows; r++) {
            double y = o->l.bias ? bias[r] : 0.0;
            for (k = 0; k < cols; k++) y += w[r * cols + k] * x[t * cols + k] * norm * (o->l.gain ? gain[k] : 1.0);
            total += dy[t * rows + r] * y;
        }
    }
    return total;
}

static void linear_backwards(tern_context *c, record *r)
{
    const int64_t n = 3, rows = 5, cols = 21;
    const double h = 1e-4;
    int variant;
    for (variant = 0; variant < VARIANTS; variant++) {
        const float *x = layer_input(n * cols, variant), *dy = hold_floats(n * rows), *used;
        float *y = hold_output(n * rows), *dx = hold_output(n * cols), *values = hold_output(rows * cols),
              *expected = hold_zeros(rows * cols);
        double *xd = hold_doubles(x, n * cols), *w, *gain, *bias;
        void *saved;
        int64_t i, t;
        layer o;
        layer_open(c, &o, rows, cols, variant & 1 ? 8 : TERN_PER_TENSOR, variant, n);
        saved = hold(o.need.saved + 1);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, y, saved));
        CHECK_OK(c, tern_linear_backward(c, &o.l, n, x, saved, dy, dx));
        for (i = 0; i < rows; i++) CHECK_OK(c, tern_param_get(c, &o.w, i, NULL, NULL, values + i * cols));
        w = hold_doubles(values, rows * cols);
        gain = hold_doubles((const float *)o.gain.buffer[TERN_SHADOW].data, cols);
        bias = hold_doubles((const float *)o.bias.buffer[TERN_SHADOW].data, rows);
#define DIFFERENCE(place, got)                                                                     \
        {                                                                                          \
            const double kept = *(place);                                                          \
            double slope;                                                                          \
            *(place) = kept + h; slope = linear_literal(&o, w, n, xd, gain, bias, dy);             \
            *(place) = kept - h; slope = (slope - linear_literal(&o, w, n, xd, gain, bias, dy)) / (2 * h); \
            *(place) = kept;                                                                       \
            CHECK(fabs((got) - slope) < 5e-5 * (1 + fabs(slope)), "variant %d [%d]: %g, not %g", variant, (int)i, (got), slope); \
        }
        for (i = 0; i < n * cols; i++) DIFFERENCE(xd + i, dx[i])
        for (i = 0; o.l.gain && i < cols; i++) DIFFERENCE(gain + i, grad_of(&o.gain)[i])
        for (i = 0; o.l.bias && i < rows; i++) DIFFERENCE(bias + i, grad_of(&o.bias)[i])
#undef DIFFERENCE
        used = composed_forward(c, &o, n, x, y);
        if (used) { /* float activations; the int8 product is the operation's own test */
            for (t = 0; t < n; t++)
                for (i = 0; i < rows * cols; i++) expected[i] += dy[t * rows + i / cols] * used[t * cols + i % cols];
        } else {
            const tern_matrix m = tern_param_matrix(&o.w);
            const tern_quantize_args q =
                hold_activations(c, o.l.act, &m, n, x, o.l.norm, o.l.gain ? (const float *)o.gain.buffer[TERN_SHADOW].data : NULL);
            tern_matmul_dw_args a = TERN_ZERO;
            a.m = m;
            a.act = q.act;
            a.n = n;
            a.dy = dy;
            a.q = q.q; a.scale = q.scale;
            a.dw = expected;
            CHECK_OK(c, tern_matmul_dw(c, &a));
        }
        for (i = 0; i < rows * cols; i++)
            CHECK(fabs(grad_of(&o.w)[i] - expected[i]) < 1e-5,
                  "variant %d: dw[%d] %g, not %g", variant, (int)i, grad_of(&o.w)[i], expected[i]);
        record_words(r, dx, n * cols);
        record_words(r, grad_of(&o.w), rows * cols);
        record_words(r, grad_of(&o.gain), cols);
        record_words(r, grad_of(&o.bias), rows);
        CHECK_OK(c, tern_linear_backward(c, &o.l, n, x, saved, dy, NULL)); /* gradients are added */
        for (i = 0; i < rows * cols; i++) CHECK(fabs(grad_of(&o.w)[i] - 2 * expected[i]) < 2e-5, "variant %d: dw is not added to", variant);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_backward(void) { same_for_threads(linear_backwards); }

static void linear_gradients(tern_context *c, layer *o, int64_t n, const float *x, const float *dy, tern_type type, float *y,
                             float *dx, float *dw)
{
    void *saved = hold(o->need.saved + 1);
    o->l.gradients = type;
    memset(grad_of(&o->w), 0, (size_t)(o->w.rows * o->w.cols) * 4);
    CHECK_OK(c, tern_linear_forward(c, &o->l, n, x, y, saved));
    CHECK_OK(c, tern_linear_backward(c, &o->l, n, x, saved, dy, dx));
    memcpy(dw, grad_of(&o->w), (size_t)(o->w.rows * o->w.cols) * 4);
}

/* The permission is passed on to both products and changes no forward; the last layer's dx is that of arenas alone. */
static void linear_bf16_gradients(tern_context *c, record *r)
{
    const int64_t n = 5, rows = 7, cols = 21;
    int variant, type;
    int64_t i;
    for (variant = 0; variant <= VARIANTS; variant++) {
        const int arenas = variant == VARIANTS;
        const float *x = layer_input(n * cols, arenas ? 0 : variant), *dy = hold_floats(n * rows);
        float *y[2], *dx[2], *dw[2];
        layer o;
        layer_open(c, &o, rows, cols, variant & 1 ? 8 : TERN_PER_ROW, arenas ? 0 : variant, n);
        if (arenas) {
            o.l.arenas = 0.5f;
            memset(o.w.buffer[TERN_SCALES].data, 0, (size_t)o.w.buffer[TERN_SCALES].count * 4);
            CHECK_OK(c, tern_linear_need(c, &o.l, n, &o.need));
            CHECK_OK(c, tern_reserve(c, o.need.scratch));
        }
        for (type = 0; type < 2; type++) {
            y[type] = hold_output(n * rows);
            dx[type] = hold_output(n * cols);
            dw[type] = hold_output(rows * cols);
            linear_gradients(c, &o, n, x, dy, type ? TERN_BF16 : TERN_F32, y[type], dx[type], dw[type]);
        }
        CHECK(memcmp(y[0], y[1], (size_t)(n * rows) * 4) == 0, "variant %d: another forward", variant);
        CHECK((memcmp(dx[0], dx[1], (size_t)(n * cols) * 4) != 0) == has_pairs(c), "variant %d: dx has factors of the other type", variant);
        CHECK((memcmp(dw[0], dw[1], (size_t)(rows * cols) * 4) != 0) == has_pairs(c),
              "variant %d: dw has factors of the other type", variant);
        for (i = 0; i < n * cols; i++)
            CHECK(fabsf(dx[0][i] - dx[1][i]) < 0.05f, "variant %d: dx %g, not %g", variant, (double)dx[1][i], (double)dx[0][i]);
        for (i = 0; i < rows * cols; i++)
            CHECK(fabsf(dw[0][i] - dw[1][i]) < 0.05f, "variant %d: dw %g, not %g", variant, (double)dw[1][i], (double)dw[0][i]);
        record_words(r, dx[1], n * cols);
        record_words(r, dw[1], rows * cols);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_bf16_gradients(void) { same_for_threads(linear_bf16_gradients); }

/* LoRA beside a matrix of zeros: its three products and dx, each beside float64 of the factors as they are rounded, and dx beside
   float64 of all it is made of. */
static void linear_bf16_lora(tern_context *c, record *r)
{
    const int64_t n = 70, rows = 37, cols = 45, rank = 3;
    int variant;
    for (variant = 0; variant <= WITH_DENSE; variant += WITH_FLOATS) {
        const float *x = hold_floats(n * cols), *dy = hold_floats(n * rows), *a, *b, *low;
        float *y[2], *dx[2], *da, *db, *dlow = hold_output(n * rank);
        tern_dense_args d = TERN_ZERO;
        void *saved;
        int64_t t, i, j;
        int type;
        layer o;
        layer_open(c, &o, rows, cols, TERN_PER_ROW, WITH_LORA | variant, n);
        if (variant == WITH_DENSE) memset(o.w.buffer[TERN_SHADOW].data, 0, (size_t)(rows * cols) * 4);
        else memset(o.w.buffer[TERN_SCALES].data, 0, o.w.buffer[TERN_SCALES].count * 4);
        saved = hold(o.need.saved);
        for (type = 0; type < 2; type++) {
            o.l.gradients = type ? TERN_BF16 : TERN_F32;
            y[type] = hold_output(n * rows);
            dx[type] = hold_output(n * cols);
            memset(grad_of(&o.lora_a), 0, (size_t)(rank * cols) * 4);
            memset(grad_of(&o.lora_b), 0, (size_t)(rows * rank) * 4);
            CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, y[type], saved));
            CHECK_OK(c, tern_linear_backward(c, &o.l, n, x, saved, dy, dx[type]));
        }
        CHECK(memcmp(y[0], y[1], (size_t)(n * rows) * 4) == 0, "variant %d: another forward", variant);
        CHECK((memcmp(dx[0], dx[1], (size_t)(n * cols) * 4) != 0) == has_pairs(c), "variant %d: dx has factors of the other type", variant);
        a = (const float *)o.lora_a.buffer[TERN_SHADOW].data;
        b = (const float *)o.lora_b.buffer[TERN_SHADOW].data;
        da = grad_of(&o.lora_a);
        db = grad_of(&o.lora_b);
        low = tern__kept_at(&o.l, n, saved).low;
        d.m = n; d.n = rank; d.k = rows;
        d.a = dy; d.a_row = rows; d.a_col = 1;
        d.b = b; d.b_row = rank; d.b_col = 1;
        d.c = dlow; d.c_row = rank;
        d.fused = 1;
        d.factors = TERN_BF16;
        CHECK_OK(c, tern_dense(c, &d));
        for (t = 0; t < n; t++)
            for (j = 0; j < rank; j++) {
                dlow[t * rank + j] *= 0.5f; /* lora_scale */
            }
        for (i = 0; i < rows; i++)
            for (j = 0; j < rank; j++) {
                factored f = {0.0, 0.0, 0.0};
                for (t = 0; t < n; t++)
                    factored_add(&f, bf16(c, dy[t * rows + i]) * bf16(c, low[t * rank + j]),
                                 (double)dy[t * rows + i] * (double)low[t * rank + j]);
                check_factored("dB", db[i * rank + j], &f, n, 2);
            }
        for (j = 0; j < rank; j++)
            for (i = 0; i < cols; i++) {
                factored f = {0.0, 0.0, 0.0};
                for (t = 0; t < n; t++)
                    factored_add(&f, bf16(c, dlow[t * rank + j]) * bf16(c, x[t * cols + i]),
                                 (double)dlow[t * rank + j] * (double)x[t * cols + i]);
                check_factored("dA", da[j * cols + i], &f, n, 2);
            }
        for (t = 0; t < n; t++)
            for (i = 0; i < cols; i++) {
                factored f = {0.0, 0.0, 0.0}, whole = {0.0, 0.0, 0.0};
                int64_t k;
                for (j = 0; j < rank; j++) {
                    factored_add(&f, bf16(c, dlow[t * rank + j]) * bf16(c, a[j * cols + i]),
                                 (double)dlow[t * rank + j] * (double)a[j * cols + i]);
                    for (k = 0; k < rows; k++)
                        factored_add(&whole, 0.0, 0.5 * (double)dy[t * rows + k] * (double)b[k * rank + j] * (double)a[j * cols + i]);
                }
                whole.sum = dx[1][t * cols + i]; /* the exact sum alone is compared */
                check_factored("dx", dx[1][t * cols + i], &f, rank, 2);
                check_factored("dx of all", dx[1][t * cols + i], &whole, rank * rows, 4);
            }
        record_words(r, dx[1], n * cols);
        record_words(r, da, rank * cols);
        record_words(r, db, rows * rank);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_bf16_lora(void) { same_for_threads(linear_bf16_lora); }

/* -- options: rotation, LoRA, dead zone, arenas -- */

static double *hold_dense(const tern_param *p) { return hold_doubles((const float *)p->buffer[TERN_SHADOW].data, p->rows * p->cols); }

/* What each part of a layer is, in float64; w and shadow in the rotated basis. */
typedef struct literal { double *w, *shadow, *a, *b, *gain, *bias, *dead; } literal;

static literal literal_of(tern_context *c, const layer *o)
{
    const int64_t rows = o->w.rows, cols = o->w.cols;
    float *values = hold_output(rows * cols), *shadow = hold_output(rows * cols);
    tern_cast_args cast = TERN_ZERO;
    literal t;
    int64_t i;
    for (i = 0; i < rows; i++) CHECK_OK(c, tern_param_get(c, &o->w, i, NULL, NULL, values + i * cols));
    cast.count = rows * cols;
    cast.from = o->w.buffer[TERN_SHADOW].type;
    cast.to = TERN_F32;
    cast.src = o->w.buffer[TERN_SHADOW].data;
    cast.dst = shadow;
    CHECK_OK(c, tern_cast(c, &cast));
    t.w = hold_doubles(values, rows * cols);
    t.shadow = hold_doubles(shadow, rows * cols);
    t.a = hold_dense(&o->lora_a);
    t.b = hold_dense(&o->lora_b);
    t.gain = hold_dense(&o->gain);
    t.bias = hold_dense(&o->bias);
    t.dead = hold_dense(&o->dead);
    return t;
}

/* The matrix of a layer in the original basis: w + arenas shadow + lora_scale B A, rotated back. */
static void literal_matrix(const layer *o, const literal *t, double *m)
{
    const int64_t rows = o->w.rows, cols = o->w.cols;
    int64_t i, k, j;
    for (i = 0; i < rows; i++) {
        for (j = 0; j < cols; j++) {
            m[i * cols + j] = t->w[i * cols + j] + o->l.arenas * t->shadow[i * cols + j];
            for (k = 0; o->l.lora_a && k < 3; k++) m[i * cols + j] += o->l.lora_scale * t->b[i * 3 + k] * t->a[k * cols + j];
        }
        if (o->w.rotate) rotate_literal(m + i * cols, cols, o->w.rotate, 1);
    }
}

/* x~ of one token in the original basis. */
static void literal_input(const layer *o, const literal *t, const double *x, double *out)
{
    const int64_t cols = o->w.cols;
    double squares = 0.0, norm = 1.0;
    int64_t k;
    for (k = 0; k < cols; k++) squares += x[k] * x[k];
    if (o->l.norm == TERN_NORM_RMS) norm = 1.0 / sqrt(squares / (double)cols + 1e-6);
    for (k = 0; k < cols; k++) out[k] = x[k] * norm * (o->l.gain ? t->gain[k] : 1.0);
}

/* Outputs [n, rows], or with dy their product with it. */
static double literal_forward(const layer *o, const literal *t, int64_t n, const double *x, const float *dy, double *y)
{
    const int64_t rows = o->w.rows, cols = o->w.cols;
    double *m = (double *)malloc(sizeof(double) * (size_t)(rows * cols)),
           *in = (double *)malloc(sizeof(double) * (size_t)cols), total = 0.0;
    int64_t i, r, k;
    literal_matrix(o, t, m);
    for (i = 0; i < n; i++) {
        literal_input(o, t, x + i * cols, in);
        for (r = 0; r < rows; r++) {
            double sum = (o->l.bias ? t->bias[r] : 0.0) + (o->w.dead ? t->dead[r] : 0.0);
            for (k = 0; k < cols; k++) sum += m[r * cols + k] * in[k];
            if (dy) total += dy[i * rows + r] * sum;
            else y[i * rows + r] = sum;
        }
    }
    free(m);
    free(in);
    return total;
}

static double literal_slope(const layer *o, const literal *t, int64_t n, const double *x, const float *dy, double *place)
{
    const double kept = *place, h = 1e-4;
    double slope;
    *place = kept + h;
    slope = literal_forward(o, t, n, x, dy, NULL);
    *place = kept - h;
    slope = (slope - literal_forward(o, t, n, x, dy, NULL)) / (2 * h);
    *place = kept;
    return slope;
}

/* Every combination against float64: outputs, the rebuilt matrix and all gradients. int8 is as far off as its rounding. */
static void linear_options(tern_context *c, record *r)
{
    const int64_t n = 3, rows = 5, cols = 21;
    int variant;
    for (variant = 0; variant < OPTIONS; variant++) {
        const int32_t floats = variant & (WITH_FLOATS | WITH_DENSE);
        const float *x, *dy;
        float *y, *other, *dx, *m;
        double *xd, *want, *in, largest = 0.0, off;
        void *saved;
        literal t;
        int64_t i, k;
        layer o;
        if (!layer_makes_sense(variant) || variant & WITH_INT4 || (variant & WITH_BF16 && !(variant & WITH_ARENAS))) continue;
        x = hold_floats(n * cols);
        dy = hold_floats(n * rows);
        y = hold_output(n * rows);
        other = hold_output(n * rows);
        dx = hold_output(n * cols);
        m = hold_output(rows * cols);
        layer_open(c, &o, rows, cols, variant & 1 ? 8 : TERN_PER_ROW, variant, n);
        saved = hold(o.need.saved + 1);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, y, saved));
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, x, other, NULL));
        CHECK(memcmp(y, other, (size_t)(n * rows) * 4) == 0, "variant %d: inference differs from training", variant);
        CHECK_OK(c, tern_linear_backward(c, &o.l, n, x, saved, dy, dx));
        CHECK_OK(c, tern_linear_rebuild(c, &o.l, m));
        xd = hold_doubles(x, n * cols);
        t = literal_of(c, &o);
        want = (double *)hold(sizeof(double) * (size_t)(rows * cols));
        in = (double *)hold(sizeof(double) * (size_t)(n * cols));
        literal_forward(&o, &t, n, xd, NULL, want);
        for (i = 0; i < n; i++) {
            literal_input(&o, &t, xd + i * cols, in + i * cols);
            if (o.w.rotate) rotate_literal(in + i * cols, cols, o.w.rotate, 0);
            for (k = 0; k < cols; k++) largest = fabs(in[i * cols + k]) > largest ? fabs(in[i * cols + k]) : largest;
        }
        off = floats ? 0.0 : largest / 253.0; /* of an activation, by rounding */
        for (i = 0; i < n * rows; i++) {
            double weights = 0.0;
            for (k = 0; k < cols; k++) weights += fabs(t.w[i % rows * cols + k]);
            CHECK(fabs(y[i] - want[i]) < 1e-5 + off * weights, "variant %d: y[%d] %g, not %g", variant, (int)i, y[i], want[i]);
        }
        literal_matrix(&o, &t, want);
        for (i = 0; i < rows * cols; i++)
            CHECK(fabs(m[i] - want[i]) < 1e-5, "variant %d: rebuilt[%d] %g, not %g", variant, (int)i, m[i], want[i]);
#define GRADIENT(name, place, got, count) /* the other numbers of threads give the same bits */            \
        for (i = 0; i < (count) && c->run.parallel.workers <= test_threads[0]; i++) {                        \
            const double slope = literal_slope(&o, &t, n, xd, dy, (place) + i);                            \
            CHECK(fabs((got)[i] - slope) < 1e-4 * (1 + fabs(slope)),                                       \
                  "variant %d: " name "[%d] %g, not %g", variant, (int)i, (got)[i], slope);                \
        }
        GRADIENT("dx", xd, dx, n * cols)
        if (o.l.gain) GRADIENT("dgain", t.gain, grad_of(&o.gain), cols)
        if (o.l.bias) GRADIENT("dbias", t.bias, grad_of(&o.bias), rows)
        if (o.w.dead) GRADIENT("ddead", t.dead, grad_of(&o.dead), rows)
        if (o.l.lora_a) GRADIENT("da", t.a, grad_of(&o.lora_a), 3 * cols)
        if (o.l.lora_b) GRADIENT("db", t.b, grad_of(&o.lora_b), 3 * rows)
#undef GRADIENT
        for (i = 0; i < rows * cols; i++) {
            double dw = 0.0, loose = 0.0;
            for (k = 0; k < n; k++) {
                dw += (1.0 + o.l.arenas) * dy[k * rows + i / cols] * in[k * cols + i % cols];
                loose += fabs(dy[k * rows + i / cols]) * 1.2 * off;
            }
            CHECK(fabs(grad_of(&o.w)[i] - dw) < 1e-5 + loose, "variant %d: dw[%d] %g, not %g", variant, (int)i, grad_of(&o.w)[i], dw);
        }
        record_words(r, dx, n * cols);
        record_words(r, grad_of(&o.w), rows * cols);
        record_words(r, grad_of(&o.lora_a), 3 * cols);
        record_words(r, grad_of(&o.lora_b), 3 * rows);
        record_words(r, grad_of(&o.dead), rows);
        record_words(r, grad_of(&o.gain), cols);
        record_words(r, grad_of(&o.bias), rows);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_options(void) { same_for_threads(linear_options); }

/* The forward of every combination has one result everywhere. */
static void linear_option_forwards(tern_context *c, record *r)
{
    int variant;
    for (variant = VARIANTS; variant < OPTIONS; variant++) {
        const int64_t n = 1 + 6 * (variant % 3), rows = 33, cols = 70;
        layer o;
        float *y;
        if (!layer_makes_sense(variant)) continue;
        y = hold_output(n * rows);
        layer_open(c, &o, rows, cols, variant & 1 ? 20 : TERN_PER_ROW, variant, n);
        CHECK_OK(c, tern_linear_forward(c, &o.l, n, hold_floats(n * cols), y, NULL));
        record_words(r, y, n * rows);
        layer_close(c, &o);
        release();
    }
}
static void test_linear_option_forwards(void) { same_everywhere(linear_option_forwards, UINT64_C(0xF7DBB2866B9A09C6)); }

/* A rotated parameter is the parameter of its rotated rows, whatever the type of the floats. */
static void test_param_rotated(void)
{
    static const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i;
    for (i = 0; i < 3; i++) {
        const int64_t rows = 19, cols = 45;
        tern_param p = param_of("w", rows, cols, TERN_ABSMEAN, TERN_PER_ROW), plain = p;
        float *w = hold_floats(rows * cols), *rotated = hold_output(rows * cols);
        void *given = hold((size_t)(rows * cols) * 4);
        tern_hadamard_args h = TERN_ZERO;
        tern_cast_args cast = TERN_ZERO;
        tern_verdict v;
        int64_t r;
        cast.count = rows * cols;
        cast.to = types[i]; cast.src = w; cast.dst = given;
        CHECK_OK(t.c, tern_cast(t.c, &cast));
        cast.from = types[i]; cast.to = TERN_F32; cast.src = given; cast.dst = w;
        CHECK_OK(t.c, tern_cast(t.c, &cast));
        h.n = rows; h.cols = cols; h.seed = p.rotate = 123;
        h.x = w; h.y = rotated;
        CHECK_OK(t.c, tern_hadamard(t.c, &h));
        CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
        CHECK_OK(t.c, tern_param_alloc(t.c, &plain, TERN_FOR_INFERENCE));
        CHECK_OK(t.c, tern_param_set(t.c, &p, types[i], given));
        CHECK_OK(t.c, tern_param_set(t.c, &plain, TERN_F32, rotated));
        CHECK(memcmp(p.buffer[TERN_SHADOW].data, rotated, (size_t)(rows * cols) * 4) == 0, "the shadow is not the rotated rows");
        for (r = 0; r < rows; r++) CHECK_OK(t.c, tern_param_get(t.c, &plain, r, NULL, NULL, rotated + r * cols));
        CHECK_OK(t.c, tern_param_verify(t.c, &p, rotated, &v));
        CHECK(v.wrong == 0, "type %d: %d weights differ", (int)types[i], (int)v.wrong);
        memset(given, 0xFF, 4); /* NaN */
        CHECK_FAILS(t.c, tern_param_set(t.c, &p, types[i], given), TERN_E_NONFINITE, "element 0");
        test_fail_at = test_allocations;
        CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_F32, w), TERN_E_MEMORY, "w: no memory to rotate 855 weights");
        test_fail_at = -1;
        CHECK_OK(t.c, tern_param_verify(t.c, &p, rotated, &v));
        CHECK(v.wrong == 0, "a refused set changed %d weights", (int)v.wrong);
        tern_param_free(t.c, &p, -1);
        tern_param_free(t.c, &plain, -1);
        release();
    }
    test_close(&t);
}

/* A merge is ternarizing base + lora_scale B A: of a frozen matrix its values, else the shadow. Then B is zero. */
static void linear_merged(tern_context *c, int32_t grain, int variant, int frozen)
{
    const int64_t rows = 35, cols = 50;
    float *base = hold_output(rows * cols), *sum = hold_output(rows * cols), *scaled = hold_output(rows * 3);
    tern_param want = param_of("want", rows, cols, TERN_ABSMEAN, grain);
    tern_dense_args d = TERN_ZERO;
    tern_verdict v = TERN_ZERO;
    tern_stats before, after;
    int64_t i;
    layer o;
    layer_open(c, &o, rows, cols, grain, variant, 1);
    CHECK_OK(c, tern_param_stats(c, &o.w, 0.1f, &before));
    for (i = 0; i < rows; i++) CHECK_OK(c, tern_param_get(c, &o.w, i, NULL, NULL, base + i * cols));
    for (i = 0; !frozen && i < rows * cols; i++) base[i] = tern__load_float(o.w.buffer[TERN_SHADOW].type, o.w.buffer[TERN_SHADOW].data, i);
    if (frozen) tern_param_free(c, &o.w, TERN_FOR_TRAINING);
    else o.w.flags |= TERN_KEEP_SCALES; /* those of before the merge */
    for (i = 0; i < rows * 3; i++) scaled[i] = 0.5f * ((const float *)o.lora_b.buffer[TERN_SHADOW].data)[i];
    d.m = rows; d.n = cols; d.k = 3;
    d.a = scaled; d.a_row = 3; d.a_col = 1;
    d.b = (const float *)o.lora_a.buffer[TERN_SHADOW].data; d.b_row = cols; d.b_col = 1;
    d.c = memcpy(sum, base, (size_t)(rows * cols) * 4); d.c_row = cols;
    d.add = 1;
    CHECK_OK(c, tern_dense(c, &d));
    want.buffer[TERN_SHADOW].type = frozen ? TERN_F32 : o.w.buffer[TERN_SHADOW].type;
    CHECK_OK(c, tern_param_alloc(c, &want, TERN_FOR_GRADIENT));
    CHECK_OK(c, tern_param_set(c, &want, TERN_F32, sum)); /* the sum is in the layer's basis already */
    CHECK_OK(c, tern_linear_merge(c, &o.l));
    for (i = 0; i < rows; i++) CHECK_OK(c, tern_param_get(c, &want, i, NULL, NULL, sum + i * cols));
    CHECK_OK(c, tern_param_verify(c, &o.w, sum, &v));
    CHECK(v.wrong == 0, "grain %d, variant %d, frozen %d: %d weights differ", (int)grain, variant, frozen, (int)v.wrong);
    for (i = 0; i < rows * 3; i++) CHECK(((const float *)o.lora_b.buffer[TERN_SHADOW].data)[i] == 0.0f, "lora_b[%d] stays", (int)i);
    if (!frozen) {
        CHECK_OK(c, tern_param_stats(c, &o.w, 0.1f, &after));
        CHECK(fabs(after.alpha - before.alpha) > 1e-4, "the merge changed nothing");
    }
    tern_param_free(c, &want, -1);
    layer_close(c, &o);
    release();
}

static void test_linear_merge(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int g, frozen;
    for (g = 0; g < 5; g++)
        for (frozen = 0; frozen < 2; frozen++) {
            linear_merged(t.c, every_grain[g], WITH_LORA, frozen);
            linear_merged(t.c, every_grain[g], WITH_LORA | WITH_ROTATE | WITH_BF16, frozen);
        }
    test_close(&t);
}

/* A dense matrix is as wide as it likes; nothing changes where the sum is not finite. */
static void test_linear_wide_dense(void)
{
    enum { ROWS = 2, COLS = TERN__MAX_COLS + 5 };
    test_context t = test_open(TERN_ISA_BEST, 2);
    tern_param w = param_of("w", ROWS, COLS, TERN_DENSE, 0), a = param_of("a", 1, COLS, TERN_DENSE, 0),
               b = param_of("b", ROWS, 1, TERN_DENSE, 0);
    float *before = hold_output(ROWS * COLS), *want = hold_output(ROWS * COLS), *up, y[2 * ROWS];
    tern_linear l = TERN_ZERO;
    tern_need need = TERN_ZERO;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_INFERENCE));
    CHECK_OK(t.c, tern_param_alloc(t.c, &a, TERN_FOR_INFERENCE));
    CHECK_OK(t.c, tern_param_alloc(t.c, &b, TERN_FOR_INFERENCE));
    set_random(t.c, &w);
    set_random(t.c, &a);
    set_random(t.c, &b);
    up = (float *)b.buffer[TERN_SHADOW].data;
    memcpy(before, w.buffer[TERN_SHADOW].data, ROWS * COLS * 4);
    l.w = &w;
    l.lora_a = &a; l.lora_b = &b;
    l.lora_scale = 0.5f;
    up[1] = INFINITY;
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &l), TERN_E_NONFINITE, "w: merged rows from 0 on");
    CHECK(memcmp(before, w.buffer[TERN_SHADOW].data, ROWS * COLS * 4) == 0, "a refused merge changed something");
    up[1] = -2.0f;
    CHECK_OK(t.c, tern_linear_rebuild(t.c, &l, want));
    CHECK_OK(t.c, tern_linear_merge(t.c, &l));
    CHECK(memcmp(want, w.buffer[TERN_SHADOW].data, ROWS * COLS * 4) == 0 && memcmp(want, before, ROWS * COLS * 4) != 0 && up[0] == 0.0f,
          "the merged matrix is not the rebuilt one");
    CHECK_OK(t.c, tern_linear_need(t.c, &l, 1, &need));
    CHECK_OK(t.c, tern_reserve(t.c, need.scratch));
    CHECK_OK(t.c, tern_linear_forward(t.c, &l, 1, before, y, NULL));
    tern_param_free(t.c, &w, -1);
    tern_param_free(t.c, &a, -1);
    tern_param_free(t.c, &b, -1);
    release();
    test_close(&t);
}

/* Frozen chunk by chunk: rows beyond the first chunk, and nothing changed where one of them is not finite. */
static void test_linear_merge_chunks(void)
{
    const int64_t rows = 40, cols = TERN__TRANSFER / 64 + 1; /* chunks of 16 rows */
    test_context t = test_open(TERN_ISA_BEST, 1);
    float *w = hold_floats(rows * cols), *values = hold_output(rows * cols);
    tern_verdict v = TERN_ZERO;
    int64_t i;
    int failed;
    layer o;
    layer_open(t.c, &o, rows, cols, TERN_PER_ROW, WITH_LORA, 1);
    tern_param_free(t.c, &o.w, TERN_FOR_TRAINING);
    CHECK_OK(t.c, tern_param_set(t.c, &o.w, TERN_F32, w));
    for (i = 0; i < rows; i++) CHECK_OK(t.c, tern_param_get(t.c, &o.w, i, NULL, NULL, values + i * cols));
    ((float *)o.lora_b.buffer[TERN_SHADOW].data)[38 * 3] = 3e38f;
    ((float *)o.lora_a.buffer[TERN_SHADOW].data)[7] = 1e3f;
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &o.l), TERN_E_NONFINITE, "w: merged rows from 32 on: ternarize: weights[6][0]");
    for (failed = 0; failed < 4; failed++) {
        test_fail_at = test_allocations + failed;
        CHECK_FAILS(t.c, tern_linear_merge(t.c, &o.l), TERN_E_MEMORY, "w: no memory");
        test_fail_at = -1;
    }
    CHECK_OK(t.c, tern_param_verify(t.c, &o.w, values, &v));
    CHECK(v.wrong == 0, "a refused merge changed %d weights", (int)v.wrong);
    ((float *)o.lora_b.buffer[TERN_SHADOW].data)[38 * 3] = 2.0f;
    o.w.rule = TERN_SEQ;
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &o.l), TERN_E_MISSING, "w: its rule learns a scale, and its alpha is NULL");
    o.w.rule = TERN_ABSMEAN;
    CHECK_OK(t.c, tern_linear_rebuild(t.c, &o.l, w));
    CHECK_OK(t.c, tern_linear_merge(t.c, &o.l));
    tern_param_alloc(t.c, &o.w, 1 << TERN_SHADOW);
    memcpy(o.w.buffer[TERN_SHADOW].data, w, (size_t)(rows * cols) * 4);
    for (i = 0; i < rows; i++) CHECK_OK(t.c, tern_param_get(t.c, &o.w, i, NULL, NULL, values + i * cols));
    CHECK_OK(t.c, tern_param_set(t.c, &o.w, TERN_F32, NULL));
    CHECK_OK(t.c, tern_param_verify(t.c, &o.w, values, &v));
    CHECK(v.wrong == 0, "%d weights are not those of the rebuilt matrix", (int)v.wrong);
    layer_close(t.c, &o);
    release();
    test_close(&t);
}

/* Folding moves the dead zone into the bias without a change of a bit. */
static void test_linear_fold(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int variant;
    for (variant = WITH_BIAS; variant < VARIANTS; variant += WITH_FLOATS) {
        const int64_t n = 3, rows = 20, cols = 50;
        const float *x = hold_floats(n * cols);
        float *y = hold_output(n * rows), *other = hold_output(n * rows), *bias;
        float c3;
        layer o;
        if (variant & WITH_DENSE) continue;
        layer_open(t.c, &o, rows, cols, TERN_PER_ROW, variant | WITH_DEAD, n);
        bias = (float *)o.bias.buffer[TERN_SHADOW].data;
        c3 = bias[3] + ((float *)o.dead.buffer[TERN_SHADOW].data)[3];
        CHECK(bias[3] != c3, "the dead zone is empty");
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, n, x, y, NULL));
        CHECK_OK(t.c, tern_linear_fold(t.c, &o.l));
        CHECK(bias[3] == c3, "the bias is %g, not %g", bias[3], c3);
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, n, x, other, NULL));
        CHECK(memcmp(y, other, (size_t)(n * rows) * 4) == 0, "variant %d: folding changed the layer", variant);
        o.w.dead = NULL;
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, n, x, other, NULL));
        CHECK(memcmp(y, other, (size_t)(n * rows) * 4) == 0, "variant %d: without its dead zone the layer differs", variant);
        layer_close(t.c, &o);
        release();
    }
    test_close(&t);
}

/* The dead zone's bias follows every ternarize, and a step spreads its gradient: one step of SGD by hand. */
static void test_dead_zone_training(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const int64_t rows = 17, cols = 60;
    tern_param *items[2];
    tern_model m = TERN_ZERO;
    tern_step step = TERN_ZERO;
    float *shadow, *dead, norm2 = 0.0f;
    const float *before, *dw, *ddead;
    int8_t *trits = (int8_t *)hold((size_t)(rows * cols));
    double norm = 0.0;
    int64_t i, j, zeros = 0;
    int after;
    layer o;
    layer_open(t.c, &o, rows, cols, TERN_PER_ROW, WITH_DEAD, 1);
    tern_param_free(t.c, &o.w, 1 << TERN_MOMENT1 | 1 << TERN_MOMENT2);
    items[0] = &o.w;
    items[1] = &o.dead; /* in the list, but no optimizer's business */
    m.items = items;
    m.count = 2;
    shadow = (float *)o.w.buffer[TERN_SHADOW].data;
    dead = (float *)o.dead.buffer[TERN_SHADOW].data;
    before = hold_copy(shadow, rows * cols);
    for (i = 0; i < rows * cols; i++) grad_of(&o.w)[i] = test_float();
    for (i = 0; i < rows; i++) grad_of(&o.dead)[i] = test_float();
    dw = hold_copy(grad_of(&o.w), rows * cols);
    ddead = hold_copy(grad_of(&o.dead), rows);
    step.optimizer = TERN_SGD;
    step.rate = 0.5f;
    step.decay = 0.125f; /* which would shrink a trained dead zone */
    step.step = 1;
    step.norm2 = &norm2;
    for (after = 0; after < 2; after++) {
        for (i = 0; i < rows; i++) CHECK_OK(t.c, tern_param_get(t.c, &o.w, i, trits + i * cols, NULL, NULL));
        for (i = 0; i < rows; i++) {
            double sum = 0.0;
            for (j = 0; j < cols; j++) sum += trits[i * cols + j] ? 0.0 : shadow[i * cols + j];
            CHECK(fabs(dead[i] - 0.25 * sum) < 1e-5 && sum != 0.0, "step %d: dead[%d] is %g, not %g", after, (int)i, dead[i], 0.25 * sum);
        }
        if (after) break;
        CHECK_OK(t.c, tern_model_step(t.c, &m, &step));
        for (i = 0; i < rows * cols; i++) {
            const double g = dw[i] + (trits[i] ? 0.0 : 0.25 * ddead[i / cols]);
            zeros += trits[i] == 0;
            norm += g * g;
            CHECK(fabs(shadow[i] - (before[i] - 0.5 * (g + 0.125 * before[i]))) < 1e-5, "shadow[%d] is %g", (int)i, shadow[i]);
        }
        CHECK(zeros > rows && fabs(norm2 - norm) < 1e-4 * norm, "the norm is %g, not %g", norm2, norm);
        for (i = 0; i < rows; i++) CHECK(grad_of(&o.dead)[i] == 0.0f, "the gradient of the dead zone stays");
    }
    for (i = 0; i < rows; i++) grad_of(&o.dead)[i] = 1.0f; /* any numbers: here they are scales */
    CHECK_OK(t.c, tern_param_give(t.c, &o.w, trits, grad_of(&o.dead)));
    for (i = 0; i < rows; i++) CHECK(dead[i] == 0.0f, "given trits of 0 are weights of 0: dead[%d] is %g", (int)i, dead[i]);
    layer_close(t.c, &o);
    release();
    test_close(&t);
}

static void test_linear_option_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_model m = TERN_ZERO;
    tern_param *item;
    tern_step step = TERN_ZERO;
    tern_embedding e;
    tern_linear bad;
    float x[40] = {0}, y[12];
    const int32_t id = 0;
    layer o;
    layer_open(t.c, &o, 6, 20, TERN_PER_ROW, WITH_BIAS, 2);
    bad = o.l; bad.lora_a = &o.lora_a;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "w: lora_a and lora_b come together");
    bad.lora_b = &o.gain;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_SHAPE, "w: its lora_b is 1 x 20, not dense and 6 x 3");
    bad.lora_a = &o.bias;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_SHAPE, "w: its lora_a is 1 x 6, not dense and 1 x 20");
    bad.lora_a = &o.lora_a; bad.lora_b = &o.lora_b; bad.lora_scale = NAN;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "lora_scale");
    bad = o.l; bad.arenas = -0.5f; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "arenas is negative");
    bad.arenas = INFINITY;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "arenas is negative or not finite");
    bad.arenas = 0.5f; bad.w = &o.lora_b; bad.bias = NULL;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "arenas beside dense weights");
    o.bias.rotate = 1;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_ARGUMENT, "bias: a dense parameter has neither");
    o.bias.rotate = 0;
    o.bias.dead = &o.dead;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_ARGUMENT, "bias: a dense parameter has neither");
    o.bias.dead = NULL;
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &o.l), TERN_E_MISSING, "no lora_a");
    CHECK_FAILS(t.c, tern_linear_fold(t.c, &o.l), TERN_E_MISSING, "to fold needs a dead zone");
    CHECK_FAILS(t.c, tern_linear_rebuild(t.c, &o.l, NULL), TERN_E_ARGUMENT, "w is NULL");
    o.w.dead = &o.dead; CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_ARGUMENT, "lambda above 0");
    o.w.lambda = NAN; CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_ARGUMENT, "lambda above 0");
    o.w.lambda = 1.0f; o.w.dead = &o.gain;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_SHAPE, "w: its dead zone is 1 x 20, not dense and 1 x 6");
    CHECK_FAILS(t.c, tern_param_set(t.c, &o.w, TERN_F32, NULL), TERN_E_SHAPE, "w: its dead zone");
    o.w.dead = &o.dead;
    bad = o.l; bad.bias = NULL; CHECK_FAILS(t.c, tern_linear_fold(t.c, &bad), TERN_E_MISSING, "a bias that takes it");
    item = &o.w; m.items = &item; m.count = 1;
    step.step = 1;
    tern_param_free(t.c, &o.dead, 1 << TERN_GRAD);
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &step), TERN_E_MISSING, "dead has no gradient");
    e.w = &o.w;
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, &e, 1, &id, x), TERN_E_UNSUPPORTED, "w: an embedding has neither");
    o.w.dead = NULL; o.w.rotate = 3;
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, &e, 1, &id, x), TERN_E_UNSUPPORTED, "w: an embedding has neither");
    CHECK_FAILS(t.c, tern_embedding_backward(t.c, &e, 1, &id, x), TERN_E_UNSUPPORTED, "w: an embedding has neither");
    o.w.rotate = 0;
    tern_param_free(t.c, &o.w, TERN_FOR_TRAINING);
    bad = o.l; bad.arenas = 0.5f; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_MISSING, "w has no shadow");
    bad = o.l; bad.lora_a = &o.lora_a; bad.lora_b = &o.lora_b; o.w.dead = &o.dead;
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &bad), TERN_E_MISSING, "w: a merge changes the dead zone");
    layer_close(t.c, &o);
    release();
    test_close(&t);
}

/* No allocation in a forward, a backward or a step. */
static void test_linear_allocates_nothing(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    int variant;
    for (variant = 0; variant < OPTIONS; variant++) {
        layer o;
        tern_param *items[6];
        tern_model m = TERN_ZERO;
        tern_step step = TERN_ZERO;
        float *x = hold_floats(70 * 130), *y = hold_output(70 * 35), *dx = hold_output(70 * 130);
        void *saved;
        long before;
        if (!layer_makes_sense(variant)) { release(); continue; }
        layer_open(t.c, &o, 35, 130, TERN_PER_ROW, variant, 70);
        items[0] = &o.w; items[1] = &o.bias; items[2] = &o.gain; items[3] = &o.lora_a; items[4] = &o.lora_b; items[5] = &o.dead;
        m.items = items;
        m.count = variant & WITH_DEAD ? 6 : 5;
        step.rate = 0.01f;
        step.clip = 1.0f;
        step.step = 1;
        saved = hold(o.need.saved + 1);
        before = test_allocations;
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, 70, x, y, saved));
        CHECK_OK(t.c, tern_linear_backward(t.c, &o.l, 70, x, saved, y, dx));
        CHECK_OK(t.c, tern_model_step(t.c, &m, &step));
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, 70, x, y, NULL));
        CHECK(test_allocations == before, "variant %d: %ld allocations", variant, test_allocations - before);
        layer_close(t.c, &o);
        release();
    }
    test_close(&t);
}

/* Scratch exactly as large as asked for is enough, one byte less is an error with the numbers. */
static void test_linear_scratch(void)
{
    int variant;
    for (variant = 0; variant < OPTIONS; variant++) {
        tern_context_desc d = TERN_ZERO;
        tern_context *c;
        float *x = hold_floats(3 * 50), *y = hold_output(3 * 20), *dx = hold_output(3 * 50);
        void *saved;
        char text[64];
        layer o;
        if (!layer_makes_sense(variant)) { release(); continue; }
        CHECK(tern_open(&c, &d, NULL) == TERN_OK, "cannot open");
        layer_open(c, &o, 20, 50, TERN_PER_ROW, variant, 1); /* reserves for one token */
        CHECK_OK(c, tern_linear_need(c, &o.l, 3, &o.need));
        saved = hold(o.need.saved + 1);
        if (o.need.scratch > c->scratch_bytes) {
            snprintf(text, sizeof text, "w: 3 tokens need %d bytes of scratch", (int)o.need.scratch);
            CHECK_FAILS(c, tern_linear_forward(c, &o.l, 3, x, y, saved), TERN_E_SCRATCH, text);
            CHECK_FAILS(c, tern_linear_backward(c, &o.l, 3, x, saved, y, dx), TERN_E_SCRATCH, text);
            CHECK_OK(c, tern_reserve(c, o.need.scratch - 1));
            CHECK_FAILS(c, tern_linear_forward(c, &o.l, 3, x, y, saved), TERN_E_SCRATCH, text);
        }
        CHECK_OK(c, tern_reserve(c, o.need.scratch));
        CHECK_OK(c, tern_linear_forward(c, &o.l, 3, x, y, NULL));
        CHECK_OK(c, tern_linear_forward(c, &o.l, 3, x, y, saved));
        CHECK_OK(c, tern_linear_backward(c, &o.l, 3, x, saved, y, dx));
        layer_close(c, &o);
        tern_close(c);
        release();
    }
}

static void test_linear_faults(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int variant;
    for (variant = 0; variant < VARIANTS; variant++) {
        const int64_t n = 4, rows = 18, cols = 40;
        float *x = hold_floats(n * cols), *y = hold_output(n * rows), *clean = hold_output(n * rows);
        int64_t j;
        layer o;
        if (variant & WITH_DENSE) continue;
        layer_open(t.c, &o, rows, cols, TERN_PER_ROW, variant & ~WITH_BIAS, n);
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, n, x, clean, NULL));
        x[2 * cols + 5] = NAN;
        CHECK_OK(t.c, tern_linear_forward(t.c, &o.l, n, x, y, NULL));
        CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "row 2");
        CHECK(memcmp(y, clean, (size_t)(2 * rows) * 4) == 0 && memcmp(y + 3 * rows, clean + 3 * rows, (size_t)rows * 4) == 0,
              "variant %d: a clean row changed", variant);
        for (j = 0; j < rows; j++) CHECK(y[2 * rows + j] == 0.0f, "variant %d: [2][%d] is %g", variant, (int)j, y[2 * rows + j]);
        layer_close(t.c, &o);
        release();
    }
    test_close(&t);
}

static void test_linear_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    layer o;
    tern_linear bad;
    tern_need need = TERN_ZERO;
    float *x = hold_floats(80), *y = hold_floats(80), *dx = hold_floats(80);
    const float *kept;
    void *saved;
    layer_open(t.c, &o, 6, 20, TERN_PER_ROW, WITH_NORM | WITH_BIAS, 2);
    saved = hold(o.need.saved);
    kept = hold_copy(y, 80);
    CHECK(tern_linear_forward(NULL, &o.l, 2, x, y, NULL) == TERN_E_ARGUMENT, "no context");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, NULL, 2, x, y, NULL), TERN_E_ARGUMENT, "the layer or its w is NULL");
    bad = o.l; bad.w = NULL; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "the layer or its w is NULL");
    bad = o.l; bad.bias = &o.gain;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_SHAPE, "w: its bias has 20 values for 6 rows");
    bad = o.l; bad.gain = &o.bias;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_SHAPE, "w: its gain has 6 values for 20 columns");
    bad = o.l; bad.norm = TERN_NORM_NONE;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "a gain without a norm");
    bad = o.l; bad.act = TERN_ACT_BIT;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "w: bits take neither norm nor rotation");
    bad = o.l; bad.act = (tern_act)-1; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "act -1");
    bad = o.l; bad.act = (tern_act)7; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "act 7");
    bad = o.l; bad.norm = (tern_norm_kind)5; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "norm 5");
    bad = o.l; bad.gradients = TERN_F16;
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "w: factors of type 3");
    bad = o.l; bad.eps = -1.0f; CHECK_FAILS(t.c, tern_linear_forward(t.c, &bad, 2, x, y, NULL), TERN_E_ARGUMENT, "eps");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 0, x, y, NULL), TERN_E_SHAPE, "w: n = 0");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, INT64_MAX / 4, x, y, NULL), TERN_E_OVERFLOW, "overflows");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, NULL, y, NULL), TERN_E_ARGUMENT, "x is NULL");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, NULL, NULL), TERN_E_ARGUMENT, "y is NULL");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, (float *)(void *)((char *)x + 1), y, NULL), TERN_E_ALIGNMENT, "x is not aligned");
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, (char *)saved + 2), TERN_E_ALIGNMENT, "saved is not aligned");
    CHECK_FAILS(t.c, tern_linear_need(t.c, &o.l, 2, NULL), TERN_E_ARGUMENT, "out is NULL");
    CHECK_FAILS(t.c, tern_linear_need(t.c, &o.l, -1, &need), TERN_E_SHAPE, "n = -1");
    CHECK(memcmp(y, kept, 80 * 4) == 0, "a refused forward wrote");
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, x, NULL, y, dx), TERN_E_ARGUMENT, "saved is NULL");
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, NULL, saved, y, dx), TERN_E_ARGUMENT, "x is NULL");
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, x, saved, NULL, dx), TERN_E_ARGUMENT, "dy is NULL");
    o.w.buffer[TERN_GRAD].count--;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, x, saved, y, dx), TERN_E_SHAPE, "w: its gradient has 119 elements of 120");
    o.w.buffer[TERN_GRAD].count++;
    o.bias.buffer[TERN_GRAD].count--;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, x, saved, y, dx), TERN_E_SHAPE, "bias: its gradient has 5 elements of 6");
    o.bias.buffer[TERN_GRAD].count++;
    o.gain.buffer[TERN_GRAD].count--;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &o.l, 2, x, saved, y, dx), TERN_E_SHAPE, "gain: its gradient has 19 elements of 20");
    tern_param_free(t.c, &o.gain, 1 << TERN_SHADOW);
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_MISSING, "gain has no shadow");
    tern_param_free(t.c, &o.w, 1 << TERN_TRITS);
    CHECK_FAILS(t.c, tern_linear_forward(t.c, &o.l, 2, x, y, NULL), TERN_E_MISSING, "w has no trits");
    layer_close(t.c, &o);
    release();
    test_close(&t);
}

/* -- learned scales, conversion, and shadows that start from a ternary tensor -- */

/* A parameter with its learned scale, where the rule has one. */
typedef struct learner { tern_param w, alpha; } learner;

static void learner_open(tern_context *c, learner *l, int64_t rows, int64_t cols, tern_rule rule, int32_t grain, tern_type shadow,
                         tern_type scales, int32_t buffers)
{
    l->w = param_of("w", rows, cols, rule, grain);
    l->alpha = param_of("w.alpha", 1, rule == TERN_SEQ ? rows : 1, TERN_DENSE, 0);
    l->alpha.flags = TERN_NO_DECAY;
    l->w.buffer[TERN_SHADOW].type = shadow;
    l->w.buffer[TERN_SCALES].type = scales;
    if (tern__is_learned(rule)) l->w.alpha = &l->alpha;
    CHECK_OK(c, tern_param_alloc(c, &l->w, buffers));
    CHECK_OK(c, tern_param_alloc(c, &l->alpha, buffers | 1 << TERN_TRITS));
}

static void learner_close(tern_context *c, learner *l)
{
    tern_param_free(c, &l->w, -1);
    tern_param_free(c, &l->alpha, -1);
}

/* Given trits and scales come back bit for bit from the shadow, for every rule. Where the rule is let loose on it (as the first
   step does) the trits stay and the scales to within the rounding of the shadow. */
static void test_param_give_is_idempotent(void)
{
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 7};
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_rule rule;
    int g, variant;
    for (rule = TERN_ABSMEAN; rule <= TERN_GIVEN; rule++)
        for (g = 0; g < 3; g++)
            for (variant = 0; variant < 8; variant++) {
                enum { ROWS = 17, COLS = 43, ALL = ROWS * COLS };
                const int64_t groups = grains[g] > 0 ? (COLS + grains[g] - 1) / grains[g] : 1, stored = g == 0 ? 1 : ROWS * groups;
                const size_t most = (size_t)(g == 0 ? 1 : groups) * 4;
                const tern_type scale_type = every_scale_type[variant % 4];
                int8_t trits[ALL], row[COLS];
                float scales[ALL], row_scales[COLS];
                int64_t i, r;
                int round;
                learner l;
                if ((rule == TERN_LSQ && g != 0) || (rule == TERN_SEQ && g != 1)) continue;
                learner_open(t.c, &l, ROWS, COLS, rule, grains[g], variant / 4 ? TERN_BF16 : TERN_F32, scale_type, TERN_FOR_GRADIENT);
                for (i = 0; i < ALL; i++) trits[i] = i % COLS % 7 == 0 ? 1 : test_trit(); /* no group of zeros */
                for (i = 0; i < stored; i++) scales[i] = scale_type == TERN_F32 ? 0.1f + 0.01f * (float)i : (float)(1 << i % 4) * 0.125f;
                CHECK_OK(t.c, tern_param_give(t.c, &l.w, trits, scales));
                for (round = 0; round < 3; round++) {
                    if (round == 2) l.w.flags &= ~(uint32_t)TERN_KEEP_SCALES; /* as a step does */
                    if (round) CHECK_OK(t.c, tern_param_set(t.c, &l.w, TERN_TYPE_DEFAULT, NULL));
                    for (r = 0; r < ROWS; r++) {
                        const float *want = g == 0 ? scales : scales + r * groups;
                        CHECK_OK(t.c, tern_param_get(t.c, &l.w, r, row, row_scales, NULL));
                        CHECK(memcmp(row, trits + r * COLS, COLS) == 0, "rule %d, grain %d, variant %d, round %d: trits of row %d",
                              (int)rule, (int)grains[g], variant, round, (int)r);
                        CHECK(round == 2 || memcmp(row_scales, want, most) == 0,
                              "rule %d, grain %d, variant %d, round %d: scales of row %d", (int)rule, (int)grains[g], variant,
                              round, (int)r);
                        for (i = 0; i < groups; i++)
                            CHECK(fabsf(row_scales[i] / want[i] - 1.0f) < (variant / 4 ? 0.004f : 1e-6f),
                                  "rule %d, grain %d, variant %d: scale %g became %g", (int)rule, (int)grains[g], variant, want[i],
                                  row_scales[i]);
                    }
                }
                learner_close(t.c, &l);
            }
    test_close(&t);
}

/* BF16 and back in one call: weights and moments, rounded to nearest even; what is converted keeps the rest. */
static void test_param_convert(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const long blocks = test_blocks;
    tern_param p = param_of("w", 17, 43, TERN_ABSMEAN, TERN_PER_ROW), d = param_of("gain", 1, 5, TERN_DENSE, 0);
    const int32_t which[] = {TERN_SHADOW, TERN_MOMENT1, TERN_MOMENT2};
    static float lent[17 * 43], before[17 * 43];
    float *back;
    int i, j;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW));
    CHECK_OK(t.c, tern_param_alloc(t.c, &d, TERN_FOR_ADAMW));
    set_random(t.c, &p);
    for (j = 0; j < 3; j++)
        for (i = 0; i < 731; i++) ((float *)p.buffer[which[j]].data)[i] = test_float();
    for (j = 0; j < 3; j++) {
        const long held_before = test_blocks;
        memcpy(before, p.buffer[which[j]].data, sizeof before);
        test_fail_at = test_allocations;
        CHECK_FAILS(t.c, tern_param_convert(t.c, &p, which[j], TERN_BF16), TERN_E_MEMORY, "w: no memory");
        test_fail_at = -1;
        CHECK(p.buffer[which[j]].type == TERN_F32 && memcmp(before, p.buffer[which[j]].data, sizeof before) == 0,
              "a failed conversion changed something");
        CHECK_OK(t.c, tern_param_convert(t.c, &p, which[j], TERN_BF16));
        CHECK(p.buffer[which[j]].type == TERN_BF16 && p.buffer[which[j]].count == 731 && p.buffer[which[j]].owned,
              "buffer %d", (int)which[j]);
        for (i = 0; i < 731; i++) {
            const uint16_t h = ((const uint16_t *)p.buffer[which[j]].data)[i];
            CHECK(h == tern__to_bf16(before[i]), "%g became %04x", before[i], (unsigned)h);
        }
        CHECK_OK(t.c, tern_param_convert(t.c, &p, which[j], TERN_BF16)); /* nothing to do */
        CHECK_OK(t.c, tern_param_convert(t.c, &p, which[j], TERN_F32));
        back = (float *)p.buffer[which[j]].data;
        for (i = 0; i < 731; i++) CHECK(back[i] == tern__from_bf16(tern__to_bf16(before[i])), "%g came back as %g", before[i], back[i]);
        CHECK(test_blocks == held_before, "%ld blocks, not %ld", test_blocks, held_before);
    }
    CHECK_OK(t.c, tern_param_convert(t.c, &d, TERN_MOMENT2, TERN_BF16));
    CHECK(d.buffer[TERN_MOMENT2].type == TERN_BF16 && d.buffer[TERN_MOMENT1].type == TERN_F32, "one moment of two");
    CHECK_FAILS(t.c, tern_param_convert(t.c, &d, TERN_SHADOW, TERN_BF16), TERN_E_ARGUMENT, "gain: a dense parameter is TERN_F32");
    CHECK(d.buffer[TERN_SHADOW].type == TERN_F32 && d.buffer[TERN_SHADOW].data, "a refused conversion changed something");
    CHECK_FAILS(t.c, tern_param_convert(t.c, &p, TERN_GRAD, TERN_BF16), TERN_E_ARGUMENT, "w: convert: buffer 3 is not a shadow or moment");
    CHECK_FAILS(t.c, tern_param_convert(t.c, &p, TERN_SHADOW, TERN_F16), TERN_E_ARGUMENT, "w: convert: type 3 is not");
    tern_param_free(t.c, &p, 1 << TERN_SHADOW);
    CHECK_FAILS(t.c, tern_param_convert(t.c, &p, TERN_SHADOW, TERN_F32), TERN_E_MISSING, "w has no shadow");
    p.buffer[TERN_SHADOW].type = TERN_F32; /* lent memory is the caller's afterwards too */
    p.buffer[TERN_SHADOW].data = lent;
    p.buffer[TERN_SHADOW].count = 731;
    CHECK_OK(t.c, tern_param_convert(t.c, &p, TERN_SHADOW, TERN_BF16));
    CHECK(p.buffer[TERN_SHADOW].data != (void *)lent && p.buffer[TERN_SHADOW].owned, "converted in memory that was lent");
    tern_param_free(t.c, &p, -1);
    tern_param_free(t.c, &d, -1);
    CHECK(test_blocks == blocks, "%ld left", test_blocks - blocks);
    test_close(&t);
}

/* Combinations that make no sense are refused by name, of parameters as of the operation. */
static void test_param_scale_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param lsq = param_of("w", 3, 5, TERN_LSQ, TERN_PER_TENSOR), alpha = param_of("w.alpha", 1, 1, TERN_DENSE, 0), p;
    const float w[15] = {1.0f};
    p = lsq; p.grain = TERN_PER_ROW;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: rule lsq learns one scale for the tensor; a grain of -1 has more");
    p = lsq; p.grain = 4;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: rule lsq learns one scale for the tensor; a grain of 4 has more");
    p = lsq; p.rule = TERN_SEQ;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: rule seq learns a scale for each row; the grain is 0, not -1");
    p = lsq; p.rho = 0.5f;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT,
                "w: rho averages scales taken from the weights; those of rule 3 are not");
    p = lsq; p.rule = TERN_ABSMEAN; p.rho = 1.5f;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: rho is not in [0, 1)");
    p = lsq; p.rule = TERN_ABSMEAN; p.rho = 0.5f; p.buffer[TERN_SCALES].type = TERN_POW2;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: rho needs scales of TERN_F32, not of type 5");
    p = lsq; p.noise = NAN; CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w: noise or zone");
    p = alpha; p.rho = 0.5f; CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, 1), TERN_E_ARGUMENT, "w.alpha: rho averages");
    CHECK_OK(t.c, tern_param_alloc(t.c, &lsq, TERN_FOR_INFERENCE)); /* frozen, it needs no alpha */
    CHECK_FAILS(t.c, tern_param_set(t.c, &lsq, TERN_F32, w), TERN_E_MISSING, "w: its rule learns a scale, and its alpha is NULL");
    lsq.alpha = &alpha;
    CHECK_FAILS(t.c, tern_param_set(t.c, &lsq, TERN_F32, w), TERN_E_MISSING, "w.alpha has no shadow");
    alpha.cols = 2;
    CHECK_FAILS(t.c, tern_param_set(t.c, &lsq, TERN_F32, w), TERN_E_SHAPE, "w: its alpha must be dense, 1 x 1, and is 1 x 2");
    alpha.cols = 1;
    alpha.rule = TERN_ABSMEAN;
    CHECK_FAILS(t.c, tern_param_set(t.c, &lsq, TERN_F32, w), TERN_E_SHAPE, "w: its alpha must be dense");
    tern_param_free(t.c, &lsq, -1);
    test_close(&t);
}

/* Averages begin anew with given weights and go on with the shadow as it stands. */
static void test_param_average(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 1, 4, TERN_ABSMEAN, TERN_PER_ROW);
    const float ones[4] = {1.0f, -1.0f, 1.0f, -1.0f}, threes[4] = {3.0f, 3.0f, -3.0f, 3.0f};
    const tern_type shadows[] = {TERN_F32, TERN_BF16};
    float scale;
    int i;
    for (i = 0; i < 2; i++) {
        p.buffer[TERN_SHADOW].type = shadows[i];
        CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
        p.rho = 0.5f;
        CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, ones));
        CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, threes));
        CHECK_OK(t.c, tern_param_get(t.c, &p, 0, NULL, &scale, NULL));
        CHECK(scale == 3.0f, "given weights were averaged: %g", scale);
        ((float *)p.buffer[TERN_SCALES].data)[0] = 1.0f;
        CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_TYPE_DEFAULT, NULL));
        CHECK_OK(t.c, tern_param_get(t.c, &p, 0, NULL, &scale, NULL));
        CHECK(scale == 2.0f, "the average of 1 and 3 is %g", scale);
        tern_param_free(t.c, &p, -1);
    }
    test_close(&t);
}

static void suite_bitlinear(void)
{
    RUN(test_param_buffers);
    RUN(test_param_out_of_memory);
    RUN(test_param_refusals);
    RUN(test_param_borrowed);
    RUN(test_param_set);
    RUN(test_param_dense);
    RUN(test_param_give);
    RUN(test_param_give_refusals);
    RUN(test_param_give_is_idempotent);
    RUN(test_param_convert);
    RUN(test_param_scale_refusals);
    RUN(test_param_average);
    RUN(test_param_stats);
    RUN(test_param_verify);
    RUN(test_param_chunks);
    RUN(test_model_audit);
    RUN(test_linear_forward);
    RUN(test_linear_fused);
    RUN(test_linear_backward);
    RUN(test_linear_bf16_gradients);
    RUN(test_linear_bf16_lora);
    RUN(test_linear_options);
    RUN(test_linear_option_forwards);
    RUN(test_param_rotated);
    RUN(test_linear_merge);
    RUN(test_linear_merge_chunks);
    RUN(test_linear_wide_dense);
    RUN(test_linear_fold);
    RUN(test_dead_zone_training);
    RUN(test_linear_option_refusals);
    RUN(test_linear_allocates_nothing);
    RUN(test_linear_scratch);
    RUN(test_linear_faults);
    RUN(test_linear_refusals);
}
