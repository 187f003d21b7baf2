/* Numbers of the C sources: bf16 or float32 in memory, float32 in between. The compiler may assume that none is NaN
   (-ffast-math), so where one may come its bits are looked at. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INFINITE 0x7f800000u /* without the sign; what is above is NaN */
#define NOT_A_NUMBER 0x7fc00000u

static inline float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline bf16 to_bf16(float y) { /* to the nearest, ties to even */
    uint32_t bits = bits_of(y), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > INFINITE ? NOT_A_NUMBER >> 16 : rounded);
}

static inline float from_float(float x) { return x; }
static inline float to_float(float x) { return x; }

/* exp(x) for x <= 0: 2^n (1 + r + ... + r^6 / 720) with x = n ln 2 + r, off by less than 3e-7 of its value */
static inline float exp_below(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = (float)(int32_t)(x * 1.44269504f - 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f);
    y = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * y)));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

/* 1 / (1 + exp(-x)) */
static inline float sigmoid(float x) {
    float e = exp_below(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}
