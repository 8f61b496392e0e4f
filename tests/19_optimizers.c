/* Room 19, optimizers and shadow weights. Mutations that these tests see: the gradient of a scale clipped elsewhere, with the other
   sign of w/S, without its root or 1.5, or never plain; BF16 moments rounded to nearest or by one half word; given scales kept
   by a step; arguments of the optimizer checked after the gradient of alpha was added to. Of schedules: cosine for its square, decay
   ignored, sqrt(t) for 1 - sqrt(t), a warm-up one step longer, the floor or the check of warm-up against decay left out. Of
   accumulation: gradients of weights and of the bias overwritten instead of added. */

/* A ternary parameter and a dense one that is not decayed. */
typedef struct pair { tern_param w, b; tern_param *items[2]; tern_model m; } pair;

static void pair_open(tern_context *c, pair *o, int64_t rows, int64_t cols, tern_type shadow, int32_t buffers)
{
    memset(o, 0, sizeof *o);
    o->w = param_of("w", rows, cols, TERN_ABSMEAN, TERN_PER_ROW);
    o->b = param_of("b", 1, rows, TERN_DENSE, 0);
    o->b.flags = TERN_NO_DECAY;
    o->w.buffer[TERN_SHADOW].type = shadow;
    o->items[0] = &o->w;
    o->items[1] = &o->b;
    o->m.items = o->items;
    o->m.count = 2;
    CHECK_OK(c, tern_param_alloc(c, &o->w, buffers));
    CHECK_OK(c, tern_param_alloc(c, &o->b, buffers));
    set_random(c, &o->w);
    set_random(c, &o->b);
}

static void pair_close(tern_context *c, pair *o)
{
    tern_param_free(c, &o->w, -1);
    tern_param_free(c, &o->b, -1);
}

static void random_gradients(pair *o)
{
    int64_t i;
    int p;
    for (p = 0; p < 2; p++)
        for (i = 0; i < o->items[p]->rows * o->items[p]->cols; i++) grad_of(o->items[p])[i] = test_float();
}

/* Everything that a step may change. */
static void record_pair(record *r, const pair *o)
{
    int p, b;
    for (p = 0; p < 2; p++)
        for (b = 0; b < TERN_BUFFERS; b++) {
            const tern_buffer *buffer = &o->items[p]->buffer[b];
            const int64_t bytes = (int64_t)buffer->count * tern__type_bytes(tern__buffer_type(o->items[p], b));
            if (buffer->data) record_bytes(r, buffer->data, bytes);
        }
}

/* -- against float64 over several steps -- */

typedef struct reference { double w[600], m[600], v[600]; } reference;

static void reference_step(reference *o, const float *grad, int64_t n, const tern_step *s, double factor, double decay, int has_momentum)
{
    const double beta1 = s->beta1 > 0 ? s->beta1 : 0.9f, beta2 = s->beta2 > 0 ? s->beta2 : 0.99f, eps = s->eps > 0 ? s->eps : 1e-8f;
    int64_t i;
    for (i = 0; i < n; i++) {
        const double g = grad[i] * factor;
        double step = g;
        if (s->optimizer == TERN_ADAMW) {
            o->m[i] = beta1 * o->m[i] + (1 - beta1) * g;
            o->v[i] = beta2 * o->v[i] + (1 - beta2) * g * g;
            step = o->m[i] / (1 - pow(beta1, s->step)) / (sqrt(o->v[i] / (1 - pow(beta2, s->step))) + eps);
        } else if (has_momentum) step = o->m[i] = beta1 * o->m[i] + g;
        o->w[i] -= s->rate * (step + decay * o->w[i]);
    }
}

static void optimizers(tern_context *c, record *r)
{
    static reference ref[2];
    int variant;
    for (variant = 0; variant < 6; variant++) { /* AdamW, SGD with momentum, SGD; with and without clipping, decay and defaults */
        const tern_optimizer kind = variant % 3 ? TERN_SGD : TERN_ADAMW;
        const int32_t buffers = variant % 3 == 0 ? TERN_FOR_ADAMW : variant % 3 == 1 ? TERN_FOR_SGD : TERN_FOR_GRADIENT;
        tern_step s = TERN_ZERO;
        float norm2[1];
        int64_t i;
        int p;
        pair o;
        pair_open(c, &o, 20, 30, TERN_F32, buffers);
        for (p = 0; p < 2; p++) {
            memset(&ref[p], 0, sizeof ref[p]);
            for (i = 0; i < o.items[p]->rows * o.items[p]->cols; i++) ref[p].w[i] = ((float *)o.items[p]->buffer[TERN_SHADOW].data)[i];
        }
        s.optimizer = kind;
        s.rate = 0.05f;
        s.norm2 = norm2;
        if (variant >= 3) { s.clip = 2.5f; s.decay = 0.1f; s.beta1 = 0.8f; s.beta2 = 0.95f; s.eps = 1e-3f; }
        for (s.step = 1; s.step <= 5; s.step++) {
            double squares = 0.0, factor = 1.0;
            random_gradients(&o);
            if (s.step == 3) for (i = 0; i < 600; i++) grad_of(&o.w)[i] *= 0.01f; /* below the clip: left alone */
            for (p = 0; p < 2; p++)
                for (i = 0; i < o.items[p]->rows * o.items[p]->cols; i++)
                    squares += (double)grad_of(o.items[p])[i] * grad_of(o.items[p])[i];
            if (s.clip > 0 && sqrt(squares) > s.clip) factor = s.clip / sqrt(squares);
            for (p = 0; p < 2; p++)
                reference_step(&ref[p], grad_of(o.items[p]), o.items[p]->rows * o.items[p]->cols, &s, factor, p ? 0.0 : s.decay,
                               buffers & 1 << TERN_MOMENT1);
            CHECK_OK(c, tern_model_step(c, &o.m, &s));
            CHECK(fabs(norm2[0] - squares) < 1e-5 * squares, "norm2 %g, not %g", norm2[0], squares);
        }
        for (p = 0; p < 2; p++)
            for (i = 0; i < o.items[p]->rows * o.items[p]->cols; i++) {
                const float w = ((float *)o.items[p]->buffer[TERN_SHADOW].data)[i];
                CHECK(fabs(w - ref[p].w[i]) < 2e-6, "variant %d, parameter %d [%d]: %.8g, not %.8g", variant, p, (int)i, w, ref[p].w[i]);
                CHECK(grad_of(o.items[p])[i] == 0.0f, "the gradient is not set to zero");
            }
        record_pair(r, &o);
        pair_close(c, &o);
    }
}
static void test_optimizers(void) { same_for_threads(optimizers); }

/* After a step the trits are those of the shadow. */
static void test_step_packs(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int bf16;
    for (bf16 = 0; bf16 < 2; bf16++) {
        tern_step s = TERN_ZERO;
        tern_param fresh = param_of("fresh", 33, 50, TERN_ABSMEAN, TERN_PER_ROW);
        int8_t before[50], after[50], want[50];
        float scale[1], want_scale[1];
        int64_t r, changed = 0;
        pair o;
        pair_open(t.c, &o, 33, 50, bf16 ? TERN_BF16 : TERN_F32, TERN_FOR_ADAMW);
        random_gradients(&o);
        CHECK_OK(t.c, tern_param_get(t.c, &o.w, 7, before, NULL, NULL));
        s.rate = 0.3f;
        s.step = 1;
        CHECK_OK(t.c, tern_model_step(t.c, &o.m, &s));
        CHECK_OK(t.c, tern_param_alloc(t.c, &fresh, TERN_FOR_INFERENCE));
        CHECK_OK(t.c, tern_param_set(t.c, &fresh, o.w.buffer[TERN_SHADOW].type, o.w.buffer[TERN_SHADOW].data));
        for (r = 0; r < 33; r++) {
            CHECK_OK(t.c, tern_param_get(t.c, &o.w, r, after, scale, NULL));
            CHECK_OK(t.c, tern_param_get(t.c, &fresh, r, want, want_scale, NULL));
            CHECK(memcmp(after, want, 50) == 0 && scale[0] == want_scale[0], "row %d is not its shadow's", (int)r);
            if (r == 7) changed = memcmp(before, after, 50) != 0;
        }
        CHECK(changed, "no trit of row 7 changed");
        tern_param_free(t.c, &fresh, -1);
        pair_close(t.c, &o);
    }
    test_close(&t);
}

/* -- BF16 shadows -- */

static tern_optimize_args sgd_of(uint16_t *w, float *grad, int64_t n)
{
    tern_optimize_args a = TERN_ZERO;
    a.kind = TERN_SGD;
    a.count = n;
    a.type = TERN_BF16;
    a.w = w;
    a.grad = grad;
    a.rate = 1.0f;
    a.seed = 99;
    return a;
}

static double bf16_value(uint16_t h) { return ldexp((h & 127) + ((h >> 7 & 255) ? 128 : 0), (h >> 7 & 255) - 134) * (h >> 15 ? -1 : 1); }

/* Below 1 a bf16 step is 2^-8. A step of 2^-11 must go down once in eight times, with the variance of a
   coin of that weight, and many steps must add up to their sum. */
static void stochastic_rounding(tern_context *c, record *r)
{
    enum { N = 20000 };
    uint16_t *w = (uint16_t *)hold(N * 2), *first = (uint16_t *)hold(N * 2);
    float *grad = hold_output(N);
    tern_optimize_args a = sgd_of(w, grad, N);
    double mean = 0.0, pairs = 0.0, down = 0.0;
    int i, step;
    for (i = 0; i < N; i++) w[i] = 0x3F80; /* 1.0 */
    for (step = 1; step <= 40; step++) {
        for (i = 0; i < N; i++) grad[i] = 1.0f / 2048;
        a.step = (uint32_t)step;
        CHECK_OK(c, tern_optimize(c, &a));
        if (step > 1) continue;
        memcpy(first, w, N * 2);
        for (i = 0; i < N; i++) {
            CHECK(w[i] == 0x3F80 || w[i] == 0x3F7F, "1 - 2^-11 became %04x", (unsigned)w[i]);
            down += w[i] == 0x3F7F;
            if (i > 0) pairs += w[i] == 0x3F7F && w[i - 1] == 0x3F7F;
        }
        CHECK(fabs(down / N - 0.125) < 0.01, "%g went down, not 0.125", down / N); /* four standard deviations */
        CHECK(fabs(pairs / N - 0.015625) < 0.005, "%g of neighbours went down together, not 1/64", pairs / N);
    }
    for (i = 0; i < N; i++) mean += bf16_value(w[i]) / N;
    CHECK(fabs(mean - (1.0 - 40.0 / 2048)) < 4e-4, "the mean is %g, not %g", mean, 1.0 - 40.0 / 2048);
    record_bytes(r, w, N * 2);
    a.step = 1;
    a.stream = 1;
    for (i = 0; i < N; i++) { w[i] = 0x3F80; grad[i] = 1.0f / 2048; }
    CHECK_OK(c, tern_optimize(c, &a));
    CHECK(memcmp(first, w, N * 2) != 0, "the rounding does not depend on the stream");
}
static void test_stochastic_rounding(void) { same_for_threads(stochastic_rounding); }

static void bf16_training(tern_context *c, record *r)
{
    tern_step s = TERN_ZERO;
    pair o;
    pair_open(c, &o, 17, 59, TERN_BF16, TERN_FOR_ADAMW); /* 1003 weights: threads split within blocks of four */
    s.rate = 0.01f;
    s.clip = 1.0f;
    s.seed = 7;
    for (s.step = 1; s.step <= 4; s.step++) {
        random_gradients(&o);
        CHECK_OK(c, tern_model_step(c, &o.m, &s));
    }
    record_pair(r, &o);
    pair_close(c, &o);
}
static void test_bf16_training(void) { same_for_threads(bf16_training); }

static void test_bytes_per_weight(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 256, 512, TERN_ABSMEAN, TERN_PER_ROW), *items[1];
    tern_model m = TERN_ZERO;
    tern_audit a;
    size_t total = 0;
    int b;
    items[0] = &p;
    m.items = items;
    m.count = 1;
    p.buffer[TERN_SHADOW].type = TERN_BF16;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_ADAMW));
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &a));
    for (b = 0; b < TERN_BUFFERS; b++) total += a.bytes[b];
    printf("  BF16 shadow with AdamW: %.4f bytes per weight, of these %.4f scales\n",
           (double)total / (double)a.weights, (double)a.bytes[TERN_SCALES] / (double)a.weights);
    CHECK((double)(total - a.bytes[TERN_SCALES]) <= (2 + 8 + 4 + 0.25) * (double)a.weights,
          "%g bytes per weight", (double)total / (double)a.weights);
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* -- refusals and faults -- */

/* A gradient that is not finite: no weight, moment or trit changes, in any parameter; the gradients are dropped. */
static void nonfinite_gradients(tern_context *c, record *unused)
{
    static const float bad[] = {NAN, INFINITY, 3e38f}; /* the square of the last overflows */
    int i, bf16;
    (void)unused;
    for (i = 0; i < 6; i++) {
        tern_step s = TERN_ZERO;
        record before = {NULL, 0, 0}, after = {NULL, 0, 0};
        int64_t j;
        pair o;
        bf16 = i & 1;
        pair_open(c, &o, 20, 30, bf16 ? TERN_BF16 : TERN_F32, TERN_FOR_ADAMW);
        s.rate = 0.1f;
        s.step = 1;
        random_gradients(&o);
        CHECK_OK(c, tern_model_step(c, &o.m, &s));
        record_pair(&before, &o);
        random_gradients(&o);
        grad_of(&o.b)[3] = bad[i / 2];
        s.step = 2;
        CHECK_OK(c, tern_model_step(c, &o.m, &s));
        CHECK_FAILS(c, tern_sync(c), TERN_E_DATA, "step 2 is not finite");
        record_pair(&after, &o); /* with gradients, zero again */
        CHECK(before.size == after.size && memcmp(before.data, after.data, before.size) == 0,
              "%g in a gradient changed something", bad[i / 2]);
        for (j = 0; j < 600; j++) CHECK(grad_of(&o.w)[j] == 0.0f, "a gradient stayed");
        free(before.data);
        free(after.data);
        pair_close(c, &o);
    }
}
static void test_nonfinite_gradients(void) { on_each_tier(nonfinite_gradients); }

static void check_refused(tern_context *c, pair *o, const tern_step *s, tern_result code, const char *part)
{
    record before = {NULL, 0, 0}, after = {NULL, 0, 0};
    record_pair(&before, o);
    CHECK_FAILS(c, tern_model_step(c, &o->m, s), code, part);
    record_pair(&after, o);
    CHECK(before.size == after.size && memcmp(before.data, after.data, before.size) == 0, "a refused step (%s) changed something", part);
    free(before.data);
    free(after.data);
}

static void test_step_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_step good = TERN_ZERO, s;
    float kept;
    void *moment;
    pair o;
    pair_open(t.c, &o, 20, 30, TERN_BF16, TERN_FOR_ADAMW);
    random_gradients(&o);
    kept = grad_of(&o.w)[0];
    good.rate = 0.1f;
    good.step = 1;
    CHECK(tern_model_step(NULL, &o.m, &good) == TERN_E_ARGUMENT, "no context");
    CHECK_FAILS(t.c, tern_model_step(t.c, NULL, &good), TERN_E_ARGUMENT, "the model is NULL");
    check_refused(t.c, &o, NULL, TERN_E_ARGUMENT, "the desc is NULL");
    s = good; s.optimizer = (tern_optimizer)5; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "optimizer 5");
    s = good; s.step = 0; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "counted from 1");
    s = good; s.rate = -1.0f; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    s = good; s.rate = NAN; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    s = good; s.beta1 = 1.0f; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    s = good; s.beta2 = 1.5f; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    s = good; s.decay = INFINITY; check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    o.items[0]->flags = TERN_NO_DECAY;
    check_refused(t.c, &o, &s, TERN_E_ARGUMENT, "out of range");
    o.items[0]->flags = 0;
    s = good; s.norm2 = (float *)(void *)((char *)&kept + 1); check_refused(t.c, &o, &s, TERN_E_ALIGNMENT, "not aligned");
    moment = o.b.buffer[TERN_MOMENT2].data; /* of the last parameter: the first must not have moved */
    o.b.buffer[TERN_MOMENT2].data = NULL;
    CHECK_FAILS(t.c, tern_model_step(t.c, &o.m, &good), TERN_E_MISSING, "b has no second moment");
    o.b.buffer[TERN_MOMENT2].data = (char *)moment + 2;
    CHECK_FAILS(t.c, tern_model_step(t.c, &o.m, &good), TERN_E_ALIGNMENT, "second moment");
    o.b.buffer[TERN_MOMENT2].data = moment;
    CHECK(grad_of(&o.w)[0] == kept, "a refused step ran");
    o.items[1] = NULL;
    CHECK_FAILS(t.c, tern_model_step(t.c, &o.m, &good), TERN_E_ARGUMENT, "a parameter is NULL");
    o.items[1] = &o.b;
    tern_param_free(t.c, &o.w, TERN_FOR_TRAINING);
    tern_param_free(t.c, &o.b, TERN_FOR_TRAINING);
    check_refused(t.c, &o, &good, TERN_E_MISSING, "no parameter has a gradient");
    pair_close(t.c, &o);
    test_close(&t);
}

/* -- learned scales -- */

/* sum of dw * w^(alpha) in float64, with the rounding that alpha0 gives held: what passing it straight through means. */
static double learned_product(tern_rule rule, const float *w, const float *dw, int64_t n, double alpha0, double alpha)
{
    const double limit = rule == TERN_SEQ ? 0.99 : 1.0, factor = rule == TERN_SEQ ? 1.5 : 1.0;
    double sum = 0.0;
    int64_t i;
    for (i = 0; i < n; i++) {
        const double u0 = factor * fmax(-limit, fmin(limit, w[i] / alpha0)), u = factor * fmax(-limit, fmin(limit, w[i] / alpha));
        sum += dw[i] * alpha * (u + rint(u0) - u0) / factor;
    }
    return sum;
}

static void scale_gradients(tern_context *c, record *r)
{
    static const int64_t shapes[][2] = {{1, 1}, {15, 127}, {17, 16}, {2, 4097}, {1030, 17}};
    static const tern_type types[] = {TERN_F32, TERN_F16, TERN_BF16};
    int s, k, plain;
    for (s = 0; s < 5; s++)
        for (k = 0; k < 2; k++)
            for (plain = 0; plain < 2; plain++) {
                const tern_rule rule = k ? TERN_SEQ : TERN_LSQ;
                const int64_t rows = shapes[s][0], cols = shapes[s][1], grains = k ? rows : 1, n = k ? cols : rows * cols;
                const tern_type type = types[(s + k) % 3];
                tern_matrix m = hold_matrix(c, rows, cols, k ? TERN_PER_ROW : TERN_PER_TENSOR, s % 2 ? TERN_BASE3 : TERN_2BIT, TERN_F32);
                float *w = hold_floats(rows * cols), *dw = hold_floats(rows * cols), *alpha = hold_output(grains),
                      *dalpha = hold_floats(grains), *before = hold_copy(dalpha, grains);
                void *stored = ternarize_store(type, w, rows * cols);
                tern_ternarize_args t = ternarize_args(&m, rule, stored);
                tern_scale_grad_args a = TERN_ZERO;
                int64_t g, i;
                for (g = 0; g < grains; g++) alpha[g] = 0.4f + 0.05f * (float)(g % 8); /* some weights inside, some clipped */
                t.type = a.type = type;
                t.alpha = alpha;
                CHECK_OK(c, tern_ternarize(c, &t));
                a.m = m;
                a.rule = rule;
                a.w = stored;
                a.dw = dw;
                a.dalpha = dalpha;
                a.plain = plain;
                CHECK_OK(c, tern_scale_grad(c, &a));
                for (g = 0; g < grains; g++) {
                    const float *w0 = w + g * n, *dw0 = dw + g * n;
                    const double h = 1e-6, at = alpha[g];
                    double want = (learned_product(rule, w0, dw0, n, at, at + h) - learned_product(rule, w0, dw0, n, at, at - h))
                                  / (2 * h) / sqrt((double)n);
                    if (plain) {
                        for (want = 0.0, i = 0; i < n; i++)
                            want += fabs(w0[i]) > (k ? at / 3 : at / 2) ? w0[i] > 0 ? dw0[i] : -dw0[i] : 0.0;
                        if (k) want /= 1.5;
                    }
                    CHECK(fabs(dalpha[g] - before[g] - want) < 2e-5 * (1.0 + fabs(want)),
                          "rule %d, %d x %d, plain %d: dalpha[%d] gets %g, not %g", (int)rule, (int)rows, (int)cols, plain, (int)g,
                          dalpha[g] - before[g], want);
                }
                record_words(r, dalpha, grains);
                free(stored);
                release();
            }
}
static void test_scale_gradients(void) { same_everywhere(scale_gradients, UINT64_C(0x1C725767389CB265)); }

/* A model of one layer whose scale is learned: a step leaves alpha where its gradient says, and the trits follow the new alpha. */
static void learned_step(tern_context *c, record *r)
{
    int k, variant;
    for (k = 0; k < 2; k++)
        for (variant = 0; variant < 4; variant++) { /* plain or not; alpha before or after the weights */
            const tern_rule rule = k ? TERN_SEQ : TERN_LSQ;
            const int32_t alphas = k ? 20 : 1;
            tern_param *items[2], fresh;
            tern_model m = TERN_ZERO;
            tern_step s = TERN_ZERO;
            float *expected = hold_zeros(20), before[20], norm2[1], squares = 0.0f, *w;
            tern_scale_grad_args a = TERN_ZERO;
            int8_t got[30], want[30];
            float scale, want_scale;
            learner l;
            int64_t i;
            learner_open(c, &l, 20, 30, rule, k ? TERN_PER_ROW : TERN_PER_TENSOR, TERN_F32, TERN_F32, TERN_FOR_GRADIENT);
            set_random(c, &l.w);
            memcpy(before, l.alpha.buffer[TERN_SHADOW].data, (size_t)alphas * 4);
            CHECK(before[0] > 0.1f, "alpha is %g after set", before[0]);
            l.w.flags = variant & 1 ? TERN_PLAIN_ALPHA : 0;
            items[variant / 2] = &l.w;
            items[1 - variant / 2] = &l.alpha;
            m.items = items;
            m.count = 2;
            for (i = 0; i < 600; i++) grad_of(&l.w)[i] = test_float() + 0.3f;
            a.m = tern_param_matrix(&l.w);
            a.rule = rule;
            a.w = l.w.buffer[TERN_SHADOW].data;
            a.dw = grad_of(&l.w);
            a.dalpha = expected;
            a.plain = variant & 1;
            CHECK_OK(c, tern_scale_grad(c, &a));
            for (i = 0; i < 600; i++) squares += grad_of(&l.w)[i] * grad_of(&l.w)[i];
            for (i = 0; i < alphas; i++) squares += expected[i] * expected[i];
            s.optimizer = TERN_SGD;
            s.rate = variant & 1 ? 1e-3f : 0.02f;
            s.step = 1;
            s.norm2 = norm2;
            CHECK_OK(c, tern_model_step(c, &m, &s));
            CHECK(fabsf(norm2[0] / squares - 1.0f) < 1e-5f, "the norm without the gradient of alpha: %g, not %g", norm2[0], squares);
            for (i = 0; i < alphas; i++) {
                const float alpha = ((const float *)l.alpha.buffer[TERN_SHADOW].data)[i];
                CHECK(fabsf(alpha - (before[i] - s.rate * expected[i])) < 1e-6f && alpha != before[i],
                      "alpha[%d] went from %g to %g by a gradient of %g", (int)i, before[i], alpha, expected[i]);
                CHECK(grad_of(&l.alpha)[i] == 0.0f, "the gradient of alpha stayed");
            }
            fresh = param_of("fresh", 20, 30, TERN_GIVEN, l.w.grain); /* scale alpha or alpha / 1.5, threshold half of it */
            CHECK_OK(c, tern_param_alloc(c, &fresh, TERN_FOR_INFERENCE));
            for (i = 0; i < alphas; i++) {
                const float alpha = ((const float *)l.alpha.buffer[TERN_SHADOW].data)[i];
                ((float *)fresh.buffer[TERN_SCALES].data)[i] = k ? alpha / 1.5f : alpha;
            }
            w = (float *)l.w.buffer[TERN_SHADOW].data;
            CHECK_OK(c, tern_param_set(c, &fresh, TERN_F32, w));
            for (i = 0; i < 20; i++) {
                CHECK_OK(c, tern_param_get(c, &l.w, i, got, &scale, NULL));
                CHECK_OK(c, tern_param_get(c, &fresh, i, want, &want_scale, NULL));
                CHECK(memcmp(got, want, 30) == 0 && scale == want_scale,
                      "row %d is not that of the new alpha: %g, not %g", (int)i, scale, want_scale);
            }
            record_bytes(r, w, 2400);
            record_bytes(r, l.alpha.buffer[TERN_SHADOW].data, alphas * 4);
            tern_param_free(c, &fresh, -1);
            learner_close(c, &l);
            release();
        }
}
static void test_learned_step(void) { same_for_threads(learned_step); }

/* What a step needs of a learned scale. A refused step has added nothing to the gradient of alpha. */
static void test_learned_step_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param *items[2];
    tern_model m = TERN_ZERO;
    tern_step s = TERN_ZERO;
    tern_audit audit;
    learner l;
    learner_open(t.c, &l, 20, 30, TERN_LSQ, TERN_PER_TENSOR, TERN_F32, TERN_F32, TERN_FOR_ADAMW);
    set_random(t.c, &l.w);
    items[0] = &l.w;
    items[1] = &l.alpha;
    m.items = items;
    m.count = 1;
    grad_of(&l.w)[7] = 1.0f;
    s.rate = 0.1f;
    s.step = 1;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_MISSING, "w: its alpha has a gradient and is not in the model");
    m.count = 2;
    s.step = 0;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "counted from 1");
    s.step = 1;
    l.w.alpha = NULL;
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_MISSING, "w: its rule learns a scale, and its alpha is NULL");
    l.w.alpha = &l.alpha;
    CHECK_OK(t.c, tern_param_convert(t.c, &l.w, TERN_MOMENT2, TERN_BF16));
    CHECK_FAILS(t.c, tern_model_step(t.c, &m, &s), TERN_E_ARGUMENT, "w: its moments are of types 1 and 2");
    CHECK(grad_of(&l.alpha)[0] == 0.0f && grad_of(&l.w)[7] == 1.0f, "a refused step changed a gradient");
    CHECK_OK(t.c, tern_param_convert(t.c, &l.w, TERN_MOMENT1, TERN_BF16));
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    CHECK_OK(t.c, tern_model_audit(t.c, &m, &audit)); /* every tensor: alpha too, and moments by their types */
    CHECK(audit.weights == 601 && audit.ternary == 600 && audit.bytes[TERN_SHADOW] == 2404 && audit.bytes[TERN_GRAD] == 2404 &&
          audit.bytes[TERN_MOMENT1] == 1204 && audit.bytes[TERN_MOMENT2] == 1204, "%d weights, %d bytes of shadows, %d and %d of moments",
          (int)audit.weights, (int)audit.bytes[TERN_SHADOW], (int)audit.bytes[TERN_MOMENT1], (int)audit.bytes[TERN_MOMENT2]);
    tern_param_free(t.c, &l.alpha, 1 << TERN_GRAD); /* without a gradient alpha stays as it is */
    {
        const float alpha = ((float *)l.alpha.buffer[TERN_SHADOW].data)[0];
        grad_of(&l.w)[7] = 1.0f;
        m.count = 1;
        s.step = 2;
        CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
        CHECK(((float *)l.alpha.buffer[TERN_SHADOW].data)[0] == alpha, "an alpha without a gradient moved");
    }
    learner_close(t.c, &l);
    test_close(&t);
}

/* -- noise and averages in a step -- */

/* Steps that change no weight: trits near the threshold change with the step's number alone, and tern_param_set takes the noise out. */
static void step_noise(tern_context *c, record *r)
{
    int noisy;
    for (noisy = 0; noisy < 2; noisy++) {
        tern_param p = param_of("w", 17, 60, TERN_ABSMEAN, TERN_PER_ROW), *items[1];
        const size_t bytes = (size_t)17 * 60;
        int8_t *trits[5];
        tern_model m = TERN_ZERO;
        tern_step s = TERN_ZERO;
        int64_t i, k;
        items[0] = &p;
        m.items = items;
        m.count = 1;
        CHECK_OK(c, tern_param_alloc(c, &p, TERN_FOR_GRADIENT));
        set_random(c, &p);
        p.noise = noisy ? 0.2f : 0.0f;
        p.zone = 0.2f;
        s.optimizer = TERN_SGD;
        s.seed = 5;
        for (k = 0; k < 5; k++) { /* set; steps 1, 2, 1; set */
            s.step = k == 2 ? 2 : 1;
            trits[k] = (int8_t *)hold(bytes);
            if (k == 0 || k == 4) CHECK_OK(c, tern_param_set(c, &p, TERN_TYPE_DEFAULT, NULL));
            else CHECK_OK(c, tern_model_step(c, &m, &s));
            for (i = 0; i < 17; i++) CHECK_OK(c, tern_param_get(c, &p, i, trits[k] + i * 60, NULL, NULL));
            record_bytes(r, trits[k], (int64_t)bytes);
        }
        CHECK((memcmp(trits[0], trits[1], bytes) != 0) == noisy && (memcmp(trits[1], trits[2], bytes) != 0) == noisy,
              "noise %d: the steps' trits", noisy);
        CHECK(memcmp(trits[1], trits[3], bytes) == 0, "the same step again has other noise");
        CHECK(memcmp(trits[0], trits[4], bytes) == 0, "tern_param_set left noise");
        tern_param_free(c, &p, -1);
        release();
    }
}
static void test_step_noise(void) { same_for_threads(step_noise); }

/* A step goes on with the average of the scales that are stored. */
static void test_step_average(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 3, 40, TERN_ABSMEAN, TERN_PER_ROW), *items[1];
    tern_model m = TERN_ZERO;
    tern_step s = TERN_ZERO;
    float now, after;
    items[0] = &p;
    m.items = items;
    m.count = 1;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
    set_random(t.c, &p);
    CHECK_OK(t.c, tern_param_get(t.c, &p, 1, NULL, &now, NULL));
    ((float *)p.buffer[TERN_SCALES].data)[1] = 1.0f;
    p.rho = 0.9f;
    s.optimizer = TERN_SGD;
    s.step = 1;
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    CHECK_OK(t.c, tern_param_get(t.c, &p, 1, NULL, &after, NULL));
    CHECK(after == 0.9f + (1.0f - 0.9f) * now, "0.9 of 1 and 0.1 of %g is %g", now, after);
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* Given scales stay until the first step, which takes them from its weights. */
static void test_step_after_give(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param p = param_of("w", 1, 4, TERN_ABSMEAN, TERN_PER_ROW), *items[1];
    const int8_t trits[4] = {1, 0, -1, 0};
    const float scale = 1.5f; /* so the shadow is 3, 0, -3, 0 */
    tern_model m = TERN_ZERO;
    tern_step s = TERN_ZERO;
    float now;
    items[0] = &p;
    m.items = items;
    m.count = 1;
    CHECK_OK(t.c, tern_param_alloc(t.c, &p, TERN_FOR_GRADIENT));
    CHECK_OK(t.c, tern_param_give(t.c, &p, trits, &scale));
    grad_of(&p)[0] = -1.0f;
    s.optimizer = TERN_SGD;
    s.rate = 2.0f;
    s.step = 1;
    CHECK_OK(t.c, tern_model_step(t.c, &m, &s));
    CHECK_OK(t.c, tern_param_get(t.c, &p, 0, NULL, &now, NULL));
    CHECK(now == 2.0f, "the mean of 5, 0, 3 and 0 is %g", now);
    tern_param_free(t.c, &p, -1);
    test_close(&t);
}

/* -- BF16 moments, and plain rounding -- */

/* Between bf16 neighbours a moment goes up as often as it is near the upper one; its random numbers are not those of the weights. */
static void bf16_moments(tern_context *c, record *r)
{
    enum { N = 20000 };
    uint16_t *w = (uint16_t *)hold(N * 2), *m1 = (uint16_t *)hold(N * 2), *m2 = (uint16_t *)hold(N * 2);
    float *grad = hold_output(N);
    tern_optimize_args a = sgd_of(w, grad, N);
    double up1 = 0.0, up2 = 0.0, both = 0.0, weights = 0.0, with_weight = 0.0;
    int i;
    a.kind = TERN_ADAMW;
    a.moment_type = TERN_BF16;
    a.moment1 = m1;
    a.moment2 = m2;
    a.beta1 = 0.5f;
    a.beta2 = 0.5f;
    a.eps = 1e30f; /* the weight falls by rate * moment / eps */
    a.rate = 1e30f / 2048;
    a.step = 1;
    memset(m1, 0, N * 2);
    memset(m2, 0, N * 2);
    for (i = 0; i < N; i++) { /* the first moment becomes 1 + 2^-9, a quarter of the way from 1 to its upper neighbour */
        w[i] = 0x3F80;
        m1[i] = m2[i] = 0x3F80;
        grad[i] = 1.0f + 1.0f / 256;
    }
    CHECK_OK(c, tern_optimize(c, &a));
    for (i = 0; i < N; i++) {
        CHECK((m1[i] == 0x3F80 || m1[i] == 0x3F81) && (m2[i] == 0x3F80 || m2[i] == 0x3F81),
              "moments %04x and %04x", (unsigned)m1[i], (unsigned)m2[i]);
        up1 += m1[i] == 0x3F81;
        up2 += m2[i] == 0x3F81;
        both += m1[i] == 0x3F81 && m2[i] == 0x3F81;
        weights += w[i] == 0x3F7F;
        with_weight += w[i] == 0x3F7F && m1[i] == 0x3F80;
    }
    CHECK(fabs(up1 / N - 0.25) < 0.015, "%g of the first moments went up, not 1/4", up1 / N);
    CHECK(fabs(up2 / N - 0.5) < 0.02, "%g of the second moments went up, not 1/2", up2 / N); /* (1 + 1/256)^2 is twice as far */
    CHECK(fabs(both / N - 0.125) < 0.015, "both moments went up %g of the time, not 1/8", both / N);
    CHECK(weights / N > 0.05 && fabs(with_weight / weights - 0.75) < 0.04,
          "of %g weights that fell %g kept their moment, not 3/4", weights / N, with_weight / weights);
    record_bytes(r, m1, N * 2);
    record_bytes(r, m2, N * 2);
}
static void test_bf16_moments(void) { same_for_threads(bf16_moments); }

/* Updates below half a step of bf16 are lost to plain rounding, which TERN_NEAREST asks for. */
static void test_plain_rounding(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    int nearest;
    for (nearest = 0; nearest < 2; nearest++) {
        tern_step s = TERN_ZERO;
        int64_t i, moved = 0;
        pair o;
        pair_open(t.c, &o, 20, 30, TERN_BF16, TERN_FOR_GRADIENT);
        for (i = 0; i < 600; i++) ((uint16_t *)o.w.buffer[TERN_SHADOW].data)[i] = 0x3F80;
        o.w.flags = nearest ? TERN_NEAREST : 0;
        s.optimizer = TERN_SGD;
        s.rate = 1.0f / 2048;
        for (s.step = 1; s.step <= 5; s.step++) {
            for (i = 0; i < 600; i++) grad_of(&o.w)[i] = 1.0f;
            CHECK_OK(t.c, tern_model_step(t.c, &o.m, &s));
        }
        for (i = 0; i < 600; i++) moved += ((uint16_t *)o.w.buffer[TERN_SHADOW].data)[i] != 0x3F80;
        CHECK(nearest ? moved == 0 : moved > 200, "%d of 600 weights moved, nearest %d", (int)moved, nearest);
        pair_close(t.c, &o);
    }
    test_close(&t);
}

/* -- learning: a ternary matrix is found again from inputs and outputs -- */

static void learn(tern_context *c, record *r, int first_recipe, int last_recipe)
{
    enum { TOKENS = 64, ROWS = 8, COLS = 32, STEPS = 150 };
    static const struct { tern_rule rule; int32_t grain; tern_type shadow, moments; float rho, noise; double most; } recipes[] = {
        {TERN_ABSMEAN, TERN_PER_ROW, TERN_F32, TERN_F32, 0.0f, 0.0f, 0.02},
        {TERN_ABSMEAN, TERN_PER_ROW, TERN_BF16, TERN_F32, 0.0f, 0.0f, 0.02},
        {TERN_ABSMEAN_SIGMA, 16, TERN_BF16, TERN_BF16, 0.0f, 0.0f, 0.02},
        {TERN_TWN, TERN_PER_TENSOR, TERN_F32, TERN_F32, 0.9f, 0.0f, 0.02},
        {TERN_ABSMEAN, TERN_PER_ROW, TERN_F32, TERN_F32, 0.9f, 0.02f, 0.02},
        {TERN_LSQ, TERN_PER_TENSOR, TERN_BF16, TERN_BF16, 0.0f, 0.0f, 0.05},
        {TERN_SEQ, TERN_PER_ROW, TERN_F32, TERN_F32, 0.0f, 0.0f, 0.05}
    };
    int k;
    for (k = first_recipe; k <= last_recipe; k++) {
        float *x = hold_floats(TOKENS * COLS), *y = hold_output(TOKENS * ROWS), *target = hold_zeros(TOKENS * ROWS),
              *dy = hold_output(TOKENS * ROWS);
        int8_t truth[ROWS * COLS];
        double first = 0.0, loss = 0.0;
        tern_linear l = TERN_ZERO;
        tern_need need = TERN_ZERO;
        tern_step s = TERN_ZERO;
        void *saved;
        int64_t i, t;
        tern_param bias = param_of("b", 1, ROWS, TERN_DENSE, 0), *items[3];
        tern_model m = TERN_ZERO;
        learner o;
        learner_open(c, &o, ROWS, COLS, recipes[k].rule, recipes[k].grain, recipes[k].shadow, TERN_F32, TERN_FOR_GRADIENT);
        CHECK_OK(c, tern_param_alloc(c, &bias, TERN_FOR_ADAMW));
        o.w.buffer[TERN_MOMENT1].type = o.w.buffer[TERN_MOMENT2].type = recipes[k].moments;
        CHECK_OK(c, tern_param_alloc(c, &o.w, TERN_FOR_ADAMW));
        CHECK_OK(c, tern_param_alloc(c, &o.alpha, TERN_FOR_ADAMW));
        set_random(c, &o.w);
        set_random(c, &bias);
        o.w.rho = recipes[k].rho;
        o.w.noise = o.w.zone = recipes[k].noise;
        items[0] = &o.w;
        items[1] = &bias;
        items[2] = &o.alpha; /* without a use where the rule has none */
        m.items = items;
        m.count = 3;
        l.w = &o.w;
        l.bias = &bias;
        CHECK_OK(c, tern_linear_need(c, &l, TOKENS, &need));
        CHECK_OK(c, tern_reserve(c, need.scratch));
        saved = hold(need.saved);
        for (i = 0; i < ROWS * COLS; i++) truth[i] = test_trit();
        for (t = 0; t < TOKENS * ROWS; t++)
            for (i = 0; i < COLS; i++) target[t] += 0.5f * (float)truth[t % ROWS * COLS + i] * x[t / ROWS * COLS + i];
        s.seed = 3;
        for (s.step = 1; s.step <= STEPS; s.step++) {
            s.rate = 0.03f * (1.0f - (float)s.step / (STEPS + 1));
            CHECK_OK(c, tern_linear_forward(c, &l, TOKENS, x, y, saved));
            for (loss = 0.0, i = 0; i < TOKENS * ROWS; i++) {
                dy[i] = (y[i] - target[i]) / TOKENS;
                loss += (double)(y[i] - target[i]) * (y[i] - target[i]) / (TOKENS * ROWS);
            }
            if (s.step == 1) first = loss;
            CHECK_OK(c, tern_linear_backward(c, &l, TOKENS, x, saved, dy, NULL));
            CHECK_OK(c, tern_model_step(c, &m, &s));
        }
        CHECK(loss < recipes[k].most * first, "recipe %d: the loss went from %g to %g", k, first, loss);
        for (i = 0; i < 3; i++)
            record_bytes(r, items[i]->buffer[TERN_SHADOW].data,
                         items[i]->rows * items[i]->cols * tern__type_bytes(items[i]->buffer[TERN_SHADOW].type));
        tern_param_free(c, &bias, -1);
        learner_close(c, &o);
        release();
    }
}
static void regression(tern_context *c, record *r) { learn(c, r, 0, 1); }
static void test_regression(void) { same_for_threads(regression); }

static void other_recipes(tern_context *c, record *r) { learn(c, r, 2, 6); }
static void test_other_recipes(void) { free(record_of(other_recipes, TERN_ISA_BEST, 1).data); }

/* -- schedules -- */

static double reference_rate(const tern_schedule *s, double step)
{
    const double fall = s->kind == TERN_WSD ? (double)s->steps - s->decay : s->warmup, t = (step - fall) / (s->steps - fall);
    if (step < s->warmup) return s->peak * step / s->warmup;
    if (step <= fall) return s->peak;
    if (step >= s->steps) return s->floor;
    return s->floor + ((double)s->peak - s->floor) * (s->kind == TERN_WSD ? 1 - sqrt(t) : 0.5 * (1 + cos(3.14159265358979323846 * t)));
}

static void test_schedules(void)
{
    static const tern_schedule all[] = {
        {TERN_COSINE, 7e-3f, 7e-4f, 100, 0, 2000}, {TERN_COSINE, 1, 0, 0, 77, 10},
        {TERN_COSINE, 1, 1, 3, 0, 3}, {TERN_COSINE, 0.1f, 0.01f, 1, 0, UINT32_MAX},
        {TERN_WSD, 7e-3f, 0, 100, 400, 2000}, {TERN_WSD, 0.3f, 0.1f, 10, 0, 20},
        {TERN_WSD, 0.3f, 0.1f, 10, 10, 20}, {TERN_WSD, 1, 0.5f, 0, UINT32_MAX, UINT32_MAX}};
    test_context t = test_open(TERN_ISA_BEST, 1);
    uint64_t hash = TEST_HASH;
    size_t i;
    uint32_t k;
    for (i = 0; i < sizeof all / sizeof all[0]; i++)
        for (k = 1; k <= 2100; k++) {
            const uint32_t step = all[i].steps == UINT32_MAX ? k * 2045222u : k; /* to the end of 32 bits */
            const double want = reference_rate(&all[i], step);
            float rate = -1;
            CHECK_OK(t.c, tern_schedule_rate(t.c, &all[i], step, &rate));
            CHECK(fabs(rate - want) <= 3e-7 * all[i].peak, "schedule %d, step %u: %.9g, not %.9g", (int)i, (unsigned)step, rate, want);
            hash = test_hash_floats(hash, &rate, 1);
        }
    CHECK(hash == UINT64_C(0xEC58FAE1F0D4C5EB), "the hash is 0x%016llX", (unsigned long long)hash);
    test_close(&t);
}

static void test_schedule_refusals(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const tern_schedule good = {TERN_WSD, 0.1f, 0.01f, 5, 10, 15};
    tern_schedule s = good;
    float rate = 7;
    CHECK_OK(t.c, tern_schedule_rate(t.c, &s, 1, &rate));
    rate = 7;
    CHECK(tern_schedule_rate(NULL, &s, 1, &rate) == TERN_E_ARGUMENT, "no context");
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, NULL, 1, &rate), TERN_E_ARGUMENT, "NULL");
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, NULL), TERN_E_ARGUMENT, "NULL");
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 0, &rate), TERN_E_ARGUMENT, "counted from 1");
    s = good; s.kind = (tern_schedule_kind)3; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "kind 3");
    s = good; s.floor = 0.2f; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "floor");
    s = good; s.floor = -1.0f; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "floor");
    s = good; s.floor = NAN; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "floor");
    s = good; s.peak = INFINITY; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "peak");
    s = good; s.warmup = 6;
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "15 steps have no room for 6 of warm-up and 10 of decay");
    s = good; s.decay = 16; CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "16 of decay");
    s = good; s.warmup = UINT32_MAX; s.decay = UINT32_MAX;
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "4294967295 of decay");
    s = good; s.kind = TERN_COSINE; s.warmup = 16;
    CHECK_FAILS(t.c, tern_schedule_rate(t.c, &s, 1, &rate), TERN_E_ARGUMENT, "16 of warm-up and 0 of decay");
    CHECK(rate == 7, "a refused schedule gave a rate");
    test_close(&t);
}

/* -- accumulation: the backward of a batch in parts, whose gradients add up to those of the whole -- */

/* A sum of n products in any order is within (n - 1) 2^-24 sum |products| of the true one (Higham 2002, section 3.1). */
static void accumulation(tern_context *c, record *r)
{
    enum { TOKENS = 130, ROWS = 17, COLS = 33 };
    static const int64_t parts[] = {1, 2, 5, 13, 130}; /* all divide 130 */
    const float *x = hold_floats(TOKENS * COLS), *dy = hold_floats(TOKENS * ROWS);
    float *y = hold_output(TOKENS * ROWS), *dw = hold_output(ROWS * COLS), *db = hold_output(ROWS);
    tern_linear l = TERN_ZERO;
    tern_need need = TERN_ZERO;
    unsigned char *saved;
    size_t k;
    int64_t i, j, t;
    pair o;
    pair_open(c, &o, ROWS, COLS, TERN_F32, TERN_FOR_ADAMW);
    l.w = &o.w;
    l.bias = &o.b;
    l.act = TERN_ACT_FLOAT;
    CHECK_OK(c, tern_linear_need(c, &l, TOKENS, &need));
    CHECK_OK(c, tern_reserve(c, need.scratch));
    saved = (unsigned char *)hold(need.saved);
    for (k = 0; k < sizeof parts / sizeof parts[0]; k++) {
        const int64_t n = TOKENS / parts[k];
        memset(grad_of(&o.w), 0, ROWS * COLS * sizeof(float));
        memset(grad_of(&o.b), 0, ROWS * sizeof(float));
        for (t = 0; t < TOKENS; t += n) {
            CHECK_OK(c, tern_linear_forward(c, &l, n, x + t * COLS, y + t * ROWS, saved));
            CHECK_OK(c, tern_linear_backward(c, &l, n, x + t * COLS, saved, dy + t * ROWS, NULL));
        }
        record_bytes(r, grad_of(&o.w), ROWS * COLS * 4);
        record_bytes(r, grad_of(&o.b), ROWS * 4);
        if (k == 0) {
            memcpy(dw, grad_of(&o.w), ROWS * COLS * sizeof(float));
            memcpy(db, grad_of(&o.b), ROWS * sizeof(float));
        }
        for (i = 0; i < ROWS; i++)
            for (j = 0; j <= COLS; j++) { /* the last: the bias */
                const float got = j < COLS ? grad_of(&o.w)[i * COLS + j] : grad_of(&o.b)[i], want = j < COLS ? dw[i * COLS + j] : db[i];
                double sum = 0, size = 0;
                for (t = 0; t < TOKENS; t++) {
                    const double term = (double)dy[t * ROWS + i] * (j < COLS ? x[t * COLS + j] : 1);
                    sum += term;
                    size += fabs(term);
                }
                CHECK(fabs(got - sum) <= TOKENS * size / (1 << 24),
                      "in %d parts, gradient %d %d: %.9g, not %.9g", (int)parts[k], (int)i, (int)j, got, sum);
                CHECK(fabs(got - want) <= 2 * TOKENS * size / (1 << 24),
                      "in %d parts, gradient %d %d: %.9g, whole %.9g", (int)parts[k], (int)i, (int)j, got, want);
            }
    }
    pair_close(c, &o);
}
static void test_accumulation(void) { same_for_threads(accumulation); }

static void suite_optimizers(void)
{
    RUN(test_optimizers);
    RUN(test_step_packs);
    RUN(test_stochastic_rounding);
    RUN(test_bf16_training);
    RUN(test_bytes_per_weight);
    RUN(test_nonfinite_gradients);
    RUN(test_step_refusals);
    RUN(test_scale_gradients);
    RUN(test_learned_step);
    RUN(test_learned_step_refusals);
    RUN(test_step_noise);
    RUN(test_step_average);
    RUN(test_step_after_give);
    RUN(test_bf16_moments);
    RUN(test_plain_rounding);
    RUN(test_regression);
    RUN(test_other_recipes);
    RUN(test_schedules);
    RUN(test_schedule_refusals);
    RUN(test_accumulation);
}
