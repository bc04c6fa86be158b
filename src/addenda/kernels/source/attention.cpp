// Attention within each segment of a packed row, forward and backward, blocks of 64 queries by 64 keys.
//
// The forward keeps a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022), so nothing of the size
// queries x keys exists. The backward makes the weights again from the log-sum-exp the forward kept. All arithmetic is
// float32. Rotary positions are applied while queries and keys are read, so that rotated copies never exist either.
#include <algorithm>
#include <vector>

#include "product.h"

static const int BLOCK = 64;
static const float HIDDEN = -1e30f;  // finite: a block that a row does not see must not make infinity less infinity

struct Layer {
    int64_t heads, key_heads, d, d_v, rotated, segments;
    int64_t q_head, q_token, k_head, k_token, v_head, v_token, out_token;  // strides, in elements
    int64_t window;                                                       // 0: none
    int64_t causal;
    float scaling, softcap;  // softcap 0: none
};

struct Task {
    int segment, head, block;
    long work;
};

struct Plan {
    std::vector<long> first;  // first block of each segment, among all
    long blocks = 0;
};

static Plan plan_of(const int64_t* bounds, long segments) {
    Plan plan;
    for (long s = 0; s < segments; s++) {
        plan.first.push_back(plan.blocks);
        plan.blocks += (bounds[2 * s + 1] - bounds[2 * s] + BLOCK - 1) / BLOCK;
    }
    return plan;
}

struct Tokens {
    long from, count;
};

// The tokens of the row that a block, counted among those of all segments, holds.
static Tokens tokens_of(const Plan& plan, const int64_t* bounds, long block) {
    long s = std::upper_bound(plan.first.begin(), plan.first.end(), block) - plan.first.begin() - 1;
    long from = bounds[2 * s] + (block - plan.first[s]) * BLOCK;
    return {from, std::min((long)BLOCK, (long)bounds[2 * s + 1] - from)};
}

template <class T>
static void widen(float* to, const T* from, long n) {
    for (long i = 0; i < n; i += 16) store(to + i, load(from + i));
}

template <class T>
static void narrow(T* to, const float* from, long n, float factor) {
    for (long i = 0; i < n; i += 16) store(to + i, load(from + i) * factor);
}

// (x, y) -> (x cos - y sin, y cos + x sin), the pair being a number and the one half the rotated width behind it.
// `back` is the transpose of that. The rotated width is a multiple of 32.
template <class T>
static void rotate(float* x, const T* cos, const T* sin, long width, bool back) {
    long half = width / 2;
    for (long i = 0; i < half; i += 16) {
        v16 a = load(x + i), b = load(x + i + half);
        v16 own = load(cos + i), other = load(cos + i + half), up = load(sin + i), down = load(sin + i + half);
        store(x + i, back ? a * own + b * down : a * own - b * up);
        store(x + i + half, back ? b * other - a * up : b * other + a * down);
    }
}

// Rows `from` to `from + count` of one head as float32, scaled and rotated; BLOCK rows are filled up with zeros.
template <class T>
static void read_block(float* to, const T* x, long token, long from, long count, long d, const T* cos, const T* sin,
                       long rotated, float factor) {
    for (long i = 0; i < count; i++) {
        float* line = to + i * d;
        widen(line, x + (from + i) * token, d);
        if (rotated) rotate(line, cos + (from + i) * rotated, sin + (from + i) * rotated, rotated, false);
        if (factor != 1.0f)
            for (long c = 0; c < d; c += 16) store(line + c, load(line + c) * factor);
    }
    std::memset(to + count * d, 0, (BLOCK - count) * d * sizeof(float));
}

static void transpose(float* to, const float* from, long d) {
    for (long k = 0; k < d; k += 16)
        for (int i = 0; i < BLOCK; i += 16) {
            float lines[16][16];
            for (int r = 0; r < 16; r++) store(lines[r], load(from + (i + r) * d + k));
            for (int c = 0; c < 16; c++) {
                for (int r = 0; r < 16; r++) to[(k + c) * BLOCK + i + r] = lines[r][c];
            }
        }
}

INLINE v16 capped(v16 score, float cap) {
    v16 grown = exponential(score * (2.0f / cap));
    return cap - 2.0f * cap / (grown + 1.0f);
}

// Which keys of a block one query sees: from `low` up to, not including, `high`.
struct Span {
    long low, high;
};

static inline Span seen(const Layer& at, long query, long first_key, long keys) {
    long high = at.causal ? std::min(keys, query - first_key + 1) : keys;
    long low = at.window ? std::max(0L, query - (long)at.window + 1 - first_key) : 0;
    return {low, high};
}

static inline long first_block_seen(const Layer& at, long first_query) {
    return at.window ? std::max(0L, first_query - (long)at.window + 1) / BLOCK : 0;
}

// Whether each of sixteen keys, from the one at `first` on, is seen.
INLINE i16v visible(const Span& span, int first) {
    i16v place = places() + first;
    return (place < (int)span.high) & (place >= (int)span.low);
}

// Columns of a row group's scores that may be seen, in v16.
static inline int vectors_seen(const Layer& at, long last_query, long first_key) {
    if (!at.causal) return BLOCK / 16;
    long columns = std::min((long)BLOCK, last_query - first_key + 1);
    return columns <= 0 ? 0 : int((columns + 15) / 16);
}

template <class T>
static void pack_keys(const Layer& at, const T* x, long head_stride, long token, long d, const T* cos, const T* sin,
                      long rotated, const int64_t* bounds, const Plan& plan, float* plain, float* turned) {
    long total = at.key_heads * plan.blocks;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < total; item++) {
        long head = item / plan.blocks, block = item % plan.blocks;
        Tokens here = tokens_of(plan, bounds, block);
        long from = here.from, count = here.count;
        std::vector<float> own(plain ? 0 : BLOCK * d);
        float* lines = plain ? plain + item * BLOCK * d : own.data();
        read_block(lines, x + head * head_stride, token, from, count, d, cos, sin, rotated, 1.0f);
        if (turned) transpose(turned + item * BLOCK * d, lines, d);
    }
}

// One block of queries of one head against all keys it sees.
template <class T>
static void attend_block(const Layer& at, const Task& task, const int64_t* bounds, const Plan& plan, const T* q,
                         const T* cos, const T* sin, const float* keys, const float* values, T* out, float* log_sums,
                         long tokens, std::vector<float>& space) {
    long d = at.d, d_v = at.d_v, start = bounds[2 * task.segment], length = bounds[2 * task.segment + 1] - start;
    long first = (long)task.block * BLOCK, count = std::min((long)BLOCK, length - first);
    long groups = (count + ROWS - 1) / ROWS;
    space.resize(BLOCK * (d + d_v + BLOCK + 2));
    float *query = space.data(), *total = query + BLOCK * d, *scores = total + BLOCK * d_v,
          *most = scores + BLOCK * BLOCK, *mass = most + BLOCK;
    read_block(query, q + task.head * at.q_head, at.q_token, start + first, count, d, cos, sin, at.rotated, at.scaling);
    std::fill(total, total + BLOCK * d_v, 0.0f);
    std::fill(most, most + BLOCK, HIDDEN);
    std::fill(mass, mass + BLOCK, 0.0f);
    long own = (task.head / (at.heads / at.key_heads)) * plan.blocks + plan.first[task.segment];
    long last = at.causal ? task.block : (length - 1) / BLOCK;
    for (long j = first_block_seen(at, first); j <= last; j++) {
        long first_key = j * BLOCK, here = std::min((long)BLOCK, length - first_key);
        const float* key = keys + (own + j) * BLOCK * d;
        const float* value = values + (own + j) * BLOCK * d_v;
        for (long g = 0; g < groups; g++) {
            long r0 = g * ROWS;
            int vecs = vectors_seen(at, first + r0 + ROWS - 1, first_key);
            strip(scores + r0 * BLOCK, BLOCK, query + r0 * d, d, 1, key, BLOCK, d, vecs, false);
            for (long r = r0; r < r0 + ROWS; r++) {
                float* row = scores + r * BLOCK;
                Span span = seen(at, first + r, first_key, here);
                v16 peak = HIDDEN;
                for (int v = 0; v < vecs; v++) {
                    v16 x = load(row + 16 * v);
                    if (at.softcap != 0.0f) x = capped(x, at.softcap);
                    x = choose(visible(span, 16 * v), x, v16(HIDDEN));
                    store(row + 16 * v, x);
                    peak = largest(x, peak);
                }
                float highest_now = std::max(most[r], highest(peak));
                float shrink = std::exp(most[r] - highest_now);
                most[r] = highest_now;
                v16 added = 0.0f;
                for (int v = 0; v < vecs; v++) {
                    v16 p = exponential(load(row + 16 * v) - highest_now);
                    store(row + 16 * v, p);
                    added += p;
                }
                mass[r] = mass[r] * shrink + sum(added);
                if (shrink != 1.0f)
                    for (long c = 0; c < d_v; c += 16)
                        store(total + r * d_v + c, load(total + r * d_v + c) * shrink);
            }
            strip(total + r0 * d_v, d_v, scores + r0 * BLOCK, BLOCK, 1, value, d_v, 16L * vecs, int(d_v / 16), true);
        }
    }
    for (long r = 0; r < count; r++) {
        long token = start + first + r;
        narrow(out + token * at.out_token + task.head * d_v, total + r * d_v, d_v, 1.0f / mass[r]);
        log_sums[task.head * tokens + token] = most[r] + std::log(mass[r]);
    }
}

template <class T>
static void forward(const Layer& at, const int64_t* bounds, long tokens, const T* q, const T* k, const T* v,
                    const T* cos, const T* sin, T* out, float* log_sums) {
    Plan plan = plan_of(bounds, at.segments);
    std::vector<Task> tasks;
    for (int s = 0; s < at.segments; s++) {
        long length = bounds[2 * s + 1] - bounds[2 * s];
        for (int b = 0; b * BLOCK < length; b++)
            for (int h = 0; h < at.heads; h++) tasks.push_back({s, h, b, at.causal ? b + 1 : length});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
    static thread_local std::vector<float> kept;
    long lines = at.key_heads * plan.blocks * BLOCK;
    kept.resize(lines * (at.d + at.d_v));
    float *keys = kept.data(), *values = keys + lines * at.d;
#pragma omp parallel
    {
        static thread_local std::vector<float> space;
        pack_keys(at, k, at.k_head, at.k_token, at.d, cos, sin, at.rotated, bounds, plan, (float*)nullptr, keys);
        pack_keys(at, v, at.v_head, at.v_token, at.d_v, cos, sin, 0, bounds, plan, values, (float*)nullptr);
#pragma omp for schedule(dynamic)
        for (long t = 0; t < (long)tasks.size(); t++)
            attend_block(at, tasks[t], bounds, plan, q, cos, sin, keys, values, out, log_sums, tokens, space);
    }
    if (kept.size() > (64u << 18)) std::vector<float>().swap(kept);
}

struct Packed {
    const float *keys, *keys_turned, *values_turned;
};

// With P the weights and g the gradient of the output: dV = P'g, dS = P (gV' - g.out), dQ = dS K, dK = dS'Q.
// Everything that one head of one segment adds; `added` says that dK and dV already hold what another head made.
template <class T>
static void backward_head(const Layer& at, const Task& task, const int64_t* bounds, const Plan& plan, const T* q,
                          const T* cos, const T* sin, const Packed& packed, const T* out, const float* log_sums,
                          const T* grad, long tokens, T* grad_q, float* grad_keys, float* grad_values, bool added,
                          std::vector<float>& space) {
    long d = at.d, d_v = at.d_v, start = bounds[2 * task.segment], length = bounds[2 * task.segment + 1] - start;
    long blocks = (length + BLOCK - 1) / BLOCK, lines = blocks * BLOCK, first = plan.first[task.segment];
    space.resize(lines * (2 * d + d_v + 2) + 2 * BLOCK * BLOCK);
    float *query = space.data(), *grad_query = query + lines * d, *g = grad_query + lines * d, *mean = g + lines * d_v,
          *logs = mean + lines, *weights = logs + lines, *inner = weights + BLOCK * BLOCK;
    std::fill(grad_query, grad_query + lines * d, 0.0f);
    for (long i = 0; i < blocks; i++) {
        long from = start + i * BLOCK, count = std::min((long)BLOCK, length - i * BLOCK);
        read_block(query + i * BLOCK * d, q + task.head * at.q_head, at.q_token, from, count, d, cos, sin, at.rotated,
                   at.scaling);
        read_block(g + i * BLOCK * d_v, grad + task.head * d_v, at.out_token, from, count, d_v, cos, sin, 0, 1.0f);
    }
    for (long t = 0; t < lines; t++) {
        v16 total = 0.0f;
        const T* answer = out + (start + t) * at.out_token + task.head * d_v;
        if (t < length)
            for (long c = 0; c < d_v; c += 16) total += load(answer + c) * load(g + t * d_v + c);
        mean[t] = sum(total);
        logs[t] = t < length ? log_sums[task.head * tokens + start + t] : 0.0f;
    }
    long shared = (task.head / (at.heads / at.key_heads)) * plan.blocks + first;
    for (long j = 0; j < blocks; j++) {
        const float* key = packed.keys + (shared + j) * BLOCK * d;
        const float* key_turned = packed.keys_turned + (shared + j) * BLOCK * d;
        const float* value_turned = packed.values_turned + (shared + j) * BLOCK * d_v;
        float *grad_key = grad_keys + j * BLOCK * d, *grad_value = grad_values + j * BLOCK * d_v;
        long first_key = j * BLOCK, here = std::min((long)BLOCK, length - first_key);
        bool fresh = added;
        for (long i = at.causal ? j : 0; i < blocks; i++) {
            if (at.window && i * BLOCK - (first_key + BLOCK - 1) >= (long)at.window) break;
            bool diagonal = at.causal && i == j;
            const float *query_now = query + i * BLOCK * d, *g_now = g + i * BLOCK * d_v;
            for (long r0 = 0; r0 < BLOCK; r0 += ROWS) {
                int vecs = vectors_seen(at, i * BLOCK + r0 + ROWS - 1, first_key);
                strip(weights + r0 * BLOCK, BLOCK, query_now + r0 * d, d, 1, key_turned, BLOCK, d, vecs, false);
                strip(inner + r0 * BLOCK, BLOCK, g_now + r0 * d_v, d_v, 1, value_turned, BLOCK, d_v, vecs, false);
                for (long r = r0; r < r0 + ROWS; r++) {
                    long t = i * BLOCK + r;
                    Span span = seen(at, t, first_key, here);
                    float *row = weights + r * BLOCK, *slope = inner + r * BLOCK;
                    for (int v = 0; v < vecs; v++) {
                        v16 x = load(row + 16 * v), steep = 1.0f;
                        if (at.softcap != 0.0f) {
                            x = capped(x, at.softcap);
                            steep = 1.0f - (x / at.softcap) * (x / at.softcap);
                        }
                        v16 p = choose(visible(span, 16 * v), exponential(x - logs[t]), v16(0.0f));
                        store(row + 16 * v, p);
                        store(slope + 16 * v, p * (load(slope + 16 * v) - mean[t]) * steep);
                    }
                    for (int v = vecs; v < BLOCK / 16; v++) {
                        store(row + 16 * v, 0.0f);
                        store(slope + 16 * v, 0.0f);
                    }
                }
                strip(grad_query + (i * BLOCK + r0) * d, d, inner + r0 * BLOCK, BLOCK, 1, key, d, 16L * vecs,
                      int(d / 16), true);
            }
            for (long r0 = 0; r0 < BLOCK; r0 += ROWS) {
                long skip = diagonal ? r0 : 0;  // queries before a key do not see it
                strip(grad_value + r0 * d_v, d_v, weights + r0 + skip * BLOCK, 1, BLOCK, g_now + skip * d_v, d_v,
                      BLOCK - skip, int(d_v / 16), fresh);
                strip(grad_key + r0 * d, d, inner + r0 + skip * BLOCK, 1, BLOCK, query_now + skip * d, d, BLOCK - skip,
                      int(d / 16), fresh);
            }
            fresh = true;
        }
    }
    for (long t = 0; t < length; t++) {
        float* line = grad_query + t * d;
        long token = start + t;
        if (at.rotated) rotate(line, cos + token * at.rotated, sin + token * at.rotated, at.rotated, true);
        narrow(grad_q + (token * at.heads + task.head) * d, line, d, at.scaling);
    }
}

// Add up what the parts of a group of heads made, and write it out.
template <class T>
static void gather_keys(const Layer& at, const int64_t* bounds, const Plan& plan, long parts, float* sums, long d,
                        const T* cos, const T* sin, long rotated, T* to) {
    long total = at.key_heads * plan.blocks;
#pragma omp for schedule(static)
    for (long item = 0; item < total; item++) {
        long head = item / plan.blocks, block = item % plan.blocks;
        Tokens here = tokens_of(plan, bounds, block);
        long from = here.from, count = here.count;
        float* lines = sums + (head * parts * plan.blocks + block) * BLOCK * d;
        for (long part = 1; part < parts; part++) {
            const float* more = lines + part * plan.blocks * BLOCK * d;
            for (long c = 0; c < count * d; c += 16) store(lines + c, load(lines + c) + load(more + c));
        }
        for (long i = 0; i < count; i++) {
            long token = from + i;
            if (rotated) rotate(lines + i * d, cos + token * rotated, sin + token * rotated, rotated, true);
            narrow(to + (token * at.key_heads + head) * d, lines + i * d, d, 1.0f);
        }
    }
}

template <class T>
static void backward(const Layer& at, const int64_t* bounds, long tokens, const T* q, const T* k, const T* v,
                     const T* cos, const T* sin, const T* out, const float* log_sums, const T* grad, T* grad_q,
                     T* grad_k, T* grad_v) {
    Plan plan = plan_of(bounds, at.segments);
    // Heads that share keys go one after another into the same sums, unless that leaves a core without work.
    long group = at.heads / at.key_heads, parts = at.segments * at.key_heads >= 3L * threads() ? 1 : group;
    std::vector<Task> tasks;
    for (int s = 0; s < at.segments; s++) {
        long length = bounds[2 * s + 1] - bounds[2 * s];
        for (int part = 0; part < at.key_heads * parts; part++) tasks.push_back({s, part, 0, length * length});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
    static thread_local std::vector<float> kept;
    long shared = at.key_heads * plan.blocks * BLOCK, own = shared * parts;
    kept.resize(shared * (2 * at.d + at.d_v) + own * (at.d + at.d_v));
    float *keys = kept.data(), *keys_turned = keys + shared * at.d, *values_turned = keys_turned + shared * at.d,
          *grad_keys = values_turned + shared * at.d_v, *grad_values = grad_keys + own * at.d;
    Packed packed = {keys, keys_turned, values_turned};
#pragma omp parallel
    {
        static thread_local std::vector<float> space;
        pack_keys(at, k, at.k_head, at.k_token, at.d, cos, sin, at.rotated, bounds, plan, keys, keys_turned);
        pack_keys(at, v, at.v_head, at.v_token, at.d_v, cos, sin, 0, bounds, plan, (float*)nullptr, values_turned);
#pragma omp for schedule(dynamic)
        for (long t = 0; t < (long)tasks.size(); t++) {
            Task task = tasks[t];
            long at_sums = (task.head * plan.blocks + plan.first[task.segment]) * BLOCK;
            long heads = group / parts, first_head = task.head * heads;
            for (long h = 0; h < heads; h++) {
                task.head = int(first_head + h);
                backward_head(at, task, bounds, plan, q, cos, sin, packed, out, log_sums, grad, tokens, grad_q,
                              grad_keys + at_sums * at.d, grad_values + at_sums * at.d_v, h > 0, space);
            }
        }
        gather_keys(at, bounds, plan, parts, grad_keys, at.d, cos, sin, at.rotated, grad_k);
        gather_keys(at, bounds, plan, parts, grad_values, at.d_v, cos, sin, 0, grad_v);
    }
    if (kept.size() > (64u << 18)) std::vector<float>().swap(kept);
}

#define EXPORTS(NAME, T)                                                                                              \
    extern "C" void attention_forward_##NAME(const Layer* at, const int64_t* bounds, int64_t tokens, const T* q,     \
                                             const T* k, const T* v, const T* cos, const T* sin, T* out,             \
                                             float* log_sums) {                                                      \
        forward(*at, bounds, tokens, q, k, v, cos, sin, out, log_sums);                                              \
    }                                                                                                                 \
    extern "C" void attention_backward_##NAME(const Layer* at, const int64_t* bounds, int64_t tokens, const T* q,    \
                                              const T* k, const T* v, const T* cos, const T* sin, const T* out,      \
                                              const float* log_sums, const T* grad, T* grad_q, T* grad_k,            \
                                              T* grad_v) {                                                           \
        backward(*at, bounds, tokens, q, k, v, cos, sin, out, log_sums, grad, grad_q, grad_k, grad_v);               \
    }
EXPORTS(float32, float)
EXPORTS(bfloat16, bf16)
