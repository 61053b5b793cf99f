// Runs of sorted entries shared out among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "gradient_pooling.h"
#include "sorted_bags.h"

namespace recsys_ops::embedding_bag {

// The first run of a task, so that tasks have about the same number of entries.
inline int64_t first_run(const SortedBags& sorted, int64_t task, int64_t tasks) {
  const int64_t *const begin = sorted.entries.runs, *const end = begin + sorted.touched();
  return task == tasks ? sorted.touched() : std::lower_bound(begin, end, sorted.live() * task / tasks) - begin;
}

// Calls f(run, sum [D]) for the runs that other functions leave out, one after the other. They are summed
// in pieces of fixed size, so that all threads may help and the result does not depend on how many there are.
template <class T, class F>
void sum_long_runs(const Gradient& gradient, const SortedBags& sorted, bool in_parallel, const F& f) {
  using A = Accumulate<T>;
  const SortedEntries& entries = sorted.entries;
  const int64_t dim = gradient.dim;
  for (int64_t run = 0; run < sorted.touched(); ++run) {
    const int64_t begin = entries.runs[run], end = entries.runs[run + 1];
    if (end - begin <= longest_run) {
      continue;
    }
    const int64_t pieces = (end - begin + longest_run - 1) / longest_run;
    std::vector<A> sums(pieces * dim);
    run_parts(in_parallel ? pieces : 1, pieces, [&](int64_t first_piece, int64_t last_piece) {
      for (int64_t piece = first_piece; piece < last_piece; ++piece) {
        const int64_t first = begin + piece * longest_run;
        gradient_pooling<T>().sum(
            gradient, entries, first, std::min(first + longest_run, end), sums.data() + piece * dim);
      }
    });
    for (int64_t piece = 1; piece < pieces; ++piece) {
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += sums[piece * dim + d];
      }
    }
    f(run, sums.data());
  }
}

}  // namespace recsys_ops::embedding_bag
