// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Decode attention over one shared latent, on a CPU: one new token per sequence, all heads. Each cache entry is read
// once for all heads, in the dtype in which it is cached. Its first R elements are the value. build.py compiles this
// file and __init__.py loads it. README.md explains how to read it.
//
// Attention runs over blocks of tokens that stay in the L1 cache: scores, online softmax, weighted sum. There are two
// layouts of scores. `head_per_lane.h` has one head per SIMD lane and works everywhere. `tiles.h` has tiles of 4 heads
// x 4 tokens, and needs AVX-512 and suitable widths (`fits_tiles`).
//
// This file splits sequences between threads (split-KV) and merges the splits. It also checks the operators' arguments,
// and writes new int8 entries.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cache_entries.h"
#include "channel_codes.h"
#include "codes.h"
#include "floating_point.h"
#include "quantize_int8.h"
#include "vectors.h"

namespace {

// Fewer tokens than this do not deserve a split of their own. The second: once all threads have work.
constexpr int64_t SPLIT_TOKENS = 256, EXTRA_SPLIT_TOKENS = 2048;

// Queries [B, rows, W], output [B, rows, R], both contiguous fp32. `all_tokens` is the length of each sequence. T is
// the dtype that is multiplied.
template <typename T, typename Source>
void run(
    const Source& source, const Mask& mask, const float* query, float* output, int64_t batch, int64_t rows,
    int64_t all_tokens, int64_t width, int64_t rank, float scaling) {
  const int64_t tokens = tokens_to_last_visible(mask, batch, all_tokens);
#ifdef _OPENMP
  const int64_t threads = at::get_num_threads();
#else
  const int64_t threads = 1;  // `parallel_for` runs on one thread then
#endif
  // As many splits as give all threads equal work, unless there are too many to merge or too few tokens. Long sequences
  // get about four splits per thread: a free thread takes the next, since one core may be slower or busy.
  const int64_t balanced = threads / std::gcd(batch, threads), limit = 4 * threads / std::max<int64_t>(1, batch) + 1;
  const int64_t least = std::clamp<int64_t>(tokens / SPLIT_TOKENS, 1, std::min(balanced, limit));
  const int64_t most = threads > 1 ? std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, batch * least)) : 1;
  const int64_t splits = least * std::clamp<int64_t>(tokens / (EXTRA_SPLIT_TOKENS * least), 1, most);
  const int64_t split_tokens = ((tokens + splits - 1) / splits + STEP_TOKENS - 1) / STEP_TOKENS * STEP_TOKENS;
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES;
  const bool use_tiles = fits_tiles<T>(width, rank);
  const bool single_head = rows % LANES == 1 && !use_tiles;  // in the last vector, whose query stays as it is
  const bool has_integers =
      MULTIPLIES_INTEGERS && Source::quantised && fits_tiles<float>(width, rank) && width % 16 == 0;
  bool needs_tiles = use_tiles, needs_lanes = !use_tiles;
  if constexpr (Source::quantised) {
    // int8 codes need queries only as int8. int4 has residual tokens and zero points beside its codes, which need more.
    const bool codes_alone = has_integers && Source::scales_by_token && source.has_codes(0, rank);
    needs_tiles = use_tiles && !codes_alone;
    needs_lanes = !codes_alone && (!use_tiles || has_integers);
  }
  Buffer<float> values(batch * splits * lanes * rank), denominators(batch * splits * lanes),
      maxima(batch * splits * lanes, MASKED_SCORE);

  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, batch * splits), 1, [&](int64_t, int64_t) {
    Buffer<float> by_lane(needs_lanes ? lanes * width : 0);
    Buffer<T> tiled(needs_tiles ? lanes * width : 0, T(0.0f));
    std::optional<std::conditional_t<Source::quantised, CodeQueries<Source>, int>> code_queries;
    if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
      if (has_integers) code_queries.emplace(source, lanes, width);
    }
    int64_t current = -1;  // the sequence whose queries are packed
    for (int64_t task; (task = next++) < batch * splits;) {
      const int64_t sequence = task / splits, split = task % splits;
      const float* sequence_query = query + sequence * rows * width;
      const bool other = sequence != std::exchange(current, sequence);
      for (int64_t row = 0; other && needs_lanes && row < rows; row++) {
        const int64_t stride = row == rows - 1 && single_head ? 1 : LANES;
        float* to = by_lane.data() + row / LANES * LANES * width + row % LANES;
        for (int64_t i = 0; i < width; i++) to[i * stride] = sequence_query[row * width + i];
      }
      if (other && needs_tiles) pack_queries(sequence_query, rows, width, tiled.data());
      if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
        if (other && has_integers) code_queries->make(source, sequence, sequence_query, rows, width, by_lane.data());
      }
      const Sums sums{
          maxima.data() + task * lanes, denominators.data() + task * lanes, values.data() + task * lanes * rank};
      const int64_t end = std::min(tokens, (split + 1) * split_tokens);
      for (int64_t start = split * split_tokens; start < end;) {
        int64_t stop = end;
        if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
          if (has_integers) stop = std::min(end, source.segment_end(start));
          if (has_integers && source.has_codes(start, rank)) {
            attend_codes(source, mask, *code_queries, scaling, sequence, start, stop, rows, width, rank, sums);
            start = stop;
            continue;
          }
        }
        const Queries<T> queries{by_lane.data(), tiled.data(), scaling};
        attend(source, mask, queries, sequence, start, stop, rows, width, rank, sums);
        start = stop;
      }
    }
  });

  at::parallel_for(0, batch * rows, std::max<int64_t>(1, 16384 / (rank * splits)), [&](int64_t first, int64_t last) {
    for (int64_t place_of_row = first; place_of_row < last; place_of_row++) {
      const int64_t sequence = place_of_row / rows, row = place_of_row % rows;
      float* to = output + (sequence * rows + row) * rank;
      std::fill(to, to + rank, 0.0f);
      float highest = MASKED_SCORE, denominator = 0;
      const int64_t place = sequence * splits * lanes + row;
      for (int64_t split = 0; split < splits; split++)
        highest = std::max(highest, maxima.data()[place + split * lanes]);
      for (int64_t split = 0; split < splits; split++) {
        const int64_t from = place + split * lanes;
        const float factor = std::exp(maxima.data()[from] - highest);
        denominator += factor * denominators.data()[from];
        for (int64_t i = 0; i < rank; i++) to[i] += factor * values.data()[from * rank + i];
      }
      // A fully masked sequence gives 0.
      for (int64_t i = 0; i < rank && denominator != 0; i++) to[i] /= denominator;
    }
  });
}

Mask read_mask(const std::optional<at::Tensor>& mask, int64_t batch, int64_t tokens) {
  if (!mask) return {};
  TORCH_CHECK(
      mask->dim() == 4 && mask->scalar_type() == at::kBool && (mask->size(0) == batch || mask->size(0) == 1) &&
          mask->size(1) == 1 && mask->size(2) == 1 && mask->size(3) == tokens,
      "egmla: the mask must be boolean [B or 1, 1, 1, S]");
  return {mask->const_data_ptr<bool>(), mask->size(0) == 1 ? 0 : mask->stride(0), mask->stride(3)};
}

// Checks that `tensor` is [B, 1, rows, .], has at least `used` rows, and that rows are contiguous.
void check_rows(const at::Tensor& tensor, int64_t batch, int64_t used, const char* name) {
  TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == 1 && 0 <= used && used <= tensor.size(2) &&
          (tensor.size(2) < 2 || tensor.size(3) == 0 || tensor.stride(2) == tensor.size(3)) &&
          (tensor.size(3) < 2 || tensor.stride(3) == 1),
      "egmla: ", name, " must be [B, 1, ", used, " or more, W] with one row behind the other");
}

template <typename Source>
at::Tensor compute(
    const Source& source, const at::Tensor& query, const std::optional<at::Tensor>& mask, int64_t tokens,
    double scaling, int64_t rank) {
  TORCH_CHECK(scaling > 0, "egmla: the scaling must be positive, and is ", scaling);
  const int64_t batch = query.size(0), rows = query.size(1), width = query.size(3);
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  at::Tensor output = at::empty({batch, rows, 1, rank}, queries.options());
  const auto multiplying = [&]<typename T>() {
    run<T>(
        source, read_mask(mask, batch, tokens), queries.const_data_ptr<float>(), output.mutable_data_ptr<float>(),
        batch, rows, tokens, width, rank, static_cast<float>(scaling));
  };
  if constexpr (MULTIPLIES_BF16 && std::is_same_v<Source, Dense<c10::BFloat16>>) {
    // bf16 queries lose nothing. Weights are rounded as in PyTorch's fused kernel.
    if (query.scalar_type() == at::kBFloat16 && fits_tiles<c10::BFloat16>(width, rank)) {
      multiplying.template operator()<c10::BFloat16>();
      return output.to(query.scalar_type());
    }
  }
  multiplying.template operator()<float>();
  return output.to(query.scalar_type());
}

template <typename Make>
auto by_dtype(at::ScalarType dtype, const Make& make) {
  switch (dtype) {
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
  return {entries.const_data_ptr<T>(), entries.stride(0), entries.size(3)};
}

// Returns the batch size.
int64_t check_query(const at::Tensor& query, const at::Tensor& entries, int64_t rank) {
  TORCH_CHECK(
      query.dim() == 4 && query.size(2) == 1 && query.size(3) == entries.size(-1) && rank > 0 && rank <= query.size(3),
      "egmla: queries must be [B, heads, 1, W] as wide as entries, and the latent no wider");
  return query.size(0);
}

at::Tensor attention(
    const at::Tensor& query, const at::Tensor& entries, const std::optional<at::Tensor>& mask, double scaling,
    int64_t rank) {
  check_rows(entries, check_query(query, entries, rank), entries.size(-2), "entries");
  return by_dtype(entries.scalar_type(), [&](auto zero) {
    return compute(dense<decltype(zero)>(entries), query, mask, entries.size(2), scaling, rank);
  });
}

// Checks the shapes of int8 codes and scales.
void check_groups(const at::Tensor& codes, const at::Tensor& scales) {
  TORCH_CHECK(
      scales.size(3) > 0 && codes.size(3) % scales.size(3) == 0,
      "egmla: scales must be [B, 1, S, groups] for codes [B, 1, S, W], and groups divide W");
}

// Rotates entries [rows, W] in place.
void rotate_rows(float* data, int64_t rows, int64_t width, int64_t rank) {
  at::parallel_for(0, rows, 256, [&](int64_t first, int64_t last) {
    Buffer<float> space(width);
    for (int64_t row = first; row < last; row++) rotate_entry(data + row * width, width, rank, space.data());
  });
}

// Attends to the first `tokens` of codes [B, 1, capacity, W] and scales [B, 1, capacity, groups]. Entries are rotated.
// So queries are rotated before, and the output after: the rotation is its own inverse.
at::Tensor attention_int8(
    const at::Tensor& query, const at::Tensor& codes, const at::Tensor& scales, int64_t tokens,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  const int64_t batch = check_query(query, codes, rank), rows = batch * query.size(1), width = query.size(3);
  check_rows(codes, batch, tokens, "codes");
  check_rows(scales, batch, tokens, "scales");
  check_groups(codes, scales);
  const ElementGroups source{
      codes.const_data_ptr<int8_t>(),
      scales.const_data_ptr<c10::BFloat16>(),
      codes.stride(0),
      scales.stride(0),
      width,
      scales.size(3)};
  const at::Tensor rotated = at::empty(query.sizes(), query.options().dtype(at::kFloat));
  rotated.copy_(query);
  rotate_rows(rotated.mutable_data_ptr<float>(), rows, width, rank);
  const at::Tensor output = compute(source, rotated, mask, tokens, scaling, rank);
  rotate_rows(output.mutable_data_ptr<float>(), rows, rank, rank);
  return output.to(query.scalar_type());
}

// Copies one token of [B, 1, n, W] with any strides.
void copy_row(const at::Tensor& tensor, int64_t sequence, int64_t token, float* to) {
  by_dtype(tensor.scalar_type(), [&](auto zero) {
    const auto* from = tensor.const_data_ptr<decltype(zero)>() + sequence * tensor.stride(0) + token * tensor.stride(2);
    for (int64_t i = 0; i < tensor.size(3); i++) to[i] = static_cast<float>(from[i * tensor.stride(3)]);
  });
}

// Rotates tokens [B, 1, n, R] and [B, 1, n, P], quantises them, and writes them after the first `start` rows of codes
// [B, 1, capacity, R + P] and scales [B, 1, capacity, groups].
void write_int8(
    const at::Tensor& latent, const at::Tensor& rope_key, const at::Tensor& codes, const at::Tensor& scales,
    int64_t start) {
  TORCH_CHECK(
      latent.dim() == 4 && latent.size(1) == 1 && rope_key.dim() == 4 &&
          latent.sizes().slice(0, 3) == rope_key.sizes().slice(0, 3) &&
          codes.size(-1) == latent.size(3) + rope_key.size(3) && start >= 0,
      "egmla: latents must be [B, 1, n, R], rotary keys [B, 1, n, P] and codes [B, 1, capacity, R + P]");
  const int64_t batch = latent.size(0), n = latent.size(2), rank = latent.size(3);
  check_rows(codes, batch, start + n, "codes");
  check_rows(scales, batch, start + n, "scales");
  check_groups(codes, scales);
  const int64_t width = codes.size(3), groups = scales.size(3), size = width / groups;
  const int64_t codes_stride = codes.stride(0), scales_stride = scales.stride(0);
  int8_t* to_codes = codes.mutable_data_ptr<int8_t>();
  c10::BFloat16* to_scales = scales.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, batch * n, SPLIT_TOKENS, [&](int64_t first, int64_t last) {
    Buffer<float> space(2 * width);
    float* row = space.data();
    for (int64_t place = first; place < last; place++) {
      const int64_t sequence = place / n, token = place % n;
      copy_row(latent, sequence, token, row);
      copy_row(rope_key, sequence, token, row + rank);
      rotate_entry(row, width, rank, row + width);
      int8_t* code = to_codes + sequence * codes_stride + (start + token) * width;
      c10::BFloat16* scale = to_scales + sequence * scales_stride + (start + token) * groups;
      for (int64_t group = 0; group < groups; group++) {
        quantize(row + group * size, size, code + group * size, scale + group);
      }
    }
  });
}

// Attends to the first `groups` of codes [B, 1, capacity, g * W / 2] and scales [B, 1, capacity, 2 W], and to residual
// tokens [B, 1, n, W].
at::Tensor attention_int4(
    const at::Tensor& query, const at::Tensor& residual, int64_t first, const at::Tensor& codes,
    const at::Tensor& scales, int64_t groups, const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  const int64_t batch = check_query(query, residual, rank), width = query.size(3), token_bytes = (width + 1) / 2;
  check_rows(residual, batch, residual.size(-2), "kept entries");
  check_rows(codes, batch, groups, "codes");
  check_rows(scales, batch, groups, "scales");
  TORCH_CHECK(
      codes.size(3) % token_bytes == 0 && scales.size(3) == 2 * width && 0 <= first &&
          (first <= residual.size(2) || groups == 0),
      "egmla: codes must be [B, 1, groups, g * W / 2] and scales [B, 1, groups, 2 W]");
  const int64_t size = codes.size(3) / token_bytes;
  return by_dtype(residual.scalar_type(), [&](auto zero) {
    const TokenGroups<decltype(zero)> source{
        dense<decltype(zero)>(residual),
        codes.const_data_ptr<uint8_t>(),
        scales.const_data_ptr<c10::BFloat16>(),
        codes.stride(0),
        scales.stride(0),
        width,
        first,
        groups * size,
        size};
    return compute(source, query, mask, residual.size(2) + groups * size, scaling, rank);
  });
}

// Returns the runs of `channels` channels, of which `latents` are of the latent: columns of others start at `values`.
std::vector<ChannelRun> read_runs(at::IntArrayRef runs, int64_t channels, int64_t latents, int64_t values) {
  std::vector<ChannelRun> all;
  int64_t channel = 0;
  bool reaches_latents = latents == 0, known = runs.size() % 2 == 0;
  for (size_t i = 0; i + 1 < runs.size(); i += 2) {
    const int64_t bits = runs[i], count = runs[i + 1];
    known = known && count > 0 && (bits == 8 || bits == 6 || (0 <= bits && bits <= 4));
    all.push_back({bits, count, channel < latents ? channel : values + channel - latents, channel});
    channel += count;
    reaches_latents = reaches_latents || channel == latents;
  }
  TORCH_CHECK(
      known && reaches_latents && channel == channels,
      "egmla: runs must be bits (0 to 4, 6 or 8) and channels, those of the latent first, all that are stored");
  return all;
}

// Attends to the first `groups` of codes [B, 1, capacity, .] and ranges [B, 1, capacity, 2 C], and to kept tokens
// [B, 1, n, C], the `first` of which have other channels too: `dropped` [B, 1, first, W - C]. `order` [W] has the C
// stored channels first, `latents` of them of the latent. `runs` are bits and channels of each run.
at::Tensor attention_allocated(
    const at::Tensor& query, const at::Tensor& kept, const at::Tensor& dropped, const at::Tensor& order, int64_t first,
    const at::Tensor& codes, const at::Tensor& ranges, int64_t groups, int64_t size, at::IntArrayRef runs,
    int64_t latents, const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  const int64_t batch = check_query(query, order, rank), heads = query.size(1), width = query.size(3);
  const int64_t channels = kept.size(-1), held = kept.size(-2);
  check_rows(kept, batch, held, "kept entries");
  check_rows(dropped, batch, dropped.size(-2), "dropped channels");
  check_rows(codes, batch, groups, "codes");
  check_rows(ranges, batch, groups, "ranges");
  const int64_t marked = channels < width ? dropped.size(2) : 0;
  const int64_t values = std::max<int64_t>(1, (latents + marked + LANES - 1) / LANES) * LANES;
  const std::vector<ChannelRun> all = read_runs(runs, channels, latents, values);
  int64_t token_bits = 0;
  for (const ChannelRun& run : all) token_bits += run.bits * run.count;
  TORCH_CHECK(
      latents <= rank && size > 0 && size % 8 == 0 && codes.size(3) == size / 8 * token_bits &&
          ranges.size(3) == 2 * channels && 0 <= first && (first <= held || groups == 0) &&
          marked <= std::min(first, held) && dropped.size(3) == width - channels &&
          dropped.scalar_type() == kept.scalar_type(),
      "egmla: codes must be [B, 1, groups, g * (sum of bits) / 8], ranges [B, 1, groups, 2 C], and other channels of "
      "the first tokens [B, 1, first, W - C]");
  const at::Tensor places = order.contiguous();
  const int64_t* place = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < width; i++) {
    TORCH_CHECK(
        0 <= place[i] && place[i] < (i < latents ? rank : width),
        "egmla: the order must have each channel once, and the stored ones of the latent first");
  }
  return by_dtype(kept.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const ChannelCodes<T> source{
        dense<T>(kept),
        codes.const_data_ptr<uint8_t>(),
        ranges.const_data_ptr<uint8_t>(),
        codes.stride(0),
        ranges.stride(0),
        codes.size(3),
        channels,
        latents,
        values,
        (values + channels - latents + 3) / 4 * 4,
        first,
        marked,
        groups * size,
        size,
        all};
    const DroppedChannels<T> others{dropped.const_data_ptr<T>(), place, dropped.stride(0), width, rank};
    const at::Tensor plain = query.to(at::kFloat).contiguous();
    const at::Tensor arranged = at::zeros({batch, heads, 1, source.width}, plain.options());
    for (int64_t row = 0; row < batch * heads; row++) {
      const float* from = plain.const_data_ptr<float>() + row * width;
      others.arrange_query(source, row / heads, from, arranged.mutable_data_ptr<float>() + row * source.width);
    }
    const at::Tensor columns = compute(source, arranged, mask, held + groups * size, scaling, values);
    const at::Tensor output = at::empty({batch, heads, 1, rank}, plain.options());
    for (int64_t row = 0; row < batch * heads; row++) {
      const float* from = columns.const_data_ptr<float>() + row * values;
      others.restore_values(source, row / heads, from, output.mutable_data_ptr<float>() + row * rank);
    }
    return output.to(query.scalar_type());
  });
}

}  // namespace

TORCH_LIBRARY(egmla, library) {
  library.def("latent_attention(Tensor query, Tensor entries, Tensor? mask, float scaling, int rank) -> Tensor");
  library.def(
      "latent_attention_int8(Tensor query, Tensor codes, Tensor scales, SymInt tokens, Tensor? mask, float scaling, "
      "int rank) -> Tensor");
  library.def(
      "latent_attention_int4(Tensor query, Tensor kept, int first, Tensor codes, Tensor scales, SymInt groups, "
      "Tensor? mask, float scaling, int rank) -> Tensor");
  library.def(
      "latent_attention_allocated(Tensor query, Tensor kept, Tensor dropped, Tensor order, int first, Tensor codes, "
      "Tensor ranges, SymInt groups, int size, int[] runs, int latents, Tensor? mask, float scaling, int rank) -> "
      "Tensor");
  library.def("write_int8(Tensor latent, Tensor rope_key, Tensor(a!) codes, Tensor(b!) scales, SymInt start) -> ()");
}

TORCH_LIBRARY_IMPL(egmla, CPU, library) {
  library.impl("latent_attention", &attention);
  library.impl("latent_attention_int8", &attention_int8);
  library.impl("latent_attention_int4", &attention_int4);
  library.impl("latent_attention_allocated", &attention_allocated);
  library.impl("write_int8", &write_int8);
}
