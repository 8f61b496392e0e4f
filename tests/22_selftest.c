/* Room 22, self-test: it passes on every tier with any number of threads, and names a broken operation. */

static void test_selftest_passes(void)
{
    int isa, threads;
    for (isa = TERN_ISA_SCALAR; isa < TERN__ISA_END; isa++)
        for (threads = 1; threads < 4 && test_tier((tern_isa)isa); threads++) {
            test_context t = test_open((tern_isa)isa, threads);
            if (t.c) CHECK_OK(t.c, tern_selftest(t.c));
            test_close(&t);
        }
    CHECK(tern_selftest(NULL) == TERN_E_ARGUMENT, "no context");
}

/* Each of these does its operation and then turns the last bit of one float of the output. */
static void turn_bit(void *floats) { *(unsigned char *)floats ^= 1; }
#define BROKEN(op, output)                                                                 \
    static tern_result broken_##op(tern_run *r, const tern_##op##_args *a)                 \
    {                                                                                      \
        tern_result result = tern_cpu_backend(TERN_ISA_SCALAR)->op(r, a);                  \
        turn_bit(output);                                                                  \
        return result;                                                                     \
    }
BROKEN(fill, a->x + 3)
BROKEN(cast, a->dst)
BROKEN(ternarize, a->m.scales)
BROKEN(quantize, a->scale + 1)
BROKEN(matmul, a->y + 5)
BROKEN(dense_i8, a->c + 7 + a->add) /* twice the same bit might cancel */
BROKEN(map, a->y + 1)
BROKEN(norm, a->y + 100)
BROKEN(hadamard, a->y + 64 + a->inverse)
BROKEN(rope, a->x + 65)
BROKEN(attention, a->y + 9)
BROKEN(loss, a->losses + 2)

/* One that is wrong for int4 alone. */
static tern_result broken_int4(tern_run *r, const tern_matmul_args *a)
{
    tern_result result = tern_cpu_backend(TERN_ISA_SCALAR)->matmul(r, a);
    if (a->q && a->act == TERN_ACT_INT4) turn_bit(a->y + 5);
    return result;
}

static void test_selftest_fails(void)
{
#define TRY(op, text) TRY_AS(op, op, text)
#define TRY_AS(op, name, text)                                                             \
    {                                                                                      \
        tern_backend broken = *tern_cpu_backend(TERN_ISA_BEST);                            \
        tern_context_desc d = TERN_ZERO;                                                   \
        tern_context *c;                                                                   \
        broken.op = broken_##name;                                                         \
        d.backend = &broken;                                                               \
        d.allocator.alloc = test_malloc;                                                   \
        d.allocator.free = test_free;                                                      \
        CHECK(tern_open(&c, &d, NULL) == TERN_OK, "cannot open");                          \
        CHECK_FAILS(c, tern_selftest(c), TERN_E_SELFTEST, "selftest: " text " does not");  \
        tern_close(c);                                                                     \
    }
    TRY(fill, "fill") TRY(cast, "cast") TRY(ternarize, "ternarize") TRY(quantize, "quantize") TRY(matmul, "int8 matmul")
    TRY(dense_i8, "int8 product") TRY(map, "map") TRY(norm, "norm") TRY(rope, "rope") TRY(attention, "attention") TRY(loss, "loss")
    TRY(hadamard, "hadamard") TRY_AS(matmul, int4, "int4 matmul")
#undef TRY_AS
#undef TRY
}

/* A failure on the way comes back as it is, and nothing leaks. */
static void test_selftest_errors(void)
{
    tern_backend lacking = *tern_cpu_backend(TERN_ISA_SCALAR);
    tern_context_desc d = TERN_ZERO;
    tern_context *c;
    d.allocator.alloc = test_malloc;
    d.allocator.free = test_free;
    d.backend = &lacking;
    CHECK(tern_open(&c, &d, NULL) == TERN_OK, "cannot open");
    lacking.rope = NULL;
    CHECK_FAILS(c, tern_selftest(c), TERN_E_UNSUPPORTED, "rope");
    test_fail_at = test_allocations;
    CHECK_FAILS(c, tern_selftest(c), TERN_E_MEMORY, "selftest: no memory");
    test_fail_at = -1;
    tern_close(c);
}

static void suite_selftest(void)
{
    RUN(test_selftest_passes);
    RUN(test_selftest_fails);
    RUN(test_selftest_errors);
}
