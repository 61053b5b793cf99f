// Pooling of bags straight from quantised tables, one set of kernels per SIMD level.
#pragma once

#include "../common/codes.h"
#include "../common/simd_level.h"
#include "../embedding_bag/bags.h"

namespace recsys_ops::embedding_bag_collection {

using embedding_bag::Bags;
using embedding_bag::Factors;
using embedding_bag::Rows;
using embedding_bag::Table;

// As BagPooling, of codes T with scales.
template <class T>
struct QuantizedPooling {
  bool (*sum)(
      bool mean, const Table& table, const Bags& bags, const Factors& factors, const Rows& out, int64_t first,
      int64_t last);
  bool (*max)(
      const Table& table, const Bags& bags, const Rows& out, int32_t* argmax, int64_t first, int64_t last);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(QuantizedPooling, quantized_pooling)

}  // namespace recsys_ops::embedding_bag_collection
