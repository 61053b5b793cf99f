// Checks and allocation for torch.ops.recsys_ops.embedding_bag_* on NVIDIA GPUs.
#include "embedding_bag_cuda.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../common/cuda/tensors.h"
#include "arguments.h"

namespace recsys_ops::embedding_bag::cuda {
namespace {

using recsys_ops::cuda::Memory;
using recsys_ops::cuda::OnDevice;

Tensor embedding_bag_forward(
    Tensor weight, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights, bool mean,
    int64_t padding_idx, bool include_last_offset, bool drop_invalid) {
  const OnDevice device(weight);
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  const void* factors =
      optional_data(op, "per_sample_weights", per_sample_weights, {bags.indices.size}, weight.scalar_type());
  Tensor output = new_empty(weight, {bags.count, table.dim});
  forward(table, bags, factors, mean, output.mutable_data_ptr(), device.stream);
  return output;
}

std::tuple<Tensor, Tensor> embedding_bag_max_forward(
    Tensor weight, Tensor indices, Tensor offsets, int64_t padding_idx, bool include_last_offset, bool drop_invalid) {
  const OnDevice device(weight);
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  STD_TORCH_CHECK(
      bags.indices.size <= std::numeric_limits<int32_t>::max(), op,
      ": expected fewer than 2^31 indices with mode='max', got ", bags.indices.size);
  Tensor output = new_empty(weight, {bags.count, table.dim});
  Tensor argmax = new_empty(weight, {bags.count, table.dim}, ScalarType::Int);
  max_forward(
      table, bags, output.mutable_data_ptr(), static_cast<int32_t*>(argmax.mutable_data_ptr()), device.stream);
  return {output, argmax};
}

// The sorted entries of a gradient, and the memory that they are in.
class WeightGradient {
 public:
  WeightGradient(const Tensor& like, const Gradient& gradient, const Bags& bags, cudaStream_t stream)
      : like(like),
        gradient(gradient),
        size(bags.indices.size),
        num_embeddings(bags.num_embeddings),
        layout(key_layout(gradient, bags)),
        keys(like, 2 * size * sizeof(uint64_t)),
        bag_of(like, layout.by_position ? size * sizeof(uint32_t) : 0),
        bag_scale(like, gradient.mean ? bags.count * sizeof(double) : 0),
        run_scale(like, gradient.scale_grad_by_freq ? size * sizeof(double) : 0),
        stream(stream) {
    uint64_t* unsorted = keys.as<uint64_t>();
    uint32_t* bags_of_entries = layout.by_position ? bag_of.as<uint32_t>() : nullptr;
    double* scales_of_bags = gradient.mean ? bag_scale.as<double>() : nullptr;
    find_entries(layout, bags, unsorted, bags_of_entries, scales_of_bags, stream);
    Memory memory(like, sort_bytes(layout, size));
    const uint64_t* sorted =
        sort_entries(layout, unsorted, unsorted + size, size, memory.as<void>(), memory.bytes, stream);
    entries = {sorted, layout.source_bits, bags_of_entries, scales_of_bags, nullptr, bags.offsets, nullptr};
    if (gradient.scale_grad_by_freq) {
      scale_runs(entries, size, run_scale.as<double>(), stream);
      entries.run_scale = run_scale.as<double>();
    }
  }

  Tensor dense() {
    Tensor grad = new_empty(like, {num_embeddings, gradient.dim});
    zero(gradient, num_embeddings, grad.mutable_data_ptr(), stream);
    sum(num_embeddings, grad);
    return grad;
  }

  std::tuple<Tensor, Tensor> sparse() {
    Memory counts(like, count_size(size) * sizeof(int64_t));
    Memory memory(like, count_bytes(size));
    count_runs(entries, size, num_embeddings, counts.as<int64_t>(), memory.as<void>(), memory.bytes, stream);
    const int64_t touched = total_of(counts.as<int64_t>(), size, stream);
    Tensor rows = new_empty(like, {touched}, ScalarType::Long);
    Tensor values = new_empty(like, {touched, gradient.dim});
    uint64_t* sorted = keys.as<uint64_t>();
    uint64_t* numbered = entries.keys == sorted ? sorted + size : sorted;
    number_runs(
        entries, size, num_embeddings, touched, counts.as<int64_t>(), numbered,
        static_cast<int64_t*>(rows.mutable_data_ptr()), stream);
    entries.keys = numbered;
    sum(touched, values);
    return {rows, values};
  }

 private:
  void sum(int64_t rows, Tensor& out) {
    const int64_t pieces = piece_count(size);
    const int64_t sum_bytes = gradient.dtype == DType::float64 ? sizeof(double) : sizeof(float);
    Memory targets(like, pieces * sizeof(int64_t)), sums(like, pieces * gradient.dim * sum_bytes);
    sum_runs(
        gradient, entries, size, rows, out.mutable_data_ptr(), targets.as<int64_t>(), sums.as<void>(), stream);
  }

  const Tensor& like;
  const Gradient gradient;
  const int64_t size, num_embeddings;
  const KeyLayout layout;
  Memory keys, bag_of, bag_scale, run_scale;
  SortedEntries entries;
  cudaStream_t stream;
};

Tensor embedding_bag_backward(
    Tensor grad_output, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights,
    std::optional<Tensor> argmax, int64_t num_embeddings, bool mean, int64_t padding_idx, bool include_last_offset,
    bool drop_invalid, bool scale_grad_by_freq) {
  const OnDevice device(grad_output);
  const Bags bags = bags_of(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid);
  const Gradient gradient = gradient_of(grad_output, per_sample_weights, argmax, mean, scale_grad_by_freq, bags);
  return WeightGradient(grad_output, gradient, bags, device.stream).dense();
}

std::tuple<Tensor, Tensor> embedding_bag_backward_sparse(
    Tensor grad_output, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights,
    int64_t num_embeddings, bool mean, int64_t padding_idx, bool include_last_offset, bool drop_invalid,
    bool scale_grad_by_freq) {
  const OnDevice device(grad_output);
  const Bags bags = bags_of(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid);
  const Gradient gradient =
      gradient_of(grad_output, per_sample_weights, std::nullopt, mean, scale_grad_by_freq, bags);
  return WeightGradient(grad_output, gradient, bags, device.stream).sparse();
}

Tensor embedding_bag_backward_per_sample_weights(
    Tensor grad_output, Tensor weight, Tensor indices, Tensor offsets, bool mean, int64_t padding_idx,
    bool include_last_offset, bool drop_invalid) {
  const OnDevice device(weight);
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  check_like(op, "grad_output", grad_output, {bags.count, table.dim}, weight.scalar_type());
  Tensor grad = new_empty(weight, {bags.indices.size});
  backward_per_sample_weights(
      table, bags, grad_output.const_data_ptr(), mean, grad.mutable_data_ptr(), device.stream);
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(RECSYS_OPS_CUDA_LIBRARY, RECSYS_OPS_CUDA_KEY, m) {
  m.impl("embedding_bag_forward", TORCH_BOX(&embedding_bag_forward));
  m.impl("embedding_bag_max_forward", TORCH_BOX(&embedding_bag_max_forward));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
  m.impl("embedding_bag_backward_sparse", TORCH_BOX(&embedding_bag_backward_sparse));
  m.impl("embedding_bag_backward_per_sample_weights", TORCH_BOX(&embedding_bag_backward_per_sample_weights));
}

}  // namespace
}  // namespace recsys_ops::embedding_bag::cuda
