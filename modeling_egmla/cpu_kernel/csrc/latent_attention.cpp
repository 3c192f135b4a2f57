// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Decode attention of all heads over one shared latent, on a CPU: each cache entry is read once for all heads, in the
// format it is cached in, and its first R elements serve as the value. And int8 quantisation of new entries, which
// would be twenty small operations in each layer. Compiled and loaded by cpu_kernel.py.
//
// Tokens are taken in blocks that stay in the first caches: scores, running softmax, weighted sum. A vector of scores
// has a head per lane, so that an element of the cache is one broadcast for all heads of a vector; with AVX-512 and
// widths that allow it (`in_quads`) four tokens of each of four heads, from products of 16 bytes of each head at a
// time: of fp32, bf16 or codes, where the processor multiplies those. A vector of sums has elements of the value.
//
// Here threads share out sequences and parts of them, and parts are merged by their sums of exponentials. What a part
// comes to is in floating_point.h and, of int8 and int4 codes, in codes.h; how entries are cached in cache_entries.h,
// and how they become int8 in quantize_int8.h.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

#include "cache_entries.h"
#include "codes.h"
#include "floating_point.h"
#include "quantize_int8.h"
#include "vectors.h"

namespace {

// Fewer tokens than this are not worth a part of their own; or one beside those that keep all threads at work.
constexpr int64_t PART_TOKENS = 256, FURTHER_PART_TOKENS = 2048;

// Queries [B, rows, W], output [B, rows, R], both contiguous fp32; `tokens` of each sequence. T: what is multiplied.
template <typename T, typename Source>
void run(
    const Source& source, const Mask& mask, const float* query, float* output, int64_t batch, int64_t rows,
    int64_t all_tokens, int64_t width, int64_t rank, float scaling) {
  const int64_t tokens = tokens_to_last_seen(mask, batch, all_tokens);
#ifdef _OPENMP
  const int64_t threads = at::get_num_threads();
#else
  const int64_t threads = 1;  // what `parallel_for` comes to
#endif
  // So many that all threads get as many, unless that is too many to merge or too few tokens; of many tokens
  // about four for each thread, which takes the next one when it is done: a core may be slower than another, or busy.
  const int64_t even = threads / std::gcd(batch, threads), few = 4 * threads / std::max<int64_t>(1, batch) + 1;
  const int64_t least = std::clamp<int64_t>(tokens / PART_TOKENS, 1, std::min(even, few));
  const int64_t most = threads > 1 ? std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, batch * least)) : 1;
  const int64_t parts = least * std::clamp<int64_t>(tokens / (FURTHER_PART_TOKENS * least), 1, most);
  const int64_t part_tokens = ((tokens + parts - 1) / parts + TILE - 1) / TILE * TILE;
  const int64_t lanes = (rows + LANES - 1) / LANES * LANES;
  const bool quads = in_quads<T>(width, rank);
  const bool has_integers = MULTIPLIES_INTEGERS && Source::quantised && in_quads<float>(width, rank) && width % 16 == 0;
  bool needs_quads = quads, needs_lanes = !quads;
  if constexpr (Source::quantised) {
    // int8's codes need queries in no other form than their own; int4's have kept tokens beside them, and zero points.
    const bool codes_alone = has_integers && Source::scales_by_token && source.has_codes(0, rank);
    needs_quads = quads && !codes_alone;
    needs_lanes = !codes_alone && (!quads || has_integers);
  }
  Buffer<float> values(batch * parts * lanes * rank), total(batch * parts * lanes), top(batch * parts * lanes, HIDDEN);

  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, batch * parts), 1, [&](int64_t, int64_t) {
    Buffer<float> by_lane(needs_lanes ? lanes * width : 0);
    Buffer<T> by_quad(needs_quads ? lanes * width : 0, T(0.0f));
    std::optional<std::conditional_t<Source::quantised, CodeQueries<Source>, int>> code_queries;
    if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
      if (has_integers) code_queries.emplace(source, lanes, width);
    }
    int64_t held = -1;  // the sequence whose queries these are
    for (int64_t task; (task = next++) < batch * parts;) {
      const int64_t sequence = task / parts, part = task % parts;
      const float* of_sequence = query + sequence * rows * width;
      const bool other = sequence != std::exchange(held, sequence);
      for (int64_t row = 0; other && needs_lanes && row < rows; row++) {
        float* to = by_lane.data() + row / LANES * LANES * width + row % LANES;
        for (int64_t i = 0; i < width; i++) to[i * LANES] = of_sequence[row * width + i];
      }
      if (other && needs_quads) make_quads(of_sequence, rows, width, by_quad.data());
      if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
        if (other && has_integers) code_queries->make(source, sequence, of_sequence, rows, width, by_lane.data());
      }
      const Sums sums{top.data() + task * lanes, total.data() + task * lanes, values.data() + task * lanes * rank};
      const int64_t end = std::min(tokens, (part + 1) * part_tokens);
      for (int64_t start = part * part_tokens; start < end;) {
        int64_t stop = end;
        if constexpr (MULTIPLIES_INTEGERS && Source::quantised) {
          if (has_integers) stop = std::min(end, source.stop(start));
          if (has_integers && source.has_codes(start, rank)) {
            attend_codes(source, mask, *code_queries, scaling, sequence, start, stop, rows, width, rank, sums);
            start = stop;
            continue;
          }
        }
        const Queries<T> queries{by_lane.data(), by_quad.data(), scaling};
        attend(source, mask, queries, sequence, start, stop, rows, width, rank, sums);
        start = stop;
      }
    }
  });

  at::parallel_for(0, batch * rows, std::max<int64_t>(1, 16384 / (rank * parts)), [&](int64_t first, int64_t last) {
    for (int64_t place_of_row = first; place_of_row < last; place_of_row++) {
      const int64_t sequence = place_of_row / rows, row = place_of_row % rows;
      float* to = output + (sequence * rows + row) * rank;
      std::fill(to, to + rank, 0.0f);
      float highest = HIDDEN, whole = 0;
      const int64_t place = sequence * parts * lanes + row;
      for (int64_t part = 0; part < parts; part++) highest = std::max(highest, top.data()[place + part * lanes]);
      for (int64_t part = 0; part < parts; part++) {
        const int64_t from = place + part * lanes;
        const float share = std::exp(top.data()[from] - highest);
        whole += share * total.data()[from];
        for (int64_t i = 0; i < rank; i++) to[i] += share * values.data()[from * rank + i];
      }
      // Nothing is seen: 0, as a mean of nothing.
      for (int64_t i = 0; i < rank && whole != 0; i++) to[i] /= whole;
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

// Checks that [B, 1, rows, .] has rows one behind the other, `used` or more of them.
void check_rows(const at::Tensor& tensor, int64_t batch, int64_t used, const char* name) {
  TORCH_CHECK(
      tensor.dim() == 4 && tensor.size(0) == batch && tensor.size(1) == 1 && 0 <= used && used <= tensor.size(2) &&
          (tensor.size(2) < 2 || tensor.stride(2) == tensor.size(3)) && (tensor.size(3) < 2 || tensor.stride(3) == 1),
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
    // Queries of bf16 lose nothing; weights are rounded as in PyTorch's fused kernel.
    if (query.scalar_type() == at::kBFloat16 && in_quads<c10::BFloat16>(width, rank)) {
      multiplying.template operator()<c10::BFloat16>();
      return output.to(query.scalar_type());
    }
  }
  multiplying.template operator()<float>();
  return output.to(query.scalar_type());
}

template <typename Make>
auto by_format(at::ScalarType format, const Make& make) {
  switch (format) {
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

// Gives the number of sequences.
int64_t check_query(const at::Tensor& query, const at::Tensor& entries, int64_t rank) {
  TORCH_CHECK(
      query.dim() == 4 && query.size(2) == 1 && query.size(3) == entries.size(-1) && rank > 0 &&
          rank <= query.size(3),
      "egmla: queries must be [B, heads, 1, W] as wide as entries, and the latent no wider");
  return query.size(0);
}

at::Tensor attention(
    const at::Tensor& query, const at::Tensor& entries, const std::optional<at::Tensor>& mask, double scaling,
    int64_t rank) {
  check_rows(entries, check_query(query, entries, rank), entries.size(-2), "entries");
  return by_format(entries.scalar_type(), [&](auto zero) {
    return compute(dense<decltype(zero)>(entries), query, mask, entries.size(2), scaling, rank);
  });
}

// Of int8.
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

// The first `tokens` of codes [B, 1, capacity, W] and scales [B, 1, capacity, groups]. Entries are rotated ones, so
// queries are rotated too, and what comes out once more: the rotation is its own inverse.
at::Tensor attention_int8(
    const at::Tensor& query, const at::Tensor& codes, const at::Tensor& scales, int64_t tokens,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  const int64_t batch = check_query(query, codes, rank), rows = batch * query.size(1), width = query.size(3);
  check_rows(codes, batch, tokens, "codes");
  check_rows(scales, batch, tokens, "scales");
  check_groups(codes, scales);
  const ElementGroups source{
      codes.const_data_ptr<int8_t>(), scales.const_data_ptr<c10::BFloat16>(), codes.stride(0), scales.stride(0),
      width, scales.size(3)};
  const at::Tensor rotated = at::empty(query.sizes(), query.options().dtype(at::kFloat));
  rotated.copy_(query);
  rotate_rows(rotated.mutable_data_ptr<float>(), rows, width, rank);
  const at::Tensor output = compute(source, rotated, mask, tokens, scaling, rank);
  rotate_rows(output.mutable_data_ptr<float>(), rows, rank, rank);
  return output.to(query.scalar_type());
}

// A token of [B, 1, n, W], wherever its elements lie.
void copy_row(const at::Tensor& tensor, int64_t sequence, int64_t token, float* to) {
  by_format(tensor.scalar_type(), [&](auto zero) {
    const auto* from = tensor.const_data_ptr<decltype(zero)>() + sequence * tensor.stride(0) + token * tensor.stride(2);
    for (int64_t i = 0; i < tensor.size(3); i++) to[i] = static_cast<float>(from[i * tensor.stride(3)]);
  });
}

// Writes tokens [B, 1, n, R] and [B, 1, n, P], rotated, behind the first `start` of codes [B, 1, capacity, R + P] and
// scales [B, 1, capacity, groups].
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
  at::parallel_for(0, batch * n, PART_TOKENS, [&](int64_t first, int64_t last) {
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

// Codes [B, 1, capacity, g * W / 2] and scales [B, 1, capacity, 2 W], `groups` of them in use, and tokens that are kept
// as they are [B, 1, n, W].
at::Tensor attention_int4(
    const at::Tensor& query, const at::Tensor& kept, int64_t first, const at::Tensor& codes, const at::Tensor& scales,
    int64_t groups, const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  const int64_t batch = check_query(query, kept, rank), width = query.size(3), of_token = (width + 1) / 2;
  check_rows(kept, batch, kept.size(-2), "kept entries");
  check_rows(codes, batch, groups, "codes");
  check_rows(scales, batch, groups, "scales");
  TORCH_CHECK(
      codes.size(3) % of_token == 0 && scales.size(3) == 2 * width && 0 <= first &&
          (first <= kept.size(2) || groups == 0),
      "egmla: codes must be [B, 1, groups, g * W / 2] and scales [B, 1, groups, 2 W]");
  const int64_t size = codes.size(3) / of_token;
  return by_format(kept.scalar_type(), [&](auto zero) {
    const TokenGroups<decltype(zero)> source{
        dense<decltype(zero)>(kept), codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<c10::BFloat16>(),
        codes.stride(0), scales.stride(0), width, first, groups * size, size};
    return compute(source, query, mask, kept.size(2) + groups * size, scaling, rank);
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
      "write_int8(Tensor latent, Tensor rope_key, Tensor(a!) codes, Tensor(b!) scales, SymInt start) -> ()");
}

TORCH_LIBRARY_IMPL(egmla, CPU, library) {
  library.impl("latent_attention", &attention);
  library.impl("latent_attention_int8", &attention_int8);
  library.impl("latent_attention_int4", &attention_int4);
  library.impl("write_int8", &write_int8);
}
