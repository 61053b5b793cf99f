// Bags shared out among threads.
#pragma once

#include <atomic>

#include "../common/parallel.h"
#include "bags.h"

namespace recsys_ops::embedding_bag {

// Entries and bags of all bags.
inline int64_t work_of(const Bags& bags) {
  return bags.count > 0 ? bags.end(bags.count - 1) - bags.begin(0) + bags.count : 0;
}

// The first bag before which there is so much work.
inline int64_t bag_at(const Bags& bags, int64_t work) {
  int64_t low = 0, high = bags.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bags.begin(middle) - bags.begin(0) + middle < work) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The first bag of a task, so that tasks have about the same number of entries and bags.
inline int64_t first_bag(const Bags& bags, int64_t task, int64_t tasks) {
  return task == tasks ? bags.count : bag_at(bags, work_of(bags) * task / tasks);
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
