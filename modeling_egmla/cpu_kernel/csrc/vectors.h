// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// SIMD vectors, operations on them, and aligned memory.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
// Tokens scored in one step: their scores stay in registers. With more than twelve heads in tiles, half as many.
constexpr int64_t STEP_TOKENS = 8;
// Elements of a block of tokens, unless one step has more. 12 KB, so that block, queries and sums share the L1 cache.
constexpr int64_t BLOCK_ELEMENTS = 3072;
constexpr int64_t CACHE_LINE = 64;  // bytes
// Prefetch target: 3 is the L1 cache, 2 the L2 cache. With fp32 entries L1 was 4 % faster on Zen 4, and slower on
// Cascade Lake.
#if defined(__AVX512BF16__)
constexpr int PREFETCH_LOCALITY = 3;
#else
constexpr int PREFETCH_LOCALITY = 2;
#endif
// Score of a masked token, before scaling. It is finite, so that differences of scores are not NaN.
constexpr float MASKED_SCORE = -1e30f;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
// A byte in each lane. g++ 12 would convert the vector byte by byte.
inline Integers load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Integers);
#endif
}

// Stores weights in the dtype in which they are multiplied.
inline void store_as(float* to, Vector value) { store(to, value); }
#if defined(__AVX512BF16__)
inline void store_as(c10::BFloat16* to, Vector value) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#endif

// The larger of two. If one is NaN, the second.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
// In each group of four neighbouring lanes, their largest.
inline Vector largest_of_four(Vector x) {
  x = larger((Vector)_mm512_permute_ps((__m512)x, 0b01001110), x);
  return larger((Vector)_mm512_permute_ps((__m512)x, 0b10110001), x);
}
#else
inline Vector largest_of_four(Vector x) { return x; }  // never called
#endif

// exp(x) for x <= 0, as 2^n times a polynomial. The relative error is 2e-7 near 0 and 4e-6 at -87. With `APPROXIMATE`
// it is 1e-4: a twentieth of what rounding to bf16 changes, and a fortieth of what rounding queries to int8 changes.
template <bool APPROXIMATE = false>
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector scaled = larger(lowest, x) * 1.44269504f;
  const Vector rounded = scaled + magic;
  const Vector rest = scaled - (rounded - magic);
  Vector result;
  if constexpr (APPROXIMATE) {
    result = Vector{} + 5.5171e-2f;
    result = result * rest + 2.4261e-1f;
    result = result * rest + 6.9326e-1f;
    result = result * rest + 0.99993f;
  } else {
    result = Vector{} + 1.535336188319500e-4f;
    result = result * rest + 1.339887440266574e-3f;
    result = result * rest + 9.618437357674640e-3f;
    result = result * rest + 5.550332471162809e-2f;
    result = result * rest + 2.402264791363012e-1f;
    result = result * rest + 6.931472028550421e-1f;
    result = result * rest + 1.0f;
  }
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)result, (__m512)(rounded - magic));
#else
  result = (Vector)(((Integers)rounded << 23) + (Integers)result);
  return x == x ? result : x;  // the bits of a NaN, added up, may be those of a number
#endif
}

typedef int32_t Pair __attribute__((may_alias));  // two 16-bit numbers

// Memory that starts at a cache line. A vector that straddles two lines takes two reads.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, T value = 0) : memory_(count + CACHE_LINE / sizeof(T), value) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (CACHE_LINE - address % CACHE_LINE) % CACHE_LINE / sizeof(T);
  }
  Buffer(const Buffer&) = delete;
  T* data() { return start_; }

 private:
  std::vector<T> memory_;
  T* start_;
};

}  // namespace
