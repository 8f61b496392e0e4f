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

static tern_result tern__gpu_quantize(tern_run *r, tern__gpu *d, const tern_quantize_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: quantize is missing"); } /* STUB */
static tern_result tern__gpu_linear(tern_run *r, tern__gpu *d, const tern_linear_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: linear is missing"); } /* STUB */

/* ------------------------------------------------------------------------------------------------
   [CUDA-6] Float products and attention
   What enters: float matrices, packed panels, int8 activations. What leaves: sums in the order of [TERN-14].
   ------------------------------------------------------------------------------------------------ */

static tern_result tern__gpu_matmul_int8(tern_run *r, tern__gpu *d, const tern_matmul_args *a) { (void)d; (void)a; TERN__FAIL(r, TERN_E_UNSUPPORTED, "cuda: matmul on int8 is missing"); } /* STUB */

/* -- products: tiles of 64 columns and 64 or 16 rows, a block of threads to each; a thread has 4 x 4 sums, or 1 x 4 -- */

enum {
    TERN__SIDE = 64, TERN__ROW_THREADS = 16,                /* columns of a tile; threads across its rows */
    TERN__DEPTH = 16,                                       /* terms of a chunk, which divide a segment and a panel's rows */
    TERN__PITCH = TERN__SIDE + 4,                           /* floats from term to term in shared memory: its stores meet all banks */
    TERN__CHUNK = 2 * TERN__DEPTH * TERN__PITCH,            /* a's and b's */
    TERN__TILE_BYTES = 2 * TERN__CHUNK * (int)sizeof(float), /* one is filled while the other is read */
    TERN__ITEMS = 1024                                      /* of a batch, that have blocks of their own */
};

/* Steps in floats from sequence to sequence of a batch and from head to head, of which some may share one. */
typedef struct tern__steps { int64_t sequence, head, shared; } tern__steps;

/* Terms k and lines (rows of a, columns of b) of a float matrix, and the steps between a thread's elements of a chunk. */
typedef struct tern__strided {
    const float *p;
    int64_t k_step, line_step, near, far;
    tern__steps steps;
    bool along_k;
} tern__strided;

/* Right operands: strided floats, packed weights as trit * scale with their rows as terms, packed weights as trits
   with their inputs as terms, int8 activations times their token's scale with tokens as terms. */
struct tern__b_floats { enum { GROUPED = 0 }; tern__strided x; };
struct tern__b_weights { enum { GROUPED = 0 }; tern_matrix m; tern__shape s; };
struct tern__b_trits { enum { GROUPED = 1 }; tern_matrix m; tern__shape s; };
struct tern__b_bytes { enum { GROUPED = 0 }; const int8_t *q; const float *scale; tern__shape s; };

/* c [m, n] = a [m, k] * b [k, n] (+ c) (+ bias) for each item, a head of a sequence. The terms may lie in groups. With
   delta, one to a row, c = c * (a * b - delta) * factor. Columns from visible + row on need no result. */
typedef struct tern__product {
    int64_t m, n, k, group;
    tern__strided a;
    float *c; int64_t c_row; tern__steps c_steps;
    const float *bias;
    const float *delta; int64_t delta_row; tern__steps delta_steps;
    float factor;
    int32_t add;
    int64_t visible;
    int64_t items; int heads, first_head, head_step; /* of an item: head first_head + item % heads * head_step */
} tern__product;

/* The item of a block. */
typedef struct tern__which { int sequence, head; } tern__which;

static __device__ tern__which tern__item(const tern__product &g, int item)
{
    tern__which w;
    w.sequence = item / g.heads;
    w.head = g.first_head + item % g.heads * g.head_step;
    return w;
}
static __device__ int64_t tern__offset(const tern__steps &s, tern__which w) { return w.sequence * s.sequence + w.head / s.shared * s.head; }

/* Up to 16 terms of a group, and the first one's index among all. */
typedef struct tern__chunk { int group, at, k, len; } tern__chunk;

static __device__ tern__chunk tern__chunk_of(const tern__product &g, int group, int at)
{
    tern__chunk c;
    c.group = group;
    c.at = at;
    c.k = group * (int)g.group + at;
    c.len = (int)tern__min(tern__min(TERN__DEPTH, g.group - at), g.k - c.k);
    return c;
}

/* The one after it; of length 0 after the last. */
static __device__ tern__chunk tern__next_chunk(const tern__product &g, const tern__chunk &c)
{
    const bool ends = c.at + c.len == g.group || c.k + c.len == g.k;
    return tern__chunk_of(g, c.group + ends, ends ? 0 : c.at + c.len);
}

/* The elements of a chunk that a thread moves: 4 of 64 lines, or 1 of 16. Neighbours in a warp take neighbouring terms
   or neighbouring lines, whichever are neighbours in memory. */
typedef struct tern__place { int k, line; bool along_k; } tern__place;

template <int Lines> static __device__ tern__place tern__place_of(bool along_k)
{
    const int thread = (int)threadIdx.x, run = !along_k ? Lines : Lines == TERN__SIDE ? TERN__DEPTH / 2 : TERN__DEPTH;
    tern__place p;
    p.k = along_k ? thread % run : thread / run;
    p.line = along_k ? thread / run : thread % run;
    p.along_k = along_k;
    return p;
}
static __device__ int tern__place_k(const tern__place &p, int i) { return p.k + (p.along_k ? i % 2 * (TERN__DEPTH / 2) : i * (TERN__DEPTH / 4)); }
static __device__ int tern__place_line(const tern__place &p, int i) { return p.line + (p.along_k ? i / 2 * (TERN__SIDE / 2) : 0); }

/* Where a thread finds its elements of any chunk: */
typedef struct tern__float_lines { tern__place place; const float *p; int lines; } tern__float_lines;
typedef struct tern__code_lines { tern__place place; const uint8_t *p; int group, digit; bool inside; } tern__code_lines;

template <int Lines> static __device__ tern__float_lines tern__lines_of(const tern__strided &x, tern__which w, int64_t first, int64_t end)
{
    tern__float_lines l;
    l.place = tern__place_of<Lines>(x.along_k);
    l.p = x.p + tern__offset(x.steps, w) + (first + l.place.line) * x.line_step + l.place.k * x.k_step;
    l.lines = (int)tern__min(Lines, end - first);
    return l;
}
template <int Lines> static __device__ tern__float_lines tern__lines_of(const tern__b_floats &b, tern__which w, int64_t first, int64_t end)
{
    return tern__lines_of<Lines>(b.x, w, first, end);
}

/* Packed weights, line by line: the byte of an input in row 0 of panel 0, and its digit. */
template <int Lines> static __device__ tern__code_lines tern__lines_of(const tern__b_weights &b, tern__which, int64_t first, int64_t end)
{
    tern__code_lines l;
    l.place = tern__place_of<Lines>(false);
    const int64_t input = first + l.place.line, in_group = input % b.s.group, in_unit = in_group % b.s.unit;
    l.inside = input < end;
    l.group = (int)(input / b.s.group);
    l.p = (const uint8_t *)b.m.trits + (l.group * b.s.group_units + in_group / b.s.unit) * TERN__UNIT + in_unit % 4;
    l.digit = (int)(in_unit / 4);
    return l;
}

/* A thread's terms are 4 apart: they share a byte of the row, or the same byte of units that follow. */
template <int Lines> static __device__ tern__code_lines tern__lines_of(const tern__b_trits &b, tern__which, int64_t first, int64_t end)
{
    tern__code_lines l;
    l.place = tern__place_of<Lines>(false);
    const int64_t row = first + l.place.line;
    l.inside = row < end;
    l.p = (const uint8_t *)b.m.trits + row / TERN__ROWS * b.s.panel_bytes + row % TERN__ROWS * 4 + l.place.k;
    return l;
}

template <int Lines> static __device__ tern__code_lines tern__lines_of(const tern__b_bytes &b, tern__which, int64_t first, int64_t end)
{
    tern__code_lines l;
    l.place = tern__place_of<Lines>(false);
    const int64_t input = first + l.place.line;
    l.inside = input < end;
    l.p = (const uint8_t *)b.q + input / b.s.group * b.s.group_units * b.s.unit + input % b.s.group;
    return l;
}

/* A digit of a byte of codes, as a trit. Of base 3: byte / 3^digit, as (byte * ceil(2^16 / 3^digit)) / 2^16, exact for bytes. */
static __device__ float tern__digit(tern_type encoding, uint32_t byte, int digit)
{
    if (encoding != TERN_BASE3) return (float)((int)(byte >> 2 * digit & 3) - 1);
    const uint32_t inverse = digit < 2 ? digit == 0 ? 65536 : 21846 : digit == 2 ? 7282 : digit == 3 ? 2428 : 810;
    return (float)((int)((byte * inverse >> 16) % 3) - 1);
}

/* The scale of a row of a panel, whose first row's lies at `first`. */
static __device__ float tern__panel_scale(const tern_matrix &m, int64_t first, int row)
{
    return tern__load_scale(m.scale_type, m.scales, m.grain == TERN_PER_TENSOR ? 0 : first + row);
}

/* From memory to registers; zero where the matrix ends, which adds nothing. */
template <int Count, typename Element> static __device__ void tern__read_each(const tern__place &p, const tern__chunk &c, int lines, float (&v)[Count], Element element)
{
    for (int i = 0; i < Count; i++)
        v[i] = tern__place_k(p, i) < c.len && tern__place_line(p, i) < lines ? element(i) : 0.0f;
}
template <int Count> static __device__ void tern__read(const tern__strided &x, const tern__float_lines &l, const tern__chunk &c, float (&v)[Count])
{
    const float *p = l.p + (int64_t)c.k * x.k_step;
    tern__read_each(l.place, c, l.lines, v, [&](int i) { return p[i % 2 * x.near + i / 2 * x.far]; });
}
static __device__ void tern__read(const tern__b_floats &b, const tern__float_lines &l, const tern__chunk &c, float (&v)[4]) { tern__read(b.x, l, c, v); }

static __device__ void tern__read(const tern__b_weights &b, const tern__code_lines &l, const tern__chunk &c, float (&v)[4])
{
    const uint8_t *p = l.p + c.k / TERN__ROWS * b.s.panel_bytes;
    const int64_t scales = tern__scale_index(&b.m, &b.s, c.k, l.group);
    tern__read_each(l.place, c, l.inside ? TERN__SIDE : 0, v, [&](int i) {
        const int row = tern__place_k(l.place, i);
        return tern__digit(b.m.encoding, p[4 * row], l.digit) * tern__panel_scale(b.m, scales, row);
    });
}

static __device__ void tern__read(const tern__b_trits &b, const tern__code_lines &l, const tern__chunk &c, float (&v)[4])
{
    const int digits = b.m.encoding == TERN_BASE3 ? 5 : 4, unit = c.at / 4 / digits, first = c.at / 4 % digits;
    const uint8_t *p = l.p + (c.group * b.s.group_units + unit) * TERN__UNIT;
    tern__read_each(l.place, c, l.inside ? TERN__SIDE : 0, v, [&](int i) {
        const bool wraps = first + i >= digits;
        return tern__digit(b.m.encoding, p[wraps ? TERN__UNIT : 0], first + i - (wraps ? digits : 0));
    });
}

static __device__ void tern__read(const tern__b_bytes &b, const tern__code_lines &l, const tern__chunk &c, float (&v)[4])
{
    const int8_t *q = (const int8_t *)l.p + (int64_t)c.k * b.s.stride;
    tern__read_each(l.place, c, l.inside ? TERN__SIDE : 0, v, [&](int i) {
        const int64_t token = tern__place_k(l.place, i);
        return (float)q[token * b.s.stride] * b.scale[c.k + token];
    });
}

/* From registers to shared memory, [term][line]. */
template <int Count> static __device__ void tern__put(const tern__place &p, const float (&v)[Count], float *shared)
{
    for (int i = 0; i < Count; i++) shared[tern__place_k(p, i) * TERN__PITCH + tern__place_line(p, i)] = v[i];
}

/* Floats that one instruction loads. */
template <int Count> struct alignas(Count * sizeof(float)) tern__vector { float v[Count]; };

/* A chunk's terms, in order, added to a thread's sums. */
template <bool Fused, int Rows> static __device__ void tern__multiply(const float *a, const float *b, float (&sum)[Rows][4])
{
    const float *row = a + threadIdx.x / TERN__ROW_THREADS * Rows, *column = b + threadIdx.x % TERN__ROW_THREADS * 4;
    for (int k = 0; k < TERN__DEPTH; k++) {
        const tern__vector<Rows> x = *(const tern__vector<Rows> *)(row + k * TERN__PITCH);
        const tern__vector<4> y = *(const tern__vector<4> *)(column + k * TERN__PITCH);
        for (int i = 0; i < Rows; i++)
            for (int j = 0; j < 4; j++)
                sum[i][j] = Fused ? __fmaf_rn(x.v[i], y.v[j], sum[i][j]) : sum[i][j] + x.v[i] * y.v[j];
    }
}

template <int Rows, typename Each> static __device__ void tern__each_sum(Each each)
{
    for (int i = 0; i < Rows; i++)
        for (int j = 0; j < 4; j++) each(i, j);
}

/* The end of a segment: its sums are added to those before it. */
template <int Rows> static __device__ void tern__end_segment(bool first, float (&part)[Rows][4], float (&whole)[Rows][4])
{
    tern__each_sum<Rows>([&](int i, int j) {
        whole[i][j] = first ? part[i][j] : whole[i][j] + part[i][j];
        part[i][j] = 0.0f;
    });
}

/* The end of a group: its sums times their row's scale are added to those before it. */
template <typename B, int Rows> static __device__ void tern__end_group(const B &, int, int64_t, int64_t, const float (&)[Rows][4], float (&)[Rows][4]) {}
template <int Rows> static __device__ void tern__end_group(const tern__b_trits &b, int group, int64_t column, int64_t n, const float (&whole)[Rows][4], float (&total)[Rows][4])
{
    const int64_t scales = tern__scale_index(&b.m, &b.s, column, group); /* four columns are of one panel */
    float scale[4];
    for (int j = 0; j < 4; j++)
        scale[j] = column + j < n ? tern__panel_scale(b.m, scales, j) : 0.0f;
    tern__each_sum<Rows>([&](int i, int j) {
        const float product = whole[i][j] * scale[j];
        total[i][j] = group == 0 ? product : total[i][j] + product;
    });
}

template <int Rows> static __device__ void tern__store(const tern__product &g, tern__which w, int64_t row, int64_t column, const float (&sum)[Rows][4])
{
    float *c = g.c + tern__offset(g.c_steps, w) + row * g.c_row + column;
    const float *delta = g.delta ? g.delta + tern__offset(g.delta_steps, w) + row * g.delta_row : NULL;
    tern__each_sum<Rows>([&](int i, int j) {
        if (row + i >= g.m || column + j >= g.n) return;
        float *y = c + i * g.c_row + j, v = sum[i][j];
        if (delta) v = *y * (v - delta[i * g.delta_row]) * g.factor;
        if (g.add) v = *y + v;
        if (g.bias) v = v + g.bias[column + j];
        *y = v;
    });
}

/* One tile: while a chunk in shared memory is multiplied, the next one is on its way to registers. */
template <typename B, bool Fused, int Rows>
static __device__ void tern__product_tile(const tern__product &g, const B &b, tern__which w, int64_t m0, int64_t n0, float *shared)
{
    const int64_t row = m0 + threadIdx.x / TERN__ROW_THREADS * Rows, column = n0 + threadIdx.x % TERN__ROW_THREADS * 4;
    const auto a_lines = tern__lines_of<TERN__ROW_THREADS * Rows>(g.a, w, m0, g.m);
    const auto b_lines = tern__lines_of<TERN__SIDE>(b, w, n0, g.n);
    float a_next[Rows], b_next[4], part[Rows][4] = {}, whole[Rows][4], total[Rows][4];
    tern__chunk next = tern__chunk_of(g, 0, 0);
    tern__read(g.a, a_lines, next, a_next);
    tern__read(b, b_lines, next, b_next);
    for (int half = 0; next.len > 0; half ^= 1) {
        const tern__chunk now = next;
        float *a_now = shared + half * TERN__CHUNK, *b_now = a_now + TERN__CHUNK / 2;
        tern__put(a_lines.place, a_next, a_now);
        tern__put(b_lines.place, b_next, b_now);
        __syncthreads(); /* also: all have read what the next round overwrites */
        next = tern__next_chunk(g, now);
        if (next.len > 0) {
            tern__read(g.a, a_lines, next, a_next);
            tern__read(b, b_lines, next, b_next);
        }
        tern__multiply<Fused>(a_now, b_now, part);
        if (next.at % TERN__SEGMENT == 0) tern__end_segment(now.at < TERN__SEGMENT, part, whole);
        if (next.at == 0) tern__end_group(b, now.group, column, g.n, whole, total);
    }
    tern__store(g, w, row, column, B::GROUPED ? total : whole);
    __syncthreads(); /* shared memory is free again */
}

template <typename B, bool Fused, int Rows> static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__product_tiles(tern__product g, B b)
{
    TERN__SHARED(float, shared);
    const int64_t rows = TERN__ROW_THREADS * Rows, strips = tern__ceil_div(g.m, rows);
    const int64_t m0 = blockIdx.x % strips * rows, n0 = blockIdx.x / strips * TERN__SIDE;
    for (int item = (int)blockIdx.y; item < (int)g.items; item += (int)gridDim.y)
        if (n0 < g.visible + m0 + rows - 1) tern__product_tile<B, Fused, Rows>(g, b, tern__item(g, item), m0, n0, shared);
}

static tern__steps tern__steps_of(int64_t sequence, int64_t head, int64_t shared)
{
    tern__steps s;
    s.sequence = sequence;
    s.head = head;
    s.shared = shared;
    return s;
}
static tern__strided tern__strided_of(const float *p, int64_t k_step, int64_t line_step, tern__steps steps)
{
    tern__strided x;
    x.p = p;
    x.k_step = k_step;
    x.line_step = line_step;
    x.steps = steps;
    x.along_k = k_step < line_step;
    x.near = (x.along_k ? TERN__DEPTH / 2 : TERN__DEPTH / 4) * k_step;
    x.far = x.along_k ? TERN__SIDE / 2 * line_step : TERN__DEPTH / 2 * k_step;
    return x;
}
static tern__b_floats tern__b_floats_of(const float *p, int64_t k_step, int64_t line_step, tern__steps steps)
{
    tern__b_floats b;
    b.x = tern__strided_of(p, k_step, line_step, steps);
    return b;
}
static tern__steps tern__no_steps() { return tern__steps_of(0, 0, 1); }

/* One item, one group. */
static tern__product tern__product_of(int64_t m, int64_t n, int64_t k, tern__strided a, float *c, int64_t c_row, tern__steps c_steps)
{
    tern__product g;
    memset(&g, 0, sizeof g);
    g.m = m; g.n = n; g.k = g.group = k;
    g.a = a;
    g.c = c; g.c_row = c_row; g.c_steps = c_steps;
    g.visible = (int64_t)1 << 62;
    g.items = g.heads = 1;
    return g;
}

/* Low tiles where high ones would be mostly empty, or leave processors without work. */
template <bool Fused, typename B> static tern_result tern__gpu_product(tern_run *r, const tern__gpu *d, const char *op, const tern__product &g, const B &b)
{
    const int64_t columns = tern__ceil_div(g.n, TERN__SIDE), high = tern__mul(tern__ceil_div(g.m, TERN__SIDE), columns);
    const bool low = g.m <= TERN__ROW_THREADS || tern__mul(high, g.items) < d->processors;
    const int64_t tiles = low ? tern__mul(tern__ceil_div(g.m, TERN__ROW_THREADS), columns) : high;
    TERN__REQUIRE(r, g.k <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: %s: sums of %d terms; %d is the most", op, g.k, (int64_t)INT32_MAX);
    TERN__REQUIRE(r, g.items <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: %s: %d heads; %d is the most", op, g.items, (int64_t)INT32_MAX);
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: %s: a result of %d x %d has %d tiles; %d is the most", op, g.m, g.n, tiles, (int64_t)INT32_MAX);
    const dim3 grid((unsigned)tiles, (unsigned)tern__min(g.items, TERN__ITEMS));
    if (low) TERN__LAUNCH((tern__product_tiles<B, Fused, 1>), grid, TERN__THREADS, TERN__TILE_BYTES, d->stream, g, b);
    else TERN__LAUNCH((tern__product_tiles<B, Fused, 4>), grid, TERN__THREADS, TERN__TILE_BYTES, d->stream, g, b);
    return TERN_OK;
}

static tern_result tern__gpu_dense(tern_run *r, tern__gpu *d, const tern_dense_args *a)
{
    const tern__steps none = tern__no_steps();
    const tern__b_floats b = tern__b_floats_of(a->b, a->b_row, a->b_col, none);
    tern__product g = tern__product_of(a->m, a->n, a->k, tern__strided_of(a->a, a->a_col, a->a_row, none), a->c, a->c_row, none);
    g.bias = a->bias;
    g.add = a->add;
    return a->fused ? tern__gpu_product<true>(r, d, "dense", g, b) : tern__gpu_product<false>(r, d, "dense", g, b);
}

/* -- ternary matmul on float activations, and its backward -- */

/* A row with NaN or Inf counts as zero: its outputs become the bias. */
static __global__ void tern__matmul_rows(tern_matmul_args a, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        uint32_t largest = 0;
        for (int64_t i = threadIdx.x; i < a.m.cols; i += blockDim.x) {
            const uint32_t bits = tern__bits(a.x[t * a.m.cols + i]) & 0x7FFFFFFFu;
            largest = bits > largest ? bits : largest;
        }
        if (tern__finite(tern__float(tern__block_max(largest, seen)))) continue;
        if (threadIdx.x == 0) tern__report(blame, t);
        for (int64_t i = threadIdx.x; i < a.m.rows; i += blockDim.x) a.y[t * a.m.rows + i] = a.bias ? a.bias[i] : 0.0f;
    }
}

/* A product with a trit is exact, so that fusing it with the sum changes nothing. */
static tern_result tern__gpu_matmul_floats(tern_run *r, tern__gpu *d, const tern_matmul_args *a)
{
    const tern__steps none = tern__no_steps();
    tern__product g = tern__product_of(a->n, a->m.rows, a->m.cols, tern__strided_of(a->x, 1, a->m.cols, none), a->y, a->m.rows, none);
    tern__b_trits b;
    b.m = a->m;
    b.s = tern__shape_of(&a->m);
    g.group = b.s.group;
    g.bias = a->bias;
    TERN__TRY(tern__gpu_product<true>(r, d, "matmul", g, b));
    TERN__LAUNCH(tern__matmul_rows, tern__grid(d, a->n, 1), TERN__THREADS, TERN__WARPS * sizeof(uint32_t), d->stream, *a,
                 tern__blame_of(d, TERN__FAULT_MATMUL));
    return TERN_OK;
}

static tern_result tern__gpu_matmul(tern_run *r, tern__gpu *d, const tern_matmul_args *a)
{
    return a->q ? tern__gpu_matmul_int8(r, d, a) : tern__gpu_matmul_floats(r, d, a);
}

static tern_result tern__gpu_matmul_dx(tern_run *r, tern__gpu *d, const tern_matmul_dx_args *a)
{
    const tern__steps none = tern__no_steps();
    const tern__product g = tern__product_of(a->n, a->m.cols, a->m.rows, tern__strided_of(a->dy, 1, a->m.rows, none), a->dx, a->m.cols, none);
    tern__b_weights b;
    b.m = a->m;
    b.s = tern__shape_of(&a->m);
    return tern__gpu_product<true>(r, d, "matmul_dx", g, b);
}

/* Column sums in order of the tokens, many of which are on their way at once. */
static __global__ void tern__bias_columns(int64_t n, int64_t rows, const float *dy, float *dbias)
{
    TERN__EACH(i, rows) {
        float sum = dbias[i], next[16];
        for (int64_t t = 0; t < n; t += 16) {
            for (int j = 0; j < 16; j++) next[j] = t + j < n ? dy[(t + j) * rows + i] : 0.0f;
            for (int j = 0; j < 16; j++) sum = t + j < n ? sum + next[j] : sum;
        }
        dbias[i] = sum;
    }
}

static tern_result tern__gpu_matmul_dw(tern_run *r, tern__gpu *d, const tern_matmul_dw_args *a)
{
    const tern__steps none = tern__no_steps();
    tern__product g = tern__product_of(a->m.rows, a->m.cols, a->n, tern__strided_of(a->dy, a->m.rows, 1, none), a->dw, a->m.cols, none);
    tern__b_bytes b;
    b.q = a->q;
    b.scale = a->scale;
    b.s = tern__shape_of(&a->m);
    g.add = 1;
    if (a->dw && a->q) TERN__TRY(tern__gpu_product<true>(r, d, "matmul_dw", g, b));
    if (a->dw && !a->q) TERN__TRY(tern__gpu_product<true>(r, d, "matmul_dw", g, tern__b_floats_of(a->x, a->m.cols, 1, none)));
    if (a->dbias) TERN__LAUNCH(tern__bias_columns, tern__grid(d, a->m.rows, 64), 64, 0, d->stream, a->n, a->m.rows, a->dy, a->dbias);
    return TERN_OK;
}

/* -- attention -- */

/* Floats as integers of the same order, for the largest; NaN are among the ends. */
static __device__ uint32_t tern__ordered(float x) { return tern__bits(x) >> 31 ? ~tern__bits(x) : tern__bits(x) | 0x80000000u; }
static __device__ float tern__unordered(uint32_t u) { return tern__float(u >> 31 ? u & 0x7FFFFFFFu : ~u); }

/* Rows of p, a block to each: softmax of the visible scores, zeros behind them. */
static __global__ void tern__softmax_rows(int64_t rows, int64_t queries, int64_t keys, float *p, float scale)
{
    TERN__SHARED(float, sums);
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t visible = keys - queries + row % queries + 1;
        float *score = p + row * keys;
        uint32_t seen = 0;
        for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) {
            const uint32_t u = tern__ordered(score[j] * scale);
            seen = u > seen ? u : seen;
        }
        const float largest = tern__unordered(tern__block_max(seen, (uint32_t *)sums));
        const auto power = [&](int64_t j) { return tern__exp(score[j] * scale - largest); };
        const float sum = tern__block_sum(visible, power, sums);
        for (int64_t j = threadIdx.x; j < keys; j += blockDim.x) score[j] = j < visible ? power(j) / sum : 0.0f;
    }
}

/* <dy, y> of every query and head, in the first column of its dq, which is written later. */
static __global__ void tern__attention_deltas(tern_attention_args a)
{
    TERN__EACH(i, a.batch * a.queries * a.heads) {
        float delta = 0.0f;
        for (int64_t j = i * a.dim; j < (i + 1) * a.dim; j++) delta = delta + a.dy[j] * a.y[j];
        a.dq[i / a.heads * a.q_stride + i % a.heads * a.dim] = delta;
    }
}

/* The matrices of an attention, whose items are all heads of all sequences. Key heads are shared. */
typedef struct tern__attention { int64_t width, shared; tern__steps q, k, v, y, p; float scale; } tern__attention;

static tern__attention tern__attention_of(const tern_attention_args *a)
{
    tern__attention t;
    t.width = (int64_t)a->heads * a->dim;
    t.shared = a->heads / a->kv_heads;
    t.q = tern__steps_of(a->queries * a->q_stride, a->dim, 1);
    t.k = tern__steps_of(a->keys * a->k_stride, a->dim, t.shared);
    t.v = tern__steps_of(a->keys * a->v_stride, a->dim, t.shared);
    t.y = tern__steps_of(a->queries * t.width, a->dim, 1);
    t.p = tern__steps_of(a->heads * a->queries * a->keys, a->queries * a->keys, 1);
    t.scale = 1.0f / tern__sqrt((float)a->dim);
    return t;
}

/* Every head of every sequence, or one of those that share a key head. */
static void tern__all_heads(const tern_attention_args *a, tern__product *g)
{
    g->heads = a->heads;
    g->items = a->batch * a->heads;
    g->head_step = 1;
}
static void tern__one_head_each(const tern_attention_args *a, const tern__attention *t, int64_t head, tern__product *g)
{
    g->heads = a->kv_heads;
    g->items = a->batch * a->kv_heads;
    g->head_step = (int)t->shared;
    g->first_head = (int)head;
    g->add = head > 0;
}

static tern_result tern__attention_run(tern_run *r, const tern__gpu *d, const tern_attention_args *a, const tern__attention *t)
{
    tern__product g = tern__product_of(a->queries, a->keys, a->dim, tern__strided_of(a->q, 1, a->q_stride, t->q), a->p, a->keys, t->p);
    const int64_t rows = a->batch * a->heads * a->queries;
    const int threads = a->keys <= TERN__BLOCK ? 32 : TERN__THREADS;
    tern__all_heads(a, &g);
    g.visible = a->keys - a->queries + 1;
    TERN__TRY(tern__gpu_product<false>(r, d, "attention", g, tern__b_floats_of(a->k, 1, a->k_stride, t->k)));
    TERN__LAUNCH(tern__softmax_rows, tern__grid(d, rows, 1), threads, TERN__BLOCK * sizeof(float), d->stream, rows, a->queries, a->keys, a->p, t->scale);
    g = tern__product_of(a->queries, a->dim, a->keys, tern__strided_of(a->p, 1, a->keys, t->p), a->y, t->width, t->y);
    tern__all_heads(a, &g);
    return tern__gpu_product<false>(r, d, "attention", g, tern__b_floats_of(a->v, a->v_stride, 1, t->v));
}

/* dk = dS^T q, or dv = P^T dy: heads that share a key head add to it in order. */
static tern_result tern__attention_keys(tern_run *r, const tern__gpu *d, const tern_attention_args *a, const tern__attention *t, const tern__b_floats &b,
                                        float *c, int64_t c_row, tern__steps c_steps)
{
    for (int64_t head = 0; head < t->shared; head++) {
        tern__product g = tern__product_of(a->keys, a->dim, a->queries, tern__strided_of(a->p, a->keys, 1, t->p), c, c_row, c_steps);
        tern__one_head_each(a, t, head, &g);
        TERN__TRY(tern__gpu_product<true>(r, d, "attention", g, b));
    }
    return TERN_OK;
}

/* dV = P^T dY; dS = P (dY V^T - <dy, y>) / sqrt(dim), in place of P; dQ = dS K; dK = dS^T Q. */
static tern_result tern__attention_back(tern_run *r, const tern__gpu *d, const tern_attention_args *a, const tern__attention *t)
{
    tern__product g = tern__product_of(a->queries, a->keys, a->dim, tern__strided_of(a->dy, 1, t->width, t->y), a->p, a->keys, t->p);
    const int64_t deltas = a->batch * a->queries * a->heads;
    tern__all_heads(a, &g);
    g.delta = a->dq;
    g.delta_row = a->q_stride;
    g.delta_steps = t->q;
    g.factor = t->scale;
    TERN__TRY(tern__attention_keys(r, d, a, t, tern__b_floats_of(a->dy, t->width, 1, t->y), a->dv, a->v_stride, t->v));
    TERN__LAUNCH(tern__attention_deltas, tern__grid(d, deltas, TERN__THREADS), TERN__THREADS, 0, d->stream, *a);
    TERN__TRY(tern__gpu_product<true>(r, d, "attention", g, tern__b_floats_of(a->v, 1, a->v_stride, t->v)));
    g = tern__product_of(a->queries, a->dim, a->keys, tern__strided_of(a->p, 1, a->keys, t->p), a->dq, a->q_stride, t->q);
    tern__all_heads(a, &g);
    TERN__TRY(tern__gpu_product<true>(r, d, "attention", g, tern__b_floats_of(a->k, a->k_stride, 1, t->k)));
    return tern__attention_keys(r, d, a, t, tern__b_floats_of(a->q, a->q_stride, 1, t->q), a->dk, a->k_stride, t->k);
}

static tern_result tern__gpu_attention(tern_run *r, tern__gpu *d, const tern_attention_args *a)
{
    const tern__attention t = tern__attention_of(a);
    TERN__TRY(tern__check_row(r, "attention", a->keys));
    return a->dy ? tern__attention_back(r, d, a, &t) : tern__attention_run(r, d, a, &t);
}

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
