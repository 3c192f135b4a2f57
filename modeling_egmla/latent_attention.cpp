// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Decode attention of all heads over one shared latent, on a CPU: each cache entry is read once for all heads, in the
// format it is cached in, and its first R elements serve as the value. And int8 quantisation of new entries, which
// would be twenty small operations in each layer. Compiled and loaded by cpu_kernel.py.
//
// Tokens are taken in blocks that stay in the first caches: scores, running softmax, weighted sum. A vector of scores
// has a head per lane, so that an element of the cache is one broadcast for all heads of a vector; with AVX-512 and
// widths that allow it (`in_quads`) four tokens of each of four heads, from products of four elements at a time. A
// vector of sums has elements of the value. Threads share out sequences and parts of them; parts are merged by their
// sums of exponentials.

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

// Whether the processor multiplies bytes: sum + the products of four unsigned and four signed ones in each lane.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool MULTIPLIES_BYTES = true;
inline Integers multiply_bytes(Integers sum, Integers of_unsigned, Integers of_signed) {
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)of_unsigned, (__m512i)of_signed);
}
// Sixteen words with a byte of each of four rows.
inline void interleave(int32_t* to, const uint8_t* rows, int64_t stride) {
  const auto row = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride)); };
  __m512i words = _mm512_castsi128_si512(row(0));
  words = _mm512_inserti32x4(words, row(1), 1);
  words = _mm512_inserti32x4(words, row(2), 2);
  words = _mm512_inserti32x4(words, row(3), 3);
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m128i within = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  words = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(across, words), _mm512_broadcast_i32x4(within));
  _mm512_store_si512(to, words);
}
#else
constexpr bool MULTIPLIES_BYTES = false;  // and these are never called
inline Integers multiply_bytes(Integers sum, Integers, Integers) { return sum; }
inline void interleave(int32_t*, const uint8_t*, int64_t) {}
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

// exp(x) for x <= 0, to 2e-7 of its value near 0 and 4e-6 at -87: 2^n times a polynomial for the rest.
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector scaled = larger(lowest, x) * 1.44269504f;
  const Vector rounded = scaled + magic;
  const Vector rest = scaled - (rounded - magic);
  Vector result = Vector{} + 1.535336188319500e-4f;
  result = result * rest + 1.339887440266574e-3f;
  result = result * rest + 9.618437357674640e-3f;
  result = result * rest + 5.550332471162809e-2f;
  result = result * rest + 2.402264791363012e-1f;
  result = result * rest + 6.931472028550421e-1f;
  result = result * rest + 1.0f;
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)result, (__m512)(rounded - magic));
#else
  result = (Vector)(((Integers)rounded << 23) + (Integers)result);
  return x == x ? result : x;  // of what is no number the bits, added up, may be those of one
#endif
}

typedef int32_t Word __attribute__((aligned(1), may_alias));

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

  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float*) const {
    const T* from = entries + sequence * sequence_stride + start * width;
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      float* __restrict to = space;
      for (int64_t i = 0; i < count * width; i++) to[i] = static_cast<float>(from[i]);
      return space;
    }
  }
  static constexpr bool quantised = false;
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
  static constexpr float offset = 128;  // of codes that were made unsigned
  // In groups of fewer it takes longer.
  bool has_codes(int64_t, int64_t rank) const {
    const int64_t elements = width / groups;
    return elements >= 16 && elements % 4 == 0 && rank % elements == 0;
  }
  int64_t stop(int64_t) const { return std::numeric_limits<int64_t>::max(); }
  int64_t together(int64_t, int64_t count) const { return count; }
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, uint8_t* to, int64_t stride, float* factors) const {
    const int8_t* code = codes + sequence * codes_stride + start * width;
    for (int64_t token = 0; token < count; token++, code += width) {
      uint8_t* __restrict row = to + token * stride;
      for (int64_t i = 0; i < width; i++) row[i] = static_cast<uint8_t>(code[i]) ^ 128;
    }
    const c10::BFloat16* scale = scales + sequence * scales_stride + start * groups;
    for (int64_t i = 0; i < count * groups; i++) {
      const float factor = static_cast<float>(scale[i]);
      factors[i] = factor + (factor - factor);  // no number where it is infinite, as of a code of 0 times that
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
  static constexpr float offset = 0;
  // In groups of fewer it takes longer.
  bool has_codes(int64_t token, int64_t) const { return size >= 24 && token >= first && token - first < grouped; }
  // Where it ends that tokens are codes, or are none.
  int64_t stop(int64_t token) const {
    if (token < first) return first;
    return token - first < grouped ? first + grouped : std::numeric_limits<int64_t>::max();
  }
  int64_t together(int64_t token, int64_t count) const { return std::min(count, size - (token - first) % size); }
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, uint8_t* to, int64_t stride, float* of_elements) const {
    const int64_t half = (width + 1) / 2, place = start - first;
    const uint8_t* code = codes + sequence * codes_stride + place * half;
    for (int64_t token = 0; token < count; token++, code += half) {
      uint8_t* __restrict row = to + token * stride;
      for (int64_t i = 0; i < half; i++) row[i] = code[i] & 15;
      for (int64_t i = half; i < width; i++) row[i] = code[i - half] >> 4;
    }
    const c10::BFloat16* scale = scales + sequence * scales_stride + place / size * 2 * width;
    for (int64_t i = 0; i < 2 * width; i++) of_elements[i] = static_cast<float>(scale[i]);
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
    __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);  // into the second cache
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

// Turns scores [count, VECTORS, LANES] into weights relative to the highest score so far. A head has a lane of its own,
// or `LANES_OF_HEAD` neighbouring ones, with one highest score and each with a part of the sum.
template <int64_t VECTORS, int64_t LANES_OF_HEAD>
inline Softened<VECTORS> soften(float* scores, int64_t count, float* top_so_far, float* total, Lines& left) {
  Lines lines = left;  // which stays in registers
  Vector top[VECTORS], sum[VECTORS] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) top[k] = load(top_so_far + k * LANES);
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) top[k] = larger(load(scores + (i * VECTORS + k) * LANES), top[k]);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; LANES_OF_HEAD == 4 && k < VECTORS; k++) top[k] = largest_of_four(top[k]);
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) {
      lines.call_if_left();
      float* place = scores + (i * VECTORS + k) * LANES;
      const Vector weight = exponential(load(place) - top[k]);
      store(place, weight);
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

// A block of tokens as fp32 rows. In quads tokens are a multiple of eight: behind the `valid` ones are hidden zeros.
struct Block {
  const float* entries;
  int64_t count, valid;
  const bool* seen;
  int64_t token_stride;
  float* scores;  // or weights, with room for a vector per token

  bool hidden(int64_t token) const { return token >= valid || (seen && !seen[token * token_stride]); }
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
    const Block& block, const float* query, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Lines& lines) {
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
  const auto softened = soften<1, 1>(block.scores, block.count, sums.top, sums.total, lines);
  add_values<1>(
      sums.values, rows, rank, block.scores, LANES, softened.shrink, block.entries, width, block.count, lines);
}

#if defined(__AVX512F__)
// With four elements of each of four heads in a vector fewer lanes are empty than with a head in each, of which there
// are often twelve; and of sixteen heads they take as many products and fewer reads.
constexpr int64_t QUAD = 4;

bool in_quads(int64_t width, int64_t rank) { return width % QUAD == 0 && rank % LANES == 0; }

int64_t quads_of(int64_t rows) { return (std::min(LANES, rows) + QUAD - 1) / QUAD; }

// Queries [rows, W], times the scaling, as vectors [W / 4, quads, LANES] of up to sixteen heads at a time.
void make_quads(const float* query, int64_t rows, int64_t width, float scaling, float* to) {
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = row / LANES * LANES, stride = quads_of(rows - first) * LANES;
    float* place = to + first * width + (row - first) * QUAD;
    for (int64_t i = 0; i < width; i++) place[i / QUAD * stride + i % QUAD] = query[row * width + i] * scaling;
  }
}

// Scores [tokens / 4, quads, four heads, four tokens].
template <int64_t QUADS, int64_t PER_LINE>
void score_quads(
    const float* query, const float* entries, int64_t width, int64_t count, Lines& lines, float* scores) {
  constexpr int64_t TOKENS = QUADS < 4 ? TILE : TILE / 2;  // so many that all sums are in registers
  constexpr int64_t EVERY = PER_LINE / TOKENS;
  static_assert(EVERY % QUAD == 0);
  const auto add_neighbours = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const auto add_pairs = [](__m512 a, __m512 b) {
    const auto c = (__m512d)a, d = (__m512d)b;
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(c, d), (__m512)_mm512_unpackhi_pd(c, d));
  };
  for (int64_t token = 0; token < count; token += TOKENS, entries += TOKENS * width) {
    __m512 sum[TOKENS][QUADS] = {};
    const float* of_heads = query;
    for (int64_t element = 0; element < width; element += QUAD, of_heads += QUADS * LANES) {
      if constexpr (EVERY > 0) {
        if (element % EVERY == 0) lines.call();
      }
      __m512 heads[QUADS];
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++) heads[k] = _mm512_load_ps(of_heads + k * LANES);
#pragma GCC unroll 8
      for (int64_t j = 0; j < TOKENS; j++) {
        const __m512 elements = _mm512_broadcast_f32x4(_mm_loadu_ps(entries + j * width + element));
#pragma GCC unroll 4
        for (int64_t k = 0; k < QUADS; k++) sum[j][k] = _mm512_fmadd_ps(heads[k], elements, sum[j][k]);
      }
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < TOKENS; j += QUAD) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++, scores += LANES) {
        const __m512 first = add_neighbours(sum[j][k], sum[j + 1][k]);
        const __m512 second = add_neighbours(sum[j + 2][k], sum[j + 3][k]);
        _mm512_store_ps(scores, add_pairs(first, second));
      }
    }
  }
}

// What `add_block` does, with heads in quads and four lanes of `top` and `total` per head.
template <int64_t QUADS, int64_t PER_LINE>
void add_block_in_quads(
    const Block& block, const float* query, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Lines& lines) {
  score_quads<QUADS, PER_LINE>(query, block.entries, width, block.count, lines, block.scores);
  for (int64_t token = block.seen ? 0 : block.valid; token < block.count; token++) {
    if (!block.hidden(token)) continue;
    float* of_token = block.scores + token / QUAD * QUADS * LANES + token % QUAD;
    for (int64_t head = 0; head < QUADS * QUAD; head++) of_token[head * QUAD] = HIDDEN;
  }
  const auto softened = soften<QUADS, QUAD>(block.scores, block.count / QUAD, sums.top, sums.total, lines);
  add_values<QUAD>(
      sums.values, rows, rank, block.scores, QUADS * LANES, softened.shrink, block.entries, width, block.count, lines);
}

template <int64_t PER_LINE>
void add_block_in_quads(
    const Block& block, const float* query, int64_t rows, int64_t width, int64_t rank, const Sums& sums,
    Lines& lines) {
  switch (quads_of(rows)) {
    case 1:
      return add_block_in_quads<1, PER_LINE>(block, query, rows, width, rank, sums, lines);
    case 2:
      return add_block_in_quads<2, PER_LINE>(block, query, rows, width, rank, sums, lines);
    case 3:
      return add_block_in_quads<3, PER_LINE>(block, query, rows, width, rank, sums, lines);
    default:
      return add_block_in_quads<4, PER_LINE>(block, query, rows, width, rank, sums, lines);
  }
}
#else
constexpr int64_t QUAD = 1;
bool in_quads(int64_t, int64_t) { return false; }
void make_quads(const float*, int64_t, int64_t, float, float*) {}
template <int64_t PER_LINE>
void add_block_in_quads(const Block&, const float*, int64_t, int64_t, int64_t, const Sums&, Lines&) {}
#endif

// Queries of a sequence, times the scaling: with a head per lane [vectors, W, LANES], and in quads. What is not needed
// is empty.
struct Queries {
  const float *by_lane, *quads;
};

template <typename Source>
void attend(
    const Source& source, const Mask& mask, const Queries& queries, int64_t sequence, int64_t begin, int64_t end,
    int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  const bool quads = in_quads(width, rank);
  const int64_t most = std::max(TILE, BLOCK_ELEMENTS / width / TILE * TILE);
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES, of_head = quads ? QUAD : 1;
  Buffer<float> space(most * LANES + most * width + 2 * width);
  float *copies = space.data() + most * LANES, *scratch = copies + most * width;
  Buffer<float> top(lanes * of_head), total(lanes * of_head);
  for (int64_t i = 0; i < lanes * of_head; i++) {
    top.data()[i] = sums.top[i / of_head];
    total.data()[i] = i % of_head ? 0 : sums.total[i / of_head];
  }
  // The first vector's scores call for the block after this one. In fp32, where reading takes as long as products, half
  // of its lines are left to what follows the scores.
  constexpr bool halves = Source::bits == 32;
  constexpr int64_t per_line = CACHE_LINE * 8 / Source::bits * (halves ? 2 : 1);

  for (int64_t start = begin; start < end; start += most) {
    const int64_t valid = std::min(most, end - start), count = quads ? (valid + TILE - 1) / TILE * TILE : valid;
    const bool* seen = mask.seen ? mask.seen + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (seen && none_seen(seen, mask.token_stride, valid)) continue;
    const float* entries = source.read(sequence, start, valid, copies, scratch);
    if (count > valid) {
      if (entries != copies) std::copy(entries, entries + valid * width, copies);
      std::fill(copies + valid * width, copies + count * width, 0.0f);
      entries = copies;
    }
    const Block block{entries, count, valid, seen, mask.token_stride, space.data()};
    Lines lines{source.ahead(sequence, start + most)};
    if (halves) lines.end = source.ahead(sequence, std::min(start + 2 * most, end));
    for (int64_t row = 0; row < rows; row += LANES) {
      const Sums of_vector{top.data() + row * of_head, total.data() + row * of_head, sums.values + row * rank};
      const auto add = quads ? (row ? add_block_in_quads<0> : add_block_in_quads<per_line>)
                             : (row ? add_block<0> : add_block<per_line>);
      add(block, (quads ? queries.quads : queries.by_lane) + row * width, std::min(LANES, rows - row), width, rank,
          of_vector, lines);
    }
    while (lines.next < lines.end) lines.call();  // few heads have too few sums to call for all
  }
  for (int64_t row = 0; row < lanes; row++) {
    sums.top[row] = top.data()[row * of_head];
    sums.total[row] = std::accumulate(total.data() + row * of_head, total.data() + (row + 1) * of_head, 0.0f);
  }
}

// Numbers of sixteen heads as two signed bytes each, number = step x (256 x high + low), four of a head in a lane.
// Sixteen bits: next to the error of int8 codes they are exact.
struct Bytes {
  int32_t *high, *low;
  Vector step, sum;  // sum: of the numbers
};

template <typename Row>
inline void split(int64_t count, const Row& row, Bytes& to) {
  constexpr float LARGEST = 127 * 256;
  const Vector magic = Vector{} + (12582912.0f + 128);  // as in `exponential`, with what rounds the high byte
  const Integers magic_bits = (Integers)magic;
  Integers largest_bits = {};  // of positive numbers they are in the numbers' order, and what is no number is larger
  for (int64_t i = 0; i < count; i++) {
    const Integers bits = (Integers)row(i) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const Vector largest = (Vector)largest_bits;
  to.step = (largest > 1e-30f ? largest : Vector{} + 1e-30f) * (1 / LARGEST) + (largest - largest);
  const Vector inverse = 1 / to.step;
  Integers sum = {};
  int64_t i = 0;
  const auto put = [&](int64_t filled) {
    Integers high = {}, low = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < filled; j++) {
      const Integers number = (Integers)(row(i + j) * inverse + magic);  // plus 128, below the bits of `magic`
      const int32_t byte = 255u << (8 * j), sign = 128u << (8 * j);
      high |= (j ? number << (8 * j - 8) : number >> 8) & byte;
      low |= (number << (8 * j) & byte) ^ sign;
      sum += number - magic_bits;
    }
    store(to.high + i / 4 * LANES, high);
    store(to.low + i / 4 * LANES, low);
  };
  for (; i + 4 <= count; i += 4) put(4);
  if (i < count) put(count - i);
  to.sum = __builtin_convertvector(sum, Vector) * to.step;
}

// How codes are multiplied. Groups of elements have a scale per token (int8); where elements have scales that all
// tokens of a block share (int4), all elements are one group.
template <typename Source>
struct CodeLayout {
  static constexpr bool by_token = Source::scales_by_token;
  static constexpr int64_t BLOCK = 64, WORD = 4;  // tokens, at most; bytes

  CodeLayout(const Source& source, int64_t width_, int64_t rank_) : width(width_), rank(rank_) {
    groups = source.element_groups();
    size = width / groups;
    words = (size + WORD - 1) / WORD;
    value_groups = by_token ? rank / size : 1;
    value_size = by_token ? size : rank;
    columns = (value_size + LANES - 1) / LANES;
    stride = (width + LANES) / CACHE_LINE * CACHE_LINE + CACHE_LINE;
  }

  int64_t width, rank;
  int64_t groups, size, words;  // of an entry: groups, elements of each, words of each
  int64_t value_groups, value_size, columns;  // of a value: groups, elements of each, vectors of each
  int64_t stride;  // bytes between unsigned codes of two tokens
};

// scores [tokens, LANES] of `count` unsigned codes, `ahead` being where later ones are that will be needed.
template <typename Source>
void score_codes(
    const CodeLayout<Source>& layout, const Bytes* query, Vector bias, const uint8_t* codes, const float* scales,
    int64_t count, uintptr_t ahead, float* scores) {
  for (int64_t token = 0; token < count; token += TILE) {
    Vector sum[TILE];
    for (int64_t j = 0; j < TILE; j++) sum[j] = bias;
    for (int64_t group = 0; group < layout.groups; group++) {
      const uint8_t* tile = codes + token * layout.stride + group * layout.size;
      Integers high[TILE] = {}, low[TILE] = {};
      for (int64_t word = 0; word < layout.words; word++) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);
        ahead += TILE * layout.WORD * Source::bits / 8;
        const Integers of_high = load(query[group].high + word * LANES), of_low = load(query[group].low + word * LANES);
#pragma GCC unroll 8
        for (int64_t j = 0; j < TILE; j++) {
          const Integers four = Integers{} + reinterpret_cast<const Word*>(tile + j * layout.stride)[word];
          high[j] = multiply_bytes(high[j], four, of_high);
          low[j] = multiply_bytes(low[j], four, of_low);
        }
      }
      const Vector step = query[group].step, large_step = step * 256, offset = query[group].sum * Source::offset;
#pragma GCC unroll 8
      for (int64_t j = 0; j < TILE; j++) {
        const Vector product = __builtin_convertvector(high[j], Vector) * large_step +
            (__builtin_convertvector(low[j], Vector) * step - offset);
        sum[j] += layout.by_token ? product * scales[(token + j) * layout.groups + group] : product;
      }
    }
#pragma GCC unroll 8
    for (int64_t j = 0; j < TILE; j++) store(scores + (token + j) * LANES, sum[j]);
  }
}

// values [2 heads, R], from `column` of a group on, = shrink x values + weights x codes. `codes` are words of four
// tokens, `head` the first of the two among the lanes.
template <int64_t COLUMNS, typename Source>
inline void add_codes(
    const CodeLayout<Source>& layout, const Bytes& weights, const Softened<1>& softened, const int32_t* codes,
    const float* scales, int64_t count, int64_t group, int64_t column, int64_t head, float* values) {
  const int64_t step_between = layout.value_groups * layout.columns * LANES;
  codes += (group * layout.columns + column) * LANES;
  Integers high[2][COLUMNS] = {}, low[2][COLUMNS] = {};
  for (int64_t word = 0; word * layout.WORD < count; word++, codes += step_between) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; i++) {
      const Integers of_high = Integers{} + weights.high[word * LANES + head + i];
      const Integers of_low = Integers{} + weights.low[word * LANES + head + i];
#pragma GCC unroll 4
      for (int64_t j = 0; j < COLUMNS; j++) {
        const Integers four = load(codes + j * LANES);
        high[i][j] = multiply_bytes(high[i][j], four, of_high);
        low[i][j] = multiply_bytes(low[i][j], four, of_low);
      }
    }
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < 2; i++) {
    const float step = weights.step[head + i], factor = softened.shrink[head + i];
    const float offset = Source::offset * weights.sum[head + i];  // of rounded weights, which codes are multiplied with
    const float whole = softened.sum[head + i];  // of exact ones: no rounding is to be multiplied with a zero point
#pragma GCC unroll 4
    for (int64_t j = 0; j < COLUMNS; j++) {
      const int64_t first = (column + j) * LANES, valid = std::min(LANES, layout.value_size - first);
      float* to = values + i * layout.rank + group * layout.value_size + first;
      const Vector product = __builtin_convertvector(high[i][j], Vector) * (256 * step) +
          (__builtin_convertvector(low[i][j], Vector) * step - offset);
      if constexpr (CodeLayout<Source>::by_token) {
        if (valid < LANES) {
          for (int64_t k = 0; k < valid; k++) to[k] = to[k] * factor + product[k];
        } else {
          store(to, load(to) * factor + product);
        }
      } else {
        const float *scale = scales + first, *zero = scale + layout.width;
        if (valid < LANES) {
          for (int64_t k = 0; k < valid; k++) to[k] = to[k] * factor + (product[k] * scale[k] + zero[k] * whole);
        } else {
          store(to, load(to) * factor + (product * load(scale) + load(zero) * whole));
        }
      }
    }
  }
}

// What `attend` does, of codes as they are: no entry is turned into floating point, but queries and weights into bytes.
template <typename Source>
void attend_codes(
    const Source& source, const Mask& mask, const float* queries, int64_t sequence, int64_t begin, int64_t end,
    int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  const CodeLayout<Source> layout(source, width, rank);
  constexpr int64_t BLOCK = layout.BLOCK, WORD = layout.WORD;
  constexpr bool by_token = layout.by_token;
  const int64_t groups = layout.groups, words = layout.words, columns = layout.columns;
  const int64_t vectors = (rows + LANES - 1) / LANES;
  Buffer<uint8_t> codes(BLOCK * layout.stride);
  Buffer<int32_t> words_of_four(BLOCK / WORD * layout.value_groups * columns * LANES);  // codes of four tokens each
  Buffer<float> scores(BLOCK * LANES), scales(by_token ? BLOCK * groups : 2 * width);
  Buffer<int32_t> query_bytes(2 * vectors * groups * words * LANES), weight_bytes(2 * BLOCK / WORD * LANES);
  Bytes weights{weight_bytes.data(), weight_bytes.data() + BLOCK / WORD * LANES, {}, {}};
  std::vector<Bytes> query(vectors * groups);
  Buffer<float> biases(vectors * LANES);
  Lines none;
  for (int64_t i = 0; i < vectors * groups; i++) {
    query[i].high = query_bytes.data() + 2 * i * words * LANES;
    query[i].low = query[i].high + words * LANES;
    const float* from = queries + i * layout.size * LANES;
    if constexpr (by_token) split(layout.size, [&](int64_t j) { return load(from + j * LANES); }, query[i]);
  }

  int64_t count;
  for (int64_t start = begin; start < end; start += count) {
    count = source.together(start, std::min(BLOCK, end - start));
    const bool* seen = mask.seen ? mask.seen + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (seen && none_seen(seen, mask.token_stride, count)) continue;
    source.read_codes(sequence, start, count, codes.data(), layout.stride, scales.data());
    for (int64_t token = 0; token < count; token += WORD) {
      for (int64_t group = 0; group < layout.value_groups; group++) {
        int32_t* to = words_of_four.data() + (token / WORD * layout.value_groups + group) * columns * LANES;
        const uint8_t* from = codes.data() + token * layout.stride + group * layout.size;
        for (int64_t i = 0; i < columns * LANES; i += LANES) interleave(to + i, from + i, layout.stride);
      }
    }
    for (int64_t vector = 0; vector < vectors; vector++) {
      const int64_t row = vector * LANES;
      if constexpr (!by_token) {
        const float *from = queries + row * width, *scale = scales.data(), *zero = scale + width;
        split(width, [&](int64_t i) { return load(from + i * LANES) * scale[i]; }, query[vector]);
        Vector sum[4] = {};
        for (int64_t i = 0; i < width; i++) sum[i % 4] += load(from + i * LANES) * zero[i];
        store(biases.data() + row, (sum[0] + sum[1]) + (sum[2] + sum[3]));
      }
      score_codes(
          layout, query.data() + vector * groups, load(biases.data() + row), codes.data(), scales.data(), count,
          source.ahead(sequence, start + BLOCK), scores.data());
      hide(scores.data(), count, seen, mask.token_stride);
      const auto softened = soften<1, 1>(scores.data(), count, sums.top + row, sums.total + row, none);
      for (int64_t group = 0; group < layout.value_groups; group++) {
        const auto weight = [&](int64_t token) {
          const Vector weight = load(scores.data() + token * LANES);
          return by_token ? weight * scales.data()[token * groups + group] : weight;
        };
        split(count, weight, weights);
        for (int64_t head = 0; head < std::min(LANES, rows - row); head += 2) {
          float* values = sums.values + (row + head) * rank;
          const auto add = [&](auto number, int64_t column) {
            add_codes<number>(
                layout, weights, softened, words_of_four.data(), scales.data(), count, group, column, head, values);
          };
          int64_t column = 0;
          for (; column + 4 <= columns; column += 4) add(std::integral_constant<int64_t, 4>{}, column);
          for (; column < columns; column++) add(std::integral_constant<int64_t, 1>{}, column);
        }
      }
    }
  }
}

// Queries [B, rows, W], output [B, rows, R], both contiguous fp32; `tokens` of each sequence.
template <typename Source>
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
  const bool needs_lanes = !in_quads(width, rank) || (MULTIPLIES_BYTES && Source::quantised);
  Buffer<float> values(batch * parts * lanes * rank), total(batch * parts * lanes), top(batch * parts * lanes, HIDDEN);

  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, batch * parts), 1, [&](int64_t, int64_t) {
    Buffer<float> by_lane(needs_lanes ? lanes * width : 0), quads(in_quads(width, rank) ? lanes * width : 0);
    int64_t held = -1;  // the sequence whose queries these are
    for (int64_t task; (task = next++) < batch * parts;) {
      const int64_t sequence = task / parts, part = task % parts;
      const float* of_sequence = query + sequence * rows * width;
      const bool other = sequence != std::exchange(held, sequence);
      for (int64_t row = 0; other && needs_lanes && row < rows; row++) {
        float* to = by_lane.data() + row / LANES * LANES * width + row % LANES;
        for (int64_t i = 0; i < width; i++) to[i * LANES] = of_sequence[row * width + i] * scaling;
      }
      if (other && in_quads(width, rank)) make_quads(of_sequence, rows, width, scaling, quads.data());
      const Sums sums{top.data() + task * lanes, total.data() + task * lanes, values.data() + task * lanes * rank};
      const int64_t end = std::min(tokens, (part + 1) * part_tokens);
      for (int64_t start = part * part_tokens; start < end;) {
        int64_t stop = end;
        if constexpr (MULTIPLIES_BYTES && Source::quantised) {
          stop = std::min(end, source.stop(start));
          if (source.has_codes(start, rank)) {
            attend_codes(source, mask, by_lane.data(), sequence, start, stop, rows, width, rank, sums);
            start = stop;
            continue;
          }
        }
        attend(source, mask, {by_lane.data(), quads.data()}, sequence, start, stop, rows, width, rank, sums);
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
  run(source, read_mask(mask, batch, tokens), queries.const_data_ptr<float>(), output.mutable_data_ptr<float>(), batch,
      rows, tokens, width, rank, static_cast<float>(scaling));
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
