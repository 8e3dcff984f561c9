// y = W x + b for a few rows x at once. Every weight is read from memory once, whatever the number of rows.
#pragma once
#include <type_traits>

#include "numbers.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Product {
    const void* weight;   // (n_out, n_in), or nothing where there is no such product
    const float* scales;  // INT8: (n_out); INT4: (n_out, n_in / 32)
    const float* bias;    // (n_out) or nothing
    int64_t n_out, n_in;
    Kind kind;
};

template <class F>
static inline void with_weights(const Product& p, F&& f) {
    auto bytes = static_cast<const int8_t*>(p.weight);
    switch (p.kind) {
        case FLOAT32: return f(Floats{static_cast<const float*>(p.weight), p.n_in});
        case BFLOAT16: return f(BFloats{static_cast<const uint16_t*>(p.weight), p.n_in});
        case INT8: return f(Bytes{bytes, p.scales, p.n_in});
        case INT4: return f(Nibbles{bytes, p.scales, p.n_in});
    }
}

constexpr int MAX_BATCH = 64;
constexpr int ROWS = 4;  // of weights at a time: times four rows of x they are as many sums as registers hold

// R rows of weights from n on, times B rows of x: y[b * ldy + r]. Each sum runs over k in the same order for every R and
// B, so that a row of x gives the same numbers alone and in a batch.
template <int R, int B, class W>
static inline void tile(const W& w, int64_t n, int64_t n_in, const float* x, int64_t ldx, float (*y)[ROWS]) {
    Vec sums[R][B] = {};
    int64_t k = 0;
    for (; k + WIDTH <= n_in; k += WIDTH) {
        Vec xs[B];
        for (int b = 0; b < B; b++) xs[b] = load(x + b * ldx + k);
        for (int r = 0; r < R; r++) {
            Vec weights = w.at(n + r, k);
            for (int b = 0; b < B; b++) sums[r][b] += weights * xs[b];
        }
    }
    for (int r = 0; r < R; r++)
        for (int b = 0; b < B; b++) {
            float total = sum(sums[r][b]);
            for (int64_t i = k; i < n_in; i++) total += w.one(n + r, i) * x[b * ldx + i];
            y[b][r] = total;
        }
}

template <int R, class W>
static inline void rows(const W& w, int64_t n, int64_t n_in, const float* x, int64_t ldx, int batch, float (*y)[ROWS]) {
    for (; batch >= 4; batch -= 4, x += 4 * ldx, y += 4) tile<R, 4>(w, n, n_in, x, ldx, y);
    switch (batch) {
        case 3: return tile<R, 3>(w, n, n_in, x, ldx, y);
        case 2: return tile<R, 2>(w, n, n_in, x, ldx, y);
        case 1: return tile<R, 1>(w, n, n_in, x, ldx, y);
    }
}

// Compute outputs first <= n < last of all rows of x, and give each to out(row, n, value).
template <class Out>
static void multiply(const Product& p, int64_t first, int64_t last, const float* x, int64_t ldx, int batch, float* scratch, Out&& out) {
    with_weights(p, [&](auto w) {
        for (int64_t n = first; n < last; n += ROWS) {
            int count = last - n < ROWS ? static_cast<int>(last - n) : ROWS;
            float y[MAX_BATCH][ROWS];
            if (batch > 4 && count == ROWS && !std::is_same_v<decltype(w), Floats>) {  // convert once for all the tiles
                for (int r = 0; r < ROWS; r++) {
                    int64_t k = 0;
                    for (; k + WIDTH <= p.n_in; k += WIDTH) store(scratch + r * p.n_in + k, w.at(n + r, k));
                    for (; k < p.n_in; k++) scratch[r * p.n_in + k] = w.one(n + r, k);
                }
                rows<ROWS>(Floats{scratch, p.n_in}, 0, p.n_in, x, ldx, batch, y);
            } else if (count == ROWS) {
                rows<ROWS>(w, n, p.n_in, x, ldx, batch, y);
            } else {
                for (int r = 0; r < count; r++) {
                    float one[MAX_BATCH][ROWS];
                    rows<1>(w, n + r, p.n_in, x, ldx, batch, one);
                    for (int b = 0; b < batch; b++) y[b][r] = one[b][0];
                }
            }
            for (int b = 0; b < batch; b++)
                for (int r = 0; r < count; r++)
                    out(b, n + r, y[b][r] * w.scale(n + r) + (p.bias ? p.bias[n + r] : 0.0f));
        }
    });
}
