/* Room 16, embedding. */

static tern_param table_of(tern_context *c, int64_t rows, int64_t cols, tern_rule rule)
{
    tern_param p = param_of("table", rows, cols, rule, TERN_PER_ROW);
    CHECK_OK(c, tern_param_alloc(c, &p, TERN_FOR_GRADIENT));
    set_random(c, &p);
    return p;
}

/* Rows of the table as tern_param_get reads them, ternary and dense; then tied as the output layer. */
static void embeddings(tern_context *c, record *r)
{
    int dense, act;
    for (dense = 0; dense < 2; dense++) {
        const int64_t n = 40, cols = 30, rows = 37;
        tern_param w = table_of(c, rows, cols, dense ? TERN_DENSE : TERN_ABSMEAN);
        tern_embedding e = TERN_ZERO;
        const int32_t *ids = hold_ids(n, (int32_t)rows);
        float *y = hold_output(n * cols), *row = hold_output(cols), *logits = hold_output(n * rows);
        int64_t i;
        e.w = &w;
        CHECK_OK(c, tern_embedding_forward(c, &e, n, ids, y));
        for (i = 0; i < n; i++) {
            CHECK_OK(c, tern_param_get(c, &w, ids[i], NULL, NULL, row));
            CHECK(memcmp(row, y + i * cols, (size_t)cols * 4) == 0, "token %d differs", (int)i);
        }
        record_words(r, y, n * cols);
        for (act = TERN_ACT_INT8; act <= TERN_ACT_FLOAT; act++) {
            const tern_linear l = tern_embedding_as_linear(&e, TERN_NORM_RMS, (tern_act)act);
            CHECK(l.w == &w && !l.bias && !l.gain && l.norm == TERN_NORM_RMS && l.act == (tern_act)act, "the tied layer");
            CHECK_OK(c, tern_linear_forward(c, &l, n, y, logits, NULL));
            record_words(r, logits, n * rows);
        }
        tern_param_free(c, &w, -1);
        release();
    }
}
static void test_embedding(void) { same_everywhere(embeddings, UINT64_C(0xA268B61F95859365)); }

/* Rows that occur often collect in token order, whatever the thread count. */
static void embedding_gradients(tern_context *c, record *r)
{
    const int64_t n = 300, cols = 50, rows = 6;
    tern_param w = table_of(c, rows, cols, TERN_ABSMEAN);
    tern_embedding e = TERN_ZERO;
    const int32_t *ids = hold_ids(n, 5); /* row 5 never occurs */
    const float *dy = hold_floats(n * cols);
    float *expected = hold_zeros(rows * cols);
    int64_t i, j;
    e.w = &w;
    for (i = 0; i < n; i++)
        for (j = 0; j < cols; j++) expected[ids[i] * cols + j] += dy[i * cols + j];
    CHECK_OK(c, tern_embedding_backward(c, &e, n, ids, dy));
    CHECK(memcmp(expected, w.buffer[TERN_GRAD].data, (size_t)(rows * cols) * 4) == 0, "not the sum in token order");
    CHECK_OK(c, tern_embedding_backward(c, &e, n, ids, dy)); /* adds */
    for (j = 0; j < rows * cols; j++) CHECK(fabs(grad_of(&w)[j] - 2 * expected[j]) < 1e-4, "not added to");
    record_words(r, w.buffer[TERN_GRAD].data, rows * cols);
    tern_param_free(c, &w, -1);
}
static void test_embedding_backward(void) { same_for_threads(embedding_gradients); }

static void test_embedding_faults(void)
{
    test_context t = test_open(TERN_ISA_BEST, 1);
    tern_param w = table_of(t.c, 4, 10, TERN_ABSMEAN);
    tern_embedding e = TERN_ZERO;
    static const int32_t ids[3] = {3, 4, -1};
    float y[30], dy[30];
    int i;
    e.w = &w;
    for (i = 0; i < 30; i++) y[i] = dy[i] = 1.0f;
    CHECK_OK(t.c, tern_embedding_forward(t.c, &e, 3, ids, y));
    CHECK_FAILS(t.c, tern_sync(t.c), TERN_E_DATA, "ids[1]");
    for (i = 10; i < 30; i++) CHECK(y[i] == 0.0f, "[%d] is %g", i, y[i]);
    CHECK_OK(t.c, tern_embedding_backward(t.c, &e, 3, ids, dy)); /* the same ids are skipped */
    for (i = 0; i < 40; i++) CHECK(grad_of(&w)[i] == (i >= 30 ? 1.0f : 0.0f), "gradient %d is %g", i, grad_of(&w)[i]);
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, &e, 0, ids, y), TERN_E_SHAPE, "n = 0");
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, &e, 3, NULL, y), TERN_E_ARGUMENT, "ids is NULL");
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, NULL, 3, ids, y), TERN_E_ARGUMENT, "embedding is NULL");
    CHECK_FAILS(t.c, tern_embedding_backward(t.c, NULL, 3, ids, dy), TERN_E_ARGUMENT, "embedding is NULL");
    CHECK(tern_embedding_forward(NULL, &e, 3, ids, y) == TERN_E_ARGUMENT, "no context");
    w.buffer[TERN_GRAD].count = 39;
    CHECK_FAILS(t.c, tern_embedding_backward(t.c, &e, 3, ids, dy), TERN_E_SHAPE, "table: its gradient has 39 elements of 40");
    tern_param_free(t.c, &w, TERN_FOR_TRAINING);
    CHECK_OK(t.c, tern_embedding_backward(t.c, &e, 3, ids, dy)); /* frozen: nothing to add to */
    e.w = NULL;
    CHECK_FAILS(t.c, tern_embedding_forward(t.c, &e, 3, ids, y), TERN_E_ARGUMENT, "a parameter is NULL");
    tern_param_free(t.c, &w, -1);
    test_close(&t);
}

static void suite_embedding(void)
{
    RUN(test_embedding);
    RUN(test_embedding_backward);
    RUN(test_embedding_faults);
}
