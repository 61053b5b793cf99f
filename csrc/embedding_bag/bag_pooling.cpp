// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "bag_pooling.h"

#include "bag_blocks.h"

namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL {
namespace {

// The dot product of a row with a row of `with`.
template <int LANES, class Entries, class T>
RECSYS_OPS_INLINE Accumulate<T> dot(const Entries& entries, const T* row, const Rows& with, int64_t from, int64_t dim) {
  using A = Accumulate<T>;
  Vector<A, LANES> partial{};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    partial += entries.template load_at<LANES>(row, d) * load_as<LANES, A>(with.dtype, with.data, from + d);
  }
  A total = sum_of<LANES, A>(partial);
  for (; d < dim; ++d) {
    total += entries.template load_at<1>(row, d)[0] * load_as<1, A>(with.dtype, with.data, from + d)[0];
  }
  return total;
}

template <class T, class Index, Layout LAYOUT>
bool dot_bags_of(
    bool mean, const Table& table, const Bags& bags, const Rows& with, const Rows& out, int64_t first, int64_t last) {
  using A = Accumulate<T>;
  constexpr int lanes = LAYOUT == Layout::strided ? 1 : full_lanes<A>;
  bool good = true;
  const bool complete = for_strips<T, Index, LAYOUT, lanes>(table, bags, first, last, [&](const auto& entries) {
    for (int64_t bag = entries.first; bag < entries.last; ++bag) {
      int64_t live = 0;
      for (int64_t i = entries.begin(bag); i < entries.end(bag); ++i) {
        live += bags.live(entries.indices[i]);
      }
      const A scale = mean && live > 0 ? A{1} / static_cast<A>(live) : A{1};
      good &= entries.for_each(
          bag, 0, [&](const T* row, const T* ahead, int64_t i, int64_t) __attribute__((always_inline)) {
            prefetch(ahead, table.dim * sizeof(T));
            const A product = dot<lanes>(entries, row, with, bag * with.stride, table.dim) * scale;
            const auto before = load_as<1, A>(out.dtype, out.data, i * out.stride);
            store_as<1>(out.dtype, out.data, i * out.stride, before + product);
          });
    }
  });
  return good && complete;
}

template <class T>
bool dot_bags(
    bool mean, const Table& table, const Bags& bags, const Rows& with, const Rows& out, int64_t first, int64_t last) {
  RECSYS_OPS_POOL(dot_bags_of, mean, table, bags, with, out, first, last);
}

template <class T>
constexpr BagPooling<T> kernels = {sum_bags<T>, max_bags<T>, dot_bags<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(BagPooling, bag_pooling, kernels)

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
