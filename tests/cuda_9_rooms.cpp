/* Tests of [CUDA-9] in ternary_cuda.cu: rooms 17, 18 and 20 of ternary.h on its table, forward, backward and steps. */

/* -- a network without floats that last -- */

enum { WITH_VOTES = TERN_FOR_FLIPS | 1 << TERN_VOTES };

struct flipping_params {
    both_params table{network::CLASSES, network::WIDTH, TERN_ABSMEAN, TERN_FOR_FLIPS, TERN_PER_ROW, TERN_BASE3};
    both_params attend{network::QKV, network::WIDTH, TERN_ABSMEAN, WITH_VOTES, TERN_PER_TENSOR, TERN_2BIT, TERN_POW2};
    both_params out{network::WIDTH, network::WIDTH, TERN_TWN, TERN_FOR_FLIPS};
    both_params up{network::HIDDEN, network::WIDTH, TERN_ABSMEAN, WITH_VOTES, TERN_PER_ROW, TERN_2BIT, TERN_POW2};
    both_params down{network::WIDTH, network::HIDDEN, TERN_ABSMEAN_SIGMA, TERN_FOR_FLIPS, 16, TERN_BASE3, TERN_F16};
    both_params head{network::CLASSES, network::WIDTH, TERN_ABSMEAN, WITH_VOTES, 7, TERN_2BIT, TERN_POW2};
    both_params gain{1, network::WIDTH, TERN_DENSE, TERN_FOR_ADAMW}, bias{1, network::HIDDEN, TERN_DENSE, TERN_FOR_ADAMW};
    both_params *all[network::PARAMS] = {&table, &attend, &out, &up, &down, &head, &gain, &bias};
    bool same() const
    {
        for (const both_params *p : all)
            if (!p->same()) return false;
        return true;
    }
};

/* Whole trainings on both, of fused products too: every buffer of a checkpoint has the same bytes after each step. */
static void test_cuda_flip_training()
{
    test_fuse(true);
    for (tern_flip_rule rule : {TERN_FLIP_PROPORTIONAL, TERN_FLIP_SIGN}) {
        flipping_params params;
        network cpu(test_context[CPU], params.all), gpu(test_context[GPU], params.all);
        mirror<int64_t> counts(sizeof(tern_flips) / sizeof(int64_t));
        CHECK(params.same());
        cpu.exact = gpu.exact = 1;
        for (uint32_t step = 1; step <= 5; step++) {
            test_both([&](tern_context *, int side) {
                network &net = side == GPU ? gpu : cpu;
                tern_step s = {};
                s.flip = rule;
                s.push = 8.0f;
                s.sign_step = 7;
                s.scale_step = 9;
                s.flips = (tern_flips *)counts[side];
                for (tern_linear &l : net.layer) l.seed = (uint64_t)step << 32 | (uint64_t)(&l - net.layer);
                TERN__TRY(net.feed(step));
                TERN__TRY(net.forward());
                TERN__TRY(net.backward());
                return net.step(step, TERN_ADAMW, 0.0f, s);
            });
            CHECK(same_floats(gpu.losses, cpu.losses, network::TOKENS));
            CHECK(same_floats(gpu.dh0, cpu.dh0, network::TOKENS * network::WIDTH));
            CHECK(params.same());
        }
        CHECK_SAME(counts);
        const tern_flips *got = (const tern_flips *)counts[CPU];
        CHECK(got->updates == 30 && got->skipped == 0 && got->flips > 0 && got->scales > 0);
    }
}

/* -- parameters of a layer on both sides -- */

struct side_params {
    std::vector<both_params *> all;
    ~side_params() { for (both_params *p : all) delete p; }
    both_params *add(int64_t rows, int64_t cols, tern_rule rule, int32_t mask, int32_t grain, tern_type encoding)
    {
        const bool flips = mask == TERN_FOR_FLIPS && rule != TERN_DENSE;
        all.push_back(new both_params(rows, cols, rule, flips ? mask : TERN_FOR_ADAMW, rule == TERN_DENSE ? 0 : grain, encoding));
        for (tern_param &p : all.back()->at) snprintf(p.name, sizeof p.name, "p%zu", all.size());
        return all.back();
    }
    bool same() const
    {
        for (const both_params *p : all)
            if (!p->same()) return false;
        return true;
    }
    tern_result step(tern_context *c, int side) const
    {
        std::vector<tern_param *> items;
        for (both_params *p : all) items.push_back(&p->at[side]);
        const tern_model m = {items.data(), (int32_t)items.size()};
        tern_step s = {};
        s.rate = 0.01f;
        s.clip = 1.0f;
        s.push = 8.0f;
        s.step = 1;
        return tern_model_step(c, &m, &s);
    }
};
static tern_param *at(both_params *p, int side) { return p ? &p->at[side] : nullptr; }

/* -- mixtures of experts -- */

struct moe_case {
    int32_t count, top_k, cols, width, gated, always, low; /* low: rank, negative for a ternary one */
    tern_rule rule;
    int32_t grain;
    tern_type encoding;
    tern_act act;
    tern_map_fn fn;
    tern_route_kind weights;
    tern_norm_kind norm, inner;
    tern_rule router;
    int32_t mask;
};
static const moe_case moe_cases[] = {
    {4, 2, 21, 13, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_ADD, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_ADAMW},
    {3, 1, 17, 30, 0, 9, 0, TERN_ABSMEAN, 8, TERN_BASE3, TERN_ACT_INT8,
     TERN_MAP_RELU2, TERN_ROUTE_ALL, TERN_NORM_NONE, TERN_NORM_RMS, TERN_ABSMEAN, TERN_FOR_ADAMW},
    {8, 8, 33, 16, 1, 40, 0, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_FLOAT,
     TERN_MAP_GELU, TERN_ROUTE_RENORMALIZED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE, TERN_FOR_ADAMW},
    {4, 2, 21, 18, 1, 0, 5, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE, TERN_FOR_ADAMW},
    {6, 3, 19, 14, 0, 10, -4, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8,
     TERN_MAP_GELU, TERN_ROUTE_ALL, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_ADAMW},
    {5, 2, 40, 20, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT4,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_ABSMEAN, TERN_FOR_FLIPS},
};

struct moe_pair {
    side_params params;
    std::vector<tern_expert> experts[2];
    std::vector<tern_param *> low_a[2], low_b[2];
    tern_expert always[2];
    tern_moe m[2];
    static void expert(const moe_case &t, side_params *p, int32_t width, tern_expert out[2])
    {
        both_params *gate = t.gated ? p->add(width, t.cols, t.rule, t.mask, t.grain, t.encoding) : nullptr;
        both_params *up = p->add(width, t.cols, t.rule, t.mask, t.grain, t.encoding),
                    *down = p->add(t.cols, width, t.rule, t.mask, t.grain, t.encoding);
        for (int side = CPU; side <= GPU; side++) out[side] = {at(gate, side), at(up, side), at(down, side)};
    }
    explicit moe_pair(const moe_case &t)
    {
        both_params *router = params.add(t.count, t.cols, t.router, t.mask, t.grain, t.encoding);
        both_params *gain = t.norm ? params.add(1, t.cols, TERN_DENSE, t.mask, 0, t.encoding) : nullptr;
        tern_expert e[2];
        for (int32_t i = 0; i < (t.low ? 1 : t.count); i++) {
            expert(t, &params, t.width, e);
            for (int side = CPU; side <= GPU; side++) experts[side].push_back(e[side]);
        }
        for (int32_t i = 0; t.low && i < t.count; i++) {
            const tern_rule rule = t.low < 0 ? TERN_ABSMEAN : TERN_DENSE;
            both_params *a = params.add(abs(t.low), t.cols, rule, t.mask, t.grain, t.encoding),
                        *b = params.add(t.width, abs(t.low), rule, t.mask, t.grain, t.encoding);
            for (int side = CPU; side <= GPU; side++) low_a[side].push_back(at(a, side)), low_b[side].push_back(at(b, side));
        }
        if (t.always) expert(t, &params, t.always, always);
        for (int side = CPU; side <= GPU; side++) {
            tern_moe *o = &m[side];
            *o = {};
            o->router.w = at(router, side);
            o->router.norm = o->norm = t.norm;
            o->router.act = o->act = t.act;
            o->gain = at(gain, side);
            o->experts = experts[side].data();
            o->count = t.count;
            o->top_k = t.top_k;
            o->weights = t.weights;
            o->fn = t.fn;
            o->inner = t.inner;
            o->always = t.always ? &always[side] : nullptr;
            if (t.low) o->low_a = low_a[side].data(), o->low_b = low_b[side].data();
            o->balance = 0.1f;
            o->seed = 77;
        }
    }
};

static void test_moe(const moe_case &t, int64_t n, tern_dispatch dispatch)
{
    moe_pair p(t);
    tern_need need[2] = {};
    for (int side = CPU; side <= GPU; side++) {
        p.m[side].dispatch = dispatch;
        CHECK(tern_moe_need(test_context[side], &p.m[side], n, &need[side]) == TERN_OK
              && tern_reserve(test_context[side], need[side].scratch) == TERN_OK);
    }
    CHECK(need[CPU].saved == need[GPU].saved);
    mirror<float> x(n * t.cols, test_uniform), y(n * t.cols), z(n * t.cols), dy(n * t.cols, test_uniform), dx(n * t.cols);
    mirror<int8_t> saved((int64_t)need[GPU].saved);
    if (n > 4) x[CPU][3 * t.cols + 1] = test_nan; /* a token that goes to no expert */
    x.send();
    test_both([&](tern_context *c, int side) {
        TERN__TRY(tern_moe_forward(c, &p.m[side], n, x[side], y[side], nullptr));
        return tern_moe_forward(c, &p.m[side], n, x[side], z[side], saved[side]);
    });
    CHECK_SAME(y);
    CHECK_SAME(z);
    if (n > 4) x[CPU][3 * t.cols + 1] = 0.5f;
    x.send();
    test_both([&](tern_context *c, int side) {
        TERN__TRY(tern_moe_forward(c, &p.m[side], n, x[side], z[side], saved[side]));
        TERN__TRY(tern_moe_backward(c, &p.m[side], n, x[side], saved[side], dy[side], dx[side]));
        return p.params.step(c, side);
    });
    CHECK_SAME(z);
    CHECK_SAME(dx);
    CHECK(p.params.same());
}

static void test_cuda_moe()
{
    int i = 0;
    test_fuse(false);
    for (const moe_case &t : moe_cases)
        for (tern_dispatch dispatch : {TERN_DISPATCH_DENSE, TERN_DISPATCH_SPARSE}) test_moe(t, i++ % 3 ? 19 : 1, dispatch);
    test_moe(moe_cases[0], 300, TERN_DISPATCH_AUTO); /* in parts */
}

/* Of few tokens, in one launch and by its parts on a table without the operation: the same bits, what is saved among them, and the same
   faults, as on the CPU. bad: no token (0), one with NaN, or one that is too large. Seen to fail: turns of more than eight places,
   loads that are wrong, sums that do not end with a segment, a fault of another kind. */
enum { MOE_GOOD, MOE_NAN, MOE_HUGE };
struct fused_moe { moe_case c; int64_t n; int bad; long launches; };
static const fused_moe fused_moes[] = {
    {{1, 1, 1, 1, 0, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
      TERN_MAP_RELU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 1, MOE_GOOD, 1},
    {{3, 2, 20, 17, 0, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8, /* at the router */
      TERN_MAP_GELU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_RMS, TERN_DENSE, TERN_FOR_INFERENCE}, 6, MOE_NAN, 1},
    {{40, 8, 127, 33, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
      TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 16, MOE_NAN, 1},
    {{9, 3, 600, 70, 1, 20, 0, TERN_ABSMEAN, 40, TERN_BASE3, TERN_ACT_INT8,
      TERN_MAP_GELU, TERN_ROUTE_RENORMALIZED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_ABSMEAN, TERN_FOR_INFERENCE}, 9, MOE_GOOD, 8},
    {{2, 2, 4100, 16, 0, 0, 0, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_INT4,
      TERN_MAP_RELU2, TERN_ROUTE_ALL, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 15, MOE_HUGE, 1},
    {{33, 16, 64, 48, 1, 0, 0, TERN_ABSMEAN, 16, TERN_2BIT, TERN_ACT_INT8,
      TERN_MAP_SILU, TERN_ROUTE_ALL, TERN_NORM_RMS, TERN_NORM_NONE, TERN_ABSMEAN, TERN_FOR_INFERENCE}, 16, MOE_NAN, 1},
    {{128, 2, 16, 16, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, /* the most matrices */
      TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 3, MOE_GOOD, 1},
    {{5, 2, 40, 30, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8, /* too many tokens, */
      TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 17, MOE_GOOD, 0},
    {{33, 17, 24, 20, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, /* places */
      TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 16, MOE_GOOD, 0},
    {{130, 1, 16, 16, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, /* or matrices */
      TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE, TERN_FOR_INFERENCE}, 3, MOE_GOOD, 0},
};

static void test_fused_moe(const fused_moe &t, tern_context *parts)
{
    moe_pair p(t.c);
    tern_context *const contexts[] = {test_context[CPU], test_context[GPU], parts};
    tern_need need = {};
    char fault[3][256] = {};
    CHECK_OK(tern_moe_need(test_context[GPU], &p.m[GPU], t.n, &need));
    mirror<float> x(t.n * t.c.cols, test_uniform), y(t.n * t.c.cols, test_uniform), z(t.n * t.c.cols, test_uniform);
    mirror<int8_t> saved((int64_t)need.saved), also((int64_t)need.saved);
    for (int64_t i = 0; t.n > 8 && i < t.c.cols; i++) x[CPU][i + t.c.cols] = x[CPU][i]; /* two of the same experts, */
    for (int64_t i = 3 * t.c.cols; i < 13 * t.c.cols && t.n > 13; i++) x[CPU][i] = x[CPU][i - t.c.cols]; /* and more than a turn takes */
    if (t.bad == MOE_NAN) x[CPU][t.n / 2 * t.c.cols + t.c.cols - 1] = test_nan;
    for (int64_t i = 0; t.bad == MOE_HUGE && i < t.c.cols; i++) x[CPU][t.n / 2 * t.c.cols + i] *= 1e25f;
    x.send();
    for (int i = 0; i < 3; i++) {
        const int side = i ? GPU : CPU;
        float *out = i == 2 ? z[GPU] : y[side];
        void *keep = i == 2 ? also[GPU] : saved[side];
#ifdef TEST_CUDA_H
        const long before = test_cuda.launches;
#endif
        CHECK(tern_moe_need(contexts[i], &p.m[side], t.n, &need) == TERN_OK && tern_reserve(contexts[i], need.scratch) == TERN_OK);
        CHECK(tern_moe_forward(contexts[i], &p.m[side], t.n, x[side], out, keep) == TERN_OK);
#ifdef TEST_CUDA_H
        CHECK(i != 1 || !t.launches || test_cuda.launches - before == t.launches);
#endif
        if (tern_sync(contexts[i]) != TERN_OK) snprintf(fault[i], sizeof fault[i], "%s", tern_last_error(contexts[i])->text);
    }
    CHECK_SAME(y);
    CHECK(memcmp(z.fetch().data(), y[CPU], y.count * sizeof(float)) == 0);
    CHECK(saved.fetch() == also.fetch());
    CHECK(!strcmp(fault[0], fault[1]) && !strcmp(fault[0], fault[2]) && !fault[0][0] == !t.bad);
}

static void test_cuda_moe_by_its_parts()
{
    tern_backend table = *test_backend();
    table.moe = nullptr;
    const opened parts(&table);
    CHECK(parts.result == TERN_OK);
    test_fuse(false);
    for (const fused_moe &t : fused_moes) test_fused_moe(t, parts.c);
}

/* The same on a device that cannot launch blocks together, with a driver that is too old for so many parameters, and where fewer
   processors are there than the device says. */
#ifdef TEST_CUDA_H
static void test_cuda_moe_apart()
{
    test_fuse(false);
    for (int i = 0; i < 2; i++) {
        (i ? test_cuda.driver : test_cuda.cooperative) = 0;
        const opened apart(test_backend());
        test_cuda.driver = 12010;
        test_cuda.cooperative = 1;
        CHECK(apart.result == TERN_OK && !tern__gpu_of(&apart.c->run)->mixtures && !tern__gpu_of(&apart.c->run)->meet == !i);
        test_fused_moe(fused_moes[3], apart.c);
    }
    const opened fewer(test_backend());
    CHECK(fewer.result == TERN_OK);
    tern__gpu_of(&fewer.c->run)->processors = 100;
    test_fused_moe(fused_moes[3], fewer.c);
}
#endif

/* A mixture as one graph, forward or, with `saved`, that and backward, replayed for tokens that choose other experts; in the last
   round all of them the same. */
static void cuda_moe_graph(const moe_case &t, int64_t n, tern_dispatch dispatch, bool backward)
{
    moe_pair p(t);
    tern_need need = {};
    cudaStream_t stream = (cudaStream_t)tern_cuda_stream(test_context[GPU]);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    for (int side = CPU; side <= GPU; side++) {
        p.m[side].dispatch = dispatch;
        CHECK(tern_moe_need(test_context[side], &p.m[side], n, &need) == TERN_OK
              && tern_reserve(test_context[side], need.scratch) == TERN_OK);
    }
    mirror<float> x(n * t.cols, test_uniform), y(n * t.cols), dy(n * t.cols, test_uniform), dx(n * t.cols);
    mirror<int8_t> saved((int64_t)need.saved);
    const auto learn = [&](int side) {
        TERN__TRY(tern_moe_forward(test_context[side], &p.m[side], n, x[side], y[side], backward ? saved[side] : nullptr));
        return backward ? tern_moe_backward(test_context[side], &p.m[side], n, x[side], saved[side], dy[side], dx[side]) : TERN_OK;
    };
    test_fuse(false);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    CHECK_OK(learn(GPU));
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess);
    for (int i = 0; i < 3; i++) {
        for (int64_t j = 0; j < n * t.cols; j++) x[CPU][j] = i < 2 || j < t.cols ? test_uniform() : x[CPU][j - t.cols];
        x.send();
        CHECK(learn(CPU) == TERN_OK);
        CHECK(cudaGraphLaunch(ready, stream) == cudaSuccess);
        CHECK_OK(tern_sync(test_context[GPU]));
        CHECK_SAME(y);
        CHECK_SAME(dx);
        CHECK(p.params.same());
    }
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
}

static void test_cuda_moe_graph()
{
    for (tern_dispatch dispatch : {TERN_DISPATCH_AUTO, TERN_DISPATCH_DENSE, TERN_DISPATCH_SPARSE}) {
        cuda_moe_graph(moe_cases[0], 5, dispatch, false);
        for (int i : {0, 1, 4}) cuda_moe_graph(moe_cases[i], 5, dispatch, true);
    }
    cuda_moe_graph(moe_cases[0], 300, TERN_DISPATCH_AUTO, true); /* in parts */
}

/* The backward in groups, and on a table without them, a matrix after the other: the same bits, of fused products too. */
static void test_cuda_moe_backward_by_its_parts()
{
    tern_backend table = *test_backend();
    table.grouped = nullptr;
    const opened parts(&table);
    tern_context *const contexts[] = {test_context[GPU], parts.c};
    CHECK(parts.result == TERN_OK);
    for (int i : {0, 1, 4, 10, 11, 14}) { /* from 10 on: in parts, with a token that goes to no expert where the router reads it as it is */
        moe_case t = moe_cases[i % 10];
        const int64_t n = i < 10 ? 19 : 300;
        if (i == 10) t.norm = TERN_NORM_NONE;
        moe_pair p(t);
        char told[2][256];
        tern_need need = {};
        std::vector<std::vector<float>> got[2];
        mirror<float> x(n * t.cols, test_uniform), y(n * t.cols), dy(n * t.cols, test_uniform), dx(n * t.cols);
        if (i == 10) x[CPU][7 * t.cols + 3] = NAN;
        x.send();
        for (int which = 0; which < 2; which++) {
            tern_context *c = contexts[which];
            CHECK(tern_moe_need(c, &p.m[GPU], n, &need) == TERN_OK && tern_reserve(c, need.scratch) == TERN_OK);
            mirror<int8_t> saved((int64_t)need.saved);
            CHECK(tern_moe_forward(c, &p.m[GPU], n, x[GPU], y[GPU], saved[GPU]) == TERN_OK && (tern_sync(c) == TERN_OK) == (i != 10));
            CHECK(tern_moe_backward(c, &p.m[GPU], n, x[GPU], saved[GPU], dy[GPU], dx[GPU]) == TERN_OK
                  && (tern_sync(c) == TERN_OK) == (i != 10));
            snprintf(told[which], sizeof told[which], "%s", i == 10 ? tern_last_error(c)->text : "");
            got[which].push_back(dx.fetch());
            for (both_params *q : p.params.all) {
                const tern_buffer &grad = q->at[GPU].buffer[TERN_GRAD];
                std::vector<float> back(grad.count);
                CHECK(tern_copy(c, back.data(), grad.data, grad.count * 4, TERN_TO_HOST) == TERN_OK);
                got[which].push_back(back);
                back.assign(back.size(), 0.0f);
                CHECK(tern_copy(c, grad.data, back.data(), grad.count * 4, TERN_TO_DEVICE) == TERN_OK);
            }
        }
        CHECK(strcmp(told[0], told[1]) == 0);
        for (size_t j = 0; j < got[0].size(); j++) CHECK(memcmp(got[0][j].data(), got[1][j].data(), got[0][j].size() * 4) == 0);
    }
}

/* All or nothing here too: a bad float is refused at once, and by name, not with the next tern_sync. */
static void test_cuda_moe_from_dense()
{
    const moe_case &t = moe_cases[0];
    moe_pair p(t);
    const int64_t size = t.width * t.cols, bad = (3 * t.count - 1) * size + t.width + 1;
    mirror<float> floats(3 * t.count * size, test_uniform);
    std::vector<tern_expert_floats> experts[2];
    char text[120];
    for (int side = CPU; side <= GPU; side++)
        for (int32_t i = 0; i < t.count; i++)
            experts[side].push_back({floats[side] + 3 * i * size, floats[side] + (3 * i + 1) * size, floats[side] + (3 * i + 2) * size});
    const auto set = [&](int side) {
        return tern_moe_from_dense(test_context[side], &p.m[side], TERN_F32, experts[side].data(), nullptr, nullptr, nullptr);
    };
    floats[CPU][bad] = test_nan;
    floats.send();
    for (int side = CPU; side <= GPU; side++) {
        snprintf(text, sizeof text, "%s: weights[1][1] is not a finite number below 2^78", p.m[side].experts[t.count - 1].down->name);
        CHECK(set(side) == TERN_E_NONFINITE && strcmp(text, tern_last_error(test_context[side])->text) == 0);
        CHECK(tern_sync(test_context[side]) == TERN_OK);
    }
    CHECK(p.params.same());
    floats[CPU][bad] = floats[CPU][bad + 1] = 2.5e23f; /* good, but only a look tells */
    floats.send();
    test_both([&](tern_context *, int side) { return set(side); });
    CHECK(p.params.same());
}

/* -- graphs -- */

struct hop_case { tern_hop_order order; tern_graph_norm norm; tern_act act; tern_map_fn fn; int residual, lora; int32_t mask; };
static const hop_case hop_cases[] = {
    {TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 1, 0, TERN_FOR_ADAMW},
    {TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_GELU, 0, 1, TERN_FOR_ADAMW},
    {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_SILU, 1, 1, TERN_FOR_ADAMW},
    {TERN_PROJECT_FIRST, TERN_GRAPH_MEAN, TERN_ACT_INT8, TERN_MAP_RELU2, 0, 0, TERN_FOR_FLIPS},
};

static void test_cuda_hop()
{
    const int64_t nodes = 40, cols = 21;
    const graph_pair g(nodes, 150, {{0, 300}, {39, 700}});
    test_fuse(false);
    for (const hop_case &t : hop_cases) {
        side_params params;
        both_params *message = params.add(cols, cols, TERN_ABSMEAN, t.mask, TERN_PER_ROW, TERN_BASE3),
                    *update = params.add(cols, cols, TERN_ABSMEAN, t.mask, 8, TERN_2BIT);
        both_params *bias = params.add(1, cols, TERN_DENSE, t.mask, 0, TERN_2BIT);
        both_params *a = t.lora ? params.add(3, cols, TERN_DENSE, t.mask, 0, TERN_2BIT) : nullptr,
                    *b = t.lora ? params.add(cols, 3, TERN_DENSE, t.mask, 0, TERN_2BIT) : nullptr;
        tern_hop hop[2] = {};
        tern_need need[2] = {};
        for (int side = CPU; side <= GPU; side++) {
            tern_hop *l = &hop[side];
            l->message.w = at(message, side);
            l->update.w = at(update, side);
            l->update.bias = at(bias, side);
            l->message.norm = TERN_NORM_RMS;
            l->order = t.order;
            l->norm = t.norm;
            l->act = t.act;
            l->fn = t.fn;
            l->residual = t.residual;
            l->lora_a = at(a, side);
            l->lora_b = at(b, side);
            l->lora_scale = 0.5f;
            CHECK(tern_hop_need(test_context[side], l, &g.at[side], &need[side]) == TERN_OK
                  && tern_reserve(test_context[side], need[side].scratch) == TERN_OK);
        }
        mirror<float> h(nodes * cols, test_uniform), y(nodes * cols), z(nodes * cols), dy(nodes * cols, test_uniform), dh(nodes * cols);
        mirror<int8_t> saved((int64_t)need[GPU].saved);
        test_both([&](tern_context *c, int side) {
            TERN__TRY(tern_hop_forward(c, &hop[side], &g.at[side], h[side], y[side], nullptr));
            TERN__TRY(tern_hop_forward(c, &hop[side], &g.at[side], h[side], z[side], saved[side]));
            TERN__TRY(tern_hop_backward(c, &hop[side], &g.at[side], h[side], saved[side], dy[side], dh[side]));
            return params.step(c, side);
        });
        CHECK_SAME(y);
        CHECK_SAME(z);
        CHECK_SAME(dh);
        CHECK(params.same());
    }
}

/* In one launch, or two, and by its parts on a table without the operation: the same bits and the same faults, of every form.
   launches: hubs' segments, two of LoRA, what is sent, and one for all the rest. */
struct hop_shape {
    int64_t cols, sent, out;
    hop_case c;
    int32_t grain;
    tern_type encoding;
    tern_act act;
    int bad;
    long launches;
    int plain = 0; /* messages without norm */
};
static const hop_shape hop_shapes[] = {
    {1, 1, 1, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 1, 1, 0}, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 4},
    {16, 33, 16, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_SILU, 1, 1, 0},
     TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT4, 0, 6},
    {127, 300, 70, {TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_RELU2, 0, 1, 0}, 40, TERN_BASE3, TERN_ACT_INT8, 0, 4},
    {40, 0, 0, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_GELU, 1, 0, 0}, 0, TERN_2BIT, TERN_ACT_INT8, 0, 3},
    {256, 0, 256, {TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 1, 0, 0}, 128, TERN_2BIT, TERN_ACT_INT8, 0, 4},
    {48, 20, 0, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 0, 1, 0},
     TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_INT8, 1, 4},
    {17, 15, 9, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_RELU, 0, 0, 0},
     TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 2, 2},
    {1100, 0, 5, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 0, 0, 0},
     TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0}, /* too wide for one launch */
};

struct shaped_hop {
    const hop_shape t;
    const int64_t sent, out;
    both_params message, update, bias, gain, a, b;
    explicit shaped_hop(const hop_shape &shape) : t(shape), sent(t.sent ? t.sent : t.cols), out(t.out ? t.out : sent),
        message(t.sent ? t.sent : 1, t.cols, TERN_ABSMEAN, TERN_FOR_INFERENCE, t.grain, t.encoding),
        update(out, sent, TERN_ABSMEAN, TERN_FOR_INFERENCE, t.grain, TERN_2BIT),
        bias(1, out, TERN_DENSE, TERN_FOR_INFERENCE, 0), gain(1, t.cols, TERN_DENSE, TERN_FOR_INFERENCE, 0),
        a(3, t.cols, TERN_DENSE, TERN_FOR_INFERENCE, 0), b(out, 3, TERN_DENSE, TERN_FOR_INFERENCE, 0) {}
    tern_hop on(int side)
    {
        tern_hop l = {};
        l.message.w = t.sent ? at(&message, side) : nullptr;
        l.message.norm = t.plain ? TERN_NORM_NONE : TERN_NORM_RMS;
        l.message.gain = t.plain ? nullptr : at(&gain, side);
        l.message.act = l.update.act = t.act;
        l.update.w = t.out ? at(&update, side) : nullptr;
        l.update.bias = at(&bias, side);
        l.order = t.c.order;
        l.norm = t.c.norm;
        l.act = t.c.act;
        l.fn = t.c.fn;
        l.residual = t.c.residual;
        l.lora_a = t.c.lora ? at(&a, side) : nullptr;
        l.lora_b = t.c.lora ? at(&b, side) : nullptr;
        l.lora_scale = 0.5f;
        l.cols = t.cols;
        return l;
    }
};

static void test_fused_hop(const hop_shape &t, const graph_pair &g, tern_context *parts)
{
    shaped_hop hop(t);
    const int64_t nodes = g.at[GPU].nodes;
    tern_context *const contexts[] = {test_context[GPU], parts};
    mirror<float> h(nodes * t.cols, test_uniform), y(nodes * hop.out), z(nodes * hop.out);
    mirror<float> *const result[] = {&y, &z};
    char fault[2][256] = {};
    const tern_hop l = hop.on(GPU);
    if (t.bad == 1) h[CPU][5 * t.cols] = test_infinity;
    if (t.bad == 2) for (int64_t i = 5 * t.cols; i < 6 * t.cols; i++) h[CPU][i] = h[CPU][i] * 1e25f; /* finite sums without a mean square */
    h.send();
    for (int i = 0; i < 2; i++) {
        tern_need need = {};
        CHECK(tern_hop_need(contexts[i], &l, &g.at[GPU], &need) == TERN_OK && tern_reserve(contexts[i], need.scratch) == TERN_OK);
#ifdef TEST_CUDA_H
        const long before = test_cuda.launches;
#endif
        CHECK(tern_hop_forward(contexts[i], &l, &g.at[GPU], h[GPU], (*result[i])[GPU], nullptr) == TERN_OK);
#ifdef TEST_CUDA_H
        CHECK(i == 1 || !t.launches || test_cuda.launches - before == t.launches);
#endif
        if (tern_sync(contexts[i]) != TERN_OK) snprintf(fault[i], sizeof fault[i], "%s", tern_last_error(contexts[i])->text);
    }
    y.fetch();
    z.fetch();
    CHECK(memcmp(y.back.data(), z.back.data(), y.count * sizeof(float)) == 0); /* beside a fault of data LoRA's are not finite */
    CHECK(!strcmp(fault[0], fault[1]) && !fault[0][0] == !t.bad);
}

static void test_cuda_hop_by_its_parts()
{
    tern_backend table = *test_backend();
    const graph_pair g(40, 150, {{3, 300}, {39, 700}});
    table.hop = nullptr;
    const opened parts(&table);
    CHECK(parts.result == TERN_OK);
    for (const hop_shape &t : hop_shapes) test_fused_hop(t, g, parts.c);
}

/* Several hops, by the CPU and here at once, in place where they may be, and each by itself on a table without the operation. launches:
   of the four that go first, of a hop with LoRA four (of hubs' segments, its products and the rest), of the others. */
enum { CHAIN_NAN = 1, CHAIN_LARGE = 2 }; /* added up */

struct chain_of_hops {
    std::deque<shaped_hop> made;
    std::vector<tern_hop> hops[2];
    mirror<float> h, y;
    chain_of_hops(const std::vector<hop_shape> &shapes, int64_t nodes, int bad) :
        h(nodes * shapes[0].cols, [&] { return test_uniform() * (bad & CHAIN_LARGE ? 3.0e38f : 1.0f); }), y(nodes * end_of(shapes.back()))
    {
        for (const hop_shape &t : shapes) {
            made.emplace_back(t);
            for (int side = CPU; side <= GPU; side++) hops[side].push_back(made.back().on(side));
        }
        if (bad & CHAIN_NAN) h[CPU][30 * shapes[0].cols] = test_nan;
        h.send();
    }
    static int64_t end_of(const hop_shape &t) { return t.out ? t.out : t.sent ? t.sent : t.cols; }
    tern_result forward(tern_context *c, int side, const graph_pair &g, float *to)
    {
        tern_need need = {};
        TERN__TRY(tern_hops_need(c, hops[side].data(), (int32_t)hops[side].size(), &g.at[side], &need));
        TERN__TRY(tern_reserve(c, need.scratch));
        return tern_hops_forward(c, hops[side].data(), (int32_t)hops[side].size(), &g.at[side], h[side], to);
    }
};

/* launches: 0 where each hop goes by itself. */
static void test_chained(const std::vector<hop_shape> &shapes, const graph_pair &g, tern_context *parts, int bad, long launches)
{
    chain_of_hops x(shapes, g.at[GPU].nodes, bad);
    mirror<float> z((int64_t)x.y.count);
    char fault[256] = {};
#ifdef TEST_CUDA_H
    const long before = test_cuda.launches;
#endif
    test_both([&](tern_context *c, int side) { return x.forward(c, side, g, x.y[side]); });
    if (!bad) CHECK_SAME(x.y); /* NaN of a residual are any */
#ifdef TEST_CUDA_H
    const long together = test_cuda.launches - before;
#endif
    CHECK(x.forward(parts, GPU, g, z[GPU]) == TERN_OK);
    CHECK((tern_sync(parts) != TERN_OK) == (bad != 0));
    snprintf(fault, sizeof fault, "%s", bad ? tern_last_error(parts)->text : "");
    x.y.fetch();
    z.fetch();
    CHECK(memcmp(x.y.back.data(), z.back.data(), z.count * sizeof(float)) == 0);
#ifdef TEST_CUDA_H
    const long apart = test_cuda.launches - before - together;
    if (launches ? together != launches : together != apart)
        test_errors++, printf("  %ld launches, not %ld; %ld apart\n", together, launches, apart);
#endif
    if (shapes.size() < 2 || x.y.count != x.h.count) return;
    CHECK_OK(x.forward(test_context[GPU], GPU, g, x.h[GPU]));
    if (tern_sync(test_context[GPU]) != TERN_OK) CHECK(!strcmp(fault, tern_last_error(test_context[GPU])->text));
    x.h.fetch();
    CHECK(memcmp(x.h.back.data(), z.back.data(), z.count * sizeof(float)) == 0);
}

static const hop_shape
    chain_projected = {37, 21, 37, {TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 1, 0, 0},
                       TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8, 0, 0, 0},
    chain_overflows = {37, 21, 37, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0},
                       TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 1},
    chain_summed = {37, 70, 16, {TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_INT8, TERN_MAP_SILU, 0, 0, 0},
                    20, TERN_2BIT, TERN_ACT_INT4, 0, 0, 0},
    chain_floats = {16, 20, 0, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 0, 0, 0},
                    TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_INT8, 0, 0, 1},
    chain_bare = {20, 0, 0, {TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_GELU, 1, 0, 0},
                  0, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0},
    chain_bare_floats = {20, 0, 0, {TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_RELU, 1, 0, 0},
                         0, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0},
    chain_back = {20, 33, 37, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_RELU2, 0, 0, 0},
                  TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0},
    chain_lora = {37, 21, 37, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_SILU, 1, 1, 0},
                  TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0},
    chain_same = {37, 37, 0, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_SILU, 1, 0, 0},
                  8, TERN_BASE3, TERN_ACT_INT8, 0, 0, 0},
    chain_bits = {37, 37, 0, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0},
                  TERN_PER_ROW, TERN_2BIT, TERN_ACT_BIT, 0, 0, 1},
    chain_long = {1433, 16, 37, {TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0},
                  TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 1},
    chain_long_norm = {1025, 16, 37, {TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0},
                       TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0},
    chain_wide = {37, 700, 37, {TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0},
                  TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 0, 0};

static tern_backend without_hops()
{
    tern_backend table = *test_backend();
    table.hops = nullptr;
    return table;
}

static void test_cuda_hops()
{
    const tern_backend table = without_hops();
    const opened parts(&table);
    CHECK(parts.result == TERN_OK);
    const graph_pair few(40, 150, {{3, 300}, {39, 700}}), many(201, 500, {{9, 600}}), no_hubs(33, 60, {});
    const std::vector<hop_shape> all = {chain_projected, chain_summed, chain_floats, chain_bare, chain_bare_floats, chain_back};
    for (size_t count = 1; count <= all.size(); count++)
        test_chained({all.begin(), all.begin() + (std::ptrdiff_t)count}, few, parts.c, 0, count > 4 ? 2 : 1);
    test_chained(all, many, parts.c, 0, 2); /* blocks have several turns */
    test_chained({chain_projected, chain_same, chain_same, chain_projected}, no_hubs, parts.c, 0, 1);
    test_chained({chain_bare_floats, chain_bare_floats, chain_bare_floats}, many, parts.c, 0, 1);
    test_chained({chain_same, chain_lora, chain_same, chain_projected}, few, parts.c, 0, 6);
    for (int bad : {1, 2, 3}) {
        test_chained({chain_projected, chain_same, chain_same}, few, parts.c, bad, 1);
        test_chained({chain_bare_floats, chain_bare, chain_bare_floats}, few, parts.c, bad, 1);
        test_chained({chain_bare, chain_bare, chain_bare_floats}, few, parts.c, bad, 1);
    }
    test_chained({chain_overflows}, few, parts.c, CHAIN_NAN | CHAIN_LARGE, 1); /* what a layer reads is to blame before what it makes */
    const graph_pair hub(16, 20, {{0, 2500}}); /* of more segments than the block has warps */
    test_chained({chain_bare_floats, chain_bare}, hub, parts.c, 0, 1);
    test_chained({chain_long, chain_same}, no_hubs, parts.c, 0, 1);
}

/* What one launch cannot do goes by itself: nothing is written, and no error stays. */
static void test_cuda_hops_apart()
{
    const tern_backend table = without_hops();
    const opened parts(&table);
    const graph_pair few(40, 150, {{3, 300}});
    CHECK(parts.result == TERN_OK);
    test_chained({chain_bits, chain_same}, few, parts.c, 0, 0);
    test_chained({chain_same, chain_wide}, few, parts.c, 0, 0);
    test_chained({chain_long_norm, chain_same}, few, parts.c, 0, 0);
#ifdef TEST_CUDA_H
    tern__gpu *const d = tern__gpu_of(&test_context[GPU]->run);
    const graph_pair most(256, 300, {}), more(257, 300, {});
    test_chained({chain_same, chain_same}, most, parts.c, 0, 1);
    test_chained({chain_same, chain_same}, more, parts.c, 0, 0);
    d->processors = 100; /* than which the device has fewer */
    test_chained({chain_same, chain_same}, more, parts.c, 0, 0);
    d->processors = 4;
    unsigned *const meet = d->meet;
    d->meet = nullptr;
    test_chained({chain_same, chain_same}, few, parts.c, 0, 0);
    d->meet = meet;
#endif
}

/* As one graph, replayed for other features. */
static void test_cuda_hops_graph()
{
    const graph_pair g(40, 150, {{3, 300}});
    chain_of_hops x({chain_projected, chain_same, chain_projected}, 40, 0);
    cudaStream_t stream = (cudaStream_t)tern_cuda_stream(test_context[GPU]);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    CHECK_OK(x.forward(test_context[GPU], GPU, g, x.y[GPU]));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    CHECK_OK(x.forward(test_context[GPU], GPU, g, x.y[GPU]));
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess);
    for (int i = 0; i < 3; i++) {
        for (size_t j = 0; j < x.h.count; j++) x.h[CPU][j] = test_uniform();
        x.h.send();
        CHECK(x.forward(test_context[CPU], CPU, g, x.y[CPU]) == TERN_OK);
        CHECK(cudaGraphLaunch(ready, stream) == cudaSuccess);
        CHECK_OK(tern_sync(test_context[GPU]));
        CHECK_SAME(x.y);
    }
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
}

static void test_cuda_ngram()
{
    const int64_t n = 19, cols = 21, width = 10;
    side_params params;
    both_params *table = params.add(31, width, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_BASE3);
    both_params *key = params.add(cols, width, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_2BIT),
                *value = params.add(cols, width, TERN_ABSMEAN, TERN_FOR_ADAMW, 4, TERN_2BIT);
    mirror<float> h(n * cols, test_uniform), y(n * cols), dy(n * cols, test_uniform), dh(n * cols);
    mirror<int32_t> ids(2 * n);
    std::vector<int32_t> tokens;
    tern_ngram l[2] = {};
    tern_need need[2] = {};
    test_fuse(false);
    for (int64_t i = 0; i < n; i++) tokens.push_back((int32_t)(test_random() % 9));
    for (int side = CPU; side <= GPU; side++) {
        l[side].table = at(table, side);
        l[side].key.w = at(key, side);
        l[side].value.w = at(value, side);
        CHECK(tern_ngram_need(test_context[side], &l[side], n, &need[side]) == TERN_OK
              && tern_reserve(test_context[side], need[side].scratch) == TERN_OK);
    }
    CHECK(tern_ngram_ids(test_context[CPU], &l[CPU], n, 0, tokens.data(), ids[CPU]) == TERN_OK);
    ids.send();
    mirror<int8_t> saved((int64_t)need[GPU].saved);
    test_both([&](tern_context *c, int side) {
        TERN__TRY(tern_ngram_forward(c, &l[side], n, ids[side], h[side], y[side], saved[side]));
        TERN__TRY(tern_ngram_backward(c, &l[side], n, ids[side], h[side], saved[side], dy[side], dh[side]));
        return params.step(c, side);
    });
    CHECK_SAME(y);
    CHECK_SAME(dh);
    CHECK(params.same());
}

static void test_cuda_vq()
{
    const int64_t n = 19, cols = 21;
    for (tern_rule rule : {TERN_DENSE, TERN_ABSMEAN}) {
        side_params params;
        both_params *codes = params.add(13, cols, rule, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_2BIT);
        mirror<float> x(n * cols, test_uniform), y(n * cols), distance(n), dy(n * cols, test_uniform), dx(n * cols);
        mirror<int32_t> ids(n);
        std::vector<int64_t> used[2] = {std::vector<int64_t>(13), std::vector<int64_t>(13)};
        test_both([&](tern_context *c, int side) {
            const tern_vq l = {at(codes, side), 0.25f};
            tern_need need = {};
            int64_t revived = 0;
            TERN__TRY(tern_vq_need(c, &l, n, &need));
            TERN__TRY(tern_reserve(c, need.scratch));
            TERN__TRY(tern_vq_forward(c, &l, n, x[side], ids[side], y[side], distance[side]));
            TERN__TRY(tern_vq_backward(c, &l, n, x[side], ids[side], y[side], 0.1f, dy[side], dx[side]));
            TERN__TRY(params.step(c, side));
            TERN__TRY(tern_vq_count(c, &l, n, ids[side], used[side].data()));
            return tern_vq_revive(c, &l, n, x[side], used[side].data(), 5, 1, &revived);
        });
        CHECK_SAME(ids);
        CHECK_SAME(y);
        CHECK_SAME(distance);
        CHECK_SAME(dx);
        CHECK(params.same() && used[CPU] == used[GPU]);
    }
}

static void test_cuda_ple()
{
    const int64_t n = 9, cols = 33, width = 17;
    side_params params;
    both_params *gate = params.add(width, cols, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_2BIT),
                *project = params.add(cols, width, TERN_ABSMEAN, TERN_FOR_ADAMW, 8, TERN_BASE3);
    both_params *gain = params.add(1, cols, TERN_DENSE, TERN_FOR_ADAMW, 0, TERN_2BIT);
    mirror<float> x(n * cols, test_uniform), rows(n * width, test_uniform), y(n * cols), dy(n * cols, test_uniform), dx(n * cols),
                  drows(n * width);
    mirror<int8_t> saved(n * 2048);
    test_fuse(false);
    test_both([&](tern_context *c, int side) {
        tern_ple l = {};
        tern_need need = {};
        l.gate.w = at(gate, side);
        l.project.w = at(project, side);
        l.gain = at(gain, side);
        TERN__TRY(tern_ple_need(c, &l, n, &need));
        if (need.saved > saved.count) abort();
        TERN__TRY(tern_reserve(c, need.scratch));
        TERN__TRY(tern_ple_forward(c, &l, n, x[side], rows[side], y[side], saved[side]));
        TERN__TRY(tern_ple_backward(c, &l, n, x[side], rows[side], saved[side], dy[side], dx[side], drows[side]));
        return params.step(c, side);
    });
    CHECK_SAME(y);
    CHECK_SAME(dx);
    CHECK_SAME(drows);
    CHECK(params.same());
}

static void suite_cuda_rooms()
{
    RUN(test_cuda_flip_training);
    RUN(test_cuda_moe);
    RUN(test_cuda_moe_by_its_parts);
#ifdef TEST_CUDA_H
    RUN(test_cuda_moe_apart);
#endif
    RUN(test_cuda_moe_graph);
    RUN(test_cuda_moe_backward_by_its_parts);
    RUN(test_cuda_moe_from_dense);
    RUN(test_cuda_hop);
    RUN(test_cuda_hop_by_its_parts);
    RUN(test_cuda_hops);
    RUN(test_cuda_hops_apart);
    RUN(test_cuda_hops_graph);
    RUN(test_cuda_ngram);
    RUN(test_cuda_vq);
    RUN(test_cuda_ple);
}
