// Attention of one new token of one sequence over a block of its cache. The plain version is gptlab.model.kernels.reference.
#pragma once
#include <algorithm>

#include "numbers.h"

constexpr int BLOCK = 512;  // slots; what blocks of one head find is merged afterwards, so threads can share a long text

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
    // Whether all n keys are visible and from the first given position on: what most blocks are, and quickly seen.
    bool sees_all(int64_t query, const int64_t* keys, int64_t n, int64_t from) const {
        if (span > 0) from = std::max(from, query - span + 1);
        int64_t none = 0;
        for (int64_t i = 0; i < n; i++) none |= (keys[i] - from) | (query - keys[i]);  // negative where one of them is
        return none >= 0 && (span == 0 || dilation == 1);
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

// Call f with the number of vectors that a head fills, if it is one of those that there is code for.
template <class F>
static inline bool with_vectors(int64_t head_dim, F&& f) {
    switch (head_dim) {
        case WIDTH: f.template operator()<1>(); return true;
        case 2 * WIDTH: f.template operator()<2>(); return true;
        case 3 * WIDTH: f.template operator()<3>(); return true;
        case 4 * WIDTH: f.template operator()<4>(); return true;
        case 5 * WIDTH: f.template operator()<5>(); return true;
        case 6 * WIDTH: f.template operator()<6>(); return true;
        case 8 * WIDTH: f.template operator()<8>(); return true;
    }
    return false;
}

// The lanes of a whose bit `STEP` is 0 with their neighbours', between those of b.
template <int STEP>
static inline Vec add_neighbours(Vec a, Vec b) {
    constexpr auto lanes = [](int bit) {
        IntVec v = {};
        for (int i = 0; i < WIDTH; i++) v[i] = (i & ~STEP) + bit + (i & STEP ? WIDTH : 0);
        return v;
    };
    return __builtin_shuffle(a, b, lanes(0)) + __builtin_shuffle(a, b, lanes(STEP));
}

// The sums of WIDTH vectors, v(0) to v(WIDTH - 1), as one vector. Adding up neighbours of two vectors at a time takes a
// third of the instructions of one sum after the other.
template <int FIRST = 0, int STEP = WIDTH / 2, class V>
static inline Vec sums_of(V&& v) {
    if constexpr (STEP == 0) return v(FIRST);
    else return add_neighbours<STEP>(sums_of<FIRST, STEP / 2>(v), sums_of<FIRST + STEP, STEP / 2>(v));
}

// The scores of a query and the picked rows of k, (head_dim), a head of N vectors: WIDTH of them at a time.
template <int N, class T>
static inline void scores_of(float* scores, const float* q, const T* k, const int64_t* picked, int n) {
    Vec query[N];
    for (int j = 0; j < N; j++) query[j] = load(q + j * WIDTH);
    for (int i = 0; i < n; i += WIDTH)
        store(scores + i, sums_of([&](int l) {
            const T* key = k + picked[std::min(i + l, n - 1)] * N * WIDTH;
            Vec total = query[0] * load(key);
            for (int j = 1; j < N; j++) total += query[j] * load(key + j * WIDTH);
            return total;
        }));
}

template <class T>
static inline void scores_of(float* scores, const float* q, const T* k, const int64_t* picked, int n, int64_t head_dim) {
    const bool by_vectors = with_vectors(head_dim, [&]<int N>() { scores_of<N>(scores, q, k, picked, n); });
    for (int i = 0; i < n && !by_vectors; i++) scores[i] = dot(q, k + picked[i] * head_dim, head_dim);
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
    constexpr int CHAINS = N < 8 ? 8 / N : 1;  // sums that do not wait for each other
    Vec sums[CHAINS][N] = {};
    int i = 0;
    for (; i + CHAINS <= n; i += CHAINS)
        for (int c = 0; c < CHAINS; c++)
            for (int j = 0; j < N; j++) sums[c][j] += load(x + (picked[i + c] * N + j) * WIDTH) * weights[i + c];
    for (; i < n; i++)
        for (int j = 0; j < N; j++) sums[0][j] += load(x + (picked[i] * N + j) * WIDTH) * weights[i];
    for (int j = 0; j < N; j++) {
        for (int c = 1; c < CHAINS; c++) sums[0][j] += sums[c][j];
        store(y + j * WIDTH, sums[0][j]);
    }
}

template <class T>
static inline void gather(float* y, const float* weights, const T* x, const int64_t* picked, int n, int64_t head_dim) {
    if (with_vectors(head_dim, [&]<int N>() { gather<N>(y, weights, x, picked, n); })) return;
    for (int64_t i = 0; i < head_dim; i++) y[i] = 0.0f;
    for (int i = 0; i < n; i++) add_scaled(y, weights[i], x + picked[i] * head_dim, head_dim);
}

// The largest of n numbers that are followed by WIDTH times minus infinity.
static inline float largest(const float* x, int n) {
    Vec most = splat(-INFINITY);
    for (int i = 0; i < n; i += WIDTH) most = load(x + i) > most ? load(x + i) : most;
    float result = -INFINITY;
    for (int j = 0; j < WIDTH; j++) result = most[j] > result ? most[j] : result;
    return result;
}

// The queries of a group that share one key head, (n_group, head_dim), over slots first to last of that head.
// Writes for each query the largest score, the sum of exponentials against it, and the values weighted by them.
template <class T>
static void attend(const float* q, const float* q_sinks, int n_group, int64_t head_dim, const T* k, const T* v,
                   const int64_t* positions, int64_t first, int64_t last, int64_t query, const Sight& sight, float* partial) {
    int64_t seen[BLOCK];
    int n = 0, n_apart = 0, apart[BLOCK];  // those among them that another query sees
    if (sight.sees_all(query, positions + first, last - first, q_sinks ? sight.sinks : 0))
        for (; first + n < last; n++) seen[n] = first + n;
    else
        for (int64_t slot = first; slot < last; slot++)
            if (sight.sees(query, positions[slot])) {
                if (q_sinks && positions[slot] < sight.sinks) apart[n_apart++] = n;
                seen[n++] = slot;
            }
    for (int h = 0; h < n_group; h++, partial += head_dim + 2) {
        float scores[BLOCK + WIDTH];
        scores_of(scores, q + h * head_dim, k, seen, n, head_dim);
        for (int i = 0; i < n_apart; i++) scores[apart[i]] = dot(q_sinks + h * head_dim, k + seen[apart[i]] * head_dim, head_dim);
        for (int i = n; i < n + WIDTH; i++) scores[i] = -INFINITY;  // adds nothing to the sum
        const float most = largest(scores, n);
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
