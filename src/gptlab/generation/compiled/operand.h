// What is multiplied: a matrix of weights, and rows of activations. For weights that are whole numbers the activations
// are rounded to whole numbers too.
#pragma once
#include <algorithm>

#include "numbers.h"
#include "tiles.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Product {
    const void* weight;    // (n_out, n_in), or nothing where there is no such product
    const float* factors;  // INT8: (n_out); INT4: (n_out, n_in / 32)
    const float* bias;     // (n_out), or nothing
    int64_t n_out, n_in;
    Kind kind;
    bool whole() const { return kind >= INT8; }
};

template <class T>
static T* room(Buffer<T>& v, int64_t n) {
    if (static_cast<int64_t>(v.size()) < n) v.resize(n);
    return v.data();
}

// Round a row to 16-bit numbers times a factor, which is returned: NaN where the row holds NaN or infinity.
static float round_row(const float* x, int64_t n, int16_t* y) {
    Vec mosts[4] = {}, zeros[4] = {};  // so many that one need not wait for the last
    int64_t i = 0;
    auto look = [&](int64_t at, Vec& most, Vec& zero) {
        Vec v = load(x + at);
        zero += v - v;
        v = (Vec)((IntVec)v & 0x7fffffff);
        most = v > most ? v : most;
    };
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH)
        for (int j = 0; j < 4; j++) look(i + j * WIDTH, mosts[j], zeros[j]);
    for (; i + WIDTH <= n; i += WIDTH) look(i, mosts[0], zeros[0]);
    float largest = 0.0f, nothing = sum((zeros[0] + zeros[1]) + (zeros[2] + zeros[3]));
    for (Vec most : mosts) mosts[0] = most > mosts[0] ? most : mosts[0];
    for (int j = 0; j < WIDTH; j++) largest = std::max(largest, mosts[0][j]);
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

// Activations as they are multiplied, n_rows of n: floats, or 16-bit whole numbers times a factor per row. `tiles` holds
// the same whole numbers once more as tiles.h wants them, or is nothing.
struct Operand {
    const float* x;
    int64_t n, n_rows;
    int16_t* rounded;
    float* factors;
    int8_t* tiles;

    // To be called for every row of x.
    void round(int64_t row) const {
        if (!rounded) return;
        factors[row] = round_row(x + row * n, n, rounded + row * n);
    }

    // Once all rows are rounded: each of so many threads fills other lines of the processor's cache.
    void fill_tiles(int thread, int n_threads) const {
        for (int64_t i = thread; i < (n_rows + TILE_ROWS - 1) / TILE_ROWS * tile_steps(n); i += n_threads) fill_tile(rounded, n, n_rows, i, tiles);
    }
};

// Memory for whole numbers.
class Rounded {
   public:
    // For n_rows of as many columns as any of these.
    void reserve(int64_t n_rows, std::initializer_list<int64_t> columns) {
        room(factors, n_rows + TILE_ROWS);  // they are read 16 at a time
        for (int64_t n : columns) {
            room(numbers, n_rows * n);
            if (tiles_fit(n) && tiles_wanted(n_rows)) room(tiles, tiles_size(n, n_rows));
        }
    }

    // Rows that have been reserved, not rounded yet; `tiled`: as tiles too where that is faster.
    Operand of(const float* x, int64_t n, int64_t n_rows, bool whole, bool tiled) {
        if (!whole) return {x, n, n_rows, nullptr, nullptr, nullptr};
        tiled = tiled && tiles_fit(n) && tiles_wanted(n_rows);
        return {x, n, n_rows, numbers.data(), factors.data(), tiled ? tiles.data() : nullptr};
    }

   private:
    Buffer<int16_t> numbers;
    Buffer<float> factors;
    Buffer<int8_t> tiles;
};
