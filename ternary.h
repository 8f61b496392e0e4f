/*
ternary.h - neural networks whose weights are -1, 0 or +1, in one C file

    #define TERNARY_IMPLEMENTATION      in exactly one .c or .cpp file
    #include "ternary.h"

    cc -O2 program.c -pthread           C99 or C++11, nothing else to link

It turns float matrices into trits and scales, packs them into 2 or 1.6 bits per weight, runs them with
kernels chosen for the CPU at run time, and trains them (straight-through estimator with shadow weights, or
trits by integers that last instead of floats).
Inference gives the same bits on every CPU, with any number of threads and any batch. ternary_cuda.cu beside
this file runs most of it on a GPU, with those bits too.

CONTENTS (search for the tag)

    Manual
    [TERN-1]  Configuration
    [TERN-2]  Types
    [TERN-3]  API
    [TERN-4]  Platform: compiler, CPU detection, threads
    [TERN-5]  Memory, checked arithmetic, errors
    [TERN-6]  Numbers: f16 and bf16, Philox, canonical sums, elementary functions
    [TERN-7]  Ternarize: scales and thresholds
    [TERN-8]  Pack
    [TERN-9]  Activations
    [TERN-10] Kernels, scalar: the specification
    [TERN-11] Kernels, x86
    [TERN-14] Backends: the function table, one instance per tier, selection
    [TERN-15] Parameters and BitLinear
    [TERN-16] Embedding
    [TERN-17] Mixture of experts
    [TERN-18] Graph
    [TERN-19] Optimizers and shadow weights
    [TERN-20] True-ternary training
    [TERN-21] Model files
    [TERN-22] Self-test

    A room calls only rooms before it. Rooms that are not here yet (Arm, WebAssembly) keep their numbers free.

QUICK START

    tern_context *c;
    tern_param w = TERN_ZERO;
    tern_linear layer = TERN_ZERO;
    tern_need need;

    tern_open(&c, NULL, NULL);
    w.rows = 512; w.cols = 1024; w.grain = TERN_PER_ROW;      a [512, 1024] matrix, one scale per row
    tern_param_alloc(c, &w, TERN_FOR_INFERENCE);
    tern_param_set(c, &w, TERN_F32, floats);                  ternarize and pack
    layer.w = &w;
    tern_linear_need(c, &layer, 1, &need);
    tern_reserve(c, need.scratch);
    tern_linear_forward(c, &layer, 1, x, y, NULL);            x [1, 1024] -> y [1, 512]

    Every call but the frees returns a tern_result, 0 on success; tern_last_error(c)->text says what was
    wrong, with the numbers. To train, allocate TERN_FOR_ADAMW, call tern_linear_forward with `saved`,
    tern_linear_backward and tern_model_step; tern_param_free(c, &w, TERN_FOR_TRAINING) freezes.

ONE WAY THROUGH

    float weights --ternarize--> trits + scales --pack--> panels --+
    float input --(norm)--quantize--> int8 + scale ----------------+--matmul--> int32 --scales, bias--> output
                                      (or int4, or bits)
    training: shadow --ternarize, pack--> the same forward --> dy --> dx, dw --> optimizer --> shadow
    without floats that last: the same forward --> dy --> int8 --> exact dx, dw --> accumulator --> trits

    Layers are compositions of the operations in [TERN-3], and hold no data: a tern_linear is a handful of
    pointers to parameters. What a parameter is follows from the buffers it has.

MIXTURE OF EXPERTS

    A tern_moe is a router, experts (two or three parameters each) and top_k. Small batches may run every
    expert over all tokens, large ones each expert over its own: tern_dispatch, with the same bits. Parameters with
    the same `sync` share one scale. tern_moe_from_dense takes a float mixture in one call.

TRUE-TERNARY TRAINING

    A parameter with TERN_ACCUM (allocate TERN_FOR_FLIPS) has trits, scales that stay, and one int8 for each weight:
    1.2 bytes per weight in base 3. TERN_POW2 and TERN_LOG scales can learn, too, with TERN_VOTES and step.scale_step.
    Set it with normal deviates of 1/sqrt(cols) and rule TERN_ABSMEAN, and give
        layer.seed = (uint64_t)step << 32 | number of the layer;    its backward rounds dy stochastically to int8
        step.push = 3 falling to 0 by TERN_LINEAR;                  for theta 32; push / theta of 0.06 to 0.12 is good
    All else is as with a shadow: gradients add up over micro-batches, tied weights and embeddings, dense gains and
    biases go by the optimizer. With attention.exact and no dense matrix every gradient is then the same bits on
    every tier, thread count, compiler and machine, and so is the trained file. Floats that last remain in dense gains
    and biases (values and moments) and in F32 and F16 scales; transient ones in norms, softmax, loss, activations and
    their scales, gradients between layers and the sums in TERN_GRAD. tern_model_strict proves that nothing trainable is
    a float; tern_model_list tells all. tern_matmul_fixed is a linear layer's product without any: int8 in, fixed point out.
    TERN_FLIP_SIGN is the plain sign rule, for comparison; tern_sign_step scales its step by the loss.

GRAPHS

    tern_graph_build makes a graph of an edge list, or of rows of edges, whose edges count +1, 0 or -1. A tern_hop sends
    messages along it: what nodes send is projected once for each node, or once for each sum, never for an edge. To train
    several hops is several calls; with the same parameters their gradients add up. A two-hop classifier of nodes:
        tern_graph_build(c, &edges, &graph);          edges: nodes, count, from, to, both_ways, loops
        hop[i].message.w = &w[i]; hop[i].norm = TERN_GRAPH_SYMMETRIC; hop[0].fn = TERN_MAP_RELU;
        tern_hop_forward(c, &hop[0], &graph, x, h, saved[0]);          and so on, and tern_hop_backward from the last
        tern_hops_forward(c, hop, 2, &graph, x, logits);               for inference; a small graph's are one launch on a GPU
    tern_ngram (rows of a table named by the last tokens) and tern_vq (the nearest row of a codebook) go before or between.

WHAT IT DOES NOT DO

    No autograd: a layer's backward is a call beside its forward. No tokenizers, no data loading. No lazy
    global state, no hidden threads, no printing, no abort. No Arm or WebAssembly kernels yet (the scalar
    tier runs anywhere), and of GPUs CUDA alone. MSVC (untested): no SIMD tiers, no thread pool.

OPTIONS (define before the implementation; public layouts never depend on them)

    TERNARY_STATIC            everything static: several copies in one program
    TERNARY_MALLOC, _FREE     the default allocator, both or neither
    TERNARY_ASSERT(x)         checks of the library's own invariants (default: none)
    TERNARY_NO_STDIO          no FILE functions, no getenv
    TERNARY_NO_THREADS        no thread pool
    TERNARY_NO_SIMD           the scalar tier alone; TERNARY_NO_SSE41, _NO_AVX2, _NO_AVX_VNNI, _NO_AVX512_VNNI,
                              _NO_AVX512_VBMI, _NO_AMX_INT8 leave out one tier each (the last three: and those behind it)
    TERNARY_NO_TRAINING       no backward, optimizers, schedules or true-ternary updates
    TERNARY_NO_MOE            no mixture of experts
    TERNARY_NO_GRAPH          no graphs, memory of n-grams or vector quantization
    TERNARY_NO_FILES          no model files
    TERNARY_USE_CBLAS         float products of training (matmul_dx, matmul_dw, dense with fused) by the cblas_sgemm that you
                              link (32-bit int; cblas.h not in this file). Their bits then depend on that library, and on
                              its threads where it says so: it brings its own, and the context's do not take part
    TERNARY_ACCEPT_FAST_MATH  compile under fast-math, without the promise of equal bits

MEMORY

    Buffers come from the context's allocator or are yours (set tern_buffer.data and count); tern_reserve is
    the only call that grows scratch, so a forward or training step never allocates. tern_LAYER_need tells
    both sizes: `saved`, the caller's, between forward and backward, and scratch. On the CPU tern_open takes
    1.6 MB (without SIMD 0.1) for each of parallel.workers, which the first float product touches. Kernels use
    up to 120 KB of stack (300 KB in a build without optimization). The default allocator is malloc; on Linux it
    advises huge pages for blocks of 4 MB and more.

THREADS

    A context belongs to one thread at a time; contexts are independent. Work spreads over
    tern_parallel.run, yours or a tern_pool's; without one everything runs on the calling thread. Results
    never depend on the number of workers.

CUDA

    ternary_cuda.cu, compiled by nvcc, is a second table: a context opened with desc.backend =
    tern_cuda_backend(0) has its memory and its operations on that device (compute capability 7.5 or above).
    Data pointers are then the device's, from tern_alloc or tern_param_alloc, and tern_copy, tern_param_give and
    tern_model_load fill them. Calls queue their work and return. Files are the same as the CPU's.

PERMISSION FOR AMX

    On x86-64 Linux a process must ask the kernel before it may use AMX. tern_open and tern_cpu_backend ask
    when the best tier or amx-int8 is wanted, and do without the tier where they are refused. The permission
    holds for the whole process for good: frames of signals then take about 11 KB, so that alternate signal
    stacks must be larger, and one that is too small is a reason to be refused. A lower isa_max, a lower
    TERNARY_ISA and TERNARY_NO_AMX_INT8 never ask. On other systems there is no such tier.

ERRORS

    Argument errors come back at once and nothing is written. Data faults (NaN in an activation row, a token
    id out of range) leave a zero row and are reported by the next tern_sync: one-pass kernels and queued
    devices cannot know earlier. Weights that are not finite are refused with their index.
    On a GPU what only the data can tell (weights, scales, trits, codes, elements of a finite cast) comes with
    the next tern_sync too, under the CPU's code, and was taken as zero. Sizes beyond the device version are
    TERN_E_UNSUPPORTED at once. What fails while it runs is TERN_E_DEVICE from the next call that waits.

NUMERICS AND DETERMINISM

    int8 dot products are exact in int32 (inputs per row <= 262144; tern_dense_i8: <= 131071). Float sums follow one rule: up to 1024
    terms in 64 lanes, then pairwise; more in blocks of 1024. Float dot products run in order, in segments of
    2048. No contraction, no libm; exp, log, tanh, sine and cosine are the library's own polynomials.
    So the forward pass gives the same bits from every tier, compiler and architecture, GPUs included. Gradients are
    fused where the tier can: training repeats exactly on a given tier, for any thread count; of parameters with an
    accumulator they are exact integer products, the same everywhere. A layer whose gradients are TERN_BF16 permits
    factors rounded to bf16 in its backward, which AVX512-BF16 and AMX-BF16 multiply faster (machines with either have other
    bits there than those without); the forward is the same. Signs and payloads of
    NaN are not part of the promise, nor is clang's -ffp-contract=fast, which no code can see or undo.

FORMATS

    Packed panels of 16 rows: [TERN-8]. 2-bit: 2 bits per weight; base-3: 1.6. A group of inputs starts a new
    64-byte unit. Scales: F32, F16, powers of two in 8 bits, or a lattice of 256 steps to each power of two in
    16 (TERN_LOG: as small as F16, with the range of F32). Model files: [TERN-21], a GGUF container, read back
    bit-equal; export to ggml's TQ1_0, TQ2_0 and Q2_0.

Licence: MIT or Unlicense, at your choice; see the end of LICENSE.
*/

/* ------------------------------------------------------------------------------------------------
   [TERN-1] Configuration
   What enters: the switches listed in the manual. What leaves: TERN_API and a checked environment.
   ------------------------------------------------------------------------------------------------ */
#ifndef TERNARY_H
#define TERNARY_H

#include <stddef.h>
#include <stdint.h>

#define TERN_VERSION 100 /* 0.1.0 */

#if defined(TERNARY_STATIC) && defined(__GNUC__)
#define TERN_API __attribute__((unused)) static /* nobody calls all of it */
#elif defined(TERNARY_STATIC)
#define TERN_API static
#else
#define TERN_API extern
#endif

#if !defined(__GNUC__) && !defined(TERNARY_NO_THREADS)
#define TERNARY_NO_THREADS /* the pool needs the atomics of gcc and clang; tern_parallel takes yours */
#endif

#ifdef __cplusplus
#define TERN_ZERO {}
extern "C" {
#else
#define TERN_ZERO {0}
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-2] Types
   What every room shares. A desc struct set to TERN_ZERO asks for the defaults.
   ------------------------------------------------------------------------------------------------ */

/* Results. 0 is success; every failure leaves its numbers in a tern_error. */
#define TERN_RESULTS(X)                                                        \
    X(TERN_OK,              0, "ok")                                           \
    X(TERN_E_ARGUMENT,     -1, "an argument is missing or out of range")       \
    X(TERN_E_SHAPE,        -2, "shapes do not fit together")                   \
    X(TERN_E_OVERFLOW,     -3, "a size overflows")                             \
    X(TERN_E_MEMORY,       -4, "an allocation failed")                         \
    X(TERN_E_SCRATCH,      -5, "scratch is too small; call tern_reserve")      \
    X(TERN_E_ALIGNMENT,    -6, "a pointer is not aligned to its element type") \
    X(TERN_E_NONFINITE,    -7, "a weight is NaN or infinite")                  \
    X(TERN_E_TRIT,         -8, "a value is not a trit")                        \
    X(TERN_E_DATA,         -9, "data fault: a row was taken as zero")          \
    X(TERN_E_UNSUPPORTED, -10, "not supported by this backend or machine")     \
    X(TERN_E_FORMAT,      -11, "the file is truncated, corrupted or of another kind") \
    X(TERN_E_MISSING,     -12, "a tensor or buffer is missing")                \
    X(TERN_E_IO,          -13, "reading or writing failed")                    \
    X(TERN_E_VERSION,     -14, "header and implementation are of different versions") \
    X(TERN_E_SELFTEST,    -15, "a known answer was not reproduced")              \
    X(TERN_E_DEVICE,      -16, "the device failed or is not there")
#define TERN__ENUM(name, value, text) name = value,
typedef enum { TERN_RESULTS(TERN__ENUM) TERN__RESULT_END } tern_result;
#undef TERN__ENUM

typedef struct tern_error {
    tern_result code;
    char text[252]; /* zero-terminated, e.g. "weights[17][4] is not finite" */
} tern_error;

/* Element types. TERN_POW2 is an int8 exponent E that means 2^E (INT8_MIN means 0), TERN_LOG an int16 L that means 2^(L/256),
   rounded to 16 bits (INT16_MIN means 0): never off by more than 0.137%, at any size. F16 scales end at 65504. TERN_2BIT
   and TERN_BASE3 are packed panels (see the manual, Formats). */
typedef enum {
    TERN_TYPE_DEFAULT, TERN_F32, TERN_BF16, TERN_F16, TERN_I8, TERN_POW2, TERN_LOG, TERN_2BIT, TERN_BASE3
} tern_type;

/* How a weight becomes a trit times a scale. alpha is taken over the grain (tensor, row or group).
   The scale is rounded to its stored type first; trits are taken with the stored scale. */
typedef enum {
    TERN_ABSMEAN,       /* alpha = mean|w|;  trit = sign(w) where |w| > alpha/2     (BitNet b1.58) */
    TERN_ABSMEAN_SIGMA, /* alpha = mean|w| / sqrt(2/pi), so that a normal row gives its sigma        */
    TERN_TWN,           /* delta = 0.7 mean|w|; trit = sign(w) where |w| > delta; alpha = mean of those |w| (Li 2016) */
    TERN_LSQ,           /* alpha is learned, one for the tensor, from mean|w| on; trits as ABSMEAN (Esser 2020) */
    TERN_SEQ,           /* alpha is learned, one for each row, from max|w| on; scale alpha/1.5 and trit = sign(w) where
                           |w| > alpha/3, which is alpha rne(1.5 clamp(w/alpha, +-0.99))/1.5 (ParetoQ, Liu 2025) */
    TERN_GIVEN,         /* trits and scales come from the caller (tern_param_give) */
    TERN_DENSE          /* an ordinary float32 tensor: gain, bias, or a layer that is not ternary */
} tern_rule;

enum { TERN_PER_TENSOR = 0, TERN_PER_ROW = -1 }; /* grain; a positive grain is a group of that many inputs */

typedef enum { TERN_ACT_INT8, TERN_ACT_FLOAT, TERN_ACT_INT4, TERN_ACT_BIT } tern_act; /* activations of a BitLinear */
typedef enum { TERN_NORM_NONE, TERN_NORM_RMS } tern_norm_kind;

/* CPU tiers, slowest first. One list drives detection, tests, benchmarks and documentation. */
#define TERN_TIERS(X)                          \
    X(SCALAR,      scalar,      "scalar")      \
    X(SSE41,       sse41,       "sse4.1")      \
    X(AVX2,        avx2,        "avx2")        \
    X(AVX_VNNI,    avx_vnni,    "avx-vnni")    \
    X(AVX512_VNNI, avx512_vnni, "avx512-vnni") \
    X(AVX512_VBMI, avx512_vbmi, "avx512-vbmi") \
    X(AMX_INT8,    amx_int8,    "amx-int8")
#define TERN__ENUM(name, suffix, text) TERN_ISA_##name,
typedef enum { TERN_ISA_BEST, TERN_TIERS(TERN__ENUM) TERN__ISA_END } tern_isa;
#undef TERN__ENUM

/* Memory. Set both functions or neither. alloc may return any alignment; the library aligns to 64. */
typedef struct tern_allocator {
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *p);
    void *user;
} tern_allocator;

/* Threads. run() calls task(arg, i) once for each i in [0, count) on any threads and returns when all
   are done; count is at most workers, and tasks do not wait for each other. Zero runs everything on the
   calling thread. workers says how many run at once (at most 64). */
typedef void (*tern_task)(void *arg, int32_t index);
typedef struct tern_parallel {
    void (*run)(void *user, tern_task task, void *arg, int32_t count);
    void *user;
    int32_t workers;
} tern_parallel;

/* A packed ternary matrix: [rows, cols], row-major in meaning, panels of 16 rows in memory.
   Sizes of the two buffers: tern_matrix_bytes. Scales lie in panel order: the scale of row r and
   group g at ((r/16)*groups + g)*16 + r%16 (one single scale for TERN_PER_TENSOR). */
typedef struct tern_matrix {
    int64_t rows, cols;
    int32_t grain;        /* TERN_PER_TENSOR, TERN_PER_ROW or a group size */
    tern_type encoding;   /* TERN_2BIT (default) or TERN_BASE3 */
    tern_type scale_type; /* TERN_F32 (default), TERN_F16, TERN_POW2 or TERN_LOG */
    void *trits, *scales;
} tern_matrix;

/* ------------------------------------------------------------------------------------------------
   [TERN-3] API
   Every data pointer is memory of the context's backend (on the CPU: any memory); only tern_copy
   crosses. Argument errors are synchronous and write nothing. Data faults (a NaN activation row, a
   token id out of range) leave zero rows and are reported by tern_sync.
   ------------------------------------------------------------------------------------------------ */

typedef struct tern_context tern_context; /* used by one thread at a time */
typedef struct tern_backend tern_backend; /* the function table, below */

/* -- context ([TERN-5], [TERN-14]) -- */

typedef struct tern_context_desc {
    const tern_backend *backend; /* NULL: the CPU */
    tern_isa isa_max;            /* CPU: best tier to use, an error where it is missing; the environment's TERNARY_ISA lowers it further */
    tern_allocator allocator;
    tern_parallel parallel;
    size_t scratch;              /* bytes to reserve at once, as by tern_reserve */
} tern_context_desc;

/* Opens a context; desc and error may be NULL. The macro passes the caller's version and layout, so
   that two different headers in one program are an error and not a crash. */
#define tern_open(out, desc, error) tern_open_checked(out, desc, error, TERN_LAYOUT)
#define TERN_LAYOUT ((uint64_t)TERN_VERSION << 32 | (uint64_t)sizeof(tern_param) << 16 | \
                     (uint64_t)(sizeof(tern_context_desc) + sizeof(tern_backend)))
TERN_API tern_result tern_open_checked(tern_context **out, const tern_context_desc *desc, tern_error *error, uint64_t layout);
TERN_API void tern_close(tern_context *c); /* NULL is fine; buffers of parameters are the caller's to free first */
TERN_API const tern_error *tern_last_error(const tern_context *c);
TERN_API const char *tern_result_text(tern_result code);
TERN_API const char *tern_backend_name(const tern_context *c); /* "scalar", "avx2", ... */

/* Grows scratch to at least `bytes`: the only call that does. What a layer needs: tern_*_need. */
TERN_API tern_result tern_reserve(tern_context *c, size_t bytes);

/* Memory of the backend, aligned to 64, zeroed. tern_alloc returns NULL on failure. */
TERN_API void *tern_alloc(tern_context *c, size_t bytes);
TERN_API void tern_free(tern_context *c, void *p);
typedef enum { TERN_TO_DEVICE, TERN_TO_HOST, TERN_ON_DEVICE } tern_direction;
TERN_API tern_result tern_copy(tern_context *c, void *dst, const void *src, size_t bytes, tern_direction direction);

/* Waits for the backend and returns the first data fault since the last call (TERN_E_DATA, its place in
   tern_last_error), or TERN_OK. */
TERN_API tern_result tern_sync(tern_context *c);

/* -- threads ([TERN-4]) -- */

#ifndef TERNARY_NO_THREADS
typedef struct tern_pool tern_pool;
/* A small pool; threads counts the caller, 0 asks for one per online CPU. NULL on failure. One pool
   serves one running context at a time; contexts that use it are closed, or idle for good, before it is
   destroyed. The parallel of a NULL pool runs everything on the calling thread. */
TERN_API tern_pool *tern_pool_create(int32_t threads);
TERN_API tern_parallel tern_pool_parallel(tern_pool *pool);
TERN_API void tern_pool_destroy(tern_pool *pool);
#endif

/* -- sizes ([TERN-8]) -- */

/* Bytes of a matrix's two buffers; bits per weight is 8 * (trits + scales) / (rows * cols). */
TERN_API tern_result tern_matrix_bytes(tern_context *c, const tern_matrix *m, size_t *trits, size_t *scales);
/* Layout of quantized activations for a matrix: int8 elements per token, groups (sums) per token. */
TERN_API tern_result tern_activation_shape(tern_context *c, const tern_matrix *m, int64_t *stride, int64_t *groups);

/* -- operations ([TERN-7] to [TERN-14]): one struct, one public function and one table entry each --

   tern_NAME(context, &args) checks the arguments and runs the operation on the context's backend.
   Every operation overwrites its output unless it says "adds". Inputs and outputs must not overlap
   unless it says so. n counts tokens, at least 1; float buffers are float32, row-major, contiguous; pointers
   are aligned to their elements (packed trits: to nothing; on a GPU trits and q: to 16). A number left at zero (alpha, scale, rate) is
   zero: defaults are named where there are any. An eps of a norm must be positive. */

/* [rows, cols] floats -> trits and scales. Weights that are NaN, infinite or 2^96 and above are refused
   (TERN_E_NONFINITE) and nothing is written. An all-zero grain has scale 0. algorithms: see tern_rule. */
typedef struct tern_ternarize_args {
    tern_matrix m;
    tern_rule rule; /* not DENSE; GIVEN: m.scales hold the scales, trits as ABSMEAN */
    tern_type type; /* of w: F32 (default), F16 or BF16 */
    const void *w;
    float *alpha;   /* LSQ [1], SEQ [rows]: the learned scales. One that is 0 starts at mean|w| or max|w|; below 1e-5 it becomes 1e-5 */
    float rho;      /* ABSMEAN, ABSMEAN_SIGMA and TWN with F32 scales, in [0, 1): scale = rho old + (1 - rho) new where old > 0 */
    float noise, zone; /* in scales S: a weight with | |w| - threshold | < zone S is decided as w + noise S u, u uniform in (-1, 1), */
    uint64_t seed; uint32_t step, stream; /* which depends on these and on the element alone */
    void *spare;        /* NULL, or memory that may be overwritten: w is read from memory once less where it takes in as many bytes as */
    size_t spare_bytes; /* the trits, scales and alpha. Results are the same. The CUDA backend, which refuses later, has no use for it */
    int8_t *accum; int32_t theta; /* or NULL: what is left of each weight for tern_flip, rne(theta (w - S T) / (S/2)) held to
                                     +-(theta - 1); 0 where S is 0 */
} tern_ternarize_args;

/* Adds to the gradient of the learned scales of LSQ (dalpha [1]) or SEQ (dalpha [rows]), from dw [rows, cols], the
   gradient of the ternary weights: g sum of dw * (T where |w| is clipped, T - w/S inside), with S and T the scales and trits of
   m as ternarize left them. LSQ clips at S, g = 1/sqrt(weights of the grain); SEQ at 1.485 S, and g is 1.5 times smaller, as S
   is than alpha. plain: g sum of dw * T, without the root in g. Sums are canonical. */
typedef struct tern_scale_grad_args {
    tern_matrix m;
    tern_rule rule;
    tern_type type; /* of w: F32 (default), F16 or BF16 */
    const void *w;
    const float *dw;
    float *dalpha;
    int32_t plain;
} tern_scale_grad_args;

/* int8 trits [rows, cols] -> packed. A value that is not -1, 0 or 1 is refused and nothing is written. */
typedef struct tern_pack_args { tern_matrix m; const int8_t *trits; } tern_pack_args;

/* Packed -> int8 trits and/or float values (trit times scale) of rows [row, row + count); either output
   may be NULL. An invalid code (2-bit code 3, base-3 byte above 242) is refused: TERN_E_TRIT. The other
   operations do not look: with invalid codes their results are unspecified. */
typedef struct tern_unpack_args {
    tern_matrix m;
    int64_t row, count;
    int8_t *trits;
    float *values;
} tern_unpack_args;

/* Activations x [n, cols] -> q, one scale per token, with RMSNorm fused when asked, r = 1/sqrt(mean(x^2) + eps)
   (1 without norm):
     INT8  m = max|x g|, q = rne(x g 127/m), scale = (m/127) r
     INT4  m = mean|x g|, q = rne(x g sqrt(7)/m) held to -8..7, scale = (m/sqrt(7)) r, stored as INT8 (BitNet v2, Wang 2025)
     BIT   q = 1 where x is not 0, scale = 1; neither norm nor gain. A group's bits begin a byte: [TERN-9]
   q is [n, stride], zero in the padding; sum [n, groups] holds the sums of q (the packed codes are
   trit + 1). stride and groups: tern_activation_shape. A row with NaN or Inf, or whose m or mean(x^2) is not finite, is
   a data fault and a zero row of scale 0. */
typedef struct tern_quantize_args {
    tern_matrix m;     /* only cols, grain and encoding are read */
    tern_act act;      /* INT8 (default), INT4 or BIT */
    int64_t n;
    const float *x;
    tern_norm_kind norm;
    const float *gain; /* [cols] or NULL */
    float eps;
    int8_t *q; float *scale; int32_t *sum;
} tern_quantize_args;

/* y [n, rows] = activations [n, cols] * W^T + bias. Activations: q, scale, sum (exact int32 dot
   products, cols <= 262144; y = float(dot) * (scale * S) + bias), or x (float32; each sum in order of
   the inputs in segments of 2048). Groups: acc += float(dot_g) * S_g in order, then * scale. Bits: dot =
   popcount(q & plus) - popcount(q & minus). */
typedef struct tern_matmul_args {
    tern_matrix m;
    tern_act act;      /* of q, as quantize left it: INT8 (default), INT4 or BIT */
    int64_t n;
    const int8_t *q; const float *scale; const int32_t *sum;
    const float *x;    /* used when q is NULL */
    const float *bias; /* [rows] or NULL */
    float *y;
} tern_matmul_args;

/* y [n, rows] = x [n, cols] * W^T + bias without a float (integer-only inference: Jacob et al. 2018): x int8, -128 included, row
   by row; y and bias [rows] int32 in units of 2^-point of that of x. m.scales are TERN_LOG or TERN_POW2: S = f 2^(e - 15) with
   2^15 <= f < 2^16. With E the largest e of a row, y = floor(sum over groups of floor(dot f 2^(16 + e - E)) * 2^(E - 31 + point))
   + bias, held to int32 at the last; dots are exact in int32, the sum in int64. Off by less than 2^-point + groups 2^(E - 31). */
typedef struct tern_matmul_fixed_args {
    tern_matrix m;
    int64_t n;
    const int8_t *x;
    int32_t point;       /* -31 to 31 */
    const int32_t *bias; /* or NULL */
    int32_t *y;
} tern_matmul_fixed_args;

/* dx [n, cols] = dy [n, rows] * W. factors: F32 (default); BF16 permits what follows to backends that have products of bf16 (of
   the CPU's the tiers avx512-vbmi and amx-int8, where there is AVX512-BF16 or AMX-BF16 too), and changes nothing elsewhere:
   factors are rounded to bf16, to nearest even, and what is below 2^-126 counts as 0. Sums are float32. Trits, int8 and bits
   are exact in bf16, and dy is rounded after it was multiplied with the scale of its row of W (dx) or of its token (dw): one
   rounding, by 2^-8 at most. Where dx has several groups in a row, trit * scale is rounded besides; in dw and dense, floats of
   both sides are. */
typedef struct tern_matmul_dx_args { tern_matrix m; int64_t n; const float *dy; float *dx; tern_type factors; } tern_matmul_dx_args;

/* Adds dy^T * activations into dw [rows, cols], and the column sums of dy into dbias (either may be
   NULL). Activations as in matmul: q with scale, or x. factors: as in matmul_dx. */
typedef struct tern_matmul_dw_args {
    tern_matrix m; /* trits and scales are not read */
    tern_act act;  /* of q */
    int64_t n;
    const float *dy;
    const int8_t *q; const float *scale;
    const float *x;
    float *dw, *dbias;
    tern_type factors;
} tern_matmul_dw_args;

/* c [m, n] = a [m, k] * b [k, n] + bias[n] in float32, with strides of a and b in elements, not negative; c_row >= n.
   add: adds into c. fused: may fuse multiply and add (faster; the bits then depend on the tier). factors: as in matmul_dx. */
typedef struct tern_dense_args {
    int64_t m, n, k;
    const float *a; int64_t a_row, a_col;
    const float *b; int64_t b_row, b_col;
    const float *bias;
    float *c; int64_t c_row;
    int32_t add, fused;
    tern_type factors;
} tern_dense_args;

/* c [m, n] int32 = a [m, k] * b [k, n] int8, -128 included. Strides in elements, as in dense. Exact:
   k <= 131071, so that |sum| <= 2^14 k < 2^31. add: adds into c, modulo 2^32. */
typedef struct tern_dense_i8_args {
    int64_t m, n, k;
    const int8_t *a; int64_t a_row, a_col;
    const int8_t *b; int64_t b_row, b_col;
    int32_t *c; int64_t c_row;
    int32_t add;
} tern_dense_i8_args;

/* y [n, cols] = rows ids[i] of a packed matrix, or of w [rows, cols] when m.trits is NULL, whose words are moved as
   they are, be they floats or not; with weight [n], row i is multiplied by weight[i]. An id out of range is a data
   fault and a zero row; with holes -1 is a zero row and no fault. */
typedef struct tern_gather_args {
    tern_matrix m;
    const float *w;
    int64_t n;
    const int32_t *ids;
    const float *weight;
    float *y;
    int32_t holes;
} tern_gather_args;

/* Adds dy [n, cols], times weight [n] where that is not NULL, into rows ids[i] of dw [rows, cols], in order of i. Ids out
   of range are skipped. */
typedef struct tern_scatter_args { int64_t rows, cols, n; const int32_t *ids; const float *weight, *dy; float *dw; } tern_scatter_args;

/* Routing of n tokens over `count` experts (at most 1024) by logits [n, count]: ids [n, k] of the k largest, ascending (of
   equal logits the lower id's goes first), and their weights [n, k]. A row with NaN or Inf is a data fault: ids -1,
   weights 0. Backward (dweights [n, k] set; logits, ids, weights as they were): dlogits, zero for such rows, and for those
   with an id out of range. With loads
   [count], the tokens of each expert, they are also those of the load-balance loss balance * count * sum over experts of
   f P: f = loads/(n k), taken as constant, P the mean over n tokens of the softmax (Fedus et al. 2021). Sums are canonical. */
typedef enum {
    TERN_ROUTE_SELECTED,     /* softmax over the selected logits */
    TERN_ROUTE_RENORMALIZED, /* softmax over all, divided by the sum of the selected: the same but for its rounding */
    TERN_ROUTE_ALL           /* softmax over all */
} tern_route_kind;
typedef struct tern_route_args {
    int64_t n;
    int32_t count, k;
    tern_route_kind kind;
    const float *logits;
    int32_t *ids; float *weights;
    const float *dweights; /* set: backward */
    const int32_t *loads; float balance;
    float *dlogits;
} tern_route_args;

/* What route chose, by expert: loads [count] tokens each, those of expert 0 first, in order: tokens [n k], slots
   [n k] (the place in ids and weights) and sorted [n k], their weights (may be NULL); -1, -1 and 0 after the last.
   dense: [count, n] instead, where token t of an expert that was not chosen for it is -1, -1 and 0. Ids out of range
   belong to no expert. n k and count n are below 2^31. */
typedef struct tern_group_args {
    int64_t n;
    int32_t count, k, dense;
    const int32_t *ids; const float *weights;
    int32_t *loads, *tokens, *slots; float *sorted;
} tern_group_args;

/* y[to[i]] = the canonical sum of a[ids[i]] * b[i] over a row, a [rows, cols], b [n, cols], y [count]. Where an id or a place
   is out of range nothing is written. */
typedef struct tern_row_dot_args { int64_t rows, cols, n, count; const float *a, *b; const int32_t *ids, *to; float *y; } tern_row_dot_args;

/* The edges that end at each of `rows` nodes (or begin there), as tern_graph_build leaves them: those of row v are entry
   [start[v], start[v + 1]), the other node in the low 31 bits, the top bit set where the edge counts -1. */
typedef struct tern_adjacency {
    int64_t rows, sources, count; /* edges end at [0, rows) and begin at [0, sources) */
    int64_t first;                /* 0; of some rows of a graph the number of the first, from which on start, hub and part are the
                                     graph's */
    int64_t hubs, parts;          /* rows of more than 256 edges, and how many segments of 256 all of them have */
    int64_t *start;               /* [rows + 1] */
    uint32_t *entry;              /* [count] */
    int32_t *hub;                 /* [hubs], ascending */
    int64_t *part;                /* [hubs]: the number of its first segment */
} tern_adjacency;

/* y [rows, cols] = left[v] * the sum over the edges u -> v of sign * (right[u] * x[u]), rows without edges zero; from q:
   sign * (float(q[u]) * (scale[u] * right[u])). Sums run in the order of the edges in segments of 256, whose sums are
   added in order. left, right: NULL for 1. Backward: the same on the graph turned round, left and right exchanged. A sum
   that is not finite is a data fault and a zero row. */
typedef struct tern_aggregate_args {
    tern_adjacency edges;
    int64_t cols;
    const float *left, *right;  /* [rows], [sources] */
    const float *x;             /* [sources, cols], used where q is NULL */
    const int8_t *q; const float *scale; int64_t q_row; /* [sources, q_row], a multiple of 16 that is at least cols; [sources] */
    float *part;                /* [parts, cols] working memory, where there are parts */
    float *y;
} tern_aggregate_args;

/* y [n, cols] = h + the sum over j < count, in order, of gate * value, gate = sigmoid(<h, key>), rows j n + t of key, value
   [count n, cols] and gate [count n] for token t. Dots are canonical sums. Backward (dy set; gate as the forward left it): dh,
   dkey and dvalue. A row of y that is not finite is a data fault and zero. */
typedef struct tern_gate_args {
    int64_t n, count, cols;
    const float *h, *key, *value;
    float *gate, *y;
    const float *dy; /* set: backward */
    float *dh, *dkey, *dvalue;
} tern_gate_args;

/* ids[t] = the row of w [rows, cols] whose distance to x[t] is least, of equal ones the first, and distance[t] = the canonical
   sum of (x - w)^2 (or NULL). A row of x that is not finite, or too far from all, is a data fault: id -1, distance 0. */
typedef struct tern_nearest_args { int64_t n, rows, cols; const float *x, *w; int32_t *ids; float *distance; } tern_nearest_args;

/* Fills with zeros, or with normal deviates of the given standard deviation: element i of the result
   depends on (seed, stream, i) alone. */
typedef struct tern_fill_args { int64_t count; float *x; float deviation; uint64_t seed; uint32_t stream; } tern_fill_args;

/* Converts between F32, BF16 and F16, to nearest even. src and dst may be the same type (a copy).
   finite: refuses NaN and Inf (TERN_E_NONFINITE) and writes nothing. */
typedef struct tern_cast_args { int64_t count; tern_type from, to; const void *src; void *dst; int32_t finite; } tern_cast_args;

/* Element by element; y may be a or b. Backward (dy set): da and/or db get dy times the derivative;
   they may be dy.
     ADD   y = a + alpha b          MUL   y = a b            SCALE y = alpha a
     RELU2 y = max(a,0)^2           SILU  y = a sigmoid(a)   GELU  y = gelu_tanh(a)     RELU y = max(a,0) */
typedef enum { TERN_MAP_ADD, TERN_MAP_MUL, TERN_MAP_SCALE, TERN_MAP_RELU, TERN_MAP_RELU2, TERN_MAP_SILU, TERN_MAP_GELU } tern_map_fn;
typedef struct tern_map_args {
    tern_map_fn fn;
    int64_t count;
    float alpha;
    const float *a, *b;
    float *y;
    const float *dy; /* set: backward */
    float *da, *db;
} tern_map_args;

/* RMSNorm of n rows: y = x g r, r = 1/sqrt(mean(x^2) + eps); y may be x. Backward (dy set): dx (may be
   dy) and, added, dgain. A non-finite row is a data fault and a zero row. */
typedef struct tern_norm_args {
    int64_t n, cols;
    const float *x, *gain;
    float eps;
    float *y;
    const float *dy; /* set: backward */
    float *dx, *dgain;
    int32_t add;     /* backward: dx is added to */
} tern_norm_args;

/* y = x H, n rows (inverse: y = x H^T), H orthogonal at any size: columns change sign by a diagonal drawn from
   (seed, column), then a normalised Sylvester transform takes the first p columns and, where p < cols, another the
   last p; p is the largest power of two <= cols. In O(cols log cols), additions in a fixed order. y may be x. */
typedef struct tern_hadamard_args { int64_t n, cols; const float *x; float *y; uint32_t seed; int32_t inverse; } tern_hadamard_args;

/* The dead zone of a matrix: its weights whose trit is 0 (Tequila: arXiv 2509.23809). bias [rows] = lambda * the sums
   of w [rows, cols] in it; lambda * dbias [rows] is added to dw [rows, cols] in it. bias or dw may be NULL. */
typedef struct tern_dead_zone_args {
    tern_matrix m; /* scales are not read */
    float lambda;
    tern_type type; const void *w; float *bias; /* w: F32 (default), F16 or BF16 */
    const float *dbias; float *dw;
} tern_dead_zone_args;

/* Rotary positions in place on heads of dim (even) numbers: pairs (i, i + dim/2) turn by
   position * base^(-2i/dim), where token t has position start + t % period, below 2^24; angles beyond 8192
   lose accuracy (the same on every machine). inverse: the backward. */
typedef struct tern_rope_args {
    int64_t n; int32_t heads, dim;
    float *x; int64_t stride; /* floats from token to token */
    int64_t start, period;
    float base;               /* at least 1; 0: 10000 */
    int32_t inverse;
} tern_rope_args;

/* Causal softmax attention. q is [batch, queries, heads, dim], k and v are [batch, keys, kv_heads, dim],
   with the given strides in floats from token to token; query i sees keys 0 .. keys - queries + i.
   Scores are scaled by 1/sqrt(dim). y is [batch, queries, heads * dim]; p [batch, heads, queries, keys]
   receives the probabilities. Backward (dy set; y and p as the forward left them): dq, dk, dv with the
   strides of q, k, v; p is consumed. */
typedef struct tern_attention_args {
    int64_t batch, queries, keys;
    int32_t heads, kv_heads, dim;
    const float *q, *k, *v; int64_t q_stride, k_stride, v_stride;
    float *y, *p;
    const float *dy; /* set: backward */
    float *dq, *dk, *dv;
    int32_t exact;   /* backward: multiply and add are not fused, and the bits do not depend on the tier */
} tern_attention_args;

/* Softmax cross-entropy of n rows of logits: losses [n] in nats; dlogits (or NULL; may be logits) =
   (softmax - onehot) * scale. A target out of range or a non-finite row is a data fault: loss 0, zero row. */
typedef struct tern_loss_args {
    int64_t n, classes;
    const float *logits; const int32_t *targets;
    float *losses, *dlogits;
    float scale;
} tern_loss_args;

/* y[0] = the canonical sum of x, |x| or x^2 over count elements of type F32 (default), BF16 or F16; add: added to y[0]. */
typedef enum { TERN_SUM, TERN_SUM_ABS, TERN_SUM_SQUARES } tern_sum_kind;
typedef struct tern_sum_args { tern_sum_kind kind; int64_t count; tern_type type; const void *x; float *y; int32_t add; } tern_sum_args;

/* One optimizer step over count weights of type F32 or BF16 (written with stochastic rounding keyed by
   seed, step, stream and element; nearest: to nearest even), then the gradient is set to zero. Moments of type BF16
   are rounded stochastically too, by stream ^ 2^31. The gradient is first multiplied by
   min(1, clip/sqrt(*norm2)) when clip > 0; a *norm2 that is not finite skips the update: a data fault.
   AdamW needs an eps above 0, or a gradient of 0 would be 0/0. */
typedef enum { TERN_ADAMW, TERN_SGD } tern_optimizer;
typedef struct tern_optimize_args {
    tern_optimizer kind;
    int64_t count;
    tern_type type; void *w;
    int32_t nearest;
    float *grad;
    tern_type moment_type;    /* F32 (default) or BF16, of both */
    void *moment1, *moment2;  /* SGD: moment1 or NULL is the momentum; AdamW needs both */
    const float *norm2;
    float clip, rate, beta1, beta2, eps, decay;
    uint64_t seed; uint32_t step, stream; /* step counts from 1 */
} tern_optimize_args;

/* Stochastic rounding: x [n, cols] -> q [n, cols] and a scale per token, or one in all (whole): of v = x, times the scale of
   row c of m in group `group` for column c (m.scales set; then m.rows = cols), times row[t] (row set), each a product by
   itself: m = max|v|, scale = m/127, q = floor(v (127/m) + u) held to +-127, where u of (t, c) is an odd number of 2^-17 in
   (0, 1): half c % 8 of the Philox block t ceil(cols/8) + c/8 of (seed, stream). The mean of q scale is v. A token (or
   tensor) whose m is not finite is a data fault and zero with scale 0; so is, without one, a token of zeros. */
typedef struct tern_round_i8_args {
    int64_t n, cols;
    const float *x;
    const float *row;             /* [n] or NULL */
    tern_matrix m; int64_t group; /* of m, sizes, grain and scales are read */
    int32_t whole;
    uint64_t seed; uint32_t stream;
    int8_t *q; float *scale;      /* [n]; whole: [1] */
} tern_round_i8_args;

/* y [n, cols] = float(x [n, cols]) * scale[t] (whole: scale[0]); y_row >= cols floats from row to row. add: adds to y. */
typedef struct tern_dequantize_args {
    int64_t n, cols;
    const int32_t *x;
    const float *scale;
    int32_t whole;
    float *y; int64_t y_row;
    int32_t add;
} tern_dequantize_args;

/* One step of a matrix without float state, in place; then the gradient is set to zero. First the scales, where scale_step
   is not 0: m.scales are TERN_POW2 or TERN_LOG, and a grain's vote grows by -sign(sum of sign(G) T) * scale_step; at +-scale_theta
   the exponent takes a step that way (of LOG scale_push steps of 2^(1/256), less at the end of the range) and the vote loses
   scale_theta (where the scale is at its end it stays there; a scale of 0 has no vote). scale_step = scale_theta: LOG scales
   move with every step. Then the trits, with G the gradient of a weight, A its accumulator and mean = *sum_abs / weights:
     FLIP_PROPORTIONAL  a = A - ((n kq + h) >> 16), n = rne(G 256/mean) held to +-1024, kq = rne(256 push), h in 0..65535 the
                        half c % 8 of the Philox block r ceil(cols/8) + c/8 of (seed, step, stream): an increment of push
                        where |G| is the mean, rounded stochastically
     FLIP_SIGN          a = A - sign_step * sign(G)
   a is held to +-127. Where |a| reaches theta, with s = sign(a): T = s stays and A = s theta, else T += s and A = a - s theta (SIGN:
   A = 0); elsewhere A = a. A positive gradient drives a trit towards -1. A mean that is 0 (PROPORTIONAL: or below
   256/FLT_MAX), or a sign_step of 0 with FLIP_SIGN, skips the whole step; so does a *sum_abs that is not finite: a data fault. A NaN
   beside one that is finite, and so is not of this gradient, moves nothing. *counts is added to. */
typedef enum { TERN_FLIP_PROPORTIONAL, TERN_FLIP_SIGN } tern_flip_rule;
typedef struct tern_flips {
    int64_t flips, grains;  /* trits that changed, and grains that have one of them */
    int64_t saturated;      /* weights that stay at theta, because their trit is at its end */
    int64_t scales;         /* scales that changed */
    int64_t updates, skipped; /* matrices that were updated, and those that were not */
    int64_t ends;           /* scales that stay, because they are at the end of their range */
} tern_flips;
typedef struct tern_flip_args {
    tern_matrix m;
    tern_flip_rule rule;
    float *grad;              /* [rows, cols] */
    int8_t *accum, *votes;    /* [rows, cols]; [scales of m] or NULL */
    const float *sum_abs;     /* of grad, as tern_sum gives it */
    float push;               /* PROPORTIONAL: 0 to 127; 3 for language models, 2 for MLPs, falling to 0, have been good */
    int32_t sign_step;        /* SIGN: 0 to 127 */
    int32_t theta;            /* 2 to 127; push is best below theta/8 */
    int32_t scale_step, scale_theta; /* 0 to 127, 2 to 127 */
    int32_t scale_push;       /* TERN_LOG scales that learn: 1 to 256; 64 falling to 1 */
    uint64_t seed; uint32_t step, stream;
    tern_flips *counts;       /* backend memory, aligned to int64_t, or NULL */
} tern_flip_args;

/* A whole layer on quantized activations, tokens quantized while they are in cache: quantize, whose m has trits and
   scales here, then matmul into y [n, rows]. */
typedef struct tern_linear_args { tern_quantize_args quantize; const float *bias; float *y; } tern_linear_args;

/* Products of rows in groups, each of which has parameters of its own, all alike. The rows of the groups lie one after the
   other, loads[g] of group g, and here are rows [at, at + n) of all: q, scale and sum as tern_quantize gives them. y [sets][n,
   m.rows]: for set s and a row of group g what tern_matmul makes of it with w[g * step + s], whose dead zone's values are
   the bias. Rows behind the last group's become zeros. The trits and scales of m are not read.
   Backward (dy [sets][n, m.rows] set; sum and y are not used): dx [sets][n, m.cols] is for each row what tern_matmul_dx makes of its
   dy, zeros behind the last group's. What tern_matmul_dw makes of the rows of each group that are here is added to the TERN_GRAD of
   its parameters and of their dead zones, where present: in the order of groups and sets, should two have the same. */
typedef struct tern_grouped_args {
    tern_matrix m;
    tern_act act;
    int32_t count, sets, step;   /* groups; parameters that read the same rows, 1 or 2; pointers from group to group */
    struct tern_param *const *w; /* [count * step] in host memory, with buffers in backend memory */
    const int32_t *loads;        /* [count] in backend memory, none negative */
    int64_t rows, at, n;         /* rows: of all groups, at most */
    const int8_t *q; const float *scale; const int32_t *sum;
    float *y;
    const float *dy; /* set: backward */
    float *dx;
    tern_type factors; /* as in tern_matmul_dx_args */
} tern_grouped_args;

/* Rows that reach the nodes of a hop: the sum, then linear with message and with update, map fn, ADD of factor * add and of
   residual, bit by bit what these make one after the other, of all rows at once. m.trits NULL: no such layer. Of a layer m,
   act, norm, gain, eps and bias are read, of sum all but y. Nothing is kept of what lies between. A backend may decline what
   is beyond its means before it writes anything: TERN_E_UNSUPPORTED. */
typedef struct tern_hop_args {
    tern_aggregate_args sum;
    tern_linear_args message, update;
    tern_map_fn fn;                  /* TERN_MAP_ADD: none */
    float factor; const float *add;  /* as y, or NULL */
    const float *residual;           /* as y, or NULL */
    float *y;                        /* [rows, columns of what comes last] */
} tern_hop_args;

/* Hops one after the other, each whole, bit by bit what these make of all rows: of what nodes send linear with project (m.trits NULL:
   none; y NULL: only the next reads it), quantize into rows (q NULL: none) and MUL of its scales by from (NULL: none); then to, as hop.
   All are over the same edges, and each reads the y of the one before it; what one sends is apart from what the one before it sent. Its y
   may be memory that an earlier one reads, so it is written only once those have ended. A backend may decline what is beyond its means
   before it writes anything: TERN_E_UNSUPPORTED. */
enum { TERN_HOPS_AT_ONCE = 4 };
typedef struct tern_whole_hop {
    tern_linear_args project;
    tern_quantize_args rows; const float *from; /* [n] */
    tern_hop_args to;
} tern_whole_hop;
typedef struct tern_hops_args { int32_t count; tern_whole_hop hop[TERN_HOPS_AT_ONCE]; } tern_hops_args; /* count: 1 and more */

/* A mixture of few tokens, whole, bit by bit what these make one after the other: the router, which is quantize and matmul where its m has
   trits, else norm (y NULL: none) and dense, neither added nor fused, with a_col and b_row 1; route; quantize x; grouped for up, and for
   gate where there is one; map fn, and MUL by up's; quantize hidden; grouped for down; zeros and scatter. logits, ids, weights, loads
   and what quantize of x and of the router leave are as those leave them; hidden, and q, scale and sum of it, in the order of grouped
   rows, are work memory of n k rows. Experts are alike and have no dead zone. A backend may decline what is beyond its means before it
   writes anything: TERN_E_UNSUPPORTED. */
typedef struct tern_moe_args {
    tern_linear_args router;            /* m.trits NULL: dense */
    tern_norm_args norm;
    tern_dense_args dense;
    tern_route_args route;
    int32_t *loads;                     /* [count] */
    tern_quantize_args in, inner;       /* x as up and gate read it; hidden as down reads it */
    float *hidden;                      /* [n k, rows of up], which inner reads */
    const struct tern_expert *experts;  /* [count] in host memory, with buffers in backend memory */
    tern_map_fn fn;
    float *y;                           /* [n, rows of down] */
} tern_moe_args;

#define TERN_OPS(X)                                                                    \
    X(ternarize) X(pack) X(unpack) X(quantize) X(matmul) X(matmul_fixed) X(matmul_dx) X(matmul_dw) \
    X(dense) X(dense_i8) X(gather) X(scatter) X(fill) X(cast) X(map) X(norm) X(rope)   \
    X(attention) X(loss) X(sum) X(optimize) X(scale_grad) X(hadamard) X(dead_zone)     \
    X(round_i8) X(dequantize) X(flip) X(route) X(group) X(row_dot) X(aggregate) \
    X(gate) X(nearest)

/* Operations that a backend may leave out: layers then compose others, with the same bits. */
#define TERN_FUSED(X) X(linear) X(grouped) X(hop) X(hops) X(moe)

#define TERN__DECLARE(op) TERN_API tern_result tern_##op(tern_context *c, const tern_##op##_args *a);
TERN_OPS(TERN__DECLARE)
#undef TERN__DECLARE

/* The function table. An operation receives checked arguments and the running state; it reports data
   faults through tern_run.fault (the first one stays). A missing operation is TERN_E_UNSUPPORTED, by name. */
typedef struct tern_run {
    const tern_backend *backend;
    tern_allocator allocator;
    tern_parallel parallel;
    void *state;      /* the backend's own */
    tern_error error; /* text of the last failure */
    tern_error fault; /* first data fault since tern_sync */
    int64_t row;      /* what the numbers of rows in faults begin with, for layers that take some rows at once */
} tern_run;

struct tern_backend {
    const char *name;
    const void *data;                      /* the backend's own constants */
    int64_t dense_max;                     /* tokens up to which AUTO runs all experts of a tern_moe over all of them, where not
                                              in groups */
    tern_result (*open)(tern_run *r);
    void (*close)(tern_run *r);
    void *(*alloc)(tern_run *r, size_t bytes); /* aligned to 64, zeroed */
    void (*free)(tern_run *r, void *p);
    tern_result (*copy)(tern_run *r, void *dst, const void *src, size_t bytes, tern_direction direction);
    tern_result (*sync)(tern_run *r);
#define TERN__ENTRY(op) tern_result (*op)(tern_run *r, const tern_##op##_args *a);
    TERN_OPS(TERN__ENTRY)
    TERN_FUSED(TERN__ENTRY)
#undef TERN__ENTRY
    int64_t cache; /* bytes for each worker that stay in cache between operations: a tern_hop takes so many rows at once. 0: all.
                      Where open is the CPU's, each worker takes rows of its own, so that operations are called side by side
                      (but in a build with TERNARY_NO_THREADS) */
};

/* The CPU's table for a tier, or NULL where this machine or build lacks it. TERN_ISA_BEST: the best. */
TERN_API const tern_backend *tern_cpu_backend(tern_isa isa);

/* -- CUDA (ternary_cuda.cu; not here without it) -- */

/* The table of a CUDA device, for tern_context_desc.backend. Never NULL: a device, driver or architecture that
   cannot be used is an error of tern_open, which also runs tern_selftest there. Contexts have a stream each; calls
   queue their work on it and return, tern_copy to or from the host and tern_sync wait. What the CPU refuses at once,
   weights that are not finite and values that are not trits, is taken as zero and reported by tern_sync. Packed
   trits, q and saved are aligned to 16. */
#define tern_cuda_backend(device) tern_cuda_backend_checked(device, TERN_LAYOUT)
extern const tern_backend *tern_cuda_backend_checked(int32_t device, uint64_t layout);
/* The context's cudaStream_t, on which forward and backward can be captured into a graph; NULL for another backend.
   It does not wait for the default stream, nor that for it. A graph keeps the addresses of scratch and buffers: reserve
   before the capture and no more after it, free nothing that it uses, launch it on this stream: beside the context's other
   work it would spoil that, or never end. */
extern void *tern_cuda_stream(const tern_context *c);

/* -- parameters ([TERN-15]) -- */

/* What a parameter is follows from its buffers: trits and scales alone are frozen; a shadow makes it
   trainable by the straight-through estimator; an accumulator instead makes it trainable without any float that lasts
   (tern_flip), and votes let its scales learn; rule TERN_DENSE keeps an ordinary float32 tensor in the shadow. Set type
   before tern_param_alloc to choose an encoding (TRITS: 2BIT or BASE3; SCALES: F32, F16, POW2 or LOG; SHADOW: F32 or
   BF16; both moments: F32 or BF16); set data and count to lend your own memory. */
typedef struct tern_buffer {
    tern_type type;
    void *data;    /* NULL: absent */
    size_t count;  /* elements (bytes for packed trits) */
    int32_t owned; /* allocated by tern_param_alloc */
} tern_buffer;
enum { TERN_TRITS, TERN_SCALES, TERN_SHADOW, TERN_GRAD, TERN_MOMENT1, TERN_MOMENT2, TERN_ACCUM, TERN_VOTES, TERN_BUFFERS };
enum {
    TERN_FOR_INFERENCE = 1 << TERN_TRITS | 1 << TERN_SCALES,
    TERN_FOR_GRADIENT  = TERN_FOR_INFERENCE | 1 << TERN_SHADOW | 1 << TERN_GRAD,
    TERN_FOR_SGD       = TERN_FOR_GRADIENT | 1 << TERN_MOMENT1,
    TERN_FOR_ADAMW     = TERN_FOR_SGD | 1 << TERN_MOMENT2,
    TERN_FOR_FLIPS     = TERN_FOR_INFERENCE | 1 << TERN_GRAD | 1 << TERN_ACCUM, /* and 1 << TERN_VOTES for POW2 or LOG scales that learn */
    TERN_FOR_TRAINING  = (TERN_FOR_ADAMW & ~TERN_FOR_INFERENCE) | 1 << TERN_ACCUM | 1 << TERN_VOTES /* tern_param_free of it freezes */
};
enum { /* flags */
    TERN_NO_DECAY = 1,    /* weight decay leaves this parameter alone (gains, biases, learned scales) */
    TERN_PLAIN_ALPHA = 2, /* the gradient of alpha is the sum of dw * T (tern_scale_grad_args.plain) */
    TERN_NEAREST = 4,     /* steps round a BF16 shadow to nearest: small updates are lost, for comparison only */
    TERN_KEEP_SCALES = 8  /* a NULL tern_param_set takes trits with the scales there are; set by give, cleared by other sets and steps */
};

typedef struct tern_param {
    char name[64];      /* unique within a model */
    int64_t rows, cols; /* a bias or gain is [1, cols] */
    tern_rule rule;
    int32_t grain;
    uint32_t flags;
    struct tern_param *alpha; /* learned scales, dense: LSQ [1, 1] (grain: the tensor), SEQ [1, rows] (grain: the row). A parameter of the
                                 model with buffers of its own, best TERN_NO_DECAY; zeros in it are set by tern_param_set. Frozen: NULL */
    float rho;                /* running average of the scales, and ... */
    float noise, zone;        /* ... noise near the threshold: see tern_ternarize_args */
    uint32_t rotate;         /* 0, or the seed of a tern_hadamard rotation H: the matrix is W H, below */
    uint32_t sync;           /* 0, or the number of a set of parameters with one scale for all, below */
    struct tern_param *dead; /* NULL, or the bias of the dead zone (Tequila): dense [1, rows], below, with */
    float lambda;            /* its factor, above 0 (1e-3 is usual) */
    int32_t theta;           /* of its accumulator, 2 to 127; 0: 32 */
    tern_buffer buffer[TERN_BUFFERS];
} tern_param;

/* A rotated parameter lives in the rotated basis: tern_param_set rotates the rows it is given (with memory for a float
   matrix meanwhile), layers their activations, so that x W^T = (x H)(W H)^T. Trits, scales, shadow, gradient and what
   give, get, verify and stats see are those of W H; tern_linear_rebuild gives W. ggml's forms and embeddings refuse it.
   dead is computed again with every ternarize; layers add it to their bias and its column sums of dy to its TERN_GRAD,
   which tern_model_step spreads over the dead zone before it clips. It may be in the model's list, for files and
   reports: the optimizer leaves it alone. tern_linear_fold puts it into a bias for good. */

/* An accumulator (TERN_ACCUM, int8) excludes a shadow, a learned scale and a dead zone. tern_param_set then keeps in it how
   far each weight is from its trit, tern_param_give zeros; layers compute the parameter's gradient and dx by exact products of
   stochastically rounded int8, and tern_model_step flips trits instead of moving a shadow: the same bits on every tier. */

/* Parameters of a model with the same sync share one scale, mean|w| over all of them (ScaleSync: per expert, or one for a
   whole block of experts; else a large scale outweighs what a router says). They are ABSMEAN or ABSMEAN_SIGMA, all the same,
   TERN_PER_TENSOR with F32 scales, without rho, and have a shadow while they train. tern_model_requantize and each
   step take the scale again, in the order of the model. Setting one from floats gives it its own scale until then; a NULL
   tern_param_set keeps the scale there is. */

/* Allocates the buffers in the mask that are absent (of a dense parameter, TERN_TRITS in the mask asks for
   its values, which lie in TERN_SHADOW). All or nothing. tern_param_free frees or detaches those in the mask:
   freeze is tern_param_free(c, p, TERN_FOR_TRAINING) (a dense parameter keeps its values). */
TERN_API tern_result tern_param_alloc(tern_context *c, tern_param *p, int32_t mask);
TERN_API void tern_param_free(tern_context *c, tern_param *p, int32_t mask);
/* The packed view of a parameter, for the operations. */
TERN_API tern_matrix tern_param_matrix(const tern_param *p);
/* Sets the weights from floats [rows, cols] of F32, F16 or BF16: into the shadow where there is one, and
   ternarized and packed. NULL w: from the shadow as it stands. Given weights begin the average of rho anew, NULL goes on
   with it. Never with noise: a last tern_param_set(c, p, TERN_TYPE_DEFAULT, NULL) before a save or freeze takes it out. */
TERN_API tern_result tern_param_set(tern_context *c, tern_param *p, tern_type type, const void *w);
/* Sets trits [rows, cols] and scales [rows, groups] (row-major; one for TERN_PER_TENSOR) from host memory,
   as they are: an invalid trit or scale is refused and nothing changes. A shadow, if any, becomes their product, for
   ABSMEAN and ABSMEAN_SIGMA over the density of its grain (times sqrt(2/pi)), so that the mean finds the scale again;
   TERN_KEEP_SCALES keeps that exact until the first step. alpha, if any, becomes the scale (SEQ: 1.5 scales). */
TERN_API tern_result tern_param_give(tern_context *c, tern_param *p, const int8_t *trits, const float *scales);
/* Converts an allocated TERN_SHADOW, TERN_MOMENT1 or TERN_MOMENT2 to F32 or BF16 (to nearest even) in memory of its own;
   lent memory stays the caller's. Trits and scales stay: a NULL tern_param_set or the next step takes them from a rounded shadow. */
TERN_API tern_result tern_param_convert(tern_context *c, tern_param *p, int32_t which, tern_type type);
/* Reads row r into host memory: trits [cols], its scales [groups], values [cols] (each or NULL). It allocates, and
   waits for a GPU: verify, stats and files, which read many rows at a time, are the way to read them all. */
TERN_API tern_result tern_param_get(tern_context *c, const tern_param *p, int64_t row, int8_t *trits, float *scales, float *values);

/* Statistics of a shadow under the parameter's own rule and stored scales (after Tilelli's
   deadzone_stats): boundary counts | |w|/alpha - threshold/alpha | < band; zero_inner those with
   0 < |w|/alpha < threshold/alpha - band. alpha is the mean scale. Fractions of all weights. */
typedef struct tern_stats { float alpha, frac_neg, frac_zero, frac_pos, frac_boundary, frac_zero_inner; } tern_stats;
TERN_API tern_result tern_param_stats(tern_context *c, const tern_param *p, float band, tern_stats *out);
/* Checks host values [rows, cols] against the parameter: each must be trit * scale. */
typedef struct tern_verdict { int64_t wrong, first_wrong; float max_error; } tern_verdict;
TERN_API tern_result tern_param_verify(tern_context *c, const tern_param *p, const float *values, tern_verdict *out);

/* A model is a list of parameters, each once: the order of files, steps and reports. */
typedef struct tern_model { tern_param *const *items; int32_t count; } tern_model;
typedef struct tern_audit {
    int64_t weights, ternary;               /* all parameters; those held as trits */
    int64_t trainable_floats, persistent_floats, transient_floats; /* elements of F32, BF16 or F16 that a training changes, */
                                            /* that it leaves alone, and that are gone after a step (gradients) */
    size_t packed_bytes, bytes[TERN_BUFFERS]; /* trits + scales + dense values; by kind of buffer */
} tern_audit;
TERN_API tern_result tern_model_audit(tern_context *c, const tern_model *m, tern_audit *out);
/* Fails where a trainable float exists, and names it. What has a TERN_GRAD is trained: its trits, shadow, moments,
   accumulator and votes, and its scales, but those beside an accumulator without votes. Of what layers compute it says nothing:
   they use floats that are gone after them; tern_matmul_fixed uses none. */
TERN_API tern_result tern_model_strict(tern_context *c, const tern_model *m);
/* Where bytes go, in order and in small pieces. write returns 0 on success. */
typedef struct tern_sink { int (*write)(void *user, const void *data, size_t bytes); void *user; } tern_sink;
/* Every buffer as a line of text: name, kind, type, elements, bytes, and trainable, persistent or transient. */
TERN_API tern_result tern_model_list(tern_context *c, const tern_model *m, const tern_sink *sink);

/* Trits and scales of all that have a shadow from it, as by a NULL tern_param_set, sets of sync together: after they were
   set, and as the last act of a training. Scales that were given stay, in a set those of all. */
TERN_API tern_result tern_model_requantize(tern_context *c, const tern_model *m);

/* -- layers ([TERN-15], [TERN-16]) -- */

/* In bytes: the caller's `saved`, and for tern_reserve. Asks for a layer whose parameters are allocated. */
typedef struct tern_need { size_t saved, scratch; } tern_need;

/* BitLinear: y = q(norm(x)) W^T * scales + bias. w may be dense: then activations are float, and a NaN
   row without a norm passes through unreported. TERN_ACT_BIT takes no norm. */
typedef struct tern_linear {
    tern_param *w, *bias, *gain; /* bias, gain: dense [1, rows], [1, cols], or NULL */
    tern_norm_kind norm;
    float eps;                   /* 0: 1e-6 */
    tern_act act;
    tern_param *lora_a, *lora_b; /* low-rank update: dense [r, cols] and [rows, r], or both NULL ... */
    float lora_scale;            /* ... y += (x~ A^T) B^T * lora_scale (Hu et al. 2021) */
    float arenas;                /* eps of y += eps x~ shadow^T, from 0; ramp it to exactly 0 before w is frozen */
    uint64_t seed;               /* of the stochastic rounding in a backward with TERN_ACCUM: another for each, e.g. step << 32 | layer */
    tern_type gradients;         /* F32 (default), or BF16: permits factors of BF16 (tern_matmul_dx_args) in all products of the backward */
} tern_linear;
/* x~: the normalised (and rotated) activations in float. With LoRA or arenas and without a norm, a row with NaN gives
   a row with NaN besides the fault that is reported. */
TERN_API tern_result tern_linear_need(tern_context *c, const tern_linear *l, int64_t n, tern_need *out);
/* x [n, cols] -> y [n, rows], apart. saved: need.saved bytes, aligned to 4 (on a GPU: 16), for the backward, or NULL for inference. */
TERN_API tern_result tern_linear_forward(tern_context *c, const tern_linear *l, int64_t n, const float *x, float *y, void *saved);
/* Straight-through: adds into the TERN_GRAD of w (with arenas: times 1 + eps), bias, gain, lora_a, lora_b and w->dead
   where present; dx [n, cols] (or NULL) is overwritten. x and saved as in the forward. No two of the pointers may overlap.
   Where w has TERN_ACCUM, in integers: dy times the row scales becomes int8 token by token for dx, and times the scales of
   the activations int8 with one scale for dw (tern_round_i8). That takes activations INT8 or INT4, at most 131071 tokens
   and 2^24 rows, and neither LoRA nor arenas. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_linear_backward(tern_context *c, const tern_linear *l, int64_t n, const float *x, const void *saved,
                                          const float *dy, float *dx);
#endif
/* Adds lora_scale * B A to w and makes B zero, so that the layer goes on with a fresh update: to its shadow where there
   is one, else to trit times scale, and ternarizes again. It allocates; rows are taken in chunks (of a frozen matrix
   with one scale per tensor: all at once). Nothing changes where the sum is not finite. */
TERN_API tern_result tern_linear_merge(tern_context *c, const tern_linear *l);
/* Adds w->dead to the bias and makes it zero until w is ternarized again: the last step before a model without it,
   whose outputs have the same bits. */
TERN_API tern_result tern_linear_fold(tern_context *c, const tern_linear *l);
/* The matrix that the layer stands for, as floats [rows, cols] in backend memory, for checking: trit times scale (or
   dense values), plus arenas * shadow, plus lora_scale * B A, rotated back: y = norm(x) W^T + bias + w->dead but for
   the rounding of activations. It allocates. */
TERN_API tern_result tern_linear_rebuild(tern_context *c, const tern_linear *l, float *w);

/* Embedding: y[i] = row ids[i] of w. Tied output: tern_embedding_as_linear. */
typedef struct tern_embedding { tern_param *w; } tern_embedding;
TERN_API tern_result tern_embedding_forward(tern_context *c, const tern_embedding *e, int64_t n, const int32_t *ids, float *y);
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_embedding_backward(tern_context *c, const tern_embedding *e, int64_t n, const int32_t *ids, const float *dy);
#endif
TERN_API tern_linear tern_embedding_as_linear(const tern_embedding *e, tern_norm_kind norm, tern_act act);

/* -- mixture of experts ([TERN-17]) -- */

#ifndef TERNARY_NO_MOE
/* down(fn(gate x) * (up x)), or without a gate down(fn(up x)). The parameters are a model's like all others. */
typedef struct tern_expert { tern_param *gate, *up, *down; } tern_expert;

/* DENSE: every expert over all tokens, results that were not chosen left away. SPARSE: every expert over the tokens that
   chose it. The same bits. A GPU can capture either where it is not waited for: no launch's shape depends on the routing. */
typedef enum { TERN_DISPATCH_AUTO, TERN_DISPATCH_DENSE, TERN_DISPATCH_SPARSE } tern_dispatch;

/* y = the sum over the chosen experts, in their order, of weight * expert(x), plus always(x). The router is a layer of
   its own on x, dense or ternary, with `count` outputs; tern_route says who is chosen. Experts share a norm and the
   quantized activations. They are alike in shapes, rules, grains and encodings; what reads x is not rotated.
   Low-rank form: experts is one, whose projections all share, and y = down(sum of weight * h * (low_b low_a x)) + always(x)
   with h = fn(gate x) * (up x) or fn(up x), low_a [rank, cols] and low_b [rows of up, rank], ternary or dense. */
typedef struct tern_moe {
    tern_linear router;
    const tern_expert *experts;         /* [count]; with low_a: one */
    int32_t count, top_k;
    tern_route_kind weights;
    tern_map_fn fn;                     /* SILU (also where it is 0), GELU, RELU or RELU2 */
    tern_param *gain;                   /* of the norm, dense [1, cols], or NULL */
    tern_norm_kind norm, inner;         /* of x; of what goes into down */
    float eps;                          /* 0: 1e-6 */
    tern_act act;                       /* of all ternary experts; not BIT with a norm */
    const tern_expert *always;          /* an expert of any width that sees every token, or NULL */
    tern_param *const *low_a, *const *low_b; /* [count] each, or NULL */
    tern_dispatch dispatch;
    int64_t dense_max;                  /* AUTO is DENSE up to so many tokens; 0: none, but 128 on a GPU where SPARSE waits for it */
    float balance;                      /* factor of the load-balance loss (tern_route_args), whose gradient the backward adds */
    uint64_t seed;                      /* as that of tern_linear, of the experts; their names make it another for each */
    tern_type gradients;                /* as that of tern_linear, of all but the router, which has its own */
} tern_moe;
/* Asks for a layer whose parameters are allocated. `saved` holds routing and quantized activations: the backward
   computes the experts again. Scratch is enough for all tokens to choose the same expert. */
TERN_API tern_result tern_moe_need(tern_context *c, const tern_moe *m, int64_t n, tern_need *out);
/* x [n, cols] -> y [n, cols], apart. saved: need.saved bytes, aligned to 4 (on a GPU: 16), or NULL for inference. A
   token whose logits are not finite is a data fault and goes to no expert. A GPU is waited for, once, by SPARSE where
   experts, or the low-rank matrices in their place, read floats, or where down (low_b in its place) is rotated. On one, up to 16
   tokens (n top_k <= 256, up to 384 matrices, 160 with CUDA 12.0) are one launch, and the calls of `always` behind it, where experts are
   INT8 or INT4 without low_a and dead zones, and the router is dense or like them, without LoRA; but not with DENSE. */
TERN_API tern_result tern_moe_forward(tern_context *c, const tern_moe *m, int64_t n, const float *x, float *y, void *saved);
/* Adds into the TERN_GRAD of all parameters where present; dx [n, cols] (or NULL) is overwritten. As tern_linear_backward.
   A GPU is waited for, once, where experts, or the low-rank matrices in their place, read floats or have a TERN_ACCUM, or where
   down (low_b) is rotated; else a graph can capture it. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_moe_backward(tern_context *c, const tern_moe *m, int64_t n, const float *x, const void *saved,
                                       const float *dy, float *dx);
#endif
/* Of what a forward saved for n tokens, each or NULL: adds to loads [count] how many tokens chose each expert, the mean
   entropy in nats of the softmax over all experts, and the load-balance loss. In host memory; it allocates, and waits. */
typedef struct tern_moe_report { float entropy, balance; } tern_moe_report;
TERN_API tern_result tern_moe_stats(tern_context *c, const tern_moe *m, int64_t n, const void *saved, int64_t *loads, tern_moe_report *out);
/* Sets all experts, from floats of F32, F16 or BF16 in backend memory (not those of the low-rank form, which no float
   mixture has), and the router where one is given; sets of sync together. gate: NULL where there is none. bytes: those
   of the floats and of the trits, scales and dense values that stand for them, or NULL. All or nothing: every array is looked at
   before the first is written, and weights of 2^78 and more in size are refused (scales that are given, TERN_GIVEN, are not looked at).
   It may allocate, and waits for a GPU. */
typedef struct tern_expert_floats { const void *gate, *up, *down; } tern_expert_floats;
typedef struct tern_moe_bytes { size_t before, after; } tern_moe_bytes;
TERN_API tern_result tern_moe_from_dense(tern_context *c, const tern_moe *m, tern_type type, const tern_expert_floats *experts,
                                         const tern_expert_floats *always, const void *router, tern_moe_bytes *bytes);

/* Per-layer embeddings, as in Gemma 3n: y = x + norm(project(gelu(gate x) * rows)) with a row for each token, rows [n,
   rows of gate]. */
typedef struct tern_ple {
    tern_linear gate, project;
    tern_param *gain; /* of the norm, dense [1, rows of project], or NULL */
    float eps;        /* 0: 1e-6 */
} tern_ple;
TERN_API tern_result tern_ple_need(tern_context *c, const tern_ple *l, int64_t n, tern_need *out);
/* x [n, cols] -> y [n, cols], apart; saved as of tern_linear_forward. */
TERN_API tern_result tern_ple_forward(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows,
                                      float *y, void *saved);
/* dx [n, cols] and drows (each or NULL) are overwritten. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_ple_backward(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows, const void *saved,
                                       const float *dy, float *dx, float *drows);
#endif
#endif

/* -- graphs ([TERN-18]) -- */

#ifndef TERNARY_NO_GRAPH
/* Edges in host memory: a list (from, to), or by target (start, from). Those of sign 0 are left out. */
typedef enum {
    TERN_DUPLICATES_ADD,   /* an edge that is there twice counts twice */
    TERN_DUPLICATES_FIRST, /* the first counts */
    TERN_DUPLICATES_REFUSE
} tern_duplicates;
typedef struct tern_edges {
    int64_t nodes, count;   /* 1 to 2^31 - 1; 0 and more */
    const int32_t *from;    /* [count] */
    const int32_t *to;      /* [count], or NULL and ... */
    const int64_t *start;   /* ... [nodes + 1]: edges [start[v], start[v + 1]) end at v */
    const int8_t *sign;     /* [count] of -1, 0 and 1, or NULL: all are 1 */
    tern_duplicates duplicates;
    int32_t both_ways;      /* each edge also from its end to its beginning, next in order; a loop once */
    int32_t loops;          /* a last edge of sign 1 from each node to itself, where there is none */
} tern_edges;

/* A graph in backend memory. Edges into a node lie in the order they were given in, those out of it by their ends. */
typedef struct tern_graph {
    int64_t nodes, edges;       /* edges: those that are left */
    tern_adjacency in, out;     /* by target; turned round, for the backward */
    float *mean, *to, *from;    /* [nodes]: 1 / d in, 1 / sqrt(d in), 1 / sqrt(d out); 0 where there is none. d counts edges of
                                   either sign */
    void *memory;
} tern_graph;
/* Every index is checked, and nothing is kept of a graph that is refused. It allocates, some 20 bytes for each edge meanwhile. */
TERN_API tern_result tern_graph_build(tern_context *c, const tern_edges *e, tern_graph *out);
TERN_API void tern_graph_free(tern_context *c, tern_graph *g);

/* Of the sum over the edges u -> v. SYMMETRIC: 1/sqrt(d in of v * d out of u), of an undirected graph that of Kipf and Welling 2017. */
typedef enum { TERN_GRAPH_SUM, TERN_GRAPH_MEAN, TERN_GRAPH_SYMMETRIC } tern_graph_norm;
/* sum(P h) or P sum(h): the same but for rounding, and where activations are quantized. First comes what makes rows shorter. */
typedef enum { TERN_PROJECT_FIRST, TERN_AGGREGATE_FIRST } tern_hop_order;

/* One step along the edges: y_v = fn(U m_v + b) + lora_scale B (A h_v) (+ h_v), where m_v = norm of the sum over u -> v of sign * P h_u. */
typedef struct tern_hop {
    tern_linear message, update; /* P and U, with all they can do; without w: m is the sum of h, y is fn(m) */
    tern_hop_order order;
    tern_graph_norm norm;
    tern_act act;                /* of the rows that are summed: INT8 (quantized once for each node, a quarter of the bytes) or FLOAT */
    tern_map_fn fn;              /* RELU, RELU2, SILU or GELU; 0: none */
    int32_t residual;
    tern_param *lora_a, *lora_b; /* [r, cols] and [rows of y, r], dense or ternary with float activations, or both NULL */
    float lora_scale;
    int64_t cols;                /* of h, where no parameter says */
} tern_hop;
/* Asks for a hop whose parameters are allocated, and a graph. */
TERN_API tern_result tern_hop_need(tern_context *c, const tern_hop *l, const tern_graph *g, tern_need *out);
/* h [nodes, cols] -> y [nodes, rows], apart. saved: need.saved bytes, aligned to 4 (on a GPU: 16), or NULL for inference, which
   on a CPU takes nodes in blocks that stay in cache, each worker its own where there are enough: what is stored for all nodes is
   what they send, unless that is h. */
TERN_API tern_result tern_hop_forward(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, float *y, void *saved);
/* Hops one after the other for inference, count of them, 1 and more: each reads what the one before it makes, the first h and the
   last makes y, with the bits and the faults of as many calls of tern_hop_forward. y may be h where there are two and more. On a GPU up to
   four over a small graph (64 nodes for each multiprocessor: 8448 for 132) are one cooperative launch, if their layers are quantized, not
   to bits, without LoRA and rotation, 16 nodes' rows fit into shared memory and no projection of more than 1024 columns normalises or
   reads int4; elsewhere each goes by itself. */
TERN_API tern_result tern_hops_need(tern_context *c, const tern_hop *hops, int32_t count, const tern_graph *g, tern_need *out);
TERN_API tern_result tern_hops_forward(tern_context *c, const tern_hop *hops, int32_t count, const tern_graph *g, const float *h, float *y);
/* Adds into the TERN_GRAD of all parameters where present; dh [nodes, cols] (or NULL) is overwritten. As tern_linear_backward;
   rounding to int8 passes the gradient through. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_hop_backward(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, const void *saved,
                                       const float *dy, float *dh);
#endif

/* Memory of n-grams: the last two and the last three tokens each name a row of a table, and y = h + the sum over both of
   sigmoid(<h, key row>) * value row. Rows that no token names are not read, and get no gradient. */
typedef struct tern_ngram {
    tern_param *table;     /* as of an embedding */
    tern_linear key, value; /* [columns of h, columns of the table] */
    uint64_t seed;         /* of the hash */
} tern_ngram;
/* Rows of the table, on the host: ids [2, n], of the last two tokens, then of the last three. tokens [n] are sequences of
   `period` (0: one), before which nothing is known. Different n-grams may share a row. */
TERN_API tern_result tern_ngram_ids(tern_context *c, const tern_ngram *l, int64_t n, int64_t period, const int32_t *tokens, int32_t *ids);
TERN_API tern_result tern_ngram_need(tern_context *c, const tern_ngram *l, int64_t n, tern_need *out);
/* h [n, cols] -> y [n, cols], apart; ids [2, n] in backend memory. saved as of tern_linear_forward. */
TERN_API tern_result tern_ngram_forward(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h,
                                        float *y, void *saved);
/* Adds into the TERN_GRAD of all parameters where present; dh [n, cols] is overwritten. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_ngram_backward(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h,
                                         const void *saved, const float *dy, float *dh);
#endif

/* Vector quantization (van den Oord et al. 2017): y = the nearest row of a codebook, dense or ternary. */
typedef struct tern_vq {
    tern_param *codes;  /* [codes, cols] */
    float commitment;   /* factor of |x - code|^2 in the loss; 0.25 is usual */
} tern_vq;
TERN_API tern_result tern_vq_need(tern_context *c, const tern_vq *l, int64_t n, tern_need *out);
/* x [n, cols] -> ids [n], y [n, cols] and distance [n] = |x - y|^2 (or NULL). The loss of token t is (1 + commitment) distance[t]. */
TERN_API tern_result tern_vq_forward(tern_context *c, const tern_vq *l, int64_t n, const float *x, int32_t *ids, float *y, float *distance);
/* Straight-through: dx = dy + 2 commitment scale (x - y), and 2 scale (y - x) is added to the TERN_GRAD of the codes: scale is the
   factor of the loss. ids and y as the forward left them; dx [n, cols] may be dy, or NULL. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_vq_backward(tern_context *c, const tern_vq *l, int64_t n, const float *x, const int32_t *ids, const float *y,
                                      float scale, const float *dy, float *dx);
/* Adds to used [codes] (host) how often ids [n] name each code; and gives those that are 0 in it a row of x [n, cols], drawn by
   (seed, step, code), in the F32 shadow, which is ternarized again. Both wait. *count: how many. */
TERN_API tern_result tern_vq_count(tern_context *c, const tern_vq *l, int64_t n, const int32_t *ids, int64_t *used);
TERN_API tern_result tern_vq_revive(tern_context *c, const tern_vq *l, int64_t n, const float *x, const int64_t *used, uint64_t seed,
                                    uint32_t step, int64_t *count);
#endif
#endif

/* -- training ([TERN-19]) -- */

/* Clips by global norm, updates every parameter that has a TERN_GRAD, zeroes the gradients, ternarizes and
   packs. A norm that is not finite skips the update: a data fault (averages of rho and noise go on). A GPU decides
   that by itself: nothing waits for it. Defaults: beta1 0.9, beta2 0.99, eps 1e-8. norm2: where to leave the squared
   gradient norm (backend memory, one float), or NULL.
   A learned scale (alpha) is a parameter of the model; one that has a TERN_GRAD gets its gradient here, before the norm.
   Scratch of 64 bytes more than a parameter's trits, scales and alpha saves a pass over its shadow: tern_ternarize_args.spare. */
typedef struct tern_step {
    tern_optimizer optimizer;
    float rate, beta1, beta2, eps, decay, clip;
    uint64_t seed;
    uint32_t step; /* from 1 */
    float *norm2;
    tern_flip_rule flip; /* parameters with TERN_ACCUM: see tern_flip_args; they are not in the norm, and need none of the above
                            but seed and step */
    float push;
    int32_t sign_step, scale_step, scale_theta; /* scale_step: of those with TERN_VOTES; scale_theta 0: 32 */
    int32_t scale_push;  /* of those whose scales are TERN_LOG, then not 0 */
    tern_flips *flips;   /* what is added to (backend memory), or NULL */
} tern_step;
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_model_step(tern_context *c, const tern_model *m, const tern_step *s);
#endif

/* Rates over a training: up to `peak` in `warmup` equal steps, the first of them above zero, and down to `floor`,
   which step `steps` and all after it have. TERN_COSINE falls from the warm-up on, by half a cosine (Loshchilov and
   Hutter 2017), TERN_LINEAR by a straight line. TERN_WSD keeps the peak and falls over the last `decay` steps by
   1 - sqrt of the part of them that is done (Haegele et al. 2024): training may go on longer from any step before these. */
typedef enum { TERN_COSINE, TERN_WSD, TERN_LINEAR } tern_schedule_kind;
typedef struct tern_schedule {
    tern_schedule_kind kind;
    float peak, floor;
    uint32_t warmup, decay, steps; /* decay: of TERN_WSD alone */
} tern_schedule;
/* The rate of a step, counted from 1: of its arguments alone, with the same bits on every machine. */
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_schedule_rate(tern_context *c, const tern_schedule *s, uint32_t step, float *rate);
#endif

/* -- true-ternary training ([TERN-20]) -- */

/* The sign_step of a tern_step, scaled by the loss: round(first loss / mean) held to 1..most, where mean is a running average
   of losses in integers of 2^-16, mean += (loss - mean) / 2^shift rounded down, from the first loss on. Keep it from step
   to step, and with a checkpoint. A loss that is not finite gives 0, which skips the update, and stays out of the mean. */
typedef struct tern_pace {
    int32_t first, most, shift; /* 0: 4, 16, 6; up to 127, 127, 30 */
    int64_t mean;               /* 0 to begin */
} tern_pace;
#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_sign_step(tern_context *c, tern_pace *p, float loss, int32_t *step);
#endif

/* -- files ([TERN-21]) -- */

#ifndef TERNARY_NO_FILES
/* Native form: a GGUF container with name.trits (base-3), name.scale or name (dense), read back bit-equal.
   mask adds the TERN_SHADOW, moments, TERN_ACCUM and TERN_VOTES that parameters have (as 1 << buffer; 0 for a
   frozen model, TERN_FOR_TRAINING to go on training; gradients are never saved). Names of parameters have
   1 to 55 bytes and differ. Nothing is written before the whole model is known to be fit to be saved. */
TERN_API tern_result tern_model_save(tern_context *c, const tern_model *m, int32_t mask, const tern_sink *sink);
/* Loads from memory (any alignment) into allocated parameters, by name: rule (TERN_GIVEN takes any that
   is not dense), rows, cols, grain, rotate, type of scales and of shadow must be those of the file, the encoding of
   trits need not. A ternary parameter with a shadow, an
   accumulator or votes needs them in the file, with the same theta; moments that the file lacks stay as they are; tensors of other
   names are ignored. Every byte is checked before anything is written: TERN_E_FORMAT, TERN_E_MISSING or
   TERN_E_SHAPE say what does not fit. */
TERN_API tern_result tern_model_load(tern_context *c, const tern_model *m, const void *file, size_t size);
/* ggml's forms; ternary parameters as tensors `name`. Needs cols % 256 == 0 (TQ1_0, TQ2_0) or % 64 == 0
   (Q2_0, the 64-wide mainline form) and one scale per block: groups of a multiple of it. Dense parameters
   are F32. The scales are stored as f16: *max_error (or NULL) tells the largest relative change. */
typedef enum { TERN_TQ1_0 = 34, TERN_TQ2_0 = 35, TERN_Q2_0 = 42 } tern_export;
TERN_API tern_result tern_model_export(tern_context *c, const tern_model *m, tern_export form, const tern_sink *sink, float *max_error);
#ifndef TERNARY_NO_STDIO
/* A save that fails while writing leaves a partial file, which load refuses. */
TERN_API tern_result tern_model_save_file(tern_context *c, const tern_model *m, int32_t mask, const char *path);
TERN_API tern_result tern_model_load_file(tern_context *c, const tern_model *m, const char *path);
#endif
#endif

/* -- self-test ([TERN-22]) -- */

/* Known answers on this context's backend, any machine, under a second. */
TERN_API tern_result tern_selftest(tern_context *c);

#ifdef __cplusplus
}
#endif
#endif /* TERNARY_H */
#ifdef TERNARY_IMPLEMENTATION
#ifndef TERNARY_IMPLEMENTED
#define TERNARY_IMPLEMENTED

/* ------------------------------------------------------------------------------------------------
   [TERN-4] Platform: compiler, CPU detection, threads
   What enters: the compiler's and the machine's facts. What leaves: tern__cpu_has, the pool, and a
   checked floating-point environment. Called by rooms 5, 6 and 14.
   ------------------------------------------------------------------------------------------------ */

#include <float.h>
#include <stdarg.h>
#include <string.h>
#if !defined(TERNARY_MALLOC) != !defined(TERNARY_FREE)
#error "define both TERNARY_MALLOC and TERNARY_FREE, or neither"
#endif
#if !defined(TERNARY_MALLOC) || !defined(TERNARY_NO_STDIO)
#include <stdlib.h>
#endif
#ifndef TERNARY_MALLOC
#define TERNARY_MALLOC(bytes) malloc(bytes)
#define TERNARY_FREE(p) free(p)
#ifdef __linux__
#include <sys/mman.h>
#ifdef MADV_HUGEPAGE
#define TERN__HUGE_PAGES 1
#endif
#endif
#endif
#ifndef TERNARY_NO_STDIO
#include <stdio.h>
#endif
#if !defined(TERNARY_NO_THREADS) && defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#elif !defined(TERNARY_NO_THREADS)
#include <pthread.h>
#include <unistd.h>
#endif
#ifndef TERNARY_ASSERT
#define TERNARY_ASSERT(condition) ((void)0)
#endif

/* Functions that a GPU's kernels call too, so that both follow one text: ternary_cuda.cu includes this file. */
#ifdef __CUDACC__
#define TERN__ANYWHERE static __host__ __device__
#else
#define TERN__ANYWHERE static
#endif

/* The promise of equal bits holds only where the compiler keeps IEEE arithmetic. */
#ifndef TERNARY_ACCEPT_FAST_MATH
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error "ternary.h: fast-math breaks equal bits; compile without it or define TERNARY_ACCEPT_FAST_MATH"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: as 0, with a native _Float16 */
#error "ternary.h: floats are evaluated in a wider type (x87, s390x);" \
       "use -msse2 -mfpmath=sse, -std=gnu99 or define TERNARY_ACCEPT_FAST_MATH"
#endif
#endif

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__) && !defined(__CUDACC__) /* nvcc has -fmad=false */
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

/* The tiers that this compiler can build and the user has not left out. */
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && defined(__SSE2__) && !defined(TERNARY_NO_SIMD)
#ifndef TERNARY_NO_SSE41
#define TERN__WITH_SSE41 1
#endif
#ifndef TERNARY_NO_AVX2
#define TERN__WITH_AVX2 1
#endif
#if !defined(TERNARY_NO_AVX_VNNI) && defined(__has_include)
#if __has_include(<avxvnniintrin.h>) /* gcc 11, clang 12: assemblers of their time know the instruction */
#define TERN__WITH_AVX_VNNI 1
#endif
#endif
#ifndef TERNARY_NO_AVX512_VNNI
#define TERN__WITH_AVX512_VNNI 1
#ifndef TERNARY_NO_AVX512_VBMI
#define TERN__WITH_AVX512_VBMI 1
#endif
#endif
#if defined(TERN__WITH_AVX512_VBMI) && defined(__has_include)
#if __has_include(<avx512bf16intrin.h>) /* gcc 10, clang 9: the same */
#define TERN__WITH_AVX512_BF16 1
#endif
#endif
#if defined(TERN__WITH_AVX512_BF16) && !defined(TERNARY_NO_AMX_INT8)
#ifdef TERN__TILE_UNIT /* a test brings its own, and says here whether it may be used */
#define TERN__WITH_AMX_INT8 1
#elif defined(__x86_64__) && defined(__LP64__) && defined(__linux__)
#if __has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>) /* gcc 11, clang 11: the same */
#define TERN__WITH_AMX_INT8 1
#endif
#endif
#endif
#endif
#if defined(TERN__WITH_SSE41) || defined(TERN__WITH_AVX2) || defined(TERN__WITH_AVX_VNNI) || defined(TERN__WITH_AVX512_VNNI)
#define TERN__X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifdef TERN__X86
/* AMX beyond AVX-512: tiles and their int8 products (leaf 7, EDX), tiles saved by the OS (XCR0 bits 17-18), and
   the kernel's permission, arch_prctl(ARCH_REQ_XCOMP_PERM, 18). As asm: ISO C has no syscall(). */
static int32_t tern__cpu_has_tiles(unsigned leaf7_edx, unsigned xcr0)
{
#if defined(TERN__TILE_UNIT)
    (void)leaf7_edx;
    (void)xcr0;
    return TERN__TILE_UNIT;
#elif defined(TERN__WITH_AMX_INT8)
    long result = 158; /* the number of arch_prctl */
    if (!(leaf7_edx >> 24 & 1) || !(leaf7_edx >> 25 & 1) || (xcr0 & 0x60000) != 0x60000) return 0;
    __asm__ volatile("syscall" : "+a"(result) : "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
#else
    (void)leaf7_edx;
    (void)xcr0;
    return 0;
#endif
}
#endif

#ifdef TERN__WITH_AVX512_BF16
/* Whether the machine of a tier has products of bf16 too: AMX-BF16 (leaf 7, EDX) or AVX512-BF16 (its subleaf 1, EAX). */
static int32_t tern__cpu_has_pairs(tern_isa tier)
{
#ifdef TERN__TILE_UNIT
    return tier < TERN_ISA_AMX_INT8 || TERN__TILE_BF16;
#else
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (tier == TERN_ISA_AMX_INT8) return d >> 22 & 1;
    return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#endif
}
#endif

/* Whether the machine can run a tier. From AVX on the OS must save the registers too: XCR0 bits 1-2 for AVX,
   5-7 for AVX-512. */
static int32_t tern__cpu_has(tern_isa tier)
{
#ifdef TERN__X86
    unsigned a, b, c, d, b7, c7, d7, xcr0;
    if (tier == TERN_ISA_SCALAR) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (tier == TERN_ISA_SSE41) return (c >> 9 & 1) && (c >> 19 & 1); /* SSSE3, SSE4.1 */
    if (!(c >> 27 & 1)) return 0; /* OSXSAVE */
    if (!(c >> 12 & 1) || !(c >> 28 & 1) || !(c >> 29 & 1)) return 0; /* FMA, AVX, F16C */
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(d) : "c"(0));
    if ((xcr0 & 6) != 6) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) || !(b7 >> 5 & 1)) return 0; /* AVX2 */
    if (tier == TERN_ISA_AVX2) return 1;
    if (tier == TERN_ISA_AVX_VNNI) return a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    if ((xcr0 & 0xE0) != 0xE0) return 0;
    if (!(b7 >> 16 & 1) || !(b7 >> 17 & 1) || !(b7 >> 30 & 1) || !(b7 >> 31 & 1) || !(c7 >> 11 & 1)) return 0; /* F, DQ, BW, VL, VNNI */
    if (tier == TERN_ISA_AVX512_VNNI) return 1;
    if (!(c7 >> 1 & 1) || !(c7 >> 14 & 1)) return 0; /* VBMI, VPOPCNTDQ */
    return tier == TERN_ISA_AVX512_VBMI || tern__cpu_has_tiles(d7, xcr0);
#else
    return tier == TERN_ISA_SCALAR;
#endif
}

/* Games switch on flush-to-zero; operations run under IEEE defaults and put the caller's mode back. */
#if defined(__SSE2__)
typedef unsigned tern__fp_mode;
static tern__fp_mode tern__fp_enter(void) { tern__fp_mode old = _mm_getcsr(); _mm_setcsr(0x1F80); return old; }
static void tern__fp_leave(tern__fp_mode old) { _mm_setcsr(old); }
#elif defined(__aarch64__) && defined(__GNUC__)
typedef uint64_t tern__fp_mode;
static tern__fp_mode tern__fp_enter(void)
{
    tern__fp_mode old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return old;
}
static void tern__fp_leave(tern__fp_mode old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
typedef int tern__fp_mode;
static tern__fp_mode tern__fp_enter(void) { return 0; }
static void tern__fp_leave(tern__fp_mode old) { (void)old; }
#endif

enum { TERN__WORKERS = 64 };

#ifndef TERNARY_NO_THREADS
/* What the pool needs of the system, in the words of each. */
#ifdef _WIN32
typedef CRITICAL_SECTION tern__mutex;
typedef CONDITION_VARIABLE tern__condition;
typedef HANDLE tern__thread;
#define TERN__THREAD_MAIN(name, arg) static DWORD WINAPI name(LPVOID arg)
#define TERN__THREAD_END 0
static void tern__mutex_init(tern__mutex *m) { InitializeCriticalSection(m); }
static void tern__mutex_destroy(tern__mutex *m) { DeleteCriticalSection(m); }
static void tern__lock(tern__mutex *m) { EnterCriticalSection(m); }
static void tern__unlock(tern__mutex *m) { LeaveCriticalSection(m); }
static void tern__condition_init(tern__condition *v) { InitializeConditionVariable(v); }
static void tern__condition_destroy(tern__condition *v) { (void)v; }
static void tern__wait(tern__condition *v, tern__mutex *m) { SleepConditionVariableCS(v, m, INFINITE); }
static void tern__wake_all(tern__condition *v) { WakeAllConditionVariable(v); }
static int32_t tern__thread_start(tern__thread *t, LPTHREAD_START_ROUTINE run, void *arg)
{
    *t = CreateThread(NULL, 0, run, arg, 0, NULL);
    return *t != NULL;
}
static void tern__thread_join(tern__thread t)
{
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
static int32_t tern__processors(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int32_t)info.dwNumberOfProcessors;
}
#else
typedef pthread_mutex_t tern__mutex;
typedef pthread_cond_t tern__condition;
typedef pthread_t tern__thread;
#define TERN__THREAD_MAIN(name, arg) static void *name(void *arg)
#define TERN__THREAD_END NULL
static void tern__mutex_init(tern__mutex *m) { pthread_mutex_init(m, NULL); }
static void tern__mutex_destroy(tern__mutex *m) { pthread_mutex_destroy(m); }
static void tern__lock(tern__mutex *m) { pthread_mutex_lock(m); }
static void tern__unlock(tern__mutex *m) { pthread_mutex_unlock(m); }
static void tern__condition_init(tern__condition *v) { pthread_cond_init(v, NULL); }
static void tern__condition_destroy(tern__condition *v) { pthread_cond_destroy(v); }
static void tern__wait(tern__condition *v, tern__mutex *m) { pthread_cond_wait(v, m); }
static void tern__wake_all(tern__condition *v) { pthread_cond_broadcast(v); }
static int32_t tern__thread_start(tern__thread *t, void *(*run)(void *), void *arg)
{
    pthread_attr_t attributes;
    int32_t started;
    if (pthread_attr_init(&attributes) != 0) return 0;
    pthread_attr_setstacksize(&attributes, (size_t)1 << 20); /* some systems' default is less than kernels use */
    started = pthread_create(t, &attributes, run, arg) == 0;
    pthread_attr_destroy(&attributes);
    return started;
}
static void tern__thread_join(tern__thread t) { pthread_join(t, NULL); }
static int32_t tern__processors(void) { return (int32_t)sysconf(_SC_NPROCESSORS_ONLN); }
#endif

/* Every worker checks in for every job, so that a job's data may live on the caller's stack. Workers
   spin briefly before they sleep: consecutive operations follow within microseconds. */
struct tern_pool {
    tern__mutex mutex;
    tern__condition wake, done;
    tern__thread thread[TERN__WORKERS];
    int32_t threads, stop;            /* threads beside the caller */
    int32_t job, pending;             /* atomic: number of the job; workers that have not finished it */
    int32_t next, count;              /* atomic: next index; indices of the job */
    tern_task task;
    void *arg;
};

static int32_t tern__acquire(int32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

static void tern__pause(void)
{
#ifdef __SSE2__
    _mm_pause();
#endif
}

static void tern__pool_work(tern_pool *p)
{
    int32_t i;
    while ((i = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->count) p->task(p->arg, i);
}

TERN__THREAD_MAIN(tern__pool_thread, arg)
{
    tern_pool *p = (tern_pool *)arg;
    int32_t seen = 0, spin;
    for (;;) {
        for (spin = 0; spin < 4000 && tern__acquire(&p->job) == seen; spin++) tern__pause();
        tern__lock(&p->mutex);
        while (tern__acquire(&p->job) == seen && !p->stop) tern__wait(&p->wake, &p->mutex);
        seen = tern__acquire(&p->job);
        if (p->stop) { tern__unlock(&p->mutex); return TERN__THREAD_END; }
        tern__unlock(&p->mutex);
        tern__pool_work(p);
        if (__atomic_sub_fetch(&p->pending, 1, __ATOMIC_ACQ_REL) == 0) {
            tern__lock(&p->mutex);
            tern__wake_all(&p->done);
            tern__unlock(&p->mutex);
        }
    }
}

static void tern__pool_run(void *user, tern_task task, void *arg, int32_t count)
{
    tern_pool *p = (tern_pool *)user;
    int32_t spin;
    tern__lock(&p->mutex);
    p->task = task;
    p->arg = arg;
    p->count = count;
    __atomic_store_n(&p->next, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&p->pending, p->threads, __ATOMIC_RELAXED);
    __atomic_store_n(&p->job, (int32_t)((uint32_t)p->job + 1), __ATOMIC_RELEASE); /* may wrap */
    tern__wake_all(&p->wake);
    tern__unlock(&p->mutex);
    tern__pool_work(p);
    for (spin = 0; spin < 4000 && tern__acquire(&p->pending) != 0; spin++) tern__pause();
    if (tern__acquire(&p->pending) == 0) return;
    tern__lock(&p->mutex);
    while (tern__acquire(&p->pending) != 0) tern__wait(&p->done, &p->mutex);
    tern__unlock(&p->mutex);
}

TERN_API tern_pool *tern_pool_create(int32_t threads)
{
    tern_pool *p;
    if (threads <= 0) threads = tern__processors();
    if (threads <= 0) threads = 1;
    if (threads > TERN__WORKERS) threads = TERN__WORKERS;
    p = (tern_pool *)TERNARY_MALLOC(sizeof *p);
    if (!p) return NULL;
    memset(p, 0, sizeof *p);
    tern__mutex_init(&p->mutex);
    tern__condition_init(&p->wake);
    tern__condition_init(&p->done);
    while (p->threads < threads - 1) {
        if (!tern__thread_start(&p->thread[p->threads], tern__pool_thread, p)) {
            tern_pool_destroy(p);
            return NULL;
        }
        p->threads++;
    }
    return p;
}

TERN_API tern_parallel tern_pool_parallel(tern_pool *pool)
{
    tern_parallel parallel = TERN_ZERO;
    if (!pool) return parallel;
    parallel.run = tern__pool_run;
    parallel.user = pool;
    parallel.workers = pool->threads + 1;
    return parallel;
}

TERN_API void tern_pool_destroy(tern_pool *pool)
{
    if (!pool) return;
    tern__lock(&pool->mutex);
    pool->stop = 1;
    tern__wake_all(&pool->wake);
    tern__unlock(&pool->mutex);
    while (pool->threads > 0) tern__thread_join(pool->thread[--pool->threads]);
    tern__condition_destroy(&pool->done);
    tern__condition_destroy(&pool->wake);
    tern__mutex_destroy(&pool->mutex);
    TERNARY_FREE(pool);
}
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-5] Memory, checked arithmetic, errors
   What enters: sizes and pointers nobody has checked. What leaves: checked ones, or a result code
   with a text. Called by every later room.
   ------------------------------------------------------------------------------------------------ */

struct tern_context {
    tern_run run;
    unsigned char *scratch;   /* backend memory */
    size_t scratch_bytes, scratch_used;
    size_t scratch_base;      /* where a layer's scratch begins: behind that of the layer it is part of */
};

TERN_API const char *tern_result_text(tern_result code)
{
#define TERN__CASE(name, value, text) if (code == name) return text;
    TERN_RESULTS(TERN__CASE)
#undef TERN__CASE
    return "unknown result";
}

/* A small printf: %s takes a const char *, %d an int64_t. */
static void tern__format(char *out, size_t size, const char *format, va_list list)
{
    size_t at = 0;
    for (; *format; format++) {
        char digits[24];
        const char *piece = digits;
        if (*format == '%' && format[1] == 's') {
            piece = va_arg(list, const char *);
            format++;
        } else if (*format == '%' && format[1] == 'd') {
            int64_t value = va_arg(list, int64_t);
            uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
            char *end = digits + sizeof digits - 1;
            *end = 0;
            do { *--end = (char)('0' + rest % 10); rest /= 10; } while (rest);
            if (value < 0) *--end = '-';
            piece = end;
            format++;
        } else {
            digits[0] = *format;
            digits[1] = 0;
        }
        while (*piece && at + 1 < size) out[at++] = *piece++;
    }
    out[at] = 0;
}

static tern_result tern__set_error(tern_error *e, tern_result code, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    e->code = code;
    tern__format(e->text, sizeof e->text, format, list);
    va_end(list);
    return code;
}

/* Data faults: what tern_sync says of them. */
#define TERN__FAULTS(X)                                                                                  \
    X(QUANTIZE, "quantize: activation row %d is not finite and was taken as zero")                       \
    X(MATMUL,   "matmul: activation row %d is not finite and was taken as zero")                         \
    X(GATHER,   "gather: ids[%d] is out of range and its row was taken as zero")                         \
    X(NORM,     "norm: row %d is not finite and was taken as zero")                                      \
    X(ROUTE,    "route: the logits of row %d are not finite; it goes to no expert")                      \
    X(AGGREGATE, "aggregate: the sum of row %d is not finite and was taken as zero")                     \
    X(GATE,     "gate: row %d is not finite and was taken as zero")                                      \
    X(NEAREST,  "nearest: row %d is not finite and has no code")                                         \
    X(LOSS,     "loss: row %d has a target out of range or logits that are not finite and was taken as zero") \
    X(OPTIMIZE, "optimize: the gradient norm of step %d is not finite; the update was skipped")         \
    X(ROUND,    "round_i8: row %d is not finite and was taken as zero")                                  \
    X(FLIP,     "flip: a gradient of step %d is not finite; the update was skipped")
#define TERN__ENUM(name, text) TERN__FAULT_##name,
typedef enum { TERN__FAULTS(TERN__ENUM) TERN__FAULTS_END } tern__fault;
#undef TERN__ENUM

/* The first fault since tern_sync stays. */
static void tern__set_fault(tern_run *r, tern__fault fault, int64_t index)
{
#define TERN__TEXT(name, text) text,
    static const char *const texts[] = {TERN__FAULTS(TERN__TEXT)};
#undef TERN__TEXT
    if (r->fault.code == TERN_OK) tern__set_error(&r->fault, TERN_E_DATA, texts[fault], r->row + index);
}

#define TERN__FAIL(run, ...) return tern__set_error(&(run)->error, __VA_ARGS__)
#define TERN__REQUIRE(run, condition, ...) do { if (!(condition)) TERN__FAIL(run, __VA_ARGS__); } while (0)
#define TERN__TRY(call) do { tern_result tern__r = (call); if (tern__r != TERN_OK) return tern__r; } while (0)

/* Products and sums of sizes; INT64_MAX stands for "too large" and stays so. Nothing real needs 2^62. */
static int64_t tern__mul(int64_t a, int64_t b)
{
    if (a == 0 || b == 0) return 0;
    return a > ((int64_t)1 << 62) / b ? INT64_MAX : a * b;
}
static int64_t tern__add(int64_t a, int64_t b) { return a > ((int64_t)1 << 62) - b ? INT64_MAX : a + b; }
TERN__ANYWHERE int64_t tern__min(int64_t a, int64_t b) { return a < b ? a : b; }
TERN__ANYWHERE int64_t tern__max(int64_t a, int64_t b) { return a > b ? a : b; }
TERN__ANYWHERE int64_t tern__ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
static int32_t tern__fits(int64_t bytes) { return bytes >= 0 && bytes <= ((int64_t)1 << 62) && (uint64_t)bytes <= (uint64_t)PTRDIFF_MAX; }

/* Weights that stream through memory meet a new page every few hundred nanoseconds: where Linux offers huge
   ones on request, large blocks ask for them. It is advice; nothing depends on the answer. */
static void *tern__default_alloc(void *user, size_t bytes)
{
    void *p = TERNARY_MALLOC(bytes);
    (void)user;
#ifdef TERN__HUGE_PAGES
    if (p && bytes >= (size_t)4 << 20) {
        const uintptr_t page = 4096, first = ((uintptr_t)p + page - 1) & ~(page - 1);
        madvise((void *)first, (uintptr_t)p + bytes - first, MADV_HUGEPAGE);
    }
#endif
    return p;
}
static void tern__default_free(void *user, void *p) { (void)user; TERNARY_FREE(p); }

/* 64-aligned and zeroed from any allocator; the original pointer lies just before the block. */
static void *tern__host_alloc(const tern_allocator *a, size_t bytes)
{
    const size_t extra = 64 + sizeof(void *);
    unsigned char *raw, *p;
    if (bytes > (size_t)PTRDIFF_MAX - extra) return NULL;
    raw = (unsigned char *)a->alloc(a->user, bytes + extra);
    if (!raw) return NULL;
    p = raw + sizeof(void *);
    p += (64 - ((uintptr_t)p & 63)) & 63;
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    memset(p, 0, bytes);
    return p;
}

static void tern__host_free(const tern_allocator *a, void *p)
{
    void *raw;
    if (!p) return;
    memcpy(&raw, (unsigned char *)p - sizeof(void *), sizeof raw);
    a->free(a->user, raw);
}

TERN__ANYWHERE int64_t tern__type_bytes(tern_type type)
{
    switch (type) {
    case TERN_TYPE_DEFAULT: case TERN_F32: return 4;
    case TERN_BF16: case TERN_F16: case TERN_LOG: return 2;
    default: return 1;
    }
}

TERN_API const tern_error *tern_last_error(const tern_context *c)
{
    static const tern_error no_context = {TERN_E_ARGUMENT, "the context is NULL"};
    return c ? &c->run.error : &no_context;
}
TERN_API const char *tern_backend_name(const tern_context *c) { return c ? c->run.backend->name : "none"; }

TERN_API void *tern_alloc(tern_context *c, size_t bytes) { return c ? c->run.backend->alloc(&c->run, bytes) : NULL; }
TERN_API void tern_free(tern_context *c, void *p) { if (c && p) c->run.backend->free(&c->run, p); }

TERN_API tern_result tern_copy(tern_context *c, void *dst, const void *src, size_t bytes, tern_direction direction)
{
    if (!c) return TERN_E_ARGUMENT;
    if (bytes == 0) return TERN_OK;
    TERN__REQUIRE(&c->run, dst && src, TERN_E_ARGUMENT, "copy: dst or src is NULL");
    TERN__REQUIRE(&c->run, (int32_t)direction >= 0 && direction <= TERN_ON_DEVICE, TERN_E_ARGUMENT,
                  "copy: direction %d is unknown", (int64_t)direction);
    return c->run.backend->copy(&c->run, dst, src, bytes, direction);
}

TERN_API tern_result tern_reserve(tern_context *c, size_t bytes)
{
    void *p;
    if (!c) return TERN_E_ARGUMENT;
    if (bytes <= c->scratch_bytes) return TERN_OK;
    TERN__REQUIRE(&c->run, bytes <= (size_t)PTRDIFF_MAX, TERN_E_OVERFLOW, "reserve: %s", tern_result_text(TERN_E_OVERFLOW));
    p = tern_alloc(c, bytes);
    TERN__REQUIRE(&c->run, p, TERN_E_MEMORY, "reserve: no memory for %d bytes of scratch", (int64_t)bytes);
    tern_free(c, c->scratch);
    c->scratch = (unsigned char *)p;
    c->scratch_bytes = bytes;
    return TERN_OK;
}

/* Layers take scratch piece by piece and give all of it back when they return. */
static int64_t tern__scratch_piece(int64_t bytes) { return tern__mul(tern__ceil_div(bytes, 64), 64); }

static void *tern__take(tern_context *c, int64_t bytes)
{
    size_t piece = (size_t)tern__scratch_piece(bytes);
    void *p = c->scratch + c->scratch_used;
    TERNARY_ASSERT(c->scratch_used + piece <= c->scratch_bytes);
    c->scratch_used += piece;
    return p;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-6] Numbers: f16 and bf16, Philox, canonical sums, elementary functions
   What enters: floats and counters. What leaves: the same bits on every machine: single IEEE
   operations in a fixed order, no libm. At its end the inner table of kernels, which sums go through, and
   the loop that shares work among threads. Called by every later room.
   ------------------------------------------------------------------------------------------------ */

TERN__ANYWHERE uint32_t tern__bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
TERN__ANYWHERE float tern__float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
TERN__ANYWHERE float tern__abs(float x) { return tern__float(tern__bits(x) & 0x7FFFFFFFu); }
TERN__ANYWHERE int32_t tern__finite(float x) { return (tern__bits(x) & 0x7F800000u) != 0x7F800000u; }

TERN__ANYWHERE float tern__from_bf16(uint16_t h) { return tern__float((uint32_t)h << 16); }

/* Rounds to bf16 by adding `extra` (0..65535) below the cut and truncating: 0x7FFF plus the last kept
   bit is nearest-even, a random number is stochastic rounding. NaN and Inf pass; a carry never makes Inf. */
TERN__ANYWHERE uint16_t tern__to_bf16_with(float x, uint32_t extra)
{
    uint32_t u = tern__bits(x), sum = u + extra;
    if (!tern__finite(x)) return (uint16_t)(u >> 16 | ((u & 0xFFFF) != 0));
    if ((sum & 0x7F800000u) == 0x7F800000u) return (uint16_t)((u >> 16 & 0x8000u) | 0x7F7Fu);
    return (uint16_t)(sum >> 16);
}
TERN__ANYWHERE uint16_t tern__to_bf16(float x) { return tern__to_bf16_with(x, 0x7FFFu + (tern__bits(x) >> 16 & 1)); }

TERN__ANYWHERE float tern__from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24 is exact */
        float x = (float)fraction * 5.9604644775390625e-8f;
        return tern__float(tern__bits(x) | sign);
    }
    if (exponent == 31) return tern__float(sign | 0x7F800000u | fraction << 13);
    return tern__float(sign | (exponent + 112) << 23 | fraction << 13);
}

TERN__ANYWHERE uint16_t tern__to_f16(float x)
{
    uint32_t u = tern__bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (a >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and above round to Inf */
    if (a < 0x38800000u) { /* subnormal: adding 0.5 leaves x / 2^-24, rounded to even, in the low bits */
        return (uint16_t)(sign | (tern__bits(tern__float(a) + 0.5f) - 0x3F000000u));
    }
    a += 0xFFFu + (a >> 13 & 1);
    return (uint16_t)(sign | (a - 0x38000000u) >> 13);
}

TERN__ANYWHERE float tern__load_float(tern_type type, const void *p, int64_t i)
{
    if (type == TERN_BF16) return tern__from_bf16(((const uint16_t *)p)[i]);
    if (type == TERN_F16) return tern__from_f16(((const uint16_t *)p)[i]);
    return ((const float *)p)[i];
}

TERN__ANYWHERE void tern__store_float(tern_type type, void *p, int64_t i, float x)
{
    if (type == TERN_BF16) ((uint16_t *)p)[i] = tern__to_bf16(x);
    else if (type == TERN_F16) ((uint16_t *)p)[i] = tern__to_f16(x);
    else ((float *)p)[i] = x;
}

/* Power-of-two scales: the exponent nearest in the logarithm; INT8_MIN is zero. */
TERN__ANYWHERE int8_t tern__to_pow2(float x)
{
    int32_t exponent = (int32_t)(tern__bits(x) >> 23 & 255) - 127;
    if (x == 0) return INT8_MIN;
    if ((tern__bits(x) & 0x7FFFFFu) > 0x3504F3u) exponent++; /* mantissa above sqrt(2) */
    return (int8_t)(exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
}
TERN__ANYWHERE float tern__from_pow2(int8_t e) { return e < -126 ? 0.0f : tern__float((uint32_t)(e + 127) << 23); }

/* Log-lattice scales: L = round(256 log2 S), saturating, S = lattice[L & 255] 2^((L >> 8) - 15). The largest L is a
   finite float; what would lie below the normal ones is never stored and reads as zero, as INT16_MIN does. */
enum { TERN__LEAST_LOG = -126 * 256 };

TERN__ANYWHERE const uint16_t *tern__lattice(void) /* [f] = round(2^15 2^(f/256)) */
{
    static const uint16_t table[257] = {
        32768, 32857, 32946, 33035, 33125, 33215, 33305, 33395, 33486, 33576, 33667, 33759, 33850, 33942, 34034, 34126,
        34219, 34312, 34405, 34498, 34591, 34685, 34779, 34874, 34968, 35063, 35158, 35253, 35349, 35445, 35541, 35637,
        35734, 35831, 35928, 36025, 36123, 36221, 36319, 36417, 36516, 36615, 36715, 36814, 36914, 37014, 37114, 37215,
        37316, 37417, 37518, 37620, 37722, 37824, 37927, 38030, 38133, 38236, 38340, 38444, 38548, 38653, 38757, 38863,
        38968, 39074, 39180, 39286, 39392, 39499, 39606, 39714, 39821, 39929, 40037, 40146, 40255, 40364, 40473, 40583,
        40693, 40804, 40914, 41025, 41136, 41248, 41360, 41472, 41584, 41697, 41810, 41923, 42037, 42151, 42265, 42380,
        42495, 42610, 42726, 42841, 42958, 43074, 43191, 43308, 43425, 43543, 43661, 43780, 43898, 44017, 44137, 44256,
        44376, 44497, 44617, 44738, 44859, 44981, 45103, 45225, 45348, 45471, 45594, 45718, 45842, 45966, 46091, 46216,
        46341, 46467, 46593, 46719, 46846, 46973, 47100, 47228, 47356, 47484, 47613, 47742, 47871, 48001, 48131, 48262,
        48393, 48524, 48655, 48787, 48920, 49052, 49185, 49319, 49452, 49586, 49721, 49856, 49991, 50126, 50262, 50399,
        50535, 50672, 50810, 50947, 51085, 51224, 51363, 51502, 51642, 51782, 51922, 52063, 52204, 52346, 52488, 52630,
        52773, 52916, 53059, 53203, 53347, 53492, 53637, 53782, 53928, 54074, 54221, 54368, 54515, 54663, 54811, 54960,
        55109, 55258, 55408, 55558, 55709, 55860, 56012, 56163, 56316, 56468, 56622, 56775, 56929, 57083, 57238, 57393,
        57549, 57705, 57861, 58018, 58176, 58333, 58491, 58650, 58809, 58968, 59128, 59289, 59449, 59611, 59772, 59934,
        60097, 60260, 60423, 60587, 60751, 60916, 61081, 61247, 61413, 61579, 61746, 61914, 62081, 62250, 62419, 62588,
        62757, 62928, 63098, 63269, 63441, 63613, 63785, 63958, 64132, 64306, 64480, 64655, 64830, 65006, 65182, 65359,
        0 /* kernels gather pairs */
    };
    return table;
}

/* Squaring brings out the bits of a logarithm one by one; 32 bits of the squares decide all 2^23 mantissas rightly. */
TERN__ANYWHERE int16_t tern__to_log(float x)
{
    int32_t i, half_steps = (int32_t)(tern__bits(x) >> 23 & 255), l;
    uint32_t m = tern__bits(x) << 8 | 0x80000000u;
    if (x == 0) return INT16_MIN;
    for (i = 0; i < 9; i++) {
        const uint64_t square = (uint64_t)m * m;
        const int32_t bit = (int32_t)(square >> 63);
        half_steps = 2 * half_steps + bit;
        m = (uint32_t)(square >> (31 + bit));
    }
    l = (half_steps + 1) / 2 - 127 * 256;
    return (int16_t)(l < TERN__LEAST_LOG ? TERN__LEAST_LOG : l > INT16_MAX ? INT16_MAX : l);
}

TERN__ANYWHERE float tern__from_log(int16_t l)
{
    const uint32_t steps = (uint32_t)(l - TERN__LEAST_LOG);
    if (l < TERN__LEAST_LOG) return 0.0f;
    /* The highest bit of what the lattice gives is the last of the exponent. */
    return tern__float(((uint32_t)tern__lattice()[steps & 255] << 8) + (steps >> 8 << 23));
}

/* floor(x / 2^bits), bits below 64; a right shift of negative numbers is the compiler's choice in C. */
TERN__ANYWHERE int64_t tern__floor_shift(int64_t x, int32_t bits) { return x < 0 ? ~(~x >> bits) : x >> bits; }

/* A scale of TERN_LOG or TERN_POW2 in integers: factor 2^(exponent - 15); factor 0: no scale. */
typedef struct tern__integer_scale { int32_t factor, exponent; } tern__integer_scale;

TERN__ANYWHERE tern__integer_scale tern__load_integer_scale(tern_type type, const void *p, int64_t i)
{
    const int32_t l = type == TERN_LOG ? ((const int16_t *)p)[i] : ((const int8_t *)p)[i] * 256;
    tern__integer_scale s = {0, 0};
    if (l < TERN__LEAST_LOG) return s;
    s.factor = tern__lattice()[(l - TERN__LEAST_LOG) & 255];
    s.exponent = (l - TERN__LEAST_LOG) / 256 + TERN__LEAST_LOG / 256;
    return s;
}

/* A fixed-point number times 2^exponent, rounded down, and an addend, held to int32. */
TERN__ANYWHERE int32_t tern__fixed_point(int64_t x, int32_t exponent, int32_t addend)
{
    const int64_t most = (int64_t)1 << 33; /* with any addend beyond int32 */
    if (exponent <= 0) x = tern__floor_shift(x, exponent < -63 ? 63 : -exponent);
    else if (exponent > 33 || x > most >> exponent || x < -(most >> exponent)) x = x > 0 ? most : x < 0 ? -most : 0;
    else x *= (int64_t)1 << exponent;
    x = (x > most ? most : x < -most ? -most : x) + addend;
    return (int32_t)(x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : x);
}

TERN__ANYWHERE float tern__load_scale(tern_type type, const void *p, int64_t i)
{
    if (type == TERN_LOG) return tern__from_log(((const int16_t *)p)[i]);
    if (type == TERN_POW2) return tern__from_pow2(((const int8_t *)p)[i]);
    if (type == TERN_F16) return tern__from_f16(((const uint16_t *)p)[i]);
    return ((const float *)p)[i];
}

typedef union tern__any_scale { float f; uint16_t half; int16_t logarithm; int8_t exponent; } tern__any_scale;

/* Stores a scale and returns it as stored: trits are taken with that. */
TERN__ANYWHERE float tern__store_scale(tern_type type, void *p, int64_t i, float x)
{
    if (type == TERN_POW2) {
        ((int8_t *)p)[i] = tern__to_pow2(x);
        return tern__from_pow2(((int8_t *)p)[i]);
    }
    if (type == TERN_LOG) {
        ((int16_t *)p)[i] = tern__to_log(x);
        return tern__from_log(((int16_t *)p)[i]);
    }
    if (type == TERN_F16) {
        ((uint16_t *)p)[i] = tern__to_f16(x < 65504.0f ? x : 65504.0f); /* the largest */
        return tern__from_f16(((uint16_t *)p)[i]);
    }
    return ((float *)p)[i] = x;
}

/* Philox4x32-10 (Salmon et al. 2011): four random words for (seed, element, step, stream). */
TERN__ANYWHERE void tern__philox(uint64_t seed, uint64_t element, uint32_t step, uint32_t stream, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)element, c1 = (uint32_t)(element >> 32), c2 = step, c3 = stream;
    int32_t round;
    for (round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

/* A normal deviate: eight 16-bit uniforms summed as integers (variance 8 (2^32 - 1)/12, bounds +-4.9). */
TERN__ANYWHERE float tern__normal(uint64_t seed, uint64_t element, uint32_t stream)
{
    uint32_t w[4];
    int32_t i, sum = -8 * 65535;
    tern__philox(seed, element, 0, stream, w);
    for (i = 0; i < 4; i++) sum += 2 * (int32_t)((w[i] & 0xFFFF) + (w[i] >> 16));
    return (float)sum * 9.3440622e-6f; /* 1 / (2 sqrt(8 (2^32 - 1)/12)) */
}

/* Correctly rounded square root: one instruction where there is one, else the digits one by one. */
TERN__ANYWHERE float tern__sqrt(float x)
{
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#elif defined(__SSE2__)
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#elif defined(__aarch64__) && defined(__GNUC__)
    float y;
    __asm__("fsqrt %s0, %s1" : "=w"(y) : "w"(x));
    return y;
#else
    uint32_t u = tern__bits(x), root = 0, bit;
    uint64_t m;
    int32_t e;
    if (x == 0 || u == 0x7F800000u || (u & 0x7FFFFFFFu) > 0x7F800000u) return x;
    if (u >> 31) return tern__float(0x7FC00000u);
    if (u < 0x00800000u) return tern__sqrt(x * 16777216.0f) * 0.000244140625f;
    e = (int32_t)(u >> 23) - 127;
    m = (uint64_t)((u & 0x7FFFFFu) | 0x800000u) << (25 + (e & 1)); /* 25 digits of the root: 24 and one to round by */
    for (bit = 1u << 24; bit; bit >>= 1)
        if ((uint64_t)(root | bit) * (root | bit) <= m) root |= bit;
    root += root & 1; /* the 25th digit rounds up; an exact tie cannot occur */
    e = (e - (e & 1)) / 2;
    return tern__float(((uint32_t)(e + 126) << 23) + (root >> 1));
#endif
}

/* Round half to even for |x| < 2^22. */
TERN__ANYWHERE float tern__round(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* e^x, error below 2 units in the last place; 0 below -87, Inf above 88.7. */
TERN__ANYWHERE float tern__exp(float x)
{
    float n, r, p;
    if (!(x < 88.7f)) return x != x ? x : tern__float(0x7F800000u);
    if (x < -87.0f) return 0.0f;
    n = tern__round(x * 1.44269504f);
    r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    p = 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 0.16666667f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    if (n == 128.0f) return p * 2.0f * tern__float(254u << 23);
    return p * tern__float((uint32_t)((int32_t)n + 127) << 23);
}

/* ln x for positive normal x: x = m 2^e with m in (0.707, 1.414], ln m = 2 artanh((m-1)/(m+1)). */
TERN__ANYWHERE float tern__log(float x)
{
    uint32_t u = tern__bits(x);
    int32_t e = (int32_t)((u - 0x3F3504F4u) >> 23);
    float m, s, z, p;
    if (e > 255) e -= 512;
    m = tern__float(u - ((uint32_t)e << 23));
    s = (m - 1.0f) / (m + 1.0f);
    z = s * s;
    p = 0.22222222f;
    p = p * z + 0.28571429f;
    p = p * z + 0.4f;
    p = p * z + 0.66666667f;
    p = p * z * s + 2.0f * s;
    return (float)e * 0.693359375f + (p + (float)e * -2.12194440e-4f);
}

TERN__ANYWHERE float tern__sigmoid(float x) { return 1.0f / (1.0f + tern__exp(0.0f - x)); }
TERN__ANYWHERE float tern__tanh(float x) { return 1.0f - 2.0f / (tern__exp(2.0f * x) + 1.0f); }

/* max(x, 0) by a mask: a branch on random signs is slow. NaN stays NaN, whatever the sign a machine gives it. */
TERN__ANYWHERE float tern__relu(float x) { return tern__float(tern__bits(x) & (0u - (uint32_t)!(x <= 0.0f))); }
TERN__ANYWHERE float tern__where_positive(float x, float y) { return x > 0.0f ? y : 0.0f; }

#define TERN__ROOT_2_PI 0.7978845608f /* sqrt(2/pi): of tanh-GELU, and mean|w| over sigma of normal weights */
/* gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016). */
TERN__ANYWHERE float tern__gelu_tanh(float x) { return tern__tanh(TERN__ROOT_2_PI * (x + 0.044715f * (x * x * x))); }

/* Each function of x = a and z = b, beside what da and (of two operands) db get for dy: one list for every backend and tier.
   S: the suffix of a tier's functions of vectors, nothing for floats. */
#define TERN__MAPS(X, S)                                                                                               \
    X(S, ADD,   x + alpha * z,           dy,                            alpha * dy)                                    \
    X(S, MUL,   x * z,                   dy * z,                        dy * x)                                        \
    X(S, SCALE, alpha * x,               alpha * dy,                    dy)                                            \
    X(S, RELU,  tern__relu##S(x),        tern__where_positive##S(x, dy), dy)                                           \
    X(S, RELU2, tern__relu##S(x) * tern__relu##S(x), 2.0f * tern__relu##S(x) * dy, dy)                                 \
    X(S, SILU,  x * tern__sigmoid##S(x), dy * (tern__sigmoid##S(x) * (1.0f + x * (1.0f - tern__sigmoid##S(x)))), dy)   \
    X(S, GELU,  0.5f * x * (1.0f + tern__gelu_tanh##S(x)),                                                             \
             dy * (0.5f * (1.0f + tern__gelu_tanh##S(x)) + 0.5f * x * (1.0f - tern__gelu_tanh##S(x) * tern__gelu_tanh##S(x)) * \
                   (TERN__ROOT_2_PI * (1.0f + 0.134145f * (x * x)))), dy)

/* Sine and cosine by quarter turns; the reduction is good to float accuracy for |x| < 8192. */
TERN__ANYWHERE void tern__sincos(float x, float *sine, float *cosine)
{
    float n = tern__round(x * 0.636619772f), r, z, s, c;
    int32_t quarter = (int32_t)n & 3;
    r = x - n * 1.5703125f;
    r = r - n * 4.837512969970703125e-4f;
    r = r - n * 7.549789948768648e-8f;
    z = r * r;
    s = ((-1.9515296e-4f * z + 8.3321609e-3f) * z - 0.16666655f) * z * r + r;
    c = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * z * z - 0.5f * z + 1.0f;
    *sine = quarter & 1 ? c : s;
    *cosine = quarter & 1 ? s : c;
    if (quarter & 2) *sine = 0.0f - *sine;
    if (quarter == 1 || quarter == 2) *cosine = 0.0f - *cosine;
}

/* FNV-1a, for files and known answers. */
#define TERN__FNV_START UINT64_C(14695981039346656037)
static uint64_t tern__fnv(uint64_t hash, const uint8_t *p, size_t bytes)
{
    while (bytes--) hash = (hash ^ *p++) * UINT64_C(1099511628211);
    return hash;
}

#if defined(__GNUC__)
#define TERN__ALIGN64 __attribute__((aligned(64)))
#else
#define TERN__ALIGN64
#endif

/* The inner table of micro-kernels: all that differs between CPU tiers. Room 10, scalar, specifies it. */
enum {
    TERN__ROWS = 16,     /* rows of a panel */
    TERN__LANES = 32,    /* columns of a float tile */
    TERN__TOKENS = 256,  /* tokens of one dot call, at most */
    TERN__PANELS = 4,    /* panels of one dot call, at most */
    TERN__PAIRS = 512,   /* tokens times panels of one dot call, at most */
    TERN__I8_K = 256,    /* inputs of one int8 dot call */
    TERN__BLOCK = 1024,  /* floats of a canonical sum */
    TERN__SEGMENT = 2048, /* terms of a float dot product that are summed in one go */
    TERN__STRIP = 512,   /* rows of a call with float activations, */
    TERN__FEW = 12       /* and its tokens */
};

/* Exact dot products of some panels with some tokens: acc[panel][token][row] = sum of trit * q. Codes
   are trit + 1, so the sum of q is subtracted. With facc, the same over each of `groups` groups, one after the
   other, and facc[panel][token][row] = (float)acc * scale, summed in the order of the groups. */
typedef struct tern__dot {
    const uint8_t *panel; int64_t panel_stride; /* bytes from panel to panel */
    int64_t units, last_units, groups;          /* 64 bytes: 16 inputs each (2-bit) or 20 (base-3); of a group, of the last */
    const int8_t *q; int64_t q_stride;          /* -128..127, or bits */
    const int32_t *sum; int64_t sum_stride;     /* sums of a token's q, one for each group */
    int32_t panels, tokens;
    int32_t *acc;                               /* aligned to 64 */
    float *facc; int32_t add;                   /* add: to what facc holds */
    tern_type scale_type; const void *scale;    /* [panels][groups][16] */
    int64_t scale_stride;                       /* bytes from panel to panel */
} tern__dot;

/* Group g as a dot of its own, which adds to the groups before it. */
static inline tern__dot tern__dot_group(const tern__dot *d, int64_t g, int32_t inputs)
{
    tern__dot one = *d;
    const int64_t at = g * d->units;
    one.panel += at * 64;
    one.q += at * inputs;
    one.sum += g;
    if (g == d->groups - 1) one.units = d->last_units;
    one.add = g > 0;
    one.scale = (const uint8_t *)d->scale + g * TERN__ROWS * tern__type_bytes(d->scale_type);
    return one;
}

/* y[t][r] = v * (scale[t] * s[r]) + bias[r] for r < rows, v = (float)acc[t][r]; or, with facc,
   y[t][r] = facc[t][r] * scale[t] + bias[r]. bias NULL: no addition. */
typedef struct tern__emit {
    const int32_t *acc; const float *facc; /* [tokens][16] */
    const float *scale;                    /* [tokens] */
    const float *s, *bias;                 /* [16] */
    float *y; int64_t y_stride;
    int32_t tokens, rows;
} tern__emit;

/* Float activations with up to 12 tokens: p[token][16 panel + row] = (first ? 0 : p) + sum over i in [from, from + inputs),
   in order, of x[i - from][token] * trit, whose rounding makes no difference. Both bounds are multiples of 4: x of
   padding is 0. After an odd number of panels the next 16 columns of p are spoiled. */
typedef struct tern__float_dot {
    const uint8_t *panel; int64_t panel_stride; /* where input 0 lies; bytes from panel to panel */
    int64_t from, inputs;
    const float *x;                             /* [inputs][tokens] */
    float *p;                                   /* [tokens][TERN__STRIP] */
    int32_t base3, panels, tokens, first;
} tern__float_dot;

/* What all weights of an optimizer's step share. */
typedef struct tern__optimize_work { const tern_optimize_args *a; float factor, correct1, correct2; } tern__optimize_work;

/* Packed units of n inputs of up to 16 rows, `stride` elements apart, f32 or bf16: sign(x) where |x| > threshold[row], else and
   behind the ends 0. Of the 16 thresholds none is negative and those without a row are FLT_MAX. Of what lies at `ask` as many
   halves of the bytes of x are asked for. */
typedef struct tern__packing {
    tern_type type; const void *x;
    int64_t n, rows, stride;
    const float *threshold;
    uint8_t *unit;
    const uint8_t *ask;
    int32_t halves, base3;
} tern__packing;

/* Random halves: those of block b are the eight of Philox (seed, b, step, stream). */
typedef struct tern__random { uint64_t seed; uint32_t step, stream; } tern__random;

/* A step of n weights that lie in a row, whose halves begin `skip` behind the first of `block`. events [2] grow by flips and
   by weights that stay at theta. */
typedef struct tern__push {
    tern__random random;
    int32_t sign;         /* the rule */
    int32_t factor;       /* kq, or the sign's step */
    int32_t theta;
    float inverse;        /* 256 / mean */
} tern__push;

/* A product of float tiles: sum[i][lane] = (first ? 0 : p[i][lane]) + sum over j < k, in order, of a[j][i] * b[j][lane]
   for up to tern__kernels.rows rows i and 32 lanes. It goes to p, or where c is set to c: c = (add ? c + : ) sum. */
typedef struct tern__tile {
    int64_t k;
    const float *a, *b;         /* a: [k][tern__kernels.rows], b: [k][32] */
    float *p;                   /* [rows][32] */
    float *c; int64_t c_row;
    int32_t rows, first, add;
} tern__tile;

/* Float products of factors that are rounded to bf16: two terms lie in one word, the first in its low half. */
typedef struct tern__pairs {
    /* Up to 16 rows of a, each term times its scale: to [len / 32, rounded up][16][16 words], zeros where there is nothing. */
    void (*pack_a)(int64_t rows, int64_t len, const float *a, int64_t a_row, int64_t a_col, const float *scale, float *to);
    void (*pack_b)(int64_t len, const float *b, float *to); /* up to 32 terms of b [len][32]: to [16][32 words], the same */
    void (*tiles)(const tern__tile *t); /* as tile, of such words and any number of rows; p has memory for a multiple of 16 */
} tern__pairs;

/* Some edges of one row, at most TERN__EDGES: y = whole * the sum over them, in order from +0, of x[u] * factor, or float(q[u])
   * factor, with the signed factor of tern__edge_factor; products and sums are rounded separately. From the first of them on
   there are `left` entries in all. */
typedef struct tern__neighbours {
    int64_t n, left, cols;
    float whole;
    const uint32_t *entry;
    const float *right, *scale;  /* or NULL */
    const float *x;
    const int8_t *q;             /* instead; readable up to the next multiple of 16 columns */
    int64_t row;                 /* elements from row to row */
    float *y;
} tern__neighbours;

typedef struct tern__kernels {
    void (*negate)(int64_t n, const uint32_t *signs, const float *x, float *y); /* y = x, but -x where bit i % 32 of word i / 32 is set */
    void (*hadamard)(int64_t p, float factor, float *x); /* x * factor, then a + b and a - b at distances 1, 2, .. p/2 */
    void (*dot_2bit)(const tern__dot *d);
    void (*dot_base3)(const tern__dot *d);
    void (*emit)(const tern__emit *e);
    void (*tile)(const tern__tile *t);       /* product and sum are rounded separately */
    void (*tile_fused)(const tern__tile *t); /* one rounding where the tier has FMA */
    /* to[j * to_step + l] = from[l * step + j] for lanes l and j < len; up to 7 floats behind the lanes of each j are
       spoiled before lanes of the next j are written, so to_step >= lanes will do. */
    void (*columns)(int64_t lanes, int64_t len, const float *from, int64_t step, float *to, int64_t to_step);
    /* For a tile; 16 floats behind are spoiled. */
    void (*pack_a)(int64_t rows, int64_t len, const float *a, int64_t a_row, int64_t a_col, float *to);
    /* b[j][lane] = q[j * stride + lane] * scale[j]; up to 32 lanes */
    void (*scaled)(int64_t len, int64_t lanes, const int8_t *q, int64_t stride, const float *scale, float *b);
    void (*trits)(int32_t base3, int64_t units, const uint8_t *unit, int8_t *t); /* of up to 3 units: t[row][64] */
    float (*sum)(int32_t kind, int64_t n, const float *x);              /* canonical, n <= 1024, kind a tern_sum_kind */
    /* The same of |x|, f32 or bf16, but 0 where it is not above delta; counts those that are. A negative delta: of all. What
       lies at `ask`, or NULL, is wanted next: half as many bytes as x has are asked for. */
    float (*sum_above)(tern_type type, int64_t n, const void *x, const uint8_t *ask, float delta, int64_t *count);
    uint32_t (*absmax)(int64_t n, const float *x, const float *gain);   /* largest bits of |x gain|: NaN and Inf win */
    /* q = rne(x gain inverse), |it| < 2^22, held to -most - 1..most; their sum */
    int32_t (*round)(int64_t n, const float *x, const float *gain, float inverse, int32_t most, int8_t *q);
    /* The same dots with bytes in place of trits, for any number of tokens: a unit is a quad, whose byte 4r+j is code
       0..255 of row r and input j of four; at most TERN__I8_K / 4 units; panels aligned to 64; q may be -128. Modulo
       2^32, acc[token * acc_row + 16 panel + row] = (add ? what it was : 0) - sum + sum of code * q. */
    void (*dot_i8)(const tern__dot *d, int64_t acc_row, int32_t add);
    void (*floats)(const tern__float_dot *f);
    void (*dot_bits)(const tern__dot *d, tern_type encoding); /* as dot_2bit and dot_base3, on bits ([TERN-9]) */
    void (*widen)(tern_type type, int64_t n, const void *from, float *to); /* f16 or bf16 */
    void (*ternarize)(const tern__packing *p);
    void (*optimize)(const tern__optimize_work *w, int64_t begin, int64_t end); /* of these weights; begin is a multiple of 4 */
    /* q = floor(x gain row inverse + u), products in this order, held to +-127, u from the halves from `block` on; gain or NULL */
    void (*round_up)(const tern__random *r, uint64_t block, int64_t n, const float *x, const float *gain, float row,
                     float inverse, int8_t *q);
    void (*push)(const tern__push *p, uint64_t block, int64_t skip, int64_t n, float *grad, int8_t *accum, int8_t *trit,
                 int32_t *events); /* see tern__push */
    void (*aggregate)(const tern__neighbours *a); /* see tern__neighbours */
    void (*map)(const tern_map_args *a, int64_t begin, int64_t end); /* of these elements */
    float (*largest)(int64_t n, const float *x); /* x[0] where that is NaN, and past other NaN */
    void (*exps)(int64_t n, const float *x, float scale, float shift, float *y); /* y = exp(x * scale - shift); y may be x */
    int32_t tokens; /* that a dot call should get: many share what is decoded once, few keep their activations in L1 */
    int32_t rows;   /* of a float tile */
    const tern__pairs *pairs; /* or NULL */
} tern__kernels;

/* Canonical sum of any number of floats (algorithm: blocks of 1024, then the same rule over the block
   sums): block sums are pushed in order; level i holds sums of 1024^i blocks. */
typedef struct tern__tree { const tern__kernels *k; int64_t count[4]; float level[4][TERN__BLOCK]; } tern__tree;

static void tern__tree_init(tern__tree *t, const tern__kernels *k) { t->k = k; memset(t->count, 0, sizeof t->count); }

static void tern__tree_push(tern__tree *t, float block_sum)
{
    int32_t i;
    for (i = 0; i < 4; i++) {
        t->level[i][t->count[i]++] = block_sum;
        if (t->count[i] < TERN__BLOCK || i == 3) return;
        block_sum = t->k->sum(TERN_SUM, TERN__BLOCK, t->level[i]);
        t->count[i] = 0;
    }
}

static float tern__tree_total(tern__tree *t)
{
    int32_t i, above;
    float total = 0.0f;
    for (i = 0; i < 4; i++) {
        if (t->count[i] == 0) continue;
        for (above = i + 1; above < 4 && t->count[above] == 0;) above++;
        if (above == 4) return t->count[i] == 1 ? t->level[i][0] : t->k->sum(TERN_SUM, t->count[i], t->level[i]);
        total = t->k->sum(TERN_SUM, t->count[i], t->level[i]);
        t->count[i] = 0;
        t->level[i + 1][t->count[i + 1]++] = total;
    }
    return total;
}

static float tern__sum_of(const tern__kernels *k, tern_sum_kind kind, int64_t n, const float *x)
{
    tern__tree tree;
    int64_t i;
    if (n <= TERN__BLOCK) return k->sum((int32_t)kind, n, x);
    tern__tree_init(&tree, k);
    for (i = 0; i < n; i += TERN__BLOCK) tern__tree_push(&tree, k->sum((int32_t)kind, tern__min(TERN__BLOCK, n - i), x + i));
    return tern__tree_total(&tree);
}

/* Work in ranges of [0, items): body(job, begin, end) on as many tasks as the work is worth. A body
   reports the first index it had to take as zero; the smallest of all tasks comes back, or INT64_MAX. */
typedef struct tern__job tern__job;
typedef void tern__body(tern__job *job, int64_t begin, int64_t end, int64_t *bad);
struct tern__job {
    tern__body *body;
    const tern__kernels *k;
    void *state; /* the run's */
    const void *arg;
    int64_t items;
    int32_t tasks;
    int64_t bad[TERN__WORKERS];
};

static void tern__job_task(void *arg, int32_t i)
{
    tern__job *job = (tern__job *)arg;
    tern__fp_mode mode = tern__fp_enter();
    int64_t share = job->items / job->tasks, extra = job->items % job->tasks;
    int64_t begin = i * share + tern__min(i, extra);
    job->body(job, begin, begin + share + (i < extra), &job->bad[i]);
    tern__fp_leave(mode);
}

/* cost: of one item, in about a tenth of a nanosecond. A task is worth waking a thread from 20 us on
   (the tests set less, so that threads share small shapes too). */
#ifndef TERN__TASK_COST
#define TERN__TASK_COST 200000
#endif
static int64_t tern__for(tern_run *r, tern__body *body, const void *arg, int64_t items, int64_t cost)
{
    tern__job job;
    int64_t bad = INT64_MAX, worth = 1 + tern__min(tern__mul(items, cost) / TERN__TASK_COST, TERN__WORKERS - 1);
    int32_t i;
    job.body = body;
    job.k = (const tern__kernels *)r->backend->data;
    job.state = r->state;
    job.arg = arg;
    job.items = items;
    job.tasks = (int32_t)tern__min(tern__min(items, worth), r->parallel.run ? tern__min(r->parallel.workers, TERN__WORKERS) : 1);
    for (i = 0; i < job.tasks; i++) job.bad[i] = INT64_MAX;
    if (job.tasks == 1) tern__job_task(&job, 0);
    else if (job.tasks > 1) r->parallel.run(r->parallel.user, tern__job_task, &job, job.tasks);
    for (i = 0; i < job.tasks; i++) bad = tern__min(bad, job.bad[i]);
    return bad;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-7] Ternarize: scales and thresholds
   What enters: finite floats. What leaves: for each grain a stored scale and the threshold above which
   a weight is +-1. Called by the ternarize operation in room 8.
   ------------------------------------------------------------------------------------------------ */

/* Weights beyond 2^96 would overflow the sums, so they count as not finite. */
TERN__ANYWHERE int32_t tern__weight_ok(float w) { return (tern__bits(w) & 0x7FFFFFFFu) < 0x6F800000u; }

/* Up to 1024 elements from i on as floats: where they lie, or converted into the buffer. */
static const float *tern__floats_at(const tern__kernels *k, tern_type type, const void *x, int64_t i, int64_t n, float *buffer)
{
    if (type != TERN_BF16 && type != TERN_F16) return (const float *)x + i;
    k->widen(type, n, (const uint16_t *)x + i, buffer);
    return buffer;
}

static const float *tern__load_block(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, float *buffer)
{
    return tern__floats_at(k, a->type, a->w, i, n, buffer);
}

/* Canonical sum over n weights from element i: of the |w| above delta (all, for a negative delta), counted. */
static float tern__sum_block(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, const uint8_t *ask,
                             float delta, int64_t *count)
{
    float buffer[TERN__BLOCK] TERN__ALIGN64;
    if (a->type == TERN_BF16) return k->sum_above(TERN_BF16, n, (const uint16_t *)a->w + i, ask, delta, count);
    return k->sum_above(TERN_F32, n, tern__load_block(k, a, i, n, buffer), ask, delta, count);
}

static float tern__sum_row(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, const uint8_t *ask,
                           float delta, int64_t *count)
{
    const int64_t step = TERN__BLOCK * tern__type_bytes(a->type) / 2;
    tern__tree tree;
    int64_t len;
    if (n <= TERN__BLOCK) return tern__sum_block(k, a, i, n, ask, delta, count);
    tern__tree_init(&tree, k);
    for (; n > 0; i += len, n -= len, ask = ask ? ask + step : NULL)
        tern__tree_push(&tree, tern__sum_block(k, a, i, len = tern__min(n, TERN__BLOCK), ask, delta, count));
    return tern__tree_total(&tree);
}

/* A sum of |w| below this proves its weights good; it may be their mean, for rows are no longer than 2^18. */
#define TERN__SURE 3.0223145490365729e23f /* 2^78 */

/* The first bad one of n weights from element i, or INT64_MAX. */
static int64_t tern__first_bad(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n)
{
    float buffer[TERN__BLOCK] TERN__ALIGN64;
    int64_t len, j, count = 0;
    for (; n > 0; i += len, n -= len) {
        const float *w;
        len = tern__min(TERN__BLOCK, n);
        if (tern__sum_block(k, a, i, len, NULL, -1.0f, &count) < TERN__SURE) continue;
        w = tern__load_block(k, a, i, len, buffer);
        for (j = 0; j < len; j++)
            if (!tern__weight_ok(w[j])) return i + j;
    }
    return INT64_MAX;
}

/* Items are blocks of 1024 weights. */
static void tern__scan_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_ternarize_args *a = (const tern_ternarize_args *)job->arg;
    const int64_t i = begin * TERN__BLOCK;
    *bad = tern__first_bad(job->k, a, i, tern__min(end * TERN__BLOCK, a->m.rows * a->m.cols) - i);
}

/* Sums of rows, 1024 at a time; the first bad weight comes back from those of all |w|. */
typedef struct tern__rows_work { const tern_ternarize_args *a; int64_t row0; float delta; float *sums; int64_t *counts; } tern__rows_work;

static void tern__rows_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__rows_work *w = (const tern__rows_work *)job->arg;
    const int64_t cols = w->a->m.cols;
    int64_t i;
    for (i = begin; i < end && *bad == INT64_MAX; i++) {
        const int64_t first = (w->row0 + i) * cols;
        w->counts[i] = 0;
        w->sums[i] = tern__sum_row(job->k, w->a, first, cols, NULL, w->delta, &w->counts[i]);
        if (w->delta < 0.0f && !(w->sums[i] < TERN__SURE)) *bad = tern__first_bad(job->k, w->a, first, cols);
    }
}

/* Their mean over the tensor: the canonical sum of the row sums, through the count. */
static float tern__tensor_mean(tern_run *run, const tern_ternarize_args *a, float delta, int64_t *bad)
{
    float sums[TERN__BLOCK];
    int64_t counts[TERN__BLOCK], count = 0, i;
    tern__rows_work w;
    tern__tree tree;
    tern__tree_init(&tree, (const tern__kernels *)run->backend->data);
    w.a = a;
    w.delta = delta;
    w.sums = sums;
    w.counts = counts;
    for (w.row0 = 0; w.row0 < a->m.rows; w.row0 += TERN__BLOCK) {
        const int64_t rows = tern__min(TERN__BLOCK, a->m.rows - w.row0);
        *bad = tern__for(run, tern__rows_body, &w, rows, a->m.cols);
        if (*bad != INT64_MAX) return 0.0f;
        for (i = 0; i < rows; i++) {
            tern__tree_push(&tree, sums[i]);
            count += counts[i];
        }
    }
    return count ? tern__tree_total(&tree) / (float)count : 0.0f;
}

/* And over n weights of a row. */
static float tern__row_mean(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, const uint8_t *ask,
                            float delta)
{
    int64_t count = 0;
    const float sum = tern__sum_row(k, a, i, n, ask, delta, &count);
    return count ? sum / (float)count : 0.0f;
}

TERN__ANYWHERE float tern__twn_delta(float mean) { return 0.7f * mean; }

static int64_t tern__learned_scales(tern_rule rule, const tern_matrix *m) { return rule == TERN_SEQ ? m->rows : 1; }
TERN__ANYWHERE int32_t tern__is_learned(tern_rule rule) { return rule == TERN_LSQ || rule == TERN_SEQ; }

TERN__ANYWHERE int32_t tern__is_statistic(tern_rule rule) { return rule == TERN_ABSMEAN || rule == TERN_ABSMEAN_SIGMA || rule == TERN_TWN; }

/* The learned scale of a grain, as ternarize uses it, from where it starts. */
TERN__ANYWHERE float tern__learned_scale(const tern_ternarize_args *a, int64_t i, float start)
{
    const float alpha = a->alpha[i] == 0.0f ? start : a->alpha[i];
    a->alpha[i] = alpha < 1e-5f ? 1e-5f : alpha;
    return a->rule == TERN_SEQ ? a->alpha[i] / 1.5f : a->alpha[i];
}

/* A running average goes on from the scale that is stored. */
TERN__ANYWHERE float tern__averaged_scale(const tern_ternarize_args *a, int64_t i, float alpha)
{
    const float old = tern__load_scale(a->m.scale_type, a->m.scales, i);
    return old > 0.0f && tern__weight_ok(old) ? a->rho * old + (1.0f - a->rho) * alpha : alpha;
}

/* Stores a grain's scale at index i, from the mean of |w| and (TWN) of those above delta, and returns the threshold; a
   GIVEN scale is there, a learned one starts at `mean` (SEQ: the largest |w|). No weight is above the threshold of a zero scale. */
TERN__ANYWHERE float tern__settle_grain(const tern_ternarize_args *a, int64_t i, float mean, float above)
{
    float alpha = a->rule == TERN_TWN ? above : a->rule == TERN_ABSMEAN_SIGMA ? mean / TERN__ROOT_2_PI : mean, scale;
    if (tern__is_learned(a->rule)) alpha = tern__learned_scale(a, i, mean);
    if (a->rho > 0.0f) alpha = tern__averaged_scale(a, i, alpha);
    scale = a->rule == TERN_GIVEN ? tern__load_scale(a->m.scale_type, a->m.scales, i)
                                  : tern__store_scale(a->m.scale_type, a->m.scales, i, alpha);
    if (scale == 0.0f) return FLT_MAX;
    return a->rule == TERN_TWN ? tern__twn_delta(mean) : 0.5f * scale;
}

/* The largest |w| of n weights from element i. */
static float tern__row_max(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n)
{
    float buffer[TERN__BLOCK];
    uint32_t bits = 0;
    int64_t len;
    for (; n > 0; i += len, n -= len) {
        const float *w = tern__load_block(k, a, i, len = tern__min(n, TERN__BLOCK), buffer);
        const uint32_t some = k->absmax(len, w, NULL);
        if (some > bits) bits = some;
    }
    return tern__float(bits);
}

/* Whether a rule asks for a statistic of the grain whose scale lies at index i. */
static int32_t tern__needs_statistic(const tern_ternarize_args *a, int64_t i)
{
    return a->rule != TERN_GIVEN && !(tern__is_learned(a->rule) && a->alpha[i] != 0.0f);
}

/* Whether n weights from element i are good beyond doubt. */
static int32_t tern__sure(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, const uint8_t *ask)
{
    int64_t count = 0;
    return tern__sum_row(k, a, i, n, ask, -1.0f, &count) < TERN__SURE;
}

/* The grain of n weights from element i, whose scale lies at index `at`: its threshold. suspect becomes 1 where a
   weight may be bad; with NULL nobody asks. */
static float tern__apply_rule(const tern__kernels *k, const tern_ternarize_args *a, int64_t i, int64_t n, int64_t at,
                              const uint8_t *ask, int32_t *suspect)
{
    const int32_t needs = tern__needs_statistic(a, at);
    float mean = 0.0f, above = 0.0f;
    if (needs) mean = a->rule == TERN_SEQ ? tern__row_max(k, a, i, n) : tern__row_mean(k, a, i, n, ask, -1.0f);
    if (a->rule == TERN_TWN) above = tern__row_mean(k, a, i, n, NULL, tern__twn_delta(mean));
    if (suspect && !(needs ? mean < TERN__SURE : tern__sure(k, a, i, n, ask))) *suspect = 1;
    return tern__settle_grain(a, at, mean, above);
}

/* What decides over weight i: itself, or near the threshold, with noise. u is an odd number of 2^-24. */
TERN__ANYWHERE float tern__decisive(const tern_ternarize_args *a, int64_t i, float w, float scale, float threshold)
{
    uint32_t random[4];
    float u;
    if (!(tern__abs(tern__abs(w) - threshold) < a->zone * scale)) return w;
    tern__philox(a->seed, (uint64_t)(i >> 2), a->step, a->stream, random);
    u = (float)(2 * (int32_t)(random[i & 3] >> 8) - 16777215) * 5.9604644775390625e-8f;
    return w + a->noise * scale * u;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-8] Pack
   What enters: trits and scales. What leaves: panels of 16 rows. A 2-bit unit of 64 bytes holds 16
   inputs of the 16 rows, a base-3 unit 20: bytes 4r..4r+3 belong to row r, digit s of byte j to input
   4s + j, as code trit + 1. A group starts a new unit; padding is trit 0. Called by rooms 14 to 21.
   ------------------------------------------------------------------------------------------------ */

enum { TERN__UNIT = 64 }; /* bytes of a unit */

/* The geometry that follows from a matrix. */
typedef struct tern__shape {
    int64_t unit;         /* inputs per unit */
    int64_t group;        /* inputs per group (cols without groups) */
    int64_t groups;
    int64_t group_units;  /* units of a full group */
    int64_t units;        /* units of a row */
    int64_t stride;       /* of int8 activations, from token to token */
    int64_t panels, panel_bytes;
    int64_t scales;       /* stored scales */
} tern__shape;

/* Activations lie an odd number of 64-byte lines apart: sixteen tokens then never share a set of a cache,
   as they would at a multiple of 4096. */
TERN__ANYWHERE tern__shape tern__shape_of(const tern_matrix *m)
{
    tern__shape s;
    s.unit = m->encoding == TERN_BASE3 ? 20 : 16;
    s.group = m->grain > 0 ? m->grain : m->cols;
    s.groups = tern__ceil_div(m->cols, s.group);
    s.group_units = tern__ceil_div(s.group, s.unit);
    s.units = (s.groups - 1) * s.group_units + tern__ceil_div(m->cols - (s.groups - 1) * s.group, s.unit);
    s.stride = (tern__ceil_div(s.units * s.unit, 64) | 1) * 64;
    s.panels = tern__ceil_div(m->rows, TERN__ROWS);
    s.panel_bytes = s.units * TERN__UNIT;
    s.scales = m->grain == TERN_PER_TENSOR ? 1 : s.panels * TERN__ROWS * s.groups;
    return s;
}

TERN__ANYWHERE int64_t tern__group_cols(const tern_matrix *m, const tern__shape *s, int64_t g)
{
    return tern__min(s->group, m->cols - g * s->group);
}
TERN__ANYWHERE int64_t tern__group_run(const tern_matrix *m, const tern__shape *s, int64_t g)
{
    return tern__ceil_div(tern__group_cols(m, s, g), s->unit);
}

/* Index of the scale of a row and group. */
TERN__ANYWHERE int64_t tern__scale_index(const tern_matrix *m, const tern__shape *s, int64_t row, int64_t g)
{
    return m->grain == TERN_PER_TENSOR ? 0 : (row / TERN__ROWS * s->groups + g) * TERN__ROWS + row % TERN__ROWS;
}

/* The scales of a panel's rows: where they lie, or filled into `out`. */
static const float *tern__panel_scales(const tern_matrix *m, const tern__shape *s, int64_t panel, int64_t g, float out[TERN__ROWS])
{
    int64_t r;
    if (m->grain != TERN_PER_TENSOR && tern__type_bytes(m->scale_type) == (int64_t)sizeof(float))
        return (const float *)m->scales + tern__scale_index(m, s, panel * TERN__ROWS, g);
    for (r = 0; r < TERN__ROWS; r++)
        out[r] = tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, s, panel * TERN__ROWS + r, g));
    return out;
}

/* The layout limits: cols, so that an int32 dot product cannot overflow (2 * 127 * cols, and sixteen times
   more where kernels keep shifted codes); rows and products of sizes by checked arithmetic. */
enum { TERN__MAX_COLS = 1 << 18, TERN__MAX_GRAIN = 1 << 18 };

static int32_t tern__is_scale_type(tern_type t) { return t == TERN_F32 || t == TERN_F16 || t == TERN_POW2 || t == TERN_LOG; }

static tern_result tern__check_matrix(tern_run *r, const char *op, const tern_matrix *m)
{
    TERN__REQUIRE(r, m->rows > 0 && m->cols > 0, TERN_E_SHAPE, "%s: matrix is %d x %d; both must be positive", op, m->rows, m->cols);
    TERN__REQUIRE(r, m->cols <= TERN__MAX_COLS, TERN_E_SHAPE,
                  "%s: K = %d exceeds %d, the limit of exact int32 sums", op, m->cols, (int64_t)TERN__MAX_COLS);
    TERN__REQUIRE(r, m->grain >= TERN_PER_ROW && m->grain <= TERN__MAX_GRAIN, TERN_E_ARGUMENT,
                  "%s: grain %d is neither 0, -1 nor a group size up to %d", op, (int64_t)m->grain, (int64_t)TERN__MAX_GRAIN);
    TERN__REQUIRE(r, m->encoding == TERN_TYPE_DEFAULT || m->encoding == TERN_2BIT || m->encoding == TERN_BASE3, TERN_E_ARGUMENT,
                  "%s: encoding %d is not TERN_2BIT or TERN_BASE3", op, (int64_t)(int32_t)m->encoding);
    TERN__REQUIRE(r, m->scale_type == TERN_TYPE_DEFAULT || tern__is_scale_type(m->scale_type), TERN_E_ARGUMENT,
                  "%s: scale type %d is not TERN_F32, TERN_F16, TERN_POW2 or TERN_LOG", op, (int64_t)(int32_t)m->scale_type);
    TERN__REQUIRE(r, tern__fits(tern__mul(tern__mul(tern__add(m->rows, 15), m->cols), 128)), TERN_E_OVERFLOW,
                  "%s: a matrix of %d x %d overflows", op, m->rows, m->cols);
    return TERN_OK;
}

TERN_API tern_result tern_matrix_bytes(tern_context *c, const tern_matrix *m, size_t *trits, size_t *scales)
{
    tern__shape s;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, m && trits && scales, TERN_E_ARGUMENT, "matrix_bytes: an argument is NULL");
    TERN__TRY(tern__check_matrix(&c->run, "matrix_bytes", m));
    s = tern__shape_of(m);
    *trits = (size_t)(s.panels * s.panel_bytes);
    *scales = (size_t)(s.scales * tern__type_bytes(m->scale_type));
    return TERN_OK;
}

TERN_API tern_result tern_activation_shape(tern_context *c, const tern_matrix *m, int64_t *stride, int64_t *groups)
{
    tern__shape s;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, m && stride && groups, TERN_E_ARGUMENT, "activation_shape: an argument is NULL");
    TERN__TRY(tern__check_matrix(&c->run, "activation_shape", m));
    s = tern__shape_of(m);
    *stride = s.stride;
    *groups = s.groups;
    return TERN_OK;
}

/* One unit from its trits, [row][input], rows `stride` apart. */
typedef int8_t tern__unit_trits[TERN__ROWS][20];

TERN__ANYWHERE uint8_t tern__pack_byte(tern_type encoding, const int8_t *d) /* digits 0, 4, 8, ... */
{
    return (uint8_t)(encoding == TERN_BASE3 ? 121 + d[0] + 3 * d[4] + 9 * d[8] + 27 * d[12] + 81 * d[16]
                                            : 85 + d[0] + 4 * d[4] + 16 * d[8] + 64 * d[12]);
}

static void tern__pack_unit(tern_type encoding, const int8_t *t, int64_t stride, uint8_t *unit)
{
    int32_t r, j;
    for (r = 0; r < TERN__ROWS; r++)
        for (j = 0; j < 4; j++) unit[4 * r + j] = tern__pack_byte(encoding, t + r * stride + j);
}

/* The inverse, for one row: `unit` trits. Returns whether every code is valid. */
TERN__ANYWHERE int32_t tern__unpack_unit(tern_type encoding, const uint8_t *unit, int64_t row, int8_t *t)
{
    int64_t s, j;
    int32_t valid = 1;
    for (j = 0; j < 4; j++) {
        uint32_t byte = unit[4 * row + j];
        if (encoding == TERN_BASE3) {
            valid &= byte < 243;
            for (s = 0; s < 5; s++, byte /= 3) t[4 * s + j] = (int8_t)((int32_t)(byte % 3) - 1);
        } else {
            valid &= (byte & byte >> 1 & 0x55) == 0; /* code 3 */
            for (s = 0; s < 4; s++, byte >>= 2) t[4 * s + j] = (int8_t)((int32_t)(byte & 3) - 1);
        }
    }
    return valid;
}

/* Four columns of 16 words, `step` bytes apart, as 16 lines of four words, to_step bytes apart. */
static void tern__four_columns(const void *__restrict from, int64_t step, void *__restrict to, int64_t to_step)
{
    uint32_t in[4][TERN__ROWS], line[4 * TERN__ROWS];
    int32_t i;
    for (i = 0; i < 4; i++) memcpy(in[i], (const uint8_t *)from + i * step, sizeof in[i]);
    for (i = 0; i < TERN__ROWS; i++) {
        line[4 * i] = in[0][i];
        line[4 * i + 1] = in[1][i];
        line[4 * i + 2] = in[2][i];
        line[4 * i + 3] = in[3][i];
    }
    for (i = 0; i < TERN__ROWS; i++) memcpy((uint8_t *)to + i * to_step, line + 4 * i, 16);
}

/* All rows of a unit, `stride` apart, digit by digit: four inputs of each row. Constant trip counts and no overlap,
   so that compilers vectorise at -O2. */
static void tern__unpack_rows(tern_type encoding, const uint8_t *__restrict unit, int64_t stride, int8_t *__restrict t)
{
    uint8_t code[TERN__UNIT];
    int8_t digit[5][TERN__UNIT];
    int32_t i, s;
    memcpy(code, unit, sizeof code);
    if (encoding == TERN_BASE3) {
        for (s = 0; s < 5; s++)
            for (i = 0; i < TERN__UNIT; i++) {
                const uint8_t third = (uint8_t)((uint16_t)(code[i] * 171) >> 9); /* code / 3 for bytes */
                digit[s][i] = (int8_t)(code[i] - 3 * third - 1);
                code[i] = third;
            }
        for (i = 0; i < TERN__ROWS; i++) memcpy(t + i * stride + 16, digit[4] + 4 * i, 4);
    } else
        for (s = 0; s < 4; s++)
            for (i = 0; i < TERN__UNIT; i++) digit[s][i] = (int8_t)((code[i] >> 2 * s & 3) - 1);
    tern__four_columns(digit, TERN__UNIT, t, stride);
}

/* Trits [col, col + n) of a row; any range. */
static void tern__unpack_range(const tern_matrix *m, const tern__shape *s, int64_t row, int64_t col, int64_t n, int8_t *t)
{
    const uint8_t *panel = (const uint8_t *)m->trits + row / TERN__ROWS * s->panel_bytes;
    int8_t unit[20];
    while (n > 0) {
        int64_t g = col / s->group, in_group = col - g * s->group;
        int64_t u = g * s->group_units + in_group / s->unit, from = in_group % s->unit;
        int64_t len = tern__min(tern__min(n, s->unit - from), tern__group_cols(m, s, g) - in_group);
        tern__unpack_unit(m->encoding, panel + u * TERN__UNIT, row % TERN__ROWS, unit);
        memcpy(t, unit + from, (size_t)len);
        t += len;
        col += len;
        n -= len;
    }
}

/* Ternarize and pack, panel by panel. */
typedef struct tern__ternarize_work {
    const tern_ternarize_args *a;
    tern__shape s;
    float threshold; /* of the tensor, where the grain is the tensor */
    uint8_t *undo;   /* trits, scales and alpha before the call, or NULL: then the weights are known to be good */
} tern__ternarize_work;

enum { TERN__NARROW = 320 }; /* inputs that are copied before they are packed: whole units of both encodings */

/* n weights of a row and group, from element `first` on, as noise near the threshold decides them. */
static void tern__add_noise(const tern__ternarize_work *w, int64_t row, int64_t g, int64_t first, int64_t n, float threshold, float *x)
{
    const tern_matrix *m = &w->a->m;
    const float scale = tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, &w->s, row, g));
    int64_t j;
    for (j = 0; j < n; j++) x[j] = tern__decisive(w->a, first + j, x[j], scale, threshold);
}

/* A group of a panel; suspect as for tern__apply_rule. Of the panel that comes next a whole one asks for its share, as one
   stretch of memory: half of it by a pass over these weights, where there is one, and the rest while they are packed. */
static void tern__ternarize_group(const tern__kernels *k, const tern__ternarize_work *w, int64_t panel, int64_t g, int32_t *suspect)
{
    const tern_ternarize_args *a = w->a;
    const tern_matrix *m = &a->m;
    const int64_t row = panel * TERN__ROWS, rows = tern__min(TERN__ROWS, m->rows - row);
    const int64_t col = g * w->s.group, cols = tern__group_cols(m, &w->s, g), bytes = tern__type_bytes(a->type);
    const int32_t narrow = a->type == TERN_BF16 || a->type == TERN_F16, copied = a->type == TERN_F16 || a->noise > 0.0f;
    const int32_t whole = m->grain == TERN_PER_TENSOR, passes = suspect || (!whole && tern__is_statistic(a->rule));
    const int32_t asks = panel > 0 && rows == TERN__ROWS && !copied;
    const uint8_t *ask = (const uint8_t *)a->w + (asks ? (row - TERN__ROWS) * m->cols + rows * col : 0) * bytes;
    uint8_t *unit = (uint8_t *)m->trits + panel * w->s.panel_bytes + g * w->s.group_units * TERN__UNIT;
    float buffer[TERN__ROWS * TERN__NARROW] TERN__ALIGN64, threshold[TERN__ROWS];
    tern__packing p;
    int64_t r, i;
    for (r = 0; r < rows; r++) {
        const int64_t first = (row + r) * m->cols + col;
        const uint8_t *next = asks ? ask : NULL;
        if (whole && suspect && !tern__sure(k, a, first, cols, next)) *suspect = 1;
        threshold[r] = w->threshold;
        if (!whole) threshold[r] = tern__apply_rule(k, a, first, cols, tern__scale_index(m, &w->s, row + r, g), next, suspect);
        if (asks && passes) ask += cols * bytes / 2;
    }
    for (; r < TERN__ROWS; r++) {
        threshold[r] = FLT_MAX;
        if (!whole) tern__store_scale(m->scale_type, m->scales, tern__scale_index(m, &w->s, row + r, g), 0.0f);
    }
    p.type = copied ? TERN_F32 : a->type;
    p.rows = rows;
    p.stride = copied ? (int64_t)TERN__NARROW : m->cols;
    p.threshold = threshold;
    p.ask = ask;
    p.halves = !asks ? 0 : passes ? 1 : 2;
    p.base3 = m->encoding == TERN_BASE3;
    for (i = 0; i < cols; i += p.n) {
        const int64_t at = row * m->cols + col + i;
        p.x = copied ? (const void *)buffer : (const uint8_t *)a->w + at * bytes;
        p.n = tern__min(copied ? (int64_t)TERN__NARROW : cols, cols - i);
        p.unit = unit + i / w->s.unit * TERN__UNIT;
        for (r = 0; copied && r < rows; r++) {
            float *to = buffer + r * TERN__NARROW;
            if (narrow) k->widen(a->type, p.n, (const uint16_t *)a->w + at + r * m->cols, to);
            else memcpy(to, (const float *)a->w + at + r * m->cols, sizeof(float) * (size_t)p.n);
            if (a->noise > 0.0f) tern__add_noise(w, row + r, g, at + r * m->cols, p.n, threshold[r], to);
        }
        k->ternarize(&p);
    }
}

/* Bytes of trits, scales and alpha. */
typedef struct tern__state { int64_t trits, scales, alpha; } tern__state;

static tern__state tern__state_of(const tern_ternarize_args *a, const tern__shape *s)
{
    tern__state b;
    b.trits = s->panels * s->panel_bytes;
    b.scales = s->scales * tern__type_bytes(a->m.scale_type);
    b.alpha = tern__is_learned(a->rule) ? tern__learned_scales(a->rule, &a->m) * (int64_t)sizeof(float) : 0;
    return b;
}

/* Scales and alpha are small: all at once. Trits: `bytes` of them from byte `at`. */
static void tern__copy_scales(const tern__ternarize_work *w, int32_t back)
{
    const tern__state b = tern__state_of(w->a, &w->s);
    uint8_t *scales = w->undo + b.trits, *alpha = scales + b.scales;
    memcpy(back ? w->a->m.scales : scales, back ? scales : w->a->m.scales, (size_t)b.scales);
    if (b.alpha) memcpy(back ? (uint8_t *)w->a->alpha : alpha, back ? alpha : (uint8_t *)w->a->alpha, (size_t)b.alpha);
}

/* From the last panel on: a pass before has read that last, so it is in cache. The panel that comes next is on its way
   while this one is packed, and its statistics find it in cache. */
static void tern__ternarize_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__ternarize_work *w = (const tern__ternarize_work *)job->arg;
    const tern_ternarize_args *a = w->a;
    int64_t panel, g;
    for (panel = end - 1; panel >= begin; panel--) {
        const int64_t row = panel * TERN__ROWS, rows = tern__min(TERN__ROWS, a->m.rows - row), at = panel * w->s.panel_bytes;
        int32_t suspect = 0;
        if (w->undo) memcpy(w->undo + at, (uint8_t *)a->m.trits + at, (size_t)w->s.panel_bytes);
        for (g = 0; g < w->s.groups; g++) tern__ternarize_group(job->k, w, panel, g, w->undo ? &suspect : NULL);
        if (suspect) *bad = tern__min(tern__first_bad(job->k, a, row * a->m.cols, rows * a->m.cols), *bad);
    }
}

/* What a weight w with scale and trit leaves for the accumulator, in steps of half a scale / theta. */
TERN__ANYWHERE int8_t tern__left_over(float w, float scale, float trit, int32_t theta)
{
    const float most = (float)(theta - 1), half = 0.5f * scale, a = (w - scale * trit) / (half > 0.0f ? half : 1.0f) * (float)theta;
    if (half == 0.0f) return 0; /* of the smallest scale too */
    return (int8_t)tern__round(a > most ? most : a < -most ? -most : a);
}

static void tern__accum_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_ternarize_args *a = (const tern_ternarize_args *)job->arg;
    const tern_matrix *m = &a->m;
    const tern__shape s = tern__shape_of(m);
    float buffer[TERN__NARROW];
    int8_t t[TERN__NARROW];
    int64_t row, g, i, j, n;
    (void)bad;
    for (row = begin; row < end; row++)
        for (g = 0; g < s.groups; g++) {
            const float scale = tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, &s, row, g));
            for (i = 0; i < tern__group_cols(m, &s, g); i += n) {
                const int64_t col = g * s.group + i, at = row * m->cols + col;
                const float *w;
                n = tern__min(TERN__NARROW, tern__group_cols(m, &s, g) - i);
                w = tern__load_block(job->k, a, at, n, buffer);
                tern__unpack_range(m, &s, row, col, n, t);
                for (j = 0; j < n; j++) a->accum[at + j] = tern__left_over(w[j], scale, (float)t[j], a->theta);
            }
        }
}

static tern_result tern__refuse_weight(tern_run *run, const tern_ternarize_args *a, int64_t bad)
{
    TERN__REQUIRE(run, bad == INT64_MAX, TERN_E_NONFINITE,
                  "ternarize: weights[%d][%d] is not a finite number below 2^96", bad / a->m.cols, bad % a->m.cols);
    return TERN_OK;
}

/* The threshold of a tensor. */
static tern_result tern__settle_tensor(tern_run *run, const tern_ternarize_args *a, float *threshold)
{
    float mean = 0.0f, above = 0.0f;
    int64_t bad = INT64_MAX;
    if (tern__needs_statistic(a, 0)) mean = tern__tensor_mean(run, a, -1.0f, &bad);
    TERN__TRY(tern__refuse_weight(run, a, bad));
    if (a->rule == TERN_TWN) above = tern__tensor_mean(run, a, tern__twn_delta(mean), &bad);
    *threshold = tern__settle_grain(a, 0, mean, above);
    return TERN_OK;
}

/* Nothing may be written where a weight is bad, and to know that takes a pass of its own: that of the statistics of a
   tensor, or one over the weights as they are, or none where what was overwritten can be put back. */
static tern_result tern__cpu_ternarize(tern_run *run, const tern_ternarize_args *a)
{
    tern__ternarize_work w;
    tern__state state;
    int64_t i, bad = INT64_MAX;
    w.a = a;
    w.s = tern__shape_of(&a->m);
    w.threshold = 0.0f;
    w.undo = NULL;
    state = tern__state_of(a, &w.s);
    for (i = 0; a->rule == TERN_GIVEN && i < w.s.scales; i++) {
        const float scale = tern__load_scale(a->m.scale_type, a->m.scales, i);
        TERN__REQUIRE(run, tern__weight_ok(scale) && scale >= 0.0f, TERN_E_NONFINITE,
                      "ternarize: scales[%d] is negative or not a finite number below 2^96", i);
    }
    for (i = 0; tern__is_learned(a->rule) && i < tern__learned_scales(a->rule, &a->m); i++)
        TERN__REQUIRE(run, tern__weight_ok(a->alpha[i]), TERN_E_NONFINITE, "ternarize: alpha[%d] is not a finite number below 2^96", i);
    if (a->m.grain != TERN_PER_TENSOR || !tern__needs_statistic(a, 0)) {
        if (a->spare && a->spare_bytes >= (size_t)(state.trits + state.scales + state.alpha)) w.undo = (uint8_t *)a->spare;
        else bad = tern__for(run, tern__scan_body, a, tern__ceil_div(a->m.rows * a->m.cols, TERN__BLOCK), 1000);
        TERN__TRY(tern__refuse_weight(run, a, bad));
    }
    if (w.undo) tern__copy_scales(&w, 0);
    if (a->m.grain == TERN_PER_TENSOR) TERN__TRY(tern__settle_tensor(run, a, &w.threshold));
    bad = tern__for(run, tern__ternarize_body, &w, w.s.panels, tern__mul(a->m.cols, 16 * 5));
    if (bad != INT64_MAX) {
        memcpy(a->m.trits, w.undo, (size_t)state.trits);
        tern__copy_scales(&w, 1);
    }
    if (bad == INT64_MAX && a->accum) tern__for(run, tern__accum_body, a, a->m.rows, tern__mul(a->m.cols, 40));
    return tern__refuse_weight(run, a, bad);
}

static void tern__trits_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_pack_args *a = (const tern_pack_args *)job->arg;
    int64_t i;
    for (i = begin; i < end; i++)
        if (a->trits[i] < -1 || a->trits[i] > 1) { *bad = i; return; }
}

static void tern__pack_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_pack_args *a = (const tern_pack_args *)job->arg;
    const tern_matrix *m = &a->m;
    const tern__shape s = tern__shape_of(m);
    tern__unit_trits unit_trits;
    int64_t panel, g, i, r;
    (void)bad;
    for (panel = begin; panel < end; panel++)
        for (g = 0; g < s.groups; g++) {
            const int64_t row = panel * TERN__ROWS, cols = tern__group_cols(m, &s, g);
            const int8_t *t = a->trits + row * m->cols + g * s.group;
            uint8_t *unit = (uint8_t *)m->trits + panel * s.panel_bytes + g * s.group_units * TERN__UNIT;
            for (i = 0; i < cols; i += s.unit, unit += TERN__UNIT) {
                memset(unit_trits, 0, sizeof unit_trits);
                for (r = 0; r < tern__min(TERN__ROWS, m->rows - row); r++)
                    memcpy(unit_trits[r], t + r * m->cols + i, (size_t)tern__min(s.unit, cols - i));
                tern__pack_unit(m->encoding, unit_trits[0], (int64_t)sizeof unit_trits[0], unit);
            }
        }
}

static tern_result tern__cpu_pack(tern_run *run, const tern_pack_args *a)
{
    int64_t bad = tern__for(run, tern__trits_body, a, a->m.rows * a->m.cols, 5);
    TERN__REQUIRE(run, bad == INT64_MAX, TERN_E_TRIT,
                  "pack: trits[%d][%d] is %d, not -1, 0 or 1", bad / a->m.cols, bad % a->m.cols, (int64_t)a->trits[bad]);
    tern__for(run, tern__pack_body, a, tern__ceil_div(a->m.rows, TERN__ROWS), tern__mul(a->m.cols, 16 * 12));
    return TERN_OK;
}

/* A whole row as trits and as values, each or NULL. */
static void tern__unpack_row(const tern_matrix *m, const tern__shape *s, int64_t row, int8_t *trits, float *values)
{
    int8_t t[256];
    int64_t j, col, n;
    for (col = 0; col < m->cols; col += n) {
        n = tern__min(m->cols - col, 256);
        tern__unpack_range(m, s, row, col, n, t);
        if (trits) memcpy(trits + col, t, (size_t)n);
        for (j = 0; values && j < n; j++)
            values[col + j] = (float)t[j] * tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, s, row, (col + j) / s->group));
    }
}

/* The first of rows [first, end) of a panel that has an invalid code, or `end`. Constant trip counts, so that compilers vectorise. */
static int64_t tern__invalid_row(const tern_matrix *m, const tern__shape *s, int64_t panel, int64_t first, int64_t end)
{
    const uint8_t *unit = (const uint8_t *)m->trits + panel * s->panel_bytes;
    uint8_t bad[TERN__ROWS][4] = {{0}}, *all = bad[0];
    int64_t u;
    int32_t i;
    for (u = 0; u < s->units; u++, unit += TERN__UNIT) {
        if (m->encoding == TERN_BASE3) for (i = 0; i < TERN__UNIT; i++) all[i] |= (uint8_t)(unit[i] > 242);
        else for (i = 0; i < TERN__UNIT; i++) all[i] |= (uint8_t)(unit[i] & unit[i] >> 1 & 0x55); /* code 3 */
    }
    while (first < end && !(bad[first][0] | bad[first][1] | bad[first][2] | bad[first][3])) first++;
    return first;
}

/* Rows [first, end) of a panel as trits and as values, each or NULL, of the first of these rows. */
static void tern__unpack_panel(const tern__kernels *k, const tern_matrix *m, const tern__shape *s, int64_t panel, int64_t first,
                               int64_t end, int8_t *trits, float *values)
{
    int8_t t[TERN__ROWS][64];
    float buffer[TERN__ROWS];
    int64_t g, i, j, r, n;
    for (g = 0; g < s->groups; g++) {
        const int64_t cols = tern__group_cols(m, s, g);
        const uint8_t *unit = (const uint8_t *)m->trits + panel * s->panel_bytes + g * s->group_units * TERN__UNIT;
        const float *scale = values ? tern__panel_scales(m, s, panel, g, buffer) : buffer;
        for (i = 0; i < cols; i += n, unit += 3 * TERN__UNIT) {
            n = tern__min(3 * s->unit, cols - i);
            k->trits(m->encoding == TERN_BASE3, tern__ceil_div(n, s->unit), unit, t[0]);
            for (r = first; r < end; r++) {
                const int64_t at = (r - first) * m->cols + g * s->group + i;
                if (trits) memcpy(trits + at, t[r], (size_t)n);
                for (j = 0; values && j < n; j++) values[at + j] = (float)t[r][j] * scale[r];
            }
        }
    }
}

/* Two passes of the same body, panel by panel: check the codes, then write, so that a bad code changes nothing. */
typedef struct tern__unpack_work { const tern_unpack_args *a; int32_t write; } tern__unpack_work;

static void tern__unpack_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__unpack_work *w = (const tern__unpack_work *)job->arg;
    const tern_unpack_args *a = w->a;
    const tern__shape s = tern__shape_of(&a->m);
    const int64_t panel = a->row / TERN__ROWS;
    int64_t i;
    for (i = begin; i < end; i++) {
        const int64_t top = (panel + i) * TERN__ROWS, row = tern__max(top, a->row),
                      rows = tern__min(top + TERN__ROWS, a->row + a->count) - row;
        const int64_t at = (row - a->row) * a->m.cols;
        int8_t *trits = a->trits ? a->trits + at : NULL;
        float *values = a->values ? a->values + at : NULL;
        if (!w->write) {
            const int64_t invalid = tern__invalid_row(&a->m, &s, panel + i, row - top, row - top + rows);
            if (invalid < row - top + rows) { *bad = top + invalid; return; }
        } else if (rows == 1) tern__unpack_row(&a->m, &s, row, trits, values); /* not sixteen for one */
        else tern__unpack_panel(job->k, &a->m, &s, panel + i, row - top, row - top + rows, trits, values);
    }
}

static tern_result tern__cpu_unpack(tern_run *run, const tern_unpack_args *a)
{
    const int64_t panels = tern__ceil_div(a->row + a->count, TERN__ROWS) - a->row / TERN__ROWS;
    tern__unpack_work w;
    int64_t bad;
    w.a = a;
    w.write = 0;
    bad = tern__for(run, tern__unpack_body, &w, panels, tern__mul(a->m.cols, 2));
    TERN__REQUIRE(run, bad == INT64_MAX, TERN_E_TRIT, "unpack: row %d has an invalid code (2-bit code 3 or base-3 byte above 242)", bad);
    w.write = 1;
    tern__for(run, tern__unpack_body, &w, panels, tern__mul(a->m.cols, a->values ? 16 * 8 : 16 * 3));
    return TERN_OK;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-9] Activations
   What enters: float rows. What leaves: int8 rows or bits in the matrix's group layout, a scale and sums per
   token, with RMSNorm fused: its factor cancels inside q and enters the scale alone. Called by room 14.
   ------------------------------------------------------------------------------------------------ */

enum { TERN__ROUNDING = 0x524E4438 }; /* the step of round_i8's random numbers */

#define TERN__ROOT7 2.6457513f /* steps of int4 to the mean: a normal row then seldom goes beyond 7 */

/* r = 1/sqrt(mean(x^2) + eps); 0 for a row that has no finite mean square. */
static float tern__rms(const tern__kernels *k, int64_t n, const float *x, float eps)
{
    float mean = tern__sum_of(k, TERN_SUM_SQUARES, n, x) / (float)n;
    return tern__finite(mean) ? 1.0f / tern__sqrt(mean + eps) : 0.0f;
}

/* mean|x g|; with a gain, of products that are rounded first. */
static float tern__mean_abs(const tern__kernels *k, int64_t n, const float *x, const float *gain)
{
    float product[TERN__BLOCK];
    tern__tree tree;
    int64_t i, j;
    if (!gain) return tern__sum_of(k, TERN_SUM_ABS, n, x) / (float)n;
    tern__tree_init(&tree, k);
    for (i = 0; i < n; i += TERN__BLOCK) {
        const int64_t len = tern__min(TERN__BLOCK, n - i);
        for (j = 0; j < len; j++) product[j] = x[i + j] * gain[i + j];
        tern__tree_push(&tree, k->sum(TERN_SUM_ABS, len, product));
    }
    return tern__tree_total(&tree) / (float)n;
}

/* INT8 and INT4: q = x g times steps / size, in at most `most` of them. */
static void tern__quantize_numbers(const tern__kernels *k, const tern_quantize_args *a, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__shape s = tern__shape_of(&a->m);
    const int32_t int4 = a->act == TERN_ACT_INT4, most = int4 ? 7 : 127;
    const float steps = int4 ? TERN__ROOT7 : 127.0f;
    int64_t t, g;
    for (t = begin; t < end; t++) {
        const float *x = a->x + t * a->m.cols;
        int8_t *q = a->q + t * s.stride;
        const float size = int4 ? tern__mean_abs(k, a->m.cols, x, a->gain) : tern__float(k->absmax(a->m.cols, x, a->gain));
        const float r = a->norm == TERN_NORM_RMS ? tern__rms(k, a->m.cols, x, a->eps) : 1.0f;
        const float inverse = steps / size;
        const int32_t usable = tern__finite(size) && r > 0.0f;
        if (!usable) *bad = tern__min(*bad, t);
        a->scale[t] = 0.0f;
        memset(a->sum + t * s.groups, 0, sizeof(int32_t) * (size_t)s.groups);
        if (!usable || !tern__finite(inverse)) { /* or a row of zeros */
            memset(q, 0, (size_t)s.stride);
            continue;
        }
        a->scale[t] = size / steps * r;
        for (g = 0; g < s.groups; g++, q += s.group_units * s.unit) {
            const int64_t n = tern__group_cols(&a->m, &s, g);
            a->sum[t * s.groups + g] = k->round(n, x + g * s.group, a->gain ? a->gain + g * s.group : NULL, inverse, most, q);
            memset(q + n, 0, (size_t)(tern__group_run(&a->m, &s, g) * s.unit - n));
        }
        q = a->q + t * s.stride;
        memset(q + s.units * s.unit, 0, (size_t)(s.stride - s.units * s.unit));
    }
}

/* A group's bits, in words of 32 inputs: of a word, input 16 b + 4 d + j is bit 2 d + b of byte j. So the bits of a 2-bit
   unit lie as its codes do. */
TERN__ANYWHERE int64_t tern__bit_words(int64_t units, int64_t unit) { return tern__ceil_div(units * unit, 32); }
TERN__ANYWHERE int32_t tern__bit_of(const int8_t *bits, int64_t i)
{
    return (uint8_t)bits[i / 32 * 4 + i % 4] >> (i / 4 % 4 * 2 + i / 16 % 2) & 1;
}

/* The bits of n inputs; how many are 1. Constant trip counts, so that compilers vectorise at -O2. */
static int32_t tern__bits_of_floats(int64_t n, const float *x, int8_t *bits)
{
#define TERN__BITS(i) 1u << (i), 1u << (8 + (i)), 1u << (16 + (i)), 1u << (24 + (i))
    static const uint32_t place[32] = {TERN__BITS(0), TERN__BITS(2), TERN__BITS(4), TERN__BITS(6), TERN__BITS(1), TERN__BITS(3),
                                       TERN__BITS(5), TERN__BITS(7)};
#undef TERN__BITS
    int32_t i, ones = 0;
    for (; n > 0; n -= 32, x += 32, bits += 4) {
        float last[32] = {0};
        const float *v = n < 32 ? (const float *)memcpy(last, x, sizeof(float) * (size_t)n) : x;
        uint32_t word = 0;
        for (i = 0; i < 32; i++) word += v[i] != 0.0f ? place[i] : 0u;
        for (i = 0; i < 4; i++) bits[i] = (int8_t)(uint8_t)(word >> 8 * i);
        word = (word & 0x55555555u) + (word >> 1 & 0x55555555u);
        word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
        ones += (int32_t)((((word + (word >> 4)) & 0x0F0F0F0Fu) * 0x01010101u) >> 24);
    }
    return ones;
}

static void tern__quantize_bits(const tern__kernels *k, const tern_quantize_args *a, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__shape s = tern__shape_of(&a->m);
    int64_t t, g;
    for (t = begin; t < end; t++) {
        const float *x = a->x + t * a->m.cols;
        int8_t *q = a->q + t * s.stride;
        const int32_t usable = tern__finite(tern__float(k->absmax(a->m.cols, x, NULL)));
        if (!usable) *bad = tern__min(*bad, t);
        a->scale[t] = usable ? 1.0f : 0.0f;
        memset(a->sum + t * s.groups, 0, sizeof(int32_t) * (size_t)s.groups);
        memset(q, 0, (size_t)s.stride);
        for (g = 0; g < s.groups && usable; g++, q += 4 * tern__bit_words(s.group_units, s.unit))
            a->sum[t * s.groups + g] = tern__bits_of_floats(tern__group_cols(&a->m, &s, g), x + g * s.group, q);
    }
}

static void tern__quantize_tokens(const tern__kernels *k, const tern_quantize_args *a, int64_t begin, int64_t end, int64_t *bad)
{
    (a->act == TERN_ACT_BIT ? tern__quantize_bits : tern__quantize_numbers)(k, a, begin, end, bad);
}

static void tern__quantize_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__quantize_tokens(job->k, (const tern_quantize_args *)job->arg, begin, end, bad);
}

static tern_result tern__cpu_quantize(tern_run *run, const tern_quantize_args *a)
{
    int64_t bad = tern__for(run, tern__quantize_body, a, a->n, tern__mul(a->m.cols, 3));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_QUANTIZE, bad);
    return TERN_OK;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-10] Kernels, scalar: the specification
   Every other tier equals these bit for bit. What enters: packed units, int8 rows, float tiles. What
   leaves: sums in the order written here. Called through tern__kernels by rooms 6 to 9 and 14.
   ------------------------------------------------------------------------------------------------ */

/* As tern__dot_group, on bits. */
static tern__dot tern__bits_group(const tern__dot *d, int64_t g, int32_t inputs)
{
    tern__dot one = tern__dot_group(d, g, inputs);
    one.q = d->q + g * tern__bit_words(d->units, inputs) * 4;
    return one;
}

/* From acc to facc; the product of a first group is stored as it is. */
static void tern__fold_scalar(const tern__dot *d)
{
    int32_t p, i;
    for (p = 0; p < d->panels; p++)
        for (i = 0; i < d->tokens * TERN__ROWS; i++) {
            const void *scale = (const uint8_t *)d->scale + p * d->scale_stride;
            const int32_t at = p * d->tokens * TERN__ROWS + i;
            const float product = (float)d->acc[at] * tern__load_scale(d->scale_type, scale, i % TERN__ROWS);
            d->facc[at] = d->add ? d->facc[at] + product : product;
        }
}

/* Each unit is decoded once and multiplied with all tokens. |sum of code * q| <= 2 * 127 * cols < 2^31. */
static void tern__dot_run_scalar(const tern__dot *d, tern_type encoding, int32_t inputs)
{
    int64_t p, t, u;
    int32_t r, i;
    for (p = 0; p < d->panels; p++) {
        const uint8_t *unit = d->panel + p * d->panel_stride;
        int32_t *acc = d->acc + p * d->tokens * TERN__ROWS;
        for (t = 0; t < d->tokens; t++)
            for (r = 0; r < TERN__ROWS; r++) acc[t * TERN__ROWS + r] = -d->sum[t * d->sum_stride];
        for (u = 0; u < d->units; u++, unit += TERN__UNIT) {
            tern__unit_trits trit;
            tern__unpack_rows(encoding, unit, (int64_t)sizeof trit[0], trit[0]);
            for (t = 0; t < d->tokens; t++) {
                const int8_t *q = d->q + t * d->q_stride + u * inputs;
                for (r = 0; r < TERN__ROWS; r++) {
                    int32_t sum = 0;
                    for (i = 0; i < inputs; i++) sum += (trit[r][i] + 1) * q[i];
                    acc[t * TERN__ROWS + r] += sum;
                }
            }
        }
    }
}
static void tern__dot_scalar(const tern__dot *d, tern_type encoding, int32_t inputs)
{
    int64_t g;
    for (g = 0; g < d->groups; g++) {
        const tern__dot one = tern__dot_group(d, g, inputs);
        tern__dot_run_scalar(&one, encoding, inputs);
        if (d->facc) tern__fold_scalar(&one);
    }
}
static void tern__dot_2bit_scalar(const tern__dot *d) { tern__dot_scalar(d, TERN_2BIT, 16); }
static void tern__dot_base3_scalar(const tern__dot *d) { tern__dot_scalar(d, TERN_BASE3, 20); }

/* Bits: popcount(x & plus) - popcount(x & minus) for each row, input by input; what is not active costs nothing. */
static void tern__dot_bits_run_scalar(const tern__dot *d, tern_type encoding, int32_t inputs)
{
    int64_t p, t, u;
    int32_t r, i;
    for (p = 0; p < d->panels; p++) {
        const uint8_t *unit = d->panel + p * d->panel_stride;
        int32_t *acc = d->acc + p * d->tokens * TERN__ROWS;
        memset(acc, 0, sizeof(int32_t) * (size_t)(d->tokens * TERN__ROWS));
        for (u = 0; u < d->units; u++, unit += TERN__UNIT) {
            tern__unit_trits trit;
            tern__unpack_rows(encoding, unit, (int64_t)sizeof trit[0], trit[0]);
            for (t = 0; t < d->tokens; t++)
                for (i = 0; i < inputs; i++)
                    if (tern__bit_of(d->q + t * d->q_stride, u * inputs + i))
                        for (r = 0; r < TERN__ROWS; r++) acc[t * TERN__ROWS + r] += trit[r][i];
        }
    }
}
static void tern__dot_bits_scalar(const tern__dot *d, tern_type encoding)
{
    const int32_t inputs = encoding == TERN_BASE3 ? 20 : 16;
    int64_t g;
    for (g = 0; g < d->groups; g++) {
        const tern__dot one = tern__bits_group(d, g, inputs);
        tern__dot_bits_run_scalar(&one, encoding, inputs);
        if (d->facc) tern__fold_scalar(&one);
    }
}

static void tern__dot_i8_scalar(const tern__dot *d, int64_t acc_row, int32_t add)
{
    int64_t p, t, u;
    int32_t r, j;
    for (p = 0; p < d->panels; p++)
        for (t = 0; t < d->tokens; t++) {
            const uint8_t *quad = d->panel + p * d->panel_stride;
            const int8_t *q = d->q + t * d->q_stride;
            int32_t *acc = d->acc + t * acc_row + p * TERN__ROWS, sum[TERN__ROWS] = {0}; /* |sum| <= 256 * 255 * 128 */
            for (u = 0; u < d->units; u++, quad += TERN__UNIT, q += 4)
                for (r = 0; r < TERN__ROWS; r++)
                    for (j = 0; j < 4; j++) sum[r] += quad[4 * r + j] * q[j];
            for (r = 0; r < TERN__ROWS; r++)
                acc[r] = (int32_t)((add ? (uint32_t)acc[r] : 0) - (uint32_t)d->sum[t * d->sum_stride] + (uint32_t)sum[r]);
        }
}

static void tern__emit_scalar(const tern__emit *e)
{
    int32_t t, r;
    for (t = 0; t < e->tokens; t++)
        for (r = 0; r < e->rows; r++) {
            const int32_t i = t * TERN__ROWS + r;
            float y = e->facc ? e->facc[i] * e->scale[t] : (float)e->acc[i] * (e->scale[t] * e->s[r]);
            if (e->bias) y = y + e->bias[r];
            e->y[t * e->y_stride + r] = y;
        }
}

enum { TERN__ROWS_SCALAR = 4 };
static void tern__tile_scalar(const tern__tile *t)
{
    int64_t i, j;
    int32_t l;
    for (i = 0; i < t->rows; i++) {
        float *to = t->c ? t->c + i * t->c_row : t->p + i * TERN__LANES, sum[TERN__LANES];
        for (l = 0; l < TERN__LANES; l++) sum[l] = t->first ? 0.0f : t->p[i * TERN__LANES + l];
        for (j = 0; j < t->k; j++) {
            const float x = t->a[j * TERN__ROWS_SCALAR + i], *row = t->b + j * TERN__LANES;
            for (l = 0; l < TERN__LANES; l++) sum[l] = sum[l] + x * row[l];
        }
        for (l = 0; t->c && t->add && l < TERN__LANES; l++) sum[l] = to[l] + sum[l];
        memcpy(to, sum, sizeof sum);
    }
}

static void tern__columns_scalar(int64_t lanes, int64_t len, const float *from, int64_t step, float *to, int64_t to_step)
{
    int64_t j, l;
    for (j = 0; j < len; j++)
        for (l = 0; l < lanes; l++) to[j * to_step + l] = from[l * step + j];
}

static void tern__pack_a_scalar(int64_t rows, int64_t len, const float *a, int64_t a_row, int64_t a_col, float *to)
{
    int64_t i, j;
    for (j = 0; j < len; j++)
        for (i = 0; i < rows; i++) to[j * TERN__ROWS_SCALAR + i] = a[i * a_row + j * a_col];
}

static void tern__scaled_scalar(int64_t len, int64_t lanes, const int8_t *q, int64_t stride, const float *scale, float *b)
{
    int64_t j, l;
    for (j = 0; j < len; j++, q += stride, b += TERN__LANES)
        for (l = 0; l < lanes; l++) b[l] = (float)q[l] * scale[j];
}

static void tern__trits_scalar(int32_t base3, int64_t units, const uint8_t *unit, int8_t *t)
{
    int64_t i;
    for (i = 0; i < units; i++) tern__unpack_rows(base3 ? TERN_BASE3 : TERN_2BIT, unit + i * TERN__UNIT, 64, t + i * (base3 ? 20 : 16));
}

/* 64 lanes x 16, from +0 down the lanes in order, then the lanes pairwise: i and i + 32, i and i + 16, ... */
static float tern__sum_scalar(int32_t kind, int64_t n, const float *x)
{
    float lane[64];
    int64_t i;
    int32_t half;
    for (i = 0; i < 64; i++) lane[i] = 0.0f;
    for (i = 0; i < n; i++) lane[i & 63] = lane[i & 63] + (kind == TERN_SUM ? x[i] : kind == TERN_SUM_ABS ? tern__abs(x[i]) : x[i] * x[i]);
    for (half = 32; half > 0; half /= 2)
        for (i = 0; i < half; i++) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}

static float tern__sum_above_scalar(tern_type type, int64_t n, const void *x, const uint8_t *ask, float delta, int64_t *count)
{
    float above[TERN__BLOCK];
    int64_t i;
    (void)ask;
    for (i = 0; i < n; i++) {
        const float v = tern__abs(tern__load_float(type, x, i));
        const int32_t counted = delta < 0.0f || v > delta; /* a NaN among all is seen in the sum */
        above[i] = counted ? v : 0.0f;
        *count += counted;
    }
    return tern__sum_scalar(TERN_SUM, n, above);
}

static uint32_t tern__absmax_scalar(int64_t n, const float *x, const float *gain)
{
    uint32_t largest = 0;
    int64_t i;
    for (i = 0; i < n; i++) {
        const uint32_t bits = tern__bits(gain ? x[i] * gain[i] : x[i]) & 0x7FFFFFFFu;
        if (bits > largest) largest = bits;
    }
    return largest;
}

static int32_t tern__round_scalar(int64_t n, const float *x, const float *gain, float inverse, int32_t most, int8_t *q)
{
    int64_t i;
    int32_t sum = 0;
    for (i = 0; i < n; i++) {
        const int32_t v = (int32_t)tern__round((gain ? x[i] * gain[i] : x[i]) * inverse);
        sum += q[i] = (int8_t)(v > most ? most : v < -most - 1 ? -most - 1 : v);
    }
    return sum;
}

/* A unit as floats: the trit of input i and row r in w[i][r]. Constant trip counts, so that compilers vectorise. */
static void tern__unit_floats(int32_t base3, const uint8_t *unit, float w[20][TERN__ROWS])
{
    tern__unit_trits trit;
    int32_t i, r;
    tern__unpack_rows(base3 ? TERN_BASE3 : TERN_2BIT, unit, (int64_t)sizeof trit[0], trit[0]);
    for (i = 0; i < (base3 ? 20 : 16); i++)
        for (r = 0; r < TERN__ROWS; r++) w[i][r] = (float)trit[r][i];
}

static void tern__floats_scalar(const tern__float_dot *f)
{
    const int64_t unit = f->base3 ? 20 : 16;
    int64_t p, t, i;
    int32_t r;
    for (p = 0; p < f->panels; p++) {
        float w[20][TERN__ROWS];
        for (t = 0; t < f->tokens && f->first; t++)
            for (r = 0; r < TERN__ROWS; r++) f->p[t * TERN__STRIP + p * TERN__ROWS + r] = 0.0f;
        for (i = f->from; i < f->from + f->inputs; i++) {
            if (i == f->from || i % unit == 0) tern__unit_floats(f->base3, f->panel + p * f->panel_stride + i / unit * TERN__UNIT, w);
            for (t = 0; t < f->tokens; t++) {
                const float x = f->x[(i - f->from) * f->tokens + t], *trit = w[i % unit];
                float *sum = f->p + t * TERN__STRIP + p * TERN__ROWS;
                for (r = 0; r < TERN__ROWS; r++) sum[r] = sum[r] + x * trit[r];
            }
        }
    }
}

static void tern__widen_scalar(tern_type type, int64_t n, const void *from, float *to)
{
    int64_t i;
    for (i = 0; i < n; i++) to[i] = tern__load_float(type, from, i);
}

static void tern__ternarize_scalar(const tern__packing *p)
{
    const int64_t inputs = p->base3 ? 20 : 16;
    uint8_t *unit = p->unit;
    tern__unit_trits t;
    int64_t i, j, r;
    for (i = 0; i < p->n; i += inputs, unit += TERN__UNIT) {
        memset(t, 0, sizeof t);
        for (r = 0; r < p->rows; r++)
            for (j = 0; j < tern__min(inputs, p->n - i); j++) {
                const float v = tern__load_float(p->type, p->x, r * p->stride + i + j);
                t[r][j] = (int8_t)((v > p->threshold[r]) - (v < -p->threshold[r]));
            }
        tern__pack_unit(p->base3 ? TERN_BASE3 : TERN_2BIT, t[0], (int64_t)sizeof t[0], unit);
    }
}

#ifndef TERNARY_NO_TRAINING
/* A weight and its state. Without momentum moment1 is not used, without AdamW moment2 is not. */
typedef struct tern__trained { float w, grad, moment1, moment2; } tern__trained;

/* One of them, not yet rounded to its type. */
TERN__ANYWHERE void tern__optimize_one(const tern_optimize_args *a, float factor, float correct1, float correct2, tern__trained *e)
{
    const float g = e->grad * factor;
    float step = g;
    if (a->kind == TERN_ADAMW) {
        e->moment1 = a->beta1 * e->moment1 + (1.0f - a->beta1) * g;
        e->moment2 = a->beta2 * e->moment2 + (1.0f - a->beta2) * g * g;
        step = e->moment1 * correct1 / (tern__sqrt(e->moment2 * correct2) + a->eps);
    } else if (a->moment1) step = e->moment1 = a->beta1 * e->moment1 + g;
    e->w = e->w - a->rate * (step + a->decay * e->w);
    e->grad = 0.0f;
}

/* A float that bf16 holds, above or below x: the low 16 bits of `random` say which. */
TERN__ANYWHERE float tern__stochastic(float x, uint32_t random) { return tern__from_bf16(tern__to_bf16_with(x, random & 0xFFFF)); }

/* Words for the moments of four elements: the first moment takes the low half of its word, the second the high half. */
TERN__ANYWHERE void tern__moment_random(const tern_optimize_args *a, int64_t four, uint32_t random[4])
{
    tern__philox(a->seed, (uint64_t)four, a->step, a->stream ^ 0x80000000u, random);
}
TERN__ANYWHERE float tern__moment_rounded(const tern_optimize_args *a, float x, uint32_t random)
{
    return a->moment_type == TERN_BF16 ? tern__stochastic(x, random) : x;
}

static void tern__optimize_scalar(const tern__optimize_work *work, int64_t begin, int64_t end)
{
    const tern_optimize_args *a = work->a;
    uint32_t random[4] = {0, 0, 0, 0}, moments[4] = {0, 0, 0, 0};
    int64_t i;
    for (i = begin; i < end; i++) { /* weight i takes word i % 4 of block i / 4 */
        tern__trained e;
        if (a->type == TERN_BF16 && (i & 3) == 0) tern__philox(a->seed, (uint64_t)(i >> 2), a->step, a->stream, random);
        if (a->moment_type == TERN_BF16 && (i & 3) == 0) tern__moment_random(a, i >> 2, moments);
        e.w = tern__load_float(a->type, a->w, i);
        e.grad = a->grad[i];
        e.moment1 = a->moment1 ? tern__load_float(a->moment_type, a->moment1, i) : 0.0f;
        e.moment2 = a->kind == TERN_ADAMW ? tern__load_float(a->moment_type, a->moment2, i) : 0.0f;
        tern__optimize_one(a, work->factor, work->correct1, work->correct2, &e);
        tern__store_float(a->type, a->w, i, a->type == TERN_BF16 && !a->nearest ? tern__stochastic(e.w, random[i & 3]) : e.w);
        a->grad[i] = e.grad;
        if (a->moment1) tern__store_float(a->moment_type, a->moment1, i, tern__moment_rounded(a, e.moment1, moments[i & 3]));
        if (a->kind == TERN_ADAMW)
            tern__store_float(a->moment_type, a->moment2, i, tern__moment_rounded(a, e.moment2, moments[i & 3] >> 16));
    }
}

/* Half `which` of 16 bits of a block's words, the low half of a word first. */
TERN__ANYWHERE uint32_t tern__half(const uint32_t words[4], int64_t which) { return words[which >> 1 & 3] >> 16 * (which & 1) & 0xFFFF; }

/* v (127/m) + u to the integer below. u is odd in 2^-17, so that it never makes an integer of another. */
TERN__ANYWHERE int8_t tern__round_up(float v, uint32_t half)
{
    const float x = v + (float)(2 * half + 1) * 7.62939453125e-6f;
    int32_t q = (int32_t)x;
    q -= (float)q > x;
    return (int8_t)(q > 127 ? 127 : q < -127 ? -127 : q);
}

static void tern__round_up_scalar(const tern__random *r, uint64_t block, int64_t n, const float *x, const float *gain, float row,
                                  float inverse, int8_t *q)
{
    uint32_t words[4] = {0, 0, 0, 0};
    int64_t i;
    for (i = 0; i < n; i++) {
        if ((i & 7) == 0) tern__philox(r->seed, block + (uint64_t)(i >> 3), r->step, r->stream, words);
        q[i] = tern__round_up((gain ? x[i] * gain[i] : x[i]) * row * inverse, tern__half(words, i & 7));
    }
}

/* One weight's step: 0, 1 where its trit changes, 2 where it stays at theta. */
TERN__ANYWHERE int32_t tern__push_one(const tern__push *p, uint32_t half, float g, int8_t *accum, int8_t *trit)
{
    int32_t a, s;
    if (p->sign) a = *accum - p->factor * ((g > 0.0f) - (g < 0.0f));
    else {
        const float x = g * p->inverse, held = x > 1024.0f ? 1024.0f : x < -1024.0f ? -1024.0f : x;
        const int32_t n = g == g ? (int32_t)tern__round(held) : 0; /* NaN moves nothing */
        a = *accum - (int32_t)tern__floor_shift(n * p->factor + (int32_t)half, 16);
    }
    a = a > 127 ? 127 : a < -127 ? -127 : a;
    *accum = (int8_t)a;
    if (a < p->theta && a > -p->theta) return 0;
    s = a > 0 ? 1 : -1;
    if (*trit == s) {
        *accum = (int8_t)(s * p->theta);
        return 2;
    }
    *trit = (int8_t)(*trit + s);
    *accum = (int8_t)(p->sign ? 0 : a - s * p->theta);
    return 1;
}

static void tern__push_scalar(const tern__push *p, uint64_t block, int64_t skip, int64_t n, float *grad, int8_t *accum, int8_t *trit,
                              int32_t *events)
{
    uint32_t words[4];
    int64_t i;
    if (n <= 0) return;
    block += (uint64_t)(skip >> 3);
    skip &= 7;
    tern__philox(p->random.seed, block, p->random.step, p->random.stream, words);
    for (i = 0; i < n; i++, skip++) {
        int32_t event;
        if (skip == 8) {
            tern__philox(p->random.seed, ++block, p->random.step, p->random.stream, words);
            skip = 0;
        }
        event = tern__push_one(p, tern__half(words, skip), grad[i], &accum[i], &trit[i]);
        if (event) events[event - 1]++;
        grad[i] = 0.0f;
    }
}
#else
#define tern__optimize_scalar NULL
#define tern__optimize_sse41 NULL
#define tern__optimize_avx2 NULL
#define tern__optimize_avx512 NULL
#define tern__round_up_scalar NULL
#define tern__round_up_sse41 NULL
#define tern__round_up_avx2 NULL
#define tern__round_up_avx512 NULL
#define tern__push_scalar NULL
#define tern__push_sse41 NULL
#define tern__push_avx2 NULL
#define tern__push_avx512 NULL
#endif

static void tern__negate_scalar(int64_t n, const uint32_t *signs, const float *x, float *y)
{
    int64_t i;
    for (i = 0; i < n; i++) y[i] = signs[i / 32] >> i % 32 & 1 ? -x[i] : x[i];
}

static void tern__hadamard_scalar(int64_t p, float factor, float *x)
{
    int64_t distance, block, i;
    for (i = 0; i < p; i++) x[i] = x[i] * factor;
    for (distance = 1; distance < p; distance *= 2)
        for (block = 0; block < p; block += 2 * distance)
            for (i = block; i < block + distance; i++) {
                const float a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
}

#ifndef TERNARY_NO_GRAPH
/* Edges whose sum is one; how far ahead rows, and factors, are asked for. */
enum { TERN__EDGES = 256, TERN__AHEAD_EDGES = 32, TERN__AHEAD_FACTORS = 64 };

TERN__ANYWHERE int64_t tern__edge_node(uint32_t entry) { return (int64_t)(entry & 0x7FFFFFFFu); }

/* What an edge multiplies its row by. The sign of a product is exact, so it may be that of a factor. */
TERN__ANYWHERE float tern__edge_factor(const float *right, const float *scale, uint32_t entry)
{
    const int64_t u = tern__edge_node(entry);
    const float f = scale ? (right ? scale[u] * right[u] : scale[u]) : right ? right[u] : 1.0f;
    return entry >> 31 ? -f : f;
}

static void tern__aggregate_scalar(const tern__neighbours *a)
{
    int64_t i, j;
    for (j = 0; j < a->cols; j++) a->y[j] = 0.0f;
    for (i = 0; i < a->n; i++) {
        const int64_t at = tern__edge_node(a->entry[i]) * a->row;
        const float f = tern__edge_factor(a->right, a->scale, a->entry[i]);
        if (a->q) for (j = 0; j < a->cols; j++) a->y[j] = a->y[j] + (float)a->q[at + j] * f;
        else for (j = 0; j < a->cols; j++) a->y[j] = a->y[j] + a->x[at + j] * f;
    }
    for (j = 0; j < a->cols; j++) a->y[j] = a->whole * a->y[j];
}
#else
#define tern__aggregate_scalar NULL
#define tern__aggregate_sse41 NULL
#define tern__aggregate_avx2 NULL
#define tern__aggregate_avx512 NULL
#endif

/* Elements [begin, end) of a map, W at a time: the kernel of every tier. What is NULL is not used. */
#define TERN__MAP_CASE(S, FN, Y, DA, DB)                                                                 \
    case TERN_MAP_##FN:                                                                                  \
        for (i = begin; i < end; i += width) {                                                           \
            const vector x = tern__load##S(xs + i, end - i), z = tern__load##S(zs + i, end - i);         \
            (void)x; (void)z;                                                                            \
            if (a->dy) {                                                                                 \
                const vector dy = tern__load##S(a->dy + i, end - i), dx = DA, dz = DB;                   \
                if (a->da) tern__store##S(a->da + i, dx, end - i);                                       \
                if (db) tern__store##S(db + i, dz, end - i);                                             \
            } else tern__store##S(a->y + i, Y, end - i);                                                 \
        }                                                                                                \
        break;
#define TERN__MAP_KERNEL(NAME, S, TARGET, W, V)                                                          \
static TARGET void NAME(const tern_map_args *a, int64_t begin, int64_t end)                               \
{                                                                                                        \
    typedef V vector;                                                                                    \
    const float *xs = a->a ? a->a : a->dy, *zs = a->b ? a->b : xs, alpha = a->alpha;                     \
    float *db = a->fn == TERN_MAP_ADD || a->fn == TERN_MAP_MUL ? a->db : NULL;                           \
    const int64_t width = W;                                                                             \
    int64_t i;                                                                                           \
    switch (a->fn) { TERN__MAPS(TERN__MAP_CASE, S) }                                                     \
}
static float tern__load(const float *p, int64_t n) { (void)n; return *p; }
static void tern__store(float *p, float v, int64_t n) { (void)n; *p = v; }
TERN__MAP_KERNEL(tern__map_scalar, , , 1, float)

/* The parts of a softmax, of every tier too. */
#define TERN__SOFTMAX_KERNELS(X, S, TARGET, W, V)                                                        \
static TARGET float tern__largest_##X(int64_t n, const float *x)                                          \
{                                                                                                        \
    const int64_t width = W, whole = n / width * width;                                                  \
    float largest = x[0], lane[W];                                                                       \
    int64_t i;                                                                                           \
    V most;                                                                                              \
    for (i = 0; i < width; i++) lane[i] = largest;                                                       \
    memcpy(&most, lane, sizeof most);                                                                    \
    for (i = 0; i < whole; i += width) most = tern__larger##S(tern__load##S(x + i, width), most);        \
    memcpy(lane, &most, sizeof most);                                                                    \
    for (i = 0; i < width; i++) largest = tern__larger(lane[i], largest);                                \
    for (i = whole; i < n; i++) largest = tern__larger(x[i], largest);                                   \
    return largest;                                                                                      \
}                                                                                                        \
static TARGET void tern__exps_##X(int64_t n, const float *x, float scale, float shift, float *y)          \
{                                                                                                        \
    int64_t i;                                                                                           \
    for (i = 0; i < n; i += W) tern__store##S(y + i, tern__exp##S(tern__load##S(x + i, n - i) * scale - shift), n - i); \
}
static float tern__larger(float x, float than) { return x > than ? x : than; }
TERN__SOFTMAX_KERNELS(scalar, , , 1, float)

/* A tier's table: kernels of suffix X, but for what some tiers have of their own. */
#define TERN__KERNELS(X, FUSED, DOT_2BIT, DOT_BASE3, DOT_I8, DOT_BITS, TOKENS, TILE_ROWS, PAIRS)         \
    tern__negate_##X, tern__hadamard_##X, tern__dot_2bit_##DOT_2BIT, tern__dot_base3_##DOT_BASE3,          \
    tern__emit_##X, tern__tile_##X, FUSED,                                                               \
    tern__columns_##X, tern__pack_a_##X, tern__scaled_##X, tern__trits_##X,                              \
    tern__sum_##X, tern__sum_above_##X, tern__absmax_##X, tern__round_##X,                               \
    tern__dot_i8_##DOT_I8, tern__floats_##X, tern__dot_bits_##DOT_BITS,                                  \
    tern__widen_##X, tern__ternarize_##X, tern__optimize_##X,                                \
    tern__round_up_##X, tern__push_##X, tern__aggregate_##X, tern__map_##X, tern__largest_##X, tern__exps_##X, \
    TOKENS, TILE_ROWS, PAIRS

static const tern__kernels tern__kernels_scalar = {
    TERN__KERNELS(scalar, tern__tile_scalar, scalar, scalar, scalar, scalar, 64, TERN__ROWS_SCALAR, NULL)};

/* ------------------------------------------------------------------------------------------------
   [TERN-11] Kernels, x86
   What enters: the tern__kernels contract of [TERN-10]. What leaves: tern__kernels_sse41 (machines with
   SSSE3 and SSE4.1), _avx2 (AVX2, FMA and F16C), _avx_vnni (AVX-VNNI besides), _avx512_vnni (AVX-512 F, BW,
   DQ, VL and VNNI), _avx512_vbmi (VBMI and VPOPCNTDQ besides) and _amx_int8 (AMX-TILE and AMX-INT8
   besides), the last two with pairs of bf16 where there is AVX512-BF16 or AMX-BF16, equal to the scalar
   kernels bit for bit. The dispatcher of [TERN-14] calls them through the table, after asking the CPU. What
   differs between tiers only in the width of its vectors is written once, as a macro. Each function names
   its own target, so no compiler flags are needed. Float sums and products use the operators of the vector
   types and not intrinsics, and so obey the switches against contraction that surround this code (clang's
   -ffp-contract=fast alone overrides them, there as everywhere).
   ------------------------------------------------------------------------------------------------ */
#ifdef TERN__X86

/* A quad is 64 bytes of plain codes: byte 4r+j belongs to row r and input j of four. A 2-bit unit holds
   four quads, a base-3 unit five. From a few tokens on, a chunk of a few panels is decoded into quads in
   L1 once and then multiplied with all tokens: the encoding costs the same however many tokens follow, and
   the tile below knows nothing of it. */
enum {
    TERN__QUADS = 64,    /* of a chunk: what int16 sums can take (TERN__X86_MADDUBS) */
    TERN__QUADS_VNNI = 128, /* where sums are int32: fewer rounds through acc; more push the activations out of L1 */
    TERN__DECODED = 448, /* of the chunks of all panels of a tile: 28 KB of L1 */
    TERN__FLOAT_QUADS = 320, /* with float activations, of all panels side by side: 20 KB */
    TERN__AHEAD = 4096   /* bytes of prefetch */
};

typedef enum { TERN__FROM_ACC, TERN__FROM_SUM, TERN__FROM_BOTH } tern__start; /* acc, -sum, acc - sum */

typedef struct tern__quads {
    void (*decode)(const uint8_t *panel, int64_t units, uint8_t *code);
    /* A dot as in the contract, but d->panel holds d->units quads per panel, acc and facc have their own stride
       from panel to panel (int8: from token to token, as in the contract of dot_i8), and sums start as `start` says.
       facc: last chunks only. */
    void (*tile)(const tern__dot *d, int64_t acc_stride, tern__start start);
    int32_t per_unit, panels, tokens; /* quads in a unit; the largest tile */
    int32_t chunk;                    /* quads of a panel; panels * chunk <= TERN__DECODED */
} tern__quads;

/* All tokens of `all`, whose accs are acc_row apart, in tiles of nearly equal size: small ones are slow. */
static void tern__tile_tokens(const tern__dot *all, const tern__quads *k, int64_t acc_stride, int64_t acc_row, tern__start start)
{
    tern__dot d = *all;
    int32_t tiles = (all->tokens + k->tokens - 1) / k->tokens;
    for (int32_t left = all->tokens; tiles > 0; left -= d.tokens, tiles--) {
        d.tokens = (left + tiles - 1) / tiles;
        k->tile(&d, acc_stride, start);
        d.q += d.tokens * d.q_stride;
        d.sum += d.tokens * d.sum_stride;
        d.acc += d.tokens * acc_row;
        if (d.facc) d.facc += d.tokens * acc_row;
    }
}

/* Slow loops defeat the hardware prefetcher, so every stream of weights asks ahead. What lies behind the end of its panel is
   what it reads next, or where panels beside each other are read at once was read already (tern__matmul_range). Into L2,
   which has more misses in flight than L1: on a Zen 4 with one thread 21 GB/s in place of 17 (beside float activations
   nothing is that fast). */
static inline __attribute__((always_inline)) void tern__prefetch(const uint8_t *unit, int64_t ahead)
{
    __builtin_prefetch((const void *)((uintptr_t)unit + (uintptr_t)ahead), 0, 2);
}

/* The units that are decoded next, while the tiles of this chunk are at work. */
static void tern__prefetch_chunk(const tern__dot *d, int32_t p, int32_t panels, int64_t u, int64_t units)
{
    for (int32_t i = p; i < p + panels; i++)
        for (int64_t j = u; j < u + units; j++)
            __builtin_prefetch((const void *)((uintptr_t)d->panel + (uintptr_t)(i * d->panel_stride + j * 64)));
}

static void tern__dot_quads(const tern__dot *d, const tern__quads *k)
{
    uint8_t buffer[TERN__DECODED * 64 + 63], *code = buffer + (-(uintptr_t)buffer & 63);
    const int64_t chunk = k->chunk / k->per_unit;
    tern__dot part = *d;
    part.panel = code;
    part.panel_stride = k->chunk * 64;
    for (int32_t p = 0; p < d->panels; p += part.panels) {
        part.panels = d->panels - p < k->panels ? d->panels - p : k->panels;
        part.scale = (const uint8_t *)d->scale + p * d->scale_stride;
        for (int64_t u = 0; u < d->units; u += chunk) {
            const int64_t units = d->units - u < chunk ? d->units - u : chunk;
            for (int32_t i = 0; i < part.panels; i++)
                k->decode(d->panel + (p + i) * d->panel_stride + u * 64, units, code + i * part.panel_stride);
            tern__prefetch_chunk(d, p, part.panels, u + units, chunk);
            part.units = units * k->per_unit;
            part.q = d->q + u * k->per_unit * 4;
            part.acc = d->acc + (int64_t)p * d->tokens * 16;
            part.facc = d->facc && u + units == d->units ? d->facc + (int64_t)p * d->tokens * 16 : NULL;
            tern__tile_tokens(&part, k, (int64_t)d->tokens * 16, 16, u == 0 ? TERN__FROM_SUM : TERN__FROM_ACC);
        }
    }
}

#if defined(TERN__WITH_AVX_VNNI) || defined(TERN__WITH_AVX512_VNNI)
/* Panels that are quads already. */
static void tern__dot_codes(const tern__dot *d, const tern__quads *k, int64_t acc_row, int32_t add)
{
    tern__dot part = *d;
    for (int32_t p = 0; p < d->panels; p += part.panels) {
        part.panels = d->panels - p < k->panels ? d->panels - p : k->panels;
        part.panel = d->panel + p * d->panel_stride;
        part.acc = d->acc + p * 16;
        tern__tile_tokens(&part, k, acc_row, acc_row, add ? TERN__FROM_BOTH : TERN__FROM_SUM);
    }
}
#endif

/* Runs a tier's dot of one group on each. */
static inline __attribute__((always_inline)) void tern__dot_groups(const tern__dot *d, int32_t inputs, void (*dot)(const tern__dot *))
{
    for (int64_t g = 0; g < d->groups; g++) {
        const tern__dot one = tern__dot_group(d, g, inputs);
        dot(&one);
    }
}

/* The small loops below have constant bounds and run over arrays of registers: they must vanish. */
#ifdef __clang__
#define TERN__UNROLL _Pragma("clang loop unroll(full)")
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* both: gcc 12 on its own _mm512_undefined_epi32, in C++ */
#pragma GCC diagnostic ignored "-Wuninitialized"
#define TERN__UNROLL _Pragma("GCC unroll 64")
#endif

/* n < 16 bytes without a call, before which a loop would have to put its registers away. */
static inline __attribute__((always_inline)) void tern__copy_tail(void *to, const void *from, int64_t n)
{
    uint8_t *t = (uint8_t *)to;
    const uint8_t *f = (const uint8_t *)from;
    if (n & 8) { memcpy(t, f, 8); t += 8; f += 8; }
    if (n & 4) { memcpy(t, f, 4); t += 4; f += 4; }
    if (n & 2) { memcpy(t, f, 2); t += 2; f += 2; }
    if (n & 1) *t = *f;
}

/* The float kernels, the same for every vector width. Tier X has TARGET, W lanes, vector types V (float)
   and I (int), the intrinsic prefix MM, and brings tern__load_X and tern__store_X (the first n lanes, the
   rest +0), tern__load_int_X, tern__store_int_X, tern__store_i8_X, tern__f16_X,
   tern__i8_X and tern__i16_X, which widen, and tern__lattice_X: the low 24 bits are tern__lattice of the lowest 8. */
#define TERN__X86_FLOAT(X, TARGET, W, V, I, MM)                                                          \
static TARGET void tern__emit_##X(const tern__emit *e)                                                   \
{                                                                                                        \
    for (int32_t t = 0; t < e->tokens; t++)                                                              \
        for (int32_t r = 0; r < e->rows; r += W) {                                                       \
            V y = MM##set1_ps(e->scale[t]);                                                              \
            if (e->facc) y = MM##loadu_ps(e->facc + t * 16 + r) * y;                                     \
            else y = MM##cvtepi32_ps(tern__load_int_##X(e->acc + t * 16 + r)) * (y * MM##loadu_ps(e->s + r)); \
            if (e->bias) y = y + MM##loadu_ps(e->bias + r);                                              \
            tern__store_##X(e->y + t * e->y_stride + r, y, e->rows - r);                                 \
        }                                                                                                \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET V tern__scales_##X(tern_type type, const void *p, int64_t i) \
{                                                                                                        \
    if (type == TERN_F16) return tern__f16_##X((const uint16_t *)p + i);                                 \
    if (type == TERN_POW2) { /* below -126 is zero */                                                    \
        const I e = tern__i8_##X((const int8_t *)p + i), bits = MM##slli_epi32(MM##add_epi32(e, MM##set1_epi32(127)), 23); \
        return (V)MM##max_epi32(bits, MM##set1_epi32(0));                                                \
    }                                                                                                    \
    if (type == TERN_LOG) { /* as tern__from_log */                                                      \
        const I steps = MM##sub_epi32(tern__i16_##X((const int16_t *)p + i), MM##set1_epi32(TERN__LEAST_LOG)); \
        const I exponent = MM##slli_epi32(MM##srli_epi32(steps, 8), 23), zero = MM##srai_epi32(steps, 31); \
        return (V)(MM##add_epi32(MM##slli_epi32(tern__lattice_##X(steps), 8), exponent) & ~zero);        \
    }                                                                                                    \
    return MM##loadu_ps((const float *)p + i);                                                           \
}                                                                                                        \
/* What a dot leaves: sum in acc, or its product with the scale in facc. */                              \
static inline __attribute__((always_inline)) TARGET void tern__leave_##X(const tern__dot *d, int64_t at, I sum, V scale, int32_t add) \
{                                                                                                        \
    if (d->facc) {                                                                                       \
        V y = MM##cvtepi32_ps(sum) * scale;                                                              \
        if (add) y = MM##loadu_ps(d->facc + at) + y;                                                     \
        MM##storeu_ps(d->facc + at, y);                                                                  \
    } else tern__store_int_##X(d->acc + at, sum);                                                        \
}                                                                                                        \
/* The scale of panel p from row r of the group on, for tern__leave. */                                  \
static inline __attribute__((always_inline)) TARGET V tern__scale_##X(const tern__dot *d, int64_t p, int64_t r) \
{                                                                                                        \
    return d->facc ? tern__scales_##X(d->scale_type, (const uint8_t *)d->scale + p * d->scale_stride, r) : MM##setzero_ps(); \
}                                                                                                        \
/* The canonical sum of 64 lanes; in pairs: the even and the odd ones of each 2 W are apart. tern__quarter_X leaves four. */ \
static inline __attribute__((always_inline)) TARGET float tern__add_up_##X(const int pairs, V *sum)      \
{                                                                                                        \
    __m128 four;                                                                                         \
    TERN__UNROLL for (int half = 32 / W; half > pairs; half /= 2)                                        \
        TERN__UNROLL for (int j = 0; j < half; j++) sum[j] = sum[j] + sum[j + half];                     \
    four = tern__quarter_##X(sum[0]);                                                                    \
    four = four + _mm_movehl_ps(four, four);                                                             \
    if (pairs) {                                                                                         \
        const __m128 odd = tern__quarter_##X(sum[1]);                                                    \
        four = _mm_unpacklo_ps(four, odd + _mm_movehl_ps(odd, odd));                                     \
        four = four + _mm_movehl_ps(four, four);                                                         \
    }                                                                                                    \
    return _mm_cvtss_f32(four + _mm_shuffle_ps(four, four, 1));                                          \
}                                                                                                        \
/* 64 floats more, of which there are `left`. */                                                         \
static inline __attribute__((always_inline)) TARGET void tern__sum_step_##X(const int32_t kind, int64_t left, const float *x, V *sum) \
{                                                                                                        \
    TERN__UNROLL for (int j = 0; j < 64 / W; j++) {                                                      \
        V v = tern__load_##X(x + j * W, left - j * W);                                                   \
        if (kind == 1) v = (V)((I)v & MM##set1_epi32(0x7fffffff));                                       \
        if (kind == 2) v = v * v;                                                                        \
        sum[j] = sum[j] + v;                                                                             \
    }                                                                                                    \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET float tern__sum_kind_##X(const int32_t kind, int64_t n, const float *x) \
{                                                                                                        \
    V sum[64 / W];                                                                                       \
    int64_t i;                                                                                           \
    TERN__UNROLL for (int j = 0; j < 64 / W; j++) sum[j] = MM##setzero_ps();                             \
    for (i = 0; i <= n - 64; i += 64) tern__sum_step_##X(kind, 64, x + i, sum);                          \
    if (i < n) tern__sum_step_##X(kind, n - i, x + i, sum);                                              \
    return tern__add_up_##X(0, sum);                                                                     \
}                                                                                                        \
static TARGET float tern__sum_##X(int32_t kind, int64_t n, const float *x)                               \
{                                                                                                        \
    return kind == 0 ? tern__sum_kind_##X(0, n, x) : kind == 1 ? tern__sum_kind_##X(1, n, x) : tern__sum_kind_##X(2, n, x); \
}                                                                                                        \
static TARGET uint32_t tern__absmax_##X(int64_t n, const float *x, const float *gain)                    \
{                                                                                                        \
    const I magnitude = MM##set1_epi32(0x7fffffff);                                                      \
    I most = MM##set1_epi32(0);                                                                          \
    int64_t i = 0;                                                                                       \
    if (!gain) for (; i <= n - 8 * W; i += 8 * W) { /* as fast as memory */                              \
        I v[8];                                                                                          \
        TERN__UNROLL for (int j = 0; j < 8; j++) v[j] = (I)MM##loadu_ps(x + i + j * W) & magnitude;      \
        TERN__UNROLL for (int half = 4; half; half /= 2)                                                 \
            TERN__UNROLL for (int j = 0; j < half; j++) v[j] = MM##max_epu32(v[j], v[j + half]);         \
        most = MM##max_epu32(most, v[0]);                                                                \
    }                                                                                                    \
    for (; i < n; i += W) {                                                                              \
        V v = tern__load_##X(x + i, n - i);                                                              \
        if (gain) v = v * tern__load_##X(gain + i, n - i);                                               \
        most = MM##max_epu32(most, (I)v & magnitude);                                                    \
    }                                                                                                    \
    uint32_t lane[W];                                                                                    \
    tern__store_int_##X(lane, most);                                                                     \
    for (int j = 1; j < W; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];                         \
    return lane[0];                                                                                      \
}                                                                                                        \
static TARGET int32_t tern__round_##X(int64_t n, const float *x, const float *gain, float inverse, int32_t most, int8_t *q) \
{                                                                                                        \
    const I low = MM##set1_epi32(-most - 1), high = MM##set1_epi32(most);                                \
    I sum = MM##set1_epi32(0);                                                                           \
    for (int64_t i = 0; i < n; i += W) {                                                                 \
        V v = tern__load_##X(x + i, n - i);                                                              \
        if (gain) v = v * tern__load_##X(gain + i, n - i);                                               \
        const I rounded = MM##max_epi32(low, MM##min_epi32(high, MM##cvtps_epi32(v * MM##set1_ps(inverse)))); \
        tern__store_i8_##X(q + i, rounded, n - i);                                                       \
        sum = MM##add_epi32(sum, rounded);                                                               \
    }                                                                                                    \
    int32_t lane[W];                                                                                     \
    tern__store_int_##X(lane, sum);                                                                      \
    for (int j = 1; j < W; j++) lane[0] += lane[j];                                                      \
    return lane[0];                                                                                      \
}

/* What an input of a unit is worth in its byte: digit s of each row covers inputs 4s to 4s + 3. Of 2 bits a vector of
   halves may hold two units. */
static const int32_t tern__places[2][32] = {
    {1, 1, 1, 1, 4, 4, 4, 4, 16, 16, 16, 16, 64, 64, 64, 64},
    {1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27, 81, 81, 81, 81}
};
static const int16_t tern__half_places[2][32] = {
    {1, 1, 1, 1, 4, 4, 4, 4, 16, 16, 16, 16, 64, 64, 64, 64, 1, 1, 1, 1, 4, 4, 4, 4, 16, 16, 16, 16, 64, 64, 64, 64},
    {1, 1, 1, 1, 3, 3, 3, 3, 9, 9, 9, 9, 27, 27, 27, 27, 81, 81, 81, 81}
};

/* Where the magnitude of v, floats or bf16, is above `up`: place with the sign of v. Without mask registers `down`, which is
   -up, is not needed. bf16 compares as integers, against the upper half of a threshold; it stands in both halves of `up`. */
#define TERN__X86_DECIDE(X, TARGET, V, I, MM)                                                            \
static inline __attribute__((always_inline)) TARGET I tern__decide_##X(const int bf16, I place, I v, int32_t up, \
                                                                       int32_t down)                     \
{                                                                                                        \
    (void)down;                                                                                          \
    if (bf16) return MM##sign_epi16(place, v) & MM##cmpgt_epi16(v & MM##set1_epi16(0x7fff), MM##set1_epi32(up)); \
    return MM##sign_epi32(place, v) & (I)((V)(v & MM##set1_epi32(0x7fffffff)) > (V)MM##set1_epi32(up));  \
}

/* Weights in training, for the same vectors. The tier brings tern__bf16_X, which widens, tern__store_i16_X, tern__decide_X and
   tern__store_units_X. bf16 is summed and decided as it is stored, 2 W in a vector, whose even and odd elements become floats
   by a shift and a mask.
   A 128-bit lane of packed trits holds inputs of four rows, one or two digits of each of their bytes; the lanes of a unit are
   added up when it is stored. The 16 rows of a panel are packed four at a time, through eight units: where rows are a power of
   two long all 16 compete for one place in L1 (1.4 to 1.8 times as fast). The loop over the fours stays a loop, or gcc spills
   its vectors (half as fast with SSE). The panel before comes next, so L2 is asked for it, evenly and in the order of its
   addresses; asked for row beside row, or in bursts, it came slower than without.
   Vectors that end behind a unit of 20 take in what the next one begins with, whose place there is 0. */
#define TERN__X86_WEIGHTS(X, TARGET, W, V, I, MM)                                                        \
static TARGET void tern__widen_##X(tern_type type, int64_t n, const void *from, float *to)               \
{                                                                                                        \
    const uint16_t *half = (const uint16_t *)from;                                                       \
    int64_t i = 0;                                                                                       \
    if (type == TERN_F16) for (; i <= n - W; i += W) MM##storeu_ps(to + i, tern__f16_##X(half + i));     \
    else for (; i <= n - W; i += W) MM##storeu_ps(to + i, tern__bf16_##X(half + i));                     \
    for (; i < n; i++) to[i] = tern__load_float(type, from, i);                                          \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET V tern__get_##X(const int bf16, const void *p, int64_t i) \
{                                                                                                        \
    return bf16 ? tern__bf16_##X((const uint16_t *)p + i) : MM##loadu_ps((const float *)p + i);          \
}                                                                                                        \
/* 64 weights more; of bf16 the even ones of each 2 W go to one sum and the odd ones to the next. */     \
static inline __attribute__((always_inline)) TARGET I tern__above_step_##X(const int all, const int bf16, const void *x, V delta, \
                                                                           V *sum, I counted)            \
{                                                                                                        \
    const I magnitude = MM##set1_epi32(0x7fffffff), high = MM##set1_epi32(0x7fff0000);                   \
    TERN__UNROLL for (int j = 0; j < 64 / W; j++) {                                                      \
        const I word = tern__load_int_##X((const uint8_t *)x + (bf16 ? j / 2 : j) * 4 * W);              \
        V v = (V)((bf16 && j % 2 == 0 ? MM##slli_epi32(word, 16) : word) & (bf16 && j % 2 ? high : magnitude)); \
        if (!all) {                                                                                      \
            const I above = (I)(v > delta);                                                              \
            counted = MM##sub_epi32(counted, above);                                                     \
            v = (V)((I)v & above);                                                                       \
        }                                                                                                \
        sum[j] = sum[j] + v;                                                                             \
    }                                                                                                    \
    return counted;                                                                                      \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET float tern__above_##X(const int all, const int bf16, int64_t n, const void *x, \
                                                                          const uint8_t *ask, float delta, int64_t *count)\
{                                                                                                        \
    const int64_t bytes = bf16 ? 2 : 4, most = n / 64 * 64 * bytes;                                      \
    const uint8_t *const w = (const uint8_t *)x;                                                         \
    const V least = MM##set1_ps(delta);                                                                  \
    V sum[64 / W];                                                                                       \
    I counted = MM##set1_epi32(0);                                                                       \
    uint8_t tail[256] TERN__ALIGN64;                                                                     \
    int32_t lane[W];                                                                                     \
    TERN__UNROLL for (int j = 0; j < 64 / W; j++) sum[j] = MM##setzero_ps();                             \
    for (int64_t i = 0; i < most; i += 64 * bytes) {                                                     \
        counted = tern__above_step_##X(all, bf16, w + i, least, sum, counted);                           \
        if (ask) TERN__UNROLL for (int64_t k = 0; k < 32 * bytes; k += 64) __builtin_prefetch(ask + i / 2 + k, 0, 2); \
    }                                                                                                    \
    if (most < n * bytes) {                                                                              \
        memset(tail, 0, sizeof tail);                                                                    \
        memcpy(tail, w + most, (size_t)(n * bytes - most));                                              \
        counted = tern__above_step_##X(all, bf16, tail, least, sum, counted);                            \
    }                                                                                                    \
    tern__store_int_##X(lane, counted);                                                                  \
    for (int j = 0; j < W && !all; j++) *count += lane[j];                                               \
    if (all) *count += n;                                                                                \
    return tern__add_up_##X(bf16, sum);                                                                  \
}                                                                                                        \
static TARGET float tern__sum_above_##X(tern_type type, int64_t n, const void *x, const uint8_t *ask, float delta, int64_t *count) \
{                                                                                                        \
    const int all = delta < 0.0f;                                                                        \
    if (type == TERN_BF16) return all ? tern__above_##X(1, 1, n, x, ask, delta, count) : tern__above_##X(0, 1, n, x, ask, delta, count); \
    return all ? tern__above_##X(1, 0, n, x, ask, delta, count) : tern__above_##X(0, 0, n, x, ask, delta, count); \
}                                                                                                        \
/* A unit of four rows, or two where a vector holds them; bound: see tern__decide_X. */                  \
static inline __attribute__((always_inline)) TARGET I tern__four_rows_##X(const int base3, const int bf16, const uint8_t *const *row, \
                                                                          int64_t at, int32_t (*bound)[16], int r) \
{                                                                                                        \
    const int bytes = bf16 ? 2 : 4, inputs = base3 ? 20 : 16;                                            \
    I sum = MM##set1_epi32(0);                                                                           \
    TERN__UNROLL for (int j = 0; j < inputs; j += 4 * W / bytes) {                                       \
        const I place = tern__load_int_##X(bf16 ? (const void *)(tern__half_places[base3] + j) : tern__places[base3] + j); \
        I t[4];                                                                                          \
        TERN__UNROLL for (int k = 0; k < 4; k++)                                                         \
            t[k] = tern__decide_##X(bf16, place, tern__load_int_##X(row[r + k] + (at + j) * bytes), bound[0][r + k], \
                                    bound[1][r + k]);                                                    \
        if (bf16) {                                                                                      \
            const V low = (V)MM##packs_epi16(t[0], t[1]), high = (V)MM##packs_epi16(t[2], t[3]);         \
            sum = MM##add_epi8(sum, MM##add_epi8((I)MM##shuffle_ps(low, high, 0x88), (I)MM##shuffle_ps(low, high, 0xdd))); \
        } else sum = MM##add_epi8(sum, MM##packs_epi16(MM##packs_epi32(t[0], t[1]), MM##packs_epi32(t[2], t[3]))); \
    }                                                                                                    \
    return sum;                                                                                          \
}                                                                                                        \
/* Up to eight units; of each four rows each asks for its share. */                                      \
static inline __attribute__((always_inline)) TARGET void tern__some_units_##X(const int base3, const int bf16, const uint8_t *const *row, \
                                                                              int64_t at, int64_t units, int32_t (*bound)[16], \
                                                                              const uint8_t *ask, int64_t share, uint8_t *unit) \
{                                                                                                        \
    const int both = bf16 && !base3 && W == 16;                                                          \
    const I none = MM##set1_epi8(base3 ? 121 : 85);                                                      \
    const uint8_t *end = ask;                                                                            \
    I sum[8][4];                                                                                         \
    for (int r = 0; r < 4; r++)                                                                          \
        for (int64_t u = 0; u < units; u += 1 + both) {                                                  \
            sum[u][r] = tern__four_rows_##X(base3, bf16, row, at + u * (base3 ? 20 : 16), bound, 4 * r); \
            for (end += (1 + both) * share; ask < end; ask += 64) __builtin_prefetch(ask, 0, 2);         \
        }                                                                                                \
    for (int64_t u = 0; u < units; u += 1 + both) tern__store_units_##X(both, sum[u], none, unit + 64 * u); \
}                                                                                                        \
/* The last inputs, of which no whole vector may be read. */                                             \
static inline __attribute__((always_inline)) TARGET void tern__last_units_##X(const int base3, const int bf16, const uint8_t *const *row, \
                                                                              int64_t at, int64_t n, int32_t (*bound)[16], uint8_t *unit) \
{                                                                                                        \
    const int bytes = bf16 ? 2 : 4;                                                                      \
    uint8_t tail[16][128] TERN__ALIGN64, units[128] TERN__ALIGN64;                                       \
    const uint8_t *last[16];                                                                             \
    memset(tail, 0, sizeof tail);                                                                        \
    for (int r = 0; r < 16; r++) {                                                                       \
        memcpy(tail[r], row[r] + at * bytes, (size_t)(n * bytes));                                       \
        last[r] = tail[r];                                                                               \
    }                                                                                                    \
    tern__some_units_##X(base3, bf16, last, 0, 1, bound, unit, 0, units);                                \
    memcpy(unit, units, (size_t)(!base3 && n > 16 ? 128 : 64));                                          \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET void tern__units_##X(const int base3, const int bf16, const tern__packing *p) \
{                                                                                                        \
    const int bytes = bf16 ? 2 : 4, inputs = base3 ? 20 : 16, beyond = base3 ? 12 : 0, per = bf16 && !base3 && W == 16 ? 2 : 1; \
    const int64_t share = 2 * inputs * bytes * p->halves;                                                \
    const uint8_t *row[16];                                                                              \
    uint8_t *unit = p->unit;                                                                             \
    int32_t bound[2][16];                                                                                \
    int64_t i, units;                                                                                    \
    for (int r = 0; r < 16; r++) {                                                                       \
        const uint32_t up = tern__bits(p->threshold[r]), half = (up >> 16) * 0x10001u;                   \
        bound[0][r] = (int32_t)(bf16 ? half : up);                                                       \
        bound[1][r] = (int32_t)(bf16 ? half | 0x80008000u : up | 0x80000000u);                           \
        row[r] = (const uint8_t *)p->x + (r < p->rows ? r : 0) * p->stride * bytes;                      \
    }                                                                                                    \
    for (i = 0; (units = tern__min(8, (p->n - i - beyond) / inputs) / per * per) > 0; i += units * inputs, unit += 64 * units) \
        tern__some_units_##X(base3, bf16, row, i, units, bound, p->ask + i / inputs * 4 * share, share, unit); \
    for (; i < p->n; i += per * inputs, unit += 64 * per)                                                \
        tern__last_units_##X(base3, bf16, row, i, tern__min(per * inputs, p->n - i), bound, unit);       \
}                                                                                                        \
static TARGET void tern__ternarize_##X(const tern__packing *p)                                           \
{                                                                                                        \
    if (p->type == TERN_BF16 && p->base3) tern__units_##X(1, 1, p);                                      \
    else if (p->type == TERN_BF16) tern__units_##X(0, 1, p);                                             \
    else if (p->base3) tern__units_##X(1, 0, p);                                                         \
    else tern__units_##X(0, 0, p);                                                                       \
}

/* Philox has a block in the low half of each 64-bit lane: 2 W words at a time. In this order of the blocks two unpacks
   put the words into that of the weights. The high halves hold what multiplications do not look at. */
#define TERN__BLOCKS_4 0, 1
#define TERN__BLOCKS_8 0, 2, 1, 3
#define TERN__BLOCKS_16 0, 4, 1, 5, 2, 6, 3, 7
#ifndef TERNARY_NO_TRAINING
static void tern__philox_keys(uint64_t seed, uint32_t keys[20])
{
    for (uint32_t round = 0; round < 10; round++) {
        keys[2 * round] = (uint32_t)seed + round * 0x9E3779B9u;
        keys[2 * round + 1] = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
    }
}
#endif
#define TERN__X86_OPTIMIZE(X, TARGET, W, V, I, MM)                                                       \
static inline __attribute__((always_inline)) TARGET void                                                 \
    tern__philox_##X(const tern__random *r, const uint32_t *keys, int64_t block, I *word)                \
{                                                                                                        \
    static const int64_t blocks[W / 2] = {TERN__BLOCKS_##W};                                             \
    const I m0 = MM##set1_epi32((int32_t)0xD2511F53), m1 = MM##set1_epi32((int32_t)0xCD9E8D57);          \
    I c0 = tern__load_int_##X(blocks) + block, c1 = MM##srli_epi64(c0, 32),                              \
      c2 = MM##set1_epi32((int32_t)r->step), c3 = MM##set1_epi32((int32_t)r->stream);                    \
    TERN__UNROLL for (int round = 0; round < 20; round += 2) {                                           \
        const I p0 = MM##mul_epu32(c0, m0), p1 = MM##mul_epu32(c2, m1);                                  \
        c0 = MM##srli_epi64(p1, 32) ^ c1 ^ MM##set1_epi32((int32_t)keys[round]);                         \
        c1 = p1;                                                                                         \
        c2 = MM##srli_epi64(p0, 32) ^ c3 ^ MM##set1_epi32((int32_t)keys[round + 1]);                     \
        c3 = p0;                                                                                         \
    }                                                                                                    \
    c0 = (c0 & 0xffffffff) | MM##slli_epi64(c1, 32);                                                     \
    c2 = (c2 & 0xffffffff) | MM##slli_epi64(c3, 32);                                                     \
    word[0] = MM##unpacklo_epi64(c0, c2);                                                                \
    word[1] = MM##unpackhi_epi64(c0, c2);                                                                \
}                                                                                                        \
/* tern__to_bf16_with on each lane. */                                                                   \
static inline __attribute__((always_inline)) TARGET I tern__round_bf16_##X(V x, I word)                  \
{                                                                                                        \
    typedef uint32_t words __attribute__((vector_size(4 * W)));                                          \
    const words u = (words)x, sum = u + ((words)word & 0xffff), inf = u - u + 0x7f800000;                \
    const words beyond = (words)((sum & inf) == inf), special = (words)((u & inf) == inf);               \
    const words kept = (beyond & ((u >> 16 & 0x8000) | 0x7f7f)) | (~beyond & sum >> 16);                 \
    return (I)((special & (u >> 16 | ((words)((u & 0xffff) != 0) & 1))) | (~special & kept));            \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET I tern__nearest_##X(V x) /* the word that rounds to nearest even */ \
{                                                                                                        \
    return MM##add_epi32(MM##set1_epi32(0x7fff), MM##srli_epi32((I)x, 16) & MM##set1_epi32(1));          \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET void tern__put_##X(int32_t bf16, void *p, int64_t i, V x, I word) \
{                                                                                                        \
    if (bf16) tern__store_i16_##X((uint16_t *)p + i, tern__round_bf16_##X(x, word));                     \
    else MM##storeu_ps((float *)p + i, x);                                                               \
}                                                                                                        \
static TARGET int64_t tern__optimize_most_##X(const tern__optimize_work *work, int64_t begin, int64_t end) \
{                                                                                                        \
    const tern_optimize_args *a = work->a;                                                               \
    const V factor = MM##set1_ps(work->factor), correct1 = MM##set1_ps(work->correct1), correct2 = MM##set1_ps(work->correct2); \
    const V beta1 = MM##set1_ps(a->beta1), other1 = MM##set1_ps(1.0f - a->beta1),                        \
            rate = MM##set1_ps(a->rate), decay = MM##set1_ps(a->decay);                                  \
    const V beta2 = MM##set1_ps(a->beta2), other2 = MM##set1_ps(1.0f - a->beta2), eps = MM##set1_ps(a->eps); \
    const int32_t bf16 = a->type == TERN_BF16, narrow = a->moment_type == TERN_BF16;                     \
    const tern__random random = {a->seed, a->step, a->stream}, other = {a->seed, a->step, a->stream ^ 0x80000000u}; \
    uint32_t keys[20];                                                                                   \
    int64_t i;                                                                                           \
    tern__philox_keys(a->seed, keys);                                                                    \
    for (i = begin; i <= end - 2 * W; i += 2 * W) {                                                      \
        I word[2] = {MM##set1_epi32(0)}, moments[2] = {MM##set1_epi32(0)};                                            \
        if (bf16 && !a->nearest) tern__philox_##X(&random, keys, i / 4, word);                      \
        if (narrow && a->moment1) tern__philox_##X(&other, keys, i / 4, moments);    \
        TERN__UNROLL for (int h = 0; h < 2; h++) {                                                       \
            const int64_t at = i + h * W;                                                                \
            const V g = MM##loadu_ps(a->grad + at) * factor;                                             \
            V w = tern__get_##X(bf16, a->w, at), step = g;                                               \
            if (a->kind == TERN_ADAMW) {                                                                 \
                const V m1 = beta1 * tern__get_##X(narrow, a->moment1, at) + other1 * g;                 \
                const V m2 = beta2 * tern__get_##X(narrow, a->moment2, at) + other2 * g * g;             \
                step = m1 * correct1 / (MM##sqrt_ps(m2 * correct2) + eps);                               \
                tern__put_##X(narrow, a->moment1, at, m1, moments[h]);                                   \
                tern__put_##X(narrow, a->moment2, at, m2, MM##srli_epi32(moments[h], 16));               \
            } else if (a->moment1) {                                                                     \
                step = beta1 * tern__get_##X(narrow, a->moment1, at) + g;                                \
                tern__put_##X(narrow, a->moment1, at, step, moments[h]);                                 \
            }                                                                                            \
            w = w - rate * (step + decay * w);                                                           \
            tern__put_##X(bf16, a->w, at, w, a->nearest ? tern__nearest_##X(w) : word[h]);               \
            MM##storeu_ps(a->grad + at, MM##setzero_ps());                                               \
        }                                                                                                \
    }                                                                                                    \
    return i;                                                                                            \
}                                                                                                        \
static void tern__optimize_##X(const tern__optimize_work *work, int64_t begin, int64_t end)              \
{ /* not the TARGET's: gcc 12 leaves the vectors dirty where a function ends in another's call */        \
    tern__optimize_scalar(work, tern__optimize_most_##X(work, begin, end), end);                         \
}

/* Stochastic rounding and flips, by the same words as 16-bit halves: a block's eight lie as its row takes them. */
enum { TERN__HALVES = 1024 }; /* at a time */
#define TERN__X86_FLIPS(X, TARGET, W, V, I, MM)                                                          \
static TARGET void tern__halves_##X(const tern__random *r, uint64_t block, int64_t n, uint16_t *to)      \
{                                                                                                        \
    uint32_t keys[20];                                                                                   \
    tern__philox_keys(r->seed, keys);                                                                    \
    for (int64_t i = 0; i < n; i += 4 * W) {                                                             \
        I word[2];                                                                                       \
        tern__philox_##X(r, keys, (int64_t)block + i / 8, word);                                         \
        tern__store_int_##X(to + i, word[0]);                                                            \
        tern__store_int_##X(to + i + 2 * W, word[1]);                                                    \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__round_up_##X(const tern__random *r, uint64_t block, int64_t n, const float *x,  \
                                      const float *gain, float row, float inverse, int8_t *q)            \
{                                                                                                        \
    uint16_t half[TERN__HALVES + 4 * W];                                                                 \
    const V most = MM##set1_ps(127.0f), least = MM##set1_ps(-127.0f), unit = MM##set1_ps(7.62939453125e-6f); \
    const I one = MM##set1_epi32(1);                                                                     \
    for (int64_t first = 0; first < n; first += TERN__HALVES) {                                          \
        const int64_t end = n - first < TERN__HALVES ? n : first + (int64_t)TERN__HALVES;                \
        tern__halves_##X(r, block + (uint64_t)first / 8, end - first, half);                             \
        for (int64_t i = first; i < end; i += W) {                                                       \
            const I u = MM##srli_epi32((I)tern__bf16_##X(half + (i - first)), 15) | one;                 \
            V v = tern__load_##X(x + i, n - i);                                                          \
            if (gain) v = v * tern__load_##X(gain + i, n - i);                                           \
            v = v * MM##set1_ps(row);                                                                    \
            v = v * MM##set1_ps(inverse);                                                                \
            v = MM##floor_ps(v + MM##cvtepi32_ps(u) * unit);                                             \
            tern__store_i8_##X(q + i, MM##cvttps_epi32(MM##max_ps(least, MM##min_ps(most, v))), n - i);  \
        }                                                                                                \
    }                                                                                                    \
}                                                                                                        \
static TARGET int64_t tern__push_most_##X(const tern__push *p, const uint16_t *half, int64_t n,          \
                                          float *grad, int8_t *accum, int8_t *trit, int32_t *events)     \
{                                                                                                        \
    typedef int32_t ints __attribute__((vector_size(4 * W)));                                            \
    const ints zero = {0}, one = zero + 1, theta = zero + p->theta;                                      \
    ints flips = zero, held = zero;                                                                      \
    int32_t lane[W];                                                                                     \
    int64_t i;                                                                                           \
    for (i = 0; i <= n - W; i += W) {                                                                    \
        const V g = MM##loadu_ps(grad + i);                                                              \
        const ints t = (ints)tern__i8_##X(trit + i);                                                     \
        ints step;                                                                                       \
        if (p->sign)                                                                                     \
            step = (ints)MM##mullo_epi32((I)((ints)(g < MM##setzero_ps())                                \
                                             - (ints)(g > MM##setzero_ps())), MM##set1_epi32(p->factor));\
        else {                                                                                           \
            const V units = MM##max_ps(MM##set1_ps(-1024.0f), MM##min_ps(MM##set1_ps(1024.0f), g * MM##set1_ps(p->inverse))); \
            const ints whole = (ints)MM##cvtps_epi32(units) & (ints)(g == g); /* NaN moves nothing */    \
            const I size = MM##mullo_epi32((I)whole, MM##set1_epi32(p->factor));                         \
            step = (ints)MM##srai_epi32(MM##add_epi32(size, MM##srli_epi32((I)tern__bf16_##X(half + i), 16)), 16); \
        }                                                                                                \
        const ints moved =                                                                               \
            (ints)MM##max_epi32(MM##set1_epi32(-127),                                                    \
                                MM##min_epi32(MM##set1_epi32(127), (I)((ints)tern__i8_##X(accum + i) - step)));\
        const ints below = moved >> 31, s = below | one, limit = (theta ^ below) - below;                \
        const ints over = (ints)(moved >= theta) | (ints)(moved <= -theta), same = (ints)(t == s),       \
                   flip = over & ~same, hold = over & same;                                              \
        const ints rest = p->sign ? zero : moved - limit;                                                \
        flips -= flip;                                                                                   \
        held -= hold;                                                                                    \
        tern__store_i8_##X(accum + i, (I)((hold & limit) | (flip & rest) | (~over & moved)), W);         \
        tern__store_i8_##X(trit + i, (I)(t + (s & flip)), W);                                            \
        MM##storeu_ps(grad + i, MM##setzero_ps());                                                       \
    }                                                                                                    \
    tern__store_int_##X(lane, (I)flips);                                                                 \
    for (int j = 0; j < W; j++) events[0] += lane[j];                                                    \
    tern__store_int_##X(lane, (I)held);                                                                  \
    for (int j = 0; j < W; j++) events[1] += lane[j];                                                    \
    return i;                                                                                            \
}                                                                                                        \
static void tern__push_##X(const tern__push *p, uint64_t block, int64_t skip, int64_t n, float *grad,    \
                           int8_t *accum, int8_t *trit, int32_t *events)                                 \
{                                                                                                        \
    uint16_t half[TERN__HALVES + 8 + 4 * W];                                                             \
    for (int64_t at = 0; at < n; at += TERN__HALVES) {                                                   \
        const int64_t some = n - at < TERN__HALVES ? n - at : (int64_t)TERN__HALVES, from = (skip + at) % 8; \
        if (!p->sign) tern__halves_##X(&p->random, block + (uint64_t)(skip + at) / 8, from + some, half); \
        const int64_t done = at + tern__push_most_##X(p, half + from, some, grad + at, accum + at, trit + at, events); \
        tern__push_scalar(p, block, skip + done, at + some - done, grad + done, accum + done, trit + done, events); \
    }                                                                                                    \
}

/* Tier X brings tern__swap_X, whose lane i is lane i ^ h, h a power of two below W. Within a vector a + b and a - b are one
   addition: to the lanes at distance h those with a sign. Beyond it vectors meet, two distances in one pass over x. */
#define TERN__X86_HADAMARD(X, TARGET, W, V, I, MM)                                                       \
static TARGET void tern__negate_##X(int64_t n, const uint32_t *signs, const float *x, float *y)             \
{                                                                                                        \
    uint32_t to_top[W]; /* factors that bring bit i to the top */                                        \
    for (int i = 0; i < W; i++) to_top[i] = 0x80000000u >> i;                                            \
    const I shift = tern__load_int_##X(to_top), top = MM##set1_epi32(INT32_MIN);                         \
    for (int64_t i = 0; i < n; i += W) {                                                                 \
        const I word = MM##set1_epi32((int32_t)(signs[i / 32] >> i % 32));                               \
        const V v = tern__load_##X(x + i, n - i);                                                        \
        tern__store_##X(y + i, (V)((I)v ^ (MM##mullo_epi32(word, shift) & top)), n - i);                 \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__hadamard_##X(int64_t p, float factor, float *x)                                 \
{                                                                                                        \
    float lane[W];                                                                                       \
    V sign[4];                                                                                           \
    int64_t distance = W;                                                                                \
    if (p < W) { tern__hadamard_scalar(p, factor, x); return; }                                          \
    for (int h = 1, j = 0; h < W; h *= 2, j++) {                                                         \
        for (int i = 0; i < W; i++) lane[i] = i & h ? -1.0f : 1.0f;                                      \
        sign[j] = MM##loadu_ps(lane);                                                                    \
    }                                                                                                    \
    for (int64_t i = 0; i < p; i += W) {                                                                 \
        V v = MM##loadu_ps(x + i) * MM##set1_ps(factor);                                                 \
        v = tern__swap_##X(v, 1) + v * sign[0];                                                          \
        v = tern__swap_##X(v, 2) + v * sign[1];                                                          \
        if (W > 4) v = tern__swap_##X(v, 4) + v * sign[2];                                               \
        if (W > 8) v = tern__swap_##X(v, 8) + v * sign[3];                                               \
        MM##storeu_ps(x + i, v);                                                                         \
    }                                                                                                    \
    if (p / W & 0x2AAAAAAA) { /* an odd number of distances */                                           \
        for (int64_t i = 0; i < p; i += 2 * W) {                                                         \
            const V a = MM##loadu_ps(x + i), b = MM##loadu_ps(x + i + W);                                \
            MM##storeu_ps(x + i, a + b);                                                                 \
            MM##storeu_ps(x + i + W, a - b);                                                             \
        }                                                                                                \
        distance = 2 * W;                                                                                \
    }                                                                                                    \
    for (; distance < p; distance *= 4)                                                                  \
        for (int64_t block = 0; block < p; block += 4 * distance)                                        \
            for (float *at = x + block; at < x + block + distance; at += W) {                            \
                const V a = MM##loadu_ps(at), b = MM##loadu_ps(at + distance);                           \
                const V c = MM##loadu_ps(at + 2 * distance), d = MM##loadu_ps(at + 3 * distance);        \
                const V ab = a + b, cd = c + d, minus_ab = a - b, minus_cd = c - d;                      \
                MM##storeu_ps(at, ab + cd);                                                              \
                MM##storeu_ps(at + distance, minus_ab + minus_cd);                                       \
                MM##storeu_ps(at + 2 * distance, ab - cd);                                               \
                MM##storeu_ps(at + 3 * distance, minus_ab - minus_cd);                                   \
            }                                                                                            \
}

#ifndef TERNARY_NO_GRAPH
/* The factors of some edges, once for all their columns. Not one by one in the loops over vectors: a function that is not
   inlined there has instructions of the base set, and each change from wide registers to those costs hundreds of cycles. */
static void tern__edge_factors(const tern__neighbours *a, float *factor)
{
    int64_t i;
    for (i = 0; i < a->n; i++) {
        if ((a->right || a->scale) && i + TERN__AHEAD_FACTORS < a->left) {
            const int64_t u = tern__edge_node(a->entry[i + TERN__AHEAD_FACTORS]);
            if (a->right) __builtin_prefetch(a->right + u);
            if (a->scale) __builtin_prefetch(a->scale + u);
        }
        factor[i] = tern__edge_factor(a->right, a->scale, a->entry[i]);
    }
}
#endif

/* The functions of TERN__MAPS on vectors, operation by operation those of floats. */
#define TERN__X86_MAP(X, TARGET, W, V, I, MM)                                                            \
static inline __attribute__((always_inline)) TARGET V tern__relu_##X(V x) { return (V)((I)x & ~(I)(x <= MM##setzero_ps())); } \
static inline __attribute__((always_inline)) TARGET V tern__where_positive_##X(V x, V y) { return (V)((I)y & (I)(x > MM##setzero_ps())); } \
static inline __attribute__((always_inline)) TARGET V tern__exp_##X(V x)                                 \
{                                                                                                        \
    const I below = (I)(x < MM##set1_ps(88.7f)), in = below & ~(I)(x < MM##set1_ps(-87.0f)), nan = (I)(x != x); \
    const V v = (V)((I)x & in), n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;                       \
    const I top = (I)(n == MM##set1_ps(128.0f)),                                                         \
            half = MM##slli_epi32(MM##add_epi32(MM##add_epi32(MM##cvtps_epi32(n), top),                  \
                                                MM##set1_epi32(127)), 23);                               \
    V r = v - n * 0.693359375f, p;                                                                       \
    r = r - n * -2.12194440e-4f;                                                                         \
    p = 1.9841270e-4f * r + 1.3888889e-3f;                                                               \
    p = p * r + 8.3333333e-3f;                                                                           \
    p = p * r + 4.1666667e-2f;                                                                           \
    p = p * r + 0.16666667f;                                                                             \
    p = p * r + 0.5f;                                                                                    \
    p = p * r * r + r + 1.0f;                                                                            \
    p = p * (V)MM##add_epi32((I)MM##set1_ps(1.0f), top & MM##set1_epi32(1 << 23)) * (V)half; /* at 128 twice its half */ \
    return (V)(((I)p & in) | ((I)x & nan) | (MM##set1_epi32(0x7F800000) & ~below & ~nan));               \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET V tern__sigmoid_##X(V x) { return 1.0f / (1.0f + tern__exp_##X(0.0f - x)); } \
static inline __attribute__((always_inline)) TARGET V tern__tanh_##X(V x) { return 1.0f - 2.0f / (tern__exp_##X(2.0f * x) + 1.0f); } \
static inline __attribute__((always_inline)) TARGET V tern__gelu_tanh_##X(V x)                           \
{                                                                                                        \
    return tern__tanh_##X(TERN__ROOT_2_PI * (x + 0.044715f * (x * x * x)));                              \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET V tern__larger_##X(V x, V than)                      \
{                                                                                                        \
    return (V)(((I)x & (I)(x > than)) | ((I)than & ~(I)(x > than)));                                     \
}                                                                                                        \
TERN__MAP_KERNEL(tern__map_##X, _##X, TARGET, W, V)                                                      \
TERN__SOFTMAX_KERNELS(X, _##X, TARGET, W, V)

/* Sums over edges: up to 8 vectors of columns stay in registers for all edges; rows of edges to come are asked for, into L2, which
   has more misses in flight than L1 (Zen 4, rows of 64 floats: 6.5 -> 12 GB/s). */
#define TERN__X86_AGGREGATE(X, TARGET, W, V, MM)                                                         \
static inline __attribute__((always_inline)) TARGET void tern__aggregate_block_##X(                      \
    const int N, int64_t lanes, const tern__neighbours *a, const float *factor, int64_t col)             \
{                                                                                                        \
    const uintptr_t base = a->q ? (uintptr_t)(a->q + col) : (uintptr_t)(a->x + col), width = a->q ? 1 : 4; \
    V sum[8];                                                                                            \
    TERN__UNROLL for (int v = 0; v < N; v++) sum[v] = MM##setzero_ps();                                  \
    for (int64_t i = 0; i < a->n; i++) {                                                                 \
        const int64_t at = (int64_t)(a->entry[i] & 0x7FFFFFFFu) * a->row + col;                          \
        const V f = MM##set1_ps(factor[i]);                                                              \
        if (i + TERN__AHEAD_EDGES < a->left) {                                                           \
            const uintptr_t next = base + (uintptr_t)(a->entry[i + TERN__AHEAD_EDGES] & 0x7FFFFFFFu) * (uintptr_t)a->row * width; \
            for (uintptr_t b = 0; b < (uintptr_t)(N * W) * width; b += 64) __builtin_prefetch((const void *)(next + b), 0, 2); \
        }                                                                                                \
        if (a->q) TERN__UNROLL for (int v = 0; v < N; v++) sum[v] = sum[v] + MM##cvtepi32_ps(tern__i8_##X(a->q + at + v * W)) * f; \
        else TERN__UNROLL for (int v = 0; v < N; v++) sum[v] = sum[v] + tern__load_##X(a->x + at + v * W, lanes - v * W) * f; \
    }                                                                                                    \
    TERN__UNROLL for (int v = 0; v < N; v++) tern__store_##X(a->y + col + v * W, sum[v] * MM##set1_ps(a->whole), lanes - v * W); \
}                                                                                                        \
static TARGET void tern__aggregate_##X(const tern__neighbours *a)                                        \
{                                                                                                        \
    float factor[TERN__EDGES];                                                                           \
    int64_t col = 0;                                                                                     \
    tern__edge_factors(a, factor);                                                                       \
    for (; a->cols - col >= 8 * W; col += 8 * W) tern__aggregate_block_##X(8, 8 * W, a, factor, col);    \
    for (; a->cols - col >= 2 * W; col += 2 * W) tern__aggregate_block_##X(2, 2 * W, a, factor, col);    \
    for (; a->cols > col; col += W) tern__aggregate_block_##X(1, a->cols - col, a, factor, col);         \
}

/* The float tile: R rows of p by 2 W lanes stay in registers for all of k; the 32 lanes take 16/W passes. MADD says
   how a product joins its sum. What comes next from memory, the next tile's p or this one's c, is asked for a row at a
   time: all at once, it holds up the loop's own reads (4096x14336, 512 tokens: 80 -> 85% of FMA). */
#define TERN__PLAIN_MADD(a, b, c) ((a) * (b) + (c))
static inline __attribute__((always_inline)) void tern__prefetch_lanes(uintptr_t at)
{
    __builtin_prefetch((const void *)at, 1);
    __builtin_prefetch((const void *)(at + 64), 1);
    __builtin_prefetch((const void *)(at + 124), 1);
}
#define TERN__X86_TILE(NAME, TARGET, W, V, MM, ROWS, MADD)                                               \
static inline __attribute__((always_inline)) TARGET void NAME##_block(const int R, const tern__tile *t, int at) \
{                                                                                                        \
    float *const to = t->c ? t->c + at * t->c_row : t->p + at * 32;                                      \
    const int64_t to_row = t->c ? t->c_row : 32;                                                         \
    const uintptr_t ask = t->c ? (uintptr_t)to : (uintptr_t)(t->p + at * 32) + 128 * (uintptr_t)R;        \
    for (int half = 0; half < 32; half += 2 * W) {                                                       \
        const float *a = t->a + at, *b = t->b + half, *p = t->p + at * 32 + half;                        \
        V sum[ROWS][2];                                                                                  \
        TERN__UNROLL for (int i = 0; i < R; i++) {                                                       \
            sum[i][0] = t->first ? MM##setzero_ps() : MM##load_ps(p + i * 32);                           \
            sum[i][1] = t->first ? MM##setzero_ps() : MM##load_ps(p + i * 32 + W);                       \
        }                                                                                                \
        for (int64_t j = t->k; j > 0; j--, a += ROWS, b += 32) {                                         \
            const V b0 = MM##load_ps(b), b1 = MM##load_ps(b + W);                                        \
            __builtin_prefetch((const void *)((uintptr_t)a + 64 * ROWS));                                \
            if (half == 0 && j % 16 == 0 && j <= 16 * R) tern__prefetch_lanes(ask + 4 * (uintptr_t)((j / 16 - 1) * to_row)); \
            TERN__UNROLL for (int i = 0; i < R; i++) {                                                   \
                const V x = MM##set1_ps(a[i]);                                                           \
                sum[i][0] = MADD(x, b0, sum[i][0]);                                                      \
                sum[i][1] = MADD(x, b1, sum[i][1]);                                                      \
            }                                                                                            \
        }                                                                                                \
        if (t->c && t->add)                                                                              \
            TERN__UNROLL for (int i = 0; i < R; i++) {                                                   \
                sum[i][0] = MM##loadu_ps(to + i * to_row + half) + sum[i][0];                            \
                sum[i][1] = MM##loadu_ps(to + i * to_row + half + W) + sum[i][1];                        \
            }                                                                                            \
        TERN__UNROLL for (int i = 0; i < R; i++) {                                                       \
            MM##storeu_ps(to + i * to_row + half, sum[i][0]);                                            \
            MM##storeu_ps(to + i * to_row + half + W, sum[i][1]);                                        \
        }                                                                                                \
    }                                                                                                    \
}                                                                                                        \
static TARGET void NAME(const tern__tile *t)                                                             \
{                                                                                                        \
    int at = 0;                                                                                          \
    if (t->rows == ROWS) NAME##_block(ROWS, t, 0);                                                       \
    else {                                                                                               \
        if (ROWS > 8 && t->rows >= 8) NAME##_block(8, t, 0), at = 8;                                     \
        if (t->rows - at >= 4) NAME##_block(4, t, at), at += 4;                                          \
        for (; at < t->rows; at++) NAME##_block(1, t, at);                                               \
    }                                                                                                    \
}

/* Squares of floats, rows to columns. */
#define TERN__X86_TRANSPOSE_4(X, TARGET)                                                                 \
static inline __attribute__((always_inline)) TARGET void tern__transpose_##X(__m128 *v)                  \
{                                                                                                        \
    const __m128 a = _mm_unpacklo_ps(v[0], v[1]), b = _mm_unpackhi_ps(v[0], v[1]);                       \
    const __m128 c = _mm_unpacklo_ps(v[2], v[3]), d = _mm_unpackhi_ps(v[2], v[3]);                       \
    v[0] = _mm_movelh_ps(a, c);                                                                          \
    v[1] = _mm_movehl_ps(c, a);                                                                          \
    v[2] = _mm_movelh_ps(b, d);                                                                          \
    v[3] = _mm_movehl_ps(d, b);                                                                          \
}
#define TERN__X86_TRANSPOSE_8(X, TARGET)                                                                 \
static inline __attribute__((always_inline)) TARGET void tern__transpose_##X(__m256 *v)                  \
{                                                                                                        \
    __m256 t[8];                                                                                         \
    TERN__UNROLL for (int i = 0; i < 8; i += 4) {                                                        \
        const __m256 a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);     \
        const __m256 c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]); \
        t[i] = _mm256_shuffle_ps(a, c, 0x44);                                                            \
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);                                                        \
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);                                                        \
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);                                                        \
    }                                                                                                    \
    TERN__UNROLL for (int i = 0; i < 4; i++) {                                                           \
        v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);                                             \
        v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);                                         \
    }                                                                                                    \
}

/* Operands in the order of use. S, SV, SMM: the squares that are transposed. Lanes from the last to the first: what a
   store has too many is then written over. The same terms of the rows behind these are what is wanted next. */
#define TERN__X86_PACK(X, TARGET, W, MM, S, SV, SMM, ROWS)                                               \
static TARGET void tern__columns_##X(int64_t lanes, int64_t len, const float *from, int64_t step, float *to, int64_t to_step) \
{                                                                                                        \
    const uintptr_t ahead = 4 * (uintptr_t)(lanes * step);                                               \
    for (int64_t l = (lanes - 1) / S * S; l >= 0; l -= S) {                                              \
        const float *row[S];                                                                             \
        int64_t j = 0;                                                                                   \
        for (int i = 0; i < S; i++) row[i] = from + tern__min(l + i, lanes - 1) * step;                  \
        for (; j <= len - S; j += S) {                                                                   \
            SV v[S];                                                                                     \
            TERN__UNROLL for (int i = 0; i < S; i++) v[i] = SMM##loadu_ps(row[i] + j);                   \
            if (j % 16 == 0)                                                                             \
                TERN__UNROLL for (int i = 0; i < S; i++) __builtin_prefetch((const void *)((uintptr_t)(row[i] + j) + ahead), 0, 2); \
            tern__transpose_##X(v);                                                                      \
            TERN__UNROLL for (int i = 0; i < S; i++) SMM##storeu_ps(to + (j + i) * to_step + l, v[i]);   \
        }                                                                                                \
        for (; j < len; j++)                                                                             \
            for (int64_t i = l; i < tern__min(l + S, lanes); i++) to[j * to_step + i] = from[i * step + j]; \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__pack_a_##X(int64_t rows, int64_t len, const float *a, int64_t a_row, int64_t a_col, float *to) \
{                                                                                                        \
    if (a_col == 1) tern__columns_##X(rows, len, a, a_row, to, ROWS);                                    \
    else if (a_row == 1 && rows == ROWS)                                                                 \
        for (int64_t j = 0; j < len; j++, a += a_col, to += ROWS)                                        \
            TERN__UNROLL for (int i = 0; i < ROWS; i += W) MM##storeu_ps(to + i, tern__load_##X(a + i, ROWS - i)); \
    else                                                                                                 \
        for (int64_t j = 0; j < len; j++)                                                                \
            for (int64_t i = 0; i < rows; i++) to[j * ROWS + i] = a[i * a_row + j * a_col];              \
}

/* int8 times their rows' scales. The next 32 lanes are what is wanted next, each row in lines of its own. */
#define TERN__X86_SCALED(X, TARGET, W, MM)                                                               \
static TARGET void tern__scaled_##X(int64_t len, int64_t lanes, const int8_t *q, int64_t stride, const float *scale, float *b) \
{                                                                                                        \
    for (int64_t j = 0; j < len; j++, q += stride, b += 32) {                                            \
        int64_t l = 0;                                                                                   \
        __builtin_prefetch((const void *)((uintptr_t)q + 32));                                           \
        if (lanes == 32)                                                                                 \
            TERN__UNROLL for (int h = 0; h < 32; h += W)                                                 \
                MM##storeu_ps(b + h, MM##cvtepi32_ps(tern__i8_##X(q + h)) * MM##set1_ps(scale[j]));      \
        else for (; l < lanes; l++) b[l] = (float)q[l] * scale[j];                                       \
    }                                                                                                    \
}

/* Packed trits as rows of int8: quads of four rows by four, transposed. */
#define TERN__X86_TRITS(X, TARGET)                                                                       \
static TARGET void tern__trits_##X(int32_t base3, int64_t units, const uint8_t *unit, int8_t *t)         \
{                                                                                                        \
    const int64_t quads = units * (base3 ? 5 : 4);                                                       \
    const __m128i one = _mm_set1_epi8(1);                                                                \
    uint8_t code[16 * 64];                                                                               \
    (base3 ? tern__decode_base3_##X : tern__decode_2bit_##X)(unit, units, code);                         \
    memset(code + quads * 64, 0, (size_t)(-quads & 3) * 64);                                             \
    for (int64_t q = 0; q < quads; q += 4)                                                               \
        for (int r = 0; r < 16; r += 4) {                                                                \
            __m128i v[4], a, b, c, d;                                                                    \
            TERN__UNROLL for (int i = 0; i < 4; i++)                                                     \
                v[i] = _mm_sub_epi8(_mm_loadu_si128((const __m128i *)(const void *)(code + (q + i) * 64 + 4 * r)), one); \
            a = _mm_unpacklo_epi32(v[0], v[1]);                                                          \
            b = _mm_unpackhi_epi32(v[0], v[1]);                                                          \
            c = _mm_unpacklo_epi32(v[2], v[3]);                                                          \
            d = _mm_unpackhi_epi32(v[2], v[3]);                                                          \
            _mm_storeu_si128((__m128i *)(void *)(t + r * 64 + 4 * q), _mm_unpacklo_epi64(a, c));         \
            _mm_storeu_si128((__m128i *)(void *)(t + (r + 1) * 64 + 4 * q), _mm_unpackhi_epi64(a, c));   \
            _mm_storeu_si128((__m128i *)(void *)(t + (r + 2) * 64 + 4 * q), _mm_unpacklo_epi64(b, d));   \
            _mm_storeu_si128((__m128i *)(void *)(t + (r + 3) * 64 + 4 * q), _mm_unpackhi_epi64(b, d));   \
        }                                                                                                \
}

/* By nibble, as byte shuffles want it, once for each 16 bytes of the widest vector: the multiple of 27 at or
   below 16 n; and the digits of r, r < 9. The same two tables give those of 3^s r, since 9 and 81 are -7 and 1
   mod 16 and 27 is 11: 9 * {0, 1, 2} ends in 0, 9, 2 and 27 * {0..8} in 0, 11, 6, 1, 12, 7, 2, 13, 8. */
#define TERN__FOUR_TIMES(...) {__VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__}
static const uint8_t tern__floor27[64] = TERN__FOUR_TIMES(0, 0, 27, 27, 54, 54, 81, 108, 108, 135, 135, 162, 189, 189, 216, 216);
static const uint8_t tern__low_digit[64] = TERN__FOUR_TIMES(0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 0, 0, 1, 2, 0, 0);
static const uint8_t tern__high_digit[64] = TERN__FOUR_TIMES(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 1, 1, 1, 0, 0);
static const uint8_t tern__pair_sum[64] = TERN__FOUR_TIMES(0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6); /* of two 2-bit codes */
#undef TERN__FOUR_TIMES

/* The codes, the same for every vector width: TERN__X86_FLOAT's parameters, and tern__store_int_X. A remainder
   v mod w is for v < 3 w: a subtraction that goes below zero wraps to something larger, and loses. */
#define TERN__X86_CODES(X, TARGET, W, I, MM)                                                             \
static inline __attribute__((always_inline)) TARGET I tern__quad_##X(const int8_t *q)                    \
{                                                                                                        \
    int32_t x;                                                                                           \
    memcpy(&x, q, 4);                                                                                    \
    return MM##set1_epi32(x);                                                                            \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET I tern__mod_##X(I v, int w)                          \
{                                                                                                        \
    v = MM##min_epu8(v, MM##sub_epi8(v, MM##set1_epi8((char)(2 * w))));                                  \
    return MM##min_epu8(v, MM##sub_epi8(v, MM##set1_epi8((char)w)));                                     \
}                                                                                                        \
static TARGET void tern__decode_2bit_##X(const uint8_t *panel, int64_t units, uint8_t *code)             \
{                                                                                                        \
    const I mask = MM##set1_epi8(3);                                                                     \
    for (int64_t i = 0; i < units; i++, panel += 64, code += 4 * 64)                                     \
        TERN__UNROLL for (int h = 0; h < 64; h += 4 * W) {                                               \
            const I v = tern__load_int_##X(panel + h);                                                   \
            tern__store_int_##X(code + h, v & mask);                                                     \
            tern__store_int_##X(code + h + 64, MM##srli_epi16(v, 2) & mask);                             \
            tern__store_int_##X(code + h + 128, MM##srli_epi16(v, 4) & mask);                            \
            tern__store_int_##X(code + h + 192, MM##srli_epi16(v, 6) & mask);                            \
        }                                                                                                \
}                                                                                                        \
/* v = 81 d4 + 27 d3 + b, b = 9 d2 + r: what the table leaves of v is below 27 + 15, and 9 goes twice into b at most. */ \
static inline __attribute__((always_inline)) TARGET void tern__digits_##X(I v, I *digit)                 \
{                                                                                                        \
    const I floor27 = tern__load_int_##X(tern__floor27), mask = MM##set1_epi8(15);                       \
    const I low = tern__load_int_##X(tern__low_digit), high = tern__load_int_##X(tern__high_digit);      \
    const I e = MM##sub_epi8(v, MM##shuffle_epi8(floor27, MM##srli_epi16(v, 4) & mask));                 \
    const I b = MM##min_epu8(e, MM##sub_epi8(e, MM##set1_epi8(27))), top = MM##sub_epi8(v, b) & mask;    \
    const I r = tern__mod_##X(b, 9);                                                                     \
    digit[0] = MM##shuffle_epi8(low, r);                                                                 \
    digit[1] = MM##shuffle_epi8(high, r);                                                                \
    digit[2] = MM##shuffle_epi8(low, MM##sub_epi8(b, r));                                                \
    digit[3] = MM##shuffle_epi8(high, top);                                                              \
    digit[4] = MM##shuffle_epi8(low, top);                                                               \
}                                                                                                        \
static TARGET void tern__decode_base3_##X(const uint8_t *panel, int64_t units, uint8_t *code)            \
{                                                                                                        \
    for (int64_t i = 0; i < units; i++, panel += 64, code += 5 * 64)                                     \
        for (int h = 0; h < 64; h += 4 * W) {                                                            \
            I digit[5];                                                                                  \
            tern__digits_##X(tern__load_int_##X(panel + h), digit);                                      \
            TERN__UNROLL for (int s = 0; s < 5; s++) tern__store_int_##X(code + h + s * 64, digit[s]);   \
        }                                                                                                \
}

/* Where there is no VNNI: maddubs multiplies bytes and adds neighbours in int16 with saturation. A quad adds
   at most 2 * 2 * 127 to an int16, and TERN__QUADS of them 64 * 508 = 32512. The tier brings tern__add16_X and
   _add32_X, as asm: gcc 12 copies the accumulators of intrinsics around and so spills large tiles. */
#define TERN__X86_MADDUBS(X, TARGET, W, I, MM)                                                           \
static inline __attribute__((always_inline)) TARGET I tern__step_##X(I sum, I code, I x)                 \
{                                                                                                        \
    return tern__add16_##X(sum, MM##maddubs_epi16(code, x));                                             \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET I tern__finish_##X(I sum) { return MM##madd_epi16(sum, MM##set1_epi16(1)); }

/* maddubs saturates with codes up to 255, so int8 dots take int16 pairs: inputs 0 and 2 of a quad, then 1 and 3.
   Four tokens are split into such pairs once and then meet all panels; codes are split in registers. A pair
   gives at most 2 * 255 * 128, so int32 holds a whole call. */
#define TERN__X86_WORDS(X, TARGET, W, I, MM)                                                             \
static inline __attribute__((always_inline)) TARGET void tern__tile_words_##X(                           \
    const int T, const tern__dot *d, const int8_t *x, int32_t *acc, int64_t acc_row, int32_t add)        \
{                                                                                                        \
    const I low = MM##set1_epi16(0xff);                                                                  \
    for (int h = 0; h < 64; h += 8 * W, acc += 2 * W) {                                                  \
        I sum[4][2];                                                                                     \
        TERN__UNROLL for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = MM##set1_epi32(-d->sum[t * d->sum_stride]); \
        for (int64_t i = 0; i < d->units; i++) {                                                         \
            const I v0 = tern__load_int_##X(d->panel + i * 64 + h), v1 = tern__load_int_##X(d->panel + i * 64 + h + 4 * W); \
            TERN__UNROLL for (int odd = 0; odd < 2; odd++) {                                             \
                I c0 = v0 & low, c1 = v1 & low;                                                          \
                if (odd) c0 = MM##srli_epi16(v0, 8), c1 = MM##srli_epi16(v1, 8);                         \
                TERN__UNROLL for (int t = 0; t < T; t++) {                                               \
                    const I pair = tern__quad_##X(x + (t * 2 + odd) * TERN__I8_K + i * 4);               \
                    sum[t][0] = tern__add32_##X(sum[t][0], MM##madd_epi16(c0, pair));                    \
                    sum[t][1] = tern__add32_##X(sum[t][1], MM##madd_epi16(c1, pair));                    \
                }                                                                                        \
            }                                                                                            \
        }                                                                                                \
        TERN__UNROLL for (int t = 0; t < T; t++) {                                                       \
            int32_t *to = acc + t * acc_row;                                                             \
            if (add) sum[t][0] = MM##add_epi32(sum[t][0], tern__load_int_##X(to));                       \
            if (add) sum[t][1] = MM##add_epi32(sum[t][1], tern__load_int_##X(to + W));                   \
            tern__store_int_##X(to, sum[t][0]);                                                          \
            tern__store_int_##X(to + W, sum[t][1]);                                                      \
        }                                                                                                \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__split_words_##X(const int8_t *q, int64_t bytes, int8_t *x)                      \
{                                                                                                        \
    for (int64_t i = 0; i < bytes; i += 4 * W) {                                                         \
        I v = MM##set1_epi32(0);                                                                         \
        if (bytes - i >= 4 * W) v = tern__load_int_##X(q + i);                                           \
        else memcpy(&v, q + i, (size_t)(bytes - i));                                                     \
        tern__store_int_##X(x + i, MM##srai_epi16(MM##slli_epi16(v, 8), 8));                             \
        tern__store_int_##X(x + TERN__I8_K + i, MM##srai_epi16(v, 8));                                   \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__dot_i8_##X(const tern__dot *d, int64_t acc_row, int32_t add)                    \
{                                                                                                        \
    int8_t x[4 * 2 * TERN__I8_K];                                                                        \
    tern__dot part = *d;                                                                                 \
    for (int32_t t = 0; t < d->tokens; t += part.tokens) {                                               \
        part.tokens = d->tokens - t < 4 ? d->tokens - t : 4;                                             \
        part.sum = d->sum + t * d->sum_stride;                                                           \
        for (int32_t i = 0; i < part.tokens; i++)                                                        \
            tern__split_words_##X(d->q + (t + i) * d->q_stride, d->units * 4, x + i * 2 * TERN__I8_K);   \
        for (int32_t p = 0; p < d->panels; p++) {                                                        \
            int32_t *acc = d->acc + t * acc_row + p * 16;                                                \
            part.panel = d->panel + p * d->panel_stride;                                                 \
            switch (part.tokens) {                                                                       \
            case 1: tern__tile_words_##X(1, &part, x, acc, acc_row, add); break;                         \
            case 2: tern__tile_words_##X(2, &part, x, acc, acc_row, add); break;                         \
            case 3: tern__tile_words_##X(3, &part, x, acc, acc_row, add); break;                         \
            default: tern__tile_words_##X(4, &part, x, acc, acc_row, add);                               \
            }                                                                                            \
        }                                                                                                \
    }                                                                                                    \
}
/* A macro, since clang 14 unrolls only what has its constants at once. */
#define TERN__X86_FEW(X, FEW, BASE3)                            \
    if (d->tokens > FEW) tern__dot_quads(d, &quads);        \
    else if (d->tokens == 1) tern__few_##X(BASE3, 1, d);    \
    else if (d->tokens == 2) tern__few_##X(BASE3, 2, d);    \
    else if (d->tokens == 3) tern__few_##X(BASE3, 3, d);    \
    else tern__few_##X(BASE3, 4, d);

/* The dots of tier X on the vectors of tier Y. The tier brings tern__step_X, which adds the products of a quad
   to a sum, and tern__finish_X, which makes int32 of it.
   Up to FEW (2 or 4) tokens go straight from the packed units, each decoded once. Quads take two sums
   in turn, since VNNI adds slowly: of 2-bit units the codes at bits 0 and 4 (shifted down), and those at bits 2
   and 6, four times too large. int16 takes 8 such units, 8 * 2 quads * 2 bytes * (2 * 4) * 127 = 32512, and 21
   of base 3, 21 * 3 * 2 * 2 * 127 = 32004. So often the panels take turns, since several streams of memory are
   faster than one. All else goes through quads, in tiles of up to MOST (4 or 6) tokens by two vectors: as many as
   the registers hold. */
#define TERN__X86_DOT(X, Y, TARGET, W, V, I, MM, FEW, MOST, CHUNK)                                       \
static inline __attribute__((always_inline)) TARGET void tern__peel_##X(const int base3, I v, I *code)   \
{                                                                                                        \
    const I mask3 = MM##set1_epi8(3), mask12 = MM##set1_epi8(12), w = MM##srli_epi16(v, 4);              \
    if (base3) {                                                                                         \
        tern__digits_##Y(v, code);                                                                       \
        return;                                                                                          \
    }                                                                                                    \
    code[0] = v & mask3;                                                                                 \
    code[1] = v & mask12;                                                                                \
    code[2] = w & mask3;                                                                                 \
    code[3] = w & mask12;                                                                                \
}                                                                                                        \
/* Units u to end of a panel with T tokens, J vectors at a time. */                                      \
static inline __attribute__((always_inline)) TARGET void                                                 \
    tern__turn_##X(const int base3, const int T, const tern__dot *d, const uint8_t *panel,               \
                   const int8_t *token, int64_t u, int64_t end, I (*acc)[16 / W])                        \
{                                                                                                        \
    const int Q = base3 ? 5 : 4, J = T > 2 ? 1 : 2;                                                      \
    for (int h = 0; h < 64; h += J * 4 * W) {                                                            \
        I sum[4][2][2];                                                                                  \
        TERN__UNROLL for (int t = 0; t < T; t++)                                                         \
            TERN__UNROLL for (int j = 0; j < J; j++) sum[t][j][0] = sum[t][j][1] = MM##set1_epi32(0);    \
        const uint8_t *unit = panel + u * 64 + h;                                                        \
        const int8_t *q = token + u * Q * 4;                                                             \
        for (int64_t i = u; i < end; i++, unit += 64, q += Q * 4) {                                      \
            tern__prefetch(unit, TERN__AHEAD);                                                           \
            TERN__UNROLL for (int j = 0; j < J; j++) {                                                   \
                I code[5];                                                                               \
                tern__peel_##X(base3, tern__load_int_##Y(unit + j * 4 * W), code);                       \
                TERN__UNROLL for (int s = 0; s < Q; s++)                                                 \
                    TERN__UNROLL for (int t = 0; t < T; t++)                                             \
                        sum[t][j][s & 1] = tern__step_##X(sum[t][j][s & 1], code[s], tern__quad_##Y(q + t * d->q_stride + s * 4)); \
            }                                                                                            \
        }                                                                                                \
        TERN__UNROLL for (int t = 0; t < T; t++)                                                         \
            TERN__UNROLL for (int j = 0; j < J; j++) {                                                   \
                const I odd = MM##srai_epi32(tern__finish_##X(sum[t][j][1]), base3 ? 0 : 2);             \
                I *const to = &acc[t][h / (4 * W) + j];                                                  \
                *to = MM##add_epi32(*to, MM##add_epi32(tern__finish_##X(sum[t][j][0]), odd));            \
            }                                                                                            \
    }                                                                                                    \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET void tern__few_##X(const int base3, const int T, const tern__dot *d) \
{                                                                                                        \
    const int64_t turn = base3 ? 21 : 8;                                                                 \
    I acc[TERN__PANELS][4][16 / W];                                                                      \
    for (int32_t p = 0; p < d->panels; p++)                                                              \
        for (int t = 0; t < T; t++)                                                                      \
            for (int j = 0; j < 16 / W; j++) acc[p][t][j] = MM##set1_epi32(-d->sum[t * d->sum_stride]);  \
    for (int64_t u = 0; u < d->units; u += turn)                                                         \
        for (int32_t p = 0; p < d->panels; p++)                                                          \
            tern__turn_##X(base3, T, d, d->panel + p * d->panel_stride, d->q, u,                         \
                           d->units - u < turn ? d->units : u + turn, acc[p]);                           \
    for (int32_t p = 0; p < d->panels; p++)                                                              \
        for (int j = 0; j < 16 / W; j++) {                                                               \
            const V scale = tern__scale_##Y(d, p, j * W);                                                \
            for (int t = 0; t < T; t++) tern__leave_##Y(d, (p * d->tokens + t) * 16 + j * W, acc[p][t][j], scale, d->add); \
        }                                                                                                \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET void                                                 \
    tern__tile_quads_##X(const int T, const tern__dot *d, int64_t acc_row, tern__start start)            \
{                                                                                                        \
    for (int h = 0; h < 64; h += 8 * W) {                                                                \
        I sum[6][2];                                                                                     \
        TERN__UNROLL for (int t = 0; t < T; t++) sum[t][0] = sum[t][1] = MM##set1_epi32(0);              \
        for (int64_t i = 0; i < d->units; i++) {                                                         \
            const I w0 = tern__load_int_##Y(d->panel + i * 64 + h), w1 = tern__load_int_##Y(d->panel + i * 64 + h + 4 * W); \
            TERN__UNROLL for (int t = 0; t < T; t++) {                                                   \
                const I x = tern__quad_##Y(d->q + t * d->q_stride + i * 4);                              \
                sum[t][0] = tern__step_##X(sum[t][0], w0, x);                                            \
                sum[t][1] = tern__step_##X(sum[t][1], w1, x);                                            \
            }                                                                                            \
        }                                                                                                \
        TERN__UNROLL for (int j = 0; j < 2; j++) {                                                       \
            const V scale = tern__scale_##Y(d, 0, h / 4 + j * W);                                        \
            TERN__UNROLL for (int t = 0; t < T; t++) {                                                   \
                const int64_t at = t * acc_row + h / 4 + j * W;                                          \
                I v = tern__finish_##X(sum[t][j]);                                                       \
                if (start != TERN__FROM_SUM) v = MM##add_epi32(v, tern__load_int_##Y(d->acc + at));      \
                if (start != TERN__FROM_ACC) v = MM##sub_epi32(v, MM##set1_epi32(d->sum[t * d->sum_stride])); \
                tern__leave_##Y(d, at, v, scale, d->add);                                                \
            }                                                                                            \
        }                                                                                                \
    }                                                                                                    \
}                                                                                                        \
static inline __attribute__((always_inline)) TARGET void tern__tiles_of_##X(const tern__dot *d, int64_t acc_row, tern__start start) \
{                                                                                                        \
    switch (d->tokens) {                                                                                 \
    case 1: tern__tile_quads_##X(1, d, acc_row, start); break;                                           \
    case 2: tern__tile_quads_##X(2, d, acc_row, start); break;                                           \
    case 3: tern__tile_quads_##X(3, d, acc_row, start); break;                                           \
    case 4: tern__tile_quads_##X(4, d, acc_row, start); break;                                           \
    case 5: tern__tile_quads_##X(MOST < 5 ? MOST : 5, d, acc_row, start); break;                         \
    default: tern__tile_quads_##X(MOST, d, acc_row, start);                                              \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__tiles_##X(const tern__dot *d, int64_t acc_stride, tern__start start)            \
{                                                                                                        \
    (void)acc_stride; /* one panel at a time */                                                          \
    tern__tiles_of_##X(d, 16, start);                                                                    \
}                                                                                                        \
static TARGET void tern__run_2bit_##X(const tern__dot *d)                                                \
{                                                                                                        \
    static const tern__quads quads = {tern__decode_2bit_##Y, tern__tiles_##X, 4, 1, MOST, CHUNK};        \
    TERN__X86_FEW(X, FEW, 0)                                                                             \
}                                                                                                        \
static TARGET void tern__run_base3_##X(const tern__dot *d)                                               \
{                                                                                                        \
    static const tern__quads quads = {tern__decode_base3_##Y, tern__tiles_##X, 5, 1, MOST, CHUNK};       \
    TERN__X86_FEW(X, FEW, 1)                                                                             \
}                                                                                                        \
static void tern__dot_2bit_##X(const tern__dot *d) { tern__dot_groups(d, 16, tern__run_2bit_##X); }      \
static void tern__dot_base3_##X(const tern__dot *d) { tern__dot_groups(d, 20, tern__run_base3_##X); }

/* Float activations, through quads: a load at byte j of a quad has the codes of its input j in the low bits of the
   lanes, so that one table permute makes floats of them. One token costs a permute and an FMA for each vector of
   trits: port 5 is the limit, and decoding takes a fifth on top. Tried: shifts straight from packed 2-bit units, a
   quarter faster with AVX2 and one token, no faster elsewhere; quads without their masks: the same. */
typedef struct tern__float_tiles {
    void (*decode_2bit)(const uint8_t *panel, int64_t units, uint8_t *code);
    void (*decode_base3)(const uint8_t *panel, int64_t units, uint8_t *code);
    void (*tile)(const tern__float_dot *f, int64_t x_stride); /* f->panel holds quads */
    int32_t lanes, tokens; /* of a vector; of the largest tile */
} tern__float_tiles;

/* Some panels side by side. One that is too few for the tile goes in twice, and its second sums are spoil. */
static void tern__float_panels(const tern__float_dot *f, const tern__float_tiles *k, int32_t panels)
{
    uint8_t buffer[(TERN__FLOAT_QUADS + 8) * 64 + 63], *code = buffer + (-(uintptr_t)buffer & 63);
    const int64_t inputs = f->base3 ? 20 : 16, chunk = TERN__FLOAT_QUADS / 20 / panels * 80 / inputs, end = f->from + f->inputs;
    const int64_t stride = (chunk * inputs / 4 + 1) * 64;
    tern__float_dot part = *f;
    part.panels = panels * 16 < 2 * k->lanes ? 2 * panels : panels;
    part.panel_stride = part.panels == panels ? stride : 0;
    for (int64_t at = f->from; at < end; at += part.inputs) {
        const int64_t u = at / inputs, left = (end + inputs - 1) / inputs - u, units = left < chunk ? left : chunk;
        for (int32_t i = 0; i < panels; i++) {
            const uint8_t *panel = f->panel + i * f->panel_stride + u * 64;
            for (int64_t j = 0; j < units; j++) __builtin_prefetch((const void *)((uintptr_t)panel + (uintptr_t)(TERN__AHEAD + j * 64)));
            (f->base3 ? k->decode_base3 : k->decode_2bit)(panel, units, code + i * stride);
            memset(code + i * stride + units * inputs * 16, 0, 4); /* the loads at bytes 1 to 3 reach here */
        }
        part.panel = code + (at - u * inputs) * 16;
        part.inputs = (end < (u + units) * inputs ? end : (u + units) * inputs) - at;
        int32_t tiles = (f->tokens + k->tokens - 1) / k->tokens;
        for (int32_t t = 0; t < f->tokens; t += part.tokens, tiles--) {
            part.tokens = (f->tokens - t + tiles - 1) / tiles;
            part.x = f->x + (at - f->from) * f->tokens + t;
            part.p = f->p + t * TERN__STRIP;
            k->tile(&part, f->tokens);
        }
        part.first = 0;
    }
}

/* FMA's latency asks for eight sums or more: 8 vectors of rows for one token, 4 for two, 2 for more. */
static int32_t tern__float_vectors(int32_t rows, int32_t tokens, int32_t lanes)
{
    const int32_t most = tokens == 1 ? 8 : tokens == 2 ? 4 : 2;
    return rows >= 8 * lanes && most == 8 ? 8 : rows >= 4 * lanes && most >= 4 ? 4 : 2;
}

static void tern__float_dots(const tern__float_dot *f, const tern__float_tiles *k)
{
    tern__float_dot part = *f;
    for (int32_t p = 0, panels; p < f->panels; p += panels) {
        panels = (tern__float_vectors((f->panels - p) * 16, f->tokens, k->lanes) * k->lanes + 15) / 16;
        part.panel = f->panel + p * f->panel_stride;
        part.p = f->p + p * 16;
        tern__float_panels(&part, k, panels < f->panels - p ? panels : f->panels - p);
    }
}

/* P vectors of rows by T tokens. The tier brings tern__trit_X, which makes floats of the two low bits of each lane. */
#define TERN__FLOAT_CASE(X, P, T) case P * 16 + T: tern__float_tile_##X(P, T, f, x_stride, h); break;
#define TERN__FLOAT_CASES_6(X)                                                                            \
    TERN__FLOAT_CASE(X, 8, 1) TERN__FLOAT_CASE(X, 4, 1) TERN__FLOAT_CASE(X, 4, 2)                         \
    TERN__FLOAT_CASE(X, 2, 1) TERN__FLOAT_CASE(X, 2, 2) TERN__FLOAT_CASE(X, 2, 3) TERN__FLOAT_CASE(X, 2, 4) \
    TERN__FLOAT_CASE(X, 2, 5) TERN__FLOAT_CASE(X, 2, 6)
#define TERN__FLOAT_CASES_12(X) TERN__FLOAT_CASES_6(X)                                                    \
    TERN__FLOAT_CASE(X, 2, 7) TERN__FLOAT_CASE(X, 2, 8) TERN__FLOAT_CASE(X, 2, 9)                         \
    TERN__FLOAT_CASE(X, 2, 10) TERN__FLOAT_CASE(X, 2, 11) TERN__FLOAT_CASE(X, 2, 12)
#define TERN__X86_FLOATS(X, TARGET, W, V, MM, MADD, MOST)                                                \
static inline __attribute__((always_inline)) TARGET void                                                 \
    tern__float_tile_##X(const int P, const int T, const tern__float_dot *f, int64_t x_stride, int h)    \
{                                                                                                        \
    const uint8_t *code = f->panel + h * 4;                                                              \
    const float *x = f->x;                                                                               \
    V sum[8][MOST];                                                                                      \
    TERN__UNROLL for (int v = 0; v < P; v++)                                                             \
        TERN__UNROLL for (int t = 0; t < T; t++)                                                         \
            sum[v][t] = f->first ? MM##setzero_ps() : MM##loadu_ps(f->p + t * TERN__STRIP + h + v * W);  \
    for (int64_t i = 0; i < f->inputs; i += 4, code += 64)                                               \
        TERN__UNROLL for (int j = 0; j < 4; j++, x += x_stride) {                                        \
            V w[8];                                                                                      \
            TERN__UNROLL for (int v = 0; v < P; v++)                                                     \
                w[v] = tern__trit_##X(tern__load_int_##X(code + v * W / 16 * f->panel_stride + v * W % 16 * 4 + j)); \
            TERN__UNROLL for (int t = 0; t < T; t++) {                                                   \
                const V y = MM##set1_ps(x[t]);                                                           \
                TERN__UNROLL for (int v = 0; v < P; v++) sum[v][t] = MADD(y, w[v], sum[v][t]);           \
            }                                                                                            \
        }                                                                                                \
    TERN__UNROLL for (int v = 0; v < P; v++)                                                             \
        TERN__UNROLL for (int t = 0; t < T; t++) MM##storeu_ps(f->p + t * TERN__STRIP + h + v * W, sum[v][t]); \
}                                                                                                        \
static TARGET void tern__float_tiles_##X(const tern__float_dot *f, int64_t x_stride)                     \
{                                                                                                        \
    const int P = tern__float_vectors(f->panels * 16, f->tokens, W);                                     \
    for (int h = 0; h < f->panels * 16; h += P * W)                                                      \
        switch (P * 16 + f->tokens) {                                                                    \
        TERN__FLOAT_CASES_##MOST(X)                                                                      \
        default: break;                                                                                  \
        }                                                                                                \
}                                                                                                        \
static void tern__floats_##X(const tern__float_dot *f)                                                   \
{                                                                                                        \
    static const tern__float_tiles tiles = {tern__decode_2bit_##X, tern__decode_base3_##X, tern__float_tiles_##X, W, MOST}; \
    tern__float_dots(f, &tiles);                                                                         \
}

/* Bits: 30 2-bit units at a time, or 24 base-3 units, which hold as many inputs and are made 2-bit units first.
   Where few bits are 1, only what they meet is read: a nibble of a unit's byte holds two codes, and what a mask leaves of
   it tells their sum by one byte shuffle. Low nibbles are inputs 0 to 7 of a unit, high ones 8 to 15; a chunk adds at
   most 60 times 4 to a byte. Where many are, a tier may count bits in planes instead: the low bits of two units' codes,
   then their high bits. */
enum { TERN__BIT_UNITS = 30, TERN__BIT_DENSE = 32 /* inputs to one that is 1 */ };
typedef struct tern__active { int32_t count[2]; int32_t at[2][TERN__BIT_UNITS]; uint32_t mask[2][TERN__BIT_UNITS]; } tern__active;

typedef struct tern__bit_way {
    void (*decode)(const uint8_t *panel, int64_t units, uint8_t *code); /* base 3, to quads */
    void (*recode)(const uint8_t *quads, int64_t units, uint8_t *code); /* four quads to each 2-bit unit */
    /* acc[panel * acc_stride + row] += sum of code * bit, from units that lie as a panel's */
    void (*few)(const uint8_t *unit, int64_t stride, int32_t panels, const tern__active *a, int32_t *acc, int64_t acc_stride);
    void (*leave)(const tern__dot *d, int64_t acc_stride); /* acc times scale */
    void (*split)(const uint8_t *unit, int64_t units, uint8_t *plane); /* or NULL, and */
    void (*many)(const uint8_t *plane, int32_t panels, const int8_t *bits, int64_t words, int32_t *acc, int64_t acc_stride);
} tern__bit_way;

/* Which nibbles of which units have active inputs. */
static void tern__active_units(const int8_t *bits, int64_t words, tern__active *a)
{
    int32_t low = 0, high = 0;
    for (int64_t w = 0; w < words; w++, bits += 4) {
        uint32_t word;
        memcpy(&word, bits, 4);
        if (word == 0) continue;
        for (int32_t b = 0; b < 2; b++) {
            const uint32_t mask = (word >> b & 0x55555555u) * 3;
            a->at[0][low] = a->at[1][high] = (int32_t)(2 * w + b) * TERN__UNIT;
            a->mask[0][low] = mask & 0x0F0F0F0Fu;
            a->mask[1][high] = mask & 0xF0F0F0F0u;
            low += (mask & 0x0F0F0F0Fu) != 0;
            high += (mask & 0xF0F0F0F0u) != 0;
        }
    }
    a->count[0] = low;
    a->count[1] = high;
}

static int32_t tern__is_dense(const tern__dot *d, int64_t t, int64_t inputs)
{
    return (int64_t)d->sum[t * d->sum_stride] * TERN__BIT_DENSE > inputs;
}

/* One chunk of one group: `units` from unit u on. */
static void tern__bit_chunk(const tern__dot *d, const tern__bit_way *way, int32_t base3, int64_t u, int64_t units, int32_t dense)
{
    const int64_t unit = base3 ? 20 : 16, words = tern__bit_words(units, unit), acc_stride = (int64_t)d->tokens * 16;
    uint8_t quads[(TERN__BIT_UNITS * 4 + 3) * 64], code[TERN__PANELS * TERN__BIT_UNITS * 64], plane[TERN__PANELS * TERN__BIT_UNITS * 64];
    const uint8_t *from = base3 ? code : d->panel + u * 64;
    const int64_t stride = base3 ? TERN__BIT_UNITS * 64 : d->panel_stride;
    for (int32_t p = 0; p < d->panels; p++) {
        const uint8_t *panel = d->panel + p * d->panel_stride + u * 64;
        for (int64_t i = 0; i < units && (dense || base3); i++) tern__prefetch(panel + i * 64, TERN__AHEAD);
        if (base3) {
            way->decode(panel, units, quads);
            memset(quads + units * 5 * 64, 0, 3 * 64);
            way->recode(quads, (units * 5 + 3) / 4, code + p * stride);
        }
        if (dense && way->split) way->split(from + p * stride, base3 ? (units * 5 + 3) / 4 : units, plane + p * TERN__BIT_UNITS * 64);
    }
    for (int32_t t = 0; t < d->tokens; t++) {
        const int8_t *bits = d->q + t * d->q_stride + u * unit / 32 * 4;
        tern__active active;
        if (way->split && tern__is_dense(d, t, d->units * unit)) way->many(plane, d->panels, bits, words, d->acc + t * 16, acc_stride);
        else {
            tern__active_units(bits, words, &active);
            way->few(from, stride, d->panels, &active, d->acc + t * 16, acc_stride);
        }
    }
}

static void tern__dot_bits(const tern__dot *all, tern_type encoding, const tern__bit_way *way)
{
    const int32_t base3 = encoding == TERN_BASE3, inputs = base3 ? 20 : 16;
    const int64_t chunk = TERN__BIT_UNITS * 16 / inputs;
    for (int64_t g = 0; g < all->groups; g++) {
        const tern__dot d = tern__bits_group(all, g, inputs);
        int32_t dense = 0, *acc = d.acc;
        for (int32_t t = 0; t < d.tokens; t++) dense |= tern__is_dense(&d, t, d.units * inputs);
        for (int32_t p = 0; p < d.panels; p++)
            for (int32_t t = 0; t < d.tokens; t++, acc += TERN__ROWS)
                for (int32_t r = 0; r < TERN__ROWS; r++) acc[r] = -d.sum[t * d.sum_stride];
        for (int64_t u = 0; u < d.units; u += chunk) tern__bit_chunk(&d, way, base3, u, d.units - u < chunk ? d.units - u : chunk, dense);
        if (d.facc) way->leave(&d, (int64_t)d.tokens * 16);
    }
}

#define TERN__X86_BITS(X, TARGET, W, V, I, MM)                                                           \
/* B vectors of rows from vector v on, counted through the panels. */                                    \
static inline __attribute__((always_inline)) TARGET void                                                 \
    tern__few_bits_of_##X(const int B, const uint8_t *unit, int64_t stride, const tern__active *a,       \
                          int32_t v, int32_t *acc, int64_t acc_stride)                                   \
{                                                                                                        \
    const I table = tern__load_int_##X(tern__pair_sum);                                                  \
    const uint8_t *from[4];                                                                              \
    I sum[4];                                                                                            \
    TERN__UNROLL for (int i = 0; i < B; i++) {                                                           \
        from[i] = unit + (v + i) * W / 16 * stride + (v + i) * W % 16 * 4;                               \
        sum[i] = MM##set1_epi32(0);                                                                      \
    }                                                                                                    \
    TERN__UNROLL for (int high = 0; high < 2; high++)                                                    \
        for (int32_t n = 0; n < a->count[high]; n++) {                                                   \
            const int64_t at = a->at[high][n];                                                           \
            const I mask = MM##set1_epi32((int32_t)a->mask[high][n]);                                    \
            TERN__UNROLL for (int i = 0; i < B; i++) {                                                   \
                I code = tern__load_int_##X(from[i] + at) & mask;                                        \
                if (high) code = MM##srli_epi16(code, 4);                                                \
                sum[i] = MM##add_epi8(sum[i], MM##shuffle_epi8(table, code));                            \
            }                                                                                            \
        }                                                                                                \
    TERN__UNROLL for (int i = 0; i < B; i++) {                                                           \
        int32_t *const to = acc + (v + i) * W / 16 * acc_stride + (v + i) * W % 16;                      \
        const I four = MM##madd_epi16(MM##maddubs_epi16(sum[i], MM##set1_epi8(1)), MM##set1_epi16(1));   \
        tern__store_int_##X(to, MM##add_epi32(tern__load_int_##X(to), four));                            \
    }                                                                                                    \
}                                                                                                        \
static TARGET void tern__few_bits_##X(const uint8_t *unit, int64_t stride, int32_t panels,               \
                                      const tern__active *a, int32_t *acc, int64_t acc_stride)           \
{                                                                                                        \
    const int32_t vectors = panels * 16 / W;                                                             \
    int32_t v = 0;                                                                                       \
    for (; v + 4 <= vectors; v += 4) tern__few_bits_of_##X(4, unit, stride, a, v, acc, acc_stride);      \
    for (; v + 2 <= vectors; v += 2) tern__few_bits_of_##X(2, unit, stride, a, v, acc, acc_stride);      \
    for (; v < vectors; v++) tern__few_bits_of_##X(1, unit, stride, a, v, acc, acc_stride);              \
}                                                                                                        \
static TARGET void tern__recode_##X(const uint8_t *quads, int64_t units, uint8_t *code)                  \
{                                                                                                        \
    for (int64_t i = 0; i < units; i++, quads += 256, code += 64)                                        \
        TERN__UNROLL for (int h = 0; h < 64; h += 4 * W) {                                               \
            const I low = tern__load_int_##X(quads + h) | MM##slli_epi16(tern__load_int_##X(quads + 64 + h), 2); \
            const I high = tern__load_int_##X(quads + 128 + h) | MM##slli_epi16(tern__load_int_##X(quads + 192 + h), 2); \
            tern__store_int_##X(code + h, low | MM##slli_epi16(high, 4));                                \
        }                                                                                                \
}                                                                                                        \
static TARGET void tern__leave_bits_##X(const tern__dot *d, int64_t acc_stride)                          \
{                                                                                                        \
    for (int32_t p = 0; p < d->panels; p++)                                                              \
        for (int32_t r = 0; r < 16; r += W) {                                                            \
            const V scale = tern__scale_##X(d, p, r);                                                    \
            for (int64_t at = p * acc_stride + r; at < (p + 1) * acc_stride; at += 16)                   \
                tern__leave_##X(d, at, tern__load_int_##X(d->acc + at), scale, d->add);                  \
        }                                                                                                \
}                                                                                                        \
static void tern__dot_bits_##X(const tern__dot *d, tern_type encoding)                                   \
{                                                                                                        \
    static const tern__bit_way way = {tern__decode_base3_##X, tern__recode_##X, tern__few_bits_##X, tern__leave_bits_##X, NULL, NULL}; \
    tern__dot_bits(d, encoding, &way);                                                                   \
}

#ifdef TERN__WITH_SSE41
/* -- SSE4.1 -- */
#define TERN__SSE41 __attribute__((target("ssse3,sse4.1")))
#define TERN__SSE41_INLINE static inline __attribute__((always_inline, target("ssse3,sse4.1")))

TERN__SSE41_INLINE __m128 tern__load_sse41(const float *p, int64_t n)
{
    return n >= 4 ? _mm_loadu_ps(p) : _mm_setr_ps(n > 0 ? p[0] : 0.0f, n > 1 ? p[1] : 0.0f, n > 2 ? p[2] : 0.0f, 0.0f);
}
TERN__SSE41_INLINE void tern__store_sse41(float *p, __m128 v, int64_t n)
{
    if (n >= 4) _mm_storeu_ps(p, v);
    else tern__copy_tail(p, &v, 4 * n);
}
TERN__SSE41_INLINE __m128i tern__load_int_sse41(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
TERN__SSE41_INLINE void tern__store_int_sse41(void *p, __m128i v) { _mm_storeu_si128((__m128i *)p, v); }
TERN__SSE41_INLINE void tern__store_i8_sse41(int8_t *q, __m128i v, int64_t n)
{
    const __m128i words = _mm_packs_epi32(v, v), bytes = _mm_packs_epi16(words, words);
    if (n >= 4) memcpy(q, &bytes, 4);
    else tern__copy_tail(q, &bytes, n);
}
TERN__SSE41_INLINE __m128i tern__i8_sse41(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
}
TERN__SSE41_INLINE __m128i tern__i16_sse41(const int16_t *p)
{
    return _mm_cvtepi16_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}
TERN__SSE41_INLINE __m128i tern__lattice_sse41(__m128i steps)
{
    const uint16_t *table = tern__lattice();
    const uint32_t a = (uint32_t)_mm_cvtsi128_si32(steps), b = (uint32_t)_mm_extract_epi32(steps, 1);
    const uint32_t c = (uint32_t)_mm_extract_epi32(steps, 2), d = (uint32_t)_mm_extract_epi32(steps, 3);
    return _mm_setr_epi32(table[a & 255], table[b & 255], table[c & 255], table[d & 255]);
}
TERN__SSE41_INLINE __m128 tern__f16_sse41(const uint16_t *p) /* a float's exponent is larger by 112 */
{
    const __m128i half = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)), sign = _mm_set1_epi32(0x8000);
    const __m128i bits = _mm_andnot_si128(sign, half), special = _mm_cmpgt_epi32(bits, _mm_set1_epi32(0x7bff)); /* Inf, NaN */
    const __m128i magnitude = (__m128i)((__m128)_mm_slli_epi32(bits, 13) * _mm_set1_ps(5192296858534827628530496329220096.0f));
    return (__m128)(magnitude | (special & _mm_set1_epi32(0x7f800000)) | _mm_slli_epi32(half & sign, 16));
}
TERN__SSE41_INLINE void tern__store_units_sse41(const int both, const __m128i *sum, __m128i none, uint8_t *unit)
{
    (void)both;
    for (int r = 0; r < 4; r++) tern__store_int_sse41(unit + 16 * r, _mm_add_epi8(sum[r], none));
}
TERN__SSE41_INLINE __m128 tern__bf16_sse41(const uint16_t *p)
{
    return (__m128)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *)(const void *)p));
}
TERN__SSE41_INLINE void tern__store_i16_sse41(uint16_t *p, __m128i v) { _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi32(v, v)); }
TERN__SSE41_INLINE __m128 tern__quarter_sse41(__m128 v) { return v; }
TERN__X86_FLOAT(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
TERN__X86_DECIDE(sse41, TERN__SSE41, __m128, __m128i, _mm_)
TERN__X86_WEIGHTS(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
#ifndef TERNARY_NO_TRAINING
TERN__X86_OPTIMIZE(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
TERN__X86_FLIPS(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
#endif
TERN__SSE41_INLINE __m128 tern__swap_sse41(__m128 v, int h) { return h == 1 ? _mm_shuffle_ps(v, v, 0xB1) : _mm_shuffle_ps(v, v, 0x4E); }
TERN__X86_HADAMARD(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
TERN__X86_MAP(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
#ifndef TERNARY_NO_GRAPH
TERN__X86_AGGREGATE(sse41, TERN__SSE41, 4, __m128, _mm_)
#endif
TERN__X86_TILE(tern__tile_sse41, TERN__SSE41, 4, __m128, _mm_, 6, TERN__PLAIN_MADD)
TERN__X86_TRANSPOSE_4(sse41, TERN__SSE41)
TERN__X86_PACK(sse41, TERN__SSE41, 4, _mm_, 4, __m128, _mm_, 6)
TERN__X86_SCALED(sse41, TERN__SSE41, 4, _mm_)
TERN__X86_CODES(sse41, TERN__SSE41, 4, __m128i, _mm_)
TERN__X86_TRITS(sse41, TERN__SSE41)
TERN__X86_BITS(sse41, TERN__SSE41, 4, __m128, __m128i, _mm_)
TERN__SSE41_INLINE __m128 tern__trit_sse41(__m128i code)
{
    return _mm_cvtepi32_ps(_mm_sub_epi32(_mm_and_si128(code, _mm_set1_epi32(3)), _mm_set1_epi32(1)));
}
TERN__X86_FLOATS(sse41, TERN__SSE41, 4, __m128, _mm_, TERN__PLAIN_MADD, 6)
TERN__SSE41_INLINE __m128i tern__add16_sse41(__m128i sum, __m128i term)
{
    __asm__("paddw {%1, %0|%0, %1}" : "+x"(sum) : "x"(term));
    return sum;
}
TERN__SSE41_INLINE __m128i tern__add32_sse41(__m128i sum, __m128i term)
{
    __asm__("paddd {%1, %0|%0, %1}" : "+x"(sum) : "x"(term));
    return sum;
}
TERN__X86_MADDUBS(sse41, TERN__SSE41, 4, __m128i, _mm_)
TERN__X86_WORDS(sse41, TERN__SSE41, 4, __m128i, _mm_)
TERN__X86_DOT(sse41, sse41, TERN__SSE41, 4, __m128, __m128i, _mm_, 2, 4, TERN__QUADS)

static const tern__kernels tern__kernels_sse41 = {TERN__KERNELS(sse41, tern__tile_sse41, sse41, sse41, sse41, sse41, 64, 6, NULL)};
#endif /* TERN__WITH_SSE41 */

#if defined(TERN__WITH_AVX2) || defined(TERN__WITH_AVX_VNNI)
/* -- AVX2, and what AVX-VNNI shares with it -- */
#define TERN__AVX2 __attribute__((target("avx2,f16c")))
#define TERN__AVX2_INLINE static inline __attribute__((always_inline, target("avx2,f16c")))

TERN__AVX2_INLINE __m256i tern__lanes_avx2(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? (int32_t)n : 8), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TERN__AVX2_INLINE __m256 tern__load_avx2(const float *p, int64_t n)
{
    if (n >= 8) return _mm256_loadu_ps(p);
    return n > 0 ? _mm256_maskload_ps(p, tern__lanes_avx2(n)) : _mm256_setzero_ps();
}
TERN__AVX2_INLINE void tern__store_avx2(float *p, __m256 v, int64_t n)
{
    if (n >= 8) _mm256_storeu_ps(p, v);
    else _mm256_maskstore_ps(p, tern__lanes_avx2(n), v);
}
TERN__AVX2_INLINE __m256i tern__load_int_avx2(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
TERN__AVX2_INLINE void tern__store_int_avx2(void *p, __m256i v) { _mm256_storeu_si256((__m256i *)p, v); }
TERN__AVX2_INLINE void tern__store_i8_avx2(int8_t *q, __m256i v, int64_t n)
{
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i bytes = _mm_packs_epi16(words, words);
    if (n >= 8) _mm_storel_epi64((__m128i *)(void *)q, bytes);
    else tern__copy_tail(q, &bytes, n);
}
TERN__AVX2_INLINE __m256i tern__i8_avx2(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)); }
TERN__AVX2_INLINE __m256i tern__i16_avx2(const int16_t *p)
{
    return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
TERN__AVX2_INLINE __m256i tern__lattice_avx2(__m256i steps)
{
    return _mm256_i32gather_epi32((const int *)(const void *)tern__lattice(), steps & _mm256_set1_epi32(255), 2)
           & _mm256_set1_epi32(0xffff);
}
TERN__AVX2_INLINE __m256 tern__f16_avx2(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
TERN__AVX2_INLINE void tern__store_units_avx2(const int both, const __m256i *sum, __m256i none, uint8_t *unit)
{
    (void)both;
    for (int r = 0; r < 4; r += 2) {
        const __m256i low = _mm256_permute2x128_si256(sum[r], sum[r + 1], 0x20), high = _mm256_permute2x128_si256(sum[r], sum[r + 1], 0x31);
        tern__store_int_avx2(unit + 16 * r, _mm256_add_epi8(_mm256_add_epi8(low, high), none));
    }
}
TERN__AVX2_INLINE __m256 tern__bf16_avx2(const uint16_t *p)
{
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16);
}
TERN__AVX2_INLINE void tern__store_i16_avx2(uint16_t *p, __m256i v)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
TERN__AVX2_INLINE __m128 tern__quarter_avx2(__m256 v) { return _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1); }
TERN__X86_FLOAT(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
TERN__X86_DECIDE(avx2, TERN__AVX2, __m256, __m256i, _mm256_)
TERN__X86_WEIGHTS(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
#ifndef TERNARY_NO_TRAINING
TERN__X86_OPTIMIZE(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
TERN__X86_FLIPS(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
#endif
TERN__AVX2_INLINE __m256 tern__swap_avx2(__m256 v, int h)
{
    return h == 1 ? _mm256_permute_ps(v, 0xB1) : h == 2 ? _mm256_permute_ps(v, 0x4E) : _mm256_permute2f128_ps(v, v, 1);
}
TERN__X86_HADAMARD(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
TERN__X86_MAP(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
#ifndef TERNARY_NO_GRAPH
TERN__X86_AGGREGATE(avx2, TERN__AVX2, 8, __m256, _mm256_)
#endif
TERN__X86_TILE(tern__tile_avx2, TERN__AVX2, 8, __m256, _mm256_, 6, TERN__PLAIN_MADD)
TERN__X86_TILE(tern__tile_fused_avx2, __attribute__((target("avx2,fma"))), 8, __m256, _mm256_, 6, _mm256_fmadd_ps)
TERN__X86_TRANSPOSE_8(avx2, TERN__AVX2)
TERN__X86_PACK(avx2, TERN__AVX2, 8, _mm256_, 8, __m256, _mm256_, 6)

TERN__X86_SCALED(avx2, TERN__AVX2, 8, _mm256_)
TERN__X86_CODES(avx2, TERN__AVX2, 8, __m256i, _mm256_)
TERN__X86_TRITS(avx2, TERN__AVX2)
TERN__X86_BITS(avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_)
TERN__AVX2_INLINE __m256 tern__trit_avx2(__m256i code)
{
    return _mm256_permutevar_ps(_mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0), code);
}
TERN__X86_FLOATS(avx2, __attribute__((target("avx2,fma,f16c"))), 8, __m256, _mm256_, _mm256_fmadd_ps, 6)
#endif

#ifdef TERN__WITH_AVX2
TERN__AVX2_INLINE __m256i tern__add16_avx2(__m256i sum, __m256i term)
{
    __asm__("vpaddw {%1, %0, %0|%0, %0, %1}" : "+x"(sum) : "x"(term));
    return sum;
}
TERN__AVX2_INLINE __m256i tern__add32_avx2(__m256i sum, __m256i term)
{
    __asm__("vpaddd {%1, %0, %0|%0, %0, %1}" : "+x"(sum) : "x"(term));
    return sum;
}
TERN__X86_MADDUBS(avx2, TERN__AVX2, 8, __m256i, _mm256_)
TERN__X86_WORDS(avx2, TERN__AVX2, 8, __m256i, _mm256_)
TERN__X86_DOT(avx2, avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_, 2, 4, TERN__QUADS)

static const tern__kernels tern__kernels_avx2 = {TERN__KERNELS(avx2, tern__tile_fused_avx2, avx2, avx2, avx2, avx2, 64, 6, NULL)};
#endif /* TERN__WITH_AVX2 */

#ifdef TERN__WITH_AVX_VNNI
/* -- AVX-VNNI: the dots alone differ from AVX2 -- */
/* Four codes and four activations in each lane of int32. As asm, because gcc 12 copies the accumulator of the
   intrinsic around and so spills large tiles; VEX, since assemblers prefer AVX-512's encoding. */
TERN__AVX2_INLINE __m256i tern__step_avx_vnni(__m256i sum, __m256i code, __m256i x)
{
    __asm__("%{vex%} vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+x"(sum) : "x"(code), "x"(x));
    return sum;
}
TERN__AVX2_INLINE __m256i tern__finish_avx_vnni(__m256i sum) { return sum; }

TERN__X86_DOT(avx_vnni, avx2, TERN__AVX2, 8, __m256, __m256i, _mm256_, 4, 6, TERN__QUADS_VNNI)
static TERN__AVX2 void tern__tiles_i8_avx_vnni(const tern__dot *d, int64_t acc_row, tern__start start)
{
    tern__tiles_of_avx_vnni(d, acc_row, start);
}
static void tern__dot_i8_avx_vnni(const tern__dot *d, int64_t acc_row, int32_t add)
{
    static const tern__quads quads = {NULL, tern__tiles_i8_avx_vnni, 1, 1, 6, TERN__QUADS};
    tern__dot_codes(d, &quads, acc_row, add);
}

static const tern__kernels tern__kernels_avx_vnni = {
    TERN__KERNELS(avx2, tern__tile_fused_avx2, avx_vnni, avx_vnni, avx_vnni, avx2, 64, 6, NULL)};
#endif /* TERN__WITH_AVX_VNNI */

#ifdef TERN__WITH_AVX512_VNNI
/* -- AVX-512 with VNNI -- */
enum { TERN__TILE_AVX512 = 8 }; /* tokens of the largest tile, beside two panels */
#define TERN__AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define TERN__AVX512_INLINE static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

TERN__AVX512_INLINE __mmask16 tern__lanes_avx512(int64_t n) { return (__mmask16)(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); }
TERN__AVX512_INLINE __m512 tern__load_avx512(const float *p, int64_t n)
{
    return n >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(tern__lanes_avx512(n), p);
}
TERN__AVX512_INLINE void tern__store_avx512(float *p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, tern__lanes_avx512(n), v); }
TERN__AVX512_INLINE __m512i tern__load_int_avx512(const void *p) { return _mm512_loadu_si512(p); }
TERN__AVX512_INLINE void tern__store_int_avx512(void *p, __m512i v) { _mm512_storeu_si512(p, v); }
TERN__AVX512_INLINE void tern__store_i8_avx512(int8_t *q, __m512i v, int64_t n)
{
    if (n >= 16) _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(v));
    else _mm_mask_storeu_epi8(q, tern__lanes_avx512(n), _mm512_cvtepi32_epi8(v));
}
TERN__AVX512_INLINE __m512i tern__i8_avx512(const int8_t *p)
{
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
}
TERN__AVX512_INLINE __m512i tern__i16_avx512(const int16_t *p)
{
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
/* 2^(l/256) and 2^(1 + h/16). Their product, added to 512, is rounded to 14 bits behind the point: all 256 as in
   tern__lattice, and faster than a gather. */
static const float tern__lattice_parts[2][16] TERN__ALIGN64 = {
    {1.0f, 1.0027113f, 1.00542986f, 1.00815594f, 1.01088929f, 1.01363003f, 1.01637828f, 1.01913404f,
     1.0218972f, 1.02466774f, 1.02744591f, 1.0302316f, 1.03302491f, 1.03582573f, 1.03863406f, 1.04145014f},
    {2.0f, 2.08854747f, 2.18101549f, 2.27757716f, 2.37841415f, 2.48371553f, 2.59367919f, 2.70851111f,
     2.82842708f, 2.95365238f, 3.08442163f, 3.22098064f, 3.36358571f, 3.51250434f, 3.6680162f, 3.8304131f}
};
TERN__AVX512_INLINE __m512i tern__lattice_avx512(__m512i steps) /* permutations see four bits of an index */
{
    const __m512 low = _mm512_permutexvar_ps(steps, _mm512_load_ps(tern__lattice_parts[0]));
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(steps, 4), _mm512_load_ps(tern__lattice_parts[1]));
    return (__m512i)_mm512_fmadd_ps(low, high, _mm512_set1_ps(512.0f));
}
TERN__AVX512_INLINE __m512 tern__f16_avx512(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
TERN__AVX512_INLINE __m512i tern__decide_avx512(const int bf16, __m512i place, __m512i v, int32_t up, int32_t down)
{
    const __m512i most = _mm512_set1_epi32(up), least = _mm512_set1_epi32(down), zero = _mm512_setzero_si512();
    if (bf16) {
        const __mmask32 above = _mm512_cmpgt_epi16_mask(v, most), below = _mm512_cmpgt_epu16_mask(v, least);
        return _mm512_mask_sub_epi16(_mm512_maskz_mov_epi16(above, place), below, zero, place);
    } else {
        const __mmask16 above = _mm512_cmp_ps_mask((__m512)v, (__m512)most, _CMP_GT_OQ);
        const __mmask16 below = _mm512_cmp_ps_mask((__m512)v, (__m512)least, _CMP_LT_OQ);
        return _mm512_mask_sub_epi32(_mm512_maskz_mov_epi32(above, place), below, zero, place);
    }
}
/* Lanes of sums next to each other, added up. */
TERN__AVX512_INLINE __m512i tern__pair_lanes_avx512(__m512i a, __m512i b)
{
    return _mm512_add_epi8(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xdd));
}
TERN__AVX512_INLINE void tern__store_units_avx512(const int both, const __m512i *sum, __m512i none, uint8_t *unit)
{
    const __m512i a = tern__pair_lanes_avx512(sum[0], sum[1]), b = tern__pair_lanes_avx512(sum[2], sum[3]);
    if (!both) tern__store_int_avx512(unit, _mm512_add_epi8(tern__pair_lanes_avx512(a, b), none));
    else {
        tern__store_int_avx512(unit, _mm512_add_epi8(_mm512_shuffle_i64x2(a, b, 0x88), none));
        tern__store_int_avx512(unit + 64, _mm512_add_epi8(_mm512_shuffle_i64x2(a, b, 0xdd), none));
    }
}
TERN__AVX512_INLINE __m512 tern__bf16_avx512(const uint16_t *p)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16);
}
TERN__AVX512_INLINE void tern__store_i16_avx512(uint16_t *p, __m512i v)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(v));
}
TERN__AVX512_INLINE __m128 tern__quarter_avx512(__m512 v)
{
    const __m256 half = _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1);
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
TERN__X86_FLOAT(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
TERN__X86_WEIGHTS(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
#ifndef TERNARY_NO_TRAINING
TERN__X86_OPTIMIZE(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
TERN__X86_FLIPS(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
#endif
TERN__AVX512_INLINE __m512 tern__swap_avx512(__m512 v, int h)
{
    return h == 1 ? _mm512_permute_ps(v, 0xB1) : h == 2 ? _mm512_permute_ps(v, 0x4E)
         : h == 4 ? _mm512_shuffle_f32x4(v, v, 0xB1) : _mm512_shuffle_f32x4(v, v, 0x4E);
}
TERN__X86_HADAMARD(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
TERN__X86_MAP(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
#ifndef TERNARY_NO_GRAPH
TERN__X86_AGGREGATE(avx512, TERN__AVX512, 16, __m512, _mm512_)
#endif
TERN__X86_TILE(tern__tile_avx512, TERN__AVX512, 16, __m512, _mm512_, 14, TERN__PLAIN_MADD)
TERN__X86_TILE(tern__tile_fused_avx512, TERN__AVX512, 16, __m512, _mm512_, 14, _mm512_fmadd_ps)
TERN__X86_TRANSPOSE_8(avx512, TERN__AVX512)
TERN__X86_PACK(avx512, TERN__AVX512, 16, _mm512_, 8, __m256, _mm256_, 14)
TERN__X86_SCALED(avx512, TERN__AVX512, 16, _mm512_)
TERN__X86_CODES(avx512, TERN__AVX512, 16, __m512i, _mm512_)
TERN__X86_TRITS(avx512, TERN__AVX512)
TERN__X86_BITS(avx512, TERN__AVX512, 16, __m512, __m512i, _mm512_)
TERN__AVX512_INLINE __m512 tern__trit_avx512(__m512i code)
{
    return _mm512_permutevar_ps(_mm512_setr4_ps(-1, 0, 1, 0), code);
}
TERN__X86_FLOATS(avx512, TERN__AVX512, 16, __m512, _mm512_, _mm512_fmadd_ps, 12)

/* acc += dot of four codes and four activations in each lane, at most 4 * 255 * 128, wrapping. As asm,
   because gcc 12 copies the accumulator of the intrinsic around and so spills large tiles. */
TERN__AVX512_INLINE __m512i tern__dp_avx512(__m512i acc, __m512i code, __m512i x)
{
    __asm__("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(acc) : "v"(code), "v"(x));
    return acc;
}
typedef struct tern__four { int8_t x[4]; } tern__four; /* the four activations, at any address */
TERN__AVX512_INLINE __m512i tern__dp4_avx512(__m512i acc, __m512i code, const int8_t *q)
{
    __asm__("vpdpbusd {%2%{1to16%}, %1, %0|%0, %1, %2%{1to16%}}" : "+v"(acc) : "v"(code), "m"(*(const tern__four *)(const void *)q));
    return acc;
}

/* How a unit is taken apart. VBMI has a byte shuffle of 64 entries that looks at no other bits: its first table goes
   by v >> 2 and leaves e < 27 + 3 of v, and for e there is a table for each digit: 10 instructions instead of 18.
   Slower: remainders mod 81, and of those one table of 128 entries (vpermi2b is three operations). */
typedef enum { TERN__PEEL_2BIT, TERN__PEEL_BASE3, TERN__PEEL_VBMI } tern__peel;

#define TERN__7(x) x, x, x, x, x, x, x
static const uint8_t tern__floor27_by_4[64] = {TERN__7(0), TERN__7(27), TERN__7(54), 81, 81, 81, 81, 81, 81, TERN__7(108),
    TERN__7(135), TERN__7(162), 189, 189, 189, 189, 189, 189, TERN__7(216), 216, 216, 216};
#undef TERN__7
static const uint8_t tern__rest_of_30[64] = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 0, 1, 2};
static const uint8_t tern__digits_of_30[3][64] = {
    {0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2},
    {0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0}};

TERN__AVX512_INLINE __m512i tern__permute_avx512(__m512i index, const uint8_t *table) /* asm: the tiers share a target */
{
    __m512i v;
    __asm__("vpermb {%2, %1, %0|%0, %1, %2}" : "=v"(v) : "v"(index), "v"(_mm512_loadu_si512(table)));
    return v;
}

TERN__AVX512_INLINE void tern__peel_avx512(const tern__peel kind, __m512i v, __m512i *code)
{
    if (kind == TERN__PEEL_2BIT)
        TERN__UNROLL for (int s = 0; s < 4; s++) code[s] = _mm512_and_si512(v, _mm512_set1_epi8((char)(3 << 2 * s)));
    else if (kind == TERN__PEEL_BASE3) tern__digits_avx512(v, code);
    else {
        const __m512i e = _mm512_sub_epi8(v, tern__permute_avx512(_mm512_srli_epi16(v, 2), tern__floor27_by_4));
        const __m512i top = _mm512_sub_epi8(v, tern__permute_avx512(e, tern__rest_of_30));
        TERN__UNROLL for (int s = 0; s < 3; s++) code[s] = tern__permute_avx512(e, tern__digits_of_30[s]);
        code[3] = tern__permute_avx512(top, tern__high_digit);
        code[4] = tern__permute_avx512(top, tern__low_digit);
    }
}

/* Scales 16 groups ahead, as tern__prefetch does for weights. */
TERN__AVX512_INLINE void tern__prefetch_scale(const tern__dot *d, int64_t panel, int64_t g)
{
    const int64_t at = panel * d->scale_stride + (g + 16) * TERN__ROWS * tern__type_bytes(d->scale_type);
    __builtin_prefetch((const void *)((uintptr_t)d->scale + (uintptr_t)at));
}

/* P panels (several streams of memory are faster than one) with T tokens straight from the packed units. 2-bit codes
   are multiplied where they lie, 4^s times too large, one sum for each s: |sum| <= 16384 units * 4 * 128 * 127 < 2^30.
   For one token and without groups they ask no further ahead than four streams together need, so that the hardware, which
   has more misses in flight, comes first: on a Zen 4 from DRAM 27 GB/s in place of 22. What is slower loses by it.
   The loops have fixed bounds and a guard, since clang 14 leaves acc in memory where a bound of one makes a loop
   vanish early. */
TERN__AVX512_INLINE void tern__direct_avx512(const tern__peel kind, const int P, const int T, const tern__dot *d, int32_t panel,
                                             int32_t token)
{
    const int Q = kind ? 5 : 4, C = kind ? 2 : 4; /* quads of a unit, and sums that take them in turn */
    const int64_t ahead = kind || P < 4 || d->groups > 1 ? TERN__AHEAD : TERN__AHEAD / 4;
    const uint8_t *unit = d->panel + panel * d->panel_stride;
    const int8_t *q = d->q + token * d->q_stride;
    int64_t i = 0;
    for (int64_t g = 0; g < d->groups; g++) {
        const int64_t end = i + (g < d->groups - 1 ? d->units : d->last_units);
        __m512i acc[4][6][4];
        TERN__UNROLL for (int p = 0; p < 4; p++) if (p < P)
            TERN__UNROLL for (int t = 0; t < 6; t++) if (t < T)
                TERN__UNROLL for (int c = 0; c < C; c++) acc[p][t][c] = _mm512_setzero_si512();
        for (; i < end; i++, unit += 64)
            TERN__UNROLL for (int p = 0; p < 4; p++) if (p < P) {
                __m512i code[5];
                tern__prefetch(unit + p * d->panel_stride, ahead);
                tern__peel_avx512(kind, tern__load_int_avx512(unit + p * d->panel_stride), code);
                TERN__UNROLL for (int s = 0; s < Q; s++)
                    TERN__UNROLL for (int t = 0; t < 6; t++) if (t < T)
                        acc[p][t][s % C] = tern__dp4_avx512(acc[p][t][s % C], code[s], q + t * d->q_stride + (i * Q + s) * 4);
            }
        TERN__UNROLL for (int p = 0; p < 4; p++) if (p < P) {
            const __m512 scale = tern__scale_avx512(d, panel + p, g * 16);
            if (d->facc) tern__prefetch_scale(d, panel + p, g);
            TERN__UNROLL for (int t = 0; t < 6; t++) if (t < T) {
                const int64_t to = ((int64_t)(panel + p) * d->tokens + token + t) * 16;
                __m512i sum = _mm512_set1_epi32(-d->sum[(token + t) * d->sum_stride + g]);
                TERN__UNROLL for (int c = 0; c < C; c++)
                    sum = _mm512_add_epi32(sum, kind ? acc[p][t][c] : _mm512_sra_epi32(acc[p][t][c], _mm_cvtsi32_si128(2 * c)));
                tern__leave_avx512(d, to, sum, scale, g > 0);
            }
        }
    }
}

/* P panels with T tokens: P + T loads feed P * T products. */
TERN__AVX512_INLINE void tern__tile_quads_avx512(const int P, const int T, const tern__dot *d, int64_t acc_panel, int64_t acc_row,
                                                 tern__start start)
{
    __m512i sum[2][TERN__TILE_AVX512];
    TERN__UNROLL for (int p = 0; p < P; p++)
        TERN__UNROLL for (int t = 0; t < T; t++) {
            sum[p][t] = _mm512_set1_epi32(start == TERN__FROM_ACC ? 0 : -d->sum[t * d->sum_stride]);
            if (acc_row != 16) __builtin_prefetch(d->acc + p * acc_panel + t * acc_row, 1); /* met again only at the end */
        }
    for (int64_t i = 0; i < d->units; i++) {
        __m512i w[2];
        TERN__UNROLL for (int p = 0; p < P; p++) w[p] = _mm512_load_si512(d->panel + p * d->panel_stride + i * 64);
        TERN__UNROLL for (int t = 0; t < T; t++) {
            const __m512i x = tern__quad_avx512(d->q + t * d->q_stride + i * 4);
            TERN__UNROLL for (int p = 0; p < P; p++) sum[p][t] = tern__dp_avx512(sum[p][t], w[p], x);
        }
    }
    TERN__UNROLL for (int p = 0; p < P; p++) {
        const __m512 scale = tern__scale_avx512(d, p, 0);
        TERN__UNROLL for (int t = 0; t < T; t++) {
            const int64_t at = p * acc_panel + t * acc_row;
            if (start != TERN__FROM_SUM) sum[p][t] = _mm512_add_epi32(sum[p][t], tern__load_int_avx512(d->acc + at));
            tern__leave_avx512(d, at, sum[p][t], scale, d->add);
        }
    }
}
#define TERN__CASE(T) case 16 + T: tern__tile_quads_avx512(1, T, d, TERN__PANEL, TERN__ROW, start); break; \
                      case 32 + T: tern__tile_quads_avx512(2, T, d, TERN__PANEL, TERN__ROW, start); break;
static TERN__AVX512 void tern__tiles_avx512(const tern__dot *d, int64_t acc_stride, tern__start start)
{
    switch (d->panels * 16 + d->tokens) {
#define TERN__PANEL acc_stride
#define TERN__ROW 16
    TERN__CASE(4) TERN__CASE(5) TERN__CASE(6) TERN__CASE(7) TERN__CASE(8)
#undef TERN__PANEL
#undef TERN__ROW
    default: break;
    }
}
static TERN__AVX512 void tern__tiles_i8_avx512(const tern__dot *d, int64_t acc_row, tern__start start)
{
    switch (d->panels * 16 + d->tokens) {
#define TERN__PANEL 16
#define TERN__ROW acc_row
    TERN__CASE(1) TERN__CASE(2) TERN__CASE(3) TERN__CASE(4) TERN__CASE(5) TERN__CASE(6) TERN__CASE(7) TERN__CASE(8)
#undef TERN__PANEL
#undef TERN__ROW
    default: break;
    }
}
#undef TERN__CASE

/* Up to twelve tokens go straight from the packed units, in one or two groups of up to six (the second finds
   the panel in L1); above that the decoding of quads pays. Base 3 costs more to take apart: up to four. */
#define TERN__CASE(KIND, P, T) case P * 8 + T: tern__direct_avx512(KIND, P, T, d, p, t); break;
static void tern__run_2bit_avx512(const tern__dot *d)
{
    static const tern__quads quads = {tern__decode_2bit_avx512, tern__tiles_avx512, 4, 2, TERN__TILE_AVX512, TERN__QUADS_VNNI};
    tern__dot_quads(d, &quads);
}
static TERN__AVX512 void tern__dot_2bit_avx512(const tern__dot *d)
{
    if (d->tokens > 12) {
        tern__dot_groups(d, 16, tern__run_2bit_avx512);
        return;
    }
    const int32_t most = d->tokens == 1 ? 4 : d->tokens <= 3 ? 2 : 1;
    for (int32_t p = 0, panels; p < d->panels; p += panels) {
        panels = d->panels - p >= most ? most : 1;
        for (int32_t t = 0, tokens; t < d->tokens; t += tokens) {
            tokens = t == 0 && d->tokens > 6 ? (d->tokens + 1) / 2 : d->tokens - t;
            switch (panels * 8 + tokens) {
            TERN__CASE(TERN__PEEL_2BIT, 4, 1) TERN__CASE(TERN__PEEL_2BIT, 2, 2) TERN__CASE(TERN__PEEL_2BIT, 2, 3)
            TERN__CASE(TERN__PEEL_2BIT, 1, 1) TERN__CASE(TERN__PEEL_2BIT, 1, 2) TERN__CASE(TERN__PEEL_2BIT, 1, 3)
            TERN__CASE(TERN__PEEL_2BIT, 1, 4) TERN__CASE(TERN__PEEL_2BIT, 1, 5) TERN__CASE(TERN__PEEL_2BIT, 1, 6)
            default: break;
            }
        }
    }
}
/* The base-3 dot of tier X. A macro: see TERN__X86_FEW. */
#define TERN__AVX512_BASE3(X, KIND)                                                                         \
static void tern__run_base3_##X(const tern__dot *d)                                                         \
{                                                                                                           \
    static const tern__quads quads = {tern__decode_base3_##X, tern__tiles_avx512, 5, 2, TERN__TILE_AVX512, TERN__QUADS_VNNI}; \
    tern__dot_quads(d, &quads);                                                                             \
}                                                                                                           \
static TERN__AVX512 void tern__dot_base3_##X(const tern__dot *d)                                            \
{                                                                                                           \
    if (d->tokens > 4) {                                                                                    \
        tern__dot_groups(d, 20, tern__run_base3_##X);                                                       \
        return;                                                                                             \
    }                                                                                                       \
    const int32_t most = d->tokens == 1 ? 4 : 2, t = 0;                                                     \
    for (int32_t p = 0, panels; p < d->panels; p += panels) {                                               \
        panels = d->panels - p >= most ? most : 1;                                                          \
        switch (panels * 8 + d->tokens) {                                                                   \
        TERN__CASE(KIND, 4, 1) TERN__CASE(KIND, 2, 2) TERN__CASE(KIND, 2, 3) TERN__CASE(KIND, 2, 4)         \
        TERN__CASE(KIND, 1, 1) TERN__CASE(KIND, 1, 2) TERN__CASE(KIND, 1, 3) TERN__CASE(KIND, 1, 4)         \
        default: break;                                                                                     \
        }                                                                                                   \
    }                                                                                                       \
}
TERN__AVX512_BASE3(avx512, TERN__PEEL_BASE3)
static void tern__dot_i8_avx512(const tern__dot *d, int64_t acc_row, int32_t add)
{
    static const tern__quads quads = {NULL, tern__tiles_i8_avx512, 1, 2, TERN__TILE_AVX512, TERN__QUADS};
    tern__dot_codes(d, &quads, acc_row, add);
}

static const tern__kernels tern__kernels_avx512_vnni = {
    TERN__KERNELS(avx512, tern__tile_fused_avx512, avx512, avx512, avx512, avx512, 64, 14, NULL)};

#ifdef TERN__WITH_AVX512_VBMI
/* -- AVX-512 with VBMI and VPOPCNTDQ, which comes with it: the base-3 dot and that of bits alone differ -- */
static TERN__AVX512 void tern__decode_base3_avx512_vbmi(const uint8_t *panel, int64_t units, uint8_t *code)
{
    for (int64_t i = 0; i < units; i++, panel += 64, code += 5 * 64) {
        __m512i digit[5];
        tern__peel_avx512(TERN__PEEL_VBMI, tern__load_int_avx512(panel), digit);
        TERN__UNROLL for (int s = 0; s < 5; s++) tern__store_int_avx512(code + s * 64, digit[s]);
    }
}
TERN__AVX512_BASE3(avx512_vbmi, TERN__PEEL_VBMI)

/* Two units lie as the words of bits do: the codes' low bits of the first at even bits, of the second at odd ones, then the
   high bits. An odd last unit is its own second, where all bits are 0. */
static TERN__AVX512 void tern__split_avx512(const uint8_t *unit, int64_t units, uint8_t *plane)
{
    const __m512i even = _mm512_set1_epi8(0x55);
    for (int64_t i = 0; i < units; i += 2, unit += 128, plane += 128) {
        const __m512i a = tern__load_int_avx512(unit), b = tern__load_int_avx512(unit + (i + 1 < units ? 64 : 0));
        tern__store_int_avx512(plane, _mm512_ternarylogic_epi32(even, a, _mm512_slli_epi16(b, 1), 0xCA)); /* even ? a : b << 1 */
        tern__store_int_avx512(plane + 64, _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(a, 1), b, 0xCA));
    }
}
TERN__AVX512_INLINE __m512i tern__popcount_avx512(__m512i v) /* asm: the tiers share a target */
{
    __asm__("vpopcntd {%0, %0|%0, %0}" : "+v"(v));
    return v;
}
TERN__AVX512_INLINE void tern__many_bits_of_avx512(const int P, const uint8_t *plane, const int8_t *bits, int64_t words, int32_t *acc,
                                                   int64_t acc_stride)
{
    __m512i low[4], high[4];
    TERN__UNROLL for (int p = 0; p < P; p++) low[p] = high[p] = _mm512_setzero_si512();
    for (int64_t w = 0; w < words; w++, bits += 4, plane += 128) {
        const __m512i mask = tern__quad_avx512(bits);
        TERN__UNROLL for (int p = 0; p < P; p++) {
            const uint8_t *at = plane + p * TERN__BIT_UNITS * 64;
            low[p] = _mm512_add_epi32(low[p], tern__popcount_avx512(tern__load_int_avx512(at) & mask));
            high[p] = _mm512_add_epi32(high[p], tern__popcount_avx512(tern__load_int_avx512(at + 64) & mask));
        }
    }
    TERN__UNROLL for (int p = 0; p < P; p++) {
        const __m512i sum = _mm512_add_epi32(low[p], _mm512_add_epi32(high[p], high[p]));
        tern__store_int_avx512(acc + p * acc_stride, _mm512_add_epi32(tern__load_int_avx512(acc + p * acc_stride), sum));
    }
}
static TERN__AVX512 void tern__many_bits_avx512(const uint8_t *plane, int32_t panels, const int8_t *bits, int64_t words, int32_t *acc,
                                                int64_t acc_stride)
{
    switch (panels) {
    case 1: tern__many_bits_of_avx512(1, plane, bits, words, acc, acc_stride); break;
    case 2: tern__many_bits_of_avx512(2, plane, bits, words, acc, acc_stride); break;
    case 3: tern__many_bits_of_avx512(3, plane, bits, words, acc, acc_stride); break;
    default: tern__many_bits_of_avx512(4, plane, bits, words, acc, acc_stride);
    }
}
static void tern__dot_bits_avx512_vbmi(const tern__dot *d, tern_type encoding)
{
    static const tern__bit_way way = {tern__decode_base3_avx512_vbmi, tern__recode_avx512, tern__few_bits_avx512, tern__leave_bits_avx512,
                                      tern__split_avx512, tern__many_bits_avx512};
    tern__dot_bits(d, encoding, &way);
}

static const tern__kernels tern__kernels_avx512_vbmi = {
    TERN__KERNELS(avx512, tern__tile_fused_avx512, avx512, avx512_vbmi, avx512, avx512_vbmi, 64, 14, NULL)};

#ifdef TERN__WITH_AVX512_BF16
/* -- pairs of bf16: AVX-512 packs them for itself and for AMX -- */

/* Rounded to nearest even in the high halves; the low ones are not cleared. NaN stays NaN. */
TERN__AVX512_INLINE __m512i tern__high_bf16_avx512(__m512 x)
{
    const __m512i u = (__m512i)x, odd = _mm512_srli_epi32(u, 16) & _mm512_set1_epi32(1);
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
TERN__AVX512_INLINE __m512i tern__pair_avx512(__m512 first, __m512 second)
{
    return _mm512_srli_epi32(tern__high_bf16_avx512(first), 16) | (tern__high_bf16_avx512(second) & _mm512_set1_epi32((int32_t)0xffff0000));
}

static TERN__AVX512 void tern__pack_pairs_b_avx512(int64_t len, const float *b, float *to)
{
    for (int64_t j = 0; j < 32; j += 2, b += 64)
        for (int64_t h = 0; h < 32; h += 16, to += 16) {
            const __m512 first = j < len ? _mm512_loadu_ps(b + h) : _mm512_setzero_ps(),
                         second = j + 1 < len ? _mm512_loadu_ps(b + 32 + h) : _mm512_setzero_ps();
            tern__store_int_avx512(to, tern__pair_avx512(first, second));
        }
}

/* 32 terms that lie in rows, and in columns: those are paired first and then turned. */
TERN__AVX512_INLINE void tern__pack_pair_rows_avx512(int64_t rows, int64_t len, const float *a, int64_t a_row,
                                                     const float *scale, uint16_t *to)
{
    for (int64_t i = 0; i < rows; i++, a += a_row)
        for (int64_t j = 0; j < 32; j += 16, to += 16) {
            const __m512 x = _mm512_mul_ps(tern__load_avx512(a + j, len - j), tern__load_avx512(scale + j, len - j));
            tern__store_i16_avx512(to, _mm512_srli_epi32(tern__high_bf16_avx512(x), 16));
        }
    memset(to, 0, (size_t)(16 - rows) * 64);
}
TERN__AVX512_INLINE void tern__pack_pair_columns_avx512(int64_t rows, int64_t len, const float *a, int64_t a_col,
                                                        const float *scale, float *to)
{
    float pair[16 * 16] TERN__ALIGN64;
    for (int64_t j = 0; j < 32; j += 2, a += 2 * a_col) {
        const __m512 first = j < len ? _mm512_mul_ps(tern__load_avx512(a, rows), _mm512_set1_ps(scale[j])) : _mm512_setzero_ps();
        const __m512 second = j + 1 < len ? _mm512_mul_ps(tern__load_avx512(a + a_col, rows), _mm512_set1_ps(scale[j + 1]))
                                          : _mm512_setzero_ps();
        tern__store_int_avx512(pair + j * 8, tern__pair_avx512(first, second));
    }
    tern__columns_avx512(16, 16, pair, 16, to, 16);
}
static TERN__AVX512 void tern__pack_pairs_a_avx512(int64_t rows, int64_t len, const float *a, int64_t a_row, int64_t a_col,
                                                   const float *scale, float *to)
{
    for (; len > 0; len -= 32, a += 32 * a_col, scale += 32, to += 256) {
        const int64_t some = tern__min(len, 32);
        float column[32 * 16];
        if (a_col == 1) tern__pack_pair_rows_avx512(rows, some, a, a_row, scale, (uint16_t *)(void *)to);
        else if (a_row == 1) tern__pack_pair_columns_avx512(rows, some, a, a_col, scale, to);
        else {
            for (int64_t j = 0; j < some; j++)
                for (int64_t i = 0; i < rows; i++) column[j * 16 + i] = a[i * a_row + j * a_col];
            tern__pack_pair_columns_avx512(rows, some, column, 16, scale, to);
        }
    }
}

/* Finished sums of some rows to c, where they go there. */
TERN__AVX512_INLINE void tern__pair_ends_avx512(const tern__tile *t, int64_t i, int64_t rows)
{
    for (int64_t r = i; t->c && r < i + rows; r++)
        for (int64_t h = 0; h < 32; h += 16) {
            const __m512 sum = _mm512_loadu_ps(t->p + r * 32 + h);
            float *c = t->c + r * t->c_row + h;
            _mm512_storeu_ps(c, t->add ? _mm512_add_ps(_mm512_loadu_ps(c), sum) : sum);
        }
}

/* Both products of a word and the sum, denormals as zeros; asm, since the tiers share a target. A test can bring its own. */
#ifndef TERN__PAIR_DOT
#define TERN__PAIR_DOT(sum, a, b) __asm__("vdpbf16ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(a), "v"(b))
#endif

/* Eight rows at a time beside 32 lanes: ten loads feed sixteen products. */
static TERN__AVX512 void tern__pair_tiles_avx512(const tern__tile *t)
{
    const int64_t steps = tern__ceil_div(t->k, 32);
    for (int64_t i = 0; i < t->rows; i += 8) {
        const float *a = t->a + i / 16 * steps * 256 + i % 16 * 16, *b = t->b;
        float *p = t->p + i * 32;
        __m512 sum[8][2];
        TERN__UNROLL for (int r = 0; r < 8; r++)
            TERN__UNROLL for (int h = 0; h < 2; h++) sum[r][h] = t->first ? _mm512_setzero_ps() : _mm512_loadu_ps(p + r * 32 + h * 16);
        for (int64_t left = steps; left > 0; left--, a += 256)
            for (int64_t j = 0; j < 16; j++, b += 32) {
                const __m512 first = _mm512_loadu_ps(b), second = _mm512_loadu_ps(b + 16);
                TERN__UNROLL for (int r = 0; r < 8; r++) {
                    const __m512 x = _mm512_set1_ps(a[r * 16 + j]);
                    TERN__PAIR_DOT(sum[r][0], x, first);
                    TERN__PAIR_DOT(sum[r][1], x, second);
                }
            }
        TERN__UNROLL for (int r = 0; r < 8; r++)
            TERN__UNROLL for (int h = 0; h < 2; h++) _mm512_storeu_ps(p + r * 32 + h * 16, sum[r][h]);
        tern__pair_ends_avx512(t, i, tern__min(8, t->rows - i));
    }
}
static const tern__pairs tern__pairs_avx512 = {tern__pack_pairs_a_avx512, tern__pack_pairs_b_avx512, tern__pair_tiles_avx512};
static const tern__kernels tern__kernels_avx512_bf16 = {
    TERN__KERNELS(avx512, tern__tile_fused_avx512, avx512, avx512_vbmi, avx512, avx512_vbmi, 64, 14, &tern__pairs_avx512)};
#endif /* TERN__WITH_AVX512_BF16 */
#endif /* TERN__WITH_AVX512_VBMI */
#undef TERN__CASE
#endif /* TERN__WITH_AVX512_VNNI */

#ifdef TERN__WITH_AMX_INT8
/* -- AMX-INT8, with AVX-512 around it -- */

/* The tile unit: eight tiles of up to 16 rows of 64 bytes. As asm, since gcc 12's intrinsics hide from the
   compiler what they read and write; a test can bring its own. TERN__TILE_ONCE loads what one pass needs once:
   activations, so that the decoded weights stay in L1. */
#ifndef TERN__TILE_UNIT
#define TERN__TILE_CONFIG(from) __asm__ volatile("{ldtilecfg (%0)|ldtilecfg [%0]}" : : "r"(from) : "memory")
#define TERN__TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define TERN__TILE_MOVE(op, tile, from, stride) \
    __asm__ volatile("{" op " (%0,%1,1), %%tmm" #tile "|" op " tmm" #tile ", [%0+%1*1]}" : : "r"(from), "r"((int64_t)(stride)) : "memory")
#define TERN__TILE_LOAD(tile, from, stride) TERN__TILE_MOVE("tileloadd", tile, from, stride)
#define TERN__TILE_ONCE(tile, from, stride) TERN__TILE_MOVE("tileloaddt1", tile, from, stride)
#define TERN__TILE_STORE(tile, to, stride) \
    __asm__ volatile("{tilestored %%tmm" #tile ", (%0,%1,1)|tilestored [%0+%1*1], tmm" #tile "}" \
        : : "r"(to), "r"((int64_t)(stride)) : "memory")
#define TERN__TILE_DOT(c, a, b) /* c += a * b, a signed, b unsigned */ \
    __asm__ volatile("{tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c "|tdpbsud tmm" #c ", tmm" #a ", tmm" #b "}" : : : "memory")
#define TERN__TILE_PAIRS(c, a, b) /* the same of bf16, in float32 (AMX-BF16) */ \
    __asm__ volatile("{tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c "|tdpbf16ps tmm" #c ", tmm" #a ", tmm" #b "}" : : : "memory")
#define TERN__TILE_ZERO(tile) __asm__ volatile("{tilezero %%tmm" #tile "|tilezero tmm" #tile "}" : : : "memory")
#endif

typedef struct tern__tile_config {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tern__tile_config;

enum { TERN__FEW_AMX = 3 }; /* up to so many tokens are faster without tiles */

/* Products cost the less the fewer rows, and four sums in flight hide their latency. So up to 16 tokens are one
   tile beside four panels; more are an even number of tiles of one size, two at a time beside two panels. */
static int32_t tern__tile_rows_amx(int32_t tokens)
{
    const int32_t tiles = tokens > 16 ? (tokens + 31) / 32 * 2 : 1;
    return (tokens + tiles - 1) / tiles;
}

/* A quad is a row of a tile of weights. The last tile of a chunk may lack some: they are made up in front, as
   zeros, so that the activations beside it can be read from further back and not from beyond the run. */
static void tern__pad_amx(uint8_t *code, int64_t quads)
{
    const int64_t tail = quads % 16;
    if (tail == 0) return;
    code += (quads - tail) * 64;
    memmove(code + (16 - tail) * 64, code, (size_t)tail * 64);
    memset(code, 0, (size_t)(16 - tail) * 64);
}
static void tern__decode_2bit_amx(const uint8_t *panel, int64_t units, uint8_t *code)
{
    tern__decode_2bit_avx512(panel, units, code);
    tern__pad_amx(code, units * 4);
}
static void tern__decode_base3_amx(const uint8_t *panel, int64_t units, uint8_t *code)
{
    tern__decode_base3_avx512_vbmi(panel, units, code);
    tern__pad_amx(code, units * 5);
}

/* Where the tiles of weights and activations lie when `left` quads are still to do, `step` at a time. */
#define TERN__STEPS_AMX(left) for (int64_t left = d.units; left > 0; left -= 16)
#define TERN__B_AMX(left, p) (d.panel + (p) * d.panel_stride + (d.units - left + 16 - step) * 64)
#define TERN__A_AMX(left, t) (d.q + (t) * d.q_stride + (d.units - (left < 16 ? step : left)) * 4)

/* Tokens 0 to 15 with P panels (the dot by value, so that its fields stay in registers): sums in tiles 0 to 3, activations
   in 4, weights in 6 and 7. */
static inline __attribute__((always_inline)) void tern__tile_quads_1_amx(const int P, tern__dot d, int64_t acc_stride, int64_t step)
{
    TERN__TILE_LOAD(0, d.acc, 64);
    if (P > 1) TERN__TILE_LOAD(1, d.acc + acc_stride, 64);
    if (P > 2) TERN__TILE_LOAD(2, d.acc + 2 * acc_stride, 64);
    if (P > 3) TERN__TILE_LOAD(3, d.acc + 3 * acc_stride, 64);
    TERN__STEPS_AMX(left) {
        TERN__TILE_ONCE(4, TERN__A_AMX(left, 0), d.q_stride);
        TERN__TILE_LOAD(6, TERN__B_AMX(left, 0), 64);
        TERN__TILE_DOT(0, 4, 6);
        if (P > 1) TERN__TILE_LOAD(7, TERN__B_AMX(left, 1), 64);
        if (P > 1) TERN__TILE_DOT(1, 4, 7);
        if (P > 2) TERN__TILE_LOAD(6, TERN__B_AMX(left, 2), 64);
        if (P > 2) TERN__TILE_DOT(2, 4, 6);
        if (P > 3) TERN__TILE_LOAD(7, TERN__B_AMX(left, 3), 64);
        if (P > 3) TERN__TILE_DOT(3, 4, 7);
    }
    TERN__TILE_STORE(0, d.acc, 64);
    if (P > 1) TERN__TILE_STORE(1, d.acc + acc_stride, 64);
    if (P > 2) TERN__TILE_STORE(2, d.acc + 2 * acc_stride, 64);
    if (P > 3) TERN__TILE_STORE(3, d.acc + 3 * acc_stride, 64);
}

/* The tiles of activations from tokens t and u on, with P panels. They may overlap: then both find and leave the
   same sums. Activations are in 4 and 5. */
static inline __attribute__((always_inline)) void tern__tile_quads_2_amx(const int P, tern__dot d, int64_t acc_stride, int64_t step,
                                                                         int32_t t, int32_t u)
{
    int32_t *at = d.acc + t * 16, *au = d.acc + u * 16;
    TERN__TILE_LOAD(0, at, 64);
    TERN__TILE_LOAD(1, au, 64);
    if (P > 1) TERN__TILE_LOAD(2, at + acc_stride, 64);
    if (P > 1) TERN__TILE_LOAD(3, au + acc_stride, 64);
    TERN__STEPS_AMX(left) {
        TERN__TILE_ONCE(4, TERN__A_AMX(left, t), d.q_stride);
        TERN__TILE_LOAD(6, TERN__B_AMX(left, 0), 64);
        TERN__TILE_DOT(0, 4, 6);
        TERN__TILE_ONCE(5, TERN__A_AMX(left, u), d.q_stride);
        TERN__TILE_DOT(1, 5, 6);
        if (P > 1) TERN__TILE_LOAD(7, TERN__B_AMX(left, 1), 64);
        if (P > 1) TERN__TILE_DOT(2, 4, 7);
        if (P > 1) TERN__TILE_DOT(3, 5, 7);
    }
    TERN__TILE_STORE(0, at, 64);
    TERN__TILE_STORE(1, au, 64);
    if (P > 1) TERN__TILE_STORE(2, at + acc_stride, 64);
    if (P > 1) TERN__TILE_STORE(3, au + acc_stride, 64);
}

static TERN__AVX512 void tern__tiles_amx(const tern__dot *d, int64_t acc_stride, tern__start start)
{
    const int32_t rows = tern__tile_rows_amx(d->tokens);
    const int64_t step = start == TERN__FROM_SUM && d->units < 16 ? d->units : 16; /* such a first chunk is the whole run */
    for (int32_t p = 0; start == TERN__FROM_SUM && p < d->panels; p++)
        for (int32_t t = 0; t < d->tokens; t++)
            _mm512_store_si512(d->acc + p * acc_stride + t * 16, _mm512_set1_epi32(-d->sum[t * d->sum_stride]));
    if (d->tokens <= 16)
        switch (d->panels) {
        case 1: tern__tile_quads_1_amx(1, *d, acc_stride, step); break;
        case 2: tern__tile_quads_1_amx(2, *d, acc_stride, step); break;
        case 3: tern__tile_quads_1_amx(3, *d, acc_stride, step); break;
        default: tern__tile_quads_1_amx(4, *d, acc_stride, step);
        }
    else
        for (int32_t t = 0; t < d->tokens; t += 2 * rows) {
            const int32_t u = t + 2 * rows < d->tokens ? t + rows : d->tokens - rows;
            if (d->panels > 1) tern__tile_quads_2_amx(2, *d, acc_stride, step, t, u);
            else tern__tile_quads_2_amx(1, *d, acc_stride, step, t, u);
        }
    for (int32_t p = 0; d->facc && p < d->panels; p++) {
        const __m512 scale = tern__scale_avx512(d, p, 0);
        for (int64_t at = p * acc_stride; at < p * acc_stride + d->tokens * 16; at += 16)
            tern__leave_avx512(d, at, tern__load_int_avx512(d->acc + at), scale, d->add);
    }
}
#undef TERN__STEPS_AMX
#undef TERN__A_AMX
#undef TERN__B_AMX

static void tern__configure_amx(uint8_t rows, uint8_t step)
{
    tern__tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int32_t i = 0; i < 8; i++) {
        config.rows[i] = i < 6 ? rows : step;
        config.bytes[i] = (uint16_t)(i == 4 || i == 5 ? 4 * step : 64);
    }
    TERN__TILE_CONFIG(&config);
}

/* One configuration serves all tiles of all groups, but for a last group that is shorter than a tile. */
static void tern__dot_amx(const tern__dot *d, const tern__quads *k)
{
    const int32_t rows = tern__tile_rows_amx(d->tokens);
    int64_t step = 0;
    for (int64_t g = 0; g < d->groups; g++) {
        const tern__dot one = tern__dot_group(d, g, k->per_unit * 4);
        const int64_t quads = one.units * k->per_unit, wanted = quads < 16 ? quads : 16;
        if (step != wanted) tern__configure_amx((uint8_t)rows, (uint8_t)wanted);
        step = wanted;
        tern__dot_quads(&one, k);
    }
    TERN__TILE_RELEASE(); /* tiles in use slow down context switches */
}
static void tern__dot_2bit_amx(const tern__dot *d)
{
    static const tern__quads some = {tern__decode_2bit_amx, tern__tiles_amx, 4, 4, 16, 112};
    static const tern__quads many = {tern__decode_2bit_amx, tern__tiles_amx, 4, 2, TERN__TOKENS, 224};
    if (d->tokens > TERN__FEW_AMX) tern__dot_amx(d, d->tokens > 16 ? &many : &some);
    else tern__dot_2bit_avx512(d);
}
static void tern__dot_base3_amx(const tern__dot *d)
{
    static const tern__quads some = {tern__decode_base3_amx, tern__tiles_amx, 5, 4, 16, 80};
    static const tern__quads many = {tern__decode_base3_amx, tern__tiles_amx, 5, 2, TERN__TOKENS, 160};
    if (d->tokens > TERN__FEW_AMX) tern__dot_amx(d, d->tokens > 16 ? &many : &some);
    else tern__dot_base3_avx512_vbmi(d);
}

/* -- pairs of bf16 -- */

/* R times 16 rows from row i on, beside 32 lanes: sums in tiles 0 to 3, a in 4 and 5, b in 6 and 7. */
static inline __attribute__((always_inline)) void tern__pair_rows_amx(const int R, const tern__tile *t, int64_t i, int64_t steps)
{
    const float *a = t->a + i * steps * 16, *b = t->b;
    float *p = t->p + i * 32;
    if (t->first) {
        TERN__TILE_ZERO(0);
        TERN__TILE_ZERO(1);
        if (R > 1) TERN__TILE_ZERO(2);
        if (R > 1) TERN__TILE_ZERO(3);
    } else {
        TERN__TILE_LOAD(0, p, 128);
        TERN__TILE_LOAD(1, p + 16, 128);
        if (R > 1) TERN__TILE_LOAD(2, p + 512, 128);
        if (R > 1) TERN__TILE_LOAD(3, p + 528, 128);
    }
    for (int64_t left = steps; left > 0; left--, a += 256, b += 512) {
        TERN__TILE_ONCE(4, a, 64);
        TERN__TILE_LOAD(6, b, 128);
        TERN__TILE_PAIRS(0, 4, 6);
        TERN__TILE_LOAD(7, b + 16, 128);
        TERN__TILE_PAIRS(1, 4, 7);
        if (R > 1) TERN__TILE_ONCE(5, a + steps * 256, 64);
        if (R > 1) TERN__TILE_PAIRS(2, 5, 6);
        if (R > 1) TERN__TILE_PAIRS(3, 5, 7);
    }
    TERN__TILE_STORE(0, p, 128);
    TERN__TILE_STORE(1, p + 16, 128);
    if (R > 1) TERN__TILE_STORE(2, p + 512, 128);
    if (R > 1) TERN__TILE_STORE(3, p + 528, 128);
}

static TERN__AVX512 void tern__pair_tiles_amx(const tern__tile *t)
{
    const int64_t steps = tern__ceil_div(t->k, 32);
    tern__configure_amx(16, 16);
    for (int64_t i = 0, rows; i < t->rows; i += rows) {
        rows = tern__min(t->rows - i, 32);
        if (rows > 16) tern__pair_rows_amx(2, t, i, steps);
        else tern__pair_rows_amx(1, t, i, steps);
        tern__pair_ends_avx512(t, i, rows);
    }
    TERN__TILE_RELEASE();
}
static const tern__pairs tern__pairs_amx = {tern__pack_pairs_a_avx512, tern__pack_pairs_b_avx512, tern__pair_tiles_amx};

static const tern__kernels tern__kernels_amx_int8 = {
    TERN__KERNELS(avx512, tern__tile_fused_avx512, amx, amx, avx512, avx512_vbmi, TERN__TOKENS, 14, NULL)};
static const tern__kernels tern__kernels_amx_bf16 = {
    TERN__KERNELS(avx512, tern__tile_fused_avx512, amx, amx, avx512, avx512_vbmi, TERN__TOKENS, 14, &tern__pairs_amx)};
#endif /* TERN__WITH_AMX_INT8 */

#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#endif /* x86 */

/* ------------------------------------------------------------------------------------------------
   [TERN-14] Backends: the function table, one instance per tier, selection
   What enters: checked arguments. What leaves: results with the same bits from every tier on the
   inference path. The operations are written once; tiers differ in tern__kernels alone. Called by the
   public tern_NAME functions at the end of the room, and through them by the layers.
   ------------------------------------------------------------------------------------------------ */

/* -- ternary matmul on quantized activations -- */

/* `count` panels from p on with some tokens, `side` in a call: next to each other, or `apart`, so that each stream of a call
   goes on in the next. acc, and facc with groups, take what call after call leaves. */
static void tern__matmul_dots(const tern__kernels *k, const tern_matmul_args *a, const tern__shape *s, int64_t p, int64_t count,
                              int64_t side, int64_t apart, tern__dot d)
{
    const int64_t scales = a->m.grain > 0 ? s->groups * TERN__ROWS * tern__type_bytes(a->m.scale_type) : 0;
    int64_t i;
    for (i = 0; i * side < count; i++) {
        const int64_t step = i < apart ? apart : 1, first = p + (i < apart ? i : i * side);
        d.panel = (const uint8_t *)a->m.trits + first * s->panel_bytes;
        d.panel_stride = step * s->panel_bytes;
        d.panels = (int32_t)tern__min(side, count - i * side);
        d.scale = (const uint8_t *)a->m.scales + first * scales;
        d.scale_stride = step * scales;
        if (a->act == TERN_ACT_BIT) k->dot_bits(&d, a->m.encoding);
        else (a->m.encoding == TERN_BASE3 ? k->dot_base3 : k->dot_2bit)(&d);
        d.acc += side * d.tokens * TERN__ROWS;
        if (d.facc) d.facc += side * d.tokens * TERN__ROWS;
    }
}

/* Tokens [t0, t1) of panels [p0, p1). Each token block passes over all panels while it is in cache. With up to three tokens
   it is reading that takes time, of two or more panels side by side: these lie as far apart as they can, since hardware
   prefetchers start anew with each stream, and run far ahead of long ones alone; results wait for many panels, for scales and y
   in between cost as much again (together 22 GB/s in place of 27 with one token on a Zen 4). With more tokens
   multiplying takes the time, and panels one after the other are read faster next to each other. */
static void tern__matmul_range(const tern__kernels *k, const tern_matmul_args *a, const tern__shape *s, int64_t p0, int64_t p1,
                               int64_t t0, int64_t t1)
{
    const tern_matrix *m = &a->m;
    int32_t acc[TERN__PAIRS * TERN__ROWS] TERN__ALIGN64;
    float facc[TERN__PAIRS * TERN__ROWS] TERN__ALIGN64, scale[TERN__ROWS], bias[TERN__ROWS];
    int64_t t, p, j, r, tokens, count;
    for (t = t0; t < t1; t += tokens) {
        int64_t side;
        tokens = tern__min(k->tokens, t1 - t);
        side = tokens * TERN__PANELS <= TERN__PAIRS ? TERN__PANELS : TERN__PANELS / 2;
        for (p = p0; p < p1; p += count) {
            int64_t apart;
            tern__dot d;
            memset(&d, 0, sizeof d);
            count = tern__min(tokens < 4 ? TERN__PAIRS / 2 / tokens : side, p1 - p);
            apart = tokens < 4 ? count / side : 0;
            d.units = s->group_units;
            d.last_units = tern__group_run(m, s, s->groups - 1);
            d.groups = s->groups;
            d.q = a->q + t * s->stride;
            d.q_stride = s->stride;
            d.sum = a->sum + t * s->groups;
            d.sum_stride = s->groups;
            d.tokens = (int32_t)tokens;
            d.acc = acc;
            d.facc = m->grain > 0 ? facc : NULL;
            d.scale_type = m->scale_type;
            tern__matmul_dots(k, a, s, p, count, side, apart, d);
            for (j = 0; j < count; j++) {
                const int64_t at = (j < apart * side ? j % apart * side + j / apart : j) * tokens * TERN__ROWS;
                const int64_t row = (p + j) * TERN__ROWS;
                tern__emit e;
                e.rows = (int32_t)tern__min(TERN__ROWS, m->rows - row);
                e.tokens = d.tokens;
                e.acc = acc + at;
                e.facc = d.facc ? facc + at : NULL;
                e.scale = a->scale + t;
                e.s = !d.facc ? tern__panel_scales(m, s, p + j, 0, scale) : NULL;
                for (r = 0; a->bias && r < TERN__ROWS; r++) bias[r] = r < e.rows ? a->bias[row + r] : 0.0f;
                e.bias = a->bias ? bias : NULL;
                e.y = a->y + t * m->rows + row;
                e.y_stride = m->rows;
                k->emit(&e);
            }
        }
    }
}

/* -- the same in integers alone -- */

enum { TERN__FIXED_TOKENS = 16, TERN__FIXED_PANELS = 16, TERN__FIXED_INPUTS = 2048, TERN__FIXED_STRIDE = 2112 };
typedef struct tern__fixed {
    int8_t q[TERN__FIXED_TOKENS * TERN__FIXED_STRIDE];
    int32_t sum[TERN__FIXED_TOKENS];
    int32_t acc[TERN__PANELS * TERN__FIXED_TOKENS * TERN__ROWS];                  /* of some inputs */
    int32_t dot[TERN__FIXED_PANELS * TERN__FIXED_TOKENS * TERN__ROWS];            /* of a group */
    int64_t total[TERN__FIXED_PANELS * TERN__FIXED_TOKENS * TERN__ROWS];
} tern__fixed;

/* Some inputs of some tokens as dots take them: sums, and zeros up to a whole unit. */
static void tern__fixed_order(const int8_t *x, int64_t stride, int64_t len, int64_t whole, int32_t tokens, int8_t *q, int32_t *sum)
{
    int64_t i;
    int32_t t;
    for (t = 0; t < tokens; t++, x += stride, q += TERN__FIXED_STRIDE) {
        sum[t] = 0;
        for (i = 0; i < len; i++) sum[t] += x[i];
        memcpy(q, x, (size_t)len);
        memset(q + len, 0, (size_t)(whole + 64 - len));
    }
}

/* Dots of a group with up to 16 panels from p on: dot[panel][token][row]. */
static void tern__fixed_dots(const tern__kernels *k, const tern_matmul_fixed_args *a, const tern__shape *s, int64_t p, int32_t panels,
                             int64_t t, int32_t tokens, int64_t g, tern__fixed *w)
{
    const int64_t cols = tern__group_cols(&a->m, s, g), most = TERN__FIXED_INPUTS / s->unit * s->unit;
    const int32_t base3 = a->m.encoding == TERN_BASE3;
    int64_t at, len;
    int32_t i, j;
    tern__dot d;
    memset(&d, 0, sizeof d);
    d.panel_stride = s->panel_bytes;
    d.groups = d.sum_stride = 1;
    d.q = w->q;
    d.q_stride = TERN__FIXED_STRIDE;
    d.sum = w->sum;
    d.tokens = tokens;
    d.acc = w->acc;
    for (at = 0; at < cols; at += len) {
        const int64_t skipped = (g * s->group_units + at / s->unit) * TERN__UNIT;
        len = tern__min(most, cols - at);
        d.units = d.last_units = tern__ceil_div(len, s->unit);
        tern__fixed_order(a->x + t * a->m.cols + g * s->group + at, a->m.cols, len, d.units * s->unit, tokens, w->q, w->sum);
        for (i = 0; i < panels; i += TERN__PANELS) {
            int32_t *dot = w->dot + i * tokens * TERN__ROWS;
            d.panel = (const uint8_t *)a->m.trits + (p + i) * s->panel_bytes + skipped;
            d.panels = (int32_t)tern__min(TERN__PANELS, panels - i);
            (base3 ? k->dot_base3 : k->dot_2bit)(&d);
            for (j = 0; j < d.panels * tokens * TERN__ROWS; j++) dot[j] = (at ? dot[j] : 0) + w->acc[j];
        }
    }
}

/* The largest exponent of a row's scales. */
TERN__ANYWHERE int32_t tern__top_exponent(const tern_matrix *m, const tern__shape *s, int64_t row)
{
    int32_t top = INT32_MIN;
    int64_t g;
    for (g = 0; g < (m->grain > 0 ? s->groups : 1); g++) {
        const tern__integer_scale scale = tern__load_integer_scale(m->scale_type, m->scales, tern__scale_index(m, s, row, g));
        if (scale.factor && scale.exponent > top) top = scale.exponent;
    }
    return top;
}

static void tern__fixed_strip(const tern__kernels *k, const tern_matmul_fixed_args *a, const tern__shape *s, int64_t p, int32_t panels,
                              int64_t t, int32_t tokens)
{
    const int64_t rows = tern__min(panels * TERN__ROWS, a->m.rows - p * TERN__ROWS);
    tern__fixed w TERN__ALIGN64;
    int32_t top[TERN__FIXED_PANELS * TERN__ROWS], i;
    int64_t g, r;
    for (r = 0; r < rows; r++) top[r] = tern__top_exponent(&a->m, s, p * TERN__ROWS + r);
    memset(w.total, 0, sizeof w.total);
    for (g = 0; g < s->groups; g++) {
        tern__fixed_dots(k, a, s, p, panels, t, tokens, g, &w);
        for (r = 0; r < rows; r++) {
            const tern__integer_scale scale =
                tern__load_integer_scale(a->m.scale_type, a->m.scales, tern__scale_index(&a->m, s, p * TERN__ROWS + r, g));
            const int64_t at = r / TERN__ROWS * tokens * TERN__ROWS + r % TERN__ROWS;
            if (!scale.factor) continue;
            for (i = 0; i < tokens; i++) /* |dot| <= 2^25, also of all groups together */
                w.total[at + i * TERN__ROWS] += tern__floor_shift((int64_t)w.dot[at + i * TERN__ROWS] * scale.factor * 65536,
                                                                  (int32_t)tern__min(top[r] - scale.exponent, 63));
        }
    }
    for (i = 0; i < tokens; i++)
        for (r = 0; r < rows; r++) {
            const int64_t row = p * TERN__ROWS + r, x = w.total[(r / TERN__ROWS * tokens + i) * TERN__ROWS + r % TERN__ROWS];
            a->y[(t + i) * a->m.rows + row] = tern__fixed_point(x, x ? top[r] - 31 + a->point : 0, a->bias ? a->bias[row] : 0);
        }
}

typedef struct tern__fixed_work { const tern_matmul_fixed_args *a; tern__shape s; } tern__fixed_work;

static void tern__fixed_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__fixed_work *w = (const tern__fixed_work *)job->arg;
    int64_t p, t;
    (void)bad;
    for (p = begin; p < end; p += TERN__FIXED_PANELS)
        for (t = 0; t < w->a->n; t += TERN__FIXED_TOKENS)
            tern__fixed_strip(job->k, w->a, &w->s, p, (int32_t)tern__min(TERN__FIXED_PANELS, end - p), t,
                              (int32_t)tern__min(TERN__FIXED_TOKENS, w->a->n - t));
}

static tern_result tern__cpu_matmul_fixed(tern_run *run, const tern_matmul_fixed_args *a)
{
    tern__fixed_work w;
    w.a = a;
    w.s = tern__shape_of(&a->m);
    tern__for(run, tern__fixed_body, &w, w.s.panels, tern__mul(a->n, a->m.cols));
    return TERN_OK;
}

/* -- ternary matmul on float activations -- */

enum { TERN__X_FLOATS = 6144 }; /* activations in order of use, in L1 */

/* Inputs [from, from + inputs) of some tokens as [input][token], zeros behind `cols`. */
static void tern__floats_order(const float *x, int64_t stride, int64_t cols, int64_t inputs, int32_t tokens, float *to)
{
    int64_t i;
    int32_t t;
    for (t = 0; t < tokens; t++, x += stride, to++) {
        for (i = 0; i < cols; i++) to[i * tokens] = x[i];
        for (; i < inputs; i++) to[i * tokens] = 0.0f;
    }
}

/* y = (group > 0 ? y : 0) + sum * scale (+ bias) for a panel of up to 16 rows. Constant trip counts, so that
   compilers vectorise. */
static void tern__floats_store(const float *sum, const float *scale, const float *bias, int32_t add, int64_t rows, float *y)
{
    const size_t bytes = sizeof(float) * (size_t)rows;
    float v[TERN__ROWS], other[TERN__ROWS] = {0};
    int32_t r;
    for (r = 0; r < TERN__ROWS; r++) v[r] = sum[r] * scale[r];
    if (add) {
        memcpy(other, y, bytes);
        for (r = 0; r < TERN__ROWS; r++) v[r] = other[r] + v[r];
    }
    if (bias) {
        memcpy(other, bias, bytes);
        for (r = 0; r < TERN__ROWS; r++) v[r] = v[r] + other[r];
    }
    memcpy(y, v, bytes);
}

/* Up to 12 tokens from t on, and up to 32 panels from p on, every step-th. Sums run in order within segments of 2048 inputs;
   segment sums are added in order, then multiplied by their row's scale, then added over the groups. */
static void tern__matmul_strip(const tern__kernels *k, const tern_matmul_args *a, const tern__shape *s, int64_t p, int64_t step,
                               int32_t panels, int64_t t, int32_t tokens)
{
    const tern_matrix *m = &a->m;
    const int64_t most = TERN__X_FLOATS / tokens & ~(int64_t)15;
    float x[TERN__X_FLOATS] TERN__ALIGN64, part[TERN__FEW * TERN__STRIP] TERN__ALIGN64, whole[TERN__FEW * TERN__STRIP] TERN__ALIGN64;
    int64_t g, at, len, i;
    tern__float_dot f;
    f.panel_stride = step * s->panel_bytes;
    f.base3 = m->encoding == TERN_BASE3;
    f.panels = panels;
    f.tokens = tokens;
    f.p = part;
    for (g = 0; g < s->groups; g++) {
        const int64_t cols = tern__group_cols(m, s, g), skipped = g * s->group_units * TERN__UNIT;
        const float *sum = cols > TERN__SEGMENT ? whole : part;
        f.panel = (const uint8_t *)m->trits + p * s->panel_bytes + skipped;
        for (at = 0; at < cols; at += len) {
            const float *from = a->x + t * m->cols + g * s->group + at;
            const int64_t in_segment = at % TERN__SEGMENT;
            len = tern__min(tern__min(most, TERN__SEGMENT - in_segment), cols - at);
            f.from = at;
            f.inputs = tern__ceil_div(len, 4) * 4;
            f.x = tokens == 1 && len == f.inputs ? from : x;
            f.first = in_segment == 0;
            if (f.x == x) tern__floats_order(from, m->cols, len, f.inputs, tokens, x);
            k->floats(&f);
            if (sum == whole && (in_segment + len == TERN__SEGMENT || at + len == cols))
                for (i = 0; i < tokens * TERN__STRIP; i++) whole[i] = at < TERN__SEGMENT ? part[i] : whole[i] + part[i];
        }
        for (i = 0; i < panels; i++) {
            const int64_t row = (p + i * step) * TERN__ROWS;
            const float *bias = a->bias && g == s->groups - 1 ? a->bias + row : NULL;
            float buffer[TERN__ROWS];
            const float *scale = tern__panel_scales(m, s, p + i * step, g, buffer);
            int32_t j;
            for (j = 0; j < tokens; j++)
                tern__floats_store(sum + j * TERN__STRIP + i * TERN__ROWS, scale, bias, g > 0, tern__min(TERN__ROWS, m->rows - row),
                                   a->y + (t + j) * m->rows + row);
        }
    }
}

/* Tokens [t0, t1) of panels [p0, p1). One token leaves nothing to share: its strips are what a kernel reads side by side,
   as far apart as in tern__matmul_range, which with more tokens does no harm. */
static void tern__matmul_floats(const tern__kernels *k, const tern_matmul_args *a, const tern__shape *s, int64_t p0, int64_t p1,
                                int64_t t0, int64_t t1)
{
    const int64_t most = t1 - t0 == 1 ? 8 : TERN__STRIP / TERN__ROWS, apart = (p1 - p0) / most;
    int64_t t, i, tiles = tern__ceil_div(t1 - t0, TERN__FEW), tokens; /* tiles of nearly equal size */
    for (t = t0; t < t1; t += tokens, tiles--) {
        tokens = tern__ceil_div(t1 - t, tiles);
        for (i = 0; i * most < p1 - p0; i++)
            tern__matmul_strip(k, a, s, p0 + (i < apart ? i : i * most), i < apart ? apart : 1,
                               (int32_t)tern__min(most, p1 - p0 - i * most), t, (int32_t)tokens);
    }
}

typedef struct tern__matmul_work {
    const tern_matmul_args *a;
    const tern_quantize_args *quantize;
    tern__shape s;
    int32_t by_token;
} tern__matmul_work;

static void tern__matmul_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__matmul_work *w = (const tern__matmul_work *)job->arg;
    (void)bad;
    if (w->by_token) (w->a->q ? tern__matmul_range : tern__matmul_floats)(job->k, w->a, &w->s, 0, w->s.panels, begin, end);
    else (w->a->q ? tern__matmul_range : tern__matmul_floats)(job->k, w->a, &w->s, begin, end, 0, w->a->n);
}

/* -- float matrix products: one blocked driver, several right operands -- */

/* A block of a is packed for L2, a strip of b for L1: 32 columns. Machines without SIMD are often small ones. */
enum {
#ifdef TERNARY_NO_SIMD
    TERN__M_BLOCK = 40,  /* rows: whole tiles of every tier, which have 4, 6 and 14 */
    TERN__K_BLOCK = 128,
    TERN__DEEP = 1,
    TERN__STRIPS = 4,
    TERN__QUERIES = 40,  /* of an attention, and keys */
#else
    TERN__QUERIES = 56,
    TERN__M_BLOCK = 336,
    TERN__K_BLOCK = 256,
    TERN__DEEP = 2,      /* blocks of a that are packed together where they are all of it */
    TERN__STRIPS = 16,   /* that meet a packed block, at most */
#endif
    TERN__SPOILED = 16,  /* behind each tile's rows */
    TERN__DS = 256
};
typedef char tern__whole_tiles[TERN__M_BLOCK % (TERN__M_BLOCK > 84 ? 84 : TERN__ROWS_SCALAR) == 0 ? 1 : -1];
typedef struct tern__work {
    float a[TERN__DEEP][TERN__M_BLOCK * (TERN__K_BLOCK + TERN__SPOILED)], b[TERN__K_BLOCK * TERN__LANES],
          sum[TERN__STRIPS][TERN__M_BLOCK * TERN__LANES];
    float ds[TERN__QUERIES * TERN__DS]; /* of an attention's backward */
} tern__work;
typedef enum { TERN__B_FLOATS, TERN__B_WEIGHTS, TERN__B_QUANTIZED, TERN__B_BITS } tern__operand;

/* c [m, n] (+)= a [m, k] * b [k, n] (+ bias). Right operands:
     FLOATS     b with strides
     WEIGHTS    packed w as trit * scale
     QUANTIZED  int8 activations of w's layout times their token's scale
     BITS       the same of bits */
typedef struct tern__gemm {
    int64_t m, n, k;
    const float *a; int64_t a_row, a_col;
    tern__operand operand;
    const float *b; int64_t b_row, b_col;
    const tern_matrix *w;
    const int8_t *q; const float *scale;
    const float *bias;
    float *c; int64_t c_row;
    int64_t block; /* rows that are packed at once: how much threads get, never how sums run */
    int32_t add, fused;
    const tern__pairs *pairs; /* NULL: of floats */
} tern__gemm;

static void tern__fill_floats(const tern__kernels *k, const float *from, int64_t row, int64_t col, int64_t len, int64_t lanes, float *b)
{
    int64_t l, j;
    if (row == 1) k->columns(lanes, len, from, col, b, TERN__LANES);
    else
        for (j = 0; j < len; j++, from += row, b += TERN__LANES)
            if (col == 1 && lanes == TERN__LANES) memcpy(b, from, sizeof(float) * TERN__LANES);
            else for (l = 0; l < lanes; l++) b[l] = from[l * col];
}

/* Bits from the one with number `first` on, the same. */
static void tern__fill_bits(const int8_t *bits, int64_t stride, int64_t first, const float *scale, int64_t len, int64_t lanes, float *b)
{
    int64_t j, l;
    for (j = 0; j < len; j++, bits += stride, b += TERN__LANES)
        for (l = 0; l < lanes; l++) b[l] = tern__bit_of(bits, first + l) ? scale[j] : 0.0f;
}

/* Inputs [in_group, in_group + lanes) of a group, panel by panel; k0 is a multiple of 16. scale: of the rows (up to 16 that
   serve every panel), or NULL for their own. */
static void tern__fill_weights(const tern__kernels *k, const tern_matrix *m, const tern__shape *s, int64_t k0, int64_t len, int64_t group,
                               int64_t in_group, int64_t lanes, const float *scale, float *b)
{
    const int64_t first = in_group / s->unit * s->unit, end = in_group + lanes;
    int8_t t[TERN__ROWS][64];
    int64_t j;
    for (j = 0; j < len; j += TERN__ROWS) {
        const int64_t panel = (k0 + j) / TERN__ROWS;
        const uint8_t *unit = (const uint8_t *)m->trits + panel * s->panel_bytes + (group * s->group_units + first / s->unit) * TERN__UNIT;
        float buffer[TERN__ROWS];
        k->trits(m->encoding == TERN_BASE3, tern__ceil_div(end - first, s->unit), unit, t[0]);
        k->scaled(tern__min(TERN__ROWS, len - j), lanes, t[0] + (in_group - first), 64,
                  scale ? scale : tern__panel_scales(m, s, panel, group, buffer), b + j * TERN__LANES);
    }
}

/* Rows [k0, k0 + len) and columns [n0, n0 + lanes) of the right operand; the other lanes are zero. scale: of these rows, which
   QUANTIZED and BITS need; for WEIGHTS as in tern__fill_weights. */
static void tern__gemm_fill(const tern__kernels *k, const tern__gemm *g, const tern__shape *s, int64_t k0, int64_t len, int64_t n0,
                            int64_t lanes, const float *scale, float *b)
{
    int64_t l, run;
    if (lanes < TERN__LANES) memset(b, 0, sizeof(float) * (size_t)(len * TERN__LANES));
    if (g->operand == TERN__B_FLOATS) tern__fill_floats(k, g->b + k0 * g->b_row + n0 * g->b_col, g->b_row, g->b_col, len, lanes, b);
    else
        for (l = 0; l < lanes; l += run) {
            const int64_t group = (n0 + l) / s->group, in_group = n0 + l - group * s->group;
            run = tern__min(lanes - l, s->group - in_group);
            if (g->operand == TERN__B_WEIGHTS) tern__fill_weights(k, g->w, s, k0, len, group, in_group, run, scale, b + l);
            else if (g->operand == TERN__B_BITS)
                tern__fill_bits(g->q + k0 * s->stride + group * tern__bit_words(s->group_units, s->unit) * 4, s->stride, in_group, scale,
                                len, run, b + l);
            else k->scaled(len, run, g->q + k0 * s->stride + group * s->group_units * s->unit + in_group, s->stride, scale, b + l);
        }
}

/* Products of pairs take the scales of a right operand on the other side, where they are rounded with their term: what remains
   is exact in bf16. So [len] scales of terms from k0 on; not of weights in groups, which have several. */
static int32_t tern__scales_apart(const tern__gemm *g, const tern__shape *s)
{
    return g->operand != TERN__B_FLOATS && (g->operand != TERN__B_WEIGHTS || s->groups == 1);
}
static void tern__gemm_scales(const tern__gemm *g, const tern__shape *s, int64_t k0, int64_t len, float *scale)
{
    const int32_t apart = tern__scales_apart(g, s);
    float buffer[TERN__ROWS];
    int64_t j, i;
    for (j = 0; j < len; j += TERN__ROWS) {
        const float *own = !apart ? NULL : g->operand == TERN__B_WEIGHTS ? tern__panel_scales(g->w, s, (k0 + j) / TERN__ROWS, 0, buffer)
                         : g->scale + k0 + j;
        for (i = j; i < tern__min(j + TERN__ROWS, len); i++) scale[i] = own ? own[i - j] : 1.0f;
    }
}

/* As tern__gemm_fill, into pairs: 32 terms at a time, whose floats stay in L1. */
static void tern__gemm_fill_pairs(const tern__kernels *k, const tern__gemm *g, const tern__shape *s, int64_t k0, int64_t len, int64_t n0,
                                  int64_t lanes, float *to)
{
    float b[TERN__LANES * TERN__LANES], one[TERN__LANES];
    int64_t j;
    for (j = 0; j < TERN__LANES; j++) one[j] = 1.0f;
    for (j = 0; j < len; j += TERN__LANES) {
        const int64_t some = tern__min(TERN__LANES, len - j);
        tern__gemm_fill(k, g, s, k0 + j, some, n0, lanes, tern__scales_apart(g, s) ? one : NULL, b);
        g->pairs->pack_b(some, b, to + j * (TERN__LANES / 2));
    }
}

/* A finished row of a block: c = sum, or c + sum. Constant trip counts, so that compilers vectorise at -O2. */
static void tern__gemm_store(const float *sum, int32_t add, int64_t lanes, float *c)
{
    const size_t bytes = sizeof(float) * (size_t)lanes;
    float v[TERN__LANES], old[TERN__LANES] = {0};
    int32_t l;
    memcpy(v, sum, sizeof v);
    if (add) {
        memcpy(old, c, bytes);
        for (l = 0; l < TERN__LANES; l++) v[l] = old[l] + v[l];
    }
    memcpy(c, v, bytes);
}

static int64_t tern__tile_at(const tern__kernels *k, int64_t row, int64_t len) { return row * len + row / k->rows * TERN__SPOILED; }

/* Terms [at, at + len) of rows [m0, m0 + rows), packed by tiles. */
static void tern__gemm_pack(const tern__kernels *k, const tern__gemm *g, const tern__shape *s, int64_t m0, int64_t rows, int64_t at,
                            int64_t len, float *to)
{
    const int64_t step = g->a_col == 1 ? len : 32; /* terms: lines of a column-major block are not left half read */
    const int64_t tall = g->pairs ? (int64_t)TERN__ROWS : k->rows;
    float scale[2 * TERN__K_BLOCK];
    int64_t i, j;
    if (g->pairs) tern__gemm_scales(g, s, at, len, scale);
    for (j = 0; j < len; j += step)
        for (i = 0; i < rows; i += tall) {
            const float *a = g->a + (m0 + i) * g->a_row + (at + j) * g->a_col;
            const int64_t some = tern__min(tall, rows - i), terms = tern__min(step, len - j);
            if (g->pairs) g->pairs->pack_a(some, terms, a, g->a_row, g->a_col, scale + j, to + i * (tern__ceil_div(len, 32) * 16) + j * 8);
            else k->pack_a(some, terms, a, g->a_row, g->a_col, to + tern__tile_at(k, i, len) + j * k->rows);
        }
}

/* The same terms of the strip of b. Finished segments go from `part` to c, or by way of `whole` where c has less
   than 32 columns left or waits for the sum of all segments. */
static void tern__gemm_strip(const tern__kernels *k, const tern__gemm *g, int64_t m0, int64_t rows, int64_t n0, int64_t at, int64_t len,
                             const float *a, const float *b, float *part, float *whole)
{
    const int64_t end = at + len, lanes = tern__min(TERN__LANES, g->n - n0);
    const int32_t finish = end == g->k || end % TERN__SEGMENT == 0;
    const int64_t tall = g->pairs ? rows : k->rows;
    int64_t i, r, l;
    tern__tile t;
    t.k = len;
    t.b = b;
    t.first = at % TERN__SEGMENT == 0;
    t.add = at >= TERN__SEGMENT || (!whole && g->add);
    t.c_row = whole ? (int64_t)TERN__LANES : g->c_row;
    for (i = 0; i < rows; i += tall) {
        float *c = g->c + (m0 + i) * g->c_row + n0;
        t.a = a + tern__tile_at(k, i, len);
        t.p = part + i * TERN__LANES;
        t.c = !finish ? NULL : whole ? whole + i * TERN__LANES : c;
        t.rows = (int32_t)tern__min(tall, rows - i);
        (g->pairs ? g->pairs->tiles : g->fused ? k->tile_fused : k->tile)(&t);
        if (end < g->k) continue;
        for (r = 0; r < t.rows; r++, c += g->c_row) {
            if (whole) tern__gemm_store(whole + (i + r) * TERN__LANES, g->add, lanes, c);
            for (l = 0; g->bias && l < lanes; l++) c[l] = c[l] + g->bias[n0 + l];
        }
    }
}

/* The terms of the block that begins at `at`: blocks of a segment are of like size, in panels of w. */
static int64_t tern__gemm_len(const tern__gemm *g, int64_t at)
{
    const int64_t wide = g->pairs ? 2 : 1; /* terms in a word */
    const int64_t left = tern__min(TERN__SEGMENT - at % TERN__SEGMENT, g->k - at);
    return tern__min(left, tern__ceil_div(tern__ceil_div(left, tern__ceil_div(left, wide * TERN__K_BLOCK)), wide * TERN__ROWS)
                           * (wide * TERN__ROWS));
}

/* A strip's sums need no memory of their own where all of its terms are packed. */
static int32_t tern__gemm_at_once(const tern__gemm *g) { return g->k <= TERN__DEEP * (g->pairs ? 2 : 1) * TERN__K_BLOCK; }

/* Some rows by some strips of 32 columns. Sums run in order within segments of 2048 terms; segment sums are added in
   order. */
static void tern__gemm_block(const tern__kernels *k, const tern__gemm *g, int64_t m0, int64_t rows, int64_t s0, int64_t strips,
                             tern__work *w)
{
    const int32_t deep = g->add && g->k > TERN__SEGMENT, at_once = tern__gemm_at_once(g), most = at_once ? TERN__DEEP : 1;
    int64_t begin, end, at, len, i;
    tern__shape s;
    int32_t d;
    if (g->operand != TERN__B_FLOATS) s = tern__shape_of(g->w);
    for (begin = 0; begin < g->k; begin = end) {
        for (end = begin, d = 0; d < most && end < g->k; end += len, d++) {
            len = tern__gemm_len(g, end);
            tern__gemm_pack(k, g, &s, m0, rows, end, len, w->a[d]);
        }
        for (i = 0; i < strips; i++) {
            const int64_t n0 = (s0 + i) * TERN__LANES, lanes = tern__min(TERN__LANES, g->n - n0);
            for (at = begin, d = 0; at < end; at += len, d++) {
                len = tern__gemm_len(g, at);
                if (g->pairs) tern__gemm_fill_pairs(k, g, &s, at, len, n0, lanes, w->b);
                else tern__gemm_fill(k, g, &s, at, len, n0, lanes, g->scale ? g->scale + at : NULL, w->b);
                tern__gemm_strip(k, g, m0, rows, n0, at, len, w->a[d], w->b, w->sum[at_once ? 0 : i],
                                 deep ? w->sum[TERN__STRIPS / 2 + i] : lanes < TERN__LANES ? w->sum[TERN__STRIPS - 1] : NULL);
            }
        }
    }
}

/* Blocks of rows one after the other, in strips: a run of strips meets what is packed once. */
static void tern__gemm_range(const tern__kernels *k, const tern__gemm *g, int64_t begin, int64_t end, tern__work *w)
{
    const int64_t strips = tern__ceil_div(g->n, TERN__LANES);
    const int64_t most = tern__gemm_at_once(g) ? strips : g->add && g->k > TERN__SEGMENT ? TERN__STRIPS / 2 : TERN__STRIPS - 1;
    int64_t i, run;
    for (i = begin; i < end; i += run) {
        const int64_t m0 = i / strips * g->block, left = tern__min(strips - i % strips, end - i);
        run = tern__ceil_div(left, tern__ceil_div(left, most));
        tern__gemm_block(k, g, m0, tern__min(g->block, g->m - m0), i % strips, run, w);
    }
}

/* The memory of the first task, and of that which `bad` tells. */
static tern__work *tern__first_work(void *state) { return (tern__work *)(((uintptr_t)state + 63) / 64 * 64); }
static tern__work *tern__work_of(const tern__job *job, const int64_t *bad) { return tern__first_work(job->state) + (bad - job->bad); }

static void tern__gemm_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__gemm_range(job->k, (const tern__gemm *)job->arg, begin, end, tern__work_of(job, bad));
}

/* Blocks of like size, low ones where there would be too few for the workers. */
static int64_t tern__gemm_items(tern__gemm *g, const tern__kernels *k, int64_t workers)
{
    const int64_t strips = tern__ceil_div(g->n, TERN__LANES), tall = g->pairs ? 2 * (int64_t)TERN__ROWS : k->rows;
    int64_t blocks = tern__ceil_div(g->m, TERN__M_BLOCK / tall * tall);
    while (workers > 1 && blocks * strips < 2 * workers && blocks * 96 < g->m) blocks++;
    g->block = tern__ceil_div(tern__ceil_div(g->m, blocks), tall) * tall;
    return tern__mul(tern__ceil_div(g->m, g->block), strips);
}

#ifdef TERNARY_USE_CBLAS
#ifdef __cplusplus
extern "C"
#endif
void cblas_sgemm(int order, int turn_a, int turn_b, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc);
enum { TERN__BLAS_ROWS = 101, TERN__BLAS_PLAIN = 111, TERN__BLAS_TURNED = 112 };

/* How BLAS reads [rows, cols] with these strides, and its leading dimension; 0 where it cannot. */
static int tern__blas_side(int64_t rows, int64_t cols, int64_t row, int64_t col, int *lead)
{
    const int32_t plain = col == 1 && row >= cols;
    if ((plain ? row : col) > INT32_MAX || !(plain || (row == 1 && col >= rows))) return 0;
    *lead = (int)(plain ? row : col);
    return plain ? TERN__BLAS_PLAIN : TERN__BLAS_TURNED;
}

/* The product by BLAS, what is no float block by block; false where it is not for BLAS. */
static int32_t tern__gemm_blas(const tern__kernels *k, const tern__gemm *g, tern__work *w)
{
    const int64_t most = (int64_t)(sizeof w->sum / sizeof(float)) / TERN__K_BLOCK / TERN__LANES * TERN__LANES; /* columns of a block */
    int turn_a, turn_b, lda = 0, ldb = 0;
    int64_t at, len, n0, cols, l, j;
    float *const block = w->sum[0];
    tern__shape s;
    turn_a = tern__blas_side(g->m, g->k, g->a_row, g->a_col, &lda);
    turn_b = g->operand == TERN__B_FLOATS ? tern__blas_side(g->k, g->n, g->b_row, g->b_col, &ldb) : TERN__BLAS_PLAIN;
    if (!turn_a || !turn_b || tern__max(tern__max(g->m, g->n), tern__max(g->k, g->c_row)) > INT32_MAX) return 0;
    if (g->operand == TERN__B_FLOATS)
        cblas_sgemm(TERN__BLAS_ROWS, turn_a, turn_b, (int)g->m, (int)g->n, (int)g->k, 1.0f, g->a, lda, g->b, ldb, g->add ? 1.0f : 0.0f,
                    g->c, (int)g->c_row);
    else s = tern__shape_of(g->w);
    for (n0 = 0; g->operand != TERN__B_FLOATS && n0 < g->n; n0 += cols)
        for (cols = tern__min(most, g->n - n0), at = 0; at < g->k; at += len) {
            len = tern__min(TERN__K_BLOCK, g->k - at);
            for (l = 0; l < cols; l += TERN__LANES) {
                tern__gemm_fill(k, g, &s, at, len, n0 + l, tern__min(TERN__LANES, cols - l), g->scale ? g->scale + at : NULL, w->b);
                for (j = 0; j < len; j++) memcpy(block + j * most + l, w->b + j * TERN__LANES, sizeof(float) * TERN__LANES);
            }
            cblas_sgemm(TERN__BLAS_ROWS, turn_a, TERN__BLAS_PLAIN, (int)g->m, (int)cols, (int)len, 1.0f, g->a + at * g->a_col, lda, block,
                        (int)most, g->add || at ? 1.0f : 0.0f, g->c + n0, (int)g->c_row);
        }
    for (j = 0; g->bias && j < g->m; j++)
        for (l = 0; l < g->n; l++) g->c[j * g->c_row + l] = g->c[j * g->c_row + l] + g->bias[l];
    return 1;
}
#endif

static void tern__gemm_run(tern_run *run, tern__gemm *g)
{
#ifdef TERNARY_USE_CBLAS
    if (g->fused && !g->pairs) {
        const tern__fp_mode mode = tern__fp_enter();
        const int32_t done = tern__gemm_blas((const tern__kernels *)run->backend->data, g, tern__first_work(run->state));
        tern__fp_leave(mode);
        if (done) return;
    }
#endif
    const int64_t items = tern__gemm_items(g, (const tern__kernels *)run->backend->data, run->parallel.workers);
    tern__for(run, tern__gemm_body, g, items, tern__mul(tern__min(g->m, g->block) * 8, g->k));
}

/* The same on the calling thread, for bodies that are themselves parallel. */
static void tern__gemm_here(const tern__kernels *k, tern__gemm *g, tern__work *w)
{
    const int64_t items = tern__gemm_items(g, k, 1);
    tern__gemm_range(k, g, 0, items, w);
}

static tern__gemm tern__gemm_of(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col, float *c, int64_t c_row)
{
    tern__gemm g;
    memset(&g, 0, sizeof g);
    g.m = m; g.n = n; g.k = k;
    g.a = a; g.a_row = a_row; g.a_col = a_col;
    g.c = c; g.c_row = c_row;
    return g;
}

/* A map's forward as a part of other operations; b: or NULL. */
static void tern__map_here(const tern__kernels *k, tern_map_fn fn, int64_t n, const float *a, float alpha, const float *b, float *y)
{
    tern_map_args m;
    memset(&m, 0, sizeof m);
    m.fn = fn;
    m.alpha = alpha;
    m.a = a;
    m.b = b;
    m.y = y;
    k->map(&m, 0, n);
}

/* Pairs where the caller permits them and the tier has them. */
static const tern__pairs *tern__pairs_of(const tern_run *run, tern_type factors)
{
    return factors == TERN_BF16 ? ((const tern__kernels *)run->backend->data)->pairs : NULL;
}

/* A float activation row with NaN or Inf counts as zero: its outputs become the bias. */
static void tern__matmul_rows_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_matmul_args *a = (const tern_matmul_args *)job->arg;
    int64_t t;
    for (t = begin; t < end; t++) {
        float *y = a->y + t * a->m.rows;
        if (tern__finite(tern__float(job->k->absmax(a->m.cols, a->x + t * a->m.cols, NULL)))) continue;
        *bad = tern__min(*bad, t);
        if (a->bias) memcpy(y, a->bias, sizeof(float) * (size_t)a->m.rows);
        else memset(y, 0, sizeof(float) * (size_t)a->m.rows);
    }
}

static tern_result tern__cpu_matmul(tern_run *run, const tern_matmul_args *a)
{
    int64_t bad = INT64_MAX;
    tern__matmul_work w;
    w.a = a;
    w.s = tern__shape_of(&a->m);
    w.by_token = w.s.panels < run->parallel.workers && a->n > w.s.panels;
    tern__for(run, tern__matmul_body, &w, w.by_token ? a->n : w.s.panels, tern__mul(w.by_token ? w.s.panels : a->n, a->m.cols));
    if (!a->q) bad = tern__for(run, tern__matmul_rows_body, a, a->n, a->m.cols);
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_MATMUL, bad);
    return TERN_OK;
}

/* The second half of a layer. */
static tern_matmul_args tern__linear_product(const tern_linear_args *a)
{
    tern_matmul_args m;
    memset(&m, 0, sizeof m);
    m.m = a->quantize.m;
    m.act = a->quantize.act;
    m.n = a->quantize.n;
    m.q = a->quantize.q; m.scale = a->quantize.scale; m.sum = a->quantize.sum;
    m.bias = a->bias;
    m.y = a->y;
    return m;
}

/* One pass: each block of tokens is quantized and then meets all panels, while it is in cache. */
static void tern__linear_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__matmul_work *w = (const tern__matmul_work *)job->arg;
    int64_t t;
    for (t = begin; t < end; t += job->k->tokens) {
        const int64_t stop = tern__min(end, t + job->k->tokens);
        tern__quantize_tokens(job->k, w->quantize, t, stop, bad);
        tern__matmul_range(job->k, w->a, &w->s, 0, w->s.panels, t, stop);
    }
}

/* With few tokens for each worker the panels are what can be shared, and decoded once. */
static tern_result tern__cpu_linear(tern_run *run, const tern_linear_args *a)
{
    const tern_matmul_args m = tern__linear_product(a);
    tern__matmul_work w;
    int64_t bad;
    if (run->parallel.run && m.n < (int64_t)((const tern__kernels *)run->backend->data)->tokens / 2 * run->parallel.workers) {
        TERN__TRY(tern__cpu_quantize(run, &a->quantize));
        return tern__cpu_matmul(run, &m);
    }
    w.a = &m;
    w.quantize = &a->quantize;
    w.s = tern__shape_of(&m.m);
    bad = tern__for(run, tern__linear_body, &w, m.n, tern__mul(w.s.panels, m.m.cols));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_QUANTIZE, bad);
    return TERN_OK;
}

#ifndef TERNARY_NO_MOE
/* -- products in groups -- */

enum { TERN__GROUP_COST = 2 }; /* to read a panel costs as much as so many tokens with it */

/* Panels [p0, p1) of a matrix with a group's rows. */
typedef struct tern__grouped_item { tern_matmul_args a; int64_t p0, p1; } tern__grouped_item;

/* Units [begin, end) of the work, of which a group has sets * panels * (its rows + TERN__GROUP_COST). */
typedef struct tern__grouped_turn {
    const tern_grouped_args *a;
    tern__shape s;
    int64_t begin, end, unit; /* unit: the first of this group */
    int64_t at, n, behind;    /* rows of this group that are here; the first row of the next among those of all */
    int32_t group, set;
} tern__grouped_turn;

static tern__grouped_turn tern__grouped_start(const tern_grouped_args *a, int64_t begin, int64_t end)
{
    tern__grouped_turn t;
    memset(&t, 0, sizeof t);
    t.a = a;
    t.s = tern__shape_of(&a->m);
    t.begin = begin;
    t.end = end;
    t.group = -1;
    t.set = a->sets;
    return t;
}

static int64_t tern__grouped_height(const tern__grouped_turn *t) { return t->n + TERN__GROUP_COST; }

/* The next group that has rows here. */
static int32_t tern__grouped_group(tern__grouped_turn *t)
{
    const tern_grouped_args *a = t->a;
    if (t->n > 0) t->unit += a->sets * t->s.panels * tern__grouped_height(t);
    do {
        const int64_t first = t->behind;
        if (++t->group >= a->count) return 0;
        t->behind += a->loads[t->group];
        t->at = tern__max(first - a->at, 0);
        t->n = tern__min(t->behind - a->at, a->n) - t->at;
    } while (t->n <= 0);
    t->set = 0;
    return 1;
}

/* The next matrix that has panels here. */
static int32_t tern__grouped_next(tern__grouped_turn *t, tern__grouped_item *out)
{
    const tern_grouped_args *a = t->a;
    const struct tern_param *p;
    int64_t height;
    for (;; t->set++) {
        if (t->set >= a->sets && !tern__grouped_group(t)) return 0;
        height = tern__grouped_height(t);
        out->p0 = tern__max(tern__ceil_div(tern__max(t->begin - t->unit, 0), height) - t->set * t->s.panels, 0);
        out->p1 = tern__min(tern__ceil_div(tern__max(t->end - t->unit, 0), height) - t->set * t->s.panels, t->s.panels);
        if (out->p0 < out->p1) break;
    }
    p = a->w[(int64_t)t->group * a->step + t->set];
    memset(&out->a, 0, sizeof out->a);
    out->a.m = a->m;
    out->a.m.trits = p->buffer[TERN_TRITS].data;
    out->a.m.scales = p->buffer[TERN_SCALES].data;
    out->a.act = a->act;
    out->a.n = t->n;
    out->a.q = a->q + t->at * t->s.stride; out->a.scale = a->scale + t->at; out->a.sum = a->sum + t->at * t->s.groups;
    out->a.bias = p->dead ? (const float *)p->dead->buffer[TERN_SHADOW].data : NULL;
    out->a.y = a->y + (t->set * a->n + t->at) * a->m.rows;
    t->set++;
    return 1;
}

static void tern__grouped_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__grouped_turn t = tern__grouped_start((const tern_grouped_args *)job->arg, begin, end);
    tern__grouped_item item;
    (void)bad;
    while (tern__grouped_next(&t, &item)) tern__matmul_range(job->k, &item.a, &t.s, item.p0, item.p1, 0, item.a.n);
}

/* Zeros behind the last group's rows, of which there are so many. */
static void tern__grouped_end(const tern_grouped_args *a, int64_t rows, int64_t width, float *y)
{
    int64_t set;
    for (set = 0; set < a->sets; set++) memset(y + (set * a->n + rows) * width, 0, sizeof(float) * (size_t)((a->n - rows) * width));
}

static tern_result tern__cpu_grouped_products(tern_run *run, const tern_grouped_args *a)
{
    tern__grouped_turn t = tern__grouped_start(a, 0, 0);
    int64_t rows = 0;
    while (tern__grouped_group(&t)) rows = t.at + t.n;
    if (t.unit > 0) tern__for(run, tern__grouped_body, a, t.unit, a->m.cols);
    tern__grouped_end(a, rows, a->m.rows, a->y);
    return TERN_OK;
}
#endif

static tern_result tern__cpu_dense(tern_run *run, const tern_dense_args *a)
{
    tern__gemm g = tern__gemm_of(a->m, a->n, a->k, a->a, a->a_row, a->a_col, a->c, a->c_row);
    g.b = a->b; g.b_row = a->b_row; g.b_col = a->b_col;
    g.bias = a->bias;
    g.add = a->add;
    g.fused = a->fused;
    g.pairs = tern__pairs_of(run, a->factors);
    tern__gemm_run(run, &g);
    return TERN_OK;
}

/* -- int8 matrix products: c = a * b by the dots, with rows of a as tokens and columns of b as rows of panels.
   Blocks of 256 x 256 of a and 256 x 64 of b are packed side by side, for L2 and L1; sums go straight into c -- */

enum {
    TERN__I8_MOST_K = 131071,
    TERN__I8_M = 256, TERN__I8_N = 4 * TERN__ROWS,
    TERN__I8_STRETCH = 16, /* so that a block of c, 256 x 1024, stays in L2 */
    TERN__I8_EDGE = 32     /* rows at a time where columns are missing */
};

/* The small loops of packing: constant trip counts and no overlap, so that compilers vectorise at -O2. */
static void tern__i8_interleave(const uint8_t *__restrict v, int64_t step, uint8_t flip, uint8_t *__restrict quad)
{
    const uint8_t *v1 = v + step, *v2 = v1 + step, *v3 = v2 + step;
    int32_t r;
    for (r = 0; r < TERN__ROWS; r++) {
        quad[4 * r] = (uint8_t)(v[r] ^ flip);
        quad[4 * r + 1] = (uint8_t)(v1[r] ^ flip);
        quad[4 * r + 2] = (uint8_t)(v2[r] ^ flip);
        quad[4 * r + 3] = (uint8_t)(v3[r] ^ flip);
    }
}
static void tern__i8_flip64(const uint8_t *__restrict v, uint8_t flip, uint8_t *__restrict to)
{
    int32_t i;
    for (i = 0; i < 64; i++) to[i] = (uint8_t)(v[i] ^ flip);
}

/* Up to 64 inputs of up to 16 columns as 16 quads; what is missing is zero. Steps from input to input and from
   column to column. */
static void tern__i8_quads(const int8_t *from, int64_t k_step, int64_t n_step, int64_t inputs, int64_t cols, uint8_t flip, uint8_t *to)
{
    const uint8_t *bytes = (const uint8_t *)from;
    uint8_t v[64 * TERN__ROWS];
    int64_t i, r;
    if (k_step != 1 && n_step == 1 && inputs == 64 && cols == TERN__ROWS) {
        for (i = 0; i < 16; i++, bytes += 4 * k_step, to += 64) tern__i8_interleave(bytes, k_step, flip, to);
        return;
    }
    if (inputs < 64 || cols < TERN__ROWS) memset(v, flip, sizeof v);
    if (k_step == 1) {
        for (r = 0; r < cols; r++)
            if (inputs == 64) tern__i8_flip64(bytes + r * n_step, flip, v + r * 64);
            else for (i = 0; i < inputs; i++) v[r * 64 + i] = bytes[r * n_step + i] ^ flip;
        for (r = 0; r < TERN__ROWS; r += 4) tern__four_columns(v + r * 64, 64, to + r * 4, 64);
    } else {
        for (i = 0; i < inputs; i++, bytes += k_step)
            for (r = 0; r < cols; r++) v[i * TERN__ROWS + r] = bytes[r * n_step] ^ flip;
        for (i = 0; i < 16; i++) tern__i8_interleave(v + 64 * i, TERN__ROWS, 0, to + 64 * i);
    }
}

static int32_t tern__i8_sum64(const int8_t *x)
{
    int32_t sum = 0, i;
    for (i = 0; i < 64; i++) sum += x[i];
    return sum;
}

/* Inputs [k0, k0 + len) of rows [m0, m0 + rows), 256 apart, and 128 times their sums, since the codes of b are
   byte + 128. */
static void tern__i8_pack_a(const tern_dense_i8_args *a, int64_t m0, int64_t rows, int64_t k0, int64_t len, int8_t *to, int32_t *sum)
{
    const int8_t *from = a->a + m0 * a->a_row + k0 * a->a_col;
    uint8_t quads[64 * TERN__ROWS];
    int64_t i, at, r, q;
    for (i = 0; i < rows; i += TERN__ROWS) {
        const int64_t n = tern__min(TERN__ROWS, rows - i);
        for (at = 0; at < len; at += 64) {
            const int64_t inputs = tern__min(64, len - at);
            if (a->a_col == 1 && inputs == 64) {
                for (r = 0; r < n; r++) memcpy(to + (i + r) * TERN__I8_K + at, from + (i + r) * a->a_row + at, 64);
                continue;
            }
            tern__i8_quads(from + i * a->a_row + at * a->a_col, a->a_col, a->a_row, inputs, n, 0, quads);
            for (r = 0; r < n; r++)
                for (q = 0; q < 16; q++) memcpy(to + (i + r) * TERN__I8_K + at + 4 * q, quads + 64 * q + 4 * r, 4);
        }
    }
    for (i = 0; i < rows; i++)
        for (sum[i] = 0, at = 0; at < len; at += 64) sum[i] += 128 * tern__i8_sum64(to + i * TERN__I8_K + at);
}

/* The same inputs of up to 64 columns, as panels of codes. */
static void tern__i8_pack_b(const tern_dense_i8_args *a, int64_t n0, int64_t k0, int64_t len, uint8_t *to)
{
    const int8_t *from = a->b + n0 * a->b_col + k0 * a->b_row;
    int64_t n, at;
    for (at = 0; at < len; at += 64) /* a line of b holds bytes of four panels */
        for (n = 0; n < tern__min(TERN__I8_N, a->n - n0); n += TERN__ROWS)
            tern__i8_quads(from + n * a->b_col + at * a->b_row, a->b_row, a->b_col, tern__min(64, len - at),
                           tern__min(TERN__ROWS, a->n - n0 - n), 0x80, to + n * TERN__I8_K + at * TERN__ROWS);
}

/* Panels that reach beyond the last column go by way of a buffer. */
static void tern__i8_edge(const tern__kernels *k, const tern__dot *all, int64_t c_row, int32_t add, int64_t cols)
{
    int32_t acc[TERN__I8_EDGE * TERN__I8_N] TERN__ALIGN64;
    tern__dot d = *all;
    int64_t t, i, j;
    d.acc = acc;
    for (t = 0; t < all->tokens; t += d.tokens) {
        d.tokens = (int32_t)tern__min(TERN__I8_EDGE, all->tokens - t);
        d.q = all->q + t * d.q_stride;
        d.sum = all->sum + t * d.sum_stride;
        k->dot_i8(&d, TERN__I8_N, 0);
        for (i = 0; i < d.tokens; i++) {
            int32_t *c = all->acc + (t + i) * c_row;
            for (j = 0; j < cols; j++) c[j] = (int32_t)((add ? (uint32_t)c[j] : 0) + (uint32_t)acc[i * TERN__I8_N + j]);
        }
    }
}

/* Strips [s0, s1) of 64 columns of up to 256 rows. */
static void tern__i8_block(const tern__kernels *k, const tern_dense_i8_args *a, int64_t m0, int64_t s0, int64_t s1)
{
    int8_t x[TERN__I8_M * TERN__I8_K] TERN__ALIGN64;
    uint8_t code[TERN__I8_N * TERN__I8_K] TERN__ALIGN64;
    int32_t sum[TERN__I8_M];
    int64_t k0, s;
    tern__dot d;
    memset(&d, 0, sizeof d);
    d.panel = code;
    d.panel_stride = TERN__I8_K * TERN__ROWS;
    d.q = x;
    d.q_stride = TERN__I8_K;
    d.sum = sum;
    d.sum_stride = 1;
    d.tokens = (int32_t)tern__min(TERN__I8_M, a->m - m0);
    for (k0 = 0; k0 < a->k; k0 += TERN__I8_K) {
        const int64_t len = tern__min(TERN__I8_K, a->k - k0);
        tern__i8_pack_a(a, m0, d.tokens, k0, len, x, sum);
        d.units = tern__ceil_div(len, 4);
        for (s = s0; s < s1; s++) {
            const int64_t cols = tern__min(TERN__I8_N, a->n - s * TERN__I8_N);
            tern__i8_pack_b(a, s * TERN__I8_N, k0, len, code);
            d.panels = (int32_t)tern__ceil_div(cols, TERN__ROWS);
            d.acc = a->c + m0 * a->c_row + s * TERN__I8_N;
            if (cols % TERN__ROWS == 0) k->dot_i8(&d, a->c_row, a->add || k0 > 0);
            else tern__i8_edge(k, &d, a->c_row, a->add || k0 > 0, cols);
        }
    }
}

/* Items are strips, those of one block of rows after those of the other: what a block shares is packed once. */
static void tern__i8_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_dense_i8_args *a = (const tern_dense_i8_args *)job->arg;
    const int64_t strips = tern__ceil_div(a->n, TERN__I8_N);
    int64_t i, run;
    (void)bad;
    for (i = begin; i < end; i += run) {
        const int64_t s = i % strips;
        run = tern__min(tern__min(strips - s, end - i), TERN__I8_STRETCH);
        tern__i8_block(job->k, a, i / strips * TERN__I8_M, s, s + run);
    }
}

static tern_result tern__cpu_dense_i8(tern_run *run, const tern_dense_i8_args *a)
{
    const int64_t items = tern__mul(tern__ceil_div(a->m, TERN__I8_M), tern__ceil_div(a->n, TERN__I8_N));
    tern__for(run, tern__i8_body, a, items, tern__mul(tern__min(a->m, TERN__I8_M) * 4, a->k));
    return TERN_OK;
}

#ifndef TERNARY_NO_TRAINING
static tern_result tern__cpu_matmul_dx(tern_run *run, const tern_matmul_dx_args *a)
{
    tern__gemm g = tern__gemm_of(a->n, a->m.cols, a->m.rows, a->dy, a->m.rows, 1, a->dx, a->m.cols);
    g.operand = TERN__B_WEIGHTS;
    g.w = &a->m;
    g.fused = 1;
    g.pairs = tern__pairs_of(run, a->factors);
    tern__gemm_run(run, &g);
    return TERN_OK;
}

static void tern__bias_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_matmul_dw_args *a = (const tern_matmul_dw_args *)job->arg;
    float *dbias = a->dbias + begin;
    int64_t t;
    (void)bad;
    for (t = 0; t < a->n; t++) tern__map_here(job->k, TERN_MAP_ADD, end - begin, dbias, 1.0f, a->dy + t * a->m.rows + begin, dbias);
}

static tern_result tern__cpu_matmul_dw(tern_run *run, const tern_matmul_dw_args *a)
{
    if (a->dw) {
        tern__gemm g = tern__gemm_of(a->m.rows, a->m.cols, a->n, a->dy, 1, a->m.rows, a->dw, a->m.cols);
        g.operand = !a->q ? TERN__B_FLOATS : a->act == TERN_ACT_BIT ? TERN__B_BITS : TERN__B_QUANTIZED;
        g.w = &a->m;
        g.q = a->q; g.scale = a->scale;
        g.b = a->x; g.b_row = a->m.cols; g.b_col = 1;
        g.add = 1;
        g.fused = 1;
        g.pairs = tern__pairs_of(run, a->factors);
        tern__gemm_run(run, &g);
    }
    if (a->dbias) tern__for(run, tern__bias_body, a, a->m.rows, tern__mul(a->n, 5));
    return TERN_OK;
}
#endif

#ifndef TERNARY_NO_MOE
#ifndef TERNARY_NO_TRAINING
/* The backward of a matrix with its group's rows. */
static tern_result tern__grouped_one_back(tern_run *run, const tern__grouped_turn *t, int32_t set)
{
    const tern_grouped_args *a = t->a;
    const struct tern_param *p = a->w[(int64_t)t->group * a->step + set];
    tern_matmul_dx_args dx;
    tern_matmul_dw_args dw;
    memset(&dw, 0, sizeof dw);
    dx.m = a->m;
    dx.m.trits = p->buffer[TERN_TRITS].data;
    dx.m.scales = p->buffer[TERN_SCALES].data;
    dx.n = dw.n = t->n;
    dx.dy = dw.dy = a->dy + (set * a->n + t->at) * a->m.rows;
    dx.dx = a->dx + (set * a->n + t->at) * a->m.cols;
    dx.factors = dw.factors = a->factors;
    dw.m = a->m;
    dw.act = a->act;
    dw.q = a->q + t->at * t->s.stride; dw.scale = a->scale + t->at;
    dw.dw = (float *)p->buffer[TERN_GRAD].data;
    dw.dbias = p->dead ? (float *)p->dead->buffer[TERN_GRAD].data : NULL;
    TERN__TRY(tern__cpu_matmul_dw(run, &dw));
    return tern__cpu_matmul_dx(run, &dx);
}

/* One after the other, each on all threads. */
static tern_result tern__cpu_grouped_back(tern_run *run, const tern_grouped_args *a)
{
    tern__grouped_turn t = tern__grouped_start(a, 0, 0);
    int64_t rows = 0;
    int32_t set;
    while (tern__grouped_group(&t)) {
        for (set = 0; set < a->sets; set++) TERN__TRY(tern__grouped_one_back(run, &t, set));
        rows = t.at + t.n;
    }
    tern__grouped_end(a, rows, a->m.cols, a->dx);
    return TERN_OK;
}
#endif

static tern_result tern__cpu_grouped(tern_run *run, const tern_grouped_args *a)
{
#ifndef TERNARY_NO_TRAINING
    if (a->dy) return tern__cpu_grouped_back(run, a);
#endif
    return tern__cpu_grouped_products(run, a);
}
#else
#define tern__cpu_grouped NULL
#endif

/* x / by, 16 at a time: a constant trip count, of which compilers make vectors (gcc at -O2 from version 12 on). */
static void tern__divide(int64_t n, float by, float *x)
{
    int64_t i, j;
    for (i = 0; i + 16 <= n; i += 16)
        for (j = 0; j < 16; j++) x[i + j] = x[i + j] / by;
    for (; i < n; i++) x[i] = x[i] / by;
}

/* Row i of p: softmax of the visible scores, zeros behind them. */
static void tern__softmax_row(const tern__kernels *k, float *p, int64_t visible, int64_t keys, float scale)
{
    float sum;
    int64_t j;
    k->exps(visible, p, scale, k->largest(visible, p) * scale, p);
    sum = tern__sum_of(k, TERN_SUM, visible, p);
    tern__divide(visible, sum, p);
    for (j = visible; j < keys; j++) p[j] = 0.0f;
}

/* -- rows by id -- */

static void tern__gather_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_gather_args *a = (const tern_gather_args *)job->arg;
    const tern__shape s = tern__shape_of(&a->m);
    int64_t i;
    for (i = begin; i < end; i++) {
        float *y = a->y + i * a->m.cols;
        const float *from = y;
        if (a->ids[i] < 0 || a->ids[i] >= a->m.rows) {
            if (!a->holes || a->ids[i] != -1) *bad = tern__min(*bad, i);
            memset(y, 0, sizeof(float) * (size_t)a->m.cols);
        } else if (a->m.trits) tern__unpack_row(&a->m, &s, a->ids[i], NULL, y);
        else from = a->w + a->ids[i] * a->m.cols;
        if (a->weight) tern__map_here(job->k, TERN_MAP_SCALE, a->m.cols, from, a->weight[i], NULL, y);
        else if (from != y) memcpy(y, from, sizeof(float) * (size_t)a->m.cols);
    }
}

static tern_result tern__cpu_gather(tern_run *run, const tern_gather_args *a)
{
    int64_t bad = tern__for(run, tern__gather_body, a, a->n, a->m.trits ? tern__mul(a->m.cols, 30) : a->m.cols);
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_GATHER, bad);
    return TERN_OK;
}

/* Threads share out the columns, so that every sum runs in the order of the tokens. */
static void tern__scatter_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_scatter_args *a = (const tern_scatter_args *)job->arg;
    tern_map_args m;
    int64_t i;
    (void)bad;
    memset(&m, 0, sizeof m);
    m.fn = TERN_MAP_ADD;
    for (i = 0; i < a->n; i++) {
        if (a->ids[i] < 0 || a->ids[i] >= a->rows) continue;
        m.alpha = a->weight ? a->weight[i] : 1.0f;
        m.a = m.y = a->dw + a->ids[i] * a->cols;
        m.b = a->dy + i * a->cols;
        job->k->map(&m, begin, end);
    }
}

static tern_result tern__cpu_scatter(tern_run *run, const tern_scatter_args *a)
{
    tern__for(run, tern__scatter_body, a, a->cols, tern__mul(a->n, 5));
    return TERN_OK;
}

#if !defined(TERNARY_NO_MOE) || !defined(TERNARY_NO_GRAPH)
/* The canonical sum of a product, or of the squares of a difference. */
static float tern__sum_pairs(const tern__kernels *k, int32_t squares, int64_t cols, const float *a, const float *b)
{
    float block[TERN__BLOCK];
    tern__tree tree;
    int64_t i;
    tern__tree_init(&tree, k);
    for (i = 0; i < cols; i += TERN__BLOCK) {
        const int64_t n = tern__min(TERN__BLOCK, cols - i);
        tern__map_here(k, squares ? TERN_MAP_ADD : TERN_MAP_MUL, n, a + i, -1.0f, b + i, block);
        tern__tree_push(&tree, k->sum(squares ? TERN_SUM_SQUARES : TERN_SUM, n, block));
    }
    return tern__tree_total(&tree);
}
#endif

/* -- routing and grouping by expert -- */

enum { TERN__MAX_EXPERTS = 1024 }; /* a token's logits are one block of a canonical sum */

#ifndef TERNARY_NO_MOE

/* p = softmax of n logits. */
static void tern__route_softmax(const tern__kernels *k, const float *x, int64_t n, float *p)
{
    memcpy(p, x, sizeof(float) * (size_t)n);
    tern__softmax_row(k, p, n, n, 1.0f);
}

/* The k-th largest of n numbers, and how many of those that are equal to it are among the k; best: room for k. */
static float tern__route_limit(const float *x, int32_t n, int32_t k, float *best, int32_t *equal)
{
    int32_t have = 0, i, j;
    for (i = 0; i < n; i++) {
        if (have == k && !(x[i] > best[k - 1])) continue;
        for (j = have < k ? have++ : k - 1; j > 0 && x[i] > best[j - 1]; j--) best[j] = best[j - 1];
        best[j] = x[i];
    }
    for (*equal = 0; *equal < k && best[k - 1 - *equal] == best[k - 1];) ++*equal;
    return best[k - 1];
}

static void tern__route_token(const tern__kernels *k, const tern_route_args *a, const float *x, int32_t *ids, float *weights)
{
    float p[TERN__MAX_EXPERTS];
    int32_t i, at = 0, equal;
    const float limit = tern__route_limit(x, a->count, a->k, p, &equal);
    for (i = 0; at < a->k; i++)
        if (x[i] > limit || (x[i] == limit && equal-- > 0)) {
            weights[at] = x[i];
            ids[at++] = i;
        }
    if (a->kind == TERN_ROUTE_SELECTED) {
        tern__softmax_row(k, weights, a->k, a->k, 1.0f);
        return;
    }
    tern__route_softmax(k, x, a->count, p);
    for (i = 0; i < a->k; i++) weights[i] = p[ids[i]];
    if (a->kind == TERN_ROUTE_RENORMALIZED) {
        const float sum = k->sum(TERN_SUM, a->k, weights);
        for (i = 0; i < a->k; i++) weights[i] = weights[i] / sum;
    }
}

/* dlogits of the weights: w (dw - sum of w dw) for those that share a softmax with the selected, whose dw is 0 elsewhere. */
static void tern__route_back(const tern__kernels *k, const tern_route_args *a, const float *p, const int32_t *ids, const float *weights,
                             const float *dw, float *dx)
{
    float terms[TERN__MAX_EXPERTS], sum;
    int32_t i;
    for (i = 0; i < a->k; i++) terms[i] = weights[i] * dw[i];
    sum = k->sum(TERN_SUM, a->k, terms);
    if (a->kind == TERN_ROUTE_ALL) for (i = 0; i < a->count; i++) dx[i] = p[i] * (0.0f - sum);
    for (i = 0; i < a->k; i++) dx[ids[i]] = weights[i] * (dw[i] - sum);
}

/* What a load adds to the gradient of the load-balance loss in a share. */
TERN__ANYWHERE float tern__balance_factor(const tern_route_args *a)
{
    return a->balance * (float)a->count / ((float)a->n * (float)a->n * (float)a->k);
}

/* and of the load-balance loss, whose gradient in p[i] is g[i]. */
static void tern__balance_back(const tern__kernels *k, const tern_route_args *a, const float *p, float *dx)
{
    const float factor = tern__balance_factor(a);
    float terms[TERN__MAX_EXPERTS], mean;
    int32_t i;
    for (i = 0; i < a->count; i++) terms[i] = p[i] * (factor * (float)a->loads[i]);
    mean = k->sum(TERN_SUM, a->count, terms);
    for (i = 0; i < a->count; i++) dx[i] = dx[i] + p[i] * (factor * (float)a->loads[i] - mean);
}

static void tern__route_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_route_args *a = (const tern_route_args *)job->arg;
    float p[TERN__MAX_EXPERTS];
    int64_t t, i;
    for (t = begin; t < end; t++) {
        const float *x = a->logits + t * a->count;
        float *weights = a->weights + t * a->k, *dx = a->dweights ? a->dlogits + t * a->count : NULL;
        int32_t *ids = a->ids + t * a->k;
        int32_t usable = tern__finite(tern__float(job->k->absmax(a->count, x, NULL)));
        for (i = 0; dx && i < a->k; i++) usable &= ids[i] >= 0 && ids[i] < a->count;
        if (dx) memset(dx, 0, sizeof(float) * (size_t)a->count);
        if (!usable) *bad = tern__min(*bad, t);
        if (!usable && !dx) for (i = 0; i < a->k; i++) { ids[i] = -1; weights[i] = 0.0f; }
        if (!usable) continue;
        if (!dx) { tern__route_token(job->k, a, x, ids, weights); continue; }
        tern__route_softmax(job->k, x, a->count, p);
        tern__route_back(job->k, a, p, ids, weights, a->dweights + t * a->k, dx);
        if (a->loads) tern__balance_back(job->k, a, p, dx);
    }
}

static tern_result tern__cpu_route(tern_run *run, const tern_route_args *a)
{
    const int64_t bad = tern__for(run, tern__route_body, a, a->n, tern__mul(a->count, 40));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_ROUTE, bad);
    return TERN_OK;
}

static void tern__group_put(const tern_group_args *a, int64_t at, int64_t slot)
{
    a->tokens[at] = slot < 0 ? -1 : (int32_t)(slot / a->k);
    a->slots[at] = (int32_t)slot;
    if (a->sorted) a->sorted[at] = slot < 0 ? 0.0f : a->weights[slot];
}

/* A counting sort, which keeps the order of the tokens; a matter of microseconds, on one thread. */
static tern_result tern__cpu_group(tern_run *run, const tern_group_args *a)
{
    const int64_t slots = a->n * a->k, places = a->dense ? a->n * a->count : slots;
    int32_t next[TERN__MAX_EXPERTS];
    int64_t i, first = 0;
    (void)run;
    memset(a->loads, 0, sizeof(int32_t) * (size_t)a->count);
    for (i = 0; i < slots; i++)
        if (a->ids[i] >= 0 && a->ids[i] < a->count) a->loads[a->ids[i]]++;
    for (i = 0; i < a->count; first += a->loads[i++]) next[i] = (int32_t)first;
    for (i = a->dense ? 0 : first; i < places; i++) tern__group_put(a, i, -1);
    for (i = 0; i < slots; i++) {
        const int32_t id = a->ids[i];
        if (id >= 0 && id < a->count) tern__group_put(a, a->dense ? id * a->n + i / a->k : next[id]++, i);
    }
    return TERN_OK;
}

static void tern__row_dot_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_row_dot_args *a = (const tern_row_dot_args *)job->arg;
    int64_t i;
    (void)bad;
    for (i = begin; i < end; i++)
        if (a->ids[i] >= 0 && a->ids[i] < a->rows && a->to[i] >= 0 && a->to[i] < a->count)
            a->y[a->to[i]] = tern__sum_pairs(job->k, 0, a->cols, a->a + a->ids[i] * a->cols, a->b + i * a->cols);
}

static tern_result tern__cpu_row_dot(tern_run *run, const tern_row_dot_args *a)
{
    tern__for(run, tern__row_dot_body, a, a->n, tern__mul(a->cols, 2));
    return TERN_OK;
}
#else
#define tern__cpu_route NULL
#define tern__cpu_group NULL
#define tern__cpu_row_dot NULL
#endif

/* -- sums over the edges of a graph -- */
#ifndef TERNARY_NO_GRAPH

/* Work is shared out by places: row v begins at start[v] - start[0] + v, and each of its edges is one more, so that a task has as much
   to do as any other whatever the rows are like. The segment of a hub belongs to the task that has its first place. */
static int64_t tern__place_of(const tern_adjacency *e, int64_t row) { return e->start[row] - e->start[0] + row; }

static int64_t tern__first_row(const tern_adjacency *e, int64_t place)
{
    int64_t low = 0, high = e->rows;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (tern__place_of(e, middle) < place) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* The first hub that is this row or behind it. */
TERN__ANYWHERE int64_t tern__first_hub(const tern_adjacency *e, int64_t row)
{
    int64_t low = 0, high = e->hubs;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (e->hub[middle] - e->first < row) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void tern__aggregate_some(const tern__kernels *k, const tern_aggregate_args *a, int64_t first, int64_t n, float whole, float *y)
{
    tern__neighbours s;
    s.whole = whole;
    s.n = n;
    s.left = a->edges.start[0] + a->edges.count - first;
    s.cols = a->cols;
    s.entry = a->edges.entry + first;
    s.right = a->right;
    s.scale = a->q ? a->scale : NULL;
    s.x = a->x;
    s.q = a->q;
    s.row = a->q ? a->q_row : a->cols;
    s.y = y;
    k->aggregate(&s);
}

static void tern__aggregate_end(const tern__kernels *k, const tern_aggregate_args *a, int64_t row, int64_t *bad)
{
    float *y = a->y + row * a->cols;
    if (tern__finite(tern__float(k->absmax(a->cols, y, NULL)))) return;
    memset(y, 0, sizeof(float) * (size_t)a->cols);
    *bad = tern__min(*bad, row);
}

/* Those of a row's segments that begin in [begin, end). */
static void tern__aggregate_row(tern__job *job, int64_t row, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_aggregate_args *a = (const tern_aggregate_args *)job->arg;
    const int64_t first = a->edges.start[row], n = a->edges.start[row + 1] - first, place = tern__place_of(&a->edges, row);
    int64_t s, part;
    if (n <= TERN__EDGES) {
        if (place < begin) return;
        tern__aggregate_some(job->k, a, first, n, a->left ? a->left[row] : 1.0f, a->y + row * a->cols);
        tern__aggregate_end(job->k, a, row, bad);
        return;
    }
    part = a->edges.part[tern__first_hub(&a->edges, row)] - a->edges.part[0];
    for (s = begin > place ? tern__ceil_div(begin - place, TERN__EDGES) : 0; s * TERN__EDGES < n && place + s * TERN__EDGES < end; s++)
        tern__aggregate_some(job->k, a, first + s * TERN__EDGES, tern__min(TERN__EDGES, n - s * TERN__EDGES), 1.0f,
                             a->part + (part + s) * a->cols);
}

static void tern__aggregate_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_adjacency *e = &((const tern_aggregate_args *)job->arg)->edges;
    int64_t row = tern__first_row(e, begin);
    for (row -= row > 0; row < e->rows && tern__place_of(e, row) < end; row++) tern__aggregate_row(job, row, begin, end, bad);
}

/* The segments of hubs [begin, end), in order. */
static void tern__aggregate_hubs(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_aggregate_args *a = (const tern_aggregate_args *)job->arg;
    int64_t h, s, j;
    for (h = begin; h < end; h++) {
        const int64_t row = a->edges.hub[h] - a->edges.first,
                      parts = tern__ceil_div(a->edges.start[row + 1] - a->edges.start[row], TERN__EDGES);
        const float *part = a->part + (a->edges.part[h] - a->edges.part[0]) * a->cols;
        float *y = a->y + row * a->cols;
        memcpy(y, part, sizeof(float) * (size_t)a->cols);
        for (s = 1; s < parts; s++)
            for (j = 0; j < a->cols; j++) y[j] = y[j] + part[s * a->cols + j];
        for (j = 0; a->left && j < a->cols; j++) y[j] = a->left[row] * y[j];
        tern__aggregate_end(job->k, a, row, bad);
    }
}

static tern_result tern__cpu_aggregate(tern_run *run, const tern_aggregate_args *a)
{
    const tern_adjacency *e = &a->edges;
    int64_t bad = tern__for(run, tern__aggregate_body, a, e->count + e->rows, tern__add(tern__mul(a->cols, 2), 20));
    if (e->hubs) bad = tern__min(bad, tern__for(run, tern__aggregate_hubs, a, e->hubs, tern__mul(e->parts / e->hubs, a->cols)));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_AGGREGATE, bad);
    return TERN_OK;
}

/* -- gates and codebooks -- */

static void tern__gate_token(const tern__kernels *k, const tern_gate_args *a, int64_t t, int64_t *bad)
{
    float *y = a->y + t * a->cols;
    int64_t i, j;
    memcpy(y, a->h + t * a->cols, sizeof(float) * (size_t)a->cols);
    for (i = t; i < a->count * a->n; i += a->n) {
        const float gate = tern__sigmoid(tern__sum_pairs(k, 0, a->cols, a->h + t * a->cols, a->key + i * a->cols));
        a->gate[i] = gate;
        for (j = 0; j < a->cols; j++) y[j] = y[j] + gate * a->value[i * a->cols + j];
    }
    if (tern__finite(tern__float(k->absmax(a->cols, y, NULL)))) return;
    memset(y, 0, sizeof(float) * (size_t)a->cols);
    *bad = tern__min(*bad, t);
}

static void tern__gate_back(const tern__kernels *k, const tern_gate_args *a, int64_t t)
{
    const float *h = a->h + t * a->cols, *dy = a->dy + t * a->cols;
    float *dh = a->dh + t * a->cols;
    int64_t i, j;
    memcpy(dh, dy, sizeof(float) * (size_t)a->cols);
    for (i = t; i < a->count * a->n; i += a->n) {
        const float gate = a->gate[i], *key = a->key + i * a->cols, *value = a->value + i * a->cols;
        const float slope = tern__sum_pairs(k, 0, a->cols, dy, value) * (gate * (1.0f - gate));
        float *dkey = a->dkey + i * a->cols, *dvalue = a->dvalue + i * a->cols;
        for (j = 0; j < a->cols; j++) {
            dvalue[j] = gate * dy[j];
            dkey[j] = slope * h[j];
            dh[j] = dh[j] + slope * key[j];
        }
    }
}

static void tern__gate_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_gate_args *a = (const tern_gate_args *)job->arg;
    int64_t t;
    for (t = begin; t < end; t++) {
        if (a->dy) tern__gate_back(job->k, a, t);
        else tern__gate_token(job->k, a, t, bad);
    }
}

static tern_result tern__cpu_gate(tern_run *run, const tern_gate_args *a)
{
    const int64_t bad = tern__for(run, tern__gate_body, a, a->n, tern__mul(tern__mul(a->count, a->cols), 10));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_GATE, bad);
    return TERN_OK;
}

static void tern__nearest_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_nearest_args *a = (const tern_nearest_args *)job->arg;
    int64_t t, i;
    for (t = begin; t < end; t++) {
        float best = 3.402823466e38f; /* beyond it nothing is nearest */
        int32_t id = -1;
        for (i = 0; i < a->rows; i++) {
            const float d = tern__sum_pairs(job->k, 1, a->cols, a->x + t * a->cols, a->w + i * a->cols);
            if (d < best) { best = d; id = (int32_t)i; }
        }
        if (id < 0) *bad = tern__min(*bad, t);
        a->ids[t] = id;
        if (a->distance) a->distance[t] = id < 0 ? 0.0f : best;
    }
}

static tern_result tern__cpu_nearest(tern_run *run, const tern_nearest_args *a)
{
    const int64_t bad = tern__for(run, tern__nearest_body, a, a->n, tern__mul(tern__mul(a->rows, a->cols), 3));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_NEAREST, bad);
    return TERN_OK;
}
#else
#define tern__cpu_aggregate NULL
#define tern__cpu_gate NULL
#define tern__cpu_nearest NULL
#endif

/* -- element by element -- */

static void tern__fill_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_fill_args *a = (const tern_fill_args *)job->arg;
    int64_t i;
    (void)bad;
    if (a->deviation == 0.0f) memset(a->x + begin, 0, sizeof(float) * (size_t)(end - begin));
    else for (i = begin; i < end; i++) a->x[i] = a->deviation * tern__normal(a->seed, (uint64_t)i, a->stream);
}

static tern_result tern__cpu_fill(tern_run *run, const tern_fill_args *a)
{
    tern__for(run, tern__fill_body, a, a->count, a->deviation == 0.0f ? 2 : 200);
    return TERN_OK;
}

static void tern__cast_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_cast_args *a = (const tern_cast_args *)job->arg;
    int64_t i;
    (void)bad;
    for (i = begin; i < end; i++) tern__store_float(a->to, a->dst, i, tern__load_float(a->from, a->src, i));
}

static void tern__cast_scan_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_cast_args *a = (const tern_cast_args *)job->arg;
    int64_t i;
    for (i = begin; i < end; i++)
        if (!tern__finite(tern__load_float(a->from, a->src, i))) { *bad = i; return; }
}

static tern_result tern__cpu_cast(tern_run *run, const tern_cast_args *a)
{
    int64_t bad = a->finite ? tern__for(run, tern__cast_scan_body, a, a->count, 10) : INT64_MAX;
    TERN__REQUIRE(run, bad == INT64_MAX, TERN_E_NONFINITE, "cast: element %d is not finite", bad);
    tern__for(run, tern__cast_body, a, a->count, 15);
    return TERN_OK;
}

static void tern__map_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    (void)bad;
    job->k->map((const tern_map_args *)job->arg, begin, end);
}

static tern_result tern__cpu_map(tern_run *run, const tern_map_args *a)
{
    tern__for(run, tern__map_body, a, a->count, a->fn >= TERN_MAP_SILU ? 20 : 5);
    return TERN_OK;
}

/* -- norm -- */

/* Up to 1024 of g dy: where dy lies, or in the block. */
static const float *tern__norm_dy(const tern__kernels *k, const tern_norm_args *a, int64_t i, int64_t n, const float *dy, float *block)
{
    if (!a->gain) return dy + i;
    tern__map_here(k, TERN_MAP_MUL, n, a->gain + i, 0.0f, dy + i, block);
    return block;
}

/* The canonical sum of g dy x over a row. */
static float tern__norm_dot(const tern__kernels *k, const tern_norm_args *a, const float *x, const float *dy)
{
    float block[TERN__BLOCK];
    tern__tree tree;
    int64_t i;
    tern__tree_init(&tree, k);
    for (i = 0; i < a->cols; i += TERN__BLOCK) {
        const int64_t n = tern__min(TERN__BLOCK, a->cols - i);
        tern__map_here(k, TERN_MAP_MUL, n, tern__norm_dy(k, a, i, n, dy, block), 0.0f, x + i, block);
        tern__tree_push(&tree, k->sum(TERN_SUM, n, block));
    }
    return tern__tree_total(&tree);
}

/* y = x gain r. */
static void tern__norm_row(const tern__kernels *k, const tern_norm_args *a, float r, const float *x, float *y)
{
    if (a->gain) tern__map_here(k, TERN_MAP_MUL, a->cols, x, 0.0f, a->gain, y);
    tern__map_here(k, TERN_MAP_SCALE, a->cols, a->gain ? y : x, r, NULL, y);
}

/* dx = r g dy - x r^3 mean(g dy x), or zero. */
static void tern__norm_back(const tern__kernels *k, const tern_norm_args *a, float r, const float *x, const float *dy, float *dx)
{
    const float mean = r > 0.0f ? tern__norm_dot(k, a, x, dy) / (float)a->cols * (r * r * r) : 0.0f;
    float block[TERN__BLOCK];
    int64_t i;
    for (i = 0; i < a->cols; i += TERN__BLOCK) {
        const int64_t n = tern__min(TERN__BLOCK, a->cols - i);
        float *to = a->add ? block : dx + i;
        if (r > 0.0f) {
            tern__map_here(k, TERN_MAP_SCALE, n, tern__norm_dy(k, a, i, n, dy, block), r, NULL, block);
            tern__map_here(k, TERN_MAP_ADD, n, block, -mean, x + i, to);
        } else memset(to, 0, sizeof(float) * (size_t)n);
        if (a->add) tern__map_here(k, TERN_MAP_ADD, n, dx + i, 1.0f, block, dx + i);
    }
}

static void tern__norm_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_norm_args *a = (const tern_norm_args *)job->arg;
    int64_t t;
    for (t = begin; t < end; t++) {
        const float *x = a->x + t * a->cols;
        const float r = tern__rms(job->k, a->cols, x, a->eps);
        if (!(r > 0.0f)) *bad = tern__min(*bad, t);
        if (a->dy && a->dx) tern__norm_back(job->k, a, r, x, a->dy + t * a->cols, a->dx + t * a->cols);
        if (a->dy) continue;
        if (r > 0.0f) tern__norm_row(job->k, a, r, x, a->y + t * a->cols);
        else memset(a->y + t * a->cols, 0, sizeof(float) * (size_t)a->cols);
    }
}

/* dgain in order of the tokens: threads share out the columns. */
static void tern__norm_gain_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_norm_args *a = (const tern_norm_args *)job->arg;
    float block[TERN__BLOCK];
    int64_t t, i;
    (void)bad;
    for (t = 0; t < a->n; t++) {
        const float *x = a->x + t * a->cols, *dy = a->dy + t * a->cols;
        const float r = tern__rms(job->k, a->cols, x, a->eps);
        for (i = begin; r > 0.0f && i < end; i += TERN__BLOCK) {
            const int64_t n = tern__min(TERN__BLOCK, end - i);
            tern__map_here(job->k, TERN_MAP_SCALE, n, x + i, r, NULL, block);
            tern__map_here(job->k, TERN_MAP_MUL, n, dy + i, 0.0f, block, block);
            tern__map_here(job->k, TERN_MAP_ADD, n, a->dgain + i, 1.0f, block, a->dgain + i);
        }
    }
}

static tern_result tern__cpu_norm(tern_run *run, const tern_norm_args *a)
{
    int64_t bad;
    if (a->dy && a->dgain) tern__for(run, tern__norm_gain_body, a, a->cols, tern__mul(a->n, 10)); /* first: dx may be dy */
    bad = tern__for(run, tern__norm_body, a, a->n, tern__mul(a->cols, 15));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_NORM, bad);
    return TERN_OK;
}

/* -- Hadamard rotation (against outliers: Ashkboos et al. 2024, BitNet v2) -- */

enum { TERN__ROTATION = 0x48414441 }; /* the stream of its signs */

TERN__ANYWHERE int64_t tern__power_below(int64_t n)
{
    int64_t p = 1;
    while (2 * p <= n) p *= 2;
    return p;
}

/* 1 / sqrt(p), p a power of two. */
TERN__ANYWHERE float tern__rotation_factor(int64_t p)
{
    float factor = 1.0f;
    for (; p >= 4; p /= 4) factor = factor * 0.5f;
    return p == 2 ? factor * 0.70710678f : factor;
}

/* The words for negate: 4 to 128 columns. */
static void tern__rotation_signs(uint32_t seed, int64_t cols, uint32_t *words)
{
    int64_t i;
    for (i = 0; i < cols; i += 128) tern__philox(seed, (uint64_t)(i / 128), 0, TERN__ROTATION, words + i / 32);
}

static void tern__hadamard_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_hadamard_args *a = (const tern_hadamard_args *)job->arg;
    const int64_t p = tern__power_below(a->cols), rest = a->cols - p;
    const float factor = tern__rotation_factor(p);
    uint32_t signs[TERN__MAX_COLS / 32];
    int64_t t;
    (void)bad;
    tern__rotation_signs(a->seed, a->cols, signs);
    for (t = begin; t < end; t++) {
        const float *x = a->x + t * a->cols;
        float *y = a->y + t * a->cols;
        if (a->inverse) {
            if (y != x) memcpy(y, x, sizeof(float) * (size_t)a->cols);
            if (rest) job->k->hadamard(p, factor, y + rest);
            job->k->hadamard(p, factor, y);
            job->k->negate(a->cols, signs, y, y);
        } else {
            job->k->negate(a->cols, signs, x, y);
            job->k->hadamard(p, factor, y);
            if (rest) job->k->hadamard(p, factor, y + rest);
        }
    }
}

static tern_result tern__cpu_hadamard(tern_run *run, const tern_hadamard_args *a)
{
    tern__for(run, tern__hadamard_body, a, a->n, tern__mul(a->cols, 10));
    return TERN_OK;
}

/* -- the dead zone of a matrix -- */

/* Up to 1024 trits of a row at a time. */
static void tern__dead_zone_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_dead_zone_args *a = (const tern_dead_zone_args *)job->arg;
    const tern__shape s = tern__shape_of(&a->m);
    int8_t t[TERN__BLOCK];
    float block[TERN__BLOCK];
    tern__tree tree;
    int64_t row, col, n, j;
    (void)bad;
    for (row = begin; row < end; row++) {
        const float slope = a->dw ? a->lambda * a->dbias[row] : 0.0f;
        tern__tree_init(&tree, job->k);
        for (col = 0; col < a->m.cols; col += n) {
            const int64_t at = row * a->m.cols + col;
            n = tern__min(TERN__BLOCK, a->m.cols - col);
            tern__unpack_range(&a->m, &s, row, col, n, t);
            for (j = 0; a->bias && j < n; j++) block[j] = t[j] ? 0.0f : tern__load_float(a->type, a->w, at + j);
            if (a->bias) tern__tree_push(&tree, job->k->sum(TERN_SUM, n, block));
            for (j = 0; a->dw && j < n; j++) if (!t[j]) a->dw[at + j] = a->dw[at + j] + slope;
        }
        if (a->bias) a->bias[row] = a->lambda * tern__tree_total(&tree);
    }
}

static tern_result tern__cpu_dead_zone(tern_run *run, const tern_dead_zone_args *a)
{
    tern__for(run, tern__dead_zone_body, a, a->m.rows, tern__mul(a->m.cols, 30));
    return TERN_OK;
}

/* -- rotary positions (Su et al. 2021), pairs (i, i + dim/2) -- */

enum { TERN__MAX_HEAD = 1024 };

static void tern__rope_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_rope_args *a = (const tern_rope_args *)job->arg;
    const int32_t half = a->dim / 2;
    const float step = -2.0f / (float)a->dim * tern__log(a->base > 0.0f ? a->base : 10000.0f);
    float frequency[TERN__MAX_HEAD / 2], sine[TERN__MAX_HEAD / 2], cosine[TERN__MAX_HEAD / 2];
    int64_t t;
    int32_t i, h;
    (void)bad;
    for (i = 0; i < half; i++) frequency[i] = tern__exp((float)i * step);
    for (t = begin; t < end; t++) {
        const float position = (float)(a->start + t % a->period);
        for (i = 0; i < half; i++) {
            tern__sincos(position * frequency[i], &sine[i], &cosine[i]);
            if (a->inverse) sine[i] = 0.0f - sine[i];
        }
        for (h = 0; h < a->heads; h++) {
            float *x = a->x + t * a->stride + (int64_t)h * a->dim;
            for (i = 0; i < half; i++) {
                const float u = x[i], v = x[i + half];
                x[i] = u * cosine[i] - v * sine[i];
                x[i + half] = u * sine[i] + v * cosine[i];
            }
        }
    }
}

static tern_result tern__cpu_rope(tern_run *run, const tern_rope_args *a)
{
    tern__for(run, tern__rope_body, a, a->n, tern__mul((int64_t)a->heads + 1, 12 * a->dim));
    return TERN_OK;
}

/* -- attention: one item is one key head of one sequence, with the query heads that share it -- */

typedef struct tern__head { const float *q, *k, *v; float *y, *p; int64_t batch; int32_t head, kv; } tern__head;

static tern__head tern__head_of(const tern_attention_args *a, int64_t batch, int32_t head)
{
    tern__head h;
    h.batch = batch;
    h.head = head;
    h.kv = head / (a->heads / a->kv_heads);
    h.q = a->q + batch * a->queries * a->q_stride + (int64_t)head * a->dim;
    h.k = a->k + batch * a->keys * a->k_stride + (int64_t)h.kv * a->dim;
    h.v = a->v + batch * a->keys * a->v_stride + (int64_t)h.kv * a->dim;
    h.y = a->y + batch * a->queries * a->heads * a->dim + (int64_t)head * a->dim;
    h.p = a->p + (batch * a->heads + head) * a->queries * a->keys;
    return h;
}

/* What is behind a query's last key is zero, so that products run over blocks of queries, or of keys, that see each other. */
static int64_t tern__seen_keys(const tern_attention_args *a, int64_t query, int64_t count) { return a->keys - a->queries + query + count; }

/* y [queries, dim] = p x, x [keys, dim]. */
static void tern__attend(const tern__kernels *k, const tern_attention_args *a, const float *p, const float *x, int64_t x_row, int32_t fused,
                         float *y, int64_t y_row, tern__work *w)
{
    int64_t i, rows;
    for (i = 0; i < a->queries; i += rows) {
        tern__gemm g;
        rows = tern__min(TERN__QUERIES, a->queries - i);
        g = tern__gemm_of(rows, a->dim, tern__seen_keys(a, i, rows), p + i * a->keys, a->keys, 1, y + i * y_row, y_row);
        g.b = x; g.b_row = x_row; g.b_col = 1;
        g.fused = fused;
        tern__gemm_here(k, &g, w);
    }
}

/* y [keys, dim] (+)= p^T x, x [queries, dim]. */
static void tern__attend_back(const tern__kernels *k, const tern_attention_args *a, const tern__head *h, const float *x, int64_t x_row,
                              float *y, int64_t y_row, tern__work *w)
{
    int64_t i, rows;
    for (i = 0; i < a->keys; i += rows) {
        const int64_t first = tern__max(0, i - (a->keys - a->queries));
        tern__gemm g;
        rows = tern__min(TERN__QUERIES, a->keys - i);
        g = tern__gemm_of(rows, a->dim, a->queries - first, h->p + first * a->keys + i, 1, a->keys, y + i * y_row, y_row);
        g.b = x + first * x_row; g.b_row = x_row; g.b_col = 1;
        g.add = h->head % (a->heads / a->kv_heads) != 0;
        g.fused = !a->exact;
        tern__gemm_here(k, &g, w);
    }
}

static void tern__attention_forward(const tern__kernels *k, const tern_attention_args *a, const tern__head *h, tern__work *w)
{
    int64_t i, j, rows;
    for (i = 0; i < a->queries; i += rows) {
        tern__gemm g;
        rows = tern__min(TERN__QUERIES, a->queries - i);
        g = tern__gemm_of(rows, tern__seen_keys(a, i, rows), a->dim, h->q + i * a->q_stride, a->q_stride, 1, h->p + i * a->keys, a->keys);
        g.b = h->k; g.b_row = 1; g.b_col = a->k_stride;
        tern__gemm_here(k, &g, w);
        for (j = i; j < i + rows; j++)
            tern__softmax_row(k, h->p + j * a->keys, tern__seen_keys(a, j, 1), a->keys, 1.0f / tern__sqrt((float)a->dim));
    }
    tern__attend(k, a, h->p, h->v, a->v_stride, 0, h->y, (int64_t)a->heads * a->dim, w);
}

/* p = p (ds - delta) scale, 16 at a time like tern__divide. */
static void tern__score_back(int64_t n, const float *__restrict ds, float delta, float scale, float *__restrict p)
{
    int64_t i, j;
    for (i = 0; i + 16 <= n; i += 16)
        for (j = 0; j < 16; j++) p[i + j] = p[i + j] * (ds[i + j] - delta) * scale;
    for (; i < n; i++) p[i] = p[i] * (ds[i] - delta) * scale;
}

/* Rows of dS = P (dY V^T - <dy, y>) / sqrt(dim), in place of P. */
static void tern__attention_scores_back(const tern__kernels *k, const tern_attention_args *a, const tern__head *h, int64_t query,
                                        int64_t rows, tern__work *w)
{
    const int64_t width = (int64_t)a->heads * a->dim, seen = tern__seen_keys(a, query, rows);
    const float *dy = a->dy + (h->y - a->y) + query * width, *y = h->y + query * width;
    const float scale = 1.0f / tern__sqrt((float)a->dim);
    float delta[TERN__QUERIES];
    int64_t i, d, n0;
    for (i = 0; i < rows; i++)
        for (delta[i] = 0.0f, d = 0; d < a->dim; d++) delta[i] += dy[i * width + d] * y[i * width + d];
    for (n0 = 0; n0 < seen; n0 += TERN__DS) {
        const int64_t lanes = tern__min(TERN__DS, seen - n0);
        tern__gemm g = tern__gemm_of(rows, lanes, a->dim, dy, width, 1, w->ds, TERN__DS);
        g.b = h->v + n0 * a->v_stride; g.b_row = 1; g.b_col = a->v_stride;
        g.fused = !a->exact;
        tern__gemm_here(k, &g, w);
        for (i = 0; i < rows; i++) tern__score_back(lanes, w->ds + i * TERN__DS, delta[i], scale, h->p + (query + i) * a->keys + n0);
    }
}

/* dV = P^T dY; dS; dQ = dS K; dK = dS^T Q. */
static void tern__attention_backward(const tern__kernels *k, const tern_attention_args *a, const tern__head *h, tern__work *w)
{
    int64_t i;
    tern__attend_back(k, a, h, a->dy + (h->y - a->y), (int64_t)a->heads * a->dim, a->dv + (h->v - a->v), a->v_stride, w);
    for (i = 0; i < a->queries; i += TERN__QUERIES) tern__attention_scores_back(k, a, h, i, tern__min(TERN__QUERIES, a->queries - i), w);
    tern__attend(k, a, h->p, h->k, a->k_stride, !a->exact, a->dq + (h->q - a->q), a->q_stride, w);
    tern__attend_back(k, a, h, h->q, a->q_stride, a->dk + (h->k - a->k), a->k_stride, w);
}

static void tern__attention_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_attention_args *a = (const tern_attention_args *)job->arg;
    const int32_t shared = a->heads / a->kv_heads;
    int64_t item;
    int32_t i;
    (void)bad;
    for (item = begin; item < end; item++)
        for (i = 0; i < shared; i++) {
            tern__head h = tern__head_of(a, item / a->kv_heads, (int32_t)(item % a->kv_heads) * shared + i);
            if (a->dy) tern__attention_backward(job->k, a, &h, tern__work_of(job, bad));
            else tern__attention_forward(job->k, a, &h, tern__work_of(job, bad));
        }
}

static tern_result tern__cpu_attention(tern_run *run, const tern_attention_args *a)
{
    tern__for(run, tern__attention_body, a, a->batch * a->kv_heads,
              tern__mul(tern__mul(a->queries, a->keys), tern__mul(a->heads / a->kv_heads, a->dim + 30)));
    return TERN_OK;
}

/* -- loss and sums -- */

static void tern__loss_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_loss_args *a = (const tern_loss_args *)job->arg;
    int64_t t, i;
    for (t = begin; t < end; t++) {
        const float *x = a->logits + t * a->classes;
        float *dx = a->dlogits ? a->dlogits + t * a->classes : NULL;
        const int32_t target = a->targets[t];
        const int32_t usable = target >= 0 && target < a->classes && tern__finite(tern__float(job->k->absmax(a->classes, x, NULL)));
        float largest, block[TERN__BLOCK], sum, at_target;
        tern__tree tree;
        a->losses[t] = 0.0f;
        if (!usable) {
            *bad = tern__min(*bad, t);
            if (dx) memset(dx, 0, sizeof(float) * (size_t)a->classes);
            continue;
        }
        at_target = x[target];
        largest = job->k->largest(a->classes, x);
        tern__tree_init(&tree, job->k);
        for (i = 0; i < a->classes; i += TERN__BLOCK) {
            const int64_t n = tern__min(TERN__BLOCK, a->classes - i);
            job->k->exps(n, x + i, 1.0f, largest, block);
            tern__tree_push(&tree, job->k->sum(TERN_SUM, n, block));
            if (dx) memcpy(dx + i, block, sizeof(float) * (size_t)n);
        }
        sum = tern__tree_total(&tree);
        a->losses[t] = tern__log(sum) + (largest - at_target);
        if (!dx) continue;
        tern__divide(a->classes, sum, dx);
        dx[target] = dx[target] - 1.0f;
        tern__map_here(job->k, TERN_MAP_SCALE, a->classes, dx, a->scale, NULL, dx);
    }
}

static tern_result tern__cpu_loss(tern_run *run, const tern_loss_args *a)
{
    int64_t bad = tern__for(run, tern__loss_body, a, a->n, tern__mul(a->classes, 80));
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_LOSS, bad);
    return TERN_OK;
}

/* Blocks of 1024 floats go to the threads, 1024 block sums at a time. */
typedef struct tern__sum_work { const tern_sum_args *a; int64_t block0; float *sums; } tern__sum_work;

static void tern__sum_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__sum_work *w = (const tern__sum_work *)job->arg;
    float buffer[TERN__BLOCK] TERN__ALIGN64;
    int64_t i;
    (void)bad;
    for (i = begin; i < end; i++) {
        const int64_t at = (w->block0 + i) * TERN__BLOCK, n = tern__min(TERN__BLOCK, w->a->count - at);
        w->sums[i] = job->k->sum((int32_t)w->a->kind, n, tern__floats_at(job->k, w->a->type, w->a->x, at, n, buffer));
    }
}

static tern_result tern__cpu_sum(tern_run *run, const tern_sum_args *a)
{
    const int64_t blocks = tern__ceil_div(a->count, TERN__BLOCK);
    float sums[TERN__BLOCK], total;
    tern__sum_work w;
    tern__tree tree;
    int64_t i;
    tern__tree_init(&tree, (const tern__kernels *)run->backend->data);
    w.a = a;
    w.sums = sums;
    for (w.block0 = 0; w.block0 < blocks; w.block0 += TERN__BLOCK) {
        const int64_t n = tern__min(TERN__BLOCK, blocks - w.block0);
        tern__for(run, tern__sum_body, &w, n, 1000);
        for (i = 0; i < n; i++) tern__tree_push(&tree, sums[i]);
    }
    total = tern__tree_total(&tree);
    a->y[0] = a->add ? a->y[0] + total : total;
    return TERN_OK;
}

/* -- optimizers (Loshchilov and Hutter 2017 for AdamW) -- */

#ifndef TERNARY_NO_TRAINING
/* min(1, clip / norm) */
TERN__ANYWHERE float tern__clip_factor(float clip, const float *norm2)
{
    const float norm = clip > 0.0f && norm2 ? tern__sqrt(*norm2) : 0.0f;
    return norm > clip ? clip / norm : 1.0f;
}

/* Items are blocks of 1024 weights. */
static void tern__optimize_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__optimize_work *w = (const tern__optimize_work *)job->arg;
    (void)bad;
    job->k->optimize(w, begin * TERN__BLOCK, tern__min(end * TERN__BLOCK, w->a->count));
}

TERN__ANYWHERE float tern__power(float base, uint32_t exponent)
{
    float result = 1.0f;
    for (; exponent; exponent >>= 1, base = base * base)
        if (exponent & 1) result = result * base;
    return result;
}

static tern_result tern__cpu_optimize(tern_run *run, const tern_optimize_args *a)
{
    tern__optimize_work w;
    if (a->norm2 && !tern__finite(*a->norm2)) {
        tern__set_fault(run, TERN__FAULT_OPTIMIZE, (int64_t)a->step);
        memset(a->grad, 0, sizeof(float) * (size_t)a->count);
        return TERN_OK;
    }
    w.a = a;
    w.factor = tern__clip_factor(a->clip, a->norm2);
    w.correct1 = 1.0f / (1.0f - tern__power(a->beta1, a->step));
    w.correct2 = 1.0f / (1.0f - tern__power(a->beta2, a->step));
    tern__for(run, tern__optimize_body, &w, tern__ceil_div(a->count, TERN__BLOCK), TERN__BLOCK * 20);
    return TERN_OK;
}

/* -- learned scales -- */

/* What one weight adds to the gradient of its scale S, before the factor of the grain. The derivative of S T by S is T
   where w is clipped; inside, where T = round(w/S), the rounding is passed straight through and -w/S comes to it. */
TERN__ANYWHERE float tern__scale_term(const tern_scale_grad_args *a, float w, float scale, float trit, float dw)
{
    const int32_t inside = !a->plain && tern__abs(w) < (a->rule == TERN_SEQ ? 1.485f : 1.0f) * scale;
    return dw * (inside ? trit - w / scale : trit);
}

/* SEQ: S = alpha/1.5, and w/alpha is clipped at 0.99. */
TERN__ANYWHERE float tern__scale_factor(const tern_scale_grad_args *a)
{
    const float weights = a->rule == TERN_SEQ ? (float)a->m.cols : (float)a->m.rows * (float)a->m.cols;
    return (a->plain ? 1.0f : 1.0f / tern__sqrt(weights)) / (a->rule == TERN_SEQ ? 1.5f : 1.0f);
}

/* Rows go to the threads, 1024 at a time. */
typedef struct tern__scale_work { const tern_scale_grad_args *a; tern__shape s; int64_t row0; float *sums; } tern__scale_work;

static void tern__scale_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__scale_work *work = (const tern__scale_work *)job->arg;
    const tern_scale_grad_args *a = work->a;
    float term[TERN__BLOCK];
    int8_t trits[TERN__BLOCK];
    int64_t i, col, n, j;
    (void)bad;
    for (i = begin; i < end; i++) {
        const int64_t row = work->row0 + i, first = row * a->m.cols;
        const float scale = tern__load_scale(a->m.scale_type, a->m.scales, tern__scale_index(&a->m, &work->s, row, 0));
        tern__tree tree;
        tern__tree_init(&tree, job->k);
        for (col = 0; col < a->m.cols; col += n) {
            n = tern__min(TERN__BLOCK, a->m.cols - col);
            tern__unpack_range(&a->m, &work->s, row, col, n, trits);
            for (j = 0; j < n; j++)
                term[j] = tern__scale_term(a, tern__load_float(a->type, a->w, first + col + j), scale, (float)trits[j],
                                           a->dw[first + col + j]);
            tern__tree_push(&tree, job->k->sum(TERN_SUM, n, term));
        }
        work->sums[i] = tern__tree_total(&tree);
    }
}

static tern_result tern__cpu_scale_grad(tern_run *run, const tern_scale_grad_args *a)
{
    const float factor = tern__scale_factor(a);
    float sums[TERN__BLOCK];
    tern__scale_work w;
    tern__tree tree;
    int64_t i;
    tern__tree_init(&tree, (const tern__kernels *)run->backend->data);
    w.a = a;
    w.s = tern__shape_of(&a->m);
    w.sums = sums;
    for (w.row0 = 0; w.row0 < a->m.rows; w.row0 += TERN__BLOCK) {
        const int64_t n = tern__min(TERN__BLOCK, a->m.rows - w.row0);
        tern__for(run, tern__scale_body, &w, n, tern__mul(a->m.cols, 40));
        for (i = 0; i < n; i++) {
            if (a->rule == TERN_SEQ) a->dalpha[w.row0 + i] += sums[i] * factor;
            else tern__tree_push(&tree, sums[i]);
        }
    }
    if (a->rule == TERN_LSQ) a->dalpha[0] += tern__tree_total(&tree) * factor;
    return TERN_OK;
}

/* -- stochastic rounding to int8 -- */

/* The largest |v| of each token or, of whole tensors, of a task's tokens. */
typedef struct tern__round_work {
    const tern_round_i8_args *a;
    tern__shape s;
    uint32_t most[TERN__WORKERS]; /* whole: of each task */
    float scale;                  /* whole */
} tern__round_work;

/* Scales of a matrix's rows [first, first + n) as floats. */
static const float *tern__row_scales(const tern__round_work *w, int64_t first, int64_t n, float *to)
{
    const tern_matrix *m = &w->a->m;
    int64_t i;
    if (!m->scales) return NULL;
    for (i = 0; i < n; i++) to[i] = tern__load_scale(m->scale_type, m->scales, tern__scale_index(m, &w->s, first + i, w->a->group));
    return to;
}

enum { TERN__ROUND_TOKENS = 16 }; /* that share a block of 1024 scales */

/* Bits of the largest |v| of each of some tokens: rounding keeps the order, so that the row's factor comes last. */
static void tern__round_sizes(const tern__kernels *k, const tern__round_work *w, int64_t first, int64_t tokens, uint32_t *size)
{
    const tern_round_i8_args *a = w->a;
    float buffer[TERN__BLOCK];
    int64_t i, t, n;
    for (t = 0; t < tokens; t++) size[t] = 0;
    for (i = 0; i < a->cols; i += n) {
        const float *gain = tern__row_scales(w, i, n = tern__min(TERN__BLOCK, a->cols - i), buffer);
        for (t = 0; t < tokens; t++) {
            const uint32_t bits = k->absmax(n, a->x + (first + t) * a->cols + i, gain);
            if (bits > size[t]) size[t] = bits;
        }
    }
    for (t = 0; a->row && t < tokens; t++) size[t] = tern__bits(tern__float(size[t]) * a->row[first + t]) & 0x7FFFFFFFu;
}

/* Rows whose scale is known: 127/m, or 0 for a row of zeros. */
static void tern__round_rows(const tern__kernels *k, const tern__round_work *w, int64_t first, int64_t tokens, const float *inverse)
{
    const tern_round_i8_args *a = w->a;
    const int64_t blocks = tern__ceil_div(a->cols, 8);
    float buffer[TERN__BLOCK];
    tern__random random;
    int64_t i, t, n;
    random.seed = a->seed;
    random.step = TERN__ROUNDING;
    random.stream = a->stream;
    for (i = 0; i < a->cols; i += n) {
        const float *gain = tern__row_scales(w, i, n = tern__min(TERN__BLOCK, a->cols - i), buffer);
        for (t = first; t < first + tokens; t++) {
            const int64_t at = t * a->cols + i;
            if (inverse[t - first] == 0.0f) memset(a->q + at, 0, (size_t)n);
            else k->round_up(&random, (uint64_t)(t * blocks + i / 8), n, a->x + at, gain, a->row ? a->row[t] : 1.0f,
                             inverse[t - first], a->q + at);
        }
    }
}

/* Scale and its inverse from the largest |v|; a row that is not finite or has none is 0. */
TERN__ANYWHERE float tern__round_scale(uint32_t most, float *inverse)
{
    const float size = tern__float(most);
    *inverse = tern__finite(size) && tern__finite(127.0f / size) ? 127.0f / size : 0.0f;
    return *inverse == 0.0f ? 0.0f : size / 127.0f;
}

static void tern__round_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__round_work *w = (const tern__round_work *)job->arg;
    uint32_t size[TERN__ROUND_TOKENS];
    float inverse[TERN__ROUND_TOKENS];
    int64_t first, t, tokens;
    for (first = begin; first < end; first += tokens) {
        tokens = tern__min(TERN__ROUND_TOKENS, end - first);
        tern__round_sizes(job->k, w, first, tokens, size);
        for (t = 0; t < tokens; t++) {
            w->a->scale[first + t] = tern__round_scale(size[t], &inverse[t]);
            if (!tern__finite(tern__float(size[t]))) *bad = tern__min(*bad, first + t);
        }
        tern__round_rows(job->k, w, first, tokens, inverse);
    }
}

static void tern__round_most_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__round_work *w = (tern__round_work *)(uintptr_t)job->arg;
    uint32_t size[TERN__ROUND_TOKENS], *most = &w->most[bad - job->bad];
    int64_t first, t, tokens;
    for (first = begin; first < end; first += tokens) {
        tokens = tern__min(TERN__ROUND_TOKENS, end - first);
        tern__round_sizes(job->k, w, first, tokens, size);
        for (t = 0; t < tokens; t++) {
            if (size[t] > *most) *most = size[t];
            if (!tern__finite(tern__float(size[t]))) *bad = tern__min(*bad, first + t);
        }
    }
}

static void tern__round_whole_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern__round_work *w = (const tern__round_work *)job->arg;
    float inverse[TERN__ROUND_TOKENS];
    int64_t first, t;
    (void)bad;
    for (t = 0; t < TERN__ROUND_TOKENS; t++) inverse[t] = w->scale;
    for (first = begin; first < end; first += TERN__ROUND_TOKENS)
        tern__round_rows(job->k, w, first, tern__min(TERN__ROUND_TOKENS, end - first), inverse);
}

static tern_result tern__cpu_round_i8(tern_run *run, const tern_round_i8_args *a)
{
    const int64_t cost = tern__mul(a->cols, 40);
    tern__round_work w;
    uint32_t most = 0;
    int64_t bad;
    int32_t i;
    memset(&w, 0, sizeof w);
    w.a = a;
    if (a->m.scales) w.s = tern__shape_of(&a->m);
    if (!a->whole) bad = tern__for(run, tern__round_body, &w, a->n, cost);
    else {
        bad = tern__for(run, tern__round_most_body, &w, a->n, tern__mul(a->cols, 5));
        for (i = 0; i < TERN__WORKERS; i++) if (w.most[i] > most) most = w.most[i];
        a->scale[0] = tern__round_scale(most, &w.scale);
        tern__for(run, tern__round_whole_body, &w, a->n, cost);
    }
    if (bad != INT64_MAX) tern__set_fault(run, TERN__FAULT_ROUND, bad);
    return TERN_OK;
}

/* Constant trip counts, so that compilers vectorise at -O2. */
static void tern__dequantize_block(const int32_t *__restrict x, float scale, int32_t add, int64_t n, float *__restrict y)
{
    int32_t i;
    if (n < TERN__LANES) for (i = 0; i < n; i++) y[i] = add ? y[i] + (float)x[i] * scale : (float)x[i] * scale;
    else if (add) for (i = 0; i < TERN__LANES; i++) y[i] = y[i] + (float)x[i] * scale;
    else for (i = 0; i < TERN__LANES; i++) y[i] = (float)x[i] * scale;
}

static void tern__dequantize_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    const tern_dequantize_args *a = (const tern_dequantize_args *)job->arg;
    int64_t t, i;
    (void)bad;
    for (t = begin; t < end; t++)
        for (i = 0; i < a->cols; i += TERN__LANES)
            tern__dequantize_block(a->x + t * a->cols + i, a->scale[a->whole ? 0 : t], a->add, tern__min(TERN__LANES, a->cols - i),
                                   a->y + t * a->y_row + i);
}

static tern_result tern__cpu_dequantize(tern_run *run, const tern_dequantize_args *a)
{
    tern__for(run, tern__dequantize_body, a, a->n, tern__mul(a->cols, 5));
    return TERN_OK;
}

/* -- flips: training without floats that last. Panels go to the threads; counts are sums of integers -- */

typedef struct tern__flip_work {
    const tern_flip_args *a;
    tern__shape s;
    tern__push push;
    tern_flips count[TERN__WORKERS];
    int64_t score[TERN__WORKERS]; /* of the tensor */
} tern__flip_work;

/* Sum over a group of sign(G) T, added to the score of each row of a panel. */
static void tern__score_group(const tern__flip_work *w, int64_t row, int64_t rows, int64_t g, int64_t *score)
{
    const tern_matrix *m = &w->a->m;
    int8_t t[TERN__NARROW];
    int64_t r, i, j, n;
    for (r = 0; r < rows; r++)
        for (i = 0; i < tern__group_cols(m, &w->s, g); i += n) {
            const float *grad = w->a->grad + (row + r) * m->cols + g * w->s.group + i;
            n = tern__min(TERN__NARROW, tern__group_cols(m, &w->s, g) - i);
            tern__unpack_range(m, &w->s, row + r, g * w->s.group + i, n, t);
            for (j = 0; j < n; j++) score[r] += t[j] * ((grad[j] > 0.0f) - (grad[j] < 0.0f));
        }
}

/* The vote of scale number `at`, and what follows. Returns 0, 1 where the scale changed, 2 where it stays at its end. */
TERN__ANYWHERE int32_t tern__vote(const tern_flip_args *a, int64_t score, int64_t at)
{
    const int32_t fine = a->m.scale_type == TERN_LOG, least = fine ? (int32_t)TERN__LEAST_LOG : -126, most = fine ? INT16_MAX : 126;
    const int32_t scale = fine ? ((const int16_t *)a->m.scales)[at] : ((const int8_t *)a->m.scales)[at];
    int32_t v = a->votes[at] - a->scale_step * ((score > 0) - (score < 0)), s, next;
    if (scale < least) return 0; /* a scale of 0 */
    v = v > 127 ? 127 : v < -127 ? -127 : v;
    a->votes[at] = (int8_t)v;
    if (v < a->scale_theta && v > -a->scale_theta) return 0;
    s = v > 0 ? 1 : -1;
    next = scale + s * (fine ? a->scale_push : 1);
    next = next > most ? most : next < least ? least : next;
    a->votes[at] = (int8_t)(next == scale ? s * a->scale_theta : v - s * a->scale_theta);
    if (fine) ((int16_t *)a->m.scales)[at] = (int16_t)next;
    else ((int8_t *)a->m.scales)[at] = (int8_t)next;
    return next == scale ? 2 : 1;
}

static void tern__count_vote(tern_flips *count, int32_t event)
{
    count->scales += event == 1;
    count->ends += event == 2;
}

static void tern__vote_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__flip_work *w = (tern__flip_work *)(uintptr_t)job->arg;
    const tern_matrix *m = &w->a->m;
    int64_t panel, g, r;
    for (panel = begin; panel < end; panel++)
        for (g = 0; g < w->s.groups; g++) {
            const int64_t row = panel * TERN__ROWS, rows = tern__min(TERN__ROWS, m->rows - row), at = tern__scale_index(m, &w->s, row, g);
            int64_t score[TERN__ROWS] = {0};
            tern__score_group(w, row, rows, g, score);
            for (r = 0; r < rows; r++)
                if (m->grain == TERN_PER_TENSOR) w->score[bad - job->bad] += score[r];
                else tern__count_vote(&w->count[bad - job->bad], tern__vote(w->a, score[r], at + r));
        }
}

/* A group of a panel. */
static void tern__flip_group(const tern__kernels *k, const tern__flip_work *w, int64_t panel, int64_t g, tern_flips *count)
{
    const tern_matrix *m = &w->a->m;
    const int64_t row = panel * TERN__ROWS, rows = tern__min(TERN__ROWS, m->rows - row), blocks = tern__ceil_div(m->cols, 8);
    const int64_t cols = tern__group_cols(m, &w->s, g);
    uint8_t *unit = (uint8_t *)m->trits + panel * w->s.panel_bytes + g * w->s.group_units * TERN__UNIT;
    int8_t t[TERN__ROWS * TERN__NARROW];
    int32_t flipped[TERN__ROWS] = {0};
    int64_t i, j, r, n;
    for (i = 0; i < cols; i += n, unit += tern__ceil_div(n, w->s.unit) * TERN__UNIT) {
        const int64_t col = g * w->s.group + i, flips = count->flips;
        n = tern__min(TERN__NARROW, cols - i);
        for (j = 0; j < n; j += w->s.unit) tern__unpack_rows(m->encoding, unit + j / w->s.unit * TERN__UNIT, TERN__NARROW, t + j);
        for (r = 0; r < rows; r++) {
            const int64_t at = (row + r) * m->cols + col;
            int32_t events[2] = {0, 0};
            k->push(&w->push, (uint64_t)((row + r) * blocks + col / 8), col % 8, n, w->a->grad + at, w->a->accum + at,
                    t + r * TERN__NARROW, events);
            count->flips += events[0];
            count->saturated += events[1];
            flipped[r] |= events[0];
        }
        if (count->flips == flips) continue;
        for (j = 0; j < n; j += w->s.unit) tern__pack_unit(m->encoding, t + j, TERN__NARROW, unit + j / w->s.unit * TERN__UNIT);
    }
    for (r = 0; r < rows; r++) count->grains += flipped[r] != 0;
}

static void tern__flip_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__flip_work *w = (tern__flip_work *)(uintptr_t)job->arg;
    int64_t panel, g;
    for (panel = begin; panel < end; panel++)
        for (g = 0; g < w->s.groups; g++) tern__flip_group(job->k, w, panel, g, &w->count[bad - job->bad]);
}

/* What the weights of a step share; returns whether there is a step. */
TERN__ANYWHERE int32_t tern__push_of(const tern_flip_args *a, tern__push *p)
{
    const float mean = *a->sum_abs / ((float)a->m.rows * (float)a->m.cols);
    p->random.seed = a->seed;
    p->random.step = a->step;
    p->random.stream = a->stream;
    p->sign = a->rule == TERN_FLIP_SIGN;
    p->factor = p->sign ? a->sign_step : (int32_t)tern__round(256.0f * a->push);
    p->theta = a->theta;
    p->inverse = 256.0f / mean;
    return tern__finite(*a->sum_abs) && mean > 0.0f && (p->sign ? a->sign_step != 0 : tern__finite(p->inverse));
}

static tern_result tern__cpu_flip(tern_run *run, const tern_flip_args *a)
{
    tern__flip_work w;
    tern_flips all;
    int32_t i;
    memset(&w, 0, sizeof w);
    memset(&all, 0, sizeof all);
    w.a = a;
    w.s = tern__shape_of(&a->m);
    if (tern__push_of(a, &w.push)) {
        if (a->scale_step) tern__for(run, tern__vote_body, &w, w.s.panels, tern__mul(a->m.cols, 16 * 40));
        for (i = 1; i < TERN__WORKERS; i++) w.score[0] += w.score[i];
        if (a->scale_step && a->m.grain == TERN_PER_TENSOR) tern__count_vote(&w.count[0], tern__vote(a, w.score[0], 0));
        tern__for(run, tern__flip_body, &w, w.s.panels, tern__mul(a->m.cols, 16 * 40));
        for (i = 0; i < TERN__WORKERS; i++) {
            all.flips += w.count[i].flips;
            all.grains += w.count[i].grains;
            all.saturated += w.count[i].saturated;
            all.scales += w.count[i].scales;
            all.ends += w.count[i].ends;
        }
        if (a->m.grain == TERN_PER_TENSOR) all.grains = all.flips > 0;
        all.updates = 1;
    } else {
        if (!tern__finite(*a->sum_abs)) tern__set_fault(run, TERN__FAULT_FLIP, (int64_t)a->step);
        memset(a->grad, 0, sizeof(float) * (size_t)(a->m.rows * a->m.cols));
        all.skipped = 1;
    }
    if (!a->counts) return TERN_OK;
    a->counts->flips += all.flips;
    a->counts->grains += all.grains;
    a->counts->saturated += all.saturated;
    a->counts->scales += all.scales;
    a->counts->ends += all.ends;
    a->counts->updates += all.updates;
    a->counts->skipped += all.skipped;
    return TERN_OK;
}
#else
#define tern__cpu_round_i8 NULL
#define tern__cpu_dequantize NULL
#define tern__cpu_flip NULL
#define tern__cpu_matmul_dx NULL
#define tern__cpu_matmul_dw NULL
#define tern__cpu_optimize NULL
#define tern__cpu_scale_grad NULL
#endif

/* -- memory and the tables -- */

/* What float products pack, for each worker: not touched, and so hardly memory, before there is one. */
static tern_result tern__cpu_open(tern_run *r)
{
    const size_t bytes = sizeof(tern__work) * (size_t)r->parallel.workers + 63;
    r->state = r->allocator.alloc(r->allocator.user, bytes);
    TERN__REQUIRE(r, r->state, TERN_E_MEMORY, "open: no memory for %d bytes of working memory", (int64_t)bytes);
    return TERN_OK;
}
static void tern__cpu_close(tern_run *r) { r->allocator.free(r->allocator.user, r->state); }
static void *tern__cpu_alloc(tern_run *r, size_t bytes) { return tern__host_alloc(&r->allocator, bytes); }
static void tern__cpu_free(tern_run *r, void *p) { tern__host_free(&r->allocator, p); }
static tern_result tern__cpu_copy(tern_run *r, void *dst, const void *src, size_t bytes, tern_direction direction)
{
    (void)r;
    (void)direction;
    memmove(dst, src, bytes);
    return TERN_OK;
}
static tern_result tern__cpu_sync(tern_run *r) { (void)r; return TERN_OK; }

#ifndef TERN__CACHE /* the tests set less, so that small shapes go in parts too */
#define TERN__CACHE 524288
#endif
#define tern__cpu_hop NULL /* blocks of nodes that stay in cache do as well */
#define tern__cpu_hops NULL /* nothing is launched */
#define tern__cpu_moe NULL /* nothing is launched */
#define TERN__OP(op) tern__cpu_##op,
#define TERN__TABLE(suffix, text)                                                              \
    static const tern_backend tern__backend_##suffix = {                                       \
        text, &tern__kernels_##suffix, 0, tern__cpu_open, tern__cpu_close, tern__cpu_alloc,       \
        tern__cpu_free, tern__cpu_copy, tern__cpu_sync, TERN_OPS(TERN__OP) TERN_FUSED(TERN__OP) TERN__CACHE \
    };
TERN__TABLE(scalar, "scalar")
#define tern__table_scalar &tern__backend_scalar
#ifdef TERN__WITH_SSE41
TERN__TABLE(sse41, "sse4.1")
#define tern__table_sse41 &tern__backend_sse41
#else
#define tern__table_sse41 NULL
#endif
#ifdef TERN__WITH_AVX2
TERN__TABLE(avx2, "avx2")
#define tern__table_avx2 &tern__backend_avx2
#else
#define tern__table_avx2 NULL
#endif
#ifdef TERN__WITH_AVX_VNNI
TERN__TABLE(avx_vnni, "avx-vnni")
#define tern__table_avx_vnni &tern__backend_avx_vnni
#else
#define tern__table_avx_vnni NULL
#endif
#ifdef TERN__WITH_AVX512_VNNI
TERN__TABLE(avx512_vnni, "avx512-vnni")
#define tern__table_avx512_vnni &tern__backend_avx512_vnni
#else
#define tern__table_avx512_vnni NULL
#endif
#ifdef TERN__WITH_AVX512_VBMI
TERN__TABLE(avx512_vbmi, "avx512-vbmi")
#ifdef TERN__WITH_AVX512_BF16
TERN__TABLE(avx512_bf16, "avx512-vbmi") /* the same tier, where the machine has both */
#define tern__table_avx512_vbmi (tern__cpu_has_pairs(TERN_ISA_AVX512_VBMI) ? &tern__backend_avx512_bf16 : &tern__backend_avx512_vbmi)
#else
#define tern__table_avx512_vbmi &tern__backend_avx512_vbmi
#endif
#else
#define tern__table_avx512_vbmi NULL
#endif
#ifdef TERN__WITH_AMX_INT8
TERN__TABLE(amx_int8, "amx-int8")
TERN__TABLE(amx_bf16, "amx-int8") /* as above */
#define tern__table_amx_int8 (tern__cpu_has_pairs(TERN_ISA_AMX_INT8) ? &tern__backend_amx_bf16 : &tern__backend_amx_int8)
#else
#define tern__table_amx_int8 NULL
#endif
#undef TERN__TABLE
#undef TERN__OP

/* A tier this machine and build have, or NULL. */
TERN_API const tern_backend *tern_cpu_backend(tern_isa isa)
{
    const tern_backend *best = NULL, *tier;
#define TERN__TIER(name, suffix, text)                                    \
    tier = NULL;                                                          \
    if (tern__cpu_has(TERN_ISA_##name)) tier = tern__table_##suffix;      \
    if (tier) best = tier;                                                \
    if (isa == TERN_ISA_##name) return tier;
    TERN_TIERS(TERN__TIER)
#undef TERN__TIER
#undef tern__table_scalar
#undef tern__table_sse41
#undef tern__table_avx2
#undef tern__table_avx_vnni
#undef tern__table_avx512_vnni
#undef tern__table_avx512_vbmi
#undef tern__table_amx_int8
    return isa == TERN_ISA_BEST ? best : NULL;
}

/* The best tier that desc and environment allow. A named tier that is not here is an error, not a guess. */
static tern_result tern__choose(tern_run *r, tern_isa isa_max, const tern_backend **out)
{
    tern_isa isa = isa_max;
    TERN__REQUIRE(r, (int32_t)isa_max >= 0 && isa_max < TERN__ISA_END, TERN_E_ARGUMENT, "open: isa_max %d is not a tier", (int64_t)isa_max);
#ifndef TERNARY_NO_STDIO
    {
        const char *wanted = getenv("TERNARY_ISA");
        if (wanted && *wanted) {
            tern_isa named = TERN__ISA_END;
#define TERN__TIER(name, suffix, text) if (strcmp(wanted, text) == 0) named = TERN_ISA_##name;
            TERN_TIERS(TERN__TIER)
#undef TERN__TIER
#define TERN__TIER(name, suffix, text) " " text
            TERN__REQUIRE(r, named != TERN__ISA_END, TERN_E_ARGUMENT, "open: TERNARY_ISA=%s is not one of:" TERN_TIERS(TERN__TIER), wanted);
#undef TERN__TIER
            if (isa == TERN_ISA_BEST || named < isa) isa = named;
            TERN__REQUIRE(r, isa != named || tern_cpu_backend(named), TERN_E_UNSUPPORTED,
                          "open: TERNARY_ISA=%s is not supported by this machine or build", wanted);
        }
    }
#endif
    *out = tern_cpu_backend(isa);
    TERN__REQUIRE(r, *out, TERN_E_UNSUPPORTED, "open: tier %d is not supported by this machine or build", (int64_t)isa);
    return TERN_OK;
}

static tern_result tern__open_run(tern_run *r, const tern_context_desc *d, uint64_t layout)
{
    TERN__REQUIRE(r, layout == TERN_LAYOUT, TERN_E_VERSION, "open: the caller's ternary.h is another version than the implementation");
    TERN__REQUIRE(r, !d->allocator.alloc == !d->allocator.free, TERN_E_ARGUMENT, "open: set both alloc and free, or neither");
    TERN__REQUIRE(r, !d->parallel.run || (d->parallel.workers >= 1 && d->parallel.workers <= TERN__WORKERS), TERN_E_ARGUMENT,
                  "open: parallel.workers is %d; 1 to %d can be used", (int64_t)d->parallel.workers, (int64_t)TERN__WORKERS);
    r->allocator = d->allocator;
    r->parallel = d->parallel;
    if (!r->allocator.alloc) {
        r->allocator.alloc = tern__default_alloc;
        r->allocator.free = tern__default_free;
    }
    if (!r->parallel.run) r->parallel.workers = 1;
    r->backend = d->backend;
    return d->backend ? TERN_OK : tern__choose(r, d->isa_max, &r->backend);
}

TERN_API tern_result tern_open_checked(tern_context **out, const tern_context_desc *desc, tern_error *error, uint64_t layout)
{
    static const tern_context_desc defaults = TERN_ZERO;
    const tern_context_desc *d = desc ? desc : &defaults;
    tern_error ignored;
    tern_context *c = NULL;
    tern_result result;
    tern_run run;
    memset(&run, 0, sizeof run);
    if (!error) error = &ignored;
    memset(error, 0, sizeof *error);
    if (!out) return tern__set_error(error, TERN_E_ARGUMENT, "open: out is NULL");
    *out = NULL;
    result = tern__open_run(&run, d, layout);
    if (result == TERN_OK) {
        c = (tern_context *)tern__host_alloc(&run.allocator, sizeof *c);
        if (!c) result = tern__set_error(&run.error, TERN_E_MEMORY, "open: no memory for the context");
    }
    if (result != TERN_OK) {
        *error = run.error;
        return result;
    }
    c->run = run;
    result = run.backend->open(&c->run);
    if (result == TERN_OK) {
        result = tern_reserve(c, d->scratch > 64 ? d->scratch : 64); /* tern_model_step keeps its norm there */
        if (result != TERN_OK) run.backend->close(&c->run);
    }
    if (result != TERN_OK) {
        *error = c->run.error;
        tern__host_free(&run.allocator, c);
        return result;
    }
    *out = c;
    return TERN_OK;
}

TERN_API void tern_close(tern_context *c)
{
    tern_allocator allocator;
    if (!c) return;
    allocator = c->run.allocator;
    tern_free(c, c->scratch);
    c->run.backend->close(&c->run);
    tern__host_free(&allocator, c);
}

TERN_API tern_result tern_sync(tern_context *c)
{
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(c->run.backend->sync(&c->run));
    result = c->run.fault.code;
    if (result != TERN_OK) c->run.error = c->run.fault;
    c->run.fault.code = TERN_OK;
    return result;
}

/* -- checks, one per operation: everything that can be said before a byte is touched -- */

/* 4 where a 32-bit machine has 64-bit integers at any word. */
struct tern__int64_place { char before; int64_t at; };
enum { TERN__INT64_ALIGN = offsetof(struct tern__int64_place, at) };
static tern_result tern__check_pointer(tern_run *r, const char *op, const char *name, const void *p, int64_t align)
{
    TERN__REQUIRE(r, p, TERN_E_ARGUMENT, "%s: %s is NULL", op, name);
    TERN__REQUIRE(r, ((uintptr_t)p & (uintptr_t)(align - 1)) == 0, TERN_E_ALIGNMENT, "%s: %s is not aligned to %d bytes", op, name, align);
    return TERN_OK;
}

/* n items of `width` elements of at most 4 bytes. */
static tern_result tern__check_count(tern_run *r, const char *op, const char *name, int64_t n, int64_t width)
{
    TERN__REQUIRE(r, n > 0, TERN_E_SHAPE, "%s: %s = %d; it must be positive", op, name, n);
    TERN__REQUIRE(r, tern__fits(tern__mul(tern__mul(n, width), 4)), TERN_E_OVERFLOW, "%s: %s = %d x %d overflows", op, name, n, width);
    return TERN_OK;
}

static tern_result tern__check_float_type(tern_run *r, const char *op, tern_type type)
{
    TERN__REQUIRE(r, type == TERN_TYPE_DEFAULT || type == TERN_F32 || type == TERN_BF16 || type == TERN_F16, TERN_E_ARGUMENT,
                  "%s: type %d is not TERN_F32, TERN_BF16 or TERN_F16", op, (int64_t)type);
    return TERN_OK;
}

/* NEED: required pointer of 4-byte elements. MAY: the same, or NULL. */
#define TERN__NEED(op, field) TERN__TRY(tern__check_pointer(r, op, #field, a->field, 4))
#define TERN__MAY(op, field) do { if (a->field) TERN__NEED(op, field); } while (0)

/* Packed data and its scales, and the matrix they belong to. */
static tern_result tern__check_packed(tern_run *r, const char *op, const tern_matrix *m)
{
    TERN__TRY(tern__check_matrix(r, op, m));
    TERN__TRY(tern__check_pointer(r, op, "m.trits", m->trits, 1));
    return tern__check_pointer(r, op, "m.scales", m->scales, tern__type_bytes(m->scale_type));
}

/* Options that exclude each other; of an operation or a parameter. */
static tern_result tern__check_rule(tern_run *r, const char *name, tern_rule rule, const tern_matrix *m, float rho, float noise, float zone)
{
    TERN__REQUIRE(r, rule != TERN_LSQ || m->grain == TERN_PER_TENSOR, TERN_E_ARGUMENT,
                  "%s: rule lsq learns one scale for the tensor; a grain of %d has more", name, (int64_t)m->grain);
    TERN__REQUIRE(r, rule != TERN_SEQ || m->grain == TERN_PER_ROW, TERN_E_ARGUMENT,
                  "%s: rule seq learns a scale for each row; the grain is %d, not %d", name, (int64_t)m->grain, (int64_t)TERN_PER_ROW);
    TERN__REQUIRE(r, rho >= 0 && rho < 1, TERN_E_ARGUMENT, "%s: rho is not in [0, 1)", name);
    TERN__REQUIRE(r, rho == 0 || rule <= TERN_TWN, TERN_E_ARGUMENT,
                  "%s: rho averages scales taken from the weights; those of rule %d are not", name, (int64_t)(int32_t)rule);
    TERN__REQUIRE(r, rho == 0 || m->scale_type == TERN_TYPE_DEFAULT || m->scale_type == TERN_F32, TERN_E_ARGUMENT,
                  "%s: rho needs scales of TERN_F32, not of type %d", name, (int64_t)m->scale_type);
    TERN__REQUIRE(r, noise >= 0 && tern__finite(noise) && zone >= 0 && tern__finite(zone), TERN_E_ARGUMENT,
                  "%s: noise or zone is negative or not finite", name);
    return TERN_OK;
}

static tern_result tern__check_theta(tern_run *r, const char *op, const char *name, int32_t theta)
{
    TERN__REQUIRE(r, theta >= 2 && theta <= 127, TERN_E_ARGUMENT, "%s: %s is %d, not 2 to 127", op, name, (int64_t)theta);
    return TERN_OK;
}

static tern_result tern__check_ternarize(tern_run *r, const tern_ternarize_args *a)
{
    TERN__TRY(tern__check_packed(r, "ternarize", &a->m));
    TERN__REQUIRE(r, (int32_t)a->rule >= 0 && a->rule < TERN_DENSE, TERN_E_ARGUMENT,
                  "ternarize: rule %d does not ternarize", (int64_t)(int32_t)a->rule);
    TERN__TRY(tern__check_rule(r, "ternarize", a->rule, &a->m, a->rho, a->noise, a->zone));
    if (tern__is_learned(a->rule)) TERN__NEED("ternarize", alpha);
    if (a->accum) TERN__TRY(tern__check_theta(r, "ternarize", "theta", a->theta));
    TERN__TRY(tern__check_float_type(r, "ternarize", a->type));
    return tern__check_pointer(r, "ternarize", "w", a->w, tern__type_bytes(a->type));
}

static tern_result tern__check_pack(tern_run *r, const tern_pack_args *a)
{
    TERN__TRY(tern__check_matrix(r, "pack", &a->m));
    TERN__TRY(tern__check_pointer(r, "pack", "m.trits", a->m.trits, 1));
    return tern__check_pointer(r, "pack", "trits", a->trits, 1);
}

static tern_result tern__check_unpack(tern_run *r, const tern_unpack_args *a)
{
    TERN__TRY(tern__check_matrix(r, "unpack", &a->m));
    TERN__TRY(tern__check_pointer(r, "unpack", "m.trits", a->m.trits, 1));
    TERN__MAY("unpack", values);
    if (a->values) TERN__TRY(tern__check_packed(r, "unpack", &a->m));
    TERN__REQUIRE(r, a->row >= 0 && a->count > 0 && a->row < a->m.rows && a->count <= a->m.rows - a->row, TERN_E_SHAPE,
                  "unpack: rows %d to %d of %d", a->row, tern__add(a->row, a->count), a->m.rows);
    return TERN_OK;
}

static tern_result tern__check_act(tern_run *r, const char *op, tern_act act)
{
    TERN__REQUIRE(r, act == TERN_ACT_INT8 || act == TERN_ACT_INT4 || act == TERN_ACT_BIT, TERN_E_ARGUMENT,
                  "%s: act %d is not TERN_ACT_INT8, _INT4 or _BIT", op, (int64_t)(int32_t)act);
    return TERN_OK;
}

static tern_result tern__check_quantize(tern_run *r, const tern_quantize_args *a)
{
    tern_matrix m = a->m;
    m.rows = 1; /* not read */
    TERN__TRY(tern__check_matrix(r, "quantize", &m));
    TERN__TRY(tern__check_count(r, "quantize", "n", a->n, tern__shape_of(&m).stride));
    TERN__NEED("quantize", x);
    TERN__MAY("quantize", gain);
    TERN__TRY(tern__check_pointer(r, "quantize", "q", a->q, 1));
    TERN__NEED("quantize", scale);
    TERN__NEED("quantize", sum);
    TERN__REQUIRE(r, a->norm == TERN_NORM_NONE || (a->norm == TERN_NORM_RMS && a->eps > 0 && tern__finite(a->eps)), TERN_E_ARGUMENT,
                  "quantize: norm %d is unknown or its eps is not positive and finite", (int64_t)(int32_t)a->norm);
    TERN__TRY(tern__check_act(r, "quantize", a->act));
    TERN__REQUIRE(r, a->act != TERN_ACT_BIT || (a->norm == TERN_NORM_NONE && !a->gain), TERN_E_ARGUMENT,
                  "quantize: bits take neither norm nor gain");
    return TERN_OK;
}

static tern_result tern__check_matmul(tern_run *r, const tern_matmul_args *a)
{
    TERN__TRY(tern__check_packed(r, "matmul", &a->m));
    TERN__TRY(tern__check_count(r, "matmul", "n", a->n, a->m.rows));
    TERN__TRY(tern__check_count(r, "matmul", "n", a->n, tern__shape_of(&a->m).stride));
    if (a->q) {
        TERN__TRY(tern__check_act(r, "matmul", a->act));
        TERN__NEED("matmul", scale);
        TERN__NEED("matmul", sum);
    } else TERN__NEED("matmul", x);
    TERN__MAY("matmul", bias);
    TERN__NEED("matmul", y);
    return TERN_OK;
}

static tern_result tern__check_matmul_fixed(tern_run *r, const tern_matmul_fixed_args *a)
{
    TERN__TRY(tern__check_packed(r, "matmul_fixed", &a->m));
    TERN__REQUIRE(r, a->m.scale_type == TERN_LOG || a->m.scale_type == TERN_POW2, TERN_E_ARGUMENT,
                  "matmul_fixed: scales of type %d are floats; TERN_LOG and TERN_POW2 are not", (int64_t)(int32_t)a->m.scale_type);
    TERN__TRY(tern__check_count(r, "matmul_fixed", "n", a->n, a->m.rows));
    TERN__TRY(tern__check_count(r, "matmul_fixed", "n", a->n, a->m.cols));
    TERN__REQUIRE(r, a->point >= -31 && a->point <= 31, TERN_E_ARGUMENT, "matmul_fixed: point is %d, not -31 to 31", (int64_t)a->point);
    TERN__TRY(tern__check_pointer(r, "matmul_fixed", "x", a->x, 1));
    TERN__MAY("matmul_fixed", bias);
    TERN__NEED("matmul_fixed", y);
    return TERN_OK;
}

static tern_result tern__check_factors(tern_run *r, const char *op, tern_type type)
{
    TERN__REQUIRE(r, type == TERN_TYPE_DEFAULT || type == TERN_F32 || type == TERN_BF16, TERN_E_ARGUMENT,
                  "%s: factors of type %d, not TERN_F32 or TERN_BF16", op, (int64_t)(int32_t)type);
    return TERN_OK;
}

static tern_result tern__check_matmul_dx(tern_run *r, const tern_matmul_dx_args *a)
{
    TERN__TRY(tern__check_packed(r, "matmul_dx", &a->m));
    TERN__TRY(tern__check_count(r, "matmul_dx", "n", a->n, a->m.rows));
    TERN__TRY(tern__check_count(r, "matmul_dx", "n", a->n, a->m.cols));
    TERN__TRY(tern__check_factors(r, "matmul_dx", a->factors));
    TERN__NEED("matmul_dx", dy);
    TERN__NEED("matmul_dx", dx);
    return TERN_OK;
}

static tern_result tern__check_matmul_dw(tern_run *r, const tern_matmul_dw_args *a)
{
    TERN__TRY(tern__check_matrix(r, "matmul_dw", &a->m));
    TERN__TRY(tern__check_count(r, "matmul_dw", "n", a->n, a->m.rows));
    TERN__TRY(tern__check_count(r, "matmul_dw", "n", a->n, tern__shape_of(&a->m).stride));
    TERN__TRY(tern__check_factors(r, "matmul_dw", a->factors));
    TERN__NEED("matmul_dw", dy);
    TERN__MAY("matmul_dw", dw);
    TERN__MAY("matmul_dw", dbias);
    if (a->dw && a->q) TERN__TRY(tern__check_act(r, "matmul_dw", a->act));
    if (a->dw && a->q) TERN__NEED("matmul_dw", scale);
    if (a->dw && !a->q) TERN__NEED("matmul_dw", x);
    return TERN_OK;
}

static tern_result tern__check_dense(tern_run *r, const tern_dense_args *a)
{
    TERN__REQUIRE(r, a->k > 0 && a->n > 0, TERN_E_SHAPE, "dense: [%d x %d] * [%d x %d]; all must be positive", a->m, a->k, a->k, a->n);
    TERN__TRY(tern__check_count(r, "dense", "m", a->m, tern__add(a->k, a->n)));
    TERN__REQUIRE(r, a->a_row >= 0 && a->a_col >= 0 && a->b_row >= 0 && a->b_col >= 0 && a->c_row >= a->n, TERN_E_SHAPE,
                  "dense: strides must not be negative, and c_row = %d at least n = %d", a->c_row, a->n);
    TERN__TRY(tern__check_count(r, "dense", "m", a->m, tern__add(a->a_row, a->c_row)));
    TERN__TRY(tern__check_count(r, "dense", "n", a->n, a->b_col));
    TERN__TRY(tern__check_count(r, "dense", "k", a->k, tern__add(a->a_col, a->b_row)));
    TERN__TRY(tern__check_factors(r, "dense", a->factors));
    TERN__NEED("dense", a);
    TERN__NEED("dense", b);
    TERN__MAY("dense", bias);
    TERN__NEED("dense", c);
    return TERN_OK;
}

static tern_result tern__check_dense_i8(tern_run *r, const tern_dense_i8_args *a)
{
    TERN__REQUIRE(r, a->k > 0 && a->n > 0, TERN_E_SHAPE, "dense_i8: [%d x %d] * [%d x %d]; all must be positive", a->m, a->k, a->k, a->n);
    TERN__REQUIRE(r, a->k <= TERN__I8_MOST_K, TERN_E_SHAPE,
                  "dense_i8: k = %d exceeds %d, the limit of exact int32 sums", a->k, (int64_t)TERN__I8_MOST_K);
    TERN__TRY(tern__check_count(r, "dense_i8", "m", a->m, tern__add(a->k, a->n)));
    TERN__REQUIRE(r, a->a_row >= 0 && a->a_col >= 0 && a->b_row >= 0 && a->b_col >= 0 && a->c_row >= a->n, TERN_E_SHAPE,
                  "dense_i8: strides must not be negative, and c_row = %d at least n = %d", a->c_row, a->n);
    TERN__TRY(tern__check_count(r, "dense_i8", "m", a->m, tern__add(a->a_row, a->c_row)));
    TERN__TRY(tern__check_count(r, "dense_i8", "n", a->n, a->b_col));
    TERN__TRY(tern__check_count(r, "dense_i8", "k", a->k, tern__add(a->a_col, a->b_row)));
    TERN__TRY(tern__check_pointer(r, "dense_i8", "a", a->a, 1));
    TERN__TRY(tern__check_pointer(r, "dense_i8", "b", a->b, 1));
    TERN__NEED("dense_i8", c);
    return TERN_OK;
}

static tern_result tern__check_gather(tern_run *r, const tern_gather_args *a)
{
    if (a->m.trits) TERN__TRY(tern__check_packed(r, "gather", &a->m));
    else {
        TERN__TRY(tern__check_count(r, "gather", "cols", a->m.cols, 1));
        TERN__TRY(tern__check_count(r, "gather", "rows", a->m.rows, a->m.cols));
        TERN__NEED("gather", w);
    }
    TERN__TRY(tern__check_count(r, "gather", "n", a->n, a->m.cols));
    TERN__NEED("gather", ids);
    TERN__MAY("gather", weight);
    TERN__NEED("gather", y);
    return TERN_OK;
}

static tern_result tern__check_scatter(tern_run *r, const tern_scatter_args *a)
{
    TERN__TRY(tern__check_count(r, "scatter", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "scatter", "rows", a->rows, a->cols));
    TERN__TRY(tern__check_count(r, "scatter", "n", a->n, a->cols));
    TERN__NEED("scatter", ids);
    TERN__MAY("scatter", weight);
    TERN__NEED("scatter", dy);
    TERN__NEED("scatter", dw);
    return TERN_OK;
}

/* n tokens that choose k of `count` experts. */
static tern_result tern__check_choice(tern_run *r, const char *op, int64_t n, int64_t count, int64_t k)
{
    TERN__REQUIRE(r, count > 0 && count <= TERN__MAX_EXPERTS, TERN_E_SHAPE,
                  "%s: %d experts; 1 to %d can be routed to", op, count, (int64_t)TERN__MAX_EXPERTS);
    TERN__REQUIRE(r, k > 0 && k <= count, TERN_E_SHAPE, "%s: k = %d of %d experts", op, k, count);
    TERN__TRY(tern__check_count(r, op, "n", n, count));
    TERN__REQUIRE(r, tern__mul(n, count) <= INT32_MAX, TERN_E_OVERFLOW, "%s: n = %d x %d experts is beyond int32", op, n, count);
    return TERN_OK;
}

static tern_result tern__check_route(tern_run *r, const tern_route_args *a)
{
    TERN__TRY(tern__check_choice(r, "route", a->n, a->count, a->k));
    TERN__REQUIRE(r, (int32_t)a->kind >= 0 && a->kind <= TERN_ROUTE_ALL, TERN_E_ARGUMENT,
                  "route: kind %d is unknown", (int64_t)(int32_t)a->kind);
    TERN__REQUIRE(r, tern__finite(a->balance), TERN_E_ARGUMENT, "route: balance is not finite");
    TERN__NEED("route", logits);
    TERN__NEED("route", ids);
    TERN__NEED("route", weights);
    TERN__MAY("route", dweights);
    TERN__MAY("route", loads);
    if (a->dweights) TERN__NEED("route", dlogits);
    return TERN_OK;
}

static tern_result tern__check_group(tern_run *r, const tern_group_args *a)
{
    TERN__TRY(tern__check_choice(r, "group", a->n, a->count, a->k));
    TERN__NEED("group", ids);
    TERN__MAY("group", sorted);
    if (a->sorted) TERN__NEED("group", weights);
    TERN__NEED("group", loads);
    TERN__NEED("group", tokens);
    TERN__NEED("group", slots);
    return TERN_OK;
}

static tern_result tern__check_row_dot(tern_run *r, const tern_row_dot_args *a)
{
    TERN__TRY(tern__check_count(r, "row_dot", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "row_dot", "rows", a->rows, a->cols));
    TERN__TRY(tern__check_count(r, "row_dot", "n", a->n, a->cols));
    TERN__TRY(tern__check_count(r, "row_dot", "count", a->count, 1));
    TERN__NEED("row_dot", a);
    TERN__NEED("row_dot", b);
    TERN__NEED("row_dot", ids);
    TERN__NEED("row_dot", to);
    TERN__NEED("row_dot", y);
    return TERN_OK;
}

static tern_result tern__check_aggregate(tern_run *r, const tern_aggregate_args *a)
{
    const tern_adjacency *e = &a->edges;
    TERN__TRY(tern__check_count(r, "aggregate", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "aggregate", "rows", e->rows, a->cols));
    TERN__TRY(tern__check_count(r, "aggregate", "sources", e->sources, tern__max(a->cols, a->q ? a->q_row : 0)));
    TERN__REQUIRE(r, e->count >= 0 && e->first >= 0 && e->hubs >= 0 && e->parts >= e->hubs && tern__fits(tern__mul(e->count, 4))
                     && tern__fits(tern__mul(tern__mul(e->parts, a->cols), 4)), TERN_E_SHAPE,
                  "aggregate: %d edges, %d hubs and %d parts", e->count, e->hubs, e->parts);
    TERN__TRY(tern__check_pointer(r, "aggregate", "edges.start", e->start, TERN__INT64_ALIGN));
    if (e->count) TERN__TRY(tern__check_pointer(r, "aggregate", "edges.entry", e->entry, 4));
    if (e->hubs) {
        TERN__TRY(tern__check_pointer(r, "aggregate", "edges.hub", e->hub, 4));
        TERN__TRY(tern__check_pointer(r, "aggregate", "edges.part", e->part, TERN__INT64_ALIGN));
        TERN__NEED("aggregate", part);
    }
    TERN__MAY("aggregate", left);
    TERN__MAY("aggregate", right);
    if (a->q) {
        TERN__REQUIRE(r, a->q_row >= a->cols && a->q_row % 16 == 0, TERN_E_SHAPE,
                      "aggregate: q_row = %d; it must be a multiple of 16, at least cols = %d", a->q_row, a->cols);
        TERN__NEED("aggregate", scale);
    } else TERN__NEED("aggregate", x);
    TERN__NEED("aggregate", y);
    return TERN_OK;
}

static tern_result tern__check_gate(tern_run *r, const tern_gate_args *a)
{
    TERN__TRY(tern__check_count(r, "gate", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "gate", "count", a->count, a->cols));
    TERN__TRY(tern__check_count(r, "gate", "n", a->n, a->count * a->cols));
    TERN__NEED("gate", h);
    TERN__NEED("gate", key);
    TERN__NEED("gate", value);
    TERN__NEED("gate", gate);
    if (!a->dy) TERN__NEED("gate", y);
    if (a->dy) {
        TERN__NEED("gate", dy);
        TERN__NEED("gate", dh);
        TERN__NEED("gate", dkey);
        TERN__NEED("gate", dvalue);
    }
    return TERN_OK;
}

static tern_result tern__check_nearest(tern_run *r, const tern_nearest_args *a)
{
    TERN__TRY(tern__check_count(r, "nearest", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "nearest", "rows", a->rows, a->cols));
    TERN__REQUIRE(r, a->rows <= INT32_MAX, TERN_E_OVERFLOW, "nearest: rows = %d is beyond int32", a->rows);
    TERN__TRY(tern__check_count(r, "nearest", "n", a->n, a->cols));
    TERN__NEED("nearest", x);
    TERN__NEED("nearest", w);
    TERN__NEED("nearest", ids);
    TERN__MAY("nearest", distance);
    return TERN_OK;
}

static tern_result tern__check_fill(tern_run *r, const tern_fill_args *a)
{
    TERN__TRY(tern__check_count(r, "fill", "count", a->count, 1));
    TERN__NEED("fill", x);
    TERN__REQUIRE(r, a->deviation >= 0 && tern__finite(a->deviation), TERN_E_ARGUMENT, "fill: the deviation is negative or not finite");
    return TERN_OK;
}

static tern_result tern__check_cast(tern_run *r, const tern_cast_args *a)
{
    TERN__TRY(tern__check_count(r, "cast", "count", a->count, 1));
    TERN__TRY(tern__check_float_type(r, "cast", a->from));
    TERN__TRY(tern__check_float_type(r, "cast", a->to));
    TERN__TRY(tern__check_pointer(r, "cast", "src", a->src, tern__type_bytes(a->from)));
    return tern__check_pointer(r, "cast", "dst", a->dst, tern__type_bytes(a->to));
}

static tern_result tern__check_map(tern_run *r, const tern_map_args *a)
{
    const int32_t two = a->fn == TERN_MAP_ADD || a->fn == TERN_MAP_MUL;
    TERN__REQUIRE(r, (int32_t)a->fn >= 0 && a->fn <= TERN_MAP_GELU, TERN_E_ARGUMENT,
                  "map: function %d is unknown", (int64_t)(int32_t)a->fn);
    TERN__TRY(tern__check_count(r, "map", "count", a->count, 1));
    if (!a->dy || a->fn == TERN_MAP_MUL || a->fn >= TERN_MAP_RELU) TERN__NEED("map", a);
    if ((!a->dy && two) || a->fn == TERN_MAP_MUL) TERN__NEED("map", b);
    if (!a->dy) TERN__NEED("map", y);
    if (a->dy) {
        TERN__NEED("map", dy);
        if (!two) TERN__NEED("map", da);
        TERN__MAY("map", da);
        TERN__MAY("map", db);
    }
    return TERN_OK;
}

static tern_result tern__check_norm(tern_run *r, const tern_norm_args *a)
{
    TERN__TRY(tern__check_count(r, "norm", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "norm", "n", a->n, a->cols));
    TERN__REQUIRE(r, a->eps > 0 && tern__finite(a->eps), TERN_E_ARGUMENT, "norm: eps must be positive and finite");
    TERN__NEED("norm", x);
    TERN__MAY("norm", gain);
    TERN__MAY("norm", dy);
    TERN__MAY("norm", dx);
    TERN__MAY("norm", dgain);
    if (!a->dy) TERN__NEED("norm", y);
    return TERN_OK;
}

static tern_result tern__check_rope(tern_run *r, const tern_rope_args *a)
{
    TERN__REQUIRE(r, a->dim > 0 && a->dim % 2 == 0 && a->dim <= TERN__MAX_HEAD, TERN_E_SHAPE,
                  "rope: dim = %d; it must be even, 2 to %d", (int64_t)a->dim, (int64_t)TERN__MAX_HEAD);
    TERN__TRY(tern__check_count(r, "rope", "heads", a->heads, a->dim));
    TERN__REQUIRE(r, a->stride >= (int64_t)a->heads * a->dim, TERN_E_SHAPE,
                  "rope: stride %d is below heads x dim = %d", a->stride, (int64_t)a->heads * a->dim);
    TERN__TRY(tern__check_count(r, "rope", "n", a->n, a->stride));
    TERN__REQUIRE(r, a->start >= 0 && a->period > 0 && a->start <= ((int64_t)1 << 24) - tern__min(a->period, a->n), TERN_E_ARGUMENT,
                  "rope: start %d and period %d leave positions outside 0 .. 2^24", a->start, a->period);
    TERN__REQUIRE(r, a->base == 0.0f || (a->base >= 1.0f && tern__finite(a->base)), TERN_E_ARGUMENT,
                  "rope: base is neither 0 nor a finite number from 1 on");
    TERN__NEED("rope", x);
    return TERN_OK;
}

static tern_result tern__check_attention(tern_run *r, const tern_attention_args *a)
{
    TERN__REQUIRE(r, a->heads > 0 && a->kv_heads > 0 && a->heads % a->kv_heads == 0, TERN_E_SHAPE,
                  "attention: %d heads cannot share %d key heads", (int64_t)a->heads, (int64_t)a->kv_heads);
    TERN__REQUIRE(r, a->dim > 0 && a->dim <= TERN__MAX_HEAD, TERN_E_SHAPE,
                  "attention: dim = %d; 1 to %d can be used", (int64_t)a->dim, (int64_t)TERN__MAX_HEAD);
    TERN__REQUIRE(r, a->queries > 0 && a->queries <= a->keys, TERN_E_SHAPE, "attention: %d queries over %d keys", a->queries, a->keys);
    TERN__REQUIRE(r, a->q_stride >= (int64_t)a->heads * a->dim && a->k_stride >= (int64_t)a->kv_heads * a->dim
                     && a->v_stride >= (int64_t)a->kv_heads * a->dim, TERN_E_SHAPE,
                  "attention: strides %d, %d, %d are below heads x dim", a->q_stride, a->k_stride, a->v_stride);
    TERN__TRY(tern__check_count(r, "attention", "batch", a->batch,
                                tern__mul(a->keys, tern__add(a->q_stride, tern__add(a->k_stride, a->v_stride)))));
    TERN__TRY(tern__check_count(r, "attention", "batch", a->batch, tern__mul(a->heads, tern__mul(a->queries, a->keys))));
    TERN__NEED("attention", q);
    TERN__NEED("attention", k);
    TERN__NEED("attention", v);
    TERN__NEED("attention", y);
    TERN__NEED("attention", p);
    if (a->dy) {
        TERN__NEED("attention", dy);
        TERN__NEED("attention", dq);
        TERN__NEED("attention", dk);
        TERN__NEED("attention", dv);
    }
    return TERN_OK;
}

static tern_result tern__check_loss(tern_run *r, const tern_loss_args *a)
{
    TERN__TRY(tern__check_count(r, "loss", "classes", a->classes, 1));
    TERN__TRY(tern__check_count(r, "loss", "n", a->n, a->classes));
    TERN__NEED("loss", logits);
    TERN__NEED("loss", targets);
    TERN__NEED("loss", losses);
    TERN__MAY("loss", dlogits);
    return TERN_OK;
}

static tern_result tern__check_sum(tern_run *r, const tern_sum_args *a)
{
    TERN__REQUIRE(r, (int32_t)a->kind >= 0 && a->kind <= TERN_SUM_SQUARES, TERN_E_ARGUMENT,
                  "sum: kind %d is unknown", (int64_t)(int32_t)a->kind);
    TERN__TRY(tern__check_count(r, "sum", "count", a->count, 1));
    TERN__TRY(tern__check_float_type(r, "sum", a->type));
    TERN__TRY(tern__check_pointer(r, "sum", "x", a->x, tern__type_bytes(a->type)));
    TERN__NEED("sum", y);
    return TERN_OK;
}

static tern_result tern__check_optimize(tern_run *r, const tern_optimize_args *a)
{
    TERN__TRY(tern__check_count(r, "optimize", "count", a->count, 1));
    TERN__REQUIRE(r, a->kind == TERN_ADAMW || a->kind == TERN_SGD, TERN_E_ARGUMENT,
                  "optimize: optimizer %d is unknown", (int64_t)(int32_t)a->kind);
    TERN__REQUIRE(r, a->type == TERN_TYPE_DEFAULT || a->type == TERN_F32 || a->type == TERN_BF16, TERN_E_ARGUMENT,
                  "optimize: weights of type %d; TERN_F32 or TERN_BF16 can be trained", (int64_t)(int32_t)a->type);
    TERN__REQUIRE(r, a->moment_type == TERN_TYPE_DEFAULT || a->moment_type == TERN_F32 || a->moment_type == TERN_BF16, TERN_E_ARGUMENT,
                  "optimize: moments of type %d, not TERN_F32 or TERN_BF16", (int64_t)(int32_t)a->moment_type);
    TERN__REQUIRE(r, a->rate >= 0 && tern__finite(a->rate) && a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 && a->beta2 < 1 &&
                  (a->kind == TERN_SGD || a->eps > 0) && tern__finite(a->decay) && a->step > 0, TERN_E_ARGUMENT,
                  "optimize: rate, betas, eps or decay out of range at step %d (counted from 1)", (int64_t)a->step);
    TERN__TRY(tern__check_pointer(r, "optimize", "w", a->w, tern__type_bytes(a->type)));
    TERN__NEED("optimize", grad);
    TERN__MAY("optimize", norm2);
    if (a->moment1 || a->kind == TERN_ADAMW)
        TERN__TRY(tern__check_pointer(r, "optimize", "moment1", a->moment1, tern__type_bytes(a->moment_type)));
    if (a->kind == TERN_ADAMW) TERN__TRY(tern__check_pointer(r, "optimize", "moment2", a->moment2, tern__type_bytes(a->moment_type)));
    return TERN_OK;
}

static tern_result tern__check_scale_grad(tern_run *r, const tern_scale_grad_args *a)
{
    TERN__TRY(tern__check_packed(r, "scale_grad", &a->m));
    TERN__REQUIRE(r, tern__is_learned(a->rule), TERN_E_ARGUMENT, "scale_grad: rule %d has no learned scale", (int64_t)(int32_t)a->rule);
    TERN__TRY(tern__check_rule(r, "scale_grad", a->rule, &a->m, 0.0f, 0.0f, 0.0f));
    TERN__TRY(tern__check_float_type(r, "scale_grad", a->type));
    TERN__TRY(tern__check_pointer(r, "scale_grad", "w", a->w, tern__type_bytes(a->type)));
    TERN__NEED("scale_grad", dw);
    TERN__NEED("scale_grad", dalpha);
    return TERN_OK;
}

static tern_result tern__check_hadamard(tern_run *r, const tern_hadamard_args *a)
{
    TERN__REQUIRE(r, a->cols <= TERN__MAX_COLS, TERN_E_SHAPE, "hadamard: rows of %d; %d is the most", a->cols, (int64_t)TERN__MAX_COLS);
    TERN__TRY(tern__check_count(r, "hadamard", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "hadamard", "n", a->n, a->cols));
    TERN__NEED("hadamard", x);
    TERN__NEED("hadamard", y);
    return TERN_OK;
}

static tern_result tern__check_dead_zone(tern_run *r, const tern_dead_zone_args *a)
{
    TERN__TRY(tern__check_matrix(r, "dead_zone", &a->m));
    TERN__TRY(tern__check_pointer(r, "dead_zone", "m.trits", a->m.trits, 1));
    TERN__TRY(tern__check_float_type(r, "dead_zone", a->type));
    TERN__REQUIRE(r, tern__finite(a->lambda), TERN_E_ARGUMENT, "dead_zone: lambda is not finite");
    TERN__MAY("dead_zone", bias);
    TERN__MAY("dead_zone", dw);
    if (a->bias) TERN__TRY(tern__check_pointer(r, "dead_zone", "w", a->w, tern__type_bytes(a->type)));
    if (a->dw) TERN__NEED("dead_zone", dbias);
    return TERN_OK;
}

static tern_result tern__check_round_i8(tern_run *r, const tern_round_i8_args *a)
{
    TERN__TRY(tern__check_count(r, "round_i8", "cols", a->cols, 1));
    TERN__TRY(tern__check_count(r, "round_i8", "n", a->n, a->cols));
    TERN__NEED("round_i8", x);
    TERN__MAY("round_i8", row);
    if (a->m.scales) {
        TERN__TRY(tern__check_matrix(r, "round_i8", &a->m));
        TERN__TRY(tern__check_pointer(r, "round_i8", "m.scales", a->m.scales, tern__type_bytes(a->m.scale_type)));
        TERN__REQUIRE(r, a->m.rows == a->cols && a->group >= 0 && a->group < tern__shape_of(&a->m).groups, TERN_E_SHAPE,
                      "round_i8: scales of %d rows for %d columns, group %d of %d", a->m.rows, a->cols, a->group,
                      tern__shape_of(&a->m).groups);
    }
    TERN__TRY(tern__check_pointer(r, "round_i8", "q", a->q, 1));
    TERN__NEED("round_i8", scale);
    return TERN_OK;
}

static tern_result tern__check_dequantize(tern_run *r, const tern_dequantize_args *a)
{
    TERN__TRY(tern__check_count(r, "dequantize", "cols", a->cols, 1));
    TERN__REQUIRE(r, a->y_row >= a->cols, TERN_E_SHAPE, "dequantize: y_row = %d is below cols = %d", a->y_row, a->cols);
    TERN__TRY(tern__check_count(r, "dequantize", "n", a->n, a->y_row));
    TERN__NEED("dequantize", x);
    TERN__NEED("dequantize", scale);
    TERN__NEED("dequantize", y);
    return TERN_OK;
}

static tern_result tern__check_flip(tern_run *r, const tern_flip_args *a)
{
    TERN__TRY(tern__check_packed(r, "flip", &a->m));
    TERN__REQUIRE(r, a->rule == TERN_FLIP_PROPORTIONAL || a->rule == TERN_FLIP_SIGN, TERN_E_ARGUMENT,
                  "flip: rule %d is unknown", (int64_t)(int32_t)a->rule);
    TERN__NEED("flip", grad);
    TERN__TRY(tern__check_pointer(r, "flip", "accum", a->accum, 1));
    TERN__NEED("flip", sum_abs);
    TERN__TRY(tern__check_theta(r, "flip", "theta", a->theta));
    TERN__REQUIRE(r, a->push >= 0.0f && a->push <= 127.0f, TERN_E_ARGUMENT, "flip: push is not in 0 to 127");
    TERN__REQUIRE(r, a->sign_step >= 0 && a->sign_step <= 127, TERN_E_ARGUMENT,
                  "flip: sign_step is %d, not 0 to 127", (int64_t)a->sign_step);
    TERN__REQUIRE(r, a->scale_step >= 0 && a->scale_step <= 127, TERN_E_ARGUMENT,
                  "flip: scale_step is %d, not 0 to 127", (int64_t)a->scale_step);
    if (a->scale_step) {
        TERN__TRY(tern__check_theta(r, "flip", "scale_theta", a->scale_theta));
        TERN__REQUIRE(r, (a->m.scale_type == TERN_POW2 || a->m.scale_type == TERN_LOG) && a->votes, TERN_E_ARGUMENT,
                      "flip: scales learn as TERN_POW2 or TERN_LOG with votes; theirs is type %d", (int64_t)(int32_t)a->m.scale_type);
        TERN__REQUIRE(r, a->m.scale_type != TERN_LOG || (a->scale_push >= 1 && a->scale_push <= 256), TERN_E_ARGUMENT,
                      "flip: scale_push is %d, not 1 to 256", (int64_t)a->scale_push);
    }
    return a->counts ? tern__check_pointer(r, "flip", "counts", a->counts, TERN__INT64_ALIGN) : TERN_OK;
}

#define TERN__PUBLIC(op)                                                                                            \
    static tern_result tern__checked_##op(tern_context *c, const tern_##op##_args *a)                               \
    {                                                                                                               \
        if (!c) return TERN_E_ARGUMENT;                                                                             \
        TERN__REQUIRE(&c->run, a, TERN_E_ARGUMENT, #op ": args is NULL");                                           \
        TERN__TRY(tern__check_##op(&c->run, a));                                                                    \
        TERN__REQUIRE(&c->run, c->run.backend->op, TERN_E_UNSUPPORTED, "%s has no operation " #op, c->run.backend->name); \
        return c->run.backend->op(&c->run, a);                                                                      \
    }                                                                                                               \
    TERN_API tern_result tern_##op(tern_context *c, const tern_##op##_args *a)                                      \
    {                                                                                                               \
        const tern__fp_mode mode = tern__fp_enter();                                                                \
        const tern_result result = tern__checked_##op(c, a);                                                        \
        tern__fp_leave(mode);                                                                                       \
        return result;                                                                                              \
    }
TERN_OPS(TERN__PUBLIC)
#undef TERN__PUBLIC

/* For layers: the fused operation, or what it is made of. */
static tern_result tern__run_linear(tern_context *c, const tern_linear_args *a)
{
    const tern_matmul_args m = tern__linear_product(a);
    if (c->run.backend->linear) {
        const tern__fp_mode mode = tern__fp_enter();
        tern_result result = tern__check_quantize(&c->run, &a->quantize);
        if (result == TERN_OK) result = tern__check_matmul(&c->run, &m);
        if (result == TERN_OK) result = c->run.backend->linear(&c->run, a);
        tern__fp_leave(mode);
        return result;
    }
    TERN__TRY(tern_quantize(c, &a->quantize));
    return tern_matmul(c, &m);
}

#ifndef TERNARY_NO_MOE
/* Where the backend has it. */
static tern_result tern__run_grouped(tern_context *c, const tern_grouped_args *a)
{
    const tern__fp_mode mode = tern__fp_enter();
    const tern_result result = c->run.backend->grouped(&c->run, a);
    tern__fp_leave(mode);
    return result;
}
#endif

#if !defined(TERNARY_NO_GRAPH) && !defined(TERNARY_NO_THREADS) /* as the pool it needs atomics */
#define TERN__TURNS 1
/* -- blocks of rows: each goes through several operations on one thread, whichever is free, so that threads wait for each
   other once and not at every operation. For the CPU, whose operations share nothing but what they read -- */

/* c is the thread's own: without a pool, and its scratch is no other's. worker is the thread's number. */
typedef tern_result tern__turn(tern_context *c, const void *arg, int64_t block, int64_t worker);

typedef struct tern__turns {
    const tern_context *c;
    tern__turn *turn;
    const void *arg;
    size_t scratch;                                        /* bytes of each thread, from scratch_base on */
    int32_t next, end;                                     /* next: atomic */
    int32_t failed[TERN__WORKERS], faulted[TERN__WORKERS]; /* each thread's first block with an error, and with a fault */
    tern_result result[TERN__WORKERS];                     /* the error's; only some set a text */
    tern_error error[TERN__WORKERS], fault[TERN__WORKERS];
} tern__turns;

static void tern__turns_body(tern__job *job, int64_t begin, int64_t end, int64_t *bad)
{
    tern__turns *t = (tern__turns *)(uintptr_t)job->arg;
    tern_context own = *t->c;
    int32_t block;
    (void)end;
    (void)bad;
    own.run.parallel.run = NULL;
    own.run.parallel.workers = 1;
    own.run.state = tern__first_work(job->state) + begin;
    own.run.fault.code = TERN_OK;
    own.scratch_base += (size_t)begin * t->scratch;
    while (t->failed[begin] == INT32_MAX && (block = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->end) {
        t->result[begin] = t->turn(&own, t->arg, block, begin);
        if (t->result[begin] != TERN_OK) t->failed[begin] = block;
        if (own.run.fault.code != TERN_OK && t->faulted[begin] == INT32_MAX) t->faulted[begin] = block;
    }
    t->error[begin] = own.run.error;
    t->fault[begin] = own.run.fault;
}

/* Blocks [begin, end). Errors and faults are those of the first block that has one, whoever took it; no fault is from behind an error. */
static tern_result tern__take_turns(tern_context *c, tern__turn *turn, const void *arg, int64_t begin, int64_t end,
                                    size_t scratch, int64_t cost)
{
    const int32_t workers = c->run.parallel.workers;
    int32_t i, failed = 0, faulted = 0;
    tern__turns t;
    t.c = c;
    t.turn = turn;
    t.arg = arg;
    t.scratch = scratch;
    t.next = (int32_t)begin;
    t.end = (int32_t)end;
    for (i = 0; i < workers; i++) t.failed[i] = t.faulted[i] = INT32_MAX;
    tern__for(&c->run, tern__turns_body, &t, workers, tern__mul(end - begin, cost) / workers);
    for (i = 1; i < workers; i++) {
        if (t.failed[i] < t.failed[failed]) failed = i;
        if (t.faulted[i] < t.faulted[faulted]) faulted = i;
    }
    if (c->run.fault.code == TERN_OK && t.faulted[faulted] != INT32_MAX && t.faulted[faulted] <= t.failed[failed])
        c->run.fault = t.fault[faulted];
    if (t.failed[failed] == INT32_MAX) return TERN_OK;
    c->run.error = t.error[failed];
    return t.result[failed];
}
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-15] Parameters and BitLinear
   What enters: the caller's tern_param structs. What leaves: filled buffers, and BitLinear composed of
   quantize, matmul and their backward twins. Nothing here touches backend memory directly.
   ------------------------------------------------------------------------------------------------ */

TERN_API tern_matrix tern_param_matrix(const tern_param *p)
{
    tern_matrix m;
    m.rows = p->rows;
    m.cols = p->cols;
    m.grain = p->grain;
    m.encoding = p->buffer[TERN_TRITS].type == TERN_BASE3 ? TERN_BASE3 : TERN_2BIT;
    m.scale_type = p->buffer[TERN_SCALES].type;
    if (!tern__is_scale_type(m.scale_type)) m.scale_type = TERN_F32;
    m.trits = p->buffer[TERN_TRITS].data;
    m.scales = p->buffer[TERN_SCALES].data;
    return m;
}

static const char *const tern__buffer_names[TERN_BUFFERS] = {"trits", "scales", "shadow", "gradient", "first moment", "second moment",
                                                             "accumulator", "votes"};

/* The type that a buffer is read as. */
static tern_type tern__buffer_type(const tern_param *p, int32_t which)
{
    const tern_matrix m = tern_param_matrix(p);
    if (which == TERN_TRITS) return m.encoding;
    if (which == TERN_SCALES) return m.scale_type;
    if (which >= TERN_ACCUM) return TERN_I8;
    if (which != TERN_GRAD && p->buffer[which].type == TERN_BF16) return TERN_BF16;
    return TERN_F32;
}

/* Trained without floats that last. */
static int32_t tern__is_integer(const tern_param *p) { return p->buffer[TERN_ACCUM].data != NULL; }
static int32_t tern__theta(const tern_param *p) { return p->theta ? p->theta : 32; }

/* What an accumulator excludes; buffers: those that are there or asked for. */
static tern_result tern__check_integer(tern_run *r, const tern_param *p, int32_t buffers)
{
    if (p->theta) TERN__TRY(tern__check_theta(r, p->name, "theta", p->theta));
    if (!(buffers >> TERN_ACCUM & 1)) return TERN_OK;
    TERN__REQUIRE(r, p->rule != TERN_DENSE, TERN_E_ARGUMENT, "%s: a dense parameter has no accumulator", p->name);
    TERN__REQUIRE(r, !(buffers >> TERN_SHADOW & 1), TERN_E_ARGUMENT, "%s: a shadow and an accumulator exclude each other", p->name);
    TERN__REQUIRE(r, !tern__is_learned(p->rule), TERN_E_ARGUMENT, "%s: a learned scale and an accumulator exclude each other", p->name);
    TERN__REQUIRE(r, !p->dead, TERN_E_ARGUMENT, "%s: a dead zone needs a shadow, which an accumulator excludes", p->name);
    TERN__REQUIRE(r, !p->sync, TERN_E_ARGUMENT,
                  "%s: a shared scale (sync %d) and an accumulator exclude each other", p->name, (int64_t)p->sync);
    return TERN_OK;
}

static int32_t tern__buffers_of(const tern_param *p)
{
    int32_t i, mask = 0;
    for (i = 0; i < TERN_BUFFERS; i++) mask |= (p->buffer[i].data != NULL) << i;
    return mask;
}

static tern_result tern__check_param(tern_context *c, const tern_param *p)
{
    tern_matrix m;
    tern_run *r;
    int32_t i;
    if (!c) return TERN_E_ARGUMENT;
    r = &c->run;
    TERN__REQUIRE(r, p, TERN_E_ARGUMENT, "a parameter is NULL");
    TERN__REQUIRE(r, memchr(p->name, 0, sizeof p->name), TERN_E_ARGUMENT, "a parameter's name is not terminated");
    TERN__REQUIRE(r, (int32_t)p->rule >= 0 && p->rule <= TERN_DENSE, TERN_E_ARGUMENT,
                  "%s: rule %d is unknown", p->name, (int64_t)(int32_t)p->rule);
    m = tern_param_matrix(p);
    TERN__TRY(tern__check_rule(r, p->name, p->rule, &m, p->rho, p->noise, p->zone));
    if (p->rule == TERN_DENSE) {
        TERN__REQUIRE(r, p->rows > 0 && p->cols > 0, TERN_E_SHAPE, "%s: %d x %d; both must be positive", p->name, p->rows, p->cols);
        TERN__TRY(tern__check_count(r, p->name, "rows", p->rows, p->cols));
        TERN__REQUIRE(r, p->buffer[TERN_SHADOW].type == TERN_TYPE_DEFAULT || p->buffer[TERN_SHADOW].type == TERN_F32, TERN_E_ARGUMENT,
                      "%s: a dense parameter is TERN_F32", p->name);
        TERN__REQUIRE(r, !p->rotate && !p->dead, TERN_E_ARGUMENT, "%s: a dense parameter has neither a rotation nor a dead zone", p->name);
    } else TERN__TRY(tern__check_matrix(r, p->name, &m));
    if (tern__is_learned(p->rule) && p->alpha) {
        const int64_t scales = tern__learned_scales(p->rule, &m);
        TERN__REQUIRE(r, memchr(p->alpha->name, 0, sizeof p->alpha->name) && p->alpha->rule == TERN_DENSE && p->alpha->rows == 1
                         && p->alpha->cols == scales, TERN_E_SHAPE,
                      "%s: its alpha must be dense, 1 x %d, and is %d x %d", p->name, scales, p->alpha->rows, p->alpha->cols);
    }
    for (i = 0; i < TERN_BUFFERS; i++)
        TERN__REQUIRE(r, p->buffer[i].type == TERN_TYPE_DEFAULT || p->buffer[i].type == tern__buffer_type(p, i), TERN_E_ARGUMENT,
                      "%s: %s of type %d cannot be used", p->name, tern__buffer_names[i], (int64_t)p->buffer[i].type);
    TERN__REQUIRE(r, !p->sync || ((p->rule == TERN_ABSMEAN || p->rule == TERN_ABSMEAN_SIGMA) && m.grain == TERN_PER_TENSOR
                                  && m.scale_type == TERN_F32 && p->rho == 0.0f),
                  TERN_E_ARGUMENT, "%s: a set with one scale (sync %d) has rule absmean, one F32 scale for the tensor and no rho", p->name,
                  (int64_t)p->sync);
    TERN__REQUIRE(r, !p->dead || (p->lambda > 0 && tern__finite(p->lambda)), TERN_E_ARGUMENT,
                  "%s: a dead zone needs a finite lambda above 0", p->name);
    return tern__check_integer(r, p, tern__buffers_of(p));
}

/* Fails where a buffer is absent, misaligned or has fewer elements than the parameter. */
static tern_result tern__check_buffer(tern_context *c, const tern_param *p, int32_t which, int64_t count)
{
    const char *name = tern__buffer_names[which];
    TERN__REQUIRE(&c->run, p->buffer[which].data, TERN_E_MISSING, "%s has no %s", p->name, name);
    TERN__REQUIRE(&c->run, p->buffer[which].count >= (size_t)count, TERN_E_SHAPE,
                  "%s: its %s has %d elements of %d", p->name, name, (int64_t)p->buffer[which].count, count);
    return tern__check_pointer(&c->run, p->name, name, p->buffer[which].data, tern__type_bytes(tern__buffer_type(p, which)));
}

/* Elements a buffer of this parameter has. */
static int64_t tern__buffer_count(const tern_param *p, int32_t which)
{
    const tern_matrix m = tern_param_matrix(p);
    if (p->rule == TERN_DENSE) return which <= TERN_SCALES || which >= TERN_ACCUM ? 0 : p->rows * p->cols;
    if (which > TERN_SCALES && which <= TERN_ACCUM) return p->rows * p->cols;
    return which == TERN_TRITS ? tern__shape_of(&m).panels * tern__shape_of(&m).panel_bytes : tern__shape_of(&m).scales;
}

/* What a layer reads: packed weights, or the values of a dense parameter. */
static tern_result tern__check_ready(tern_context *c, const tern_param *p)
{
    TERN__TRY(tern__check_param(c, p));
    if (p->rule == TERN_DENSE) return tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols);
    TERN__TRY(tern__check_buffer(c, p, TERN_TRITS, tern__buffer_count(p, TERN_TRITS)));
    return tern__check_buffer(c, p, TERN_SCALES, tern__buffer_count(p, TERN_SCALES));
}

/* A dense parameter of these sizes that belongs to another. */
static tern_result tern__check_dense_of(tern_context *c, const tern_param *p, const tern_param *of, const char *what,
                                        int64_t rows, int64_t cols)
{
    TERN__TRY(tern__check_ready(c, p));
    TERN__REQUIRE(&c->run, p->rule == TERN_DENSE && p->rows == rows && p->cols == cols, TERN_E_SHAPE,
                  "%s: its %s is %d x %d, not dense and %d x %d", of->name, what, p->rows, p->cols, rows, cols);
    return TERN_OK;
}

static float *tern__floats(const tern_param *p, int32_t which) { return p ? (float *)p->buffer[which].data : NULL; }

TERN_API tern_result tern_param_alloc(tern_context *c, tern_param *p, int32_t mask)
{
    int32_t i, fresh = 0;
    TERN__TRY(tern__check_param(c, p));
    if (p->rule == TERN_DENSE && (mask >> TERN_TRITS & 1)) mask |= 1 << TERN_SHADOW;
    if (p->rule == TERN_DENSE) mask &= ~(1 << TERN_ACCUM | 1 << TERN_VOTES);
    TERN__TRY(tern__check_integer(&c->run, p, mask | tern__buffers_of(p)));
    for (i = 0; i < TERN_BUFFERS; i++) {
        tern_buffer *b = &p->buffer[i];
        const int64_t count = tern__buffer_count(p, i);
        if (!(mask >> i & 1) || b->data || count == 0) continue;
        b->type = tern__buffer_type(p, i);
        b->data = tern_alloc(c, (size_t)(count * tern__type_bytes(b->type)));
        if (!b->data) {
            tern_param_free(c, p, fresh);
            TERN__FAIL(&c->run, TERN_E_MEMORY, "%s: no memory for %d bytes", p->name, count * tern__type_bytes(b->type));
        }
        b->count = (size_t)count;
        b->owned = 1;
        fresh |= 1 << i;
    }
    return TERN_OK;
}

TERN_API void tern_param_free(tern_context *c, tern_param *p, int32_t mask)
{
    int32_t i, values;
    if (!c || !p) return;
    values = p->rule == TERN_DENSE && mask == TERN_FOR_TRAINING ? 1 << TERN_SHADOW : 0;
    for (i = 0; i < TERN_BUFFERS; i++) {
        tern_buffer *b = &p->buffer[i];
        if (!((mask & ~values) >> i & 1)) continue;
        if (b->owned) tern_free(c, b->data);
        b->data = NULL;
        b->count = 0;
        b->owned = 0;
    }
}

/* The bias of the dead zone from the weights that were ternarized. */
static tern_result tern__fill_dead(tern_context *c, const tern_param *p, tern_type type, const void *w)
{
    tern_dead_zone_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(p);
    a.lambda = p->lambda;
    a.type = type;
    a.w = w;
    a.bias = tern__floats(p->dead, TERN_SHADOW);
    return tern_dead_zone(c, &a);
}

/* What the shadow is ternarized with, but for the noise. */
static tern_ternarize_args tern__param_args(const tern_param *p)
{
    tern_ternarize_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(p);
    a.rule = p->sync || (p->flags & TERN_KEEP_SCALES) ? TERN_GIVEN : p->rule;
    a.type = tern__buffer_type(p, TERN_SHADOW);
    a.w = p->buffer[TERN_SHADOW].data;
    if (a.rule == TERN_GIVEN) return a;
    a.alpha = tern__floats(p->alpha, TERN_SHADOW);
    a.rho = p->rho;
    return a;
}

/* An operation's failure, with the name of the parameter it was for: which of a model's weights diverged. */
static tern_result tern__fail_for(tern_context *c, const tern_param *p, tern_result result)
{
    const tern_error e = c->run.error;
    return tern__set_error(&c->run.error, result, "%s: %s", p->name, e.text);
}

/* Trits and scales as the arguments say. */
static tern_result tern__param_ternarize(tern_context *c, tern_param *p, const tern_ternarize_args *a)
{
    const tern_result result = tern_ternarize(c, a);
    if (result != TERN_OK) return tern__fail_for(c, p, result);
    return p->dead ? tern__fill_dead(c, p, a->type, a->w) : TERN_OK;
}

/* y = x H of n rows, or back. */
static tern_result tern__rotate(tern_context *c, const tern_param *p, int64_t n, const float *x, float *y, int32_t inverse)
{
    tern_hadamard_args a;
    a.n = n;
    a.cols = p->cols;
    a.x = x;
    a.y = y;
    a.seed = p->rotate;
    a.inverse = inverse;
    return tern_hadamard(c, &a);
}

/* W H of a rotated parameter, as floats. */
static tern_result tern__rotated(tern_context *c, const tern_param *p, tern_type type, const void *w, float *rows)
{
    tern_cast_args a;
    a.count = p->rows * p->cols;
    a.from = type;
    a.to = TERN_F32;
    a.src = w;
    a.dst = rows;
    a.finite = 1;
    TERN__TRY(tern_cast(c, &a));
    return tern__rotate(c, p, p->rows, rows, rows, 0);
}

/* Sets a rotated parameter to W H, which is made in rows. */
static tern_result tern__param_set_rotated(tern_context *c, tern_param *p, tern_type type, const void *w, float *rows)
{
    tern_param plain = *p;
    tern_result result;
    TERN__TRY(tern__rotated(c, p, type, w, rows));
    plain.rotate = 0;
    result = tern_param_set(c, &plain, TERN_F32, rows);
    p->flags = plain.flags;
    return result;
}

/* Memory for the rows of so many floats, or NULL where there are none. */
static tern_result tern__room_to_rotate(tern_context *c, const char *name, int64_t count, float **out)
{
    *out = count ? (float *)tern_alloc(c, (size_t)count * sizeof(float)) : NULL;
    TERN__REQUIRE(&c->run, *out || !count, TERN_E_MEMORY, "%s: no memory to rotate %d weights", name, count);
    return TERN_OK;
}

/* A learned scale that can be used, where the rule asks for one. */
static tern_result tern__check_alpha(tern_context *c, const tern_param *p)
{
    if (!tern__is_learned(p->rule)) return TERN_OK;
    TERN__REQUIRE(&c->run, p->alpha, TERN_E_MISSING, "%s: its rule learns a scale, and its alpha is NULL", p->name);
    return tern__check_ready(c, p->alpha);
}

/* What is written beside trits and scales, where it is there. */
static tern_result tern__check_beside(tern_context *c, const tern_param *p)
{
    int32_t i;
    if (p->buffer[TERN_SHADOW].data) TERN__TRY(tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols));
    if (p->dead) TERN__TRY(tern__check_dense_of(c, p->dead, p, "dead zone", 1, p->rows));
    for (i = TERN_ACCUM; i <= TERN_VOTES; i++)
        if (p->buffer[i].data) TERN__TRY(tern__check_buffer(c, p, i, tern__buffer_count(p, i)));
    return TERN_OK;
}

/* Whether a parameter can be set, but for what it is set from. */
static tern_result tern__check_set(tern_context *c, const tern_param *p)
{
    TERN__TRY(tern__check_ready(c, p));
    TERN__TRY(tern__check_alpha(c, p));
    return tern__check_beside(c, p);
}

/* An accumulator or votes, where they are, become zero. */
static tern_result tern__clear_bytes(tern_context *c, const tern_param *p, int32_t which)
{
    static const uint8_t zeros[4096] = {0};
    const int64_t count = tern__buffer_count(p, which);
    int64_t at, n;
    if (!p->buffer[which].data) return TERN_OK;
    for (at = 0; at < count; at += n) {
        n = tern__min(count - at, (int64_t)sizeof zeros);
        TERN__TRY(tern_copy(c, (uint8_t *)p->buffer[which].data + at, zeros, (size_t)n, TERN_TO_DEVICE));
    }
    return TERN_OK;
}

TERN_API tern_result tern_param_set(tern_context *c, tern_param *p, tern_type type, const void *w)
{
    tern_ternarize_args t;
    void *shadow;
    TERN__TRY(tern__check_set(c, p));
    shadow = p->buffer[TERN_SHADOW].data;
    if (!w) TERN__TRY(tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols));
    if (w && p->rotate) {
        tern_result result;
        float *rows;
        TERN__TRY(tern__room_to_rotate(c, p->name, p->rows * p->cols, &rows));
        result = tern__param_set_rotated(c, p, type, w, rows);
        tern_free(c, rows);
        return result;
    }
    t = tern__param_args(p);
    if (tern__is_integer(p)) {
        t.accum = (int8_t *)p->buffer[TERN_ACCUM].data;
        t.theta = tern__theta(p);
    }
    if (w && p->rule != TERN_DENSE) { /* refuses bad weights before anything is written */
        t.rule = p->rule;
        t.alpha = tern__floats(p->alpha, TERN_SHADOW);
        t.rho = 0.0f;
        t.type = type;
        t.w = w;
        TERN__TRY(tern__param_ternarize(c, p, &t));
        p->flags &= ~(uint32_t)TERN_KEEP_SCALES;
        TERN__TRY(tern__clear_bytes(c, p, TERN_VOTES));
    }
    if (w && shadow) {
        tern_cast_args a;
        a.count = p->rows * p->cols;
        a.from = type;
        a.to = tern__buffer_type(p, TERN_SHADOW);
        a.src = w;
        a.dst = shadow;
        a.finite = 1;
        TERN__TRY(tern_cast(c, &a));
    }
    if (p->rule == TERN_DENSE) return TERN_OK;
    if (w && !(shadow && tern__buffer_type(p, TERN_SHADOW) == TERN_BF16)) return TERN_OK; /* a rounded shadow may give other trits */
    t.type = tern__buffer_type(p, TERN_SHADOW);
    t.w = shadow;
    return tern__param_ternarize(c, p, &t);
}

TERN_API tern_result tern_param_convert(tern_context *c, tern_param *p, int32_t which, tern_type type)
{
    tern_cast_args a;
    tern_param to;
    tern_result result;
    TERN__TRY(tern__check_param(c, p));
    TERN__REQUIRE(&c->run, which == TERN_SHADOW || which == TERN_MOMENT1 || which == TERN_MOMENT2, TERN_E_ARGUMENT,
                  "%s: convert: buffer %d is not a shadow or moment", p->name, (int64_t)which);
    TERN__REQUIRE(&c->run, type == TERN_F32 || type == TERN_BF16, TERN_E_ARGUMENT,
                  "%s: convert: type %d is not TERN_F32 or TERN_BF16", p->name, (int64_t)(int32_t)type);
    TERN__TRY(tern__check_buffer(c, p, which, p->rows * p->cols));
    a.from = tern__buffer_type(p, which);
    if (a.from == type) return TERN_OK;
    to = *p;
    memset(&to.buffer[which], 0, sizeof to.buffer[which]);
    to.buffer[which].type = type;
    TERN__TRY(tern_param_alloc(c, &to, 1 << which));
    a.count = p->rows * p->cols;
    a.to = type;
    a.src = p->buffer[which].data;
    a.dst = to.buffer[which].data;
    a.finite = 0;
    result = tern_cast(c, &a);
    tern_param_free(c, result == TERN_OK ? p : &to, 1 << which);
    if (result == TERN_OK) p->buffer[which] = to.buffer[which];
    return result;
}

/* -- rows cross between the host and the backend in chunks, so that a device is waited for seldom -- */

enum { TERN__TRANSFER = 1 << 20 }; /* bytes that cross at a time, or a panel where that is more */

/* Rows of a chunk at so many bytes per weight: whole panels. */
static int64_t tern__chunk_rows(const tern_param *p, int64_t width)
{
    const int64_t panels = tern__min(TERN__TRANSFER / (TERN__ROWS * width * p->cols), tern__ceil_div(p->rows, TERN__ROWS));
    return tern__max(panels, 1) * TERN__ROWS;
}

/* Packs rows given by the host, from a panel's first row on, through staging memory of the backend. */
static tern_result tern__upload_rows(tern_context *c, const tern_param *p, int64_t row, int64_t rows, const int8_t *trits, int8_t *staging)
{
    tern_pack_args a;
    a.m = tern_param_matrix(p);
    a.m.rows = rows;
    a.m.trits = (uint8_t *)a.m.trits + row / TERN__ROWS * tern__shape_of(&a.m).panel_bytes;
    a.trits = staging;
    TERN__TRY(tern_copy(c, staging, trits, (size_t)(rows * p->cols), TERN_TO_DEVICE));
    return tern_pack(c, &a);
}

static tern_result tern__zero(tern_context *c, int64_t count, float *x)
{
    tern_fill_args a;
    memset(&a, 0, sizeof a);
    a.count = count;
    a.x = x;
    return tern_fill(c, &a);
}

/* A dense parameter becomes zero. */
static tern_result tern__clear(tern_context *c, const tern_param *p)
{
    return tern__zero(c, p->rows * p->cols, tern__floats(p, TERN_SHADOW));
}

/* Row-major scales from the host to those of m, through `ordered`: host memory for the scales in panel order. */
static tern_result tern__upload_scales(tern_context *c, const tern_matrix *m, const float *scales, void *ordered)
{
    const tern__shape s = tern__shape_of(m);
    int64_t i, g;
    for (i = 0; i < s.scales; i++) tern__store_scale(m->scale_type, ordered, i, 0.0f); /* padding rows keep it */
    for (i = 0; i < (m->grain == TERN_PER_TENSOR ? 1 : m->rows); i++)
        for (g = 0; g < s.groups; g++)
            tern__store_scale(m->scale_type, ordered, tern__scale_index(m, &s, i, g), scales[i * s.groups + g]);
    return tern_copy(c, m->scales, ordered, (size_t)(s.scales * tern__type_bytes(m->scale_type)), TERN_TO_DEVICE);
}

/* Rows as floats: of the shadow (a dense parameter's values), or trit times scale. */
static tern_result tern__values(tern_context *c, const tern_param *p, int64_t row, int64_t rows, int32_t shadow, float *to)
{
    tern_unpack_args u;
    tern_cast_args a;
    if (!shadow) {
        memset(&u, 0, sizeof u);
        u.m = tern_param_matrix(p);
        u.row = row;
        u.count = rows;
        u.values = to;
        return tern_unpack(c, &u);
    }
    memset(&a, 0, sizeof a);
    a.count = rows * p->cols;
    a.from = tern__buffer_type(p, TERN_SHADOW);
    a.to = TERN_F32;
    a.src = (const uint8_t *)p->buffer[TERN_SHADOW].data + row * p->cols * tern__type_bytes(a.from);
    a.dst = to;
    return tern_cast(c, &a);
}

/* The shadow becomes trit times scale, the scales those of m; staging holds a chunk of floats. */
static tern_result tern__shadow_from_packed(tern_context *c, const tern_param *p, const tern_matrix *m, float *staging)
{
    const tern_type type = tern__buffer_type(p, TERN_SHADOW);
    tern_unpack_args u;
    tern_cast_args a;
    memset(&u, 0, sizeof u);
    u.m = *m;
    u.values = staging;
    memset(&a, 0, sizeof a);
    a.from = TERN_F32;
    a.to = type;
    a.src = staging;
    for (; u.row < p->rows; u.row += u.count) {
        u.count = tern__min(tern__chunk_rows(p, sizeof(float)), p->rows - u.row);
        a.count = u.count * p->cols;
        a.dst = (uint8_t *)p->buffer[TERN_SHADOW].data + u.row * p->cols * tern__type_bytes(type);
        TERN__TRY(tern_unpack(c, &u));
        TERN__TRY(tern_cast(c, &a));
    }
    return TERN_OK;
}

/* A mean over all weights, which trits that are 0 make smaller, finds the given scale again where the others are as much larger. */
static int32_t tern__is_diluted(const tern_param *p) { return p->rule == TERN_ABSMEAN || p->rule == TERN_ABSMEAN_SIGMA; }

static float tern__shadow_scale(const tern_param *p, const int8_t *trits, int64_t row, int64_t rows, int64_t col, int64_t cols, float scale)
{
    int64_t r, j, count = 0;
    for (r = row; r < row + rows; r++)
        for (j = col; j < col + cols; j++) count += trits[r * p->cols + j] != 0;
    if (count == 0) return scale;
    return scale * ((float)(rows * cols) / (float)count) * (p->rule == TERN_ABSMEAN_SIGMA ? TERN__ROOT_2_PI : 1.0f);
}

/* Memory for a give: on the backend, and on the host. */
typedef struct tern__giving { int8_t *staging; void *shadow_scales, *ordered; float *scales; } tern__giving;

static tern_result tern__give_shadow(tern_context *c, const tern_param *p, const int8_t *trits, const float *scales, const tern__giving *g)
{
    tern_matrix m = tern_param_matrix(p);
    const tern__shape s = tern__shape_of(&m);
    int64_t i, j;
    if (!g->shadow_scales) return tern__shadow_from_packed(c, p, &m, (float *)(void *)g->staging);
    m.scale_type = TERN_F32;
    m.scales = g->shadow_scales;
    if (m.grain == TERN_PER_TENSOR) g->scales[0] = tern__shadow_scale(p, trits, 0, m.rows, 0, m.cols, scales[0]);
    else for (i = 0; i < m.rows; i++)
        for (j = 0; j < s.groups; j++)
            g->scales[i * s.groups + j] =
                tern__shadow_scale(p, trits, i, 1, j * s.group, tern__group_cols(&m, &s, j), scales[i * s.groups + j]);
    TERN__TRY(tern__upload_scales(c, &m, g->scales, g->ordered));
    return tern__shadow_from_packed(c, p, &m, (float *)(void *)g->staging);
}

static tern_result tern__give_alpha(tern_context *c, const tern_param *p, const float *scales, const tern__giving *g)
{
    int64_t i;
    for (i = 0; i < p->alpha->cols; i++) g->scales[i] = scales[i] * (p->rule == TERN_SEQ ? 1.5f : 1.0f);
    return tern_copy(c, p->alpha->buffer[TERN_SHADOW].data, g->scales, (size_t)p->alpha->cols * sizeof(float), TERN_TO_DEVICE);
}

TERN_API tern_result tern_param_give(tern_context *c, tern_param *p, const int8_t *trits, const float *scales)
{
    tern_result result = TERN_OK;
    tern_run *r;
    tern_matrix m;
    tern__shape s;
    tern__any_scale one;
    tern__giving g;
    int64_t i, width, row, rows, stored;
    int32_t shadow, diluted, alpha;
    TERN__TRY(tern__check_ready(c, p));
    r = &c->run;
    TERN__REQUIRE(r, p->rule != TERN_DENSE, TERN_E_ARGUMENT, "%s is dense and takes no trits", p->name);
    TERN__REQUIRE(r, trits && scales, TERN_E_ARGUMENT, "%s: trits or scales are NULL", p->name);
    shadow = p->buffer[TERN_SHADOW].data != NULL;
    diluted = shadow && tern__is_diluted(p);
    alpha = tern__is_learned(p->rule) && p->alpha;
    if (alpha) TERN__TRY(tern__check_alpha(c, p));
    TERN__TRY(tern__check_beside(c, p));
    m = tern_param_matrix(p);
    s = tern__shape_of(&m);
    stored = m.grain == TERN_PER_TENSOR ? 1 : m.rows * s.groups;
    for (i = 0; i < m.rows * m.cols; i++)
        TERN__REQUIRE(r, trits[i] >= -1 && trits[i] <= 1, TERN_E_TRIT,
                      "%s: trits[%d][%d] is %d, not -1, 0 or 1", p->name, i / m.cols, i % m.cols, (int64_t)trits[i]);
    for (i = 0; i < stored; i++) {
        TERN__REQUIRE(r, tern__weight_ok(scales[i]) && scales[i] >= 0, TERN_E_NONFINITE,
                      "%s: scales[%d] is negative or not a finite number below 2^96", p->name, i);
        TERN__REQUIRE(r, tern__store_scale(m.scale_type, &one, 0, scales[i]) == scales[i], TERN_E_ARGUMENT,
                      "%s: scales[%d] is not %s", p->name, i,
                      m.scale_type == TERN_POW2 ? "a power of two" : m.scale_type == TERN_LOG ? "on the log lattice" : "an f16");
    }
    width = shadow ? (int64_t)sizeof(float) : 1;
    g.staging = (int8_t *)tern_alloc(c, (size_t)(tern__chunk_rows(p, width) * m.cols * width));
    g.ordered = tern__host_alloc(&r->allocator, (size_t)s.scales * sizeof(float));
    g.shadow_scales = diluted ? tern_alloc(c, (size_t)s.scales * sizeof(float)) : NULL;
    g.scales = diluted || alpha ? (float *)tern__host_alloc(&r->allocator, (size_t)stored * sizeof(float)) : NULL;
    if (!g.staging || !g.ordered || (diluted && !g.shadow_scales) || ((diluted || alpha) && !g.scales))
        result = tern__set_error(&r->error, TERN_E_MEMORY, "%s: no memory to pack", p->name);
    for (row = 0; result == TERN_OK && row < m.rows; row += rows) {
        rows = tern__min(tern__chunk_rows(p, width), m.rows - row);
        result = tern__upload_rows(c, p, row, rows, trits + row * m.cols, g.staging);
    }
    if (result == TERN_OK) result = tern__upload_scales(c, &m, scales, g.ordered);
    if (result == TERN_OK && shadow) result = tern__give_shadow(c, p, trits, scales, &g);
    if (result == TERN_OK && alpha) result = tern__give_alpha(c, p, scales, &g);
    if (result == TERN_OK && p->dead) result = tern__clear(c, p->dead); /* given trits of 0 are weights of 0 */
    if (result == TERN_OK) result = tern__clear_bytes(c, p, TERN_ACCUM);
    if (result == TERN_OK) result = tern__clear_bytes(c, p, TERN_VOTES);
    if (result == TERN_OK) p->flags |= TERN_KEEP_SCALES;
    if (g.staging) tern_free(c, g.staging);
    if (g.shadow_scales) tern_free(c, g.shadow_scales);
    tern__host_free(&r->allocator, g.ordered);
    tern__host_free(&r->allocator, g.scales);
    return result;
}

/* Rows of a ternary parameter on the host: trits [cols] and scales [groups] of each, its shadow [cols] as it is stored, and
   the scales in panel order. */
typedef struct tern__rows { int8_t *trits; float *scales; uint8_t *shadow, *stored; int64_t bytes; } tern__rows;

/* Stored scales of rows that begin a panel, or of one row: its panel's. */
static int64_t tern__stored_scales(const tern__shape *s, int64_t rows)
{
    return tern__min(s->scales, tern__ceil_div(rows, TERN__ROWS) * TERN__ROWS * s->groups);
}

/* As they lie in memory; what: of 1 << TERN_TRITS, TERN_SCALES and TERN_SHADOW. */
static tern__rows tern__rows_at(const tern_param *p, int64_t rows, int32_t what, void *base)
{
    const tern_matrix m = tern_param_matrix(p);
    const tern__shape s = tern__shape_of(&m);
    const int64_t width = what >> TERN_SHADOW & 1 ? tern__type_bytes(tern__buffer_type(p, TERN_SHADOW)) : 0;
    const int64_t scales = what >> TERN_SCALES & 1 ? tern__scratch_piece(rows * s.groups * (int64_t)sizeof(float)) : 0;
    const int64_t stored = scales ? tern__scratch_piece(tern__stored_scales(&s, rows) * tern__type_bytes(m.scale_type)) : 0;
    const int64_t shadow = tern__scratch_piece(rows * p->cols * width);
    unsigned char *at = (unsigned char *)base;
    tern__rows r = {NULL, NULL, NULL, NULL, 0};
    r.bytes = scales + stored + shadow + (what >> TERN_TRITS & 1 ? rows * p->cols : 0);
    if (!at) return r;
    r.scales = (float *)(void *)at;
    r.stored = at + scales;
    r.shadow = r.stored + stored;
    r.trits = (int8_t *)r.shadow + shadow;
    return r;
}

/* Reads rows of one parameter after the other, chunk by chunk. */
typedef struct tern__reader {
    tern_context *c;
    const tern_param *p;
    int32_t what;
    int64_t most, first, count; /* rows of a chunk; those that are here */
    void *host;
    int8_t *staging;            /* of the backend, for the trits of a chunk */
} tern__reader;

static int32_t tern__reader_open(tern__reader *r, tern_context *c, int64_t host_bytes, int64_t staging_bytes)
{
    memset(r, 0, sizeof *r);
    r->c = c;
    r->host = tern__host_alloc(&c->run.allocator, (size_t)host_bytes);
    r->staging = staging_bytes > 0 ? (int8_t *)tern_alloc(c, (size_t)staging_bytes) : NULL;
    return r->host && (r->staging || staging_bytes == 0);
}

static void tern__reader_close(tern__reader *r)
{
    tern_free(r->c, r->staging);
    tern__host_free(&r->c->run.allocator, r->host);
}

/* The rows that are read next are those of p. */
static void tern__reader_turn(tern__reader *r, const tern_param *p, int64_t most, int32_t what)
{
    r->p = p;
    r->most = most;
    r->what = what;
    r->count = 0;
}

static tern_result tern__reader_of(tern__reader *r, tern_context *c, const tern_param *p, int64_t most, int32_t what)
{
    if (!tern__reader_open(r, c, tern__rows_at(p, most, what, NULL).bytes, what >> TERN_TRITS & 1 ? most * p->cols : 0)) {
        tern__reader_close(r);
        TERN__FAIL(&c->run, TERN_E_MEMORY, "%s: no memory for a row", p->name);
    }
    tern__reader_turn(r, p, most, what);
    return TERN_OK;
}

static tern_result tern__read_trits(tern__reader *r, int8_t *trits)
{
    tern_unpack_args a;
    a.m = tern_param_matrix(r->p);
    a.row = r->first;
    a.count = r->count;
    a.trits = r->staging;
    a.values = NULL;
    TERN__TRY(tern_unpack(r->c, &a));
    return tern_copy(r->c, trits, a.trits, (size_t)(a.count * a.m.cols), TERN_TO_HOST);
}

/* Panels as they lie, then row by row. */
static tern_result tern__read_scales(tern__reader *r, const tern__rows *to)
{
    const tern_matrix m = tern_param_matrix(r->p);
    const tern__shape s = tern__shape_of(&m);
    const int64_t width = tern__type_bytes(m.scale_type), from = tern__scale_index(&m, &s, r->first / TERN__ROWS * TERN__ROWS, 0);
    int64_t i, g;
    TERN__TRY(tern_copy(r->c, to->stored, (const uint8_t *)m.scales + from * width, (size_t)(tern__stored_scales(&s, r->count) * width),
                        TERN_TO_HOST));
    for (i = 0; i < r->count; i++)
        for (g = 0; g < s.groups; g++)
            to->scales[i * s.groups + g] = tern__load_scale(m.scale_type, to->stored, tern__scale_index(&m, &s, r->first + i, g) - from);
    return TERN_OK;
}

static tern_result tern__read_shadow(tern__reader *r, uint8_t *shadow)
{
    const int64_t width = r->p->cols * tern__type_bytes(tern__buffer_type(r->p, TERN_SHADOW));
    return tern_copy(r->c, shadow, (const uint8_t *)r->p->buffer[TERN_SHADOW].data + r->first * width, (size_t)(r->count * width),
                     TERN_TO_HOST);
}

/* A row, with its chunk where that is not here yet. */
static tern_result tern__read_row(tern__reader *r, int64_t row, tern__rows *out)
{
    const tern_param *p = r->p;
    const tern_matrix m = tern_param_matrix(p);
    *out = tern__rows_at(p, r->most, r->what, r->host);
    if (row < r->first || row >= r->first + r->count) {
        r->first = row;
        r->count = tern__min(r->most, p->rows - row);
        if (r->what >> TERN_TRITS & 1) TERN__TRY(tern__read_trits(r, out->trits));
        if (r->what >> TERN_SCALES & 1) TERN__TRY(tern__read_scales(r, out));
        if (r->what >> TERN_SHADOW & 1) TERN__TRY(tern__read_shadow(r, out->shadow));
    }
    row -= r->first;
    if (r->what >> TERN_TRITS & 1) out->trits += row * p->cols;
    if (r->what >> TERN_SCALES & 1) out->scales += row * tern__shape_of(&m).groups;
    if (r->what >> TERN_SHADOW & 1) out->shadow += row * p->cols * tern__type_bytes(tern__buffer_type(p, TERN_SHADOW));
    return TERN_OK;
}

/* Value j of a row. */
static float tern__row_value(const tern_param *p, const tern__rows *row, int64_t j)
{
    return (float)row->trits[j] * row->scales[p->grain > 0 ? j / p->grain : 0];
}

TERN_API tern_result tern_param_get(tern_context *c, const tern_param *p, int64_t row, int8_t *trits, float *scales, float *values)
{
    const int32_t what = (trits || values) << TERN_TRITS | (scales || values) << TERN_SCALES;
    tern_result result;
    tern_matrix m;
    tern__reader r;
    tern__rows here;
    int64_t j;
    TERN__TRY(tern__check_ready(c, p));
    TERN__REQUIRE(&c->run, row >= 0 && row < p->rows, TERN_E_SHAPE, "%s: row %d of %d", p->name, row, p->rows);
    if (p->rule == TERN_DENSE) {
        TERN__REQUIRE(&c->run, !trits && !scales, TERN_E_ARGUMENT, "%s is dense and has no trits", p->name);
        return values ? tern_copy(c, values, tern__floats(p, TERN_SHADOW) + row * p->cols, (size_t)p->cols * 4, TERN_TO_HOST) : TERN_OK;
    }
    m = tern_param_matrix(p);
    TERN__TRY(tern__reader_of(&r, c, p, 1, what));
    result = tern__read_row(&r, row, &here);
    if (result == TERN_OK && trits) memcpy(trits, here.trits, (size_t)p->cols);
    if (result == TERN_OK && scales) memcpy(scales, here.scales, (size_t)tern__shape_of(&m).groups * sizeof(float));
    for (j = 0; result == TERN_OK && values && j < p->cols; j++) values[j] = tern__row_value(p, &here, j);
    tern__reader_close(&r);
    return result;
}

/* -- diagnostics, on the host, row by row -- */

/* Counts of one row. The threshold is the rule's own: alpha/2, or 0.7 mean|w| for TWN. */
typedef struct tern__tally { int64_t neg, pos, boundary, inner, scales; float alpha; } tern__tally;

static void tern__tally_row(const tern_param *p, const tern__rows *row, float band, float tensor_mean, tern__tally *n)
{
    tern_ternarize_args a;
    tern__shape s;
    int64_t g, j;
    a.m = tern_param_matrix(p);
    a.type = tern__buffer_type(p, TERN_SHADOW);
    a.w = row->shadow;
    s = tern__shape_of(&a.m);
    for (g = 0; g < s.groups; g++) {
        const float scale = row->scales[g];
        float threshold = 0.5f;
        n->alpha += scale;
        n->scales++;
        if (p->rule == TERN_TWN && scale > 0.0f)
            threshold = 0.7f * (p->grain == TERN_PER_TENSOR ? tensor_mean
                                : tern__row_mean(&tern__kernels_scalar, &a, g * s.group, tern__group_cols(&a.m, &s, g), 0, -1.0f)) / scale;
        for (j = g * s.group; j < g * s.group + tern__group_cols(&a.m, &s, g); j++) {
            const float w = tern__abs(tern__load_float(a.type, row->shadow, j));
            n->neg += row->trits[j] < 0;
            n->pos += row->trits[j] > 0;
            n->boundary += scale > 0.0f && tern__abs(w / scale - threshold) < band;
            n->inner += scale > 0.0f && w > 0.0f && w / scale < threshold - band;
        }
    }
}

TERN_API tern_result tern_param_stats(tern_context *c, const tern_param *p, float band, tern_stats *out)
{
    tern_result result = TERN_OK;
    tern__tally n = {0, 0, 0, 0, 0, 0.0f};
    tern__reader reader;
    tern__rows row;
    float all, tensor_mean = 0.0f;
    int64_t i, j;
    TERN__TRY(tern__check_ready(c, p));
    TERN__REQUIRE(&c->run, out && band >= 0, TERN_E_ARGUMENT, "%s: stats: out is NULL or band is negative", p->name);
    TERN__REQUIRE(&c->run, p->rule != TERN_DENSE, TERN_E_ARGUMENT, "%s is dense and has no dead zone", p->name);
    TERN__TRY(tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols));
    TERN__TRY(tern__reader_of(&reader, c, p, tern__chunk_rows(p, 1), 1 << TERN_TRITS | 1 << TERN_SCALES | 1 << TERN_SHADOW));
    all = (float)(p->rows * p->cols);
    for (i = 0; p->rule == TERN_TWN && p->grain == TERN_PER_TENSOR && result == TERN_OK && i < p->rows; i++) {
        result = tern__read_row(&reader, i, &row);
        for (j = 0; result == TERN_OK && j < p->cols; j++)
            tensor_mean += tern__abs(tern__load_float(tern__buffer_type(p, TERN_SHADOW), row.shadow, j)) / all;
    }
    for (i = 0; result == TERN_OK && i < p->rows; i++) {
        result = tern__read_row(&reader, i, &row);
        if (result == TERN_OK) tern__tally_row(p, &row, band, tensor_mean, &n);
    }
    tern__reader_close(&reader);
    if (result != TERN_OK) return result;
    out->alpha = n.alpha / (float)n.scales;
    out->frac_neg = (float)n.neg / all;
    out->frac_pos = (float)n.pos / all;
    out->frac_zero = (float)(p->rows * p->cols - n.neg - n.pos) / all;
    out->frac_boundary = (float)n.boundary / all;
    out->frac_zero_inner = (float)n.inner / all;
    return TERN_OK;
}

TERN_API tern_result tern_param_verify(tern_context *c, const tern_param *p, const float *values, tern_verdict *out)
{
    tern_result result = TERN_OK;
    tern_verdict v = {0, -1, 0.0f};
    tern__reader reader;
    tern__rows row;
    int64_t i, j;
    TERN__TRY(tern__check_ready(c, p));
    TERN__REQUIRE(&c->run, values && out, TERN_E_ARGUMENT, "%s: verify: values or out is NULL", p->name);
    TERN__REQUIRE(&c->run, p->rule != TERN_DENSE, TERN_E_ARGUMENT, "%s is dense; there is nothing to verify", p->name);
    TERN__TRY(tern__reader_of(&reader, c, p, tern__chunk_rows(p, 1), 1 << TERN_TRITS | 1 << TERN_SCALES));
    for (i = 0; result == TERN_OK && i < p->rows; i++) {
        result = tern__read_row(&reader, i, &row);
        for (j = 0; result == TERN_OK && j < p->cols; j++) {
            const float error = tern__abs(values[i * p->cols + j] - tern__row_value(p, &row, j));
            if (error == 0.0f) continue;
            if (v.wrong++ == 0) v.first_wrong = i * p->cols + j;
            if (v.max_error == v.max_error && !(error <= v.max_error)) v.max_error = error; /* a NaN stays */
        }
    }
    tern__reader_close(&reader);
    if (result == TERN_OK) *out = v;
    return result;
}

static tern_result tern__check_model(tern_context *c, const tern_model *m)
{
    int32_t i;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, m && m->items && m->count > 0, TERN_E_ARGUMENT, "the model is NULL or has no parameters");
    for (i = 0; i < m->count; i++) TERN__TRY(tern__check_param(c, m->items[i]));
    return TERN_OK;
}

/* What training does with a buffer. */
typedef enum { TERN__TRAINABLE, TERN__PERSISTENT, TERN__TRANSIENT } tern__lasting;

static tern__lasting tern__lasts(const tern_param *p, int32_t which)
{
    if (which == TERN_GRAD) return TERN__TRANSIENT;
    if (!p->buffer[TERN_GRAD].data) return TERN__PERSISTENT;
    return which == TERN_SCALES && tern__is_integer(p) && !p->buffer[TERN_VOTES].data ? TERN__PERSISTENT : TERN__TRAINABLE;
}

static int32_t tern__is_float(tern_type type) { return type == TERN_F32 || type == TERN_BF16 || type == TERN_F16; }

/* -- parameters that share a scale -- */

static tern_result tern__map_of(tern_context *c, tern_map_fn fn, int64_t count, const float *a, float alpha, const float *b, float *y)
{
    tern_map_args m;
    memset(&m, 0, sizeof m);
    m.fn = fn;
    m.count = count;
    m.alpha = alpha;
    m.a = a;
    m.b = b;
    m.y = y;
    return tern_map(c, &m);
}

/* y = a + alpha b, or without b alpha a. */
static tern_result tern__add_scaled(tern_context *c, int64_t count, const float *a, float alpha, const float *b, float *y)
{
    return tern__map_of(c, b ? TERN_MAP_ADD : TERN_MAP_SCALE, count, a, alpha, b, y);
}

/* What a parameter is ternarized from. */
typedef struct tern__source { tern_param *p; tern_type type; const void *w; } tern__source;

/* Sources by their number; p is NULL where there is none. */
typedef struct tern__sources { tern__source (*at)(const void *of, int32_t i); const void *of; int32_t count; } tern__sources;

static tern__source tern__source_of_shadow(tern_param *p)
{
    tern__source s;
    s.p = p->buffer[TERN_SHADOW].data && p->rule != TERN_DENSE ? p : NULL;
    s.type = tern__buffer_type(p, TERN_SHADOW);
    s.w = p->buffer[TERN_SHADOW].data;
    return s;
}
static tern__source tern__source_of_model(const void *of, int32_t i) { return tern__source_of_shadow(((const tern_model *)of)->items[i]); }

/* Noise of a step; step 0: none. */
typedef struct tern__step_noise { uint64_t seed; uint32_t step; } tern__step_noise;

static tern_result tern__source_ternarize(tern_context *c, const tern__source *s, int32_t i, const tern__step_noise *n, void *scale)
{
    tern_ternarize_args a = tern__param_args(s->p);
    a.type = s->type;
    a.w = s->w;
    if (scale) a.m.scales = scale;
    if (n->step) {
        a.noise = s->p->noise;
        a.zone = s->p->zone;
        a.seed = n->seed;
        a.step = n->step;
        a.stream = (uint32_t)i ^ 0x40000000u; /* not that of the rounding of weights or moments */
        a.spare = c->scratch + 64; /* a norm that was there has been used; before it lies a set's scale */
        a.spare_bytes = c->scratch_bytes - 64;
    }
    return tern__param_ternarize(c, s->p, &a);
}

/* A set that cannot be ternarized: the error as it is, or the shadow whose element spoiled the scale of all. */
static tern_result tern__sync_blame(tern_context *c, const tern__sources *all, uint32_t sync)
{
    const tern_error kept = c->run.error;
    tern_cast_args a;
    int32_t i;
    memset(&a, 0, sizeof a);
    a.finite = 1;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (!s.p || s.p->sync != sync || s.w != s.p->buffer[TERN_SHADOW].data) continue;
        a.count = s.p->rows * s.p->cols;
        a.from = a.to = s.type;
        a.src = a.dst = s.p->buffer[TERN_SHADOW].data; /* onto itself: it is looked at */
        if (tern_cast(c, &a) != TERN_OK) return tern__fail_for(c, s.p, c->run.error.code);
    }
    c->run.error = kept;
    return kept.code;
}

/* *sum = the canonical sum of |w|; add: added to it. */
static tern_result tern__sum_sizes(tern_context *c, const tern__source *s, float *sum, int32_t add)
{
    tern_sum_args a;
    a.kind = TERN_SUM_ABS;
    a.count = s->p->rows * s->p->cols;
    a.type = s->type;
    a.x = s->w;
    a.y = sum;
    a.add = add;
    return tern_sum(c, &a);
}

/* The set of source `first`: its scale is made in scratch and stored beside trits that were taken with it. */
static tern_result tern__sync_set(tern_context *c, const tern__sources *all, int32_t first, const tern__step_noise *noise)
{
    const tern_param *of = all->at(all->of, first).p;
    float *scale = (float *)(void *)c->scratch;
    int64_t weights = 0;
    int32_t i;
    for (i = first; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (!s.p || s.p->sync != of->sync) continue;
        TERN__TRY(tern__sum_sizes(c, &s, scale, i > first));
        weights += s.p->rows * s.p->cols;
    }
    TERN__TRY(tern__add_scaled(c, 1, scale, 1.0f / (of->rule == TERN_ABSMEAN_SIGMA ? (float)weights * TERN__ROOT_2_PI : (float)weights),
                               NULL, scale));
    for (i = first; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (!s.p || s.p->sync != of->sync) continue;
        if (tern__source_ternarize(c, &s, i, noise, scale) != TERN_OK) return tern__sync_blame(c, all, of->sync);
        TERN__TRY(tern__add_scaled(c, 1, scale, 1.0f, NULL, (float *)s.p->buffer[TERN_SCALES].data));
    }
    return TERN_OK;
}

/* Whether an earlier source is of the same set, and whether one of the set keeps a given scale. */
static int32_t tern__sync_is_first(const tern__sources *all, int32_t i)
{
    const uint32_t sync = all->at(all->of, i).p->sync;
    int32_t j;
    for (j = 0; j < i; j++) {
        const tern__source s = all->at(all->of, j);
        if (s.p && s.p->sync == sync) return 0;
    }
    return 1;
}

static int32_t tern__sync_keeps(const tern__sources *all, uint32_t sync)
{
    int32_t i;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (s.p && s.p->sync == sync && (s.p->flags & TERN_KEEP_SCALES)) return 1;
    }
    return 0;
}

static tern_result tern__sync_sets(tern_context *c, const tern__sources *all, const tern__step_noise *noise)
{
    int32_t i;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (!s.p || !s.p->sync || !tern__sync_is_first(all, i)) continue;
        if (!tern__sync_keeps(all, s.p->sync)) TERN__TRY(tern__sync_set(c, all, i, noise));
    }
    return TERN_OK;
}

static tern__sources tern__sources_of_model(const tern_model *m)
{
    tern__sources s;
    s.at = tern__source_of_model;
    s.of = m;
    s.count = m->count;
    return s;
}

/* Each member beside the first of its set. */
static tern_result tern__check_sync(tern_context *c, const tern_model *m)
{
    int32_t i, j;
    for (i = 0; i < m->count; i++) {
        const tern_param *p = m->items[i], *q = p;
        for (j = 0; p->sync && q == p && j < i; j++) if (m->items[j]->sync == p->sync) q = m->items[j];
        TERN__REQUIRE(&c->run, q->rule == p->rule, TERN_E_ARGUMENT,
                      "%s and %s share a scale (sync %d) and differ in rule", q->name, p->name, (int64_t)p->sync);
        TERN__REQUIRE(&c->run, !q->buffer[TERN_SHADOW].data == !p->buffer[TERN_SHADOW].data, TERN_E_MISSING,
                      "%s shares its scale with %s (sync %d), and one of them has no shadow", p->name, q->name, (int64_t)p->sync);
        if (!p->sync || !p->buffer[TERN_SHADOW].data) continue;
        TERN__TRY(tern__check_ready(c, p));
        TERN__TRY(tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols));
    }
    return TERN_OK;
}

TERN_API tern_result tern_model_requantize(tern_context *c, const tern_model *m)
{
    const tern__step_noise none = {0, 0};
    tern__sources all;
    int32_t i;
    TERN__TRY(tern__check_model(c, m));
    TERN__TRY(tern__check_sync(c, m));
    all = tern__sources_of_model(m);
    for (i = 0; i < m->count; i++) {
        tern_param *p = m->items[i];
        if (!p->buffer[TERN_SHADOW].data || p->rule == TERN_DENSE) continue;
        TERN__TRY(tern__check_ready(c, p));
        TERN__TRY(tern__check_buffer(c, p, TERN_SHADOW, p->rows * p->cols));
        if (!p->sync || tern__sync_keeps(&all, p->sync)) TERN__TRY(tern_param_set(c, p, TERN_TYPE_DEFAULT, NULL));
    }
    return tern__sync_sets(c, &all, &none);
}

TERN_API tern_result tern_model_audit(tern_context *c, const tern_model *m, tern_audit *out)
{
    int32_t i, b;
    TERN__TRY(tern__check_model(c, m));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "audit: out is NULL");
    memset(out, 0, sizeof *out);
    for (i = 0; i < m->count; i++) {
        const tern_param *p = m->items[i];
        out->weights += p->rows * p->cols;
        if (p->rule != TERN_DENSE) out->ternary += p->rows * p->cols;
        for (b = 0; b < TERN_BUFFERS; b++) {
            const size_t bytes = p->buffer[b].data ? p->buffer[b].count * (size_t)tern__type_bytes(tern__buffer_type(p, b)) : 0;
            int64_t *const floats[] = {&out->trainable_floats, &out->persistent_floats, &out->transient_floats};
            out->bytes[b] += bytes;
            if (p->buffer[b].data && tern__is_float(tern__buffer_type(p, b))) *floats[tern__lasts(p, b)] += (int64_t)p->buffer[b].count;
            if (b <= TERN_SCALES || (p->rule == TERN_DENSE && b == TERN_SHADOW)) out->packed_bytes += bytes;
        }
    }
    return TERN_OK;
}

/* -- BitLinear (Wang et al. 2023; Ma et al. 2024) -- */

static int32_t tern__quantizes(tern_act act, const tern_param *w) { return act != TERN_ACT_FLOAT && w->rule != TERN_DENSE; }
static int32_t tern__is_quantized(const tern_linear *l) { return tern__quantizes(l->act, l->w); }

/* The rank of LoRA, or 0. */
static int64_t tern__rank(const tern_linear *l) { return l->lora_a ? l->lora_a->rows : 0; }

/* What the forward leaves for the backward, at the start of `saved` or of scratch: the quantized activations (none
   where they are float), and LoRA's x~ A^T * lora_scale [n, r]. */
typedef struct tern__kept { int8_t *q; float *scale; int32_t *sum; float *low; int64_t bytes; } tern__kept;

static tern__kept tern__kept_at(const tern_linear *l, int64_t n, void *base)
{
    const tern_matrix m = tern_param_matrix(l->w);
    const tern__shape s = tern__shape_of(&m);
    unsigned char *p = (unsigned char *)base;
    const int32_t quantized = tern__is_quantized(l);
    const int64_t scale = quantized ? tern__scratch_piece(tern__mul(n, s.stride)) : 0;
    const int64_t sum = quantized ? tern__add(scale, tern__scratch_piece(tern__mul(n, 4))) : 0;
    const int64_t low = quantized ? tern__add(sum, tern__scratch_piece(tern__mul(tern__mul(n, s.groups), 4))) : 0;
    tern__kept k = {NULL, NULL, NULL, NULL, 0};
    k.bytes = tern__add(low, tern__scratch_piece(tern__mul(tern__mul(n, tern__rank(l)), 4)));
    if (!p) return k;
    k.low = (float *)(void *)(p + low);
    if (!quantized) return k;
    k.q = (int8_t *)p;
    k.scale = (float *)(void *)(p + scale);
    k.sum = (int32_t *)(void *)(p + sum);
    return k;
}

static tern_result tern__check_lora(tern_context *c, const tern_linear *l)
{
    TERN__REQUIRE(&c->run, l->lora_a && l->lora_b, TERN_E_ARGUMENT, "%s: lora_a and lora_b come together", l->w->name);
    TERN__REQUIRE(&c->run, tern__finite(l->lora_scale), TERN_E_ARGUMENT, "%s: lora_scale is not finite", l->w->name);
    TERN__TRY(tern__check_dense_of(c, l->lora_a, l->w, "lora_a", l->lora_a->rows, l->w->cols));
    return tern__check_dense_of(c, l->lora_b, l->w, "lora_b", l->w->rows, l->lora_a->rows);
}

static tern_result tern__check_arenas(tern_context *c, const tern_linear *l)
{
    TERN__REQUIRE(&c->run, l->arenas > 0 && tern__finite(l->arenas), TERN_E_ARGUMENT, "%s: arenas is negative or not finite", l->w->name);
    TERN__REQUIRE(&c->run, l->w->rule != TERN_DENSE, TERN_E_ARGUMENT, "%s: arenas beside dense weights", l->w->name);
    return tern__check_buffer(c, l->w, TERN_SHADOW, l->w->rows * l->w->cols);
}

static tern_result tern__check_linear(tern_context *c, const tern_linear *l, int64_t n)
{
    tern_run *r;
    if (!c) return TERN_E_ARGUMENT;
    r = &c->run;
    TERN__REQUIRE(r, l && l->w, TERN_E_ARGUMENT, "linear: the layer or its w is NULL");
    TERN__TRY(tern__check_ready(c, l->w));
    TERN__TRY(tern__check_count(r, l->w->name, "n", n, tern__add(l->w->rows, tern__mul(32, l->w->cols))));
    TERN__REQUIRE(r, (l->norm == TERN_NORM_NONE || l->norm == TERN_NORM_RMS) && (int32_t)l->act >= TERN_ACT_INT8 && l->act <= TERN_ACT_BIT
                     && l->eps >= 0 && tern__finite(l->eps), TERN_E_ARGUMENT,
                  "%s: norm %d, act %d or eps is out of range", l->w->name, (int64_t)(int32_t)l->norm, (int64_t)(int32_t)l->act);
    TERN__TRY(tern__check_factors(r, l->w->name, l->gradients));
    TERN__REQUIRE(r, l->act != TERN_ACT_BIT || (l->norm == TERN_NORM_NONE && !l->w->rotate), TERN_E_ARGUMENT,
                  "%s: bits take neither norm nor rotation", l->w->name);
    if (l->bias) {
        TERN__TRY(tern__check_ready(c, l->bias));
        TERN__REQUIRE(r, l->bias->rule == TERN_DENSE && l->bias->rows * l->bias->cols == l->w->rows, TERN_E_SHAPE,
                      "%s: its bias has %d values for %d rows", l->w->name, l->bias->rows * l->bias->cols, l->w->rows);
    }
    if (l->gain) {
        TERN__TRY(tern__check_ready(c, l->gain));
        TERN__REQUIRE(r, l->gain->rule == TERN_DENSE && l->gain->rows * l->gain->cols == l->w->cols, TERN_E_SHAPE,
                      "%s: its gain has %d values for %d columns", l->w->name, l->gain->rows * l->gain->cols, l->w->cols);
        TERN__REQUIRE(r, l->norm == TERN_NORM_RMS, TERN_E_ARGUMENT, "%s: a gain without a norm", l->w->name);
    }
    if (l->w->dead) TERN__TRY(tern__check_dense_of(c, l->w->dead, l->w, "dead zone", 1, l->w->rows));
    if (l->lora_a || l->lora_b) TERN__TRY(tern__check_lora(c, l));
    return l->arenas != 0.0f ? tern__check_arenas(c, l) : TERN_OK;
}

/* Whether the forward reads float activations, and whether those are not x itself. */
static int32_t tern__reads_floats(const tern_linear *l) { return !tern__is_quantized(l) || l->w->rotate || l->lora_a || l->arenas > 0.0f; }
static int32_t tern__has_input(const tern_linear *l) { return tern__reads_floats(l) && (l->norm != TERN_NORM_NONE || l->w->rotate); }

#if !defined(TERNARY_NO_MOE) || !defined(TERNARY_NO_GRAPH)
/* Whether a layer is quantize and matmul, and no more. */
static int32_t tern__is_one_product(const tern_linear *l) { return !tern__reads_floats(l) && !(l->bias && l->w->dead); }
#endif

/* A BF16 shadow is multiplied as floats, some rows at a time. */
static int64_t tern__shadow_rows(const tern_param *p)
{
    return tern__buffer_type(p, TERN_SHADOW) == TERN_BF16 ? tern__chunk_rows(p, sizeof(float)) : p->rows;
}
static int64_t tern__shadow_bytes(const tern_param *p)
{
    return tern__buffer_type(p, TERN_SHADOW) == TERN_BF16 ? tern__shadow_rows(p) * p->cols * 4 : 0;
}

/* What an integer backward needs: dy as int8 and its scales, some rows of trits as int8, some rows of a product. */
typedef struct tern__integer { int8_t *q, *trits; float *scale; int32_t *product; int64_t rows, lines, bytes; } tern__integer;

/* Elements of these, or 16 rows where that is more (the tests set less, so that small shapes go in parts too). */
#ifndef TERN__INTEGER_PART
#define TERN__INTEGER_PART 4194304
#endif

static tern__integer tern__integer_at(const tern_param *p, int64_t n, void *base)
{
    const int64_t scale = tern__scratch_piece(tern__mul(n, p->rows)), trits = tern__add(scale, tern__scratch_piece(tern__mul(n, 4)));
    tern__integer w = {NULL, NULL, NULL, NULL, 0, 0, 0};
    int64_t product;
    w.rows = tern__min(p->rows, tern__min(tern__max(TERN__INTEGER_PART / p->cols, TERN__ROWS), TERN__I8_MOST_K) / TERN__ROWS * TERN__ROWS);
    w.lines = tern__min(tern__max(n, p->rows), tern__max(TERN__INTEGER_PART / p->cols, TERN__ROWS));
    product = tern__add(trits, tern__scratch_piece(w.rows * p->cols));
    w.bytes = tern__add(product, tern__scratch_piece(w.lines * p->cols * 4));
    if (!base) return w;
    w.q = (int8_t *)base;
    w.scale = (float *)(void *)(w.q + scale);
    w.trits = w.q + trits;
    w.product = (int32_t *)(void *)(w.q + product);
    return w;
}

/* Scratch: x~, in the backward the gradient before the norm; the bias with the dead zone's; LoRA's gradient of x~ A^T;
   of arenas outputs or their gradient; of an integer backward, the above. */
static int64_t tern__linear_scratch(const tern_linear *l, int64_t n)
{
    const int64_t row = tern__scratch_piece(tern__mul(tern__mul(n, l->w->cols), 4));
    int64_t bytes = 0;
    if (tern__has_input(l)) bytes = row;
    if (l->norm != TERN_NORM_NONE) bytes = tern__add(bytes, row);
    if (l->w->dead) bytes = tern__add(bytes, tern__scratch_piece(l->w->rows * 4));
    if (l->lora_a) bytes = tern__add(bytes, tern__scratch_piece(tern__mul(tern__mul(n, tern__rank(l)), 4)));
    if (l->arenas > 0.0f) {
        bytes = tern__add(bytes, tern__scratch_piece(tern__mul(tern__mul(n, l->w->rows), 4)));
        bytes = tern__add(bytes, tern__scratch_piece(tern__shadow_bytes(l->w)));
    }
    return tern__is_integer(l->w) ? tern__add(bytes, tern__integer_at(l->w, n, NULL).bytes) : bytes;
}

TERN_API tern_result tern_linear_need(tern_context *c, const tern_linear *l, int64_t n, tern_need *out)
{
    int64_t scratch;
    TERN__TRY(tern__check_linear(c, l, n));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "linear: out is NULL");
    scratch = tern__add(tern__kept_at(l, n, NULL).bytes, tern__linear_scratch(l, n));
    TERN__REQUIRE(&c->run, tern__fits(scratch), TERN_E_OVERFLOW, "%s: the scratch of %d tokens overflows", l->w->name, n);
    out->saved = (size_t)tern__kept_at(l, n, NULL).bytes;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

/* A layer begins to take its scratch. */
static tern_result tern__begin_scratch(tern_context *c, const char *name, int64_t n, size_t need)
{
    TERN__REQUIRE(&c->run, need <= c->scratch_bytes - c->scratch_base, TERN_E_SCRATCH,
                  "%s: %d tokens need %d bytes of scratch, %d are reserved", name, n, (int64_t)need,
                  (int64_t)(c->scratch_bytes - c->scratch_base));
    c->scratch_used = c->scratch_base;
    return TERN_OK;
}

static tern_result tern__need_scratch(tern_context *c, const tern_linear *l, int64_t n)
{
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_linear_need(c, l, n, &need));
    return tern__begin_scratch(c, l->w->name, n, need.scratch);
}

static float tern__linear_eps(const tern_linear *l) { return l->eps > 0.0f ? l->eps : 1e-6f; }

static tern_norm_args tern__linear_norm(const tern_linear *l, int64_t n, const float *x)
{
    tern_norm_args a;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.cols = l->w->cols;
    a.x = x;
    a.gain = tern__floats(l->gain, TERN_SHADOW);
    a.eps = tern__linear_eps(l);
    return a;
}

/* x~: x itself, or normalised and rotated into scratch. */
static tern_result tern__linear_input(tern_context *c, const tern_linear *l, int64_t n, const float *x, const float **out)
{
    float *y;
    *out = x;
    if (!tern__has_input(l)) return TERN_OK;
    y = (float *)tern__take(c, n * l->w->cols * 4);
    *out = y;
    if (l->norm != TERN_NORM_NONE) {
        tern_norm_args a = tern__linear_norm(l, n, x);
        a.y = y;
        TERN__TRY(tern_norm(c, &a));
        x = y;
    }
    return l->w->rotate ? tern__rotate(c, l->w, n, x, y, 0) : TERN_OK;
}

/* y = x W^T (+ bias) in float, W dense. */
static tern_dense_args tern__linear_dense(const tern_linear *l, int64_t n, const float *x, float *y)
{
    tern_dense_args a;
    memset(&a, 0, sizeof a);
    a.m = n; a.n = l->w->rows; a.k = l->w->cols;
    a.a = x; a.a_row = l->w->cols; a.a_col = 1;
    a.b = tern__floats(l->w, TERN_SHADOW); a.b_row = 1; a.b_col = l->w->cols;
    a.bias = tern__floats(l->bias, TERN_SHADOW);
    a.c = y; a.c_row = l->w->rows;
    return a;
}

/* The bias, with the dead zone's where there is one. */
static tern_result tern__linear_bias(tern_context *c, const tern_linear *l, const float **out)
{
    const float *dead = tern__floats(l->w->dead, TERN_SHADOW);
    float *sum;
    *out = tern__floats(l->bias, TERN_SHADOW);
    if (!dead) return TERN_OK;
    if (!*out) { *out = dead; return TERN_OK; }
    sum = (float *)tern__take(c, l->w->rows * 4);
    TERN__TRY(tern__add_scaled(c, l->w->rows, *out, 1.0f, dead, sum));
    *out = sum;
    return TERN_OK;
}

/* c [m, n] = a [m, k] b^T, b [n, k]; with add: c += . All contiguous. */
static tern_result tern__times_rows(tern_context *c, int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *y, int32_t add)
{
    tern_dense_args d;
    memset(&d, 0, sizeof d);
    d.m = m; d.n = n; d.k = k;
    d.a = a; d.a_row = k; d.a_col = 1;
    d.b = b; d.b_row = 1; d.b_col = k;
    d.c = y; d.c_row = n;
    d.add = add;
    return tern_dense(c, &d);
}

/* y += (x~ A^T * lora_scale) B^T; the product in brackets is kept. */
static tern_result tern__lora_forward(tern_context *c, const tern_linear *l, int64_t n, const float *input,
                                      const tern__kept *kept, float *y)
{
    const int64_t rank = tern__rank(l);
    TERN__TRY(tern__times_rows(c, n, rank, l->w->cols, input, tern__floats(l->lora_a, TERN_SHADOW), kept->low, 0));
    TERN__TRY(tern__add_scaled(c, n * rank, kept->low, l->lora_scale, NULL, kept->low));
    return tern__times_rows(c, n, l->w->rows, rank, kept->low, tern__floats(l->lora_b, TERN_SHADOW), y, 1);
}

/* out [n, rows] = x shadow^T, or (back) out [n, cols] += x shadow. */
static tern_result tern__times_shadow(tern_context *c, const tern_linear *l, int64_t n, const float *x, float *out, int32_t back)
{
    const tern_param *p = l->w;
    const int64_t bytes = tern__shadow_bytes(p);
    float *staging = bytes ? (float *)tern__take(c, bytes) : NULL;
    tern_dense_args d = tern__linear_dense(l, n, x, out);
    int64_t row, rows;
    d.bias = NULL;
    for (row = 0; row < p->rows; row += rows) {
        rows = tern__min(tern__shadow_rows(p), p->rows - row);
        d.b = staging ? staging : tern__floats(p, TERN_SHADOW);
        if (staging) TERN__TRY(tern__values(c, p, row, rows, 1, staging));
        if (back) {
            d.n = p->cols; d.k = rows;
            d.a = x + row; d.a_row = p->rows;
            d.b_row = p->cols; d.b_col = 1;
            d.c_row = p->cols;
            d.add = d.fused = 1;
            d.factors = l->gradients;
        } else {
            d.n = rows;
            d.c = out + row;
        }
        TERN__TRY(tern_dense(c, &d));
    }
    return TERN_OK;
}

/* y = activations W^T + bias, from those that are kept, or (not quantized) from x~. */
static tern_result tern__linear_times(tern_context *c, const tern_linear *l, int64_t n, const float *input, const tern__kept *kept,
                                      const float *bias, float *y)
{
    tern_matmul_args a;
    if (l->w->rule == TERN_DENSE) {
        tern_dense_args d = tern__linear_dense(l, n, input, y);
        return tern_dense(c, &d);
    }
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(l->w);
    a.act = l->act;
    a.n = n;
    a.q = kept->q; a.scale = kept->scale; a.sum = kept->sum;
    a.x = input;
    a.bias = bias;
    a.y = y;
    return tern_matmul(c, &a);
}

/* Activations of l from x, which is rotated already where w is: normalised then, too. */
static tern_quantize_args tern__linear_quantize(const tern_linear *l, int64_t n, const float *x, const tern__kept *kept)
{
    tern_quantize_args a;
    a.m = tern_param_matrix(l->w);
    a.act = l->act;
    a.n = n;
    a.x = x;
    a.norm = l->w->rotate ? TERN_NORM_NONE : l->norm;
    a.gain = l->w->rotate ? NULL : tern__floats(l->gain, TERN_SHADOW);
    a.eps = tern__linear_eps(l);
    a.q = kept->q; a.scale = kept->scale; a.sum = kept->sum;
    return a;
}

/* y = activations W^T + bias, from x where they are quantized together with the norm, else from x~. */
static tern_result tern__linear_weights(tern_context *c, const tern_linear *l, int64_t n, const float *x, const float *input,
                                        const tern__kept *kept, const float *bias, float *y)
{
    if (tern__is_quantized(l)) {
        tern_linear_args a;
        a.quantize = tern__linear_quantize(l, n, l->w->rotate ? input : x, kept);
        a.bias = bias;
        a.y = y;
        return tern__run_linear(c, &a);
    }
    return tern__linear_times(c, l, n, input, kept, bias, y);
}

TERN_API tern_result tern_linear_forward(tern_context *c, const tern_linear *l, int64_t n, const float *x, float *y, void *saved)
{
    tern__kept kept;
    const float *input = x, *bias;
    TERN__TRY(tern__need_scratch(c, l, n));
    TERN__TRY(tern__check_pointer(&c->run, l->w->name, "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, l->w->name, "y", y, 4));
    if (saved) TERN__TRY(tern__check_pointer(&c->run, l->w->name, "saved", saved, 4));
    kept = tern__kept_at(l, n, saved ? saved : tern__take(c, tern__kept_at(l, n, NULL).bytes));
    TERN__TRY(tern__linear_bias(c, l, &bias));
    if (tern__reads_floats(l)) TERN__TRY(tern__linear_input(c, l, n, x, &input));
    TERN__TRY(tern__linear_weights(c, l, n, x, input, &kept, bias, y));
    if (l->lora_a) TERN__TRY(tern__lora_forward(c, l, n, input, &kept, y));
    if (l->arenas > 0.0f) {
        float *shadow = (float *)tern__take(c, n * l->w->rows * 4);
        TERN__TRY(tern__times_shadow(c, l, n, input, shadow, 0));
        TERN__TRY(tern__add_scaled(c, n * l->w->rows, y, l->arenas, shadow, y));
    }
    return TERN_OK;
}

/* -- what a layer stands for, and what is put into it for good; rows in chunks -- */

/* B * lora_scale, to be freed. */
static tern_result tern__scaled_b(tern_context *c, const tern_linear *l, float **out)
{
    const int64_t count = l->w->rows * tern__rank(l);
    *out = (float *)tern_alloc(c, (size_t)count * sizeof(float));
    TERN__REQUIRE(&c->run, *out, TERN_E_MEMORY, "%s: no memory for %d floats of lora_b", l->w->name, count);
    return tern__add_scaled(c, count, tern__floats(l->lora_b, TERN_SHADOW), l->lora_scale, NULL, *out);
}

/* Rows [row, row + rows) of W += (B * lora_scale) A. */
static tern_result tern__add_lora(tern_context *c, const tern_linear *l, int64_t row, int64_t rows, const float *scaled_b, float *w)
{
    tern_dense_args d;
    memset(&d, 0, sizeof d);
    d.m = rows; d.n = l->w->cols; d.k = tern__rank(l);
    d.a = scaled_b + row * d.k; d.a_row = d.k; d.a_col = 1;
    d.b = tern__floats(l->lora_a, TERN_SHADOW); d.b_row = l->w->cols; d.b_col = 1;
    d.c = w; d.c_row = l->w->cols;
    d.add = 1;
    return tern_dense(c, &d);
}

/* What a merge takes and puts: some rows at a time, first all of them to see that they are finite. */
typedef struct tern__merge {
    tern_context *c;
    const tern_linear *l;
    float *scaled_b, *staging;
    tern_matrix trial; /* its trits: of a dense w floats */
    int64_t most;
    int32_t shadow;
} tern__merge;

/* Whole panels of a parameter, as a parameter of their own. */
static tern_param tern__panels_of(const tern_param *p, int64_t row, int64_t rows)
{
    const tern_matrix m = tern_param_matrix(p);
    const tern__shape s = tern__shape_of(&m);
    const int64_t scale = m.grain == TERN_PER_TENSOR ? 0 : tern__scale_index(&m, &s, row, 0);
    tern_param part = *p;
    part.rows = rows;
    part.buffer[TERN_TRITS].data = (uint8_t *)m.trits + row / TERN__ROWS * s.panel_bytes;
    part.buffer[TERN_SCALES].data = (uint8_t *)m.scales + scale * tern__type_bytes(m.scale_type);
    return part;
}

static tern_result tern__merge_rows(const tern__merge *g, int64_t row, int64_t rows, int32_t trial)
{
    const tern_param *p = g->l->w;
    tern_ternarize_args t;
    tern_cast_args a;
    tern_param part;
    tern_result result;
    TERN__TRY(tern__values(g->c, p, row, rows, g->shadow, g->staging));
    TERN__TRY(tern__add_lora(g->c, g->l, row, rows, g->scaled_b, g->staging));
    memset(&t, 0, sizeof t);
    t.m = g->trial;
    t.m.rows = rows;
    t.w = g->staging;
    a.count = rows * p->cols;
    a.from = a.to = TERN_F32;
    a.src = g->staging;
    a.dst = g->trial.trits;
    a.finite = 1;
    if (trial) {
        result = p->rule == TERN_DENSE ? tern_cast(g->c, &a) : tern_ternarize(g->c, &t);
        if (result != TERN_OK) {
            const tern_error e = g->c->run.error;
            tern__set_error(&g->c->run.error, result, "%s: merged rows from %d on: %s", p->name, row, e.text);
        }
        return result;
    }
    if (!g->shadow) {
        part = tern__panels_of(p, row, rows);
        t = tern__param_args(&part);
        t.rule = p->rule;
        t.type = TERN_F32;
        t.w = g->staging;
        t.rho = 0.0f;
        t.alpha = tern__floats(p->alpha, TERN_SHADOW);
        if (p->rule == TERN_SEQ) t.alpha += row;
        return tern__param_ternarize(g->c, &part, &t);
    }
    a.to = tern__buffer_type(p, TERN_SHADOW);
    a.dst = (uint8_t *)p->buffer[TERN_SHADOW].data + row * p->cols * tern__type_bytes(a.to);
    a.finite = 0;
    return tern_cast(g->c, &a);
}

static tern_result tern__merge_run(tern__merge *g)
{
    const tern_param *p = g->l->w;
    int64_t row, rows;
    int32_t trial;
    TERN__TRY(tern__scaled_b(g->c, g->l, &g->scaled_b));
    TERN__REQUIRE(&g->c->run, g->staging && g->trial.trits && g->trial.scales, TERN_E_MEMORY,
                  "%s: no memory to merge %d rows at a time", p->name, g->most);
    for (trial = 1; trial >= 0; trial--)
        for (row = 0; row < p->rows; row += rows) {
            rows = tern__min(g->most, p->rows - row);
            TERN__TRY(tern__merge_rows(g, row, rows, trial));
        }
    TERN__TRY(tern__clear(g->c, g->l->lora_b));
    if (!g->shadow) return TERN_OK;
    g->l->w->flags &= ~(uint32_t)TERN_KEEP_SCALES; /* those were of the weights before */
    return tern_param_set(g->c, g->l->w, TERN_TYPE_DEFAULT, NULL);
}

TERN_API tern_result tern_linear_merge(tern_context *c, const tern_linear *l)
{
    tern__merge g;
    tern_result result;
    size_t trits, scales = 64;
    TERN__TRY(tern__check_linear(c, l, 1));
    TERN__REQUIRE(&c->run, l->lora_a, TERN_E_MISSING, "%s: there is no lora_a to merge", l->w->name);
    TERN__TRY(tern__check_alpha(c, l->w));
    TERN__REQUIRE(&c->run, !tern__is_integer(l->w), TERN_E_UNSUPPORTED, "%s: a merge beside an accumulator; freeze it first", l->w->name);
    memset(&g, 0, sizeof g);
    g.c = c;
    g.l = l;
    g.shadow = l->w->buffer[TERN_SHADOW].data != NULL;
    if (g.shadow) TERN__TRY(tern__check_buffer(c, l->w, TERN_SHADOW, l->w->rows * l->w->cols));
    TERN__REQUIRE(&c->run, g.shadow || !l->w->dead, TERN_E_MISSING,
                  "%s: a merge changes the dead zone, which needs a shadow (or fold it first)", l->w->name);
    g.most = !g.shadow && l->w->grain == TERN_PER_TENSOR ? tern__ceil_div(l->w->rows, TERN__ROWS) * TERN__ROWS
                                                         : tern__chunk_rows(l->w, sizeof(float));
    g.trial.rows = g.most;
    g.trial.cols = l->w->cols;
    g.trial.grain = TERN_PER_ROW;
    trits = (size_t)(g.most * l->w->cols) * sizeof(float);
    if (l->w->rule != TERN_DENSE) TERN__TRY(tern_matrix_bytes(c, &g.trial, &trits, &scales));
    g.trial.trits = tern_alloc(c, trits);
    g.trial.scales = tern_alloc(c, scales);
    g.staging = (float *)tern_alloc(c, (size_t)(g.most * l->w->cols) * sizeof(float));
    result = tern__merge_run(&g);
    tern_free(c, g.trial.trits);
    tern_free(c, g.trial.scales);
    tern_free(c, g.staging);
    tern_free(c, g.scaled_b);
    return result;
}

TERN_API tern_result tern_linear_fold(tern_context *c, const tern_linear *l)
{
    TERN__TRY(tern__check_linear(c, l, 1));
    TERN__REQUIRE(&c->run, l->w->dead && l->bias, TERN_E_MISSING, "%s: to fold needs a dead zone, and a bias that takes it", l->w->name);
    TERN__TRY(tern__add_scaled(c, l->w->rows, tern__floats(l->bias, TERN_SHADOW), 1.0f, tern__floats(l->w->dead, TERN_SHADOW),
                               tern__floats(l->bias, TERN_SHADOW)));
    return tern__clear(c, l->w->dead);
}

static tern_result tern__rebuild_rows(tern_context *c, const tern_linear *l, int64_t row, int64_t rows, const float *scaled_b,
                                      float *staging, float *w)
{
    const tern_param *p = l->w;
    TERN__TRY(tern__values(c, p, row, rows, p->rule == TERN_DENSE, w));
    if (l->arenas > 0.0f) {
        TERN__TRY(tern__values(c, p, row, rows, 1, staging));
        TERN__TRY(tern__add_scaled(c, rows * p->cols, w, l->arenas, staging, w));
    }
    if (l->lora_a) TERN__TRY(tern__add_lora(c, l, row, rows, scaled_b, w));
    return p->rotate ? tern__rotate(c, p, rows, w, w, 1) : TERN_OK;
}

TERN_API tern_result tern_linear_rebuild(tern_context *c, const tern_linear *l, float *w)
{
    tern_result result = TERN_OK;
    float *scaled_b = NULL, *staging;
    int64_t row, rows;
    TERN__TRY(tern__check_linear(c, l, 1));
    TERN__TRY(tern__check_pointer(&c->run, l->w->name, "w", w, 4));
    staging = (float *)tern_alloc(c, (size_t)(tern__chunk_rows(l->w, sizeof(float)) * l->w->cols) * sizeof(float));
    if (!staging) result = tern__set_error(&c->run.error, TERN_E_MEMORY, "%s: no memory to rebuild", l->w->name);
    if (result == TERN_OK && l->lora_a) result = tern__scaled_b(c, l, &scaled_b);
    for (row = 0; result == TERN_OK && row < l->w->rows; row += rows) {
        rows = tern__min(tern__chunk_rows(l->w, sizeof(float)), l->w->rows - row);
        result = tern__rebuild_rows(c, l, row, rows, scaled_b, staging, w + row * l->w->cols);
    }
    tern_free(c, staging);
    tern_free(c, scaled_b);
    return result;
}

#ifndef TERNARY_NO_TRAINING
/* dW += dy^T x~ and db += column sums of dy, each or NULL; x~ in float where the activations were not quantized. */
static tern_result tern__linear_dw(tern_context *c, const tern_linear *l, int64_t n, const float *input, const tern__kept *kept,
                                   const float *dy, float *dw, float *dbias)
{
    tern_matmul_dw_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(l->w);
    a.n = n;
    a.dy = dy;
    a.dw = dw;
    a.dbias = dbias;
    a.act = l->act;
    a.q = kept->q;
    a.scale = kept->scale;
    a.x = input;
    a.factors = l->gradients;
    return a.dw || a.dbias ? tern_matmul_dw(c, &a) : TERN_OK;
}

/* dx~ of the weights: dy W. */
static tern_result tern__linear_dx(tern_context *c, const tern_linear *l, int64_t n, const float *dy, float *dx)
{
    tern_matmul_dx_args a;
    if (l->w->rule == TERN_DENSE) {
        tern_dense_args d = tern__linear_dense(l, n, dy, dx);
        d.n = l->w->cols; d.k = l->w->rows;
        d.a_row = l->w->rows;
        d.b_row = l->w->cols; d.b_col = 1;
        d.bias = NULL;
        d.c_row = l->w->cols;
        d.fused = 1;
        d.factors = l->gradients;
        return tern_dense(c, &d);
    }
    a.m = tern_param_matrix(l->w);
    a.n = n;
    a.dy = dy;
    a.dx = dx;
    a.factors = l->gradients;
    return tern_matmul_dx(c, &a);
}

/* -- the integer backward: both products are exact, so that gradients have the same bits on every tier -- */

/* Activations whose bytes are the factors of dw, and sums that fit into int32: 127 per row of w, 127 * 127 per token. */
static tern_result tern__check_integer_backward(tern_context *c, const tern_linear *l, int64_t n)
{
    tern_run *r = &c->run;
    TERN__REQUIRE(r, l->act == TERN_ACT_INT8 || l->act == TERN_ACT_INT4, TERN_E_UNSUPPORTED,
                  "%s: act %d beside an accumulator; its gradients need TERN_ACT_INT8 or TERN_ACT_INT4", l->w->name,
                  (int64_t)(int32_t)l->act);
    TERN__REQUIRE(r, l->arenas == 0.0f, TERN_E_UNSUPPORTED, "%s: arenas need a shadow, which an accumulator excludes", l->w->name);
    TERN__REQUIRE(r, !l->lora_a, TERN_E_UNSUPPORTED, "%s: LoRA beside an accumulator; freeze the matrix first", l->w->name);
    TERN__REQUIRE(r, n <= TERN__I8_MOST_K, TERN_E_SHAPE,
                  "%s: %d tokens; an integer backward takes %d at a time", l->w->name, n, (int64_t)TERN__I8_MOST_K);
    TERN__REQUIRE(r, l->w->rows <= (int64_t)1 << 24, TERN_E_SHAPE,
                  "%s: %d rows; an integer backward takes %d", l->w->name, l->w->rows, (int64_t)1 << 24);
    return TERN_OK;
}

/* A product in scratch as floats: [rows, cols] into y. */
static tern_result tern__from_product(tern_context *c, const tern__integer *w, int64_t rows, int64_t cols, const float *scale,
                                      int32_t whole, float *y, int64_t y_row)
{
    tern_dequantize_args a;
    a.n = rows;
    a.cols = cols;
    a.x = w->product;
    a.scale = scale;
    a.whole = whole;
    a.y = y;
    a.y_row = y_row;
    a.add = whole; /* dw is added to */
    return tern_dequantize(c, &a);
}

/* Tokens [t, t + tokens) of dx of a group's columns; *here: the first row of the trits that are unpacked. */
static tern_result tern__integer_dx_tokens(tern_context *c, const tern_linear *l, const tern__integer *w, int64_t g, int64_t t,
                                           int64_t tokens, int64_t *here, float *dx)
{
    const tern_matrix m = tern_param_matrix(l->w);
    const tern__shape s = tern__shape_of(&m);
    tern_unpack_args u;
    tern_dense_i8_args d;
    u.m = m;
    u.trits = w->trits;
    u.values = NULL;
    d.m = tokens;
    d.n = tern__group_cols(&m, &s, g);
    d.a_row = m.rows; d.a_col = 1;
    d.b = w->trits + g * s.group; d.b_row = m.cols; d.b_col = 1;
    d.c = w->product; d.c_row = d.n;
    for (u.row = 0; u.row < m.rows; u.row += u.count) {
        u.count = tern__min(w->rows, m.rows - u.row);
        if (*here != u.row) TERN__TRY(tern_unpack(c, &u));
        *here = u.row;
        d.k = u.count;
        d.a = w->q + t * m.rows + u.row;
        d.add = u.row > 0;
        TERN__TRY(tern_dense_i8(c, &d));
    }
    return tern__from_product(c, w, tokens, d.n, w->scale + t, 0, dx + t * m.cols + g * s.group, m.cols);
}

/* dx = (dy S) T, group by group. */
static tern_result tern__integer_dx(tern_context *c, const tern_linear *l, int64_t n, const float *dy, float *dx, const tern__integer *w)
{
    const tern_matrix m = tern_param_matrix(l->w);
    const tern__shape s = tern__shape_of(&m);
    tern_round_i8_args a;
    int64_t t, tokens, here = -1;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.cols = m.rows;
    a.x = dy;
    a.m = m;
    a.seed = l->seed;
    a.q = w->q;
    a.scale = w->scale;
    for (a.group = 0; a.group < s.groups; a.group++) {
        a.stream = (uint32_t)a.group + 1;
        TERN__TRY(tern_round_i8(c, &a));
        for (t = 0; t < n; t += tokens) {
            tokens = tern__min(w->lines, n - t);
            TERN__TRY(tern__integer_dx_tokens(c, l, w, a.group, t, tokens, &here, dx));
        }
    }
    return TERN_OK;
}

/* dw += (dy * the activations' scales)^T q. Groups that end with a unit lie side by side in q, and are one product. */
static tern_result tern__integer_dw(tern_context *c, const tern_linear *l, int64_t n, const tern__kept *kept, const float *dy, float *dw,
                                    const tern__integer *w)
{
    const tern_matrix m = tern_param_matrix(l->w);
    const tern__shape s = tern__shape_of(&m);
    const int64_t group = s.group % s.unit ? s.group : m.cols;
    tern_round_i8_args a;
    tern_dense_i8_args d;
    int64_t row, col;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.cols = m.rows;
    a.x = dy;
    a.row = kept->scale;
    a.whole = 1;
    a.seed = l->seed;
    a.q = w->q;
    a.scale = w->scale;
    TERN__TRY(tern_round_i8(c, &a));
    memset(&d, 0, sizeof d);
    d.k = n;
    d.a_row = 1; d.a_col = m.rows;
    d.b_row = s.stride; d.b_col = 1;
    d.c = w->product;
    for (row = 0; row < m.rows; row += d.m) {
        d.m = tern__min(w->lines, m.rows - row);
        d.a = w->q + row;
        for (col = 0; col < m.cols; col += group) {
            d.n = d.c_row = tern__min(group, m.cols - col);
            d.b = kept->q + col / s.group * s.group_units * s.unit;
            TERN__TRY(tern_dense_i8(c, &d));
            TERN__TRY(tern__from_product(c, w, d.m, d.n, w->scale, 1, dw + row * m.cols + col, m.cols));
        }
    }
    return TERN_OK;
}

/* c [m, n] (+)= a b of the backward of l, with a [m, k] or transposed [k, m], and b [k, n]. */
static tern_result tern__times_columns(tern_context *c, const tern_linear *l, int64_t m, int64_t n, int64_t k, const float *a,
                                       int32_t transposed, const float *b, float *y, int32_t add)
{
    tern_dense_args d;
    memset(&d, 0, sizeof d);
    d.m = m; d.n = n; d.k = k;
    d.a = a; d.a_row = transposed ? 1 : k; d.a_col = transposed ? m : 1;
    d.b = b; d.b_row = n; d.b_col = 1;
    d.c = y; d.c_row = n;
    d.add = add;
    d.fused = 1;
    d.factors = l->gradients;
    return tern_dense(c, &d);
}

/* dlow [n, r] = dy B * lora_scale; dB += dy^T low; dA += dlow^T x~. */
static tern_result tern__lora_backward(tern_context *c, const tern_linear *l, int64_t n, const float *input, const tern__kept *kept,
                                       const float *dy, float *dlow)
{
    const int64_t rows = l->w->rows, rank = tern__rank(l);
    float *da = tern__floats(l->lora_a, TERN_GRAD), *db = tern__floats(l->lora_b, TERN_GRAD);
    TERN__TRY(tern__times_columns(c, l, n, rank, rows, dy, 0, tern__floats(l->lora_b, TERN_SHADOW), dlow, 0));
    TERN__TRY(tern__add_scaled(c, n * rank, dlow, l->lora_scale, NULL, dlow));
    if (db) TERN__TRY(tern__times_columns(c, l, rows, rank, n, dy, 1, kept->low, db, 1));
    return da ? tern__times_columns(c, l, rank, l->w->cols, n, dlow, 1, input, da, 1) : TERN_OK;
}

/* dx~ of all parts, rotated back. dlow and scaled: of LoRA, and memory for arenas * dy; integer: set with an accumulator. */
static tern_result tern__linear_dinput(tern_context *c, const tern_linear *l, int64_t n, const float *dy, const float *dlow, float *scaled,
                                       const tern__integer *integer, float *dx)
{
    TERN__TRY(integer->q ? tern__integer_dx(c, l, n, dy, dx, integer) : tern__linear_dx(c, l, n, dy, dx));
    if (dlow) TERN__TRY(tern__times_columns(c, l, n, l->w->cols, tern__rank(l), dlow, 0, tern__floats(l->lora_a, TERN_SHADOW), dx, 1));
    if (scaled) {
        TERN__TRY(tern__add_scaled(c, n * l->w->rows, dy, l->arenas, NULL, scaled));
        TERN__TRY(tern__times_shadow(c, l, n, scaled, dx, 1));
    }
    return l->w->rotate ? tern__rotate(c, l->w, n, dx, dx, 1) : TERN_OK;
}

static tern_result tern__check_gradients(tern_context *c, const tern_linear *l)
{
    const tern_param *const all[] = {l->w, l->bias, l->gain, l->lora_a, l->lora_b, l->w->dead};
    size_t i;
    for (i = 0; i < sizeof all / sizeof *all; i++)
        if (tern__floats(all[i], TERN_GRAD)) TERN__TRY(tern__check_buffer(c, all[i], TERN_GRAD, all[i]->rows * all[i]->cols));
    return TERN_OK;
}

/* The gradients of w (with arenas: of both its parts, for the activations of the first), bias and dead zone. */
static tern_result tern__linear_dparams(tern_context *c, const tern_linear *l, int64_t n, const float *input, const tern__kept *kept,
                                        const float *dy, float *scaled, const tern__integer *integer)
{
    float *dw = tern__floats(l->w, TERN_GRAD), *dbias = tern__floats(l->bias, TERN_GRAD);
    if (integer->q) {
        if (dw) TERN__TRY(tern__integer_dw(c, l, n, kept, dy, dw, integer));
        return tern__linear_dw(c, l, n, input, kept, dy, NULL, dbias);
    }
    TERN__TRY(tern__linear_dw(c, l, n, input, kept, dy, NULL, tern__floats(l->w->dead, TERN_GRAD)));
    if (!scaled) return tern__linear_dw(c, l, n, input, kept, dy, dw, dbias);
    TERN__TRY(tern__linear_dw(c, l, n, input, kept, dy, NULL, dbias));
    TERN__TRY(tern__add_scaled(c, n * l->w->rows, dy, 1.0f + l->arenas, NULL, scaled));
    return tern__linear_dw(c, l, n, input, kept, scaled, dw, NULL);
}

TERN_API tern_result tern_linear_backward(tern_context *c, const tern_linear *l, int64_t n, const float *x, const void *saved,
                                          const float *dy, float *dx)
{
    tern__kept kept;
    tern__integer integer = {NULL, NULL, NULL, NULL, 0, 0, 0};
    tern_norm_args norm;
    const float *input = NULL;
    float *dgain, *dlow = NULL, *scaled = NULL;
    TERN__TRY(tern__need_scratch(c, l, n));
    TERN__TRY(tern__check_pointer(&c->run, l->w->name, "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, l->w->name, "dy", dy, 4));
    if (dx) TERN__TRY(tern__check_pointer(&c->run, l->w->name, "dx", dx, 4));
    if (tern__kept_at(l, n, NULL).bytes) TERN__TRY(tern__check_pointer(&c->run, l->w->name, "saved", saved, 4));
    TERN__TRY(tern__check_gradients(c, l));
    if (tern__is_integer(l->w)) {
        TERN__TRY(tern__check_integer_backward(c, l, n));
        integer = tern__integer_at(l->w, n, tern__take(c, tern__integer_at(l->w, n, NULL).bytes));
    }
    kept = tern__kept_at(l, n, (void *)(uintptr_t)saved);
    if ((tern__floats(l->w, TERN_GRAD) && !kept.q) || tern__floats(l->lora_a, TERN_GRAD)) TERN__TRY(tern__linear_input(c, l, n, x, &input));
    if (l->arenas > 0.0f) scaled = (float *)tern__take(c, n * l->w->rows * 4);
    TERN__TRY(tern__linear_dparams(c, l, n, input, &kept, dy, scaled, &integer));
    if (l->lora_a) {
        dlow = (float *)tern__take(c, n * tern__rank(l) * 4);
        TERN__TRY(tern__lora_backward(c, l, n, input, &kept, dy, dlow));
    }
    dgain = tern__floats(l->gain, TERN_GRAD);
    if (l->norm == TERN_NORM_NONE) return dx ? tern__linear_dinput(c, l, n, dy, dlow, scaled, &integer, dx) : TERN_OK;
    if (!dx && !dgain) return TERN_OK;
    norm = tern__linear_norm(l, n, x);
    norm.dx = dx;
    norm.dgain = dgain;
    norm.dy = (float *)tern__take(c, n * l->w->cols * 4);
    TERN__TRY(tern__linear_dinput(c, l, n, dy, dlow, scaled, &integer, (float *)(uintptr_t)norm.dy));
    return tern_norm(c, &norm);
}
#endif

/* -- for layers that are made of others -- */
#if !defined(TERNARY_NO_MOE) || !defined(TERNARY_NO_GRAPH)

/* Consecutive pieces of memory, or (base NULL) their size. */
typedef struct tern__layout { unsigned char *base; int64_t bytes; } tern__layout;

static void *tern__piece(tern__layout *p, int64_t count, int64_t width)
{
    void *at = p->base ? p->base + p->bytes : NULL;
    p->bytes = tern__add(p->bytes, tern__scratch_piece(tern__mul(count, width)));
    return at;
}

static float *tern__piece_of_floats(tern__layout *p, int64_t rows, int64_t cols)
{
    return (float *)tern__piece(p, tern__mul(rows, cols), 4);
}
static int32_t *tern__piece_of_ids(tern__layout *p, int64_t count) { return (int32_t *)tern__piece(p, count, 4); }

static int64_t tern__linear_bytes(const tern_linear *l, int64_t n)
{
    return tern__add(tern__kept_at(l, n, NULL).bytes, tern__linear_scratch(l, n));
}

static tern_result tern__apply(tern_context *c, tern_map_fn fn, int64_t count, const float *a, const float *b, float *y)
{
    return tern__map_of(c, fn, count, a, 1.0f, b, y);
}

#ifndef TERNARY_NO_TRAINING
static tern_result tern__apply_back(tern_context *c, tern_map_fn fn, int64_t count, const float *a, const float *b, const float *dy,
                                    float *da, float *db)
{
    tern_map_args p;
    memset(&p, 0, sizeof p);
    p.fn = fn;
    p.count = count;
    p.a = a;
    p.b = b;
    p.dy = dy;
    p.da = da;
    p.db = db;
    return tern_map(c, &p);
}
#endif
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-16] Embedding
   What enters: token ids. What leaves: rows of a ternary (or dense) table; gradients added by row.
   ------------------------------------------------------------------------------------------------ */

TERN_API tern_result tern_embedding_forward(tern_context *c, const tern_embedding *e, int64_t n, const int32_t *ids, float *y)
{
    tern_gather_args a;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, e, TERN_E_ARGUMENT, "embedding: the embedding is NULL");
    TERN__TRY(tern__check_ready(c, e->w));
    TERN__REQUIRE(&c->run, !e->w->rotate && !e->w->dead, TERN_E_UNSUPPORTED,
                  "%s: an embedding has neither a rotation nor a dead zone", e->w->name);
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(e->w);
    if (e->w->rule == TERN_DENSE) a.m.trits = NULL;
    a.w = tern__floats(e->w, TERN_SHADOW);
    a.n = n;
    a.ids = ids;
    a.y = y;
    return tern_gather(c, &a);
}

#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_embedding_backward(tern_context *c, const tern_embedding *e, int64_t n, const int32_t *ids, const float *dy)
{
    tern_scatter_args a;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, e, TERN_E_ARGUMENT, "embedding: the embedding is NULL");
    TERN__TRY(tern__check_ready(c, e->w));
    TERN__REQUIRE(&c->run, !e->w->rotate && !e->w->dead, TERN_E_UNSUPPORTED,
                  "%s: an embedding has neither a rotation nor a dead zone", e->w->name);
    if (!e->w->buffer[TERN_GRAD].data) return TERN_OK;
    TERN__TRY(tern__check_buffer(c, e->w, TERN_GRAD, e->w->rows * e->w->cols));
    a.rows = e->w->rows;
    a.cols = e->w->cols;
    a.n = n;
    a.ids = ids;
    a.weight = NULL;
    a.dy = dy;
    a.dw = tern__floats(e->w, TERN_GRAD);
    return tern_scatter(c, &a);
}
#endif

TERN_API tern_linear tern_embedding_as_linear(const tern_embedding *e, tern_norm_kind norm, tern_act act)
{
    tern_linear l;
    memset(&l, 0, sizeof l);
    l.w = e->w;
    l.norm = norm;
    l.act = act;
    return l;
}

/* ------------------------------------------------------------------------------------------------
   [TERN-17] Mixture of experts
   What enters: tokens, a router and the experts' parameters. What leaves: for each token the weighted sum of
   the experts that the router chose, their gradients, and what was chosen how often. Experts run one after
   the other, each over its tokens at once, or all in groups; a token's sum goes in the order of the experts. The backward
   computes the experts again: what is saved does not grow with what is chosen.
   ------------------------------------------------------------------------------------------------ */
#ifndef TERNARY_NO_MOE

/* Experts read x as it was normalised and quantized once for all of them; what they made of it goes down. */
static tern_linear tern__moe_reader(const tern_moe *m, tern_param *w)
{
    tern_linear l;
    memset(&l, 0, sizeof l);
    l.w = w;
    l.act = m->act;
    l.seed = tern__fnv(m->seed, (const uint8_t *)(const void *)w->name, strlen(w->name)); /* each its own noise */
    l.gradients = m->gradients;
    return l;
}

static tern_linear tern__moe_front(const tern_moe *m, tern_param *w)
{
    tern_linear l = tern__moe_reader(m, w);
    l.gain = m->gain;
    l.norm = m->norm;
    l.eps = m->eps;
    return l;
}

static tern_linear tern__moe_down(const tern_moe *m, tern_param *w)
{
    tern_linear l = tern__moe_reader(m, w);
    l.norm = m->inner;
    l.eps = m->eps;
    return l;
}

static int32_t tern__moe_quantizes(const tern_moe *m, const tern_param *w) { return tern__quantizes(m->act, w); }

/* Of the parameters that read x (those beside them are alike): one that reads it quantized, and whether one reads floats. */
static tern_param *tern__moe_quantized(const tern_moe *m)
{
    if (tern__moe_quantizes(m, m->experts->up)) return m->experts->up;
    return m->low_a && tern__moe_quantizes(m, m->low_a[0]) ? m->low_a[0] : NULL;
}
static int32_t tern__moe_floats(const tern_moe *m)
{
    return !tern__moe_quantizes(m, m->experts->up) || (m->low_a && !tern__moe_quantizes(m, m->low_a[0]));
}

/* What experts have of their own: the first and the second that a row meets. */
static const tern_param *tern__moe_first(const tern_moe *m) { return m->low_a ? m->low_a[0] : m->experts->up; }
static const tern_param *tern__moe_second(const tern_moe *m) { return m->low_a ? m->low_b[0] : m->experts->down; }

/* Whether it may be multiplied in groups, and whether the backend does. */
static int32_t tern__moe_has_groups(const tern_moe *m)
{
    return tern__moe_quantizes(m, tern__moe_first(m)) && tern__moe_quantizes(m, tern__moe_second(m)) && !tern__moe_second(m)->rotate;
}
static int32_t tern__moe_grouped(const tern_context *c, const tern_moe *m) { return c->run.backend->grouped && tern__moe_has_groups(m); }

/* In groups, what was chosen is all that is read, and nothing is waited for: few tokens need no other way. */
static int32_t tern__moe_dense(const tern_context *c, const tern_moe *m, int64_t n)
{
    if (m->dispatch != TERN_DISPATCH_AUTO) return m->dispatch == TERN_DISPATCH_DENSE;
    if (m->dense_max > 0) return n <= m->dense_max;
    return !tern__moe_grouped(c, m) && n <= c->run.backend->dense_max;
}

/* -- checks -- */

static tern_result tern__check_alike(tern_context *c, const tern_param *p, const tern_param *like, const char *what, int64_t expert,
                                     int32_t any_rows)
{
    tern_run *r = &c->run;
    TERN__REQUIRE(r, p, TERN_E_MISSING, "moe: expert %d has no %s", expert, what);
    if (p == like) return TERN_OK;
    TERN__REQUIRE(r, p->cols == like->cols && (any_rows || p->rows == like->rows), TERN_E_SHAPE,
                  "moe: the %s of expert %d is %d x %d, that of the first %d x %d", what, expert, p->rows, p->cols, like->rows, like->cols);
    TERN__REQUIRE(r, p->rule == like->rule && p->grain == like->grain
                     && tern__buffer_type(p, TERN_TRITS) == tern__buffer_type(like, TERN_TRITS)
                     && tern__buffer_type(p, TERN_SCALES) == tern__buffer_type(like, TERN_SCALES)
                     && tern__is_integer(p) == tern__is_integer(like), TERN_E_ARGUMENT,
                  "moe: the %s of expert %d differs from that of the first in rule, grain, encoding, type of scales or accumulator",
                  what, expert);
    TERN__REQUIRE(r, !p->dead == !like->dead && p->rotate == like->rotate, TERN_E_ARGUMENT,
                  "moe: the %s of expert %d differs from that of the first in rotation or dead zone", what, expert);
    return TERN_OK;
}

/* Whether all that is checked of `like` holds of p too: a mixture has hundreds of parameters, which are checked in every call. */
static int32_t tern__is_twin(const tern_param *p, const tern_param *like)
{
    int32_t i, same;
    if (!p || !like) return p == like;
    same = memchr(p->name, 0, sizeof p->name) && p->rows == like->rows && p->cols == like->cols
           && p->rule == like->rule && p->grain == like->grain && !p->alpha && !like->alpha && !p->dead && !like->dead
           && p->rho == like->rho && p->noise == like->noise && p->zone == like->zone
           && p->rotate == like->rotate && p->sync == like->sync && p->theta == like->theta;
    for (i = 0; same && i < TERN_BUFFERS; i++) {
        const tern_buffer *a = &p->buffer[i], *b = &like->buffer[i];
        same = a->type == b->type && a->count == b->count && !a->data == !b->data && (((uintptr_t)a->data ^ (uintptr_t)b->data) & 63) == 0;
    }
    return same;
}

/* A parameter that reads the shared activations of x. */
static tern_result tern__check_reader(tern_context *c, const tern_moe *m, tern_param *w, int64_t n)
{
    const tern_linear l = tern__moe_reader(m, w);
    const tern_matrix a = tern_param_matrix(w), b = tern_param_matrix(m->experts->up);
    TERN__TRY(tern__check_linear(c, &l, n));
    TERN__REQUIRE(&c->run, !w->rotate, TERN_E_UNSUPPORTED, "%s: what experts share is not rotated", w->name);
    TERN__REQUIRE(&c->run, w->cols == m->experts->up->cols, TERN_E_SHAPE,
                  "%s: it has %d columns, %s %d", w->name, w->cols, m->experts->up->name, m->experts->up->cols);
    TERN__REQUIRE(&c->run, !tern__moe_quantizes(m, w) || !tern__moe_quantizes(m, m->experts->up) ||
                  (a.encoding == b.encoding && (a.grain > 0 ? a.grain : 0) == (b.grain > 0 ? b.grain : 0)), TERN_E_ARGUMENT,
                  "%s and %s read the same activations; their groups and encodings must be alike", w->name, m->experts->up->name);
    return TERN_OK;
}

static tern_result tern__check_expert(tern_context *c, const tern_moe *m, const tern_expert *e, int64_t index, int64_t n)
{
    const tern_expert *like = m->experts;
    const int32_t always = e == m->always;
    tern_linear down;
    if (!always && index && tern__is_twin(e->up, like->up) && tern__is_twin(e->gate, like->gate) && tern__is_twin(e->down, like->down))
        return TERN_OK;
    TERN__TRY(tern__check_alike(c, e->up, like->up, "up", index, always));
    TERN__REQUIRE(&c->run, !e->gate == !like->gate || always, TERN_E_MISSING,
                  "moe: expert %d and the first differ in having a gate", index);
    if (e->gate) TERN__TRY(tern__check_alike(c, e->gate, e == like || !like->gate ? e->up : like->gate, "gate", index, always));
    TERN__REQUIRE(&c->run, !e->gate || e->gate->rows == e->up->rows, TERN_E_SHAPE,
                  "%s has %d rows, %s %d", e->gate->name, e->gate->rows, e->up->name, e->up->rows);
    if (!always) TERN__TRY(tern__check_alike(c, e->down, like->down, "down", index, 0));
    TERN__REQUIRE(&c->run, e->down, TERN_E_MISSING, "moe: the expert that is always on has no down");
    TERN__REQUIRE(&c->run, e->down->rows == e->up->cols && e->down->cols == e->up->rows, TERN_E_SHAPE,
                  "%s is %d x %d beside %s of %d x %d", e->down->name, e->down->rows, e->down->cols, e->up->name, e->up->rows, e->up->cols);
    TERN__TRY(tern__check_reader(c, m, e->up, n));
    if (e->gate) TERN__TRY(tern__check_reader(c, m, e->gate, n));
    down = tern__moe_down(m, e->down);
    return tern__check_linear(c, &down, n);
}

static tern_result tern__check_low(tern_context *c, const tern_moe *m, int64_t index, int64_t n)
{
    tern_linear b;
    if (index && tern__is_twin(m->low_a[index], m->low_a[0]) && tern__is_twin(m->low_b[index], m->low_b[0])) return TERN_OK;
    TERN__TRY(tern__check_alike(c, m->low_a[index], m->low_a[0], "low_a", index, 0));
    TERN__TRY(tern__check_alike(c, m->low_b[index], m->low_b[0], "low_b", index, 0));
    TERN__REQUIRE(&c->run, m->low_b[index]->rows == m->experts->up->rows && m->low_b[index]->cols == m->low_a[index]->rows, TERN_E_SHAPE,
                  "%s is %d x %d, between %s of %d rows and %s of %d", m->low_b[index]->name, m->low_b[index]->rows, m->low_b[index]->cols,
                  m->experts->up->name, m->experts->up->rows, m->low_a[index]->name, m->low_a[index]->rows);
    TERN__TRY(tern__check_reader(c, m, m->low_a[index], n));
    b = tern__moe_reader(m, m->low_b[index]);
    return tern__check_linear(c, &b, n);
}

static tern_result tern__check_moe(tern_context *c, const tern_moe *m, int64_t n)
{
    tern_run *r;
    tern_linear front;
    int32_t e;
    if (!c) return TERN_E_ARGUMENT;
    r = &c->run;
    TERN__REQUIRE(r, m && m->experts && m->experts->up && m->experts->down, TERN_E_ARGUMENT,
                  "moe: the layer, its experts or the parameters of the first are NULL");
    TERN__REQUIRE(r, !m->low_a == !m->low_b, TERN_E_ARGUMENT, "moe: low_a and low_b come together");
    TERN__TRY(tern__check_choice(r, "moe", n, m->count, m->top_k));
    TERN__REQUIRE(r, (m->fn == TERN_MAP_ADD || (m->fn >= TERN_MAP_RELU && m->fn <= TERN_MAP_GELU)) && (int32_t)m->weights >= 0
                     && m->weights <= TERN_ROUTE_ALL && (int32_t)m->dispatch >= 0 && m->dispatch <= TERN_DISPATCH_SPARSE
                     && (m->inner == TERN_NORM_NONE || m->inner == TERN_NORM_RMS) && m->dense_max >= 0, TERN_E_ARGUMENT,
                  "moe: fn %d, weights %d, dispatch %d, inner norm %d or dense_max %d is out of range", (int64_t)(int32_t)m->fn,
                  (int64_t)(int32_t)m->weights, (int64_t)(int32_t)m->dispatch, (int64_t)(int32_t)m->inner, m->dense_max);
    TERN__REQUIRE(r, tern__finite(m->balance), TERN_E_ARGUMENT, "moe: balance is not finite");
    for (e = 0; e < (m->low_a ? 1 : m->count); e++) TERN__TRY(tern__check_expert(c, m, &m->experts[e], e, n));
    for (e = 0; m->low_a && e < m->count; e++) TERN__TRY(tern__check_low(c, m, e, n));
    if (m->always) {
        TERN__REQUIRE(r, m->always->up, TERN_E_MISSING, "moe: the expert that is always on has no up");
        TERN__TRY(tern__check_expert(c, m, m->always, -1, n));
    }
    front = tern__moe_front(m, m->experts->up);
    TERN__TRY(tern__check_linear(c, &front, n));
    TERN__TRY(tern__check_linear(c, &m->router, n));
    TERN__REQUIRE(r, m->router.w->rows == m->count && m->router.w->cols == m->experts->up->cols, TERN_E_SHAPE,
                  "%s is %d x %d for %d experts of %d inputs", m->router.w->name, m->router.w->rows, m->router.w->cols, (int64_t)m->count,
                  m->experts->up->cols);
    return TERN_OK;
}

/* -- memory -- */

/* Activations of some tokens as experts read them. */
typedef struct tern__moe_rows { tern__kept kept; const float *x; } tern__moe_rows;

typedef struct tern__moe_work {
    /* `saved`: the activations of all tokens and what was chosen; of the low-rank form, the sum that goes down */
    tern__kept x;
    void *router, *inner;
    float *logits, *weights, *sum;
    int32_t *ids, *loads;
    /* scratch: x~ in float; groups; the rows of an expert and what becomes of them */
    float *normed, *sorted, *gathered, *gate, *up, *fn, *h, *picked, *out, *low, *hidden;
    int32_t *tokens, *slots;
    void *rows;
    int64_t part; /* so many places at once */
    /* and of the backward */
    float *dweights, *dlogits, *dx, *dout, *drows, *dh, *dgate, *dup, *dlow, *dsum, *dhidden;
    void *again;
    int64_t saved_bytes, scratch_bytes, nested;
} tern__moe_work;

static int64_t tern__moe_width(const tern_moe *m) { return tern__max(m->experts->up->rows, m->always ? m->always->up->rows : 0); }

static void tern__moe_saved(const tern_moe *m, int64_t n, void *base, tern__moe_work *w)
{
    tern_param *quantized = tern__moe_quantized(m);
    tern__layout p = {(unsigned char *)base, 0};
    memset(&w->x, 0, sizeof w->x);
    if (quantized) {
        const tern_linear l = tern__moe_reader(m, quantized);
        w->x = tern__kept_at(&l, n, tern__piece(&p, tern__kept_at(&l, n, NULL).bytes, 1));
    }
    w->router = tern__piece(&p, tern__kept_at(&m->router, n, NULL).bytes, 1);
    w->logits = tern__piece_of_floats(&p, n, m->count);
    w->weights = tern__piece_of_floats(&p, n, m->top_k);
    w->ids = tern__piece_of_ids(&p, n * m->top_k);
    w->loads = tern__piece_of_ids(&p, m->count);
    if (m->low_a) {
        const tern_linear down = tern__moe_down(m, m->experts->down);
        w->inner = tern__piece(&p, tern__kept_at(&down, n, NULL).bytes, 1);
        w->sum = tern__piece_of_floats(&p, n, m->experts->up->rows);
    }
    w->saved_bytes = p.bytes;
}

/* What layers inside this one take, the largest of it: those of a kind are alike. */
static int64_t tern__moe_nested(const tern_moe *m, int64_t n)
{
    tern_param *const readers[] = {m->experts->up, m->experts->gate, m->always ? m->always->up : NULL, m->always ? m->always->gate : NULL,
                                   m->low_a ? m->low_a[0] : NULL, m->low_b ? m->low_b[0] : NULL};
    tern_param *const downs[] = {m->experts->down, m->always ? m->always->down : NULL};
    int64_t most = tern__linear_bytes(&m->router, n);
    size_t i;
    tern_linear l;
    for (i = 0; i < sizeof readers / sizeof *readers; i++)
        if (readers[i]) { l = tern__moe_reader(m, readers[i]); most = tern__max(most, tern__linear_bytes(&l, n)); }
    for (i = 0; i < sizeof downs / sizeof *downs; i++)
        if (downs[i]) { l = tern__moe_down(m, downs[i]); most = tern__max(most, tern__linear_bytes(&l, n)); }
    return most;
}

/* What an expert's forward keeps for its backward, which follows at once: of down, or of low_b. */
static int64_t tern__moe_again(const tern_moe *m, int64_t n)
{
    tern_linear l = m->low_b ? tern__moe_reader(m, m->low_b[0]) : tern__moe_down(m, m->experts->down);
    int64_t bytes = tern__kept_at(&l, n, NULL).bytes;
    if (!m->always) return bytes;
    l = tern__moe_down(m, m->always->down);
    return tern__max(bytes, tern__kept_at(&l, n, NULL).bytes);
}

#ifndef TERN__MOE_PART /* as many as the GPU takes in one launch; the tests set less, so that few tokens go in parts too */
#define TERN__MOE_PART 256
#endif

/* Places that go through experts at once where a backend multiplies in groups: those of few tokens all together, else no
   more than all tokens at one expert. Gradients of experts that may go in groups are sums over those of a part, and then of the
   parts, on every backend; the order differs only for a matrix that is both a down and an up or gate. */
static int64_t tern__moe_part(const tern_moe *m, int64_t n) { return tern__min(tern__mul(n, m->top_k), tern__max(n, TERN__MOE_PART)); }

/* All memory of a forward or backward, from base on (NULL: sizes alone), with `saved` first where the caller has none. */
static void tern__moe_memory(const tern_moe *m, int64_t n, int32_t dense, int32_t backward, void *saved, void *base, tern__moe_work *w)
{
    const int64_t cols = m->experts->up->cols, width = tern__moe_width(m), rank = m->low_a ? m->low_a[0]->rows : 0;
    const int64_t places = tern__mul(n, dense && !backward ? m->count : m->top_k), part = tern__moe_part(m, n);
    tern_param *quantized = tern__moe_quantized(m);
    tern__layout p = {(unsigned char *)base, 0};
    memset(w, 0, sizeof *w);
    w->part = part;
    tern__moe_saved(m, n, saved, w);
    if (!saved) tern__moe_saved(m, n, tern__piece(&p, w->saved_bytes, 1), w);
    if (tern__moe_floats(m) && m->norm != TERN_NORM_NONE) w->normed = tern__piece_of_floats(&p, n, cols);
    w->tokens = tern__piece_of_ids(&p, places);
    w->slots = tern__piece_of_ids(&p, places);
    w->sorted = tern__piece_of_floats(&p, places, 1);
    if (quantized) {
        const tern_linear l = tern__moe_reader(m, quantized);
        w->rows = tern__piece(&p, tern__kept_at(&l, part, NULL).bytes, 1);
    }
    if (tern__moe_floats(m)) w->gathered = tern__piece_of_floats(&p, n, cols);
    w->gate = tern__piece_of_floats(&p, part, width);
    w->up = tern__piece_of_floats(&p, part, width);
    w->fn = tern__piece_of_floats(&p, part, width);
    w->h = tern__piece_of_floats(&p, part, width);
    w->picked = tern__piece_of_floats(&p, n, tern__max(width, rank));
    w->out = tern__piece_of_floats(&p, part, cols);
    if (m->low_a) {
        w->low = tern__piece_of_floats(&p, part, rank);
        w->hidden = tern__piece_of_floats(&p, n, width);
    }
    if (backward) {
        w->loads = tern__piece_of_ids(&p, m->count); /* counted again: `saved` is read alone */
        w->dweights = tern__piece_of_floats(&p, n, m->top_k);
        w->dlogits = tern__piece_of_floats(&p, n, m->count);
        w->dx = tern__piece_of_floats(&p, n, cols);
        w->dout = tern__piece_of_floats(&p, part, tern__max(cols, width));
        w->drows = tern__piece_of_floats(&p, tern__mul(2, part), cols); /* of gate and up */
        w->dh = tern__piece_of_floats(&p, part, width);
        w->dgate = tern__piece_of_floats(&p, part, width);
        w->dup = tern__piece_of_floats(&p, part, width);
        w->again = tern__piece(&p, tern__moe_again(m, part), 1);
        if (m->low_a) {
            w->dlow = tern__piece_of_floats(&p, part, rank);
            w->dsum = tern__piece_of_floats(&p, n, width);
            w->dhidden = tern__piece_of_floats(&p, n, width);
        }
    }
    w->scratch_bytes = p.bytes;
    w->nested = tern__moe_nested(m, part);
}

TERN_API tern_result tern_moe_need(tern_context *c, const tern_moe *m, int64_t n, tern_need *out)
{
    tern__moe_work forward, backward;
    int64_t scratch;
    TERN__TRY(tern__check_moe(c, m, n));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "moe: out is NULL");
    tern__moe_memory(m, n, tern__moe_dense(c, m, n), 0, NULL, NULL, &forward);
    tern__moe_memory(m, n, 0, 1, NULL, NULL, &backward); /* `saved` counted too: simple, and safe */
    scratch = tern__add(tern__max(forward.scratch_bytes, backward.scratch_bytes), forward.nested);
    TERN__REQUIRE(&c->run, tern__fits(scratch), TERN_E_OVERFLOW, "moe: the scratch of %d tokens overflows", n);
    out->saved = (size_t)forward.saved_bytes;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

/* Layers inside this one take their scratch behind its own, until tern__moe_leave. */
static tern_result tern__moe_enter(tern_context *c, const tern_moe *m, int64_t n, int32_t backward, void *saved, tern__moe_work *w)
{
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_moe_need(c, m, n, &need));
    TERN__TRY(tern__begin_scratch(c, "moe", n, need.scratch));
    tern__moe_memory(m, n, tern__moe_dense(c, m, n), backward, saved, c->scratch + c->scratch_base, w);
    c->scratch_base += (size_t)w->scratch_bytes;
    return TERN_OK;
}

static tern_result tern__moe_leave(tern_context *c, const tern__moe_work *w, tern_result result)
{
    c->scratch_base -= (size_t)w->scratch_bytes;
    return result;
}

/* -- rows -- */

/* ids: of tern_group, where a place of a token that goes to no expert has -1. */
static tern_result tern__gather_rows_of(tern_context *c, int64_t rows, int64_t cols, const void *from, int64_t n, const int32_t *ids,
                                        const float *weight, void *to)
{
    tern_gather_args a;
    memset(&a, 0, sizeof a);
    a.m.rows = rows;
    a.m.cols = cols;
    a.w = (const float *)from;
    a.n = n;
    a.ids = ids;
    a.weight = weight;
    a.y = (float *)to;
    a.holes = 1;
    return tern_gather(c, &a);
}

static tern_result tern__scatter_rows_of(tern_context *c, int64_t rows, int64_t cols, const float *from, int64_t n, const int32_t *ids,
                                         const float *weight, float *to)
{
    tern_scatter_args a;
    a.rows = rows;
    a.cols = cols;
    a.n = n;
    a.ids = ids;
    a.weight = weight;
    a.dy = from;
    a.dw = to;
    return tern_scatter(c, &a);
}

static tern_map_fn tern__moe_fn(const tern_moe *m) { return m->fn == TERN_MAP_ADD ? TERN_MAP_SILU : m->fn; }

/* -- forward -- */

static tern_result tern__moe_quantize(tern_context *c, const tern_linear *l, int64_t n, const float *x, const tern__kept *kept)
{
    const tern_quantize_args a = tern__linear_quantize(l, n, x, kept);
    return tern_quantize(c, &a);
}

/* The activations of all tokens; the quantized ones are in `saved` already where `quantize` is 0. */
static tern_result tern__moe_read(tern_context *c, const tern_moe *m, int64_t n, const float *x, const tern__moe_work *w, int32_t quantize,
                                  tern__moe_rows *all)
{
    tern_param *quantized = tern__moe_quantized(m);
    const tern_linear l = tern__moe_front(m, quantized ? quantized : m->experts->up);
    all->kept = w->x;
    all->x = w->normed ? w->normed : x;
    if (quantized && quantize) {
        TERN__TRY(tern__moe_quantize(c, &l, n, x, &w->x));
    }
    if (w->normed) {
        tern_norm_args a = tern__linear_norm(&l, n, x);
        a.y = w->normed;
        return tern_norm(c, &a);
    }
    return TERN_OK;
}

/* Those of some tokens. */
static tern_result tern__moe_gather(tern_context *c, const tern_moe *m, int64_t all_n, const tern__moe_rows *all, int64_t n,
                                    const int32_t *ids, const tern__moe_work *w, tern__moe_rows *out)
{
    tern_param *quantized = tern__moe_quantized(m);
    const int64_t cols = m->experts->up->cols;
    memset(out, 0, sizeof *out);
    if (quantized) {
        const tern_linear l = tern__moe_reader(m, quantized);
        const tern_matrix matrix = tern_param_matrix(quantized);
        const tern__shape s = tern__shape_of(&matrix);
        out->kept = tern__kept_at(&l, n, w->rows);
        TERN__TRY(tern__gather_rows_of(c, all_n, s.stride / 4, all->kept.q, n, ids, NULL, out->kept.q));
        TERN__TRY(tern__gather_rows_of(c, all_n, 1, all->kept.scale, n, ids, NULL, out->kept.scale));
        TERN__TRY(tern__gather_rows_of(c, all_n, s.groups, all->kept.sum, n, ids, NULL, out->kept.sum));
    }
    if (!w->gathered || !all->x) return TERN_OK;
    out->x = w->gathered;
    return tern__gather_rows_of(c, all_n, cols, all->x, n, ids, NULL, w->gathered);
}

static tern_result tern__moe_times(tern_context *c, const tern_moe *m, tern_param *p, int64_t n, const tern__moe_rows *rows, float *y)
{
    const tern_linear l = tern__moe_reader(m, p);
    return tern__linear_times(c, &l, n, rows->x, &rows->kept, tern__floats(p->dead, TERN_SHADOW), y);
}

/* h = fn(gate x) up x, or fn(up x). */
static tern_result tern__moe_hidden(tern_context *c, const tern_moe *m, const tern_expert *e, int64_t n, const tern__moe_rows *rows,
                                    const tern__moe_work *w, float *h)
{
    const int64_t count = n * e->up->rows;
    TERN__TRY(tern__moe_times(c, m, e->up, n, rows, w->up));
    if (!e->gate) return tern__apply(c, tern__moe_fn(m), count, w->up, NULL, h);
    TERN__TRY(tern__moe_times(c, m, e->gate, n, rows, w->gate));
    TERN__TRY(tern__apply(c, tern__moe_fn(m), count, w->gate, NULL, w->fn));
    return tern__apply(c, TERN_MAP_MUL, count, w->fn, w->up, h);
}

/* Of a dense dispatch, the rows that were chosen, zero for the others, whatever an expert made of those. */
static tern_result tern__moe_pick(tern_context *c, int64_t n, int64_t cols, const float *x, const int32_t *chosen, float *out)
{
    TERN__TRY(tern__zero(c, n * cols, out));
    return tern__scatter_rows_of(c, n, cols, x, n, chosen, NULL, out);
}

static tern_result tern__moe_group(tern_context *c, const tern_moe *m, int64_t n, int32_t dense, const tern__moe_work *w)
{
    tern_group_args a;
    a.n = n;
    a.count = m->count;
    a.k = m->top_k;
    a.dense = dense;
    a.ids = w->ids;
    a.weights = w->weights;
    a.loads = w->loads;
    a.tokens = w->tokens;
    a.slots = w->slots;
    a.sorted = w->sorted;
    return tern_group(c, &a);
}

/* The groups, one after the other: places [at, at + n) of tokens, slots and sorted, in pieces that end where a part of the
   places does, so that sums over rows are those of an operation in groups. part: its places, or 0 for no pieces. */
typedef struct tern__moe_turn {
    int64_t at, n, left, tokens, part;
    int32_t expert, dense;
    int32_t loads[TERN__MAX_EXPERTS];
} tern__moe_turn;

static tern_result tern__moe_turns(tern_context *c, const tern_moe *m, int64_t n, int32_t dense, int64_t part, const tern__moe_work *w,
                                   tern__moe_turn *t)
{
    t->at = t->n = t->left = 0;
    t->tokens = n;
    t->part = part;
    t->expert = -1;
    t->dense = dense;
    return dense ? TERN_OK : tern_copy(c, t->loads, w->loads, (size_t)m->count * sizeof(int32_t), TERN_TO_HOST);
}

/* The next piece: of an expert that has tokens. */
static int32_t tern__moe_next(const tern_moe *m, tern__moe_turn *t)
{
    t->at += t->n;
    while (t->left == 0) {
        if (++t->expert >= m->count) return 0;
        t->left = t->dense ? t->tokens : t->loads[t->expert];
    }
    t->n = t->part ? tern__min(t->left, t->part - t->at % t->part) : t->left;
    t->left -= t->n;
    return 1;
}

/* Adds the experts' outputs, weighted, to y. */
static tern_result tern__moe_experts(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const tern__moe_work *w,
                                     tern__moe_turn *t, float *y)
{
    const int64_t cols = m->experts->up->cols;
    while (tern__moe_next(m, t)) {
        const tern_expert *e = &m->experts[t->expert];
        const tern_linear down = tern__moe_down(m, e->down);
        const float *h = w->h;
        tern__moe_rows rows = *all;
        if (!t->dense) TERN__TRY(tern__moe_gather(c, m, n, all, t->n, w->tokens + t->at, w, &rows));
        TERN__TRY(tern__moe_hidden(c, m, e, t->n, &rows, w, w->h));
        if (t->dense) {
            TERN__TRY(tern__moe_pick(c, n, e->up->rows, h, w->tokens + t->at, w->picked));
            h = w->picked;
        }
        TERN__TRY(tern_linear_forward(c, &down, t->n, h, w->out, NULL));
        TERN__TRY(tern__scatter_rows_of(c, n, cols, w->out, t->n, w->tokens + t->at, w->sorted + t->at, y));
    }
    return TERN_OK;
}

/* B A x of an expert into w->up. */
static tern_result tern__moe_low(tern_context *c, const tern_moe *m, int32_t expert, int64_t n, const tern__moe_rows *rows,
                                 const int32_t *chosen, const tern__moe_work *w, void *saved)
{
    const tern_linear b = tern__moe_reader(m, m->low_b[expert]);
    const float *low = w->low;
    TERN__TRY(tern__moe_times(c, m, m->low_a[expert], n, rows, w->low));
    if (chosen) {
        TERN__TRY(tern__moe_pick(c, n, b.w->cols, low, chosen, w->picked));
        low = w->picked;
    }
    return tern_linear_forward(c, &b, n, low, w->up, saved);
}

/* Adds to the sum over the experts of weight * h * (B A x). h: of all tokens. */
static tern_result tern__moe_lows(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const tern__moe_work *w,
                                  tern__moe_turn *t)
{
    const int64_t width = m->experts->up->rows;
    while (tern__moe_next(m, t)) {
        const float *h = w->hidden;
        tern__moe_rows rows = *all;
        if (!t->dense) {
            TERN__TRY(tern__moe_gather(c, m, n, all, t->n, w->tokens + t->at, w, &rows));
            TERN__TRY(tern__gather_rows_of(c, n, width, w->hidden, t->n, w->tokens + t->at, NULL, w->h));
            h = w->h;
        }
        TERN__TRY(tern__moe_low(c, m, t->expert, t->n, &rows, t->dense ? w->tokens + t->at : NULL, w, NULL));
        TERN__TRY(tern__apply(c, TERN_MAP_MUL, t->n * width, h, w->up, w->fn));
        TERN__TRY(tern__scatter_rows_of(c, n, width, w->fn, t->n, w->tokens + t->at, w->sorted + t->at, w->sum));
    }
    return TERN_OK;
}

/* Places [at, at + n) by parameters of their experts: p[0] and, with two sets, p[1] of the first, `step` on those of the next. */
static tern_grouped_args tern__moe_groups(const tern_moe *m, int64_t tokens, int64_t at, int64_t n, const tern__kept *rows,
                                          tern_param *const *p, int32_t step, int32_t sets, const tern__moe_work *w)
{
    tern_grouped_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(*p);
    a.act = m->act;
    a.count = m->count;
    a.sets = sets;
    a.step = step;
    a.w = p;
    a.loads = w->loads;
    a.rows = tokens * m->top_k;
    a.at = at;
    a.n = n;
    a.q = rows->q; a.scale = rows->scale; a.sum = rows->sum;
    return a;
}

static tern_result tern__moe_products(tern_context *c, const tern_moe *m, int64_t tokens, int64_t at, int64_t n, const tern__kept *rows,
                                      tern_param *const *p, int32_t step, int32_t sets, const tern__moe_work *w, float *y)
{
    tern_grouped_args a = tern__moe_groups(m, tokens, at, n, rows, p, step, sets, w);
    a.y = y;
    return tern__run_grouped(c, &a);
}

enum { TERN__EXPERT_STEP = sizeof(tern_expert) / sizeof(tern_param *) };

/* h of a part, and what is on the way: gate and, behind it, up in w->gate (or up alone), and fn. Both may be w->gate. */
static tern_result tern__moe_hidden_part(tern_context *c, const tern_moe *m, int64_t n, int64_t at, int64_t part, const tern__kept *rows,
                                         float *fn, float *h, const tern__moe_work *w)
{
    const tern_expert *e = m->experts;
    const int64_t count = part * e->up->rows;
    TERN__TRY(tern__moe_products(c, m, n, at, part, rows, e->gate ? &e->gate : &e->up, TERN__EXPERT_STEP, e->gate ? 2 : 1, w, w->gate));
    if (!e->gate) return tern__apply(c, tern__moe_fn(m), count, w->gate, NULL, h);
    TERN__TRY(tern__apply(c, tern__moe_fn(m), count, w->gate, NULL, fn));
    return tern__apply(c, TERN_MAP_MUL, count, fn, w->gate + count, h);
}

/* The experts' outputs by groups. */
static tern_result tern__moe_parts(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all,
                                   const tern__moe_work *w, float *y)
{
    const tern_expert *e = m->experts;
    const int64_t places = n * m->top_k, cols = e->up->cols;
    const tern_linear down = tern__moe_down(m, e->down);
    int64_t at, part;
    for (at = 0; at < places; at += part) {
        tern__moe_rows rows;
        tern__kept kept;
        part = tern__min(w->part, places - at);
        TERN__TRY(tern__moe_gather(c, m, n, all, part, w->tokens + at, w, &rows));
        TERN__TRY(tern__moe_hidden_part(c, m, n, at, part, &rows.kept, w->gate, w->gate, w));
        kept = tern__kept_at(&down, part, c->scratch + c->scratch_base);
        TERN__TRY(tern__moe_quantize(c, &down, part, w->gate, &kept));
        TERN__TRY(tern__moe_products(c, m, n, at, part, &kept, &e->down, TERN__EXPERT_STEP, 1, w, w->out));
        TERN__TRY(tern__scatter_rows_of(c, n, cols, w->out, part, w->tokens + at, w->sorted + at, y));
    }
    return TERN_OK;
}

/* Of a part: B A x in w->up, hidden in w->h, their product in w->fn; rows: what A reads, kept: what B reads, in memory at `own`. */
static tern_result tern__moe_low_part(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, int64_t at, int64_t part,
                                      void *own, const tern__moe_work *w, tern__moe_rows *rows, tern__kept *kept)
{
    const int64_t width = m->experts->up->rows;
    const tern_linear b = tern__moe_reader(m, m->low_b[0]);
    tern__moe_rows quantized = *all;
    quantized.x = NULL; /* which the hidden ones may read, but not low_a */
    *kept = tern__kept_at(&b, part, own);
    TERN__TRY(tern__moe_gather(c, m, n, &quantized, part, w->tokens + at, w, rows));
    TERN__TRY(tern__moe_products(c, m, n, at, part, &rows->kept, m->low_a, 1, 1, w, w->low));
    TERN__TRY(tern__moe_quantize(c, &b, part, w->low, kept));
    TERN__TRY(tern__moe_products(c, m, n, at, part, kept, m->low_b, 1, 1, w, w->up));
    TERN__TRY(tern__gather_rows_of(c, n, width, w->hidden, part, w->tokens + at, NULL, w->h));
    return tern__apply(c, TERN_MAP_MUL, part * width, w->h, w->up, w->fn);
}

/* The sum of the low-rank form by groups. */
static tern_result tern__moe_low_parts(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const tern__moe_work *w)
{
    const int64_t places = n * m->top_k, width = m->experts->up->rows;
    int64_t at, part;
    for (at = 0; at < places; at += part) {
        tern__moe_rows rows;
        tern__kept kept;
        part = tern__min(w->part, places - at);
        TERN__TRY(tern__moe_low_part(c, m, n, all, at, part, c->scratch + c->scratch_base, w, &rows, &kept));
        TERN__TRY(tern__scatter_rows_of(c, n, width, w->fn, part, w->tokens + at, w->sorted + at, w->sum));
    }
    return TERN_OK;
}

/* Who is chosen, by what. */
static tern_route_args tern__moe_choice(const tern_moe *m, int64_t n, const tern__moe_work *w)
{
    tern_route_args a;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.count = m->count;
    a.k = m->top_k;
    a.kind = m->weights;
    a.logits = w->logits;
    a.ids = w->ids;
    a.weights = w->weights;
    return a;
}

static tern_result tern__moe_route(tern_context *c, const tern_moe *m, int64_t n, const float *x, const tern__moe_work *w)
{
    const tern_route_args a = tern__moe_choice(m, n, w);
    TERN__TRY(tern_linear_forward(c, &m->router, n, x, w->logits, w->router));
    return tern_route(c, &a);
}

/* The router of a mixture in one operation is one product, after no more than a norm. */
static int32_t tern__moe_router_is_plain(const tern_linear *l)
{
    return tern__is_quantized(l) ? tern__is_one_product(l) : l->w->rule == TERN_DENSE && !l->lora_a;
}

static int32_t tern__moe_is_plain(const tern_expert *e) { return !e->up->dead && !(e->gate && e->gate->dead) && !e->down->dead; }

/* Whether what the router chooses may go in one operation: where experts would go in groups, and there is memory for all places. */
static int32_t tern__moe_fuses(const tern_context *c, const tern_moe *m, int64_t n, const tern__moe_work *w)
{
    return c->run.backend->moe && !m->low_a && tern__moe_grouped(c, m) && n * m->top_k <= w->part
           && tern__moe_router_is_plain(&m->router) && tern__moe_is_plain(m->experts);
}

/* TERN_E_UNSUPPORTED where the backend declines. */
static tern_result tern__moe_fused(tern_context *c, const tern_moe *m, int64_t n, const float *x, float *y, const tern__moe_work *w)
{
    const tern_linear front = tern__moe_front(m, m->experts->up), down = tern__moe_down(m, m->experts->down);
    const tern_error before = c->run.error;
    unsigned char *scratch = c->scratch + c->scratch_base; /* of the router, and then of down */
    const tern__kept inner = tern__kept_at(&down, n * m->top_k, scratch);
    tern__fp_mode mode;
    tern_result result;
    tern_moe_args a;
    memset(&a, 0, sizeof a);
    if (tern__is_quantized(&m->router)) {
        const tern__kept kept = tern__kept_at(&m->router, n, w->router);
        a.router.quantize = tern__linear_quantize(&m->router, n, x, &kept);
        a.router.bias = tern__floats(m->router.bias ? m->router.bias : m->router.w->dead, TERN_SHADOW);
        a.router.y = w->logits;
    } else {
        a.norm = tern__linear_norm(&m->router, n, x);
        if (m->router.norm != TERN_NORM_NONE) a.norm.y = (float *)(void *)scratch;
        a.dense = tern__linear_dense(&m->router, n, a.norm.y ? a.norm.y : x, w->logits);
    }
    a.route = tern__moe_choice(m, n, w);
    a.loads = w->loads;
    a.in = tern__linear_quantize(&front, n, x, &w->x);
    a.inner = tern__linear_quantize(&down, n * m->top_k, w->h, &inner);
    a.hidden = w->h;
    a.experts = m->experts;
    a.fn = tern__moe_fn(m);
    a.y = y;
    mode = tern__fp_enter();
    result = c->run.backend->moe(&c->run, &a);
    tern__fp_leave(mode);
    if (result == TERN_E_UNSUPPORTED) c->run.error = before;
    return result;
}

/* What the router chooses, into y; `all` is what experts have read. */
static tern_result tern__moe_chosen(tern_context *c, const tern_moe *m, int64_t n, const float *x, float *y, const tern__moe_work *w,
                                    tern__moe_rows *all)
{
    const int64_t cols = m->experts->up->cols, width = m->experts->up->rows;
    const int32_t dense = tern__moe_dense(c, m, n), grouped = !dense && tern__moe_grouped(c, m);
    const tern_result fused = !dense && tern__moe_fuses(c, m, n, w) ? tern__moe_fused(c, m, n, x, y, w) : TERN_E_UNSUPPORTED;
    tern__moe_turn t;
    if (fused == TERN_OK) return tern__moe_read(c, m, n, x, w, 0, all);
    if (fused != TERN_E_UNSUPPORTED) return fused;
    TERN__TRY(tern__moe_route(c, m, n, x, w));
    TERN__TRY(tern__moe_group(c, m, n, dense, w));
    if (!grouped) TERN__TRY(tern__moe_turns(c, m, n, dense, 0, w, &t));
    TERN__TRY(tern__moe_read(c, m, n, x, w, 1, all));
    if (m->low_a) {
        const tern_linear down = tern__moe_down(m, m->experts->down);
        TERN__TRY(tern__moe_hidden(c, m, m->experts, n, all, w, w->hidden));
        TERN__TRY(tern__zero(c, n * width, w->sum));
        TERN__TRY(grouped ? tern__moe_low_parts(c, m, n, all, w) : tern__moe_lows(c, m, n, all, w, &t));
        return tern_linear_forward(c, &down, n, w->sum, y, w->inner);
    }
    TERN__TRY(tern__zero(c, n * cols, y));
    return grouped ? tern__moe_parts(c, m, n, all, w, y) : tern__moe_experts(c, m, n, all, w, &t, y);
}

static tern_result tern__moe_run(tern_context *c, const tern_moe *m, int64_t n, const float *x, float *y, const tern__moe_work *w)
{
    tern__moe_rows all;
    TERN__TRY(tern__moe_chosen(c, m, n, x, y, w, &all));
    if (m->always) {
        const tern_linear down = tern__moe_down(m, m->always->down);
        TERN__TRY(tern__moe_hidden(c, m, m->always, n, &all, w, w->h));
        TERN__TRY(tern_linear_forward(c, &down, n, w->h, w->out, NULL));
        return tern__apply(c, TERN_MAP_ADD, n * m->experts->up->cols, y, w->out, y);
    }
    return TERN_OK;
}

TERN_API tern_result tern_moe_forward(tern_context *c, const tern_moe *m, int64_t n, const float *x, float *y, void *saved)
{
    tern__moe_work w;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "moe", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "moe", "y", y, 4));
    if (saved) TERN__TRY(tern__check_pointer(&c->run, "moe", "saved", saved, 4));
    TERN__TRY(tern__moe_enter(c, m, n, 0, saved, &w));
    return tern__moe_leave(c, &w, tern__moe_run(c, m, n, x, y, &w));
}

/* -- backward -- */
#ifndef TERNARY_NO_TRAINING

/* dx~ of the rows, from dy of a parameter that read them. */
static tern_result tern__moe_reader_back(tern_context *c, const tern_moe *m, tern_param *p, int64_t n, const tern__moe_rows *rows,
                                         const float *dy, float *dx)
{
    const tern_linear l = tern__moe_reader(m, p);
    return tern_linear_backward(c, &l, n, rows->x ? rows->x : dy, rows->kept.q, dy, dx);
}

/* dx~ of the tokens += that of their rows, in w->drows for each of the parameters that read them, one or two. tokens: NULL for all. */
static tern_result tern__moe_add_rows(tern_context *c, const tern_moe *m, int64_t n, int64_t rows, int32_t sets, const int32_t *tokens,
                                      const tern__moe_work *w)
{
    const int64_t cols = m->experts->up->cols;
    if (sets > 1) TERN__TRY(tern__apply(c, TERN_MAP_ADD, rows * cols, w->drows, w->drows + rows * cols, w->drows));
    if (tokens) return tern__scatter_rows_of(c, n, cols, w->drows, rows, tokens, NULL, w->dx);
    return tern__apply(c, TERN_MAP_ADD, n * cols, w->dx, w->drows, w->dx);
}

/* From dh of rows: the gradients of gate, or NULL, and up. */
static tern_result tern__moe_fn_back(tern_context *c, const tern_moe *m, int64_t count, const float *gate, const float *up, const float *fn,
                                     const float *dh, float *dgate, float *dup)
{
    if (!gate) return tern__apply_back(c, tern__moe_fn(m), count, up, NULL, dh, dup, NULL);
    TERN__TRY(tern__apply_back(c, TERN_MAP_MUL, count, fn, up, dh, dgate, dup));
    return tern__apply_back(c, tern__moe_fn(m), count, gate, NULL, dgate, dgate, NULL);
}

/* From dh of rows whose gate, up and fn are in w: the gradients of gate and up, and dx~. tokens: NULL for all. */
static tern_result tern__moe_hidden_back(tern_context *c, const tern_moe *m, const tern_expert *e, int64_t all_n, int64_t n,
                                         const tern__moe_rows *rows, const int32_t *tokens, const float *dh, const tern__moe_work *w)
{
    const int32_t sets = e->gate ? 2 : 1;
    TERN__TRY(tern__moe_fn_back(c, m, n * e->up->rows, e->gate ? w->gate : NULL, w->up, w->fn, dh, w->dgate, w->dup));
    if (e->gate) TERN__TRY(tern__moe_reader_back(c, m, e->gate, n, rows, w->dgate, w->drows));
    TERN__TRY(tern__moe_reader_back(c, m, e->up, n, rows, w->dup, w->drows + (sets - 1) * n * e->up->cols));
    return tern__moe_add_rows(c, m, all_n, n, sets, tokens, w);
}

/* dweights[slot] = <d[token], out of its row>, both of so many columns, at places [at, at + rows). */
static tern_result tern__moe_weights_back(tern_context *c, const tern_moe *m, int64_t n, int64_t cols, const float *d, const float *out,
                                          int64_t at, int64_t rows, const tern__moe_work *w)
{
    tern_row_dot_args a;
    a.rows = n;
    a.cols = cols;
    a.n = rows;
    a.count = n * m->top_k;
    a.a = d;
    a.b = out;
    a.ids = w->tokens + at;
    a.to = w->slots + at;
    a.y = w->dweights;
    return tern_row_dot(c, &a);
}

static tern_result tern__moe_experts_back(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const float *dy,
                                          const tern__moe_work *w, tern__moe_turn *t)
{
    const int64_t cols = m->experts->up->cols;
    while (tern__moe_next(m, t)) {
        const tern_expert *e = &m->experts[t->expert];
        const tern_linear down = tern__moe_down(m, e->down);
        const int32_t *tokens = w->tokens + t->at;
        tern__moe_rows rows;
        TERN__TRY(tern__moe_gather(c, m, n, all, t->n, tokens, w, &rows));
        TERN__TRY(tern__moe_hidden(c, m, e, t->n, &rows, w, w->h));
        TERN__TRY(tern_linear_forward(c, &down, t->n, w->h, w->out, w->again));
        TERN__TRY(tern__moe_weights_back(c, m, n, cols, dy, w->out, t->at, t->n, w));
        TERN__TRY(tern__gather_rows_of(c, n, cols, dy, t->n, tokens, w->sorted + t->at, w->dout));
        TERN__TRY(tern_linear_backward(c, &down, t->n, w->h, w->again, w->dout, w->dh));
        TERN__TRY(tern__moe_hidden_back(c, m, e, n, t->n, &rows, tokens, w->dh, w));
    }
    return TERN_OK;
}

/* Of the low-rank form, from dsum, the gradient of the sum; with dh of all tokens into dhidden. */
static tern_result tern__moe_lows_back(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const tern__moe_work *w,
                                       tern__moe_turn *t)
{
    const int64_t width = m->experts->up->rows;
    while (tern__moe_next(m, t)) {
        const tern_linear b = tern__moe_reader(m, m->low_b[t->expert]);
        const int32_t *tokens = w->tokens + t->at;
        tern__moe_rows rows;
        TERN__TRY(tern__moe_gather(c, m, n, all, t->n, tokens, w, &rows));
        TERN__TRY(tern__gather_rows_of(c, n, width, w->hidden, t->n, tokens, NULL, w->h));
        TERN__TRY(tern__moe_low(c, m, t->expert, t->n, &rows, NULL, w, w->again));
        TERN__TRY(tern__apply(c, TERN_MAP_MUL, t->n * width, w->h, w->up, w->fn));
        TERN__TRY(tern__moe_weights_back(c, m, n, width, w->dsum, w->fn, t->at, t->n, w));
        TERN__TRY(tern__gather_rows_of(c, n, width, w->dsum, t->n, tokens, w->sorted + t->at, w->dout));
        TERN__TRY(tern__apply_back(c, TERN_MAP_MUL, t->n * width, w->h, w->up, w->dout, w->dh, w->dup));
        TERN__TRY(tern__scatter_rows_of(c, n, width, w->dh, t->n, tokens, NULL, w->dhidden));
        TERN__TRY(tern_linear_backward(c, &b, t->n, w->low, w->again, w->dup, w->dlow));
        TERN__TRY(tern__moe_reader_back(c, m, m->low_a[t->expert], t->n, &rows, w->dlow, w->drows));
        TERN__TRY(tern__moe_add_rows(c, m, n, t->n, 1, tokens, w));
    }
    return TERN_OK;
}

/* -- the same by groups -- */

/* Rounded gradients, beside an accumulator, are of all rows of an expert at once. */
static int32_t tern__moe_back_in_parts(const tern_moe *m)
{
    return tern__moe_has_groups(m) && !tern__is_integer(tern__moe_first(m)) && !tern__is_integer(tern__moe_second(m));
}

/* As tern__moe_products: dx of each set, and the gradients of parameters. */
static tern_result tern__moe_products_back(tern_context *c, const tern_moe *m, int64_t tokens, int64_t at, int64_t n,
                                           const tern__kept *rows, tern_param *const *p, int32_t step, int32_t sets, const float *dy,
                                           float *dx, const tern__moe_work *w)
{
    tern_grouped_args a = tern__moe_groups(m, tokens, at, n, rows, p, step, sets, w);
    a.dy = dy;
    a.dx = dx;
    a.factors = m->gradients;
    return tern__run_grouped(c, &a);
}

/* Through the norm of what goes into down, in place. */
static tern_result tern__moe_inner_back(tern_context *c, const tern_linear *down, int64_t n, const float *h, float *dh)
{
    tern_norm_args a;
    if (down->norm == TERN_NORM_NONE) return TERN_OK;
    a = tern__linear_norm(down, n, h);
    a.dy = a.dx = dh;
    return tern_norm(c, &a);
}

static tern_result tern__moe_parts_back(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const float *dy,
                                        const tern__moe_work *w)
{
    const tern_expert *e = m->experts;
    const int64_t places = n * m->top_k, cols = e->up->cols;
    const int32_t sets = e->gate ? 2 : 1;
    const tern_linear down = tern__moe_down(m, e->down);
    int64_t at, part;
    for (at = 0; at < places; at += part) {
        const int32_t *tokens = w->tokens + at;
        tern__moe_rows rows;
        tern__kept kept;
        int64_t count, second; /* floats of a set; where up's begin, behind gate's */
        part = tern__min(w->part, places - at);
        count = part * e->up->rows;
        second = (sets - 1) * count;
        kept = tern__kept_at(&down, part, w->again);
        TERN__TRY(tern__moe_gather(c, m, n, all, part, tokens, w, &rows));
        TERN__TRY(tern__moe_hidden_part(c, m, n, at, part, &rows.kept, w->fn, w->h, w));
        TERN__TRY(tern__moe_quantize(c, &down, part, w->h, &kept));
        TERN__TRY(tern__moe_products(c, m, n, at, part, &kept, &e->down, TERN__EXPERT_STEP, 1, w, w->out));
        TERN__TRY(tern__moe_weights_back(c, m, n, cols, dy, w->out, at, part, w));
        TERN__TRY(tern__gather_rows_of(c, n, cols, dy, part, tokens, w->sorted + at, w->dout));
        TERN__TRY(tern__moe_products_back(c, m, n, at, part, &kept, &e->down, TERN__EXPERT_STEP, 1, w->dout, w->dh, w));
        TERN__TRY(tern__moe_inner_back(c, &down, part, w->h, w->dh));
        TERN__TRY(tern__moe_fn_back(c, m, count, e->gate ? w->gate : NULL, w->gate + second, w->fn, w->dh, w->dgate, w->dgate + second));
        TERN__TRY(tern__moe_products_back(c, m, n, at, part, &rows.kept, e->gate ? &e->gate : &e->up, TERN__EXPERT_STEP, sets, w->dgate,
                                          w->drows, w));
        TERN__TRY(tern__moe_add_rows(c, m, n, part, sets, tokens, w));
    }
    return TERN_OK;
}

static tern_result tern__moe_low_parts_back(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all,
                                            const tern__moe_work *w)
{
    const int64_t places = n * m->top_k, width = m->experts->up->rows;
    int64_t at, part;
    for (at = 0; at < places; at += part) {
        const int32_t *tokens = w->tokens + at;
        tern__moe_rows rows;
        tern__kept kept;
        part = tern__min(w->part, places - at);
        TERN__TRY(tern__moe_low_part(c, m, n, all, at, part, w->again, w, &rows, &kept));
        TERN__TRY(tern__moe_weights_back(c, m, n, width, w->dsum, w->fn, at, part, w));
        TERN__TRY(tern__gather_rows_of(c, n, width, w->dsum, part, tokens, w->sorted + at, w->dout));
        TERN__TRY(tern__apply_back(c, TERN_MAP_MUL, part * width, w->h, w->up, w->dout, w->dh, w->dup));
        TERN__TRY(tern__scatter_rows_of(c, n, width, w->dh, part, tokens, NULL, w->dhidden));
        TERN__TRY(tern__moe_products_back(c, m, n, at, part, &kept, m->low_b, 1, 1, w->dup, w->dlow, w));
        TERN__TRY(tern__moe_products_back(c, m, n, at, part, &rows.kept, m->low_a, 1, 1, w->dlow, w->drows, w));
        TERN__TRY(tern__moe_add_rows(c, m, n, part, 1, tokens, w));
    }
    return TERN_OK;
}

/* t: NULL by groups. */
static tern_result tern__moe_low_back(tern_context *c, const tern_moe *m, int64_t n, const tern__moe_rows *all, const float *dy,
                                      const tern__moe_work *w, tern__moe_turn *t)
{
    const tern_linear down = tern__moe_down(m, m->experts->down);
    TERN__TRY(tern_linear_backward(c, &down, n, w->sum, w->inner, dy, w->dsum));
    TERN__TRY(tern__moe_hidden(c, m, m->experts, n, all, w, w->hidden));
    TERN__TRY(tern__zero(c, n * m->experts->up->rows, w->dhidden));
    TERN__TRY(t ? tern__moe_lows_back(c, m, n, all, w, t) : tern__moe_low_parts_back(c, m, n, all, w));
    TERN__TRY(tern__moe_hidden(c, m, m->experts, n, all, w, w->hidden)); /* gate, up and fn of all tokens again */
    return tern__moe_hidden_back(c, m, m->experts, n, n, all, NULL, w->dhidden, w);
}

static tern_result tern__moe_router_back(tern_context *c, const tern_moe *m, int64_t n, const float *x, const tern__moe_work *w, float *dx)
{
    tern_route_args a = tern__moe_choice(m, n, w);
    a.dweights = w->dweights;
    a.loads = m->balance != 0.0f ? w->loads : NULL;
    a.balance = m->balance;
    a.dlogits = w->dlogits;
    TERN__TRY(tern_route(c, &a));
    return tern_linear_backward(c, &m->router, n, x, w->router, w->dlogits, dx);
}

/* dx += the gradient of x through the norm that experts share, from dx~. */
static tern_result tern__moe_norm_back(tern_context *c, const tern_moe *m, int64_t n, const float *x, const tern__moe_work *w, float *dx)
{
    const tern_linear l = tern__moe_front(m, m->experts->up);
    tern_norm_args a;
    if (m->norm == TERN_NORM_NONE) return dx ? tern__apply(c, TERN_MAP_ADD, n * l.w->cols, dx, w->dx, dx) : TERN_OK;
    a = tern__linear_norm(&l, n, x);
    a.dy = w->dx;
    a.dx = dx;
    a.add = 1;
    a.dgain = tern__floats(m->gain, TERN_GRAD);
    return tern_norm(c, &a);
}

static tern_result tern__moe_back(tern_context *c, const tern_moe *m, int64_t n, const float *x, const float *dy, float *dx,
                                  const tern__moe_work *w)
{
    const int32_t parts = tern__moe_back_in_parts(m), grouped = parts && c->run.backend->grouped;
    tern__moe_turn t;
    tern__moe_rows all;
    TERN__TRY(tern__moe_group(c, m, n, 0, w));
    if (!grouped) TERN__TRY(tern__moe_turns(c, m, n, 0, parts ? w->part : 0, w, &t));
    TERN__TRY(tern__moe_read(c, m, n, x, w, 0, &all));
    TERN__TRY(tern__zero(c, n * m->experts->up->cols, w->dx));
    if (m->low_a) TERN__TRY(tern__moe_low_back(c, m, n, &all, dy, w, grouped ? NULL : &t));
    else TERN__TRY(grouped ? tern__moe_parts_back(c, m, n, &all, dy, w) : tern__moe_experts_back(c, m, n, &all, dy, w, &t));
    if (m->always) {
        const tern_linear down = tern__moe_down(m, m->always->down);
        TERN__TRY(tern__moe_hidden(c, m, m->always, n, &all, w, w->h));
        TERN__TRY(tern_linear_forward(c, &down, n, w->h, w->out, w->again));
        TERN__TRY(tern_linear_backward(c, &down, n, w->h, w->again, dy, w->dh));
        TERN__TRY(tern__moe_hidden_back(c, m, m->always, n, n, &all, NULL, w->dh, w));
    }
    TERN__TRY(tern__moe_router_back(c, m, n, x, w, dx));
    return tern__moe_norm_back(c, m, n, x, w, dx);
}

/* Every gradient that will be added to, before the first is. */
static tern_result tern__check_moe_gradients(tern_context *c, const tern_moe *m, int64_t n)
{
    tern_linear l;
    int32_t e, i;
    TERN__TRY(tern__check_gradients(c, &m->router));
    if (tern__is_integer(m->router.w)) TERN__TRY(tern__check_integer_backward(c, &m->router, n));
    l = tern__moe_front(m, m->experts->up);
    TERN__TRY(tern__check_gradients(c, &l));
    for (e = -1; e < m->count; e++) {
        const tern_expert *x = e < 0 ? m->always : m->low_a && e ? NULL : &m->experts[e];
        tern_param *const all[] = {x ? x->gate : NULL, x ? x->up : NULL, x ? x->down : NULL, m->low_a && e >= 0 ? m->low_a[e] : NULL,
                                   m->low_a && e >= 0 ? m->low_b[e] : NULL};
        for (i = 0; i < 5; i++) {
            if (!all[i]) continue;
            l = tern__moe_reader(m, all[i]);
            TERN__TRY(tern__check_gradients(c, &l));
            if (tern__is_integer(all[i])) TERN__TRY(tern__check_integer_backward(c, &l, n));
        }
    }
    return TERN_OK;
}

TERN_API tern_result tern_moe_backward(tern_context *c, const tern_moe *m, int64_t n, const float *x, const void *saved,
                                       const float *dy, float *dx)
{
    tern__moe_work w;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "moe", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "moe", "saved", saved, 4));
    TERN__TRY(tern__check_pointer(&c->run, "moe", "dy", dy, 4));
    if (dx) TERN__TRY(tern__check_pointer(&c->run, "moe", "dx", dx, 4));
    TERN__TRY(tern__check_moe(c, m, n));
    TERN__TRY(tern__check_moe_gradients(c, m, n));
    TERN__TRY(tern__moe_enter(c, m, n, 1, (void *)(uintptr_t)saved, &w));
    return tern__moe_leave(c, &w, tern__moe_back(c, m, n, x, dy, dx, &w));
}
#endif

/* -- reports, on the host -- */

static void tern__moe_tally(const tern_moe *m, int64_t n, const float *logits, const int32_t *loads, tern_moe_report *out)
{
    float p[TERN__MAX_EXPERTS], mean[TERN__MAX_EXPERTS];
    int64_t t, usable = 0;
    int32_t e, finite;
    memset(out, 0, sizeof *out);
    memset(mean, 0, sizeof mean);
    for (t = 0; t < n; t++) {
        for (finite = 1, e = 0; e < m->count; e++) finite &= tern__finite(logits[t * m->count + e]);
        if (!finite) continue;
        usable++;
        tern__route_softmax(&tern__kernels_scalar, logits + t * m->count, m->count, p);
        for (e = 0; e < m->count; e++) {
            mean[e] += p[e];
            if (p[e] > 0.0f) out->entropy -= p[e] * tern__log(p[e]);
        }
    }
    if (usable) out->entropy = out->entropy / (float)usable;
    for (e = 0; e < m->count; e++) out->balance += (float)loads[e] / ((float)n * (float)m->top_k) * (mean[e] / (float)n);
    out->balance = out->balance * m->balance * (float)m->count;
}

TERN_API tern_result tern_moe_stats(tern_context *c, const tern_moe *m, int64_t n, const void *saved, int64_t *loads, tern_moe_report *out)
{
    int32_t chosen[TERN__MAX_EXPERTS], e;
    tern__moe_work w;
    tern_result result;
    float *logits;
    TERN__TRY(tern__check_moe(c, m, n));
    TERN__TRY(tern__check_pointer(&c->run, "moe", "saved", saved, 4));
    memset(&w, 0, sizeof w);
    tern__moe_saved(m, n, (void *)(uintptr_t)saved, &w);
    logits = (float *)tern__host_alloc(&c->run.allocator, (size_t)(n * m->count) * sizeof(float));
    TERN__REQUIRE(&c->run, logits, TERN_E_MEMORY, "moe: no memory for the logits of %d tokens", n);
    result = tern_copy(c, logits, w.logits, (size_t)(n * m->count) * sizeof(float), TERN_TO_HOST);
    if (result == TERN_OK) result = tern_copy(c, chosen, w.loads, (size_t)m->count * sizeof(int32_t), TERN_TO_HOST);
    for (e = 0; result == TERN_OK && loads && e < m->count; e++) loads[e] += chosen[e];
    if (result == TERN_OK && out) tern__moe_tally(m, n, logits, chosen, out);
    tern__host_free(&c->run.allocator, logits);
    return result;
}

/* -- a mixture of floats -- */

typedef struct tern__moe_given {
    const tern_moe *m;
    tern_type type;
    const tern_expert_floats *experts, *always;
    const void *router;
} tern__moe_given;

/* Three of each expert and of the one that is always on, then the router. */
static tern__source tern__moe_float(const void *of, int32_t i)
{
    const tern__moe_given *f = (const tern__moe_given *)of;
    const tern_expert *e = i / 3 < f->m->count ? &f->m->experts[i / 3] : f->m->always;
    const tern_expert_floats *w = i / 3 < f->m->count ? &f->experts[i / 3] : f->always;
    tern__source s;
    s.type = f->type;
    if (i == 3 * f->m->count + 3) { s.p = f->router ? f->m->router.w : NULL; s.w = f->router; return s; }
    s.p = !e ? NULL : i % 3 == 0 ? e->gate : i % 3 == 1 ? e->up : e->down;
    s.w = !e || !w ? NULL : i % 3 == 0 ? w->gate : i % 3 == 1 ? w->up : w->down;
    return s;
}

/* The same once they are set: from the shadow where there is one. */
static tern__source tern__moe_source(const void *of, int32_t i)
{
    const tern__source s = tern__moe_float(of, i);
    return s.p && s.p->buffer[TERN_SHADOW].data ? tern__source_of_shadow(s.p) : s;
}

/* Fails at the first float that is not below 2^78 in size: then scales are below 2^96, shared ones too, and so are weights once they
   are rotated or rounded. */
static tern_result tern__look_at(tern_context *c, const tern__source *s, void *host)
{
    const int64_t width = tern__type_bytes(s->type), count = s->p->rows * s->p->cols;
    int64_t at, i, n;
    for (at = 0; at < count; at += n) {
        n = tern__min(TERN__TRANSFER / width, count - at);
        TERN__TRY(tern_copy(c, host, (const uint8_t *)s->w + at * width, (size_t)(n * width), TERN_TO_HOST));
        for (i = 0; i < n; i++)
            TERN__REQUIRE(&c->run, tern__abs(tern__load_float(s->type, host, i)) < TERN__SURE, TERN_E_NONFINITE,
                          "%s: weights[%d][%d] is not a finite number below 2^78", s->p->name, (at + i) / s->p->cols,
                          (at + i) % s->p->cols);
    }
    return TERN_OK;
}

/* A learned scale as a source, of one that has it. */
static tern__source tern__source_of_alpha(const tern_param *p)
{
    tern__source s;
    s.p = p && tern__is_learned(p->rule) ? p->alpha : NULL;
    s.type = TERN_F32;
    s.w = s.p ? s.p->buffer[TERN_SHADOW].data : NULL;
    return s;
}

static tern_result tern__look_at_all(tern_context *c, const tern__sources *all, void *host)
{
    int32_t i;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i), alpha = tern__source_of_alpha(s.p);
        if (alpha.p) TERN__TRY(tern__look_at(c, &alpha, host));
        if (s.p) TERN__TRY(tern__look_at(c, &s, host));
    }
    return TERN_OK;
}

/* Whether all that sources hold can be set. One sum of sizes proves them good; where it does not, each is looked at. */
static tern_result tern__check_sources(tern_context *c, const tern__sources *all)
{
    float *sum = (float *)(void *)c->scratch, size;
    tern_result result;
    void *host;
    int32_t i;
    TERN__TRY(tern__zero(c, 1, sum));
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i), alpha = tern__source_of_alpha(s.p);
        if (s.p) TERN__TRY(tern__sum_sizes(c, &s, sum, 1));
        if (alpha.p) TERN__TRY(tern__sum_sizes(c, &alpha, sum, 1));
    }
    TERN__TRY(tern_copy(c, &size, sum, sizeof size, TERN_TO_HOST));
    if (size < TERN__SURE) return TERN_OK;
    host = tern__host_alloc(&c->run.allocator, TERN__TRANSFER);
    TERN__REQUIRE(&c->run, host, TERN_E_MEMORY, "moe: no memory to look at %d bytes of weights", (int64_t)TERN__TRANSFER);
    result = tern__look_at_all(c, all, host);
    tern__host_free(&c->run.allocator, host);
    return result;
}

/* All but the floats themselves; *rotated: elements of the largest matrix that is rotated. */
static tern_result tern__check_moe_floats(tern_context *c, const tern__sources *all, int64_t *rotated)
{
    int32_t i, j;
    *rotated = 0;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        if (!s.p) continue;
        TERN__TRY(tern__check_pointer(&c->run, s.p->name, "its float array", s.w, tern__type_bytes(s.type)));
        TERN__TRY(tern__check_set(c, s.p));
        TERN__REQUIRE(&c->run, !s.p->sync || !s.p->rotate || s.p->buffer[TERN_SHADOW].data, TERN_E_UNSUPPORTED,
                      "%s: a shared scale (sync %d) of a rotated matrix needs a shadow", s.p->name, (int64_t)s.p->sync);
        for (j = 0; s.p->sync && j < i; j++) {
            const tern_param *q = all->at(all->of, j).p;
            TERN__REQUIRE(&c->run, !q || q->sync != s.p->sync || q->rule == s.p->rule, TERN_E_ARGUMENT,
                          "%s and %s share a scale (sync %d) and differ in rule", q->name, s.p->name, (int64_t)s.p->sync);
        }
        if (s.p->rotate) *rotated = tern__max(*rotated, s.p->rows * s.p->cols);
    }
    return TERN_OK;
}

static tern_result tern__set_sources(tern_context *c, tern__sources *all, float *rows, tern_moe_bytes *bytes)
{
    const tern__step_noise none = {0, 0};
    tern_audit audit;
    int32_t i;
    for (i = 0; i < all->count; i++) {
        const tern__source s = all->at(all->of, i);
        const tern_model one = {&s.p, 1};
        if (!s.p) continue;
        TERN__TRY(s.p->rotate ? tern__param_set_rotated(c, s.p, s.type, s.w, rows) : tern_param_set(c, s.p, s.type, s.w));
        TERN__TRY(tern_model_audit(c, &one, &audit));
        bytes->before += (size_t)(s.p->rows * s.p->cols * tern__type_bytes(s.type));
        bytes->after += audit.packed_bytes;
    }
    all->at = tern__moe_source;
    return tern__sync_sets(c, all, &none);
}

TERN_API tern_result tern_moe_from_dense(tern_context *c, const tern_moe *m, tern_type type, const tern_expert_floats *experts,
                                         const tern_expert_floats *always, const void *router, tern_moe_bytes *bytes)
{
    tern_moe_bytes counted = {0, 0};
    tern__moe_given f;
    tern__sources all;
    tern_result result;
    int64_t rotated;
    float *rows;
    TERN__TRY(tern__check_moe(c, m, 1));
    TERN__REQUIRE(&c->run, experts && (!m->always || always), TERN_E_ARGUMENT,
                  "moe: floats of the experts, or of the one that is always on, are NULL");
    TERN__REQUIRE(&c->run, !m->low_a, TERN_E_UNSUPPORTED, "moe: the low-rank form is not one of floats");
    TERN__TRY(tern__check_float_type(&c->run, "moe", type));
    f.m = m;
    f.type = type;
    f.experts = experts;
    f.always = always;
    f.router = router;
    all.at = tern__moe_float;
    all.of = &f;
    all.count = 3 * m->count + 4;
    TERN__TRY(tern__check_moe_floats(c, &all, &rotated));
    TERN__TRY(tern__room_to_rotate(c, "moe", rotated, &rows));
    result = tern__check_sources(c, &all);
    if (result == TERN_OK) result = tern__set_sources(c, &all, rows, &counted);
    tern_free(c, rows);
    if (result == TERN_OK && bytes) *bytes = counted;
    return result;
}

/* -- per-layer embeddings (Gemma 3n) -- */

typedef struct tern__ple_work {
    void *gate, *project;
    float *low, *fn, *product, *out;
    float *dlow, *dfn, *dout;
    int64_t saved_bytes, scratch_bytes;
} tern__ple_work;

static void tern__ple_saved(const tern_ple *l, int64_t n, void *base, tern__ple_work *w)
{
    tern__layout p = {(unsigned char *)base, 0};
    w->gate = tern__piece(&p, tern__kept_at(&l->gate, n, NULL).bytes, 1);
    w->project = tern__piece(&p, tern__kept_at(&l->project, n, NULL).bytes, 1);
    w->low = tern__piece_of_floats(&p, n, l->gate.w->rows);
    w->fn = tern__piece_of_floats(&p, n, l->gate.w->rows);
    w->product = tern__piece_of_floats(&p, n, l->gate.w->rows);
    w->out = tern__piece_of_floats(&p, n, l->project.w->rows);
    w->saved_bytes = p.bytes;
}

static void tern__ple_memory(const tern_ple *l, int64_t n, void *saved, void *base, tern__ple_work *w)
{
    tern__layout p = {(unsigned char *)base, 0};
    memset(w, 0, sizeof *w);
    tern__ple_saved(l, n, saved, w);
    if (!saved) tern__ple_saved(l, n, tern__piece(&p, w->saved_bytes, 1), w);
    w->dlow = tern__piece_of_floats(&p, n, l->gate.w->rows);
    w->dfn = tern__piece_of_floats(&p, n, l->gate.w->rows);
    w->dout = tern__piece_of_floats(&p, n, l->project.w->rows);
    w->scratch_bytes = p.bytes;
}

TERN_API tern_result tern_ple_need(tern_context *c, const tern_ple *l, int64_t n, tern_need *out)
{
    tern__ple_work w;
    int64_t scratch;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, l && out, TERN_E_ARGUMENT, "ple: the layer or out is NULL");
    TERN__TRY(tern__check_linear(c, &l->gate, n));
    TERN__TRY(tern__check_linear(c, &l->project, n));
    TERN__REQUIRE(&c->run, l->project.w->cols == l->gate.w->rows && l->project.w->rows == l->gate.w->cols, TERN_E_SHAPE,
                  "%s is %d x %d beside %s of %d x %d", l->project.w->name, l->project.w->rows, l->project.w->cols, l->gate.w->name,
                  l->gate.w->rows, l->gate.w->cols);
    TERN__REQUIRE(&c->run, l->eps >= 0 && tern__finite(l->eps), TERN_E_ARGUMENT, "ple: eps is out of range");
    if (l->gain) TERN__TRY(tern__check_dense_of(c, l->gain, l->project.w, "gain", 1, l->project.w->rows));
    tern__ple_memory(l, n, NULL, NULL, &w);
    scratch = tern__add(w.scratch_bytes, tern__max(tern__linear_bytes(&l->gate, n), tern__linear_bytes(&l->project, n)));
    TERN__REQUIRE(&c->run, tern__fits(scratch), TERN_E_OVERFLOW, "ple: the scratch of %d tokens overflows", n);
    out->saved = (size_t)w.saved_bytes;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

/* Layers inside take their scratch behind this one's, until scratch_base is what it was. */
static tern_result tern__ple_enter(tern_context *c, const tern_ple *l, int64_t n, const void *saved, tern__ple_work *w)
{
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_ple_need(c, l, n, &need));
    TERN__TRY(tern__begin_scratch(c, "ple", n, need.scratch));
    tern__ple_memory(l, n, (void *)(uintptr_t)saved, c->scratch + c->scratch_base, w);
    c->scratch_base += (size_t)w->scratch_bytes;
    return TERN_OK;
}

static tern_norm_args tern__ple_norm(const tern_ple *l, int64_t n, const tern__ple_work *w)
{
    tern_norm_args a;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.cols = l->project.w->rows;
    a.x = w->out;
    a.gain = tern__floats(l->gain, TERN_SHADOW);
    a.eps = l->eps > 0.0f ? l->eps : 1e-6f;
    return a;
}

static tern_result tern__ple_run(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows, float *y,
                                 const tern__ple_work *w)
{
    const int64_t low = n * l->gate.w->rows;
    tern_norm_args norm;
    TERN__TRY(tern_linear_forward(c, &l->gate, n, x, w->low, w->gate));
    TERN__TRY(tern__apply(c, TERN_MAP_GELU, low, w->low, NULL, w->fn));
    TERN__TRY(tern__apply(c, TERN_MAP_MUL, low, w->fn, rows, w->product));
    TERN__TRY(tern_linear_forward(c, &l->project, n, w->product, w->out, w->project));
    norm = tern__ple_norm(l, n, w);
    norm.y = y;
    TERN__TRY(tern_norm(c, &norm));
    return tern__apply(c, TERN_MAP_ADD, n * norm.cols, x, y, y);
}

TERN_API tern_result tern_ple_forward(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows,
                                      float *y, void *saved)
{
    tern__ple_work w;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "ple", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ple", "rows", rows, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ple", "y", y, 4));
    if (saved) TERN__TRY(tern__check_pointer(&c->run, "ple", "saved", saved, 4));
    TERN__TRY(tern__ple_enter(c, l, n, saved, &w));
    result = tern__ple_run(c, l, n, x, rows, y, &w);
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}

#ifndef TERNARY_NO_TRAINING
static tern_result tern__ple_back(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows, const float *dy,
                                  float *dx, float *drows, const tern__ple_work *w)
{
    const int64_t low = n * l->gate.w->rows;
    tern_norm_args norm = tern__ple_norm(l, n, w);
    norm.dy = dy;
    norm.dx = w->dout;
    norm.dgain = tern__floats(l->gain, TERN_GRAD);
    TERN__TRY(tern_norm(c, &norm));
    TERN__TRY(tern_linear_backward(c, &l->project, n, w->product, w->project, w->dout, w->dlow));
    if (drows) TERN__TRY(tern__apply_back(c, TERN_MAP_MUL, low, w->fn, rows, w->dlow, NULL, drows));
    TERN__TRY(tern__apply_back(c, TERN_MAP_MUL, low, w->fn, rows, w->dlow, w->dfn, NULL));
    TERN__TRY(tern__apply_back(c, TERN_MAP_GELU, low, w->low, NULL, w->dfn, w->dfn, NULL));
    TERN__TRY(tern_linear_backward(c, &l->gate, n, x, w->gate, w->dfn, dx));
    return dx ? tern__apply(c, TERN_MAP_ADD, n * norm.cols, dx, dy, dx) : TERN_OK;
}

TERN_API tern_result tern_ple_backward(tern_context *c, const tern_ple *l, int64_t n, const float *x, const float *rows, const void *saved,
                                       const float *dy, float *dx, float *drows)
{
    tern__ple_work w;
    tern_result result;
    tern_need need = TERN_ZERO;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "ple", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ple", "rows", rows, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ple", "saved", saved, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ple", "dy", dy, 4));
    if (dx) TERN__TRY(tern__check_pointer(&c->run, "ple", "dx", dx, 4));
    if (drows) TERN__TRY(tern__check_pointer(&c->run, "ple", "drows", drows, 4));
    TERN__TRY(tern_ple_need(c, l, n, &need));
    TERN__TRY(tern__check_gradients(c, &l->gate));
    TERN__TRY(tern__check_gradients(c, &l->project));
    if (tern__floats(l->gain, TERN_GRAD)) TERN__TRY(tern__check_buffer(c, l->gain, TERN_GRAD, l->gain->cols));
    TERN__TRY(tern__ple_enter(c, l, n, saved, &w));
    result = tern__ple_back(c, l, n, x, rows, dy, dx, drows, &w);
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}
#endif
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-18] Graph
   What enters: edges that nobody has checked, features of nodes, a hop's parameters. What leaves: rows of edges
   by target and by source, features one hop on, and gradients. A message is never stored for an edge: rows are
   projected before they are summed, or sums after it; where nothing is kept, block by block of nodes, so that sums and what
   is made of them stay in cache. The backward is the same sum on the graph turned round.
   Beside it: rows of a table named by the last tokens, and the nearest rows of a codebook.
   ------------------------------------------------------------------------------------------------ */
#ifndef TERNARY_NO_GRAPH

/* -- building, on the host -- */

static tern_result tern__check_node(tern_context *c, const tern_edges *e, const char *what, int64_t edge, int32_t node)
{
    TERN__REQUIRE(&c->run, node >= 0 && node < e->nodes, TERN_E_ARGUMENT,
                  "graph: %s[%d] is %d; there are nodes 0 to %d", what, edge, (int64_t)node, e->nodes - 1);
    return TERN_OK;
}

static tern_result tern__check_starts(tern_context *c, const tern_edges *e)
{
    int64_t v;
    TERN__TRY(tern__check_pointer(&c->run, "graph", "start", e->start, TERN__INT64_ALIGN));
    TERN__REQUIRE(&c->run, e->start[0] == 0, TERN_E_ARGUMENT, "graph: start[0] is %d, not 0", e->start[0]);
    for (v = 0; v < e->nodes; v++)
        TERN__REQUIRE(&c->run, e->start[v + 1] >= e->start[v], TERN_E_ARGUMENT,
                      "graph: start[%d] is %d, below start[%d] = %d", v + 1, e->start[v + 1], v, e->start[v]);
    TERN__REQUIRE(&c->run, e->start[e->nodes] == e->count, TERN_E_SHAPE,
                  "graph: start[%d] is %d for %d edges", e->nodes, e->start[e->nodes], e->count);
    return TERN_OK;
}

static tern_result tern__check_edges(tern_context *c, const tern_edges *e)
{
    int64_t i;
    TERN__REQUIRE(&c->run, e->nodes >= 1 && e->nodes <= INT32_MAX, TERN_E_SHAPE,
                  "graph: %d nodes; 1 to %d can be used", e->nodes, (int64_t)INT32_MAX);
    TERN__REQUIRE(&c->run, e->count >= 0, TERN_E_SHAPE, "graph: %d edges", e->count);
    TERN__REQUIRE(&c->run, tern__fits(tern__mul(tern__add(tern__mul(e->count, 2), tern__mul(e->nodes, 3)), 32)), TERN_E_OVERFLOW,
                  "graph: the memory of %d edges overflows", e->count);
    TERN__REQUIRE(&c->run, !e->to != !e->start, TERN_E_ARGUMENT, "graph: edges come with to or with start, and not with both");
    TERN__REQUIRE(&c->run, (int32_t)e->duplicates >= 0 && e->duplicates <= TERN_DUPLICATES_REFUSE, TERN_E_ARGUMENT,
                  "graph: duplicates is %d", (int64_t)(int32_t)e->duplicates);
    if (e->start) TERN__TRY(tern__check_starts(c, e));
    if (e->count) TERN__TRY(tern__check_pointer(&c->run, "graph", "from", e->from, 4));
    if (e->count && e->to) TERN__TRY(tern__check_pointer(&c->run, "graph", "to", e->to, 4));
    for (i = 0; i < e->count; i++) {
        TERN__TRY(tern__check_node(c, e, "from", i, e->from[i]));
        if (e->to) TERN__TRY(tern__check_node(c, e, "to", i, e->to[i]));
        TERN__REQUIRE(&c->run, !e->sign || (e->sign[i] >= -1 && e->sign[i] <= 1), TERN_E_TRIT,
                      "graph: sign[%d] is %d, not -1, 0 or 1", i, (int64_t)e->sign[i]);
    }
    return TERN_OK;
}

/* Edges in their order, then sorted by an end: start [nodes + 1], entry. */
typedef struct tern__edge_list { int64_t count; int32_t *to; uint32_t *from; unsigned char *has_loop; } tern__edge_list;
typedef struct tern__edge_rows { int64_t *start; uint32_t *entry; } tern__edge_rows;

static void tern__put_edge(tern__edge_list *l, int32_t from, int32_t to, int32_t minus)
{
    l->to[l->count] = to;
    l->from[l->count++] = (uint32_t)from | (uint32_t)minus << 31;
    if (from == to) l->has_loop[to] = 1;
}

static void tern__list_edges(const tern_edges *e, tern__edge_list *l)
{
    int64_t i, v = 0;
    for (i = 0; i < e->count; i++) {
        int32_t to;
        while (!e->to && e->start[v + 1] <= i) v++;
        to = e->to ? e->to[i] : (int32_t)v;
        if (e->sign && e->sign[i] == 0) continue;
        tern__put_edge(l, e->from[i], to, e->sign && e->sign[i] < 0);
        if (e->both_ways && e->from[i] != to) tern__put_edge(l, to, e->from[i], e->sign && e->sign[i] < 0);
    }
    for (i = 0; e->loops && i < e->nodes; i++)
        if (!l->has_loop[i]) tern__put_edge(l, (int32_t)i, (int32_t)i, 0);
}

/* A counting sort, which keeps the order of the edges of a row. */
static void tern__sort_edges(const tern__edge_list *l, int64_t nodes, tern__edge_rows *rows)
{
    int64_t i, v;
    memset(rows->start, 0, sizeof(int64_t) * (size_t)(nodes + 1));
    for (i = 0; i < l->count; i++) rows->start[l->to[i] + 1]++;
    for (v = 0; v < nodes; v++) rows->start[v + 1] += rows->start[v];
    for (i = 0; i < l->count; i++) rows->entry[rows->start[l->to[i]]++] = l->from[i];
    for (v = nodes; v > 0; v--) rows->start[v] = rows->start[v - 1];
    rows->start[0] = 0;
}

/* seen [nodes], zero: the row, counted from 1, that met a node last. */
static tern_result tern__drop_duplicates(tern_context *c, const tern_edges *e, tern__edge_rows *rows, int32_t *seen)
{
    int64_t v, i, at = 0, begin = 0;
    if (e->duplicates == TERN_DUPLICATES_ADD) return TERN_OK;
    for (v = 0; v < e->nodes; v++) {
        const int64_t end = rows->start[v + 1];
        for (i = begin; i < end; i++) {
            const int64_t u = tern__edge_node(rows->entry[i]);
            const int32_t again = seen[u] == (int32_t)v + 1;
            TERN__REQUIRE(&c->run, !again || e->duplicates == TERN_DUPLICATES_FIRST, TERN_E_ARGUMENT,
                          "graph: the edge from %d to %d is there twice", u, v);
            seen[u] = (int32_t)v + 1;
            if (!again) rows->entry[at++] = rows->entry[i];
        }
        begin = end;
        rows->start[v + 1] = at;
    }
    return TERN_OK;
}

/* The same edges by their beginnings, in the order of their ends. */
static void tern__turn_round(const tern__edge_rows *rows, int64_t nodes, tern__edge_list *l)
{
    int64_t v, i;
    l->count = 0;
    for (v = 0; v < nodes; v++)
        for (i = rows->start[v]; i < rows->start[v + 1]; i++) {
            l->to[l->count] = (int32_t)tern__edge_node(rows->entry[i]);
            l->from[l->count++] = (uint32_t)v | (rows->entry[i] & 0x80000000u);
        }
}

static void tern__count_hubs(const int64_t *start, int64_t nodes, tern_adjacency *a)
{
    int64_t v;
    a->rows = a->sources = nodes;
    a->count = start[nodes];
    for (v = 0; v < nodes; v++) {
        const int64_t n = start[v + 1] - start[v];
        if (n <= TERN__EDGES) continue;
        a->hubs++;
        a->parts += tern__ceil_div(n, TERN__EDGES);
    }
}

static void tern__place_rows(tern__layout *p, tern_adjacency *a)
{
    a->start = (int64_t *)tern__piece(p, a->rows + 1, 8);
    a->part = (int64_t *)tern__piece(p, a->hubs, 8);
    a->hub = tern__piece_of_ids(p, a->hubs);
    a->entry = (uint32_t *)tern__piece(p, a->count, 4);
}

/* All of a graph in one piece of memory, from base on (NULL: the size alone). */
static int64_t tern__place_graph(tern_graph *g, void *base)
{
    tern__layout p = {(unsigned char *)base, 0};
    tern__place_rows(&p, &g->in);
    tern__place_rows(&p, &g->out);
    g->mean = tern__piece_of_floats(&p, g->nodes, 1);
    g->to = tern__piece_of_floats(&p, g->nodes, 1);
    g->from = tern__piece_of_floats(&p, g->nodes, 1);
    g->memory = base;
    return p.bytes;
}

static void tern__fill_rows(const tern__edge_rows *rows, tern_adjacency *a)
{
    int64_t v, hub = 0, part = 0;
    memcpy(a->start, rows->start, sizeof(int64_t) * (size_t)(a->rows + 1));
    memcpy(a->entry, rows->entry, sizeof(uint32_t) * (size_t)a->count);
    for (v = 0; v < a->rows; v++) {
        const int64_t n = rows->start[v + 1] - rows->start[v];
        if (n <= TERN__EDGES) continue;
        a->hub[hub] = (int32_t)v;
        a->part[hub++] = part;
        part += tern__ceil_div(n, TERN__EDGES);
    }
}

static void tern__fill_norms(tern_graph *g)
{
    int64_t v;
    for (v = 0; v < g->nodes; v++) {
        const int64_t in = g->in.start[v + 1] - g->in.start[v], out = g->out.start[v + 1] - g->out.start[v];
        g->mean[v] = in ? 1.0f / (float)in : 0.0f;
        g->to[v] = in ? 1.0f / tern__sqrt((float)in) : 0.0f;
        g->from[v] = out ? 1.0f / tern__sqrt((float)out) : 0.0f;
    }
}

/* A graph on the host becomes one of the backend. */
static tern_result tern__upload_graph(tern_context *c, tern_graph *g, const tern__edge_rows *in, const tern__edge_rows *out)
{
    const size_t bytes = (size_t)tern__place_graph(g, NULL);
    void *image = tern__host_alloc(&c->run.allocator, bytes), *memory;
    tern_result result;
    TERN__REQUIRE(&c->run, image, TERN_E_MEMORY, "graph: no memory for %d bytes", (int64_t)bytes);
    tern__place_graph(g, image);
    tern__fill_rows(in, &g->in);
    tern__fill_rows(out, &g->out);
    tern__fill_norms(g);
    memory = tern_alloc(c, bytes);
    result = memory ? tern_copy(c, memory, image, bytes, TERN_TO_DEVICE)
                    : tern__set_error(&c->run.error, TERN_E_MEMORY, "graph: no memory for %d bytes", (int64_t)bytes);
    tern__host_free(&c->run.allocator, image);
    tern__place_graph(g, memory);
    if (result != TERN_OK) tern_graph_free(c, g);
    return result;
}

static tern_result tern__build_graph(tern_context *c, const tern_edges *e, tern__layout *p, int64_t most, tern_graph *g)
{
    tern__edge_list list;
    tern__edge_rows in, out;
    int32_t *seen = tern__piece_of_ids(p, e->nodes);
    list.count = 0;
    list.has_loop = (unsigned char *)tern__piece(p, e->nodes, 1);
    list.to = tern__piece_of_ids(p, most);
    list.from = (uint32_t *)tern__piece(p, most, 4);
    in.start = (int64_t *)tern__piece(p, e->nodes + 1, 8);
    in.entry = (uint32_t *)tern__piece(p, most, 4);
    out.start = (int64_t *)tern__piece(p, e->nodes + 1, 8);
    out.entry = (uint32_t *)tern__piece(p, most, 4);
    if (!p->base) return TERN_OK;
    tern__list_edges(e, &list);
    tern__sort_edges(&list, e->nodes, &in);
    TERN__TRY(tern__drop_duplicates(c, e, &in, seen));
    tern__turn_round(&in, e->nodes, &list);
    tern__sort_edges(&list, e->nodes, &out);
    tern__count_hubs(in.start, e->nodes, &g->in);
    tern__count_hubs(out.start, e->nodes, &g->out);
    g->nodes = e->nodes;
    g->edges = g->in.count;
    return tern__upload_graph(c, g, &in, &out);
}

TERN_API tern_result tern_graph_build(tern_context *c, const tern_edges *e, tern_graph *out)
{
    tern__layout size = {NULL, 0}, host = {NULL, 0};
    tern_result result;
    int64_t most;
    tern_graph g;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, e && out, TERN_E_ARGUMENT, "graph: the edges or out are NULL");
    TERN__TRY(tern__check_edges(c, e));
    memset(&g, 0, sizeof g);
    most = (e->both_ways ? 2 : 1) * e->count + (e->loops ? e->nodes : 0);
    TERN__TRY(tern__build_graph(c, e, &size, most, &g));
    host.base = (unsigned char *)tern__host_alloc(&c->run.allocator, (size_t)size.bytes);
    TERN__REQUIRE(&c->run, host.base, TERN_E_MEMORY, "graph: no memory for %d bytes", size.bytes);
    size.base = host.base;
    result = tern__build_graph(c, e, &host, most, &g);
    tern__host_free(&c->run.allocator, size.base);
    if (result == TERN_OK) *out = g;
    return result;
}

TERN_API void tern_graph_free(tern_context *c, tern_graph *g)
{
    if (!g) return;
    tern_free(c, g->memory);
    memset(g, 0, sizeof *g);
}

/* -- hops -- */

typedef struct tern__hop_shape { int64_t in, sent, out; } tern__hop_shape; /* columns of h, of m and of y */

static tern__hop_shape tern__hop_shape_of(const tern_hop *l)
{
    tern__hop_shape s;
    s.in = l->message.w ? l->message.w->cols : l->update.w ? l->update.w->cols : l->lora_a ? l->lora_a->cols : l->cols;
    s.sent = l->message.w ? l->message.w->rows : s.in;
    s.out = l->update.w ? l->update.w->rows : s.sent;
    return s;
}

/* Columns of the rows that are summed. */
static int64_t tern__hop_width(const tern_hop *l)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    return l->order == TERN_PROJECT_FIRST ? s.sent : s.in;
}

static tern_linear tern__hop_low(tern_param *w)
{
    tern_linear l;
    memset(&l, 0, sizeof l);
    l.w = w;
    l.act = TERN_ACT_FLOAT;
    return l;
}

/* The matrix that says how summed rows are quantized. */
static tern_matrix tern__hop_rows(const tern_hop *l)
{
    tern_matrix m;
    memset(&m, 0, sizeof m);
    m.rows = 1;
    m.cols = tern__hop_width(l);
    m.encoding = TERN_2BIT;
    return m;
}

static tern_result tern__check_hop(tern_context *c, const tern_hop *l, const tern_graph *g)
{
    tern__hop_shape s;
    tern_matrix m;
    tern_run *r;
    if (!c) return TERN_E_ARGUMENT;
    r = &c->run;
    TERN__REQUIRE(r, l && g && g->memory, TERN_E_ARGUMENT, "hop: the hop or the graph is NULL, or the graph was not built");
    TERN__REQUIRE(r, (l->order == TERN_PROJECT_FIRST || l->order == TERN_AGGREGATE_FIRST) && (int32_t)l->norm >= 0
                     && l->norm <= TERN_GRAPH_SYMMETRIC && (l->act == TERN_ACT_INT8 || l->act == TERN_ACT_FLOAT)
                     && (l->fn == TERN_MAP_ADD || (l->fn >= TERN_MAP_RELU && l->fn <= TERN_MAP_GELU)), TERN_E_ARGUMENT,
                  "hop: order %d, norm %d, act %d or fn %d is out of range", (int64_t)(int32_t)l->order, (int64_t)(int32_t)l->norm,
                  (int64_t)(int32_t)l->act, (int64_t)(int32_t)l->fn);
    if (l->message.w) TERN__TRY(tern__check_linear(c, &l->message, g->nodes));
    if (l->update.w) TERN__TRY(tern__check_linear(c, &l->update, g->nodes));
    TERN__REQUIRE(r, !l->lora_a == !l->lora_b && tern__finite(l->lora_scale), TERN_E_ARGUMENT,
                  "hop: lora_a and lora_b come together, and lora_scale is finite");
    s = tern__hop_shape_of(l);
    TERN__TRY(tern__check_count(r, "hop", "nodes", g->nodes, tern__add(s.in, tern__add(s.sent, s.out))));
    m = tern__hop_rows(l);
    TERN__TRY(tern__check_matrix(r, "hop", &m));
    TERN__REQUIRE(r, !l->update.w || l->update.w->cols == s.sent, TERN_E_SHAPE,
                  "hop: the update has %d columns for messages of %d", l->update.w->cols, s.sent);
    TERN__REQUIRE(r, !l->residual || s.in == s.out, TERN_E_SHAPE, "hop: a residual of %d columns beside an output of %d", s.in, s.out);
    if (l->lora_a) {
        const tern_linear a = tern__hop_low(l->lora_a), b = tern__hop_low(l->lora_b);
        TERN__TRY(tern__check_linear(c, &a, g->nodes));
        TERN__TRY(tern__check_linear(c, &b, g->nodes));
        TERN__REQUIRE(r, a.w->cols == s.in && b.w->rows == s.out && b.w->cols == a.w->rows, TERN_E_SHAPE,
                      "hop: lora_a is %d x %d and lora_b %d x %d from %d columns to %d", a.w->rows, a.w->cols, b.w->rows,
                      b.w->cols, s.in, s.out);
    }
    return TERN_OK;
}

typedef struct tern__hop_work {
    void *message, *update, *a, *b;                      /* `saved`: what the layers keep, ... */
    float *g, *m, *z, *low;                              /* ... what message and update read where that is not h, what fn reads, A h */
    float *sent, *up, *part; int8_t *q; float *scale; int32_t *sum; /* scratch: P h, B A h; segments of hubs; quantized rows */
    float *dz, *dm, *drows, *dlow, *dup, *dh;            /* and of the backward */
    unsigned char *own;                                  /* what a block needs while it goes through, for each worker */
    int64_t saved_bytes, scratch_bytes, own_bytes, nested; /* nested: of a layer inside, for each worker */
    int64_t block, workers;                              /* rows at once; threads that take blocks of their own, or 1 */
    int32_t kept;                                        /* for a backward */
} tern__hop_work;

/* All rows where the layers keep something for each, or the backend wants it; else blocks of so many that stay in cache, and
   are worth a product with the weights. Where there are several for each thread these take them by themselves; else all
   threads share the operations of one after the other, and so they do with a block in which a hub has more edges than a
   HOP_SHAREth of a thread's part: one alone would be long at it. (The tests set less.) */
#ifndef TERN__HOP_ROWS
#define TERN__HOP_ROWS 256
#define TERN__HOP_TURNS 4
#define TERN__HOP_SHARE 32
#endif
static void tern__hop_blocks(const tern_context *c, const tern_hop *l, const tern_graph *g, int32_t kept, tern__hop_work *w)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    const int64_t workers = c->run.parallel.run ? c->run.parallel.workers : 1, row = 4 * (s.in + s.sent + s.out),
                  cache = c->run.backend->cache;
    w->block = g->nodes;
    w->workers = 1;
    if (kept || cache == 0) return;
#ifdef TERN__TURNS
    w->block = tern__max(TERN__HOP_ROWS, cache / row);
    if (workers > 1 && c->run.backend->open == tern__cpu_open && g->nodes / w->block >= TERN__HOP_TURNS * workers) {
        w->workers = workers;
        return;
    }
#endif
    w->block = tern__min(g->nodes, tern__max(TERN__HOP_ROWS, tern__mul(cache, workers) / row));
}

static void tern__hop_saved(const tern_hop *l, int64_t n, void *base, tern__hop_work *w)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    tern__layout p = {(unsigned char *)base, 0};
    if (l->message.w) w->message = tern__piece(&p, tern__kept_at(&l->message, n, NULL).bytes, 1);
    if (l->update.w) w->update = tern__piece(&p, tern__kept_at(&l->update, n, NULL).bytes, 1);
    if (l->message.w && l->order == TERN_AGGREGATE_FIRST) w->g = tern__piece_of_floats(&p, n, s.in);
    if (l->update.w) w->m = tern__piece_of_floats(&p, n, s.sent);
    if (l->fn != TERN_MAP_ADD) w->z = tern__piece_of_floats(&p, n, s.out);
    if (l->lora_a) {
        const tern_linear a = tern__hop_low(l->lora_a), b = tern__hop_low(l->lora_b);
        w->a = tern__piece(&p, tern__kept_at(&a, n, NULL).bytes, 1);
        w->b = tern__piece(&p, tern__kept_at(&b, n, NULL).bytes, 1);
        w->low = tern__piece_of_floats(&p, n, l->lora_a->rows);
    }
    w->saved_bytes = p.bytes;
}

static int64_t tern__hop_nested(const tern_hop *l, int64_t n)
{
    const tern_linear all[] = {l->message, l->update, tern__hop_low(l->lora_a), tern__hop_low(l->lora_b)};
    int64_t most = 0;
    int32_t i;
    for (i = 0; i < 4; i++) if (all[i].w) most = tern__max(most, tern__linear_bytes(&all[i], n));
    return most;
}

/* What a block needs for itself in a forward, from base on. Without kept that is what the layers keep, too. */
static void tern__hop_own(const tern_hop *l, void *base, tern__hop_work *w)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    tern__layout p = {(unsigned char *)base, 0};
    if (!w->kept) tern__hop_saved(l, w->block, tern__piece(&p, w->saved_bytes, 1), w);
    if (l->message.w && l->order == TERN_PROJECT_FIRST && l->act == TERN_ACT_INT8) w->sent = tern__piece_of_floats(&p, w->block, s.sent);
    if (l->lora_a) w->up = tern__piece_of_floats(&p, w->block, s.out);
    w->own_bytes = p.bytes;
}

/* What a forward sums: parts of hubs, and what nodes send where that is not h. */
static void tern__hop_sent(const tern_hop *l, const tern_graph *g, tern__layout *p, tern__hop_work *w)
{
    const tern_matrix rows = tern__hop_rows(l);
    w->part = tern__piece_of_floats(p, tern__max(g->in.parts, g->out.parts), rows.cols);
    if (l->act == TERN_ACT_INT8) {
        w->q = (int8_t *)tern__piece(p, g->nodes, tern__shape_of(&rows).stride);
        w->scale = tern__piece_of_floats(p, g->nodes, 1);
        w->sum = tern__piece_of_ids(p, g->nodes);
    } else if (l->message.w && l->order == TERN_PROJECT_FIRST) w->sent = tern__piece_of_floats(p, g->nodes, rows.cols);
}

/* All memory of a forward or backward, from base on (NULL: sizes alone). */
static void tern__hop_memory(const tern_context *c, const tern_hop *l, const tern_graph *g, int32_t backward, int32_t kept, void *saved,
                             void *base, tern__hop_work *w)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    const int64_t n = g->nodes, cols = tern__hop_width(l);
    tern__layout p = {(unsigned char *)base, 0};
    memset(w, 0, sizeof *w);
    tern__hop_blocks(c, l, g, kept, w);
    w->kept = kept;
    tern__hop_saved(l, w->block, saved, w);
    if (!backward) {
        tern__hop_sent(l, g, &p, w);
        tern__hop_own(l, NULL, w);
        w->own = (unsigned char *)tern__piece(&p, w->own_bytes, w->workers);
    } else {
        w->part = tern__piece_of_floats(&p, tern__max(g->in.parts, g->out.parts), cols);
        if (l->fn != TERN_MAP_ADD) w->dz = tern__piece_of_floats(&p, n, s.out);
        if (l->update.w) w->dm = tern__piece_of_floats(&p, n, s.sent);
        if (l->message.w) w->drows = tern__piece_of_floats(&p, n, cols);
        if (l->lora_a) {
            w->dup = tern__piece_of_floats(&p, n, s.out);
            w->dlow = tern__piece_of_floats(&p, n, l->lora_a->rows);
            w->dh = tern__piece_of_floats(&p, n, s.in);
        }
    }
    w->scratch_bytes = p.bytes;
    w->nested = tern__scratch_piece(tern__hop_nested(l, w->block));
}

/* Scratch of a forward that keeps nothing, of one that does, or of a backward. */
static int64_t tern__hop_scratch(const tern_context *c, const tern_hop *l, const tern_graph *g, int32_t backward, int32_t kept)
{
    tern__hop_work w;
    tern__hop_memory(c, l, g, backward, kept, NULL, NULL, &w);
    return tern__add(w.scratch_bytes, tern__mul(w.nested, w.workers));
}

TERN_API tern_result tern_hop_need(tern_context *c, const tern_hop *l, const tern_graph *g, tern_need *out)
{
    tern__hop_work w;
    int64_t scratch;
    TERN__TRY(tern__check_hop(c, l, g));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "hop: out is NULL");
    memset(&w, 0, sizeof w);
    tern__hop_saved(l, g->nodes, NULL, &w);
    scratch = tern__max(tern__hop_scratch(c, l, g, 0, 0), tern__hop_scratch(c, l, g, 0, 1));
#ifndef TERNARY_NO_TRAINING
    scratch = tern__max(scratch, tern__hop_scratch(c, l, g, 1, 1));
#endif
    TERN__REQUIRE(&c->run, tern__fits(scratch) && tern__fits(w.saved_bytes), TERN_E_OVERFLOW,
                  "hop: the scratch of %d nodes overflows", g->nodes);
    out->saved = (size_t)w.saved_bytes;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

/* Layers inside this one take their scratch behind its own, until scratch_base is what it was. */
static tern_result tern__hop_enter(tern_context *c, const tern_hop *l, const tern_graph *g, int32_t backward, int32_t kept, void *saved,
                                   tern__hop_work *w)
{
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_hop_need(c, l, g, &need));
    TERN__TRY(tern__begin_scratch(c, "hop", g->nodes, (size_t)tern__hop_scratch(c, l, g, backward, kept)));
    tern__hop_memory(c, l, g, backward, kept, saved, c->scratch + c->scratch_base, w);
    c->scratch_base += (size_t)w->scratch_bytes;
    return TERN_OK;
}

/* The sum along the edges or, turned, against them. */
static tern_aggregate_args tern__hop_sum(const tern_hop *l, const tern_graph *g, int32_t turned, const tern__hop_work *w, float *y)
{
    const float *into = l->norm == TERN_GRAPH_MEAN ? g->mean : l->norm == TERN_GRAPH_SYMMETRIC ? g->to : NULL;
    const float *from = l->norm == TERN_GRAPH_SYMMETRIC ? g->from : NULL;
    tern_aggregate_args a;
    memset(&a, 0, sizeof a);
    a.edges = turned ? g->out : g->in;
    a.cols = tern__hop_width(l);
    a.left = turned ? from : into;
    a.right = turned ? into : from;
    a.part = w->part;
    a.y = y;
    return a;
}

/* What they sum: x, or w's int8. */
static void tern__hop_reads(const tern_hop *l, const float *x, const tern__hop_work *w, tern_aggregate_args *a)
{
    const tern_matrix rows = tern__hop_rows(l);
    a->x = x;
    if (l->act != TERN_ACT_INT8) return;
    a->right = NULL;
    a->q = w->q;
    a->scale = w->scale;
    a->q_row = tern__shape_of(&rows).stride;
}

static tern_quantize_args tern__hop_int8(const tern_hop *l, int64_t v, int64_t n, const float *x, const tern__hop_work *w)
{
    tern_quantize_args q;
    memset(&q, 0, sizeof q);
    q.m = tern__hop_rows(l);
    q.n = n;
    q.x = x;
    q.q = w->q + v * tern__shape_of(&q.m).stride;
    q.scale = w->scale + v;
    q.sum = w->sum + v;
    return q;
}

/* Rows [v, v + n) as int8; what an edge multiplies by, besides its sign, goes into their scales. */
static tern_result tern__hop_quantize(tern_context *c, const tern_hop *l, const tern_graph *g, int64_t v, int64_t n, const float *x,
                                      const tern__hop_work *w)
{
    const tern_quantize_args q = tern__hop_int8(l, v, n, x, w);
    tern_map_args m;
    TERN__TRY(tern_quantize(c, &q));
    if (l->norm != TERN_GRAPH_SYMMETRIC) return TERN_OK;
    memset(&m, 0, sizeof m);
    m.fn = TERN_MAP_MUL;
    m.count = n;
    m.a = m.y = q.scale;
    m.b = g->from + v;
    return tern_map(c, &m);
}

/* What rows [v, v + n) send: P h or h, in float or as int8. */
static tern_result tern__hop_send(tern_context *c, const tern_hop *l, const tern_graph *g, int64_t v, int64_t n, const float *h,
                                  const tern__hop_work *w)
{
    float *sent = w->sent;
    if (sent) {
        if (l->act == TERN_ACT_FLOAT) sent += v * l->message.w->rows;
        TERN__TRY(tern_linear_forward(c, &l->message, n, h, sent, w->message));
    }
    return l->act == TERN_ACT_INT8 ? tern__hop_quantize(c, l, g, v, n, sent ? sent : h, w) : TERN_OK;
}

/* Rows [v, v + n) of those that edges end at. Only the CPU, whose memory this is, has others than all. */
static tern_adjacency tern__some_rows(const tern_adjacency *all, int64_t v, int64_t n)
{
    tern_adjacency some = *all;
    int64_t hub, end;
    if (n == all->rows) return some;
    hub = tern__first_hub(all, v);
    end = tern__first_hub(all, v + n);
    some.first = v;
    some.rows = n;
    some.start += v;
    some.count = some.start[n] - some.start[0];
    some.hubs = end - hub;
    some.parts = some.hubs ? (end < all->hubs ? all->part[end] : all->parts) - all->part[hub] : 0;
    some.hub += hub;
    some.part += hub;
    return some;
}

/* w->up = B A h. */
static tern_result tern__hop_lora(tern_context *c, const tern_hop *l, int64_t n, const float *h, const tern__hop_work *w)
{
    const tern_linear low = tern__hop_low(l->lora_a), up = tern__hop_low(l->lora_b);
    TERN__TRY(tern_linear_forward(c, &low, n, h, w->low, w->a));
    return tern_linear_forward(c, &up, n, w->low, w->up, w->b);
}

/* A layer that is one quantized product and no more. */
static int32_t tern__hop_is_plain(const tern_linear *l) { return !l->w || tern__is_one_product(l); }

static tern_linear_args tern__hop_layer(const tern_linear *l)
{
    tern__kept none;
    tern_linear_args a;
    memset(&none, 0, sizeof none);
    memset(&a, 0, sizeof a);
    if (!l->w) return a;
    a.quantize = tern__linear_quantize(l, 0, NULL, &none);
    a.bias = tern__floats(l->bias ? l->bias : l->w->dead, TERN_SHADOW);
    return a;
}

/* Whether what reaches nodes may go in one operation: the backend has it, nothing is kept and every layer is plain. Faults of
   LoRA would come too early: only dense ones, which have none, are plain. */
static int32_t tern__hop_fuses(const tern_context *c, const tern_hop *l, const tern__hop_work *w)
{
    return c->run.backend->hop && !w->kept && (!w->g || tern__hop_is_plain(&l->message)) && tern__hop_is_plain(&l->update) &&
           (!l->lora_a || (l->lora_a->rule == TERN_DENSE && l->lora_b->rule == TERN_DENSE));
}

/* What reaches nodes, with LoRA's part in w->up. */
static tern_hop_args tern__hop_to(const tern_hop *l, const tern_aggregate_args *sum, const float *h, float *y, const tern__hop_work *w)
{
    tern_hop_args a;
    memset(&a, 0, sizeof a);
    a.sum = *sum;
    a.sum.y = y;
    if (l->order == TERN_AGGREGATE_FIRST) a.message = tern__hop_layer(&l->message);
    a.update = tern__hop_layer(&l->update);
    a.fn = l->fn;
    a.factor = l->lora_scale;
    a.add = l->lora_a ? w->up : NULL;
    a.residual = l->residual ? h : NULL;
    a.y = y;
    return a;
}

/* TERN_E_UNSUPPORTED where the backend declines. */
static tern_result tern__hop_fused(tern_context *c, const tern_hop *l, const tern_aggregate_args *sum, const float *h, float *y,
                                   const tern__hop_work *w)
{
    const tern_error before = c->run.error;
    const tern_hop_args a = tern__hop_to(l, sum, h, y, w);
    tern__fp_mode mode;
    tern_result result;
    TERN__TRY(tern__check_aggregate(&c->run, &a.sum));
    mode = tern__fp_enter();
    result = c->run.backend->hop(&c->run, &a);
    tern__fp_leave(mode);
    if (result == TERN_E_UNSUPPORTED) c->run.error = before;
    return result;
}

/* y of nodes [v, v + n), from what all send: x where that is float. */
static tern_result tern__hop_receive(tern_context *c, const tern_hop *l, const tern_graph *g, int64_t v, int64_t n, const float *x,
                                     const float *h, float *y, const tern__hop_work *w)
{
    const int64_t count = n * tern__hop_shape_of(l).out;
    const int32_t fuses = tern__hop_fuses(c, l, w);
    float *z = w->z ? w->z : y, *m = w->m ? w->m : z;
    tern_aggregate_args a = tern__hop_sum(l, g, 0, w, w->g ? w->g : m);
    tern_result result;
    a.edges = tern__some_rows(&g->in, v, n);
    if (a.left) a.left += v;
    if (n < g->nodes && a.edges.hubs) a.part += a.edges.part[0] * a.cols;
    tern__hop_reads(l, x, w, &a);
    if (l->lora_a && fuses) TERN__TRY(tern__hop_lora(c, l, n, h, w));
    result = fuses ? tern__hop_fused(c, l, &a, h, y, w) : TERN_E_UNSUPPORTED;
    if (result != TERN_E_UNSUPPORTED) return result;
    TERN__TRY(tern_aggregate(c, &a));
    if (w->g) TERN__TRY(tern_linear_forward(c, &l->message, n, w->g, m, w->message));
    if (l->update.w) TERN__TRY(tern_linear_forward(c, &l->update, n, m, z, w->update));
    if (l->fn != TERN_MAP_ADD) TERN__TRY(tern__apply(c, l->fn, count, z, NULL, y));
    if (l->lora_a) {
        if (!fuses) TERN__TRY(tern__hop_lora(c, l, n, h, w));
        TERN__TRY(tern__add_scaled(c, count, y, l->lora_scale, w->up, y));
    }
    return l->residual ? tern__apply(c, TERN_MAP_ADD, count, y, h, y) : TERN_OK;
}

/* First all nodes send, then all receive. */
typedef struct tern__hop_pass {
    const tern_hop *l;
    const tern_graph *g;
    const float *h;
    float *y;
    const tern__hop_work *w;
    int32_t receives;
} tern__hop_pass;

static tern_result tern__hop_turn(tern_context *c, const void *arg, int64_t block, int64_t worker)
{
    const tern__hop_pass *p = (const tern__hop_pass *)arg;
    const tern__hop_shape s = tern__hop_shape_of(p->l);
    const int64_t v = block * p->w->block, n = tern__min(p->w->block, p->g->nodes - v);
    tern__hop_work w = *p->w;
    tern__hop_own(p->l, w.own + worker * w.own_bytes, &w);
    c->run.row = v;
    if (!p->receives) return tern__hop_send(c, p->l, p->g, v, n, p->h + v * s.in, &w);
    return tern__hop_receive(c, p->l, p->g, v, n, w.sent ? w.sent : p->h, p->h + v * s.in, p->y + v * s.out, &w);
}

/* Whether all threads share the operations of a block. */
static int32_t tern__hop_shares(const tern__hop_pass *p, int64_t block)
{
    const tern_adjacency *e = &p->g->in;
    const int64_t v = block * p->w->block, most = e->count / (TERN__HOP_SHARE * p->w->workers);
    int64_t i;
    if (p->w->workers == 1) return 1;
    for (i = p->receives ? tern__first_hub(e, v) : e->hubs; i < e->hubs && e->hub[i] < v + p->w->block; i++)
        if (e->start[e->hub[i] + 1] - e->start[e->hub[i]] > most) return 1;
    return 0;
}

/* Nodes in blocks: what lies between operations stays in cache, and is never there for all nodes. */
static tern_result tern__hop_run(tern_context *c, const tern__hop_pass *p)
{
    const int64_t blocks = tern__ceil_div(p->g->nodes, p->w->block);
    int64_t i, end;
    for (i = 0; i < blocks; i = end) {
        for (end = i; end < blocks && !tern__hop_shares(p, end); end++) {} /* fewer blocks than workers are shared, too */
#ifdef TERN__TURNS
        if (end - i >= p->w->workers) {
            const tern__hop_shape s = tern__hop_shape_of(p->l);
            const int64_t places = p->receives ? 1 + p->g->edges / p->g->nodes : 1;
            TERN__TRY(tern__take_turns(c, tern__hop_turn, p, i, end, (size_t)p->w->nested,
                                       tern__mul(tern__mul(p->w->block, places), 2 * (s.in + s.sent + s.out))));
            continue;
        }
#endif
        TERN__TRY(tern__hop_turn(c, p, i, 0));
        end = i + 1;
    }
    return TERN_OK;
}

TERN_API tern_result tern_hop_forward(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, float *y, void *saved)
{
    tern__hop_work w;
    tern__hop_pass p;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "hop", "h", h, 4));
    TERN__TRY(tern__check_pointer(&c->run, "hop", "y", y, 4));
    if (saved) TERN__TRY(tern__check_pointer(&c->run, "hop", "saved", saved, 4));
    TERN__TRY(tern__hop_enter(c, l, g, 0, saved != NULL, saved, &w));
    p.l = l; p.g = g; p.h = h; p.y = y; p.w = &w;
    p.receives = 0;
    result = w.q || w.sent ? tern__hop_run(c, &p) : TERN_OK;
    p.receives = 1;
    if (result == TERN_OK) result = tern__hop_run(c, &p);
    c->run.row = 0;
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}

/* -- several hops, for inference -- */

/* Scratch, in pairs whose turn it is: rows that the next hop reads, and behind them what whole hops send. */
typedef struct tern__hops_work { float *rows[2]; unsigned char *sent[2]; int64_t rows_bytes, bytes; } tern__hops_work;

static void tern__hops_memory(const tern_context *c, const tern_hop *hops, int32_t count, const tern_graph *g, void *base,
                              tern__hops_work *w)
{
    tern__layout p = {(unsigned char *)base, 0};
    int64_t cols[2] = {0, 0}, sent = 0;
    int32_t i;
    for (i = 0; i + 1 < count; i++) cols[i % 2] = tern__max(cols[i % 2], tern__hop_shape_of(&hops[i]).out);
    for (i = 0; i < count && c->run.backend->hops; i++) {
        tern__layout of = {NULL, 0};
        tern__hop_work whole;
        tern__hop_sent(&hops[i], g, &of, &whole);
        sent = tern__max(sent, of.bytes);
    }
    for (i = 0; i < 2; i++) w->rows[i] = tern__piece_of_floats(&p, g->nodes, cols[i]);
    w->rows_bytes = p.bytes;
    for (i = 0; i < 2; i++) w->sent[i] = (unsigned char *)tern__piece(&p, sent, 1);
    w->bytes = p.bytes;
}

TERN_API tern_result tern_hops_need(tern_context *c, const tern_hop *hops, int32_t count, const tern_graph *g, tern_need *out)
{
    tern__hops_work w;
    int64_t alone = 0, scratch;
    int32_t i;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, hops && out && count >= 1, TERN_E_ARGUMENT, "hops: hops or out is NULL, or there are %d", (int64_t)count);
    for (i = 0; i < count; i++) {
        TERN__TRY(tern__check_hop(c, &hops[i], g));
        TERN__REQUIRE(&c->run, i == 0 || tern__hop_shape_of(&hops[i]).in == tern__hop_shape_of(&hops[i - 1]).out, TERN_E_SHAPE,
                      "hops: hop %d reads %d columns, and hop %d makes %d", (int64_t)i, tern__hop_shape_of(&hops[i]).in, (int64_t)i - 1,
                      tern__hop_shape_of(&hops[i - 1]).out);
        alone = tern__max(alone, tern__hop_scratch(c, &hops[i], g, 0, 0));
    }
    tern__hops_memory(c, hops, count, g, NULL, &w);
    scratch = tern__max(tern__add(w.rows_bytes, alone), w.bytes);
    TERN__REQUIRE(&c->run, tern__fits(scratch), TERN_E_OVERFLOW, "hops: the scratch of %d nodes overflows", g->nodes);
    out->saved = 0;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

/* Whether a backend can be asked for the whole hop: every layer is plain, and nothing is beside them. */
static int32_t tern__hop_is_whole(const tern_hop *l)
{
    return tern__hop_is_plain(&l->message) && tern__hop_is_plain(&l->update) && !l->lora_a;
}

static tern_whole_hop tern__whole_hop(const tern_hop *l, const tern_graph *g, const float *h, float *y, void *base)
{
    const float *sent = h;
    tern__layout p = {(unsigned char *)base, 0};
    tern_aggregate_args sum;
    tern_whole_hop a;
    tern__hop_work w;
    memset(&a, 0, sizeof a);
    memset(&w, 0, sizeof w);
    tern__hop_sent(l, g, &p, &w);
    if (l->message.w && l->order == TERN_PROJECT_FIRST) {
        a.project = tern__hop_layer(&l->message);
        a.project.quantize.n = g->nodes;
        a.project.quantize.x = h;
        sent = a.project.y = w.sent;
    }
    if (w.q) a.rows = tern__hop_int8(l, 0, g->nodes, sent, &w);
    if (w.q && l->norm == TERN_GRAPH_SYMMETRIC) a.from = g->from;
    sum = tern__hop_sum(l, g, 0, &w, y);
    tern__hop_reads(l, sent, &w, &sum);
    a.to = tern__hop_to(l, &sum, h, y, &w);
    return a;
}

/* The hops of a call; each one's h and y. */
typedef struct tern__hops_pass {
    const tern_hop *hops;
    int32_t count;
    const tern_graph *g;
    const float *h;
    float *y;
    tern__hops_work w;
} tern__hops_pass;

static const float *tern__hops_from(const tern__hops_pass *p, int32_t i) { return i == 0 ? p->h : p->w.rows[(i - 1) % 2]; }
static float *tern__hops_to(const tern__hops_pass *p, int32_t i) { return i == p->count - 1 ? p->y : p->w.rows[i % 2]; }

/* From hop i on as many as are whole, as one operation. TERN_E_UNSUPPORTED where the backend declines, or there is none. */
static tern_result tern__hops_fused(tern_context *c, const tern__hops_pass *p, int32_t i, int32_t *n)
{
    const tern_error before = c->run.error;
    tern__fp_mode mode;
    tern_result result;
    tern_hops_args a;
    a.count = 0;
    for (; c->run.backend->hops && i < p->count && a.count < TERN_HOPS_AT_ONCE && tern__hop_is_whole(&p->hops[i]); i++) {
        tern_whole_hop *hop = &a.hop[a.count++];
        *hop = tern__whole_hop(&p->hops[i], p->g, tern__hops_from(p, i), tern__hops_to(p, i), p->w.sent[i % 2]);
        TERN__TRY(tern__check_aggregate(&c->run, &hop->to.sum));
    }
    *n = (int32_t)tern__max(a.count, 1);
    if (!a.count) return TERN_E_UNSUPPORTED;
    mode = tern__fp_enter();
    result = c->run.backend->hops(&c->run, &a);
    tern__fp_leave(mode);
    if (result == TERN_E_UNSUPPORTED) c->run.error = before;
    return result;
}

static tern_result tern__hops_run(tern_context *c, const tern__hops_pass *p)
{
    int32_t i, end, n;
    for (i = 0; i < p->count; i = end) {
        const tern_result result = tern__hops_fused(c, p, i, &n);
        end = i + n;
        if (result == TERN_OK) continue;
        if (result != TERN_E_UNSUPPORTED) return result;
        for (; i < end; i++) TERN__TRY(tern_hop_forward(c, &p->hops[i], p->g, tern__hops_from(p, i), tern__hops_to(p, i), NULL));
    }
    return TERN_OK;
}

TERN_API tern_result tern_hops_forward(tern_context *c, const tern_hop *hops, int32_t count, const tern_graph *g, const float *h, float *y)
{
    tern_need need = TERN_ZERO;
    tern__hops_pass p;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "hops", "h", h, 4));
    TERN__TRY(tern__check_pointer(&c->run, "hops", "y", y, 4));
    TERN__TRY(tern_hops_need(c, hops, count, g, &need));
    TERN__TRY(tern__begin_scratch(c, "hops", g->nodes, need.scratch));
    p.hops = hops; p.count = count; p.g = g; p.h = h; p.y = y;
    tern__hops_memory(c, hops, count, g, c->scratch + c->scratch_base, &p.w);
    c->scratch_base += (size_t)p.w.rows_bytes;
    result = tern__hops_run(c, &p);
    c->scratch_base -= (size_t)p.w.rows_bytes;
    return result;
}

#ifndef TERNARY_NO_TRAINING
static tern_result tern__hop_scatter(tern_context *c, const tern_hop *l, const tern_graph *g, const float *dy,
                                     const tern__hop_work *w, float *dx)
{
    tern_aggregate_args a = tern__hop_sum(l, g, 1, w, dx);
    a.x = dy;
    return tern_aggregate(c, &a);
}

/* dh of what went along the edges, from the gradient of m. */
static tern_result tern__hop_message_back(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, const float *dm,
                                          const tern__hop_work *w, float *dh)
{
    if (!l->message.w) return dh ? tern__hop_scatter(c, l, g, dm, w, dh) : TERN_OK;
    if (l->order == TERN_PROJECT_FIRST) {
        TERN__TRY(tern__hop_scatter(c, l, g, dm, w, w->drows));
        return tern_linear_backward(c, &l->message, g->nodes, h, w->message, w->drows, dh);
    }
    TERN__TRY(tern_linear_backward(c, &l->message, g->nodes, w->g, w->message, dm, dh ? w->drows : NULL));
    return dh ? tern__hop_scatter(c, l, g, w->drows, w, dh) : TERN_OK;
}

static tern_result tern__hop_back(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, const float *dy,
                                  const tern__hop_work *w, float *dh)
{
    const tern__hop_shape s = tern__hop_shape_of(l);
    const int64_t n = g->nodes;
    const float *dz = dy, *dm;
    if (l->fn != TERN_MAP_ADD) {
        TERN__TRY(tern__apply_back(c, l->fn, n * s.out, w->z, NULL, dy, w->dz, NULL));
        dz = w->dz;
    }
    dm = dz;
    if (l->update.w) {
        TERN__TRY(tern_linear_backward(c, &l->update, n, w->m, w->update, dz, w->dm));
        dm = w->dm;
    }
    TERN__TRY(tern__hop_message_back(c, l, g, h, dm, w, dh));
    if (l->lora_a) {
        const tern_linear a = tern__hop_low(l->lora_a), b = tern__hop_low(l->lora_b);
        TERN__TRY(tern__add_scaled(c, n * s.out, dy, l->lora_scale, NULL, w->dup));
        TERN__TRY(tern_linear_backward(c, &b, n, w->low, w->b, w->dup, w->dlow));
        TERN__TRY(tern_linear_backward(c, &a, n, h, w->a, w->dlow, dh ? w->dh : NULL));
        if (dh) TERN__TRY(tern__apply(c, TERN_MAP_ADD, n * s.in, dh, w->dh, dh));
    }
    return dh && l->residual ? tern__apply(c, TERN_MAP_ADD, n * s.in, dh, dy, dh) : TERN_OK;
}

TERN_API tern_result tern_hop_backward(tern_context *c, const tern_hop *l, const tern_graph *g, const float *h, const void *saved,
                                       const float *dy, float *dh)
{
    tern__hop_work w;
    tern_result result;
    tern_linear all[4];
    int32_t i;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "hop", "h", h, 4));
    TERN__TRY(tern__check_pointer(&c->run, "hop", "dy", dy, 4));
    if (dh) TERN__TRY(tern__check_pointer(&c->run, "hop", "dh", dh, 4));
    TERN__TRY(tern__check_hop(c, l, g));
    tern__hop_saved(l, g->nodes, NULL, &w);
    if (w.saved_bytes) TERN__TRY(tern__check_pointer(&c->run, "hop", "saved", saved, 4));
    all[0] = l->message; all[1] = l->update;
    all[2] = tern__hop_low(l->lora_a); all[3] = tern__hop_low(l->lora_b);
    for (i = 0; i < 4; i++) if (all[i].w) TERN__TRY(tern__check_gradients(c, &all[i]));
    TERN__TRY(tern__hop_enter(c, l, g, 1, 1, (void *)(uintptr_t)saved, &w));
    result = tern__hop_back(c, l, g, h, dy, &w, dh);
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}
#endif
/* -- memory of n-grams -- */

/* Tokens of a gram, the oldest first, multiplied and folded one after the other; the high half of 64 bits picks a row. */
static int32_t tern__ngram_row(uint64_t seed, int64_t rows, const int32_t *tokens, int64_t known, int32_t order)
{
    uint64_t x = seed + (uint64_t)order * UINT64_C(0x9E3779B97F4A7C15);
    int32_t j;
    for (j = order - 1; j >= 0; j--) {
        x = (x ^ (j <= known ? (uint64_t)(uint32_t)tokens[-j] : UINT64_C(0xFFFFFFFF))) * UINT64_C(0xD6E8FEB86659FD93);
        x ^= x >> 32;
    }
    x = x * UINT64_C(0xD6E8FEB86659FD93);
    return (int32_t)(((x >> 32) * (uint64_t)rows) >> 32);
}

static tern_result tern__check_ngram(tern_context *c, const tern_ngram *l, int64_t n)
{
    tern_run *r;
    if (!c) return TERN_E_ARGUMENT;
    r = &c->run;
    TERN__REQUIRE(r, l && l->table && l->key.w && l->value.w, TERN_E_ARGUMENT, "ngram: the layer, its table, key or value is NULL");
    TERN__TRY(tern__check_count(r, "ngram", "n", n, 2));
    TERN__REQUIRE(r, 2 * n <= INT32_MAX && l->table->rows <= INT32_MAX, TERN_E_OVERFLOW,
                  "ngram: %d tokens or %d rows are beyond int32", n, l->table->rows);
    TERN__TRY(tern__check_ready(c, l->table));
    TERN__TRY(tern__check_linear(c, &l->key, 2 * n));
    TERN__TRY(tern__check_linear(c, &l->value, 2 * n));
    TERN__REQUIRE(r, l->key.w->rows == l->value.w->rows && l->key.w->cols == l->table->cols && l->value.w->cols == l->table->cols,
                  TERN_E_SHAPE, "ngram: key is %d x %d and value %d x %d for rows of %d", l->key.w->rows, l->key.w->cols, l->value.w->rows,
                  l->value.w->cols, l->table->cols);
    return TERN_OK;
}

TERN_API tern_result tern_ngram_ids(tern_context *c, const tern_ngram *l, int64_t n, int64_t period, const int32_t *tokens, int32_t *ids)
{
    int64_t t;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, l && l->table && l->table->rows > 0 && l->table->rows <= INT32_MAX, TERN_E_ARGUMENT,
                  "ngram: the layer or its table is NULL, or has no rows or too many");
    TERN__TRY(tern__check_count(&c->run, "ngram", "n", n, 2));
    TERN__REQUIRE(&c->run, period >= 0, TERN_E_ARGUMENT, "ngram: period is %d", period);
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "tokens", tokens, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "ids", ids, 4));
    for (t = 0; t < n; t++) TERN__REQUIRE(&c->run, tokens[t] >= 0, TERN_E_ARGUMENT, "ngram: tokens[%d] is %d", t, (int64_t)tokens[t]);
    for (t = 0; t < n; t++) {
        const int64_t known = period ? t % period : t;
        ids[t] = tern__ngram_row(l->seed, l->table->rows, tokens + t, known, 2);
        ids[n + t] = tern__ngram_row(l->seed, l->table->rows, tokens + t, known, 3);
    }
    return TERN_OK;
}

typedef struct tern__ngram_work {
    void *key_kept, *value_kept; float *rows, *key, *value, *gate; /* `saved` */
    float *dkey, *dvalue, *drows, *more;                          /* of the backward */
    int64_t saved_bytes, scratch_bytes;
} tern__ngram_work;

static void tern__ngram_saved(const tern_ngram *l, int64_t n, void *base, tern__ngram_work *w)
{
    tern__layout p = {(unsigned char *)base, 0};
    w->key_kept = tern__piece(&p, tern__kept_at(&l->key, 2 * n, NULL).bytes, 1);
    w->value_kept = tern__piece(&p, tern__kept_at(&l->value, 2 * n, NULL).bytes, 1);
    w->rows = tern__piece_of_floats(&p, 2 * n, l->table->cols);
    w->key = tern__piece_of_floats(&p, 2 * n, l->key.w->rows);
    w->value = tern__piece_of_floats(&p, 2 * n, l->key.w->rows);
    w->gate = tern__piece_of_floats(&p, 2 * n, 1);
    w->saved_bytes = p.bytes;
}

static void tern__ngram_memory(const tern_ngram *l, int64_t n, void *saved, void *base, tern__ngram_work *w)
{
    tern__layout p = {(unsigned char *)base, 0};
    memset(w, 0, sizeof *w);
    tern__ngram_saved(l, n, saved, w);
    if (!saved) tern__ngram_saved(l, n, tern__piece(&p, w->saved_bytes, 1), w);
    w->dkey = tern__piece_of_floats(&p, 2 * n, l->key.w->rows);
    w->dvalue = tern__piece_of_floats(&p, 2 * n, l->key.w->rows);
    w->drows = tern__piece_of_floats(&p, 2 * n, l->table->cols);
    w->more = tern__piece_of_floats(&p, 2 * n, l->table->cols);
    w->scratch_bytes = p.bytes;
}

TERN_API tern_result tern_ngram_need(tern_context *c, const tern_ngram *l, int64_t n, tern_need *out)
{
    tern__ngram_work w;
    int64_t scratch;
    TERN__TRY(tern__check_ngram(c, l, n));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "ngram: out is NULL");
    tern__ngram_memory(l, n, NULL, NULL, &w);
    scratch = tern__add(w.scratch_bytes, tern__max(tern__linear_bytes(&l->key, 2 * n), tern__linear_bytes(&l->value, 2 * n)));
    TERN__REQUIRE(&c->run, tern__fits(scratch), TERN_E_OVERFLOW, "ngram: the scratch of %d tokens overflows", n);
    out->saved = (size_t)w.saved_bytes;
    out->scratch = (size_t)scratch;
    return TERN_OK;
}

static tern_result tern__ngram_enter(tern_context *c, const tern_ngram *l, int64_t n, void *saved, tern__ngram_work *w)
{
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_ngram_need(c, l, n, &need));
    TERN__TRY(tern__begin_scratch(c, "ngram", n, need.scratch));
    tern__ngram_memory(l, n, saved, c->scratch + c->scratch_base, w);
    c->scratch_base += (size_t)w->scratch_bytes;
    return TERN_OK;
}

static tern_gate_args tern__ngram_gate(const tern_ngram *l, int64_t n, const float *h, const tern__ngram_work *w)
{
    tern_gate_args a;
    memset(&a, 0, sizeof a);
    a.n = n;
    a.count = 2;
    a.cols = l->key.w->rows;
    a.h = h;
    a.key = w->key;
    a.value = w->value;
    a.gate = w->gate;
    return a;
}

static tern_result tern__ngram_run(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h, float *y,
                                   const tern__ngram_work *w)
{
    const tern_embedding table = {l->table};
    tern_gate_args a = tern__ngram_gate(l, n, h, w);
    a.y = y;
    TERN__TRY(tern_embedding_forward(c, &table, 2 * n, ids, w->rows));
    TERN__TRY(tern_linear_forward(c, &l->key, 2 * n, w->rows, w->key, w->key_kept));
    TERN__TRY(tern_linear_forward(c, &l->value, 2 * n, w->rows, w->value, w->value_kept));
    return tern_gate(c, &a);
}

TERN_API tern_result tern_ngram_forward(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h,
                                        float *y, void *saved)
{
    tern__ngram_work w;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "ids", ids, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "h", h, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "y", y, 4));
    if (saved) TERN__TRY(tern__check_pointer(&c->run, "ngram", "saved", saved, 4));
    TERN__TRY(tern__ngram_enter(c, l, n, saved, &w));
    result = tern__ngram_run(c, l, n, ids, h, y, &w);
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}

#ifndef TERNARY_NO_TRAINING
static tern_result tern__ngram_back(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h, const float *dy,
                                    float *dh, const tern__ngram_work *w)
{
    const tern_embedding table = {l->table};
    tern_gate_args a = tern__ngram_gate(l, n, h, w);
    a.dy = dy;
    a.dh = dh;
    a.dkey = w->dkey;
    a.dvalue = w->dvalue;
    TERN__TRY(tern_gate(c, &a));
    TERN__TRY(tern_linear_backward(c, &l->key, 2 * n, w->rows, w->key_kept, w->dkey, w->drows));
    TERN__TRY(tern_linear_backward(c, &l->value, 2 * n, w->rows, w->value_kept, w->dvalue, w->more));
    TERN__TRY(tern__apply(c, TERN_MAP_ADD, 2 * n * l->table->cols, w->drows, w->more, w->drows));
    return tern_embedding_backward(c, &table, 2 * n, ids, w->drows);
}

TERN_API tern_result tern_ngram_backward(tern_context *c, const tern_ngram *l, int64_t n, const int32_t *ids, const float *h,
                                         const void *saved, const float *dy, float *dh)
{
    tern__ngram_work w;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "ids", ids, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "h", h, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "saved", saved, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "dy", dy, 4));
    TERN__TRY(tern__check_pointer(&c->run, "ngram", "dh", dh, 4));
    TERN__TRY(tern__check_ngram(c, l, n));
    TERN__TRY(tern__check_gradients(c, &l->key));
    TERN__TRY(tern__check_gradients(c, &l->value));
    if (tern__floats(l->table, TERN_GRAD)) TERN__TRY(tern__check_buffer(c, l->table, TERN_GRAD, l->table->rows * l->table->cols));
    TERN__TRY(tern__ngram_enter(c, l, n, (void *)(uintptr_t)saved, &w));
    result = tern__ngram_back(c, l, n, ids, h, dy, dh, &w);
    c->scratch_base -= (size_t)w.scratch_bytes;
    return result;
}
#endif

/* -- vector quantization -- */

static tern_result tern__check_vq(tern_context *c, const tern_vq *l, int64_t n)
{
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, l && l->codes, TERN_E_ARGUMENT, "vq: the layer or its codes are NULL");
    TERN__TRY(tern__check_ready(c, l->codes));
    TERN__REQUIRE(&c->run, tern__finite(l->commitment) && l->commitment >= 0, TERN_E_ARGUMENT,
                  "vq: the commitment is negative or not finite");
    TERN__REQUIRE(&c->run, l->codes->rows <= INT32_MAX, TERN_E_OVERFLOW, "vq: %d codes are beyond int32", l->codes->rows);
    return tern__check_count(&c->run, "vq", "n", n, l->codes->cols);
}

TERN_API tern_result tern_vq_need(tern_context *c, const tern_vq *l, int64_t n, tern_need *out)
{
    int64_t values;
    TERN__TRY(tern__check_vq(c, l, n));
    TERN__REQUIRE(&c->run, out, TERN_E_ARGUMENT, "vq: out is NULL");
    values = l->codes->rule == TERN_DENSE ? 0 : tern__mul(l->codes->rows, l->codes->cols);
    out->saved = 0;
    out->scratch = (size_t)tern__scratch_piece(4 * tern__max(values, n * l->codes->cols));
    return TERN_OK;
}

TERN_API tern_result tern_vq_forward(tern_context *c, const tern_vq *l, int64_t n, const float *x, int32_t *ids, float *y, float *distance)
{
    tern_embedding table;
    tern_nearest_args a;
    tern_need need = TERN_ZERO;
    TERN__TRY(tern_vq_need(c, l, n, &need));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "ids", ids, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "y", y, 4));
    if (distance) TERN__TRY(tern__check_pointer(&c->run, "vq", "distance", distance, 4));
    TERN__TRY(tern__begin_scratch(c, "vq", n, need.scratch));
    memset(&a, 0, sizeof a);
    a.n = n;
    a.rows = l->codes->rows;
    a.cols = l->codes->cols;
    a.x = x;
    a.w = tern__floats(l->codes, TERN_SHADOW);
    if (l->codes->rule != TERN_DENSE) { /* distances to what is gathered, not to a shadow */
        tern_unpack_args u;
        memset(&u, 0, sizeof u);
        u.m = tern_param_matrix(l->codes);
        u.count = a.rows;
        a.w = u.values = (float *)tern__take(c, a.rows * a.cols * 4);
        TERN__TRY(tern_unpack(c, &u));
    }
    a.ids = ids;
    a.distance = distance;
    TERN__TRY(tern_nearest(c, &a));
    table.w = l->codes;
    return tern_embedding_forward(c, &table, n, ids, y);
}

#ifndef TERNARY_NO_TRAINING
TERN_API tern_result tern_vq_backward(tern_context *c, const tern_vq *l, int64_t n, const float *x, const int32_t *ids, const float *y,
                                      float scale, const float *dy, float *dx)
{
    tern_embedding table;
    tern_need need = TERN_ZERO;
    int64_t count;
    float *apart;
    TERN__TRY(tern_vq_need(c, l, n, &need));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "ids", ids, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "y", y, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "dy", dy, 4));
    if (dx) TERN__TRY(tern__check_pointer(&c->run, "vq", "dx", dx, 4));
    TERN__REQUIRE(&c->run, tern__finite(scale), TERN_E_ARGUMENT, "vq: scale is not finite");
    TERN__TRY(tern__begin_scratch(c, "vq", n, need.scratch));
    count = n * l->codes->cols;
    apart = (float *)tern__take(c, count * 4);
    TERN__TRY(tern__add_scaled(c, count, y, -1.0f, x, apart));
    if (dx) TERN__TRY(tern__add_scaled(c, count, dy, -2.0f * l->commitment * scale, apart, dx));
    TERN__TRY(tern__add_scaled(c, count, apart, 2.0f * scale, NULL, apart));
    table.w = l->codes;
    return tern_embedding_backward(c, &table, n, ids, apart);
}

TERN_API tern_result tern_vq_count(tern_context *c, const tern_vq *l, int64_t n, const int32_t *ids, int64_t *used)
{
    tern_result result;
    int32_t *host;
    int64_t i;
    TERN__TRY(tern__check_vq(c, l, n));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "ids", ids, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "used", used, TERN__INT64_ALIGN));
    host = (int32_t *)tern__host_alloc(&c->run.allocator, (size_t)n * sizeof(int32_t));
    TERN__REQUIRE(&c->run, host, TERN_E_MEMORY, "vq: no memory for %d ids", n);
    result = tern_copy(c, host, ids, (size_t)n * sizeof(int32_t), TERN_TO_HOST);
    for (i = 0; result == TERN_OK && i < n; i++)
        if (host[i] >= 0 && host[i] < l->codes->rows) used[host[i]]++;
    tern__host_free(&c->run.allocator, host);
    return result;
}

TERN_API tern_result tern_vq_revive(tern_context *c, const tern_vq *l, int64_t n, const float *x, const int64_t *used, uint64_t seed,
                                    uint32_t step, int64_t *count)
{
    int64_t i, revived = 0;
    TERN__TRY(tern__check_vq(c, l, n));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "x", x, 4));
    TERN__TRY(tern__check_pointer(&c->run, "vq", "used", used, TERN__INT64_ALIGN));
    TERN__TRY(tern__check_buffer(c, l->codes, TERN_SHADOW, l->codes->rows * l->codes->cols));
    TERN__REQUIRE(&c->run, tern__buffer_type(l->codes, TERN_SHADOW) == TERN_F32 && !l->codes->rotate, TERN_E_UNSUPPORTED,
                  "%s: codes are revived in an F32 shadow without rotation", l->codes->name);
    for (i = 0; i < l->codes->rows; i++) {
        uint32_t random[4];
        if (used[i]) continue;
        tern__philox(seed, (uint64_t)i, step, 0, random);
        TERN__TRY(tern_copy(c, tern__floats(l->codes, TERN_SHADOW) + i * l->codes->cols,
                            x + (int64_t)(((uint64_t)random[0] << 32 | random[1]) % (uint64_t)n) * l->codes->cols,
                            (size_t)l->codes->cols * sizeof(float), TERN_ON_DEVICE));
        revived++;
    }
    if (count) *count = revived;
    return revived && l->codes->rule != TERN_DENSE ? tern_param_set(c, l->codes, TERN_TYPE_DEFAULT, NULL) : TERN_OK;
}
#endif
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-19] Optimizers and shadow weights
   What enters: gradients. What leaves: updated shadows, and trits ternarized and packed from them.
   ------------------------------------------------------------------------------------------------ */

#ifndef TERNARY_NO_TRAINING
/* Whether a step updates a parameter: a dead zone's bias follows from its weights. */
static int32_t tern__is_trained(const tern_model *m, const tern_param *p)
{
    int32_t i;
    for (i = 0; i < m->count; i++) if (m->items[i]->dead == p) return 0;
    return p->buffer[TERN_GRAD].data != NULL;
}

/* The gradient of the dead zone's bias goes to the weights that it sums. */
static tern_result tern__spread_dead(tern_context *c, const tern_param *p)
{
    tern_dead_zone_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(p);
    a.lambda = p->lambda;
    a.dbias = tern__floats(p->dead, TERN_GRAD);
    a.dw = tern__floats(p, TERN_GRAD);
    TERN__TRY(tern_dead_zone(c, &a));
    return tern__zero(c, p->rows, tern__floats(p->dead, TERN_GRAD));
}

/* The learned scale of a parameter that trains, where it has a gradient. */
static tern_param *tern__trained_alpha(const tern_param *p)
{
    return tern__is_learned(p->rule) && p->buffer[TERN_GRAD].data && p->alpha && p->alpha->buffer[TERN_GRAD].data ? p->alpha : NULL;
}

/* The update of one parameter. */
static tern_optimize_args tern__step_args(const tern_model *m, int32_t i, const tern_step *s, const float *norm2)
{
    const tern_param *p = m->items[i];
    tern_optimize_args a;
    a.kind = s->optimizer;
    a.count = p->rows * p->cols;
    a.type = tern__buffer_type(p, TERN_SHADOW);
    a.w = p->buffer[TERN_SHADOW].data;
    a.nearest = (p->flags & TERN_NEAREST) != 0;
    a.grad = tern__floats(p, TERN_GRAD);
    a.moment_type = tern__buffer_type(p, TERN_MOMENT1);
    a.moment1 = p->buffer[TERN_MOMENT1].data;
    a.moment2 = p->buffer[TERN_MOMENT2].data;
    a.norm2 = norm2;
    a.clip = s->clip;
    a.rate = s->rate;
    a.beta1 = s->beta1 > 0.0f ? s->beta1 : 0.9f;
    a.beta2 = s->beta2 > 0.0f ? s->beta2 : 0.99f;
    a.eps = s->eps > 0.0f ? s->eps : 1e-8f;
    a.decay = p->flags & TERN_NO_DECAY ? 0.0f : s->decay;
    a.seed = s->seed;
    a.step = s->step;
    a.stream = (uint32_t)i;
    return a;
}

/* The step of a parameter with an accumulator. */
static tern_flip_args tern__step_flip(const tern_model *m, int32_t i, const tern_step *s, const float *sum_abs)
{
    const tern_param *p = m->items[i];
    tern_flip_args a;
    memset(&a, 0, sizeof a);
    a.m = tern_param_matrix(p);
    a.rule = s->flip;
    a.grad = tern__floats(p, TERN_GRAD);
    a.accum = (int8_t *)p->buffer[TERN_ACCUM].data;
    a.votes = (int8_t *)p->buffer[TERN_VOTES].data;
    a.sum_abs = sum_abs;
    a.push = s->push;
    a.sign_step = s->sign_step;
    a.theta = tern__theta(p);
    a.scale_step = a.votes ? s->scale_step : 0;
    a.scale_theta = s->scale_theta ? s->scale_theta : 32;
    a.scale_push = s->scale_push;
    a.seed = s->seed;
    a.step = s->step;
    a.stream = (uint32_t)i;
    a.counts = s->flips;
    return a;
}

static tern_result tern__check_step_flip(tern_context *c, const tern_model *m, int32_t i, const tern_step *s)
{
    const tern_param *p = m->items[i];
    const tern_flip_args a = tern__step_flip(m, i, s, (const float *)(const void *)c->scratch);
    TERN__TRY(tern__check_buffer(c, p, TERN_GRAD, p->rows * p->cols));
    TERN__TRY(tern__check_buffer(c, p, TERN_ACCUM, p->rows * p->cols));
    if (a.votes) TERN__TRY(tern__check_buffer(c, p, TERN_VOTES, tern__buffer_count(p, TERN_VOTES)));
    return tern__check_flip(&c->run, &a);
}

/* Everything a step will need, before the first parameter or gradient changes. */
static tern_result tern__check_step(tern_context *c, const tern_model *m, const tern_step *s)
{
    int32_t i, b, trained = 0;
    TERN__TRY(tern__check_model(c, m));
    TERN__TRY(tern__check_sync(c, m));
    TERN__REQUIRE(&c->run, s, TERN_E_ARGUMENT, "step: the desc is NULL");
    /* Undecayed parameters would not notice. */
    TERN__REQUIRE(&c->run, tern__finite(s->decay), TERN_E_ARGUMENT, "step: the decay is out of range");
    for (i = 0; i < m->count; i++) {
        const tern_param *p = m->items[i];
        tern_optimize_args a;
        if (!tern__is_trained(m, p)) continue;
        trained++;
        TERN__TRY(tern__check_ready(c, p));
        if (tern__is_integer(p)) {
            TERN__TRY(tern__check_step_flip(c, m, i, s));
            continue;
        }
        if (p->dead) {
            TERN__TRY(tern__check_dense_of(c, p->dead, p, "dead zone", 1, p->rows));
            TERN__TRY(tern__check_buffer(c, p->dead, TERN_GRAD, p->rows));
        }
        for (b = TERN_SHADOW; b <= TERN_MOMENT2; b++)
            if (p->buffer[b].data || b <= TERN_GRAD || s->optimizer == TERN_ADAMW)
                TERN__TRY(tern__check_buffer(c, p, b, p->rows * p->cols));
        TERN__REQUIRE(&c->run, s->optimizer != TERN_ADAMW || tern__buffer_type(p, TERN_MOMENT1) == tern__buffer_type(p, TERN_MOMENT2),
                      TERN_E_ARGUMENT, "%s: its moments are of types %d and %d", p->name, (int64_t)tern__buffer_type(p, TERN_MOMENT1),
                      (int64_t)tern__buffer_type(p, TERN_MOMENT2));
        TERN__TRY(tern__check_alpha(c, p));
        for (b = 0; tern__trained_alpha(p) && b < m->count && m->items[b] != p->alpha;) b++;
        TERN__REQUIRE(&c->run, !tern__trained_alpha(p) || b < m->count, TERN_E_MISSING,
                      "%s: its alpha has a gradient and is not in the model", p->name);
        a = tern__step_args(m, i, s, s->norm2);
        TERN__TRY(tern__check_optimize(&c->run, &a));
    }
    TERN__REQUIRE(&c->run, trained > 0, TERN_E_MISSING, "step: no parameter has a gradient");
    return TERN_OK;
}

/* Gradients of learned scales from those of the weights. */
static tern_result tern__step_scales(tern_context *c, const tern_model *m)
{
    int32_t i;
    for (i = 0; i < m->count; i++) {
        const tern_param *p = m->items[i];
        tern_scale_grad_args a;
        if (!tern__trained_alpha(p)) continue;
        a.m = tern_param_matrix(p);
        a.rule = p->rule;
        a.type = tern__buffer_type(p, TERN_SHADOW);
        a.w = p->buffer[TERN_SHADOW].data;
        a.dw = tern__floats(p, TERN_GRAD);
        a.dalpha = tern__floats(p->alpha, TERN_GRAD);
        a.plain = (p->flags & TERN_PLAIN_ALPHA) != 0;
        TERN__TRY(tern_scale_grad(c, &a));
    }
    return TERN_OK;
}

/* Those that a step has moved, and who shares a scale with one of them. */
static tern__source tern__source_of_step(const void *of, int32_t i)
{
    const tern_model *m = (const tern_model *)of;
    tern__source s = tern__source_of_model(of, i);
    int32_t j, moved = s.p && s.p->buffer[TERN_GRAD].data;
    for (j = 0; s.p && s.p->sync && !moved && j < m->count; j++)
        moved = m->items[j]->sync == s.p->sync && m->items[j]->buffer[TERN_GRAD].data;
    if (!moved) s.p = NULL;
    return s;
}

/* Trits from the shadows, by learned scales that have made their step too; sets of sync as a whole. */
static tern_result tern__step_ternarize(tern_context *c, const tern_model *m, const tern_step *s)
{
    tern__sources all = tern__sources_of_model(m);
    tern__step_noise noise;
    int32_t i;
    noise.seed = s->seed;
    noise.step = s->step;
    all.at = tern__source_of_step;
    for (i = 0; i < m->count; i++) {
        const tern__source source = all.at(m, i);
        if (!source.p) continue;
        source.p->flags &= ~(uint32_t)TERN_KEEP_SCALES;
        if (!source.p->sync) TERN__TRY(tern__source_ternarize(c, &source, i, &noise, NULL));
    }
    return tern__sync_sets(c, &all, &noise);
}

/* The mean of |G| goes by way of the second float of scratch. */
static tern_result tern__flip_param(tern_context *c, const tern_model *m, int32_t i, const tern_step *s)
{
    float *sum_abs = (float *)(void *)c->scratch + 1;
    const tern_flip_args a = tern__step_flip(m, i, s, sum_abs);
    tern_sum_args sum;
    sum.kind = TERN_SUM_ABS;
    sum.type = TERN_F32;
    sum.count = a.m.rows * a.m.cols;
    sum.x = a.grad;
    sum.y = sum_abs;
    sum.add = 0;
    TERN__TRY(tern_sum(c, &sum));
    return tern_flip(c, &a);
}

TERN_API tern_result tern_model_step(tern_context *c, const tern_model *m, const tern_step *s)
{
    float *norm2;
    int32_t i, first = 1;
    TERN__TRY(tern__check_step(c, m, s));
    TERN__TRY(tern__step_scales(c, m));
    norm2 = s->norm2 ? s->norm2 : (float *)(void *)c->scratch;
    for (i = 0; i < m->count; i++) {
        tern_sum_args a;
        if (!tern__is_trained(m, m->items[i]) || tern__is_integer(m->items[i])) continue;
        if (m->items[i]->dead) TERN__TRY(tern__spread_dead(c, m->items[i]));
        a.kind = TERN_SUM_SQUARES;
        a.count = m->items[i]->rows * m->items[i]->cols;
        a.type = TERN_F32;
        a.x = tern__floats(m->items[i], TERN_GRAD);
        a.y = norm2;
        a.add = !first;
        first = 0;
        TERN__TRY(tern_sum(c, &a));
    }
    if (first && s->norm2) TERN__TRY(tern__zero(c, 1, s->norm2));
    for (i = 0; i < m->count; i++) {
        const tern_optimize_args a = tern__step_args(m, i, s, norm2);
        if (!tern__is_trained(m, m->items[i])) continue;
        if (tern__is_integer(m->items[i])) TERN__TRY(tern__flip_param(c, m, i, s));
        else TERN__TRY(tern_optimize(c, &a));
    }
    return tern__step_ternarize(c, m, s);
}

TERN_API tern_result tern_schedule_rate(tern_context *c, const tern_schedule *s, uint32_t step, float *rate)
{
    int64_t fall; /* the last step before the rate goes down */
    float t, sine, left;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, s && rate, TERN_E_ARGUMENT, "schedule: the desc or rate is NULL");
    TERN__REQUIRE(&c->run, (int32_t)s->kind >= 0 && s->kind <= TERN_LINEAR, TERN_E_ARGUMENT,
                  "schedule: kind %d is unknown", (int64_t)s->kind);
    TERN__REQUIRE(&c->run, s->floor >= 0.0f && s->floor <= s->peak && tern__finite(s->peak), TERN_E_ARGUMENT,
                  "schedule: peak and floor must be finite, the floor from 0 to the peak");
    TERN__REQUIRE(&c->run, step > 0, TERN_E_ARGUMENT, "schedule: steps are counted from 1");
    fall = s->kind == TERN_WSD ? (int64_t)s->steps - s->decay : s->warmup;
    TERN__REQUIRE(&c->run, s->warmup <= fall && fall <= s->steps, TERN_E_ARGUMENT,
                  "schedule: %d steps have no room for %d of warm-up and %d of decay", (int64_t)s->steps, (int64_t)s->warmup,
                  s->kind == TERN_WSD ? (int64_t)s->decay : 0);
    if (step < s->warmup) *rate = s->peak * ((float)step / (float)s->warmup);
    else if (step <= fall) *rate = s->peak;
    else if (step >= s->steps) *rate = s->floor;
    else {
        t = (float)(step - fall) / (float)(s->steps - fall);
        if (s->kind == TERN_COSINE) {
            tern__sincos(t * 1.57079633f, &sine, &left);
            left = left * left; /* (1 + cos 2x) / 2 = cos^2 x loses nothing near its zero */
        } else left = 1.0f - (s->kind == TERN_WSD ? tern__sqrt(t) : t);
        *rate = s->floor + (s->peak - s->floor) * left;
    }
    return TERN_OK;
}
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-20] True-ternary training
   What enters: models whose parameters have accumulators. What leaves: what of them is float, and the step of the sign
   rule. The rules themselves are tern_flip in [TERN-14], which [TERN-19] calls; the integer backward is in [TERN-15].
   ------------------------------------------------------------------------------------------------ */

static const char *const tern__type_names[] = {"none", "f32", "bf16", "f16", "i8", "pow2", "log", "2bit", "base3"}; /* as tern_type */

TERN_API tern_result tern_model_strict(tern_context *c, const tern_model *m)
{
    int32_t i, b;
    TERN__TRY(tern__check_model(c, m));
    for (i = 0; i < m->count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_param *p = m->items[i];
            TERN__REQUIRE(&c->run, !p->buffer[b].data || !tern__is_float(tern__buffer_type(p, b)) || tern__lasts(p, b) != TERN__TRAINABLE,
                          TERN_E_ARGUMENT, "%s: its %s is %d trainable floats (%s)", p->name, tern__buffer_names[b],
                          (int64_t)p->buffer[b].count, tern__type_names[tern__buffer_type(p, b)]);
        }
    return TERN_OK;
}

static size_t tern__print(char *out, size_t size, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    tern__format(out, size, format, list);
    va_end(list);
    return strlen(out);
}

TERN_API tern_result tern_model_list(tern_context *c, const tern_model *m, const tern_sink *sink)
{
    static const char *const lasting[] = {"trainable", "persistent", "transient"};
    char line[256];
    int32_t i, b;
    TERN__TRY(tern__check_model(c, m));
    TERN__REQUIRE(&c->run, sink && sink->write, TERN_E_ARGUMENT, "list: the sink or its write is NULL");
    for (i = 0; i < m->count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_param *p = m->items[i];
            const tern_type type = tern__buffer_type(p, b);
            const int64_t count = (int64_t)p->buffer[b].count;
            size_t bytes;
            if (!p->buffer[b].data) continue;
            bytes = tern__print(line, sizeof line, "%s, %s, %s, %d, %d, %s\n", p->name, tern__buffer_names[b], tern__type_names[type],
                                b == TERN_TRITS ? p->rows * p->cols : count, count * tern__type_bytes(type), lasting[tern__lasts(p, b)]);
            TERN__REQUIRE(&c->run, sink->write(sink->user, line, bytes) == 0, TERN_E_IO,
                          "list: the sink refused the %s of %s", tern__buffer_names[b], p->name);
        }
    return TERN_OK;
}

#ifndef TERNARY_NO_TRAINING
/* A loss in 2^-16, from 0 to 2^30. */
static int64_t tern__fixed_loss(float loss)
{
    return loss <= 0.0f ? 0 : loss >= 1073741824.0f ? (int64_t)1 << 46 : (int64_t)(loss * 65536.0f);
}

TERN_API tern_result tern_sign_step(tern_context *c, tern_pace *p, float loss, int32_t *step)
{
    int64_t first, most, shift, fixed, change;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, p && step, TERN_E_ARGUMENT, "sign_step: the pace or step is NULL");
    first = p->first ? p->first : 4;
    most = p->most ? p->most : 16;
    shift = p->shift ? p->shift : 6;
    TERN__REQUIRE(&c->run, first > 0 && first <= 127 && most > 0 && most <= 127 && shift > 0 && shift <= 30 && p->mean >= 0
                           && p->mean <= (int64_t)1 << 46, TERN_E_ARGUMENT,
                  "sign_step: first %d, most %d, shift %d or mean %d is out of range", first, most, shift, p->mean);
    *step = 0;
    if (!tern__finite(loss)) return TERN_OK;
    fixed = tern__fixed_loss(loss);
    change = fixed - p->mean;
    if (p->mean == 0) p->mean = fixed;
    else p->mean += tern__floor_shift(change, (int32_t)shift);
    *step = (int32_t)(p->mean > 0 ? tern__max(1, tern__min(most, (2 * first * fixed + p->mean) / (2 * p->mean))) : 1);
    return TERN_OK;
}
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-21] Model files
   What enters: parameters, or the bytes of a file. What leaves: bytes through the caller's sink, or
   filled parameters. The container is GGUF v3, little-endian: a header, keys, the names, shapes and
   places of tensors, then their data, each at a multiple of 32. The native form has the keys
   ternary.hash (first, so that its place is fixed: FNV-1a of the whole file with the hash as zero) and
   ternary.NAME.rule, .rows, .cols, .grain and (of a rotated matrix) .rotate, and these tensors:
     NAME.trits    I8, base-3: byte i holds trits 5i .. 5i+4 of the row-major matrix, the first as the
                   lowest digit, as code trit + 1; the digits after the last trit are 1
     NAME.scale    F32, F16, I8 exponents (-128: zero) or I16 logarithms (-32768: zero), [rows, groups]
     NAME          F32: the values of a dense parameter
     NAME.shadow, NAME.moment1, NAME.moment2 (F32 or BF16), where they were asked for
     NAME.accum    I8 [rows, cols], with the key .theta; NAME.votes I8, one for each stored scale, in panel order [TERN-8]
   ------------------------------------------------------------------------------------------------ */

#ifndef TERNARY_NO_FILES

enum { TERN__GGML_F32 = 0, TERN__GGML_F16 = 1, TERN__GGML_I8 = 24, TERN__GGML_I16 = 25, TERN__GGML_BF16 = 30 };
enum { TERN__GGUF_UINT32 = 4, TERN__GGUF_INT32 = 5, TERN__GGUF_STRING = 8, TERN__GGUF_ARRAY = 9, TERN__GGUF_UINT64 = 10 };
enum {
    TERN__ALIGNMENT = 32,
    TERN__HASH_AT = 48,     /* the header's 24 bytes, then length, text and type of the first key */
    TERN__MAX_NAME = 55,    /* GGUF allows a tensor 63 bytes; ".moment1" takes 8 of them */
    TERN__MAX_BYTE = 242,   /* five trits of 1 in base 3 */
    TERN__ALL_BUFFERS = (1 << TERN_BUFFERS) - 1
};

static const char *const tern__rule_names[] = {"absmean", "absmean_sigma", "twn", "lsq", "seq", "given", "dense"};

static void tern__put_number(uint8_t *p, uint64_t value, int32_t bytes)
{
    for (; bytes--; value >>= 8) *p++ = (uint8_t)value;
}

static uint64_t tern__get_number(const uint8_t *p, int32_t bytes)
{
    uint64_t value = 0;
    while (bytes--) value = value << 8 | p[bytes];
    return value;
}

/* Elements of 1, 2 or 4 bytes in place from the host's order to little-endian or back: the same swap. */
static void tern__little_endian(uint8_t *p, int64_t count, int32_t width)
{
    for (; count--; p += width) {
        uint16_t half;
        uint32_t word;
        if (width == 4) { memcpy(&word, p, 4); tern__put_number(p, word, 4); }
        if (width == 2) { memcpy(&half, p, 2); tern__put_number(p, half, 2); }
    }
}

/* -- ggml's blocks: trits of one scale d (as f16) -- */

/* Five trits at a stride, the first as the highest digit, as a fraction of 243 in 1/256, rounded up:
   multiplying by 3 then carries the digits out one by one. Trits from n on are absent digits 0. */
static uint8_t tern__tq1_byte(const int8_t *t, int32_t stride, int32_t n)
{
    int32_t i, v = 0;
    for (i = 0; i < 5; i++) v = 3 * v + (i < n ? t[i * stride] + 1 : 0);
    return (uint8_t)((256 * v + 242) / 243);
}

static void tern__encode_tq1_0(const int8_t *t, uint16_t d, uint8_t *out)
{
    int32_t i;
    for (i = 0; i < 32; i++) *out++ = tern__tq1_byte(t + i, 32, 5);
    for (i = 0; i < 16; i++) *out++ = tern__tq1_byte(t + 160 + i, 16, 5);
    for (i = 0; i < 4; i++) *out++ = tern__tq1_byte(t + 240 + i, 4, 4);
    tern__put_number(out, d, 2);
}

/* Four trits at a stride as 2-bit codes, the first lowest. */
static uint8_t tern__tq2_byte(const int8_t *t, int32_t stride)
{
    return (uint8_t)((t[0] + 1) | (t[stride] + 1) << 2 | (t[2 * stride] + 1) << 4 | (t[3 * stride] + 1) << 6);
}

static void tern__encode_tq2_0(const int8_t *t, uint16_t d, uint8_t *out)
{
    int32_t i;
    for (i = 0; i < 64; i++) *out++ = tern__tq2_byte(t + i / 32 * 128 + i % 32, 32);
    tern__put_number(out, d, 2);
}

static void tern__encode_q2_0(const int8_t *t, uint16_t d, uint8_t *out)
{
    int32_t i;
    tern__put_number(out, d, 2);
    for (i = 0; i < 16; i++) out[2 + i] = tern__tq2_byte(t + 4 * i, 1);
}

enum { TERN__BLOCK_BYTES = 66 }; /* the largest */
typedef struct tern__block {
    tern_export form;
    const char *name;
    int32_t weights, bytes;
    void (*encode)(const int8_t *t, uint16_t d, uint8_t *out);
} tern__block;
static const tern__block tern__blocks[] = {
    {TERN_TQ1_0, "TQ1_0", 256, 54, tern__encode_tq1_0},
    {TERN_TQ2_0, "TQ2_0", 256, 66, tern__encode_tq2_0},
    {TERN_Q2_0, "Q2_0", 64, 18, tern__encode_q2_0}
};

/* -- what a file holds of a parameter -- */

/* Trits and scales, or dense values, always; shadow and moments where the mask asks and they exist. */
static int32_t tern__is_stored(const tern_param *p, int32_t which, int32_t mask)
{
    if (which <= TERN_SCALES) return p->rule != TERN_DENSE;
    if (which == TERN_SHADOW && p->rule == TERN_DENSE) return 1;
    return which != TERN_GRAD && (mask >> which & 1) && p->buffer[which].data;
}

static const char *const tern__suffixes[TERN_BUFFERS] = {".trits", ".scale", ".shadow", "", ".moment1", ".moment2", ".accum", ".votes"};

static const char *tern__suffix(const tern_param *p, int32_t which)
{
    return which == TERN_SHADOW && p->rule == TERN_DENSE ? "" : tern__suffixes[which];
}

typedef struct tern__tensor { int32_t type; int64_t dims[2], bytes; } tern__tensor; /* dims innermost first */

/* A tensor of the native form. */
static tern__tensor tern__tensor_of(const tern_param *p, int32_t which)
{
    const tern_type type = tern__buffer_type(p, which);
    tern__tensor t;
    t.dims[0] = p->cols;
    t.dims[1] = p->rows;
    t.type = type == TERN_BF16 ? TERN__GGML_BF16 : type == TERN_F16 ? TERN__GGML_F16 : TERN__GGML_F32;
    if (which == TERN_TRITS) {
        t.dims[0] = tern__ceil_div(p->rows * p->cols, 5);
        t.dims[1] = 1;
        t.type = TERN__GGML_I8;
    } else if (which == TERN_SCALES) {
        const tern_matrix m = tern_param_matrix(p);
        t.dims[0] = tern__shape_of(&m).groups;
        if (p->grain == TERN_PER_TENSOR) t.dims[1] = 1;
        if (type == TERN_POW2) t.type = TERN__GGML_I8;
        if (type == TERN_LOG) t.type = TERN__GGML_I16;
    } else if (which == TERN_VOTES) {
        t.dims[0] = tern__buffer_count(p, TERN_VOTES);
        t.dims[1] = 1;
    }
    if (type == TERN_I8) t.type = TERN__GGML_I8;
    t.bytes = t.dims[0] * t.dims[1] * (which == TERN_TRITS ? 1 : tern__type_bytes(type));
    return t;
}

static int32_t tern__scale_ok(float scale) { return tern__finite(scale) && scale >= 0.0f; }

static tern_result tern__check_block(tern_context *c, const tern_param *p, const tern__block *b)
{
    TERN__REQUIRE(&c->run, !p->rotate, TERN_E_UNSUPPORTED, "%s is rotated, which %s cannot say", p->name, b->name);
    TERN__REQUIRE(&c->run, p->cols % b->weights == 0, TERN_E_SHAPE,
                  "%s: %d columns are not whole %s blocks of %d", p->name, p->cols, b->name, (int64_t)b->weights);
    TERN__REQUIRE(&c->run, p->grain <= 0 || p->grain % b->weights == 0, TERN_E_SHAPE,
                  "%s: groups of %d are not whole %s blocks of %d", p->name, (int64_t)p->grain, b->name, (int64_t)b->weights);
    return TERN_OK;
}

/* The names of tensors must differ: "a.scale" may be a gain or the scales of "a". */
static tern_result tern__check_names(tern_context *c, const tern_model *m)
{
    int32_t i, j, b;
    for (i = 0; i < m->count; i++) {
        const char *name = m->items[i]->name;
        const size_t length = strlen(name);
        TERN__REQUIRE(&c->run, length > 0, TERN_E_ARGUMENT, "parameter %d of the model has no name", (int64_t)i);
        TERN__REQUIRE(&c->run, length <= TERN__MAX_NAME, TERN_E_ARGUMENT,
                      "%s: a name of %d bytes exceeds %d, the limit in files", name, (int64_t)length, (int64_t)TERN__MAX_NAME);
        for (j = 0; j < m->count; j++) {
            const char *other = m->items[j]->name;
            if (i == j || strncmp(name, other, length) != 0) continue;
            TERN__REQUIRE(&c->run, other[length], TERN_E_ARGUMENT, "two parameters of the model have the name %s", name);
            for (b = 0; b < TERN_BUFFERS; b++)
                TERN__REQUIRE(&c->run, m->items[j]->rule != TERN_DENSE || strcmp(other + length, tern__suffixes[b]) != 0, TERN_E_ARGUMENT,
                              "%s would also be the name of a tensor of %s", other, name);
        }
    }
    return TERN_OK;
}

static tern_result tern__check_file_model(tern_context *c, const tern_model *m, int32_t mask)
{
    int32_t i, b;
    TERN__TRY(tern__check_model(c, m));
    TERN__TRY(tern__check_names(c, m));
    for (i = 0; i < m->count; i++) {
        TERN__TRY(tern__check_ready(c, m->items[i]));
        for (b = TERN_SHADOW; b < TERN_BUFFERS; b++)
            if (tern__is_stored(m->items[i], b, mask)) TERN__TRY(tern__check_buffer(c, m->items[i], b, tern__buffer_count(m->items[i], b)));
    }
    return TERN_OK;
}

/* The most trits in a chunk of rows; 0 where all parameters are dense. */
static int64_t tern__chunk_trits(const tern_model *m)
{
    int64_t trits = 0;
    int32_t i;
    for (i = 0; i < m->count; i++)
        if (m->items[i]->rule != TERN_DENSE) trits = tern__max(trits, tern__chunk_rows(m->items[i], 1) * m->items[i]->cols);
    return trits;
}

/* -- writing: the same emitter runs twice, first for the hash and the checks, then into the sink -- */

typedef struct tern__writer {
    tern_context *c;
    const tern_model *m;
    const tern__block *block; /* of an export; NULL: the native form */
    int32_t mask, failed;
    const tern_sink *sink;    /* NULL: the first run */
    uint64_t hash;
    int64_t at;
    float max_error;
    tern__reader reader;      /* its host memory also takes chunks of floats */
    size_t used;
    uint8_t out[1024];
} tern__writer;

static void tern__flush(tern__writer *w)
{
    if (!w->sink) w->hash = tern__fnv(w->hash, w->out, w->used);
    else if (w->used && !w->failed) w->failed = w->sink->write(w->sink->user, w->out, w->used) != 0;
    w->used = 0;
}

static void tern__emit_bytes(tern__writer *w, const void *data, size_t bytes)
{
    const uint8_t *p = (const uint8_t *)data;
    w->at += (int64_t)bytes;
    while (bytes > 0) {
        const size_t room = sizeof w->out - w->used, n = bytes < room ? bytes : room;
        memcpy(w->out + w->used, p, n);
        w->used += n;
        p += n;
        bytes -= n;
        if (n == room) tern__flush(w);
    }
}

static void tern__emit_number(tern__writer *w, uint64_t value, int32_t bytes)
{
    uint8_t p[8];
    tern__put_number(p, value, bytes);
    tern__emit_bytes(w, p, (size_t)bytes);
}

static void tern__emit_padding(tern__writer *w)
{
    while (w->at % TERN__ALIGNMENT) tern__emit_number(w, 0, 1);
}

/* A string of three pieces. */
static void tern__emit_string(tern__writer *w, const char *a, const char *b, const char *c)
{
    tern__emit_number(w, strlen(a) + strlen(b) + strlen(c), 8);
    tern__emit_bytes(w, a, strlen(a));
    tern__emit_bytes(w, b, strlen(b));
    tern__emit_bytes(w, c, strlen(c));
}

static void tern__emit_key(tern__writer *w, const char *a, const char *b, const char *c, int32_t type)
{
    tern__emit_string(w, a, b, c);
    tern__emit_number(w, (uint64_t)type, 4);
}

static void tern__emit_param_keys(tern__writer *w, const tern_param *p)
{
    tern__emit_key(w, "ternary.", p->name, ".rule", TERN__GGUF_STRING);
    tern__emit_string(w, tern__rule_names[p->rule], "", "");
    tern__emit_key(w, "ternary.", p->name, ".rows", TERN__GGUF_UINT64);
    tern__emit_number(w, (uint64_t)p->rows, 8);
    tern__emit_key(w, "ternary.", p->name, ".cols", TERN__GGUF_UINT64);
    tern__emit_number(w, (uint64_t)p->cols, 8);
    tern__emit_key(w, "ternary.", p->name, ".grain", TERN__GGUF_INT32);
    tern__emit_number(w, (uint64_t)(int64_t)p->grain, 4);
    if (tern__is_stored(p, TERN_ACCUM, w->mask)) {
        tern__emit_key(w, "ternary.", p->name, ".theta", TERN__GGUF_UINT32);
        tern__emit_number(w, (uint64_t)tern__theta(p), 4);
    }
    if (!p->rotate) return;
    tern__emit_key(w, "ternary.", p->name, ".rotate", TERN__GGUF_UINT32);
    tern__emit_number(w, p->rotate, 4);
}

/* An export holds a ternary parameter as one tensor. */
static int32_t tern__is_written(const tern__writer *w, int32_t i, int32_t which)
{
    return tern__is_stored(w->m->items[i], which, w->mask) && !(w->block && which == TERN_SCALES);
}

static tern__tensor tern__written_tensor(const tern__writer *w, const tern_param *p, int32_t which)
{
    tern__tensor t = tern__tensor_of(p, which);
    if (w->block && which == TERN_TRITS) {
        t.type = (int32_t)w->block->form;
        t.dims[0] = p->cols;
        t.dims[1] = p->rows;
        t.bytes = p->rows * (p->cols / w->block->weights) * w->block->bytes;
    }
    return t;
}

static void tern__emit_head(tern__writer *w, uint64_t hash)
{
    uint64_t tensors = 0, keys = 2 + 4 * (uint64_t)w->m->count;
    int64_t offset = 0;
    int32_t i, b;
    for (i = 0; i < w->m->count; i++) {
        keys += (uint64_t)((w->m->items[i]->rotate != 0) + tern__is_stored(w->m->items[i], TERN_ACCUM, w->mask));
        for (b = 0; b < TERN_BUFFERS; b++) tensors += (uint64_t)tern__is_written(w, i, b);
    }
    tern__emit_bytes(w, "GGUF", 4);
    tern__emit_number(w, 3, 4);
    tern__emit_number(w, tensors, 8);
    tern__emit_number(w, w->block ? 3 : keys, 8);
    tern__emit_key(w, "ternary.hash", "", "", TERN__GGUF_UINT64);
    tern__emit_number(w, hash, 8);
    tern__emit_key(w, "general.architecture", "", "", TERN__GGUF_STRING);
    tern__emit_string(w, "ternary", "", "");
    if (w->block) {
        tern__emit_key(w, "general.quantization_version", "", "", TERN__GGUF_UINT32);
        tern__emit_number(w, 2, 4); /* ggml's, of block layouts */
    }
    for (i = 0; !w->block && i < w->m->count; i++) tern__emit_param_keys(w, w->m->items[i]);
    for (i = 0; i < w->m->count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_param *p = w->m->items[i];
            tern__tensor t;
            if (!tern__is_written(w, i, b)) continue;
            t = tern__written_tensor(w, p, b);
            tern__emit_string(w, p->name, w->block ? "" : tern__suffix(p, b), "");
            tern__emit_number(w, 2, 4);
            tern__emit_number(w, (uint64_t)t.dims[0], 8);
            tern__emit_number(w, (uint64_t)t.dims[1], 8);
            tern__emit_number(w, (uint64_t)t.type, 4);
            tern__emit_number(w, (uint64_t)offset, 8);
            offset += tern__ceil_div(t.bytes, TERN__ALIGNMENT) * TERN__ALIGNMENT;
        }
    tern__emit_padding(w);
}

static tern_result tern__emit_trits(tern__writer *w, const tern_param *p)
{
    uint64_t byte = 0, weight = 1;
    int64_t i, j;
    tern__rows row;
    tern__reader_turn(&w->reader, p, tern__chunk_rows(p, 1), 1 << TERN_TRITS);
    for (i = 0; i < p->rows; i++) {
        TERN__TRY(tern__read_row(&w->reader, i, &row));
        for (j = 0; j < p->cols; j++) {
            byte += weight * (uint64_t)(row.trits[j] + 1);
            weight *= 3;
            if (weight < 243) continue;
            tern__emit_number(w, byte, 1);
            byte = 0;
            weight = 1;
        }
    }
    if (weight == 1) return TERN_OK;
    for (; weight < 243; weight *= 3) byte += weight; /* padding is trit 0 */
    tern__emit_number(w, byte, 1);
    return TERN_OK;
}

/* Reads a row and refuses scales that load would refuse. */
static tern_result tern__read_checked(tern__writer *w, const tern_param *p, int64_t i, tern__rows *row)
{
    const tern_matrix m = tern_param_matrix(p);
    int64_t g;
    TERN__TRY(tern__read_row(&w->reader, i, row));
    for (g = 0; g < tern__shape_of(&m).groups; g++)
        TERN__REQUIRE(&w->c->run, tern__scale_ok(row->scales[g]), TERN_E_NONFINITE,
                      "%s: scales[%d][%d] is negative or not finite", p->name, i, g);
    return TERN_OK;
}

static tern_result tern__emit_scales(tern__writer *w, const tern_param *p)
{
    const tern__tensor t = tern__tensor_of(p, TERN_SCALES);
    int64_t i, g;
    tern__rows row;
    tern__reader_turn(&w->reader, p, tern__chunk_rows(p, 1), 1 << TERN_SCALES);
    for (i = 0; i < t.dims[1]; i++) {
        TERN__TRY(tern__read_checked(w, p, i, &row));
        for (g = 0; g < t.dims[0]; g++) {
            if (t.type == TERN__GGML_I8) tern__emit_number(w, (uint64_t)(int64_t)tern__to_pow2(row.scales[g]), 1);
            else if (t.type == TERN__GGML_I16) tern__emit_number(w, (uint64_t)(int64_t)tern__to_log(row.scales[g]), 2);
            else if (t.type == TERN__GGML_F16) tern__emit_number(w, tern__to_f16(row.scales[g]), 2);
            else tern__emit_number(w, tern__bits(row.scales[g]), 4);
        }
    }
    return TERN_OK;
}

/* Elements as they lie in memory. */
static tern_result tern__emit_elements(tern__writer *w, const tern_param *p, int32_t which)
{
    const int32_t width = (int32_t)tern__type_bytes(tern__buffer_type(p, which));
    const int64_t bytes = tern__buffer_count(p, which) * width;
    uint8_t *chunk = (uint8_t *)w->reader.host;
    int64_t at, n;
    for (at = 0; at < bytes; at += n) {
        n = tern__min(bytes - at, TERN__TRANSFER);
        TERN__TRY(tern_copy(w->c, chunk, (const uint8_t *)p->buffer[which].data + at, (size_t)n, TERN_TO_HOST));
        tern__little_endian(chunk, n / width, width);
        tern__emit_bytes(w, chunk, (size_t)n);
    }
    return TERN_OK;
}

/* The scale as f16; keeps the largest relative change. */
static tern_result tern__half_scale(tern__writer *w, const tern_param *p, float scale, uint16_t *half)
{
    float error;
    *half = tern__to_f16(scale);
    TERN__REQUIRE(&w->c->run, tern__finite(tern__from_f16(*half)), TERN_E_OVERFLOW, "%s: a scale exceeds 65504, the largest f16", p->name);
    error = scale > 0.0f ? tern__abs(tern__from_f16(*half) - scale) / scale : 0.0f;
    if (error > w->max_error) w->max_error = error;
    return TERN_OK;
}

static tern_result tern__emit_blocks(tern__writer *w, const tern_param *p)
{
    const tern__block *b = w->block;
    const int64_t group = p->grain > 0 ? p->grain : p->cols;
    uint8_t out[TERN__BLOCK_BYTES];
    uint16_t half;
    int64_t i, j;
    tern__rows row;
    tern__reader_turn(&w->reader, p, tern__chunk_rows(p, 1), 1 << TERN_TRITS | 1 << TERN_SCALES);
    for (i = 0; i < p->rows; i++) {
        TERN__TRY(tern__read_checked(w, p, i, &row));
        for (j = 0; j < p->cols; j += b->weights) {
            TERN__TRY(tern__half_scale(w, p, row.scales[j / group], &half));
            b->encode(row.trits + j, half, out);
            tern__emit_bytes(w, out, (size_t)b->bytes);
        }
    }
    return TERN_OK;
}

static tern_result tern__emit_file(tern__writer *w, uint64_t hash)
{
    int32_t i, b;
    w->hash = TERN__FNV_START;
    w->at = 0;
    tern__emit_head(w, hash);
    for (i = 0; i < w->m->count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_param *p = w->m->items[i];
            if (!tern__is_written(w, i, b)) continue;
            if (b >= TERN_SHADOW) TERN__TRY(tern__emit_elements(w, p, b));
            else if (b == TERN_SCALES) TERN__TRY(tern__emit_scales(w, p));
            else if (w->block) TERN__TRY(tern__emit_blocks(w, p));
            else TERN__TRY(tern__emit_trits(w, p));
            tern__emit_padding(w);
            TERN__REQUIRE(&w->c->run, !w->failed, TERN_E_IO, "the sink refused bytes, at the latest at %d of the file", w->at);
        }
    tern__flush(w);
    TERN__REQUIRE(&w->c->run, !w->failed, TERN_E_IO, "the sink refused the last bytes of %d", w->at);
    return TERN_OK;
}

static tern_result tern__write(tern_context *c, const tern_model *m, int32_t mask, const tern__block *block, const tern_sink *sink,
                               float *max_error)
{
    tern__writer w;
    tern_result result = TERN_OK;
    int64_t host = TERN__TRANSFER;
    int32_t i;
    TERN__REQUIRE(&c->run, sink && sink->write, TERN_E_ARGUMENT, "the sink or its write is NULL");
    memset(&w, 0, sizeof w);
    w.c = c;
    w.m = m;
    w.block = block;
    w.mask = mask;
    for (i = 0; i < m->count; i++)
        if (m->items[i]->rule != TERN_DENSE)
            host = tern__max(host,
                             tern__rows_at(m->items[i], tern__chunk_rows(m->items[i], 1), 1 << TERN_TRITS | 1 << TERN_SCALES, NULL).bytes);
    if (!tern__reader_open(&w.reader, c, host, tern__chunk_trits(m)))
        result = tern__set_error(&c->run.error, TERN_E_MEMORY, "no memory to write a model");
    if (result == TERN_OK) result = tern__emit_file(&w, 0);
    w.sink = sink;
    if (result == TERN_OK) result = tern__emit_file(&w, w.hash);
    if (result == TERN_OK && max_error) *max_error = w.max_error;
    tern__reader_close(&w.reader);
    return result;
}

TERN_API tern_result tern_model_save(tern_context *c, const tern_model *m, int32_t mask, const tern_sink *sink)
{
    TERN__TRY(tern__check_file_model(c, m, mask));
    return tern__write(c, m, mask, NULL, sink, NULL);
}

TERN_API tern_result tern_model_export(tern_context *c, const tern_model *m, tern_export form, const tern_sink *sink, float *max_error)
{
    const tern__block *block = NULL;
    size_t i;
    int32_t j;
    TERN__TRY(tern__check_file_model(c, m, 0));
    for (i = 0; i < sizeof tern__blocks / sizeof *tern__blocks; i++)
        if (tern__blocks[i].form == form) block = &tern__blocks[i];
    TERN__REQUIRE(&c->run, block, TERN_E_ARGUMENT, "export: form %d is not TERN_TQ1_0, TERN_TQ2_0 or TERN_Q2_0", (int64_t)form);
    for (j = 0; j < m->count; j++)
        if (m->items[j]->rule != TERN_DENSE) TERN__TRY(tern__check_block(c, m->items[j], block));
    return tern__write(c, m, 0, block, sink, max_error);
}

/* -- reading: the first problem stops the walk, since it moves the reader to the end of the file -- */

typedef struct tern__text { const uint8_t *p; uint64_t length; } tern__text;

/* A key or a tensor. */
typedef struct tern__entry {
    tern__text name;
    uint64_t type;
    uint64_t value;          /* bits of a key's number */
    tern__text string;       /* a key's string */
    uint64_t dims[4], offset; /* of a tensor; absent dims are 1 */
} tern__entry;

typedef struct tern__file tern__file;
typedef struct tern__list { /* of keys or of tensors, with the place where the last search ended */
    void (*read)(tern__file *f, tern__entry *e);
    uint64_t count, start, index, at;
} tern__list;

struct tern__file {
    const uint8_t *bytes;
    uint64_t size, at;
    const char *problem;
    uint64_t problem_at;
    uint64_t alignment, data; /* start of the tensors' data */
    tern__list keys, tensors;
};

static void tern__set_problem(tern__file *f, const char *what)
{
    if (f->problem) return;
    f->problem = what;
    f->problem_at = f->at;
    f->at = f->size;
}

/* The next bytes, or NULL. */
static const uint8_t *tern__next_bytes(tern__file *f, uint64_t bytes)
{
    const uint8_t *p = f->bytes + f->at;
    if (f->problem) return NULL;
    if (bytes > f->size - f->at) {
        tern__set_problem(f, "the file ends in the middle of a value");
        return NULL;
    }
    f->at += bytes;
    return p;
}

static uint64_t tern__next_number(tern__file *f, int32_t bytes)
{
    const uint8_t *p = tern__next_bytes(f, (uint64_t)bytes);
    return p ? tern__get_number(p, bytes) : 0;
}

static tern__text tern__next_text(tern__file *f)
{
    tern__text t;
    t.length = tern__next_number(f, 8);
    t.p = tern__next_bytes(f, t.length);
    if (!t.p) t.length = 0;
    return t;
}

static int32_t tern__text_is(tern__text t, const char *a, const char *b, const char *c)
{
    const size_t na = strlen(a), nb = strlen(b), nc = strlen(c);
    return t.length == na + nb + nc && memcmp(t.p, a, na) == 0 && memcmp(t.p + na, b, nb) == 0 && memcmp(t.p + na + nb, c, nc) == 0;
}

/* Bytes of a key's number of this type; 0 where the type is none. */
static int32_t tern__key_bytes(uint64_t type)
{
    static const uint8_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < sizeof bytes ? bytes[type] : 0;
}

static void tern__skip_array(tern__file *f)
{
    const uint64_t type = tern__next_number(f, 4);
    uint64_t count = tern__next_number(f, 8);
    const uint64_t bytes = (uint64_t)tern__key_bytes(type);
    if (type == TERN__GGUF_STRING) while (count-- && !f->problem) tern__next_text(f);
    else if (bytes == 0) tern__set_problem(f, "an array has elements of an unknown type");
    else if (count > f->size / bytes) tern__set_problem(f, "an array is longer than the file");
    else tern__next_bytes(f, count * bytes);
}

static void tern__read_key(tern__file *f, tern__entry *e)
{
    memset(e, 0, sizeof *e);
    e->name = tern__next_text(f);
    e->type = tern__next_number(f, 4);
    if (e->type == TERN__GGUF_STRING) e->string = tern__next_text(f);
    else if (e->type == TERN__GGUF_ARRAY) tern__skip_array(f);
    else if (tern__key_bytes(e->type)) e->value = tern__next_number(f, tern__key_bytes(e->type));
    else tern__set_problem(f, "a key has an unknown type");
}

static void tern__read_tensor(tern__file *f, tern__entry *e)
{
    uint64_t i, n;
    memset(e, 0, sizeof *e);
    e->name = tern__next_text(f);
    n = tern__next_number(f, 4);
    if (n < 1 || n > 4) tern__set_problem(f, "a tensor does not have 1 to 4 dimensions");
    for (i = 0; i < 4; i++) {
        e->dims[i] = i < n ? tern__next_number(f, 8) : 1;
        if (e->dims[i] >> 62) tern__set_problem(f, "a tensor is larger than 2^62");
    }
    e->type = tern__next_number(f, 4);
    e->offset = tern__next_number(f, 8);
}

static void tern__read_list(tern__file *f, tern__list *list, void (*read)(tern__file *f, tern__entry *e))
{
    tern__entry e;
    uint64_t i;
    list->read = read;
    list->start = list->at = f->at;
    for (i = 0; i < list->count && !f->problem; i++) read(f, &e);
}

/* Files are read in the order they were written, so the search goes on where the last one ended. */
static int32_t tern__find(tern__file *f, tern__list *list, const char *a, const char *b, const char *c, tern__entry *e)
{
    uint64_t n;
    for (n = 0; n < list->count; n++) {
        f->at = list->index ? list->at : list->start;
        list->read(f, e);
        list->at = f->at;
        list->index = (list->index + 1) % list->count;
        if (tern__text_is(e->name, a, b, c)) return 1;
    }
    return 0;
}

/* Whether a tensor lies within the data; of unknown types only the start is known. */
static void tern__check_place(tern__file *f, const tern__entry *e)
{
    int64_t bytes = 0;
    int32_t i;
    if (e->type == TERN__GGML_F32) bytes = 4;
    if (e->type == TERN__GGML_F16 || e->type == TERN__GGML_BF16) bytes = 2;
    if (e->type == TERN__GGML_I8) bytes = 1;
    for (i = 0; i < 4; i++) bytes = tern__mul(bytes, (int64_t)e->dims[i]);
    if (e->offset % f->alignment) tern__set_problem(f, "a tensor's offset is not aligned");
    else if (e->offset > f->size - f->data || (uint64_t)bytes > f->size - f->data - e->offset)
        tern__set_problem(f, "a tensor runs past the end of the file");
}

static void tern__read_structure(tern__file *f)
{
    tern__entry e;
    uint64_t i, end;
    f->at = 8;
    f->alignment = TERN__ALIGNMENT;
    f->tensors.count = tern__next_number(f, 8);
    f->keys.count = tern__next_number(f, 8);
    tern__read_list(f, &f->keys, tern__read_key);
    end = f->at;
    if (!f->problem && tern__find(f, &f->keys, "general.alignment", "", "", &e)) f->alignment = e.value;
    f->at = end;
    if (f->alignment == 0 || (f->alignment & (f->alignment - 1)) != 0 || f->alignment > f->size)
        tern__set_problem(f, "general.alignment is not a power of two within the file");
    tern__read_list(f, &f->tensors, tern__read_tensor);
    if (f->problem) return;
    f->data = (f->at + f->alignment - 1) & ~(f->alignment - 1);
    if (f->data > f->size) tern__set_problem(f, "the file ends before the tensors' data");
    f->at = f->tensors.start;
    for (i = 0; i < f->tensors.count && !f->problem; i++) {
        tern__read_tensor(f, &e);
        tern__check_place(f, &e);
    }
}

static tern_result tern__open_file(tern_context *c, tern__file *f, const void *bytes, size_t size)
{
    static const uint8_t zeros[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const size_t after = TERN__HASH_AT + 8;
    uint64_t hash;
    memset(f, 0, sizeof *f);
    f->bytes = (const uint8_t *)bytes;
    f->size = size;
    TERN__REQUIRE(&c->run, bytes, TERN_E_ARGUMENT, "load: the file is NULL");
    TERN__REQUIRE(&c->run, size >= after, TERN_E_FORMAT, "a file of %d bytes is too short to be a model", (int64_t)size);
    TERN__REQUIRE(&c->run, memcmp(bytes, "GGUF", 4) == 0, TERN_E_FORMAT, "not a GGUF file: byte 0 is %d", (int64_t)f->bytes[0]);
    TERN__REQUIRE(&c->run, tern__get_number(f->bytes + 4, 4) == 3, TERN_E_FORMAT,
                  "GGUF version %d is not 3", (int64_t)tern__get_number(f->bytes + 4, 4));
    TERN__REQUIRE(&c->run, memcmp(f->bytes + TERN__HASH_AT - 16, "ternary.hash", 12) == 0, TERN_E_FORMAT,
                  "a GGUF file of another program: its first key is not ternary.hash");
    hash = tern__fnv(tern__fnv(TERN__FNV_START, f->bytes, TERN__HASH_AT), zeros, 8);
    hash = tern__fnv(hash, f->bytes + after, size - after);
    TERN__REQUIRE(&c->run, hash == tern__get_number(f->bytes + TERN__HASH_AT, 8), TERN_E_FORMAT,
                  "the file's %d bytes do not have the hash it states: it is truncated or corrupted", (int64_t)size);
    tern__read_structure(f);
    TERN__REQUIRE(&c->run, !f->problem, TERN_E_FORMAT, "byte %d of %d: %s", (int64_t)f->problem_at, (int64_t)size, f->problem);
    return TERN_OK;
}

/* -- loading -- */

typedef struct tern__loader {
    tern_context *c;
    tern__file file;
    const uint8_t **source; /* [TERN_BUFFERS] of each parameter: where its tensors lie; NULL: not loaded */
    uint8_t *chunk;         /* trits of some rows, or floats */
    int8_t *staging;        /* trits of some rows on the backend */
    float *scales;          /* scales of a parameter, row-major ... */
    void *ordered;          /* ... and in panel order */
} tern__loader;

static tern_result tern__match_number(tern__loader *l, const tern_param *p, const char *key, uint64_t type, int64_t value)
{
    tern__entry e;
    int64_t found;
    TERN__REQUIRE(&l->c->run, tern__find(&l->file, &l->file.keys, "ternary.", p->name, key, &e), TERN_E_MISSING,
                  "the file has no key ternary.%s%s", p->name, key);
    TERN__REQUIRE(&l->c->run, e.type == type, TERN_E_FORMAT,
                  "ternary.%s%s has GGUF type %d, not %d", p->name, key, (int64_t)e.type, (int64_t)type);
    found = type == TERN__GGUF_INT32 ? (int64_t)(int32_t)(uint32_t)e.value : (int64_t)e.value;
    TERN__REQUIRE(&l->c->run, found == value, TERN_E_SHAPE,
                  "%s: %s is %d in the file and %d in the parameter", p->name, key + 1, found, value);
    return TERN_OK;
}

static tern_result tern__match_param(tern__loader *l, const tern_param *p)
{
    const char *found = "unknown";
    tern__entry e;
    int32_t i;
    TERN__REQUIRE(&l->c->run, tern__find(&l->file, &l->file.keys, "ternary.", p->name, ".rule", &e), TERN_E_MISSING,
                  "the file has no parameter %s", p->name);
    for (i = 0; i <= TERN_DENSE; i++)
        if (e.type == TERN__GGUF_STRING && tern__text_is(e.string, tern__rule_names[i], "", "")) found = tern__rule_names[i];
    TERN__REQUIRE(&l->c->run, found == tern__rule_names[p->rule] || (p->rule == TERN_GIVEN && found != tern__rule_names[TERN_DENSE]),
                  TERN_E_SHAPE, "%s: rule is %s in the file and %s in the parameter", p->name, found, tern__rule_names[p->rule]);
    TERN__TRY(tern__match_number(l, p, ".rows", TERN__GGUF_UINT64, p->rows));
    TERN__TRY(tern__match_number(l, p, ".cols", TERN__GGUF_UINT64, p->cols));
    TERN__TRY(tern__match_number(l, p, ".grain", TERN__GGUF_INT32, p->grain));
    if (tern__is_integer(p) && tern__find(&l->file, &l->file.tensors, p->name, ".accum", "", &e))
        TERN__TRY(tern__match_number(l, p, ".theta", TERN__GGUF_UINT32, tern__theta(p)));
    if (!tern__find(&l->file, &l->file.keys, "ternary.", p->name, ".rotate", &e)) e.value = 0;
    TERN__REQUIRE(&l->c->run, e.value == p->rotate, TERN_E_SHAPE,
                  "%s: rotate is %d in the file and %d in the parameter", p->name, (int64_t)e.value, (int64_t)p->rotate);
    return TERN_OK;
}

static tern_result tern__check_trits(tern__loader *l, const tern_param *p, const uint8_t *source)
{
    const int64_t bytes = tern__tensor_of(p, TERN_TRITS).bytes, last = p->rows * p->cols - 5 * (bytes - 1);
    int64_t i;
    uint32_t rest;
    for (i = 0; i < bytes; i++)
        TERN__REQUIRE(&l->c->run, source[i] <= TERN__MAX_BYTE, TERN_E_FORMAT,
                      "%s.trits: byte %d is %d, above %d", p->name, i, (int64_t)source[i], (int64_t)TERN__MAX_BYTE);
    rest = source[bytes - 1];
    for (i = 0; i < 5; i++, rest /= 3)
        TERN__REQUIRE(&l->c->run, i < last || rest % 3 == 1, TERN_E_FORMAT,
                      "%s.trits: the last byte is %d: trits after the %d of the matrix are not zero", p->name, (int64_t)source[bytes - 1],
                      p->rows * p->cols);
    return TERN_OK;
}

/* Logarithm i of a tensor of scales. */
static int16_t tern__source_log(const uint8_t *source, int64_t i)
{
    return (int16_t)((int32_t)(tern__get_number(source + 2 * i, 2) ^ 0x8000) - 0x8000);
}

/* Scale i of a tensor of scales. */
static float tern__source_scale(const tern_param *p, const uint8_t *source, int64_t i)
{
    const tern_type type = tern__buffer_type(p, TERN_SCALES);
    if (type == TERN_POW2) return tern__from_pow2((int8_t)((source[i] ^ 0x80) - 0x80));
    if (type == TERN_LOG) return tern__from_log(tern__source_log(source, i));
    if (type == TERN_F16) return tern__from_f16((uint16_t)tern__get_number(source + 2 * i, 2));
    return tern__float((uint32_t)tern__get_number(source + 4 * i, 4));
}

static tern_result tern__check_scales(tern__loader *l, const tern_param *p, const uint8_t *source)
{
    const tern__tensor t = tern__tensor_of(p, TERN_SCALES);
    int64_t i;
    for (i = 0; i < t.dims[0] * t.dims[1]; i++) {
        TERN__REQUIRE(&l->c->run, t.type != TERN__GGML_I8 || (source[i] != 127 && source[i] != 129), TERN_E_FORMAT,
                      "%s.scale: exponent %d is %d, not -126 to 126 or -128", p->name, i, (int64_t)((source[i] ^ 0x80) - 0x80));
        TERN__REQUIRE(&l->c->run, t.type != TERN__GGML_I16 || tern__source_log(source, i) >= TERN__LEAST_LOG
                                  || tern__source_log(source, i) == INT16_MIN, TERN_E_FORMAT,
                      "%s.scale: logarithm %d is %d, not %d to 32767 or -32768",
                      p->name, i, (int64_t)tern__source_log(source, i), (int64_t)TERN__LEAST_LOG);
        TERN__REQUIRE(&l->c->run, tern__scale_ok(tern__source_scale(p, source, i)), TERN_E_FORMAT,
                      "%s.scale: number %d is negative or not finite", p->name, i);
    }
    return TERN_OK;
}

/* Accumulators and votes are -127 to 127. */
static tern_result tern__check_bytes(tern__loader *l, const tern_param *p, int32_t which, const uint8_t *source)
{
    const int64_t bytes = tern__tensor_of(p, which).bytes;
    int64_t i;
    for (i = 0; i < bytes; i++)
        TERN__REQUIRE(&l->c->run, source[i] != 0x80, TERN_E_FORMAT,
                      "%s%s: byte %d is -128, below -127", p->name, tern__suffix(p, which), i);
    return TERN_OK;
}

/* Finds and checks one tensor. Moments may be absent. */
static tern_result tern__match_tensor(tern__loader *l, const tern_param *p, int32_t which, const uint8_t **source)
{
    const tern__tensor t = tern__tensor_of(p, which);
    const char *suffix = tern__suffix(p, which);
    tern__entry e;
    if (!tern__find(&l->file, &l->file.tensors, p->name, suffix, "", &e)) {
        TERN__REQUIRE(&l->c->run, which == TERN_MOMENT1 || which == TERN_MOMENT2, TERN_E_MISSING,
                      "the file has no tensor %s%s", p->name, suffix);
        return TERN_OK;
    }
    TERN__REQUIRE(&l->c->run, e.type == (uint64_t)t.type, TERN_E_SHAPE,
                  "%s%s has GGML type %d in the file and %d in the parameter", p->name, suffix, (int64_t)e.type, (int64_t)t.type);
    TERN__REQUIRE(&l->c->run, e.dims[0] == (uint64_t)t.dims[0] && e.dims[1] == (uint64_t)t.dims[1] && e.dims[2] == 1 && e.dims[3] == 1,
                  TERN_E_SHAPE, "%s%s is %d x %d x %d x %d in the file and %d x %d in the parameter", p->name, suffix, (int64_t)e.dims[3],
                  (int64_t)e.dims[2], (int64_t)e.dims[1], (int64_t)e.dims[0], t.dims[1], t.dims[0]);
    *source = l->file.bytes + l->file.data + e.offset;
    if (which >= TERN_ACCUM) return tern__check_bytes(l, p, which, *source);
    if (which == TERN_TRITS) return tern__check_trits(l, p, *source);
    return which == TERN_SCALES ? tern__check_scales(l, p, *source) : TERN_OK;
}

/* Everything that can be wrong with the file, and all memory, before the first parameter is touched. */
static tern_result tern__prepare(tern__loader *l, const tern_model *m)
{
    const tern_allocator *a = &l->c->run.allocator;
    const int64_t trits = tern__chunk_trits(m);
    int64_t scales = 1;
    int32_t i, b;
    l->source = (const uint8_t **)tern__host_alloc(a, (size_t)m->count * TERN_BUFFERS * sizeof *l->source);
    TERN__REQUIRE(&l->c->run, l->source, TERN_E_MEMORY, "load: no memory for a list of %d parameters", (int64_t)m->count);
    for (i = 0; i < m->count; i++) {
        const tern_param *p = m->items[i];
        TERN__TRY(tern__match_param(l, p));
        for (b = 0; b < TERN_BUFFERS; b++)
            if (tern__is_stored(p, b, TERN__ALL_BUFFERS)) TERN__TRY(tern__match_tensor(l, p, b, &l->source[i * TERN_BUFFERS + b]));
        scales = tern__max(scales, tern__buffer_count(p, TERN_SCALES));
    }
    l->chunk = (uint8_t *)tern__host_alloc(a, (size_t)tern__max(trits, TERN__TRANSFER));
    l->scales = (float *)tern__host_alloc(a, (size_t)scales * sizeof(float));
    l->ordered = tern__host_alloc(a, (size_t)scales * sizeof(float));
    l->staging = (int8_t *)tern_alloc(l->c, (size_t)(trits + 1));
    TERN__REQUIRE(&l->c->run, l->chunk && l->scales && l->ordered && l->staging, TERN_E_MEMORY,
                  "load: no memory for panels of %d bytes and %d scales", trits, scales);
    return TERN_OK;
}

static tern_result tern__load_trits(tern__loader *l, const tern_param *p, const uint8_t *source)
{
    static const uint8_t power[5] = {1, 3, 9, 27, 81};
    int64_t row, rows, i;
    for (row = 0; row < p->rows; row += rows) {
        int8_t *trits = (int8_t *)l->chunk;
        rows = tern__min(tern__chunk_rows(p, 1), p->rows - row);
        for (i = row * p->cols; i < (row + rows) * p->cols; i++) *trits++ = (int8_t)(source[i / 5] / power[i % 5] % 3 - 1);
        TERN__TRY(tern__upload_rows(l->c, p, row, rows, (const int8_t *)l->chunk, l->staging));
    }
    return TERN_OK;
}

static tern_result tern__load_scales(tern__loader *l, const tern_param *p, const uint8_t *source)
{
    const tern__tensor t = tern__tensor_of(p, TERN_SCALES);
    const tern_matrix m = tern_param_matrix(p);
    int64_t i;
    for (i = 0; i < t.dims[0] * t.dims[1]; i++) l->scales[i] = tern__source_scale(p, source, i);
    return tern__upload_scales(l->c, &m, l->scales, l->ordered);
}

static tern_result tern__load_elements(tern__loader *l, const tern_param *p, int32_t which, const uint8_t *source)
{
    const tern__tensor t = tern__tensor_of(p, which);
    const int32_t width = (int32_t)tern__type_bytes(tern__buffer_type(p, which));
    int64_t at, n;
    for (at = 0; at < t.bytes; at += n) {
        n = tern__min(t.bytes - at, TERN__TRANSFER);
        memcpy(l->chunk, source + at, (size_t)n);
        tern__little_endian(l->chunk, n / width, width);
        TERN__TRY(tern_copy(l->c, (uint8_t *)p->buffer[which].data + at, l->chunk, (size_t)n, TERN_TO_DEVICE));
    }
    return TERN_OK;
}

static tern_result tern__load_model(tern__loader *l, const tern_model *m)
{
    int32_t i, b;
    for (i = 0; i < m->count; i++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const uint8_t *source = l->source[i * TERN_BUFFERS + b];
            if (!source) continue;
            if (b == TERN_TRITS) TERN__TRY(tern__load_trits(l, m->items[i], source));
            else if (b == TERN_SCALES) TERN__TRY(tern__load_scales(l, m->items[i], source));
            else TERN__TRY(tern__load_elements(l, m->items[i], b, source));
        }
    return TERN_OK;
}

TERN_API tern_result tern_model_load(tern_context *c, const tern_model *m, const void *file, size_t size)
{
    tern__loader l;
    tern_result result;
    const tern_allocator *a;
    TERN__TRY(tern__check_file_model(c, m, TERN__ALL_BUFFERS));
    memset(&l, 0, sizeof l);
    l.c = c;
    TERN__TRY(tern__open_file(c, &l.file, file, size));
    result = tern__prepare(&l, m);
    if (result == TERN_OK) result = tern__load_model(&l, m);
    a = &c->run.allocator;
    tern__host_free(a, l.source);
    tern__host_free(a, l.chunk);
    tern__host_free(a, l.scales);
    tern__host_free(a, l.ordered);
    tern_free(c, l.staging);
    return result;
}

#ifndef TERNARY_NO_STDIO
/* Opened by the first write, so that a model which cannot be saved leaves an older file alone. */
typedef struct tern__path { const char *name; FILE *file; } tern__path;

static int tern__path_write(void *user, const void *data, size_t bytes)
{
    tern__path *path = (tern__path *)user;
    if (!path->file) path->file = fopen(path->name, "wb");
    return !path->file || fwrite(data, 1, bytes, path->file) != bytes;
}

TERN_API tern_result tern_model_save_file(tern_context *c, const tern_model *m, int32_t mask, const char *path)
{
    tern__path to;
    tern_sink sink;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, path, TERN_E_ARGUMENT, "save: the path is NULL");
    to.name = path;
    to.file = NULL;
    sink.write = tern__path_write;
    sink.user = &to;
    result = tern_model_save(c, m, mask, &sink);
    if (to.file && fclose(to.file) != 0 && result == TERN_OK) result = TERN_E_IO;
    if (result == TERN_E_IO) tern__set_error(&c->run.error, TERN_E_IO, "cannot write %s", path);
    return result;
}

/* The bytes of a file, to be freed by tern__host_free. */
static tern_result tern__read_file(tern_context *c, const char *path, FILE *file, void **bytes, size_t *size)
{
    long end = -1;
    /* A directory opens, but cannot be read. */
    if (!(fgetc(file) == EOF && ferror(file)) && fseek(file, 0, SEEK_END) == 0) end = ftell(file);
    TERN__REQUIRE(&c->run, end >= 0 && fseek(file, 0, SEEK_SET) == 0, TERN_E_IO, "cannot read %s", path);
    *size = (size_t)end;
    *bytes = tern__host_alloc(&c->run.allocator, *size);
    TERN__REQUIRE(&c->run, *bytes, TERN_E_MEMORY, "%s: no memory for its %d bytes", path, (int64_t)end);
    TERN__REQUIRE(&c->run, fread(*bytes, 1, *size, file) == *size, TERN_E_IO, "cannot read the %d bytes of %s", (int64_t)end, path);
    return TERN_OK;
}

TERN_API tern_result tern_model_load_file(tern_context *c, const tern_model *m, const char *path)
{
    FILE *file;
    void *bytes = NULL;
    size_t size = 0;
    tern_result result;
    if (!c) return TERN_E_ARGUMENT;
    TERN__REQUIRE(&c->run, path, TERN_E_ARGUMENT, "load: the path is NULL");
    file = fopen(path, "rb");
    TERN__REQUIRE(&c->run, file, TERN_E_IO, "cannot open %s", path);
    result = tern__read_file(c, path, file, &bytes, &size);
    fclose(file);
    if (result == TERN_OK) result = tern_model_load(c, m, bytes, size);
    tern__host_free(&c->run.allocator, bytes);
    return result;
}
#endif
#endif

/* ------------------------------------------------------------------------------------------------
   [TERN-22] Self-test
   What enters: a context. What leaves: whether its backend gives the known answers: hashes of outputs
   that are the same on every machine. Public operations and tern_copy alone touch backend memory.
   ------------------------------------------------------------------------------------------------ */

/* In the order in which one piece builds on another, so that the first wrong one is the broken one. */
#define TERN__PIECES(X)                                              \
    X(FILL,         "fill",            UINT64_C(0xCD73352ED3E4DD81)) \
    X(CAST,         "cast",            UINT64_C(0xE5AD0B5D20DF9A04)) \
    X(TERNARIZE,    "ternarize",       UINT64_C(0xA717EDD365B68C3A)) \
    X(QUANTIZE,     "quantize",        UINT64_C(0x9A307885FD034A35)) \
    X(MATMUL_INT8,  "int8 matmul",     UINT64_C(0xF6ACC5AF7EF37438)) \
    X(MATMUL_INT4,  "int4 matmul",     UINT64_C(0xBBA61DD46EE61682)) \
    X(MATMUL_FLOAT, "float matmul",    UINT64_C(0x89AE72CDC6EAC374)) \
    X(DENSE_INT8,   "int8 product",    UINT64_C(0xE66FF1A9633838DD)) \
    X(MAP,          "map",             UINT64_C(0x328F73821ACB0094)) \
    X(NORM,         "norm",            UINT64_C(0x25B9F39C61931E94)) \
    X(HADAMARD,     "hadamard",        UINT64_C(0x951D57AC119E6A33)) \
    X(ROPE,         "rope",            UINT64_C(0x52415F1FA35AD563)) \
    X(ATTENTION,    "attention",       UINT64_C(0xDC20C1B5D5338E86)) \
    X(LOSS,         "loss",            UINT64_C(0xEB750C2D8F637B5F))
#define TERN__PIECE(name, text, hash) TERN__PIECE_##name,
enum { TERN__PIECES(TERN__PIECE) TERN__PIECE_END };
#undef TERN__PIECE

/* Backend memory in words of 4 bytes, and the hashes so far. */
enum { TERN__TEST_ROWS = 33, TERN__TEST_COLS = 130, TERN__TEST_TOKENS = 5, TERN__TEST_WORDS = 4352 };
typedef struct tern__selftest {
    tern_context *c;
    float *w, *x, *y, *z;
    uint64_t hash[TERN__PIECE_END];
} tern__selftest;

static tern_result tern__selftest_hash(tern__selftest *t, int32_t piece, const void *data, int64_t words)
{
    uint32_t word[64];
    int64_t at, i, n;
    for (at = 0; at < words; at += n) {
        n = tern__min(words - at, 64);
        TERN__TRY(tern_copy(t->c, word, (const float *)data + at, (size_t)n * 4, TERN_TO_HOST));
        for (i = 0; i < n; i++) {
            const uint8_t bytes[4] = {(uint8_t)word[i], (uint8_t)(word[i] >> 8), (uint8_t)(word[i] >> 16), (uint8_t)(word[i] >> 24)};
            t->hash[piece] = tern__fnv(t->hash[piece], bytes, 4);
        }
    }
    return TERN_OK;
}

/* One encoding and grain: ternarize, quantize and both products. */
static tern_result tern__selftest_product(tern__selftest *t, tern_type encoding, int32_t grain)
{
    tern_ternarize_args w = TERN_ZERO;
    tern_unpack_args u = TERN_ZERO;
    tern_quantize_args q = TERN_ZERO;
    tern_matmul_args a = TERN_ZERO;
    int64_t stride, groups;
    w.m.rows = TERN__TEST_ROWS; w.m.cols = TERN__TEST_COLS;
    w.m.grain = grain;
    w.m.encoding = encoding;
    w.m.scale_type = encoding == TERN_BASE3 ? TERN_LOG : TERN_F32;
    w.m.trits = t->z; w.m.scales = t->z + 1024;
    w.w = t->w;
    TERN__TRY(tern_ternarize(t->c, &w));
    u.m = w.m;
    u.count = w.m.rows;
    u.values = t->y;
    TERN__TRY(tern_unpack(t->c, &u));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_TERNARIZE, t->y, w.m.rows * w.m.cols));
    TERN__TRY(tern_activation_shape(t->c, &w.m, &stride, &groups));
    a.m = q.m = w.m;
    a.n = q.n = TERN__TEST_TOKENS;
    q.x = t->x;
    q.norm = TERN_NORM_RMS;
    q.eps = 1e-6f;
    q.q = (int8_t *)(t->z + 2048); q.scale = t->z + 3072; q.sum = (int32_t *)(void *)(t->z + 3136);
    TERN__TRY(tern_quantize(t->c, &q));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_QUANTIZE, q.scale, q.n));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_QUANTIZE, q.sum, q.n * groups));
    a.q = q.q; a.scale = q.scale; a.sum = q.sum;
    a.bias = t->w;
    a.y = t->y;
    TERN__TRY(tern_matmul(t->c, &a));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_MATMUL_INT8, t->y, a.n * a.m.rows));
    a.act = q.act = TERN_ACT_INT4; /* in place of the int8 */
    TERN__TRY(tern_quantize(t->c, &q));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_MATMUL_INT4, q.scale, q.n));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_MATMUL_INT4, q.sum, q.n * groups));
    TERN__TRY(tern_matmul(t->c, &a));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_MATMUL_INT4, t->y, a.n * a.m.rows));
    q.act = TERN_ACT_INT8; /* which the next piece reads */
    TERN__TRY(tern_quantize(t->c, &q));
    a.q = NULL;
    a.x = t->x;
    TERN__TRY(tern_matmul(t->c, &a));
    return tern__selftest_hash(t, TERN__PIECE_MATMUL_FLOAT, t->y, a.n * a.m.rows);
}

/* The bytes that the last quantizer left, by themselves, twice. */
static tern_result tern__selftest_int8(tern__selftest *t)
{
    tern_dense_i8_args a = TERN_ZERO;
    a.m = 33; a.n = 65; a.k = TERN__TEST_TOKENS;
    a.a = a.b = (const int8_t *)(t->z + 2048);
    a.a_row = a.b_col = 1;
    a.a_col = a.b_row = TERN__TEST_COLS;
    a.c = (int32_t *)(void *)t->y;
    a.c_row = a.n;
    TERN__TRY(tern_dense_i8(t->c, &a));
    a.add = 1;
    TERN__TRY(tern_dense_i8(t->c, &a));
    return tern__selftest_hash(t, TERN__PIECE_DENSE_INT8, t->y, a.m * a.c_row);
}

/* Through bf16 or f16 and back; a function of every weight. */
static tern_result tern__selftest_elements(tern__selftest *t, tern_type type, tern_map_fn fn)
{
    tern_cast_args a = TERN_ZERO;
    tern_map_args m = TERN_ZERO;
    a.count = m.count = TERN__TEST_ROWS * TERN__TEST_COLS;
    a.to = type;
    a.src = t->w;
    a.dst = t->z;
    TERN__TRY(tern_cast(t->c, &a));
    a.from = type;
    a.to = TERN_F32;
    a.src = t->z;
    a.dst = t->y;
    TERN__TRY(tern_cast(t->c, &a));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_CAST, t->y, a.count));
    m.fn = fn;
    m.a = t->w;
    m.y = t->y;
    TERN__TRY(tern_map(t->c, &m));
    return tern__selftest_hash(t, TERN__PIECE_MAP, t->y, m.count);
}

/* w as 33 rows; as 18 tokens of 4 query heads and 2 key heads of 8; as 3 rows of 1100 logits. */
static tern_result tern__selftest_rows(tern__selftest *t)
{
    static const int32_t targets[3] = {0, 1099, 700};
    tern_norm_args n = TERN_ZERO;
    tern_hadamard_args h = TERN_ZERO;
    tern_rope_args r = TERN_ZERO;
    tern_attention_args a = TERN_ZERO;
    tern_loss_args l = TERN_ZERO;
    n.n = TERN__TEST_ROWS; n.cols = TERN__TEST_COLS;
    n.x = t->w;
    n.gain = t->x;
    n.eps = 1e-6f;
    n.y = t->y;
    TERN__TRY(tern_norm(t->c, &n));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_NORM, t->y, n.n * n.cols));
    h.n = n.n; h.cols = n.cols;
    h.seed = 22;
    h.x = t->w;
    h.y = t->z;
    TERN__TRY(tern_hadamard(t->c, &h));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_HADAMARD, t->z, h.n * h.cols));
    h.inverse = 1;
    h.x = t->x;
    TERN__TRY(tern_hadamard(t->c, &h));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_HADAMARD, t->z, h.n * h.cols));
    r.n = 18;
    r.heads = 6; r.dim = 8;
    r.x = t->y;
    r.stride = 64;
    r.period = 9;
    TERN__TRY(tern_rope(t->c, &r));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_ROPE, t->y, r.n * r.stride));
    a.batch = 2; a.queries = a.keys = 9;
    a.heads = 4; a.kv_heads = 2; a.dim = 8;
    a.q = t->w; a.k = t->w + 32; a.v = t->w + 48;
    a.q_stride = a.k_stride = a.v_stride = 64;
    a.y = t->y; a.p = t->z;
    TERN__TRY(tern_attention(t->c, &a));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_ATTENTION, t->y, 2 * 9 * 32));
    l.n = 3; l.classes = 1100;
    l.logits = t->w;
    l.targets = (int32_t *)(void *)(t->z + 64);
    l.losses = t->z;
    l.dlogits = t->y;
    l.scale = 0.25f;
    TERN__TRY(tern_copy(t->c, t->z + 64, targets, sizeof targets, TERN_TO_DEVICE));
    TERN__TRY(tern_loss(t->c, &l));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_LOSS, l.losses, l.n));
    return tern__selftest_hash(t, TERN__PIECE_LOSS, t->y, l.n * l.classes);
}

static tern_result tern__selftest_run(tern__selftest *t)
{
    static const int32_t grain[3] = {TERN_PER_TENSOR, TERN_PER_ROW, 50};
    tern_fill_args f = TERN_ZERO;
    int32_t i;
    f.count = 2 * TERN__TEST_WORDS; /* w and x */
    f.x = t->w;
    f.deviation = 1.0f;
    f.seed = 22;
    TERN__TRY(tern_fill(t->c, &f));
    TERN__TRY(tern__selftest_hash(t, TERN__PIECE_FILL, t->w, f.count));
    TERN__TRY(tern__selftest_elements(t, TERN_BF16, TERN_MAP_SILU));
    TERN__TRY(tern__selftest_elements(t, TERN_F16, TERN_MAP_GELU));
    for (i = 0; i < 6; i++) TERN__TRY(tern__selftest_product(t, i & 1 ? TERN_BASE3 : TERN_2BIT, grain[i / 2]));
    TERN__TRY(tern__selftest_int8(t));
    return tern__selftest_rows(t);
}

TERN_API tern_result tern_selftest(tern_context *c)
{
#define TERN__PIECE(name, text, hash) {text, hash},
    static const struct { const char *text; uint64_t hash; } known[TERN__PIECE_END] = {TERN__PIECES(TERN__PIECE)};
#undef TERN__PIECE
    tern__selftest t;
    tern_result result;
    int32_t i;
    if (!c) return TERN_E_ARGUMENT;
    t.c = c;
    t.w = (float *)tern_alloc(c, 4 * TERN__TEST_WORDS * sizeof(float));
    TERN__REQUIRE(&c->run, t.w, TERN_E_MEMORY, "selftest: no memory for %d bytes", (int64_t)(4 * TERN__TEST_WORDS * sizeof(float)));
    t.x = t.w + TERN__TEST_WORDS;
    t.y = t.x + TERN__TEST_WORDS;
    t.z = t.y + TERN__TEST_WORDS;
    for (i = 0; i < TERN__PIECE_END; i++) t.hash[i] = TERN__FNV_START;
    result = tern__selftest_run(&t);
    tern_free(c, t.w);
    for (i = 0; result == TERN_OK && i < TERN__PIECE_END; i++)
        if (t.hash[i] != known[i].hash)
            result = tern__set_error(&c->run.error, TERN_E_SELFTEST, "selftest: %s does not give the known answer on %s",
                                     known[i].text, c->run.backend->name);
    return result;
}

#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC pop_options
#endif
#endif /* TERNARY_IMPLEMENTED */
#endif /* TERNARY_IMPLEMENTATION */
