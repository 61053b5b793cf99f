// Bags pooled block by block of columns; included by sources compiled once per SIMD level.
#pragma once

#include "../common/simd_blocks.h"
#include "../common/simd_codes.h"
#include "bags.h"

namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

constexpr int64_t strip = 32;  // bags that are pooled block by block

// Rows that begin at cache lines, rows that do not, and rows whose elements are apart.
enum class Layout { aligned, unaligned, strided };

inline Layout layout_of(const Table& table, int64_t element_size) {
  if (table.column_stride != 1 && table.dim > 1) {
    return Layout::strided;
  }
  const auto start = reinterpret_cast<uintptr_t>(table.data) | static_cast<uintptr_t>(table.row_stride * element_size);
  return start % 64 == 0 ? Layout::aligned : Layout::unaligned;
}

// A strip of bags, entry after entry, with the rows of those ahead on their way.
template <class T, class Index, Layout LAYOUT>
struct Entries {
  const T* data;
  int64_t row_stride, column_stride;
  const float* scales;
  const Index* indices;
  int64_t num_embeddings, padding_idx;
  bool drop_invalid;
  int64_t prefetch_end;  // entries from here on belong to others
  int64_t first, last;   // bags of the strip
  int64_t starts[strip + 1];

  Entries(const Table& table, const Bags& bags)
      : data(static_cast<const T*>(table.data)),
        row_stride(table.row_stride),
        column_stride(table.column_stride),
        scales(table.scales),
        indices(static_cast<const Index*>(bags.indices.data)),
        num_embeddings(bags.num_embeddings),
        padding_idx(bags.padding_idx),
        drop_invalid(bags.drop_invalid),
        prefetch_end(0) {}

  // From one element of a row to the next.
  RECSYS_OPS_INLINE int64_t step() const { return LAYOUT == Layout::strided ? column_stride : 1; }

  RECSYS_OPS_INLINE int64_t begin(int64_t bag) const { return starts[bag - first]; }
  RECSYS_OPS_INLINE int64_t end(int64_t bag) const { return starts[bag - first + 1]; }

  // Calls f(row, ahead, i, index) for each live entry of a bag, with the part of its row that starts
  // at `column`, and that of a later entry's, to prefetch; false where an entry is refused. (To
  // prefetch for entries that are not live as well slows down all others by 10 %.)
  template <class F>
  RECSYS_OPS_INLINE bool for_each(int64_t bag, int64_t column, const F& f) const {
    bool good = true;
    const T* from = data + units<T>(column) * step();
    const int64_t stop_prefetch = prefetch_end - prefetch_ahead;
    for (int64_t i = begin(bag); i < end(bag); ++i) {
      const int64_t index = indices[i];
      const int64_t later = indices[i < stop_prefetch ? i + prefetch_ahead : i];
      const T* ahead = address(from, later);
      const bool valid = static_cast<uint64_t>(index) < static_cast<uint64_t>(num_embeddings);
      if (valid && index != padding_idx) {
        if constexpr (is_code<T>) {
          __builtin_prefetch(scales + 2 * static_cast<uint64_t>(later));
        }
        f(from + index * row_stride, ahead, i, index);
      } else {
        good &= valid | drop_invalid;
      }
    }
    return good;
  }

  // Of any index: prefetching a bad address does nothing.
  RECSYS_OPS_INLINE const T* address(const T* from, int64_t index) const {
    return reinterpret_cast<const T*>(
        reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(index) * (row_stride * sizeof(T)));
  }

  template <int LANES>
  RECSYS_OPS_INLINE auto load_at(const T* row, int64_t lane) const {
    if constexpr (std::is_same_v<T, Code4>) {
      return load<LANES>(row, lane);
    } else {
      return load<LANES>(row + lane * step());
    }
  }

  // What is loaded of row `index` as numbers. Codes are scaled and moved one by one: were they summed
  // first, much would cancel between them and the sum of their rows' offsets.
  template <class V>
  RECSYS_OPS_INLINE V decoded(V loaded, int64_t index) const {
    if constexpr (is_code<T>) {
      return loaded * scales[2 * index] + scales[2 * index + 1];
    } else {
      return loaded;
    }
  }

  // Prefetches what a block of so many columns will read of the row ahead after its vectors' lines.
  template <int COLUMNS>
  RECSYS_OPS_INLINE void prefetch_rest(const T* ahead) const {
    if (LAYOUT == Layout::unaligned) {
      __builtin_prefetch(ahead + units<T>(COLUMNS) - 1);
    }
  }
};

template <class T, class Index, Layout LAYOUT, bool WEIGHTED>
struct SumBlock {
  using A = Accumulate<T>;
  const Entries<T, Index, LAYOUT>& entries;
  const Factors& factors;
  bool mean;
  const Rows& out;
  bool& good;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    for (int64_t bag = entries.first; bag < entries.last; ++bag) {
      Vector<A, LANES> total[VECTORS] = {};
      int64_t live = 0;
      good &= entries.for_each(
          bag, column, [&](const T* row, const T* ahead, int64_t i, int64_t index) __attribute__((always_inline)) {
            ++live;
            A weight = 1;
            if constexpr (WEIGHTED) {
              weight = load_as<1, A>(factors.dtype, factors.data, i)[0];
            }
            for (int v = 0; v < VECTORS; ++v) {
              const auto loaded = entries.template load_at<LANES>(row, column_in_unit<T>(column) + v * LANES);
              const auto term = entries.decoded(loaded, index);
              prefetch_vector<LANES>(ahead, v);
              total[v] += WEIGHTED ? term * weight : term;
            }
            entries.template prefetch_rest<LANES * VECTORS>(ahead);
          });
      const A scale = mean && live > 0 ? A{1} / static_cast<A>(live) : A{1};
      for (int v = 0; v < VECTORS; ++v) {
        store_as<LANES>(out.dtype, out.data, bag * out.stride + column + v * LANES, total[v] * scale);
      }
    }
  }
};

template <class T, class Index, Layout LAYOUT>
struct MaxBlock {
  using A = Accumulate<T>;
  const Entries<T, Index, LAYOUT>& entries;
  const Rows& out;
  int32_t* argmax;
  bool& good;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    using Positions = Vector<IntegerLike<A>, LANES>;
    for (int64_t bag = entries.first; bag < entries.last; ++bag) {
      Vector<A, LANES> best[VECTORS] = {};
      Positions at[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        at[v] = Positions{} - 1;
      }
      bool empty = true;
      good &= entries.for_each(
          bag, column, [&](const T* row, const T* ahead, int64_t i, int64_t index) __attribute__((always_inline)) {
            const Positions here = Positions{} + static_cast<IntegerLike<A>>(i - entries.begin(bag));
            const auto candidate = [&](int v) __attribute__((always_inline)) {
              const auto loaded = entries.template load_at<LANES>(row, column_in_unit<T>(column) + v * LANES);
              prefetch_vector<LANES>(ahead, v);
              return entries.decoded(loaded, index);
            };
            for (int v = 0; empty && v < VECTORS; ++v) {
              best[v] = candidate(v);
              at[v] = here;
            }
            for (int v = 0; !empty && v < VECTORS; ++v) {
              const auto value = candidate(v);
              const auto higher = value > best[v];
              best[v] = higher ? value : best[v];
              at[v] = higher ? here : at[v];
            }
            entries.template prefetch_rest<LANES * VECTORS>(ahead);
            empty = false;
          });
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t to = bag * out.stride + column + v * LANES;
        store_as<LANES>(out.dtype, out.data, to, best[v]);
        if (argmax) {
          const auto narrow = __builtin_convertvector(at[v], Vector<int32_t, LANES>);
          __builtin_memcpy(argmax + to, &narrow, sizeof(narrow));
        }
      }
    }
  }
};

// Calls pool(entries) for strips of the bags; false where one is not well formed. Where a row is
// more than a block, a strip is one bag, so that what is next to each other is read together.
template <class T, class Index, Layout LAYOUT, int BLOCK, class F>
bool for_strips(const Table& table, const Bags& bags, int64_t first, int64_t last, const F& pool) {
  Entries<T, Index, LAYOUT> entries(table, bags);
  entries.prefetch_end = first < last && bags.well_formed(last - 1) ? bags.end(last - 1) : 0;
  const int64_t length = table.dim <= BLOCK ? strip : 1;
  for (entries.first = first; entries.first < last; entries.first = entries.last) {
    entries.last = entries.first + length < last ? entries.first + length : last;
    for (int64_t bag = entries.first; bag < entries.last; ++bag) {
      if (!bags.well_formed(bag)) {
        return false;
      }
      entries.starts[bag - entries.first] = bags.begin(bag);
    }
    entries.starts[entries.last - entries.first] = bags.end(entries.last - 1);
    pool(entries);
  }
  return true;
}

template <class T, class Index, Layout LAYOUT>
bool sum_bags_of(
    bool mean, const Table& table, const Bags& bags, const Factors& factors, const Rows& out, int64_t first,
    int64_t last) {
  constexpr int lanes = LAYOUT == Layout::strided ? 1 : full_lanes<Accumulate<T>>;
  bool good = true;
  const bool complete = for_strips<T, Index, LAYOUT, 8 * lanes>(table, bags, first, last, [&](const auto& entries) {
    if (factors.data) {
      for_each_block<lanes, 8>(table.dim, SumBlock<T, Index, LAYOUT, true>{entries, factors, mean, out, good});
    } else {
      for_each_block<lanes, 8>(table.dim, SumBlock<T, Index, LAYOUT, false>{entries, factors, mean, out, good});
    }
  });
  return good && complete;
}

template <class T, class Index, Layout LAYOUT>
bool max_bags_of(
    const Table& table, const Bags& bags, const Rows& out, int32_t* argmax, int64_t first, int64_t last) {
  constexpr int lanes = LAYOUT == Layout::strided ? 1 : full_lanes<Accumulate<T>>;
  bool good = true;
  const bool complete = for_strips<T, Index, LAYOUT, 4 * lanes>(table, bags, first, last, [&](const auto& entries) {
    for_each_block<lanes, 4>(table.dim, MaxBlock<T, Index, LAYOUT>{entries, out, argmax, good});
  });
  return good && complete;
}

// Calls kernel<T, Index, LAYOUT>(arguments...) as the table and the indices want it.
#define RECSYS_OPS_POOL(KERNEL, ...)                                                      \
  switch (layout_of(table, sizeof(T))) {                                                  \
    case Layout::aligned: RECSYS_OPS_POOL_AS(KERNEL, Layout::aligned, __VA_ARGS__);       \
    case Layout::unaligned: RECSYS_OPS_POOL_AS(KERNEL, Layout::unaligned, __VA_ARGS__);   \
    default: RECSYS_OPS_POOL_AS(KERNEL, Layout::strided, __VA_ARGS__);                    \
  }
#define RECSYS_OPS_POOL_AS(KERNEL, LAYOUT, ...)                                           \
  return bags.indices.wide ? KERNEL<T, int64_t, LAYOUT>(__VA_ARGS__) : KERNEL<T, int32_t, LAYOUT>(__VA_ARGS__)

template <class T>
bool sum_bags(
    bool mean, const Table& table, const Bags& bags, const Factors& factors, const Rows& out, int64_t first,
    int64_t last) {
  RECSYS_OPS_POOL(sum_bags_of, mean, table, bags, factors, out, first, last);
}

template <class T>
bool max_bags(const Table& table, const Bags& bags, const Rows& out, int32_t* argmax, int64_t first, int64_t last) {
  RECSYS_OPS_POOL(max_bags_of, table, bags, out, argmax, first, last);
}

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
