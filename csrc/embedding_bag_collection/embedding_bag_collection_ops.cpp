// Checks and allocation for torch.ops.recsys_ops.embedding_bag_collection_* on the CPU.
#include <torch/csrc/stable/library.h>

#include <mutex>

#include "arguments.h"
#include "embedding_bag_collection.h"

namespace recsys_ops::embedding_bag_collection {
namespace {

void embedding_bag_collection_forward(
    Tensor output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets, MaybeTensor per_sample_weights,
    Tensor lookups, bool drop_invalid) {
  const DType dtype = output_dtype("output", output);
  const std::vector<Table> tables = tables_of(weights, dtype);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  forward(
      tables.data(), input, factors_of(per_sample_weights, input, dtype), dtype, output.mutable_data_ptr(),
      argmax_of(argmax, output.numel()));
}

void embedding_bag_collection_quantized_forward(
    Tensor output, Tensors codes, Tensors scales, int64_t bits, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const DType dtype = output_dtype("output", output);
  STD_TORCH_CHECK(!is_double(dtype), op, ": expected output of float32, float16 or bfloat16");
  const auto [type, tables] = code_tables_of(codes, scales, bits);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  quantized_forward(
      type, tables.data(), input, factors_of(per_sample_weights, input, dtype), dtype, output.mutable_data_ptr());
}

Tensors embedding_bag_collection_backward(
    Tensor grad_output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const Backward given(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid);
  Tensors gradients;
  std::vector<void*> memory;
  for (const Tensor& weight : weights) {
    gradients.push_back(new_empty(weight, {weight.size(0), weight.size(1)}, weight.scalar_type()));
    torch::stable::zero_(gradients.back());
    memory.push_back(gradients.back().mutable_data_ptr());
  }
  backward(
      given.tables.data(), given.tables.size(), given.input, given.factors, given.dtype, grad_output.const_data_ptr(),
      given.argmax, memory.data());
  return gradients;
}

Tensors embedding_bag_collection_backward_sparse(
    Tensor grad_output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const Backward given(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid);
  // Tables are done in any order, by several threads.
  struct Results {
    const Tensors& weights;
    std::vector<MaybeTensor> parts;
    std::mutex mutex;
  } results{weights, std::vector<MaybeTensor>(2 * weights.size()), {}};
  const auto allocate = [](void* context, int64_t table, int64_t count, int64_t** rows, void** gradients) {
    Results& to = *static_cast<Results*>(context);
    const std::lock_guard<std::mutex> lock(to.mutex);
    const Tensor& weight = to.weights[table];
    to.parts[2 * table] = new_empty(weight, {count}, ScalarType::Long);
    to.parts[2 * table + 1] = new_empty(weight, {count, weight.size(1)}, weight.scalar_type());
    *rows = static_cast<int64_t*>(to.parts[2 * table]->mutable_data_ptr());
    *gradients = to.parts[2 * table + 1]->mutable_data_ptr();
  };
  backward_sparse(
      given.tables.data(), given.tables.size(), given.input, given.factors, given.dtype, grad_output.const_data_ptr(),
      given.argmax, allocate, &results);
  Tensors parts;
  for (size_t i = 0; i < results.parts.size(); ++i) {
    if (!results.parts[i]) {  // a table that nobody looks up
      int64_t* rows;
      void* gradients;
      allocate(&results, static_cast<int64_t>(i / 2), 0, &rows, &gradients);
    }
    parts.push_back(*results.parts[i]);
  }
  return parts;
}

Tensor embedding_bag_collection_backward_per_sample_weights(
    Tensor grad_output, Tensors weights, Tensor values, Tensor offsets, Tensor lookups, bool drop_invalid) {
  const DType dtype = output_dtype("grad_output", grad_output);
  const std::vector<Table> tables = tables_of(weights, dtype);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, grad_output.numel());
  Tensor grad = new_empty(grad_output, {input.values.size}, wide_scalar(dtype));
  torch::stable::zero_(grad);
  const Rows out = {dtype_of(op, "grad", grad), grad.mutable_data_ptr(), 1};
  backward_per_sample_weights(tables.data(), input, dtype, grad_output.const_data_ptr(), out);
  return grad;
}

void embedding_bag_collection_update(
    Tensors weights, Tensors states, Tensor step, Tensor grad_output, MaybeTensor argmax, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid, int64_t optimizer, Tensor hyperparameters,
    int64_t seed, bool stochastic_rounding) {
  const Backward given(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid);
  const Step made = step_of(optimizer, hyperparameters, step, seed, stochastic_rounding);
  check_state_count(states, weights, made.optimizer);
  const int each = state_count(made.optimizer);
  std::vector<TrainedTable> trained;
  for (size_t t = 0; t < weights.size(); ++t) {
    const Table& table = given.tables[t];
    TrainedTable own = {
        weights[t].mutable_data_ptr(), table.dim, table.row_stride, table.column_stride, static_cast<uint32_t>(t),
        DType::float32, {nullptr, nullptr}};
    for (int s = 0; s < each; ++s) {
      const Tensor& state = states[t * each + s];
      const bool rowwise = is_rowwise(made.optimizer, s);
      STD_TORCH_CHECK(
          state.is_contiguous() && state.dim() == (rowwise ? 1 : 2) && state.size(0) == table.rows &&
              (rowwise || state.size(1) == table.dim),
          op, ": expected states contiguous and of the shape of their tables");
      const DType dtype = dtype_of(op, "states", state);
      STD_TORCH_CHECK(
          (s == 0 || dtype == own.state_dtype) && is_double(dtype) == is_double(table.dtype), op,
          ": expected states of one table of one dtype, float64 with float64 tables");
      own.state_dtype = dtype;
      own.states[s] = state.mutable_data_ptr();
    }
    trained.push_back(own);
  }
  update(
      given.tables.data(), trained.data(), trained.size(), given.input, given.factors, given.dtype,
      grad_output.const_data_ptr(), given.argmax, made);
  count_step(step);
}

STABLE_TORCH_LIBRARY_IMPL(recsys_ops, CPU, m) {
  m.impl("embedding_bag_collection_forward", TORCH_BOX(&embedding_bag_collection_forward));
  m.impl("embedding_bag_collection_quantized_forward", TORCH_BOX(&embedding_bag_collection_quantized_forward));
  m.impl("embedding_bag_collection_backward", TORCH_BOX(&embedding_bag_collection_backward));
  m.impl("embedding_bag_collection_backward_sparse", TORCH_BOX(&embedding_bag_collection_backward_sparse));
  m.impl(
      "embedding_bag_collection_backward_per_sample_weights",
      TORCH_BOX(&embedding_bag_collection_backward_per_sample_weights));
  m.impl("embedding_bag_collection_update", TORCH_BOX(&embedding_bag_collection_update));
}

}  // namespace
}  // namespace recsys_ops::embedding_bag_collection
