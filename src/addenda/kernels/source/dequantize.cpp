// Packed weights to numbers: whole rows of raw blocks, for GGUF's formats, NF4 and rowwise int8.
// The bits are those of the PyTorch forms in bases/formats. A fused multiply-add changes none of them: a half-precision
// scale times a group's integer scale times a code needs at most 24 bits, so each product is exact before the sum.
#include "common.h"
#include "half.h"
#include "normal.h"

INLINE v16 signed_codes(const uint8_t* p) { return floats(widened(reinterpret_cast<const int8_t*>(p))); }
INLINE u16v codes(const uint8_t* p) { return u16v(widened(p)); }
static inline float single(const uint8_t* p) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
}
static inline uint32_t word(const uint8_t* p) {
    uint32_t x;
    std::memcpy(&x, p, 4);
    return x;
}

// ------------------------------------------------------------------------------------------- blocks of 32, one scale

struct Q4_0 {
    enum { WEIGHTS = 32, BYTES = 18 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p);
        u16v q = codes(p + 2);
        store(out, d * (floats(q & 15) - 8.0f));
        store(out + 16, d * (floats(q >> 4) - 8.0f));
    }
};
struct Q4_1 {
    enum { WEIGHTS = 32, BYTES = 20 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p), m = half(p + 2);
        u16v q = codes(p + 4);
        store(out, d * floats(q & 15) + m);
        store(out + 16, d * floats(q >> 4) + m);
    }
};
struct Q5_0 {
    enum { WEIGHTS = 32, BYTES = 22 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p);
        u16v q = codes(p + 6), fifth = word(p + 2);
        store(out, d * (floats((q & 15) | (fifth >> u16v(places()) & 1) << 4) - 16.0f));
        store(out + 16, d * (floats(q >> 4 | (fifth >> (u16v(places()) + 16) & 1) << 4) - 16.0f));
    }
};
struct Q5_1 {
    enum { WEIGHTS = 32, BYTES = 24 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p), m = half(p + 2);
        u16v q = codes(p + 8), fifth = word(p + 4);
        store(out, d * floats((q & 15) | (fifth >> u16v(places()) & 1) << 4) + m);
        store(out + 16, d * floats(q >> 4 | (fifth >> (u16v(places()) + 16) & 1) << 4) + m);
    }
};
struct Q8_0 {
    enum { WEIGHTS = 32, BYTES = 34 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p);
        store(out, d * signed_codes(p + 2));
        store(out + 16, d * signed_codes(p + 18));
    }
};

// --------------------------------------------------------------------- blocks of 256, a scale for each 16 or 32 in it

struct Q2_K {
    enum { WEIGHTS = 256, BYTES = 84 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        float d = half(p + 80), least = half(p + 82);
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            u16v q = codes(p + 16 + group / 8 * 32 + group % 2 * 16) >> (group % 8 / 2 * 2) & 3;
            v16 scale = d * float(p[group] & 15), m = least * float(p[group] >> 4);
            store(out + 16 * group, scale * floats(q) - m);
        }
    }
};
struct Q3_K {
    enum { WEIGHTS = 256, BYTES = 110 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        const uint8_t* scales = p + 96;
        float d = half(p + 108);
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            int low = scales[group % 8] >> (group / 8 * 4) & 15, high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
            u16v q = codes(p + 32 + group / 8 * 32 + group % 2 * 16) >> (group % 8 / 2 * 2) & 3;
            u16v third = codes(p + group % 2 * 16) >> (group / 2) & 1;
            store(out + 16 * group, d * float((low | high << 4) - 32) * (floats(q | third << 2) - 4.0f));
        }
    }
};

// The eight scales and eight least values of Q4_K and Q5_K, six bits each in twelve bytes.
struct Sixes {
    float scale[8], least[8];
};
static inline Sixes sixes(const uint8_t* p, float d, float least) {
    Sixes s;
    for (int i = 0; i < 4; i++) {
        s.scale[i] = d * float(p[i] & 63);
        s.least[i] = least * float(p[i + 4] & 63);
        s.scale[i + 4] = d * float((p[i + 8] & 15) | (p[i] >> 6) << 4);
        s.least[i + 4] = least * float(p[i + 8] >> 4 | (p[i + 4] >> 6) << 4);
    }
    return s;
}
struct Q4_K {
    enum { WEIGHTS = 256, BYTES = 144 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        Sixes s = sixes(p + 4, half(p), half(p + 2));
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {  // 16 bytes give 16 weights of an even group and 16 of the odd one
            int even = part / 2 * 2, at = part % 2 * 16;
            u16v q = codes(p + 16 + 16 * part);
            store(out + 32 * even + at, s.scale[even] * floats(q & 15) - s.least[even]);
            store(out + 32 * even + 32 + at, s.scale[even + 1] * floats(q >> 4) - s.least[even + 1]);
        }
    }
};
struct Q5_K {
    enum { WEIGHTS = 256, BYTES = 176 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        Sixes s = sixes(p + 4, half(p), half(p + 2));
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            int even = part / 2 * 2, at = part % 2 * 16;
            u16v q = codes(p + 48 + 16 * part), fifth = codes(p + 16 + at) >> even;
            v16 low = floats((q & 15) | (fifth & 1) << 4), high = floats(q >> 4 | (fifth >> 1 & 1) << 4);
            store(out + 32 * even + at, s.scale[even] * low - s.least[even]);
            store(out + 32 * even + 32 + at, s.scale[even + 1] * high - s.least[even + 1]);
        }
    }
};
struct Q6_K {
    enum { WEIGHTS = 256, BYTES = 210 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        float d = half(p + 208);
#pragma GCC unroll 16
        for (int group = 0; group < 16; group++) {
            int side = group / 8, in = group % 8;
            u16v low = codes(p + 64 * side + in % 4 * 16) >> (in / 4 * 4) & 15;
            u16v high = codes(p + 128 + 32 * side + in % 2 * 16) >> (in / 2 * 2) & 3;
            v16 scale = d * float(int8_t(p[192 + group]));
            store(out + 16 * group, scale * (floats(low | high << 4) - 32.0f));
        }
    }
};

// ------------------------------------------------------------------------------------------- codes that name a number

static const float UNEVEN[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL {
    enum { WEIGHTS = 32, BYTES = 18 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 d = half(p);
        u16v q = codes(p + 2);
        store(out, d * picked(UNEVEN, q & 15));
        store(out + 16, d * picked(UNEVEN, q >> 4));
    }
};
struct IQ4_XS {
    enum { WEIGHTS = 256, BYTES = 136 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        float d = half(p);
        int high = p[2] | p[3] << 8;
#pragma GCC unroll 8
        for (int group = 0; group < 8; group++) {
            int scale = (p[4 + group / 2] >> (group % 2 * 4) & 15) | (high >> (2 * group) & 3) << 4;
            v16 factor = d * float(scale - 32);
            u16v q = codes(p + 8 + 16 * group);
            store(out + 32 * group, factor * picked(UNEVEN, q & 15));
            store(out + 32 * group + 16, factor * picked(UNEVEN, q >> 4));
        }
    }
};

struct NF4 {
    enum { WEIGHTS = 64, BYTES = 36 };
    template <class T>
    static inline void block(const uint8_t* p, T* out) {
        v16 absmax = single(p);
        uint8_t each[64];
        for (int i = 0; i < 32; i++) {
            each[2 * i] = p[4 + i] >> 4;  // the first of two in the upper half
            each[2 * i + 1] = p[4 + i] & 15;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16) store(out + i, picked(NORMAL, codes(each + i)) * absmax);
    }
};

template <class Format, class T>
static void blocks(const uint8_t* raw, T* out, long rows, long row_bytes, long d_in) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < d_in / Format::WEIGHTS; i++)
            Format::block(raw + row * row_bytes + i * Format::BYTES, out + row * d_in + i * Format::WEIGHTS);
}

// A row is the largest magnitude in it, then one signed byte for each weight.
template <class T>
static void int8_rows(const uint8_t* raw, T* out, long rows, long row_bytes, long d_in) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const uint8_t* p = raw + row * row_bytes;
        float absmax = single(p), part = 1.0f / 127.0f;
        long i = 0;
        for (; i + 16 <= d_in; i += 16) store(out + row * d_in + i, signed_codes(p + 4 + i) * absmax * part);
        for (; i < d_in; i++) put(out + row * d_in + i, float(int8_t(p[4 + i])) * absmax * part);
    }
}

#define EXPORT(NAME, DECODE)                                                                                          \
    extern "C" void dequantize_##NAME##_float32(const uint8_t* raw, float* out, int64_t rows, int64_t row_bytes,      \
                                                int64_t d_in) {                                                       \
        DECODE(raw, out, rows, row_bytes, d_in);                                                                      \
    }                                                                                                                 \
    extern "C" void dequantize_##NAME##_bfloat16(const uint8_t* raw, bf16* out, int64_t rows, int64_t row_bytes,      \
                                                 int64_t d_in) {                                                      \
        DECODE(raw, out, rows, row_bytes, d_in);                                                                      \
    }
EXPORT(Q4_0, blocks<Q4_0>)
EXPORT(Q4_1, blocks<Q4_1>)
EXPORT(Q5_0, blocks<Q5_0>)
EXPORT(Q5_1, blocks<Q5_1>)
EXPORT(Q8_0, blocks<Q8_0>)
EXPORT(Q2_K, blocks<Q2_K>)
EXPORT(Q3_K, blocks<Q3_K>)
EXPORT(Q4_K, blocks<Q4_K>)
EXPORT(Q5_K, blocks<Q5_K>)
EXPORT(Q6_K, blocks<Q6_K>)
EXPORT(IQ4_NL, blocks<IQ4_NL>)
EXPORT(IQ4_XS, blocks<IQ4_XS>)
EXPORT(NF4, blocks<NF4>)
EXPORT(INT8, int8_rows)
