/* CUDA on the CPU, as strict as the hardware and stricter: included before ternary_cuda.cu, it takes the place of
   nvcc's language and of the runtime, so that the backend is tested without a GPU:

     g++ -std=c++17 -O1 -g -x c++ -include tests/cuda.h -I. ternary_cuda.cu ...        (add -fsanitize=address)

   The threads of a block are fibers of the calling thread, one block runs after the other, and a schedule says in
   which order; of a launch together, each up to the barrier of the grid. A fault (a lane missing in a collective, a barrier
   that not all reach) is named and ends the program.
   Shared memory and fresh device memory are full of 0xCD; AddressSanitizer guards the ends of both. */
#ifndef TEST_CUDA_H
#define TEST_CUDA_H

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ASAN 1
#endif
#endif
#ifdef CUDA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __asan_poison_memory_region(const volatile void *, size_t) {}
inline void __asan_unpoison_memory_region(const volatile void *, size_t) {}
inline void __sanitizer_start_switch_fiber(void **, const void *, size_t) {}
inline void __sanitizer_finish_switch_fiber(void *, const void **, size_t *) {}
#endif

/* -- language -- */

#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* unroll */
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned i = 1, unsigned j = 1, unsigned k = 1) : x(i), y(j), z(k) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim; /* of the running thread */

#define TERN__SHARED(type, name) type *const name = static_cast<type *>(test_cuda.shared)
#define TERN__LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    cuda_launch(#kernel, kernel, false, grid, block, shared_bytes, stream, __VA_ARGS__)
#define TERN__LAUNCH_TOGETHER(kernel, grid, block, shared_bytes, stream, ...) \
    cuda_launch(#kernel, kernel, true, grid, block, shared_bytes, stream, __VA_ARGS__)

/* -- fibers -- */

#if defined(__x86_64__) && !defined(TEST_CUDA_UCONTEXT)
typedef void *cuda_place; /* where a fiber stopped: its stack pointer, over the registers that a call preserves */
__attribute__((naked, noinline)) inline void cuda_switch(cuda_place * /* from: rdi */, const cuda_place * /* to: rsi */)
{
    __asm__("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp, (%rdi)\n"
            "movq (%rsi), %rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void cuda_begin(cuda_place *place, char *stack, size_t bytes, void (*entry)())
{
    void **top = static_cast<void **>(static_cast<void *>(stack + bytes)); /* entry's frame starts 8 below a multiple of 16 */
    top[-2] = reinterpret_cast<void *>(entry);
    *place = top - 8;
}
#else
#include <ucontext.h>
typedef ucontext_t cuda_place;
inline void cuda_switch(cuda_place *from, const cuda_place *to) { swapcontext(from, to); }
inline void cuda_begin(cuda_place *place, char *stack, size_t bytes, void (*entry)())
{
    getcontext(place);
    place->uc_stack.ss_sp = stack;
    place->uc_stack.ss_size = bytes;
    makecontext(place, entry, 0);
}
#endif

/* -- state -- */

enum {
    CUDA_WARP = 32, CUDA_THREADS = 1024, CUDA_SHARED = 227 * 1024, CUDA_STACK = 256 * 1024, CUDA_POISON = 0xCD,
    CUDA_PROCESSOR_THREADS = 1024, CUDA_PROCESSOR_SHARED = 64 * 1024 /* of the least architecture: what blocks launched together share */
};
enum cuda_schedule { CUDA_FORWARD, CUDA_REVERSE, CUDA_RANDOM }; /* of blocks, of warps between barriers, of lanes */
enum cuda_state { CUDA_READY, CUDA_MEETING, CUDA_AT_BARRIER, CUDA_AT_GRID_BARRIER, CUDA_RETURNED };

enum cudaError_t {
    cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation, cudaErrorInvalidConfiguration = 9, cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice, cudaErrorInvalidResourceHandle = 400, cudaErrorIllegalState,
    cudaErrorCooperativeLaunchTooLarge = 720, cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorUnknown = 999
};
typedef std::vector<std::function<void()>> cuda_operations;
typedef struct cuda_stream { cuda_operations *capture; int device; } *cudaStream_t;
typedef cuda_operations *cudaGraph_t, *cudaGraphExec_t;
typedef double *cudaEvent_t; /* when it came, in seconds */

struct cuda_copy { void *to; const void *from; unsigned group; };
struct cuda_block { size_t bytes; int device; }; /* of device memory */

/* What a test breaks: a barrier (that of one line of code, of functions whose name begins so or of all, numbered as they are
   met), waits for copies, lanes of shuffles or of mma, reads of 16 bytes, the shared memory of a launch, or waits for, fences
   before and publishing for products of warpgroups. */
enum cuda_sabotage_kind {
    CUDA_INTACT, CUDA_NO_BARRIER, CUDA_NO_WAIT, CUDA_WRONG_LANE, CUDA_WRONG_MMA, CUDA_READS_BEYOND, CUDA_LITTLE_SHARED,
    CUDA_NO_WGMMA_WAIT, CUDA_NO_WGMMA_FENCE, CUDA_NO_WGMMA_PUBLISH
};
struct cuda_sabotage {
    cuda_sabotage_kind kind = CUDA_INTACT;
    size_t barrier = 0;
    const char *function = nullptr;
    long done = 0;             /* how often */
    std::vector<int> barriers; /* the lines that were met */
};

/* 16 bytes of shared memory: the thread, counted from 1, that copied there, and how often it had published before; never, while
   under way. */
struct cuda_copied { unsigned thread, publishes; };
enum : unsigned { CUDA_UNDER_WAY = UINT32_MAX };

/* Of a warpgroup's product, a warp's part: 16 rows by so many columns. */
struct cuda_product {
    uint64_t b; /* the matrix descriptor */
    unsigned columns, group;
    int *d[CUDA_WARP];
    const uint32_t *a[CUDA_WARP];
    uint32_t rows[CUDA_WARP][4]; /* a when it was asked for, */
    std::vector<int8_t> tile;    /* and b, [input][column] */
};
struct cuda_warp {
    std::vector<cuda_product> products;              /* under way, */
    std::map<int *, std::vector<int>> sums;          /* and what has arrived of a lane's d of theirs */
    std::vector<std::pair<uint64_t, unsigned>> asked; /* all: descriptor and columns */
    unsigned groups;                                 /* committed */
};

/* A place in the block. Its fiber and stack stay for the blocks and launches that follow. */
struct cuda_thread {
    char *stack;
    cuda_place place;
    void *fake_stack; /* AddressSanitizer's */
    cuda_state state;
    const char *waits_at;    /* MEETING: the collective, what it does for the warp, and this lane's part in it */
    void (*resolve)();
    void *part;
    std::vector<cuda_copy> copies; /* asynchronous, not yet waited for */
    unsigned groups;               /* of copies, committed */
    unsigned publishes;            /* tern__wgmma_publish */
    std::vector<std::pair<const char *, std::vector<char>>> fenced; /* registers as they were at the last tern__wgmma_fence */
};

/* A block that is on its way: its threads, lanes of warps that wait in a collective, and its shared memory. */
struct cuda_room {
    cuda_thread thread[CUDA_THREADS] = {};
    unsigned meeting[CUDA_THREADS / CUDA_WARP] = {};
    cuda_warp warp[CUDA_THREADS / CUDA_WARP] = {};
    cuda_copied copied[CUDA_SHARED / 16] = {};
    void *shared = nullptr;
    cuda_room() { if (posix_memalign(&shared, 1024, CUDA_SHARED) != 0) abort(); }
    cuda_room(const cuda_room &) = delete;
    cuda_room &operator=(const cuda_room &) = delete;
    ~cuda_room() { free(shared); }
};

struct cuda_emulator {
    /* Set by tests. A countdown of n lets n calls through and fails the next; below zero nothing fails. */
    cuda_schedule schedule = CUDA_FORWARD;
    uint32_t seed = 1;           /* of CUDA_RANDOM */
    bool fuse = true;            /* false: __fmaf_rn rounds the product too, as the scalar tier of the CPU does */
    bool lazy = false;           /* nothing runs before the host waits for it */
    int devices = 1, capability = 90, processors = 4, cooperative = 1, driver = 12010;
    bool wgmma = true;           /* kernels are those for sm_90a */
    long malloc_countdown = -1;
    long call_countdown = -1;    /* every call but those that free; launches too */
    std::map<const char *, cuda_block> memory; /* cudaMalloc's */
    cuda_sabotage sabotage;
    long launches = 0;           /* that ran */

    int device = 0;              /* the current one */
    cudaError_t last_error = cudaSuccess;
    cuda_operations queue;
    int captures = 0;
    std::map<const void *, size_t> shared_limit; /* of kernels, by cudaFuncSetAttribute */

    /* The running launch. */
    const char *kernel = nullptr;
    const std::function<void()> *body = nullptr;
    bool together = false;
    std::deque<cuda_room> rooms;    /* the first one serves all launches but those together */
    size_t shared_bytes = 0;
    void *shared = nullptr;         /* of the room of the running block, */
    cuda_thread *thread = nullptr;  /* as these */
    unsigned *meeting = nullptr;
    cuda_warp *warp = nullptr;
    cuda_copied *copied = nullptr;
    std::vector<unsigned> block_order, warp_order, lane_order;
    cuda_place host = {};
    const void *host_stack = nullptr;
    size_t host_stack_bytes = 0;
};
inline cuda_emulator test_cuda;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void cuda_fault(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "cuda: kernel %s, block (%u, %u), thread %u: ", test_cuda.kernel, blockIdx.x, blockIdx.y, threadIdx.x);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    abort();
}

inline bool cuda_sabotaged(cuda_sabotage_kind kind)
{
    if (test_cuda.sabotage.kind != kind) return false;
    test_cuda.sabotage.done++;
    return true;
}

/* -- schedule -- */

inline unsigned cuda_random(unsigned below)
{
    test_cuda.seed = test_cuda.seed * 1664525u + 1013904223u;
    return static_cast<unsigned>(static_cast<uint64_t>(test_cuda.seed) * below >> 32);
}

inline const std::vector<unsigned> &cuda_order(std::vector<unsigned> &order, unsigned n)
{
    order.resize(n);
    for (unsigned i = 0; i < n; i++) order[i] = test_cuda.schedule == CUDA_REVERSE ? n - 1 - i : i;
    for (unsigned i = n; test_cuda.schedule == CUDA_RANDOM && i > 1; i--) std::swap(order[i - 1], order[cuda_random(i)]);
    return order;
}

/* From the running thread to the scheduler, and back when its turn comes. */
inline void cuda_yield()
{
    cuda_thread *self = &test_cuda.thread[threadIdx.x];
    __sanitizer_start_switch_fiber(&self->fake_stack, test_cuda.host_stack, test_cuda.host_stack_bytes);
    cuda_switch(&self->place, &test_cuda.host);
    __sanitizer_finish_switch_fiber(self->fake_stack, &test_cuda.host_stack, &test_cuda.host_stack_bytes);
}

inline void cuda_end_copies(unsigned open);

inline void cuda_fiber()
{
    __sanitizer_finish_switch_fiber(nullptr, &test_cuda.host_stack, &test_cuda.host_stack_bytes);
    for (;;) {
        (*test_cuda.body)();
        cuda_end_copies(0);
        test_cuda.thread[threadIdx.x].state = CUDA_RETURNED;
        cuda_yield();
    }
}

/* Under the stack lies a page that faults. Tops are spread, or all stacks would share a few sets of the cache. */
inline void cuda_new_fiber(cuda_thread *thread, unsigned index)
{
    const size_t page = 4096, spread = index % 61 * 1088;
    void *p = mmap(nullptr, CUDA_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page, PROT_NONE) != 0) abort();
    thread->stack = static_cast<char *>(p);
    cuda_begin(&thread->place, thread->stack, CUDA_STACK - spread, cuda_fiber);
}

/* One turn for each lane that is ready: up to its next collective, barrier or end. Says whether there was one. */
inline bool cuda_run_warp(unsigned warp)
{
    const unsigned first = warp * CUDA_WARP, lanes = std::min<unsigned>(CUDA_WARP, blockDim.x - first);
    bool ran = false;
    for (unsigned lane : cuda_order(test_cuda.lane_order, lanes)) {
        cuda_thread *thread = &test_cuda.thread[first + lane];
        void *fake_stack = nullptr;
        if (thread->state != CUDA_READY) continue;
        threadIdx.x = first + lane;
        __sanitizer_start_switch_fiber(&fake_stack, thread->stack, CUDA_STACK);
        cuda_switch(&test_cuda.host, &thread->place);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
        ran = true;
    }
    return ran;
}

/* Each warp runs as far ahead of the others as it can (in random order: by chance), so that a missing barrier shows. */
inline bool cuda_run_warps()
{
    bool ran = false;
    for (unsigned warp : cuda_order(test_cuda.warp_order, (blockDim.x + CUDA_WARP - 1) / CUDA_WARP))
        while (cuda_run_warp(warp)) {
            ran = true;
            if (test_cuda.schedule == CUDA_RANDOM && cuda_random(4) == 0) break;
        }
    return ran;
}

/* No thread is ready, and not all are at a barrier or at their end: names the first that waits and one that lets it. */
[[noreturn]] inline void cuda_explain_stall()
{
    const cuda_thread *self = test_cuda.thread, *other;
    while (self->state == CUDA_RETURNED) self++;
    threadIdx.x = static_cast<unsigned>(self - test_cuda.thread);
    other = self->state == CUDA_MEETING ? self - threadIdx.x % CUDA_WARP : test_cuda.thread;
    while (other->state == self->state) other++;
    const unsigned i = static_cast<unsigned>(other - test_cuda.thread);
    if (other->state == CUDA_RETURNED) cuda_fault("waits at %s for thread %u, which has returned", self->waits_at, i);
    cuda_fault("waits at %s for thread %u, which waits at %s", self->waits_at, i, other->waits_at);
}

/* No product is left under way, and the four warps of each warpgroup have asked for the same. */
inline void cuda_check_products()
{
    for (unsigned warp = 0; warp < blockDim.x / CUDA_WARP; warp++) {
        const cuda_warp *self = &test_cuda.warp[warp];
        threadIdx.x = warp * CUDA_WARP;
        if (!self->products.empty()) cuda_fault("returned before its products by tern__wgmma_s8");
        if (self->asked != test_cuda.warp[warp / 4 * 4].asked)
            cuda_fault("other products by tern__wgmma_s8 than thread %u", warp / 4 * 4 * CUDA_WARP);
    }
}

/* Gives the block a room, whose fibers and memory stay for later launches. */
inline void cuda_enter(unsigned block, unsigned room)
{
    while (test_cuda.rooms.size() <= room) test_cuda.rooms.emplace_back();
    blockIdx = dim3(block % gridDim.x, block / gridDim.x, 0);
    test_cuda.thread = test_cuda.rooms[room].thread;
    test_cuda.meeting = test_cuda.rooms[room].meeting;
    test_cuda.warp = test_cuda.rooms[room].warp;
    test_cuda.copied = test_cuda.rooms[room].copied;
    test_cuda.shared = test_cuda.rooms[room].shared;
}

inline void cuda_begin_block()
{
    __asan_poison_memory_region(test_cuda.shared, CUDA_SHARED);
    __asan_unpoison_memory_region(test_cuda.shared, test_cuda.shared_bytes);
    memset(test_cuda.shared, CUDA_POISON, test_cuda.shared_bytes);
    memset(test_cuda.copied, 0, (test_cuda.shared_bytes + 15) / 16 * sizeof(cuda_copied));
    for (unsigned i = 0; i < blockDim.x; i++) test_cuda.thread[i].fenced.clear();
    for (unsigned i = 0; i < blockDim.x / CUDA_WARP; i++) test_cuda.warp[i] = {};
    for (unsigned i = 0; i < blockDim.x; i++)
        if (!test_cuda.thread[i].stack) cuda_new_fiber(&test_cuda.thread[i], i);
}

/* Up to the block's end, or the barrier of the grid. */
inline void cuda_run_block()
{
    do {
        for (unsigned i = 0; i < blockDim.x; i++) test_cuda.thread[i].state = CUDA_READY;
        while (cuda_run_warps()) {}
        for (unsigned i = 1; i < blockDim.x; i++)
            if (test_cuda.thread[i].state != test_cuda.thread[0].state) cuda_explain_stall();
    } while (test_cuda.thread[0].state == CUDA_AT_BARRIER);
    if (test_cuda.thread[0].state == CUDA_RETURNED) cuda_check_products();
}

/* All blocks are there at once, in rooms of their own. */
inline void cuda_run_together()
{
    const unsigned blocks = gridDim.x * gridDim.y;
    const cuda_state *first = nullptr;
    for (unsigned i = 0; i < blocks; i++) {
        cuda_enter(i, i);
        cuda_begin_block();
    }
    do {
        for (unsigned i : cuda_order(test_cuda.block_order, blocks)) {
            cuda_enter(i, i);
            cuda_run_block();
        }
        first = &test_cuda.rooms[0].thread[0].state;
        for (unsigned i = 1; i < blocks; i++) {
            const bool waits = *first == CUDA_AT_GRID_BARRIER;
            if (test_cuda.rooms[i].thread[0].state == *first) continue;
            cuda_enter(waits ? 0 : i, waits ? 0 : i);
            threadIdx.x = 0;
            cuda_fault("waits at the barrier of the grid for block %u, which has returned", waits ? i : 0);
        }
    } while (*first == CUDA_AT_GRID_BARRIER);
}

inline void cuda_run_grid(const char *kernel, bool together, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &body)
{
    test_cuda.kernel = kernel;
    test_cuda.together = together;
    test_cuda.body = &body;
    test_cuda.shared_bytes = shared_bytes;
    if (shared_bytes > 0 && cuda_sabotaged(CUDA_LITTLE_SHARED))
        test_cuda.shared_bytes -= std::min<size_t>(shared_bytes, 32); /* past the padding of a tile */
    test_cuda.launches++;
    blockDim = block;
    gridDim = grid;
    if (together) return cuda_run_together();
    for (unsigned i : cuda_order(test_cuda.block_order, grid.x * grid.y)) {
        cuda_enter(i, 0);
        cuda_begin_block();
        cuda_run_block();
    }
}

/* -- barriers and warp collectives -- */

/* Whether the barrier of this line is to be left out. */
inline bool cuda_no_barrier(int line, const char *function)
{
    cuda_sabotage *s = &test_cuda.sabotage;
    if (s->kind != CUDA_NO_BARRIER || (s->function && strncmp(function, s->function, strlen(s->function)) != 0)) return false;
    const auto found = std::find(s->barriers.begin(), s->barriers.end(), line);
    const size_t index = static_cast<size_t>(found - s->barriers.begin());
    if (found == s->barriers.end()) s->barriers.push_back(line);
    return index == s->barrier && cuda_sabotaged(CUDA_NO_BARRIER);
}

inline void __syncthreads(int line = __builtin_LINE(), const char *function = __builtin_FUNCTION())
{
    cuda_thread *self = &test_cuda.thread[threadIdx.x];
    if (cuda_no_barrier(line, function)) return;
    self->state = CUDA_AT_BARRIER;
    self->waits_at = "__syncthreads";
    cuda_yield();
}

/* Also among all threads of the grid, in a launch together. word: of device memory, zero before the first launch. */
inline void tern__grid_barrier(unsigned *word, int line = __builtin_LINE(), const char *function = __builtin_FUNCTION())
{
    cuda_thread *self = &test_cuda.thread[threadIdx.x];
    if (!test_cuda.together) cuda_fault("tern__grid_barrier in a launch whose blocks are not together");
    if (*word != 0) cuda_fault("tern__grid_barrier with a word that is not zero");
    if (cuda_no_barrier(line, function)) return;
    self->state = CUDA_AT_GRID_BARRIER;
    self->waits_at = "tern__grid_barrier";
    cuda_yield();
}

/* All lanes of the warp come here with their parts; the last one resolves them, then all go on. */
template <typename Part> inline void cuda_meet(const char *name, unsigned mask, Part *part, void (*resolve)(Part **))
{
    const unsigned warp = threadIdx.x / CUDA_WARP, first = warp * CUDA_WARP;
    cuda_thread *self = &test_cuda.thread[threadIdx.x], *lanes = &test_cuda.thread[first];
    if (mask != 0xFFFFFFFFu) cuda_fault("%s with mask %08x", name, mask);
    if (first + CUDA_WARP > blockDim.x) cuda_fault("%s in a warp of %u lanes", name, blockDim.x - first);
    self->state = CUDA_MEETING;
    self->waits_at = name;
    self->resolve = reinterpret_cast<void (*)()>(resolve);
    self->part = part;
    if (++test_cuda.meeting[warp] == CUDA_WARP) {
        Part *parts[CUDA_WARP];
        for (unsigned i = 0; i < CUDA_WARP; i++) {
            const cuda_thread *lane = &lanes[i];
            if (lane->resolve != self->resolve) cuda_fault("at %s, but thread %u is at %s", name, first + i, lane->waits_at);
            parts[i] = static_cast<Part *>(lane->part);
        }
        resolve(parts);
        for (unsigned i = 0; i < CUDA_WARP; i++) lanes[i].state = CUDA_READY;
        test_cuda.meeting[warp] = 0;
    }
    cuda_yield();
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu)
{
    cuda_meet<void>("__syncwarp", mask, nullptr, [](void **) {});
}

template <typename T> struct cuda_shuffle { T value; int from; T result; };
template <typename T> inline T cuda_meet_shuffle(const char *name, unsigned mask, T value, int from)
{
    cuda_shuffle<T> part = {value, from, value};
    if (from < 0 || from >= CUDA_WARP) cuda_fault("%s from lane %d", name, from);
    cuda_meet<cuda_shuffle<T>>(name, mask, &part, [](cuda_shuffle<T> **parts) {
        const int wrong = cuda_sabotaged(CUDA_WRONG_LANE);
        for (int i = 0; i < CUDA_WARP; i++) parts[i]->result = parts[(parts[i]->from + wrong) % CUDA_WARP]->value;
    });
    return part.result;
}
template <typename T> inline T __shfl_sync(unsigned mask, T value, int from)
{
    return cuda_meet_shuffle("__shfl_sync", mask, value, from);
}
template <typename T> inline T __shfl_xor_sync(unsigned mask, T value, int flip)
{
    return cuda_meet_shuffle("__shfl_xor_sync", mask, value, static_cast<int>(threadIdx.x % CUDA_WARP) ^ flip);
}

inline unsigned __ballot_sync(unsigned mask, int predicate)
{
    unsigned part = predicate != 0;
    cuda_meet<unsigned>("__ballot_sync", mask, &part, [](unsigned **parts) {
        unsigned votes = 0;
        for (int i = 0; i < CUDA_WARP; i++) votes |= *parts[i] << i;
        for (int i = 0; i < CUDA_WARP; i++) *parts[i] = votes;
    });
    return part;
}

/* -- tensor cores: mma.m16n8k32.row.col.s32.s8.s8.s32 and mma.m16n8k16.row.col.f32.bf16.bf16.f32 --
   Lane 4g + t. Register r of a holds row g + 8(r % 2), register r of b column g, from input (4(r / 2) + t)E on, E to a
   register, the first in the lowest bits; a's r / 2 is b's r. d[i] is row g + 8(i / 2), column 2t + i % 2. */

inline int cuda_value(int8_t x) { return x; }
inline float cuda_value(uint16_t bf16)
{
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

template <typename Sum> struct cuda_mma { Sum *d; const uint32_t *a, *b; };
template <typename Element, typename Sum> inline void cuda_multiply(cuda_mma<Sum> **parts)
{
    const int each = 4 / sizeof(Element), inputs = 8 * each, bits = 8 * sizeof(Element);
    const int wrong = cuda_sabotaged(CUDA_WRONG_MMA);
    Sum a[16][inputs], b[8][inputs];
    for (int lane = 0; lane < CUDA_WARP; lane++)
        for (int i = 0; i < 4 * each; i++) {
            const int g = lane / 4, r = i / each, k = (4 * (r / 2) + lane % 4) * each + i % each, shift = i % each * bits;
            a[g + 8 * (r % 2)][k] = cuda_value(static_cast<Element>(parts[(lane + wrong) % CUDA_WARP]->a[r] >> shift));
            b[g][k] = cuda_value(static_cast<Element>(parts[lane]->b[r / 2] >> shift));
        }
    for (int lane = 0; lane < CUDA_WARP; lane++)
        for (int i = 0; i < 4; i++) {
            const Sum *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
            Sum sum = parts[lane]->d[i];
            for (int k = 0; k < inputs; k++) sum += row[k] * column[k];
            parts[lane]->d[i] = sum;
        }
}

inline void tern__mma_s8(int d[4], const uint32_t a[4], const uint32_t b[2])
{
    cuda_mma<int> part = {d, a, b};
    cuda_meet<cuda_mma<int>>("tern__mma_s8", 0xFFFFFFFFu, &part, cuda_multiply<int8_t, int>);
}
inline void tern__mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    cuda_mma<float> part = {d, a, b};
    cuda_meet<cuda_mma<float>>("tern__mma_bf16", 0xFFFFFFFFu, &part, cuda_multiply<uint16_t, float>);
}

/* -- asynchronous copies: from the request on the target is poison, after the thread's wait it is the source -- */

inline void tern__cp_async16_or_zero(void *shared, const void *global, bool there)
{
    cuda_thread *self = &test_cuda.thread[threadIdx.x];
    const uintptr_t offset = reinterpret_cast<uintptr_t>(shared) - reinterpret_cast<uintptr_t>(test_cuda.shared);
    if (offset % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) cuda_fault("tern__cp_async16 is not aligned to 16");
    if (offset >= test_cuda.shared_bytes || test_cuda.shared_bytes - offset < 16)
        cuda_fault("tern__cp_async16 to outside of shared memory");
    memset(shared, CUDA_POISON, 16);
    __asan_poison_memory_region(shared, 16);
    test_cuda.copied[offset / 16] = {threadIdx.x + 1, CUDA_UNDER_WAY};
    self->copies.push_back({shared, there ? static_cast<const uint4 *>(global) + cuda_sabotaged(CUDA_READS_BEYOND) : nullptr,
                            self->groups});
}
inline void tern__cp_async16(void *shared, const void *global) { tern__cp_async16_or_zero(shared, global, true); }

inline void tern__cp_commit() { test_cuda.thread[threadIdx.x].groups++; }

/* The copies of groups before `open` arrive; 0: all. */
inline void cuda_end_copies(unsigned open)
{
    cuda_thread *self = &test_cuda.thread[threadIdx.x];
    auto copy = self->copies.begin();
    for (; copy != self->copies.end() && (open == 0 || copy->group < open); ++copy) {
        __asan_unpoison_memory_region(copy->to, 16);
        if (copy->from) memcpy(copy->to, copy->from, 16);
        else memset(copy->to, 0, 16);
        test_cuda.copied[(static_cast<char *>(copy->to) - static_cast<char *>(test_cuda.shared)) / 16] = {threadIdx.x + 1, self->publishes};
    }
    self->copies.erase(self->copies.begin(), copy);
}

template <unsigned Pending> inline void tern__cp_wait()
{
    const unsigned groups = test_cuda.thread[threadIdx.x].groups;
    if (groups > Pending && !cuda_sabotaged(CUDA_NO_WAIT)) cuda_end_copies(groups - Pending);
}

/* -- products of warpgroups: wgmma.mma_async.m64nNk32.s32.s8.s8, a in registers, b in shared memory --
   Each of the four warps has 16 rows, in registers as those of mma.m16n8k32, and goes its own way. A product may read a and b from
   when it is asked for until it is waited for: who writes in between is caught. Until then d is poison. What has been copied to b must
   have been published by who copied it; plain stores are not watched. */

#define TERN__HAS_WGMMA test_cuda.wgmma

enum { CUDA_RESERVED = 1024 }; /* bytes of shared memory before those of a kernel */

inline uint32_t tern__shared_address(const void *shared)
{
    return CUDA_RESERVED + static_cast<uint32_t>(static_cast<const char *>(shared) - static_cast<const char *>(test_cuda.shared));
}

inline void tern__wgmma_publish()
{
    if (!cuda_sabotaged(CUDA_NO_WGMMA_PUBLISH)) test_cuda.thread[threadIdx.x].publishes++;
}

/* Inputs [k, k + 16) of column n, by a descriptor: bits 0 to 13 where the tile begins, 16 to 29 and 32 to 45 how far apart lie core
   matrices (eight columns of 16 bytes, or of 32, 64 and 128 with swizzle) that are neighbours in inputs and in columns, all in 16 bytes;
   62 and 63 the swizzle: to bits 4 to 6, 4 and 5 or 4 of an address those from 7 on are added, without carry. */
inline const int8_t *cuda_piece(uint64_t b, unsigned n, unsigned k)
{
    const unsigned start = static_cast<unsigned>(b & 0x3FFF) * 16, leading = static_cast<unsigned>(b >> 16 & 0x3FFF) * 16;
    const unsigned stride = static_cast<unsigned>(b >> 32 & 0x3FFF) * 16, mode = static_cast<unsigned>(b >> 62),
                   width = mode ? 256 >> mode : 16;
    unsigned at = start + n / 8 * stride + n % 8 * width + k / width * leading + k % width;
    if (mode) at ^= (at >> 7 & ((16u >> mode) - 1)) << 4;
    const size_t offset = at - static_cast<size_t>(CUDA_RESERVED);
    if (b >> 14 & 3 || b >> 30 & 3 || b >> 46 & 0xFFFF) cuda_fault("a matrix descriptor %016llx", static_cast<unsigned long long>(b));
    if (at < CUDA_RESERVED || offset + 16 > test_cuda.shared_bytes) cuda_fault("tern__wgmma_s8 reads outside of shared memory");
    const cuda_copied copied = test_cuda.copied[offset / 16];
    if (copied.thread && test_cuda.thread[copied.thread - 1].publishes <= copied.publishes)
        cuda_fault("tern__wgmma_s8 reads what thread %u has not published", copied.thread - 1);
    return static_cast<const int8_t *>(test_cuda.shared) + offset;
}
inline std::vector<int8_t> cuda_tile(uint64_t b, unsigned columns)
{
    std::vector<int8_t> tile(32 * columns);
    for (unsigned n = 0; n < columns; n++)
        for (unsigned k = 0; k < 32; k += 16) {
            const int8_t *piece = cuda_piece(b, n, k);
            for (unsigned i = 0; i < 16; i++) tile[(k + i) * columns + n] = piece[i];
        }
    return tile;
}

inline void cuda_hold(const void *registers, size_t bytes)
{
    const char *p = static_cast<const char *>(registers);
    test_cuda.thread[threadIdx.x].fenced.push_back({p, std::vector<char>(p, p + bytes)});
}
inline bool cuda_held(const cuda_thread &thread, const void *registers, size_t bytes)
{
    const char *p = static_cast<const char *>(registers);
    for (const auto &held : thread.fenced)
        if (p >= held.first && p + bytes <= held.first + held.second.size())
            return memcmp(p, &held.second[static_cast<size_t>(p - held.first)], bytes) == 0;
    return false;
}

template <int Products, int Tiles> inline void tern__wgmma_fence(uint32_t (&a)[Products][4], int (&d)[Products][Tiles][4])
{
    cuda_meet<void>("tern__wgmma_fence", 0xFFFFFFFFu, nullptr, [](void **) {});
    if (cuda_sabotaged(CUDA_NO_WGMMA_FENCE)) return;
    test_cuda.thread[threadIdx.x].fenced.clear();
    cuda_hold(a, sizeof a);
    cuda_hold(d, sizeof d);
}

struct cuda_wgmma { int *d; const uint32_t *a; uint64_t b; };
template <unsigned Columns> inline void cuda_ask(cuda_wgmma **parts)
{
    const unsigned first = threadIdx.x / CUDA_WARP * CUDA_WARP, sums = Columns / 2;
    cuda_warp *warp = &test_cuda.warp[threadIdx.x / CUDA_WARP];
    cuda_product product = {parts[0]->b, Columns, warp->groups, {}, {}, {}, {}};
    if (!test_cuda.wgmma) cuda_fault("tern__wgmma_s8 in code that has it not");
    if (blockDim.x % (4 * CUDA_WARP) != 0) cuda_fault("tern__wgmma_s8 in a block of %u threads", blockDim.x);
    for (unsigned i = 0; i < CUDA_WARP; i++) {
        const cuda_wgmma *part = parts[i];
        const cuda_thread &thread = test_cuda.thread[first + i];
        if (part->b != product.b) cuda_fault("tern__wgmma_s8, but thread %u has another tile", first + i);
        if (!cuda_held(thread, part->a, sizeof product.rows[i])) cuda_fault("tern__wgmma_s8, but thread %u has not fenced a", first + i);
        if (!warp->sums.count(part->d)) {
            if (!cuda_held(thread, part->d, sums * sizeof(int))) cuda_fault("tern__wgmma_s8, but thread %u has not fenced d", first + i);
            warp->sums[part->d].assign(part->d, part->d + sums);
            memset(part->d, CUDA_POISON, sums * sizeof(int));
        }
        product.d[i] = part->d;
        product.a[i] = part->a;
        memcpy(product.rows[i], part->a, sizeof product.rows[i]);
    }
    product.tile = cuda_tile(product.b, Columns);
    warp->asked.push_back({product.b, Columns});
    warp->products.push_back(std::move(product));
}
template <int Tiles> inline void tern__wgmma_s8(int (&d)[Tiles][4], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(Tiles >= 1 && Tiles <= 32 && (Tiles <= 4 || Tiles % 2 == 0), "a shape that there is");
    cuda_wgmma part = {&d[0][0], a, b};
    cuda_meet<cuda_wgmma>("tern__wgmma_s8", 0xFFFFFFFFu, &part, cuda_ask<8 * Tiles>);
}

inline void cuda_add_product(const cuda_product &p, cuda_warp *warp)
{
    const unsigned columns = p.columns, wrong = cuda_sabotaged(CUDA_WRONG_MMA);
    std::vector<int> sums(16 * columns);
    for (unsigned lane = 0; lane < CUDA_WARP; lane++)
        for (unsigned i = 0; i < 16; i++) {
            const unsigned r = i / 4, k = 16 * (r / 2) + 4 * (lane % 4) + i % 4;
            const int8_t x = static_cast<int8_t>(p.rows[(lane + wrong) % CUDA_WARP][r] >> i % 4 * 8);
            int *row = &sums[(lane / 4 + 8 * (r % 2)) * columns];
            for (unsigned n = 0; x && n < columns; n++) row[n] += x * p.tile[k * columns + n];
        }
    for (unsigned lane = 0; lane < CUDA_WARP; lane++)
        for (unsigned i = 0; i < columns / 2; i++)
            warp->sums[p.d[lane]][i] += sums[(lane / 4 + 8 * (i % 4 / 2)) * columns + i / 4 * 8 + lane % 4 * 2 + i % 2];
}

/* The oldest product arrives. */
inline void cuda_end_product(cuda_warp *warp)
{
    const cuda_product p = std::move(warp->products.front());
    warp->products.erase(warp->products.begin());
    if (cuda_tile(p.b, p.columns) != p.tile) cuda_fault("shared memory changed under tern__wgmma_s8");
    cuda_add_product(p, warp);
    for (unsigned i = 0; i < CUDA_WARP; i++) {
        const std::vector<char> poison(p.columns / 2 * sizeof(int), static_cast<char>(CUDA_POISON));
        bool more = false;
        if (memcmp(p.a[i], p.rows[i], sizeof p.rows[i]) != 0) cuda_fault("a changed under tern__wgmma_s8");
        if (memcmp(p.d[i], poison.data(), poison.size()) != 0) cuda_fault("d changed under tern__wgmma_s8");
        for (const cuda_product &other : warp->products) more |= other.d[i] == p.d[i];
        if (more) continue;
        memcpy(p.d[i], warp->sums[p.d[i]].data(), poison.size());
        warp->sums.erase(p.d[i]);
    }
}

inline void tern__wgmma_commit()
{
    cuda_meet<void>("tern__wgmma_commit", 0xFFFFFFFFu, nullptr, [](void **) { test_cuda.warp[threadIdx.x / CUDA_WARP].groups++; });
}
template <unsigned Pending, int Products, int Tiles> inline void tern__wgmma_wait(int (&)[Products][Tiles][4])
{
    cuda_meet<void>("tern__wgmma_wait", 0xFFFFFFFFu, nullptr, [](void **) {
        cuda_warp *warp = &test_cuda.warp[threadIdx.x / CUDA_WARP];
        if (cuda_sabotaged(CUDA_NO_WGMMA_WAIT)) return;
        while (!warp->products.empty() && warp->products[0].group + Pending < warp->groups) cuda_end_product(warp);
    });
}

/* A load that is told not to stay in the cache. */
inline uint4 tern__stream16(const void *p)
{
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) cuda_fault("tern__stream16 is not aligned to 16");
    return static_cast<const uint4 *>(p)[cuda_sabotaged(CUDA_READS_BEYOND)];
}

/* -- arithmetic and memory: single roundings, never contracted -- */

inline float cuda_rounded(volatile float x) { return x; }
inline float __fmul_rn(float a, float b) { return cuda_rounded(a * b); }
inline float __fadd_rn(float a, float b) { return cuda_rounded(a + b); }
inline float __fdiv_rn(float a, float b) { return cuda_rounded(a / b); }
inline float __fmaf_rn(float a, float b, float c) { return test_cuda.fuse ? fmaf(a, b, c) : cuda_rounded(a * b) + c; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline int __float2int_rn(float x) /* the ends of the range beyond it, 0 for NaN */
{
    return x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : x == x ? static_cast<int>(lrintf(x)) : 0;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return c;
}

using std::min;
template <typename T> inline T __ldg(const T *p) { return *p; }
inline void __threadfence() {}

#define CUDA_ATOMIC(name, type, after) inline type name(type *p, type x) { const type old = *p; *p = after; return old; }
CUDA_ATOMIC(atomicAdd, int, old + x)
CUDA_ATOMIC(atomicAdd, unsigned, old + x)
CUDA_ATOMIC(atomicAdd, float, old + x)
CUDA_ATOMIC(atomicAdd, unsigned long long, old + x)
CUDA_ATOMIC(atomicMin, int, std::min(old, x))
CUDA_ATOMIC(atomicMin, unsigned, std::min(old, x))
CUDA_ATOMIC(atomicMin, unsigned long long, std::min(old, x))
CUDA_ATOMIC(atomicMax, int, std::max(old, x))
CUDA_ATOMIC(atomicMax, unsigned, std::max(old, x))
CUDA_ATOMIC(atomicMax, unsigned long long, std::max(old, x))
#undef CUDA_ATOMIC

/* -- runtime -- */

#define CUDART_VERSION 12010
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrCooperativeLaunch = 95, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaDeviceProp { char name[256]; size_t totalGlobalMem; int major, minor, multiProcessorCount, l2CacheSize; };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum { cudaStreamDefault, cudaStreamNonBlocking };

inline bool cuda_counted_down(long &countdown) { return countdown >= 0 && countdown-- == 0; }

inline cudaError_t cuda_result(cudaError_t error)
{
    if (error != cudaSuccess) test_cuda.last_error = error;
    return error;
}
template <typename Call> inline cudaError_t cuda_call(Call call)
{
    return cuda_result(cuda_counted_down(test_cuda.call_countdown) ? cudaErrorUnknown : call());
}

inline void cuda_drain()
{
    cuda_operations ready;
    ready.swap(test_cuda.queue);
    for (auto &operation : ready) operation();
}
/* A call for which the host waits; a capture forbids it. */
template <typename Call> inline cudaError_t cuda_waiting_call(Call call)
{
    return cuda_call([&] {
        if (test_cuda.captures) return cudaErrorStreamCaptureUnsupported;
        cuda_drain();
        return call();
    });
}

/* All streams are one, in the order of the calls. */
inline void cuda_submit(cudaStream_t stream, std::function<void()> operation)
{
    (stream && stream->capture ? stream->capture : &test_cuda.queue)->push_back(std::move(operation));
    if (!test_cuda.lazy) cuda_drain();
}

/* Blocks of a processor at once. */
inline size_t cuda_resident(unsigned threads, size_t shared_bytes)
{
    return std::min<size_t>(CUDA_PROCESSOR_THREADS / threads, CUDA_PROCESSOR_SHARED / std::max<size_t>(shared_bytes, 1));
}

template <typename... Parameters, typename... Arguments>
inline void cuda_launch(const char *name, void (*kernel)(Parameters...), bool together, dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Arguments... arguments)
{
    cuda_call([&] {
        const auto limit = test_cuda.shared_limit.find(reinterpret_cast<const void *>(kernel));
        const std::tuple<Parameters...> kept(arguments...);
        if (stream && stream->device != test_cuda.device) return cudaErrorInvalidResourceHandle;
        if (block.x < 1 || block.x > CUDA_THREADS || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
        if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z != 1) return cudaErrorInvalidConfiguration;
        if (shared_bytes > (limit == test_cuda.shared_limit.end() ? 48 * 1024 : limit->second)) return cudaErrorInvalidValue;
        if ((sizeof(Parameters) + ... + 0) > (test_cuda.driver < 12010 ? 4096 : 32764)) return cudaErrorInvalidValue;
        if (together && grid.x * grid.y > cuda_resident(block.x, shared_bytes) * static_cast<size_t>(test_cuda.processors))
            return cudaErrorCooperativeLaunchTooLarge;
        cuda_submit(stream, [=] { cuda_run_grid(name, together, grid, block, shared_bytes, [&] { std::apply(kernel, kept); }); });
        return cudaSuccess;
    });
}

inline cudaError_t cudaGetLastError() { return std::exchange(test_cuda.last_error, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "an error of the emulator";
}

inline cudaError_t cudaGetDeviceCount(int *count)
{
    return cuda_call([&] { return (*count = test_cuda.devices) > 0 ? cudaSuccess : cudaErrorNoDevice; });
}
inline cudaError_t cudaGetDevice(int *device) { return cuda_call([&] { *device = test_cuda.device; return cudaSuccess; }); }
inline cudaError_t cudaSetDevice(int device)
{
    return cuda_call([&] {
        if (device < 0 || device >= test_cuda.devices) return cudaErrorInvalidDevice;
        test_cuda.device = device;
        return cudaSuccess;
    });
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    return cuda_call([&] {
        if (device < 0 || device >= test_cuda.devices) return cudaErrorInvalidDevice;
        switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = test_cuda.processors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = test_cuda.capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = test_cuda.capability % 10; break;
        case cudaDevAttrCooperativeLaunch: *value = test_cuda.cooperative; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = CUDA_SHARED; break;
        }
        return cudaSuccess;
    });
}
inline cudaError_t cudaDriverGetVersion(int *version)
{
    return cuda_call([&] { return *version = test_cuda.driver, cudaSuccess; });
}
template <typename Function>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Function * /* kernel */, int threads, size_t shared_bytes)
{
    return cuda_call([&] { return *blocks = static_cast<int>(cuda_resident(static_cast<unsigned>(threads), shared_bytes)), cudaSuccess; });
}
template <typename Function> inline cudaError_t cudaFuncSetAttribute(Function *kernel, cudaFuncAttribute /* the one */, int bytes)
{
    return cuda_call([&] {
        if (bytes < 0 || bytes > CUDA_SHARED) return cudaErrorInvalidValue;
        test_cuda.shared_limit[reinterpret_cast<const void *>(kernel)] = static_cast<size_t>(bytes);
        return cudaSuccess;
    });
}

template <typename T> inline cudaError_t cudaMalloc(T **out, size_t bytes)
{
    return cuda_waiting_call([&] {
        void *p = nullptr;
        if (cuda_counted_down(test_cuda.malloc_countdown)) return cudaErrorMemoryAllocation;
        if (posix_memalign(&p, 256, bytes) != 0) return cudaErrorMemoryAllocation;
        memset(p, CUDA_POISON, bytes);
        test_cuda.memory[static_cast<const char *>(p)] = {bytes, test_cuda.device};
        *out = static_cast<T *>(p);
        return cudaSuccess;
    });
}
inline cudaError_t cudaFree(void *p)
{
    if (test_cuda.captures) return cuda_result(cudaErrorStreamCaptureUnsupported);
    cuda_drain();
    if (p && test_cuda.memory.erase(static_cast<const char *>(p)) == 0) return cuda_result(cudaErrorInvalidValue);
    free(p);
    return cudaSuccess;
}

inline bool cuda_on_device(const void *p, size_t bytes)
{
    const char *from = static_cast<const char *>(p);
    auto block = test_cuda.memory.upper_bound(from);
    return block != test_cuda.memory.begin() && from + bytes <= (--block)->first + block->second.bytes;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
    return cuda_call([&] {
        if (cuda_on_device(to, bytes) != (kind != cudaMemcpyDeviceToHost)) return cudaErrorInvalidValue;
        if (cuda_on_device(from, bytes) != (kind != cudaMemcpyHostToDevice)) return cudaErrorInvalidValue;
        cuda_submit(stream, [=] { memcpy(to, from, bytes); });
        return cudaSuccess;
    });
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind)
{
    return cuda_waiting_call([&] {
        const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
        cuda_drain();
        return error;
    });
}
inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t stream)
{
    return cuda_call([&] {
        if (!cuda_on_device(to, bytes)) return cudaErrorInvalidValue;
        cuda_submit(stream, [=] { memset(to, byte, bytes); });
        return cudaSuccess;
    });
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned /* flags */)
{
    return cuda_call([&] { *out = new cuda_stream{nullptr, test_cuda.device}; return cudaSuccess; });
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cuda_waiting_call([] { return cudaSuccess; }); }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    cuda_drain();
    delete stream;
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode)
{
    return cuda_call([&] {
        if (!stream || stream->capture) return cudaErrorIllegalState;
        stream->capture = new cuda_operations();
        test_cuda.captures++;
        return cudaSuccess;
    });
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    return cuda_call([&] {
        if (!stream || !stream->capture) return cudaErrorIllegalState;
        *out = std::exchange(stream->capture, nullptr);
        test_cuda.captures--;
        return cudaSuccess;
    });
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long /* flags */ = 0)
{
    return cuda_call([&] { *out = new cuda_operations(*graph); return cudaSuccess; });
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    return cuda_call([&] {
        for (const auto &operation : *graph) cuda_submit(stream, operation);
        return cudaSuccess;
    });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { delete graph; return cudaSuccess; }

/* -- for the benchmark -- */

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int /* device */)
{
    return cuda_call([&] {
        *p = {"the emulator", 0, test_cuda.capability / 10, test_cuda.capability % 10, test_cuda.processors, 0};
        return cudaSuccess;
    });
}
inline cudaError_t cudaRuntimeGetVersion(int *version) { return cuda_call([&] { *version = 0; return cudaSuccess; }); }

inline cudaError_t cudaEventCreate(cudaEvent_t *out) { return cuda_call([&] { *out = new double(0); return cudaSuccess; }); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { delete event; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return cuda_call([&] {
        cuda_submit(stream, [=] { *event = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); });
        return cudaSuccess;
    });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cuda_waiting_call([] { return cudaSuccess; }); }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    return cuda_call([&] { *ms = static_cast<float>(1e3 * (*to - *from)); return cudaSuccess; });
}

#endif
