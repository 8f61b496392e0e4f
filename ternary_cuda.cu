/*
ternary_cuda.cu - the CUDA backend of ternary.h

    nvcc -O3 -std=c++17 -arch=native -fmad=false -c ternary_cuda.cu        (or: make cuda, for every architecture)
    cc program.c ternary_cuda.o -lcudart -lstdc++ -pthread

    tern_context_desc desc = {.backend = tern_cuda_backend(0)};            (device 0)
    tern_open(&c, &desc, &error);

Fills the function table of ternary.h: every layer, parameter and file works on it as on the CPU, with memory from
tern_alloc of its context, and inference gives the same bits. Needs a GPU of compute capability 7.5 or above, and
-fmad=false: a multiplication and an addition that are fused give other bits, and tern_open's self-test refuses them.

CONTENTS (search for the tag)

    [CUDA-1] Language: what differs between nvcc and the emulator that the tests run this file on
    [CUDA-2] Device: state, launches, faults, memory
    [CUDA-3] Canonical sums
    [CUDA-4] Ternarize and pack
    [CUDA-5] Activations and products of trits with int8
    [CUDA-6] Float products and attention
    [CUDA-7] Products of int8 with int8
    [CUDA-8] Rows and elements
    [CUDA-9] The function table

    Kernels call what rooms 5 to 14 of ternary.h mark TERN__ANYWHERE, and follow its rooms 7 to 10 and 14 operation by
    operation: those are the specification. Packed weights and activations have the layout of [TERN-8] here too.

Licence: MIT or Unlicense, at your choice; see the end of LICENSE.
*/
#define TERNARY_STATIC
#define TERNARY_NO_SIMD
#define TERNARY_NO_THREADS
#define TERNARY_NO_FILES
#define TERNARY_IMPLEMENTATION
#include "ternary.h"

/* ------------------------------------------------------------------------------------------------
   [CUDA-1] Language: what differs between nvcc and the emulator that the tests run this file on
   What enters: a compiler. What leaves: launches, dynamic shared memory, and every instruction that C++ has no
   word for, as a function. tests/cuda.h has the same functions as plain C++. Collectives are met by whole warps.
   ------------------------------------------------------------------------------------------------ */

#ifdef __CUDACC__
#define TERN__LAUNCH(kernel, grid, block, shared_bytes, stream, ...) kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define TERN__SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char tern__shared[]; \
    type *const name = reinterpret_cast<type *>(tern__shared)

/* d += a b; a is 16 x 32 int8 by rows, b 32 x 8 by columns. Lane 4g + t holds rows g and g + 8 (of a and d) in registers
   0, 2 and 1, 3 of a, inputs 4t to 4t + 3 in the first two and 16 more in the others, column g of b with the same
   inputs, and columns 2t and 2t + 1 of d. */
static __device__ __forceinline__ void tern__mma_s8(int d[4], const uint32_t a[4], const uint32_t b[2])
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 4; i++) /* a quarter of a each */
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(d[2 * (i % 2)]), "+r"(d[2 * (i % 2) + 1]) : "r"(a[i]), "r"(b[i / 2]));
#endif
}

/* 16 bytes of what is read once. */
static __device__ __forceinline__ uint4 tern__stream16(const void *p)
{
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

/* Copies of 16 bytes from global to shared memory that a thread requests, closes as a group and waits for, until at
   most Pending groups are under way. The least architecture copies at once. */
static __device__ __forceinline__ void tern__cp_async16(void *shared, const void *global)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
#else
    *(uint4 *)shared = *(const uint4 *)global;
#endif
}
static __device__ __forceinline__ void tern__cp_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
template <unsigned Pending> static __device__ __forceinline__ void tern__cp_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(Pending) : "memory");
#endif
}
#endif

#define TERN__ALL_LANES 0xFFFFFFFFu

/* The elements of [0, n) that fall to a thread of the grid. */
#define TERN__EACH(i, n) \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (int64_t)gridDim.x * blockDim.x)

/* ------------------------------------------------------------------------------------------------
   [CUDA-2] Device: state, launches, faults, memory
   What enters: a tern_run. What leaves: a stream, device memory, and errors with their texts. An operation
   queues kernels on the stream; nothing but copies to and from the host, memory and tern_sync waits.
   ------------------------------------------------------------------------------------------------ */

enum {
    TERN__GPUS = 16,
    TERN__LEAST_CAPABILITY = 75,
    TERN__WORK = 1 << 20,          /* floats of work memory: sums of blocks or of rows, */
    TERN__WORK_LEVELS = 2048,      /* and sums of those */
    TERN__LONGEST_ROW = 1 << 20    /* terms of a canonical sum within one block of threads */
};

/* What the CPU refuses at once: a row, or a row and a column. */
#define TERN__REFUSALS(X)                                                                                              \
    X(WEIGHT, TERN_E_NONFINITE, "ternarize: weights[%d][%d] is not a finite number below 2^96; its grain was taken as zero") \
    X(SCALE,  TERN_E_NONFINITE, "ternarize: scales[%d] is negative or not a finite number below 2^96 and was taken as zero") \
    X(TRIT,   TERN_E_TRIT,      "pack: trits[%d][%d] is not -1, 0 or 1 and was taken as zero")                          \
    X(CODE,   TERN_E_TRIT,      "unpack: row %d has an invalid code (2-bit code 3 or base-3 byte above 242) and was taken as zero") \
    X(CAST,   TERN_E_NONFINITE, "cast: element %d is not finite and was taken as zero")
#define TERN__ENUM(name, code, text) TERN__REFUSED_##name,
enum { TERN__REFUSED_BEFORE = TERN__FAULTS_END - 1, TERN__REFUSALS(TERN__ENUM) TERN__REFUSALS_END };
#undef TERN__ENUM

/* The first fault since tern_sync is the smallest key: order of the operation (16 bits), kind (4), index (44 bits; of
   a weight or trit, row in 26 and column in 18). */
enum { TERN__INDEX_BITS = 44, TERN__COLUMN_BITS = 18, TERN__KIND_BITS = 4 };
typedef unsigned long long tern__key;
static const tern__key tern__no_fault = ~(tern__key)0;

typedef struct tern__gpu {
    int device, processors;
    cudaStream_t stream;
    tern__key *fault; /* on the device, */
    float *work;      /* as this */
    int64_t order;    /* operations since tern_sync */
} tern__gpu;

/* Where a kernel reports, and as what. */
typedef struct tern__blame { tern__key *fault, key; } tern__blame;

static tern__blame tern__blame_of(const tern__gpu *d, int kind)
{
    tern__blame b;
    b.fault = d->fault;
    b.key = ((tern__key)tern__min(d->order, 0xFFFF) << TERN__KIND_BITS | (tern__key)kind) << TERN__INDEX_BITS;
    return b;
}

static __device__ void tern__report(tern__blame b, int64_t index)
{
    atomicMin(b.fault, b.key | (tern__key)tern__min(index, ((int64_t)1 << TERN__INDEX_BITS) - 1));
}
static __device__ void tern__report_at(tern__blame b, int64_t row, int64_t col)
{
    tern__report(b, tern__min(row, ((int64_t)1 << (TERN__INDEX_BITS - TERN__COLUMN_BITS)) - 1) << TERN__COLUMN_BITS |
                    tern__min(col, ((int64_t)1 << TERN__COLUMN_BITS) - 1));
}

/* The runtime's own words, with what was asked for. */
static tern_result tern__cuda_check(tern_run *r, cudaError_t error, const char *what)
{
    TERN__REQUIRE(r, error == cudaSuccess, error == cudaErrorMemoryAllocation ? TERN_E_MEMORY : TERN_E_DEVICE,
                  "cuda: %s: %s", what, cudaGetErrorString(error));
    return TERN_OK;
}
#define TERN__CUDA(r, call, what) TERN__TRY(tern__cuda_check(r, call, what))

static tern__gpu *tern__gpu_of(const tern_run *r) { return (tern__gpu *)r->state; }

/* The caller's current device comes back when an operation returns. */
typedef struct tern__current { int before, changed; } tern__current;

static tern_result tern__gpu_enter(tern_run *r, int device, tern__current *current)
{
    current->changed = 0;
    TERN__CUDA(r, cudaGetDevice(&current->before), "the current device");
    if (current->before == device) return TERN_OK;
    TERN__CUDA(r, cudaSetDevice(device), "choosing the device");
    current->changed = 1;
    return TERN_OK;
}
static void tern__gpu_leave(const tern__current *current) { if (current->changed) cudaSetDevice(current->before); }

/* Blocks of threads for some items, few enough to be no burden and enough to fill the device. */
static unsigned tern__grid(const tern__gpu *d, int64_t items, int64_t each)
{
    return (unsigned)tern__min(tern__ceil_div(items, each), (int64_t)d->processors * 32);
}

static tern_result tern__check_aligned16(tern_run *r, const char *name, const void *p)
{
    TERN__REQUIRE(r, ((uintptr_t)p & 15) == 0, TERN_E_ALIGNMENT, "cuda: %s is not aligned to 16 bytes", name);
    return TERN_OK;
}

/* Warps of a row's canonical sum share one block of threads. */
static tern_result tern__check_row(tern_run *r, const char *op, int64_t cols)
{
    TERN__REQUIRE(r, cols <= TERN__LONGEST_ROW, TERN_E_UNSUPPORTED, "cuda: %s: rows of %d; %d is the most", op, cols, (int64_t)TERN__LONGEST_ROW);
    return TERN_OK;
}

static void *tern__gpu_alloc(tern_run *r, size_t bytes)
{
    const tern__gpu *d = tern__gpu_of(r);
    tern__current current;
    void *p = NULL;
    if (tern__gpu_enter(r, d->device, &current) != TERN_OK) return NULL;
    if (cudaMalloc(&p, bytes > 0 ? bytes : 1) != cudaSuccess) p = NULL;
    if (p && (cudaMemsetAsync(p, 0, bytes, d->stream) != cudaSuccess || cudaStreamSynchronize(d->stream) != cudaSuccess)) {
        cudaFree(p);
        p = NULL;
    }
    if (!p) cudaGetLastError(); /* the caller reports it */
    tern__gpu_leave(&current);
    return p;
}

static void tern__gpu_free(tern_run *r, void *p)
{
    tern__current current;
    if (tern__gpu_enter(r, tern__gpu_of(r)->device, &current) != TERN_OK) return;
    cudaFree(p);
    tern__gpu_leave(&current);
}

static tern_result tern__gpu_copy_here(tern_run *r, void *dst, const void *src, size_t bytes, tern_direction direction)
{
    static const cudaMemcpyKind kinds[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice};
    const tern__gpu *d = tern__gpu_of(r);
    TERN__CUDA(r, cudaMemcpyAsync(dst, src, bytes, kinds[direction], d->stream), "copy");
    if (direction != TERN_ON_DEVICE) TERN__CUDA(r, cudaStreamSynchronize(d->stream), "waiting for a copy");
    return TERN_OK;
}

static tern_result tern__gpu_copy(tern_run *r, void *dst, const void *src, size_t bytes, tern_direction direction)
{
    tern__current current;
    tern_result result;
    TERN__TRY(tern__gpu_enter(r, tern__gpu_of(r)->device, &current));
    result = tern__gpu_copy_here(r, dst, src, bytes, direction);
    tern__gpu_leave(&current);
    return result;
}

/* From a key of the device to the words of the fault. */
static void tern__gpu_explain(tern_run *r, tern__key key)
{
    const int kind = (int)(key >> TERN__INDEX_BITS & ((1 << TERN__KIND_BITS) - 1));
    const int64_t index = (int64_t)(key & (((tern__key)1 << TERN__INDEX_BITS) - 1));
    const int64_t row = index >> TERN__COLUMN_BITS, col = index & ((1 << TERN__COLUMN_BITS) - 1);
    if (kind < TERN__FAULTS_END) tern__set_fault(r, (tern__fault)kind, index);
    if (r->fault.code != TERN_OK) return;
#define TERN__CASE(name, code, text)                                                                                      \
    if (kind == TERN__REFUSED_##name && (kind == TERN__REFUSED_WEIGHT || kind == TERN__REFUSED_TRIT))                     \
        tern__set_error(&r->fault, code, text, row, col);                                                                 \
    else if (kind == TERN__REFUSED_##name) tern__set_error(&r->fault, code, text, index);
    TERN__REFUSALS(TERN__CASE)
#undef TERN__CASE
}

static tern_result tern__gpu_sync(tern_run *r)
{
    tern__gpu *d = tern__gpu_of(r);
    tern__key key = tern__no_fault;
    TERN__TRY(tern__gpu_copy(r, &key, d->fault, sizeof key, TERN_TO_HOST));
    d->order = 0;
    if (key == tern__no_fault) return TERN_OK;
    tern__gpu_explain(r, key);
    return tern__gpu_copy(r, d->fault, &tern__no_fault, sizeof key, TERN_TO_DEVICE);
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-3] Canonical sums
   What enters: terms by index. What leaves: their sum in the order of [TERN-6], in every thread that asked.
   ------------------------------------------------------------------------------------------------ */

enum { TERN__THREADS = 256, TERN__WARPS = TERN__THREADS / 32 }; /* of a block, where nothing else decides */

/* Up to 1024 terms, by a warp: lanes i and i + 32 of the rule are one thread's, the rest of the tree is a butterfly. */
template <typename Term> static __device__ float tern__warp_sum(int n, Term term)
{
    float low = 0.0f, high = 0.0f;
    for (int i = (int)(threadIdx.x % 32); i < n; i += 64) {
        low = low + term(i);
        if (i + 32 < n) high = high + term(i + 32);
    }
    low = low + high;
    for (int half = 16; half > 0; half /= 2) low = low + __shfl_xor_sync(TERN__ALL_LANES, low, half);
    return low;
}

/* Up to 2^20 terms, by all warps of a block; sums: shared memory for TERN__BLOCK floats. */
template <typename Term> static __device__ float tern__block_sum(int64_t n, Term term, float *sums)
{
    const int blocks = (int)tern__ceil_div(n, TERN__BLOCK), warps = (int)blockDim.x / 32;
    for (int b = (int)threadIdx.x / 32; b < blocks; b += warps) {
        const int64_t first = (int64_t)b * TERN__BLOCK;
        const float sum = tern__warp_sum((int)tern__min(TERN__BLOCK, n - first), [&](int i) { return term(first + i); });
        if (threadIdx.x % 32 == 0) sums[b] = sum;
    }
    __syncthreads();
    const float total = blocks == 1 ? sums[0] : tern__warp_sum(blocks, [&](int i) { return sums[i]; });
    __syncthreads(); /* sums may be written again */
    return total;
}

/* The largest of all threads' values, in all threads; seen: shared memory for TERN__WARPS words. */
static __device__ uint32_t tern__block_max(uint32_t value, uint32_t *seen)
{
    const int warps = (int)blockDim.x / 32;
    for (int half = 16; half > 0; half /= 2) {
        const uint32_t other = __shfl_xor_sync(TERN__ALL_LANES, value, half);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < warps; i++) value = seen[i] > value ? seen[i] : value;
    __syncthreads();
    return value;
}

static __device__ float tern__term(int kind, float x) { return kind == TERN_SUM ? x : kind == TERN_SUM_ABS ? tern__abs(x) : x * x; }

/* Sums of blocks of 1024, a warp to a block. */
static __global__ void tern__sum_blocks(int kind, int64_t n, const float *x, float *sums)
{
    const int64_t warps = (int64_t)gridDim.x * TERN__WARPS;
    for (int64_t b = (int64_t)blockIdx.x * TERN__WARPS + threadIdx.x / 32; b < tern__ceil_div(n, TERN__BLOCK); b += warps) {
        const float *block = x + b * TERN__BLOCK;
        const float sum = tern__warp_sum((int)tern__min(TERN__BLOCK, n - b * TERN__BLOCK), [&](int i) { return tern__term(kind, block[i]); });
        if (threadIdx.x % 32 == 0) sums[b] = sum;
    }
}

/* The last block, by one warp: y = (add ? y : 0) + sum. */
static __global__ void tern__sum_last(int kind, int n, const float *x, float *y, int add)
{
    const float sum = tern__warp_sum(n, [&](int i) { return tern__term(kind, x[i]); });
    if (threadIdx.x == 0) *y = add ? *y + sum : sum;
}

/* A sum of up to 2^30 floats, level by level; sums: room for a float to each 1024 of x, and to each 1024 of those. */
static void tern__gpu_total(const tern__gpu *d, int kind, int64_t n, const float *x, float *sums, float *y, int add)
{
    while (n > TERN__BLOCK) {
        const int64_t blocks = tern__ceil_div(n, TERN__BLOCK);
        TERN__LAUNCH(tern__sum_blocks, tern__grid(d, blocks, TERN__WARPS), TERN__THREADS, 0, d->stream, kind, n, x, sums);
        x = sums;
        sums += blocks;
        n = blocks;
        kind = TERN_SUM;
    }
    TERN__LAUNCH(tern__sum_last, 1, 32, 0, d->stream, kind, (int)n, x, y, add);
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-4] Ternarize and pack
   What enters: floats or trits. What leaves: scales, and panels in the layout of [TERN-8].
   ------------------------------------------------------------------------------------------------ */

static tern_result tern__gpu_ternarize(tern_run *r, tern__gpu *d, const tern_ternarize_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: ternarize is missing"); } /* STUB */
static tern_result tern__gpu_pack(tern_run *r, tern__gpu *d, const tern_pack_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: pack is missing"); } /* STUB */
static tern_result tern__gpu_unpack(tern_run *r, tern__gpu *d, const tern_unpack_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: unpack is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-5] Activations and products of trits with int8
   What enters: float rows, packed panels. What leaves: quantized rows, and products exact in int32.
   ------------------------------------------------------------------------------------------------ */

enum {
    TERN__PIECE = 512,     /* inputs of a row that a warp quantizes at a time */
    TERN__ROOM = TERN__BLOCK * 4 + 128, /* bytes of shared memory for a row's sums and maxima */
    TERN__AHEAD = 4,       /* loads of a lane, 16 bytes each, that are under way while as many are multiplied */
    TERN__FEW_TOKENS = 16, /* of a product that reads the weights once */
    TERN__FUSED_TOKENS = 4, TERN__FUSED_BYTES = 24 << 10 /* of a layer whose blocks quantize for themselves */
};

/* r = 1/sqrt(mean(x^2) + eps); 0 for a row that has no finite mean square. */
static __device__ float tern__block_rms(int64_t n, const float *x, float eps, float *room)
{
    const float mean = tern__block_sum(n, [&](int64_t i) { return x[i] * x[i]; }, room) / (float)n;
    return tern__finite(mean) ? 1.0f / tern__sqrt(mean + eps) : 0.0f;
}

/* Row t, by a block; q, scale and sum are that row's. Within a row everything fits 32 bits: at most 2^18 units. */
static __device__ void tern__quantize_row(const tern_quantize_args &a, const tern__shape &s, int64_t t, int8_t *q, float *scale, int32_t *sum,
                                          tern__blame blame, float *room)
{
    const int cols = (int)a.m.cols, group = (int)s.group, groups = (int)s.groups, run = (int)(s.group_units * s.unit), used = (int)(s.units * s.unit);
    const int pieces = (run + TERN__PIECE - 1) / TERN__PIECE, lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
    const float *x = a.x + t * cols;
    uint32_t bits = 0;
    for (int i = (int)threadIdx.x; i < cols; i += (int)blockDim.x) {
        const uint32_t mine = tern__bits(a.gain ? x[i] * a.gain[i] : x[i]) & 0x7FFFFFFFu;
        bits = mine > bits ? mine : bits;
    }
    const float largest = tern__float(tern__block_max(bits, (uint32_t *)room));
    const float r = a.norm == TERN_NORM_RMS ? tern__block_rms(cols, x, a.eps, room) : 1.0f;
    const float inverse = 127.0f / largest;
    const bool usable = tern__finite(largest) && r > 0.0f, zero = !usable || !tern__finite(inverse);
    if (threadIdx.x == 0) *scale = zero ? 0.0f : largest / 127.0f * r;
    if (threadIdx.x == 0 && !usable) tern__report(blame, t);
    for (int g = (int)threadIdx.x; g < groups; g += (int)blockDim.x) sum[g] = 0;
    for (int i = used + 4 * (int)threadIdx.x; i < s.stride; i += 4 * (int)blockDim.x) *(uint32_t *)(q + i) = 0;
    __syncthreads();
    for (int item = (int)threadIdx.x / 32; item < groups * pieces; item += warps) {
        const int g = item / pieces, first = item % pieces * TERN__PIECE, n = min(group, cols - g * group);
        const int end = min(first + TERN__PIECE, min(run, used - g * run));
        int total = 0;
        for (int i = first + 4 * lane; i < end; i += 128) {
            uint32_t four = 0;
            for (int j = 0; j < 4 && i + j < n && !zero; j++) {
                const int at = g * group + i + j, v = (int)tern__round((a.gain ? x[at] * a.gain[at] : x[at]) * inverse);
                total += v;
                four |= (uint32_t)(v & 255) << 8 * j;
            }
            *(uint32_t *)(q + g * run + i) = four;
        }
        for (int half = 16; half > 0; half /= 2) total += __shfl_xor_sync(TERN__ALL_LANES, total, half);
        if (lane == 0) atomicAdd(&sum[g], total);
    }
    __syncthreads();
}

static __global__ void tern__quantize_rows(tern_quantize_args a, tern__shape s, tern__blame blame)
{
    TERN__SHARED(float, room);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x)
        tern__quantize_row(a, s, t, a.q + t * s.stride, a.scale + t, a.sum + t * s.groups, blame, room);
}

static tern_result tern__gpu_quantize(tern_run *r, tern__gpu *d, const tern_quantize_args *a)
{
    const int threads = a->m.cols > 2048 ? 1024 : TERN__THREADS; /* few long rows still fill a multiprocessor */
    TERN__TRY(tern__check_aligned16(r, "quantize: q", a->q));
    TERN__LAUNCH(tern__quantize_rows, tern__grid(d, a->n, 1), threads, TERN__ROOM, d->stream, *a, tern__shape_of(&a->m),
                 tern__blame_of(d, TERN__FAULT_QUANTIZE));
    return TERN_OK;
}

/* A product with trits on tensor cores. Lane 4g + t takes the 16 bytes of rows 4 (g % 4) to + 3 in panel g / 4 of a pair, of
   unit u + t: so a warp reads 256 bytes of each panel, and a quad of inputs (4 bytes of q) is what the instruction
   wants of a lane, if "row g" and "row g + 8" are understood as two of those four rows. */

/* The codes of a row in a unit, a word for each quad of inputs. Of 2-bit units those of odd quads are four-fold: no shift. */
template <bool Base3> static __device__ void tern__codes(uint32_t w, uint32_t code[5])
{
    if (Base3) {
        uint32_t even = w & 0x00FF00FFu, odd = w >> 8 & 0x00FF00FFu;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t even3 = even * 171 >> 9 & 0x007F007Fu, odd3 = odd * 171 >> 9 & 0x007F007Fu; /* thirds of bytes */
            code[i] = (even - 3 * even3) | (odd - 3 * odd3) << 8;
            even = even3;
            odd = odd3;
        }
        code[4] = even | odd << 8;
    } else {
        const uint32_t high = w >> 4;
        code[0] = w & 0x03030303u;
        code[1] = w & 0x0C0C0C0Cu;
        code[2] = high & 0x03030303u;
        code[3] = high & 0x0C0C0C0Cu;
        code[4] = 0;
    }
}

/* The quads of q for a unit. */
template <bool Base3> static __device__ void tern__quads(const int8_t *q, uint32_t quad[5])
{
    if (Base3) {
#pragma unroll
        for (int i = 0; i < 5; i++) quad[i] = ((const uint32_t *)q)[i];
    } else {
        const uint4 v = *(const uint4 *)q;
        quad[0] = v.x; quad[1] = v.y; quad[2] = v.z; quad[3] = v.w;
    }
}

/* even += the quads 0, 2 (and 4) of two rows, odd += 1 and 3. */
template <bool Base3> static __device__ void tern__mma_codes(const uint32_t row0[5], const uint32_t row1[5], const uint32_t quad[5], int even[4], int odd[4])
{
    const uint32_t a0[4] = {row0[0], row1[0], row0[2], row1[2]}, b0[2] = {quad[0], quad[2]};
    const uint32_t a1[4] = {row0[1], row1[1], row0[3], row1[3]}, b1[2] = {quad[1], quad[3]};
    tern__mma_s8(even, a0, b0);
    tern__mma_s8(odd, a1, b1);
    if (Base3) {
        const uint32_t a2[4] = {row0[4], row1[4], 0, 0}, b2[2] = {quad[4], 0};
        tern__mma_s8(even, a2, b2);
    }
}

/* Where the lane's bytes of a pair of panels begin; of a pair without a second panel it reads the first one twice. */
static __device__ const uint8_t *tern__lane_panel(const tern_matrix &m, const tern__shape &s, int64_t pair)
{
    const int g = (int)threadIdx.x % 32 / 4;
    return (const uint8_t *)m.trits + tern__min(2 * pair + g / 4, s.panels - 1) * s.panel_bytes + g % 4 * 16;
}

static __device__ float tern__scale_of(const tern_matrix &m, const tern__shape &s, int64_t row, int64_t g)
{
    return tern__load_scale(m.scale_type, m.scales, tern__scale_index(&m, &s, row, g));
}

/* -- few tokens: the weights stream past once; warps share out the inputs, or the groups, of a pair of panels -- */

static __device__ __forceinline__ void tern__load_ahead(const uint8_t *panel, int begin, int end, uint4 w[TERN__AHEAD])
{
    const int u = begin + (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TERN__AHEAD; i++) w[i] = u + 4 * i < end ? tern__stream16(panel + (u + 4 * i) * TERN__UNIT) : make_uint4(0, 0, 0, 0);
}

/* Sums of code * q over units [begin, end), of 32 rows and 8 Tiles tokens: dot[h][j][i] belongs to rows 2h + i / 2 of the
   lane's four and token 8j + 2t + i % 2. q: the lane's tokens 8j + g, or NULL. A unit that is not there has codes 0. */
template <int Tiles, bool Base3>
static __device__ __forceinline__ void tern__warp_dot(const uint8_t *panel, const int8_t *const q[Tiles], int begin, int end, int dot[2][Tiles][4])
{
    const int inputs = Base3 ? 20 : 16;
    int fours[2][Tiles][4];
    uint4 w[TERN__AHEAD], next[TERN__AHEAD];
#pragma unroll
    for (int i = 0; i < 8 * Tiles; i++) dot[i / (4 * Tiles)][i / 4 % Tiles][i % 4] = fours[i / (4 * Tiles)][i / 4 % Tiles][i % 4] = 0;
    tern__load_ahead(panel, begin, end, next);
    for (; begin < end; begin += 4 * TERN__AHEAD) {
        const int u = begin + (int)threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < TERN__AHEAD; i++) w[i] = next[i];
        tern__load_ahead(panel, begin + 4 * TERN__AHEAD, end, next);
#pragma unroll
        for (int i = 0; i < TERN__AHEAD; i++) {
            uint32_t code[4][5];
            tern__codes<Base3>(w[i].x, code[0]);
            tern__codes<Base3>(w[i].y, code[1]);
            tern__codes<Base3>(w[i].z, code[2]);
            tern__codes<Base3>(w[i].w, code[3]);
#pragma unroll
            for (int j = 0; j < Tiles; j++) {
                uint32_t quad[5] = {0, 0, 0, 0, 0};
                if (q[j] && u + 4 * i < end) tern__quads<Base3>(q[j] + (u + 4 * i) * inputs, quad);
                tern__mma_codes<Base3>(code[0], code[1], quad, dot[0][j], Base3 ? dot[0][j] : fours[0][j]);
                tern__mma_codes<Base3>(code[2], code[3], quad, dot[1][j], Base3 ? dot[1][j] : fours[1][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8 * Tiles; i++) dot[i / (4 * Tiles)][i / 4 % Tiles][i % 4] += fours[i / (4 * Tiles)][i / 4 % Tiles][i % 4] >> 2;
}

/* The sums of a round as outputs: those of the warps that share a pair added up, or one group after the other into facc. */
static __device__ void tern__fold_few(const tern_matmul_args &a, const tern__shape &s, int tokens, int pieces, int round, int rounds, const int *dots, float *facc)
{
    for (int slot = (int)threadIdx.x; slot < TERN__WARPS / pieces * tokens * 32; slot += TERN__THREADS) {
        const int pair = slot / 32 / tokens, token = slot / 32 % tokens;
        const int64_t row = ((int64_t)blockIdx.x * (TERN__WARPS / pieces) + pair) * 32 + slot % 32;
        int total = 0;
        if (token >= a.n || row >= a.m.rows) continue;
        for (int p = 0; p < pieces; p++) {
            const int sum = dots[((pair * pieces + p) * tokens + token) * 32 + slot % 32], g = round * pieces + p;
            total += sum;
            if (a.m.grain <= 0 || g >= s.groups) continue;
            const float product = (float)(sum - a.sum[token * s.groups + g]) * tern__scale_of(a.m, s, row, g);
            facc[slot] = g > 0 ? facc[slot] + product : product;
        }
        if (round < rounds - 1) continue;
        const float y = a.m.grain > 0 ? facc[slot] * a.scale[token] : (float)(total - a.sum[token]) * (a.scale[token] * tern__scale_of(a.m, s, row, 0));
        a.y[token * a.m.rows + row] = a.bias ? y + a.bias[row] : y;
    }
}

/* Shared memory: dots[warp][token][row], and for groups facc[pair][token][row]. */
template <int Tiles> struct tern__few_room { enum { dots = TERN__WARPS * 8 * Tiles * 32, bytes = 2 * 4 * dots }; };

/* `pieces` warps to a pair of panels. */
template <int Tiles, bool Base3>
static __device__ __forceinline__ void tern__few_tokens(const tern_matmul_args &a, const tern__shape &s, int pieces, int *dots)
{
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4, units = (int)s.units;
    const int rounds = a.m.grain > 0 ? ((int)s.groups + pieces - 1) / pieces : 1;
    const int share = ((units + pieces - 1) / pieces + 4 * TERN__AHEAD - 1) & ~(4 * TERN__AHEAD - 1);
    const uint8_t *panel = tern__lane_panel(a.m, s, (int64_t)blockIdx.x * (TERN__WARPS / pieces) + warp / pieces);
    const int8_t *q[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; j++) q[j] = 8 * j + g < a.n ? a.q + (8 * j + g) * s.stride : NULL;
    for (int round = 0; round < rounds; round++) {
        const int begin = a.m.grain > 0 ? (int)min((round * pieces + warp % pieces) * s.group_units, s.units) : warp % pieces * share;
        const int end = min(units, begin + (a.m.grain > 0 ? (int)s.group_units : share));
        int dot[2][Tiles][4];
        tern__warp_dot<Tiles, Base3>(panel, q, begin, end, dot);
#pragma unroll
        for (int i = 0; i < 8 * Tiles; i++) {
            const int h = i / (4 * Tiles), j = i / 4 % Tiles, k = i % 4;
            dots[(warp * 8 * Tiles + 8 * j + 2 * t + k % 2) * 32 + 4 * g + 2 * h + k / 2] = dot[h][j][k];
        }
        __syncthreads();
        tern__fold_few(a, s, 8 * Tiles, pieces, round, rounds, dots, (float *)(dots + tern__few_room<Tiles>::dots));
        __syncthreads();
    }
}

template <int Tiles, bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__few_tokens_product(tern_matmul_args a, tern__shape s, int pieces)
{
    TERN__SHARED(int, dots);
    tern__few_tokens<Tiles, Base3>(a, s, pieces, dots);
}

/* A whole layer: every block quantizes all tokens for itself, the first one for the caller too. */
template <bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__few_tokens_layer(tern_matmul_args a, tern_quantize_args quantize, tern__shape s, int pieces, tern__blame blame)
{
    TERN__SHARED(int, dots);
    int8_t *q = (int8_t *)dots + tern__few_room<1>::bytes;
    float *scale = (float *)(q + a.n * s.stride);
    int32_t *sum = (int32_t *)(scale + a.n);
    for (int64_t t = 0; t < a.n; t++) tern__quantize_row(quantize, s, t, q + t * s.stride, scale + t, sum + t * s.groups, blame, (float *)dots);
    if (blockIdx.x == 0) {
        for (int64_t i = threadIdx.x; i < a.n * s.stride / 4; i += TERN__THREADS) ((uint32_t *)quantize.q)[i] = ((const uint32_t *)q)[i];
        for (int64_t i = threadIdx.x; i < a.n; i += TERN__THREADS) quantize.scale[i] = scale[i];
        for (int64_t i = threadIdx.x; i < a.n * s.groups; i += TERN__THREADS) quantize.sum[i] = sum[i];
    }
    a.q = q;
    a.scale = scale;
    a.sum = sum;
    tern__few_tokens<1, Base3>(a, s, pieces, dots);
}

/* More tokens make it worth that warps share what they read of q; few panels, that more warps share a panel. */
static int tern__pieces(const tern__gpu *d, const tern__shape &s, int64_t n)
{
    const int64_t pairs = tern__ceil_div(s.panels, 2);
    int pieces = n > 8 ? 2 : n > 2 ? 4 : 8;
    while (pieces < 8 && pairs * pieces / TERN__WARPS < 2 * d->processors) pieces *= 2;
    return pieces;
}
static unsigned tern__few_tokens_grid(const tern__shape &s, int pieces)
{
    return (unsigned)tern__ceil_div(tern__ceil_div(s.panels, 2), TERN__WARPS / pieces);
}

/* -- many tokens: tiles of 128 rows by 16 Tiles tokens, four warps along the rows by two along the tokens; q goes through shared
   memory, a stage ahead, weights come straight from global memory, a stage ahead too -- */

template <bool Base3> struct tern__stage {
    enum {
        inputs = Base3 ? 20 : 16,
        units = Base3 ? 8 : 12,
        bytes = Base3 ? 176 : 192 /* of a token; 16 more than base-3 units for a start off alignment; no two lanes share a bank */
    };
};

/* What a step multiplies: units [begin, end) of a group, to which they are the last or not. */
typedef struct tern__step { int group, begin, end; bool last; } tern__step;

static __device__ tern__step tern__step_of(const tern__shape &s, int units, int i)
{
    const int each = ((int)s.group_units + units - 1) / units;
    tern__step step;
    step.group = i / each;
    const int first = step.group * (int)s.group_units, stop = min(first + (int)s.group_units, (int)s.units);
    step.begin = first + i % each * units;
    step.end = min(step.begin + units, stop);
    step.last = step.end == stop;
    return step;
}

template <bool Base3>
static __device__ void tern__stage_tokens(const tern_matmul_args &a, const tern__shape &s, int64_t token0, int tokens, const tern__step &step, int8_t *to)
{
    typedef tern__stage<Base3> stage;
    const int from = step.begin * stage::inputs & ~15;
    for (int i = (int)threadIdx.x; i < tokens * (stage::bytes / 16); i += TERN__THREADS) {
        const int token = i / (stage::bytes / 16), at = i % (stage::bytes / 16) * 16;
        if (token0 + token < a.n && from + at < s.stride) tern__cp_async16(to + token * stage::bytes + at, a.q + (token0 + token) * s.stride + from + at);
    }
    tern__cp_commit();
}

template <bool Base3> static __device__ void tern__stage_weights(const uint8_t *panel, const tern__step &step, uint4 w[tern__stage<Base3>::units / 4])
{
    const int u = step.begin + (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < tern__stage<Base3>::units / 4; i++)
        w[i] = u + 4 * i < step.end ? *(const uint4 *)(panel + (u + 4 * i) * TERN__UNIT) : make_uint4(0, 0, 0, 0);
}

/* dot += a stage; q: the stage's bytes for the lane's first token. */
template <int Tiles, bool Base3>
static __device__ void tern__stage_dot(const uint4 w[tern__stage<Base3>::units / 4], const int8_t *q, int dot[2][Tiles][4])
{
    typedef tern__stage<Base3> stage;
#pragma unroll
    for (int i = 0; i < stage::units / 4; i++) {
        const uint32_t row[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
        uint32_t code[4][5];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            tern__codes<Base3>(row[k], code[k]);
            if (!Base3) code[k][1] >>= 2, code[k][3] >>= 2;
        }
#pragma unroll
        for (int j = 0; j < Tiles; j++) {
            uint32_t quad[5];
            tern__quads<Base3>(q + 8 * j * stage::bytes + (4 * i + threadIdx.x % 4) * stage::inputs, quad);
            tern__mma_codes<Base3>(code[0], code[1], quad, dot[0][j], dot[0][j]);
            tern__mma_codes<Base3>(code[2], code[3], quad, dot[1][j], dot[1][j]);
        }
    }
}

/* Outputs of a token in up to four rows from `row` on. */
static __device__ void tern__store_rows(const tern_matmul_args &a, int64_t token, int64_t row, const float v[4])
{
    float *y = a.y + token * a.m.rows + row;
    if (row + 4 <= a.m.rows && ((uintptr_t)y & 15) == 0) *(float4 *)y = make_float4(v[0], v[1], v[2], v[3]);
    else for (int i = 0; i < 4 && row + i < a.m.rows; i++) y[i] = v[i];
}

/* facc of a token's rows (+)= dot * scale; dot begins anew. */
template <int Tiles> static __device__ void tern__fold_many(const tern_matmul_args &a, const tern__shape &s, int group, int64_t row, int64_t token,
                                                           int dot[2][Tiles][4], float facc[2][Tiles][4])
{
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = row + i < a.m.rows ? tern__scale_of(a.m, s, row + i, group) : 0.0f;
#pragma unroll
    for (int k = 0; k < 2 * Tiles; k++) {
        const int64_t x = token + k / 2 * 8 + k % 2;
        const int sum = x < a.n ? a.sum[x * s.groups + group] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int *d = &dot[i / 2][k / 2][i % 2 * 2 + k % 2];
            float *f = &facc[i / 2][k / 2][i % 2 * 2 + k % 2];
            const float product = (float)(*d - sum) * scale[i];
            *f = group > 0 ? *f + product : product;
            *d = 0;
        }
    }
}

template <int Tiles, bool Base3, bool Grouped>
static __global__ void __launch_bounds__(TERN__THREADS, 1) tern__many_tokens_product(tern_matmul_args a, tern__shape s, unsigned row_tiles)
{
    typedef tern__stage<Base3> stage;
    TERN__SHARED(int8_t, shared);
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4, stage_bytes = 16 * Tiles * stage::bytes;
    const int64_t pair = (int64_t)(blockIdx.x % row_tiles) * 4 + warp % 4, token0 = (int64_t)(blockIdx.x / row_tiles) * 16 * Tiles;
    const int64_t row = pair * 32 + 4 * g, token = token0 + warp / 4 * 8 * Tiles + 2 * t; /* of the lane's first output */
    const int steps = ((int)s.groups - 1) * (((int)s.group_units + stage::units - 1) / stage::units) +
                      ((int)(s.units - (s.groups - 1) * s.group_units) + stage::units - 1) / stage::units;
    const uint8_t *panel = tern__lane_panel(a.m, s, pair);
    const int8_t *q = shared + (warp / 4 * 8 * Tiles + g) * stage::bytes;
    uint4 w[stage::units / 4], next[stage::units / 4];
    int dot[2][Tiles][4];
    float facc[2][Tiles][4];
    tern__step step = tern__step_of(s, stage::units, 0);
#pragma unroll
    for (int i = 0; i < 8 * Tiles; i++) dot[i / (4 * Tiles)][i / 4 % Tiles][i % 4] = 0;
    tern__stage_tokens<Base3>(a, s, token0, 16 * Tiles, step, shared);
    tern__stage_weights<Base3>(panel, step, next);
    for (int i = 0; i < steps; i++) {
        const int side = i % 2 * stage_bytes;
        const tern__step here = step;
#pragma unroll
        for (int k = 0; k < stage::units / 4; k++) w[k] = next[k];
        if (i + 1 < steps) {
            step = tern__step_of(s, stage::units, i + 1);
            tern__stage_tokens<Base3>(a, s, token0, 16 * Tiles, step, shared + stage_bytes - side);
            tern__stage_weights<Base3>(panel, step, next);
            tern__cp_wait<1>();
        } else tern__cp_wait<0>();
        __syncthreads();
        tern__stage_dot<Tiles, Base3>(w, q + side + (here.begin * stage::inputs & 15), dot);
        __syncthreads();
        if (Grouped && here.last) tern__fold_many<Tiles>(a, s, here.group, row, token, dot, facc);
    }
#pragma unroll
    for (int k = 0; k < 2 * Tiles; k++) {
        const int64_t x = token + k / 2 * 8 + k % 2;
        float y[4];
        if (x >= a.n) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int h = i / 2, j = k / 2, e = i % 2 * 2 + k % 2;
            if (row + i >= a.m.rows) continue;
            y[i] = Grouped ? facc[h][j][e] * a.scale[x] : (float)(dot[h][j][e] - a.sum[x]) * (a.scale[x] * tern__scale_of(a.m, s, row + i, 0));
            if (a.bias) y[i] = y[i] + a.bias[row + i];
        }
        tern__store_rows(a, x, row, y);
    }
}

/* -- the operations -- */

typedef void tern__few_kernel(tern_matmul_args, tern__shape, int);
typedef void tern__many_kernel(tern_matmul_args, tern__shape, unsigned);

static tern_result tern__gpu_matmul_few(tern__gpu *d, const tern_matmul_args *a, const tern__shape &s)
{
    static tern__few_kernel *const kernels[2][2] = {
        {tern__few_tokens_product<1, false>, tern__few_tokens_product<1, true>},
        {tern__few_tokens_product<2, false>, tern__few_tokens_product<2, true>}
    };
    const int pieces = tern__pieces(d, s, a->n), tiles = a->n > 8 ? 2 : 1;
    tern__few_kernel *const kernel = kernels[tiles - 1][a->m.encoding == TERN_BASE3];
    TERN__LAUNCH(kernel, tern__few_tokens_grid(s, pieces), TERN__THREADS, tiles * tern__few_room<1>::bytes, d->stream, *a, s, pieces);
    return TERN_OK;
}

static tern_result tern__gpu_matmul_many(tern_run *r, tern__gpu *d, const tern_matmul_args *a, const tern__shape &s)
{
#define TERN__MANY(tiles, grouped) {tern__many_tokens_product<tiles, false, grouped>, tern__many_tokens_product<tiles, true, grouped>}
    static tern__many_kernel *const kernels[2][3][2] = {
        {TERN__MANY(2, false), TERN__MANY(4, false), TERN__MANY(8, false)},
        {TERN__MANY(2, true), TERN__MANY(4, true), {NULL, NULL}} /* float sums of groups leave room for 64 tokens */
    };
#undef TERN__MANY
    const int base3 = a->m.encoding == TERN_BASE3, grouped = a->m.grain > 0, size = a->n <= 32 ? 0 : a->n <= 64 || grouped ? 1 : 2, tokens = 32 << size;
    const int64_t row_tiles = tern__ceil_div(s.panels, 8), tiles = tern__mul(row_tiles, tern__ceil_div(a->n, tokens));
    tern__many_kernel *const kernel = kernels[grouped][size][base3];
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: matmul: %d tiles of 128 rows by %d tokens; %d are the most", tiles, (int64_t)tokens, (int64_t)INT32_MAX);
    TERN__LAUNCH(kernel, (unsigned)tiles, TERN__THREADS, 2 * tokens * (base3 ? (int)tern__stage<true>::bytes : (int)tern__stage<false>::bytes), d->stream,
                 *a, s, (unsigned)row_tiles);
    return TERN_OK;
}

static tern_result tern__gpu_matmul_int8(tern_run *r, tern__gpu *d, const tern_matmul_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    TERN__TRY(tern__check_aligned16(r, "matmul: m.trits", a->m.trits));
    TERN__TRY(tern__check_aligned16(r, "matmul: q", a->q));
    return a->n <= TERN__FEW_TOKENS ? tern__gpu_matmul_few(d, a, s) : tern__gpu_matmul_many(r, d, a, s);
}

/* In one launch where quantizing again in every block costs less than a launch of its own. */
static tern_result tern__gpu_linear(tern_run *r, tern__gpu *d, const tern_linear_args *a)
{
    const tern_matmul_args m = tern__linear_product(a);
    const tern__shape s = tern__shape_of(&m.m);
    const int64_t bytes = tern__mul(m.n, s.stride + 4 + 4 * s.groups);
    const int pieces = tern__pieces(d, s, m.n);
    if (m.n > TERN__FUSED_TOKENS || bytes > TERN__FUSED_BYTES || tern__few_tokens_grid(s, pieces) > 2 * (unsigned)d->processors) {
        TERN__TRY(tern__gpu_quantize(r, d, &a->quantize));
        return tern__gpu_matmul_int8(r, d, &m);
    }
    TERN__TRY(tern__check_aligned16(r, "linear: m.trits", m.m.trits));
    TERN__TRY(tern__check_aligned16(r, "linear: q", m.q));
    TERN__LAUNCH((m.m.encoding == TERN_BASE3 ? tern__few_tokens_layer<true> : tern__few_tokens_layer<false>), tern__few_tokens_grid(s, pieces),
                 TERN__THREADS, tern__few_room<1>::bytes + (size_t)bytes, d->stream, m, a->quantize, s, pieces,
                 tern__blame_of(d, TERN__FAULT_QUANTIZE));
    return TERN_OK;
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-6] Float products and attention
   What enters: float matrices, packed panels, int8 activations. What leaves: sums in the order of [TERN-14].
   ------------------------------------------------------------------------------------------------ */

static tern_result tern__gpu_matmul(tern_run *r, tern__gpu *d, const tern_matmul_args *a) { return tern__gpu_matmul_int8(r, d, a); } /* STUB */
static tern_result tern__gpu_matmul_dx(tern_run *r, tern__gpu *d, const tern_matmul_dx_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: matmul_dx is missing"); } /* STUB */
static tern_result tern__gpu_matmul_dw(tern_run *r, tern__gpu *d, const tern_matmul_dw_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: matmul_dw is missing"); } /* STUB */
static tern_result tern__gpu_dense(tern_run *r, tern__gpu *d, const tern_dense_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: dense is missing"); } /* STUB */
static tern_result tern__gpu_attention(tern_run *r, tern__gpu *d, const tern_attention_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: attention is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-7] Products of int8 with int8
   What enters: int8 matrices with strides. What leaves: int32, exact.
   ------------------------------------------------------------------------------------------------ */

static tern_result tern__gpu_dense_i8(tern_run *r, tern__gpu *d, const tern_dense_i8_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: dense_i8 is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-8] Rows and elements
   What enters: float rows. What leaves: the operations of [TERN-14] that are no products, one thread to an
   element or one block to a row.
   ------------------------------------------------------------------------------------------------ */

/* Whether pointers, and the bytes from row to row, allow accesses of 16 bytes. */
template <typename... Each> static int tern__wide(Each... each) { return ((... | (uintptr_t)each) & 15) == 0; }

/* Elements [i, i + n) of an array, n <= 4, as floats; zeros after them. A whole four is one access where it may be wide. */
static __device__ __forceinline__ void tern__load4(tern_type type, const void *p, int64_t i, int n, int wide, float x[4])
{
    if (wide && n == 4 && tern__type_bytes(type) == 4) {
        const float4 v = *(const float4 *)((const float *)p + i);
        x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
    } else if (wide && n == 4) {
        const uint2 v = *(const uint2 *)((const uint16_t *)p + i);
        const uint16_t half[4] = {(uint16_t)v.x, (uint16_t)(v.x >> 16), (uint16_t)v.y, (uint16_t)(v.y >> 16)};
        for (int k = 0; k < 4; k++) x[k] = tern__load_float(type, half, k);
    } else
        for (int k = 0; k < 4; k++) x[k] = k < n ? tern__load_float(type, p, i + k) : 0.0f;
}

/* The inverse, rounded to nearest even. */
static __device__ __forceinline__ void tern__store4(tern_type type, void *p, int64_t i, int n, int wide, const float x[4])
{
    if (wide && n == 4 && tern__type_bytes(type) == 4) *(float4 *)((float *)p + i) = make_float4(x[0], x[1], x[2], x[3]);
    else if (wide && n == 4) {
        uint16_t half[4];
        uint2 v;
        for (int k = 0; k < 4; k++) tern__store_float(type, half, k, x[k]);
        v.x = half[0] | (uint32_t)half[1] << 16;
        v.y = half[2] | (uint32_t)half[3] << 16;
        *(uint2 *)((uint16_t *)p + i) = v;
    } else
        for (int k = 0; k < 4; k++) if (k < n) tern__store_float(type, p, i + k, x[k]);
}

/* body(i, n) for every four elements of an array, shared out among the threads of the grid, or of a row, among a block's. */
template <typename Body> static __device__ __forceinline__ void tern__each4(int64_t count, Body body)
{
    TERN__EACH(four, tern__ceil_div(count, 4)) body(4 * four, (int)tern__min(4, count - 4 * four));
}
template <typename Body> static __device__ __forceinline__ void tern__each4_of_row(int64_t cols, Body body)
{
    for (int64_t i = 4 * (int64_t)threadIdx.x; i < cols; i += 4 * (int64_t)blockDim.x) body(i, (int)tern__min(4, cols - i));
}
static unsigned tern__grid4(const tern__gpu *d, int64_t count) { return tern__grid(d, tern__ceil_div(count, 4), TERN__THREADS); }

/* A block for a row that is summed: a warp to each 1024 terms, and shared memory for their sums. */
static int tern__row_threads(int64_t cols) { return 32 * (int)tern__min(32, tern__ceil_div(cols, TERN__BLOCK)); }
static size_t tern__row_shared(int64_t cols) { return sizeof(float) * (size_t)tern__ceil_div(cols, TERN__BLOCK); }

/* -- rows by id -- */

/* A packed row as values. A thread decodes a unit for four of its inputs, so that neighbours write side by side. */
static __device__ void tern__gather_packed(const tern_matrix *m, const tern__shape *s, int64_t row, int wide, float *y)
{
    const uint8_t *panel = (const uint8_t *)m->trits + row / TERN__ROWS * s->panel_bytes;
    const int fours = (int)s->unit / 4, all = (int)s->units * fours, group_units = (int)s->group_units;
    for (int four = (int)threadIdx.x; four < all; four += (int)blockDim.x) {
        const int u = four / fours, digit = four % fours;
        const int64_t g = u / group_units, in_group = u % group_units * s->unit + 4 * digit;
        const float scale = tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, s, row, g));
        float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        int8_t t[20] = {};
        tern__unpack_unit(m->encoding, panel + (int64_t)u * TERN__UNIT, row % TERN__ROWS, t);
        for (int i = 0; i < 20; i++) /* not t[4 * digit + k]: registers have no index */
            if (i / 4 == digit) value[i % 4] = (float)t[i] * scale;
        tern__store4(TERN_F32, y, g * s->group + in_group, (int)tern__min(4, tern__group_cols(m, s, g) - in_group), wide, value);
    }
}

static __device__ void tern__gather_dense(const float *w, int64_t cols, int wide, float *y)
{
    tern__each4_of_row(cols, [&](int64_t i, int n) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (w) tern__load4(TERN_F32, w, i, n, wide, x);
        tern__store4(TERN_F32, y, i, n, wide, x);
    });
}

static __global__ void tern__gather_rows(tern_gather_args a, tern__shape s, int wide, tern__blame blame)
{
    for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
        const int64_t id = a.ids[i];
        const int usable = id >= 0 && id < a.m.rows;
        float *y = a.y + i * a.m.cols;
        if (!usable && threadIdx.x == 0) tern__report(blame, i);
        if (usable && a.m.trits) tern__gather_packed(&a.m, &s, id, wide, y);
        else tern__gather_dense(usable ? a.w + id * a.m.cols : NULL, a.m.cols, wide, y);
    }
}

static tern_result tern__gpu_gather(tern_run *r, tern__gpu *d, const tern_gather_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    const int wide = tern__wide(a->w, a->y, 4 * a->m.cols, 4 * s.group);
    (void)r;
    TERN__LAUNCH(tern__gather_rows, tern__grid(d, a->n, 1), TERN__THREADS, 0, d->stream, *a, s, wide, tern__blame_of(d, TERN__FAULT_GATHER));
    return TERN_OK;
}

static __device__ int tern__ones(uint32_t word)
{
    int n = 0;
    for (; word; word &= word - 1) n++;
    return n;
}

/* Of the four ids to a thread from ids[from] on, those below `end` that are `id`: their places after `from`, in order,
   in list, and their number. By the whole block; votes: shared memory for a word to each warp and four. */
static __device__ int tern__find(const int32_t *ids, int64_t from, int64_t end, int32_t id, uint32_t *votes, int32_t *list)
{
    const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32), warps = (int)blockDim.x / 32;
    int found[4], at = 0;
    for (int k = 0; k < 4; k++) {
        const int64_t j = from + k * (int)blockDim.x + (int)threadIdx.x;
        found[k] = j < end && ids[j] == id;
        const uint32_t vote = __ballot_sync(TERN__ALL_LANES, found[k]);
        if (lane == 0) votes[k * warps + warp] = vote;
    }
    __syncthreads();
    for (int i = 0; i < 4 * warps; i++) {
        for (int k = 0; k < 4; k++)
            if (found[k] && i == k * warps + warp)
                list[at + tern__ones(votes[i] & ((1u << lane) - 1))] = k * (int)blockDim.x + (int)threadIdx.x;
        at += tern__ones(votes[i]);
    }
    __syncthreads();
    return at;
}

/* The block of the first token with an id adds the rows of all of them, in order; a thread keeps four columns' sums. */
static __global__ void tern__scatter_rows(tern_scatter_args a, int wide)
{
    TERN__SHARED(int32_t, list);
    const int span = 4 * (int)blockDim.x;
    uint32_t *votes = (uint32_t *)(list + span);
    const int64_t col = 4 * ((int64_t)blockIdx.y * blockDim.x + threadIdx.x);
    const int n = (int)tern__min(4, a.cols - col);
    for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
        const int32_t id = a.ids[i];
        int first = id >= 0 && id < a.rows;
        float sum[4], x[4];
        for (int64_t from = 0; first && from < i; from += span) first = tern__find(a.ids, from, i, id, votes, list) == 0;
        if (first) tern__load4(TERN_F32, a.dw, id * a.cols + col, n, wide, sum);
        for (int64_t from = i; first && from < a.n; from += span) {
            const int found = tern__find(a.ids, from, a.n, id, votes, list);
            for (int f = 0; f < found; f++) {
                tern__load4(TERN_F32, a.dy, (from + list[f]) * a.cols + col, n, wide, x);
                for (int k = 0; k < 4; k++) sum[k] = sum[k] + x[k];
            }
        }
        if (first) tern__store4(TERN_F32, a.dw, id * a.cols + col, n, wide, sum);
    }
}

static tern_result tern__gpu_scatter(tern_run *r, tern__gpu *d, const tern_scatter_args *a)
{
    const int threads = 32 * (int)tern__min(TERN__WARPS, tern__ceil_div(a->cols, 128));
    const dim3 grid(tern__grid(d, a->n, 1), (unsigned)tern__ceil_div(a->cols, 4 * threads));
    TERN__TRY(tern__check_row(r, "scatter", a->cols));
    TERN__LAUNCH(tern__scatter_rows, grid, threads, sizeof(int32_t) * (4 * threads + threads / 8), d->stream, *a,
                 tern__wide(a->dy, a->dw, 4 * a->cols));
    return TERN_OK;
}

/* -- element by element -- */

static __global__ void tern__fill_fours(tern_fill_args a, int wide)
{
    tern__each4(a.count, [&](int64_t i, int n) {
        float x[4];
        for (int k = 0; k < 4; k++) x[k] = a.deviation == 0.0f ? 0.0f : a.deviation * tern__normal(a.seed, (uint64_t)(i + k), a.stream);
        tern__store4(TERN_F32, a.x, i, n, wide, x);
    });
}

static tern_result tern__gpu_fill(tern_run *r, tern__gpu *d, const tern_fill_args *a)
{
    (void)r;
    TERN__LAUNCH(tern__fill_fours, tern__grid4(d, a->count), TERN__THREADS, 0, d->stream, *a, tern__wide(a->x));
    return TERN_OK;
}

static __global__ void tern__cast_fours(tern_cast_args a, int wide, tern__blame blame)
{
    tern__each4(a.count, [&](int64_t i, int n) {
        float x[4];
        tern__load4(a.from, a.src, i, n, wide, x);
        for (int k = 0; k < 4; k++)
            if (a.finite && !tern__finite(x[k])) {
                tern__report(blame, i + k);
                x[k] = 0.0f;
            }
        tern__store4(a.to, a.dst, i, n, wide, x);
    });
}

static tern_result tern__gpu_cast(tern_run *r, tern__gpu *d, const tern_cast_args *a)
{
    (void)r;
    TERN__LAUNCH(tern__cast_fours, tern__grid4(d, a->count), TERN__THREADS, 0, d->stream, *a, tern__wide(a->src, a->dst),
                 tern__blame_of(d, TERN__REFUSED_CAST));
    return TERN_OK;
}

/* Four elements of a map, each value from its x and z, or the derivatives times dy. */
static __device__ __forceinline__ void tern__map4(tern_map_fn fn, float alpha, const float xs[4], const float zs[4], float y[4])
{
    switch (fn) {
#define TERN__MAP(FN, Y, DA, DB)                                           \
    case TERN_MAP_##FN:                                                    \
        for (int k = 0; k < 4; k++) {                                      \
            const float x = xs[k], z = zs[k];                              \
            (void)z;                                                       \
            y[k] = Y;                                                      \
        }                                                                  \
        break;
    TERN__MAPS(TERN__MAP)
#undef TERN__MAP
    }
}
static __device__ __forceinline__ void tern__map4_back(tern_map_fn fn, float alpha, const float xs[4], const float zs[4], const float dys[4],
                                                       float da[4], float db[4])
{
    switch (fn) {
#define TERN__MAP(FN, Y, DA, DB)                                           \
    case TERN_MAP_##FN:                                                    \
        for (int k = 0; k < 4; k++) {                                      \
            const float x = xs[k], z = zs[k], dy = dys[k];                 \
            (void)x; (void)z; (void)dy;                                    \
            da[k] = DA;                                                    \
            db[k] = DB;                                                    \
        }                                                                  \
        break;
    TERN__MAPS(TERN__MAP)
#undef TERN__MAP
    }
}

/* What is NULL is not used. */
static __global__ void tern__map_fours(tern_map_args a, int wide)
{
    tern__each4(a.count, [&](int64_t i, int n) {
        float x[4], z[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[4];
        tern__load4(TERN_F32, a.a, i, n, wide, x);
        if (a.b) tern__load4(TERN_F32, a.b, i, n, wide, z);
        tern__map4(a.fn, a.alpha, x, z, y);
        tern__store4(TERN_F32, a.y, i, n, wide, y);
    });
}
static __global__ void tern__map_fours_back(tern_map_args a, int wide)
{
    tern__each4(a.count, [&](int64_t i, int n) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f}, z[4] = {0.0f, 0.0f, 0.0f, 0.0f}, dy[4], da[4], db[4];
        if (a.a) tern__load4(TERN_F32, a.a, i, n, wide, x);
        if (a.b) tern__load4(TERN_F32, a.b, i, n, wide, z);
        tern__load4(TERN_F32, a.dy, i, n, wide, dy);
        tern__map4_back(a.fn, a.alpha, x, z, dy, da, db);
        if (a.da) tern__store4(TERN_F32, a.da, i, n, wide, da);
        if (a.db) tern__store4(TERN_F32, a.db, i, n, wide, db);
    });
}

static tern_result tern__gpu_map(tern_run *r, tern__gpu *d, const tern_map_args *a)
{
    tern_map_args used = *a;
    (void)r;
    if (a->fn != TERN_MAP_ADD && a->fn != TERN_MAP_MUL) used.b = used.db = NULL;
    if (a->dy && (a->fn == TERN_MAP_ADD || a->fn == TERN_MAP_SCALE)) used.a = used.b = NULL; /* linear: dy is all it takes */
    TERN__LAUNCH((a->dy ? tern__map_fours_back : tern__map_fours), tern__grid4(d, a->count), TERN__THREADS, 0, d->stream, used,
                 tern__wide(used.a, used.b, a->y, a->dy, a->da, used.db));
    return TERN_OK;
}

/* -- norm: one block to a row -- */

/* y = x g r */
static __device__ void tern__norm_row(const tern_norm_args *a, int64_t t, float r, int wide)
{
    tern__each4_of_row(a->cols, [&](int64_t i, int n) {
        float x[4], gain[4];
        tern__load4(TERN_F32, a->x + t * a->cols, i, n, wide, x);
        if (a->gain) tern__load4(TERN_F32, a->gain, i, n, wide, gain);
        for (int k = 0; k < 4; k++) x[k] = r > 0.0f ? (a->gain ? x[k] * gain[k] : x[k]) * r : 0.0f;
        tern__store4(TERN_F32, a->y + t * a->cols, i, n, wide, x);
    });
}

/* dx = r g dy - x r^3 mean(g dy x) */
static __device__ void tern__norm_row_back(const tern_norm_args *a, int64_t t, float r, float *sums, int wide)
{
    const float *xs = a->x + t * a->cols, *dys = a->dy + t * a->cols;
    const float dot = tern__block_sum(a->cols, [&](int64_t i) { return (a->gain ? a->gain[i] * dys[i] : dys[i]) * xs[i]; }, sums);
    const float mean = dot / (float)a->cols * (r * r * r);
    tern__each4_of_row(a->cols, [&](int64_t i, int n) {
        float x[4], dy[4], gain[4], dx[4];
        tern__load4(TERN_F32, xs, i, n, wide, x);
        tern__load4(TERN_F32, dys, i, n, wide, dy);
        if (a->gain) tern__load4(TERN_F32, a->gain, i, n, wide, gain);
        if (a->add) tern__load4(TERN_F32, a->dx + t * a->cols, i, n, wide, dx);
        for (int k = 0; k < 4; k++) {
            const float v = r > 0.0f ? r * (a->gain ? gain[k] * dy[k] : dy[k]) - x[k] * mean : 0.0f;
            dx[k] = a->add ? dx[k] + v : v;
        }
        tern__store4(TERN_F32, a->dx + t * a->cols, i, n, wide, dx);
    });
}

static __global__ void __launch_bounds__(1024) tern__norm_rows(tern_norm_args a, int wide, tern__blame blame)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float r = tern__block_rms(a.cols, a.x + t * a.cols, a.eps, sums);
        if (!(r > 0.0f) && threadIdx.x == 0) tern__report(blame, t);
        if (!a.dy) tern__norm_row(&a, t, r, wide);
        else if (a.dx) tern__norm_row_back(&a, t, r, sums, wide);
    }
}

static __global__ void __launch_bounds__(1024) tern__norm_factors(tern_norm_args a, float *factors)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float r = tern__block_rms(a.cols, a.x + t * a.cols, a.eps, sums);
        if (threadIdx.x == 0) factors[t] = r;
    }
}

/* dgain in order of the tokens: a block has 32 columns, whose terms all its warps bring and the first one adds. -0 adds
   nothing, to -0 neither. */
enum { TERN__GAIN_TOKENS = 128 };
static __global__ void tern__norm_gain_columns(tern_norm_args a, const float *factors)
{
    TERN__SHARED(float, terms);
    const int lane = (int)(threadIdx.x % 32), warp = (int)(threadIdx.x / 32);
    const int64_t col = (int64_t)blockIdx.x * 32 + lane;
    const int inside = col < a.cols;
    float sum = inside && warp == 0 ? a.dgain[col] : 0.0f;
    for (int64_t from = 0; from < a.n; from += TERN__GAIN_TOKENS) {
        for (int k = 0; k < TERN__GAIN_TOKENS / TERN__WARPS; k++) {
            const int64_t t = from + k * TERN__WARPS + warp;
            const int there = inside && t < a.n;
            const float r = there ? factors[t] : 0.0f, x = there ? a.x[t * a.cols + col] : 0.0f, dy = there ? a.dy[t * a.cols + col] : 0.0f;
            terms[(k * TERN__WARPS + warp) * 32 + lane] = r > 0.0f ? dy * (x * r) : -0.0f;
        }
        __syncthreads();
        for (int k = 0; warp == 0 && k < TERN__GAIN_TOKENS; k++) sum = sum + terms[k * 32 + lane];
        __syncthreads();
    }
    if (inside && warp == 0) a.dgain[col] = sum;
}

/* Some rows at a time, whose factors have room in the work memory. */
static void tern__gpu_norm_gain(const tern__gpu *d, const tern_norm_args *a, int64_t rows)
{
    for (int64_t t = 0; t < a->n; t += rows) {
        tern_norm_args piece = *a;
        piece.n = tern__min(rows, a->n - t);
        piece.x += t * a->cols;
        piece.dy += t * a->cols;
        TERN__LAUNCH(tern__norm_factors, tern__grid(d, piece.n, 1), tern__row_threads(a->cols), tern__row_shared(a->cols), d->stream, piece, d->work);
        TERN__LAUNCH(tern__norm_gain_columns, (unsigned)tern__ceil_div(a->cols, 32), TERN__THREADS, TERN__GAIN_TOKENS * 32 * sizeof(float), d->stream,
                     piece, d->work);
    }
}

static tern_result tern__gpu_norm(tern_run *r, tern__gpu *d, const tern_norm_args *a)
{
    const int wide = tern__wide(a->x, a->gain, a->y, a->dy, a->dx, 4 * a->cols);
    TERN__TRY(tern__check_row(r, "norm", a->cols));
    if (a->dy && a->dgain) tern__gpu_norm_gain(d, a, TERN__WORK); /* first: dx may be dy */
    TERN__LAUNCH(tern__norm_rows, tern__grid(d, a->n, 1), tern__row_threads(a->cols), tern__row_shared(a->cols), d->stream, *a, wide,
                 tern__blame_of(d, TERN__FAULT_NORM));
    return TERN_OK;
}

/* -- rotary positions: a thread turns a pair of four heads -- */

static __device__ void tern__rope_four(const tern_rope_args *a, float *x, int heads, float sine, float cosine)
{
    float u[4], v[4];
    for (int k = 0; k < 4; k++) {
        u[k] = k < heads ? x[k * a->dim] : 0.0f;
        v[k] = k < heads ? x[k * a->dim + a->dim / 2] : 0.0f;
    }
    for (int k = 0; k < 4; k++)
        if (k < heads) {
            x[k * a->dim] = u[k] * cosine - v[k] * sine;
            x[k * a->dim + a->dim / 2] = u[k] * sine + v[k] * cosine;
        }
}

static __global__ void tern__rope_pairs(tern_rope_args a, float step)
{
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float position = (float)(a.start + t % a.period);
        for (int i = (int)threadIdx.x; i < a.dim / 2; i += (int)blockDim.x) {
            float sine, cosine;
            tern__sincos(position * tern__exp((float)i * step), &sine, &cosine);
            if (a.inverse) sine = 0.0f - sine;
            for (int64_t h = 4 * blockIdx.y; h < a.heads; h += 4 * gridDim.y)
                tern__rope_four(&a, a.x + t * a.stride + h * a.dim + i, (int)tern__min(4, a.heads - h), sine, cosine);
        }
    }
}

static tern_result tern__gpu_rope(tern_run *r, tern__gpu *d, const tern_rope_args *a)
{
    const float step = -2.0f / (float)a->dim * tern__log(a->base > 0.0f ? a->base : 10000.0f);
    const dim3 grid(tern__grid(d, a->n, 1), (unsigned)tern__min(65535, tern__ceil_div(a->heads, 4)));
    (void)r;
    TERN__LAUNCH(tern__rope_pairs, grid, 32 * (int)tern__min(TERN__WARPS, tern__ceil_div(a->dim, 64)), 0, d->stream, *a, step);
    return TERN_OK;
}

/* -- loss and sums -- */

/* Words in the order of the floats. */
static __device__ uint32_t tern__to_rank(float x) { return tern__bits(x) >> 31 ? ~tern__bits(x) : tern__bits(x) | 0x80000000u; }
static __device__ float tern__from_rank(uint32_t rank) { return tern__float(rank >> 31 ? rank & 0x7FFFFFFFu : ~rank); }

/* The largest of a row, in every thread of the block; usable: whether all are finite. */
static __device__ float tern__largest(int64_t n, const float *x, int *usable, uint32_t *seen)
{
    uint32_t rank = 0, size = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        rank = tern__to_rank(x[i]) > rank ? tern__to_rank(x[i]) : rank;
        size = tern__bits(tern__abs(x[i])) > size ? tern__bits(tern__abs(x[i])) : size;
    }
    *usable = tern__finite(tern__float(tern__block_max(size, seen)));
    return tern__from_rank(tern__block_max(rank, seen));
}

/* Exponentials are taken twice: once more costs less than to store and load them. */
static __global__ void __launch_bounds__(1024) tern__loss_rows(tern_loss_args a, int wide, tern__blame blame)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *x = a.logits + t * a.classes;
        const int32_t target = a.targets[t];
        int usable;
        const float largest = tern__largest(a.classes, x, &usable, (uint32_t *)sums);
        usable = usable && target >= 0 && target < a.classes;
        const float at_target = usable ? x[target] : 0.0f; /* dlogits may be logits */
        const float sum = tern__block_sum(a.classes, [&](int64_t i) { return tern__exp(x[i] - largest); }, sums);
        if (!usable && threadIdx.x == 0) tern__report(blame, t);
        if (threadIdx.x == 0) a.losses[t] = usable ? tern__log(sum) + (largest - at_target) : 0.0f;
        if (a.dlogits) tern__each4_of_row(a.classes, [&](int64_t i, int n) {
            float dx[4];
            tern__load4(TERN_F32, x, i, n, wide, dx);
            for (int k = 0; k < 4; k++)
                dx[k] = usable ? (tern__exp(dx[k] - largest) / sum - (i + k == target ? 1.0f : 0.0f)) * a.scale : 0.0f;
            tern__store4(TERN_F32, a.dlogits + t * a.classes, i, n, wide, dx);
        });
    }
}

static tern_result tern__gpu_loss(tern_run *r, tern__gpu *d, const tern_loss_args *a)
{
    TERN__TRY(tern__check_row(r, "loss", a->classes));
    TERN__LAUNCH(tern__loss_rows, tern__grid(d, a->n, 1), tern__row_threads(a->classes), tern__row_shared(a->classes), d->stream, *a,
                 tern__wide(a->logits, a->dlogits, 4 * a->classes), tern__blame_of(d, TERN__FAULT_LOSS));
    return TERN_OK;
}

static tern_result tern__gpu_sum(tern_run *r, tern__gpu *d, const tern_sum_args *a)
{
    const int64_t most = (int64_t)TERN__WORK * TERN__BLOCK;
    TERN__REQUIRE(r, a->count <= most, TERN_E_UNSUPPORTED, "cuda: sum: %d floats; %d is the most", a->count, most);
    tern__gpu_total(d, (int)a->kind, a->count, a->x, d->work, a->y, a->add);
    return TERN_OK;
}

/* -- optimizers -- */

static __device__ __forceinline__ void tern__optimize4(const tern_optimize_args *a, float factor, float correct1, float correct2, int64_t i, int n, int wide)
{
    const int adam = a->kind == TERN_ADAMW;
    float w[4], grad[4], moment1[4] = {0.0f, 0.0f, 0.0f, 0.0f}, moment2[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    uint32_t random[4] = {0, 0, 0, 0};
    tern__load4(a->type, a->w, i, n, wide, w);
    tern__load4(TERN_F32, a->grad, i, n, wide, grad);
    if (a->moment1) tern__load4(TERN_F32, a->moment1, i, n, wide, moment1);
    if (adam) tern__load4(TERN_F32, a->moment2, i, n, wide, moment2);
    if (a->type == TERN_BF16) tern__philox(a->seed, (uint64_t)(i >> 2), a->step, a->stream, random);
    for (int k = 0; k < 4; k++) {
        tern__trained e = {w[k], grad[k], moment1[k], moment2[k]};
        tern__optimize_one(a, factor, correct1, correct2, &e);
        w[k] = a->type == TERN_BF16 ? tern__from_bf16(tern__to_bf16_with(e.w, random[k] & 0xFFFF)) : e.w;
        grad[k] = e.grad;
        moment1[k] = e.moment1;
        moment2[k] = e.moment2;
    }
    tern__store4(a->type, a->w, i, n, wide, w);
    tern__store4(TERN_F32, a->grad, i, n, wide, grad);
    if (a->moment1) tern__store4(TERN_F32, a->moment1, i, n, wide, moment1);
    if (adam) tern__store4(TERN_F32, a->moment2, i, n, wide, moment2);
}

static __global__ void tern__optimize_fours(tern_optimize_args a, float correct1, float correct2, int wide, tern__blame blame)
{
    const int usable = !a.norm2 || tern__finite(*a.norm2);
    const float factor = tern__clip_factor(a.clip, a.norm2), zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!usable && blockIdx.x == 0 && threadIdx.x == 0) tern__report(blame, a.step);
    tern__each4(a.count, [&](int64_t i, int n) {
        if (usable) tern__optimize4(&a, factor, correct1, correct2, i, n, wide);
        else tern__store4(TERN_F32, a.grad, i, n, wide, zeros);
    });
}

static tern_result tern__gpu_optimize(tern_run *r, tern__gpu *d, const tern_optimize_args *a)
{
    const float correct1 = 1.0f / (1.0f - tern__power(a->beta1, a->step)), correct2 = 1.0f / (1.0f - tern__power(a->beta2, a->step));
    (void)r;
    TERN__LAUNCH(tern__optimize_fours, tern__grid4(d, a->count), TERN__THREADS, 0, d->stream, *a, correct1, correct2,
                 tern__wide(a->w, a->grad, a->moment1, a->moment2), tern__blame_of(d, TERN__FAULT_OPTIMIZE));
    return TERN_OK;
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-9] The function table
   What enters: tern__gpu_NAME for every operation. What leaves: tern_cuda_backend.
   ------------------------------------------------------------------------------------------------ */

/* Every operation on its device, its launches checked. */
#define TERN__OP(op)                                                                             \
    static tern_result tern__cuda_##op(tern_run *r, const tern_##op##_args *a)                    \
    {                                                                                            \
        tern__gpu *d = tern__gpu_of(r);                                                          \
        tern__current current;                                                                   \
        tern_result result;                                                                      \
        TERN__TRY(tern__gpu_enter(r, d->device, &current));                                      \
        d->order++;                                                                              \
        result = tern__gpu_##op(r, d, a);                                                        \
        if (result == TERN_OK) result = tern__cuda_check(r, cudaGetLastError(), "launching " #op); \
        tern__gpu_leave(&current);                                                               \
        return result;                                                                           \
    }
TERN_OPS(TERN__OP)
TERN_FUSED(TERN__OP)
#undef TERN__OP

static tern_result tern__gpu_open_here(tern_run *r, tern__gpu *d)
{
    int major = 0, minor = 0;
    TERN__CUDA(r, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->device), "compute capability");
    TERN__CUDA(r, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d->device), "compute capability");
    TERN__REQUIRE(r, 10 * major + minor >= TERN__LEAST_CAPABILITY, TERN_E_UNSUPPORTED,
                  "cuda: device %d has compute capability %d.%d; 7.5 is the least", (int64_t)d->device, (int64_t)major, (int64_t)minor);
    TERN__CUDA(r, cudaDeviceGetAttribute(&d->processors, cudaDevAttrMultiProcessorCount, d->device), "processors");
    TERN__CUDA(r, cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking), "a stream");
    TERN__CUDA(r, cudaMalloc(&d->fault, sizeof *d->fault), "memory");
    TERN__CUDA(r, cudaMalloc(&d->work, (TERN__WORK + TERN__WORK_LEVELS) * sizeof(float)), "memory");
    TERN__CUDA(r, cudaMemsetAsync(d->fault, 0xFF, sizeof *d->fault, d->stream), "memory");
    return TERN_OK;
}

static void tern__gpu_close(tern_run *r)
{
    tern__gpu *d = tern__gpu_of(r);
    tern__current current;
    if (tern__gpu_enter(r, d->device, &current) == TERN_OK) {
        cudaFree(d->work);
        cudaFree(d->fault);
        if (d->stream) cudaStreamDestroy(d->stream);
        tern__gpu_leave(&current);
    }
    tern__host_free(&r->allocator, d);
}

/* The known answers, on a context that is not quite open yet. */
static tern_result tern__gpu_selftest(tern_run *r)
{
    tern_context c;
    tern_result result;
    memset(&c, 0, sizeof c);
    c.run = *r;
    result = tern_selftest(&c);
    r->error = c.run.error;
    return result;
}

static tern_result tern__gpu_open(tern_run *r)
{
    const int device = *(const int *)r->backend->data;
    int devices = 0;
    tern__current current;
    tern_result result;
    tern__gpu *d;
    TERN__REQUIRE(r, device != -2, TERN_E_VERSION, "cuda: the caller's ternary.h is another version than ternary_cuda.cu's");
    TERN__CUDA(r, cudaGetDeviceCount(&devices), "looking for devices");
    TERN__REQUIRE(r, device >= 0 && device < devices, TERN_E_DEVICE, "cuda: there is no such device; %d can be used, counted from 0", (int64_t)tern__min(devices, TERN__GPUS));
    d = (tern__gpu *)tern__host_alloc(&r->allocator, sizeof *d);
    TERN__REQUIRE(r, d, TERN_E_MEMORY, "cuda: no memory for the device's state");
    d->device = device;
    r->state = d;
    result = tern__gpu_enter(r, device, &current);
    if (result == TERN_OK) {
        result = tern__gpu_open_here(r, d);
        tern__gpu_leave(&current);
    }
    if (0) result = tern__gpu_selftest(r); /* STUB: when every operation is there */
    if (result != TERN_OK) tern__gpu_close(r);
    return result;
}

#define TERN__OP(op) tern__cuda_##op,
#define TERN__TABLE(device)                                                                                               \
    {"cuda", &tern__gpu_index[(device) + 2], tern__gpu_open, tern__gpu_close, tern__gpu_alloc, tern__gpu_free, tern__gpu_copy, \
     tern__gpu_sync, TERN_OPS(TERN__OP) TERN_FUSED(TERN__OP)}
static const int tern__gpu_index[TERN__GPUS + 2] = {-2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const tern_backend tern__gpu_table[TERN__GPUS + 2] = {
    TERN__TABLE(-2), TERN__TABLE(-1), TERN__TABLE(0), TERN__TABLE(1), TERN__TABLE(2), TERN__TABLE(3), TERN__TABLE(4), TERN__TABLE(5), TERN__TABLE(6),
    TERN__TABLE(7), TERN__TABLE(8), TERN__TABLE(9), TERN__TABLE(10), TERN__TABLE(11), TERN__TABLE(12), TERN__TABLE(13), TERN__TABLE(14), TERN__TABLE(15)
};
#undef TERN__TABLE
#undef TERN__OP

/* -1: no such device; -2: another layout. Both say so when they are opened. */
extern "C" const tern_backend *tern_cuda_backend_checked(int32_t device, uint64_t layout)
{
    const int known = device >= 0 && device < TERN__GPUS ? device : -1;
    return &tern__gpu_table[(layout == TERN_LAYOUT ? known : -2) + 2];
}

extern "C" void *tern_cuda_stream(const tern_context *c)
{
    return c && c->run.backend->open == tern__gpu_open ? (void *)tern__gpu_of(&c->run)->stream : NULL;
}
