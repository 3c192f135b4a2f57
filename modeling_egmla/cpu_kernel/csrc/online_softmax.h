// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// What every layout of scores needs: masks, prefetching, softmax over blocks, running sums.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "vectors.h"

namespace {

// Boolean mask per sequence and token. A null pointer: every token is visible.
struct Mask {
  const bool* visible = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;
};

// Partial results of a split, per head: the highest score, the softmax denominator relative to it, and the weighted sum
// of values [heads, R]. Within `attend` the first two have one lane per head, and four in tiles.
struct Sums {
  float *maximum, *denominator, *values;
};

// Prefetches the next block, one cache line at a time, spread over the work on this block. The processor's own
// prefetching stops at each page, and many prefetches at once wait for each other. Scoring prefetches at a fixed rate
// and ignores `end`, since a comparison costs as much as it gains. The later steps prefetch what remains before `end`
// (0: nothing).
struct Prefetcher {
  uintptr_t next = 0, end = 0;

  inline void fetch() {
    __builtin_prefetch(reinterpret_cast<const void*>(next), 0, PREFETCH_LOCALITY);
    next += CACHE_LINE;
  }
  inline void fetch_if_left() {
    if (next < end) fetch();
  }
};

// Softmax of one block: the factor for earlier sums, and the sum of the block's weights.
template <int64_t VECTORS>
struct BlockSoftmax {
  float rescale[VECTORS * LANES], sum[VECTORS * LANES];
};

// Replaces scores [count, VECTORS, LANES] by softmax weights relative to the running maximum. A head has a lane of its
// own, or `LANES_OF_HEAD` neighbouring lanes, which share a maximum and hold partial sums. Weights of bf16 fill half of
// the memory, contiguously. `APPROXIMATE` is that of `exponential`.
template <int64_t VECTORS, int64_t LANES_OF_HEAD, typename T = float, bool APPROXIMATE = !std::is_same_v<T, float>>
inline BlockSoftmax<VECTORS> softmax_block(
    float* scores, int64_t count, float scaling, float* running_maximum, float* denominator, Prefetcher& shared) {
  Prefetcher prefetcher = shared;  // a local copy stays in registers
  Vector maximum[VECTORS], sum[VECTORS] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) maximum[k] = load(scores + k * LANES);
  for (int64_t i = 1; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) maximum[k] = larger(load(scores + (i * VECTORS + k) * LANES), maximum[k]);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) {
    if constexpr (LANES_OF_HEAD == 4) maximum[k] = largest_of_four(maximum[k]);
    maximum[k] = larger(maximum[k] * scaling, load(running_maximum + k * LANES));
  }
  for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < VECTORS; k++) {
      prefetcher.fetch_if_left();
      const int64_t place = (i * VECTORS + k) * LANES;
      const Vector weight = exponential<APPROXIMATE>(load(scores + place) * scaling - maximum[k]);
      store_as(reinterpret_cast<T*>(scores) + place, weight);
      sum[k] += weight;
    }
  }
  shared = prefetcher;
  BlockSoftmax<VECTORS> softmax;
#pragma GCC unroll 4
  for (int64_t k = 0; k < VECTORS; k++) {
    const int64_t first = k * LANES;
    const Vector rescale = exponential(load(running_maximum + first) - maximum[k]);
    store(running_maximum + first, maximum[k]);
    store(denominator + first, load(denominator + first) * rescale + sum[k]);
    store(softmax.rescale + first, rescale);
    store(softmax.sum + first, sum[k]);
  }
  return softmax;
}

// Masks scores [tokens, LANES], if there is a mask.
inline void mask_scores(float* scores, int64_t count, const bool* visible, int64_t token_stride) {
  for (int64_t token = 0; visible && token < count; token++) {
    if (!visible[token * token_stride]) store(scores + token * LANES, Vector{} + MASKED_SCORE);
  }
}

// Tokens up to the last one that any sequence sees. A fixed cache has unused rows after it.
int64_t tokens_to_last_visible(const Mask& mask, int64_t batch, int64_t tokens) {
  if (!mask.visible) return tokens;
  int64_t last = 0;
  for (int64_t sequence = 0; sequence < (mask.sequence_stride ? batch : 1); sequence++) {
    const bool* visible = mask.visible + sequence * mask.sequence_stride;
    int64_t end = tokens;
    for (uint64_t eight; mask.token_stride == 1 && end - 8 >= last; end -= 8) {
      std::memcpy(&eight, visible + end - 8, 8);
      if (eight) break;
    }
    while (end > last && !visible[(end - 1) * mask.token_stride]) end--;
    last = std::max(last, end);
  }
  return last;
}

bool all_masked(const bool* visible, int64_t token_stride, int64_t count) {
  for (int64_t token = 0; token < count; token++) {
    if (visible[token * token_stride]) return false;
  }
  return true;
}

// A block of tokens as rows of fp32, or of bf16 if the processor multiplies those. In tiles `count` is a multiple of
// eight, and rows after the `valid` ones are masked zeros.
template <typename T>
struct Block {
  const T* entries;
  int64_t count, valid;
  const bool* visible;
  int64_t token_stride;
  float* scores;  // later the weights; room for a vector per token
};

// Running maximum and denominator with several lanes per head, each lane with a part of the sum.
class RunningSums {
 public:
  RunningSums(const Sums& sums, int64_t lanes, int64_t lanes_per_head)
      : sums_(sums), lanes_(lanes), lanes_per_head_(lanes_per_head), maximum_(lanes * lanes_per_head),
        denominator_(lanes * lanes_per_head) {
    for (int64_t i = 0; i < lanes * lanes_per_head; i++) {
      maximum_.data()[i] = sums.maximum[i / lanes_per_head];
      denominator_.data()[i] = i % lanes_per_head ? 0 : sums.denominator[i / lanes_per_head];
    }
  }
  // Sums of one vector of heads, from `row` on.
  Sums from(int64_t row, int64_t rank) {
    return {
        maximum_.data() + row * lanes_per_head_, denominator_.data() + row * lanes_per_head_,
        sums_.values + row * rank};
  }
  void finish() {
    for (int64_t row = 0; row < lanes_; row++) {
      const float* row_denominator = denominator_.data() + row * lanes_per_head_;
      sums_.maximum[row] = maximum_.data()[row * lanes_per_head_];
      sums_.denominator[row] = std::accumulate(row_denominator, row_denominator + lanes_per_head_, 0.0f);
    }
  }

 private:
  const Sums sums_;
  int64_t lanes_, lanes_per_head_;
  Buffer<float> maximum_, denominator_;
};

}  // namespace
