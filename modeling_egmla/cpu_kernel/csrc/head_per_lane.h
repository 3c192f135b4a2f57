// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on a block of fp32 entries, with one head per SIMD lane. Works on every processor.

#pragma once

#include <algorithm>
#include <cstdint>

#include "online_softmax.h"
#include "vectors.h"

namespace {

// Adds `COLUMNS` vectors of elements for `ROWS` heads. The sums stay in registers over all tokens of a block. Weights
// are [tokens / TOKENS, .., heads, TOKENS] with `stride` in the first dimension. `rescale` is [heads, TOKENS].
template <int64_t TOKENS, int64_t ROWS, int64_t COLUMNS>
inline void add_values_in_registers(
    float* values, int64_t rank, const float* weights, int64_t stride, const float* rescale, const float* entries,
    int64_t width, int64_t count, Prefetcher& shared) {
  Prefetcher prefetcher = shared;
  Vector sum[ROWS][COLUMNS];
#pragma GCC unroll 6
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < COLUMNS; j++) sum[i][j] = load(values + i * rank + j * LANES) * rescale[i * TOKENS];
  }
  for (int64_t token = 0; token < count; token += TOKENS, weights += stride) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < TOKENS; k++, entries += width) {
      prefetcher.fetch_if_left();
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
  shared = prefetcher;
#pragma GCC unroll 6
  for (int64_t i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < COLUMNS; j++) store(values + i * rank + j * LANES, sum[i][j]);
  }
}

// values [rows, R] = rescale x values + weights x entries. Rows after `rows` are padding. If `TOKENS` is not 1, R is a
// multiple of the vector length.
template <int64_t TOKENS>
void add_values(
    float* values, int64_t rows, int64_t rank, const float* weights, int64_t stride, const float* rescale,
    const float* entries, int64_t width, int64_t count, Prefetcher& prefetcher) {
  constexpr int64_t COLUMNS = LANES == 16 ? 4 : 2;  // sums of four or six heads leave registers free
  const auto add = [&]<int64_t ROWS, int64_t VECTORS>(int64_t row, int64_t element) {
    add_values_in_registers<TOKENS, ROWS, VECTORS>(
        values + row * rank + element, rank, weights + row * TOKENS, stride, rescale + row * TOKENS, entries + element,
        width, count, prefetcher);
  };
  int64_t element = 0;
  if constexpr (TOKENS == 1) {
    for (; rows == 1 && element + 4 * LANES <= rank; element += 4 * LANES) add.template operator()<1, 4>(0, element);
  }
  for (; element + COLUMNS * LANES <= rank; element += COLUMNS * LANES) {
    for (int64_t row = 0; row < rows;) {
      const int64_t remaining = rows - row;
      const bool six = LANES == 16 && remaining > 4 && remaining != 7 && remaining != 8;
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
        values[row * rank + element] = values[row * rank + element] * rescale[row] + sum[row];
      }
    }
  }
}

// Scores [STEP_TOKENS, LANES] of one step, from queries [W, LANES]. Prefetches a line every `INTERVAL` elements (0:
// never).
template <int64_t INTERVAL>
void score_step(const float* query, const float* entries, int64_t width, Prefetcher& prefetcher, float* scores) {
  Vector sum[STEP_TOKENS] = {};
  int64_t element = 0;
  for (; element + 16 <= width; element += 16) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; i++) {
      if constexpr (INTERVAL > 0) {
        if (i % INTERVAL == 0) prefetcher.fetch();
      }
      const Vector heads = load(query + (element + i) * LANES);
#pragma GCC unroll 8
      for (int64_t j = 0; j < STEP_TOKENS; j++) sum[j] += heads * entries[j * width + element + i];
    }
  }
  for (; element < width; element++) {
    const Vector heads = load(query + element * LANES);
    for (int64_t j = 0; j < STEP_TOKENS; j++) sum[j] += heads * entries[j * width + element];
  }
  for (int64_t j = 0; j < STEP_TOKENS; j++) store(scores + j * LANES, sum[j]);
}

// Scores [tokens, LANES] of one head, whose query is [W]: lanes have elements here, so none is idle while they are
// multiplied. The head's scores are in the first lane.
inline void score_single_head(const float* query, const float* entries, int64_t width, int64_t count, float* scores) {
  constexpr int64_t TOKENS = 4;
  for (int64_t token = 0; token < count; token += TOKENS) {
    const float* rows[TOKENS];
    for (int64_t j = 0; j < TOKENS; j++) rows[j] = entries + std::min(token + j, count - 1) * width;
    Vector sum[TOKENS] = {};
    int64_t element = 0;
    for (; element + LANES <= width; element += LANES) {
      const Vector part = load(query + element);
#pragma GCC unroll 4
      for (int64_t j = 0; j < TOKENS; j++) sum[j] += part * load(rows[j] + element);
    }
    for (int64_t j = 0; j < std::min(TOKENS, count - token); j++) {
      float score = 0;
      for (int64_t i = element; i < width; i++) score += query[i] * rows[j][i];
      for (int64_t lane = 0; lane < LANES; lane++) score += sum[j][lane];
      Vector lanes = {};
      lanes[0] = score;
      store(scores + (token + j) * LANES, lanes);
    }
  }
}

// Adds a block to the sums of `rows` heads, one lane each. The query of a single head is [W], not [W, LANES].
// Prefetches a line per `ELEMENTS_PER_LINE` scored elements (0: never).
template <int64_t ELEMENTS_PER_LINE>
void add_block(
    const Block<float>& block, const float* query, float scaling, int64_t rows, int64_t width, int64_t rank,
    const Sums& sums, Prefetcher& prefetcher) {
  int64_t token = 0;
  if (rows == 1) {
    score_single_head(query, block.entries, width, block.count, block.scores);
    token = block.count;
  }
  for (; token + STEP_TOKENS <= block.count; token += STEP_TOKENS) {
    score_step<ELEMENTS_PER_LINE / STEP_TOKENS>(
        query, block.entries + token * width, width, prefetcher, block.scores + token * LANES);
  }
  for (; token < block.count; token++) {
    Vector sum = {};
    for (int64_t i = 0; i < width; i++) sum += load(query + i * LANES) * block.entries[token * width + i];
    store(block.scores + token * LANES, sum);
  }
  mask_scores(block.scores, block.count, block.visible, block.token_stride);
  const auto softmax =
      softmax_block<1, 1>(block.scores, block.count, scaling, sums.maximum, sums.denominator, prefetcher);
  add_values<1>(
      sums.values, rows, rank, block.scores, LANES, softmax.rescale, block.entries, width, block.count, prefetcher);
}

}  // namespace
