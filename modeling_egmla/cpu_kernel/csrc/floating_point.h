// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on entries in floating point: fp32, or bf16 where the processor multiplies pairs of those.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "cache_entries.h"
#include "vectors.h"

namespace {

// Seen by the last token or not, per sequence and token; a null pointer: all are.
struct Mask {
  const bool* seen = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;
};

// What a part of a sequence comes to: per head the highest score, the sum of exponentials relative to it (both with a
// head per lane, within `attend` in quads with four) and the sum of values weighted with them, [heads, R].
struct Sums {
  float *top, *total, *values;
};

// Bytes of the block after this one, called for a line at a time, spread over the work on this one: the processor's own
// prefetching stops at each page, and many calls at once wait for one another. Scores call for as many as they do
// whatever `end` says, since a comparison each costs as much as was gained; what follows them calls for the others up
// to `end` (0: there are none).
struct Lines {
  uintptr_t next = 0, end = 0;

  inline void call() {
    __builtin_prefetch(reinterpret_cast<const void*>(next), 0, INTO);
    next += CACHE_LINE;
  }
  inline void call_if_left() {
    if (next < end) call();
  }
};

// What sums of earlier weights are to be multiplied with, and the sum of a block's.
template <int64_t VECTORS>
struct Softened {
  float shrink[VECTORS * LANES], sum[VECTORS * LANES];
};

// Turns scores [count, VECTORS, LANES], times the scaling, into weights relative to the highest so far. A head has a
// lane of its own, or `LANES_OF_HEAD` neighbouring ones, with one highest score and each with a part of the sum.
// Weights take the place of scores; those of bf16 half of it, one behind the other. `ROUGH`: as of `exponential`.
template <int64_t VECTORS, int64_t LANES_OF_HEAD, typename T = float, bool ROUGH = !std::is_same_v<T, float>>
inline Softened<VECTORS> soften(
    float* scores, int64_t count, float scaling, float* top_so_far, float* total, Lines& left) {
  Lines lines = left;  // which stays in registers
  Vector top[VECTORS], sum[VECTORS] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) top[k] = load(scores + k * LANES);
  for (int64_t i = 1; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) top[k] = larger(load(scores + (i * VECTORS + k) * LANES), top[k]);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) {
    if constexpr (LANES_OF_HEAD == 4) top[k] = largest_of_four(top[k]);
    top[k] = larger(top[k] * scaling, load(top_so_far + k * LANES));
  }
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) {
      lines.call_if_left();
      const int64_t place = (i * VECTORS + k) * LANES;
      const Vector weight = exponential<ROUGH>(load(scores + place) * scaling - top[k]);
      store_as(reinterpret_cast<T*>(scores) + place, weight);
      sum[k] += weight;
    }
  }
  left = lines;
  Softened<VECTORS> softened;
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) {
    const int64_t first = k * LANES;
    const Vector shrink = exponential(load(top_so_far + first) - top[k]);
    store(top_so_far + first, top[k]);
    store(total + first, load(total + first) * shrink + sum[k]);
    store(softened.shrink + first, shrink);
    store(softened.sum + first, sum[k]);
  }
  return softened;
}

// Hides scores [tokens, LANES] of tokens that are not seen, if there is a mask.
inline void hide(float* scores, int64_t count, const bool* seen, int64_t token_stride) {
  for (int64_t token = 0; seen && token < count; token++) {
    if (!seen[token * token_stride]) store(scores + token * LANES, Vector{} + HIDDEN);
  }
}

// Sums of `COLUMNS` vectors of elements for each of `ROWS` heads, held in registers over all tokens of a block. Weights
// are [tokens / TOKENS, .., heads, TOKENS], `stride` apart in the first; shrink is [heads, TOKENS].
template <int64_t TOKENS, int64_t ROWS, int64_t COLUMNS>
inline void add_tile(
    float* values, int64_t rank, const float* weights, int64_t stride, const float* shrink, const float* entries,
    int64_t width, int64_t count, Lines& left) {
  Lines lines = left;
  Vector sum[ROWS][COLUMNS];
#pragma GCC unroll 6
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = load(values + i * rank + j * LANES) * shrink[i * TOKENS];
  }
  for (int64_t token = 0; token < count; token += TOKENS, weights += stride) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < TOKENS; k++, entries += width) {
      lines.call_if_left();
      Vector elements[COLUMNS];
#pragma GCC unroll 4
      for (int64_t j = 0; j < COLUMNS; j++) elements[j] = load(entries + j * LANES);
#pragma GCC unroll 6
      for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] += elements[j] * weights[i * TOKENS + k];
      }
    }
  }
  left = lines;
#pragma GCC unroll 6
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < COLUMNS; j++) store(values + i * rank + j * LANES, sum[i][j]);
  }
}

// values [rows, R] = shrink x values + weights x entries, of `rows` heads; what others get is nobody's. Where `TOKENS`
// is not 1 a value is so many whole vectors.
template <int64_t TOKENS>
void add_values(
    float* values, int64_t rows, int64_t rank, const float* weights, int64_t stride, const float* shrink,
    const float* entries, int64_t width, int64_t count, Lines& lines) {
  constexpr int64_t COLUMNS = LANES == 16 ? 4 : 2;  // so many that sums of four heads, or six, leave registers free
  const auto add = [&]<int64_t ROWS, int64_t OF>(int64_t row, int64_t element) {
    add_tile<TOKENS, ROWS, OF>(
        values + row * rank + element, rank, weights + row * TOKENS, stride, shrink + row * TOKENS, entries + element,
        width, count, lines);
  };
  int64_t element = 0;
  for (; element + COLUMNS * LANES <= rank; element += COLUMNS * LANES) {
    for (int64_t row = 0; row < rows;) {
      const int64_t left = rows - row;
      const bool six = LANES == 16 && left > 4 && left != 7 && left != 8;
      six ? add.template operator()<6, COLUMNS>(row, element) : add.template operator()<4, COLUMNS>(row, element);
      row += six ? 6 : 4;
    }
  }
  for (; element + LANES <= rank; element += LANES) {
    for (int64_t row = 0; row < rows; row += 4) add.template operator()<4, 1>(row, element);
  }
  if constexpr (TOKENS == 1) {
    for (; element < rank; element++) {
      Vector sum = {};
      for (int64_t token = 0; token < count; token++) {
        sum += load(weights + token * stride) * entries[token * width + element];
      }
      for (int64_t row = 0; row < rows; row++) {
        values[row * rank + element] = values[row * rank + element] * shrink[row] + sum[row];
      }
    }
  }
}

// Tokens up to the last one that any sequence sees: a fixed cache has room behind them.
int64_t tokens_to_last_seen(const Mask& mask, int64_t batch, int64_t tokens) {
  if (!mask.seen) return tokens;
  int64_t last = 0;
  for (int64_t sequence = 0; sequence < (mask.sequence_stride ? batch : 1); sequence++) {
    const bool* seen = mask.seen + sequence * mask.sequence_stride;
    int64_t end = tokens;
    for (uint64_t eight; mask.token_stride == 1 && end - 8 >= last; end -= 8) {
      std::memcpy(&eight, seen + end - 8, 8);
      if (eight) break;
    }
    while (end > last && !seen[(end - 1) * mask.token_stride]) end--;
    last = std::max(last, end);
  }
  return last;
}

bool none_seen(const bool* seen, int64_t token_stride, int64_t count) {
  for (int64_t token = 0; token < count; token++) {
    if (seen[token * token_stride]) return false;
  }
  return true;
}

// A block of tokens as rows of fp32, or of bf16 where pairs of those are multiplied. In quads tokens are a multiple of
// eight: behind the `valid` ones are hidden zeros.
template <typename T>
struct Block {
  const T* entries;
  int64_t count, valid;
  const bool* seen;
  int64_t token_stride;
  float* scores;  // or weights, with room for a vector per token
};

// Scores [TILE, LANES] of a tile of entries, of queries [W, LANES]; with a line called for every `EVERY` elements, if
// any (0: none).
template <int64_t EVERY>
void score_tile(const float* query, const float* entries, int64_t width, Lines& lines, float* scores) {
  Vector sum[TILE] = {};
  int64_t element = 0;
  for (; element + 16 <= width; element += 16) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++) {
      if constexpr (EVERY > 0) {
        if (i % EVERY == 0) lines.call();
      }
      const Vector heads = load(query + (element + i) * LANES);
#pragma GCC unroll 8
      for (int64_t j = 0; j < TILE; j++) sum[j] += heads * entries[j * width + element + i];
    }
  }
  for (; element < width; element++) {
    const Vector heads = load(query + element * LANES);
    for (int64_t j = 0; j < TILE; j++) sum[j] += heads * entries[j * width + element];
  }
  for (int64_t j = 0; j < TILE; j++) store(scores + j * LANES, sum[j]);
}

// Adds a block to the sums of `rows` heads, a lane each; with a line called for every `PER_LINE` scored elements of
// entries, if any (0: none).
template <int64_t PER_LINE>
void add_block(
    const Block<float>& block, const float* query, float scaling, int64_t rows, int64_t width, int64_t rank,
    const Sums& sums, Lines& lines) {
  int64_t token = 0;
  for (; token + TILE <= block.count; token += TILE) {
    score_tile<PER_LINE / TILE>(query, block.entries + token * width, width, lines, block.scores + token * LANES);
  }
  for (; token < block.count; token++) {
    Vector sum = {};
    for (int64_t i = 0; i < width; i++) sum += load(query + i * LANES) * block.entries[token * width + i];
    store(block.scores + token * LANES, sum);
  }
  hide(block.scores, block.count, block.seen, block.token_stride);
  const auto softened = soften<1, 1>(block.scores, block.count, scaling, sums.top, sums.total, lines);
  add_values<1>(
      sums.values, rows, rank, block.scores, LANES, softened.shrink, block.entries, width, block.count, lines);
}

#if defined(__AVX512F__)
// With 16 bytes of each of four heads in a vector fewer lanes are empty than with a head in each, of which there are
// often twelve; and of sixteen heads they take as many products and fewer reads.
constexpr int64_t QUAD = 4;

// Elements of T that a head has in a vector, and that a vector has.
template <typename T>
constexpr int64_t OF_HEAD = 16 / sizeof(T);
template <typename T>
constexpr int64_t OF_VECTOR = CACHE_LINE / sizeof(T);

template <typename T>
bool in_quads(int64_t width, int64_t rank) {
  return width % OF_HEAD<T> == 0 && rank % LANES == 0 && (rank % OF_VECTOR<T> == 0 || rank + LANES <= width);
}

int64_t quads_of(int64_t rows) { return (std::min(LANES, rows) + QUAD - 1) / QUAD; }

// Queries [rows, W] as vectors [W / OF_HEAD, quads, OF_VECTOR] of up to sixteen heads at a time.
template <typename T>
void make_quads(const float* query, int64_t rows, int64_t width, T* to) {
  constexpr int64_t OF = OF_HEAD<T>;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = row / LANES * LANES, stride = quads_of(rows - first) * OF_VECTOR<T>;
    T* place = to + first * width + (row - first) * OF;
    for (int64_t i = 0; i < width; i += OF, place += stride) {
#pragma GCC unroll 8
      for (int64_t j = 0; j < OF; j++) place[j] = query[row * width + i + j];
    }
  }
}

inline __m512 multiply(__m512 sum, __m512i a, __m512i b, float) {
  return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
}
// Sum + the products of two numbers of bf16 in each lane.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool MULTIPLIES_BF16 = true;
inline __m512 multiply(__m512 sum, __m512i a, __m512i b, c10::BFloat16) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif
// Sum + the products of two 16-bit integers in each lane, or of four signed bytes and four unsigned ones.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512CD__)
constexpr bool MULTIPLIES_INTEGERS = true;
inline __m512i multiply(__m512i sum, __m512i a, __m512i b, int16_t) { return _mm512_dpwssd_epi32(sum, a, b); }
inline __m512i multiply(__m512i sum, __m512i a, __m512i b, int8_t) { return _mm512_dpbusd_epi32(sum, b, a); }
#else
constexpr bool MULTIPLIES_INTEGERS = false;
#endif

// Tokens whose scores are in registers at a time.
template <int64_t QUADS>
constexpr int64_t TILE_OF = QUADS < 4 ? TILE : TILE / 2;

// Adds products of four lanes of each head with `elements` of so many tokens; `each` is called with every element.
template <typename T, int64_t QUADS, typename Entry, typename Sum, typename Each>
[[gnu::always_inline]] inline void multiply_quads(
    const T* query, const Entry* entries, int64_t width, int64_t elements, const Each& each,
    Sum (&sum)[TILE_OF<QUADS>][QUADS]) {
  for (int64_t element = 0; element < elements; element += OF_HEAD<T>, query += QUADS * OF_VECTOR<T>) {
    each(element);
    __m512i heads[QUADS];
#pragma GCC unroll 4
    for (int64_t k = 0; k < QUADS; k++) heads[k] = _mm512_load_si512(query + k * OF_VECTOR<T>);
#pragma GCC unroll 8
    for (int64_t j = 0; j < TILE_OF<QUADS>; j++) {
      const auto* place = reinterpret_cast<const __m128i*>(entries + j * width + element);
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(place));
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++) sum[j][k] = multiply(sum[j][k], heads[k], four, T{});
    }
  }
}

// Of four tokens' sums [four heads, four lanes] those over lanes, [four heads, four tokens].
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

// Scores [tokens / 4, quads, four heads, four tokens].
template <typename T, int64_t QUADS, int64_t PER_LINE>
void score_quads(
    const T* query, const T* entries, int64_t width, int64_t count, Lines& lines, float* scores) {
  constexpr int64_t EVERY = PER_LINE / TILE_OF<QUADS>;
  static_assert(EVERY % OF_HEAD<T> == 0);
  const auto call = [&](int64_t element) {
    if constexpr (EVERY > 0) {
      if (element % EVERY == 0) lines.call();
    }
  };
  for (int64_t token = 0; token < count; token += TILE_OF<QUADS>, entries += TILE_OF<QUADS> * width) {
    __m512 sum[TILE_OF<QUADS>][QUADS] = {};
    multiply_quads<T>(query, entries, width, width, call, sum);
#pragma GCC unroll 2
    for (int64_t j = 0; j < TILE_OF<QUADS>; j += QUAD) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++, scores += LANES) {
        store(scores, sum_lanes<Vector>(sum[j][k], sum[j + 1][k], sum[j + 2][k], sum[j + 3][k]));
      }
    }
  }
}

// Hides scores in quads of tokens that are not seen, and of those behind the `valid` ones.
template <int64_t QUADS>
inline void hide_in_quads(float* scores, int64_t count, int64_t valid, const bool* seen, int64_t token_stride) {
  for (int64_t token = seen ? 0 : valid; token < count; token++) {
    if (token < valid && (!seen || seen[token * token_stride])) continue;
    float* of_token = scores + token / QUAD * QUADS * LANES + token % QUAD;
    for (int64_t head = 0; head < QUADS * QUAD; head++) of_token[head * QUAD] = HIDDEN;
  }
}

template <int64_t QUADS>
void add_values_of_quads(
    float* values, int64_t rows, int64_t rank, const float* weights, const float* shrink, const Block<float>& block,
    int64_t width, Lines& lines) {
  add_values<QUAD>(
      values, rows, rank, weights, QUADS * LANES, shrink, block.entries, width, block.count, lines);
}

#if defined(__AVX512BW__)
// The same elements of two tokens as pairs of 16-bit numbers, sixteen in each of `COLUMNS` (two at most) vectors.
template <typename Entry>
struct Pairs {
  __m512i of[2];  // where in two rows the pairs of the first sixteen elements are, and behind them those of the others

  Pairs() {
    alignas(CACHE_LINE) int16_t places[2][2 * LANES];
    for (int16_t i = 0; i < 2 * LANES; i++) {
      places[0][i] = i / 2 + i % 2 * 2 * LANES;
      places[1][i] = places[0][i] + LANES;
    }
    for (int64_t j = 0; j < 2; j++) of[j] = _mm512_load_si512(places[j]);
  }
  template <int64_t COLUMNS>
  [[gnu::always_inline]] void make(const Entry* one, const Entry* other, __m512i (&pairs)[COLUMNS]) const {
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(other);
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) pairs[j] = _mm512_permutex2var_epi16(a, of[j], b);
  }
};

// Of bytes, which become longer. Two vectors have elements 0 to 7 and 16 to 23, and 8 to 15 and 24 to 31.
template <>
struct Pairs<uint8_t> {
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

// Adds to sums of `ROWS` heads products of weights, of type T, and pairs. Weights are pairs of them [tokens / 4, ..,
// heads, 2], `stride` apart in the first.
template <typename T, int64_t ROWS, int64_t COLUMNS, typename Entry, typename Sum>
[[gnu::always_inline]] inline void multiply_pairs(
    const Word* weights, int64_t stride, const Entry* entries, int64_t width, int64_t count, Lines& left,
    Sum (&sum)[ROWS][COLUMNS]) {
  Lines lines = left;
  const Pairs<Entry> of_tokens;
  for (int64_t token = 0; token < count; token += 2, entries += 2 * width) {
    lines.call_if_left();
    lines.call_if_left();
    __m512i pairs[COLUMNS];
    of_tokens.make(entries, entries + width, pairs);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
      const __m512i weight = _mm512_set1_epi32(weights[i * 2]);
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = multiply(sum[i][j], weight, pairs[j], T{});
    }
    weights += token % QUAD ? stride - 1 : 1;
  }
  left = lines;
}

// Calls `add` with a row, an element, and how many rows and vectors of elements it is to take.
template <int64_t QUADS, typename Add>
inline void for_each_tile(int64_t rank, const Add& add) {
  constexpr int64_t ROWS = QUADS == 3 ? 6 : std::min<int64_t>(QUADS, 2) * QUAD;
  for (int64_t row = 0; row < QUADS * QUAD; row += ROWS) {
    int64_t element = 0;
    for (; element + 2 * LANES <= rank; element += 2 * LANES) add.template operator()<ROWS, 2>(row, element);
    if (element < rank) add.template operator()<ROWS, 1>(row, element);
  }
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <int64_t QUADS>
void add_values_of_quads(
    float* values, int64_t, int64_t rank, const float* weights, const float* shrink, const Block<c10::BFloat16>& block,
    int64_t width, Lines& lines) {
  const Word* pairs = reinterpret_cast<const Word*>(weights);
  for_each_tile<QUADS>(rank, [&]<int64_t ROWS, int64_t COLUMNS>(int64_t row, int64_t element) {
    float* to = values + row * rank + element;
    __m512 sum[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = load(to + i * rank + j * LANES) * shrink[(row + i) * QUAD];
    }
    multiply_pairs<c10::BFloat16>(
        pairs + row * 2, QUADS * LANES / 2, block.entries + element, width, block.count, lines, sum);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
      for (int64_t j = 0; j < COLUMNS; j++) store(to + i * rank + j * LANES, sum[i][j]);
    }
  });
}
#endif

// What `add_block` does, with heads in quads and four lanes of `top` and `total` per head.
template <typename T, int64_t QUADS, int64_t PER_LINE>
void add_block_in_quads(
    const Block<T>& block, const T* query, float scaling, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Lines& lines) {
  score_quads<T, QUADS, PER_LINE>(query, block.entries, width, block.count, lines, block.scores);
  hide_in_quads<QUADS>(block.scores, block.count, block.valid, block.seen, block.token_stride);
  const auto softened = soften<QUADS, QUAD, T>(block.scores, block.count / QUAD, scaling, sums.top, sums.total, lines);
  add_values_of_quads<QUADS>(sums.values, rows, rank, block.scores, softened.shrink, block, width, lines);
}

// Calls `add` with the number of quads that so many heads, or sixteen of them, are.
template <typename Add>
void with_quads(int64_t rows, const Add& add) {
  switch (quads_of(rows)) {
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

template <typename T, int64_t PER_LINE>
void add_block_in_quads(
    const Block<T>& block, const T* query, float scaling, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Lines& lines) {
  with_quads(rows, [&]<int64_t QUADS>() {
    add_block_in_quads<T, QUADS, PER_LINE>(block, query, scaling, rows, width, rank, sums, lines);
  });
}
#else
constexpr int64_t QUAD = 1;
constexpr bool MULTIPLIES_BF16 = false, MULTIPLIES_INTEGERS = false;
template <typename T>
bool in_quads(int64_t, int64_t) { return false; }
template <typename T>
void make_quads(const float*, int64_t, int64_t, T*) {}
template <typename T, int64_t PER_LINE>
void add_block_in_quads(
    const Block<T>&, const T*, float, int64_t, int64_t, int64_t, const Sums&, Lines&) {}
#endif

// Queries of a sequence: with a head per lane [vectors, W, LANES], and in quads. What is not needed is empty.
template <typename T>
struct Queries {
  const float* by_lane;
  const T* quads;
  float scaling;
};

// Sums while tokens are added: `top` and `total` with so many lanes per head, each with a part of the sum.
class Running {
 public:
  Running(const Sums& sums, int64_t lanes, int64_t of_head)
      : sums_(sums), lanes_(lanes), of_head_(of_head), top_(lanes * of_head), total_(lanes * of_head) {
    for (int64_t i = 0; i < lanes * of_head; i++) {
      top_.data()[i] = sums.top[i / of_head];
      total_.data()[i] = i % of_head ? 0 : sums.total[i / of_head];
    }
  }
  // Those of a vector of heads, from `row` on.
  Sums from(int64_t row, int64_t rank) {
    return {top_.data() + row * of_head_, total_.data() + row * of_head_, sums_.values + row * rank};
  }
  void finish() {
    for (int64_t row = 0; row < lanes_; row++) {
      const float* of_row = total_.data() + row * of_head_;
      sums_.top[row] = top_.data()[row * of_head_];
      sums_.total[row] = std::accumulate(of_row, of_row + of_head_, 0.0f);
    }
  }

 private:
  const Sums sums_;
  int64_t lanes_, of_head_;
  Buffer<float> top_, total_;
};

// Adds tokens to the sums of all heads. T: what is multiplied, fp32 or what the cache holds.
template <typename T, typename Source>
void attend(
    const Source& source, const Mask& mask, const Queries<T>& queries, int64_t sequence, int64_t begin, int64_t end,
    int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  constexpr bool as_cached = Source::bits == 8 * sizeof(T);
  const bool quads = in_quads<T>(width, rank);
  const int64_t most = std::max(TILE, BLOCK_ELEMENTS / width * 4 / static_cast<int64_t>(sizeof(T)) / TILE * TILE);
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES, of_head = quads ? QUAD : 1;
  Buffer<float> space(most * LANES + most * width + 2 * width);
  float *copies = space.data() + most * LANES, *scratch = copies + most * width;
  Running running(sums, lanes, of_head);
  // The first vector's scores call for the block after this one. Where reading takes as long as products, half of its
  // lines are left to what follows the scores.
  constexpr int64_t per_line = CACHE_LINE * 8 / Source::bits * (as_cached ? 2 : 1);

  for (int64_t start = begin; start < end; start += most) {
    const int64_t valid = std::min(most, end - start), count = quads ? (valid + TILE - 1) / TILE * TILE : valid;
    const bool* seen = mask.seen ? mask.seen + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (seen && none_seen(seen, mask.token_stride, valid)) continue;
    const T* entries;
    if constexpr (as_cached) {
      entries = source.at(sequence, start);
    } else {
      entries = source.read(sequence, start, valid, copies, scratch);
    }
    if (count > valid) {
      T* to = reinterpret_cast<T*>(copies);
      if (entries != to) std::copy(entries, entries + valid * width, to);
      std::fill(to + valid * width, to + count * width, T(0.0f));
      entries = to;
    }
    const Block<T> block{entries, count, valid, seen, mask.token_stride, space.data()};
    Lines lines{source.ahead(sequence, start + most)};
    if (as_cached) lines.end = source.ahead(sequence, std::min(start + 2 * most, end));
    for (int64_t row = 0; row < rows; row += LANES) {
      const Sums of_vector = running.from(row, rank);
      const int64_t some = std::min(LANES, rows - row);
      if (quads) {
        const auto add = row ? add_block_in_quads<T, 0> : add_block_in_quads<T, per_line>;
        add(block, queries.quads + row * width, queries.scaling, some, width, rank, of_vector, lines);
      } else if constexpr (std::is_same_v<T, float>) {
        const auto add = row ? add_block<0> : add_block<per_line>;
        add(block, queries.by_lane + row * width, queries.scaling, some, width, rank, of_vector, lines);
      }
    }
    while (lines.next < lines.end) lines.call();  // few heads have too few sums to call for all
  }
  running.finish();
}

}  // namespace
