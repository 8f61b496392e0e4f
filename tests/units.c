/* A small program for questions of building. As two translation units (UNIT=1 and UNIT=2) it shows that one
   implementation serves both, or that each may have its own static copy; as one unit it is compiled and run
   under every switch. Valid C99 and C++11; the answer's bits never change. */
#include <ternary.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef UNIT
#define UNIT 0
#endif
#ifdef __cplusplus
extern "C"
#endif
uint64_t other_answer(void);

enum { ROWS = 37, COLS = 130, TOKENS = 3 };

static uint64_t hash(const float *x, int n)
{
    uint64_t h = UINT64_C(14695981039346656037);
    int i, byte;
    for (i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        for (byte = 0; byte < 32; byte += 8) h = (h ^ (bits >> byte & 255)) * UINT64_C(1099511628211);
    }
    return h;
}

static void fill(float *x, int n, uint32_t seed)
{
    int i;
    for (i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
    }
}

/* The hash of a layer's output, 0 after an error. */
static uint64_t answer(void)
{
    static float floats[ROWS * COLS], x[TOKENS * COLS], y[TOKENS * ROWS];
    tern_context *c;
    tern_param w = TERN_ZERO;
    tern_linear layer = TERN_ZERO;
    tern_need need = TERN_ZERO;
    tern_result result = tern_open(&c, NULL, NULL);
    if (result != TERN_OK) return 0;
    fill(floats, ROWS * COLS, 1);
    fill(x, TOKENS * COLS, 2);
    w.rows = ROWS;
    w.cols = COLS;
    w.grain = TERN_PER_ROW;
    layer.w = &w;
    layer.norm = TERN_NORM_RMS;
    result = tern_param_alloc(c, &w, TERN_FOR_INFERENCE);
    if (result == TERN_OK) result = tern_param_set(c, &w, TERN_F32, floats);
    if (result == TERN_OK) result = tern_linear_need(c, &layer, TOKENS, &need);
    if (result == TERN_OK) result = tern_reserve(c, need.scratch);
    if (result == TERN_OK) result = tern_linear_forward(c, &layer, TOKENS, x, y, NULL);
    if (result == TERN_OK) result = tern_selftest(c);
    if (result != TERN_OK) printf("%s\n", tern_last_error(c)->text);
    tern_param_free(c, &w, TERN_FOR_INFERENCE);
    tern_close(c);
    return result == TERN_OK ? hash(y, TOKENS * ROWS) : 0;
}

#if UNIT != 1
uint64_t other_answer(void) { return answer(); }
#endif

#if UNIT != 2
/* Under TERNARY_USE_CBLAS: a BLAS that fits here, and the float products by it beside sums in double. */
#ifdef TERNARY_USE_CBLAS
static int blas_calls;
#ifdef __cplusplus
extern "C"
#endif
void cblas_sgemm(int order, int turn_a, int turn_b, int m, int n, int k, float alpha, const float *a, int lda, const float *b, int ldb,
                 float beta, float *c, int ldc)
{
    int i, j, l;
    blas_calls += order == 101;
    for (i = 0; i < m; i++)
        for (j = 0; j < n; j++) {
            float sum = 0.0f;
            for (l = 0; l < k; l++)
                sum += (turn_a == 112 ? a[l * lda + i] : a[i * lda + l]) * (turn_b == 112 ? b[j * ldb + l] : b[l * ldb + j]);
            c[i * ldc + j] = alpha * sum + (beta == 0.0f ? 0.0f : beta * c[i * ldc + j]);
        }
}

static int is_far(float got, double want) { return !(got - want < 5e-3 && want - got < 5e-3); }

/* How many elements of dense and, with training, of dx and dw are wrong; shapes beyond a block of terms and one of columns. */
static int blas_errors(int n, int rows, int cols)
{
    float *w = (float *)malloc(sizeof(float) * (size_t)(rows * cols)), *x = (float *)malloc(sizeof(float) * (size_t)(n * cols));
    float *dy = (float *)malloc(sizeof(float) * (size_t)(n * rows)),
          *out = (float *)malloc(sizeof(float) * (size_t)(n * cols + n * rows + rows * cols));
    tern_dense_args d = TERN_ZERO;
    tern_context *c;
    int errors = 0, t, r, i;
    if (!w || !x || !dy || !out || tern_open(&c, NULL, NULL) != TERN_OK) return 1;
    fill(w, rows * cols, 3);
    fill(x, n * cols, 4);
    fill(dy, n * rows, 5);
    d.m = n; d.n = rows; d.k = cols;
    d.a = x; d.a_row = cols; d.a_col = 1;
    d.b = w; d.b_row = 1; d.b_col = cols;
    d.bias = dy;
    d.c = out; d.c_row = rows;
    d.fused = 1;
    blas_calls = 0;
    errors += tern_dense(c, &d) != TERN_OK || blas_calls != 1;
    for (t = 0; t < n; t++)
        for (r = 0; r < rows; r++) {
            double sum = dy[r];
            for (i = 0; i < cols; i++) sum += (double)x[t * cols + i] * w[r * cols + i];
            errors += is_far(out[t * rows + r], sum);
        }
#ifndef TERNARY_NO_TRAINING
    {
        tern_param p = TERN_ZERO;
        tern_matmul_dx_args dx = TERN_ZERO;
        tern_matmul_dw_args dw = TERN_ZERO;
        tern_unpack_args u = TERN_ZERO;
        int64_t stride = 0, groups = 0;
        int8_t *q;
        p.rows = rows;
        p.cols = cols;
        p.grain = 50;
        errors += tern_param_alloc(c, &p, TERN_FOR_INFERENCE) != TERN_OK || tern_param_set(c, &p, TERN_F32, w) != TERN_OK;
        u.m = dx.m = dw.m = tern_param_matrix(&p);
        u.count = rows;
        u.values = w;
        dx.n = dw.n = n;
        dx.dy = dw.dy = dy;
        dx.dx = out;
        dw.m.grain = TERN_PER_ROW;
        errors += tern_activation_shape(c, &dw.m, &stride, &groups) != TERN_OK;
        dw.q = q = (int8_t *)calloc((size_t)(n * stride), 1);
        dw.scale = dy + (n * rows - n); /* any floats */
        for (t = 0; q && t < n; t++)
            for (i = 0; i < cols; i++) q[t * stride + i] = (int8_t)(50.0f * x[t * cols + i]);
        dw.dw = out + n * cols;
        fill(dw.dw, rows * cols, 6);
        blas_calls = 0;
        errors += tern_unpack(c, &u) != TERN_OK || tern_matmul_dx(c, &dx) != TERN_OK || tern_matmul_dw(c, &dw) != TERN_OK || blas_calls < 2;
        for (t = 0; t < n; t++)
            for (i = 0; i < cols; i++) {
                double sum = 0;
                for (r = 0; r < rows; r++) sum += (double)dy[t * rows + r] * w[r * cols + i];
                errors += is_far(out[t * cols + i], sum);
            }
        fill(w, rows * cols, 6);
        for (r = 0; r < rows; r++)
            for (i = 0; i < cols; i++) {
                double sum = w[r * cols + i];
                for (t = 0; t < n; t++) sum += (double)dy[t * rows + r] * dw.scale[t] * dw.q[t * stride + i];
                errors += is_far(dw.dw[r * cols + i], sum);
            }
        free(q);
        tern_param_free(c, &p, TERN_FOR_INFERENCE);
    }
#endif
    tern_close(c);
    free(w); free(x); free(dy); free(out);
    return errors;
}
#else
static int blas_errors(int n, int rows, int cols) { return n < 0 || rows < 0 || cols < 0; }
#endif

int main(void)
{
    const uint64_t golden = UINT64_C(0x2e742ca71c164f92), here = answer(), there = other_answer();
    const int errors = blas_errors(1, 1, 1) + blas_errors(3, 300, 700) + blas_errors(300, 33, 70);
    printf("%08x%08x here, %08x%08x there\n", (unsigned)(here >> 32), (unsigned)here, (unsigned)(there >> 32), (unsigned)there);
    if (errors) printf("%d elements of products by cblas_sgemm are wrong\n", errors);
    return here != golden || there != golden || errors;
}
#endif
