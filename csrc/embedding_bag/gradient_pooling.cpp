// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "gradient_pooling.h"

#include "../common/simd_blocks.h"

namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL {
namespace {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

enum class Terms { plain, weighted, where };

// Sums the entries [begin, end), and writes the sum, scaled, to out.
template <class T, Terms TERMS, class Out>
struct SumBlock {
  using A = Accumulate<T>;
  const Gradient& gradient;
  const SortedEntries& entries;
  int64_t begin, end;
  int64_t prefetch_end;  // entries from here on are left to others
  A scale;
  Out* out;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    const T* output = static_cast<const T*>(gradient.output) + column;
    const A* factors = static_cast<const A*>(entries.factors);
    Vector<A, LANES> total[VECTORS] = {};
    for (int64_t e = begin; e < end; ++e) {
      const int64_t later = e < prefetch_end - prefetch_ahead ? e + prefetch_ahead : e;
      const T* ahead = output + entries.cell(entries.bag(entries.source(later)));
      const int64_t source = entries.source(e);
      const int64_t bag = entries.bag(source);
      const int64_t cell = entries.cell(bag);
      const T* row = output + cell;
      A weight = 1;
      if constexpr (TERMS == Terms::weighted) {
        weight = factors ? factors[source] : A{1};
        weight *= entries.bag_scale ? static_cast<A>(entries.bag_scale[bag]) : A{1};
      }
      for (int v = 0; v < VECTORS; ++v) {
        const auto term = load<LANES>(row + v * LANES);
        prefetch_vector<LANES>(ahead, v);
        if constexpr (TERMS == Terms::where) {
          const auto at = load_positions<LANES, A>(gradient.argmax + cell + column + v * LANES);
          const auto position = static_cast<IntegerLike<A>>(source - entries.offsets[bag]);
          total[v] += at == position ? term : Vector<A, LANES>{};
        } else if constexpr (TERMS == Terms::weighted) {
          total[v] += term * weight;
        } else {
          total[v] += term;
        }
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      store<LANES>(out + column + v * LANES, total[v] * scale);
    }
  }
};

template <class T, Terms TERMS>
bool write_runs_of(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t* rows, T* out) {
  using A = Accumulate<T>;
  const int64_t prefetch_end = entries.runs[last];
  bool all = true;
  for (int64_t run = first; run < last; ++run) {
    const int64_t begin = entries.runs[run], end = entries.runs[run + 1];
    const int64_t row = entries.row(begin);
    if (rows) {
      rows[run] = row;
    }
    if (end - begin > longest_run) {
      all = false;
      continue;
    }
    const A scale = gradient.scale<A>(end - begin);
    T* to = out + (rows ? run : row) * gradient.dim;
    for_each_block<full_lanes<A>, 8>(
        gradient.dim, SumBlock<T, TERMS, T>{gradient, entries, begin, end, prefetch_end, scale, to});
  }
  return all;
}

template <class T, Terms TERMS>
void sum_runs_of(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t prefetch_end,
    Accumulate<T>* sums) {
  using A = Accumulate<T>;
  for (int64_t run = first; run < last; ++run, sums += gradient.dim) {
    const int64_t begin = entries.runs[run], end = entries.runs[run + 1];
    if (end - begin <= longest_run) {
      for_each_block<full_lanes<A>, 8>(
          gradient.dim, SumBlock<T, TERMS, A>{gradient, entries, begin, end, prefetch_end, A{1}, sums});
    }
  }
}

template <class T, Terms TERMS>
void sum_entries_of(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, Accumulate<T>* sum) {
  using A = Accumulate<T>;
  for_each_block<full_lanes<A>, 8>(
      gradient.dim, SumBlock<T, TERMS, A>{gradient, entries, first, last, last, A{1}, sum});
}

Terms terms_of(const Gradient& gradient, const SortedEntries& entries) {
  if (gradient.argmax) {
    return Terms::where;
  }
  return entries.factors || entries.bag_scale ? Terms::weighted : Terms::plain;
}

template <class T>
bool write_runs(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t* rows, T* out) {
  switch (terms_of(gradient, entries)) {
    case Terms::where: return write_runs_of<T, Terms::where>(gradient, entries, first, last, rows, out);
    case Terms::weighted: return write_runs_of<T, Terms::weighted>(gradient, entries, first, last, rows, out);
    default: return write_runs_of<T, Terms::plain>(gradient, entries, first, last, rows, out);
  }
}

template <class T>
void sum_runs(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, int64_t prefetch_end,
    Accumulate<T>* sums) {
  switch (terms_of(gradient, entries)) {
    case Terms::where:
      return sum_runs_of<T, Terms::where>(gradient, entries, first, last, prefetch_end, sums);
    case Terms::weighted:
      return sum_runs_of<T, Terms::weighted>(gradient, entries, first, last, prefetch_end, sums);
    default:
      return sum_runs_of<T, Terms::plain>(gradient, entries, first, last, prefetch_end, sums);
  }
}

template <class T>
void sum_entries(
    const Gradient& gradient, const SortedEntries& entries, int64_t first, int64_t last, Accumulate<T>* sum) {
  switch (terms_of(gradient, entries)) {
    case Terms::where: return sum_entries_of<T, Terms::where>(gradient, entries, first, last, sum);
    case Terms::weighted: return sum_entries_of<T, Terms::weighted>(gradient, entries, first, last, sum);
    default: return sum_entries_of<T, Terms::plain>(gradient, entries, first, last, sum);
  }
}

template <class T>
constexpr GradientPooling<T> kernels = {write_runs<T>, sum_runs<T>, sum_entries<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(GradientPooling, gradient_pooling, kernels)

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
