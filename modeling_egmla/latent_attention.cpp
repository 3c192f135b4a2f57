// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Decode attention of all heads over one shared latent, on a CPU: each cache entry is read once for all heads, in the
// format it is cached in, and its first R elements serve as the value. And int8 quantisation of new entries, which
// would be twenty small operations in each layer. Compiled and loaded by cpu_kernel.py.
//
// Tokens are taken in blocks that stay in the first caches: scores, running softmax, weighted sum. A vector of scores
// has a head per lane, so that an element of the cache is one broadcast for all heads of a vector; with AVX-512 and
// widths that allow it (`in_quads`) four tokens of each of four heads, from products of 16 bytes at a time: elements of
// fp32, pairs of bf16 where the processor multiplies those, or codes as 16-bit integers. A vector of sums has elements
// of the value. Threads share out sequences and parts of them; parts are merged by their sums of exponentials.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
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
// Tokens whose scores are held in registers at a time; of more than twelve heads in quads half as many.
constexpr int64_t TILE = 8;
// Elements of a block of tokens, unless a tile has more: 12 KB, so that it, queries and sums share the first cache.
constexpr int64_t BLOCK_ELEMENTS = 3072;
constexpr int64_t CACHE_LINE = 64;  // bytes
// The cache that later entries are called for into: 3 the first, 2 the second. Into the first was 4 % faster with fp32
// entries on Zen 4, and slower on Cascade Lake.
#if defined(__AVX512BF16__)
constexpr int INTO = 3;
#else
constexpr int INTO = 2;
#endif
// Fewer tokens than this are not worth a part of their own; or one beside those that keep all threads at work.
constexpr int64_t PART_TOKENS = 256, FURTHER_PART_TOKENS = 2048;
// Score of a hidden token; not infinite, so that differences are numbers.
constexpr float HIDDEN = -1e30f;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Integers load(const int32_t* from) { return *reinterpret_cast<const Integers*>(from); }
inline void store(int32_t* to, Integers value) { *reinterpret_cast<Integers*>(to) = value; }

// Weights as they are multiplied.
inline void store_as(float* to, Vector value) { store(to, value); }
#if defined(__AVX512BF16__)
inline void store_as(c10::BFloat16* to, Vector value) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
}
#endif

// The larger one; of numbers that cannot be compared the second.
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
// In each of four neighbouring lanes the largest of them.
inline Vector largest_of_four(Vector x) {
  x = larger((Vector)_mm512_permute_ps((__m512)x, 0b01001110), x);
  return larger((Vector)_mm512_permute_ps((__m512)x, 0b10110001), x);
}
#else
inline Vector largest_of_four(Vector x) { return x; }  // and this is never called
#endif

// exp(x) for x <= 0, to 2e-7 of its value near 0 and 4e-6 at -87: 2^n times a polynomial for the rest. With `ROUGH` to
// 1e-4, a twentieth of what rounding to bf16 changes.
template <bool ROUGH = false>
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector scaled = larger(lowest, x) * 1.44269504f;
  const Vector rounded = scaled + magic;
  const Vector rest = scaled - (rounded - magic);
  Vector result;
  if constexpr (ROUGH) {
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
  return x == x ? result : x;  // of what is no number the bits, added up, may be those of one
#endif
}

typedef int32_t Word __attribute__((may_alias));  // a pair of 16-bit numbers

// Memory that starts at a cache line: a vector that lies in two lines takes two reads.
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

// Where entries come from. `read` gives `count` tokens from `start` on as fp32 rows, in `space` or where they lie;
// `ahead` is where the bytes of a token are, for prefetching, if tokens lie one behind the other.

template <typename T>
struct Dense {
  const T* entries;
  int64_t sequence_stride, width;
  static constexpr int64_t bits = 8 * sizeof(T);

  const T* at(int64_t sequence, int64_t start) const {
    return entries + sequence * sequence_stride + start * width;
  }
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float*) const {
    const T* from = at(sequence, start);
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      float* __restrict to = space;
      for (int64_t i = 0; i < count * width; i++) to[i] = static_cast<float>(from[i]);
      return space;
    }
  }
  static constexpr bool quantised = false;
  int64_t element_groups() const { return 1; }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(entries) + (sequence * sequence_stride + token * width) * sizeof(T);
  }
};

// int8 codes, each group of neighbouring elements of a token with a scale.
struct ElementGroups {
  const int8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, groups;
  static constexpr int64_t bits = 8;

  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float*) const {
    const int8_t* code = codes + sequence * codes_stride + start * width;
    const c10::BFloat16* scale = scales + sequence * scales_stride + start * groups;
    const int64_t size = width / groups;
    for (int64_t group = 0; group < count * groups; group++) {
      const float factor = static_cast<float>(scale[group]);
      float* __restrict to = space + group * size;
      for (int64_t i = 0; i < size; i++) to[i] = factor * code[group * size + i];
    }
    return space;
  }

  static constexpr bool quantised = true, scales_by_token = true;
  int64_t element_groups() const { return groups; }
  // Groups are whole vectors of a value, and of so few elements that sums of products fit into 32 bits.
  bool has_codes(int64_t, int64_t rank) const {
    const int64_t elements = width / groups;
    return elements % LANES == 0 && rank % elements == 0 && elements <= 512;
  }
  int64_t stop(int64_t) const { return std::numeric_limits<int64_t>::max(); }
  int64_t together(int64_t, int64_t count) const { return count; }
  int64_t group(int64_t) const { return 0; }
  void typical_scales(int64_t, float* to) const { std::fill(to, to + width, 1.0f); }
  // Codes [count, W], and scales [groups, `stride`].
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, int16_t* __restrict to, float* factors, int64_t stride) const {
    const int8_t* code = codes + sequence * codes_stride + start * width;
    int64_t i = 0;
#if defined(__AVX512BW__)
    for (; i + 32 <= count * width; i += 32) {  // with 64 bytes at a time, as compilers do it, it takes longer
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code + i));
      _mm512_storeu_si512(to + i, _mm512_cvtepi8_epi16(bytes));
    }
#endif
    for (; i < count * width; i++) to[i] = code[i];
    const c10::BFloat16* scale = scales + sequence * scales_stride + start * groups;
    for (int64_t group = 0; group < groups; group++) {
      for (int64_t token = 0; token < count; token++) {
        const float factor = static_cast<float>(scale[token * groups + group]);
        factors[group * stride + token] = factor + (factor - factor);  // no number if infinite, as of 0 times that
      }
    }
  }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + token * width;
  }
};

// int4 codes, each group of neighbouring tokens of an element with a scale and a zero point, between tokens that are
// kept as they are: the first few, and those behind the last whole group.
template <typename T>
struct TokenGroups {
  Dense<T> kept;
  const uint8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, first, grouped, size;
  static constexpr int64_t bits = 4;

  // `space` has room for the block, `scratch` for two rows.
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float* scratch) const {
    const int64_t half = (width + 1) / 2;
    int64_t held = -1;  // the group whose scales are in `scratch`
    for (int64_t token = start; token < start + count; token++) {
      float* row = space + (token - start) * width;
      const int64_t place = token - first;
      if (place < 0 || place >= grouped) {
        const float* found = kept.read(sequence, place < 0 ? token : token - grouped, 1, row, nullptr);
        if (found != row) std::copy(found, found + width, row);
        continue;
      }
      const int64_t group = place / size;
      if (group != held) {
        const c10::BFloat16* from = scales + sequence * scales_stride + group * 2 * width;
        for (int64_t i = 0; i < 2 * width; i++) scratch[i] = static_cast<float>(from[i]);
        held = group;
      }
      const uint8_t* code = codes + sequence * codes_stride + place * half;
      const float *scale = scratch, *zero = scratch + width;
      float* __restrict to = row;
      for (int64_t i = 0; i < half; i++) to[i] = static_cast<float>(code[i] & 15) * scale[i] + zero[i];
      for (int64_t i = half; i < width; i++) to[i] = static_cast<float>(code[i - half] >> 4) * scale[i] + zero[i];
    }
    return space;
  }

  static constexpr bool quantised = true, scales_by_token = false;
  int64_t element_groups() const { return 1; }
  // In groups of fewer it takes longer.
  bool has_codes(int64_t token, int64_t) const { return size >= 24 && token >= first && token - first < grouped; }
  // Where it ends that tokens are codes, or are none.
  int64_t stop(int64_t token) const {
    if (token < first) return first;
    return token - first < grouped ? first + grouped : std::numeric_limits<int64_t>::max();
  }
  int64_t group(int64_t token) const { return (token - first) / size; }
  // About what a group's scales of elements are: those of the first group, none far smaller than the largest.
  void typical_scales(int64_t sequence, float* to) const {
    const c10::BFloat16* scale = scales + sequence * scales_stride;
    float largest = 0;
    for (int64_t i = 0; i < width; i++) {
      to[i] = grouped ? std::abs(static_cast<float>(scale[i])) : 0;
      largest = std::max(largest, std::isfinite(to[i]) ? to[i] : 0);
    }
    for (int64_t i = 0; i < width; i++) {
      to[i] = largest > 0 ? std::clamp(std::isfinite(to[i]) ? to[i] : 0, largest / 32, largest) : 1;
    }
  }
  int64_t together(int64_t token, int64_t count) const { return std::min(count, size - (token - first) % size); }
  // Codes [count, W], and their group's scales [W] and zero points [W].
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, int16_t* __restrict to, float* factors, int64_t) const {
    const int64_t half = (width + 1) / 2, place = start - first;
    const uint8_t* code = codes + sequence * codes_stride + place * half;
    for (int64_t token = 0; token < count; token++, code += half, to += width) {
      for (int64_t i = 0; i < half; i++) to[i] = code[i] & 15;
      for (int64_t i = half; i < width; i++) to[i] = code[i - half] >> 4;
    }
    const c10::BFloat16* scale = scales + sequence * scales_stride + place / size * 2 * width;
    for (int64_t i = 0; i < 2 * width; i++) factors[i] = static_cast<float>(scale[i]);
  }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    const int64_t place = std::clamp<int64_t>(token - first, 0, grouped);
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + place * ((width + 1) / 2);
  }
};

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
// Weights take the place of scores; those of bf16 half of it, one behind the other.
template <int64_t VECTORS, int64_t LANES_OF_HEAD, typename T = float>
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
      const Vector weight = exponential<!std::is_same_v<T, float>>(load(scores + place) * scaling - top[k]);
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
// Sum + the products of two 16-bit numbers in each lane, where the processor has that.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool MULTIPLIES_BF16 = true;
inline __m512 multiply(__m512 sum, __m512i a, __m512i b, c10::BFloat16) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif
#if defined(__AVX512BW__)
constexpr bool MULTIPLIES_INTEGERS = true;
inline __m512i multiply(__m512i sum, __m512i a, __m512i b, int16_t) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
#else
constexpr bool MULTIPLIES_INTEGERS = false;
#endif

// Tokens whose scores are in registers at a time.
template <int64_t QUADS>
constexpr int64_t TILE_OF = QUADS < 4 ? TILE : TILE / 2;

// Adds products of four lanes of each head with `elements` of so many tokens; `each` is called with every element.
template <typename T, int64_t QUADS, typename Sum, typename Each>
[[gnu::always_inline]] inline void multiply_quads(
    const T* query, const T* entries, int64_t width, int64_t elements, const Each& each,
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
// Adds to sums of `ROWS` heads products of pairs of tokens, of `COLUMNS` (two at most) vectors of elements. Weights are
// pairs [tokens / 4, .., heads, 2], `stride` apart in the first.
template <typename T, int64_t ROWS, int64_t COLUMNS, typename Sum>
[[gnu::always_inline]] inline void multiply_pairs(
    const Word* weights, int64_t stride, const T* entries, int64_t width, int64_t count, Lines& left,
    Sum (&sum)[ROWS][COLUMNS]) {
  Lines lines = left;
  // Where in two rows the pairs of the first sixteen elements are; those of the others are behind them.
  alignas(CACHE_LINE) int16_t places[2][2 * LANES];
  for (int16_t i = 0; i < 2 * LANES; i++) {
    places[0][i] = i / 2 + i % 2 * 2 * LANES;
    places[1][i] = places[0][i] + LANES;
  }
  const __m512i of[2] = {_mm512_load_si512(places[0]), _mm512_load_si512(places[1])};
  for (int64_t token = 0; token < count; token += 2, entries += 2 * width) {
    lines.call_if_left();
    lines.call_if_left();
    const __m512i one = _mm512_loadu_si512(entries), other = _mm512_loadu_si512(entries + width);
    __m512i pairs[COLUMNS];
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) pairs[j] = _mm512_permutex2var_epi16(one, of[j], other);
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
  const auto* pairs = reinterpret_cast<const Word*>(weights);
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

#if defined(__AVX512BW__)
// Codes are multiplied as integers with queries and weights of 16 bits, number = step x integer: next to the error of
// codes they are exact.
constexpr float LARGEST = 32767;

// Of `count` numbers; no number if one of them is none.
inline float largest_magnitude(const float* from, int64_t count) {
  const auto* bits = reinterpret_cast<const Word*>(from);  // of positive ones they are in the numbers' order
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, bits[i] & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

// No number if the largest is none, or infinite.
inline float step_of(float largest) { return std::max(largest, 1e-30f) / LARGEST + (largest - largest); }

// Queries of a sequence, times typical scales of elements, in quads and as integers; and as they are, with a head per
// lane.
class IntegerQueries {
 public:
  IntegerQueries(int64_t lanes, int64_t width, int64_t groups)
      : width_(width), groups_(groups), integers_(lanes * width), typical_(width), products_(width),
        steps_(lanes * groups * QUAD) {}

  template <typename Source>
  void make(const Source& source, int64_t sequence, const float* query, int64_t rows, const float* by_lane) {
    constexpr int64_t OF = OF_HEAD<int16_t>;
    const int64_t size = width_ / groups_;
    by_lane_ = by_lane;
    source.typical_scales(sequence, typical_.data());
    for (int64_t row = 0; row < rows; row++) {
      const int64_t first = row / LANES * LANES, quads = quads_of(rows - first);
      float* product = products_.data();
      for (int64_t i = 0; i < width_; i++) product[i] = query[row * width_ + i] * typical_.data()[i];
      for (int64_t group = 0; group < groups_; group++) {
        const float step = step_of(largest_magnitude(product + group * size, size)), inverse = 1 / step;
        for (int64_t i = group * size; i < (group + 1) * size; i++) {
          int16_t* to = integers_.data() + first * width_ + i / OF * quads * OF_VECTOR<int16_t> + i % OF;
          to[(row - first) * OF] = static_cast<int16_t>(std::nearbyint(product[i] * inverse));
        }
        float* of_head = steps_.data() + first * groups_ * QUAD + (group * quads * QUAD + row - first) * QUAD;
        std::fill(of_head, of_head + QUAD, step);
      }
    }
  }

  // Those of up to sixteen heads from `row` on: integers [W / 8, quads, 32] and steps [groups, quads, four heads, 4],
  // and in fp32 [W, LANES].
  int16_t* integers(int64_t row) { return integers_.data() + row * width_; }
  float* steps(int64_t row) { return steps_.data() + row * groups_ * QUAD; }
  const float* by_lane(int64_t row) const { return by_lane_ + row * width_; }
  const float* typical_scales() { return typical_.data(); }

 private:
  int64_t width_, groups_;
  const float* by_lane_ = nullptr;
  Buffer<int16_t> integers_;
  Buffer<float> typical_, products_, steps_;
};

// Adds to scores in quads, which they start from, products of queries and codes. `factors` [groups, `stride`] are
// scales of tokens, if those have some. `ahead` is where later codes are that will be needed.
template <typename Source, int64_t QUADS>
void score_codes(
    const int16_t* query, const float* steps, const int16_t* codes, const float* factors, int64_t stride,
    int64_t width, int64_t groups, int64_t count, uintptr_t ahead, float* scores) {
  const int64_t size = width / groups;
  const auto call = [&](int64_t) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, INTO);
    ahead += TILE_OF<QUADS> * OF_HEAD<int16_t> * Source::bits / 8;
  };
  for (int64_t token = 0; token < count; token += TILE_OF<QUADS>) {
    for (int64_t group = 0; group < groups; group++) {
      __m512i sum[TILE_OF<QUADS>][QUADS] = {};
      const int16_t* of_group = query + group * size / OF_HEAD<int16_t> * QUADS * OF_VECTOR<int16_t>;
      multiply_quads<int16_t>(of_group, codes + token * width + group * size, width, size, call, sum);
#pragma GCC unroll 2
      for (int64_t j = 0; j < TILE_OF<QUADS>; j += QUAD) {
        Vector factor = Vector{} + 1.0f;
        if constexpr (Source::scales_by_token) {
          factor = (Vector)_mm512_broadcast_f32x4(_mm_loadu_ps(factors + group * stride + token + j));
        }
#pragma GCC unroll 4
        for (int64_t k = 0; k < QUADS; k++) {
          float* place = scores + ((token + j) / QUAD * QUADS + k) * LANES;
          const auto total = sum_lanes<Integers>(
              (Integers)sum[j][k], (Integers)sum[j + 1][k], (Integers)sum[j + 2][k], (Integers)sum[j + 3][k]);
          const Vector product = __builtin_convertvector(total, Vector) * load(steps + (group * QUADS + k) * LANES);
          store(place, load(place) + product * factor);
        }
      }
    }
  }
}

// Weights [tokens / 4, QUADS, four heads, four tokens], times factors of tokens if there are some, as integers; and
// their steps [QUADS, four heads, 4].
template <int64_t QUADS>
void make_integers(const float* weights, const float* factors, int64_t tokens, int16_t* to, float* steps) {
  const auto products = [&](int64_t token, int64_t k) {
    const Vector weight = load(weights + (token / QUAD * QUADS + k) * LANES);
    return factors ? weight * (Vector)_mm512_broadcast_f32x4(_mm_loadu_ps(factors + token)) : weight;
  };
  __m512i largest[QUADS] = {};  // bits, as in `largest_magnitude`
  for (int64_t token = 0; token < tokens; token += QUAD) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < QUADS; k++) {
      const __m512i bits = _mm512_and_si512((__m512i)products(token, k), _mm512_set1_epi32(0x7fffffff));
      largest[k] = _mm512_max_epi32(largest[k], bits);
    }
  }
  Vector inverse[QUADS];
#pragma GCC unroll 4
  for (int64_t k = 0; k < QUADS; k++) {
    largest[k] = _mm512_max_epi32(largest[k], _mm512_shuffle_epi32(largest[k], (_MM_PERM_ENUM)0b01001110));
    largest[k] = _mm512_max_epi32(largest[k], _mm512_shuffle_epi32(largest[k], (_MM_PERM_ENUM)0b10110001));
    const auto of_head = (Vector)largest[k];
    const Vector step = larger(Vector{} + 1e-30f, of_head) / LARGEST + (of_head - of_head);
    inverse[k] = 1 / step;
    store(steps + k * LANES, step);
  }
  for (int64_t token = 0; token < tokens; token += QUAD) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < QUADS; k++, to += LANES) {
      const __m512i integers = _mm512_cvtps_epi32((__m512)(products(token, k) * inverse[k]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(integers));
    }
  }
}

// values [ROWS, COLUMNS vectors] = shrink x values + step x weights x codes; `steps`, `shrink` and `parts`, of sums of
// weights, have four numbers per head. A function of its own: within another one sums were kept in memory.
template <typename Source, int64_t ROWS, int64_t COLUMNS>
[[gnu::noinline]] void add_code_tile(
    const Word* weights, int64_t stride, const float* steps, const float* shrink, const float* parts,
    const int16_t* codes, const float* of_elements, int64_t width, int64_t count, int64_t rank, float* values) {
  __m512i sum[ROWS][COLUMNS] = {};
  Lines none;
  multiply_pairs<int16_t>(weights, stride, codes, width, count, none, sum);
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++, parts += QUAD) {
    const float whole = (parts[0] + parts[1]) + (parts[2] + parts[3]);  // no rounding is multiplied with zero points
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) {
      float* to = values + i * rank + j * LANES;
      Vector product = __builtin_convertvector((Integers)sum[i][j], Vector) * steps[i * QUAD];
      if constexpr (!Source::scales_by_token) {
        const float* scale = of_elements + j * LANES;
        product = product * load(scale) + load(scale + width) * whole;
      }
      store(to, load(to) * shrink[i * QUAD] + product);
    }
  }
}

// Queries times scales of elements, which tokens of a group share, and products with their zero points.
struct Folded {
  Buffer<int16_t> quads, integers;  // integers and ratios: to typical scales
  Buffer<float> ratios, steps, biases;  // the latter two [lanes, 4]

  Folded(int64_t lanes, int64_t width)
      : quads(lanes * width), integers(width), ratios(width), steps(lanes * QUAD), biases(lanes * QUAD) {}
  void fold(IntegerQueries& queries, const float* of_elements, int64_t rows, int64_t width) {
    constexpr int64_t OF = OF_HEAD<int16_t>;
    for (int64_t i = 0; i < width; i++) ratios.data()[i] = of_elements[i] / queries.typical_scales()[i];
    const float step = step_of(largest_magnitude(ratios.data(), width)), inverse = 1 / step;
    for (int64_t i = 0; i < width; i++) {
      integers.data()[i] = static_cast<int16_t>(std::nearbyint(ratios.data()[i] * inverse));
    }
    const float* zero = of_elements + width;
    for (int64_t row = 0; row < rows; row += LANES) {
      const int64_t vectors = quads_of(rows - row);
      const int16_t* from = queries.integers(row);
      int16_t* to = quads.data() + row * width;
      for (int64_t i = 0; i < width; i += OF) {
        const auto* place = reinterpret_cast<const __m128i*>(integers.data() + i);
        const __m512i ratio = _mm512_broadcast_i32x4(_mm_loadu_si128(place));
        for (int64_t k = 0; k < vectors; k++, from += OF_VECTOR<int16_t>, to += OF_VECTOR<int16_t>) {
          _mm512_store_si512(to, _mm512_mulhrs_epi16(_mm512_load_si512(from), ratio));  // the product / 2^15
        }
      }
      Vector bias[4] = {};
      for (int64_t i = 0; i < width; i += 4) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) {
          bias[j] += load(queries.by_lane(row) + (i + j) * LANES) * zero[i + j];
        }
      }
      bias[0] = (bias[0] + bias[1]) + (bias[2] + bias[3]);
      for (int64_t i = 0; i < vectors * LANES; i++) {
        steps.data()[row * QUAD + i] = queries.steps(row)[i] * step * 32768;
        biases.data()[row * QUAD + i] = bias[0][i / QUAD];
      }
    }
  }
};

// What `attend` does, of codes as they are.
template <typename Source>
void attend_codes(
    const Source& source, const Mask& mask, IntegerQueries& queries, float scaling, int64_t sequence, int64_t begin,
    int64_t end, int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  constexpr bool by_token = Source::scales_by_token;
  const int64_t groups = source.element_groups(), lanes = (rows + LANES - 1) / LANES * LANES;
  const int64_t value_size = by_token ? width / groups : rank;
  const int64_t most = std::clamp<int64_t>(8192 / width / TILE * TILE, 32, 64);
  Buffer<int16_t> codes(most * width + LANES), weights(most * LANES);  // behind the last value's codes some are read
  Buffer<float> scores(most * LANES), factors(by_token ? groups * most : 2 * width), steps(LANES * QUAD);
  Folded folded(by_token ? 0 : lanes, width);
  Running running(sums, lanes, QUAD);
  Lines none;
  int64_t valid, held = -1;
  for (int64_t start = begin; start < end; start += valid) {
    valid = source.together(start, std::min(most, end - start));
    const int64_t count = (valid + TILE - 1) / TILE * TILE;
    const bool* seen = mask.seen ? mask.seen + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (seen && none_seen(seen, mask.token_stride, valid)) continue;
    source.read_codes(sequence, start, valid, codes.data(), factors.data(), most);
    std::fill(codes.data() + valid * width, codes.data() + count * width, 0);
    for (int64_t group = 0; by_token && group < groups; group++) {
      std::fill(factors.data() + group * most + valid, factors.data() + group * most + count, 0.0f);
    }
    if (!by_token && std::exchange(held, source.group(start)) != source.group(start)) {
      folded.fold(queries, factors.data(), rows, width);
    }
    for (int64_t row = 0; row < rows; row += LANES) {
      with_quads(rows - row, [&]<int64_t QUADS>() {
        const Sums of_vector = running.from(row, rank);
        for (int64_t i = 0; i < count / QUAD * QUADS; i++) {
          const Vector first = by_token ? Vector{} : load(folded.biases.data() + row * QUAD + i % QUADS * LANES);
          store(scores.data() + i * LANES, first);
        }
        score_codes<Source, QUADS>(
            by_token ? queries.integers(row) : folded.quads.data() + row * width,
            by_token ? queries.steps(row) : folded.steps.data() + row * QUAD, codes.data(), factors.data(), most, width,
            groups, count, source.ahead(sequence, start + most), scores.data());
        hide_in_quads<QUADS>(scores.data(), count, valid, seen, mask.token_stride);
        const auto softened = soften<QUADS, QUAD>(
            scores.data(), count / QUAD, scaling, of_vector.top, of_vector.total, none);
        for (int64_t element = 0; element < rank; element += value_size) {
          const float* of_tokens = by_token ? factors.data() + element / value_size * most : nullptr;
          make_integers<QUADS>(scores.data(), of_tokens, count, weights.data(), steps.data());
          for_each_tile<QUADS>(value_size, [&]<int64_t ROWS, int64_t COLUMNS>(int64_t head, int64_t further) {
            const int64_t first = element + further;
            add_code_tile<Source, ROWS, COLUMNS>(
                reinterpret_cast<const Word*>(weights.data()) + head * 2, QUADS * LANES / 2, steps.data() + head * QUAD,
                softened.shrink + head * QUAD, softened.sum + head * QUAD, codes.data() + first, factors.data() + first,
                width, count, rank, of_vector.values + head * rank + first);
          });
        }
      });
    }
  }
  running.finish();
}
#else
struct IntegerQueries {
  IntegerQueries(int64_t, int64_t, int64_t) {}
  template <typename Source>
  void make(const Source&, int64_t, const float*, int64_t, const float*) {}
};
template <typename Source>
void attend_codes(
    const Source&, const Mask&, IntegerQueries&, float, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    const Sums&) {}
#endif

// Queries [B, rows, W], output [B, rows, R], both contiguous fp32; `tokens` of each sequence. T: what is multiplied.
template <typename T, typename Source>
void run(
    const Source& source, const Mask& mask, const float* query, float* output, int64_t batch, int64_t rows,
    int64_t all_tokens, int64_t width, int64_t rank, float scaling) {
  const int64_t tokens = tokens_to_last_seen(mask, batch, all_tokens);
#ifdef _OPENMP
  const int64_t threads = at::get_num_threads();
#else
  const int64_t threads = 1;  // what `parallel_for` comes to
#endif
  // So many that all threads get as many, unless that is too many to merge or too few tokens; of many tokens
  // about four for each thread, which takes the next one when it is done: a core may be slower than another, or busy.
  const int64_t even = threads / std::gcd(batch, threads), few = 4 * threads / std::max<int64_t>(1, batch) + 1;
  const int64_t least = std::clamp<int64_t>(tokens / PART_TOKENS, 1, std::min(even, few));
  const int64_t most = threads > 1 ? std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, batch * least)) : 1;
  const int64_t parts = least * std::clamp<int64_t>(tokens / (FURTHER_PART_TOKENS * least), 1, most);
  const int64_t part_tokens = ((tokens + parts - 1) / parts + TILE - 1) / TILE * TILE;
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES;
  const bool quads = in_quads<T>(width, rank);
  const bool has_integers = MULTIPLIES_INTEGERS && Source::quantised && in_quads<float>(width, rank) && width % 8 == 0;
  const bool needs_lanes = !quads || has_integers;
  Buffer<float> values(batch * parts * lanes * rank), total(batch * parts * lanes), top(batch * parts * lanes, HIDDEN);

  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, batch * parts), 1, [&](int64_t, int64_t) {
    Buffer<float> by_lane(needs_lanes ? lanes * width : 0);
    Buffer<T> by_quad(quads ? lanes * width : 0, T(0.0f));
    IntegerQueries integers(has_integers ? lanes : 0, width, source.element_groups());
    int64_t held = -1;  // the sequence whose queries these are
    for (int64_t task; (task = next++) < batch * parts;) {
      const int64_t sequence = task / parts, part = task % parts;
      const float* of_sequence = query + sequence * rows * width;
      const bool other = sequence != std::exchange(held, sequence);
      for (int64_t row = 0; other && needs_lanes && row < rows; row++) {
        float* to = by_lane.data() + row / LANES * LANES * width + row % LANES;
        for (int64_t i = 0; i < width; i++) to[i * LANES] = of_sequence[row * width + i];
      }
      if (other && quads) make_quads(of_sequence, rows, width, by_quad.data());
      if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
        if (other && has_integers) integers.make(source, sequence, of_sequence, rows, by_lane.data());
      }
      const Sums sums{top.data() + task * lanes, total.data() + task * lanes, values.data() + task * lanes * rank};
      const int64_t end = std::min(tokens, (part + 1) * part_tokens);
      for (int64_t start = part * part_tokens; start < end;) {
        int64_t stop = end;
        if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
          if (has_integers) stop = std::min(end, source.stop(start));
          if (has_integers && source.has_codes(start, rank)) {
            attend_codes(source, mask, integers, scaling, sequence, start, stop, rows, width, rank, sums);
            start = stop;
            continue;
          }
        }
        const Queries<T> queries{by_lane.data(), by_quad.data(), scaling};
        attend(source, mask, queries, sequence, start, stop, rows, width, rank, sums);
        start = stop;
      }
    }
  });

  at::parallel_for(0, batch * rows, std::max<int64_t>(1, 16384 / (rank * parts)), [&](int64_t first, int64_t last) {
    for (int64_t place_of_row = first; place_of_row < last; place_of_row++) {
      const int64_t sequence = place_of_row / rows, row = place_of_row % rows;
      float* to = output + (sequence * rows + row) * rank;
      std::fill(to, to + rank, 0.0f);
      float highest = HIDDEN, whole = 0;
      const int64_t place = sequence * parts * lanes + row;
      for (int64_t part = 0; part < parts; part++) highest = std::max(highest, top.data()[place + part * lanes]);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t from = place + part * lanes;
        const float share = std::exp(top.data()[from] - highest);
        whole += share * total.data()[from];
        for (int64_t i = 0; i < rank; i++) to[i] += share * values.data()[from * rank + i];
      }
      // Nothing is seen: 0, as a mean of nothing.
      for (int64_t i = 0; i < rank && whole != 0; i++) to[i] /= whole;
    }
  });
}

Mask read_mask(const std::optional<at::Tensor>& mask, int64_t batch, int64_t tokens) {
  if (!mask) return {};
  TORCH_CHECK(
      mask->dim() == 2 && mask->scalar_type() == at::kBool && (mask->size(0) == batch || mask->size(0) == 1) &&
          mask->size(1) == tokens,
      "egmla: the mask must be boolean [B or 1, S]");
  return {mask->const_data_ptr<bool>(), mask->size(0) == 1 ? 0 : mask->stride(0), mask->stride(1)};
}

// Checks that [B, S, ...] has tokens one behind the other.
void check_rows(const at::Tensor& tensor, int64_t batch, const char* name, int64_t dimensions = 3) {
  bool packed = tensor.dim() == dimensions && tensor.size(0) == batch;
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; packed && i > 0; i--) {
    packed = tensor.size(i) < 2 || tensor.stride(i) == expected;
    expected *= tensor.size(i);
  }
  TORCH_CHECK(packed, "egmla: ", name, " must be [B, S, ...] with tokens one behind the other");
}

template <typename Source>
at::Tensor compute(
    const Source& source, const at::Tensor& query, const std::optional<at::Tensor>& mask, int64_t tokens,
    double scaling, int64_t rank) {
  const int64_t batch = query.size(0), rows = query.size(1), width = query.size(2);
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  at::Tensor output = at::empty({batch, rows, rank}, queries.options());
  const auto multiplying = [&]<typename T>() {
    run<T>(
        source, read_mask(mask, batch, tokens), queries.const_data_ptr<float>(), output.mutable_data_ptr<float>(),
        batch, rows, tokens, width, rank, static_cast<float>(scaling));
  };
  if constexpr (MULTIPLIES_BF16 && std::is_same_v<Source, Dense<c10::BFloat16>>) {
    // Queries of bf16 lose nothing; weights are rounded as in PyTorch's fused kernel.
    if (query.scalar_type() == at::kBFloat16 && in_quads<c10::BFloat16>(width, rank)) {
      multiplying.template operator()<c10::BFloat16>();
      return output.to(query.scalar_type());
    }
  }
  multiplying.template operator()<float>();
  return output.to(query.scalar_type());
}

template <typename Make>
at::Tensor by_format(at::ScalarType format, const Make& make) {
  switch (format) {
    case at::kFloat:
      return make(float{});
    case at::kBFloat16:
      return make(c10::BFloat16{});
    case at::kHalf:
      return make(c10::Half{});
    default:
      TORCH_CHECK(false, "egmla: cache entries must be of float32, bfloat16 or float16");
  }
}

template <typename T>
Dense<T> dense(const at::Tensor& entries) {
  return {entries.const_data_ptr<T>(), entries.stride(0), entries.size(2)};
}

void check_query(const at::Tensor& query, int64_t width, int64_t rank) {
  TORCH_CHECK(
      query.dim() == 3 && query.size(2) == width && rank > 0 && rank <= width,
      "egmla: queries must be [B, rows, W] as wide as entries, and the latent no wider");
}

at::Tensor attention(
    const at::Tensor& query, const at::Tensor& entries, const std::optional<at::Tensor>& mask, double scaling,
    int64_t rank) {
  check_rows(entries, query.size(0), "entries");
  check_query(query, entries.size(2), rank);
  return by_format(entries.scalar_type(), [&](auto zero) {
    return compute(dense<decltype(zero)>(entries), query, mask, entries.size(1), scaling, rank);
  });
}

void check_rotation(const at::Tensor& rotation, int64_t width) {
  TORCH_CHECK(
      rotation.dim() == 2 && rotation.size(0) == width && rotation.size(1) == width &&
          rotation.scalar_type() == at::kFloat,
      "egmla: the rotation must be an fp32 matrix as wide as entries");
}

// Entries are rotated ones; the rotation is symmetric, orthogonal and mixes no latent with rotary elements.
at::Tensor attention_int8(
    const at::Tensor& query, const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& rotation,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  check_rows(codes, query.size(0), "codes");
  check_rows(scales, query.size(0), "scales");
  check_query(query, codes.size(2), rank);
  TORCH_CHECK(
      scales.size(1) == codes.size(1) && scales.size(2) > 0 && codes.size(2) % scales.size(2) == 0,
      "egmla: scales must be [B, S, groups] for codes [B, S, W]");
  const int64_t width = codes.size(2);
  check_rotation(rotation, width);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // products of fp32 are fp32
  const ElementGroups source{
      codes.const_data_ptr<int8_t>(), scales.const_data_ptr<c10::BFloat16>(), codes.stride(0), scales.stride(0),
      width, scales.size(2)};
  const at::Tensor turned = at::matmul(query.to(at::kFloat), rotation);
  const at::Tensor found = compute(source, turned, mask, codes.size(1), scaling, rank);
  return at::matmul(found, rotation.narrow(0, 0, rank).narrow(1, 0, rank)).to(query.scalar_type());
}

// What quantization_egmla.quantize_elements gives for entries [n, W] that are rotated first: codes [n, W] and scales
// [n, groups], an element being scale x code.
std::tuple<at::Tensor, at::Tensor> quantize_int8(
    const at::Tensor& entries, const at::Tensor& rotation, int64_t groups) {
  TORCH_CHECK(
      entries.dim() == 2 && groups > 0 && entries.size(1) % groups == 0,
      "egmla: entries must be [n, W], and groups divide W");
  const int64_t n = entries.size(0), width = entries.size(1), size = width / groups;
  check_rotation(rotation, width);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor rotated = at::matmul(entries.to(at::kFloat), rotation).contiguous();
  at::Tensor codes = at::empty({n, width}, rotated.options().dtype(at::kChar));
  at::Tensor scales = at::empty({n, groups}, rotated.options().dtype(at::kBFloat16));
  const float* from = rotated.const_data_ptr<float>();
  int8_t* code = codes.mutable_data_ptr<int8_t>();
  c10::BFloat16* scale = scales.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, n * groups, PART_TOKENS, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; group++) {
      const float* element = from + group * size;
      float extreme = element[0];
      for (int64_t i = 1; i < size; i++) extreme = std::abs(element[i]) > std::abs(extreme) ? element[i] : extreme;
      scale[group] = extreme / -128;
      const float rounded = static_cast<float>(scale[group]), divisor = rounded == 0 ? 1.0f : rounded;
      for (int64_t i = 0; i < size; i++) {
        // From numbers only: of infinite entries scales are not finite, so that the result is none either.
        const float quotient = element[i] / divisor, number = quotient == quotient ? quotient : 0.0f;
        code[group * size + i] = static_cast<int8_t>(std::clamp(std::nearbyint(number), -128.0f, 127.0f));
      }
    }
  });
  return {codes, scales};
}

at::Tensor attention_int4(
    const at::Tensor& query, const at::Tensor& kept, int64_t first, const at::Tensor& codes, const at::Tensor& scales,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  check_rows(kept, query.size(0), "kept entries");
  check_rows(codes, query.size(0), "codes", 4);
  check_rows(scales, query.size(0), "scales", 4);
  const int64_t width = kept.size(2);
  check_query(query, width, rank);
  TORCH_CHECK(
      codes.size(3) == (width + 1) / 2 && scales.size(1) == codes.size(1) &&
          scales.size(2) == 2 && scales.size(3) == width && 0 <= first &&
          (first <= kept.size(1) || codes.size(1) == 0),
      "egmla: codes must be [B, groups, g, W / 2] and scales [B, groups, 2, W]");
  const int64_t grouped = codes.size(1) * codes.size(2);
  return by_format(kept.scalar_type(), [&](auto zero) {
    const TokenGroups<decltype(zero)> source{
        dense<decltype(zero)>(kept), codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<c10::BFloat16>(),
        codes.stride(0), scales.stride(0), width, first, grouped, codes.size(2)};
    return compute(source, query, mask, kept.size(1) + grouped, scaling, rank);
  });
}

}  // namespace

TORCH_LIBRARY(egmla, library) {
  library.def("latent_attention(Tensor query, Tensor entries, Tensor? mask, float scaling, int rank) -> Tensor");
  library.def(
      "latent_attention_int8(Tensor query, Tensor codes, Tensor scales, Tensor rotation, Tensor? mask, float scaling, "
      "int rank) -> Tensor");
  library.def(
      "latent_attention_int4(Tensor query, Tensor kept, int first, Tensor codes, Tensor scales, Tensor? mask, float "
      "scaling, int rank) -> Tensor");
  library.def("quantize_int8(Tensor entries, Tensor rotation, int groups) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(egmla, CPU, library) {
  library.impl("latent_attention", &attention);
  library.impl("latent_attention_int8", &attention_int8);
  library.impl("latent_attention_int4", &attention_int4);
  library.impl("quantize_int8", &quantize_int8);
}
