/* Tests of [CUDA-4] in ternary_cuda.cu. */

/* A matrix in both memories, full of what an operation has to overwrite. */
struct pack_pair {
    mirror<uint8_t> trits, scales;
    tern_matrix m[2];
    explicit pack_pair(const tern_matrix &shape)
        : trits(test_bytes(shape, false), [] { return 0xFE; }), scales(test_bytes(shape, true), [] { return 0x3A; })
    {
        for (int side = CPU; side <= GPU; side++) {
            m[side] = shape;
            m[side].trits = trits[side];
            m[side].scales = scales[side];
        }
    }
    void set_scale(int64_t i, float x) { tern__store_scale(m[CPU].scale_type, m[CPU].scales, i, x); }
    void random_scales()
    {
        for (int64_t i = 0; i < tern__shape_of(&m[CPU]).scales; i++) set_scale(i, i % 5 == 3 ? 0.0f : 1.0f + test_uniform());
        scales.send();
    }
};

struct pack_weights {
    tern_type type;
    mirror<uint8_t> bytes;
    pack_weights(tern_type of, int64_t rows, int64_t cols) : type(of), bytes(rows * cols * tern__type_bytes(of))
    {
        for (int64_t i = 0; i < rows * cols; i++) set(i, i % 11 == 4 || i / cols % 7 == 1 ? 0.0f : test_uniform());
        bytes.send();
    }
    void set(int64_t i, float w) { tern__store_float(type, bytes[CPU], i, w); }
};

static tern_result pack_ternarize(tern_context *c, const tern_matrix &m, tern_rule rule, tern_type type, const void *w)
{
    tern_ternarize_args a = {};
    a.m = m;
    a.rule = rule;
    a.type = type;
    a.w = w;
    return tern_ternarize(c, &a);
}

static void pack_check(const tern_matrix &shape, tern_rule rule, tern_type type)
{
    pack_pair p(shape);
    pack_weights w(type, shape.rows, shape.cols);
    const int before = test_errors;
    if (rule == TERN_GIVEN) p.random_scales();
    test_both([&](tern_context *c, int side) { return pack_ternarize(c, p.m[side], rule, type, w.bytes[side]); });
    CHECK_SAME(p.trits);
    CHECK_SAME(p.scales);
    if (test_errors > before)
        printf("  %d x %d, grain %d, encoding %d, scales %d, rule %d, weights %d\n", (int)shape.rows, (int)shape.cols, shape.grain,
               shape.encoding, shape.scale_type, rule, type);
}

static const tern_rule pack_rules[] = {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN, TERN_GIVEN};
static const tern_type pack_types[] = {TERN_F32, TERN_F16, TERN_BF16}, pack_encodings[] = {TERN_2BIT, TERN_BASE3};
static const tern_type pack_scale_types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};

/* Every combination, a share of them on each schedule. */
static void test_cuda_ternarize_every()
{
    static int turn;
    const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 7, 40};
    int i = turn++;
    for (tern_rule rule : pack_rules)
        for (tern_type type : pack_types)
            for (tern_type encoding : pack_encodings)
                for (tern_type scale_type : pack_scale_types)
                    for (int32_t grain : grains)
                        if (i++ % TEST_SCHEDULES == 0) pack_check(test_shape(18, 45, grain, encoding, scale_type), rule, type);
}

/* Rows of several blocks, patches of every height, many groups to a patch, groups of several blocks, and more patches than
   blocks of threads. */
static void test_cuda_ternarize_shapes()
{
    const struct { int64_t rows, cols; int32_t grain; tern_type type; } shapes[] = {
        {1, 1, TERN_PER_ROW, TERN_F32},     {16, 16, TERN_PER_ROW, TERN_F32},       {17, 1024, TERN_PER_ROW, TERN_F32},
        {5, 2049, TERN_PER_ROW, TERN_F32},  {5, 2049, TERN_PER_ROW, TERN_BF16},     {3, 4097, TERN_PER_ROW, TERN_F32},
        {2, 8200, TERN_PER_ROW, TERN_F16},  {1, 17000, TERN_PER_ROW, TERN_F32},     {33, 127, 1, TERN_F32},
        {17, 600, 16, TERN_F32},            {17, 1100, 128, TERN_F32},              {3, 3001, 1500, TERN_F32},
        {15, 300, 1000, TERN_BF16},         {2, 4097, 4096, TERN_F16},              {2100, 5, TERN_PER_TENSOR, TERN_F32},
        {3, 3000, TERN_PER_TENSOR, TERN_F32}, {2100, 20, TERN_PER_ROW, TERN_F32}
    };
    int i = 0;
    for (const auto &s : shapes) {
        const tern_type encoding = pack_encodings[i / 2 % 2];
        pack_check(test_shape(s.rows, s.cols, s.grain, encoding, TERN_F32), i++ % 2 ? TERN_TWN : TERN_ABSMEAN, s.type);
    }
}

/* On one schedule, since it is large. */
static void test_cuda_ternarize_longest()
{
    static int turn;
    if (turn++ == 0) pack_check(test_shape(1, TERN__MAX_COLS, TERN_PER_ROW, TERN_2BIT, TERN_F32), TERN_TWN, TERN_F32);
}

/* The largest weights there are, subnormal ones, scales that are too large for their type; weights that start anywhere. */
static void test_cuda_ternarize_extremes()
{
    const float good = tern__float(0x6F7FFFFFu);
    pack_pair p(test_shape(4, 40, TERN_PER_ROW, TERN_2BIT, TERN_F16));
    mirror<float> w(1 + 4 * 40, test_uniform);
    for (int j = 0; j < 40; j++) {
        w[CPU][1 + j] = j % 3 ? good : -good;
        w[CPU][1 + 40 + j] *= 1e-40f; /* subnormal */
        w[CPU][1 + 80 + j] = j % 2 ? 0.5f : -1.5f;
    }
    w.send();
    for (tern_rule rule : {TERN_ABSMEAN, TERN_TWN}) {
        test_both([&](tern_context *c, int side) { return pack_ternarize(c, p.m[side], rule, TERN_F32, w[side] + 1); });
        CHECK_SAME(p.trits);
        CHECK_SAME(p.scales);
    }
}

/* Grains of bad weights become zero, as if their weights were (and, given, their scales); the first one is reported. */
static void pack_check_bad(const tern_matrix &shape, tern_rule rule, tern_type type)
{
    const float bad[] = {tern__float(0x7FC00000u), tern__float(0xFF800000u), tern__float(type == TERN_F16 ? 0x7F800000u : 0x6F800000u)};
    const int64_t at[][2] = {{3, 45}, {18, 2}, {3, 41}}; /* columns within 40 of each other share a group or do not */
    const tern__shape s = tern__shape_of(&shape);
    pack_pair p(shape);
    pack_weights w(type, shape.rows, shape.cols);
    if (rule == TERN_GIVEN) p.random_scales();
    for (int i = 0; i < 3; i++) w.set(at[i][0] * shape.cols + at[i][1], bad[i]);
    w.bytes.send();
    for (int i = 0; i < 3; i++) {
        const int64_t row = at[i][0], col = at[i][1] / s.group * s.group, end = tern__min(shape.cols, col + s.group);
        for (int64_t r = 0; r < shape.rows; r++)
            for (int64_t j = col; j < end; j++)
                if (shape.grain == TERN_PER_TENSOR || r == row) w.set(r * shape.cols + j, 0.0f);
        if (rule == TERN_GIVEN) p.set_scale(tern__scale_index(&shape, &s, row, at[i][1] / s.group), 0.0f); /* on the CPU alone */
    }
    for (int side = CPU; side <= GPU; side++)
        CHECK(pack_ternarize(test_context[side], p.m[side], rule, type, w.bytes[side]) == TERN_OK);
    CHECK(tern_sync(test_context[GPU]) == TERN_E_NONFINITE);
    CHECK(!strcmp(tern_last_error(test_context[GPU])->text,
                  "ternarize: weights[3][41] is not a finite number below 2^96; its grain was taken as zero"));
    CHECK(tern_sync(test_context[GPU]) == TERN_OK);
    CHECK_SAME(p.trits);
    CHECK_SAME(p.scales);
}

static void test_cuda_ternarize_bad_weights()
{
    for (int32_t grain : {(int32_t)TERN_PER_TENSOR, (int32_t)TERN_PER_ROW, 20})
        for (tern_rule rule : pack_rules)
            pack_check_bad(test_shape(19, 50, grain, TERN_BASE3, TERN_F32), rule, pack_types[(int)rule % 3]);
}

/* Learned scales, not yet set, set and negative; averages; noise near the threshold: several steps, each from what the last left. */
static void pack_check_options(const tern_matrix &shape, tern_rule rule, tern_type type, float set, float rho, float noise)
{
    pack_pair p(shape);
    pack_weights w(type, shape.rows, shape.cols);
    mirror<float> alpha(shape.rows, [&] { return set * (1.5f + test_uniform()); });
    const int before = test_errors;
    p.random_scales();
    for (uint32_t step = 1; step <= 3; step++) {
        test_both([&](tern_context *c, int side) {
            tern_ternarize_args a = {};
            a.m = p.m[side];
            a.rule = rule;
            a.type = type;
            a.w = w.bytes[side];
            a.alpha = alpha[side];
            a.rho = rho;
            a.noise = noise; a.zone = 0.4f;
            a.seed = 12345678901234u; a.step = step; a.stream = 9;
            return tern_ternarize(c, &a);
        });
        CHECK_SAME(p.trits);
        CHECK_SAME(p.scales);
        CHECK_SAME(alpha);
        for (int64_t i = 0; i < shape.rows * shape.cols; i++) w.set(i, test_uniform() * 2.0f);
        w.bytes.send();
    }
    if (test_errors > before)
        printf("  %d x %d, grain %d, rule %d, weights %d, alpha %g, rho %g, noise %g\n",
               (int)shape.rows, (int)shape.cols, shape.grain, rule, type, set, rho, noise);
}

static void test_cuda_ternarize_options()
{
    const int64_t shapes[][2] = {{1, 1}, {18, 45}, {5, 2049}, {17, 1024}, {3, 17000}};
    int i = 0;
    for (const auto &s : shapes)
        for (float set : {0.0f, 0.4f, -0.1f})
            for (tern_rule rule : {TERN_LSQ, TERN_SEQ}) {
                const tern_matrix shape = test_shape(s[0], s[1], rule == TERN_LSQ ? TERN_PER_TENSOR : TERN_PER_ROW, pack_encodings[i % 2],
                                                     pack_scale_types[i % 4]);
                pack_check_options(shape, rule, pack_types[i++ / 2 % 3], set, 0.0f, i % 3 ? 0.0f : 0.3f);
            }
    for (tern_rule rule : {TERN_ABSMEAN, TERN_ABSMEAN_SIGMA, TERN_TWN})
        for (int32_t grain : {(int32_t)TERN_PER_TENSOR, (int32_t)TERN_PER_ROW, 7, 40})
            for (float noise : {0.0f, 0.2f})
                pack_check_options(test_shape(18, 45, grain, pack_encodings[i % 2], TERN_F32), rule, pack_types[i % 3], 1.0f,
                                   i++ % 4 ? 0.9f : 0.0f, noise);
}

/* A learned scale that is not finite: its row becomes zeros and it stays; the first one is reported. */
static void test_cuda_ternarize_bad_alpha()
{
    pack_pair p(test_shape(18, 45, TERN_PER_ROW, TERN_2BIT, TERN_F32));
    pack_weights w(TERN_F32, 18, 45);
    mirror<float> alpha(18, [] { return 0.5f; });
    alpha[CPU][7] = INFINITY;
    alpha[CPU][17] = NAN;
    alpha.send();
    alpha[CPU][7] = alpha[CPU][17] = 0.5f; /* of zeros */
    for (int64_t j = 0; j < 45; j++) {
        w.set(7 * 45 + j, 0.0f);
        w.set(17 * 45 + j, 0.0f);
    }
    for (int side = CPU; side <= GPU; side++) {
        tern_ternarize_args a = {};
        a.m = p.m[side];
        a.rule = TERN_SEQ;
        a.w = w.bytes[side];
        a.alpha = alpha[side];
        CHECK(tern_ternarize(test_context[side], &a) == TERN_OK);
    }
    p.set_scale(7, 0.0f);
    p.set_scale(17, 0.0f);
    CHECK(tern_sync(test_context[GPU]) == TERN_E_NONFINITE);
    CHECK(!strcmp(tern_last_error(test_context[GPU])->text,
                  "ternarize: alpha[7] is not a finite number below 2^96; its grain was taken as zero"));
    CHECK_SAME(p.trits);
    CHECK_SAME(p.scales);
    CHECK(alpha.fetch()[7] == INFINITY && alpha.fetch()[17] != alpha.fetch()[17]);
}

/* A scale that is bad, in the matrix or in its padding, is reported and taken as zero. */
static void test_cuda_ternarize_bad_scales()
{
    const float bad[] = {-1.0f, tern__float(0x7FC00000u), tern__float(0x7F800000u), tern__float(0x6F800000u)};
    for (int i = 0; i < 4; i++)
        for (int64_t at : {5, 19, 31}) {
            char text[128];
            pack_pair p(test_shape(18, 45, TERN_PER_ROW, TERN_2BIT, TERN_F32));
            pack_weights w(TERN_F32, 18, 45);
            p.random_scales();
            p.set_scale(at, bad[i]);
            p.set_scale(31, bad[i]);
            p.scales.send();
            p.set_scale(at, 0.0f);
            p.set_scale(31, 0.0f);
            for (int side = CPU; side <= GPU; side++)
                CHECK(pack_ternarize(test_context[side], p.m[side], TERN_GIVEN, TERN_F32, w.bytes[side]) == TERN_OK);
            snprintf(text, sizeof text,
                     "ternarize: scales[%d] is negative or not a finite number below 2^96 and was taken as zero", (int)at);
            CHECK(tern_sync(test_context[GPU]) == TERN_E_NONFINITE);
            CHECK(!strcmp(tern_last_error(test_context[GPU])->text, text));
            CHECK_SAME(p.trits);
            CHECK_SAME(p.scales);
        }
}

/* What is refused at once: nothing is launched. */
static void test_cuda_pack_limits()
{
    tern_context *c = test_context[GPU];
    pack_pair p(test_shape(16, 32, TERN_PER_TENSOR, TERN_2BIT, TERN_F32));
    mirror<float> w(16 * 32);
    tern_matrix m = p.m[GPU];
    m.rows = TERN__WORK + 1;
    CHECK(pack_ternarize(c, m, TERN_ABSMEAN, TERN_F32, w[GPU]) == TERN_E_UNSUPPORTED);
    CHECK(!strcmp(tern_last_error(c)->text, "cuda: ternarize: a grain of 1048577 rows; 1048576 is the most"));
    m.rows = 1;
    m.trits = (uint8_t *)m.trits + 8;
    CHECK(pack_ternarize(c, m, TERN_ABSMEAN, TERN_F32, w[GPU]) == TERN_E_ALIGNMENT);
    tern_pack_args pack = {};
    pack.m = m;
    pack.trits = (const int8_t *)w[GPU];
    CHECK(tern_pack(c, &pack) == TERN_E_ALIGNMENT);
    tern_unpack_args unpack = {};
    unpack.m = m;
    unpack.count = 1;
    unpack.values = w[GPU];
    CHECK(tern_unpack(c, &unpack) == TERN_E_ALIGNMENT);
    CHECK_SAME(p.trits);
}

static int pack_trit() { return (int)(test_random() % 3) - 1; }

static const struct { int64_t rows, cols; int32_t grain; } pack_shapes[] = {
    {1, 1, TERN_PER_ROW}, {16, 80, TERN_PER_ROW}, {17, 127, TERN_PER_TENSOR}, {33, 101, 7}, {15, 100, 40}, {3, 4097, 1000}, {64, 33, 4096}
};

static void test_cuda_pack_trits()
{
    for (const auto &s : pack_shapes)
        for (tern_type encoding : pack_encodings) {
            pack_pair p(test_shape(s.rows, s.cols, s.grain, encoding, TERN_F32));
            mirror<int8_t> trits(s.rows * s.cols, pack_trit);
            test_both([&](tern_context *c, int side) {
                tern_pack_args a = {};
                a.m = p.m[side];
                a.trits = trits[side];
                return tern_pack(c, &a);
            });
            CHECK_SAME(p.trits);
        }
}

/* A value that is no trit counts as zero; the first one is reported. */
static void test_cuda_pack_bad_trits()
{
    for (tern_type encoding : pack_encodings)
        for (int bad : {2, -2, 127, -128}) {
            pack_pair p(test_shape(35, 70, 30, encoding, TERN_F32));
            mirror<int8_t> trits(35 * 70, pack_trit);
            const int64_t at[] = {20 * 70 + 69, 20 * 70 + 29, 34 * 70};
            for (int64_t i : at) trits[CPU][i] = (int8_t)bad;
            trits.send();
            for (int64_t i : at) trits[CPU][i] = 0;
            for (int side = CPU; side <= GPU; side++) {
                tern_pack_args a = {};
                a.m = p.m[side];
                a.trits = trits[side];
                CHECK(tern_pack(test_context[side], &a) == TERN_OK);
            }
            CHECK(tern_sync(test_context[GPU]) == TERN_E_TRIT);
            CHECK(!strcmp(tern_last_error(test_context[GPU])->text, "pack: trits[20][29] is not -1, 0 or 1 and was taken as zero"));
            CHECK_SAME(p.trits);
        }
}

/* Random trits and scales, packed by the CPU. */
static void pack_random(pack_pair *p)
{
    const tern_matrix &m = p->m[CPU];
    mirror<int8_t> trits(m.rows * m.cols, pack_trit);
    tern_pack_args a = {};
    a.m = m;
    a.trits = trits[CPU];
    CHECK(tern_pack(test_context[CPU], &a) == TERN_OK);
    p->trits.send();
    p->random_scales();
}

static tern_result pack_unpack(tern_context *c, const tern_matrix &m, int64_t row, int64_t count, int8_t *trits, float *values)
{
    tern_unpack_args a = {};
    a.m = m;
    a.row = row;
    a.count = count;
    a.trits = trits;
    a.values = values;
    return tern_unpack(c, &a);
}

static void test_cuda_unpack()
{
    int i = 0;
    for (const auto &s : pack_shapes)
        for (tern_type encoding : pack_encodings) {
            const int64_t row = s.rows / 3, count = tern__min(s.rows - row, 18);
            pack_pair p(test_shape(s.rows, s.cols, s.grain, encoding, pack_scale_types[i % 4]));
            mirror<int8_t> trits(count * s.cols);
            mirror<float> values(count * s.cols);
            pack_random(&p);
            i++;
            test_both([&](tern_context *c, int side) {
                return pack_unpack(c, p.m[side], row, count, i % 3 ? trits[side] : NULL, i % 3 != 1 ? values[side] : NULL);
            });
            CHECK_SAME(trits);
            CHECK_SAME(values);
        }
}

/* A row with an invalid code becomes zeros, whole; rows that are not asked for do not matter. The first one is reported.
   A block of threads has more than one panel. */
static void test_cuda_unpack_bad_codes()
{
    for (tern_type encoding : pack_encodings) {
        const tern_matrix shape = test_shape(2100, 35, 30, encoding, TERN_F32);
        const tern__shape s = tern__shape_of(&shape);
        const int64_t bad[] = {1, 34, 21, 2069, 2099};
        pack_pair p(shape);
        mirror<int8_t> trits(2090 * 35, pack_trit);
        mirror<float> values(2090 * 35, test_uniform);
        pack_random(&p);
        const auto word = [&](int64_t row, int64_t u) { return p.trits[CPU] + row / 16 * s.panel_bytes + u * 64 + row % 16 * 4; };
        for (int64_t row : bad) word(row, s.units - 1)[3] = encoding == TERN_BASE3 ? 243 : 0xC0;
        p.trits.send();
        for (int64_t row : bad)
            for (int64_t u = 0; u < s.units; u++) memset(word(row, u), encoding == TERN_BASE3 ? 121 : 85, 4);
        for (int side = CPU; side <= GPU; side++)
            CHECK(pack_unpack(test_context[side], p.m[side], 5, 2090, trits[side], values[side]) == TERN_OK);
        CHECK(tern_sync(test_context[GPU]) == TERN_E_TRIT);
        CHECK(!strncmp(tern_last_error(test_context[GPU])->text, "unpack: row 21 has an invalid code", 34));
        CHECK_SAME(trits);
        CHECK_SAME(values);
    }
}

static void suite_cuda_pack()
{
    RUN(test_cuda_ternarize_every);
    RUN(test_cuda_ternarize_shapes);
    RUN(test_cuda_ternarize_longest);
    RUN(test_cuda_ternarize_extremes);
    RUN(test_cuda_ternarize_bad_weights);
    RUN(test_cuda_ternarize_bad_scales);
    RUN(test_cuda_ternarize_options);
    RUN(test_cuda_ternarize_bad_alpha);
    RUN(test_cuda_pack_limits);
    RUN(test_cuda_pack_trits);
    RUN(test_cuda_pack_bad_trits);
    RUN(test_cuda_unpack);
    RUN(test_cuda_unpack_bad_codes);
}
