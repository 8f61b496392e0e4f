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

/* The runtime's own words, with what was asked for. The runtime forgets the error: the next launch is not to blame. */
static tern_result tern__cuda_check(tern_run *r, cudaError_t error, const char *what)
{
    if (error != cudaSuccess) cudaGetLastError();
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
static tern_result tern__gpu_leave(tern_run *r, const tern__current *current, tern_result result)
{
    const cudaError_t error = current->changed ? cudaSetDevice(current->before) : cudaSuccess;
    return result == TERN_OK ? tern__cuda_check(r, error, "choosing the caller's device again") : result;
}

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

/* Quiet, and even where the device cannot be chosen: memory knows its own. */
static void tern__gpu_free(tern_run *r, void *p)
{
    const tern_error kept = r->error;
    tern__current current;
    tern__gpu_enter(r, tern__gpu_of(r)->device, &current);
    cudaFree(p);
    tern__gpu_leave(r, &current, TERN_OK);
    r->error = kept;
}

static tern_result tern__gpu_alloc_here(tern_run *r, size_t bytes, void **out)
{
    const tern__gpu *d = tern__gpu_of(r);
    TERN__CUDA(r, cudaMalloc(out, bytes > 0 ? bytes : 1), "memory");
    TERN__CUDA(r, cudaMemsetAsync(*out, 0, bytes, d->stream), "clearing memory");
    TERN__CUDA(r, cudaStreamSynchronize(d->stream), "clearing memory");
    return TERN_OK;
}

static void *tern__gpu_alloc(tern_run *r, size_t bytes)
{
    tern__current current;
    tern_result result;
    void *p = NULL;
    if (tern__gpu_enter(r, tern__gpu_of(r)->device, &current) != TERN_OK) return NULL;
    result = tern__gpu_leave(r, &current, tern__gpu_alloc_here(r, bytes, &p));
    if (result == TERN_OK) return p;
    if (p) tern__gpu_free(r, p);
    return NULL;
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
    TERN__TRY(tern__gpu_enter(r, tern__gpu_of(r)->device, &current));
    return tern__gpu_leave(r, &current, tern__gpu_copy_here(r, dst, src, bytes, direction));
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

static tern_result tern__gpu_quantize(tern_run *r, tern__gpu *d, const tern_quantize_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: quantize is missing"); } /* STUB */
static tern_result tern__gpu_linear(tern_run *r, tern__gpu *d, const tern_linear_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: linear is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-6] Float products and attention
   What enters: float matrices, packed panels, int8 activations. What leaves: sums in the order of [TERN-14].
   ------------------------------------------------------------------------------------------------ */

static tern_result tern__gpu_matmul(tern_run *r, tern__gpu *d, const tern_matmul_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: matmul is missing"); } /* STUB */
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

static tern_result tern__gpu_gather(tern_run *r, tern__gpu *d, const tern_gather_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: gather is missing"); } /* STUB */
static tern_result tern__gpu_scatter(tern_run *r, tern__gpu *d, const tern_scatter_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: scatter is missing"); } /* STUB */
static tern_result tern__gpu_fill(tern_run *r, tern__gpu *d, const tern_fill_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: fill is missing"); } /* STUB */
static tern_result tern__gpu_cast(tern_run *r, tern__gpu *d, const tern_cast_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: cast is missing"); } /* STUB */
static tern_result tern__gpu_map(tern_run *r, tern__gpu *d, const tern_map_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: map is missing"); } /* STUB */
static tern_result tern__gpu_norm(tern_run *r, tern__gpu *d, const tern_norm_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: norm is missing"); } /* STUB */
static tern_result tern__gpu_rope(tern_run *r, tern__gpu *d, const tern_rope_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: rope is missing"); } /* STUB */
static tern_result tern__gpu_loss(tern_run *r, tern__gpu *d, const tern_loss_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: loss is missing"); } /* STUB */
static tern_result tern__gpu_sum(tern_run *r, tern__gpu *d, const tern_sum_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: sum is missing"); } /* STUB */
static tern_result tern__gpu_optimize(tern_run *r, tern__gpu *d, const tern_optimize_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: optimize is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-9] The function table
   What enters: tern__gpu_NAME for every operation. What leaves: tern_cuda_backend.
   ------------------------------------------------------------------------------------------------ */

/* Every operation on its device, its launches checked; errors of before are told apart. */
#define TERN__OP(op)                                                                              \
    static tern_result tern__cuda_##op(tern_run *r, const tern_##op##_args *a)                    \
    {                                                                                             \
        tern__gpu *d = tern__gpu_of(r);                                                           \
        tern__current current;                                                                    \
        tern_result result;                                                                       \
        TERN__CUDA(r, cudaGetLastError(), "before " #op);                                         \
        TERN__TRY(tern__gpu_enter(r, d->device, &current));                                       \
        d->order++;                                                                               \
        result = tern__gpu_##op(r, d, a);                                                         \
        if (result == TERN_OK) result = tern__cuda_check(r, cudaGetLastError(), "launching " #op); \
        return tern__gpu_leave(r, &current, result);                                              \
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
    TERN__CUDA(r, cudaMalloc(&d->fault, sizeof *d->fault), "memory for faults");
    TERN__CUDA(r, cudaMalloc(&d->work, (TERN__WORK + TERN__WORK_LEVELS) * sizeof(float)), "work memory");
    TERN__CUDA(r, cudaMemsetAsync(d->fault, 0xFF, sizeof *d->fault, d->stream), "clearing faults");
    return TERN_OK;
}

static void tern__gpu_close(tern_run *r)
{
    const tern_error kept = r->error;
    tern__gpu *d = tern__gpu_of(r);
    tern__current current;
    tern__gpu_enter(r, d->device, &current);
    if (d->work) cudaFree(d->work);
    if (d->fault) cudaFree(d->fault);
    if (d->stream) cudaStreamDestroy(d->stream);
    tern__gpu_leave(r, &current, TERN_OK);
    tern__host_free(&r->allocator, d);
    r->error = kept;
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
    if (result == TERN_OK) result = tern__gpu_leave(r, &current, tern__gpu_open_here(r, d));
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
