/* Room 18, graphs, n-grams and codebooks, and the operations aggregate, gate and nearest of room 14. What is built: edge by edge.
   Sums: bit for bit a literal loop, on every tier and thread count. Hops: forward against what the public layers give, and
   everything against float64, with central differences. Mutations
   that the tests were seen to see: left, right or a sign forgotten, a segment of a hub left out, norms not exchanged backward
   or of the wrong end, the graph not turned round, LoRA, its scale or the residual left out of dh, fn left out of the backward;
   of gates their slope or dy, of n-grams the value's gradient or the period, of codes the last of equal ones, either sign.
   Of graphs: edges of sign 0 kept, signs lost both ways or turned round, a loop of sign -1, twice or not seen, duplicates let
   through or rows not closed up, degrees of the wrong end; of sums the finite check or its zeros, the last columns, a factor of
   int8 rows, the factor of the whole, of hubs or not; of blocks their left, hubs, parts, first row, places, rows of h, of P h or in
   faults, of those that workers take their scratch, its size, that of layers inside, whose error or fault it is, who has the hub;
   of several hops a piece of scratch that two share, its size or base, who is offered to a backend and what stays of its answer; of
   n-grams the order of tokens, its number, what is unknown; distances to a shadow. */

/* -- building -- */

static tern_edges edges_of(int64_t nodes, int64_t count, const int32_t *from, const int32_t *to, const int8_t *sign)
{
    tern_edges e = TERN_ZERO;
    e.nodes = nodes;
    e.count = count;
    e.from = from;
    e.to = to;
    e.sign = sign;
    return e;
}

/* Rows of a graph as text: "0: +1 -2; 1:;" */
static void check_rows(const tern_adjacency *a, const char *want, const char *what)
{
    char got[500] = "", *at = got;
    int64_t v, i;
    for (v = 0; v < a->rows; v++) {
        at += sprintf(at, "%d:", (int)v);
        for (i = a->start[v]; i < a->start[v + 1]; i++)
            at += sprintf(at, " %c%d", a->entry[i] >> 31 ? '-' : '+', (int)(a->entry[i] & 0x7FFFFFFFu));
        at += sprintf(at, "; ");
    }
    CHECK(strcmp(got, want) == 0, "%s: \"%s\"", what, got);
    CHECK(a->count == a->start[a->rows] && a->sources == a->rows, "%s: counts", what);
}

static void test_graph_build(void)
{
    static const int32_t from[] = {3, 1, 0, 1, 2, 1, 4}, to[] = {0, 0, 2, 0, 2, 4, 1};
    static const int8_t sign[] = {1, -1, 1, -1, 1, 0, -1};
    static const int64_t start[] = {0, 2, 2, 5, 5, 5};
    static const int32_t rows[] = {3, 1, 1, 0, 1};
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_edges e = edges_of(5, 7, from, to, sign);
    tern_graph g = TERN_ZERO;
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    check_rows(&g.in, "0: +3 -1 -1; 1: -4; 2: +0 +2; 3:; 4:; ", "in");
    check_rows(&g.out, "0: +2; 1: -0 -0; 2: +2; 3: +0; 4: -1; ", "out");
    CHECK(g.nodes == 5 && g.edges == 6 && g.in.hubs == 0 && g.out.parts == 0, "counts");
    CHECK(g.mean[0] == 1.0f / 3.0f && g.mean[3] == 0.0f && g.to[0] == 1.0f / sqrtf(3.0f) && g.to[4] == 0.0f
          && g.from[1] == 1.0f / sqrtf(2.0f) && g.from[0] == 1.0f, "norms");
    tern_graph_free(t.c, &g);
    CHECK(!g.memory && !g.nodes, "freed");
    tern_graph_free(t.c, &g);
    e.duplicates = TERN_DUPLICATES_FIRST;
    e.both_ways = 1;
    e.loops = 1;
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    check_rows(&g.in, "0: +3 -1 +2 +0; 1: -0 -4 +1; 2: +0 +2; 3: +0 +3; 4: -1 +4; ", "both ways");
    check_rows(&g.out, "0: +0 -1 +2 +3; 1: -0 +1 -4; 2: +0 +2; 3: +0 +3; 4: -1 +4; ", "both ways, out");
    tern_graph_free(t.c, &g);
    e.duplicates = TERN_DUPLICATES_ADD;
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    check_rows(&g.in, "0: +3 -1 +2 -1 +0; 1: -0 -0 -4 +1; 2: +0 +2; 3: +0 +3; 4: -1 +4; ", "a loop once");
    tern_graph_free(t.c, &g);
    e = edges_of(5, 5, rows, NULL, NULL);
    e.start = start;
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    check_rows(&g.in, "0: +3 +1; 1:; 2: +1 +0 +1; 3:; 4:; ", "by target");
    tern_graph_free(t.c, &g);
    e = edges_of(3, 0, NULL, from, NULL);
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    check_rows(&g.out, "0:; 1:; 2:; ", "no edges");
    tern_graph_free(t.c, &g);
    test_close(&t);
}

static void test_graph_refusals(void)
{
    static const int32_t from[] = {0, 2, 1}, to[] = {1, 0, 2};
    static const int32_t far[] = {0, 3, 1}, negative[] = {0, 1, -1}, again[] = {1, 1, 1};
    static const int8_t sign[] = {1, 0, 2};
    static const int64_t falling[] = {0, 2, 1, 3}, late[] = {1, 1, 2, 3}, shorter[] = {0, 1, 1, 2};
    test_context t = test_open(TERN_ISA_BEST, 1);
    const tern_edges good = edges_of(3, 3, from, to, NULL);
    tern_edges e = good;
    tern_graph g = TERN_ZERO;
    int i;
#define UNFIT(change, code, part) e = good; change; CHECK_FAILS(t.c, tern_graph_build(t.c, &e, &g), code, part)
    UNFIT(e.from = far, TERN_E_ARGUMENT, "graph: from[1] is 3; there are nodes 0 to 2");
    UNFIT(e.from = negative, TERN_E_ARGUMENT, "from[2] is -1");
    UNFIT(e.to = far, TERN_E_ARGUMENT, "to[1] is 3");
    UNFIT(e.sign = sign, TERN_E_TRIT, "sign[2] is 2");
    UNFIT(e.nodes = 0, TERN_E_SHAPE, "0 nodes");
    UNFIT(e.nodes = (int64_t)1 << 31, TERN_E_SHAPE, "2147483648 nodes; 1 to 2147483647");
    UNFIT(e.count = -1, TERN_E_SHAPE, "-1 edges");
    UNFIT(e.count = INT64_MAX, TERN_E_OVERFLOW, "9223372036854775807 edges overflows");
    UNFIT(e.count = INT64_MAX / 64, TERN_E_OVERFLOW, "overflows");
    UNFIT(e.from = NULL, TERN_E_ARGUMENT, "from is NULL");
    UNFIT(e.to = NULL, TERN_E_ARGUMENT, "to or with start");
    UNFIT(e.start = falling, TERN_E_ARGUMENT, "not with both");
    UNFIT(e.to = NULL; e.start = falling, TERN_E_ARGUMENT, "start[2] is 1, below start[1] = 2");
    UNFIT(e.to = NULL; e.start = late, TERN_E_ARGUMENT, "start[0] is 1");
    UNFIT(e.to = NULL; e.start = shorter, TERN_E_SHAPE, "start[3] is 2 for 3 edges");
    UNFIT(e.from = again; e.to = again; e.duplicates = TERN_DUPLICATES_REFUSE, TERN_E_ARGUMENT, "from 1 to 1 is there twice");
    UNFIT(e.duplicates = (tern_duplicates)3, TERN_E_ARGUMENT, "duplicates is 3");
#undef UNFIT
    CHECK_FAILS(t.c, tern_graph_build(t.c, NULL, &g), TERN_E_ARGUMENT, "NULL");
    CHECK(!g.memory, "a refused graph was written");
    for (i = 0; i < 3; i++) {
        const long blocks = test_blocks;
        test_fail_at = test_allocations + i;
        CHECK_FAILS(t.c, tern_graph_build(t.c, &good, &g), TERN_E_MEMORY, "graph: no memory for");
        CHECK(test_blocks == blocks && !g.memory, "allocation %d failed and something stayed", i);
    }
    test_fail_at = -1;
    test_close(&t);
}

/* -- sums -- */

/* An edge list with hubs at both ends, nodes without edges and edges of sign 0. */
typedef struct wild { tern_edges e; tern_graph g; } wild;
static wild wild_graph(tern_context *c, int64_t nodes, int64_t count, int64_t hub)
{
    wild w;
    int32_t *from = hold_ids(count + hub, (int32_t)nodes), *to = hold_ids(count + hub, (int32_t)nodes);
    int8_t *sign = (int8_t *)hold((size_t)(count + hub) + 1);
    int64_t i;
    for (i = 0; i < count + hub; i++) sign[i] = test_random() % 8 ? (int8_t)(test_random() % 3 ? 1 : -1) : 0;
    for (i = 0; i < count; i++) if (to[i] % 5 == 2) to[i] = 0; /* nobody meets some */
    for (i = count; i < count + hub; i++) { if (i % 2) to[i] = (int32_t)nodes - 1; else from[i] = (int32_t)nodes / 2; }
    w.e = edges_of(nodes, count + hub, from, to, sign);
    memset(&w.g, 0, sizeof w.g);
    CHECK_OK(c, tern_graph_build(c, &w.e, &w.g));
    return w;
}

/* 511 edges and their row are 512 places: two tasks part where a segment begins. */
static wild one_hub(tern_context *c)
{
    wild w;
    int8_t *sign = (int8_t *)memset(hold(511), 1, 511);
    int64_t i;
    for (i = 0; i < 511; i += 3) sign[i] = -1;
    w.e = edges_of(1, 511, hold_ids(511, 1), hold_ids(511, 1), sign);
    memset(&w.g, 0, sizeof w.g);
    CHECK_OK(c, tern_graph_build(c, &w.e, &w.g));
    return w;
}

/* The definition, with the edges as they were given. */
static void literal_sum(const tern_edges *e, const tern_aggregate_args *a, int turned, float *y)
{
    int64_t v, i, j;
    float *total = hold_output(a->cols), *segment = hold_output(a->cols);
    for (v = 0; v < e->nodes; v++) {
        int64_t n = 0, u;
        for (j = 0; j < a->cols; j++) total[j] = segment[j] = 0.0f;
        for (u = 0; u < (turned ? e->nodes : 1); u++) /* turned round, in the order of the ends */
            for (i = 0; i < e->count; i++) {
                const int32_t from = turned ? e->to[i] : e->from[i], to = turned ? e->from[i] : e->to[i];
                const float right = a->right ? a->right[from] : 1.0f;
                if (to != v || (turned && from != u) || e->sign[i] == 0) continue;
                if (n && n % 256 == 0) for (j = 0; j < a->cols; j++) { total[j] = total[j] + segment[j]; segment[j] = 0.0f; }
                n++;
                for (j = 0; j < a->cols; j++) {
                    const float scale = a->q ? a->scale[from] * right : right;
                    const float term = (a->q ? (float)a->q[from * a->q_row + j] : a->x[from * a->cols + j]) * scale;
                    segment[j] = segment[j] + (e->sign[i] > 0 ? term : -term);
                }
            }
        for (j = 0; j < a->cols; j++) y[v * a->cols + j] = (a->left ? a->left[v] : 1.0f) * (total[j] + segment[j]);
    }
}

static void sum_along(tern_context *c, record *r)
{
    static const int64_t widths[] = {1, 7, 16, 17, 64, 130, 257, 9};
    int i, k;
    for (i = 0; i < 8; i++) {
        const int64_t nodes = i == 3 || i == 7 ? 1 : 40, cols = widths[i];
        wild w = i < 7 ? wild_graph(c, nodes, i == 4 ? 0 : i == 5 ? 7 : 300, i % 2 ? 1500 : 0) : one_hub(c);
        for (k = 0; k < 6; k++) {
            tern_aggregate_args a = TERN_ZERO;
            float *want = hold_output(nodes * cols);
            int64_t j;
            a.edges = k & 1 ? w.g.out : w.g.in;
            a.cols = cols;
            if (k < 2) { a.left = k & 1 ? w.g.from : w.g.to; a.right = k & 1 ? w.g.to : w.g.from; }
            else if (k == 2) a.left = w.g.mean;
            else if (k == 5) a.right = w.g.mean;
            a.x = hold_floats(nodes * cols);
            if (k >= 4) {
                a.q_row = (cols + 15) / 16 * 16 + 16;
                a.scale = hold_floats(nodes);
                a.q = (int8_t *)hold((size_t)(nodes * a.q_row));
                for (j = 0; j < nodes * a.q_row; j++) ((int8_t *)(uintptr_t)a.q)[j] = (int8_t)(test_random() % 255 - 127);
                a.x = NULL;
            }
            a.part = hold_output((a.edges.parts + 1) * cols);
            a.y = hold_output(nodes * cols);
            literal_sum(&w.e, &a, k & 1, want);
            CHECK_OK(c, tern_aggregate(c, &a));
            for (j = 0; j < nodes * cols; j++)
                CHECK(a.y[j] == want[j],
                      "cols %d, form %d: y[%d][%d] is %g, not %g", (int)cols, k, (int)(j / cols), (int)(j % cols), a.y[j], want[j]);
            record_words(r, a.y, nodes * cols);
        }
        CHECK(i % 2 == 0 || nodes == 1 || (w.g.in.hubs == 1 && w.g.out.hubs == 1 && w.g.in.parts > 1),
              "%d hubs of %d parts", (int)w.g.in.hubs, (int)w.g.in.parts);
        tern_graph_free(c, &w.g);
        release();
    }
}
static void test_graph_aggregate(void) { same_everywhere(sum_along, UINT64_C(0x2E2C49EC9DC408F8)); }

static void test_graph_faults(void)
{
    static const int32_t from[] = {0, 1, 2, 3}, to[] = {1, 2, 2, 0};
    test_context t = test_open(TERN_ISA_BEST, 1);
    const tern_edges e = edges_of(4, 4, from, to, NULL);
    tern_graph g = TERN_ZERO;
    tern_aggregate_args a = TERN_ZERO;
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8];
    CHECK_OK(t.c, tern_graph_build(t.c, &e, &g));
    a.edges = g.in;
    a.cols = 2;
    a.x = x;
    a.y = y;
    x[3] = NAN;
    CHECK_OK(t.c, tern_aggregate(t.c, &a));
    CHECK(y[0] == 7 && y[2] == 1 && y[4] == 0 && y[5] == 0 && y[6] == 0, "the row of the NaN is zero, others are not touched");
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "aggregate: the sum of row 2 is not finite");
    x[3] = 4;
    x[7] = INFINITY;
    CHECK_OK(t.c, tern_aggregate(t.c, &a));
    CHECK(y[0] == 0 && y[1] == 0 && y[4] == 8, "infinity");
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "row 0");
    tern_graph_free(t.c, &g);
    test_close(&t);
}

/* -- hops -- */

enum { HOP_NODES = 13, HOP_RANK = 3 };
typedef struct hop_options {
    int64_t in, sent, out;       /* sent, out: 0 without message, update */
    tern_hop_order order;
    tern_graph_norm norm;
    tern_act act;
    tern_map_fn fn;
    int32_t residual, lora, bias;
    tern_rule rule;
    tern_act inside;             /* of message and update */
    tern_norm_kind rms;
} hop_options;
static const hop_options hops[] = {
    {9, 6, 9, TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_FLOAT, TERN_MAP_SILU, 1, 1, 1,
     TERN_ABSMEAN, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {9, 6, 5, TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_GELU, 0, 1, 1, TERN_ABSMEAN, TERN_ACT_FLOAT, TERN_NORM_RMS},
    {7, 7, 0, TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 1, 0, 0, TERN_DENSE, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {8, 5, 0, TERN_AGGREGATE_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_FLOAT, TERN_MAP_SILU, 0, 0, 1,
     TERN_DENSE, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {8, 0, 6, TERN_PROJECT_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_SILU, 0, 1, 0, TERN_ABSMEAN, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {6, 0, 0, TERN_AGGREGATE_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_FLOAT, TERN_MAP_SILU, 1, 0, 0,
     TERN_DENSE, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {21, 17, 21, TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 1, 1, 1,
     TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_RMS},
    {21, 17, 15, TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_INT8, TERN_MAP_RELU2, 0, 0, 1, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_RMS},
    {40, 16, 0, TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0, TERN_ABSMEAN, TERN_ACT_BIT, TERN_NORM_NONE},
};
enum { HOPS = sizeof hops / sizeof hops[0], HOPS_IN_FLOAT = 6 };

typedef struct hop_kit {
    tern_context *c;
    wild w;
    tern_param message, update, message_bias, update_bias, lora_a, lora_b, *all[6];
    tern_hop l;
    int count;
    int64_t in, sent, out;
} hop_kit;

static tern_param *hop_param(hop_kit *k, tern_param *p, const char *name, int64_t rows, int64_t cols, tern_rule rule, int32_t mask)
{
    *p = param_of(name, rows, cols, rule, rule == TERN_DENSE ? 0 : TERN_PER_ROW);
    CHECK_OK(k->c, tern_param_alloc(k->c, p, mask));
    set_random(k->c, p);
    return k->all[k->count++] = p;
}

static hop_kit *hop_open(tern_context *c, const hop_options *o, int32_t mask)
{
    hop_kit *k = (hop_kit *)memset(hold(sizeof *k), 0, sizeof *k);
    k->c = c;
    k->w = wild_graph(c, HOP_NODES, 40, 0);
    k->in = o->in;
    k->sent = o->sent ? o->sent : o->in;
    k->out = o->out ? o->out : k->sent;
    k->l.order = o->order; k->l.norm = o->norm; k->l.act = o->act; k->l.fn = o->fn; k->l.residual = o->residual; k->l.cols = o->in;
    if (o->sent) {
        k->l.message.w = hop_param(k, &k->message, "message", o->sent, o->in, o->rule, mask);
        k->l.message.act = o->inside;
        k->l.message.norm = o->rms;
    }
    if (o->out) {
        k->l.update.w = hop_param(k, &k->update, "update", o->out, k->sent, o->rule, mask);
        k->l.update.act = o->inside;
        k->l.update.norm = o->rms;
    }
    if (o->sent && o->bias) k->l.message.bias = hop_param(k, &k->message_bias, "message.bias", 1, o->sent, TERN_DENSE, TERN_FOR_ADAMW);
    if (o->out && o->bias) k->l.update.bias = hop_param(k, &k->update_bias, "update.bias", 1, o->out, TERN_DENSE, TERN_FOR_ADAMW);
    if (o->lora) {
        k->l.lora_a = hop_param(k, &k->lora_a, "a", HOP_RANK, k->in, TERN_DENSE, TERN_FOR_ADAMW);
        k->l.lora_b = hop_param(k, &k->lora_b, "b", k->out, HOP_RANK, TERN_DENSE, TERN_FOR_ADAMW);
        k->l.lora_scale = 0.7f;
    }
    return k;
}

static void hop_close(hop_kit *k)
{
    int i;
    CHECK(k->c->scratch_base == 0, "scratch was not given back");
    for (i = 0; i < k->count; i++) tern_param_free(k->c, k->all[i], -1);
    tern_graph_free(k->c, &k->w.g);
}

static void *hop_reserve(hop_kit *k)
{
    tern_need need = TERN_ZERO;
    CHECK_OK(k->c, tern_hop_need(k->c, &k->l, &k->w.g, &need));
    CHECK_OK(k->c, tern_reserve(k->c, need.scratch));
    return hold(need.saved + 1);
}

/* The sum by public calls. */
static void composed_sum(hop_kit *k, int64_t cols, const float *x, float *y)
{
    tern_aggregate_args a = TERN_ZERO;
    a.edges = k->w.g.in;
    a.cols = cols;
    a.left = k->l.norm == TERN_GRAPH_MEAN ? k->w.g.mean : k->l.norm == TERN_GRAPH_SYMMETRIC ? k->w.g.to : NULL;
    a.right = k->l.norm == TERN_GRAPH_SYMMETRIC ? k->w.g.from : NULL;
    a.x = x;
    a.y = y;
    if (k->l.act == TERN_ACT_INT8) {
        tern_matrix m = {1, 0, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, NULL, NULL};
        tern_quantize_args q;
        int64_t groups;
        m.cols = cols;
        q = hold_activations(k->c, TERN_ACT_INT8, &m, HOP_NODES, x, TERN_NORM_NONE, NULL);
        CHECK_OK(k->c, tern_activation_shape(k->c, &m, &a.q_row, &groups));
        a.q = q.q;
        a.scale = q.scale;
    }
    CHECK_OK(k->c, tern_aggregate(k->c, &a));
}

static void composed_linear(hop_kit *k, const tern_linear *l, const float *x, float *y)
{
    if (l->w) CHECK_OK(k->c, tern_linear_forward(k->c, l, HOP_NODES, x, y, NULL));
}

static void hop_forward(tern_context *c, record *r)
{
    int i;
    int64_t j;
    for (i = 0; i < HOPS; i++) {
        hop_kit *k = hop_open(c, &hops[i], TERN_FOR_ADAMW);
        const float *h = hold_floats(HOP_NODES * k->in), *m = h, *z;
        float *p = hold_output(HOP_NODES * k->sent), *g = hold_output(HOP_NODES * k->in), *s = hold_output(HOP_NODES * k->sent),
              *u = hold_output(HOP_NODES * k->out), *y = hold_output(HOP_NODES * k->out);
        float *low = hold_output(HOP_NODES * HOP_RANK), *up = hold_output(HOP_NODES * k->out), *want = hold_output(HOP_NODES * k->out);
        void *saved = hop_reserve(k);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL));
        record_words(r, y, HOP_NODES * k->out);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, want, saved));
        CHECK(memcmp(y, want, (size_t)(HOP_NODES * k->out) * 4) == 0, "hop %d differs with saved", i);
        if (hops[i].order == TERN_PROJECT_FIRST) {
            composed_linear(k, &k->l.message, h, p);
            composed_sum(k, k->sent, hops[i].sent ? p : h, s);
            m = s;
        } else {
            composed_sum(k, k->in, h, g);
            composed_linear(k, &k->l.message, g, s);
            m = hops[i].sent ? s : g;
        }
        composed_linear(k, &k->l.update, m, u);
        z = hops[i].out ? u : m;
        memcpy(want, z, (size_t)(HOP_NODES * k->out) * 4);
        if (hops[i].fn) {
            tern_map_args a = TERN_ZERO;
            a.fn = hops[i].fn;
            a.count = HOP_NODES * k->out;
            a.a = z;
            a.y = want;
            CHECK_OK(c, tern_map(c, &a));
        }
        if (hops[i].lora) {
            tern_linear a = TERN_ZERO, b = TERN_ZERO;
            a.w = k->l.lora_a;
            b.w = k->l.lora_b;
            composed_linear(k, &a, h, low);
            composed_linear(k, &b, low, up);
            for (j = 0; j < HOP_NODES * k->out; j++) want[j] = want[j] + 0.7f * up[j];
        }
        if (hops[i].residual) for (j = 0; j < HOP_NODES * k->out; j++) want[j] = want[j] + h[j];
        CHECK(memcmp(y, want, (size_t)(HOP_NODES * k->out) * 4) == 0, "hop %d differs from its parts", i);
        hop_close(k);
        release();
    }
}
static void test_hop_forward(void) { same_everywhere(hop_forward, UINT64_C(0xAAB1D3F0E0024EA7)); }

/* Blocks with several hubs, one and none: nodes 0, 3 to 5 and the last. */
static void hub_edges(hop_kit *k)
{
    enum { EDGES = 3000 };
    int32_t *from = hold_ids(EDGES, HOP_NODES), *to = hold_ids(EDGES, HOP_NODES);
    int64_t i;
    for (i = 200; i < EDGES; i++) to[i] = i < 500 ? 0 : i >= 2300 ? HOP_NODES - 1 : i % 7 < 4 ? 3 : i % 7 < 6 ? 4 : 5;
    tern_graph_free(k->c, &k->w.g);
    k->w.e = edges_of(HOP_NODES, EDGES, from, to, NULL);
    CHECK_OK(k->c, tern_graph_build(k->c, &k->w.e, &k->w.g));
    CHECK(k->w.g.in.hubs == 5 && k->w.g.in.parts == 2 + 5 + 3 + 2 + 3, "%d hubs of %d parts", (int)k->w.g.in.hubs, (int)k->w.g.in.parts);
}

/* What goes through in blocks, because nothing is kept, has the bits of what goes through as one; rows in faults are the graph's. */
static void hop_blocks(tern_context *c, record *r)
{
    int i;
    for (i = 0; i < HOPS; i++) {
        hop_kit *k = hop_open(c, &hops[i], TERN_FOR_ADAMW);
        float *h = hold_floats(HOP_NODES * k->in), *y = hold_output(HOP_NODES * k->out), *want = hold_output(HOP_NODES * k->out);
        tern__hop_work w;
        tern__hop_pass p;
        void *saved;
        hub_edges(k);
        saved = hop_reserve(k);
        tern__hop_blocks(c, &k->l, &k->w.g, 1, &w);
        CHECK(w.block == HOP_NODES && w.workers == 1, "hop %d, kept: blocks of %d", i, (int)w.block);
        tern__hop_blocks(c, &k->l, &k->w.g, 0, &w);
        CHECK(c->run.parallel.workers > 3 || (w.block < HOP_NODES && w.workers == c->run.parallel.workers),
              "hop %d: blocks of %d for %d workers", i, (int)w.block, (int)w.workers);
        p.l = &k->l; p.g = &k->w.g; p.h = h; p.y = y; p.w = &w; p.receives = 1;
        CHECK(w.workers != 2 || w.block != 3 || (tern__hop_shares(&p, 1) && !tern__hop_shares(&p, 0)),
              "hop %d: who takes a block with a hub", i);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, want, saved));
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL));
        CHECK(memcmp(y, want, (size_t)(HOP_NODES * k->out) * 4) == 0, "hop %d differs in blocks", i);
        record_words(r, y, HOP_NODES * k->out);
        CHECK_OK(c, tern_sync(c));
        if (hops[i].sent && hops[i].order == TERN_PROJECT_FIRST && hops[i].inside == TERN_ACT_INT8) {
            h[11 * k->in + 2] = NAN;
            CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL));
            CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "11");
        }
        if (!hops[i].sent && hops[i].act == TERN_ACT_FLOAT) {
            const float was = h[0];
            int32_t *to = (int32_t *)(uintptr_t)k->w.e.to, *from = (int32_t *)(uintptr_t)k->w.e.from;
            int64_t j;
            for (j = 0; j < k->w.e.count; j++) { if (from[j] == 0) from[j] = 1; if (to[j] == 7) to[j] = 8; }
            from[0] = 0;
            to[0] = 7;
            h[0] = NAN;
            tern_graph_free(c, &k->w.g);
            CHECK_OK(c, tern_graph_build(c, &k->w.e, &k->w.g));
            k->l.residual = 0;
            k->l.lora_a = k->l.lora_b = NULL;
            CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL));
            CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "aggregate: the sum of row 7 is not finite");
            h[0] = was;
        }
        CHECK(c->run.row == 0, "faults would be counted from %d", (int)c->run.row);
        hop_close(k);
        release();
    }
}
static void test_hop_blocks(void) { same_everywhere(hop_blocks, UINT64_C(0x07FD6D25F98B44DE)); }

#ifndef TERNARY_NO_THREADS
/* Tasks one after the other, the last first: it takes all blocks that it does not fail at. */
static void last_first(void *user, tern_task task, void *arg, int32_t count)
{
    (void)user;
    while (count-- > 0) task(arg, count);
}

static tern_context *open_last_first(const tern_backend *backend, int32_t workers)
{
    tern_context *c = NULL;
    tern_context_desc d = TERN_ZERO;
    d.backend = backend;
    d.parallel.run = last_first;
    d.parallel.workers = workers;
    CHECK_OK(NULL, tern_open(&c, &d, NULL));
    return c;
}

/* The last worker's scratch ends where all scratch does, and what it writes is not the first's. */
static void test_hop_scratch(void)
{
    int i;
    for (i = 0; i < HOPS; i++) {
        tern_context *c = open_last_first(NULL, 3);
        hop_kit *k = hop_open(c, &hops[i], TERN_FOR_ADAMW);
        const float *h = hold_floats(HOP_NODES * k->in);
        float *y = hold_output(HOP_NODES * k->out), *want = hold_output(HOP_NODES * k->out);
        void *saved = hop_reserve(k);
        unsigned char *const reserved = c->scratch;
        const size_t bytes = c->scratch_bytes, most = (size_t)tern__hop_scratch(c, &k->l, &k->w.g, 0, 0);
        unsigned char *poison = (unsigned char *)memset(hold(most + 1), 0x5A, most),
                      *guarded = (unsigned char *)test_guard(poison, most, 1);
        tern__hop_work w;
        tern__hop_memory(c, &k->l, &k->w.g, 0, 0, NULL, guarded, &w);
        CHECK(w.workers == 3 && most <= bytes, "hop %d: %d workers, %d bytes of %d", i, (int)w.workers, (int)most, (int)bytes);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, want, saved));
        c->scratch = guarded;
        c->scratch_bytes = most - 1;
        CHECK_FAILS(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL), TERN_E_SCRATCH, "hop: 13 tokens need");
        c->scratch_bytes = most;
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, NULL));
        CHECK(memcmp(y, want, (size_t)(HOP_NODES * k->out) * 4) == 0, "hop %d differs", i);
        CHECK(memcmp(w.own, poison, (size_t)(2 * w.own_bytes)) == 0
              && memcmp(guarded + w.scratch_bytes, poison, (size_t)(2 * w.nested)) == 0,
              "hop %d: the last worker wrote what is another's", i);
        c->scratch = reserved;
        c->scratch_bytes = bytes;
        test_unguard(guarded, most);
        hop_close(k);
        tern_close(c);
        release();
    }
}

/* Of three blocks that fail the last worker takes the first. */
static tern_result fails_behind_four(tern_context *c, const void *arg, int64_t block, int64_t worker)
{
    ((int64_t *)(uintptr_t)arg)[block] = worker;
    if (block < 5) return TERN_OK;
    tern__set_fault(&c->run, TERN__FAULT_NORM, block);
    TERN__FAIL(&c->run, TERN_E_DATA, "block %d", block);
}

static tern_result fails_silently(tern_context *c, const void *arg, int64_t block, int64_t worker)
{
    (void)c;
    (void)arg;
    (void)worker;
    return block == 3 ? TERN_E_DEVICE : TERN_OK;
}

static void test_turns(void)
{
    static const int64_t want[9] = {-1, -1, 2, 2, 2, 2, 1, 0, -1};
    tern_backend lacking = *tern_cpu_backend(TERN_ISA_BEST);
    tern_context *c = open_last_first(NULL, 3);
    int64_t who[9];
    hop_kit *k;
    memset(who, -1, sizeof who);
    CHECK(tern__take_turns(c, fails_behind_four, who, 2, 9, 0, TERN__TASK_COST) == TERN_E_DATA
          && strcmp(tern_last_error(c)->text, "block 5") == 0, "text is \"%s\"", tern_last_error(c)->text);
    CHECK(memcmp(who, want, sizeof who) == 0, "blocks went to others");
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "norm: row 5 is not finite");
    tern__set_fault(&c->run, TERN__FAULT_NORM, 99);
    CHECK(tern__take_turns(c, fails_behind_four, who, 5, 9, 0, TERN__TASK_COST) == TERN_E_DATA, "no error");
    CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "norm: row 99 is not finite");
    CHECK(tern__take_turns(c, fails_behind_four, who, 0, 5, 0, TERN__TASK_COST) == TERN_OK, "an error");
    CHECK_OK(c, tern_sync(c));
    CHECK(tern__take_turns(c, fails_silently, NULL, 0, 5, 0, TERN__TASK_COST) == TERN_E_DEVICE, "an error without a text");
    tern_close(c);
    lacking.map = NULL;
    c = open_last_first(&lacking, 2);
    k = hop_open(c, &hops[5], TERN_FOR_ADAMW);
    hop_reserve(k);
    CHECK_FAILS(c, tern_hop_forward(c, &k->l, &k->w.g, hold_floats(HOP_NODES * k->in), hold_output(HOP_NODES * k->out), NULL),
                TERN_E_UNSUPPORTED, "has no operation map");
    CHECK(c->run.row == 0, "faults would be counted from %d", (int)c->run.row);
    hop_close(k);
    tern_close(c);
    release();
}
#endif

#ifndef TERNARY_NO_TRAINING

/* The hop in doubles, with the matrices that its layers stand for. */
typedef struct exact { double *w[6], *h; const double *dy; } exact; /* w: message, update, their biases, A, B */

static double exact_fn(tern_map_fn fn, double x)
{
    if (fn == TERN_MAP_SILU) return x / (1 + exp(-x));
    if (fn == TERN_MAP_GELU) return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    return x;
}

static void exact_linear(const double *w, const double *bias, int64_t rows, int64_t cols, int rms, const double *x, double *y)
{
    int64_t v, i, j;
    for (v = 0; v < HOP_NODES; v++) {
        double r = 0;
        for (j = 0; j < cols; j++) r += x[v * cols + j] * x[v * cols + j];
        r = rms ? 1 / sqrt(r / (double)cols + 1e-6) : 1;
        for (i = 0; i < rows; i++) {
            double sum = bias ? bias[i] : 0;
            for (j = 0; j < cols; j++) sum += w[i * cols + j] * x[v * cols + j] * r;
            y[v * rows + i] = sum;
        }
    }
}

static void exact_sum(const hop_kit *k, int64_t cols, const double *x, double *y)
{
    double in[HOP_NODES] = {0}, out[HOP_NODES] = {0};
    const tern_edges *e = &k->w.e;
    int64_t i, j;
    for (i = 0; i < e->count; i++) if (e->sign[i]) { in[e->to[i]]++; out[e->from[i]]++; }
    for (i = 0; i < HOP_NODES * cols; i++) y[i] = 0;
    for (i = 0; i < e->count; i++) {
        double f = e->sign[i];
        if (e->sign[i] && k->l.norm == TERN_GRAPH_MEAN) f /= in[e->to[i]];
        if (e->sign[i] && k->l.norm == TERN_GRAPH_SYMMETRIC) f /= sqrt(in[e->to[i]] * out[e->from[i]]);
        for (j = 0; j < cols; j++) y[e->to[i] * cols + j] += f * x[e->from[i] * cols + j];
    }
}

/* The sum of dy y. */
static double exact_loss(const hop_kit *k, const hop_options *o, const exact *x)
{
    double p[HOP_NODES * 50], m[HOP_NODES * 50], z[HOP_NODES * 50], low[HOP_NODES * HOP_RANK], loss = 0;
    const int rms = o->rms == TERN_NORM_RMS;
    int64_t i;
    if (!o->sent) exact_sum(k, k->in, x->h, m);
    else if (o->order == TERN_PROJECT_FIRST) {
        exact_linear(x->w[0], x->w[2], k->sent, k->in, rms, x->h, p);
        exact_sum(k, k->sent, p, m);
    } else {
        exact_sum(k, k->in, x->h, p);
        exact_linear(x->w[0], x->w[2], k->sent, k->in, rms, p, m);
    }
    if (o->out) exact_linear(x->w[1], x->w[3], k->out, k->sent, rms, m, z);
    else memcpy(z, m, sizeof z);
    for (i = 0; i < HOP_NODES * k->out; i++) loss += x->dy[i] * (exact_fn(o->fn, z[i]) + (o->residual ? x->h[i] : 0));
    if (!o->lora) return loss;
    exact_linear(x->w[4], NULL, HOP_RANK, k->in, 0, x->h, low);
    exact_linear(x->w[5], NULL, k->out, HOP_RANK, 0, low, z);
    for (i = 0; i < HOP_NODES * k->out; i++) loss += x->dy[i] * 0.7f * z[i];
    return loss;
}

static double *doubles_of(const float *x, int64_t n)
{
    double *d = (double *)hold((size_t)n * sizeof(double));
    int64_t i;
    for (i = 0; i < n; i++) d[i] = x[i];
    return d;
}

static void check_slope(const hop_kit *k, int index, exact *x, double *at, float got, const char *what, int64_t i)
{
    const double was = *at, step = 1e-5;
    double slope;
    *at = was + step;
    slope = exact_loss(k, &hops[index], x);
    *at = was - step;
    slope = (slope - exact_loss(k, &hops[index], x)) / (2 * step);
    *at = was;
    CHECK(fabs(slope - got) < 2e-5 * (1 + fabs(slope)), "hop %d: d %s[%d] is %g, not %g", index, what, (int)i, got, slope);
}

static void hop_gradients(tern_context *c, record *r)
{
    int i, p;
    (void)r;
    for (i = 0; i < HOPS_IN_FLOAT; i++) {
        hop_kit *k = hop_open(c, &hops[i], TERN_FOR_ADAMW);
        tern_param *const params[6] = {k->l.message.w, k->l.update.w, k->l.message.bias, k->l.update.bias, k->l.lora_a, k->l.lora_b};
        const tern_linear layers[6] = {k->l.message, k->l.update};
        float *h = hold_floats(HOP_NODES * k->in), *dy = hold_floats(HOP_NODES * k->out), *y = hold_output(HOP_NODES * k->out),
              *dh = hold_output(HOP_NODES * k->in), *again = hold_output(HOP_NODES * k->in);
        void *saved = hop_reserve(k);
        exact x;
        int64_t j;
        x.h = doubles_of(h, HOP_NODES * k->in);
        x.dy = doubles_of(dy, HOP_NODES * k->out);
        for (p = 0; p < 6; p++) {
            float *w = params[p] ? hold_output(params[p]->rows * params[p]->cols) : NULL;
            x.w[p] = NULL;
            if (!w) continue;
            if (p < 2) CHECK_OK(c, tern_linear_rebuild(c, &layers[p], w));
            else memcpy(w, params[p]->buffer[TERN_SHADOW].data, (size_t)(params[p]->rows * params[p]->cols) * 4);
            x.w[p] = doubles_of(w, params[p]->rows * params[p]->cols);
        }
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, saved));
        {
            double loss = 0;
            for (j = 0; j < HOP_NODES * k->out; j++) loss += (double)dy[j] * y[j];
            CHECK(fabs(loss - exact_loss(k, &hops[i], &x)) < 2e-5 * (1 + fabs(loss)),
                  "hop %d: the loss is %g, not %g", i, loss, exact_loss(k, &hops[i], &x));
        }
        CHECK_OK(c, tern_hop_backward(c, &k->l, &k->w.g, h, saved, dy, dh));
        for (j = 0; j < HOP_NODES * k->in; j++) check_slope(k, i, &x, &x.h[j], dh[j], "h", j);
        for (p = 0; p < 6; p++)
            for (j = 0; params[p] && j < params[p]->rows * params[p]->cols; j++)
                check_slope(k, i, &x, &x.w[p][j], ((float *)params[p]->buffer[TERN_GRAD].data)[j], params[p]->name, j);
        CHECK_OK(c, tern_hop_backward(c, &k->l, &k->w.g, h, saved, dy, NULL)); /* added once more, as by a second hop that shares them */
        for (p = 0; p < 6; p++)
            for (j = 0; params[p] && j < params[p]->rows * params[p]->cols; j++)
                check_slope(k, i, &x, &x.w[p][j], 0.5f * ((float *)params[p]->buffer[TERN_GRAD].data)[j], "sum of two", j);
        if (!k->l.fn) { /* rounding to int8 passes the gradient through */
            k->l.act = TERN_ACT_INT8;
            saved = hop_reserve(k);
            CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, saved));
            CHECK_OK(c, tern_hop_backward(c, &k->l, &k->w.g, h, saved, dy, again));
            CHECK(memcmp(dh, again, (size_t)(HOP_NODES * k->in) * 4) == 0, "hop %d: int8 rows change dh", i);
        }
        hop_close(k);
        release();
    }
}
static void test_hop_gradients(void) { on_each_tier(hop_gradients); }

static void hop_backward(tern_context *c, record *r)
{
    int i, p;
    for (i = 0; i < HOPS; i++) {
        hop_kit *k = hop_open(c, &hops[i], TERN_FOR_ADAMW);
        float *h = hold_floats(HOP_NODES * k->in), *dy = hold_floats(HOP_NODES * k->out), *y = hold_output(HOP_NODES * k->out),
              *dh = hold_output(HOP_NODES * k->in);
        void *saved = hop_reserve(k);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, saved));
        CHECK_OK(c, tern_hop_backward(c, &k->l, &k->w.g, h, saved, dy, dh));
        record_words(r, dh, HOP_NODES * k->in);
        for (p = 0; p < k->count; p++) record_words(r, k->all[p]->buffer[TERN_GRAD].data, k->all[p]->rows * k->all[p]->cols);
        hop_close(k);
        release();
    }
}
static void test_hop_backward(void) { same_for_threads(hop_backward); }

/* With accumulators instead of shadows, gradients have the same bits on every tier. */
static void hop_in_integers(tern_context *c, record *r)
{
    static const int which[] = {6, 7};
    int i, p;
    for (i = 0; i < 2; i++) {
        hop_options o = hops[which[i]];
        hop_kit *k;
        float *h, *dy, *y, *dh;
        void *saved;
        o.lora = 0;
        o.bias = 0;
        k = hop_open(c, &o, TERN_FOR_FLIPS);
        k->l.message.seed = 5;
        k->l.update.seed = 6;
        h = hold_floats(HOP_NODES * k->in); dy = hold_floats(HOP_NODES * k->out); y = hold_output(HOP_NODES * k->out);
        dh = hold_output(HOP_NODES * k->in);
        saved = hop_reserve(k);
        CHECK_OK(c, tern_hop_forward(c, &k->l, &k->w.g, h, y, saved));
        CHECK_OK(c, tern_hop_backward(c, &k->l, &k->w.g, h, saved, dy, dh));
        record_words(r, dh, HOP_NODES * k->in);
        for (p = 0; p < k->count; p++) record_words(r, k->all[p]->buffer[TERN_GRAD].data, k->all[p]->rows * k->all[p]->cols);
        hop_close(k);
        release();
    }
}
static void test_hop_in_integers(void) { same_everywhere(hop_in_integers, UINT64_C(0xBE5E2184FD47F49D)); }
#endif

static void test_hop_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    hop_kit *k = hop_open(t.c, &hops[0], TERN_FOR_ADAMW);
    tern_need need = TERN_ZERO;
    tern_graph none = TERN_ZERO;
    tern_hop l = k->l;
    float *x = hold_floats(HOP_NODES * 9), *y = hold_output(HOP_NODES * 9);
#define UNFIT(change, code, part) l = k->l; change; CHECK_FAILS(t.c, tern_hop_need(t.c, &l, &k->w.g, &need), code, part)
    UNFIT(l.norm = (tern_graph_norm)3, TERN_E_ARGUMENT, "norm 3");
    UNFIT(l.order = (tern_hop_order)2, TERN_E_ARGUMENT, "order 2");
    UNFIT(l.act = TERN_ACT_BIT, TERN_E_ARGUMENT, "act 3");
    UNFIT(l.fn = TERN_MAP_MUL, TERN_E_ARGUMENT, "fn 1");
    UNFIT(l.lora_a = NULL, TERN_E_ARGUMENT, "come together");
    UNFIT(l.lora_scale = NAN, TERN_E_ARGUMENT, "lora_scale is finite");
    UNFIT(l.update.w = k->l.message.w; l.update.bias = NULL, TERN_E_SHAPE, "the update has 9 columns for messages of 6");
    UNFIT(l.lora_b = k->l.message.w, TERN_E_SHAPE, "lora_a is 3 x 9 and lora_b 6 x 9 from 9 columns to 9");
    UNFIT(l.update.w = NULL, TERN_E_SHAPE, "a residual of 9 columns beside an output of 6");
    UNFIT(l.message.w = l.update.w = NULL; l.lora_a = l.lora_b = NULL; l.cols = 0, TERN_E_SHAPE, "hop: ");
    UNFIT(l.message.eps = -1, TERN_E_ARGUMENT, "message: ");
#undef UNFIT
    CHECK_FAILS(t.c, tern_hop_need(t.c, &k->l, &none, &need), TERN_E_ARGUMENT, "was not built");
    CHECK_FAILS(t.c, tern_hop_forward(t.c, &k->l, &k->w.g, NULL, y, NULL), TERN_E_ARGUMENT, "h is NULL");
    CHECK_FAILS(t.c, tern_hop_forward(t.c, &k->l, &k->w.g, x, NULL, NULL), TERN_E_ARGUMENT, "y is NULL");
#ifndef TERNARY_NO_TRAINING
    CHECK_FAILS(t.c, tern_hop_backward(t.c, &k->l, &k->w.g, x, NULL, x, y), TERN_E_ARGUMENT, "saved is NULL");
    CHECK_FAILS(t.c, tern_hop_backward(t.c, &k->l, &k->w.g, x, x, NULL, y), TERN_E_ARGUMENT, "dy is NULL");
#endif
    {
        tern_context_desc d = TERN_ZERO;
        tern_context *small = NULL;
        CHECK_OK(small, tern_open(&small, &d, NULL));
        CHECK_FAILS(small, tern_hop_forward(small, &k->l, &k->w.g, x, y, NULL), TERN_E_SCRATCH, "hop: 13 tokens need");
        tern_close(small);
    }
    hop_close(k);
    release();
    test_close(&t);
}

/* -- several hops -- */

/* Hops whose widths follow one another; the fourth one has LoRA. */
static const hop_options chain[] = {
    {9, 6, 21, TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 1, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_RMS},
    {21, 17, 21, TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_FLOAT, TERN_MAP_SILU, 1, 0, 0,
     TERN_ABSMEAN, TERN_ACT_INT4, TERN_NORM_NONE},
    {21, 9, 0, TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_ADD, 0, 0, 1, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_NONE},
    {9, 7, 9, TERN_AGGREGATE_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_GELU, 1, 1, 0,
     TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_NONE},
    {9, 0, 0, TERN_PROJECT_FIRST, TERN_GRAPH_MEAN, TERN_ACT_INT8, TERN_MAP_RELU2, 1, 0, 0, TERN_DENSE, TERN_ACT_FLOAT, TERN_NORM_NONE},
    {9, 0, 13, TERN_AGGREGATE_FIRST, TERN_GRAPH_SUM, TERN_ACT_INT8, TERN_MAP_SILU, 0, 0, 1, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_RMS},
    {13, 9, 0, TERN_PROJECT_FIRST, TERN_GRAPH_SYMMETRIC, TERN_ACT_INT8, TERN_MAP_RELU, 0, 0, 0,
     TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_NONE},
    {9, 9, 0, TERN_AGGREGATE_FIRST, TERN_GRAPH_MEAN, TERN_ACT_INT8, TERN_MAP_SILU, 1, 0, 0, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_NONE},
    {9, 5, 9, TERN_PROJECT_FIRST, TERN_GRAPH_SUM, TERN_ACT_FLOAT, TERN_MAP_RELU, 1, 0, 0, TERN_ABSMEAN, TERN_ACT_INT8, TERN_NORM_NONE},
};
enum { CHAIN = sizeof chain / sizeof chain[0] };
typedef struct chain_kit { hop_kit *k[CHAIN]; tern_hop l[CHAIN]; const tern_graph *g; } chain_kit;

static chain_kit chain_open(tern_context *c)
{
    chain_kit x;
    int i;
    for (i = 0; i < CHAIN; i++) {
        x.k[i] = hop_open(c, &chain[i], TERN_FOR_ADAMW);
        x.l[i] = x.k[i]->l;
    }
    hub_edges(x.k[0]);
    x.g = &x.k[0]->w.g;
    return x;
}

static void chain_close(chain_kit *x)
{
    int i;
    for (i = 0; i < CHAIN; i++) hop_close(x->k[i]);
}

/* As many calls, each with memory of its own. */
static const float *chain_apart(tern_context *c, const chain_kit *x, int count, const float *h)
{
    int i;
    for (i = 0; i < count; i++) {
        float *y = hold_output(HOP_NODES * x->k[i]->out);
        tern_need need = TERN_ZERO;
        CHECK_OK(c, tern_hop_need(c, &x->l[i], x->g, &need));
        CHECK_OK(c, tern_reserve(c, need.scratch));
        CHECK_OK(c, tern_hop_forward(c, &x->l[i], x->g, h, y, NULL));
        h = y;
    }
    return h;
}

static size_t chain_scratch(tern_context *c, const chain_kit *x, int count)
{
    tern_need need = {1, 0};
    CHECK_OK(c, tern_hops_need(c, x->l, count, x->g, &need));
    CHECK(need.saved == 0, "hops keep %d bytes", (int)need.saved);
    CHECK_OK(c, tern_reserve(c, need.scratch));
    return need.scratch;
}

/* In scratch that ends where they say, and in place. */
static void hops_forward(tern_context *c, record *r)
{
    int count;
    for (count = 1; count <= CHAIN; count++) {
        chain_kit x = chain_open(c);
        const size_t bytes = (size_t)(HOP_NODES * x.k[count - 1]->out) * 4, need = chain_scratch(c, &x, count);
        float *h = hold_floats(HOP_NODES * x.k[0]->in), *y = hold_output(HOP_NODES * x.k[count - 1]->out);
        const float *want = chain_apart(c, &x, count, h);
        unsigned char *const scratch = c->scratch,
                      *const guarded = (unsigned char *)test_guard(memset(hold(need + 1), 0x5A, need), need, 1);
        const size_t reserved = c->scratch_bytes;
        c->scratch = guarded;
        c->scratch_bytes = need - 1;
        CHECK_FAILS(c, tern_hops_forward(c, x.l, count, x.g, h, y), TERN_E_SCRATCH, "hops: 13 tokens need");
        c->scratch_bytes = need;
        CHECK_OK(c, tern_hops_forward(c, x.l, count, x.g, h, y));
        CHECK(memcmp(y, want, bytes) == 0, "%d hops differ", count);
        record_words(r, y, HOP_NODES * x.k[count - 1]->out);
        if (count > 1 && x.k[count - 1]->out == x.k[0]->in) {
            CHECK_OK(c, tern_hops_forward(c, x.l, count, x.g, h, h));
            CHECK(memcmp(h, want, bytes) == 0, "%d hops differ in place", count);
        }
        CHECK_OK(c, tern_sync(c));
        c->scratch = scratch;
        c->scratch_bytes = reserved;
        test_unguard(guarded, need);
        chain_close(&x);
        release();
    }
}
static void test_hops_forward(void) { same_everywhere(hops_forward, UINT64_C(0x4B8EFC0D955747D6)); }

static void test_hops_faults(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    chain_kit x = chain_open(t.c);
    float *h = hold_floats(HOP_NODES * 9), *y = hold_output(HOP_NODES * 9);
    char want[256];
    chain_scratch(t.c, &x, CHAIN);
    h[4 * 9 + 5] = NAN;
    chain_apart(t.c, &x, CHAIN, h);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "quantize: activation row 4 ");
    strcpy(want, tern_last_error(t.c)->text);
    CHECK_OK(t.c, tern_hops_forward(t.c, x.l, CHAIN, x.g, h, y));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, want);
    chain_close(&x);
    release();
    test_close(&t);
}

/* A backend that is asked for several at once. */
static struct { int offered[CHAIN], calls; tern_result answer; const unsigned char *end; } offers;

static tern_result note_hops(tern_run *r, const tern_hops_args *a)
{
    int i;
    offers.offered[offers.calls++] = a->count;
    for (i = 0; i < a->count; i++) {
        const tern_whole_hop *hop = &a->hop[i];
        if (i)
            CHECK(hop->project.quantize.m.trits ? hop->project.quantize.x == hop[-1].to.y
                  : hop->rows.q ? hop->rows.x == hop[-1].to.y : hop->to.sum.x == hop[-1].to.y, "hop %d reads", i);
        if (i && hop->rows.q && hop[-1].rows.q) CHECK(hop->rows.q != hop[-1].rows.q, "hop %d sends where the one before it has", i);
        CHECK(!hop->rows.q || (const unsigned char *)(hop->rows.sum + HOP_NODES) <= offers.end, "hop %d sends beyond scratch", i);
        if (i && hop->project.y && hop[-1].project.y)
            CHECK(hop->project.y != hop[-1].project.y, "hop %d projects where the one before it has", i);
        CHECK(!hop->project.y || (const unsigned char *)(hop->project.y + HOP_NODES * hop->project.quantize.m.rows) <= offers.end,
              "hop %d projects beyond scratch", i);
    }
    if (offers.answer != TERN_OK) tern__set_error(&r->error, offers.answer, "hops: no");
    return offers.answer;
}

static void test_hops_in_one(void)
{
    tern_backend table = *tern_cpu_backend(TERN_ISA_BEST);
    tern_context_desc d = TERN_ZERO;
    tern_context *c = NULL;
    tern_need need = TERN_ZERO;
    chain_kit x;
    float *h, *y;
    table.hops = note_hops;
    memset(&offers, 0, sizeof offers);
    d.backend = &table;
    CHECK_OK(NULL, tern_open(&c, &d, NULL));
    x = chain_open(c);
    h = hold_floats(HOP_NODES * 9);
    y = hold_output(HOP_NODES * 9);
    offers.answer = TERN_E_UNSUPPORTED;
    CHECK_OK(c, tern_hops_need(c, &x.l[4], 1, x.g, &need)); /* of what is sent most is there twice */
    CHECK_OK(c, tern_reserve(c, need.scratch));
    offers.end = c->scratch + need.scratch;
    CHECK_OK(c, tern_hops_forward(c, &x.l[4], 1, x.g, h, y));
    CHECK(offers.calls == 1, "%d offers", offers.calls);
    CHECK_OK(c, tern_hops_need(c, &x.l[4], 2, x.g, &need));
    CHECK_OK(c, tern_reserve(c, need.scratch));
    offers.end = c->scratch + need.scratch;
    CHECK_OK(c, tern_hops_forward(c, &x.l[4], 2, x.g, h, hold_output(HOP_NODES * 13)));
    memset(&offers, 0, sizeof offers);
    offers.answer = TERN_E_UNSUPPORTED;
    chain_scratch(c, &x, CHAIN);
    offers.end = c->scratch + c->scratch_bytes;
    CHECK_OK(c, tern_hops_forward(c, x.l, CHAIN, x.g, h, y));
    CHECK(memcmp(y, chain_apart(c, &x, CHAIN, h), HOP_NODES * 9 * 4) == 0, "hops that were declined differ");
    CHECK(offers.calls == 3 && offers.offered[0] == 3 && offers.offered[1] == TERN_HOPS_AT_ONCE && offers.offered[2] == 1,
          "%d offers of %d, %d, %d", offers.calls, offers.offered[0], offers.offered[1], offers.offered[2]);
    CHECK(tern_last_error(c)->code == TERN_OK, "an offer that was declined left \"%s\"", tern_last_error(c)->text);
    offers.answer = TERN_E_DEVICE;
    offers.end = c->scratch + c->scratch_bytes;
    CHECK_FAILS(c, tern_hops_forward(c, x.l, CHAIN, x.g, h, y), TERN_E_DEVICE, "hops: no");
    chain_close(&x);
    tern_close(c);
    release();
}

static void test_hops_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    chain_kit x = chain_open(t.c);
    float *h = hold_floats(HOP_NODES * 9), *y = hold_output(HOP_NODES * 9), *before = hold_output(HOP_NODES * 9);
    tern_need need = TERN_ZERO;
    tern_graph none = TERN_ZERO;
    memcpy(before, y, HOP_NODES * 9 * 4);
    chain_scratch(t.c, &x, CHAIN);
    CHECK_FAILS(t.c, tern_hops_need(t.c, NULL, 1, x.g, &need), TERN_E_ARGUMENT, "hops or out is NULL");
    CHECK_FAILS(t.c, tern_hops_need(t.c, x.l, 1, x.g, NULL), TERN_E_ARGUMENT, "hops or out is NULL");
    CHECK_FAILS(t.c, tern_hops_need(t.c, x.l, 1, &none, &need), TERN_E_ARGUMENT, "was not built");
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 0, x.g, h, y), TERN_E_ARGUMENT, "there are 0");
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, -3, x.g, h, y), TERN_E_ARGUMENT, "there are -3");
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 2, NULL, h, y), TERN_E_ARGUMENT, "graph is NULL");
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 2, x.g, NULL, y), TERN_E_ARGUMENT, "h is NULL");
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 2, x.g, h, NULL), TERN_E_ARGUMENT, "y is NULL");
    CHECK(tern_hops_need(NULL, x.l, 1, x.g, &need) == TERN_E_ARGUMENT && tern_hops_forward(NULL, x.l, 1, x.g, h, y) == TERN_E_ARGUMENT,
          "no context");
    x.l[2] = x.l[6];
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 3, x.g, h, y), TERN_E_SHAPE, "hops: hop 2 reads 13 columns, and hop 1 makes 21");
    x.l[2].act = TERN_ACT_BIT;
    CHECK_FAILS(t.c, tern_hops_forward(t.c, x.l, 3, x.g, h, y), TERN_E_ARGUMENT, "act 3");
    CHECK(memcmp(before, y, HOP_NODES * 9 * 4) == 0, "a refusal wrote");
    chain_close(&x);
    release();
    test_close(&t);
}

/* -- memory of n-grams -- */

enum { GRAM_ROWS = 50, GRAM_COLS = 9, GRAM_WIDTH = 7, GRAM_TOKENS = 11 };
typedef struct gram_kit { tern_param table, key, value; tern_ngram l; } gram_kit;

static gram_kit *gram_open(tern_context *c, tern_rule rule, tern_act act)
{
    gram_kit *k = (gram_kit *)memset(hold(sizeof *k), 0, sizeof *k);
    tern_param *const all[] = {&k->table, &k->key, &k->value};
    int i;
    k->table = param_of("table", GRAM_ROWS, GRAM_COLS, rule, rule == TERN_DENSE ? 0 : TERN_PER_ROW);
    k->key = param_of("key", GRAM_WIDTH, GRAM_COLS, rule, rule == TERN_DENSE ? 0 : TERN_PER_ROW);
    k->value = param_of("value", GRAM_WIDTH, GRAM_COLS, rule, rule == TERN_DENSE ? 0 : TERN_PER_ROW);
    for (i = 0; i < 3; i++) {
        CHECK_OK(c, tern_param_alloc(c, all[i], TERN_FOR_ADAMW));
        set_random(c, all[i]);
    }
    k->l.table = &k->table;
    k->l.key.w = &k->key;
    k->l.value.w = &k->value;
    k->l.key.act = k->l.value.act = act;
    k->l.seed = 7;
    return k;
}

static void gram_close(tern_context *c, gram_kit *k)
{
    CHECK(c->scratch_base == 0, "scratch was not given back");
    tern_param_free(c, &k->table, -1);
    tern_param_free(c, &k->key, -1);
    tern_param_free(c, &k->value, -1);
}

static void *gram_reserve(tern_context *c, gram_kit *k)
{
    tern_need need = TERN_ZERO;
    CHECK_OK(c, tern_ngram_need(c, &k->l, GRAM_TOKENS, &need));
    CHECK_OK(c, tern_reserve(c, need.scratch));
    return hold(need.saved);
}

static void test_ngram_ids(void)
{
    static const int32_t tokens[12] = {5, 6, 7, 5, 6, 7, 6, 5, 6, 7, 1, 2};
    test_context t = test_open(TERN_ISA_BEST, 1);
    gram_kit *k = gram_open(t.c, TERN_ABSMEAN, TERN_ACT_INT8);
    tern_need need = TERN_ZERO;
    uint64_t hash;
    int32_t ids[24], again[24], i, counts[4] = {0, 0, 0, 0}, *many = hold_ids(20000, 1 << 20), *rows = hold_ids(40000, 1);
    k->table.rows = 1 << 30; /* as many as no two should share one */
    CHECK_OK(t.c, tern_ngram_ids(t.c, &k->l, 12, 0, tokens, ids));
    CHECK(ids[1] == ids[4] && ids[1] == ids[8] && ids[2] == ids[5], "the same two tokens have one row");
    CHECK(ids[1] != ids[7] && ids[1] != ids[2] && ids[0] != ids[3],
          "other two tokens have another: %d %d %d", (int)ids[0], (int)ids[1], (int)ids[7]);
    CHECK(ids[14] == ids[17] && ids[14] == ids[21] && ids[13] != ids[16], "three tokens");
    for (i = 0; i < 12; i++) CHECK(ids[i] != ids[12 + i] && ids[i] >= 0 && ids[i] < 1 << 30, "two and three share a row");
    CHECK_OK(t.c, tern_ngram_ids(t.c, &k->l, 12, 3, tokens, again));
    CHECK(again[0] == ids[0] && again[3] == ids[0] && again[4] == ids[4] && again[15] == ids[12] && again[16] == ids[13]
          && again[17] == ids[17] && again[9] != ids[9], "sequences of three");
    hash = test_hash_floats(TEST_HASH, (const float *)ids, 24);
    CHECK(hash == UINT64_C(0xDA4F372EF58A5119),
          "the hash is 0x%016llX: rows of tables that were trained have other names", (unsigned long long)hash);
    k->l.seed = 8;
    CHECK_OK(t.c, tern_ngram_ids(t.c, &k->l, 12, 0, tokens, again));
    CHECK(again[1] != ids[1] && again[14] != ids[14], "the seed counts");
    k->table.rows = 4;
    CHECK_OK(t.c, tern_ngram_ids(t.c, &k->l, 20000, 0, many, rows));
    for (i = 0; i < 40000; i++) counts[rows[i]]++;
    for (i = 0; i < 4; i++) CHECK(counts[i] > 9600 && counts[i] < 10400, "row %d of 4 has %d of 40000", (int)i, (int)counts[i]);
    k->table.rows = GRAM_ROWS;
    many[3] = -1;
    CHECK_FAILS(t.c, tern_ngram_ids(t.c, &k->l, 20000, 0, many, rows), TERN_E_ARGUMENT, "ngram: tokens[3] is -1");
    CHECK_FAILS(t.c, tern_ngram_ids(t.c, &k->l, 12, -1, tokens, ids), TERN_E_ARGUMENT, "period is -1");
    CHECK_FAILS(t.c, tern_ngram_ids(t.c, &k->l, 0, 0, tokens, ids), TERN_E_SHAPE, "n = 0");
    CHECK_FAILS(t.c, tern_ngram_ids(t.c, &k->l, 12, 0, NULL, ids), TERN_E_ARGUMENT, "tokens is NULL");
    k->l.key.w = &k->table;
    CHECK_FAILS(t.c, tern_ngram_need(t.c, &k->l, 12, &need), TERN_E_SHAPE, "key is 50 x 9 and value 7 x 9 for rows of 9");
    k->l.key.w = NULL;
    CHECK_FAILS(t.c, tern_ngram_need(t.c, &k->l, 12, &need), TERN_E_ARGUMENT, "key or value is NULL");
    k->l.table = NULL;
    CHECK_FAILS(t.c, tern_ngram_ids(t.c, &k->l, 12, 0, tokens, ids), TERN_E_ARGUMENT, "its table is NULL");
    gram_close(t.c, k);
    release();
    test_close(&t);
}

/* The sum of dy y in doubles; w: table, key and value. */
static double gram_loss(double *const w[3], const double *h, const int32_t *ids, const float *dy)
{
    double loss = 0;
    int t, j, i, o;
    for (t = 0; t < GRAM_TOKENS; t++) {
        for (i = 0; i < GRAM_WIDTH; i++) loss += dy[t * GRAM_WIDTH + i] * h[t * GRAM_WIDTH + i];
        for (o = 0; o < 2; o++) {
            const double *row = w[0] + ids[o * GRAM_TOKENS + t] * GRAM_COLS;
            double dot = 0, out = 0;
            for (i = 0; i < GRAM_WIDTH; i++)
                for (j = 0; j < GRAM_COLS; j++) {
                    dot += h[t * GRAM_WIDTH + i] * w[1][i * GRAM_COLS + j] * row[j];
                    out += dy[t * GRAM_WIDTH + i] * w[2][i * GRAM_COLS + j] * row[j];
                }
            loss += out / (1 + exp(-dot));
        }
    }
    return loss;
}

static void check_gram_slope(double *const w[3], double *h, const int32_t *ids, const float *dy, double *at, float got,
                             const char *what, int64_t i)
{
    const double was = *at;
    double slope;
    *at = was + 1e-5;
    slope = gram_loss(w, h, ids, dy);
    *at = was - 1e-5;
    slope = (slope - gram_loss(w, h, ids, dy)) / 2e-5;
    *at = was;
    CHECK(fabs(slope - got) < 2e-5 * (1 + fabs(slope)), "d %s[%d] is %g, not %g", what, (int)i, got, slope);
}

static void gram_gradients(tern_context *c, record *r)
{
    int rule, p;
    (void)r;
    for (rule = 0; rule < 2; rule++) {
        gram_kit *k = gram_open(c, rule ? TERN_ABSMEAN : TERN_DENSE, TERN_ACT_FLOAT);
        tern_param *const all[3] = {&k->table, &k->key, &k->value};
        float *h = hold_floats(GRAM_TOKENS * GRAM_WIDTH), *dy = hold_floats(GRAM_TOKENS * GRAM_WIDTH),
              *y = hold_output(GRAM_TOKENS * GRAM_WIDTH), *dh = hold_output(GRAM_TOKENS * GRAM_WIDTH);
        double *w[3], *hd = doubles_of(h, GRAM_TOKENS * GRAM_WIDTH), loss = 0;
        int32_t *ids = hold_ids(2 * GRAM_TOKENS, GRAM_ROWS), touched[GRAM_ROWS] = {0};
        void *saved = gram_reserve(c, k);
        int64_t i;
        for (p = 0; p < 3; p++) {
            const int64_t count = all[p]->rows * all[p]->cols;
            float *values = hold_output(count);
            for (i = 0; i < all[p]->rows; i++) CHECK_OK(c, tern_param_get(c, all[p], i, NULL, NULL, values + i * all[p]->cols));
            w[p] = doubles_of(values, count);
        }
        CHECK_OK(c, tern_ngram_forward(c, &k->l, GRAM_TOKENS, ids, h, y, saved));
        for (i = 0; i < GRAM_TOKENS * GRAM_WIDTH; i++) loss += (double)dy[i] * y[i];
        CHECK(fabs(loss - gram_loss(w, hd, ids, dy)) < 1e-4, "the loss is %g, not %g", loss, gram_loss(w, hd, ids, dy));
        CHECK_OK(c, tern_ngram_backward(c, &k->l, GRAM_TOKENS, ids, h, saved, dy, dh));
        for (i = 0; i < GRAM_TOKENS * GRAM_WIDTH; i++) check_gram_slope(w, hd, ids, dy, &hd[i], dh[i], "h", i);
        for (p = 0; p < 3; p++)
            for (i = 0; i < all[p]->rows * all[p]->cols; i++)
                check_gram_slope(w, hd, ids, dy, &w[p][i], ((float *)all[p]->buffer[TERN_GRAD].data)[i], all[p]->name, i);
        for (i = 0; i < 2 * GRAM_TOKENS; i++) touched[ids[i]] = 1;
        for (i = 0; i < GRAM_ROWS * GRAM_COLS; i++) if (!touched[i / GRAM_COLS])
            CHECK(((float *)k->table.buffer[TERN_GRAD].data)[i] == 0.0f, "row %d was not touched", (int)(i / GRAM_COLS));
        gram_close(c, k);
        release();
    }
}

static void gram_forward(tern_context *c, record *r)
{
    gram_kit *k = gram_open(c, TERN_ABSMEAN, TERN_ACT_INT8);
    float *h = hold_floats(GRAM_TOKENS * GRAM_WIDTH), *y = hold_output(GRAM_TOKENS * GRAM_WIDTH);
    gram_reserve(c, k);
    CHECK_OK(c, tern_ngram_forward(c, &k->l, GRAM_TOKENS, hold_ids(2 * GRAM_TOKENS, GRAM_ROWS), h, y, NULL));
    record_words(r, y, GRAM_TOKENS * GRAM_WIDTH);
    gram_close(c, k);
    release();
}
static void test_ngram_forward(void) { same_everywhere(gram_forward, UINT64_C(0x3E89CD04E3170CFF)); }

static void gated(tern_context *c, record *r)
{
    static const int64_t widths[] = {1, 16, 130, 1030};
    int i;
    for (i = 0; i < 4; i++) {
        const int64_t cols = widths[i], n = 9;
        tern_gate_args a = TERN_ZERO;
        a.n = n; a.count = 3; a.cols = cols;
        a.h = hold_floats(n * cols); a.key = hold_floats(3 * n * cols); a.value = hold_floats(3 * n * cols);
        a.gate = hold_output(3 * n); a.y = hold_output(n * cols);
        CHECK_OK(c, tern_gate(c, &a));
        record_words(r, a.gate, 3 * n);
        record_words(r, a.y, n * cols);
        a.dy = hold_floats(n * cols); a.dh = hold_output(n * cols); a.dkey = hold_output(3 * n * cols);
        a.dvalue = hold_output(3 * n * cols);
        CHECK_OK(c, tern_gate(c, &a));
        record_words(r, a.dh, n * cols);
        record_words(r, a.dkey, 3 * n * cols);
        record_words(r, a.dvalue, 3 * n * cols);
        release();
    }
}
static void test_ngram_gate(void) { same_everywhere(gated, UINT64_C(0xD154F78E952C9575)); }
#ifndef TERNARY_NO_TRAINING
static void test_ngram_gradients(void) { on_each_tier(gram_gradients); }
#endif

/* -- vector quantization -- */

static void quantized_vectors(tern_context *c, record *r)
{
    static const int64_t widths[] = {1, 15, 64, 1030};
    int i, ternary;
    for (i = 0; i < 8; i++) {
        const int64_t cols = widths[i / 2], n = 23, codes = 17;
        tern_param w = param_of("codes", codes, cols, (ternary = i % 2) ? TERN_ABSMEAN : TERN_DENSE, 0);
        tern_vq l = {&w, 0.25f};
        tern_need need = TERN_ZERO;
        float *x = hold_floats(n * cols), *y = hold_output(n * cols), *distance = hold_output(n), *values = hold_output(codes * cols);
        int32_t *ids = hold_ids(n, 1);
        int64_t t, k, j;
        CHECK_OK(c, tern_param_alloc(c, &w, TERN_FOR_ADAMW));
        set_random(c, &w);
        if (!ternary) /* code 9 is code 4 */
            memcpy((float *)w.buffer[TERN_SHADOW].data + 9 * cols, (float *)w.buffer[TERN_SHADOW].data + 4 * cols, (size_t)cols * 4);
        if (!ternary) memcpy(x, (float *)w.buffer[TERN_SHADOW].data + 9 * cols, (size_t)cols * 4);
        for (k = 0; k < codes; k++) CHECK_OK(c, tern_param_get(c, &w, k, NULL, NULL, values + k * cols));
        CHECK_OK(c, tern_vq_need(c, &l, n, &need));
        CHECK_OK(c, tern_reserve(c, need.scratch));
        CHECK_OK(c, tern_vq_forward(c, &l, n, x, ids, y, distance));
        if (!ternary) CHECK(ids[0] == 4 && distance[0] == 0, "of equal codes the first: %d", (int)ids[0]);
        for (t = 0; t < n; t++) {
            double best = 1e30, of_id = 0;
            for (k = 0; k < codes; k++) {
                double d = 0;
                for (j = 0; j < cols; j++)
                    d += ((double)x[t * cols + j] - values[k * cols + j]) * ((double)x[t * cols + j] - values[k * cols + j]);
                if (d < best) best = d;
                if (k == ids[t]) of_id = d;
            }
            CHECK(of_id <= best * (1 + 1e-5) + 1e-9 && fabs(distance[t] - of_id) <= 1e-5 * of_id + 1e-9,
                  "vector %d: code %d at %g, not %g", (int)t, (int)ids[t], of_id, best);
            CHECK(memcmp(y + t * cols, values + ids[t] * cols, (size_t)cols * 4) == 0, "y is not the code");
        }
        record_words(r, ids, n);
        record_words(r, distance, n);
#ifndef TERNARY_NO_TRAINING
        {
            float *dy = hold_floats(n * cols), *dx = hold_output(n * cols), *grad = (float *)w.buffer[TERN_GRAD].data;
            double *want = (double *)memset(hold((size_t)(codes * cols) * sizeof(double)), 0, (size_t)(codes * cols) * sizeof(double));
            CHECK_OK(c, tern_vq_backward(c, &l, n, x, ids, y, 0.5f, dy, dx));
            for (t = 0; t < n * cols; t++) {
                const double apart = (double)x[t] - y[t];
                CHECK(fabs(dx[t] - (dy[t] + 2 * 0.25 * 0.5 * apart)) < 1e-6, "dx[%d] is %g", (int)t, dx[t]);
                want[ids[t / cols] * cols + t % cols] -= apart;
            }
            for (t = 0; t < codes * cols; t++) CHECK(fabs(grad[t] - want[t]) < 1e-5, "dcodes[%d] is %g, not %g", (int)t, grad[t], want[t]);
        }
#endif
        tern_param_free(c, &w, -1);
        release();
    }
}
static void test_vq(void) { same_everywhere(quantized_vectors, UINT64_C(0x757D297327AA0962)); }

#ifndef TERNARY_NO_TRAINING
static void test_vq_revive(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param w = param_of("codes", 5, 4, TERN_DENSE, 0);
    tern_vq l = {&w, 0.25f};
    float x[12], before[20], *values;
    int64_t used[5] = {0}, revived = 0;
    int32_t ids[6] = {1, 3, 3, -1, 1, 5}, i, k, found;
    for (i = 0; i < 12; i++) x[i] = (float)i;
    CHECK_OK(t.c, tern_param_alloc(t.c, &w, TERN_FOR_ADAMW));
    set_random(t.c, &w);
    values = (float *)w.buffer[TERN_SHADOW].data;
    memcpy(before, values, sizeof before);
    CHECK_OK(t.c, tern_vq_count(t.c, &l, 6, ids, used));
    CHECK(used[0] == 0 && used[1] == 2 && used[2] == 0 && used[3] == 2 && used[4] == 0, "counts");
    CHECK_OK(t.c, tern_vq_revive(t.c, &l, 3, x, used, 1, 2, &revived));
    CHECK(revived == 3 && memcmp(values + 4, before + 4, 16) == 0 && memcmp(values + 12, before + 12, 16) == 0, "those in use stay");
    for (k = 0; k < 5; k += 2) {
        for (found = 0, i = 0; i < 3; i++) found |= memcmp(values + 4 * k, x + 4 * i, 16) == 0;
        CHECK(found, "code %d is no vector", (int)k);
    }
    memcpy(before, values, sizeof before);
    CHECK_OK(t.c, tern_vq_revive(t.c, &l, 3, x, used, 1, 2, NULL));
    CHECK(memcmp(before, values, sizeof before) == 0, "the same seed and step choose the same");
    x[5] = NAN;
    CHECK_OK(t.c, tern_reserve(t.c, 1 << 16));
    CHECK_OK(t.c, tern_vq_forward(t.c, &l, 3, x, ids, before, NULL));
    CHECK(ids[1] == -1 && ids[0] >= 0 && before[4] == 0 && before[7] == 0, "a vector that is not finite has no code");
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "nearest: row 1 is not finite");
    l.commitment = -1;
    CHECK_FAILS(t.c, tern_vq_forward(t.c, &l, 3, x, ids, before, NULL), TERN_E_ARGUMENT, "commitment is negative");
    l.codes = NULL;
    CHECK_FAILS(t.c, tern_vq_forward(t.c, &l, 3, x, ids, before, NULL), TERN_E_ARGUMENT, "codes are NULL");
    tern_param_free(t.c, &w, -1);
    test_close(&t);
}
#endif

#if !defined(TERNARY_NO_TRAINING) && !defined(TERNARY_NO_MOE) && !defined(TERNARY_NO_FILES)

/* -- a small model of all that is in this room and the one before: each token's vector becomes a code, which has a row of its
      own beside it; then a hop, the memory of n-grams, a mixture of experts with a residual, and a head -- */

enum { SMALL_TOKENS = 24, SMALL_WIDTH = 16, SMALL_IDS = 10, SMALL_CODES = 8, SMALL_ROWS = 40,
       SMALL_EXPERTS = 3, SMALL_INNER = 24, SMALL_PARAMS = 18 };
enum { SMALL_HOP, SMALL_GRAM, SMALL_MOE, SMALL_HEAD, SMALL_LAYERS };
typedef struct small_model {
    tern_param p[SMALL_PARAMS], *items[SMALL_PARAMS];
    tern_model m;
    tern_embedding tokens, nodes;
    tern_vq vq;
    tern_hop hop;
    tern_ngram gram;
    tern_expert expert[SMALL_EXPERTS];
    tern_moe moe;
    tern_linear head;
    tern_graph g;
    int32_t *ids, *targets, *grams, *codes;
    void *saved[SMALL_LAYERS];
    float *x, *code, *y, *h, *wide, *mixed, *last, *logits, *dy, *dx, *losses;
} small_model;

static tern_param *small_param(tern_context *c, small_model *o, const char *name, int64_t rows, int64_t cols, int32_t mask)
{
    tern_param *p = &o->p[o->m.count];
    float *w = hold_floats(rows * cols);
    int64_t i;
    *p = param_of(name, rows, cols, TERN_ABSMEAN, TERN_PER_ROW);
    for (i = 0; i < rows * cols; i++) w[i] = w[i] * 1.7f / sqrtf((float)cols);
    CHECK_OK(c, tern_param_alloc(c, p, mask));
    CHECK_OK(c, tern_param_set(c, p, TERN_F32, w));
    return o->items[o->m.count++] = p;
}

static void small_layers(tern_context *c, small_model *o, int32_t mask)
{
    static const char *const names[SMALL_EXPERTS][3] = {
        {"gate.0", "up.0", "down.0"}, {"gate.1", "up.1", "down.1"}, {"gate.2", "up.2", "down.2"}};
    int i;
    o->m.items = o->items;
    o->tokens.w = small_param(c, o, "tokens", SMALL_IDS, SMALL_WIDTH, mask);
    o->vq.codes = small_param(c, o, "codes", SMALL_CODES, SMALL_WIDTH, mask);
    o->vq.commitment = 0.25f;
    o->nodes.w = small_param(c, o, "nodes", SMALL_CODES, SMALL_WIDTH, mask);
    o->hop.message.w = small_param(c, o, "message", SMALL_WIDTH, SMALL_WIDTH, mask);
    o->hop.message.norm = TERN_NORM_RMS;
    o->hop.norm = TERN_GRAPH_SYMMETRIC;
    o->hop.fn = TERN_MAP_RELU;
    o->hop.residual = 1;
    o->gram.table = small_param(c, o, "table", SMALL_ROWS, SMALL_WIDTH, mask);
    o->gram.key.w = small_param(c, o, "key", SMALL_WIDTH, SMALL_WIDTH, mask);
    o->gram.value.w = small_param(c, o, "value", SMALL_WIDTH, SMALL_WIDTH, mask);
    o->moe.router.w = small_param(c, o, "router", SMALL_EXPERTS, SMALL_WIDTH, mask);
    for (i = 0; i < SMALL_EXPERTS; i++) {
        o->expert[i].gate = small_param(c, o, names[i][0], SMALL_INNER, SMALL_WIDTH, mask);
        o->expert[i].up = small_param(c, o, names[i][1], SMALL_INNER, SMALL_WIDTH, mask);
        o->expert[i].down = small_param(c, o, names[i][2], SMALL_WIDTH, SMALL_INNER, mask);
    }
    o->moe.experts = o->expert;
    o->moe.count = SMALL_EXPERTS;
    o->moe.top_k = 2;
    o->moe.norm = TERN_NORM_RMS;
    o->moe.balance = 0.01f;
    o->head.w = small_param(c, o, "head", SMALL_IDS, SMALL_WIDTH, mask);
    o->head.norm = TERN_NORM_RMS;
    CHECK(o->m.count == SMALL_PARAMS, "%d parameters", (int)o->m.count);
}

static small_model *small_open(tern_context *c, int32_t mask)
{
    small_model *o = (small_model *)memset(hold(sizeof *o), 0, sizeof *o);
    const int64_t wide = SMALL_TOKENS * SMALL_WIDTH;
    int32_t from[SMALL_TOKENS], to[SMALL_TOKENS], i;
    tern_edges e;
    tern_need need[SMALL_LAYERS];
    test_seed = 7;
    small_layers(c, o, mask);
    for (i = 0; i < SMALL_TOKENS; i++) { from[i] = i; to[i] = i % 5 ? (i + 1) % SMALL_TOKENS : i * 7 % SMALL_TOKENS; }
    e = edges_of(SMALL_TOKENS, SMALL_TOKENS, from, to, NULL);
    e.both_ways = e.loops = 1;
    e.duplicates = TERN_DUPLICATES_FIRST;
    CHECK_OK(c, tern_graph_build(c, &e, &o->g));
    o->ids = hold_ids(SMALL_TOKENS, SMALL_IDS);
    o->targets = hold_ids(SMALL_TOKENS, SMALL_IDS);
    o->grams = hold_ids(2 * SMALL_TOKENS, 1);
    o->codes = hold_ids(SMALL_TOKENS, 1);
    CHECK_OK(c, tern_ngram_ids(c, &o->gram, SMALL_TOKENS, 12, o->ids, o->grams));
    o->x = hold_output(wide); o->code = hold_output(wide); o->y = hold_output(wide); o->h = hold_output(wide);
    o->wide = hold_output(wide); o->mixed = hold_output(wide); o->last = hold_output(wide);
    o->dy = hold_output(wide); o->dx = hold_output(wide);
    o->logits = hold_output(SMALL_TOKENS * SMALL_IDS); o->losses = hold_output(SMALL_TOKENS);
    CHECK_OK(c, tern_hop_need(c, &o->hop, &o->g, &need[SMALL_HOP]));
    CHECK_OK(c, tern_ngram_need(c, &o->gram, SMALL_TOKENS, &need[SMALL_GRAM]));
    CHECK_OK(c, tern_moe_need(c, &o->moe, SMALL_TOKENS, &need[SMALL_MOE]));
    CHECK_OK(c, tern_linear_need(c, &o->head, SMALL_TOKENS, &need[SMALL_HEAD]));
    for (i = 0; i < SMALL_LAYERS; i++) {
        o->saved[i] = hold(need[i].saved);
        CHECK_OK(c, tern_reserve(c, need[i].scratch));
    }
    return o;
}

static void small_close(tern_context *c, small_model *o)
{
    int i;
    for (i = 0; i < o->m.count; i++) tern_param_free(c, o->items[i], -1);
    tern_graph_free(c, &o->g);
}

static void small_add(tern_context *c, const float *a, const float *b, float *y)
{
    tern_map_args m = TERN_ZERO;
    m.fn = TERN_MAP_ADD;
    m.count = SMALL_TOKENS * SMALL_WIDTH;
    m.alpha = 1.0f;
    m.a = a; m.b = b; m.y = y;
    CHECK_OK(c, tern_map(c, &m));
}

static double small_forward(tern_context *c, small_model *o)
{
    tern_loss_args loss = TERN_ZERO;
    double sum = 0;
    int i;
    CHECK_OK(c, tern_embedding_forward(c, &o->tokens, SMALL_TOKENS, o->ids, o->x));
    CHECK_OK(c, tern_vq_forward(c, &o->vq, SMALL_TOKENS, o->x, o->codes, o->code, NULL));
    CHECK_OK(c, tern_embedding_forward(c, &o->nodes, SMALL_TOKENS, o->codes, o->y));
    small_add(c, o->y, o->code, o->y);
    CHECK_OK(c, tern_hop_forward(c, &o->hop, &o->g, o->y, o->h, o->saved[SMALL_HOP]));
    CHECK_OK(c, tern_ngram_forward(c, &o->gram, SMALL_TOKENS, o->grams, o->h, o->wide, o->saved[SMALL_GRAM]));
    CHECK_OK(c, tern_moe_forward(c, &o->moe, SMALL_TOKENS, o->wide, o->mixed, o->saved[SMALL_MOE]));
    small_add(c, o->wide, o->mixed, o->last);
    CHECK_OK(c, tern_linear_forward(c, &o->head, SMALL_TOKENS, o->last, o->logits, o->saved[SMALL_HEAD]));
    loss.n = SMALL_TOKENS;
    loss.classes = SMALL_IDS;
    loss.logits = loss.dlogits = o->logits;
    loss.targets = o->targets;
    loss.losses = o->losses;
    loss.scale = 1.0f / SMALL_TOKENS;
    CHECK_OK(c, tern_loss(c, &loss));
    for (i = 0; i < SMALL_TOKENS; i++) sum += (double)o->losses[i];
    return sum / SMALL_TOKENS;
}

static void small_backward(tern_context *c, small_model *o, uint32_t step)
{
    const uint64_t seed = (uint64_t)step << 32;
    o->hop.message.seed = seed; o->gram.key.seed = seed | 1; o->gram.value.seed = seed | 2;
    o->moe.seed = seed | 3; o->moe.router.seed = seed | 4; o->head.seed = seed | 5;
    CHECK_OK(c, tern_linear_backward(c, &o->head, SMALL_TOKENS, o->last, o->saved[SMALL_HEAD], o->logits, o->dy));
    CHECK_OK(c, tern_moe_backward(c, &o->moe, SMALL_TOKENS, o->wide, o->saved[SMALL_MOE], o->dy, o->dx));
    small_add(c, o->dx, o->dy, o->dy);
    CHECK_OK(c, tern_ngram_backward(c, &o->gram, SMALL_TOKENS, o->grams, o->h, o->saved[SMALL_GRAM], o->dy, o->dx));
    CHECK_OK(c, tern_hop_backward(c, &o->hop, &o->g, o->y, o->saved[SMALL_HOP], o->dx, o->dy));
    CHECK_OK(c, tern_embedding_backward(c, &o->nodes, SMALL_TOKENS, o->codes, o->dy));
    CHECK_OK(c, tern_vq_backward(c, &o->vq, SMALL_TOKENS, o->x, o->codes, o->code, 1.0f / SMALL_TOKENS, o->dy, o->dx));
    CHECK_OK(c, tern_embedding_backward(c, &o->tokens, SMALL_TOKENS, o->ids, o->dx));
}

static double small_train(tern_context *c, small_model *o, uint32_t first, uint32_t last)
{
    uint32_t step;
    for (step = first; step <= last; step++) {
        tern_step s = TERN_ZERO;
        small_forward(c, o);
        small_backward(c, o, step);
        s.rate = 0.02f;
        s.seed = 99;
        s.step = step;
        s.push = 4.0f * (1.0f - (float)(step - 1) / 16.0f);
        CHECK_OK(c, tern_model_step(c, &o->m, &s));
    }
    return small_forward(c, o);
}

static int small_write(void *user, const void *data, size_t bytes) { record_bytes((record *)user, data, (int64_t)bytes); return 0; }

static void small_save(tern_context *c, const small_model *o, record *f)
{
    tern_sink s;
    s.write = small_write;
    s.user = f;
    CHECK_OK(c, tern_model_save(c, &o->m, TERN_FOR_TRAINING, &s));
}

/* Twelve steps, and five, a file, and seven more, end in the same file; the loss falls. */
static void small_life(tern_context *c, record *r, int32_t mask)
{
    record half = {NULL, 0, 0}, again = {NULL, 0, 0};
    small_model *o = small_open(c, mask), *b = small_open(c, mask);
    const double before = small_forward(c, o);
    double after;
    int i;
    small_train(c, o, 1, 5);
    small_save(c, o, &half);
    after = small_train(c, o, 6, 12);
    small_save(c, o, r);
    CHECK(after < 0.9 * before, "the loss went from %.3f to %.3f", before, after);
    for (i = 0; i < SMALL_PARAMS; i++) memset(b->p[i].buffer[TERN_TRITS].data, 0x55, b->p[i].buffer[TERN_TRITS].count);
    CHECK_OK(c, tern_model_load(c, &b->m, half.data, half.size));
    small_train(c, b, 6, 12);
    small_save(c, b, &again);
    CHECK(again.size == r->size && memcmp(again.data, r->data, r->size) == 0, "the model that was reloaded ends elsewhere");
    free(half.data);
    free(again.data);
    small_close(c, o);
    small_close(c, b);
}
static void small_with_shadows(tern_context *c, record *r) { small_life(c, r, TERN_FOR_ADAMW); }
static void small_with_accumulators(tern_context *c, record *r) { small_life(c, r, TERN_FOR_FLIPS); }
static void test_small_model(void) { same_for_threads(small_with_shadows); }
static void test_small_model_in_integers(void) { same_everywhere(small_with_accumulators, UINT64_C(0x06BC3DCD4D0EF6C4)); }
#endif

static void suite_graph(void)
{
    RUN_ALONE(test_graph_build);
    RUN_ALONE(test_graph_refusals);
    RUN(test_graph_aggregate);
    RUN_ALONE(test_graph_faults);
    RUN(test_hop_forward);
    RUN(test_hop_blocks);
#ifndef TERNARY_NO_THREADS
    RUN_ALONE(test_hop_scratch);
    RUN_ALONE(test_turns);
#endif
#ifndef TERNARY_NO_TRAINING
    RUN_ALONE(test_hop_gradients);
    RUN(test_hop_backward);
    RUN(test_hop_in_integers);
#endif
    RUN_ALONE(test_hop_refusals);
    RUN(test_hops_forward);
    RUN_ALONE(test_hops_faults);
    RUN_ALONE(test_hops_in_one);
    RUN_ALONE(test_hops_refusals);
    RUN_ALONE(test_ngram_ids);
    RUN(test_ngram_gate);
    RUN(test_ngram_forward);
    RUN(test_vq);
#ifndef TERNARY_NO_TRAINING
    RUN_ALONE(test_ngram_gradients);
    RUN_ALONE(test_vq_revive);
#endif
#if !defined(TERNARY_NO_TRAINING) && !defined(TERNARY_NO_MOE) && !defined(TERNARY_NO_FILES)
    RUN(test_small_model);
    RUN(test_small_model_in_integers);
#endif
}
