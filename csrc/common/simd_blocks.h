// Rows of any length in blocks of registers; included by sources compiled once per SIMD level.
#pragma once

#include <type_traits>

#include "simd.h"

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

// Calls block.run<LANES, N>(column) for N = VECTORS and then its halves, so that every column from
// `column` to dim is covered. A last block that would pass the end starts earlier instead: its
// columns are computed twice, alike.
template <int LANES, int VECTORS, class Block>
RECSYS_OPS_INLINE void for_each_block(int64_t dim, const Block& block, int64_t column = 0) {
  for (; dim - column >= LANES * VECTORS; column += LANES * VECTORS) {
    block.template run<LANES, VECTORS>(column);
  }
  if constexpr (VECTORS > 1) {
    for_each_block<LANES, VECTORS / 2>(dim, block, column);
  } else if (column == dim) {
    return;
  } else if (column > 0) {
    block.template run<LANES, 1>(dim - LANES);
  } else if constexpr (LANES > 1) {
    for_each_block<LANES / 2, 1>(dim, block);
  }
}

// Prefetches what vector v of a block will read of a row, where a cache line starts. Called between
// the loads of another row: a row's lines asked for at once hold up the loads behind them.
template <int LANES, class T>
RECSYS_OPS_INLINE void prefetch_vector(const T* row, int v) {
  if (v * LANES * sizeof(T) % 64 == 0) {
    __builtin_prefetch(row + v * LANES);
  }
}

// An integer as wide as A, so that comparisons of A select lanes of it.
template <class A>
using IntegerLike = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <int LANES, class A>
inline Vector<IntegerLike<A>, LANES> load_positions(const int32_t* from) {
  return __builtin_convertvector(load_raw<LANES>(from), Vector<IntegerLike<A>, LANES>);
}

}  // namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL
