// Numbers in half precision, two bytes anywhere in memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// Without a multiplication, which would lose subnormal numbers where a thread flushes them to zero.
static inline float half(const uint8_t* p) {
    uint32_t bits = p[0] | uint32_t(p[1]) << 8, sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31;
    uint32_t fraction = bits & 1023;
    if (exponent == 0) return std::copysign(float(fraction) * 0x1p-24f, sign ? -1.0f : 1.0f);
    bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// To half precision: nearest, ties to even; beyond its range infinity.
static inline void half(uint8_t* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, made;
    if (size >= 0x477ff000) {
        made = 0x7c00;
    } else if (size < 0x38800000) {  // subnormal: one half has as its last place what such a number counts in
        float shifted;
        std::memcpy(&shifted, &size, 4);
        shifted += 0.5f;
        std::memcpy(&made, &shifted, 4);
        made -= 0x3f000000;
    } else {
        made = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
    }
    made |= sign;
    p[0] = uint8_t(made);
    p[1] = uint8_t(made >> 8);
}
