// One bag's entries as a lane reads them.
#pragma once

#include "../common/cuda/group.cuh"
#include "bags.h"

namespace recsys_ops::embedding_bag::cuda {

class BagReader {
 public:
  int64_t begin, end;  // within the indices, whatever the offsets say

  // Notes in `good` what the contract refuses. A bag that does not exist is empty.
  __device__ BagReader(const Bags& bags, int64_t bag, bool& good)
      : begin(bag < bags.count ? bags.begin(bag) : 0),
        end(bag < bags.count ? bags.end(bag) : 0),
        bags(bags),
        good(good) {
    if (bag < bags.count && (!bags.well_formed(bag) || (bag == 0 && begin != 0))) {
      good = false;
      begin = end = 0;
    }
  }

  // The row that an entry names, or -1 where it is not live or after the end.
  __device__ int64_t row(int64_t entry) const {
    if (entry >= end) {
      return -1;
    }
    const int64_t index = bags.indices[entry];
    good &= bags.drop_invalid || bags.valid(index);
    return bags.live(index) ? index : -1;
  }

 private:
  const Bags& bags;
  bool& good;
};

// Ends the kernel if a value was refused: last of all, where a call costs no registers.
__device__ inline void check_values(bool good) {
  RECSYS_OPS_DEVICE_CHECK(
      good,
      "embedding_bag: expected offsets from 0, never decreasing, within the indices, "
      "and indices in [0, num_embeddings)");
}

}  // namespace recsys_ops::embedding_bag::cuda
