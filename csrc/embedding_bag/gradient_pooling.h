// Pooling of the gradients of bags into those of rows, one set of kernels per SIMD level.
#pragma once

#include "../common/simd_level.h"
#include "gradient.h"

namespace recsys_ops::embedding_bag {

constexpr int64_t longest_run = 4096;  // entries; longer ones are summed in pieces of this size

template <class T>
struct GradientPooling {
  // The gradients of the runs [first, last) to out + run * dim and their rows to rows[run], or,
  // where rows is null, the gradients to out + row * dim. False where it left out longer runs.
  bool (*write)(
      const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t* rows, T* out);

  // The sums of the runs [first, last), of longer ones nothing, to sums [last - first, D]; entries from
  // prefetch_end on are left to others.
  void (*sum_runs)(
      const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t prefetch_end,
      Accumulate<T>* sums);

  // The sum of the entries [first, last) to sum [D].
  void (*sum)(
      const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, Accumulate<T>* sum);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(GradientPooling, gradient_pooling)

}  // namespace recsys_ops::embedding_bag
