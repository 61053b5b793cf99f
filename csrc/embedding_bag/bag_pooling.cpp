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

  // Calls f(row + column, i) for each live entry of the bag, whose COLUMNS columns it will read;
  // false where an entry is refused.
  template <int COLUMNS, class F>
  RECSYS_OPS_INLINE bool for_each(int64_t column, const F& f) const {
    bool good = true;
    const int64_t stop_prefetch = prefetch_end - prefetch_ahead;
    for (int64_t i = begin; i < end; ++i) {
      if (i < stop_prefetch) {
        prefetch<COLUMNS>(indices[i + prefetch_ahead], column);
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
  template <int COLUMNS>
  RECSYS_OPS_INLINE void prefetch(int64_t index, int64_t column) const {
    constexpr int bytes = COLUMNS * static_cast<int>(sizeof(T));
    const uintptr_t start =
        reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(index * row_stride + column) * sizeof(T);
    for (int byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(start + byte));
    }
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
    const bool accepted = entries.template for_each<LANES * VECTORS>(column, [&](const T* row, int64_t i) __attribute__((always_inline)) {
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
    const bool accepted = entries.template for_each<LANES * VECTORS>(column, [&](const T* row, int64_t i) __attribute__((always_inline)) {
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

template <class T>
bool sum_bags(
    bool mean, const Table& table, const Bags& bags, const T* per_sample_weights, T* out, int64_t first, int64_t last) {
  const auto pool = table.column_stride != 1 && table.dim > 1
                        ? (bags.indices.wide ? sum_bags_of<T, int64_t, true> : sum_bags_of<T, int32_t, true>)
                        : (bags.indices.wide ? sum_bags_of<T, int64_t, false> : sum_bags_of<T, int32_t, false>);
  return pool(mean, table, bags, per_sample_weights, out, first, last);
}

template <class T>
bool max_bags(const Table& table, const Bags& bags, T* out, int32_t* argmax, int64_t first, int64_t last) {
  const auto pool = table.column_stride != 1 && table.dim > 1
                        ? (bags.indices.wide ? max_bags_of<T, int64_t, true> : max_bags_of<T, int32_t, true>)
                        : (bags.indices.wide ? max_bags_of<T, int64_t, false> : max_bags_of<T, int32_t, false>);
  return pool(table, bags, out, argmax, first, last);
}

template <class T>
constexpr BagPooling<T> kernels = {sum_bags<T>, max_bags<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(BagPooling, bag_pooling, kernels)

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
