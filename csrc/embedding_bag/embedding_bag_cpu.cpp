#include "embedding_bag.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "bag_pooling.h"
#include "bag_tasks.h"
#include "long_runs.h"

namespace recsys_ops::embedding_bag {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

// Throws for the first value that the contract refuses, in the words of reference.py.
[[noreturn]] void refuse(const Bags& bags) {
  const Integers &offsets = bags.offsets, &indices = bags.indices;
  const std::string op = "embedding_bag: expected ";
  if (offsets.size > 0 && offsets[0] != 0) {
    throw std::runtime_error(op + "offsets[0] = 0, got " + text(offsets[0]));
  }
  for (int64_t i = 0; i + 1 < offsets.size; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      throw std::runtime_error(
          op + "offsets that never decrease, got offsets[" + text(i) + "] = " + text(offsets[i]) + ", offsets[" +
          text(i + 1) + "] = " + text(offsets[i + 1]));
    }
  }
  if (offsets.size > 0 && offsets[offsets.size - 1] > indices.size) {
    throw std::runtime_error(
        op + "offsets within the " + text(indices.size) + " indices, got offsets[-1] = " +
        text(offsets[offsets.size - 1]));
  }
  for (int64_t i = 0; i < indices.size; ++i) {
    if (!bags.valid(indices[i])) {
      throw std::runtime_error(
          op + "indices in [0, " + text(bags.num_embeddings) + "), got indices[" + text(i) + "] = " +
          text(indices[i]));
    }
  }
  throw std::runtime_error("embedding_bag: indices or offsets changed during the call");
}

void check_first_offset(const Bags& bags) {
  if (bags.offsets.size > 0 && (bags.offsets[0] != 0 || bags.offsets[bags.offsets.size - 1] > bags.indices.size)) {
    refuse(bags);
  }
}

// Calls f(first, last) for ranges of bags, in parallel; f returns whether all values were good.
template <class F>
void for_good_bags(const Bags& bags, int64_t elements_per_entry, const F& f) {
  check_first_offset(bags);
  if (!for_bags(bags, task_count((bags.indices.size + bags.count) * elements_per_entry), f)) {
    refuse(bags);
  }
}

}  // namespace

void forward(
    Mode mode, const Table& weight, const Bags& bags, const void* per_sample_weights, void* out, int32_t* argmax) {
  if (mode == Mode::max && bags.indices.size > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(
        "embedding_bag: expected fewer than 2^31 indices with mode='max', got " + text(bags.indices.size));
  }
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const BagPooling<T>& pooling = bag_pooling<T>();
    const Rows rows = {weight.dtype, out, weight.dim};
    const Factors factors = {weight.dtype, per_sample_weights};
    for_good_bags(bags, weight.dim, [&](int64_t first, int64_t last) {
      return mode == Mode::max ? pooling.max(weight, bags, rows, argmax, first, last)
                               : pooling.sum(mode == Mode::mean, weight, bags, factors, rows, first, last);
    });
  });
}

WeightGradient::WeightGradient(const Gradient& gradient, const Bags& bags)
    : gradient(gradient), num_embeddings(bags.num_embeddings) {
  check_first_offset(bags);
  const BagSource source = {bags, 0, gradient.dim};
  const Factors factors = {gradient.dtype, gradient.per_sample_weights};
  if (!sorted.sort(&source, 1, gradient.mean, gradient.argmax, factors, task_count(bags.indices.size))) {
    refuse(bags);
  }
}

// To rows [U] and out [U, D], or, without rows, to out [R, D].
void WeightGradient::write(int64_t* rows, void* to) const {
  dispatch(gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    const GradientPooling<T>& pooling = gradient_pooling<T>();
    T* out = static_cast<T*>(to);
    const SortedEntries& entries = sorted.entries;
    const int64_t dim = gradient.dim, tasks = task_count(sorted.live() * dim);
    std::atomic<bool> all{true};
    run_tasks(tasks, [&](int64_t task) {
      const int64_t first = first_run(sorted, task, tasks), last = first_run(sorted, task + 1, tasks);
      if (!pooling.write(gradient, entries, first, last, rows, out)) {
        all.store(false, std::memory_order_relaxed);
      }
    });
    if (all) {
      return;
    }
    sum_long_runs<T>(gradient, sorted, true, [&](int64_t run, const A* sum) {
      const int64_t begin = entries.runs[run];
      const A scale = gradient.scale<A>(entries.runs[run + 1] - begin);
      T* row = out + (rows ? run : entries.row(begin)) * dim;
      for (int64_t d = 0; d < dim; ++d) {
        recsys_ops::scalar::store<1>(row + d, recsys_ops::scalar::Vector<A, 1>{sum[d] * scale});
      }
    });
  });
}

void WeightGradient::write_sparse(int64_t* rows, void* values) const { write(rows, values); }

void WeightGradient::write_dense(void* out) const {
  dispatch(gradient.dtype, [&](auto* type) {
    const int64_t size = num_embeddings * gradient.dim;
    run_parts(task_count(size), size, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<char*>(out) + begin * sizeof(*type), 0, (end - begin) * sizeof(*type));
    });
  });
  write(nullptr, out);
}

void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out) {
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    std::memset(out, 0, bags.indices.size * sizeof(T));
    const Rows with = {weight.dtype, const_cast<void*>(grad_output), weight.dim}, result = {weight.dtype, out, 1};
    for_good_bags(bags, weight.dim, [&](int64_t first, int64_t last) {
      return bag_pooling<T>().dot(mean, weight, bags, with, result, first, last);
    });
  });
}

}  // namespace recsys_ops::embedding_bag
