/*
ternary_cuda.cu - the CUDA backend of ternary.h

    nvcc -O3 -std=c++17 -arch=native -fmad=false -c ternary_cuda.cu        (or: make cuda, for every architecture)
                        (on an H100 or H200 -arch=sm_90a: native is sm_90, which has no wgmma and is slower with many tokens)
    cc program.c ternary_cuda.o -L/usr/local/cuda/lib64 -lcudart -lstdc++ -pthread

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
#if defined(__CUDACC__) && defined(__GNUC__) && !defined(__clang__) /* -fmad=false speaks of the GPU; this, of the host */
#pragma nv_diag_suppress 1675 /* nvcc hands on what it does not know */
#pragma GCC optimize("fp-contract=off")
#pragma nv_diag_default 1675
#endif
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
#define TERN__LAUNCH_TOGETHER(kernel, grid, block, shared_bytes, stream, ...) \
    tern__launch_together(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define TERN__SHARED(type, name)                                    \
    extern __shared__ __align__(1024) unsigned char tern__shared[]; \
    type *const name = reinterpret_cast<type *>(tern__shared)

/* d += a b; a is 16 x 32 int8 by rows, b 32 x 8 by columns. Lane 4g + t holds rows g and g + 8 (of a and d) in registers
   0, 2 and 1, 3 of a, inputs 4t to 4t + 3 in the first two and 16 more in the others, column g of b with the same
   inputs, and columns 2t and 2t + 1 of d. */
static __device__ __forceinline__ void tern__mma_s8(int d[4], const uint32_t a[4], const uint32_t b[2])
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 4; i++) /* a quarter of a each */
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
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

static __device__ __forceinline__ uint32_t tern__shared_address(const void *shared) { return (uint32_t)__cvta_generic_to_shared(shared); }

/* Copies of 16 bytes from global to shared memory that a thread requests, closes as a group and waits for, until at
   most Pending groups are under way. The least architecture copies at once. */
static __device__ __forceinline__ void tern__cp_async16(void *shared, const void *global)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(tern__shared_address(shared)), "l"(global) : "memory");
#else
    *(uint4 *)shared = *(const uint4 *)global;
#endif
}
/* Without a branch; zeros if there is nothing to copy. */
static __device__ __forceinline__ void tern__cp_async16_or_zero(void *shared, const void *global, bool there)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        : : "r"(tern__shared_address(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
#else
    *(uint4 *)shared = there ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
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

/* A launch whose blocks are all there at once, or an error. */
template <typename... Parameters>
static void tern__launch_together(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                                  Parameters... parameters)
{
    void *each[] = {&parameters...};
    cudaLaunchCooperativeKernel((const void *)kernel, grid, block, each, shared_bytes, stream); /* an error stays with the runtime */
}

/* __syncthreads for all blocks of such a launch. word: of device memory, zero once; each barrier flips its highest bit and
   leaves the others zero. */
static __device__ __forceinline__ void tern__grid_barrier(unsigned *word)
{
    const unsigned flip = 0x80000000u;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const unsigned before = atomicAdd(word, blockIdx.x == 0 ? flip - (gridDim.x - 1) : 1);
        while (((*(volatile unsigned *)word ^ before) & flip) == 0) {}
        __threadfence();
    }
    __syncthreads();
}

/* Only code for sm_90a itself has the following: elsewhere they do nothing, and TERN__HAS_WGMMA says so. */
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define TERN__HAS_WGMMA 1
#define TERN__SM90A(...) asm volatile(__VA_ARGS__)
#else
#define TERN__HAS_WGMMA 0
#define TERN__SM90A(...) (void)0
#endif

/* What this thread has written to shared memory, and its copies that it has waited for, may be multiplied by tern__wgmma_s8. */
static __device__ __forceinline__ void tern__wgmma_publish() { TERN__SM90A("fence.proxy.async.shared::cta;" : : : "memory"); }

/* d += a b by a warpgroup, four warps from a multiple of four on; a is 64 x 32 int8 by rows, of which a warp has 16, in registers as
   those of tern__mma_s8; so has d for each eight of its 8 Tiles columns. b: tern__wgmma_tile. Under way until waited for: then
   alone may a, d and b be touched. Before it, a fence: behind it neither a nor d was written but by products. */
#define TERN__REGISTERS(d) "+r"((d)[0]), "+r"((d)[1]), "+r"((d)[2]), "+r"((d)[3])
#define TERN__REGISTERS32(d, i)                                                                                                   \
    TERN__REGISTERS(d[i]), TERN__REGISTERS(d[i + 1]), TERN__REGISTERS(d[i + 2]), TERN__REGISTERS(d[i + 3]),                       \
    TERN__REGISTERS(d[i + 4]), TERN__REGISTERS(d[i + 5]), TERN__REGISTERS(d[i + 6]), TERN__REGISTERS(d[i + 7])
#define TERN__NAMES32                                                                                                             \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
static __device__ __forceinline__ void tern__wgmma_s8(int (&d)[8][4], const uint32_t (&a)[4], uint64_t b)
{
    TERN__SM90A("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" TERN__NAMES32 "}, {%32,%33,%34,%35}, %36, 1;"
        : TERN__REGISTERS32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
static __device__ __forceinline__ void tern__wgmma_s8(int (&d)[16][4], const uint32_t (&a)[4], uint64_t b)
{
    TERN__SM90A("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" TERN__NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
        "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1;"
        : TERN__REGISTERS32(d, 0), TERN__REGISTERS32(d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* The compiler, too, must have written registers before the fence, and must not read them before the wait. */
template <int Tiles> static __device__ __forceinline__ void tern__wgmma_pin(int (&d)[Tiles][4])
{
#pragma unroll
    for (int i = 0; i < Tiles; i++) TERN__SM90A("" : TERN__REGISTERS(d[i]) : : "memory");
}
template <int Products, int Tiles>
static __device__ __forceinline__ void tern__wgmma_fence(uint32_t (&a)[Products][4], int (&d)[Products][Tiles][4])
{
#pragma unroll
    for (int i = 0; i < Products; i++) {
        TERN__SM90A("" : TERN__REGISTERS(a[i]) : : "memory");
        tern__wgmma_pin(d[i]);
    }
    TERN__SM90A("wgmma.fence.sync.aligned;" : : : "memory");
}

/* Products form groups; a warp waits until at most Pending groups of its own are under way. */
static __device__ __forceinline__ void tern__wgmma_commit() { TERN__SM90A("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <unsigned Pending, int Products, int Tiles> static __device__ __forceinline__ void tern__wgmma_wait(int (&d)[Products][Tiles][4])
{
    TERN__SM90A("wgmma.wait_group.sync.aligned %0;" : : "n"(Pending) : "memory");
#pragma unroll
    for (int i = 0; i < Products; i++) tern__wgmma_pin(d[i]);
}
#undef TERN__REGISTERS
#undef TERN__REGISTERS32
#undef TERN__NAMES32
#undef TERN__SM90A
#endif

/* b of tern__wgmma_s8: 32 inputs of 8 Tiles columns. A column is 128 bytes, from a multiple of 1024 on; of its eight pieces of 16
   bytes piece i lies at i ^ column % 8. Inputs from 32 k on: + 2 k. The words: where it begins, how far apart lie eights of
   columns, both in 16 bytes, and that pieces change places. */
static __device__ __forceinline__ uint64_t tern__wgmma_tile(const void *shared)
{
    return (uint64_t)(tern__shared_address(shared) >> 4 & 0x3FFF) | (uint64_t)(8 * 128 >> 4) << 32 | (uint64_t)1 << 62;
}

#define TERN__ALL_LANES 0xFFFFFFFFu

static __device__ uint32_t tern__lanes_below(int lane) { return (1u << lane) - 1; }

/* The last i below n for which begun(i) holds, as it does from 0 up to there; 0 where there is none. */
template <typename Begun> static __device__ __forceinline__ int64_t tern__last_at(int64_t n, Begun begun)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const int64_t middle = high - (high - low) / 2;
        if (begun(middle)) low = middle;
        else high = middle - 1;
    }
    return low;
}

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
    X(ALPHA,  TERN_E_NONFINITE, "ternarize: alpha[%d] is not a finite number below 2^96; its grain was taken as zero") \
    X(TRIT,   TERN_E_TRIT,      "pack: trits[%d][%d] is not -1, 0 or 1 and was taken as zero")                          \
    X(CODE,   TERN_E_TRIT,      "unpack: row %d has an invalid code (2-bit code 3 or base-3 byte above 242) and was taken as zero") \
    X(CAST,   TERN_E_NONFINITE, "cast: element %d is not finite and was taken as zero")
#define TERN__ENUM(name, code, text) TERN__REFUSED_##name,
enum { TERN__REFUSED_BEFORE = TERN__FAULTS_END - 1, TERN__REFUSALS(TERN__ENUM) TERN__REFUSALS_END };
#undef TERN__ENUM

/* The first fault since tern_sync is the smallest key: order of the operation (16 bits), kind (5), index (43 bits; of
   a weight or trit, row in 25 and column in 18). */
enum { TERN__INDEX_BITS = 43, TERN__COLUMN_BITS = 18, TERN__KIND_BITS = 5 };
static_assert((int)TERN__REFUSALS_END <= 1 << TERN__KIND_BITS, "every kind has a number");
typedef unsigned long long tern__key;
static const tern__key tern__no_fault = ~(tern__key)0;

typedef struct tern__gpu {
    int device, processors;
    int wgmma; /* whether the code that runs here has it */
    cudaStream_t stream;
    tern__key *fault; /* on the device, */
    float *work;      /* as this */
    unsigned *meet;   /* and this, where blocks that are launched together wait; NULL where the device has no such launches */
    bool mixtures;    /* whether a mixture can be one of these */
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
    if (result == TERN_OK) return tern__cuda_check(r, error, "choosing the caller's device again");
    cudaGetLastError(); /* what has failed is known */
    return result;
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
    TERN__REQUIRE(r, cols <= TERN__LONGEST_ROW, TERN_E_UNSUPPORTED,
                  "cuda: %s: rows of %d; %d is the most", op, cols, (int64_t)TERN__LONGEST_ROW);
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

/* Up to 1024 terms, by a warp: lanes i and i + 32 of the rule are one thread's, the rest of the tree is a butterfly. Where
   there are eight more terms no branch parts them, so that their loads are under way together. */
template <typename Term> static __device__ float tern__warp_sum(int n, Term term)
{
    float low = 0.0f, high = 0.0f;
    int i = (int)(threadIdx.x % 32);
    for (; i + 7 * 32 < n; i += 8 * 32) {
        float x[8];
        for (int j = 0; j < 8; j++) x[j] = term(i + 32 * j);
        for (int j = 0; j < 8; j += 2) {
            low = low + x[j];
            high = high + x[j + 1];
        }
    }
    for (; i < n; i += 64) {
        low = low + term(i);
        if (i + 32 < n) high = high + term(i + 32);
    }
    low = low + high;
    for (int half = 16; half > 0; half /= 2) low = low + __shfl_xor_sync(TERN__ALL_LANES, low, half);
    return low;
}

/* A canonical sum of up to 2^20 terms, by a warp; sums: shared memory for a float to each 1024 of them. */
template <typename Term> static __device__ float tern__warp_long_sum(int64_t n, Term term, float *sums)
{
    const int blocks = (int)tern__ceil_div(n, TERN__BLOCK);
    if (blocks == 1) return tern__warp_sum((int)n, [&](int i) { return term((int64_t)i); });
    for (int b = 0; b < blocks; b++) {
        const int64_t first = (int64_t)b * TERN__BLOCK;
        const float sum = tern__warp_sum((int)tern__min(TERN__BLOCK, n - first), [&](int i) { return term(first + i); });
        if (threadIdx.x % 32 == 0) sums[b] = sum;
    }
    __syncwarp();
    const float total = tern__warp_sum(blocks, [&](int i) { return sums[i]; });
    __syncwarp(); /* sums may be written again */
    return total;
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

/* The sum and the largest of a warp's values, in all lanes. */
static __device__ int tern__warp_count(int n)
{
    for (int half = 16; half > 0; half /= 2) n += __shfl_xor_sync(TERN__ALL_LANES, n, half);
    return n;
}
static __device__ uint32_t tern__warp_most(uint32_t value)
{
    for (int half = 16; half > 0; half /= 2) {
        const uint32_t other = __shfl_xor_sync(TERN__ALL_LANES, value, half);
        value = other > value ? other : value;
    }
    return value;
}

/* The same of all threads' values, in all threads; seen: shared memory for a word to each warp. */
static __device__ uint32_t tern__block_max(uint32_t value, uint32_t *seen)
{
    const int warps = (int)blockDim.x / 32;
    value = tern__warp_most(value);
    if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = value;
    __syncthreads();
    for (int i = 0; i < warps; i++) value = seen[i] > value ? seen[i] : value;
    __syncthreads();
    return value;
}

/* Words in the order of the floats; NaN are at the ends. */
static __device__ uint32_t tern__to_rank(float x) { return tern__bits(x) >> 31 ? ~tern__bits(x) : tern__bits(x) | 0x80000000u; }
static __device__ float tern__from_rank(uint32_t rank) { return tern__float(rank >> 31 ? rank & 0x7FFFFFFFu : ~rank); }

/* Who shares a row: a block of threads, or a warp of it. */
struct tern__block_team {
    static __device__ int thread() { return (int)threadIdx.x; }
    static __device__ int threads() { return (int)blockDim.x; }
    static __device__ void sync() { __syncthreads(); }
    template <typename Term> static __device__ float sum(int64_t n, Term term, float *room) { return tern__block_sum(n, term, room); }
    static __device__ uint32_t most(uint32_t mine, float *room) { return tern__block_max(mine, (uint32_t *)room); }
};
struct tern__warp_team {
    static __device__ int thread() { return (int)threadIdx.x % 32; }
    static __device__ int threads() { return 32; }
    static __device__ void sync() { __syncwarp(); }
    template <typename Term> static __device__ float sum(int64_t n, Term term, float *room) { return tern__warp_long_sum(n, term, room); }
    static __device__ uint32_t most(uint32_t mine, float *) { return tern__warp_most(mine); }
};

/* Bits of the largest |term|, in all threads of a team: NaN and Inf win. */
template <typename Team, typename Term> static __device__ uint32_t tern__team_absmax(int64_t n, Term term, float *room)
{
    uint32_t most = 0;
    for (int64_t i = Team::thread(); i < n; i += Team::threads()) {
        const uint32_t mine = tern__bits(term(i)) & 0x7FFFFFFFu;
        most = mine > most ? mine : most;
    }
    return Team::most(most, room);
}
template <typename Term> static __device__ uint32_t tern__block_absmax(int64_t n, Term term, uint32_t *seen)
{
    return tern__team_absmax<tern__block_team>(n, term, (float *)seen);
}

static __device__ float tern__term(int kind, float x) { return kind == TERN_SUM ? x : kind == TERN_SUM_ABS ? tern__abs(x) : x * x; }

/* Sums of blocks of 1024, a warp to a block. */
static __global__ void tern__sum_blocks(int kind, int64_t n, tern_type type, const void *x, float *sums)
{
    const int64_t warps = (int64_t)gridDim.x * TERN__WARPS;
    for (int64_t b = (int64_t)blockIdx.x * TERN__WARPS + threadIdx.x / 32; b < tern__ceil_div(n, TERN__BLOCK); b += warps) {
        const int64_t first = b * TERN__BLOCK;
        const float sum = tern__warp_sum((int)tern__min(TERN__BLOCK, n - first),
                                         [&](int i) { return tern__term(kind, tern__load_float(type, x, first + i)); });
        if (threadIdx.x % 32 == 0) sums[b] = sum;
    }
}

/* The last block, by one warp: y = (add ? y : 0) + sum. */
static __global__ void tern__sum_last(int kind, int n, tern_type type, const void *x, float *y, int add)
{
    const float sum = tern__warp_sum(n, [&](int i) { return tern__term(kind, tern__load_float(type, x, i)); });
    if (threadIdx.x == 0) *y = add ? *y + sum : sum;
}

/* A sum of up to 2^30 numbers, level by level; sums: room for a float to each 1024 of x, and to each 1024 of those. */
static void tern__gpu_total(const tern__gpu *d, int kind, int64_t n, tern_type type, const void *x, float *sums, float *y, int add)
{
    while (n > TERN__BLOCK) {
        const int64_t blocks = tern__ceil_div(n, TERN__BLOCK);
        TERN__LAUNCH(tern__sum_blocks, tern__grid(d, blocks, TERN__WARPS), TERN__THREADS, 0, d->stream, kind, n, type, x, sums);
        x = sums;
        type = TERN_F32;
        sums += blocks;
        n = blocks;
        kind = TERN_SUM;
    }
    TERN__LAUNCH(tern__sum_last, 1, 32, 0, d->stream, kind, (int)n, type, x, y, add);
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-4] Ternarize and pack
   What enters: floats or trits. What leaves: scales, and panels in the layout of [TERN-8].
   ------------------------------------------------------------------------------------------------ */

/* Ternarize goes patch by patch: some rows of a panel and some of its groups, few enough that the weights, read once for
   the sums, are still in the L1 and L2 caches when they are read again for the trits. */
enum { TERN__PATCH_THREADS = 512, TERN__PATCH_WARPS = TERN__PATCH_THREADS / 32, TERN__PATCH_SUMS = 256, TERN__PATCH_BYTES = 1 << 16 };

typedef struct tern__patches {
    tern_ternarize_args a;
    tern__shape s;
    int32_t rows, groups;   /* of a patch: a power of two up to 16; more than one only beside 16 rows */
    int32_t blocks, units;  /* of a group, at most: sums of 1024 weights, and inputs */
    int64_t across, count;  /* patches beside each other, and all */
    tern__blame weight, scale, alpha;
} tern__patches;

/* Grains of a patch lie row by row, group after group; a block's sum follows its neighbour's. */
typedef struct tern__patch {
    float sum[TERN__PATCH_SUMS], total[TERN__PATCH_SUMS], delta[TERN__PATCH_SUMS];
    int32_t above[TERN__PATCH_SUMS], count[TERN__PATCH_SUMS];
} tern__patch;

/* The statistics of a grain that is the tensor. */
typedef struct tern__tensor { float total, delta, mean, threshold; unsigned long long count; } tern__tensor;

static tern__patches tern__patches_of(const tern__gpu *d, const tern_ternarize_args *a)
{
    tern__patches p;
    p.a = *a;
    p.s = tern__shape_of(&a->m);
    const int64_t cols = tern__group_cols(&a->m, &p.s, 0), bytes = cols * tern__type_bytes(a->type);
    p.blocks = (int32_t)tern__ceil_div(cols, TERN__BLOCK);
    p.units = (int32_t)tern__group_run(&a->m, &p.s, 0);
    p.rows = TERN__ROWS;
    while (p.rows > 1 && (p.rows * p.blocks > TERN__PATCH_SUMS || p.rows * bytes > TERN__PATCH_BYTES)) p.rows /= 2;
    p.groups = (int32_t)tern__min(p.s.groups, tern__min(TERN__PATCH_SUMS / (p.rows * p.blocks), TERN__PATCH_BYTES / (p.rows * bytes)));
    if (p.rows < TERN__ROWS || p.groups < 1) p.groups = 1;
    p.across = tern__ceil_div(p.s.groups, p.groups);
    p.count = p.s.panels * (TERN__ROWS / p.rows) * p.across;
    p.weight = tern__blame_of(d, TERN__REFUSED_WEIGHT);
    p.scale = tern__blame_of(d, TERN__REFUSED_SCALE);
    p.alpha = tern__blame_of(d, TERN__REFUSED_ALPHA);
    return p;
}

static __device__ int64_t tern__patch_row(const tern__patches &p, int64_t patch, int grain)
{
    return patch / p.across * p.rows + grain % p.rows;
}
static __device__ int64_t tern__patch_group(const tern__patches &p, int64_t patch, int grain)
{
    return patch % p.across * p.groups + grain / p.rows;
}

/* The bad ones of n weights from a row and column. */
template <tern_type Type> static __device__ void tern__report_weights(const tern__patches &p, int64_t row, int64_t col, int n)
{
    for (int j = (int)(threadIdx.x % 32); j < n; j += 32)
        if (!tern__weight_ok(tern__load_float(Type, p.a.w, row * p.a.m.cols + col + j))) tern__report_at(p.weight, row, col + j);
}

/* The largest of up to 1024 terms that are not negative, by a warp; NaN is larger than all. */
template <typename Term> static __device__ float tern__warp_max(int n, Term term)
{
    uint32_t bits = 0;
    for (int i = (int)(threadIdx.x % 32); i < n; i += 32) {
        const uint32_t mine = tern__bits(term(i));
        bits = mine > bits ? mine : bits;
    }
    return tern__float(tern__warp_most(bits));
}

/* Canonical sum (SEQ: the largest), by a warp, of up to 1024 |w| above delta, counted; NaN where a weight is bad. */
template <tern_type Type>
static __device__ float tern__sum_weights(const tern__patches &p, int64_t row, int64_t col, int n, float delta, int *above)
{
    const int64_t first = row * p.a.m.cols + col;
    int count = 0;
    const auto term = [&](int j) {
        const float w = tern__load_float(Type, p.a.w, first + j);
        const bool larger = tern__abs(w) > delta;
        count += larger;
        return !tern__weight_ok(w) ? tern__float(0x7FC00000u) : larger ? tern__abs(w) : 0.0f;
    };
    const float sum = p.a.rule == TERN_SEQ ? tern__warp_max(n, term) : tern__warp_sum(n, term);
    *above = tern__warp_count(count);
    if (sum != sum) tern__report_weights<Type>(p, row, col, n);
    return sum;
}

/* Fills total and count from delta. Beyond the matrix there are zeros. */
template <tern_type Type> static __device__ void tern__patch_totals(const tern__patches &p, int64_t patch, tern__patch *my)
{
    const int grains = p.rows * p.groups, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    for (int i = warp; i < grains * p.blocks; i += TERN__PATCH_WARPS) {
        const int grain = i / p.blocks;
        const int64_t row = tern__patch_row(p, patch, grain), g = tern__patch_group(p, patch, grain);
        const int64_t in = (int64_t)(i % p.blocks) * TERN__BLOCK, col = g * p.s.group + in;
        const int64_t left = row < p.a.m.rows && g < p.s.groups ? tern__group_cols(&p.a.m, &p.s, g) - in : 0;
        int above = 0;
        float sum = 0.0f;
        if (left > 0) sum = tern__sum_weights<Type>(p, row, col, (int)tern__min(TERN__BLOCK, left), my->delta[grain], &above);
        if (lane == 0) {
            my->sum[i] = sum;
            my->above[i] = above;
        }
    }
    __syncthreads();
    for (int grain = warp; grain < grains; grain += TERN__PATCH_WARPS) {
        const float *sum = my->sum + grain * p.blocks;
        const auto block = [&](int i) { return sum[i]; };
        const float total = p.blocks == 1 ? *sum : p.a.rule == TERN_SEQ ? tern__warp_max(p.blocks, block) : tern__warp_sum(p.blocks, block);
        int count = 0;
        for (int i = lane; i < p.blocks; i += 32) count += my->above[grain * p.blocks + i];
        count = tern__warp_count(count);
        if (lane == 0) {
            my->total[grain] = total;
            my->count[grain] = count;
        }
    }
    __syncthreads();
}

static __device__ float tern__mean_of(float total, int64_t count) { return count ? total / (float)count : 0.0f; }

/* The threshold of a grain. One with a bad weight or scale has scale 0, as padding has, and no trits. */
static __device__ float tern__patch_settle(const tern__patches &p, int64_t row, int64_t g, float mean, float above)
{
    const tern_matrix *m = &p.a.m;
    const int64_t at = tern__scale_index(m, &p.s, row, g);
    const bool learned = tern__is_learned(p.a.rule) && row < m->rows;
    const float given = p.a.rule == TERN_GIVEN ? tern__load_scale(m->scale_type, m->scales, at) : learned ? p.a.alpha[at] : 0.0f;
    const bool good = tern__weight_ok(given) && (learned || given >= 0.0f);
    if (!good) tern__report(learned ? p.alpha : p.scale, at);
    if (good && mean == mean && row < m->rows) return tern__settle_grain(&p.a, at, mean, above);
    tern__store_scale(m->scale_type, m->scales, at, 0.0f);
    return tern__float(0x7F800000u);
}

/* Scales of a patch, and thresholds in place of delta. */
template <tern_type Type> static __device__ void tern__patch_thresholds(const tern__patches &p, int64_t patch, tern__patch *my)
{
    const int grain = (int)threadIdx.x;
    const int64_t row = tern__patch_row(p, patch, grain), g = tern__patch_group(p, patch, grain);
    const bool mine = grain < p.rows * p.groups && g < p.s.groups;
    const int passes = p.a.rule == TERN_TWN ? 2 : 1;
    float mean = 0.0f, above = 0.0f;
    for (int pass = 0; pass < passes; pass++) {
        if (mine) my->delta[grain] = pass ? tern__twn_delta(mean) : -1.0f;
        __syncthreads();
        tern__patch_totals<Type>(p, patch, my);
        if (mine) above = p.a.rule == TERN_SEQ ? my->total[grain] : tern__mean_of(my->total[grain], my->count[grain]);
        if (pass == 0) mean = above;
    }
    if (mine) my->delta[grain] = tern__patch_settle(p, row, g, mean, above);
    __syncthreads();
}

/* Four weights from element i, of which n are there; where they lie together, in one load. */
template <tern_type Type> static __device__ void tern__load_four(const void *w, int64_t i, int64_t n, float x[4])
{
    const uint8_t *at = (const uint8_t *)w + i * tern__type_bytes(Type);
    if (n < 4 || (uintptr_t)at % (uintptr_t)(4 * tern__type_bytes(Type)) != 0)
        for (int j = 0; j < 4; j++) x[j] = j < n ? tern__load_float(Type, w, i + j) : 0.0f;
    else if (Type == TERN_F32) {
        const float4 v = *(const float4 *)at;
        x[0] = v.x; x[1] = v.y; x[2] = v.z; x[3] = v.w;
    } else {
        const uint2 v = *(const uint2 *)at;
        const uint16_t half[4] = {(uint16_t)v.x, (uint16_t)(v.x >> 16), (uint16_t)v.y, (uint16_t)(v.y >> 16)};
        for (int j = 0; j < 4; j++) x[j] = tern__load_float(Type, half, j);
    }
}

/* n bytes, at most 4 (of a load: and zeros after them); four where they lie together. */
static __device__ __forceinline__ void tern__load_bytes(const int8_t *p, int n, int8_t x[4])
{
    uint32_t four = 0;
    if (n == 4 && (uintptr_t)p % 4 == 0) four = *(const uint32_t *)(const void *)p;
    else for (int k = 0; k < 4; k++) if (k < n) four |= (uint32_t)(uint8_t)p[k] << 8 * k;
    for (int k = 0; k < 4; k++) x[k] = (int8_t)(four >> 8 * k);
}
static __device__ __forceinline__ void tern__store_bytes(int8_t *p, int n, const int8_t x[4])
{
    if (n == 4 && (uintptr_t)p % 4 == 0)
        *(uint32_t *)(void *)p = (uint32_t)(uint8_t)x[0] | (uint32_t)(uint8_t)x[1] << 8 | (uint32_t)(uint8_t)x[2] << 16
                                 | (uint32_t)(uint8_t)x[3] << 24;
    else for (int k = 0; k < 4; k++) if (k < n) p[k] = x[k];
}

/* A row's word of a unit; four(i, t) gives the trits of inputs i to i + 3. */
template <typename Four> static __device__ uint32_t tern__pack_word(tern_type encoding, Four four)
{
    int8_t t[20];
    uint32_t word = 0;
    for (int i = 0; i < 20; i += 4) four(i, t + i);
    for (int j = 0; j < 4; j++) word |= (uint32_t)tern__pack_byte(encoding, t + j) << 8 * j;
    return word;
}

static __device__ uint32_t *tern__word_of(const tern_matrix *m, const tern__shape *s, int64_t row, int64_t unit)
{
    return (uint32_t *)((uint8_t *)m->trits + row / TERN__ROWS * s->panel_bytes + unit * TERN__UNIT) + row % TERN__ROWS;
}

/* Trits from the thresholds in delta: a thread to a row of a unit. */
template <tern_type Type> static __device__ void tern__patch_pack(const tern__patches &p, int64_t patch, const tern__patch *my)
{
    const tern_matrix *m = &p.a.m;
    for (int i = (int)threadIdx.x; i < p.rows * p.groups * p.units; i += TERN__PATCH_THREADS) {
        const int u = i / p.rows % p.units, grain = i / p.rows / p.units * p.rows + i % p.rows;
        const int64_t row = tern__patch_row(p, patch, grain), g = tern__patch_group(p, patch, grain);
        const int64_t in = u * p.s.unit, left = g < p.s.groups ? tern__group_cols(m, &p.s, g) - in : 0;
        const int64_t n = row < m->rows ? tern__min(left, p.s.unit) : 0, first = row * m->cols + g * p.s.group + in;
        const float threshold = my->delta[grain];
        if (left <= 0) continue;
        const float scale = p.a.noise > 0.0f ? tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, &p.s, row, g)) : 0.0f;
        *tern__word_of(m, &p.s, row, g * p.s.group_units + u) = tern__pack_word(m->encoding, [&](int j, int8_t *t) {
            float x[4];
            tern__load_four<Type>(p.a.w, first + j, n - j, x);
            for (int k = 0; k < 4 && j + k < n && p.a.noise > 0.0f; k++) x[k] = tern__decisive(&p.a, first + j + k, x[k], scale, threshold);
            for (int k = 0; k < 4; k++) t[k] = (int8_t)((x[k] > threshold) - (x[k] < -threshold));
        });
    }
}

/* tensor: its threshold is known. */
template <tern_type Type>
static __global__ void __launch_bounds__(TERN__PATCH_THREADS, 2) tern__ternarize_patches(tern__patches p, const tern__tensor *tensor)
{
    TERN__SHARED(tern__patch, my);
    for (int64_t patch = blockIdx.x; patch < p.count; patch += gridDim.x) {
        if (!tensor) tern__patch_thresholds<Type>(p, patch, my);
        else if (threadIdx.x < TERN__ROWS) my->delta[threadIdx.x] = tensor->threshold;
        __syncthreads();
        tern__patch_pack<Type>(p, patch, my);
        __syncthreads(); /* my may be written again */
    }
}

/* Row sums above the tensor's delta, and their count. */
template <tern_type Type>
static __global__ void __launch_bounds__(TERN__PATCH_THREADS, 2) tern__tensor_rows(tern__patches p, tern__tensor *tensor, float *sums)
{
    TERN__SHARED(tern__patch, my);
    for (int64_t patch = blockIdx.x; patch < p.count; patch += gridDim.x) {
        const int grain = (int)threadIdx.x;
        const int64_t row = tern__patch_row(p, patch, grain);
        if (grain < p.rows) my->delta[grain] = tensor->delta;
        __syncthreads();
        tern__patch_totals<Type>(p, patch, my);
        if (grain < p.rows && row < p.a.m.rows) {
            sums[row] = my->total[grain];
            atomicAdd(&tensor->count, (unsigned long long)my->count[grain]);
        }
        __syncthreads(); /* my may be written again */
    }
}

/* What lies between two passes over a tensor: before the first, between mean and TWN's mean, after the last. */
enum { TERN__TENSOR_BEGIN, TERN__TENSOR_MEAN, TERN__TENSOR_END };
static __global__ void tern__tensor_step(tern__patches p, tern__tensor *t, int step)
{
    const float mean = step == TERN__TENSOR_BEGIN ? 0.0f : tern__mean_of(t->total, (int64_t)t->count);
    if (step == TERN__TENSOR_END) t->threshold = tern__patch_settle(p, 0, 0, p.a.rule == TERN_TWN ? t->mean : mean, mean);
    t->delta = step == TERN__TENSOR_BEGIN ? -1.0f : tern__twn_delta(mean);
    t->mean = mean;
    t->count = 0;
}

template <tern_type Type> static void tern__tensor_total(const tern__gpu *d, const tern__patches &p, tern__tensor *t)
{
    TERN__LAUNCH((tern__tensor_rows<Type>), tern__grid(d, p.count, 1), TERN__PATCH_THREADS, sizeof(tern__patch), d->stream,
                 p, t, d->work);
    tern__gpu_total(d, TERN_SUM, p.a.m.rows, TERN_F32, d->work, d->work + TERN__WORK, &t->total, 0);
}

/* A block of threads to a panel, a thread to a row of a unit: its word of four bytes, from a column on. */
#define TERN__EACH_WORD(i, s) for (int i = (int)threadIdx.x; i < (int)((s).units * TERN__ROWS); i += TERN__THREADS)

typedef struct tern__word { int64_t row, unit, group, col, inputs; } tern__word;

static __device__ tern__word tern__word_at(const tern_matrix *m, const tern__shape *s, int64_t panel, int i)
{
    tern__word w;
    w.unit = i / TERN__ROWS;
    w.row = panel * TERN__ROWS + i % TERN__ROWS;
    w.group = (int)w.unit / (int)s->group_units;
    const int64_t in = (w.unit - w.group * s->group_units) * s->unit;
    w.col = w.group * s->group + in;
    w.inputs = tern__min(s->unit, tern__group_cols(m, s, w.group) - in);
    return w;
}

/* What is left of the weights of packed trits. */
template <tern_type Type> static __global__ void tern__accum_panels(tern_ternarize_args a, tern__shape s)
{
    for (int64_t panel = blockIdx.x; panel < s.panels; panel += gridDim.x)
        TERN__EACH_WORD(i, s) {
            const tern__word w = tern__word_at(&a.m, &s, panel, i);
            if (w.row >= a.m.rows) continue;
            const float scale = tern__load_scale(a.m.scale_type, a.m.scales, tern__scale_index(&a.m, &s, w.row, w.group));
            const int64_t at = w.row * a.m.cols + w.col;
            int8_t t[20] = {};
            tern__unpack_unit(a.m.encoding, (const uint8_t *)a.m.trits + panel * s.panel_bytes + w.unit * TERN__UNIT, i % TERN__ROWS, t);
            for (int j = 0; j < 20; j += 4) {
                float x[4];
                if (j >= w.inputs) continue;
                tern__load_four<Type>(a.w, at + j, w.inputs - j, x);
                for (int k = 0; k < 4; k++) t[j + k] = tern__left_over(x[k], scale, (float)t[j + k], a.theta);
                tern__store_bytes(a.accum + at + j, (int)tern__min(4, w.inputs - j), t + j);
            }
        }
}

template <tern_type Type> static void tern__ternarize_as(const tern__gpu *d, const tern__patches &p)
{
    tern__tensor *tensor = NULL;
    if (p.a.m.grain == TERN_PER_TENSOR) {
        tensor = (tern__tensor *)(d->work + TERN__WORK + TERN__WORK_LEVELS / 2);
        TERN__LAUNCH(tern__tensor_step, 1, 1, 0, d->stream, p, tensor, (int)TERN__TENSOR_BEGIN);
        tern__tensor_total<Type>(d, p, tensor);
        if (p.a.rule == TERN_TWN) {
            TERN__LAUNCH(tern__tensor_step, 1, 1, 0, d->stream, p, tensor, (int)TERN__TENSOR_MEAN);
            tern__tensor_total<Type>(d, p, tensor);
        }
        TERN__LAUNCH(tern__tensor_step, 1, 1, 0, d->stream, p, tensor, (int)TERN__TENSOR_END);
    }
    TERN__LAUNCH((tern__ternarize_patches<Type>), tern__grid(d, p.count, 1), TERN__PATCH_THREADS, sizeof(tern__patch), d->stream,
                 p, tensor);
    if (p.a.accum) TERN__LAUNCH((tern__accum_panels<Type>), tern__grid(d, p.s.panels, 1), TERN__THREADS, 0, d->stream, p.a, p.s);
}

static tern_result tern__gpu_ternarize(tern_run *r, tern__gpu *d, const tern_ternarize_args *a)
{
    const tern__patches p = tern__patches_of(d, a);
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__REQUIRE(r, a->m.grain != TERN_PER_TENSOR || a->m.rows <= TERN__WORK, TERN_E_UNSUPPORTED,
                  "cuda: ternarize: a grain of %d rows; %d is the most", a->m.rows, (int64_t)TERN__WORK);
    if (a->type == TERN_F16) tern__ternarize_as<TERN_F16>(d, p);
    else if (a->type == TERN_BF16) tern__ternarize_as<TERN_BF16>(d, p);
    else tern__ternarize_as<TERN_F32>(d, p);
    return TERN_OK;
}

static __global__ void tern__pack_panels(tern_pack_args a, tern__shape s, tern__blame blame)
{
    for (int64_t panel = blockIdx.x; panel < s.panels; panel += gridDim.x)
        TERN__EACH_WORD(i, s) {
            const tern__word w = tern__word_at(&a.m, &s, panel, i);
            const int64_t n = w.row < a.m.rows ? w.inputs : 0;
            const int8_t *from = a.trits + w.row * a.m.cols + w.col;
            *tern__word_of(&a.m, &s, w.row, w.unit) = tern__pack_word(a.m.encoding, [&](int j, int8_t *t) {
                tern__load_bytes(from + j, (int)tern__min(4, n - j), t);
                for (int k = 0; k < 4; k++) {
                    const bool good = t[k] >= -1 && t[k] <= 1;
                    if (!good) tern__report_at(blame, w.row, w.col + j + k);
                    if (!good) t[k] = 0;
                }
            });
        }
}

static tern_result tern__gpu_pack(tern_run *r, tern__gpu *d, const tern_pack_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__LAUNCH(tern__pack_panels, tern__grid(d, s.panels, 1), TERN__THREADS, 0, d->stream, *a, s,
                 tern__blame_of(d, TERN__REFUSED_TRIT));
    return TERN_OK;
}

/* n trits, at most 20, and their values, in fours where they lie together. */
static __device__ void tern__store_word(const int8_t t[20], int64_t n, float scale, int8_t *trits, float *values)
{
    for (int i = 0; i < 20; i += 4) {
        const float v[4] = {(float)t[i] * scale, (float)t[i + 1] * scale, (float)t[i + 2] * scale, (float)t[i + 3] * scale};
        const bool full = i + 4 <= n;
        if (trits && full && (uintptr_t)(trits + i) % 4 == 0) memcpy(__builtin_assume_aligned(trits + i, 4), t + i, 4);
        else for (int j = 0; trits && j < 4 && i + j < n; j++) trits[i + j] = t[i + j];
        if (values && full && (uintptr_t)(values + i) % 16 == 0) *(float4 *)(values + i) = make_float4(v[0], v[1], v[2], v[3]);
        else for (int j = 0; values && j < 4 && i + j < n; j++) values[i + j] = v[j];
    }
}

/* Rows of a panel that are asked for: first their codes, then the trits and values of those whose codes are valid. */
static __global__ void tern__unpack_panels(tern_unpack_args a, tern__shape s, tern__blame blame)
{
    TERN__SHARED(int, invalid);
    const int64_t first = a.row / TERN__ROWS, last = (a.row + a.count - 1) / TERN__ROWS;
    for (int64_t panel = first + blockIdx.x; panel <= last; panel += gridDim.x) {
        const uint8_t *at = (const uint8_t *)a.m.trits + panel * s.panel_bytes;
        int8_t t[20] = {0};
        if (threadIdx.x < TERN__ROWS) invalid[threadIdx.x] = 0;
        __syncthreads();
        TERN__EACH_WORD(i, s)
            if (!tern__unpack_unit(a.m.encoding, at + i / TERN__ROWS * TERN__UNIT, i % TERN__ROWS, t))
                invalid[i % TERN__ROWS] = 1;
        __syncthreads();
        TERN__EACH_WORD(i, s) {
            const tern__word w = tern__word_at(&a.m, &s, panel, i);
            const int64_t to = (w.row - a.row) * a.m.cols + w.col;
            float scale = 0.0f;
            if (w.row < a.row || w.row >= a.row + a.count) continue;
            tern__unpack_unit(a.m.encoding, at + w.unit * TERN__UNIT, i % TERN__ROWS, t);
            if (invalid[i % TERN__ROWS]) {
                memset(t, 0, sizeof t);
                if (w.unit == 0) tern__report(blame, w.row);
            } else if (a.values) scale = tern__load_scale(a.m.scale_type, a.m.scales, tern__scale_index(&a.m, &s, w.row, w.group));
            tern__store_word(t, w.inputs, scale, a.trits ? a.trits + to : NULL, a.values ? a.values + to : NULL);
        }
        __syncthreads(); /* invalid may be written again */
    }
}

static tern_result tern__gpu_unpack(tern_run *r, tern__gpu *d, const tern_unpack_args *a)
{
    const int64_t panels = (a->row + a->count - 1) / TERN__ROWS - a->row / TERN__ROWS + 1;
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__LAUNCH(tern__unpack_panels, tern__grid(d, panels, 1), TERN__THREADS, TERN__ROWS * sizeof(int), d->stream, *a,
                 tern__shape_of(&a->m), tern__blame_of(d, TERN__REFUSED_CODE));
    return TERN_OK;
}

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
template <typename Team> static __device__ float tern__rms(int64_t n, const float *x, float eps, float *room)
{
    const float mean = Team::sum(n, [&](int64_t i) { return x[i] * x[i]; }, room) / (float)n;
    return tern__finite(mean) ? 1.0f / tern__sqrt(mean + eps) : 0.0f;
}

/* What q are steps of: the largest |x g|, or for int4 their mean. */
template <typename Team> static __device__ float tern__steps_of(const tern_quantize_args &a, const float *x, float *room)
{
    const int64_t n = a.m.cols;
    const auto term = [&](int64_t i) { return a.gain ? x[i] * a.gain[i] : x[i]; };
    if (a.act == TERN_ACT_INT4) return Team::sum(n, [&](int64_t i) { return tern__abs(term(i)); }, room) / (float)n;
    return tern__float(tern__team_absmax<Team>(n, term, room));
}

/* Row t, which is x; q, scale and sum are that row's. Within a row everything fits 32 bits: at most 2^18 units. */
template <typename Team>
static __device__ void tern__quantize_row(const tern_quantize_args &a, const tern__shape &s, int64_t t, const float *x, int8_t *q,
                                          float *scale, int32_t *sum, tern__blame blame, float *room)
{
    const int cols = (int)a.m.cols, group = (int)s.group, groups = (int)s.groups, run = (int)(s.group_units * s.unit),
              used = (int)(s.units * s.unit);
    const int pieces = (run + TERN__PIECE - 1) / TERN__PIECE, lane = (int)threadIdx.x % 32, me = Team::thread(), threads = Team::threads();
    const int most = a.act == TERN_ACT_INT4 ? 7 : 127;
    const float steps = a.act == TERN_ACT_INT4 ? TERN__ROOT7 : 127.0f;
    const float size = tern__steps_of<Team>(a, x, room);
    const float r = a.norm == TERN_NORM_RMS ? tern__rms<Team>(cols, x, a.eps, room) : 1.0f;
    const float inverse = steps / size;
    const bool usable = tern__finite(size) && r > 0.0f, zero = !usable || !tern__finite(inverse);
    if (me == 0) *scale = zero ? 0.0f : size / steps * r;
    if (me == 0 && !usable) tern__report(blame, t);
    for (int g = me; g < groups; g += threads) sum[g] = 0;
    for (int i = used + 4 * me; i < s.stride; i += 4 * threads) *(uint32_t *)(q + i) = 0;
    Team::sync();
    for (int item = me / 32; item < groups * pieces; item += threads / 32) {
        const int g = item / pieces, first = item % pieces * TERN__PIECE, n = min(group, cols - g * group);
        const int end = min(first + TERN__PIECE, min(run, used - g * run));
        int total = 0;
        for (int i = first + 4 * lane; i < end; i += 128) {
            uint32_t four = 0;
            for (int j = 0; j < 4 && i + j < n && !zero; j++) {
                const int at = g * group + i + j;
                const int near = min(most, (int)tern__round((a.gain ? x[at] * a.gain[at] : x[at]) * inverse)),
                          v = near < -most - 1 ? -most - 1 : near;
                total += v;
                four |= (uint32_t)(v & 255) << 8 * j;
            }
            *(uint32_t *)(q + g * run + i) = four;
        }
        total = tern__warp_count(total);
        if (lane == 0) atomicAdd(&sum[g], total);
    }
    Team::sync();
}

static __global__ void __launch_bounds__(1024) tern__quantize_rows(tern_quantize_args a, tern__shape s, tern__blame blame)
{
    TERN__SHARED(float, room);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x)
        tern__quantize_row<tern__block_team>(a, s, t, a.x + t * a.m.cols, a.q + t * s.stride, a.scale + t,
                                             a.sum + t * s.groups, blame, room);
}

/* Bits of a row: a thread to each word of 32 inputs of a group. */
static __global__ void __launch_bounds__(1024) tern__quantize_bit_rows(tern_quantize_args a, tern__shape s, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    const int words = (int)tern__bit_words(s.group_units, s.unit), all = (int)s.stride / 4;
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *x = a.x + t * a.m.cols;
        int32_t *sum = a.sum + t * s.groups;
        const bool usable = tern__finite(tern__float(tern__block_absmax(a.m.cols, [&](int64_t i) { return x[i]; }, seen)));
        if (threadIdx.x == 0) a.scale[t] = usable ? 1.0f : 0.0f;
        if (threadIdx.x == 0 && !usable) tern__report(blame, t);
        for (int g = (int)threadIdx.x; g < s.groups; g += (int)blockDim.x) sum[g] = 0;
        __syncthreads();
        for (int w = (int)threadIdx.x; w < all; w += (int)blockDim.x) {
            const int g = w / words, first = w % words * 32;
            const int n = usable && g < s.groups ? (int)tern__min(32, tern__group_cols(&a.m, &s, g) - first) : 0;
            uint32_t word = 0;
            for (int i = 0; i < n; i++) word |= (uint32_t)(x[g * s.group + first + i] != 0.0f) << (i % 4 * 8 + i / 4 % 4 * 2 + i / 16);
            ((uint32_t *)(a.q + t * s.stride))[w] = word;
            if (word) atomicAdd(&sum[g], __popc(word));
        }
        __syncthreads(); /* seen may be written again */
    }
}

static tern_result tern__gpu_quantize(tern_run *r, tern__gpu *d, const tern_quantize_args *a)
{
    const int threads = a->m.cols > 2048 ? 1024 : TERN__THREADS; /* few long rows still fill a multiprocessor */
    TERN__TRY(tern__check_aligned16(r, "quantize: q", a->q));
    TERN__LAUNCH((a->act == TERN_ACT_BIT ? tern__quantize_bit_rows : tern__quantize_rows), tern__grid(d, a->n, 1), threads, TERN__ROOM,
                 d->stream, *a, tern__shape_of(&a->m), tern__blame_of(d, TERN__FAULT_QUANTIZE));
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
template <bool Base3>
static __device__ void tern__mma_codes(const uint32_t row0[5], const uint32_t row1[5], const uint32_t quad[5], int even[4], int odd[4])
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
    for (int i = 0; i < TERN__AHEAD; i++)
        w[i] = u + 4 * i < end ? tern__stream16(panel + (u + 4 * i) * TERN__UNIT) : make_uint4(0, 0, 0, 0);
}

/* Sums of code * q over units [begin, end), of 32 rows and 8 Tiles tokens: dot[h][j][i] belongs to rows 2h + i / 2 of the
   lane's four and token 8j + 2t + i % 2. q: the lane's tokens 8j + g, or NULL. A unit that is not there has codes 0. */
template <int Tiles, bool Base3>
static __device__ __forceinline__ void tern__warp_dot(const uint8_t *panel, const int8_t *const q[Tiles], int begin, int end,
                                                      int dot[2][Tiles][4])
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

/* Where tokens are among the rows of activations, and where their outputs go: slot is the same for all matrices of a shape,
   and of one thread. */
struct tern__rows_in_order {
    static __device__ int at(int token) { return token; }
    static __device__ void put(const tern_matmul_args &a, int token, int64_t row, int, float y) { a.y[token * a.m.rows + row] = y; }
};

/* The sums of a round as outputs: those of the warps that share a pair added up, or one group after the other into facc. */
template <typename Rows>
static __device__ void tern__fold_few(const tern_matmul_args &a, const tern__shape &s, int tokens, int pieces, int64_t block, int round,
                                      int rounds, const int *dots, float *facc, const Rows &rows)
{
    for (int slot = (int)threadIdx.x; slot < TERN__WARPS / pieces * tokens * 32; slot += TERN__THREADS) {
        const int pair = slot / 32 / tokens, token = slot / 32 % tokens;
        const int64_t row = (block * (TERN__WARPS / pieces) + pair) * 32 + slot % 32;
        int total = 0;
        if (token >= a.n || row >= a.m.rows) continue;
        const int64_t at = rows.at(token);
        for (int p = 0; p < pieces; p++) {
            const int sum = dots[((pair * pieces + p) * tokens + token) * 32 + slot % 32], g = round * pieces + p;
            total += sum;
            if (a.m.grain <= 0 || g >= s.groups) continue;
            const float product = (float)(sum - a.sum[at * s.groups + g]) * tern__scale_of(a.m, s, row, g);
            facc[slot] = g > 0 ? facc[slot] + product : product;
        }
        if (round < rounds - 1) continue;
        const float y = a.m.grain > 0 ? facc[slot] * a.scale[at]
                                      : (float)(total - a.sum[at]) * (a.scale[at] * tern__scale_of(a.m, s, row, 0));
        rows.put(a, token, row, slot, a.bias ? y + a.bias[row] : y);
    }
}

/* Shared memory: dots[warp][token][row], and for groups facc[pair][token][row]. */
template <int Tiles> struct tern__few_room { enum { dots = TERN__WARPS * 8 * Tiles * 32, bytes = 2 * 4 * dots }; };

/* `pieces` warps to a pair of panels; a block's pairs lie together. */
template <int Tiles, bool Base3, typename Rows = tern__rows_in_order>
static __device__ __forceinline__ void tern__few_tokens(const tern_matmul_args &a, const tern__shape &s, int pieces, int64_t block,
                                                        int *dots, const Rows &rows = Rows())
{
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4, units = (int)s.units;
    const int rounds = a.m.grain > 0 ? ((int)s.groups + pieces - 1) / pieces : 1;
    const int share = ((units + pieces - 1) / pieces + 4 * TERN__AHEAD - 1) & ~(4 * TERN__AHEAD - 1);
    const uint8_t *panel = tern__lane_panel(a.m, s, block * (TERN__WARPS / pieces) + warp / pieces);
    const int8_t *q[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; j++) q[j] = 8 * j + g < a.n ? a.q + rows.at(8 * j + g) * s.stride : NULL;
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
        tern__fold_few(a, s, 8 * Tiles, pieces, block, round, rounds, dots, (float *)(dots + tern__few_room<Tiles>::dots), rows);
        __syncthreads();
    }
}

template <int Tiles, bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__few_tokens_product(tern_matmul_args a, tern__shape s, int pieces)
{
    TERN__SHARED(int, dots);
    tern__few_tokens<Tiles, Base3>(a, s, pieces, blockIdx.x, dots);
}

/* A whole layer: every block quantizes all tokens for itself, the first one for the caller too. */
template <bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, 2)
    tern__few_tokens_layer(tern_matmul_args a, tern_quantize_args quantize, tern__shape s, int pieces, tern__blame blame)
{
    TERN__SHARED(int, dots);
    int8_t *q = (int8_t *)dots + tern__few_room<1>::bytes;
    float *scale = (float *)(q + a.n * s.stride);
    int32_t *sum = (int32_t *)(scale + a.n);
    for (int64_t t = 0; t < a.n; t++)
        tern__quantize_row<tern__block_team>(quantize, s, t, quantize.x + t * a.m.cols, q + t * s.stride, scale + t, sum + t * s.groups,
                                             blame, (float *)dots);
    if (blockIdx.x == 0) {
        for (int64_t i = threadIdx.x; i < a.n * s.stride / 4; i += TERN__THREADS) ((uint32_t *)quantize.q)[i] = ((const uint32_t *)q)[i];
        for (int64_t i = threadIdx.x; i < a.n; i += TERN__THREADS) quantize.scale[i] = scale[i];
        for (int64_t i = threadIdx.x; i < a.n * s.groups; i += TERN__THREADS) quantize.sum[i] = sum[i];
    }
    a.q = q;
    a.scale = scale;
    a.sum = sum;
    tern__few_tokens<1, Base3>(a, s, pieces, blockIdx.x, dots);
}

/* More tokens make it worth that warps share what they read of q; few panels, that more warps share a panel. */
static int tern__pieces(const tern__gpu *d, const tern__shape &s, int64_t n)
{
    const int64_t pairs = tern__ceil_div(s.panels, 2);
    int pieces = n > 8 ? 2 : n > 2 ? 4 : 8;
    while (pieces < 8 && pairs * pieces / TERN__WARPS < 2 * d->processors) pieces *= 2;
    return pieces;
}
/* Blocks of a product, each for as many pairs of panels as its warps have pieces for. */
TERN__ANYWHERE unsigned tern__few_tokens_grid(const tern__shape &s, int pieces)
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

static __device__ tern__step tern__step_from(const tern__shape &s, int units, int group, int begin)
{
    const int stop = min((group + 1) * (int)s.group_units, (int)s.units), end = min(begin + units, stop);
    return {group, begin, end, end == stop};
}
static __device__ tern__step tern__step_after(const tern__shape &s, int units, const tern__step &step)
{
    return tern__step_from(s, units, step.group + step.last, step.end);
}

static __device__ int tern__step_count(const tern__shape &s, int units)
{
    return ((int)s.groups - 1) * (((int)s.group_units + units - 1) / units)
           + ((int)(s.units - (s.groups - 1) * s.group_units) + units - 1) / units;
}

template <bool Base3>
static __device__ void tern__stage_tokens(const tern_matmul_args &a, const tern__shape &s, int64_t token0, int tokens,
                                          const tern__step &step, int8_t *to)
{
    typedef tern__stage<Base3> stage;
    const int from = step.begin * stage::inputs & ~15;
    for (int i = (int)threadIdx.x; i < tokens * (stage::bytes / 16); i += TERN__THREADS) {
        const int token = i / (stage::bytes / 16), at = i % (stage::bytes / 16) * 16;
        if (token0 + token < a.n && from + at < s.stride)
            tern__cp_async16(to + token * stage::bytes + at, a.q + (token0 + token) * s.stride + from + at);
    }
    tern__cp_commit();
}

template <bool Base3>
static __device__ void tern__stage_weights(const uint8_t *panel, const tern__step &step, uint4 w[tern__stage<Base3>::units / 4])
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
template <int Tiles> static __device__ void tern__fold_many(const tern_matmul_args &a, const tern__shape &s, int group, int64_t row,
                                                            int64_t token, int dot[2][Tiles][4], float facc[2][Tiles][4])
{
    const int32_t *sums = a.sum + token * s.groups + group;
    const int tokens = (int)tern__min(a.n - token, 8 * Tiles), groups = (int)s.groups;
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scale[i] = row + i < a.m.rows ? tern__scale_of(a.m, s, row + i, group) : 0.0f;
#pragma unroll
    for (int k = 0; k < 2 * Tiles; k++) {
        const int x = k / 2 * 8 + k % 2, sum = x < tokens ? sums[(int64_t)x * groups] : 0;
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

/* What outputs need of a lane's four rows, read once. */
typedef struct tern__lane_rows { float scale[4], bias[4]; } tern__lane_rows;

static __device__ __forceinline__ tern__lane_rows tern__rows_from(const tern_matmul_args &a, const tern__shape &s,
                                                                  bool grouped, int64_t row)
{
    tern__lane_rows rows;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const bool there = row + i < a.m.rows;
        rows.scale[i] = there && !grouped ? tern__scale_of(a.m, s, row + i, 0) : 0.0f;
        rows.bias[i] = there && a.bias ? a.bias[row + i] : 0.0f;
    }
    return rows;
}

/* Outputs of token x, the k-th of the lane's, in its four rows. */
template <int Tiles>
static __device__ __forceinline__ void tern__outputs(const tern_matmul_args &a, const tern__lane_rows &rows, bool grouped, int64_t x, int k,
                                                     const int dot[2][Tiles][4], const float facc[2][Tiles][4], float y[4])
{
    const float scale = a.scale[x];
    const int sum = grouped ? 0 : a.sum[x];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int h = i / 2, j = k / 2, e = i % 2 * 2 + k % 2;
        y[i] = grouped ? facc[h][j][e] * scale : (float)(dot[h][j][e] - sum) * (scale * rows.scale[i]);
        if (a.bias) y[i] = y[i] + rows.bias[i];
    }
}

/* Those of all tokens of the lane, from `token` on. */
template <int Tiles>
static __device__ __forceinline__ void tern__store_many(const tern_matmul_args &a, const tern__shape &s, bool grouped, int64_t row,
                                                        int64_t token, const int dot[2][Tiles][4], const float facc[2][Tiles][4])
{
    const tern__lane_rows rows = tern__rows_from(a, s, grouped, row);
#pragma unroll
    for (int k = 0; k < 2 * Tiles; k++) {
        const int64_t x = token + k / 2 * 8 + k % 2;
        float y[4];
        if (x >= a.n) continue;
        tern__outputs<Tiles>(a, rows, grouped, x, k, dot, facc, y);
        tern__store_rows(a, x, row, y);
    }
}

/* The tile of 128 rows and 16 Tiles tokens that begins at these. */
template <int Tiles, bool Base3, bool Grouped>
static __device__ __forceinline__ void tern__many_tokens(const tern_matmul_args &a, const tern__shape &s, int64_t row_tile, int64_t token0,
                                                         int8_t *shared)
{
    typedef tern__stage<Base3> stage;
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4,
              stage_bytes = 16 * Tiles * stage::bytes;
    const int64_t pair = row_tile * 4 + warp % 4;
    const int64_t row = pair * 32 + 4 * g, token = token0 + warp / 4 * 8 * Tiles + 2 * t; /* of the lane's first output */
    const int steps = tern__step_count(s, stage::units);
    const uint8_t *panel = tern__lane_panel(a.m, s, pair);
    const int8_t *q = shared + (warp / 4 * 8 * Tiles + g) * stage::bytes;
    uint4 w[stage::units / 4], next[stage::units / 4];
    int dot[2][Tiles][4];
    float facc[2][Tiles][4];
    tern__step step = tern__step_from(s, stage::units, 0, 0);
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
            step = tern__step_after(s, stage::units, step);
            tern__stage_tokens<Base3>(a, s, token0, 16 * Tiles, step, shared + stage_bytes - side);
            tern__stage_weights<Base3>(panel, step, next);
            tern__cp_wait<1>();
        } else tern__cp_wait<0>();
        __syncthreads();
        tern__stage_dot<Tiles, Base3>(w, q + side + (here.begin * stage::inputs & 15), dot);
        __syncthreads();
        if (Grouped && here.last) tern__fold_many<Tiles>(a, s, here.group, row, token, dot, facc);
    }
    tern__store_many<Tiles>(a, s, Grouped, row, token, dot, facc);
}

template <int Tiles, bool Base3, bool Grouped>
static __global__ void __launch_bounds__(TERN__THREADS, 1) tern__many_tokens_product(tern_matmul_args a, tern__shape s, unsigned row_tiles)
{
    TERN__SHARED(int8_t, shared);
    tern__many_tokens<Tiles, Base3, Grouped>(a, s, blockIdx.x % row_tiles, (int64_t)(blockIdx.x / row_tiles) * 16 * Tiles, shared);
}

/* -- many tokens where there is wgmma, of 2-bit weights: tiles of as many rows as threads, 32 to a warp, by Tokens tokens. Stages of 128
   inputs come through shared memory: q in the order that tern__wgmma_tile says, then the weights as they are. All lanes of a quad read
   the same 16 bytes of each of two units, four rows; lane t has the quads t of both, which are inputs 4t and 16 + 4t on of the
   instruction. Its "row g" and "row g + 8" are two of those four rows, so that sums lie as those of tern__many_tokens. -- */

enum { TERN__WGMMA_UNITS = 8, TERN__WGMMA_ROW = 4 * TERN__WGMMA_UNITS /* bytes of weights */, TERN__WGMMA_STAGES = 4 };

/* What a thread copies of every stage: the same piece of 16 bytes of tokens that lie Threads / 8 apart, and of two panels. */
typedef struct tern__wgmma_source {
    const int8_t *q;
    const uint8_t *panel[2];
    int tokens, room; /* from q on: tokens, and bytes of one */
} tern__wgmma_source;

template <int Threads>
static __device__ tern__wgmma_source tern__wgmma_source_of(const tern_matmul_args &a, const tern__shape &s, int64_t panel0, int64_t token0)
{
    const int i = (int)threadIdx.x;
    tern__wgmma_source from;
    from.q = a.q + (token0 + i / 8) * s.stride + i % 8 * 16;
    from.tokens = (int)tern__min(a.n - token0, Threads) - i / 8;
    from.room = (int)s.stride - i % 8 * 16;
    for (int k = 0; k < 2; k++)
        from.panel[k] = (const uint8_t *)a.m.trits + tern__min(panel0 + (i + k * Threads) / 32, s.panels - 1) * s.panel_bytes + i % 32 * 16;
    return from;
}

/* Tokens and units that are not there are 0. Without a branch: with one, the compiler would let products wait for each other. */
template <int Tokens, int Threads>
static __device__ __forceinline__ void tern__wgmma_load(const tern__wgmma_source &from, const tern__shape &s,
                                                        const tern__step &step, int8_t *to)
{
    const int i = (int)threadIdx.x, at = step.begin * 16, tokens = at < from.room ? from.tokens : 0;
    int8_t *q = to + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16, *weights = to + Tokens * 128 + i * 16;
#pragma unroll
    for (int k = 0; k < Tokens; k += Threads / 8) tern__cp_async16_or_zero(q + k * 128, from.q + at + k * s.stride, k < tokens);
#pragma unroll
    for (int k = 0; k < 2; k++)
        tern__cp_async16_or_zero(weights + k * Threads * 16, from.panel[k] + step.begin * TERN__UNIT, step.begin + i % 32 / 4 < step.end);
}

/* Codes of the lane's rows in two units, for two products. */
static __device__ __forceinline__ void tern__wgmma_codes(const int8_t *units, uint32_t a[2][4])
{
    const int shift = (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const uint4 w = *(const uint4 *)(units + u * TERN__UNIT);
        a[0][2 * u] = w.x >> shift & 0x03030303u;
        a[0][2 * u + 1] = w.y >> shift & 0x03030303u;
        a[1][2 * u] = w.z >> shift & 0x03030303u;
        a[1][2 * u + 1] = w.w >> shift & 0x03030303u;
    }
}

/* The tile of Threads rows and Tokens tokens that begins at these. */
template <int Tokens, int Threads, bool Grouped>
static __device__ __forceinline__ void tern__wgmma_tokens(const tern_matmul_args &a, const tern__shape &s, int64_t row_tile, int64_t token0,
                                                          int8_t *shared)
{
    enum { TILES = Tokens / 8, AHEAD = TERN__WGMMA_STAGES - 2, STAGE = Tokens * 128 + Threads * TERN__WGMMA_ROW };
    const int warp = (int)threadIdx.x / 32, g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    /* row, token: of the lane's first output. */
    const int64_t row0 = row_tile * Threads, row = row0 + warp * 32 + 4 * g, token = token0 + 2 * t;
    const int steps = TERN__HAS_WGMMA ? tern__step_count(s, TERN__WGMMA_UNITS) : 0,
              units = Tokens * 128 + (2 * warp + g / 4) * TERN__WGMMA_UNITS * TERN__UNIT + g % 4 * 16;
    const tern__wgmma_source from = tern__wgmma_source_of<Threads>(a, s, row0 / TERN__ROWS, token0);
    tern__step step = tern__step_from(s, TERN__WGMMA_UNITS, 0, 0), next = step;
    uint32_t codes[2][2][4];
    int dot[2][TILES][4];
    float facc[2][TILES][4];
#pragma unroll
    for (int i = 0; i < 8 * TILES; i++) dot[i / (4 * TILES)][i / 4 % TILES][i % 4] = 0;
    for (int i = 0; i < AHEAD; i++) {
        if (i < steps) tern__wgmma_load<Tokens, Threads>(from, s, next, shared + i * STAGE);
        tern__cp_commit();
        next = tern__step_after(s, TERN__WGMMA_UNITS, next);
    }
    for (int i = 0; i < steps; i++) {
        const int8_t *here = shared + i % TERN__WGMMA_STAGES * STAGE;
        tern__cp_wait<AHEAD - 1>();
        tern__wgmma_publish();
        __syncthreads(); /* stage i is there for all, and the products of stage i - 2, where the next goes, are done */
#pragma unroll
        for (int k = 0; k < TERN__WGMMA_UNITS / 2; k++) {
            /* While products are under way, codes of the next ones are made, and the next stage is asked for. */
            tern__wgmma_codes(here + units + 2 * k * TERN__UNIT, codes[k % 2]);
            tern__wgmma_fence(codes[k % 2], dot);
            tern__wgmma_s8(dot[0], codes[k % 2][0], tern__wgmma_tile(here) + 2 * k);
            tern__wgmma_s8(dot[1], codes[k % 2][1], tern__wgmma_tile(here) + 2 * k);
            tern__wgmma_commit();
            tern__wgmma_wait<1>(dot);
            if (k == 0) {
                tern__wgmma_load<Tokens, Threads>(from, s, next, shared + (i + AHEAD) % TERN__WGMMA_STAGES * STAGE);
                tern__cp_commit();
                next = tern__step_after(s, TERN__WGMMA_UNITS, next);
            }
        }
        if (Grouped && step.last) {
            tern__wgmma_wait<0>(dot);
            tern__fold_many<TILES>(a, s, step.group, row, token, dot, facc);
        }
        step = tern__step_after(s, TERN__WGMMA_UNITS, step);
    }
    tern__cp_wait<0>(); /* the last copies are of nothing that is multiplied, but into shared memory */
    tern__wgmma_wait<0>(dot);
    if (TERN__HAS_WGMMA) tern__store_many<TILES>(a, s, Grouped, row, token, dot, facc);
}

template <int Tokens, int Threads, bool Grouped>
static __global__ void __launch_bounds__(Threads, 1) tern__wgmma_product(tern_matmul_args a, tern__shape s, unsigned row_tiles)
{
    TERN__SHARED(int8_t, shared);
    tern__wgmma_tokens<Tokens, Threads, Grouped>(a, s, blockIdx.x % row_tiles, (int64_t)(blockIdx.x / row_tiles) * Tokens, shared);
}

/* Says of the code that is loaded here whether it is that for sm_90a. */
static __global__ void tern__find_wgmma(int *found) { *found = TERN__HAS_WGMMA; }

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
    const int base3 = a->m.encoding == TERN_BASE3, grouped = a->m.grain > 0, size = a->n <= 32 ? 0 : a->n <= 64 || grouped ? 1 : 2,
              tokens = 32 << size;
    const int64_t row_tiles = tern__ceil_div(s.panels, 8), tiles = tern__mul(row_tiles, tern__ceil_div(a->n, tokens));
    tern__many_kernel *const kernel = kernels[grouped][size][base3];
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED,
                  "cuda: matmul: %d tiles of 128 rows by %d tokens; %d are the most", tiles, (int64_t)tokens, (int64_t)INT32_MAX);
    TERN__LAUNCH(kernel, (unsigned)tiles, TERN__THREADS,
                 2 * tokens * (base3 ? (int)tern__stage<true>::bytes : (int)tern__stage<false>::bytes), d->stream, *a, s,
                 (unsigned)row_tiles);
    return TERN_OK;
}

/* Sums of groups leave room for 64 tokens. Blocks are of half the rows where there would not be one for every processor. */
typedef struct tern__wgmma_kernel { tern__many_kernel *kernel; int rows, tokens; } tern__wgmma_kernel;
#define TERN__WGMMA(rows) \
    {tern__wgmma_product<64, rows, false>, rows, 64}, {tern__wgmma_product<128, rows, false>, rows, 128}, \
    {tern__wgmma_product<64, rows, true>, rows, 64}
static const tern__wgmma_kernel tern__wgmma_kernels[] = {TERN__WGMMA(128), TERN__WGMMA(256)};
#undef TERN__WGMMA

static int tern__wgmma_bytes(int rows, int tokens) { return TERN__WGMMA_STAGES * (tokens * 128 + rows * TERN__WGMMA_ROW); }

/* Where tiles of 64 tokens, and stages of a group's inputs, are more than half full. */
static bool tern__suits_wgmma(const tern__gpu *d, const tern_matrix &m, const tern__shape &s, int64_t n)
{
    return d->wgmma && m.encoding != TERN_BASE3 && n > 32
           && 2 * s.group_units > tern__ceil_div(s.group_units, TERN__WGMMA_UNITS) * TERN__WGMMA_UNITS;
}

static tern_result tern__gpu_matmul_wgmma(tern_run *r, tern__gpu *d, const tern_matmul_args *a, const tern__shape &s)
{
    const int kind = a->m.grain > 0 ? 2 : a->n > 64;
    const int64_t token_tiles = tern__ceil_div(a->n, tern__wgmma_kernels[kind].tokens);
    const tern__wgmma_kernel &k =
        tern__wgmma_kernels[tern__mul(tern__ceil_div(a->m.rows, 256), token_tiles) >= d->processors ? 3 + kind : kind];
    const int64_t row_tiles = tern__ceil_div(a->m.rows, k.rows), tiles = tern__mul(row_tiles, token_tiles);
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: matmul: %d tiles of %d rows by %d tokens; %d are the most", tiles,
                  (int64_t)k.rows, (int64_t)k.tokens, (int64_t)INT32_MAX);
    TERN__LAUNCH(k.kernel, (unsigned)tiles, k.rows, tern__wgmma_bytes(k.rows, k.tokens), d->stream, *a, s, (unsigned)row_tiles);
    return TERN_OK;
}

static tern_result tern__gpu_matmul_int8(tern_run *r, tern__gpu *d, const tern_matmul_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    TERN__TRY(tern__check_aligned16(r, "matmul: m.trits", a->m.trits));
    TERN__TRY(tern__check_aligned16(r, "matmul: q", a->q));
    if (a->n <= TERN__FEW_TOKENS) return tern__gpu_matmul_few(d, a, s);
    return tern__suits_wgmma(d, a->m, s, a->n) ? tern__gpu_matmul_wgmma(r, d, a, s) : tern__gpu_matmul_many(r, d, a, s);
}

/* Bits as int8, in the layout of those. */
static __global__ void tern__widen_bits(int64_t n, const int8_t *bits, tern__shape s, int8_t *q)
{
    const int64_t run = s.group_units * s.unit, words = tern__bit_words(s.group_units, s.unit), used = s.units * s.unit,
                  fours = s.stride / 4;
    TERN__EACH(item, n * fours) {
        const int64_t t = item / fours, at = (item - t * fours) * 4, g = at / run;
        const int8_t *from = bits + t * s.stride + g * words * 4;
        uint32_t four = 0;
        for (int k = 0; k < 4 && at < used; k++) four |= (uint32_t)tern__bit_of(from, at - g * run + k) << 8 * k;
        *(uint32_t *)(void *)(q + t * s.stride + at) = four;
    }
}

/* A product with bits is one with int8, of as many tokens at a time as have room in so many bytes of the work memory. */
static tern_result tern__gpu_matmul_bits(tern_run *r, tern__gpu *d, const tern_matmul_args *a, int64_t room)
{
    const tern__shape s = tern__shape_of(&a->m);
    const int64_t tokens = room / s.stride;
    TERN__REQUIRE(r, tokens > 0, TERN_E_UNSUPPORTED, "cuda: matmul: bits of rows of %d bytes as int8; %d is the most", s.stride, room);
    TERN__TRY(tern__check_aligned16(r, "matmul: q", a->q));
    for (int64_t t = 0; t < a->n; t += tokens) {
        tern_matmul_args piece = *a;
        piece.act = TERN_ACT_INT8;
        piece.n = tern__min(tokens, a->n - t);
        piece.q = (const int8_t *)d->work;
        piece.scale += t;
        piece.sum += t * s.groups;
        piece.y += t * a->m.rows;
        TERN__LAUNCH(tern__widen_bits, tern__grid(d, piece.n * s.stride / 4, TERN__THREADS), TERN__THREADS, 0, d->stream, piece.n,
                     a->q + t * s.stride, s, (int8_t *)d->work);
        TERN__TRY(tern__gpu_matmul_int8(r, d, &piece));
    }
    return TERN_OK;
}

static tern_result tern__gpu_matmul_quantized(tern_run *r, tern__gpu *d, const tern_matmul_args *a)
{
    return a->act == TERN_ACT_BIT ? tern__gpu_matmul_bits(r, d, a, TERN__WORK * (int64_t)sizeof(float)) : tern__gpu_matmul_int8(r, d, a);
}

/* -- groups of tokens, each with matrices of its own: blocks that stay share out the tiles that the real loads make, which only the device
   knows; a launch has the same shape for all loads -- */

enum { TERN__GROUP_MATRICES = 128 }; /* of a launch, among the kernel's parameters */

typedef struct tern__group_matrix { void *trits, *scales; const float *bias; } tern__group_matrix;

/* Groups [first, first + count) of `all`, of which a.n rows from `at` on are here; y_set: floats from set to set. */
template <typename Matrix> struct tern__groups_of {
    tern_matmul_args a;
    tern__shape s;
    const int32_t *loads;
    int64_t at, y_set, mean; /* mean load */
    int32_t first, count, all, sets;
    Matrix w[TERN__GROUP_MATRICES];
};
typedef tern__groups_of<tern__group_matrix> tern__groups;
static_assert(sizeof(tern__groups) <= 4096 - 64, "parameters of a kernel");

/* Where each group's rows and tiles begin; the last entry: where they end. */
typedef struct tern__group_room { int row[TERN__GROUP_MATRICES + 4], tile[TERN__GROUP_MATRICES + 4]; } tern__group_room;

/* Sums over the lanes up to each. */
static __device__ int tern__warp_scan(int n)
{
    const int lane = (int)threadIdx.x % 32;
    for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_sync(TERN__ALL_LANES, n, lane >= d ? lane - d : lane);
        n += lane >= d ? before : 0;
    }
    return n;
}

/* Fills room, by the first warp, for tiles of so many rows. */
template <typename Matrix> static __device__ void tern__count_tiles(const tern__groups_of<Matrix> &p, int tokens, tern__group_room *my)
{
    const int lane = (int)threadIdx.x % 32;
    int64_t rows = 0;
    int tiles = 0;
    if (threadIdx.x < 32) {
        int before = 0;
        for (int g = lane; g < p.first; g += 32) before += p.loads[g];
        rows = tern__warp_count(before) - p.at;
        for (int from = 0; from <= p.count; from += 32) {
            const int g = from + lane, load = g < p.count ? p.loads[p.first + g] : 0, end = tern__warp_scan(load);
            const int64_t begin = tern__max(0, tern__min(rows + end - load, p.a.n)), stop = tern__max(0, tern__min(rows + end, p.a.n));
            const int mine = (int)((stop - begin + tokens - 1) / tokens), all = tern__warp_scan(mine);
            if (g <= p.count) {
                my->row[g] = (int)begin;
                my->tile[g] = tiles + all - mine;
            }
            rows += __shfl_sync(TERN__ALL_LANES, end, 31);
            tiles += __shfl_sync(TERN__ALL_LANES, all, 31);
        }
    }
    __syncthreads();
}

/* body(w, set, first, n, block) for each tile [first, first + n) of a group's rows and each block of its matrices; after the last
   group there are zeros, of so many floats a row. */
template <typename Body>
static __device__ __forceinline__ void tern__each_group_block(const tern__groups &p, int tokens, int blocks, int64_t width,
                                                              tern__group_room *my, Body body)
{
    tern__count_tiles(p, tokens, my);
    const int64_t items = (int64_t)my->tile[p.count] * p.sets * blocks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const int tile = (int)(item / (p.sets * blocks)), set = (int)(item / blocks % p.sets);
        const int group = (int)tern__last_at(p.count, [&](int64_t g) { return my->tile[g] <= tile; });
        const int64_t first = my->row[group] + (int64_t)(tile - my->tile[group]) * tokens;
        body(p.w[group * p.sets + set], set, first, tern__min(tokens, my->row[group + 1] - first), item % blocks);
    }
    const int64_t left = p.first + p.count == p.all ? (p.a.n - my->row[p.count]) * width : 0;
    TERN__EACH(i, left * p.sets) p.a.y[i / left * p.y_set + my->row[p.count] * width + i % left] = 0.0f;
}

/* body(a, block) for each tile of a group and each block of rows of its matrices. */
template <typename Body>
static __device__ __forceinline__ void tern__each_group_tile(const tern__groups &p, int tokens, int blocks, tern__group_room *my, Body body)
{
    tern__each_group_block(p, tokens, blocks, p.a.m.rows, my,
                           [&](const tern__group_matrix &w, int set, int64_t first, int64_t n, int64_t block) {
        tern_matmul_args a = p.a;
        a.m.trits = w.trits;
        a.m.scales = w.scales;
        a.bias = w.bias;
        a.n = n;
        a.q += first * p.s.stride;
        a.scale += first;
        a.sum += first * p.s.groups;
        a.y += set * p.y_set + first * p.a.m.rows;
        body(a, block);
    });
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define TERN__FEW_BLOCKS 1 /* of two tiles, on a processor: with two, sm_80 spills registers */
#else
#define TERN__FEW_BLOCKS 2
#endif
template <int Tiles, bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, Tiles == 1 ? 2 : TERN__FEW_BLOCKS)
    tern__few_groups(tern__groups p, int pieces, int blocks)
{
    TERN__SHARED(tern__group_room, my);
    tern__each_group_tile(p, 8 * Tiles, blocks, my, [&](const tern_matmul_args &a, int64_t block) {
        tern__few_tokens<Tiles, Base3>(a, p.s, pieces, block, (int *)(my + 1));
    });
}

template <int Tiles, bool Base3, bool Grouped>
static __global__ void __launch_bounds__(TERN__THREADS, Tiles == 2 && !Grouped ? 2 : 1) tern__many_groups(tern__groups p, int blocks)
{
    TERN__SHARED(tern__group_room, my);
    tern__each_group_tile(p, 16 * Tiles, blocks, my, [&](const tern_matmul_args &a, int64_t block) {
        tern__many_tokens<Tiles, Base3, Grouped>(a, p.s, block, 0, (int8_t *)(my + 1));
    });
}

enum { TERN__WGMMA_GROUP_ROOM = (int)(sizeof(tern__group_room) + 1023) / 1024 * 1024 };

template <int Tokens, bool Grouped> static __global__ void __launch_bounds__(256, 1) tern__wgmma_groups(tern__groups p, int blocks)
{
    TERN__SHARED(tern__group_room, my);
    tern__each_group_tile(p, Tokens, blocks, my, [&](const tern_matmul_args &a, int64_t block) {
        __syncthreads(); /* the tile before is done */
        tern__wgmma_tokens<Tokens, 256, Grouped>(a, p.s, block, 0, (int8_t *)my + TERN__WGMMA_GROUP_ROOM);
    });
}

typedef struct tern__wgmma_group_kernel { void (*kernel)(tern__groups, int); int tokens; } tern__wgmma_group_kernel;
static const tern__wgmma_group_kernel tern__wgmma_group_kernels[] = {
    {tern__wgmma_groups<64, false>, 64}, {tern__wgmma_groups<128, false>, 128}, {tern__wgmma_groups<64, true>, 64}};

static int tern__wgmma_group_bytes(const tern__wgmma_group_kernel &k) { return TERN__WGMMA_GROUP_ROOM + tern__wgmma_bytes(256, k.tokens); }

static void tern__launch_wgmma_groups(const tern__gpu *d, const tern__groups &p, int64_t mean)
{
    const tern__wgmma_group_kernel &k = tern__wgmma_group_kernels[p.a.m.grain > 0 ? 2 : mean > 64];
    const int64_t blocks = tern__ceil_div(p.a.m.rows, 256);
    TERN__LAUNCH(k.kernel, (unsigned)tern__min(d->processors, tern__mul(p.a.n, blocks * p.sets)), 256, tern__wgmma_group_bytes(k),
                 d->stream, p, (int)blocks);
}

/* Tiles by the mean load: what the device finds must not choose the launch. */
static void tern__launch_groups(const tern__gpu *d, const tern__groups &p)
{
    const int base3 = p.a.m.encoding == TERN_BASE3, grouped = p.a.m.grain > 0,
              pieces = tern__pieces(d, p.s, tern__min(p.a.n, TERN__FEW_TOKENS));
    const int64_t mean = tern__min(p.a.n, p.mean), few_blocks = tern__few_tokens_grid(p.s, pieces),
                  many_blocks = tern__ceil_div(p.s.panels, 8);
    const int few = p.a.n <= 8 ? 1 : 2, many = mean <= 32 ? 2 : 4;
    const size_t stage = base3 ? (size_t)tern__stage<true>::bytes : (size_t)tern__stage<false>::bytes;
#define TERN__MANY(tiles)                                                             \
    {{tern__many_groups<tiles, false, false>, tern__many_groups<tiles, true, false>}, \
     {tern__many_groups<tiles, false, true>, tern__many_groups<tiles, true, true>}}
    static void (*const few_kernels[2][2])(tern__groups, int, int) = {
        {tern__few_groups<1, false>, tern__few_groups<1, true>}, {tern__few_groups<2, false>, tern__few_groups<2, true>}};
    static void (*const many_kernels[2][2][2])(tern__groups, int) = {TERN__MANY(2), TERN__MANY(4)};
#undef TERN__MANY
    if (tern__suits_wgmma(d, p.a.m, p.s, mean)) tern__launch_wgmma_groups(d, p, mean);
    else if (mean <= TERN__FEW_TOKENS) {
        const auto kernel = few_kernels[few - 1][base3];
        TERN__LAUNCH(kernel, (unsigned)tern__min(2 * d->processors, tern__mul(p.a.n, few_blocks * p.sets)), TERN__THREADS,
                     sizeof(tern__group_room) + (size_t)few * tern__few_room<1>::bytes, d->stream, p, pieces, (int)few_blocks);
    } else {
        const auto kernel = many_kernels[many / 4][grouped][base3];
        TERN__LAUNCH(kernel, (unsigned)tern__min(2 * d->processors, tern__mul(p.a.n, many_blocks * p.sets)), TERN__THREADS,
                     sizeof(tern__group_room) + 32 * (size_t)many * stage, d->stream, p, (int)many_blocks);
    }
}

/* All rows that are here, with memory behind for what a row becomes, of so many floats. */
template <typename Matrix> static tern__groups_of<Matrix> tern__groups_for(const tern_grouped_args *a, int64_t width)
{
    tern__groups_of<Matrix> p = {};
    p.s = tern__shape_of(&a->m);
    p.loads = a->loads;
    p.all = a->count;
    p.mean = a->rows / a->count;
    p.sets = a->sets;
    p.y_set = a->n * width;
    p.at = a->at;
    p.a.m = a->m;
    p.a.n = a->n;
    return p;
}

/* As many groups at a time as a launch has room for, with what `of` takes of their parameters. */
template <typename Matrix, typename Of, typename Launch>
static tern_result tern__each_group_launch(const tern_grouped_args *a, tern__groups_of<Matrix> *p, Of of, Launch launch)
{
    const int32_t most = TERN__GROUP_MATRICES / a->sets;
    for (p->first = 0; p->first < a->count; p->first += most) {
        p->count = (int32_t)tern__min(most, a->count - p->first);
        for (int32_t i = 0; i < p->count * a->sets; i++) p->w[i] = of(a->w[(p->first + i / a->sets) * a->step + i % a->sets]);
        TERN__TRY(launch());
    }
    return TERN_OK;
}

static tern__group_matrix tern__group_matrix_of(const tern_param *w)
{
    const tern_matrix m = tern_param_matrix(w);
    return {m.trits, m.scales, tern__floats(w->dead, TERN_SHADOW)};
}

/* Bits are widened, of as many rows at a time as the work memory holds. */
static tern_result tern__gpu_grouped_products(tern_run *r, tern__gpu *d, const tern_grouped_args *a)
{
    const bool bits = a->act == TERN_ACT_BIT;
    tern__groups p = tern__groups_for<tern__group_matrix>(a, a->m.rows);
    const int64_t room = TERN__WORK * (int64_t)sizeof(float), most = bits ? room / p.s.stride : a->n;
    TERN__REQUIRE(r, most > 0, TERN_E_UNSUPPORTED, "cuda: grouped: bits of rows of %d bytes as int8; %d is the most", p.s.stride, room);
    TERN__TRY(tern__check_aligned16(r, "grouped: q", a->q));
    for (int64_t t = 0; t < a->n; t += most) {
        p.at = a->at + t;
        p.a.n = tern__min(most, a->n - t);
        p.a.q = bits ? (const int8_t *)d->work : a->q + t * p.s.stride;
        p.a.scale = a->scale + t;
        p.a.sum = a->sum + t * p.s.groups;
        p.a.y = a->y + t * a->m.rows;
        if (bits)
            TERN__LAUNCH(tern__widen_bits, tern__grid(d, p.a.n * p.s.stride / 4, TERN__THREADS), TERN__THREADS, 0, d->stream, p.a.n,
                         a->q + t * p.s.stride, p.s, (int8_t *)d->work);
        TERN__TRY(tern__each_group_launch(a, &p, tern__group_matrix_of, [&] {
            for (int32_t i = 0; i < p.count * p.sets; i++) TERN__TRY(tern__check_aligned16(r, "grouped: trits", p.w[i].trits));
            tern__launch_groups(d, p);
            return TERN_OK;
        }));
    }
    return TERN_OK;
}

/* Looks for wgmma when the device is opened. */
static tern_result tern__gpu_open_wgmma(tern_run *r, tern__gpu *d)
{
    TERN__CUDA(r, cudaGetLastError(), "before the first kernel");
    TERN__LAUNCH(tern__find_wgmma, 1, 1, 0, d->stream, (int *)d->work);
    TERN__CUDA(r, cudaGetLastError(), "a first kernel");
    TERN__CUDA(r, cudaMemcpyAsync(&d->wgmma, d->work, sizeof d->wgmma, cudaMemcpyDeviceToHost, d->stream), "copy");
    TERN__CUDA(r, cudaStreamSynchronize(d->stream), "the first kernel");
    if (!d->wgmma) return TERN_OK;
    for (const auto &k : tern__wgmma_kernels)
        TERN__CUDA(r, cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tern__wgmma_bytes(k.rows, k.tokens)),
                   "shared memory");
    for (const auto &k : tern__wgmma_group_kernels)
        TERN__CUDA(r, cudaFuncSetAttribute(k.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tern__wgmma_group_bytes(k)),
                   "shared memory");
    return TERN_OK;
}

/* In one launch where quantizing again in every block costs less than a launch of its own. */
static tern_result tern__gpu_linear(tern_run *r, tern__gpu *d, const tern_linear_args *a)
{
    const tern_matmul_args m = tern__linear_product(a);
    const tern__shape s = tern__shape_of(&m.m);
    const int64_t bytes = tern__mul(m.n, s.stride + 4 + 4 * s.groups);
    const int pieces = tern__pieces(d, s, m.n);
    if (m.act == TERN_ACT_BIT || m.n > TERN__FUSED_TOKENS || bytes > TERN__FUSED_BYTES
        || tern__few_tokens_grid(s, pieces) > 2 * (unsigned)d->processors) {
        TERN__TRY(tern__gpu_quantize(r, d, &a->quantize));
        return tern__gpu_matmul_quantized(r, d, &m);
    }
    TERN__TRY(tern__check_aligned16(r, "linear: m.trits", m.m.trits));
    TERN__TRY(tern__check_aligned16(r, "linear: q", m.q));
    TERN__LAUNCH((m.m.encoding == TERN_BASE3 ? tern__few_tokens_layer<true> : tern__few_tokens_layer<false>),
                 tern__few_tokens_grid(s, pieces), TERN__THREADS, tern__few_room<1>::bytes + (size_t)bytes, d->stream, m, a->quantize, s,
                 pieces, tern__blame_of(d, TERN__FAULT_QUANTIZE));
    return TERN_OK;
}

/* -- products without a float: a thread to an output -- */

static __device__ int32_t tern__fixed_dot(const tern_matrix *m, const tern__shape *s, int64_t row, int64_t g, const int8_t *x)
{
    const int64_t cols = tern__group_cols(m, s, g);
    const uint32_t radix = m->encoding == TERN_BASE3 ? 3 : 4;
    int32_t sum = 0;
    for (int64_t i = 0; i < cols; i += s->unit) {
        const uint32_t word = *tern__word_of(m, s, row, g * s->group_units + i / s->unit);
        uint32_t left[4];
        for (int j = 0; j < 4; j++) left[j] = word >> 8 * j & 255;
        for (int64_t j = 0; j < tern__min(s->unit, cols - i); j++) {
            sum += ((int32_t)(left[j % 4] % radix) - 1) * x[g * s->group + i + j];
            left[j % 4] /= radix;
        }
    }
    return sum;
}

static __global__ void tern__fixed_products(tern_matmul_fixed_args a, tern__shape s)
{
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < a.n * a.m.rows; i += step) {
        const int64_t row = i % a.m.rows;
        const int32_t top = tern__top_exponent(&a.m, &s, row);
        int64_t total = 0;
        for (int64_t g = 0; g < s.groups; g++) {
            const tern__integer_scale scale = tern__load_integer_scale(a.m.scale_type, a.m.scales, tern__scale_index(&a.m, &s, row, g));
            if (!scale.factor) continue;
            total += tern__floor_shift((int64_t)tern__fixed_dot(&a.m, &s, row, g, a.x + i / a.m.rows * a.m.cols) * scale.factor * 65536,
                                       (int32_t)tern__min(top - scale.exponent, 63));
        }
        a.y[i] = tern__fixed_point(total, total ? top - 31 + a.point : 0, a.bias ? a.bias[row] : 0);
    }
}

static tern_result tern__gpu_matmul_fixed(tern_run *r, tern__gpu *d, const tern_matmul_fixed_args *a)
{
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__LAUNCH(tern__fixed_products, tern__grid(d, tern__mul(a->n, a->m.rows), TERN__THREADS), TERN__THREADS, 0, d->stream, *a,
                 tern__shape_of(&a->m));
    return TERN_OK;
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-6] Float products and attention
   What enters: float matrices, packed panels, int8 activations. What leaves: sums in the order of [TERN-14].
   ------------------------------------------------------------------------------------------------ */


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
   with their inputs as terms, int8 activations or bits times their token's scale with tokens as terms. */
struct tern__b_floats { enum { GROUPED = 0 }; tern__strided x; };
struct tern__b_weights { enum { GROUPED = 0 }; tern_matrix m; tern__shape s; };
struct tern__b_trits { enum { GROUPED = 1 }; tern_matrix m; tern__shape s; };
template <bool Bits> struct tern__b_tokens { enum { GROUPED = 0 }; const int8_t *q; const float *scale; tern__shape s; };

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
static __device__ int tern__place_k(const tern__place &p, int i)
{
    return p.k + (p.along_k ? i % 2 * (TERN__DEPTH / 2) : i * (TERN__DEPTH / 4));
}
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

/* Of bits: where the group's begin, and the number among them. */
template <int Lines, bool Bits>
static __device__ tern__code_lines tern__lines_of(const tern__b_tokens<Bits> &b, tern__which, int64_t first, int64_t end)
{
    tern__code_lines l;
    l.place = tern__place_of<Lines>(false);
    const int64_t input = first + l.place.line, group = input / b.s.group;
    l.inside = input < end;
    l.digit = (int)(input % b.s.group);
    l.p = (const uint8_t *)b.q
          + (Bits ? group * tern__bit_words(b.s.group_units, b.s.unit) * 4 : group * b.s.group_units * b.s.unit + l.digit);
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
template <int Count, typename Element>
static __device__ void tern__read_each(const tern__place &p, const tern__chunk &c, int lines, float (&v)[Count], Element element)
{
    for (int i = 0; i < Count; i++)
        v[i] = tern__place_k(p, i) < c.len && tern__place_line(p, i) < lines ? element(i) : 0.0f;
}
template <int Count>
static __device__ void tern__read(const tern__strided &x, const tern__float_lines &l, const tern__chunk &c, float (&v)[Count])
{
    const float *p = l.p + (int64_t)c.k * x.k_step;
    tern__read_each(l.place, c, l.lines, v, [&](int i) { return p[i % 2 * x.near + i / 2 * x.far]; });
}
static __device__ void tern__read(const tern__b_floats &b, const tern__float_lines &l, const tern__chunk &c, float (&v)[4])
{
    tern__read(b.x, l, c, v);
}

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

template <bool Bits>
static __device__ void tern__read(const tern__b_tokens<Bits> &b, const tern__code_lines &l, const tern__chunk &c, float (&v)[4])
{
    const int8_t *q = (const int8_t *)l.p + (int64_t)c.k * b.s.stride;
    tern__read_each(l.place, c, l.inside ? TERN__SIDE : 0, v, [&](int i) {
        const int64_t token = tern__place_k(l.place, i);
        const int8_t *at = q + token * b.s.stride;
        return (float)(Bits ? tern__bit_of(at, l.digit) : *at) * b.scale[c.k + token];
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
template <typename B, int Rows>
static __device__ void tern__end_group(const B &, int, int64_t, int64_t, const float (&)[Rows][4], float (&)[Rows][4]) {}
template <int Rows> static __device__ void tern__end_group(const tern__b_trits &b, int group, int64_t column, int64_t n,
                                                           const float (&whole)[Rows][4], float (&total)[Rows][4])
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

template <int Rows>
static __device__ void tern__store(const tern__product &g, tern__which w, int64_t row, int64_t column, const float (&sum)[Rows][4])
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

template <typename B, bool Fused, int Rows>
static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__product_tiles(tern__product g, B b)
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
static bool tern__low_tiles(const tern__gpu *d, int64_t lines, int64_t tiles)
{
    return lines <= TERN__ROW_THREADS || tiles < d->processors;
}

template <bool Fused, typename B>
static tern_result tern__gpu_product(tern_run *r, const tern__gpu *d, const char *op, const tern__product &g, const B &b)
{
    const int64_t columns = tern__ceil_div(g.n, TERN__SIDE), high = tern__mul(tern__ceil_div(g.m, TERN__SIDE), columns);
    const bool low = tern__low_tiles(d, g.m, tern__mul(high, g.items));
    const int64_t tiles = low ? tern__mul(tern__ceil_div(g.m, TERN__ROW_THREADS), columns) : high;
    TERN__REQUIRE(r, g.k <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: %s: sums of %d terms; %d is the most", op, g.k, (int64_t)INT32_MAX);
    TERN__REQUIRE(r, g.items <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: %s: %d heads; %d is the most", op, g.items, (int64_t)INT32_MAX);
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED,
                  "cuda: %s: a result of %d x %d has %d tiles; %d is the most", op, g.m, g.n, tiles, (int64_t)INT32_MAX);
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
        const float *x = a.x + t * a.m.cols;
        if (tern__finite(tern__float(tern__block_absmax(a.m.cols, [&](int64_t i) { return x[i]; }, seen)))) continue;
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
    return a->q ? tern__gpu_matmul_quantized(r, d, a) : tern__gpu_matmul_floats(r, d, a);
}

static tern_result tern__gpu_matmul_dx(tern_run *r, tern__gpu *d, const tern_matmul_dx_args *a)
{
    const tern__steps none = tern__no_steps();
    const tern__product g =
        tern__product_of(a->n, a->m.cols, a->m.rows, tern__strided_of(a->dy, 1, a->m.rows, none), a->dx, a->m.cols, none);
    tern__b_weights b;
    b.m = a->m;
    b.s = tern__shape_of(&a->m);
    return tern__gpu_product<true>(r, d, "matmul_dx", g, b);
}

/* Column sums in order of the tokens, many of which are on their way at once. */
static __device__ void tern__bias_column(int64_t n, int64_t rows, const float *dy, float *dbias)
{
    float sum = *dbias, next[16];
    for (int64_t t = 0; t < n; t += 16) {
        for (int j = 0; j < 16; j++) next[j] = t + j < n ? dy[(t + j) * rows] : 0.0f;
        for (int j = 0; j < 16; j++) sum = t + j < n ? sum + next[j] : sum;
    }
    *dbias = sum;
}
static __global__ void tern__bias_columns(int64_t n, int64_t rows, const float *dy, float *dbias)
{
    TERN__EACH(i, rows) tern__bias_column(n, rows, dy + i, dbias + i);
}

template <bool Bits> static tern_result tern__gpu_tokens_dw(tern_run *r, tern__gpu *d, const tern_matmul_dw_args *a, const tern__product &g)
{
    tern__b_tokens<Bits> b;
    b.q = a->q;
    b.scale = a->scale;
    b.s = tern__shape_of(&a->m);
    return tern__gpu_product<true>(r, d, "matmul_dw", g, b);
}

static tern_result tern__gpu_matmul_dw(tern_run *r, tern__gpu *d, const tern_matmul_dw_args *a)
{
    const tern__steps none = tern__no_steps();
    tern__product g = tern__product_of(a->m.rows, a->m.cols, a->n, tern__strided_of(a->dy, a->m.rows, 1, none), a->dw, a->m.cols, none);
    g.add = 1;
    if (a->dw && a->q) TERN__TRY(a->act == TERN_ACT_BIT ? tern__gpu_tokens_dw<true>(r, d, a, g) : tern__gpu_tokens_dw<false>(r, d, a, g));
    if (a->dw && !a->q) TERN__TRY(tern__gpu_product<true>(r, d, "matmul_dw", g, tern__b_floats_of(a->x, a->m.cols, 1, none)));
    if (a->dbias) TERN__LAUNCH(tern__bias_columns, tern__grid(d, a->m.rows, 64), 64, 0, d->stream, a->n, a->m.rows, a->dy, a->dbias);
    return TERN_OK;
}

/* -- the same in groups of tokens ([CUDA-5]): tiles as of each group alone, of which the device finds where they lie -- */

/* Of a gradient launch: what is added to, or NULL. */
typedef struct tern__group_grad { float *dw, *dbias; } tern__group_grad;
typedef tern__groups_of<tern__group_grad> tern__group_grads;
static_assert(sizeof(tern__groups) + sizeof(tern__product) <= 4096 - 64, "parameters of a kernel");

/* Blocks that stay share out tiles of dx. */
template <int Rows> static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__group_dx(tern__groups p, tern__product g)
{
    TERN__SHARED(tern__group_room, my);
    const int columns = (int)tern__ceil_div(g.n, TERN__SIDE);
    tern__each_group_block(p, TERN__ROW_THREADS * Rows, columns, g.n, my,
                           [&](const tern__group_matrix &w, int set, int64_t first, int64_t n, int64_t block) {
        tern__product tile = g;
        tern__b_weights b;
        tile.m = n;
        tile.a.p += (set * p.a.n + first) * g.k;
        tile.c += (set * p.a.n + first) * g.n;
        b.m = p.a.m;
        b.m.trits = w.trits;
        b.m.scales = w.scales;
        b.s = p.s;
        tern__product_tile<tern__b_weights, true, Rows>(tile, b, tern__which(), 0, block * TERN__SIDE, (float *)(my + 1));
    });
}

/* A tile of dw of one matrix after the other, from the row of blocks on: of all, where two are the same. */
template <bool Bits, int Rows>
static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__group_dw(tern__group_grads p, tern__product g)
{
    TERN__SHARED(tern__group_room, my);
    const int64_t rows = TERN__ROW_THREADS * Rows, strips = tern__ceil_div(g.m, rows);
    tern__count_tiles(p, TERN__DEPTH, my);
    for (int i = (int)blockIdx.y; i < p.count * p.sets; i += (int)gridDim.y) {
        const int64_t first = my->row[i / p.sets];
        tern__product tile = g;
        tern__b_tokens<Bits> b;
        tile.k = tile.group = my->row[i / p.sets + 1] - first;
        tile.c = p.w[i].dw;
        tile.a.p += (i % p.sets * p.a.n + first) * g.m;
        b.q = p.a.q + first * p.s.stride;
        b.scale = p.a.scale + first;
        b.s = p.s;
        if (tile.k > 0 && tile.c)
            tern__product_tile<tern__b_tokens<Bits>, true, Rows>(tile, b, tern__which(), blockIdx.x % strips * rows,
                                                                 blockIdx.x / strips * TERN__SIDE, (float *)(my + 1));
    }
}

static __global__ void tern__group_bias(tern__group_grads p, const float *dy)
{
    TERN__SHARED(tern__group_room, my);
    const int64_t rows = p.a.m.rows;
    tern__count_tiles(p, TERN__DEPTH, my);
    TERN__EACH(row, rows)
        for (int i = 0; i < p.count * p.sets; i++) {
            const int64_t first = my->row[i / p.sets];
            if (p.w[i].dbias)
                tern__bias_column(my->row[i / p.sets + 1] - first, rows, dy + (i % p.sets * p.a.n + first) * rows + row,
                                  p.w[i].dbias + row);
        }
}

static tern_result tern__gpu_groups_dx(tern__gpu *d, const tern_grouped_args *a)
{
    const tern__steps none = tern__no_steps();
    const int64_t columns = tern__ceil_div(a->m.cols, TERN__SIDE);
    const tern__product g = tern__product_of(0, a->m.cols, a->m.rows, tern__strided_of(a->dy, 1, a->m.rows, none), a->dx, a->m.cols, none);
    tern__groups p = tern__groups_for<tern__group_matrix>(a, a->m.cols);
    p.a.y = a->dx;
    return tern__each_group_launch(a, &p, tern__group_matrix_of, [&] {
        const bool low = tern__low_tiles(d, tern__min(p.mean, a->n), tern__mul(tern__ceil_div(a->n, TERN__SIDE), columns * a->sets));
        const unsigned grid = (unsigned)tern__min(2 * d->processors, tern__mul(a->n, columns * a->sets));
        const size_t bytes = sizeof(tern__group_room) + TERN__TILE_BYTES;
        if (low) TERN__LAUNCH(tern__group_dx<1>, grid, TERN__THREADS, bytes, d->stream, p, g);
        else TERN__LAUNCH(tern__group_dx<4>, grid, TERN__THREADS, bytes, d->stream, p, g);
        return TERN_OK;
    });
}

/* Whether no two gradients are the same memory, so that blocks may add to them side by side. */
static bool tern__grads_apart(const tern__group_grads &p)
{
    for (int i = 1; i < p.count * p.sets; i++)
        for (int j = 0; j < i; j++)
            if (p.w[i].dw && p.w[i].dw == p.w[j].dw) return false;
    return true;
}

template <bool Bits> static tern_result tern__gpu_groups_dw(tern_run *r, tern__gpu *d, const tern_grouped_args *a)
{
    const tern__steps none = tern__no_steps();
    const int64_t columns = tern__ceil_div(a->m.cols, TERN__SIDE), high = tern__mul(tern__ceil_div(a->m.rows, TERN__SIDE), columns);
    const bool low = tern__low_tiles(d, a->m.rows, tern__mul(high, (int64_t)a->count * a->sets));
    const int64_t tiles = low ? tern__mul(tern__ceil_div(a->m.rows, TERN__ROW_THREADS), columns) : high;
    const size_t bytes = sizeof(tern__group_room) + TERN__TILE_BYTES;
    tern__product g = tern__product_of(a->m.rows, a->m.cols, 0, tern__strided_of(a->dy, a->m.rows, 1, none), NULL, a->m.cols, none);
    tern__group_grads p = tern__groups_for<tern__group_grad>(a, 0);
    const auto grad_of = [](const tern_param *w) {
        tern__group_grad grad = {tern__floats(w, TERN_GRAD), tern__floats(w->dead, TERN_GRAD)};
        return grad;
    };
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED,
                  "cuda: grouped: a result of %d x %d has %d tiles; %d is the most", a->m.rows, a->m.cols, tiles, (int64_t)INT32_MAX);
    g.add = 1;
    p.a.q = a->q;
    p.a.scale = a->scale;
    return tern__each_group_launch(a, &p, grad_of, [&] {
        const dim3 grid((unsigned)tiles, tern__grads_apart(p) ? (unsigned)(p.count * p.sets) : 1);
        bool dw = false, dbias = false;
        for (int i = 0; i < p.count * p.sets; i++) dw = dw || p.w[i].dw, dbias = dbias || p.w[i].dbias;
        if (dw && low) TERN__LAUNCH((tern__group_dw<Bits, 1>), grid, TERN__THREADS, bytes, d->stream, p, g);
        if (dw && !low) TERN__LAUNCH((tern__group_dw<Bits, 4>), grid, TERN__THREADS, bytes, d->stream, p, g);
        if (dbias) TERN__LAUNCH(tern__group_bias, tern__grid(d, a->m.rows, 64), 64, sizeof(tern__group_room), d->stream, p, a->dy);
        return TERN_OK;
    });
}

static tern_result tern__gpu_grouped(tern_run *r, tern__gpu *d, const tern_grouped_args *a)
{
    if (!a->dy) return tern__gpu_grouped_products(r, d, a);
    TERN__REQUIRE(r, a->m.rows <= INT32_MAX, TERN_E_UNSUPPORTED,
                  "cuda: grouped: sums of %d terms; %d is the most", a->m.rows, (int64_t)INT32_MAX);
    TERN__TRY(a->act == TERN_ACT_BIT ? tern__gpu_groups_dw<true>(r, d, a) : tern__gpu_groups_dw<false>(r, d, a));
    return tern__gpu_groups_dx(d, a);
}

/* -- attention -- */

/* Rows of p, a block to each: softmax of the visible scores, zeros behind them. */
static __global__ void tern__softmax_rows(int64_t rows, int64_t queries, int64_t keys, float *p, float scale)
{
    TERN__SHARED(float, sums);
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t visible = keys - queries + row % queries + 1;
        float *score = p + row * keys;
        uint32_t seen = 0;
        for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) {
            const uint32_t u = tern__to_rank(score[j] * scale);
            seen = u > seen ? u : seen;
        }
        const float largest = tern__from_rank(tern__block_max(seen, (uint32_t *)sums));
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
    TERN__LAUNCH(tern__softmax_rows, tern__grid(d, rows, 1), threads, TERN__BLOCK * sizeof(float), d->stream, rows, a->queries, a->keys,
                 a->p, t->scale);
    g = tern__product_of(a->queries, a->dim, a->keys, tern__strided_of(a->p, 1, a->keys, t->p), a->y, t->width, t->y);
    tern__all_heads(a, &g);
    return tern__gpu_product<false>(r, d, "attention", g, tern__b_floats_of(a->v, a->v_stride, 1, t->v));
}

/* dk = dS^T q, or dv = P^T dy: heads that share a key head add to it in order. */
template <bool Fused>
static tern_result tern__attention_keys(tern_run *r, const tern__gpu *d, const tern_attention_args *a, const tern__attention *t,
                                        const tern__b_floats &b, float *c, int64_t c_row, tern__steps c_steps)
{
    for (int64_t head = 0; head < t->shared; head++) {
        tern__product g = tern__product_of(a->keys, a->dim, a->queries, tern__strided_of(a->p, a->keys, 1, t->p), c, c_row, c_steps);
        tern__one_head_each(a, t, head, &g);
        TERN__TRY(tern__gpu_product<Fused>(r, d, "attention", g, b));
    }
    return TERN_OK;
}

/* dV = P^T dY; dS = P (dY V^T - <dy, y>) / sqrt(dim), in place of P; dQ = dS K; dK = dS^T Q. */
template <bool Fused>
static tern_result tern__attention_back(tern_run *r, const tern__gpu *d, const tern_attention_args *a, const tern__attention *t)
{
    tern__product g = tern__product_of(a->queries, a->keys, a->dim, tern__strided_of(a->dy, 1, t->width, t->y), a->p, a->keys, t->p);
    const int64_t deltas = a->batch * a->queries * a->heads;
    tern__all_heads(a, &g);
    g.delta = a->dq;
    g.delta_row = a->q_stride;
    g.delta_steps = t->q;
    g.factor = t->scale;
    TERN__TRY(tern__attention_keys<Fused>(r, d, a, t, tern__b_floats_of(a->dy, t->width, 1, t->y), a->dv, a->v_stride, t->v));
    TERN__LAUNCH(tern__attention_deltas, tern__grid(d, deltas, TERN__THREADS), TERN__THREADS, 0, d->stream, *a);
    TERN__TRY(tern__gpu_product<Fused>(r, d, "attention", g, tern__b_floats_of(a->v, 1, a->v_stride, t->v)));
    g = tern__product_of(a->queries, a->dim, a->keys, tern__strided_of(a->p, 1, a->keys, t->p), a->dq, a->q_stride, t->q);
    tern__all_heads(a, &g);
    TERN__TRY(tern__gpu_product<Fused>(r, d, "attention", g, tern__b_floats_of(a->k, a->k_stride, 1, t->k)));
    return tern__attention_keys<Fused>(r, d, a, t, tern__b_floats_of(a->q, a->q_stride, 1, t->q), a->dk, a->k_stride, t->k);
}

static tern_result tern__gpu_attention(tern_run *r, tern__gpu *d, const tern_attention_args *a)
{
    const tern__attention t = tern__attention_of(a);
    TERN__TRY(tern__check_row(r, "attention", a->keys));
    if (!a->dy) return tern__attention_run(r, d, a, &t);
    return a->exact ? tern__attention_back<false>(r, d, a, &t) : tern__attention_back<true>(r, d, a, &t);
}

/* ------------------------------------------------------------------------------------------------
   [CUDA-7] Products of int8 with int8
   What enters: int8 matrices with strides. What leaves: int32, exact.
   ------------------------------------------------------------------------------------------------ */

/* Tiles of a and b lie in shared memory by rows (of a) and columns (of b) of 64 inputs. Four pieces of 16 make a row; their
   places change with the row, so that eight lanes meet no bank twice, whether along a row or across rows. */
enum {
    TERN__I8_THREADS = 256, TERN__I8_WARP_ROWS = 2, TERN__I8_WARP_COLS = 4, /* warps of a block */
    TERN__I8_CHUNK = 64, TERN__I8_PIECE = 16, TERN__I8_STAGES = 3
};

static __device__ int8_t *tern__i8_place(int8_t *tile, int row, int piece)
{
    return tile + row * TERN__I8_CHUNK + (piece ^ (row >> 1 & 3)) * TERN__I8_PIECE;
}

/* An operand from the first row of a tile on; inputs lie `input` apart. */
typedef struct tern__i8_operand { const int8_t *p; int64_t row, input; int rows; } tern__i8_operand;

/* 16 inputs from k on, zero beyond the end. */
static __device__ uint4 tern__i8_gather(const int8_t *p, int64_t input, int n)
{
    uint32_t word[4] = {0, 0, 0, 0};
    for (int i = 0; i < TERN__I8_PIECE; i++, p += input)
        if (i < n) word[i / 4] |= (uint32_t)(uint8_t)*p << 8 * (i % 4);
    return make_uint4(word[0], word[1], word[2], word[3]);
}

/* Inputs from k on of all rows of a tile. Neighbouring lanes follow the smaller stride. */
template <int Rows> static __device__ void tern__i8_load(const tern__i8_operand &o, int k, int inputs, int8_t *tile)
{
    enum { PIECES = TERN__I8_CHUNK / TERN__I8_PIECE };
    const bool along = o.input == 1;
    for (int i = (int)threadIdx.x; i < Rows * PIECES; i += TERN__I8_THREADS) {
        const int row = along ? i / PIECES : i % Rows, piece = along ? i % PIECES : i / Rows;
        const int from = k + piece * TERN__I8_PIECE, n = row < o.rows ? inputs - from : 0;
        const int8_t *p = o.p + row * o.row + from * o.input;
        int8_t *to = tern__i8_place(tile, row, piece);
        if (along && n >= TERN__I8_PIECE && (uintptr_t)p % 16 == 0) tern__cp_async16(to, p);
        else *(uint4 *)to = tern__i8_gather(p, o.input, n);
    }
}

/* A warp's product of 64 inputs: 16 Tall rows and 8 Wide columns. The order of inputs is free, so that a lane takes 16
   that lie together: its parts of two products. */
template <int Tall, int Wide> static __device__ void tern__i8_multiply(int8_t *a, int8_t *b, int d[Tall][Wide][4])
{
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    uint4 right[Wide];
    for (int j = 0; j < Wide; j++) right[j] = *(const uint4 *)tern__i8_place(b, 8 * j + g, t);
    for (int i = 0; i < Tall; i++) {
        const uint4 low = *(const uint4 *)tern__i8_place(a, 16 * i + g, t);
        const uint4 high = *(const uint4 *)tern__i8_place(a, 16 * i + 8 + g, t);
        const uint32_t left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
        for (int j = 0; j < Wide; j++) {
            const uint32_t two[2][2] = {{right[j].x, right[j].y}, {right[j].z, right[j].w}};
            tern__mma_s8(d[i][j], left[0], two[0]);
            tern__mma_s8(d[i][j], left[1], two[1]);
        }
    }
}

/* A warp's sums, from row m and column n on. */
template <int Tall, int Wide>
static __device__ void tern__i8_store(const tern_dense_i8_args &a, int64_t m, int64_t n, int d[Tall][Wide][4])
{
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    for (int i = 0; i < Tall * Wide * 4; i++) {
        const int tall = i / 4 / Wide, wide = i / 4 % Wide, at = i % 4;
        const int64_t row = m + 16 * tall + g + 8 * (at / 2), col = n + 8 * wide + 2 * t + at % 2;
        if (row >= a.m || col >= a.n) continue;
        int32_t *c = a.c + row * a.c_row + col;
        *c = (int32_t)((a.add ? (uint32_t)*c : 0) + (uint32_t)d[tall][wide][at]);
    }
}

/* A tile of c to a block of threads; tiles of the same columns follow each other. Three chunks of inputs are in shared memory:
   the one that is multiplied and two under way. */
template <int Tall, int Wide>
static __global__ void __launch_bounds__(TERN__I8_THREADS, Tall > 2 ? 1 : 2) tern__i8_tiles(tern_dense_i8_args a, unsigned down)
{
    enum { ROWS = 16 * Tall * TERN__I8_WARP_ROWS, COLS = 8 * Wide * TERN__I8_WARP_COLS, STAGE = (ROWS + COLS) * TERN__I8_CHUNK };
    TERN__SHARED(int8_t, tiles);
    const int64_t m = (int64_t)(blockIdx.x % down) * ROWS, n = (int64_t)(blockIdx.x / down) * COLS;
    const int inputs = (int)a.k, chunks = (inputs + TERN__I8_CHUNK - 1) / TERN__I8_CHUNK;
    const int warp = (int)threadIdx.x / 32, row = warp / TERN__I8_WARP_COLS * 16 * Tall, col = warp % TERN__I8_WARP_COLS * 8 * Wide;
    const tern__i8_operand left = {a.a + m * a.a_row, a.a_row, a.a_col, (int)tern__min(ROWS, a.m - m)};
    const tern__i8_operand right = {a.b + n * a.b_col, a.b_col, a.b_row, (int)tern__min(COLS, a.n - n)};
    int d[Tall][Wide][4] = {};
    for (int i = 1 - TERN__I8_STAGES; i < chunks; i++) {
        const int next = i + TERN__I8_STAGES - 1;
        int8_t *to = tiles + next % TERN__I8_STAGES * STAGE, *from = tiles + (next + 1) % TERN__I8_STAGES * STAGE;
        if (i >= 0) {
            tern__cp_wait<TERN__I8_STAGES - 2>();
            __syncthreads(); /* chunk i is there for all, and all are done with chunk i - 1, where the next goes */
        }
        if (next < chunks) {
            tern__i8_load<ROWS>(left, next * TERN__I8_CHUNK, inputs, to);
            tern__i8_load<COLS>(right, next * TERN__I8_CHUNK, inputs, to + ROWS * TERN__I8_CHUNK);
        }
        tern__cp_commit();
        if (i >= 0) tern__i8_multiply<Tall, Wide>(from + row * TERN__I8_CHUNK, from + (ROWS + col) * TERN__I8_CHUNK, d);
    }
    tern__i8_store<Tall, Wide>(a, m + row, n + col, d);
}

static int64_t tern__i8_count(const tern_dense_i8_args *a, int64_t tile)
{
    return tern__mul(tern__ceil_div(a->m, tile), tern__ceil_div(a->n, tile));
}

template <int Tall, int Wide> static tern_result tern__i8_launch(tern_run *r, const tern__gpu *d, const tern_dense_i8_args *a)
{
    enum { TILE = 16 * Tall * TERN__I8_WARP_ROWS, SHARED = 2 * TILE * TERN__I8_CHUNK * TERN__I8_STAGES };
    static_assert(TILE == 8 * Wide * TERN__I8_WARP_COLS && SHARED <= 48 * 1024, "tiles are square and fit");
    const int64_t tiles = tern__i8_count(a, TILE);
    TERN__REQUIRE(r, tiles <= INT32_MAX, TERN_E_UNSUPPORTED, "cuda: dense_i8: [%d x %d] has %d tiles of %d; %d is the most",
                  a->m, a->n, tiles, (int64_t)TILE, (int64_t)INT32_MAX);
    TERN__LAUNCH((tern__i8_tiles<Tall, Wide>), (unsigned)tiles, TERN__I8_THREADS, SHARED, d->stream, *a,
                 (unsigned)tern__ceil_div(a->m, TILE));
    return TERN_OK;
}

/* The larger tile reads each operand half as often, where there are enough of them for every processor. */
static tern_result tern__gpu_dense_i8(tern_run *r, tern__gpu *d, const tern_dense_i8_args *a)
{
    return tern__i8_count(a, 128) >= d->processors ? tern__i8_launch<4, 4>(r, d, a) : tern__i8_launch<2, 2>(r, d, a);
}

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
        if (!usable && !(a.holes && id == -1) && threadIdx.x == 0) tern__report(blame, i);
        if (usable && a.m.trits) tern__gather_packed(&a.m, &s, id, wide, y);
        else tern__gather_dense(usable ? a.w + id * a.m.cols : NULL, a.m.cols, wide, y);
        if (!usable || !a.weight) continue;
        __syncthreads(); /* others wrote the row */
        for (int64_t j = threadIdx.x; j < a.m.cols; j += blockDim.x) y[j] = a.weight[i] * y[j];
    }
}

static tern_result tern__gpu_gather(tern_run *r, tern__gpu *d, const tern_gather_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    const int wide = tern__wide(a->w, a->y, 4 * a->m.cols, 4 * s.group);
    (void)r;
    TERN__LAUNCH(tern__gather_rows, tern__grid(d, a->n, 1), TERN__THREADS, 0, d->stream, *a, s, wide,
                 tern__blame_of(d, TERN__FAULT_GATHER));
    return TERN_OK;
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
                list[at + __popc(votes[i] & tern__lanes_below(lane))] = k * (int)blockDim.x + (int)threadIdx.x;
        at += __popc(votes[i]);
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
                for (int k = 0; k < 4; k++) sum[k] = sum[k] + (a.weight ? a.weight[from + list[f]] * x[k] : x[k]);
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
#define TERN__MAP(S, FN, Y, DA, DB)                                        \
    case TERN_MAP_##FN:                                                    \
        for (int k = 0; k < 4; k++) {                                      \
            const float x = xs[k], z = zs[k];                              \
            (void)z;                                                       \
            y[k] = Y;                                                      \
        }                                                                  \
        break;
    TERN__MAPS(TERN__MAP, )
#undef TERN__MAP
    }
}
static __device__ __forceinline__ void tern__map4_back(tern_map_fn fn, float alpha, const float xs[4], const float zs[4],
                                                       const float dys[4], float da[4], float db[4])
{
    switch (fn) {
#define TERN__MAP(S, FN, Y, DA, DB)                                        \
    case TERN_MAP_##FN:                                                    \
        for (int k = 0; k < 4; k++) {                                      \
            const float x = xs[k], z = zs[k], dy = dys[k];                 \
            (void)x; (void)z; (void)dy;                                    \
            da[k] = DA;                                                    \
            db[k] = DB;                                                    \
        }                                                                  \
        break;
    TERN__MAPS(TERN__MAP, )
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

static __device__ float tern__norm_factor(const tern_norm_args &a, int64_t t, float *sums, tern__blame blame)
{
    const float r = tern__rms<tern__block_team>(a.cols, a.x + t * a.cols, a.eps, sums);
    if (!(r > 0.0f) && threadIdx.x == 0) tern__report(blame, t);
    return r;
}

static __global__ void __launch_bounds__(1024) tern__norm_rows(tern_norm_args a, int wide, tern__blame blame)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float r = tern__norm_factor(a, t, sums, blame);
        if (!a.dy) tern__norm_row(&a, t, r, wide);
        else if (a.dx) tern__norm_row_back(&a, t, r, sums, wide);
    }
}

static __global__ void __launch_bounds__(1024) tern__norm_factors(tern_norm_args a, float *factors)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float r = tern__rms<tern__block_team>(a.cols, a.x + t * a.cols, a.eps, sums);
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
        TERN__LAUNCH(tern__norm_factors, tern__grid(d, piece.n, 1), tern__row_threads(a->cols), tern__row_shared(a->cols), d->stream,
                     piece, d->work);
        TERN__LAUNCH(tern__norm_gain_columns, (unsigned)tern__ceil_div(a->cols, 32), TERN__THREADS, TERN__GAIN_TOKENS * 32 * sizeof(float),
                     d->stream, piece, d->work);
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

/* -- Hadamard rotation: a block to a row, in shared memory where it fits -- */

enum { TERN__ROTATED_HERE = 8192 }; /* columns */

static __device__ void tern__rotate_part(float *v, int64_t p, float factor)
{
    for (int i = (int)threadIdx.x; i < p; i += (int)blockDim.x) v[i] = v[i] * factor;
    __syncthreads();
    for (int distance = 1; distance < p; distance *= 2) {
        for (int i = (int)threadIdx.x; i < p / 2; i += (int)blockDim.x) {
            float *const at = v + i / distance * 2 * distance + i % distance;
            const float a = at[0], b = at[distance];
            at[0] = a + b;
            at[distance] = a - b;
        }
        __syncthreads();
    }
}

static __device__ float tern__flipped(uint32_t seed, int i, float x)
{
    uint32_t words[4], word = 0;
    tern__philox(seed, (uint64_t)(i / 128), 0, TERN__ROTATION, words);
    for (int k = 0; k < 4; k++) if (i / 32 % 4 == k) word = words[k]; /* registers have no index */
    return word >> i % 32 & 1 ? -x : x;
}

static __global__ void tern__hadamard_rows(tern_hadamard_args a, int64_t p, float factor)
{
    TERN__SHARED(float, room);
    const int64_t rest = a.cols - p;
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *x = a.x + t * a.cols;
        float *y = a.y + t * a.cols, *v = a.cols <= TERN__ROTATED_HERE ? room : y;
        for (int i = (int)threadIdx.x; i < a.cols; i += (int)blockDim.x) v[i] = a.inverse ? x[i] : tern__flipped(a.seed, i, x[i]);
        __syncthreads();
        if (rest && a.inverse) tern__rotate_part(v + rest, p, factor);
        tern__rotate_part(v, p, factor);
        if (rest && !a.inverse) tern__rotate_part(v + rest, p, factor);
        for (int i = (int)threadIdx.x; i < a.cols; i += (int)blockDim.x) y[i] = a.inverse ? tern__flipped(a.seed, i, v[i]) : v[i];
        __syncthreads(); /* room may be written again */
    }
}

static tern_result tern__gpu_hadamard(tern_run *r, tern__gpu *d, const tern_hadamard_args *a)
{
    const int64_t p = tern__power_below(a->cols);
    const int64_t here = a->cols <= TERN__ROTATED_HERE ? a->cols : 1;
    (void)r;
    TERN__LAUNCH(tern__hadamard_rows, tern__grid(d, a->n, 1), TERN__THREADS, sizeof(float) * (size_t)here, d->stream, *a, p,
                 tern__rotation_factor(p));
    return TERN_OK;
}

/* -- the dead zone of a matrix: a block to a row -- */

static __device__ bool tern__is_dead(const tern_matrix *m, const tern__shape *s, int64_t row, int col)
{
    const int group = (int)s->group, unit = (int)s->unit, g = col / group, in_group = col - g * group, in = in_group % unit;
    const int64_t u = (int64_t)g * s->group_units + in_group / unit;
    const uint8_t *panel = (const uint8_t *)m->trits + row / TERN__ROWS * s->panel_bytes;
    uint32_t code = panel[u * TERN__UNIT + row % TERN__ROWS * 4 + in % 4];
    if (m->encoding != TERN_BASE3) return (code >> 2 * (in / 4) & 3) == 1;
    for (int digit = 0; digit < in / 4; digit++) code /= 3;
    return code % 3 == 1;
}

static __global__ void tern__dead_zone_rows(tern_dead_zone_args a, tern__shape s)
{
    TERN__SHARED(float, sums);
    for (int64_t row = blockIdx.x; row < a.m.rows; row += gridDim.x) {
        const int64_t at = row * a.m.cols;
        const float slope = a.dw ? a.lambda * a.dbias[row] : 0.0f;
        for (int i = (int)threadIdx.x; a.dw && i < a.m.cols; i += (int)blockDim.x)
            if (tern__is_dead(&a.m, &s, row, i)) a.dw[at + i] = a.dw[at + i] + slope;
        if (!a.bias) continue;
        const float sum = tern__block_sum(a.m.cols, [&](int64_t i) {
            return tern__is_dead(&a.m, &s, row, (int)i) ? tern__load_float(a.type, a.w, at + i) : 0.0f;
        }, sums);
        if (threadIdx.x == 0) a.bias[row] = a.lambda * sum;
    }
}

static tern_result tern__gpu_dead_zone(tern_run *r, tern__gpu *d, const tern_dead_zone_args *a)
{
    (void)r;
    TERN__LAUNCH(tern__dead_zone_rows, tern__grid(d, a->m.rows, 1), tern__row_threads(a->m.cols), tern__row_shared(a->m.cols), d->stream,
                 *a, tern__shape_of(&a->m));
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
    tern__gpu_total(d, (int)a->kind, a->count, a->type, a->x, d->work, a->y, a->add);
    return TERN_OK;
}

/* -- optimizers -- */

static __device__ __forceinline__ void tern__optimize4(const tern_optimize_args *a, float factor, float correct1, float correct2, int64_t i,
                                                       int n, int wide)
{
    const int adam = a->kind == TERN_ADAMW;
    float w[4], grad[4], moment1[4] = {0.0f, 0.0f, 0.0f, 0.0f}, moment2[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    uint32_t random[4] = {0, 0, 0, 0}, moments[4] = {0, 0, 0, 0};
    tern__load4(a->type, a->w, i, n, wide, w);
    tern__load4(TERN_F32, a->grad, i, n, wide, grad);
    if (a->moment1) tern__load4(a->moment_type, a->moment1, i, n, wide, moment1);
    if (adam) tern__load4(a->moment_type, a->moment2, i, n, wide, moment2);
    if (a->moment_type == TERN_BF16) tern__moment_random(a, i >> 2, moments);
    if (a->type == TERN_BF16) tern__philox(a->seed, (uint64_t)(i >> 2), a->step, a->stream, random);
    for (int k = 0; k < 4; k++) {
        tern__trained e = {w[k], grad[k], moment1[k], moment2[k]};
        tern__optimize_one(a, factor, correct1, correct2, &e);
        w[k] = a->type == TERN_BF16 && !a->nearest ? tern__stochastic(e.w, random[k]) : e.w;
        grad[k] = e.grad;
        moment1[k] = tern__moment_rounded(a, e.moment1, moments[k]);
        moment2[k] = tern__moment_rounded(a, e.moment2, moments[k] >> 16);
    }
    tern__store4(a->type, a->w, i, n, wide, w);
    tern__store4(TERN_F32, a->grad, i, n, wide, grad);
    if (a->moment1) tern__store4(a->moment_type, a->moment1, i, n, wide, moment1);
    if (adam) tern__store4(a->moment_type, a->moment2, i, n, wide, moment2);
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

/* -- learned scales -- */

/* Sums of rows, a block of threads to each. */
static __global__ void tern__scale_rows(tern_scale_grad_args a, tern__shape s, float *sums)
{
    TERN__SHARED(float, room);
    for (int64_t row = blockIdx.x; row < a.m.rows; row += gridDim.x) {
        const float scale = tern__load_scale(a.m.scale_type, a.m.scales, tern__scale_index(&a.m, &s, row, 0));
        const uint8_t *codes = (const uint8_t *)a.m.trits + row / TERN__ROWS * s.panel_bytes + row % TERN__ROWS * 4;
        const float sum = tern__block_sum(a.m.cols, [&](int64_t i) {
            const int unit = (int)i / (int)s.unit, at = (int)i % (int)s.unit;
            const float trit = tern__digit(a.m.encoding, codes[unit * TERN__UNIT + at % 4], at / 4);
            return tern__scale_term(&a, tern__load_float(a.type, a.w, row * a.m.cols + i), scale, trit, a.dw[row * a.m.cols + i]);
        }, room);
        if (threadIdx.x == 0) sums[row] = sum;
    }
}

static __global__ void tern__scale_add(int64_t n, const float *sums, float factor, float *dalpha)
{
    TERN__EACH(i, n) dalpha[i] += sums[i] * factor;
}

static tern_result tern__gpu_scale_grad(tern_run *r, tern__gpu *d, const tern_scale_grad_args *a)
{
    float *total = d->work + TERN__WORK + TERN__WORK_LEVELS / 2;
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__REQUIRE(r, a->m.rows <= TERN__WORK, TERN_E_UNSUPPORTED,
                  "cuda: scale_grad: %d rows; %d is the most", a->m.rows, (int64_t)TERN__WORK);
    TERN__LAUNCH(tern__scale_rows, tern__grid(d, a->m.rows, 1), TERN__THREADS, TERN__BLOCK * sizeof(float), d->stream, *a,
                 tern__shape_of(&a->m), d->work);
    if (a->rule == TERN_LSQ) {
        tern__gpu_total(d, TERN_SUM, a->m.rows, TERN_F32, d->work, d->work + TERN__WORK, total, 0);
        TERN__LAUNCH(tern__scale_add, 1, 1, 0, d->stream, (int64_t)1, total, tern__scale_factor(a), a->dalpha);
    } else
        TERN__LAUNCH(tern__scale_add, tern__grid(d, a->m.rows, TERN__THREADS), TERN__THREADS, 0, d->stream, a->m.rows, d->work,
                     tern__scale_factor(a), a->dalpha);
    return TERN_OK;
}

/* -- stochastic rounding to int8, and back -- */

static __device__ float tern__round_gain(const tern_round_i8_args &a, const tern__shape &s, int64_t i)
{
    return tern__load_scale(a.m.scale_type, a.m.scales, tern__scale_index(&a.m, &s, i, a.group));
}

/* Bits of the largest |v| of a row, in all threads: rounding keeps the order, so that the row's factor comes last. */
static __device__ uint32_t tern__round_size(const tern_round_i8_args &a, const tern__shape &s, int64_t t, uint32_t *seen)
{
    const float *x = a.x + t * a.cols;
    const uint32_t most = tern__block_absmax(a.cols, [&](int64_t i) { return a.m.scales ? x[i] * tern__round_gain(a, s, i) : x[i]; }, seen);
    return a.row ? tern__bits(tern__float(most) * a.row[t]) & 0x7FFFFFFFu : most;
}

/* Of whole tensors: the largest of all rows. */
static __global__ void tern__round_whole(tern_round_i8_args a, tern__shape s, uint32_t *most, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const uint32_t size = tern__round_size(a, s, t, seen);
        if (threadIdx.x > 0) continue;
        atomicMax(most, size);
        if (!tern__finite(tern__float(size))) tern__report(blame, t);
    }
}

/* A thread rounds the eight numbers that share a block of Philox, in two fours. */
static __device__ void tern__round_row(const tern_round_i8_args &a, const tern__shape &s, int64_t t, float inverse, int wide)
{
    const int64_t blocks = tern__ceil_div(a.cols, 8);
    const float *x = a.x + t * a.cols, row = a.row ? a.row[t] : 1.0f;
    int8_t *q = a.q + t * a.cols;
    for (int64_t b = threadIdx.x; b < blocks; b += blockDim.x) {
        uint32_t words[4];
        tern__philox(a.seed, (uint64_t)(t * blocks + b), TERN__ROUNDING, a.stream, words);
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
            const int64_t i = 8 * b + half;
            const int n = (int)tern__max(0, tern__min(4, a.cols - i));
            float v[4];
            int8_t rounded[4];
            tern__load4(TERN_F32, x, i, n, wide, v);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (a.m.scales && k < n) v[k] = v[k] * tern__round_gain(a, s, i + k);
                rounded[k] = inverse == 0.0f ? 0 : tern__round_up(v[k] * row * inverse, tern__half(words, half + k));
            }
            tern__store_bytes(q + i, n, rounded);
        }
    }
}

/* most: of the whole tensor, or NULL. */
static __global__ void tern__round_tokens(tern_round_i8_args a, tern__shape s, const uint32_t *most, int wide, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const uint32_t size = most ? *most : tern__round_size(a, s, t, seen);
        float inverse;
        const float scale = tern__round_scale(size, &inverse);
        if (threadIdx.x == 0 && (t == 0 || !most)) a.scale[t] = scale;
        if (threadIdx.x == 0 && !most && !tern__finite(tern__float(size))) tern__report(blame, t);
        tern__round_row(a, s, t, inverse, wide);
    }
}

static tern_result tern__gpu_round_i8(tern_run *r, tern__gpu *d, const tern_round_i8_args *a)
{
    const int threads = 32 * (int)tern__min(TERN__WARPS, tern__ceil_div(a->cols, 256)), wide = tern__wide(a->x, 4 * a->cols);
    const unsigned grid = tern__grid(d, a->n, 1);
    const size_t room = TERN__WARPS * sizeof(uint32_t);
    const tern__blame blame = tern__blame_of(d, TERN__FAULT_ROUND);
    uint32_t *most = a->whole ? (uint32_t *)d->work : NULL;
    tern__shape s;
    memset(&s, 0, sizeof s);
    if (a->m.scales) s = tern__shape_of(&a->m);
    if (most) TERN__CUDA(r, cudaMemsetAsync(most, 0, sizeof *most, d->stream), "clearing work memory");
    if (most) TERN__LAUNCH(tern__round_whole, grid, threads, room, d->stream, *a, s, most, blame);
    TERN__LAUNCH(tern__round_tokens, grid, threads, room, d->stream, *a, s, most, wide, blame);
    return TERN_OK;
}

/* Words of int32 travel as those of floats do. */
static __global__ void tern__dequantize_fours(tern_dequantize_args a, int wide)
{
    const int64_t fours = tern__ceil_div(a.cols, 4);
    TERN__EACH(item, a.n * fours) {
        const int64_t t = item / fours, i = (item - t * fours) * 4;
        const int n = (int)tern__min(4, a.cols - i);
        const float scale = a.scale[a.whole ? 0 : t];
        float x[4], y[4];
        tern__load4(TERN_F32, a.x + t * a.cols, i, n, wide, x);
        if (a.add) tern__load4(TERN_F32, a.y + t * a.y_row, i, n, wide, y);
        for (int k = 0; k < 4; k++) {
            const float v = (float)(int32_t)tern__bits(x[k]) * scale;
            y[k] = a.add ? y[k] + v : v;
        }
        tern__store4(TERN_F32, a.y + t * a.y_row, i, n, wide, y);
    }
}

static tern_result tern__gpu_dequantize(tern_run *r, tern__gpu *d, const tern_dequantize_args *a)
{
    (void)r;
    TERN__LAUNCH(tern__dequantize_fours, tern__grid(d, a->n * tern__ceil_div(a->cols, 4), TERN__THREADS), TERN__THREADS, 0, d->stream, *a,
                 tern__wide(a->x, a->y, 4 * a->cols, 4 * a->y_row));
    return TERN_OK;
}

/* -- flips: a thread takes a row's word of a unit, a block some groups of a panel -- */

/* What a step of a matrix adds to its counts, and the score of the tensor's scale. */
typedef struct tern__flip_sums { unsigned long long flips, grains, saturated, scales, ends, score; } tern__flip_sums;

enum { TERN__FLIP_GROUPS = 32 }; /* of a block, at most: grains whose score and flips lie in shared memory */
typedef struct tern__flip_room {
    int score[TERN__FLIP_GROUPS * TERN__ROWS], flipped[TERN__FLIP_GROUPS * TERN__ROWS], events[2];
} tern__flip_room;

/* The words of random halves that a weight's block has: they change at every eighth column. */
typedef struct tern__halves { int64_t block; uint32_t words[4]; } tern__halves;

static __device__ uint32_t tern__next_half(const tern__random &r, int64_t row_block, int64_t col, tern__halves *h)
{
    const int64_t block = row_block + col / 8;
    const int which = (int)(col % 8);
    if (block != h->block) tern__philox(r.seed, (uint64_t)(h->block = block), r.step, r.stream, h->words);
    const uint32_t low = which & 2 ? h->words[1] : h->words[0], high = which & 2 ? h->words[3] : h->words[2]; /* registers have no index */
    return (which & 4 ? high : low) >> 16 * (which & 1) & 0xFFFF;
}

/* Four inputs of a word: their trits are the next digits of its four bytes. */
static __device__ void tern__flip_four(const tern_flip_args &a, const tern__push &push, int64_t row, int64_t col, int n, int wide,
                                       tern__halves *h, int8_t trit[4], int *score, int events[2])
{
    const int64_t at = row * a.m.cols + col, row_block = row * tern__ceil_div(a.m.cols, 8);
    const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float grad[4];
    int8_t accum[4];
    tern__load4(TERN_F32, a.grad, at, n, wide, grad);
    tern__load_bytes(a.accum + at, n, accum);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (k >= n) continue;
        *score += trit[k] * ((grad[k] > 0.0f) - (grad[k] < 0.0f));
        const int event =
            tern__push_one(&push, push.sign ? 0 : tern__next_half(push.random, row_block, col + k, h), grad[k], &accum[k], &trit[k]);
        events[0] += event == 1;
        events[1] += event == 2;
    }
    tern__store_bytes(a.accum + at, n, accum);
    tern__store4(TERN_F32, a.grad, at, n, wide, zeros);
}

/* A word of a row's unit. Returns how many of its trits change. */
template <bool Base3>
static __device__ int tern__flip_word(const tern_flip_args &a, const tern__push &push, const tern__shape &s, const tern__word &w, int wide,
                                      int *score, int *saturated)
{
    const int radix = Base3 ? 3 : 4;
    uint32_t *const at = tern__word_of(&a.m, &s, w.row, w.unit), word = *at;
    uint32_t left[4], after = 0, place = 1;
    tern__halves h;
    int events[2] = {0, 0};
    h.block = -1;
    for (int j = 0; j < 4; j++) left[j] = word >> 8 * j & 255;
    for (int i = 0; i < (Base3 ? 20 : 16); i += 4, place *= radix) {
        int8_t trit[4];
        for (int j = 0; j < 4; j++) trit[j] = (int8_t)((int)(left[j] % radix) - 1);
        if (i < w.inputs) tern__flip_four(a, push, w.row, w.col + i, (int)tern__min(4, w.inputs - i), wide, &h, trit, score, events);
        for (int j = 0; j < 4; j++) {
            left[j] /= radix;
            after += place * (uint32_t)(trit[j] + 1) << 8 * j;
        }
    }
    if (after != word) *at = after;
    *saturated += events[1];
    return events[0];
}

/* Without a step there is nothing but the gradient to clear. */
static __device__ void tern__clear_word(const tern_flip_args &a, const tern__word &w, int wide)
{
    const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int i = 0; i < w.inputs; i += 4)
        tern__store4(TERN_F32, a.grad, w.row * a.m.cols + w.col + i, (int)tern__min(4, w.inputs - i), wide, zeros);
}

/* The ends of the block's grains: votes and counts. The tensor's own score and grain come later. */
static __device__ void tern__flip_grains(const tern_flip_args &a, const tern__shape &s, int64_t panel, int64_t first, int64_t groups,
                                         const tern__flip_room *room, tern__flip_sums *sums)
{
    for (int i = (int)threadIdx.x; i < groups * TERN__ROWS; i += TERN__THREADS) {
        const int64_t row = panel * TERN__ROWS + i % TERN__ROWS, at = tern__scale_index(&a.m, &s, row, first + i / TERN__ROWS);
        if (row >= a.m.rows) continue;
        if (a.m.grain == TERN_PER_TENSOR) atomicAdd(&sums->score, (unsigned long long)(long long)room->score[i]);
        else {
            const int vote = a.scale_step ? tern__vote(&a, room->score[i], at) : 0;
            if (vote) atomicAdd(vote == 1 ? &sums->scales : &sums->ends, 1ull);
            if (room->flipped[i]) atomicAdd(&sums->grains, 1ull);
        }
    }
    if (threadIdx.x == 0 && room->events[0]) atomicAdd(&sums->flips, (unsigned long long)room->events[0]);
    if (threadIdx.x == 0 && room->events[1]) atomicAdd(&sums->saturated, (unsigned long long)room->events[1]);
}

template <bool Base3>
static __global__ void __launch_bounds__(TERN__THREADS, 2)
    tern__flip_panels(tern_flip_args a, tern__shape s, int64_t parts, int wide, tern__flip_sums *sums)
{
    TERN__SHARED(tern__flip_room, room);
    const int64_t each = tern__min(s.groups, TERN__FLIP_GROUPS);
    tern__push push;
    const bool step = tern__push_of(&a, &push);
    for (int64_t item = blockIdx.x; item < s.panels * parts; item += gridDim.x) {
        const int64_t panel = item / parts, first = item % parts * each, groups = tern__min(each, s.groups - first);
        const int begin = (int)(first * s.group_units), end = (int)tern__min(s.units, (first + groups) * s.group_units);
        for (int i = (int)threadIdx.x; i < (int)(sizeof *room / sizeof(int)); i += TERN__THREADS) ((int *)room)[i] = 0;
        __syncthreads();
        for (int i = begin * TERN__ROWS + (int)threadIdx.x; i < end * TERN__ROWS; i += TERN__THREADS) {
            const tern__word w = tern__word_at(&a.m, &s, panel, i);
            const int grain = (int)(w.group - first) * TERN__ROWS + i % TERN__ROWS;
            int score = 0, saturated = 0;
            if (w.row >= a.m.rows) continue;
            if (!step) {
                tern__clear_word(a, w, wide);
                continue;
            }
            const int flips = tern__flip_word<Base3>(a, push, s, w, wide, &score, &saturated);
            if (a.scale_step && score) atomicAdd(&room->score[grain], score);
            if (flips) room->flipped[grain] = 1;
            if (flips) atomicAdd(&room->events[0], flips);
            if (saturated) atomicAdd(&room->events[1], saturated);
        }
        __syncthreads();
        if (step) tern__flip_grains(a, s, panel, first, groups, room, sums);
        __syncthreads(); /* room may be written again */
    }
}

static __global__ void tern__flip_end(tern_flip_args a, tern__flip_sums *sums, tern__blame blame)
{
    tern__push push;
    const int step = tern__push_of(&a, &push), tensor = a.m.grain == TERN_PER_TENSOR;
    if (step && tensor && a.scale_step) {
        const int vote = tern__vote(&a, (int64_t)sums->score, 0);
        sums->scales += vote == 1;
        sums->ends += vote == 2;
    }
    if (!tern__finite(*a.sum_abs)) tern__report(blame, (int64_t)a.step);
    if (!a.counts) return;
    a.counts->flips += (int64_t)sums->flips;
    a.counts->grains += tensor ? sums->flips > 0 : (int64_t)sums->grains;
    a.counts->saturated += (int64_t)sums->saturated;
    a.counts->scales += (int64_t)sums->scales;
    a.counts->ends += (int64_t)sums->ends;
    a.counts->updates += step;
    a.counts->skipped += !step;
}

static tern_result tern__gpu_flip(tern_run *r, tern__gpu *d, const tern_flip_args *a)
{
    const tern__shape s = tern__shape_of(&a->m);
    const int64_t parts = tern__ceil_div(s.groups, TERN__FLIP_GROUPS);
    tern__flip_sums *sums = (tern__flip_sums *)d->work;
    TERN__TRY(tern__check_aligned16(r, "m.trits", a->m.trits));
    TERN__CUDA(r, cudaMemsetAsync(sums, 0, sizeof *sums, d->stream), "clearing work memory");
    TERN__LAUNCH((a->m.encoding == TERN_BASE3 ? tern__flip_panels<true> : tern__flip_panels<false>),
                 tern__grid(d, tern__mul(s.panels, parts), 1), TERN__THREADS, sizeof(tern__flip_room), d->stream, *a, s, parts,
                 tern__wide(a->grad, 4 * a->m.cols, 4 * s.group), sums);
    TERN__LAUNCH(tern__flip_end, 1, 1, 0, d->stream, *a, sums, tern__blame_of(d, TERN__FAULT_FLIP));
    return TERN_OK;
}

/* -- routing: a warp to a token -- */

enum { TERN__ROUTE_THREADS = 128 };

/* What the softmax of a token's logits is made of. */
typedef struct tern__routed { float largest, sum; } tern__routed;

static __device__ float tern__route_power(const float *x, int i, const tern__routed &s) { return tern__exp(x[i] - s.largest); }
static __device__ float tern__route_share(const float *x, int i, const tern__routed &s) { return tern__route_power(x, i, s) / s.sum; }

/* Whether a token's logits are finite; their softmax. */
static __device__ bool tern__route_softmax_of(int count, const float *x, tern__routed *s)
{
    uint32_t size = 0, rank = 0;
    for (int i = (int)(threadIdx.x % 32); i < count; i += 32) {
        const uint32_t mine = tern__bits(tern__abs(x[i])), place = tern__to_rank(x[i]);
        size = mine > size ? mine : size;
        rank = place > rank ? place : rank;
    }
    size = tern__warp_most(size);
    s->largest = tern__from_rank(tern__warp_most(rank));
    s->sum = tern__warp_sum(count, [&](int i) { return tern__route_power(x, i, *s); });
    return tern__finite(tern__float(size));
}

/* Zeros of either sign are equal. */
static __device__ uint32_t tern__route_rank(float x) { return tern__to_rank(x == 0.0f ? 0.0f : x); }

/* How many logits are of at least this rank. */
static __device__ int tern__route_count(int count, const float *x, uint32_t rank)
{
    int n = 0;
    for (int i = (int)(threadIdx.x % 32); i < count; i += 32) n += tern__route_rank(x[i]) >= rank;
    return tern__warp_count(n);
}

/* The ids of the k largest, ascending: all above the k-th largest rank, found bit by bit, and the first of those that are equal. */
static __device__ void tern__route_ids(int count, int k, const float *x, int32_t *ids)
{
    const int lane = (int)(threadIdx.x % 32);
    uint32_t limit = 0;
    int at = 0;
    for (int bit = 31; bit >= 0; bit--)
        if (tern__route_count(count, x, limit | 1u << bit) >= k) limit |= 1u << bit;
    int equal = k - tern__route_count(count, x, limit + 1); /* ranks of finite numbers are not the largest word */
    for (int from = 0; from < count; from += 32) {
        const int i = from + lane;
        const uint32_t rank = i < count ? tern__route_rank(x[i]) : 0, same = __ballot_sync(TERN__ALL_LANES, i < count && rank == limit);
        const bool chosen = i < count && (rank > limit || (rank == limit && __popc(same & tern__lanes_below(lane)) < equal));
        const uint32_t all = __ballot_sync(TERN__ALL_LANES, chosen);
        if (chosen) ids[at + __popc(all & tern__lanes_below(lane))] = i;
        at += __popc(all);
        equal = (int)tern__max(0, equal - __popc(same));
    }
    __syncwarp();
}

static __device__ void tern__route_token_weights(const tern_route_args &a, const float *x, tern__routed s, const int32_t *ids,
                                                 float *weights)
{
    const int k = a.k;
    const bool selected = a.kind == TERN_ROUTE_SELECTED;
    if (selected) s.sum = tern__warp_sum(k, [&](int i) { return tern__route_power(x, ids[i], s); });
    const float sum = a.kind == TERN_ROUTE_RENORMALIZED ? tern__warp_sum(k, [&](int i) { return tern__route_share(x, ids[i], s); }) : 1.0f;
    for (int i = (int)(threadIdx.x % 32); i < k; i += 32) weights[i] = tern__route_share(x, ids[i], s) / sum;
}

/* Token t, by a warp. */
static __device__ void tern__route_token(const tern_route_args &a, int64_t t, tern__blame blame)
{
    const int lane = (int)(threadIdx.x % 32);
    const float *x = a.logits + t * a.count;
    int32_t *ids = a.ids + t * a.k;
    float *weights = a.weights + t * a.k;
    tern__routed s;
    if (tern__route_softmax_of(a.count, x, &s)) {
        tern__route_ids(a.count, a.k, x, ids);
        tern__route_token_weights(a, x, s, ids, weights);
        return;
    }
    if (lane == 0) tern__report(blame, t);
    for (int i = lane; i < a.k; i += 32) {
        ids[i] = -1;
        weights[i] = 0.0f;
    }
}

static __global__ void __launch_bounds__(TERN__ROUTE_THREADS, 4) tern__route_tokens(tern_route_args a, tern__blame blame)
{
    const int warps = TERN__ROUTE_THREADS / 32;
    for (int64_t t = (int64_t)blockIdx.x * warps + threadIdx.x / 32; t < a.n; t += (int64_t)gridDim.x * warps)
        tern__route_token(a, t, blame);
}

static __global__ void __launch_bounds__(TERN__ROUTE_THREADS, 4)
    tern__route_tokens_back(tern_route_args a, float balance, tern__blame blame)
{
    const int lane = (int)(threadIdx.x % 32), warps = TERN__ROUTE_THREADS / 32;
    for (int64_t t = (int64_t)blockIdx.x * warps + threadIdx.x / 32; t < a.n; t += (int64_t)gridDim.x * warps) {
        const float *x = a.logits + t * a.count, *weights = a.weights + t * a.k, *dw = a.dweights + t * a.k;
        const int32_t *ids = a.ids + t * a.k;
        float *dx = a.dlogits + t * a.count;
        tern__routed s;
        const bool usable = tern__route_softmax_of(a.count, x, &s);
        const float sum = tern__warp_sum(a.k, [&](int i) { return weights[i] * dw[i]; });
        const auto pull = [&](int i) { return balance * (float)a.loads[i]; }; /* of the load-balance loss on a share */
        if (!usable && lane == 0) tern__report(blame, t);
        for (int i = lane; i < a.count; i += 32)
            dx[i] = usable && a.kind == TERN_ROUTE_ALL ? tern__route_share(x, i, s) * (0.0f - sum) : 0.0f;
        __syncwarp();
        for (int i = lane; i < a.k && usable; i += 32) dx[ids[i]] = weights[i] * (dw[i] - sum);
        __syncwarp();
        if (!usable || !a.loads) continue;
        const float mean = tern__warp_sum(a.count, [&](int i) { return tern__route_share(x, i, s) * pull(i); });
        for (int i = lane; i < a.count; i += 32) dx[i] = dx[i] + tern__route_share(x, i, s) * (pull(i) - mean);
    }
}

static tern_result tern__gpu_route(tern_run *r, tern__gpu *d, const tern_route_args *a)
{
    const unsigned grid = tern__grid(d, a->n, TERN__ROUTE_THREADS / 32);
    const tern__blame blame = tern__blame_of(d, TERN__FAULT_ROUTE);
    (void)r;
    if (a->dweights) TERN__LAUNCH(tern__route_tokens_back, grid, TERN__ROUTE_THREADS, 0, d->stream, *a, tern__balance_factor(a), blame);
    else TERN__LAUNCH(tern__route_tokens, grid, TERN__ROUTE_THREADS, 0, d->stream, *a, blame);
    return TERN_OK;
}

/* -- grouping: a block to an expert, in a shape that does not depend on the routing -- */

static __device__ void tern__group_slot(const tern_group_args &a, int64_t at, int64_t slot)
{
    a.tokens[at] = slot < 0 ? -1 : (int32_t)(slot / a.k);
    a.slots[at] = (int32_t)slot;
    if (a.sorted) a.sorted[at] = slot < 0 ? 0.0f : a.weights[slot];
}

/* How many ids of the slots are `low` to `high`, in all threads. */
static __device__ int tern__group_count(const int32_t *ids, int64_t slots, int32_t low, int32_t high, uint32_t *seen)
{
    int n = 0, all = 0;
    for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) n += ids[i] >= low && ids[i] <= high;
    n = tern__warp_count(n);
    if (threadIdx.x % 32 == 0) seen[threadIdx.x / 32] = (uint32_t)n;
    __syncthreads();
    for (int i = 0; i < TERN__WARPS; i++) all += (int)seen[i];
    __syncthreads();
    return all;
}

/* list: shared memory as for tern__find. */
static __global__ void __launch_bounds__(TERN__THREADS, 4) tern__group_experts(tern_group_args a)
{
    TERN__SHARED(int32_t, list);
    const int span = 4 * TERN__THREADS, expert = (int)blockIdx.x;
    uint32_t *votes = (uint32_t *)(list + span);
    const int64_t slots = a.n * a.k;
    const int load = tern__group_count(a.ids, slots, expert, expert, votes);
    if (threadIdx.x == 0) a.loads[expert] = load;
    for (int64_t t = threadIdx.x; a.dense && t < a.n; t += TERN__THREADS) {
        int64_t slot = -1;
        for (int64_t i = t * a.k; i < (t + 1) * a.k; i++)
            if (a.ids[i] == expert) slot = i;
        tern__group_slot(a, expert * a.n + t, slot);
    }
    if (a.dense) return;
    int64_t at = tern__group_count(a.ids, slots, 0, expert - 1, votes);
    for (int64_t from = 0; from < slots; from += span) {
        const int found = tern__find(a.ids, from, slots, expert, votes, list);
        for (int f = (int)threadIdx.x; f < found; f += TERN__THREADS) tern__group_slot(a, at + f, from + list[f]);
        at += found;
    }
    for (int64_t i = at + threadIdx.x; expert == a.count - 1 && i < slots; i += TERN__THREADS) tern__group_slot(a, i, -1);
}

static tern_result tern__gpu_group(tern_run *r, tern__gpu *d, const tern_group_args *a)
{
    (void)r;
    TERN__LAUNCH(tern__group_experts, (unsigned)a->count, TERN__THREADS, sizeof(int32_t) * (4 * TERN__THREADS + TERN__THREADS / 8),
                 d->stream, *a);
    return TERN_OK;
}

/* -- dots of rows -- */

static __global__ void __launch_bounds__(1024) tern__row_dots(tern_row_dot_args a)
{
    TERN__SHARED(float, sums);
    for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
        const int32_t id = a.ids[i], to = a.to[i];
        if (id < 0 || id >= a.rows || to < 0 || to >= a.count) continue;
        const float *x = a.a + id * a.cols, *y = a.b + i * a.cols;
        const float sum = tern__block_sum(a.cols, [&](int64_t j) { return x[j] * y[j]; }, sums);
        if (threadIdx.x == 0) a.y[to] = sum;
    }
}

static tern_result tern__gpu_row_dot(tern_run *r, tern__gpu *d, const tern_row_dot_args *a)
{
    TERN__TRY(tern__check_row(r, "row_dot", a->cols));
    TERN__LAUNCH(tern__row_dots, tern__grid(d, a->n, 1), tern__row_threads(a->cols), tern__row_shared(a->cols), d->stream, *a);
    return TERN_OK;
}

/* -- sums over the edges of a graph: a block to a row, a thread to four of its columns -- */

/* Columns [i, i + n) of the row at an edge's other end. */
static __device__ __forceinline__ void tern__edge_row(const tern_aggregate_args &a, uint32_t entry, int64_t i, int n, int wide, float x[4])
{
    const int64_t u = tern__edge_node(entry);
    if (a.q) {
        const uint32_t four = *(const uint32_t *)(const void *)(a.q + u * a.q_row + i); /* rows end at multiples of 16 */
        for (int k = 0; k < 4; k++) x[k] = (float)(int8_t)(four >> 8 * k);
    } else tern__load4(TERN_F32, a.x, u * a.cols + i, n, wide, x);
}

/* The sum over edges [first, first + count), in order; the rows of four edges are on their way at once. */
static __device__ __forceinline__ void tern__edges_sum(const tern_aggregate_args &a, int64_t first, int count, int64_t i, int n,
                                                       int wide, float sum[4])
{
    const uint32_t *entry = a.edges.entry + first;
    for (int k = 0; k < 4; k++) sum[k] = 0.0f;
    for (int e = 0; e < count; e += 4) {
        float x[4][4] = {}, factor[4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (e + j >= count) continue;
            factor[j] = tern__edge_factor(a.right, a.q ? a.scale : NULL, entry[e + j]);
            tern__edge_row(a, entry[e + j], i, n, wide, x[j]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            for (int k = 0; k < 4; k++) sum[k] = e + j < count ? sum[k] + x[j][k] * factor[j] : sum[k];
    }
}

/* The same from the sums of a hub's segments, in order. */
static __device__ __forceinline__ void tern__parts_sum(const tern_aggregate_args &a, int64_t part, int64_t count, int64_t i, int n,
                                                       int wide, float sum[4])
{
    tern__load4(TERN_F32, a.part, part * a.cols + i, n, wide, sum);
    for (int64_t s = 1; s < tern__ceil_div(count, TERN__EDGES); s++) {
        float x[4];
        tern__load4(TERN_F32, a.part, (part + s) * a.cols + i, n, wide, x);
        for (int k = 0; k < 4; k++) sum[k] = sum[k] + x[k];
    }
}

/* n sums times the row's factor; bits of the largest. */
static __device__ __forceinline__ uint32_t tern__end_sums(const tern_aggregate_args &a, int64_t row, int n, float sum[4])
{
    uint32_t most = 0;
    for (int k = 0; k < 4; k++) {
        if (a.left) sum[k] = a.left[row] * sum[k];
        const uint32_t bits = k < n ? tern__bits(tern__abs(sum[k])) : 0;
        most = bits > most ? bits : most;
    }
    return most;
}

/* A row of y from four(i, n, sum), which gives the sums of its columns; zero where one is not finite. */
template <typename Four>
static __device__ __forceinline__ void tern__aggregate_end_row(const tern_aggregate_args &a, int64_t row, int wide, uint32_t *seen,
                                                               tern__blame blame, Four four)
{
    const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    uint32_t most = 0;
    tern__each4_of_row(a.cols, [&](int64_t i, int n) {
        float sum[4];
        four(i, n, sum);
        most = (uint32_t)tern__max(most, tern__end_sums(a, row, n, sum));
        tern__store4(TERN_F32, a.y, row * a.cols + i, n, wide, sum);
    });
    if (tern__finite(tern__float(tern__block_max(most, seen)))) return;
    if (threadIdx.x == 0) tern__report(blame, row);
    tern__each4_of_row(a.cols, [&](int64_t i, int n) { tern__store4(TERN_F32, a.y, row * a.cols + i, n, wide, zeros); });
}

/* Rows that are not hubs. */
static __global__ void __launch_bounds__(TERN__THREADS, 4) tern__aggregate_rows(tern_aggregate_args a, int wide, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    for (int64_t row = blockIdx.x; row < a.edges.rows; row += gridDim.x) {
        const int64_t first = a.edges.start[row], count = a.edges.start[row + 1] - first;
        if (count > TERN__EDGES) continue;
        tern__aggregate_end_row(a, row, wide, seen, blame,
                                [&](int64_t i, int n, float *sum) { tern__edges_sum(a, first, (int)count, i, n, wide, sum); });
    }
}

/* A segment of a hub, by a team: the hub is the last one whose first segment is not behind it. Hubs and segments are numbered
   as in the whole graph. */
template <typename Team> static __device__ __forceinline__ void tern__aggregate_part(const tern_aggregate_args &a, int64_t part, int wide)
{
    const int64_t hub = tern__last_at(a.edges.hubs, [&](int64_t h) { return a.edges.part[h] - a.edges.part[0] <= part; });
    const int64_t row = a.edges.hub[hub] - a.edges.first;
    const int64_t first = a.edges.start[row] + (part - (a.edges.part[hub] - a.edges.part[0])) * TERN__EDGES;
    const int count = (int)tern__min(TERN__EDGES, a.edges.start[row + 1] - first);
    for (int64_t i = 4 * Team::thread(); i < a.cols; i += 4 * Team::threads()) {
        const int n = (int)tern__min(4, a.cols - i);
        float sum[4];
        tern__edges_sum(a, first, count, i, n, wide, sum);
        tern__store4(TERN_F32, a.part, part * a.cols + i, n, wide, sum);
    }
}

static __global__ void __launch_bounds__(TERN__THREADS, 4) tern__aggregate_parts(tern_aggregate_args a, int wide)
{
    for (int64_t part = blockIdx.x; part < a.edges.parts; part += gridDim.x) tern__aggregate_part<tern__block_team>(a, part, wide);
}

/* Hubs, from their segments in order. */
static __global__ void __launch_bounds__(TERN__THREADS, 4) tern__aggregate_hubs_end(tern_aggregate_args a, int wide, tern__blame blame)
{
    TERN__SHARED(uint32_t, seen);
    for (int64_t h = blockIdx.x; h < a.edges.hubs; h += gridDim.x) {
        const int64_t row = a.edges.hub[h] - a.edges.first, count = a.edges.start[row + 1] - a.edges.start[row],
                      part = a.edges.part[h] - a.edges.part[0];
        tern__aggregate_end_row(a, row, wide, seen, blame,
                                [&](int64_t i, int n, float *sum) { tern__parts_sum(a, part, count, i, n, wide, sum); });
    }
}

static int tern__aggregate_threads(const tern_aggregate_args *a) { return 32 * (int)tern__min(TERN__WARPS, tern__ceil_div(a->cols, 128)); }

static tern_result tern__gpu_aggregate(tern_run *r, tern__gpu *d, const tern_aggregate_args *a)
{
    const int threads = tern__aggregate_threads(a), wide = tern__wide(a->x, a->y, a->part, 4 * a->cols);
    const size_t room = TERN__WARPS * sizeof(uint32_t);
    const tern__blame blame = tern__blame_of(d, TERN__FAULT_AGGREGATE);
    if (a->q) TERN__TRY(tern__check_aligned16(r, "aggregate: q", a->q));
    TERN__LAUNCH(tern__aggregate_rows, tern__grid(d, a->edges.rows, 1), threads, room, d->stream, *a, wide, blame);
    if (!a->edges.hubs) return TERN_OK;
    TERN__LAUNCH(tern__aggregate_parts, tern__grid(d, a->edges.parts, 1), threads, 0, d->stream, *a, wide);
    TERN__LAUNCH(tern__aggregate_hubs_end, tern__grid(d, a->edges.hubs, 1), threads, room, d->stream, *a, wide, blame);
    return TERN_OK;
}

/* -- hops: a block takes some nodes, whose sums, messages and quantized rows stay in shared memory; a warp takes a node,
   then 32 outputs of eight -- */

enum { TERN__HOP_NODES = 16, TERN__HOP_BYTES = 48 << 10, TERN__HOPS_TURNS = 4 /* of a block that takes part in whole hops, at most */ };
static_assert(TERN__HOP_BYTES / TERN__HOP_NODES < 4 * TERN__BLOCK, "a canonical sum of a node's row is one block, which takes no memory");

typedef struct tern__hop_step { tern_linear_args layer; tern__shape s; tern__blame blame; } tern__hop_step;

/* The layers that are there, one after the other, of which `projects`, none or one, are before the sum; width, pitch and groups: of a
   node, floats, bytes of q and sums. */
typedef struct tern__hop_plan {
    tern_aggregate_args sum;
    tern_map_fn fn;
    float factor; const float *add, *residual;
    float *y;
    tern__hop_step step[2], rows; /* rows: of a whole hop that quantizes what nodes send, as a layer without a product */
    const float *from;
    tern__blame blame;            /* of the sum */
    int32_t projects, steps, width, pitch, groups, wide, wide_out;
    int64_t out; /* columns of y */
} tern__hop_plan;

/* Pieces of shared memory, which begins with rows. */
typedef struct tern__hop_room { float *rows; int8_t *q; float *scale; int32_t *sum; } tern__hop_room;

static __device__ tern__hop_room tern__hop_room_of(const tern__hop_plan &p, float *rows)
{
    tern__hop_room my;
    my.rows = rows;
    my.q = (int8_t *)(rows + TERN__HOP_NODES * p.width);
    my.scale = (float *)(my.q + TERN__HOP_NODES * p.pitch);
    my.sum = (int32_t *)(my.scale + TERN__HOP_NODES);
    return my;
}

/* The sum of a node's row, by a warp; zero where it is not finite. */
static __device__ void tern__hop_sum_row(const tern__hop_plan &p, int64_t row, float *to)
{
    const tern_aggregate_args &a = p.sum;
    const int64_t first = a.edges.start[row], count = a.edges.start[row + 1] - first;
    const int lane = (int)threadIdx.x % 32;
    const int64_t part = count > TERN__EDGES ? a.edges.part[tern__first_hub(&a.edges, row)] - a.edges.part[0] : 0;
    uint32_t most = 0;
    for (int64_t i = 4 * lane; i < a.cols; i += 128) {
        const int n = (int)tern__min(4, a.cols - i);
        float sum[4];
        if (count <= TERN__EDGES) tern__edges_sum(a, first, (int)count, i, n, p.wide, sum);
        else tern__parts_sum(a, part, count, i, n, p.wide, sum);
        most = (uint32_t)tern__max(most, tern__end_sums(a, row, n, sum));
        tern__store4(TERN_F32, to, i, n, 1, sum);
    }
    if (tern__finite(tern__float(tern__warp_most(most)))) return;
    if (lane == 0) tern__report(p.blame, row);
    __syncwarp(); /* other lanes stored these */
    for (int i = lane; i < a.cols; i += 32) to[i] = 0.0f;
}

/* Four outputs of a node at the end of a hop. */
static __device__ void tern__hop_end(const tern__hop_plan &p, int64_t row, int64_t col, const float v[4])
{
    const int n = (int)tern__min(4, p.out - col);
    const int64_t at = row * p.out + col;
    float y[4], z[4];
    for (int k = 0; k < 4; k++) y[k] = v[k];
    if (p.fn != TERN_MAP_ADD) tern__map4(p.fn, 1.0f, v, v, y);
    if (p.add) tern__load4(TERN_F32, p.add, at, n, p.wide_out, z);
    for (int k = 0; k < 4 && p.add; k++) y[k] = y[k] + p.factor * z[k];
    if (p.residual) tern__load4(TERN_F32, p.residual, at, n, p.wide_out, z);
    for (int k = 0; k < 4 && p.residual; k++) y[k] = y[k] + z[k];
    tern__store4(TERN_F32, p.y, at, n, p.wide_out, y);
}

/* Outputs of a.n quantized rows, at most 8, `pitch` bytes apart, and of a pair of panels, by a warp, in fours:
   four(row of q, row of m, y). */
template <bool Base3, typename Four>
static __device__ __forceinline__ void tern__warp_product(const tern_matmul_args &a, const tern__shape &s, int64_t pitch,
                                                          int64_t pair, Four four)
{
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    const int64_t row = pair * 32 + 4 * g;
    const uint8_t *panel = tern__lane_panel(a.m, s, pair);
    const int8_t *const q[1] = {g < a.n ? a.q + g * pitch : NULL};
    int dot[2][1][4];
    float facc[2][1][4];
    for (int group = 0; group < s.groups; group++) {
        const int begin = group * (int)s.group_units, end = min(begin + (int)s.group_units, (int)s.units);
        tern__warp_dot<1, Base3>(panel, q, begin, end, dot);
        if (a.m.grain > 0) tern__fold_many<1>(a, s, group, row, 2 * t, dot, facc);
    }
    const tern__lane_rows rows = tern__rows_from(a, s, a.m.grain > 0, row);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const int x = 2 * t + k;
        float y[4];
        if (x >= a.n || row >= a.m.rows) continue;
        tern__outputs<1>(a, rows, a.m.grain > 0, x, k, dot, facc, y);
        four(x, row, y);
    }
}

/* Outputs of n quantized rows, in fours: four(node, column, v). */
template <bool Base3, typename Four>
static __device__ __forceinline__ void tern__hop_product(const tern__hop_plan &p, const tern__hop_step &step, int n,
                                                         const tern__hop_room &my, Four four)
{
    const tern__shape &s = step.s;
    const int eights = (n + 7) / 8, items = eights * (int)tern__ceil_div(s.panels, 2);
    tern_matmul_args a = {};
    a.m = step.layer.quantize.m;
    a.bias = step.layer.bias;
    for (int item = (int)threadIdx.x / 32; item < items; item += TERN__WARPS) {
        const int node = item % eights * 8;
        a.n = min(8, n - node);
        a.q = my.q + node * p.pitch;
        a.scale = my.scale + node;
        a.sum = my.sum + node * s.groups;
        tern__warp_product<Base3>(a, s, p.pitch, item / eights, [&](int x, int64_t row, const float y[4]) { four(node + x, row, y); });
    }
}

/* A layer of n nodes from `first` on, whose rows lie `apart` floats from each other: four(node, column, v). */
template <typename Four>
static __device__ __forceinline__ void tern__hop_layer(const tern__hop_plan &p, const tern__hop_step &step, int64_t first, int n,
                                                       const float *x, int64_t apart, const tern__hop_room &my, Four four)
{
    for (int i = (int)threadIdx.x / 32; i < n; i += TERN__WARPS)
        tern__quantize_row<tern__warp_team>(step.layer.quantize, step.s, first + i, x + i * apart, my.q + i * p.pitch, my.scale + i,
                                            my.sum + i * step.s.groups, step.blame, NULL);
    __syncthreads();
    if (step.layer.quantize.m.encoding == TERN_BASE3) tern__hop_product<true>(p, step, n, my, four);
    else tern__hop_product<false>(p, step, n, my, four);
    __syncthreads(); /* q may be written again, or rows */
}

/* What the block's nodes send, or what reaches them. */
static __device__ __forceinline__ void tern__hop_phase(const tern__hop_plan &p, const tern__hop_room &my, bool sends)
{
    const tern_quantize_args &rows = p.rows.layer.quantize;
    const int warp = (int)threadIdx.x / 32, begin = sends ? 0 : p.projects, end = sends ? p.projects : p.steps;
    for (int64_t first = (int64_t)blockIdx.x * TERN__HOP_NODES; first < p.sum.edges.rows; first += (int64_t)gridDim.x * TERN__HOP_NODES) {
        const int n = (int)tern__min(TERN__HOP_NODES, p.sum.edges.rows - first);
        for (int i = warp; !sends && i < n; i += TERN__WARPS) tern__hop_sum_row(p, first + i, my.rows + i * p.width);
        if (!sends) __syncthreads();
        for (int k = begin; k < end; k++) {
            const tern_linear_args &layer = p.step[k].layer;
            const int64_t cols = layer.quantize.m.cols, outputs = layer.quantize.m.rows;
            const bool last = !sends && k == p.steps - 1, apart = sends && !rows.q;
            const float *x = sends ? layer.quantize.x + first * cols : my.rows;
            tern__hop_layer(p, p.step[k], first, n, x, sends ? cols : p.width, my, [&](int node, int64_t col, const float v[4]) {
                float *to = apart ? layer.y + (first + node) * outputs : my.rows + node * p.width;
                if (last) tern__hop_end(p, first + node, col, v);
                else tern__store4(TERN_F32, to, col, (int)tern__min(4, outputs - col), apart ? p.wide : 1, v);
            });
        }
        for (int i = warp; sends && rows.q && i < n; i += TERN__WARPS) {
            const int64_t row = first + i;
            tern__quantize_row<tern__warp_team>(rows, p.rows.s, row, p.projects ? my.rows + i * p.width : rows.x + row * rows.m.cols,
                                                rows.q + row * p.rows.s.stride, rows.scale + row, rows.sum + row, p.rows.blame, NULL);
            if (p.from && threadIdx.x % 32 == 0) rows.scale[row] = rows.scale[row] * p.from[row];
        }
        if (sends || begin < end) continue;
        for (int64_t i = threadIdx.x, fours = tern__ceil_div(p.out, 4); i < n * fours; i += TERN__THREADS) {
            float v[4];
            const int64_t col = i % fours * 4;
            tern__load4(TERN_F32, my.rows + i / fours * p.width, col, (int)tern__min(4, p.out - col), 1, v);
            tern__hop_end(p, first + i / fours, col, v);
        }
        __syncthreads(); /* rows may be written again */
    }
}

static __global__ void __launch_bounds__(TERN__THREADS, 2) tern__hop_nodes(tern__hop_plan p)
{
    TERN__SHARED(float, shared);
    tern__hop_phase(p, tern__hop_room_of(p, shared), false);
}

/* Faults of a layer come behind those of what was before it. */
static void tern__hop_add(tern__gpu *d, tern__hop_plan *p, const tern_linear_args *layer)
{
    tern__hop_step *step = &p->step[p->steps];
    if (!layer->quantize.m.trits) return;
    step->layer = *layer;
    step->s = tern__shape_of(&layer->quantize.m);
    step->blame = tern__blame_of(d, TERN__FAULT_QUANTIZE);
    d->order++;
    p->steps++;
    p->width = (int32_t)tern__max(p->width, p->out);
    p->pitch = (int32_t)tern__max(p->pitch, tern__ceil_div(step->s.stride, 128) * 128 + 64); /* quarters of a warp meet all banks */
    p->groups = (int32_t)tern__max(p->groups, step->s.groups);
    p->out = layer->quantize.m.rows;
}

/* bytes: of shared memory. */
static tern_result tern__hop_plan_of(tern_run *r, tern__gpu *d, const tern_whole_hop *hop, tern__hop_plan *p, int64_t *bytes)
{
    const tern_hop_args *a = &hop->to;
    const tern_aggregate_args *sum = &a->sum;
    const tern_quantize_args *project = &hop->project.quantize;
    TERN__REQUIRE(r, sum->cols <= TERN__HOP_BYTES && a->message.quantize.m.rows <= TERN__HOP_BYTES && project->m.cols <= TERN__HOP_BYTES
                     && project->act != TERN_ACT_BIT && a->message.quantize.act != TERN_ACT_BIT && a->update.quantize.act != TERN_ACT_BIT,
                  TERN_E_UNSUPPORTED, "cuda: hop: bits, or rows of more than %d", (int64_t)TERN__HOP_BYTES);
    TERN__REQUIRE(r, !project->m.trits || project->m.cols <= TERN__BLOCK
                     || (project->norm == TERN_NORM_NONE && project->act == TERN_ACT_INT8), TERN_E_UNSUPPORTED,
                  "cuda: hop: sums of %d columns; %d are the most", project->m.cols, (int64_t)TERN__BLOCK);
    tern__hop_add(d, p, &hop->project);
    p->projects = p->steps;
    if (hop->rows.q) {
        p->rows.layer.quantize = hop->rows;
        p->rows.s = tern__shape_of(&hop->rows.m);
        p->rows.blame = tern__blame_of(d, TERN__FAULT_QUANTIZE);
        p->from = hop->from;
        d->order++;
    }
    p->sum = *sum;
    p->blame = tern__blame_of(d, TERN__FAULT_AGGREGATE);
    d->order++;
    p->out = p->width = (int32_t)sum->cols;
    tern__hop_add(d, p, &a->message);
    tern__hop_add(d, p, &a->update);
    p->fn = a->fn;
    p->factor = a->factor;
    p->add = a->add;
    p->residual = a->residual;
    p->y = a->y;
    p->width = (p->width + 3) & ~3;
    p->wide = tern__wide(sum->x, sum->part, 4 * sum->cols);
    p->wide_out = tern__wide(a->add, a->residual, a->y, 4 * p->out);
    *bytes = TERN__HOP_NODES * (4 * ((int64_t)p->width + 1 + p->groups) + p->pitch);
    TERN__REQUIRE(r, *bytes <= TERN__HOP_BYTES, TERN_E_UNSUPPORTED,
                  "cuda: hop: %d bytes of shared memory for some nodes; %d are the most", *bytes, (int64_t)TERN__HOP_BYTES);
    if (sum->q) TERN__TRY(tern__check_aligned16(r, "aggregate: q", sum->q));
    for (int i = 0; i < p->steps; i++) TERN__TRY(tern__check_aligned16(r, "linear: m.trits", p->step[i].layer.quantize.m.trits));
    return TERN_OK;
}

static tern_result tern__gpu_hop(tern_run *r, tern__gpu *d, const tern_hop_args *a)
{
    tern_whole_hop hop = {};
    tern__hop_plan p = {};
    int64_t bytes;
    hop.to = *a;
    TERN__TRY(tern__hop_plan_of(r, d, &hop, &p, &bytes));
    if (p.sum.edges.hubs)
        TERN__LAUNCH(tern__aggregate_parts, tern__grid(d, p.sum.edges.parts, 1), tern__aggregate_threads(&p.sum), 0, d->stream,
                     p.sum, p.wide);
    TERN__LAUNCH(tern__hop_nodes, tern__grid(d, p.sum.edges.rows, TERN__HOP_NODES), TERN__THREADS, (size_t)bytes, d->stream, p);
    return TERN_OK;
}

/* -- whole hops, one after the other: blocks that are launched together keep their nodes, and meet where rows of others are read -- */

typedef struct tern__hops {
    tern__hop_plan hop[TERN_HOPS_AT_ONCE];
    unsigned *meet;
    int32_t count;
} tern__hops;
static_assert(sizeof(tern__hops) <= 4096, "parameters of a kernel");

/* A block sends rows that it made itself. What it sends lies elsewhere than what the hop before sent, which others may still read. */
static __global__ void __launch_bounds__(TERN__THREADS, 1) tern__hops_nodes(tern__hops p)
{
    TERN__SHARED(float, shared);
    for (int phase = 0; phase < 2 * p.count; phase++) {
        const tern__hop_plan &hop = p.hop[phase / 2];
        const tern_adjacency &edges = hop.sum.edges;
        const bool sends = phase % 2 == 0;
        if (!sends) tern__grid_barrier(p.meet);
        if (!sends && edges.hubs) {
            for (int64_t part = (int64_t)blockIdx.x * TERN__WARPS + threadIdx.x / 32; part < edges.parts;
                 part += (int64_t)gridDim.x * TERN__WARPS)
                tern__aggregate_part<tern__warp_team>(hop.sum, part, hop.wide);
            tern__grid_barrier(p.meet);
        }
        tern__hop_phase(hop, tern__hop_room_of(hop, shared), sends);
    }
}

/* After a launch of blocks together. */
static tern_result tern__launched_together(tern_run *r, const char *what, int64_t blocks)
{
    const cudaError_t error = cudaGetLastError();
    TERN__REQUIRE(r, error != cudaErrorCooperativeLaunchTooLarge, TERN_E_UNSUPPORTED,
                  "cuda: %s: fewer than %d blocks are there at once", what, blocks);
    return tern__cuda_check(r, error, what);
}

/* A block to a multiprocessor. Beyond some turns of each launches weigh little, and more blocks share the work better. */
static tern_result tern__gpu_hops(tern_run *r, tern__gpu *d, const tern_hops_args *a)
{
    const int64_t nodes = a->hop[0].to.sum.edges.rows, blocks = tern__min(tern__ceil_div(nodes, TERN__HOP_NODES), d->processors);
    int64_t bytes = 0, mine;
    tern__hops p = {};
    TERN__REQUIRE(r, d->meet && nodes <= (int64_t)TERN__HOPS_TURNS * TERN__HOP_NODES * d->processors, TERN_E_UNSUPPORTED,
                  "cuda: hops: %d nodes for %d blocks, or no launches of blocks together", nodes, blocks);
    p.meet = d->meet;
    p.count = a->count;
    for (int32_t i = 0; i < a->count; i++) {
        TERN__TRY(tern__hop_plan_of(r, d, &a->hop[i], &p.hop[i], &mine));
        bytes = tern__max(bytes, mine);
    }
    TERN__LAUNCH_TOGETHER(tern__hops_nodes, (unsigned)blocks, TERN__THREADS, (size_t)bytes, d->stream, p);
    return tern__launched_together(r, "hops", blocks);
}

/* -- a mixture of few tokens: blocks that are launched together go from phase to phase, in a shape that does not depend on
   the routing -- */

enum {
    TERN__MIXTURE_PLACES = TERN__THREADS, /* of a token at an expert */
    TERN__MIXTURE_TOKENS = 16,
    TERN__MIXTURE_EXPERTS = 8,            /* of a tile of a dense router: */
    TERN__MIXTURE_DEPTH = 256, TERN__MIXTURE_PITCH = TERN__MIXTURE_DEPTH + 4, /* terms at a time, and floats from row to row:
                                                                                 the next rows' fours lie in other banks */
    TERN__MIXTURE_ROWS = TERN__MIXTURE_TOKENS + TERN__MIXTURE_EXPERTS,
#if CUDART_VERSION >= 12010 /* since when parameters may take more than 4 KB */
    TERN__MIXTURE_MATRICES = 384
#else
    TERN__MIXTURE_MATRICES = 160
#endif
};
static_assert(TERN__SEGMENT % TERN__MIXTURE_DEPTH == 0, "a segment ends where a chunk does");

typedef struct tern__packed { void *trits, *scales; } tern__packed;

/* Matrices of an expert: gate, where there is one, up and down. pieces: warps that share a pair of panels, of the router and of up. */
typedef struct tern__mixture {
    tern_moe_args a;
    tern__shape router, in, inner;
    tern__blame read, choice, in_blame, inner_blame;
    unsigned *meet;
    int32_t sets, router_pieces, pieces, wide;
    tern__packed w[TERN__MIXTURE_MATRICES];
} tern__mixture;

/* Places by expert, and for each one its slot, n k of which route filled. A turn is up to eight places of one expert: its first is turn[i],
   the last entry is where they end. */
typedef struct tern__mixture_places {
    int32_t ids[TERN__MIXTURE_PLACES], slot[TERN__MIXTURE_PLACES], first[TERN__MIXTURE_PLACES], turn[TERN__MIXTURE_PLACES + 1];
    int32_t count, turns;
} tern__mixture_places;

/* What lies in shared memory, and then what each phase makes of the rest of it. */
typedef struct tern__mixture_room {
    tern__mixture_places places;
    union {
        alignas(16) float rows[TERN__MIXTURE_ROWS * TERN__MIXTURE_PITCH];
        struct { int dots[tern__few_room<1>::bytes / sizeof(int)]; float gate[tern__few_room<1>::dots]; };
        struct { float out[TERN__WARPS][8][32], y[TERN__MIXTURE_TOKENS][32]; };
        float sums[TERN__ROOM / sizeof(float)];
    };
} tern__mixture_room;
static_assert(sizeof(tern__mixture_room) <= 48 << 10, "a block has room on every processor");
static_assert(sizeof(tern__mixture) <= (TERN__MIXTURE_MATRICES > 160 ? 32764 : 4096), "parameters of a kernel");

/* x as the router reads it, and as experts do. */
static __device__ void tern__mixture_read(const tern__mixture &p, float *sums)
{
    const tern_quantize_args &in = p.a.in, &router = p.a.router.quantize;
    for (int64_t job = blockIdx.x; job < 2 * in.n; job += gridDim.x) {
        const int64_t t = job / 2;
        if (job % 2)
            tern__quantize_row<tern__block_team>(in, p.in, t, in.x + t * in.m.cols, in.q + t * p.in.stride, in.scale + t,
                                                 in.sum + t * p.in.groups, p.in_blame, sums);
        else if (router.m.trits)
            tern__quantize_row<tern__block_team>(router, p.router, t, router.x + t * router.m.cols, router.q + t * p.router.stride,
                                                 router.scale + t, router.sum + t * p.router.groups, p.read, sums);
        else if (p.a.norm.y) tern__norm_row(&p.a.norm, t, tern__norm_factor(p.a.norm, t, sums, p.read), p.wide);
    }
}

/* Terms from `at` on of the tokens and of eight experts, on their way: four of six rows to a thread. */
static __device__ void tern__mixture_load(const tern_dense_args &a, int64_t expert0, int64_t at, int wide, float x[6][4])
{
    const int column = (int)threadIdx.x % (TERN__MIXTURE_DEPTH / 4) * 4, step = TERN__THREADS / (TERN__MIXTURE_DEPTH / 4);
    const int n = (int)tern__max(0, tern__min(4, a.k - at - column));
#pragma unroll
    for (int i = 0; i < 6; i++) {
        const int row = (int)threadIdx.x / (TERN__MIXTURE_DEPTH / 4) + i * step;
        const int64_t expert = expert0 + row - TERN__MIXTURE_TOKENS;
        const bool token = row < TERN__MIXTURE_TOKENS;
        tern__load4(TERN_F32, token ? a.a + row * a.a_row : a.b + expert * a.b_col, at + column,
                    (token ? row < a.m : expert < a.n) ? n : 0, wide, x[i]);
    }
}

/* Logits of a dense router, as the tiles of a product sum them: a thread to a token and an expert. */
static __device__ void tern__mixture_dense(const tern__mixture &p, float *rows)
{
    const tern_dense_args &a = p.a.dense;
    const int step = TERN__THREADS / (TERN__MIXTURE_DEPTH / 4), column = (int)threadIdx.x % (TERN__MIXTURE_DEPTH / 4) * 4;
    const int token = (int)threadIdx.x / TERN__MIXTURE_EXPERTS;
    const float *mine = rows + token * TERN__MIXTURE_PITCH,
                *other = rows + (TERN__MIXTURE_TOKENS + (int)threadIdx.x % TERN__MIXTURE_EXPERTS) * TERN__MIXTURE_PITCH;
    for (int64_t expert0 = (int64_t)blockIdx.x * TERN__MIXTURE_EXPERTS; expert0 < a.n;
         expert0 += (int64_t)gridDim.x * TERN__MIXTURE_EXPERTS) {
        const int64_t expert = expert0 + threadIdx.x % TERN__MIXTURE_EXPERTS;
        float next[6][4], part = 0.0f, whole = 0.0f;
        tern__mixture_load(a, expert0, 0, p.wide, next);
        for (int64_t at = 0; at < a.k; at += TERN__MIXTURE_DEPTH) {
            const int64_t end = tern__min(a.k, at + TERN__MIXTURE_DEPTH);
#pragma unroll
            for (int i = 0; i < 6; i++)
                tern__store4(TERN_F32, rows, ((int)threadIdx.x / (TERN__MIXTURE_DEPTH / 4) + i * step) * TERN__MIXTURE_PITCH + column,
                             4, 1, next[i]);
            __syncthreads();
            if (end < a.k) tern__mixture_load(a, expert0, end, p.wide, next);
            for (int i = 0; i < end - at && token < a.m; i += 4) { /* behind the end there are zeros, which add nothing */
                const float4 x = *(const float4 *)(mine + i), w = *(const float4 *)(other + i);
                part = part + x.x * w.x;
                part = part + x.y * w.y;
                part = part + x.z * w.z;
                part = part + x.w * w.w;
            }
            __syncthreads();
            if (end < a.k && end % TERN__SEGMENT != 0) continue;
            whole = at < TERN__SEGMENT ? part : whole + part;
            part = 0.0f;
        }
        if (token < a.m && expert < a.n) a.c[token * a.c_row + expert] = a.bias ? whole + a.bias[expert] : whole;
    }
}

/* Those of a ternary one, of eight tokens at a time. */
template <bool Base3> static __device__ void tern__mixture_logits(const tern__mixture &p, int *dots)
{
    const tern_quantize_args &q = p.a.router.quantize;
    const int blocks = (int)tern__few_tokens_grid(p.router, p.router_pieces);
    for (int item = (int)blockIdx.x; item < blocks * tern__ceil_div(q.n, 8); item += (int)gridDim.x) {
        const int64_t t = item / blocks * 8;
        tern_matmul_args a = {};
        a.m = q.m;
        a.n = tern__min(8, q.n - t);
        a.q = q.q + t * p.router.stride;
        a.scale = q.scale + t;
        a.sum = q.sum + t * p.router.groups;
        a.bias = p.a.router.bias;
        a.y = p.a.router.y + t * q.m.rows;
        tern__few_tokens<1, Base3>(a, p.router, p.router_pieces, item % blocks, dots);
    }
}

/* A thread to a slot: its place is how many slots go before it, those of lower experts and earlier ones of its own. */
static __device__ void tern__mixture_sort(const tern_route_args &a, tern__mixture_places *my)
{
    const int slots = (int)a.n * a.k, i = (int)threadIdx.x, id = i < slots ? a.ids[i] : -1;
    int lower = 0, before = 0, all = 0, turns = 0, turn = 0;
    my->ids[i] = id;
    __syncthreads();
    for (int j = 0; j < slots; j++) {
        all += my->ids[j] >= 0;
        lower += my->ids[j] >= 0 && my->ids[j] < id;
        before += my->ids[j] == id && j < i;
    }
    if (id >= 0) my->slot[lower + before] = i;
    if (id >= 0) my->first[lower + before] = before % 8 == 0;
    __syncthreads();
    for (int j = 0; j < all; j++) {
        turns += my->first[j];
        turn += my->first[j] && j < i;
    }
    if (i < all && my->first[i]) my->turn[turn] = i;
    if (i == 0) {
        my->turn[turns] = all;
        my->turns = turns;
        my->count = all;
    }
    __syncthreads();
}

static __device__ void tern__mixture_loads(const tern__mixture &p, const tern__mixture_places *my)
{
    const int slots = (int)p.a.route.n * p.a.route.k;
    TERN__EACH(expert, p.a.route.count) {
        int load = 0;
        for (int j = 0; j < slots; j++) load += my->ids[j] == expert;
        p.a.loads[expert] = load;
    }
}

/* The product of a turn's expert, of its matrix `set`, with rows from `at` on. */
static __device__ __forceinline__ tern_matmul_args tern__mixture_product(const tern__mixture &p, const tern_quantize_args &q,
                                                                         const tern__shape &s, const tern__mixture_places *my,
                                                                         int turn, int set, int at)
{
    const tern__packed &w = p.w[my->ids[my->slot[my->turn[turn]]] * p.sets + set];
    tern_matmul_args a = {};
    a.m = q.m;
    a.m.trits = w.trits;
    a.m.scales = w.scales;
    a.n = my->turn[turn + 1] - my->turn[turn];
    a.q = q.q + at * s.stride;
    a.scale = q.scale + at;
    a.sum = q.sum + at * s.groups;
    return a;
}

/* Rows of tokens, at places. What the gate makes of an output stays until up has made the other. */
struct tern__mixture_rows {
    const int32_t *slot; /* of the turn's places */
    int k;
    tern_map_fn fn;
    bool gate, gated;
    float *kept, *hidden;
    __device__ int at(int token) const { return slot[token] / k; }
    __device__ void put(const tern_matmul_args &a, int token, int64_t row, int i, float y) const
    {
        const float v = !gate && gated ? kept[i] : y, four[4] = {v, v, v, v};
        float mapped[4];
        if (gate) kept[i] = y;
        if (gate) return;
        tern__map4(fn, 1.0f, four, four, mapped);
        hidden[token * a.m.rows + row] = gated ? mapped[0] * y : mapped[0];
    }
};

/* hidden = fn(gate x) up x, or fn(up x). */
template <bool Base3> static __device__ void tern__mixture_hidden(const tern__mixture &p, tern__mixture_room *my)
{
    const int blocks = (int)tern__few_tokens_grid(p.in, p.pieces);
    for (int item = (int)blockIdx.x; item < my->places.turns * blocks; item += (int)gridDim.x) {
        const int turn = item / blocks, first = my->places.turn[turn];
        for (int set = 0; set < p.sets - 1; set++) {
            const tern__mixture_rows rows = {my->places.slot + first, p.a.route.k, p.a.fn, set < p.sets - 2, p.sets == 3, my->gate,
                                             p.a.hidden + first * p.a.in.m.rows};
            tern__few_tokens<1, Base3>(tern__mixture_product(p, p.a.in, p.in, &my->places, turn, set, 0), p.in, p.pieces, item % blocks,
                                       my->dots, rows);
        }
    }
}

/* y of 32 rows, by a block: a warp to a turn, then the sums of the tokens in the order of the experts. */
template <bool Base3> static __device__ void tern__mixture_outputs(const tern__mixture &p, tern__mixture_room *my)
{
    const tern__mixture_places &places = my->places;
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, pairs = (int)tern__ceil_div(p.inner.panels, 2);
    for (int pair = (int)blockIdx.x; pair < pairs; pair += (int)gridDim.x) {
        for (int token = warp; token < TERN__MIXTURE_TOKENS; token += TERN__WARPS) my->y[token][lane] = 0.0f;
        for (int turn0 = 0; turn0 < places.turns; turn0 += TERN__WARPS) {
            if (turn0 + warp < places.turns)
                tern__warp_product<Base3>(
                    tern__mixture_product(p, p.a.inner, p.inner, &places, turn0 + warp, p.sets - 1, places.turn[turn0 + warp]),
                    p.inner, p.inner.stride, pair, [&](int x, int64_t at, const float v[4]) {
                    for (int i = 0; i < 4; i++) my->out[warp][x][at % 32 + i] = v[i];
                });
            __syncthreads();
            for (int turn = turn0; turn < min(turn0 + TERN__WARPS, places.turns); turn++)
                for (int place = places.turn[turn]; place < places.turn[turn + 1]; place++) {
                    const int slot = places.slot[place], token = slot / p.a.route.k;
                    if (token % TERN__WARPS == warp)
                        my->y[token][lane] = my->y[token][lane]
                                             + p.a.route.weights[slot] * my->out[turn - turn0][place - places.turn[turn]][lane];
                }
            __syncthreads(); /* out may be written again */
        }
        for (int token = warp; token < p.a.route.n; token += TERN__WARPS) {
            const int64_t row = (int64_t)pair * 32 + lane;
            if (row < p.a.inner.m.rows) p.a.y[token * p.a.inner.m.rows + row] = my->y[token][lane];
        }
    }
}

template <bool Base3> static __global__ void __launch_bounds__(TERN__THREADS, 1) tern__mixture_tokens(tern__mixture p)
{
    TERN__SHARED(tern__mixture_room, my);
    const tern_quantize_args &inner = p.a.inner;
    tern__mixture_read(p, my->sums);
    tern__grid_barrier(p.meet);
    if (p.a.router.quantize.m.trits) tern__mixture_logits<Base3>(p, my->dots);
    else tern__mixture_dense(p, my->rows);
    tern__grid_barrier(p.meet);
    for (int64_t t = blockIdx.x; t < p.a.route.n; t += gridDim.x)
        if (threadIdx.x < 32) tern__route_token(p.a.route, t, p.choice);
    tern__grid_barrier(p.meet);
    tern__mixture_sort(p.a.route, &my->places);
    tern__mixture_loads(p, &my->places);
    tern__mixture_hidden<Base3>(p, my);
    tern__grid_barrier(p.meet);
    for (int64_t i = blockIdx.x; i < my->places.count; i += gridDim.x)
        tern__quantize_row<tern__block_team>(inner, p.inner, i, inner.x + i * inner.m.cols, inner.q + i * p.inner.stride, inner.scale + i,
                                             inner.sum + i * p.inner.groups, p.inner_blame, my->sums);
    tern__grid_barrier(p.meet);
    tern__mixture_outputs<Base3>(p, my);
}

/* Faults in the order of the operations that this one stands for. */
static tern_result tern__gpu_moe(tern_run *r, tern__gpu *d, const tern_moe_args *a)
{
    const int sets = a->experts->gate ? 3 : 2;
    const tern_matrix &router = a->router.quantize.m;
    const bool base3 = a->in.m.encoding == TERN_BASE3, dense = !router.trits;
    tern__mixture p = {};
    TERN__REQUIRE(r, d->mixtures && a->route.n <= TERN__MIXTURE_TOKENS && a->route.n * a->route.k <= TERN__MIXTURE_PLACES,
                  TERN_E_UNSUPPORTED,
                  "cuda: moe: %d tokens of %d experts each, or no launches of blocks together", a->route.n, (int64_t)a->route.k);
    TERN__REQUIRE(r, a->route.count * sets <= TERN__MIXTURE_MATRICES && a->in.act != TERN_ACT_BIT
                     && a->in.m.encoding == a->inner.m.encoding, TERN_E_UNSUPPORTED,
                  "cuda: moe: %d matrices, bits, or two encodings", (int64_t)(a->route.count * sets));
    TERN__REQUIRE(r, dense ? a->dense.k <= TERN__LONGEST_ROW
                           : router.encoding == a->in.m.encoding && a->router.quantize.act != TERN_ACT_BIT, TERN_E_UNSUPPORTED,
                  "cuda: moe: a router of %d columns, bits or another encoding", dense ? a->dense.k : router.cols);
    TERN__TRY(tern__check_aligned16(r, "moe: q", a->in.q));
    TERN__TRY(tern__check_aligned16(r, "moe: q", a->inner.q));
    if (!dense) TERN__TRY(tern__check_aligned16(r, "moe: q", a->router.quantize.q));
    if (!dense) TERN__TRY(tern__check_aligned16(r, "moe: trits", router.trits));
    p.a = *a;
    p.in = tern__shape_of(&a->in.m);
    p.inner = tern__shape_of(&a->inner.m);
    if (!dense) p.router = tern__shape_of(&router);
    p.sets = sets;
    p.meet = d->meet;
    p.pieces = tern__pieces(d, p.in, tern__min(8, a->route.n));
    p.router_pieces = dense ? 1 : tern__pieces(d, p.router, tern__min(8, a->route.n));
    p.wide = tern__wide(a->norm.x, a->norm.gain, a->norm.y, a->dense.a, a->dense.b, 4 * a->dense.k);
    for (int32_t i = 0; i < a->route.count * sets; i++) {
        const tern_expert *e = &a->experts[i / sets];
        const int which = i % sets + 3 - sets;
        const tern_matrix m = tern_param_matrix(which == 0 ? e->gate : which == 1 ? e->up : e->down);
        p.w[i] = {m.trits, m.scales};
        TERN__TRY(tern__check_aligned16(r, "moe: trits", m.trits));
    }
    p.read = tern__blame_of(d, dense ? TERN__FAULT_NORM : TERN__FAULT_QUANTIZE);
    d->order++;
    p.choice = tern__blame_of(d, TERN__FAULT_ROUTE);
    d->order++;
    p.in_blame = tern__blame_of(d, TERN__FAULT_QUANTIZE);
    d->order++;
    p.inner_blame = tern__blame_of(d, TERN__FAULT_QUANTIZE);
    TERN__LAUNCH_TOGETHER((base3 ? tern__mixture_tokens<true> : tern__mixture_tokens<false>), (unsigned)d->processors, TERN__THREADS,
                          sizeof(tern__mixture_room), d->stream, p);
    return tern__launched_together(r, "moe", d->processors);
}

/* Memory for the barriers of blocks that are launched together, where the device can. A mixture asks besides for a block's
   room, and for a driver that passes so many parameters. */
static tern_result tern__gpu_open_together(tern_run *r, tern__gpu *d)
{
    int together = 0, driver = 0, blocks[2] = {0, 0};
    TERN__CUDA(r, cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, d->device), "launches of blocks together");
    TERN__CUDA(r, cudaDriverGetVersion(&driver), "the driver's version");
    TERN__CUDA(r, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks[0], tern__mixture_tokens<false>, TERN__THREADS,
                                                                sizeof(tern__mixture_room)), "blocks at once");
    TERN__CUDA(r, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks[1], tern__mixture_tokens<true>, TERN__THREADS,
                                                                sizeof(tern__mixture_room)), "blocks at once");
    if (!together) return TERN_OK;
    d->mixtures = blocks[0] > 0 && blocks[1] > 0 && (sizeof(tern__mixture) <= 4096 || driver >= 12010);
    TERN__CUDA(r, cudaMalloc(&d->meet, sizeof *d->meet), "memory for barriers");
    TERN__CUDA(r, cudaMemsetAsync(d->meet, 0, sizeof *d->meet, d->stream), "clearing barriers");
    return TERN_OK;
}

/* -- gates: a block to a token -- */

static __global__ void __launch_bounds__(1024) tern__gate_tokens(tern_gate_args a, int wide, tern__blame blame)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *h = a.h + t * a.cols;
        float *y = a.y + t * a.cols;
        tern__gather_dense(h, a.cols, wide, y);
        for (int64_t i = t; i < a.count * a.n; i += a.n) {
            const float *key = a.key + i * a.cols;
            const float gate = tern__sigmoid(tern__block_sum(a.cols, [&](int64_t j) { return h[j] * key[j]; }, sums));
            if (threadIdx.x == 0) a.gate[i] = gate;
            tern__each4_of_row(a.cols, [&](int64_t j, int n) {
                float v[4], value[4];
                tern__load4(TERN_F32, y, j, n, wide, v);
                tern__load4(TERN_F32, a.value + i * a.cols, j, n, wide, value);
                for (int k = 0; k < 4; k++) v[k] = v[k] + gate * value[k];
                tern__store4(TERN_F32, y, j, n, wide, v);
            });
        }
        __syncthreads(); /* others wrote the row */
        if (tern__finite(tern__float(tern__block_absmax(a.cols, [&](int64_t j) { return y[j]; }, (uint32_t *)sums)))) continue;
        if (threadIdx.x == 0) tern__report(blame, t);
        tern__gather_dense(NULL, a.cols, wide, y);
    }
}

static __global__ void __launch_bounds__(1024) tern__gate_tokens_back(tern_gate_args a, int wide)
{
    TERN__SHARED(float, sums);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *dy = a.dy + t * a.cols;
        float *dh = a.dh + t * a.cols;
        tern__gather_dense(dy, a.cols, wide, dh);
        for (int64_t i = t; i < a.count * a.n; i += a.n) {
            const float gate = a.gate[i], *value = a.value + i * a.cols;
            const float slope = tern__block_sum(a.cols, [&](int64_t j) { return dy[j] * value[j]; }, sums) * (gate * (1.0f - gate));
            tern__each4_of_row(a.cols, [&](int64_t j, int n) {
                float v[4], h[4], key[4], dkey[4], out[4];
                tern__load4(TERN_F32, dy, j, n, wide, v);
                tern__load4(TERN_F32, a.h + t * a.cols, j, n, wide, h);
                tern__load4(TERN_F32, a.key + i * a.cols, j, n, wide, key);
                tern__load4(TERN_F32, dh, j, n, wide, out);
                for (int k = 0; k < 4; k++) {
                    v[k] = gate * v[k];
                    dkey[k] = slope * h[k];
                    out[k] = out[k] + slope * key[k];
                }
                tern__store4(TERN_F32, a.dvalue + i * a.cols, j, n, wide, v);
                tern__store4(TERN_F32, a.dkey + i * a.cols, j, n, wide, dkey);
                tern__store4(TERN_F32, dh, j, n, wide, out);
            });
        }
    }
}

static tern_result tern__gpu_gate(tern_run *r, tern__gpu *d, const tern_gate_args *a)
{
    const unsigned grid = tern__grid(d, a->n, 1);
    const int threads = tern__row_threads(a->cols),
              wide = tern__wide(a->h, a->key, a->value, a->y, a->dy, a->dh, a->dkey, a->dvalue, 4 * a->cols);
    const size_t room = tern__row_shared(a->cols);
    TERN__TRY(tern__check_row(r, "gate", a->cols));
    if (a->dy) TERN__LAUNCH(tern__gate_tokens_back, grid, threads, room, d->stream, *a, wide);
    else TERN__LAUNCH(tern__gate_tokens, grid, threads, room, d->stream, *a, wide, tern__blame_of(d, TERN__FAULT_GATE));
    return TERN_OK;
}

/* -- codebooks: a block to a token, a warp to every eighth code -- */

/* The least distance, and of equal ones the first id, is the smallest key: distances are not negative. */
static __global__ void __launch_bounds__(TERN__THREADS) tern__nearest_codes(tern_nearest_args a, tern__blame blame)
{
    TERN__SHARED(tern__key, keys);
    const int warp = (int)(threadIdx.x / 32);
    float *sums = (float *)(keys + TERN__WARPS) + warp * tern__ceil_div(a.cols, TERN__BLOCK);
    for (int64_t t = blockIdx.x; t < a.n; t += gridDim.x) {
        const float *x = a.x + t * a.cols;
        tern__key best = (tern__key)0x7F7FFFFFu << 32; /* the largest float: beyond it nothing is nearest */
        for (int64_t i = warp; i < a.rows; i += TERN__WARPS) {
            const float *w = a.w + i * a.cols;
            const float distance =
                tern__warp_long_sum(a.cols, [&](int64_t j) { const float apart = x[j] - w[j]; return apart * apart; }, sums);
            const tern__key key = (tern__key)tern__bits(distance) << 32 | (tern__key)i;
            best = key < best ? key : best;
        }
        if (threadIdx.x % 32 == 0) keys[warp] = best;
        __syncthreads();
        for (int i = 0; i < TERN__WARPS; i++) best = keys[i] < best ? keys[i] : best;
        const bool found = best >> 32 < 0x7F7FFFFFu;
        if (threadIdx.x == 0) {
            a.ids[t] = found ? (int32_t)best : -1;
            if (a.distance) a.distance[t] = found ? tern__float((uint32_t)(best >> 32)) : 0.0f;
            if (!found) tern__report(blame, t);
        }
        __syncthreads(); /* keys may be written again */
    }
}

static tern_result tern__gpu_nearest(tern_run *r, tern__gpu *d, const tern_nearest_args *a)
{
    TERN__TRY(tern__check_row(r, "nearest", a->cols));
    TERN__LAUNCH(tern__nearest_codes, tern__grid(d, a->n, 1), TERN__THREADS, TERN__WARPS * (sizeof(tern__key) + tern__row_shared(a->cols)),
                 d->stream, *a, tern__blame_of(d, TERN__FAULT_NEAREST));
    return TERN_OK;
}

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
    TERN__TRY(tern__gpu_open_wgmma(r, d));
    return tern__gpu_open_together(r, d);
}

static void tern__gpu_close(tern_run *r)
{
    const tern_error kept = r->error;
    tern__gpu *d = tern__gpu_of(r);
    tern__current current;
    tern__gpu_enter(r, d->device, &current);
    if (d->meet) cudaFree(d->meet);
    if (d->work) cudaFree(d->work);
    if (d->fault) cudaFree(d->fault);
    if (d->stream) cudaStreamDestroy(d->stream);
    tern__gpu_leave(r, &current, TERN_OK);
    tern__host_free(&r->allocator, d);
    r->error = kept;
}

/* Products by warpgroups are those by warps, which only the GPU itself can tell: the known answers are of too few tokens for them. */
static tern_result tern__gpu_compare_wgmma(tern_context *c, tern__gpu *d, int32_t grain, int64_t n)
{
    enum { ROWS = 40, COLS = 300, TOKENS = 70, OUTPUTS = TOKENS * ROWS };
    float *const w = (float *)tern_alloc(c, (ROWS * COLS + TOKENS * COLS + 2 * OUTPUTS) * sizeof(float)), *const x = w + ROWS * COLS,
          *const y = x + TOKENS * COLS;
    uint8_t *const packed = (uint8_t *)tern_alloc(c, 1 << 17);
    float *const host = (float *)tern__host_alloc(&c->run.allocator, 2 * OUTPUTS * sizeof(float));
    tern_fill_args f = {};
    tern_ternarize_args t = {};
    tern_quantize_args q = {};
    tern_matmul_args a = {};
    tern_result result =
        w && packed && host ? TERN_OK
                            : tern__set_error(&c->run.error, TERN_E_MEMORY, "selftest: no memory for products of %d tokens", n);
    f.count = ROWS * COLS + TOKENS * COLS;
    f.x = w;
    f.deviation = 1.0f;
    f.seed = 22;
    t.m.rows = ROWS; t.m.cols = COLS;
    t.m.grain = grain;
    t.m.encoding = TERN_2BIT;
    t.m.trits = packed; t.m.scales = packed + (1 << 14);
    t.w = w;
    q.m = a.m = t.m;
    q.n = a.n = n;
    q.x = x;
    a.q = q.q = (int8_t *)packed + (1 << 15);
    a.scale = q.scale = (float *)(void *)(packed + (1 << 16));
    a.sum = q.sum = (int32_t *)(void *)(packed + (1 << 16) + (1 << 15));
    if (result == TERN_OK) result = tern_fill(c, &f);
    if (result == TERN_OK) result = tern_ternarize(c, &t);
    if (result == TERN_OK) result = tern_quantize(c, &q);
    for (int i = 0; i < 2 && result == TERN_OK; i++) {
        a.y = y + i * OUTPUTS;
        d->wgmma = !i;
        result = tern_matmul(c, &a);
    }
    d->wgmma = 1;
    if (result == TERN_OK) result = tern_copy(c, host, y, 2 * OUTPUTS * sizeof(float), TERN_TO_HOST);
    if (result == TERN_OK && memcmp(host, host + OUTPUTS, (size_t)(n * ROWS) * sizeof(float)) != 0)
        result = tern__set_error(&c->run.error, TERN_E_SELFTEST,
                                 "selftest: products of %d tokens by warpgroups are not those by warps on %s", n, c->run.backend->name);
    tern__host_free(&c->run.allocator, host);
    tern_free(c, packed);
    tern_free(c, w);
    return result;
}

/* The known answers, on a context that is not quite open yet. */
static tern_result tern__gpu_selftest(tern_run *r)
{
    tern__gpu *d = tern__gpu_of(r);
    tern_context c;
    tern_result result;
    memset(&c, 0, sizeof c);
    c.run = *r;
    result = tern_selftest(&c);
    if (result == TERN_OK && d->wgmma) result = tern__gpu_compare_wgmma(&c, d, TERN_PER_ROW, 40);
    if (result == TERN_OK && d->wgmma) result = tern__gpu_compare_wgmma(&c, d, TERN_PER_ROW, 70);
    if (result == TERN_OK && d->wgmma) result = tern__gpu_compare_wgmma(&c, d, 128, 40);
    r->error = c.run.error;
    return result;
}

/* All but the known answers. */
static tern_result tern__gpu_start(tern_run *r)
{
    const int device = *(const int *)r->backend->data;
    int devices = 0;
    tern__current current;
    tern_result result;
    tern__gpu *d;
    TERN__REQUIRE(r, device != -2, TERN_E_VERSION, "cuda: the caller's ternary.h is another version than ternary_cuda.cu's");
    TERN__CUDA(r, cudaGetDeviceCount(&devices), "looking for devices");
    TERN__REQUIRE(r, device >= 0 && device < devices, TERN_E_DEVICE,
                  "cuda: there is no such device; %d can be used, counted from 0", (int64_t)tern__min(devices, TERN__GPUS));
    d = (tern__gpu *)tern__host_alloc(&r->allocator, sizeof *d);
    TERN__REQUIRE(r, d, TERN_E_MEMORY, "cuda: no memory for the device's state");
    d->device = device;
    r->state = d;
    result = tern__gpu_enter(r, device, &current);
    if (result == TERN_OK) result = tern__gpu_leave(r, &current, tern__gpu_open_here(r, d));
    if (result != TERN_OK) tern__gpu_close(r);
    return result;
}

static tern_result tern__gpu_open(tern_run *r)
{
    tern_result result;
    TERN__TRY(tern__gpu_start(r));
    result = tern__gpu_selftest(r);
    if (result != TERN_OK) tern__gpu_close(r);
    return result;
}

#define TERN__OP(op) tern__cuda_##op,
#define TERN__TABLE(device)                                                                                               \
    {"cuda", &tern__gpu_index[(device) + 2], 128, tern__gpu_open, tern__gpu_close, tern__gpu_alloc, tern__gpu_free, tern__gpu_copy, \
     tern__gpu_sync, TERN_OPS(TERN__OP) TERN_FUSED(TERN__OP) 0}
static const int tern__gpu_index[TERN__GPUS + 2] = {-2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const tern_backend tern__gpu_table[TERN__GPUS + 2] = {
    TERN__TABLE(-2), TERN__TABLE(-1), TERN__TABLE(0), TERN__TABLE(1), TERN__TABLE(2), TERN__TABLE(3),
    TERN__TABLE(4), TERN__TABLE(5), TERN__TABLE(6), TERN__TABLE(7), TERN__TABLE(8), TERN__TABLE(9),
    TERN__TABLE(10), TERN__TABLE(11), TERN__TABLE(12), TERN__TABLE(13), TERN__TABLE(14), TERN__TABLE(15)
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
    return c && c->run.backend->close == tern__gpu_close ? (void *)tern__gpu_of(&c->run)->stream : NULL;
}
