/* Tests of [CUDA-9] in ternary_cuda.cu: rooms 15 to 22 of ternary.h on its table. */

/* A parameter in both contexts, of the same random weights. */
struct both_params {
    tern_param at[2];
    both_params(int64_t rows, int64_t cols, tern_rule rule, int32_t mask, int32_t grain = TERN_PER_ROW, tern_type encoding = TERN_2BIT,
                tern_type scale_type = TERN_F32, tern_type shadow = TERN_F32)
    {
        mirror<float> w(rows * cols, test_uniform);
        for (int side = CPU; side <= GPU; side++) {
            tern_param *p = &at[side];
            *p = {};
            p->rows = rows; p->cols = cols;
            p->rule = rule;
            p->grain = grain;
            if (rule != TERN_DENSE) {
                p->buffer[TERN_TRITS].type = encoding;
                p->buffer[TERN_SCALES].type = scale_type;
                if (mask >> TERN_SHADOW & 1) p->buffer[TERN_SHADOW].type = shadow;
            }
            snprintf(p->name, sizeof p->name, "p%lldx%lld", (long long)rows, (long long)cols);
            if (tern_param_alloc(test_context[side], p, mask) != TERN_OK) abort();
            if (tern_param_set(test_context[side], p, TERN_F32, w[side]) != TERN_OK)
                test_errors++, printf("  %s\n", tern_last_error(test_context[side])->text);
        }
    }
    both_params(const both_params &) = delete;
    both_params &operator=(const both_params &) = delete;
    ~both_params() { for (int i = CPU; i <= GPU; i++) tern_param_free(test_context[i], &at[i], (1 << TERN_BUFFERS) - 1); }
    /* Whether all buffers hold the same bytes. */
    bool same() const
    {
        for (int i = 0; i < TERN_BUFFERS; i++) {
            const tern_buffer *b[2] = {&at[CPU].buffer[i], &at[GPU].buffer[i]};
            const size_t bytes = b[CPU]->count * (size_t)tern__type_bytes(b[CPU]->type);
            std::vector<char> back(bytes);
            if (!b[CPU]->data != !b[GPU]->data || b[CPU]->count != b[GPU]->count) return false;
            if (!b[CPU]->data) continue;
            CHECK_OK(tern_copy(test_context[GPU], back.data(), b[GPU]->data, bytes, TERN_TO_HOST));
            if (memcmp(back.data(), b[CPU]->data, bytes) == 0) continue;
            printf("  %s of %s differs\n", tern__buffer_names[i], at[CPU].name);
            return false;
        }
        return true;
    }
};

struct test_form { tern_rule rule; int32_t grain; tern_type encoding, scale_type, shadow; };
static const test_form test_forms[] = {
    {TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_F32, TERN_F32},
    {TERN_TWN, 50, TERN_BASE3, TERN_F16, TERN_BF16},
    {TERN_ABSMEAN_SIGMA, TERN_PER_TENSOR, TERN_BASE3, TERN_POW2, TERN_F32},
    {TERN_ABSMEAN, 64, TERN_2BIT, TERN_POW2, TERN_BF16},
    {TERN_ABSMEAN, 32, TERN_BASE3, TERN_LOG, TERN_F32},
};

static tern_result test_reserve_for(tern_context *c, const tern_linear *l, int64_t n, size_t *saved)
{
    tern_need need = {};
    TERN__TRY(tern_linear_need(c, l, n, &need));
    *saved = need.saved;
    return tern_reserve(c, need.scratch);
}

/* -- BitLinear -- */

static void test_linear(const both_params &w, const both_params *bias, const both_params *gain, tern_norm_kind norm, tern_act act,
                        int64_t n, bool keep)
{
    const int64_t rows = w.at[CPU].rows, cols = w.at[CPU].cols;
    mirror<float> x(n * cols, test_uniform), y(n * rows), dy(n * rows, test_uniform), dx(n * cols);
    mirror<int8_t> saved(n * 1024);
    test_both([&](tern_context *c, int side) {
        tern_linear l = {};
        size_t bytes = 0;
        l.w = const_cast<tern_param *>(&w.at[side]);
        l.bias = bias ? const_cast<tern_param *>(&bias->at[side]) : nullptr;
        l.gain = gain ? const_cast<tern_param *>(&gain->at[side]) : nullptr;
        l.norm = norm;
        l.act = act;
        TERN__TRY(test_reserve_for(c, &l, n, &bytes));
        if (bytes > saved.count) abort();
        TERN__TRY(tern_linear_forward(c, &l, n, x[side], y[side], keep ? saved[side] : nullptr));
        return keep ? tern_linear_backward(c, &l, n, x[side], saved[side], dy[side], dx[side]) : TERN_OK;
    });
    CHECK_SAME(y);
    CHECK_SAME(saved);
    CHECK_SAME(dx);
    CHECK(w.same() && (!bias || bias->same()) && (!gain || gain->same()));
}

static void test_cuda_linear()
{
    const int64_t rows = 33, cols = 130;
    test_fuse(false);
    both_params bias(1, rows, TERN_DENSE, TERN_FOR_GRADIENT), gain(1, cols, TERN_DENSE, TERN_FOR_GRADIENT);
    both_params dense(rows, cols, TERN_DENSE, TERN_FOR_GRADIENT);
    for (tern_norm_kind norm : {TERN_NORM_NONE, TERN_NORM_RMS}) {
        for (const test_form &f : test_forms) {
            both_params w(rows, cols, f.rule, TERN_FOR_GRADIENT, f.grain, f.encoding, f.scale_type, f.shadow);
            const bool first = &f == test_forms;
            for (tern_act act : {TERN_ACT_INT8, TERN_ACT_FLOAT}) {
                test_linear(w, first ? &bias : nullptr, first && norm ? &gain : nullptr, norm, act, 3, true);
                test_linear(w, &bias, nullptr, norm, act, 1, false);
            }
        }
        test_linear(dense, &bias, norm ? &gain : nullptr, norm, TERN_ACT_INT8, 3, true);
        test_linear(dense, nullptr, nullptr, norm, TERN_ACT_FLOAT, 1, false);
    }
    both_params w(rows, cols, TERN_ABSMEAN, TERN_FOR_GRADIENT);
    test_linear(w, &bias, &gain, TERN_NORM_RMS, TERN_ACT_INT8, 17, true);
    test_linear(w, &bias, &gain, TERN_NORM_RMS, TERN_ACT_INT8, 70, false);
}

/* Rotation, LoRA, dead zone and arenas together: forward, backward, the rebuilt matrix, merge and fold. */
static void test_cuda_linear_options()
{
    const int64_t n = 3, rows = 33, cols = 70, rank = 3;
    const tern_type shadows[] = {TERN_F32, TERN_BF16};
    test_fuse(false);
    for (tern_type shadow : shadows) {
        both_params w(rows, cols, TERN_ABSMEAN, TERN_FOR_GRADIENT, 50, TERN_2BIT, TERN_F32, shadow),
                    bias(1, rows, TERN_DENSE, TERN_FOR_GRADIENT);
        both_params dead(1, rows, TERN_DENSE, TERN_FOR_GRADIENT), a(rank, cols, TERN_DENSE, TERN_FOR_GRADIENT),
                    b(rows, rank, TERN_DENSE, TERN_FOR_GRADIENT);
        mirror<float> x(n * cols, test_uniform), y(n * rows), dy(n * rows, test_uniform), dx(n * cols), m(rows * cols),
                      floats(rows * cols, test_uniform);
        mirror<int8_t> saved(n * 1024);
        test_both([&](tern_context *c, int side) {
            tern_linear l = {};
            size_t bytes = 0;
            l.w = &w.at[side];
            l.w->rotate = 99;
            l.w->dead = &dead.at[side];
            l.w->lambda = 0.5f;
            l.bias = &bias.at[side];
            l.lora_a = &a.at[side];
            l.lora_b = &b.at[side];
            l.lora_scale = 0.25f;
            l.arenas = 0.5f;
            l.norm = TERN_NORM_RMS;
            TERN__TRY(tern_param_set(c, l.w, TERN_F32, floats[side]));
            TERN__TRY(test_reserve_for(c, &l, n, &bytes));
            if (bytes > saved.count) abort();
            TERN__TRY(tern_linear_forward(c, &l, n, x[side], y[side], saved[side]));
            TERN__TRY(tern_linear_backward(c, &l, n, x[side], saved[side], dy[side], dx[side]));
            TERN__TRY(tern_linear_rebuild(c, &l, m[side]));
            TERN__TRY(tern_linear_merge(c, &l));
            return tern_linear_fold(c, &l);
        });
        CHECK_SAME(y);
        CHECK_SAME(dx);
        CHECK_SAME(m);
        CHECK(w.same() && bias.same() && dead.same() && a.same() && b.same());
    }
}

/* A row that is not finite, through the whole layer. */
static void test_cuda_linear_fault()
{
    const int64_t n = 5;
    both_params w(20, 70, TERN_ABSMEAN, TERN_FOR_INFERENCE);
    for (tern_act act : {TERN_ACT_INT8, TERN_ACT_FLOAT}) {
        mirror<float> x(n * 70, test_uniform), y(n * 20);
        x[CPU][3 * 70 + 69] = INFINITY;
        x[CPU][4 * 70] = NAN;
        x.send();
        test_both([&](tern_context *c, int side) {
            tern_linear l = {};
            size_t bytes = 0;
            l.w = &w.at[side];
            l.act = act;
            TERN__TRY(test_reserve_for(c, &l, n, &bytes));
            return tern_linear_forward(c, &l, n, x[side], y[side], nullptr);
        });
        CHECK_SAME(y);
    }
}

/* The layer by its parts: a table without the fused operation gives the same bits. */
static void test_cuda_linear_by_its_parts()
{
    tern_backend parts = *test_backend();
    parts.linear = nullptr;
    const opened other(&parts);
    CHECK(other.result == TERN_OK && tern_cuda_stream(other.c));
    for (int64_t n : {1, 2, 9, 16, 33}) {
        both_params w(50, 200, TERN_ABSMEAN, TERN_FOR_INFERENCE), gain(1, 200, TERN_DENSE, TERN_FOR_INFERENCE);
        mirror<float> x(n * 200, test_uniform), y(n * 50), z(n * 50);
        mirror<int8_t> saved(n * 1024), also(n * 1024);
        tern_linear l = {};
        size_t bytes = 0;
        l.w = &w.at[GPU];
        l.gain = &gain.at[GPU];
        l.norm = TERN_NORM_RMS;
        CHECK(test_reserve_for(other.c, &l, n, &bytes) == TERN_OK && bytes <= saved.count);
        CHECK_OK(test_reserve_for(test_context[GPU], &l, n, &bytes));
        CHECK_OK(tern_linear_forward(test_context[GPU], &l, n, x[GPU], y[GPU], saved[GPU]));
        CHECK(tern_linear_forward(other.c, &l, n, x[GPU], z[GPU], also[GPU]) == TERN_OK && tern_sync(other.c) == TERN_OK);
        CHECK(y.fetch() == z.fetch());
        CHECK(saved.fetch() == also.fetch());
    }
}

/* -- products in groups -- */

/* Rows of a window, groups that begin before it, end behind it or have none, and parameters for each group and set. */
struct grouped_data {
    std::vector<both_params *> params;
    std::vector<tern_param *> w;
    mirror<int32_t> loads;
    both_params dead;
    tern_grouped_args a = {};
    int64_t stride = 0, groups = 0;
    mirror<float> *scale;
    mirror<int8_t> *q;
    mirror<int32_t> *sum;
    grouped_data(int32_t count, int32_t sets, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_act act, int64_t at,
                 int64_t n, uint32_t load, int32_t mask)
        : loads(count, [&] { return test_random() % 3 ? (int32_t)(test_random() % (load + 1)) : 0; }), dead(1, rows, TERN_DENSE, mask, 0)
    {
        for (int32_t i = 0; i < count * (sets + 1); i++) { /* a step of one more */
            const bool read = i % (sets + 1) < sets;
            params.push_back(new both_params(read ? rows : 1, cols, TERN_ABSMEAN, read ? mask : TERN_FOR_INFERENCE, grain, encoding));
            w.push_back(&params.back()->at[GPU]);
        }
        w[0]->dead = &dead.at[GPU];
        a.m = tern_param_matrix(w[0]);
        CHECK_OK(tern_activation_shape(test_context[GPU], &a.m, &stride, &groups));
        mirror<float> x(n * cols, test_uniform);
        scale = new mirror<float>(n);
        q = new mirror<int8_t>(n * stride);
        sum = new mirror<int32_t>(n * groups);
        test_both([&](tern_context *c, int side) {
            tern_quantize_args z = {};
            z.m = a.m;
            z.act = act;
            z.n = n;
            z.x = x[side];
            z.q = (*q)[side]; z.scale = (*scale)[side]; z.sum = (*sum)[side];
            return tern_quantize(c, &z);
        });
        a.act = act;
        a.count = count;
        a.sets = sets;
        a.step = sets + 1;
        a.w = w.data();
        a.loads = loads[GPU];
        a.rows = a.n = n; /* the kernels are chosen by it */
        a.at = at;
        a.q = (*q)[GPU]; a.scale = (*scale)[GPU]; a.sum = (*sum)[GPU];
    }
    grouped_data(const grouped_data &) = delete;
    grouped_data &operator=(const grouped_data &) = delete;
    ~grouped_data()
    {
        for (both_params *p : params) delete p;
        delete scale;
        delete q;
        delete sum;
    }
    /* body(index of the parameter, set, first, n) for each group's rows in the window. */
    template <typename Body> void each(Body body) const
    {
        int64_t begin = -a.at;
        for (int32_t g = 0; g < a.count; begin += loads[CPU][g++]) {
            const int64_t from = tern__max(0, begin), to = tern__min(a.n, begin + loads[CPU][g]);
            for (int32_t s = 0; s < a.sets && from < to; s++) body(g * a.step + s, s, from, to - from);
        }
    }
};

/* Against a product for each group and set by the CPU. */
static void test_grouped_products(int32_t count, int32_t sets, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_act act,
                                  int64_t at, int64_t n, uint32_t load)
{
    grouped_data d(count, sets, rows, cols, grain, encoding, act, at, n, load, TERN_FOR_INFERENCE);
    tern_context *c = test_context[GPU];
    mirror<float> y(sets * n * rows, test_uniform), z(sets * n * rows);
    d.a.y = y[GPU];
    CHECK_OK(c->run.backend->grouped(&c->run, &d.a));
    d.each([&](int32_t i, int32_t set, int64_t from, int64_t some) {
        tern_matmul_args m = {};
        m.m = tern_param_matrix(&d.params[(size_t)i]->at[CPU]);
        m.act = act;
        m.n = some;
        m.q = (*d.q)[CPU] + from * d.stride; m.scale = (*d.scale)[CPU] + from; m.sum = (*d.sum)[CPU] + from * d.groups;
        m.bias = i == 0 ? tern__floats(&d.dead.at[CPU], TERN_SHADOW) : nullptr;
        m.y = z[CPU] + (set * n + from) * rows;
        CHECK(tern_matmul(test_context[CPU], &m) == TERN_OK);
    });
    CHECK_OK(tern_sync(c));
    CHECK(memcmp(y.fetch().data(), z[CPU], z.count * sizeof(float)) == 0);
}

/* The backward, against that of each group and set by the CPU: added to gradients of 1, of which one is absent, one of a dead
   zone and, with `shared`, one of two groups. */
static void test_grouped_back(int32_t count, int32_t sets, int64_t rows, int64_t cols, int32_t grain, tern_type encoding, tern_act act,
                              int64_t at, int64_t n, uint32_t load, bool shared)
{
    test_fuse(false);
    grouped_data d(count, sets, rows, cols, grain, encoding, act, at, n, load, TERN_FOR_GRADIENT);
    tern_context *c = test_context[GPU];
    mirror<float> dy(sets * n * rows, test_uniform), dx(sets * n * cols, test_uniform), z(sets * n * cols),
                  ones(rows * cols, [] { return 1.0f; });
    const int32_t last = (count - 1) * d.a.step, dead = d.a.step + sets - 1; /* the last set's */
    for (int side : {CPU, GPU}) {
        for (both_params *p : d.params)
            if (p->at[side].rows == rows && p->at[side].buffer[TERN_GRAD].data)
                CHECK(tern_copy(test_context[side], p->at[side].buffer[TERN_GRAD].data, ones[side], (size_t)(rows * cols) * 4,
                                TERN_ON_DEVICE) == TERN_OK);
        tern_param_free(test_context[side], &d.params[0]->at[side], 1 << TERN_GRAD);
    }
    if (shared) d.w[(size_t)last] = &d.params[(size_t)dead]->at[GPU];
    d.w[(size_t)dead]->dead = &d.dead.at[GPU];
    d.a.sum = nullptr;
    d.a.dy = dy[GPU];
    d.a.dx = dx[GPU];
    CHECK_OK(c->run.backend->grouped(&c->run, &d.a));
    d.each([&](int32_t i, int32_t set, int64_t from, int64_t some) {
        const tern_param *p = &d.params[(size_t)(shared && i == last ? dead : i)]->at[CPU];
        tern_matmul_dw_args w = {};
        tern_matmul_dx_args x = {};
        w.m = x.m = tern_param_matrix(p);
        w.act = act;
        w.n = x.n = some;
        w.dy = x.dy = dy[CPU] + (set * n + from) * rows;
        w.q = (*d.q)[CPU] + from * d.stride; w.scale = (*d.scale)[CPU] + from;
        w.dw = tern__floats(p, TERN_GRAD);
        w.dbias = i == 0 || p == &d.params[(size_t)dead]->at[CPU] ? tern__floats(&d.dead.at[CPU], TERN_GRAD) : nullptr;
        x.dx = z[CPU] + (set * n + from) * cols;
        CHECK(tern_matmul_dw(test_context[CPU], &w) == TERN_OK && tern_matmul_dx(test_context[CPU], &x) == TERN_OK);
    });
    CHECK_OK(tern_sync(c));
    CHECK(memcmp(dx.fetch().data(), z[CPU], z.count * sizeof(float)) == 0);
    for (both_params *p : d.params) CHECK(p->same());
    CHECK(d.dead.same());
}

static void test_cuda_grouped()
{
    for (bool wgmma : {true, false}) {
        if (!wgmma) use_wgmma(0);
        test_grouped_products(6, 2, 40, 70, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 10, 330, 150);    /* tiles of 64 */
        test_grouped_products(5, 1, 300, 130, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_INT8, 0, 400, 260); /* of 128 */
        test_grouped_products(5, 2, 40, 250, 100, TERN_2BIT, TERN_ACT_BIT, 5, 180, 80);
    }
    for (tern_type encoding : {TERN_2BIT, TERN_BASE3})
        for (int32_t grain : {(int32_t)TERN_PER_ROW, 20}) {
            test_grouped_products(5, 2, 33, 70, grain, encoding, TERN_ACT_INT8, 0, 8, 2);
            test_grouped_products(7, 1, 40, 300, grain, encoding, TERN_ACT_INT4, 3, 40, 20);  /* tiles of 16 */
            test_grouped_products(3, 2, 130, 50, grain, encoding, TERN_ACT_INT8, 10, 90, 70); /* of 32 */
            test_grouped_products(2, 1, 20, 50, grain, encoding, TERN_ACT_INT8, 0, 150, 90);  /* of 64 */
        }
    test_grouped_products(70, 2, 16, 16, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 24, 1);  /* two launches */
    test_grouped_products(4, 1, 33, 70, TERN_PER_ROW, TERN_BASE3, TERN_ACT_BIT, 1, 30, 9);
}

static void test_cuda_grouped_backward()
{
    for (tern_type encoding : {TERN_2BIT, TERN_BASE3})
        for (int32_t grain : {(int32_t)TERN_PER_ROW, 20}) {
            test_grouped_back(5, 2, 33, 70, grain, encoding, TERN_ACT_INT8, 0, 8, 2, true);
            test_grouped_back(7, 1, 40, 150, grain, encoding, TERN_ACT_INT4, 3, 40, 20, false);
            test_grouped_back(3, 2, 130, 50, grain, encoding, TERN_ACT_BIT, 10, 90, 70, true);
        }
    test_grouped_back(2, 1, 20, 50, TERN_PER_TENSOR, TERN_2BIT, TERN_ACT_INT8, 0, 150, 140, false);
    test_grouped_back(70, 2, 16, 16, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 0, 24, 1, true); /* two launches */
    tern__gpu_of(&test_context[GPU]->run)->processors = 1; /* high tiles, of which a block takes several */
    test_grouped_back(6, 2, 70, 150, TERN_PER_ROW, TERN_2BIT, TERN_ACT_INT8, 5, 150, 90, false);
    test_grouped_back(2, 1, 17, 17, TERN_PER_ROW, TERN_BASE3, TERN_ACT_BIT, 0, 4200, 4100, true); /* and segments */
}

/* -- embedding -- */

static void test_cuda_embedding()
{
    const int64_t rows = 37, cols = 70, n = 9;
    const int32_t some[n] = {36, 0, 5, -1, 5, 5, 37, 1, 0};
    test_fuse(false);
    for (int i = 0; i <= 5; i++) {
        const test_form f = test_forms[i % 5];
        both_params w(rows, cols, i < 5 ? f.rule : TERN_DENSE, TERN_FOR_GRADIENT, f.grain, f.encoding, f.scale_type, f.shadow);
        mirror<float> y(n * cols), dy(n * cols, test_uniform);
        mirror<int32_t> ids(n);
        memcpy(ids[CPU], some, sizeof some);
        ids.send();
        test_both([&](tern_context *c, int side) {
            const tern_embedding e = {&w.at[side]};
            TERN__TRY(tern_embedding_forward(c, &e, n, ids[side], y[side]));
            TERN__TRY(tern_embedding_backward(c, &e, n, ids[side], dy[side]));
            return tern_embedding_backward(c, &e, n, ids[side], dy[side]);
        });
        CHECK_SAME(y);
        CHECK(w.same());
    }
}

/* -- parameters from and to the host -- */

static void test_cuda_parameters()
{
    const int64_t rows = 35, cols = 130;
    for (const test_form &f : test_forms) {
        both_params p(rows, cols, f.rule, TERN_FOR_GRADIENT, f.grain, f.encoding, f.scale_type, f.shadow);
        const tern_matrix m = tern_param_matrix(&p.at[CPU]);
        const int64_t groups = tern__shape_of(&m).groups;
        tern_stats stats[2];
        tern_verdict verdict[2];
        std::vector<float> all((size_t)(rows * cols)), scales((size_t)(rows * groups)), values((size_t)cols), row_scales((size_t)groups);
        std::vector<int8_t> trits((size_t)cols), given;
        const auto agree = [&] {
            CHECK(p.same());
            for (int64_t r = 0; r < rows; r++) {
                CHECK_OK(tern_param_get(test_context[CPU], &p.at[CPU], r, trits.data(), &scales[(size_t)(r * groups)],
                                        &all[(size_t)(r * cols)]));
                const std::vector<int8_t> expected = trits;
                CHECK_OK(tern_param_get(test_context[GPU], &p.at[GPU], r, trits.data(), row_scales.data(), values.data()));
                CHECK(trits == expected && memcmp(values.data(), &all[(size_t)(r * cols)], (size_t)cols * 4) == 0);
                CHECK(memcmp(row_scales.data(), &scales[(size_t)(r * groups)], (size_t)groups * 4) == 0);
            }
            for (int side = CPU; side <= GPU; side++) {
                CHECK(tern_param_stats(test_context[side], &p.at[side], 0.1f, &stats[side]) == TERN_OK);
                all[77] += 1.0f;
                CHECK(tern_param_verify(test_context[side], &p.at[side], all.data(), &verdict[side]) == TERN_OK
                      && verdict[side].wrong == 1);
                all[77] -= 1.0f;
            }
            CHECK(memcmp(&stats[CPU], &stats[GPU], sizeof stats[CPU]) == 0);
            CHECK(verdict[CPU].first_wrong == verdict[GPU].first_wrong && verdict[CPU].max_error == verdict[GPU].max_error);
        };
        agree();
        for (int64_t i = 0; i < rows * cols; i++) given.push_back((int8_t)(test_random() % 3 - 1));
        for (float &s : scales)
            s = f.scale_type == TERN_POW2 ? 0.25f
              : f.scale_type == TERN_LOG ? tern__from_log((int16_t)(test_random() % 1024)) : (float)(test_random() % 8);
        test_both([&](tern_context *c, int side) { return tern_param_give(c, &p.at[side], given.data(), scales.data()); });
        agree();
        mirror<uint16_t> half(rows * cols, [] { return tern__to_bf16(test_uniform()); });
        test_both([&](tern_context *c, int side) { return tern_param_set(c, &p.at[side], TERN_BF16, half[side]); });
        agree();
        given[100] = 2;
        CHECK(tern_param_give(test_context[GPU], &p.at[GPU], given.data(), scales.data()) == TERN_E_TRIT);
        agree();
    }
}

/* -- a small network: one transformer block of every kind of layer, and its training -- */

struct network {
    enum { BATCH = 2, LENGTH = 5, TOKENS = BATCH * LENGTH, HEADS = 2, DIM = 12, WIDTH = HEADS * DIM, QKV = WIDTH + 2 * DIM };
    enum { HIDDEN = 40, CLASSES = 37 };
    enum { TABLE, ATTEND, OUT, UP, DOWN, HEAD, GAIN, BIAS, PARAMS };
    tern_context *c;
    tern_param *p[PARAMS];
    std::vector<void *> memory;
    tern_linear layer[PARAMS] = {};
    void *saved[PARAMS] = {};
    int32_t *ids, *targets;
    float *h0, *qkv, *a, *prob, *o, *h1, *u, *g, *d, *h2, *logits, *losses, *norm2;
    float *dh2, *dg, *dh1, *da, *dqkv, *dh0;
    int32_t exact = 0; /* attention's backward */

    void *get(size_t bytes)
    {
        memory.push_back(tern_alloc(c, bytes));
        if (!memory.back()) abort();
        return memory.back();
    }
    float *floats(int64_t n) { return (float *)get((size_t)n * 4); }
    network(tern_context *context, both_params *const *params) : c(context)
    {
        for (int i = 0; i < PARAMS; i++) p[i] = &params[i]->at[context == test_context[GPU]];
        layer[ATTEND].gain = p[GAIN];
        layer[UP].bias = p[BIAS];
        layer[ATTEND].norm = layer[UP].norm = layer[HEAD].norm = TERN_NORM_RMS;
        layer[UP].act = tern__is_integer(p[UP]) ? TERN_ACT_INT4 : TERN_ACT_FLOAT;
        for (int i = ATTEND; i <= HEAD; i++) {
            size_t bytes = 0;
            layer[i].w = p[i];
            if (test_reserve_for(c, &layer[i], TOKENS, &bytes) != TERN_OK) abort();
            saved[i] = get(bytes);
        }
        ids = (int32_t *)get(TOKENS * 4);
        targets = (int32_t *)get(TOKENS * 4);
        h0 = floats(TOKENS * WIDTH); h1 = floats(TOKENS * WIDTH); h2 = floats(TOKENS * WIDTH);
        a = floats(TOKENS * WIDTH); o = floats(TOKENS * WIDTH); d = floats(TOKENS * WIDTH);
        dh0 = floats(TOKENS * WIDTH); dh1 = floats(TOKENS * WIDTH); dh2 = floats(TOKENS * WIDTH); da = floats(TOKENS * WIDTH);
        qkv = floats(TOKENS * QKV); dqkv = floats(TOKENS * QKV);
        u = floats(TOKENS * HIDDEN); g = floats(TOKENS * HIDDEN); dg = floats(TOKENS * HIDDEN);
        prob = floats(BATCH * HEADS * LENGTH * LENGTH);
        logits = floats(TOKENS * CLASSES);
        losses = floats(TOKENS);
        norm2 = floats(1);
    }
    network(const network &) = delete;
    network &operator=(const network &) = delete;
    ~network() { for (void *m : memory) tern_free(c, m); }

    /* Tokens and what follows them. */
    tern_result feed(uint32_t seed)
    {
        int32_t tokens[TOKENS], next[TOKENS];
        test_seed = seed;
        for (int32_t i = 0; i < TOKENS; i++) tokens[i] = (int32_t)(test_random() % CLASSES), next[i] = (int32_t)(test_random() % CLASSES);
        TERN__TRY(tern_copy(c, ids, tokens, sizeof tokens, TERN_TO_DEVICE));
        return tern_copy(c, targets, next, sizeof next, TERN_TO_DEVICE);
    }
    tern_result turn(float *x, int32_t inverse)
    {
        tern_rope_args r = {};
        r.n = TOKENS;
        r.heads = HEADS + 1; r.dim = DIM;
        r.x = x;
        r.stride = QKV;
        r.period = LENGTH;
        r.inverse = inverse;
        return tern_rope(c, &r);
    }
    tern_result attend(const float *dy)
    {
        tern_attention_args t = {};
        t.batch = BATCH; t.queries = t.keys = LENGTH;
        t.heads = HEADS; t.kv_heads = 1; t.dim = DIM;
        t.q = qkv; t.k = qkv + WIDTH; t.v = qkv + WIDTH + DIM;
        t.q_stride = t.k_stride = t.v_stride = QKV;
        t.y = a; t.p = prob;
        t.dy = dy;
        t.exact = exact;
        t.dq = dqkv; t.dk = dqkv + WIDTH; t.dv = dqkv + WIDTH + DIM;
        return tern_attention(c, &t);
    }
    tern_result gelu(const float *dy)
    {
        tern_map_args m = {};
        m.fn = TERN_MAP_GELU;
        m.count = TOKENS * HIDDEN;
        m.a = u; m.y = g;
        m.dy = dy; m.da = dg;
        return tern_map(c, &m);
    }
    tern_result forward(int i, const float *x, float *y) { return tern_linear_forward(c, &layer[i], TOKENS, x, y, saved[i]); }
    tern_result backward(int i, const float *x, const float *dy, float *dx)
    {
        return tern_linear_backward(c, &layer[i], TOKENS, x, saved[i], dy, dx);
    }
    tern_result forward()
    {
        const tern_embedding e = {p[TABLE]};
        TERN__TRY(tern_embedding_forward(c, &e, TOKENS, ids, h0));
        TERN__TRY(forward(ATTEND, h0, qkv));
        TERN__TRY(turn(qkv, 0));
        TERN__TRY(attend(nullptr));
        TERN__TRY(forward(OUT, a, o));
        TERN__TRY(test_add(c, TOKENS * WIDTH, h0, o, h1));
        TERN__TRY(forward(UP, h1, u));
        TERN__TRY(gelu(nullptr));
        TERN__TRY(forward(DOWN, g, d));
        TERN__TRY(test_add(c, TOKENS * WIDTH, h1, d, h2));
        TERN__TRY(forward(HEAD, h2, logits));
        tern_loss_args l = {};
        l.n = TOKENS; l.classes = CLASSES;
        l.logits = l.dlogits = logits;
        l.targets = targets;
        l.losses = losses;
        l.scale = 1.0f / TOKENS;
        return tern_loss(c, &l);
    }
    tern_result backward()
    {
        const tern_embedding e = {p[TABLE]};
        TERN__TRY(backward(HEAD, h2, logits, dh2));
        TERN__TRY(backward(DOWN, g, dh2, dg));
        TERN__TRY(gelu(dg));
        TERN__TRY(backward(UP, h1, dg, dh1));
        TERN__TRY(test_add(c, TOKENS * WIDTH, dh2, dh1, dh1));
        TERN__TRY(backward(OUT, a, dh1, da));
        TERN__TRY(attend(da));
        TERN__TRY(turn(dqkv, 1));
        TERN__TRY(backward(ATTEND, h0, dqkv, dh0));
        TERN__TRY(test_add(c, TOKENS * WIDTH, dh1, dh0, dh0));
        return tern_embedding_backward(c, &e, TOKENS, ids, dh0);
    }
    tern_result step(uint32_t number, tern_optimizer optimizer, float clip, tern_step s = {})
    {
        const tern_model m = {p, PARAMS};
        s.optimizer = optimizer;
        s.rate = 0.01f;
        s.decay = 0.1f;
        s.clip = clip;
        s.seed = 5;
        s.step = number;
        s.norm2 = norm2;
        return tern_model_step(c, &m, &s);
    }
};

/* A network's parameters on both sides. */
struct network_params {
    both_params table{network::CLASSES, network::WIDTH, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_BASE3, TERN_F32, TERN_BF16};
    both_params attend{network::QKV, network::WIDTH, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, TERN_BF16};
    both_params out{network::WIDTH, network::WIDTH, TERN_TWN, TERN_FOR_ADAMW};
    both_params up{network::HIDDEN, network::WIDTH, TERN_ABSMEAN, TERN_FOR_ADAMW, TERN_PER_ROW, TERN_2BIT, TERN_POW2};
    both_params down{network::WIDTH, network::HIDDEN, TERN_ABSMEAN_SIGMA, TERN_FOR_ADAMW, 16, TERN_BASE3, TERN_F16};
    both_params head{network::CLASSES, network::WIDTH, TERN_DENSE, TERN_FOR_ADAMW};
    both_params gain{1, network::WIDTH, TERN_DENSE, TERN_FOR_ADAMW}, bias{1, network::HIDDEN, TERN_DENSE, TERN_FOR_ADAMW};
    both_params *all[network::PARAMS] = {&table, &attend, &out, &up, &down, &head, &gain, &bias};
    bool same() const
    {
        for (const both_params *p : all)
            if (!p->same()) return false;
        return true;
    }
};

static bool same_floats(const float *device, const float *host, int64_t n)
{
    std::vector<float> back((size_t)n);
    CHECK_OK(tern_copy(test_context[GPU], back.data(), device, (size_t)n * 4, TERN_TO_HOST));
    return memcmp(back.data(), host, (size_t)n * 4) == 0;
}

/* What the body does becomes a graph, which nothing can enter that waits or that copies from or to the host, and runs once. */
template <typename Body> static tern_result test_captured(tern_context *c, Body body)
{
    cudaStream_t stream = (cudaStream_t)tern_cuda_stream(c);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    const tern_result result = body();
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
    CHECK(cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess && cudaGraphLaunch(ready, stream) == cudaSuccess);
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    return result;
}

static void test_cuda_training()
{
    test_fuse(false);
    for (tern_optimizer optimizer : {TERN_ADAMW, TERN_SGD}) {
        network_params params;
        network cpu(test_context[CPU], params.all), gpu(test_context[GPU], params.all);
        for (uint32_t step = 1; step <= 3; step++) {
            test_both([&](tern_context *c, int side) {
                network &net = side == GPU ? gpu : cpu;
                TERN__TRY(net.feed(step));
                const auto learn = [&] {
                    TERN__TRY(net.forward());
                    TERN__TRY(net.backward());
                    return net.step(step, optimizer, step == 2 ? 0.5f : 0.0f);
                };
                return side == GPU ? test_captured(c, learn) : learn();
            });
            CHECK(same_floats(gpu.losses, cpu.losses, network::TOKENS));
            CHECK(same_floats(gpu.norm2, cpu.norm2, 1));
            CHECK(same_floats(gpu.dh0, cpu.dh0, network::TOKENS * network::WIDTH));
            CHECK(params.same());
        }
    }
}

/* Steps with a learned scale, noise, and shadow and moments converted to BF16; then a ternary tensor, whose shadow keeps it. */
static void test_cuda_learned_scales()
{
    const int64_t rows = 20, cols = 70;
    for (tern_rule rule : {TERN_LSQ, TERN_SEQ, TERN_ABSMEAN}) {
        both_params w{rows, cols, TERN_ABSMEAN, TERN_FOR_ADAMW, rule == TERN_LSQ ? TERN_PER_TENSOR : TERN_PER_ROW};
        both_params alpha{1, rule == TERN_SEQ ? rows : 1, TERN_DENSE, TERN_FOR_ADAMW};
        mirror<float> zeros(rows), grad(rows * cols, test_uniform);
        std::vector<int8_t> trits((size_t)(rows * cols));
        std::vector<float> scales((size_t)rows);
        test_both([&](tern_context *c, int side) {
            tern_param *p = &w.at[side], *q = &alpha.at[side], *items[] = {p, q};
            const tern_model m = {items, 2};
            tern_step s = {};
            p->rule = rule;
            p->alpha = q;
            p->noise = p->zone = 0.2f;
            p->rho = rule == TERN_ABSMEAN ? 0.5f : 0.0f;
            TERN__TRY(tern_copy(c, q->buffer[TERN_SHADOW].data, zeros[side], (size_t)q->cols * sizeof(float), TERN_ON_DEVICE));
            for (int which : {TERN_SHADOW, TERN_MOMENT1, TERN_MOMENT2}) TERN__TRY(tern_param_convert(c, p, which, TERN_BF16));
            TERN__TRY(tern_param_set(c, p, TERN_TYPE_DEFAULT, NULL));
            s.rate = 0.05f;
            s.clip = 1.0f;
            for (s.step = 1; s.step <= 3; s.step++) {
                TERN__TRY(tern_copy(c, p->buffer[TERN_GRAD].data, grad[side], (size_t)(rows * cols) * sizeof(float), TERN_ON_DEVICE));
                TERN__TRY(tern_model_step(c, &m, &s));
            }
            return TERN_OK;
        });
        CHECK(w.same() && alpha.same());
        for (int8_t &t : trits) t = (int8_t)((int)(test_random() % 3) - 1);
        for (float &x : scales) x = 1.5f + test_uniform();
        test_both([&](tern_context *c, int side) {
            TERN__TRY(tern_param_give(c, &w.at[side], trits.data(), scales.data()));
            return tern_param_set(c, &w.at[side], TERN_TYPE_DEFAULT, NULL);
        });
        CHECK(w.same() && alpha.same());
        for (int64_t r = 0; r < rows; r++) {
            std::vector<int8_t> back((size_t)cols);
            CHECK_OK(tern_param_get(test_context[GPU], &w.at[GPU], r, back.data(), nullptr, nullptr));
            CHECK(!memcmp(back.data(), trits.data() + r * cols, (size_t)cols));
        }
    }
}

/* Forward and backward as one graph, replayed for other tokens; what it did lies in losses and gradients. */
static void test_cuda_graph()
{
    network_params params;
    network cpu(test_context[CPU], params.all), gpu(test_context[GPU], params.all);
    cudaStream_t stream = (cudaStream_t)tern_cuda_stream(test_context[GPU]);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    test_fuse(false);
    CHECK_OK(gpu.feed(1));
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    CHECK_OK(gpu.forward());
    CHECK_OK(gpu.backward());
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess);
    for (uint32_t seed = 1; seed <= 3; seed++) {
        CHECK(cpu.feed(seed) == TERN_OK && cpu.forward() == TERN_OK && cpu.backward() == TERN_OK);
        CHECK_OK(gpu.feed(seed));
        CHECK(cudaGraphLaunch(ready, stream) == cudaSuccess);
        CHECK_OK(tern_sync(test_context[GPU]));
        CHECK(same_floats(gpu.losses, cpu.losses, network::TOKENS));
        CHECK(params.same()); /* gradients */
    }
    const int32_t bad = network::CLASSES;
    CHECK_OK(tern_copy(test_context[GPU], gpu.ids + 4, &bad, sizeof bad, TERN_TO_DEVICE));
    CHECK(cudaGraphLaunch(ready, stream) == cudaSuccess);
    CHECK(test_failed_with(test_context[GPU], tern_sync(test_context[GPU]), TERN_E_DATA, "gather: ids[4]"));
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
}

/* -- whole steps of every recipe, of which the host sees nothing --
   Seen to fail: with a sync or a copy to the host in the step; with shadows that are rounded to nearest, the dead zone's or the
   learned scale's gradient left out, an update that is not skipped. */

struct test_recipe {
    tern_rule rule;
    int32_t grain;
    tern_type encoding, scale_type, shadow, moments;
    tern_act act;
    tern_optimizer optimizer;
    int32_t mask;
    uint32_t flags, rotate, sync;
    int64_t rank;
    float tequila, arenas, noise, rho;
};
enum { WITH_ALL_VOTES = TERN_FOR_FLIPS | 1 << TERN_VOTES };
static const test_recipe test_recipes[] = {
    {TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_F32, TERN_BF16, TERN_BF16, TERN_ACT_INT8,
     TERN_ADAMW, TERN_FOR_ADAMW, 0, 9, 0, 3, 0.1f, 0.25f, 0.2f, 0},
    {TERN_LSQ, TERN_PER_TENSOR, TERN_BASE3, TERN_F16, TERN_BF16, TERN_F32, TERN_ACT_INT4,
     TERN_ADAMW, TERN_FOR_ADAMW, 0, 5, 0, 0, 0.1f, 0, 0.2f, 0},
    {TERN_LSQ, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, TERN_F32, TERN_BF16, TERN_ACT_FLOAT,
     TERN_SGD, TERN_FOR_ADAMW, TERN_PLAIN_ALPHA, 0, 0, 2, 0, 0.5f, 0, 0},
    {TERN_SEQ, TERN_PER_ROW, TERN_BASE3, TERN_F32, TERN_F32, TERN_F32, TERN_ACT_BIT,
     TERN_ADAMW, TERN_FOR_ADAMW, 0, 0, 0, 0, 0.1f, 0, 0.2f, 0},
    {TERN_SEQ, TERN_PER_ROW, TERN_2BIT, TERN_F16, TERN_BF16, TERN_BF16, TERN_ACT_INT8,
     TERN_SGD, TERN_FOR_ADAMW, TERN_NEAREST, 3, 0, 1, 0, 0, 0, 0},
    {TERN_TWN, 16, TERN_BASE3, TERN_F16, TERN_BF16, TERN_F32, TERN_ACT_INT4, TERN_ADAMW, TERN_FOR_ADAMW, 0, 0, 0, 3, 0, 0.25f, 0.2f, 0},
    {TERN_ABSMEAN_SIGMA, 7, TERN_2BIT, TERN_F32, TERN_F32, TERN_BF16, TERN_ACT_INT8,
     TERN_ADAMW, TERN_FOR_ADAMW, 0, 0, 0, 0, 0, 0, 0.2f, 0.9f},
    {TERN_ABSMEAN_SIGMA, TERN_PER_TENSOR, TERN_BASE3, TERN_POW2, TERN_BF16, TERN_F32, TERN_ACT_BIT,
     TERN_SGD, TERN_FOR_ADAMW, TERN_NEAREST, 0, 0, 0, 0.1f, 0.25f, 0, 0},
    {TERN_ABSMEAN, TERN_PER_TENSOR, TERN_2BIT, TERN_F32, TERN_F32, TERN_F32, TERN_ACT_INT8,
     TERN_ADAMW, TERN_FOR_ADAMW, 0, 0, 4, 0, 0.1f, 0, 0.2f, 0},
    {TERN_ABSMEAN, TERN_PER_ROW, TERN_2BIT, TERN_LOG, TERN_F32, TERN_F32, TERN_ACT_INT4,
     TERN_ADAMW, WITH_ALL_VOTES, 0, 7, 0, 0, 0, 0, 0, 0},
    {TERN_TWN, 16, TERN_BASE3, TERN_F16, TERN_F32, TERN_F32, TERN_ACT_INT8, TERN_ADAMW, TERN_FOR_FLIPS, 0, 0, 0, 0, 0, 0, 0, 0},
    {TERN_DENSE, 0, TERN_2BIT, TERN_F32, TERN_F32, TERN_BF16, TERN_ACT_FLOAT, TERN_ADAMW, TERN_FOR_ADAMW, 0, 0, 0, 3, 0, 0, 0, 0},
};

/* Two layers, one after the other, with all that their recipe gives them. */
struct recipe_network {
    enum { LAYERS = 2, N = 5, STEPS = 4, POISONED = 3 };
    const test_recipe &t;
    std::vector<both_params *> all;
    both_params *w[LAYERS];
    tern_linear layer[2][LAYERS] = {};
    mirror<int8_t> saved[LAYERS];
    mirror<float> x, h, y, dy, dh, dx, loss, norm2, nan;
    static int64_t width(int i) { return i == 0 ? 70 : i == 1 ? 33 : 20; }

    explicit recipe_network(const test_recipe &recipe) : t(recipe), saved{mirror<int8_t>(16384), mirror<int8_t>(16384)},
        x(STEPS * N * width(0), [] { return test_random() % 4 ? test_uniform() : 0.0f; }), h(N * width(1)), y(N * width(2)),
        dy(STEPS * N * width(2), test_uniform), dh(N * width(1)), dx(N * width(0)), loss(1), norm2(1), nan(1, [] { return NAN; })
    {
        for (int i = 0; i < LAYERS; i++) open(i);
    }
    recipe_network(const recipe_network &) = delete;
    recipe_network &operator=(const recipe_network &) = delete;
    ~recipe_network() { for (both_params *p : all) delete p; }

    both_params *add(int64_t rows, int64_t cols)
    {
        all.push_back(new both_params(rows, cols, TERN_DENSE, TERN_FOR_ADAMW));
        for (tern_param &p : all.back()->at) snprintf(p.name, sizeof p.name, "p%zu", all.size());
        return all.back();
    }
    void open(int i)
    {
        const int64_t rows = width(i + 1), cols = width(i);
        const bool learned = tern__is_learned(t.rule), norm = t.act != TERN_ACT_BIT;
        mirror<float> floats(rows * cols, test_uniform), zeros(rows);
        both_params *const p = w[i] =
            new both_params(rows, cols, learned ? TERN_ABSMEAN : t.rule, t.mask, t.grain, t.encoding, t.scale_type, t.shadow);
        all.push_back(p);
        both_params *const alpha = learned ? add(1, t.rule == TERN_SEQ ? rows : 1) : nullptr,
                    *const dead = t.tequila > 0 ? add(1, rows) : nullptr;
        both_params *const gain = norm ? add(1, cols) : nullptr, *const bias = add(1, rows);
        both_params *const a = t.rank ? add(t.rank, cols) : nullptr, *const b = t.rank ? add(rows, t.rank) : nullptr;
        test_both([&](tern_context *c, int side) {
            const auto of = [side](both_params *q) { return q ? &q->at[side] : nullptr; };
            tern_param *const q = &p->at[side];
            tern_linear *const l = &layer[side][i];
            size_t bytes = 0;
            snprintf(q->name, sizeof q->name, "w%d", i);
            q->rule = t.rule;
            q->flags = t.flags;
            q->alpha = of(alpha);
            q->dead = of(dead);
            q->lambda = t.tequila;
            q->rotate = t.rotate;
            q->sync = t.sync;
            q->noise = q->zone = t.noise;
            q->rho = t.rho;
            if (alpha) TERN__TRY(tern_copy(c, q->alpha->buffer[TERN_SHADOW].data, zeros[side], (size_t)q->alpha->cols * 4, TERN_ON_DEVICE));
            TERN__TRY(tern_param_set(c, q, TERN_F32, floats[side]));
            for (int which : {TERN_MOMENT1, TERN_MOMENT2}) if (q->buffer[which].data) TERN__TRY(tern_param_convert(c, q, which, t.moments));
            l->w = q;
            l->bias = of(bias);
            l->gain = of(gain);
            l->norm = norm ? TERN_NORM_RMS : TERN_NORM_NONE;
            l->act = t.act;
            l->lora_a = of(a);
            l->lora_b = of(b);
            l->lora_scale = 0.5f;
            l->arenas = t.arenas;
            TERN__TRY(test_reserve_for(c, l, N, &bytes));
            return bytes <= saved[i].count ? TERN_OK : TERN_E_MEMORY;
        });
    }
    /* The gradients of one step are not finite, which the device alone finds out. */
    tern_result steps(tern_context *c, int side)
    {
        std::vector<tern_param *> items;
        for (both_params *p : all) items.push_back(&p->at[side]);
        const tern_model m = {items.data(), (int32_t)items.size()};
        tern_sum_args sum = {};
        tern_step s = {};
        sum.kind = TERN_SUM_SQUARES;
        sum.count = N * width(2);
        sum.x = y[side];
        sum.y = loss[side];
        s.optimizer = t.optimizer;
        s.rate = 0.02f;
        s.decay = 0.1f;
        s.clip = 1.0f;
        s.seed = 5;
        s.norm2 = norm2[side];
        s.push = 12.0f;
        s.scale_step = 9;
        s.scale_push = 3;
        for (s.step = 1; s.step <= STEPS; s.step++, sum.add = 1) {
            tern_linear *const l = layer[side];
            const float *const in = x[side] + (s.step - 1) * N * width(0), *const out = dy[side] + (s.step - 1) * N * width(2);
            for (int i = 0; i < LAYERS; i++) l[i].seed = (uint64_t)s.step << 32 | (uint64_t)i;
            TERN__TRY(tern_linear_forward(c, &l[0], N, in, h[side], saved[0][side]));
            TERN__TRY(tern_linear_forward(c, &l[1], N, h[side], y[side], saved[1][side]));
            TERN__TRY(tern_sum(c, &sum));
            TERN__TRY(tern_linear_backward(c, &l[1], N, h[side], saved[1][side], out, dh[side]));
            TERN__TRY(tern_linear_backward(c, &l[0], N, in, saved[0][side], dh[side], dx[side]));
            if (s.step == POISONED) TERN__TRY(tern_copy(c, tern__floats(l[0].w, TERN_GRAD) + 17, nan[side], sizeof(float), TERN_ON_DEVICE));
            TERN__TRY(tern_model_step(c, &m, &s));
        }
        return TERN_OK;
    }
};

static void test_cuda_recipes()
{
    test_fuse(false);
    for (const test_recipe &t : test_recipes) {
        recipe_network net(t);
        const int before = test_errors;
        test_both([&](tern_context *c, int side) {
            return side == CPU ? net.steps(c, side) : test_captured(c, [&] { return net.steps(c, side); });
        });
        CHECK_SAME(net.y);
        CHECK_SAME(net.loss);
        CHECK_SAME(net.dx);
        CHECK_SAME(net.norm2);
        for (const both_params *p : net.all) CHECK(p->same());
        if (test_errors > before) printf("  recipe %d\n", (int)(&t - test_recipes));
    }
}

static void test_cuda_selftest()
{
    CHECK_OK(tern_selftest(test_context[GPU]));
    CHECK_OK(tern_sync(test_context[GPU]));
}

static void suite_cuda_layers()
{
    RUN(test_cuda_selftest);
    RUN(test_cuda_linear);
    RUN(test_cuda_linear_options);
    RUN(test_cuda_linear_fault);
    RUN(test_cuda_linear_by_its_parts);
    RUN(test_cuda_grouped);
    RUN(test_cuda_grouped_backward);
    RUN(test_cuda_embedding);
    RUN(test_cuda_parameters);
    RUN(test_cuda_training);
    RUN(test_cuda_learned_scales);
    RUN(test_cuda_graph);
    RUN(test_cuda_recipes);
}
