// The gradient of a table as the kernels see it: the entries of all bags, sorted by row.
#pragma once

#include "bags.h"

namespace recsys_ops::embedding_bag {

// What the gradient of the weight is made of.
struct Gradient {
  DType dtype;
  const void* output;              // [B, D] contiguous
  int64_t dim;
  const void* per_sample_weights;  // [N] or null
  const int32_t* argmax;           // [B, D] or null
  bool mean;
  bool scale_grad_by_freq;

  // What the sum of so many entries of a row is multiplied by.
  template <class A>
  RECSYS_OPS_INLINE A scale(int64_t entries) const {
    return scale_grad_by_freq ? A{1} / static_cast<A>(entries) : A{1};
  }
};

// The entries of all bags, sorted by row. The entries of one row are a run.
struct SortedEntries {
  const uint64_t* keys;     // row << source_bits | source
  int source_bits;
  const uint32_t* bag_of;   // [N], where sources are positions; null where they are bags
  const double* bag_scale;  // [B], 1 / live entries; null for 1
  const double* run_scale;  // [N], in sorted order, for scale_grad_by_freq; null for 1, and on the CPU
  Integers offsets;
  const int64_t* runs;      // where each starts, and where the last ends; null where nobody has listed them
  // The rest only on the CPU.
  const void* factors = nullptr;   // by source, in the type that sums are formed in; null for 1
  const int64_t* cells = nullptr;  // of each bag, where its row of the output's gradient begins; else
  int64_t cell_start = 0, cell_stride = 0;  // they begin at equal distances

  RECSYS_OPS_INLINE int64_t row(int64_t entry) const { return static_cast<int64_t>(keys[entry] >> source_bits); }
  RECSYS_OPS_INLINE int64_t source(int64_t entry) const {
    return static_cast<int64_t>(keys[entry] & ((uint64_t{1} << source_bits) - 1));
  }
  RECSYS_OPS_INLINE int64_t bag(int64_t source) const { return bag_of ? bag_of[source] : source; }
  RECSYS_OPS_INLINE int64_t cell(int64_t bag) const { return cells ? cells[bag] : cell_start + bag * cell_stride; }
};

}  // namespace recsys_ops::embedding_bag
