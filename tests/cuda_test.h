/* What the tests of ternary_cuda.cu share: a CPU context, the specification, and a CUDA context beside it; data that lies in
   both; comparison byte by byte. They run on the emulator (tests/cuda.h included first, every test on each schedule) and, with
   nvcc, on a device. */
#ifndef TERN_CUDA_TEST_H
#define TERN_CUDA_TEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <vector>

/* On a device too, tests can do without fused products, which the scalar tier of the CPU has not. */
#ifndef TEST_CUDA_H
static __device__ int test_fused = 1;
static __device__ __forceinline__ float test_fma(float a, float b, float c)
{
    return test_fused ? __fmaf_rn(a, b, c) : __fadd_rn(__fmul_rn(a, b), c);
}
#define __fmaf_rn(a, b, c) test_fma(a, b, c)
static void test_fuse(int fuse)
{
    if (cudaMemcpyToSymbol(test_fused, &fuse, sizeof fuse) != cudaSuccess) abort();
}
#else
static void test_fuse(bool fuse) { test_cuda.fuse = fuse; }
#endif

#include "../ternary_cuda.cu"

static int test_errors, test_passed, test_failed;
static const char *test_filter = "";

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) test_errors++, printf("  %s:%d: %s\n", __FILE__, __LINE__, #condition);      \
    } while (0)

enum { CPU, GPU };
static tern_context *test_context[2];

/* That a call on the CUDA context succeeds, or says why not. */
#define CHECK_OK(call)                                                                                            \
    do {                                                                                                          \
        if ((call) != TERN_OK)                                                                                    \
            test_errors++, printf("  %s:%d: %s: %s\n", __FILE__, __LINE__, #call, tern_last_error(test_context[GPU])->text); \
    } while (0)

static uint32_t test_seed = 1;
static uint32_t test_random() { return (test_seed = test_seed * 1664525u + 1013904223u) >> 8; }
static float test_uniform() { return (float)test_random() / 8388608.0f - 1.0f; } /* in [-1, 1) */

/* An array in the memory of both contexts: x[CPU], x[GPU]. At first elements are made by `make`, the same in both, or zero.
   Device memory ends with the last element. */
template <typename T> struct mirror {
    size_t count;
    T *at[2];
    std::vector<T> back;
    explicit mirror(int64_t n) : count((size_t)n), back((size_t)n)
    {
        for (int i = CPU; i <= GPU; i++)
            if (!(at[i] = (T *)tern_alloc(test_context[i], count * sizeof(T)))) abort();
    }
    template <typename Make> mirror(int64_t n, Make make) : mirror(n)
    {
        for (size_t i = 0; i < count; i++) at[CPU][i] = (T)make();
        send();
    }
    mirror(const mirror &) = delete;
    mirror &operator=(const mirror &) = delete;
    ~mirror() { for (int i = CPU; i <= GPU; i++) tern_free(test_context[i], at[i]); }
    T *operator[](int side) const { return at[side]; }
    /* After a change of x[CPU][i]: the same on the device. */
    void send() { CHECK_OK(tern_copy(test_context[GPU], at[GPU], at[CPU], count * sizeof(T), TERN_TO_DEVICE)); }
    const std::vector<T> &fetch()
    {
        CHECK_OK(tern_copy(test_context[GPU], back.data(), at[GPU], count * sizeof(T), TERN_TO_HOST));
        return back;
    }
    /* Whether both hold the same bytes; otherwise names the first element that differs. */
    bool same(const char *name)
    {
        fetch();
        for (size_t i = 0; i < count; i++)
            if (memcmp(&back[i], at[CPU] + i, sizeof(T)) != 0) {
                printf("  %s[%zu of %zu]: %.9g on the device, %.9g on the CPU\n", name, i, count, (double)back[i], (double)at[CPU][i]);
                return false;
            }
        return true;
    }
};
#define CHECK_SAME(array) CHECK((array).same(#array))

/* A matrix as a shape: without data. */
static tern_matrix test_shape(int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_type scale_type)
{
    tern_matrix m = {};
    m.rows = rows;
    m.cols = cols;
    m.grain = grain;
    m.encoding = encoding;
    m.scale_type = scale_type;
    return m;
}
static int64_t test_bytes(const tern_matrix &m, bool of_scales)
{
    size_t trits = 0, scales = 0;
    CHECK(tern_matrix_bytes(test_context[CPU], &m, &trits, &scales) == TERN_OK);
    return (int64_t)(of_scales ? scales : trits);
}

/* A matrix in both memories with random trits, packed by the CPU whichever operations the device has, and random scales. */
struct test_matrix {
    tern_matrix m;
    mirror<uint8_t> trits, scales;
    explicit test_matrix(const tern_matrix &shape) : m(shape), trits(test_bytes(shape, false)), scales(test_bytes(shape, true))
    {
        std::vector<int8_t> t((size_t)(m.rows * m.cols));
        tern_pack_args a = {};
        for (int8_t &x : t) x = (int8_t)((int)(test_random() % 3) - 1);
        a.m = on(CPU);
        a.trits = t.data();
        CHECK(tern_pack(test_context[CPU], &a) == TERN_OK);
        for (int64_t i = 0; i < (int64_t)scales.count / tern__type_bytes(m.scale_type); i++)
            tern__store_scale(m.scale_type, scales[CPU], i, 0.01f + (float)(test_random() % 1000) / 1000.0f);
        trits.send();
        scales.send();
    }
    tern_matrix on(int side) const
    {
        tern_matrix here = m;
        here.trits = trits[side];
        here.scales = scales[side];
        return here;
    }
};

/* Runs body(context, side) on both sides; both must succeed, with the same faults of data. */
template <typename Body> static void test_both(Body body)
{
    char fault[2][256];
    for (int side = CPU; side <= GPU; side++) {
        tern_context *c = test_context[side];
        fault[side][0] = 0;
        if (body(c, side) != TERN_OK) test_errors++, printf("  %s: %s\n", tern_backend_name(c), tern_last_error(c)->text);
        if (tern_sync(c) != TERN_OK) snprintf(fault[side], sizeof fault[side], "%s", tern_last_error(c)->text);
    }
    if (strcmp(fault[CPU], fault[GPU])) test_errors++, printf("  \"%s\" on the device, \"%s\" on the CPU\n", fault[GPU], fault[CPU]);
}

/* The schedules of the emulator; a device has its own. */
#ifdef TEST_CUDA_H
enum { TEST_SCHEDULES = 3 };
static void test_schedule(int i) { test_cuda.schedule = (cuda_schedule)i; test_cuda.seed = 7; }
#else
enum { TEST_SCHEDULES = 1 };
static void test_schedule(int) {}
#endif

/* The table of device 0. On the emulator its contexts open without the self-test, which would take most of the time. */
static const tern_backend *test_backend()
{
    static tern_backend b = *tern_cuda_backend(0);
#ifdef TEST_CUDA_H
    b.open = tern__gpu_start;
#endif
    return &b;
}

/* A fresh pair of contexts for each schedule. */
static void test_run(const char *name, void (*test)(), int schedules)
{
    if (!strstr(name, test_filter)) return;
    test_errors = 0;
    for (int i = 0; i < schedules; i++) {
        tern_context_desc desc = {};
        tern_error e;
        test_schedule(i);
        test_seed = 1;
        if (tern_open(&test_context[CPU], nullptr, &e) != TERN_OK) printf("%s\n", e.text), abort();
        desc.backend = test_backend();
        if (tern_open(&test_context[GPU], &desc, &e) != TERN_OK) printf("%s\n", e.text), abort();
        test();
        for (int side = CPU; side <= GPU; side++) tern_close(test_context[side]);
    }
    test_fuse(true);
    printf("%s %s\n", test_errors ? "FAIL" : "ok  ", name);
    fflush(stdout);
    (test_errors ? test_failed : test_passed)++;
}
#define RUN(name) test_run(#name, name, TEST_SCHEDULES)
#define RUN_ONCE(name) test_run(#name, name, 1) /* where schedules say nothing, or are the test's own */

#endif
