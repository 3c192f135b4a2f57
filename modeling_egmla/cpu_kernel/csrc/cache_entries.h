// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Cache entries as they are stored: floating point, int8 and int4.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace {

// Scales of the group of tokens that was read last, for forms that have such groups.
struct GroupScales {
  float* data;  // [2 W]
  int64_t group = -1;
};

// Sources of entries. `read` returns `count` tokens from `start` on as fp32 rows: in `space`, or where they lie
// already. `read_at_once` says how many of `count` tokens to read together. `address` is where a token's bytes are, for
// prefetching; tokens are contiguous.

template <typename T>
struct Dense {
  const T* entries;
  int64_t sequence_stride, width;
  static constexpr int64_t bits = 8 * sizeof(T);

  const T* at(int64_t sequence, int64_t start) const { return entries + sequence * sequence_stride + start * width; }
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, GroupScales&) const {
    const T* from = at(sequence, start);
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      float* __restrict to = space;
      for (int64_t i = 0; i < count * width; i++) to[i] = static_cast<float>(from[i]);
      return space;
    }
  }
  int64_t read_at_once(int64_t, int64_t count) const { return count; }
  static constexpr bool quantised = false;
  uintptr_t address(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(entries) + (sequence * sequence_stride + token * width) * sizeof(T);
  }
};

// int8 codes. Each group of neighbouring elements of a token has a scale.
struct ElementGroups {
  const int8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, groups;
  static constexpr int64_t bits = 8;

  const int8_t* codes_at(int64_t sequence, int64_t token) const {
    return codes + sequence * codes_stride + token * width;
  }
  const c10::BFloat16* scales_at(int64_t sequence, int64_t token) const {
    return scales + sequence * scales_stride + token * groups;
  }
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, GroupScales&) const {
    const int8_t* code = codes_at(sequence, start);
    const c10::BFloat16* scale = scales_at(sequence, start);
    const int64_t size = width / groups;
    for (int64_t group = 0; group < count * groups; group++) {
      const float factor = static_cast<float>(scale[group]);
      float* __restrict to = space + group * size;
      for (int64_t i = 0; i < size; i++) to[i] = factor * code[group * size + i];
    }
    return space;
  }

  int64_t read_at_once(int64_t, int64_t count) const { return count; }
  static constexpr bool quantised = true, scales_by_token = true;
  int64_t element_groups() const { return groups; }
  // Whether a value consists of whole groups, and a group of whole vectors.
  bool has_codes(int64_t, int64_t rank) const {
    const int64_t elements = width / groups;
    return elements % LANES == 0 && rank % elements == 0;
  }
  int64_t segment_end(int64_t) const { return std::numeric_limits<int64_t>::max(); }
  int64_t same_group(int64_t, int64_t count) const { return count; }
  // What is added to codes to make them unsigned: for scores, and for values.
  static constexpr int32_t offset = 128, value_offset = 128;
  // Reads codes [count, W], made unsigned, and scales [groups, `stride`].
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, uint8_t* __restrict to, float* factors, int64_t stride) const {
    const int8_t* code = codes_at(sequence, start);
    for (int64_t i = 0; i < count * width; i++) to[i] = static_cast<uint8_t>(code[i]) ^ 128;
    const c10::BFloat16* scale = scales_at(sequence, start);
    // Two groups are common: the latent, and a rotary key of the same width. A constant number of groups lets the
    // compiler vectorise the loops.
    groups == 2 ? read_scales<2>(scale, count, factors, stride) : read_scales<0>(scale, count, factors, stride);
  }
  template <int64_t GROUPS>
  void read_scales(const c10::BFloat16* scale, int64_t count, float* __restrict factors, int64_t stride) const {
    const int64_t every = GROUPS ? GROUPS : groups;
    for (int64_t group = 0; group < every; group++) {
      for (int64_t token = 0; token < count; token++) {
        const float factor = static_cast<float>(scale[token * every + group]);
        factors[group * stride + token] = factor + (factor - factor);  // NaN if infinite, as 0 times infinity is
      }
    }
  }
  uintptr_t address(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + token * width;
  }
};

// int4 codes. Each group of neighbouring tokens has a scale and a zero point per element. The residual tokens are not
// quantised: the first few, and those after the last full group.
template <typename T>
struct TokenGroups {
  Dense<T> residual;
  const uint8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, first, grouped, size;
  static constexpr int64_t bits = 4;

  int64_t token_bytes() const { return (width + 1) / 2; }
  const uint8_t* codes_at(int64_t sequence, int64_t place) const {
    return codes + sequence * codes_stride + place * token_bytes();
  }
  // Reads scales [W] and zero points [W] of a group.
  void read_scales(int64_t sequence, int64_t group, float* to) const {
    const c10::BFloat16* scale = scales + sequence * scales_stride + group * 2 * width;
    for (int64_t i = 0; i < 2 * width; i++) to[i] = static_cast<float>(scale[i]);
  }
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, GroupScales& scales_read) const {
    const int64_t half = token_bytes();
    for (int64_t token = start; token < start + count; token++) {
      float* row = space + (token - start) * width;
      const int64_t place = token - first;
      if (place < 0 || place >= grouped) {
        const float* found = residual.read(sequence, place < 0 ? token : token - grouped, 1, row, scales_read);
        if (found != row) std::copy(found, found + width, row);
        continue;
      }
      if (std::exchange(scales_read.group, group(token)) != group(token)) {
        read_scales(sequence, group(token), scales_read.data);
      }
      const uint8_t* code = codes_at(sequence, place);
      const float *scale = scales_read.data, *zero = scale + width;
      float* __restrict to = row;
      for (int64_t i = 0; i < half; i++) to[i] = static_cast<float>(code[i] & 15) * scale[i] + zero[i];
      for (int64_t i = half; i < width; i++) to[i] = static_cast<float>(code[i - half] >> 4) * scale[i] + zero[i];
    }
    return space;
  }

  int64_t read_at_once(int64_t, int64_t count) const { return count; }
  static constexpr bool quantised = true, scales_by_token = false;
  int64_t element_groups() const { return 1; }
  // Smaller groups are faster as fp32.
  bool has_codes(int64_t token, int64_t) const { return size >= 24 && token >= first && token - first < grouped; }
  // The end of the segment of `token`: residual tokens and codes alternate.
  int64_t segment_end(int64_t token) const {
    if (token < first) return first;
    return token - first < grouped ? first + grouped : std::numeric_limits<int64_t>::max();
  }
  int64_t group(int64_t token) const { return (token - first) / size; }
  // Typical scales of the elements: those of the first group. None is far smaller than the largest.
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
  int64_t same_group(int64_t token, int64_t count) const { return std::min(count, size - (token - first) % size); }
  // The middle of the codes, so that the rounding of queries is multiplied with small numbers. The rounding of weights
  // is small anyway.
  static constexpr int32_t offset = 8, value_offset = 0;
  // Reads codes [count, W], and their group's scales [W] and zero points [W].
  void read_codes(
      int64_t sequence, int64_t start, int64_t count, uint8_t* __restrict to, float* factors, int64_t) const {
    const int64_t half = token_bytes();
    const uint8_t* code = codes_at(sequence, start - first);
    for (int64_t token = 0; token < count; token++, code += half, to += width) {
      for (int64_t i = 0; i < half; i++) to[i] = code[i] & 15;
      for (int64_t i = half; i < width; i++) to[i] = code[i - half] >> 4;
    }
    read_scales(sequence, group(start), factors);
  }
  uintptr_t address(int64_t sequence, int64_t token) const {
    const int64_t place = std::clamp<int64_t>(token - first, 0, grouped);
    return reinterpret_cast<uintptr_t>(codes_at(sequence, place));
  }
};

}  // namespace
