// Numbers to Q4_K and Q5_K, whose scales are searched for: the arithmetic of ggml's reference (make_qkx2_quants and
// quantize_row_q*_K_ref), on several groups of 32 weights at once, a group to a lane. Each lane adds in the reference's
// order, and nothing may be contracted, so that the bytes are the same as long as ggml was compiled without that too.
#define EXACT
#include "common.h"
#include "half.h"

enum { GROUP = 32, GROUPS = 8, BLOCK = GROUP * GROUPS, LANES = 16, TOGETHER = LANES / GROUPS };

INLINE v16 root(v16 x) {
    float each[16];
    stored(each, x);
    for (float& one : each) one = std::sqrt(one);
    return loaded(each);
}
// To the nearest integer, ties to even, by the last bits of a large number; what is too large for that wraps round.
INLINE i16v whole(v16 x) { return (i16v(x + 12582912.0f) & 0x007fffff) - 0x00400000; }
static inline int whole(float x) {
    int32_t bits;
    x += 12582912.0f;
    std::memcpy(&bits, &x, 4);
    return (bits & 0x007fffff) - 0x00400000;
}
template <int MOST>
INLINE v16 code(v16 scaled) {
    i16v found = whole(scaled), most = MOST;
    found = choose(found < most, found, most);
    return floats(choose(found > 0, found, i16v(0)));
}
template <int MOST>
static inline uint8_t code(float scaled) {
    int found = whole(scaled);
    found = found < MOST ? found : MOST;
    return uint8_t(found > 0 ? found : 0);
}

// Scale and least number for each lane's group, chosen among roundings by the error that the best line through each
// leaves, weighted by magnitude; `by` and `from` tell how the codes of the chosen rounding came about.
struct Line {
    v16 scale, least, by, from;
};
template <int MOST>
static inline Line searched(const v16* x, float first, int steps) {
    v16 squares = 0.0f, weight[GROUP], codes[GROUP];
    for (int i = 0; i < GROUP; i++) squares += x[i] * x[i];
    v16 usual = root(squares / 32.0f);
    for (int i = 0; i < GROUP; i++) weight[i] = usual + size(x[i]);

    v16 least = x[0], top = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    for (int i = 1; i < GROUP; i++) {
        least = smallest(x[i], least);
        top = largest(x[i], top);
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    least = choose(least > 0.0f, v16(0.0f), least);
    i16v flat = top == least;
    v16 by = float(MOST) / (top - least), scale = 1.0f / by, error = 0.0f;
    Line best = {scale, least, by, least};
    for (int i = 0; i < GROUP; i++) {
        v16 off = scale * code<MOST>(by * (x[i] - least)) + least - x[i];
        error += weight[i] * (off * off);
    }
    for (int step = 0; step <= steps; step++) {
        v16 from = best.least, tried = (first + 0.1f * float(step) + float(MOST)) / (top - from);
        v16 sum_l = 0.0f, sum_l2 = 0.0f, sum_xl = 0.0f;
        for (int i = 0; i < GROUP; i++) {
            v16 l = codes[i] = code<MOST>(tried * (x[i] - from)), wl = weight[i] * l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        }
        v16 det = sum_w * sum_l2 - sum_l * sum_l;
        v16 slope = (sum_w * sum_xl - sum_x * sum_l) / det, start = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        i16v above = start > 0.0f;
        slope = choose(above, sum_xl / sum_l2, slope);
        start = choose(above, v16(0.0f), start);
        v16 found = 0.0f;
        for (int i = 0; i < GROUP; i++) {
            v16 off = slope * codes[i] + start - x[i];
            found += weight[i] * (off * off);
        }
        i16v better = (det > 0.0f) & (found < error) & ~flat;
        error = choose(better, found, error);
        best.by = choose(better, tried, best.by);
        best.from = choose(better, from, best.from);
        best.scale = choose(better, slope, best.scale);
        best.least = choose(better, start, best.least);  // which the next rounding starts from
    }
    best.scale = choose(flat, v16(0.0f), best.scale);
    best.by = choose(flat, v16(0.0f), best.by);
    return best;
}

// What was found for the groups of some blocks.
template <int MOST>
struct Groups {
    float x[GROUP][LANES], scale[LANES], less[LANES], by[LANES], from[LANES];

    Groups(const float* weights, int blocks, float first, int steps) {
        v16 lanes[GROUP];
        for (int i = 0; i < GROUP; i++) {
            for (int lane = 0; lane < LANES; lane++) x[i][lane] = lane < blocks * GROUPS ? weights[lane * GROUP + i] : 0.0f;
            lanes[i] = loaded(x[i]);
        }
        Line line = searched<MOST>(lanes, first, steps);
        stored(scale, line.scale);
        stored(less, -line.least);
        stored(by, line.by);
        stored(from, line.from);
    }

    static inline float most_of(const float* x) {
        float most = 0.0f;
        for (int j = 0; j < GROUPS; j++) most = x[j] > most ? x[j] : most;
        return most;
    }
    static inline unsigned six(float x) {
        unsigned found = whole(x) & 255;
        return found < 63 ? found : 63;
    }

    // Writes the scales of one block, 16 bytes, and gives its codes, (GROUP, GROUPS).
    void finish(int block, uint8_t* p, uint8_t (*codes)[GROUPS]) const {
        const int start = block * GROUPS;
        float most_scale = most_of(scale + start), most_less = most_of(less + start), unit[GROUPS], base[GROUPS];
        float scale_by = most_scale > 0.0f ? 63.0f / most_scale : 0.0f;
        float less_by = most_less > 0.0f ? 63.0f / most_less : 0.0f;
        uint8_t* packed = p + 4;
        half(p, most_scale / 63.0f);
        half(p + 2, most_less / 63.0f);
        for (int j = 0; j < GROUPS; j++) {
            unsigned s = six(scale_by * scale[start + j]), m = six(less_by * less[start + j]);
            if (j < 4) {
                packed[j] = uint8_t(s);
                packed[j + 4] = uint8_t(m);
            } else {
                packed[j + 4] = uint8_t((s & 15) | (m & 15) << 4);
                packed[j - 4] |= uint8_t(s >> 4 << 6);
                packed[j] |= uint8_t(m >> 4 << 6);
            }
            unit[j] = half(p) * float(s);
            base[j] = half(p + 2) * float(m);
        }
        for (int i = 0; i < GROUP; i++)
            for (int j = 0; j < GROUPS; j++) {
                float number = x[i][start + j], near = by[start + j] * (number - from[start + j]);
                // A group without a scale keeps the codes of the search.
                codes[i][j] = code<MOST>(unit[j] == 0.0f ? near : (number + base[j]) / unit[j]);
            }
    }
};

static inline void fours(uint8_t* p, const uint8_t (*codes)[GROUPS]) {
    for (int j = 0; j < GROUPS; j += 2)
        for (int i = 0; i < GROUP; i++) *p++ = uint8_t((codes[i][j] & 15) | codes[i][j + 1] << 4);
}

struct Q4_K {
    enum { MOST = 15, BYTES = 144, STEPS = 20 };
    static constexpr float FIRST = -1.0f;
    static inline void codes(uint8_t* p, const uint8_t (*codes)[GROUPS]) { fours(p, codes); }
};
struct Q5_K {
    enum { MOST = 31, BYTES = 176, STEPS = 15 };
    static constexpr float FIRST = -0.5f;
    static inline void codes(uint8_t* p, const uint8_t (*codes)[GROUPS]) {
        for (int i = 0; i < GROUP; i++) {
            unsigned bits = 0;
            for (int j = 0; j < GROUPS; j++) bits |= unsigned(codes[i][j] >> 4) << j;
            p[i] = uint8_t(bits);
        }
        fours(p + GROUP, codes);
    }
};

template <class Format>
static void search(const float* x, uint8_t* raw, long blocks) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < blocks; i += TOGETHER) {
        int some = blocks - i < TOGETHER ? int(blocks - i) : int(TOGETHER);
        Groups<Format::MOST> groups(x + i * BLOCK, some, Format::FIRST, Format::STEPS);
        for (int block = 0; block < some; block++) {
            uint8_t codes[GROUP][GROUPS], *p = raw + (i + block) * Format::BYTES;
            groups.finish(block, p, codes);
            Format::codes(p + 16, codes);
        }
    }
}

extern "C" void search_Q4_K_float32(const float* x, uint8_t* raw, int64_t blocks) { search<Q4_K>(x, raw, blocks); }
extern "C" void search_Q5_K_float32(const float* x, uint8_t* raw, int64_t blocks) { search<Q5_K>(x, raw, blocks); }
