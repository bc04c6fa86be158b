// Numbers to packed weights: whole rows to raw blocks, for GGUF's formats with one scale for 32 weights, and NF4.
// The bytes are those of ggml's reference, which rounds every product before it adds: nothing here may be contracted.
#define EXACT
#include "common.h"
#include "half.h"
#include "normal.h"

// What a number is multiplied by in place of being divided; zero where nothing is to be told apart.
static inline float inverse(float d) { return d == 0.0f ? 0.0f : 1.0f / d; }
// A code: its whole part, up to `most`; zero where the product overflowed.
INLINE u16v code(v16 x, float most) {
    v16 held = choose(x < 256.0f, x, v16(0.0f));
    return u16v(integers(smallest(held, most)));
}
INLINE void fours(uint8_t* p, u16v a, u16v b) { narrowed(p, (a & 15) | (b & 15) << 4); }
// The fifth bit of 32 codes, one bit each.
INLINE void fifths(uint8_t* p, u16v a, u16v b) {
    uint32_t each[32], total = 0;
    stored(each, a >> 4 & 1);
    stored(each + 16, b >> 4 & 1);
    for (int i = 0; i < 32; i++) total |= each[i] << i;
    std::memcpy(p, &total, 4);
}
INLINE float largest_of(v16 a, v16 b) { return highest(largest(a, b)); }
// The number of largest magnitude with its sign; of several the first.
INLINE float extreme(const float* x, v16 a, v16 b) {
    float amax = largest_of(size(a), size(b));
    for (int i = 0; i < 32; i++)
        if (std::fabs(x[i]) == amax) return x[i];
    return 0.0f;
}

// Codes about zero: the extreme number gets the lowest code, -HALF.
template <int HALF>
struct Centred {
    u16v low, high;
    Centred(const float* x, uint8_t* p) {
        v16 a = load(x), b = load(x + 16);
        float d = extreme(x, a, b) / -HALF, by = inverse(d);
        half(p, d);
        low = code(a * by + (HALF + 0.5f), 2 * HALF - 1);
        high = code(b * by + (HALF + 0.5f), 2 * HALF - 1);
    }
};
// Codes from the least number up to the greatest, MOST.
template <int MOST>
struct Ranged {
    u16v low, high;
    Ranged(const float* x, uint8_t* p) {
        v16 a = load(x), b = load(x + 16);
        float least = -largest_of(-a, -b), d = (largest_of(a, b) - least) / MOST, by = inverse(d);
        half(p, d);
        half(p + 2, least);
        low = code((a - least) * by + 0.5f, MOST);
        high = code((b - least) * by + 0.5f, MOST);
    }
};

struct Q4_0 {
    enum { WEIGHTS = 32, BYTES = 18 };
    static inline void block(const float* x, uint8_t* p) {
        Centred<8> q(x, p);
        fours(p + 2, q.low, q.high);
    }
};
struct Q4_1 {
    enum { WEIGHTS = 32, BYTES = 20 };
    static inline void block(const float* x, uint8_t* p) {
        Ranged<15> q(x, p);
        fours(p + 4, q.low, q.high);
    }
};
struct Q5_0 {
    enum { WEIGHTS = 32, BYTES = 22 };
    static inline void block(const float* x, uint8_t* p) {
        Centred<16> q(x, p);
        fifths(p + 2, q.low, q.high);
        fours(p + 6, q.low, q.high);
    }
};
struct Q5_1 {
    enum { WEIGHTS = 32, BYTES = 24 };
    static inline void block(const float* x, uint8_t* p) {
        Ranged<31> q(x, p);
        fifths(p + 4, q.low, q.high);
        fours(p + 8, q.low, q.high);
    }
};
struct Q8_0 {
    enum { WEIGHTS = 32, BYTES = 34 };
    // Halves away from zero.
    INLINE u16v rounded(v16 x) {
        v16 part = size(x);
        part = choose(part < 256.0f, part, v16(0.0f));
        i16v whole = integers(part);
        whole -= (part - floats(whole)) >= 0.5f;
        return u16v(choose(x < 0.0f, -whole, whole)) & 255;
    }
    static inline void block(const float* x, uint8_t* p) {
        v16 a = load(x), b = load(x + 16);
        float d = largest_of(size(a), size(b)) / 127.0f, by = inverse(d);
        half(p, d);
        narrowed(p + 2, rounded(a * by));
        narrowed(p + 18, rounded(b * by));
    }
};

struct NF4 {
    enum { WEIGHTS = 64, BYTES = 36 };
    // The nearest level: as many as there are middles between two levels below the number.
    INLINE u16v nearest(v16 x) {
        i16v found = 0;
#pragma GCC unroll 15
        for (int i = 0; i < 15; i++) found -= x > (NORMAL[i + 1] + NORMAL[i]) / 2;
        return u16v(found);
    }
    static inline void block(const float* x, uint8_t* p) {
        v16 part[4];
        for (int i = 0; i < 4; i++) part[i] = size(load(x + 16 * i));
        float absmax = largest_of(largest(part[0], part[1]), largest(part[2], part[3]));
        std::memcpy(p, &absmax, 4);
        v16 by = absmax == 0.0f ? 1.0f : absmax;
        for (int i = 0; i < 4; i++) {
            u16v code = nearest(load(x + 16 * i) / by);
            for (int k = 0; k < 8; k++) p[4 + 8 * i + k] = uint8_t(code[2 * k] << 4 | code[2 * k + 1]);
        }
    }
};

template <class Format>
static void blocks(const float* x, uint8_t* raw, long rows, long row_bytes, long d_in) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < d_in / Format::WEIGHTS; i++)
            Format::block(x + row * d_in + i * Format::WEIGHTS, raw + row * row_bytes + i * Format::BYTES);
}

#define EXPORT(NAME)                                                                                                  \
    extern "C" void quantize_##NAME##_float32(const float* x, uint8_t* raw, int64_t rows, int64_t row_bytes,          \
                                              int64_t d_in) {                                                         \
        blocks<NAME>(x, raw, rows, row_bytes, d_in);                                                                  \
    }
EXPORT(Q4_0)
EXPORT(Q4_1)
EXPORT(Q5_0)
EXPORT(Q5_1)
EXPORT(Q8_0)
EXPORT(NF4)
