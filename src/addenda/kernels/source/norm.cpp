// RMS norm of rows: y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019), where w may be kept as w - 1.
#include "common.h"

template <class T>
INLINE v16 factor(const T* weight, long c, float offset) {
    return load(weight + c) + offset;
}

template <class T>
static void forward(const T* x, const T* weight, T* y, float* scale, long rows, long d, float eps, float offset) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * d;
        v16 squares = 0.0f;
        for (long c = 0; c < d; c += 16) squares += load(from + c) * load(from + c);
        float by = 1.0f / std::sqrt(sum(squares) / d + eps);
        scale[r] = by;
        for (long c = 0; c < d; c += 16) store(y + r * d + c, load(from + c) * by * factor(weight, c, offset));
    }
}

// With s the row's scale and h = g w: dx = s h - x s^3 mean(h x).
template <class T>
static void backward(const T* x, const T* weight, const float* scale, const T* g, T* dx, long rows, long d,
                     float offset) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const T *from = x + r * d, *grad = g + r * d;
        v16 pulls = 0.0f;
        for (long c = 0; c < d; c += 16) pulls += load(grad + c) * factor(weight, c, offset) * load(from + c);
        float by = scale[r], pull = sum(pulls) * by * by * by / d;
        for (long c = 0; c < d; c += 16)
            store(dx + r * d + c, load(grad + c) * factor(weight, c, offset) * by - load(from + c) * pull);
    }
}

#define EXPORTS(NAME, T)                                                                                         \
    extern "C" void rms_norm_forward_##NAME(const T* x, const T* weight, T* y, float* scale, int64_t rows,       \
                                            int64_t d, float eps, float offset) {                                \
        forward(x, weight, y, scale, rows, d, eps, offset);                                                      \
    }                                                                                                            \
    extern "C" void rms_norm_backward_##NAME(const T* x, const T* weight, const float* scale, const T* g, T* dx, \
                                             int64_t rows, int64_t d, float offset) {                            \
        backward(x, weight, scale, g, dx, rows, d, offset);                                                      \
    }
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)
