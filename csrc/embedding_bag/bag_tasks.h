// Bags shared out among threads.
#pragma once

#include <atomic>

#include "../common/parallel.h"
#include "bags.h"

namespace recsys_ops::embedding_bag {

// The first bag of a task, so that tasks have about the same number of entries and bags.
inline int64_t first_bag(const Bags& bags, int64_t task, int64_t tasks) {
  if (task == tasks || bags.count == 0) {
    return bags.count;
  }
  const int64_t start = bags.begin(0);
  const int64_t wanted = (bags.end(bags.count - 1) - start + bags.count) * task / tasks;
  int64_t low = 0, high = bags.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bags.begin(middle) - start + middle < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls f(first, last) for ranges of bags, in parallel; f returns whether all values were good, as does this.
template <class F>
bool for_bags(const Bags& bags, int64_t tasks, const F& f) {
  std::atomic<bool> good{true};
  run_tasks(tasks, [&](int64_t task) {
    if (!f(first_bag(bags, task, tasks), first_bag(bags, task + 1, tasks))) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  return good.load();
}

}  // namespace recsys_ops::embedding_bag
