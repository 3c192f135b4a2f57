// Copyright 2026 The egmla authors. Licensed under the Apache License, Version 2.0.
//
// Decode attention of all heads over one shared latent, on a CPU: each cache entry is read once for all heads, in the
// format it is cached in, and its first R elements serve as the value. And int8 quantisation of new entries, which
// would be twenty small operations in each layer. Compiled and loaded by cpu_kernel.py.
//
// A vector has a head per lane, so that an element of the cache is one broadcast for all heads of a vector. Tokens are
// taken in blocks that stay in the first cache: scores, running softmax, weighted sum. Threads share out sequences and
// parts of them; parts are merged by their sums of exponentials.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
// Tokens, or elements of the value, whose sums are held in registers at a time.
constexpr int64_t TILE = 8;
// Elements of a block of tokens, at most: 16 KB, so that blocks and queries share the first two caches.
constexpr int64_t BLOCK_ELEMENTS = 4096;
constexpr int64_t CACHE_LINE = 64;  // bytes
// Fewer tokens than this are not worth a part of their own.
constexpr int64_t PART_TOKENS = 256;
// Score of a hidden token; not infinite, so that differences are numbers.
constexpr float HIDDEN = -1e30f;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// exp(x) for x <= 0, to 2e-7 of its value near 0 and 4e-6 at -87: 2^n times a polynomial for the rest.
inline Vector exponential(Vector x) {
  const Vector lowest = Vector{} - 87.0f;
  const Vector magic = Vector{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vector scaled = (x < lowest ? lowest : x) * 1.44269504f;
  const Vector rounded = scaled + magic;
  const Vector rest = scaled - (rounded - magic);
  Vector result = Vector{} + 1.535336188319500e-4f;
  result = result * rest + 1.339887440266574e-3f;
  result = result * rest + 9.618437357674640e-3f;
  result = result * rest + 5.550332471162809e-2f;
  result = result * rest + 2.402264791363012e-1f;
  result = result * rest + 6.931472028550421e-1f;
  result = result * rest + 1.0f;
  return (Vector)(((Integers)rounded << 23) + (Integers)result);
}

// Numbers that start at a cache line: a vector that lies in two lines takes two reads.
class Floats {
 public:
  explicit Floats(int64_t count, float value = 0) : memory_(count + CACHE_LINE / sizeof(float), value) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (CACHE_LINE - address % CACHE_LINE) % CACHE_LINE / sizeof(float);
  }
  Floats(const Floats&) = delete;
  float* data() { return start_; }

 private:
  std::vector<float> memory_;
  float* start_;
};

// Where entries come from. `read` gives `count` tokens from `start` on as fp32 rows, in `space` or where they lie;
// `ahead` is where the bytes of a token are, for prefetching, if tokens lie one behind the other.

template <typename T>
struct Dense {
  const T* entries;
  int64_t sequence_stride, width;
  static constexpr int64_t bits = 8 * sizeof(T);

  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float*) const {
    const T* from = entries + sequence * sequence_stride + start * width;
    if constexpr (std::is_same_v<T, float>) {
      return from;
    } else {
      float* __restrict to = space;
      for (int64_t i = 0; i < count * width; i++) to[i] = static_cast<float>(from[i]);
      return space;
    }
  }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(entries) + (sequence * sequence_stride + token * width) * sizeof(T);
  }
};

// int8 codes, each group of neighbouring elements of a token with a scale.
struct ElementGroups {
  const int8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, groups;
  static constexpr int64_t bits = 8;

  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float*) const {
    const int8_t* code = codes + sequence * codes_stride + start * width;
    const c10::BFloat16* scale = scales + sequence * scales_stride + start * groups;
    const int64_t size = width / groups;
    for (int64_t group = 0; group < count * groups; group++) {
      const float factor = static_cast<float>(scale[group]);
      float* __restrict to = space + group * size;
      for (int64_t i = 0; i < size; i++) to[i] = factor * code[group * size + i];
    }
    return space;
  }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + token * width;
  }
};

// int4 codes, each group of neighbouring tokens of an element with a scale and a zero point, between tokens that are
// kept as they are: the first few, and those behind the last whole group.
template <typename T>
struct TokenGroups {
  Dense<T> kept;
  const uint8_t* codes;
  const c10::BFloat16* scales;
  int64_t codes_stride, scales_stride, width, first, grouped, size;
  static constexpr int64_t bits = 4;

  // `space` has room for the block, `scratch` for two rows.
  const float* read(int64_t sequence, int64_t start, int64_t count, float* space, float* scratch) const {
    const int64_t half = (width + 1) / 2;
    int64_t held = -1;  // the group whose scales are in `scratch`
    for (int64_t token = start; token < start + count; token++) {
      float* row = space + (token - start) * width;
      const int64_t place = token - first;
      if (place < 0 || place >= grouped) {
        const float* found = kept.read(sequence, place < 0 ? token : token - grouped, 1, row, nullptr);
        if (found != row) std::copy(found, found + width, row);
        continue;
      }
      const int64_t group = place / size;
      if (group != held) {
        const c10::BFloat16* from = scales + sequence * scales_stride + group * 2 * width;
        for (int64_t i = 0; i < 2 * width; i++) scratch[i] = static_cast<float>(from[i]);
        held = group;
      }
      const uint8_t* code = codes + sequence * codes_stride + place * half;
      const float *scale = scratch, *zero = scratch + width;
      float* __restrict to = row;
      for (int64_t i = 0; i < half; i++) to[i] = static_cast<float>(code[i] & 15) * scale[i] + zero[i];
      for (int64_t i = half; i < width; i++) to[i] = static_cast<float>(code[i - half] >> 4) * scale[i] + zero[i];
    }
    return space;
  }
  uintptr_t ahead(int64_t sequence, int64_t token) const {
    const int64_t place = std::clamp<int64_t>(token - first, 0, grouped);
    return reinterpret_cast<uintptr_t>(codes) + sequence * codes_stride + place * ((width + 1) / 2);
  }
};

// Seen by the last token or not, per sequence and token; a null pointer: all are.
struct Mask {
  const bool* seen = nullptr;
  int64_t sequence_stride = 0, token_stride = 0;
};

// What a part of a sequence comes to: per head the highest score, the sum of exponentials relative to it and the sum
// of values weighted with them, a head per lane.
struct Sums {
  float *top, *total, *values;
};

template <typename Source>
void attend(
    const Source& source, const Mask& mask, const float* queries, int64_t sequence, int64_t begin, int64_t end,
    int64_t vectors, int64_t width, int64_t rank, int64_t block, const Sums& sums) {
  Floats space(block * LANES + block * width + 2 * width);
  float *scores = space.data(), *rows = scores + block * LANES, *scratch = rows + block * width;
  // Each tile calls for the bytes of the one a block later, a line every few elements: the processor's own prefetching
  // stops at each page, and many calls at once wait for one another.
  constexpr int64_t elements_per_line = CACHE_LINE * 8 / Source::bits / TILE;

  for (int64_t start = begin; start < end; start += block) {
    const int64_t count = std::min(block, end - start);
    const bool* seen = mask.seen ? mask.seen + sequence * mask.sequence_stride + start * mask.token_stride : nullptr;
    if (seen) {
      bool any = false;
      for (int64_t token = 0; token < count; token++) any |= seen[token * mask.token_stride];
      if (!any) continue;
    }
    const float* entries = source.read(sequence, start, count, rows, scratch);
    for (int64_t vector = 0; vector < vectors; vector++) {
      const float* query = queries + vector * width * LANES;
      int64_t token = 0;
      for (; token + TILE <= count; token += TILE) {
        const float* tile = entries + token * width;
        uintptr_t ahead = source.ahead(sequence, start + token + block);
        Vector sum[TILE] = {};
        int64_t element = 0;
        for (; element + 16 <= width; element += 16) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < 16; i++) {
            if (vector == 0 && i % elements_per_line == 0) {
              __builtin_prefetch(reinterpret_cast<const void*>(ahead));
              ahead += CACHE_LINE;
            }
            const Vector heads = load(query + (element + i) * LANES);
#pragma GCC unroll 8
            for (int64_t j = 0; j < TILE; j++) sum[j] += heads * tile[j * width + element + i];
          }
        }
        for (; element < width; element++) {
          const Vector heads = load(query + element * LANES);
          for (int64_t j = 0; j < TILE; j++) sum[j] += heads * tile[j * width + element];
        }
        for (int64_t j = 0; j < TILE; j++) store(scores + (token + j) * LANES, sum[j]);
      }
      for (; token < count; token++) {
        Vector sum = {};
        for (int64_t i = 0; i < width; i++) sum += load(query + i * LANES) * entries[token * width + i];
        store(scores + token * LANES, sum);
      }

      Vector top = load(sums.top + vector * LANES);
      const Vector before = top;
      for (token = 0; token < count; token++) {
        if (seen && !seen[token * mask.token_stride]) store(scores + token * LANES, Vector{} + HIDDEN);
        const Vector score = load(scores + token * LANES);
        top = score > top ? score : top;
      }
      const Vector shrink = exponential(before - top);
      Vector total = load(sums.total + vector * LANES) * shrink;
      for (token = 0; token < count; token++) {
        const Vector weight = exponential(load(scores + token * LANES) - top);
        store(scores + token * LANES, weight);
        total += weight;
      }
      store(sums.top + vector * LANES, top);
      store(sums.total + vector * LANES, total);

      float* values = sums.values + vector * rank * LANES;
      int64_t element = 0;
      for (; element + TILE <= rank; element += TILE) {
        Vector sum[TILE];
#pragma GCC unroll 8
        for (int64_t j = 0; j < TILE; j++) sum[j] = load(values + (element + j) * LANES) * shrink;
        for (token = 0; token < count; token++) {
          const Vector weight = load(scores + token * LANES);
#pragma GCC unroll 8
          for (int64_t j = 0; j < TILE; j++) sum[j] += weight * entries[token * width + element + j];
        }
#pragma GCC unroll 8
        for (int64_t j = 0; j < TILE; j++) store(values + (element + j) * LANES, sum[j]);
      }
      for (; element < rank; element++) {
        Vector sum = load(values + element * LANES) * shrink;
        for (token = 0; token < count; token++) {
          sum += load(scores + token * LANES) * entries[token * width + element];
        }
        store(values + element * LANES, sum);
      }
    }
  }
}

// Queries [B, rows, W], output [B, rows, R], both contiguous fp32; `tokens` of each sequence.
template <typename Source>
void run(
    const Source& source, const Mask& mask, const float* query, float* output, int64_t batch, int64_t rows,
    int64_t tokens, int64_t width, int64_t rank, float scaling) {
#ifdef _OPENMP
  const int64_t threads = at::get_num_threads();
#else
  const int64_t threads = 1;  // what `parallel_for` comes to
#endif
  // So many that all threads get as many, unless that is too many to merge or too few tokens.
  const int64_t even = threads / std::gcd(batch, threads), few = 4 * threads / std::max<int64_t>(1, batch) + 1;
  const int64_t parts = std::clamp<int64_t>(tokens / PART_TOKENS, 1, std::min(even, few));
  const int64_t block = std::max(TILE, BLOCK_ELEMENTS / width / TILE * TILE);
  const int64_t part_tokens = ((tokens + parts - 1) / parts + block - 1) / block * block;
  const int64_t vectors = (rows + LANES - 1) / LANES, lanes = vectors * LANES;
  Floats all_values(batch * parts * lanes * rank), totals(batch * parts * lanes), tops(batch * parts * lanes, HIDDEN);
  float *values = all_values.data(), *total = totals.data(), *top = tops.data();

  at::parallel_for(0, batch * parts, 1, [&](int64_t first, int64_t last) {
    Floats memory(lanes * width);
    float* turned = memory.data();  // [vectors, W, LANES]
    for (int64_t task = first; task < last; task++) {
      const int64_t sequence = task / parts, part = task % parts;
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < width; i++) {
          turned[(row / LANES * width + i) * LANES + row % LANES] =
              query[(sequence * rows + row) * width + i] * scaling;
        }
      }
      const Sums sums{top + task * lanes, total + task * lanes, values + task * lanes * rank};
      attend(
          source, mask, turned, sequence, part * part_tokens, std::min(tokens, (part + 1) * part_tokens),
          vectors, width, rank, block, sums);
    }
  });

  at::parallel_for(0, batch * rows, std::max<int64_t>(1, 16384 / (rank * parts)), [&](int64_t first, int64_t last) {
    for (int64_t place_of_row = first; place_of_row < last; place_of_row++) {
      const int64_t sequence = place_of_row / rows, row = place_of_row % rows;
      float* to = output + (sequence * rows + row) * rank;
      std::fill(to, to + rank, 0.0f);
      float highest = HIDDEN, whole = 0;
      const int64_t place = sequence * parts * lanes + row;
      for (int64_t part = 0; part < parts; part++) highest = std::max(highest, top[place + part * lanes]);
      for (int64_t part = 0; part < parts; part++) {
        const float share = std::exp(top[place + part * lanes] - highest);
        whole += share * total[place + part * lanes];
        const float* from = values + ((sequence * parts + part) * lanes + row / LANES * LANES) * rank + row % LANES;
        for (int64_t i = 0; i < rank; i++) to[i] += share * from[i * LANES];
      }
      // Nothing is seen: 0, as a mean of nothing.
      for (int64_t i = 0; i < rank && whole > 0; i++) to[i] /= whole;
    }
  });
}

Mask read_mask(const std::optional<at::Tensor>& mask, int64_t batch, int64_t tokens) {
  if (!mask) return {};
  TORCH_CHECK(
      mask->dim() == 2 && mask->scalar_type() == at::kBool && (mask->size(0) == batch || mask->size(0) == 1) &&
          mask->size(1) == tokens,
      "egmla: the mask must be boolean [B or 1, S]");
  return {mask->const_data_ptr<bool>(), mask->size(0) == 1 ? 0 : mask->stride(0), mask->stride(1)};
}

// Checks that [B, S, ...] has tokens one behind the other.
void check_rows(const at::Tensor& tensor, int64_t batch, const char* name, int64_t dimensions = 3) {
  bool packed = tensor.dim() == dimensions && tensor.size(0) == batch;
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; packed && i > 0; i--) {
    packed = tensor.size(i) < 2 || tensor.stride(i) == expected;
    expected *= tensor.size(i);
  }
  TORCH_CHECK(packed, "egmla: ", name, " must be [B, S, ...] with tokens one behind the other");
}

template <typename Source>
at::Tensor compute(
    const Source& source, const at::Tensor& query, const std::optional<at::Tensor>& mask, int64_t tokens,
    double scaling, int64_t rank) {
  const int64_t batch = query.size(0), rows = query.size(1), width = query.size(2);
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  at::Tensor output = at::empty({batch, rows, rank}, queries.options());
  run(source, read_mask(mask, batch, tokens), queries.const_data_ptr<float>(), output.mutable_data_ptr<float>(), batch,
      rows, tokens, width, rank, static_cast<float>(scaling));
  return output.to(query.scalar_type());
}

template <typename Make>
at::Tensor by_format(at::ScalarType format, const Make& make) {
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
  return {entries.const_data_ptr<T>(), entries.stride(0), entries.size(2)};
}

void check_query(const at::Tensor& query, int64_t width, int64_t rank) {
  TORCH_CHECK(
      query.dim() == 3 && query.size(2) == width && rank > 0 && rank <= width,
      "egmla: queries must be [B, rows, W] as wide as entries, and the latent no wider");
}

at::Tensor attention(
    const at::Tensor& query, const at::Tensor& entries, const std::optional<at::Tensor>& mask, double scaling,
    int64_t rank) {
  check_rows(entries, query.size(0), "entries");
  check_query(query, entries.size(2), rank);
  return by_format(entries.scalar_type(), [&](auto zero) {
    return compute(dense<decltype(zero)>(entries), query, mask, entries.size(1), scaling, rank);
  });
}

void check_rotation(const at::Tensor& rotation, int64_t width) {
  TORCH_CHECK(
      rotation.dim() == 2 && rotation.size(0) == width && rotation.size(1) == width &&
          rotation.scalar_type() == at::kFloat,
      "egmla: the rotation must be an fp32 matrix as wide as entries");
}

// Entries are rotated ones; the rotation is symmetric, orthogonal and mixes no latent with rotary elements.
at::Tensor attention_int8(
    const at::Tensor& query, const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& rotation,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  check_rows(codes, query.size(0), "codes");
  check_rows(scales, query.size(0), "scales");
  check_query(query, codes.size(2), rank);
  TORCH_CHECK(
      scales.size(1) == codes.size(1) && scales.size(2) > 0 && codes.size(2) % scales.size(2) == 0,
      "egmla: scales must be [B, S, groups] for codes [B, S, W]");
  const int64_t width = codes.size(2);
  check_rotation(rotation, width);
  const ElementGroups source{
      codes.const_data_ptr<int8_t>(), scales.const_data_ptr<c10::BFloat16>(), codes.stride(0), scales.stride(0),
      width, scales.size(2)};
  const at::Tensor turned = at::matmul(query.to(at::kFloat), rotation);
  const at::Tensor found = compute(source, turned, mask, codes.size(1), scaling, rank);
  return at::matmul(found, rotation.narrow(0, 0, rank).narrow(1, 0, rank)).to(query.scalar_type());
}

// What quantization_egmla.quantize_elements gives for entries [n, W] that are rotated first: codes [n, W] and scales
// [n, groups], an element being scale x code.
std::tuple<at::Tensor, at::Tensor> quantize_int8(
    const at::Tensor& entries, const at::Tensor& rotation, int64_t groups) {
  TORCH_CHECK(
      entries.dim() == 2 && groups > 0 && entries.size(1) % groups == 0,
      "egmla: entries must be [n, W], and groups divide W");
  const int64_t n = entries.size(0), width = entries.size(1), size = width / groups;
  check_rotation(rotation, width);
  const at::Tensor rotated = at::matmul(entries.to(at::kFloat), rotation).contiguous();
  at::Tensor codes = at::empty({n, width}, rotated.options().dtype(at::kChar));
  at::Tensor scales = at::empty({n, groups}, rotated.options().dtype(at::kBFloat16));
  const float* from = rotated.const_data_ptr<float>();
  int8_t* code = codes.mutable_data_ptr<int8_t>();
  c10::BFloat16* scale = scales.mutable_data_ptr<c10::BFloat16>();
  at::parallel_for(0, n * groups, PART_TOKENS, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; group++) {
      const float* element = from + group * size;
      float extreme = element[0];
      for (int64_t i = 1; i < size; i++) extreme = std::abs(element[i]) > std::abs(extreme) ? element[i] : extreme;
      scale[group] = extreme / -128;
      const float rounded = static_cast<float>(scale[group]), divisor = rounded == 0 ? 1.0f : rounded;
      for (int64_t i = 0; i < size; i++) {
        // From numbers only: of infinite entries scales are not finite, so that the result is none either.
        const float quotient = element[i] / divisor, number = quotient == quotient ? quotient : 0.0f;
        code[group * size + i] = static_cast<int8_t>(std::clamp(std::nearbyint(number), -128.0f, 127.0f));
      }
    }
  });
  return {codes, scales};
}

at::Tensor attention_int4(
    const at::Tensor& query, const at::Tensor& kept, int64_t first, const at::Tensor& codes, const at::Tensor& scales,
    const std::optional<at::Tensor>& mask, double scaling, int64_t rank) {
  check_rows(kept, query.size(0), "kept entries");
  check_rows(codes, query.size(0), "codes", 4);
  check_rows(scales, query.size(0), "scales", 4);
  const int64_t width = kept.size(2);
  check_query(query, width, rank);
  TORCH_CHECK(
      codes.size(3) == (width + 1) / 2 && scales.size(1) == codes.size(1) &&
          scales.size(2) == 2 && scales.size(3) == width && 0 <= first &&
          (first <= kept.size(1) || codes.size(1) == 0),
      "egmla: codes must be [B, groups, g, W / 2] and scales [B, groups, 2, W]");
  const int64_t grouped = codes.size(1) * codes.size(2);
  return by_format(kept.scalar_type(), [&](auto zero) {
    const TokenGroups<decltype(zero)> source{
        dense<decltype(zero)>(kept), codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<c10::BFloat16>(),
        codes.stride(0), scales.stride(0), width, first, grouped, codes.size(2)};
    return compute(source, query, mask, kept.size(1) + grouped, scaling, rank);
  });
}

}  // namespace

TORCH_LIBRARY(egmla, library) {
  library.def("latent_attention(Tensor query, Tensor entries, Tensor? mask, float scaling, int rank) -> Tensor");
  library.def(
      "latent_attention_int8(Tensor query, Tensor codes, Tensor scales, Tensor rotation, Tensor? mask, float scaling, "
      "int rank) -> Tensor");
  library.def(
      "latent_attention_int4(Tensor query, Tensor kept, int first, Tensor codes, Tensor scales, Tensor? mask, float "
      "scaling, int rank) -> Tensor");
  library.def("quantize_int8(Tensor entries, Tensor rotation, int groups) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(egmla, CPU, library) {
  library.impl("latent_attention", &attention);
  library.impl("latent_attention_int8", &attention_int8);
  library.impl("latent_attention_int4", &attention_int4);
  library.impl("quantize_int8", &quantize_int8);
}
