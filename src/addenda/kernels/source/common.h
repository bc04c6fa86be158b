// What all kernels share: loading and storing sixteen numbers of either dtype, exp, and the number of threads.
#pragma once
#include <cmath>

#include "wide.h"
#ifdef _OPENMP
#include <omp.h>
static inline int threads() { return omp_get_max_threads(); }
#else
static inline int threads() { return 1; }
#endif

struct bf16 {
    uint16_t bits;
};

INLINE v16 load(const float* p) { return loaded(p); }
INLINE void store(float* p, v16 x) { stored(p, x); }
INLINE v16 load(const bf16* p) { return v16(widened(&p->bits) << 16); }
// Rounds to nearest, ties to even, as PyTorch does; a not-a-number stays one.
INLINE void store(bf16* p, v16 x) {
    u16v bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    narrowed(&p->bits, choose(i16v(bits & 0x7fffffff) > 0x7f800000, u16v(0x7fc0), rounded));
}
static inline float one(const float* p) { return *p; }
static inline float one(const bf16* p) {
    uint32_t bits = uint32_t(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// e^x to within 2 units in the last place; 0 below -87, infinity above 88.7; a not-a-number stays one.
// Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial, the power of two by its exponent bits.
INLINE v16 exponential(v16 x) {
    v16 within = smallest(largest(x, -88.0f), 89.0f);
    v16 shifted = within * 1.44269504f + 12582912.0f;
    i16v n = i16v(shifted) - 0x4b400000;
    v16 whole = shifted - 12582912.0f;
    v16 r = within - whole * 0.693359375f + whole * 2.12194440e-4f;
    v16 p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two steps, so that 2^128 does not overflow where the result would not.
    i16v half = n >> 1;
    v16 result = p * v16((half + 127) << 23) * v16((n - half + 127) << 23);
    result = choose(x < -87.0f, v16(0.0f), result);
    return choose(x == x, result, x);
}
