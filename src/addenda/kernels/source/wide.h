// Sixteen numbers as one value, whatever the machine's registers hold: one of AVX-512, two of AVX2, four of NEON.
// GCC's own vectors of that size will not do: where they are wider than a register it takes them apart badly, a
// comparison number by number.
#pragma once
// A product and a sum may become one operation, without the rounding between them, where EXACT is not defined before.
#if defined(__clang__) && defined(EXACT)
#pragma clang fp contract(off)
#elif defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(EXACT)
#pragma GCC optimize("fp-contract=off")
#endif
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// What is passed to a function that is not taken in lies in memory.
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define REGISTER 64
#elif defined(__AVX2__)
#define REGISTER 32
#else
#define REGISTER 16
#endif

template <class T>
struct Wide {
    typedef T Part __attribute__((vector_size(REGISTER), aligned(4)));
    enum { LANES = REGISTER / 4, PARTS = 64 / REGISTER };
    Part part[PARTS];

    Wide() = default;
    // Less zero, not plus zero: that would make +0 of -0, and cost an addition.
    Wide(T x) {
        for (Part& p : part) p = x - Part{};
    }
    // The same bits.
    template <class From>
    explicit Wide(const Wide<From>& x) {
        for (int i = 0; i < PARTS; i++) part[i] = (Part)x.part[i];
    }
    T operator[](int i) const { return part[i / LANES][i % LANES]; }
};

typedef Wide<float> v16;
typedef Wide<int32_t> i16v;
typedef Wide<uint32_t> u16v;

#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 64 / REGISTER; i++)
#define BETWEEN(OP, T)                                 \
    INLINE Wide<T> operator OP(Wide<T> a, Wide<T> b) { \
        EACH a.part[i] = a.part[i] OP b.part[i];       \
        return a;                                      \
    }                                                  \
    INLINE Wide<T>& operator OP##=(Wide<T>& a, Wide<T> b) { return a = a OP b; }
#define COMPARED(OP, T)                                         \
    INLINE i16v operator OP(Wide<T> a, Wide<T> b) {             \
        i16v is;                                                \
        EACH is.part[i] = (i16v::Part)(a.part[i] OP b.part[i]); \
        return is;                                              \
    }
#define NUMBERS(T)                        \
    BETWEEN(+, T)                         \
    BETWEEN(-, T)                         \
    BETWEEN(*, T)                         \
    COMPARED(<, T)                        \
    COMPARED(>, T)                        \
    COMPARED(>=, T)                       \
    COMPARED(==, T)                       \
    INLINE Wide<T> operator-(Wide<T> a) { \
        EACH a.part[i] = -a.part[i];      \
        return a;                         \
    }
#define BITS(T)                           \
    BETWEEN(&, T)                         \
    BETWEEN(|, T)                         \
    BETWEEN(<<, T)                        \
    BETWEEN(>>, T)                        \
    INLINE Wide<T> operator~(Wide<T> a) { \
        EACH a.part[i] = ~a.part[i];      \
        return a;                         \
    }
NUMBERS(float)
BETWEEN(/, float)
NUMBERS(int32_t)
NUMBERS(uint32_t)
BITS(int32_t)
BITS(uint32_t)

// By the bits of a comparison.
template <class T>
INLINE Wide<T> choose(i16v mask, Wide<T> yes, Wide<T> no) {
    EACH yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
    return yes;
}
INLINE v16 largest(v16 a, v16 b) { return choose(a > b, a, b); }
INLINE v16 smallest(v16 a, v16 b) { return choose(a < b, a, b); }
INLINE v16 size(v16 x) { return v16(u16v(x) & 0x7fffffff); }
INLINE v16 floats(i16v x) {
    v16 y;
    EACH y.part[i] = __builtin_convertvector(x.part[i], v16::Part);
    return y;
}
INLINE v16 floats(u16v x) { return floats(i16v(x)); }
// Towards zero.
INLINE i16v integers(v16 x) {
    i16v y;
    EACH y.part[i] = __builtin_convertvector(x.part[i], i16v::Part);
    return y;
}
template <class T>
INLINE Wide<T> loaded(const T* p) {
    Wide<T> x;
    EACH x.part[i] = *reinterpret_cast<const typename Wide<T>::Part*>(p + i * Wide<T>::LANES);
    return x;
}
template <class T>
INLINE void stored(T* p, Wide<T> x) {
    EACH *reinterpret_cast<typename Wide<T>::Part*>(p + i * Wide<T>::LANES) = x.part[i];
}
INLINE i16v places() {
    static const int32_t PLACES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return loaded(PLACES);
}

// Sixteen small numbers, widened and narrowed; GCC 12 goes number by number where it is not told the instruction.
template <class From>
INLINE i16v widened(const From* p) {
    typedef From Few __attribute__((vector_size(sizeof(From) * i16v::LANES), aligned(1)));
    i16v x;
    EACH x.part[i] = __builtin_convertvector(*reinterpret_cast<const Few*>(p + i * i16v::LANES), i16v::Part);
    return x;
}
#if defined(__AVX512F__)
INLINE __m128i sixteen(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE i16v widened(const uint8_t* p) {
    i16v x;
    x.part[0] = (i16v::Part)_mm512_cvtepu8_epi32(sixteen(p));
    return x;
}
INLINE i16v widened(const int8_t* p) {
    i16v x;
    x.part[0] = (i16v::Part)_mm512_cvtepi8_epi32(sixteen(p));
    return x;
}
#elif defined(__AVX2__)
INLINE __m128i eight(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
INLINE i16v widened(const uint8_t* p) {
    i16v x;
    EACH x.part[i] = (i16v::Part)_mm256_cvtepu8_epi32(eight(p + 8 * i));
    return x;
}
INLINE i16v widened(const int8_t* p) {
    i16v x;
    EACH x.part[i] = (i16v::Part)_mm256_cvtepi8_epi32(eight(p + 8 * i));
    return x;
}
INLINE i16v widened(const uint16_t* p) {
    i16v x;
    EACH x.part[i] = (i16v::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
    return x;
}
#endif
// Numbers that fit.
template <class To>
INLINE void narrowed(To* p, u16v x) {
#if defined(__AVX512F__)
    typedef To Few __attribute__((vector_size(sizeof(To) * 16), aligned(1)));
    *reinterpret_cast<Few*>(p) = __builtin_convertvector(x.part[0], Few);
#elif defined(__AVX2__)
    __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)x.part[0], (__m256i)x.part[1]), 0xd8);
    if (sizeof(To) == 2) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
    } else {
        __m128i few = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), few);
    }
#else
    uint32_t each[16];
    stored(each, x);
    for (int i = 0; i < 16; i++) p[i] = To(each[i]);
#endif
}
// Of sixteen numbers that of each index.
INLINE v16 picked(const float* table, u16v index) {
    v16 y;
#if defined(__AVX512F__)
    y.part[0] = (v16::Part)_mm512_permutexvar_ps((__m512i)index.part[0], _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    EACH y.part[i] = (v16::Part)_mm256_i32gather_ps(table, (__m256i)index.part[i], 4);
#else
    float each[16];
    for (int i = 0; i < 16; i++) each[i] = table[index[i]];
    y = loaded(each);
#endif
    return y;
}

// The parts are put together by halves, so that the order of a sum does not depend on the machine.
template <class Op>
INLINE float folded(v16 x, Op op) {
    typedef float Eight __attribute__((vector_size(32), aligned(4)));
    typedef float Four __attribute__((vector_size(16), aligned(4)));
    float lanes[16];
    stored(lanes, x);
#if REGISTER >= 32
    Eight low, high;
    std::memcpy(&low, lanes, 32);
    std::memcpy(&high, lanes + 8, 32);
    Eight eight = op(low, high);
    std::memcpy(lanes, &eight, 32);
#else
    for (int i = 0; i < 8; i++) lanes[i] = op(lanes[i], lanes[i + 8]);
#endif
    Four left, right;
    std::memcpy(&left, lanes, 16);
    std::memcpy(&right, lanes + 4, 16);
    Four four = op(left, right);
    Four swapped = {four[2], four[3], four[0], four[1]};
    four = op(four, swapped);
    Four turned = {four[1], four[0], four[3], four[2]};
    return op(four, turned)[0];
}
INLINE float sum(v16 x) {
    return folded(x, [](auto a, auto b) { return a + b; });
}
INLINE float highest(v16 x) {
    return folded(x, [](auto a, auto b) { return a > b ? a : b; });
}
