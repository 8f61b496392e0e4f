/* Tests of [CUDA-8] in ternary_cuda.cu. */

static const int64_t test_counts[] = {1, 3, 15, 16, 17, 127, 4097};

/* Numbers of every size, some of them special. */
static float test_any_float()
{
    static const float special[] = {0.0f, -0.0f, 1e-40f, -1e-45f, 65519.0f, 65520.0f, 1e-6f, 3.4e38f, -6.1e-5f, 1.00390625f};
    if (test_random() % 4 == 0) return special[test_random() % 10];
    return tern__float(test_random() << 8 | test_random() % 256 % 0x7F);
}
static float test_finite_float()
{
    const float x = test_any_float();
    return tern__finite(x) ? x : 1.5f;
}
static float test_four() { return 4.0f * test_uniform(); }
static const float test_nan = tern__float(0x7FC00000u), test_infinity = tern__float(0x7F800000u);

/* -- rows by id -- */

static void test_gathered(const tern_matrix &shape, int64_t shift)
{
    const int64_t n = 11;
    const test_matrix packed(shape);
    mirror<int32_t> ids(n, [&] { return (int32_t)(test_random() % (uint32_t)shape.rows); });
    mirror<float> y(n * shape.cols + shift, test_uniform);
    test_both([&](tern_context *c, int side) {
        tern_gather_args a = {};
        a.m = packed.on(side);
        a.n = n;
        a.ids = ids[side];
        a.y = y[side] + shift;
        return tern_gather(c, &a);
    });
    CHECK_SAME(y);
}

static void test_cuda_gather_packed()
{
    const int64_t columns[] = {1, 15, 16, 17, 20, 21, 127, 128, 1040};
    const tern_type scale_types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};
    const int32_t grains[] = {TERN_PER_ROW, TERN_PER_TENSOR, 24, 33, 7};
    for (int64_t cols : columns)
        for (int i = 0; i < 40; i++) {
            tern_matrix m = {};
            m.rows = 37;
            m.cols = cols;
            m.encoding = i % 2 ? TERN_BASE3 : TERN_2BIT;
            m.scale_type = scale_types[i / 5 % 4];
            m.grain = grains[i % 5];
            test_gathered(m, i / 10 % 2);
        }
}

/* Dense rows, more than there are blocks; ids out of range at both ends. */
static void test_cuda_gather_dense()
{
    const int64_t n = 150, rows = 9;
    for (int64_t cols : test_counts)
        for (int bad = 0; bad < 2; bad++) {
            mirror<float> w(rows * cols, test_uniform), y(n * cols, test_uniform);
            mirror<int32_t> ids(n, [&] { return (int32_t)(test_random() % (uint32_t)(rows + 3 * bad)) - bad; });
            test_both([&](tern_context *c, int side) {
                tern_gather_args a = {};
                a.m.rows = rows;
                a.m.cols = cols;
                a.w = w[side];
                a.n = n;
                a.ids = ids[side];
                a.y = y[side];
                return tern_gather(c, &a);
            });
            CHECK_SAME(y);
        }
}

static void test_scattered(int64_t n, int64_t rows, int64_t cols, int64_t shift)
{
    mirror<int32_t> ids(n, [&] { return (int32_t)(test_random() % (uint32_t)(rows + 2)) - 1; });
    mirror<float> dy(n * cols + shift, test_uniform), dw(rows * cols + shift, test_uniform);
    dw[CPU][shift] = -0.0f;
    dw.send();
    test_both([&](tern_context *c, int side) {
        tern_scatter_args a = {};
        a.rows = rows;
        a.cols = cols;
        a.n = n;
        a.ids = ids[side];
        a.dy = dy[side] + shift;
        a.dw = dw[side] + shift;
        return tern_scatter(c, &a);
    });
    CHECK_SAME(dw);
}

static void test_cuda_scatter()
{
    test_scattered(1, 1, 1, 0);
    test_scattered(17, 4, 15, 0);
    test_scattered(150, 200, 33, 0);
    test_scattered(150, 1, 128, 1);
    test_scattered(700, 5, 8, 0);   /* rounds of 128 ids */
    test_scattered(1500, 3, 1027, 0); /* of 1024, and two blocks of columns */
}

/* -- element by element -- */

static void test_cuda_fill()
{
    for (int64_t n : test_counts)
        for (int i = 0; i < 4; i++) {
            mirror<float> x(n + i / 2, test_uniform);
            test_both([&](tern_context *c, int side) {
                tern_fill_args a = {};
                a.count = n;
                a.x = x[side] + i / 2;
                a.deviation = i % 2 ? 0.25f : 0.0f;
                a.seed = 123456789012345u;
                a.stream = 7;
                return tern_fill(c, &a);
            });
            CHECK_SAME(x);
        }
}

static const tern_type test_float_types[] = {TERN_F32, TERN_BF16, TERN_F16};

/* Bytes of n elements of a type, of which the first is shifted by one element when asked. */
static void test_cast_between(tern_type from, tern_type to, int64_t n, int64_t shift)
{
    const int64_t from_bytes = tern__type_bytes(from), to_bytes = tern__type_bytes(to);
    mirror<uint8_t> src((n + shift) * from_bytes), dst((n + shift) * to_bytes);
    for (int64_t i = 0; i < n + shift; i++) tern__store_float(from, src[CPU], i, test_any_float());
    src.send();
    test_both([&](tern_context *c, int side) {
        tern_cast_args a = {};
        a.count = n;
        a.from = from;
        a.to = to;
        a.src = src[side] + shift * from_bytes;
        a.dst = dst[side] + shift * to_bytes;
        return tern_cast(c, &a);
    });
    CHECK_SAME(dst);
    if (from != to) return;
    test_both([&](tern_context *c, int side) {
        tern_cast_args a = {};
        a.count = n;
        a.from = a.to = from;
        a.src = a.dst = src[side];
        return tern_cast(c, &a);
    });
    CHECK_SAME(src);
}

static void test_cuda_cast()
{
    for (tern_type from : test_float_types)
        for (tern_type to : test_float_types)
            for (int64_t n : test_counts)
                for (int64_t shift = 0; shift < 2; shift++) test_cast_between(from, to, n, shift);
}

/* What the CPU refuses becomes zero, and the first is named. */
static void test_cuda_cast_finite()
{
    const int64_t n = 4097;
    mirror<float> x(n, test_finite_float);
    mirror<uint16_t> y(n);
    tern_cast_args a = {};
    a.count = n;
    a.from = TERN_F32;
    a.to = TERN_BF16;
    a.finite = 1;
    a.src = x[GPU];
    a.dst = y[GPU];
    CHECK_OK(tern_cast(test_context[GPU], &a));
    CHECK_OK(tern_sync(test_context[GPU]));
    x[CPU][4096] = test_nan;
    x[CPU][1027] = -test_infinity;
    x.send();
    CHECK_OK(tern_cast(test_context[GPU], &a));
    CHECK(tern_sync(test_context[GPU]) == TERN_E_NONFINITE);
    CHECK(strcmp(tern_last_error(test_context[GPU])->text, "cast: element 1027 is not finite and was taken as zero") == 0);
    x[CPU][1027] = x[CPU][4096] = 0.0f;
    a.src = x[CPU];
    a.dst = y[CPU];
    CHECK(tern_cast(test_context[CPU], &a) == TERN_OK);
    CHECK_SAME(y);
}

/* alias: what y, da and db are beside arrays of their own. */
static void test_mapped(tern_map_fn fn, int64_t n, int64_t shift, int alias)
{
    const int64_t all = n + shift;
    const bool two = fn == TERN_MAP_ADD || fn == TERN_MAP_MUL;
    mirror<float> a(all, test_four), b(all, test_four), y(all, test_uniform), dy(all, test_uniform), da(all, test_uniform),
                  db(all, test_uniform);
    tern_map_args m = {};
    m.fn = fn;
    m.count = n;
    m.alpha = 0.3f;
    test_both([&](tern_context *c, int side) {
        m.a = a[side] + shift;
        m.b = two || alias ? b[side] + shift : NULL;
        m.y = (alias == 1 ? a : alias == 2 ? b : y)[side] + shift;
        return tern_map(c, &m);
    });
    test_both([&](tern_context *c, int side) {
        m.a = fn == TERN_MAP_SCALE && !alias ? NULL : a[side] + shift;
        m.b = two ? b[side] + shift : NULL;
        m.dy = dy[side] + shift;
        m.da = two && alias == 2 ? NULL : (alias == 1 ? dy : da)[side] + shift;
        m.db = two && alias == 1 ? NULL : (two && alias == 2 ? dy : db)[side] + shift;
        return tern_map(c, &m);
    });
    CHECK_SAME(a);
    CHECK_SAME(b);
    CHECK_SAME(y);
    CHECK_SAME(dy);
    CHECK_SAME(da);
    CHECK_SAME(db);
}

static void test_cuda_map()
{
    for (int fn = TERN_MAP_ADD; fn <= TERN_MAP_GELU; fn++)
        for (int64_t n : test_counts)
            for (int i = 0; i < 6; i++) test_mapped((tern_map_fn)fn, n, i / 3, i % 3);
}

/* -- norm -- */

enum { NORM_GAIN = 1, NORM_IN_PLACE = 2, NORM_ADD = 4, NORM_DGAIN = 8, NORM_BAD = 16, NORM_VARIANTS = 32 };

static tern_norm_args norm_of(int64_t n, int64_t cols)
{
    tern_norm_args a = {};
    a.n = n;
    a.cols = cols;
    a.eps = 1e-5f;
    return a;
}

/* Three rows that no norm can use, of which the first is none of the extremes. */
static void test_spoil(mirror<float> &x, int64_t n, int64_t cols)
{
    x[CPU][n / 2 * cols + cols - 1] = test_nan;
    x[CPU][n / 3 * cols] = test_infinity;
    x[CPU][(n - 1) * cols + cols / 2] = 3e38f; /* its square is not finite */
    x.send();
}

static void test_normed(int64_t n, int64_t cols, int64_t shift, int variant)
{
    const int64_t all = n * cols + shift;
    mirror<float> x(all, test_four), gain(cols, test_uniform), y(all, test_uniform), dy(all, test_uniform), dx(all, test_uniform),
                  dgain(cols, test_uniform);
    tern_norm_args a = norm_of(n, cols);
    if (variant & NORM_BAD) test_spoil(x, n, cols);
    dgain[CPU][0] = -0.0f; /* stays so where no row can be used */
    dgain.send();
    test_both([&](tern_context *c, int side) {
        a.x = x[side] + shift;
        a.gain = variant & NORM_GAIN ? gain[side] : NULL;
        a.dy = dy[side] + shift;
        a.dx = variant & NORM_IN_PLACE ? dy[side] + shift : dx[side] + shift;
        a.dgain = variant & NORM_DGAIN ? dgain[side] : NULL;
        a.add = variant & NORM_ADD;
        return tern_norm(c, &a);
    });
    test_both([&](tern_context *c, int side) {
        a.x = x[side] + shift;
        a.gain = variant & NORM_GAIN ? gain[side] : NULL;
        a.dy = NULL;
        a.y = variant & NORM_IN_PLACE ? x[side] + shift : y[side] + shift;
        return tern_norm(c, &a);
    });
    CHECK_SAME(x);
    CHECK_SAME(y);
    CHECK_SAME(dy);
    CHECK_SAME(dx);
    CHECK_SAME(dgain);
}

static void test_cuda_norm()
{
    const int64_t columns[] = {1, 15, 16, 17, 127, 1024, 1025, 2052, 4097};
    for (int64_t cols : columns)
        for (int variant = 0; variant < NORM_VARIANTS; variant += cols < 100 ? 1 : 3) test_normed(5, cols, cols % 2, variant);
    test_normed(2, 5, 0, NORM_DGAIN | NORM_BAD); /* no row can be used */
    test_normed(150, 3, 0, NORM_DGAIN | NORM_BAD);
    test_normed(257, 33, 0, NORM_DGAIN | NORM_GAIN);
    test_normed(1, 35000, 0, NORM_GAIN); /* more blocks of 1024 than warps */
}

/* dgain alone, and in pieces that its work memory would be too small for. */
static void test_cuda_norm_gain()
{
    const int64_t n = 131, cols = 37;
    mirror<float> x(n * cols, test_four), dy(n * cols, test_uniform), dgain(cols, test_uniform), pieces(cols);
    test_spoil(x, n, cols);
    memcpy(pieces[CPU], dgain[CPU], cols * sizeof(float));
    pieces.send();
    tern_norm_args a = norm_of(n, cols);
    test_both([&](tern_context *c, int side) {
        a.x = x[side];
        a.dy = dy[side];
        a.dgain = dgain[side];
        return tern_norm(c, &a);
    });
    CHECK_SAME(dgain);
    a.dgain = pieces[GPU];
    tern__gpu_norm_gain(tern__gpu_of(&test_context[GPU]->run), &a, 7);
    memcpy(pieces[CPU], dgain[CPU], cols * sizeof(float));
    CHECK_SAME(pieces);
}

/* -- rotary positions -- */

static void test_turned(int64_t n, int32_t heads, int32_t dim, int64_t gap, int64_t period, int inverse)
{
    const int64_t stride = (int64_t)heads * dim + gap;
    mirror<float> x(n * stride, test_uniform);
    test_both([&](tern_context *c, int side) {
        tern_rope_args a = {};
        a.n = n;
        a.heads = heads;
        a.dim = dim;
        a.x = x[side];
        a.stride = stride;
        a.start = 1000;
        a.period = period;
        a.base = inverse ? 500.0f : 0.0f;
        a.inverse = inverse;
        return tern_rope(c, &a);
    });
    CHECK_SAME(x);
}

static void test_cuda_rope()
{
    for (int inverse = 0; inverse < 2; inverse++) {
        test_turned(1, 1, 2, 0, 1, inverse);
        test_turned(17, 3, 6, 5, 100, inverse);
        test_turned(150, 4, 10, 0, 31, inverse);
        test_turned(3, 9, 66, 1, 2, inverse);
        test_turned(2, 5, 1024, 0, 5, inverse);
    }
}

/* -- loss and sums -- */

static void test_lost(int64_t n, int64_t classes, int64_t shift, int kind) /* 0: losses alone, 1: dlogits, 2: in place */
{
    mirror<float> x(n * classes + shift, test_four), losses(n, test_uniform), dx(n * classes + shift, test_uniform);
    mirror<int32_t> targets(n, [&] { return (int32_t)(test_random() % (uint32_t)classes); });
    if (n > 7) {
        targets[CPU][7] = (int32_t)classes;
        targets[CPU][6] = -1;
        x[CPU][5 * classes + shift] = test_infinity;
        x[CPU][(n - 1) * classes + classes / 2 + shift] = test_nan;
        x[CPU][4 * classes + classes - 1 + shift] = 150.0f; /* all others get nothing */
        for (int64_t i = 0; i < classes; i++) x[CPU][3 * classes + i + shift] = -5.0f - (float)i; /* the largest is negative */
        for (int64_t i = 0; i < classes; i++) x[CPU][2 * classes + i + shift] = i % 2 ? 0.0f : -0.0f;
        targets.send();
        x.send();
    }
    test_both([&](tern_context *c, int side) {
        tern_loss_args a = {};
        a.n = n;
        a.classes = classes;
        a.logits = x[side] + shift;
        a.targets = targets[side];
        a.losses = losses[side];
        a.dlogits = kind == 0 ? NULL : (kind == 1 ? dx : x)[side] + shift;
        a.scale = 1.0f / 3.0f;
        return tern_loss(c, &a);
    });
    CHECK_SAME(losses);
    CHECK_SAME(x);
    CHECK_SAME(dx);
}

static void test_cuda_loss()
{
    const int64_t classes[] = {1, 2, 15, 16, 17, 127, 1024, 1025, 3001};
    for (int64_t k : classes)
        for (int i = 0; i < 3; i++) test_lost(9, k, k % 3 == 0, i);
    test_lost(150, 5, 0, 2);
    test_lost(1, 35000, 0, 1);
}

static void test_cuda_sum()
{
    const int64_t counts[] = {1, 17, 1023, 1024, 1025, 2049, 4097, (1 << 20) + 1027};
    for (int64_t n : counts)
        for (int kind = TERN_SUM; kind <= (n > 5000 ? TERN_SUM : TERN_SUM_SQUARES); kind++) {
            mirror<float> x(n, test_uniform), y(2, test_uniform);
            for (int add = 0; add < 2; add++)
                test_both([&](tern_context *c, int side) {
                    tern_sum_args a = {};
                    a.kind = (tern_sum_kind)kind;
                    a.count = n;
                    a.x = x[side];
                    a.y = y[side] + add;
                    a.add = add;
                    return tern_sum(c, &a);
                });
            CHECK_SAME(y);
        }
}

/* Of halves, whose block sums are floats; the first element may be off alignment. */
static void test_cuda_sum_halves()
{
    for (int64_t n : {1, 17, 1025, 4097})
        for (tern_type type : {TERN_BF16, TERN_F16})
            for (int kind = TERN_SUM; kind <= TERN_SUM_SQUARES; kind++) {
                mirror<uint16_t> x(n + 1);
                mirror<float> y(1);
                for (int64_t i = 0; i <= n; i++) tern__store_float(type, x[CPU], i, test_uniform());
                x.send();
                test_both([&](tern_context *c, int side) {
                    tern_sum_args a = {};
                    a.kind = (tern_sum_kind)kind;
                    a.count = n;
                    a.type = type;
                    a.x = x[side] + n % 2;
                    a.y = y[side];
                    return tern_sum(c, &a);
                });
                CHECK_SAME(y);
            }
}

/* -- optimizers -- */

enum { OPTIMIZE_SGD = 1, OPTIMIZE_BF16 = 2, OPTIMIZE_CLIP = 4, OPTIMIZE_NO_MOMENTUM = 8, OPTIMIZE_BF16_MOMENTS = 16, OPTIMIZE_NEAREST = 32,
       OPTIMIZE_VARIANTS = 64 };

static void test_optimized(int64_t n, int64_t shift, int variant, float last_norm2)
{
    const bool bf16 = variant & OPTIMIZE_BF16, halves = variant & OPTIMIZE_BF16_MOMENTS,
               momentum = !(variant & OPTIMIZE_SGD && variant & OPTIMIZE_NO_MOMENTUM);
    mirror<float> w32(n + shift, test_uniform), grad(n + shift, test_uniform), m1(n + shift), m2(n + shift), norm2(1, [] { return 9.0f; });
    mirror<uint16_t> w16(n + shift, [] { return tern__to_bf16(test_uniform()); }), h1(n + shift), h2(n + shift);
    for (uint32_t step = 1; step <= 3; step++) {
        for (int64_t i = 0; i < n + shift; i++) grad[CPU][i] = test_uniform();
        grad.send();
        if (step == 3) norm2[CPU][0] = last_norm2;
        norm2.send();
        test_both([&](tern_context *c, int side) {
            tern_optimize_args a = {};
            a.kind = variant & OPTIMIZE_SGD ? TERN_SGD : TERN_ADAMW;
            a.count = n;
            a.type = bf16 ? TERN_BF16 : TERN_F32;
            a.w = bf16 ? (void *)(w16[side] + shift) : w32[side] + shift;
            a.grad = grad[side] + shift;
            a.nearest = variant & OPTIMIZE_NEAREST;
            a.moment_type = halves ? TERN_BF16 : TERN_F32;
            a.moment1 = !momentum ? NULL : halves ? (void *)(h1[side] + shift) : m1[side] + shift;
            a.moment2 = halves ? (void *)(h2[side] + shift) : m2[side] + shift;
            a.norm2 = variant & OPTIMIZE_CLIP ? norm2[side] : NULL;
            a.clip = variant & OPTIMIZE_CLIP ? 1.5f : 0.0f;
            a.rate = 0.01f; a.beta1 = 0.9f; a.beta2 = 0.95f; a.eps = 1e-8f; a.decay = 0.1f;
            a.seed = 987654321098765u; a.step = step; a.stream = 5;
            return tern_optimize(c, &a);
        });
    }
    CHECK_SAME(w32);
    CHECK_SAME(w16);
    CHECK_SAME(grad);
    CHECK_SAME(m1);
    CHECK_SAME(m2);
    CHECK_SAME(h1);
    CHECK_SAME(h2);
}

static void test_cuda_optimize()
{
    for (int64_t n : test_counts)
        for (int variant = 0; variant < OPTIMIZE_VARIANTS; variant++) test_optimized(n, variant / 4 % 3 == 2, variant, 2.0f);
}

/* Below the clip; and not finite: weights and moments as they were, gradients zero, the step named. */
static void test_cuda_optimize_norms()
{
    const float norms[] = {1.0f, 0.0f, test_infinity, test_nan};
    for (float norm2 : norms)
        for (int variant = OPTIMIZE_CLIP; variant < OPTIMIZE_CLIP + 4; variant++) test_optimized(1027, 0, variant, norm2);
}

/* -- learned scales -- */

static void test_cuda_scale_grad()
{
    const int64_t shapes[][2] = {{1, 1}, {17, 127}, {16, 1024}, {3, 4097}, {1500, 20}};
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16};
    int i = 0;
    for (const auto &s : shapes)
        for (tern_rule rule : {TERN_LSQ, TERN_SEQ})
            for (int plain : {0, 1}) {
                const tern_type encoding = i % 2 ? TERN_BASE3 : TERN_2BIT;
                pack_pair p(test_shape(s[0], s[1], rule == TERN_LSQ ? TERN_PER_TENSOR : TERN_PER_ROW, encoding, TERN_F32));
                pack_weights w(types[i++ % 3], s[0], s[1]);
                mirror<float> alpha(s[0], [] { return 0.6f + 0.2f * test_uniform(); }), dw(s[0] * s[1], test_uniform),
                              dalpha(s[0], test_uniform);
                test_both([&](tern_context *c, int side) {
                    tern_ternarize_args t = {};
                    tern_scale_grad_args a = {};
                    t.m = a.m = p.m[side];
                    t.rule = a.rule = rule;
                    t.type = a.type = w.type;
                    t.w = a.w = w.bytes[side];
                    t.alpha = alpha[side];
                    a.dw = dw[side];
                    a.dalpha = dalpha[side];
                    a.plain = plain;
                    TERN__TRY(tern_ternarize(c, &t));
                    return tern_scale_grad(c, &a);
                });
                CHECK_SAME(dalpha);
            }
}

/* -- rotation and dead zone -- */

static void test_rotated(int64_t n, int64_t cols, int inverse, int in_place)
{
    mirror<float> x(n * cols, test_uniform), y(n * cols, test_uniform);
    test_both([&](tern_context *c, int side) {
        tern_hadamard_args a = {};
        a.n = n;
        a.cols = cols;
        a.x = x[side];
        a.y = in_place ? x[side] : y[side];
        a.seed = 77;
        a.inverse = inverse;
        return tern_hadamard(c, &a);
    });
    CHECK_SAME(x);
    CHECK_SAME(y);
}

static void test_cuda_hadamard()
{
    for (int variant = 0; variant < 4; variant++) {
        for (int64_t cols : test_counts) test_rotated(3, cols, variant & 1, variant / 2);
        test_rotated(70, 24, variant & 1, variant / 2);
    }
    test_rotated(1, TERN__ROTATED_HERE, 0, 0);
    test_rotated(2, TERN__ROTATED_HERE + 1, 0, 0); /* beyond shared memory */
    test_rotated(2, TERN__ROTATED_HERE + 1, 1, 1);
}

static void test_dead_zone(int64_t cols, int variant)
{
    const int32_t grains[] = {TERN_PER_ROW, TERN_PER_TENSOR, 24, 33};
    const tern_matrix m = test_shape(21, cols, grains[variant % 4], variant % 2 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
    const test_matrix packed(m);
    mirror<float> w(m.rows * cols, [] { /* two numbers of BF16 too */
        const uint32_t half = tern__bits(test_uniform()) >> 16;
        return tern__float(half << 16 | half);
    });
    mirror<float> dw(m.rows * cols, test_uniform), bias(m.rows, test_uniform), dbias(m.rows, test_uniform);
    test_both([&](tern_context *c, int side) {
        tern_dead_zone_args a = {};
        a.m = packed.on(side);
        a.lambda = 0.375f;
        a.type = variant / 4 == 2 ? TERN_BF16 : TERN_F32;
        a.w = w[side];
        if (variant / 4 != 0) a.bias = bias[side];
        if (variant / 4 != 1) a.dw = dw[side];
        a.dbias = dbias[side];
        return tern_dead_zone(c, &a);
    });
    CHECK_SAME(bias);
    CHECK_SAME(dw);
}

static void test_cuda_dead_zone()
{
    for (int64_t cols : test_counts)
        for (int variant = 0; variant < 12; variant++) test_dead_zone(cols, variant);
}

/* -- limits -- */

static void test_unsupported(tern_result result, const char *text)
{
    CHECK(result == TERN_E_UNSUPPORTED);
    CHECK(strstr(tern_last_error(test_context[GPU])->text, text) != NULL);
}

static void test_cuda_element_limits()
{
    tern_context *c = test_context[GPU];
    mirror<float> x(1);
    mirror<int32_t> id(1);
    tern_norm_args norm = norm_of(1, TERN__LONGEST_ROW + 1);
    tern_loss_args loss = {};
    tern_scatter_args scatter = {};
    tern_sum_args sum = {};
    norm.x = norm.y = loss.losses = scatter.dw = sum.y = x[GPU];
    sum.x = loss.logits = scatter.dy = x[GPU];
    loss.targets = scatter.ids = id[GPU];
    loss.n = scatter.n = scatter.rows = 1;
    loss.classes = scatter.cols = TERN__LONGEST_ROW + 1;
    sum.count = ((int64_t)1 << 30) + 1;
    test_unsupported(tern_norm(c, &norm), "norm: rows of 1048577; 1048576 is the most");
    test_unsupported(tern_loss(c, &loss), "loss: rows of 1048577; 1048576 is the most");
    test_unsupported(tern_scatter(c, &scatter), "scatter: rows of 1048577; 1048576 is the most");
    test_unsupported(tern_sum(c, &sum), "sum: 1073741825 floats; 1073741824 is the most");
    CHECK_OK(tern_sync(c));
}

static void suite_cuda_elements()
{
    RUN(test_cuda_gather_packed);
    RUN(test_cuda_gather_dense);
    RUN(test_cuda_scatter);
    RUN(test_cuda_fill);
    RUN(test_cuda_cast);
    RUN(test_cuda_cast_finite);
    RUN(test_cuda_map);
    RUN(test_cuda_norm);
    RUN(test_cuda_norm_gain);
    RUN(test_cuda_rope);
    RUN(test_cuda_loss);
    RUN(test_cuda_sum);
    RUN(test_cuda_sum_halves);
    RUN(test_cuda_optimize);
    RUN(test_cuda_optimize_norms);
    RUN(test_cuda_scale_grad);
    RUN(test_cuda_hadamard);
    RUN(test_cuda_dead_zone);
    RUN(test_cuda_element_limits);
}
