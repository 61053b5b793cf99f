// Checks and allocation for torch.ops.recsys_ops.hstu_attention_* on NVIDIA GPUs.
#include "hstu_attention_cuda.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../common/cuda/tensors.h"

namespace recsys_ops::hstu_attention::cuda {
namespace {

using recsys_ops::cuda::Memory;
using recsys_ops::cuda::OnDevice;

constexpr const char* op = "hstu_attention";
constexpr int64_t largest_dim = 256;

// A matrix of rows of heads, of which the last three dimensions are rows, heads and columns.
Matrix matrix_of(const char* argument, const Tensor& tensor, int64_t rows, int64_t heads, int64_t columns) {
  const int64_t d = tensor.dim();
  STD_TORCH_CHECK(
      d >= 3 && tensor.size(d - 3) == rows && tensor.size(d - 2) == heads && tensor.size(d - 1) == columns, op,
      ": expected ", argument, " of the shape that the other arguments imply");
  STD_TORCH_CHECK(
      1 <= columns && columns <= largest_dim, op, ": expected ", argument, " of 1 to ", largest_dim, " columns, got ",
      columns);
  const int64_t bytes = tensor.element_size();
  bool wide = (tensor.stride(d - 1) == 1 || columns == 1) && columns * bytes % 16 == 0 &&
              reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < d - 1; ++i) {
    wide = wide && tensor.stride(i) * bytes % 16 == 0;
  }
  return {
      const_cast<void*>(tensor.const_data_ptr()), tensor.stride(d - 3), tensor.stride(d - 2), tensor.stride(d - 1),
      static_cast<int>(columns), wide};
}

// Integers of any shape, contiguous; null where there are none.
Integers optional_integers(const char* argument, const std::optional<Tensor>& tensor, int64_t size) {
  if (!tensor) {
    return {nullptr, false, 0};
  }
  const bool wide = tensor->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      wide || tensor->scalar_type() == ScalarType::Int, op, ": expected ", argument, " of dtype int64 or int32");
  STD_TORCH_CHECK(
      tensor->numel() == size && tensor->is_contiguous(), op, ": expected ", argument,
      " contiguous and of the shape that the other arguments imply");
  // No elements may mean no memory, which is not the same as not being there.
  static const int64_t nothing = 0;
  const void* data = tensor->const_data_ptr();
  return {data ? data : &nothing, wide, size};
}

// Weights of buckets, [1 or H, size].
struct Table {
  const void* data = nullptr;
  int64_t stride = 0;
  int size = 0;
};

Table table_of(const char* argument, const std::optional<Tensor>& tensor, int64_t heads, ScalarType dtype) {
  if (!tensor) {
    return {};
  }
  STD_TORCH_CHECK(
      tensor->dim() == 2 && (tensor->size(0) == 1 || tensor->size(0) == heads) && tensor->size(1) > 0 &&
          tensor->size(1) <= largest_length,
      op, ": expected ", argument, " of shape [1 or H, buckets]");
  check_like(op, argument, *tensor, {tensor->size(0), tensor->size(1)}, dtype);
  const int64_t size = tensor->size(1);
  return {tensor->const_data_ptr(), tensor->size(0) == 1 ? 0 : size, static_cast<int>(size)};
}

// What all kernels take, the optional tensors as the schemas name them.
struct Arguments {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>& query_offsets;
  const Tensor& offsets;
  const std::optional<Tensor>&row_scale, &num_contextual, &num_targets, &intervals, &position_weight, &time_weight,
      &timestamps, &boundaries;
  std::optional<Tensor> dropout_seed;
  double scale, alpha;
  bool causal;
  int64_t window, target_group_size, full_window_tail;
  bool next_timestamps;
  double dropout;
};

int bounded(int64_t number) { return static_cast<int>(std::min(number, largest_length)); }

Problem problem_of(const Arguments& a, bool cached) {
  STD_TORCH_CHECK(a.q.dim() == 3 && a.v.dim() == 3, op, ": expected q and v of three dimensions");
  STD_TORCH_CHECK(
      a.k.scalar_type() == a.q.scalar_type() && a.v.scalar_type() == a.q.scalar_type(), op,
      ": expected k and v of the dtype of q");
  const int64_t rows = a.q.size(0), heads = a.q.size(1), keys = a.k.size(0);
  const ScalarType sums = sum_type(a.q.scalar_type());
  Problem problem = {};
  problem.dtype = dtype_of(op, "q", a.q);
  problem.q = matrix_of("q", a.q, rows, heads, a.q.size(2));
  problem.k = matrix_of("k", a.k, keys, heads, a.q.size(2));
  problem.v = matrix_of("v", a.v, keys, heads, a.v.size(2));
  const Integers offsets = integers_of(op, "offsets", a.offsets);
  STD_TORCH_CHECK(offsets.size > 0, op, ": expected offsets of shape [B + 1], got [0]");
  const int64_t sequences = offsets.size - 1;
  const Integers of_rows = optional_integers("query_offsets", a.query_offsets, offsets.size);
  STD_TORCH_CHECK(of_rows.data || rows == keys, op, ": expected as many rows of q as of k without query_offsets");
  int64_t all_keys = keys;
  if (cached) {
    all_keys = a.timestamps ? a.timestamps->numel() : std::numeric_limits<int64_t>::max();
  }
  problem.batch = {
      of_rows.data ? of_rows : offsets,
      offsets,
      optional_integers("num_contextual", a.num_contextual, sequences),
      optional_integers("num_targets", a.num_targets, sequences),
      sequences,
      rows,
      all_keys,
      heads};
  STD_TORCH_CHECK(
      a.window >= 0 && a.target_group_size >= 1 && a.full_window_tail >= 0, op,
      ": expected window and full_window_tail of at least 0, target_group_size of at least 1");
  problem.mask = {
      a.causal, bounded(a.window), bounded(a.target_group_size), bounded(a.full_window_tail), {nullptr, false, 0}, 0};
  if (a.intervals) {
    STD_TORCH_CHECK(a.intervals->dim() == 3, op, ": expected intervals of shape [M, R, 2]");
    problem.mask.num_intervals = a.intervals->size(1);
    problem.mask.intervals = optional_integers("intervals", a.intervals, rows * a.intervals->size(1) * 2);
  }
  const Table positions = table_of("position_weight", a.position_weight, heads, sums);
  const Table times = table_of("time_weight", a.time_weight, heads, sums);
  problem.bias = {positions.data, positions.stride, positions.size, times.data, times.stride, times.size,
                  nullptr,        nullptr,          nullptr,        a.next_timestamps};
  if (times.data) {
    STD_TORCH_CHECK(a.timestamps && a.boundaries, op, ": expected timestamps and boundaries with time_weight");
    const int64_t tokens = cached ? a.timestamps->numel() : keys;
    problem.bias.timestamps =
        static_cast<const int64_t*>(optional_data(op, "timestamps", a.timestamps, {tokens}, ScalarType::Long));
    problem.bias.boundaries =
        static_cast<const int64_t*>(optional_data(op, "boundaries", a.boundaries, {times.size - 1}, ScalarType::Long));
  }
  if (a.dropout_seed) {
    const double words = 4294967296.0;
    const double threshold = std::min(std::nearbyint(a.dropout * words), words - 1);
    problem.dropout = {
        static_cast<const int64_t*>(optional_data(op, "dropout_seed", a.dropout_seed, {1}, ScalarType::Long)),
        static_cast<uint32_t>(threshold), 1 / (1 - a.dropout)};
  } else {
    problem.dropout = {nullptr, 0, 1};
  }
  problem.row_scale = optional_data(op, "row_scale", a.row_scale, {rows}, sums);
  problem.scale = a.scale;
  problem.alpha = a.alpha;
  return problem;
}

// A problem, and the memory that its kernels look up cells of time in.
struct Prepared {
  Prepared(const Arguments& arguments, bool cached, cudaStream_t stream)
      : problem(problem_of(arguments, cached)),
        cells(arguments.q, problem.bias.time_weight ? (num_cells + 1) * sizeof(int) : 0) {
    if (problem.bias.time_weight) {
      find_cells(problem.bias.boundaries, problem.bias.num_buckets, cells.as<int>(), stream);
      problem.bias.cells = cells.as<int>();
    }
  }

  Problem problem;
  Memory cells;
};

Tensor hstu_attention_forward(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_offsets, Tensor offsets, std::optional<Tensor> row_scale,
    std::optional<Tensor> num_contextual, std::optional<Tensor> num_targets, std::optional<Tensor> intervals,
    std::optional<Tensor> position_weight, std::optional<Tensor> time_weight, std::optional<Tensor> timestamps,
    std::optional<Tensor> boundaries, std::optional<Tensor> dropout_seed, double scale, double alpha, bool causal,
    int64_t window, int64_t target_group_size, int64_t full_window_tail, bool next_timestamps, double dropout) {
  const OnDevice device(q);
  const Prepared prepared(
      {q, k, v, query_offsets, offsets, row_scale, num_contextual, num_targets, intervals, position_weight,
       time_weight, timestamps, boundaries, dropout_seed, scale, alpha, causal, window, target_group_size,
       full_window_tail, next_timestamps, dropout},
      false, device.stream);
  Tensor output = new_empty(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  forward(prepared.problem, output.mutable_data_ptr(), device.stream);
  return output;
}

std::tuple<Tensor, Tensor> hstu_attention_backward(
    Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_output, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> query_offsets, Tensor offsets, std::optional<Tensor> row_scale,
    std::optional<Tensor> num_contextual, std::optional<Tensor> num_targets, std::optional<Tensor> intervals,
    std::optional<Tensor> position_weight, std::optional<Tensor> time_weight, std::optional<Tensor> timestamps,
    std::optional<Tensor> boundaries, std::optional<Tensor> dropout_seed, double scale, double alpha, bool causal,
    int64_t window, int64_t target_group_size, int64_t full_window_tail, bool next_timestamps, double dropout) {
  const OnDevice device(q);
  const Prepared prepared(
      {q, k, v, query_offsets, offsets, row_scale, num_contextual, num_targets, intervals, position_weight,
       time_weight, timestamps, boundaries, dropout_seed, scale, alpha, causal, window, target_group_size,
       full_window_tail, next_timestamps, dropout},
      false, device.stream);
  const Problem& problem = prepared.problem;
  const int64_t rows = q.size(0), keys = k.size(0), heads = q.size(1);
  for (const Tensor* tensor : {&grad_q, &grad_k, &grad_v, &grad_output}) {
    STD_TORCH_CHECK(tensor->scalar_type() == q.scalar_type(), op, ": expected gradients of the dtype of q");
  }
  const Matrix of_output = matrix_of("grad_output", grad_output, rows, heads, v.size(2));
  backward_keys(
      problem, of_output, matrix_of("grad_k", grad_k, keys, heads, k.size(2)),
      matrix_of("grad_v", grad_v, keys, heads, v.size(2)), device.stream);
  const ScalarType sums = sum_type(q.scalar_type());
  const int64_t histograms = histogram_count(problem), bytes = sums == ScalarType::Double ? 8 : 4;
  const int64_t distances = problem.bias.num_distances, buckets = problem.bias.num_buckets;
  Memory positions(q, histograms * distances * bytes), times(q, histograms * buckets * bytes);
  backward_rows(
      problem, of_output, matrix_of("grad_q", grad_q, rows, heads, q.size(2)),
      distances > 0 ? positions.as<void>() : nullptr, buckets > 0 ? times.as<void>() : nullptr, device.stream);
  const auto sum = [&](const std::optional<Tensor>& weight, Memory& partial) {
    if (!weight) {
      return new_empty(q, {0, 0}, sums);
    }
    Tensor grad = new_empty(q, {weight->size(0), weight->size(1)}, sums);
    sum_histograms(
        problem, partial.as<void>(), weight->size(1), weight->size(0) > 1, grad.mutable_data_ptr(), device.stream);
    return grad;
  };
  Tensor grad_position = sum(position_weight, positions);
  Tensor grad_time = sum(time_weight, times);
  return {grad_position, grad_time};
}

Cache::Codes codes_of(const char* argument, const Tensor& cache, const Tensor& q) {
  if (cache.scalar_type() == ScalarType::Char) {
    return Cache::Codes::int8;
  }
  if (cache.scalar_type() == ScalarType::Float8_e4m3fn) {
    return Cache::Codes::float8;
  }
  STD_TORCH_CHECK(
      cache.scalar_type() == q.scalar_type(), op, ": expected ", argument, " of the dtype of q, int8 or float8_e4m3fn");
  return Cache::Codes::none;
}

Tensor hstu_attention_cached_forward(
    Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, std::optional<Tensor> key_scales,
    std::optional<Tensor> value_scales, std::optional<Tensor> cache_starts, std::optional<Tensor> page_table,
    Tensor query_offsets, Tensor offsets, std::optional<Tensor> row_scale, std::optional<Tensor> num_contextual,
    std::optional<Tensor> num_targets, std::optional<Tensor> intervals, std::optional<Tensor> position_weight,
    std::optional<Tensor> time_weight, std::optional<Tensor> timestamps, std::optional<Tensor> boundaries, double scale,
    double alpha, bool causal, int64_t window, int64_t target_group_size, int64_t full_window_tail,
    bool next_timestamps) {
  const OnDevice device(q);
  const std::optional<Tensor> of_rows = query_offsets;
  const Prepared prepared(
      {q, k, v, of_rows, offsets, row_scale, num_contextual, num_targets, intervals, position_weight, time_weight,
       timestamps, boundaries, std::nullopt, scale, alpha, causal, window, target_group_size, full_window_tail,
       next_timestamps, 0.0},
      true, device.stream);
  STD_TORCH_CHECK(k.size(0) == q.size(0), op, ": expected as many rows of k as of q beside a cache");
  const bool paged = page_table.has_value();
  const int64_t heads = q.size(1), sequences = offsets.numel() - 1;
  STD_TORCH_CHECK(
      key_cache.dim() == (paged ? 4 : 3) && value_cache.dim() == key_cache.dim() &&
          key_cache.size(0) == value_cache.size(0) && (paged || cache_starts),
      op, ": expected caches of [R, H, D] with cache_starts, or of [pages, page_size, H, D] with page_table");
  const int64_t rows = key_cache.size(paged ? 1 : 0);
  STD_TORCH_CHECK(
      !paged || (page_table->dim() == 2 && page_table->size(0) == sequences && rows > 0 && rows <= largest_length), op,
      ": expected page_table of shape [B, P], and pages of at least one row");
  const auto scales_of = [&](const char* argument, const std::optional<Tensor>& scales) {
    return paged ? optional_data(op, argument, scales, {key_cache.size(0), rows, heads}, sum_type(q.scalar_type()))
                 : optional_data(op, argument, scales, {rows, heads}, sum_type(q.scalar_type()));
  };
  const Cache cache = {
      matrix_of("key_cache", key_cache, rows, heads, k.size(2)),
      matrix_of("value_cache", value_cache, rows, heads, v.size(2)),
      paged ? key_cache.stride(0) : 0,
      paged ? value_cache.stride(0) : 0,
      codes_of("key_cache", key_cache, q),
      codes_of("value_cache", value_cache, q),
      scales_of("key_scales", key_scales),
      scales_of("value_scales", value_scales),
      optional_integers("cache_starts", cache_starts, sequences),
      optional_integers("page_table", page_table, paged ? page_table->numel() : 0),
      paged ? page_table->size(1) : 0,
      paged ? rows : 0,
      key_cache.size(0)};
  Tensor output = new_empty(q, {q.size(0), heads, v.size(2)}, q.scalar_type());
  cached_forward(prepared.problem, cache, output.mutable_data_ptr(), device.stream);
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(RECSYS_OPS_CUDA_LIBRARY, RECSYS_OPS_CUDA_KEY, m) {
  m.impl("hstu_attention_forward", TORCH_BOX(&hstu_attention_forward));
  m.impl("hstu_attention_backward", TORCH_BOX(&hstu_attention_backward));
  m.impl("hstu_attention_cached_forward", TORCH_BOX(&hstu_attention_cached_forward));
}

}  // namespace
}  // namespace recsys_ops::hstu_attention::cuda
