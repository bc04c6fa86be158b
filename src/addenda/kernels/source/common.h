// What all kernels share: sixteen floats as one value, bfloat16, exp, and the loop over threads.
// GCC's and Clang's vector extensions turn v16 into whatever the machine has: one AVX-512 register, two AVX, four NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
static inline int threads() { return omp_get_max_threads(); }
#else
static inline int threads() { return 1; }
#endif

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16v __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));

struct bf16 {
    uint16_t bits;
};

static inline v16 load(const float* p) { return *reinterpret_cast<const v16*>(p); }
static inline void store(float* p, v16 x) { *reinterpret_cast<v16*>(p) = x; }
static inline v16 load(const bf16* p) {
    u16v wide = __builtin_convertvector(*reinterpret_cast<const h16*>(p), u16v) << 16;
    return (v16)wide;
}
// Rounds to nearest, ties to even, as PyTorch does; a not-a-number stays one.
static inline void store(bf16* p, v16 x) {
    u16v bits = (u16v)x;
    u16v rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u16v nan = (u16v)((bits & 0x7fffffff) > 0x7f800000);
    rounded = (nan & 0x7fc0) | (~nan & rounded);
    *reinterpret_cast<h16*>(p) = __builtin_convertvector(rounded, h16);
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

// Less zero, not plus zero: that would make +0 of -0, and cost an addition.
static inline v16 all(float x) { return x - v16{}; }
static inline v16 largest(v16 a, v16 b) { return a > b ? a : b; }
static inline v16 smallest(v16 a, v16 b) { return a < b ? a : b; }
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef float v4 __attribute__((vector_size(16), aligned(4)));
template <class Op>
static inline float folded(v16 x, Op op) {
    float lanes[16];
    std::memcpy(lanes, &x, 64);
    v8 low, high;
    std::memcpy(&low, lanes, 32);
    std::memcpy(&high, lanes + 8, 32);
    v8 eight = op(low, high);
    std::memcpy(lanes, &eight, 32);
    v4 left, right;
    std::memcpy(&left, lanes, 16);
    std::memcpy(&right, lanes + 4, 16);
    v4 four = op(left, right);
    v4 swapped = {four[2], four[3], four[0], four[1]};
    four = op(four, swapped);
    v4 turned = {four[1], four[0], four[3], four[2]};
    return op(four, turned)[0];
}
static inline float sum(v16 x) {
    return folded(x, [](auto a, auto b) { return a + b; });
}
static inline float highest(v16 x) {
    return folded(x, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to within 2 units in the last place; 0 below -87, infinity above 88.7; a not-a-number stays one.
// Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial, the power of two by its exponent bits.
static inline v16 exponential(v16 x) {
    v16 within = smallest(largest(x, all(-88.0f)), all(89.0f));
    v16 shifted = within * 1.44269504f + 12582912.0f;
    i16v n = (i16v)shifted - 0x4b400000;
    v16 whole = shifted - 12582912.0f;
    v16 r = within - whole * 0.693359375f + whole * 2.12194440e-4f;
    v16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // In two steps, so that 2^128 does not overflow where the result would not.
    i16v half = n >> 1;
    v16 result = p * (v16)((half + 127) << 23) * (v16)((n - half + 127) << 23);
    result = x < -87.0f ? all(0.0f) : result;
    return x == x ? result : x;
}
