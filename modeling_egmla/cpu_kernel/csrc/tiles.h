// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on a block of fp32 or bf16 entries, in tiles of 4 heads x 4 tokens. Needs AVX-512. README.md has a picture.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "head_per_lane.h"
#include "online_softmax.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
// Side of a tile: 4 heads x 4 tokens fill one vector of scores. While scoring, a vector holds 16 bytes of each of four
// heads. Twelve heads then leave no lane empty, and sixteen heads need fewer reads than with a head per lane.
constexpr int64_t TILE_SIDE = 4;

// Elements of dtype T in a vector: per head, and in total.
template <typename T>
constexpr int64_t HEAD_ELEMENTS = 16 / sizeof(T);
template <typename T>
constexpr int64_t VECTOR_ELEMENTS = CACHE_LINE / sizeof(T);

template <typename T>
bool fits_tiles(int64_t width, int64_t rank) {
  return width % HEAD_ELEMENTS<T> == 0 && rank % LANES == 0 &&
         (rank % VECTOR_ELEMENTS<T> == 0 || rank + LANES <= width);
}

int64_t head_tiles_of(int64_t rows) { return (std::min(LANES, rows) + TILE_SIDE - 1) / TILE_SIDE; }

// Packs queries [rows, W] as vectors [W / HEAD_ELEMENTS, head tiles, VECTOR_ELEMENTS], for up to sixteen heads at a
// time.
template <typename T>
void pack_queries(const float* query, int64_t rows, int64_t width, T* to) {
  constexpr int64_t PER_HEAD = HEAD_ELEMENTS<T>;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = row / LANES * LANES, stride = head_tiles_of(rows - first) * VECTOR_ELEMENTS<T>;
    T* place = to + first * width + (row - first) * PER_HEAD;
    for (int64_t i = 0; i < width; i += PER_HEAD, place += stride) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < PER_HEAD; j++) place[j] = query[row * width + i + j];
    }
  }
}

inline __m512 multiply(__m512 sum, __m512i a, __m512i b, float) { return _mm512_fmadd_ps((__m512)a, (__m512)b, sum); }
// Adds the products of two bf16 numbers in each lane.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool MULTIPLIES_BF16 = true;
inline __m512 multiply(__m512 sum, __m512i a, __m512i b, c10::BFloat16) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif
// Adds the products of two 16-bit integers in each lane, or of four signed and four unsigned bytes.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512CD__)
constexpr bool MULTIPLIES_INTEGERS = true;
inline __m512i multiply(__m512i sum, __m512i a, __m512i b, int16_t) { return _mm512_dpwssd_epi32(sum, a, b); }
inline __m512i multiply(__m512i sum, __m512i a, __m512i b, int8_t) { return _mm512_dpbusd_epi32(sum, b, a); }
#else
constexpr bool MULTIPLIES_INTEGERS = false;
#endif

// Tokens scored in one step.
template <int64_t HEAD_TILES>
constexpr int64_t TILE_STEP_TOKENS = HEAD_TILES < 4 ? STEP_TOKENS : STEP_TOKENS / 2;

// Adds the products of queries with `elements` elements of each token of a step. Each head has partial sums in four
// lanes. Calls `each` with every element index.
template <typename T, int64_t HEAD_TILES, typename Entry, typename Sum, typename Each>
[[gnu::always_inline]] inline void multiply_tiles(
    const T* query, const Entry* entries, int64_t width, int64_t elements, const Each& each,
    Sum (&sum)[TILE_STEP_TOKENS<HEAD_TILES>][HEAD_TILES]) {
  for (int64_t element = 0; element < elements; element += HEAD_ELEMENTS<T>, query += HEAD_TILES * VECTOR_ELEMENTS<T>) {
    each(element);
    __m512i heads[HEAD_TILES];
#pragma GCC unroll 4
    for (int64_t k = 0; k < HEAD_TILES; k++) heads[k] = _mm512_load_si512(query + k * VECTOR_ELEMENTS<T>);
#pragma GCC unroll 8
    for (int64_t j = 0; j < TILE_STEP_TOKENS<HEAD_TILES>; j++) {
      const auto* place = reinterpret_cast<const __m128i*>(entries + j * width + element);
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(place));
#pragma GCC unroll 4
      for (int64_t k = 0; k < HEAD_TILES; k++) sum[j][k] = multiply(sum[j][k], heads[k], four, T{});
    }
  }
}

// Reduces four tokens' partial sums [four heads, four lanes] to scores [four heads, four tokens].
template <typename V>
inline V sum_lanes(V a, V b, V c, V d) {
  const auto neighbours = [](V x, V y) {
    return (V)_mm512_unpacklo_ps((__m512)x, (__m512)y) + (V)_mm512_unpackhi_ps((__m512)x, (__m512)y);
  };
  const auto pairs = [](V x, V y) {
    return (V)_mm512_unpacklo_pd((__m512d)x, (__m512d)y) + (V)_mm512_unpackhi_pd((__m512d)x, (__m512d)y);
  };
  return pairs(neighbours(a, b), neighbours(c, d));
}

// Scores [tokens / 4, HEAD_TILES, four heads, four tokens].
template <typename T, int64_t HEAD_TILES, int64_t ELEMENTS_PER_LINE>
void score_tiles(
    const T* query, const T* entries, int64_t width, int64_t count, Prefetcher& prefetcher, float* scores) {
  constexpr int64_t INTERVAL = ELEMENTS_PER_LINE / TILE_STEP_TOKENS<HEAD_TILES>;
  static_assert(INTERVAL % HEAD_ELEMENTS<T> == 0);
  const auto prefetch_lines = [&](int64_t element) {
    if constexpr (INTERVAL > 0) {
      if (element % INTERVAL == 0) prefetcher.fetch();
    }
  };
  for (int64_t token = 0; token < count;
       token += TILE_STEP_TOKENS<HEAD_TILES>, entries += TILE_STEP_TOKENS<HEAD_TILES> * width) {
    __m512 sum[TILE_STEP_TOKENS<HEAD_TILES>][HEAD_TILES] = {};
    multiply_tiles<T>(query, entries, width, width, prefetch_lines, sum);
#pragma GCC unroll 2
    for (int64_t j = 0; j < TILE_STEP_TOKENS<HEAD_TILES>; j += TILE_SIDE) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < HEAD_TILES; k++, scores += LANES) {
        store(scores, sum_lanes<Vector>(sum[j][k], sum[j + 1][k], sum[j + 2][k], sum[j + 3][k]));
      }
    }
  }
}

// Masks tiles of scores: masked tokens, and the padding after the `valid` ones.
template <int64_t HEAD_TILES>
inline void mask_tiles(float* scores, int64_t count, int64_t valid, const bool* visible, int64_t token_stride) {
  for (int64_t token = visible ? 0 : valid; token < count; token++) {
    if (token < valid && (!visible || visible[token * token_stride])) continue;
    float* token_scores = scores + token / TILE_SIDE * HEAD_TILES * LANES + token % TILE_SIDE;
    for (int64_t head = 0; head < HEAD_TILES * TILE_SIDE; head++) token_scores[head * TILE_SIDE] = MASKED_SCORE;
  }
}

template <int64_t HEAD_TILES>
void add_tile_values(
    float* values, int64_t rows, int64_t rank, const float* weights, const float* rescale, const Block<float>& block,
    int64_t width, Prefetcher& prefetcher) {
  add_values<TILE_SIDE>(
      values, rows, rank, weights, HEAD_TILES * LANES, rescale, block.entries, width, block.count, prefetcher);
}

#if defined(__AVX512BW__)
// Interleaves two tokens: their elements become pairs of 16-bit numbers, sixteen pairs in each of up to two vectors.
template <typename Entry>
struct TokenPairs {
  __m512i indices[2];  // positions of the pairs in two rows: the first sixteen elements, then the others

  TokenPairs() {
    alignas(CACHE_LINE) int16_t places[2][2 * LANES];
    for (int16_t i = 0; i < 2 * LANES; i++) {
      places[0][i] = i / 2 + i % 2 * 2 * LANES;
      places[1][i] = places[0][i] + LANES;
    }
    for (int64_t j = 0; j < 2; j++) indices[j] = _mm512_load_si512(places[j]);
  }
  template <int64_t COLUMNS>
  [[gnu::always_inline]] void make(const Entry* one, const Entry* other, __m512i (&pairs)[COLUMNS]) const {
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(other);
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) pairs[j] = _mm512_permutex2var_epi16(a, indices[j], b);
  }
};

// For bytes, which are widened to 16 bits. The vectors hold elements 0 to 7 and 16 to 23, and 8 to 15 and 24 to 31.
template <>
struct TokenPairs<uint8_t> {
  template <int64_t COLUMNS>
  [[gnu::always_inline]] void make(const uint8_t* one, const uint8_t* other, __m512i (&pairs)[COLUMNS]) const {
    if constexpr (COLUMNS == 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(other));
      pairs[0] = _mm512_cvtepu8_epi16(_mm256_unpacklo_epi8(a, b));
      pairs[1] = _mm512_cvtepu8_epi16(_mm256_unpackhi_epi8(a, b));
    } else {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(one));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(other));
      pairs[0] = _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
    }
  }
};

// Adds products of weights of dtype T and token pairs to the sums of `ROWS` heads. Weights are pairs [tokens / 4, ..,
// heads, 2] with `stride` in the first dimension.
template <typename T, int64_t ROWS, int64_t COLUMNS, typename Entry, typename Sum>
[[gnu::always_inline]] inline void multiply_pairs(
    const Pair* weights, int64_t stride, const Entry* entries, int64_t width, int64_t count, Prefetcher& shared,
    Sum (&sum)[ROWS][COLUMNS]) {
  Prefetcher prefetcher = shared;
  const TokenPairs<Entry> interleave;
  for (int64_t token = 0; token < count; token += 2, entries += 2 * width) {
    prefetcher.fetch_if_left();
    prefetcher.fetch_if_left();
    __m512i pairs[COLUMNS];
    interleave.make(entries, entries + width, pairs);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
      const __m512i weight = _mm512_set1_epi32(weights[i * 2]);
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = multiply(sum[i][j], weight, pairs[j], T{});
    }
    weights += token % TILE_SIDE ? stride - 1 : 1;
  }
  shared = prefetcher;
}

// Calls `add` with a row and an element. Its template arguments are the rows and vectors of elements to take.
template <int64_t HEAD_TILES, typename Add>
inline void for_each_register_block(int64_t rank, const Add& add) {
  constexpr int64_t ROWS = HEAD_TILES == 3 ? 6 : std::min<int64_t>(HEAD_TILES, 2) * TILE_SIDE;
  for (int64_t row = 0; row < HEAD_TILES * TILE_SIDE; row += ROWS) {
    int64_t element = 0;
    for (; element + 2 * LANES <= rank; element += 2 * LANES) add.template operator()<ROWS, 2>(row, element);
    if (element < rank) add.template operator()<ROWS, 1>(row, element);
  }
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <int64_t HEAD_TILES>
void add_tile_values(
    float* values, int64_t, int64_t rank, const float* weights, const float* rescale, const Block<c10::BFloat16>& block,
    int64_t width, Prefetcher& prefetcher) {
  const Pair* pairs = reinterpret_cast<const Pair*>(weights);
  for_each_register_block<HEAD_TILES>(rank, [&]<int64_t ROWS, int64_t COLUMNS>(int64_t row, int64_t element) {
    float* to = values + row * rank + element;
    __m512 sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++)
        sum[i][j] = load(to + i * rank + j * LANES) * rescale[(row + i) * TILE_SIDE];
    }
    multiply_pairs<c10::BFloat16>(
        pairs + row * 2, HEAD_TILES * LANES / 2, block.entries + element, width, block.count, prefetcher, sum);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++) store(to + i * rank + j * LANES, sum[i][j]);
    }
  });
}
#endif

// The same as `add_block`, in tiles: the running maximum and denominator have four lanes per head.
template <typename T, int64_t HEAD_TILES, int64_t ELEMENTS_PER_LINE>
void add_tile_block(
    const Block<T>& block, const T* query, float scaling, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Prefetcher& prefetcher) {
  score_tiles<T, HEAD_TILES, ELEMENTS_PER_LINE>(query, block.entries, width, block.count, prefetcher, block.scores);
  mask_tiles<HEAD_TILES>(block.scores, block.count, block.valid, block.visible, block.token_stride);
  const auto softmax = softmax_block<HEAD_TILES, TILE_SIDE, T>(
      block.scores, block.count / TILE_SIDE, scaling, sums.maximum, sums.denominator, prefetcher);
  add_tile_values<HEAD_TILES>(sums.values, rows, rank, block.scores, softmax.rescale, block, width, prefetcher);
}

// Calls `add` with the number of head tiles for `rows` heads, at most four.
template <typename Add>
void with_head_tiles(int64_t rows, const Add& add) {
  switch (head_tiles_of(rows)) {
    case 1:
      return add.template operator()<1>();
    case 2:
      return add.template operator()<2>();
    case 3:
      return add.template operator()<3>();
    default:
      return add.template operator()<4>();
  }
}

template <typename T, int64_t ELEMENTS_PER_LINE>
void add_tile_block(
    const Block<T>& block, const T* query, float scaling, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Prefetcher& prefetcher) {
  with_head_tiles(rows, [&]<int64_t HEAD_TILES>() {
    add_tile_block<T, HEAD_TILES, ELEMENTS_PER_LINE>(block, query, scaling, rows, width, rank, sums, prefetcher);
  });
}
#else
constexpr int64_t TILE_SIDE = 1;
constexpr bool MULTIPLIES_BF16 = false, MULTIPLIES_INTEGERS = false;
template <typename T>
bool fits_tiles(int64_t, int64_t) {
  return false;
}
template <typename T>
void pack_queries(const float*, int64_t, int64_t, T*) {}
template <typename T, int64_t ELEMENTS_PER_LINE>
void add_tile_block(const Block<T>&, const T*, float, int64_t, int64_t, int64_t, const Sums&, Prefetcher&) {}
#endif

}  // namespace
