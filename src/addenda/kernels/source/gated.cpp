// The middle of a gated MLP: act(gate) * up (Shazeer 2020), and its backward in one pass.
#include "common.h"

enum { SILU = 0, GELU_TANH = 1 };

struct Activated {
    v16 value, slope;
};

static inline v16 sigmoid(v16 x) { return 1.0f / (1.0f + exponential(-x)); }

template <int KIND>
static inline Activated activated(v16 x) {
    if (KIND == SILU) {
        v16 s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
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

#define EXPORTS(NAME, T)                                                                                          \
    extern "C" void gated_forward_##NAME(const T* gate, const T* up, T* y, int64_t n, int64_t kind) {             \
        kind == SILU ? forward<SILU>(gate, up, y, n) : forward<GELU_TANH>(gate, up, y, n);                        \
    }                                                                                                             \
    extern "C" void gated_backward_##NAME(const T* gate, const T* up, const T* g, T* grad_gate, T* grad_up, T* y, \
                                          int64_t n, int64_t kind) {                                              \
        kind == SILU ? backward<SILU>(gate, up, g, grad_gate, grad_up, y, n)                                      \
                     : backward<GELU_TANH>(gate, up, g, grad_gate, grad_up, y, n);                                \
    }
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)
