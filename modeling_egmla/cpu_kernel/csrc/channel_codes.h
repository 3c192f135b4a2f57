// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Cache entries whose channels have bits of their own. channel_codes_egmla.py has the layout of codes and ranges.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cache_entries.h"
#include "vectors.h"

namespace {

// Neighbouring channels of one bit width: their first column in a row of fp32, and in the bytes of all channels.
struct ChannelRun {
  int64_t bits, count, column, channel;
};

// The half range that each byte stands for.
inline const float* half_ranges() {
  static const auto table = [] {
    std::array<float, 256> values;
    for (int byte = 0; byte < 255; byte++) values[byte] = static_cast<float>(std::exp2(byte / 6.0 - 18));
    values[255] = std::numeric_limits<float>::infinity();
    return values;
  }();
  return table.data();
}

// Neighbouring tokens of a group of 8 * `eighths` tokens: `count` of them from `eighths` * `eighth` + `within` on. They
// do not reach the next eighth. So they are in the same field of a byte, whatever the bits.
struct TokensInGroup {
  int64_t eighths, eighth, within, count;
};

// Writes the entries of `channels` channels of these tokens to fp32 rows, `width` apart. `packed` are the run's planes.
// The last vector overlaps the one before it, so nothing beyond the run is read or written.
template <int64_t BITS>
void unpack_run(
    const uint8_t* packed, const TokensInGroup& tokens, int64_t channels, const float* steps, const float* starts,
    float* to, int64_t width) {
  constexpr int64_t LOW = BITS == 6 ? 4 : BITS == 3 ? 2 : BITS, HIGH = BITS - LOW;
  const auto [eighths, eighth, within, count] = tokens;
  const uint8_t *low = packed + (within + eighth % LOW * eighths) * channels, *high = nullptr;
  const int low_shift = eighth / LOW * LOW;
  int high_shift = 0;
  if constexpr (HIGH > 0) {
    high = packed + (eighths * LOW + within + eighth % HIGH * eighths) * channels;
    high_shift = eighth / HIGH * HIGH;
  }
  const auto code = [&](auto low_byte, auto high_byte) {
    auto found = (low_byte >> low_shift) & ((1 << LOW) - 1);
    if constexpr (HIGH > 0) found |= ((high_byte >> high_shift) & ((1 << HIGH) - 1)) << LOW;
    return found;
  };
  for (int64_t vector = 0; vector < channels && channels >= LANES; vector += LANES) {
    const int64_t first = std::min(vector, channels - LANES);
    const Vector step = load(steps + first), start = load(starts + first);
    for (int64_t token = 0; token < count; token++) {
      const int64_t place = token * channels + first;
      const Integers codes = code(load_bytes(low + place), HIGH > 0 ? load_bytes(high + place) : Integers{});
      store(to + token * width + first, __builtin_convertvector(codes, Vector) * step + start);
    }
  }
  for (int64_t place = 0; channels < LANES && place < count * channels; place++) {
    const int64_t token = place / channels, channel = place % channels;
    const float number = static_cast<float>(code(int{low[place]}, HIGH > 0 ? int{high[place]} : 0));
    to[token * width + channel] = number * steps[channel] + starts[channel];
  }
}

// Groups of `size` tokens, and tokens as they came: the first few, and those after the last full group. Only stored
// channels are here, in their order: latents, then rotary keys. A row of fp32 has these columns:
//
//     latents | a 1 in the column of each `marked` token | zeros | rotary keys | zeros
//
// Values are whole vectors, `values` columns. Marked are the first tokens, if there are channels that are not stored:
// theirs are. Marks add their scores from the query, and give their weights as a part of the result.
template <typename T>
struct ChannelCodes {
  Dense<T> kept;
  const uint8_t *codes, *ranges;
  int64_t codes_stride, ranges_stride, group_bytes, channels, latents, values, width, first, marked, grouped, size;
  std::vector<ChannelRun> runs;
  // The rate of prefetching: most caches have fewer bits.
  static constexpr int64_t bits = 4;
  static constexpr bool quantised = false;

  // Reads what codes count in [C], and what code 0 stands for [C].
  void read_ranges(int64_t sequence, int64_t group, float* steps) const {
    const uint8_t* bytes = ranges + sequence * ranges_stride + group * 2 * channels;
    const float* table = half_ranges();
    float* __restrict starts = steps + channels;
    for (int64_t i = 0; i < channels; i++) steps[i] = table[bytes[i]];
    for (int64_t i = 0; i < channels; i++) starts[i] = (bytes[channels + i] - 128) * (steps[i] / 8) - steps[i];
    for (const ChannelRun& run : runs) {
      const float factor = 2.0f / static_cast<float>(std::max<int64_t>(1, (1 << run.bits) - 1));
      for (int64_t i = run.channel; i < run.channel + run.count; i++) steps[i] *= factor;
    }
  }

  // Reads `tokens` of a group, which has `packed` codes.
  void read_codes(const uint8_t* packed, const TokensInGroup& tokens, float* rows, const float* steps) const {
    for (const ChannelRun& run : runs) {
      const float *run_steps = steps + run.channel, *run_starts = run_steps + channels;
      const auto unpack = [&]<int64_t BITS>() {
        unpack_run<BITS>(packed, tokens, run.count, run_steps, run_starts, rows + run.column, width);
      };
      for (int64_t token = 0; run.bits == 0 && token < tokens.count; token++) {  // a group's means, without codes
        std::copy_n(run_starts, run.count, rows + token * width + run.column);
      }
      if (run.bits == 1) unpack.template operator()<1>();
      if (run.bits == 2) unpack.template operator()<2>();
      if (run.bits == 3) unpack.template operator()<3>();
      if (run.bits == 4) unpack.template operator()<4>();
      if (run.bits == 6) unpack.template operator()<6>();
      if (run.bits == 8) unpack.template operator()<8>();
      packed += tokens.eighths * run.bits * run.count;
    }
  }

  // Up to the end of an eighth of a group, or of the first tokens.
  int64_t read_at_once(int64_t start, int64_t count) const {
    const int64_t place = start - first, whole = (place + count) / (size / 8) * (size / 8) - place;
    if (place < 0) return std::min(count, -place);
    return whole > 0 && place < grouped ? whole : count;
  }

  // `space` is zero, or has what this function wrote before.
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, GroupScales& scales) const {
    const int64_t rope = channels - latents, eighths = size / 8;
    for (int64_t done = 0, some; done < count; done += some) {
      float* rows = space + done * width;
      const int64_t token = start + done, place = token - first;
      const bool in_group = 0 <= place && place < grouped;
      some = in_group ? std::min(count - done, eighths - place % eighths) : 1;
      // Zeros behind the latents, which are written afterwards. Those behind the rotary key were never anything else.
      for (float* row = rows; row < rows + some * width; row += width) {
        for (int64_t i = values - LANES; i + LANES > latents; i -= LANES) store(row + i, Vector{});
      }
      if (in_group) {
        const int64_t group = place / size, in_eighths = place % size / eighths;
        if (std::exchange(scales.group, group) != group) read_ranges(sequence, group, scales.data);
        const uint8_t* packed = codes + sequence * codes_stride + group * group_bytes;
        read_codes(packed, {eighths, in_eighths, place % eighths, some}, rows, scales.data);
        continue;
      }
      const T* from = kept.at(sequence, place < 0 ? token : token - grouped);
      for (int64_t i = 0; i < latents; i++) rows[i] = static_cast<float>(from[i]);
      for (int64_t i = 0; i < rope; i++) rows[values + i] = static_cast<float>(from[latents + i]);
      if (token < marked) rows[latents + token] = 1;
    }
    return space;
  }

  // A group ahead: its bytes are read in another order than that of its tokens.
  uintptr_t address(int64_t sequence, int64_t token) const {
    const int64_t place = std::clamp<int64_t>(token - first + size, 0, grouped);
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + place * group_bytes / size;
  }
};

// The first tokens' channels that are not stored, [B, first, W - C], and the order of channels, the stored ones first.
template <typename T>
struct DroppedChannels {
  const T* dropped;
  const int64_t* order;
  int64_t sequence_stride, width, rank;

  // Queries [W] to columns of `source`.
  void arrange_query(const ChannelCodes<T>& source, int64_t sequence, const float* query, float* __restrict to) const {
    for (int64_t i = 0; i < source.channels; i++) {
      to[i < source.latents ? i : source.values + i - source.latents] = query[order[i]];
    }
    const int64_t others = width - source.channels;
    const T* from = dropped + sequence * sequence_stride;
    for (int64_t token = 0; token < source.marked; token++, from += others) {
      float score = 0;
      for (int64_t i = 0; i < others; i++) score += query[order[source.channels + i]] * static_cast<float>(from[i]);
      to[source.latents + token] = score;
    }
  }

  // Columns of `source` to mean latents [R].
  void restore_values(const ChannelCodes<T>& source, int64_t sequence, const float* columns, float* to) const {
    std::fill(to, to + rank, 0.0f);
    for (int64_t i = 0; i < source.latents; i++) to[order[i]] = columns[i];
    const int64_t others = width - source.channels;
    const T* from = dropped + sequence * sequence_stride;
    for (int64_t token = 0; token < source.marked; token++, from += others) {
      for (int64_t i = 0; i < others; i++) {
        const int64_t channel = order[source.channels + i];
        if (channel < rank) to[channel] += columns[source.latents + token] * static_cast<float>(from[i]);
      }
    }
  }
};

}  // namespace
