/* Room 17, mixture of experts, and its operations of room 14. Forward: bit for bit what the public layers give token by token
   and expert by expert, for dense and sparse dispatch, every tier, thread count and option. Gradients: central differences of
   a float64 reference. Mutations that the tests were seen to see: the last of equal logits, no renormalization, route's backward
   without its sum, without those that were not chosen (ALL), the balance loss without count or mean, ids kept in a fault,
   gather and scatter without weight, dots in order, results multiplied by zero and not picked (also before low_b), scales or sums
   not gathered, fn of up (forward, backward), no inner norm, another default fn, always left out (forward, backward), the
   norm's dx or gain left out, dweights left out, gradients without weight, h of the low-rank form without gradient or not
   computed again, scratch not given back, shapes unchecked; a set's scale without sqrt(2/pi), of its last member, of narrow types
   read as floats, not stored, not taken in a step or from floats, a member with a scale of its own; per-layer embeddings without
   their residual (forward, backward); loads not added to, entropy not a mean, balance without its factor; in
   groups no dead zone, the second matrix for the first, a group that begins in an earlier part; of a mixture that is set from
   floats no look before, none at learned scales (in the sum, or one by one) or at what is rotated, not as it is rounded, a sum
   that proves too much, buffers that are too small found late; experts without the permission for factors of bf16; in the backward
   by groups the second set's dy, dx or outputs of the first, no dead zone, scales of other rows, no zeros behind the last group, no
   inner norm, one of two dx added, no weights' gradients or those of other places, h of the low-rank form without gradient, no room
   for the second dx, accumulators ignored, factors of bf16 not permitted, and elsewhere no pieces that end with a part. */

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

static tern_param *kit_param(kit *k, tern_param *p, const char *name, int32_t index, int64_t rows, int64_t cols, tern_rule rule,
                             const kit_options *o)
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
    {4, 2, 21, 13, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_ADD, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE},
    {3, 1, 17, 30, 0, 9, 0, TERN_ABSMEAN, 8, TERN_BASE3, TERN_ACT_INT8,
     TERN_MAP_RELU2, TERN_ROUTE_ALL, TERN_NORM_NONE, TERN_NORM_RMS, TERN_ABSMEAN},
    {8, 8, 33, 16, 1, 40, 0, TERN_ABSMEAN, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_FLOAT,
     TERN_MAP_GELU, TERN_ROUTE_RENORMALIZED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {5, 3, 20, 15, 1, 0, 0, TERN_DENSE, 0, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_NONE, TERN_ABSMEAN},
    {4, 2, 50, 20, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT4,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_ABSMEAN},
    {1, 1, 16, 12, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_RELU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {4, 2, 21, 18, 1, 0, 5, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_RMS, TERN_NORM_RMS, TERN_DENSE},
    {6, 3, 19, 14, 0, 10, -4, TERN_ABSMEAN, TERN_PER_ROW, TERN_BASE3, TERN_ACT_INT8,
     TERN_MAP_GELU, TERN_ROUTE_ALL, TERN_NORM_RMS, TERN_NORM_NONE, TERN_DENSE},
    {3, 2, 12, 9, 1, 0, 3, TERN_DENSE, 0, TERN_2BIT, TERN_ACT_FLOAT,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE},
    {4, 3, 14, 11, 0, 0, -3, TERN_ABSMEAN, 8, TERN_2BIT, TERN_ACT_FLOAT,
     TERN_MAP_RELU2, TERN_ROUTE_RENORMALIZED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_ABSMEAN},
    {4, 2, 40, 10, 1, 0, 0, TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_ACT_BIT,
     TERN_MAP_SILU, TERN_ROUTE_SELECTED, TERN_NORM_NONE, TERN_NORM_NONE, TERN_DENSE},
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
        if (best >= 0) taken[best] = 1; /* k <= count: there is one */
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
                        for (e = 0; e < k; e++)
                            CHECK(fabs(weights[e] - a.weights[t * k + e]) < 1e-6,
                                  "kind %d: %g is not %g", kind, a.weights[t * k + e], weights[e]);
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
    CHECK_FAILS(t.c, tern_route(t.c, &a), TERN_E_OVERFLOW, "route: n = 1073741824 x 4");
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

/* What a caller got wrong is left out: an id that was not chosen, a place that is not there. */
static void test_moe_out_of_range(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_route_args a = TERN_ZERO;
    tern_row_dot_args d = TERN_ZERO;
    float logits[6] = {1, 2, 3, 3, 2, 1}, weights[4] = {0.5f, 0.5f, 0.5f, 0.5f}, dweights[4] = {1, 2, 3, 4}, dlogits[8],
          x[4] = {1, 2, 3, 4}, y[4];
    int32_t ids[4] = {0, 3, 0, 1}, to[3] = {1, 2, -1}, rows[3] = {0, 1, 0}, i;
    for (i = 0; i < 8; i++) dlogits[i] = -7;
    for (i = 0; i < 4; i++) y[i] = -7;
    a.n = 2;
    a.count = 3;
    a.k = 2;
    a.logits = logits;
    a.ids = ids;
    a.weights = weights;
    a.dweights = dweights;
    a.dlogits = dlogits;
    CHECK_OK(t.c, tern_route(t.c, &a));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "row 0");
    for (i = 0; i < 3; i++) CHECK(dlogits[i] == 0.0f, "dlogits[%d] is %g", (int)i, dlogits[i]);
    CHECK(dlogits[3] != 0.0f && dlogits[6] == -7 && dlogits[7] == -7, "the row after it: %g, behind: %g", dlogits[3], dlogits[6]);
    d.rows = d.cols = d.count = 2;
    d.n = 3;
    d.a = x;
    d.b = logits;
    d.ids = rows;
    d.to = to;
    d.y = y + 1;
    CHECK_OK(t.c, tern_row_dot(t.c, &d));
    CHECK(y[0] == -7 && y[1] == -7 && y[2] == 5 && y[3] == -7, "%g %g %g %g", y[0], y[1], y[2], y[3]);
    d.count = 0;
    CHECK_FAILS(t.c, tern_row_dot(t.c, &d), TERN_E_SHAPE, "count = 0");
    test_close(&t);
}

/* Maps where vectors end and where the exponential does: the same bits from every tier. */
static void map_edges(tern_context *c, record *r)
{
    static const int64_t sizes[] = {1, 15, 16, 17, 127, 4097};
    static const float edges[] = {0.0f, -0.0f, 87.0f, -87.0f, -87.00001f, 87.00001f, 88.37f, -88.37f, 88.38f, -88.38f,
                                  88.69999f, -88.69999f, 88.7f, -88.7f, 44.0f, -44.0f, 44.35f,
                                  43.5f, -43.5f, 1e-40f, -1e-40f, 1e4f, -1e4f, 1e9f, -1e9f};
    enum { EDGES = sizeof edges / sizeof *edges };
    int fn, s;
    for (fn = TERN_MAP_ADD; fn <= TERN_MAP_GELU; fn++)
        for (s = 0; s < 6; s++) {
            const int64_t n = sizes[s];
            tern_map_args a = map_of((tern_map_fn)fn, n);
            float *x = (float *)(uintptr_t)a.a;
            int64_t i;
            for (i = 0; i < n; i++) if (i % 3 == s % 3) x[i] = edges[(i + 5 * s) % EDGES];
            CHECK_OK(c, tern_map(c, &a));
            record_words(r, a.y, n);
            a.dy = hold_floats(n);
            a.da = hold_output(n);
            if (fn == TERN_MAP_ADD || fn == TERN_MAP_MUL) a.db = hold_output(n);
            CHECK_OK(c, tern_map(c, &a));
            record_words(r, a.da, n);
            if (a.db) record_words(r, a.db, n);
            release();
        }
}
static void test_moe_maps(void) { same_everywhere(map_edges, UINT64_C(0x770D56A45CBA61F4)); }

static void test_moe_group(void)
{
    static const int32_t ids[10] = {1, 3, 0, 3, -1, 9, 3, 0, 1, 3};
    static const int32_t loads[5] = {2, 2, 0, 4, 0}, tokens[10] = {1, 3, 0, 4, 0, 1, 3, 4, -1, -1},
                         slots[10] = {2, 7, 0, 8, 1, 3, 6, 9, -1, -1};
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
            CHECK(got_slots[5 * e + i] == slot && got_tokens[5 * e + i] == (slot < 0 ? -1 : i)
                  && sorted[5 * e + i] == (slot < 0 ? 0.0f : weights[slot]), "expert %d, token %d", (int)e, (int)i);
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
        d.count = n;
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
    float *logits = hold_output(m->count), *weights = hold_output(m->top_k), *g = hold_output(200), *u = hold_output(200),
          *out = hold_output(cols), *sum = hold_zeros(width);
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

static float *moe_input(const kit *k, int64_t n)
{
    return k->m.act == TERN_ACT_BIT ? hold_sparse(n * k->m.router.w->cols, 3) : hold_floats(n * k->m.router.w->cols);
}

/* Both dispatches, with and without `saved`, beside the composition. */
static void moe_forwards(tern_context *c, record *r)
{
    int i, s;
    for (i = 0; i < KITS; i++) {
        static const int64_t sizes[] = {1, 15, 16, 17, 127};
        kit *k = kit_open(c, &kits[i]);
        for (s = i % 5; s < 5; s += 2) {
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
                CHECK(memcmp(y + t * cols, other, (size_t)cols * 4) == 0,
                      "kit %d, token %d of %d is not the composition: %g, %g", i, (int)t, (int)n, y[t * cols], other[0]);
            }
            record_words(r, y, n * cols);
            release();
        }
        kit_close(k);
    }
}
static void test_moe_forward(void) { same_everywhere(moe_forwards, UINT64_C(0xD1CBD25088A3893F)); }

/* Products in groups, and a backend without them; one token in the middle is NaN. i >= KITS: all tokens to the same experts. */
static void moe_fusions(tern_context *c, record *r)
{
    const tern_backend *whole = c->run.backend;
    tern_backend lacking = *whole;
    int i;
    lacking.grouped = NULL;
    for (i = 0; i < 2 * KITS; i++) {
        const kit_options *o = &kits[i % KITS];
        const int64_t n = i % 2 ? 67 : 3;
        const size_t bytes = (size_t)(n * o->cols) * 4;
        kit *k = kit_open(c, o);
        float *x = moe_input(k, n), *y = hold_output(n * o->cols), *other = hold_output(n * o->cols), *dead = hold_floats(o->width);
        tern_param zone = param_of("zone", 1, o->width, TERN_DENSE, 0);
        char text[sizeof c->run.fault.text];
        int64_t j;
        if (i % KITS == 0) { /* a bias of their own */
            CHECK_OK(c, tern_param_alloc(c, &zone, TERN_FOR_INFERENCE));
            memcpy(zone.buffer[TERN_SHADOW].data, dead, (size_t)o->width * 4);
            for (j = 0; j < o->count; j++) {
                k->expert[3 * j + 1].dead = k->expert[3 * j].dead = &zone;
                k->expert[3 * j + 1].lambda = k->expert[3 * j].lambda = 0.01f;
            }
        }
        for (j = 0; i >= KITS && j < n * o->cols; j++) x[j] = x[j % o->cols];
        x[n / 2 * o->cols + 3] = (float)NAN;
        k->m.dispatch = TERN_DISPATCH_SPARSE;
        kit_reserve(k, n);
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, NULL));
        CHECK(tern_sync(c) == TERN_E_DATA, "kit %d: a NaN is not told", i);
        memcpy(text, tern_last_error(c)->text, sizeof text);
        c->run.backend = &lacking;
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, other, NULL));
        CHECK(tern_sync(c) == TERN_E_DATA && strcmp(text, tern_last_error(c)->text) == 0,
              "kit %d: %s, in groups %s", i, tern_last_error(c)->text, text);
        c->run.backend = whole;
        CHECK(memcmp(y, other, bytes) == 0, "kit %d: in groups %g, one by one %g", i, y[0], other[0]);
        record_words(r, y, n * o->cols);
        tern_param_free(c, &zone, -1);
        kit_close(k);
        release();
    }
}
static void test_moe_fusion(void) { same_for_threads(moe_fusions); }

/* Numbers of experts and of those chosen. */
static void moe_counts(tern_context *c, record *r)
{
    static const int32_t counts[] = {1, 3, 8, 8, 128, 128}, ks[] = {1, 2, 1, 8, 8, 128};
    int i;
    for (i = 0; i < 6; i++) {
        kit_options o = kits[0];
        const int64_t n = 5;
        kit *k;
        const float *x;
        float *y = hold_output(n * o.cols), *other = hold_output(n * o.cols);
        o.count = counts[i];
        o.top_k = ks[i];
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
static void test_moe_counts(void) { same_everywhere(moe_counts, UINT64_C(0x6B9EC3463F2A2277)); }

/* What an expert that was not chosen holds does not matter; a token without a choice gets what is always on. */
static void test_moe_leaks(void)
{
    int dispatch, dense;
    for (dispatch = TERN_DISPATCH_DENSE; dispatch <= TERN_DISPATCH_SPARSE; dispatch++)
        for (dense = 0; dense < 3; dense++) { /* 2: the low-rank form */
            test_context t = test_open(TERN_ISA_BEST, 1);
            kit_options o = kits[dense == 2 ? 7 : dense ? 3 : 0];
            const int64_t n = 6, cols = o.cols;
            kit *k = kit_open(t.c, &o);
            float *x = moe_input(k, n), *y = hold_output(n * cols), *other = hold_output(n * cols),
                  *router = (float *)k->router.buffer[TERN_SHADOW].data;
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
            for (which = 0; which < (dense == 2 ? 2 : 3); which++) {
                tern_param *p = dense < 2 ? &k->expert[3 + which] : which ? &k->low_b[1] : &k->low_a[1];
                float *bad = (float *)p->buffer[dense == 1 ? TERN_SHADOW : TERN_SCALES].data;
                for (i = 0; i < (dense == 1 ? p->rows * p->cols : p->rows); i++) bad[i] = (float)NAN;
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
        double routed[64], read[64], logits[KIT_EXPERTS], weights[KIT_EXPERTS], p[KIT_EXPERTS], y[64] = {0}, h[64], sum[64] = {0},
               low[64], z[64];
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

/* Some 30 elements of each array, at odd steps. */
static void compare_slopes(const moe_reference *f, const double *x, double *value, int64_t count, const float *got, double bound,
                           int kit_index, const char *name)
{
    int64_t i;
    for (i = 0; i < count; i += count / 60 * 2 + 1) {
        const double at = value[i];
        double slope;
        value[i] = at + 1e-5;
        slope = reference_loss(f, x);
        value[i] = at - 1e-5;
        slope = (slope - reference_loss(f, x)) / 2e-5;
        value[i] = at;
        CHECK(fabs(slope - got[i]) < bound * (1 + fabs(slope)), "kit %d, %s[%d]: %g, not %g", kit_index, name, (int)i, got[i], slope);
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

/* Activations in float, so that the layer is the function whose slopes are its gradients. Factors of float, then of bf16. */
static void moe_gradients(tern_context *c, record *unused)
{
    int i;
    (void)unused;
    for (i = 0; i < 2 * KITS; i++) {
        const int64_t n = 5;
        const double bound = i >= KITS && has_pairs(c) ? 0.05 : 2e-4;
        kit_options o = kits[i % KITS];
        moe_reference f;
        kit *k;
        float *x, *y, *dx;
        double *wide;
        void *saved;
        int32_t p;
        o.act = TERN_ACT_FLOAT;
        k = kit_open(c, &o);
        k->m.balance = i & 1 ? 0.0f : 2.0f;
        if (i >= KITS) k->m.gradients = k->m.router.gradients = TERN_BF16;
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
        compare_slopes(&f, wide, wide, n * o.cols, dx, bound, i, "x");
        for (p = 0; p < k->count; p++)
            compare_slopes(&f, wide, f.value[p], k->all[p]->rows * k->all[p]->cols, grad_of(k->all[p]), bound, i, k->all[p]->name);
        kit_close(k);
        release();
    }
}
static void test_moe_gradients(void)
{
    free(record_of(moe_gradients, TERN_ISA_SCALAR, 1).data);
    free(record_of(moe_gradients, TERN_ISA_BEST, 2).data);
}

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

/* The backward in groups, and by a backend without them, a matrix after the other: gradients that are added to what is there, some
   absent, of a matrix that two experts share too, and of a dead zone that more do; the same faults. One token in the middle is
   NaN, in float and so without an expert where the router reads it as it is. i >= KITS: all tokens to the same experts, factors of
   bf16. */
static void moe_backward_fusions(tern_context *c, record *r)
{
    const tern_backend *whole = c->run.backend;
    tern_backend lacking = *whole;
    int i;
    lacking.grouped = NULL;
    for (i = 0; i < 2 * KITS; i++) {
        const kit_options *o = &kits[i % KITS];
        const int64_t n = i % 2 ? 67 : 3;
        kit *k = kit_open(c, o);
        float *x = moe_input(k, n), *dy = hold_floats(n * o->cols), *y = hold_output(n * o->cols), *dx[2],
              **first = (float **)hold((size_t)(k->count + 1) * sizeof *first);
        tern_param zone = param_of("zone", 1, o->width, TERN_DENSE, 0);
        int64_t j;
        int32_t p, alone;
        char text[2][sizeof c->run.error.text];
        tern_result told[2];
        void *saved;
        if (i % KITS == 0) {
            CHECK_OK(c, tern_param_alloc(c, &zone, TERN_FOR_GRADIENT));
            for (j = 0; j < o->count; j++) {
                k->expert[3 * j + 1].dead = k->expert[3 * j].dead = &zone;
                k->expert[3 * j + 1].lambda = k->expert[3 * j].lambda = 0.01f;
            }
        }
        if (!o->low && o->count > 2) {
            k->experts[1].up = k->experts[0].up;
            tern_param_free(c, k->experts[2].down, 1 << TERN_GRAD);
            tern_param_free(c, k->experts[2].up, 1 << TERN_GRAD);
        }
        for (j = 0; i >= KITS && j < n * o->cols; j++) x[j] = x[j % o->cols];
        x[n / 2 * o->cols + 3] = (float)NAN;
        k->m.gradients = i < KITS ? TERN_F32 : TERN_BF16;
        saved = kit_reserve(k, n);
        CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, saved));
        CHECK(tern_sync(c) == TERN_E_DATA, "kit %d: a NaN is not told", i);
        for (alone = 0; alone < 2; alone++) {
            dx[alone] = hold_output(n * o->cols);
            c->run.backend = alone ? &lacking : whole;
            for (p = 0; p <= k->count; p++) {
                tern_param *q = p < k->count ? k->all[p] : &zone;
                const int64_t count = q->rows * q->cols;
                if (!grad_of(q)) continue;
                if (alone) first[p] = hold_copy(grad_of(q), count);
                for (j = 0; j < count; j++) grad_of(q)[j] = 0.01f * (float)(j % 7);
            }
            CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, dy, dx[alone]));
            told[alone] = tern_sync(c);
            memcpy(text[alone], tern_last_error(c)->text, sizeof text[alone]);
        }
        c->run.backend = whole;
        CHECK(told[0] == told[1] && (told[0] == TERN_OK || strcmp(text[0], text[1]) == 0), "kit %d: %s, in groups %s", i, text[1], text[0]);
        CHECK(memcmp(dx[0], dx[1], (size_t)(n * o->cols) * 4) == 0, "kit %d: dx in groups %g, one by one %g", i, dx[0][0], dx[1][0]);
        record_words(r, dx[0], n * o->cols);
        for (p = 0; p <= k->count; p++) {
            tern_param *q = p < k->count ? k->all[p] : &zone;
            if (!grad_of(q)) continue;
            CHECK(memcmp(first[p], grad_of(q), (size_t)(q->rows * q->cols) * 4) == 0,
                  "kit %d: %s in groups %g, one by one %g", i, q->name, first[p][0], grad_of(q)[0]);
            record_words(r, first[p], q->rows * q->cols);
        }
        tern_param_free(c, &zone, -1);
        kit_close(k);
        release();
    }
}
static void test_moe_backward_fusion(void) { same_for_threads(moe_backward_fusions); }

/* Of rows [2, 12) of groups of 5, 0, 4 and 1: dx of two sets, row by row, with zeros behind; gradients are those of the rows here. */
static void test_moe_grouped_backward(void)
{
    enum { GROUPS = 4, N = 10, ROWS = 13, COLS = 21 };
    static const int32_t loads[GROUPS] = {5, 0, 4, 1}, begin[GROUPS] = {0, 3, 3, 7}, end[GROUPS] = {3, 3, 7, 8};
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p[2 * GROUPS], *w[2 * GROUPS];
    const float *x = hold_floats(N * COLS), *dy = hold_floats(2 * N * ROWS);
    float *dx = hold_output(2 * N * COLS), *want = hold_output(COLS), *dw = hold_output(ROWS * COLS);
    int64_t stride = 0, groups = 0, r;
    tern_grouped_args a;
    tern_quantize_args q;
    int32_t i, set;
    memset(&a, 0, sizeof a);
    memset(&q, 0, sizeof q);
    for (i = 0; i < 2 * GROUPS; i++) {
        w[i] = &p[i];
        p[i] = param_of("w", ROWS, COLS, TERN_ABSMEAN, TERN_PER_ROW);
        CHECK_OK(t.c, tern_param_alloc(t.c, &p[i], TERN_FOR_GRADIENT));
        set_random(t.c, &p[i]);
    }
    q.m = a.m = tern_param_matrix(w[0]);
    CHECK_OK(t.c, tern_activation_shape(t.c, &a.m, &stride, &groups));
    q.n = N;
    q.x = x;
    a.q = q.q = (int8_t *)hold((size_t)(N * stride));
    a.scale = q.scale = hold_output(N);
    q.sum = (int32_t *)hold(N * 4);
    CHECK_OK(t.c, tern_quantize(t.c, &q));
    a.count = GROUPS;
    a.sets = a.step = 2;
    a.w = w;
    a.loads = loads;
    a.rows = 12;
    a.at = 2;
    a.n = N;
    a.dy = dy;
    a.dx = dx;
    for (r = 0; r < 2 * N * COLS; r++) dx[r] = 7.0f;
    CHECK_OK(t.c, tern__run_grouped(t.c, &a));
    for (i = 0; i < 2 * GROUPS; i++) {
        const int32_t g = i / 2;
        tern_matmul_dw_args d;
        set = i % 2;
        memset(&d, 0, sizeof d);
        memset(dw, 0, ROWS * COLS * 4);
        d.m = a.m;
        d.n = end[g] - begin[g];
        d.dy = dy + (set * N + begin[g]) * ROWS;
        d.q = a.q + begin[g] * stride;
        d.scale = a.scale + begin[g];
        d.dw = dw;
        if (d.n > 0) CHECK_OK(t.c, tern_matmul_dw(t.c, &d));
        CHECK(memcmp(dw, grad_of(w[i]), ROWS * COLS * 4) == 0,
              "group %d, set %d: %g, not %g", (int)g, (int)set, (double)grad_of(w[i])[0], (double)dw[0]);
        for (r = begin[g]; r < end[g]; r++) {
            tern_matmul_dx_args m;
            m.m = tern_param_matrix(w[i]);
            m.n = 1;
            m.dy = dy + (set * N + r) * ROWS;
            m.dx = want;
            m.factors = TERN_F32;
            CHECK_OK(t.c, tern_matmul_dx(t.c, &m));
            CHECK(memcmp(want, dx + (set * N + r) * COLS, COLS * 4) == 0, "row %d of set %d", (int)r, (int)set);
        }
    }
    for (set = 0; set < 2; set++)
        for (r = (set * N + 8) * COLS; r < (set + 1) * N * COLS; r++) CHECK(dx[r] == 0.0f, "[%d] is %g", (int)r, (double)dx[r]);
    for (i = 0; i < 2 * GROUPS; i++) tern_param_free(t.c, &p[i], -1);
    release();
    test_close(&t);
}

/* What factors of bf16 change is small beside the largest of an array. */
static void moe_near(const float *got, const float *want, int64_t count, int kit_index, const char *name)
{
    float most = 0.0f;
    int64_t j;
    for (j = 0; j < count; j++) most = fmaxf(most, fabsf(want[j]));
    for (j = 0; j < count; j++)
        CHECK(fabsf(got[j] - want[j]) <= 0.05f * most,
              "kit %d: %s[%d] %g, not %g, of at most %g", kit_index, name, (int)j, (double)got[j], (double)want[j], (double)most);
}

/* The permission reaches every matrix of an expert, the router's its own alone, and changes no forward. Of what it reaches,
   each gradient has other bits where the tier has pairs, and the same elsewhere. */
static void moe_bf16_gradients(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 3 * KITS; i++) {
        const int64_t n = 37, cols = kits[i % KITS].cols;
        const int experts = i / KITS != 1, router = i / KITS != 0;
        kit *k = kit_open(c, &kits[i % KITS]);
        const float *x = moe_input(k, n), *dy = hold_floats(n * cols);
        float *y[2], *dx[2], **first = (float **)hold((size_t)k->count * sizeof *first);
        void *saved;
        int32_t p, type;
        for (type = 0; type < 2; type++) {
            y[type] = hold_output(n * cols);
            dx[type] = hold_output(n * cols);
            k->m.gradients = type && experts ? TERN_BF16 : TERN_F32;
            k->m.router.gradients = type && router ? TERN_BF16 : TERN_F32;
            saved = kit_reserve(k, n);
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y[type], saved));
            for (p = 0; p < k->count; p++) {
                const int64_t count = k->all[p]->rows * k->all[p]->cols;
                if (type) first[p] = hold_copy(grad_of(k->all[p]), count);
                memset(grad_of(k->all[p]), 0, (size_t)count * 4);
            }
            CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, dy, dx[type]));
        }
        CHECK(memcmp(y[0], y[1], (size_t)(n * cols) * 4) == 0, "kit %d: another forward", i);
        CHECK((memcmp(dx[0], dx[1], (size_t)(n * cols) * 4) != 0) == (has_pairs(c) && (experts || k->m.count > 1)), "kit %d: dx", i);
        moe_near(dx[1], dx[0], n * cols, i, "dx");
        record_words(r, dx[1], n * cols);
        for (p = 0; p < k->count; p++) {
            const tern_param *q = k->all[p];
            const int of_router = q == k->m.router.w || q == k->m.router.gain;
            /* the weights that the router's gradient comes from are of the forward, but in the low-rank form of dx of down */
            const int reached = of_router ? k->m.count > 1 && (router || k->m.low_a) : experts;
            CHECK((memcmp(first[p], grad_of(k->all[p]), (size_t)(q->rows * q->cols) * 4) != 0) == (has_pairs(c) && reached),
                  "kit %d: %s", i, q->name);
            moe_near(grad_of(k->all[p]), first[p], q->rows * q->cols, i, q->name);
            record_words(r, grad_of(k->all[p]), q->rows * q->cols);
        }
        kit_close(k);
        release();
    }
}
static void test_moe_bf16_gradients(void) { same_for_threads(moe_bf16_gradients); }

/* -- reports, refusals, files -- */

static void test_moe_stats(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    kit_options o = kits[0];
    const int64_t n = 9;
    kit *k = kit_open(t.c, &o);
    float *x = moe_input(k, n), *y = hold_output(n * o.cols), *logits = hold_output(n * o.count);
    int64_t loads[4] = {100, 0, 0, 0}, i;
    double entropy = 0, balance = 0, mean[4] = {0};
    void *saved = kit_reserve(k, n);
    tern_moe_report report;
    int32_t *ids = hold_choice(k, n, x), expected[4] = {100, 0, 0, 0}, e;
    CHECK_OK(t.c, tern_linear_forward(t.c, &k->m.router, n, x, logits, NULL));
    for (i = 0; i < n; i++) {
        double p[4];
        literal_softmax(hold_doubles(logits + i * 4, 4), 4, p);
        for (e = 0; e < 4; e++) { entropy -= p[e] * log(p[e]) / (double)n; mean[e] += p[e] / (double)n; }
    }
    for (i = 0; i < n * o.top_k; i++) expected[ids[i]]++;
    for (e = 0; e < 4; e++) balance += 0.5 * 4 * (expected[e] - (e ? 0 : 100)) / (double)(n * o.top_k) * mean[e];
    k->m.balance = 0.5f;
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    CHECK_OK(t.c, tern_moe_stats(t.c, &k->m, n, saved, loads, &report));
    for (e = 0; e < 4; e++) CHECK(loads[e] == expected[e], "expert %d: %d, not %d", (int)e, (int)loads[e], (int)expected[e]);
    CHECK(fabs(report.entropy - entropy) < 1e-5 && fabs(report.balance - balance) < 1e-5,
          "%g, %g; not %g, %g", report.entropy, report.balance, entropy, balance);
    CHECK_OK(t.c, tern_moe_stats(t.c, &k->m, n, saved, NULL, NULL));
    CHECK_FAILS(t.c, tern_moe_stats(t.c, &k->m, n, NULL, loads, &report), TERN_E_ARGUMENT, "saved is NULL");
    test_fail_at = test_allocations;
    CHECK_FAILS(t.c, tern_moe_stats(t.c, &k->m, n, saved, loads, &report), TERN_E_MEMORY, "9 tokens");
    kit_close(k);
    release();
    test_close(&t);
}

static void test_moe_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    kit *k = kit_open(t.c, &kits[0]);
    tern_moe m = k->m;
    tern_need need, one;
    tern_param other = param_of("other", 14, 21, TERN_ABSMEAN, TERN_PER_ROW);
    float *x = hold_floats(500 * 21), *y = hold_floats(500 * 21), before = y[0];
    tern_expert spare[4];
    void *saved = kit_reserve(k, 4);
    int32_t i;
#define REFUSED(code, part)                                                          \
    do {                                                                             \
        CHECK_FAILS(t.c, tern_moe_need(t.c, &m, 4, &need), code, part);              \
        CHECK_FAILS(t.c, tern_moe_forward(t.c, &m, 4, x, y, saved), code, part);     \
        CHECK_FAILS(t.c, tern_moe_backward(t.c, &m, 4, x, saved, x, y), code, part); \
        CHECK(y[0] == before, "something was written");                              \
        m = k->m;                                                                    \
    } while (0)
    CHECK_OK(t.c, tern_param_alloc(t.c, &other, TERN_FOR_GRADIENT));
    memcpy(spare, k->experts, sizeof spare);
    m.top_k = 0; REFUSED(TERN_E_SHAPE, "moe: k = 0 of 4 experts");
    m.top_k = 5; REFUSED(TERN_E_SHAPE, "moe: k = 5 of 4 experts");
    m.count = 0; REFUSED(TERN_E_SHAPE, "moe: 0 experts; 1 to 1024");
    m.count = 3; REFUSED(TERN_E_SHAPE, "router.0 is 4 x 21 for 3 experts of 21 inputs");
    m.experts = NULL; REFUSED(TERN_E_ARGUMENT, "experts");
    m.fn = TERN_MAP_MUL; REFUSED(TERN_E_ARGUMENT, "fn 1");
    m.weights = (tern_route_kind)3; REFUSED(TERN_E_ARGUMENT, "weights 3");
    m.dispatch = (tern_dispatch)3; REFUSED(TERN_E_ARGUMENT, "dispatch 3");
    m.inner = (tern_norm_kind)2; REFUSED(TERN_E_ARGUMENT, "inner norm 2");
    m.dense_max = -1; REFUSED(TERN_E_ARGUMENT, "dense_max -1");
    m.balance = (float)NAN; REFUSED(TERN_E_ARGUMENT, "balance");
    m.eps = -1; REFUSED(TERN_E_ARGUMENT, "eps");
    m.router.w = NULL; REFUSED(TERN_E_ARGUMENT, "w is NULL");
    m.low_a = k->lows_a; REFUSED(TERN_E_ARGUMENT, "low_a and low_b come together");
    m.experts = spare;
    spare[2].up = &other; REFUSED(TERN_E_SHAPE, "moe: the up of expert 2 is 14 x 21, that of the first 13 x 21");
    spare[2] = k->experts[2]; spare[3].down = NULL; m.experts = spare; REFUSED(TERN_E_MISSING, "moe: expert 3 has no down");
    spare[3] = k->experts[3]; spare[1].gate = NULL; m.experts = spare;
    REFUSED(TERN_E_MISSING, "moe: expert 1 and the first differ in having a gate");
    k->expert[5].grain = TERN_PER_TENSOR;
    REFUSED(TERN_E_ARGUMENT, "moe: the down of expert 1 differs from that of the first in rule, grain");
    k->expert[5].grain = TERN_PER_ROW;
    for (i = 0; i < 12; i++) k->expert[i].rotate = i % 3 == 2 ? 0 : 3;
    REFUSED(TERN_E_UNSUPPORTED, "up.0: what experts share is not rotated");
    for (i = 0; i < 12; i++) k->expert[i].rotate = 0;
    k->expert[2].buffer[TERN_GRAD].count--;
    CHECK_FAILS(t.c, tern_moe_backward(t.c, &m, 4, x, saved, x, y), TERN_E_SHAPE, "down.0: its gradient has");
    k->expert[2].buffer[TERN_GRAD].count++;
    CHECK(tern_moe_forward(NULL, &m, 4, x, y, NULL) == TERN_E_ARGUMENT && tern_moe_need(NULL, &m, 4, &need) == TERN_E_ARGUMENT,
          "no context");
    CHECK_FAILS(t.c, tern_moe_forward(t.c, &m, 4, NULL, y, NULL), TERN_E_ARGUMENT, "moe: x is NULL");
    CHECK_FAILS(t.c, tern_moe_forward(t.c, &m, 0, x, y, NULL), TERN_E_SHAPE, "n = 0");
    CHECK_FAILS(t.c, tern_moe_forward(t.c, &m, (int64_t)1 << 40, x, y, NULL), TERN_E_OVERFLOW, "moe: n = 1099511627776 x 4");
    CHECK_OK(t.c, tern_moe_need(t.c, &m, 4, &one));
    CHECK_FAILS(t.c, tern_moe_forward(t.c, &m, 100000, x, y, NULL), TERN_E_SCRATCH, "moe: 100000 tokens need");
    CHECK_OK(t.c, tern_moe_forward(t.c, &m, 4, x, y, saved)); /* and all is as it was */
    tern_param_free(t.c, &other, -1);
    kit_close(k);
    release();
    test_close(&t);
}

typedef struct moe_bytes_sink { unsigned char *data; size_t size; } moe_bytes_sink;
static int moe_write(void *user, const void *data, size_t bytes)
{
    moe_bytes_sink *s = (moe_bytes_sink *)user;
    s->data = (unsigned char *)realloc(s->data, s->size + bytes);
    memcpy(s->data + s->size, data, bytes);
    s->size += bytes;
    return 0;
}

/* Saved, loaded into another and frozen, it gives the same bits; the audit counts every expert. */
static void test_moe_files(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i;
    for (i = 0; i < 8; i += 7) {
        const int64_t n = 5, cols = kits[i].cols;
        kit *a = kit_open(t.c, &kits[i]), *b = kit_open(t.c, &kits[i]);
        const tern_model ma = {a->all, a->count}, mb = {b->all, b->count};
        const float *x = moe_input(a, n);
        float *y = hold_output(n * cols), *z = hold_output(n * cols);
        moe_bytes_sink file = {NULL, 0};
        tern_sink sink;
        tern_audit audit;
        int32_t p;
        int64_t weights = 0;
        sink.write = moe_write;
        sink.user = &file;
        kit_reserve(a, n);
        CHECK_OK(t.c, tern_moe_forward(t.c, &a->m, n, x, y, NULL));
        CHECK_OK(t.c, tern_model_save(t.c, &ma, 0, &sink));
        for (p = 0; p < b->count; p++) tern_param_free(t.c, b->all[p], TERN_FOR_TRAINING);
        CHECK_OK(t.c, tern_model_load(t.c, &mb, file.data, file.size));
        CHECK_OK(t.c, tern_moe_forward(t.c, &b->m, n, x, z, NULL));
        CHECK(memcmp(y, z, (size_t)(n * cols) * 4) == 0, "kit %d: another mixture came back", i);
        CHECK_OK(t.c, tern_model_audit(t.c, &mb, &audit));
        for (p = 0; p < a->count; p++) weights += a->all[p]->rows * a->all[p]->cols;
        CHECK(audit.weights == weights && audit.bytes[TERN_GRAD] == 0, "%d weights of %d", (int)audit.weights, (int)weights);
        free(file.data);
        kit_close(a);
        kit_close(b);
        release();
    }
    test_close(&t);
}

/* -- one scale for many -- */

static double mean_of(kit *k, uint32_t sync)
{
    double sum = 0, count = 0;
    int32_t i;
    int64_t j;
    for (i = 0; i < k->count; i++) {
        const float *w = (const float *)k->all[i]->buffer[TERN_SHADOW].data;
        if (k->all[i]->sync != sync) continue;
        for (j = 0; j < k->all[i]->rows * k->all[i]->cols; j++)
            sum += fabs(k->all[i]->buffer[TERN_SHADOW].type == TERN_BF16 ? tern__load_float(TERN_BF16, w, j) : w[j]);
        count += (double)(k->all[i]->rows * k->all[i]->cols);
    }
    return sum / count;
}

/* Every scale is that of its set, and every trit taken with it. */
static void check_sync(kit *k, record *r, int sigma)
{
    int32_t i;
    int64_t j, row;
    for (i = 0; i < k->count; i++) {
        const tern_param *p = k->all[i];
        const float scale = p->rule == TERN_DENSE ? 0.0f : ((const float *)p->buffer[TERN_SCALES].data)[0];
        if (!p->sync) continue;
        CHECK(fabs(scale - mean_of(k, p->sync) / (sigma ? 0.7978845608 : 1)) < 1e-6, "%s: %g of %g", p->name, scale, mean_of(k, p->sync));
        for (row = 0; row < p->rows; row++) {
            int8_t trits[200];
            CHECK_OK(k->c, tern_param_get(k->c, p, row, trits, NULL, NULL));
            for (j = 0; j < p->cols; j++) {
                const float w = tern__load_float(p->buffer[TERN_SHADOW].type, p->buffer[TERN_SHADOW].data, row * p->cols + j);
                CHECK(trits[j] == (fabsf(w) > 0.5f * scale ? w > 0 ? 1 : -1 : 0), "%s[%d][%d]", p->name, (int)row, (int)j);
            }
        }
        record_words(r, &scale, 1);
    }
}

static void moe_syncs(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < 4; i++) {
        kit_options o = kits[0];
        kit *k;
        tern_model m;
        tern_step s = TERN_ZERO;
        const int64_t n = 8;
        const float *x;
        float *y = hold_output(n * o.cols), *shadow;
        void *saved;
        int32_t e, j;
        o.grain = TERN_PER_TENSOR;
        o.rule = i & 2 ? TERN_ABSMEAN_SIGMA : TERN_ABSMEAN;
        k = kit_open(c, &o);
        m.items = k->all;
        m.count = k->count;
        for (e = 0; e < o.count; e++) /* experts of many sizes; a set each, or one for all */
            for (j = 0; j < 3; j++) {
                tern_param *p = &k->expert[3 * e + j];
                int64_t w;
                shadow = (float *)p->buffer[TERN_SHADOW].data;
                for (w = 0; w < p->rows * p->cols; w++) shadow[w] *= (float)(1 + e);
                p->sync = i & 1 ? 7 : (uint32_t)(1 + e);
                if (j == 1) CHECK_OK(c, tern_param_convert(c, p, TERN_SHADOW, TERN_BF16));
            }
        CHECK_OK(c, tern_model_requantize(c, &m));
        check_sync(k, r, i & 2);
        CHECK_OK(c, tern_param_set(c, &k->expert[4], TERN_TYPE_DEFAULT, NULL)); /* one of a set keeps its scale */
        check_sync(k, r, i & 2);
        x = moe_input(k, n);
        saved = kit_reserve(k, n);
        s.rate = 0.05f;
        s.seed = 5;
        for (s.step = 1; s.step <= 3; s.step++) {
            CHECK_OK(c, tern_moe_forward(c, &k->m, n, x, y, saved));
            CHECK_OK(c, tern_moe_backward(c, &k->m, n, x, saved, y, NULL));
            CHECK_OK(c, tern_model_step(c, &m, &s));
            check_sync(k, r, i & 2);
        }
        kit_close(k);
        release();
    }
}
static void test_moe_sync(void) { same_for_threads(moe_syncs); }

static void test_moe_sync_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    kit_options o = kits[0];
    kit *k;
    tern_model m;
    tern_step s = TERN_ZERO;
    float scale, *scales;
    o.grain = TERN_PER_TENSOR;
    k = kit_open(t.c, &o);
    m.items = k->all;
    m.count = k->count;
    s.step = 1;
    k->expert[0].sync = k->expert[1].sync = 9;
    scales = (float *)k->expert[1].buffer[TERN_SCALES].data;
    k->expert[1].rule = TERN_ABSMEAN_SIGMA;
    CHECK_FAILS(t.c, tern_model_requantize(t.c, &m), TERN_E_ARGUMENT, "gate.0 and up.0 share a scale (sync 9) and differ in rule");
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "differ in rule");
    k->expert[1].rule = TERN_TWN;
    CHECK_FAILS(t.c, tern_model_requantize(t.c, &m), TERN_E_ARGUMENT, "up.0: a set with one scale (sync 9) has rule absmean");
    k->expert[1].rule = TERN_ABSMEAN;
    k->expert[1].rho = 0.5f;
    CHECK_FAILS(t.c, tern_model_requantize(t.c, &m), TERN_E_ARGUMENT, "up.0: a set with one scale");
    k->expert[1].rho = 0;
    scale = scales[0];
    ((float *)k->expert[1].buffer[TERN_SHADOW].data)[3] = (float)NAN;
    CHECK_FAILS(t.c, tern_model_requantize(t.c, &m), TERN_E_NONFINITE, "up.0: cast: element 3 is not finite");
    CHECK(scales[0] == scale, "the scale was written");
    tern_param_free(t.c, &k->expert[1], TERN_FOR_TRAINING);
    CHECK_FAILS(t.c, tern_model_requantize(t.c, &m), TERN_E_MISSING,
                "up.0 shares its scale with gate.0 (sync 9), and one of them has no shadow");
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_MISSING, "no shadow");
    kit_close(k);
    test_close(&t);
}

/* A set follows its shadows in a step where one of it trains, given scales or not, and stays where none does. */
static void test_moe_sync_in_part(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    kit_options o = kits[0];
    record r = {NULL, 0, 0};
    kit *k;
    tern_model m;
    tern_step s = TERN_ZERO;
    const int64_t n = 8;
    const float *x;
    float *y;
    void *saved;
    int32_t j;
    o.grain = TERN_PER_TENSOR;
    k = kit_open(t.c, &o);
    m.items = k->all;
    m.count = k->count;
    for (j = 0; j < 6; j++) {
        tern_param *p = &k->expert[j];
        p->sync = j < 3 ? 1 : 2;
        if (j >= 3) p->noise = p->zone = 0.5f;
        if (j >= 2) tern_param_free(t.c, p, 1 << TERN_GRAD);
    }
    CHECK_OK(t.c, tern_model_requantize(t.c, &m));
    k->expert[2].flags |= TERN_KEEP_SCALES;
    x = moe_input(k, n);
    y = hold_output(n * o.cols);
    saved = kit_reserve(k, n);
    s.rate = 0.05f;
    s.step = 1;
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, NULL));
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    check_sync(k, &r, 0);
    free(r.data);
    kit_close(k);
    release();
    test_close(&t);
}

/* The backward only reads `saved`: loads there are not used, nor set right. */
static void test_moe_saved_is_const(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const int64_t n = 12, bytes = kits[0].count * kits[0].cols * 4;
    kit *k = kit_open(t.c, &kits[0]);
    const float *x = moe_input(k, n);
    float *y = hold_output(n * kits[0].cols), *grad = (float *)k->router.buffer[TERN_GRAD].data, *want = (float *)hold((size_t)bytes);
    void *saved = kit_reserve(k, n);
    tern__moe_work w;
    int32_t i;
    memset(&w, 0, sizeof w);
    tern__moe_saved(&k->m, n, saved, &w);
    k->m.balance = 1.0f;
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    memset(grad, 0, (size_t)bytes);
    CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, NULL));
    memcpy(want, grad, (size_t)bytes);
    memset(grad, 0, (size_t)bytes);
    for (i = 0; i < k->m.count; i++) w.loads[i] = 100 + i;
    CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, NULL));
    CHECK(memcmp(want, grad, (size_t)bytes) == 0, "the loads of `saved` were used");
    for (i = 0; i < k->m.count; i++) CHECK(w.loads[i] == 100 + i, "loads[%d] became %d", (int)i, (int)w.loads[i]);
    kit_close(k);
    release();
    test_close(&t);
}

/* Experts with accumulators: noise by seed and name, no more scratch than was asked for, nothing changed by a refusal. */
static void test_moe_integer(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const int64_t n = 8, cols = kits[0].cols, weights = kits[0].width * cols;
    const float *x;
    float *y = hold_output(n * cols), *grad[3];
    kit_options o = kits[0];
    kit *k;
    void *saved;
    int32_t i, j;
    o.grain = TERN_PER_TENSOR;
    k = kit_open(t.c, &o);
    x = moe_input(k, n);
    for (j = 0; j < 3; j++) grad[j] = hold_output(weights);
    for (j = 0; j < 3 * kits[0].count; j++) {
        tern_param *p = &k->expert[j];
        const float *floats = hold_floats(p->rows * p->cols);
        tern_param_free(t.c, p, TERN_FOR_TRAINING);
        CHECK_OK(t.c, tern_param_alloc(t.c, p, TERN_FOR_FLIPS));
        CHECK_OK(t.c, tern_param_set(t.c, p, TERN_F32, floats));
        if (j == 1)
            CHECK_FAILS(t.c, tern_moe_forward(t.c, &k->m, n, x, y, NULL), TERN_E_ARGUMENT,
                        "differs from that of the first in rule, grain, encoding, type of scales or accumulator");
    }
    saved = kit_reserve(k, n);
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    for (j = 0; j < 3; j++) {
        k->m.seed = j < 2 ? 1 : 2;
        for (i = 0; i < k->count; i++) memset(k->all[i]->buffer[TERN_GRAD].data, 0, (size_t)(k->all[i]->rows * k->all[i]->cols) * 4);
        CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, NULL));
        memcpy(grad[j], k->expert[1].buffer[TERN_GRAD].data, (size_t)weights * 4);
    }
    CHECK(memcmp(grad[0], grad[1], (size_t)weights * 4) == 0, "one seed, two gradients");
    CHECK(memcmp(grad[0], grad[2], (size_t)weights * 4) != 0, "two seeds, one gradient");
    k->m.act = TERN_ACT_FLOAT;
    saved = kit_reserve(k, n);
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    CHECK_FAILS(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, y, NULL), TERN_E_UNSUPPORTED, "beside an accumulator");
    CHECK(memcmp(grad[2], k->expert[1].buffer[TERN_GRAD].data, (size_t)weights * 4) == 0, "a refusal changed a gradient");
    k->expert[0].sync = 3;
    CHECK_FAILS(t.c, tern_moe_forward(t.c, &k->m, n, x, y, NULL), TERN_E_ARGUMENT,
                "gate.0: a shared scale (sync 3) and an accumulator exclude each other");
    kit_close(k);
    release();
    test_close(&t);
}

/* -- from floats -- */

static void test_moe_from_dense(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int variant;
    for (variant = 0; variant < 6; variant++) { /* frozen, with a shadow, frozen in sets; from f32 and bf16 */
        kit_options o = kits[0];
        tern_expert_floats floats[4], always;
        tern_moe_bytes bytes;
        tern_audit audit;
        kit *k;
        const tern_type type = variant >= 3 ? TERN_BF16 : TERN_F32;
        tern_model m;
        int32_t i;
        o.always = 10;
        o.grain = TERN_PER_TENSOR;
        k = kit_open(t.c, &o);
        m.items = k->all;
        m.count = k->count;
        memset(floats, 0, sizeof floats);
        for (i = 0; i < 15; i++) {
            tern_param *p = &k->expert[i < 12 ? i : 3 * KIT_EXPERTS + i - 12];
            const int64_t count = p->rows * p->cols;
            tern_expert_floats *e = i < 12 ? &floats[i / 3] : &always;
            void *w = hold((size_t)count * 4);
            tern_cast_args cast = TERN_ZERO;
            cast.count = count;
            cast.src = hold_floats(count);
            cast.dst = w;
            cast.to = type;
            CHECK_OK(t.c, tern_cast(t.c, &cast));
            if (i % 3 == 0) e->gate = w; else if (i % 3 == 1) e->up = w; else e->down = w;
            if (variant % 3 == 2) p->sync = 3;
            if (variant % 3 != 1) tern_param_free(t.c, p, TERN_FOR_TRAINING);
        }
        floats[2].up = NULL;
        CHECK_FAILS(t.c, tern_moe_from_dense(t.c, &k->m, type, floats, &always, NULL, &bytes), TERN_E_ARGUMENT,
                    "up.2: its float array is NULL");
        CHECK_FAILS(t.c, tern_moe_from_dense(t.c, &k->m, type, floats, NULL, NULL, &bytes), TERN_E_ARGUMENT, "always on");
        floats[2].up = floats[1].up;
        if (variant % 3 == 2) { /* what sets of one scale take */
            const float scale = ((const float *)k->expert[0].buffer[TERN_SCALES].data)[0];
            for (i = 2; i < 12; i += 3) k->expert[i].rotate = 7;
            CHECK_FAILS(t.c, tern_moe_from_dense(t.c, &k->m, type, floats, &always, NULL, &bytes), TERN_E_UNSUPPORTED,
                        "down.0: a shared scale (sync 3) of a rotated matrix needs a shadow");
            for (i = 2; i < 12; i += 3) k->expert[i].rotate = 0, k->expert[i].rule = TERN_ABSMEAN_SIGMA;
            CHECK_FAILS(t.c, tern_moe_from_dense(t.c, &k->m, type, floats, &always, NULL, &bytes), TERN_E_ARGUMENT,
                        "gate.0 and down.0 share a scale (sync 3) and differ in rule");
            for (i = 2; i < 12; i += 3) k->expert[i].rule = TERN_ABSMEAN;
            CHECK(((const float *)k->expert[0].buffer[TERN_SCALES].data)[0] == scale, "a refusal changed a scale");
        }
        CHECK_OK(t.c, tern_moe_from_dense(t.c, &k->m, type, floats, &always, NULL, &bytes));
        CHECK_OK(t.c, tern_model_audit(t.c, &m, &audit));
        CHECK(bytes.before == (size_t)((12 * 13 + 3 * 10) * 21 * (variant >= 3 ? 2 : 4)), "%d before", (int)bytes.before);
        CHECK(bytes.after == audit.packed_bytes - (4 + 1 + 1) * 21 * 4, "%d after", (int)bytes.after);
        for (i = 0; i < 15; i++) {
            tern_param *p = &k->expert[i < 12 ? i : 3 * KIT_EXPERTS + i - 12];
            const tern_expert_floats *e = i < 12 ? &floats[i / 3] : &always;
            const void *w = i % 3 == 0 ? e->gate : i % 3 == 1 ? e->up : e->down;
            const float scale = ((const float *)p->buffer[TERN_SCALES].data)[0],
                        first = ((const float *)k->expert[0].buffer[TERN_SCALES].data)[0];
            int8_t trits[21];
            int64_t j;
            CHECK(variant % 3 == 2 ? scale == first : i == 0 || scale != first || p->name[0] == 'x',
                  "%s: scale %g beside %g", p->name, scale, first);
            CHECK_OK(t.c, tern_param_get(t.c, p, 1, trits, NULL, NULL));
            for (j = 0; j < p->cols; j++) {
                const float v = tern__load_float(type, w, p->cols + j);
                CHECK(trits[j] == (fabsf(v) > 0.5f * scale ? v > 0 ? 1 : -1 : 0), "%s[1][%d]", p->name, (int)j);
            }
        }
        kit_close(k);
        release();
    }
    test_close(&t);
}

/* Everything a set may write. */
static uint64_t kit_state(const kit *k)
{
    uint64_t hash = 1;
    int32_t i, b;
    for (i = 0; i < k->count; i++) {
        hash = tern__fnv(hash, (const uint8_t *)&k->all[i]->flags, sizeof k->all[i]->flags);
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_buffer *buffer = &k->all[i]->buffer[b];
            if (buffer->data) hash = tern__fnv(hash, (const uint8_t *)buffer->data, buffer->count * (size_t)tern__type_bytes(buffer->type));
        }
    }
    return hash;
}

enum { WHOLE_FROZEN, WHOLE_SHADOW, WHOLE_BF16, WHOLE_ROTATED, WHOLE_LEARNED, WHOLE_INTEGER, WHOLE_VARIANTS };

/* Another state of the parameters of experts. */
static void whole_params(kit *k, int variant, tern_param *alphas)
{
    int32_t i;
    for (i = 0; i < 15; i++) {
        tern_param *p = &k->expert[i < 12 ? i : 3 * KIT_EXPERTS + i - 12];
        if (variant == WHOLE_FROZEN) tern_param_free(k->c, p, TERN_FOR_TRAINING);
        if (variant == WHOLE_BF16) CHECK_OK(k->c, tern_param_convert(k->c, p, TERN_SHADOW, TERN_BF16));
        if (variant == WHOLE_ROTATED && i % 3 == 2) p->rotate = 7;
        if (variant == WHOLE_LEARNED) {
            alphas[i] = param_of("alpha", 1, 1, TERN_DENSE, 0);
            CHECK_OK(k->c, tern_param_alloc(k->c, &alphas[i], TERN_FOR_GRADIENT));
            p->rule = TERN_LSQ;
            p->alpha = k->all[k->count++] = &alphas[i];
        }
        if (variant == WHOLE_INTEGER) {
            tern_param_free(k->c, p, -1);
            p->buffer[TERN_SCALES].type = TERN_LOG;
            CHECK_OK(k->c, tern_param_alloc(k->c, p, TERN_FOR_FLIPS | 1 << TERN_VOTES));
            memset(p->buffer[TERN_VOTES].data, 3, p->buffer[TERN_VOTES].count);
            memset(p->buffer[TERN_ACCUM].data, 3, p->buffer[TERN_ACCUM].count);
        }
    }
}

typedef struct conversion {
    kit *k;
    tern_type type;
    tern_expert_floats floats[4], always;
    void *router;
    tern_moe_bytes bytes;
    uint64_t before;
} conversion;

static tern_result whole_set(conversion *o)
{
    return tern_moe_from_dense(o->k->c, &o->k->m, o->type, o->floats, &o->always, o->router, &o->bytes);
}

static void whole_refused(conversion *o, tern_result code, const char *text)
{
    CHECK_FAILS(o->k->c, whole_set(o), code, text);
    CHECK(kit_state(o->k) == o->before, "refused (%s), and something changed", text);
    CHECK(o->bytes.before == 7 && o->bytes.after == 7,
          "refused (%s), and bytes are %d and %d", text, (int)o->bytes.before, (int)o->bytes.after);
}

/* All or nothing: whatever is refused, of whichever array, leaves every parameter as it was. */
static void test_moe_from_dense_whole(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    int round;
    for (round = 0; round < 2 * WHOLE_VARIANTS; round++) {
        const int variant = round / 2;
        const float bads[] = {NAN, -INFINITY, -302231454903657293676544.0f}; /* -2^78 */
        kit_options o = kits[0];
        tern_param alphas[15];
        conversion w;
        int32_t i, j;
        o.always = 10;
        o.grain = TERN_PER_TENSOR;
        memset(&w, 0, sizeof w);
        w.type = round & 1 ? TERN_BF16 : TERN_F32;
        w.k = kit_open(t.c, &o);
        w.bytes.before = w.bytes.after = 7;
        whole_params(w.k, variant, alphas);
        w.before = kit_state(w.k);
        for (i = 0; i < 16; i++) {
            const tern_param *p = i == 15 ? &w.k->router : &w.k->expert[i < 12 ? i : 3 * KIT_EXPERTS + i - 12];
            tern_expert_floats *e = i < 12 ? &w.floats[i / 3] : &w.always;
            tern_cast_args cast = TERN_ZERO;
            cast.count = p->rows * p->cols;
            cast.src = hold_floats(cast.count);
            cast.dst = hold((size_t)cast.count * 4);
            cast.to = w.type;
            CHECK_OK(t.c, tern_cast(t.c, &cast));
            if (i == 15) w.router = cast.dst;
            else if (i % 3 == 0) e->gate = cast.dst;
            else if (i % 3 == 1) e->up = cast.dst;
            else e->down = cast.dst;
        }
        for (i = 0; i < 16; i++) {
            tern_param *p = i == 15 ? &w.k->router : &w.k->expert[i < 12 ? i : 3 * KIT_EXPERTS + i - 12];
            const tern_expert_floats *e = i < 12 ? &w.floats[i / 3] : &w.always;
            void *at = (void *)(uintptr_t)(i == 15 ? w.router : i % 3 == 0 ? e->gate : i % 3 == 1 ? e->up : e->down);
            const int64_t row = test_random() % p->rows, col = test_random() % p->cols;
            const float kept = tern__load_float(w.type, at, row * p->cols + col);
            char text[160];
            for (j = 0; j < 3; j++) {
                tern__store_float(w.type, at, row * p->cols + col, bads[j]);
                sprintf(text, "%s: weights[%d][%d] is not a finite number below 2^78", p->name, (int)row, (int)col);
                whole_refused(&w, TERN_E_NONFINITE, text);
            }
            tern__store_float(w.type, at, row * p->cols + col, kept);
            if (p->alpha) {
                *(float *)p->alpha->buffer[TERN_SHADOW].data = NAN;
                w.before = kit_state(w.k);
                whole_refused(&w, TERN_E_NONFINITE, "alpha: weights[0][0] is not a finite number below 2^78");
                *(float *)p->alpha->buffer[TERN_SHADOW].data = 0.0f;
                w.before = kit_state(w.k);
            }
            for (j = TERN_SHADOW; j < TERN_BUFFERS; j++) { /* lent, and too small */
                if (!p->buffer[j].data || (j > TERN_SHADOW && j < TERN_ACCUM)) continue;
                p->buffer[j].count--;
                w.before = kit_state(w.k);
                whole_refused(&w, TERN_E_SHAPE, tern__buffer_names[j]);
                p->buffer[j].count++;
                w.before = kit_state(w.k);
            }
        }
        for (i = 0; i < 2; i++) tern__store_float(w.type, (void *)(uintptr_t)w.always.up, i, 2.5e23f); /* good, but only a look tells */
        for (i = 0; i < 9; i++) {
            test_fail_at = test_allocations + i;
            if (whole_set(&w) == TERN_OK) break;
            CHECK_FAILS(t.c, tern_last_error(t.c)->code, TERN_E_MEMORY, "moe: no memory to ");
            CHECK(kit_state(w.k) == w.before, "without memory something changed");
        }
        test_fail_at = -1;
        CHECK(i == 1 + (variant == WHOLE_ROTATED), "%d allocations", (int)i);
        CHECK(kit_state(w.k) != w.before && w.bytes.before > w.bytes.after && w.bytes.after > 7, "nothing was set");
        CHECK_OK(t.c, tern_sync(t.c));
        for (i = 0; variant == WHOLE_LEARNED && i < 15; i++) tern_param_free(t.c, &alphas[i], -1);
        if (variant == WHOLE_LEARNED) w.k->count -= 15;
        kit_close(w.k);
        release();
    }
    test_close(&t);
}

/* -- per-layer embeddings -- */

typedef struct ple_case { tern_ple l; double *gate, *project, *gain; const float *dy; int64_t n; } ple_case;

static double ple_loss(const ple_case *f, const double *x, const double *rows)
{
    const int64_t cols = f->l.gate.w->cols, low = f->l.gate.w->rows;
    double loss = 0, g[64], o[64], y[64];
    int64_t t, i, j;
    for (t = 0; t < f->n; t++) {
        for (i = 0; i < low; i++) {
            for (g[i] = 0, j = 0; j < cols; j++) g[i] += f->gate[i * cols + j] * x[t * cols + j];
            g[i] = reference_fn(TERN_MAP_GELU, g[i]) * rows[t * low + i];
        }
        for (i = 0; i < cols; i++)
            for (o[i] = 0, j = 0; j < low; j++) o[i] += f->project[i * low + j] * g[j];
        reference_norm(o, f->gain, cols, y);
        for (i = 0; i < cols; i++) loss += (y[i] + x[t * cols + i]) * f->dy[t * cols + i];
    }
    return loss;
}

static void ple_slopes(const ple_case *f, const double *x, const double *rows, double *value, int64_t count, const float *got,
                       const char *name)
{
    int64_t i;
    for (i = 0; i < count; i++) {
        const double at = value[i];
        double slope;
        value[i] = at + 1e-5;
        slope = ple_loss(f, x, rows);
        value[i] = at - 1e-5;
        slope = (slope - ple_loss(f, x, rows)) / 2e-5;
        value[i] = at;
        CHECK(fabs(slope - got[i]) < 2e-4 * (1 + fabs(slope)), "%s[%d]: %g, not %g", name, (int)i, got[i], slope);
    }
}

static void ples(tern_context *c, record *r)
{
    int act;
    for (act = TERN_ACT_INT8; act <= TERN_ACT_FLOAT; act++) {
        const int64_t n = 6, cols = 19, low = 11;
        tern_param gate = param_of("gate", low, cols, TERN_ABSMEAN, TERN_PER_ROW),
                   project = param_of("project", cols, low, TERN_ABSMEAN, TERN_PER_ROW), gain = param_of("gain", 1, cols, TERN_DENSE, 0);
        tern_param *const all[] = {&gate, &project, &gain};
        const float *x = hold_floats(n * cols), *rows = hold_floats(n * low);
        float *y = hold_output(n * cols), *dx = hold_output(n * cols), *drows = hold_output(n * low), *again = hold_output(n * cols);
        ple_case f;
        tern_need need = TERN_ZERO;
        void *saved;
        double sum;
        int64_t j;
        int i;
        for (i = 0; i < 3; i++) { CHECK_OK(c, tern_param_alloc(c, all[i], TERN_FOR_GRADIENT)); set_random(c, all[i]); }
        memset(&f, 0, sizeof f);
        f.l.gate.w = &gate;
        f.l.project.w = &project;
        f.l.gate.act = f.l.project.act = (tern_act)act;
        f.l.gain = &gain;
        f.n = n;
        f.dy = hold_floats(n * cols);
        CHECK_OK(c, tern_ple_need(c, &f.l, n, &need));
        CHECK_OK(c, tern_reserve(c, need.scratch));
        saved = hold(need.saved);
        CHECK_OK(c, tern_ple_forward(c, &f.l, n, x, rows, y, saved));
        CHECK_OK(c, tern_ple_forward(c, &f.l, n, x, rows, again, NULL));
        CHECK(memcmp(y, again, (size_t)(n * cols) * 4) == 0, "without saved it differs");
        CHECK_OK(c, tern_ple_backward(c, &f.l, n, x, rows, saved, f.dy, dx, drows));
        if (act == TERN_ACT_FLOAT) {
            double *xs = hold_doubles(x, n * cols), *rs = hold_doubles(rows, n * low);
            f.gate = hold_values(c, &gate);
            f.project = hold_values(c, &project);
            f.gain = hold_values(c, &gain);
            for (sum = 0, j = 0; j < n * cols; j++) sum += (double)y[j] * f.dy[j];
            CHECK(fabs(sum - ple_loss(&f, xs, rs)) < 1e-4, "y dy is %g, not %g", sum, ple_loss(&f, xs, rs));
            ple_slopes(&f, xs, rs, xs, n * cols, dx, "x");
            ple_slopes(&f, xs, rs, rs, n * low, drows, "rows");
            ple_slopes(&f, xs, rs, f.gate, low * cols, grad_of(&gate), "gate");
            ple_slopes(&f, xs, rs, f.project, low * cols, grad_of(&project), "project");
            ple_slopes(&f, xs, rs, f.gain, cols, grad_of(&gain), "gain");
        }
        record_words(r, y, n * cols);
        record_words(r, dx, n * cols);
        project.rows--;
        CHECK_FAILS(c, tern_ple_forward(c, &f.l, n, x, rows, y, NULL), TERN_E_SHAPE, "project is 18 x 11 beside gate of 11 x 19");
        project.rows++;
        CHECK_FAILS(c, tern_ple_forward(c, &f.l, n, x, NULL, y, NULL), TERN_E_ARGUMENT, "ple: rows is NULL");
        CHECK_FAILS(c, tern_ple_forward(c, &f.l, 10000, x, rows, y, NULL), TERN_E_SCRATCH, "ple: 10000 tokens need");
        for (i = 0; i < 3; i++) tern_param_free(c, all[i], -1);
        release();
    }
}
static void test_ple(void) { same_for_threads(ples); }

/* -- training: a router that starts lopsided, and targets that need several experts -- */

static void moe_training(tern_context *c, record *r)
{
    enum { TOKENS = 64, STEPS = 150 };
    int kind;
    for (kind = 0; kind < 3; kind++) { /* without the balance loss, with it, low rank with it */
        kit_options o = kits[kind == 2 ? 6 : 0];
        kit *k;
        tern_model m;
        tern_step s = TERN_ZERO;
        const float *x, *target;
        float *y, *dy;
        void *saved;
        double first = 0, loss = 0;
        int64_t i, loads[4] = {0};
        tern_moe_report report;
        o.inner = TERN_NORM_RMS;
        k = kit_open(c, &o);
        m.items = k->all;
        m.count = k->count;
        x = moe_input(k, TOKENS);
        target = hold_floats(TOKENS * o.cols);
        y = hold_output(TOKENS * o.cols);
        dy = hold_output(TOKENS * o.cols);
        saved = kit_reserve(k, TOKENS);
        k->m.balance = kind ? 1.0f : 0.0f;
        for (i = 0; i < o.count * o.cols; i++) ((float *)k->router.buffer[TERN_SHADOW].data)[i] *= 0.1f;
        s.seed = 3;
        for (s.step = 1; s.step <= STEPS; s.step++) {
            s.rate = 0.02f;
            CHECK_OK(c, tern_moe_forward(c, &k->m, TOKENS, x, y, saved));
            for (loss = 0, i = 0; i < TOKENS * o.cols; i++) {
                dy[i] = (y[i] - target[i]) / TOKENS;
                loss += (double)(y[i] - target[i]) * (y[i] - target[i]) / (double)(TOKENS * o.cols);
            }
            if (s.step == 1) first = loss;
            CHECK_OK(c, tern_moe_backward(c, &k->m, TOKENS, x, saved, dy, NULL));
            CHECK_OK(c, tern_model_step(c, &m, &s));
        }
        CHECK_OK(c, tern_moe_forward(c, &k->m, TOKENS, x, y, saved));
        CHECK_OK(c, tern_moe_stats(c, &k->m, TOKENS, saved, loads, &report));
        CHECK(loss < 0.3 * first, "kind %d: the loss went from %g to %g", kind, first, loss);
        for (i = 0; kind && i < o.count; i++)
            CHECK(loads[i] > 15 && loads[i] < 60, "kind %d: expert %d has %d of %d tokens", kind, (int)i, (int)loads[i], TOKENS);
        record_words(r, y, TOKENS * o.cols);
        kit_close(k);
        release();
    }
}
static void test_moe_training(void)
{
    record want = record_of(moe_training, TERN_ISA_BEST, 1), got = record_of(moe_training, TERN_ISA_BEST, 3);
    CHECK(got.size == want.size && memcmp(got.data, want.data, got.size) == 0, "3 threads train otherwise");
    free(want.data);
    free(got.data);
}

/* The balance loss alone evens a router that prefers one expert. */
static void test_moe_balance(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    kit_options o = kits[0];
    const int64_t n = 100;
    kit *k = kit_open(t.c, &o);
    tern_param *router = &k->router;
    tern_model m;
    tern_step s = TERN_ZERO;
    float *x, *y = hold_output(n * o.cols), *dy = hold_zeros(n * o.cols), *w = (float *)router->buffer[TERN_SHADOW].data;
    int64_t i, loads[4] = {0}, after[4] = {0};
    tern_moe_report before, even;
    void *saved;
    m.items = &router;
    m.count = 1;
    x = hold_floats(n * o.cols);
    for (i = 0; i < n; i++) x[i * o.cols] = 1.0f;
    k->m.router.norm = TERN_NORM_NONE;
    k->m.router.gain = NULL;
    for (i = 0; i < o.count * o.cols; i++) w[i] *= 0.1f;
    w[0] = w[o.cols] = 2.0f; /* two experts for all */
    saved = kit_reserve(k, n);
    k->m.balance = 1.0f;
    s.rate = 0.02f;
    CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    CHECK_OK(t.c, tern_moe_stats(t.c, &k->m, n, saved, loads, &before));
    CHECK(loads[0] > 95 && loads[1] > 95, "lopsided: %d, %d", (int)loads[0], (int)loads[1]);
    for (s.step = 1; s.step <= 200; s.step++) {
        CHECK_OK(t.c, tern_moe_backward(t.c, &k->m, n, x, saved, dy, NULL));
        CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
        CHECK_OK(t.c, tern_moe_forward(t.c, &k->m, n, x, y, saved));
    }
    CHECK_OK(t.c, tern_moe_stats(t.c, &k->m, n, saved, after, &even));
    for (i = 0; i < 4; i++) CHECK(after[i] > 35 && after[i] < 65, "expert %d has %d of 100 tokens", (int)i, (int)after[i]);
    CHECK(before.balance > 1.5f && even.balance < 1.05f, "the balance loss went from %g to %g", before.balance, even.balance);
    kit_close(k);
    release();
    test_close(&t);
}

static void suite_moe(void)
{
    RUN(test_moe_route);
    RUN(test_moe_route_backward);
    RUN(test_moe_route_faults);
    RUN(test_moe_out_of_range);
    RUN(test_moe_maps);
    RUN(test_moe_group);
    RUN(test_moe_weighted_rows);
    RUN(test_moe_forward);
    RUN(test_moe_fusion);
    RUN(test_moe_counts);
    RUN(test_moe_leaks);
    RUN(test_moe_one_for_all);
    RUN(test_moe_gradients);
    RUN(test_moe_backward);
    RUN(test_moe_backward_fusion);
    RUN_ALONE(test_moe_grouped_backward);
    RUN(test_moe_bf16_gradients);
    RUN(test_moe_stats);
    RUN(test_moe_refusals);
    RUN(test_moe_files);
    RUN(test_moe_sync);
    RUN(test_moe_sync_refusals);
    RUN(test_moe_sync_in_part);
    RUN(test_moe_saved_is_const);
    RUN(test_moe_integer);
    RUN(test_moe_from_dense);
    RUN(test_moe_from_dense_whole);
    RUN(test_ple);
    RUN(test_moe_training);
    RUN(test_moe_balance);
}
