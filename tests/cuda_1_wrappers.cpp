/* Tests of [CUDA-1] and [CUDA-3] in ternary_cuda.cu, and of the arithmetic of [TERN-6] in kernels: what all else stands on.
   On a device these are the first to run: every instruction against what its comment says, in plain C++ on the host. */

static cudaStream_t test_stream() { return tern__gpu_of(&test_context[GPU]->run)->stream; }
static uint32_t test_word() { return test_random() << 8 ^ test_random(); }

/* -- 16 x 32 by 32 x 8 int8, a product to a warp -- */

static __global__ void test_mma_kernel(const uint32_t *a, const uint32_t *b, int *d)
{
    const int64_t lane = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t rows[4], columns[2];
    int sums[4];
    for (int i = 0; i < 4; i++) rows[i] = a[4 * lane + i];
    for (int i = 0; i < 2; i++) columns[i] = b[2 * lane + i];
    for (int i = 0; i < 4; i++) sums[i] = d[4 * lane + i];
    tern__mma_s8(sums, rows, columns);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

/* Where the fragments of all lanes, bytes or words in the order of lanes and registers, hold an element of a, b and d. */
static int test_mma_a(int row, int input)
{
    const int lane = 4 * (row % 8) + input % 16 / 4, word = row / 8 + 2 * (input / 16);
    return (4 * lane + word) * 4 + input % 4;
}
static int test_mma_b(int input, int column)
{
    const int lane = 4 * column + input % 16 / 4, word = input / 16;
    return (2 * lane + word) * 4 + input % 4;
}
static int test_mma_d(int row, int column)
{
    const int lane = 4 * (row % 8) + column / 2, word = 2 * (row / 8) + column % 2;
    return 4 * lane + word;
}

static void test_cuda_mma_s8()
{
    const int products = 12, warps = 4;
    mirror<uint32_t> a(products * 128, test_word);
    mirror<uint32_t> b(products * 64, test_word);
    mirror<int> d(products * 128, [] { return (int)test_random() - (1 << 23); });
    for (int i = 0; i < 128; i++) a[CPU][i] = 0x80808080u; /* -128 throughout */
    for (int i = 0; i < 64; i++) b[CPU][i] = 0x80808080u;
    a.send();
    b.send();
    for (int p = 0; p < products; p++) {
        const int8_t *rows = (const int8_t *)(a[CPU] + p * 128), *columns = (const int8_t *)(b[CPU] + p * 64);
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 8; c++)
                for (int k = 0; k < 32; k++)
                    d[CPU][p * 128 + test_mma_d(r, c)] += rows[test_mma_a(r, k)] * columns[test_mma_b(k, c)];
    }
    TERN__LAUNCH(test_mma_kernel, products / warps, 32 * warps, 0, test_stream(), a[GPU], b[GPU], d[GPU]);
    CHECK_SAME(d);
}

/* -- 64 x 32 by 32 x 8 Tiles int8, two products to each warpgroup at a time, of four times 32 inputs -- */

template <int Tiles> static __global__ void test_wgmma_kernel(const uint32_t *a, const int8_t *b, int *d)
{
    TERN__SHARED(int8_t, tile);
    const int self = (int)threadIdx.x, threads = (int)blockDim.x;
    uint32_t rows[4][2][4];
    int sums[2][Tiles][4];
    for (int i = self; i < 64 * Tiles; i += threads) tern__cp_async16(tile + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, b + i * 16);
    tern__cp_commit();
#pragma unroll
    for (int i = 0; i < 32; i++) rows[i / 8][i / 4 % 2][i % 4] = a[(i / 4 * threads + self) * 4 + i % 4];
#pragma unroll
    for (int i = 0; i < 8 * Tiles; i++) sums[i / 4 / Tiles][i / 4 % Tiles][i % 4] = d[(i / 4 * threads + self) * 4 + i % 4];
    tern__cp_wait<0>();
    tern__wgmma_publish();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        tern__wgmma_fence(rows[k], sums);
        tern__wgmma_s8(sums[0], rows[k][0], tern__wgmma_tile(tile) + 2 * k);
        tern__wgmma_s8(sums[1], rows[k][1], tern__wgmma_tile(tile) + 2 * k);
        tern__wgmma_commit();
    }
    tern__wgmma_wait<0>(sums);
#pragma unroll
    for (int i = 0; i < 8 * Tiles; i++) d[(i / 4 * threads + self) * 4 + i % 4] = sums[i / 4 / Tiles][i / 4 % Tiles][i % 4];
}

template <int Tiles> static void test_wgmma(int threads)
{
    mirror<uint32_t> a(8 * threads * 4, test_word);
    mirror<int8_t> b(8 * Tiles * 128, [] { return (int8_t)(test_random() & 255); });
    mirror<int> d(2 * Tiles * threads * 4, [] { return (int)test_random() - (1 << 23); });
    for (int i = 0; i < 128; i++) a[CPU][i] = 0x80808080u, b[CPU][i] = -128;
    a.send();
    b.send();
    for (int warp = 0; warp < threads / 32; warp++)
        for (int i = 0; i < 8; i++) { /* 32 inputs i / 2, product i % 2 */
            const int8_t *rows = (const int8_t *)(a[CPU] + (i * threads + warp * 32) * 4);
            for (int c = 0; c < 8 * Tiles; c++)
                for (int r = 0; r < 16; r++)
                    for (int k = 0; k < 32; k++)
                        d[CPU][((i % 2 * Tiles + c / 8) * threads + warp * 32) * 4 + test_mma_d(r, c % 8)] +=
                            rows[test_mma_a(r, k)] * b[CPU][c * 128 + i / 2 * 32 + k];
        }
    TERN__LAUNCH(test_wgmma_kernel<Tiles>, 1, threads, Tiles * 1024, test_stream(), a[GPU], b[GPU], d[GPU]);
    CHECK_SAME(d);
}

static void test_cuda_wgmma_s8()
{
    if (!tern__gpu_of(&test_context[GPU]->run)->wgmma) {
        printf("skipped: this code has no wgmma (on an H100 or H200: -arch=sm_90a)\n");
        return;
    }
    test_wgmma<8>(128);
    test_wgmma<8>(256);
    test_wgmma<16>(128);
    test_wgmma<16>(256);
}

/* -- blocks together -- */

/* In each round a thread adds what one of the next block has left in the round before. */
static __global__ void test_grid_kernel(int rounds, unsigned *word, int *x)
{
    const int self = (int)(blockIdx.x * blockDim.x + threadIdx.x), all = (int)(gridDim.x * blockDim.x),
              other = (self + (int)blockDim.x + 1) % all;
    for (int i = 0; i < rounds; i++) {
        x[(i + 1) % 2 * all + self] = x[i % 2 * all + self] + x[i % 2 * all + other];
        tern__grid_barrier(word);
    }
}

static void test_cuda_grid_barrier()
{
    const tern__gpu *d = tern__gpu_of(&test_context[GPU]->run);
    if (!d->meet) printf("skipped: no launches of blocks together\n");
    for (int blocks : {1, 2, d->meet ? d->processors : 0}) {
        if (!d->meet) break;
        const int all = blocks * 64, rounds = 20;
        mirror<int> x(2 * all, [] { return (int)(test_random() % 1000); });
        for (int i = 0; i < rounds; i++)
            for (int t = 0; t < all; t++)
                x[CPU][(i + 1) % 2 * all + t] = (int)((unsigned)x[CPU][i % 2 * all + t] + (unsigned)x[CPU][i % 2 * all + (t + 65) % all]);
        TERN__LAUNCH_TOGETHER(test_grid_kernel, blocks, 64, 0, test_stream(), rounds, d->meet, x[GPU]);
        CHECK_SAME(x);
    }
}

/* -- loads and copies -- */

static __global__ void test_stream_kernel(int64_t n, const uint4 *x, uint4 *y)
{
    TERN__EACH(i, n) y[i] = tern__stream16(x + i);
}

static void test_cuda_stream16()
{
    const int64_t counts[] = {1, 31, 33, 4097};
    for (int64_t n : counts) {
        mirror<uint32_t> x(4 * n, test_random), y(4 * n);
        memcpy(y[CPU], x[CPU], (size_t)n * 16);
        TERN__LAUNCH(test_stream_kernel, 3, 96, 0, test_stream(), n, (const uint4 *)x[GPU], (uint4 *)y[GPU]);
        CHECK_SAME(y);
    }
}

/* Chunks of 16 bytes to a thread pass through Stages buffers, all but one under way at a time; each is read by another
   thread than the one that asked for it. */
template <int Stages> static __global__ void test_async_kernel(int chunks, const uint4 *x, uint4 *y)
{
    TERN__SHARED(uint4, stage);
    const int self = (int)threadIdx.x, other = (int)blockDim.x - 1 - self, width = (int)blockDim.x;
    for (int i = 0; i < Stages - 1; i++) {
        if (i < chunks) tern__cp_async16(stage + i * width + self, x + i * width + self);
        tern__cp_commit();
    }
    for (int i = 0; i < chunks; i++) {
        const int next = i + Stages - 1;
        if (next < chunks) tern__cp_async16(stage + next % Stages * width + self, x + next * width + self);
        tern__cp_commit();
        tern__cp_wait<Stages - 1>();
        __syncthreads();
        y[i * width + self] = stage[i % Stages * width + other];
        __syncthreads();
    }
}

template <int Stages> static void test_async(int chunks, int threads)
{
    mirror<uint32_t> x(4 * chunks * threads, test_random), y(4 * chunks * threads);
    for (int i = 0; i < chunks; i++)
        for (int t = 0; t < threads; t++)
            memcpy(y[CPU] + 4 * (i * threads + t), x[CPU] + 4 * (i * threads + threads - 1 - t), 16);
    TERN__LAUNCH((test_async_kernel<Stages>), 1, threads, (size_t)Stages * threads * 16, test_stream(),
                 chunks, (const uint4 *)x[GPU], (uint4 *)y[GPU]);
    CHECK_SAME(y);
}

static void test_cuda_cp_async()
{
    test_async<1>(5, 64);
    test_async<2>(5, 96);
    test_async<4>(9, 128);
    test_async<4>(2, 32);
}

/* Every third copy is of nothing. */
static __global__ void test_async_or_zero_kernel(const uint4 *x, uint4 *y)
{
    TERN__SHARED(uint4, stage);
    tern__cp_async16_or_zero(stage + threadIdx.x, x + threadIdx.x, threadIdx.x % 3 != 1);
    tern__cp_commit();
    tern__cp_wait<0>();
    y[threadIdx.x] = stage[threadIdx.x];
}

static void test_cuda_cp_async_or_zero()
{
    mirror<uint32_t> x(4 * 100, test_word), y(4 * 100);
    for (int i = 0; i < 400; i++) y[CPU][i] = i / 4 % 3 != 1 ? x[CPU][i] : 0;
    TERN__LAUNCH(test_async_or_zero_kernel, 1, 100, 1600, test_stream(), (const uint4 *)x[GPU], (uint4 *)y[GPU]);
    CHECK_SAME(y);
}

/* -- arithmetic: the device's bits are the host's -- */

/* Results of two random words, as words. */
#define TEST_ARITHMETIC(X)                                                                                     \
    X(exp,       test_any(tern__exp(test_either(a, b, 100.0f))))                                               \
    X(log,       test_any(tern__log(tern__float(tern__min(a & 0x7FFFFFFF, 0x7EFFFFFF) + 0x00800000u))))        \
    X(sqrt,      test_any(tern__sqrt(tern__float(a))))                                                         \
    X(divide,    test_any(tern__float(a) / tern__float(b)))                                                    \
    X(sine,      test_sincos(a, b) >> 32)                                                                      \
    X(cosine,    test_sincos(a, b))                                                                            \
    X(from_f16,  test_any(tern__from_f16((uint16_t)a)))                                                        \
    X(to_f16,    tern__to_f16(test_either(a, b, 70000.0f)))                                                    \
    X(from_bf16, test_any(tern__from_bf16((uint16_t)a)))                                                       \
    X(to_bf16,   tern__to_bf16(tern__float(a)))                                                                \
    X(to_bf16_with, tern__to_bf16_with(tern__float(a), b & 0xFFFF))                                            \
    X(to_pow2,   (uint8_t)tern__to_pow2(tern__float(a & 0x7FFFFFFF)))                                          \
    X(philox,    test_philox(a, b))                                                                            \
    X(normal,    test_any(tern__normal((uint64_t)a << 32 | b, (uint64_t)b << 32 | a, b ^ 5)))                  \
    X(round,     test_any(tern__round(tern__float(a & 0xCAFFFFFF))))                                           \
    X(sigmoid,   test_any(tern__sigmoid(test_either(a, b, 100.0f))))                                           \
    X(tanh,      test_any(tern__tanh(test_either(a, b, 50.0f))))

/* Signs and payloads of NaN are not part of the promise. */
TERN__ANYWHERE uint32_t test_any(float x) { return x != x ? 0x7FC00000u : tern__bits(x); }

/* In three cases of four up to `most`, otherwise anything. */
TERN__ANYWHERE float test_either(uint32_t a, uint32_t b, float most)
{
    return b % 4 == 0 ? tern__float(a) : ((float)(a >> 8) / 8388608.0f - 1.0f) * most;
}

/* Of angles below 2^24. */
TERN__ANYWHERE uint64_t test_sincos(uint32_t a, uint32_t b)
{
    const float angle = ((float)(a >> 8) / 8388608.0f - 1.0f) * (b % 2 ? 8192.0f : 16777216.0f);
    float sine, cosine;
    tern__sincos(angle, &sine, &cosine);
    return (uint64_t)test_any(sine) << 32 | test_any(cosine);
}

TERN__ANYWHERE uint32_t test_philox(uint32_t a, uint32_t b)
{
    uint32_t words[4];
    tern__philox((uint64_t)a << 32 | b, (uint64_t)b << 32 | a, a ^ b, b >> 3, words);
    return words[0] ^ words[1] * 3 ^ words[2] * 5 ^ words[3] * 7;
}

#define TEST_FUNCTION(name, value)                                   \
    struct test_fn_##name {                                          \
        TERN__ANYWHERE uint32_t of(uint32_t a, uint32_t b)           \
        {                                                            \
            (void)a; (void)b;                                        \
            return (uint32_t)(value);                                \
        }                                                            \
    };
TEST_ARITHMETIC(TEST_FUNCTION)
#undef TEST_FUNCTION

template <typename Function>
static __global__ void test_arithmetic_kernel(int64_t n, const uint32_t *a, const uint32_t *b, uint32_t *y)
{
    TERN__EACH(i, n) y[i] = Function::of(a[i], b[i]);
}

template <typename Function>
static void test_arithmetic(const char *name, mirror<uint32_t> &a, mirror<uint32_t> &b, mirror<uint32_t> &y)
{
    const int64_t n = (int64_t)y.count;
    for (int64_t i = 0; i < n; i++) y[CPU][i] = Function::of(a[CPU][i], b[CPU][i]);
    TERN__LAUNCH((test_arithmetic_kernel<Function>), 24, TERN__THREADS, 0, test_stream(), n, a[GPU], b[GPU], y[GPU]);
    CHECK(y.same(name));
}

static void test_cuda_arithmetic()
{
    const int64_t n = 100003;
    mirror<uint32_t> a(n, test_word), b(n, test_word), y(n);
    const uint32_t corners[] = {0, 0x80000000u, 1, 0x007FFFFFu, 0x00800000u,
                                0x7F7FFFFFu, 0x7F800000u, 0xFF800000u, 0x7FC00000u, 0x3F800000u};
    for (int i = 0; i < 10; i++)
        for (int j = 0; j < 10; j++) a[CPU][10 * i + j] = corners[i], b[CPU][10 * i + j] = corners[j];
    a.send();
    b.send();
#define TEST_FUNCTION(name, value) test_arithmetic<test_fn_##name>(#name, a, b, y);
    TEST_ARITHMETIC(TEST_FUNCTION)
#undef TEST_FUNCTION
}

/* -- sums -- */

static float test_sum(tern_sum_kind kind, int64_t n, const float *x)
{
    tern_sum_args a = {};
    float y = 0.0f;
    a.kind = kind;
    a.count = n;
    a.x = x;
    a.y = &y;
    CHECK(tern_sum(test_context[CPU], &a) == TERN_OK);
    return y;
}

/* Warp w of the grid sums the 2w + 1 terms from w on: y[w][lane]. */
static __global__ void test_warp_sum_kernel(const float *x, float *y)
{
    const int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t warp = thread / 32;
    y[thread] = tern__warp_sum((int)(2 * warp + 1), [&](int i) { return x[warp + i]; });
}

static void test_cuda_warp_sum()
{
    mirror<float> x(1536, test_uniform), y(512 * 32); /* 1, 3, ... 1023 terms */
    for (int i = 0; i < 512 * 32; i++)
        y[CPU][i] = i % 32 ? y[CPU][i - 1] : test_sum(TERN_SUM, i / 16 + 1, x[CPU] + i / 32);
    TERN__LAUNCH(test_warp_sum_kernel, 128, 128, 0, test_stream(), x[GPU], y[GPU]);
    CHECK_SAME(y);
}

/* The sum of n terms in every thread of a block, twice in the same shared memory. */
static __global__ void test_block_sum_kernel(int64_t n, const float *x, float *y)
{
    TERN__SHARED(float, sums);
    const float first = tern__block_sum(n, [&](int64_t i) { return x[i]; }, sums);
    y[threadIdx.x] = first;
    y[blockDim.x + threadIdx.x] = tern__block_sum(n, [&](int64_t i) { return tern__abs(x[i]); }, sums);
}

static void test_block_sum(int64_t n, int threads)
{
    mirror<float> x(n, test_uniform), y(2 * threads);
    const float sums[] = {test_sum(TERN_SUM, n, x[CPU]), test_sum(TERN_SUM_ABS, n, x[CPU])};
    for (int i = 0; i < 2 * threads; i++) y[CPU][i] = sums[i / threads];
    TERN__LAUNCH(test_block_sum_kernel, 1, threads, TERN__BLOCK * sizeof(float), test_stream(), n, x[GPU], y[GPU]);
    CHECK_SAME(y);
}

static void test_cuda_block_sum()
{
    for (int64_t n = 1; n <= 4097; n += n < 67 ? 6 : 62) test_block_sum(n, n % 3 ? 64 : TERN__THREADS);
    test_block_sum(1023, 32);
    test_block_sum(1025, 32);
    test_block_sum(TERN__LONGEST_ROW - 1, 1024);
    test_block_sum(TERN__LONGEST_ROW, TERN__THREADS);
}

static __global__ void test_block_max_kernel(const uint32_t *x, uint32_t *y)
{
    TERN__SHARED(uint32_t, seen);
    y[threadIdx.x] = tern__block_max(x[threadIdx.x], seen);
    y[blockDim.x + threadIdx.x] = tern__block_max(x[blockDim.x + threadIdx.x], seen); /* and again, in the same place */
}

static void test_cuda_block_max()
{
    for (int threads = 32; threads <= TERN__THREADS; threads += 32)
        for (int turn = 0; turn < 4; turn++) {
            mirror<uint32_t> x(2 * threads, test_random), y(2 * threads);
            x[CPU][(int)test_random() % threads] = 0xFF000000u; /* the largest of the first half */
            x.send();
            for (int i = 0; i < 2 * threads; i++) {
                const uint32_t *half = x[CPU] + i / threads * threads;
                for (int j = 0; j < threads; j++) y[CPU][i] = half[j] > y[CPU][i] ? half[j] : y[CPU][i];
            }
            TERN__LAUNCH(test_block_max_kernel, 1, threads, TERN__WARPS * sizeof(uint32_t), test_stream(), x[GPU], y[GPU]);
            CHECK_SAME(y);
        }
}

static void test_total(int64_t n, tern_sum_kind kind, int add)
{
    mirror<float> x(n, test_uniform), y(1, test_uniform);
    const float sum = test_sum(kind, n, x[CPU]);
    const tern__gpu *d = tern__gpu_of(&test_context[GPU]->run);
    y[CPU][0] = add ? y[CPU][0] + sum : sum;
    tern__gpu_total(d, kind, n, TERN_F32, x[GPU], d->work, y[GPU], add);
    CHECK_SAME(y);
}

static void test_cuda_total()
{
    for (int64_t n = 1; n <= 4097; n += n < 67 ? 6 : 62) test_total(n, (tern_sum_kind)(n / 2 % 3), n % 5 == 0);
    for (int kind = TERN_SUM; kind <= TERN_SUM_SQUARES; kind++)
        test_total((1 << 20) + 1, (tern_sum_kind)kind, kind == TERN_SUM_ABS);
}

static void suite_cuda_wrappers()
{
    RUN(test_cuda_mma_s8);
    RUN(test_cuda_wgmma_s8);
    RUN(test_cuda_grid_barrier);
    RUN(test_cuda_stream16);
    RUN(test_cuda_cp_async);
    RUN(test_cuda_cp_async_or_zero);
    RUN(test_cuda_arithmetic);
    RUN(test_cuda_warp_sum);
    RUN(test_cuda_block_sum);
    RUN(test_cuda_block_max);
    RUN(test_cuda_total);
}
