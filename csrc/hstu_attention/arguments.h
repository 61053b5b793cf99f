// Checks on the tensors that arrive through torch.ops.recsys_ops.hstu_attention_*, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../common/checks.h"
#include "attention.h"

namespace recsys_ops::hstu_attention {

inline constexpr const char* op = "hstu_attention";

using OptionalTensor = std::optional<Tensor>;

inline Tensor3 tensor3_of(const char* argument, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.dim() == 3, op, ": expected ", argument, " of three dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", argument, " of the dtype of q");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline Integers optional_integers(const char* argument, const OptionalTensor& tensor) {
  return tensor ? integers_of(op, argument, *tensor) : Integers{nullptr, false, 0};
}

// Integers of a contiguous tensor of several dimensions, the first as given.
inline Integers integers_of_rows(const char* argument, const OptionalTensor& tensor, int64_t dims, int64_t rows) {
  if (!tensor) {
    return {nullptr, false, 0};
  }
  const bool wide = tensor->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      wide || tensor->scalar_type() == ScalarType::Int, op, ": expected ", argument, " of dtype int64 or int32");
  STD_TORCH_CHECK(
      tensor->dim() == dims && tensor->size(0) == rows && tensor->is_contiguous(), op, ": expected ", argument,
      " contiguous, of ", dims, " dimensions and ", rows, " rows");
  return {tensor->const_data_ptr(), wide, tensor->numel()};
}

inline Weights weights_of(const char* argument, const OptionalTensor& tensor, const Tensor& q) {
  if (!tensor) {
    return {nullptr, 0, 0};
  }
  check_like(op, argument, *tensor, {tensor->size(0), tensor->size(-1)}, sum_type(q.scalar_type()));
  STD_TORCH_CHECK(
      tensor->size(0) == 1 || tensor->size(0) == q.size(1), op, ": expected ", argument, " of one head or of all");
  return {tensor->const_data_ptr(), tensor->size(0), tensor->size(1)};
}

inline Attention attention_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& query_offsets, const Tensor& offsets,
    const OptionalTensor& row_scale, const OptionalTensor& num_contextual, const OptionalTensor& num_targets,
    const OptionalTensor& intervals, const OptionalTensor& position_weight, const OptionalTensor& time_weight,
    const OptionalTensor& timestamps, const OptionalTensor& boundaries, const OptionalTensor& dropout_seed,
    double scale, double alpha, bool causal, int64_t window, int64_t target_group_size, int64_t full_window_tail,
    bool next_timestamps, double dropout) {
  const ScalarType dtype = q.scalar_type();
  Attention attention = {};
  attention.dtype = dtype_of(op, "q", q);
  attention.q = tensor3_of("q", q, dtype);
  attention.k = tensor3_of("k", k, dtype);
  attention.v = tensor3_of("v", v, dtype);
  attention.heads = q.size(1);
  attention.dim = q.size(2);
  attention.value_dim = v.size(2);
  STD_TORCH_CHECK(
      k.size(1) == attention.heads && k.size(2) == attention.dim && v.size(0) == k.size(0) &&
          v.size(1) == attention.heads,
      op, ": expected q [M, H, D], k [L, H, D] and v [L, H, V]");

  attention.offsets = integers_of(op, "offsets", offsets);
  attention.query_offsets = optional_integers("query_offsets", query_offsets);
  attention.num_sequences = attention.offsets.size - 1;
  attention.num_contextual = optional_integers("num_contextual", num_contextual);
  attention.num_targets = optional_integers("num_targets", num_targets);
  const int64_t num_sequences = attention.num_sequences;
  STD_TORCH_CHECK(
      num_sequences >= 0 && (!query_offsets || attention.query_offsets.size == num_sequences + 1) &&
          (!num_contextual || attention.num_contextual.size == num_sequences) &&
          (!num_targets || attention.num_targets.size == num_sequences),
      op, ": expected offsets and query_offsets [B + 1], num_contextual and num_targets [B]");

  attention.causal = causal;
  attention.window = window;
  attention.target_group_size = target_group_size;
  attention.full_window_tail = full_window_tail;
  attention.intervals = integers_of_rows("intervals", intervals, 3, q.size(0));
  attention.num_intervals = intervals ? intervals->size(1) : 0;
  STD_TORCH_CHECK(
      window >= 0 && target_group_size >= 1 && full_window_tail >= 0, op,
      ": expected a window and a tail of at least 0, and groups of at least 1 target");

  attention.position = weights_of("position_weight", position_weight, q);
  attention.time = weights_of("time_weight", time_weight, q);
  attention.next_timestamps = next_timestamps;
  if (time_weight) {
    STD_TORCH_CHECK(timestamps && boundaries, op, ": expected timestamps and boundaries with time_weight");
    attention.timestamps = static_cast<const int64_t*>(
        optional_data(op, "timestamps", timestamps, {timestamps->size(0)}, ScalarType::Long));
    attention.boundaries = static_cast<const int64_t*>(
        optional_data(op, "boundaries", boundaries, {attention.time.size - 1}, ScalarType::Long));
  }

  attention.scale = scale;
  attention.alpha = alpha;
  attention.row_scale = optional_data(op, "row_scale", row_scale, {q.size(0)}, sum_type(dtype));
  attention.dropout = dropout;
  attention.dropout_seed =
      static_cast<const int64_t*>(optional_data(op, "dropout_seed", dropout_seed, {1}, ScalarType::Long));
  return attention;
}

// Rows of a cache of keys or values, and what they are multiplied by.
inline Cache cache_of(
    const char* argument, const Tensor& cache, const OptionalTensor& scales, bool is_paged, const Tensor& q) {
  STD_TORCH_CHECK(
      cache.dim() == (is_paged ? 4 : 3), op, ": expected ", argument, " of ", is_paged ? 4 : 3, " dimensions");
  const ScalarType dtype = cache.scalar_type();
  STD_TORCH_CHECK(
      dtype == q.scalar_type() || dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn, op, ": expected ",
      argument, " of the dtype of q, int8 or float8_e4m3fn");
  Cache found = {};
  found.type = dtype == ScalarType::Char            ? CacheType::int8
               : dtype == ScalarType::Float8_e4m3fn ? CacheType::float8
                                                    : CacheType::same;
  const int64_t last = cache.dim() - 1;
  found.rows = {cache.const_data_ptr(), cache.stride(last - 2), cache.stride(last - 1), cache.stride(last)};
  found.page = is_paged ? cache.stride(0) : 0;
  if (scales) {
    STD_TORCH_CHECK(
        scales->is_contiguous() && scales->scalar_type() == sum_type(q.scalar_type()) &&
            scales->numel() * cache.size(last) == cache.numel(),
        op, ": expected scales of ", argument, " contiguous, one for each of its rows and heads");
    found.scales = scales->const_data_ptr();
  }
  return found;
}

inline void add_cache(
    Attention& attention, const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
    const OptionalTensor& key_scales, const OptionalTensor& value_scales, const OptionalTensor& cache_starts,
    const OptionalTensor& page_table) {
  const bool is_paged = page_table.has_value();
  STD_TORCH_CHECK(is_paged != cache_starts.has_value(), op, ": expected one of cache_starts and page_table");
  attention.cached = true;
  attention.paged = is_paged;
  attention.key_cache = cache_of("key_cache", key_cache, key_scales, is_paged, q);
  attention.value_cache = cache_of("value_cache", value_cache, value_scales, is_paged, q);
  attention.cache_starts = optional_integers("cache_starts", cache_starts);
  attention.page_table = integers_of_rows("page_table", page_table, 2, attention.num_sequences);
  STD_TORCH_CHECK(
      is_paged || attention.cache_starts.size == attention.num_sequences, op, ": expected cache_starts [B]");
  attention.page_size = is_paged ? key_cache.size(1) : 1;
  attention.pages_per_sequence = is_paged ? page_table->size(1) : 0;
  attention.cache_rows = key_cache.size(0) * attention.page_size;
  for (int64_t d = 0; d + 1 < key_cache.dim(); ++d) {
    STD_TORCH_CHECK(
        key_cache.size(d) == value_cache.size(d), op, ": expected key_cache and value_cache of as many rows");
  }
}

}  // namespace recsys_ops::hstu_attention
