/* Would the tests of ternary_cuda.cu see a fault in its kernels? Each test plants one on the emulator, in the kernels as they are,
   and runs a test of theirs in a child process, which must fail or die. */
#ifdef TEST_CUDA_H

#include "cuda_child.h"

/* spare: barriers, counted from 1, that this test does not need; of: the function whose barriers are counted, where not all are. */
struct scenario { const char *name; void (*test)(); std::vector<size_t> spare; const char *of = nullptr; };

enum { FAULT_UNSEEN = 0, FAULT_SEEN = 1, FAULT_NOT_MET = 2 };

/* Whether a schedule shows the fault. */
static int fault_seen(const scenario &s, cuda_sabotage_kind kind, size_t barrier)
{
    int worst = FAULT_NOT_MET;
    for (int schedule = 0; schedule < TEST_SCHEDULES; schedule++) {
        const child_end end = child_run([&] {
            dup2(2, 1);
            test_schedule(schedule);
            test_errors = 0;
            test_cuda.sabotage.kind = kind;
            test_cuda.sabotage.barrier = barrier;
            test_cuda.sabotage.function = s.of;
            s.test();
            fflush(stdout);
            _exit(test_cuda.sabotage.done == 0 ? FAULT_NOT_MET : test_errors ? FAULT_SEEN : FAULT_UNSEEN);
        });
        const int status = WIFEXITED(end.status) ? WEXITSTATUS(end.status) : FAULT_SEEN;
        if (status != FAULT_UNSEEN && status != FAULT_NOT_MET) return FAULT_SEEN;
        if (status == FAULT_UNSEEN) worst = FAULT_UNSEEN;
    }
    return worst;
}

static void check_fault(const scenario &s, cuda_sabotage_kind kind)
{
    const int seen = fault_seen(s, kind, 0);
    if (seen != FAULT_SEEN) test_errors++, printf("  %s: %s\n", s.name, seen == FAULT_UNSEEN ? "unseen" : "nothing to break");
}

/* More rows than blocks, on a device of one processor: blocks that take more than one find what the one before left. */
static const scenario products[] = {
    /* of sums, before the next */
    {"quantize", [] { check_quantize(40, 1100, TERN_PER_ROW, TERN_2BIT, true, true, false); }, {4}},
    {"few tokens", [] { check_product(test_shape(33, 300, TERN_PER_ROW, TERN_2BIT, TERN_F32), 3, true); }, {2}}, /* before the next group */
    {"few tokens, groups", [] { check_product(test_shape(33, 300, 20, TERN_BASE3, TERN_F32), 12, true); }, {}},
    {"many tokens",
     [] { use_wgmma(0); check_product(test_shape(33, 500, TERN_PER_ROW, TERN_2BIT, TERN_F32), 40, true); use_wgmma(1); }, {}},
    {"many tokens, groups", [] { check_product(test_shape(33, 500, 250, TERN_BASE3, TERN_F32), 20, true); }, {}},
    {"layer", [] { check_layer(40, 1300, 100, TERN_BASE3, 3, false); }, {4}}, /* of sums, before the next */
    {"int8", [] { int8_check(70, 65, 300, INT8_PLAIN, INT8_TRANSPOSED, 0); }, {}},
    {"warpgroups", [] { check_product(test_shape(33, 1000, TERN_PER_ROW, TERN_2BIT, TERN_F32), 70, true); }, {}},
    {"warpgroups, groups of inputs", [] { check_product(test_shape(33, 500, 100, TERN_2BIT, TERN_F32), 40, true); }, {}},
    {"warpgroups, groups of tokens", [] { test_grouped_products(6, 1, 300, 130, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 270, 100); }, {},
     "tern__wgmma_"},
};

static void check_attention()
{
    static const attention_case t = {2, 9, 1100, 2, 1, 8, 0};
    attention_data d(t);
    d.both(false);
    CHECK_SAME(d.p);
    CHECK_SAME(d.y);
}

/* What makes a barrier spare: one block of 1024 or one warp to a sum, one patch, panel or tile to a block, another barrier
   right behind. */
static const scenario others[] = {
    {"ternarize rows", [] { pack_check(test_shape(40, 1030, TERN_PER_ROW, TERN_2BIT, TERN_F32), TERN_TWN, TERN_F32); }, {4, 5, 6}},
    {"ternarize groups", [] { pack_check(test_shape(560, 70, 35, TERN_BASE3, TERN_F16), TERN_ABSMEAN, TERN_BF16); }, {2, 4, 5}},
    {"ternarize a tensor", [] { pack_check(test_shape(40, 70, TERN_PER_TENSOR, TERN_2BIT, TERN_F32), TERN_TWN, TERN_F32); }, {2, 4, 6}},
    {"unpack", [] { test_cuda_unpack_bad_codes(); }, {}},
    {"dense", [] { dense_both({20, 65, 70, false, true, 1, true, true, false}); }, {2}},
    {"matmul", [] { matmul_both({40, 70, 20, 20, TERN_BASE3, TERN_F32, true}, "3"); }, {2}},
    {"attention", check_attention, {2}},
    {"scatter", [] { test_scattered(700, 5, 8, 0); }, {}},
    {"norm", [] { test_normed(40, 1030, 0, NORM_DGAIN | NORM_GAIN); }, {4}},
    {"norm, many tokens", [] { test_normed(150, 33, 0, NORM_DGAIN); }, {2}},
    {"loss", [] { test_lost(40, 1030, 0, 1); }, {}},
};

static void check_aggregate()
{
    const graph_pair g(600, 1200, {{0, 300}});
    test_aggregated(g, 130, AGGREGATE_LEFT | AGGREGATE_BAD, false);
}

/* Rooms 17, 18 and 20: spare are barriers of sums before the next, and one right before another. */
static const scenario sparse[] = {
    {"route", [] { test_routed(9, 33, 2, TERN_ROUTE_ALL, true, true); }, {}},
    {"group", [] { test_grouped(700, 6, 3, false, true); }, {}},
    {"row dot", [] { test_row_dots(1025, 40); }, {}},
    {"aggregate", check_aggregate, {2}},
    {"gate", [] { test_gated(40, 2, 1030, true); }, {3, 5}},
    {"nearest", [] { test_nearest(1025, 33, 40); }, {}},
    {"flip", [] { test_flipped({test_shape(600, 40, 20, TERN_2BIT, TERN_POW2), TERN_FLIP_PROPORTIONAL, 3, 30.0f}, 0, false); }, {}},
};

/* A hop that goes in one launch, of more nodes than blocks take in a step. */
static void check_hop(bool layers)
{
    const graph_pair g(600, 700, {{5, 300}});
    both_params message(21, 37, TERN_ABSMEAN, TERN_FOR_INFERENCE, 8, TERN_BASE3), update(37, 21, TERN_ABSMEAN, TERN_FOR_INFERENCE);
    mirror<float> h(600 * 37, test_uniform), y(600 * 37);
    h[CPU][37] = test_infinity;
    h.send();
    const long before = test_cuda.launches;
    test_both([&](tern_context *c, int side) {
        tern_hop l = {};
        tern_need need = {};
        l.message.w = layers ? &message.at[side] : nullptr;
        l.update.w = layers ? &update.at[side] : nullptr;
        l.message.act = l.update.act = TERN_ACT_INT8;
        l.order = layers ? TERN_AGGREGATE_FIRST : TERN_PROJECT_FIRST;
        l.fn = TERN_MAP_RELU;
        l.cols = 37;
        TERN__TRY(tern_hop_need(c, &l, &g.at[side], &need));
        TERN__TRY(tern_reserve(c, need.scratch));
        return tern_hop_forward(c, &l, &g.at[side], h[side], y[side], nullptr);
    });
    CHECK(test_cuda.launches - before == 3); /* with quantize, and the parts of the hub */
    CHECK_SAME(y);
}

/* Blocks that go from hop to hop together, and take more nodes than one step has. */
static void check_hops(bool layers)
{
    const graph_pair g(100, 150, {{5, 300}});
    const std::vector<hop_shape> ternary = {chain_projected, chain_same, chain_same, chain_projected},
        bare = {chain_bare_floats, chain_bare_floats, chain_bare_floats};
    chain_of_hops x(layers ? ternary : bare, 100, layers ? 0 : CHAIN_NAN);
    tern__gpu_of(&test_context[GPU]->run)->processors = 2;
    const long before = test_cuda.launches;
    test_both([&](tern_context *c, int side) { return x.forward(c, side, g, x.y[side]); });
    CHECK(test_cuda.launches - before == 1);
    CHECK_SAME(x.y);
}

static void check_mixture(tern_rule router, tern_type encoding, int32_t grain)
{
    const fused_moe t = {{20, 4, 260, 40, 1, 0, 0, TERN_ABSMEAN, grain, encoding, TERN_ACT_INT8,
                          TERN_MAP_SILU, TERN_ROUTE_RENORMALIZED, TERN_NORM_RMS, TERN_NORM_NONE, router, TERN_FOR_INFERENCE},
                         16, MOE_NAN, 1};
    test_fuse(false);
    tern__gpu_of(&test_context[GPU]->run)->processors = 2; /* of which each has a block */
    test_fused_moe(t, test_context[GPU]);
}

/* Fused kernels, whose blocks take several tiles or steps here. */
static const scenario fused[] = {
    {"hop", [] { check_hop(true); }, {1}, "tern__hop_"}, /* a warp quantizes the rows that it summed */
    {"hop without layers", [] { check_hop(false); }, {}, "tern__hop_"},
    {"groups, where tiles begin", [] { test_grouped_products(7, 2, 40, 70, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 3, 12, 9); }, {},
     "tern__count_tiles"},
    {"groups of few", [] { test_grouped_products(7, 2, 140, 300, 20, TERN_BASE3, TERN_ACT_INT8, 3, 40, 20); }, {}, "tern__few_tokens"},
    {"groups of many", [] { test_grouped_products(3, 2, 130, 500, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 90, 70); }, {},
     "tern__many_tokens"},
    {"mixture", [] { check_mixture(TERN_DENSE, TERN_2BIT, TERN_PER_ROW); }, {}, "tern__mixture"},
    {"hops", [] { check_hops(true); }, {}, "tern__hops_nodes"},
    {"hops without layers", [] { check_hops(false); }, {}, "tern__hops_nodes"},
    {"mixture, ternary router", [] { check_mixture(TERN_ABSMEAN, TERN_BASE3, 20); }, {}, "tern__mixture_tokens"},
};

static const scenario grouped_back[] = {
    {"groups, backward", [] { test_grouped_back(3, 2, 70, 150, 20, TERN_BASE3, TERN_ACT_INT8, 3, 40, 30, false); }, {},
     "tern__product_tile"},
    {"groups, where their rows begin", [] { test_grouped_back(4, 2, 20, 40, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 3, 30, 15, true); }, {},
     "tern__count_tiles"},
};

/* Each call of the runtime that a layer of those rooms makes fails in its turn: the layer says so. */
static void test_cuda_failures_of_layers()
{
    tern_context *c = test_context[GPU];
    const graph_pair g(40, 150, {{0, 300}});
    moe_pair p(moe_cases[0]);
    both_params w(21, 21, TERN_ABSMEAN, TERN_FOR_INFERENCE);
    mirror<float> x(40 * 21, test_uniform), y(40 * 21), distance(40);
    mirror<int32_t> ids(40);
    tern_hop hop = {};
    hop.message.w = hop.update.w = &w.at[GPU];
    hop.order = TERN_AGGREGATE_FIRST;
    tern_vq vq = {&w.at[GPU], 0.25f};
    tern_need need = {};
    size_t most = 0;
    CHECK_OK(tern_moe_need(c, &p.m[GPU], 7, &need));
    mirror<int8_t> saved((int64_t)need.saved);
    most = need.scratch;
    CHECK_OK(tern_vq_need(c, &vq, 40, &need));
    most = std::max(most, need.scratch);
    CHECK_OK(tern_hop_need(c, &hop, &g.at[GPU], &need));
    most = std::max(most, need.scratch);
    CHECK_OK(tern_hops_need(c, &hop, 1, &g.at[GPU], &need));
    CHECK_OK(tern_reserve(c, std::max(most, need.scratch)));
    const auto each = [&](auto call) {
        test_each_failing(&test_cuda.call_countdown, 7, [&](tern_error *error) {
            const tern_result result = call();
            *error = *tern_last_error(c);
            return result;
        });
    };
    each([&] { return tern_moe_forward(c, &p.m[GPU], 7, x[GPU], y[GPU], saved[GPU]); });
    each([&] { return tern_moe_backward(c, &p.m[GPU], 7, x[GPU], saved[GPU], x[GPU], y[GPU]); });
    each([&] { return tern_hop_forward(c, &hop, &g.at[GPU], x[GPU], y[GPU], nullptr); });
    each([&] { return tern_hops_forward(c, &hop, 1, &g.at[GPU], x[GPU], y[GPU]); });
    each([&] { return tern_vq_forward(c, &vq, 40, x[GPU], ids[GPU], y[GPU], distance[GPU]); });
    CHECK_OK(tern_sync(c));
}

static void one_processor() { tern__gpu_of(&test_context[GPU]->run)->processors = 1; }

/* Every barrier but the spare ones is needed, and its absence is seen. */
static void check_barriers(const scenario &s)
{
    test_cuda.sabotage.kind = CUDA_NO_BARRIER;
    test_cuda.sabotage.barrier = SIZE_MAX;
    test_cuda.sabotage.function = s.of;
    s.test();
    const std::vector<int> lines = test_cuda.sabotage.barriers;
    test_cuda.sabotage = {};
    CHECK(!lines.empty());
    for (size_t i = 1; i <= lines.size(); i++) {
        const bool seen = fault_seen(s, CUDA_NO_BARRIER, i - 1) == FAULT_SEEN, spare = std::count(s.spare.begin(), s.spare.end(), i) > 0;
        if (seen == spare)
            test_errors++, printf("  %s: barrier %zu, line %d, is %s\n", s.name, i, lines[i - 1], seen ? "not spare" : "not missed");
    }
}

static void test_cuda_fault_barrier()
{
    one_processor();
    for (const scenario &s : products) check_barriers(s);
    for (const scenario &s : others) check_barriers(s);
}

static void test_cuda_fault_sparse()
{
    one_processor();
    for (const scenario &s : sparse)
        if (s.test != sparse[0].test) check_barriers(s); /* routing is of warps */
    for (int i : {0, 2, 4, 5}) check_fault(sparse[i], CUDA_WRONG_LANE);
}

static void test_cuda_fault_fused()
{
    one_processor();
    for (const scenario &s : fused) {
        check_barriers(s);
        check_fault(s, CUDA_WRONG_LANE);
        if (strstr(s.name, "without layers") == nullptr) check_fault(s, CUDA_WRONG_MMA);
    }
    for (const scenario &s : grouped_back) {
        check_barriers(s);
        check_fault(s, CUDA_WRONG_LANE);
    }
    check_fault(fused[4], CUDA_NO_WAIT);
#ifdef CUDA_ASAN
    for (int i : {0, 4}) check_fault(fused[i], CUDA_LITTLE_SHARED);
    check_fault(grouped_back[0], CUDA_LITTLE_SHARED);
#endif
}

static void test_cuda_fault_wait()
{
    check_fault(products[3], CUDA_NO_WAIT);
    check_fault(products[4], CUDA_NO_WAIT);
    for (int i : {6, 7, 8, 9}) check_fault(products[i], CUDA_NO_WAIT);
}

static void test_cuda_fault_wgmma()
{
    for (int i : {7, 8, 9})
        for (cuda_sabotage_kind kind : {CUDA_NO_WGMMA_WAIT, CUDA_NO_WGMMA_FENCE, CUDA_NO_WGMMA_PUBLISH}) check_fault(products[i], kind);
}

static void test_cuda_fault_shuffle()
{
    check_fault(products[0], CUDA_WRONG_LANE);
    check_fault(products[5], CUDA_WRONG_LANE);
    for (int i : {0, 1, 2, 6, 8, 10}) check_fault(others[i], CUDA_WRONG_LANE);
}

static void test_cuda_fault_mma()
{
    for (int i = 1; i <= 9; i++) check_fault(products[i], CUDA_WRONG_MMA);
}

static void test_cuda_fault_reads_beyond()
{
    for (int i = 1; i <= 9; i++) check_fault(products[i], CUDA_READS_BEYOND); /* weights, and what is copied of q */
}

#ifdef CUDA_ASAN
static void test_cuda_fault_little_shared_memory()
{
    for (int i : {3, 4, 5, 7, 8, 9}) check_fault(products[i], CUDA_LITTLE_SHARED); /* the others ask for more than they need here */
}
#endif

static void suite_cuda_faults()
{
    RUN_ONCE(test_cuda_fault_barrier);
    RUN_ONCE(test_cuda_fault_sparse);
    RUN_ONCE(test_cuda_fault_fused);
    RUN_ONCE(test_cuda_failures_of_layers);
    RUN_ONCE(test_cuda_fault_wait);
    RUN_ONCE(test_cuda_fault_wgmma);
    RUN_ONCE(test_cuda_fault_shuffle);
    RUN_ONCE(test_cuda_fault_mma);
    RUN_ONCE(test_cuda_fault_reads_beyond);
#ifdef CUDA_ASAN
    RUN_ONCE(test_cuda_fault_little_shared_memory);
#endif
}

#else
static void suite_cuda_faults() {}
#endif
