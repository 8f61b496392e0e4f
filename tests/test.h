/* The harness that every test file shares: checks, contexts for each tier, odd shapes, hashes.
   tests.c includes the implementation first, so that tests may call private functions. */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* References round after every operation, as the library does. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

static uint32_t test_seed;                 /* of test_random; every test starts from 1 */
static int test_passed, test_failed;       /* tests */
static int test_errors;                    /* failed checks of the running test */
static const char *test_only;              /* runs tests whose name contains this */
static long test_blocks;                   /* allocations not yet freed, by test_allocator */
static long test_fail_at = -1;             /* the allocation with this number fails (counted from 0) */
static long test_allocations;

#define CHECK(condition, ...)                                                    \
    do {                                                                         \
        if (!(condition) && test_errors++ < 5) {                                 \
            printf("  %s:%d: %s: ", __FILE__, __LINE__, #condition);             \
            printf(__VA_ARGS__);                                                 \
            printf("\n");                                                        \
        }                                                                        \
    } while (0)

/* The call succeeds; on failure the library's own text is printed. */
#define CHECK_OK(c, call)                                                                                        \
    do {                                                                                                         \
        tern_result check_result = (call);                                                                       \
        CHECK(check_result == TERN_OK, "%s (%s)", tern_result_text(check_result), (c) ? tern_last_error(c)->text : ""); \
    } while (0)

/* The call fails with this code, and its text contains this part. */
#define CHECK_FAILS(c, call, code, part)                                                                         \
    do {                                                                                                         \
        tern_result check_result = (call);                                                                       \
        CHECK(check_result == (code), "got %s (%s)", tern_result_text(check_result), tern_last_error(c)->text);  \
        CHECK(strstr(tern_last_error(c)->text, part) != NULL, "text is \"%s\"", tern_last_error(c)->text);       \
    } while (0)

#define RUN(test)                                                                \
    do {                                                                         \
        if (test_only && !strstr(#test, test_only)) break;                       \
        test_errors = 0;                                                         \
        test_blocks = 0;                                                         \
        test_allocations = 0;                                                    \
        test_fail_at = -1;                                                       \
        test_seed = 1;                                                           \
        test();                                                                  \
        CHECK(test_blocks == 0, "%ld allocations leaked", test_blocks);          \
        printf("%s %s\n", test_errors ? "FAIL" : "ok  ", #test);                 \
        fflush(stdout);                                                          \
        if (test_errors) test_failed++; else test_passed++;                      \
    } while (0)

/* Tests that compare numbers of threads do so for these. 1,3 where instructions are expensive: everything in one piece and in
   parts. 3 where races are sought: one thread has none, and what has no other is left out (RUN_ALONE). */
#ifndef TEST_THREADS
#define TEST_THREADS 1, 2, 3, 5
#endif
static const int32_t test_threads[] = {TEST_THREADS};
#define TEST_THREAD_COUNTS ((int)(sizeof test_threads / sizeof test_threads[0]))

/* A test on one thread: run unless only others are asked for. */
#define RUN_ALONE(test)                                                          \
    do {                                                                         \
        if (test_threads[0] == 1) RUN(test);                                     \
        else if (!test_only || strstr(#test, test_only)) printf("  skipped: %s has one thread\n", #test); \
    } while (0)

/* Odd sizes on purpose: one, around every unit, panel and block. */
static const int64_t test_sizes[] = {1, 15, 16, 17, 127, 130};
#define TEST_SIZES ((int)(sizeof test_sizes / sizeof test_sizes[0]))

static void *test_malloc(void *user, size_t bytes)
{
    void *p;
    (void)user;
    if (test_allocations++ == test_fail_at) return NULL;
    p = malloc(bytes);
    if (p) test_blocks++;
    return p;
}

static void test_free(void *user, void *p)
{
    (void)user;
    if (p) test_blocks--;
    free(p);
}

/* A copy of some bytes between two pages that fault when touched: right after the first, or right before the second. */
static void *test_guard(const void *from, size_t bytes, int at_end)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    unsigned char *p = (unsigned char *)mmap(NULL, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == (unsigned char *)MAP_FAILED || mprotect(p + page, inside, PROT_READ | PROT_WRITE) != 0) abort();
    p += page + (at_end ? inside - bytes : 0);
    memcpy(p, from, bytes);
    return p;
}

static void test_unguard(void *guarded, size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    munmap((unsigned char *)guarded - (uintptr_t)guarded % page - page, inside + 2 * page);
}

/* The tier's table; NULL where this machine lacks it or TERNARY_ISA forbids it. The names count from
   TERN_ISA_BEST, so for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; ...) meets every tier. */
#define TEST__NAME(name, suffix, text) text,
static const char *const test_tier_name[] = {"best", TERN_TIERS(TEST__NAME)};
#undef TEST__NAME

static const tern_backend *test_tier(tern_isa isa)
{
    const char *cap = getenv("TERNARY_ISA");
    int i;
    for (i = TERN_ISA_SCALAR; cap && i < (int)isa; i++)
        if (strcmp(cap, test_tier_name[i]) == 0) return NULL;
#ifdef TEST_AMX
    if (isa > TERN_ISA_SCALAR && isa < TERN_ISA_AMX_INT8) return NULL; /* the ordinary program has tested those */
#endif
    return tern_cpu_backend(isa);
}

/* A context of a tier (NULL, with a line, where test_tier has none); threads > 1 brings a pool. */
typedef struct test_context { tern_context *c; tern_pool *pool; } test_context;

static test_context test_open(tern_isa isa, int32_t threads)
{
    test_context t = {NULL, NULL};
    tern_context_desc d = TERN_ZERO;
    tern_error e;
    if (!test_tier(isa)) {
        printf("  skipped: no tier %s here\n", test_tier_name[isa]);
        return t;
    }
    d.isa_max = isa;
    d.allocator.alloc = test_malloc;
    d.allocator.free = test_free;
    d.scratch = 1 << 20;
    if (threads > 1) {
        t.pool = tern_pool_create(threads);
        d.parallel = tern_pool_parallel(t.pool);
    }
    if (tern_open(&t.c, &d, &e) != TERN_OK) {
        CHECK(0, "cannot open: %s", e.text);
        tern_pool_destroy(t.pool);
        t.pool = NULL;
    }
    return t;
}

static void test_close(test_context *t)
{
    tern_close(t->c);
    tern_pool_destroy(t->pool);
    t->c = NULL;
    t->pool = NULL;
}

/* FNV-1a, 64 bits. */
static uint64_t test_hash_bytes(uint64_t h, const void *data, size_t bytes)
{
    const unsigned char *p = (const unsigned char *)data;
    while (bytes--) h = (h ^ *p++) * UINT64_C(1099511628211);
    return h;
}
#define TEST_HASH UINT64_C(14695981039346656037)

/* The same on every byte order: each float as its bits, low byte first. */
static uint64_t test_hash_floats(uint64_t h, const float *x, int64_t n)
{
    int64_t i;
    for (i = 0; i < n; i++) {
        uint32_t u;
        unsigned char b[4];
        memcpy(&u, &x[i], 4);
        b[0] = (unsigned char)u; b[1] = (unsigned char)(u >> 8); b[2] = (unsigned char)(u >> 16); b[3] = (unsigned char)(u >> 24);
        h = test_hash_bytes(h, b, 4);
    }
    return h;
}

/* Reproducible inputs that do not go through the library. */
static uint32_t test_random(void) { test_seed = test_seed * 1664525u + 1013904223u; return test_seed >> 8; }
static float test_float(void) { return (float)test_random() / 8388608.0f - 1.0f; } /* [-1, 1) */
static float *test_floats(int64_t n)
{
    float *x = (float *)malloc(sizeof(float) * (size_t)n);
    int64_t i;
    for (i = 0; i < n; i++) x[i] = test_float();
    return x;
}
static int8_t test_trit(void) { return (int8_t)((int)(test_random() % 3) - 1); }

#endif
