/* Tests of [CUDA-5] in ternary_cuda.cu. Seen to fail, of products by wgmma, beside what cuda_faults.cpp breaks: other places or
   another descriptor of the tile, a stage that is asked for too early, published behind the barrier or waited for too late,
   weights beyond a step's units, a wrong quad. */

/* Activations of both sides. Memory behind the padding is what it was. */
struct quantized {
    tern__shape s;
    mirror<int8_t> q;
    mirror<float> scale;
    mirror<int32_t> sum;
    quantized(const tern_matrix &m, int64_t n) : s(tern__shape_of(&m)), q(n * s.stride), scale(n), sum(n * s.groups) {}
    void into(tern_quantize_args *a, int side) const { a->q = q[side]; a->scale = scale[side]; a->sum = sum[side]; }
    void into(tern_matmul_args *a, int side) const { a->q = q[side]; a->scale = scale[side]; a->sum = sum[side]; }
};

static void check_quantize(int64_t n, int64_t cols, int32_t grain, tern_type encoding, bool norm, bool gain, bool poison,
                           tern_act act = TERN_ACT_INT8)
{
    const tern_matrix m = test_shape(1, cols, grain, encoding, TERN_F32);
    mirror<float> x(n * cols, test_uniform), g(cols, test_uniform);
    quantized out(m, n);
    if (poison) {
        x[CPU][(n / 2) * cols + cols / 2] = tern__float(0x7FC00000u);
        x[CPU][(n - 1) * cols] = tern__float(0x7F800000u);
        for (int64_t i = 0; i < cols && n > 2; i++) x[CPU][i] = 0.0f;
        x.send();
    }
    test_both([&](tern_context *c, int side) {
        tern_quantize_args a = {};
        a.m = m;
        a.act = act;
        a.n = n;
        a.x = x[side];
        a.norm = norm ? TERN_NORM_RMS : TERN_NORM_NONE;
        a.gain = gain ? g[side] : NULL;
        a.eps = 1e-5f;
        out.into(&a, side);
        return tern_quantize(c, &a);
    });
    CHECK_SAME(out.q);
    CHECK_SAME(out.scale);
    CHECK_SAME(out.sum);
}

static void test_cuda_quantize()
{
    const int64_t cols[] = {1, 15, 16, 17, 127, 1024, 1025, 2049, 4097};
    for (int64_t k : cols) {
        check_quantize(3, k, TERN_PER_ROW, TERN_2BIT, true, false, false);
        check_quantize(1, k, TERN_PER_TENSOR, TERN_BASE3, false, true, false);
    }
    check_quantize(5, 300, 64, TERN_2BIT, true, true, false);
    check_quantize(5, 300, 50, TERN_BASE3, false, false, false);
    check_quantize(2, 37, 1, TERN_2BIT, true, false, false);
    check_quantize(2, 1300, 1100, TERN_BASE3, true, false, false);
}

/* Values beyond -8 and 7 among them: one of a row is far larger than the others. */
static void test_cuda_quantize_int4()
{
    const int64_t cols[] = {1, 15, 16, 17, 127, 1024, 1025, 2049, 4097};
    for (int64_t k : cols) {
        check_quantize(3, k, TERN_PER_ROW, TERN_2BIT, true, false, false, TERN_ACT_INT4);
        check_quantize(2, k, 50, TERN_BASE3, false, true, false, TERN_ACT_INT4);
    }
    check_quantize(7, 130, 32, TERN_BASE3, false, true, true, TERN_ACT_INT4);
    check_quantize(7, 130, TERN_PER_ROW, TERN_2BIT, true, false, true, TERN_ACT_INT4);
}

/* Bits through a layer and back: those of quantize, the product, and the gradient of the weights. */
static void check_bits(const tern_matrix &shape, int64_t n, bool bad, bool pieces = false)
{
    test_matrix w(shape);
    mirror<float> x(n * shape.cols, [] { return test_random() % 3 ? 0.0f : test_uniform(); }), bias(shape.rows, test_uniform),
                  y(n * shape.rows);
    mirror<float> dy(n * shape.rows, test_uniform), dw(shape.rows * shape.cols, test_uniform);
    quantized act(shape, n);
    if (bad) {
        x[CPU][(n - 1) * shape.cols + shape.cols / 2] = -INFINITY;
        x[CPU][n / 2 * shape.cols] = NAN;
        x.send();
    }
    test_both([&](tern_context *c, int side) {
        tern_linear_args a = {};
        tern_matmul_dw_args g = {};
        a.quantize.m = g.m = w.on(side);
        a.quantize.act = g.act = TERN_ACT_BIT;
        a.quantize.n = g.n = n;
        a.quantize.x = x[side];
        act.into(&a.quantize, side);
        a.bias = bias[side];
        a.y = y[side];
        g.dy = dy[side];
        g.q = a.quantize.q;
        g.scale = a.quantize.scale;
        g.dw = dw[side];
        TERN__TRY(tern__run_linear(c, &a));
        if (pieces && side == GPU) { /* once more, two tokens at a time */
            const tern_matmul_args m = tern__linear_product(&a);
            TERN__TRY(tern_copy(c, a.y, dy[side], sizeof(float) * (size_t)(n * shape.rows), TERN_ON_DEVICE));
            TERN__TRY(tern__gpu_matmul_bits(&c->run, tern__gpu_of(&c->run), &m, 2 * act.s.stride));
        }
        return tern_matmul_dw(c, &g);
    });
    CHECK_SAME(act.q);
    CHECK_SAME(act.scale);
    CHECK_SAME(act.sum);
    CHECK_SAME(y);
    CHECK_SAME(dw);
}

static void test_cuda_bits()
{
    int i = 0;
    test_fuse(false);
    for (int64_t cols : {1, 15, 17, 31, 127, 300})
        for (int32_t grain : {(int32_t)TERN_PER_ROW, (int32_t)TERN_PER_TENSOR, 33}) {
            check_bits(test_shape(i % 2 ? 33 : 5, cols, grain, i % 3 ? TERN_BASE3 : TERN_2BIT, TERN_F32), i % 4 == 3 ? 19 : 3,
                       i % 5 == 4, i % 3 == 1);
            i++;
        }
}

/* The shortest row of bits that has no room as int8. */
static void test_cuda_bits_too_long()
{
    const tern_matrix shape = test_shape(1, 250000, 1, TERN_BASE3, TERN_F32);
    tern_matmul_args a = {};
    mirror<int8_t> some(64);
    a.m = shape;
    a.m.trits = a.m.scales = some[GPU];
    a.act = TERN_ACT_BIT;
    a.n = 1;
    a.q = some[GPU];
    a.scale = a.y = (float *)some[GPU];
    a.sum = (const int32_t *)some[GPU];
    CHECK(test_failed_with(test_context[GPU], tern_matmul(test_context[GPU], &a), TERN_E_UNSUPPORTED,
                           "cuda: matmul: bits of rows of 5000000 bytes as int8; 4194304 is the most"));
}

static void test_cuda_quantize_bad_rows()
{
    check_quantize(7, 130, TERN_PER_ROW, TERN_2BIT, true, false, true);
    check_quantize(7, 130, 32, TERN_BASE3, false, true, true);
    check_quantize(1, 5, TERN_PER_ROW, TERN_2BIT, false, false, true);
}

/* Activations quantized by the CPU; products by both. Outputs lie between what must stay as it is. */
static void check_product(const tern_matrix &shape, int64_t n, bool with_bias)
{
    test_matrix w(shape);
    mirror<float> x(n * shape.cols, test_uniform), bias(shape.rows, test_uniform), y(n * shape.rows);
    quantized act(shape, n);
    tern_quantize_args quantize = {};
    quantize.m = shape;
    quantize.n = n;
    quantize.x = x[CPU];
    act.into(&quantize, CPU);
    CHECK(tern_quantize(test_context[CPU], &quantize) == TERN_OK);
    act.q.send();
    act.scale.send();
    act.sum.send();
    test_both([&](tern_context *c, int side) {
        tern_matmul_args a = {};
        a.m = w.on(side);
        a.n = n;
        act.into(&a, side);
        a.bias = with_bias ? bias[side] : NULL;
        a.y = y[side];
        return tern_matmul(c, &a);
    });
    if (!y.same("y")) {
        test_errors++;
        printf("  in %d x %d, grain %d, %s, n = %d\n",
               (int)shape.rows, (int)shape.cols, (int)shape.grain, shape.encoding == TERN_BASE3 ? "base 3" : "2-bit", (int)n);
    }
}

/* Each grain beside each type of scale, both encodings. */
static void check_products(int64_t rows, int64_t cols, int64_t n)
{
    const tern_type encodings[] = {TERN_2BIT, TERN_BASE3};
    for (tern_type encoding : encodings) {
        check_product(test_shape(rows, cols, TERN_PER_ROW, encoding, TERN_F32), n, true);
        check_product(test_shape(rows, cols, TERN_PER_TENSOR, encoding, TERN_POW2), n, false);
        check_product(test_shape(rows, cols, 64, encoding, TERN_F16), n, true);
        check_product(test_shape(rows, cols, 50, encoding, TERN_POW2), n, false);
        check_product(test_shape(rows, cols, 128, encoding, TERN_LOG), n, false);
    }
}

static void check_fixed(const tern_matrix &shape, int64_t n, int32_t point, bool with_bias)
{
    test_matrix w(shape);
    mirror<int8_t> x(n * shape.cols, [] { return (int8_t)(test_random() & 255); });
    mirror<int32_t> bias(shape.rows, [] { return (int32_t)test_random(); }), y(n * shape.rows);
    test_both([&](tern_context *c, int side) {
        tern_matmul_fixed_args a = {};
        a.m = w.on(side);
        a.n = n;
        a.x = x[side];
        a.point = point;
        a.bias = with_bias ? bias[side] : NULL;
        a.y = y[side];
        return tern_matmul_fixed(c, &a);
    });
    CHECK_SAME(y);
}

static void test_cuda_product_fixed()
{
    const int64_t rows[] = {1, 15, 17, 33}, cols[] = {1, 17, 127, 1030};
    for (int i = 0; i < 4; i++)
        for (tern_type encoding : {TERN_2BIT, TERN_BASE3})
            for (tern_type scales : {TERN_POW2, TERN_LOG}) {
                check_fixed(test_shape(rows[i], cols[(i + 1) % 4], TERN_PER_ROW, encoding, scales), 1 + i, 5, true);
                check_fixed(test_shape(rows[i], cols[(i + 2) % 4], TERN_PER_TENSOR, encoding, scales), 3, -2, false);
                check_fixed(test_shape(rows[i], cols[i], 50, encoding, scales), 2, 16, true);
            }
}

static void test_cuda_product_few_tokens()
{
    const int64_t rows[] = {1, 15, 17, 32, 33, 100}, cols[] = {1, 15, 16, 17, 127, 1030}, tokens[] = {1, 2, 7, 8, 9, 16};
    for (int i = 0; i < 6; i++) check_products(rows[i], cols[(i + 2) % 6], tokens[i]);
    check_products(130, 70, 3);
    check_product(test_shape(33, 4097, TERN_PER_ROW, TERN_2BIT, TERN_F32), 1, true);
    check_product(test_shape(33, 4097, 128, TERN_BASE3, TERN_F32), 2, true);
    check_product(test_shape(17, 40, 1, TERN_2BIT, TERN_F32), 5, false);
}

static void use_wgmma(int wgmma) { tern__gpu_of(&test_context[GPU]->run)->wgmma = wgmma; }

static void test_cuda_product_many_tokens()
{
    use_wgmma(0);
    check_products(33, 127, 17);
    check_products(130, 300, 40);
    check_products(36, 200, 70);
    check_product(test_shape(129, 500, TERN_PER_ROW, TERN_2BIT, TERN_F32), 131, true);
    check_product(test_shape(20, 500, TERN_PER_ROW, TERN_BASE3, TERN_F32), 129, false);
    check_product(test_shape(20, 17, 1, TERN_BASE3, TERN_F16), 33, false);
}

/* One warpgroup to a block and, on fewer processors, two; rows, tokens, inputs and groups that end within tiles, stages and quads. */
static void test_cuda_product_wgmma()
{
    for (int processors : {100, 1}) {
        tern__gpu_of(&test_context[GPU]->run)->processors = processors;
        check_products(36, 200, 70);
        check_product(test_shape(1, 65, TERN_PER_ROW, TERN_2BIT, TERN_F32), 33, true);
        check_product(test_shape(130, 127, TERN_PER_TENSOR, TERN_2BIT, TERN_F32), 64, false);
        check_product(test_shape(257, 1030, TERN_PER_ROW, TERN_2BIT, TERN_F16), 65, true);
        check_product(test_shape(129, 513, TERN_PER_ROW, TERN_2BIT, TERN_LOG), 131, true);
        check_product(test_shape(17, 700, 100, TERN_2BIT, TERN_F32), 67, true);
        check_product(test_shape(300, 600, 240, TERN_2BIT, TERN_POW2), 40, false);
        check_product(test_shape(33, 4097, 128, TERN_2BIT, TERN_F32), 33, true);
    }
}

#ifdef TEST_CUDA_H
/* A device says whether its code has wgmma; products come out without it. */
static void test_cuda_wgmma_found()
{
    tern_context_desc desc = {};
    tern_error e;
    CHECK(tern__gpu_of(&test_context[GPU]->run)->wgmma);
    tern_close(test_context[GPU]);
    test_cuda.wgmma = false;
    desc.backend = test_backend();
    if (tern_open(&test_context[GPU], &desc, &e) != TERN_OK) abort();
    CHECK(!tern__gpu_of(&test_context[GPU]->run)->wgmma);
    check_product(test_shape(36, 200, TERN_PER_ROW, TERN_2BIT, TERN_F32), 70, true);
    test_cuda.wgmma = true;
}
#endif

/* The largest dots: all trits and all activations the same. */
static void test_cuda_product_extremes()
{
    const tern_type encodings[] = {TERN_2BIT, TERN_BASE3};
    for (tern_type encoding : encodings)
        for (int64_t n : {1, 17}) {
            const int64_t cols = n == 1 ? 1 << 18 : 1 << 14;
            tern_matrix m = test_shape(1, cols, TERN_PER_ROW, encoding, TERN_F32);
            test_matrix w(m);
            mirror<float> x(n * cols), y(n);
            quantized act(m, n);
            for (size_t i = 0; i < w.trits.count; i++) w.trits[CPU][i] = encoding == TERN_BASE3 ? 242 : 0xAA;
            for (size_t i = 0; i < x.count; i++) x[CPU][i] = 1.0f;
            w.trits.send();
            x.send();
            test_both([&](tern_context *c, int side) {
                tern_linear_args a = {};
                tern_matmul_args product = {};
                a.quantize.m = product.m = w.on(side);
                a.quantize.n = product.n = n;
                a.quantize.x = x[side];
                act.into(&a.quantize, side);
                act.into(&product, side);
                product.y = y[side];
                const tern_result result = tern_quantize(c, &a.quantize);
                return result == TERN_OK ? tern_matmul(c, &product) : result;
            });
            CHECK_SAME(y);
        }
}

static void check_layer(int64_t rows, int64_t cols, int32_t grain, tern_type encoding, int64_t n, bool poison,
                        tern_act kind = TERN_ACT_INT8)
{
    const tern_matrix shape = test_shape(rows, cols, grain, encoding, TERN_F32);
    test_matrix w(shape);
    mirror<float> x(n * cols, test_uniform), gain(cols, test_uniform), bias(rows, test_uniform), y(n * rows);
    quantized act(shape, n);
    if (poison) x[CPU][(n - 1) * cols] = tern__float(0x7FC00000u), x.send();
    test_both([&](tern_context *c, int side) {
        tern_linear_args a = {};
        a.quantize.m = w.on(side);
        a.quantize.act = kind;
        a.quantize.n = n;
        a.quantize.x = x[side];
        a.quantize.norm = TERN_NORM_RMS;
        a.quantize.gain = gain[side];
        a.quantize.eps = 1e-6f;
        act.into(&a.quantize, side);
        a.bias = bias[side];
        a.y = y[side];
        return tern__run_linear(c, &a);
    });
    CHECK_SAME(act.q);
    CHECK_SAME(act.scale);
    CHECK_SAME(act.sum);
    CHECK_SAME(y);
}

static void test_cuda_fused_layer()
{
    const tern_type encodings[] = {TERN_2BIT, TERN_BASE3};
    for (tern_type encoding : encodings)
        for (int64_t n : {1, 3, 4, 5, 18}) {
            check_layer(40, 133, TERN_PER_ROW, encoding, n, false);
            check_layer(17, 260, 64, encoding, n, n == 3);
            check_layer(20, 133, TERN_PER_ROW, encoding, n, n == 3, TERN_ACT_INT4);
        }
    check_layer(33, 1500, TERN_PER_TENSOR, TERN_2BIT, 2, true);
}

static void suite_cuda_trits()
{
    RUN(test_cuda_quantize);
    RUN(test_cuda_quantize_int4);
    RUN(test_cuda_bits);
    RUN(test_cuda_bits_too_long);
    RUN(test_cuda_product_fixed);
    RUN(test_cuda_quantize_bad_rows);
    RUN(test_cuda_product_few_tokens);
    RUN(test_cuda_product_many_tokens);
    RUN(test_cuda_product_wgmma);
#ifdef TEST_CUDA_H
    RUN(test_cuda_wgmma_found);
#endif
    RUN(test_cuda_product_extremes);
    RUN(test_cuda_fused_layer);
}
