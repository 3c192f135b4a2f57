// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Attention on floating-point entries: the loop over blocks, which picks a layout of scores.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cache_entries.h"
#include "head_per_lane.h"
#include "online_softmax.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// Queries of a sequence: a head per lane [vectors, W, LANES], a single head in the last vector [W], and in tiles. A
// layout that is not needed is empty.
template <typename T>
struct Queries {
  const float* by_lane;
  const T* tiled;
  float scaling;
};

// Adds tokens to the sums of all heads. T is the dtype that is multiplied: fp32, or that of the cache.
template <typename T, typename Source>
void attend(
    const Source& source, const Mask& mask, const Queries<T>& queries, int64_t sequence, int64_t begin, int64_t end,
    int64_t rows, int64_t width, int64_t rank, const Sums& sums) {
  constexpr bool as_cached = Source::bits == 8 * sizeof(T);
  const bool use_tiles = fits_tiles<T>(width, rank);
  const int64_t block_tokens =
      std::max(STEP_TOKENS, BLOCK_ELEMENTS / width * 4 / static_cast<int64_t>(sizeof(T)) / STEP_TOKENS * STEP_TOKENS);
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES, lanes_per_head = use_tiles ? TILE_SIDE : 1;
  Buffer<float> space(block_tokens * LANES + block_tokens * width + 2 * width);
  float* copies = space.data() + block_tokens * LANES;
  GroupScales scales{copies + block_tokens * width};
  RunningSums running(sums, lanes, lanes_per_head);
  // The first vector's scores prefetch the next block. If entries are multiplied as cached, reading takes as long as
  // the matmul, and half of the lines are left to the steps after scoring.
  constexpr int64_t elements_per_line = CACHE_LINE * 8 / Source::bits * (as_cached ? 2 : 1);

  for (int64_t start = begin, valid; start < end; start += valid) {
    valid = source.read_at_once(start, std::min(block_tokens, end - start));
    const int64_t count = use_tiles ? (valid + STEP_TOKENS - 1) / STEP_TOKENS * STEP_TOKENS : valid;
    const bool* visible =
        mask.visible ? mask.visible + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (visible && all_masked(visible, mask.token_stride, valid)) continue;
    const T* entries;
    if constexpr (as_cached) {
      entries = source.at(sequence, start);
    } else {
      entries = source.read(sequence, start, valid, copies, scales);
    }
    if (count > valid) {
      T* to = reinterpret_cast<T*>(copies);
      if (entries != to) std::copy(entries, entries + valid * width, to);
      std::fill(to + valid * width, to + count * width, T(0.0f));
      entries = to;
    }
    const Block<T> block{entries, count, valid, visible, mask.token_stride, space.data()};
    Prefetcher prefetcher{source.address(sequence, start + block_tokens)};
    if (as_cached) prefetcher.end = source.address(sequence, std::min(start + 2 * block_tokens, end));
    for (int64_t row = 0; row < rows; row += LANES) {
      const Sums vector_sums = running.from(row, rank);
      const int64_t some = std::min(LANES, rows - row);
      if (use_tiles) {
        const auto add = row ? add_tile_block<T, 0> : add_tile_block<T, elements_per_line>;
        add(block, queries.tiled + row * width, queries.scaling, some, width, rank, vector_sums, prefetcher);
      } else if constexpr (std::is_same_v<T, float>) {
        const auto add = row ? add_block<0> : add_block<elements_per_line>;
        add(block, queries.by_lane + row * width, queries.scaling, some, width, rank, vector_sums, prefetcher);
      }
    }
    while (prefetcher.next < prefetcher.end)
      prefetcher.fetch();  // few heads have too little work to prefetch everything
  }
  running.finish();
}

}  // namespace
