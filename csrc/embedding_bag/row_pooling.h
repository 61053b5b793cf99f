// Arithmetic on gathered rows, one set of kernels per SIMD level.
#pragma once

#include "../common/dtype.h"
#include "../common/simd_level.h"

namespace recsys_ops::embedding_bag {

// Rows are pointers to `dim` contiguous elements each.
template <class T>
struct RowPooling {
  using A = Accumulate<T>;

  // sum = carry + sum_i weights[i] * rows[i]; weights may be null for 1, carry for 0.
  // Writes sum * scale to `out`, or, where out is null, sum to `sum`, which must not be carry.
  void (*sum)(
      const T* const* rows, const A* weights, int64_t n, int64_t dim, const A* carry, A* sum, A scale, T* out);

  // The same sum over the elements where argmax[i][d] == positions[i].
  void (*sum_where)(
      const T* const* rows,
      const int32_t* const* argmax,
      const int32_t* positions,
      int64_t n,
      int64_t dim,
      const A* carry,
      A* sum,
      A scale,
      T* out);

  // out[i] = scale * dot(rows[i], with)
  void (*dot)(const T* const* rows, int64_t n, int64_t dim, const T* with, A scale, A* out);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(RowPooling, row_pooling)

}  // namespace recsys_ops::embedding_bag
