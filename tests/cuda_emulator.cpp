/* Does the emulator of tests/cuda.h compute right, and does it see the faults that it is there to see?
     g++ -std=c++17 -O1 -fsanitize=address -include tests/cuda.h tests/cuda_emulator.cpp
   Every fault is planted in a kernel that works without it, on every schedule. */
#include "cuda_child.h"

static const cuda_schedule schedules[] = {CUDA_FORWARD, CUDA_REVERSE, CUDA_RANDOM};
static int errors, passed, failed;

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) errors++, printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition); \
    } while (0)

/* Device memory that frees itself. */
template <typename T> struct device {
    T *data = nullptr;
    size_t count;
    explicit device(size_t n) : count(n) { CHECK(cudaMalloc(&data, n * sizeof(T)) == cudaSuccess); }
    explicit device(const std::vector<T> &from) : device(from.size())
    {
        CHECK(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    device(const device &) = delete;
    device &operator=(const device &) = delete;
    ~device() { cudaFree(data); }
    std::vector<T> host() const
    {
        std::vector<T> to(count);
        CHECK(cudaMemcpy(to.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
        return to;
    }
};

static uint32_t seed;
static uint32_t next_random() { return (seed = seed * 1664525u + 1013904223u) >> 8; }

/* -- schedules -- */

__global__ void sign_in(unsigned *count, unsigned *turn) { turn[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(count, 1u); }

static std::vector<unsigned> turns(cuda_schedule schedule, uint32_t random_seed)
{
    device<unsigned> count(std::vector<unsigned>{0}), turn(3 * 96);
    test_cuda.schedule = schedule;
    test_cuda.seed = random_seed;
    TERN__LAUNCH(sign_in, 3, 96, 0, nullptr, count.data, turn.data);
    return turn.host();
}

static void test_schedules()
{
    std::vector<unsigned> sorted = turns(CUDA_RANDOM, 1), other = sorted;
    for (unsigned i = 0; i < 3 * 96; i++) other[i] = i;
    CHECK(turns(CUDA_FORWARD, 1) == other);
    std::reverse(other.begin(), other.end());
    CHECK(turns(CUDA_REVERSE, 1) == other);
    CHECK(turns(CUDA_RANDOM, 1) == sorted && turns(CUDA_RANDOM, 2) != sorted && sorted[95] / 96 == sorted[0] / 96);
    std::sort(sorted.begin(), sorted.end(), std::greater<unsigned>());
    CHECK(sorted == other);
}

/* -- barriers -- */

enum fault { NONE, PLANTED };

/* Each thread reads what one of another warp has written. */
__global__ void exchange(fault f, int *out)
{
    TERN__SHARED(int, shared);
    const unsigned t = threadIdx.x, n = blockDim.x;
    shared[t] = static_cast<int>(blockIdx.x * n + t);
    if (f != PLANTED) __syncthreads();
    out[blockIdx.x * n + t] = shared[(t + n / 2) % n];
}

/* The sums of warps meet in shared memory. Warps that went in step, collective by collective, would hide the fault. */
__global__ void sum_block(fault f, unsigned *out)
{
    TERN__SHARED(unsigned, sums);
    unsigned sum = threadIdx.x;
    for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, flip);
    sums[threadIdx.x / 32] = sum;
    __syncwarp();
    if (f != PLANTED) __syncthreads();
    sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
    out[threadIdx.x] = sum;
}

static bool exchanges(fault f)
{
    device<int> out(3 * 128);
    TERN__LAUNCH(exchange, 3, 128, 128 * sizeof(int), nullptr, f, out.data);
    const std::vector<int> got = out.host();
    bool right = true;
    for (int i = 0; i < 3 * 128; i++) right &= got[static_cast<size_t>(i)] == i / 128 * 128 + (i + 64) % 128;
    return right;
}

static bool sums_block(fault f)
{
    device<unsigned> out(128);
    TERN__LAUNCH(sum_block, 1, 128, 4 * sizeof(int), nullptr, f, out.data);
    return out.host() == std::vector<unsigned>(128, 127 * 64);
}

static void test_missing_barrier()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        CHECK(exchanges(NONE));
        CHECK(!exchanges(PLANTED));
        CHECK(sums_block(NONE));
        CHECK(!sums_block(PLANTED));
    }
}

__global__ void barrier_for_some(int end)
{
    if (static_cast<int>(threadIdx.x) < end) __syncthreads();
}
__global__ void barrier_or_collective()
{
    if (threadIdx.x < 32) __syncthreads();
    else __syncwarp();
    if (threadIdx.x == 40) __syncthreads();
    else __syncwarp();
}

static void test_barrier_not_reached_by_all()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        TERN__LAUNCH(barrier_for_some, 1, 64, 0, nullptr, 64);
        TERN__LAUNCH(barrier_for_some, 1, 64, 0, nullptr, 0);
        CHECK(dies("kernel barrier_for_some, block (0, 0), thread 0: waits at __syncthreads for thread 63, which has returned",
                   [] { TERN__LAUNCH(barrier_for_some, 1, 64, 0, nullptr, 63); }));
        CHECK(dies("thread 0: waits at __syncthreads for thread 32, which waits at __syncwarp",
                   [] { cuda_launch("mixed", barrier_or_collective, false, 1, 64, 0, nullptr); }));
    }
}

/* -- blocks together -- */

/* Each block reads what another one has written, round after round. */
__global__ void exchange_blocks(fault f, unsigned *word, int *data, int *out)
{
    TERN__SHARED(int, shared);
    const unsigned t = threadIdx.x, n = blockDim.x;
    shared[t] = static_cast<int>(blockIdx.x * n + t);
    for (int round = 0; round < 3; round++) {
        data[blockIdx.x * n + t] = shared[t] + round;
        if (f != PLANTED) tern__grid_barrier(word);
        out[blockIdx.x * n + t] = data[(blockIdx.x + 1) % gridDim.x * n + (t + n / 2) % n] + shared[t];
        tern__grid_barrier(word);
    }
}
__global__ void leave_early(unsigned *word, unsigned block)
{
    if (blockIdx.x != block) tern__grid_barrier(word);
}
__global__ void grid_barrier_for_some(unsigned *word)
{
    if (threadIdx.x < 33) tern__grid_barrier(word);
    else __syncthreads();
}

static bool exchanges_blocks(fault f)
{
    device<unsigned> word(std::vector<unsigned>{0});
    device<int> data(std::vector<int>(4 * 64, -1)), out(4 * 64);
    TERN__LAUNCH_TOGETHER(exchange_blocks, 4, 64, 64 * sizeof(int), nullptr, f, word.data, data.data, out.data);
    const std::vector<int> got = out.host();
    bool right = cudaGetLastError() == cudaSuccess;
    for (int i = 0; i < 4 * 64; i++) right &= got[static_cast<size_t>(i)] == (i / 64 + 1) % 4 * 64 + (i + 32) % 64 + 2 + i;
    return right;
}

static void test_blocks_together()
{
    for (cuda_schedule schedule : schedules) {
        device<unsigned> word(std::vector<unsigned>{0}), used(std::vector<unsigned>{1});
        test_cuda.schedule = schedule;
        CHECK(exchanges_blocks(NONE));
        CHECK(!exchanges_blocks(PLANTED));
        TERN__LAUNCH_TOGETHER(leave_early, 4, 64, 0, nullptr, word.data, 4u);
        CHECK(dies("kernel leave_early, block (0, 0), thread 0: waits at the barrier of the grid for block 2, which has returned",
                   [&] { TERN__LAUNCH_TOGETHER(leave_early, 4, 64, 0, nullptr, word.data, 2u); }));
        CHECK(dies("block (1, 0), thread 0: waits at the barrier of the grid for block 0, which has returned",
                   [&] { TERN__LAUNCH_TOGETHER(leave_early, 4, 64, 0, nullptr, word.data, 0u); }));
        CHECK(dies("thread 0: waits at tern__grid_barrier for thread 33, which waits at __syncthreads",
                   [&] { TERN__LAUNCH_TOGETHER(grid_barrier_for_some, 2, 64, 0, nullptr, word.data); }));
        CHECK(dies("whose blocks are not together", [&] { TERN__LAUNCH(leave_early, 4, 64, 0, nullptr, word.data, 4u); }));
        CHECK(dies("a word that is not zero", [&] { TERN__LAUNCH_TOGETHER(leave_early, 4, 64, 0, nullptr, used.data, 4u); }));
        TERN__LAUNCH_TOGETHER(leave_early, 16, 256, 0, nullptr, word.data, 16u);
        CHECK(cudaGetLastError() == cudaSuccess);
        TERN__LAUNCH_TOGETHER(leave_early, 17, 256, 0, nullptr, word.data, 17u);
        CHECK(cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge);
        TERN__LAUNCH_TOGETHER(leave_early, 5, 64, 40 << 10, nullptr, word.data, 5u);
        CHECK(cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge);
    }
}

/* -- warp collectives -- */

enum lane_fault { WHOLE, WRONG_LANE, NO_SUCH_LANE, RETURNED_LANE, OTHER_COLLECTIVE, OTHER_TYPE, PART_MASK };

__global__ void sum_warp(lane_fault f, int *out)
{
    int sum = static_cast<int>(threadIdx.x);
    if (f == RETURNED_LANE && threadIdx.x == 5) return;
    if (f == OTHER_COLLECTIVE && threadIdx.x == 5) __syncwarp();
    if (f == OTHER_TYPE && threadIdx.x == 5) __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
    for (int flip = 1; flip < 32; flip *= 2) sum += __shfl_xor_sync(f == PART_MASK ? 0xFFFFu : 0xFFFFFFFFu, sum, flip);
    sum += static_cast<int>(threadIdx.x);
    out[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, sum, f == WRONG_LANE ? 8 : f == NO_SUCH_LANE ? 32 : 7);
}

static std::vector<int> sums_warp(lane_fault f, unsigned threads)
{
    device<int> out(threads);
    TERN__LAUNCH(sum_warp, 1, threads, 0, nullptr, f, out.data);
    return out.host();
}

static void test_wrong_lane_in_a_shuffle()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        CHECK(sums_warp(WHOLE, 32) == std::vector<int>(32, 31 * 16 + 7));
        CHECK(sums_warp(WRONG_LANE, 32) != std::vector<int>(32, 31 * 16 + 7));
        CHECK(dies("__shfl_sync from lane 32", [] { sums_warp(NO_SUCH_LANE, 32); }));
    }
}

static void test_lane_missing_in_a_collective()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        CHECK(dies("waits at __shfl_xor_sync for thread 5, which has returned", [] { sums_warp(RETURNED_LANE, 32); }));
        CHECK(dies("thread 5 is at __syncwarp", [] { test_cuda.schedule = CUDA_FORWARD, sums_warp(OTHER_COLLECTIVE, 32); }));
        CHECK(dies("at __shfl_xor_sync, but thread", [] { sums_warp(OTHER_TYPE, 32); }));
        CHECK(dies("__shfl_xor_sync with mask 0000ffff", [] { sums_warp(PART_MASK, 32); }));
        CHECK(dies("__shfl_xor_sync in a warp of 8 lanes", [] { sums_warp(WHOLE, 40); }));
    }
}

__global__ void vote(unsigned *out)
{
    const unsigned votes = __ballot_sync(0xFFFFFFFFu, threadIdx.x % 3 == 0 ? 8 : 0);
    if (threadIdx.x == 9) atomicAdd(&out[0], votes);
    atomicMax(&out[1], threadIdx.x);
    atomicMin(&out[2], blockIdx.x + 2 * blockIdx.y);
    atomicAdd(&out[3], gridDim.x * 100 + gridDim.y * 10 + 1);
}

static void test_votes_atomics_and_the_grid()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        device<unsigned> out(std::vector<unsigned>{0, 0, 99, 0});
        TERN__LAUNCH(vote, dim3(2, 3), 32, 0, nullptr, out.data);
        CHECK(out.host() == (std::vector<unsigned>{6u * 0x49249249u, 31, 0, 6 * 32 * 231}));
    }
}

/* -- asynchronous copies -- */

enum copy_fault { WAITED, NO_WAIT, WAIT_TOO_SHORT, NO_BARRIER_BEFORE_REUSE };

/* Sums tiles of 64 x 16 bytes, staged through two buffers: the next tile is under way while one is read, by other threads
   than those that copied it. */
__global__ void sum_tiles(copy_fault f, const uint4 *in, int tiles, unsigned *out)
{
    TERN__SHARED(uint4, stage);
    const unsigned t = threadIdx.x, n = blockDim.x;
    unsigned sum = 0;
    tern__cp_async16(&stage[t], &in[t]);
    tern__cp_commit();
    for (int i = 0; i < tiles; i++) {
        const unsigned tile = static_cast<unsigned>(i);
        if (f != NO_BARRIER_BEFORE_REUSE) __syncthreads();
        if (i + 1 < tiles) tern__cp_async16(&stage[(tile + 1) % 2 * n + t], &in[(tile + 1) * n + t]);
        tern__cp_commit();
        if (f == WAIT_TOO_SHORT) tern__cp_wait<2>();
        else if (f != NO_WAIT) tern__cp_wait<1>();
        __syncthreads();
        sum += stage[tile % 2 * n + (t + n / 2) % n].x;
    }
    out[t] = sum;
}

static bool sums_tiles(copy_fault f)
{
    const unsigned tiles = 5, n = 64;
    std::vector<uint4> in(tiles * n);
    std::vector<unsigned> expected(n);
    for (unsigned i = 0; i < tiles * n; i++) in[i] = make_uint4(i * i, i, 0, 0), expected[(i + n / 2) % n] += i * i;
    device<uint4> from(in);
    device<unsigned> out(n);
    TERN__LAUNCH(sum_tiles, 1, n, 2 * n * sizeof(uint4), nullptr, f, from.data, static_cast<int>(tiles), out.data);
    return out.host() == expected;
}

/* Seen by the sanitizer or in the result. */
#ifdef CUDA_ASAN
static bool copy_fault_seen(copy_fault f) { return dies("use-after-poison", [=] { sums_tiles(f); }); }
#else
static bool copy_fault_seen(copy_fault f) { return !sums_tiles(f); }
#endif

static void test_missing_cp_wait()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        CHECK(sums_tiles(WAITED));
        CHECK(copy_fault_seen(NO_WAIT));
        CHECK(copy_fault_seen(WAIT_TOO_SHORT));
        CHECK(copy_fault_seen(NO_BARRIER_BEFORE_REUSE));
    }
}

__global__ void misplaced_copy(const uint4 *in, int to, int from)
{
    TERN__SHARED(char, shared);
    tern__cp_async16(shared + to, reinterpret_cast<const char *>(in) + from);
}

static void test_misplaced_copies()
{
    device<uint4> in(2);
    TERN__LAUNCH(misplaced_copy, 1, 1, 32, nullptr, in.data, 16, 16);
    CHECK(dies("tern__cp_async16 is not aligned", [&] { TERN__LAUNCH(misplaced_copy, 1, 1, 32, nullptr, in.data, 8, 0); }));
    CHECK(dies("tern__cp_async16 is not aligned", [&] { TERN__LAUNCH(misplaced_copy, 1, 1, 32, nullptr, in.data, 0, 4); }));
    CHECK(dies("outside of shared memory", [&] { TERN__LAUNCH(misplaced_copy, 1, 1, 32, nullptr, in.data, 32, 0); }));
    CHECK(dies("outside of shared memory", [&] { TERN__LAUNCH(misplaced_copy, 1, 1, 32, nullptr, in.data, -16, 0); }));
}

/* -- bounds -- */

#ifdef CUDA_ASAN
__global__ void read_shared(int at, int *out)
{
    TERN__SHARED(int, shared);
    shared[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + at];
}
__global__ void read_global(const int *in, int *out) { out[threadIdx.x] = __ldg(&in[threadIdx.x]); }

static void test_out_of_bounds()
{
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        device<int> in(64), out(64);
        TERN__LAUNCH(read_shared, 2, 64, 64 * sizeof(int), nullptr, 0, out.data);
        TERN__LAUNCH(read_global, 2, 64, 0, nullptr, in.data, out.data);
        CHECK(dies("use-after-poison", [&] { TERN__LAUNCH(read_shared, 2, 64, 64 * sizeof(int), nullptr, 1, out.data); }));
        CHECK(dies("heap-buffer-overflow", [&] { TERN__LAUNCH(read_shared, 2, 64, 64 * sizeof(int), nullptr, -1, out.data); }));
        CHECK(dies("heap-buffer-overflow", [&] { TERN__LAUNCH(read_global, 2, 64, 0, nullptr, in.data + 1, out.data); }));
        CHECK(dies("heap-buffer-overflow", [&] { TERN__LAUNCH(read_global, 2, 64, 0, nullptr, in.data, out.data - 1); }));
    }
}
#endif

/* -- tensor cores -- */

/* The fragments element by element, as the tables of the PTX manual number them. */
static int a_row(int lane, int i, int each) { return lane / 4 + (i / each % 2 ? 8 : 0); }
static int k_of(int lane, int i, int each, int half) { return lane % 4 * each + i % each + (i < half ? 0 : 4 * each); }

template <typename Element> static uint32_t packed(const Element *x)
{
    uint32_t u;
    memcpy(&u, x, 4);
    return u;
}

/* y [n, rows] = x [n, depth] times w [rows, depth] transposed; depth is a multiple of 32. A block computes 64 rows for 8
   tokens, a warp 16 of the rows. The tokens' 32 inputs are staged one step ahead. */
__global__ void product_s8(const int8_t *w, const int8_t *x, int depth, int rows, int *y)
{
    TERN__SHARED(int8_t, stage);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int row = static_cast<int>(blockIdx.x) * 64 + warp * 16, token = static_cast<int>(blockIdx.y) * 8;
    int d[4] = {0, 0, 0, 0};
    for (int k = -32; k < depth; k += 32) {
        const int8_t *next = x + (token + lane / 2) * depth + k + 32 + lane % 2 * 16;
        if (k + 32 < depth && threadIdx.x < 16) tern__cp_async16(stage + (k + 32) / 32 % 2 * 256 + lane * 16, next);
        tern__cp_commit();
        if (k < 0) continue;
        tern__cp_wait<1>();
        __syncthreads();
        int8_t a[16], b[8];
        for (int i = 0; i < 16; i++) a[i] = w[(row + a_row(lane, i, 4)) * depth + k + k_of(lane, i, 4, 8)];
        for (int i = 0; i < 8; i++) b[i] = stage[k / 32 % 2 * 256 + lane / 4 * 32 + k_of(lane, i, 4, 4)];
        const uint32_t fa[4] = {packed(a), packed(a + 4), packed(a + 8), packed(a + 12)}, fb[2] = {packed(b), packed(b + 4)};
        tern__mma_s8(d, fa, fb);
        __syncthreads();
    }
    for (int i = 0; i < 4; i++) y[(token + lane % 4 * 2 + i % 2) * rows + row + lane / 4 + (i < 2 ? 0 : 8)] = d[i];
}

static void test_product_by_tern__mma_s8()
{
    const int rows = 128, depth = 320, tokens = 24;
    std::vector<int8_t> w(rows * depth), x(tokens * depth);
    std::vector<int> expected(tokens * rows);
    for (auto &v : w) v = static_cast<int8_t>(next_random());
    for (auto &v : x) v = static_cast<int8_t>(next_random());
    for (size_t i = 0; i < expected.size(); i++)
        for (size_t k = 0; k < depth; k++) expected[i] += w[i % rows * depth + k] * x[i / rows * depth + k];
    device<int8_t> from_w(w), from_x(x);
    for (cuda_schedule schedule : schedules) {
        device<int> y(expected.size());
        test_cuda.schedule = schedule;
        TERN__LAUNCH(product_s8, dim3(rows / 64, tokens / 8), 128, 512, nullptr, from_w.data, from_x.data, depth, rows, y.data);
        CHECK(y.host() == expected);
    }
}

__global__ void product_bf16(const uint16_t *w, const uint16_t *x, float *y)
{
    const int lane = static_cast<int>(threadIdx.x);
    uint16_t a[8], b[4];
    float d[4];
    for (int i = 0; i < 8; i++) a[i] = w[a_row(lane, i, 2) * 16 + k_of(lane, i, 2, 4)];
    for (int i = 0; i < 4; i++) b[i] = x[lane / 4 * 16 + k_of(lane, i, 2, 2)];
    for (int i = 0; i < 4; i++) d[i] = y[(lane % 4 * 2 + i % 2) * 16 + lane / 4 + (i < 2 ? 0 : 8)];
    const uint32_t fa[4] = {packed(a), packed(a + 2), packed(a + 4), packed(a + 6)}, fb[2] = {packed(b), packed(b + 2)};
    tern__mma_bf16(d, fa, fb);
    for (int i = 0; i < 4; i++) y[(lane % 4 * 2 + i % 2) * 16 + lane / 4 + (i < 2 ? 0 : 8)] = d[i];
}

static void test_product_by_tern__mma_bf16()
{
    std::vector<uint16_t> w(16 * 16), x(8 * 16);
    std::vector<float> expected(8 * 16), start;
    for (auto &v : w) v = static_cast<uint16_t>(next_random() % 0x200 + 0x3F00 + next_random() % 2 * 0x8000);
    for (auto &v : x) v = static_cast<uint16_t>(next_random() % 0x200 + 0x3F00 + next_random() % 2 * 0x8000);
    for (auto &v : expected) v = static_cast<float>(next_random() % 1000) / 7.0f;
    start = expected;
    for (size_t i = 0; i < expected.size(); i++)
        for (size_t k = 0; k < 16; k++)
            expected[i] += __int_as_float(w[i % 16 * 16 + k] << 16) * __int_as_float(x[i / 16 * 16 + k] << 16);
    device<uint16_t> from_w(w), from_x(x);
    for (cuda_schedule schedule : schedules) {
        device<float> y(start);
        test_cuda.schedule = schedule;
        TERN__LAUNCH(product_bf16, 1, 32, 0, nullptr, from_w.data, from_x.data, y.data);
        CHECK(y.host() == expected);
    }
}

/* -- tensor cores of warpgroups -- */

/* Where 16 bytes of a column lie, a piece, as the manual draws it: eight columns side by side, `width` bytes of each, in which
   pieces change places; `stride` bytes from eight columns to the next, `leading` from these bytes of a column to the next
   ones. */
struct layout { unsigned width, leading, stride, mode; };
static const layout layouts[] = {{16, 128, 512, 0}, {16, 256, 128, 0}, {128, 0, 1024, 1}, {64, 0, 512, 2}, {32, 512, 256, 3}};

static unsigned place(const layout &l, unsigned column, unsigned piece)
{
    const unsigned pieces = l.width / 16, eighth = column % 8;
    return column / 8 * l.stride + piece / pieces * l.leading + eighth * l.width + (piece % pieces ^ eighth / (8 / pieces)) * 16;
}
static uint64_t descriptor(const layout &l, const void *tile, unsigned piece)
{
    const uint64_t start = tern__shared_address(tile) + (l.width < 64 ? piece * 16 / l.width * l.leading : piece * 16);
    return start / 16 | static_cast<uint64_t>(l.leading / 16) << 16 | static_cast<uint64_t>(l.stride / 16) << 32
           | static_cast<uint64_t>(l.mode) << 62;
}

enum wgmma_fault {
    DONE, NOT_COPIED, NOT_PUBLISHED, NOT_FENCED, A_BEHIND_FENCE, D_BEHIND_FENCE, A_EARLY, D_EARLY, B_EARLY,
    NOT_WAITED, WAITED_FOR_ONE, NOT_COMMITTED, ONE_WARP_LESS, ONE_LANE_ELSEWHERE, NO_SUCH_DESCRIPTOR, OUTSIDE
};

/* y [64 x 16] += a [64 x 64] times b, 16 columns of 64 inputs: two products of 32 inputs, one tile in shared memory. */
__global__ void product_wgmma(wgmma_fault f, layout placed, layout described, const int8_t *a, const int8_t *b, int *y)
{
    TERN__SHARED(int8_t, tile);
    const unsigned t = threadIdx.x, lane = t % 32;
    uint32_t rows[2][1][4];
    int sums[1][2][4];
    if (t < 64) tern__cp_async16(tile + place(placed, t / 4, t % 4), b + t * 16);
    tern__cp_commit();
    if (f != NOT_COPIED) tern__cp_wait<0>();
    if (f != NOT_PUBLISHED) tern__wgmma_publish();
    __syncthreads();
    for (unsigned i = 0; i < 8; i++) {
        const int8_t *four = a + (t / 32 * 16 + lane / 4 + i % 2 * 8) * 64 + i / 4 * 32 + i % 4 / 2 * 16 + lane % 4 * 4;
        rows[i / 4][0][i % 4] = packed(four);
    }
    for (unsigned i = 0; i < 8; i++)
        sums[0][i / 4][i % 4] = y[(t / 32 * 16 + lane / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2];
    for (unsigned k = 0; k < 2; k++) {
        uint64_t d = descriptor(described, tile, 2 * k);
        if (f != NOT_FENCED) tern__wgmma_fence(rows[k], sums);
        if (f == A_BEHIND_FENCE && t == 40) rows[k][0][3] ^= 1;
        if (f == D_BEHIND_FENCE && t == 40) sums[0][1][2] ^= 1;
        if (f == ONE_LANE_ELSEWHERE && t == 40) d += 2;
        if (f == NO_SUCH_DESCRIPTOR) d |= 1ull << 49;
        if (f == OUTSIDE) d += 2048 / 16;
        if (f != ONE_WARP_LESS || t / 32 != 2 || k == 0) tern__wgmma_s8(sums[0], rows[k][0], d);
        if (f != NOT_COMMITTED || k == 0) tern__wgmma_commit();
    }
    if (f == WAITED_FOR_ONE || f == A_EARLY) {
        tern__wgmma_wait<1>(sums);
        rows[0][0][0] ^= 1; /* its product has arrived */
    }
    if (f == A_EARLY && t == 40) rows[1][0][0] ^= 1;
    if (f == D_EARLY && t == 40) sums[0][0][0] = 0;
    if (f == B_EARLY && t == 40) tile[place(placed, 9, 3)] ^= 1;
    if (f != NOT_WAITED && f != WAITED_FOR_ONE) tern__wgmma_wait<0>(sums);
    for (unsigned i = 0; i < 8; i++)
        y[(t / 32 * 16 + lane / 4 + i % 4 / 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[0][i / 4][i % 4];
}

static bool multiplies_by_wgmma(wgmma_fault f, const layout &placed, const layout &described, unsigned threads = 128)
{
    std::vector<int8_t> a(64 * 64), b(16 * 64);
    std::vector<int> expected(64 * 16), start;
    for (auto &v : a) v = static_cast<int8_t>(next_random());
    for (auto &v : b) v = static_cast<int8_t>(next_random());
    for (auto &v : expected) v = static_cast<int>(next_random());
    start = expected;
    for (size_t i = 0; i < expected.size(); i++)
        for (size_t k = 0; k < 64; k++) expected[i] += a[i / 16 * 64 + k] * b[i % 16 * 64 + k];
    device<int8_t> from_a(a), from_b(b);
    device<int> y(start);
    TERN__LAUNCH(product_wgmma, 1, threads, 2048, nullptr, f, placed, described, from_a.data, from_b.data, y.data);
    return y.host() == expected;
}

static void test_product_by_tern__wgmma_s8()
{
    static const std::pair<wgmma_fault, const char *> faults[] = {
        {NOT_COPIED, "reads what thread 0 has not published"}, {NOT_PUBLISHED, "reads what thread 0 has not published"},
        {NOT_FENCED, "has not fenced a"}, {A_BEHIND_FENCE, "thread 40 has not fenced a"}, {D_BEHIND_FENCE, "thread 40 has not fenced d"},
        {A_EARLY, "a changed"}, {D_EARLY, "d changed"}, {B_EARLY, "shared memory changed"},
        {NOT_WAITED, "returned before its products"}, {WAITED_FOR_ONE, "returned before its products"},
        {NOT_COMMITTED, "returned before its products"}, {ONE_WARP_LESS, "thread 64: other products by tern__wgmma_s8 than thread 0"},
        {ONE_LANE_ELSEWHERE, "has another tile"}, {NO_SUCH_DESCRIPTOR, "a matrix descriptor"}, {OUTSIDE, "outside of shared memory"}
    };
    for (cuda_schedule schedule : schedules) {
        test_cuda.schedule = schedule;
        for (const layout &placed : layouts)
            for (const layout &described : layouts) CHECK(multiplies_by_wgmma(DONE, placed, described) == (&placed == &described));
        for (const auto &fault : faults) CHECK(dies(fault.second, [&] { multiplies_by_wgmma(fault.first, layouts[2], layouts[2]); }));
        CHECK(dies("tern__wgmma_s8 in a block of 96 threads", [&] { multiplies_by_wgmma(DONE, layouts[2], layouts[2], 96); }));
        test_cuda.wgmma = false;
        CHECK(dies("in code that has it not", [&] { multiplies_by_wgmma(DONE, layouts[2], layouts[2]); }));
        test_cuda.wgmma = true;
    }
}

/* -- arithmetic -- */

static void test_arithmetic()
{
    CHECK(__dp4a(0x7F80FF01, 0x7F800201, -5) == 127 * 127 + 128 * 128 - 2 + 1 - 5);
    CHECK(__float2int_rn(2.5f) == 2 && __float2int_rn(3.5f) == 4 && __float2int_rn(-2.5f) == -2);
    CHECK(__float2int_rn(3e9f) == INT32_MAX && __float2int_rn(-3e9f) == INT32_MIN);
    CHECK(__float2int_rn(__int_as_float(0x7FC00000)) == 0);
    const float a = __int_as_float(0x3F800001); /* 1 + 2^-23: the square's last bit is lost unless fused */
    CHECK(__fadd_rn(__fmul_rn(a, a), -__fmul_rn(a, a)) == 0 && __fmaf_rn(a, a, -__fmul_rn(a, a)) == 0x1p-46f);
    CHECK(__fdiv_rn(1, 3) == 1.0f / 3.0f && __fsqrt_rn(2) == sqrtf(2) && __float_as_int(1.0f) == 0x3F800000);
}

/* -- runtime -- */

__global__ void add_to(int *p, int x) { p[threadIdx.x] += x; }

static void test_refusals()
{
    int count = -1, *p = nullptr, here = 0;
    test_cuda.devices = 0;
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0 && cudaSetDevice(0) == cudaErrorInvalidDevice);
    test_cuda.devices = 1;
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 1 && cudaSetDevice(0) == cudaSuccess);
    test_cuda.malloc_countdown = 1;
    CHECK(cudaMalloc(&p, 16) == cudaSuccess && cudaFree(p) == cudaSuccess && cudaMalloc(&p, 16) == cudaErrorMemoryAllocation);
    CHECK(cudaMalloc(&p, 16) == cudaSuccess && test_cuda.memory.size() == 1);
    test_cuda.call_countdown = 1;
    CHECK(cudaMemsetAsync(p, 0, 16, nullptr) == cudaSuccess && cudaMemsetAsync(p, 0, 16, nullptr) == cudaErrorUnknown);
    CHECK(cudaMemcpy(p, &here, 4, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(p, p + 1, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(p + 4, &here, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemsetAsync(p, 0, 17, nullptr) == cudaErrorInvalidValue);
    CHECK(cudaFree(p) == cudaSuccess && cudaFree(p) == cudaErrorInvalidValue && cudaFree(nullptr) == cudaSuccess);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
    const long launches = test_cuda.launches;
    TERN__LAUNCH(add_to, 1, 1025, 0, nullptr, p, 1);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    TERN__LAUNCH(add_to, 0, 32, 0, nullptr, p, 1);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    TERN__LAUNCH(exchange, 1, 32, 48 * 1024 + 1, nullptr, NONE, p);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue && test_cuda.launches == launches);
    CHECK(cudaFuncSetAttribute(exchange, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(exchange, cudaFuncAttributeMaxDynamicSharedMemorySize, 50 * 1024) == cudaSuccess);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    device<int> out(32);
    TERN__LAUNCH(exchange, 1, 32, 48 * 1024 + 1, nullptr, NONE, out.data);
    CHECK(cudaGetLastError() == cudaSuccess && test_cuda.launches == launches + 1);
}

/* A capture runs nothing, a launch of the graph everything again; nothing may wait inside a capture. */
static void test_graphs()
{
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    device<int> p(32), q(32);
    int *no = nullptr;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    CHECK(cudaMemsetAsync(p.data, 0, 128, stream) == cudaSuccess);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    TERN__LAUNCH(add_to, 1, 32, 0, stream, p.data, 2);
    CHECK(cudaMemcpyAsync(q.data, p.data, 128, cudaMemcpyDeviceToDevice, stream) == cudaSuccess);
    TERN__LAUNCH(add_to, 1, 32, 0, stream, p.data, 1);
    CHECK(cudaStreamSynchronize(stream) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaMalloc(&no, 4) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&ready, graph) == cudaSuccess);
    CHECK(p.host() == std::vector<int>(32, 0));
    for (int i = 1; i <= 3; i++) {
        CHECK(cudaGraphLaunch(ready, stream) == cudaSuccess && cudaStreamSynchronize(stream) == cudaSuccess);
        CHECK(p.host() == std::vector<int>(32, 3 * i) && q.host() == std::vector<int>(32, 3 * i - 1));
    }
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    cudaStreamDestroy(stream);
    CHECK(cudaGetLastError() == cudaErrorStreamCaptureUnsupported);
}

static void test_lazy_streams()
{
    cudaStream_t stream = nullptr;
    int here[32] = {0};
    device<int> p(std::vector<int>(32, 1));
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    test_cuda.lazy = true;
    TERN__LAUNCH(add_to, 1, 32, 0, stream, p.data, 2);
    CHECK(cudaMemcpyAsync(here, p.data, sizeof here, cudaMemcpyDeviceToHost, stream) == cudaSuccess && here[31] == 0);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess && here[31] == 3);
    cudaStreamDestroy(stream);
    test_cuda.lazy = false;
}

static void run(const char *name, void (*test)())
{
    errors = 0;
    seed = 1;
    test();
    CHECK(cudaGetLastError() == cudaSuccess && test_cuda.memory.empty());
    printf("%s %s\n", errors ? "FAIL" : "ok  ", name);
    *(errors ? &failed : &passed) += 1;
}
#define RUN(test) run(#test, test)

int main()
{
    RUN(test_schedules);
    RUN(test_missing_barrier);
    RUN(test_barrier_not_reached_by_all);
    RUN(test_blocks_together);
    RUN(test_wrong_lane_in_a_shuffle);
    RUN(test_lane_missing_in_a_collective);
    RUN(test_votes_atomics_and_the_grid);
    RUN(test_missing_cp_wait);
    RUN(test_misplaced_copies);
#ifdef CUDA_ASAN
    RUN(test_out_of_bounds);
#else
    printf("skipped: without AddressSanitizer test_out_of_bounds\n");
#endif
    RUN(test_product_by_tern__mma_s8);
    RUN(test_product_by_tern__mma_bf16);
    RUN(test_product_by_tern__wgmma_s8);
    RUN(test_arithmetic);
    RUN(test_refusals);
    RUN(test_graphs);
    RUN(test_lazy_streams);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
