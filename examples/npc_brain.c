/* Creatures in a small arena that learn while they live: which steps bring food (*), and which bring poison (x). All of
   them share a brain of two ternary layers, trained in integers between two frames for as long as a budget of time
   lasts. What is random comes from a seed and training has the same bits on every machine; so the keys that were pressed and the
   number of training steps of each frame are a whole recording, and its replay ends in the same hash anywhere.

       cc -O2 -I. examples/npc_brain.c -o build/npc_brain -pthread
       build/npc_brain                            in a terminal; f throws food, p poison, q ends
       build/npc_brain --headless 6000            as fast as it goes, and a line for every 1000 frames
       build/npc_brain --record FILE              keeps the inputs; --replay FILE lives that life again, and compares

   With an NVIDIA GPU, after `make cuda`, and with the library's folder as -L/usr/local/cuda/lib64 where it needs one:

       cc -O2 -I. -DUSE_CUDA examples/npc_brain.c build/ternary_cuda.o -o build/npc_brain_cuda -lcudart -lstdc++ -pthread
       build/npc_brain_cuda --cuda --record FILE  thinks and learns on the first GPU; the CPU lives that life again

   --seed N: another world. --budget N: microseconds of training in a frame (default 300). --steps N: so many training
   steps in each frame, whatever the time. TERNARY_ISA=scalar and others choose a tier. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime, nanosleep */
#define TERNARY_IMPLEMENTATION
#include "ternary.h"
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 20, CREATURES = 8, ITEMS = 64 /* of each kind */, DIRECTIONS = 4, TURNS = 3 };
enum { NOTHING, FOOD, POISON };
enum { SIGHT = 3, SIDE = 2 * SIGHT + 1, CELLS = SIDE * SIDE, INPUTS = 2 * CELLS, HIDDEN = 64, LAYERS = 2 };
enum { AHEAD = 6 /* frames that count */, MEMORY = 4096, BATCH = 64, PERIOD = 250 /* frames of a count */ };

static void stop(const char *what, const char *why)
{
    fprintf(stderr, "npc_brain: %s: %s\n", what, why);
    exit(1);
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

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

/* splitmix64 (Steele et al. 2014) */
static uint32_t random_below(uint64_t *state, uint32_t n)
{
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return (uint32_t)((z >> 32) * n >> 32);
}

/* -- the arena: a torus of cells -- */

typedef struct { int x, y; } place;
typedef struct { place at; int direction; } creature;
typedef struct { uint64_t random; int items; uint8_t cells[HEIGHT][WIDTH]; creature creatures[CREATURES]; } world;

static const place ahead[DIRECTIONS] = {{0, -1}, {1, 0}, {0, 1}, {-1, 0}}; /* to its right lies the next one */

static uint8_t *cell(world *w, int x, int y) { return &w->cells[(y + HEIGHT) % HEIGHT][(x + WIDTH) % WIDTH]; }

/* In two statements: which argument of a call comes first differs between machines. */
static place anywhere(world *w)
{
    place at;
    at.x = (int)random_below(&w->random, WIDTH);
    at.y = (int)random_below(&w->random, HEIGHT);
    return at;
}

static void throw_item(world *w, uint8_t kind)
{
    place at;
    if (w->items == WIDTH * HEIGHT / 2) return; /* enough */
    w->items++;
    do at = anywhere(w); while (*cell(w, at.x, at.y) != NOTHING);
    *cell(w, at.x, at.y) = kind;
}

static void create_world(world *w, uint64_t seed)
{
    memset(w, 0, sizeof *w);
    w->random = seed;
    for (int i = 0; i < ITEMS; i++) throw_item(w, FOOD), throw_item(w, POISON);
    for (int i = 0; i < CREATURES; i++) w->creatures[i].at = anywhere(w);
}

/* What a creature that turns to a direction sees around it: cells of food, then those of poison. Its own cell is a constant. */
static void look(world *w, place at, int direction, int8_t *view)
{
    const place front = ahead[direction], right = ahead[(direction + 1) % DIRECTIONS];
    for (int i = 0; i < CELLS; i++) {
        const int far = i / SIDE - SIGHT, side = i % SIDE - SIGHT;
        const int item = *cell(w, at.x + far * front.x + side * right.x, at.y + far * front.y + side * right.y);
        view[i] = item == FOOD || i == CELLS / 2;
        view[CELLS + i] = item == POISON || i == CELLS / 2;
    }
}

/* Takes a step, and what lies there; another of its kind then appears elsewhere. */
static int go(world *w, creature *who)
{
    uint8_t *here;
    int found;
    who->at.x = (who->at.x + ahead[who->direction].x + WIDTH) % WIDTH;
    who->at.y = (who->at.y + ahead[who->direction].y + HEIGHT) % HEIGHT;
    here = cell(w, who->at.x, who->at.y);
    found = *here;
    if (found == NOTHING) return found;
    *here = NOTHING;
    w->items--;
    throw_item(w, (uint8_t)found);
    return found;
}

/* -- the brain: view -> what a step ahead will bring -- */

/* A view, and what the frames after it brought, the nearest most. */
typedef struct { int8_t view[INPUTS]; int16_t reward; } experience;

typedef struct {
    tern_context *c;
    tern_param weights[LAYERS], *list[LAYERS];
    tern_model model;
    tern_linear layers[LAYERS];
    void *saved[LAYERS];
    float views[BATCH][INPUTS], expected[BATCH], errors[BATCH]; /* of which the backend has its own: */
    float *x, *hidden, *value, *dvalue, *dhidden;               /* [BATCH, INPUTS], [BATCH, HIDDEN], [BATCH], ... */
    uint64_t seed, random;
    uint32_t steps;
    tern_flips *flips;
    experience memory[MEMORY], trail[AHEAD][CREATURES]; /* the trail is still to be rewarded */
    int64_t lived; /* experiences */
} brain;

static void check(const brain *b, tern_result result) { if (result != TERN_OK) stop("ternary", tern_last_error(b->c)->text); }

/* Backend memory that must be there. */
static void *take(brain *b, size_t bytes)
{
    void *p = tern_alloc(b->c, bytes);
    if (!p) stop("brain", "no memory");
    return p;
}

static void create_layer(brain *b, int layer, int64_t rows, int64_t cols)
{
    tern_param *w = b->list[layer] = &b->weights[layer];
    tern_linear *l = &b->layers[layer];
    tern_fill_args noise = {.count = rows * cols, .deviation = 0.1f, .seed = b->seed, .stream = (uint32_t)layer}; /* about 1/sqrt(cols) */
    tern_need need;
    snprintf(w->name, sizeof w->name, "layer%d", layer);
    w->rows = rows;
    w->cols = cols;
    w->grain = TERN_PER_ROW;
    w->buffer[TERN_SCALES].type = TERN_LOG;
    check(b, tern_param_alloc(b->c, w, TERN_FOR_FLIPS));
    noise.x = (float *)take(b, (size_t)noise.count * sizeof(float));
    check(b, tern_fill(b->c, &noise));
    check(b, tern_param_set(b->c, w, TERN_F32, noise.x));
    tern_free(b->c, noise.x);
    l->w = w;
    l->norm = layer ? TERN_NORM_RMS : TERN_NORM_NONE;
    check(b, tern_linear_need(b->c, l, BATCH, &need));
    check(b, tern_reserve(b->c, need.scratch));
    b->saved[layer] = take(b, need.saved);
}

static void create_brain(brain *b, uint64_t seed, int cuda)
{
    const tern_context_desc desc = {.backend = cuda ? gpu() : NULL};
    tern_error error;
    memset(b, 0, sizeof *b);
    if (tern_open(&b->c, &desc, &error) != TERN_OK) stop("ternary", error.text);
    b->seed = b->random = seed;
    b->x = (float *)take(b, sizeof b->views);
    b->hidden = (float *)take(b, BATCH * HIDDEN * sizeof(float));
    b->value = (float *)take(b, sizeof b->expected);
    b->dvalue = (float *)take(b, sizeof b->errors);
    b->dhidden = (float *)take(b, BATCH * HIDDEN * sizeof(float));
    b->flips = (tern_flips *)take(b, sizeof *b->flips);
    create_layer(b, 0, HIDDEN, INPUTS);
    create_layer(b, 1, 1, HIDDEN);
    b->model = (tern_model){b->list, LAYERS};
    check(b, tern_model_strict(b->c, &b->model)); /* nothing that learns is a float */
}

static void close_brain(brain *b)
{
    for (int i = 0; i < LAYERS; i++) tern_param_free(b->c, &b->weights[i], -1), tern_free(b->c, b->saved[i]);
    tern_free(b->c, b->x), tern_free(b->c, b->hidden), tern_free(b->c, b->value);
    tern_free(b->c, b->dvalue), tern_free(b->c, b->dhidden), tern_free(b->c, b->flips);
    tern_close(b->c);
}

static void relu(brain *b, int64_t n, const float *dy)
{
    check(b, tern_map(b->c, &(tern_map_args){.fn = TERN_MAP_RELU, .count = n * HIDDEN, .a = b->hidden, .y = b->hidden,
                                             .dy = dy, .da = dy ? b->dhidden : NULL}));
}

static void set_view(brain *b, int row, const int8_t *view) { for (int i = 0; i < INPUTS; i++) b->views[row][i] = view[i]; }

/* The views -> what is expected of each. */
static void expect(brain *b, int64_t n)
{
    check(b, tern_copy(b->c, b->x, b->views, (size_t)n * sizeof b->views[0], TERN_TO_DEVICE));
    check(b, tern_linear_forward(b->c, &b->layers[0], n, b->x, b->hidden, b->saved[0]));
    relu(b, n, NULL);
    check(b, tern_linear_forward(b->c, &b->layers[1], n, b->hidden, b->value, b->saved[1]));
    check(b, tern_copy(b->c, b->expected, b->value, (size_t)n * sizeof(float), TERN_TO_HOST));
}

/* One step on the squared error of what was expected of some memories. Gradients are pushes on integer accumulators, which flip trits. */
static void learn(brain *b)
{
    const uint32_t known = b->lived < MEMORY ? (uint32_t)b->lived : MEMORY;
    const experience *drawn[BATCH];
    tern_schedule schedule = {.kind = TERN_LINEAR, .peak = 3, .floor = 0.5f, .steps = 4000};
    tern_step step = {.seed = b->seed, .step = ++b->steps, .flips = b->flips};
    for (int i = 0; i < BATCH; i++) set_view(b, i, (drawn[i] = &b->memory[random_below(&b->random, known)])->view);
    expect(b, BATCH);
    for (int i = 0; i < BATCH; i++) b->errors[i] = b->expected[i] - (float)drawn[i]->reward / 64;
    check(b, tern_copy(b->c, b->dvalue, b->errors, sizeof b->errors, TERN_TO_DEVICE));
    b->layers[0].seed = (uint64_t)step.step << 32;
    b->layers[1].seed = b->layers[0].seed + 1;
    check(b, tern_linear_backward(b->c, &b->layers[1], BATCH, b->hidden, b->saved[1], b->dvalue, b->dhidden));
    relu(b, BATCH, b->dhidden);
    check(b, tern_linear_backward(b->c, &b->layers[0], BATCH, b->x, b->saved[0], b->dhidden, NULL));
    check(b, tern_schedule_rate(b->c, &schedule, step.step, &step.push));
    check(b, tern_model_step(b->c, &b->model, &step));
}

/* -- a life -- */

typedef struct { int64_t food, poison; } haul;

/* What was found now counts for the steps before too, the less the longer ago they were; the oldest of them becomes a memory. */
static void remember(brain *b, int64_t frame, int who, const int8_t *view, int found)
{
    static const int16_t share[AHEAD] = {64, 45, 32, 22, 16, 11}; /* of 64 */
    experience *oldest = &b->trail[frame % AHEAD][who];
    if (frame >= AHEAD) b->memory[b->lived++ % MEMORY] = *oldest;
    memcpy(oldest->view, view, INPUTS);
    oldest->reward = 0;
    for (int i = 0; i < AHEAD; i++) {
        experience *e = &b->trail[(frame + AHEAD - i) % AHEAD][who];
        e->reward = (int16_t)(e->reward + (found == FOOD ? share[i] : found == POISON ? -share[i] : 0));
    }
}

/* The direction after a turn: straight on, to the right, to the left. */
static int turned(int direction, int turn) { return (direction + (turn == 2 ? DIRECTIONS - 1 : turn)) % DIRECTIONS; }

/* Every creature looks ahead, right and left, and goes where it expects most; now and then anywhere. */
static void move(world *w, brain *b, int64_t frame, haul *h)
{
    int8_t views[CREATURES][TURNS][INPUTS];
    for (int i = 0; i < CREATURES; i++)
        for (int k = 0; k < TURNS; k++) {
            look(w, w->creatures[i].at, turned(w->creatures[i].direction, k), views[i][k]);
            set_view(b, i * TURNS + k, views[i][k]);
        }
    expect(b, CREATURES * TURNS);
    for (int i = 0; i < CREATURES; i++) {
        const float *value = &b->expected[i * TURNS];
        int best = 0, found;
        if (random_below(&w->random, 16) == 0) best = (int)random_below(&w->random, TURNS);
        else for (int k = 1; k < TURNS; k++) if (value[k] > value[best]) best = k;
        w->creatures[i].direction = turned(w->creatures[i].direction, best);
        found = go(w, &w->creatures[i]);
        h->food += found == FOOD;
        h->poison += found == POISON;
        remember(b, frame, i, views[i][best], found);
    }
}

/* -- a life: frames of moving and learning, from inputs alone -- */

typedef struct { uint8_t key, steps; } input; /* of a frame */
typedef struct {
    uint64_t seed;
    int64_t frames, budget, steps, cuda; /* frames, steps: -1 for none */
    const char *record, *replay;
} options;
typedef struct {
    options o;
    world w;
    brain b;
    FILE *record, *replay;
    int64_t frame;
    haul now, early, late;           /* of this period, the first, and the last before this */
    double moving, learning, a_step; /* running means of microseconds: of a frame, a frame, a training step */
    double left;                     /* of the budget */
} life;

static void follow(double *mean, double x) { *mean += *mean > 0 ? 0.02 * (x - *mean) : x; }

static void learn_once(life *l)
{
    const double start = microseconds();
    double took;
    learn(&l->b);
    took = microseconds() - start;
    l->left -= took;
    follow(&l->a_step, took);
}

/* Trains as often as the frame says; or, after a first period of living only, while there is time for a step more, which is
   then what the frame says. A step longer than a frame's budget waits until several frames have saved for it. */
static void learn_for_a_while(life *l, input *in)
{
    const double start = microseconds();
    int i;
    l->left = (double)l->o.budget + (l->a_step > (double)l->o.budget ? l->left : 0);
    if (l->replay) for (i = 0; i < in->steps; i++) learn_once(l);
    else if (l->frame >= PERIOD && l->o.steps >= 0) for (; in->steps < l->o.steps; in->steps++) learn_once(l);
    else if (l->frame >= PERIOD) for (; in->steps < 255 && l->left > l->a_step; in->steps++) learn_once(l);
    follow(&l->learning, microseconds() - start);
}

static void live(life *l, input *in)
{
    const double start = microseconds();
    if (in->key == 'f' || in->key == 'p') for (int i = 0; i < ITEMS / 4; i++) throw_item(&l->w, in->key == 'f' ? FOOD : POISON);
    move(&l->w, &l->b, l->frame, &l->now);
    follow(&l->moving, microseconds() - start);
    learn_for_a_while(l, in);
    if (++l->frame % PERIOD) return;
    l->late = l->now;
    if (l->frame == PERIOD) l->early = l->now;
    l->now = (haul){0, 0};
}

/* FNV-1a */
static int hash_bytes(void *hash, const void *data, size_t bytes)
{
    uint64_t *h = (uint64_t *)hash;
    for (size_t i = 0; i < bytes; i++) *h = (*h ^ ((const uint8_t *)data)[i]) * UINT64_C(1099511628211);
    return 0;
}

/* Of all that decides what comes next, but memories: trits, scales and accumulators, and the arena. */
static uint64_t hash_life(life *l)
{
    uint64_t hash = UINT64_C(14695981039346656037) ^ l->w.random ^ l->b.random;
    const tern_sink sink = {hash_bytes, &hash};
    check(&l->b, tern_model_save(l->b.c, &l->b.model, TERN_FOR_TRAINING, &sink));
    hash_bytes(&hash, l->w.cells, sizeof l->w.cells);
    for (int i = 0; i < CREATURES; i++) hash_bytes(&hash, (uint8_t[]){(uint8_t)l->w.creatures[i].at.x, (uint8_t)l->w.creatures[i].at.y}, 2);
    return hash;
}

/* -- recordings: a magic number, the seed, the input of each frame, that with the key q, and the hash -- */

static const char magic[8] = "npclife";

static void write_number(FILE *f, uint64_t v) { for (int i = 0; i < 8; i++) fputc((int)(v >> 8 * i & 255), f); }

static uint64_t read_number(FILE *f)
{
    uint64_t v = 0;
    for (int i = 0; i < 8; i++) v |= (uint64_t)(fgetc(f) & 255) << 8 * i;
    return v;
}

static void open_recording(life *l)
{
    char start[sizeof magic];
    if (l->o.replay) {
        l->replay = fopen(l->o.replay, "rb");
        if (!l->replay || fread(start, sizeof start, 1, l->replay) != 1 || memcmp(start, magic, sizeof magic))
            stop(l->o.replay, "is not a recording");
        l->o.seed = read_number(l->replay);
    }
    if (!l->o.record) return;
    if (!(l->record = fopen(l->o.record, "wb"))) stop(l->o.record, "cannot be written");
    fwrite(magic, sizeof magic, 1, l->record);
    write_number(l->record, l->o.seed);
}

static void record(life *l, const input *in)
{
    if (!l->record) return;
    fputc(in->key, l->record);
    fputc(in->steps, l->record);
}

/* Prints the hash and keeps it, or compares it with the one that was kept; 1 where they differ. */
static int close_recording(life *l)
{
    const uint64_t hash = hash_life(l);
    const int differs = l->replay && read_number(l->replay) != hash;
    if (l->replay && (feof(l->replay) || fclose(l->replay))) stop(l->o.replay, "is truncated");
    if (l->record) write_number(l->record, hash);
    if (l->record && (ferror(l->record) | fclose(l->record))) stop(l->o.record, "cannot be written");
    printf("%lld frames, hash %016llx%s\n", (long long)l->frame, (unsigned long long)hash,
           !l->o.replay ? "" : differs ? ": DIFFERENT from the recording" : ", as recorded");
    return differs;
}

/* -- what one sees -- */

static struct termios terminal;
static int in_terminal;

static void leave_terminal(void)
{
    if (!in_terminal) return;
    in_terminal = 0;
    tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
    fputs("\033[?25h\033[?1049l", stdout);
    fflush(stdout);
}

/* Keys come at once and without an echo, Ctrl-C as a key too. */
static void enter_terminal(void)
{
    struct termios t;
    if (tcgetattr(STDIN_FILENO, &terminal) || !isatty(STDOUT_FILENO)) stop("start", "no terminal; --headless FRAMES needs none");
    t = terminal;
    t.c_lflag &= (tcflag_t)~(ICANON | ECHO | ISIG);
    tcsetattr(STDIN_FILENO, TCSANOW, &t);
    atexit(leave_terminal);
    in_terminal = 1;
    fputs("\033[?1049h\033[?25l\033[2J", stdout);
}

static long long per_1000(int64_t count) { return (long long)(count * 1000 / PERIOD); }

static void report(life *l)
{
    const brain *b = &l->b;
    const char *end = in_terminal ? "\033[K\n" : "\n";
    tern_audit a;
    tern_flips flips;
    check(b, tern_model_audit(b->c, &b->model, &a));
    check(b, tern_copy(b->c, &flips, b->flips, sizeof flips, TERN_TO_HOST));
    printf("frame %lld: %lld food and %lld poison per 1000 frames; before learning %lld and %lld%s",
           (long long)l->frame, per_1000(l->late.food), per_1000(l->late.poison), per_1000(l->early.food), per_1000(l->early.poison), end);
    printf("    %lld weights in %zu bytes, %zu more to learn with; %u training steps, %lld flips%s", (long long)a.weights, a.packed_bytes,
           a.bytes[TERN_ACCUM], b->steps, (long long)flips.flips, end);
    printf("    %.0f microseconds of a frame to move, %.0f to learn, %.0f for a training step%s", l->moving, l->learning, l->a_step, end);
}

static void draw(life *l)
{
    static const char *const looks[] = {" ", "\033[32m*", "\033[31mx"};
    const char *screen[HEIGHT][WIDTH];
    for (int y = 0; y < HEIGHT; y++) for (int x = 0; x < WIDTH; x++) screen[y][x] = looks[l->w.cells[y][x]];
    for (int i = 0; i < CREATURES; i++) screen[l->w.creatures[i].at.y][l->w.creatures[i].at.x] = "\033[1;33m@\033[22m";
    printf("\033[H");
    for (int y = 0; y < HEIGHT; y++) {
        for (int x = 0; x < WIDTH; x++) fputs(screen[y][x], stdout);
        printf("\033[0m|\n");
    }
    report(l);
    printf("f food   p poison   q end\033[K");
    fflush(stdout);
}

static uint8_t pressed_key(void)
{
    struct pollfd keys = {STDIN_FILENO, POLLIN, 0};
    uint8_t key = 0;
    if (poll(&keys, 1, 30 /* milliseconds: the pace of the frames */) > 0 && read(STDIN_FILENO, &key, 1) != 1) return 'q';
    return key == 3 /* Ctrl-C */ ? 'q' : key;
}

static input next_input(const life *l)
{
    input in = {0, 0};
    if (l->replay) {
        const int key = fgetc(l->replay), steps = fgetc(l->replay);
        if (steps == EOF) stop(l->o.replay, "is truncated");
        in = (input){(uint8_t)key, (uint8_t)steps};
    } else if (l->o.frames < 0) in.key = pressed_key();
    else if (l->frame == l->o.frames) in.key = 'q';
    return in;
}

static options parse(int argc, char **argv)
{
    options o = {.seed = 1, .frames = -1, .budget = 300, .steps = -1};
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        char *end = NULL;
        const int64_t number = value ? strtoll(value, &end, 10) : -1;
        if (!strcmp(name, "--cuda")) o.cuda = 1, i--;
        else if (value && !strcmp(name, "--record")) o.record = value;
        else if (value && !strcmp(name, "--replay")) o.replay = value;
        else if (number < 0 || *end || end == value)
            stop(name, "--headless FRAMES, --record FILE, --replay FILE, --seed N, --budget MICROSECONDS, --steps N or --cuda");
        else if (!strcmp(name, "--headless")) o.frames = number;
        else if (!strcmp(name, "--seed")) o.seed = (uint64_t)number;
        else if (!strcmp(name, "--budget")) o.budget = number;
        else if (!strcmp(name, "--steps") && number <= 255) o.steps = number;
        else stop(name, "is no option, or its number is too large");
    }
    if (o.cuda && !gpu())
        stop("--cuda", "this program was built without CUDA; build it with -DUSE_CUDA and ternary_cuda.o, or by make build/npc_brain_cuda");
    return o;
}

int main(int argc, char **argv)
{
    static life l;
    input in;
    int failed;
    l.o = parse(argc, argv);
    open_recording(&l);
    create_world(&l.w, l.o.seed);
    create_brain(&l.b, l.o.seed, (int)l.o.cuda);
    if (!l.replay && l.o.frames < 0) enter_terminal();
    for (in = next_input(&l); in.key != 'q'; in = next_input(&l)) {
        live(&l, &in);
        record(&l, &in);
        if (in_terminal) draw(&l);
        else if (l.frame % 1000 == 0) report(&l);
    }
    leave_terminal();
    record(&l, &in);
    failed = close_recording(&l);
    close_brain(&l.b);
    return failed;
}
