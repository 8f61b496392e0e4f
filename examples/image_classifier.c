/* Image classifier: one small network trained three times, with float weights, with ternary weights on
   float activations, and with ternary weights on int8 activations; or once without any float that
   lasts. It ends with a table of accuracy, bytes and time per image, and a picture of the last
   network's predictions. (The float row is this library's float path, whose sums have one order on
   every machine; a tuned BLAS is faster.)

       cc -O2 -I. examples/image_classifier.c -o image_classifier -pthread
       ./image_classifier        digits that the program draws itself, some 20 seconds
       ./image_classifier DIR    MNIST: the four idx files in DIR, uncompressed; some minutes
       ./image_classifier --seed 2   other first weights and another order of the images
       ./image_classifier --true-ternary   without the three, a network that trains in integers: accumulators in int8
                                 for float shadows and moments, gradients by integer products

   With an NVIDIA GPU, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       cc -O2 -I. -DUSE_CUDA examples/image_classifier.c build/ternary_cuda.o -o build/image_classifier_cuda -lcudart -lstdc++ -pthread
       build/image_classifier_cuda --cuda          trains and classifies on the first GPU; of the networks with int8
                                 activations the CPU then finds the same bits

   Ctrl-C ends it after the step that runs and keeps what it has done; the same command with --resume FILE goes on
   from there to the same table and picture. */

#define _POSIX_C_SOURCE 200809L /* clock_gettime, isatty, sigaction */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SIDE = 28, PIXELS = SIDE * SIDE, CLASSES = 10, HIDDEN = 512, LAYERS = 3, BATCH = 128, TEST_BATCH = 256, NETWORKS = 4 };
static const int64_t widths[LAYERS + 1] = {PIXELS, HIDDEN, HIDDEN, CLASSES};

typedef struct { int count; uint8_t *pixels, *labels; } image_set;
typedef struct { image_set train, test; int epochs, shift; const char *title; } task;

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

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* "build/NAME", or NAME where there is no build. */
static FILE *create(const char **path)
{
    FILE *f = fopen(*path, "wb");
    if (!f) f = fopen(*path += strlen("build/"), "wb");
    if (!f) stop(*path, "cannot be written");
    return f;
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

/* -- MNIST -- */

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

/* -- digits drawn here -- */

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

/* -- the network -- */

/* Three BitLinear layers, an RMSNorm before each and a ReLU between; ternary ones with a scale for each row, which is learned, or
   with true-ternary training stays. What is compared: */
typedef struct { const char *name; tern_rule rule; tern_act act; float rate, push; } recipe; /* push: of true-ternary training */
static const recipe recipes[NETWORKS] = {
    {"float", TERN_DENSE, TERN_ACT_FLOAT, 0.001f, 0},
    {"ternary, float in", TERN_SEQ, TERN_ACT_FLOAT, 0.003f, 0},
    {"ternary, int8 in", TERN_SEQ, TERN_ACT_INT8, 0.003f, 0},
    {"true ternary", TERN_ABSMEAN, TERN_ACT_INT8, 0, 2.0f}};

typedef struct {
    tern_param weights[LAYERS], alphas[LAYERS], *list[2 * LAYERS];
    tern_linear layers[LAYERS];
    tern_model model;
    float *x[LAYERS + 1];  /* x[i] enters layer i; x[LAYERS] are the logits */
    float *dx[LAYERS + 1]; /* their gradients */
    void *saved[LAYERS];
    int32_t *targets;
    float *losses, *loss;  /* per image; their running sum */
} network;

/* Backend memory that must be there. */
static void *take(tern_context *c, size_t bytes)
{
    void *p = tern_alloc(c, bytes);
    if (!p) stop("network", "out of memory");
    return p;
}

/* The learned scales of a layer, which tern_param_set begins at the largest weight of each row. */
static void add_alpha(tern_context *c, network *net, int layer)
{
    tern_param *alpha = &net->alphas[layer];
    snprintf(alpha->name, sizeof alpha->name, "layer%d.alpha", layer);
    alpha->rows = 1;
    alpha->cols = net->weights[layer].rows;
    alpha->rule = TERN_DENSE;
    alpha->flags = TERN_NO_DECAY;
    check(c, tern_param_alloc(c, alpha, TERN_FOR_ADAMW));
    net->weights[layer].alpha = alpha;
    net->list[net->model.count++] = alpha;
}

static void open_network(tern_context *c, network *net, const recipe *how, int seed)
{
    memset(net, 0, sizeof *net);
    net->model.items = net->list;
    for (int i = 0; i < LAYERS; i++) {
        tern_param *w = &net->weights[i];
        tern_fill_args noise = TERN_ZERO;
        tern_need need;
        snprintf(w->name, sizeof w->name, "layer%d.weight", i);
        w->rows = widths[i + 1];
        w->cols = widths[i];
        w->rule = how->rule;
        w->grain = TERN_PER_ROW;
        w->buffer[TERN_SCALES].type = how->push > 0 ? TERN_LOG : TERN_F32;
        net->list[net->model.count++] = w;
        net->layers[i].w = w;
        net->layers[i].norm = TERN_NORM_RMS;
        net->layers[i].act = how->act;
        check(c, tern_param_alloc(c, w, how->push > 0 ? TERN_FOR_FLIPS : TERN_FOR_ADAMW));
        if (w->rule == TERN_SEQ) add_alpha(c, net, i);
        noise.count = w->rows * w->cols;
        noise.x = (float *)take(c, (size_t)noise.count * sizeof(float));
        noise.deviation = 0.04f; /* about 1/sqrt(inputs) */
        noise.seed = (uint64_t)seed;
        noise.stream = (uint32_t)i;
        check(c, tern_fill(c, &noise));
        check(c, tern_param_set(c, w, TERN_F32, noise.x));
        tern_free(c, noise.x);
        check(c, tern_linear_need(c, &net->layers[i], TEST_BATCH, &need));
        check(c, tern_reserve(c, need.scratch));
        net->saved[i] = take(c, need.saved);
    }
    if (how->push > 0) check(c, tern_model_strict(c, &net->model)); /* nothing that trains is a float */
    for (int i = 0; i <= LAYERS; i++) {
        net->x[i] = (float *)take(c, TEST_BATCH * (size_t)widths[i] * sizeof(float));
        net->dx[i] = (float *)take(c, TEST_BATCH * (size_t)widths[i] * sizeof(float));
    }
    net->targets = (int32_t *)take(c, BATCH * sizeof(int32_t));
    net->losses = (float *)take(c, BATCH * sizeof(float));
    net->loss = (float *)take(c, sizeof(float));
}

/* Packed weights alone remain. */
static void freeze(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_param_free(c, &net->weights[i], TERN_FOR_TRAINING);
        tern_param_free(c, &net->alphas[i], TERN_FOR_ADAMW);
        net->weights[i].alpha = NULL;
        net->list[i] = &net->weights[i];
    }
    net->model.count = LAYERS;
}

static void close_network(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_param_free(c, &net->weights[i], TERN_FOR_ADAMW);
        tern_param_free(c, &net->alphas[i], TERN_FOR_ADAMW);
        tern_free(c, net->saved[i]);
    }
    for (int i = 0; i <= LAYERS; i++) tern_free(c, net->x[i]), tern_free(c, net->dx[i]);
    tern_free(c, net->targets);
    tern_free(c, net->losses);
    tern_free(c, net->loss);
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

/* The seed is a step's own; true-ternary training rounds by it. */
static void backward(tern_context *c, network *net, int64_t n, uint64_t seed)
{
    for (int i = LAYERS - 1; i >= 0; i--) {
        net->layers[i].seed = seed + (uint64_t)i;
        if (i + 1 < LAYERS) relu(c, n * widths[i + 1], net->x[i + 1], net->dx[i + 1]);
        check(c, tern_linear_backward(c, &net->layers[i], n, net->x[i], net->saved[i], net->dx[i + 1], i ? net->dx[i] : NULL));
    }
}

/* Cross-entropy: adds the batch's loss to the running sum and leaves the gradient of the logits. */
static void loss_of(tern_context *c, network *net, int64_t n)
{
    tern_loss_args a = TERN_ZERO;
    tern_sum_args sum = TERN_ZERO;
    a.n = n;
    a.classes = CLASSES;
    a.logits = net->x[LAYERS];
    a.targets = net->targets;
    a.losses = net->losses;
    a.dlogits = net->dx[LAYERS];
    a.scale = 1.0f / (float)n;
    check(c, tern_loss(c, &a));
    sum.count = n;
    sum.x = net->losses;
    sum.y = net->loss;
    sum.add = 1;
    check(c, tern_sum(c, &sum));
}

/* Images, each moved by up to `shift` pixels, become the network's input. */
static void load_images(tern_context *c, network *net, const image_set *s, const int *order, int first, int n, int shift)
{
    static float pixels[TEST_BATCH][PIXELS];
    int32_t labels[TEST_BATCH];
    for (int i = 0; i < n; i++) {
        const int index = order ? order[first + i] : first + i;
        const int right = (int)random_below((uint32_t)(2 * shift + 1)) - shift, down = (int)random_below((uint32_t)(2 * shift + 1)) - shift;
        const uint8_t *image = s->pixels + (size_t)index * PIXELS;
        labels[i] = s->labels[index];
        for (int p = 0; p < PIXELS; p++) {
            const int x = p % SIDE - right, y = p / SIDE - down;
            pixels[i][p] = x < 0 || x >= SIDE || y < 0 || y >= SIDE ? 0 : (float)image[y * SIDE + x] / 255.0f;
        }
    }
    check(c, tern_copy(c, net->x[0], pixels, (size_t)n * sizeof pixels[0], TERN_TO_DEVICE));
    if (order) check(c, tern_copy(c, net->targets, labels, (size_t)n * sizeof labels[0], TERN_TO_DEVICE));
}

/* -- training and measuring -- */

/* Fraction right; predicted (or NULL) receives each test image's class. */
static double accuracy_of(tern_context *c, network *net, const image_set *s, uint8_t *predicted)
{
    int right = 0;
    for (int first = 0; first < s->count; first += TEST_BATCH) {
        const int n = s->count - first < TEST_BATCH ? s->count - first : TEST_BATCH;
        float logits[TEST_BATCH][CLASSES];
        load_images(c, net, s, NULL, first, n, 0);
        forward(c, net, n, 0);
        check(c, tern_copy(c, logits, net->x[LAYERS], (size_t)n * sizeof logits[0], TERN_TO_HOST));
        for (int i = 0; i < n; i++) {
            int best = 0;
            for (int j = 1; j < CLASSES; j++) if (logits[i][j] > logits[i][best]) best = j;
            right += best == s->labels[first + i];
            if (predicted) predicted[first + i] = (uint8_t)best;
        }
    }
    check(c, tern_sync(c));
    return (double)right / s->count;
}

/* The work done in all networks, and the time left at this pace: a line that is written over on a
   terminal, elsewhere a line an epoch. */
static void show_progress(const char *name, int epoch, int epochs, double loss, double accuracy, double begun, double done, int last)
{
    const int left = (int)((seconds() - begun) * (1 - done) / done), terminal = isatty(STDOUT_FILENO);
    if (!terminal && !last) return;
    printf("%s%-18s epoch %2d of %d   loss %.4f   ", terminal ? "\r" : "", name, epoch, epochs, loss);
    if (epoch > 1) printf("test before %.2f%%   ", 100 * accuracy);
    printf("time left %d:%02d%s", left / 60, left % 60, terminal ? "\033[K" : "\n");
    fflush(stdout);
}

/* Where the program is: behind `step` steps of network `which`, with the table's lines of the networks before it. */
typedef struct {
    char magic[8];
    int64_t images, seed, first, end, which, step; /* networks from `first` to before `end` */
    uint64_t random;
    double elapsed, accuracy, loss;
    char table[NETWORKS][128];
} place;
static const char magic[8] = "icstat3";

static volatile sig_atomic_t interrupted;
static void interrupt(int number) { interrupted = number; }

/* To the last step of network at->which, or to the one in which a signal comes. */
static void train(tern_context *c, network *net, const task *t, place *at, int *order, double begun)
{
    const recipe *how = &recipes[at->which];
    const int batches = t->train.count / BATCH, steps = batches * t->epochs;
    float loss = (float)at->loss;
    tern_schedule schedule = TERN_ZERO, falling = TERN_ZERO;
    schedule.peak = how->rate;
    schedule.warmup = (uint32_t)(steps < 1000 ? steps / 10 : 100);
    falling.kind = TERN_LINEAR;
    falling.peak = how->push;
    schedule.steps = falling.steps = (uint32_t)steps;
    check(c, tern_copy(c, net->loss, &loss, sizeof loss, TERN_TO_DEVICE));
    if (at->step == 0) {
        random_state = (uint64_t)at->seed; /* all see the same images in the same order */
        for (int i = 0; i < t->train.count; i++) order[i] = i;
    }
    while (at->step < steps && !interrupted) {
        const int b = (int)at->step++ % batches, last = b + 1 == batches;
        tern_step s = TERN_ZERO;
        if (b == 0) {
            loss = 0;
            check(c, tern_copy(c, net->loss, &loss, sizeof loss, TERN_TO_DEVICE));
            for (int i = t->train.count - 1; i > 0; i--) {
                const int j = (int)random_below((uint32_t)i + 1), swap = order[i];
                order[i] = order[j];
                order[j] = swap;
            }
        }
        load_images(c, net, &t->train, order, b * BATCH, BATCH, t->shift);
        forward(c, net, BATCH, 1);
        loss_of(c, net, BATCH);
        backward(c, net, BATCH, (uint64_t)at->step << 32 | (uint32_t)(at->seed * LAYERS));
        s.seed = (uint64_t)at->seed;
        s.clip = 1.0f;
        s.decay = 0.01f;
        s.step = (uint32_t)at->step;
        check(c, tern_schedule_rate(c, &schedule, s.step, &s.rate));
        check(c, tern_schedule_rate(c, &falling, s.step, &s.push));
        check(c, tern_model_step(c, &net->model, &s));
        if (b % 20 == 19 || last) {
            check(c, tern_copy(c, &loss, net->loss, sizeof loss, TERN_TO_HOST));
            show_progress(how->name, (int)(at->step - 1) / batches + 1, t->epochs, loss / (float)((b + 1) * BATCH), at->accuracy, begun,
                          ((double)(at->which - at->first) + (double)at->step / steps) / (double)(at->end - at->first), last);
        }
        if (!last) continue;
        check(c, tern_sync(c));
        at->accuracy = accuracy_of(c, net, &t->test, NULL);
    }
}

static int write_bytes(void *file, const void *data, size_t bytes) { return fwrite(data, 1, bytes, (FILE *)file) != bytes; }

/* The place, the order of the images, and the network with all that trains. */
static void save_state(tern_context *c, const network *net, place *at, const int *order)
{
    const char *path = "build/image_classifier.state";
    FILE *f = create(&path);
    tern_sink sink;
    float loss;
    check(c, tern_copy(c, &loss, net->loss, sizeof loss, TERN_TO_HOST));
    at->loss = loss;
    at->random = random_state;
    sink.write = write_bytes;
    sink.user = f;
    if (write_bytes(f, at, sizeof *at) || write_bytes(f, order, (size_t)at->images * sizeof *order)) stop(path, "cannot be written");
    check(c, tern_model_save(c, &net->model, TERN_FOR_TRAINING, &sink));
    if (fclose(f)) stop(path, "cannot be written");
    printf("\nStopped after step %ld of the network \"%s\". To go on, add to the command: --resume %s\n",
           (long)at->step, recipes[at->which].name, path);
}

/* Reads place and order; returns the network's bytes, which the caller frees. */
static uint8_t *read_state(const char *path, place *at, int *order, size_t *size)
{
    const int64_t images = at->images, seed = at->seed, first = at->first;
    FILE *f = fopen(path, "rb");
    uint8_t *bytes;
    long end;
    if (!f || fread(at, sizeof *at, 1, f) != 1 || memcmp(at->magic, magic, sizeof magic)) stop(path, "is not a state of this program");
    if (at->images != images) stop(path, "is of a training on other images");
    if (at->seed != seed) stop(path, "is of another --seed");
    if (at->first != first) stop(path, first ? "is of a training without --true-ternary" : "is of a training with --true-ternary");
    if (fread(order, sizeof *order, (size_t)images, f) != (size_t)images || fseek(f, 0, SEEK_END)) stop(path, "is truncated");
    end = ftell(f);
    *size = (size_t)end - sizeof *at - (size_t)images * sizeof *order;
    bytes = (uint8_t *)malloc(*size + 1);
    if (!bytes) stop(path, "out of memory");
    if (fseek(f, end - (long)*size, SEEK_SET) || fread(bytes, 1, *size, f) != *size) stop(path, "cannot be read");
    fclose(f);
    random_state = at->random;
    return bytes;
}

/* The packed network on the CPU: the same logits, bit by bit? Of int8 activations; sums of float ones are the CPU's own. */
static void compare(tern_context *c, network *net, const recipe *how, const image_set *s)
{
    const int n = s->count < TEST_BATCH ? s->count : TEST_BATCH;
    float logits[TEST_BATCH][CLASSES];
    tern_context *cpu;
    tern_error error;
    network again;
    if (tern_open(&cpu, NULL, &error) != TERN_OK) stop("ternary", error.text);
    open_network(cpu, &again, how, 1);
    freeze(cpu, &again);
    for (int i = 0; i < LAYERS; i++) {
        const tern_matrix m = tern_param_matrix(&net->weights[i]);
        size_t trits, scales;
        check(c, tern_matrix_bytes(c, &m, &trits, &scales));
        check(c, tern_copy(c, again.weights[i].buffer[TERN_TRITS].data, m.trits, trits, TERN_TO_HOST));
        check(c, tern_copy(c, again.weights[i].buffer[TERN_SCALES].data, m.scales, scales, TERN_TO_HOST));
    }
    load_images(c, net, s, NULL, 0, n, 0);
    forward(c, net, n, 0);
    load_images(cpu, &again, s, NULL, 0, n, 0);
    forward(cpu, &again, n, 0);
    check(c, tern_copy(c, logits, net->x[LAYERS], (size_t)n * sizeof logits[0], TERN_TO_HOST));
    if (memcmp(logits, again.x[LAYERS], (size_t)n * sizeof logits[0])) stop(how->name, "has other bits on the CPU");
    printf("%-18s the same bits on the tiers %s and %s\n", how->name, tern_backend_name(c), tern_backend_name(cpu));
    close_network(cpu, &again);
    tern_close(cpu);
}

/* Microseconds per image in batches of n: the best of five runs, or of what a second holds. */
static double microseconds(tern_context *c, network *net, int n)
{
    const double begun = seconds();
    double best = 1e9;
    for (int run = 0; run < 5 && (run == 0 || seconds() - begun < 1); run++) {
        const int repeats = n == 1 ? 200 : 10;
        const double start = seconds();
        for (int i = 0; i < repeats; i++) forward(c, net, n, 0);
        check(c, tern_sync(c));
        if ((seconds() - start) * 1e6 / (repeats * n) < best) best = (seconds() - start) * 1e6 / (repeats * n);
    }
    return best;
}

/* -- the picture -- */

/* One image as four greys, each a path of horizontal runs, with its predicted label (and the true one). */
static void write_image(FILE *f, const uint8_t *pixels, int predicted, int label, int column, int row)
{
    static const char *const greys[] = {"", "#aab", "#667", "#112"};
    fprintf(f, "<g transform='translate(%d %d)'><path d='M0 0h56v56h-56z' fill='#fff'/><g transform='scale(2)'>",
            12 + column * 68, 12 + row * 84);
    for (int grey = 1; grey < 4; grey++) {
        fprintf(f, "<path fill='%s' d='", greys[grey]);
        for (int p = 0, run; p < PIXELS; p += run) {
            run = 1;
            if (pixels[p] / 64 != grey) continue;
            while ((p + run) % SIDE && pixels[p + run] / 64 == grey) run++;
            fprintf(f, "M%d %dh%dv1h-%dz", p % SIDE, p / SIDE, run, run);
        }
        fprintf(f, "'/>");
    }
    if (predicted == label) fprintf(f, "</g><text x='28' y='72'>%d</text></g>\n", predicted);
    else fprintf(f, "</g><text x='28' y='72' fill='#c22'>%d, not %d</text></g>\n", predicted, label);
}

/* Three rows of test images from the start, then a row of mistakes. */
static void write_picture(const image_set *s, const uint8_t *predicted)
{
    const char *path = "build/image_classifier.svg";
    FILE *f = create(&path);
    fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 692 348' font-family='sans-serif' font-size='13' text-anchor='middle'>"
               "<rect width='692' height='348' fill='#e8eaee'/>\n");
    for (int i = 0; i < 30; i++) write_image(f, s->pixels + (size_t)i * PIXELS, predicted[i], s->labels[i], i % 10, i / 10);
    for (int i = 30, column = 0; i < s->count && column < 10; i++)
        if (predicted[i] != s->labels[i]) write_image(f, s->pixels + (size_t)i * PIXELS, predicted[i], s->labels[i], column++, 3);
    fprintf(f, "</svg>\n");
    if (fclose(f)) stop(path, "cannot be written");
    printf("%s shows predictions of the last network, and in its bottom row mistakes\n", path);
}

int main(int argc, char **argv)
{
    tern_pool *pool = tern_pool_create(0);
    tern_context_desc desc = TERN_ZERO;
    tern_context *c;
    tern_error error;
    task t = {{0, NULL, NULL}, {0, NULL, NULL}, 0, 0, NULL};
    uint8_t *predicted, *kept = NULL;
    const char *dir = NULL, *resume = NULL;
    int seed = 1, integer = 0, cuda = 0;
    struct sigaction on_signal;
    place at;
    int *order;
    size_t size = 0;
    double begun = seconds();

    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--resume") == 0 && i + 1 < argc) resume = argv[++i];
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc && atoi(argv[i + 1]) > 0) seed = atoi(argv[++i]);
        else if (strcmp(argv[i], "--true-ternary") == 0) integer = 1;
        else if (strcmp(argv[i], "--cuda") == 0) cuda = 1;
        else if (dir || argv[i][0] == '-')
            stop(argv[0], "takes the directory of the MNIST files, or none, --seed 1 (or above), --true-ternary, --cuda and --resume FILE");
        else dir = argv[i];
    }
    if (cuda && !gpu())
        stop("--cuda",
             "this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, or by make build/image_classifier_cuda");
    if (dir) {
        t.train = read_mnist(dir, "train-images-idx3-ubyte", "train-labels-idx1-ubyte");
        t.test = read_mnist(dir, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte");
        t.title = "MNIST";
        t.epochs = 10;
        t.shift = 1;
    } else {
        t.train = draw_images(10000);
        t.test = draw_images(2000);
        t.title = "drawn digits";
        t.epochs = 4;
    }
    predicted = (uint8_t *)malloc((size_t)t.test.count);
    order = (int *)calloc((size_t)t.train.count, sizeof *order);
    desc.parallel = tern_pool_parallel(pool);
    if (cuda) desc.backend = gpu();
    if (!pool || !predicted || !order) stop("start", "out of memory");
    memset(&at, 0, sizeof at);
    memcpy(at.magic, magic, sizeof magic);
    at.first = at.which = integer ? NETWORKS - 1 : 0;
    at.end = integer ? NETWORKS : NETWORKS - 1;
    at.images = t.train.count;
    at.seed = seed;
    if (resume) kept = read_state(resume, &at, order, &size);
    begun -= at.elapsed;
    memset(&on_signal, 0, sizeof on_signal);
    on_signal.sa_handler = interrupt;
    on_signal.sa_flags = (int)SA_RESETHAND; /* a second one does not wait */
    sigaction(SIGINT, &on_signal, NULL);
    sigaction(SIGTERM, &on_signal, NULL);
    if (tern_open(&c, &desc, &error) != TERN_OK) stop("ternary", error.text);
    printf("%s: %d images to learn from, %d to test on; %d-%d-%d-%d network, tier %s, %d threads\n", t.title, t.train.count, t.test.count,
           PIXELS, HIDDEN, HIDDEN, CLASSES, tern_backend_name(c), desc.parallel.workers);

    for (; at.which < at.end; at.which++, at.step = 0) {
        const recipe *how = &recipes[at.which];
        network net;
        tern_audit audit;
        double accuracy;
        open_network(c, &net, how, (int)at.seed);
        if (kept) check(c, tern_model_load(c, &net.model, kept, size));
        free(kept);
        kept = NULL;
        train(c, &net, &t, &at, order, begun);
        if (interrupted) {
            at.elapsed = seconds() - begun;
            save_state(c, &net, &at, order);
            return 128 + interrupted;
        }
        freeze(c, &net);
        check(c, tern_model_audit(c, &net.model, &audit));
        accuracy = accuracy_of(c, &net, &t.test, predicted);
        snprintf(at.table[at.which], sizeof at.table[0], "%-18s %8.2f%% %12ld %12ld %10.1f %10.1f", how->name, 100 * accuracy,
                 (long)(audit.weights * 4), (long)audit.packed_bytes, microseconds(c, &net, 1), microseconds(c, &net, TEST_BATCH));
        if (cuda && how->act == TERN_ACT_INT8) compare(c, &net, how, &t.test);
        close_network(c, &net);
    }

    printf("\n%-18s %9s %12s %12s %21s\n%-18s %9s %12s %12s %10s %10s\n", "", "accuracy", "bytes", "bytes", "microseconds an image",
           "", "on test", "as float", "as kept", "one", "of 256");
    for (int64_t i = at.first; i < at.end; i++) puts(at.table[i]);
    write_picture(&t.test, predicted);
    printf("%.0f seconds in all\n", seconds() - begun);

    free(t.train.pixels), free(t.train.labels), free(t.test.pixels), free(t.test.labels), free(predicted), free(order);
    tern_close(c);
    tern_pool_destroy(pool);
    return 0;
}
