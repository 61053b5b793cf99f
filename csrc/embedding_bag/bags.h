// Tables and bags as the kernels see them: plain pointers and sizes.
//
// The contract (live entries, padding, bounds) is that of recsys_ops/embedding_bag/reference.py.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace recsys_ops::embedding_bag {

// Entries between the one that is read and the one that is fetched; their blocks of columns fill less
// than a first-level cache.
constexpr int64_t prefetch_ahead = 40;

struct Table {
  DType dtype;
  const void* data;
  int64_t rows, dim;
  int64_t row_stride, column_stride;  // in elements
  const float* scales = nullptr;      // [R, 2], scale and offset of each row, of a quantised table
};

// Rows of pooled values, or of their gradients, at any distance from each other.
struct Rows {
  DType dtype;
  void* data;
  int64_t stride;  // in elements
};

// A factor for each entry, or none.
struct Factors {
  DType dtype;
  const void* data;  // [N] or null
};

struct Bags {
  Integers indices;
  Integers offsets;
  int64_t count;
  int64_t num_embeddings;
  int64_t padding_idx;  // -1: none
  bool drop_invalid;

  RECSYS_OPS_INLINE int64_t begin(int64_t bag) const { return offsets[bag]; }
  RECSYS_OPS_INLINE int64_t end(int64_t bag) const {
    return bag + 1 < offsets.size ? offsets[bag + 1] : indices.size;
  }
  // Whether the entries of a bag lie within the indices.
  RECSYS_OPS_INLINE bool well_formed(int64_t bag) const {
    return 0 <= begin(bag) && begin(bag) <= end(bag) && end(bag) <= indices.size;
  }
  RECSYS_OPS_INLINE bool valid(int64_t index) const {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(num_embeddings);
  }
  RECSYS_OPS_INLINE bool live(int64_t index) const { return valid(index) && index != padding_idx; }
};

}  // namespace recsys_ops::embedding_bag
