// Vectors of floats, and how weights of each precision become them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
static inline Vec splat(float x) { return Vec{} + x; }

static inline float sum(Vec v) {  // in a fixed order, so that a row does not depend on its company
    float parts[WIDTH];
    store(parts, v);
    for (int n = WIDTH / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) parts[i] += parts[i + n];
    return parts[0];
}

static inline float largest(Vec v) {
    float parts[WIDTH], most = -INFINITY;
    store(parts, v);
    for (float part : parts) most = part > most ? part : most;
    return most;
}

static inline Vec load(const uint16_t* p) {  // bfloat16 is the upper half of a float
    IntVec bits = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), IntVec) << 16;
    return (Vec)bits;
}

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

// exp to 2e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (its Taylor series up to x^7). At or below -87 it gives 0.
static inline Vec exp_of(Vec x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    Vec t = x * 1.44269504f + 0.5f;
    IntVec n = __builtin_convertvector(t, IntVec);
    n -= (__builtin_convertvector(n, Vec) > t) & 1;  // towards minus infinity
    Vec f = __builtin_convertvector(n, Vec);
    Vec r = x - f * 0.693359375f + f * 2.12194440e-4f;
    Vec y = splat(1.0f / 5040);
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
    IntVec power = (n + 127) << 23;
    y *= (Vec)power;
    return x <= splat(-87.0f) ? Vec{} : y;
}

// How the rows of a weight matrix are stored. `at` gives WIDTH weights from column k on, `one` a single one, both without
// the factor of the row, `scale`.

struct Floats {
    const float* data;
    int64_t n_in;
    Vec at(int64_t n, int64_t k) const { return load(data + n * n_in + k); }
    float one(int64_t n, int64_t k) const { return data[n * n_in + k]; }
    float scale(int64_t) const { return 1.0f; }
};

struct BFloats {
    const uint16_t* data;
    int64_t n_in;
    Vec at(int64_t n, int64_t k) const { return load(data + n * n_in + k); }
    float one(int64_t n, int64_t k) const { return number(data[n * n_in + k]); }
    float scale(int64_t) const { return 1.0f; }
};

struct Bytes {  // int8, one factor a row
    const int8_t* data;
    const float* scales;
    int64_t n_in;
    Vec at(int64_t n, int64_t k) const {
        return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const ByteVec*>(data + n * n_in + k), IntVec), Vec);
    }
    float one(int64_t n, int64_t k) const { return data[n * n_in + k]; }
    float scale(int64_t n) const { return scales[n]; }
};

struct Nibbles {  // 4 bits, one factor per group of 32: byte i of a group holds weight i (low) and weight i + 16 (high), plus 8
    const int8_t* data;
    const float* scales;
    int64_t n_in;
    Vec at(int64_t n, int64_t k) const {
        int64_t group = (n * n_in + k) / 32, within = k % 32;
        IntVec bytes = __builtin_convertvector(*reinterpret_cast<const ByteVec*>(data + group * 16 + within % 16), IntVec);
        bytes = within < 16 ? bytes & 15 : bytes >> 4 & 15;
        return __builtin_convertvector(bytes - 8, Vec) * scales[group];
    }
    float one(int64_t n, int64_t k) const {
        int64_t group = (n * n_in + k) / 32, within = k % 32;
        int bits = data[group * 16 + within % 16];
        return ((within < 16 ? bits & 15 : bits >> 4 & 15) - 8) * scales[group];
    }
    float scale(int64_t) const { return 1.0f; }
};
