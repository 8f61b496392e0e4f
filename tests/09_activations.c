/* [TERN-9] Activations: the quantizers against their definition, data faults, independence of the batch.
   Mutations that these tests saw: no clamp, or one at -7; the mean's division left out; a gain left out of the mean; the
   sum of bits counted twice; a bit of the second half of a word beside its place; -0 taken as 1. */

typedef struct activations { tern_matrix m; tern_act act; int64_t n, stride, groups; float *scale; int8_t *q; int32_t *sum; } activations;

/* Quantizes x [n, cols] into new buffers that were full of other bytes. */
static activations activations_of(tern_context *c, tern_act act, int64_t n, int64_t cols, int32_t grain, tern_type encoding, const float *x,
                                  const float *gain, tern_norm_kind norm, float eps)
{
    tern_quantize_args a = TERN_ZERO;
    activations out;
    memset(&out, 0, sizeof out);
    a.m.rows = 1;
    a.m.cols = cols;
    a.m.grain = grain;
    a.m.encoding = encoding;
    out.m = a.m;
    out.act = a.act = act;
    out.n = n;
    CHECK_OK(c, tern_activation_shape(c, &a.m, &out.stride, &out.groups));
    out.q = (int8_t *)malloc((size_t)(n * out.stride));
    out.sum = (int32_t *)malloc(sizeof(int32_t) * (size_t)(n * out.groups));
    out.scale = test_floats(n);
    memset(out.q, 99, (size_t)(n * out.stride));
    a.n = n;
    a.x = x;
    a.gain = gain;
    a.norm = norm;
    a.eps = eps;
    a.q = out.q;
    a.scale = out.scale;
    a.sum = out.sum;
    CHECK_OK(c, tern_quantize(c, &a));
    return out;
}

static void activations_free(activations *a)
{
    free(a->q);
    free(a->sum);
    free(a->scale);
}

/* Where element i of a group lies, and what it is. */
static void activations_put(const activations *a, int8_t *q, int64_t group, int64_t i, int32_t v)
{
    const int64_t slots = a->m.encoding == TERN_BASE3 ? 20 : 16,
                  run = ((a->m.grain > 0 ? a->m.grain : a->m.cols) + slots - 1) / slots * slots;
    uint8_t *byte = (uint8_t *)q + group * ((run + 31) / 32 * 4) + i / 32 * 4 + i % 4;
    if (a->act != TERN_ACT_BIT) q[group * run + i] = (int8_t)v;
    else *byte = (uint8_t)(*byte | v << (i % 32 >= 16) << i % 16 / 4 * 2);
}

/* m = max|x g| and steps = 127, or m = mean|x g| and steps = sqrt(7) with q in -8..7: q = rne((x g) (steps/m)); scale =
   (m/steps) r; r = 1/sqrt(mean(x^2) + eps). Bits: x != 0, scale 1. */
static void activations_check_row(const activations *a, int64_t row, const float *x, const float *gain, tern_norm_kind norm, float eps,
                                  const char *what)
{
    const int64_t group = a->m.grain > 0 ? a->m.grain : a->m.cols, cols = a->m.cols;
    const int int4 = a->act == TERN_ACT_INT4, bits = a->act == TERN_ACT_BIT;
    const float steps = int4 ? (float)sqrt(7.0) : 127.0f;
    int8_t *q = (int8_t *)calloc(1, (size_t)a->stride);
    int32_t *sum = (int32_t *)calloc((size_t)a->groups, sizeof(int32_t));
    float *y = test_floats(cols), *squares = test_floats(cols), m = 0.0f, r = 1.0f, scale = 0.0f, inverse;
    int64_t i;
    for (i = 0; i < cols; i++) {
        y[i] = gain ? x[i] * gain[i] : x[i];
        squares[i] = x[i] * x[i];
        if (fabsf(y[i]) > m) m = fabsf(y[i]);
    }
    if (norm == TERN_NORM_RMS) r = 1.0f / sqrtf(numbers_sum(cols, squares) / (float)cols + eps);
    for (i = 0; i < cols; i++) squares[i] = fabsf(y[i]);
    if (int4) m = numbers_sum(cols, squares) / (float)cols;
    inverse = m > 0.0f ? steps / m : 0.0f;
    if (bits || (m > 0.0f && tern__finite(inverse))) {
        scale = bits ? 1.0f : m / steps * r;
        for (i = 0; i < cols; i++) {
            int32_t v = (int32_t)rintf(y[i] * (bits ? 0.0f : inverse));
            if (int4) v = v < -8 ? -8 : v > 7 ? 7 : v;
            if (bits) v = x[i] != 0.0f;
            activations_put(a, q, i / group, i % group, v);
            sum[i / group] += v;
        }
    }
    CHECK(memcmp(q, a->q + row * a->stride, (size_t)a->stride) == 0, "q of %s", what);
    CHECK(memcmp(sum, a->sum + row * a->groups, sizeof(int32_t) * (size_t)a->groups) == 0, "sums of %s", what);
    CHECK(tern__bits(scale) == tern__bits(a->scale[row]), "scale of %s: %a, not %a", what, (double)a->scale[row], (double)scale);
    free(q);
    free(sum);
    free(y);
    free(squares);
}

/* Row by row: ordinary, ties, zeros, tiny (127/m overflows), subnormal, huge, one outlier. */
static void activations_fill(float *x, int64_t n, int64_t cols)
{
    int64_t t, i;
    for (t = 0; t < n; t++)
        for (i = 0; i < cols; i++) {
            float *v = &x[t * cols + i];
            switch (t % 7) {
            case 1: *v = i == 0 ? 127.0f : (float)(i % 254 - 127) + 0.5f; break;
            case 2: *v = i % 2 ? -0.0f : 0.0f; break;
            case 3: *v *= 3e-37f; break;
            case 4: *v *= 1e-36f; break;
            case 5: *v *= 1e16f; break;
            case 6: if (i == cols / 2) *v = -5000.0f; break;
            default: break;
            }
        }
}

static void activations_define(tern_context *c, tern_act act, int64_t cols, int32_t grain, int variant, const char *tier)
{
    enum { N = 14 };
    float *x = test_floats(N * cols), *gain = variant & 1 ? test_floats(cols) : NULL;
    const tern_norm_kind norm = variant & 2 ? TERN_NORM_RMS : TERN_NORM_NONE;
    activations a;
    int64_t row, i;
    activations_fill(x, N, cols);
    for (i = 0; act == TERN_ACT_BIT && i < N * cols; i++) if (test_random() % 3) x[i] = i % 2 ? 0.0f : -0.0f;
    a = activations_of(c, act, N, cols, grain, variant & 4 ? TERN_BASE3 : TERN_2BIT, x, gain, norm, 1e-6f);
    for (row = 0; row < N; row++) {
        char what[120];
        snprintf(what, sizeof what, "%s: act %d, row %d of %d columns, grain %d, variant %d",
                 tier, (int)act, (int)row, (int)cols, (int)grain, variant);
        activations_check_row(&a, row, x + row * cols, gain, norm, 1e-6f, what);
    }
    CHECK_OK(c, tern_sync(c));
    activations_free(&a);
    free(gain);
    free(x);
}

static void test_activations_against_the_definition(void)
{
    const int64_t columns[] = {1, 15, 16, 17, 127, 130, 1030, 4097};
    const int32_t grains[] = {TERN_PER_ROW, 1, 7, 16, 20, 33, 128};
    const tern_act acts[] = {TERN_ACT_INT8, TERN_ACT_INT4, TERN_ACT_BIT};
    tern_isa isa;
    int k, g, variant, i;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 2);
        for (k = 0; t.c && k < 8; k++)
            for (g = 0; g < 7; g++)
                for (variant = k < 6 ? 0 : (k + g) % 2; variant < 8; variant += k < 6 ? 1 : 2) /* long rows: half of them */
                    for (i = 0; i < 3; i++)
                        if (acts[i] != TERN_ACT_BIT || variant % 4 == 0)
                            activations_define(t.c, acts[i], columns[k], grains[g], variant, test_tier_name[isa]);
        test_close(&t);
    }
}

static void test_activations_known_values(void)
{
    const float x[8] = {127.0f, -127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f};
    const int8_t wanted[8] = {127, -127, 0, 2, 2, 0, -2, -2};
    const float int4[8] = {40.0f, -40.0f, 1.0f, 0.0f, 20.0f, -0.0f, 0.0f, 11.0f}; /* mean 14, 0.189 steps to one */
    const int8_t wanted4[8] = {7, -8, 0, 0, 4, 0, 0, 2};
    test_context t = test_open(TERN_ISA_BEST, 1);
    activations a = activations_of(t.c, TERN_ACT_INT8, 1, 8, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
    CHECK(memcmp(a.q, wanted, 8) == 0 && a.scale[0] == 1.0f && a.sum[0] == 0, "ties go to even");
    activations_free(&a);
    a = activations_of(t.c, TERN_ACT_INT4, 1, 8, TERN_PER_ROW, TERN_2BIT, int4, NULL, TERN_NORM_NONE, 0.0f);
    CHECK(memcmp(a.q, wanted4, 8) == 0 && a.sum[0] == 5, "int4 ends at -8 and 7");
    activations_free(&a);
    a = activations_of(t.c, TERN_ACT_BIT, 1, 8, TERN_PER_ROW, TERN_2BIT, int4, NULL, TERN_NORM_NONE, 0.0f);
    CHECK(a.q[0] == 5 && a.q[1] == 1 && a.q[2] == 1 && a.q[3] == 4 && a.sum[0] == 5 && a.scale[0] == 1.0f, "bits lie as 2-bit codes do");
    activations_free(&a);
    test_close(&t);
}

/* Rows that are not finite: zero rows, the first reported once, the other rows as without them. */
static void test_activations_data_faults(void)
{
    enum { N = 9, COLS = 33 };
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
    tern_act act = TERN_ACT_INT8;
    float gain[COLS], clean[N * COLS], x[N * COLS];
    tern_isa isa;
    int b, i;
    for (i = 0; i < N * COLS; i++) clean[i] = test_float();
    for (i = 0; i < COLS; i++) gain[i] = 2.0f; /* 3e38 overflows */
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 3);
        for (b = 0; t.c && b < 8; b++) {
            activations a, wanted;
            act = b < 4 ? TERN_ACT_INT8 : TERN_ACT_INT4;
            wanted = activations_of(t.c, act, N, COLS, 16, TERN_2BIT, clean, gain, TERN_NORM_RMS, 1e-6f);
            memcpy(x, clean, sizeof x);
            x[4 * COLS + 32] = bad[b % 4];
            x[7 * COLS] = bad[b % 4];
            a = activations_of(t.c, act, N, COLS, 16, TERN_2BIT, x, gain, TERN_NORM_RMS, 1e-6f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 4 is not finite");
            CHECK_OK(t.c, tern_sync(t.c));
            for (i = 0; i < N; i++) {
                const int zero = i == 4 || i == 7;
                int64_t j, different = 0;
                for (j = 0; j < a.stride; j++) different += a.q[i * a.stride + j] != (zero ? 0 : wanted.q[i * a.stride + j]);
                for (j = 0; j < a.groups; j++) different += a.sum[i * a.groups + j] != (zero ? 0 : wanted.sum[i * a.groups + j]);
                different += a.scale[i] != (zero ? 0.0f : wanted.scale[i]);
                CHECK(different == 0,
                      "%s: act %d, row %d beside %g: %d differences", test_tier_name[isa], (int)act, i, (double)bad[b % 4], (int)different);
            }
            activations_free(&a);
            activations_free(&wanted);
        }
        if (t.c) { /* Inf times a gain of 0 is NaN, and a NaN gain spoils every row */
            activations a;
            gain[0] = 0.0f;
            memcpy(x, clean, sizeof x);
            x[5 * COLS] = INFINITY;
            a = activations_of(t.c, TERN_ACT_INT8, N, COLS, 16, TERN_2BIT, x, gain, TERN_NORM_NONE, 0.0f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 5 is not finite");
            activations_free(&a);
            gain[0] = NAN;
            a = activations_of(t.c, TERN_ACT_INT8, N, COLS, 16, TERN_2BIT, clean, gain, TERN_NORM_NONE, 0.0f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 0 is not finite");
            activations_free(&a);
            gain[0] = 2.0f;
            x[5 * COLS] = 3e38f; /* bits: large is 1, NaN is a fault */
            x[6 * COLS + 3] = NAN;
            a = activations_of(t.c, TERN_ACT_BIT, N, COLS, 16, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 6 is not finite");
            CHECK(a.sum[6 * 3] == 0 && a.q[6 * a.stride] == 0 && a.scale[6] == 0.0f && a.scale[5] == 1.0f && a.sum[5 * 3] == 16,
                  "%s: bits beside NaN", test_tier_name[isa]);
            activations_free(&a);
        }
        test_close(&t);
    }
}

/* Finite, but its mean square is not: usable without the norm, a data fault with it. */
static void test_activations_square_overflows(void)
{
    float x[4] = {1e30f, -1e30f, 5e29f, 0.0f};
    const int8_t wanted[4] = {127, -127, 64, 0};
    test_context t = test_open(TERN_ISA_BEST, 1);
    activations a = activations_of(t.c, TERN_ACT_INT8, 1, 4, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
    CHECK_OK(t.c, tern_sync(t.c));
    CHECK(memcmp(a.q, wanted, 4) == 0 && a.scale[0] == 1e30f / 127.0f, "without the norm");
    activations_free(&a);
    a = activations_of(t.c, TERN_ACT_INT8, 1, 4, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_RMS, 1e-6f);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 0");
    CHECK(a.q[0] == 0 && a.scale[0] == 0.0f, "with the norm");
    activations_free(&a);
    x[0] = x[1] = 3e38f; /* now the mean of int4 */
    a = activations_of(t.c, TERN_ACT_INT4, 1, 4, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 0");
    CHECK(a.q[0] == 0 && a.scale[0] == 0.0f, "the mean of int4");
    activations_free(&a);
    test_close(&t);
}

/* A row has the same bits alone, in any batch and with any number of threads. */
static void test_activations_do_not_depend_on_the_batch(void)
{
    enum { N = 23, COLS = 259 };
    float *x = test_floats(N * COLS), *gain = test_floats(COLS);
    const int64_t parts[] = {1, 2, 7, 22};
    tern_isa isa;
    const tern_act acts[] = {TERN_ACT_INT8, TERN_ACT_INT4, TERN_ACT_BIT};
    int threads, p, k;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (threads = 1; threads <= 4; threads++) {
            test_context t = test_open(isa, threads);
            for (k = 0; t.c && k < 3; k++) {
                const tern_norm_kind norm = k < 2 ? TERN_NORM_RMS : TERN_NORM_NONE;
                activations whole = activations_of(t.c, acts[k], N, COLS, 20, TERN_BASE3, x, k < 2 ? gain : NULL, norm, 1e-5f);
                for (p = 0; p < 4; p++) {
                    int64_t from, n;
                    for (from = 0; from < N; from += n) {
                        activations a;
                        n = parts[p] < N - from ? parts[p] : N - from;
                        a = activations_of(t.c, acts[k], n, COLS, 20, TERN_BASE3, x + from * COLS, k < 2 ? gain : NULL, norm, 1e-5f);
                        CHECK(memcmp(a.q, whole.q + from * a.stride, (size_t)(n * a.stride)) == 0 &&
                              memcmp(a.sum, whole.sum + from * a.groups, sizeof(int32_t) * (size_t)(n * a.groups)) == 0 &&
                              memcmp(a.scale, whole.scale + from, sizeof(float) * (size_t)n) == 0,
                              "%s: act %d, rows %d to %d", test_tier_name[isa], (int)acts[k], (int)from, (int)(from + n));
                        activations_free(&a);
                    }
                }
                activations_free(&whole);
            }
            test_close(&t);
        }
    free(x);
    free(gain);
}

static void test_activations_bad_arguments(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    float x[40] = {0}, scale[2];
    int8_t q[128];
    int32_t sum[2];
    tern_quantize_args good = TERN_ZERO, a;
    good.m.cols = 16;
    good.m.grain = TERN_PER_ROW;
    good.n = 2;
    good.x = x;
    good.q = q;
    good.scale = scale;
    good.sum = sum;
    CHECK_OK(t.c, tern_quantize(t.c, &good));
#define ACTIVATIONS_BAD(change, code, text) a = good; change; CHECK_FAILS(t.c, tern_quantize(t.c, &a), code, text)
    ACTIVATIONS_BAD(a.n = 0, TERN_E_SHAPE, "n = 0");
    ACTIVATIONS_BAD(a.n = -3, TERN_E_SHAPE, "n = -3");
    ACTIVATIONS_BAD(a.n = (int64_t)1 << 60, TERN_E_OVERFLOW, "overflows");
    ACTIVATIONS_BAD(a.m.cols = 262145, TERN_E_SHAPE, "K = 262145");
    ACTIVATIONS_BAD(a.x = NULL, TERN_E_ARGUMENT, "x is NULL");
    ACTIVATIONS_BAD(a.q = NULL, TERN_E_ARGUMENT, "q is NULL");
    ACTIVATIONS_BAD(a.scale = NULL, TERN_E_ARGUMENT, "scale is NULL");
    ACTIVATIONS_BAD(a.sum = NULL, TERN_E_ARGUMENT, "sum is NULL");
    ACTIVATIONS_BAD(a.x = (const float *)(const void *)((const char *)x + 1), TERN_E_ALIGNMENT, "x is not aligned to 4");
    ACTIVATIONS_BAD(a.norm = TERN_NORM_RMS, TERN_E_ARGUMENT, "eps is not positive");
    ACTIVATIONS_BAD(a.norm = TERN_NORM_RMS; a.eps = NAN, TERN_E_ARGUMENT, "eps is not positive");
    ACTIVATIONS_BAD(a.norm = (tern_norm_kind)2, TERN_E_ARGUMENT, "norm 2 is unknown");
    ACTIVATIONS_BAD(a.act = TERN_ACT_FLOAT, TERN_E_ARGUMENT, "act 1 is not");
    ACTIVATIONS_BAD(a.act = (tern_act)-1, TERN_E_ARGUMENT, "act -1 is not");
    ACTIVATIONS_BAD(a.act = (tern_act)4, TERN_E_ARGUMENT, "act 4 is not");
    ACTIVATIONS_BAD(a.act = TERN_ACT_BIT; a.gain = x, TERN_E_ARGUMENT, "bits take neither norm nor gain");
    ACTIVATIONS_BAD(a.act = TERN_ACT_BIT; a.norm = TERN_NORM_RMS; a.eps = 1.0f, TERN_E_ARGUMENT, "bits take neither norm nor gain");
#undef ACTIVATIONS_BAD
    test_close(&t);
}

static void suite_activations(void)
{
    RUN(test_activations_against_the_definition);
    RUN(test_activations_known_values);
    RUN(test_activations_data_faults);
    RUN(test_activations_square_overflows);
    RUN(test_activations_do_not_depend_on_the_batch);
    RUN(test_activations_bad_arguments);
}
