/* Room 20, training without floats that last: the flip rules and stochastic rounding against literal references, the
   integer backward against float64, and whole trainings whose checkpoints have the same hash on every machine. Mutations
   that these tests see: the sign of the sign rule or of votes, the remainder lost at a flip, a saturated accumulator emptied
   (also in the vectors alone), a gradient that is not finite not skipped; dx without the scales or with trits of another
   part, dw without the tokens' scales, overwritten, or with the padding of groups; fused attention; votes left out of
   files, theta not compared; a shadow beside an accumulator let in; scales beyond their range, by another step or the wrong way,
   their ends not counted; NaN that moves something, in the scalar kernel or the vectors; the sign rule that asks for a size;
   of the product without floats: another floor, groups too near or too far, segments that are lost,
   a lattice of 128 steps, a float between. */

#include <fenv.h>

/* -- stochastic rounding -- */

/* The random half that an element of a row of `cols` takes. */
static uint32_t half_of(uint64_t seed, int64_t row, int64_t col, int64_t cols, uint32_t step, uint32_t stream)
{
    uint32_t words[4];
    tern__philox(seed, (uint64_t)(row * ((cols + 7) / 8) + col / 8), step, stream, words);
    return col % 2 ? words[col % 8 / 2] >> 16 : words[col % 8 / 2] & 0xFFFF;
}

/* One operation against its definition, in doubles where those are exact. */
static void check_rounding(tern_context *c, record *r, const tern_round_i8_args *a)
{
    const tern_matrix one = {1, 1, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, NULL, NULL};
    const tern__shape s = tern__shape_of(a->m.scales ? &a->m : &one);
    float *v = (float *)malloc((size_t)(a->n * a->cols) * 4), most = 0.0f;
    int64_t t, i;
    CHECK_OK(c, tern_round_i8(c, a));
    for (t = 0; t < a->n; t++)
        for (i = 0; i < a->cols; i++) {
            volatile float x = a->x[t * a->cols + i];
            if (a->m.scales) x = x * tern__load_scale(a->m.scale_type, a->m.scales, tern__scale_index(&a->m, &s, i, a->group));
            if (a->row) x = x * a->row[t];
            v[t * a->cols + i] = x;
        }
    for (t = 0; t < a->n; t++) {
        if (!a->whole) most = 0.0f;
        for (i = 0; i < a->n * a->cols; i++)
            if ((a->whole || i / a->cols == t) && fabsf(v[i]) > most) most = fabsf(v[i]);
        CHECK(a->scale[a->whole ? 0 : t] == most / 127.0f, "scale of %d is %g, not %g", (int)t, a->scale[a->whole ? 0 : t], most / 127.0f);
        for (i = 0; i < a->cols; i++) {
            const float x = most > 0.0f ? v[t * a->cols + i] * (127.0f / most) : 0.0f;
            const double u = (half_of(a->seed, t, i, a->cols, TERN__ROUNDING, a->stream) + 0.5) / 65536;
            double want = floor((double)(float)(x + u));
            if (want > 127) want = 127;
            if (want < -127) want = -127;
            CHECK(a->q[t * a->cols + i] == (int)want, "q[%d][%d] is %d, not %g", (int)t, (int)i, a->q[t * a->cols + i], want);
        }
    }
    record_bytes(r, a->q, a->n * a->cols);
    record_words(r, a->scale, a->whole ? 1 : a->n);
    free(v);
}

static void rounding(tern_context *c, record *r)
{
    static const int64_t cols[] = {1, 15, 16, 17, 127, 1100, 4097};
    static const tern_type types[] = {TERN_F32, TERN_F16, TERN_POW2};
    size_t i;
    int k;
    for (i = 0; i < sizeof cols / sizeof *cols; i++)
        for (k = 0; k < 5; k++) {
            tern_round_i8_args a = TERN_ZERO;
            a.n = cols[i] > 1000 ? 3 : 19;
            a.cols = cols[i];
            a.x = hold_floats(a.n * a.cols);
            memset((float *)(uintptr_t)a.x + (a.n - 1) * a.cols, 0, (size_t)a.cols * 4); /* a row of zeros */
            if (k < 3) a.m = hold_matrix(c, a.cols, 50, k == 0 ? TERN_PER_TENSOR : k == 1 ? TERN_PER_ROW : 20, TERN_BASE3, types[k]);
            if (k == 2) a.group = 2;
            if (k >= 3) a.row = hold_floats(a.n);
            a.whole = k == 4;
            a.seed = UINT64_C(0x123456789) + (uint64_t)k;
            a.stream = (uint32_t)i;
            a.q = (int8_t *)hold((size_t)(a.n * a.cols));
            a.scale = hold_output(a.n);
            check_rounding(c, r, &a);
            release();
        }
}
static void test_rounding(void) { same_everywhere(rounding, UINT64_C(0xD33224AF09BBD0F1)); }

/* The mean over many seeds is the number, and integers stay. */
static void test_rounding_is_unbiased(void)
{
    enum { N = 64, SEEDS = 4000 };
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_round_i8_args a = TERN_ZERO;
    float x[N], scale[1];
    int8_t q[N];
    double sum[N] = {0};
    int i, k;
    for (i = 0; i < N; i++) x[i] = i == 0 ? 127.0f : i == 1 ? -127.0f : i < 20 ? (float)(i - 10) : 127.0f * test_float();
    a.n = 1; a.cols = N;
    a.x = x;
    a.q = q;
    a.scale = scale;
    for (k = 0; k < SEEDS; k++) {
        a.seed = (uint64_t)k << 32;
        CHECK_OK(t.c, tern_round_i8(t.c, &a));
        for (i = 0; i < N; i++) {
            sum[i] += q[i];
            CHECK(fabs(q[i] - x[i]) < 1.0, "%g became %d", x[i], q[i]);
        }
    }
    for (i = 0; i < N; i++) {
        CHECK(i >= 20 || sum[i] == (double)x[i] * SEEDS, "the integer %g became %g", x[i], sum[i] / SEEDS);
        CHECK(fabs(sum[i] / SEEDS - x[i]) < 5 * 0.5 / sqrt(SEEDS), "the mean of %g is %g", x[i], sum[i] / SEEDS);
    }
    test_close(&t);
}

/* What is not finite: that token, or all of a whole tensor; sizes that vanish are no fault. */
static void rounding_faults(tern_context *c, record *r)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    int i, whole;
    (void)r;
    for (i = 0; i < 3; i++)
        for (whole = 0; whole < 2; whole++) {
            tern_round_i8_args a = TERN_ZERO;
            float x[40], scale[4] = {7, 7, 7, 7};
            int8_t q[40];
            int j;
            for (j = 0; j < 40; j++) x[j] = test_float();
            for (j = 0; j < 10; j++) x[j] = 1e-40f;
            x[23] = bad[i];
            memset(q, 9, sizeof q);
            a.n = 4; a.cols = 10;
            a.x = x;
            a.q = q;
            a.scale = scale;
            a.whole = whole;
            CHECK_OK(c, tern_round_i8(c, &a));
            CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "round_i8: row 2");
            CHECK(scale[0] == 0.0f && (whole || scale[2] == 0.0f), "scales %g and %g", scale[0], scale[2]);
            CHECK(whole || (scale[1] > 0.0f && scale[3] > 0.0f), "scales of good rows");
            for (j = 0; j < 40; j++) CHECK(q[j] == 0 || (!whole && j / 10 % 2 == 1), "q[%d] is %d", j, q[j]);
            release();
        }
}
static void test_rounding_faults(void) { on_each_tier(rounding_faults); }

static void dequantized(tern_context *c, record *r)
{
    int k, whole, add;
    for (k = 0; k < TEST_SIZES; k++)
        for (whole = 0; whole < 2; whole++)
            for (add = 0; add < 2; add++) {
                const int64_t n = 5, cols = test_sizes[k], wide = cols + 3;
                tern_dequantize_args a = TERN_ZERO;
                float *before;
                int64_t i;
                a.n = n; a.cols = cols;
                a.x = hold_ids(n * cols, 40000000);
                a.scale = hold_floats(n);
                a.whole = whole;
                a.y = hold_floats(n * wide);
                before = hold_copy(a.y, n * wide);
                a.y_row = wide;
                a.add = add;
                CHECK_OK(c, tern_dequantize(c, &a));
                for (i = 0; i < n * wide; i++) {
                    volatile float want = before[i];
                    if (i % wide < cols) {
                        volatile float product = (float)a.x[i / wide * cols + i % wide] * a.scale[whole ? 0 : i / wide];
                        want = add ? want + product : product;
                    }
                    CHECK(a.y[i] == want, "y[%d] is %g, not %g", (int)i, a.y[i], want);
                }
                record_words(r, a.y, n * wide);
                release();
            }
}
static void test_dequantized(void) { same_everywhere(dequantized, UINT64_C(0xC8321C3DA3D91F39)); }

/* -- flips -- */

/* All that a flip may change, row by row. */
typedef struct state { int64_t rows, cols, groups; int32_t grain; tern_type scale; int8_t *trits, *accum; int *scales, *votes; } state;

static int64_t state_group(const state *s, int64_t i)
{
    const int64_t row = i / s->cols, col = i % s->cols;
    return s->grain == TERN_PER_TENSOR ? 0 : s->grain == TERN_PER_ROW ? row : row * s->groups + col / s->grain;
}

static int reference_sign(double x) { return x > 0 ? 1 : x < 0 ? -1 : 0; }

/* The rules in doubles, whose floor is the shift; weight by weight. */
static tern_flips reference_flip(state *s, const tern_flip_args *a, const float *grad)
{
    const int64_t count = s->rows * s->cols, grains = s->grain == TERN_PER_TENSOR ? 1 : s->rows * s->groups;
    const float mean = *a->sum_abs / ((float)s->rows * (float)s->cols), unit = 256.0f / mean;
    int *score = (int *)calloc((size_t)grains, sizeof *score), *hit = (int *)calloc((size_t)grains, sizeof *hit);
    const int fine = s->scale == TERN_LOG, least = fine ? -32256 : -126, most = fine ? 32767 : 126;
    tern_flips n = TERN_ZERO;
    int64_t i;
    n.updates = 1;
    for (i = 0; i < count; i++) score[state_group(s, i)] += s->trits[i] * reference_sign(grad[i]);
    for (i = 0; i < grains && a->scale_step; i++) {
        int v = s->votes[i] - a->scale_step * reference_sign(score[i]);
        if (s->scales[i] < least) continue;
        if (v > 127) v = 127;
        if (v < -127) v = -127;
        if (abs(v) >= a->scale_theta) {
            const int way = reference_sign(v), room = way > 0 ? most - s->scales[i] : s->scales[i] - least, move = fine ? a->scale_push : 1;
            if (room == 0) {
                v = way * a->scale_theta;
                n.ends++;
            } else {
                s->scales[i] += way * (move < room ? move : room);
                v -= way * a->scale_theta;
                n.scales++;
            }
        }
        s->votes[i] = v;
    }
    for (i = 0; i < count; i++) {
        double move;
        int v;
        if (a->rule == TERN_FLIP_SIGN) move = a->sign_step * reference_sign(grad[i]);
        else {
            volatile float x = grad[i] * unit;
            double g = nearbyint((double)x);
            if (g > 1024) g = 1024;
            if (g < -1024) g = -1024;
            move = floor((g * nearbyint(256.0 * (double)a->push) + half_of(a->seed, i / s->cols, i % s->cols, s->cols, a->step, a->stream))
                         / 65536.0);
        }
        v = s->accum[i] - (int)move;
        if (v > 127) v = 127;
        if (v < -127) v = -127;
        if (abs(v) >= a->theta) {
            if (s->trits[i] == reference_sign(v)) {
                v = reference_sign(v) * a->theta;
                n.saturated++;
            } else {
                s->trits[i] = (int8_t)(s->trits[i] + reference_sign(v));
                v = a->rule == TERN_FLIP_SIGN ? 0 : v - reference_sign(v) * a->theta;
                n.flips++;
                hit[state_group(s, i)] = 1;
            }
        }
        s->accum[i] = (int8_t)v;
    }
    for (i = 0; i < grains; i++) n.grains += hit[i];
    free(score);
    free(hit);
    return n;
}

/* Scales or votes of m row by row, as the integers that they are. */
static void read_panel(const tern_matrix *m, const void *from, tern_type type, int *to)
{
    const tern__shape s = tern__shape_of(m);
    int64_t row, g;
    for (row = 0; row < (m->grain == TERN_PER_TENSOR ? 1 : m->rows); row++)
        for (g = 0; g < s.groups; g++) {
            const int64_t at = tern__scale_index(m, &s, row, g);
            to[row * s.groups + g] = type == TERN_LOG ? ((const int16_t *)from)[at] : ((const int8_t *)from)[at];
        }
}

/* Both ends of the scales' range, and what lies near them. */
static void put_ends(tern_matrix *m)
{
    static const int16_t logs[] = {32767, 32757, -32256, -32249, INT16_MIN};
    static const int8_t exponents[] = {126, 125, -126, -125, INT8_MIN};
    const int64_t n = tern__min(5, tern__shape_of(m).scales);
    if (m->scale_type == TERN_LOG) memcpy(m->scales, logs, (size_t)n * 2);
    else memcpy(m->scales, exponents, (size_t)n);
}

static void check_flip(tern_context *c, record *r, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_type scale,
                       tern_flip_rule rule, int32_t theta, int32_t scale_step)
{
    const int64_t count = rows * cols;
    tern_flip_args a = TERN_ZERO;
    tern_unpack_args u = TERN_ZERO;
    tern_sum_args sum = TERN_ZERO;
    tern_flips counts = {1, 2, 3, 4, 5, 6, 7}, want;
    int *now_scales, *now_votes;
    float *grad;
    tern__shape shape;
    state s;
    int64_t i, j, grains;
    int step;
    a.m = hold_matrix(c, rows, cols, grain, encoding, scale);
    shape = tern__shape_of(&a.m);
    grains = grain == TERN_PER_TENSOR ? 1 : rows * shape.groups;
    s.rows = rows; s.cols = cols; s.groups = shape.groups; s.grain = grain; s.scale = scale;
    s.trits = (int8_t *)hold((size_t)count);
    s.accum = (int8_t *)hold((size_t)count);
    s.scales = (int *)hold((size_t)grains * sizeof(int));
    s.votes = (int *)hold((size_t)grains * sizeof(int));
    now_scales = (int *)hold((size_t)grains * sizeof(int));
    now_votes = (int *)hold((size_t)grains * sizeof(int));
    grad = hold_output(count);
    a.accum = (int8_t *)hold((size_t)count);
    a.votes = (int8_t *)hold((size_t)shape.scales);
    for (i = 0; i < count; i++) a.accum[i] = s.accum[i] = (int8_t)((int)(test_random() % 255) - 127);
    for (i = 0; i < shape.scales; i++) a.votes[i] = (int8_t)((int)(test_random() % 41) - 20);
    put_ends(&a.m);
    read_panel(&a.m, a.m.scales, scale, s.scales);
    read_panel(&a.m, a.votes, TERN_I8, s.votes);
    u.m = a.m;
    u.count = rows;
    u.trits = s.trits;
    CHECK_OK(c, tern_unpack(c, &u));
    u.trits = (int8_t *)hold((size_t)count);
    a.rule = rule;
    a.grad = hold_output(count);
    a.sum_abs = sum.y = hold_output(1);
    a.push = 2.7f;
    a.sign_step = 5;
    a.theta = theta;
    a.scale_step = scale_step;
    a.scale_theta = 9;
    a.scale_push = 17;
    a.seed = UINT64_C(0xFEDCBA9876543210);
    a.stream = 3;
    a.counts = &counts;
    sum.kind = TERN_SUM_ABS;
    sum.count = count;
    sum.x = a.grad;
    for (step = 1; step <= 4; step++) {
        const tern_flips before = counts;
        for (i = 0; i < count; i++) grad[i] = test_random() % 9 ? test_float() * test_float() * (test_random() % 50 ? 1.0f : 30.0f) : 0.0f;
        if (step == 2) for (i = 0; i < count; i++) grad[i] *= 1e-30f; /* the size makes no difference */
        memcpy(a.grad, grad, (size_t)count * 4);
        a.step = (uint32_t)step;
        CHECK_OK(c, tern_sum(c, &sum));
        if (!(*a.sum_abs > 0.0f)) continue;
        CHECK_OK(c, tern_flip(c, &a));
        want = reference_flip(&s, &a, grad);
        CHECK(counts.flips - before.flips == want.flips && counts.grains - before.grains == want.grains
              && counts.saturated - before.saturated == want.saturated && counts.scales - before.scales == want.scales
              && counts.ends - before.ends == want.ends && counts.updates - before.updates == 1 && counts.skipped == before.skipped,
              "%d flips in %d grains, %d saturated, %d scales, %d ends; not %d, %d, %d, %d, %d", (int)(counts.flips - before.flips),
              (int)(counts.grains - before.grains), (int)(counts.saturated - before.saturated), (int)(counts.scales - before.scales),
              (int)(counts.ends - before.ends), (int)want.flips, (int)want.grains, (int)want.saturated, (int)want.scales, (int)want.ends);
        CHECK_OK(c, tern_unpack(c, &u));
        for (i = 0; i < count; i++) {
            CHECK(u.trits[i] == s.trits[i], "trit %d is %d, not %d", (int)i, u.trits[i], s.trits[i]);
            CHECK(a.accum[i] == s.accum[i], "accumulator %d is %d, not %d", (int)i, a.accum[i], s.accum[i]);
            CHECK(a.grad[i] == 0.0f, "the gradient is not set to zero");
        }
        read_panel(&a.m, a.m.scales, scale, now_scales);
        read_panel(&a.m, a.votes, TERN_I8, now_votes);
        for (j = 0; j < grains; j++)
            CHECK(now_scales[j] == s.scales[j] && now_votes[j] == s.votes[j], "scale %d: %d, vote %d; not %d, %d", (int)j,
                  now_scales[j], now_votes[j], s.scales[j], s.votes[j]);
    }
    record_bytes(r, u.trits, count);
    record_bytes(r, a.accum, count);
    record_words(r, now_scales, grains);
    record_words(r, now_votes, grains);
    release();
}

static void flips(tern_context *c, record *r)
{
    static const int64_t rows[] = {1, 16, 17, 35};
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 20, 33};
    static const int32_t thetas[] = {32, 2, 127, 9};
    int i, j, k;
    for (i = 0; i < 4; i++)
        for (j = 0; j < TEST_SIZES; j++)
            for (k = 0; k < 4; k++)
                check_flip(c, r, rows[i], test_sizes[j], grains[k], (i + j + k) % 2 ? TERN_BASE3 : TERN_2BIT,
                           (i + k) % 2 ? TERN_LOG : TERN_POW2, (i + j) % 3 ? TERN_FLIP_PROPORTIONAL : TERN_FLIP_SIGN,
                           thetas[(i + k + j) % 4], (i + j + k) % 5 ? 7 : 0);
    check_flip(c, r, 18, 1000, TERN_PER_ROW, TERN_BASE3, TERN_POW2, TERN_FLIP_PROPORTIONAL, 32, 3);
    check_flip(c, r, 18, 1000, TERN_PER_ROW, TERN_2BIT, TERN_LOG, TERN_FLIP_PROPORTIONAL, 32, 9);
}
static void test_flips(void) { same_everywhere(flips, UINT64_C(0x07B32B4B13C6C0A4)); }

/* Steps that are skipped change nothing but the gradient, and are counted. */
static void test_skipped_flips(void)
{
    static const float sums[] = {0.0f, NAN, INFINITY, 1e-44f, 5.0f};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i, j;
    for (i = 0; i < 5; i++) {
        tern_flip_args a = TERN_ZERO;
        int8_t accum[60];
        float grad[60], sum = sums[i];
        uint8_t trits[256];
        tern_flips counts = TERN_ZERO;
        a.m = hold_matrix(t.c, 3, 20, TERN_PER_ROW, TERN_2BIT, TERN_F32);
        memcpy(trits, a.m.trits, 128);
        memset(accum, 31, sizeof accum);
        for (j = 0; j < 60; j++) grad[j] = -1.0f;
        a.accum = accum;
        a.grad = grad;
        a.sum_abs = &sum;
        a.theta = 32;
        a.push = 3.0f;
        a.rule = i == 4 ? TERN_FLIP_SIGN : TERN_FLIP_PROPORTIONAL; /* with a step of 0 */
        a.step = 77;
        a.counts = &counts;
        CHECK_OK(t.c, tern_flip(t.c, &a));
        if (i == 1 || i == 2) CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "flip: a gradient of step 77 is not finite");
        else CHECK_OK(t.c, tern_sync(t.c));
        CHECK(counts.skipped == 1 && counts.updates == 0 && counts.flips == 0, "%d: not counted as skipped", i);
        CHECK(memcmp(trits, a.m.trits, 128) == 0, "%d: trits changed", i);
        for (j = 0; j < 60; j++) CHECK(accum[j] == 31 && grad[j] == 0.0f, "%d: accumulator %d, gradient %g", i, accum[j], grad[j]);
        release();
    }
    test_close(&t);
}

/* The sign rule asks for no size: gradients below the smallest normal number count as any. */
static void test_tiny_signs(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_flip_args a = TERN_ZERO;
    tern_sum_args s = TERN_ZERO;
    tern_flips counts = TERN_ZERO;
    int8_t accum[60];
    float grad[60], sum;
    int i;
    a.m = hold_matrix(t.c, 3, 20, TERN_PER_ROW, TERN_2BIT, TERN_F32);
    for (i = 0; i < 60; i++) {
        grad[i] = (float)(i % 3 - 1) * 3e-44f;
        accum[i] = 0;
    }
    s.kind = TERN_SUM_ABS;
    s.count = 60;
    s.x = a.grad = grad;
    s.y = &sum;
    a.sum_abs = &sum;
    a.accum = accum;
    a.theta = 100;
    a.sign_step = 7;
    a.push = 3.0f;
    a.counts = &counts;
    CHECK_OK(t.c, tern_sum(t.c, &s));
    a.rule = TERN_FLIP_SIGN;
    CHECK_OK(t.c, tern_flip(t.c, &a));
    CHECK(counts.updates == 1 && counts.skipped == 0, "%d updates, %d skipped", (int)counts.updates, (int)counts.skipped);
    for (i = 0; i < 60; i++) CHECK(accum[i] == -7 * (i % 3 - 1), "accumulator %d is %d", i, accum[i]);
    release();
    test_close(&t);
}

/* A gradient of NaN, zero and infinities beside a sum that is finite all the same. */
static void flip_nan(tern_context *c, record *r)
{
    enum { ROWS = 3, COLS = 133 };
    int rule;
    for (rule = 0; rule < 2; rule++) {
        tern_flip_args a = TERN_ZERO;
        tern_flips counts = TERN_ZERO;
        float grad[ROWS * COLS], sum = ROWS * COLS;
        int8_t accum[ROWS * COLS];
        int i;
        a.m = hold_matrix(c, ROWS, COLS, TERN_PER_ROW, TERN_BASE3, TERN_F32);
        for (i = 0; i < ROWS * COLS; i++) {
            grad[i] = i % 4 == 0 ? NAN : i % 4 == 1 ? INFINITY : i % 4 == 2 ? -INFINITY : 0.0f;
            accum[i] = (int8_t)(i % 7 - 3);
        }
        a.rule = (tern_flip_rule)rule;
        a.grad = grad;
        a.accum = accum;
        a.sum_abs = &sum;
        a.push = 2.00390625f; /* 513 / 256: an odd factor, so that a NaN taken for INT32_MIN would move */
        a.sign_step = 12;
        a.theta = 100;
        a.counts = &counts;
        CHECK_OK(c, tern_flip(c, &a));
        CHECK(counts.updates == 1 && counts.flips == 0, "%d updates, %d flips", (int)counts.updates, (int)counts.flips);
        for (i = 0; i < ROWS * COLS; i++) {
            const int was = i % 7 - 3, least = rule ? 12 : 8, most = rule ? 12 : 9, moved = i % 4 == 1 ? was - accum[i] : accum[i] - was;
            CHECK((i % 4 == 1 || i % 4 == 2 ? moved >= least && moved <= most : moved == 0) && grad[i] == 0.0f,
                  "rule %d: accumulator %d went from %d to %d; gradient %g", rule, i, was, accum[i], grad[i]);
        }
        record_bytes(r, accum, ROWS * COLS);
        release();
    }
}
static void test_flip_nan(void) { on_each_tier(flip_nan); }

/* An exponent that no set or file leaves comes back into its range, and does not run over. */
static void test_votes_at_the_ends(void)
{
    static const int scales[] = {127, 126, -126, -128, 32767, 32740, -32256, -32200, -32768};
    static const int wants[2][9] = {
        {126, 126, -125, -128, 32767, 32767, -32192, -32136, -32768}, {126, 125, -126, -128, 32703, 32676, -32256, -32256, -32768}};
    static const int ends[2][9] = {{0, 1, 0, 0, 1, 0, 0, 0, 0}, {0, 0, 1, 0, 0, 0, 1, 0, 0}};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i, down;
    for (i = 0; i < 9; i++)
        for (down = 0; down < 2; down++) {
            tern_flip_args a = TERN_ZERO;
            tern_flips counts = TERN_ZERO;
            float grad[4], sum = 4.0f;
            int8_t accum[4] = {0}, vote[1] = {0}, trits[4];
            tern_unpack_args u = TERN_ZERO;
            int16_t now;
            int j, stays;
            a.m = hold_matrix(t.c, 1, 4, TERN_PER_TENSOR, TERN_2BIT, i < 4 ? TERN_POW2 : TERN_LOG);
            u.m = a.m;
            u.count = 1;
            u.trits = trits;
            CHECK_OK(t.c, tern_unpack(t.c, &u));
            for (j = 0; j < 4; j++) grad[j] = (float)(down ? trits[j] : -trits[j]);
            if (i < 4) *(int8_t *)a.m.scales = (int8_t)scales[i];
            else *(int16_t *)a.m.scales = (int16_t)scales[i];
            a.grad = grad;
            a.accum = accum;
            a.votes = vote;
            a.sum_abs = &sum;
            a.push = 1.0f;
            a.theta = 100;
            a.scale_step = a.scale_theta = 9;
            a.scale_push = 64;
            a.counts = &counts;
            CHECK_OK(t.c, tern_flip(t.c, &a));
            now = i < 4 ? *(const int8_t *)a.m.scales : *(const int16_t *)a.m.scales;
            stays = ends[down][i] ? down ? -9 : 9 : 0;
            CHECK(now == wants[down][i], "scale %d became %d, not %d", scales[i], now, wants[down][i]);
            CHECK(counts.ends == ends[down][i] && counts.scales == (now != scales[i]) && vote[0] == stays,
                  "scale %d: %d ends, %d scales, vote %d", scales[i], (int)counts.ends, (int)counts.scales, vote[0]);
            release();
        }
    test_close(&t);
}

/* -- parameters -- */

static tern_param flip_param(const char *name, int64_t rows, int64_t cols, int32_t grain)
{
    tern_param p = param_of(name, rows, cols, TERN_ABSMEAN, grain);
    return p;
}

static int8_t *accum_of(const tern_param *p) { return (int8_t *)p->buffer[TERN_ACCUM].data; }

/* set keeps what the trits do not say; give keeps nothing. */
static void set_accumulators(tern_context *c, record *r)
{
    static const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 33};
    static const tern_rule rules[] = {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN};
    int k, q;
    for (k = 0; k < 3; k++)
        for (q = 0; q < 3; q++) {
            enum { ROWS = 35, COLS = 130 };
            tern_param p = flip_param("w", ROWS, COLS, grains[k]);
            float w[ROWS * COLS], scales[4];
            int8_t trits[ROWS * COLS];
            float given[ROWS * 4];
            int64_t i, j;
            p.rule = rules[q];
            p.theta = k == 2 ? 0 : 5 + 30 * k;
            p.buffer[TERN_SCALES].type = k == 1 ? TERN_POW2 : k == 2 ? TERN_F16 : TERN_F32;
            CHECK_OK(c, tern_param_alloc(c, &p, TERN_FOR_FLIPS | 1 << TERN_VOTES));
            for (i = 0; i < ROWS * COLS; i++) w[i] = test_float() * test_float() * 3.0f;
            for (i = 0; i < COLS; i++) w[i] = 0.0f; /* a row of zeros */
            memset(p.buffer[TERN_VOTES].data, 3, p.buffer[TERN_VOTES].count);
            CHECK_OK(c, tern_param_set(c, &p, TERN_F32, w));
            for (i = 0; i < (int64_t)p.buffer[TERN_VOTES].count; i++) CHECK(((int8_t *)p.buffer[TERN_VOTES].data)[i] == 0, "a vote stayed");
            for (i = 0; i < ROWS; i++) {
                CHECK_OK(c, tern_param_get(c, &p, i, trits, scales, NULL));
                for (j = 0; j < COLS; j++) {
                    const int theta = p.theta ? p.theta : 32;
                    const double s = scales[p.grain > 0 ? j / p.grain : 0];
                    double want = s > 0 ? theta * (w[i * COLS + j] - s * trits[j]) / (s / 2) : 0;
                    if (want > theta - 1) want = theta - 1;
                    if (want < 1 - theta) want = 1 - theta;
                    CHECK(fabs(accum_of(&p)[i * COLS + j] - want) < 0.5001,
                          "accumulator %d %d is %d, not %g", (int)i, (int)j, accum_of(&p)[i * COLS + j], want);
                }
            }
            record_bytes(r, accum_of(&p), ROWS * COLS);
            for (i = 0; i < ROWS * COLS; i++) trits[i] = test_trit();
            for (i = 0; i < ROWS * 4; i++) given[i] = 0.5f;
            memset(p.buffer[TERN_VOTES].data, 3, p.buffer[TERN_VOTES].count);
            CHECK_OK(c, tern_param_give(c, &p, trits, given));
            for (i = 0; i < ROWS * COLS; i++) CHECK(accum_of(&p)[i] == 0, "an accumulator stayed");
            for (i = 0; i < (int64_t)p.buffer[TERN_VOTES].count; i++) CHECK(((int8_t *)p.buffer[TERN_VOTES].data)[i] == 0, "a vote stayed");
            tern_param_free(c, &p, TERN_FOR_TRAINING);
            CHECK(!p.buffer[TERN_ACCUM].data && !p.buffer[TERN_VOTES].data && p.buffer[TERN_TRITS].data, "frozen is trits and scales");
            tern_param_free(c, &p, -1);
        }
}
static void test_set_accumulators(void) { same_everywhere(set_accumulators, UINT64_C(0xAEFDA2D722421382)); }

static void test_flip_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = flip_param("w", 6, 20, TERN_PER_ROW), bad, dead = param_of("dead", 1, 6, TERN_DENSE, 0),
               a = param_of("a", 2, 20, TERN_DENSE, 0), b = param_of("b", 6, 2, TERN_DENSE, 0);
    tern_param *items[1];
    tern_model m = TERN_ZERO;
    tern_step s = TERN_ZERO;
    tern_linear l = TERN_ZERO;
    tern_need need = TERN_ZERO;
    const float x[60] = {1.0f}, dy[18] = {1.0f};
    float y[18], dx[60];
    uint64_t saved[512];
    int8_t own[120], first;
    static const float zeros[120] = {0};
    bad = p;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS | 1 << TERN_SHADOW), TERN_E_ARGUMENT, "w: a shadow and an accumulator");
    CHECK(!bad.buffer[TERN_TRITS].data, "something was allocated");
    bad = p; bad.theta = 1; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS), TERN_E_ARGUMENT, "w: theta is 1");
    bad = p; bad.theta = 128; CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS), TERN_E_ARGUMENT, "w: theta is 128");
    bad = p; bad.rule = TERN_SEQ;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS), TERN_E_ARGUMENT, "w: a learned scale and an accumulator");
    bad = p; bad.dead = &dead; bad.lambda = 0.1f;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS), TERN_E_ARGUMENT, "w: a dead zone needs a shadow");
    bad = p; bad.buffer[TERN_ACCUM].type = TERN_F32;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_FLIPS), TERN_E_ARGUMENT, "w: accumulator of type 1");
    bad = dead; bad.buffer[TERN_ACCUM].data = own;
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &bad, TERN_FOR_SGD), TERN_E_ARGUMENT, "dead: a dense parameter has no accumulator");

    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_FLIPS));
    set_random(t.c, &p);
    first = accum_of(&p)[0];
    CHECK_FAILS(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW), TERN_E_ARGUMENT, "w: a shadow and an accumulator");
    CHECK_FAILS(t.c, tern_param_set(t.c, &p, TERN_TYPE_DEFAULT, NULL), TERN_E_MISSING, "w has no shadow");
    bad = p; bad.buffer[TERN_SHADOW].data = y;
    items[0] = &bad;
    m.items = items;
    m.count = 1;
    s.step = 1;
    s.push = 3.0f;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "w: a shadow and an accumulator");
    CHECK_FAILS(t.c, tern_param_set(t.c, &bad, TERN_F32, x), TERN_E_ARGUMENT, "w: a shadow and an accumulator");
    bad = p; bad.buffer[TERN_ACCUM].count = 119;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_SHAPE, "w: its accumulator has 119 elements of 120");
    CHECK_FAILS(t.c, tern_param_set(t.c, &bad, TERN_F32, x), TERN_E_SHAPE, "w: its accumulator has 119 elements of 120");
    bad = p; bad.buffer[TERN_VOTES].data = own; bad.buffer[TERN_VOTES].count = 6;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_SHAPE, "w: its votes has 6 elements of 16");
    bad.buffer[TERN_VOTES].count = 16; s.scale_step = 1;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "scales learn as TERN_POW2 or TERN_LOG with votes; theirs is type 1");
    bad.buffer[TERN_SCALES].type = TERN_LOG;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "scale_push is 0, not 1 to 256");
    s.scale_push = 257; CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "scale_push is 257");
    bad.buffer[TERN_VOTES].count = 15;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_SHAPE, "w: its votes has 15 elements of 16");
    CHECK(accum_of(&p)[0] == first && memcmp(p.buffer[TERN_GRAD].data, zeros, sizeof zeros) == 0, "a refusal changed something");
    s.scale_push = 0; s.scale_step = 1;
    bad = p; s.push = -1.0f; CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "push");
    s.push = 3.0f; s.flip = (tern_flip_rule)2; CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "rule 2");
    s.flip = TERN_FLIP_SIGN; s.sign_step = 128; CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "sign_step is 128");

    l.w = &p;
    CHECK_OK(t.c, tern_linear_need(t.c, &l, 3, &need));
    CHECK(need.saved <= sizeof saved, "saved takes %d bytes", (int)need.saved);
    CHECK_OK(t.c, tern_linear_forward(t.c, &l, 3, x, y, saved));
    l.act = TERN_ACT_FLOAT;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &l, 3, x, saved, dy, dx), TERN_E_UNSUPPORTED, "w: act 1 beside an accumulator");
    l.act = TERN_ACT_BIT;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &l, 3, x, saved, dy, dx), TERN_E_UNSUPPORTED, "w: act 3 beside an accumulator");
    l.act = TERN_ACT_INT8;
    CHECK_OK(t.c, tern_param_alloc(t.c, &a, TERN_FOR_GRADIENT));
    CHECK_OK(t.c, tern_param_alloc(t.c, &b, TERN_FOR_GRADIENT));
    l.lora_a = &a; l.lora_b = &b;
    l.lora_scale = 1.0f;
    CHECK_FAILS(t.c, tern_linear_backward(t.c, &l, 3, x, saved, dy, dx), TERN_E_UNSUPPORTED, "w: LoRA beside an accumulator");
    CHECK_FAILS(t.c, tern_linear_merge(t.c, &l), TERN_E_UNSUPPORTED, "w: a merge beside an accumulator");
    tern_param_free(t.c, &p, -1);
    tern_param_free(t.c, &a, -1);
    tern_param_free(t.c, &b, -1);
    test_close(&t);
}

/* -- the integer backward -- */

/* A layer and what float64 says of its gradients: dx before the norm's backward is left out by having no norm. */
typedef struct integer_case { int64_t n, rows, cols; int32_t grain; tern_type encoding, scale; tern_act act; } integer_case;
static const integer_case integer_cases[] = {
    {1, 1, 1, TERN_PER_ROW, TERN_2BIT, TERN_F32, TERN_ACT_INT8},
    {19, 17, 130, TERN_PER_ROW, TERN_BASE3, TERN_F32, TERN_ACT_INT8},
    {5, 35, 127, TERN_PER_TENSOR, TERN_2BIT, TERN_F16, TERN_ACT_INT4},
    {7, 50, 130, 20, TERN_2BIT, TERN_F32, TERN_ACT_INT8},
    {7, 33, 130, 32, TERN_2BIT, TERN_POW2, TERN_ACT_INT8},
    {33, 64, 15, 7, TERN_BASE3, TERN_POW2, TERN_ACT_INT4}
};
enum { INTEGER_CASES = (int)(sizeof integer_cases / sizeof *integer_cases) };

/* A layer with random weights, activations and dy, and its float64 gradients for the activations that it kept. */
typedef struct integer_layer {
    tern_param w, bias;
    tern_linear l;
    float *x, *dy, *y, *dx;
    void *saved;
    double *want_dx, *want_dw, *size_dx;
    double size_dw;
} integer_layer;

static void integer_open(tern_context *c, integer_layer *o, const integer_case *k)
{
    tern_matrix m;
    tern__kept kept;
    tern_need need = TERN_ZERO;
    float *values = hold_output(k->cols), scales[64];
    int64_t t, i, j;
    memset(o, 0, sizeof *o);
    o->w = flip_param("w", k->rows, k->cols, k->grain);
    o->w.buffer[TERN_TRITS].type = k->encoding;
    o->w.buffer[TERN_SCALES].type = k->scale;
    o->bias = param_of("b", 1, k->rows, TERN_DENSE, 0);
    CHECK_OK(c, tern_param_alloc(c, &o->w, TERN_FOR_FLIPS));
    CHECK_OK(c, tern_param_alloc(c, &o->bias, TERN_FOR_GRADIENT));
    set_random(c, &o->w);
    set_random(c, &o->bias);
    o->l.w = &o->w;
    o->l.bias = &o->bias;
    o->l.act = k->act;
    CHECK_OK(c, tern_linear_need(c, &o->l, k->n, &need));
    CHECK_OK(c, tern_reserve(c, need.scratch));
    o->saved = hold(need.saved);
    o->x = hold_floats(k->n * k->cols);
    o->dy = hold_floats(k->n * k->rows);
    o->y = hold_output(k->n * k->rows);
    o->dx = hold_output(k->n * k->cols);
    o->want_dx = (double *)hold((size_t)(k->n * k->cols) * sizeof(double));
    o->size_dx = (double *)hold((size_t)(k->n * k->cols) * sizeof(double));
    o->want_dw = (double *)hold((size_t)(k->rows * k->cols) * sizeof(double));
    CHECK_OK(c, tern_linear_forward(c, &o->l, k->n, o->x, o->y, o->saved));
    m = tern_param_matrix(&o->w);
    kept = tern__kept_at(&o->l, k->n, o->saved);
    memset(o->want_dx, 0, (size_t)(k->n * k->cols) * sizeof(double));
    memset(o->want_dw, 0, (size_t)(k->rows * k->cols) * sizeof(double));
    for (i = 0; i < k->rows; i++) {
        CHECK_OK(c, tern_param_get(c, &o->w, i, NULL, scales, values));
        for (t = 0; t < k->n; t++)
            for (j = 0; j < k->cols; j++) {
                const double dy = o->dy[t * k->rows + i], q = kept.q[t * tern__shape_of(&m).stride + place_of(&m, j)];
                o->want_dx[t * k->cols + j] += dy * (double)values[j];
                o->want_dw[i * k->cols + j] += dy * (double)kept.scale[t] * q;
            }
    }
    /* one step of the rounding of dy times scales, for each token and column; for dw, of dy times the token scales */
    for (t = 0; t < k->n; t++) {
        double most = 0.0;
        for (i = 0; i < k->rows; i++) most = fmax(most, fabs((double)o->dy[t * k->rows + i] * (double)kept.scale[t]));
        o->size_dw = fmax(o->size_dw, most / 127);
        for (j = 0; j < k->cols; j++) {
            for (most = 0.0, i = 0; i < k->rows; i++) {
                const tern__shape s = tern__shape_of(&m);
                most = fmax(most, fabs((double)o->dy[t * k->rows + i]
                                       * (double)tern__load_scale(m.scale_type, m.scales, tern__scale_index(&m, &s, i, j / s.group))));
            }
            o->size_dx[t * k->cols + j] = most / 127;
        }
    }
}

static void integer_close(tern_context *c, integer_layer *o)
{
    tern_param_free(c, &o->w, -1);
    tern_param_free(c, &o->bias, -1);
    release();
}

/* Each gradient within what rounding can do, and the same everywhere. */
static void integer_gradients(tern_context *c, record *r)
{
    int k;
    for (k = 0; k < INTEGER_CASES; k++) {
        const integer_case *q = &integer_cases[k];
        integer_layer o;
        tern_matrix m;
        int64_t i, j, t;
        float *dw;
        integer_open(c, &o, q);
        m = tern_param_matrix(&o.w);
        dw = grad_of(&o.w);
        for (i = 0; i < q->rows * q->cols; i++) dw[i] = 1.0f; /* is added to */
        o.l.seed = UINT64_C(0x100000007) * (uint64_t)k;
        CHECK_OK(c, tern_linear_backward(c, &o.l, q->n, o.x, o.saved, o.dy, o.dx));
        for (t = 0; t < q->n; t++)
            for (j = 0; j < q->cols; j++) {
                const double bound = o.size_dx[t * q->cols + j] * (double)q->rows,
                             off = fabs((double)o.dx[t * q->cols + j] - o.want_dx[t * q->cols + j]);
                CHECK(off <= bound, "case %d: dx[%d][%d] is off by %g, bound %g", k, (int)t, (int)j, off, bound);
            }
        for (i = 0; i < q->rows; i++)
            for (j = 0; j < q->cols; j++) {
                const double bound = o.size_dw * (q->act == TERN_ACT_INT4 ? 8 : 127) * (double)q->n,
                             off = fabs((double)dw[i * q->cols + j] - 1 - o.want_dw[i * q->cols + j]);
                CHECK(off <= bound, "case %d: dw[%d][%d] is off by %g, bound %g", k, (int)i, (int)j, off, bound);
            }
        for (i = 0; i < q->rows; i++) {
            float want = 0.0f;
            for (t = 0; t < q->n; t++) want = want + o.dy[t * q->rows + i];
            CHECK(grad_of(&o.bias)[i] == want, "case %d: dbias[%d] is %g, not %g", k, (int)i, grad_of(&o.bias)[i], want);
        }
        record_words(r, o.dx, q->n * q->cols);
        record_words(r, dw, q->rows * q->cols);
        record_words(r, grad_of(&o.bias), q->rows);
        (void)m;
        integer_close(c, &o);
    }
}
static void test_integer_gradients(void) { same_everywhere(integer_gradients, UINT64_C(0xDD7C5E7E6A226722)); }

/* The mean over seeds comes nearer and nearer to float64. */
static void test_integer_gradients_are_unbiased(void)
{
    enum { SEEDS = 1500 };
    test_context t = test_open(TERN_ISA_BEST, 1);
    int k;
    for (k = 1; k < INTEGER_CASES; k++) {
        const integer_case *q = &integer_cases[k];
        integer_layer o;
        double *sum;
        int64_t i;
        int seed;
        integer_open(t.c, &o, q);
        sum = (double *)calloc((size_t)(q->n * q->cols), sizeof *sum);
        memset(grad_of(&o.w), 0, (size_t)(q->rows * q->cols) * 4);
        for (seed = 0; seed < SEEDS; seed++) {
            o.l.seed = (uint64_t)seed << 32 | 5;
            CHECK_OK(t.c, tern_linear_backward(t.c, &o.l, q->n, o.x, o.saved, o.dy, o.dx));
            for (i = 0; i < q->n * q->cols; i++) sum[i] += (double)o.dx[i];
        }
        for (i = 0; i < q->n * q->cols; i++) { /* each of `rows` roundings has a deviation of at most half a step */
            const double off = fabs(sum[i] / SEEDS - o.want_dx[i]), bound = 6 * 0.5 * o.size_dx[i] * sqrt((double)q->rows / SEEDS) + 1e-5;
            CHECK(off <= bound, "case %d: the mean of dx[%d] is off by %g, bound %g", k, (int)i, off, bound);
        }
        for (i = 0; i < q->rows * q->cols; i++) {
            const double off = fabs((double)grad_of(&o.w)[i] / SEEDS - o.want_dw[i]);
            const double bound = 6 * 0.5 * o.size_dw * (q->act == TERN_ACT_INT4 ? 8 : 127) * sqrt((double)q->n / SEEDS) + 1e-4;
            CHECK(off <= bound, "case %d: the mean of dw[%d] is off by %g, bound %g", k, (int)i, off, bound);
        }
        free(sum);
        integer_close(t.c, &o);
    }
    test_close(&t);
}

/* More rows than one product can sum, of few columns; and scales whose half is 0, which leave nothing. */
static void test_integer_extremes(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    const int64_t rows = 131072 + 5000, cols = 16;
    const float *x = hold_floats(cols), *dy = hold_floats(rows);
    float *w = hold_output(rows * cols), *y = hold_output(rows), *dx = hold_output(cols), most = 0.0f;
    tern_param p = flip_param("w", rows, cols, TERN_PER_TENSOR), tiny = flip_param("tiny", 2, cols, TERN_PER_ROW);
    tern_linear l = TERN_ZERO;
    tern_need need = TERN_ZERO;
    void *saved;
    int64_t i, j;
    for (i = 0; i < rows * cols; i++) w[i] = test_float();
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_FLIPS));
    CHECK_OK(t.c, tern_param_set(t.c, &p, TERN_F32, w));
    l.w = &p;
    CHECK_OK(t.c, tern_linear_need(t.c, &l, 1, &need));
    CHECK_OK(t.c, tern_reserve(t.c, need.scratch));
    saved = hold(need.saved);
    CHECK_OK(t.c, tern_linear_forward(t.c, &l, 1, x, y, saved));
    CHECK_OK(t.c, tern_linear_backward(t.c, &l, 1, x, saved, dy, dx));
    for (i = 0; i < rows; i++) most = fabsf(dy[i]) > most ? fabsf(dy[i]) : most;
    for (j = 0; j < cols; j++) {
        const float scale = ((const float *)p.buffer[TERN_SCALES].data)[0];
        double want = 0;
        for (i = 0; i < rows; i++) want += (double)dy[i] * scale * ((w[i * cols + j] > 0.5f * scale) - (w[i * cols + j] < -0.5f * scale));
        CHECK(fabs(dx[j] - want) < 6 * (double)(most * scale) / 127 * sqrt((double)rows), "dx[%d] is %g, not %g", (int)j, dx[j], want);
    }
    for (i = 0; i < 2 * cols; i++) w[i] = i & 1 ? -1e-45f : 1e-45f;
    CHECK_OK(t.c, tern_param_alloc(t.c, &tiny, TERN_FOR_FLIPS));
    CHECK_OK(t.c, tern_param_set(t.c, &tiny, TERN_F32, w));
    for (i = 0; i < 2 * cols; i++) CHECK(accum_of(&tiny)[i] == 0, "accumulator %d is %d", (int)i, accum_of(&tiny)[i]);
    tern_param_free(t.c, &p, -1);
    tern_param_free(t.c, &tiny, -1);
    release();
    test_close(&t);
}

/* What else a step goes through: exact attention, norm, loss, rope, scatter and maps backward. */
static void canonical_backward(tern_context *c, record *r)
{
    enum { BATCH = 2, N = 70, HEADS = 4, KV = 2, DIM = 24, WIDE = HEADS * DIM, KEYS = KV * DIM };
    static const tern_map_fn fn[] = {TERN_MAP_RELU2, TERN_MAP_SILU, TERN_MAP_GELU};
    tern_attention_args a = TERN_ZERO;
    tern_norm_args n = TERN_ZERO;
    tern_rope_args o = TERN_ZERO;
    tern_scatter_args s = TERN_ZERO;
    tern_loss_args l = TERN_ZERO;
    tern_map_args m = TERN_ZERO;
    int i;
    a.batch = BATCH; a.queries = N - 5; a.keys = N;
    a.heads = HEADS; a.kv_heads = KV; a.dim = DIM;
    a.q = hold_floats(BATCH * N * WIDE); a.k = hold_floats(BATCH * N * KEYS); a.v = hold_floats(BATCH * N * KEYS);
    a.q_stride = WIDE; a.k_stride = a.v_stride = KEYS;
    a.y = hold_output(BATCH * N * WIDE); a.p = hold_output(BATCH * HEADS * N * N);
    CHECK_OK(c, tern_attention(c, &a));
    a.dy = hold_floats(BATCH * N * WIDE);
    a.dq = hold_zeros(BATCH * N * WIDE); a.dk = hold_zeros(BATCH * N * KEYS); a.dv = hold_zeros(BATCH * N * KEYS);
    a.exact = 1;
    CHECK_OK(c, tern_attention(c, &a));
    record_words(r, a.dq, BATCH * (N - 5) * WIDE);
    record_words(r, a.dk, BATCH * N * KEYS);
    record_words(r, a.dv, BATCH * N * KEYS);
    n.n = 7; n.cols = 1100;
    n.x = hold_floats(7 * 1100);
    n.gain = hold_floats(1100);
    n.eps = 1e-6f;
    n.dy = hold_floats(7 * 1100);
    n.dx = hold_output(7 * 1100);
    n.dgain = hold_zeros(1100);
    CHECK_OK(c, tern_norm(c, &n));
    record_words(r, n.dx, 7 * 1100);
    record_words(r, n.dgain, 1100);
    o.n = 7; o.heads = 10; o.dim = 22;
    o.x = n.dx;
    o.stride = 1100; o.period = 7;
    o.inverse = 1;
    CHECK_OK(c, tern_rope(c, &o));
    record_words(r, n.dx, 7 * 1100);
    s.rows = 5; s.cols = 1100; s.n = 7;
    s.ids = hold_ids(7, 5);
    s.dy = n.dx;
    s.dw = hold_zeros(5 * 1100);
    CHECK_OK(c, tern_scatter(c, &s));
    record_words(r, s.dw, 5 * 1100);
    l.n = 7; l.classes = 1100;
    l.logits = n.x;
    l.targets = hold_ids(7, 1100);
    l.losses = hold_output(7);
    l.dlogits = n.dx;
    l.scale = 0.125f;
    CHECK_OK(c, tern_loss(c, &l));
    record_words(r, n.dx, 7 * 1100);
    m.count = 7 * 1100;
    m.a = n.x;
    m.dy = n.dy;
    m.da = n.dx;
    for (i = 0; i < 3; i++) {
        m.fn = fn[i];
        CHECK_OK(c, tern_map(c, &m));
        record_words(r, m.da, m.count);
    }
}
static void test_canonical_backward(void) { same_everywhere(canonical_backward, UINT64_C(0x350CE4F328EAAF24)); }

/* -- the forward without floats -- */

/* floor(x / 2^bits) and x 2^bits, one power at a time. */
static int64_t halve(int64_t x, int bits) { while (bits-- > 0) x = (x - (x & 1)) / 2; return x; }

/* The definition in int64, row by row and group by group. */
static int32_t reference_fixed(const tern_matmul_fixed_args *a, const tern__shape *s, const int8_t *trits, int64_t t, int64_t row)
{
    int64_t sum = 0, i;
    int top = -1000, point, k;
    for (k = 0; k < 2; k++) {
        int64_t g;
        for (g = 0; g < s->groups; g++) {
            const int64_t at = tern__scale_index(&a->m, s, row, g), end = tern__min(a->m.cols, (g + 1) * s->group);
            const int l = a->m.scale_type == TERN_LOG ? ((const int16_t *)a->m.scales)[at] : 256 * ((const int8_t *)a->m.scales)[at];
            int64_t dot = 0;
            if (l < -126 * 256) continue;
            if (k == 0) { top = (int)halve(l, 8) > top ? (int)halve(l, 8) : top; continue; }
            for (i = g * s->group; i < end; i++) dot += trits[row * a->m.cols + i] * a->x[t * a->m.cols + i];
            sum += halve(dot * (int64_t)floor(32768 * exp2((l - 256 * (double)halve(l, 8)) / 256) + 0.5) * 65536, top - (int)halve(l, 8));
        }
    }
    point = top - 31 + a->point;
    for (; point < 0 && sum != 0 && sum != -1; point++) sum = halve(sum, 1);
    for (; point > 0 && sum < INT64_C(1) << 40 && sum > -(INT64_C(1) << 40); point--) sum *= 2;
    if (a->bias) sum += a->bias[row];
    return (int32_t)(sum > 2147483647 ? 2147483647 : sum < -INT64_C(2147483648) ? -INT64_C(2147483648) : sum);
}

static tern_matmul_fixed_args hold_fixed(tern_context *c, int64_t rows, int64_t cols, int64_t n, int variant)
{
    static const int32_t grains[] = {TERN_PER_ROW, TERN_PER_TENSOR, 20, 33};
    tern_matmul_fixed_args a = TERN_ZERO;
    int64_t i;
    a.m = hold_matrix(c, rows, cols, grains[variant % 4], variant & 1 ? TERN_BASE3 : TERN_2BIT, variant % 3 ? TERN_LOG : TERN_POW2);
    for (i = 0; i < tern__shape_of(&a.m).scales; i++) { /* near each other, far apart and none */
        const uint32_t u = test_random() % 11;
        const int wide = u == 0 ? -99999 : u == 1 ? (int)(test_random() % 60000) - 30000 : (int)(test_random() % 2000) - 1500;
        if (a.m.scale_type == TERN_LOG) ((int16_t *)a.m.scales)[i] = (int16_t)(wide < -32256 ? INT16_MIN : wide);
        else ((int8_t *)a.m.scales)[i] = (int8_t)(wide < -32256 ? INT8_MIN : wide / 256);
    }
    a.n = n;
    a.x = (int8_t *)hold((size_t)(n * cols));
    for (i = 0; i < n * cols; i++) ((int8_t *)(uintptr_t)a.x)[i] = (int8_t)(test_random() % 256 - 128);
    a.point = (int32_t)(test_random() % 63) - 31;
    a.bias = variant % 5 ? hold_ids(rows, 2000000000) : NULL;
    a.y = (int32_t *)hold((size_t)(n * rows) * 4);
    return a;
}

static void check_fixed(tern_context *c, record *r, int64_t rows, int64_t cols, int64_t n, int variant)
{
    const tern_matmul_fixed_args a = hold_fixed(c, rows, cols, n, variant);
    const tern__shape s = tern__shape_of(&a.m);
    tern_unpack_args u = TERN_ZERO;
    int64_t t, i;
    u.m = a.m;
    u.count = rows;
    u.trits = (int8_t *)hold((size_t)(rows * cols));
    CHECK_OK(c, tern_unpack(c, &u));
    CHECK_OK(c, tern_matmul_fixed(c, &a));
    for (t = 0; t < n; t++)
        for (i = 0; i < rows; i++) {
            const int32_t want = reference_fixed(&a, &s, u.trits, t, i);
            CHECK(a.y[t * rows + i] == want, "%d x %d, variant %d, point %d: y[%d][%d] is %d, not %d", (int)rows, (int)cols, variant,
                  a.point, (int)t, (int)i, a.y[t * rows + i], want);
        }
    record_words(r, a.y, n * rows);
    release();
}

static void fixed_products(tern_context *c, record *r)
{
    static const int64_t rows[] = {1, 15, 17, 127, 300};
    static const int64_t tokens[] = {1, 3, 16, 19};
    int i, j, variant = 0;
    for (i = 0; i < 5; i++)
        for (j = 0; j < TEST_SIZES; j++)
            check_fixed(c, r, test_sizes[j] > 1000 ? 33 : rows[i], test_sizes[j], tokens[(i + j) % 4], variant++);
}
static void test_fixed_products(void) { same_everywhere(fixed_products, UINT64_C(0x403E5EF3AC8A9D71)); }

/* All inputs at their ends: the largest sums that there are, in one group and in many. */
static void fixed_extremes(tern_context *c, record *r)
{
    const int64_t cols = TERN__MAX_COLS;
    int k;
    for (k = 0; k < 4; k++) {
        tern_matmul_fixed_args a = TERN_ZERO;
        tern_pack_args p = TERN_ZERO;
        int8_t *trits = (int8_t *)hold((size_t)(2 * cols));
        int32_t y[2];
        int64_t i;
        a.m = hold_matrix(c, 2, cols, k & 1 ? TERN_PER_ROW : 128, k & 2 ? TERN_BASE3 : TERN_2BIT, TERN_LOG);
        for (i = 0; i < tern__shape_of(&a.m).scales; i++) ((int16_t *)a.m.scales)[i] = 255;
        for (i = 0; i < cols; i++) trits[i] = 1, trits[cols + i] = -1;
        p.m = a.m;
        p.trits = trits;
        CHECK_OK(c, tern_pack(c, &p));
        a.n = 1;
        a.x = (int8_t *)memset(hold((size_t)cols), 0x80, (size_t)cols);
        a.y = y;
        a.point = 5;
        CHECK_OK(c, tern_matmul_fixed(c, &a)); /* 2^25 65359 / 2^15 2^5 */
        CHECK(y[0] == -2141683712 && y[1] == 2141683712, "%d and %d", y[0], y[1]);
        a.point = 6;
        CHECK_OK(c, tern_matmul_fixed(c, &a));
        CHECK(y[0] == -2147483647 - 1 && y[1] == 2147483647, "%d and %d are not held", y[0], y[1]);
        record_words(r, y, 2);
        release();
    }
}
static void test_fixed_extremes(void) { on_each_tier(fixed_extremes); }

/* No float: whatever the rounding mode, and nothing is inexact. Without the mode that operations set. */
static void fixed_modes(tern_context *c, record *r)
{
    static const int modes[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    int variant, k;
    (void)r;
    for (variant = 0; variant < 6; variant++) {
        const tern_matmul_fixed_args a = hold_fixed(c, 35, 700, 5, variant);
        int32_t *first = (int32_t *)hold(35 * 5 * 4);
        tern__fixed_work w;
        tern__job job;
        CHECK_OK(c, tern_matmul_fixed(c, &a));
        memcpy(first, a.y, 35 * 5 * 4);
        memset(&job, 0, sizeof job);
        w.a = &a;
        w.s = tern__shape_of(&a.m);
        job.arg = &w;
        job.k = (const tern__kernels *)c->run.backend->data;
        for (k = 0; k < 4; k++) {
            int raised;
            memset(a.y, 0, 35 * 5 * 4);
            fesetround(modes[k]);
            feclearexcept(FE_ALL_EXCEPT);
            tern__fixed_body(&job, 0, w.s.panels, &job.bad[0]);
            raised = fetestexcept(FE_ALL_EXCEPT);
            fesetround(FE_TONEAREST);
            CHECK(raised == 0 && memcmp(first, a.y, 35 * 5 * 4) == 0, "mode %d: a float was used (%d)", modes[k], raised);
        }
        release();
    }
}
static void test_fixed_modes(void) { on_each_tier(fixed_modes); }

/* -- training -- */

/* x [n, IN] -> norm, up, relu^2, norm, down -> classes; up and down by flips, a gain by AdamW. */
enum { NET_IN = 20, NET_HIDDEN = 48, NET_OUT = 10, NET_N = 24 };
typedef struct net {
    tern_param up, down, gain;
    tern_param *items[3];
    tern_model m;
    tern_linear first, second;
    float x[NET_N * NET_IN];
    int32_t targets[NET_N];
} net;

static void net_open(tern_context *c, net *o, tern_type scale)
{
    int64_t i;
    int k;
    memset(o, 0, sizeof *o);
    test_seed = 11;
    o->up = flip_param("up", NET_HIDDEN, NET_IN, TERN_PER_ROW);
    o->down = flip_param("down", NET_OUT, NET_HIDDEN, 20);
    o->down.buffer[TERN_TRITS].type = TERN_BASE3;
    o->down.theta = 24;
    o->gain = param_of("gain", 1, NET_HIDDEN, TERN_DENSE, 0);
    o->items[0] = &o->up; o->items[1] = &o->down; o->items[2] = &o->gain;
    o->m.items = o->items;
    o->m.count = 3;
    for (k = 0; k < 2; k++) {
        o->items[k]->buffer[TERN_SCALES].type = scale;
        CHECK_OK(c, tern_param_alloc(c, o->items[k], TERN_FOR_FLIPS | (scale != TERN_F32) << TERN_VOTES));
        set_random(c, o->items[k]);
    }
    CHECK_OK(c, tern_param_alloc(c, &o->gain, TERN_FOR_ADAMW));
    for (i = 0; i < NET_HIDDEN; i++) ((float *)o->gain.buffer[TERN_SHADOW].data)[i] = 1.0f;
    o->first.w = &o->up;
    o->second.w = &o->down;
    o->second.gain = &o->gain;
    o->first.norm = o->second.norm = TERN_NORM_RMS;
    for (i = 0; i < NET_N * NET_IN; i++) o->x[i] = test_float();
    for (i = 0; i < NET_N; i++) o->targets[i] = (int32_t)(test_random() % NET_OUT);
}

static void net_close(tern_context *c, net *o)
{
    int k;
    for (k = 0; k < 3; k++) tern_param_free(c, o->items[k], -1);
}

/* The mean loss before a step; the step, too, where s is set. */
static double net_step(tern_context *c, net *o, const tern_step *s)
{
    float hidden[NET_N * NET_HIDDEN], active[NET_N * NET_HIDDEN], logits[NET_N * NET_OUT], losses[NET_N], dy[NET_N * NET_OUT],
          dh[NET_N * NET_HIDDEN];
    uint64_t saved1[1024], saved2[1024];
    tern_map_args map = TERN_ZERO;
    tern_loss_args loss = TERN_ZERO;
    tern_need need = TERN_ZERO;
    double sum = 0;
    int i;
    CHECK_OK(c, tern_linear_need(c, &o->first, NET_N, &need));
    CHECK(need.saved <= sizeof saved1, "saved takes %d", (int)need.saved);
    CHECK_OK(c, tern_linear_need(c, &o->second, NET_N, &need));
    CHECK(need.saved <= sizeof saved2, "saved takes %d", (int)need.saved);
    CHECK_OK(c, tern_linear_forward(c, &o->first, NET_N, o->x, hidden, saved1));
    map.fn = TERN_MAP_RELU2;
    map.count = NET_N * NET_HIDDEN;
    map.a = hidden;
    map.y = active;
    CHECK_OK(c, tern_map(c, &map));
    CHECK_OK(c, tern_linear_forward(c, &o->second, NET_N, active, logits, saved2));
    loss.n = NET_N;
    loss.classes = NET_OUT;
    loss.logits = logits;
    loss.targets = o->targets;
    loss.losses = losses;
    loss.dlogits = dy;
    loss.scale = 1.0f / NET_N;
    CHECK_OK(c, tern_loss(c, &loss));
    for (i = 0; i < NET_N; i++) sum += (double)losses[i];
    if (!s) return sum / NET_N;
    o->first.seed = (uint64_t)s->step << 32;
    o->second.seed = o->first.seed | 1;
    CHECK_OK(c, tern_linear_backward(c, &o->second, NET_N, active, saved2, dy, dh));
    map.dy = dh;
    map.da = dh;
    CHECK_OK(c, tern_map(c, &map));
    CHECK_OK(c, tern_linear_backward(c, &o->first, NET_N, o->x, saved1, dh, NULL));
    CHECK_OK(c, tern_model_step(c, &o->m, s));
    return sum / NET_N;
}

typedef struct checkpoint { unsigned char data[16384]; size_t size; } checkpoint;
static int checkpoint_write(void *user, const void *data, size_t bytes)
{
    checkpoint *f = (checkpoint *)user;
    if (f->size + bytes > sizeof f->data) return 1;
    memcpy(f->data + f->size, data, bytes);
    f->size += bytes;
    return 0;
}
static void net_save(tern_context *c, const net *o, checkpoint *f)
{
    tern_sink s;
    s.write = checkpoint_write;
    s.user = f;
    f->size = 0;
    CHECK_OK(c, tern_model_save(c, &o->m, TERN_FOR_TRAINING, &s));
}

/* Both rules, and scales that learn. */
enum { NET_VARIANTS = 4 };
static const tern_type net_scales[NET_VARIANTS] = {TERN_F32, TERN_F32, TERN_POW2, TERN_LOG};

static tern_step net_recipe(int32_t variant, uint32_t step)
{
    tern_step s = TERN_ZERO;
    s.rate = 0.01f;
    s.seed = 99;
    s.step = step;
    s.flip = variant == 1 ? TERN_FLIP_SIGN : TERN_FLIP_PROPORTIONAL;
    s.push = 3.0f * (1.0f - (float)(step - 1) / 30.0f);
    s.sign_step = 3;
    s.scale_step = variant == 2 ? 4 : variant == 3 ? 16 : 0;
    s.scale_push = 64 - (int32_t)step; /* falls */
    return s;
}

/* Thirty steps of each rule, and of scales that learn; the loss falls, and checkpoints have one hash everywhere. */
static void flip_training(tern_context *c, record *r)
{
    int32_t variant;
    for (variant = 0; variant < NET_VARIANTS; variant++) {
        static checkpoint f;
        tern_flips counts = TERN_ZERO;
        double first = 0, last;
        uint32_t step;
        net o;
        net_open(c, &o, net_scales[variant]);
        for (step = 1; step <= 30; step++) {
            tern_step s = net_recipe(variant, step);
            double loss;
            s.flips = &counts;
            loss = net_step(c, &o, &s);
            if (step == 1) first = loss;
        }
        last = net_step(c, &o, NULL);
        CHECK(last < 0.7 * first, "variant %d: the loss went from %.3f to %.3f", variant, first, last);
        CHECK(counts.updates == 60 && counts.skipped == 0 && counts.flips > 0 && (counts.scales > 0) == (variant >= 2),
              "%d updates, %d skipped, %d flips, %d scales", (int)counts.updates, (int)counts.skipped, (int)counts.flips,
              (int)counts.scales);
        net_save(c, &o, &f);
        record_bytes(r, f.data, (int64_t)f.size);
        net_close(c, &o);
    }
}
static void test_flip_training(void) { same_everywhere(flip_training, UINT64_C(0x854E083EF29FFEE0)); }

/* Fifteen steps, a checkpoint into other parameters, and fifteen more are thirty. */
static void flip_resume(tern_context *c, record *r)
{
    int32_t variant;
    (void)r;
    for (variant = 0; variant < NET_VARIANTS; variant++) {
        static checkpoint whole, half, parts;
        const tern_type scale = net_scales[variant];
        tern_step s;
        uint32_t step;
        net a, b;
        net_open(c, &a, scale);
        net_open(c, &b, scale);
        for (step = 1; step <= 30; step++) {
            s = net_recipe(variant, step);
            net_step(c, &a, &s);
            if (step == 15) net_save(c, &a, &half);
        }
        net_save(c, &a, &whole);
        CHECK_OK(c, tern_model_load(c, &b.m, half.data, half.size));
        for (step = 16; step <= 30; step++) {
            s = net_recipe(variant, step);
            net_step(c, &b, &s);
        }
        net_save(c, &b, &parts);
        CHECK(whole.size == parts.size && memcmp(whole.data, parts.data, whole.size) == 0, "variant %d: the checkpoints differ", variant);
        net_close(c, &a);
        net_close(c, &b);
    }
}
static void test_flip_resume(void) { on_each_tier(flip_resume); }

/* A file without the state, with another threshold or with bytes that no accumulator has. */
static void test_flip_files(void)
{
    static checkpoint f, frozen;
    test_context t = test_open(TERN_ISA_BEST, 1);
    static const unsigned char zeros[8] = {0};
    tern_sink sink;
    unsigned char *accum;
    uint64_t hash;
    size_t at;
    net o;
    net_open(t.c, &o, TERN_POW2);
    net_save(t.c, &o, &f);
    sink.write = checkpoint_write;
    sink.user = &frozen;
    frozen.size = 0;
    CHECK_OK(t.c, tern_model_save(t.c, &o.m, 0, &sink));
    CHECK(f.size > frozen.size + NET_HIDDEN * NET_IN, "a frozen model has %d bytes of %d", (int)frozen.size, (int)f.size);
    CHECK_FAILS(t.c, tern_model_load(t.c, &o.m, frozen.data, frozen.size), TERN_E_MISSING, "no tensor up.accum");
    o.down.theta = 25;
    CHECK_FAILS(t.c, tern_model_load(t.c, &o.m, f.data, f.size), TERN_E_SHAPE, "down: theta is 24 in the file and 25 in the parameter");
    o.down.theta = 24;
    accum = f.data;
    for (at = 0; at + NET_HIDDEN * NET_IN <= f.size; at++)
        if (memcmp(f.data + at, accum_of(&o.up), NET_HIDDEN * NET_IN) == 0) accum = f.data + at;
    CHECK(accum != f.data, "the accumulator is not in the file as it lies in memory");
    accum_of(&o.up)[5] = 77;
    accum[7] = 0x80;
    CHECK_FAILS(t.c, tern_model_load(t.c, &o.m, f.data, f.size), TERN_E_FORMAT, "hash");
    hash = tern__fnv(tern__fnv(TERN__FNV_START, f.data, TERN__HASH_AT), zeros, 8);
    hash = tern__fnv(hash, f.data + TERN__HASH_AT + 8, f.size - TERN__HASH_AT - 8);
    tern__put_number(f.data + TERN__HASH_AT, hash, 8);
    CHECK_FAILS(t.c, tern_model_load(t.c, &o.m, f.data, f.size), TERN_E_FORMAT, "up.accum: byte 7 is -128");
    CHECK(accum_of(&o.up)[5] == 77, "a refused file was loaded");
    net_close(t.c, &o);
    test_close(&t);
}

/* A single weight: y = S T q, loss = y target. Its trit goes against the gradient, by both rules. */
static void test_descent(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int rule, sign;
    for (rule = 0; rule < 2; rule++)
        for (sign = -1; sign <= 1; sign += 2) {
            tern_param p = flip_param("w", 1, 1, TERN_PER_ROW), *items[1];
            tern_linear l = TERN_ZERO;
            tern_model m = TERN_ZERO;
            tern_step s = TERN_ZERO;
            const float x[1] = {1.0f}, dy[1] = {(float)sign}, one[1] = {1.0f};
            const int8_t zero[1] = {0};
            float y[1];
            uint64_t saved[64];
            int8_t trit[1] = {9};
            CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_FLIPS));
            CHECK_OK(t.c, tern_param_give(t.c, &p, zero, one));
            items[0] = &p;
            m.items = items;
            m.count = 1;
            l.w = &p;
            s.flip = (tern_flip_rule)rule;
            s.push = 4.0f;
            s.sign_step = 4;
            for (s.step = 1; s.step <= 8; s.step++) {
                CHECK_OK(t.c, tern_linear_forward(t.c, &l, 1, x, y, saved));
                CHECK_OK(t.c, tern_linear_backward(t.c, &l, 1, x, saved, dy, NULL));
                CHECK(grad_of(&p)[0] * (float)sign > 0.9f, "the gradient is %g", grad_of(&p)[0]);
                CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
                CHECK_OK(t.c, tern_param_get(t.c, &p, 0, trit, NULL, NULL));
                CHECK(trit[0] == (s.step < 8 ? 0 : -sign), "rule %d: after %d steps the trit is %d", rule, (int)s.step, trit[0]);
            }
            tern_param_free(t.c, &p, -1);
        }
    test_close(&t);
}

/* An embedding of bytes: only the rows that were met move, and a gradient that is not finite skips. */
static void test_flip_embedding(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    tern_param w = flip_param("bytes", 256, 24, TERN_PER_ROW), *items[1];
    tern_embedding e;
    tern_model m = TERN_ZERO;
    tern_step s = TERN_ZERO;
    tern_flips counts = TERN_ZERO;
    const int32_t ids[3] = {7, 200, 7};
    int8_t before[256 * 24];
    float y[72], dy[72], norm2 = 9.0f;
    int i;
    e.w = &w;
    items[0] = &w;
    m.items = items;
    m.count = 1;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_FLIPS));
    set_random(t.c, &w);
    memcpy(before, accum_of(&w), sizeof before);
    CHECK_OK(t.c, tern_embedding_forward(t.c, &e, 3, ids, y));
    for (i = 0; i < 72; i++) dy[i] = test_float() > 0 ? 1.0f : -1.0f;
    CHECK_OK(t.c, tern_embedding_backward(t.c, &e, 3, ids, dy));
    s.push = 3.0f;
    s.step = 1;
    s.flips = &counts;
    s.norm2 = &norm2;
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    CHECK(norm2 == 0.0f, "the norm of no floats is %g", norm2);
    for (i = 0; i < 256; i++) {
        const int moved = memcmp(before + i * 24, accum_of(&w) + i * 24, 24) != 0;
        CHECK(moved == (i == 7 || i == 200), "row %d moved: %d", i, moved);
    }
    memcpy(before, accum_of(&w), sizeof before);
    dy[5] = NAN;
    CHECK_OK(t.c, tern_embedding_backward(t.c, &e, 3, ids, dy));
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "flip: a gradient of step 1 is not finite");
    CHECK(memcmp(before, accum_of(&w), sizeof before) == 0 && counts.skipped == 1 && counts.updates == 1 && grad_of(&w)[0] == 0.0f,
          "the update was not skipped");
    tern_param_free(t.c, &w, -1);
    test_close(&t);
}

/* -- what is float -- */

static void test_strict(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    static checkpoint text;
    tern_param w = flip_param("w", 17, 20, TERN_PER_ROW), s = param_of("s", 4, 5, TERN_ABSMEAN, TERN_PER_TENSOR),
               g = param_of("g", 1, 20, TERN_DENSE, 0);
    tern_param *items[3];
    tern_model m = TERN_ZERO;
    tern_audit a;
    tern_sink sink;
    items[0] = &w; items[1] = &g; items[2] = &s;
    m.items = items;
    m.count = 2;
    sink.write = checkpoint_write;
    sink.user = &text;
    w.buffer[TERN_TRITS].type = TERN_BASE3;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_FLIPS));
    CHECK_OK(t.c, tern_param_alloc(t.c, &g, TERN_FOR_INFERENCE));
    CHECK_OK(t.c, tern_model_strict(t.c, &m));
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    CHECK(a.trainable_floats == 0 && a.persistent_floats == 32 + 20 && a.transient_floats == 340 && a.bytes[TERN_ACCUM] == 340,
          "%d trainable, %d persistent, %d transient", (int)a.trainable_floats, (int)a.persistent_floats, (int)a.transient_floats);
    text.size = 0;
    CHECK_OK(t.c, tern_model_list(t.c, &m, &sink));
    checkpoint_write(&text, "", 1);
    CHECK(strcmp((const char *)text.data,
                 "w, trits, base3, 340, 128, trainable\nw, scales, f32, 32, 128, persistent\nw, gradient, f32, 340, 1360, transient\n"
                 "w, accumulator, i8, 340, 340, trainable\ng, shadow, f32, 20, 80, persistent\n") == 0,
          "the list is\n%s", (const char *)text.data);
    text.size = sizeof text.data - 40;
    CHECK_FAILS(t.c, tern_model_list(t.c, &m, &sink), TERN_E_IO, "list: the sink refused the scales of w");
    CHECK_FAILS(t.c, tern_model_list(t.c, &m, NULL), TERN_E_ARGUMENT, "list: the sink");

    CHECK_OK(t.c, tern_param_alloc(t.c, &w, 1 << TERN_VOTES)); /* scales that learn are no longer left alone */
    CHECK_FAILS(t.c, tern_model_strict(t.c, &m), TERN_E_ARGUMENT, "w: its scales is 32 trainable floats (f32)");
    tern_param_free(t.c, &w, -1); /* but as logarithms they are no floats */
    w.buffer[TERN_SCALES].type = TERN_LOG;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_FLIPS | 1 << TERN_VOTES));
    CHECK_OK(t.c, tern_model_strict(t.c, &m));
    tern_param_free(t.c, &w, -1);
    w.buffer[TERN_SCALES].type = TERN_F32;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_FLIPS));
    CHECK_OK(t.c, tern_param_alloc(t.c, &g, TERN_FOR_SGD));
    CHECK_FAILS(t.c, tern_model_strict(t.c, &m), TERN_E_ARGUMENT, "g: its shadow is 20 trainable floats (f32)");
    tern_param_free(t.c, &g, TERN_FOR_TRAINING);
    m.count = 3;
    s.buffer[TERN_SHADOW].type = TERN_BF16;
    s.buffer[TERN_SCALES].type = TERN_POW2;
    CHECK_OK(t.c, tern_param_alloc(t.c, &s, TERN_FOR_ADAMW));
    CHECK_FAILS(t.c, tern_model_strict(t.c, &m), TERN_E_ARGUMENT, "s: its shadow is 20 trainable floats (bf16)");
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    CHECK(a.trainable_floats == 60 && a.persistent_floats == 52 && a.transient_floats == 360, "%d trainable, %d persistent, %d transient",
          (int)a.trainable_floats, (int)a.persistent_floats, (int)a.transient_floats);
    tern_param_free(t.c, &w, -1);
    tern_param_free(t.c, &g, -1);
    tern_param_free(t.c, &s, -1);
    test_close(&t);
}

/* Accumulator and trits are what lasts: at most 1.3 bytes per weight. */
static void test_flip_bytes(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param w = flip_param("w", 256, 1280, TERN_PER_ROW), *items[1];
    tern_model m = TERN_ZERO;
    tern_audit a;
    items[0] = &w;
    m.items = items;
    m.count = 1;
    w.buffer[TERN_TRITS].type = TERN_BASE3;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_FLIPS));
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    CHECK((double)(a.packed_bytes + a.bytes[TERN_ACCUM]) <= 1.3 * (double)a.weights,
          "%g bytes per weight", (double)(a.packed_bytes + a.bytes[TERN_ACCUM]) / (double)a.weights);
    printf("  %.4f bytes per weight last\n", (double)(a.packed_bytes + a.bytes[TERN_ACCUM]) / (double)a.weights);
    tern_param_free(t.c, &w, -1);
    test_close(&t);
}

/* In doubles, whose floor is the shift. */
static void test_sign_step(void)
{
    static const float losses[] = {2.0f, 2.0f, 4.0f, 1.0f, 0.25f, 100.0f, NAN, 3.0f, INFINITY, 0.0f, 1e30f, 2.0f, -5.0f, 1.3f};
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_pace p = {5, 20, 3, 0}, bad;
    double mean = 0;
    int32_t step;
    size_t i;
    for (i = 0; i < sizeof losses / sizeof *losses; i++) {
        const double loss = fmin(fmax(floor((double)losses[i] * 65536), 0), 70368744177664.0);
        double want = 0;
        CHECK_OK(t.c, tern_sign_step(t.c, &p, losses[i], &step));
        if (isfinite(losses[i])) {
            mean = mean == 0 ? loss : mean + floor((loss - mean) / 8);
            want = fmin(fmax(floor(5 * loss / mean + 0.5), 1), 20);
        }
        CHECK(step == (int32_t)want && (double)p.mean == mean,
              "loss %g: step %d, mean %.0f; not %g, %.0f", losses[i], step, (double)p.mean, want, mean);
    }
    memset(&p, 0, sizeof p);
    CHECK_OK(t.c, tern_sign_step(t.c, &p, 0.0f, &step));
    CHECK(step == 1 && p.mean == 0, "a loss of 0 gives %d", step);
    CHECK_OK(t.c, tern_sign_step(t.c, &p, 3.0f, &step));
    CHECK(step == 4, "the first step is %d", step);
    bad = p; bad.first = 128; CHECK_FAILS(t.c, tern_sign_step(t.c, &bad, 1.0f, &step), TERN_E_ARGUMENT, "first 128");
    bad = p; bad.most = -1; CHECK_FAILS(t.c, tern_sign_step(t.c, &bad, 1.0f, &step), TERN_E_ARGUMENT, "most -1");
    bad = p; bad.shift = 31; CHECK_FAILS(t.c, tern_sign_step(t.c, &bad, 1.0f, &step), TERN_E_ARGUMENT, "shift 31");
    bad = p; bad.mean = -1; CHECK_FAILS(t.c, tern_sign_step(t.c, &bad, 1.0f, &step), TERN_E_ARGUMENT, "mean -1");
    CHECK_FAILS(t.c, tern_sign_step(t.c, NULL, 1.0f, &step), TERN_E_ARGUMENT, "NULL");
    test_close(&t);
}

/* The rate of flips falls by a line. */
static void test_linear_schedule(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const tern_schedule s = {TERN_LINEAR, 3.0f, 0.0f, 0, 0, 100};
    uint32_t step;
    for (step = 1; step <= 101; step++) {
        float push = 9;
        CHECK_OK(t.c, tern_schedule_rate(t.c, &s, step, &push));
        CHECK(fabs(push - 3.0 * fmax(0, 1 - step / 100.0)) < 1e-6, "step %d: %g", (int)step, push);
    }
    test_close(&t);
}

static void suite_true_ternary(void)
{
    RUN(test_rounding);
    RUN(test_rounding_is_unbiased);
    RUN(test_rounding_faults);
    RUN(test_dequantized);
    RUN(test_flips);
    RUN(test_skipped_flips);
    RUN(test_tiny_signs);
    RUN(test_flip_nan);
    RUN(test_votes_at_the_ends);
    RUN(test_set_accumulators);
    RUN(test_flip_refusals);
    RUN(test_integer_gradients);
    RUN(test_integer_gradients_are_unbiased);
    RUN(test_integer_extremes);
    RUN(test_canonical_backward);
    RUN(test_fixed_products);
    RUN(test_fixed_extremes);
    RUN(test_fixed_modes);
    RUN(test_flip_training);
    RUN(test_flip_resume);
    RUN(test_flip_files);
    RUN(test_descent);
    RUN(test_flip_embedding);
    RUN(test_strict);
    RUN(test_flip_bytes);
    RUN(test_sign_step);
    RUN(test_linear_schedule);
}
