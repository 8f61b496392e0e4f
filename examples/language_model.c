/* Trains a byte-level language model with ternary weights on a text, packs and saves it, reloads the file
   into a fresh model, lets that talk, and checks that nothing changed on the way.

       cc -O2 -I. examples/language_model.c -o build/language_model -pthread
       build/language_model --text book.txt

   With an NVIDIA GPU, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       cc -O2 -I. -DUSE_CUDA examples/language_model.c build/ternary_cuda.o -o build/language_model_cuda -lcudart -lstdc++ -pthread
       build/language_model_cuda --cuda --text book.txt

   A transformer: rotary positions, RMSNorm of queries and keys, squared ReLU; every linear layer is a
   BitLinear with an RMSNorm without gain before it, int8 activations and one scale per row. Other recipes are
   options, from the rule that makes a trit of a weight to the rounding of the shadow weights; --float
   trains the same network with float weights, and --true-ternary without any: trits, an int8 accumulator for each
   and scales that stay are all that lasts, and the trained bits are the same on every machine. --experts makes each
   block's MLP a mixture of experts, of which a router chooses a few for every byte. Everything is computed by the
   operations of ternary.h on memory of its backend: --cuda trains and talks on the first GPU, and the CPU then finds
   the same bits in the file.

   Ctrl-C ends the training after the step that runs and keeps its state; the same command with --resume FILE
   goes on from there, with the bits of a training that was never interrupted. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void die(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "\nlanguage_model: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    exit(1);
}

static void *host_alloc(int64_t count, size_t bytes)
{
    void *p = calloc((size_t)count + 1, bytes);
    if (!p) die("no memory for %lld x %zu bytes", (long long)count, bytes);
    return p;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* -- options -- */

typedef struct options {
    const char *text, *out, *resume, *beside;
    int64_t threads, cuda, stop, generate;
    int64_t layers, heads, width, context, batch, accumulate, steps, seed, schedule;
    int64_t experts, top_k, expert_width, shared; /* of each block; no experts: an MLP */
    int64_t rule, ends, grain, scales, activations, rotate, shadows, nearest, moments; /* the recipe; rule: TERN_DENSE for float weights */
    int64_t true_ternary, flips;
    double rate, decay, balance, tequila, arenas, noise, rho, push; /* from layers to here: what a training depends on */
} options;

/* The table of the first GPU; NULL in a program without ternary_cuda.o. */
static const tern_backend *gpu(void)
{
#ifdef USE_CUDA
    return tern_cuda_backend(0);
#else
    return NULL;
#endif
}

static const char usage[] =
    "usage: language_model [options]\n"
    "  --text PATH      what to learn (default: ternary.h)\n"
    "  --out DIR        where loss.svg, loss.csv and model.gguf go (default: build)\n"
    "  --beside FILE    the loss.csv of another training, to be drawn into loss.svg too\n"
    "  --layers N  --heads N  --width N  --context N  --batch N  --steps N\n"
    "  --experts E      a mixture of E experts for each block's MLP, and\n"
    "  --top-k K        how many of them see a byte (default: 2)\n"
    "  --expert-width F (default: 4 * width / K, so that those which see a byte are as large as the MLP)\n"
    "  --shared         one expert more, which sees every byte\n"
    "  --balance B      weight of the loss that evens their loads (default: 0.01)\n"
    "  --accumulate N   batches whose gradients make a step (default: 1)\n"
    "  --lr RATE  --decay D    peak learning rate; weight decay (default: 0.05)\n"
    "  --schedule NAME  cosine (default), wsd (warm-up, stable, decay over the last fifth) or linear\n"
    "  --stop N         ends after step N as Ctrl-C does: with the state in training.state in --out\n"
    "  --resume FILE    goes on from such a state; the other options are those of the run that wrote it\n"
    "  --seed N         of the initial weights, the batches and the generated text\n"
    "  --float          float weights instead of ternary ones\n"
    "  --true-ternary   no floats that last: accumulators in int8 and gradients by integer products instead of shadows,\n"
    "                   moments and rates; scales of type log, schedule linear (to 0)\n"
    "  --push K         of a mean gradient on an accumulator, which flips its trit at 32 (default: 3)\n"
    "  --flips RULE     proportional to the gradient (default), or by its sign alone\n"
    "  --rule NAME      absmean (default), sigma, twn, or with learned scales lsq or seq\n"
    "  --float-ends     a float embedding and head, and ternary blocks between them\n"
    "  --grain G        what has a scale: tensor (lsq), row (default) or a group of that many inputs\n"
    "  --scales TYPE    f32 (default), f16, pow2 or log\n"
    "  --activations TYPE      int8 (default), int4 or float\n"
    "  --rotate         a Hadamard rotation of weights and activations\n"
    "  --tequila LAMBDA        the weights of the dead zone give a bias (1e-3 is usual)\n"
    "  --arenas EPS     EPS times the shadow weights is added to the ternary ones, and fades to nothing\n"
    "  --noise S        weights within S scales of a threshold are decided with noise, which fades too\n"
    "  --rho RHO        scales are running averages\n"
    "  --shadows TYPE   bf16 (default) or f32; --float-shadows is f32\n"
    "  --rounding HOW   of bfloat16 shadows: stochastic (default), or nearest, which loses small updates\n"
    "  --moments TYPE   f32 (default) or bf16, of the optimizer\n"
    "  --threads N      0: one per CPU\n"
    "  --cuda           on the first GPU (of CUDA_VISIBLE_DEVICES)\n"
    "  --generate N     bytes to generate\n";

/* The number that a word is, if it is one and nothing more. */
static int is_number(const char *word, double *out)
{
    char *end;
    *out = strtod(word, &end);
    return end != word && !*end;
}

static options parse(int count, char **words)
{
    enum { BY_RULE = -2 }; /* a grain, scales, a schedule, the balance */
    options o = {.text = "ternary.h", .out = "build", .generate = 400, .layers = 4, .heads = 4, .width = 128, .context = 64, .batch = 12,
                 .accumulate = 1, .steps = 600, .seed = 1, .schedule = BY_RULE, .rule = TERN_ABSMEAN, .grain = BY_RULE,
                 .scales = BY_RULE, .activations = TERN_ACT_INT8, .shadows = TERN_BF16, .moments = TERN_F32, .decay = 0.05,
                 .balance = BY_RULE, .push = 3};
    const struct { const char *name; int64_t *option, value; } flags[] = {
        {"--cuda", &o.cuda, 1}, {"--float", &o.rule, TERN_DENSE}, {"--float-ends", &o.ends, 1}, {"--float-shadows", &o.shadows, TERN_F32},
        {"--rotate", &o.rotate, 1}, {"--true-ternary", &o.true_ternary, 1}, {"--shared", &o.shared, 1}};
    const struct { const char *name, **option; } strings[] = {
        {"--text", &o.text}, {"--out", &o.out}, {"--resume", &o.resume}, {"--beside", &o.beside}};
    const struct { const char *name; int64_t *option; const char *word; int64_t value; } choices[] = {
        {"--schedule", &o.schedule, "cosine", TERN_COSINE},           {"--schedule", &o.schedule, "wsd", TERN_WSD},
        {"--rule", &o.rule, "absmean", TERN_ABSMEAN},                 {"--rule", &o.rule, "sigma", TERN_ABSMEAN_SIGMA},
        {"--rule", &o.rule, "twn", TERN_TWN},                         {"--rule", &o.rule, "lsq", TERN_LSQ},
        {"--rule", &o.rule, "seq", TERN_SEQ},                         {"--grain", &o.grain, "tensor", TERN_PER_TENSOR},
        {"--grain", &o.grain, "row", TERN_PER_ROW},                   {"--scales", &o.scales, "f32", TERN_F32},
        {"--scales", &o.scales, "f16", TERN_F16},                     {"--scales", &o.scales, "pow2", TERN_POW2},
        {"--activations", &o.activations, "int8", TERN_ACT_INT8},     {"--activations", &o.activations, "int4", TERN_ACT_INT4},
        {"--activations", &o.activations, "float", TERN_ACT_FLOAT},   {"--shadows", &o.shadows, "bf16", TERN_BF16},
        {"--shadows", &o.shadows, "f32", TERN_F32},                   {"--rounding", &o.nearest, "stochastic", 0},
        {"--rounding", &o.nearest, "nearest", 1},                     {"--moments", &o.moments, "f32", TERN_F32},
        {"--moments", &o.moments, "bf16", TERN_BF16},                 {"--schedule", &o.schedule, "linear", TERN_LINEAR},
        {"--scales", &o.scales, "log", TERN_LOG},                     {"--flips", &o.flips, "sign", TERN_FLIP_SIGN},
        {"--flips", &o.flips, "proportional", TERN_FLIP_PROPORTIONAL}};
    const struct { const char *name; int64_t *option, least, most; } wholes[] = {
        {"--layers", &o.layers, 1, 128},     {"--heads", &o.heads, 1, 256},   {"--width", &o.width, 2, 16384},
        {"--context", &o.context, 2, 65536}, {"--batch", &o.batch, 1, 4096},  {"--steps", &o.steps, 10, 100000000},
        {"--accumulate", &o.accumulate, 1, 4096}, {"--stop", &o.stop, 1, 100000000}, {"--grain", &o.grain, 1, 65536},
        {"--seed", &o.seed, 0, INT64_C(1) << 53}, {"--threads", &o.threads, 0, 64}, {"--generate", &o.generate, 0, 1 << 30},
        {"--experts", &o.experts, 1, 1024},  {"--top-k", &o.top_k, 1, 1024},  {"--expert-width", &o.expert_width, 1, 65536}};
    const struct { const char *name; double *option; } numbers[] = { /* ranges: the library's */
        {"--lr", &o.rate}, {"--decay", &o.decay}, {"--tequila", &o.tequila}, {"--arenas", &o.arenas}, {"--noise", &o.noise},
        {"--rho", &o.rho}, {"--push", &o.push}, {"--balance", &o.balance}};
#define EACH(list) for (k = 0; k < (int)(sizeof list / sizeof list[0]); k++) if (!strcmp(name, list[k].name))
    int i, k;
    for (i = 1; i < count; i++) {
        const char *name = words[i], *value;
        int known = 0, done = 0;
        double number;
        if (!strcmp(name, "--help")) { fputs(usage, stdout); exit(0); }
        EACH(flags) { *flags[k].option = flags[k].value; done = 1; }
        if (done) continue;
        if (++i == count) die("%s needs a value\n%s", name, usage);
        value = words[i];
        EACH(strings) { *strings[k].option = value; done = 1; }
        EACH(choices) {
            known = 1;
            if (!strcmp(value, choices[k].word)) { *choices[k].option = choices[k].value; done = 1; }
        }
        EACH(numbers) {
            if (!is_number(value, numbers[k].option)) die("%s %s is not a number", name, value);
            done = 1;
        }
        EACH(wholes) if (!done) {
            if (!is_number(value, &number) || !(number >= (double)wholes[k].least && number <= (double)wholes[k].most)
                || number != (double)(int64_t)number)
                die("%s %s is not a whole number from %lld to %lld", name, value, (long long)wholes[k].least, (long long)wholes[k].most);
            *wholes[k].option = (int64_t)number;
            done = 1;
        }
        if (!done) die(known ? "%s does not take %s\n%s" : "unknown option %s %s\n%s", name, value, usage);
    }
#undef EACH
    if (o.true_ternary && (o.rate != 0 || o.noise != 0 || o.rho != 0 || o.nearest || o.shadows != TERN_BF16 || o.moments != TERN_F32))
        die("--true-ternary has no shadows and no optimizer, and so no --lr, --noise, --rho, --shadows, --rounding and --moments");
    if (!o.experts && (o.top_k || o.expert_width || o.shared || o.balance != BY_RULE))
        die("--top-k, --expert-width, --shared and --balance are of a mixture; --experts N says of how many");
    if (o.experts && o.arenas != 0) die("--arenas: experts cannot add shadow weights to theirs");
    if (o.experts && !o.top_k) o.top_k = 2;
    if (o.experts && !o.expert_width && 4 * o.width % o.top_k)
        die("--top-k %lld does not divide an MLP of %lld; give --expert-width", (long long)o.top_k, 4 * (long long)o.width);
    if (o.experts && !o.expert_width) o.expert_width = 4 * o.width / o.top_k;
    if (o.balance == BY_RULE) o.balance = o.experts ? 0.01 : 0;
    if (o.schedule == BY_RULE) o.schedule = o.true_ternary ? TERN_LINEAR : TERN_COSINE;
    if (o.scales == BY_RULE) o.scales = o.true_ternary ? TERN_LOG : TERN_F32;
    if (o.grain == BY_RULE) o.grain = o.rule == TERN_LSQ ? TERN_PER_TENSOR : TERN_PER_ROW;
    if (o.cuda && !gpu())
        die("--cuda: this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, "
            "or by make build/language_model_cuda");
    if (o.width % (2 * o.heads)) die("--width %lld does not divide into %lld heads of even size", (long long)o.width, (long long)o.heads);
    if (access(o.out, W_OK)) die("cannot write into %s; --out names an existing directory", o.out);
    if (o.rate == 0) o.rate = o.rule == TERN_DENSE ? 3e-3 : 7e-3; /* ternary weights want two to three times the rate */
    return o;
}

/* -- the text: the last tenth validates -- */

typedef struct text { unsigned char *bytes; int64_t train, validate, windows; } text;

static text read_text(const options *o)
{
    text t;
    FILE *f = fopen(o->text, "rb");
    int64_t size = 0, room = 1 << 20;
    if (!f) die("cannot open %s", o->text);
    t.bytes = (unsigned char *)host_alloc(room, 1);
    while ((size += (int64_t)fread(t.bytes + size, 1, (size_t)(room - size), f)) == room)
        if (!(t.bytes = (unsigned char *)realloc(t.bytes, (size_t)(room *= 2)))) die("no memory for %s", o->text);
    if (ferror(f)) die("cannot read %s", o->text);
    fclose(f);
    t.validate = size / 10;
    t.train = size - t.validate;
    t.windows = (t.validate - 1) / o->context; /* disjoint windows; each predicts the byte after it too */
    if (t.windows < 1) die("%s has %lld bytes; a context of %lld needs at least %lld", o->text, (long long)size,
                           (long long)o->context, 10 * (long long)(o->context + 1));
    return t;
}

/* splitmix64 (Steele et al. 2014) */
static uint64_t random_bits(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

/* -- the model: a context, parameters, and room for the activations of a batch -- */

enum { BYTES = 256, EMBEDDING = 0, HEAD = 1, FIRST_BLOCK = 2 };
/* The linear layers of a block; of a mixture, from EXPERTS on, up and down of each. */
enum { QK, V, O, UP, DOWN, LINEARS, ROUTER = UP, EXPERTS };

/* What a block's forward leaves for its backward. */
typedef struct block {
    float *x, *qk, *turned, *v, *p, *mixed, *mid, *up, *hidden;
    void *saved[LINEARS];
} block;

typedef struct lm {
    options o;
    tern_pool *pool;
    tern_context *c;
    int training;
    float arenas;         /* of this step */
    uint64_t rounding;    /* a seed for every backward, of true-ternary training */
    tern_param *params, *biases, *alphas, **items; /* weights; of each the bias of its dead zone and the learned scales */
    tern_expert *experts; /* [layers, experts and the shared one] */
    tern_model model;
    void *memory;         /* of the backend; everything below but the last line is cut from it */
    size_t used;
    int32_t *ids, *targets;
    tern_flips *flips;
    float *embedded, *branch, *x, *logits, *losses;
    void *saved_head;
    float *dx, *dv, *dqk, *dwide;
    block *blocks;
    int32_t *host_ids; float *host_losses, *host_logits;
    int64_t *loads, counted; double *entropy; /* tokens by [layers, experts], of how many; sums of the routers' entropies [layers] */
} lm;

static void ok(const lm *m, tern_result result)
{
    if (result != TERN_OK) die("%s", m->c ? tern_last_error(m->c)->text : tern_result_text(result));
}

static int64_t expert_count(const options *o) { return o->experts + o->shared; }
static int64_t param_of(const options *o, int64_t layer, int64_t which)
{
    return FIRST_BLOCK + layer * (o->experts ? EXPERTS + 2 * expert_count(o) : LINEARS) + which;
}
static int64_t param_count(const options *o) { return param_of(o, o->layers, 0); }
static int is_float(const options *o, int64_t param) { return o->rule == TERN_DENSE || (o->ends && param < FIRST_BLOCK); }
/* The recipe is for the others. */
static int is_plain(const options *o, int64_t param) { return param == EMBEDDING || (o->ends && param < FIRST_BLOCK); }

static tern_linear linear(const lm *m, int64_t param)
{
    tern_linear l = TERN_ZERO;
    l.w = &m->params[param];
    l.norm = TERN_NORM_RMS;
    l.act = (tern_act)m->o.activations;
    l.arenas = is_plain(&m->o, param) ? 0 : m->arenas;
    l.seed = m->rounding + (uint64_t)param;
    return l;
}

/* Of a single chosen one the share among the chosen is always 1; the router then learns by its share among all. */
static tern_moe mixture(const lm *m, int64_t layer)
{
    tern_moe x = TERN_ZERO;
    x.router = linear(m, param_of(&m->o, layer, ROUTER));
    x.experts = m->experts + layer * expert_count(&m->o);
    x.always = m->o.shared ? x.experts + m->o.experts : NULL;
    x.count = (int32_t)m->o.experts;
    x.top_k = (int32_t)m->o.top_k;
    x.weights = m->o.top_k == 1 ? TERN_ROUTE_ALL : TERN_ROUTE_SELECTED;
    x.fn = TERN_MAP_RELU2;
    x.norm = x.inner = TERN_NORM_RMS;
    x.act = (tern_act)m->o.activations;
    x.balance = (float)(m->o.balance / (double)m->o.accumulate);
    x.seed = m->rounding;
    return x;
}

/* The next `count` floats of the model's memory; while there is none yet, only counts. */
static float *cut(lm *m, int64_t count)
{
    float *p = m->memory ? (float *)m->memory + m->used / sizeof(float) : NULL;
    m->used += ((size_t)count * sizeof(float) + 63) & ~(size_t)63;
    return p;
}

static void *cut_saved(lm *m, int64_t param, int64_t n)
{
    const tern_linear l = linear(m, param);
    tern_need need;
    ok(m, tern_linear_need(m->c, &l, n, &need));
    ok(m, tern_reserve(m->c, need.scratch));
    return m->training ? cut(m, (int64_t)(need.saved + 3) / 4) : NULL;
}

/* Without training too: it tells who was chosen. */
static void *cut_mixture(lm *m, int64_t layer, int64_t n)
{
    const tern_moe x = mixture(m, layer);
    tern_need need;
    ok(m, tern_moe_need(m->c, &x, n, &need));
    ok(m, tern_reserve(m->c, need.scratch));
    return cut(m, (int64_t)(need.saved + 3) / 4);
}

static void lay_out(lm *m)
{
    const int64_t n = m->o.batch * m->o.context, w = m->o.width, wide = m->o.experts ? 0 : 4 * w; /* experts have their own room */
    int64_t i;
    int k;
    m->used = 0;
    m->ids = (int32_t *)cut(m, n);
    m->targets = (int32_t *)cut(m, n);
    m->flips = (tern_flips *)(void *)cut(m, (int64_t)(sizeof *m->flips / sizeof(float)));
    m->embedded = cut(m, n * w);
    for (i = 0; i < m->o.layers; i++) {
        block *b = &m->blocks[i];
        b->x = cut(m, n * w);
        b->qk = cut(m, n * 2 * w);
        b->turned = cut(m, n * 2 * w);
        b->v = cut(m, n * w);
        b->p = cut(m, n * m->o.heads * m->o.context);
        b->mixed = cut(m, n * w);
        b->mid = cut(m, n * w);
        b->up = cut(m, n * wide);
        b->hidden = cut(m, n * wide);
        for (k = 0; k < (m->o.experts ? ROUTER : LINEARS); k++) b->saved[k] = cut_saved(m, param_of(&m->o, i, k), n);
        if (m->o.experts) b->saved[ROUTER] = cut_mixture(m, i, n);
    }
    m->branch = cut(m, n * w);
    m->x = cut(m, n * w);
    m->logits = cut(m, n * BYTES);
    m->losses = cut(m, n);
    m->saved_head = cut_saved(m, HEAD, n);
    if (!m->training) return;
    m->dx = cut(m, n * w);
    m->dv = cut(m, n * w);
    m->dqk = cut(m, n * 2 * w);
    m->dwide = cut(m, n * wide);
}

/* name: with places for the layer and an expert, as far as there are any. */
static tern_param *add_weights(lm *m, const char *name, int64_t layer, int64_t expert, int64_t rows, int64_t cols)
{
    const options *o = &m->o;
    const int32_t dense = is_float(o, m->model.count), training = o->true_ternary && !dense ? TERN_FOR_FLIPS : TERN_FOR_ADAMW;
    tern_param *p = m->items[m->model.count] = &m->params[m->model.count];
    snprintf(p->name, sizeof p->name, name, (int)layer, (int)expert);
    p->rows = rows;
    p->cols = cols;
    p->rule = dense ? TERN_DENSE : (tern_rule)o->rule;
    p->grain = (int32_t)o->grain;
    p->rho = dense && o->ends ? 0 : (float)o->rho;
    if (o->nearest) p->flags |= TERN_NEAREST;
    if (o->rotate && !is_plain(o, m->model.count)) p->rotate = 1;
    p->buffer[TERN_TRITS].type = m->training ? TERN_BASE3 : TERN_2BIT; /* the smaller panels, and the faster ones */
    p->buffer[TERN_SCALES].type = (tern_type)o->scales;
    p->buffer[TERN_SHADOW].type = dense ? TERN_F32 : (tern_type)o->shadows;
    p->buffer[TERN_MOMENT1].type = p->buffer[TERN_MOMENT2].type = (tern_type)o->moments;
    ok(m, tern_param_alloc(m->c, p, m->training ? training : dense ? 1 << TERN_SHADOW : TERN_FOR_INFERENCE));
    m->model.count++;
    return p;
}

static void add_mlp(lm *m, int64_t layer)
{
    const int64_t w = m->o.width;
    int64_t i;
    if (!m->o.experts) {
        add_weights(m, "block.%d.up", layer, 0, 4 * w, w);
        add_weights(m, "block.%d.down", layer, 0, w, 4 * w);
        return;
    }
    add_weights(m, "block.%d.router", layer, 0, m->o.experts, w);
    for (i = 0; i < expert_count(&m->o); i++) {
        tern_expert *e = &m->experts[layer * expert_count(&m->o) + i];
        e->up = add_weights(m, "block.%d.expert.%d.up", layer, i, m->o.expert_width, w);
        e->down = add_weights(m, "block.%d.expert.%d.down", layer, i, w, m->o.expert_width);
    }
}

/* A vector that belongs to weights. */
static void add_vector(lm *m, tern_param *p, const tern_param *of, const char *kind, int64_t count, int32_t mask)
{
    m->items[m->model.count++] = p;
    snprintf(p->name, sizeof p->name, "%.40s.%s", of->name, kind);
    p->rows = 1;
    p->cols = count;
    p->rule = TERN_DENSE;
    p->flags = TERN_NO_DECAY;
    ok(m, tern_param_alloc(m->c, p, mask));
}

/* What a recipe has besides weights; the learned scales, which end with the training, are the last in the list. */
static void add_vectors(lm *m)
{
    const int32_t weights = m->model.count;
    int32_t i;
    for (i = 0; m->o.tequila != 0 && i < weights; i++) {
        const int32_t mask = 1 << TERN_SHADOW | (m->training ? 1 << TERN_GRAD : 0);
        tern_param *w = &m->params[i];
        if (is_plain(&m->o, i)) continue;
        add_vector(m, &m->biases[i], w, "bias", w->rows, mask);
        w->dead = &m->biases[i];
        w->lambda = (float)m->o.tequila;
    }
    for (i = 0; m->training && (m->o.rule == TERN_LSQ || m->o.rule == TERN_SEQ) && i < weights; i++) {
        tern_param *w = &m->params[i];
        if (is_float(&m->o, i)) continue;
        add_vector(m, &m->alphas[i], w, "alpha", m->o.rule == TERN_LSQ ? 1 : w->rows, TERN_FOR_ADAMW);
        w->alpha = &m->alphas[i];
    }
}

static lm *lm_open(const options *o, tern_isa isa, int64_t threads, int training)
{
    const int64_t params = param_count(o), w = o->width;
    lm *m = (lm *)host_alloc(1, sizeof *m);
    tern_context_desc d = TERN_ZERO;
    tern_error e;
    int64_t i;
    m->o = *o;
    m->training = training;
    if (o->cuda) d.backend = gpu();
    else d.isa_max = isa;
    if (threads != 1 && !o->cuda) {
        if (!(m->pool = tern_pool_create((int32_t)threads))) die("cannot start %lld threads", (long long)threads);
        d.parallel = tern_pool_parallel(m->pool);
    }
    if (tern_open(&m->c, &d, &e) != TERN_OK) die("%s", e.text);
    m->params = (tern_param *)host_alloc(params, sizeof *m->params);
    m->biases = (tern_param *)host_alloc(params, sizeof *m->biases);
    m->alphas = (tern_param *)host_alloc(params, sizeof *m->alphas);
    m->items = (tern_param **)host_alloc(3 * params, sizeof *m->items);
    m->experts = (tern_expert *)host_alloc(o->layers * expert_count(o), sizeof *m->experts);
    m->loads = (int64_t *)host_alloc(o->layers * o->experts, sizeof *m->loads);
    m->entropy = (double *)host_alloc(o->layers, sizeof *m->entropy);
    m->blocks = (block *)host_alloc(o->layers, sizeof *m->blocks);
    m->host_ids = (int32_t *)host_alloc(2 * o->batch * o->context, sizeof *m->host_ids);
    m->host_losses = (float *)host_alloc(o->batch * o->context, sizeof *m->host_losses);
    m->host_logits = (float *)host_alloc(o->context * BYTES, sizeof *m->host_logits);
    m->model.items = m->items;
    add_weights(m, "embedding", 0, 0, BYTES, w);
    add_weights(m, "head", 0, 0, BYTES, w);
    for (i = 0; i < o->layers; i++) {
        add_weights(m, "block.%d.qk", i, 0, 2 * w, w);
        add_weights(m, "block.%d.v", i, 0, w, w);
        add_weights(m, "block.%d.o", i, 0, w, w);
        add_mlp(m, i);
    }
    add_vectors(m);
    if (training && o->true_ternary) ok(m, tern_model_strict(m->c, &m->model)); /* no float that is trained */
    m->arenas = training ? (float)o->arenas : 0; /* the most there will be */
    lay_out(m);
    if (!(m->memory = tern_alloc(m->c, m->used))) die("no memory for %zu bytes of activations", m->used);
    lay_out(m);
    return m;
}

static void lm_close(lm *m)
{
    int32_t i;
    for (i = 0; i < m->model.count; i++) tern_param_free(m->c, m->items[i], (1 << TERN_BUFFERS) - 1);
    tern_free(m->c, m->memory);
    tern_close(m->c);
    tern_pool_destroy(m->pool);
    free(m->host_logits);
    free(m->host_losses);
    free(m->host_ids);
    free(m->blocks);
    free(m->entropy);
    free(m->loads);
    free(m->experts);
    free(m->items);
    free(m->alphas);
    free(m->biases);
    free(m->params);
    free(m);
}

/* 1/sqrt(x) by Newton's method, without libm. */
static float inverse_root(double x)
{
    double y = x > 1 ? 1 / x : 1;
    int i;
    for (i = 0; i < 100; i++) y = y * (1.5 - 0.5 * x * y * y);
    return (float)y;
}

/* Every weight from N(0, 1/inputs). */
static void lm_initialise(lm *m)
{
    int64_t largest = 0;
    float *w;
    int32_t i;
    for (i = 0; i < param_count(&m->o); i++)
        if (m->params[i].rows * m->params[i].cols > largest) largest = m->params[i].rows * m->params[i].cols;
    w = (float *)tern_alloc(m->c, (size_t)largest * sizeof *w);
    if (!w) die("no memory for the initial weights");
    for (i = 0; i < param_count(&m->o); i++) {
        tern_param *p = &m->params[i];
        ok(m, tern_fill(m->c, &(tern_fill_args){.count = p->rows * p->cols, .x = w, .deviation = inverse_root((double)p->cols),
                                                .seed = (uint64_t)m->o.seed, .stream = (uint32_t)i}));
        ok(m, tern_param_set(m->c, p, TERN_F32, w));
    }
    tern_free(m->c, w);
}

/* -- forward and backward, side by side -- */

static void linear_forward(lm *m, int64_t param, int64_t n, const float *x, float *y, void *saved)
{
    const tern_linear l = linear(m, param);
    ok(m, tern_linear_forward(m->c, &l, n, x, y, saved));
}

static void linear_backward(lm *m, int64_t param, int64_t n, const float *x, const void *saved, const float *dy, float *dx)
{
    const tern_linear l = linear(m, param);
    ok(m, tern_linear_backward(m->c, &l, n, x, saved, dy, dx));
}

/* y = a + alpha b */
static void add(lm *m, int64_t count, const float *a, float alpha, const float *b, float *y)
{
    ok(m, tern_map(m->c, &(tern_map_args){.fn = TERN_MAP_ADD, .count = count, .a = a, .alpha = alpha, .b = b, .y = y}));
}

/* y = alpha a */
static void scale(lm *m, int64_t count, float alpha, const float *a, float *y)
{
    ok(m, tern_map(m->c, &(tern_map_args){.fn = TERN_MAP_SCALE, .count = count, .alpha = alpha, .a = a, .y = y}));
}

/* Queries and keys of a token lie side by side, so one norm and one rotation serve both. */
static tern_norm_args head_norm(const lm *m, int64_t n, const block *b)
{
    return (tern_norm_args){.n = n * 2 * m->o.heads, .cols = m->o.width / m->o.heads, .x = b->qk, .eps = 1e-6f};
}

static tern_rope_args rotation(const lm *m, int64_t n, int64_t start, int64_t count, float *x)
{
    return (tern_rope_args){.n = n, .heads = (int32_t)(2 * m->o.heads), .dim = (int32_t)(m->o.width / m->o.heads),
                            .x = x, .stride = 2 * m->o.width, .start = start, .period = count};
}

static tern_attention_args attention(const lm *m, const block *b, int64_t batch, int64_t start, int64_t count)
{
    const int64_t w = m->o.width;
    const int32_t heads = (int32_t)m->o.heads;
    return (tern_attention_args){.batch = batch, .queries = count, .keys = start + count,
                                 .heads = heads, .kv_heads = heads, .dim = (int32_t)w / heads,
                                 .q = b->turned + start * 2 * w, .q_stride = 2 * w, .k = b->turned + w, .k_stride = 2 * w,
                                 .v = b->v, .v_stride = w, .y = b->mixed, .p = b->p, .exact = (int32_t)m->o.true_ternary};
}

static float branch_weight(const lm *m) { return inverse_root(2 * (double)m->o.layers); }

/* The mean of k experts, each a stranger to the others, is smaller than one of them by the root of k. */
static float mlp_weight(const lm *m) { return branch_weight(m) / (m->o.experts ? inverse_root((double)m->o.top_k) : 1); }

/* y = down(relu2(up(x))), or what a mixture makes of x. */
static void mlp_forward(lm *m, int64_t layer, int64_t n, const float *x, float *y)
{
    const options *o = &m->o;
    block *b = &m->blocks[layer];
    if (o->experts) {
        const tern_moe moe = mixture(m, layer);
        ok(m, tern_moe_forward(m->c, &moe, n, x, y, b->saved[ROUTER]));
        return;
    }
    linear_forward(m, param_of(o, layer, UP), n, x, b->up, b->saved[UP]);
    ok(m, tern_map(m->c, &(tern_map_args){.fn = TERN_MAP_RELU2, .count = n * 4 * o->width, .a = b->up, .y = b->hidden}));
    linear_forward(m, param_of(o, layer, DOWN), n, b->hidden, y, b->saved[DOWN]);
}

static void mlp_backward(lm *m, int64_t layer, int64_t n, const float *x, const float *dy, float *dx)
{
    const options *o = &m->o;
    const block *b = &m->blocks[layer];
    if (o->experts) {
        const tern_moe moe = mixture(m, layer);
        ok(m, tern_moe_backward(m->c, &moe, n, x, b->saved[ROUTER], dy, dx));
        return;
    }
    linear_backward(m, param_of(o, layer, DOWN), n, b->hidden, b->saved[DOWN], dy, m->dwide);
    ok(m, tern_map(m->c, &(tern_map_args){.fn = TERN_MAP_RELU2, .count = n * 4 * o->width, .a = b->up, .dy = m->dwide, .da = m->dwide}));
    linear_backward(m, param_of(o, layer, UP), n, x, b->saved[UP], m->dwide, dx);
}

/* mid = x + s o(attention(rope(norm(qk(x))), v(x)));  y = mid + s' mlp(mid)
   Keys and values of earlier tokens stay in `turned` and `v`: with start > 0 they are the cache. */
static void block_forward(lm *m, int64_t layer, int64_t batch, int64_t start, int64_t count, float *y)
{
    block *b = &m->blocks[layer];
    const int64_t n = batch * count, w = m->o.width;
    float *turned = b->turned + start * 2 * w;
    tern_norm_args norm = head_norm(m, n, b);
    tern_rope_args rope = rotation(m, n, start, count, turned);
    tern_attention_args attend = attention(m, b, batch, start, count);
    linear_forward(m, param_of(&m->o, layer, QK), n, b->x, b->qk, b->saved[QK]);
    linear_forward(m, param_of(&m->o, layer, V), n, b->x, b->v + start * w, b->saved[V]);
    norm.y = turned;
    ok(m, tern_norm(m->c, &norm));
    ok(m, tern_rope(m->c, &rope));
    ok(m, tern_attention(m->c, &attend));
    linear_forward(m, param_of(&m->o, layer, O), n, b->mixed, m->branch, b->saved[O]);
    add(m, n * w, b->x, branch_weight(m), m->branch, b->mid);
    mlp_forward(m, layer, n, b->mid, m->branch);
    add(m, n * w, b->mid, mlp_weight(m), m->branch, y);
}

/* The same lines from the last to the first; m->dx holds dy on entry and dx on return. */
static void block_backward(lm *m, int64_t layer, int64_t batch)
{
    block *b = &m->blocks[layer];
    const int64_t n = batch * m->o.context, w = m->o.width;
    tern_norm_args norm = head_norm(m, n, b);
    tern_rope_args rope = rotation(m, n, 0, m->o.context, m->dqk);
    tern_attention_args attend = attention(m, b, batch, 0, m->o.context);
    scale(m, n * w, mlp_weight(m), m->dx, m->branch);
    mlp_backward(m, layer, n, b->mid, m->branch, m->dv);
    add(m, n * w, m->dx, 1, m->dv, m->dx);
    scale(m, n * w, branch_weight(m), m->dx, m->branch);
    linear_backward(m, param_of(&m->o, layer, O), n, b->mixed, b->saved[O], m->branch, m->branch);
    attend.dy = m->branch;
    attend.dq = m->dqk;
    attend.dk = m->dqk + w;
    attend.dv = m->dv;
    ok(m, tern_attention(m->c, &attend));
    rope.inverse = 1;
    ok(m, tern_rope(m->c, &rope));
    norm.dy = norm.dx = m->dqk;
    ok(m, tern_norm(m->c, &norm));
    linear_backward(m, param_of(&m->o, layer, V), n, b->x, b->saved[V], m->dv, m->dv);
    add(m, n * w, m->dx, 1, m->dv, m->dx);
    linear_backward(m, param_of(&m->o, layer, QK), n, b->x, b->saved[QK], m->dqk, m->branch);
    add(m, n * w, m->dx, 1, m->branch, m->dx);
}

/* Logits of tokens start .. start + count of each sequence; start > 0 continues a single one. */
static void lm_forward(lm *m, int64_t batch, int64_t start, int64_t count)
{
    const tern_embedding embedding = {&m->params[EMBEDDING]};
    const int64_t n = batch * count;
    int64_t i;
    ok(m, tern_copy(m->c, m->ids, m->host_ids, (size_t)n * sizeof *m->ids, TERN_TO_DEVICE));
    ok(m, tern_embedding_forward(m->c, &embedding, n, m->ids, m->embedded));
    ok(m, tern_norm(m->c, &(tern_norm_args){.n = n, .cols = m->o.width, .x = m->embedded, .eps = 1e-6f, .y = m->blocks[0].x}));
    for (i = 0; i < m->o.layers; i++)
        block_forward(m, i, batch, start, count, i + 1 < m->o.layers ? m->blocks[i + 1].x : m->x);
    linear_forward(m, HEAD, n, m->x, m->logits, m->saved_head);
}

/* From the gradient in m->logits. */
static void lm_backward(lm *m, int64_t batch)
{
    const tern_embedding embedding = {&m->params[EMBEDDING]};
    const int64_t n = batch * m->o.context;
    int64_t i;
    linear_backward(m, HEAD, n, m->x, m->saved_head, m->logits, m->dx);
    for (i = m->o.layers - 1; i >= 0; i--) block_backward(m, i, batch);
    ok(m, tern_norm(m->c, &(tern_norm_args){.n = n, .cols = m->o.width, .x = m->embedded, .eps = 1e-6f, .dy = m->dx, .dx = m->dx}));
    ok(m, tern_embedding_backward(m->c, &embedding, n, m->ids, m->dx));
}

/* Window `slot` of the batch: `context` bytes from `at`, and as targets the bytes after them. */
static void set_window(lm *m, int64_t slot, const unsigned char *at)
{
    const int64_t context = m->o.context;
    int32_t *ids = m->host_ids + slot * context, *targets = ids + m->o.batch * context;
    int64_t i;
    for (i = 0; i < context; i++) {
        ids[i] = at[i];
        targets[i] = at[i + 1];
    }
}

/* Sum of the losses of `batch` windows; leaves the gradient of their part in the mean of a step in m->logits if asked. */
static double lm_loss(lm *m, int64_t batch, int gradient)
{
    const int64_t n = batch * m->o.context;
    double sum = 0;
    int64_t i;
    lm_forward(m, batch, 0, m->o.context);
    ok(m, tern_copy(m->c, m->targets, m->host_ids + m->o.batch * m->o.context, (size_t)n * sizeof *m->targets, TERN_TO_DEVICE));
    ok(m, tern_loss(m->c, &(tern_loss_args){.n = n, .classes = BYTES, .logits = m->logits, .targets = m->targets, .losses = m->losses,
                                            .dlogits = gradient ? m->logits : NULL, .scale = 1.0f / (float)(n * m->o.accumulate)}));
    ok(m, tern_copy(m->c, m->host_losses, m->losses, (size_t)n * sizeof *m->losses, TERN_TO_HOST));
    ok(m, tern_sync(m->c));
    for (i = 0; i < n; i++) sum += m->host_losses[i];
    return sum;
}

/* Counts, besides what was counted since m->counted was 0, the tokens of each expert in the last forward. */
static void count_loads(lm *m, int64_t n)
{
    const int64_t experts = m->o.experts;
    tern_moe_report report;
    int64_t i;
    if (m->counted == 0) {
        memset(m->loads, 0, (size_t)(m->o.layers * experts) * sizeof *m->loads);
        memset(m->entropy, 0, (size_t)m->o.layers * sizeof *m->entropy);
    }
    m->counted += n;
    for (i = 0; i < m->o.layers; i++) {
        const tern_moe moe = mixture(m, i);
        ok(m, tern_moe_stats(m->c, &moe, n, m->blocks[i].saved[ROUTER], m->loads + i * experts, &report));
        m->entropy[i] += (double)n * report.entropy;
    }
}

/* ln x of 0 < x <= 1, without libm: halves, and the series of 2 atanh((x - 1) / (x + 1)). */
static double natural_log(double x)
{
    double y = 0, z, power;
    int i;
    for (; x < 0.5; x *= 2) y -= 0.69314718055994531;
    for (z = power = (x - 1) / (x + 1), i = 1; i < 40; i += 2, power *= z * z) y += 2 * power / i;
    return y;
}

/* Of what was counted in a block: the least and the most load, where 1 is an even share, and the entropy of the loads in nats. */
typedef struct spread { double least, most, entropy; } spread;

static spread spread_of(const lm *m, int64_t layer)
{
    const double even = (double)(m->counted * m->o.top_k) / (double)m->o.experts;
    spread s = {(double)m->o.experts, 0, 0};
    int64_t i;
    for (i = 0; i < m->o.experts; i++) {
        const double load = (double)m->loads[layer * m->o.experts + i] / even, part = load / (double)m->o.experts;
        if (load < s.least) s.least = load;
        if (load > s.most) s.most = load;
        if (part > 0) s.entropy -= part * natural_log(part);
    }
    return s;
}

/* Mean loss, in nats per byte, over `windows` of the validation text's disjoint windows, evenly spread. */
static double lm_validate(lm *m, const text *t, int64_t windows)
{
    double sum = 0;
    int64_t at, i, batch;
    m->counted = 0;
    for (at = 0; at < windows; at += batch) {
        batch = windows - at < m->o.batch ? windows - at : m->o.batch;
        for (i = 0; i < batch; i++) set_window(m, i, t->bytes + t->train + (at + i) * t->windows / windows * m->o.context);
        sum += lm_loss(m, batch, 0);
        if (m->o.experts) count_loads(m, batch * m->o.context);
    }
    return sum / (double)(windows * m->o.context);
}

/* -- training -- */

enum { POINTS = 400, VALIDATIONS = 10, GLANCE = 120 }; /* GLANCE: windows of every validation but the last */
typedef struct curve { char name[80]; double train[POINTS], validation[VALIDATIONS + 1]; int64_t in_point[POINTS], points, steps; } curve;

/* Where a training is after a step. */
typedef struct place {
    int64_t step;
    uint64_t random;
    double smooth, flipped; /* running means of the loss and of the trits that change in a step */
    tern_flips flips;       /* of all steps */
    tern_pace pace;
    curve c;
} place;

/* x, as a mean that follows it, from the first on. */
static double follow(double mean, double x, int64_t step) { return step == 1 ? x : mean + 0.05 * (x - mean); }

/* A tenth of the steps, at most 100. */
static uint32_t warmup(const options *o) { return (uint32_t)(o->steps < 1000 ? o->steps / 10 : 100); }

/* Up in the warm-up, and down to a tenth of the rate. */
static float rate_at(const lm *m, int64_t step)
{
    const options *o = &m->o;
    const tern_schedule s = {(tern_schedule_kind)o->schedule, (float)o->rate, 0.1f * (float)o->rate, warmup(o), (uint32_t)(o->steps / 5),
                             (uint32_t)o->steps};
    float rate;
    ok(m, tern_schedule_rate(m->c, &s, (uint32_t)step, &rate));
    return rate;
}

/* What helps the training alone: up and down with the rate, but to exactly 0, a tenth of the steps before the end. */
static float fading_at(const lm *m, double peak, int64_t step)
{
    const tern_schedule s = {TERN_COSINE, (float)peak, 0, warmup(&m->o), 0, (uint32_t)(m->o.steps - m->o.steps / 10)};
    float now;
    ok(m, tern_schedule_rate(m->c, &s, (uint32_t)step, &now));
    return now;
}

static void fade(lm *m, int64_t step)
{
    const float noise = fading_at(m, m->o.noise, step);
    int32_t i;
    m->arenas = fading_at(m, m->o.arenas, step);
    for (i = 0; i < param_count(&m->o); i++) m->params[i].noise = m->params[i].zone = noise;
}

/* What a mean gradient pushes an accumulator; at the end nothing flips any more. */
static float push_at(const lm *m, int64_t step)
{
    const options *o = &m->o;
    const tern_schedule s = {(tern_schedule_kind)o->schedule, (float)o->push, 0, 0, (uint32_t)(o->steps / 5), (uint32_t)o->steps};
    float push;
    ok(m, tern_schedule_rate(m->c, &s, (uint32_t)step, &push));
    return push;
}

/* The part of a step that true-ternary training decides. */
static void step_flips(lm *m, place *at, double loss, tern_step *s)
{
    ok(m, tern_copy(m->c, m->flips, &at->flips, sizeof *m->flips, TERN_TO_DEVICE));
    s->flip = (tern_flip_rule)m->o.flips;
    s->push = push_at(m, at->step);
    ok(m, tern_sign_step(m->c, &at->pace, (float)loss, &s->sign_step));
    s->flips = m->flips;
}

static void count_flips(lm *m, place *at)
{
    const int64_t before = at->flips.flips;
    ok(m, tern_copy(m->c, &at->flips, m->flips, sizeof *m->flips, TERN_TO_HOST));
    at->flipped = follow(at->flipped, (double)(at->flips.flips - before), at->step);
}

static double train_step(lm *m, const text *t, place *at)
{
    const int64_t batch = m->o.batch;
    tern_step s = {.optimizer = TERN_ADAMW, .decay = (float)m->o.decay, .clip = 1, .seed = (uint64_t)m->o.seed};
    double sum = 0;
    int64_t i, k;
    fade(m, ++at->step);
    for (k = 0; k < m->o.accumulate; k++) {
        uint64_t backward = (uint64_t)m->o.seed << 40 ^ (uint64_t)(at->step * m->o.accumulate + k);
        m->rounding = random_bits(&backward);
        for (i = 0; i < batch; i++) set_window(m, i, t->bytes + random_bits(&at->random) % (uint64_t)(t->train - m->o.context));
        sum += lm_loss(m, batch, 1);
        lm_backward(m, batch);
    }
    sum /= (double)(m->o.accumulate * batch * m->o.context);
    s.step = (uint32_t)at->step;
    s.rate = rate_at(m, at->step);
    if (m->o.true_ternary) step_flips(m, at, sum, &s);
    ok(m, tern_model_step(m->c, &m->model, &s));
    if (m->o.true_ternary) count_flips(m, at);
    return sum;
}

/* -- the state of a training: a head in this machine's bytes, then the model with all that trains -- */

typedef struct head { char magic[8]; options o; uint64_t text; place at; } head;

static FILE *create(const options *o, const char *name)
{
    char path[1024];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", o->out, name);
    if (!(f = fopen(path, "wb"))) die("cannot write %s", path);
    return f;
}

static int write_bytes(void *file, const void *data, size_t bytes) { return fwrite(data, 1, bytes, (FILE *)file) != bytes; }

static head head_of(const lm *m, const text *t)
{
    head h = {.magic = "lmstate", .o = m->o, .text = UINT64_C(14695981039346656037)};
    int64_t i;
    memset(&h.o, 0, offsetof(options, layers)); /* what may differ */
    for (i = 0; i < t->train + t->validate; i++) h.text = (h.text ^ t->bytes[i]) * UINT64_C(1099511628211);
    return h;
}

/* Written beside its place and then moved there: a state that is there is whole. */
static void save_state(lm *m, const text *t, const place *at)
{
    FILE *f = create(&m->o, "training.new");
    const tern_sink sink = {write_bytes, f};
    head h = head_of(m, t);
    char from[1024], to[1024];
    h.at = *at;
    if (write_bytes(f, &h, sizeof h)) die("cannot write %s/training.new", m->o.out);
    ok(m, tern_model_save(m->c, &m->model, TERN_FOR_TRAINING, &sink));
    snprintf(from, sizeof from, "%s/training.new", m->o.out);
    snprintf(to, sizeof to, "%s/training.state", m->o.out);
    if (fclose(f) || rename(from, to)) die("cannot write %s", to);
}

static void load_state(lm *m, const text *t, place *at)
{
    const head want = head_of(m, t);
    head h;
    FILE *f = fopen(m->o.resume, "rb");
    int64_t size = -1;
    unsigned char *bytes;
    if (f && !fseek(f, 0, SEEK_END)) size = (int64_t)ftell(f) - (int64_t)sizeof h;
    if (size < 0) die("%s is not a state of a training", m->o.resume);
    rewind(f);
    bytes = (unsigned char *)host_alloc(size + 1, 1);
    if (fread(&h, sizeof h, 1, f) != 1 || (int64_t)fread(bytes, 1, (size_t)size, f) != size) die("cannot read %s", m->o.resume);
    if (memcmp(h.magic, want.magic, sizeof h.magic)) die("%s is not a state of a training", m->o.resume);
    if (memcmp(&h.o, &want.o, sizeof h.o)) die("%s is of a training with other options; give those that it began with", m->o.resume);
    if (h.text != want.text) die("%s is of a training on another text than %s", m->o.resume, m->o.text);
    ok(m, tern_model_load(m->c, &m->model, bytes, (size_t)size));
    *at = h.at;
    free(bytes);
    fclose(f);
}

/* The first SIGINT or SIGTERM waits for its step to end; a second one does not. */
static volatile sig_atomic_t stopped;
static void stop(int number) { stopped = number; }

static void on_signals(void (*handler)(int))
{
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = handler;
    a.sa_flags = (int)SA_RESETHAND;
    sigaction(SIGINT, &a, NULL);
    sigaction(SIGTERM, &a, NULL);
}

/* Of the experts of all blocks in the last batch. */
static void print_loads(lm *m)
{
    spread all = {(double)m->o.experts, 0, 0};
    int64_t i;
    m->counted = 0;
    count_loads(m, m->o.batch * m->o.context);
    for (i = 0; i < m->o.layers; i++) {
        const spread s = spread_of(m, i);
        if (s.least < all.least) all.least = s.least;
        if (s.most > all.most) all.most = s.most;
        all.entropy += s.entropy / (double)m->o.layers;
    }
    printf("loads %.2f to %.2f, entropy %.2f   ", all.least, all.most, all.entropy);
}

/* One line that changes in place on a terminal, a line now and then elsewhere. */
static void progress(lm *m, const place *at, int64_t done, double elapsed)
{
    static double shown = -1;
    const options *o = &m->o;
    const int64_t step = at->step;
    const int terminal = isatty(STDOUT_FILENO), sparse = step % (o->steps / 20 + 1) == 0 || step == o->steps;
    const double left = elapsed / (double)done * (double)(o->steps - step);
    if (terminal ? elapsed - shown < 0.1 && step < o->steps : !sparse) return;
    shown = elapsed;
    printf("%sstep %lld of %lld   loss %.3f   ", terminal ? "\r" : "", (long long)step, (long long)o->steps, at->smooth);
    if (o->true_ternary) printf("%.0f flips/step   ", at->flipped);
    if (o->experts) print_loads(m);
    printf("%.0f tokens/s   %d:%02d left%s",
           (double)(done * o->accumulate * o->batch * o->context) / elapsed, (int)left / 60, (int)left % 60, terminal ? "\033[K" : "\n");
    fflush(stdout);
}

static void name_curve(const options *o, char *name, size_t size)
{
    const int used = snprintf(name, size, "%s weights", o->rule == TERN_DENSE ? "float" : o->true_ternary ? "true-ternary" : "ternary");
    if (!o->experts) return;
    snprintf(name + used, size - (size_t)used, ", %lld of %lld experts%s",
             (long long)o->top_k, (long long)o->experts, o->shared ? " and one" : "");
}

/* From where it is to the last step, or to one at which it is stopped. */
static void train(lm *m, const text *t, place *at)
{
    const int64_t steps = m->o.steps, glance = t->windows < GLANCE ? t->windows : GLANCE, begun = at->step;
    const double start = seconds();
    curve *c = &at->c;
    double paused;
    int64_t k;
    if (at->step == 0) {
        at->random = (uint64_t)m->o.seed;
        name_curve(&m->o, c->name, sizeof c->name);
        c->steps = steps;
        c->points = steps < POINTS ? steps : POINTS;
        c->validation[0] = lm_validate(m, t, glance);
    }
    paused = seconds() - start;
    while (at->step < steps && (at->step == 0 || (at->step != m->o.stop && !stopped))) {
        const double loss = train_step(m, t, at);
        k = (at->step - 1) * c->points / steps;
        c->train[k] += (loss - c->train[k]) / (double)++c->in_point[k];
        at->smooth = follow(at->smooth, loss, at->step);
        progress(m, at, at->step - begun, seconds() - start - paused);
        k = at->step * VALIDATIONS / steps;
        if (k > (at->step - 1) * VALIDATIONS / steps) {
            const double now = seconds();
            c->validation[k] = lm_validate(m, t, at->step < steps ? glance : t->windows);
            paused += seconds() - now;
        }
    }
    if (isatty(STDOUT_FILENO)) printf("\n");
}

/* -- the loss curve, as a table and as SVG -- */

static double train_at(const curve *c, int64_t i) { return ((double)i + 0.5) * (double)c->steps / (double)c->points; } /* a step */
static double validation_at(const curve *c, int64_t i) { return (double)i * (double)c->steps / VALIDATIONS; }

static void write_curve(const options *o, const curve *c)
{
    FILE *f = create(o, "loss.csv");
    int64_t i;
    fprintf(f, "# %s\ncurve,step,loss\n", c->name);
    for (i = 0; i < c->points; i++) fprintf(f, "training,%.1f,%.4f\n", train_at(c, i), c->train[i]);
    for (i = 0; i <= VALIDATIONS; i++) fprintf(f, "validation,%.1f,%.4f\n", validation_at(c, i), c->validation[i]);
    if (fclose(f)) die("cannot write %s/loss.csv", o->out);
}

/* What write_curve wrote; its first line names it. */
static curve read_curve(const char *path)
{
    FILE *f = fopen(path, "rb");
    curve c;
    char line[160];
    double step = 0, loss = 0;
    int64_t validations = 0;
    memset(&c, 0, sizeof c);
    if (!f || !fgets(line, sizeof line, f) || sscanf(line, "# %79[-A-Za-z0-9 ,.]", c.name) != 1)
        die("%s is not the loss.csv of a training", path);
    while (fgets(line, sizeof line, f)) {
        const int train = sscanf(line, "training,%lf,%lf", &step, &loss) == 2,
                  validation = sscanf(line, "validation,%lf,%lf", &step, &loss) == 2;
        if (!(step >= 0 && step < 1e9 && loss >= 0 && loss < 1e3) || c.points + train > POINTS
            || validations + validation > VALIDATIONS + 1)
            break;
        if (train) c.train[c.points++] = loss;
        if (validation) c.validation[validations++] = loss;
    }
    c.steps = (int64_t)step;
    if (!feof(f) || c.points == 0 || c.steps == 0 || validations != VALIDATIONS + 1) die("%s is not the loss.csv of a training", path);
    fclose(f);
    return c;
}

enum { WIDTH = 760, HEIGHT = 440, LEFT = 64, RIGHT = 24, TOP = 56, BOTTOM = 56 };

/* 1, 2 or 5 times a power of ten, so that the range takes at most `most` ticks. */
static double tick(double range, int most)
{
    static const double next[3] = {2, 2.5, 2};
    double step = 0.001;
    int i;
    for (i = 0; range / step > most; i = (i + 1) % 3) step *= next[i];
    return step;
}

typedef struct axes { double low, high, steps; } axes;

static void take_in(axes *a, const curve *c)
{
    int64_t i;
    if (a->steps < (double)c->steps) a->steps = (double)c->steps;
    for (i = 0; i < c->points + VALIDATIONS + 1; i++) {
        const double loss = i < c->points ? c->train[i] : c->validation[i - c->points];
        if (loss < a->low) a->low = loss;
        if (loss > a->high) a->high = loss;
    }
}

static axes axes_of(const curve *c, const curve *beside)
{
    axes a = {c->validation[0], c->validation[0], 0};
    double unit;
    take_in(&a, c);
    if (beside) take_in(&a, beside);
    unit = tick(a.high - a.low, 8);
    a.low = (double)(int64_t)(a.low / unit) * unit;
    a.high = (double)((int64_t)(a.high / unit) + 1) * unit;
    return a;
}

static double x_of(const axes *a, double step) { return LEFT + (WIDTH - LEFT - RIGHT) * step / a->steps; }
static double y_of(const axes *a, double loss) { return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - a->low) / (a->high - a->low); }

static void draw_axes(FILE *f, const axes *a)
{
    const double dx = tick(a->steps, 8), dy = tick(a->high - a->low, 8);
    int i;
    for (i = 0; a->low + i * dy < a->high + dy / 2; i++)
        fprintf(f, "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>"
                   "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                LEFT, WIDTH - RIGHT, y_of(a, a->low + i * dy), y_of(a, a->low + i * dy),
                LEFT - 8, y_of(a, a->low + i * dy) + 4, a->low + i * dy);
    for (i = 0; i * dx < a->steps + dx / 100; i++)
        fprintf(f, "<line class=\"axis\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%d\" y2=\"%d\"/>"
                   "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.0f</text>\n",
                x_of(a, i * dx), x_of(a, i * dx), HEIGHT - BOTTOM, HEIGHT - BOTTOM + 5, x_of(a, i * dx), HEIGHT - BOTTOM + 20, i * dx);
    fprintf(f, "<path class=\"axis\" d=\"M%d %dV%dH%d\"/>\n", LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT);
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">training step</text>\n", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14);
    fprintf(f, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">loss in nats per byte</text>\n",
            (TOP + HEIGHT - BOTTOM) / 2);
}

/* `other`: drawn as the curve beside the one that this picture is of. */
static void draw_curve(FILE *f, const axes *a, const curve *c, const char *other)
{
    int64_t i;
    fprintf(f, "<path class=\"train%s\" d=\"", other);
    for (i = 0; i < c->points; i++) fprintf(f, "%c%.1f %.1f", i ? 'L' : 'M', x_of(a, train_at(c, i)), y_of(a, c->train[i]));
    fprintf(f, "\"/>\n<path class=\"validation%s\" d=\"", other);
    for (i = 0; i <= VALIDATIONS; i++) fprintf(f, "%c%.1f %.1f", i ? 'L' : 'M', x_of(a, validation_at(c, i)), y_of(a, c->validation[i]));
    fprintf(f, "\"/>\n");
    for (i = 0; i <= VALIDATIONS; i++)
        fprintf(f, "<circle class=\"dot%s\" r=\"3.5\" cx=\"%.1f\" cy=\"%.1f\"/>\n",
                other, x_of(a, validation_at(c, i)), y_of(a, c->validation[i]));
}

/* A line of the legend. */
static void draw_key(FILE *f, int line, const char *class, const char *label)
{
    fprintf(f, "<path class=\"%s\" d=\"M%d %dh28\"/><text x=\"%d\" y=\"%d\">%s</text>\n",
            class, WIDTH - 470, 76 + 20 * line, WIDTH - 434, 80 + 20 * line, label);
}

/* beside: of another training, or NULL. */
static void draw(const options *o, const curve *c, const curve *beside)
{
    const axes a = axes_of(c, beside);
    FILE *f = create(o, "loss.svg");
    char label[160];
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n"
               "<style>text{fill:#444}.grid{stroke:#e6e6e6}.axis{stroke:#888;fill:none}.train{stroke:#9bbfe0;fill:none;stroke-width:1.5}"
               ".validation{stroke:#c0392b;fill:none;stroke-width:2}.dot{fill:#c0392b}", WIDTH, HEIGHT);
    if (beside) fprintf(f, ".train.other{stroke:#d8d8d8}.validation.other{stroke:#555;stroke-dasharray:6 4}.dot.other{fill:#555}");
    fprintf(f, "</style>\n<rect width=\"%d\" height=\"%d\" rx=\"8\" fill=\"#fff\"/>\n", WIDTH, HEIGHT);
    fprintf(f, "<text x=\"%d\" y=\"32\" font-size=\"%d\" style=\"fill:#111\">Byte-level language model with %s: %.3f nats",
            LEFT, o->experts ? 15 : 17, c->name, c->validation[VALIDATIONS]);
    if (!o->experts) fprintf(f, " after %lld steps", (long long)c->steps);
    fprintf(f, "</text>\n");
    draw_axes(f, &a);
    if (beside) draw_curve(f, &a, beside, " other");
    draw_curve(f, &a, c, "");
    snprintf(label, sizeof label, "training, mean of %lld windows a step", (long long)(o->batch * o->accumulate));
    draw_key(f, 0, "train", label);
    snprintf(label, sizeof label, "validation, last tenth of the text (%d windows; at the end all)", GLANCE);
    draw_key(f, 1, "validation", label);
    if (beside) {
        snprintf(label, sizeof label, "training with %s", beside->name);
        draw_key(f, 2, "train other", label);
        snprintf(label, sizeof label, "validation with %s: %.3f nats after %lld steps",
                 beside->name, beside->validation[VALIDATIONS], (long long)beside->steps);
        draw_key(f, 3, "validation other", label);
    }
    fprintf(f, "</svg>\n");
    if (fclose(f)) die("cannot write %s/loss.svg", o->out);
}

/* -- talking -- */

/* Draws a byte from softmax(logits / 0.8) of a row: the gradient of the loss is softmax - onehot. */
static int sample(lm *m, int64_t row, uint64_t *random)
{
    const double u = (double)(random_bits(random) >> 11) / 9007199254740992.0;
    const int32_t target = 0;
    float *logits = m->logits + row * BYTES, *p = m->host_logits;
    double sum = 0;
    int i;
    ok(m, tern_copy(m->c, m->targets, &target, sizeof target, TERN_TO_DEVICE));
    scale(m, BYTES, 1 / 0.8f, logits, logits);
    ok(m, tern_loss(m->c, &(tern_loss_args){.n = 1, .classes = BYTES, .logits = logits, .targets = m->targets, .losses = m->losses,
                                            .dlogits = logits, .scale = 1}));
    ok(m, tern_copy(m->c, p, logits, BYTES * sizeof *p, TERN_TO_HOST));
    ok(m, tern_sync(m->c));
    p[target] += 1;
    for (i = 0; i < BYTES - 1 && (sum += p[i]) <= u; i++) {}
    return i;
}

/* Writes `count` bytes, one forward of one token each. A full cache starts again from its last half. */
static void talk(lm *m, int64_t count)
{
    const int64_t context = m->o.context;
    unsigned char *said = (unsigned char *)host_alloc(count + 1, 1);
    uint64_t random = (uint64_t)m->o.seed + 1;
    int64_t i, k, cached = 0, fresh = 1;
    said[0] = '\n';
    for (i = 1; i <= count; i++) {
        if (cached + fresh > context) {
            cached = 0;
            fresh = context / 2;
        }
        for (k = 0; k < fresh; k++) m->host_ids[k] = said[i - fresh + k];
        lm_forward(m, 1, cached, fresh);
        said[i] = (unsigned char)sample(m, fresh - 1, &random);
        putchar(said[i] < ' ' && said[i] != '\n' && said[i] != '\t' ? ' ' : said[i]);
        fflush(stdout);
        cached += fresh;
        fresh = 1;
    }
    printf("\n\n");
    free(said);
}

/* -- the closing table -- */

/* FNV-1a over the bits of the first `rows` rows of logits. */
static uint64_t hash_logits(lm *m, uint64_t h, int64_t rows)
{
    int64_t i;
    ok(m, tern_copy(m->c, m->host_logits, m->logits, (size_t)(rows * BYTES) * sizeof *m->host_logits, TERN_TO_HOST));
    for (i = 0; i < rows * BYTES; i++) {
        uint32_t bits;
        memcpy(&bits, &m->host_logits[i], sizeof bits);
        h = (h ^ bits) * UINT64_C(1099511628211);
    }
    return h;
}

typedef struct speed { double batched, single; uint64_t hash; int same; } speed;

/* Logits of a validation window, computed within a batch and then byte by byte; both are timed. */
static speed measure(lm *m, const text *t)
{
    const uint64_t basis = UINT64_C(14695981039346656037);
    const int64_t context = m->o.context, batch = t->windows < m->o.batch ? t->windows : m->o.batch;
    const unsigned char *window = t->bytes + t->train;
    speed s = {0, 0, basis, 0};
    uint64_t single = basis;
    double start;
    int64_t i, tokens = 0;
    for (i = 0; i < batch; i++) set_window(m, i, window + i * context);
    for (start = seconds(); tokens == 0 || seconds() - start < 0.3; tokens += batch * context) {
        lm_forward(m, batch, 0, context);
        ok(m, tern_sync(m->c));
    }
    s.batched = (double)tokens / (seconds() - start);
    s.hash = hash_logits(m, s.hash, context);
    start = seconds();
    for (i = 0; i < context; i++) {
        m->host_ids[0] = window[i];
        lm_forward(m, 1, i, 1);
        single = hash_logits(m, single, 1);
    }
    s.single = (double)context / (seconds() - start);
    s.same = single == s.hash;
    return s;
}

enum { REPEATED = 2 }; /* steps */

static int hash_bytes(void *hash, const void *data, size_t bytes)
{
    uint64_t h = *(uint64_t *)hash;
    size_t i;
    for (i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)data)[i]) * UINT64_C(1099511628211);
    *(uint64_t *)hash = h;
    return 0;
}

/* The hash of the state after the first steps of the training: trits, scales and accumulators. */
static uint64_t repeat_training(const options *o, const text *t, tern_isa isa, int threads)
{
    uint64_t hash = UINT64_C(14695981039346656037);
    const tern_sink sink = {hash_bytes, &hash};
    lm *m = lm_open(o, isa, threads, 1);
    place at;
    memset(&at, 0, sizeof at);
    at.random = (uint64_t)o->seed;
    lm_initialise(m);
    while (at.step < REPEATED) train_step(m, t, &at);
    ok(m, tern_model_save(m->c, &m->model, TERN_FOR_TRAINING, &sink));
    lm_close(m);
    return hash;
}

/* A line of the table, for the weights of a file or (path NULL) untrained ones. */
static speed print_speed(const options *o, const text *t, tern_isa isa, int threads, const char *path)
{
    lm *m = lm_open(o, isa, threads, 0);
    speed s;
    if (path) ok(m, tern_model_load_file(m->c, &m->model, path));
    else lm_initialise(m);
    s = measure(m, t);
    printf("%-8s %-12s %7d  %19.0f  %10.0f  ",
           o->rule == TERN_DENSE ? "float" : "ternary", tern_backend_name(m->c), threads, s.batched, s.single);
    lm_close(m);
    return s;
}

/* A line with its hashes; 1 if they are those of the line before, which are in `last`. */
static int compare(const options *o, const text *t, tern_isa isa, int threads, const char *path, uint64_t last[2])
{
    const speed s = print_speed(o, t, isa, threads, path);
    const uint64_t hash[2] = {s.hash, o->true_ternary ? repeat_training(o, t, isa, threads) : 0};
    const int same = s.same && (last[0] == 0 || memcmp(hash, last, sizeof hash) == 0);
    memcpy(last, hash, sizeof hash);
    printf("%016llx", (unsigned long long)hash[0]);
    if (o->true_ternary) printf("    %016llx", (unsigned long long)hash[1]);
    printf("%s\n", same ? "" : " DIFFERENT");
    return same;
}

/* The best tier of this CPU that the environment allows. */
static const char *best_tier(void)
{
    tern_context *c;
    tern_error e;
    const char *name;
    if (tern_open(&c, NULL, &e) != TERN_OK) die("%s", e.text);
    name = tern_backend_name(c);
    tern_close(c);
    return name;
}

/* Runs the file on the GPU, if it was trained there, and on every tier of the CPU, with one and two threads; 1 if all
   logits have the same bits, and true-ternary training has too. */
static int compare_tiers(const options *o, const text *t, const char *path)
{
    const char *best = best_tier();
    options cpu = *o;
    uint64_t hash[2] = {0, 0};
    int all = 1, isa, threads, last = 0;
    cpu.cuda = 0;
    printf("weights  tier         threads  tokens/s in batches  one by one  hash of the logits%s\n",
           o->true_ternary ? "  of training's first steps" : "");
    if (o->cuda) all = compare(o, t, TERN_ISA_BEST, 1, path, hash);
    for (isa = TERN_ISA_SCALAR; !last; isa++) {
        const tern_backend *tier = tern_cpu_backend((tern_isa)isa);
        last = tier && !strcmp(tier->name, best);
        for (threads = 1; tier && threads <= 2; threads++) all &= compare(&cpu, t, (tern_isa)isa, threads, path, hash);
    }
    if (o->rule != TERN_DENSE) {
        cpu.rule = TERN_DENSE;
        cpu.rotate = cpu.true_ternary = 0;
        cpu.scales = TERN_F32;
        cpu.tequila = cpu.rho = 0;
        print_speed(&cpu, t, TERN_ISA_BEST, 2, NULL);
        printf("(untrained, for its speed)\n");
    }
    return all;
}

static void print_sizes(const tern_audit *trained, const tern_audit *packed, const tern_audit *running, const place *at)
{
    const double n = (double)trained->weights;
    const double weights = (double)trained->bytes[TERN_SHADOW] / n, gradient = (double)trained->bytes[TERN_GRAD] / n;
    const double moments = (double)(trained->bytes[TERN_MOMENT1] + trained->bytes[TERN_MOMENT2]) / n;
    const double trits = (double)(trained->bytes[TERN_TRITS] + trained->bytes[TERN_SCALES]) / n;
    const double accumulators = (double)trained->bytes[TERN_ACCUM] / n;
    printf("parameters       %lld, %lld of them ternary\n", (long long)trained->weights, (long long)trained->ternary);
    printf("bytes            %.0f as float", 4 * n);
    if (trained->ternary)
        printf(", %zu packed in base 3 (%.2f bits per weight), %zu in the 2-bit panels it runs in (%.2f)", packed->packed_bytes,
               8 * (double)packed->packed_bytes / n, running->packed_bytes, 8 * (double)running->packed_bytes / n);
    if (!trained->bytes[TERN_ACCUM]) {
        printf("\ntraining state   %.3f bytes per weight: weights %.3f, moments %.3f, gradient %.3f, trits and scales %.3f\n",
               weights + moments + gradient + trits, weights, moments, gradient, trits);
        return;
    }
    printf("\ntraining state   %.3f bytes per weight: trits and scales %.3f, accumulators %.3f; while a step runs gradients of %.3f more\n"
           "trained floats   %lld; %lld that stay, %lld that end with a step (gradients)\n",
           trits + accumulators, trits, accumulators, gradient, (long long)trained->trainable_floats, (long long)trained->persistent_floats,
           (long long)trained->transient_floats);
    printf("flips            %lld, %.2f per weight; %.4f of a step's weights held at the threshold; %lld of %lld updates skipped\n",
           (long long)at->flips.flips, (double)at->flips.flips / n, (double)at->flips.saturated / n / (double)at->step,
           (long long)at->flips.skipped, (long long)(at->flips.updates + at->flips.skipped));
}

/* Who was chosen in a validation. */
static void print_experts(const lm *m, int64_t parameters)
{
    const options *o = &m->o;
    int64_t i;
    printf("experts          %lld of width %lld in each block, %lld%s for a byte, for which %lld parameters work\n", (long long)o->experts,
           (long long)o->expert_width, (long long)o->top_k, o->shared ? " and one more" : "",
           (long long)(parameters - o->layers * (o->experts - o->top_k) * 2 * o->expert_width * o->width));
    for (i = 0; i < o->layers; i++) {
        const spread s = spread_of(m, i);
        printf("block %-3lld        loads from %.3f to %.3f of an even share, their entropy %.3f of %.3f, that of a byte's choice %.3f\n",
               (long long)i, s.least, s.most, s.entropy, 0 - natural_log(1 / (double)o->experts), m->entropy[i] / (double)m->counted);
    }
}

/* Drops what only training needs, learned scales among it, and saves the rest. */
static void freeze(lm *m, const char *path, tern_audit *trained, tern_audit *packed)
{
    int32_t i;
    ok(m, tern_model_audit(m->c, &m->model, trained));
    for (i = 0; i < m->model.count; i++) tern_param_free(m->c, m->items[i], TERN_FOR_TRAINING);
    for (i = 0; i < param_count(&m->o); i++) {
        if (!m->params[i].alpha) continue;
        tern_param_free(m->c, m->params[i].alpha, 1 << TERN_SHADOW);
        m->params[i].alpha = NULL;
        m->model.count--;
    }
    ok(m, tern_model_audit(m->c, &m->model, packed));
    ok(m, tern_model_save_file(m->c, &m->model, 0, path));
}

static void print_resume(const options *o, const place *at, int count, char **words)
{
    int i;
    printf("Stopped after step %lld of %lld. To go on:\n ", (long long)at->step, (long long)o->steps);
    for (i = 0; i < count; i++)
        if (!strcmp(words[i], "--resume") || !strcmp(words[i], "--stop")) i++;
        else printf(" %s", words[i]);
    printf(" --resume %s/training.state\n", o->out);
}

int main(int count, char **words)
{
    const options o = parse(count, words);
    const text t = read_text(&o);
    lm *m = lm_open(&o, TERN_ISA_BEST, o.threads, 1);
    const curve beside = o.beside ? read_curve(o.beside) : (curve){.points = 0};
    tern_audit trained, packed, running;
    char path[1024];
    place at;
    double loss;
    int same;

    on_signals(stop);
    printf("%s: %lld bytes to learn from, %lld windows of %lld to validate; tier %s, seed %lld\n",
           o.text, (long long)t.train, (long long)t.windows, (long long)o.context, tern_backend_name(m->c), (long long)o.seed);
    fflush(stdout);
    memset(&at, 0, sizeof at);
    if (o.resume) load_state(m, &t, &at);
    else lm_initialise(m);
    train(m, &t, &at);
    on_signals(SIG_DFL);
    if (at.step < o.steps) {
        save_state(m, &t, &at);
        lm_close(m);
        free(t.bytes);
        print_resume(&o, &at, count, words);
        return stopped ? 128 + stopped : 0;
    }
    write_curve(&o, &at.c);
    draw(&o, &at.c, o.beside ? &beside : NULL);
    snprintf(path, sizeof path, "%s/model.gguf", o.out);
    freeze(m, path, &trained, &packed);
    lm_close(m);

    m = lm_open(&o, TERN_ISA_BEST, o.threads, 0);
    ok(m, tern_model_load_file(m->c, &m->model, path));
    ok(m, tern_model_audit(m->c, &m->model, &running));
    loss = lm_validate(m, &t, t.windows);
    printf("Wrote %s/loss.svg and %s. The file says:\n\n", o.out, path);
    talk(m, o.generate);
    print_sizes(&trained, &packed, &running, &at);
    if (o.experts) print_experts(m, trained.weights);
    lm_close(m);
    same = memcmp(&loss, &at.c.validation[VALIDATIONS], sizeof loss) == 0;
    printf("validation loss  %.4f nats per byte in training (%a), %.4f reloaded (%a): %s\n\n",
           at.c.validation[VALIDATIONS], at.c.validation[VALIDATIONS], loss, loss, same ? "equal" : "DIFFERENT");
    same &= compare_tiers(&o, &t, path);
    printf("%s\n", same ? "All the same bits." : "The bits are DIFFERENT.");
    free(t.bytes);
    return !same;
}
