#include "embedding_bag.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "../common/parallel.h"
#include "../common/radix_sort.h"
#include "../common/simd.h"
#include "bag_pooling.h"
#include "gradient_pooling.h"
#include "key_layout.h"

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

// The first bag of a task, so that tasks have about the same number of entries and bags.
int64_t first_bag(const Bags& bags, int64_t task, int64_t tasks) {
  if (task == tasks) {
    return bags.count;
  }
  const int64_t wanted = (bags.indices.size + bags.count) * task / tasks;
  int64_t low = 0, high = bags.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (bags.begin(middle) + middle < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Calls f(first, last) for ranges of bags, in parallel; f returns whether all values were good.
template <class F>
void for_bags(const Bags& bags, int64_t elements_per_entry, const F& f) {
  check_first_offset(bags);
  const int64_t tasks = task_count((bags.indices.size + bags.count) * elements_per_entry);
  std::atomic<bool> good{true};
  run_tasks(tasks, [&](int64_t task) {
    if (!f(first_bag(bags, task, tasks), first_bag(bags, task + 1, tasks))) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  if (!good.load()) {
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
    for_bags(bags, weight.dim, [&](int64_t first, int64_t last) {
      if (mode == Mode::max) {
        return pooling.max(weight, bags, static_cast<T*>(out), argmax, first, last);
      }
      return pooling.sum(
          mode == Mode::mean,
          weight,
          bags,
          static_cast<const T*>(per_sample_weights),
          static_cast<T*>(out),
          first,
          last);
    });
  });
}

WeightGradient::WeightGradient(const Gradient& gradient, const Bags& bags)
    : gradient(gradient), num_embeddings(bags.num_embeddings) {
  const int64_t size = bags.indices.size;
  const uint64_t rows = bags.num_embeddings;
  const KeyLayout layout = key_layout(gradient, bags);
  const bool by_position = layout.by_position;
  const int source_bits = layout.source_bits;
  keys.reset(new uint64_t[2 * size]);
  if (by_position) {
    bag_of.reset(new uint32_t[size]);
  }
  if (gradient.mean) {
    bag_scale.reset(new double[bags.count]);
  }
  const auto key = [&](uint64_t row, uint64_t source) { return row << source_bits | source; };
  for_bags(bags, 1, [&](int64_t first, int64_t last) {
    bool good = true;
    for (int64_t bag = first; bag < last; ++bag) {
      if (!bags.well_formed(bag)) {
        return false;
      }
      int64_t live = 0;
      for (int64_t i = bags.begin(bag), end = bags.end(bag); i < end; ++i) {
        const int64_t index = bags.indices[i];
        const bool counts = bags.live(index);
        good &= counts || bags.drop_invalid || bags.valid(index);
        keys[i] = key(counts ? index : rows, by_position ? i : bag);
        if (by_position) {
          bag_of[i] = static_cast<uint32_t>(bag);
        }
        live += counts;
      }
      if (gradient.mean) {
        bag_scale[bag] = live > 0 ? 1.0 / static_cast<double>(live) : 1.0;
      }
    }
    return good;
  });
  for (int64_t i = bags.count > 0 ? bags.end(bags.count - 1) : 0; i < size; ++i) {
    keys[i] = key(rows, 0);  // after the last bag
  }
  const uint64_t* sorted = radix_sort(keys.get(), keys.get() + size, size, source_bits, layout.row_bits);
  const int64_t live = std::lower_bound(sorted, sorted + size, key(rows, 0)) - sorted;
  entries = {sorted, source_bits, bag_of.get(), bag_scale.get(), nullptr, bags.offsets, nullptr};

  // Each task leaves the starts of its runs where its entries are, without a branch; then they
  // move together.
  const int64_t tasks = task_count(live);
  std::vector<int64_t> found(tasks);
  runs.resize(live + 1);
  run_tasks(tasks, [&](int64_t task) {
    const int64_t begin = live * task / tasks, end = live * (task + 1) / tasks;
    int64_t* start = runs.data() + begin;
    for (int64_t e = begin; e < end; ++e) {
      *start = e;
      start += e == 0 || entries.row(e) != entries.row(e - 1);
    }
    found[task] = start - (runs.data() + begin);
  });
  int64_t count = found[0];
  for (int64_t task = 1; task < tasks; ++task) {
    const auto begin = runs.begin() + live * task / tasks;
    std::copy(begin, begin + found[task], runs.begin() + count);
    count += found[task];
  }
  runs.resize(count + 1);
  runs[count] = live;
  entries.runs = runs.data();
}

// To rows [U] and out [U, D], or, without rows, to out [R, D]. Long runs are summed in pieces of
// fixed size, so that all threads help and the result does not depend on how many there are.
void WeightGradient::write(int64_t* rows, void* to) const {
  dispatch(gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    const GradientPooling<T>& pooling = gradient_pooling<T>();
    T* out = static_cast<T*>(to);
    const int64_t dim = gradient.dim, live = runs.back();
    const int64_t tasks = task_count(live * dim);
    const auto first_run = [&](int64_t task) {
      return std::lower_bound(runs.begin(), runs.end() - 1, live * task / tasks) - runs.begin();
    };
    std::atomic<bool> all{true};
    run_tasks(tasks, [&](int64_t task) {
      if (!pooling.write(gradient, entries, first_run(task), first_run(task + 1), rows, out)) {
        all.store(false, std::memory_order_relaxed);
      }
    });
    for (int64_t run = 0; !all && run < touched(); ++run) {
      const int64_t begin = runs[run], end = runs[run + 1];
      if (end - begin <= longest_run) {
        continue;
      }
      const int64_t pieces = (end - begin + longest_run - 1) / longest_run;
      std::unique_ptr<A[]> sums(new A[pieces * dim]);
      run_tasks(pieces, [&](int64_t piece) {
        const int64_t first = begin + piece * longest_run;
        pooling.sum(gradient, entries, first, std::min(first + longest_run, end), sums.get() + piece * dim);
      });
      const A scale = gradient.scale<A>(end - begin);
      T* row = out + (rows ? run : entries.row(begin)) * dim;
      for (int64_t d = 0; d < dim; ++d) {
        A total = sums[d];
        for (int64_t piece = 1; piece < pieces; ++piece) {
          total += sums[piece * dim + d];
        }
        recsys_ops::scalar::store<1>(row + d, recsys_ops::scalar::Vector<A, 1>{total * scale});
      }
    }
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
    T* result = static_cast<T*>(out);
    for_bags(bags, weight.dim, [&](int64_t first, int64_t last) {
      return bag_pooling<T>().dot(mean, weight, bags, static_cast<const T*>(grad_output), result, first, last);
    });
    const int64_t tail = bags.count > 0 ? bags.end(bags.count - 1) : 0;
    std::memset(static_cast<void*>(result + tail), 0, (bags.indices.size - tail) * sizeof(T));
  });
}

}  // namespace recsys_ops::embedding_bag
