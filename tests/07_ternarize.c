/* [TERN-7] Ternarize: every rule, grain, input and scale type against the definition written out. Mutations that these tests see:
   SEQ with alpha as its scale or started at the mean, alpha without its floor or always from the start, rho swapped, the zone of
   the noise ignored. */

/* A matrix with allocated buffers. */
static tern_matrix ternarize_matrix(tern_context *c, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_type scale_type)
{
    tern_matrix m = TERN_ZERO;
    size_t trits = 0, scales = 0;
    m.rows = rows;
    m.cols = cols;
    m.grain = grain;
    m.encoding = encoding;
    m.scale_type = scale_type;
    CHECK_OK(c, tern_matrix_bytes(c, &m, &trits, &scales));
    m.trits = tern_alloc(c, trits);
    m.scales = tern_alloc(c, scales);
    return m;
}

static void ternarize_release(tern_context *c, tern_matrix *m)
{
    tern_free(c, m->trits);
    tern_free(c, m->scales);
}

static tern_result ternarize_run(tern_context *c, const tern_matrix *m, tern_rule rule, tern_type type, const void *w)
{
    tern_ternarize_args a = TERN_ZERO;
    a.m = *m;
    a.rule = rule;
    a.type = type;
    a.w = w;
    return tern_ternarize(c, &a);
}

/* The same values as f16 or bf16 in memory; w becomes what they hold. */
static void *ternarize_store(tern_type type, float *w, int64_t n)
{
    void *p = malloc((size_t)n * 4);
    int64_t i;
    for (i = 0; i < n; i++) {
        tern__store_float(type, p, i, w[i]);
        w[i] = tern__load_float(type, p, i);
    }
    return p;
}

/* -- the definition (section 1) -- */

/* Sum of |w| above delta over a rectangle: each row by the canonical rule, then the row sums by it. */
static float ternarize_sum(const float *w, int64_t stride, int64_t rows, int64_t cols, float delta, int64_t *count)
{
    float *part = (float *)malloc(sizeof(float) * (size_t)(rows + cols)), *kept = part + rows, total;
    int64_t r, j;
    *count = 0;
    for (r = 0; r < rows; r++) {
        for (j = 0; j < cols; j++) {
            const float a = fabsf(w[r * stride + j]);
            kept[j] = a > delta ? a : 0.0f;
            *count += a > delta;
        }
        part[r] = numbers_sum(cols, kept);
    }
    total = numbers_sum(rows, part);
    free(part);
    return total;
}

static float ternarize_stored(tern_type scale_type, float scale)
{
    if (scale_type == TERN_F16) { /* ten bits behind the leading one, and no exponent below -14 */
        const double unit = scale > 0.0f ? ldexp(1.0, (int)fmax(floor(log2((double)scale)), -14.0) - 10) : 1.0;
        return (float)fmin(rint((double)scale / unit) * unit, 65504.0);
    }
    if (scale_type == TERN_LOG && scale > 0.0f) {
        const double l = floor(256.0 * log2((double)scale) + 0.5), e = floor(l / 256.0);
        return (float)ldexp(rint(32768.0 * exp2(l / 256.0 - e)), (int)e - 15);
    }
    if (scale_type != TERN_POW2) return scale;
    return scale == 0.0f ? 0.0f : (float)ldexp(1.0, (int)floor(log2((double)scale) + 0.5));
}

/* One grain: its scale as stored (GIVEN: *scale comes in) and its trits. */
static void ternarize_grain(tern_rule rule, tern_type scale_type, const float *w, int64_t stride, int64_t rows, int64_t cols, float *scale,
                            int8_t *trits)
{
    int64_t count, r, j;
    const float mean = ternarize_sum(w, stride, rows, cols, -1.0f, &count) / (float)(rows * cols);
    float threshold = 0.7f * mean;
    if (rule == TERN_TWN) {
        const float sum = ternarize_sum(w, stride, rows, cols, threshold, &count);
        *scale = ternarize_stored(scale_type, count ? sum / (float)count : 0.0f);
    } else {
        if (rule == TERN_ABSMEAN) *scale = ternarize_stored(scale_type, mean);
        if (rule == TERN_ABSMEAN_SIGMA) *scale = ternarize_stored(scale_type, mean / 0.7978845608f);
        threshold = *scale / 2;
    }
    for (r = 0; r < rows; r++)
        for (j = 0; j < cols; j++) {
            const float v = w[r * stride + j];
            trits[r * stride + j] = (int8_t)(*scale == 0.0f || fabsf(v) <= threshold ? 0 : v > 0 ? 1 : -1);
        }
}

/* Scales in row-major order [rows, groups], trits [rows, cols]. */
static void ternarize_reference(const tern_matrix *m, tern_rule rule, const float *w, float *scales, int8_t *trits)
{
    const int64_t group = m->grain > 0 ? m->grain : m->cols, groups = (m->cols + group - 1) / group;
    int64_t r, g;
    if (m->grain == TERN_PER_TENSOR) {
        ternarize_grain(rule, m->scale_type, w, m->cols, m->rows, m->cols, scales, trits);
        return;
    }
    for (r = 0; r < m->rows; r++)
        for (g = 0; g < groups; g++) {
            const int64_t at = r * m->cols + g * group, cols = m->cols - g * group < group ? m->cols - g * group : group;
            ternarize_grain(rule, m->scale_type, w + at, m->cols, 1, cols, &scales[r * groups + g], trits + at);
        }
}

/* Index of a stored scale, and the number of stored scales; rows are padded to panels of 16. */
static int64_t ternarize_scale_at(const tern_matrix *m, int64_t r, int64_t g, int64_t groups)
{
    return m->grain == TERN_PER_TENSOR ? 0 : (r / 16 * groups + g) * 16 + r % 16;
}

static void ternarize_compare(tern_context *c, const tern_matrix *m, const float *scales, const int8_t *trits, const char *what)
{
    const int64_t group = m->grain > 0 ? m->grain : m->cols, groups = m->grain == TERN_PER_TENSOR ? 1 : (m->cols + group - 1) / group;
    const int64_t scale_rows = m->grain == TERN_PER_TENSOR ? 1 : (m->rows + 15) / 16 * 16;
    int8_t *got = (int8_t *)malloc((size_t)(m->rows * m->cols));
    tern_unpack_args a = TERN_ZERO;
    int64_t r, g, wrong = 0;
    a.m = *m;
    a.count = m->rows;
    a.trits = got;
    CHECK_OK(c, tern_unpack(c, &a));
    CHECK(memcmp(got, trits, (size_t)(m->rows * m->cols)) == 0, "trits of %s", what);
    for (r = 0; r < scale_rows; r++)
        for (g = 0; g < groups; g++) {
            const float wanted = r < m->rows ? scales[r * groups + g] : 0.0f;
            wrong += tern__load_scale(m->scale_type, m->scales, ternarize_scale_at(m, r, g, groups)) != wanted;
        }
    CHECK(wrong == 0, "%d scales of %s", (int)wrong, what);
    free(got);
}

/* Ternarizes w [rows, cols] and compares. GIVEN takes scales made here. */
static void ternarize_check(tern_context *c, tern_rule rule, int64_t rows, int64_t cols, int32_t grain, tern_type type,
                            tern_type scale_type, float *w)
{
    tern_matrix m = ternarize_matrix(c, rows, cols, grain, test_random() & 1 ? TERN_BASE3 : TERN_2BIT, scale_type);
    const int64_t group = grain > 0 ? grain : cols, groups = grain == TERN_PER_TENSOR ? 1 : (cols + group - 1) / group;
    float *scales = test_floats(rows * groups);
    int8_t *trits = (int8_t *)malloc((size_t)(rows * cols));
    void *stored = ternarize_store(type, w, rows * cols);
    char what[120];
    int64_t r, g;
    snprintf(what, sizeof what, "%s: rule %d, %d x %d, grain %d, type %d, scales %d, encoding %d", tern_backend_name(c), (int)rule,
             (int)rows, (int)cols, (int)grain, (int)type, (int)scale_type, (int)m.encoding);
    for (r = 0; rule == TERN_GIVEN && r < (grain == TERN_PER_TENSOR ? 1 : rows); r++)
        for (g = 0; g < groups; g++)
            scales[r * groups + g] =
                tern__store_scale(scale_type, m.scales, ternarize_scale_at(&m, r, g, groups), fabsf(scales[r * groups + g]));
    ternarize_reference(&m, rule, w, scales, trits);
    CHECK_OK(c, ternarize_run(c, &m, rule, type, stored));
    ternarize_compare(c, &m, scales, trits, what);
    free(stored);
    free(trits);
    free(scales);
    ternarize_release(c, &m);
}

/* Every combination once, on the tiers in turn. One group in four is all zeros. */
static void test_ternarize_against_the_definition(void)
{
    const int64_t shapes[][2] = {{1, 1}, {1, 127}, {15, 16}, {17, 130}};
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16}, scale_types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};
    test_context t[TERN__ISA_END];
    int tiers = 0, s, g, y, p;
    tern_rule rule;
    tern_isa isa;
    int64_t i;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        t[tiers] = test_open(isa, 1);
        tiers += t[tiers].c != NULL;
    }
    for (s = 0; s < 4; s++)
        for (rule = TERN_ABSMEAN; rule <= TERN_GIVEN; rule++)
            for (g = 0; g < 9 && !tern__is_learned(rule); g++)
                for (y = 0; y < 3; y++)
                    for (p = 0; p < 4; p++) {
                        const int64_t rows = shapes[s][0], cols = shapes[s][1];
                        const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 1, 7, 16, 20, 128, (int32_t)cols, (int32_t)cols + 5};
                        float *w = test_floats(rows * cols);
                        for (i = 0; i < rows * cols; i++) w[i] = i / 16 % 4 == 1 ? 0.0f : w[i] * (i % 5 ? 1.0f : 0.05f);
                        ternarize_check(t[(s + (int)rule + g + y + p) % tiers].c, rule, rows, cols, grains[g], types[y], scale_types[p], w);
                        free(w);
                    }
    while (tiers-- > 0) test_close(&t[tiers]);
}

/* Rows longer than a block of the canonical sum, and groups as long. */
static void test_ternarize_long_rows(void)
{
    const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 1500, 1024};
    tern_isa isa;
    int g;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 2);
        for (g = 0; t.c && g < 4; g++) {
            float *w = test_floats(35 * 2500);
            ternarize_check(t.c, TERN_ABSMEAN, 35, 2500, grains[g], TERN_F32, TERN_F32, w);
            ternarize_check(t.c, TERN_TWN, 35, 2500, grains[g], TERN_F32, TERN_F32, w);
            free(w);
        }
        test_close(&t);
    }
}

/* 20 columns in groups of 16: the last group holds 4 weights of 2, whose mean is 2 and not 0.5. */
static void test_ternarize_short_tail_is_not_diluted(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_matrix m = ternarize_matrix(t.c, 1, 20, 16, TERN_2BIT, TERN_F32);
    float w[20];
    int i;
    for (i = 0; i < 20; i++) w[i] = i < 16 ? 1.0f : -2.0f;
    CHECK_OK(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, TERN_F32, w));
    CHECK(((const float *)m.scales)[0] == 1.0f && ((const float *)m.scales)[16] == 2.0f,
          "scales %g and %g", (double)((const float *)m.scales)[0], (double)((const float *)m.scales)[16]);
    ternarize_release(t.c, &m);
    test_close(&t);
}

static void ternarize_expect(tern_context *c, tern_rule rule, tern_type scale_type, float given, const float *w, int64_t n, float scale,
                             const int8_t *trits, const char *what)
{
    tern_matrix m = ternarize_matrix(c, 1, n, TERN_PER_ROW, TERN_2BIT, scale_type);
    tern__store_scale(scale_type, m.scales, 0, given);
    CHECK_OK(c, ternarize_run(c, &m, rule, TERN_F32, w));
    ternarize_compare(c, &m, &scale, trits, what);
    ternarize_release(c, &m);
}

static void test_ternarize_thresholds_are_strict(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const float next = tern__float(0x3F000001); /* above 0.5 */
    const float absmean[4] = {0.5f, -0.5f, 1.5f, -1.5f}; /* mean 1 */
    const float given[5] = {0.5f, -0.5f, 0.0f, tern__float(0x3F000001), 0.0f};
    const float twn[4] = {0.7f, -0.7f, 1.3f, -1.3f}; /* mean 1, delta 0.7f */
    const int8_t middle[4] = {0, 0, 1, -1}, above[5] = {0, 0, 0, 1, 0};
    float around[4];
    ternarize_expect(t.c, TERN_ABSMEAN, TERN_F32, 0, absmean, 4, 1.0f, middle, "absmean at the threshold");
    ternarize_expect(t.c, TERN_GIVEN, TERN_F32, 1.0f, given, 5, 1.0f, above, "given at the threshold");
    ternarize_expect(t.c, TERN_TWN, TERN_F32, 0, twn, 4, 1.3f, middle, "TWN at the threshold");
    around[0] = next; around[1] = -next; around[2] = 0.0f; around[3] = -0.0f;
    {
        const int8_t wanted[4] = {1, -1, 0, 0};
        ternarize_expect(t.c, TERN_GIVEN, TERN_F32, 1.0f, around, 4, 1.0f, wanted, "given above the threshold");
    }
    test_close(&t);
}

/* mean 1.5 is stored as 2^1 = 2, so the threshold is 1 and not 0.75; 1.999 as 2, so it is 1 and not 0.9995. */
static void test_ternarize_takes_trits_with_the_stored_scale(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const float w[4] = {0.9f, -1.1f, 2.0f, 2.0f};
    const int8_t wanted[4] = {0, -1, 1, 1};
    const float x[4] = {0.99975f, -1.1f, 2.89625f, 3.0f};
    ternarize_expect(t.c, TERN_ABSMEAN, TERN_POW2, 0, w, 4, 2.0f, wanted, "power-of-two scale");
    ternarize_expect(t.c, TERN_ABSMEAN, TERN_LOG, 0, x, 4, 2.0f, wanted, "log-lattice scale");
    test_close(&t);
}

static void test_ternarize_zeros(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const float zeros[3] = {0.0f, -0.0f, 0.0f}, tiny[3] = {1e-45f, -1e-45f, 0.0f}, w[3] = {1e-30f, 1.0f, -1.0f};
    const int8_t wanted[3] = {0, 0, 0};
    tern_rule rule;
    for (rule = TERN_ABSMEAN; rule <= TERN_TWN; rule++) {
        ternarize_expect(t.c, rule, TERN_F32, 0, zeros, 3, 0.0f, wanted, "zeros");
        ternarize_expect(t.c, rule, TERN_POW2, 0, zeros, 3, 0.0f, wanted, "zeros");
        ternarize_expect(t.c, rule, TERN_LOG, 0, zeros, 3, 0.0f, wanted, "zeros");
    }
    ternarize_expect(t.c, TERN_GIVEN, TERN_F32, 0.0f, w, 3, 0.0f, wanted, "a given scale of zero");
    ternarize_expect(t.c, TERN_GIVEN, TERN_POW2, 0.0f, w, 3, 0.0f, wanted, "a given scale of zero");
    ternarize_expect(t.c, TERN_GIVEN, TERN_LOG, 0.0f, w, 3, 0.0f, wanted, "a given scale of zero");
    { /* their mean is two thirds of the smallest number, which rounds up to it */
        const int8_t signs[3] = {1, -1, 0};
        ternarize_expect(t.c, TERN_ABSMEAN, TERN_F32, 0, tiny, 3, 1e-45f, signs, "the smallest number");
    }
    test_close(&t);
}

/* Refused with the first place, and not a byte written. */
static void test_ternarize_refuses_what_is_not_finite(void)
{
    enum { ROWS = 33, COLS = 70 };
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16};
    const float bad[] = {NAN, INFINITY, -INFINITY, 79228162514264337593543950336.0f};
    const int64_t places[] = {0, 69, 70 * 17 + 3, ROWS * COLS - 1};
    const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 16};
    test_context t = test_open(TERN_ISA_BEST, 3);
    int b, p, y, g;
    for (b = 0; b < 4; b++)
        for (p = 0; p < 4; p++)
            for (y = 0; y < 3; y++)
                for (g = 0; g < 3; g++) {
                    tern_matrix m = ternarize_matrix(t.c, ROWS, COLS, grains[g], TERN_2BIT, TERN_F32);
                    float *w = test_floats(ROWS * COLS);
                    void *stored;
                    size_t trits = 0, scales = 0, i, written = 0;
                    char place[64];
                    CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trits, &scales));
                    memset(m.trits, 0xA5, trits);
                    memset(m.scales, 0xA5, scales);
                    w[places[p]] = bad[b];
                    w[ROWS * COLS - 1] = bad[b];
                    stored = ternarize_store(types[y], w, ROWS * COLS);
                    snprintf(place, sizeof place, "weights[%d][%d] is not", (int)(places[p] / COLS), (int)(places[p] % COLS));
                    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, types[y], stored), TERN_E_NONFINITE, place);
                    for (i = 0; i < trits; i++) written += ((const uint8_t *)m.trits)[i] != 0xA5;
                    for (i = 0; i < scales; i++) written += ((const uint8_t *)m.scales)[i] != 0xA5;
                    CHECK(written == 0, "%d bytes written", (int)written);
                    free(stored);
                    free(w);
                    ternarize_release(t.c, &m);
                }
    test_close(&t);
}

static void test_ternarize_largest_weights(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const float largest = tern__float(0x6F7FFFFF); /* below 2^96 */
    float *w = test_floats(40 * 3000);
    int64_t i;
    for (i = 0; i < 40 * 3000; i++) w[i] = i % 2 ? largest : -largest;
    ternarize_check(t.c, TERN_ABSMEAN, 40, 3000, TERN_PER_TENSOR, TERN_F32, TERN_F32, w);
    ternarize_check(t.c, TERN_TWN, 40, 3000, TERN_PER_ROW, TERN_F32, TERN_POW2, w);
    free(w);
    test_close(&t);
}

static void test_ternarize_bad_arguments(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_matrix m = ternarize_matrix(t.c, 4, 8, TERN_PER_ROW, TERN_2BIT, TERN_F32), broken;
    float w[33] = {0};
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_DENSE, TERN_F32, w), TERN_E_ARGUMENT, "rule 6 does not ternarize");
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, (tern_rule)-1, TERN_F32, w), TERN_E_ARGUMENT, "does not ternarize");
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, TERN_I8, w), TERN_E_ARGUMENT, "type 4 is not");
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, TERN_F32, NULL), TERN_E_ARGUMENT, "w is NULL");
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, TERN_F32, (const char *)w + 2), TERN_E_ALIGNMENT, "w is not aligned to 4");
    CHECK_FAILS(t.c, ternarize_run(t.c, &m, TERN_ABSMEAN, TERN_F16, (const char *)w + 1), TERN_E_ALIGNMENT, "w is not aligned to 2");
    broken = m;
    broken.trits = NULL;
    CHECK_FAILS(t.c, ternarize_run(t.c, &broken, TERN_ABSMEAN, TERN_F32, w), TERN_E_ARGUMENT, "m.trits is NULL");
    broken = m;
    broken.scales = (char *)m.scales + 1;
    CHECK_FAILS(t.c, ternarize_run(t.c, &broken, TERN_ABSMEAN, TERN_F32, w), TERN_E_ALIGNMENT, "m.scales is not aligned");
    CHECK_FAILS(t.c, tern_ternarize(t.c, NULL), TERN_E_ARGUMENT, "args is NULL");
    ternarize_release(t.c, &m);
    test_close(&t);
}

/* -- learned scales, averaged scales, noise -- */

/* As ternarize_run, with every option. */
static tern_ternarize_args ternarize_args(const tern_matrix *m, tern_rule rule, const void *w)
{
    tern_ternarize_args a;
    memset(&a, 0, sizeof a);
    a.m = *m;
    a.rule = rule;
    a.w = w;
    return a;
}

/* LSQ with one scale, SEQ with one for each row; alpha: not set yet, set, negative. */
static void ternarize_learned(tern_context *c, tern_rule rule, int64_t rows, int64_t cols, tern_type type, tern_type scale_type, float set)
{
    tern_matrix m = ternarize_matrix(c, rows, cols, rule == TERN_LSQ ? TERN_PER_TENSOR : TERN_PER_ROW, TERN_BASE3, scale_type);
    const int64_t grains = rule == TERN_LSQ ? 1 : rows, grain_rows = rule == TERN_LSQ ? rows : 1;
    float *w = test_floats(rows * cols), *alpha = test_floats(rows), *scales = test_floats(rows);
    int8_t *trits = (int8_t *)malloc((size_t)(rows * cols));
    void *stored = ternarize_store(type, w, rows * cols);
    tern_ternarize_args a = ternarize_args(&m, rule, stored);
    int64_t g, j, count;
    for (g = 0; g < grains; g++) alpha[g] = set * (1.0f + 0.1f * (float)(g % 5));
    a.type = type;
    a.alpha = alpha;
    CHECK_OK(c, tern_ternarize(c, &a));
    for (g = 0; g < grains; g++) {
        const float *at = w + g * grain_rows * cols;
        float want = 0.0f;
        if (set != 0.0f) want = set * (1.0f + 0.1f * (float)(g % 5));
        else if (rule == TERN_LSQ) want = ternarize_sum(w, cols, rows, cols, -1.0f, &count) / (float)(rows * cols);
        else for (j = 0; j < cols; j++) want = fmaxf(want, fabsf(at[j]));
        if (want < 1e-5f) want = 1e-5f;
        CHECK(alpha[g] == want, "alpha[%d] is %g, not %g", (int)g, (double)alpha[g], (double)want);
        scales[g] = ternarize_stored(scale_type, rule == TERN_SEQ ? want / 1.5f : want);
        for (j = 0; j < grain_rows * cols; j++) {
            const double limit = rule == TERN_SEQ ? 0.99 : 1.0, factor = rule == TERN_SEQ ? 1.5 : 1.0;
            const double x = factor * fmax(-limit, fmin(limit, (double)at[j] / want)); /* the formula of the papers */
            trits[g * grain_rows * cols + j] = (int8_t)((at[j] > scales[g] / 2) - (at[j] < -scales[g] / 2));
            CHECK((scale_type != TERN_F32 && scale_type != TERN_TYPE_DEFAULT) || fabs(fabs(x) - 0.5) < 1e-6
                  || trits[g * grain_rows * cols + j] == (int)rint(x), "rule %d: weight %d", (int)rule, (int)j);
        }
    }
    ternarize_compare(c, &m, scales, trits, "a learned scale");
    free(w);
    free(alpha);
    free(scales);
    free(trits);
    free(stored);
    ternarize_release(c, &m);
}

static void test_ternarize_learned_scales(void)
{
    const int64_t shapes[][2] = {{1, 1}, {15, 127}, {17, 16}, {16, 17}, {3, 4097}};
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16}, scale_types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};
    const float set[] = {0.0f, 0.8f, -0.5f};
    tern_isa isa;
    int s, i, k;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 3);
        for (s = 0; t.c && s < 5; s++)
            for (i = 0; i < 4; i++)
                for (k = 0; k < 6; k++)
                    ternarize_learned(t.c, k & 1 ? TERN_SEQ : TERN_LSQ, shapes[s][0], shapes[s][1], types[(i + k) % 3],
                                      scale_types[i], set[k / 2]);
        test_close(&t);
    }
}

/* 0.75 old + 0.25 new where there is an old one, and trits with that. */
static void test_ternarize_averaged_scales(void)
{
    const tern_rule rules[] = {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN};
    tern_isa isa;
    int k;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 2);
        for (k = 0; t.c && k < 9; k++) {
            const int32_t grain = k / 3 == 0 ? TERN_PER_TENSOR : k / 3 == 1 ? TERN_PER_ROW : 20;
            const int64_t groups = k / 3 == 2 ? 3 : 1, scale_rows = k / 3 == 0 ? 1 : 17;
            tern_matrix m = ternarize_matrix(t.c, 17, 50, grain, TERN_2BIT, TERN_F32);
            float *first = test_floats(850), *second = test_floats(850), old[51], want[51];
            int8_t trits[850];
            tern_ternarize_args a = ternarize_args(&m, rules[k % 3], first);
            int64_t i, r;
            for (i = 0; i < 850; i++) second[i] *= 3.0f;
            a.rho = 0.75f;
            CHECK_OK(t.c, tern_ternarize(t.c, &a)); /* scales were 0 */
            ternarize_reference(&m, a.rule, first, old, trits);
            ternarize_compare(t.c, &m, old, trits, "the first of an average");
            a.w = second;
            CHECK_OK(t.c, tern_ternarize(t.c, &a));
            ternarize_reference(&m, a.rule, second, want, trits);
            for (i = 0; i < scale_rows * groups; i++) want[i] = 0.75f * old[i] + 0.25f * want[i];
            for (r = 0; a.rule != TERN_TWN && r < 17; r++)
                for (i = 0; i < 50; i++) {
                    const float scale = want[grain == TERN_PER_TENSOR ? 0 : r * groups + (grain > 0 ? i / grain : 0)],
                                w = second[r * 50 + i];
                    trits[r * 50 + i] = (int8_t)((w > scale / 2) - (w < -scale / 2));
                }
            ternarize_compare(t.c, &m, want, trits, "an average");
            free(first);
            free(second);
            ternarize_release(t.c, &m);
        }
        test_close(&t);
    }
}

enum { NOISY_ROWS = 37, NOISY_COLS = 541 };

/* Trits of noisy weights with scale 1: each by its own random word, and none outside the zone. */
static void ternarize_noisy(tern_context *c, const tern_ternarize_args *a, int8_t *trits)
{
    const float *w = (const float *)a->w;
    tern_unpack_args u = TERN_ZERO;
    int64_t i, near_zone = 0, plus = 0;
    double mean = 0.0;
    CHECK_OK(c, tern_ternarize(c, a));
    u.m = a->m;
    u.count = NOISY_ROWS;
    u.trits = trits;
    CHECK_OK(c, tern_unpack(c, &u));
    for (i = 0; i < NOISY_ROWS * NOISY_COLS; i++) {
        uint32_t random[4];
        float x = w[i], noise;
        tern__philox(a->seed, (uint64_t)i / 4, a->step, a->stream, random);
        noise = (float)(((double)(random[i % 4] >> 8) + 0.5) / 8388608.0 - 1.0); /* (-1, 1), symmetric */
        if (fabsf(fabsf(x) - 0.5f) < a->zone) {
            x += a->noise * noise;
            mean += (double)noise;
            near_zone++;
            plus += trits[i] != 0;
        }
        CHECK(trits[i] == (x > 0.5f) - (x < -0.5f), "weight %d, %g, became %d", (int)i, (double)w[i], trits[i]);
    }
    /* uniform: variance 1/3, bounds of five deviations; |w| = 0.45 or 0.55 in the zone passes 0.5 one way as often as the other */
    CHECK(fabs(mean / (double)near_zone) < 5.0 / sqrt(3.0 * (double)near_zone), "the mean of the noise is %g", mean / (double)near_zone);
    CHECK(fabs((double)plus / (double)near_zone - 0.5) < 2.5 / sqrt((double)near_zone),
          "%g of the weights near the threshold are not 0", (double)plus / (double)near_zone);
}

static void test_ternarize_noise(void)
{
    const float levels[] = {0.45f, 0.55f, -0.45f, -0.55f, 0.35f, -0.65f}; /* the last two outside the zone, within the noise */
    static int8_t first[NOISY_ROWS * NOISY_COLS], again[NOISY_ROWS * NOISY_COLS], golden[NOISY_ROWS * NOISY_COLS];
    float *w = test_floats(NOISY_ROWS * NOISY_COLS);
    tern_isa isa;
    int i, k;
    for (i = 0; i < NOISY_ROWS * NOISY_COLS; i++) w[i] = levels[test_random() % 6];
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (k = 0; k < 2; k++) {
            test_context t = test_open(isa, 1 + 2 * k);
            tern_ternarize_args a;
            tern_matrix m;
            if (!t.c) break;
            m = ternarize_matrix(t.c, NOISY_ROWS, NOISY_COLS, TERN_PER_ROW, k ? TERN_BASE3 : TERN_2BIT, TERN_F32);
            for (i = 0; i < NOISY_ROWS; i++) ((float *)m.scales)[ternarize_scale_at(&m, i, 0, 1)] = 1.0f;
            a = ternarize_args(&m, TERN_GIVEN, w);
            a.noise = 0.2f;
            a.zone = 0.1f;
            a.seed = 77;
            a.step = 1;
            a.stream = 3;
            ternarize_noisy(t.c, &a, first);
            if (isa == TERN_ISA_SCALAR && k == 0) memcpy(golden, first, sizeof golden);
            CHECK(memcmp(first, golden, sizeof golden) == 0, "a tier or thread count has noise of its own");
            a.step = 2;
            ternarize_noisy(t.c, &a, again);
            CHECK(memcmp(first, again, sizeof again) != 0, "two steps have the same noise");
            a.step = 1;
            a.stream = 4;
            ternarize_noisy(t.c, &a, again);
            CHECK(memcmp(first, again, sizeof again) != 0, "two streams have the same noise");
            a.stream = 3;
            a.seed = 78;
            ternarize_noisy(t.c, &a, again);
            CHECK(memcmp(first, again, sizeof again) != 0, "two seeds have the same noise");
            ternarize_release(t.c, &m);
            test_close(&t);
        }
    free(w);
}

/* Refused by name, with nothing written. */
static void test_ternarize_options_refused(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_matrix m = ternarize_matrix(t.c, 17, 40, TERN_PER_ROW, TERN_2BIT, TERN_F32);
    float *w = test_floats(680), alpha[17] = {0.0f};
    tern_ternarize_args good = ternarize_args(&m, TERN_SEQ, w), a;
    size_t i, trits = 0, scales = 0, written = 0;
    good.alpha = alpha;
    CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trits, &scales));
    memset(m.trits, 0xA5, trits);
    memset(m.scales, 0xA5, scales);
    a = good; a.rule = TERN_LSQ;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rule lsq learns one scale for the tensor; a grain of -1");
    a = good; a.rule = TERN_LSQ; a.m.grain = 8;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rule lsq learns one scale for the tensor; a grain of 8");
    a = good; a.m.grain = TERN_PER_TENSOR;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rule seq learns a scale for each row; the grain is 0");
    a = good; a.m.grain = 8;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rule seq learns a scale for each row; the grain is 8");
    a = good; a.alpha = NULL; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "alpha is NULL");
    a = good; a.alpha = (float *)(void *)((char *)alpha + 1);
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ALIGNMENT, "alpha is not aligned");
    a = good; a.rho = 0.5f;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho averages scales taken from the weights; those of rule 4");
    a = good; a.rule = TERN_GIVEN; a.rho = 0.5f; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho averages");
    a = good; a.rule = TERN_ABSMEAN; a.rho = 1.0f; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho is not in [0, 1)");
    a = good; a.rule = TERN_ABSMEAN; a.rho = -0.1f; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho is not in [0, 1)");
    a = good; a.rule = TERN_ABSMEAN; a.rho = NAN; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho is not in [0, 1)");
    a = good; a.rule = TERN_ABSMEAN; a.rho = 0.5f; a.m.scale_type = TERN_F16;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "rho needs scales of TERN_F32");
    a = good; a.noise = -1.0f; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "noise or zone");
    a = good; a.zone = INFINITY; CHECK_FAILS(t.c, tern_ternarize(t.c, &a), TERN_E_ARGUMENT, "noise or zone");
    alpha[16] = NAN;
    CHECK_FAILS(t.c, tern_ternarize(t.c, &good), TERN_E_NONFINITE, "alpha[16] is not a finite number");
    for (i = 0; i < trits; i++) written += ((const uint8_t *)m.trits)[i] != 0xA5;
    for (i = 0; i < scales; i++) written += ((const uint8_t *)m.scales)[i] != 0xA5;
    CHECK(written == 0 && alpha[0] == 0.0f, "%d bytes written, alpha[0] is %g", (int)written, (double)alpha[0]);
    free(w);
    ternarize_release(t.c, &m);
    test_close(&t);
}

/* -- with room to put back what was there -- */

enum { SPARE_ROWS = 35, SPARE_COLS = 70 };
typedef struct spared { uint8_t trits[8192]; float scales[48 * 5], alpha[SPARE_ROWS]; } spared;

/* Into `to`, which holds what was there before, and may be put into as many bytes of memory as `spare` has. */
static tern_result ternarize_spared(tern_context *c, tern_ternarize_args a, spared *to, size_t spare)
{
    tern_result result;
    a.m.trits = to->trits;
    a.m.scales = to->scales;
    a.alpha = to->alpha;
    a.spare_bytes = spare;
    a.spare = spare ? malloc(spare) : NULL;
    if (spare) memset(a.spare, 0xA5, spare);
    result = tern_ternarize(c, &a);
    free(a.spare);
    return result;
}

/* The same with spare memory and without, also when the weights are refused; one byte less is as none. */
static void test_ternarize_spare(void)
{
    static const tern_rule rules[] = {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN, TERN_GIVEN, TERN_LSQ, TERN_SEQ};
    static const tern_type types[] = {TERN_F32, TERN_BF16, TERN_F16};
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 16};
    static spared before, wanted, got;
    int isa, threads, r, y, g, b;
    size_t i;
    for (i = 0; i < sizeof before.trits; i++) before.trits[i] = (uint8_t)test_random();
    for (i = 0; i < 48 * 5; i++) before.scales[i] = 0.25f + (float)(i % 7);
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (threads = 1; threads < 4; threads += 2) {
            test_context t = test_open((tern_isa)isa, threads);
            for (r = 0; t.c && r < 6; r++)
                for (y = 0; y < 3; y++)
                    for (g = 0; g < 3; g++) {
                        tern_matrix m =
                            ternarize_matrix(t.c, SPARE_ROWS, SPARE_COLS, grains[g], isa & 1 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
                        float *w = test_floats(SPARE_ROWS * SPARE_COLS);
                        tern_ternarize_args a = ternarize_args(&m, rules[r], NULL);
                        size_t trits = 0, scales = 0, all;
                        void *stored;
                        a.type = types[y];
                        CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trits, &scales));
                        all = trits + scales + (rules[r] == TERN_LSQ ? 1 : rules[r] == TERN_SEQ ? SPARE_ROWS : 0) * sizeof(float);
                        if (rules[r] <= TERN_TWN && rules[r] != TERN_GIVEN) a.rho = 0.5f;
                        for (b = 0; b < 3 && !(rules[r] == TERN_LSQ && g) && !(rules[r] == TERN_SEQ && g != 1); b++) {
                            for (i = 0; i < SPARE_ROWS; i++) before.alpha[i] = (i + (size_t)y) % 3 ? 0.3f : i % 2 ? 1e-6f : 0.0f;
                            if (b == 1) w[SPARE_COLS * 17 + 3] = w[SPARE_COLS * SPARE_ROWS - 1] = NAN;
                            if (b == 2) w[0] = INFINITY;
                            a.w = stored = ternarize_store(types[y], w, SPARE_ROWS * SPARE_COLS);
                            wanted = got = before;
                            if (b == 0) {
                                CHECK_OK(t.c, ternarize_spared(t.c, a, &wanted, 0));
                                CHECK_OK(t.c, ternarize_spared(t.c, a, &got, all));
                                CHECK(memcmp(&wanted, &before, sizeof wanted) != 0, "nothing happened");
                            } else {
                                const char *place = b == 1 ? "weights[17][3] is not" : "weights[0][0] is not";
                                CHECK_FAILS(t.c, ternarize_spared(t.c, a, &wanted, all - 1), TERN_E_NONFINITE, place);
                                CHECK_FAILS(t.c, ternarize_spared(t.c, a, &got, all), TERN_E_NONFINITE, place);
                                CHECK(memcmp(&wanted, &before, sizeof wanted) == 0, "rule %d: something is written", (int)rules[r]);
                            }
                            CHECK(memcmp(&wanted, &got, sizeof wanted) == 0, "%s: rule %d, type %d, grain %d, weights %d",
                                  test_tier_name[isa], (int)rules[r], (int)types[y], (int)grains[g], b);
                            free(stored);
                        }
                        free(w);
                        ternarize_release(t.c, &m);
                    }
            test_close(&t);
        }
}

static void suite_ternarize(void)
{
    RUN(test_ternarize_against_the_definition);
    RUN(test_ternarize_long_rows);
    RUN(test_ternarize_short_tail_is_not_diluted);
    RUN(test_ternarize_thresholds_are_strict);
    RUN(test_ternarize_takes_trits_with_the_stored_scale);
    RUN(test_ternarize_zeros);
    RUN(test_ternarize_refuses_what_is_not_finite);
    RUN(test_ternarize_largest_weights);
    RUN(test_ternarize_bad_arguments);
    RUN(test_ternarize_learned_scales);
    RUN(test_ternarize_averaged_scales);
    RUN(test_ternarize_noise);
    RUN(test_ternarize_options_refused);
    RUN(test_ternarize_spare);
}
