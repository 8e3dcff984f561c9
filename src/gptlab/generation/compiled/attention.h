// Attention of one new token of one sequence over a block of its cache. The plain version is gptlab.model.kernels.reference.
#pragma once
#include "numbers.h"

constexpr int BLOCK = 256;  // slots; what blocks of one head find is merged afterwards, so threads can share a long text

struct Slots {  // the cache of one sequence in one layer: gptlab.model.cache
    void *k, *v;          // (n_kv_head, stride, head_dim)
    int64_t* positions;   // (stride), -1 where a slot is empty
    int64_t stride;       // slots that there are
    int64_t capacity;     // slots after which a ring comes round
};

struct Sight {  // gptlab.model.masks.Visibility
    int64_t span;      // positions from a window's oldest key to the query; 0: no window
    int64_t sinks, dilation;
    bool sees(int64_t query, int64_t key) const {
        if (key < 0 || key > query) return false;
        return span == 0 || key < sinks || (query - key < span && (query - key) % dilation == 0);
    }
};

template <class T>
static inline float dot(const float* a, const T* b, int64_t n) {
    Vec total = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < n; i++) result += a[i] * number(b[i]);
    return result;
}

template <class T>
static inline void add_scaled(float* y, float factor, const T* x, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, load(y + i) + load(x + i) * factor);
    for (; i < n; i++) y[i] += factor * number(x[i]);
}

// y = the sum of n rows of x, picked and weighted. A head of N vectors stays in registers.
template <int N, class T>
static inline void gather(float* y, const float* weights, const T* x, const int64_t* picked, int n) {
    Vec sums[N] = {};
    for (int i = 0; i < n; i++)
        for (int j = 0; j < N; j++) sums[j] += load(x + picked[i] * N * WIDTH + j * WIDTH) * weights[i];
    for (int j = 0; j < N; j++) store(y + j * WIDTH, sums[j]);
}

template <class T>
static inline void gather(float* y, const float* weights, const T* x, const int64_t* picked, int n, int64_t head_dim) {
    switch (head_dim) {
        case WIDTH: return gather<1>(y, weights, x, picked, n);
        case 2 * WIDTH: return gather<2>(y, weights, x, picked, n);
        case 4 * WIDTH: return gather<4>(y, weights, x, picked, n);
        case 8 * WIDTH: return gather<8>(y, weights, x, picked, n);
    }
    for (int64_t i = 0; i < head_dim; i++) y[i] = 0.0f;
    for (int i = 0; i < n; i++) add_scaled(y, weights[i], x + picked[i] * head_dim, head_dim);
}

// The queries of a group that share one key head, (n_group, head_dim), over slots first to last of that head.
// Writes for each query the largest score, the sum of exponentials against it, and the values weighted by them.
template <class T>
static void attend(const float* q, const float* q_sinks, int n_group, int64_t head_dim, const T* k, const T* v,
                   const int64_t* positions, int64_t first, int64_t last, int64_t query, const Sight& sight, float* partial) {
    int64_t seen[BLOCK];
    bool is_sink[BLOCK];
    int n = 0;
    for (int64_t slot = first; slot < last; slot++)
        if (sight.sees(query, positions[slot])) {
            is_sink[n] = positions[slot] < sight.sinks;
            seen[n++] = slot;
        }
    for (int h = 0; h < n_group; h++, partial += head_dim + 2) {
        float scores[BLOCK + WIDTH];
        for (int i = 0; i < n; i++) {
            const float* from = q_sinks && is_sink[i] ? q_sinks : q;
            scores[i] = dot(from + h * head_dim, k + seen[i] * head_dim, head_dim);
        }
        float most = -INFINITY;
        for (int i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
        for (int i = n; i < n + WIDTH; i++) scores[i] = -INFINITY;  // adds nothing to the sum
        Vec total = {};
        for (int i = 0; i < n; i += WIDTH) {
            Vec e = exp_of(load(scores + i) - most);
            store(scores + i, e);
            total += e;
        }
        partial[0] = most;
        partial[1] = sum(total);
        gather(partial + 2, scores, v, seen, n, head_dim);
    }
}

// Join what the blocks of one head found, (n_blocks, head_dim + 2), into its output.
static void merge(const float* partial, int64_t n_blocks, int64_t head_dim, float* out) {
    float most = -INFINITY, total = 0.0f;
    for (int64_t j = 0; j < n_blocks; j++) most = partial[j * (head_dim + 2)] > most ? partial[j * (head_dim + 2)] : most;
    for (int64_t i = 0; i < head_dim; i++) out[i] = 0.0f;
    for (int64_t j = 0; j < n_blocks; j++, partial += head_dim + 2) {
        if (partial[1] == 0.0f) continue;  // nothing of this block is visible
        float factor = std::exp(partial[0] - most);
        total += factor * partial[1];
        add_scaled(out, factor, partial + 2, head_dim);
    }
    for (int64_t i = 0; i < head_dim; i++) out[i] /= total;
}

// Rotate a head by the angles of its position: gptlab.model.rope.
static inline void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i] + a * sines[i];
    }
}
