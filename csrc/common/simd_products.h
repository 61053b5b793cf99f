// Products of small matrices in registers and first-level cache; included by sources compiled once per
// SIMD level.
#pragma once

#include <algorithm>

#include "simd_math.h"

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

// Rows and vectors of the result that are held in registers: of 16 or 32 of these, some must be left.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int tile_rows = 4;
#else
constexpr int tile_rows = 8;
#endif
constexpr int tile_vectors = 2;

// How the left matrix A lies in memory: A(m, k) = a[m * stride + k], or a[k * stride + m].
enum class Left { by_row, by_column };

template <Left LEFT, int ROWS, int VECTORS, class A>
RECSYS_OPS_INLINE void multiply_tile(
    const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride, bool add) {
  constexpr int lanes = full_lanes<A>;
  using V = Vector<A, lanes>;
  V sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      sum[m][v] = add ? load<lanes>(c + m * c_stride + v * lanes) : V{};
    }
  }
  const int64_t row = LEFT == Left::by_row ? a_stride : 1, step = LEFT == Left::by_row ? 1 : a_stride;
  const A* of_row[ROWS];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    of_row[m] = a + m * row;
  }
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    V right[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      right[v] = load<lanes>(b + v * lanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const V left = broadcast<lanes>(of_row[m][k * step]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) {
        sum[m][v] = multiply_add<lanes, A>(left, right[v], sum[m][v]);
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

template <Left LEFT, int ROWS, int VECTORS, class A>
RECSYS_OPS_INLINE void multiply_last_rows(
    int64_t rows, const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride,
    bool add) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      return multiply_tile<LEFT, ROWS, VECTORS>(a, a_stride, b, b_stride, depth, c, c_stride, add);
    }
    multiply_last_rows<LEFT, ROWS - 1, VECTORS>(rows, a, a_stride, b, b_stride, depth, c, c_stride, add);
  }
}

template <Left LEFT, int VECTORS, class A>
void multiply_strip(
    int64_t rows, const A* a, int64_t a_stride, const A* b, int64_t b_stride, int64_t depth, A* c, int64_t c_stride,
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

// C [rows, vectors * lanes] = A [rows, depth] B [depth, vectors * lanes], or that added to C.
template <Left LEFT, class A>
RECSYS_OPS_INLINE void multiply(
    int64_t rows, int64_t vectors, int64_t depth, const A* a, int64_t a_stride, const A* b, int64_t b_stride, A* c,
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
