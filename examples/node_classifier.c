/* Node classifier: a graph network of two hops (Kipf and Welling 2017) that learns the classes of all nodes from a few,
   once with float weights and once with ternary ones. It ends with a table of accuracy and bytes over 10 seeds, and a
   picture of the graph, coloured by predicted class.

       cc -O2 -I. examples/node_classifier.c -o node_classifier -pthread -lm
       ./node_classifier                  a karate club of 34 members that split in two (Zachary 1977); a second
       ./node_classifier NODES EDGES      Cora as text: lines "id class train|val|test|- words,of,the,paper", lines "id id"
       ./node_classifier --float ...      the float network alone; --ternary the other; --seeds 3 fewer of them

   With an NVIDIA GPU, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       cc -O2 -I. -DUSE_CUDA examples/node_classifier.c build/ternary_cuda.o -o build/node_classifier_cuda -lcudart -lstdc++ -pthread -lm
       build/node_classifier_cuda --cuda ...   on the first GPU; of ternary networks the CPU then finds the same bits */

#define _POSIX_C_SOURCE 200809L /* isatty */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HOPS = 2, MOST_CLASSES = 16 };
typedef enum { NOWHERE, TRAIN, VALIDATION, TEST, PARTS } part;

typedef struct {
    int nodes, features, classes, edges, hidden, epochs;
    float dropout;
    const char *title;
    int32_t *from, *to, *label;
    part *part;
    int *word_start, *words; /* features of node v: words[word_start[v] .. word_start[v + 1]) */
} task;

/* -- small things -- */

static void stop(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void check(tern_context *c, tern_result result)
{
    if (result != TERN_OK) stop("ternary", tern_last_error(c)->text);
}

static void *take(tern_context *c, size_t bytes)
{
    void *p = tern_alloc(c, bytes);
    if (!p) stop("network", "out of memory");
    return p;
}

static void *room(size_t count, size_t width)
{
    void *p = calloc(count + 1, width);
    if (!p) stop("graph", "out of memory");
    return p;
}

/* The table of the first GPU; NULL in a program without ternary_cuda.o. */
static const tern_backend *gpu(void)
{
#ifdef USE_CUDA
    return tern_cuda_backend(0);
#else
    return NULL;
#endif
}

static uint64_t random_state;
static uint32_t random_bits(void)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(random_state >> 32);
}
static float random_unit(void) { return (float)(random_bits() >> 8) / 16777216.0f; }

/* -- Zachary's karate club -- */

static const char *const friendships[] = { /* member, and friends with higher numbers */
    "0 1 2 3 4 5 6 7 8 10 11 12 13 17 19 21 31", "1 2 3 7 13 17 19 21 30", "2 3 7 8 9 13 27 28 32", "3 7 12 13", "4 6 10", "5 6 10 16",
    "6 16", "8 30 32 33", "9 33", "13 33", "14 32 33", "15 32 33", "18 32 33", "19 33", "20 32 33", "22 32 33", "23 25 27 29 32 33",
    "24 25 27 31", "25 31", "26 29 33", "27 33", "28 31 33", "29 32 33", "30 32 33", "31 32 33", "32 33"};
static const char side[] = "0000000001000011001010111111111111"; /* who went with the instructor, who with the president */

/* Each member is its own feature; the instructor and the president alone are labelled. */
static task karate(void)
{
    task t = {34, 34, 2, 0, 16, 150, 0.2f, "Zachary's karate club", NULL, NULL, NULL, NULL, NULL, NULL};
    t.from = (int32_t *)room(100, 4);
    t.to = (int32_t *)room(100, 4);
    t.label = (int32_t *)room(34, 4);
    t.part = (part *)room(34, sizeof(part));
    t.word_start = (int *)room(35, sizeof(int));
    t.words = (int *)room(34, sizeof(int));
    for (size_t i = 0; i < sizeof friendships / sizeof *friendships; i++) {
        char *at;
        const int32_t from = (int32_t)strtol(friendships[i], &at, 10);
        for (; *at; t.edges++) t.from[t.edges] = from, t.to[t.edges] = (int32_t)strtol(at, &at, 10);
    }
    for (int v = 0; v < 34; v++) {
        t.label[v] = side[v] - '0';
        t.part[v] = v == 0 || v == 33 ? TRAIN : TEST;
        t.word_start[v + 1] = v + 1;
        t.words[v] = v;
    }
    return t;
}

/* -- Cora -- */

static char *read_all(const char *path)
{
    FILE *f = fopen(path, "rb");
    char *text;
    long size = -1;
    if (!f || fseek(f, 0, SEEK_END) || (size = ftell(f)) < 0 || fseek(f, 0, SEEK_SET)) stop(path, "cannot be read");
    text = (char *)room((size_t)size + 1, 1);
    if (fread(text, 1, (size_t)size, f) != (size_t)size) stop(path, "cannot be read");
    fclose(f);
    return text;
}

static int next_number(char **at, const char *path, int below)
{
    char *end;
    const long n = strtol(*at, &end, 10);
    if (end == *at || n < 0 || n >= below) stop(path, "a number is missing or out of range");
    *at = end;
    return (int)n;
}

static part next_part(char **at, const char *path)
{
    static const struct { const char *name; part is; } names[] = {
        {" train", TRAIN}, {" val", VALIDATION}, {" test", TEST}, {" -", NOWHERE}};
    for (int i = 0; i < 4; i++)
        if (strncmp(*at, names[i].name, strlen(names[i].name)) == 0) { *at += strlen(names[i].name); return names[i].is; }
    stop(path, "a node is not of train, val, test or -");
    return NOWHERE;
}

/* Lines that are neither empty nor remarks. */
static char *next_line(char *at)
{
    for (;; at++) {
        while (*at == '\n' || *at == '\r') at++;
        if (*at != '#') return *at ? at : NULL;
        while (*at && *at != '\n') at++;
        if (!*at) return NULL;
    }
}

static task read_graph(const char *nodes, const char *edges)
{
    task t = {0, 0, 0, 0, 64, 200, 0.5f, nodes, NULL, NULL, NULL, NULL, NULL, NULL};
    char *text = read_all(nodes), *at;
    const size_t most = strlen(text);
    t.label = (int32_t *)room(most, 4);
    t.part = (part *)room(most, sizeof(part));
    t.word_start = (int *)room(most, sizeof(int));
    t.words = (int *)room(most, sizeof(int));
    for (at = text; (at = next_line(at)) != NULL; t.nodes++) {
        int count = t.word_start[t.nodes];
        if (next_number(&at, nodes, INT32_MAX) != t.nodes) stop(nodes, "nodes are not numbered 0, 1, 2 ...");
        t.label[t.nodes] = next_number(&at, nodes, MOST_CLASSES);
        if (t.label[t.nodes] >= t.classes) t.classes = t.label[t.nodes] + 1;
        t.part[t.nodes] = next_part(&at, nodes);
        while (*at == ' ' || *at == ',') {
            at++;
            if (*at < '0' || *at > '9') continue;
            t.words[count] = next_number(&at, nodes, 1000000);
            if (t.words[count] >= t.features) t.features = t.words[count] + 1;
            count++;
        }
        t.word_start[t.nodes + 1] = count;
    }
    free(text);
    text = read_all(edges);
    t.from = (int32_t *)room(strlen(text), 4);
    t.to = (int32_t *)room(strlen(text), 4);
    for (at = text; (at = next_line(at)) != NULL; t.edges++) {
        t.from[t.edges] = next_number(&at, edges, t.nodes);
        t.to[t.edges] = next_number(&at, edges, t.nodes);
    }
    free(text);
    if (!t.nodes || !t.features || t.classes < 2) stop(nodes, "holds no nodes, words or classes");
    return t;
}

/* -- the network -- */

typedef struct { const char *name; tern_rule rule; tern_act act; float rate, decay; } recipe;
static const recipe recipes[] = {
    {"float", TERN_DENSE, TERN_ACT_FLOAT, 0.01f, 0.5f},
    {"ternary, int8", TERN_ABSMEAN, TERN_ACT_INT8, 0.01f, 0.1f}};
enum { RECIPES = sizeof recipes / sizeof recipes[0] };

typedef struct {
    const task *t;
    tern_graph graph;
    tern_param weights[HOPS], *list[HOPS];
    tern_hop hops[HOPS];
    tern_model model;
    void *saved[HOPS];
    float *x[HOPS + 1], *dx[HOPS + 1]; /* x[0] features, x[1] hidden, x[2] logits */
    float *picked, *dpicked, *losses;  /* the logits of some nodes */
    int32_t *ids, *targets;
    float *host, *logits; /* on the host: what is on its way to or from the backend's memory; the last logits without dropout */
} network;

static void build_graph(tern_context *c, network *net)
{
    tern_edges e = TERN_ZERO;
    e.nodes = net->t->nodes;
    e.count = net->t->edges;
    e.from = net->t->from;
    e.to = net->t->to;
    e.both_ways = 1;
    e.loops = 1;
    e.duplicates = TERN_DUPLICATES_FIRST;
    check(c, tern_graph_build(c, &e, &net->graph));
}

static void open_network(tern_context *c, network *net, const task *t, const recipe *how, int seed)
{
    const int widths[HOPS + 1] = {t->features, t->hidden, t->classes};
    tern_need need;
    memset(net, 0, sizeof *net);
    net->t = t;
    net->model.items = net->list;
    build_graph(c, net);
    for (int i = 0; i < HOPS; i++) {
        tern_param *w = &net->weights[i];
        tern_hop *hop = &net->hops[i];
        tern_fill_args noise = TERN_ZERO;
        snprintf(w->name, sizeof w->name, "hop%d.weight", i);
        w->rows = widths[i + 1];
        w->cols = widths[i];
        w->rule = how->rule;
        w->grain = TERN_PER_ROW;
        net->list[net->model.count++] = w;
        check(c, tern_param_alloc(c, w, TERN_FOR_ADAMW));
        noise.count = w->rows * w->cols;
        noise.x = (float *)take(c, (size_t)noise.count * sizeof(float));
        noise.deviation = sqrtf(2.0f / (float)(w->rows + w->cols)); /* Glorot and Bengio 2010 */
        noise.seed = (uint64_t)seed;
        noise.stream = (uint32_t)i;
        check(c, tern_fill(c, &noise));
        check(c, tern_param_set(c, w, TERN_F32, noise.x));
        tern_free(c, noise.x);
        hop->message.w = w;
        hop->message.act = hop->act = how->act;
        hop->order = TERN_PROJECT_FIRST;
        hop->norm = TERN_GRAPH_SYMMETRIC;
        hop->fn = i + 1 < HOPS ? TERN_MAP_RELU : (tern_map_fn)0;
        check(c, tern_hop_need(c, hop, &net->graph, &need));
        check(c, tern_reserve(c, need.scratch));
        net->saved[i] = take(c, need.saved);
    }
    check(c, tern_hops_need(c, net->hops, HOPS, &net->graph, &need));
    check(c, tern_reserve(c, need.scratch));
    for (int i = 0; i <= HOPS; i++) {
        net->x[i] = (float *)take(c, (size_t)t->nodes * (size_t)widths[i] * sizeof(float));
        net->dx[i] = i ? (float *)take(c, (size_t)t->nodes * (size_t)widths[i] * sizeof(float)) : NULL;
    }
    net->picked = (float *)take(c, (size_t)(t->nodes * t->classes) * sizeof(float));
    net->dpicked = (float *)take(c, (size_t)(t->nodes * t->classes) * sizeof(float));
    net->losses = (float *)take(c, (size_t)t->nodes * sizeof(float));
    net->ids = (int32_t *)take(c, (size_t)t->nodes * sizeof(int32_t));
    net->targets = (int32_t *)take(c, (size_t)t->nodes * sizeof(int32_t));
    net->host = (float *)room((size_t)t->nodes * (size_t)(t->features > t->hidden ? t->features : t->hidden), sizeof(float));
    net->logits = (float *)room((size_t)(t->nodes * t->classes), sizeof(float));
}

static void close_network(tern_context *c, network *net)
{
    for (int i = 0; i < HOPS; i++) {
        tern_param_free(c, &net->weights[i], -1);
        tern_free(c, net->saved[i]);
    }
    for (int i = 0; i <= HOPS; i++) tern_free(c, net->x[i]), tern_free(c, net->dx[i]);
    tern_free(c, net->picked);
    tern_free(c, net->dpicked);
    tern_free(c, net->losses);
    tern_free(c, net->ids);
    tern_free(c, net->targets);
    free(net->host);
    free(net->logits);
    tern_graph_free(c, &net->graph);
}

/* Words of each node with weights that add up to 1; some are left out and the others count for them. */
static void load_features(tern_context *c, network *net, float dropout)
{
    const task *t = net->t;
    const size_t bytes = (size_t)t->nodes * (size_t)t->features * sizeof(float);
    memset(net->host, 0, bytes);
    for (int v = 0; v < t->nodes; v++) {
        const int count = t->word_start[v + 1] - t->word_start[v];
        for (int i = t->word_start[v]; i < t->word_start[v + 1]; i++)
            if (dropout == 0 || random_unit() >= dropout)
                net->host[(size_t)v * (size_t)t->features + (size_t)t->words[i]] = 1.0f / ((float)count * (1.0f - dropout));
    }
    check(c, tern_copy(c, net->x[0], net->host, bytes, TERN_TO_DEVICE));
}

/* keep: for each hidden value 0 or what it is multiplied by; NULL without dropout. */
static void multiply(tern_context *c, const network *net, float *x, const float *keep)
{
    tern_map_args a = TERN_ZERO;
    a.fn = TERN_MAP_MUL;
    a.count = net->t->nodes * net->t->hidden;
    a.a = a.y = x;
    a.b = keep;
    if (keep) check(c, tern_map(c, &a));
}

static void forward(tern_context *c, network *net, const float *keep)
{
    for (int i = 0; i < HOPS; i++) {
        check(c, tern_hop_forward(c, &net->hops[i], &net->graph, net->x[i], net->x[i + 1], net->saved[i]));
        if (i == 0) multiply(c, net, net->x[1], keep);
    }
}

/* All hops at once, without dropout. */
static void infer(tern_context *c, network *net)
{
    check(c, tern_hops_forward(c, net->hops, HOPS, &net->graph, net->x[0], net->x[HOPS]));
    check(c, tern_copy(c, net->logits, net->x[HOPS], (size_t)(net->t->nodes * net->t->classes) * sizeof(float), TERN_TO_HOST));
}

static void backward(tern_context *c, network *net, const float *keep)
{
    for (int i = HOPS - 1; i >= 0; i--) {
        if (i == 0) multiply(c, net, net->dx[1], keep);
        check(c, tern_hop_backward(c, &net->hops[i], &net->graph, net->x[i], net->saved[i], net->dx[i + 1], net->dx[i]));
    }
}

/* The losses of the nodes of a part and, where asked, the gradient of their mean in the logits of all. Returns how many nodes. */
static int loss_of(tern_context *c, network *net, part of, int gradient)
{
    const task *t = net->t;
    tern_gather_args g = TERN_ZERO;
    tern_loss_args a = TERN_ZERO;
    tern_fill_args zero = TERN_ZERO;
    tern_scatter_args s = TERN_ZERO;
    int n = 0;
    int32_t *chosen = (int32_t *)(void *)net->host;
    for (int v = 0; v < t->nodes; v++) if (t->part[v] == of) chosen[n++] = v;
    if (!n) return 0;
    check(c, tern_copy(c, net->ids, chosen, (size_t)n * sizeof *chosen, TERN_TO_DEVICE));
    for (int i = 0; i < n; i++) chosen[i] = t->label[chosen[i]];
    check(c, tern_copy(c, net->targets, chosen, (size_t)n * sizeof *chosen, TERN_TO_DEVICE));
    g.m.rows = t->nodes;
    g.m.cols = t->classes;
    g.w = net->x[HOPS];
    g.n = n;
    g.ids = net->ids;
    g.y = net->picked;
    check(c, tern_gather(c, &g));
    a.n = n;
    a.classes = t->classes;
    a.logits = net->picked;
    a.targets = net->targets;
    a.losses = net->losses;
    a.dlogits = gradient ? net->dpicked : NULL;
    a.scale = 1.0f / (float)n;
    check(c, tern_loss(c, &a));
    if (gradient) {
        zero.count = t->nodes * t->classes;
        zero.x = net->dx[HOPS];
        check(c, tern_fill(c, &zero));
        s.rows = t->nodes;
        s.cols = t->classes;
        s.n = n;
        s.ids = net->ids;
        s.dy = net->dpicked;
        s.dw = net->dx[HOPS];
        check(c, tern_scatter(c, &s));
    }
    return n;
}

static double mean_loss(tern_context *c, network *net, part of)
{
    const int n = loss_of(c, net, of, 0);
    double sum = 0;
    if (n) check(c, tern_copy(c, net->host, net->losses, (size_t)n * sizeof(float), TERN_TO_HOST));
    for (int i = 0; i < n; i++) sum += net->host[i];
    return n ? sum / n : 0;
}

static int best_class(const network *net, int v)
{
    const float *x = net->logits + v * net->t->classes;
    int best = 0;
    for (int k = 1; k < net->t->classes; k++) if (x[k] > x[best]) best = k;
    return best;
}

static double accuracy(const network *net, part of)
{
    int right = 0, all = 0;
    for (int v = 0; v < net->t->nodes; v++)
        if (net->t->part[v] == of) right += best_class(net, v) == net->t->label[v], all++;
    return all ? 100.0 * right / all : 0;
}

static void learn(tern_context *c, network *net, const recipe *how, int epoch, float *keep)
{
    const float dropout = net->t->dropout;
    const int hidden = net->t->nodes * net->t->hidden;
    tern_step step = TERN_ZERO;
    for (int i = 0; i < hidden; i++) net->host[i] = random_unit() < dropout ? 0 : 1 / (1 - dropout);
    check(c, tern_copy(c, keep, net->host, (size_t)hidden * sizeof(float), TERN_TO_DEVICE));
    load_features(c, net, dropout);
    forward(c, net, keep);
    loss_of(c, net, TRAIN, 1);
    backward(c, net, keep);
    step.rate = how->rate;
    step.decay = how->decay;
    step.beta2 = 0.999f;
    step.step = (uint32_t)epoch + 1;
    check(c, tern_model_step(c, &net->model, &step));
    check(c, tern_sync(c));
}

/* Trains, and returns the accuracy on the test nodes where the validation nodes (if there are none: the training) were predicted best. */
static double train(tern_context *c, network *net, const recipe *how, int seed, int *predicted)
{
    const int validated = loss_of(c, net, VALIDATION, 0) > 0;
    float *keep = (float *)take(c, (size_t)(net->t->nodes * net->t->hidden) * sizeof(float));
    double best = 1e30, result = 0;
    random_state = (uint64_t)seed;
    for (int epoch = 0; epoch < net->t->epochs; epoch++) {
        double loss;
        learn(c, net, how, epoch, keep);
        load_features(c, net, 0);
        infer(c, net);
        loss = validated ? mean_loss(c, net, VALIDATION) - 0.1 * accuracy(net, VALIDATION) : -epoch;
        if (loss < best) {
            best = loss;
            result = accuracy(net, TEST);
            for (int v = 0; v < net->t->nodes; v++) predicted[v] = best_class(net, v);
        }
        if (isatty(1) && epoch % 10 == 0) {
            printf("\r%-14s seed %2d  epoch %3d  train %5.1f%%  test %5.1f%%", how->name, seed, epoch, accuracy(net, TRAIN), result);
            fflush(stdout);
        }
    }
    tern_free(c, keep);
    if (isatty(1)) printf("\r%70s\r", "");
    return result;
}

/* -- the picture -- */

/* Neighbours attract and all repel each other, ever less (Fruchterman and Reingold 1991). */
static void lay_out(const task *t, float *x, float *y)
{
    const float ideal = 1 / sqrtf((float)t->nodes);
    const int rounds = t->nodes < 500 ? 400 : 100;
    float *dx = (float *)room((size_t)t->nodes, sizeof(float)), *dy = (float *)room((size_t)t->nodes, sizeof(float));
    random_state = 1;
    for (int v = 0; v < t->nodes; v++) x[v] = random_unit() - 0.5f, y[v] = random_unit() - 0.5f;
    for (int round = 0; round < rounds; round++) {
        const float most = 0.1f * (1 - (float)round / (float)rounds);
        for (int v = 0; v < t->nodes; v++) {
            dx[v] = -2 * x[v]; /* what is not connected stays near */
            dy[v] = -2 * y[v];
            for (int u = 0; u < t->nodes; u++) {
                const float a = x[v] - x[u], b = y[v] - y[u], f = ideal * ideal / (a * a + b * b + 1e-6f);
                dx[v] += a * f;
                dy[v] += b * f;
            }
        }
        for (int e = 0; e < t->edges; e++) {
            const int u = t->from[e], v = t->to[e];
            const float a = x[v] - x[u], b = y[v] - y[u], f = sqrtf(a * a + b * b) / ideal;
            dx[u] += a * f; dy[u] += b * f;
            dx[v] -= a * f; dy[v] -= b * f;
        }
        for (int v = 0; v < t->nodes; v++) {
            const float length = sqrtf(dx[v] * dx[v] + dy[v] * dy[v]) + 1e-9f, step = length < most ? 1 : most / length;
            x[v] += dx[v] * step;
            y[v] += dy[v] * step;
        }
    }
    free(dx);
    free(dy);
}

static void draw(const task *t, const int *predicted)
{
    static const char *const colours[MOST_CLASSES] = {
        "#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777",
        "#65a30d", "#4b5563", "#7c3aed", "#0d9488", "#b45309", "#1d4ed8", "#be123c", "#15803d"};
    const char *path = "build/node_classifier.svg";
    float *x = (float *)room((size_t)t->nodes, sizeof(float)), *y = (float *)room((size_t)t->nodes, sizeof(float)), most = 0;
    const float size = t->nodes < 500 ? 9 : 2.4f;
    int wrong = 0;
    FILE *f = fopen(path, "wb");
    if (!f) f = fopen(path += strlen("build/"), "wb");
    if (!f) stop(path, "cannot be written");
    lay_out(t, x, y);
    for (int v = 0; v < t->nodes; v++) {
        if (fabsf(x[v]) > most) most = fabsf(x[v]);
        if (fabsf(y[v]) > most) most = fabsf(y[v]);
    }
    for (int v = 0; v < t->nodes; v++) x[v] = 320 + 300 * x[v] / most, y[v] = 320 + 300 * y[v] / most;
    fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 640 670' font-family='sans-serif' font-size='13'>"
               "<rect width='640' height='670' fill='white'/>\n<g stroke='#9ca3af' stroke-width='%.1f' stroke-opacity='.6'>\n",
            t->nodes < 500 ? 1.0 : 0.3);
    for (int e = 0; e < t->edges; e++)
        fprintf(f, "<path d='M%.1f %.1fL%.1f %.1f'/>\n",
                (double)x[t->from[e]], (double)y[t->from[e]], (double)x[t->to[e]], (double)y[t->to[e]]);
    fprintf(f, "</g>\n");
    for (int v = 0; v < t->nodes; v++) {
        const int mistake = predicted[v] != t->label[v];
        wrong += mistake;
        fprintf(f, "<circle cx='%.1f' cy='%.1f' r='%.1f' fill='%s'%s/>\n",
                (double)x[v], (double)y[v], (double)size * (t->part[v] == TRAIN ? 1.5 : 1.0), colours[predicted[v]],
                mistake ? " stroke='black' stroke-width='1.2'" : "");
    }
    fprintf(f, "<text x='320' y='660' text-anchor='middle'>predicted class by colour; large: labelled for training; "
               "ringed: wrong (%d of %d)</text>\n</svg>\n", wrong, t->nodes);
    if (fclose(f)) stop(path, "cannot be written");
    printf("%s shows the last predictions\n", path);
    free(x);
    free(y);
}

/* -- both networks -- */

/* The packed network on the CPU: the same logits, bit by bit? Of int8 activations; sums of float ones are the CPU's own. */
static void compare_bits(tern_context *c, const network *net, const recipe *how)
{
    tern_context *cpu;
    tern_error error;
    network again;
    if (tern_open(&cpu, NULL, &error) != TERN_OK) stop("ternary", error.text);
    open_network(cpu, &again, net->t, how, 1);
    for (int i = 0; i < HOPS; i++) {
        const tern_matrix m = tern_param_matrix(&net->weights[i]);
        size_t trits, scales;
        check(c, tern_matrix_bytes(c, &m, &trits, &scales));
        check(c, tern_copy(c, again.weights[i].buffer[TERN_TRITS].data, m.trits, trits, TERN_TO_HOST));
        check(c, tern_copy(c, again.weights[i].buffer[TERN_SCALES].data, m.scales, scales, TERN_TO_HOST));
    }
    load_features(cpu, &again, 0);
    infer(cpu, &again);
    if (memcmp(net->logits, again.logits, (size_t)(net->t->nodes * net->t->classes) * sizeof(float)))
        stop(how->name, "has other bits on the CPU");
    printf("%-14s  the same bits on the tiers %s and %s\n", how->name, tern_backend_name(c), tern_backend_name(cpu));
    close_network(cpu, &again);
    tern_close(cpu);
}

static void compare(tern_context *c, const task *t, int which, int seeds, int cuda)
{
    int *predicted = (int *)room((size_t)t->nodes, sizeof(int));
    printf("%s: %d nodes, %d edges, %d features, %d classes\n\n", t->title, t->nodes, t->edges, t->features, t->classes);
    printf("%-14s  %-24s %-7s %-7s %s\n", "weights", "test accuracy, %", "lowest", "highest", "bytes");
    for (int r = 0; r < RECIPES; r++) {
        double sum = 0, squares = 0, lowest = 100, highest = 0, mean, deviation;
        tern_audit audit;
        if (which >= 0 && r != which) continue;
        for (int seed = 1; seed <= seeds; seed++) {
            network net;
            double got;
            open_network(c, &net, t, &recipes[r], seed);
            got = train(c, &net, &recipes[r], seed, predicted);
            check(c, tern_model_audit(c, &net.model, &audit));
            if (cuda && seed == 1 && recipes[r].act == TERN_ACT_INT8) compare_bits(c, &net, &recipes[r]);
            sum += got;
            squares += got * got;
            if (got < lowest) lowest = got;
            if (got > highest) highest = got;
            close_network(c, &net);
        }
        mean = sum / seeds;
        deviation = seeds > 1 ? sqrt(fmax(0, (squares - sum * mean) / (seeds - 1))) : 0;
        printf("%-14s  %5.2f +- %-4.2f (%2d seeds)  %5.1f   %5.1f   %d\n",
               recipes[r].name, mean, deviation, seeds, lowest, highest, (int)audit.packed_bytes);
        fflush(stdout);
    }
    printf("\n");
    draw(t, predicted);
    free(predicted);
}

int main(int argc, char **argv)
{
    const char *paths[2] = {NULL, NULL};
    int count = 0, which = -1, seeds = 10, cuda = 0;
    tern_context *c;
    tern_error error;
    tern_context_desc desc = TERN_ZERO;
    tern_pool *pool = tern_pool_create(0);
    task t;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--float") == 0) which = 0;
        else if (strcmp(argv[i], "--ternary") == 0) which = 1;
        else if (strcmp(argv[i], "--cuda") == 0) cuda = 1;
        else if (strcmp(argv[i], "--seeds") == 0 && i + 1 < argc && atoi(argv[i + 1]) > 0) seeds = atoi(argv[++i]);
        else if (argv[i][0] == '-' || count == 2)
            stop(argv[0], "takes a file of nodes and one of edges, or none, --float, --ternary, --cuda and --seeds 10");
        else paths[count++] = argv[i];
    }
    if (count == 1) stop(argv[0], "takes two files: nodes and edges");
    if (cuda && !gpu())
        stop("--cuda",
             "this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, or by make build/node_classifier_cuda");
    t = count ? read_graph(paths[0], paths[1]) : karate();
    desc.parallel = tern_pool_parallel(pool);
    if (cuda) desc.backend = gpu();
    if (tern_open(&c, &desc, &error) != TERN_OK) stop("ternary", error.text);
    compare(c, &t, which, seeds, cuda);
    tern_close(c);
    tern_pool_destroy(pool);
    free(t.from); free(t.to); free(t.label); free(t.part); free(t.word_start); free(t.words);
    return 0;
}
