/* Quickstart: a float matrix becomes ternary and multiplies a vector; plain C checks every bit.

       cc -O2 -I. examples/quickstart.c -o quickstart -pthread                                  */

#define TERNARY_IMPLEMENTATION
#include "ternary.h"
#include <stdio.h>

enum { ROWS = 256, COLS = 1000 };
static float w[ROWS * COLS], x[COLS], y[ROWS];

static void fill(float *values, int count, uint32_t seed) /* random numbers in [-1, 1) */
{
    while (count--) *values++ = (float)((seed = seed * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
}

/* One row of the product: x rounded to int8, an exact integer sum, one multiplication. */
static float plain(const int8_t *trits, float scale)
{
    float largest = 0;
    int k, sum = 0;
    for (k = 0; k < COLS; k++) largest = x[k] > largest ? x[k] : -x[k] > largest ? -x[k] : largest;
    for (k = 0; k < COLS; k++) sum += trits[k] * ((int)(x[k] * (127.0 / largest) + 128.5) - 128);
    return (float)sum * (largest / 127.0f * scale);
}

int main(void)
{
    tern_context *c;
    tern_param weight = TERN_ZERO; /* the packed matrix */
    tern_linear layer = TERN_ZERO; /* y = W x, by default with x rounded to int8 */
    tern_need need;
    int8_t trits[COLS];
    float scale;
    int i, equal = 0;
    fill(w, ROWS * COLS, 1);
    fill(x, COLS, 2);

    if (tern_open(&c, NULL, NULL)) return 1;
    weight.rows = ROWS;
    weight.cols = COLS;
    weight.grain = TERN_PER_ROW; /* one scale for each row */
    layer.w = &weight;
    if (tern_param_alloc(c, &weight, TERN_FOR_INFERENCE)
        || tern_param_set(c, &weight, TERN_F32, w)          /* ternarize and pack */
        || tern_linear_need(c, &layer, 1, &need)
        || tern_reserve(c, need.scratch)                    /* once: a forward allocates nothing */
        || tern_linear_forward(c, &layer, 1, x, y, NULL))
        return puts(tern_last_error(c)->text), 1;

    for (i = ROWS - 1; i >= 0 && !tern_param_get(c, &weight, i, trits, &scale, NULL); i--) equal += y[i] == plain(trits, scale);
    for (i = 0; i < 6; i++) printf("w[0][%d] = %6.3f becomes %2d x %.3f\n", i, w[i], trits[i], scale);
    printf("row 0 times x is %.4f, in plain C %.4f\n", y[0], plain(trits, scale));
    printf("%d of %d rows equal plain C to the last bit\n", equal, ROWS);
    tern_param_free(c, &weight, TERN_FOR_INFERENCE);
    tern_close(c);
    return equal != ROWS;
}
