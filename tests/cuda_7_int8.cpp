/* Tests of [CUDA-7] in ternary_cuda.cu. */

static int int8_byte() { return (int)(test_random() % 256) - 128; }
static int int8_any() { return (int)(test_random() << 12 ^ test_random()); }

/* Strides of an operand: [row][input] elements lie at row * stride[0] + input * stride[1]. */
enum { INT8_PLAIN, INT8_ALIGNED, INT8_TRANSPOSED, INT8_SPARSE, INT8_ONE_ROW, INT8_ONE_INPUT, INT8_LAYOUTS };

static void int8_strides(int layout, int64_t rows, int64_t inputs, int64_t stride[2])
{
    stride[0] = layout == INT8_ALIGNED ? tern__ceil_div(inputs, 16) * 16 : layout == INT8_TRANSPOSED ? 1 : layout == INT8_ONE_ROW ? 0
              : layout == INT8_SPARSE ? 2 : inputs;
    stride[1] = layout == INT8_TRANSPOSED ? rows : layout == INT8_SPARSE ? 2 * rows + 3 : layout == INT8_ONE_INPUT ? 0 : 1;
}

static void int8_check(int64_t m, int64_t n, int64_t k, int a_layout, int b_layout, int add)
{
    int64_t a_stride[2], b_stride[2];
    int8_strides(a_layout, m, k, a_stride);
    int8_strides(b_layout, n, k, b_stride);
    mirror<int8_t> a((m - 1) * a_stride[0] + (k - 1) * a_stride[1] + 1, int8_byte);
    mirror<int8_t> b((n - 1) * b_stride[0] + (k - 1) * b_stride[1] + 1, int8_byte);
    mirror<int32_t> c(m * (n + 3), int8_any);
    const int before = test_errors;
    test_both([&](tern_context *context, int side) {
        tern_dense_i8_args d = {};
        d.m = m; d.n = n; d.k = k;
        d.a = a[side]; d.a_row = a_stride[0]; d.a_col = a_stride[1];
        d.b = b[side]; d.b_col = b_stride[0]; d.b_row = b_stride[1];
        d.c = c[side]; d.c_row = n + 3;
        d.add = add;
        return tern_dense_i8(context, &d);
    });
    CHECK_SAME(c);
    if (test_errors > before) printf("  %d x %d x %d, layouts %d and %d, add %d\n", (int)m, (int)n, (int)k, a_layout, b_layout, add);
}

static void test_cuda_int8_layouts()
{
    int i = 0;
    for (int a = 0; a < INT8_LAYOUTS; a++)
        for (int b = 0; b < INT8_LAYOUTS; b++) int8_check(17, 33, 90, a, b, i++ % 2);
}

/* Edges of tiles, pieces, chunks and stages; from 129 x 129 on tiles are the large ones. */
static void test_cuda_int8_shapes()
{
    const int64_t shapes[][3] = {
        {1, 1, 1}, {1, 70, 300}, {15, 1, 33}, {64, 64, 64}, {65, 16, 65}, {127, 17, 128}, {16, 15, 200}, {1, 1, 4097},
        {129, 129, 1}, {130, 257, 33}, {257, 129, 300}, {128, 512, 64}};
    int i = 0;
    for (const auto &s : shapes) {
        int8_check(s[0], s[1], s[2], INT8_PLAIN, INT8_TRANSPOSED, i++ % 2);
        int8_check(s[0], s[1], s[2], INT8_ALIGNED, INT8_ALIGNED, i % 2);
    }
}

/* The largest sum there is (on one schedule, since it is long), and one that passes 2^31 when it is added. */
static void test_cuda_int8_extremes()
{
    static int turn;
    mirror<int8_t> a(1, [] { return -128; });
    mirror<int32_t> c(2, [] { return 0x7FFFFFF0; });
    const bool longest = turn++ == 0;
    for (int add = 1; add >= 0; add--) {
        test_both([&](tern_context *context, int side) {
            tern_dense_i8_args d = {};
            d.m = 1; d.n = 2; d.k = longest ? TERN__I8_MOST_K : 300;
            d.a = a[side];
            d.b = a[side];
            d.c = c[side]; d.c_row = 2;
            d.add = add;
            return tern_dense_i8(context, &d);
        });
        CHECK_SAME(c);
    }
}

static void test_cuda_int8_limits()
{
    tern_context *context = test_context[GPU];
    mirror<int8_t> a(1);
    mirror<int32_t> c(1);
    tern_dense_i8_args d = {};
    d.m = (int64_t)1 << 38; d.n = 1; d.k = 1;
    d.a = a[GPU];
    d.b = a[GPU];
    d.c = c[GPU]; d.c_row = 1;
    CHECK(tern_dense_i8(context, &d) == TERN_E_UNSUPPORTED);
    CHECK(!strcmp(tern_last_error(context)->text,
                  "cuda: dense_i8: [274877906944 x 1] has 2147483648 tiles of 128; 2147483647 is the most"));
}

static void suite_cuda_int8()
{
    RUN(test_cuda_int8_layouts);
    RUN(test_cuda_int8_shapes);
    RUN(test_cuda_int8_extremes);
    RUN(test_cuda_int8_limits);
}
