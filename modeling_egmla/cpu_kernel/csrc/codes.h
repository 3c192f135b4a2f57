// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on int8 and int4 codes without converting them to fp32. Needs AVX-512 VNNI.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cache_entries.h"
#include "online_softmax.h"
#include "tiles.h"
#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512CD__)
// Numbers become integers: number = step x integer. Scores use int8 queries; their rounding is as small as that of int8
// codes, and smaller than int4's. Values use 16-bit weights, since many weights may be small.
constexpr float LARGEST_BYTE = 127, LARGEST = 32767;

// Repeats four numbers four times.
inline Vector load_four(const float* from) { return (Vector)_mm512_broadcast_f32x4(_mm_loadu_ps(from)); }

// In each group of four neighbouring lanes, their reduction by `join`.
template <typename Join>
inline __m512i reduce_four(__m512i x, const Join& join) {
  x = join(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0b01001110));
  return join(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0b10110001));
}

// Largest magnitude of `count` numbers. NaN if one of them is NaN.
inline float largest_magnitude(const float* from, int64_t count) {
  const Pair* bits = reinterpret_cast<const Pair*>(from);  // the bits of positive numbers are ordered like the numbers
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, bits[i] & 0x7fffffff);
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof(float));
  return magnitude;
}

// Step for a given largest magnitude. NaN if that is NaN or infinite.
inline float step_of(float largest, float integer) { return std::max(largest, 1e-30f) / integer + (largest - largest); }

// Rounds a number to steps. 0 if the number or the step is NaN: a later product is NaN then.
inline int32_t to_integer(float number, float inverse) {
  const float steps = number * inverse;
  return steps == steps ? static_cast<int32_t>(std::clamp(std::nearbyint(steps), -LARGEST, LARGEST)) : 0;
}

// Queries as int8, packed for up to sixteen heads from a row on: [W / 16, head tiles, 64]. Steps are [groups, head
// tiles, four heads, 4]. Corrections undo the offset of codes, in four lanes per head: [groups, head tiles, LANES].
struct ByteQueries {
  Buffer<int8_t> bytes;
  Buffer<float> steps;
  Buffer<int32_t> corrections;

  ByteQueries(int64_t lanes, int64_t width, int64_t groups)
      : bytes(lanes * width), steps(lanes * groups * TILE_SIDE), corrections(lanes * groups * TILE_SIDE) {}

  void make(const float* query, int64_t rows, int64_t width, int64_t groups, int64_t offset) {
    constexpr int64_t PER_HEAD = HEAD_ELEMENTS<int8_t>;
    const int64_t size = width / groups;
    for (int64_t row = 0; row < rows; row++) {
      const int64_t first = row / LANES * LANES, tiles = head_tiles_of(rows - first);
      for (int64_t group = 0; group < groups; group++) {
        const float* from = query + row * width + group * size;
        const float step = step_of(largest_magnitude(from, size), LARGEST_BYTE), inverse = 1 / step;
        int8_t* to =
            bytes.data() + first * width + (group * size / PER_HEAD * tiles * TILE_SIDE + row - first) * PER_HEAD;
        int32_t sum = 0;
        for (int64_t i = 0; i < size; i++) {
          const int32_t integer = to_integer(from[i], inverse);
          to[i / PER_HEAD * tiles * VECTOR_ELEMENTS<int8_t> + i % PER_HEAD] = static_cast<int8_t>(integer);
          sum += integer;
        }
        const int64_t place = first * groups * TILE_SIDE + (group * tiles * TILE_SIDE + row - first) * TILE_SIDE;
        std::fill_n(steps.data() + place, TILE_SIDE, step);
        std::fill_n(corrections.data() + place, TILE_SIDE, -sum * static_cast<int32_t>(offset / TILE_SIDE));
      }
    }
  }
};

// int4 queries. They are multiplied with the group's scales of elements, and biases are their products with zero
// points. Scales differ little between groups. So queries times typical scales are rounded to 16 bits once, and
// multiplied with each group's ratios.
class ScaledQueries {
 public:
  ByteQueries scaled;
  Buffer<float> biases;  // [lanes, 4]

  ScaledQueries(int64_t lanes, int64_t width, int32_t offset)
      : scaled(lanes, width, 1), biases(lanes * TILE_SIDE), width_(width), offset_(offset), integers_(lanes * width),
        products_(LANES * width), ratios_(width), inverse_typical_(width), ratio_(width), middle_(width),
        steps_(lanes * TILE_SIDE) {}

  void make(const float* query, int64_t rows, const float* typical, const float* by_lane) {
    constexpr int64_t PER_HEAD = HEAD_ELEMENTS<int16_t>;
    rows_ = rows;
    by_lane_ = by_lane;
    for (int64_t i = 0; i < width_; i++) inverse_typical_.data()[i] = 1 / typical[i];
    for (int64_t row = 0; row < rows; row++) {
      const int64_t first = row / LANES * LANES, stride = head_tiles_of(rows - first) * VECTOR_ELEMENTS<int16_t>;
      float* product = ratio_.data();
      for (int64_t i = 0; i < width_; i++) product[i] = query[row * width_ + i] * typical[i];
      const float step = step_of(largest_magnitude(product, width_), LARGEST), inverse = 1 / step;
      int16_t* to = integers_.data() + first * width_ + (row - first) * PER_HEAD;
      for (int64_t i = 0; i < width_; i++) {
        to[i / PER_HEAD * stride + i % PER_HEAD] = static_cast<int16_t>(to_integer(product[i], inverse));
      }
      std::fill_n(steps_.data() + row * TILE_SIDE, TILE_SIDE, step);
    }
  }

  // `element_scales`: scales [W] and zero points [W].
  void scale(const float* element_scales) {
    for (int64_t i = 0; i < width_; i++) {
      ratio_.data()[i] = element_scales[i] * inverse_typical_.data()[i];
      middle_.data()[i] = element_scales[width_ + i] + offset_ * element_scales[i];
    }
    const __m512i four_times = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const float step = step_of(largest_magnitude(ratio_.data(), width_), LARGEST), inverse = 1 / step;
    for (int64_t i = 0; i < width_; i++) {
      ratios_.data()[i] = static_cast<int16_t>(to_integer(ratio_.data()[i], inverse));
    }
    for (int64_t row = 0; row < rows_; row += LANES) {
      with_head_tiles(rows_ - row, [&]<int64_t HEAD_TILES>() { scale_bytes<HEAD_TILES>(row, step * 32768); });
      const float* lane = by_lane_ + row * width_;
      Vector bias[4] = {};
      for (int64_t i = 0; i < width_; i += 4) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) bias[j] += load(lane + (i + j) * LANES) * middle_.data()[i + j];
      }
      const auto whole = (__m512)((bias[0] + bias[1]) + (bias[2] + bias[3]));
      for (int32_t k = 0; k < TILE_SIDE; k++) {
        const __m512i indices = _mm512_add_epi32(_mm512_set1_epi32(k * TILE_SIDE), four_times);
        store(biases.data() + row * TILE_SIDE + k * LANES, (Vector)_mm512_permutexvar_ps(indices, whole));
      }
    }
  }

 private:
  template <int64_t HEAD_TILES>
  void scale_bytes(int64_t row, float step) {
    constexpr int64_t PER_HEAD = HEAD_ELEMENTS<int16_t>, STRIDE = HEAD_TILES * VECTOR_ELEMENTS<int16_t>;
    const int16_t* from = integers_.data() + row * width_;
    int16_t* products = products_.data();
    __m512i largest[HEAD_TILES] = {};
    for (int64_t i = 0; i < width_ / PER_HEAD; i++) {
      const auto* place = reinterpret_cast<const __m128i*>(ratios_.data() + i * PER_HEAD);
      const __m512i ratio = _mm512_broadcast_i32x4(_mm_load_si128(place));
#pragma GCC unroll 4
      for (int64_t k = 0; k < HEAD_TILES; k++) {
        const int64_t vector = i * STRIDE + k * VECTOR_ELEMENTS<int16_t>;
        const __m512i product = _mm512_mulhrs_epi16(_mm512_load_si512(from + vector), ratio);  // / 2^15
        _mm512_store_si512(products + vector, product);
        largest[k] = _mm512_max_epu16(largest[k], _mm512_abs_epi16(product));
      }
    }
    // Scale so that the largest product is 127 x 256: shift bits to the left, then multiply by 1 + `extra` / 2^15. Each
    // lane of 32 bits has these of its head, duplicated in 16 bits.
    __m512i shifts[HEAD_TILES], missing[HEAD_TILES];
#pragma GCC unroll 4
    for (int64_t k = 0; k < HEAD_TILES; k++) {
      __m512i all = reduce_four(largest[k], [](__m512i a, __m512i b) { return _mm512_max_epu16(a, b); });
      all = _mm512_max_epu16(all, _mm512_rol_epi32(all, 16));
      all = _mm512_max_epi32(_mm512_and_si512(all, _mm512_set1_epi32(0xffff)), _mm512_set1_epi32(1));
      const __m512i left = _mm512_subs_epu16(_mm512_lzcnt_epi32(all), _mm512_set1_epi32(17));
      const auto shifted = (Vector)_mm512_cvtepi32_ps(_mm512_sllv_epi32(all, left));
      const Vector gain = 127 * 256 * 32768.0f / shifted - 32768;
      __m512i extra = _mm512_cvtps_epi32((__m512)gain);
      extra = _mm512_min_epi32(_mm512_max_epi32(extra, _mm512_set1_epi32(-32767)), _mm512_set1_epi32(32767));
      const int64_t place = row * TILE_SIDE + k * LANES;
      const auto bits = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), left));
      const auto byte_step = (Vector)_mm512_scalef_ps((__m512)(load(steps_.data() + place) * step), bits);
      store(scaled.steps.data() + place, byte_step / (1 + (Vector)_mm512_cvtepi32_ps(extra) / 32768));
      shifts[k] = _mm512_or_si512(left, _mm512_slli_epi32(left, 16));
      missing[k] = _mm512_or_si512(_mm512_and_si512(extra, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(extra, 16));
    }
    int8_t* to = scaled.bytes.data() + row * width_;
    __m512i sums[HEAD_TILES] = {};
    for (int64_t i = 0; i < width_ / PER_HEAD; i += 2) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < HEAD_TILES; k++, to += VECTOR_ELEMENTS<int8_t>) {
        const int16_t* place = products + i * STRIDE + k * VECTOR_ELEMENTS<int16_t>;
        const auto high = [&](const int16_t* from) {
          const __m512i shifted = _mm512_sllv_epi16(_mm512_load_si512(from), shifts[k]);
          const __m512i whole = _mm512_adds_epi16(shifted, _mm512_mulhrs_epi16(shifted, missing[k]));
          return _mm512_srai_epi16(_mm512_adds_epi16(whole, _mm512_set1_epi16(128)), 8);
        };
        const __m512i bytes = _mm512_packs_epi16(high(place), high(place + STRIDE));
        _mm512_store_si512(to, bytes);
        sums[k] = multiply(sums[k], bytes, _mm512_set1_epi8(1), int8_t{});
      }
    }
    for (int64_t k = 0; k < HEAD_TILES; k++) {
      const __m512i correction = _mm512_mullo_epi32(sums[k], _mm512_set1_epi32(-offset_));
      _mm512_store_si512(scaled.corrections.data() + row * TILE_SIDE + k * LANES, correction);
    }
  }

  int64_t width_, rows_ = 0;
  int32_t offset_;
  const float* by_lane_ = nullptr;
  Buffer<int16_t> integers_, products_, ratios_;  // integers: queries times typical scales
  Buffer<float> inverse_typical_, ratio_, middle_, steps_;
};

// Scores in tiles: products of queries and codes, plus `bias` [HEAD_TILES, LANES] if there is one. `factors` [groups,
// `stride`] are scales of tokens, if tokens have scales.
template <typename Source, int64_t HEAD_TILES>
void score_codes(
    const int8_t* query, const float* steps, const int32_t* corrections, const uint8_t* codes, const float* factors,
    int64_t stride, int64_t width, int64_t groups, int64_t count, const float* bias, Prefetcher& shared,
    float* scores) {
  const int64_t size = width / groups;
  constexpr int64_t BYTES = TILE_STEP_TOKENS<HEAD_TILES> * HEAD_ELEMENTS<int8_t> * Source::bits / 8;
  Prefetcher prefetcher = shared;
  const auto prefetch_lines = [&](int64_t element) {  // for half of the lines, or all; later steps prefetch the rest
    if (BYTES > CACHE_LINE || element % (2 * HEAD_ELEMENTS<int8_t>) == 0) prefetcher.fetch();
  };
  for (int64_t token = 0; token < count; token += TILE_STEP_TOKENS<HEAD_TILES>) {
    for (int64_t group = 0; group < groups; group++) {
      __m512i sum[TILE_STEP_TOKENS<HEAD_TILES>][HEAD_TILES];
#pragma GCC unroll 4
      for (int64_t k = 0; k < HEAD_TILES; k++) {
        const __m512i correction = _mm512_load_si512(corrections + (group * HEAD_TILES + k) * LANES);
#pragma GCC unroll 8
        for (int64_t j = 0; j < TILE_STEP_TOKENS<HEAD_TILES>; j++) sum[j][k] = correction;
      }
      const int8_t* group_query = query + group * size / HEAD_ELEMENTS<int8_t> * HEAD_TILES * VECTOR_ELEMENTS<int8_t>;
      multiply_tiles<int8_t>(group_query, codes + token * width + group * size, width, size, prefetch_lines, sum);
#pragma GCC unroll 2
      for (int64_t j = 0; j < TILE_STEP_TOKENS<HEAD_TILES>; j += TILE_SIDE) {
        Vector factor = Vector{} + 1.0f;
        if constexpr (Source::scales_by_token) {
          factor = load_four(factors + group * stride + token + j);
        }
#pragma GCC unroll 4
        for (int64_t k = 0; k < HEAD_TILES; k++) {
          float* place = scores + ((token + j) / TILE_SIDE * HEAD_TILES + k) * LANES;
          const auto total = sum_lanes<Integers>(
              (Integers)sum[j][k], (Integers)sum[j + 1][k], (Integers)sum[j + 2][k], (Integers)sum[j + 3][k]);
          const Vector product =
              __builtin_convertvector(total, Vector) * load(steps + (group * HEAD_TILES + k) * LANES);
          const Vector before = group ? load(place) : bias ? load(bias + k * LANES) : Vector{};
          store(place, before + product * factor);
        }
      }
    }
  }
  shared = prefetcher;
}

// Rounds weights [tokens / 4, HEAD_TILES, four heads, four tokens], times scales of tokens if there are any, to 16-bit
// integers. Steps are [HEAD_TILES, four heads, 4]. Corrections undo the offset of codes, in the same shape.
template <int64_t HEAD_TILES>
void make_integers(
    const float* weights, const float* factors, int64_t tokens, int32_t offset, int16_t* to, float* steps,
    int32_t* corrections) {
  const auto products = [&](int64_t token, int64_t k) {
    const Vector weight = load(weights + (token / TILE_SIDE * HEAD_TILES + k) * LANES);
    return factors ? weight * load_four(factors + token) : weight;
  };
  __m512i largest[HEAD_TILES] = {};  // bits, as in `largest_magnitude`
  for (int64_t token = 0; token < tokens; token += TILE_SIDE) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < HEAD_TILES; k++) {
      const __m512i bits = _mm512_and_si512((__m512i)products(token, k), _mm512_set1_epi32(0x7fffffff));
      largest[k] = _mm512_max_epi32(largest[k], bits);
    }
  }
  Vector inverse[HEAD_TILES];
#pragma GCC unroll 4
  for (int64_t k = 0; k < HEAD_TILES; k++) {
    const auto head_largest =
        (Vector)reduce_four(largest[k], [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
    const Vector step = larger(Vector{} + 1e-30f, head_largest) / LARGEST + (head_largest - head_largest);
    inverse[k] = 1 / step;
    store(steps + k * LANES, step);
  }
  __m512i sums[HEAD_TILES] = {};
  for (int64_t token = 0; token < tokens; token += TILE_SIDE) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < HEAD_TILES; k++, to += LANES) {
      const __m512i integers = _mm512_cvtps_epi32((__m512)(products(token, k) * inverse[k]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(integers));
      sums[k] = _mm512_add_epi32(sums[k], integers);
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < HEAD_TILES; k++) {
    const __m512i whole = reduce_four(sums[k], [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
    _mm512_store_si512(corrections + k * LANES, _mm512_mullo_epi32(whole, _mm512_set1_epi32(-offset)));
  }
}

// values [ROWS, COLUMNS vectors] = rescale x values + step x weights x codes. `steps`, `corrections`, `rescale` and
// `weight_sums` have four numbers per head. Not inlined: inlined, the compiler kept the sums in memory.
template <typename Source, int64_t ROWS, int64_t COLUMNS>
[[gnu::noinline]] void add_code_values(
    const Pair* weights, int64_t stride, const float* steps, const int32_t* corrections, const float* rescale,
    const float* weight_sums, const uint8_t* codes, const float* element_scales, int64_t width, int64_t count,
    int64_t rank, float* values, Prefetcher& prefetcher) {
  __m512i sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = _mm512_set1_epi32(corrections[i * TILE_SIDE]);
  }
  multiply_pairs<int16_t>(weights, stride, codes, width, count, prefetcher, sum);
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++, weight_sums += TILE_SIDE) {
    // Unrounded weights, since zero points may be large.
    const float weight_sum = (weight_sums[0] + weight_sums[1]) + (weight_sums[2] + weight_sums[3]);
    if constexpr (COLUMNS == 2) {  // restore the order of elements
      const __m512i first = sum[i][0];
      sum[i][0] = _mm512_shuffle_i32x4(first, sum[i][1], 0b01000100);
      sum[i][1] = _mm512_shuffle_i32x4(first, sum[i][1], 0b11101110);
    }
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) {
      float* to = values + i * rank + j * LANES;
      Vector product = __builtin_convertvector((Integers)sum[i][j], Vector) * steps[i * TILE_SIDE];
      if constexpr (!Source::scales_by_token) {
        const float* scale = element_scales + j * LANES;
        product = product * load(scale) + load(scale + width) * weight_sum;
      }
      store(to, load(to) * rescale[i * TILE_SIDE] + product);
    }
  }
}

// Queries of a sequence for its codes.
template <typename Source>
struct CodeQueries {
  ByteQueries bytes;  // for int8
  ScaledQueries scaled;  // for int4

  CodeQueries(const Source& source, int64_t lanes, int64_t width)
      : bytes(Source::scales_by_token ? lanes : 0, width, source.element_groups()),
        scaled(Source::scales_by_token ? 0 : lanes, width, Source::offset) {}

  void make(
      const Source& source, int64_t sequence, const float* query, int64_t rows, int64_t width, const float* by_lane) {
    if constexpr (Source::scales_by_token) {
      bytes.make(query, rows, width, source.element_groups(), source.offset);
    } else {
      Buffer<float> typical(width);
      source.typical_scales(sequence, typical.data());
      scaled.make(query, rows, typical.data(), by_lane);
    }
  }
};

// The same as `attend`, on codes.
template <typename Source>
void attend_codes(
    const Source& source, const Mask& mask, CodeQueries<Source>& queries, float scaling, int64_t sequence,
    int64_t begin, int64_t end, int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  constexpr bool by_token = Source::scales_by_token;
  const int64_t groups = source.element_groups(), lanes = (rows + LANES - 1) / LANES * LANES;
  const int64_t value_size = by_token ? width / groups : rank;
  const int64_t block_tokens = std::clamp<int64_t>(8192 / width / STEP_TOKENS * STEP_TOKENS, 32, 64);
  Buffer<uint8_t> codes(block_tokens * width);
  Buffer<int16_t> weights(block_tokens * LANES);
  Buffer<int32_t> corrections(LANES * TILE_SIDE);
  Buffer<float> scores(block_tokens * LANES), factors(by_token ? groups * block_tokens : 2 * width),
      steps(LANES * TILE_SIDE);
  ByteQueries& bytes = by_token ? queries.bytes : queries.scaled.scaled;
  RunningSums running(sums, lanes, TILE_SIDE);
  int64_t valid;
  [[maybe_unused]] int64_t current = -1;  // the group whose scales the queries are multiplied with
  for (int64_t start = begin; start < end; start += valid) {
    valid = source.same_group(start, std::min(block_tokens, end - start));
    const int64_t count = (valid + STEP_TOKENS - 1) / STEP_TOKENS * STEP_TOKENS;
    const bool* visible =
        mask.visible ? mask.visible + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (visible && all_masked(visible, mask.token_stride, valid)) continue;
    source.read_codes(sequence, start, valid, codes.data(), factors.data(), block_tokens);
    std::fill(codes.data() + valid * width, codes.data() + count * width, 0);
    for (int64_t group = 0; by_token && group < groups; group++) {
      std::fill(factors.data() + group * block_tokens + valid, factors.data() + group * block_tokens + count, 0.0f);
    }
    if constexpr (!by_token) {
      const int64_t group = source.group(start);
      if (std::exchange(current, group) != group) queries.scaled.scale(factors.data());
    }
    Prefetcher prefetcher{
        source.address(sequence, start + block_tokens),
        source.address(sequence, std::min(start + block_tokens + valid, end))};
    for (int64_t row = 0; row < rows; row += LANES) {
      with_head_tiles(rows - row, [&]<int64_t HEAD_TILES>() {
        const Sums vector_sums = running.from(row, rank);
        score_codes<Source, HEAD_TILES>(
            bytes.bytes.data() + row * width, bytes.steps.data() + row * groups * TILE_SIDE,
            bytes.corrections.data() + row * groups * TILE_SIDE, codes.data(), factors.data(), block_tokens, width,
            groups, count, by_token ? nullptr : queries.scaled.biases.data() + row * TILE_SIDE, prefetcher,
            scores.data());
        mask_tiles<HEAD_TILES>(scores.data(), count, valid, visible, mask.token_stride);
        const auto softmax = softmax_block<HEAD_TILES, TILE_SIDE, float, true>(
            scores.data(), count / TILE_SIDE, scaling, vector_sums.maximum, vector_sums.denominator, prefetcher);
        for (int64_t element = 0; element < rank; element += value_size) {
          const float* token_scales = by_token ? factors.data() + element / value_size * block_tokens : nullptr;
          make_integers<HEAD_TILES>(
              scores.data(), token_scales, count, Source::value_offset, weights.data(), steps.data(),
              corrections.data());
          for_each_register_block<HEAD_TILES>(
              value_size, [&]<int64_t ROWS, int64_t COLUMNS>(int64_t head, int64_t further) {
                const int64_t first = element + further;
                add_code_values<Source, ROWS, COLUMNS>(
                    reinterpret_cast<const Pair*>(weights.data()) + head * 2, HEAD_TILES * LANES / 2,
                    steps.data() + head * TILE_SIDE, corrections.data() + head * TILE_SIDE,
                    softmax.rescale + head * TILE_SIDE, softmax.sum + head * TILE_SIDE, codes.data() + first,
                    factors.data() + first, width, count, rank, vector_sums.values + head * rank + first, prefetcher);
              });
        }
      });
    }
  }
  running.finish();
}
#else
template <typename Source>
struct CodeQueries {
  CodeQueries(const Source&, int64_t, int64_t) {}
  void make(const Source&, int64_t, const float*, int64_t, int64_t, const float*) {}
};
template <typename Source>
void attend_codes(
    const Source&, const Mask&, CodeQueries<Source>&, float, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
    const Sums&) {}
#endif

}  // namespace
