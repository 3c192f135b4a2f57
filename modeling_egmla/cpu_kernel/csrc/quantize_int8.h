// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// New entries as int8 codes, and the rotation that goes before: what quantization_egmla.py has as `rotation` and
// `quantize_elements`.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

namespace {

// A row of so many elements times Hadamard matrices over the root of their size, which is the largest power of two that
// divides the width. `space` is as long as the row. One step adds and subtracts neighbours, and puts sums before
// differences; after as many steps as a place has bits, places are in order again.
inline void rotate(float* row, int64_t width, float* space) {
  const int64_t size = width & -width;
  const float factor = size ? 1 / std::sqrt(static_cast<float>(size)) : 0;  // first of all, so that no sum overflows
  for (int64_t i = 0; i < width; i++) row[i] *= factor;
  for (float *part = row, *end = row + width; part < end; part += size) {
    float *from = part, *to = space;
    for (int64_t done = 1; done < size; done *= 2, std::swap(from, to)) {
      const float* __restrict pairs = from;
      float* __restrict sums = to;
      for (int64_t i = 0; i < size / 2; i++) {
        const float a = pairs[2 * i], b = pairs[2 * i + 1];
        sums[i] = a + b;
        sums[i + size / 2] = a - b;
      }
    }
    if (from != part) std::copy_n(from, size, part);
  }
}

// An entry [W], latent and rotary elements each by themselves; `space` is as long.
inline void rotate_entry(float* entry, int64_t width, int64_t rank, float* space) {
  rotate(entry, rank, space);
  rotate(entry + rank, width - rank, space);
}

// Codes of a group of so many elements, and their scale: an element is scale x code. If an element is infinite or no
// number the scale is neither, so that what it is multiplied with is no number.
inline void quantize(const float* element, int64_t size, int8_t* code, c10::BFloat16* scale) {
  float extreme = element[0], none = 0;
  for (int64_t i = 0; i < size; i++) {
    extreme = std::abs(element[i]) > std::abs(extreme) ? element[i] : extreme;
    none += element[i] - element[i];
  }
  *scale = extreme / -128 + none;
  const float rounded = static_cast<float>(*scale), divisor = rounded == 0 ? 1.0f : rounded;
  for (int64_t i = 0; i < size; i++) {
    const float quotient = element[i] / divisor, number = quotient == quotient ? quotient : 0.0f;
    code[i] = static_cast<int8_t>(std::clamp(std::nearbyint(number), -128.0f, 127.0f));
  }
}

}  // namespace
