// A single product of weights that are whole numbers, for the reading of prompts.
#include <atomic>

#include "pool.h"
#include "product.h"

constexpr int64_t MOST_ROWS = 128;  // at a time: what their tiles take stays in the processor's cache

namespace {

// What 32 outputs of 4-bit weights need on the way to tiles, of one thread.
struct Unpacked {
    Buffer<int8_t> weights;  // (32, n_in)
    Buffer<float> factors;   // (n_in / 32, 32)

    void reserve(int64_t n_in) {
        room(weights, TILE_OUT * n_in);
        room(factors, TILE_OUT * n_in / GROUP);
    }

#if HAS_TILES
    // As `multiply` of product.h.
    template <class Out>
    void multiply(const Product& p, int64_t first, int64_t last, const Operand& o, Out&& out) {
        const int64_t begin = std::min(first, p.n_out - TILE_OUT), groups = p.n_in / GROUP;
        const int8_t* packed = static_cast<const int8_t*>(p.weight) + begin * p.n_in / 2;
        for (int64_t n = 0; n < TILE_OUT; n++)
            for (int64_t g = 0; g < groups; g++) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights.data() + n * p.n_in + g * GROUP), unpack(packed + (n * groups + g) * GROUP / 2));
                factors[g * TILE_OUT + n] = p.factors[(begin + n) * groups + g];
            }
        std::atomic_signal_fence(std::memory_order_seq_cst);  // compilers do not know that tiles are read from memory
        for (int64_t b = 0; b < o.n_rows; b += TILE_ROWS) {
            alignas(64) float y[TILE_ROWS][TILE_OUT];
            const int8_t* panel = o.tiles + b / TILE_ROWS * panel_size(p.n_in);
            multiply_groups(weights.data(), factors.data(), p.bias ? p.bias + begin : nullptr, p.n_in, panel, o.factors + b, y);
            for (int64_t i = 0; i < std::min(TILE_ROWS, o.n_rows - b); i++) out(b + i, first, y[i] + (first - begin), last - first);
        }
    }
#endif
};

// Compute outputs first <= n < last.
template <class Out>
void some_outputs(const Product& p, int64_t first, int64_t last, const Operand& o, int64_t ahead, [[maybe_unused]] Unpacked& unpacked, Out&& out) {
#if HAS_TILES
    if (o.tiles && p.kind == INT4 && p.n_out >= TILE_OUT) return unpacked.multiply(p, first, last, o, out);
#endif
    multiply(p, first, last, o, ahead, out);
}

}  // namespace

// y (n_rows, n_out) = W x + b of rows x (n_rows, n_in), for INT8 or INT4. Returns 0, or 1 where there is not enough memory.
extern "C" int32_t gptlab_linear(const Product* product, const float* x, int64_t n_rows, int32_t n_threads, float* y) try {
    static Rounded& rounded = *new Rounded;
    std::lock_guard<std::mutex> lock(one_at_a_time());
    Pool& pool = Pool::of(n_threads);
    const Product& p = *product;
    const int64_t most = std::min(n_rows, MOST_ROWS), parts = (n_rows + most - 1) / most;
    rounded.reserve(most, {p.n_in});
    static std::vector<Unpacked>& unpacked = *new std::vector<Unpacked>;
    unpacked.resize(std::max<size_t>(unpacked.size(), pool.wanted));
    if (p.kind == INT4)
        for (Unpacked& one : unpacked) one.reserve(p.n_in);
    std::vector<std::atomic<int64_t>> handed_out(parts);
    pool.run([&](int thread) {
        for (int64_t part = 0; part < parts; part++) {
            const int64_t begin = part * most, n = std::min(most, n_rows - begin);
            const Operand operand = rounded.of(x + begin * p.n_in, p.n_in, n, true, true);
            const Tiles tiles(operand.tiles, p.kind == INT8 ? TILE_BYTES : GROUP);
            for (int64_t row = thread; row < n; row += pool.size) operand.round(row);
            pool.meet();
            if (operand.tiles) {
                operand.fill_tiles(thread, pool.size);
                pool.meet();
            }
            auto put = [&](int64_t row, int64_t first, const float* values, int64_t count) {
                std::copy_n(values, count, y + (begin + row) * p.n_out + first);
            };
            for (int64_t first; (first = handed_out[part].fetch_add(PIECE, std::memory_order_relaxed)) < p.n_out;)
                some_outputs(p, first, std::min(first + PIECE, p.n_out), operand, PIECE * pool.size, unpacked[thread], put);
            pool.meet();
        }
    });
    return 0;
} catch (const std::exception&) {
    return 1;
}

// Whether this processor multiplies weights of so many bits by many rows faster than PyTorch does.
extern "C" int32_t gptlab_linear_is_fast(int32_t bits) {
#if defined(__AVX2__)
    return bits == 8 || tiles_allowed();
#else
    return false;
#endif
}

// Multiply by tiles or without, for comparison. Returns whether there are any here.
extern "C" int32_t gptlab_use_tiles(int32_t use) {
    std::lock_guard<std::mutex> lock(one_at_a_time());
    tiles_off = false;
    const bool allowed = tiles_allowed();
    tiles_off = !use;
    return allowed;
}
