/* Fine-tuning of packed weights: a ternary network learns upright digits and is frozen to packed trits; then it learns
   digits that are turned by an angle in two ways, by LoRA (a low-rank update in float beside the trits) and, for comparison,
   by training all weights (straight-through, from shadows that begin at trit times scale). The LoRA model is kept as
   it is and merged into the trits; both files are reloaded and must give the same bits.

       cc -O2 -I. examples/finetune.c -o finetune -pthread
       ./finetune                  digits that the program draws itself
       ./finetune --data DIR       MNIST: the four idx files in DIR, uncompressed
       ./finetune --sweep          ranks 4 to 64 and three seeds: a table and a picture, finetune.svg

   With an NVIDIA GPU, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       cc -O2 -I. -DUSE_CUDA examples/finetune.c build/ternary_cuda.o -o build/finetune_cuda -lcudart -lstdc++ -pthread
       build/finetune_cuda --cuda  trains on the first GPU; the CPU then finds the same bits in the packed files

   The files go into build/, where there is one; --base FILE takes a network that another run kept as finetune_base.gguf. */

#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SIDE = 28, PIXELS = SIDE * SIDE, CLASSES = 10, HIDDEN = 256, LAYERS = 3, BATCH = 128, RANKS = 5, SEEDS = 3 };
static const int64_t widths[LAYERS + 1] = {PIXELS, HIDDEN, HIDDEN, CLASSES};
static const int ranks[RANKS] = {4, 8, 16, 32, 64};

typedef struct { int count; uint8_t *pixels, *labels; } image_set;
typedef struct { image_set train, test; } task;
typedef struct { const char *data, *base, *out; int sweep, cuda, steps, rank, seed, threads; float rate, full_rate; } options;

/* -- small things -- */

static void stop(const char *what, const char *why)
{
    fprintf(stderr, "\n%s: %s\n", what, why);
    exit(1);
}

static void check(tern_context *c, tern_result result)
{
    if (result != TERN_OK) stop("ternary", tern_last_error(c)->text);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
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

static uint64_t random_state = 1;
static uint32_t random_below(uint32_t n)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)(((random_state >> 32) * n) >> 32);
}
static float random_around(float zero) { return zero * ((float)random_below(20001) / 10000.0f - 1.0f); } /* [-zero, zero] */

static image_set new_images(int count)
{
    image_set s;
    s.count = count;
    s.pixels = (uint8_t *)malloc((size_t)count * PIXELS);
    s.labels = (uint8_t *)malloc((size_t)count);
    if (!s.pixels || !s.labels) stop("images", "out of memory");
    return s;
}

/* -- MNIST and digits drawn here: as in examples/image_classifier.c -- */

/* Opens DIR/name, reads its big-endian header (a magic number and its sizes) and returns the first size. */
static int open_idx(FILE **f, char path[1024], const char *dir, const char *name, const uint32_t *header, int words)
{
    uint8_t b[4];
    uint32_t count = 0;
    int i;
    if (snprintf(path, 1024, "%s/%s", dir, name) >= 1024) stop(dir, "the path is too long");
    *f = fopen(path, "rb");
    if (!*f) stop(path, "cannot be opened; the four MNIST files must lie there, uncompressed (gunzip *.gz)");
    for (i = 0; i < words; i++) {
        if (fread(b, 1, 4, *f) != 4) stop(path, "is truncated");
        if (b[0] == 0x1f && b[1] == 0x8b && i == 0) stop(path, "is still compressed; gunzip it first");
        const uint32_t word = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
        if (i == 1) count = word;
        else if (word != header[i]) stop(path, "is not an idx file of MNIST");
    }
    if (count == 0 || count > 1000000) stop(path, "holds no images, or more than a million");
    return (int)count;
}

static image_set read_mnist(const char *dir, const char *images, const char *labels)
{
    static const uint32_t image_header[] = {2051, 0, SIDE, SIDE}, label_header[] = {2049, 0};
    char path[1024];
    FILE *f;
    image_set s = new_images(open_idx(&f, path, dir, images, image_header, 4));
    if (fread(s.pixels, PIXELS, (size_t)s.count, f) != (size_t)s.count) stop(path, "is truncated");
    fclose(f);
    if (open_idx(&f, path, dir, labels, label_header, 2) != s.count) stop(path, "has another number of labels than there are images");
    if (fread(s.labels, 1, (size_t)s.count, f) != (size_t)s.count) stop(path, "is truncated");
    fclose(f);
    for (int i = 0; i < s.count; i++) if (s.labels[i] >= CLASSES) stop(path, "has a label above 9");
    return s;
}

/* Strokes on a grid 6 wide and 8 high, as "xy" pairs. */
static const char *const strokes[CLASSES] = {
    "20 40 62 66 48 28 06 02 20", "12 30 38", "02 20 40 62 63 08 68", "01 20 40 62 63 44 24 44 65 66 48 28 07",
    "48 40 05 65", "60 10 03 43 65 66 48 18", "50 20 02 06 28 48 66 64 43 04", "00 60 28",
    "34 12 11 20 40 51 52 34 65 66 48 28 06 05 34", "62 44 24 02 20 40 62 66 48 18"};

static float square(float v) { return v * v; }

/* Squared distance from a point to the segment a-b. */
static float distance2(float x, float y, const float *a, const float *b)
{
    const float dx = b[0] - a[0], dy = b[1] - a[1], length2 = dx * dx + dy * dy;
    float t = length2 > 0 ? ((x - a[0]) * dx + (y - a[1]) * dy) / length2 : 0;
    t = t < 0 ? 0 : t > 1 ? 1 : t;
    return square(x - a[0] - t * dx) + square(y - a[1] - t * dy);
}

/* A digit in an unsteady hand: points jittered, sheared, stretched and shifted; the pen's width varies;
   one stray line and noise lie over it. */
static void draw_digit(int digit, uint8_t *pixels)
{
    const float xx = 2.4f + random_around(0.6f), yy = 2.4f + random_around(0.4f), xy = random_around(0.5f), yx = random_around(0.4f);
    const float left = 14 + random_around(2), top = 14 + random_around(2), pen = square(1.3f + random_around(0.5f));
    float points[18][2];
    int count = 0;
    for (const char *s = strokes[digit]; ; s += 3) {
        const float x = (float)(s[0] - '0') - 3 + random_around(0.5f), y = (float)(s[1] - '0') - 4 + random_around(0.5f);
        points[count][0] = left + xx * x + xy * y;
        points[count++][1] = top + yx * x + yy * y;
        if (!s[2]) break;
    }
    for (int i = count; i < count + 2; i++) points[i][0] = (float)random_below(SIDE), points[i][1] = (float)random_below(SIDE);
    for (int p = 0; p < PIXELS; p++) {
        float nearest = 1e9f, ink;
        for (int i = 0; i <= count; i++) {
            if (i == count - 1) continue; /* the stray line starts anew */
            const float d = distance2((float)(p % SIDE), (float)(p / SIDE), points[i], points[i + 1]);
            if (d < nearest) nearest = d;
        }
        ink = 1.5f - nearest / pen;
        ink = (ink < 0 ? 0 : ink > 1 ? 1 : ink) * 200 + 25 + random_around(25);
        pixels[p] = (uint8_t)ink;
    }
}

static image_set draw_images(int count)
{
    image_set s = new_images(count);
    for (int i = 0; i < count; i++) {
        s.labels[i] = (uint8_t)(i % CLASSES);
        draw_digit(i % CLASSES, s.pixels + (size_t)i * PIXELS);
    }
    return s;
}

/* -- the shifted task -- */

/* A digit turned by 60 degrees about its middle: each pixel is read where it was, between its four neighbours. */
static void turn_image(const uint8_t *from, uint8_t *to)
{
    const float cosine = 0.5f, sine = 0.8660254f, middle = (SIDE - 1) / 2.0f;
    for (int p = 0; p < PIXELS; p++) {
        const float right = (float)(p % SIDE) - middle, down = (float)(p / SIDE) - middle;
        const float x = middle + cosine * right + sine * down + SIDE, y = middle - sine * right + cosine * down + SIDE; /* above 0 */
        const int column = (int)x, row = (int)y;
        const float part_x = x - (float)column, part_y = y - (float)row;
        float ink = 0.5f;
        for (int i = 0; i < 4; i++) {
            const int from_x = column - SIDE + i % 2, from_y = row - SIDE + i / 2;
            if (from_x < 0 || from_x >= SIDE || from_y < 0 || from_y >= SIDE) continue;
            ink += (i % 2 ? part_x : 1 - part_x) * (i / 2 ? part_y : 1 - part_y) * (float)from[from_y * SIDE + from_x];
        }
        to[p] = (uint8_t)ink;
    }
}

static image_set turned(const image_set *s)
{
    image_set t = new_images(s->count);
    memcpy(t.labels, s->labels, (size_t)s->count);
    for (int i = 0; i < s->count; i++) turn_image(s->pixels + (size_t)i * PIXELS, t.pixels + (size_t)i * PIXELS);
    return t;
}

/* -- the network -- */

/* Three BitLinear layers on int8 activations, an RMSNorm before each and a ReLU between; with LoRA, a and b beside each. */
typedef struct {
    tern_param weights[LAYERS], a[LAYERS], b[LAYERS], *list[3 * LAYERS];
    tern_linear layers[LAYERS];
    tern_model model;
    float *x[LAYERS + 1];  /* x[i] enters layer i; x[LAYERS] are the logits */
    float *dx[LAYERS + 1]; /* their gradients */
    void *saved[LAYERS];
    int32_t *targets;
    float *losses;
} network;

/* Backend memory that must be there. */
static void *take(tern_context *c, size_t bytes)
{
    void *p = tern_alloc(c, bytes);
    if (!p) stop("network", "out of memory");
    return p;
}

/* Normal numbers of this deviation; stream tells the parameters of one network apart. */
static void fill(tern_context *c, tern_param *p, float deviation, int seed, int stream)
{
    tern_fill_args noise = TERN_ZERO;
    noise.count = p->rows * p->cols;
    noise.x = (float *)take(c, (size_t)noise.count * sizeof(float));
    noise.deviation = deviation;
    noise.seed = (uint64_t)seed;
    noise.stream = (uint32_t)stream;
    check(c, tern_fill(c, &noise));
    check(c, tern_param_set(c, p, TERN_F32, noise.x));
    tern_free(c, noise.x);
}

/* What a layer needs has grown with its parameters. */
static void make_room(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_need need;
        check(c, tern_linear_need(c, &net->layers[i], BATCH, &need));
        check(c, tern_reserve(c, need.scratch));
        tern_free(c, net->saved[i]);
        net->saved[i] = take(c, need.saved);
    }
}

/* mask: TERN_FOR_ADAMW to train it, TERN_FOR_INFERENCE for packed trits alone. TWN gives trits times scale their own trits and
   scale again, so that a merge of nothing changes nothing. */
static void open_network(tern_context *c, network *net, int32_t mask)
{
    memset(net, 0, sizeof *net);
    for (int i = 0; i < LAYERS; i++) {
        tern_param *w = &net->weights[i];
        snprintf(w->name, sizeof w->name, "layer%d.weight", i);
        w->rows = widths[i + 1];
        w->cols = widths[i];
        w->rule = TERN_TWN;
        w->grain = TERN_PER_ROW;
        check(c, tern_param_alloc(c, w, mask));
        net->list[i] = w;
        net->layers[i].w = w;
        net->layers[i].norm = TERN_NORM_RMS;
    }
    for (int i = 0; i <= LAYERS; i++) {
        net->x[i] = (float *)take(c, BATCH * (size_t)widths[i] * sizeof(float));
        net->dx[i] = (float *)take(c, BATCH * (size_t)widths[i] * sizeof(float));
    }
    net->targets = (int32_t *)take(c, BATCH * sizeof(int32_t));
    net->losses = (float *)take(c, BATCH * sizeof(float));
    net->model.items = net->list;
    net->model.count = LAYERS;
    make_room(c, net);
}

static void close_network(tern_context *c, network *net)
{
    for (int i = 0; i < net->model.count; i++) tern_param_free(c, net->list[i], TERN_FOR_ADAMW);
    for (int i = 0; i < LAYERS; i++) tern_free(c, net->saved[i]);
    for (int i = 0; i <= LAYERS; i++) tern_free(c, net->x[i]), tern_free(c, net->dx[i]);
    tern_free(c, net->targets);
    tern_free(c, net->losses);
}

/* y += 2 (x A^T) B^T beside each layer: A [rank, inputs] begins as noise and B [outputs, rank] as zero, so that nothing changes
   yet. The ten rows of the last layer have rank 10 at most. */
static void add_lora(tern_context *c, network *net, int rank, int32_t mask, int seed)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_param *const pair[2] = {&net->a[i], &net->b[i]};
        const int64_t r = rank < widths[i + 1] ? rank : widths[i + 1];
        net->a[i].rows = r;
        net->a[i].cols = widths[i];
        net->b[i].rows = widths[i + 1];
        net->b[i].cols = r;
        for (int j = 0; j < 2; j++) {
            snprintf(pair[j]->name, sizeof pair[j]->name, "layer%d.lora_%c", i, 'a' + j);
            pair[j]->rule = TERN_DENSE;
            check(c, tern_param_alloc(c, pair[j], mask));
            net->list[net->model.count++] = pair[j];
        }
        fill(c, &net->a[i], 0.04f, seed, LAYERS + i);
        net->layers[i].lora_a = &net->a[i];
        net->layers[i].lora_b = &net->b[i];
        net->layers[i].lora_scale = 2;
    }
    make_room(c, net);
}

/* Into the trits, which are frozen: trit times scale plus 2 B A is ternarized again. */
static void merge_lora(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        check(c, tern_linear_merge(c, &net->layers[i]));
        net->layers[i].lora_a = net->layers[i].lora_b = NULL;
        tern_param_free(c, &net->a[i], TERN_FOR_ADAMW);
        tern_param_free(c, &net->b[i], TERN_FOR_ADAMW);
    }
    net->model.count = LAYERS;
}

/* Packed trits become trainable again: shadows that are trit times scale. */
static void thaw(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_param *w = &net->weights[i];
        int8_t *trits = (int8_t *)malloc((size_t)(w->rows * w->cols));
        float *scales = (float *)malloc((size_t)w->rows * sizeof(float));
        if (!trits || !scales) stop("network", "out of memory");
        for (int64_t row = 0; row < w->rows; row++) check(c, tern_param_get(c, w, row, trits + row * w->cols, scales + row, NULL));
        check(c, tern_param_alloc(c, w, TERN_FOR_ADAMW));
        check(c, tern_param_give(c, w, trits, scales));
        free(trits), free(scales);
    }
}

/* ReLU in place. Its derivative needs only the sign, which its output keeps. */
static void relu(tern_context *c, int64_t count, float *y, float *dy)
{
    tern_map_args a = TERN_ZERO;
    a.fn = TERN_MAP_RELU;
    a.count = count;
    a.a = y;
    a.y = y;
    a.dy = dy;
    a.da = dy;
    check(c, tern_map(c, &a));
}

static void forward(tern_context *c, network *net, int64_t n, int training)
{
    for (int i = 0; i < LAYERS; i++) {
        check(c, tern_linear_forward(c, &net->layers[i], n, net->x[i], net->x[i + 1], training ? net->saved[i] : NULL));
        if (i + 1 < LAYERS) relu(c, n * widths[i + 1], net->x[i + 1], NULL);
    }
}

static void backward(tern_context *c, network *net, int64_t n)
{
    for (int i = LAYERS - 1; i >= 0; i--) {
        if (i + 1 < LAYERS) relu(c, n * widths[i + 1], net->x[i + 1], net->dx[i + 1]);
        check(c, tern_linear_backward(c, &net->layers[i], n, net->x[i], net->saved[i], net->dx[i + 1], i ? net->dx[i] : NULL));
    }
}

/* Cross-entropy: leaves the gradient of the logits. */
static void loss_of(tern_context *c, network *net, int64_t n)
{
    tern_loss_args a = TERN_ZERO;
    a.n = n;
    a.classes = CLASSES;
    a.logits = net->x[LAYERS];
    a.targets = net->targets;
    a.losses = net->losses;
    a.dlogits = net->dx[LAYERS];
    a.scale = 1.0f / (float)n;
    check(c, tern_loss(c, &a));
}

static void load_images(tern_context *c, network *net, const image_set *s, const int *which, int n)
{
    static float pixels[BATCH][PIXELS];
    int32_t labels[BATCH];
    for (int i = 0; i < n; i++) {
        labels[i] = s->labels[which[i]];
        for (int p = 0; p < PIXELS; p++) pixels[i][p] = (float)s->pixels[(size_t)which[i] * PIXELS + (size_t)p] / 255.0f;
    }
    check(c, tern_copy(c, net->x[0], pixels, (size_t)n * sizeof pixels[0], TERN_TO_DEVICE));
    check(c, tern_copy(c, net->targets, labels, (size_t)n * sizeof labels[0], TERN_TO_DEVICE));
}

/* -- training and measuring -- */

static struct { double begun; int64_t done, total; } work; /* in steps, of all trainings of this run */

/* A line that is written over on a terminal, elsewhere one for each training. */
static void show_progress(const char *what, int step, int steps)
{
    const int left = (int)((seconds() - work.begun) * (double)(work.total - work.done) / (double)work.done),
              terminal = isatty(STDOUT_FILENO);
    if (!terminal && step < steps) return;
    printf("%s%-32s step %4d of %d   time left %d:%02d%s",
           terminal ? "\r" : "", what, step, steps, left / 60, left % 60, terminal ? "\033[K" : "\n");
    fflush(stdout);
}

static void train(tern_context *c, network *net, const image_set *s, int steps, float rate, int seed, const char *what)
{
    tern_schedule schedule = TERN_ZERO;
    tern_step step = TERN_ZERO;
    schedule.peak = rate;
    schedule.warmup = (uint32_t)(steps / 10);
    schedule.steps = (uint32_t)steps;
    step.clip = 1.0f;
    random_state = (uint64_t)seed; /* all see the same images in the same order */
    for (int i = 1; i <= steps; i++) {
        int which[BATCH];
        for (int j = 0; j < BATCH; j++) which[j] = (int)random_below((uint32_t)s->count);
        load_images(c, net, s, which, BATCH);
        forward(c, net, BATCH, 1);
        loss_of(c, net, BATCH);
        backward(c, net, BATCH);
        step.step = (uint32_t)i;
        check(c, tern_schedule_rate(c, &schedule, step.step, &step.rate));
        check(c, tern_model_step(c, &net->model, &step));
        work.done++;
        if (i % 20 == 0 || i == steps) show_progress(what, i, steps);
    }
    check(c, tern_sync(c));
}

/* Percent right; logits (or NULL) receives those of all images. */
static double accuracy_of(tern_context *c, network *net, const image_set *s, float (*logits)[CLASSES])
{
    int right = 0;
    for (int first = 0; first < s->count; first += BATCH) {
        const int n = s->count - first < BATCH ? s->count - first : BATCH;
        float batch[BATCH][CLASSES];
        int which[BATCH];
        for (int i = 0; i < n; i++) which[i] = first + i;
        load_images(c, net, s, which, n);
        forward(c, net, n, 0);
        check(c, tern_copy(c, batch, net->x[LAYERS], (size_t)n * sizeof batch[0], TERN_TO_HOST));
        if (logits) memcpy(logits + first, batch, (size_t)n * sizeof batch[0]);
        for (int i = 0; i < n; i++) {
            int best = 0;
            for (int j = 1; j < CLASSES; j++) if (batch[i][j] > batch[i][best]) best = j;
            right += best == s->labels[first + i];
        }
    }
    check(c, tern_sync(c));
    return 100.0 * right / s->count;
}

/* -- files -- */

static const char *path_of(const options *o, const char *name)
{
    static char path[1024];
    if (snprintf(path, sizeof path, "%s/%s", o->out, name) >= (int)sizeof path) stop(o->out, "the path is too long");
    return path;
}

/* Saves, loads into a fresh network, and compares the logits of all test images bit by bit. What was trained on a GPU is loaded
   by the CPU, unless it has LoRA beside the trits: float sums, which are the CPU's own. */
static void keep(tern_context *c, network *net, const options *o, const char *name, int rank, const image_set *s)
{
    const char *path = path_of(o, name);
    float (*logits)[CLASSES] = (float (*)[CLASSES])malloc(2 * (size_t)s->count * sizeof *logits);
    tern_context *fresh = c;
    tern_error error;
    network again;
    if (!logits) stop("reload", "out of memory");
    check(c, tern_model_save_file(c, &net->model, 0, path));
    if (o->cuda && !rank && tern_open(&fresh, NULL, &error) != TERN_OK) stop("ternary", error.text);
    open_network(fresh, &again, TERN_FOR_INFERENCE);
    if (rank) add_lora(fresh, &again, rank, TERN_FOR_INFERENCE, 0);
    check(fresh, tern_model_load_file(fresh, &again.model, path));
    accuracy_of(c, net, s, logits);
    accuracy_of(fresh, &again, s, logits + s->count);
    if (memcmp(logits, logits + s->count, (size_t)s->count * sizeof *logits)) stop(path, "gives other bits after reloading");
    printf("%s%s, reloaded by the tier %s, gives the same bits\n", isatty(STDOUT_FILENO) ? "\r\033[K" : "", path, tern_backend_name(fresh));
    close_network(fresh, &again);
    if (fresh != c) tern_close(fresh);
    free(logits);
}

/* -- where tuning begins -- */

/* Packed and frozen: from a file, or trained on upright digits. */
static void make_base(tern_context *c, network *net, const options *o, const image_set *s, int seed)
{
    open_network(c, net, o->base ? TERN_FOR_INFERENCE : TERN_FOR_ADAMW);
    if (o->base) {
        check(c, tern_model_load_file(c, &net->model, o->base));
        return;
    }
    for (int i = 0; i < LAYERS; i++) fill(c, &net->weights[i], 0.04f, seed, i);
    train(c, net, s, 2 * o->steps, 0.003f, seed, "upright digits");
    for (int i = 0; i < LAYERS; i++) tern_param_free(c, &net->weights[i], TERN_FOR_TRAINING);
}

/* A network of its own with the trits of another. */
static void open_copy(tern_context *c, network *net, const network *base)
{
    open_network(c, net, TERN_FOR_INFERENCE);
    for (int i = 0; i < LAYERS; i++)
        for (int j = TERN_TRITS; j <= TERN_SCALES; j++) {
            const tern_matrix m = tern_param_matrix(&base->weights[i]);
            size_t bytes[2];
            check(c, tern_matrix_bytes(c, &m, &bytes[0], &bytes[1]));
            check(c, tern_copy(c, net->weights[i].buffer[j].data, base->weights[i].buffer[j].data, bytes[j], TERN_ON_DEVICE));
        }
}

/* -- the table -- */

/* One line: what is trained, what training holds and the file keeps, and percent right over the seeds. */
typedef struct { double mean, low, high; } spread;
typedef struct { char name[32]; int64_t trained; size_t held, kept; spread upright, turned; } line;
enum { BASE, ALL, LORA, MERGED = LORA + RANKS, LINES = MERGED + RANKS };

static void gather(spread *s, double value, int before)
{
    if (before == 0 || value < s->low) s->low = value;
    if (before == 0 || value > s->high) s->high = value;
    s->mean = (s->mean * before + value) / (before + 1);
}

/* The network as it stands, `before` others of this line having been measured. */
static void measure(tern_context *c, network *net, const task *upright, const task *shifted, line *l, int before)
{
    tern_audit audit;
    check(c, tern_model_audit(c, &net->model, &audit));
    l->trained = 0;
    l->held = 0;
    for (int i = 0; i < net->model.count; i++)
        if (net->list[i]->buffer[TERN_GRAD].data) l->trained += net->list[i]->rows * net->list[i]->cols;
    for (int i = 0; i < TERN_BUFFERS && l->trained; i++) l->held += audit.bytes[i];
    l->kept = audit.packed_bytes;
    gather(&l->upright, accuracy_of(c, net, &upright->test, NULL), before);
    gather(&l->turned, accuracy_of(c, net, &shifted->test, NULL), before);
}

/* All lines for one seed; with files unless it is one of a sweep. */
static void run_seed(tern_context *c, const options *o, const task *upright, const task *shifted, const int *rank, int count,
                     int before, line *lines)
{
    const int seed = o->seed + before;
    network base, net;
    make_base(c, &base, o, &upright->train, seed);
    measure(c, &base, upright, shifted, &lines[BASE], before);
    if (!o->base && !o->sweep) keep(c, &base, o, "finetune_base.gguf", 0, &upright->test);
    for (int i = 0; i < count; i++) {
        open_copy(c, &net, &base);
        add_lora(c, &net, rank[i], TERN_FOR_ADAMW, seed);
        train(c, &net, &shifted->train, o->steps, o->rate, seed, lines[LORA + i].name);
        measure(c, &net, upright, shifted, &lines[LORA + i], before);
        if (!o->sweep) keep(c, &net, o, "finetune_lora.gguf", rank[i], &shifted->test);
        merge_lora(c, &net);
        measure(c, &net, upright, shifted, &lines[MERGED + i], before);
        if (!o->sweep) keep(c, &net, o, "finetune_merged.gguf", 0, &shifted->test);
        close_network(c, &net);
    }
    open_copy(c, &net, &base);
    thaw(c, &net);
    train(c, &net, &shifted->train, o->steps, o->full_rate, seed, lines[ALL].name);
    measure(c, &net, upright, shifted, &lines[ALL], before);
    close_network(c, &net);
    close_network(c, &base);
}

static void print_line(const line *l, int seeds)
{
    const spread *const both[2] = {&l->upright, &l->turned};
    printf("%-26s %9ld %11ld %10ld ", l->name, (long)l->trained, (long)l->held, (long)l->kept);
    for (int i = 0; i < 2; i++) {
        printf("  %6.2f%%", both[i]->mean);
        if (seeds > 1) printf(" (%5.2f to %5.2f)", both[i]->low, both[i]->high);
    }
    printf("\n");
}

static void print_table(const line *lines, int ranks_run, int seeds)
{
    const int width = seeds > 1 ? 25 : 7;
    printf("\n%-26s %9s %11s %10s    %-*s  %s\n%-26s %9s %11s %10s    %-*s  %s\n",
           "", "weights", "bytes in", "bytes", width, "right on", "right on",
           "", "trained", "training", "as kept", width, "upright", "turned");
    print_line(&lines[BASE], seeds);
    for (int i = 0; i < ranks_run; i++) print_line(&lines[LORA + i], seeds);
    for (int i = 0; i < ranks_run; i++) print_line(&lines[MERGED + i], seeds);
    print_line(&lines[ALL], seeds);
}

/* -- the picture: percent right on turned digits over the ranks, which lie at equal distances -- */

enum { WIDTH = 720, HEIGHT = 400, LEFT = 64, RIGHT = 150, TOP = 56, BOTTOM = 56 };
typedef struct { double low, high, unit; } axis;

static axis axis_of(const line *lines)
{
    axis a = {lines[ALL].turned.low, lines[ALL].turned.high, 1};
    for (int i = LORA; i < LINES; i++) {
        if (lines[i].turned.low < a.low) a.low = lines[i].turned.low;
        if (lines[i].turned.high > a.high) a.high = lines[i].turned.high;
    }
    a.unit = a.high - a.low > 40 ? 10 : a.high - a.low > 16 ? 5 : a.high - a.low > 8 ? 2 : 1;
    a.low = (double)(int)(a.low / a.unit) * a.unit;
    a.high = (double)((int)(a.high / a.unit) + 1) * a.unit;
    return a;
}

static double x_of(int i) { return LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / RANKS; }
static double y_of(const axis *a, double v) { return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (v - a->low) / (a->high - a->low); }

/* The means as a line, and for each rank a bar from the lowest to the highest seed. */
static void draw_lines(FILE *f, const axis *a, const line *lines, const char *kind, const char *text)
{
    fprintf(f, "<path class=\"%s\" d=\"", kind);
    for (int i = 0; i < RANKS; i++) fprintf(f, "%c%.1f %.1f", i ? 'L' : 'M', x_of(i), y_of(a, lines[i].turned.mean));
    for (int i = 0; i < RANKS; i++) fprintf(f, "M%.1f %.1fV%.1f", x_of(i), y_of(a, lines[i].turned.low), y_of(a, lines[i].turned.high));
    fprintf(f, "\"/><text x=\"%d\" y=\"%.1f\">%s</text>\n", WIDTH - RIGHT + 6, y_of(a, lines[RANKS - 1].turned.mean) + 4, text);
}

static void draw_sweep(const options *o, const line *lines)
{
    const axis a = axis_of(lines);
    const char *path = path_of(o, "finetune.svg");
    const double all = y_of(&a, lines[ALL].turned.mean);
    FILE *f = fopen(path, "wb");
    if (!f) stop(path, "cannot be written");
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n"
               "<style>text{fill:#444}.grid{stroke:#e6e6e6}.axis{stroke:#888;fill:none}.lora,.merged,.all{fill:none;stroke-width:2}"
               ".lora{stroke:#c0392b}.merged{stroke:#2471a3}.all{stroke:#444;stroke-dasharray:6 4}</style>\n"
               "<rect width=\"%d\" height=\"%d\" rx=\"8\" fill=\"#fff\"/>\n", WIDTH, HEIGHT, WIDTH, HEIGHT);
    fprintf(f, "<text x=\"%d\" y=\"32\" font-size=\"17\" style=\"fill:#111\">"
               "Turned digits, learned by a packed ternary network (%d seeds)</text>\n", LEFT, SEEDS);
    for (double v = a.low; v < a.high + a.unit / 2; v += a.unit)
        fprintf(f, "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>"
                   "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
                LEFT, WIDTH - RIGHT, y_of(&a, v), y_of(&a, v), LEFT - 8, y_of(&a, v) + 4, v);
    for (int i = 0; i < RANKS; i++)
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%d</text>\n", x_of(i), HEIGHT - BOTTOM + 20, ranks[i]);
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">rank of the update</text>\n"
               "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">percent right on turned digits</text>\n"
               "<path class=\"axis\" d=\"M%d %dV%dH%d\"/>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, (TOP + HEIGHT - BOTTOM) / 2, LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT);
    fprintf(f, "<path class=\"all\" d=\"M%d %.1fH%d\"/><text x=\"%d\" y=\"%.1f\">all weights</text>\n",
            LEFT, all, WIDTH - RIGHT, LEFT + 8, all - 6);
    draw_lines(f, &a, &lines[LORA], "lora", "LoRA beside the trits");
    draw_lines(f, &a, &lines[MERGED], "merged", "merged into the trits");
    fprintf(f, "</svg>\n");
    if (fclose(f)) stop(path, "cannot be written");
    printf("%s shows the table\n", path);
}

/* -- the program -- */

static int64_t number(const char *name, const char *text, int64_t least, int64_t most)
{
    char *end;
    const long value = strtol(text, &end, 10);
    if (*end || end == text || value < least || value > most) stop(name, "is a number out of range");
    return value;
}

static float positive(const char *name, const char *text)
{
    char *end;
    const double value = strtod(text, &end);
    if (*end || !(value > 0 && value < 1000)) stop(name, "is a number out of range");
    return (float)value;
}

static options parse(int argc, char **argv)
{
    options o = {NULL, NULL, NULL, 0, 0, 800, 16, 1, 0, 0.01f, 0.008f};
    for (int i = 1; i < argc; i++) {
        const char *const name = argv[i], *const value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(name, "--sweep") == 0) { o.sweep = 1; continue; }
        if (strcmp(name, "--cuda") == 0) { o.cuda = 1; continue; }
        i++;
        if (strcmp(name, "--data") == 0) o.data = value;
        else if (strcmp(name, "--base") == 0) o.base = value;
        else if (strcmp(name, "--out") == 0) o.out = value;
        else if (strcmp(name, "--steps") == 0) o.steps = (int)number(name, value, 1, 1000000);
        else if (strcmp(name, "--rank") == 0) o.rank = (int)number(name, value, 1, HIDDEN);
        else if (strcmp(name, "--seed") == 0) o.seed = (int)number(name, value, 1, 1000000);
        else if (strcmp(name, "--threads") == 0) o.threads = (int)number(name, value, 0, 64);
        else if (strcmp(name, "--rate") == 0) o.rate = positive(name, value);
        else if (strcmp(name, "--full-rate") == 0) o.full_rate = positive(name, value);
        else stop(name, "is none of --data DIR, --base FILE, --out DIR, --sweep, --cuda, --steps N, --rank R, --seed S, --threads T, "
                        "--rate X, --full-rate X");
    }
    if (o.cuda && !gpu())
        stop("--cuda", "this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, or by make build/finetune_cuda");
    if (!o.out) o.out = access("build", W_OK) ? "." : "build";
    return o;
}

int main(int argc, char **argv)
{
    const options o = parse(argc, argv);
    const int *const rank = o.sweep ? ranks : &o.rank;
    const int count = o.sweep ? RANKS : 1, seeds = o.sweep ? SEEDS : 1;
    static line lines[LINES];
    tern_pool *pool = tern_pool_create(o.threads);
    tern_context_desc desc = TERN_ZERO;
    tern_context *c;
    tern_error error;
    task upright, shifted;

    if (o.data) {
        upright.train = read_mnist(o.data, "train-images-idx3-ubyte", "train-labels-idx1-ubyte");
        upright.test = read_mnist(o.data, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte");
    } else {
        upright.train = draw_images(10000);
        upright.test = draw_images(2000);
    }
    shifted.train = turned(&upright.train);
    shifted.test = turned(&upright.test);
    if (!pool) stop("start", "out of memory");
    desc.parallel = tern_pool_parallel(pool);
    if (o.cuda) desc.backend = gpu();
    if (tern_open(&c, &desc, &error) != TERN_OK) stop("ternary", error.text);
    printf("%s: %d images to learn from, %d to test on; %d-%d-%d-%d network, tier %s, %d threads\n", o.data ? "MNIST" : "drawn digits",
           upright.train.count, upright.test.count, PIXELS, HIDDEN, HIDDEN, CLASSES, tern_backend_name(c), desc.parallel.workers);

    snprintf(lines[BASE].name, sizeof lines[BASE].name, "packed, before");
    snprintf(lines[ALL].name, sizeof lines[ALL].name, "all weights");
    for (int i = 0; i < count; i++) {
        snprintf(lines[LORA + i].name, sizeof lines[0].name, "LoRA of rank %d", rank[i]);
        snprintf(lines[MERGED + i].name, sizeof lines[0].name, "rank %d merged", rank[i]);
    }
    work.total = (int64_t)seeds * o.steps * (count + (o.base ? 1 : 3));
    work.begun = seconds();
    for (int i = 0; i < seeds; i++) run_seed(c, &o, &upright, &shifted, rank, count, i, lines);
    print_table(lines, count, seeds);
    if (o.sweep) draw_sweep(&o, lines);
    printf("%.0f seconds in all\n", seconds() - work.begun);

    free(upright.train.pixels), free(upright.train.labels), free(upright.test.pixels), free(upright.test.labels);
    free(shifted.train.pixels), free(shifted.train.labels), free(shifted.test.pixels), free(shifted.test.labels);
    tern_close(c);
    tern_pool_destroy(pool);
    return 0;
}
