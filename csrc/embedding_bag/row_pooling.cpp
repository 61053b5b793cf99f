// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "row_pooling.h"

#include "../common/simd_blocks.h"

namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL {
namespace {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

enum class Terms { plain, weighted, where };

template <class T, Terms TERMS>
struct SumBlock {
  using A = Accumulate<T>;
  const T* const* rows;
  const A* weights;
  const int32_t* const* argmax;
  const int32_t* positions;
  int64_t n;
  const A* carry;
  A* sum;
  A scale;
  T* out;

  template <int LANES, int VECTORS>
  void run(int64_t column) const {
    Vector<A, LANES> total[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      total[v] = carry ? load<LANES>(carry + column + v * LANES) : Vector<A, LANES>{};
    }
    for (int64_t i = 0; i < n; ++i) {
      const T* row = rows[i] + column;
      for (int v = 0; v < VECTORS; ++v) {
        const auto term = load<LANES>(row + v * LANES);
        if constexpr (TERMS == Terms::weighted) {
          total[v] += term * weights[i];
        } else if constexpr (TERMS == Terms::where) {
          const auto at = load_positions<LANES, A>(argmax[i] + column + v * LANES);
          total[v] += at == positions[i] ? term : Vector<A, LANES>{};
        } else {
          total[v] += term;
        }
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      if (out) {
        store<LANES>(out + column + v * LANES, total[v] * scale);
      } else {
        store<LANES>(sum + column + v * LANES, total[v]);
      }
    }
  }
};

template <class T>
void sum_rows(
    const T* const* rows,
    const Accumulate<T>* weights,
    int64_t n,
    int64_t dim,
    const Accumulate<T>* carry,
    Accumulate<T>* sum,
    Accumulate<T> scale,
    T* out) {
  constexpr int lanes = full_lanes<Accumulate<T>>;
  if (weights) {
    for_each_block<lanes, 8>(
        dim, SumBlock<T, Terms::weighted>{rows, weights, nullptr, nullptr, n, carry, sum, scale, out});
  } else {
    for_each_block<lanes, 8>(
        dim, SumBlock<T, Terms::plain>{rows, nullptr, nullptr, nullptr, n, carry, sum, scale, out});
  }
}

template <class T>
void sum_rows_where(
    const T* const* rows,
    const int32_t* const* argmax,
    const int32_t* positions,
    int64_t n,
    int64_t dim,
    const Accumulate<T>* carry,
    Accumulate<T>* sum,
    Accumulate<T> scale,
    T* out) {
  for_each_block<full_lanes<Accumulate<T>>, 8>(
      dim, SumBlock<T, Terms::where>{rows, nullptr, argmax, positions, n, carry, sum, scale, out});
}

template <class T>
void dot_rows(
    const T* const* rows, int64_t n, int64_t dim, const T* with, Accumulate<T> scale, Accumulate<T>* out) {
  using A = Accumulate<T>;
  constexpr int lanes = full_lanes<A>;
  for (int64_t i = 0; i < n; ++i) {
    Vector<A, lanes> partial{};
    int64_t d = 0;
    for (; d + lanes <= dim; d += lanes) {
      partial += load<lanes>(rows[i] + d) * load<lanes>(with + d);
    }
    A total = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      total += partial[lane];
    }
    for (; d < dim; ++d) {
      total += load<1>(rows[i] + d)[0] * load<1>(with + d)[0];
    }
    out[i] = total * scale;
  }
}

template <class T>
constexpr RowPooling<T> kernels = {sum_rows<T>, sum_rows_where<T>, dot_rows<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(RowPooling, row_pooling, kernels)

}  // namespace recsys_ops::embedding_bag::RECSYS_OPS_SIMD_LEVEL
