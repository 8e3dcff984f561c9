// y = W x + b for a few rows x at once. Every weight is read from memory once, whatever the number of rows.
#pragma once
#include "operand.h"
#include "tiles.h"

constexpr int ROWS = 4;  // of weights at a time: times four rows of x they are as many sums as registers hold
constexpr int64_t PIECE = 32;  // outputs that a thread takes at a time

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

// Each of these multiplies R rows of weights from n on by B rows of x from b on: y[i][r]. The sums run over k in the same
// order for every R and B, so that a row of x gives the same numbers alone and in a batch. That is why the last few
// columns fill a vector with zeros: compilers round a loop over single numbers otherwise in one of them than in another.

template <class At>
static inline Vec last_ones(int64_t n, At&& at) {
    float numbers[WIDTH] = {};
    for (int64_t j = 0; j < std::min<int64_t>(n, WIDTH); j++) numbers[j] = at(j);
    return load(numbers);
}

// totals[r][i] += the products of columns k to the last.
template <int R, int B, class W>
static inline void add_last(const W& w, int64_t n, const float* x, int64_t stride, int64_t k, Vec (*totals)[B]) {
    for (; k < w.n_in; k += WIDTH) {
        Vec xs[B];
        for (int i = 0; i < B; i++) xs[i] = last_ones(w.n_in - k, [&](int64_t j) { return x[i * stride + k + j]; });
        for (int r = 0; r < R; r++) {
            Vec weights = last_ones(w.n_in - k, [&](int64_t j) { return w.one(n + r, k + j); });
            for (int i = 0; i < B; i++) totals[r][i] += weights * xs[i];
        }
    }
}

template <int R, int B, class W>
    requires requires(W w) { w.floats_at(0, 0); }
static inline void sums(const W& w, int64_t n, const Operand& o, int64_t b, int64_t ahead, float (*y)[R]) {
    const float* x = o.x + b * o.n;
    Vec totals[R][B] = {};
    int64_t k = 0;
    for (; k + WIDTH <= w.n_in; k += WIDTH) {
        Vec xs[B];
        for (int i = 0; i < B; i++) xs[i] = load(x + i * o.n + k);
        for (int r = 0; r < R; r++) {
            if (ahead && k % W::LINE == 0) __builtin_prefetch(w.address(n + ahead + r, k));
            Vec weights = w.floats_at(n + r, k);
            for (int i = 0; i < B; i++) totals[r][i] += weights * xs[i];
        }
    }
    if (k < w.n_in) add_last<R, B>(w, n, x, o.n, k, totals);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++) y[i][r] = sum(totals[r][i]);
}

// int8: exact, so that the order does not matter.
template <int R, int B>
static inline void sums(const Bytes& w, int64_t n, const Operand& o, int64_t b, int64_t ahead, float (*y)[R]) {
    const int16_t* x = o.rounded + b * o.n;
    int64_t totals[R][B] = {}, k = 0, end = w.n_in - w.n_in % PAIRS;
    while (k < end) {
        int64_t until = std::min(end, k + EXACT);
        IntVec some[R][B] = {};
        for (; k < until; k += PAIRS) {
            ShortVec xs[B];
            for (int i = 0; i < B; i++) xs[i] = *reinterpret_cast<const ShortVec*>(x + i * o.n + k);
            for (int r = 0; r < R; r++) {
                if (ahead && k % Bytes::LINE == 0) __builtin_prefetch(w.address(n + ahead + r, k));
                ShortVec weights = w.shorts_at(n + r, k);
                for (int i = 0; i < B; i++) some[r][i] = add_products(some[r][i], weights, xs[i]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < B; i++) totals[r][i] += exact_sum(some[r][i]);
    }
    for (; k < w.n_in; k++)
        for (int r = 0; r < R; r++)
            for (int i = 0; i < B; i++) totals[r][i] += w.data[(n + r) * w.n_in + k] * x[i * o.n + k];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++) y[i][r] = static_cast<float>(totals[r][i]);
}

// int4: exact within a group. A group is a whole number of vectors.
template <int R, int B>
static inline void sums(const Nibbles& w, int64_t n, const Operand& o, int64_t b, int64_t ahead, float (*y)[R]) {
    const int16_t* x = o.rounded + b * o.n;
    Vec totals[R][B] = {};
    for (int64_t k = 0; k < w.n_in; k += PAIRS) {
        ShortVec xs[B];
        for (int i = 0; i < B; i++) xs[i] = *reinterpret_cast<const ShortVec*>(x + i * o.n + k);
        for (int r = 0; r < R; r++) {
            if (ahead && k % Nibbles::LINE == 0) __builtin_prefetch(w.address(n + ahead + r, k));
            ShortVec weights = w.shorts_at(n + r, k);
            for (int i = 0; i < B; i++) totals[r][i] += floats(add_products(IntVec{}, weights, xs[i])) * w.factor(n + r, k);
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < B; i++) y[i][r] = sum(totals[r][i]);
}

// In an order that tiles.h has too. These are loops of their own so that no compiler makes one instruction of two.
static void finish(const Product& p, const Operand& o, int64_t b, int64_t first, int64_t count, float* y) {
    if (p.kind == INT8)
        for (int64_t r = 0; r < count; r++) y[r] *= p.factors[first + r];
    if (p.whole())
        for (int64_t r = 0; r < count; r++) y[r] *= o.factors[b];
    if (p.bias)
        for (int64_t r = 0; r < count; r++) y[r] += p.bias[first + r];
}

// Compute outputs first <= n < last, at most PIECE, of all rows, and give those of each row to out(row, first, values,
// count). They are few enough that their weights stay in the processor's cache while one group of rows after the other is
// multiplied. Meanwhile the weights are fetched from memory that lie `ahead` outputs on.
template <class Out>
static void multiply(const Product& p, int64_t first, int64_t last, const Operand& o, int64_t ahead, Out&& out) {
    const int64_t count = last - first;
#if HAS_TILES
    if (o.tiles && p.kind == INT8 && p.n_out >= TILE_OUT) {
        const int64_t begin = std::min(first, p.n_out - TILE_OUT), panels = (o.n_rows + TILE_ROWS - 1) / TILE_ROWS;
        const int8_t* weights = static_cast<const int8_t*>(p.weight) + begin * p.n_in;
        const float* bias = p.bias ? p.bias + begin : nullptr;
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t b = panel * TILE_ROWS, n = std::min(TILE_ROWS, o.n_rows - b);
            const int8_t* tiles = o.tiles + panel * panel_size(p.n_in);
            alignas(64) float y[TILE_ROWS][TILE_OUT];
            multiply_tiles(weights, p.factors + begin, bias, p.n_in, tiles, o.factors + b, ahead * p.n_in, panel, panels, y);
            if (count == TILE_OUT)
                for (int64_t i = 0; i < n; i++) out(b + i, first, y[i], TILE_OUT);
            else
                for (int64_t i = 0; i < n; i++) out(b + i, first, y[i] + (first - begin), count);
        }
        return;
    }
#endif
    with_weights(p, [&](auto w) {
        const int64_t rounds = (o.n_rows + 3) / 4;
        auto rows = [&]<int B>(int64_t b) {
            float found[B][PIECE];
            auto some = [&]<int R>(int64_t n) {
                // The next weights, or with several rounds over the rows a part of those ahead in each round.
                int64_t distance = rounds == 1 ? R : (n - first) / ROWS % rounds == b / 4 ? ahead : 0;
                float y[B][R];
                sums<R, B>(w, n, o, b, distance, y);
                for (int i = 0; i < B; i++)
                    for (int r = 0; r < R; r++) found[i][n - first + r] = y[i][r];
            };
            int64_t n = first;
            for (; n + ROWS <= last; n += ROWS) some.template operator()<ROWS>(n);
            for (; n < last; n++) some.template operator()<1>(n);
            for (int i = 0; i < B; i++) {
                finish(p, o, b + i, first, count, found[i]);
                out(b + i, first, found[i], count);
            }
        };
        int64_t b = 0;
        for (; b + 4 <= o.n_rows; b += 4) rows.template operator()<4>(b);
        switch (o.n_rows - b) {
            case 3: return rows.template operator()<3>(b);
            case 2: return rows.template operator()<2>(b);
            case 1: return rows.template operator()<1>(b);
        }
    });
}
