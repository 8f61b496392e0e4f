/* How fast is ternary.h here? Measures what this machine can do at most (memory and cache reads, integer
   and float arithmetic), then every operation as a rate and as a fraction of the limit it runs into.

     cc -O2 -I. bench/bench.c -o build/bench -pthread -ldl
     build/bench [--csv] [--quick] [--filter text]

   --csv      op,shape,tier,threads,metric,value,limit,fraction: one row per case; the metric names the limit
   --quick    a few seconds, on working sets too small to say anything about memory
   --filter   only the cases whose op, shape or tier contains this text

   Other libraries are measured beside it where the loader finds them (LD_LIBRARY_PATH): libopenblas.so.0,
   oneDNN's libdnnl.so.3 in its OpenMP build, and ggml's libggml-cpu.so; --filter peer shows them alone.

   Every row is the best of several repetitions, and its limit the best of repetitions that took turns with
   them: on a shared machine only times taken side by side can be compared. One thread is timed by its own
   clock, two by the clock on the wall. Nothing here asserts a time. */
#define _DEFAULT_SOURCE
#define TERNARY_IMPLEMENTATION
#include "../ternary.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef __GNUC__
#error "the benchmark needs the vector types and asm of gcc or clang"
#endif

enum { MIB = 1 << 20, KIB = 1 << 10, THREADS = 2 };

static struct { int csv, quick; const char *filter; } option;

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One thread is timed by its own clock, which stands still while another program has the core. */
static double now(int threads) { return seconds(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC); }

/* -- what runs where: a context for every tier of this machine, with one and with two threads -- */

typedef struct setup {
    tern_context *c;
    tern_isa isa;         /* whose arithmetic limits apply */
    const char *name;
    int threads;
} setup;

static setup setups[2 * TERN__ISA_END];
static int setup_count;
static tern_parallel workers;      /* THREADS of them, for the limits and the contexts */
static tern_context *plain;        /* best tier, one thread: memory and preparation */
static const setup *best;          /* the setup of `plain` */

static void must(tern_context *c, tern_result result)
{
    if (result == TERN_OK) return;
    fprintf(stderr, "bench: %s: %s\n", tern_result_text(result), c ? tern_last_error(c)->text : "");
    exit(1);
}

static void *memory(size_t bytes)
{
    void *p = tern_alloc(plain, bytes);
    if (!p) {
        fprintf(stderr, "bench: no memory for %lu MiB\n", (unsigned long)(bytes / MIB));
        exit(1);
    }
    return p;
}

static void add_setup(tern_isa isa, const char *name, int threads)
{
    tern_context_desc d = TERN_ZERO;
    setup *s = &setups[setup_count++];
    d.isa_max = isa;
    if (threads > 1) d.parallel = workers;
    s->isa = isa;
    s->name = name;
    s->threads = threads;
    must(NULL, tern_open(&s->c, &d, NULL));
    if (threads == 1) best = s;
    plain = best->c;
}

/* The environment's cap (TERNARY_ISA) would silently change what a row says, so it is taken away. */
static void open_setups(void)
{
    unsetenv("TERNARY_ISA");
    workers = tern_pool_parallel(tern_pool_create(THREADS));
#define TIER(id, suffix, text)                                                                            \
    if (!tern_cpu_backend(TERN_ISA_##id))                                                                 \
        fprintf(stderr, "bench: this machine or build lacks tier %s: its rows and limits are skipped\n", text); \
    else {                                                                                                \
        add_setup(TERN_ISA_##id, text, 1);                                                                \
        if (TERN_ISA_##id != TERN_ISA_SCALAR) add_setup(TERN_ISA_##id, text, THREADS);                    \
    }
    TERN_TIERS(TIER)
#undef TIER
}

static uint32_t seed = 1;
static uint32_t random24(void) { seed = seed * 1664525u + 1013904223u; return seed >> 8; }

static float *random_floats(int64_t n)
{
    float *x = (float *)memory((size_t)n * sizeof *x);
    int64_t i;
    for (i = 0; i < n; i++) x[i] = (float)random24() / 8388608.0f - 1.0f;
    return x;
}

/* -- the stream: a rotation through more memory than any cache holds -- */

static struct { uint8_t *base; size_t bytes, at, block; } stream;

static void stream_fill(const void *block, size_t bytes)
{
    size_t i;
    for (i = 0; i + bytes <= stream.bytes; i += bytes) memcpy(stream.base + i, block, bytes);
    stream.block = bytes;
    stream.at = 0;
}

/* The next `bytes`, from the start of a block; they were last touched a whole rotation ago. */
static uint8_t *stream_next(size_t bytes)
{
    size_t from = (stream.at + stream.block - 1) / stream.block * stream.block;
    if (from + bytes > stream.bytes / stream.block * stream.block) from = 0;
    stream.at = from + bytes;
    return stream.base + from;
}

/* -- limits: reading memory -- */

/* Reads `bytes` as some streams side by side, asking for lines `ahead` of each (0: leave it to the
   hardware). 512 bytes a step and four sums, so that loads are all that counts. */
#define READER(name, TARGET, lanes)                                                                        \
    static TARGET uint64_t name(const uint8_t *from, size_t bytes, size_t streams, size_t ahead)           \
    {                                                                                                      \
        typedef uint64_t vector __attribute__((vector_size(8 * lanes), may_alias, aligned(8)));            \
        vector a = {0}, b = {0}, c = {0}, d = {0};                                                         \
        const size_t part = bytes / streams / 512 * 512;                                                   \
        size_t i, s, j;                                                                                    \
        for (i = 0; i < part; i += 512)                                                                    \
            for (s = 0; s < streams; s++) {                                                                \
                const uint8_t *p = from + s * part + i;                                                    \
                const vector *v = (const vector *)(const void *)p;                                         \
                if (ahead) for (j = 0; j < 512; j += 64) __builtin_prefetch((const void *)((uintptr_t)p + ahead + j)); \
                for (j = 0; j < 64 / lanes; j += 8) {                                                      \
                    a |= v[j] | v[j + 4]; b |= v[j + 1] | v[j + 5];                                        \
                    c |= v[j + 2] | v[j + 6]; d |= v[j + 3] | v[j + 7];                                    \
                }                                                                                          \
            }                                                                                              \
        a |= b | c | d;                                                                                    \
        return a[0] | a[1];                                                                                \
    }

READER(read_scalar, , 2) /* 16 bytes, as SSE4.1 */
#define read_sse41 read_scalar
#if defined(TERN__WITH_AVX2) || defined(TERN__WITH_AVX_VNNI)
READER(read_avx2, __attribute__((target("avx2"))), 4)
#else
#define read_avx2 read_scalar
#endif
#define read_avx_vnni read_avx2
#ifdef TERN__WITH_AVX512_VNNI
READER(read_avx512_vnni, __attribute__((target("avx512f"))), 8)
#else
#define read_avx512_vnni read_scalar
#endif
#define read_avx512_vbmi read_avx512_vnni
#define read_amx_int8 read_avx512_vnni

typedef struct read_way { uint64_t (*read)(const uint8_t *, size_t, size_t, size_t); size_t streams, ahead; } read_way;
typedef struct read_job { read_way way; const uint8_t *from[THREADS]; size_t bytes; int passes; uint64_t seen[THREADS]; } read_job;

static void read_task(void *arg, int32_t i)
{
    read_job *job = (read_job *)arg;
    int pass;
    for (pass = 0; pass < job->passes; pass++)
        job->seen[i] |= job->way.read(job->from[i], job->bytes, job->way.streams, job->way.ahead);
}

static volatile uint64_t read_sink;

static void each_thread(int threads, tern_task task, void *arg)
{
    if (threads == 1) task(arg, 0);
    else workers.run(workers.user, task, arg, threads);
}

/* -- limits: arithmetic in registers. One function per kind and tier, named by TERN_TIERS -- */

#ifdef TERN__X86
#define REGISTER "x" /* twelve sums fit in the sixteen registers of every vector width */
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m" /* through memory: a low limit, but one that compiles everywhere */
#endif
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define ZEROED(i) a##i = {0},
#define MERGED(i) a0 += a##i;

/* Twelve independent sums hide the latency. STEP(i) adds to sum i; x and y are operands. */
#define SPIN(name, TARGET, type, bytes, STEP)                                                              \
    static TARGET void name(int64_t rounds)                                                                \
    {                                                                                                      \
        typedef type vector __attribute__((vector_size(bytes)));                                           \
        vector TWELVE(ZEROED) x, y;                                                                        \
        int64_t i;                                                                                         \
        size_t j;                                                                                          \
        for (j = 0; j < (bytes) / sizeof(type); j++) { x[j] = (type)(1 + j % 7); y[j] = (type)(3 + j % 5); } \
        for (i = 0; i < rounds; i++) { TWELVE(STEP) }                                                      \
        TWELVE(MERGED)                                                                                     \
        __asm__ volatile("" : : REGISTER(a0));                                                             \
    }

/* What plain C compiles to everywhere: an integer multiply and add, and a vector of four floats. */
#define STEP_C(i) a##i += x * y; __asm__ volatile("" : "+" REGISTER(a##i), "+" REGISTER(x));
SPIN(spin_muladd_scalar, , float, 16, STEP_C)
#define spin_fma_scalar spin_muladd_scalar

static void spin_int8_scalar(int64_t rounds)
{
    uint32_t a[12] = {0}, x = 3, y = 5;
    int64_t i;
#define STEP(i) a[i] += x * y; __asm__ volatile("" : "+r"(x), "+r"(y));
    for (i = 0; i < rounds; i++) { TWELVE(STEP) }
#undef STEP
    for (i = 1; i < 12; i++) a[0] += a[i];
    __asm__ volatile("" : : "r"(a[0]));
}

#ifdef TERN__X86
#define STEP_MADDUBS_SSE(i) \
    { vector t; __asm__ volatile("movdqa %2, %1\n\tpmaddubsw %3, %1\n\tpaddw %1, %0" : "+x"(a##i), "=&x"(t) : "x"(x), "x"(y)); }
#define STEP_MADDUBS(i) \
    { vector t; __asm__ volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(a##i), "=&x"(t) : "x"(x), "x"(y)); }
#define STEP_MULADD(i) { vector t; __asm__ volatile("vmulps %2, %3, %1\n\tvaddps %1, %0, %0" : "+x"(a##i), "=&x"(t) : "x"(x), "x"(y)); }
#define STEP_FMA(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(a##i) : "x"(x), "x"(y));
#define STEP_DPBUSD(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+x"(a##i) : "x"(x), "x"(y));
#define STEP_DPBUSD_VEX(i) __asm__ volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(a##i) : "x"(x), "x"(y));
#endif
#ifdef TERN__WITH_SSE41
SPIN(spin_int8_sse41, __attribute__((target("ssse3"))), uint8_t, 16, STEP_MADDUBS_SSE)
#else
#define spin_int8_sse41 spin_int8_scalar
#endif
#ifdef TERN__WITH_AVX_VNNI
SPIN(spin_int8_avx_vnni, __attribute__((target("avx2"))), uint8_t, 32, STEP_DPBUSD_VEX)
#else
#define spin_int8_avx_vnni spin_int8_scalar
#endif
#if defined(TERN__WITH_AVX2) || defined(TERN__WITH_AVX_VNNI)
SPIN(spin_int8_avx2, __attribute__((target("avx2"))), uint8_t, 32, STEP_MADDUBS)
SPIN(spin_muladd_avx2, __attribute__((target("avx2"))), float, 32, STEP_MULADD)
SPIN(spin_fma_avx2, __attribute__((target("avx2,fma"))), float, 32, STEP_FMA)
#else
#define spin_int8_avx2 spin_int8_scalar
#define spin_muladd_avx2 spin_muladd_scalar
#define spin_fma_avx2 spin_fma_scalar
#endif
#ifdef TERN__WITH_AVX512_VNNI
SPIN(spin_int8_avx512_vnni, __attribute__((target("avx512f,avx512bw,avx512vnni"))), uint8_t, 64, STEP_DPBUSD)
SPIN(spin_muladd_avx512_vnni, __attribute__((target("avx512f"))), float, 64, STEP_MULADD)
SPIN(spin_fma_avx512_vnni, __attribute__((target("avx512f"))), float, 64, STEP_FMA)
#else
#define spin_int8_avx512_vnni spin_int8_scalar
#define spin_muladd_avx512_vnni spin_muladd_scalar
#define spin_fma_avx512_vnni spin_fma_scalar
#endif

#ifdef TERN__WITH_AMX_INT8
/* Twelve products a round in four sums, of random bytes: zeros would let the clock run faster. */
static void spin_int8_amx_int8(int64_t rounds)
{
    uint8_t data[64 * 64];
    tern__tile_config config;
    uint32_t x = 1;
    size_t i;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (i = 0; i < 8; i++) {
        config.rows[i] = 16;
        config.bytes[i] = 64;
    }
    for (i = 0; i < sizeof data; i++) { x = x * 1664525u + 1013904223u; data[i] = (uint8_t)(x >> 24); }
    TERN__TILE_CONFIG(&config);
    TERN__TILE_LOAD(0, data, 64); TERN__TILE_LOAD(1, data, 64); TERN__TILE_LOAD(2, data, 64); TERN__TILE_LOAD(3, data, 64);
    TERN__TILE_LOAD(4, data, 64); TERN__TILE_LOAD(5, data + 1024, 64);
    TERN__TILE_LOAD(6, data + 2048, 64); TERN__TILE_LOAD(7, data + 3072, 64);
    while (rounds-- > 0)
        for (i = 0; i < 3; i++) {
            TERN__TILE_DOT(0, 4, 6);
            TERN__TILE_DOT(1, 5, 6);
            TERN__TILE_DOT(2, 4, 7);
            TERN__TILE_DOT(3, 5, 7);
        }
    TERN__TILE_RELEASE();
}
#else
#define spin_int8_amx_int8 spin_int8_scalar
#endif

typedef struct peak { const char *name; void (*spin)(int64_t rounds); double macs; } peak; /* multiply-adds of one step */
typedef struct tier_limits { read_way way; peak int8, muladd, fma; } tier_limits;
#define TIER(id, suffix, text) {{read_##suffix, 1, 0}, INT8_##id, MULADD_##id, FMA_##id},
#define INT8_SCALAR {"imul+add", spin_int8_scalar, 1}
#define MULADD_SCALAR {"mul+add x4", spin_muladd_scalar, 4}
#define FMA_SCALAR MULADD_SCALAR
#define INT8_SSE41 {"maddubs+add x16", spin_int8_sse41, 16}
#define MULADD_SSE41 MULADD_SCALAR
#define FMA_SSE41 MULADD_SCALAR
#define INT8_AVX2 {"maddubs+add", spin_int8_avx2, 32}
#define MULADD_AVX2 {"mul+add x8", spin_muladd_avx2, 8}
#define FMA_AVX2 {"FMA x8", spin_fma_avx2, 8}
#define INT8_AVX_VNNI {"vpdpbusd x32", spin_int8_avx_vnni, 32}
#define MULADD_AVX_VNNI MULADD_AVX2
#define FMA_AVX_VNNI FMA_AVX2
#define INT8_AVX512_VNNI {"vpdpbusd", spin_int8_avx512_vnni, 64}
#define MULADD_AVX512_VNNI {"mul+add x16", spin_muladd_avx512_vnni, 16}
#define FMA_AVX512_VNNI {"FMA x16", spin_fma_avx512_vnni, 16}
#define INT8_AVX512_VBMI INT8_AVX512_VNNI
#define MULADD_AVX512_VBMI MULADD_AVX512_VNNI
#define FMA_AVX512_VBMI FMA_AVX512_VNNI
#define INT8_AMX_INT8 {"tdpbsud", spin_int8_amx_int8, 16 * 16 * 64}
#define MULADD_AMX_INT8 MULADD_AVX512_VNNI
#define FMA_AMX_INT8 FMA_AVX512_VNNI
static const tier_limits tiers[] = {TERN_TIERS(TIER)};
#undef TIER

typedef enum { DRAM, L2, L1, INT8, MULADD, FMA, NONE, PEER } limit;

static struct { double rate; const char *name; } fastest_peer; /* of the shape and threads at hand, for the rows of PEER */

static read_way ways[L1 + 1][THREADS + 1]; /* the fastest way to read, found at the start */

static const peak *peak_of(limit l, const setup *s)
{
    const tier_limits *t = &tiers[s->isa - 1];
    return l == INT8 ? &t->int8 : l == MULADD ? &t->muladd : &t->fma;
}

static const char *limit_name(limit l, const setup *s)
{
    static const char *const names[] = {"DRAM read", "L2 read", "L1 read"};
    return l == NONE ? "none" : l == PEER ? fastest_peer.name : l <= L1 ? names[l] : peak_of(l, s)->name;
}

typedef struct spin_job { void (*spin)(int64_t rounds); int64_t rounds; } spin_job;
static void spin_task(void *arg, int32_t i) { const spin_job *job = (const spin_job *)arg; (void)i; job->spin(job->rounds); }

static double read_rate(limit l, read_way way, int threads)
{
    static uint8_t *cached;
    const size_t size = l == DRAM ? stream.bytes / 64 : l == L2 ? MIB : 16 * KIB;
    read_job job;
    double t;
    int i;
    if (!cached) cached = (uint8_t *)memory((size_t)THREADS * MIB);
    memset(&job, 0, sizeof job);
    job.way = way;
    job.bytes = size;
    job.passes = l == DRAM ? 1 : (int)((size_t)(option.quick ? 32 : 128) * MIB / size);
    for (i = 0; i < threads; i++) job.from[i] = l == DRAM ? stream_next(size) : cached + i * MIB;
    t = now(threads);
    each_thread(threads, read_task, &job);
    t = now(threads) - t;
    read_sink = job.seen[0] | job.seen[THREADS - 1];
    return 1e-9 * threads * (double)size * job.passes / t;
}

/* One short measurement of a limit, in 1e9 bytes or multiply-adds a second over all threads. */
static double limit_rate(limit l, const setup *s)
{
    spin_job job;
    double t;
    if (l == NONE) return 0;
    if (l == PEER) return fastest_peer.rate;
    if (l <= L1) return read_rate(l, ways[l][s->threads], s->threads);
    job.spin = peak_of(l, s)->spin;
    job.rounds = option.quick ? 100000 : 400000;
    t = now(s->threads);
    each_thread(s->threads, spin_task, &job);
    t = now(s->threads) - t;
    return 1e-9 * s->threads * 12 * peak_of(l, s)->macs * (double)job.rounds / t;
}

static void find_ways(void)
{
    static const size_t streams[] = {1, 2, 4}, ahead[] = {0, 1024, 4096};
    int l, threads, tier, i, rep;
    for (l = DRAM; l <= L1; l++)
        for (threads = 1; threads <= THREADS; threads++) {
            double most = 0;
            for (rep = 0; rep < (option.quick ? 1 : 3); rep++)
                for (tier = 0; tier < (int)best->isa; tier++)
                    for (i = 0; i < 9; i++) {
                        read_way way = tiers[tier].way;
                        double rate;
                        way.streams = streams[i % 3];
                        way.ahead = ahead[i / 3];
                        if (tern_cpu_backend((tern_isa)(tier + 1)) == NULL) continue;
                        rate = read_rate((limit)l, way, threads);
                        if (rate > most) { most = rate; ways[l][threads] = way; }
                    }
        }
}

/* -- the table -- */

enum { MAX_RESULTS = 2048 };
typedef struct result { const char *op; char shape[32]; const char *tier; int threads; double fraction, time, work; } result;
static result results[MAX_RESULTS]; /* for the targets at the end */
static int result_count;
static const char *pending_title;

static void title(const char *text) { pending_title = text; }

static int wanted(const char *op, const char *shape, const char *tier)
{
    const char *f = option.filter;
    return !f || strstr(op, f) || strstr(shape, f) || strstr(tier, f);
}

typedef enum { BYTES, MACS, EDGES, LATENCY } metric;

static void print_title(void)
{
    if (pending_title)
        printf("\n%s\n  %-26s %-20s %-12s %3s %10s %-6s %10s %6s  %-12s %11s\n", pending_title,
               "op", "shape", "tier", "thr", "value", "", "limit", "", "limit is", "us a call");
    pending_title = NULL;
}

static void print_row(metric m, const char *op, const char *shape, const setup *s, limit l, double work, double time, double rate)
{
    static const char *const units[] = {"GB/s", "GMAC/s", "Me/s", "us"};
    const char *unit = units[m];
    const double value = m == LATENCY ? 1e6 * time : (m == EDGES ? 1e-6 : 1e-9) * work / time;
    const double most = m == LATENCY && rate > 0 ? 1e-3 * work / rate : rate;
    const double fraction = rate > 0 ? 1e-9 * work / time / rate : 0;
    if (result_count < MAX_RESULTS) {
        result *r = &results[result_count++];
        r->op = op;
        snprintf(r->shape, sizeof r->shape, "%s", shape);
        r->tier = s->name;
        r->threads = s->threads;
        r->fraction = fraction;
        r->time = time;
        r->work = work;
    }
    if (option.csv) {
        printf("%s,%s,%s,%d,%s vs %s,%.6g,", op, shape, s->name, s->threads, unit, limit_name(l, s), value);
        if (rate > 0) printf("%.6g,%.4f\n", most, fraction); else printf(",\n");
    } else {
        print_title();
        printf("  %-26s %-20s %-12s %3d %10.3f %-6s ", op, shape, s->name, s->threads, value, unit);
        if (rate > 0) printf("%10.3f %5.1f%%  %-12s", most, 100 * fraction, limit_name(l, s));
        else printf("%10s %6s  %-12s", "", "", limit_name(l, s));
        printf(" %11.2f\n", 1e6 * time);
    }
    fflush(stdout);
}

static void print_limit(const setup *s, limit l, double rate)
{
    const char *unit = l <= L1 ? "GB/s" : "GMAC/s";
    if (option.csv) printf("limit,%s,%s,%d,%s,%.6g,%.6g,1\n", limit_name(l, s), s->name, s->threads, unit, rate, rate);
    else {
        print_title();
        printf("  %-26s %-20s %-12s %3d %10.3f %s\n", "limit", limit_name(l, s), s->name, s->threads, rate, unit);
    }
}

/* One measurement of a limit over a span of time. */
static double limit_over(limit l, const setup *s, double span)
{
    const double start = seconds(CLOCK_MONOTONIC);
    double sum = 0;
    int parts = 0;
    do { sum += limit_rate(l, s); parts++; } while (l != NONE && seconds(CLOCK_MONOTONIC) - start < span);
    return sum / parts;
}

/* Runs call(arg), which does `work` bytes or multiply-adds, taking turns with its limit until the time of a
   case is used up. Both turns are of one length: where clocks wander, the best of short turns beats the best
   of long ones. Returns the rate, 0 for a case that is not wanted. */
static double measure(metric m, const char *op, const char *shape, const setup *s, limit l, double work, void (*call)(void *), void *arg)
{
    const double limit_s = option.quick ? 0.02 : 0.3, turn_s = option.quick ? 0.001 : 0.002; /* a turn fits between two interruptions */
    double start, span, rate = 0, least = 1e9, t;
    int64_t calls = 1, i;
    int turn;
    if (!wanted(op, shape, s->name)) return 0;
    for (;;) {
        t = now(s->threads);
        for (i = 0; i < calls; i++) call(arg);
        t = now(s->threads) - t;
        if (t > turn_s / 2) break;
        calls *= 2;
    }
    span = t;
    start = seconds(CLOCK_MONOTONIC);
    for (turn = 0; turn < (option.quick ? 2 : 5) || seconds(CLOCK_MONOTONIC) - start < limit_s; turn++) {
        const double r = limit_over(l, s, span);
        if (r > rate) rate = r;
        t = now(s->threads);
        for (i = 0; i < calls; i++) call(arg);
        t = (now(s->threads) - t) / (double)calls;
        if (t < least) least = t;
    }
    print_row(m, op, shape, s, l, work, least, rate);
    return 1e-9 * work / least;
}

static const char *shape_text(const char *format, ...)
{
    static char text[64];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

static void limits_table(void)
{
    int i, l;
    title("The machine's limits");
    for (i = 0; i < setup_count; i++)
        for (l = DRAM; l < NONE; l++) {
            const setup *s = &setups[i];
            double rate = 0;
            int rep;
            if (l <= L1 && s->isa != best->isa) continue; /* reads are the machine's, not a tier's */
            if (l == FMA && s->isa == TERN_ISA_SCALAR) continue; /* the same as MULADD */
            if (!wanted("limit", limit_name((limit)l, s), s->name)) continue;
            for (rep = 0; rep < (option.quick ? 2 : 10); rep++) {
                const double r = limit_rate((limit)l, s);
                if (r > rate) rate = r;
            }
            print_limit(s, (limit)l, rate);
        }
}

/* -- ternary matrix products -- */

/* A layer with its input and output, and its weights: in place, or the next ones of the stream. */
typedef struct product {
    tern_context *c;
    tern_param w;
    tern_linear layer;
    tern_matmul_args a;
    const float *x;
    size_t trits, scales;
    int streamed;
} product;

static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Its activations of a kind, from p->x. */
static void product_quantize(product *p, tern_act act)
{
    tern_quantize_args q;
    memset(&q, 0, sizeof q);
    q.m = p->a.m;
    q.act = p->a.act = p->layer.act = act;
    q.n = p->a.n;
    q.x = p->x;
    q.q = (int8_t *)(uintptr_t)p->a.q;
    q.scale = (float *)(uintptr_t)p->a.scale;
    q.sum = (int32_t *)(uintptr_t)p->a.sum;
    must(plain, tern_quantize(plain, &q));
}

static product product_scaled(int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_type scales, int64_t n)
{
    product p;
    float *w = random_floats(rows * cols);
    int64_t stride, groups;
    memset(&p, 0, sizeof p);
    snprintf(p.w.name, sizeof p.w.name, "w");
    p.w.rows = rows;
    p.w.cols = cols;
    p.w.grain = grain;
    p.w.buffer[TERN_TRITS].type = encoding;
    p.w.buffer[TERN_SCALES].type = scales;
    must(plain, tern_param_alloc(plain, &p.w, TERN_FOR_INFERENCE));
    must(plain, tern_param_set(plain, &p.w, TERN_F32, w));
    tern_free(plain, w);
    p.a.m = tern_param_matrix(&p.w);
    must(plain, tern_matrix_bytes(plain, &p.a.m, &p.trits, &p.scales));
    must(plain, tern_activation_shape(plain, &p.a.m, &stride, &groups));
    p.x = random_floats(n * cols);
    p.a.q = (const int8_t *)memory((size_t)(n * stride));
    p.a.scale = (const float *)memory((size_t)n * 4);
    p.a.sum = (const int32_t *)memory((size_t)(n * groups) * 4);
    p.a.y = (float *)memory((size_t)(n * rows) * 4);
    p.a.n = n;
    product_quantize(&p, TERN_ACT_INT8);
    return p;
}

static product product_open(int64_t rows, int64_t cols, int32_t grain, tern_type encoding, int64_t n)
{
    return product_scaled(rows, cols, grain, encoding, grain > 0 ? TERN_F16 : TERN_F32, n);
}

static void product_close(product *p)
{
    tern_param_free(plain, &p->w, TERN_FOR_INFERENCE);
    tern_free(plain, (void *)(uintptr_t)p->x);
    tern_free(plain, (void *)(uintptr_t)p->a.q);
    tern_free(plain, (void *)(uintptr_t)p->a.scale);
    tern_free(plain, (void *)(uintptr_t)p->a.sum);
    tern_free(plain, p->a.y);
}

static void stream_weights(product *p)
{
    const size_t bytes = whole_lines(p->trits) + whole_lines(p->scales);
    uint8_t *block = (uint8_t *)memory(bytes);
    memcpy(block, p->a.m.trits, p->trits);
    memcpy(block + whole_lines(p->trits), p->a.m.scales, p->scales);
    stream_fill(block, bytes);
    tern_free(plain, block);
    p->streamed = 1;
}

static void next_weights(product *p)
{
    if (!p->streamed) return;
    p->a.m.trits = stream_next(stream.block);
    p->a.m.scales = (uint8_t *)p->a.m.trits + whole_lines(p->trits);
}

static void call_matmul(void *arg)
{
    product *p = (product *)arg;
    next_weights(p);
    must(p->c, tern_matmul(p->c, &p->a));
}

static void call_float_matmul(void *arg)
{
    product *p = (product *)arg;
    tern_matmul_args a = p->a;
    next_weights(p);
    a.m = p->a.m;
    a.q = NULL;
    a.x = p->x;
    must(p->c, tern_matmul(p->c, &a));
}

static void call_linear(void *arg)
{
    product *p = (product *)arg;
    tern_param w = p->w;
    next_weights(p);
    w.buffer[TERN_TRITS].data = p->a.m.trits;
    w.buffer[TERN_SCALES].data = p->a.m.scales;
    p->layer.w = &w;
    must(p->c, tern_linear_forward(p->c, &p->layer, p->a.n, p->x, p->a.y, NULL));
}

static void product_use(product *p, const setup *s)
{
    tern_need need;
    p->c = s->c;
    p->layer.w = &p->w;
    must(s->c, tern_linear_need(s->c, &p->layer, p->a.n, &need));
    must(s->c, tern_reserve(s->c, need.scratch));
}

static const char *format_name(tern_type encoding, int32_t grain)
{
    if (encoding == TERN_BASE3) return grain > 0 ? "base-3 group 128" : "base-3 row";
    return grain > 0 ? "2-bit group 128" : "2-bit row";
}

/* One token. From memory the limit is reading the packed bytes; from L2 it is the arithmetic. */
static void bench_vector(int64_t rows, int64_t cols, int streamed)
{
    static const struct { tern_type encoding; int32_t grain; tern_type scales; } formats[] = {
        {TERN_2BIT, TERN_PER_ROW, TERN_F32}, {TERN_2BIT, 128, TERN_F16}, {TERN_2BIT, 128, TERN_LOG},
        {TERN_BASE3, TERN_PER_ROW, TERN_F32}, {TERN_BASE3, 128, TERN_F16}
    };
    static char names[5][3][40];
    const metric m = streamed ? BYTES : MACS;
    const char *shape = shape_text("%ldx%ld%s", (long)rows, (long)cols, streamed ? " DRAM" : " L2");
    int f, i;
    for (f = 0; f < 5; f++) {
        const char *name = formats[f].scales == TERN_LOG ? "2-bit log group 128" : format_name(formats[f].encoding, formats[f].grain);
        product p = product_scaled(rows, cols, formats[f].grain, formats[f].encoding, formats[f].scales, 1);
        const double work = streamed ? (double)(p.trits + p.scales) : (double)(rows * cols);
        if (streamed) stream_weights(&p);
        snprintf(names[f][0], sizeof names[f][0], "matmul %s", name);
        snprintf(names[f][1], sizeof names[f][1], "linear %s", name);
        snprintf(names[f][2], sizeof names[f][2], "float act %s", name);
        for (i = 0; i < setup_count; i++) {
            product_use(&p, &setups[i]);
            measure(m, names[f][0], shape, &setups[i], streamed ? DRAM : INT8, work, call_matmul, &p);
            if (formats[f].grain < 0) measure(m, names[f][1], shape, &setups[i], streamed ? DRAM : INT8, work, call_linear, &p);
            if (f == 0) measure(m, names[f][2], shape, &setups[i], streamed ? DRAM : FMA, work, call_float_matmul, &p);
        }
        product_close(&p);
    }
}

/* Some tokens. Their activations, quantized beforehand, come from whatever cache they fit. */
static void bench_tokens(int64_t rows, int64_t cols, tern_type encoding, int32_t grain, int64_t n, tern_isa least)
{
    static char names[4][3][40];
    const int f = (encoding == TERN_BASE3) * 2 + (grain > 0);
    product p = product_open(rows, cols, grain, encoding, n);
    const double macs = (double)(rows * cols * n);
    const char *shape = shape_text("%ldx%ld N=%ld", (long)rows, (long)cols, (long)n);
    int i;
    snprintf(names[f][0], sizeof names[f][0], "matmul %s", format_name(encoding, grain));
    snprintf(names[f][1], sizeof names[f][1], "linear %s", format_name(encoding, grain));
    snprintf(names[f][2], sizeof names[f][2], "float act %s", format_name(encoding, grain));
    for (i = 0; i < setup_count; i++) {
        if (setups[i].isa < least || (setups[i].isa == TERN_ISA_SCALAR && n > 8)) continue;
        product_use(&p, &setups[i]);
        measure(MACS, names[f][0], shape, &setups[i], INT8, macs, call_matmul, &p);
        if (f > 0) continue;
        measure(MACS, names[f][1], shape, &setups[i], INT8, macs, call_linear, &p);
        if (n <= 64 && n % 8 == 0) measure(MACS, names[f][2], shape, &setups[i], FMA, macs, call_float_matmul, &p);
    }
    product_close(&p);
}

/* Kinds of activations beside each other; bits as many as are 1. */
static void bench_kinds(int64_t size, tern_type encoding, int64_t n)
{
    static const struct { tern_act act; int32_t percent; const char *name; } kinds[] = {
        {TERN_ACT_INT8, 100, "int8"}, {TERN_ACT_INT4, 100, "int4"}, {TERN_ACT_BIT, 2, "bits 2%"}, {TERN_ACT_BIT, 50, "bits 50%"}
    };
    static char names[2][4][2][40];
    const int base3 = encoding == TERN_BASE3;
    product p = product_open(size, size, TERN_PER_ROW, encoding, n);
    float *x = (float *)(uintptr_t)p.x;
    const double macs = (double)(size * size * n);
    const char *shape = shape_text("%ldx%ld N=%ld", (long)size, (long)size, (long)n);
    int64_t i;
    int k, s;
    for (k = 0; k < 4; k++) {
        char *matmul = names[base3][k][0], *linear = names[base3][k][1];
        for (i = 0; i < n * size; i++)
            x[i] = kinds[k].percent == 100 ? (float)random24() / 8388608.0f - 1.0f : (float)(random24() % 100 < (uint32_t)kinds[k].percent);
        product_quantize(&p, kinds[k].act);
        snprintf(matmul, 40, "matmul %s%s", base3 ? "base-3 " : "", kinds[k].name);
        snprintf(linear, 40, "linear %s%s", base3 ? "base-3 " : "", kinds[k].name);
        for (s = 0; s < setup_count; s++) {
            if (setups[s].isa == TERN_ISA_SCALAR || setups[s].threads > 1) continue;
            product_use(&p, &setups[s]);
            if (kinds[k].act != TERN_ACT_INT4) /* which is int8 there */
                measure(MACS, matmul, shape, &setups[s], INT8, macs, call_matmul, &p);
            measure(MACS, linear, shape, &setups[s], INT8, macs, call_linear, &p);
        }
    }
    product_close(&p);
}

static void bench_batch(int64_t size)
{
    static const int64_t tokens[] = {1, 2, 4, 8, 16, 32, 64, 128, 512};
    int t, f;
    for (t = 0; t < 9; t++) bench_tokens(size, size, TERN_2BIT, TERN_PER_ROW, tokens[t], TERN_ISA_SCALAR);
    for (f = 1; f < 4; f++)
        for (t = 0; t < 9; t += 3)
            bench_tokens(size, size, f & 2 ? TERN_BASE3 : TERN_2BIT, f & 1 ? 128 : TERN_PER_ROW, tokens[t], TERN_ISA_SSE41);
}

/* The steps between numbers of tokens: of the multiples of 16 none should be slower than one before it, and no
   other number should take longer than the multiple after it. Each time is the best of turns that the numbers
   take, each turn of some 512 tokens. */
static void bench_steps(int64_t size)
{
    enum { MOST = 64 };
    int64_t tokens[MOST];
    int count = 0, f, i, j, k, turn;
    for (i = 1; i <= 33; i++) tokens[count++] = i;
    for (i = 47; i <= 512; i += i < 64 ? 1 : i < 128 ? 16 : 128) tokens[count++] = i;
    for (f = 0; f < 2; f++) {
        product p = product_open(size, size, TERN_PER_ROW, f ? TERN_BASE3 : TERN_2BIT, 512);
        for (k = 0; k < setup_count; k++) {
            const setup *s = &setups[k];
            double least[MOST], fall = 0, longer = 0, start;
            int64_t from = 16, to = 16, odd = 1;
            if (s->threads > 1 || s->isa == TERN_ISA_SCALAR || !wanted("steps", format_name(f ? TERN_BASE3 : TERN_2BIT, -1), s->name))
                continue;
            product_use(&p, s);
            start = seconds(CLOCK_MONOTONIC);
            for (turn = 0; turn < 2 || seconds(CLOCK_MONOTONIC) - start < (option.quick ? 0.05 : 3.0); turn++)
                for (i = 0; i < count; i++) {
                    const int calls = 1 + (int)(511 / tokens[i]);
                    double t = now(1);
                    p.a.n = tokens[i];
                    for (j = 0; j < calls; j++) call_matmul(&p);
                    t = (now(1) - t) / calls;
                    if (turn == 0 || t < least[i]) least[i] = t;
                }
            for (i = 0; i < count; i++)
                for (j = 0; j < count; j++) {
                    const double rate_i = (double)tokens[i] / least[i], rate_j = (double)tokens[j] / least[j];
                    if (tokens[i] % 16 == 0 && tokens[j] % 16 == 0 && i < j && 1 - rate_j / rate_i > fall) {
                        fall = 1 - rate_j / rate_i;
                        from = tokens[i];
                        to = tokens[j];
                    }
                    if (tokens[i] % 16 && tokens[j] == (tokens[i] + 15) / 16 * 16 && least[i] / least[j] > longer) {
                        longer = least[i] / least[j];
                        odd = tokens[i];
                    }
                }
            if (option.csv) {
                printf("steps,%s,%s,1,fall of the rate over multiples of 16,%.6g,,\n",
                       format_name(f ? TERN_BASE3 : TERN_2BIT, -1), s->name, fall);
                printf("steps,%s,%s,1,time over that of the next multiple of 16,%.6g,,\n",
                       format_name(f ? TERN_BASE3 : TERN_2BIT, -1), s->name, longer);
                continue;
            }
            if (pending_title) printf("\n%s\n", pending_title);
            pending_title = NULL;
            printf("  %-12s %-12s over multiples of 16 the rate falls most from N=%ld to %ld, by %.1f%%; "
                   "against the next multiple, N=%ld takes most: %.1f%%\n",
                   format_name(f ? TERN_BASE3 : TERN_2BIT, -1), s->name, (long)from, (long)to, 100 * fall, (long)odd, 100 * longer);
        }
        product_close(&p);
    }
}

/* -- other libraries, where the loader finds them (LD_LIBRARY_PATH); the few functions called are declared here -- */

/* A list of functions, X(result, name, arguments), becomes pointers of the same names. */
#define POINTER(result, name, arguments) static result (*name) arguments;
#define FOUND(result, name, arguments) && find_symbol(library, #name, &name)

static int find_symbol(void *library, const char *name, void *pointer)
{
    void *symbol = dlsym(library, name);
    memcpy(pointer, &symbol, sizeof symbol);
    return symbol != NULL;
}

static int missing(const char *rows)
{
    fprintf(stderr, "bench: no rows of %s: %s\n", rows, dlerror());
    return 0;
}

#define BLAS_FUNCTIONS(X)                                                                                                       \
    X(void, openblas_set_num_threads, (int n))                                                                                  \
    X(char *, openblas_get_corename, (void))                                                                                    \
    X(void, cblas_sgemv, (int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x, int incx,   \
                          float beta, float *y, int incy))                                                                      \
    X(void, cblas_sgemm, (int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b, \
                          int ldb, float beta, float *c, int ldc))
BLAS_FUNCTIONS(POINTER)

enum { BLAS_ROW_MAJOR = 101, BLAS_PLAIN = 111, BLAS_TRANSPOSED = 112 };
static int blas; /* it is here */
static setup blas_setup;

/* OpenBLAS takes a processor it does not know for a Prescott, many times too slow: unless the user has
   chosen its kernels, they are those of the best tier here. */
static int open_blas(void)
{
    void *library;
    if (best->isa >= TERN_ISA_AVX512_VNNI) setenv("OPENBLAS_CORETYPE", "SKYLAKEX", 0);
    else if (best->isa >= TERN_ISA_AVX2) setenv("OPENBLAS_CORETYPE", "HASWELL", 0);
    library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!(library BLAS_FUNCTIONS(FOUND))) return missing("OpenBLAS");
    openblas_set_num_threads(1);
    blas_setup = *best;
    blas_setup.name = "OpenBLAS";
    return 1;
}

typedef struct blas_job { int m, n, k, streamed; const float *a, *b; float *c; } blas_job; /* c [m, n] = a [m, k] b [n, k]^T */

static void call_sgemv(void *arg)
{
    const blas_job *j = (const blas_job *)arg;
    const float *w = j->streamed ? (const float *)(const void *)stream_next(stream.block) : j->b;
    cblas_sgemv(BLAS_ROW_MAJOR, BLAS_PLAIN, j->n, j->k, 1.0f, w, j->k, j->a, 1, 0.0f, j->c, 1);
}

static void call_sgemm(void *arg)
{
    const blas_job *j = (const blas_job *)arg;
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_PLAIN, BLAS_TRANSPOSED, j->m, j->n, j->k, 1.0f, j->a, j->k, j->b, j->k, 0.0f, j->c, j->n);
}

static void bench_blas(int64_t n, int64_t rows, int64_t cols, int streamed)
{
    blas_job j;
    float *w;
    const double macs = (double)(n * rows * cols);
    if (!blas) return;
    w = random_floats(rows * cols);
    j.m = (int)n; j.n = (int)rows; j.k = (int)cols;
    j.streamed = streamed;
    j.a = random_floats(n * cols);
    j.b = w;
    j.c = (float *)memory((size_t)(n * rows) * 4);
    if (streamed) {
        stream_fill(w, (size_t)(rows * cols) * 4);
        measure(BYTES, "sgemv float weights", shape_text("%ldx%ld DRAM", (long)rows, (long)cols), &blas_setup, DRAM, 4 * macs,
                call_sgemv, &j);
    } else if (n == 1)
        measure(MACS, "sgemv float weights", shape_text("%ldx%ld N=1", (long)rows, (long)cols), &blas_setup, FMA, macs, call_sgemv, &j);
    else
        measure(MACS, "sgemm float weights", shape_text("%ldx%ld N=%ld", (long)rows, (long)cols, (long)n), &blas_setup, FMA, macs,
                call_sgemm, &j);
    tern_free(plain, w);
    tern_free(plain, (void *)(uintptr_t)j.a);
    tern_free(plain, j.c);
}

/* -- peers: the same layer by other libraries, its float input quantized in each call as ours is -- */

#define ONEDNN_FUNCTIONS(X)                                                                                                     \
    X(int, dnnl_engine_create, (void **engine, int kind, size_t index))                                                         \
    X(int, dnnl_stream_create, (void **queue, void *engine, unsigned flags))                                                    \
    X(int, dnnl_memory_desc_create_with_strides, (void **desc, int dims, const int64_t *sizes, int type,                        \
                                                  const int64_t *strides))                                                      \
    X(int, dnnl_memory_desc_create_with_tag, (void **desc, int dims, const int64_t *sizes, int type, int tag))                  \
    X(size_t, dnnl_memory_desc_get_size, (const void *desc))                                                                    \
    X(int, dnnl_memory_create, (void **memory, const void *desc, void *engine, void *data))                                     \
    X(int, dnnl_memory_set_data_handle, (void *memory, void *data))                                                             \
    X(int, dnnl_primitive_attr_create, (void **attr))                                                                           \
    X(int, dnnl_primitive_attr_set_scales_mask, (void *attr, int argument, int mask))                                           \
    X(int, dnnl_primitive_attr_set_zero_points_mask, (void *attr, int argument, int mask))                                      \
    X(int, dnnl_reorder_primitive_desc_create, (void **desc, const void *from, void *from_engine, const void *to,               \
                                                void *to_engine, const void *attr))                                             \
    X(int, dnnl_matmul_primitive_desc_create, (void **desc, void *engine, const void *source, const void *weights,              \
                                               const void *bias, const void *result, const void *attr))                         \
    X(const void *, dnnl_primitive_desc_query_md, (const void *desc, int what, int index))                                      \
    X(int, dnnl_primitive_create, (void **primitive, const void *desc))                                                         \
    X(int, dnnl_primitive_execute, (const void *primitive, void *queue, int count, const dnnl_argument *arguments))             \
    X(void, omp_set_num_threads, (int n))
typedef struct dnnl_argument { int argument; void *memory; } dnnl_argument;
ONEDNN_FUNCTIONS(POINTER)

enum { DNNL_CPU = 1, DNNL_IN_ORDER = 1, DNNL_F32 = 3, DNNL_S32, DNNL_S8, DNNL_U8, DNNL_ANY_LAYOUT = 1, DNNL_WEIGHTS_DESC = 131 };
enum { DNNL_SOURCE = 1, DNNL_RESULT = 17, DNNL_WEIGHTS = 33, DNNL_SCALES = 4096, DNNL_ZERO_POINTS = 8192 };

#define GGML_FUNCTIONS(X)                                                                                                       \
    X(void *, ggml_init, (ggml_room room))                                                                                      \
    X(void, ggml_free, (void *context))                                                                                         \
    X(void *, ggml_new_tensor_2d, (void *context, int type, int64_t cols, int64_t rows))                                        \
    X(void *, ggml_mul_mat, (void *context, void *a, void *b))                                                                  \
    X(size_t, ggml_nbytes, (const void *tensor))                                                                                \
    X(size_t, ggml_quantize_chunk, (int type, const float *from, void *to, int64_t start, int64_t rows, int64_t cols,           \
                                     const float *importance))                                                                  \
    X(void *, ggml_new_graph_custom, (void *context, size_t size, bool grads))                                                  \
    X(void, ggml_build_forward_expand, (void *graph, void *tensor))                                                             \
    X(void *, ggml_backend_cpu_reg, (void))                                                                                     \
    X(void *, ggml_backend_reg_dev_get, (void *registry, size_t index))                                                         \
    X(void *, ggml_backend_cpu_init, (void))                                                                                    \
    X(void, ggml_backend_cpu_set_n_threads, (void *backend, int n))                                                             \
    X(int, ggml_backend_graph_compute, (void *backend, void *graph))                                                            \
    X(bool, ggml_backend_supports_op, (void *backend, const void *tensor))                                                      \
    X(void *, ggml_backend_cpu_buffer_from_ptr, (void *data, size_t bytes))                                                     \
    X(int, ggml_backend_tensor_alloc, (void *buffer, void *tensor, void *data))                                                 \
    X(void, ggml_backend_tensor_set, (void *tensor, const void *data, size_t offset, size_t bytes))                             \
    X(void *, ggml_backend_reg_get_proc_address, (void *registry, const char *name))                                            \
    X(size_t, ggml_backend_buft_get_alloc_size, (void *kind, const void *tensor))                                               \
    X(void *, ggml_backend_buft_alloc_buffer, (void *kind, size_t bytes))                                                       \
    X(void *, ggml_backend_buffer_get_base, (void *buffer))                                                                     \
    X(void, ggml_backend_buffer_free, (void *buffer))
typedef struct ggml_room { size_t bytes; void *data; bool only_plan; } ggml_room;
GGML_FUNCTIONS(POINTER)

enum { GGML_F32 = 0, GGML_Q8_0 = 8, GGML_TQ1_0 = 34, GGML_TQ2_0 = 35 };

static struct { int here; void *engine, *queue; } onednn;
static struct { int here; void *backend, *anywhere, **layouts; } ggml; /* anywhere: a buffer over all of memory */

typedef struct peer peer;
typedef struct peer_job {
    const peer *peer;
    int64_t n, rows, cols;
    int threads, streamed;
    const float *x, *w;          /* w [rows, cols]: trit times scale */
    const int8_t *trits;
    const float *scales;         /* [rows] */
    float *y;
    void *weights;               /* as the peer wants them; `block` bytes */
    size_t block;
    union {
        blas_job blas;
        struct { void *quantize, *matmul, *q; dnnl_argument from[4], with[6]; float step; int32_t zero; } onednn;
        struct { void *context, *own, **graphs; size_t count, at; } ggml; /* own: a buffer in a layout of ggml's */
    } u;
} peer_job;

struct peer {
    const char *op, *library;
    const int *here;
    int type; /* ggml's */
    int (*open)(peer_job *j);
    void (*call)(void *job);
    void (*close)(peer_job *j);
};

static int open_blas_peer(peer_job *j)
{
    openblas_set_num_threads(j->threads);
    j->weights = (void *)(uintptr_t)j->w;
    j->block = (size_t)(j->rows * j->cols) * 4;
    j->u.blas.m = (int)j->n; j->u.blas.n = (int)j->rows; j->u.blas.k = (int)j->cols;
    j->u.blas.streamed = j->streamed;
    j->u.blas.a = j->x; j->u.blas.b = j->w; j->u.blas.c = j->y;
    return 1;
}

static void call_blas_peer(void *arg)
{
    peer_job *j = (peer_job *)arg;
    if (j->n == 1) call_sgemv(&j->u.blas); else call_sgemm(&j->u.blas);
}

static void close_blas_peer(peer_job *j) { (void)j; openblas_set_num_threads(1); }

static int open_onednn(void)
{
    void *library = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!(library ONEDNN_FUNCTIONS(FOUND))) return missing("oneDNN");
    return !dnnl_engine_create(&onednn.engine, DNNL_CPU, 0) && !dnnl_stream_create(&onednn.queue, onednn.engine, DNNL_IN_ORDER);
}

static void *dnnl_matrix(int type, int64_t rows, int64_t cols, int64_t row, int64_t col)
{
    const int64_t sizes[2] = {rows, cols}, strides[2] = {row, col};
    void *desc = NULL;
    dnnl_memory_desc_create_with_strides(&desc, 2, sizes, type, strides);
    return desc;
}

static void *dnnl_vector(int type, int64_t count)
{
    const int64_t stride = 1;
    void *desc = NULL;
    dnnl_memory_desc_create_with_strides(&desc, 1, &count, type, &stride);
    return desc;
}

static dnnl_argument dnnl_pass(int argument, const void *desc, const void *data)
{
    dnnl_argument a;
    a.argument = argument;
    a.memory = NULL;
    dnnl_memory_create(&a.memory, desc, onednn.engine, (void *)(uintptr_t)data);
    return a;
}

static int dnnl_reorder(void **reorder, const void *from, const void *to, const void *attr)
{
    void *desc = NULL;
    return dnnl_reorder_primitive_desc_create(&desc, from, onednn.engine, to, onednn.engine, attr) ||
           dnnl_primitive_create(reorder, desc);
}

/* u8 x s8 to float, with a scale for each row of the weights and one, known beforehand, for the input: its
   quantizer is a reorder that does not look for the greatest. Descriptions live as long as the program. */
static int open_onednn_peer(peer_job *j)
{
    const int64_t sizes[2] = {j->cols, j->rows};
    void *x = dnnl_matrix(DNNL_F32, j->n, j->cols, j->cols, 1), *q = dnnl_matrix(DNNL_U8, j->n, j->cols, j->cols, 1);
    void *y = dnnl_matrix(DNNL_F32, j->n, j->rows, j->rows, 1), *w = dnnl_matrix(DNNL_S8, j->cols, j->rows, 1, j->cols);
    void *step = dnnl_vector(DNNL_F32, 1), *zero = dnnl_vector(DNNL_S32, 1), *scales = dnnl_vector(DNNL_F32, j->rows);
    void *any = NULL, *to_u8 = NULL, *scaled = NULL, *matmul = NULL, *pack = NULL;
    const void *packed;
    dnnl_argument move[2];
    omp_set_num_threads(j->threads);
    if (dnnl_memory_desc_create_with_tag(&any, 2, sizes, DNNL_S8, DNNL_ANY_LAYOUT) ||
        dnnl_primitive_attr_create(&to_u8) || dnnl_primitive_attr_create(&scaled) ||
        dnnl_primitive_attr_set_scales_mask(to_u8, DNNL_RESULT, 0) ||
        dnnl_primitive_attr_set_zero_points_mask(to_u8, DNNL_RESULT, 0) ||
        dnnl_primitive_attr_set_scales_mask(scaled, DNNL_SOURCE, 0) ||
        dnnl_primitive_attr_set_zero_points_mask(scaled, DNNL_SOURCE, 0) ||
        dnnl_primitive_attr_set_scales_mask(scaled, DNNL_WEIGHTS, 2) ||
        dnnl_matmul_primitive_desc_create(&matmul, onednn.engine, q, any, NULL, y, scaled) ||
        dnnl_primitive_create(&j->u.onednn.matmul, matmul)) return 0;
    packed = dnnl_primitive_desc_query_md(matmul, DNNL_WEIGHTS_DESC, 0);
    if (dnnl_reorder(&j->u.onednn.quantize, x, q, to_u8) || dnnl_reorder(&pack, w, packed, NULL)) return 0;
    j->block = dnnl_memory_desc_get_size(packed);
    j->weights = memory(whole_lines(j->block));
    j->u.onednn.q = memory((size_t)(j->n * j->cols));
    j->u.onednn.step = 1.0f / 127;
    j->u.onednn.zero = 128;
    j->u.onednn.from[0] = dnnl_pass(DNNL_SOURCE, x, j->x);
    j->u.onednn.from[1] = dnnl_pass(DNNL_RESULT, q, j->u.onednn.q);
    j->u.onednn.from[2] = dnnl_pass(DNNL_RESULT | DNNL_SCALES, step, &j->u.onednn.step);
    j->u.onednn.from[3] = dnnl_pass(DNNL_RESULT | DNNL_ZERO_POINTS, zero, &j->u.onednn.zero);
    j->u.onednn.with[0] = dnnl_pass(DNNL_WEIGHTS, packed, j->weights);
    j->u.onednn.with[1] = dnnl_pass(DNNL_SOURCE, q, j->u.onednn.q);
    j->u.onednn.with[2] = dnnl_pass(DNNL_RESULT, y, j->y);
    j->u.onednn.with[3] = dnnl_pass(DNNL_SOURCE | DNNL_SCALES, step, &j->u.onednn.step);
    j->u.onednn.with[4] = dnnl_pass(DNNL_SOURCE | DNNL_ZERO_POINTS, zero, &j->u.onednn.zero);
    j->u.onednn.with[5] = dnnl_pass(DNNL_WEIGHTS | DNNL_SCALES, scales, j->scales);
    move[0] = dnnl_pass(DNNL_SOURCE, w, j->trits);
    move[1] = dnnl_pass(DNNL_RESULT, packed, j->weights);
    return !dnnl_primitive_execute(pack, onednn.queue, 2, move);
}

static void call_onednn_peer(void *arg)
{
    peer_job *j = (peer_job *)arg;
    dnnl_primitive_execute(j->u.onednn.quantize, onednn.queue, 4, j->u.onednn.from);
    if (j->streamed) dnnl_memory_set_data_handle(j->u.onednn.with[0].memory, stream_next(stream.block));
    dnnl_primitive_execute(j->u.onednn.matmul, onednn.queue, 6, j->u.onednn.with);
}

static void close_onednn_peer(peer_job *j)
{
    tern_free(plain, j->weights);
    tern_free(plain, j->u.onednn.q);
}

static int open_ggml(void)
{
    void *library = dlopen("libggml-cpu.so", RTLD_NOW | RTLD_LOCAL), **(*layouts)(void *device), *symbol;
    if (!library) library = dlopen("libggml-cpu.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!(library GGML_FUNCTIONS(FOUND))) return missing("ggml");
    ggml.backend = ggml_backend_cpu_init();
    ggml.anywhere = ggml_backend_cpu_buffer_from_ptr((void *)(uintptr_t)64, SIZE_MAX / 2);
    symbol = ggml_backend_reg_get_proc_address(ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    memcpy(&layouts, &symbol, sizeof symbol);
    if (layouts) ggml.layouts = layouts(ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0));
    return ggml.backend != NULL;
}

/* A graph of one product, its weights at `data` or, with a layout of ggml's own, copied into that. NULL: the
   layout is not for these weights. */
static void *ggml_product(peer_job *j, void *layout, void *data)
{
    void *context = j->u.ggml.context, *graph, *buffer = ggml.anywhere;
    void *w = ggml_new_tensor_2d(context, j->peer->type, j->cols, j->rows);
    void *x = ggml_new_tensor_2d(context, GGML_F32, j->cols, j->n);
    void *y = ggml_mul_mat(context, w, x);
    if (layout) {
        buffer = ggml_backend_buft_alloc_buffer(layout, ggml_backend_buft_get_alloc_size(layout, w));
        data = ggml_backend_buffer_get_base(buffer);
    }
    ggml_backend_tensor_alloc(buffer, w, data);
    ggml_backend_tensor_alloc(ggml.anywhere, x, (void *)(uintptr_t)j->x);
    ggml_backend_tensor_alloc(ggml.anywhere, y, j->y);
    if (layout && !ggml_backend_supports_op(ggml.backend, y)) {
        ggml_backend_buffer_free(buffer);
        return NULL;
    }
    if (layout) {
        j->u.ggml.own = buffer;
        ggml_backend_tensor_set(w, j->weights, 0, ggml_nbytes(w));
    }
    graph = ggml_new_graph_custom(context, 4, false);
    ggml_build_forward_expand(graph, y);
    return graph;
}

/* Weights of the stream lie in the plain layout; others in the one that ggml prefers, as llama.cpp would load them. */
static int open_ggml_peer(peer_job *j)
{
    void **layout = ggml.layouts, *tensor;
    ggml_room room = {0, NULL, true};
    size_t i;
    room.bytes = (size_t)4 * MIB;
    j->u.ggml.context = ggml_init(room);
    tensor = ggml_new_tensor_2d(j->u.ggml.context, j->peer->type, j->cols, j->rows);
    j->block = ggml_nbytes(tensor);
    j->weights = memory(whole_lines(j->block));
    j->u.ggml.count = j->streamed ? stream.bytes / whole_lines(j->block) : 1;
    j->u.ggml.graphs = (void **)memory(j->u.ggml.count * sizeof(void *));
    ggml_backend_cpu_set_n_threads(ggml.backend, j->threads);
    ggml_quantize_chunk(j->peer->type, j->w, j->weights, 0, j->rows, j->cols, NULL);
    if (!j->streamed && layout)
        while (*layout && !j->u.ggml.graphs[0]) j->u.ggml.graphs[0] = ggml_product(j, *layout++, NULL);
    for (i = 0; i < j->u.ggml.count; i++) {
        uint8_t *data = j->streamed ? stream.base + i * whole_lines(j->block) : (uint8_t *)j->weights;
        if (!j->u.ggml.graphs[i]) j->u.ggml.graphs[i] = ggml_product(j, NULL, data);
    }
    return 1;
}

static void call_ggml_peer(void *arg)
{
    peer_job *j = (peer_job *)arg;
    ggml_backend_graph_compute(ggml.backend, j->u.ggml.graphs[j->u.ggml.at]);
    j->u.ggml.at = (j->u.ggml.at + 1) % j->u.ggml.count;
}

static void close_ggml_peer(peer_job *j)
{
    if (j->u.ggml.own) ggml_backend_buffer_free(j->u.ggml.own);
    ggml_free(j->u.ggml.context);
    tern_free(plain, j->u.ggml.graphs);
    tern_free(plain, j->weights);
}

static const peer peers[] = {
    {"peer sgemm", "OpenBLAS", &blas, 0, open_blas_peer, call_blas_peer, close_blas_peer},
    {"peer u8 x s8", "oneDNN", &onednn.here, 0, open_onednn_peer, call_onednn_peer, close_onednn_peer},
    {"peer Q8_0", "ggml", &ggml.here, GGML_Q8_0, open_ggml_peer, call_ggml_peer, close_ggml_peer},
    {"peer TQ1_0", "ggml", &ggml.here, GGML_TQ1_0, open_ggml_peer, call_ggml_peer, close_ggml_peer},
    {"peer TQ2_0", "ggml", &ggml.here, GGML_TQ2_0, open_ggml_peer, call_ggml_peer, close_ggml_peer},
};
enum { PEERS = sizeof peers / sizeof *peers };

/* Says so when a peer's result is further from ours than two int8 quantizers may be: the call is then wrong. */
static void check_peer(const peer_job *j, const float *ours)
{
    double apart = 0, length = 0;
    int64_t i;
    for (i = 0; i < j->n * j->rows; i++) {
        const double d = (double)j->y[i] - ours[i];
        apart += d * d;
        length += (double)ours[i] * ours[i];
    }
    if (!(apart <= 0.03 * 0.03 * length))
        fprintf(stderr, "bench: %s of %s is off by more than 3%%\n", j->peer->op, j->peer->library);
}

/* The threads of another library spin for a while when their work is done, on the cores of what is measured next. */
static void let_threads_sleep(void)
{
    const struct timespec t = {0, 50000000};
    nanosleep(&t, NULL);
}

/* One peer's row. It has no limit: it is one, of our rows. */
static void bench_peer(peer_job *j, const char *shape, const float *ours)
{
    setup s = *best;
    double rate;
    s.name = j->peer->library;
    s.threads = j->threads;
    if (!*j->peer->here || !wanted(j->peer->op, shape, s.name)) return;
    memset(&j->u, 0, sizeof j->u);
    if (!j->peer->open(j)) {
        fprintf(stderr, "bench: %s refuses %s\n", j->peer->library, shape);
        return;
    }
    if (j->streamed) stream_fill(j->weights, whole_lines(j->block));
    memset(j->y, 0, (size_t)(j->n * j->rows) * 4); /* no result of the peer before it */
    j->peer->call(j);
    check_peer(j, ours);
    rate = measure(MACS, j->peer->op, shape, &s, NONE, (double)(j->n * j->rows * j->cols), j->peer->call, j);
    j->peer->close(j);
    if (j->threads > 1) let_threads_sleep();
    if (rate > fastest_peer.rate) { fastest_peer.rate = rate; fastest_peer.name = j->peer->op; }
}

static void bench_peers(int64_t size, int64_t n, int streamed)
{
    static const struct { const char *op; tern_type encoding; } own[2] = {
        {"linear 2-bit vs peers", TERN_2BIT}, {"linear base-3 vs peers", TERN_BASE3}
    };
    const char *shape = shape_text(streamed ? "%ldx%ld N=%ld DRAM" : "%ldx%ld N=%ld", (long)size, (long)size, (long)n);
    const double macs = (double)(n * size * size);
    product p[2];
    tern_unpack_args u;
    peer_job j;
    int f, i;
    for (f = 0; f < 2; f++) p[f] = product_open(size, size, TERN_PER_ROW, own[f].encoding, n);
    product_use(&p[0], best);
    call_linear(&p[0]);
    memset(&u, 0, sizeof u);
    memset(&j, 0, sizeof j);
    u.m = p[0].a.m;
    u.count = size;
    j.trits = u.trits = (int8_t *)memory((size_t)(size * size));
    j.w = u.values = (float *)memory((size_t)(size * size) * 4);
    must(plain, tern_unpack(plain, &u));
    j.n = n;
    j.rows = j.cols = size;
    j.streamed = streamed;
    j.x = p[0].x;
    j.scales = (const float *)p[0].a.m.scales; /* of rows: in their order */
    j.y = (float *)memory((size_t)(n * size) * 4);
    for (j.threads = 1; j.threads <= THREADS; j.threads++) {
        fastest_peer.rate = 0;
        for (j.peer = peers; j.peer < peers + PEERS; j.peer++) bench_peer(&j, shape, p[0].a.y);
        for (f = 0; f < 2; f++)
            for (i = 0; i < setup_count; i++) {
                if (setups[i].isa != best->isa || setups[i].threads != j.threads) continue;
                if (streamed) stream_weights(&p[f]);
                product_use(&p[f], &setups[i]);
                measure(MACS, own[f].op, shape, &setups[i], fastest_peer.rate > 0 ? PEER : NONE, macs, call_linear, &p[f]);
            }
    }
    for (f = 0; f < 2; f++) product_close(&p[f]);
    tern_free(plain, u.trits);
    tern_free(plain, u.values);
    tern_free(plain, j.y);
}

/* -- float products of the backward and of dense layers -- */

typedef struct backward { tern_context *c; tern_matmul_dx_args dx; tern_matmul_dw_args dw; tern_dense_args dense; } backward;

static void call_dx(void *arg) { backward *b = (backward *)arg; must(b->c, tern_matmul_dx(b->c, &b->dx)); }
static void call_dw(void *arg) { backward *b = (backward *)arg; must(b->c, tern_matmul_dw(b->c, &b->dw)); }
static void call_dense(void *arg) { backward *b = (backward *)arg; must(b->c, tern_dense(b->c, &b->dense)); }

/* The same products by OpenBLAS, of float weights and activations; the leading sizes are rows and cols of w. */
static void call_blas_dx(void *arg)
{
    const backward *b = (const backward *)arg;
    const int n = (int)b->dense.m, rows = (int)b->dense.n, cols = (int)b->dense.k;
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_PLAIN, BLAS_PLAIN, n, cols, rows, 1.0f, b->dx.dy, rows, b->dense.b, cols, 0.0f, b->dx.dx, cols);
}
static void call_blas_dw(void *arg)
{
    const backward *b = (const backward *)arg;
    const int n = (int)b->dense.m, rows = (int)b->dense.n, cols = (int)b->dense.k;
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_TRANSPOSED, BLAS_PLAIN, rows, cols, n, 1.0f, b->dx.dy, rows, b->dense.a, cols, 1.0f, b->dw.dw, cols);
}
static void call_blas_dense(void *arg)
{
    const backward *b = (const backward *)arg;
    const int n = (int)b->dense.m, rows = (int)b->dense.n, cols = (int)b->dense.k;
    cblas_sgemm(BLAS_ROW_MAJOR, BLAS_PLAIN, BLAS_TRANSPOSED, n, rows, cols, 1.0f, b->dense.a, cols, b->dense.b, cols, 0.0f,
                b->dense.c, rows);
}

/* dX and dW in bf16; their limit is that of floats. */
static void bench_backward_bf16(backward *b, const setup *s, const char *shape, double macs)
{
    b->c = s->c;
    b->dx.factors = b->dw.factors = TERN_BF16;
    measure(MACS, "matmul_dx bf16", shape, s, FMA, macs, call_dx, b);
    measure(MACS, "matmul_dw bf16", shape, s, FMA, macs, call_dw, b);
    b->dx.factors = b->dw.factors = TERN_F32;
}

static int has_pairs(const setup *s) { return ((const tern__kernels *)tern_cpu_backend(s->isa)->data)->pairs != NULL; }

static void bench_backward(int64_t rows, int64_t cols, int64_t n)
{
    product p = product_open(rows, cols, TERN_PER_ROW, TERN_2BIT, n);
    float *dy = random_floats(n * rows), *w = random_floats(rows * cols), *dw = (float *)memory((size_t)(rows * cols) * 4);
    float *dx = (float *)memory((size_t)(n * cols) * 4);
    const double macs = (double)(n * rows * cols);
    char shape[32];
    backward b;
    int i;
    snprintf(shape, sizeof shape, "%ldx%ld N=%ld", (long)rows, (long)cols, (long)n);
    memset(&b, 0, sizeof b);
    b.dx.m = b.dw.m = p.a.m;
    b.dx.n = b.dw.n = n;
    b.dx.dy = b.dw.dy = dy;
    b.dx.dx = dx;
    b.dense.c = p.a.y;
    b.dw.q = p.a.q;
    b.dw.scale = p.a.scale;
    b.dw.dw = dw;
    b.dense.m = n; b.dense.n = rows; b.dense.k = cols;
    b.dense.a = p.x; b.dense.a_row = cols; b.dense.a_col = 1;
    b.dense.b = w; b.dense.b_row = 1; b.dense.b_col = cols;
    b.dense.c_row = rows;
    for (i = 0; i < setup_count; i++) {
        b.c = setups[i].c;
        measure(MACS, "matmul_dx", shape, &setups[i], FMA, macs, call_dx, &b);
        measure(MACS, "matmul_dw int8", shape, &setups[i], FMA, macs, call_dw, &b);
        if (has_pairs(&setups[i])) bench_backward_bf16(&b, &setups[i], shape, macs);
        b.dense.fused = 1;
        measure(MACS, "dense fused", shape, &setups[i], FMA, macs, call_dense, &b);
        b.dense.fused = 0;
        measure(MACS, "dense", shape, &setups[i], MULADD, macs, call_dense, &b);
    }
    for (i = 1; blas && i <= THREADS; i += THREADS - 1) {
        setup s = blas_setup;
        s.threads = i;
        openblas_set_num_threads(i);
        measure(MACS, "matmul_dx", shape, &s, FMA, macs, call_blas_dx, &b);
        measure(MACS, "matmul_dw int8", shape, &s, FMA, macs, call_blas_dw, &b);
        measure(MACS, "dense fused", shape, &s, FMA, macs, call_blas_dense, &b);
        openblas_set_num_threads(1);
        if (i > 1) let_threads_sleep();
    }
    tern_free(plain, dy);
    tern_free(plain, dx);
    tern_free(plain, w);
    tern_free(plain, dw);
    product_close(&p);
}

/* -- int8 products: dw = dy^T x of [tokens, size] matrices, and y = x w^T -- */

typedef struct int8_product { tern_context *c; tern_dense_i8_args a; } int8_product;
static void call_dense_i8(void *arg) { int8_product *p = (int8_product *)arg; must(p->c, tern_dense_i8(p->c, &p->a)); }

static void bench_int8(int64_t size)
{
    const size_t bytes = (size_t)(size * size);
    int8_t *a = (int8_t *)memory(bytes), *b = (int8_t *)memory(bytes);
    const double macs = (double)(size * size * size);
    int8_product p;
    size_t j;
    int i;
    for (j = 0; j < bytes; j++) { a[j] = (int8_t)(random24() % 256 - 128); b[j] = (int8_t)(random24() % 256 - 128); }
    memset(&p, 0, sizeof p);
    p.a.m = p.a.n = p.a.k = p.a.c_row = size;
    p.a.a = a; p.a.b = b; p.a.c = (int32_t *)memory(4 * bytes);
    for (i = 0; i < setup_count; i++) {
        p.c = setups[i].c;
        p.a.a_row = p.a.b_col = 1; p.a.a_col = p.a.b_row = size;
        measure(MACS, "dense i8 dy^T x", shape_text("%ldx%ldx%ld", (long)size, (long)size, (long)size), &setups[i], INT8, macs,
                call_dense_i8, &p);
        p.a.a_row = p.a.b_col = size; p.a.a_col = p.a.b_row = 1;
        measure(MACS, "dense i8 x w^T", shape_text("%ldx%ldx%ld", (long)size, (long)size, (long)size), &setups[i], INT8, macs,
                call_dense_i8, &p);
    }
    tern_free(plain, a);
    tern_free(plain, b);
    tern_free(plain, p.a.c);
}

/* -- attention: only the visible half of the scores counts as work -- */

typedef struct attend { tern_context *c; tern_attention_args a; } attend;
static void call_attention(void *arg) { attend *t = (attend *)arg; must(t->c, tern_attention(t->c, &t->a)); }

static void bench_attention(int64_t batch, int64_t queries, int64_t keys, int32_t heads, int32_t dim)
{
    const int64_t width = (int64_t)heads * dim;
    const double visible = (double)(queries * keys) - (double)(queries * (queries - 1)) / 2;
    const double macs = 2.0 * (double)(batch * width) * visible;
    const char *shape = shape_text("%ldx%ldx%ld h%dx%d", (long)batch, (long)queries, (long)keys, heads, dim);
    float *q = random_floats(batch * queries * width), *k = random_floats(batch * keys * width), *v = random_floats(batch * keys * width);
    float *dy = random_floats(batch * queries * width), *grad = (float *)memory((size_t)(batch * (queries + 2 * keys) * width) * 4);
    attend t;
    int i;
    memset(&t, 0, sizeof t);
    t.a.batch = batch; t.a.queries = queries; t.a.keys = keys;
    t.a.heads = t.a.kv_heads = heads;
    t.a.dim = dim;
    t.a.q = q; t.a.k = k; t.a.v = v;
    t.a.q_stride = t.a.k_stride = t.a.v_stride = width;
    t.a.y = (float *)memory((size_t)(batch * queries * width) * 4);
    t.a.p = (float *)memory((size_t)(batch * heads * queries * keys) * 4);
    t.a.dq = grad; t.a.dk = grad + batch * queries * width; t.a.dv = t.a.dk + batch * keys * width;
    for (i = 0; i < setup_count; i++) {
        t.c = setups[i].c;
        t.a.dy = NULL;
        measure(MACS, "attention", shape, &setups[i], MULADD, macs, call_attention, &t);
        t.a.dy = dy;
        if (queries > 1) measure(MACS, "attention backward", shape, &setups[i], FMA, 2 * macs, call_attention, &t);
    }
    tern_free(plain, q);
    tern_free(plain, k);
    tern_free(plain, v);
    tern_free(plain, dy);
    tern_free(plain, grad);
    tern_free(plain, t.a.y);
    tern_free(plain, t.a.p);
}

/* -- operations that move data: bytes read plus bytes written -- */

typedef struct convert {
    tern_context *c;
    tern_ternarize_args ternarize;
    tern_pack_args pack;
    tern_quantize_args quantize;
} convert;

static void call_ternarize(void *arg)
{
    convert *v = (convert *)arg;
    v->ternarize.w = stream_next(stream.block);
    must(v->c, tern_ternarize(v->c, &v->ternarize));
}
static void call_pack(void *arg) { convert *v = (convert *)arg; must(v->c, tern_pack(v->c, &v->pack)); }
static void call_quantize(void *arg) { convert *v = (convert *)arg; must(v->c, tern_quantize(v->c, &v->quantize)); }

/* Every rule, shadow and grain that takes another way. Bytes: the shadow once for each pass that must come from memory (a
   tensor's statistics, and those of TWN above its mean, need the whole tensor first), and the trits. */
static void bench_ternarize(int64_t size, const float *w)
{
    static const struct { const char *op; tern_rule rule; tern_type type; int32_t grain, passes; } rows[] = {
        {"ternarize absmean", TERN_ABSMEAN, TERN_F32, TERN_PER_ROW, 1},
        {"ternarize absmean bf16", TERN_ABSMEAN, TERN_BF16, TERN_PER_ROW, 1},
        {"ternarize absmean group", TERN_ABSMEAN, TERN_F32, 128, 1}, {"ternarize absmean bf16 group", TERN_ABSMEAN, TERN_BF16, 128, 1},
        {"ternarize absmean tensor", TERN_ABSMEAN, TERN_F32, TERN_PER_TENSOR, 2},
        {"ternarize absmean bf16 tensor", TERN_ABSMEAN, TERN_BF16, TERN_PER_TENSOR, 2},
        {"ternarize TWN", TERN_TWN, TERN_F32, TERN_PER_ROW, 1}, {"ternarize TWN bf16", TERN_TWN, TERN_BF16, TERN_PER_ROW, 1},
        {"ternarize TWN tensor", TERN_TWN, TERN_F32, TERN_PER_TENSOR, 3},
        {"ternarize TWN bf16 tensor", TERN_TWN, TERN_BF16, TERN_PER_TENSOR, 3},
        {"ternarize LSQ", TERN_LSQ, TERN_F32, TERN_PER_TENSOR, 1}, {"ternarize LSQ bf16", TERN_LSQ, TERN_BF16, TERN_PER_TENSOR, 1},
        {"ternarize SEQ", TERN_SEQ, TERN_F32, TERN_PER_ROW, 1}, {"ternarize SEQ bf16", TERN_SEQ, TERN_BF16, TERN_PER_ROW, 1}
    };
    const double weights = (double)(size * size);
    float *alpha = (float *)memory((size_t)size * sizeof(float));
    uint16_t *half = (uint16_t *)memory((size_t)(size * size) * 2);
    size_t i;
    int j;
    for (j = 0; j < (int)size; j++) alpha[j] = 0.5f;
    for (i = 0; i < (size_t)(size * size); i++) tern__store_float(TERN_BF16, half, (int64_t)i, w[i]);
    for (i = 0; i < sizeof rows / sizeof *rows; i++) {
        convert v;
        size_t trits, scales;
        const int narrow = rows[i].type == TERN_BF16;
        memset(&v, 0, sizeof v);
        v.ternarize.m.rows = v.ternarize.m.cols = size;
        v.ternarize.m.grain = rows[i].grain;
        must(plain, tern_matrix_bytes(plain, &v.ternarize.m, &trits, &scales));
        v.ternarize.m.trits = memory(trits);
        v.ternarize.m.scales = memory(scales);
        v.ternarize.rule = rows[i].rule;
        v.ternarize.type = rows[i].type;
        v.ternarize.alpha = alpha;
        v.ternarize.spare_bytes = trits + scales + (size_t)size * sizeof(float);
        v.ternarize.spare = memory(v.ternarize.spare_bytes);
        if (narrow) stream_fill(half, (size_t)(size * size) * 2);
        else stream_fill(w, (size_t)(size * size) * 4);
        for (j = 0; j < setup_count; j++) {
            v.c = setups[j].c;
            measure(BYTES, rows[i].op, shape_text("%ldx%ld", (long)size, (long)size), &setups[j], DRAM,
                    (narrow ? 2 : 4) * weights * rows[i].passes + (double)(trits + scales), call_ternarize, &v);
        }
        tern_free(plain, v.ternarize.m.trits);
        tern_free(plain, v.ternarize.m.scales);
        tern_free(plain, v.ternarize.spare);
    }
    tern_free(plain, half);
    tern_free(plain, alpha);
}

static void bench_convert(int64_t size)
{
    const int64_t n = option.quick ? 8 : 32;
    product p = product_open(size, size, TERN_PER_ROW, TERN_2BIT, n);
    float *w = random_floats(size * size);
    int8_t *trits = (int8_t *)memory((size_t)(size * size));
    const double weights = (double)(size * size), packed = (double)(p.trits + p.scales);
    char square[32], tokens[32];
    convert v;
    int64_t j;
    int i;
    memset(&v, 0, sizeof v);
    for (j = 0; j < size * size; j++) trits[j] = (int8_t)((int)(random24() % 3) - 1);
    bench_ternarize(size, w);
    snprintf(square, sizeof square, "%ldx%ld", (long)size, (long)size);
    snprintf(tokens, sizeof tokens, "%ldx%ld", (long)n, (long)size);
    v.pack.m = v.quantize.m = p.a.m;
    v.pack.trits = trits;
    v.quantize.n = n;
    v.quantize.x = p.x;
    v.quantize.eps = 1e-6f;
    v.quantize.q = (int8_t *)(uintptr_t)p.a.q;
    v.quantize.scale = (float *)(uintptr_t)p.a.scale;
    v.quantize.sum = (int32_t *)(uintptr_t)p.a.sum;
    for (i = 0; i < setup_count; i++) {
        v.c = setups[i].c;
        measure(BYTES, "pack", square, &setups[i], DRAM, weights + packed, call_pack, &v);
        v.quantize.norm = TERN_NORM_NONE;
        measure(BYTES, "quantize", tokens, &setups[i], L2, 5.0 * (double)(n * size), call_quantize, &v);
        v.quantize.norm = TERN_NORM_RMS;
        measure(BYTES, "quantize with norm", tokens, &setups[i], L2, 5.0 * (double)(n * size), call_quantize, &v);
    }
    tern_free(plain, w);
    tern_free(plain, trits);
    product_close(&p);
}

typedef struct adam { tern_context *c; tern_optimize_args a; } adam;

/* A block of the stream is weights, gradient and both moments. */
static void call_adamw(void *arg)
{
    adam *t = (adam *)arg;
    float *block = (float *)(void *)stream_next(stream.block);
    t->a.w = block;
    t->a.grad = block + t->a.count;
    t->a.moment1 = block + 2 * t->a.count;
    t->a.moment2 = block + 3 * t->a.count;
    must(t->c, tern_optimize(t->c, &t->a));
}

static void bench_adamw(int64_t count)
{
    float *block = (float *)memory((size_t)count * 16);
    adam t;
    int64_t j;
    int i;
    memset(&t, 0, sizeof t);
    for (j = 0; j < 4 * count; j++) block[j] = 0.5f + (float)random24() / 16777216.0f; /* second moments are positive */
    stream_fill(block, (size_t)count * 16);
    t.a.count = count;
    t.a.rate = 1e-3f; t.a.beta1 = 0.9f; t.a.beta2 = 0.99f; t.a.eps = 1e-8f;
    t.a.step = 1;
    for (i = 0; i < setup_count; i++) {
        t.c = setups[i].c;
        t.a.type = TERN_F32;
        measure(BYTES, "AdamW f32", shape_text("%ld weights", (long)count), &setups[i], DRAM, 32.0 * (double)count, call_adamw, &t);
        t.a.type = TERN_BF16;
        measure(BYTES, "AdamW bf16", shape_text("%ld weights", (long)count), &setups[i], DRAM, 28.0 * (double)count, call_adamw, &t);
    }
    tern_free(plain, block);
}

/* -- a training step: blocks of a transformer, BF16 shadows, AdamW; embedding and head left out -- */

enum { BLOCKS = 4, LINEARS = 4, CONTEXT = 256, HEAD = 64 };
typedef struct training {
    tern_context *c;
    int64_t n, width;
    tern_param w[BLOCKS * LINEARS], *items[BLOCKS * LINEARS];
    tern_linear layer[BLOCKS * LINEARS];
    void *saved[BLOCKS * LINEARS];
    tern_model model;
    tern_step step;
    tern_attention_args attention;
    float *x, *y, *dx; /* as wide as the widest */
} training;

static void call_forward(void *arg)
{
    training *t = (training *)arg;
    int i;
    for (i = 0; i < BLOCKS * LINEARS; i++) must(t->c, tern_linear_forward(t->c, &t->layer[i], t->n, t->x, t->y, t->saved[i]));
}
static void call_backward(void *arg)
{
    training *t = (training *)arg;
    int i;
    for (i = 0; i < BLOCKS * LINEARS; i++) must(t->c, tern_linear_backward(t->c, &t->layer[i], t->n, t->x, t->saved[i], t->y, t->dx));
}
static void call_attentions(void *arg)
{
    training *t = (training *)arg;
    tern_attention_args a = t->attention;
    int i;
    for (i = 0; i < BLOCKS; i++) {
        a.dy = NULL;
        must(t->c, tern_attention(t->c, &a));
        a.dy = t->dx;
        must(t->c, tern_attention(t->c, &a));
    }
}
static void call_elements(void *arg) /* of a block: two sums of residuals and a squared ReLU, forward and backward */
{
    training *t = (training *)arg;
    tern_map_args add, relu;
    int i;
    memset(&add, 0, sizeof add);
    add.fn = TERN_MAP_ADD;
    add.alpha = 1.0f;
    add.count = t->n * t->width;
    add.a = t->x; add.b = t->dx; add.y = t->dx;
    memset(&relu, 0, sizeof relu);
    relu.fn = TERN_MAP_RELU2;
    relu.count = 4 * t->n * t->width;
    relu.a = t->x; relu.y = t->dx;
    for (i = 0; i < BLOCKS; i++) {
        tern_map_args back = relu;
        back.dy = t->y; back.da = t->dx;
        must(t->c, tern_map(t->c, &relu));
        must(t->c, tern_map(t->c, &add)); must(t->c, tern_map(t->c, &add));
        must(t->c, tern_map(t->c, &add)); must(t->c, tern_map(t->c, &add));
        must(t->c, tern_map(t->c, &back));
    }
}
static void call_update(void *arg)
{
    training *t = (training *)arg;
    t->step.step++;
    must(t->c, tern_model_step(t->c, &t->model, &t->step));
}
static void call_step(void *arg)
{
    call_forward(arg);
    call_attentions(arg);
    call_elements(arg);
    call_backward(arg);
    call_update(arg);
}

static void bench_training(int64_t width, int64_t n)
{
    static const int64_t shapes[LINEARS][2] = {{3, 1}, {1, 1}, {4, 1}, {1, 4}}; /* q, k and v; output; up; down */
    const double weights = 12.0 * BLOCKS * (double)(width * width), macs = (double)n * weights;
    const double pairs = BLOCKS * (double)(n * (CONTEXT + 1)) * (double)width; /* multiply-adds of scores and values, the visible half */
    float *p = (float *)memory((size_t)(n / CONTEXT * (width / HEAD) * CONTEXT * CONTEXT) * 4);
    const char *shape = shape_text("%dx%ld N=%ld", BLOCKS, (long)width, (long)n);
    size_t scratch = 0;
    training *t = (training *)memory(sizeof *t);
    char name[32];
    int i;
    snprintf(name, sizeof name, "%s", shape);
    t->n = n;
    t->width = width;
    t->x = random_floats(4 * n * width);
    t->y = random_floats(4 * n * width);
    t->dx = random_floats(4 * n * width);
    for (i = 0; i < BLOCKS * LINEARS; i++) {
        tern_param *w = t->items[i] = &t->w[i];
        float *initial;
        tern_need need;
        snprintf(w->name, sizeof w->name, "w%d", i);
        w->rows = shapes[i % LINEARS][0] * width;
        w->cols = shapes[i % LINEARS][1] * width;
        w->grain = TERN_PER_ROW;
        w->buffer[TERN_SHADOW].type = TERN_BF16;
        t->layer[i].w = w;
        t->layer[i].norm = TERN_NORM_RMS;
        initial = random_floats(w->rows * w->cols);
        must(plain, tern_param_alloc(plain, w, TERN_FOR_ADAMW));
        must(plain, tern_param_set(plain, w, TERN_F32, initial));
        must(plain, tern_linear_need(plain, &t->layer[i], n, &need));
        t->saved[i] = memory(need.saved);
        if (need.scratch > scratch) scratch = need.scratch;
        tern_free(plain, initial);
    }
    t->model.items = t->items;
    t->model.count = BLOCKS * LINEARS;
    t->step.rate = 1e-3f;
    t->attention.batch = n / CONTEXT;
    t->attention.queries = t->attention.keys = CONTEXT;
    t->attention.heads = t->attention.kv_heads = (int32_t)(width / HEAD);
    t->attention.dim = HEAD;
    t->attention.q = t->x; t->attention.k = t->x + width; t->attention.v = t->x + 2 * width;
    t->attention.q_stride = t->attention.k_stride = t->attention.v_stride = 3 * width;
    t->attention.y = t->y; t->attention.p = p;
    t->attention.dq = t->y + n * width; t->attention.dk = t->attention.dq + width; t->attention.dv = t->attention.dk + width;
    for (i = 0; i < setup_count; i++) {
        const setup *s = &setups[i];
        if (s->isa != best->isa && s->isa != TERN_ISA_AVX2) continue;
        t->c = s->c;
        must(t->c, tern_reserve(t->c, scratch));
        measure(MACS, "step: forward", name, s, INT8, macs, call_forward, t);
        measure(MACS, "step: attention", name, s, FMA, 3.0 * pairs, call_attentions, t);
        measure(BYTES, "step: elements", name, s, DRAM, BLOCKS * 32.0 * 4.0 * (double)(n * width), call_elements, t);
        measure(MACS, "step: backward", name, s, FMA, 2.0 * macs, call_backward, t);
        measure(BYTES, "step: update", name, s, DRAM, weights * (2 * 2 + 2 * 8 + 2 * 4 + 4 + 2 + 0.25), call_update, t);
        measure(MACS, "step", name, s, FMA, 3.0 * (macs + pairs), call_step, t);
    }
    for (i = 0; i < BLOCKS * LINEARS; i++) {
        tern_param_free(plain, &t->w[i], TERN_FOR_ADAMW);
        tern_free(plain, t->saved[i]);
    }
    tern_free(plain, t->dx);
    tern_free(plain, t->y);
    tern_free(plain, t->x);
    tern_free(plain, p);
    tern_free(plain, t);
}

/* -- mixtures of experts -- */

/* Layers of the same shape, one after the other in the stream with all their experts and routers, as those of a model
   are met. Their trits are one expert's: how fast they are does not depend on it. */
typedef struct mixture {
    tern_context *c;
    tern_moe m;
    tern_param router, up, down;      /* of which all others are copies */
    tern_param *w;                    /* [layers][count][3], with ... */
    tern_expert *experts;             /* [layers][count] */
    tern_param *routers;              /* [layers] */
    float *x, *y, *h, *logits, *weights; /* h: gate, up and their product */
    int32_t *ids;
    int64_t n, tokens, cols, width;   /* of a call; to choose from */
    size_t expert_bytes, router_bytes;
    int layers, layer, token, expert;
} mixture;

static size_t param_bytes(const tern_param *p)
{
    size_t trits = 0, scales = 0;
    const tern_matrix m = tern_param_matrix(p);
    if (p->rule == TERN_DENSE) return (size_t)(p->rows * p->cols) * 4;
    must(plain, tern_matrix_bytes(plain, &m, &trits, &scales));
    return whole_lines(trits) + whole_lines(scales);
}

/* p with its values copied to `at`, where the next is to lie. */
static uint8_t *param_copy(const tern_param *from, uint8_t *at, tern_param *to)
{
    static const int kinds[] = {TERN_TRITS, TERN_SCALES, TERN_SHADOW};
    int i;
    *to = *from;
    for (i = from->rule == TERN_DENSE ? 2 : 0; i < (from->rule == TERN_DENSE ? 3 : 2); i++) {
        tern_buffer *b = &to->buffer[kinds[i]];
        const size_t bytes = b->count * (b->type == TERN_F32 ? 4 : 1);
        memcpy(at, b->data, bytes);
        b->data = at;
        at += whole_lines(bytes);
    }
    return at;
}

static void mixture_param(tern_param *p, int64_t rows, int64_t cols, tern_rule rule)
{
    float *w = random_floats(rows * cols);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "w");
    p->rows = rows;
    p->cols = cols;
    p->rule = rule;
    p->grain = rule == TERN_DENSE ? 0 : TERN_PER_ROW;
    must(plain, tern_param_alloc(plain, p, TERN_FOR_INFERENCE));
    must(plain, tern_param_set(plain, p, TERN_F32, w));
    tern_free(plain, w);
}

static mixture mixture_open(int32_t count, int32_t top_k, int64_t cols, int64_t width, tern_rule router, int64_t n)
{
    mixture t;
    uint8_t *at = stream.base;
    int i, j;
    memset(&t, 0, sizeof t);
    t.cols = cols;
    t.width = width;
    t.n = n;
    t.tokens = n + 255;
    mixture_param(&t.router, count, cols, router);
    mixture_param(&t.up, width, cols, TERN_ABSMEAN);
    mixture_param(&t.down, cols, width, TERN_ABSMEAN);
    t.router_bytes = param_bytes(&t.router);
    t.expert_bytes = 2 * param_bytes(&t.up) + param_bytes(&t.down);
    t.layers = (int)(stream.bytes / ((size_t)count * t.expert_bytes + t.router_bytes));
    t.w = (tern_param *)memory((size_t)(3 * count * t.layers) * sizeof *t.w);
    t.experts = (tern_expert *)memory((size_t)(count * t.layers) * sizeof *t.experts);
    t.routers = (tern_param *)memory((size_t)t.layers * sizeof *t.routers);
    for (i = 0; i < t.layers; i++) {
        for (j = i * count; j < (i + 1) * count; j++) {
            tern_param *p = t.w + 3 * j;
            at = param_copy(&t.up, at, p);
            at = param_copy(&t.up, at, p + 1);
            at = param_copy(&t.down, at, p + 2);
            t.experts[j].gate = p;
            t.experts[j].up = p + 1;
            t.experts[j].down = p + 2;
        }
        at = param_copy(&t.router, at, t.routers + i);
    }
    stream.block = 64;
    t.x = random_floats(t.tokens * cols);
    t.y = (float *)memory((size_t)(n * cols) * 4);
    t.h = (float *)memory((size_t)(3 * (n * width + cols)) * 4);
    t.logits = (float *)memory((size_t)(n * count) * 4);
    t.weights = (float *)memory((size_t)(n * top_k) * 4);
    t.ids = (int32_t *)memory((size_t)(n * top_k) * 4);
    t.m.count = count;
    t.m.top_k = top_k;
    t.m.norm = t.m.router.norm = TERN_NORM_RMS;
    return t;
}

static void mixture_close(mixture *t)
{
    void *const all[] = {t->w, t->experts, t->routers, t->x, t->y, t->h, t->logits, t->weights, t->ids};
    size_t i;
    for (i = 0; i < sizeof all / sizeof *all; i++) tern_free(plain, all[i]);
    tern_param_free(plain, &t->router, TERN_FOR_INFERENCE);
    tern_param_free(plain, &t->up, TERN_FOR_INFERENCE);
    tern_param_free(plain, &t->down, TERN_FOR_INFERENCE);
}

/* The next layer, and the tokens it gets. */
static const float *mixture_next(mixture *t)
{
    t->layer = (t->layer + 1) % t->layers;
    t->token = (t->token + 1) % 256;
    t->m.experts = t->experts + t->layer * t->m.count;
    t->m.router.w = t->routers + t->layer;
    return t->x + t->token * t->cols;
}

static void mixture_use(mixture *t, const setup *s, tern_dispatch dispatch)
{
    tern_need need;
    t->c = s->c;
    t->m.dispatch = dispatch;
    mixture_next(t);
    must(t->c, tern_moe_need(t->c, &t->m, t->n, &need));
    must(t->c, tern_reserve(t->c, need.scratch));
}

static void call_mixture(void *arg)
{
    mixture *t = (mixture *)arg;
    const float *x = mixture_next(t);
    must(t->c, tern_moe_forward(t->c, &t->m, t->n, x, t->y, NULL));
}

static void call_layer(mixture *t, tern_param *w, tern_norm_kind norm, int64_t n, const float *x, float *y)
{
    tern_linear l = TERN_ZERO;
    l.w = w;
    l.norm = norm;
    must(t->c, tern_linear_forward(t->c, &l, n, x, y, NULL));
}

static void call_element(mixture *t, tern_map_fn fn, int64_t count, float alpha, const float *a, const float *b, float *y)
{
    tern_map_args m = TERN_ZERO;
    m.fn = fn;
    m.count = count;
    m.alpha = alpha;
    m.a = a;
    m.b = b;
    m.y = y;
    must(t->c, tern_map(t->c, &m));
}

/* The same layer by layer: each token through each of its experts. */
static void call_unfused(void *arg)
{
    mixture *t = (mixture *)arg;
    const float *x = mixture_next(t);
    float *gate = t->h, *up = t->h + t->width, *out = up + t->width;
    tern_route_args route = TERN_ZERO;
    int64_t i, k;
    route.n = t->n;
    route.count = t->m.count;
    route.k = t->m.top_k;
    route.logits = t->logits;
    route.ids = t->ids;
    route.weights = t->weights;
    must(t->c, tern_linear_forward(t->c, &t->m.router, t->n, x, t->logits, NULL));
    must(t->c, tern_route(t->c, &route));
    memset(t->y, 0, (size_t)(t->n * t->cols) * 4);
    for (i = 0; i < t->n; i++)
        for (k = 0; k < t->m.top_k; k++) {
            const tern_expert *e = t->m.experts + t->ids[i * t->m.top_k + k];
            call_layer(t, e->gate, TERN_NORM_RMS, 1, x + i * t->cols, gate);
            call_layer(t, e->up, TERN_NORM_RMS, 1, x + i * t->cols, up);
            call_element(t, TERN_MAP_SILU, t->width, 0, gate, NULL, gate);
            call_element(t, TERN_MAP_MUL, t->width, 0, gate, up, gate);
            call_layer(t, e->down, TERN_NORM_NONE, 1, gate, out);
            call_element(t, TERN_MAP_ADD, t->cols, t->weights[i * t->m.top_k + k], t->y + i * t->cols, out, t->y + i * t->cols);
        }
}

/* The three products of one expert after the other, as many tokens to each as it has in the mean. */
static void call_expert(void *arg)
{
    mixture *t = (mixture *)arg;
    const int64_t mean = (t->n * t->m.top_k + t->m.count - 1) / t->m.count;
    const tern_expert *e = t->experts + t->expert;
    t->expert = (t->expert + 1) % (t->m.count * t->layers);
    call_layer(t, e->gate, TERN_NORM_NONE, mean, t->x, t->h);
    call_layer(t, e->up, TERN_NORM_NONE, mean, t->x, t->h + mean * t->width);
    call_layer(t, e->down, TERN_NORM_NONE, mean, t->h, t->y);
}

/* One token: the bytes of what it chose and of the router. More: of the products of experts alone, at the mean of their tokens. */
static void bench_mixture(int32_t count, int32_t top_k, int64_t cols, int64_t width, int64_t n)
{
    mixture t = mixture_open(count, top_k, cols, width, TERN_DENSE, n);
    const double macs = 3.0 * (double)(cols * width);
    const char *shape = shape_text("%dx%ldx%ld top-%d N=%ld", count, (long)cols, (long)width, top_k, (long)n);
    char name[48];
    int i;
    snprintf(name, sizeof name, "%s", shape);
    for (i = 0; i < setup_count; i++) {
        const setup *s = &setups[i];
        if (s->isa != best->isa && s->isa != TERN_ISA_AVX2) continue;
        mixture_use(&t, s, TERN_DISPATCH_AUTO);
        if (n == 1) {
            const double bytes = (double)(t.router_bytes + (size_t)top_k * t.expert_bytes);
            measure(BYTES, "moe", name, s, DRAM, bytes, call_mixture, &t);
            measure(BYTES, "moe unfused", name, s, DRAM, bytes, call_unfused, &t);
        } else {
            const int64_t mean = (n * top_k + count - 1) / count;
            fastest_peer.rate = measure(MACS, "experts, mean tokens", name, s, INT8, macs * (double)mean, call_expert, &t);
            fastest_peer.name = "experts";
            measure(MACS, "moe", name, s, fastest_peer.rate > 0 ? PEER : NONE, macs * (double)(n * top_k), call_mixture, &t);
            measure(MACS, "moe unfused", name, s, fastest_peer.rate > 0 ? PEER : NONE, macs * (double)(n * top_k), call_unfused, &t);
        }
    }
    mixture_close(&t);
}

/* The same selected of ever more experts, with a ternary router, which reads little of its own. */
static void bench_totals(int64_t cols, int64_t width, int64_t n)
{
    static const int32_t counts[] = {8, 32, 128, 512};
    int i;
    for (i = 0; i < 4; i++) {
        mixture t = mixture_open(counts[i], 4, cols, width, TERN_ABSMEAN, n);
        char name[48];
        snprintf(name, sizeof name, "%s", shape_text("%dx%ldx%ld top-4 N=%ld", counts[i], (long)cols, (long)width, (long)n));
        mixture_use(&t, best, TERN_DISPATCH_AUTO);
        measure(LATENCY, "moe of more experts", name, best, n == 1 ? DRAM : NONE,
                n == 1 ? (double)(t.router_bytes + 4 * t.expert_bytes) : 0, call_mixture, &t);
        mixture_close(&t);
    }
}

/* Where dense dispatch would be faster: an AUTO that is measured. */
static void bench_dispatch(int32_t count, int32_t top_k, int64_t cols, int64_t width)
{
    static const int64_t tokens[] = {1, 8, 32, 128, 512};
    int i;
    for (i = 0; i < (option.quick ? 2 : 5); i++) {
        mixture t = mixture_open(count, top_k, cols, width, TERN_DENSE, tokens[i]);
        char name[48];
        snprintf(name, sizeof name, "%s", shape_text("%dx%ldx%ld top-%d N=%ld", count, (long)cols, (long)width, top_k, (long)tokens[i]));
        mixture_use(&t, best, TERN_DISPATCH_DENSE);
        measure(LATENCY, "moe dense", name, best, NONE, 0, call_mixture, &t);
        mixture_use(&t, best, TERN_DISPATCH_SPARSE);
        measure(LATENCY, "moe sparse", name, best, NONE, 0, call_mixture, &t);
        mixture_close(&t);
    }
}

/* -- graphs: sums along the edges of a power-law graph, and whole hops -- */

typedef struct web {
    tern_context *c;
    tern_graph g;
    tern_hop hop;
    tern_param message;
    tern_aggregate_args sum;
    tern_quantize_args rows;   /* of what is summed */
    tern_map_args map;
    float *h, *sent, *y;       /* [nodes, width] */
} web;

/* Both ends of an edge are drawn so that node i has a share of i^(-2/3): of 2^20 nodes the first ends 1% of all edges. Numbers
   are scattered. hub: all edges end at node 0 and begin at the others. */
static void web_graph(web *b, int64_t nodes, int64_t edges, int hub)
{
    int32_t *from = (int32_t *)memory((size_t)edges * 4), *to = (int32_t *)memory((size_t)edges * 4);
    int8_t *sign = (int8_t *)memory((size_t)edges);
    tern_edges e;
    int64_t i;
    memset(&e, 0, sizeof e);
    for (i = 0; i < 2 * edges; i++) {
        const double u = (double)random24() / 16777216.0;
        (i % 2 ? to : from)[i / 2] = (int32_t)((uint64_t)(u * u * u * (double)nodes) * 2654435761u % (uint64_t)nodes);
    }
    for (i = 0; hub && i < edges; i++) { from[i] = (int32_t)(1 + i * 7919 % (nodes - 1)); to[i] = 0; }
    for (i = 0; i < edges; i++) sign[i] = random24() % 4 ? 1 : -1;
    e.nodes = nodes; e.count = edges;
    e.from = from; e.to = to; e.sign = sign;
    must(plain, tern_graph_build(plain, &e, &b->g));
    tern_free(plain, from);
    tern_free(plain, to);
    tern_free(plain, sign);
}

static void web_features(web *b, int64_t width)
{
    const int64_t n = b->g.nodes;
    int64_t groups;
    memset(&b->rows, 0, sizeof b->rows);
    memset(&b->sum, 0, sizeof b->sum);
    b->h = random_floats(n * width);
    b->sent = (float *)memory((size_t)(n * width) * 4);
    b->y = (float *)memory((size_t)(n * width) * 4);
    b->sum.edges = b->g.in;
    b->sum.cols = width;
    b->sum.left = b->g.to;
    b->sum.right = b->g.from;
    b->sum.part = (float *)memory((size_t)(b->g.in.parts * width) * 4 + 4);
    b->rows.m.rows = 1;
    b->rows.m.cols = width;
    must(plain, tern_activation_shape(plain, &b->rows.m, &b->sum.q_row, &groups));
    b->rows.n = n;
    b->rows.q = (int8_t *)memory((size_t)(n * b->sum.q_row));
    b->rows.scale = (float *)memory((size_t)n * 4);
    b->rows.sum = (int32_t *)memory((size_t)n * 4);
    b->sum.scale = b->rows.scale;
}

static void web_forget(web *b)
{
    tern_free(plain, b->h);
    tern_free(plain, b->sent);
    tern_free(plain, b->y);
    tern_free(plain, b->sum.part);
    tern_free(plain, b->rows.q);
    tern_free(plain, b->rows.scale);
    tern_free(plain, b->rows.sum);
}

/* y = the sums of the rows of x, quantized first or as they are. */
static void web_sum(web *b, const float *x, float *y)
{
    b->rows.x = b->sum.x = x;
    b->sum.q = b->hop.act == TERN_ACT_INT8 ? b->rows.q : NULL;
    b->sum.y = y;
    if (b->sum.q) must(b->c, tern_quantize(b->c, &b->rows));
    must(b->c, tern_aggregate(b->c, &b->sum));
}

static void call_aggregate(void *arg) { web *b = (web *)arg; must(b->c, tern_aggregate(b->c, &b->sum)); }
static void call_hop(void *arg) { web *b = (web *)arg; must(b->c, tern_hop_forward(b->c, &b->hop, &b->g, b->h, b->y, NULL)); }
static void call_hop_parts(void *arg)
{
    web *b = (web *)arg;
    const int first = b->hop.order == TERN_PROJECT_FIRST;
    if (first) must(b->c, tern_linear_forward(b->c, &b->hop.message, b->g.nodes, b->h, b->sent, NULL));
    web_sum(b, first ? b->sent : b->h, b->y);
    if (!first) must(b->c, tern_linear_forward(b->c, &b->hop.message, b->g.nodes, b->y, b->sent, NULL));
    b->map.a = first ? b->y : b->sent;
    must(b->c, tern_map(b->c, &b->map));
}

/* The best tier with one and with two threads, in contexts of its own: scratch of a million nodes is given back. */
static setup web_open(web *b, int threads)
{
    tern_context_desc d = TERN_ZERO;
    setup s = *best;
    if (threads > 1) d.parallel = workers;
    s.threads = threads;
    must(NULL, tern_open(&s.c, &d, NULL));
    b->c = s.c;
    return s;
}

/* A row for the time of the last one, counted otherwise. */
static void measured_as(metric m, const char *op, const setup *s, limit l, double work)
{
    const result last = results[result_count - 1];
    print_row(m, op, last.shape, s, l, work, last.time, l == NONE ? 0 : 1e-9 * last.work / last.time / last.fraction);
}

static void bench_sums(web *b, const char *shape)
{
    static const char *const names[2][3] = {{"aggregate float", "aggregate float, unique", "aggregate float, edges"},
                                            {"aggregate int8", "aggregate int8, unique", "aggregate int8, edges"}};
    const double edges = (double)b->g.edges, nodes = (double)b->g.nodes, cols = (double)b->sum.cols;
    int i;
    b->rows.x = b->sum.x = b->h;
    b->sum.y = b->y;
    must(plain, tern_quantize(plain, &b->rows));
    for (i = 0; i < 4; i++) {
        const int narrow = i / 2;
        const double row = narrow ? cols : 4 * cols, rest = 4 * edges + 4 * nodes * cols;
        setup s = web_open(b, 1 + i % 2);
        b->sum.q = narrow ? b->rows.q : NULL;
        if (measure(BYTES, names[narrow][0], shape, &s, DRAM, edges * row + rest, call_aggregate, b) > 0) {
            measured_as(BYTES, names[narrow][1], &s, DRAM, nodes * row + rest);
            measured_as(EDGES, names[narrow][2], &s, NONE, edges);
        }
        tern_close(s.c);
    }
}

static void bench_hop(web *b, const char *shape, tern_act act, tern_hop_order order)
{
    static const char *const names[2][2][2] = {{{"hop int8 project first", "  its layers"}, {"hop int8 sum first", "  its layers"}},
                                               {{"hop float project first", "  its layers"}, {"hop float sum first", "  its layers"}}};
    int i;
    b->hop.act = act;
    b->hop.order = order;
    for (i = 0; i < 4; i++) {
        const int apart = i % 2;
        setup s = web_open(b, 1 + i / 2);
        tern_need need;
        if (apart) must(s.c, tern_linear_need(s.c, &b->hop.message, b->g.nodes, &need));
        else must(s.c, tern_hop_need(s.c, &b->hop, &b->g, &need));
        must(s.c, tern_reserve(s.c, need.scratch));
        measure(EDGES, names[act][order][apart], shape, &s, NONE, (double)b->g.edges, apart ? call_hop_parts : call_hop, b);
        tern_close(s.c);
    }
}

/* A hop of ternary weights with int8 activations, symmetric and with a ReLU. */
static void web_hop(web *b, int64_t width)
{
    float *w = random_floats(width * width);
    memset(&b->hop, 0, sizeof b->hop);
    memset(&b->message, 0, sizeof b->message);
    snprintf(b->message.name, sizeof b->message.name, "message");
    b->message.rows = b->message.cols = width;
    b->message.grain = TERN_PER_ROW;
    must(plain, tern_param_alloc(plain, &b->message, TERN_FOR_INFERENCE));
    must(plain, tern_param_set(plain, &b->message, TERN_F32, w));
    tern_free(plain, w);
    b->hop.message.w = &b->message;
    b->hop.norm = TERN_GRAPH_SYMMETRIC;
    b->hop.fn = TERN_MAP_RELU;
    b->map.fn = TERN_MAP_RELU;
    b->map.count = b->g.nodes * width;
    b->map.y = b->sent;
}

/* hops: 0 sums alone, 1 one kind of hop, 2 all kinds. */
static void bench_graph(int64_t nodes, int64_t edges, int64_t width, int hub, int hops)
{
    char shape[32];
    web b;
    snprintf(shape, sizeof shape, "%s %.4gM D=%ld", hub ? "hub" : "graph", 1e-6 * (double)edges, (long)width);
    if (!wanted("aggregate float, aggregate int8, hop int8, hop float, its layers", shape, best->name)) return;
    memset(&b, 0, sizeof b);
    web_graph(&b, nodes, edges, hub);
    web_features(&b, width);
    web_hop(&b, width);
    if (hops != 1) bench_sums(&b, shape);
    if (hops) bench_hop(&b, shape, TERN_ACT_INT8, TERN_AGGREGATE_FIRST);
    if (hops == 2) {
        bench_hop(&b, shape, TERN_ACT_INT8, TERN_PROJECT_FIRST);
        bench_hop(&b, shape, TERN_ACT_FLOAT, TERN_AGGREGATE_FIRST);
        bench_hop(&b, shape, TERN_ACT_FLOAT, TERN_PROJECT_FIRST);
    }
    tern_param_free(plain, &b.message, -1);
    web_forget(&b);
    tern_graph_free(plain, &b.g);
}

/* -- small operations: what a call costs -- */

typedef struct small { tern_context *c; tern_map_args map; tern_norm_args norm; } small;
static void call_map(void *arg) { small *t = (small *)arg; must(t->c, tern_map(t->c, &t->map)); }
static void call_norm(void *arg) { small *t = (small *)arg; must(t->c, tern_norm(t->c, &t->norm)); }
static void nothing(void *arg, int32_t i) { (void)arg; (void)i; }
static void call_pool(void *arg) { (void)arg; workers.run(workers.user, nothing, NULL, THREADS); }

static void bench_small(int64_t size)
{
    product p = product_open(size, size, TERN_PER_ROW, TERN_2BIT, 1);
    float *x = random_floats(size), *y = (float *)memory((size_t)size * 4);
    char vector[32], square[32];
    small t;
    int i;
    memset(&t, 0, sizeof t);
    snprintf(vector, sizeof vector, "%ld", (long)size);
    snprintf(square, sizeof square, "%ldx%ld N=1", (long)size, (long)size);
    t.map.fn = TERN_MAP_ADD;
    t.map.count = size;
    t.map.alpha = 1.0f;
    t.map.a = t.map.b = x;
    t.map.y = y;
    t.norm.n = 1;
    t.norm.cols = size;
    t.norm.x = x;
    t.norm.eps = 1e-6f;
    t.norm.y = y;
    for (i = 0; i < setup_count; i++) {
        t.c = setups[i].c;
        product_use(&p, &setups[i]);
        measure(LATENCY, "add", vector, &setups[i], L1, 12.0 * (double)size, call_map, &t);
        measure(LATENCY, "RMSNorm", vector, &setups[i], L1, 8.0 * (double)size, call_norm, &t);
        measure(LATENCY, "matmul 2-bit row", square, &setups[i], L1, (double)(p.trits + p.scales), call_matmul, &p);
        measure(LATENCY, "linear 2-bit row", square, &setups[i], L1, (double)(p.trits + p.scales), call_linear, &p);
    }
    for (i = 0; i < setup_count; i++)
        if (setups[i].isa == best->isa && setups[i].threads == THREADS)
            measure(LATENCY, "pool wake-up", "2 empty tasks", &setups[i], NONE, 0, call_pool, NULL);
    tern_free(plain, x);
    tern_free(plain, y);
    product_close(&p);
}

/* -- what was aimed at, and what came out -- */

static const result *find_result(const char *op, const char *place, const char *tier)
{
    const size_t length = strlen(place);
    int i;
    for (i = 0; i < result_count; i++) {
        const result *r = &results[i];
        const size_t whole = strlen(r->shape); /* the place is how the shape ends */
        if (strcmp(r->op, op) == 0 && whole >= length && strcmp(r->shape + whole - length, place) == 0 && strcmp(r->tier, tier) == 0
            && r->threads == 1)
            return r;
    }
    return NULL;
}

static void print_target(const char *text, double aim, double reached)
{
    printf("  %-66s %4.0f%%   reached %5.1f%%  %s\n", text, 100 * aim, 100 * reached, reached >= aim ? "yes" : "NO");
}

static void target(const char *text, const char *op, const char *place, const char *tier, double aim)
{
    const result *r = find_result(op, place, tier);
    if (r) print_target(text, aim, r->fraction);
    else printf("  %-66s %4.0f%%   not measured\n", text, 100 * aim);
}

/* How much of a rate is left in another format: the first one's time over the second's, same shape and tier. */
static void target_ratio(const char *text, const char *whole, const char *part, const char *place, const char *tier, double aim)
{
    const result *a = find_result(whole, place, tier), *b = find_result(part, place, tier);
    if (a && b) print_target(text, aim, a->time / b->time);
    else printf("  %-66s %4.0f%%   not measured\n", text, 100 * aim);
}

/* What the other parts of a whole take of its time. */
static void target_share(const char *text, const char *part, const char *whole, const char *tier, double aim)
{
    const result *a = find_result(part, "", tier), *b = find_result(whole, "", tier);
    if (a && b) print_target(text, aim, 1 - a->time / b->time);
    else printf("  %-66s %4.0f%%   not measured\n", text, 100 * aim);
}

/* The best tier's rate over OpenBLAS's for the same product, and for that of its floats. */
static void target_peer(const char *text, const char *op, const char *place)
{
    const result *ours = find_result(op, place, best->name), *theirs = find_result(op, place, "OpenBLAS");
    if (ours && theirs) print_target(text, 0.95, theirs->time / ours->time);
    else printf("  %-66s %4.0f%%   not measured\n", text, 95.0);
}
static void target_peer_bf16(const char *text, const char *op, const char *floats, const char *place)
{
    const result *ours = find_result(op, place, best->name), *theirs = find_result(floats, place, "OpenBLAS");
    const double aim = best->isa == TERN_ISA_AMX_INT8 ? 3.5 : 1.6; /* AVX-512 multiplies bf16 twice as fast as floats */
    if (ours && theirs) print_target(text, aim, theirs->time / ours->time);
    else printf("  %-66s %4.0f%%   %s\n", text, 100.0 * aim, has_pairs(best) ? "not measured" : "no products of bf16 here");
}

static void targets_table(void)
{
    printf("\nTargets, one thread%s\n",
           option.quick ? " (a quick run: its working sets fit a cache, so these say nothing about memory)" : "");
    target("2-bit x 1 token from DRAM, avx512-vnni, of DRAM read", "matmul 2-bit row", "DRAM", "avx512-vnni", 0.95);
    target("2-bit x 1 token from DRAM, avx2, of DRAM read", "matmul 2-bit row", "DRAM", "avx2", 0.80);
    target("base-3 x 1 token from DRAM, best tier, of DRAM read", "matmul base-3 row", "DRAM", best->name, 0.92);
    target_ratio("base-3 x 1 token from DRAM, best tier, trits of 2-bit", "matmul 2-bit row", "matmul base-3 row", "DRAM",
                 best->name, 1.15);
    target("2-bit x 1 token from L2, avx512-vnni, of vpdpbusd", "matmul 2-bit row", "L2", "avx512-vnni", 0.45);
    target("2-bit x 4 tokens, amx-int8, of tdpbsud", "matmul 2-bit row", "N=4", "amx-int8", 0.15);
    target("2-bit x 8 tokens, amx-int8, of tdpbsud", "matmul 2-bit row", "N=8", "amx-int8", 0.28);
    target("2-bit x 16 tokens, amx-int8, of tdpbsud", "matmul 2-bit row", "N=16", "amx-int8", 0.42);
    target("2-bit x 128 tokens with quantizer, amx-int8, of tdpbsud", "linear 2-bit row", "2560x2560 N=128", "amx-int8", 0.62);
    target("the same, 14336x4096", "linear 2-bit row", "14336x4096 N=128", "amx-int8", 0.70);
    target("2-bit x 512 tokens with quantizer, amx-int8, of tdpbsud", "linear 2-bit row", "2560x2560 N=512", "amx-int8", 0.65);
    target("the same, 14336x4096", "linear 2-bit row", "14336x4096 N=512", "amx-int8", 0.75);
    target("2-bit x 64 tokens, avx512-vnni, of vpdpbusd", "matmul 2-bit row", "N=64", "avx512-vnni", 0.90);
    target("2-bit x 512 tokens, avx512-vnni, of vpdpbusd", "matmul 2-bit row", "N=512", "avx512-vnni", 0.90);
    target("2-bit x 64 tokens, avx2, of maddubs+add", "matmul 2-bit row", "N=64", "avx2", 0.85);
    target_ratio("2-bit groups of 128 from DRAM, avx512-vnni, rate of rows", "matmul 2-bit row", "matmul 2-bit group 128", "DRAM",
                 "avx512-vnni", 0.92);
    target_ratio("2-bit groups of 128 from L2, avx512-vnni, rate of rows", "matmul 2-bit row", "matmul 2-bit group 128", "L2",
                 "avx512-vnni", 0.85);
    target_ratio("the same in the log lattice, from DRAM", "matmul 2-bit row", "matmul 2-bit log group 128", "DRAM", "avx512-vnni", 0.92);
    target_ratio("the same in the log lattice, from L2", "matmul 2-bit row", "matmul 2-bit log group 128", "L2", "avx512-vnni", 0.85);
    target_ratio("2-bit groups of 128 x 64 tokens, avx512-vnni, rate of rows", "matmul 2-bit row", "matmul 2-bit group 128", "N=64",
                 "avx512-vnni", 0.85);
    target("ternarize and pack by tensor, all bytes read, of DRAM read", "ternarize absmean tensor", "", best->name, 0.60);
    target("the same of bf16 shadows", "ternarize absmean bf16 tensor", "", best->name, 0.60);
    target("ternarize and pack by row, of DRAM read", "ternarize absmean", "", best->name, 0.60);
    target("the same of bf16 shadows", "ternarize absmean bf16", "", best->name, 0.60);
    target_share("training step but for its update (optimizer, ternarize, pack)", "step: update", "step", best->name, 0.90);
    target_peer("dX of 2560x2560 x 2048 tokens, best tier, of OpenBLAS", "matmul_dx", "2560x2560 N=2048");
    target_peer("dW of the same, int8 activations", "matmul_dw int8", "2560x2560 N=2048");
    target_peer("dX of 4096x14336 x 512 tokens", "matmul_dx", "4096x14336 N=512");
    target_peer("dW of the same", "matmul_dw int8", "4096x14336 N=512");
    target_peer_bf16("dX of 2560x2560 x 2048 tokens in bf16, of OpenBLAS in float", "matmul_dx bf16", "matmul_dx", "2560x2560 N=2048");
    target_peer_bf16("dW of the same", "matmul_dw bf16", "matmul_dw int8", "2560x2560 N=2048");
}

static void legend(void)
{
    printf("ternary.h benchmark%s: best of at least %d repetitions; each limit measured in turn with its row.\n"
           "One thread is timed by its own clock; two by the wall's, so that other programs count against them.\n"
           "  GB/s     1e9 bytes a second: packed weights and scales of a matrix from DRAM; elsewhere all bytes read and written\n"
           "  GMAC/s   1e9 multiply-adds a second, one for each weight and token; attention: of the visible pairs\n"
           "  us       microseconds a call; the limit is the time its bytes take from L1\n"
           "  Me/s     1e6 edges a second\n"
           "  group    scales in f16 (log: in the log lattice), one for each 128 inputs of a row; row: one f32 scale for each row\n"
           "  matmul   activations quantized beforehand; linear: the whole layer, with its int8 quantizer; float act: float activations\n"
           "  DRAM     weights rotate through %lu MiB; L2, L1: the best read loop found over 1 MiB, 16 KiB\n"
           "  graph    edges and columns of a power-law graph; bytes: the rows of all edges (unique: each row once), the edges, the sums\n"
           "  hub      a node where all edges end; layers: a hop's layers one after the other, each over all nodes\n"
           "  N        tokens; thr: threads; xN: float lanes; h4x64: heads of 64\n",
           option.quick ? ", quick run" : "", option.quick ? 2 : 5, (unsigned long)(stream.bytes / MIB));
    if (blas)
        printf("  OpenBLAS with its kernels for %s (OPENBLAS_CORETYPE chooses), one thread; "
               "among the peers and the float products also two\n", openblas_get_corename());
}

static int usage(void)
{
    fprintf(stderr, "usage: bench [--csv] [--quick] [--filter text]\n");
    return 2;
}

int main(int argc, char **argv)
{
    static const int64_t sgemm_tokens[] = {1, 8, 128, 512}, mixture_tokens[] = {1, 8, 64, 512}, fewer_edges[] = {1000000, 2500000, 5000000};
    static const int64_t layers[][3] = { /* rows, cols, tokens */
        {1024, 1024, 512}, {768, 768, 768}, {2560, 2560, 2048}, {4096, 14336, 512}, {128, 512, 768}};
    const int64_t big[2] = {4096, 1024}, hot_rows[2] = {2560, 1024}, hot_cols[2] = {1600, 640}, batch[2] = {2560, 320};
    const int64_t peer_size[2] = {2560, 256}; /* ggml's blocks are of 256 */
    int i, q;
    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--csv") == 0) option.csv = 1;
        else if (strcmp(argv[i], "--quick") == 0) option.quick = 1;
        else if (strcmp(argv[i], "--filter") == 0 && i + 1 < argc) option.filter = argv[++i];
        else return usage();
    }
    q = option.quick;
    open_setups();
    blas = open_blas();
    onednn.here = open_onednn();
    ggml.here = open_ggml();
    stream.bytes = (size_t)(q ? 64 : 1280) * MIB;
    stream.base = (uint8_t *)memory(stream.bytes);
    stream.block = 64;
    memset(stream.base, 1, stream.bytes);
    find_ways();

    if (option.csv) printf("op,shape,tier,threads,metric,value,limit,fraction\n");
    else legend();
    limits_table();
    title("Matrix x vector, weights from DRAM");
    bench_vector(big[q], big[q], 1);
    bench_blas(1, big[q], big[q], 1);
    title("Matrix x vector, weights from L2");
    bench_vector(hot_rows[q], hot_cols[q], 0);
    title("Matrix x tokens");
    bench_batch(batch[q]);
    if (!q) bench_tokens(14336, 4096, TERN_2BIT, TERN_PER_ROW, 128, best->isa);
    if (!q) bench_tokens(14336, 4096, TERN_2BIT, TERN_PER_ROW, 512, best->isa);
    title("Kinds of activations");
    for (i = 0; i < 6; i++) bench_kinds(batch[q], i < 3 ? TERN_2BIT : TERN_BASE3, sgemm_tokens[i % 3]);
    title("Steps from one number of tokens to the next");
    bench_steps(batch[q] / 2);
    for (i = 0; i < 4; i++) bench_blas(sgemm_tokens[i], batch[q], batch[q], 0);
    if (blas || onednn.here || ggml.here) {
        title("Peers: a whole layer, its input quantized in the call; the limit of our rows is the fastest peer");
        bench_peers(big[q], 1, 1);
        for (i = 0; i < 4; i++) bench_peers(peer_size[q], sgemm_tokens[i], 0);
    }
    title("Float products: the backward and dense layers");
    for (i = 0; i < (q ? 1 : 5); i++) bench_backward(q ? 256 : layers[i][0], q ? 256 : layers[i][1], q ? 64 : layers[i][2]);
    if (!option.csv && !has_pairs(best)) printf("  dX / dW in bf16: no products of bf16 here\n");
    title("Int8 products");
    bench_int8(q ? 256 : 1024);
    title("Attention");
    bench_attention(q ? 1 : 4, q ? 64 : 256, q ? 64 : 256, 4, 64);
    bench_attention(1, 1, q ? 256 : 1024, 4, 64);
    title("Moving data");
    bench_convert(q ? 512 : 2048);
    bench_adamw(q ? 1 << 16 : 1 << 20);
    title("A training step");
    bench_training(q ? 128 : 512, q ? 256 : 4096);
    title("Mixture of experts");
    for (i = 0; i < 4; i++) bench_mixture(q ? 8 : 32, 4, q ? 256 : 1024, q ? 128 : 512, mixture_tokens[i]);
    for (i = 0; i < (q ? 0 : 4); i++) bench_mixture(128, 8, 2048, 768, mixture_tokens[i]);
    for (i = 0; i < 2; i++) bench_totals(q ? 128 : 1024, q ? 64 : 512, i ? 64 : 1);
    bench_dispatch(q ? 8 : 32, 4, q ? 256 : 1024, q ? 128 : 512);
    title("Graphs: 2^20 nodes");
    for (i = 0; i < (q ? 1 : 2); i++) bench_graph(q ? 1 << 12 : 1 << 20, q ? 40000 : 10000000, i ? 256 : 64, 0, 2);
    for (i = 0; i < (q ? 0 : 3); i++) bench_graph(1 << 20, fewer_edges[i], 64, 0, 1);
    for (i = 0; i < 2; i++) bench_graph(q ? 1 << 12 : 1 << 20, q ? 4000 : 100000, i ? 256 : 64, 1, 0);
    title("Small operations");
    bench_small(128);
    if (!option.csv) targets_table();
    return 0;
}
