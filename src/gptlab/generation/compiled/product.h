// y = W x + b for a few rows x at once. Every weight is read from memory once, whatever the number of rows.
#pragma once
#include <algorithm>

#include "numbers.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Product {
    const void* weight;    // (n_out, n_in), or nothing where there is no such product
    const float* factors;  // INT8: (n_out); INT4: (n_out, n_in / 32)
    const float* bias;     // (n_out), or nothing
    int64_t n_out, n_in;
    Kind kind;
    bool whole() const { return kind >= INT8; }
};

template <class F>
static inline void with_weights(const Product& p, F&& f) {
    auto bytes = static_cast<const int8_t*>(p.weight);
    switch (p.kind) {
        case FLOAT32: return f(Floats{static_cast<const float*>(p.weight), p.n_in});
        case BFLOAT16: return f(BFloats{static_cast<const uint16_t*>(p.weight), p.n_in});
        case INT8: return f(Bytes{bytes, p.factors, p.n_in});
        case INT4: return f(Nibbles{bytes, p.factors, p.n_in});
    }
}

constexpr int MAX_BATCH = 64;
constexpr int ROWS = 4;  // of weights at a time: times four rows of x they are as many sums as registers hold

// Round a row to 16-bit numbers times a factor, which is returned: NaN where the row holds NaN or infinity.
static float round_row(const float* x, int64_t n, int16_t* y) {
    Vec most = {}, zero = {};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        Vec v = load(x + i);
        zero += v - v;
        v = v < 0.0f ? -v : v;
        most = v > most ? v : most;
    }
    float largest = 0.0f, nothing = sum(zero);
    for (int j = 0; j < WIDTH; j++) largest = std::max(largest, most[j]);
    for (; i < n; i++) {
        nothing += x[i] - x[i];
        largest = std::max(largest, std::fabs(x[i]));
    }
    if (nothing != 0.0f) {
        std::fill_n(y, n, 0);
        return NAN;
    }
    const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f, shift = 12582912.0f;  // 1.5 * 2^23: what is added is rounded
    for (i = 0; i + WIDTH <= n; i += WIDTH) narrow(y + i, __builtin_convertvector((load(x + i) * inverse + shift) - shift, IntVec));
    for (; i < n; i++) y[i] = static_cast<int16_t>(std::nearbyint(x[i] * inverse));
    return largest / 32767.0f;
}

// The rows that are multiplied: floats, or for weights that are whole numbers also 16-bit ones times a factor per row.
struct Operand {
    const float* x;
    int64_t stride;
    int batch;
    Buffer<int16_t> rounded;
    float factors[MAX_BATCH];

    // `rounded` must have room for n_rows * n numbers where the weights are whole ones.
    void set(const float* rows, int64_t n, int n_rows, bool whole) {
        x = rows, stride = n, batch = n_rows;
        if (!whole) return;
        for (int b = 0; b < batch; b++) factors[b] = round_row(x + b * n, n, rounded.data() + b * n);
    }
};

// Each tile multiplies R rows of weights from n on by B rows of x from b on: y[i][r]. The sums run over k in the same
// order for every R and B, so that a row of x gives the same numbers alone and in a batch. That is why the last few
// columns fill a vector with zeros: compilers round a loop over single numbers otherwise in one tile than in another.

template <class At>
static inline Vec last_ones(int64_t n, At&& at) {
    float numbers[WIDTH] = {};
    for (int64_t j = 0; j < std::min<int64_t>(n, WIDTH); j++) numbers[j] = at(j);
    return load(numbers);
}

// sums[r][i] += the products of columns k to the last.
template <int R, int B, class W, class X>
static inline void add_last(const W& w, int64_t n, const X* x, int64_t stride, int64_t k, Vec (*sums)[B]) {
    for (; k < w.n_in; k += WIDTH) {
        Vec xs[B];
        for (int i = 0; i < B; i++) xs[i] = last_ones(w.n_in - k, [&](int64_t j) { return static_cast<float>(x[i * stride + k + j]); });
        for (int r = 0; r < R; r++) {
            Vec weights = last_ones(w.n_in - k, [&](int64_t j) { return w.one(n + r, k + j); });
            for (int i = 0; i < B; i++) sums[r][i] += weights * xs[i];
        }
    }
}

template <int R, int B, class W>
static inline void float_tile(const W& w, int64_t n, const Operand& o, int b, int64_t ahead, float (*y)[R]) {
    const float* x = o.x + b * o.stride;
    Vec sums[R][B] = {};
    int64_t k = 0;
    for (; k + WIDTH <= w.n_in; k += WIDTH) {
        Vec xs[B];
        for (int i = 0; i < B; i++) xs[i] = load(x + i * o.stride + k);
        for (int r = 0; r < R; r++) {
            if (ahead && k % W::LINE == 0) __builtin_prefetch(w.address(n + ahead + r, k));
            Vec weights = w.floats_at(n + r, k);
            for (int i = 0; i < B; i++) sums[r][i] += weights * xs[i];
        }
    }
    if (k < w.n_in) add_last<R, B>(w, n, x, o.stride, k, sums);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++) y[i][r] = sum(sums[r][i]);
}

template <int R, int B, class W>
static inline void whole_tile(const W& w, int64_t n, const Operand& o, int b, int64_t ahead, float (*y)[R]) {
    const int16_t* x = o.rounded.data() + b * o.stride;
    Vec sums[R][B] = {};
    int64_t k = 0, end = w.n_in - w.n_in % PAIRS;
    while (k < end) {
        int64_t first = k, until = std::min(end, k + W::SAME_FACTOR);
        IntVec totals[R][B] = {};
        for (; k < until; k += PAIRS) {
            ShortVec xs[B];
            for (int i = 0; i < B; i++) xs[i] = *reinterpret_cast<const ShortVec*>(x + i * o.stride + k);
            for (int r = 0; r < R; r++) {
                if (ahead && k % W::LINE == 0) __builtin_prefetch(w.address(n + ahead + r, k));
                ShortVec weights = w.shorts_at(n + r, k);
                for (int i = 0; i < B; i++) totals[r][i] = add_products(totals[r][i], weights, xs[i]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < B; i++) sums[r][i] += floats(totals[r][i]) * w.factor(n + r, first);
    }
    if (end < w.n_in) add_last<R, B>(w, n, x, o.stride, end, sums);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++) y[i][r] = sum(sums[r][i]) * o.factors[b + i];
}

template <int R, int B, class W>
static inline void tile(const W& w, int64_t n, const Operand& o, int b, int64_t ahead, float (*y)[R]) {
    if constexpr (requires { w.floats_at(0, 0); }) float_tile<R, B>(w, n, o, b, ahead, y);
    else whole_tile<R, B>(w, n, o, b, ahead, y);
}

// Compute outputs first <= n < last of all rows, and give each to out(row, n, value). Few enough outputs that their weights
// stay in the processor's cache while one tile of rows after the other is multiplied.
template <class Out>
static void multiply(const Product& p, int64_t first, int64_t last, const Operand& o, Out&& out) {
    const int rounds = (o.batch + 3) / 4;
    with_weights(p, [&](auto w) {
        auto some = [&]<int R, int B>(int64_t n, int b) {
            // Meanwhile weights are fetched from memory: the next tile's, or with several rounds over the rows those of as
            // many outputs as these, a part of them in each round.
            int64_t ahead = rounds == 1 ? R : (n - first) / ROWS % rounds == b / 4 ? last - first : 0;
            float y[B][R];
            tile<R, B>(w, n, o, b, ahead, y);
            for (int i = 0; i < B; i++)
                for (int r = 0; r < R; r++) out(b + i, n + r, p.bias ? y[i][r] + p.bias[n + r] : y[i][r]);
        };
        auto outputs = [&]<int B>(int b) {
            int64_t n = first;
            for (; n + ROWS <= last; n += ROWS) some.template operator()<ROWS, B>(n, b);
            for (; n < last; n++) some.template operator()<1, B>(n, b);
        };
        int b = 0;
        for (; b + 4 <= o.batch; b += 4) outputs.template operator()<4>(b);
        switch (o.batch - b) {
            case 3: return outputs.template operator()<3>(b);
            case 2: return outputs.template operator()<2>(b);
            case 1: return outputs.template operator()<1>(b);
        }
    });
}
