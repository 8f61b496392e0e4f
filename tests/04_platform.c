/* [TERN-4] Platform: selection of a tier, the pool, the caller's floating-point mode. */

/* Opens with TERNARY_ISA set to `wanted` (NULL: unset), copies the backend's name, puts the variable back. */
static tern_result platform_open(const char *wanted, const tern_context_desc *d, char name[32], tern_error *e)
{
    char kept[64] = "";
    const char *before = getenv("TERNARY_ISA");
    tern_context *c;
    tern_result result;
    if (before) strncpy(kept, before, sizeof kept - 1);
    if (wanted) setenv("TERNARY_ISA", wanted, 1);
    else unsetenv("TERNARY_ISA");
    result = tern_open(&c, d, e);
    name[0] = 0;
    if (result == TERN_OK) strncat(name, tern_backend_name(c), 31);
    CHECK((result == TERN_OK) == (c != NULL), "context %p after result %d", (void *)c, (int)result);
    tern_close(c);
    if (before) setenv("TERNARY_ISA", kept, 1);
    else unsetenv("TERNARY_ISA");
    return result;
}

/* Opens as above and expects the tier, or the error for a tier that is not here. */
static void platform_expect(const char *wanted, tern_isa isa_max, tern_isa tier)
{
    tern_context_desc d = TERN_ZERO;
    tern_error e;
    char name[32];
    tern_result result;
    d.isa_max = isa_max;
    result = platform_open(wanted, &d, name, &e);
    if (tern_cpu_backend(tier)) {
        CHECK(result == TERN_OK, "%s", e.text);
        CHECK(strcmp(name, test_tier_name[tier]) == 0, "got %s, not %s", name, test_tier_name[tier]);
    } else {
        CHECK(result == TERN_E_UNSUPPORTED && strstr(e.text, "not supported by this machine"), "%s", e.text);
    }
}

static void test_platform_desc_chooses_the_tier(void)
{
    tern_isa isa, best = TERN_ISA_SCALAR;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern_backend *b = tern_cpu_backend(isa);
        platform_expect(NULL, isa, isa);
        if (!b) continue;
        best = isa;
        CHECK(strcmp(b->name, test_tier_name[isa]) == 0, "%s", b->name);
    }
    platform_expect(NULL, TERN_ISA_BEST, best);
    platform_expect("", TERN_ISA_BEST, best);
    CHECK(tern_cpu_backend(TERN_ISA_BEST) == tern_cpu_backend(best), "the best tier");
    CHECK(tern_cpu_backend(TERN__ISA_END) == NULL && tern_cpu_backend((tern_isa)-1) == NULL, "no such tier");
}

static void test_platform_environment_lowers_the_tier(void)
{
    tern_isa isa, wanted;
    for (wanted = TERN_ISA_SCALAR; wanted < TERN__ISA_END; wanted++) {
        platform_expect(test_tier_name[wanted], TERN_ISA_BEST, wanted);
        for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
            if (tern_cpu_backend(wanted)) platform_expect(test_tier_name[wanted], isa, wanted < isa ? wanted : isa);
    }
}

static void test_platform_bad_tiers(void)
{
    const int bad[] = {-1, TERN__ISA_END, 1000};
    tern_context_desc d = TERN_ZERO;
    tern_error e;
    char name[32], text[600];
    int i;
    CHECK(platform_open("sse9", &d, name, &e) == TERN_E_ARGUMENT, "%s", e.text);
    CHECK(strstr(e.text, "TERNARY_ISA=sse9 is not one of: scalar sse4.1 avx2") != NULL, "%s", e.text);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    CHECK(platform_open(text, &d, name, &e) == TERN_E_ARGUMENT, "%s", e.text);
    CHECK(strlen(e.text) == sizeof e.text - 1, "a long name is cut to the text's size, not to %d", (int)strlen(e.text));
    for (i = 0; i < 3; i++) {
        d.isa_max = (tern_isa)bad[i];
        CHECK(platform_open(NULL, &d, name, &e) == TERN_E_ARGUMENT, "%s", e.text);
        CHECK(strstr(e.text, "is not a tier") != NULL, "%s", e.text);
    }
    d.isa_max = TERN_ISA_BEST;
    d.backend = tern_cpu_backend(TERN_ISA_SCALAR);
    CHECK(platform_open("sse9", &d, name, &e) == TERN_OK && strcmp(name, "scalar") == 0, "a given backend asks no environment: %s", e.text);
}

#ifdef TEST_AMX
/* The kernel is asked for tiles when they are wanted and only then; where it refuses, there is no such tier. */
static void test_platform_asks_for_tiles(void)
{
    tern_isa isa;
    amx_asked = 0;
    for (isa = TERN_ISA_SCALAR; isa < TERN_ISA_AMX_INT8; isa++) {
        platform_expect(NULL, isa, isa);
        if (tern_cpu_backend(isa)) platform_expect(test_tier_name[isa], TERN_ISA_BEST, isa);
    }
    CHECK(amx_asked == 0, "asked %d times", amx_asked);
    if (!tern_cpu_backend(TERN_ISA_AVX512_VBMI)) {
        printf("  skipped: no tier amx-int8 here\n");
        return;
    }
    platform_expect(NULL, TERN_ISA_BEST, TERN_ISA_AMX_INT8);
    CHECK(amx_asked > 0, "not asked");
    amx_int8_alone = 1;
    CHECK(tern_cpu_backend(TERN_ISA_AMX_INT8) && !((const tern__kernels *)tern_cpu_backend(TERN_ISA_AMX_INT8)->data)->pairs,
          "pairs without AMX-BF16");
    amx_int8_alone = 0;
    CHECK(((const tern__kernels *)tern_cpu_backend(TERN_ISA_AMX_INT8)->data)->pairs != NULL, "no pairs");
    amx_refused = 1;
    CHECK(!tern_cpu_backend(TERN_ISA_AMX_INT8), "used in spite of the refusal");
    platform_expect(NULL, TERN_ISA_AMX_INT8, TERN_ISA_AMX_INT8);
    platform_expect(NULL, TERN_ISA_BEST, TERN_ISA_AVX512_VBMI);
    amx_refused = 0;
}
#endif

/* -- the pool -- */

typedef struct platform_job { int32_t hits[200]; int64_t weight; int64_t sum[200]; } platform_job;

static void platform_task(void *arg, int32_t index)
{
    platform_job *job = (platform_job *)arg;
    job->hits[index]++;
    job->sum[index] = job->weight * index;
}

/* Every index of every job is met exactly once, and run() returns only when all are done. */
static void test_platform_pool_runs_every_index(void)
{
    const int32_t threads[] = {1, 2, 3, 8};
    int32_t t, round, i, wrong = 0;
    for (t = 0; t < 4; t++) {
        tern_pool *pool = tern_pool_create(threads[t]);
        const tern_parallel p = tern_pool_parallel(pool);
        const int32_t counts[] = {0, 1, 2, threads[t] - 1, threads[t], threads[t] + 1, 64, 200};
        CHECK(p.workers == threads[t], "%d workers", (int)p.workers);
        for (round = 0; round < 400; round++) {
            platform_job job;
            const int32_t count = counts[round % 8];
            memset(&job, 0, sizeof job);
            job.weight = round + 1;
            p.run(p.user, platform_task, &job, count);
            for (i = 0; i < 200; i++) wrong += job.hits[i] != (i < count) || job.sum[i] != (i < count ? i * job.weight : 0);
        }
        tern_pool_destroy(pool);
    }
    CHECK(wrong == 0, "%d indices were missed or met twice", (int)wrong);
}

static void test_platform_pool_comes_and_goes(void)
{
    int32_t i;
    tern_pool_destroy(NULL);
    for (i = 0; i < 60; i++) {
        tern_pool *pool = tern_pool_create(1 + i % 4);
        platform_job job;
        memset(&job, 0, sizeof job);
        if (i % 3) tern_pool_parallel(pool).run(pool, platform_task, &job, 5);
        CHECK(job.hits[4] == (i % 3 != 0), "pool %d", (int)i);
        tern_pool_destroy(pool);
    }
}

static void test_platform_pool_sizes(void)
{
    tern_pool *pool = tern_pool_create(1000);
    CHECK(tern_pool_parallel(pool).workers == 64, "%d workers", (int)tern_pool_parallel(pool).workers);
    tern_pool_destroy(pool);
    pool = tern_pool_create(0);
    CHECK(tern_pool_parallel(pool).workers >= 1, "one worker per processor");
    tern_pool_destroy(pool);
    pool = tern_pool_create(-5);
    CHECK(tern_pool_parallel(pool).workers >= 1, "a negative number asks for the same");
    tern_pool_destroy(pool);
    CHECK(!tern_pool_parallel(NULL).run, "no pool, no threads");
}

static void test_platform_workers_in_range(void)
{
    const int32_t bad[] = {0, -1, 65};
    tern_context_desc d = TERN_ZERO;
    tern_pool *pool = tern_pool_create(2);
    tern_error e;
    char name[32], text[64];
    int i;
    d.parallel = tern_pool_parallel(pool);
    for (i = 0; i < 3; i++) {
        d.parallel.workers = bad[i];
        snprintf(text, sizeof text, "parallel.workers is %d", (int)bad[i]);
        CHECK(platform_open(NULL, &d, name, &e) == TERN_E_ARGUMENT && strstr(e.text, text), "%s", e.text);
    }
    tern_pool_destroy(pool);
}

/* -- the caller's floating-point mode: flush to zero, and rounding towards zero on top -- */

#if defined(__SSE2__)
static uint64_t platform_mode(void) { return _mm_getcsr() & 0xFFC0; } /* without the sticky flags */
static void platform_set_mode(uint64_t mode) { _mm_setcsr((unsigned)mode); }
static const uint64_t platform_plain = 0x1F80, platform_flush = 0x1F80 | 0x8040 | 0x6000;
#elif defined(__aarch64__)
static uint64_t platform_mode(void) { uint64_t mode; __asm__ volatile("mrs %0, fpcr" : "=r"(mode)); return mode; }
static void platform_set_mode(uint64_t mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
static const uint64_t platform_plain = 0, platform_flush = 1u << 24 | 3u << 22;
#else /* nothing to flush */
static uint64_t platform_mode(void) { return 0; }
static void platform_set_mode(uint64_t mode) { (void)mode; }
static const uint64_t platform_plain = 0, platform_flush = 0;
#endif

/* -- results: one hash for each operation of the inference path, and some of training -- */

enum { PLATFORM_ROWS = 49, PLATFORM_COLS = 130, PLATFORM_TOKENS = 9, PLATFORM_OUTPUTS = 16 };

static void platform_ternarize(tern_context *c, const float *w, tern_matrix *m, int32_t grain, uint64_t *h)
{
    tern_ternarize_args a = TERN_ZERO;
    size_t trits = 0, scales = 0;
    m->rows = PLATFORM_ROWS;
    m->cols = PLATFORM_COLS;
    m->grain = grain;
    CHECK_OK(c, tern_matrix_bytes(c, m, &trits, &scales));
    m->trits = tern_alloc(c, trits);
    m->scales = tern_alloc(c, scales);
    a.m = *m;
    a.w = w;
    CHECK_OK(c, tern_ternarize(c, &a));
    *h = test_hash_bytes(*h, m->trits, trits);
    *h = test_hash_floats(*h, (const float *)m->scales, (int64_t)(scales / 4));
}

/* Inputs of mixed size around `scale`; the operations run in the given mode and must leave it alone. */
static void platform_outputs(tern_context *c, float scale, uint64_t mode, uint64_t h[PLATFORM_OUTPUTS])
{
    enum { N = PLATFORM_ROWS * PLATFORM_COLS };
    const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 20};
    float *w, *x, *y, activation_scale[PLATFORM_TOKENS];
    int8_t *q;
    int32_t sums[PLATFORM_TOKENS * 16], i;
    int64_t stride = 0, groups = 0;
    for (i = 0; i < PLATFORM_OUTPUTS; i++) h[i] = TEST_HASH;
    test_seed = 7;
    w = test_floats(N);
    x = test_floats(PLATFORM_TOKENS * PLATFORM_COLS);
    y = test_floats(N);
    q = (int8_t *)calloc(1, N);
    for (i = 0; i < N; i++) w[i] *= scale;
    for (i = 0; i < PLATFORM_TOKENS * PLATFORM_COLS; i++) x[i] *= scale * (i % 3 ? 1e-3f : 1.0f);
    platform_set_mode(mode);
    mode = platform_mode(); /* emulators take less than was asked for */
    for (i = 0; i < 3; i++) {
        tern_matrix m = TERN_ZERO;
        tern_quantize_args qa = TERN_ZERO;
        tern_matmul_args ma = TERN_ZERO;
        platform_ternarize(c, w, &m, grains[i], &h[i]);
        CHECK_OK(c, tern_activation_shape(c, &m, &stride, &groups));
        qa.m = ma.m = m;
        qa.n = ma.n = PLATFORM_TOKENS;
        qa.x = x;
        qa.q = q;
        qa.scale = activation_scale;
        qa.sum = sums;
        qa.norm = i ? TERN_NORM_RMS : TERN_NORM_NONE;
        qa.eps = 1e-38f;
        CHECK_OK(c, tern_quantize(c, &qa));
        h[3] = test_hash_bytes(h[3], q, (size_t)(PLATFORM_TOKENS * stride));
        h[3] = test_hash_floats(h[3], activation_scale, PLATFORM_TOKENS);
        ma.q = q;
        ma.scale = activation_scale;
        ma.sum = sums;
        ma.y = y;
        CHECK_OK(c, tern_matmul(c, &ma));
        h[4] = test_hash_floats(h[4], y, PLATFORM_TOKENS * PLATFORM_ROWS);
        ma.q = NULL;
        ma.x = x;
        CHECK_OK(c, tern_matmul(c, &ma));
        h[5] = test_hash_floats(h[5], y, PLATFORM_TOKENS * PLATFORM_ROWS);
        tern_free(c, m.trits);
        tern_free(c, m.scales);
    }
    for (i = 0; i < 3; i++) {
        tern_sum_args a = TERN_ZERO;
        a.kind = (tern_sum_kind)i;
        a.count = N;
        a.x = w;
        a.y = y;
        CHECK_OK(c, tern_sum(c, &a));
        h[6] = test_hash_floats(h[6], y, 1);
    }
    for (i = 0; i <= TERN_MAP_GELU; i++) {
        tern_map_args a = TERN_ZERO;
        a.fn = (tern_map_fn)i;
        a.count = N;
        a.a = w;
        a.b = w;
        a.alpha = 0.25f;
        a.y = y;
        CHECK_OK(c, tern_map(c, &a));
        h[7] = test_hash_floats(h[7], y, N);
    }
    {
        tern_norm_args a = TERN_ZERO;
        a.n = PLATFORM_ROWS;
        a.cols = PLATFORM_COLS;
        a.x = w;
        a.y = y;
        a.eps = 1e-38f;
        CHECK_OK(c, tern_norm(c, &a));
        h[8] = test_hash_floats(h[8], y, N);
    }
    {
        tern_dense_args a = TERN_ZERO;
        a.m = a.n = PLATFORM_ROWS;
        a.k = PLATFORM_COLS;
        a.a = a.b = w;
        a.a_row = a.b_col = PLATFORM_COLS;
        a.a_col = a.b_row = 1;
        a.c = y;
        a.c_row = PLATFORM_ROWS;
        CHECK_OK(c, tern_dense(c, &a));
        h[9] = test_hash_floats(h[9], y, PLATFORM_ROWS * PLATFORM_ROWS);
    }
    {
        tern_fill_args a = TERN_ZERO;
        a.count = N;
        a.x = y;
        a.deviation = scale;
        a.seed = 5;
        CHECK_OK(c, tern_fill(c, &a));
        h[10] = test_hash_floats(h[10], y, N);
    }
    {
        tern_cast_args a = TERN_ZERO;
        a.count = N;
        a.src = w;
        a.dst = q;
        a.to = TERN_F16;
        a.count /= 2;
        CHECK_OK(c, tern_cast(c, &a));
        for (i = 0; i < N / 2; i++) h[11] = (h[11] ^ ((const uint16_t *)(const void *)q)[i]) * UINT64_C(1099511628211);
    }
    {
        tern_optimize_args a = TERN_ZERO;
        float *state = (float *)calloc(2 * N, sizeof(float)), norm2 = scale;
        a.kind = TERN_ADAMW;
        a.count = N;
        a.w = y;
        a.grad = w;
        a.moment1 = state;
        a.moment2 = state + N;
        a.norm2 = &norm2;
        a.clip = scale;
        a.rate = scale;
        a.beta1 = 0.9f;
        a.beta2 = 0.99f;
        a.eps = 1e-8f;
        a.decay = 0.1f;
        a.step = 1;
        CHECK_OK(c, tern_optimize(c, &a));
        h[12] = test_hash_floats(h[12], y, N);
        h[12] = test_hash_floats(h[12], state, 2 * N);
        free(state);
    }
    CHECK_OK(c, tern_sync(c));
    CHECK(platform_mode() == mode, "the mode has become %lx", (unsigned long)platform_mode());
    platform_set_mode(platform_plain);
    free(w);
    free(x);
    free(y);
    free(q);
}

/* Runs the tasks one after the other, last first. */
static void platform_backwards(void *user, tern_task task, void *arg, int32_t count)
{
    (void)user;
    while (count-- > 0) task(arg, count);
}

static void test_platform_results_do_not_depend_on_workers(void)
{
    const int32_t workers[] = {2, 3, 7, 64};
    uint64_t one[PLATFORM_OUTPUTS], many[PLATFORM_OUTPUTS];
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i, j;
    platform_outputs(t.c, 1.0f, platform_plain, one);
    test_close(&t);
    for (i = 0; i < 4; i++) {
        tern_context_desc d = TERN_ZERO;
        tern_context *c;
        d.parallel.run = platform_backwards;
        d.parallel.workers = workers[i];
        d.scratch = 1 << 20;
        CHECK_OK(NULL, tern_open(&c, &d, NULL));
        platform_outputs(c, 1.0f, platform_plain, many);
        for (j = 0; j < PLATFORM_OUTPUTS; j++) CHECK(one[j] == many[j], "output %d differs for %d workers", j, (int)workers[i]);
        tern_close(c);
    }
    for (i = 2; i <= 5; i++) {
        t = test_open(TERN_ISA_BEST, i);
        platform_outputs(t.c, 1.0f, platform_plain, many);
        for (j = 0; j < PLATFORM_OUTPUTS; j++) CHECK(one[j] == many[j], "output %d differs for a pool of %d", j, i);
        test_close(&t);
    }
}

static void test_platform_floating_point_mode(void)
{
    const float scales[] = {1.0f, 1e-18f, 1e-36f, 1e-40f};
    tern_isa isa;
    int i, j, threads;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (threads = 1; threads <= 3; threads += 2) {
            test_context t = test_open(isa, threads);
            for (i = 0; t.c && i < 4; i++) {
                uint64_t plain[PLATFORM_OUTPUTS], flushed[PLATFORM_OUTPUTS];
                platform_outputs(t.c, scales[i], platform_plain, plain);
                platform_outputs(t.c, scales[i], platform_flush, flushed);
                for (j = 0; j < PLATFORM_OUTPUTS; j++)
                    CHECK(plain[j] == flushed[j],
                          "%s: output %d depends on the mode at scale %g", test_tier_name[isa], j, (double)scales[i]);
            }
            test_close(&t);
        }
}

static void suite_platform(void)
{
    RUN(test_platform_desc_chooses_the_tier);
    RUN(test_platform_environment_lowers_the_tier);
    RUN(test_platform_bad_tiers);
#ifdef TEST_AMX
    RUN(test_platform_asks_for_tiles);
#endif
    RUN(test_platform_pool_runs_every_index);
    RUN(test_platform_pool_comes_and_goes);
    RUN(test_platform_pool_sizes);
    RUN(test_platform_workers_in_range);
    RUN(test_platform_results_do_not_depend_on_workers);
    RUN(test_platform_floating_point_mode);
}
