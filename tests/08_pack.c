/* [TERN-8] Pack: the layout byte by byte, round trips, invalid codes. */

typedef struct pack_case { int64_t rows, cols; int32_t grain; tern_type encoding; } pack_case;

/* Every odd shape x grain x encoding, one after the other; returns 0 when there are no more. */
static int pack_next(int *number, pack_case *p)
{
    const int64_t columns[] = {1, 15, 16, 17, 19, 20, 21, 127, 130, 257};
    const int64_t rows[] = {1, 15, 16, 17, 33};
    const int32_t grains[] = {TERN_PER_TENSOR, TERN_PER_ROW, 1, 7, 16, 20, 32, 128, 300};
    const int n = (*number)++;
    if (n >= 2 * 9 * 5 * 10) return 0;
    p->encoding = n % 2 ? TERN_BASE3 : TERN_2BIT;
    p->grain = grains[n / 2 % 9];
    p->rows = rows[n / 18 % 5];
    p->cols = columns[n / 90];
    return 1;
}

/* The layout, literally. A byte of panel `row / 16`, unit u, row r, byte j holds the digits of inputs 4 s + j. */
static size_t pack_literal(const pack_case *p, const int8_t *trits, uint8_t *out)
{
    const int64_t slots = p->encoding == TERN_BASE3 ? 20 : 16, base = p->encoding == TERN_BASE3 ? 3 : 4;
    const int64_t group = p->grain > 0 ? p->grain : p->cols;
    const int64_t groups = (p->cols + group - 1) / group, group_units = (group + slots - 1) / slots;
    const int64_t tail = p->cols - (groups - 1) * group, units = (groups - 1) * group_units + (tail + slots - 1) / slots;
    const size_t bytes = (size_t)((p->rows + 15) / 16 * units * 64);
    int64_t r, c, s;
    memset(out, base == 3 ? 1 + 3 + 9 + 27 + 81 : 1 + 4 + 16 + 64, bytes); /* all zeros: digits of 1 */
    for (r = 0; r < p->rows; r++)
        for (c = 0; c < p->cols; c++) {
            const int64_t slot = c % group % slots, unit = c / group * group_units + c % group / slots;
            int64_t weight = 1;
            for (s = 0; s < slot / 4; s++) weight *= base;
            out[(r / 16 * units + unit) * 64 + 4 * (r % 16) + slot % 4] += (uint8_t)(trits[r * p->cols + c] * weight);
        }
    return bytes;
}

static void pack_matrix(tern_context *c, const pack_case *p, const int8_t *trits, tern_matrix *m)
{
    tern_pack_args a = TERN_ZERO;
    *m = ternarize_matrix(c, p->rows, p->cols, p->grain, p->encoding, TERN_F32);
    a.m = *m;
    a.trits = trits;
    CHECK_OK(c, tern_pack(c, &a));
}

static int8_t *pack_trits(const pack_case *p)
{
    int8_t *trits = (int8_t *)malloc((size_t)(p->rows * p->cols));
    int64_t i;
    for (i = 0; i < p->rows * p->cols; i++) trits[i] = test_trit();
    return trits;
}

static void test_pack_layout_and_sizes(void)
{
    test_context t = test_open(TERN_ISA_BEST, 2);
    uint8_t *wanted = (uint8_t *)malloc(1 << 21);
    pack_case p = TERN_ZERO;
    int number = 0;
    while (pack_next(&number, &p)) {
        const int64_t group = p.grain > 0 ? p.grain : p.cols, groups = (p.cols + group - 1) / group,
                      slots = p.encoding == TERN_BASE3 ? 20 : 16;
        int8_t *trits = pack_trits(&p);
        const size_t bytes = pack_literal(&p, trits, wanted);
        const int64_t inputs = (int64_t)bytes / ((p.rows + 15) / 16) / 64 * slots; /* of a token, groups padded */
        size_t trit_bytes = 0, scale_bytes = 0;
        int64_t stride = 0, activation_groups = 0;
        tern_matrix m;
        pack_matrix(t.c, &p, trits, &m);
        CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trit_bytes, &scale_bytes));
        CHECK_OK(t.c, tern_activation_shape(t.c, &m, &stride, &activation_groups));
        CHECK(trit_bytes == bytes, "%d bytes of trits, not %d", (int)trit_bytes, (int)bytes);
        CHECK(scale_bytes == (p.grain == TERN_PER_TENSOR ? 4 : (size_t)((p.rows + 15) / 16 * 16 * groups * 4)),
              "%d bytes of scales", (int)scale_bytes);
        CHECK(activation_groups == groups && stride % 128 == 64 && stride >= inputs && stride < inputs + 128,
              "stride %d, %d groups", (int)stride, (int)activation_groups);
        CHECK(memcmp(m.trits, wanted, bytes) == 0,
              "layout of %d x %d, grain %d, encoding %d", (int)p.rows, (int)p.cols, (int)p.grain, (int)p.encoding);
        m.scale_type = TERN_POW2;
        CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trit_bytes, &trit_bytes));
        CHECK(trit_bytes * 4 == scale_bytes, "an exponent is one byte");
        m.scale_type = TERN_LOG;
        CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trit_bytes, &trit_bytes));
        CHECK(trit_bytes * 2 == scale_bytes, "a logarithm is two bytes");
        ternarize_release(t.c, &m);
        free(trits);
    }
    free(wanted);
    test_close(&t);
}

static void test_pack_bits_per_weight(void)
{
    static const struct { int32_t grain; tern_type encoding; double bits; } wanted[] = {
        {TERN_PER_ROW, TERN_2BIT, 2.0}, {TERN_PER_ROW, TERN_BASE3, 1.6},
        {128, TERN_2BIT, 2.0}, {128, TERN_BASE3, 1.75}, {32, TERN_BASE3, 2.0}
    };
    test_context t = test_open(TERN_ISA_BEST, 1);
    int i;
    for (i = 0; i < 5; i++) {
        tern_matrix m = TERN_ZERO;
        size_t trits = 0, scales = 0;
        m.rows = 64;
        m.cols = 2560;
        m.grain = wanted[i].grain;
        m.encoding = wanted[i].encoding;
        CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &trits, &scales));
        CHECK(8.0 * (double)trits / (64 * 2560) == wanted[i].bits, "case %d: %g bits", i, 8.0 * (double)trits / (64 * 2560));
    }
    test_close(&t);
}

/* All rows at once, every row alone or with some behind it, and any range of columns. */
static void test_pack_round_trip(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    pack_case p = TERN_ZERO;
    int number = 0, i;
    while (pack_next(&number, &p)) {
        const int64_t size = p.rows * p.cols;
        int8_t *trits = pack_trits(&p), *got = (int8_t *)malloc((size_t)size);
        float *values = (float *)malloc(sizeof(float) * (size_t)size);
        tern_unpack_args a = TERN_ZERO;
        int64_t r, wrong = 0;
        tern__shape s;
        pack_matrix(t.c, &p, trits, &a.m);
        a.count = p.rows;
        a.trits = got;
        CHECK_OK(t.c, tern_unpack(t.c, &a));
        CHECK(memcmp(got, trits, (size_t)size) == 0,
              "%d x %d, grain %d, encoding %d", (int)p.rows, (int)p.cols, (int)p.grain, (int)p.encoding);
        s = tern__shape_of(&a.m);
        for (r = 0; r < s.scales; r++) ((float *)a.m.scales)[r] = (float)r + 0.5f;
        for (a.row = 0; a.row < p.rows; a.row++) {
            const int8_t *row = trits + a.row * p.cols;
            const int64_t group = p.grain > 0 ? p.grain : p.cols;
            a.count = a.row % 3 ? 1 : 1 + (int64_t)test_random() % (p.rows - a.row);
            a.trits = a.row % 2 ? got : NULL;
            a.values = a.row % 5 ? values : NULL;
            memset(got, 9, (size_t)(a.count * p.cols));
            CHECK_OK(t.c, tern_unpack(t.c, &a));
            CHECK(!a.trits || memcmp(got, row, (size_t)(a.count * p.cols)) == 0, "%d rows from %d on", (int)a.count, (int)a.row);
            for (r = 0; a.values && r < a.count * p.cols; r++) {
                const int64_t in = a.row + r / p.cols,
                              at = p.grain == TERN_PER_TENSOR ? 0 : (in / 16 * s.groups + r % p.cols / group) * 16 + in % 16;
                wrong += values[r] != (float)row[r] * ((float)at + 0.5f);
            }
            for (i = 0; i < 4; i++) {
                const int64_t from = (int64_t)test_random() % p.cols, n = (int64_t)test_random() % (p.cols - from) + 1;
                tern__unpack_range(&a.m, &s, a.row, from, n, got);
                CHECK(memcmp(got, row + from, (size_t)n) == 0, "columns %d to %d", (int)from, (int)(from + n));
            }
        }
        CHECK(wrong == 0, "%d values", (int)wrong);
        ternarize_release(t.c, &a.m);
        free(values);
        free(got);
        free(trits);
    }
    test_close(&t);
}

/* A bad code in any byte of a row: refused by that row, nothing written, the others readable. */
static void test_pack_refuses_invalid_codes(void)
{
    const pack_case cases[] = {
        {18, 21, TERN_PER_ROW, TERN_2BIT}, {18, 21, 7, TERN_2BIT}, {18, 21, TERN_PER_ROW, TERN_BASE3}, {18, 21, 7, TERN_BASE3}};
    test_context t = test_open(TERN_ISA_BEST, 1);
    int n, code;
    for (n = 0; n < 4; n++) {
        int8_t *trits = pack_trits(&cases[n]), got[18 * 21], untouched[18 * 21];
        float values[18 * 21];
        tern_unpack_args a = TERN_ZERO;
        size_t bytes = 0, scales = 0, i;
        pack_matrix(t.c, &cases[n], trits, &a.m);
        CHECK_OK(t.c, tern_matrix_bytes(t.c, &a.m, &bytes, &scales));
        memset(untouched, 77, sizeof untouched);
        for (i = 0; i < bytes; i++) {
            uint8_t *byte = (uint8_t *)a.m.trits + i;
            const uint8_t kept = *byte;
            const int64_t row = (int64_t)(i / (bytes / 2) * 16 + i % 64 / 4);
            for (code = 0; row < 18 && code < 256; code += cases[n].encoding == TERN_BASE3 ? 1 : 3) {
                const int bad = cases[n].encoding == TERN_BASE3
                    ? code > 242
                    : (code & 3) == 3 || (code >> 2 & 3) == 3 || (code >> 4 & 3) == 3 || code >> 6 == 3;
                char place[32];
                if (!bad) continue;
                *byte = (uint8_t)code;
                memcpy(got, untouched, sizeof got);
                memset(values, 77, sizeof values);
                a.trits = got;
                a.values = values;
                a.row = 0;
                a.count = 18;
                snprintf(place, sizeof place, "row %d has", (int)row);
                CHECK_FAILS(t.c, tern_unpack(t.c, &a), TERN_E_TRIT, place);
                CHECK(memcmp(got, untouched, sizeof got) == 0 && memcmp(values, untouched, sizeof got) == 0,
                      "written in spite of byte %d", (int)i);
                a.row = (row + 1) % 18;
                a.count = 1;
                CHECK_OK(t.c, tern_unpack(t.c, &a));
                CHECK(memcmp(got, trits + a.row * 21, 21) == 0, "row %d beside it", (int)a.row);
            }
            *byte = kept;
        }
        ternarize_release(t.c, &a.m);
        free(trits);
    }
    test_close(&t);
}

static void test_pack_refuses_what_is_not_a_trit(void)
{
    const int8_t bad[] = {2, -2, 127, -128};
    const int64_t places[] = {0, 20, 21 * 17 + 4, 18 * 21 - 1};
    const pack_case p = {18, 21, TERN_PER_ROW, TERN_2BIT};
    test_context t = test_open(TERN_ISA_BEST, 3);
    int8_t *trits = pack_trits(&p);
    tern_pack_args a = TERN_ZERO;
    size_t bytes = 0, scales = 0, i, written;
    int b, n;
    pack_matrix(t.c, &p, trits, &a.m);
    a.trits = trits;
    CHECK_OK(t.c, tern_matrix_bytes(t.c, &a.m, &bytes, &scales));
    for (b = 0; b < 4; b++)
        for (n = 0; n < 4; n++) {
            const int8_t kept = trits[places[n]];
            char text[64];
            trits[places[n]] = bad[b];
            memset(a.m.trits, 0xA5, bytes);
            snprintf(text, sizeof text, "trits[%d][%d] is %d,", (int)(places[n] / 21), (int)(places[n] % 21), bad[b]);
            CHECK_FAILS(t.c, tern_pack(t.c, &a), TERN_E_TRIT, text);
            for (i = written = 0; i < bytes; i++) written += ((const uint8_t *)a.m.trits)[i] != 0xA5;
            CHECK(written == 0, "%d bytes written", (int)written);
            trits[places[n]] = kept;
        }
    ternarize_release(t.c, &a.m);
    free(trits);
    test_close(&t);
}

static void test_pack_bad_shapes(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_matrix good = TERN_ZERO, m;
    tern_unpack_args u = TERN_ZERO;
    int8_t trits[64];
    size_t bytes, scales;
    int64_t stride, groups;
    good.rows = 4;
    good.cols = 8;
    good.grain = TERN_PER_ROW;
#define PACK_BAD(change, code, text) m = good; change; CHECK_FAILS(t.c, tern_matrix_bytes(t.c, &m, &bytes, &scales), code, text)
    PACK_BAD(m.rows = 0, TERN_E_SHAPE, "matrix is 0 x 8");
    PACK_BAD(m.cols = -1, TERN_E_SHAPE, "matrix is 4 x -1");
    PACK_BAD(m.cols = 262145, TERN_E_SHAPE, "K = 262145 exceeds 262144");
    PACK_BAD(m.grain = -2, TERN_E_ARGUMENT, "grain -2");
    PACK_BAD(m.grain = 262145, TERN_E_ARGUMENT, "grain 262145");
    PACK_BAD(m.encoding = TERN_I8, TERN_E_ARGUMENT, "encoding 4");
    PACK_BAD(m.scale_type = TERN_BF16, TERN_E_ARGUMENT, "scale type 2");
    PACK_BAD(m.rows = INT64_MAX, TERN_E_OVERFLOW, "a matrix of 9223372036854775807 x 8 overflows");
    PACK_BAD(m.rows = (int64_t)1 << 60, TERN_E_OVERFLOW, "overflows");
#undef PACK_BAD
    m = good;
    m.cols = 262144;
    CHECK_OK(t.c, tern_matrix_bytes(t.c, &m, &bytes, &scales));
    CHECK_FAILS(t.c, tern_matrix_bytes(t.c, NULL, &bytes, &scales), TERN_E_ARGUMENT, "NULL");
    CHECK(tern_matrix_bytes(NULL, NULL, &bytes, &scales) == TERN_E_ARGUMENT, "no context");
    CHECK_FAILS(t.c, tern_matrix_bytes(t.c, &m, NULL, &scales), TERN_E_ARGUMENT, "NULL");
    CHECK_FAILS(t.c, tern_activation_shape(t.c, &m, &stride, NULL), TERN_E_ARGUMENT, "NULL");
    m.cols = 0;
    CHECK_FAILS(t.c, tern_activation_shape(t.c, &m, &stride, &groups), TERN_E_SHAPE, "matrix is 4 x 0");
    u.m = ternarize_matrix(t.c, 4, 8, TERN_PER_ROW, TERN_2BIT, TERN_F32);
    u.trits = trits;
    u.count = 5;
    CHECK_FAILS(t.c, tern_unpack(t.c, &u), TERN_E_SHAPE, "rows 0 to 5 of 4");
    u.row = 4;
    u.count = 1;
    CHECK_FAILS(t.c, tern_unpack(t.c, &u), TERN_E_SHAPE, "rows 4 to 5 of 4");
    u.row = -1;
    CHECK_FAILS(t.c, tern_unpack(t.c, &u), TERN_E_SHAPE, "rows -1");
    u.row = 3;
    u.count = INT64_MAX;
    CHECK_FAILS(t.c, tern_unpack(t.c, &u), TERN_E_SHAPE, "rows 3");
    ternarize_release(t.c, &u.m);
    CHECK_FAILS(t.c, tern_pack(t.c, NULL), TERN_E_ARGUMENT, "args is NULL");
    test_close(&t);
}

static void suite_pack(void)
{
    RUN(test_pack_layout_and_sizes);
    RUN(test_pack_bits_per_weight);
    RUN(test_pack_round_trip);
    RUN(test_pack_refuses_invalid_codes);
    RUN(test_pack_refuses_what_is_not_a_trit);
    RUN(test_pack_bad_shapes);
}
