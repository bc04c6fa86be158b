// The middle of an MLP: act(x), or act(gate) * up where it is gated (Shazeer 2020), and its backward in one pass.
#include "common.h"

enum { SILU = 0, GELU_TANH = 1, GELU = 2 };

struct Activated {
    v16 value, slope;
};

INLINE v16 sigmoid(v16 x) { return 1.0f / (1.0f + exponential(-x)); }

// x times the normal distribution's share below x. The share below -|x| is exp(-x^2 / 2) t p(t) / 2 with
// t = 1 / (1 + |x| / sqrt(8)); p, of degree 8, was fitted to exp(z^2) erfc(z) / t for z in 0..10, to 5e-8 of its value.
INLINE Activated gelu(v16 x) {
    v16 t = 1.0f / (1.0f + size(x) * 0.35355339f);
    v16 p = -0.059069216f;
    p = p * t + 0.28457617f;
    p = p * t - 0.48720230f;
    p = p * t + 0.27806979f;
    p = p * t - 0.026627385f;
    p = p * t + 0.20268755f;
    p = p * t + 0.24310360f;
    p = p * t + 0.28237529f;
    p = p * t + 0.28208642f;
    v16 bell = exponential(x * x * -0.5f), tail = bell * t * p * 0.5f;
    v16 share = choose(x < 0.0f, tail, 1.0f - tail);
    return {x * share, share + x * bell * 0.39894228f};
}

template <int KIND>
INLINE Activated activated(v16 x) {
    if (KIND == SILU) {
        v16 s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    if (KIND == GELU) return gelu(x);
    // x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3) is the same as x (1 + tanh u) / 2.
    v16 s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    return {x * s, s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x)};
}

template <int KIND, class T>
static void forward(const T* gate, const T* up, T* y, long n) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 16) store(y + i, activated<KIND>(load(gate + i)).value * load(up + i));
}

// `y` is made again beside the gradients: whoever multiplied it by a weight needs it, and so nobody keeps it.
template <int KIND, class T>
static void backward(const T* gate, const T* up, const T* g, T* grad_gate, T* grad_up, T* y, long n) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 16) {
        Activated a = activated<KIND>(load(gate + i));
        v16 grad = load(g + i), other = load(up + i);
        if (y) store(y + i, a.value * other);
        store(grad_gate + i, grad * other * a.slope);
        store(grad_up + i, grad * a.value);
    }
}

template <int KIND, class T>
static void alone(const T* x, const T* g, T* y, long n) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < n; i += 16) {
        Activated a = activated<KIND>(load(x + i));
        store(y + i, g ? load(g + i) * a.slope : a.value);
    }
}

// `kind` chooses among SILU, GELU_TANH and GELU; `g` is null where the value is asked for, else the gradient is.
#define EXPORTS(NAME, T)                                                                                          \
    extern "C" void activation_##NAME(const T* x, const T* g, T* y, int64_t n, int64_t kind) {                    \
        decltype(&alone<0, T>) run[] = {alone<SILU, T>, alone<GELU_TANH, T>, alone<GELU, T>};                     \
        run[kind](x, g, y, n);                                                                                    \
    }                                                                                                             \
    extern "C" void gated_forward_##NAME(const T* gate, const T* up, T* y, int64_t n, int64_t kind) {             \
        decltype(&forward<0, T>) run[] = {forward<SILU, T>, forward<GELU_TANH, T>, forward<GELU, T>};             \
        run[kind](gate, up, y, n);                                                                                \
    }                                                                                                             \
    extern "C" void gated_backward_##NAME(const T* gate, const T* up, const T* g, T* grad_gate, T* grad_up, T* y, \
                                          int64_t n, int64_t kind) {                                              \
        decltype(&backward<0, T>) run[] = {backward<SILU, T>, backward<GELU_TANH, T>, backward<GELU, T>};         \
        run[kind](gate, up, g, grad_gate, grad_up, y, n);                                                         \
    }
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)
