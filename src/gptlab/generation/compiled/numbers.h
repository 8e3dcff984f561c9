// Vectors of floats, and how weights of each precision become them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t IntVec __attribute__((vector_size(WIDTH * 4)));
typedef float LooseVec __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(WIDTH), aligned(1), may_alias));

// Memory that begins at a line of the processor's cache: loads that cross a line take twice as long.
template <class T>
struct Aligned {
    typedef T value_type;
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
static inline Vec splat(float x) { return Vec{} + x; }

static inline float sum(Vec v) {  // in a fixed order, so that a row does not depend on its company
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float parts[WIDTH];
    store(parts, v);
    for (int n = WIDTH / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
#endif
}

// Compilers widen small numbers one by one unless they are told the instruction.
static inline IntVec widen(const int8_t* p) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    return (IntVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const ByteVec*>(p), IntVec);
#endif
}

static inline IntVec widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return (IntVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), IntVec);
#endif
}

static inline void narrow(int16_t* p, IntVec x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#else
    for (int i = 0; i < WIDTH; i++) p[i] = static_cast<int16_t>(x[i]);
#endif
}

static inline Vec floats(IntVec x) { return __builtin_convertvector(x, Vec); }
static inline Vec load(const uint16_t* p) { return (Vec)(widen(p) << 16); }  // bfloat16 is the upper half of a float

static inline float number(float x) { return x; }
static inline float number(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline void put(float* p, float x) { *p = x; }
static inline void put(uint16_t* p, float x) {  // rounded to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// exp to 2e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (its Taylor series up to x^7). At or below -87 it
// gives 0, above 88 infinity, and of NaN NaN.
static inline Vec exp_of(Vec exponent) {
    Vec x = exponent < splat(-87.0f) ? splat(-87.0f) : exponent;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    Vec t = x * 1.44269504f + 0.5f;
    IntVec n = __builtin_convertvector(t, IntVec);
    n -= (floats(n) > t) & 1;  // towards minus infinity
    Vec f = floats(n);
    Vec r = x - f * 0.693359375f + f * 2.12194440e-4f;
    Vec y = splat(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    IntVec power = (n + 127) << 23;
    y *= (Vec)power;
    y = exponent > splat(88.0f) ? splat(INFINITY) : y;
    return exponent <= splat(-87.0f) ? Vec{} : y;
}

// How the rows of a weight matrix are stored. `one` gives a single weight; `floats_at` WIDTH of them from column k on, or
// `shorts_at` PAIRS of them without their factor. `address` is for fetching ahead.

struct Floats {
    const float* data;
    int64_t n_in;
    Vec floats_at(int64_t n, int64_t k) const { return load(data + n * n_in + k); }
    float one(int64_t n, int64_t k) const { return data[n * n_in + k]; }
    const void* address(int64_t n, int64_t k) const { return data + n * n_in + k; }
    static constexpr int64_t LINE = 16;  // weights in a line of the processor's cache
};

struct BFloats {
    const uint16_t* data;
    int64_t n_in;
    Vec floats_at(int64_t n, int64_t k) const { return load(data + n * n_in + k); }
    float one(int64_t n, int64_t k) const { return number(data[n * n_in + k]); }
    const void* address(int64_t n, int64_t k) const { return data + n * n_in + k; }
    static constexpr int64_t LINE = 32;
};

// Whole numbers: int8 weights times activations in 16 bits. Products and sums are exact, so only the rounding of the
// activations, to 1/32767 of the largest of their row, parts them from floats.

constexpr int PAIRS = WIDTH * 2;  // weights that are multiplied at a time
constexpr int64_t EXACT = 254 * PAIRS;  // so many products of -128 and 32767 can be added, two by two, in 32 bits
typedef int16_t ShortVec __attribute__((vector_size(PAIRS * 2), aligned(2), may_alias));

// totals + the sums of neighbouring products of PAIRS weights and activations.
static inline IntVec add_products(IntVec totals, ShortVec weights, ShortVec x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (IntVec)_mm512_dpwssd_epi32((__m512i)totals, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512BW__)
    return totals + (IntVec)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return totals + (IntVec)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#else
    for (int i = 0; i < WIDTH; i++) totals[i] += weights[2 * i] * x[2 * i] + weights[2 * i + 1] * x[2 * i + 1];
    return totals;
#endif
}

static inline int64_t exact_sum(IntVec v) {
#if defined(__AVX512F__)
    __m512i x = (__m512i)v;
    __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(x)), high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
#else
    int64_t total = 0;
    for (int i = 0; i < WIDTH; i++) total += v[i];
    return total;
#endif
}

static inline ShortVec shorts(const int8_t* p) {
#if defined(__AVX512BW__)
    return (ShortVec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (ShortVec)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    ShortVec v;
    for (int i = 0; i < PAIRS; i++) v[i] = p[i];
    return v;
#endif
}

#if defined(__AVX512BW__)
static inline __m256i unpack(const int8_t* group) {  // 32 weights of 4 bits
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group)), mask = _mm_set1_epi8(15);
    __m256i both = _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), _mm_and_si128(bytes, mask));
    return _mm256_sub_epi8(both, _mm256_set1_epi8(8));
}
#endif

// PAIRS weights of a group of 4-bit ones, from `within` on.
static inline ShortVec halves(const int8_t* group, [[maybe_unused]] int64_t within) {
#if defined(__AVX512BW__)
    return (ShortVec)_mm512_cvtepi8_epi16(unpack(group));
#else
    ShortVec v;
    for (int i = 0; i < PAIRS; i++) {
        int bits = group[(within + i) % 16];
        v[i] = (within + i < 16 ? bits & 15 : bits >> 4 & 15) - 8;
    }
    return v;
#endif
}

struct Bytes {  // one factor per row
    const int8_t* data;
    const float* factors;
    int64_t n_in;
    ShortVec shorts_at(int64_t n, int64_t k) const { return shorts(data + n * n_in + k); }
    float one(int64_t n, int64_t k) const { return data[n * n_in + k] * factors[n]; }
    const void* address(int64_t n, int64_t k) const { return data + n * n_in + k; }
    static constexpr int64_t LINE = 64;
};

struct Nibbles {  // one factor per 32 weights; byte i of such a group holds weight i (low half) and weight i + 16, both plus 8
    const int8_t* data;
    const float* factors;
    int64_t n_in;
    ShortVec shorts_at(int64_t n, int64_t k) const { return halves(data + (n * n_in + k) / 32 * 16, k % 32); }
    float one(int64_t n, int64_t k) const {
        int64_t group = (n * n_in + k) / 32, within = k % 32;
        int bits = data[group * 16 + within % 16];
        return ((within < 16 ? bits & 15 : bits >> 4 & 15) - 8) * factors[group];
    }
    float factor(int64_t n, int64_t k) const { return factors[(n * n_in + k) / 32]; }
    const void* address(int64_t n, int64_t k) const { return data + (n * n_in + k) / 2; }
    static constexpr int64_t LINE = 128;
};
