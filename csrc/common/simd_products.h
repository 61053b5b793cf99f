// Products of small matrices in registers and first-level cache; included by sources compiled once per
// SIMD level.
#pragma once

#include <algorithm>

#include "simd_math.h"

namespace recsys_ops {

// Two neighbours of bfloat16, the first in the low half: products of pairs are added two at a time.
struct Pair {
  uint32_t bits;
};

}  // namespace recsys_ops

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

// Rows and vectors of the result that are held in registers: of 16 or 32 of these, some must be left.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int tile_rows = 4;
#else
constexpr int tile_rows = 8;
#endif
constexpr int tile_vectors = 2;

// Numbers of the depth that an element of a matrix holds.
template <class E>
constexpr int packed = std::is_same_v<E, Pair> ? 2 : 1;

// sum + left * right of pairs, by an instruction that not every machine of the level has: the compiler is
// not told of it.
template <int LANES>
RECSYS_OPS_INLINE Vector<float, LANES> add_products_of_pairs(
    Pair left, Vector<uint32_t, LANES> right, Vector<float, LANES> sum) {
#if defined(__AVX512F__)
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(right), "v"(broadcast<LANES>(left.bits)));
#endif
  return sum;
}

// How the left matrix A lies in memory: A(m, k) = a[m * stride + k], or a[k * stride + m].
enum class Left { by_row, by_column };

template <Left LEFT, int ROWS, int VECTORS, class E, class A>
RECSYS_OPS_INLINE void multiply_tile(
    const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride, bool add) {
  constexpr int lanes = full_lanes<A>;
  using V = Vector<A, lanes>;
  using Right = Vector<std::conditional_t<std::is_same_v<E, Pair>, uint32_t, A>, lanes>;
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      sum[m][v] = add ? load<lanes>(c + m * c_stride + v * lanes) : V{};
    }
  }
  const int64_t row = LEFT == Left::by_row ? a_stride : 1, step = LEFT == Left::by_row ? 1 : a_stride;
  const E* of_row[ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    of_row[m] = a + m * row;
  }
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Right right[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      __builtin_memcpy(&right[v], b + v * lanes, sizeof(Right));
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const E left = of_row[m][k * step];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        if constexpr (std::is_same_v<E, Pair>) {
          sum[m][v] = add_products_of_pairs<lanes>(left, right[v], sum[m][v]);
        } else {
          sum[m][v] = multiply_add<lanes, A>(broadcast<lanes>(left), right[v], sum[m][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      store<lanes>(c + m * c_stride + v * lanes, sum[m][v]);
    }
  }
}

template <Left LEFT, int ROWS, int VECTORS, class E, class A>
RECSYS_OPS_INLINE void multiply_last_rows(
    int64_t rows, const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride,
    bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      return multiply_tile<LEFT, ROWS, VECTORS>(a, a_stride, b, b_stride, depth, c, c_stride, add);
    }
    multiply_last_rows<LEFT, ROWS - 1, VECTORS>(rows, a, a_stride, b, b_stride, depth, c, c_stride, add);
  }
}

template <Left LEFT, int VECTORS, class E, class A>
void multiply_strip(
    int64_t rows, const E* a, int64_t a_stride, const E* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride,
    bool add) {
  const int64_t step = LEFT == Left::by_row ? a_stride : 1;
  int64_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows) {
    multiply_tile<LEFT, tile_rows, VECTORS>(
        a + m * step, a_stride, b, b_stride, depth, c + m * c_stride, c_stride, add);
  }
  multiply_last_rows<LEFT, tile_rows - 1, VECTORS>(
      rows - m, a + m * step, a_stride, b, b_stride, depth, c + m * c_stride, c_stride, add);
}

// C [rows, vectors * lanes] = A [rows, depth] B [depth, vectors * lanes], or that added to C. Of pairs, depth
// and strides of A and B count pairs.
template <Left LEFT, class E, class A>
RECSYS_OPS_INLINE void multiply(
    int64_t rows, int64_t vectors, int64_t depth, const E* a, int64_t a_stride, const E* b, int64_t b_stride, A* c,
    int64_t c_stride, bool add) {
  constexpr int lanes = full_lanes<A>;
  int64_t v = 0;
  for (; v + tile_vectors <= vectors; v += tile_vectors) {
    multiply_strip<LEFT, tile_vectors>(
        rows, a, a_stride, b + v * lanes, b_stride, depth, c + v * lanes, c_stride, add);
  }
  if (v < vectors) {
    multiply_strip<LEFT, 1>(rows, a, a_stride, b + v * lanes, b_stride, depth, c + v * lanes, c_stride, add);
  }
}

}  // namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL
