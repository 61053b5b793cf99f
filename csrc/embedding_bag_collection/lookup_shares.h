// Lookups checked, and shared out among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../embedding_bag/bag_tasks.h"
#include "lookups.h"

namespace recsys_ops::embedding_bag_collection {

// Whether all values are good, read once in parallel.
bool all_good(const Table* tables, const Input& input);

// Throws std::runtime_error for the first value that the contract refuses, in the words of reference.py.
[[noreturn]] void refuse(const Table* tables, const Input& input);

// Work on lookups, in units of elements that are read or written.
class Shares {
 public:
  Shares(const Table* tables, const Input& input) : input(input), before(input.num_lookups + 1) {
    for (int64_t k = 0; k < input.num_lookups; ++k) {
      const Lookup& lookup = input.lookups[k];
      const int64_t entries = input.offsets[lookup.first_bag + lookup.num_bags] - input.offsets[lookup.first_bag];
      const int64_t bounded = std::clamp<int64_t>(entries, 0, input.values.size);
      before[k + 1] = before[k] + (bounded + lookup.num_bags) * std::max<int64_t>(tables[lookup.table].dim, 1);
    }
    tasks = task_count(before.back());
  }

  // Calls f(lookup, first, last) for the bags that a task has of each lookup; f returns whether all
  // values were good, as does this.
  template <class F>
  bool for_each(int64_t task, const F& f) const {
    const int64_t begin = before.back() * task / tasks, end = before.back() * (task + 1) / tasks;
    bool good = true;
    auto from = std::upper_bound(before.begin(), before.end(), begin) - before.begin() - 1;
    for (int64_t k = from; k < input.num_lookups && before[k] < end; ++k) {
      good &= f(input.lookups[k], first_bag(k, begin), first_bag(k, end));
    }
    return good;
  }

  int64_t tasks;

 private:
  // The first bag of a lookup whose work begins at `at` or after it.
  int64_t first_bag(int64_t k, int64_t at) const {
    const Lookup& lookup = input.lookups[k];
    if (at >= before[k + 1]) {
      return lookup.num_bags;
    }
    if (at <= before[k]) {
      return 0;
    }
    const Bags bags = input.bags(lookup, 0);
    const double share = static_cast<double>(at - before[k]) / static_cast<double>(before[k + 1] - before[k]);
    return embedding_bag::bag_at(bags, static_cast<int64_t>(static_cast<double>(embedding_bag::work_of(bags)) * share));
  }

  const Input& input;
  std::vector<int64_t> before;
};

}  // namespace recsys_ops::embedding_bag_collection
