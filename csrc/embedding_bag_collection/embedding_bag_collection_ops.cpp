// Checks and allocation for torch.ops.recsys_ops.embedding_bag_collection_* on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <mutex>

#include "arguments.h"

namespace recsys_ops::embedding_bag_collection {
namespace {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

void embedding_bag_collection_forward(
    Tensor output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets, MaybeTensor per_sample_weights,
    Tensor lookups, bool drop_invalid) {
  const DType dtype = output_dtype("output", output);
  const std::vector<Table> tables = tables_of(weights, dtype);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  int32_t* const positions = const_cast<int32_t*>(argmax_of(argmax, output.numel()));
  forward(
      tables.data(), input, factors_of(per_sample_weights, input, dtype), dtype, output.mutable_data_ptr(), positions);
}

void embedding_bag_collection_quantized_forward(
    Tensor output, Tensors codes, Tensors scales, int64_t bits, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const DType dtype = output_dtype("output", output);
  STD_TORCH_CHECK(!is_double(dtype), op, ": expected output of float32, float16 or bfloat16");
  STD_TORCH_CHECK(bits == 8 || bits == 4, op, ": expected bits 8 or 4, got ", bits);
  STD_TORCH_CHECK(codes.size() == scales.size(), op, ": expected scales for ", codes.size(), " tables of codes");
  CodeType type = bits == 4 ? CodeType::int4 : CodeType::int8;
  std::vector<Table> tables;
  for (size_t t = 0; t < codes.size(); ++t) {
    const Tensor& table = codes[t];
    const bool is_float8 = table.scalar_type() == ScalarType::Float8_e4m3fn;
    type = is_float8 ? CodeType::float8 : type;
    STD_TORCH_CHECK(
        table.dim() == 2 && table.is_contiguous() &&
            table.scalar_type() == (type == CodeType::float8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte),
        op, ": expected codes [R, D] contiguous, all uint8 or all float8_e4m3fn");
    check_like(op, "scales", scales[t], {table.size(0), 2}, ScalarType::Float);
    const int64_t width = table.size(1);
    tables.push_back(
        {DType::float32, table.const_data_ptr(), table.size(0), type == CodeType::int4 ? 2 * width : width, width, 1,
         static_cast<const float*>(scales[t].const_data_ptr())});
  }
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  quantized_forward(
      type, tables.data(), input, factors_of(per_sample_weights, input, dtype), dtype, output.mutable_data_ptr());
}

// What all kernels that take the output's gradient are given.
struct Backward {
  DType dtype;
  std::vector<Table> tables;
  Input input;
  Factors factors;
  const int32_t* argmax;

  Backward(
      const Tensor& grad_output, const MaybeTensor& argmax_or_none, const Tensors& weights, const Tensor& values,
      const Tensor& offsets, const MaybeTensor& per_sample_weights, const Tensor& lookups, bool drop_invalid)
      : dtype(output_dtype("grad_output", grad_output)),
        tables(tables_of(weights, dtype)),
        input(input_of(values, offsets, lookups, drop_invalid, tables, grad_output.numel())),
        factors(factors_of(per_sample_weights, input, dtype)),
        argmax(argmax_of(argmax_or_none, grad_output.numel())) {
    check_maxima(input, argmax);
  }
};

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
  Tensor grad = new_empty(grad_output, {input.values.size}, is_double(dtype) ? ScalarType::Double : ScalarType::Float);
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
  STD_TORCH_CHECK(
      0 <= optimizer && optimizer <= static_cast<int64_t>(Optimizer::lamb), op, ": expected optimizer in [0, 6), got ",
      optimizer);
  STD_TORCH_CHECK(
      step.dim() == 0 && step.scalar_type() == ScalarType::Long && step.is_cpu(), op,
      ": expected step an int64 scalar on the CPU");
  STD_TORCH_CHECK(
      hyperparameters.dim() == 1 && hyperparameters.size(0) == 8 && hyperparameters.is_contiguous() &&
          hyperparameters.scalar_type() == ScalarType::Double && hyperparameters.is_cpu(),
      op, ": expected hyperparameters [8] of float64 on the CPU");
  int64_t* const count = static_cast<int64_t*>(step.mutable_data_ptr());
  const double* h = static_cast<const double*>(hyperparameters.const_data_ptr());
  const double t = static_cast<double>(*count + 1);
  const Step made = {
      static_cast<Optimizer>(optimizer), h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], 1 - std::pow(h[2], t),
      1 - std::pow(h[3], t), stochastic_rounding, static_cast<uint32_t>(seed), static_cast<uint32_t>(*count + 1)};
  const int each = state_count(made.optimizer);
  STD_TORCH_CHECK(
      states.size() == weights.size() * each, op, ": expected ", weights.size() * each, " states, got ", states.size());
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
  ++*count;
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
