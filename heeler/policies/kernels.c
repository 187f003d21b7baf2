/* What training does between its matrix products. Built, loaded and checked by kernels.py.

   softmax: of a row of logits z, with x = (z - max z) / temperature and e = exp(x):
   log p = x_chosen - log sum e,   H = log sum e - sum(e x) / sum e,   slope = sum e * dH / dx = -e (x - log sum e + H)

   The others are the parts of a layer (llama.py has the formulas), forwards and backwards. x is the states that layers
   add to, in bf16 or float32; numbers of products are in the products' type; gradients of states are float32. */

#include "numbers.h"

#define PART 256 /* logits that are taken at once */

#define SOFTMAX(TYPE, FROM, TO)                                                                                       \
    /* x and exp(x) of logits */                                                                                      \
    static inline void part_##TYPE(const TYPE *z, float *x, float *y, int count, float top, float factor) {           \
        for (int c = 0; c < count; c++) {                                                                             \
            x[c] = (FROM(z[c]) - top) * factor;                                                                       \
            x[c] = x[c] < -87.0f ? -87.0f : x[c];                                                                     \
            y[c] = exp_below(x[c]);                                                                                   \
        }                                                                                                             \
    }                                                                                                                 \
    static void softmax_##TYPE(const TYPE *z, TYPE *e, TYPE *slope, int64_t chosen, float *logprob, float *entropy,   \
                               float *sum, int width, float factor) {                                                 \
        float top = -FLT_MAX, total = 0.0f, weighted = 0.0f, of_chosen = FROM(z[chosen]), x[PART], y[PART];           \
        uint32_t largest = 0, nan = NOT_A_NUMBER;                                                                     \
        for (int c = 0; c < width; c++) {                                                                             \
            float logit = FROM(z[c]);                                                                                 \
            uint32_t size = bits_of(logit) & 0x7fffffffu;                                                             \
            top = logit > top ? logit : top;                                                                          \
            largest = size > largest ? size : largest;                                                                \
        }                                                                                                             \
        if (largest > INFINITE || bits_of(top) == INFINITE || top == -FLT_MAX) { /* NaN, or nothing to choose from */ \
            memcpy(logprob, &nan, 4);                                                                                 \
            memcpy(entropy, &nan, 4);                                                                                 \
            memcpy(sum, &nan, 4);                                                                                     \
            return;                                                                                                   \
        }                                                                                                             \
        for (int at = 0; at < width; at += PART) {                                                                    \
            int count = width - at < PART ? width - at : PART;                                                        \
            part_##TYPE(z + at, x, y, count, top, factor);                                                            \
            for (int c = 0; c < count; c++) {                                                                         \
                total += y[c];                                                                                        \
                weighted += y[c] * x[c];                                                                              \
            }                                                                                                         \
            if (e != NULL && slope == NULL)                                                                           \
                for (int c = 0; c < count; c++) e[at + c] = TO(y[c]);                                                 \
        }                                                                                                             \
        float rest = logf(total), h = rest - weighted / total;                                                        \
        if (slope != NULL)                                                                                            \
            for (int at = 0; at < width; at += PART) {                                                                \
                int count = width - at < PART ? width - at : PART;                                                    \
                part_##TYPE(z + at, x, y, count, top, factor);                                                        \
                for (int c = 0; c < count; c++) slope[at + c] = TO(y[c] * (rest - h - x[c]));                         \
                if (e != NULL)                                                                                        \
                    for (int c = 0; c < count; c++) e[at + c] = TO(y[c]);                                             \
            }                                                                                                         \
        *logprob = (of_chosen - top) * factor - rest;                                                                 \
        *entropy = h;                                                                                                 \
        *sum = total;                                                                                                 \
        if (e != NULL) e[chosen] = TO(0.0f);                                                                          \
    }

SOFTMAX(bf16, from_bf16, to_bf16)
SOFTMAX(float, from_float, to_float)

/* z [rows, width]; e, which may be z, and slope the same, or NULL; tokens, logprobs, entropies, sums [rows]. e gets 0 where
   a row's token is */
void softmax(const void *z, void *e, void *slope, const int64_t *tokens, float *logprobs, float *entropies, float *sums,
             int rows, int width, float temperature, int rounded, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
    for (int i = 0; i < rows; i++) {
        int64_t at = (int64_t)i * width;
        if (rounded)
            softmax_bf16((const bf16 *)z + at, e == NULL ? NULL : (bf16 *)e + at, slope == NULL ? NULL : (bf16 *)slope + at,
                         tokens[i], logprobs + i, entropies + i, sums + i, width, 1.0f / temperature);
        else
            softmax_float((const float *)z + at, e == NULL ? NULL : (float *)e + at,
                          slope == NULL ? NULL : (float *)slope + at, tokens[i], logprobs + i, entropies + i, sums + i, width,
                          1.0f / temperature);
    }
}

int omp_get_thread_num(void);

/* X is the type of states, P that of products */
#define STATES(NAME, X, FROM_X, TO_X, P, FROM_P, TO_P)                                                                \
    static inline float scale_##NAME(const X *x, int width, float eps) { /* 1 / rms(x) */                             \
        float sum = 0.0f;                                                                                             \
        for (int d = 0; d < width; d++) sum += FROM_X(x[d]) * FROM_X(x[d]);                                           \
        return 1.0f / sqrtf(sum / (float)width + eps);                                                                \
    }                                                                                                                 \
    static void add_norm_##NAME(const X *x, const P *a, const float *w, X *y, P *n, int width, float eps) {           \
        if (a != NULL) {                                                                                              \
            for (int d = 0; d < width; d++) y[d] = TO_X(FROM_X(x[d]) + FROM_P(a[d]));                                 \
            x = y;                                                                                                    \
        }                                                                                                             \
        float r = scale_##NAME(x, width, eps);                                                                        \
        for (int d = 0; d < width; d++) n[d] = TO_P(FROM_X(x[d]) * r * w[d]);                                         \
    }                                                                                                                 \
    static void norm_back_##NAME(const P *restrict dn, const X *restrict x, const float *restrict w,                  \
                                 const float *restrict dz, float *restrict dx, P *restrict rounded, P *restrict n,    \
                                 float *restrict dw, int width, float eps) {                                          \
        float r = scale_##NAME(x, width, eps), mean = 0.0f;                                                           \
        for (int d = 0; d < width; d++) mean += FROM_P(dn[d]) * FROM_X(x[d]) * w[d];                                  \
        mean *= r / (float)width;                                                                                     \
        for (int d = 0; d < width; d++) {                                                                             \
            float h = FROM_X(x[d]) * r, g = FROM_P(dn[d]), v = r * (g * w[d] - h * mean) + dz[d];                     \
            dw[d] += g * h;                                                                                           \
            dx[d] = v;                                                                                                \
            rounded[d] = TO_P(v);                                                                                     \
            n[d] = TO_P(h * w[d]);                                                                                    \
        }                                                                                                             \
    }

STATES(single, float, from_float, to_float, float, from_float, to_float)
STATES(mixed, float, from_float, to_float, bf16, from_bf16, to_bf16)
STATES(half, bf16, from_bf16, to_bf16, bf16, from_bf16, to_bf16)

/* x, a or NULL, y, n [tokens, width], w [width]; y = x + a where there is an a, n the norm of it (else of x) times w */
void add_norm(const void *x, const void *a, const float *w, void *y, void *n, int tokens, int width, float eps, int small,
              int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t at = (int64_t)i * width;
        if (small)
            add_norm_half((const bf16 *)x + at, a == NULL ? NULL : (const bf16 *)a + at, w, (bf16 *)y + at, (bf16 *)n + at,
                          width, eps);
        else if (rounded)
            add_norm_mixed((const float *)x + at, a == NULL ? NULL : (const bf16 *)a + at, w, (float *)y + at,
                           (bf16 *)n + at, width, eps);
        else
            add_norm_single((const float *)x + at, a == NULL ? NULL : (const float *)a + at, w, (float *)y + at,
                            (float *)n + at, width, eps);
    }
}

/* From dn, the gradient of n = norm(x) * w, and dz, what reaches x besides: dx, the same in the products' type, n, and
   [threads, width] parts of dw, which are 0 before */
void norm_back(const void *dn, const void *x, const float *w, const float *dz, float *dx, void *dx_rounded, void *n,
               float *dw, int tokens, int width, float eps, int small, int rounded, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < tokens; i++) {
        int64_t at = (int64_t)i * width;
        float *own = dw + (int64_t)omp_get_thread_num() * width;
        if (small)
            norm_back_half((const bf16 *)dn + at, (const bf16 *)x + at, w, dz + at, dx + at, (bf16 *)dx_rounded + at,
                           (bf16 *)n + at, own, width, eps);
        else if (rounded)
            norm_back_mixed((const bf16 *)dn + at, (const float *)x + at, w, dz + at, dx + at, (bf16 *)dx_rounded + at,
                            (bf16 *)n + at, own, width, eps);
        else
            norm_back_single((const float *)dn + at, (const float *)x + at, w, dz + at, dx + at, (float *)dx_rounded + at,
                             (float *)n + at, own, width, eps);
    }
}

#define GATE(TYPE, FROM, TO)                                                                                          \
    static void gate_##TYPE(const TYPE *restrict g, const TYPE *restrict u, TYPE *restrict a, int width) {            \
        for (int d = 0; d < width; d++) a[d] = TO(FROM(g[d]) * sigmoid(FROM(g[d])) * FROM(u[d]));                     \
    }                                                                                                                 \
    static void gate_back_##TYPE(const TYPE *restrict da, const TYPE *restrict g, const TYPE *restrict u,             \
                                 TYPE *restrict dg, TYPE *restrict du, TYPE *restrict a, int width) {                 \
        for (int d = 0; d < width; d++) {                                                                             \
            float x = FROM(g[d]), up = FROM(u[d]), of = FROM(da[d]), s = sigmoid(x);                                  \
            dg[d] = TO(of * up * s * (1.0f + x * (1.0f - s)));                                                        \
            du[d] = TO(of * x * s);                                                                                   \
            a[d] = TO(x * s * up);                                                                                    \
        }                                                                                                             \
    }

GATE(bf16, from_bf16, to_bf16)
GATE(float, from_float, to_float)

/* a [tokens, width] = silu(g) * u from gu [tokens, 2 width] */
void gate(const void *gu, void *a, int tokens, int width, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t to = (int64_t)i * width, from = 2 * to;
        if (rounded)
            gate_bf16((const bf16 *)gu + from, (const bf16 *)gu + from + width, (bf16 *)a + to, width);
        else
            gate_float((const float *)gu + from, (const float *)gu + from + width, (float *)a + to, width);
    }
}

/* dgu and, once more, a; from da and gu */
void gate_back(const void *da, const void *gu, void *dgu, void *a, int tokens, int width, int rounded, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < tokens; i++) {
        int64_t to = (int64_t)i * width, from = 2 * to;
        if (rounded)
            gate_back_bf16((const bf16 *)da + to, (const bf16 *)gu + from, (const bf16 *)gu + from + width,
                           (bf16 *)dgu + from, (bf16 *)dgu + from + width, (bf16 *)a + to, width);
        else
            gate_back_float((const float *)da + to, (const float *)gu + from, (const float *)gu + from + width,
                            (float *)dgu + from, (float *)dgu + from + width, (float *)a + to, width);
    }
}

/* Attention of short rows: all matrices of a head lie in the processor's cache. Sums are of 16 columns at once. */

typedef float columns __attribute__((vector_size(64), aligned(4)));

enum { WHOLE, LOWER_OUT, LOWER_LEFT, UPPER_LEFT }; /* which entries of a square matrix are not 0: those of c or a */

static inline __attribute__((always_inline)) void tile(const float *a, int64_t a_row, int64_t a_column, const float *b,
                                                       int64_t b_row, float *c, int64_t c_row, int first, int inner,
                                                       const int rows, const int wide) {
    columns sum[6][2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++) sum[i][j] = *(columns *)(c + i * c_row + 16 * j);
    for (int k = first; k < inner; k++)
        for (int j = 0; j < wide; j++) {
            columns right = *(const columns *)(b + k * b_row + 16 * j);
            for (int i = 0; i < rows; i++) sum[i][j] += a[i * a_row + k * a_column] * right;
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < wide; j++) *(columns *)(c + i * c_row + 16 * j) = sum[i][j];
}

/* c [rows, width] += a [rows, inner] b [inner, width]; a by any strides, width a multiple of 16 */
static void add_product(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c,
                        int64_t c_row, int rows, int inner, int width, int shape) {
    for (int i = 0; i < rows; i += 6) {
        int left = rows - i < 6 ? rows - i : 6, first = shape == UPPER_LEFT ? i : 0;
        int last = shape == LOWER_LEFT && i + left < inner ? i + left : inner;
        int end = shape == LOWER_OUT && i + left < width ? i + left : width;
        for (int j = 0; j < end; j += 32) {
            const float *from = a + i * a_row, *with = b + j;
            float *to = c + i * c_row + j;
#define TILE(ROWS)                                                                                                    \
    case ROWS:                                                                                                        \
        if (j + 16 < end)                                                                                             \
            tile(from, a_row, a_column, with, b_row, to, c_row, first, last, ROWS, 2);                                \
        else                                                                                                          \
            tile(from, a_row, a_column, with, b_row, to, c_row, first, last, ROWS, 1);                                \
        break;
            switch (left) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) }
        }
    }
}

static void transpose(const float *x, float *y, int rows, int width, int y_row) { /* y [width, y_row], the rest 0 */
    memset(y, 0, sizeof(float) * (size_t)width * (size_t)y_row);
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < width; d++) y[d * y_row + i] = x[i * width + d];
}

/* s [length, wide] becomes the weights: softmax over the columns that a row sees, 0 elsewhere; all where it sees none */
static void weights(float *s, const uint8_t *seen, int length, int wide) {
    for (int i = 0; i < length; i++) {
        float *row = s + i * wide, top = -FLT_MAX, total = 0.0f;
        int end = seen == NULL ? i + 1 : length;
        if (seen != NULL) {
            int any = 0;
            for (int c = 0; c < end; c++) any |= seen[i * length + c];
            for (int c = 0; c < end; c++) row[c] = any && !seen[i * length + c] ? -1e30f : row[c];
        }
        uint32_t largest = 0, nan = NOT_A_NUMBER;
        for (int c = 0; c < end; c++) {
            uint32_t size = bits_of(row[c]) & 0x7fffffffu;
            top = row[c] > top ? row[c] : top;
            largest = size > largest ? size : largest;
        }
        if (largest > INFINITE) { /* must come out */
            for (int c = 0; c < wide; c++) memcpy(row + c, &nan, 4);
            continue;
        }
        for (int c = 0; c < end; c++) total += row[c] = exp_below(row[c] - top);
        total = 1.0f / total;
        for (int c = 0; c < end; c++) row[c] = row[c] < 1e-37f ? 0.0f : row[c] * total;
        for (int c = end; c < wide; c++) row[c] = 0.0f;
    }
}

#define HEADS(TYPE, FROM, TO)                                                                                         \
    /* y [length, width] of a head of x, tokens `token` apart; rotated where there is a cos, then times `factor` */   \
    static void take_##TYPE(const TYPE *x, int64_t token, const float *cos, const float *sin, float *y, int length,   \
                            int width, float factor) {                                                                \
        int half = width / 2;                                                                                         \
        for (int i = 0; i < length; i++, x += token, y += width) {                                                    \
            if (cos == NULL) {                                                                                        \
                for (int d = 0; d < width; d++) y[d] = FROM(x[d]);                                                    \
                continue;                                                                                             \
            }                                                                                                         \
            for (int d = 0; d < half; d++) {                                                                          \
                float p = FROM(x[d]), q = FROM(x[d + half]);                                                          \
                y[d] = factor * (p * cos[d] - q * sin[d]);                                                            \
                y[d + half] = factor * (q * cos[d + half] + p * sin[d + half]);                                       \
            }                                                                                                         \
            cos += width;                                                                                             \
            sin += width;                                                                                             \
        }                                                                                                             \
    }                                                                                                                 \
    /* the way back of a gradient */                                                                                  \
    static void give_##TYPE(const float *y, TYPE *x, int64_t token, const float *cos, const float *sin, int length,   \
                            int width, float factor) {                                                                \
        int half = width / 2;                                                                                         \
        for (int i = 0; i < length; i++, x += token, y += width) {                                                    \
            if (cos == NULL) {                                                                                        \
                for (int d = 0; d < width; d++) x[d] = TO(y[d]);                                                      \
                continue;                                                                                             \
            }                                                                                                         \
            for (int d = 0; d < half; d++) {                                                                          \
                float p = factor * y[d], q = factor * y[d + half];                                                    \
                x[d] = TO(p * cos[d] + q * sin[d + half]);                                                            \
                x[d + half] = TO(q * cos[d + half] - p * sin[d]);                                                     \
            }                                                                                                         \
            cos += width;                                                                                             \
            sin += width;                                                                                             \
        }                                                                                                             \
    }                                                                                                                 \
    /* One row and group: qkv, and dqkv and go where gradients are wanted, of the row; out [length, heads * width] */ \
    static void row_##TYPE(const TYPE *qkv, const float *cos, const float *sin, const uint8_t *seen, TYPE *out,       \
                           const TYPE *go, TYPE *dqkv, float *room, int length, int groups, int shared, int width,    \
                           int g, float scale) {                                                                      \
        int wide = (length + 15) & ~15, heads = groups * shared, shape = seen == NULL;                                \
        int64_t token = (int64_t)(heads + 2 * groups) * width, size = (int64_t)length * width;                        \
        float *k = room, *v = k + size, *q = v + size, *o = q + size, *turned = o + size;                             \
        float *s = turned + (int64_t)width * wide, *dk = s + (int64_t)length * wide, *dv = dk + size, *dq = dv + size; \
        float *d = dq + size, *across = d + size, *ds = across + (int64_t)width * wide;                               \
        int64_t at_k = (int64_t)(heads + g) * width, at_v = (int64_t)(heads + groups + g) * width;                    \
        take_##TYPE(qkv + at_k, token, cos, sin, k, length, width, 1.0f);                                             \
        take_##TYPE(qkv + at_v, token, NULL, NULL, v, length, width, 1.0f);                                           \
        transpose(k, turned, length, width, wide);                                                                    \
        if (dqkv != NULL) {                                                                                           \
            transpose(v, across, length, width, wide);                                                                \
            memset(dk, 0, sizeof(float) * 2 * (size_t)size);                                                          \
        }                                                                                                             \
        for (int h = g * shared; h < (g + 1) * shared; h++) {                                                         \
            take_##TYPE(qkv + (int64_t)h * width, token, cos, sin, q, length, width, scale);                          \
            memset(s, 0, sizeof(float) * (size_t)length * (size_t)wide);                                              \
            add_product(q, width, 1, turned, wide, s, wide, length, width, wide, shape ? LOWER_OUT : WHOLE);          \
            weights(s, seen, length, wide);                                                                           \
            memset(o, 0, sizeof(float) * (size_t)size);                                                               \
            add_product(s, wide, 1, v, width, o, width, length, length, width, shape ? LOWER_LEFT : WHOLE);           \
            give_##TYPE(o, out + (int64_t)h * width, (int64_t)heads * width, NULL, NULL, length, width, 1.0f);        \
            if (dqkv == NULL) continue;                                                                               \
            take_##TYPE(go + (int64_t)h * width, (int64_t)heads * width, NULL, NULL, d, length, width, 1.0f);         \
            memset(ds, 0, sizeof(float) * (size_t)length * (size_t)wide);                                             \
            add_product(d, width, 1, across, wide, ds, wide, length, width, wide, shape ? LOWER_OUT : WHOLE);         \
            add_product(s, 1, wide, d, width, dv, width, length, length, width, shape ? UPPER_LEFT : WHOLE);          \
            for (int i = 0; i < length; i++) {                                                                        \
                float mean = 0.0f;                                                                                    \
                for (int c = 0; c < wide; c++) mean += s[i * wide + c] * ds[i * wide + c];                            \
                for (int c = 0; c < wide; c++) ds[i * wide + c] = s[i * wide + c] * (ds[i * wide + c] - mean);        \
            }                                                                                                         \
            memset(dq, 0, sizeof(float) * (size_t)size);                                                              \
            add_product(ds, wide, 1, k, width, dq, width, length, length, width, shape ? LOWER_LEFT : WHOLE);         \
            add_product(ds, 1, wide, q, width, dk, width, length, length, width, shape ? UPPER_LEFT : WHOLE);         \
            give_##TYPE(dq, dqkv + (int64_t)h * width, token, cos, sin, length, width, scale);                        \
        }                                                                                                             \
        if (dqkv == NULL) return;                                                                                     \
        give_##TYPE(dk, dqkv + at_k, token, cos, sin, length, width, 1.0f);                                           \
        give_##TYPE(dv, dqkv + at_v, token, NULL, NULL, length, width, 1.0f);                                         \
    }

HEADS(bf16, from_bf16, to_bf16)
HEADS(float, from_float, to_float)

/* qkv [rows, length, (groups * shared + 2 groups) * width]; cos, sin [rows, length, width]; seen [rows, length, length],
   1 where a token (first length) sees another, or NULL where it sees those before it and itself; out [rows, length,
   groups * shared * width]. With go, the gradient of out, dqkv gets that of qkv; both may be NULL. width is a multiple of
   16. 1 where there is no memory */
int rows(const void *qkv, const float *cos, const float *sin, const uint8_t *seen, void *out, const void *go, void *dqkv,
         int count, int length, int groups, int shared, int width, float scale, int rounded, int threads) {
    int failed = 0, wide = (length + 15) & ~15, heads = groups * shared;
    int64_t token = (int64_t)(heads + 2 * groups) * width, of_out = (int64_t)length * heads * width;
#pragma omp parallel num_threads(threads)
    {
        size_t size = 8 * (size_t)length * (size_t)width + 2 * (size_t)wide * (size_t)(width + length);
        float *room = malloc(sizeof(float) * size);
        if (room == NULL) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int task = 0; task < count * groups; task++) {
            if (room == NULL) continue;
            int b = task / groups, g = task % groups;
            int64_t at = b * length * token, turn = (int64_t)b * length * width, to = b * of_out;
            const uint8_t *own = seen == NULL ? NULL : seen + (int64_t)b * length * length;
            if (rounded)
                row_bf16((const bf16 *)qkv + at, cos + turn, sin + turn, own, (bf16 *)out + to,
                         go == NULL ? NULL : (const bf16 *)go + to, dqkv == NULL ? NULL : (bf16 *)dqkv + at, room, length,
                         groups, shared, width, g, scale);
            else
                row_float((const float *)qkv + at, cos + turn, sin + turn, own, (float *)out + to,
                          go == NULL ? NULL : (const float *)go + to, dqkv == NULL ? NULL : (float *)dqkv + at, room, length,
                          groups, shared, width, g, scale);
        }
        free(room);
    }
    return failed;
}
