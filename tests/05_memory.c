/* [TERN-5] Memory: result texts, formatting, checked arithmetic, allocation and its failures. */

static void test_memory_result_texts(void)
{
#define MEMORY_CASE(name, value, text) \
    CHECK((int)name == (value) && strcmp(tern_result_text(name), text) == 0, "%s", tern_result_text(name));
    TERN_RESULTS(MEMORY_CASE)
#undef MEMORY_CASE
    CHECK(strcmp(tern_result_text((tern_result)1), "unknown result") == 0, "%s", tern_result_text((tern_result)1));
    CHECK(strcmp(tern_result_text((tern_result)-999), "unknown result") == 0, "%s", tern_result_text((tern_result)-999));
}

/* Formats into `size` bytes and looks at the byte behind them. */
static void memory_format(const char *wanted, size_t size, const char *format, ...)
{
    char out[64];
    va_list list;
    memset(out, '#', sizeof out);
    va_start(list, format);
    tern__format(out, size, format, list);
    va_end(list);
    CHECK(strcmp(out, wanted) == 0, "\"%s\" is not \"%s\"", out, wanted);
    CHECK(out[size] == '#', "\"%s\" runs over %d bytes", wanted, (int)size);
}

static void test_memory_format(void)
{
    memory_format("", 60, "");
    memory_format("0 7 -7 1000", 60, "%d %d %d %d", (int64_t)0, (int64_t)7, (int64_t)-7, (int64_t)1000);
    memory_format("-9223372036854775808", 60, "%d", INT64_MIN);
    memory_format("9223372036854775807", 60, "%d", INT64_MAX);
    memory_format("[a][]", 60, "[%s][%s]", "a", "");
    memory_format("100%", 60, "100%");
    memory_format("", 1, "abc");
    memory_format("ab", 3, "abc");
    memory_format("abc", 4, "abc");
    memory_format("-92", 4, "%d", INT64_MIN);
    memory_format("xlo", 4, "x%s%d", "long", (int64_t)1);
}

static void test_memory_checked_arithmetic(void)
{
    const int64_t limit = (int64_t)1 << 62;
    CHECK(tern__mul(0, INT64_MAX) == 0 && tern__mul(INT64_MAX, 0) == 0, "zero");
    CHECK(tern__mul(limit, 1) == limit && tern__mul((int64_t)1 << 31, (int64_t)1 << 31) == limit, "up to 2^62");
    CHECK(tern__mul(limit + 1, 1) == INT64_MAX && tern__mul(((int64_t)1 << 31) + 1, (int64_t)1 << 31) == INT64_MAX, "and no further");
    CHECK(tern__mul(INT64_MAX, INT64_MAX) == INT64_MAX && tern__mul(INT64_MAX, 1) == INT64_MAX, "too large stays so");
    CHECK(tern__add(limit - 1, 1) == limit && tern__add(limit, 1) == INT64_MAX, "sums");
    CHECK(tern__add(INT64_MAX, INT64_MAX) == INT64_MAX && tern__add(0, INT64_MAX) == INT64_MAX, "too large stays so");
    CHECK(tern__ceil_div(0, 16) == 0 && tern__ceil_div(1, 16) == 1 && tern__ceil_div(16, 16) == 1
          && tern__ceil_div(17, 16) == 2, "ceil_div");
    CHECK(tern__ceil_div(INT64_MAX, 2) == limit, "ceil_div does not overflow");
    CHECK(tern__fits(0) && tern__fits(4096) && !tern__fits(-1) && !tern__fits(INT64_MAX), "fits");
    CHECK(tern__scratch_piece(1) == 64 && tern__scratch_piece(64) == 64 && tern__scratch_piece(65) == 128, "pieces of 64 bytes");
    CHECK(tern__scratch_piece(INT64_MAX) == INT64_MAX, "too large stays so");
}

/* An allocator that hands out every alignment in turn, and dirty memory. */
static void *memory_crooked_alloc(void *user, size_t bytes)
{
    const size_t shift = (size_t)(++*(int *)user % 16) + 1;
    unsigned char *p = (unsigned char *)malloc(bytes + 17);
    if (!p) return NULL;
    memset(p, 0xAA, bytes + 17);
    p[shift - 1] = (unsigned char)shift;
    test_blocks++;
    return p + shift;
}

static void memory_crooked_free(void *user, void *p)
{
    (void)user;
    test_blocks--;
    free((unsigned char *)p - ((unsigned char *)p)[-1]);
}

static void test_memory_alloc_aligns_and_zeroes(void)
{
    const size_t sizes[] = {0, 1, 63, 64, 65, 4097};
    tern_context_desc d = TERN_ZERO;
    tern_context *c = NULL;
    int calls = 0, i, round;
    d.allocator.alloc = memory_crooked_alloc;
    d.allocator.free = memory_crooked_free;
    d.allocator.user = &calls;
    CHECK(tern_open(&c, &d, NULL) == TERN_OK, "open");
    for (round = 0; round < 16; round++)
        for (i = 0; i < 6; i++) {
            unsigned char *p = (unsigned char *)tern_alloc(c, sizes[i]);
            size_t j, dirty = 0;
            CHECK(p && ((uintptr_t)p & 63) == 0, "%d bytes at %p", (int)sizes[i], (void *)p);
            for (j = 0; j < sizes[i]; j++) dirty += p[j] != 0;
            CHECK(dirty == 0, "%d of %d bytes are not zero", (int)dirty, (int)sizes[i]);
            memset(p, 0x55, sizes[i]);
            tern_free(c, p);
        }
    CHECK(tern_alloc(c, SIZE_MAX) == NULL && tern_alloc(c, SIZE_MAX / 2) == NULL, "a size that overflows");
    tern_free(c, NULL);
    tern_close(c);
}

static void test_memory_copy(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    char from[8] = "1234567", to[8] = "";
    int i;
    for (i = TERN_TO_DEVICE; i <= TERN_ON_DEVICE; i++) {
        memset(to, 0, sizeof to);
        CHECK_OK(t.c, tern_copy(t.c, to, from, 8, (tern_direction)i));
        CHECK(memcmp(from, to, 8) == 0, "direction %d", i);
    }
    CHECK_OK(t.c, tern_copy(t.c, NULL, NULL, 0, TERN_TO_HOST));
    CHECK_FAILS(t.c, tern_copy(t.c, NULL, from, 1, TERN_TO_HOST), TERN_E_ARGUMENT, "dst or src is NULL");
    CHECK_FAILS(t.c, tern_copy(t.c, to, NULL, 1, TERN_TO_HOST), TERN_E_ARGUMENT, "dst or src is NULL");
    test_close(&t);
}

static void test_memory_reserve(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    const long before = test_allocations, blocks = test_blocks;
    const size_t had = t.c->scratch_bytes;
    CHECK(had == 1 << 20, "open reserves what the desc says, not %d", (int)had);
    CHECK_OK(t.c, tern_reserve(t.c, 100));
    CHECK_OK(t.c, tern_reserve(t.c, had));
    CHECK(test_allocations == before, "less than there is allocates nothing");
    CHECK_OK(t.c, tern_reserve(t.c, had + 1));
    CHECK(test_allocations == before + 1 && test_blocks == blocks, "growth replaces one block");
    CHECK(t.c->scratch_bytes >= had + 1, "%d bytes", (int)t.c->scratch_bytes);
    test_fail_at = test_allocations;
    CHECK_FAILS(t.c, tern_reserve(t.c, 5000000), TERN_E_MEMORY, "no memory for 5000000 bytes");
    CHECK(t.c->scratch_bytes >= had + 1 && t.c->scratch && test_blocks == blocks, "a failure keeps the old scratch");
    memset(t.c->scratch, 1, t.c->scratch_bytes);
    CHECK_FAILS(t.c, tern_reserve(t.c, SIZE_MAX), TERN_E_OVERFLOW, "overflows");
    test_close(&t);
}

static void test_memory_open_fails_at_each_allocation(void)
{
    tern_context_desc d = TERN_ZERO;
    tern_context *c;
    tern_error e;
    long count, i;
    d.allocator.alloc = test_malloc;
    d.allocator.free = test_free;
    d.scratch = 1000;
    CHECK(tern_open(&c, &d, &e) == TERN_OK, "%s", e.text);
    tern_close(c);
    count = test_allocations;
    CHECK(count >= 2, "%ld allocations", count);
    for (i = 0; i < count; i++) {
        test_allocations = 0;
        test_fail_at = i;
        CHECK(tern_open(&c, &d, &e) == TERN_E_MEMORY && c == NULL, "allocation %ld", i);
        CHECK(e.code == TERN_E_MEMORY && strstr(e.text, "no memory for"), "%s", e.text);
        CHECK(test_blocks == 0, "%ld blocks are left", test_blocks);
    }
}

static void test_memory_bad_desc(void)
{
    tern_context_desc d = TERN_ZERO;
    tern_context *c = (tern_context *)&d;
    tern_error e;
    CHECK(tern_open_checked(&c, NULL, &e, TERN_LAYOUT + 1) == TERN_E_VERSION && c == NULL, "%s", e.text);
    CHECK(e.code == TERN_E_VERSION && strstr(e.text, "another version"), "%s", e.text);
    CHECK(tern_open_checked(&c, NULL, &e, TERN_LAYOUT + ((uint64_t)1 << 32)) == TERN_E_VERSION, "another number");
    CHECK(tern_open_checked(&c, NULL, NULL, 0) == TERN_E_VERSION, "without a place for the text");
    CHECK(tern_open(NULL, NULL, &e) == TERN_E_ARGUMENT && strstr(e.text, "out is NULL"), "%s", e.text);
    d.allocator.alloc = test_malloc;
    CHECK(tern_open(&c, &d, &e) == TERN_E_ARGUMENT && strstr(e.text, "both alloc and free"), "%s", e.text);
    d.allocator.alloc = NULL;
    d.allocator.free = test_free;
    CHECK(tern_open(&c, &d, &e) == TERN_E_ARGUMENT && strstr(e.text, "both alloc and free"), "%s", e.text);
    CHECK(c == NULL && test_allocations == 0, "nothing is allocated for a bad desc");
    CHECK(tern_open(&c, NULL, &e) == TERN_OK && c && e.code == TERN_OK && e.text[0] == 0, "all defaults: %s", e.text);
    tern_close(c);
    tern_close(NULL);
}

static void test_memory_first_fault_stays(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern__set_fault(&t.c->run, TERN__FAULT_NORM, 1);
    tern__set_fault(&t.c->run, TERN__FAULT_LOSS, 2);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "norm: row 1 is not finite");
    CHECK_OK(t.c, tern_sync(t.c));
    tern__set_fault(&t.c->run, TERN__FAULT_GATHER, 3);
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "ids[3] is out of range");
    test_close(&t);
}

static void suite_memory(void)
{
    RUN(test_memory_result_texts);
    RUN(test_memory_format);
    RUN(test_memory_checked_arithmetic);
    RUN(test_memory_alloc_aligns_and_zeroes);
    RUN(test_memory_copy);
    RUN(test_memory_reserve);
    RUN(test_memory_open_fails_at_each_allocation);
    RUN(test_memory_bad_desc);
    RUN(test_memory_first_fault_stays);
}
