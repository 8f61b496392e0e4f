/* Room 17, mixture of experts, and its operations of room 14. Forward: bit for bit what the public layers give token by token
   and expert by expert, for dense and sparse dispatch, every tier, thread count and option. Gradients: central differences of
   a float64 reference. */

/* -- a layer of odd sizes, with whatever options -- */

enum { KIT_EXPERTS = 128 };
typedef struct kit {
    tern_context *c;
    tern_param router, router_gain, gain, expert[3 * (KIT_EXPERTS + 1)], low_a[KIT_EXPERTS], low_b[KIT_EXPERTS];
    tern_param *all[5 * KIT_EXPERTS + 6], *lows_a[KIT_EXPERTS], *lows_b[KIT_EXPERTS];
    tern_expert experts[KIT_EXPERTS], always;
    tern_moe m;
    int32_t count; /* of all */
} kit;

typedef struct kit_options {
    int32_t count, top_k, cols, width, gated, always, low; /* low: rank, negative for a ternary one */
    tern_rule rule;
    int32_t grain;
    tern_type encoding;
    tern_act act;
    tern_map_fn fn;
    tern_route_kind weights;
    tern_norm_kind norm, inner;
    tern_rule router;
} kit_options;

static tern_param *kit_param(kit *k, tern_param *p, const char *name, int32_t index, int64_t rows, int64_t cols, tern_rule rule, const kit_options *o)
{
    *p = param_of("", rows, cols, rule, rule == TERN_DENSE ? 0 : o->grain);
    sprintf(p->name, "%s.%d", name, (int)index);
    p->buffer[TERN_TRITS].type = rule == TERN_DENSE ? TERN_TYPE_DEFAULT : o->encoding;
    CHECK_OK(k->c, tern_param_alloc(k->c, p, TERN_FOR_ADAMW));
    set_random(k->c, p);
    return k->all[k->count++] = p;
}

static tern_expert kit_expert(kit *k, int32_t index, int32_t width, const kit_options *o)
{
    tern_param *p = &k->expert[3 * index];
    tern_expert e = {NULL, NULL, NULL};
    if (o->gated) e.gate = kit_param(k, p, "gate", index, width, o->cols, o->rule, o);
    e.up = kit_param(k, p + 1, "up", index, width, o->cols, o->rule, o);
    e.down = kit_param(k, p + 2, "down", index, o->cols, width, o->rule, o);
    return e;
}

static kit *kit_open(tern_context *c, const kit_options *o)
{
    kit *k = (kit *)calloc(1, sizeof *k);
    int32_t e;
    k->c = c;
    k->m.router.w = kit_param(k, &k->router, "router", 0, o->count, o->cols, o->router, o);
    k->m.router.act = o->act == TERN_ACT_BIT ? TERN_ACT_INT8 : o->act;
    if (o->norm == TERN_NORM_RMS) {
        k->m.router.norm = TERN_NORM_RMS;
        k->m.router.gain = kit_param(k, &k->router_gain, "router_gain", 0, 1, o->cols, TERN_DENSE, o);
        k->m.gain = kit_param(k, &k->gain, "gain", 0, 1, o->cols, TERN_DENSE, o);
    }
    for (e = 0; e < (o->low ? 1 : o->count); e++) k->experts[e] = kit_expert(k, e, o->width, o);
    for (e = 0; o->low && e < o->count; e++) {
        const int32_t rank = o->low < 0 ? -o->low : o->low;
        const tern_rule rule = o->low < 0 ? TERN_ABSMEAN : TERN_DENSE;
        k->lows_a[e] = kit_param(k, &k->low_a[e], "low_a", e, rank, o->cols, rule, o);
        k->lows_b[e] = kit_param(k, &k->low_b[e], "low_b", e, o->width, rank, rule, o);
        k->m.low_a = k->lows_a;
        k->m.low_b = k->lows_b;
    }
    if (o->always) {
        k->always = kit_expert(k, KIT_EXPERTS, o->always, o);
        k->m.always = &k->always;
    }
    k->m.experts = k->experts;
    k->m.count = o->count;
    k->m.top_k = o->top_k;
    k->m.weights = o->weights;
    k->m.fn = o->fn;
    k->m.norm = o->norm;
    k->m.inner = o->inner;
    k->m.act = o->act;
    return k;
}

static void kit_close(kit *k)
{
    int32_t i;
    for (i = 0; i < k->count; i++) tern_param_free(k->c, k->all[i], -1);
    free(k);
}

static void *kit_reserve(kit *k, int64_t n)
{
    tern_need need = TERN_ZERO;
    CHECK_OK(k->c, tern_moe_need(k->c, &k->m, n, &need));
    CHECK_OK(k->c, tern_reserve(k->c, need.scratch));
    return hold(need.saved);
}

static const kit_options kits[] = {
    {4, 2, 21, 13, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, TERN_MAP_ADD, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE},
    {3, 1, 17, 30, 0, 9, 0, TERN_ABSMEAN, 8, TERN_BASE3, TERN_ACT_INT8, TERN_MAP_RELU2, TERN_ROUTE_ALL, TERN_NORM_NONE, TERN_NORM_RMS, TERN_ABSMEAN},
    {8, 8, 33, 16, 1, 40, 0, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_FLOAT, TERN_MAP_GELU, TERN_ROUTE_RENORMALIZED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {5, 3, 20, 15, 1, 0, 0, TERN_DENSE, 0, TERN_2BIT, TERN_ACT_INT8, TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_ABSMEAN},
    {4, 2, 50, 20, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT4, TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_ABSMEAN},
    {1, 1, 16, 12, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, TERN_MAP_RELU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {4, 2, 21, 18, 1, 0, 5, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {6, 3, 19, 14, 0, 10, -4, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8, TERN_MAP_GELU, TERN_ROUTE_ALL, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE},
    {3, 2, 12, 9, 1, 0, 3, TERN_DENSE, 0, TERN_2BIT, TERN_ACT_FLOAT, TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE},
    {4, 3, 14, 11, 0, 0, -3, TERN_ABSMEAN, 8, TERN_2BIT, TERN_ACT_FLOAT, TERN_MAP_RELU2, TERN_ROUTE_RENORMALIZED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_ABSMEAN},
    {4, 2, 40, 10, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_BIT, TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE},
};
enum { KITS = sizeof kits / sizeof kits[0] };

/* -- the operations -- */

/* Logits that are often equal. */
static float *hold_ties(int64_t n)
{
    float *x = hold_output(n);
    int64_t i;
    for (i = 0; i < n; i++) x[i] = (float)(int)(test_random() % 5) - 2.0f;
    return x;
}

/* What is chosen, literally: again and again the largest that is left, the first of equals. */
static void literal_choice(const float *x, int32_t count, int32_t k, int32_t *ids)
{
    char taken[KIT_EXPERTS] = {0};
    int32_t i, j, at = 0;
    for (j = 0; j < k; j++) {
        int32_t best = -1;
        for (i = 0; i < count; i++) if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
        taken[best] = 1;
    }
    for (i = 0; i < count; i++) if (taken[i]) ids[at++] = i;
}

static void literal_softmax(const double *x, int32_t n, double *p)
{
    double sum = 0, most = x[0];
    int32_t i;
    for (i = 1; i < n; i++) if (x[i] > most) most = x[i];
    for (i = 0; i < n; i++) sum += p[i] = exp(x[i] - most);
    for (i = 0; i < n; i++) p[i] /= sum;
}

static void literal_weights(const double *x, int32_t count, int32_t k, tern_route_kind kind, const int32_t *ids, double *weights)
{
    double p[KIT_EXPERTS], sum = 0;
    int32_t i;
    literal_softmax(x, count, p);
    for (i = 0; i < k; i++) sum += weights[i] = p[ids[i]];
    for (i = 0; i < k && kind != TERN_ROUTE_ALL; i++) weights[i] /= sum;
}

static void routes(tern_context *c, record *r)
{
    static const int32_t counts[] = {1, 3, 8, 128}, ks[] = {1, 2, 8, 128};
    int i, j, kind, ties;
    for (i = 0; i < 4; i++)
        for (j = 0; j < 4; j++)
            for (kind = TERN_ROUTE_SELECTED; kind <= TERN_ROUTE_ALL; kind++)
                for (ties = 0; ties < 2; ties++) {
                    const int64_t n = 17;
                    const int32_t count = counts[i], k = ks[j] < count ? ks[j] : count;
                    tern_route_args a = TERN_ZERO;
                    int32_t ids[KIT_EXPERTS], e;
                    double weights[KIT_EXPERTS];
                    int64_t t;
                    a.n = n;
                    a.count = count;
                    a.k = k;
                    a.kind = (tern_route_kind)kind;
                    a.logits = ties ? hold_ties(n * count) : hold_floats(n * count);
                    a.ids = (int32_t *)hold((size_t)(n * k) * 4);
                    a.weights = hold_output(n * k);
                    CHECK_OK(c, tern_route(c, &a));
                    for (t = 0; t < n; t++) {
                        const double *x = hold_doubles(a.logits + t * count, count);
                        literal_choice(a.logits + t * count, count, k, ids);
                        literal_weights(x, count, k, a.kind, ids, weights);
                        CHECK(memcmp(ids, a.ids + t * k, (size_t)k * 4) == 0, "%d of %d experts, token %d", (int)k, (int)count, (int)t);
                        for (e = 0; e < k; e++) CHECK(fabs(weights[e] - a.weights[t * k + e]) < 1e-6, "kind %d: %g is not %g", kind, a.weights[t * k + e], weights[e]);
                    }
                    record_words(r, a.ids, n * k);
                    record_words(r, a.weights, n * k);
                    release();
                }
}
static void test_moe_route(void) { same_everywhere(routes, UINT64_C(0x52BE442CC59335F9)); }

/* The loss whose gradient route's backward is: sum of weights * dweights, plus the balance. */
static double route_loss(const tern_route_args *a, const double *x)
{
    double p[KIT_EXPERTS], weights[KIT_EXPERTS], loss = 0;
    int64_t t;
    int32_t e;
    for (t = 0; t < a->n; t++) {
        literal_weights(x + t * a->count, a->count, a->k, a->kind, a->ids + t * a->k, weights);
        for (e = 0; e < a->k; e++) loss += weights[e] * a->dweights[t * a->k + e];
        literal_softmax(x + t * a->count, a->count, p);
        for (e = 0; a->loads && e < a->count; e++)
            loss += (double)a->balance * a->count * ((double)a->loads[e] / ((double)a->n * a->k)) * (p[e] / (double)a->n);
    }
    return loss;
}

static void route_gradients(tern_context *c, record *r)
{
    int kind, balanced;
    for (kind = TERN_ROUTE_SELECTED; kind <= TERN_ROUTE_ALL; kind++)
        for (balanced = 0; balanced < 2; balanced++) {
            const int64_t n = 9;
            const int32_t count = 7, k = 3;
            tern_route_args a = TERN_ZERO;
            double *x;
            int64_t i;
            a.n = n;
            a.count = count;
            a.k = k;
            a.kind = (tern_route_kind)kind;
            a.logits = hold_floats(n * count);
            a.ids = (int32_t *)hold((size_t)(n * k) * 4);
            a.weights = hold_output(n * k);
            CHECK_OK(c, tern_route(c, &a));
            x = hold_doubles(a.logits, n * count);
            a.dweights = hold_floats(n * k);
            a.loads = balanced ? hold_ids(count, 9) : NULL;
            a.balance = 3.0f;
            a.dlogits = hold_output(n * count);
            CHECK_OK(c, tern_route(c, &a));
            for (i = 0; i < n * count; i++) {
                const double at = x[i];
                double slope;
                x[i] = at + 1e-5;
                slope = route_loss(&a, x);
                x[i] = at - 1e-5;
                slope = (slope - route_loss(&a, x)) / 2e-5;
                x[i] = at;
                CHECK(fabs(slope - a.dlogits[i]) < 1e-5, "kind %d: dlogits[%d] is %g, not %g", kind, (int)i, a.dlogits[i], slope);
            }
            record_words(r, a.dlogits, n * count);
            release();
        }
}
static void test_moe_route_backward(void) { same_for_threads(route_gradients); }

static void test_moe_route_faults(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_route_args a = TERN_ZERO;
    float logits[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, weights[6], dweights[6] = {1, 2, 3, 4, 5, 6}, dlogits[12];
    int32_t ids[6];
    int i;
    logits[5] = (float)NAN;
    logits[8] = (float)INFINITY;
    a.n = 3;
    a.count = 4;
    a.k = 2;
    a.logits = logits;
    a.ids = ids;
    a.weights = weights;
    CHECK_OK(t.c, tern_route(t.c, &a));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "route: the logits of row 1");
    for (i = 2; i < 6; i++) CHECK(ids[i] == -1 && weights[i] == 0.0f, "[%d]: %d, %g", i, (int)ids[i], weights[i]);
    CHECK(ids[0] == 2 && ids[1] == 3, "row 0 chose %d and %d", (int)ids[0], (int)ids[1]);
    a.dweights = dweights;
    a.dlogits = dlogits;
    CHECK_OK(t.c, tern_route(t.c, &a));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "row 1");
    for (i = 4; i < 12; i++) CHECK(dlogits[i] == 0.0f, "dlogits[%d] is %g", i, dlogits[i]);
    CHECK(dlogits[3] != 0.0f, "row 0 has no gradient");
    a.k = 5;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_SHAPE, "route: k = 5 of 4 experts");
    a.k = 0;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_SHAPE, "route: k = 0 of 4 experts");
    a.k = 2;
    a.count = 1025;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_SHAPE, "route: 1025 experts; 1 to 1024");
    a.count = 4;
    a.n = 0;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_SHAPE, "n = 0");
    a.n = (int64_t)1 << 30;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_OVERFLOW, "beyond int32");
    a.n = 3;
    a.kind = (tern_route_kind)3;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_ARGUMENT, "kind 3");
    a.kind = TERN_ROUTE_ALL;
    a.balance = (float)NAN;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_ARGUMENT, "balance");
    a.balance = 0;
    a.dlogits = NULL;
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_ARGUMENT, "dlogits is NULL");
    test_close(&t);
}

static void test_moe_group(void)
{
    static const int32_t ids[10] = {1, 3, 0, 3, -1, 9, 3, 0, 1, 3};
    static const int32_t loads[5] = {2, 2, 0, 4, 0}, tokens[10] = {1, 3, 0, 4, 0, 1, 3, 4, -1, -1}, slots[10] = {2, 7, 0, 8, 1, 3, 6, 9, -1, -1};
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_group_args a = TERN_ZERO;
    float weights[10], sorted[25];
    int32_t got_loads[5], got_tokens[25], got_slots[25], e, i, j;
    for (i = 0; i < 10; i++) weights[i] = (float)i + 1;
    a.n = 5;
    a.count = 5;
    a.k = 2;
    a.ids = ids;
    a.weights = weights;
    a.loads = got_loads;
    a.tokens = got_tokens;
    a.slots = got_slots;
    a.sorted = sorted;
    CHECK_OK(t.c, tern_group(t.c, &a));
    CHECK(memcmp(loads, got_loads, sizeof loads) == 0, "loads");
    CHECK(memcmp(tokens, got_tokens, sizeof tokens) == 0, "tokens");
    CHECK(memcmp(slots, got_slots, sizeof slots) == 0, "slots");
    for (i = 0; i < 10; i++) CHECK(sorted[i] == (slots[i] < 0 ? 0.0f : weights[slots[i]]), "sorted[%d] is %g", (int)i, sorted[i]);
    a.dense = 1;
    CHECK_OK(t.c, tern_group(t.c, &a));
    CHECK(memcmp(loads, got_loads, sizeof loads) == 0, "loads of a dense dispatch");
    for (e = 0; e < 5; e++)
        for (i = 0; i < 5; i++) {
            int32_t slot = -1;
            for (j = 0; j < 2; j++) if (ids[2 * i + j] == e) slot = 2 * i + j;
            CHECK(got_slots[5 * e + i] == slot && got_tokens[5 * e + i] == (slot < 0 ? -1 : i) && sorted[5 * e + i] == (slot < 0 ? 0.0f : weights[slot]), "expert %d, token %d", (int)e, (int)i);
        }
    a.sorted = NULL;
    a.weights = NULL;
    CHECK_OK(t.c, tern_group(t.c, &a));
    a.sorted = sorted;
    CHECK_FAILS(t.c, tern_group(t.c, &a), TERN_E_ARGUMENT, "weights is NULL");
    a.k = 6;
    CHECK_FAILS(t.c, tern_group(t.c, &a), TERN_E_SHAPE, "group: k = 6 of 5");
    test_close(&t);
}

/* Weights of gather and scatter, and dots of rows. */
static void weighted_rows(tern_context *c, record *r)
{
    static const int64_t widths[] = {1, 15, 130, 1500};
    int i;
    for (i = 0; i < 4; i++) {
        const int64_t cols = widths[i], n = 33, rows = 20;
        const float *w = hold_floats(rows * cols), *weight = hold_floats(n);
        tern_gather_args g = TERN_ZERO;
        tern_scatter_args s = TERN_ZERO;
        tern_row_dot_args d = TERN_ZERO;
        int32_t *ids = hold_ids(n, (int32_t)rows), *to = hold_ids(n, 1);
        float *expected = hold_zeros(rows * cols);
        int64_t t, j;
        for (t = 0; t < n; t++) to[t] = (int32_t)(n - 1 - t);
        g.m.rows = rows; g.m.cols = cols;
        g.w = w;
        g.n = n;
        g.ids = ids;
        g.weight = weight;
        g.y = hold_output(n * cols);
        CHECK_OK(c, tern_gather(c, &g));
        for (t = 0; t < n * cols; t++) CHECK(g.y[t] == weight[t / cols] * w[ids[t / cols] * cols + t % cols], "gather %d", (int)t);
        ids[3] = -1;
        s.rows = rows; s.cols = cols; s.n = n;
        s.ids = ids;
        s.weight = weight;
        s.dy = g.y;
        s.dw = hold_zeros(rows * cols);
        CHECK_OK(c, tern_scatter(c, &s));
        for (t = 0; t < n; t++)
            for (j = 0; t != 3 && j < cols; j++) expected[ids[t] * cols + j] += weight[t] * g.y[t * cols + j];
        CHECK(memcmp(expected, s.dw, (size_t)(rows * cols) * 4) == 0, "scatter");
        d.rows = rows; d.cols = cols; d.n = n;
        d.a = w;
        d.b = g.y;
        d.ids = ids;
        d.to = to;
        d.y = hold_zeros(n);
        CHECK_OK(c, tern_row_dot(c, &d));
        for (t = 0; t < n; t++) {
            double sum = 0;
            for (j = 0; t != 3 && j < cols; j++) sum += (double)w[ids[t] * cols + j] * g.y[t * cols + j];
            CHECK(fabs(sum - d.y[n - 1 - t]) < 1e-4, "dot %d is %g, not %g", (int)t, d.y[n - 1 - t], sum);
        }
        record_words(r, g.y, n * cols);
        record_words(r, s.dw, rows * cols);
        record_words(r, d.y, n);
        release();
    }
}
static void test_moe_weighted_rows(void) { same_everywhere(weighted_rows, UINT64_C(0x9F649392BAB6FC7E)); }

/* -- forward -- */

/* Token t by the public layers, one expert after the other. */
static void composed(kit *k, const float *x, float *y)
{
    const tern_moe *m = &k->m;
    const tern_map_fn fn = m->fn == TERN_MAP_ADD ? TERN_MAP_SILU : m->fn;
    const int64_t cols = m->experts[0].up->cols, width = m->experts[0].up->rows;
    float *logits = hold_output(m->count), *weights = hold_output(m->top_k), *g = hold_output(200), *u = hold_output(200), *out = hold_output(cols), *sum = hold_zeros(width);
    int32_t *ids = (int32_t *)hold((size_t)m->top_k * 4), i, s;
    tern_route_args a = TERN_ZERO;
    int64_t j;
    CHECK_OK(k->c, tern_linear_forward(k->c, &m->router, 1, x, logits, NULL));
    a.n = 1;
    a.count = m->count;
    a.k = m->top_k;
    a.kind = m->weights;
    a.logits = logits;
    a.ids = ids;
    a.weights = weights;
    CHECK_OK(k->c, tern_route(k->c, &a));
    for (j = 0; j < cols; j++) y[j] = 0.0f;
    for (s = 0; s <= m->top_k; s++) { /* the last is always on */
        const tern_expert *e = s == m->top_k ? m->always : m->low_a ? &m->experts[0] : &m->experts[ids[s]];
        tern_linear l = TERN_ZERO;
        tern_map_args map = TERN_ZERO;
        if (m->low_a && s == m->top_k) { /* first the sum of the others goes down */
            l.w = m->experts[0].down;
            l.norm = m->inner;
            l.act = m->act;
            CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, sum, y, NULL));
        }
        if (!e) break;
        l.w = e->up;
        l.norm = m->norm;
        l.gain = m->gain;
        l.act = m->act;
        CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, x, u, NULL));
        if (e->gate) {
            l.w = e->gate;
            CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, x, g, NULL));
        }
        map.fn = fn;
        map.count = e->up->rows;
        map.a = e->gate ? g : u;
        map.y = g;
        CHECK_OK(k->c, tern_map(k->c, &map));
        for (j = 0; e->gate && j < e->up->rows; j++) g[j] = g[j] * u[j];
        if (m->low_a && s < m->top_k) {
            l.w = m->low_a[ids[s]];
            CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, x, out, NULL));
            l = m->router;
            l.w = m->low_b[ids[s]];
            l.norm = TERN_NORM_NONE;
            l.gain = NULL;
            l.act = m->act;
            CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, out, u, NULL));
            for (i = 0; i < width; i++) { const float product = g[i] * u[i], weighted = weights[s] * product; sum[i] = sum[i] + weighted; }
            continue;
        }
        l = m->router;
        l.w = e->down;
        l.norm = m->inner;
        l.gain = NULL;
        l.act = m->act;
        CHECK_OK(k->c, tern_linear_forward(k->c, &l, 1, g, out, NULL));
        for (j = 0; j < cols; j++) { const float weighted = s == m->top_k ? out[j] : weights[s] * out[j]; y[j] = y[j] + weighted; }
    }
}

static float *moe_input(const kit *k, int64_t n) { return k->m.act == TERN_ACT_BIT ? hold_sparse(n * k->m.router.w->cols, 3) : hold_floats(n * k->m.router.w->cols); }

/* Both dispatches, with and without `saved`, beside the composition. */
static void moe_forwards(tern_context *c, record *r)
{
    int i, s;
    for (i = 0; i < KITS; i++) {
        static const int64_t sizes[] = {1, 15, 16, 17, 127};
        kit *k = kit_open(c, &kits[i]);
        for (s = 0; s < 5; s++) {
            const int64_t n = sizes[s], cols = kits[i].cols;
            const float *x = moe_input(k, n);
            float *y = hold_output(n * cols), *other = hold_output(n * cols);
            void *saved;
            int64_t t;
            k->m.dispatch = TERN_DISPATCH_DENSE;
            saved = kit_reserve(k, n);
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, NULL));
            k->m.dispatch = TERN_DISPATCH_SPARSE;
            kit_reserve(k, n);
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, other, saved));
            CHECK(memcmp(y, other, (size_t)(n * cols) * 4) == 0, "kit %d, %d tokens: dense and sparse differ", i, (int)n);
            for (t = 0; t < n; t += 13) {
                composed(k, x + t * cols, other);
                CHECK(memcmp(y + t * cols, other, (size_t)cols * 4) == 0, "kit %d, token %d of %d is not the composition: %g, %g", i, (int)t, (int)n, y[t * cols], other[0]);
            }
            record_words(r, y, n * cols);
            release();
        }
        kit_close(k);
    }
}
static void test_moe_forward(void) { same_everywhere(moe_forwards, UINT64_C(0xB1B6BCD0A1FA61E9)); }

/* Numbers of experts and of those chosen. */
static void moe_counts(tern_context *c, record *r)
{
    static const int32_t counts[] = {1, 3, 8, 128}, ks[] = {1, 2, 8, 128};
    int i, j;
    for (i = 0; i < 4; i++)
        for (j = 0; j < 4 && (j == 0 || ks[j] <= counts[i]); j++) {
            kit_options o = kits[0];
            const int64_t n = 19;
            kit *k;
            const float *x;
            float *y = hold_output(n * o.cols), *other = hold_output(n * o.cols);
            o.count = counts[i];
            o.top_k = ks[j];
            k = kit_open(c, &o);
            x = moe_input(k, n);
            k->m.dense_max = n; /* AUTO is dense */
            kit_reserve(k, n);
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, NULL));
            k->m.dense_max = n - 1;
            kit_reserve(k, n);
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, other, NULL));
            CHECK(memcmp(y, other, (size_t)(n * o.cols) * 4) == 0, "%d of %d experts: dense and sparse differ", (int)o.top_k, (int)o.count);
            record_words(r, y, n * o.cols);
            kit_close(k);
            release();
        }
}
static void test_moe_counts(void) { same_everywhere(moe_counts, UINT64_C(0xF027C611B3E1C415)); }

/* What an expert that was not chosen holds does not matter; a token without a choice gets what is always on. */
static void test_moe_leaks(void)
{
    int dispatch, dense;
    for (dispatch = TERN_DISPATCH_DENSE; dispatch <= TERN_DISPATCH_SPARSE; dispatch++)
        for (dense = 0; dense < 2; dense++) {
            test_context t = test_open(TERN_ISA_BEST, 1);
            kit_options o = kits[dense ? 3 : 0];
            const int64_t n = 6, cols = o.cols;
            kit *k = kit_open(t.c, &o);
            float *x = moe_input(k, n), *y = hold_output(n * cols), *other = hold_output(n * cols), *router = (float *)k->router.buffer[TERN_SHADOW].data;
            int64_t i, j;
            int which;
            k->m.dispatch = (tern_dispatch)dispatch;
            k->m.router.norm = TERN_NORM_NONE;
            k->m.router.gain = NULL;
            k->router.rule = TERN_DENSE;
            for (i = 0; i < n * cols; i++) x[i] = fabsf(x[i]) + 0.1f;
            for (i = 0; i < o.count; i++) /* expert 1 never */
                for (j = 0; j < cols; j++) router[i * cols + j] = i == 1 ? -1.0f : 0.01f * (float)((i * 5 + j) % 7);
            kit_reserve(k, n);
            CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, NULL));
            for (which = 0; which < 3; which++) {
                tern_param *p = &k->expert[3 + which];
                float *bad = (float *)p->buffer[dense ? TERN_SHADOW : TERN_SCALES].data;
                for (i = 0; i < (dense ? p->rows * p->cols : p->rows); i++) bad[i] = (float)NAN;
                CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, other, NULL));
                CHECK(memcmp(y, other, (size_t)(n * cols) * 4) == 0, "dispatch %d: NaN leaks from matrix %d", dispatch, which);
                CHECK_OK(t.c, tern_sync(t.c));
            }
            x[2 * cols + 5] = (float)NAN;
            CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, other, NULL));
            CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "row 2");
            for (i = 0; i < n * cols; i++) CHECK(other[i] == (i / cols == 2 ? 0.0f : y[i]), "[%d] is %g", (int)i, other[i]);
            kit_close(k);
            release();
            test_close(&t);
        }
}

/* Every token chooses the same experts, and k of equal logits are the first k. */
static void test_moe_one_for_all(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    kit_options o = kits[0];
    const int64_t n = 130;
    int32_t i;
    kit *k;
    const float *x;
    float *y = hold_output(n * o.cols), *dx = hold_output(n * o.cols);
    void *saved;
    o.count = 64;
    o.top_k = 3;
    k = kit_open(t.c, &o);
    x = moe_input(k, n);
    memset(k->router.buffer[TERN_SHADOW].data, 0, (size_t)(o.count * o.cols) * 4);
    saved = kit_reserve(k, n);
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, dx));
    for (i = 0; i < o.count; i++) {
        const float *g = grad_of(&k->expert[3 * i]);
        int64_t j;
        double sum = 0;
        for (j = 0; j < o.cols * o.width; j++) sum += fabs(g[j]);
        CHECK((sum > 0) == (i < 3), "expert %d has gradients of %g", (int)i, sum);
    }
    kit_close(k);
    release();
    test_close(&t);
}

/* -- gradients -- */

/* The layer in float64 on trit times scale, activations in float; choices as the library made them. */
typedef struct moe_reference {
    const kit *k;
    double *value[5 * KIT_EXPERTS + 6]; /* of k->all */
    const int32_t *ids;
    const float *dy;
    int64_t n;
} moe_reference;

static const double *reference_of(const moe_reference *f, const tern_param *p)
{
    int32_t i = 0;
    while (f->k->all[i] != p) i++;
    return f->value[i];
}

static void reference_norm(const double *x, const double *gain, int64_t n, double *y)
{
    double mean = 0;
    int64_t i;
    for (i = 0; i < n; i++) mean += x[i] * x[i] / (double)n;
    for (i = 0; i < n; i++) y[i] = x[i] * (gain ? gain[i] : 1) / sqrt(mean + 1e-6);
}

static void reference_times(const moe_reference *f, const tern_param *p, const double *x, double *y)
{
    const double *w = reference_of(f, p);
    int64_t i, j;
    for (i = 0; i < p->rows; i++)
        for (y[i] = 0, j = 0; j < p->cols; j++) y[i] += w[i * p->cols + j] * x[j];
}

static double reference_fn(tern_map_fn fn, double x)
{
    if (fn == TERN_MAP_RELU) return x > 0 ? x : 0;
    if (fn == TERN_MAP_RELU2) return x > 0 ? x * x : 0;
    if (fn == TERN_MAP_GELU) return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    return x / (1 + exp(-x));
}

static void reference_hidden(const moe_reference *f, const tern_expert *e, const double *x, double *h)
{
    double u[64];
    int64_t i;
    reference_times(f, e->up, x, u);
    if (!e->gate) for (i = 0; i < e->up->rows; i++) h[i] = reference_fn(f->k->m.fn, u[i]);
    else {
        reference_times(f, e->gate, x, h);
        for (i = 0; i < e->up->rows; i++) h[i] = reference_fn(f->k->m.fn, h[i]) * u[i];
    }
}

static void reference_down(const moe_reference *f, const tern_expert *e, const double *h, double weight, double *y)
{
    double normed[64], out[64];
    int64_t i;
    if (f->k->m.inner == TERN_NORM_RMS) { reference_norm(h, NULL, e->down->cols, normed); h = normed; }
    reference_times(f, e->down, h, out);
    for (i = 0; i < e->down->rows; i++) y[i] += weight * out[i];
}

/* The sum of dy * y, and of the balance loss. loads: as they were chosen. */
static double reference_loss(const moe_reference *f, const double *x)
{
    const tern_moe *m = &f->k->m;
    const int64_t cols = m->router.w->cols;
    int32_t loads[KIT_EXPERTS] = {0}, s;
    double loss = 0;
    int64_t t, i;
    for (i = 0; i < f->n * m->top_k; i++) loads[f->ids[i]]++;
    for (t = 0; t < f->n; t++) {
        double routed[64], read[64], logits[KIT_EXPERTS], weights[KIT_EXPERTS], p[KIT_EXPERTS], y[64] = {0}, h[64], sum[64] = {0}, low[64], z[64];
        const double *xt = x + t * cols, *in = xt;
        const int32_t *ids = f->ids + t * m->top_k;
        if (m->norm == TERN_NORM_RMS) {
            reference_norm(xt, reference_of(f, m->router.gain), cols, routed);
            reference_norm(xt, reference_of(f, m->gain), cols, read);
            in = read;
        }
        reference_times(f, m->router.w, m->norm == TERN_NORM_RMS ? routed : xt, logits);
        literal_weights(logits, m->count, m->top_k, m->weights, ids, weights);
        if (m->low_a) reference_hidden(f, m->experts, in, h);
        for (s = 0; s < m->top_k; s++) {
            if (m->low_a) {
                reference_times(f, m->low_a[ids[s]], in, low);
                reference_times(f, m->low_b[ids[s]], low, z);
                for (i = 0; i < m->experts->up->rows; i++) sum[i] += weights[s] * h[i] * z[i];
            } else {
                reference_hidden(f, &m->experts[ids[s]], in, h);
                reference_down(f, &m->experts[ids[s]], h, weights[s], y);
            }
        }
        if (m->low_a) reference_down(f, m->experts, sum, 1, y);
        if (m->always) {
            reference_hidden(f, m->always, in, h);
            reference_down(f, m->always, h, 1, y);
        }
        for (i = 0; i < cols; i++) loss += y[i] * f->dy[t * cols + i];
        literal_softmax(logits, m->count, p);
        for (s = 0; s < m->count; s++) loss += (double)m->balance * m->count * loads[s] / ((double)f->n * m->top_k) * p[s] / (double)f->n;
    }
    return loss;
}

static double *hold_values(tern_context *c, const tern_param *p)
{
    float *values = (float *)malloc((size_t)(p->rows * p->cols) * 4);
    double *wide;
    int64_t i;
    for (i = 0; i < p->rows; i++) CHECK_OK(c, tern_param_get(c, p, i, NULL, NULL, values + i * p->cols));
    wide = hold_doubles(values, p->rows * p->cols);
    free(values);
    return wide;
}

static void compare_slopes(const moe_reference *f, const double *x, double *value, int64_t count, const float *got, int kit_index, const char *name)
{
    int64_t i;
    for (i = 0; i < count; i++) {
        const double at = value[i];
        double slope;
        value[i] = at + 1e-5;
        slope = reference_loss(f, x);
        value[i] = at - 1e-5;
        slope = (slope - reference_loss(f, x)) / 2e-5;
        value[i] = at;
        CHECK(fabs(slope - got[i]) < 2e-4 * (1 + fabs(slope)), "kit %d, %s[%d]: %g, not %g", kit_index, name, (int)i, got[i], slope);
    }
}

/* What the library chose, from its own ops. */
static int32_t *hold_choice(kit *k, int64_t n, const float *x)
{
    tern_route_args a = TERN_ZERO;
    a.n = n;
    a.count = k->m.count;
    a.k = k->m.top_k;
    a.kind = k->m.weights;
    a.logits = hold_output(n * a.count);
    a.ids = (int32_t *)hold((size_t)(n * a.k) * 4);
    a.weights = hold_output(n * a.k);
    CHECK_OK(k->c, tern_linear_forward(k->c, &k->m.router, n, x, (float *)(uintptr_t)a.logits, NULL));
    CHECK_OK(k->c, tern_route(k->c, &a));
    return a.ids;
}

/* Activations in float, so that the layer is the function whose slopes are its gradients. */
static void moe_gradients(tern_context *c, record *unused)
{
    int i;
    (void)unused;
    for (i = 0; i < KITS; i++) {
        const int64_t n = 7;
        kit_options o = kits[i];
        moe_reference f;
        kit *k;
        float *x, *y, *dx;
        double *wide;
        void *saved;
        int32_t p;
        o.act = TERN_ACT_FLOAT;
        k = kit_open(c, &o);
        k->m.balance = i & 1 ? 0.0f : 2.0f;
        x = hold_floats(n * o.cols);
        y = hold_output(n * o.cols);
        dx = hold_output(n * o.cols);
        saved = kit_reserve(k, n);
        f.k = k;
        f.n = n;
        f.dy = hold_floats(n * o.cols);
        f.ids = hold_choice(k, n, x);
        for (p = 0; p < k->count; p++) f.value[p] = hold_values(c, k->all[p]);
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, saved));
        CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, f.dy, dx));
        wide = hold_doubles(x, n * o.cols);
        compare_slopes(&f, wide, wide, n * o.cols, dx, i, "x");
        for (p = 0; p < k->count; p++) compare_slopes(&f, wide, f.value[p], k->all[p]->rows * k->all[p]->cols, grad_of(k->all[p]), i, k->all[p]->name);
        kit_close(k);
        release();
    }
}
static void test_moe_gradients(void) { free(record_of(moe_gradients, TERN_ISA_SCALAR, 1).data); free(record_of(moe_gradients, TERN_ISA_BEST, 2).data); }

/* All kinds of activations: near the gradients of floats, added to what is there, the same for any number of threads and
   either dispatch of the forward. */
static void moe_backwards(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < KITS; i++) {
        const int64_t n = 37, cols = kits[i].cols;
        kit *k = kit_open(c, &kits[i]);
        const float *x = moe_input(k, n), *dy = hold_floats(n * cols);
        float *y = hold_output(n * cols), *dx = hold_output(n * cols), *again = hold_output(n * cols);
        void *saved;
        int32_t p;
        int64_t j;
        k->m.balance = 0.5f;
        k->m.dispatch = TERN_DISPATCH_DENSE;
        saved = kit_reserve(k, n);
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, saved));
        CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, dy, dx));
        for (p = 0; p < k->count; p++) record_words(r, grad_of(k->all[p]), k->all[p]->rows * k->all[p]->cols);
        k->m.dispatch = TERN_DISPATCH_SPARSE;
        saved = kit_reserve(k, n);
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, saved));
        CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, dy, again));
        CHECK(memcmp(dx, again, (size_t)(n * cols) * 4) == 0, "kit %d: dx depends on the dispatch", i);
        record_words(r, dx, n * cols);
        for (j = 0; j < n * cols; j++) CHECK(isfinite(dx[j]), "kit %d: dx[%d] is %g", i, (int)j, dx[j]);
        CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, dy, NULL));
        kit_close(k);
        release();
    }
}
static void test_moe_backward(void) { same_for_threads(moe_backwards); }

static void suite_moe(void)
{
    RUN(test_moe_route);
    RUN(test_moe_route_backward);
    RUN(test_moe_route_faults);
    RUN(test_moe_group);
    RUN(test_moe_weighted_rows);
    RUN(test_moe_forward);
    RUN(test_moe_counts);
    RUN(test_moe_leaks);
    RUN(test_moe_one_for_all);
    RUN(test_moe_gradients);
    RUN(test_moe_backward);
}
