// Checks and allocation for torch.ops.recsys_ops.embedding_bag_* on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "embedding_bag.h"

namespace recsys_ops::embedding_bag {
namespace {

Tensor embedding_bag_forward(
    Tensor weight, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights, bool mean,
    int64_t padding_idx, bool include_last_offset, bool drop_invalid) {
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  const void* factors =
      optional_data(op, "per_sample_weights", per_sample_weights, {bags.indices.size}, weight.scalar_type());
  Tensor output = new_empty(weight, {bags.count, table.dim});
  forward(mean ? Mode::mean : Mode::sum, table, bags, factors, output.mutable_data_ptr(), nullptr);
  return output;
}

std::tuple<Tensor, Tensor> embedding_bag_max_forward(
    Tensor weight, Tensor indices, Tensor offsets, int64_t padding_idx, bool include_last_offset, bool drop_invalid) {
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  Tensor output = new_empty(weight, {bags.count, table.dim});
  Tensor argmax = new_empty(weight, {bags.count, table.dim}, ScalarType::Int);
  forward(
      Mode::max, table, bags, nullptr, output.mutable_data_ptr(), static_cast<int32_t*>(argmax.mutable_data_ptr()));
  return {output, argmax};
}

Tensor embedding_bag_backward(
    Tensor grad_output, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights,
    std::optional<Tensor> argmax, int64_t num_embeddings, bool mean, int64_t padding_idx, bool include_last_offset,
    bool drop_invalid, bool scale_grad_by_freq) {
  const Bags bags = bags_of(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid);
  const WeightGradient gradient(
      gradient_of(grad_output, per_sample_weights, argmax, mean, scale_grad_by_freq, bags), bags);
  Tensor grad = new_empty(grad_output, {num_embeddings, grad_output.size(1)});
  gradient.write_dense(grad.mutable_data_ptr());
  return grad;
}

std::tuple<Tensor, Tensor> embedding_bag_backward_sparse(
    Tensor grad_output, Tensor indices, Tensor offsets, std::optional<Tensor> per_sample_weights,
    int64_t num_embeddings, bool mean, int64_t padding_idx, bool include_last_offset, bool drop_invalid,
    bool scale_grad_by_freq) {
  const Bags bags = bags_of(indices, offsets, num_embeddings, padding_idx, include_last_offset, drop_invalid);
  const WeightGradient gradient(
      gradient_of(grad_output, per_sample_weights, std::nullopt, mean, scale_grad_by_freq, bags), bags);
  Tensor rows = new_empty(grad_output, {gradient.touched()}, ScalarType::Long);
  Tensor values = new_empty(grad_output, {gradient.touched(), grad_output.size(1)});
  gradient.write_sparse(static_cast<int64_t*>(rows.mutable_data_ptr()), values.mutable_data_ptr());
  return {rows, values};
}

Tensor embedding_bag_backward_per_sample_weights(
    Tensor grad_output, Tensor weight, Tensor indices, Tensor offsets, bool mean, int64_t padding_idx,
    bool include_last_offset, bool drop_invalid) {
  const Table table = table_of(weight);
  const Bags bags = bags_of(indices, offsets, table.rows, padding_idx, include_last_offset, drop_invalid);
  check_like(op, "grad_output", grad_output, {bags.count, table.dim}, weight.scalar_type());
  Tensor grad = new_empty(weight, {bags.indices.size});
  backward_per_sample_weights(table, bags, grad_output.const_data_ptr(), mean, grad.mutable_data_ptr());
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(recsys_ops, CPU, m) {
  m.impl("embedding_bag_forward", TORCH_BOX(&embedding_bag_forward));
  m.impl("embedding_bag_max_forward", TORCH_BOX(&embedding_bag_max_forward));
  m.impl("embedding_bag_backward", TORCH_BOX(&embedding_bag_backward));
  m.impl("embedding_bag_backward_sparse", TORCH_BOX(&embedding_bag_backward_sparse));
  m.impl("embedding_bag_backward_per_sample_weights", TORCH_BOX(&embedding_bag_backward_per_sample_weights));
}

}  // namespace
}  // namespace recsys_ops::embedding_bag
