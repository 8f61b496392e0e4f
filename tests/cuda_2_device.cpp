/* Tests of [CUDA-2] in ternary_cuda.cu. */

/* A context of the test's own on a device. */
struct opened {
    tern_context *c = nullptr;
    tern_error error = {};
    tern_result result;
    explicit opened(const tern_backend *backend, tern_allocator allocator = {})
    {
        tern_context_desc desc = {};
        desc.backend = backend;
        desc.allocator = allocator;
        result = tern_open(&c, &desc, &error);
    }
    opened(const opened &) = delete;
    opened &operator=(const opened &) = delete;
    ~opened() { tern_close(c); }
    bool failed(tern_result code, const char *part) const
    {
        if (!c && result == code && error.code == code && strstr(error.text, part)) return true;
        printf("  result %d: \"%s\"\n", result, error.text);
        return false;
    }
};

/* Whether the context's last call failed with this code and words. */
static bool test_failed_with(const tern_context *c, tern_result result, tern_result code, const char *part)
{
    if (result == code && strstr(tern_last_error(c)->text, part)) return true;
    printf("  result %d: \"%s\"\n", result, tern_last_error(c)->text);
    return false;
}

static tern_result test_add(tern_context *c, int64_t n, const float *a, const float *b, float *y)
{
    tern_map_args m = {};
    m.fn = TERN_MAP_ADD;
    m.count = n;
    m.alpha = 1.0f;
    m.a = a; m.b = b; m.y = y;
    return tern_map(c, &m);
}

/* Rows of three floats; an id of a table of five that is out of range is a fault. */
static tern_result test_gather(tern_context *c, int64_t n, const float *w, const int32_t *ids, float *y)
{
    tern_gather_args g = {};
    g.m.rows = 5; g.m.cols = 3;
    g.w = w;
    g.n = n;
    g.ids = ids;
    g.y = y;
    return tern_gather(c, &g);
}

static tern_result test_norm(tern_context *c, int64_t n, const float *x, float *y)
{
    tern_norm_args a = {};
    a.n = n; a.cols = 3;
    a.x = x;
    a.eps = 1e-6f;
    a.y = y;
    return tern_norm(c, &a);
}

/* -- what can be refused -- */

static void test_cuda_no_such_device()
{
    const opened below(tern_cuda_backend(-1)), beyond(tern_cuda_backend(TERN__GPUS)), other(tern_cuda_backend_checked(0, TERN_LAYOUT + 1));
    CHECK(below.failed(TERN_E_DEVICE, "cuda: there is no such device; "));
    CHECK(beyond.failed(TERN_E_DEVICE, "can be used, counted from 0"));
    CHECK(other.failed(TERN_E_VERSION, "cuda: the caller's ternary.h is another version"));
    CHECK(!tern_cuda_stream(test_context[CPU]) && !tern_cuda_stream(nullptr) && tern_cuda_stream(test_context[GPU]));
    CHECK(!strcmp(tern_backend_name(test_context[GPU]), "cuda"));
}

/* Operations that read or write 16 bytes at a time say so; the others take packed trits anywhere. */
static void test_cuda_misaligned()
{
    mirror<float> w(16 * 64, test_uniform), y(64);
    mirror<int8_t> trits(2048), scales(64), q(256), plain(16 * 64);
    mirror<int32_t> sum(4);
    tern_context *c = test_context[GPU];
    const char *const expected = "is not aligned to 16 bytes";
    tern_matrix m = {};
    m.rows = 16; m.cols = 64;
    m.grain = TERN_PER_ROW;
    m.trits = trits[GPU] + 1;
    m.scales = scales[GPU];
    tern_ternarize_args t = {};
    t.m = m; t.w = w[GPU];
    tern_pack_args p = {};
    p.m = m; p.trits = plain[GPU];
    tern_unpack_args u = {};
    u.m = m; u.count = 1; u.trits = plain[GPU];
    tern_matmul_args a = {};
    a.m = m; a.n = 1; a.y = y[GPU];
    tern_quantize_args z = {};
    z.m = m; z.n = 1; z.x = w[GPU]; z.q = q[GPU] + 4; z.scale = y[GPU]; z.sum = sum[GPU];
    CHECK(test_failed_with(c, tern_ternarize(c, &t), TERN_E_ALIGNMENT, expected));
    CHECK(test_failed_with(c, tern_pack(c, &p), TERN_E_ALIGNMENT, expected));
    CHECK(test_failed_with(c, tern_unpack(c, &u), TERN_E_ALIGNMENT, expected));
    a.m.trits = trits[GPU];
    a.q = q[GPU] + 4; a.scale = y[GPU]; a.sum = sum[GPU];
    CHECK(test_failed_with(c, tern_matmul(c, &a), TERN_E_ALIGNMENT, expected));
    a.m.trits = trits[GPU] + 1;
    a.q = q[GPU];
    CHECK(test_failed_with(c, tern_matmul(c, &a), TERN_E_ALIGNMENT, expected));
    CHECK(test_failed_with(c, tern_quantize(c, &z), TERN_E_ALIGNMENT, expected));
}

/* -- faults of data -- */

static void test_cuda_first_fault()
{
    mirror<float> w(15, test_uniform), x(15, test_uniform), y(15);
    mirror<int32_t> bad(4), good(4);
    const int32_t ids[] = {1, 9, -1, 0};
    for (int i = 0; i < 4; i++) bad[CPU][i] = ids[i];
    bad.send();
    x[CPU][5] = NAN; /* row 1 */
    x.send();
    const auto in_order = [&](int first, int second) {
        test_both([&](tern_context *c, int side) {
            for (int which : {first, second}) {
                if (which == 0) TERN__TRY(test_gather(c, 4, w[side], bad[side], y[side]));
                if (which == 1) TERN__TRY(test_gather(c, 3, w[side], bad[side] + 1, y[side]));
                if (which == 2) TERN__TRY(test_norm(c, 5, x[side], y[side]));
                if (which == 3) TERN__TRY(test_gather(c, 4, w[side], good[side], y[side]));
            }
            return TERN_OK;
        });
    };
    for (int first = 0; first < 4; first++)
        for (int second = 0; second < 4; second++) in_order(first, second);
    tern_context *c = test_context[GPU];
    CHECK_OK(test_gather(c, 4, w[GPU], bad[GPU], y[GPU]));
    CHECK(test_failed_with(c, tern_sync(c), TERN_E_DATA, "ids[1]"));
    CHECK_OK(tern_sync(c));
}

/* What the CPU refuses at once has its place among the faults. */
static void test_cuda_first_refusal()
{
    mirror<float> x(8, test_uniform), y(8);
    mirror<uint16_t> half(8);
    mirror<int32_t> bad(1, [] { return -7; });
    tern_context *c = test_context[GPU];
    tern_cast_args a = {};
    a.count = 8;
    a.to = TERN_F16;
    a.src = x[GPU]; a.dst = half[GPU];
    a.finite = 1;
    x[CPU][6] = INFINITY;
    x.send();
    CHECK_OK(tern_cast(c, &a));
    CHECK_OK(test_gather(c, 1, x[GPU], bad[GPU], y[GPU]));
    CHECK(test_failed_with(c, tern_sync(c), TERN_E_NONFINITE, "cast: element 6 is not finite"));
    CHECK_OK(test_gather(c, 1, x[GPU], bad[GPU], y[GPU]));
    CHECK_OK(tern_cast(c, &a));
    CHECK(test_failed_with(c, tern_sync(c), TERN_E_DATA, "gather: ids[0]"));
    CHECK_OK(tern_sync(c));
}

/* The order of operations is counted to 65535; all later ones are one. */
static void test_cuda_many_operations()
{
    mirror<float> w(15, test_uniform), y(15);
    mirror<int32_t> bad(3);
    bad[CPU][2] = 5;
    bad.send();
    tern_context *c = test_context[GPU];
    tern__gpu *d = tern__gpu_of(&c->run);
    d->order = 0xFFFF - 3;
    for (int i = 0; i < 6; i++) CHECK_OK(test_gather(c, 1, w[GPU], bad[GPU], y[GPU]));
    CHECK_OK(test_gather(c, 3, w[GPU], bad[GPU], y[GPU]));
    CHECK(d->order == 0xFFFF + 4);
    CHECK(test_failed_with(c, tern_sync(c), TERN_E_DATA, "ids[2]"));
    CHECK_OK(test_gather(c, 3, w[GPU], bad[GPU], y[GPU]));
    d->order = (int64_t)1 << 40;
    CHECK_OK(test_gather(c, 1, w[GPU], bad[GPU] + 2, y[GPU]));
    CHECK(test_failed_with(c, tern_sync(c), TERN_E_DATA, "ids[2]"));
    CHECK(d->order == 0);
}

/* Every fault and refusal has a kind of its own and its words, at the largest index too. */
static void test_cuda_fault_texts()
{
    tern_context *c = test_context[GPU];
    tern__gpu *d = tern__gpu_of(&c->run);
    for (int kind = 0; kind < TERN__REFUSALS_END; kind++)
        for (int64_t index : {(int64_t)0, (int64_t)12345678901, ((int64_t)1 << TERN__INDEX_BITS) - 1}) {
            const bool matrix = kind == TERN__REFUSED_WEIGHT || kind == TERN__REFUSED_TRIT;
            const tern__key key = tern__blame_of(d, kind).key | (tern__key)index;
            char place[64];
            snprintf(place, sizeof place, matrix ? "[%lld][%lld]" : "%lld",
                     (long long)(matrix ? index >> 18 : index), (long long)(index & 0x3FFFF));
            CHECK(kind < 1 << TERN__KIND_BITS);
            CHECK_OK(tern_copy(c, d->fault, &key, sizeof key, TERN_TO_DEVICE));
            const tern_result result = tern_sync(c);
            CHECK(test_failed_with(c, result, tern_last_error(c)->code, place));
            CHECK(result != TERN_OK && (result == TERN_E_DATA) == (kind < TERN__FAULTS_END));
            CHECK_OK(tern_sync(c));
        }
}

/* -- contexts beside each other -- */

static void test_cuda_contexts_beside_each_other()
{
    const int64_t n = 100;
    mirror<float> a(n, test_uniform), b(n, test_uniform), y(n);
    mirror<int32_t> bad(1, [] { return 5; });
    const opened other(test_backend());
    CHECK(other.result == TERN_OK && tern_cuda_stream(other.c) != tern_cuda_stream(test_context[GPU]));
    float *x = (float *)tern_alloc(other.c, n * 4), *z = (float *)tern_alloc(other.c, n * 4);
    std::vector<float> back(n);
    CHECK(tern_copy(other.c, x, a[CPU], n * 4, TERN_TO_DEVICE) == TERN_OK);
    for (int i = 0; i < 5; i++) { /* y = y + a + b; z = z + x */
        test_both([&](tern_context *c, int side) {
            TERN__TRY(test_add(c, n, y[side], a[side], y[side]));
            return test_add(c, n, y[side], b[side], y[side]);
        });
        CHECK(test_add(other.c, n, z, x, z) == TERN_OK);
        CHECK_OK(test_gather(test_context[GPU], 1, b[GPU], bad[GPU], a[GPU]));
        CHECK_OK(tern_copy(test_context[GPU], a[GPU], a[CPU], n * 4, TERN_TO_DEVICE));
        CHECK(tern_sync(other.c) == TERN_OK); /* the fault is the other's */
        CHECK(tern_sync(test_context[GPU]) == TERN_E_DATA);
    }
    CHECK_SAME(y);
    CHECK(tern_copy(other.c, back.data(), z, n * 4, TERN_TO_HOST) == TERN_OK);
    for (int64_t i = 0; i < n; i++) CHECK(back[(size_t)i] == (((a[CPU][i] + a[CPU][i]) + a[CPU][i]) + a[CPU][i]) + a[CPU][i]);
    tern_free(other.c, x);
    tern_free(other.c, z);
}

#ifdef TEST_CUDA_H

static void test_cuda_devices_that_cannot_be_used()
{
    const size_t blocks = test_cuda.memory.size();
    test_cuda.devices = 0;
    CHECK(opened(tern_cuda_backend(0)).failed(TERN_E_DEVICE, "cuda: looking for devices: no CUDA-capable device is detected"));
    test_cuda.devices = 1;
    CHECK(opened(tern_cuda_backend(1)).failed(TERN_E_DEVICE, "cuda: there is no such device; 1 can be used, counted from 0"));
    test_cuda.capability = 70;
    CHECK(opened(tern_cuda_backend(0)).failed(TERN_E_UNSUPPORTED, "cuda: device 0 has compute capability 7.0; 7.5 is the least"));
    test_cuda.capability = 75;
    CHECK(opened(tern_cuda_backend(0)).result == TERN_OK);
    test_cuda.capability = 90;
    CHECK(test_cuda.memory.size() == blocks && cudaGetLastError() == cudaSuccess);
}

/* -- every call of the runtime that fails -- */

static long test_blocks, test_allocations_left = -1; /* of the host */

static tern_allocator test_allocator()
{
    tern_allocator a = {};
    a.alloc = [](void *, size_t bytes) -> void * {
        return cuda_counted_down(test_allocations_left) ? nullptr : (test_blocks++, malloc(bytes));
    };
    a.free = [](void *, void *p) { test_blocks--, free(p); };
    return a;
}

/* Lets all calls through for a while. */
struct test_no_failures {
    long left = std::exchange(test_cuda.call_countdown, -1);
    test_no_failures() {}
    ~test_no_failures() { test_cuda.call_countdown = left; }
};

/* Runs the body with each call failing that it makes, until it makes no more: it must fail, with words. */
template <typename Body> static void test_each_failing(long *countdown, int64_t stride_after_40, Body body)
{
    for (long k = 0;; k += k < 40 ? 1 : stride_after_40) {
        tern_error error = {};
        *countdown = k;
        const tern_result result = body(&error);
        const bool fired = *countdown < 0;
        *countdown = -1;
        if (!fired) {
            CHECK(result == TERN_OK && k > 0);
            return;
        }
        if (result == TERN_OK || strlen(error.text) < 8)
            printf("  call %ld failed: result %d, \"%s\"\n", k, result, error.text), test_errors++;
        CHECK(result == TERN_E_DEVICE || result == TERN_E_MEMORY);
        CHECK(cudaGetLastError() == cudaSuccess);
    }
}

static tern_result test_open_and_close(tern_error *error)
{
    opened o(tern_cuda_backend(0), test_allocator());
    const test_no_failures closing;
    *error = o.error;
    tern_close(o.c);
    o.c = nullptr;
    return o.result;
}

static void test_cuda_failures_of_open()
{
    const size_t blocks = test_cuda.memory.size();
    test_each_failing(&test_cuda.malloc_countdown, 1, test_open_and_close);
    test_each_failing(&test_allocations_left, 1, test_open_and_close);
    test_each_failing(&test_cuda.call_countdown, 997, test_open_and_close);
    CHECK(test_cuda.memory.size() == blocks && test_blocks == 0);
    CHECK(opened(tern_cuda_backend(0)).result == TERN_OK);
}

/* From another device, so that it has to be chosen and left. */
static void test_cuda_failures_afterwards()
{
    const int64_t n = 33;
    test_cuda.devices = 2;
    cudaSetDevice(1);
    const size_t blocks = test_cuda.memory.size();
    {
        mirror<float> a(n, test_uniform), b(n, test_uniform), y(n);
        mirror<int32_t> bad(1, [] { return 5; });
        std::vector<float> host(n);
        tern_context *c = test_context[GPU];
        const auto each = [&](auto call) {
            test_each_failing(&test_cuda.call_countdown, 1, [&](tern_error *error) {
                const tern_result result = call();
                *error = *tern_last_error(c);
                const test_no_failures again;
                CHECK(test_cuda.device == 1 || strstr(error->text, "caller's device"));
                cudaSetDevice(1);
                return result;
            });
        };
        each([&] { return test_add(c, n, a[GPU], b[GPU], y[GPU]); });
        each([&] { return tern_copy(c, y[GPU], a[CPU], n * 4, TERN_TO_DEVICE); });
        each([&] { return tern_copy(c, host.data(), y[GPU], n * 4, TERN_TO_HOST); });
        each([&] { return tern_copy(c, y[GPU], b[GPU], n * 4, TERN_ON_DEVICE); });
        each([&] { return tern_sync(c); });
        each([&] {
            void *p = tern_alloc(c, 100);
            const test_no_failures again;
            tern_free(c, p);
            return p ? TERN_OK : tern_last_error(c)->code;
        });
        /* A fault is told once, by the first sync that comes through. */
        for (long k = 0, told = 0; told == 0; k++) {
            CHECK_OK(test_gather(c, 1, a[GPU], bad[GPU], y[GPU]));
            test_cuda.call_countdown = k;
            const tern_result result = tern_sync(c);
            told = test_cuda.call_countdown >= 0;
            test_cuda.call_countdown = -1;
            CHECK(result == (told ? TERN_E_DATA : TERN_E_DEVICE));
            if (!told) CHECK(test_failed_with(c, tern_sync(c), TERN_E_DATA, "ids[0]"));
            CHECK_OK(tern_sync(c));
        }
        /* Memory goes whatever fails. */
        for (long k = 0; k < 4; k++) {
            opened o(test_backend(), test_allocator());
            void *p = tern_alloc(o.c, 64);
            CHECK(o.result == TERN_OK && p);
            test_cuda.call_countdown = k;
            tern_free(o.c, p);
            test_cuda.call_countdown = k;
            tern_close(o.c);
            o.c = nullptr;
            test_cuda.call_countdown = -1;
            cudaGetLastError();
            cudaSetDevice(1);
        }
        test_both([&](tern_context *t, int side) { return test_add(t, n, a[side], b[side], y[side]); });
        CHECK_SAME(y);
    }
    CHECK(test_cuda.memory.size() == blocks && test_blocks == 0 && test_cuda.device == 1);
    cudaSetDevice(0);
    test_cuda.devices = 1;
}

/* An error that the program left behind is told before the operation and not taken for its own. */
static void test_cuda_error_of_the_caller()
{
    mirror<float> a(5, test_uniform), b(5, test_uniform), y(5);
    tern_context *c = test_context[GPU];
    CHECK(cudaMemcpy(a[GPU], b[CPU], 1 << 20, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    const long launches = test_cuda.launches;
    CHECK(test_failed_with(c, test_add(c, 5, a[GPU], b[GPU], y[GPU]), TERN_E_DEVICE, "cuda: before map: "));
    CHECK(test_cuda.launches == launches);
    test_both([&](tern_context *t, int side) { return test_add(t, 5, a[side], b[side], y[side]); });
    CHECK_SAME(y);
}

/* -- devices beside each other, and work in the queue -- */

static void test_cuda_two_devices()
{
    const int64_t n = 50;
    test_cuda.devices = 2;
    {
        const opened one(tern_cuda_backend(1));
        mirror<float> a(n, test_uniform), b(n, test_uniform), y(n);
        std::vector<float> back(n);
        CHECK(one.result == TERN_OK && test_cuda.device == 0);
        for (int caller = 0; caller < 2; caller++) {
            cudaSetDevice(caller);
            float *x = (float *)tern_alloc(one.c, n * 4), *z = (float *)tern_alloc(one.c, n * 4);
            CHECK(test_cuda.memory[(const char *)z].device == 1 && test_cuda.device == caller);
            CHECK(tern_copy(one.c, x, a[CPU], n * 4, TERN_TO_DEVICE) == TERN_OK && test_cuda.device == caller);
            CHECK(tern_copy(one.c, z, b[CPU], n * 4, TERN_TO_DEVICE) == TERN_OK);
            CHECK(test_add(one.c, n, x, z, z) == TERN_OK && test_cuda.device == caller);
            test_both([&](tern_context *c, int side) { return test_add(c, n, a[side], b[side], y[side]); });
            CHECK(test_cuda.device == caller && test_cuda.memory[(const char *)y[GPU]].device == 0);
            CHECK_SAME(y);
            CHECK(tern_copy(one.c, back.data(), z, n * 4, TERN_TO_HOST) == TERN_OK && tern_sync(one.c) == TERN_OK);
            CHECK(memcmp(back.data(), y[CPU], n * 4) == 0 && test_cuda.device == caller);
            tern_free(one.c, x);
            tern_free(one.c, z);
            CHECK(test_cuda.device == caller);
        }
    }
    CHECK(test_cuda.device == 1);
    cudaSetDevice(0);
    test_cuda.devices = 1;
}

/* Nothing waits but copies to and from the host, memory and tern_sync, and those see all that was queued. */
static void test_cuda_work_in_the_queue()
{
    const int64_t n = 40;
    tern_context *c = test_context[GPU];
    mirror<float> a(n, test_uniform), b(n, test_uniform), y(n), z(n);
    mirror<int32_t> bad(1, [] { return 5; });
    test_cuda.lazy = true;
    const long launches = test_cuda.launches;
    for (int side : {CPU, GPU})
        for (int i = 0; i < 3; i++) {
            CHECK(test_add(test_context[side], n, y[side], a[side], y[side]) == TERN_OK);
            CHECK(tern_copy(test_context[side], z[side], y[side], n * 4, TERN_ON_DEVICE) == TERN_OK);
        }
    CHECK(test_cuda.launches == launches);
    CHECK_SAME(z);
    CHECK(test_cuda.launches > launches);
    CHECK_OK(test_gather(c, 1, a[GPU], bad[GPU], y[GPU]));
    CHECK(tern_sync(c) == TERN_E_DATA);
    CHECK_OK(test_gather(c, 1, a[GPU], bad[GPU], y[GPU]));
    void *fresh = tern_alloc(c, 64);
    std::vector<char> back(64, 1);
    CHECK_OK(tern_copy(c, back.data(), fresh, 64, TERN_TO_HOST));
    CHECK(back == std::vector<char>(64, 0));
    CHECK_OK(test_add(c, 16, (float *)fresh, a[GPU], (float *)fresh));
    tern_free(c, fresh); /* used to the end */
    CHECK(tern_sync(c) == TERN_E_DATA);
    {
        const opened o(test_backend());
        CHECK(test_gather(o.c, 1, a[GPU], bad[GPU], y[GPU]) == TERN_OK); /* closed with work queued */
    }
    test_cuda.lazy = false;
}

#endif

static void suite_cuda_device()
{
    RUN_ONCE(test_cuda_no_such_device);
    RUN_ONCE(test_cuda_misaligned);
    RUN(test_cuda_first_fault);
    RUN(test_cuda_first_refusal);
    RUN_ONCE(test_cuda_many_operations);
    RUN_ONCE(test_cuda_fault_texts);
    RUN(test_cuda_contexts_beside_each_other);
#ifdef TEST_CUDA_H
    RUN_ONCE(test_cuda_devices_that_cannot_be_used);
    RUN_ONCE(test_cuda_failures_of_open);
    RUN_ONCE(test_cuda_failures_afterwards);
    RUN_ONCE(test_cuda_error_of_the_caller);
    RUN_ONCE(test_cuda_two_devices);
    RUN(test_cuda_work_in_the_queue);
#endif
}
