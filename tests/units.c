/* A small program for questions of building. As two translation units (UNIT=1 and UNIT=2) it shows that one
   implementation serves both, or that each may have its own static copy; as one unit it is compiled and run
   under every switch. Valid C99 and C++11; the answer's bits never change. */
#include <ternary.h>
#include <stdio.h>
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
int main(void)
{
    const uint64_t golden = UINT64_C(0x2e742ca71c164f92), here = answer(), there = other_answer();
    printf("%08x%08x here, %08x%08x there\n", (unsigned)(here >> 32), (unsigned)here, (unsigned)(there >> 32), (unsigned)there);
    return here != golden || there != golden;
}
#endif
