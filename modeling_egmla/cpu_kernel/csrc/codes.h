// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on int8 and int4 codes as they are, where the processor multiplies them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cache_entries.h"
#include "floating_point.h"
#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512CD__)
// Codes are multiplied as integers, number = step x integer: for scores with queries of a byte, whose rounding is like
// that of int8 codes and small beside int4's; for values with weights of 16 bits, of which many may be small.
constexpr float LARGEST_BYTE = 127, LARGEST = 32767;

// Four numbers, four times.
inline Vector load_four(const float* from) { return (Vector)_mm512_broadcast_f32x4(_mm_loadu_ps(from)); }

// In each of four neighbouring lanes what they come to together.
template <typename Join>
inline __m512i over_four(__m512i x, const Join& join) {
  x = join(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0b01001110));
  return join(x, _mm512_shuffle_epi32(x, (_MM_PERM_ENUM)0b10110001));
}

// Of `count` numbers; no number if one of them is none.
inline float largest_magnitude(const float* from, int64_t count) {
  const Word* bits = reinterpret_cast<const Word*>(from);  // of positive ones they are in the numbers' order
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, bits[i] & 0x7fffffff);
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof(float));
  return magnitude;
}

// No number if the largest is none, or infinite.
inline float step_of(float largest, float integer) {
  return std::max(largest, 1e-30f) / integer + (largest - largest);
}

// A number in steps; 0 if it or the step is none, as what it is multiplied with later is no number then.
inline int32_t in_steps(float number, float inverse) {
  const float steps = number * inverse;
  return steps == steps ? static_cast<int32_t>(std::clamp(std::nearbyint(steps), -LARGEST, LARGEST)) : 0;
}

// Queries in quads, as bytes: of up to sixteen heads from a row on [W / 16, quads, 64]; their steps [groups, quads,
// four heads, 4]; and what takes back an offset of codes, in four parts for the lanes of a head [groups, quads, LANES].
struct ByteQueries {
  Buffer<int8_t> bytes;
  Buffer<float> steps;
  Buffer<int32_t> corrections;

  ByteQueries(int64_t lanes, int64_t width, int64_t groups)
      : bytes(lanes * width), steps(lanes * groups * QUAD), corrections(lanes * groups * QUAD) {}

  void make(const float* query, int64_t rows, int64_t width, int64_t groups, int64_t offset) {
    constexpr int64_t OF = OF_HEAD<int8_t>;
    const int64_t size = width / groups;
    for (int64_t row = 0; row < rows; row++) {
      const int64_t first = row / LANES * LANES, quads = quads_of(rows - first);
      for (int64_t group = 0; group < groups; group++) {
        const float* from = query + row * width + group * size;
        const float step = step_of(largest_magnitude(from, size), LARGEST_BYTE), inverse = 1 / step;
        int8_t* to = bytes.data() + first * width + (group * size / OF * quads * QUAD + row - first) * OF;
        int32_t sum = 0;
        for (int64_t i = 0; i < size; i++) {
          const int32_t integer = in_steps(from[i], inverse);
          to[i / OF * quads * OF_VECTOR<int8_t> + i % OF] = static_cast<int8_t>(integer);
          sum += integer;
        }
        const int64_t place = first * groups * QUAD + (group * quads * QUAD + row - first) * QUAD;
        std::fill_n(steps.data() + place, QUAD, step);
        std::fill_n(corrections.data() + place, QUAD, -sum * static_cast<int32_t>(offset / QUAD));
      }
    }
  }
};

// int4's queries: times scales of elements, which tokens of a group share, and products with their zero points. Scales
// differ little between groups, so that queries are rounded to 16 bits times typical ones, and after that times ratios.
class ScaledQueries {
 public:
  ByteQueries scaled;
  Buffer<float> biases;  // [lanes, 4]

  ScaledQueries(int64_t lanes, int64_t width, int32_t offset)
      : scaled(lanes, width, 1), biases(lanes * QUAD), width_(width), offset_(offset), integers_(lanes * width),
        products_(LANES * width), ratios_(width), of_typical_(width), ratio_(width), middle_(width),
        steps_(lanes * QUAD) {}

  void make(const float* query, int64_t rows, const float* typical, const float* by_lane) {
    constexpr int64_t OF = OF_HEAD<int16_t>;
    rows_ = rows;
    by_lane_ = by_lane;
    for (int64_t i = 0; i < width_; i++) of_typical_.data()[i] = 1 / typical[i];
    for (int64_t row = 0; row < rows; row++) {
      const int64_t first = row / LANES * LANES, stride = quads_of(rows - first) * OF_VECTOR<int16_t>;
      float* product = ratio_.data();
      for (int64_t i = 0; i < width_; i++) product[i] = query[row * width_ + i] * typical[i];
      const float step = step_of(largest_magnitude(product, width_), LARGEST), inverse = 1 / step;
      int16_t* to = integers_.data() + first * width_ + (row - first) * OF;
      for (int64_t i = 0; i < width_; i++) {
        to[i / OF * stride + i % OF] = static_cast<int16_t>(in_steps(product[i], inverse));
      }
      std::fill_n(steps_.data() + row * QUAD, QUAD, step);
    }
  }

  // `of_elements`: scales [W] and zero points [W].
  void scale(const float* of_elements) {
    for (int64_t i = 0; i < width_; i++) {
      ratio_.data()[i] = of_elements[i] * of_typical_.data()[i];
      middle_.data()[i] = of_elements[width_ + i] + offset_ * of_elements[i];
    }
    const __m512i four_times = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const float step = step_of(largest_magnitude(ratio_.data(), width_), LARGEST), inverse = 1 / step;
    for (int64_t i = 0; i < width_; i++) {
      ratios_.data()[i] = static_cast<int16_t>(in_steps(ratio_.data()[i], inverse));
    }
    for (int64_t row = 0; row < rows_; row += LANES) {
      with_quads(rows_ - row, [&]<int64_t QUADS>() { scale_bytes<QUADS>(row, step * 32768); });
      const float* lane = by_lane_ + row * width_;
      Vector bias[4] = {};
      for (int64_t i = 0; i < width_; i += 4) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; j++) bias[j] += load(lane + (i + j) * LANES) * middle_.data()[i + j];
      }
      const auto whole = (__m512)((bias[0] + bias[1]) + (bias[2] + bias[3]));
      for (int32_t k = 0; k < QUAD; k++) {
        const __m512i of_four = _mm512_add_epi32(_mm512_set1_epi32(k * QUAD), four_times);
        store(biases.data() + row * QUAD + k * LANES, (Vector)_mm512_permutexvar_ps(of_four, whole));
      }
    }
  }

 private:
  template <int64_t QUADS>
  void scale_bytes(int64_t row, float step) {
    constexpr int64_t OF = OF_HEAD<int16_t>, STRIDE = QUADS * OF_VECTOR<int16_t>;
    const int16_t* from = integers_.data() + row * width_;
    int16_t* products = products_.data();
    __m512i largest[QUADS] = {};
    for (int64_t i = 0; i < width_ / OF; i++) {
      const auto* place = reinterpret_cast<const __m128i*>(ratios_.data() + i * OF);
      const __m512i ratio = _mm512_broadcast_i32x4(_mm_load_si128(place));
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++) {
        const int64_t vector = i * STRIDE + k * OF_VECTOR<int16_t>;
        const __m512i product = _mm512_mulhrs_epi16(_mm512_load_si512(from + vector), ratio);  // / 2^15
        _mm512_store_si512(products + vector, product);
        largest[k] = _mm512_max_epu16(largest[k], _mm512_abs_epi16(product));
      }
    }
    // The largest is to be 127 x 256: bits to the left, and what is missing after that, in parts of 2^15. Each lane of
    // 32 bits has that of its head, or twice that in 16.
    __m512i shifts[QUADS], missing[QUADS];
#pragma GCC unroll 4
    for (int64_t k = 0; k < QUADS; k++) {
      __m512i all = over_four(largest[k], [](__m512i a, __m512i b) { return _mm512_max_epu16(a, b); });
      all = _mm512_max_epu16(all, _mm512_rol_epi32(all, 16));
      all = _mm512_max_epi32(_mm512_and_si512(all, _mm512_set1_epi32(0xffff)), _mm512_set1_epi32(1));
      const __m512i left = _mm512_subs_epu16(_mm512_lzcnt_epi32(all), _mm512_set1_epi32(17));
      const auto shifted = (Vector)_mm512_cvtepi32_ps(_mm512_sllv_epi32(all, left));
      const Vector gain = 127 * 256 * 32768.0f / shifted - 32768;
      __m512i parts = _mm512_cvtps_epi32((__m512)gain);
      parts = _mm512_min_epi32(_mm512_max_epi32(parts, _mm512_set1_epi32(-32767)), _mm512_set1_epi32(32767));
      const int64_t place = row * QUAD + k * LANES;
      const auto bits = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), left));
      const auto of_byte = (Vector)_mm512_scalef_ps((__m512)(load(steps_.data() + place) * step), bits);
      store(scaled.steps.data() + place, of_byte / (1 + (Vector)_mm512_cvtepi32_ps(parts) / 32768));
      shifts[k] = _mm512_or_si512(left, _mm512_slli_epi32(left, 16));
      missing[k] = _mm512_or_si512(_mm512_and_si512(parts, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(parts, 16));
    }
    int8_t* to = scaled.bytes.data() + row * width_;
    __m512i sums[QUADS] = {};
    for (int64_t i = 0; i < width_ / OF; i += 2) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++, to += OF_VECTOR<int8_t>) {
        const int16_t* place = products + i * STRIDE + k * OF_VECTOR<int16_t>;
        const auto high = [&](const int16_t* of) {
          const __m512i shifted = _mm512_sllv_epi16(_mm512_load_si512(of), shifts[k]);
          const __m512i whole = _mm512_adds_epi16(shifted, _mm512_mulhrs_epi16(shifted, missing[k]));
          return _mm512_srai_epi16(_mm512_adds_epi16(whole, _mm512_set1_epi16(128)), 8);
        };
        const __m512i bytes = _mm512_packs_epi16(high(place), high(place + STRIDE));
        _mm512_store_si512(to, bytes);
        sums[k] = multiply(sums[k], bytes, _mm512_set1_epi8(1), int8_t{});
      }
    }
    for (int64_t k = 0; k < QUADS; k++) {
      const __m512i correction = _mm512_mullo_epi32(sums[k], _mm512_set1_epi32(-offset_));
      _mm512_store_si512(scaled.corrections.data() + row * QUAD + k * LANES, correction);
    }
  }

  int64_t width_, rows_ = 0;
  int32_t offset_;
  const float* by_lane_ = nullptr;
  Buffer<int16_t> integers_, products_, ratios_;  // integers: queries times typical scales
  Buffer<float> of_typical_, ratio_, middle_, steps_;
};

// Scores in quads: products of queries and codes, and `bias` [QUADS, LANES] if there is one. `factors` [groups,
// `stride`] are scales of tokens, if those have some.
template <typename Source, int64_t QUADS>
void score_codes(
    const int8_t* query, const float* steps, const int32_t* corrections, const uint8_t* codes, const float* factors,
    int64_t stride, int64_t width, int64_t groups, int64_t count, const float* bias, Lines& left, float* scores) {
  const int64_t size = width / groups;
  constexpr int64_t BYTES = TILE_OF<QUADS> * OF_HEAD<int8_t> * Source::bits / 8;
  Lines lines = left;
  const auto call = [&](int64_t element) {  // for half of the lines, or all; what follows calls for those left
    if (BYTES > CACHE_LINE || element % (2 * OF_HEAD<int8_t>) == 0) lines.call();
  };
  for (int64_t token = 0; token < count; token += TILE_OF<QUADS>) {
    for (int64_t group = 0; group < groups; group++) {
      __m512i sum[TILE_OF<QUADS>][QUADS];
#pragma GCC unroll 4
      for (int64_t k = 0; k < QUADS; k++) {
        const __m512i correction = _mm512_load_si512(corrections + (group * QUADS + k) * LANES);
#pragma GCC unroll 8
        for (int64_t j = 0; j < TILE_OF<QUADS>; j++) sum[j][k] = correction;
      }
      const int8_t* of_group = query + group * size / OF_HEAD<int8_t> * QUADS * OF_VECTOR<int8_t>;
      multiply_quads<int8_t>(of_group, codes + token * width + group * size, width, size, call, sum);
#pragma GCC unroll 2
      for (int64_t j = 0; j < TILE_OF<QUADS>; j += QUAD) {
        Vector factor = Vector{} + 1.0f;
        if constexpr (Source::scales_by_token) {
          factor = load_four(factors + group * stride + token + j);
        }
#pragma GCC unroll 4
        for (int64_t k = 0; k < QUADS; k++) {
          float* place = scores + ((token + j) / QUAD * QUADS + k) * LANES;
          const auto total = sum_lanes<Integers>(
              (Integers)sum[j][k], (Integers)sum[j + 1][k], (Integers)sum[j + 2][k], (Integers)sum[j + 3][k]);
          const Vector product = __builtin_convertvector(total, Vector) * load(steps + (group * QUADS + k) * LANES);
          const Vector before = group ? load(place) : bias ? load(bias + k * LANES) : Vector{};
          store(place, before + product * factor);
        }
      }
    }
  }
  left = lines;
}

// Weights [tokens / 4, QUADS, four heads, four tokens], times factors of tokens if there are some, as integers; their
// steps [QUADS, four heads, 4]; and what takes back an offset of codes, of the same shape.
template <int64_t QUADS>
void make_integers(
    const float* weights, const float* factors, int64_t tokens, int32_t offset, int16_t* to, float* steps,
    int32_t* corrections) {
  const auto products = [&](int64_t token, int64_t k) {
    const Vector weight = load(weights + (token / QUAD * QUADS + k) * LANES);
    return factors ? weight * load_four(factors + token) : weight;
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
    const auto of_head = (Vector)over_four(largest[k], [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); });
    const Vector step = larger(Vector{} + 1e-30f, of_head) / LARGEST + (of_head - of_head);
    inverse[k] = 1 / step;
    store(steps + k * LANES, step);
  }
  __m512i sums[QUADS] = {};
  for (int64_t token = 0; token < tokens; token += QUAD) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < QUADS; k++, to += LANES) {
      const __m512i integers = _mm512_cvtps_epi32((__m512)(products(token, k) * inverse[k]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(integers));
      sums[k] = _mm512_add_epi32(sums[k], integers);
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < QUADS; k++) {
    const __m512i whole = over_four(sums[k], [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
    _mm512_store_si512(corrections + k * LANES, _mm512_mullo_epi32(whole, _mm512_set1_epi32(-offset)));
  }
}

// values [ROWS, COLUMNS vectors] = shrink x values + step x weights x codes; `steps`, `corrections`, `shrink` and
// `parts`, of sums of weights, have four numbers per head. A function of its own: within another one sums were kept in
// memory.
template <typename Source, int64_t ROWS, int64_t COLUMNS>
[[gnu::noinline]] void add_code_tile(
    const Word* weights, int64_t stride, const float* steps, const int32_t* corrections, const float* shrink,
    const float* parts, const uint8_t* codes, const float* of_elements, int64_t width, int64_t count, int64_t rank,
    float* values, Lines& lines) {
  __m512i sum[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = _mm512_set1_epi32(corrections[i * QUAD]);
  }
  multiply_pairs<int16_t>(weights, stride, codes, width, count, lines, sum);
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++, parts += QUAD) {
    const float whole = (parts[0] + parts[1]) + (parts[2] + parts[3]);  // no rounding is multiplied with zero points
    if constexpr (COLUMNS == 2) {  // the order of elements
      const __m512i first = sum[i][0];
      sum[i][0] = _mm512_shuffle_i32x4(first, sum[i][1], 0b01000100);
      sum[i][1] = _mm512_shuffle_i32x4(first, sum[i][1], 0b11101110);
    }
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

// Queries of a sequence for its codes.
template <typename Source>
struct CodeQueries {
  ByteQueries bytes;  // int8's
  ScaledQueries scaled;  // int4's

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

// What `attend` does, of codes as they are.
template <typename Source>
void attend_codes(
    const Source& source, const Mask& mask, CodeQueries<Source>& queries, float scaling, int64_t sequence,
    int64_t begin, int64_t end, int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  constexpr bool by_token = Source::scales_by_token;
  const int64_t groups = source.element_groups(), lanes = (rows + LANES - 1) / LANES * LANES;
  const int64_t value_size = by_token ? width / groups : rank;
  const int64_t most = std::clamp<int64_t>(8192 / width / TILE * TILE, 32, 64);
  Buffer<uint8_t> codes(most * width);
  Buffer<int16_t> weights(most * LANES);
  Buffer<int32_t> corrections(LANES * QUAD);
  Buffer<float> scores(most * LANES), factors(by_token ? groups * most : 2 * width), steps(LANES * QUAD);
  ByteQueries& bytes = by_token ? queries.bytes : queries.scaled.scaled;
  Running running(sums, lanes, QUAD);
  int64_t valid;
  [[maybe_unused]] int64_t held = -1;  // the group whose scales queries are multiplied with
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
    if constexpr (!by_token) {
      const int64_t group = source.group(start);
      if (std::exchange(held, group) != group) queries.scaled.scale(factors.data());
    }
    Lines lines{source.ahead(sequence, start + most), source.ahead(sequence, std::min(start + most + valid, end))};
    for (int64_t row = 0; row < rows; row += LANES) {
      with_quads(rows - row, [&]<int64_t QUADS>() {
        const Sums of_vector = running.from(row, rank);
        score_codes<Source, QUADS>(
            bytes.bytes.data() + row * width, bytes.steps.data() + row * groups * QUAD,
            bytes.corrections.data() + row * groups * QUAD, codes.data(), factors.data(), most, width, groups, count,
            by_token ? nullptr : queries.scaled.biases.data() + row * QUAD, lines, scores.data());
        hide_in_quads<QUADS>(scores.data(), count, valid, seen, mask.token_stride);
        const auto softened = soften<QUADS, QUAD, float, true>(
            scores.data(), count / QUAD, scaling, of_vector.top, of_vector.total, lines);
        for (int64_t element = 0; element < rank; element += value_size) {
          const float* of_tokens = by_token ? factors.data() + element / value_size * most : nullptr;
          make_integers<QUADS>(
              scores.data(), of_tokens, count, Source::value_offset, weights.data(), steps.data(), corrections.data());
          for_each_tile<QUADS>(value_size, [&]<int64_t ROWS, int64_t COLUMNS>(int64_t head, int64_t further) {
            const int64_t first = element + further;
            add_code_tile<Source, ROWS, COLUMNS>(
                reinterpret_cast<const Word*>(weights.data()) + head * 2, QUADS * LANES / 2, steps.data() + head * QUAD,
                corrections.data() + head * QUAD, softened.shrink + head * QUAD, softened.sum + head * QUAD,
                codes.data() + first, factors.data() + first, width, count, rank,
                of_vector.values + head * rank + first, lines);
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
