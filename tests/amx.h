/* A tile unit in software, as strict as the hardware: what would be a fault there ends the program here. Included
   before ternary.h; with TEST_AMX it takes the place of the instructions, so that the tier amx-int8 runs on
   every machine that has AVX512-VBMI. Elsewhere a test compares it with the hardware. */
#ifndef TEST_AMX_H
#define TEST_AMX_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct amx_unit {
    int configured, rows[8], bytes[8];
    uint8_t tile[8][16][64];
} amx_unit;
static __thread amx_unit amx;

#define AMX_FAULTS_UNLESS(condition)                                             \
    do {                                                                         \
        if (!(condition)) {                                                      \
            printf("tile unit: fault, not %s\n", #condition);                    \
            fflush(stdout);                                                      \
            abort();                                                             \
        }                                                                        \
    } while (0)

/* 64 bytes: palette, start row, 14 zeros, 16 sizes of rows as uint16, 16 numbers of rows. */
static inline void amx_config(const void *from)
{
    uint8_t c[64];
    int i;
    memcpy(c, from, 64);
    memset(&amx, 0, sizeof amx);
    AMX_FAULTS_UNLESS(c[0] == 1 && c[1] == 0);
    for (i = 2; i < 16; i++) AMX_FAULTS_UNLESS(c[i] == 0);
    for (i = 0; i < 16; i++) {
        const int rows = c[48 + i], bytes = c[16 + 2 * i] | c[17 + 2 * i] << 8;
        AMX_FAULTS_UNLESS(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (i < 8 || rows == 0));
        if (i < 8) amx.rows[i] = rows;
        if (i < 8) amx.bytes[i] = bytes;
    }
    amx.configured = 1;
}

static inline void amx_release(void) { memset(&amx, 0, sizeof amx); }

static inline void amx_check(int tile) { AMX_FAULTS_UNLESS(amx.configured && amx.rows[tile] > 0); }

static inline void amx_load(int tile, const void *from, int64_t stride)
{
    int i;
    amx_check(tile);
    memset(amx.tile[tile], 0, sizeof amx.tile[tile]);
    for (i = 0; i < amx.rows[tile]; i++) memcpy(amx.tile[tile][i], (const uint8_t *)from + i * stride, (size_t)amx.bytes[tile]);
}

static inline void amx_zero(int tile)
{
    amx_check(tile);
    memset(amx.tile[tile], 0, sizeof amx.tile[tile]);
}

static inline void amx_store(int tile, void *to, int64_t stride)
{
    int i;
    amx_check(tile);
    for (i = 0; i < amx.rows[tile]; i++) memcpy((uint8_t *)to + i * stride, amx.tile[tile][i], (size_t)amx.bytes[tile]);
}

/* tdpbsud: c[m][n] += sum over k and j of a[m][4k + j] (signed) * b[k][4n + j] (unsigned), modulo 2^32. */
static inline void amx_dot(int c, int a, int b)
{
    int m, n, k;
    amx_check(c);
    amx_check(a);
    amx_check(b);
    AMX_FAULTS_UNLESS(c != a && c != b && a != b);
    AMX_FAULTS_UNLESS(amx.bytes[a] % 4 == 0 && amx.bytes[b] % 4 == 0 && amx.bytes[c] % 4 == 0);
    AMX_FAULTS_UNLESS(amx.rows[c] == amx.rows[a] && amx.bytes[c] == amx.bytes[b] && amx.bytes[a] == 4 * amx.rows[b]);
    for (m = 0; m < amx.rows[c]; m++)
        for (n = 0; n < amx.bytes[c]; n += 4) {
            uint32_t sum;
            memcpy(&sum, &amx.tile[c][m][n], 4);
            for (k = 0; k < amx.bytes[a]; k++) sum += (uint32_t)((int8_t)amx.tile[a][m][k] * amx.tile[b][k / 4][n + k % 4]);
            memcpy(&amx.tile[c][m][n], &sum, 4);
        }
}

/* gcc's code comes here with upper halves in use, and then each fmaf takes a hundred times as long. */
#if defined(__x86_64__)
#define AMX_CLEAR_UPPER() \
    __asm__ volatile("vzeroupper" : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                     "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")
#elif defined(__i386__)
#define AMX_CLEAR_UPPER() __asm__ volatile("vzeroupper" : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7")
#else
#define AMX_CLEAR_UPPER() ((void)0)
#endif

/* Two bf16 of a word, and sums, where denormals are zeros (to nearest even otherwise). */
static inline float amx_flush(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7F800000u) == 0) u &= 0x80000000u;
    memcpy(&x, &u, 4);
    return x;
}
static inline float amx_bf16(const uint8_t *word, int half)
{
    uint32_t u;
    float x;
    memcpy(&u, word, 4);
    u = half ? u & 0xFFFF0000u : u << 16;
    memcpy(&x, &u, 4);
    return amx_flush(x);
}

/* tdpbf16ps: for each c[m][n] the products of the words' low halves are summed over k from 0 on, those of the high halves apart,
   by FMA; the second sum is added to the first, and both to c. */
static __attribute__((noinline, unused)) void amx_pairs(int c, int a, int b)
{
    int m, n, k;
    AMX_CLEAR_UPPER();
    amx_check(c);
    amx_check(a);
    amx_check(b);
    AMX_FAULTS_UNLESS(c != a && c != b && a != b);
    AMX_FAULTS_UNLESS(amx.bytes[a] % 4 == 0 && amx.bytes[b] % 4 == 0 && amx.bytes[c] % 4 == 0);
    AMX_FAULTS_UNLESS(amx.rows[c] == amx.rows[a] && amx.bytes[c] == amx.bytes[b] && amx.bytes[a] == 4 * amx.rows[b]);
    for (m = 0; m < amx.rows[c]; m++)
        for (n = 0; n < amx.bytes[c]; n += 4) {
            float sum[2] = {0.0f, 0.0f}, old;
            for (k = 0; k < 2 * amx.rows[b]; k++)
                sum[k % 2] =
                    amx_flush(fmaf(amx_bf16(&amx.tile[a][m][k / 2 * 4], k % 2), amx_bf16(&amx.tile[b][k / 2][n], k % 2), sum[k % 2]));
            memcpy(&old, &amx.tile[c][m][n], 4);
            old = amx_flush(amx_flush(old) + amx_flush(sum[0] + sum[1]));
            memcpy(&amx.tile[c][m][n], &old, 4);
        }
}

/* vdpbf16ps: in each of 16 words the product of the high halves, then that of the low ones, is added to the sum. */
static __attribute__((noinline, unused)) void amx_words(void *sum, const void *a, const void *b)
{
    int i, half;
    AMX_CLEAR_UPPER();
    for (i = 0; i < 16; i++)
        for (half = 1; half >= 0; half--) {
            float x;
            memcpy(&x, (uint8_t *)sum + 4 * i, 4);
            x = amx_flush(fmaf(amx_bf16((const uint8_t *)a + 4 * i, half), amx_bf16((const uint8_t *)b + 4 * i, half), amx_flush(x)));
            memcpy((uint8_t *)sum + 4 * i, &x, 4);
        }
}

#ifdef TEST_AMX
static int amx_asked, amx_refused; /* for permission */
static int amx_int8_alone;         /* a machine without AMX-BF16 */
#define TERN__TILE_BF16 (!amx_int8_alone)
#define TERN__TILE_PAIRS(c, a, b) amx_pairs(c, a, b)
#define TERN__PAIR_DOT(sum, a, b) amx_words(&(sum), &(a), &(b))
#define TERN__TILE_ZERO(tile) amx_zero(tile)
#define TERN__TILE_UNIT (amx_asked++, !amx_refused)
#define TERN__TILE_CONFIG(from) amx_config(from)
#define TERN__TILE_RELEASE() amx_release()
#define TERN__TILE_LOAD(tile, from, stride) amx_load(tile, from, stride)
#define TERN__TILE_ONCE(tile, from, stride) amx_load(tile, from, stride)
#define TERN__TILE_STORE(tile, to, stride) amx_store(tile, to, stride)
#define TERN__TILE_DOT(c, a, b) amx_dot(c, a, b)
#endif

#endif
