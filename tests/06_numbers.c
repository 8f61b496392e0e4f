/* [TERN-6] Numbers: conversions, Philox, canonical sums, elementary functions.
   Mutations that test_numbers_log saw: a logarithm cut off instead of rounded. */

/* -- f16 and bf16 -- */

/* x rounded to nearest even with this many fraction bits and this smallest exponent, in float64. */
static double numbers_nearest(double x, int fraction_bits, int least_exponent)
{
    int e;
    double unit;
    if (x == 0) return x;
    frexp(x, &e);
    e = e - 1 < least_exponent ? least_exponent : e - 1;
    unit = ldexp(1.0, e - fraction_bits);
    return rint(x / unit) * unit;
}

static double numbers_nearest_f16(float x)
{
    const double y = numbers_nearest((double)x, 10, -14);
    return y > 65504.0 ? (double)INFINITY : y < -65504.0 ? -(double)INFINITY : y;
}

/* A carry stops at the largest number. */
static double numbers_nearest_bf16(float x)
{
    const double y = numbers_nearest((double)x, 7, -126), largest = ldexp(255.0, 120);
    return tern__finite(x) && fabs(y) > largest ? copysign(largest, y) : y;
}

static int numbers_same(double a, double b) { return a == b && !signbit(a) == !signbit(b); }

static void numbers_check_conversions(float x)
{
    CHECK(numbers_same((double)tern__from_f16(tern__to_f16(x)), numbers_nearest_f16(x)), "f16 of %a", (double)x);
    CHECK(numbers_same((double)tern__from_bf16(tern__to_bf16(x)), numbers_nearest_bf16(x)), "bf16 of %a", (double)x);
}

static void test_numbers_every_16_bit_pattern_returns(void)
{
    int64_t i;
    for (i = 0; i < 65536; i++) {
        const uint16_t h = (uint16_t)i;
        const float f16 = tern__from_f16(h), bf16 = tern__from_bf16(h);
        const int fraction = h & 1023, exponent = h >> 10 & 31;
        if (f16 != f16) CHECK(tern__to_f16(f16) == ((h & 0x8000) | 0x7E00) && exponent == 31 && fraction, "NaN %04x", h);
        else CHECK(tern__to_f16(f16) == h, "f16 %04x", h);
        if (exponent < 31)
            CHECK(numbers_same((double)f16, copysign(ldexp(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25),
                                                     h >> 15 ? -1 : 1)), "f16 %04x is %g", h, (double)f16);
        CHECK(tern__bits(bf16) == (uint32_t)h << 16, "bf16 %04x", h);
        if (bf16 != bf16) CHECK(tern__from_bf16(tern__to_bf16(bf16)) != tern__from_bf16(tern__to_bf16(bf16)), "NaN %04x", h);
        else CHECK(tern__to_bf16(bf16) == h, "bf16 %04x", h);
    }
    CHECK(tern__from_f16(0x7C00) == INFINITY && tern__from_f16(0xFC00) == -INFINITY, "f16 infinities");
    CHECK(isnan(tern__from_bf16(tern__to_bf16(tern__float(0x7F800001)))), "a NaN whose payload lies in the low half stays NaN");
}

static void test_numbers_rounding_to_16_bits(void)
{
    uint32_t u;
    int64_t i;
    int d;
    for (u = 0; u < 0xFFFFF000u; u += 6301)
        if (tern__finite(tern__float(u))) numbers_check_conversions(tern__float(u));
    for (i = 0; i < 65536; i++) /* each tie between neighbours and the floats around it */
        for (d = -1; d <= 1; d++) {
            const float h = tern__from_f16((uint16_t)i), next = tern__from_f16((uint16_t)(i + 1));
            const float b = tern__float(((uint32_t)i << 16) + 0x8000u + (uint32_t)d);
            if (tern__finite(h) && tern__finite(next) && (i & 0x7FFF) != 0x7FFF)
                numbers_check_conversions(tern__float(tern__bits((h + next) * 0.5f) + (uint32_t)d));
            if (tern__finite(b)) numbers_check_conversions(b);
        }
    CHECK(tern__to_f16(65519.996f) == 0x7BFF && tern__to_f16(65520.0f) == 0x7C00, "the last f16");
    CHECK(tern__to_f16(-1e30f) == 0xFC00 && tern__to_bf16(INFINITY) == 0x7F80 && tern__to_bf16(-INFINITY) == 0xFF80, "infinities");
    CHECK(tern__to_bf16(3.4028235e38f) == 0x7F7F && tern__to_bf16(-3.4028235e38f) == 0xFF7F, "no carry into infinity");
}

/* Power-of-two scales: nearest in the logarithm. */
static void test_numbers_pow2(void)
{
    uint32_t u;
    int e;
    for (u = 0x00800000; u < 0x7F800000u; u += 3571) {
        const double exponent = floor(log2((double)tern__float(u)) + 0.5);
        const int wanted = exponent < -126 ? -126 : exponent > 126 ? 126 : (int)exponent;
        CHECK(tern__to_pow2(tern__float(u)) == wanted, "%g gives %d", (double)tern__float(u), tern__to_pow2(tern__float(u)));
    }
    for (e = -125; e <= 125; e++) { /* on either side of sqrt(2) 2^e */
        CHECK(tern__to_pow2(tern__float((uint32_t)(e + 127) << 23 | 0x3504F3)) == e, "below the middle of 2^%d", e);
        CHECK(tern__to_pow2(tern__float((uint32_t)(e + 127) << 23 | 0x3504F4)) == e + 1, "above the middle of 2^%d", e);
    }
    for (e = -126; e <= 126; e++) {
        CHECK((double)tern__from_pow2((int8_t)e) == ldexp(1.0, e), "2^%d", e);
        CHECK(tern__to_pow2(tern__from_pow2((int8_t)e)) == e, "2^%d returns", e);
    }
    CHECK(tern__to_pow2(0.0f) == INT8_MIN && tern__from_pow2(INT8_MIN) == 0.0f, "zero");
    CHECK(tern__to_pow2(1e-45f) == -126, "subnormal");
}

/* Log-lattice scales: 2^(L/256) to 16 bits, L the nearest in the logarithm. All L; all mantissas. */
static void test_numbers_log(void)
{
    int64_t l, u, wrong = 0;
    for (l = INT16_MIN; l <= INT16_MAX; l++) {
        const float s = tern__from_log((int16_t)l);
        const int64_t floor8 = (l + 32768) / 256 - 128;
        const long double number = rintl(32768.0L * exp2l((long double)(l - 256 * floor8) / 256.0L));
        CHECK((long double)s == (l < -126 * 256 ? 0.0L : ldexpl(number, (int)floor8 - 15)), "L = %d is %g", (int)l, (double)s);
        CHECK(tern__to_log(s) == (l < -126 * 256 ? INT16_MIN : l), "L = %d returns as %d", (int)l, tern__to_log(s));
    }
    for (u = 0x3F800000; u < 0x40000000; u++)
        wrong += tern__to_log(tern__float((uint32_t)u)) != (int)floor(256.0 * log2((double)tern__float((uint32_t)u)) + 0.5);
    CHECK(wrong == 0, "%d mantissas are not rounded to the nearest L", (int)wrong);
    for (u = 0x00800000; u < 0x7F800000; u += 3571) {
        const double wanted = fmax(-126 * 256, fmin(32767, floor(256.0 * log2((double)tern__float((uint32_t)u)) + 0.5)));
        CHECK(tern__to_log(tern__float((uint32_t)u)) == (int)wanted,
              "%g gives %d", (double)tern__float((uint32_t)u), tern__to_log(tern__float((uint32_t)u)));
    }
    CHECK(tern__to_log(99.9f) == 1700 && fabs((double)tern__from_log(1700) - 99.776) < 0.001, "99.9");
    CHECK(tern__to_log(0.0f) == INT16_MIN && tern__to_log(-0.0f) == INT16_MIN && tern__from_log(INT16_MIN) == 0.0f, "zero");
    CHECK(tern__to_log(1e-45f) == -126 * 256 && tern__to_log(1.1e-38f) == -126 * 256, "subnormal");
    CHECK(tern__to_log(3.4028235e38f) == INT16_MAX && tern__to_log(INFINITY) == INT16_MAX && tern__finite(tern__from_log(INT16_MAX)),
          "the largest");
}

/* -- stochastic rounding -- */

typedef uint16_t numbers_rounding(float x, uint32_t random);

/* Over all 65536 random numbers: is the mean of the rounded values x, and are they its two neighbours? */
static int numbers_rounds_well(numbers_rounding *rounding, float x)
{
    const double low = (double)tern__float(tern__bits(x) & 0xFFFF0000u),
                 high = (double)tern__float((tern__bits(x) & 0xFFFF0000u) + 0x10000u);
    const double p = ((double)x - low) / (high - low), mean = (double)x, variance = p * (1 - p) * (high - low) * (high - low);
    double sum = 0, squares = 0;
    uint32_t r;
    for (r = 0; r < 65536; r++) {
        const double d = ((double)tern__from_bf16(rounding(x, r)) - mean) / (high - low);
        sum += d;
        squares += d * d;
    }
    return fabs(sum / 65536) < 1e-9 && fabs(squares / 65536 - variance / ((high - low) * (high - low))) < 1e-9;
}

/* Wrong ones: a whole 1.0 up or down on every inexact update, and steps of two; the mean of both is x. */
static uint16_t numbers_add_one(float x, uint32_t random)
{
    return tern__to_bf16(tern__from_bf16(tern__to_bf16_with(x, random)) + (random & 1 ? 1.0f : -1.0f));
}
static uint16_t numbers_two_steps(float x, uint32_t random)
{
    return (uint16_t)((tern__bits(x) >> 16) + (random < (tern__bits(x) & 0xFFFF) / 2 ? 2 : 0));
}
static uint16_t numbers_truncation(float x, uint32_t random) { (void)random; return (uint16_t)(tern__bits(x) >> 16); }
static uint16_t numbers_nearest_rounding(float x, uint32_t random) { (void)random; return tern__to_bf16(x); }

static void test_numbers_stochastic_rounding(void)
{
    const float values[] = {1.0f, 1.001f, -1.001f, 1.9999f, 3e-5f, -7.77e10f, 1.00390625f, 1e-39f, 0.33333333f};
    const float wrong = tern__float(0x42C82000); /* 100.0625: an eighth of a step */
    int i;
    for (i = 0; i < 9; i++) CHECK(numbers_rounds_well(tern__to_bf16_with, values[i]), "%g", (double)values[i]);
    CHECK(!numbers_rounds_well(numbers_add_one, wrong) && !numbers_rounds_well(numbers_two_steps, wrong),
          "the test must see a variance that is too large");
    CHECK(!numbers_rounds_well(numbers_truncation, wrong), "the test must see a mean that drifts");
    CHECK(!numbers_rounds_well(numbers_nearest_rounding, wrong), "the test must see rounding to nearest");
    for (i = 0; i < 65536; i += 5) {
        const uint32_t r = (uint32_t)i;
        CHECK(tern__to_bf16_with(3.4028235e38f, r) == 0x7F7F && tern__to_bf16_with(-3.4028235e38f, r) == 0xFF7F, "no carry into infinity");
        CHECK(tern__to_bf16_with(INFINITY, r) == 0x7F80 && tern__to_bf16_with(-INFINITY, r) == 0xFF80, "infinity passes");
        CHECK(isnan(tern__from_bf16(tern__to_bf16_with(tern__float(0x7F800001), r))), "NaN passes");
    }
}

/* -- random numbers -- */

/* The published known answers of Philox4x32-10 (Random123: zeros, ones, digits of pi). */
static void test_numbers_philox(void)
{
    static const uint32_t wanted[3][4] = {
        {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}
    };
    uint32_t out[3][4];
    tern__philox(0, 0, 0, 0, out[0]);
    tern__philox(UINT64_MAX, UINT64_MAX, UINT32_MAX, UINT32_MAX, out[1]);
    tern__philox(UINT64_C(0x299f31d0a4093822), UINT64_C(0x85a308d3243f6a88), 0x13198a2e, 0x03707344, out[2]);
    CHECK(memcmp(out, wanted, sizeof out) == 0, "%08x %08x %08x", (unsigned)out[0][0], (unsigned)out[1][0], (unsigned)out[2][0]);
}

/* Against its definition: eight uniforms of 16 bits, centred, over the standard deviation of their sum. */
static void test_numbers_normal_by_definition(void)
{
    const double deviation = sqrt(8 * (4294967296.0 - 1) / 12);
    uint64_t i;
    for (i = 0; i < 2000; i++) {
        uint32_t w[4];
        double sum = -8 * 32767.5, got = (double)tern__normal(42, i, 3);
        int j;
        tern__philox(42, i, 0, 3, w);
        for (j = 0; j < 4; j++) sum += (double)(w[j] & 0xFFFF) + (double)(w[j] >> 16);
        CHECK(fabs(got * deviation / sum - 1) < 2e-7, "element %d is %g, not %g", (int)i, got, sum / deviation);
    }
}

/* The sum of eight uniforms has kurtosis 3 - 1.2/8; the bounds are five standard errors. */
static void test_numbers_normal(void)
{
    enum { N = 200000 };
    double sum = 0, squares = 0, fourth = 0, neighbours = 0, streams = 0, before = 0, largest = 0;
    const double error = 5 / sqrt((double)N);
    int i;
    for (i = 0; i < N; i++) {
        const double x = (double)tern__normal(42, (uint64_t)i, 3);
        sum += x;
        squares += x * x;
        fourth += x * x * x * x;
        neighbours += x * before;
        streams += x * (double)tern__normal(42, (uint64_t)i, 4);
        if (fabs(x) > largest) largest = fabs(x);
        before = x;
    }
    printf("  normal: mean %.5f, variance %.5f, kurtosis %.4f, correlations %.5f %.5f, largest %.3f\n", sum / N, squares / N,
           fourth / N / (squares / N) / (squares / N), neighbours / N, streams / N, largest);
    CHECK(fabs(sum / N) < error, "mean");
    CHECK(fabs(squares / N - 1) < error * sqrt(1.85), "variance");
    CHECK(fabs(fourth / N / (squares / N) / (squares / N) - 2.85) < error * 4, "kurtosis");
    CHECK(fabs(neighbours / N) < error && fabs(streams / N) < error, "correlation");
    CHECK(largest < 4.9, "largest");
    CHECK(tern__normal(42, UINT64_C(1) << 40, 3) != tern__normal(42, 0, 3) && tern__normal(43, 0, 3) != tern__normal(42, 0, 3),
          "all of the key counts");
}

/* -- canonical sums -- */

/* Up to 1024: zero-padded to 64 lanes x 16, down the lanes in order, then halves; above: the same rule over
   the sums of blocks of 1024. */
static float numbers_sum(int64_t n, const float *x)
{
    float lane[64];
    int64_t i, half;
    if (n > 1024) {
        const int64_t blocks = (n + 1023) / 1024;
        float *sums = (float *)malloc(sizeof(float) * (size_t)blocks), total;
        for (i = 0; i < blocks; i++) sums[i] = numbers_sum(i < blocks - 1 ? 1024 : n - 1024 * i, x + 1024 * i);
        total = numbers_sum(blocks, sums);
        free(sums);
        return total;
    }
    for (i = 0; i < 64; i++) {
        int64_t row;
        lane[i] = 0.0f;
        for (row = 0; row < 16; row++) lane[i] += 64 * row + i < n ? x[64 * row + i] : 0.0f;
    }
    for (half = 32; half >= 1; half /= 2)
        for (i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

static void test_numbers_canonical_sum(void)
{
    const int64_t sizes[] = {1, 2, 63, 64, 65, 127, 1023, 1024, 1025, 2047, 2048, 4097, 1024 * 1024 - 1, 1024 * 1024, 1024 * 1024 + 3,
                             1024 * 1025 + 1};
    const int64_t largest = 1024 * 1025 + 1;
    float *x = test_floats(largest), *parts[3];
    tern_isa isa;
    int64_t i, kind;
    parts[TERN_SUM] = x;
    parts[TERN_SUM_ABS] = test_floats(largest);
    parts[TERN_SUM_SQUARES] = test_floats(largest);
    for (i = 0; i < largest; i++) {
        if (i % 7 == 0) x[i] *= 1e4f;
        parts[TERN_SUM_ABS][i] = fabsf(x[i]);
        parts[TERN_SUM_SQUARES][i] = x[i] * x[i];
    }
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        test_context t = test_open(isa, 2);
        if (!t.c) continue;
        CHECK(tern__sum_of((const tern__kernels *)t.c->run.backend->data, TERN_SUM, 0, x) == 0.0f, "nothing");
        for (kind = TERN_SUM; kind <= TERN_SUM_SQUARES; kind++)
            for (i = 0; i < 16; i++) {
                const float wanted = numbers_sum(sizes[i], parts[kind]);
                float got[2] = {0.0f, 2.5f};
                tern_sum_args a = TERN_ZERO;
                a.kind = (tern_sum_kind)kind;
                a.count = sizes[i];
                a.x = x;
                a.y = got;
                CHECK_OK(t.c, tern_sum(t.c, &a));
                CHECK(tern__bits(got[0]) == tern__bits(wanted), "%s: kind %d of %d floats: %a, not %a", test_tier_name[isa], (int)kind,
                      (int)sizes[i], (double)got[0], (double)wanted);
                a.y = got + 1;
                a.add = 1;
                CHECK_OK(t.c, tern_sum(t.c, &a));
                CHECK(got[1] == 2.5f + wanted, "added");
            }
        test_close(&t);
    }
    for (kind = 0; kind < 3; kind++) free(parts[kind]);
}

/* -- elementary functions, against libm in float64 -- */

/* |got - wanted| in units in the last place of the float next to wanted. */
static double numbers_units(float got, double wanted)
{
    int e;
    frexp(wanted, &e);
    return fabs((double)got - wanted) / ldexp(1.0, (e < -125 ? -125 : e) - 24);
}

static void numbers_worst(double *worst, double error) { if (!(error <= *worst)) *worst = error; }

static float numbers_sin(float x) { float s, c; tern__sincos(x, &s, &c); return s; }
static float numbers_cos(float x) { float s, c; tern__sincos(x, &s, &c); return c; }

static void test_numbers_exp_and_log(void)
{
    double exp_units = 0, log_units = 0, log_error = 0;
    uint32_t u;
    for (u = 0; u <= tern__bits(88.7f); u += 4093) {
        const float x = tern__float(u);
        if (x < 88.7f) numbers_worst(&exp_units, numbers_units(tern__exp(x), exp((double)x)));
        if (x <= 87.0f) numbers_worst(&exp_units, numbers_units(tern__exp(-x), exp(-(double)x)));
    }
    for (u = 0x00800000; u < 0x7F800000u; u += 4093) {
        const float x = tern__float(u);
        numbers_worst(&log_units, numbers_units(tern__log(x), log((double)x)));
    }
    for (u = tern__bits(0.5f); u < tern__bits(2.0f); u += 31) {
        const float x = tern__float(u);
        numbers_worst(&log_units, numbers_units(tern__log(x), log((double)x)));
        numbers_worst(&log_error, fabs((double)tern__log(x) - log((double)x)));
    }
    printf("  exp: %.3f units in the last place; log: %.3f, absolute within [0.5, 2] %.2e\n", exp_units, log_units, log_error);
    CHECK(exp_units < 2.0, "exp");
    CHECK(log_units < 4.0, "log");
    CHECK(tern__exp(0.0f) == 1.0f && tern__exp(-0.0f) == 1.0f && tern__log(1.0f) == 0.0f, "exact");
    CHECK(tern__exp(88.7f) == INFINITY && tern__exp(INFINITY) == INFINITY && tern__finite(tern__exp(88.69f)), "above");
    CHECK(tern__exp(-87.1f) == 0.0f && tern__exp(-INFINITY) == 0.0f && tern__exp(-87.0f) > 0.0f && isnan(tern__exp(NAN)), "below");
}

static void test_numbers_sigmoid_tanh_sincos(void)
{
    double sigmoid = 0, hyperbolic = 0, sine = 0, large = 0;
    int i;
    for (i = -400000; i <= 400000; i++) {
        const float x = (float)i * 2e-4f, angle = (float)i * 0.0204f;
        numbers_worst(&sigmoid, fabs((double)tern__sigmoid(x) - 1 / (1 + exp(-(double)x))));
        numbers_worst(&hyperbolic, fabs((double)tern__tanh(x) - tanh((double)x)));
        numbers_worst(abs(i) < 100 ? &sine : &large, fabs((double)numbers_sin(angle) - sin((double)angle)));
        numbers_worst(abs(i) < 100 ? &sine : &large, fabs((double)numbers_cos(angle) - cos((double)angle)));
    }
    printf("  absolute errors: sigmoid %.2e, tanh %.2e, sine and cosine %.2e (|x| < 2) and %.2e (|x| < 8192)\n",
           sigmoid, hyperbolic, sine, large);
    CHECK(sigmoid < 1.5e-7 && hyperbolic < 3e-7, "sigmoid and tanh");
    CHECK(sine < 2e-7 && large < 5e-7, "sine and cosine");
    CHECK(tern__sigmoid(-INFINITY) == 0.0f && tern__sigmoid(INFINITY) == 1.0f && tern__tanh(INFINITY) == 1.0f
          && tern__tanh(-INFINITY) == -1.0f, "ends");
}

/* The correctly rounded root: float64's own, rounded once more, is that. */
static void test_numbers_sqrt(void)
{
    uint32_t u;
    int wrong = 0;
    for (u = 0; u < 0x7F800000u; u += 2039) {
        const float x = tern__float(u);
        wrong += tern__bits(tern__sqrt(x)) != tern__bits((float)sqrt((double)x));
    }
    for (u = 0; u < 300000; u++) {
        const float x = tern__float(0x3F700000u + 8 * u);
        wrong += tern__bits(tern__sqrt(x)) != tern__bits((float)sqrt((double)x));
    }
    CHECK(wrong == 0, "%d roots are not correctly rounded", wrong);
    CHECK(tern__sqrt(0.0f) == 0.0f && signbit(tern__sqrt(-0.0f)) && tern__sqrt(INFINITY) == INFINITY, "ends");
    CHECK(isnan(tern__sqrt(-1.0f)) && isnan(tern__sqrt(NAN)), "no root");
}

static void test_numbers_round(void)
{
    int i;
    for (i = -4000; i <= 4000; i++) {
        const float x = (float)i * 0.125f;
        CHECK(tern__round(x) == rintf(x), "%g gives %g", (double)x, (double)tern__round(x));
    }
}

/* -- the same bits on every machine -- */

typedef float numbers_function(float x);

/* Hash of f over x = from + i step, i < 20000; from and step are exact. */
static uint64_t numbers_golden(numbers_function *f, float from, float step)
{
    uint64_t h = TEST_HASH;
    int i;
    for (i = 0; i < 20000; i++) {
        const float y = f(from + (float)i * step);
        h = test_hash_floats(h, &y, 1);
    }
    return h;
}

static float numbers_normal(float x) { return tern__normal(UINT64_C(0x0123456789ABCDEF), (uint64_t)x, 17); }

static void test_numbers_golden_hashes(void)
{
    static const struct { const char *name; numbers_function *f; float from, step; uint64_t wanted; } golden[] = {
        {"exp",     tern__exp,      -90.0f,  0.0078125f, UINT64_C(0xfc331b503fe6f789)},
        {"log",     tern__log,      0.0009765625f, 0.015625f, UINT64_C(0xe945ff5cb5780c6f)},
        {"sigmoid", tern__sigmoid,  -30.0f,  0.00390625f, UINT64_C(0xbe1005707d956145)},
        {"tanh",    tern__tanh,     -10.0f,  0.0009765625f, UINT64_C(0x869506a5b043cf07)},
        {"sin",     numbers_sin,    -5000.0f, 0.5f, UINT64_C(0x65b27eda61bd89cb)},
        {"cos",     numbers_cos,    -5000.0f, 0.5f, UINT64_C(0x9e03effe7f520282)},
        {"sqrt",    tern__sqrt,     0.0f,    0.015625f, UINT64_C(0x36c641991c3b7a60)},
        {"normal",  numbers_normal, 0.0f,    1.0f, UINT64_C(0x67c044b3fba909da)}
    };
    uint64_t h = TEST_HASH;
    float *x = test_floats(70001), sum;
    tern_isa isa;
    int i;
    for (i = 0; i < (int)(sizeof golden / sizeof golden[0]); i++) {
        h = numbers_golden(golden[i].f, golden[i].from, golden[i].step);
        CHECK(h == golden[i].wanted, "%s: 0x%08lx%08lx", golden[i].name, (unsigned long)(h >> 32), (unsigned long)(h & 0xFFFFFFFF));
    }
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern_backend *b = test_tier(isa);
        if (!b) continue;
        h = TEST_HASH;
        for (i = 1; i <= 70001; i += 1000) {
            sum = tern__sum_of((const tern__kernels *)b->data, (tern_sum_kind)(i % 3), i, x);
            h = test_hash_floats(h, &sum, 1);
        }
        CHECK(h == UINT64_C(0x57cd48cb6163887a),
              "sum, %s: 0x%08lx%08lx", test_tier_name[isa], (unsigned long)(h >> 32), (unsigned long)(h & 0xFFFFFFFF));
    }
    free(x);
}

static void suite_numbers(void)
{
    RUN(test_numbers_every_16_bit_pattern_returns);
    RUN(test_numbers_rounding_to_16_bits);
    RUN(test_numbers_pow2);
    RUN(test_numbers_log);
    RUN(test_numbers_stochastic_rounding);
    RUN(test_numbers_philox);
    RUN(test_numbers_normal_by_definition);
    RUN(test_numbers_normal);
    RUN(test_numbers_canonical_sum);
    RUN(test_numbers_exp_and_log);
    RUN(test_numbers_sigmoid_tanh_sincos);
    RUN(test_numbers_sqrt);
    RUN(test_numbers_round);
    RUN(test_numbers_golden_hashes);
}
