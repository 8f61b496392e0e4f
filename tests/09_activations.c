/* [TERN-9] Activations: the quantizer against its definition, data faults, independence of the batch. */

typedef struct activations { tern_matrix m; int64_t n, stride, groups; float *scale; int8_t *q; int32_t *sum; } activations;

/* Quantizes x [n, cols] into new buffers that were full of other bytes. */
static activations activations_of(tern_context *c, int64_t n, int64_t cols, int32_t grain, tern_type encoding, const float *x, const float *gain, tern_norm_kind norm, float eps)
{
    tern_quantize_args a = TERN_ZERO;
    activations out;
    memset(&out, 0, sizeof out);
    a.m.rows = 1;
    a.m.cols = cols;
    a.m.grain = grain;
    a.m.encoding = encoding;
    out.m = a.m;
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

/* Section 0: m = max|x g|; q = rne((x g) (127/m)); scale = (m/127) r; r = 1/sqrt(mean(x^2) + eps). */
static void activations_check_row(const activations *a, int64_t row, const float *x, const float *gain, tern_norm_kind norm, float eps, const char *what)
{
    const int64_t group = a->m.grain > 0 ? a->m.grain : a->m.cols, slots = a->m.encoding == TERN_BASE3 ? 20 : 16;
    const int64_t run = (group + slots - 1) / slots * slots, cols = a->m.cols;
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
    inverse = m > 0.0f ? 127.0f / m : 0.0f;
    if (m > 0.0f && tern__finite(inverse)) {
        scale = m / 127.0f * r;
        for (i = 0; i < cols; i++) {
            const int32_t v = (int32_t)rintf(y[i] * inverse);
            q[i / group * run + i % group] = (int8_t)v;
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

static void test_activations_against_the_definition(void)
{
    const int64_t columns[] = {1, 15, 16, 17, 127, 130, 1030};
    const int32_t grains[] = {TERN_PER_ROW, 1, 7, 16, 20, 128};
    enum { N = 14 };
    tern_isa isa;
    int k, g, variant;
    int64_t row;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 2);
        for (k = 0; t.c && k < 7; k++)
            for (g = 0; g < 6; g++)
                for (variant = 0; variant < 8; variant++) {
                    const int64_t cols = columns[k];
                    float *x = test_floats(N * cols), *gain = variant & 1 ? test_floats(cols) : NULL;
                    const tern_norm_kind norm = variant & 2 ? TERN_NORM_RMS : TERN_NORM_NONE;
                    activations a;
                    activations_fill(x, N, cols);
                    a = activations_of(t.c, N, cols, grains[g], variant & 4 ? TERN_BASE3 : TERN_2BIT, x, gain, norm, 1e-6f);
                    for (row = 0; row < N; row++) {
                        char what[100];
                        snprintf(what, sizeof what, "%s: row %d of %d columns, grain %d, variant %d", test_tier_name[isa], (int)row, (int)cols, (int)grains[g], variant);
                        activations_check_row(&a, row, x + row * cols, gain, norm, 1e-6f, what);
                    }
                    CHECK_OK(t.c, tern_sync(t.c));
                    activations_free(&a);
                    free(gain);
                    free(x);
                }
        test_close(&t);
    }
}

static void test_activations_known_values(void)
{
    const float x[8] = {127.0f, -127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f};
    const int8_t wanted[8] = {127, -127, 0, 2, 2, 0, -2, -2};
    test_context t = test_open(TERN_ISA_BEST, 1);
    activations a = activations_of(t.c, 1, 8, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
    CHECK(memcmp(a.q, wanted, 8) == 0 && a.scale[0] == 1.0f && a.sum[0] == 0, "ties go to even");
    activations_free(&a);
    test_close(&t);
}

/* Rows that are not finite: zero rows, the first reported once, the other rows as without them. */
static void test_activations_data_faults(void)
{
    enum { N = 9, COLS = 33 };
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f};
    float gain[COLS], clean[N * COLS], x[N * COLS];
    tern_isa isa;
    int b, i;
    for (i = 0; i < N * COLS; i++) clean[i] = test_float();
    for (i = 0; i < COLS; i++) gain[i] = 2.0f; /* 3e38 overflows */
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 3);
        for (b = 0; t.c && b < 4; b++) {
            activations a, wanted = activations_of(t.c, N, COLS, 16, TERN_2BIT, clean, gain, TERN_NORM_RMS, 1e-6f);
            memcpy(x, clean, sizeof x);
            x[4 * COLS + 32] = bad[b];
            x[7 * COLS] = bad[b];
            a = activations_of(t.c, N, COLS, 16, TERN_2BIT, x, gain, TERN_NORM_RMS, 1e-6f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 4 is not finite");
            CHECK_OK(t.c, tern_sync(t.c));
            for (i = 0; i < N; i++) {
                const int zero = i == 4 || i == 7;
                int64_t j, different = 0;
                for (j = 0; j < a.stride; j++) different += a.q[i * a.stride + j] != (zero ? 0 : wanted.q[i * a.stride + j]);
                for (j = 0; j < a.groups; j++) different += a.sum[i * a.groups + j] != (zero ? 0 : wanted.sum[i * a.groups + j]);
                different += a.scale[i] != (zero ? 0.0f : wanted.scale[i]);
                CHECK(different == 0, "%s: row %d beside %g: %d differences", test_tier_name[isa], i, (double)bad[b], (int)different);
            }
            activations_free(&a);
            activations_free(&wanted);
        }
        if (t.c) { /* Inf times a gain of 0 is NaN, and a NaN gain spoils every row */
            activations a;
            gain[0] = 0.0f;
            memcpy(x, clean, sizeof x);
            x[5 * COLS] = INFINITY;
            a = activations_of(t.c, N, COLS, 16, TERN_2BIT, x, gain, TERN_NORM_NONE, 0.0f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 5 is not finite");
            activations_free(&a);
            gain[0] = NAN;
            a = activations_of(t.c, N, COLS, 16, TERN_2BIT, clean, gain, TERN_NORM_NONE, 0.0f);
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 0 is not finite");
            activations_free(&a);
            gain[0] = 2.0f;
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
    activations a = activations_of(t.c, 1, 4, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_NONE, 0.0f);
    CHECK_OK(t.c, tern_sync(t.c));
    CHECK(memcmp(a.q, wanted, 4) == 0 && a.scale[0] == 1e30f / 127.0f, "without the norm");
    activations_free(&a);
    a = activations_of(t.c, 1, 4, TERN_PER_ROW, TERN_2BIT, x, NULL, TERN_NORM_RMS, 1e-6f);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "activation row 0");
    CHECK(a.q[0] == 0 && a.scale[0] == 0.0f, "with the norm");
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
    int threads, p;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (threads = 1; threads <= 4; threads++) {
            test_context t = test_open(isa, threads);
            activations whole;
            if (!t.c) continue;
            whole = activations_of(t.c, N, COLS, 20, TERN_BASE3, x, gain, TERN_NORM_RMS, 1e-5f);
            for (p = 0; p < 4; p++) {
                int64_t from, n;
                for (from = 0; from < N; from += n) {
                    activations a;
                    n = parts[p] < N - from ? parts[p] : N - from;
                    a = activations_of(t.c, n, COLS, 20, TERN_BASE3, x + from * COLS, gain, TERN_NORM_RMS, 1e-5f);
                    CHECK(memcmp(a.q, whole.q + from * a.stride, (size_t)(n * a.stride)) == 0 &&
                          memcmp(a.sum, whole.sum + from * a.groups, sizeof(int32_t) * (size_t)(n * a.groups)) == 0 &&
                          memcmp(a.scale, whole.scale + from, sizeof(float) * (size_t)n) == 0,
                          "%s: rows %d to %d", test_tier_name[isa], (int)from, (int)(from + n));
                    activations_free(&a);
                }
            }
            activations_free(&whole);
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
