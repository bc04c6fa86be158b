// Cross-entropy of each row of scores, and its gradient written over them; a row stays in a core's own cache.
#include "common.h"

// scores: (rows, v). nll[r] = log(sum exp(scores[r])) - scores[r, target]; first[r]: no other score is higher.
// With `gradient`, scores become softmax(scores) less one at the target.
template <class T>
static void cross_entropy(T* scores, const int64_t* targets, float* nll, uint8_t* first, long rows, long v,
                          bool gradient) {
#pragma omp parallel for schedule(dynamic, 4)
    for (long r = 0; r < rows; r++) {
        T* row = scores + r * v;
        long whole = v - v % 16;
        v16 peaks = -INFINITY, doubt = 0.0f;
        for (long c = 0; c < whole; c += 16) {
            v16 x = load(row + c);
            peaks = largest(x, peaks);
            doubt += x * 0.0f;  // a comparison passes a not-a-number over, a sum does not
        }
        float peak = highest(peaks);
        for (long c = whole; c < v; c++) peak = one(row + c) > peak ? one(row + c) : peak;
        v16 masses = 0.0f;
        for (long c = 0; c < whole; c += 16) masses += exponential(load(row + c) - peak);
        float mass = sum(masses) + sum(doubt), chosen = one(row + targets[r]);
        for (long c = whole; c < v; c++) mass += std::exp(one(row + c) - peak);
        nll[r] = std::log(mass) + peak - chosen;
        first[r] = chosen >= peak;
        if (!gradient) continue;
        float share = 1.0f / mass;
        float target_share = std::exp(chosen - peak) * share;
        for (long c = 0; c < whole; c += 16) store(row + c, exponential(load(row + c) - peak) * share);
        for (long c = whole; c < v; c++) put(row + c, std::exp(one(row + c) - peak) * share);
        put(row + targets[r], target_share - 1.0f);
    }
}

#define EXPORTS(NAME, T)                                                                                    \
    extern "C" void cross_entropy_##NAME(T* scores, const int64_t* targets, float* nll, uint8_t* first,     \
                                         int64_t rows, int64_t v, int64_t gradient) {                       \
        cross_entropy(scores, targets, nll, first, rows, v, gradient != 0);                                 \
    }
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)
