// Checks on the tensors that arrive through torch.ops.recsys_ops.embedding_bag_collection_*.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../common/checks.h"
#include "embedding_bag_collection.h"

namespace recsys_ops::embedding_bag_collection {

inline constexpr const char* op = "embedding_bag_collection";

inline bool is_double(DType dtype) { return dtype == DType::float64; }

inline std::vector<Table> tables_of(const std::vector<Tensor>& weights, DType output) {
  std::vector<Table> tables;
  tables.reserve(weights.size());
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": expected weights of shape [R, D], got ", weight.dim(), " dimensions");
    const DType dtype = dtype_of(op, "weights", weight);
    STD_TORCH_CHECK(
        is_double(dtype) == is_double(output), op, ": expected weights and output of float64 together or not at all");
    tables.push_back(
        {dtype, weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)});
  }
  return tables;
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
  }
  return input;
}

inline Factors factors_of(const std::optional<Tensor>& per_sample_weights, const Input& input, DType output) {
  if (!per_sample_weights) {
    return {is_double(output) ? DType::float64 : DType::float32, nullptr};
  }
  const ScalarType wide = is_double(output) ? ScalarType::Double : ScalarType::Float;
  check_like(op, "per_sample_weights", *per_sample_weights, {input.values.size}, wide);
  return {dtype_of(op, "per_sample_weights", *per_sample_weights), per_sample_weights->const_data_ptr()};
}

inline const int32_t* argmax_of(const std::optional<Tensor>& argmax, int64_t cells) {
  if (!argmax) {
    return nullptr;
  }
  check_like(op, "argmax", *argmax, {cells}, ScalarType::Int);
  return static_cast<const int32_t*>(argmax->const_data_ptr());
}

inline DType output_dtype(const char* argument, const Tensor& output) {
  STD_TORCH_CHECK(output.is_contiguous(), op, ": expected ", argument, " contiguous");
  return dtype_of(op, argument, output);
}

// The same for what takes gradients: those of maxima need to know where these come from.
inline void check_maxima(const Input& input, const int32_t* argmax) {
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    STD_TORCH_CHECK(
        argmax || input.lookups[k].mode != Mode::maximum, op, ": expected argmax with lookups by maximum, got None");
  }
}

}  // namespace recsys_ops::embedding_bag_collection
