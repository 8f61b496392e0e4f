/* Tests of [CUDA-8] in ternary_cuda.cu. */

static void test_cuda_map_add()
{
    const int64_t counts[] = {1, 15, 16, 17, 127, 4097};
    for (int64_t n : counts) {
        mirror<float> a(n, test_uniform), b(n, test_uniform), y(n);
        test_both([&](tern_context *c, int side) {
            tern_map_args m = {};
            m.fn = TERN_MAP_ADD;
            m.count = n;
            m.alpha = 0.3f;
            m.a = a[side]; m.b = b[side]; m.y = y[side];
            return tern_map(c, &m);
        });
        CHECK_SAME(y);
    }
}

static void suite_cuda_elements()
{
    RUN(test_cuda_map_add);
}
