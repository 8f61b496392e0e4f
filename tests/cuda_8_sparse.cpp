/* Tests of [CUDA-8] in ternary_cuda.cu that concern mixtures of experts, graphs and codebooks. */

/* -- routing -- */

/* ties: few different logits, zeros of both signs among them. */
static float test_tie() { return (float)((int)(test_random() % 3) - 1) * (test_random() % 2 ? 0.0f : 1.5f); }

static void test_routed(int64_t n, int32_t count, int32_t k, tern_route_kind kind, bool ties, bool bad)
{
    mirror<float> logits(n * count, ties ? test_tie : test_four), weights(n * k, test_uniform), dweights(n * k, test_uniform),
                  dlogits(n * count, test_uniform);
    mirror<int32_t> ids(n * k), loads(count, [&] { return (int32_t)(test_random() % 9); });
    if (bad) {
        logits[CPU][(n / 2) * count + count - 1] = test_nan;
        logits[CPU][(n - 1) * count] = -test_infinity;
        logits.send();
    }
    const auto args = [&](int side) {
        tern_route_args a = {};
        a.n = n;
        a.count = count;
        a.k = k;
        a.kind = kind;
        a.logits = logits[side];
        a.ids = ids[side];
        a.weights = weights[side];
        return a;
    };
    test_both([&](tern_context *c, int side) {
        const tern_route_args a = args(side);
        return tern_route(c, &a);
    });
    CHECK_SAME(ids);
    CHECK_SAME(weights);
    for (bool balanced : {false, true}) {
        test_both([&](tern_context *c, int side) {
            tern_route_args a = args(side);
            a.dweights = dweights[side];
            a.loads = balanced ? loads[side] : NULL;
            a.balance = 0.3f;
            a.dlogits = dlogits[side];
            return tern_route(c, &a);
        });
        CHECK_SAME(dlogits);
    }
}

static void test_cuda_route()
{
    int i = 0;
    for (int32_t count : {1, 3, 31, 32, 33, 127, 1024})
        for (int32_t k : {1, 2, 8, 33, 1024})
            for (tern_route_kind kind : {TERN_ROUTE_SELECTED, TERN_ROUTE_RENORMALIZED, TERN_ROUTE_ALL}) {
                if (k > count && k > 2) continue;
                test_routed(count > 500 ? 2 : 7, count, k > count ? count : k, kind, i % 3 == 1, i % 4 == 2);
                i++;
            }
    test_routed(600, 5, 2, TERN_ROUTE_SELECTED, true, true); /* more tokens than warps */
}

/* -- grouping -- */

static void test_grouped(int64_t n, int32_t count, int32_t k, bool dense, bool weighted)
{
    const int64_t places = dense ? n * count : n * k;
    mirror<int32_t> ids(n * k), loads(count), tokens(places), slots(places);
    mirror<float> weights(n * k, test_uniform), sorted(places);
    for (int64_t i = 0; i < n * k; i++) ids[CPU][i] = (int32_t)(i % k * (count / k) + test_random() % (uint32_t)(count / k));
    if (n > 3) {
        ids[CPU][0] = -1;
        ids[CPU][n * k - 1] = count;
        ids[CPU][n * k / 2] = -7;
    }
    ids.send();
    test_both([&](tern_context *c, int side) {
        tern_group_args a = {};
        a.n = n;
        a.count = count;
        a.k = k;
        a.dense = dense;
        a.ids = ids[side];
        a.weights = weighted ? weights[side] : NULL;
        a.loads = loads[side];
        a.tokens = tokens[side];
        a.slots = slots[side];
        a.sorted = weighted ? sorted[side] : NULL;
        return tern_group(c, &a);
    });
    CHECK_SAME(loads);
    CHECK_SAME(tokens);
    CHECK_SAME(slots);
    CHECK_SAME(sorted);
}

static void test_cuda_group()
{
    for (int dense = 0; dense < 2; dense++) {
        test_grouped(1, 1, 1, dense, true);
        test_grouped(17, 8, 2, dense, true);
        test_grouped(127, 5, 5, dense, false);
        test_grouped(700, 6, 3, dense, true); /* rounds of 1024 slots */
        test_grouped(3, 128, 8, dense, true);
    }
}

static void test_row_dots(int64_t cols, int64_t n)
{
    const int64_t rows = 7;
    mirror<float> a(rows * cols, test_uniform), b(n * cols, test_uniform), y(n, test_uniform);
    mirror<int32_t> ids(n, [&] { return (int32_t)(test_random() % (uint32_t)(rows + 2)) - 1; }), to(n);
    for (int64_t i = 0; i < n; i++) to[CPU][i] = (int32_t)(n - 1 - i);
    to[CPU][1] = -1;
    to[CPU][2] = (int32_t)n;
    to.send();
    test_both([&](tern_context *c, int side) {
        tern_row_dot_args d = {};
        d.rows = rows;
        d.cols = cols;
        d.n = d.count = n;
        d.a = a[side];
        d.b = b[side];
        d.ids = ids[side];
        d.to = to[side];
        d.y = y[side];
        return tern_row_dot(c, &d);
    });
    CHECK_SAME(y);
}

static void test_cuda_row_dot()
{
    for (int64_t cols : {1, 15, 33, 127, 1024, 1025, 4097}) test_row_dots(cols, cols < 100 ? 150 : 9);
}

/* -- graphs -- */

enum { AGGREGATE_LEFT = 1, AGGREGATE_RIGHT = 2, AGGREGATE_INT8 = 4, AGGREGATE_BAD = 8, AGGREGATE_VARIANTS = 16 };

/* The same random graph in both memories: node 3 has no edges, the nodes of `hubs` very many. */
struct graph_pair {
    tern_graph at[2];
    graph_pair(int64_t nodes, int64_t edges, std::vector<std::pair<int32_t, int64_t>> hubs)
    {
        std::vector<int32_t> from, to;
        std::vector<int8_t> sign;
        const auto join = [&](int32_t end) {
            from.push_back((int32_t)(test_random() % (uint32_t)nodes));
            to.push_back(end == 3 ? 2 : end);
            sign.push_back(test_random() % 3 ? 1 : -1);
        };
        for (int64_t i = 0; i < edges; i++) join((int32_t)(test_random() % (uint32_t)nodes));
        for (const auto &hub : hubs)
            for (int64_t i = 0; i < hub.second; i++) join(hub.first);
        tern_edges e = {};
        e.nodes = nodes;
        e.count = (int64_t)from.size();
        e.from = from.data();
        e.to = to.data();
        e.sign = sign.data();
        for (int side = CPU; side <= GPU; side++)
            if (tern_graph_build(test_context[side], &e, &at[side]) != TERN_OK) abort();
    }
    graph_pair(const graph_pair &) = delete;
    graph_pair &operator=(const graph_pair &) = delete;
    ~graph_pair() { for (int side = CPU; side <= GPU; side++) tern_graph_free(test_context[side], &at[side]); }
};

/* Nodes [first, end) alone, as a hop on the CPU takes them. */
static tern_adjacency some_rows(const tern_graph &cpu, const tern_adjacency &all, int64_t first, int64_t end)
{
    tern_adjacency e = tern__some_rows(&cpu.in, first, end - first);
    e.start = all.start + first;
    e.entry = all.entry;
    e.hub = all.hub + (e.hub - cpu.in.hub);
    e.part = all.part + (e.part - cpu.in.part);
    return e;
}

static void test_aggregated_rows(const graph_pair &g, int64_t cols, int64_t first, int64_t end)
{
    const int64_t nodes = g.at[CPU].nodes;
    mirror<float> x(nodes * cols, test_uniform), y((end - first) * cols), part(g.at[CPU].in.parts * cols + 1);
    test_both([&](tern_context *c, int side) {
        tern_aggregate_args a = {};
        a.edges = some_rows(g.at[CPU], g.at[side].in, first, end);
        a.cols = cols;
        a.x = x[side];
        a.part = part[side];
        a.y = y[side];
        return tern_aggregate(c, &a);
    });
    CHECK_SAME(y);
}

static void test_aggregated(const graph_pair &g, int64_t cols, int variant, bool turned)
{
    const int64_t nodes = g.at[CPU].nodes, q_row = (cols + 15) / 16 * 16, parts = turned ? g.at[CPU].out.parts : g.at[CPU].in.parts;
    mirror<float> x(nodes * cols, test_uniform), y(nodes * cols), scale(nodes, test_uniform), left(nodes, test_uniform),
                  right(nodes, test_uniform), part(parts * cols + 1);
    mirror<int8_t> q(nodes * q_row, [] { return (int)(test_random() % 255) - 127; });
    if (variant & AGGREGATE_BAD) {
        x[CPU][5 * cols + cols - 1] = test_infinity;
        scale[CPU][5] = 3e38f;
        x.send();
        scale.send();
    }
    test_both([&](tern_context *c, int side) {
        tern_aggregate_args a = {};
        a.edges = turned ? g.at[side].out : g.at[side].in;
        a.cols = cols;
        a.left = variant & AGGREGATE_LEFT ? left[side] : NULL;
        a.right = variant & AGGREGATE_RIGHT ? right[side] : NULL;
        a.x = x[side];
        a.q = variant & AGGREGATE_INT8 ? q[side] : NULL;
        a.scale = scale[side];
        a.q_row = q_row;
        a.part = part[side];
        a.y = y[side];
        return tern_aggregate(c, &a);
    });
    CHECK_SAME(y);
}

static void test_cuda_aggregate()
{
    const graph_pair sparse(17, 40, {}), hubs(21, 90, {{0, 257}, {7, 1100}, {20, 600}}), many(300, 900, {{0, 256}});
    for (int variant = 0; variant < AGGREGATE_VARIANTS; variant++) {
        for (int64_t cols : {1, 3, 16, 127}) test_aggregated(sparse, cols, variant, variant % 2);
        test_aggregated(hubs, variant % 4 ? 7 : 1030, variant, variant % 3 == 2);
        if (variant % 5 == 0) test_aggregated(many, 4, variant, false);
    }
    for (int64_t first : {0, 1, 7, 8, 20}) test_aggregated_rows(hubs, 5, first, 21);
    for (int64_t end : {1, 8, 20}) test_aggregated_rows(hubs, 5, 0, end);
    test_aggregated_rows(hubs, 5, 5, 9);
}

/* -- gates and codebooks -- */

static void test_gated(int64_t n, int64_t count, int64_t cols, bool bad)
{
    mirror<float> h(n * cols, test_uniform), key(count * n * cols, test_uniform), value(count * n * cols, test_uniform),
                  gate(count * n), y(n * cols);
    mirror<float> dy(n * cols, test_uniform), dh(n * cols), dkey(count * n * cols), dvalue(count * n * cols);
    if (bad) {
        value[CPU][(n / 2) * cols + cols - 1] = test_infinity;
        value[CPU][(count * n - 1) * cols] = -test_infinity;
        value.send();
    }
    for (bool backward : {false, true})
        if (!backward || !bad) test_both([&](tern_context *c, int side) {
            tern_gate_args a = {};
            a.n = n;
            a.count = count;
            a.cols = cols;
            a.h = h[side];
            a.key = key[side];
            a.value = value[side];
            a.gate = gate[side];
            a.y = y[side];
            a.dy = backward ? dy[side] : NULL;
            a.dh = dh[side];
            a.dkey = dkey[side];
            a.dvalue = dvalue[side];
            return tern_gate(c, &a);
        });
    CHECK_SAME(gate);
    CHECK_SAME(y);
    CHECK_SAME(dh);
    CHECK_SAME(dkey);
    CHECK_SAME(dvalue);
}

static void test_cuda_gate()
{
    for (int64_t cols : {1, 15, 16, 127, 1025, 4097})
        for (int bad = 0; bad < 2; bad++) test_gated(5, cols % 3 + 1, cols, bad);
    test_gated(150, 2, 8, false);
}

static void test_nearest(int64_t cols, int64_t rows, int64_t n)
{
    mirror<float> x(n * cols, test_uniform), w(rows * cols, test_uniform), distance(n);
    mirror<int32_t> ids(n);
    if (rows > 30) memcpy(w[CPU] + 30 * cols, w[CPU] + 4 * cols, (size_t)cols * 4); /* of equal ones the first */
    if (rows > 30) memcpy(w[CPU] + 5 * cols, w[CPU] + 12 * cols, (size_t)cols * 4);
    if (rows > 30) memcpy(x[CPU] + cols, w[CPU] + 30 * cols, (size_t)cols * 4);
    if (rows > 30) memcpy(x[CPU], w[CPU] + 12 * cols, (size_t)cols * 4);
    x[CPU][2 * cols] = test_nan;
    x[CPU][4 * cols + cols - 1] = 2e19f;
    x.send();
    w.send();
    test_both([&](tern_context *c, int side) {
        tern_nearest_args a = {};
        a.n = n;
        a.rows = rows;
        a.cols = cols;
        a.x = x[side];
        a.w = w[side];
        a.ids = ids[side];
        a.distance = rows == 7 ? NULL : distance[side];
        return tern_nearest(c, &a);
    });
    CHECK_SAME(ids);
    CHECK_SAME(distance);
}

static void test_cuda_nearest()
{
    for (int64_t cols : {1, 15, 16, 127, 1025, 4097})
        for (int64_t rows : {1, 7, 33}) test_nearest(cols, rows, cols < 10 ? 150 : 6);
}

static void test_cuda_sparse_limits()
{
    tern_context *c = test_context[GPU];
    mirror<float> x(1);
    mirror<int32_t> id(1);
    tern_row_dot_args dot = {};
    tern_gate_args gate = {};
    tern_nearest_args nearest = {};
    dot.rows = dot.n = dot.count = gate.n = gate.count = nearest.n = nearest.rows = 1;
    dot.cols = gate.cols = nearest.cols = TERN__LONGEST_ROW + 1;
    dot.a = dot.b = gate.h = gate.key = gate.value = dot.y = gate.gate = gate.y = x[GPU];
    nearest.x = nearest.w = x[GPU];
    dot.ids = dot.to = nearest.ids = id[GPU];
    test_unsupported(tern_row_dot(c, &dot), "row_dot: rows of 1048577; 1048576 is the most");
    test_unsupported(tern_gate(c, &gate), "gate: rows of 1048577; 1048576 is the most");
    test_unsupported(tern_nearest(c, &nearest), "nearest: rows of 1048577; 1048576 is the most");
    CHECK_OK(tern_sync(c));
}

static void suite_cuda_sparse()
{
    RUN(test_cuda_route);
    RUN(test_cuda_group);
    RUN(test_cuda_row_dot);
    RUN(test_cuda_aggregate);
    RUN(test_cuda_gate);
    RUN(test_cuda_nearest);
    RUN(test_cuda_sparse_limits);
}
