/* Tests of [CUDA-8] in ternary_cuda.cu that concern true-ternary training: rounding, flips, and what ternarize leaves for them. */

/* -- stochastic rounding -- */

enum { ROUND_ROW = 1, ROUND_WHOLE = 2, ROUND_SCALES = 4, ROUND_BAD = 8, ROUND_VARIANTS = 16 };

static void test_rounded(int64_t n, int64_t cols, int64_t shift, int variant)
{
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};
    const test_matrix m(test_shape(cols, 90, variant & ROUND_ROW ? 33 : TERN_PER_TENSOR, TERN_2BIT, types[cols % 4]));
    mirror<float> x(n * cols + shift, test_four), row(n, test_uniform), scale(n);
    mirror<int8_t> q(n * cols + shift);
    for (int64_t i = 0; i < cols && n > 3; i++) x[CPU][3 * cols + i + shift] = 0.0f;
    if (variant & ROUND_BAD && n > 2) {
        x[CPU][2 * cols + cols - 1 + shift] = -test_infinity;
        x[CPU][(n - 1) * cols + shift] = test_nan;
    }
    x.send();
    test_both([&](tern_context *c, int side) {
        tern_round_i8_args a = {};
        a.n = n;
        a.cols = cols;
        a.x = x[side] + shift;
        a.row = variant & ROUND_ROW ? row[side] : NULL;
        if (variant & ROUND_SCALES) a.m = m.on(side);
        a.group = variant & ROUND_SCALES && m.m.grain > 0 ? 2 : 0;
        a.whole = variant & ROUND_WHOLE;
        a.seed = 123456789012345u;
        a.stream = 9;
        a.q = q[side] + shift;
        a.scale = scale[side];
        return tern_round_i8(c, &a);
    });
    CHECK_SAME(q);
    CHECK_SAME(scale);
}

static void test_cuda_round_i8()
{
    for (int64_t cols : {1, 7, 8, 15, 16, 17, 127, 1100})
        for (int variant = 0; variant < ROUND_VARIANTS; variant += cols < 100 ? 1 : 3) test_rounded(6, cols, cols % 3 == 0, variant);
    test_rounded(150, 5, 0, ROUND_ROW);
    test_rounded(150, 4, 0, ROUND_WHOLE | ROUND_BAD);
    test_rounded(2, 4097, 1, ROUND_ROW | ROUND_SCALES);
}

static void test_cuda_dequantize()
{
    for (int64_t cols : test_counts)
        for (int variant = 0; variant < 8; variant++) {
            const int64_t n = 5, gap = variant & 4 ? 3 : 0, row = cols + gap;
            mirror<int32_t> x(n * cols, [] { return (int32_t)(test_random() << 8 ^ test_random()); });
            mirror<float> scale(n, test_uniform), y(n * row, test_uniform);
            test_both([&](tern_context *c, int side) {
                tern_dequantize_args a = {};
                a.n = n;
                a.cols = cols;
                a.x = x[side];
                a.scale = scale[side];
                a.whole = variant & 1;
                a.add = variant & 2;
                a.y = y[side];
                a.y_row = row;
                return tern_dequantize(c, &a);
            });
            CHECK_SAME(y);
        }
}

/* -- what ternarize leaves for the accumulator -- */

static void test_left_over(const tern_matrix &m, tern_rule rule, tern_type type)
{
    pack_pair p(m);
    pack_weights w(type, m.rows, m.cols);
    mirror<int8_t> accum(m.rows * m.cols);
    mirror<float> alpha(m.rows, [] { return 0.6f + 0.2f * test_uniform(); });
    test_both([&](tern_context *c, int side) {
        tern_ternarize_args a = {};
        a.m = p.m[side];
        a.rule = rule;
        a.type = type;
        a.w = w.bytes[side];
        a.alpha = alpha[side];
        a.accum = accum[side];
        a.theta = 31;
        return tern_ternarize(c, &a);
    });
    CHECK_SAME(accum);
}

static void test_cuda_left_over()
{
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16};
    const int32_t grains[] = {TERN_PER_ROW, TERN_PER_TENSOR, 24, 33};
    int i = 0;
    for (int64_t cols : {1, 15, 17, 127, 1030})
        for (int32_t grain : grains) {
            const tern_matrix m = test_shape(i % 3 ? 33 : 5, cols, grain, i % 2 ? TERN_BASE3 : TERN_2BIT, i % 5 ? TERN_F32 : TERN_POW2);
            test_left_over(m, i % 4 == 3 ? TERN_TWN : TERN_ABSMEAN, types[i % 3]);
            i++;
        }
}

/* -- flips -- */

struct flip_case { tern_matrix m; tern_flip_rule rule; int32_t scale_step; float push; };

/* Steps with gradients of their own, the last with one that is zero and, where asked, one that is not finite. */
static void test_flipped(const flip_case &t, int64_t shift, bool bad)
{
    const int64_t count = t.m.rows * t.m.cols;
    const test_matrix w(t.m);
    mirror<float> grad(count + shift), sum_abs(1);
    mirror<int8_t> accum(count + shift, [] { return (int)(test_random() % 61) - 30; });
    mirror<int8_t> votes(tern__shape_of(&t.m).scales, [] { return (int)(test_random() % 63) - 31; });
    mirror<int64_t> counts(sizeof(tern_flips) / sizeof(int64_t));
    for (uint32_t step = 1; step <= (bad ? 4u : 3u); step++) {
        for (int64_t i = 0; i < count + shift; i++) grad[CPU][i] = step == 3 ? 0.0f : test_random() % 8 ? test_uniform() : 0.0f;
        if (step == 4) grad[CPU][shift + count / 2] = test_nan;
        grad.send();
        test_both([&](tern_context *c, int side) {
            tern_sum_args s = {};
            tern_flip_args a = {};
            s.kind = TERN_SUM_ABS;
            s.count = count;
            s.x = grad[side] + shift;
            s.y = sum_abs[side];
            a.m = w.on(side);
            a.rule = t.rule;
            a.grad = grad[side] + shift;
            a.accum = accum[side] + shift;
            a.votes = votes[side];
            a.sum_abs = sum_abs[side];
            a.push = t.push;
            a.sign_step = 5;
            a.theta = 32;
            a.scale_step = t.scale_step;
            a.scale_theta = 32;
            a.seed = 987654321098765u;
            a.step = step;
            a.stream = 3;
            a.counts = (tern_flips *)counts[side];
            TERN__TRY(tern_sum(c, &s));
            return tern_flip(c, &a);
        });
        CHECK_SAME(grad);
    }
    CHECK_SAME(accum);
    CHECK_SAME(votes);
    CHECK_SAME(counts);
    CHECK(const_cast<test_matrix &>(w).trits.same("trits") && const_cast<test_matrix &>(w).scales.same("scales"));
}

static void test_cuda_flip()
{
    const int32_t grains[] = {TERN_PER_ROW, TERN_PER_TENSOR, 24, 33, 2};
    int i = 0;
    for (int64_t cols : {1, 15, 16, 17, 127, 1030})
        for (int32_t grain : grains) {
            const tern_flip_rule rule = i % 3 == 2 ? TERN_FLIP_SIGN : TERN_FLIP_PROPORTIONAL;
            const tern_matrix m = test_shape(i % 4 ? 37 : 3, cols, grain, i % 2 ? TERN_BASE3 : TERN_2BIT, TERN_POW2);
            test_flipped({m, rule, i / 2 % 2 * 3, i % 7 ? 3.0f : 60.0f}, i % 5 == 4, i % 6 == 0);
            i++;
        }
    test_flipped({test_shape(37, 70, 33, TERN_BASE3, TERN_F16), TERN_FLIP_PROPORTIONAL, 0, 3.0f}, 0, true);
    /* More panels than one block takes at once. */
    test_flipped({test_shape(2000, 20, TERN_PER_TENSOR, TERN_2BIT, TERN_POW2), TERN_FLIP_SIGN, 2, 0.0f}, 0, false);
}

static void suite_cuda_training()
{
    RUN(test_cuda_round_i8);
    RUN(test_cuda_dequantize);
    RUN(test_cuda_left_over);
    RUN(test_cuda_flip);
}
