// Checks on the tensors that arrive through torch.ops.recsys_ops.embedding_bag_*, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../common/checks.h"
#include "gradient.h"

namespace recsys_ops::embedding_bag {

inline constexpr const char* op = "embedding_bag";

inline Bags bags_of(
    const Tensor& indices, const Tensor& offsets, int64_t num_embeddings, int64_t padding_idx, bool include_last_offset,
    bool drop_invalid) {
  Bags bags;
  bags.indices = integers_of(op, "indices", indices);
  bags.offsets = integers_of(op, "offsets", offsets);
  STD_TORCH_CHECK(
      !include_last_offset || bags.offsets.size > 0, op, ": expected offsets of shape [B + 1], got [0]");
  bags.count = bags.offsets.size - include_last_offset;
  bags.num_embeddings = num_embeddings;
  bags.padding_idx = padding_idx;
  bags.drop_invalid = drop_invalid;
  return bags;
}

inline Table table_of(const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, op, ": expected weight of shape [R, D], got ", weight.dim(), " dimensions");
  return {
      dtype_of(op, "weight", weight), weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0),
      weight.stride(1)};
}

inline Gradient gradient_of(
    const Tensor& grad_output, const std::optional<Tensor>& per_sample_weights, const std::optional<Tensor>& argmax,
    bool mean, bool scale_grad_by_freq, const Bags& bags) {
  STD_TORCH_CHECK(grad_output.dim() == 2, op, ": expected grad_output of shape [B, D]");
  const int64_t dim = grad_output.size(1);
  check_like(op, "grad_output", grad_output, {bags.count, dim}, grad_output.scalar_type());
  return {
      dtype_of(op, "grad_output", grad_output),
      grad_output.const_data_ptr(),
      dim,
      optional_data(op, "per_sample_weights", per_sample_weights, {bags.indices.size}, grad_output.scalar_type()),
      static_cast<const int32_t*>(optional_data(op, "argmax", argmax, {bags.count, dim}, ScalarType::Int)),
      mean,
      scale_grad_by_freq};
}

}  // namespace recsys_ops::embedding_bag
