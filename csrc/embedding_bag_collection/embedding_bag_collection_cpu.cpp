#include "embedding_bag_collection.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "../common/simd.h"
#include "../embedding_bag/bag_pooling.h"
#include "../embedding_bag/long_runs.h"
#include "lookup_shares.h"
#include "quantized_pooling.h"

namespace recsys_ops::embedding_bag_collection {
namespace {

using embedding_bag::BagSource;
using embedding_bag::Buffer;
using embedding_bag::Gradient;
using embedding_bag::GradientPooling;
using embedding_bag::SortedBags;
using embedding_bag::SortedEntries;

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

// Calls f(run, row, sum [D]) for each touched row.
template <class T, class F>
void sum_rows(
    const Gradient& gradient, const SortedBags& sorted, int64_t tasks, const std::vector<Place>& places, const F& f) {
  using A = Accumulate<T>;
  const GradientPooling<T>& pooling = embedding_bag::gradient_pooling<T>();
  const SortedEntries& entries = sorted.entries;
  const int64_t* const runs = entries.runs;
  const int64_t dim = gradient.dim;
  const int64_t batch = std::clamp<int64_t>(batch_elements / std::max<int64_t>(dim, 1), 8, most_in_batch);
  int64_t bytes = 1;
  for (const Place& place : places) {
    bytes += place.bytes;
  }
  const int64_t ahead = std::clamp<int64_t>(bytes_on_their_way / bytes, 2, 16);
  tasks = std::min(tasks, task_count(sorted.live() * dim));
  std::atomic<bool> all{true};
  run_tasks(tasks, [&](int64_t task) {
    A* const sums = scratch<A>(batch * dim);
    const int64_t last = embedding_bag::first_run(sorted, task + 1, tasks);
    for (int64_t first = embedding_bag::first_run(sorted, task, tasks); first < last; first += batch) {
      const int64_t end = std::min(first + batch, last);
      pooling.sum_runs(gradient, entries, first, end, runs[last], sums);
      for (int64_t run = first; run < end; ++run) {
        const int64_t later = entries.row(runs[run + ahead < last ? run + ahead : run]);
        for (const Place& place : places) {
          recsys_ops::scalar::prefetch(place.base + later * place.stride, place.bytes);
        }
        if (runs[run + 1] - runs[run] <= embedding_bag::longest_run) {
          f(run, entries.row(runs[run]), sums + (run - first) * dim);
        } else {
          all.store(false, std::memory_order_relaxed);
        }
      }
    }
  });
  if (!all) {
    embedding_bag::sum_long_runs<T>(
        gradient, sorted, tasks > 1, [&](int64_t run, A* sum) { f(run, entries.row(runs[run]), sum); });
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
