// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "quantized_pooling.h"

#include "../embedding_bag/bag_blocks.h"

namespace recsys_ops::embedding_bag_collection::RECSYS_OPS_SIMD_LEVEL {
namespace {

template <class T>
constexpr QuantizedPooling<T> kernels = {
    embedding_bag::RECSYS_OPS_SIMD_LEVEL::sum_bags<T>, embedding_bag::RECSYS_OPS_SIMD_LEVEL::max_bags<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_TYPE(QuantizedPooling, quantized_pooling, kernels, Code8)
RECSYS_OPS_DEFINE_FOR_TYPE(QuantizedPooling, quantized_pooling, kernels, Code4)
RECSYS_OPS_DEFINE_FOR_TYPE(QuantizedPooling, quantized_pooling, kernels, Float8)

}  // namespace recsys_ops::embedding_bag_collection::RECSYS_OPS_SIMD_LEVEL
