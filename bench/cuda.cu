/* How fast is the CUDA backend of ternary.h here? Measures what this GPU can do at most (reading and copying memory,
   int8, bf16 and float arithmetic), then every operation as a rate and as a fraction of the limit it runs into.

     nvcc -O3 -std=c++17 -arch=native -fmad=false bench/cuda.cu -o build/bench-cuda -ldl
     build/bench-cuda [--csv] [--quick] [--filter text]

   --csv      op,shape,metric,value,limit,fraction,us in a graph,us plain: one row per case; the metric names the limit
   --quick    a smoke run on tiny shapes; its numbers say nothing
   --filter   only the cases whose op or shape contains this text

   int8 and bf16 products are measured with cuBLASLt where its header and the loader find it. The emulator of the tests
   runs the quick run without a GPU:

     g++ -std=c++17 -O1 -include tests/cuda.h -I. -x c++ bench/cuda.cu -o build/bench-cuda-emulated

   Every row is the best of several turns, and its limit the best of turns between them. Nothing here asserts a time. */
#include "../ternary_cuda.cu"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#ifdef __CUDACC__
#include <dlfcn.h>
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
#define WITH_CUBLAS
#endif
#endif

static const int64_t KIB = 1 << 10, MIB = 1 << 20;

static struct { bool csv, quick; const char *filter; } option;

/* -- the device: all that is not tern_* -- */

static tern_context *gpu;
static cudaStream_t stream;
static cudaDeviceProp device;
static int processors;
static int64_t rotation;        /* bytes of a working set that no cache helps */
static int64_t held, most_held; /* bytes of device memory */

static void must(tern_result result)
{
    if (result == TERN_OK) return;
    fprintf(stderr, "bench: %s: %s\n", tern_result_text(result), gpu ? tern_last_error(gpu)->text : "");
    exit(1);
}

static void must_cuda(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    fprintf(stderr, "bench: %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

static void open_device()
{
    tern_context_desc desc = {};
    tern_error error;
    desc.backend = tern_cuda_backend(0);
    if (tern_open(&gpu, &desc, &error) != TERN_OK) {
        fprintf(stderr, "bench: %s\n", error.text);
        exit(1);
    }
    stream = (cudaStream_t)tern_cuda_stream(gpu);
    must_cuda(cudaGetDeviceProperties(&device, 0), "properties of the device");
    processors = device.multiProcessorCount;
    rotation = std::max(512 * MIB, 4 * (int64_t)device.l2CacheSize);
}

typedef std::function<tern_result()> operation; /* queues itself on the stream */

/* Seconds that the stream takes for what `queue` puts there. */
template <typename Queue> static double seconds_of(Queue queue)
{
    static cudaEvent_t before, after;
    float ms = 0;
    if (!before) {
        must_cuda(cudaEventCreate(&before), "an event");
        must_cuda(cudaEventCreate(&after), "an event");
    }
    must_cuda(cudaEventRecord(before, stream), "an event");
    queue();
    must_cuda(cudaEventRecord(after, stream), "an event");
    must_cuda(cudaEventSynchronize(after), "waiting");
    must_cuda(cudaEventElapsedTime(&ms, before, after), "times of events");
    return 1e-3 * std::max((double)ms, 1e-4);
}

/* NULL: the calls wait for the host, and cannot be a graph. */
static cudaGraphExec_t record(int64_t calls, const operation &call)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    tern_result result = TERN_OK;
    must_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int64_t i = 0; i < calls && result == TERN_OK; i++) result = call();
    if (result != TERN_OK) {
        cudaStreamEndCapture(stream, &graph);
        if (graph) cudaGraphDestroy(graph);
        cudaGetLastError();
        return NULL;
    }
    must_cuda(cudaStreamEndCapture(stream, &graph), "the end of a capture");
    must_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    must_cuda(cudaGraphDestroy(graph), "a graph");
    return exec;
}

#ifdef __CUDACC__
/* Functions of other libraries, where the loader finds them: pointers named ours_name. */
#define FOUND(library, name) find_symbol(library, #name, &ours_##name)
static bool find_symbol(void *library, const char *name, void *pointer)
{
    void *symbol = dlsym(library, name);
    memcpy(pointer, &symbol, sizeof symbol);
    return symbol != NULL;
}

/* The clocks as they are now, by the driver's management library. */
static void print_clocks(const char *when)
{
    static int (*ours_nvmlInit_v2)(), (*ours_nvmlDeviceGetHandleByPciBusId_v2)(const char *, void **);
    static int (*ours_nvmlDeviceGetClockInfo)(void *, int, unsigned *);
    static int (*ours_nvmlDeviceGetMaxClockInfo)(void *, int, unsigned *);
    enum { SM_CLOCK = 1, MEMORY_CLOCK };
    void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL), *handle;
    unsigned now[2], most[2];
    char bus[32];
    if (!library || !FOUND(library, nvmlInit_v2) || !FOUND(library, nvmlDeviceGetHandleByPciBusId_v2) ||
        !FOUND(library, nvmlDeviceGetClockInfo) || !FOUND(library, nvmlDeviceGetMaxClockInfo)) return;
    if (cudaDeviceGetPCIBusId(bus, sizeof bus, 0) != cudaSuccess) return;
    if (ours_nvmlInit_v2() || ours_nvmlDeviceGetHandleByPciBusId_v2(bus, &handle)) return;
    for (int i = SM_CLOCK; i <= MEMORY_CLOCK; i++)
        if (ours_nvmlDeviceGetClockInfo(handle, i, &now[i - 1]) ||
            ours_nvmlDeviceGetMaxClockInfo(handle, i, &most[i - 1])) return;
    fprintf(option.csv ? stderr : stdout, "clocks %s: %u of %u MHz, memory %u of %u MHz\n", when, now[0], most[0], now[1],
            most[1]);
}
#else
static void print_clocks(const char *) {}
#endif

/* Beside a table for programs, on the other stream. */
static void print_device()
{
    int runtime = 0;
    must_cuda(cudaRuntimeGetVersion(&runtime), "the version of the runtime");
    fprintf(option.csv ? stderr : stdout,
            "ternary.h on %s%s: compute capability %d.%d, %d processors, %.1f GB of memory, L2 of %ld MiB, CUDA %d.%d\n",
            device.name, option.quick ? " (quick run)" : "", device.major, device.minor, processors,
            1e-9 * (double)device.totalGlobalMem, (long)(device.l2CacheSize / MIB), runtime / 1000, runtime % 1000 / 10);
    print_clocks("at the start");
}

/* -- data: random, for data of one value takes less power and more clock -- */

enum contents { ZEROS, FLOATS, POSITIVE, BF16S, F16_SCALES, BYTES_127, CODES_2BIT, CODES_BASE3, TRIT_BYTES, BELOW };

static __device__ uint32_t random_bits(uint64_t i)
{
    i = (i + 1) * 0x9E3779B97F4A7C15u;
    i = (i ^ i >> 31) * 0xBF58476D1CE4E5B9u;
    return (uint32_t)(i >> 32);
}

static __device__ uint32_t byte_of(int kind, uint32_t byte)
{
    if (kind == CODES_BASE3) return byte % 243;
    if (kind == TRIT_BYTES) return (byte % 3 + 255) & 255;
    return byte == 128 ? 129 : byte;
}

/* Four bytes of a kind of contents. */
static __device__ uint32_t random_word(int kind, uint32_t limit, uint32_t bits)
{
    uint32_t word = 0;
    if (kind == FLOATS) return tern__bits((float)(bits >> 8) / 8388608.0f - 1.0f);
    if (kind == POSITIVE) return tern__bits(0.5f + (float)(bits >> 8) / 33554432.0f);
    if (kind == BF16S) return 0x3F003F00u | (bits & 0x807F807Fu);     /* 0.5 to 1, either sign */
    if (kind == F16_SCALES) return 0x30003000u | (bits & 0x03FF03FFu); /* 0.125 to 0.25 */
    if (kind == CODES_2BIT) return bits & ~(bits >> 1 & bits & 0x55555555u);
    if (kind == BELOW) return bits % limit;
    for (int i = 0; i < 32; i += 8) word |= byte_of(kind, bits >> i & 255) << i;
    return word;
}

static __global__ void random_words(int kind, uint32_t limit, int64_t n, uint64_t seed, uint32_t *out)
{
    TERN__EACH(i, n) out[i] = random_word(kind, limit, random_bits(seed + (uint64_t)i));
}

/* Device memory of one part of the table. */
struct memory {
    std::vector<void *> blocks;
    int64_t bytes = 0;
    memory() = default;
    memory(const memory &) = delete;
    memory &operator=(const memory &) = delete;
    ~memory()
    {
        for (void *p : blocks) tern_free(gpu, p);
        held -= bytes;
    }
    template <typename T> T *get(int64_t count, contents kind = ZEROS, int64_t limit = 1)
    {
        static uint64_t seed;
        const int64_t words = tern__ceil_div(count * (int64_t)sizeof(T), 4);
        void *p = tern_alloc(gpu, (size_t)words * 4);
        if (!p) {
            fprintf(stderr, "bench: no device memory for %ld MiB\n", (long)(words * 4 / MIB));
            exit(1);
        }
        blocks.push_back(p);
        bytes += words * 4;
        held += words * 4;
        most_held = std::max(most_held, held);
        seed += 1u << 30;
        if (kind != ZEROS)
            TERN__LAUNCH(random_words, processors * 8, 256, 0, stream, kind, (uint32_t)limit, words, seed, (uint32_t *)p);
        return (T *)p;
    }
};

/* Copies of one array that are used in turn, so that none is in a cache when its turn comes. */
struct copies {
    char *base = NULL;
    int64_t each = 0, count = 1, at = 0;
    void *next() { return base + each * (at++ % count); }
};

/* How many arrays of so many bytes make a working set. */
static int64_t copies_of(int64_t bytes) { return option.quick ? 2 : std::max<int64_t>(1, tern__ceil_div(rotation, bytes)); }

static copies make_copies(memory &m, int64_t bytes, int64_t count, contents kind)
{
    copies c;
    c.each = tern__ceil_div(bytes, 256) * 256;
    c.count = count;
    c.base = m.get<char>(c.each * count, kind);
    return c;
}

/* -- limits: memory -- */

/* Each block of threads takes Unroll loads of each thread at a time. */
template <int Unroll> static __global__ void read_memory(int64_t n, const uint4 *x, uint4 *y)
{
    const int64_t chunk = (int64_t)blockDim.x * Unroll;
    uint32_t seen = 0;
    for (int64_t i = blockIdx.x * chunk + threadIdx.x; i < n; i += gridDim.x * chunk) {
        uint4 v[Unroll];
#pragma unroll
        for (int u = 0; u < Unroll; u++) v[u] = tern__stream16(x + i + (int64_t)u * blockDim.x);
#pragma unroll
        for (int u = 0; u < Unroll; u++) seen ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    if (seen == 0x01234567u) y->x = seen; /* so that the loads are not in vain */
}

template <int Unroll> static __global__ void copy_memory(int64_t n, const uint4 *x, uint4 *y)
{
    const int64_t chunk = (int64_t)blockDim.x * Unroll;
    for (int64_t i = blockIdx.x * chunk + threadIdx.x; i < n; i += gridDim.x * chunk) {
        uint4 v[Unroll];
#pragma unroll
        for (int u = 0; u < Unroll; u++) v[u] = tern__stream16(x + i + (int64_t)u * blockDim.x);
#pragma unroll
        for (int u = 0; u < Unroll; u++) y[i + (int64_t)u * blockDim.x] = v[u];
    }
}

/* Ways to read and to copy; the fastest, found at the start, is the limit. */
enum { WAYS = 9, WAY_THREADS = 256 };
static struct { char *from, *to; int64_t bytes; int at, read, copy; } traffic;
static const int unrolls[] = {2, 4, 8};

/* Blocks: some for each processor, or one for each chunk. */
static unsigned way_grid(int way)
{
    const int64_t chunks = traffic.bytes / 16 / WAY_THREADS / unrolls[way % 3];
    return (unsigned)std::min(chunks, way / 3 == 0 ? processors * (int64_t)4 : way / 3 == 1 ? processors * (int64_t)8 : chunks);
}

/* A pass over one half of the buffer, the other one in the next call. */
static void queue_read(int way)
{
    const uint4 *x = (const uint4 *)(traffic.from + traffic.at++ % 2 * traffic.bytes);
    const int64_t n = traffic.bytes / 16;
    if (way % 3 == 0) TERN__LAUNCH((read_memory<2>), way_grid(way), WAY_THREADS, 0, stream, n, x, (uint4 *)traffic.to);
    if (way % 3 == 1) TERN__LAUNCH((read_memory<4>), way_grid(way), WAY_THREADS, 0, stream, n, x, (uint4 *)traffic.to);
    if (way % 3 == 2) TERN__LAUNCH((read_memory<8>), way_grid(way), WAY_THREADS, 0, stream, n, x, (uint4 *)traffic.to);
}

static void queue_copy(int way)
{
    const int64_t half = traffic.at++ % 2 * traffic.bytes, n = traffic.bytes / 16;
    const uint4 *x = (const uint4 *)(traffic.from + half);
    uint4 *y = (uint4 *)(traffic.to + half);
    if (way == WAYS) must_cuda(cudaMemcpyAsync(y, x, (size_t)traffic.bytes, cudaMemcpyDeviceToDevice, stream), "copy");
    else if (way % 3 == 0) TERN__LAUNCH((copy_memory<2>), way_grid(way), WAY_THREADS, 0, stream, n, x, y);
    else if (way % 3 == 1) TERN__LAUNCH((copy_memory<4>), way_grid(way), WAY_THREADS, 0, stream, n, x, y);
    else TERN__LAUNCH((copy_memory<8>), way_grid(way), WAY_THREADS, 0, stream, n, x, y);
}

static void find_ways(memory &m)
{
    const int passes = option.quick ? 1 : 8;
    double least_read = 1e9, least_copy = 1e9;
    traffic.bytes = option.quick ? 32 * KIB : 512 * MIB; /* whole chunks of every way */
    traffic.from = m.get<char>(2 * traffic.bytes, FLOATS);
    traffic.to = m.get<char>(2 * traffic.bytes);
    for (int turn = 0; turn < (option.quick ? 1 : 4); turn++)
        for (int way = 0; way <= WAYS; way++) {
            const double read = way == WAYS ? 1e9 : seconds_of([&] { for (int i = 0; i < passes; i++) queue_read(way); });
            const double copy = seconds_of([&] { for (int i = 0; i < passes; i++) queue_copy(way); });
            if (read < least_read) least_read = read, traffic.read = way;
            if (copy < least_copy) least_copy = copy, traffic.copy = way;
        }
}

/* -- limits: arithmetic in registers -- */

enum { SUMS = 16, TILES = 8 }; /* of a thread, of a warp: enough to hide the latency */

template <bool Fused> static __global__ void spin_floats(int rounds, float x, float y, float *out)
{
    float a[SUMS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SUMS; i++) a[i] = (float)(threadIdx.x + i);
#pragma unroll 4
    for (int r = 0; r < rounds; r++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) a[i] = Fused ? __fmaf_rn(a[i], x, y) : __fadd_rn(__fmul_rn(a[i], x), y);
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum += a[i];
    if (sum == 1.25f) *out = sum;
}

/* Products as the backend's kernels do them, by warps. */
static __global__ void spin_mma(int rounds, int *out)
{
    int d[TILES][4] = {}, sum = 0;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; i++) a[i] = random_bits(6 * threadIdx.x + i);
    for (int i = 0; i < 2; i++) b[i] = random_bits(6 * threadIdx.x + 4 + i);
    for (int r = 0; r < rounds; r++)
#pragma unroll
        for (int i = 0; i < TILES; i++) tern__mma_s8(d[i], a, b);
#pragma unroll
    for (int i = 0; i < TILES; i++) sum ^= d[i][0] ^ d[i][1] ^ d[i][2] ^ d[i][3];
    if (sum == 0x01234567) *out = sum;
}

/* -- limits: products by cuBLASLt -- */

enum { LT_INT8, LT_BF16, LT_KINDS };
static bool lt_here[LT_KINDS]; /* cuBLASLt is, and has a way */

#ifdef WITH_CUBLAS
#define LT_FUNCTIONS(X)                                                                                                      \
    X(cublasLtCreate) X(cublasLtMatmul) X(cublasLtMatmulDescCreate) X(cublasLtMatmulDescSetAttribute)                        \
    X(cublasLtMatrixLayoutCreate) X(cublasLtMatmulPreferenceCreate) X(cublasLtMatmulPreferenceSetAttribute)                  \
    X(cublasLtMatmulAlgoGetHeuristic)
#define LT_POINTER(name) static decltype(&name) ours_##name;
LT_FUNCTIONS(LT_POINTER)

enum { LT_SIZE = 8192, LT_WORK = 64 << 20 };
static struct {
    cublasLtHandle_t handle;
    struct { cublasLtMatmulDesc_t desc; cublasLtMatrixLayout_t in, out; cublasLtMatmulHeuristicResult_t way; } kind[LT_KINDS];
    void *a, *b, *c, *work;
} lt;

static void must_lt(cublasStatus_t status, const char *what)
{
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "bench: cuBLASLt: %s: status %d\n", what, (int)status);
    exit(1);
}

/* c = a^T b, all of one size, with the inputs of each sum side by side. Says whether there is a way. */
static bool open_lt_kind(int kind)
{
    auto &k = lt.kind[kind];
    const bool int8 = kind == LT_INT8;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    const size_t work = LT_WORK;
    cublasLtMatmulPreference_t preference;
    int found = 0;
    must_lt(ours_cublasLtMatmulDescCreate(&k.desc, int8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                          int8 ? CUDA_R_32I : CUDA_R_32F), "a product");
    must_lt(ours_cublasLtMatmulDescSetAttribute(k.desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
            "transposed");
    must_lt(ours_cublasLtMatrixLayoutCreate(&k.in, int8 ? CUDA_R_8I : CUDA_R_16BF, LT_SIZE, LT_SIZE, LT_SIZE), "a layout");
    must_lt(ours_cublasLtMatrixLayoutCreate(&k.out, int8 ? CUDA_R_32I : CUDA_R_16BF, LT_SIZE, LT_SIZE, LT_SIZE), "a layout");
    must_lt(ours_cublasLtMatmulPreferenceCreate(&preference), "a preference");
    must_lt(ours_cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &work,
                                                      sizeof work), "a preference");
    return ours_cublasLtMatmulAlgoGetHeuristic(lt.handle, k.desc, k.in, k.in, k.out, k.out, preference, 1, &k.way, &found) ==
           CUBLAS_STATUS_SUCCESS && found > 0;
}

static void open_lt(memory &m)
{
    static const char *const names[] = {"libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"};
    void *library = NULL;
    for (const char *name : names)
        if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
#define LT_FOUND(name) && FOUND(library, name)
    if (!(library LT_FUNCTIONS(LT_FOUND))) {
        fprintf(stderr, "bench: no cuBLASLt: %s\n", dlerror());
        return;
    }
    lt.a = m.get<char>(2ll * LT_SIZE * LT_SIZE, BF16S); /* as int8 random enough too */
    lt.b = m.get<char>(2ll * LT_SIZE * LT_SIZE, BF16S);
    lt.c = m.get<char>(4ll * LT_SIZE * LT_SIZE);
    lt.work = m.get<char>(LT_WORK);
    must_lt(ours_cublasLtCreate(&lt.handle), "opening");
    for (int kind = 0; kind < LT_KINDS; kind++) lt_here[kind] = open_lt_kind(kind);
}

static double queue_lt(int kind)
{
    static const int one = 1, none = 0; /* zero in float too */
    static const float float_one = 1.0f;
    const auto &k = lt.kind[kind];
    const void *alpha = kind == LT_INT8 ? (const void *)&one : &float_one;
    must_lt(ours_cublasLtMatmul(lt.handle, k.desc, alpha, lt.a, k.in, lt.b, k.in, &none, lt.c, k.out, lt.c, k.out,
                                &k.way.algo, lt.work, LT_WORK, stream), "product");
    return (double)LT_SIZE * LT_SIZE * LT_SIZE;
}
#else
static void open_lt(memory &) {}
static double queue_lt(int) { return 0; }
#endif

/* -- limits: all of them -- */

enum limit { READ, COPY, FMA, MULADD, MMA, INT8, BF16, NONE };

static const char *limit_name(limit l)
{
    static const char *const names[] = {"read", "copy", "FMA", "mul+add", "mma.sync s8", "cublasLt s8", "cublasLt bf16", "none"};
    return names[l];
}
static bool limit_here(limit l) { return l < INT8 || (l < NONE && lt_here[l - INT8]); }
static limit int8_limit() { return limit_here(INT8) ? INT8 : MMA; }

/* Queues it once; returns its work in bytes or multiply-adds. */
static double queue_limit(limit l)
{
    const int rounds = option.quick ? 8 : 4096, blocks = option.quick ? 1 : processors * 8, threads = option.quick ? 32 : 256;
    switch (l) {
    case READ: queue_read(traffic.read); return (double)traffic.bytes;
    case COPY: queue_copy(traffic.copy); return 2.0 * (double)traffic.bytes;
    case FMA:
        TERN__LAUNCH((spin_floats<true>), blocks, threads, 0, stream, rounds, 0.75f, 0.3f, (float *)traffic.to);
        return (double)blocks * threads * rounds * SUMS;
    case MULADD:
        TERN__LAUNCH((spin_floats<false>), blocks, threads, 0, stream, rounds, 0.75f, 0.3f, (float *)traffic.to);
        return (double)blocks * threads * rounds * SUMS;
    case MMA:
        TERN__LAUNCH(spin_mma, blocks, threads, 0, stream, rounds, (int *)traffic.to);
        return (double)blocks * (threads / 32) * rounds * TILES * (16 * 8 * 32);
    case INT8: return queue_lt(LT_INT8);
    case BF16: return queue_lt(LT_BF16);
    case NONE: break;
    }
    return 0;
}

/* Work a second over about `span` seconds. */
static double limit_rate(limit l, double span)
{
    static double each[NONE]; /* seconds of the last time */
    const int passes = (int)std::max(1.0, std::min(64.0, each[l] > 0 ? span / each[l] : 2.0));
    double work = 0;
    const double t = seconds_of([&] { for (int i = 0; i < passes; i++) work += queue_limit(l); });
    each[l] = t / passes;
    must_cuda(cudaGetLastError(), "launching a limit");
    return work / t;
}

/* -- the table -- */

struct result { std::string op, shape; double fraction, graph; };
static std::vector<result> results; /* for the targets at the end */
static const char *pending_title;

static void title(const char *text) { pending_title = text; }

static bool wanted(const std::string &op, const std::string &shape)
{
    return !option.filter || strstr(op.c_str(), option.filter) || strstr(shape.c_str(), option.filter);
}

static std::string text(const char *format, ...)
{
    char s[96];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof s, format, args);
    va_end(args);
    return s;
}

enum metric { BYTES, MACS, LATENCY };
static const char *unit_of(metric m) { return m == BYTES ? "GB/s" : m == MACS ? "TMAC/s" : "us"; }
static double scale_of(metric m) { return m == BYTES ? 1e-9 : m == MACS ? 1e-12 : 1e6; }

static void print_title()
{
    if (pending_title && !option.csv)
        printf("\n%s\n  %-26s %-22s %10s %-6s %10s %6s  %-13s %11s %11s\n", pending_title, "op", "shape", "value", "",
               "limit", "", "limit is", "us in graph", "us plain");
    pending_title = NULL;
}

static void print_missing(const std::string &op, const std::string &shape)
{
    print_title();
    if (option.csv) printf("%s,%s,missing,,,,,\n", op.c_str(), shape.c_str());
    else printf("  %-26s %-22s %s\n", op.c_str(), shape.c_str(), tern_last_error(gpu)->text);
}

static void print_row(metric m, const std::string &op, const std::string &shape, limit l, double work, double graph, double plain,
                      double rate)
{
    const double value = scale_of(m) * (m == LATENCY ? graph : work / graph);
    const double fraction = rate > 0 ? work / graph / rate : 0;
    print_title();
    results.push_back({op, shape, fraction, graph});
    if (option.csv) {
        printf("%s,%s,%s vs %s,%.6g,", op.c_str(), shape.c_str(), unit_of(m), limit_name(l), value);
        if (rate > 0) printf("%.6g,%.4f,", scale_of(m) * rate, fraction); else printf(",,");
        printf("%.6g,%.6g\n", 1e6 * graph, 1e6 * plain);
    } else {
        printf("  %-26s %-22s %10.3f %-6s ", op.c_str(), shape.c_str(), value, unit_of(m));
        if (rate > 0) printf("%10.3f %5.1f%%  %-13s", scale_of(m) * rate, 100 * fraction, limit_name(l));
        else printf("%10s %6s  %-13s", "", "", limit_name(l));
        printf(" %11.2f %11.2f\n", 1e6 * graph, 1e6 * plain);
    }
    fflush(stdout);
}

static void limits_table()
{
    title("The device's limits");
    for (int i = READ; i < NONE; i++) {
        const limit l = (limit)i;
        const metric m = l <= COPY ? BYTES : MACS;
        double rate = 0;
        if (!limit_here(l) || !wanted("limit", limit_name(l))) continue;
        for (int turn = 0; turn < (option.quick ? 2 : 10); turn++) rate = std::max(rate, limit_rate(l, option.quick ? 0 : 0.01));
        print_title();
        if (option.csv) printf("limit,%s,%s,%.6g,%.6g,1,,\n", limit_name(l), unit_of(m), scale_of(m) * rate, scale_of(m) * rate);
        else printf("  %-26s %-22s %10.3f %s\n", "limit", limit_name(l), scale_of(m) * rate, unit_of(m));
    }
}

static double wall()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Calls that make a turn, in whole rounds of the copies. */
static int64_t calls_of_turn(int64_t round, const operation &call)
{
    const int64_t most = option.quick ? round : 1024;
    const double turn = option.quick ? 0 : 0.004;
    int64_t calls = 1;
    double t;
    while ((t = seconds_of([&] { for (int64_t i = 0; i < calls; i++) must(call()); })) < turn / 4 && calls < most) calls *= 2;
    calls = std::max<int64_t>(1, std::min(most, (int64_t)(turn / t * (double)calls)));
    return tern__ceil_div(calls, round) * round;
}

/* Runs an operation, which does `work` bytes or multiply-adds and goes through its data once in `round` calls, in a graph
   and plainly, taking turns with its limit until the time of a case is used up. */
static void measure(metric m, const std::string &op, const std::string &shape, limit l, double work, int64_t round,
                    const operation &call)
{
    const double case_s = option.quick ? 0 : 0.3;
    double graph = 1e9, plain = 1e9, rate = 0;
    tern_result first;
    if (!wanted(op, shape)) return;
    first = call();
    if (first == TERN_E_UNSUPPORTED) return print_missing(op, shape);
    must(first);
    must(tern_sync(gpu));
    const int64_t calls = calls_of_turn(round, call);
    const cudaGraphExec_t recorded = record(calls, call);
    const double start = wall();
    for (int turn = 0; turn < (option.quick ? 1 : 4) || wall() - start < case_s; turn++) {
        if (limit_here(l)) rate = std::max(rate, limit_rate(l, std::min(graph * (double)calls, 0.01)));
        if (recorded) graph = std::min(graph, seconds_of([&] { must_cuda(cudaGraphLaunch(recorded, stream), "a graph"); }) / (double)calls);
        plain = std::min(plain, seconds_of([&] { for (int64_t i = 0; i < calls; i++) must(call()); }) / (double)calls);
    }
    if (recorded) must_cuda(cudaGraphExecDestroy(recorded), "a graph");
    must(tern_sync(gpu));
    print_row(m, op, shape, l, work, recorded ? graph : plain, plain, rate);
}

/* -- ternary matrix products -- */

struct format { tern_type encoding; int32_t grain; const char *name; };
static const format formats[] = {
    {TERN_2BIT, TERN_PER_ROW, "2-bit row"}, {TERN_2BIT, 128, "2-bit group 128"},
    {TERN_BASE3, TERN_PER_ROW, "base-3 row"}, {TERN_BASE3, 128, "base-3 group 128"}
};

/* A matrix in copies, and what a call needs beside it for up to `tokens` tokens. */
struct product {
    tern_matmul_args a = {};
    copies trits, scales;
    size_t trit_bytes, scale_bytes;
    const float *x;
    int64_t stride, groups;
    tern_param w = {};
    tern_linear layer = {};

    product(memory &m, int64_t rows, int64_t cols, const format &f, int64_t tokens, bool cached = false)
    {
        a.m.rows = rows;
        a.m.cols = cols;
        a.m.grain = f.grain;
        a.m.encoding = f.encoding;
        a.m.scale_type = f.grain > 0 ? TERN_F16 : TERN_F32;
        must(tern_matrix_bytes(gpu, &a.m, &trit_bytes, &scale_bytes));
        must(tern_activation_shape(gpu, &a.m, &stride, &groups));
        const int64_t count = cached ? 1 : copies_of((int64_t)trit_bytes);
        trits = make_copies(m, (int64_t)trit_bytes, count, f.encoding == TERN_2BIT ? CODES_2BIT : CODES_BASE3);
        scales = make_copies(m, (int64_t)scale_bytes, count, f.grain > 0 ? F16_SCALES : POSITIVE);
        x = m.get<float>(tokens * cols, FLOATS);
        a.q = m.get<int8_t>(tokens * stride, BYTES_127);
        a.scale = m.get<float>(tokens, POSITIVE);
        a.sum = m.get<int32_t>(tokens * groups, BELOW, 1000);
        a.y = m.get<float>(tokens * rows);
        w.rows = rows;
        w.cols = cols;
        w.grain = f.grain;
        snprintf(w.name, sizeof w.name, "w");
        layer.w = &w;
        next();
    }
    product(const product &) = delete;

    void next()
    {
        a.m.trits = trits.next();
        a.m.scales = scales.next();
        w.buffer[TERN_TRITS] = {a.m.encoding, a.m.trits, trit_bytes, 0};
        w.buffer[TERN_SCALES] = {a.m.scale_type, a.m.scales, scale_bytes / (a.m.scale_type == TERN_F16 ? 2 : 4), 0};
    }
    void tokens(int64_t n)
    {
        tern_need need;
        a.n = n;
        must(tern_linear_need(gpu, &layer, n, &need));
        must(tern_reserve(gpu, need.scratch));
    }
    double bytes() const { return (double)(trit_bytes + scale_bytes); }
    double macs() const { return (double)a.m.rows * (double)a.m.cols * (double)a.n; }
    operation matmul() { return [this] { next(); return tern_matmul(gpu, &a); }; }
    operation linear() { return [this] { next(); return tern_linear_forward(gpu, &layer, a.n, x, a.y, NULL); }; }
    operation float_matmul()
    {
        return [this] {
            next();
            tern_matmul_args b = a;
            b.q = NULL;
            b.x = x;
            return tern_matmul(gpu, &b);
        };
    }
};

/* Few tokens: the limit is reading the packed bytes; many: the arithmetic. */
static void bench_tokens(product &p, const format &f, int64_t n)
{
    const bool few = n <= 16;
    const metric m = few ? BYTES : MACS;
    const limit l = few ? READ : int8_limit();
    const std::string shape = text("%ldx%ld N=%ld", (long)p.a.m.rows, (long)p.a.m.cols, (long)n);
    p.tokens(n);
    const double work = few ? p.bytes() : p.macs();
    measure(m, std::string("matmul ") + f.name, shape, l, work, p.trits.count, p.matmul());
    if (f.encoding == TERN_2BIT && f.grain < 0)
        measure(m, std::string("linear ") + f.name, shape, l, work, p.trits.count, p.linear());
}

static void bench_products(int64_t rows, int64_t cols)
{
    static const int64_t tokens[] = {1, 4, 8, 16, 64, 256, 2048}, group_tokens[] = {1, 16, 256}, few[] = {1, 16, 33};
    for (const format &f : formats) {
        memory m;
        product p(m, rows, cols, f, option.quick ? 33 : 2048);
        if (option.quick) for (int64_t n : few) bench_tokens(p, f, n);
        else if (f.grain > 0) for (int64_t n : group_tokens) bench_tokens(p, f, n);
        else for (int64_t n : tokens) bench_tokens(p, f, n);
    }
}

static void bench_float_activations(int64_t size)
{
    static const int64_t tokens[] = {1, 16, 256};
    memory m;
    product p(m, size, size, formats[0], 256);
    for (int64_t n : tokens) {
        if (option.quick && n > 16) continue;
        const std::string shape = text("%ldx%ld N=%ld", (long)size, (long)size, (long)n);
        p.tokens(n);
        measure(MACS, "float act 2-bit row", shape, MULADD, p.macs(), p.trits.count, p.float_matmul());
    }
}

/* -- the backward and dense layers -- */

static void bench_backward(int64_t size, int64_t n)
{
    memory m;
    product p(m, size, size, formats[0], n);
    const std::string shape = text("%ldx%ld N=%ld", (long)size, (long)size, (long)n);
    tern_matmul_dx_args dx = {};
    tern_matmul_dw_args dw = {};
    tern_dense_args dense = {};
    p.tokens(n);
    dx.m = dw.m = p.a.m;
    dx.n = dw.n = n;
    dx.dy = dw.dy = m.get<float>(n * size, FLOATS);
    dx.dx = dense.c = p.a.y;
    dw.q = p.a.q;
    dw.scale = p.a.scale;
    dw.dw = m.get<float>(size * size);
    dense.m = n;
    dense.n = dense.k = size;
    dense.a = p.x; dense.a_row = size; dense.a_col = 1;
    dense.b = m.get<float>(size * size, FLOATS); dense.b_row = 1; dense.b_col = size;
    dense.c_row = size;
    measure(MACS, "matmul_dx", shape, FMA, p.macs(), 1, [&] { return tern_matmul_dx(gpu, &dx); });
    measure(MACS, "matmul_dw int8", shape, FMA, p.macs(), 1, [&] { return tern_matmul_dw(gpu, &dw); });
    dw.q = NULL;
    dw.x = p.x;
    measure(MACS, "matmul_dw float", shape, FMA, p.macs(), 1, [&] { return tern_matmul_dw(gpu, &dw); });
    measure(MACS, "dense", shape, MULADD, p.macs(), 1, [&] { return tern_dense(gpu, &dense); });
    dense.fused = 1;
    measure(MACS, "dense fused", shape, FMA, p.macs(), 1, [&] { return tern_dense(gpu, &dense); });
}

/* dw = dy^T x of [tokens, size] matrices, and y = x w^T. */
static void bench_int8(int64_t size)
{
    memory m;
    const std::string shape = text("%ldx%ldx%ld", (long)size, (long)size, (long)size);
    const double macs = (double)size * (double)size * (double)size;
    tern_dense_i8_args a = {};
    a.m = a.n = a.k = a.c_row = size;
    a.a = m.get<int8_t>(size * size, BYTES_127);
    a.b = m.get<int8_t>(size * size, BYTES_127);
    a.c = m.get<int32_t>(size * size);
    a.a_row = a.b_col = 1; a.a_col = a.b_row = size;
    measure(MACS, "dense i8 dy^T x", shape, int8_limit(), macs, 1, [&] { return tern_dense_i8(gpu, &a); });
    a.a_row = a.b_col = size; a.a_col = a.b_row = 1;
    measure(MACS, "dense i8 x w^T", shape, int8_limit(), macs, 1, [&] { return tern_dense_i8(gpu, &a); });
}

/* Only the visible half of the scores counts as work; with one query, reading the keys and values. */
static void bench_attention(int64_t batch, int64_t queries, int64_t keys, int32_t heads, int32_t dim)
{
    memory m;
    const int64_t width = (int64_t)heads * dim, cache = batch * keys * width;
    const double macs = 2.0 * (double)(batch * width) * ((double)(queries * keys) - (double)(queries * (queries - 1)) / 2);
    const std::string shape = text("%ldx%ldx%ld h%dx%d", (long)batch, (long)queries, (long)keys, heads, dim);
    copies kv = make_copies(m, cache * 8, queries == 1 ? copies_of(cache * 8) : 1, FLOATS);
    float *grad = m.get<float>(queries == 1 ? 1 : batch * queries * width + 2 * cache);
    tern_attention_args a = {};
    a.batch = batch; a.queries = queries; a.keys = keys;
    a.heads = a.kv_heads = heads;
    a.dim = dim;
    a.q = m.get<float>(batch * queries * width, FLOATS);
    a.q_stride = a.k_stride = a.v_stride = width;
    a.y = m.get<float>(batch * queries * width);
    a.p = m.get<float>(batch * heads * queries * keys);
    const operation call = [&] {
        a.k = (const float *)kv.next();
        a.v = a.k + cache;
        return tern_attention(gpu, &a);
    };
    if (queries == 1) return measure(BYTES, "attention, one query", shape, READ, 8.0 * (double)cache, kv.count, call);
    measure(MACS, "attention", shape, MULADD, macs, kv.count, call);
    a.dy = m.get<float>(batch * queries * width, FLOATS);
    a.dq = grad; a.dk = grad + batch * queries * width; a.dv = a.dk + cache;
    measure(MACS, "attention backward", shape, FMA, 2 * macs, kv.count, call);
}

/* -- operations that move data: bytes read plus bytes written -- */

static void bench_ternarize(int64_t size, tern_rule rule, int32_t grain, tern_type type, const char *name)
{
    memory m;
    const int64_t bytes = size * size * (type == TERN_F32 ? 4 : 2);
    const int passes = grain == TERN_PER_TENSOR ? 2 : 1; /* over the weights, which no cache holds */
    size_t trits, scales;
    tern_ternarize_args a = {};
    a.m.rows = a.m.cols = size;
    a.m.grain = grain;
    a.m.encoding = TERN_2BIT;
    a.m.scale_type = grain > 0 ? TERN_F16 : TERN_F32;
    a.rule = rule;
    a.type = type;
    must(tern_matrix_bytes(gpu, &a.m, &trits, &scales));
    a.m.trits = m.get<char>((int64_t)trits);
    a.m.scales = m.get<char>((int64_t)scales);
    copies w = make_copies(m, bytes, copies_of(bytes), type == TERN_F32 ? FLOATS : BF16S);
    const double work = passes * (double)bytes + (double)(trits + scales);
    measure(BYTES, name, text("%ldx%ld", (long)size, (long)size), COPY, work, w.count, [&] {
        a.w = w.next();
        return tern_ternarize(gpu, &a);
    });
}

static void bench_pack(int64_t size, const format &f)
{
    memory m;
    product p(m, size, size, f, 1);
    const double weights = (double)size * (double)size;
    const std::string shape = text("%ldx%ld", (long)size, (long)size);
    tern_pack_args pack = {};
    tern_unpack_args unpack = {};
    int8_t *trits = m.get<int8_t>(size * size, TRIT_BYTES);
    pack.trits = trits;
    unpack.count = size;
    unpack.values = m.get<float>(size * size);
    measure(BYTES, std::string("pack ") + f.name, shape, COPY, weights + (double)p.trit_bytes, p.trits.count, [&] {
        p.next();
        pack.m = p.a.m;
        return tern_pack(gpu, &pack);
    });
    measure(BYTES, std::string("unpack ") + f.name, shape, COPY, 4 * weights + p.bytes(), p.trits.count, [&] {
        p.next();
        unpack.m = p.a.m;
        return tern_unpack(gpu, &unpack);
    });
}

static tern_quantize_args quantize_args(memory &m, const product &p, int64_t n)
{
    tern_quantize_args a = {};
    a.m = p.a.m;
    a.n = n;
    a.x = p.x;
    a.eps = 1e-6f;
    a.q = m.get<int8_t>(n * p.stride);
    a.scale = m.get<float>(n);
    a.sum = m.get<int32_t>(n * p.groups);
    return a;
}

static void bench_quantize(int64_t n, int64_t cols)
{
    memory m;
    product p(m, 16, cols, formats[0], n, true);
    tern_quantize_args a = quantize_args(m, p, n);
    const std::string shape = text("%ldx%ld", (long)n, (long)cols);
    const double bytes = 5.0 * (double)n * (double)cols;
    measure(BYTES, "quantize", shape, COPY, bytes, 1, [&] { return tern_quantize(gpu, &a); });
    a.norm = TERN_NORM_RMS;
    measure(BYTES, "quantize with norm", shape, COPY, bytes, 1, [&] { return tern_quantize(gpu, &a); });
}

static void bench_adamw(int64_t count)
{
    memory m;
    const std::string shape = text("%ld weights", (long)count);
    tern_optimize_args a = {};
    float *w = m.get<float>(count, POSITIVE);
    a.count = count;
    a.w = w;
    a.grad = m.get<float>(count, FLOATS);
    a.moment1 = m.get<float>(count, FLOATS);
    a.moment2 = m.get<float>(count, POSITIVE);
    a.rate = 1e-3f; a.beta1 = 0.9f; a.beta2 = 0.99f; a.eps = 1e-8f;
    a.step = 1;
    a.type = TERN_F32;
    measure(BYTES, "AdamW f32", shape, COPY, 32.0 * (double)count, 1, [&] { return tern_optimize(gpu, &a); });
    a.type = TERN_BF16;
    a.w = m.get<uint16_t>(count, BF16S);
    measure(BYTES, "AdamW bf16", shape, COPY, 28.0 * (double)count, 1, [&] { return tern_optimize(gpu, &a); });
    a.kind = TERN_SGD;
    a.type = TERN_F32;
    a.w = w;
    a.moment2 = NULL;
    measure(BYTES, "SGD with momentum", shape, COPY, 24.0 * (double)count, 1, [&] { return tern_optimize(gpu, &a); });
}

static void bench_elements(int64_t count)
{
    memory m;
    const std::string shape = text("%ld", (long)count);
    const double n = (double)count;
    tern_map_args map = {};
    tern_fill_args fill = {};
    tern_cast_args cast = {};
    tern_sum_args sum = {};
    float *a = m.get<float>(count, FLOATS), *b = m.get<float>(count, FLOATS), *y = m.get<float>(count);
    map.count = fill.count = cast.count = sum.count = count;
    map.alpha = 0.5f;
    map.a = a; map.b = b; map.y = y;
    const operation call = [&] { return tern_map(gpu, &map); };
    map.fn = TERN_MAP_ADD;
    measure(BYTES, "add", shape, COPY, 12 * n, 1, call);
    map.fn = TERN_MAP_RELU2;
    measure(BYTES, "relu squared", shape, COPY, 8 * n, 1, call);
    map.fn = TERN_MAP_SILU;
    measure(BYTES, "silu", shape, COPY, 8 * n, 1, call);
    map.fn = TERN_MAP_GELU;
    measure(BYTES, "gelu", shape, COPY, 8 * n, 1, call);
    map.dy = b;
    map.da = y;
    measure(BYTES, "gelu backward", shape, COPY, 12 * n, 1, call);
    fill.x = y;
    measure(BYTES, "fill with zeros", shape, COPY, 4 * n, 1, [&] { return tern_fill(gpu, &fill); });
    fill.deviation = 0.5f;
    measure(BYTES, "fill with normals", shape, COPY, 4 * n, 1, [&] { return tern_fill(gpu, &fill); });
    cast.from = TERN_F32; cast.to = TERN_BF16;
    cast.src = a; cast.dst = y;
    measure(BYTES, "cast f32 to bf16", shape, COPY, 6 * n, 1, [&] { return tern_cast(gpu, &cast); });
    sum.kind = TERN_SUM_SQUARES;
    sum.x = a; sum.y = y;
    measure(BYTES, "sum of squares", shape, READ, 4 * n, 1, [&] { return tern_sum(gpu, &sum); });
}

static void bench_rows(int64_t n, int64_t cols)
{
    memory m;
    const std::string shape = text("%ldx%ld", (long)n, (long)cols);
    const double count = (double)n * (double)cols;
    const int32_t dim = option.quick ? 32 : 128;
    float *x = m.get<float>(n * cols, FLOATS), *y = m.get<float>(n * cols);
    tern_norm_args norm = {};
    tern_rope_args rope = {};
    norm.n = n;
    norm.cols = cols;
    norm.x = x;
    norm.gain = m.get<float>(cols, POSITIVE);
    norm.eps = 1e-6f;
    norm.y = y;
    measure(BYTES, "norm", shape, COPY, 8 * count, 1, [&] { return tern_norm(gpu, &norm); });
    norm.dy = m.get<float>(n * cols, FLOATS);
    norm.dx = y;
    norm.dgain = m.get<float>(cols);
    measure(BYTES, "norm backward", shape, COPY, 12 * count, 1, [&] { return tern_norm(gpu, &norm); });
    rope.n = rope.period = n;
    rope.heads = (int32_t)(cols / dim);
    rope.dim = dim;
    rope.x = x;
    rope.stride = cols;
    measure(BYTES, "rope", shape, COPY, 8 * count, 1, [&] { return tern_rope(gpu, &rope); });
}

static void bench_embedding(int64_t rows, int64_t cols, int64_t n)
{
    memory m;
    product p(m, rows, cols, formats[0], 1);
    const std::string shape = text("%ldx%ld N=%ld", (long)rows, (long)cols, (long)n);
    const double count = (double)n * (double)cols;
    tern_gather_args gather = {};
    tern_scatter_args scatter = {};
    gather.n = scatter.n = n;
    gather.ids = scatter.ids = m.get<int32_t>(n, BELOW, rows);
    gather.y = m.get<float>(n * cols);
    measure(BYTES, "gather 2-bit row", shape, COPY, 4.25 * count, p.trits.count, [&] {
        p.next();
        gather.m = p.a.m;
        return tern_gather(gpu, &gather);
    });
    scatter.rows = rows;
    scatter.cols = cols;
    scatter.dy = m.get<float>(n * cols, FLOATS);
    scatter.dw = m.get<float>(rows * cols);
    measure(BYTES, "scatter", shape, COPY, 12 * count, 1, [&] { return tern_scatter(gpu, &scatter); });
}

static void bench_loss(int64_t n, int64_t classes)
{
    memory m;
    const std::string shape = text("%ldx%ld", (long)n, (long)classes);
    const double count = (double)n * (double)classes;
    tern_loss_args a = {};
    a.n = n;
    a.classes = classes;
    a.logits = m.get<float>(n * classes, FLOATS);
    a.targets = m.get<int32_t>(n, BELOW, classes);
    a.losses = m.get<float>(n);
    a.scale = 1.0f;
    measure(BYTES, "loss alone", shape, READ, 4 * count, 1, [&] { return tern_loss(gpu, &a); });
    a.dlogits = m.get<float>(n * classes);
    measure(BYTES, "loss and gradient", shape, COPY, 8 * count, 1, [&] { return tern_loss(gpu, &a); });
}

/* -- small operations: what a call costs -- */

static __global__ void nothing(int) {}

static void bench_small(int64_t size)
{
    memory m;
    product p(m, size, size, formats[0], 1, true);
    tern_quantize_args quantize = quantize_args(m, p, 1);
    const std::string vector = text("%ld", (long)size), square = text("%ldx%ld N=1 L2", (long)size, (long)size);
    float *x = m.get<float>(size, FLOATS), *y = m.get<float>(size);
    tern_map_args map = {};
    tern_norm_args norm = {};
    p.tokens(1);
    map.fn = TERN_MAP_ADD;
    map.count = norm.cols = size;
    map.a = map.b = norm.x = x;
    map.y = norm.y = y;
    norm.n = 1;
    norm.eps = 1e-6f;
    measure(LATENCY, "an empty kernel", "1 block", NONE, 0, 1, [] {
        TERN__LAUNCH(nothing, 1, 32, 0, stream, 0);
        return TERN_OK;
    });
    measure(LATENCY, "add", vector, NONE, 0, 1, [&] { return tern_map(gpu, &map); });
    measure(LATENCY, "norm", vector, NONE, 0, 1, [&] { return tern_norm(gpu, &norm); });
    measure(LATENCY, "quantize", vector, NONE, 0, 1, [&] { return tern_quantize(gpu, &quantize); });
    measure(LATENCY, "matmul 2-bit row", square, NONE, 0, 1, p.matmul());
    measure(LATENCY, "linear 2-bit row", square, NONE, 0, 1, p.linear());
}

/* -- mixtures of experts, hops, whole steps of a training -- */

static tern_param frozen_param(memory &m, int64_t rows, int64_t cols, int number)
{
    tern_param p = {};
    size_t trits, scales;
    p.rows = rows;
    p.cols = cols;
    p.grain = TERN_PER_ROW;
    snprintf(p.name, sizeof p.name, "w%d", number);
    p.buffer[TERN_TRITS].type = TERN_2BIT;
    p.buffer[TERN_SCALES].type = TERN_F32;
    const tern_matrix shape = tern_param_matrix(&p);
    must(tern_matrix_bytes(gpu, &shape, &trits, &scales));
    p.buffer[TERN_TRITS] = {TERN_2BIT, m.get<char>((int64_t)trits, CODES_2BIT), trits, 0};
    p.buffer[TERN_SCALES] = {TERN_F32, m.get<char>((int64_t)scales, POSITIVE), scales / 4, 0};
    return p;
}

/* Inputs of few tokens change from call to call, and with them the experts. Beside it a product of as many multiply-adds. */
static void bench_moe(int64_t cols, int64_t width, int32_t count, int32_t top_k, const std::vector<int64_t> &tokens)
{
    memory m;
    std::vector<tern_param> params;
    std::vector<tern_expert> experts;
    tern_moe moe = {};
    tern_param router = frozen_param(m, count, cols, 0);
    for (int32_t i = 0; i < count; i++) {
        params.push_back(frozen_param(m, width, cols, 3 * i + 1));
        params.push_back(frozen_param(m, width, cols, 3 * i + 2));
        params.push_back(frozen_param(m, cols, width, 3 * i + 3));
    }
    for (int32_t i = 0; i < count; i++) experts.push_back({&params[3 * i], &params[3 * i + 1], &params[3 * i + 2]});
    moe.router.w = &router;
    moe.experts = experts.data();
    moe.count = count;
    moe.top_k = top_k;
    moe.norm = TERN_NORM_RMS;
    for (int64_t n : tokens) {
        const int64_t round = n > 16 ? 1 : option.quick ? 2 : 64;
        const double macs = 3.0 * (double)n * top_k * (double)(cols * width);
        const std::string shape = text("%d of %d %ldx%ld N=%ld", top_k, count, (long)width, (long)cols, (long)n);
        copies x = make_copies(m, n * cols * 4, round, FLOATS);
        float *y = m.get<float>(n * cols);
        tern_need need = {};
        must(tern_moe_need(gpu, &moe, n, &need));
        must(tern_reserve(gpu, need.scratch));
        measure(n > 16 ? MACS : LATENCY, "MoE", shape, n > 16 ? int8_limit() : NONE, macs, round,
                [&] { return tern_moe_forward(gpu, &moe, n, (const float *)x.next(), y, NULL); });
        if (n <= 16) continue;
        product p(m, 3 * top_k * width, cols, formats[0], n, true);
        p.tokens(n);
        measure(MACS, "MoE as one product", shape, int8_limit(), macs, 1, p.matmul());
    }
}

/* Unique bytes: rows of h and y, edges, starts. few: several hops, too. */
static void bench_hop(int64_t nodes, int64_t edges, int64_t cols, bool few)
{
    memory m;
    std::vector<int32_t> from((size_t)edges), to((size_t)edges);
    tern_param message = frozen_param(m, cols, cols, 1), update = frozen_param(m, cols, cols, 2);
    tern_edges e = {};
    tern_graph g = {};
    tern_hop l = {};
    tern_need need = {};
    uint64_t seed = 1;
    const std::string shape = text("%ldx%ld %ld edges", (long)nodes, (long)cols, (long)edges);
    if (!wanted("hop, 4 hops, 4 hops at once", shape)) return;
    for (int64_t i = 0; i < edges; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        from[(size_t)i] = (int32_t)((seed >> 33) % (uint64_t)nodes);
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        to[(size_t)i] = (int32_t)((seed >> 33) % (uint64_t)nodes);
    }
    e.nodes = nodes;
    e.count = edges;
    e.from = from.data();
    e.to = to.data();
    must(tern_graph_build(gpu, &e, &g));
    float *h = m.get<float>(nodes * cols, FLOATS), *y = m.get<float>(nodes * cols);
    l.message.w = &message;
    l.update.w = &update;
    l.order = TERN_AGGREGATE_FIRST;
    l.norm = TERN_GRAPH_MEAN;
    l.fn = TERN_MAP_RELU;
    l.residual = 1;
    must(tern_hop_need(gpu, &l, &g, &need));
    must(tern_reserve(gpu, need.scratch));
    const double work = 8.0 * (double)(nodes * cols) + 4.0 * (double)edges + 8.0 * (double)nodes;
    const auto hop = [&] { return tern_hop_forward(gpu, &l, &g, h, y, NULL); };
    measure(BYTES, "hop", shape, READ, work, 1, hop);
    if (few) {
        const tern_hop hops[] = {l, l, l, l};
        must(tern_hops_need(gpu, hops, 4, &g, &need));
        must(tern_reserve(gpu, need.scratch));
        measure(BYTES, "4 hops", shape, READ, 4 * work, 1, [&] { for (int i = 0; i < 3; i++) must(hop()); return hop(); });
        measure(BYTES, "4 hops at once", shape, READ, 4 * work, 1, [&] { return tern_hops_forward(gpu, hops, 4, &g, h, y); });
    }
    tern_graph_free(gpu, &g);
}

/* Forward, backward and AdamW of a stack of square layers; then the step alone: AdamW, scales, trits and packing. */
static void bench_training(int64_t size, int layers, int64_t n)
{
    memory m;
    std::vector<tern_param> params((size_t)layers);
    std::vector<tern_param *> items;
    std::vector<tern_linear> stack((size_t)layers);
    std::vector<float *> x;
    std::vector<void *> saved;
    tern_need need = {};
    tern_step s = {};
    size_t scratch = 0;
    const std::string shape = text("%dx %ldx%ld N=%ld", layers, (long)size, (long)size, (long)n);
    if (!wanted("training", shape)) return;
    x.push_back(m.get<float>(n * size, FLOATS));
    for (int i = 0; i < layers; i++) {
        tern_param *p = &params[(size_t)i];
        memory start;
        p->rows = p->cols = size;
        p->grain = TERN_PER_ROW;
        snprintf(p->name, sizeof p->name, "w%d", i);
        must(tern_param_alloc(gpu, p, TERN_FOR_ADAMW));
        must(tern_param_set(gpu, p, TERN_F32, start.get<float>(size * size, FLOATS)));
        must(tern_sync(gpu));
        items.push_back(p);
        stack[(size_t)i].w = p;
        stack[(size_t)i].norm = TERN_NORM_RMS;
        must(tern_linear_need(gpu, &stack[(size_t)i], n, &need));
        scratch = std::max(scratch, need.scratch);
        saved.push_back(m.get<char>((int64_t)need.saved));
        x.push_back(m.get<float>(n * size));
    }
    float *dy = m.get<float>(n * size, FLOATS), *dx[2] = {m.get<float>(n * size), m.get<float>(n * size)};
    const tern_model model = {items.data(), layers};
    must(tern_reserve(gpu, scratch));
    s.rate = 1e-4f;
    s.clip = 1.0f;
    s.step = 1;
    const operation step = [&] { return tern_model_step(gpu, &model, &s); };
    measure(MACS, "training step", shape, limit_here(BF16) ? BF16 : FMA, 3.0 * (double)layers * (double)(size * size) * (double)n, 1, [&] {
        for (size_t i = 0; i < stack.size(); i++) TERN__TRY(tern_linear_forward(gpu, &stack[i], n, x[i], x[i + 1], saved[i]));
        for (size_t i = stack.size(); i-- > 0;)
            TERN__TRY(tern_linear_backward(gpu, &stack[i], n, x[i], saved[i], i + 1 == stack.size() ? dy : dx[(i + 1) % 2], dx[i % 2]));
        return step();
    });
    measure(LATENCY, "training: optimizer alone", shape, NONE, 0, 1, step);
    for (tern_param &p : params) tern_param_free(gpu, &p, (1 << TERN_BUFFERS) - 1);
}

/* -- what was aimed at, and what came out -- */

static const result *find_result(const std::string &op, const std::string &shape)
{
    for (const result &r : results)
        if (r.op == op && r.shape == shape) return &r;
    return NULL;
}

static void print_target(const std::string &name, double aim, double reached)
{
    printf("  %-66s %4.0f%%   ", name.c_str(), 100 * aim);
    if (reached > 0) printf("reached %5.1f%%  %s\n", 100 * reached, reached >= aim ? "yes" : "NO");
    else printf("not measured\n");
}

static void target(const std::string &op, const std::string &shape, const char *of, double aim)
{
    const result *r = find_result(op, shape);
    print_target(op + ", " + shape + ", of the " + of, aim, r ? r->fraction : 0);
}

/* The rate with some tokens against that with one: the weights are read once either way. */
static void target_tokens(const std::string &op, const std::string &shape, const char *tokens)
{
    const result *one = find_result(op, shape + " N=1"), *more = find_result(op, shape + tokens);
    print_target(op + ", " + shape + tokens + ", rate of N=1", 0.95, one && more ? one->graph / more->graph : 0);
}

/* How long one takes as a part of the other. */
static void target_share(const std::string &name, double aim, const std::string &op, const std::string &of,
                         const std::string &shape, bool most)
{
    const result *a = find_result(op, shape), *b = find_result(of, shape);
    if (!a || !b) return print_target(name, aim, 0);
    printf("  %-66s %4.0f%%   is      %5.1f%%  %s\n",
           name.c_str(), 100 * aim, 100 * a->graph / b->graph, most == (a->graph / b->graph <= aim) ? "yes" : "NO");
}

static void targets_table()
{
    static const char *const shapes[] = {"57344x8192", "16384x16384"}, *const tokens[] = {" N=4", " N=8", " N=16"};
    static const char *const ops[] = {"matmul 2-bit row", "matmul base-3 row"};
    printf("\nTargets%s\n", option.quick ? " (a quick run has none of the shapes)" : "");
    for (const char *op : ops)
        for (int i = 0; i < 2; i++) {
            target(op, std::string(shapes[i]) + " N=1", "read-only stream", i == 0 ? 0.92 : 0.85);
            for (const char *n : tokens) target_tokens(op, shapes[i], n);
        }
    target("ternarize row f32", "8192x8192", "copy rate", 0.75);
    target("ternarize row bf16", "8192x8192", "copy rate", 0.75);
    target("AdamW f32", "67108864 weights", "copy rate", 0.75);
    target("AdamW bf16", "67108864 weights", "copy rate", 0.75);
    target("hop", "1000000x256 10000000 edges", "read rate, unique bytes", 0.60);
    target_share("MoE N=4096, rate of one product", 0.60, "MoE as one product", "MoE", "8 of 128 768x2048 N=4096", false);
    const result *one = find_result("MoE", "8 of 128 768x2048 N=1");
    printf("  %-66s 8 us   %s", "MoE N=1", one ? "" : "   not measured\n");
    if (one) printf("   reached %.1f us  %s\n", 1e6 * one->graph, one->graph <= 8e-6 ? "yes" : "NO");
    target("training step", "16x 8192x8192 N=4096", "bf16 peak", 0.40);
    target_share("optimizer of the training step, at most", 0.10, "training: optimizer alone", "training step",
                 "16x 8192x8192 N=4096", true);
}

static void legend()
{
    printf("Best of at least %d turns; each limit measured in turn with its row. Values are those of calls in a CUDA graph.\n"
           "  GB/s     1e9 bytes a second: packed weights and scales of a matrix with up to 16 tokens; elsewhere all bytes read\n"
           "           and written (weights that are ternarized per tensor: read twice)\n"
           "  TMAC/s   1e12 multiply-adds a second, one for each weight and token; attention: of the visible pairs\n"
           "  us       microseconds a call, in a graph and by plain launches\n"
           "  group    scales in f16, one for each 128 inputs of a row; row: one f32 scale for each row\n"
           "  matmul   activations quantized beforehand; linear: the whole layer, with its int8 quantizer; float act: float ones\n"
           "  N        tokens; h16x64: 16 heads of 64; L2: one matrix again and again, other weights rotate through %ld MiB\n",
           option.quick ? 1 : 4, (long)(rotation / MIB));
}

static int usage()
{
    fprintf(stderr, "usage: bench-cuda [--csv] [--quick] [--filter text]\n");
    return 2;
}

static void bench_all()
{
    const bool q = option.quick;
    title("Ternary matrices, weights from memory");
    if (q) bench_products(48, 256);
    else {
        bench_products(57344, 8192);
        bench_products(16384, 16384);
        bench_products(4096, 4096);
    }
    bench_float_activations(q ? 64 : 4096);
    title("Float products: the backward and dense layers");
    bench_backward(q ? 64 : 4096, q ? 16 : 2048);
    title("Int8 products");
    bench_int8(q ? 64 : 4096);
    title("Attention");
    bench_attention(q ? 1 : 4, q ? 16 : 1024, q ? 16 : 1024, q ? 2 : 16, q ? 16 : 64);
    bench_attention(1, 1, q ? 64 : 4096, q ? 2 : 32, q ? 16 : 128);
    bench_attention(q ? 2 : 16, 1, q ? 16 : 1024, q ? 2 : 32, q ? 16 : 128);
    title("Moving data");
    bench_ternarize(q ? 64 : 8192, TERN_ABSMEAN, TERN_PER_ROW, TERN_F32, "ternarize row f32");
    bench_ternarize(q ? 64 : 8192, TERN_ABSMEAN, TERN_PER_ROW, TERN_BF16, "ternarize row bf16");
    bench_ternarize(q ? 64 : 8192, TERN_TWN, TERN_PER_ROW, TERN_F32, "ternarize TWN row f32");
    bench_ternarize(q ? 128 : 8192, TERN_ABSMEAN, 128, TERN_F32, "ternarize group 128 f32");
    bench_ternarize(q ? 64 : 8192, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_F32, "ternarize tensor f32");
    bench_ternarize(q ? 64 : 8192, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_BF16, "ternarize tensor bf16");
    bench_pack(q ? 64 : 8192, formats[0]);
    bench_pack(q ? 64 : 8192, formats[2]);
    bench_quantize(q ? 4 : 16384, q ? 128 : 8192);
    bench_adamw(q ? 1000 : 1 << 26);
    bench_elements(q ? 1000 : 1 << 27);
    bench_rows(q ? 4 : 16384, q ? 128 : 8192);
    bench_embedding(q ? 64 : 65536, q ? 64 : 4096, q ? 5 : 16384);
    bench_loss(q ? 3 : 2048, q ? 100 : 65536);
    title("Mixtures, graphs, a training");
    if (q) bench_moe(32, 16, 4, 2, {1, 17});
    else bench_moe(2048, 768, 128, 8, {1, 16, 4096});
    bench_hop(q ? 40 : 1000000, q ? 120 : 10000000, q ? 32 : 256, false);
    bench_hop(q ? 40 : 1000, q ? 130 : 4000, q ? 32 : 64, true);
    bench_training(q ? 32 : 8192, q ? 2 : 16, q ? 17 : 4096);
    title("Small operations: what a call costs");
    bench_small(q ? 64 : 4096);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--csv") == 0) option.csv = true;
        else if (strcmp(argv[i], "--quick") == 0) option.quick = true;
        else if (strcmp(argv[i], "--filter") == 0 && i + 1 < argc) option.filter = argv[++i];
        else return usage();
    }
    open_device();
    print_device();
    {
        memory m;
        find_ways(m);
        open_lt(m);
        if (option.csv) printf("op,shape,metric,value,limit,fraction,us in a graph,us plain\n");
        else legend();
        limits_table();
        bench_all();
    }
    if (!option.csv) {
        targets_table();
        printf("\nDevice memory at most: %.1f GB\n", 1e-9 * (double)most_held);
    }
    print_clocks("at the end");
    tern_close(gpu);
    return 0;
}
