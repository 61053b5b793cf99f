#include "embedding_bag_collection.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "../embedding_bag/bag_pooling.h"
#include "../embedding_bag/bag_tasks.h"
#include "../embedding_bag/gradient_pooling.h"
#include "../embedding_bag/sorted_bags.h"
#include "quantized_pooling.h"

namespace recsys_ops::embedding_bag_collection {
namespace {

using embedding_bag::BagSource;
using embedding_bag::Buffer;
using embedding_bag::Gradient;
using embedding_bag::GradientPooling;
using embedding_bag::SortedBags;
using embedding_bag::SortedEntries;

std::string text(int64_t value) { return std::to_string(value); }

// Throws for the first value that the contract refuses, in the words of reference.py.
[[noreturn]] void refuse(const Table* tables, const Input& input) {
  const Integers &offsets = input.offsets, &values = input.values;
  const std::string op = "embedding_bag_collection: expected ";
  if (offsets[0] != 0) {
    throw std::runtime_error(op + "offsets[0] = 0, got " + text(offsets[0]));
  }
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    const Lookup& lookup = input.lookups[k];
    const int64_t first = lookup.first_bag, last = first + lookup.num_bags;
    for (int64_t i = first; i < last; ++i) {
      if (offsets[i + 1] < offsets[i]) {
        throw std::runtime_error(
            op + "offsets that never decrease, got offsets[" + text(i) + "] = " + text(offsets[i]) + ", offsets[" +
            text(i + 1) + "] = " + text(offsets[i + 1]));
      }
    }
    for (int64_t i : {first, last}) {
      if (offsets[i] < 0 || offsets[i] > values.size) {
        throw std::runtime_error(
            op + "offsets within the " + text(values.size) + " values, got offsets[" + text(i) + "] = " +
            text(offsets[i]));
      }
    }
    const int64_t rows = tables[lookup.table].rows;
    for (int64_t i = offsets[first]; i < offsets[last]; ++i) {
      if (static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(rows) && !input.drop_invalid) {
        throw std::runtime_error(
            op + "values in [0, " + text(rows) + ") for table " + text(lookup.table) + ", got values[" + text(i) +
            "] = " + text(values[i]));
      }
    }
  }
  throw std::runtime_error("embedding_bag_collection: values or offsets changed during the call");
}

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

// Calls pool(lookup, table, bags, rows, first, last) for all bags, in parallel.
template <class F>
void pool_lookups(const Table* tables, const Input& input, DType dtype, void* output, const F& pool) {
  if (input.offsets[0] != 0) {
    refuse(tables, input);
  }
  const int64_t size = element_size(dtype);
  const Shares shares(tables, input);
  std::atomic<bool> good{true};
  run_tasks(shares.tasks, [&](int64_t task) {
    const bool all = shares.for_each(task, [&](const Lookup& lookup, int64_t first, int64_t last) {
      const Table& table = tables[lookup.table];
      const Rows rows = {dtype, static_cast<char*>(output) + lookup.start * size, lookup.stride};
      return pool(lookup, table, input.bags(lookup, table.rows), rows, first, last);
    });
    if (!all) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  if (!good.load()) {
    refuse(tables, input);
  }
}

// Whether all values are good, read once in parallel.
bool all_good(const Table* tables, const Input& input) {
  std::atomic<bool> good{input.offsets[0] == 0};
  const Shares shares(tables, input);
  run_tasks(shares.tasks, [&](int64_t task) {
    const bool all = shares.for_each(task, [&](const Lookup& lookup, int64_t first, int64_t last) {
      const Bags bags = input.bags(lookup, tables[lookup.table].rows);
      bool fine = true;
      for (int64_t bag = first; bag < last; ++bag) {
        fine &= bags.well_formed(bag);
      }
      if (!fine || input.drop_invalid || first == last) {
        return fine;
      }
      const auto check = [&](const auto* values) {
        bool valid = true;
        for (int64_t i = bags.begin(first), end = bags.end(last - 1); i < end; ++i) {
          valid &= bags.valid(values[i]);
        }
        return valid;
      };
      return input.values.wide ? check(static_cast<const int64_t*>(input.values.data))
                               : check(static_cast<const int32_t*>(input.values.data));
    });
    if (!all) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  return good.load();
}

// Tables whose entries are the same, sorted once for all of them.
struct Group {
  std::vector<int64_t> tables;
  std::vector<std::vector<BagSource>> sources;  // of each table
  Mode mode;
  int64_t work;
};

std::vector<Group> group_tables(const Table* tables, int64_t num_tables, const Input& input) {
  std::vector<std::vector<BagSource>> sources(num_tables);
  std::vector<Mode> modes(num_tables, Mode::sum);
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    const Lookup& lookup = input.lookups[k];
    sources[lookup.table].push_back({input.bags(lookup, tables[lookup.table].rows), lookup.start, lookup.stride});
    modes[lookup.table] = lookup.mode;
  }
  std::vector<Group> groups;
  std::unordered_map<const void*, std::vector<size_t>> starting_at;
  for (int64_t t = 0; t < num_tables; ++t) {
    if (sources[t].empty()) {
      continue;
    }
    const auto same_entries = [&](size_t g) {
      const auto& others = groups[g].sources[0];
      return groups[g].mode == modes[t] &&
             std::equal(
                 others.begin(), others.end(), sources[t].begin(), sources[t].end(),
                 [](const BagSource& a, const BagSource& b) {
                   return a.bags.offsets.data == b.bags.offsets.data && a.bags.count == b.bags.count &&
                          a.bags.num_embeddings == b.bags.num_embeddings;
                 });
    };
    auto& candidates = starting_at[sources[t][0].bags.offsets.data];
    const auto found = std::find_if(candidates.begin(), candidates.end(), same_entries);
    const size_t group = found != candidates.end() ? *found : groups.size();
    if (found == candidates.end()) {
      candidates.push_back(group);
      groups.push_back({{}, {}, modes[t], 0});
    }
    for (const BagSource& source : sources[t]) {
      const Bags& bags = source.bags;
      const int64_t entries = bags.count > 0 ? bags.end(bags.count - 1) - bags.begin(0) : 0;
      groups[group].work += std::clamp<int64_t>(entries, 0, input.values.size) * (tables[t].dim + 16);
    }
    groups[group].tables.push_back(t);
    groups[group].sources.push_back(std::move(sources[t]));
  }
  return groups;
}

// Where each thread sorts: memory in proportion to the ids of its largest table, kept.
SortedBags& workspace() {
  static thread_local SortedBags sorted;
  return sorted;
}

template <class A>
A* scratch(int64_t size) {
  static thread_local Buffer<A> buffer;
  return buffer.of_size(size);
}

// Calls f(table, sorted, tasks) for every table with its entries sorted, to be worked on in so many
// tasks: large tables by all threads one after the other, then the others by one thread each.
template <class F>
void for_sorted_tables(
    const Table* tables, int64_t num_tables, const Input& input, const Factors& factors, const F& f) {
  if (!all_good(tables, input)) {
    refuse(tables, input);
  }
  std::vector<Group> groups = group_tables(tables, num_tables, input);
  int64_t work = 0;
  for (const Group& group : groups) {
    work += group.work;
  }
  const int64_t threads = task_count(work);
  const auto handle = [&](const Group& group, int64_t tasks) {
    SortedBags& sorted = workspace();
    for (size_t i = 0; i < group.tables.size(); ++i) {
      const auto& sources = group.sources[i];
      if (i > 0) {
        sorted.place(sources.data(), sources.size());
      } else if (!sorted.sort(
                     sources.data(), sources.size(), group.mode == Mode::mean, group.mode == Mode::maximum, factors,
                     tasks)) {
        refuse(tables, input);
      }
      f(group.tables[i], group.mode, sorted, tasks);
    }
  };
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.work > b.work; });
  size_t next = 0;
  while (next < groups.size() && (threads == 1 || groups[next].work > work / (2 * threads))) {
    handle(groups[next++], threads);
  }
  std::atomic<size_t> taken{next};
  std::atomic<bool> good{true};
  std::string reason;
  run_tasks(next < groups.size() ? threads : 0, [&](int64_t) {
    for (size_t i = taken++; i < groups.size(); i = taken++) {
      try {
        handle(groups[i], 1);
      } catch (const std::exception& error) {
        if (good.exchange(false)) {
          reason = error.what();
        }
      }
    }
  });
  if (!good) {
    throw std::runtime_error(reason);
  }
}

// Sums of rows that are formed before the rows are touched; and bytes of rows on their way while one
// is worked on, a few at a time: more at once hold each other up.
constexpr int64_t most_in_batch = 64, batch_elements = 4096, bytes_on_their_way = 2048;

// What is read and written of a row: so many bytes at base + row * stride.
struct Place {
  const char* base;
  int64_t stride, bytes;
};

// Calls f(run, row, sum [D]) for each touched row. Long runs are summed in pieces of fixed size, so
// that all threads help and the result does not depend on how many there are.
template <class T, class F>
void sum_rows(
    const Gradient& gradient, const SortedBags& sorted, int64_t tasks, const std::vector<Place>& places, const F& f) {
  using A = Accumulate<T>;
  using embedding_bag::longest_run;
  const GradientPooling<T>& pooling = embedding_bag::gradient_pooling<T>();
  const SortedEntries& entries = sorted.entries;
  const int64_t* const runs = entries.runs;
  const int64_t dim = gradient.dim, live = sorted.live(), touched = sorted.touched();
  const int64_t batch = std::clamp<int64_t>(batch_elements / std::max<int64_t>(dim, 1), 8, most_in_batch);
  int64_t bytes = 1;
  for (const Place& place : places) {
    bytes += place.bytes;
  }
  const int64_t ahead = std::clamp<int64_t>(bytes_on_their_way / bytes, 2, 16);
  tasks = std::min(tasks, task_count(live * dim));
  const auto first_run = [&](int64_t task) {
    return task == tasks ? touched : std::lower_bound(runs, runs + touched, live * task / tasks) - runs;
  };
  std::atomic<bool> all{true};
  run_tasks(tasks, [&](int64_t task) {
    A* const sums = scratch<A>(batch * dim);
    const int64_t last = first_run(task + 1);
    for (int64_t first = first_run(task); first < last; first += batch) {
      const int64_t end = std::min(first + batch, last);
      pooling.sum_runs(gradient, entries, first, end, runs[last], sums);
      for (int64_t run = first; run < end; ++run) {
        const int64_t later = entries.row(runs[run + ahead < last ? run + ahead : run]);
        for (const Place& place : places) {
          recsys_ops::scalar::prefetch(place.base + later * place.stride, place.bytes);
        }
        if (runs[run + 1] - runs[run] <= longest_run) {
          f(run, entries.row(runs[run]), sums + (run - first) * dim);
        } else {
          all.store(false, std::memory_order_relaxed);
        }
      }
    }
  });
  for (int64_t run = 0; !all && run < touched; ++run) {
    const int64_t begin = runs[run], end = runs[run + 1];
    if (end - begin <= longest_run) {
      continue;
    }
    const int64_t pieces = (end - begin + longest_run - 1) / longest_run;
    std::vector<A> sums(pieces * dim);
    const auto sum_piece = [&](int64_t piece) {
      const int64_t first = begin + piece * longest_run;
      pooling.sum(gradient, entries, first, std::min(first + longest_run, end), sums.data() + piece * dim);
    };
    run_tasks(tasks == 1 ? 1 : pieces, [&](int64_t task) {
      for (int64_t piece = task; piece < (tasks == 1 ? pieces : task + 1); ++piece) {
        sum_piece(piece);
      }
    });
    for (int64_t piece = 1; piece < pieces; ++piece) {
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += sums[piece * dim + d];
      }
    }
    f(run, entries.row(begin), sums.data());
  }
}

Gradient gradient_of(DType dtype, const void* grad_output, const Table& table, Mode mode, const int32_t* argmax) {
  return {dtype, grad_output, table.dim, nullptr, mode == Mode::maximum ? argmax : nullptr, mode == Mode::mean, false};
}

template <class T, class W, class F>
void call_if_alike(const F& f) {
  if constexpr (std::is_same_v<Accumulate<T>, Accumulate<W>>) {
    f(static_cast<T*>(nullptr), static_cast<W*>(nullptr));
  }
}

// Calls f(T*, W*) with null pointers of the types of a gradient and a table; both are double or none is.
template <class F>
void dispatch_both(DType gradient, DType table, const F& f) {
  dispatch(gradient, [&](auto* t) {
    dispatch(table, [&](auto* w) {
      call_if_alike<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(f);
    });
  });
}

}  // namespace

void forward(
    const Table* tables, const Input& input, const Factors& factors, DType dtype, void* output, int32_t* argmax) {
  pool_lookups(
      tables, input, dtype, output,
      [&](const Lookup& lookup, const Table& table, const Bags& bags, const Rows& rows, int64_t first, int64_t last) {
        bool good = true;
        dispatch(table.dtype, [&](auto* type) {
          const auto& pooling = embedding_bag::bag_pooling<std::remove_pointer_t<decltype(type)>>();
          good = lookup.mode == Mode::maximum
                     ? pooling.max(table, bags, rows, argmax ? argmax + lookup.start : nullptr, first, last)
                     : pooling.sum(lookup.mode == Mode::mean, table, bags, factors, rows, first, last);
        });
        return good;
      });
}

void quantized_forward(
    CodeType codes, const Table* tables, const Input& input, const Factors& factors, DType dtype, void* output) {
  dispatch(codes, [&](auto* type) {
    const auto& pooling = quantized_pooling<std::remove_pointer_t<decltype(type)>>();
    pool_lookups(
        tables, input, dtype, output,
        [&](const Lookup& lookup, const Table& table, const Bags& bags, const Rows& rows, int64_t first, int64_t last) {
          return lookup.mode == Mode::maximum
                     ? pooling.max(table, bags, rows, nullptr, first, last)
                     : pooling.sum(lookup.mode == Mode::mean, table, bags, factors, rows, first, last);
        });
  });
}

void backward(
    const Table* tables, int64_t num_tables, const Input& input, const Factors& factors, DType dtype,
    const void* grad_output, const int32_t* argmax, void* const* gradients) {
  for_sorted_tables(
      tables, num_tables, input, factors, [&](int64_t t, Mode mode, const SortedBags& sorted, int64_t tasks) {
        const Table& table = tables[t];
        const Gradient gradient = gradient_of(dtype, grad_output, table, mode, argmax);
        dispatch_both(dtype, table.dtype, [&](auto* type, auto* w) {
          using W = std::remove_pointer_t<decltype(w)>;
          W* const to = static_cast<W*>(gradients[t]);
          sum_rows<std::remove_pointer_t<decltype(type)>>(
              gradient, sorted, tasks, {}, [&](int64_t, int64_t row, const Accumulate<W>* sum) {
                row_update<W>().write(table.dim, sum, to + row * table.dim);
              });
        });
      });
}

void backward_sparse(
    const Table* tables, int64_t num_tables, const Input& input, const Factors& factors, DType dtype,
    const void* grad_output, const int32_t* argmax, Allocate allocate, void* context) {
  for_sorted_tables(
      tables, num_tables, input, factors, [&](int64_t t, Mode mode, const SortedBags& sorted, int64_t tasks) {
        const Table& table = tables[t];
        const Gradient gradient = gradient_of(dtype, grad_output, table, mode, argmax);
        int64_t* rows;
        void* values;
        allocate(context, t, sorted.touched(), &rows, &values);
        dispatch_both(dtype, table.dtype, [&](auto* type, auto* w) {
          using W = std::remove_pointer_t<decltype(w)>;
          W* const to = static_cast<W*>(values);
          sum_rows<std::remove_pointer_t<decltype(type)>>(
              gradient, sorted, tasks, {}, [&](int64_t run, int64_t row, const Accumulate<W>* sum) {
                rows[run] = row;
                row_update<W>().write(table.dim, sum, to + run * table.dim);
              });
        });
      });
}

void backward_per_sample_weights(
    const Table* tables, const Input& input, DType dtype, const void* grad_output, const Rows& out) {
  if (!all_good(tables, input)) {
    refuse(tables, input);
  }
  const int64_t size = element_size(dtype);
  for (int64_t k = 0; k < input.num_lookups; ++k) {  // lookups may share entries, so one after the other
    const Lookup& lookup = input.lookups[k];
    if (lookup.mode == Mode::maximum) {
      continue;
    }
    const Table& table = tables[lookup.table];
    const Bags bags = input.bags(lookup, table.rows);
    const char* const start = static_cast<const char*>(grad_output) + lookup.start * size;
    const Rows with = {dtype, const_cast<char*>(start), lookup.stride};
    dispatch(table.dtype, [&](auto* type) {
      const auto& pooling = embedding_bag::bag_pooling<std::remove_pointer_t<decltype(type)>>();
      const int64_t entries = bags.count > 0 ? bags.end(bags.count - 1) - bags.begin(0) : 0;
      for_bags(bags, task_count(entries * table.dim), [&](int64_t first, int64_t last) {
        return pooling.dot(lookup.mode == Mode::mean, table, bags, with, out, first, last);
      });
    });
  }
}

void update(
    const Table* tables, const TrainedTable* trained, int64_t num_tables, const Input& input, const Factors& factors,
    DType dtype, const void* grad_output, const int32_t* argmax, const Step& step) {
  for_sorted_tables(
      tables, num_tables, input, factors, [&](int64_t t, Mode mode, const SortedBags& sorted, int64_t tasks) {
        const Table& table = tables[t];
        const TrainedTable& own = trained[t];
        const int64_t element = element_size(table.dtype), in_state = element_size(own.state_dtype);
        std::vector<Place> places = {
            {static_cast<const char*>(own.weight), own.row_stride * element, table.dim * element}};
        for (int s = 0; s < state_count(step.optimizer); ++s) {
          const int64_t width = (is_rowwise(step.optimizer, s) ? 1 : table.dim) * in_state;
          places.push_back({static_cast<const char*>(own.states[s]), width, width});
        }
        const Gradient gradient = gradient_of(dtype, grad_output, table, mode, argmax);
        dispatch_both(dtype, table.dtype, [&](auto* type, auto* w) {
          using W = std::remove_pointer_t<decltype(w)>;
          const RowUpdate<W>& rows = row_update<W>();
          sum_rows<std::remove_pointer_t<decltype(type)>>(
              gradient, sorted, tasks, places, [&](int64_t, int64_t row, Accumulate<W>* sum) {
                rows.update(step, own, row, sum);
              });
        });
      });
}

}  // namespace recsys_ops::embedding_bag_collection
