/* What a decoding step does between its matrix products. A token's result depends on what belongs to it alone. Built,
   loaded and checked by kernels.py. Strides are in numbers, not bytes.

   attend: heads are rotated by their positions, keys and values join those of the token's row, and every token i attends
   to the columns 0 to position[i] of its row. For every group g (heads of a group share keys and values), b = row[i]:

       s[h][c] = scale * q[i][h] . k[b][g][c]       p[h] = exp(s[h] - max s[h]) / sum       o[i][h] = sum_c p[h][c] v[b][g][c]

   add_norm: x += a, y = x / rms(x) * w.    gate: silu(g) * u.

   draw: with e = exp((z - max z) / temperature), the first c for which e_0 + ... + e_c exceeds u times the whole sum. */

#include "numbers.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define AHEAD 32 /* columns of keys that are asked of the memory before they are needed */

/* s[c] becomes exp(s[c] - max s), whose sum is returned */
static inline float exponentials(float *s, int columns) {
    float top = -FLT_MAX, total = 0.0f;
    uint32_t largest = 0, nan = NOT_A_NUMBER;
    for (int c = 0; c < columns; c++) {
        uint32_t size = bits_of(s[c]) & 0x7fffffffu;
        top = s[c] > top ? s[c] : top;
        largest = size > largest ? size : largest;
    }
    if (largest > INFINITE) { /* must come out */
        memcpy(&total, &nan, 4);
        return total;
    }
    for (int c = 0; c < columns; c++) total += s[c] = exp_below(s[c] - top);
    return total;
}

/* One token and one group: q, o [shared, width], k, v [columns, width], s room for shared * (columns + width) numbers */
#define ATTEND(NAME, TYPE, FROM, TO, WIDTH)                                                                           \
    static void NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *o, float *s, int shared, int columns,         \
                     float scale) {                                                                                   \
        float *asked = s + (int64_t)shared * columns;                                                                 \
        for (int i = 0; i < shared * WIDTH; i++) asked[i] = scale * FROM(q[i]);                                       \
        for (int c = 0; c < columns; c++) {                                                                           \
            float key[WIDTH];                                                                                         \
            for (int d = 0; d < WIDTH; d += 64 / (int)sizeof(TYPE)) {                                                 \
                __builtin_prefetch(k + (int64_t)(c + AHEAD) * WIDTH + d);                                             \
                __builtin_prefetch(v + (int64_t)c * WIDTH + d);                                                       \
            }                                                                                                         \
            for (int d = 0; d < WIDTH; d++) key[d] = FROM(k[(int64_t)c * WIDTH + d]);                                 \
            for (int h = 0; h < shared; h++) {                                                                        \
                float sum = 0.0f;                                                                                     \
                for (int d = 0; d < WIDTH; d++) sum += asked[h * WIDTH + d] * key[d];                                 \
                s[h * columns + c] = sum;                                                                             \
            }                                                                                                         \
        }                                                                                                             \
        for (int h = 0; h < shared; h++) {                                                                            \
            float *row = s + h * columns, total = exponentials(row, columns), out[WIDTH];                             \
            for (int d = 0; d < WIDTH; d++) out[d] = 0.0f;                                                            \
            for (int c = 0; c < columns; c++)                                                                         \
                for (int d = 0; d < WIDTH; d++) out[d] += row[c] * FROM(v[(int64_t)c * WIDTH + d]);                   \
            for (int d = 0; d < WIDTH; d++) o[h * WIDTH + d] = TO(out[d] / total);                                    \
        }                                                                                                             \
    }

#ifdef __AVX512BF16__

/* the sums of 16 vectors, side by side */
static inline __m512 sums(const __m512 *a) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}

static inline __m512i rounded_bits(__m512 x) { /* the upper halves are bf16, as by to_bf16 */
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

/* o[h] = sum_c p[h][c] v[c] / total[h] for HEADS heads; 32 numbers at once, the even and the odd ones apart */
static inline __attribute__((always_inline)) void weigh(const float *p, const bf16 *v, bf16 *o, const float *total, int columns, int apart, int width,
                         const int heads) {
    for (int d = 0; d < width; d += 32) {
        __m512 even[4], odd[4];
        for (int h = 0; h < heads; h++) even[h] = odd[h] = _mm512_setzero_ps();
        for (int c = 0; c < columns; c++) {
            __m512i pair = _mm512_loadu_si512(v + (int64_t)c * width + d);
            __m512 e = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
            __m512 u = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
            for (int h = 0; h < heads; h++) {
                __m512 w = _mm512_set1_ps(p[h * apart + c]);
                even[h] = _mm512_fmadd_ps(w, e, even[h]);
                odd[h] = _mm512_fmadd_ps(w, u, odd[h]);
            }
        }
        for (int h = 0; h < heads; h++) {
            __m512 factor = _mm512_set1_ps(1.0f / total[h]);
            __m512i e = _mm512_srli_epi32(rounded_bits(_mm512_mul_ps(even[h], factor)), 16);
            __m512i u = rounded_bits(_mm512_mul_ps(odd[h], factor));
            _mm512_storeu_si512(o + h * width + d, _mm512_mask_mov_epi16(e, 0xaaaaaaaa, u));
        }
    }
}

/* ATTEND by products of pairs of bf16; WIDTH is a multiple of 32 */
#define ATTEND_PAIRS(NAME, WIDTH)                                                                                     \
    static void NAME(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o, float *s, int shared, int columns,         \
                     float scale) {                                                                                   \
        int apart = (columns + 15) & ~15;                                                                             \
        for (int c = 0; c < columns; c += 16) {                                                                       \
            for (int i = 0; i < 16 * WIDTH; i += 32) {                                                                \
                __builtin_prefetch(k + (int64_t)(c + AHEAD) * WIDTH + i);                                             \
                __builtin_prefetch(v + (int64_t)c * WIDTH + i);                                                       \
            }                                                                                                         \
            for (int h = 0; h < shared; h++) {                                                                        \
                __m512 a[16];                                                                                         \
                for (int j = 0; j < 16; j++) {                                                                        \
                    const bf16 *key = k + (int64_t)(c + j < columns ? c + j : columns - 1) * WIDTH;                   \
                    a[j] = _mm512_setzero_ps();                                                                       \
                    for (int d = 0; d < WIDTH; d += 32)                                                               \
                        a[j] = _mm512_dpbf16_ps(a[j], (__m512bh)_mm512_loadu_si512(q + h * WIDTH + d),                \
                                                (__m512bh)_mm512_loadu_si512(key + d));                               \
                }                                                                                                     \
                _mm512_storeu_ps(s + h * apart + c, _mm512_mul_ps(_mm512_set1_ps(scale), sums(a)));                   \
            }                                                                                                         \
        }                                                                                                             \
        for (int first = 0; first < shared; first += 4) {                                                             \
            int heads = shared - first < 4 ? shared - first : 4;                                                      \
            float *p = s + first * apart, total[4];                                                                   \
            bf16 *out = o + first * WIDTH;                                                                            \
            for (int h = 0; h < heads; h++) total[h] = exponentials(p + h * apart, columns);                          \
            switch (heads) {                                                                                          \
                case 1: weigh(p, v, out, total, columns, apart, WIDTH, 1); break;                                     \
                case 2: weigh(p, v, out, total, columns, apart, WIDTH, 2); break;                                     \
                case 3: weigh(p, v, out, total, columns, apart, WIDTH, 3); break;                                     \
                default: weigh(p, v, out, total, columns, apart, WIDTH, 4);                                           \
            }                                                                                                         \
        }                                                                                                             \
    }
#else
#define ATTEND_PAIRS(NAME, WIDTH) ATTEND(NAME, bf16, from_bf16, to_bf16, WIDTH)
#endif

ATTEND(attend_bf16_8, bf16, from_bf16, to_bf16, 8)
ATTEND(attend_bf16_16, bf16, from_bf16, to_bf16, 16)
ATTEND_PAIRS(attend_bf16_32, 32)
ATTEND_PAIRS(attend_bf16_64, 64)
ATTEND(attend_bf16_80, bf16, from_bf16, to_bf16, 80)
ATTEND_PAIRS(attend_bf16_96, 96)
ATTEND_PAIRS(attend_bf16_128, 128)
ATTEND_PAIRS(attend_bf16_256, 256)
#define SINGLE(WIDTH) ATTEND(attend_float_##WIDTH, float, from_float, to_float, WIDTH)
SINGLE(8) SINGLE(16) SINGLE(32) SINGLE(64) SINGLE(80) SINGLE(96) SINGLE(128) SINGLE(256)

#define CALL(WIDTH)                                                                                                   \
    case WIDTH:                                                                                                       \
        if (rounded)                                                                                                  \
            attend_bf16_##WIDTH((const bf16 *)spoken + query, (const bf16 *)k + start, (const bf16 *)v + start,            \
                                (bf16 *)o + out, s, shared, columns, scale);                                          \
        else                                                                                                          \
            attend_float_##WIDTH((const float *)spoken + query, (const float *)k + start, (const float *)v + start,        \
                                 (float *)o + out, s, shared, columns, scale);                                        \
        break;

#define BETWEEN(TYPE, FROM, TO)                                                                                       \
    static void add_##TYPE(TYPE *x, const TYPE *a, int width) {                                                       \
        for (int d = 0; d < width; d++) x[d] = TO(FROM(x[d]) + FROM(a[d]));                                           \
    }                                                                                                                 \
    static void norm_##TYPE(const TYPE *x, const TYPE *w, TYPE *y, int width, float eps) {                            \
        float sum = 0.0f;                                                                                             \
        for (int d = 0; d < width; d++) sum += FROM(x[d]) * FROM(x[d]);                                               \
        float r = 1.0f / sqrtf(sum / (float)width + eps);                                                             \
        for (int d = 0; d < width; d++) y[d] = TO(FROM(TO(FROM(x[d]) * r)) * FROM(w[d])); /* rounded as the models do */ \
    }                                                                                                                 \
    static void ready_##TYPE(TYPE *spoken, const TYPE *cos, const TYPE *sin, const TYPE *qn, const TYPE *kn, float eps, \
                             TYPE *k, TYPE *v, int groups, int heads, int width, int64_t kv_group) {                  \
        int half = width / 2;                                                                                         \
        TYPE *keys = spoken + (int64_t)heads * width, *values = keys + (int64_t)groups * width;                       \
        for (int h = 0; h < heads + groups; h++) {                                                                    \
            TYPE *x = spoken + (int64_t)h * width, y[256];                                                            \
            const TYPE *w = h < heads ? qn : kn;                                                                      \
            if (w != NULL)                                                                                            \
                norm_##TYPE(x, w, y, width, eps);                                                                     \
            else                                                                                                      \
                memcpy(y, x, sizeof(TYPE) * (size_t)width);                                                           \
            for (int d = 0; d < half; d++) {                                                                          \
                float a = FROM(y[d]), b = FROM(y[d + half]);                                                          \
                x[d] = TO(a * FROM(cos[d]) - b * FROM(sin[d]));                                                       \
                x[d + half] = TO(b * FROM(cos[d + half]) + a * FROM(sin[d + half]));                                  \
            }                                                                                                         \
        }                                                                                                             \
        for (int g = 0; g < groups; g++) {                                                                            \
            memcpy(k + g * kv_group, keys + (int64_t)g * width, sizeof(TYPE) * (size_t)width);                        \
            memcpy(v + g * kv_group, values + (int64_t)g * width, sizeof(TYPE) * (size_t)width);                      \
        }                                                                                                             \
    }                                                                                                                 \
    static void gate_##TYPE(const TYPE *g, const TYPE *u, TYPE *y, int width) {                                       \
        for (int d = 0; d < width; d++) {                                                                             \
            float x = FROM(g[d]);                                                                                     \
            y[d] = TO(x * sigmoid(x) * FROM(u[d]));                                                                   \
        }                                                                                                             \
    }

BETWEEN(bf16, from_bf16, to_bf16)
BETWEEN(float, from_float, to_float)

/* spoken [tokens, groups * shared + 2 groups, width]: queries, keys and values of each token, one after the other, without
   gaps; queries and keys are overwritten by what they are after the norms (qn, kn [width], or NULL) and rotations (cos, sin
   [tokens, width]). k, v [rows, groups, .., width]: rows and groups `kv_row` and `kv_group` apart. o [tokens, groups * shared,
   width] without gaps. A token joins its row in the column of its position, and sees it and those before; all of one call do
   so before any attends. 1 where there is no memory, 2 where the width is not built */
int attend(void *spoken, const void *cos, const void *sin, const void *qn, const void *kn, float eps, void *k, void *v,
           void *o, const int32_t *row, const int64_t *position, int tokens, int groups, int shared, int width,
           int longest, int64_t kv_row, int64_t kv_group, float scale, int rounded, int threads) {
    int failed = 0, heads = groups * shared;
    int64_t token = (int64_t)(heads + 2 * groups) * width;
#pragma omp parallel num_threads(threads)
    {
        float *s = malloc(sizeof(float) * (size_t)shared * (size_t)(longest + 16 + width));
        if (s == NULL) failed = 1;
#pragma omp for
        for (int i = 0; i < tokens; i++) {
            int64_t place = row[i] * kv_row + position[i] * width;
            if (rounded)
                ready_bf16((bf16 *)spoken + i * token, (const bf16 *)cos + (int64_t)i * width,
                           (const bf16 *)sin + (int64_t)i * width, qn, kn, eps, (bf16 *)k + place, (bf16 *)v + place,
                           groups, heads, width, kv_group);
            else
                ready_float((float *)spoken + i * token, (const float *)cos + (int64_t)i * width,
                            (const float *)sin + (int64_t)i * width, qn, kn, eps, (float *)k + place, (float *)v + place,
                            groups, heads, width, kv_group);
        }
#pragma omp for schedule(dynamic, 4)
        for (int task = 0; task < tokens * groups; task++) {
            if (s == NULL) continue;
            int i = task / groups, g = task % groups, columns = (int)position[i] + 1;
            int64_t query = i * token + (int64_t)g * shared * width, out = (int64_t)task * shared * width;
            int64_t start = row[i] * kv_row + g * kv_group;
            switch (width) {
                CALL(8) CALL(16) CALL(32) CALL(64) CALL(80) CALL(96) CALL(128) CALL(256)
                default: failed = 2;
            }
        }
        free(s);
    }
    return failed;
}

/* x [tokens, width] becomes x + a where there is an a; y is the norm of it times w [width] */
void add_norm(void *x, const void *a, const void *w, void *y, int tokens, int width, float eps, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t at = (int64_t)i * width;
        if (rounded) {
            if (a != NULL) add_bf16((bf16 *)x + at, (const bf16 *)a + at, width);
            norm_bf16((const bf16 *)x + at, w, (bf16 *)y + at, width, eps);
        } else {
            if (a != NULL) add_float((float *)x + at, (const float *)a + at, width);
            norm_float((const float *)x + at, w, (float *)y + at, width, eps);
        }
    }
}

/* y [tokens, width] from gu [tokens, 2 width], gates before what they let through */
void gate(const void *gu, void *y, int tokens, int width, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t to = (int64_t)i * width, from = 2 * to;
        if (rounded)
            gate_bf16((const bf16 *)gu + from, (const bf16 *)gu + from + width, (bf16 *)y + to, width);
        else
            gate_float((const float *)gu + from, (const float *)gu + from + width, (float *)y + to, width);
    }
}

#define PART 256 /* weights whose sums are searched first */
#define NOTHING 1e-35f /* such a weight, or sum of a part, cannot be drawn: exp_below gives no 0 */

/* the weights of a part's logits in their place, and their sum */
static inline float weights(float *e, int count, float top, float factor) {
    float sum = 0.0f;
    for (int c = 0; c < count; c++) {
        e[c] = exp_below((e[c] - top) * factor);
        sum += e[c];
    }
    return sum;
}

#define DRAW(TYPE, FROM)                                                                                              \
    /* a part's logits, and how many they are */                                                                      \
    static inline int logits_##TYPE(const TYPE *z, const float *bias, float *x, int at, int width) {                  \
        int count = width - at < PART ? width - at : PART;                                                            \
        for (int c = 0; c < count; c++) x[c] = FROM(z[at + c]);                                                       \
        if (bias != NULL)                                                                                             \
            for (int c = 0; c < count; c++) x[c] += bias[at + c];                                                     \
        return count;                                                                                                 \
    }                                                                                                                 \
    static void draw_##TYPE(const TYPE *z, const float *bias, float u, int64_t *drawn, float *logprob, float *sums,   \
                            int width, float factor) {                                                                \
        float top = -FLT_MAX, e[PART], total = 0.0f;                                                                  \
        uint32_t largest = 0, nan = NOT_A_NUMBER;                                                                     \
        int parts = (width + PART - 1) / PART, part = 0, last = 0;                                                    \
        for (int p = 0; p < parts; p++) {                                                                             \
            int count = logits_##TYPE(z, bias, e, p * PART, width);                                                   \
            for (int c = 0; c < count; c++) {                                                                         \
                uint32_t size = bits_of(e[c]) & 0x7fffffffu;                                                          \
                top = e[c] > top ? e[c] : top;                                                                        \
                largest = size > largest ? size : largest;                                                            \
            }                                                                                                         \
        }                                                                                                             \
        if (largest > INFINITE || bits_of(top) == INFINITE || top == -FLT_MAX) { /* NaN, or nothing to choose from */ \
            *drawn = 0;                                                                                               \
            memcpy(logprob, &nan, 4);                                                                                 \
            return;                                                                                                   \
        }                                                                                                             \
        for (int p = 0; p < parts; p++) {                                                                             \
            int count = logits_##TYPE(z, bias, e, p * PART, width);                                                   \
            total += sums[p] = weights(e, count, top, factor);                                                        \
        }                                                                                                             \
        float before = 0.0f, wanted = u * total;                                                                      \
        for (int p = 0; p < parts; p++) { /* the last part that adds anything, where rounding leaves none */          \
            if (sums[p] <= NOTHING) continue;                                                                         \
            part = p;                                                                                                 \
            if (before + sums[p] > wanted) break;                                                                     \
            before += sums[p];                                                                                        \
        }                                                                                                             \
        int count = logits_##TYPE(z, bias, e, part * PART, width);                                                    \
        weights(e, count, top, factor);                                                                               \
        for (int c = 0; c < count; c++) {                                                                             \
            if (e[c] <= NOTHING) continue;                                                                            \
            last = c;                                                                                                 \
            before += e[c];                                                                                           \
            if (before > wanted) break;                                                                               \
        }                                                                                                             \
        *drawn = part * PART + last;                                                                                  \
        *logprob = logf(e[last]) - logf(total);                                                                       \
    }

DRAW(bf16, from_bf16)
DRAW(float, from_float)

/* z [rows, width], bias [width] or NULL, u, drawn, logprobs [rows]; sums is scratch, [rows, parts] */
void draw(const void *z, const float *bias, const float *u, int64_t *drawn, float *logprobs, float *sums, int rows,
          int width, float temperature, int rounded, int threads) {
    int parts = (width + PART - 1) / PART;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int i = 0; i < rows; i++) {
        int64_t at = (int64_t)i * width;
        float *own = sums + (int64_t)i * parts;
        if (rounded)
            draw_bf16((const bf16 *)z + at, bias, u[i], drawn + i, logprobs + i, own, width, 1.0f / temperature);
        else
            draw_float((const float *)z + at, bias, u[i], drawn + i, logprobs + i, own, width, 1.0f / temperature);
    }
}
