// Work on all threads of torch.get_num_threads(), and on the calling one where that is cheaper.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace recsys_ops {

// Elements that one thread handles in about the time that it takes to wake another.
constexpr int64_t elements_per_thread = 16384;

// How many tasks to split work on `elements` into.
inline int64_t task_count(int64_t elements) {
  if (elements < 2 * elements_per_thread) {
    return 1;
  }
  const int64_t threads = torch::stable::get_num_threads();
  return std::clamp<int64_t>(elements / elements_per_thread, 1, threads);
}

// Calls f(task) for each of the tasks, each on a thread of its own.
template <class F>
void run_tasks(int64_t tasks, const F& f) {
  if (tasks == 1) {
    return f(int64_t{0});
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      f(task);
    }
  });
}

// Calls f(begin, end) for equal parts of [0, size).
template <class F>
void run_parts(int64_t tasks, int64_t size, const F& f) {
  run_tasks(tasks, [&](int64_t task) { f(size * task / tasks, size * (task + 1) / tasks); });
}

}  // namespace recsys_ops
