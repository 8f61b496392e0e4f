/* [TERN-10] Kernels: the scalar ones against their definition, every other tier against the scalar ones.
   Mutations that test_kernels_bits saw: high nibbles shifted by 3; a chunk's words counted by 2-bit units in base 3;
   the unit behind an odd last one read; idle nibbles counted by their units; a last group of full length. The scalar sum_above
   with a NaN taken as not above a negative bound was seen by its test and by test_ternarize_spare.
   test_kernels_pairs (with AVX512-BF16 or TEST_AMX) saw: ties away from zero; truncation; a NaN rounded as a number; halves of
   a word exchanged; a partner of the last odd term; rows that are missing left as they were; sums begun at zero always; c
   never added to; tiles not released; the second of a tile's two eights of rows read from the first; the lanes' halves
   exchanged. */

/* The tier's kernels, or NULL where it is not here. */
static const tern__kernels *kernels_of(tern_isa isa)
{
    const tern_backend *b = test_tier(isa);
    return b ? (const tern__kernels *)b->data : NULL;
}

/* Runs body for every tier but scalar. */
#define KERNELS_EACH_TIER(body)                                                  \
    do {                                                                         \
        tern_isa isa;                                                            \
        for (isa = TERN_ISA_SCALAR + 1; isa < TERN__ISA_END; isa++) {            \
            const tern__kernels *k = kernels_of(isa);                            \
            const char *tier = test_tier_name[isa];                              \
            if (k) { body; }                                                     \
        }                                                                        \
    } while (0)

/* Accumulators and tiles lie on 64 bytes, as the drivers keep them. */
enum { KERNELS_ACC = TERN__PAIRS * TERN__ROWS };
static int32_t kernels_acc[2][KERNELS_ACC] TERN__ALIGN64;
static float kernels_facc[2][KERNELS_ACC] TERN__ALIGN64;
static uint8_t kernels_code[4 * TERN__I8_K * TERN__ROWS] TERN__ALIGN64;
static float kernels_a[TERN__K_BLOCK * 16 + 16] TERN__ALIGN64, kernels_b[TERN__K_BLOCK * TERN__LANES] TERN__ALIGN64,
    kernels_p[2][16 * TERN__LANES] TERN__ALIGN64;

/* -- dot products -- */

typedef enum { KERNELS_RANDOM, KERNELS_HIGH, KERNELS_LOW, KERNELS_MIXED, KERNELS_FILLS } kernels_fill;

/* Buffers of exactly the bytes that are needed, `shift` bytes off any alignment; then tokens do not touch either. */
typedef struct kernels_dot {
    tern__dot d;
    uint8_t *panel; int8_t *q; int32_t *sum; void *scale;
    size_t panel_bytes, q_bytes, sum_bytes, scale_bytes;
    int base3;
} kernels_dot;

static kernels_dot kernels_dot_new(int base3, int64_t units, int32_t panels, int32_t tokens, int64_t sum_stride, size_t shift,
                                   kernels_fill fill)
{
    const int64_t inputs = units * (base3 ? 20 : 16), q_stride = inputs + 37 * (int64_t)shift;
    const size_t panel_bytes = (size_t)(panels * units * TERN__UNIT), q_bytes = (size_t)((tokens - 1) * q_stride + inputs);
    kernels_dot k;
    int64_t i, t;
    memset(&k, 0, sizeof k);
    k.base3 = base3;
    k.panel_bytes = panel_bytes;
    k.q_bytes = q_bytes;
    k.sum_bytes = sizeof(int32_t) * (size_t)((tokens - 1) * sum_stride + 1);
    k.panel = (uint8_t *)malloc(panel_bytes + shift);
    k.q = (int8_t *)malloc(q_bytes + shift);
    k.sum = (int32_t *)calloc(1, k.sum_bytes);
    for (i = 0; i < (int64_t)panel_bytes; i++) {
        uint32_t byte = base3 ? test_random() % 243
                              : (test_random() % 3) | (test_random() % 3) << 2 | (test_random() % 3) << 4 | (test_random() % 3) << 6;
        if (fill == KERNELS_HIGH || fill == KERNELS_MIXED) byte = base3 ? 242 : 0xAA;
        if (fill == KERNELS_LOW) byte = 0;
        k.panel[shift + (size_t)i] = (uint8_t)byte;
    }
    for (i = 0; i < (int64_t)q_bytes; i++) {
        int32_t v = (int32_t)(test_random() % 255) - 127;
        if (fill == KERNELS_HIGH || fill == KERNELS_LOW) v = i / q_stride % 2 ? -127 : 127;
        if (fill == KERNELS_MIXED) v = (i / q_stride + i) % 2 ? -127 : 127;
        k.q[shift + (size_t)i] = (int8_t)v;
    }
    for (t = 0; t < tokens; t++) {
        int32_t sum = 0;
        for (i = 0; i < inputs; i++) sum += k.q[shift + (size_t)(t * q_stride + i)];
        k.sum[t * sum_stride] = sum;
    }
    k.d.panel = k.panel + shift;
    k.d.panel_stride = units * TERN__UNIT;
    k.d.units = k.d.last_units = units;
    k.d.groups = 1;
    k.d.q = k.q + shift;
    k.d.q_stride = q_stride;
    k.d.sum = k.sum;
    k.d.sum_stride = sum_stride;
    k.d.panels = panels;
    k.d.tokens = tokens;
    return k;
}

/* The same in groups of so many units, with scales. */
static void kernels_dot_split(kernels_dot *k, int64_t units, tern_type type)
{
    tern__dot *d = &k->d;
    const int64_t unit = k->base3 ? 20 : 16, total = d->units, groups = (total + units - 1) / units;
    int64_t t, i;
    d->units = units;
    d->last_units = total - (groups - 1) * units;
    d->groups = d->sum_stride = groups;
    free(k->sum);
    k->sum_bytes = (size_t)(d->tokens * groups) * sizeof *k->sum;
    k->sum = (int32_t *)calloc(1, k->sum_bytes);
    d->sum = k->sum;
    for (t = 0; t < d->tokens; t++)
        for (i = 0; i < total * unit; i++) k->sum[t * groups + i / unit / units] += d->q[t * d->q_stride + i];
    d->scale_type = type;
    d->scale_stride = groups * TERN__ROWS * tern__type_bytes(type);
    k->scale_bytes = (size_t)(d->panels * d->scale_stride);
    d->scale = k->scale = malloc(k->scale_bytes);
    for (i = 0; i < d->panels * groups * TERN__ROWS; i++) /* zeros, and f16 below its normal range, among them */
        tern__store_scale(type, k->scale, i, i % 37 == 3 ? 0.0f : test_float() * test_float() * (i % 11 ? 1.0f : 3e-6f));
    for (i = 5; type == TERN_LOG && i < d->panels * groups * TERN__ROWS; i += 13) /* what no store gives, too */
        ((int16_t *)k->scale)[i] = (int16_t)(test_random() % 52768 - 32768);
    d->facc = kernels_facc[0];
}

static void kernels_dot_free(kernels_dot *k)
{
    free(k->panel);
    free(k->q);
    free(k->sum);
    free(k->scale);
}

/* Into accumulators that were full of other numbers, so that every write shows. */
static void kernels_dot_run(const tern__kernels *k, kernels_dot *x, int32_t *acc)
{
    memset(acc, 0x3C, sizeof kernels_acc[0]);
    x->d.acc = acc;
    (x->base3 ? k->dot_base3 : k->dot_2bit)(&x->d);
#ifdef TEST_AMX
    CHECK(!amx.configured, "tiles are still in use");
#endif
}

static void kernels_compare_dot(int base3, int64_t units, int32_t panels, int32_t tokens, int64_t sum_stride, size_t shift,
                                kernels_fill fill)
{
    kernels_dot x = kernels_dot_new(base3, units, panels, tokens, sum_stride, shift, fill);
    kernels_dot_run(&tern__kernels_scalar, &x, kernels_acc[0]);
    KERNELS_EACH_TIER(
        kernels_dot_run(k, &x, kernels_acc[1]);
        CHECK(memcmp(kernels_acc[0], kernels_acc[1], sizeof kernels_acc[0]) == 0,
              "%s: base3 %d, %d units, %d panels, %d tokens, shift %d, fill %d", tier, base3, (int)units, (int)panels, (int)tokens,
              (int)shift, (int)fill));
    kernels_dot_free(&x);
}

/* sum of trit * q over unpacked trits. */
static void test_kernels_dot_by_definition(void)
{
    int base3, n;
    for (base3 = 0; base3 < 2; base3++)
        for (n = 1; n <= 6; n++) {
            const int64_t unit = base3 ? 20 : 16;
            kernels_dot x = kernels_dot_new(base3, n, 3, 5, 2, 1, KERNELS_RANDOM);
            int64_t p, t, r, u, i, wrong = 0;
            kernels_dot_run(&tern__kernels_scalar, &x, kernels_acc[0]);
            for (p = 0; p < 3; p++)
                for (t = 0; t < 5; t++)
                    for (r = 0; r < 16; r++) {
                        int32_t dot = 0;
                        for (u = 0; u < n; u++) {
                            int8_t trits[20];
                            tern__unpack_unit(base3 ? TERN_BASE3 : TERN_2BIT, x.d.panel + (p * n + u) * 64, r, trits);
                            for (i = 0; i < unit; i++) dot += trits[i] * x.d.q[t * x.d.q_stride + u * unit + i];
                        }
                        wrong += kernels_acc[0][(p * 5 + t) * 16 + r] != dot;
                    }
            CHECK(wrong == 0, "base3 %d, %d units: %d of %d", base3, n, (int)wrong, 3 * 5 * 16);
            kernels_dot_free(&x);
        }
}

static void test_kernels_dot_shapes(void)
{
    const int64_t units[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 127};
    const int32_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 33, 63, 64};
    int base3, u, t, panels;
    for (base3 = 0; base3 < 2; base3++)
        for (u = 0; u < 11; u++)
            for (t = 0; t < 17; t++)
                for (panels = 1; panels <= 4; panels++)
                    if (units[u] * tokens[t] * panels < 3000 || t == 16)
                        kernels_compare_dot(base3, units[u], panels, tokens[t], 1 + t % 3, (size_t)(u + t) % 5, KERNELS_RANDOM);
}

/* Around the blocks of AMX: 16 quads of a tile, 80 to 224 of a chunk, 32 tokens of two tiles, all that a call may have. */
static void test_kernels_dot_blocks(void)
{
    const int64_t units[] = {1, 3, 4, 5, 16, 28, 29, 33, 57, 70};
    const int32_t tokens[] = {4, 16, 17, 65, 128, 193, 225, 256};
    int base3, u, t, panels;
    for (base3 = 0; base3 < 2; base3++)
        for (u = 0; u < 10; u++)
            for (t = 0; t < 8; t++)
                for (panels = 1; panels <= TERN__PANELS && panels * tokens[t] <= TERN__PAIRS; panels++)
                    if (units[u] < 5 || tokens[t] < 20 || (u + t + panels) % 5 == 0)
                        kernels_compare_dot(base3, units[u], panels, tokens[t], 1, (size_t)(u + t) % 3, KERNELS_RANDOM);
}

/* A dot among pages that fault, in groups of so many units: weights, activations, sums, scales and results right
   behind one, or right before one. */
static void kernels_guarded_dot(int base3, int64_t total, int64_t units, int32_t panels, int32_t tokens, int at_end)
{
    const size_t bytes = 4 * (size_t)(panels * tokens * TERN__ROWS);
    kernels_dot x = kernels_dot_new(base3, total, panels, tokens, 1, (size_t)(tokens % 2), KERNELS_RANDOM), guarded;
    void *acc = test_guard(kernels_acc[1], bytes, at_end), *facc = test_guard(kernels_facc[1], bytes, at_end), *panel, *q, *sum, *scale;
    kernels_dot_split(&x, units, TERN_F32);
    if (x.d.groups == 1) x.d.facc = NULL;
    panel = test_guard(x.d.panel, x.panel_bytes, at_end);
    q = test_guard(x.d.q, x.q_bytes, at_end);
    sum = test_guard(x.d.sum, x.sum_bytes, at_end);
    scale = test_guard(x.d.scale, x.scale_bytes, at_end);
    kernels_dot_run(&tern__kernels_scalar, &x, kernels_acc[0]);
    guarded = x;
    guarded.d.panel = (const uint8_t *)panel;
    guarded.d.q = (const int8_t *)q;
    guarded.d.sum = (const int32_t *)sum;
    guarded.d.scale = scale;
    guarded.d.acc = (int32_t *)acc;
    if (x.d.facc) guarded.d.facc = (float *)facc;
    KERNELS_EACH_TIER(
        memset(acc, 0x3C, bytes);
        memset(facc, 0x3C, bytes);
        (base3 ? k->dot_base3 : k->dot_2bit)(&guarded.d);
        CHECK(x.d.facc ? memcmp(kernels_facc[0], facc, bytes) == 0 : memcmp(kernels_acc[0], acc, bytes) == 0,
              "%s: base3 %d, %d units in groups of %d, %d panels, %d tokens", tier, base3, (int)total, (int)units,
              (int)panels, (int)tokens));
    test_unguard(panel, x.panel_bytes);
    test_unguard(q, x.q_bytes);
    test_unguard(sum, x.sum_bytes);
    test_unguard(scale, x.scale_bytes);
    test_unguard(acc, bytes);
    test_unguard(facc, bytes);
    kernels_dot_free(&x);
}

static void test_kernels_dot_touches_no_more(void)
{
    const int64_t totals[] = {1, 2, 3, 4, 5, 7, 16, 57}, groups[] = {0, 1, 4, 5};
    const int32_t tokens[] = {1, 2, 3, 4, 7, 13, 16, 17, 32, 33};
    int u, t, panels, variant;
    for (u = 0; u < 8; u++)
        for (t = 0; t < 10; t++)
            for (panels = 1; panels <= 4; panels++)
                for (variant = 0; variant < 4; variant++) {
                    const int64_t units = groups[(u + t + panels) % 4];
                    kernels_guarded_dot(variant / 2, totals[u], units == 0 || units > totals[u] ? totals[u] : units, panels,
                                        tokens[t], variant % 2);
                }
}

/* The software tile unit against the machine's, where the tier is not running on software itself. */
#if defined(TERN__WITH_AMX_INT8) && !defined(TEST_AMX)
static void test_kernels_tile_unit(void)
{
    uint8_t bytes[3][16][64], soft[16][64], hard[16][64];
    int round, i;
    if (!test_tier(TERN_ISA_AMX_INT8)) {
        printf("  skipped: no tier amx-int8 here\n");
        return;
    }
    for (round = 0; round < 2000; round++) {
        const int rows = 1 + (int)(test_random() % 16), step = 1 + (int)(test_random() % 16);
        tern__tile_config config;
        memset(&config, 0, sizeof config);
        config.palette = 1;
        for (i = 0; i < 8; i++) {
            config.rows[i] = (uint8_t)(i < 6 ? rows : step);
            config.bytes[i] = (uint16_t)(i == 4 ? 4 * step : 64);
        }
        for (i = 0; i < (int)sizeof bytes; i++) ((uint8_t *)bytes)[i] = (uint8_t)test_random();
        memset(soft, 1, sizeof soft);
        memset(hard, 1, sizeof hard);
        amx_config(&config);
        amx_load(0, bytes[0], 64);
        amx_load(4, bytes[1], 61);
        amx_load(6, bytes[2], 64);
        amx_dot(0, 4, 6);
        amx_dot(0, 4, 6);
        amx_store(0, soft, 64);
        amx_release();
        TERN__TILE_CONFIG(&config);
        TERN__TILE_LOAD(0, bytes[0], 64);
        TERN__TILE_ONCE(4, bytes[1], 61);
        TERN__TILE_LOAD(6, bytes[2], 64);
        TERN__TILE_DOT(0, 4, 6);
        TERN__TILE_DOT(0, 4, 6);
        TERN__TILE_STORE(0, hard, 64);
        TERN__TILE_RELEASE();
        CHECK(memcmp(soft, hard, sizeof soft) == 0, "%d rows, %d quads", rows, step);
        if (!kernels_of(TERN_ISA_AMX_INT8)->pairs) continue;
        for (i = 0; i < (int)sizeof bytes; i += 2) { /* denormals among them, as factors and as products */
            const uint16_t half = tern__to_bf16(test_float() * (i % 14 ? 1.0f : i % 4 ? 1e-38f : 1e-20f));
            memcpy((uint8_t *)bytes + i, &half, 2);
        }
        amx_config(&config);
        amx_zero(0);
        amx_load(4, bytes[1], 64);
        amx_load(6, bytes[2], 64);
        amx_pairs(0, 4, 6);
        amx_pairs(0, 4, 6);
        amx_store(0, soft, 64);
        amx_release();
        TERN__TILE_CONFIG(&config);
        TERN__TILE_ZERO(0);
        TERN__TILE_ONCE(4, bytes[1], 64);
        TERN__TILE_LOAD(6, bytes[2], 64);
        TERN__TILE_PAIRS(0, 4, 6);
        TERN__TILE_PAIRS(0, 4, 6);
        TERN__TILE_STORE(0, hard, 64);
        TERN__TILE_RELEASE();
        CHECK(memcmp(soft, hard, sizeof soft) == 0, "%d rows, %d pairs", rows, step);
    }
}
#endif

/* All codes +1 with q = 127 and their opposites: int16 partial sums overflow first, int32 never. */
static void test_kernels_dot_extremes(void)
{
    const int64_t units[2][4] = {{16, 160, 4097, 16384}, {13, 128, 4097, 13107}}; /* K = 2560 and 262144 among them */
    int base3, u, fill;
    for (base3 = 0; base3 < 2; base3++)
        for (u = 0; u < 4; u++)
            for (fill = KERNELS_RANDOM; fill < KERNELS_FILLS; fill++) {
                kernels_compare_dot(base3, units[base3][u], 1, 1, 1, 1, (kernels_fill)fill);
                kernels_compare_dot(base3, units[base3][u], 2, 3, 1, 0, (kernels_fill)fill);
                kernels_compare_dot(base3, units[base3][u], 1, 4, 1, 0, (kernels_fill)fill);
                if (u < 2) kernels_compare_dot(base3, units[base3][u], 4, 17, 1, 3, (kernels_fill)fill);
            }
}

/* Groups one by one, by the tier's own dot of one group. */
static void kernels_compare_groups(int base3, int64_t total, int64_t units, int32_t panels, int32_t tokens, tern_type type)
{
    kernels_dot x = kernels_dot_new(base3, total, panels, tokens, 1, 1, KERNELS_RANDOM);
    const int64_t count = panels * tokens * TERN__ROWS;
    static float wanted[KERNELS_ACC];
    int64_t g, i;
    kernels_dot_split(&x, units, type);
    for (g = 0; g < x.d.groups; g++) {
        kernels_dot one = x;
        one.d = tern__dot_group(&x.d, g, base3 ? 20 : 16);
        one.d.facc = NULL;
        one.d.groups = 1;
        one.d.last_units = one.d.units;
        kernels_dot_run(&tern__kernels_scalar, &one, kernels_acc[0]);
        for (i = 0; i < count; i++) {
            const int64_t row = (i / TERN__ROWS / tokens * x.d.groups + g) * TERN__ROWS + i % TERN__ROWS;
            const float product = (float)kernels_acc[0][i] * tern__load_scale(type, x.scale, row);
            wanted[i] = g ? wanted[i] + product : product;
        }
    }
    kernels_dot_run(&tern__kernels_scalar, &x, kernels_acc[0]);
    CHECK(memcmp(wanted, kernels_facc[0], sizeof(float) * (size_t)count) == 0,
          "scalar: base3 %d, %d units in groups of %d", base3, (int)total, (int)units);
    KERNELS_EACH_TIER(
        memset(kernels_facc[0], 0x3C, sizeof kernels_facc[0]);
        kernels_dot_run(k, &x, kernels_acc[1]);
        CHECK(memcmp(wanted, kernels_facc[0], sizeof(float) * (size_t)count) == 0,
              "%s: base3 %d, %d units in groups of %d, %d panels, %d tokens, scales %d", tier, base3, (int)total, (int)units, (int)panels,
              (int)tokens, (int)type);
        for (i = count; i < KERNELS_ACC; i++)
            CHECK(tern__bits(kernels_facc[0][i]) == 0x3C3C3C3Cu,
                  "%s: written beside %d panels of %d tokens", tier, (int)panels, (int)tokens));
    kernels_dot_free(&x);
}

static void test_kernels_groups(void)
{
    const int64_t totals[] = {1, 2, 7, 17, 40}, units[] = {1, 2, 7, 8, 21};
    const int32_t tokens[] = {1, 2, 3, 4, 5, 7, 12, 13, 17, 33, 64};
    const tern_type types[] = {TERN_F32, TERN_F16, TERN_POW2, TERN_LOG};
    int base3, i, j, t, n = 0;
    for (base3 = 0; base3 < 2; base3++)
        for (i = 0; i < 5; i++)
            for (j = 0; j < 5; j++)
                for (t = 0; t < 11; t++)
                    if (units[j] <= totals[i])
                        n++, kernels_compare_groups(base3, totals[i], units[j], 1 + n % 4, tokens[t], types[n / 4 % 4]);
}

/* -- dot products of bits -- */

/* One in `each` inputs is 1; groups of so many units (0: none). Weights, bits and sums right behind a page that
   faults, or right before one. */
static void kernels_bits(int base3, int64_t total, int64_t group, int32_t panels, int32_t tokens, uint32_t each, int at_end)
{
    const int64_t unit = base3 ? 20 : 16, units = group ? group : total,
                  stride = (total / units + 1) * tern__bit_words(units, unit) * 4 + tokens % 3;
    const int64_t count = panels * tokens * TERN__ROWS, groups = (total + units - 1) / units;
    const size_t q_bytes = (size_t)((tokens - 1) * stride + (groups - 1) * tern__bit_words(units, unit) * 4
                                    + tern__bit_words(total - (groups - 1) * units, unit) * 4);
    static int32_t wanted[KERNELS_ACC];
    static float summed[KERNELS_ACC];
    kernels_dot x = kernels_dot_new(base3, total, panels, tokens, 1, 0, KERNELS_RANDOM);
    uint8_t *q = (uint8_t *)calloc(1, q_bytes);
    void *panel, *bits, *sum;
    int64_t g, t, i, p, r;
    tern_isa isa;
    kernels_dot_split(&x, units, TERN_F16);
    memset(x.sum, 0, x.sum_bytes);
    memset(summed, 0, sizeof summed);
    for (g = 0; g < groups; g++) {
        const int64_t inputs = (g < groups - 1 ? units : total - g * units) * unit;
        memset(wanted, 0, sizeof wanted);
        for (t = 0; t < tokens; t++)
            for (i = 0; i < inputs; i++) {
                if (test_random() % each) continue;
                q[t * stride + g * tern__bit_words(units, unit) * 4 + i / 32 * 4 + i % 4] |=
                    (uint8_t)(1u << (i % 16 / 4 * 2 + i % 32 / 16));
                x.sum[t * groups + g]++;
                for (p = 0; p < panels; p++)
                    for (r = 0; r < TERN__ROWS; r++) {
                        int8_t trits[20];
                        tern__unpack_unit(base3 ? TERN_BASE3 : TERN_2BIT,
                                          x.d.panel + p * x.d.panel_stride + (g * units + i / unit) * 64, r, trits);
                        wanted[(p * tokens + t) * TERN__ROWS + r] += trits[i % unit];
                    }
            }
        for (i = 0; i < count; i++) {
            const float product = (float)wanted[i] * tern__load_scale(TERN_F16, x.scale,
                                                                      (i / TERN__ROWS / tokens * groups + g) * TERN__ROWS + i % TERN__ROWS);
            summed[i] = g ? summed[i] + product : product;
        }
    }
    panel = test_guard(x.d.panel, x.panel_bytes, at_end);
    bits = test_guard(q, q_bytes, at_end);
    sum = test_guard(x.sum, x.sum_bytes, at_end);
    x.d.panel = (const uint8_t *)panel;
    x.d.q = (const int8_t *)bits;
    x.d.q_stride = stride;
    x.d.sum = (const int32_t *)sum;
    x.d.acc = kernels_acc[0];
    if (!group) x.d.facc = NULL;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern__kernels *k = kernels_of(isa);
        if (!k) continue;
        memset(kernels_acc[0], 0x3C, sizeof kernels_acc[0]);
        memset(kernels_facc[0], 0x3C, sizeof kernels_facc[0]);
        k->dot_bits(&x.d, base3 ? TERN_BASE3 : TERN_2BIT);
        CHECK(memcmp(group ? (const void *)kernels_facc[0] : kernels_acc[0], group ? (const void *)summed : wanted, (size_t)count * 4) == 0,
              "%s: base3 %d, %d units in groups of %d, %d panels, %d tokens, one in %d", test_tier_name[isa], base3, (int)total, (int)group,
              (int)panels, (int)tokens, (int)each);
        for (i = count; i < KERNELS_ACC; i++)
            CHECK(kernels_acc[0][i] == 0x3C3C3C3C && tern__bits(kernels_facc[0][i]) == 0x3C3C3C3Cu,
                  "%s: written beside %d panels of %d tokens", test_tier_name[isa], (int)panels, (int)tokens);
    }
    test_unguard(panel, x.panel_bytes);
    test_unguard(bits, q_bytes);
    test_unguard(sum, x.sum_bytes);
    free(q);
    kernels_dot_free(&x);
}

static void test_kernels_bits(void)
{
    const int64_t totals[] = {1, 2, 3, 7, 23, 24, 25, 29, 30, 31, 61, 97}, groups[] = {0, 0, 1, 3, 8, 30};
    const int32_t tokens[] = {1, 2, 3, 8, 17};
    const uint32_t each[] = {1, 2, 50, 7, 1u << 20};
    int base3, u, g, n = 0;
    int32_t panels;
    for (base3 = 0; base3 < 2; base3++)
        for (u = 0; u < 12; u++)
            for (g = 0; g < 6; g++)
                for (panels = 1; panels <= TERN__PANELS; panels++, n++)
                    if (groups[g] <= totals[u])
                        kernels_bits(base3, totals[u], groups[g], panels, tokens[n % 5], each[(n + u + g) % 5], n % 2);
    for (base3 = 0; base3 < 2; base3++) {
        kernels_bits(base3, 5, 0, 2, TERN__TOKENS, 3, 1);
        kernels_bits(base3, 5, 0, 4, TERN__PAIRS / 4, 60, 0);
    }
}

/* -- epilogues -- */

static void test_kernels_emit(void)
{
    const int32_t tokens[] = {1, 2, 3, 15, 17, 63, 64};
    int n, rows, variant, i;
    for (i = 0; i < KERNELS_ACC; i++) {
        kernels_acc[0][i] = (int32_t)(test_random() % 66600000) - 33300000;
        kernels_facc[0][i] = test_float() * (i % 9 ? 1e5f : 1e-38f);
    }
    for (n = 0; n < 7; n++)
        for (rows = 1; rows <= 16; rows++)
            for (variant = 0; variant < 4; variant++) {
                const int64_t stride = rows + variant % 3 * 5, size = (tokens[n] - 1) * stride + rows;
                float *scale = test_floats(tokens[n]), *s = test_floats(17), *bias = test_floats(17), *y = test_floats(size);
                float *wanted = (float *)malloc(sizeof(float) * (size_t)size), *got = (float *)malloc(sizeof(float) * (size_t)size);
                tern__emit e;
                memset(&e, 0, sizeof e);
                if (variant & 1) e.facc = kernels_facc[0];
                else e.acc = kernels_acc[0];
                e.scale = scale;
                e.s = s + 1;
                e.bias = variant & 2 ? bias + 1 : NULL;
                e.y_stride = stride;
                e.tokens = tokens[n];
                e.rows = rows;
                scale[0] = variant ? 1e-30f : 0.0f;
                memcpy(wanted, y, sizeof(float) * (size_t)size);
                e.y = wanted;
                tern__emit_scalar(&e);
                for (i = 0; i < tokens[n] * rows; i++) { /* the definition, and nothing else is touched */
                    const int t = i / rows, r = i % rows;
                    float v = variant & 1 ? e.facc[t * 16 + r] * scale[t] : (float)e.acc[t * 16 + r] * (scale[t] * e.s[r]);
                    if (e.bias) v += e.bias[r];
                    CHECK(tern__bits(v) == tern__bits(wanted[t * stride + r]), "token %d, row %d", t, r);
                }
                for (i = 0; i < size; i++) CHECK(i % stride < rows || wanted[i] == y[i], "written beside the rows");
                KERNELS_EACH_TIER(
                    memcpy(got, y, sizeof(float) * (size_t)size);
                    e.y = got;
                    k->emit(&e);
                    CHECK(memcmp(wanted, got, sizeof(float) * (size_t)size) == 0,
                          "%s: %d tokens, %d rows, variant %d", tier, (int)tokens[n], rows, variant));
                free(scale);
                free(s);
                free(bias);
                free(y);
                free(wanted);
                free(got);
            }
}

/* -- dot products of bytes -- */

/* By definition, into rows of exactly the length that is needed, `shift` int32s off alignment. */
static void kernels_dot_i8(int64_t units, int32_t panels, int32_t tokens, int32_t add, size_t shift, int32_t extreme)
{
    const int64_t acc_row = panels * TERN__ROWS + (tokens % 3), size = (tokens - 1) * acc_row + panels * TERN__ROWS;
    int32_t *start = (int32_t *)malloc(((size_t)size + shift) * 4), *want = (int32_t *)malloc((size_t)size * 4),
            *got = (int32_t *)malloc(((size_t)size + shift) * 4);
    int32_t *sum = (int32_t *)malloc((size_t)tokens * 4);
    int8_t *q = (int8_t *)malloc((size_t)(tokens * units * 4));
    uint8_t *code = kernels_code;
    tern__dot d;
    tern_isa isa;
    int64_t t, p, r, i;
    memset(&d, 0, sizeof d);
    for (i = 0; i < size; i++) start[i] = (int32_t)(test_random() << 8 ^ test_random());
    for (i = 0; i < tokens; i++) sum[i] = (int32_t)test_random() - (1 << 23);
    for (i = 0; i < tokens * units * 4; i++) q[i] = extreme ? -128 : (int8_t)((int32_t)(test_random() % 256) - 128);
    for (i = 0; i < panels * units * 64; i++) code[i] = extreme ? 255 : (uint8_t)test_random();
    memcpy(want, start, (size_t)size * 4);
    for (p = 0; p < panels; p++)
        for (t = 0; t < tokens; t++)
            for (r = 0; r < TERN__ROWS; r++) {
                int64_t v = (add ? start[t * acc_row + p * TERN__ROWS + r] : 0) - (int64_t)sum[t];
                for (i = 0; i < units * 4; i++) v += code[p * units * 64 + i / 4 * 64 + r * 4 + i % 4] * q[t * units * 4 + i];
                want[t * acc_row + p * TERN__ROWS + r] = (int32_t)(uint32_t)(uint64_t)v;
            }
    d.panel = code; d.panel_stride = units * 64; d.units = units;
    d.q = q; d.q_stride = units * 4;
    d.sum = sum; d.sum_stride = 1;
    d.panels = panels; d.tokens = tokens;
    d.acc = got + shift;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern__kernels *k = kernels_of(isa);
        if (!k) continue;
        memcpy(got + shift, start, (size_t)size * 4);
        k->dot_i8(&d, acc_row, add);
        CHECK(memcmp(got + shift, want, (size_t)size * 4) == 0, "%s: %d units, %d panels, %d tokens, add %d, extreme %d",
              test_tier_name[isa], (int)units, (int)panels, (int)tokens, (int)add, (int)extreme);
    }
    free(start); free(want); free(got); free(sum); free(q);
}

static void test_kernels_dot_i8(void)
{
    const int64_t units[] = {1, 2, 3, 7, 8, 9, 33, 63, TERN__I8_K / 4};
    const int32_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 33, 255, 257};
    int u, t, panels, variant = 0;
    for (u = 0; u < 9; u++)
        for (t = 0; t < 16; t++)
            for (panels = 1; panels <= 4; panels++, variant++)
                if (tokens[t] < 200 || u == 1)
                    kernels_dot_i8(units[u], panels, tokens[t], (variant / 4 + variant) % 2, (size_t)variant % 5, variant % 7 == 0);
    kernels_dot_i8(TERN__I8_K / 4, 4, 13, 0, 1, 1);
}

/* -- float tiles -- */

/* A tile of each tier with m rows or more against the definition; a, strided, lies in a buffer of exactly that size.
   to_c: to rows 37 apart, and the floats between them stay. */
static void kernels_compare_tile(int64_t m, int64_t n, int64_t a_row, int64_t a_col, int32_t first, int32_t trits,
                                 int32_t to_c, int32_t add)
{
    const int64_t size = (m - 1) * a_row + (n - 1) * a_col + 1;
    float *a = test_floats(size), *start = test_floats(16 * TERN__LANES), *c = test_floats(16 * 37), want[16 * 37], got[16 * 37];
    int64_t i, j, l;
    tern_isa isa;
    for (i = 0; i < size; i++) if (i % 11 == 0) a[i] *= 1e-38f;
    for (i = 0; i < n * TERN__LANES; i++) kernels_b[i] = trits ? (float)test_trit() : test_float();
    memcpy(kernels_p[0], start, sizeof kernels_p[0]);
    memcpy(want, c, sizeof want);
    for (i = 0; i < m; i++)
        for (l = 0; l < TERN__LANES; l++) {
            float sum = first ? 0.0f : start[i * TERN__LANES + l];
            for (j = 0; j < n; j++) sum += a[i * a_row + j * a_col] * kernels_b[j * TERN__LANES + l];
            if (to_c) want[i * 37 + l] = add ? want[i * 37 + l] + sum : sum;
            else kernels_p[0][i * TERN__LANES + l] = sum;
        }
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern__kernels *k = kernels_of(isa);
        int32_t fused;
        if (!k || k->rows < m) continue;
        memset(kernels_a, 0xff, sizeof kernels_a); /* NaN */
        k->pack_a(m, n, a, a_row, a_col, kernels_a);
        for (j = 0; j < n; j++)
            for (i = 0; i < m; i++)
                CHECK(tern__bits(kernels_a[j * k->rows + i]) == tern__bits(a[i * a_row + j * a_col]),
                      "%s: pack %d x %d, strides %d and %d", test_tier_name[isa], (int)m, (int)n, (int)a_row, (int)a_col);
        for (fused = 0; fused <= trits; fused++) {
            tern__tile t;
            t.k = n; t.a = kernels_a; t.b = kernels_b;
            t.p = kernels_p[1];
            t.c = to_c ? got : NULL; t.c_row = 37;
            t.rows = (int32_t)m; t.first = first; t.add = add;
            memcpy(kernels_p[1], start, sizeof kernels_p[1]);
            memcpy(got, c, sizeof got);
            (fused ? k->tile_fused : k->tile)(&t);
            CHECK(memcmp(kernels_p[0], kernels_p[1], sizeof kernels_p[0]) == 0 && memcmp(want, got, sizeof want) == 0,
                  "%s: tile%s %d x %d, first %d, c %d, add %d", test_tier_name[isa], fused ? " of trits, fused" : "", (int)m, (int)n,
                  (int)first, (int)to_c, (int)add);
        }
    }
    free(a);
    free(start);
    free(c);
}

static void test_kernels_tile(void)
{
    const int64_t terms[] = {1, 2, 3, 15, 16, 17, 127, TERN__K_BLOCK};
    int64_t m;
    int n, variant;
    for (m = 1; m <= 14; m++)
        for (n = 0; n < 8; n++)
            for (variant = 0; variant < 4; variant++) {
                const int64_t k = terms[n];
                const int32_t first = (variant + n + (int)m) % 2, trits = (variant / 2 + n) % 2, to_c = (int32_t)(m / 2 + n + variant) % 2,
                              add = (n / 2 + variant) % 2;
                if (variant == 0) kernels_compare_tile(m, k, k, 1, first, trits, to_c, add);
                if (variant == 1) kernels_compare_tile(m, k, 1, m, first, trits, to_c, add);
                if (variant == 2) kernels_compare_tile(m, k, 3 * k + 2, 3, first, trits, to_c, add);
                if (variant == 3) kernels_compare_tile(m, k, 0, 1, first, trits, to_c, add); /* one row for all */
            }
}

/* Columns of every number of lanes, packed close and apart; what is behind the last lane of the last row is not touched. */
static void test_kernels_columns(void)
{
    float from[40 * 41], want[40 * 41], got[40 * 41];
    int64_t lanes, len, i, l;
    for (i = 0; i < 40 * 41; i++) from[i] = test_float();
    for (lanes = 1; lanes <= 32; lanes++)
        for (len = 1; len <= 20; len += 1 + len / 9)
            KERNELS_EACH_TIER(
                for (l = 0; l < 40 * 41; l++) got[l] = want[l] = -1.0f;
                for (i = 0; i < len; i++)
                    for (l = 0; l < lanes; l++) want[i * 40 + l] = from[l * 41 + i];
                k->columns(lanes, len, from, 41, got, 40);
                for (i = 0; i < len; i++)
                    CHECK(memcmp(want + i * 40, got + i * 40, (size_t)lanes * 4) == 0,
                          "%s: %d columns of %d, row %d", tier, (int)lanes, (int)len, (int)i);
                CHECK(memcmp(want + len * 40, got + len * 40, (size_t)(40 * 41 - len * 40) * 4) == 0,
                      "%s: behind %d columns of %d", tier, (int)lanes, (int)len));
}

/* Right operands: int8 of every number of lanes times scales of their rows, and units of trits. */
static void test_kernels_operands(void)
{
    int8_t q[5 * 47], want_t[16 * 64], got_t[16 * 64];
    float scale[5], want[5 * 32], got[5 * 32];
    uint8_t unit[3 * 64];
    int32_t i, lanes, units, base3;
    for (i = 0; i < 5 * 47; i++) q[i] = (int8_t)test_random();
    for (i = 0; i < 5; i++) scale[i] = test_float();
    for (lanes = 1; lanes <= 32; lanes++)
        KERNELS_EACH_TIER(
            for (i = 0; i < 5 * 32; i++) want[i] = got[i] = i % 32 < lanes ? (float)q[i / 32 * 47 + i % 32] * scale[i / 32] : 7.0f;
            for (i = 0; i < 5 * 32; i++) if (i % 32 < lanes) got[i] = 0.5f;
            k->scaled(5, lanes, q, 47, scale, got);
            CHECK(memcmp(want, got, sizeof want) == 0, "%s: %d lanes of int8", tier, (int)lanes));
    for (base3 = 0; base3 < 2; base3++)
        for (units = 1; units <= 3; units++) {
            const int32_t inputs = base3 ? 20 : 16;
            for (i = 0; i < 3 * 64; i++)
                unit[i] = (uint8_t)(base3 ? test_random() % 243 : (test_random() % 3) | (test_random() % 3) << 2 | (test_random() % 3) << 4
                                    | (test_random() % 3) << 6);
            for (i = 0; i < 16 * units; i++)
                tern__unpack_unit(base3 ? TERN_BASE3 : TERN_2BIT, unit + i % units * 64, i / units,
                                  want_t + i / units * 64 + i % units * inputs);
            KERNELS_EACH_TIER(
                k->trits(base3, units, unit, got_t);
                for (i = 0; i < 16; i++)
                    CHECK(memcmp(want_t + i * 64, got_t + i * 64, (size_t)(units * inputs)) == 0,
                          "%s: row %d of %d units, base %d", tier, (int)i, (int)units, base3 ? 3 : 2));
        }
}

/* -- pairs of bf16 -- */

enum { KERNELS_PAIR_ROWS = 80, KERNELS_PAIR_TERMS = 2 * TERN__K_BLOCK };
static float kernels_pair_a[KERNELS_PAIR_ROWS * KERNELS_PAIR_TERMS / 2] TERN__ALIGN64,
             kernels_pair_b[KERNELS_PAIR_TERMS * TERN__LANES / 2] TERN__ALIGN64,
             kernels_pair_p[KERNELS_PAIR_ROWS * TERN__LANES] TERN__ALIGN64;

static uint16_t kernels_half(const float *words, int64_t i)
{
    uint16_t half;
    memcpy(&half, (const unsigned char *)words + 2 * i, 2);
    return half;
}

static int kernels_same_bf16(uint16_t got, float x)
{
    if (x != x) return (got & 0x7FFF) > 0x7F80;
    return x == 0.0f ? (got & 0x7FFF) == 0 : got == tern__to_bf16(x);
}

/* Both sides as they are packed, each half a value by tern__to_bf16 or zero; then tiles beside float64 of these halves. */
static void kernels_compare_pairs(const tern__pairs *k, int64_t m, int64_t n, int64_t a_row, int64_t a_col, int special, int32_t first,
                                  int32_t to_c, int32_t add)
{
    static const uint32_t specials[] = {0x7FC00000u, 0x7F800001u, 0xFF800000u, 0x3F808000u, 0x3F818000u, 0xBF808001u, 0x3F807FFFu,
                                        0x00012345u, 0x7FFFFFFFu, 0x80000000u};
    const int64_t steps = (n + 31) / 32, size = (m - 1) * a_row + (n - 1) * a_col + 1, padded = (m + 15) / 16 * 16;
    float *a = test_floats(size), *b = test_floats(n * TERN__LANES), *scale = test_floats(n), *start = test_floats(padded * TERN__LANES),
          *c = test_floats(m * 37), *before = test_floats(m * 37);
    int64_t i, j, l, wrong = 0;
    tern__tile t;
    for (i = 0; special && i < size; i += 3) memcpy(&a[i], &specials[i / 3 % 10], 4);
    for (i = 0; special && i < n * TERN__LANES; i += 5) memcpy(&b[i], &specials[i / 5 % 10], 4);
    for (j = 0; j < n; j++) if (special || j % 3) scale[j] = 1.0f;
    memset(kernels_pair_a, 0xEE, sizeof kernels_pair_a);
    memset(kernels_pair_b, 0xEE, sizeof kernels_pair_b);
    for (i = 0; i < m; i += 16) k->pack_a(tern__min(16, m - i), n, a + i * a_row, a_row, a_col, scale, kernels_pair_a + i * steps * 16);
    for (j = 0; j < n; j += 32) k->pack_b(tern__min(32, n - j), b + j * TERN__LANES, kernels_pair_b + j * 16);
    for (i = 0; i < padded; i++)
        for (j = 0; j < 32 * steps; j++)
            wrong += !kernels_same_bf16(kernels_half(kernels_pair_a, (i / 16 * steps + j / 32) * 512 + i % 16 * 32 + j % 32),
                                        i < m && j < n ? a[i * a_row + j * a_col] * scale[j] : 0.0f);
    CHECK(wrong == 0, "%d of a, %d x %d, strides %d and %d, special %d", (int)wrong, (int)m, (int)n, (int)a_row, (int)a_col, special);
    for (wrong = 0, j = 0; j < 32 * steps; j++)
        for (l = 0; l < TERN__LANES; l++)
            wrong += !kernels_same_bf16(kernels_half(kernels_pair_b, (j / 2 * 32 + l) * 2 + j % 2), j < n ? b[j * TERN__LANES + l] : 0.0f);
    CHECK(wrong == 0, "%d of b, %d terms, special %d", (int)wrong, (int)n, special);
    memcpy(kernels_pair_p, start, sizeof(float) * (size_t)(padded * TERN__LANES));
    memcpy(before, c, sizeof(float) * (size_t)(m * 37));
    t.k = n; t.a = kernels_pair_a; t.b = kernels_pair_b;
    t.p = kernels_pair_p;
    t.c = to_c ? c : NULL; t.c_row = 37;
    t.rows = (int32_t)m; t.first = first; t.add = add;
    if (!special) k->tiles(&t);
    for (i = 0; !special && i < m; i++)
        for (l = 0; l < 37; l++) {
            const double from = !to_c ? 0.0 : add ? (double)before[i * 37 + l] : 0.0;
            double sum = l < 32 && !first ? (double)start[i * 32 + l] : 0.0, bound = fabs(sum) + fabs(from);
            for (j = 0; l < 32 && j < n; j++) {
                const double product = (double)tern__from_bf16(tern__to_bf16(a[i * a_row + j * a_col] * scale[j]))
                                       * (double)tern__from_bf16(tern__to_bf16(b[j * 32 + l]));
                sum += product;
                bound += fabs(product);
            }
            if (l < 32)
                CHECK(fabs((double)(to_c ? c[i * 37 + l] : kernels_pair_p[i * 32 + l]) - sum - from) <= bound * (double)(20 + steps) * 6e-8,
                      "%d x %d, first %d, c %d, add %d: [%d][%d]", (int)m, (int)n, (int)first, (int)to_c, (int)add, (int)i, (int)l);
            if (l >= 32 || !to_c) CHECK(memcmp(&c[i * 37 + l], &before[i * 37 + l], 4) == 0, "c was written: [%d][%d]", (int)i, (int)l);
        }
#ifdef TEST_AMX
    CHECK(!amx.configured, "tiles are still in use");
#endif
    free(a); free(b); free(scale); free(start); free(c); free(before);
}

static void kernels_pairs(const tern__pairs *k)
{
    const int64_t rows[] = {1, 15, 16, 17, 33, 80}, terms[] = {1, 2, 15, 31, 32, 33, 127, KERNELS_PAIR_TERMS};
    int m, n, variant;
    for (m = 0; m < 6; m++)
        for (n = 0; n < 8; n++)
            for (variant = 0; variant < 3; variant++) {
                const int64_t i = rows[m], j = terms[n];
                const int special = (m + n + variant) % 4 == 0, first = (m + n) % 2, to_c = (m / 2 + n + variant) % 2,
                          add = (n / 2 + variant) % 2;
                if (i * j > 17 * KERNELS_PAIR_TERMS) continue;
                kernels_compare_pairs(k, i, j, variant ? 1 : j, variant ? i + variant - 1 : 1, special, first, to_c, add);
                kernels_compare_pairs(k, i, j, 3 * j + 2, 3, special, !first, !to_c, add);
            }
}

/* The software of the pairs' product against the machine's. */
#if defined(TERN__WITH_AVX512_BF16) && !defined(TEST_AMX)
static TERN__AVX512 void kernels_pair_dot(float *sum, const uint8_t *a, const uint8_t *b)
{
    __m512 s = _mm512_loadu_ps(sum);
    TERN__PAIR_DOT(s, _mm512_loadu_si512(a), _mm512_loadu_si512(b));
    _mm512_storeu_ps(sum, s);
}
static void test_kernels_pair_unit(void)
{
    int round, i;
    if (!test_tier(TERN_ISA_AVX512_VBMI) || !tern__cpu_has_pairs(TERN_ISA_AVX512_VBMI)) {
        printf("  skipped: no AVX512-BF16 here\n");
        return;
    }
    for (round = 0; round < 2000; round++) {
        uint16_t a[32], b[32];
        float soft[16], hard[16];
        for (i = 0; i < 32; i++) {
            a[i] = tern__to_bf16(test_float() * (round % 3 ? 1.0f : i % 4 ? 1e-20f : 1e-38f)); /* denormals, of results too */
            b[i] = tern__to_bf16(test_float() * (round % 5 ? 1.0f : 1e-19f));
        }
        for (i = 0; i < 16; i++) soft[i] = hard[i] = test_float() * (round % 4 == 0 ? 0.0f : round % 4 == 1 ? 1e-38f : 1.0f);
        amx_words(soft, a, b);
        kernels_pair_dot(hard, (const uint8_t *)a, (const uint8_t *)b);
        CHECK(memcmp(soft, hard, sizeof soft) == 0, "round %d: %.9g, by the machine %.9g", round, (double)soft[0], (double)hard[0]);
    }
}
#endif

static void test_kernels_pairs(void)
{
    int ran = 0;
    KERNELS_EACH_TIER((void)tier; if (k->pairs) kernels_pairs(k->pairs); ran += k->pairs != NULL);
#ifdef TEST_AMX
    if (test_tier(TERN_ISA_AMX_INT8)) kernels_pairs(&tern__pairs_avx512);
#endif
    if (!ran) printf("  skipped: no products of bf16 here\n");
}

/* One rounding or two: a fused tile is within the rounding of the products. */
static void test_kernels_tile_fused_is_close(void)
{
    float *a = test_floats(4 * 100);
    int64_t i, j, l;
    tern_isa isa;
    for (i = 0; i < 100 * TERN__LANES; i++) kernels_b[i] = test_float();
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++) {
        const tern__kernels *k = kernels_of(isa);
        tern__tile t;
        if (!k) continue;
        memset(&t, 0, sizeof t);
        t.k = 100; t.a = kernels_a; t.b = kernels_b;
        t.p = kernels_p[0];
        t.rows = 4; t.first = 1;
        k->pack_a(4, 100, a, 100, 1, kernels_a);
        k->tile_fused(&t);
        for (i = 0; i < 4; i++)
            for (l = 0; l < TERN__LANES; l++) {
                double sum = 0, size = 0;
                for (j = 0; j < 100; j++) {
                    const double product = (double)a[i * 100 + j] * (double)kernels_b[j * TERN__LANES + l];
                    sum += product;
                    size += fabs(product);
                }
                CHECK(fabs(sum - (double)kernels_p[0][i * TERN__LANES + l]) < size * 100 * 6e-8,
                      "%s: row %d, lane %d", test_tier_name[isa], (int)i, (int)l);
            }
    }
    free(a);
}

/* -- float activations -- */

enum { KERNELS_P = TERN__FEW * TERN__STRIP };
static float kernels_sums[2][KERNELS_P];

/* By definition on the scalar tier, then tier by tier; packed units and x in buffers of exactly their size. */
static void kernels_compare_floats(int base3, int32_t panels, int32_t tokens, int64_t from, int64_t inputs, int32_t first, size_t shift)
{
    const int64_t unit = base3 ? 20 : 16, units = (from + inputs + unit - 1) / unit;
    kernels_dot packed = kernels_dot_new(base3, units, panels, 1, 1, shift, KERNELS_RANDOM);
    float *x = test_floats(inputs * tokens), *start = test_floats(KERNELS_P);
    tern__float_dot f;
    int64_t t, r, i;
    for (i = 0; i < inputs * tokens; i++) if (i % 11 == 0) x[i] *= 1e-38f;
    memset(&f, 0, sizeof f);
    f.panel = packed.d.panel;
    f.panel_stride = packed.d.panel_stride;
    f.from = from;
    f.inputs = inputs;
    f.x = x;
    f.p = kernels_sums[0];
    f.base3 = base3;
    f.panels = panels;
    f.tokens = tokens;
    f.first = first;
    memcpy(kernels_sums[0], start, sizeof kernels_sums[0]);
    tern__floats_scalar(&f);
    for (r = 0; r < TERN__STRIP; r++) {
        int8_t trits[20];
        for (t = 0; t < tokens; t++) {
            float sum = start[t * TERN__STRIP + r];
            if (first && r < panels * 16) sum = 0.0f;
            for (i = from; r < panels * 16 && i < from + inputs; i++) {
                tern__unpack_unit(base3 ? TERN_BASE3 : TERN_2BIT, f.panel + (r / 16 * units + i / unit) * 64, r % 16, trits);
                sum += x[(i - from) * tokens + t] * (float)trits[i % unit];
            }
            CHECK(tern__bits(sum) == tern__bits(kernels_sums[0][t * TERN__STRIP + r]), "base3 %d: token %d, row %d", base3, (int)t, (int)r);
        }
    }
    f.p = kernels_sums[1];
    KERNELS_EACH_TIER(
        int32_t wrong = 0;
        memcpy(kernels_sums[1], start, sizeof kernels_sums[1]);
        k->floats(&f);
        for (i = 0; i < KERNELS_P; i++) /* the panel behind an odd number of them is spoil */
            if (i / TERN__STRIP >= tokens || i % TERN__STRIP / 16 != panels || panels % 2 == 0)
                wrong += tern__bits(kernels_sums[0][i]) != tern__bits(kernels_sums[1][i]);
        CHECK(wrong == 0, "%s: base3 %d, %d panels, %d tokens, inputs %d + %d, first %d: %d", tier, base3, (int)panels, (int)tokens,
              (int)from, (int)inputs, (int)first, (int)wrong));
    kernels_dot_free(&packed);
    free(x);
    free(start);
}

static void test_kernels_floats(void)
{
    const int64_t inputs[] = {4, 16, 20, 36, 160, 240, 656};
    int32_t panels, tokens;
    int base3, n = 0;
    for (base3 = 0; base3 < 2; base3++)
        for (panels = 1; panels <= 9; panels++)
            for (tokens = 1; tokens <= TERN__FEW; tokens++, n++)
                kernels_compare_floats(base3, panels, tokens, n % 5 * 4 * (n % 3), inputs[n % 7], n % 2, (size_t)n % 4);
    for (base3 = 0; base3 < 2; base3++) {
        kernels_compare_floats(base3, TERN__STRIP / 16, TERN__FEW, 0, 64, 1, 0);
        kernels_compare_floats(base3, 8, 1, 2048, TERN__SEGMENT, 0, 1);
        kernels_compare_floats(base3, 17, 2, 2048, 80, 1, 3);
    }
}

/* -- rows: sums, largest value, rounding -- */

static void test_kernels_sum(void)
{
    int64_t n;
    int kind, i;
    for (n = 0; n <= TERN__BLOCK; n++) {
        float *x = test_floats(n + 1);
        for (i = 0; i < n; i++) if (i % 13 == 0) x[1 + i] *= i % 2 ? 1e20f : 1e-42f;
        for (kind = TERN_SUM; kind <= TERN_SUM_SQUARES; kind++) {
            const uint32_t wanted = tern__bits(tern__sum_scalar(kind, n, x + 1));
            KERNELS_EACH_TIER(CHECK(tern__bits(k->sum(kind, n, x + 1)) == wanted, "%s: kind %d of %d floats", tier, kind, (int)n));
        }
        free(x);
    }
}

/* Above a bound, where some floats are, above zero, and of all. Some counts are there before. */
static void test_kernels_sum_above(void)
{
    const float deltas[] = {-1.0f, 0.0f, 0.40625f};
    int64_t n, i;
    int type, d;
    for (n = 0; n <= TERN__BLOCK; n++)
        for (type = 0; type < 2; type++)
            for (d = 0; d < 3; d++) {
                const tern_type of = type ? TERN_BF16 : TERN_F32;
                float *x = test_floats(n + 1), *kept = test_floats(n + 1), wanted;
                void *stored = malloc((size_t)(n + 1) * 4);
                int64_t before = n * 3000000000, count = before, above = 0;
                for (i = 0; i < n; i++) {
                    float v = i % 7 == 0 ? (i & 1 ? -deltas[d] : deltas[d]) : x[i];
                    tern__store_float(of, stored, i, v);
                    v = tern__load_float(of, stored, i);
                    kept[i] = fabsf(v) > deltas[d] ? v : 0.0f;
                    above += fabsf(v) > deltas[d];
                }
                wanted = tern__sum_scalar(TERN_SUM_ABS, n, kept);
                CHECK(tern__sum_above_scalar(of, n, stored, NULL, deltas[d], &count) == wanted && count == before + above,
                      "%d floats", (int)n);
                KERNELS_EACH_TIER(
                    const uint8_t *ask = n % 3 ? (const uint8_t *)stored : NULL;
                    count = before;
                    CHECK(tern__bits(k->sum_above(of, n, stored, ask, deltas[d], &count)) == tern__bits(wanted), "%s: %d of type %d",
                          tier, (int)n, (int)of);
                    CHECK(count == before + above, "%s: %d above %g of %d", tier, (int)(count - before), (double)deltas[d], (int)n));
                if (d == 0 && n > 0) { /* among all, a NaN is seen */
                    tern__store_float(of, stored, n / 2, NAN);
                    CHECK(isnan(tern__sum_above_scalar(of, n, stored, NULL, -1.0f, &count)), "%d floats", (int)n);
                    KERNELS_EACH_TIER(CHECK(isnan(k->sum_above(of, n, stored, NULL, -1.0f, &count)), "%s: %d of type %d", tier,
                                            (int)n, (int)of));
                }
                free(stored);
                free(kept);
                free(x);
            }
}

static void test_kernels_absmax(void)
{
    const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130, 1025, 4097};
    const float special[] = {0.5f, -0.0f, 3e38f, -1e-45f, INFINITY, -INFINITY, NAN};
    int n, s, place, gained;
    for (n = 0; n < 19; n++)
        for (s = 0; s < 7; s++)
            for (place = 0; place < 3; place++)
                for (gained = 0; gained < 2; gained++) {
                    const int64_t size = sizes[n], at = place == 0 ? 0 : place == 1 ? size / 2 : size - 1;
                    float *x = test_floats(size + 1), *gain = test_floats(size + 1), *g = gained ? gain + 1 : NULL;
                    uint32_t wanted;
                    int64_t i;
                    for (i = 0; s == 3 && i < size; i++) x[1 + i] = 0.0f; /* so that the subnormal is the largest */
                    if (size > 0) x[1 + at] = special[s];
                    wanted = tern__absmax_scalar(size, x + 1, g);
                    if (size > 0 && s >= 4) CHECK(!tern__finite(tern__float(wanted)), "%g must win", (double)special[s]);
                    KERNELS_EACH_TIER(
                        const uint32_t got = k->absmax(size, x + 1, g);
                        CHECK(got == wanted || (got > 0x7F800000u && wanted > 0x7F800000u),
                              "%s: %g among %d: %08x, not %08x", tier, (double)special[s], (int)size, (unsigned)got, (unsigned)wanted));
                    free(x);
                    free(gain);
                }
}

/* The first of all may be NaN, then it stays; another is passed over. */
static void test_kernels_softmax(void)
{
    int64_t n, i;
    int variant;
    for (n = 1; n <= 150; n++)
        for (variant = 0; variant < 4; variant++) {
            float *x = test_floats(n), *y = test_floats(n), *wanted = test_floats(n), largest;
            for (i = 0; i < n; i++) x[i] = variant == 1 ? -1.0f - 100.0f * fabsf(x[i]) : 60.0f * x[i];
            if (variant == 2) x[n / 2] = NAN;
            if (variant == 3) x[0] = NAN;
            for (largest = x[0], i = 1; i < n; i++) if (x[i] > largest) largest = x[i];
            CHECK(tern__bits(tern__largest_scalar(n, x)) == tern__bits(largest), "variant %d of %d", variant, (int)n);
            for (i = 0; i < n; i++) wanted[i] = tern__exp(x[i] * 0.25f - largest * 0.25f);
            tern__exps_scalar(n, x, 0.25f, largest * 0.25f, y);
            CHECK(memcmp(y, wanted, (size_t)n * 4) == 0, "variant %d of %d", variant, (int)n);
            KERNELS_EACH_TIER(
                CHECK(tern__bits(k->largest(n, x)) == tern__bits(largest), "%s: variant %d of %d", tier, variant, (int)n);
                memcpy(y, x, (size_t)n * 4);
                k->exps(n, y, 0.25f, largest * 0.25f, y);
                CHECK(memcmp(y, wanted, (size_t)n * 4) == 0, "%s: variant %d of %d", tier, variant, (int)n));
            free(x);
            free(y);
            free(wanted);
        }
}

static void test_kernels_round(void)
{
    const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 130, 1025, 4097};
    int n, variant;
    for (n = 0; n < 21; n++)
        for (variant = 0; variant < 8; variant++) {
            const int64_t size = sizes[n];
            const int32_t most = variant & 4 ? 7 : 127;
            float *x = test_floats(size + 1), *gain = test_floats(size + 1), *g = variant & 1 ? gain + 1 : NULL;
            int8_t *wanted = (int8_t *)malloc((size_t)size + 1), *got = (int8_t *)malloc((size_t)size + 1);
            const float inverse = variant & 2 ? 1.0f : 127.0f;
            int32_t sum;
            int64_t i;
            for (i = 0; i <= size; i++) if (variant & 2) x[i] = (float)(i % 254 - 127) + 0.5f; /* ties */
            sum = tern__round_scalar(size, x + 1, g, inverse, most, wanted + 1);
            for (i = 0; i < size; i++) {
                const float v = rintf((g ? x[1 + i] * g[i] : x[1 + i]) * inverse);
                CHECK(wanted[1 + i] == (int8_t)fmaxf(fminf(v, (float)most), (float)(-most - 1)), "element %d of %d", (int)i, (int)size);
            }
            for (i = 0; i < size; i++) sum -= wanted[1 + i];
            CHECK(sum == 0, "the sum of %d rounded floats is off by %d", (int)size, (int)sum);
            KERNELS_EACH_TIER(
                sum = k->round(size, x + 1, g, inverse, most, got + 1);
                CHECK(memcmp(wanted + 1, got + 1, (size_t)size) == 0, "%s: %d floats, variant %d", tier, (int)size, variant);
                for (i = 0; i < size; i++) sum -= got[1 + i];
                CHECK(sum == 0, "%s: the sum of %d rounded floats is off by %d", tier, (int)size, (int)sum));
            free(x);
            free(gain);
            free(wanted);
            free(got);
        }
}

/* -- weights in training -- */

/* Every f16 and bf16 but the NaNs of f16, whose payloads may change. */
static void test_kernels_widen(void)
{
    enum { ALL = 65536 };
    static uint16_t from[ALL];
    static float wanted[ALL], got[ALL];
    int type, n, i;
    for (type = 0; type < 2; type++) {
        const tern_type of = type ? TERN_BF16 : TERN_F16;
        for (i = 0; i < ALL; i++) from[i] = (uint16_t)(!type && (i & 0x7C00) == 0x7C00 && (i & 0x3FF) ? 0 : i);
        tern__widen_scalar(of, ALL, from, wanted);
        KERNELS_EACH_TIER(
            k->widen(of, ALL, from, got);
            CHECK(memcmp(wanted, got, sizeof got) == 0, "%s: type %d", tier, (int)of);
            for (n = 1; n < 130; n += n % 16 == 1 ? 14 : 1) {
                memset(got, 0x3C, sizeof got);
                k->widen(of, n, from + 0x3C01, got);
                CHECK(memcmp(wanted + 0x3C01, got, (size_t)n * 4) == 0 && tern__bits(got[n]) == 0x3C3C3C3C,
                      "%s: %d of type %d", tier, n, (int)of);
            });
    }
}

static void kernels_pack(const tern__kernels *k, int base3, tern_type type, int64_t n, const void *x, int64_t stride, int64_t rows,
                         const float *threshold, uint8_t *unit)
{
    tern__packing p;
    p.type = type; p.x = x;
    p.n = n; p.rows = rows; p.stride = stride;
    p.threshold = threshold;
    p.unit = unit;
    p.ask = (const uint8_t *)x; p.halves = (int32_t)(rows % 3);
    p.base3 = base3;
    k->ternarize(&p);
}

/* Buffers of exactly what is needed; weights at their thresholds, zeros of both signs, and thresholds that are zero. */
static void test_kernels_ternarize(void)
{
    static const int64_t sizes[] = {1, 4, 15, 16, 17, 19, 20, 21, 31, 33, 52, 127, 144, 172, 320, 4097}, heights[] = {1, 3, 15, 16};
    int n, h, way;
    for (n = 0; n < 16; n++)
        for (h = 0; h < 4; h++)
            for (way = 0; way < 4; way++) {
                const int base3 = way & 1;
                const tern_type type = way & 2 ? TERN_BF16 : TERN_F32;
                const int64_t size = sizes[n], rows = heights[h], stride = size + 3 * (n % 3);
                const size_t bytes = (size_t)((size + (base3 ? 19 : 15)) / (base3 ? 20 : 16)) * TERN__UNIT;
                uint8_t *wanted = (uint8_t *)malloc(bytes), *got = (uint8_t *)malloc(bytes);
                float *x = test_floats((rows - 1) * stride + size), threshold[TERN__ROWS];
                void *stored;
                int64_t r, i;
                int zeros = 0;
                for (r = 0; r < TERN__ROWS; r++) /* the fourth threshold lies between two of bf16 */
                    threshold[r] = r >= rows ? FLT_MAX : r % 5 == 2 ? 0.0f : r % 5 == 3 ? 0.40699f : 0.40625f;
                for (r = 0; r < rows; r++)
                    for (i = 0; i < size; i++) {
                        float *v = &x[r * stride + i];
                        if ((r + i) % 7 == 0) *v = i & 1 ? threshold[r] : -threshold[r];
                        if ((r + i) % 7 == 1) *v = i & 1 ? 1e-45f : -1e-45f;
                        if ((r + i) % 7 == 2) *v = i & 1 ? 9e28f : -9e28f;
                    }
                stored = malloc((size_t)((rows - 1) * stride + size) * (type == TERN_BF16 ? 2 : 4));
                for (i = 0; i < (rows - 1) * stride + size; i++) {
                    tern__store_float(type, stored, i, x[i]);
                    x[i] = tern__load_float(type, stored, i);
                }
                kernels_pack(&tern__kernels_scalar, base3, type, size, stored, stride, rows, threshold, wanted);
                for (i = 0; i < size; i++) {
                    int8_t t[20];
                    tern__unpack_unit(base3 ? TERN_BASE3 : TERN_2BIT, wanted + i / (base3 ? 20 : 16) * TERN__UNIT, 0, t);
                    CHECK(t[i % (base3 ? 20 : 16)] == (fabsf(x[i]) > threshold[0] ? x[i] > 0 ? 1 : -1 : 0),
                          "trit %d of %d", (int)i, (int)size);
                    zeros += t[i % (base3 ? 20 : 16)] == 0;
                }
                CHECK(zeros > 0, "no zeros");
                KERNELS_EACH_TIER(
                    memset(got, 0x3C, bytes);
                    kernels_pack(k, base3, type, size, stored, stride, rows, threshold, got);
                    CHECK(memcmp(wanted, got, bytes) == 0,
                          "%s: %d rows of %d, base3 %d, type %d", tier, (int)rows, (int)size, base3, (int)type));
                free(stored);
                free(wanted);
                free(got);
                free(x);
            }
}

#ifndef TERNARY_NO_TRAINING
typedef struct kernels_weights { float w[4100], grad[4100], moment1[4100], moment2[4100]; } kernels_weights;

static void kernels_optimize(const tern__kernels *k, tern_optimize_args a, kernels_weights *s, int64_t begin, int64_t end)
{
    tern__optimize_work work;
    a.w = s->w;
    a.grad = s->grad;
    a.moment1 = a.moment1 ? s->moment1 : NULL;
    a.moment2 = s->moment2;
    work.a = &a;
    work.factor = 0.7f;
    work.correct1 = 5.3f;
    work.correct2 = 50.3f;
    k->optimize(&work, begin, end);
}

/* Every kind, type of weights and of moments, and rounding to nearest, with ties. Some weights in bf16 end as infinities, some
   would but for the bound on the carry. Seed, step and stream have their high bits set. */
static void test_kernels_optimize(void)
{
    static const int64_t sizes[] = {0, 1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 127, 4097}, starts[] = {0, 4, 20};
    static kernels_weights first, wanted, got;
    int n, b, variant, i;
    for (variant = 0; variant < 24; variant++) {
        const int kind = variant / 2 % 3, nearest = variant >= 12, last = variant % 12 % 6 == 5;
        const tern_type type = variant % 2 ? TERN_BF16 : TERN_F32, narrow = variant / 6 % 2 ? TERN_BF16 : TERN_F32;
        tern_optimize_args a = TERN_ZERO;
        a.kind = kind == 0 ? TERN_ADAMW : TERN_SGD;
        a.type = type;
        a.moment_type = narrow;
        a.nearest = nearest;
        a.moment1 = kind < 2 ? first.moment1 : NULL;
        a.rate = 0.3f; a.beta1 = 0.9f; a.beta2 = 0.98f; a.eps = 1e-6f; a.decay = kind < 2 ? 0.1f : 0.0f;
        if (nearest && kind == 1) { a.rate = a.beta1 = 0.5f; a.decay = 0.0f; } /* exact */
        a.seed = UINT64_C(0xFEDCBA9876543210); a.step = 0x89ABCDEF; a.stream = 0xF0E1D2C3;
        for (i = 0; i < 4100; i++) {
            const int tie = nearest && kind == 1 && i % 9 == 7; /* 1 + 2^-8 and 1 + 3 * 2^-8 */
            const float w = tie ? (i & 1 ? 1.0078125f : 1.0f) : i % 9 == 4 && kind == 2 ? 3.38e38f : test_float();
            first.grad[i] = i % 9 == 4 ? (i & 1 ? -4e36f : -3e38f) * (float)(kind == 2) : i % 9 == 5 || tie ? 0.0f : test_float();
            tern__store_float(narrow, first.moment1, i, tie ? -0.015625f : test_float());
            tern__store_float(narrow, first.moment2, i, i % 9 == 6 ? 0.0f : fabsf(test_float()));
            tern__store_float(type, first.w, i, w);
        }
        for (n = 0; n < 13; n++)
            for (b = 0; b < 3; b++) {
                const int64_t begin = starts[b], end = tern__min(begin + sizes[n], 4100);
                wanted = first;
                kernels_optimize(&tern__kernels_scalar, a, &wanted, begin, end);
                if (sizes[n]) CHECK(memcmp(&wanted, &first, sizeof first) != 0 && wanted.grad[begin] == 0.0f, "nothing happened");
                KERNELS_EACH_TIER(
                    got = first;
                    kernels_optimize(k, a, &got, begin, end);
                    CHECK(memcmp(&wanted, &got, sizeof got) == 0, "%s: variant %d, weights %d to %d", tier, variant, (int)begin, (int)end));
            }
        if (last) { /* both did occur */
            int infinite = 0, bounded = 0;
            for (i = 4; i < 4096; i++) {
                infinite += ((uint16_t *)(void *)wanted.w)[i] == 0x7F80;
                bounded += ((uint16_t *)(void *)wanted.w)[i] == 0x7F7F;
            }
            CHECK(infinite > 0 && bounded > 0, "%d infinities, %d at the bound", infinite, bounded);
        }
    }
}
#endif

static void suite_kernels(void)
{
    RUN_ALONE(test_kernels_dot_by_definition);
    RUN_ALONE(test_kernels_dot_shapes);
    RUN_ALONE(test_kernels_dot_blocks);
    RUN_ALONE(test_kernels_dot_touches_no_more);
#if defined(TERN__WITH_AMX_INT8) && !defined(TEST_AMX)
    RUN_ALONE(test_kernels_tile_unit);
#endif
    RUN_ALONE(test_kernels_dot_extremes);
    RUN_ALONE(test_kernels_groups);
    RUN_ALONE(test_kernels_dot_i8);
    RUN_ALONE(test_kernels_bits);
    RUN_ALONE(test_kernels_emit);
    RUN_ALONE(test_kernels_tile);
    RUN_ALONE(test_kernels_columns);
    RUN_ALONE(test_kernels_operands);
    RUN_ALONE(test_kernels_pairs);
#if defined(TERN__WITH_AVX512_BF16) && !defined(TEST_AMX)
    RUN_ALONE(test_kernels_pair_unit);
#endif
    RUN_ALONE(test_kernels_tile_fused_is_close);
    RUN_ALONE(test_kernels_floats);
    RUN_ALONE(test_kernels_sum);
    RUN_ALONE(test_kernels_sum_above);
    RUN_ALONE(test_kernels_absmax);
    RUN_ALONE(test_kernels_softmax);
    RUN_ALONE(test_kernels_round);
    RUN_ALONE(test_kernels_widen);
    RUN_ALONE(test_kernels_ternarize);
#ifndef TERNARY_NO_TRAINING
    RUN_ALONE(test_kernels_optimize);
#endif
}
