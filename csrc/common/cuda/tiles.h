// How rows of a matrix are divided among groups of lanes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "group.cuh"
#include "pack.cuh"

namespace recsys_ops::cuda {

constexpr int fewest_lanes = 8;  // as many as there are rows in flight, so that one vote covers them

// A group takes lanes * elements columns of a row; blocks of these make the row.
struct Tiles {
  int elements;  // that a lane moves at once
  int lanes;
  int64_t blocks;
};

// A row, and where in it a lane begins.
struct Place {
  int64_t row;
  int64_t column;
};

// Tasks of one row follow each other, so that its pieces are wanted at about the same time.
__device__ inline Place place_of(int64_t task, const Tiles& tiles, int elements, int lane) {
  const int64_t row = tiles.blocks == 1 ? task : task / tiles.blocks;
  return {row, ((task - row * tiles.blocks) * tiles.lanes + lane) * elements};
}

// The widest words of T that all rows of the matrices are aligned to, but not so wide that lanes
// would be idle. The matrices are of dim columns; row_stride and column_stride are those of one of them.
template <class T, class... Elements>
Tiles tile_rows(
    int64_t dim, int64_t row_stride, int64_t column_stride, int64_t most_elements, const Elements*... matrices) {
  int64_t elements = std::min<int64_t>(most_elements, widest_word / sizeof(T));
  const auto is_aligned = [&](const void* matrix, int64_t element_bytes) {
    return reinterpret_cast<uintptr_t>(matrix) % std::min<int64_t>(elements * element_bytes, widest_word) == 0;
  };
  while (elements > 1 &&
         !(column_stride == 1 && row_stride % elements == 0 && dim % elements == 0 &&
           dim >= elements * fewest_lanes && (is_aligned(matrices, sizeof(Elements)) && ...))) {
    elements /= 2;
  }
  int lanes = fewest_lanes;
  while (lanes < warp_lanes && lanes * elements < dim) {
    lanes *= 2;
  }
  return {static_cast<int>(elements), lanes, (dim + lanes * elements - 1) / (lanes * elements)};
}

// Calls f with the elements as a constant of the type.
template <class T, class F>
void dispatch_elements(const Tiles& tiles, const F& f) {
  constexpr int widest = widest_word / sizeof(T);
  if (tiles.elements == widest) {
    return f(std::integral_constant<int, widest>());
  }
  if constexpr (widest >= 4) {
    if (tiles.elements == widest / 2) {
      return f(std::integral_constant<int, widest / 2>());
    }
  }
  if constexpr (widest >= 8) {
    if (tiles.elements == widest / 4) {
      return f(std::integral_constant<int, widest / 4>());
    }
  }
  return f(std::integral_constant<int, 1>());
}

}  // namespace recsys_ops::cuda
