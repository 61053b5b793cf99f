// Pooling of bags straight from the table, one set of kernels per SIMD level.
#pragma once

#include "../common/simd_level.h"
#include "bags.h"

namespace recsys_ops::embedding_bag {

// Each pools the bags [first, last), and returns false where a value is refused. A table of double has
// rows and factors of double, any other table those of any other type.
template <class T>
struct BagPooling {
  // Sum or mean, of each entry times its factor.
  bool (*sum)(
      bool mean, const Table& table, const Bags& bags, const Factors& factors, const Rows& out, int64_t first,
      int64_t last);

  // Maximum, and unless argmax is null the position in its bag of the first entry that has it, -1 in
  // an empty bag, laid out as the maxima.
  bool (*max)(
      const Table& table, const Bags& bags, const Rows& out, int32_t* argmax, int64_t first, int64_t last);

  // Adds to out[i] the dot product of entry i's row and its bag's row of `with`, for the mean over the
  // bag's live entries; nothing where an entry is not live.
  bool (*dot)(
      bool mean, const Table& table, const Bags& bags, const Rows& with, const Rows& out, int64_t first,
      int64_t last);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(BagPooling, bag_pooling)

}  // namespace recsys_ops::embedding_bag
