/* What a decoding step does between its matrix products. Numbers are bf16 or float32 in memory and float32 in between; a
   token's result depends on what belongs to it alone. Built, loaded and checked by kernels.py, which says when. Strides
   are in numbers, not bytes.

   Attention of single tokens, each of which sees some columns of one row of keys and values: for every token i and group g (heads of a group share keys and values), with b = row[i] and c from first[i] to end[i]:

       s[h][c] = scale * q[i][h] . k[b][g][c]       p[h] = exp(s[h] - max s[h]) / sum       o[i][h] = sum_c p[h][c] v[b][g][c]

   norm: x / rms(x) * w.    turn: heads rotated by their positions.    gate: silu(g) * u. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline bf16 to_bf16(float y) { /* to the nearest, ties to even; no NaN */
    uint32_t bits;
    memcpy(&bits, &y, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float from_float(float x) { return x; }
static inline float to_float(float x) { return x; }

/* exp(x) for x <= 0: 2^n (1 + r + ... + r^6 / 720) with x = n ln 2 + r, off by less than 3e-7 of its value */
static inline float exp_below(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (float)(int32_t)(x * 1.44269504f - 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

#define ATTEND(NAME, TYPE, FROM, TO, WIDTH)                                                                          \
    static void NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *o, float *s, int shared, int columns,         \
                     float scale) {                                                                        \
        float *asked = s + (int64_t)shared * columns;                                                                 \
        for (int i = 0; i < shared * WIDTH; i++) asked[i] = scale * FROM(q[i]);                                       \
        for (int c = 0; c < columns; c++) {                                                                           \
            float key[WIDTH];                                                                                         \
            for (int d = 0; d < WIDTH; d++) key[d] = FROM(k[(int64_t)c * WIDTH + d]);                                 \
            for (int h = 0; h < shared; h++) {                                                                        \
                float sum = 0.0f;                                                                                     \
                for (int d = 0; d < WIDTH; d++) sum += asked[h * WIDTH + d] * key[d];                                 \
                s[h * columns + c] = sum;                                                                             \
            }                                                                                                         \
        }                                                                                                             \
        for (int h = 0; h < shared; h++) {                                                                            \
            float *row = s + h * columns, top = -FLT_MAX, total = 0.0f, out[WIDTH];                                   \
            for (int c = 0; c < columns; c++) top = row[c] > top ? row[c] : top;                                      \
            for (int c = 0; c < columns; c++) total += row[c] = exp_below(row[c] - top);                              \
            for (int d = 0; d < WIDTH; d++) out[d] = 0.0f;                                                            \
            for (int c = 0; c < columns; c++)                                                                         \
                for (int d = 0; d < WIDTH; d++) out[d] += row[c] * FROM(v[(int64_t)c * WIDTH + d]);                   \
            for (int d = 0; d < WIDTH; d++) o[h * WIDTH + d] = TO(out[d] / total);                                    \
        }                                                                                                             \
    }

#define BOTH(WIDTH)                                                                                                   \
    ATTEND(attend_bf16_##WIDTH, bf16, from_bf16, to_bf16, WIDTH)                                                      \
    ATTEND(attend_float_##WIDTH, float, from_float, to_float, WIDTH)

BOTH(8) BOTH(16) BOTH(32) BOTH(64) BOTH(80) BOTH(96) BOTH(128) BOTH(256)

#define CALL(WIDTH)                                                                                                   \
    case WIDTH:                                                                                                       \
        if (rounded)                                                                                                  \
            attend_bf16_##WIDTH((const bf16 *)q + query, (const bf16 *)k + start, (const bf16 *)v + start,            \
                                (bf16 *)o + out, s, shared, columns, scale);                                   \
        else                                                                                                          \
            attend_float_##WIDTH((const float *)q + query, (const float *)k + start, (const float *)v + start,        \
                                 (float *)o + out, s, shared, columns, scale);                                 \
        break;

/* q [tokens, groups * shared, width], tokens `q_token` apart; k, v [rows, groups, .., width], rows and groups `kv_row` and
   `kv_group` apart; o [tokens, groups * shared, width] without gaps; no token sees more than `longest` columns.
   1 where there is no memory, 2 where the width is not built */
int attend(const void *q, const void *k, const void *v, void *o, const int32_t *row, const int32_t *first,
           const int32_t *end, int tokens, int groups, int shared, int width, int longest, int64_t q_token,
           int64_t kv_row, int64_t kv_group, float scale, int rounded, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *s = malloc(sizeof(float) * (size_t)shared * (size_t)(longest + width));
        if (s == NULL) failed = 1;
#pragma omp for schedule(dynamic, 4)
        for (int task = 0; task < tokens * groups; task++) {
            if (s == NULL) continue;
            int i = task / groups, g = task % groups, columns = end[i] - first[i];
            int64_t query = i * q_token + (int64_t)g * shared * width, out = ((int64_t)i * groups + g) * shared * width;
            int64_t start = row[i] * kv_row + g * kv_group + (int64_t)first[i] * width;
            switch (width) {
                CALL(8) CALL(16) CALL(32) CALL(64) CALL(80) CALL(96) CALL(128) CALL(256)
                default: failed = 2;
            }
        }
        free(s);
    }
    return failed;
}

#define BETWEEN(TYPE, FROM, TO)                                                                                       \
    static void norm_##TYPE(const TYPE *x, const TYPE *w, TYPE *y, int width, float eps) {                            \
        float sum = 0.0f;                                                                                             \
        for (int d = 0; d < width; d++) sum += FROM(x[d]) * FROM(x[d]);                                               \
        float r = 1.0f / sqrtf(sum / (float)width + eps);                                                             \
        for (int d = 0; d < width; d++) y[d] = TO(FROM(TO(FROM(x[d]) * r)) * FROM(w[d])); /* rounded as the models do */ \
    }                                                                                                                 \
    static void turn_##TYPE(const TYPE *x, const TYPE *cos, const TYPE *sin, TYPE *y, int heads, int width) {         \
        int half = width / 2;                                                                                         \
        for (int h = 0; h < heads; h++, x += width, y += width)                                                       \
            for (int d = 0; d < half; d++) {                                                                          \
                float a = FROM(x[d]), b = FROM(x[d + half]);                                                          \
                y[d] = TO(a * FROM(cos[d]) - b * FROM(sin[d]));                                                       \
                y[d + half] = TO(b * FROM(cos[d + half]) + a * FROM(sin[d + half]));                                  \
            }                                                                                                         \
    }                                                                                                                 \
    static void gate_##TYPE(const TYPE *g, const TYPE *u, TYPE *y, int width) {                                       \
        for (int d = 0; d < width; d++) {                                                                             \
            float x = FROM(g[d]), e = exp_below(x < 0.0f ? x : -x);                                                   \
            y[d] = TO(x * (x < 0.0f ? e : 1.0f) / (1.0f + e) * FROM(u[d]));                                           \
        }                                                                                                             \
    }

BETWEEN(bf16, from_bf16, to_bf16)
BETWEEN(float, from_float, to_float)

/* x, y [tokens, width] without gaps, w [width] */
void norm(const void *x, const void *w, void *y, int tokens, int width, float eps, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t at = (int64_t)i * width;
        if (rounded)
            norm_bf16((const bf16 *)x + at, (const bf16 *)w, (bf16 *)y + at, width, eps);
        else
            norm_float((const float *)x + at, (const float *)w, (float *)y + at, width, eps);
    }
}

/* x [tokens, heads, width], tokens `x_token` apart; cos, sin [tokens, width] and y [tokens, heads, width] without gaps */
void turn(const void *x, const void *cos, const void *sin, void *y, int tokens, int heads, int width, int64_t x_token,
          int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t from = i * x_token, at = (int64_t)i * width, to = (int64_t)i * heads * width;
        if (rounded)
            turn_bf16((const bf16 *)x + from, (const bf16 *)cos + at, (const bf16 *)sin + at, (bf16 *)y + to, heads, width);
        else
            turn_float((const float *)x + from, (const float *)cos + at, (const float *)sin + at, (float *)y + to, heads, width);
    }
}

/* g, u [tokens, width], tokens `token` apart; y [tokens, width] without gaps */
void gate(const void *g, const void *u, void *y, int tokens, int width, int64_t token, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t from = i * token, at = (int64_t)i * width;
        if (rounded)
            gate_bf16((const bf16 *)g + from, (const bf16 *)u + from, (bf16 *)y + at, width);
        else
            gate_float((const float *)g + from, (const float *)u + from, (float *)y + at, width);
    }
}
