// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "bag_pooling.h"

#include "../common/simd_blocks.h"

namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL {
namespace {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

constexpr int64_t prefetch_ahead = 16;  // entries

// The entries of one bag after another, with the rows of those ahead on their way.
template <class T, class Index, bool STRIDED>
struct Entries {
  const T* data;
  int64_t row_stride, column_stride;
  const Index* indices;
  int64_t num_embeddings, padding_idx;
  bool drop_invalid;
  int64_t prefetch_end;  // entries from here on belong to others
  bool split_lines;      // columns may reach into one more cache line than their size needs
  int64_t begin, end;    // of the current bag

  Entries(const Table& table, const Bags& bags)
      : data(static_cast<const T*>(table.data)),
        row_stride(table.row_stride),
        column_stride(table.column_stride),
        indices(static_cast<const Index*>(bags.indices.data)),
        num_embeddings(bags.num_embeddings),
        padding_idx(bags.padding_idx),
        drop_invalid(bags.drop_invalid),
        prefetch_end(0),
        split_lines(((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row_stride) * sizeof(T)) & 63) != 0),
        begin(0),
        end(0) {}

  // Calls f(row + column, i) for each live entry of the bag, which will read so many columns of
  // the row; false where an entry is refused.
  template <class F>
  RECSYS_OPS_INLINE bool for_each(int64_t column, int64_t columns, const F& f) const {
    bool good = true;
    const int64_t stop_prefetch = prefetch_end - prefetch_ahead;
    for (int64_t i = begin; i < end; ++i) {
      if (i < stop_prefetch) {
        prefetch_row(indices[i + prefetch_ahead], column, columns);
      }
      const int64_t index = indices[i];
      if (static_cast<uint64_t>(index) >= static_cast<uint64_t>(num_embeddings)) {
        good &= drop_invalid;
      } else if (index != padding_idx) {
        f(data + index * row_stride + column * (STRIDED ? column_stride : 1), i);
      }
    }
    return good;
  }

  // Any index: prefetching a bad address does nothing.
  RECSYS_OPS_INLINE void prefetch_row(int64_t index, int64_t column, int64_t columns) const {
    const uintptr_t start =
        reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(index * row_stride + column) * sizeof(T);
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
    prefetch(reinterpret_cast<const void*>(start), bytes);
    if (split_lines) {
      __builtin_prefetch(reinterpret_cast<const void*>(start + bytes - 1));
    }
  }

  template <int LANES>
  RECSYS_OPS_INLINE auto load_at(const T* row, int lane) const {
    return load<LANES>(row + lane * (STRIDED ? column_stride : 1));
  }
};

template <class T, class Index, bool STRIDED, bool WEIGHTED>
struct SumBlock {
  using A = Accumulate<T>;
  const Entries<T, Index, STRIDED>& entries;
  const T* per_sample_weights;
  bool mean;
  T* out;
  bool& good;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    Vector<A, LANES> total[VECTORS] = {};
    int64_t live = 0;
    const bool accepted = entries.for_each(column, LANES * VECTORS, [&](const T* row, int64_t i) __attribute__((always_inline)) {
      ++live;
      A weight = 1;
      if constexpr (WEIGHTED) {
        weight = load<1>(per_sample_weights + i)[0];
      }
      for (int v = 0; v < VECTORS; ++v) {
        const auto term = entries.template load_at<LANES>(row, v * LANES);
        total[v] += WEIGHTED ? term * weight : term;
      }
    });
    good &= accepted;
    const A scale = mean && live > 0 ? A{1} / static_cast<A>(live) : A{1};
    for (int v = 0; v < VECTORS; ++v) {
      store<LANES>(out + column + v * LANES, total[v] * scale);
    }
  }
};

template <class T, class Index, bool STRIDED>
struct MaxBlock {
  using A = Accumulate<T>;
  const Entries<T, Index, STRIDED>& entries;
  T* out;
  int32_t* argmax;
  bool& good;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    using Positions = Vector<IntegerLike<A>, LANES>;
    Vector<A, LANES> best[VECTORS] = {};
    Positions at[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      at[v] = Positions{} - 1;
    }
    bool empty = true;
    const bool accepted = entries.for_each(column, LANES * VECTORS, [&](const T* row, int64_t i) __attribute__((always_inline)) {
      const Positions here = Positions{} + static_cast<IntegerLike<A>>(i - entries.begin);
      for (int v = 0; v < VECTORS; ++v) {
        const auto candidate = entries.template load_at<LANES>(row, v * LANES);
        const auto higher = (candidate > best[v]) | (empty ? Positions{} - 1 : Positions{});
        best[v] = higher ? candidate : best[v];
        at[v] = higher ? here : at[v];
      }
      empty = false;
    });
    good &= accepted;
    for (int v = 0; v < VECTORS; ++v) {
      store<LANES>(out + column + v * LANES, best[v]);
      const auto narrow = __builtin_convertvector(at[v], Vector<int32_t, LANES>);
      __builtin_memcpy(argmax + column + v * LANES, &narrow, sizeof(narrow));
    }
  }
};

// Calls pool(entries, bag) for each bag that is well formed.
template <class T, class Index, bool STRIDED, class F>
bool for_bags(const Table& table, const Bags& bags, int64_t first, int64_t last, const F& pool) {
  Entries<T, Index, STRIDED> entries(table, bags);
  entries.prefetch_end = first < last && bags.well_formed(last - 1) ? bags.end(last - 1) : 0;
  for (int64_t bag = first; bag < last; ++bag) {
    if (!bags.well_formed(bag)) {
      return false;
    }
    entries.begin = bags.begin(bag);
    entries.end = bags.end(bag);
    pool(entries, bag);
  }
  return true;
}

template <class T, class Index, bool STRIDED>
bool sum_bags_of(
    bool mean, const Table& table, const Bags& bags, const T* per_sample_weights, T* out, int64_t first, int64_t last) {
  constexpr int lanes = STRIDED ? 1 : full_lanes<Accumulate<T>>;
  bool good = true;
  const bool complete = for_bags<T, Index, STRIDED>(table, bags, first, last, [&](const auto& entries, int64_t bag) {
    T* to = out + bag * table.dim;
    if (per_sample_weights) {
      for_each_block<lanes, 8>(
          table.dim, SumBlock<T, Index, STRIDED, true>{entries, per_sample_weights, mean, to, good});
    } else {
      for_each_block<lanes, 8>(table.dim, SumBlock<T, Index, STRIDED, false>{entries, nullptr, mean, to, good});
    }
  });
  return good && complete;
}

template <class T, class Index, bool STRIDED>
bool max_bags_of(const Table& table, const Bags& bags, T* out, int32_t* argmax, int64_t first, int64_t last) {
  constexpr int lanes = STRIDED ? 1 : full_lanes<Accumulate<T>>;
  bool good = true;
  const bool complete = for_bags<T, Index, STRIDED>(table, bags, first, last, [&](const auto& entries, int64_t bag) {
    const int64_t to = bag * table.dim;
    for_each_block<lanes, 4>(table.dim, MaxBlock<T, Index, STRIDED>{entries, out + to, argmax + to, good});
  });
  return good && complete;
}

// The dot product of a row with `with` [dim].
template <int LANES, class Entries, class T>
RECSYS_OPS_INLINE Accumulate<T> dot(const Entries& entries, const T* row, const T* with, int64_t dim) {
  using A = Accumulate<T>;
  Vector<A, LANES> partial{};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    partial += entries.template load_at<LANES>(row, d) * load<LANES>(with + d);
  }
  A total = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    total += partial[lane];
  }
  for (; d < dim; ++d) {
    total += entries.template load_at<1>(row, d)[0] * load<1>(with + d)[0];
  }
  return total;
}

template <class T, class Index, bool STRIDED>
bool dot_bags_of(
    bool mean, const Table& table, const Bags& bags, const T* with, T* out, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  constexpr int lanes = STRIDED ? 1 : full_lanes<A>;
  bool good = true;
  const bool complete = for_bags<T, Index, STRIDED>(table, bags, first, last, [&](const auto& entries, int64_t bag) {
    int64_t live = 0;
    for (int64_t i = entries.begin; i < entries.end; ++i) {
      const bool counts = bags.live(entries.indices[i]);
      live += counts;
      if (!counts) {
        store<1>(out + i, Vector<A, 1>{});
      }
    }
    const A scale = mean && live > 0 ? A{1} / static_cast<A>(live) : A{1};
    good &= entries.for_each(0, table.dim, [&](const T* row, int64_t i) __attribute__((always_inline)) {
      store<1>(out + i, Vector<A, 1>{dot<lanes>(entries, row, with + bag * table.dim, table.dim) * scale});
    });
  });
  return good && complete;
}

// Calls kernel<T, Index, STRIDED>(arguments...) as the table and the indices want it.
#define RECSYS_OPS_POOL(KERNEL, ...)                                                                         \
  const bool strided = table.column_stride != 1 && table.dim > 1;                                            \
  const auto pool = strided ? (bags.indices.wide ? KERNEL<T, int64_t, true> : KERNEL<T, int32_t, true>)      \
                            : (bags.indices.wide ? KERNEL<T, int64_t, false> : KERNEL<T, int32_t, false>);   \
  return pool(__VA_ARGS__)

template <class T>
bool sum_bags(
    bool mean, const Table& table, const Bags& bags, const T* per_sample_weights, T* out, int64_t first, int64_t last) {
  RECSYS_OPS_POOL(sum_bags_of, mean, table, bags, per_sample_weights, out, first, last);
}

template <class T>
bool max_bags(const Table& table, const Bags& bags, T* out, int32_t* argmax, int64_t first, int64_t last) {
  RECSYS_OPS_POOL(max_bags_of, table, bags, out, argmax, first, last);
}

template <class T>
bool dot_bags(bool mean, const Table& table, const Bags& bags, const T* with, T* out, int64_t first, int64_t last) {
  RECSYS_OPS_POOL(dot_bags_of, mean, table, bags, with, out, first, last);
}

template <class T>
constexpr BagPooling<T> kernels = {sum_bags<T>, max_bags<T>, dot_bags<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(BagPooling, bag_pooling, kernels)

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
