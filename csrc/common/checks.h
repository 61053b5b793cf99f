// Checks on tensors that arrive through torch.ops, and their kernels' view of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "dtype.h"

namespace recsys_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": expected ", argument, " of dtype float32, float64, float16 or bfloat16");
  }
}

inline Integers integers_of(const char* op, const char* argument, const Tensor& tensor) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      wide || tensor.scalar_type() == ScalarType::Int, op, ": expected ", argument, " of dtype int64 or int32");
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.is_contiguous(), op, ": expected ", argument, " of one contiguous dimension, got ",
      tensor.dim(), " dimensions");
  return {tensor.const_data_ptr(), wide, tensor.numel()};
}

// A tensor that must have this shape, be contiguous, and be of the dtype of another.
inline void check_like(
    const char* op, const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape,
    ScalarType dtype) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous();
  for (size_t d = 0; same && d < shape.size(); ++d) {
    same = tensor.size(d) == shape.begin()[d];
  }
  STD_TORCH_CHECK(same, op, ": expected ", argument, " contiguous and of the shape that the other arguments imply");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", argument, " of the dtype of its peers");
}

// The memory of such a tensor, or null where there is none.
inline const void* optional_data(
    const char* op, const char* argument, const std::optional<Tensor>& tensor, std::initializer_list<int64_t> shape,
    ScalarType dtype) {
  if (!tensor) {
    return nullptr;
  }
  check_like(op, argument, *tensor, shape, dtype);
  return tensor->const_data_ptr();
}

// The type in which sums are formed.
inline ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised, on the device of another tensor and, unless it is said, of its dtype.
inline Tensor new_empty(
    const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

}  // namespace recsys_ops
