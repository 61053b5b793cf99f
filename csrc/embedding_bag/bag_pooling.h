// Pooling of bags straight from the table, one set of kernels per SIMD level.
#pragma once

#include "../common/simd_level.h"
#include "bags.h"

namespace recsys_ops::embedding_bag {

// Each pools the bags [first, last), and returns false where a value is refused.
template <class T>
struct BagPooling {
  // Sum or mean; per_sample_weights [N] or null.
  bool (*sum)(
      bool mean, const Table& table, const Bags& bags, const T* per_sample_weights, T* out, int64_t first, int64_t last);

  // Maximum, and the position in its bag of the first entry that has it; -1 in an empty bag.
  bool (*max)(const Table& table, const Bags& bags, T* out, int32_t* argmax, int64_t first, int64_t last);

  // out[i] = the dot product of entry i's row and its bag's row of `with` [B, D], for the mean over
  // the bag's live entries; 0 for an entry that is not live.
  bool (*dot)(
      bool mean, const Table& table, const Bags& bags, const T* with, T* out, int64_t first, int64_t last);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(BagPooling, bag_pooling)

}  // namespace recsys_ops::embedding_bag
