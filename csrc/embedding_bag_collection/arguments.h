// Checks on the tensors that arrive through torch.ops.recsys_ops.embedding_bag_collection_*, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "../common/codes.h"
#include "lookups.h"
#include "optimizer.h"

namespace recsys_ops::embedding_bag_collection {

inline constexpr const char* op = "embedding_bag_collection";

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

inline bool is_double(DType dtype) { return dtype == DType::float64; }

// The type in which sums are formed.
inline DType wide(DType dtype) { return is_double(dtype) ? DType::float64 : DType::float32; }
inline ScalarType wide_scalar(DType dtype) { return is_double(dtype) ? ScalarType::Double : ScalarType::Float; }

inline void check_width(const char* argument, DType dtype, DType output) {
  STD_TORCH_CHECK(
      is_double(dtype) == is_double(output), op, ": expected ", argument,
      " and output of float64 together or not at all");
}

inline std::vector<Table> tables_of(const Tensors& weights, DType output) {
  std::vector<Table> tables;
  tables.reserve(weights.size());
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": expected weights of shape [R, D], got ", weight.dim(), " dimensions");
    const DType dtype = dtype_of(op, "weights", weight);
    check_width("weights", dtype, output);
    tables.push_back(
        {dtype, weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)});
  }
  return tables;
}

// Tables of codes, and of what type these are. Strides are in bytes.
struct CodeTables {
  CodeType type;
  std::vector<Table> tables;
};

inline CodeTables code_tables_of(const Tensors& codes, const Tensors& scales, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, op, ": expected bits 8 or 4, got ", bits);
  STD_TORCH_CHECK(
      codes.size() == scales.size(), op, ": expected scales for ", codes.size(), " tables of codes, got ",
      scales.size());
  const bool is_float8 = !codes.empty() && codes[0].scalar_type() == ScalarType::Float8_e4m3fn;
  CodeTables found = {is_float8 ? CodeType::float8 : bits == 4 ? CodeType::int4 : CodeType::int8, {}};
  for (size_t t = 0; t < codes.size(); ++t) {
    const Tensor& table = codes[t];
    STD_TORCH_CHECK(
        table.dim() == 2 && table.is_contiguous() && !(is_float8 && bits == 4) &&
            table.scalar_type() == (is_float8 ? ScalarType::Float8_e4m3fn : ScalarType::Byte),
        op, ": expected codes [R, D] contiguous, all uint8 or all float8_e4m3fn of 8 bits");
    check_like(op, "scales", scales[t], {table.size(0), 2}, ScalarType::Float);
    const int64_t width = table.size(1);
    found.tables.push_back(
        {DType::float32, table.const_data_ptr(), table.size(0), width * 8 / bits, width, 1,
         static_cast<const float*>(scales[t].const_data_ptr())});
  }
  return found;
}

// `tables` and `cells` bound what lookups may refer to.
inline Input input_of(
    const Tensor& values, const Tensor& offsets, const Tensor& lookups, bool drop_invalid,
    const std::vector<Table>& tables, int64_t cells) {
  STD_TORCH_CHECK(
      lookups.dim() == 2 && lookups.size(1) == sizeof(Lookup) / sizeof(int64_t) && lookups.is_contiguous() &&
          lookups.scalar_type() == ScalarType::Long && lookups.is_cpu(),
      op, ": expected lookups [K, 6] of int64 on the CPU");
  Input input;
  input.values = integers_of(op, "values", values);
  input.offsets = integers_of(op, "offsets", offsets);
  input.lookups = static_cast<const Lookup*>(lookups.const_data_ptr());
  input.num_lookups = lookups.size(0);
  input.drop_invalid = drop_invalid;
  STD_TORCH_CHECK(input.offsets.size > 0, op, ": expected offsets of shape [G + 1], got [0]");
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    STD_TORCH_CHECK(
        is_consistent(input.lookups[k], input, tables, cells),
        op, ": expected lookups of these tables, offsets and cells, got another in row ", k);
    STD_TORCH_CHECK(
        input.lookups[k].mode != Mode::maximum || input.values.size <= std::numeric_limits<int32_t>::max(), op,
        ": expected fewer than 2^31 values with pooling 'max', got ", input.values.size);
  }
  return input;
}

inline Factors factors_of(const MaybeTensor& per_sample_weights, const Input& input, DType output) {
  if (!per_sample_weights) {
    return {wide(output), nullptr};
  }
  check_like(op, "per_sample_weights", *per_sample_weights, {input.values.size}, wide_scalar(output));
  return {wide(output), per_sample_weights->const_data_ptr()};
}

inline int32_t* argmax_of(const MaybeTensor& argmax, int64_t cells) {
  if (!argmax) {
    return nullptr;
  }
  check_like(op, "argmax", *argmax, {cells}, ScalarType::Int);
  return static_cast<int32_t*>(argmax->mutable_data_ptr());
}

inline DType output_dtype(const char* argument, const Tensor& output) {
  STD_TORCH_CHECK(output.is_contiguous(), op, ": expected ", argument, " contiguous");
  return dtype_of(op, argument, output);
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
    std::vector<const Lookup*> first(tables.size());
    for (const Lookup& lookup : input) {
      STD_TORCH_CHECK(
          argmax_or_none || lookup.mode != Mode::maximum, op, ": expected argmax with lookups by maximum, got None");
      const Lookup*& of_table = first[lookup.table];
      of_table = of_table ? of_table : &lookup;
      STD_TORCH_CHECK(
          of_table->mode == lookup.mode, op, ": expected lookups of one mode for table ", lookup.table, ", got two");
    }
  }
};

// The step after those that `step` has counted.
inline Step step_of(
    int64_t optimizer, const Tensor& hyperparameters, const Tensor& step, int64_t seed, bool stochastic_rounding) {
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
  const int64_t count = *static_cast<const int64_t*>(step.const_data_ptr()) + 1;
  const double* h = static_cast<const double*>(hyperparameters.const_data_ptr());
  const double t = static_cast<double>(count);
  return {
      static_cast<Optimizer>(optimizer), h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7], 1 - std::pow(h[2], t),
      1 - std::pow(h[3], t), stochastic_rounding, static_cast<uint32_t>(seed), static_cast<uint32_t>(count)};
}

inline void count_step(Tensor& step) { ++*static_cast<int64_t*>(step.mutable_data_ptr()); }

inline void check_state_count(const Tensors& states, const Tensors& weights, Optimizer optimizer) {
  const size_t expected = weights.size() * state_count(optimizer);
  STD_TORCH_CHECK(states.size() == expected, op, ": expected ", expected, " states, got ", states.size());
}

}  // namespace recsys_ops::embedding_bag_collection
