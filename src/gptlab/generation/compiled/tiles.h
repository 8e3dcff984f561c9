// Whole numbers multiplied by the processor's matrix unit (Intel's AMX), which multiplies a tile of 16 rows of 64 bytes by
// another in 16 cycles. Weights are read as they lie; a 16-bit activation is 256 times a signed byte plus an unsigned one,
// each multiplied for itself. All sums are exact, so that they are those of the other way (product.h) to the last bit.
#pragma once
#include <algorithm>
#include <atomic>

#include "numbers.h"

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAS_TILES 0
#endif

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64;
constexpr int64_t TILE_OUT = 2 * TILE_ROWS;   // outputs that are computed at once
constexpr int64_t TILE_MOST_IN = 1 << 16;     // so many products of -128 and 255 can be added in 32 bits
constexpr int64_t TILE_LEAST_ROWS = 4;        // of activations, from which on it is faster
constexpr int64_t GROUP = 32;                 // weights of 4 bits that share a factor
constexpr int64_t STEP_BYTES = 2 * TILE_ROWS * TILE_BYTES;  // the upper and the lower bytes of 64 columns of 16 rows

inline std::atomic<bool> tiles_off{false};

// Whether there are tiles: the operating system must have allowed this process to use them.
static bool tiles_allowed() {
#if HAS_TILES
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
    return allowed && !tiles_off;
#else
    return false;
#endif
}

static inline bool tiles_wanted(int64_t n_rows) { return n_rows >= TILE_LEAST_ROWS && tiles_allowed(); }
static inline bool tiles_fit(int64_t n_in) { return n_in >= TILE_BYTES && n_in <= TILE_MOST_IN; }

// Columns are taken 64 at a time; the last 64 of them overlap those before, where zeros stand in the activations' place.
static inline int64_t tile_steps(int64_t n_in) { return (n_in + TILE_BYTES - 1) / TILE_BYTES; }
static inline int64_t panel_size(int64_t n_in) { return tile_steps(n_in) * STEP_BYTES; }
static inline int64_t tiles_size(int64_t n_in, int64_t n_rows) { return (n_rows + TILE_ROWS - 1) / TILE_ROWS * panel_size(n_in); }

#if HAS_TILES

// 16 rows of 16 numbers become columns.
static inline void transpose(__m512 (&rows)[16]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    auto pairs = [](__m512 a, __m512 b, bool upper) {
        __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
        return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    };
    __m512 q[16];  // q[i + j] holds columns j, 4 + j, 8 + j and 12 + j of rows i ... i + 3
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 4; j++) q[i + j] = pairs(t[i + j / 2], t[i + 2 + j / 2], j % 2);
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(q[j], q[4 + j], 0x88), b = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0x88);
        __m512 c = _mm512_shuffle_f32x4(q[j], q[4 + j], 0xdd), d = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        rows[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        rows[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
        rows[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
}

// Fill tile i, counted through the panels, of the activations x (n_rows, n): 64 columns of 16 rows, as (upper and lower
// bytes, 64 / 4, 16 rows, 4). Rows that the last panel lacks are zeros.
static void fill_tile(const int16_t* x, int64_t n, int64_t n_rows, int64_t i, int8_t* tiles) {
    const int64_t begin = i / tile_steps(n) * TILE_ROWS, k = i % tile_steps(n) * TILE_BYTES, first = std::min(k, n - TILE_BYTES);
    const __mmask64 fresh = ~0ull << (k - first);
    for (int shift : {8, 0}) {
        __m512 rows[16] = {};
        for (int64_t row = 0; row < std::min(TILE_ROWS, n_rows - begin); row++) {
            const int16_t* from = x + (begin + row) * n + first;
            __m256i low = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_loadu_si512(from), shift));
            __m256i high = _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_loadu_si512(from + 32), shift));
            __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            rows[row] = _mm512_castsi512_ps(_mm512_maskz_mov_epi8(fresh, bytes));
        }
        transpose(rows);
        float* to = reinterpret_cast<float*>(tiles + i * STEP_BYTES + (shift ? 0 : STEP_BYTES / 2));
        for (int j = 0; j < 16; j++) _mm512_store_ps(to + j * 16, rows[j]);
    }
}

struct alignas(64) TileShapes {  // as the processor reads them
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16];
    uint8_t rows[16];
};
static constexpr TileShapes WIDE_TILES{.bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
static constexpr TileShapes NARROW_TILES{.bytes = {64, 64, 64, 64, 32, 32, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 8, 8}};

// While it lives, this thread has four tiles of sums, two of 16 rows of so many weights, and two of as many activations
// of 16 rows.
class Tiles {
   public:
    Tiles(bool wanted, int64_t columns) : wanted(wanted) {
        if (wanted) _tile_loadconfig(columns == TILE_BYTES ? &WIDE_TILES : &NARROW_TILES);
    }
    ~Tiles() {
        if (wanted) _tile_release();
    }
    Tiles(const Tiles&) = delete;

   private:
    const bool wanted;
};

// y[row][out] of 32 outputs and 16 rows of activations, times the factors of both, plus the biases. Meanwhile those of the
// weights' lines are fetched that lie `ahead` bytes on: of every `parts` rows one, from `part` on.
static void multiply_tiles(const int8_t* weights, const float* factors, const float* bias, int64_t n_in, const int8_t* panel,
                           const float* row_factors, int64_t ahead, int64_t part, int64_t parts, float (*y)[TILE_OUT]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t steps = tile_steps(n_in);
    for (int64_t s = 0; s < steps; s++) {
        const int8_t *w = weights + std::min(s * TILE_BYTES, n_in - TILE_BYTES), *x = panel + s * STEP_BYTES;
        auto fetch = [&](int64_t quarter) {  // not all at once, or the tiles wait for them
            for (int64_t r = quarter + part; r < TILE_OUT; r += 4 * parts) __builtin_prefetch(w + ahead + r * n_in, 0, 2);
        };
        _tile_loadd(4, w, n_in);
        fetch(0);
        _tile_loadd(6, x, TILE_BYTES);
        _tile_dpbssd(0, 4, 6);
        fetch(parts);
        _tile_loadd(7, x + STEP_BYTES / 2, TILE_BYTES);
        _tile_dpbsud(1, 4, 7);
        fetch(2 * parts);
        _tile_loadd(5, w + TILE_ROWS * n_in, n_in);
        _tile_dpbssd(2, 5, 6);
        fetch(3 * parts);
        _tile_dpbsud(3, 5, 7);
    }
    alignas(64) int32_t found[4][TILE_ROWS][16];
    _tile_stored(0, found[0], TILE_BYTES);
    _tile_stored(1, found[1], TILE_BYTES);
    _tile_stored(2, found[2], TILE_BYTES);
    _tile_stored(3, found[3], TILE_BYTES);
    const __m512 of_rows = _mm512_loadu_ps(row_factors);
    for (int64_t half = 0; half < 2; half++) {
        __m512 outputs[16];
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const int64_t n = half * TILE_ROWS + r;
            auto total = [&](int i) {  // doubles hold these sums exactly
                auto eight = [&](const int32_t* from) { return _mm512_cvtepi32_pd(_mm256_load_si256(reinterpret_cast<const __m256i*>(from))); };
                return _mm512_cvtpd_ps(_mm512_fmadd_pd(eight(found[2 * half][r] + i), _mm512_set1_pd(256.0), eight(found[2 * half + 1][r] + i)));
            };
            __m512 value = _mm512_insertf32x8(_mm512_castps256_ps512(total(0)), total(8), 1);
            value = _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(factors[n])), of_rows);
            // Added apart: a compiler would make one instruction of both, which rounds once, and not everywhere.
            outputs[r] = bias ? _mm512_add_round_ps(value, _mm512_set1_ps(bias[n]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : value;
        }
        transpose(outputs);
        for (int64_t b = 0; b < TILE_ROWS; b++) _mm512_storeu_ps(y[b] + half * TILE_ROWS, outputs[b]);
    }
}

// The same for 4 bits, by tiles of one group's columns, whose sums are multiplied by the factors of the group one after the
// other. `unpacked` holds the weights of the 32 outputs (32, n_in), and `factors` theirs (n_in / 32, 32).
static void multiply_groups(const int8_t* unpacked, const float* factors, const float* bias, int64_t n_in, const int8_t* panel,
                            const float* row_factors, float (*y)[TILE_OUT]) {
    const int64_t groups = n_in / GROUP;
    alignas(64) float totals[TILE_OUT][16] = {};
    for (int64_t g = 0; g < groups; g++) {
        const bool second = g % 2 || (g == groups - 1 && g > 0);  // half of 64 columns, of which the last overlap
        const int8_t *w = unpacked + g * GROUP, *x = panel + g / 2 * STEP_BYTES + (second ? STEP_BYTES / 4 : 0);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, w, n_in);
        _tile_loadd(6, x, TILE_BYTES);
        _tile_loadd(7, x + STEP_BYTES / 2, TILE_BYTES);
        _tile_loadd(5, w + TILE_ROWS * n_in, n_in);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        alignas(64) int32_t found[4][TILE_ROWS][16];
        _tile_stored(0, found[0], TILE_BYTES);
        _tile_stored(1, found[1], TILE_BYTES);
        _tile_stored(2, found[2], TILE_BYTES);
        _tile_stored(3, found[3], TILE_BYTES);
        for (int64_t n = 0; n < TILE_OUT; n++) {
            const int32_t(*both)[TILE_ROWS][16] = found + n / TILE_ROWS * 2;
            __m512i upper = _mm512_load_si512(both[0][n % TILE_ROWS]), lower = _mm512_load_si512(both[1][n % TILE_ROWS]);
            __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));  // below 2^24
            _mm512_store_ps(totals[n], _mm512_fmadd_ps(total, _mm512_set1_ps(factors[g * TILE_OUT + n]), _mm512_load_ps(totals[n])));
        }
    }
    const __m512 of_rows = _mm512_loadu_ps(row_factors);
    for (int64_t half = 0; half < TILE_OUT; half += TILE_ROWS) {
        __m512 outputs[16];
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            __m512 value = _mm512_mul_ps(_mm512_load_ps(totals[half + r]), of_rows);
            outputs[r] = bias ? _mm512_add_ps(value, _mm512_set1_ps(bias[half + r])) : value;
        }
        transpose(outputs);
        for (int64_t b = 0; b < TILE_ROWS; b++) _mm512_storeu_ps(y[b] + half, outputs[b]);
    }
}

#else

static void fill_tile(const int16_t*, int64_t, int64_t, int64_t, int8_t*) {}
struct Tiles {
    Tiles(bool, int64_t) {}
    ~Tiles() {}
};

#endif
