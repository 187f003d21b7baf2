/* What training does between its matrix products. Built, loaded and checked by kernels.py.

   softmax: of a row of logits z, with x = (z - max z) / temperature and e = exp(x):
   log p = x_chosen - log sum e,   H = log sum e - sum(e x) / sum e,   slope = sum e * dH / dx = -e (x - log sum e + H) */

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
        uint32_t largest = 0, nan = 0x7fc00000u;                                                                      \
        for (int c = 0; c < width; c++) {                                                                             \
            float logit = FROM(z[c]);                                                                                 \
            uint32_t size = bits_of(logit) & 0x7fffffffu;                                                             \
            top = logit > top ? logit : top;                                                                          \
            largest = size > largest ? size : largest;                                                                \
        }                                                                                                             \
        if (largest > INFINITE) { /* a NaN among the logits must come out */                                          \
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
