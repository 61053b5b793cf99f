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
#include "row_pooling.h"

namespace recsys_ops::embedding_bag {
namespace {

constexpr int chunk = 64;        // rows that are gathered before they are pooled
constexpr int64_t piece = 4096;  // entries of one row that are summed in one go

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

template <class T>
class Rows {
 public:
  explicit Rows(const Table& table)
      : data(static_cast<const T*>(table.data)),
        row_stride(table.row_stride),
        column_stride(table.column_stride),
        dim(table.dim) {
    if (column_stride != 1 && dim > 1) {
      packed.reset(new T[chunk * dim]);
    }
  }

  // A row of contiguous elements, valid until `slot` is used again.
  const T* row(int64_t index, int slot) {
    const T* source = data + index * row_stride;
    if (!packed) {
      return source;
    }
    T* copy = packed.get() + slot * dim;
    for (int64_t d = 0; d < dim; ++d) {
      copy[d] = source[d * column_stride];
    }
    return copy;
  }

 private:
  const T* data;
  int64_t row_stride, column_stride, dim;
  std::unique_ptr<T[]> packed;
};

// Sums of more rows than a chunk pass from one buffer to the other.
template <class A>
class Carry {
 public:
  explicit Carry(int64_t dim) : dim(dim) {}

  void reset() { filled = nullptr; }
  const A* get() const { return filled; }

  A* next() {
    if (!buffers) {
      buffers.reset(new A[2 * dim]);
    }
    return filled == buffers.get() ? buffers.get() + dim : buffers.get();
  }
  void advance() { filled = next(); }

 private:
  int64_t dim;
  std::unique_ptr<A[]> buffers;
  const A* filled = nullptr;
};

int bits_for(uint64_t largest) {
  int bits = 1;
  while (bits < 64 && largest >> bits != 0) {
    ++bits;
  }
  return bits;
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

WeightGradient::WeightGradient(const Gradient& gradient, const Bags& bags) : gradient(gradient), bags(bags) {
  const int64_t size = bags.indices.size;
  const uint64_t rows = bags.num_embeddings;
  position_bits = bits_for(size);
  const int row_bits = bits_for(rows);
  if (position_bits + row_bits > 64 || bags.count > std::numeric_limits<uint32_t>::max()) {
    throw std::runtime_error(
        "embedding_bag: expected rows x indices below 2^63 and bags below 2^32, got " + text(bags.num_embeddings) +
        " rows, " + text(size) + " indices, " + text(bags.count) + " bags");
  }
  storage.reset(new uint64_t[2 * size]);
  bag_of.reset(new uint32_t[size]);
  if (gradient.mean) {
    bag_scale.reset(new double[bags.count]);
  }
  uint64_t* keys = storage.get();
  const auto key = [&](uint64_t row, int64_t i) { return row << position_bits | static_cast<uint64_t>(i); };
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
        keys[i] = key(counts ? index : rows, i);
        bag_of[i] = static_cast<uint32_t>(bag);
        live += counts;
      }
      if (gradient.mean) {
        bag_scale[bag] = live > 0 ? 1.0 / static_cast<double>(live) : 1.0;
      }
    }
    return good;
  });
  for (int64_t i = bags.count > 0 ? bags.end(bags.count - 1) : 0; i < size; ++i) {
    keys[i] = key(rows, i);  // after the last bag
  }
  entries = radix_sort(keys, keys + size, size, position_bits, row_bits);

  const int64_t live = std::lower_bound(entries, entries + size, key(rows, 0)) - entries;
  const int64_t tasks = task_count(live);
  const auto starts_run = [&](int64_t e) { return e == 0 || row(e) != row(e - 1); };
  std::vector<int64_t> before(tasks + 1, 0);
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t e = live * task / tasks; e < live * (task + 1) / tasks; ++e) {
      before[task + 1] += starts_run(e);
    }
  });
  for (int64_t task = 0; task < tasks; ++task) {
    before[task + 1] += before[task];
  }
  runs.resize(before[tasks] + 1);
  runs.back() = live;
  run_tasks(tasks, [&](int64_t task) {
    int64_t run = before[task];
    for (int64_t e = live * task / tasks; e < live * (task + 1) / tasks; ++e) {
      if (starts_run(e)) {
        runs[run++] = e;
      }
    }
  });
}

// Sums the gradients of entries [first, last): to out, scaled, or to sum where out is null.
template <class T>
void WeightGradient::sum_entries(int64_t first, int64_t last, Accumulate<T>* sum, Accumulate<T> scale, T* out) const {
  using A = Accumulate<T>;
  const RowPooling<T>& pooling = row_pooling<T>();
  const T* output = static_cast<const T*>(gradient.output);
  const T* per_sample_weights = static_cast<const T*>(gradient.per_sample_weights);
  const bool weighted = per_sample_weights || gradient.mean;
  const int64_t dim = gradient.dim;
  const T* rows[chunk];
  A weights[chunk];
  const int32_t* argmax[chunk];
  int32_t positions[chunk];
  Carry<A> carry(dim);
  for (int64_t e = first; e < last || e == first;) {
    const int64_t stop = std::min(e + chunk, last);
    int gathered = 0;
    for (; e < stop; ++e, ++gathered) {
      const int64_t i = position(e);
      const int64_t bag = bag_of[i];
      rows[gathered] = output + bag * dim;
      if (gradient.argmax) {
        argmax[gathered] = gradient.argmax + bag * dim;
        positions[gathered] = static_cast<int32_t>(i - bags.begin(bag));
      } else if (weighted) {
        const A weight = per_sample_weights ? recsys_ops::scalar::load<1>(per_sample_weights + i)[0] : A{1};
        weights[gathered] = gradient.mean ? weight * static_cast<A>(bag_scale[bag]) : weight;
      }
    }
    const bool done = e == last;
    A* to = done ? sum : carry.next();
    T* finished = done ? out : nullptr;
    if (gradient.argmax) {
      pooling.sum_where(rows, argmax, positions, gathered, dim, carry.get(), to, scale, finished);
    } else {
      pooling.sum(rows, weighted ? weights : nullptr, gathered, dim, carry.get(), to, scale, finished);
    }
    if (done) {
      return;
    }
    carry.advance();
  }
}

// The gradient of one row. Many entries are summed in pieces of fixed size, so that all
// threads help and the result does not depend on how many there are.
template <class T>
void WeightGradient::write_run(int64_t first, int64_t last, T* out) const {
  using A = Accumulate<T>;
  const A scale = gradient.scale_grad_by_freq ? A{1} / static_cast<A>(last - first) : A{1};
  const int64_t pieces = (last - first + piece - 1) / piece;
  if (pieces == 1) {
    return sum_entries<T>(first, last, nullptr, scale, out);
  }
  const int64_t dim = gradient.dim;
  std::unique_ptr<A[]> partial(new A[pieces * dim]);
  run_tasks(pieces, [&](int64_t p) {
    const int64_t begin = first + p * piece;
    sum_entries<T>(begin, std::min(begin + piece, last), partial.get() + p * dim, A{1}, nullptr);
  });
  for (int64_t p = 1; p < pieces; ++p) {
    for (int64_t d = 0; d < dim; ++d) {
      partial[d] += partial[p * dim + d];
    }
  }
  for (int64_t d = 0; d < dim; ++d) {
    recsys_ops::scalar::store<1>(out + d, recsys_ops::scalar::Vector<A, 1>{partial[d] * scale});
  }
}

// Writes the gradient of each touched row to place(run).
template <class T, class Place>
void WeightGradient::write(const Place& place) const {
  const int64_t live = runs.back();
  const int64_t tasks = task_count(live * gradient.dim);
  const auto first_run = [&](int64_t entry) {
    return std::lower_bound(runs.begin(), runs.end() - 1, entry) - runs.begin();
  };
  const auto is_long = [&](int64_t run) { return runs[run + 1] - runs[run] > piece; };
  std::atomic<bool> any_long{false};
  run_tasks(tasks, [&](int64_t task) {
    const int64_t last = first_run(live * (task + 1) / tasks);
    for (int64_t run = first_run(live * task / tasks); run < last; ++run) {
      if (is_long(run)) {
        any_long.store(true, std::memory_order_relaxed);
      } else {
        write_run<T>(runs[run], runs[run + 1], place(run));
      }
    }
  });
  for (int64_t run = 0; any_long && run < touched(); ++run) {
    if (is_long(run)) {
      write_run<T>(runs[run], runs[run + 1], place(run));
    }
  }
}

void WeightGradient::write_sparse(int64_t* rows, void* values) const {
  for (int64_t run = 0; run < touched(); ++run) {
    rows[run] = row(runs[run]);
  }
  dispatch(gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    write<T>([&](int64_t run) { return static_cast<T*>(values) + run * gradient.dim; });
  });
}

void WeightGradient::write_dense(void* out) const {
  dispatch(gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* table = static_cast<T*>(out);
    const int64_t size = bags.num_embeddings * gradient.dim;
    run_parts(task_count(size), size, [&](int64_t begin, int64_t end) {
      std::memset(table + begin, 0, (end - begin) * sizeof(T));
    });
    write<T>([&](int64_t run) { return table + row(runs[run]) * gradient.dim; });
  });
}

void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out) {
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    const RowPooling<T>& pooling = row_pooling<T>();
    T* result = static_cast<T*>(out);
    for_bags(bags, weight.dim, [&](int64_t first, int64_t last) {
      Rows<T> table(weight);
      const T* rows[chunk];
      int64_t places[chunk];
      A dots[chunk];
      bool good = true;
      for (int64_t bag = first; bag < last; ++bag) {
        if (!bags.well_formed(bag)) {
          return false;
        }
        const int64_t begin = bags.begin(bag), end = bags.end(bag);
        int64_t live = 0;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t index = bags.indices[i];
          live += bags.live(index);
          good &= bags.drop_invalid || bags.valid(index);
        }
        const A scale = mean && live > 0 ? A{1} / static_cast<A>(live) : A{1};
        int gathered = 0;
        const auto flush = [&] {
          const T* grad = static_cast<const T*>(grad_output) + bag * weight.dim;
          pooling.dot(rows, gathered, weight.dim, grad, scale, dots);
          for (int g = 0; g < gathered; ++g) {
            recsys_ops::scalar::store<1>(result + places[g], recsys_ops::scalar::Vector<A, 1>{dots[g]});
          }
          gathered = 0;
        };
        for (int64_t i = begin; i < end; ++i) {
          const int64_t index = bags.indices[i];
          if (!bags.live(index)) {
            std::memset(static_cast<void*>(result + i), 0, sizeof(T));
            continue;
          }
          rows[gathered] = table.row(index, gathered);
          places[gathered++] = i;
          if (gathered == chunk) {
            flush();
          }
        }
        flush();
      }
      return good;
    });
    const int64_t tail = bags.count > 0 ? bags.end(bags.count - 1) : 0;
    std::memset(static_cast<void*>(result + tail), 0, (bags.indices.size - tail) * sizeof(T));
  });
}

}  // namespace recsys_ops::embedding_bag
