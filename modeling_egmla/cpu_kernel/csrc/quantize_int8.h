// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Quantises new entries to int8, after a Hadamard rotation. The same as `rotation` and `quantize_elements` in
// quantization_egmla.py.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace {

// Multiplies a row with orthonormal Hadamard matrices. Their size is the largest power of two that divides the width.
// `space` is as long as the row. One step adds and subtracts neighbours, and stores sums before differences. After
// log2(size) steps the elements are in order again.
inline void rotate(float* row, int64_t width, float* space) {
  const int64_t size = width & -width;
  const float factor = size ? 1 / std::sqrt(static_cast<float>(size)) : 0;  // first, so that no sum overflows
  for (int64_t i = 0; i < width; i++) row[i] *= factor;
  for (float *block = row, *end = row + width; block < end; block += size) {
    float *from = block, *to = space;
    for (int64_t done = 1; done < size; done *= 2, std::swap(from, to)) {
      const float* __restrict pairs = from;
      float* __restrict sums = to;
      for (int64_t i = 0; i < size / 2; i++) {
        const float a = pairs[2 * i], b = pairs[2 * i + 1];
        sums[i] = a + b;
        sums[i + size / 2] = a - b;
      }
    }
    if (from != block) std::copy_n(from, size, block);
  }
}

// Rotates an entry [W]: latent and rotary elements separately. `space` is as long.
inline void rotate_entry(float* entry, int64_t width, int64_t rank, float* space) {
  rotate(entry, rank, space);
  rotate(entry + rank, width - rank, space);
}

// Quantises a group of elements: an element is scale x code. If an element is infinite or NaN, so is the scale, and
// every product with it is NaN.
inline void quantize(const float* element, int64_t size, int8_t* code, c10::BFloat16* scale) {
  float extreme = element[0], poison = 0;
  for (int64_t i = 0; i < size; i++) {
    extreme = std::abs(element[i]) > std::abs(extreme) ? element[i] : extreme;
    poison += element[i] - element[i];
  }
  *scale = extreme / -128 + poison;
  const float rounded = static_cast<float>(*scale), divisor = rounded == 0 ? 1.0f : rounded;
  for (int64_t i = 0; i < size; i++) {
    const float quotient = element[i] / divisor, number = quotient == quotient ? quotient : 0.0f;
    code[i] = static_cast<int8_t>(std::clamp(std::nearbyint(number), -128.0f, 127.0f));
  }
}

}  // namespace
