/* Data parallel training: every rank has the whole network and takes a part of each batch.

       mpicc -O2 -I. examples/train_mpi.c -o build/train_mpi -pthread
       mpirun -n 2 build/train_mpi build/two.gguf

   Weights and gradients lie in one array each, lent to the parameters. Between backward and step one MPI_Allreduce
   adds the gradients up over the ranks; then every rank does the same step on the same weights.

       train_mpi OUT [STEPS [PARTS [OTHER]]]

   Each batch is cut into PARTS, one a rank unless given; a rank with several adds their gradients up before it steps.
   The weights go to the file OUT, and their distance from those of OTHER is printed. Two parts give the same bits on one
   rank and on two. Parts of other sizes sum a gradient in another order: weights differ by its rounding, 1e-7, until a
   trit flips a step earlier in one of the trainings. */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INPUTS = 32, HIDDEN = 64, CLASSES = 8, LAYERS = 3, BATCH = 256 };
static const int64_t widths[LAYERS + 1] = {INPUTS, HIDDEN, HIDDEN, CLASSES};

static void fail(const char *text) { fprintf(stderr, "train_mpi: %s\n", text); MPI_Abort(MPI_COMM_WORLD, 1); }

static void ok(tern_context *c, tern_result result) { if (result != TERN_OK) fail(tern_last_error(c)->text); }

static float *take(tern_context *c, int64_t count)
{
    float *p = (float *)tern_alloc(c, (size_t)count * sizeof *p);
    if (!p) fail("out of memory");
    return p;
}

/* -- the network: three BitLinear layers, a ReLU between -- */

typedef struct network {
    tern_param params[LAYERS], *list[LAYERS];
    tern_model model;
    int64_t count;                  /* of weights */
    float *weights, *gradients;     /* behind the gradients one float: the sum of the losses */
    float *batch; int32_t *targets; /* [BATCH, INPUTS], [BATCH] */
    float *x[LAYERS + 1], *dx[LAYERS + 1], *saved[LAYERS], *losses; /* of a part */
} network;

static tern_linear layer_of(network *net, int i) { return (tern_linear){.w = &net->params[i], .norm = TERN_NORM_RMS}; }
static void open_network(tern_context *c, network *net)
{
    int64_t at = 0;
    memset(net, 0, sizeof *net);
    for (int i = 0; i < LAYERS; i++) net->count += widths[i] * widths[i + 1];
    net->model = (tern_model){net->list, LAYERS};
    net->weights = take(c, net->count);
    net->gradients = take(c, net->count + 1);
    net->batch = take(c, BATCH * INPUTS);
    net->targets = (int32_t *)tern_alloc(c, BATCH * sizeof(int32_t));
    net->losses = take(c, BATCH);
    ok(c, tern_fill(c, &(tern_fill_args){.count = net->count, .x = net->weights, .deviation = 0.15f, .seed = 1})); /* about 1/sqrt(inputs) */
    for (int i = 0; i < LAYERS; i++) {
        tern_param *w = net->list[i] = &net->params[i];
        const tern_linear layer = layer_of(net, i);
        tern_need need;
        snprintf(w->name, sizeof w->name, "layer%d", i);
        w->rows = widths[i + 1], w->cols = widths[i], w->grain = TERN_PER_ROW;
        w->buffer[TERN_SHADOW] = (tern_buffer){.data = net->weights + at, .count = (size_t)(w->rows * w->cols)};
        w->buffer[TERN_GRAD] = (tern_buffer){.data = net->gradients + at, .count = (size_t)(w->rows * w->cols)};
        at += w->rows * w->cols;
        ok(c, tern_param_alloc(c, w, TERN_FOR_ADAMW)); /* the buffers that are not there yet */
        ok(c, tern_param_set(c, w, TERN_TYPE_DEFAULT, NULL));
        ok(c, tern_linear_need(c, &layer, BATCH, &need));
        ok(c, tern_reserve(c, need.scratch));
        net->saved[i] = take(c, (int64_t)(need.saved + 3) / 4);
        net->x[i + 1] = take(c, BATCH * widths[i + 1]);
        net->dx[i + 1] = take(c, BATCH * widths[i + 1]);
    }
}

static void close_network(tern_context *c, network *net)
{
    for (int i = 0; i < LAYERS; i++) {
        tern_param_free(c, &net->params[i], -1);
        tern_free(c, net->saved[i]), tern_free(c, net->x[i + 1]), tern_free(c, net->dx[i + 1]);
    }
    tern_free(c, net->losses), tern_free(c, net->targets), tern_free(c, net->batch), tern_free(c, net->gradients), tern_free(c, net->weights);
}

/* In place. The derivative needs only the sign, which the output keeps. */
static void relu(tern_context *c, int64_t count, float *y, float *dy)
{
    ok(c, tern_map(c, &(tern_map_args){.fn = TERN_MAP_RELU, .count = count, .a = y, .y = y, .dy = dy, .da = dy}));
}

static void forward(tern_context *c, network *net, int first, int n)
{
    net->x[0] = net->batch + first * INPUTS;
    for (int i = 0; i < LAYERS; i++) {
        const tern_linear layer = layer_of(net, i);
        ok(c, tern_linear_forward(c, &layer, n, net->x[i], net->x[i + 1], net->saved[i]));
        if (i + 1 < LAYERS) relu(c, n * widths[i + 1], net->x[i + 1], NULL);
    }
}

static int largest_of(const float *x)
{
    int best = 0;
    for (int k = 1; k < CLASSES; k++) if (x[k] > x[best]) best = k;
    return best;
}

/* The task: which of eight groups of four inputs has the largest sum. Batch `step` is the same on every rank. */
static void draw_batch(tern_context *c, network *net, uint32_t step)
{
    ok(c, tern_fill(c, &(tern_fill_args){.count = BATCH * INPUTS, .x = net->batch, .deviation = 1, .seed = 2, .stream = step}));
    for (int i = 0; i < BATCH; i++) {
        const float *x = net->batch + i * INPUTS;
        float sums[CLASSES];
        for (int k = 0; k < CLASSES; k++, x += 4) sums[k] = x[0] + x[1] + x[2] + x[3];
        net->targets[i] = largest_of(sums);
    }
}

/* Adds a part's share of the gradient of the batch's mean loss, and its losses to their sum. */
static void learn_part(tern_context *c, network *net, int first, int n)
{
    forward(c, net, first, n);
    ok(c, tern_loss(c, &(tern_loss_args){.n = n, .classes = CLASSES, .logits = net->x[LAYERS], .targets = net->targets + first,
                                         .losses = net->losses, .dlogits = net->dx[LAYERS], .scale = 1.0f / BATCH}));
    ok(c, tern_sum(c, &(tern_sum_args){.count = n, .x = net->losses, .y = net->gradients + net->count, .add = 1}));
    for (int i = LAYERS - 1; i >= 0; i--) {
        const tern_linear layer = layer_of(net, i);
        if (i + 1 < LAYERS) relu(c, n * widths[i + 1], net->x[i + 1], net->dx[i + 1]);
        ok(c, tern_linear_backward(c, &layer, n, net->x[i], net->saved[i], net->dx[i + 1], i ? net->dx[i] : NULL));
    }
}

static void train(tern_context *c, network *net, uint32_t steps, int rank, int ranks, int parts)
{
    const tern_schedule schedule = {TERN_COSINE, 5e-3f, 5e-4f, steps / 10, 0, steps};
    float *loss = net->gradients + net->count;
    for (uint32_t step = 1; step <= steps; step++) {
        tern_step s = {.clip = 1, .step = step};
        draw_batch(c, net, step);
        *loss = 0; /* the gradients are zero after a step */
        for (int part = rank; part < parts; part += ranks) learn_part(c, net, BATCH / parts * part, BATCH / parts);
        MPI_Allreduce(MPI_IN_PLACE, net->gradients, (int)net->count + 1, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        if (rank == 0 && step % (steps / 10 + 1) == 0) printf("step %u of %u   loss %.4f\n", (unsigned)step, (unsigned)steps, *loss / BATCH);
        ok(c, tern_schedule_rate(c, &schedule, step, &s.rate));
        ok(c, tern_model_step(c, &net->model, &s));
    }
    ok(c, tern_sync(c));
    memcpy(net->gradients, net->weights, (size_t)net->count * sizeof(float)); /* did the reduction give all ranks the same bits? */
    MPI_Bcast(net->gradients, (int)net->count, MPI_FLOAT, 0, MPI_COMM_WORLD);
    if (memcmp(net->gradients, net->weights, (size_t)net->count * sizeof(float))) fail("the ranks have different weights");
}

/* What is right of a batch that no step has seen; the weights as a file; how far they are from those of another. */
static void report(tern_context *c, network *net, const char *out, const char *other)
{
    double largest = 0;
    int right = 0;
    draw_batch(c, net, 0);
    forward(c, net, 0, BATCH);
    for (int i = 0; i < BATCH; i++) right += largest_of(net->x[LAYERS] + i * CLASSES) == net->targets[i];
    printf("%d of %d right\n", right, BATCH);
    ok(c, tern_model_save_file(c, &net->model, 1 << TERN_SHADOW, out));
    if (!other) return;
    memcpy(net->gradients, net->weights, (size_t)net->count * sizeof(float));
    ok(c, tern_model_load_file(c, &net->model, other));
    for (int64_t i = 0; i < net->count; i++) {
        const double d = (double)net->gradients[i] - net->weights[i];
        if (d > largest || -d > largest) largest = d < 0 ? -d : d;
    }
    printf("largest difference of a weight from %s: %.9f\n", other, largest);
}

int main(int argc, char **argv)
{
    const int steps = argc > 2 ? atoi(argv[2]) : 200;
    tern_context *c;
    tern_error error;
    network net;
    int rank, ranks, parts;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    parts = argc > 3 ? atoi(argv[3]) : ranks;
    if (argc < 2 || steps < 1 || parts < 1 || BATCH % parts) fail("usage: train_mpi OUT [STEPS [PARTS [OTHER]]]; PARTS, the ranks unless given, divides 256");
    if (tern_open(&c, NULL, &error) != TERN_OK) fail(error.text);
    open_network(c, &net);
    train(c, &net, (uint32_t)steps, rank, ranks, parts);
    if (rank == 0) report(c, &net, argv[1], argc > 4 ? argv[4] : NULL);
    close_network(c, &net);
    tern_close(c);
    MPI_Finalize();
    return 0;
}
