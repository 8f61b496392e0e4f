/* Data parallel training: every rank has the whole network and takes a part of each batch.

       mpicc -O2 -I. examples/train_mpi.c -o build/train_mpi -pthread
       mpirun -n 2 build/train_mpi build/two.gguf

   Weights and gradients lie in one array each, lent to the parameters. Between backward and step one MPI_Allreduce
   adds the gradients up over the ranks; then every rank does the same step on the same weights.

       train_mpi OUT [STEPS [PARTS [OTHER]]] [--cuda]

   Each batch is cut into PARTS, one a rank unless given; a rank with several adds their gradients up before it steps.
   The weights go to the file OUT, and their distance from those of OTHER is printed. Two parts give the same bits on one
   rank and on two. Parts of other sizes sum a gradient in another order: weights differ by its rounding, 1e-7, until a
   trit flips a step earlier in one of the trainings.

   With NVIDIA GPUs, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       mpicc -O2 -I. -DUSE_CUDA examples/train_mpi.c build/ternary_cuda.o -o build/train_mpi_cuda -lcudart -lstdc++ -pthread
       mpirun -n 2 build/train_mpi_cuda build/two.gguf --cuda

   Every rank trains on its first GPU (of CUDA_VISIBLE_DEVICES); the CPU then finds the same bits in the packed weights. */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INPUTS = 32, HIDDEN = 64, CLASSES = 8, LAYERS = 3, BATCH = 256 };
static const int64_t widths[LAYERS + 1] = {INPUTS, HIDDEN, HIDDEN, CLASSES};

/* The table of the first GPU; NULL in a program without ternary_cuda.o. */
static const tern_backend *gpu(void)
{
#ifdef USE_CUDA
    return tern_cuda_backend(0);
#else
    return NULL;
#endif
}

static void fail(const char *text) { fprintf(stderr, "train_mpi: %s\n", text); MPI_Abort(MPI_COMM_WORLD, 1); }

static void ok(tern_context *c, tern_result result) { if (result != TERN_OK) fail(tern_last_error(c)->text); }

static float *take(tern_context *c, int64_t count)
{
    float *p = (float *)tern_alloc(c, (size_t)count * sizeof *p);
    if (!p) fail("out of memory");
    return p;
}

static void copy_out(tern_context *c, void *host, const float *x, int64_t count)
{
    ok(c, tern_copy(c, host, x, (size_t)count * 4, TERN_TO_HOST));
}
static void copy_in(tern_context *c, void *x, const void *host, int64_t count)
{
    ok(c, tern_copy(c, x, host, (size_t)count * 4, TERN_TO_DEVICE));
}

/* -- the network: three BitLinear layers, a ReLU between -- */

typedef struct network {
    tern_param params[LAYERS], *list[LAYERS];
    tern_model model;
    int64_t count;                  /* of weights */
    float *weights, *gradients;     /* behind the gradients one float: the sum of the losses */
    float *sum, *other;             /* on the host, as large: what MPI reads and writes */
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
    net->sum = (float *)malloc((size_t)(net->count + 1) * sizeof(float));
    net->other = (float *)malloc((size_t)(net->count + 1) * sizeof(float));
    if (!net->sum || !net->other) fail("out of memory");
    net->batch = take(c, BATCH * INPUTS);
    net->targets = (int32_t *)tern_alloc(c, BATCH * sizeof(int32_t));
    net->losses = take(c, BATCH);
    /* A deviation of about 1/sqrt(inputs). */
    ok(c, tern_fill(c, &(tern_fill_args){.count = net->count, .x = net->weights, .deviation = 0.15f, .seed = 1}));
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
    tern_free(c, net->losses), tern_free(c, net->targets), tern_free(c, net->batch),
        tern_free(c, net->gradients), tern_free(c, net->weights);
    free(net->sum), free(net->other);
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
    float batch[BATCH][INPUTS];
    int32_t targets[BATCH];
    ok(c, tern_fill(c, &(tern_fill_args){.count = BATCH * INPUTS, .x = net->batch, .deviation = 1, .seed = 2, .stream = step}));
    copy_out(c, batch, net->batch, BATCH * INPUTS);
    for (int i = 0; i < BATCH; i++) {
        const float *x = batch[i];
        float sums[CLASSES];
        for (int k = 0; k < CLASSES; k++, x += 4) sums[k] = x[0] + x[1] + x[2] + x[3];
        targets[i] = largest_of(sums);
    }
    copy_in(c, net->targets, targets, BATCH);
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
    for (uint32_t step = 1; step <= steps; step++) {
        tern_step s = {.clip = 1, .step = step};
        draw_batch(c, net, step);
        ok(c, tern_fill(c, &(tern_fill_args){.count = 1, .x = net->gradients + net->count})); /* the gradients are zero after a step */
        for (int part = rank; part < parts; part += ranks) learn_part(c, net, BATCH / parts * part, BATCH / parts);
        copy_out(c, net->sum, net->gradients, net->count + 1);
        MPI_Allreduce(MPI_IN_PLACE, net->sum, (int)net->count + 1, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        copy_in(c, net->gradients, net->sum, net->count);
        if (rank == 0 && step % (steps / 10 + 1) == 0)
            printf("step %u of %u   loss %.4f\n", (unsigned)step, (unsigned)steps, net->sum[net->count] / BATCH);
        ok(c, tern_schedule_rate(c, &schedule, step, &s.rate));
        ok(c, tern_model_step(c, &net->model, &s));
    }
    ok(c, tern_sync(c));
    copy_out(c, net->sum, net->weights, net->count); /* did the reduction give all ranks the same bits? */
    copy_out(c, net->other, net->weights, net->count);
    MPI_Bcast(net->sum, (int)net->count, MPI_FLOAT, 0, MPI_COMM_WORLD);
    if (memcmp(net->sum, net->other, (size_t)net->count * sizeof(float))) fail("the ranks have different weights");
}

/* What is right of a batch that no step has seen, whose logits are left. */
static int count_right(tern_context *c, network *net, float logits[BATCH][CLASSES])
{
    int32_t targets[BATCH];
    int right = 0;
    draw_batch(c, net, 0);
    forward(c, net, 0, BATCH);
    copy_out(c, logits, net->x[LAYERS], BATCH * CLASSES);
    copy_out(c, targets, (const float *)(const void *)net->targets, BATCH);
    for (int i = 0; i < BATCH; i++) right += largest_of(logits[i]) == targets[i];
    return right;
}

/* The file on the CPU: the same logits, bit by bit? */
static void compare(const char *path, float logits[BATCH][CLASSES])
{
    float again[BATCH][CLASSES];
    tern_context *cpu;
    tern_error error;
    network net;
    if (tern_open(&cpu, NULL, &error) != TERN_OK) fail(error.text);
    open_network(cpu, &net);
    ok(cpu, tern_model_load_file(cpu, &net.model, path));
    count_right(cpu, &net, again);
    if (memcmp(logits, again, sizeof again)) fail("other bits on the CPU");
    printf("the same bits on the tier %s\n", tern_backend_name(cpu));
    close_network(cpu, &net);
    tern_close(cpu);
}

/* The weights as a file, and how far they are from those of another. */
static void report(tern_context *c, network *net, const char *out, const char *other, int cuda)
{
    float logits[BATCH][CLASSES];
    double largest = 0;
    printf("%d of %d right\n", count_right(c, net, logits), BATCH);
    ok(c, tern_model_save_file(c, &net->model, 1 << TERN_SHADOW, out));
    if (cuda) compare(out, logits);
    if (!other) return;
    copy_out(c, net->sum, net->weights, net->count);
    ok(c, tern_model_load_file(c, &net->model, other));
    copy_out(c, net->other, net->weights, net->count);
    for (int64_t i = 0; i < net->count; i++) {
        const double d = (double)net->sum[i] - net->other[i];
        if (d > largest || -d > largest) largest = d < 0 ? -d : d;
    }
    printf("largest difference of a weight from %s: %.9f\n", other, largest);
}

int main(int argc, char **argv)
{
    const int cuda = argc > 1 && strcmp(argv[argc - 1], "--cuda") == 0, words = argc - cuda;
    const int steps = words > 2 ? atoi(argv[2]) : 200;
    const tern_context_desc desc = {.backend = cuda ? gpu() : NULL};
    tern_context *c;
    tern_error error;
    network net;
    int rank, ranks, parts;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    parts = words > 3 ? atoi(argv[3]) : ranks;
    if (cuda && !gpu())
        fail("--cuda: this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, or by make build/train_mpi_cuda");
    if (words < 2 || steps < 1 || parts < 1 || BATCH % parts)
        fail("usage: train_mpi OUT [STEPS [PARTS [OTHER]]] [--cuda]; PARTS, the ranks unless given, divides 256");
    if (tern_open(&c, &desc, &error) != TERN_OK) fail(error.text);
    open_network(c, &net);
    train(c, &net, (uint32_t)steps, rank, ranks, parts);
    if (rank == 0) report(c, &net, argv[1], words > 4 ? argv[4] : NULL, cuda);
    close_network(c, &net);
    tern_close(c);
    MPI_Finalize();
    return 0;
}
