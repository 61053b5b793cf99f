// Rows of any length in blocks of registers; included by sources compiled once per SIMD level.
#pragma once

#include <type_traits>

#include "simd.h"

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

// Calls block.run<LANES, VECTORS>(column), VECTORS at most MOST, so that every column of dim is
// covered. A last block that would pass the end starts earlier instead: its columns are computed
// twice, alike.
template <int LANES, int MOST, class Block>
RECSYS_OPS_INLINE void for_each_block(int64_t dim, const Block& block) {
  static_assert(MOST == 4 || MOST == 8, "expected 4 or 8 registers");
  if constexpr (LANES > 1) {
    if (dim < LANES) {
      return for_each_block<LANES / 2, MOST>(dim, block);
    }
  }
  int64_t column = 0;
  for (; dim - column >= MOST * LANES; column += MOST * LANES) {
    block.template run<LANES, MOST>(column);
  }
  switch ((dim - column) / LANES) {
    case 1: block.template run<LANES, 1>(column); break;
    case 2: block.template run<LANES, 2>(column); break;
    case 3: block.template run<LANES, 3>(column); break;
    default: break;
  }
  if constexpr (MOST == 8) {
    switch ((dim - column) / LANES) {
      case 4: block.template run<LANES, 4>(column); break;
      case 5: block.template run<LANES, 5>(column); break;
      case 6: block.template run<LANES, 6>(column); break;
      case 7: block.template run<LANES, 7>(column); break;
      default: break;
    }
  }
  if (dim % LANES != 0) {
    block.template run<LANES, 1>(dim - LANES);
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
