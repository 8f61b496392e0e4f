/* Tests of [CUDA-6] in ternary_cuda.cu. Gradients are compared byte by byte where the emulator does not fuse, as the scalar
   tier does not, and with float64 where it does. */

/* Products in float64, each with the sum of its terms' sizes: what float sums may miss is a part of that. */
struct floats_exact {
    int64_t m, n;
    std::vector<double> sum, size;
    floats_exact(int64_t rows, int64_t cols) : m(rows), n(cols), sum((size_t)(m * n)), size((size_t)(m * n)) {}
    /* += a [m, k] * b [k, n], given by element */
    template <typename A, typename B> void add(int64_t k, A a, B b)
    {
        for (int64_t i = 0; i < m; i++)
            for (int64_t p = 0; p < k; p++)
                for (int64_t j = 0; j < n; j++) {
                    const double term = (double)a(i, p) * (double)b(p, j);
                    sum[(size_t)(i * n + j)] += term;
                    size[(size_t)(i * n + j)] += fabs(term);
                }
    }
    bool near(const char *name, const float *got, int64_t row) const
    {
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                const size_t at = (size_t)(i * n + j);
                if (fabs((double)got[i * row + j] - sum[at]) <= 2e-6 * size[at] + 1e-6) continue;
                printf("  %s[%d][%d]: %.9g, in float64 %.9g\n", name, (int)i, (int)j, (double)got[i * row + j], sum[at]);
                return false;
            }
        return true;
    }
};

/* -- dense -- */

struct dense_case { int64_t m, n, k; bool a_across, b_across; int64_t apart; bool bias, add, fused; };

static void dense_both(const dense_case &t)
{
    tern_dense_args d = {};
    d.m = t.m; d.n = t.n; d.k = t.k;
    d.a_row = t.a_across ? t.apart : t.k * t.apart; d.a_col = t.a_across ? t.m * t.apart : t.apart;
    d.b_row = t.b_across ? t.n * t.apart : t.apart; d.b_col = t.b_across ? t.apart : t.k * t.apart;
    d.c_row = t.n + t.apart - 1;
    d.add = t.add;
    d.fused = t.fused;
    mirror<float> a(t.m * t.k * t.apart, test_uniform), b(t.n * t.k * t.apart, test_uniform), bias(t.n, test_uniform),
                  c(t.m * d.c_row, test_uniform);
    test_fuse(!t.fused); /* what must not fuse does not where it could */
    test_both([&](tern_context *context, int side) {
        tern_dense_args e = d;
        e.a = a[side]; e.b = b[side]; e.c = c[side];
        e.bias = t.bias ? bias[side] : NULL;
        return tern_dense(context, &e);
    });
    CHECK_SAME(c);
}

static void test_cuda_dense()
{
    const dense_case cases[] = {
        {1, 1, 1, false, false, 1, false, false, false},     {1, 15, 17, false, true, 1, true, false, false},
        {17, 16, 15, true, false, 1, false, true, false},    {64, 64, 16, true, true, 1, true, true, false},
        {127, 130, 33, false, false, 1, true, false, false}, {130, 129, 31, true, true, 1, false, false, true},
        {65, 191, 17, false, true, 3, true, true, false},    {193, 65, 64, true, false, 2, false, true, true},
        {16, 257, 48, false, false, 1, false, false, false}, {300, 1, 5, false, false, 1, true, false, false},
    };
    for (const dense_case &t : cases) dense_both(t);
}

/* Two and three segments, and ends of segments: in every schedule one of high tiles and three of low ones. */
static void test_cuda_dense_segments()
{
    const dense_case cases[] = {
        {129, 65, 2049, false, true, 1, true, true, false}, {3, 5, 4097, false, false, 1, true, false, false},
        {17, 3, 2048, true, true, 1, false, false, true},   {2, 70, 4096, true, false, 1, false, true, false},
    };
    for (const dense_case &t : cases) dense_both(t);
}

static void test_cuda_dense_fused()
{
    test_fuse(true);
    const int64_t m = 70, n = 67, k = 2500;
    mirror<float> a(m * k, test_uniform), b(k * n, test_uniform), c(m * n);
    floats_exact want(m, n);
    tern_dense_args d = {};
    d.m = m; d.n = n; d.k = k;
    d.a = a[GPU]; d.a_row = k; d.a_col = 1;
    d.b = b[GPU]; d.b_row = n; d.b_col = 1;
    d.c = c[GPU]; d.c_row = n;
    d.fused = 1;
    CHECK_OK(tern_dense(test_context[GPU], &d));
    want.add(k, [&](int64_t i, int64_t p) { return a[CPU][i * k + p]; }, [&](int64_t p, int64_t j) { return b[CPU][p * n + j]; });
    CHECK(want.near("c", c.fetch().data(), n));
}

/* Strides of zero: one value for all. */
static void test_cuda_dense_no_strides()
{
    mirror<float> a(1, test_uniform), b(1, test_uniform), c(20 * 70);
    test_both([&](tern_context *context, int side) {
        tern_dense_args d = {};
        d.m = 20; d.n = 70; d.k = 9;
        d.a = a[side]; d.b = b[side]; d.c = c[side]; d.c_row = 70;
        return tern_dense(context, &d);
    });
    CHECK_SAME(c);
}

/* More than the device's version takes, which writes nothing. */
static void test_cuda_dense_too_large()
{
    mirror<float> x(1, test_uniform), c(1, test_uniform);
    tern_dense_args d = {};
    d.m = d.n = d.c_row = 1; d.k = (int64_t)INT32_MAX + 1;
    d.a = x[GPU]; d.b = x[GPU]; d.c = c[GPU];
    CHECK(tern_dense(test_context[GPU], &d) == TERN_E_UNSUPPORTED);
    CHECK(strstr(tern_last_error(test_context[GPU])->text, "sums of 2147483648 terms"));
    d.m = (int64_t)1 << 38; d.k = 1;
    CHECK(tern_dense(test_context[GPU], &d) == TERN_E_UNSUPPORTED);
    CHECK(strstr(tern_last_error(test_context[GPU])->text, "4294967296 tiles"));
    CHECK_SAME(c);
}

/* -- ternary matmul on floats -- */

struct matmul_case { int64_t n, rows, cols; int grain; tern_type encoding, scales; bool bias; };

static const matmul_case matmul_cases[] = {
    {1, 1, 1, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, false},       {3, 16, 15, TERN_PER_ROW, TERN_BASE3, TERN_F16, true},
    {17, 17, 16, TERN_PER_ROW, TERN_2BIT, TERN_POW2, true},       {16, 127, 17, 16, TERN_BASE3, TERN_F32, false},
    {130, 129, 127, 32, TERN_2BIT, TERN_F16, true},               {65, 193, 100, 20, TERN_BASE3, TERN_POW2, true},
    {129, 65, 61, 7, TERN_BASE3, TERN_F32, false},                {127, 130, 70, 33, TERN_2BIT, TERN_TYPE_DEFAULT, true},
    {5, 33, 2100, TERN_PER_TENSOR, TERN_BASE3, TERN_F32, true},   {2, 70, 4097, TERN_PER_ROW, TERN_2BIT, TERN_F32, true},
    {3, 20, 4500, 2060, TERN_BASE3, TERN_F32, true},              {130, 66, 2200, 2100, TERN_2BIT, TERN_F32, false},
    {65, 70, 129, 32, TERN_2BIT, TERN_LOG, false},                {4, 17, 33, TERN_PER_ROW, TERN_BASE3, TERN_LOG, true},
};

static void matmul_both(const matmul_case &t, const char *fault_rows)
{
    const test_matrix w(test_shape(t.rows, t.cols, t.grain, t.encoding, t.scales));
    mirror<float> x(t.n * t.cols, test_uniform), bias(t.rows, test_uniform), y(t.n * t.rows, test_uniform);
    for (const char *row = fault_rows; *row; row++)
        x[CPU][(*row - '0') * t.cols + (int64_t)test_random() % t.cols] = tern__float(*row % 2 ? 0x7FC00000u : 0xFF800000u);
    x.send();
    test_both([&](tern_context *context, int side) {
        tern_matmul_args a = {};
        a.m = w.on(side);
        a.n = t.n;
        a.x = x[side];
        a.bias = t.bias ? bias[side] : NULL;
        a.y = y[side];
        return tern_matmul(context, &a);
    });
    CHECK_SAME(y);
}

static void test_cuda_matmul_floats()
{
    for (const matmul_case &t : matmul_cases) matmul_both(t, "");
}

static void test_cuda_matmul_faults()
{
    const matmul_case with_bias = {9, 70, 300, 64, TERN_2BIT, TERN_F32, true},
                      without = {9, 33, 5, TERN_PER_ROW, TERN_BASE3, TERN_F32, false};
    matmul_both(with_bias, "3");
    matmul_both(with_bias, "842");
    matmul_both(without, "08");
}

static void test_cuda_matmul_dx()
{
    test_fuse(false);
    for (const matmul_case &t : matmul_cases) {
        const test_matrix w(test_shape(t.cols, t.rows, t.grain, t.encoding, t.scales)); /* the long side is the sum */
        mirror<float> dy(t.n * t.cols, test_uniform), dx(t.n * t.rows, test_uniform);
        test_both([&](tern_context *context, int side) {
            tern_matmul_dx_args a = {};
            a.m = w.on(side);
            a.n = t.n;
            a.dy = dy[side];
            a.dx = dx[side];
            return tern_matmul_dx(context, &a);
        });
        CHECK_SAME(dx);
    }
}

/* Tokens are the terms, so n and cols change places. */
static void matmul_dw_both(const matmul_case &t, bool quantized, bool dw, bool dbias)
{
    tern_matrix m = test_shape(t.rows, t.n, t.grain, t.encoding, t.scales);
    const tern__shape s = tern__shape_of(&m);
    mirror<float> dy(t.cols * t.rows, test_uniform), x(t.cols * t.n, test_uniform), scale(t.cols, test_uniform);
    mirror<int8_t> q(t.cols * s.stride, [] { return (int)(test_random() % 255) - 127; });
    mirror<float> grad(t.rows * t.n, test_uniform), bias(t.rows, test_uniform);
    test_both([&](tern_context *context, int side) {
        tern_matmul_dw_args a = {};
        a.m = m;
        a.n = t.cols;
        a.dy = dy[side];
        a.q = quantized ? q[side] : NULL;
        a.scale = scale[side];
        a.x = x[side];
        a.dw = dw ? grad[side] : NULL;
        a.dbias = dbias ? bias[side] : NULL;
        return tern_matmul_dw(context, &a);
    });
    CHECK_SAME(grad);
    CHECK_SAME(bias);
}

static void test_cuda_matmul_dw()
{
    test_fuse(false);
    for (const matmul_case &t : matmul_cases) {
        matmul_dw_both(t, true, true, t.bias);
        matmul_dw_both(t, false, true, t.bias);
    }
    matmul_dw_both(matmul_cases[4], true, false, true);
    matmul_dw_both(matmul_cases[4], false, false, false);
}

static void test_cuda_matmul_gradients_fused()
{
    test_fuse(true);
    const int64_t n = 21, rows = 67, cols = 75;
    const test_matrix w(test_shape(rows, cols, 20, TERN_BASE3, TERN_F16));
    const tern__shape s = tern__shape_of(&w.m);
    mirror<float> dy(n * rows, test_uniform), scale(n, test_uniform), dx(n * cols), dw(rows * cols);
    mirror<int8_t> q(n * s.stride, [] { return (int)(test_random() % 255) - 127; });
    std::vector<float> values((size_t)(rows * cols));
    floats_exact want_dx(n, cols), want_dw(rows, cols);
    tern_matmul_dx_args x = {};
    tern_matmul_dw_args a = {};
    tern_unpack_args u = {};
    u.m = w.on(CPU); u.count = rows; u.values = values.data();
    CHECK(tern_unpack(test_context[CPU], &u) == TERN_OK);
    x.m = w.on(GPU); x.n = n; x.dy = dy[GPU]; x.dx = dx[GPU];
    CHECK_OK(tern_matmul_dx(test_context[GPU], &x));
    want_dx.add(rows, [&](int64_t t, int64_t r) { return dy[CPU][t * rows + r]; },
                [&](int64_t r, int64_t c) { return values[(size_t)(r * cols + c)]; });
    CHECK(want_dx.near("dx", dx.fetch().data(), cols));
    a.m = w.on(GPU); a.n = n; a.dy = dy[GPU]; a.q = q[GPU]; a.scale = scale[GPU]; a.dw = dw[GPU];
    CHECK_OK(tern_matmul_dw(test_context[GPU], &a));
    want_dw.add(n, [&](int64_t r, int64_t t) { return dy[CPU][t * rows + r]; },
                [&](int64_t t, int64_t c) { return (float)q[CPU][t * s.stride + c / 20 * s.group_units * 20 + c % 20] * scale[CPU][t]; });
    CHECK(want_dw.near("dw", dw.fetch().data(), cols));
}

/* -- attention -- */

struct attention_case { int64_t batch, queries, keys; int heads, kv_heads, dim; int64_t apart; };

static const attention_case attention_cases[] = {
    {1, 1, 1, 1, 1, 1, 0},     {2, 5, 5, 2, 1, 8, 0},    {1, 17, 33, 6, 2, 17, 3},  {2, 65, 65, 4, 2, 8, 0},
    {1, 1, 130, 3, 3, 64, 8},  {1, 70, 129, 2, 1, 64, 0}, {1, 2, 1100, 2, 2, 8, 1}, {3, 16, 16, 3, 1, 1, 0},
    {1, 3, 2060, 1, 1, 8, 0}, {1, 66, 67, 2, 1, 8, 0},
};

struct attention_data {
    const attention_case &t;
    int64_t q_stride, k_stride, v_stride;
    mirror<float> q, k, v, y, p, dy, dq, dk, dv;
    explicit attention_data(const attention_case &c)
        : t(c), q_stride(c.heads * c.dim + c.apart), k_stride(c.kv_heads * c.dim + 2 * c.apart), v_stride(c.kv_heads * c.dim + 3 * c.apart),
          q(c.batch * c.queries * q_stride, [] { return 3.0f * test_uniform(); }),
          k(c.batch * c.keys * k_stride, [] { return 3.0f * test_uniform(); }),
          v(c.batch * c.keys * v_stride, test_uniform), y(c.batch * c.queries * c.heads * c.dim, test_uniform),
          p(c.batch * c.heads * c.queries * c.keys, test_uniform), dy(c.batch * c.queries * c.heads * c.dim, test_uniform),
          dq(c.batch * c.queries * q_stride, test_uniform), dk(c.batch * c.keys * k_stride, test_uniform),
          dv(c.batch * c.keys * v_stride, test_uniform)
    {
    }
    tern_attention_args args(int side, bool backward) const
    {
        tern_attention_args a = {};
        a.batch = t.batch; a.queries = t.queries; a.keys = t.keys;
        a.heads = t.heads; a.kv_heads = t.kv_heads; a.dim = t.dim;
        a.q = q[side]; a.k = k[side]; a.v = v[side];
        a.q_stride = q_stride; a.k_stride = k_stride; a.v_stride = v_stride;
        a.y = y[side]; a.p = p[side];
        a.dy = backward ? dy[side] : NULL;
        a.dq = dq[side]; a.dk = dk[side]; a.dv = dv[side];
        return a;
    }
    void both(bool backward)
    {
        test_both([&](tern_context *context, int side) {
            const tern_attention_args a = args(side, backward);
            return tern_attention(context, &a);
        });
    }
};

static void test_cuda_attention()
{
    test_fuse(true);
    for (const attention_case &t : attention_cases) {
        attention_data d(t);
        d.both(false);
        CHECK_SAME(d.p);
        CHECK_SAME(d.y);
    }
}

static void test_cuda_attention_backward()
{
    test_fuse(false);
    for (const attention_case &t : attention_cases) {
        attention_data d(t);
        d.both(false);
        d.both(true);
        CHECK_SAME(d.dq);
        CHECK_SAME(d.dk);
        CHECK_SAME(d.dv);
    }
}

/* Without fused products the bits are the CPU's, whatever the machine could fuse. */
static void test_cuda_attention_exact()
{
    test_fuse(true);
    for (int i : {2, 3, 5}) {
        attention_data d(attention_cases[i]);
        d.both(false);
        test_both([&](tern_context *context, int side) {
            tern_attention_args a = d.args(side, true);
            a.exact = 1;
            return tern_attention(context, &a);
        });
        CHECK_SAME(d.dq);
        CHECK_SAME(d.dk);
        CHECK_SAME(d.dv);
    }
}

/* The backward from the forward's p, of one sequence whose heads share all keys, with fused products. */
static void test_cuda_attention_fused()
{
    test_fuse(true);
    const attention_case t = {1, 37, 70, 2, 1, 24, 5};
    attention_data d(t);
    floats_exact dv(t.keys, t.dim), dk(t.keys, t.dim);
    d.both(false);
    const tern_attention_args a = d.args(GPU, true);
    CHECK_OK(tern_attention(test_context[GPU], &a));
    for (int64_t h = 0; h < t.heads; h++) {
        const int64_t width = t.heads * t.dim;
        const float *q = d.q[CPU] + h * t.dim, *k = d.k[CPU], *v = d.v[CPU], *y = d.y[CPU] + h * t.dim, *dy = d.dy[CPU] + h * t.dim;
        const float *p = d.p[CPU] + h * t.queries * t.keys;
        floats_exact ds(t.queries, t.keys), dq(t.queries, t.dim);
        dv.add(t.queries, [&](int64_t j, int64_t i) { return p[i * t.keys + j]; }, [&](int64_t i, int64_t c) { return dy[i * width + c]; });
        ds.add(t.dim, [&](int64_t i, int64_t c) { return dy[i * width + c]; }, [&](int64_t c, int64_t j) { return v[j * d.v_stride + c]; });
        for (int64_t i = 0; i < t.queries; i++)
            for (int64_t j = 0; j < t.keys; j++) {
                double delta = 0.0, &s = ds.sum[(size_t)(i * t.keys + j)];
                for (int64_t c = 0; c < t.dim; c++) delta += (double)dy[i * width + c] * (double)y[i * width + c];
                s = (double)p[i * t.keys + j] * (s - delta) / sqrt((double)t.dim);
            }
        const auto row = [&](int64_t i, int64_t j) { return ds.sum[(size_t)(i * t.keys + j)]; };
        dq.add(t.keys, row, [&](int64_t j, int64_t c) { return k[j * d.k_stride + c]; });
        dk.add(t.queries, [&](int64_t j, int64_t i) { return row(i, j); }, [&](int64_t i, int64_t c) { return q[i * d.q_stride + c]; });
        CHECK(dq.near("dq", d.dq.fetch().data() + h * t.dim, d.q_stride));
    }
    CHECK(dv.near("dv", d.dv.fetch().data(), d.v_stride));
    CHECK(dk.near("dk", d.dk.fetch().data(), d.k_stride));
}

static void test_cuda_attention_many_heads()
{
    const attention_case t = {TERN__ITEMS / 8 + 1, 1, 2, 8, 4, 1, 0};
    attention_data d(t);
    d.both(false);
    CHECK_SAME(d.y);
}

static void test_cuda_attention_too_long()
{
    const attention_case t = {1, 1, 1, 1, 1, 1, 0};
    attention_data d(t);
    tern_attention_args a = d.args(GPU, false);
    a.keys = TERN__LONGEST_ROW + 1;
    CHECK(tern_attention(test_context[GPU], &a) == TERN_E_UNSUPPORTED);
    CHECK(strstr(tern_last_error(test_context[GPU])->text, "1048577"));
}

static void suite_cuda_floats()
{
    RUN(test_cuda_dense);
    RUN(test_cuda_dense_segments);
    RUN(test_cuda_dense_fused);
    RUN(test_cuda_dense_no_strides);
    RUN(test_cuda_dense_too_large);
    RUN(test_cuda_matmul_floats);
    RUN(test_cuda_matmul_faults);
    RUN(test_cuda_matmul_dx);
    RUN(test_cuda_matmul_dw);
    RUN(test_cuda_matmul_gradients_fused);
    RUN(test_cuda_attention);
    RUN(test_cuda_attention_backward);
    RUN(test_cuda_attention_exact);
    RUN(test_cuda_attention_fused);
    RUN(test_cuda_attention_many_heads);
    RUN(test_cuda_attention_too_long);
}
