// Tiles of rows in shared memory, and the products of a warp's 16 rows with them. Sums are held as
// tensor cores hold them, in every type: a lane has columns 2t and 2t + 1 of every 8, of rows g and
// g + 8, where g = lane / 4 and t = lane % 4.
#pragma once

#include <cuda_pipeline.h>

#include "../common/cuda/group.cuh"
#include "../common/cuda/matrix.cuh"
#include "../common/cuda/pack.cuh"
#include "hstu_attention_cuda.h"

// Rows of a block and of what it goes through, if not what suits a GPU; tests lower them.
#ifndef RECSYS_OPS_ATTENTION_WARPS
#define RECSYS_OPS_ATTENTION_WARPS 4
#endif
#ifndef RECSYS_OPS_ATTENTION_TILE
#define RECSYS_OPS_ATTENTION_TILE 64
#endif

namespace recsys_ops::hstu_attention::cuda {

using recsys_ops::cuda::Pack;
using recsys_ops::cuda::warp_lanes;

// How rows of D columns of T are divided. A warp has 16 rows of a block, whose threads go through
// tiles of other rows; more of either would not fit in shared memory.
template <class T, int D>
struct Shape {
  static constexpr bool on_tensor_cores = sizeof(T) == 2;
  static constexpr int row_bytes = D * sizeof(T);
  static constexpr int most_warps = row_bytes <= 512 ? 4 : row_bytes <= 1024 ? 2 : 1;
  static constexpr int warps = most_warps < RECSYS_OPS_ATTENTION_WARPS ? most_warps : RECSYS_OPS_ATTENTION_WARPS;
  static constexpr int threads = warps * warp_lanes;
  static constexpr int block = warps * 16;
  static constexpr int largest_tile = row_bytes <= 128 ? 64 : row_bytes <= 256 ? 32 : row_bytes <= 1024 ? 16 : 8;
  static constexpr int tile = largest_tile < RECSYS_OPS_ATTENTION_TILE ? largest_tile : RECSYS_OPS_ATTENTION_TILE;
  static constexpr int together = 16 / sizeof(T);  // elements of a word
  static constexpr int stride = D + together;      // of rows in shared memory; so eight of them meet in no bank
  // Columns of a result that a block computes, as many as registers hold; and those of each of two.
  static constexpr int most_columns = on_tensor_cores ? 256 : 512 / sizeof(T);
  static constexpr int columns = D < most_columns ? D : most_columns;
  static constexpr int parts = D / columns;
  static constexpr int columns_of_two = D < most_columns / 2 ? D : most_columns / 2;
  static constexpr int parts_of_two = D / columns_of_two;
};

// N elements in shared memory as one word.
template <int N, class T>
__device__ Pack<T, N> read_word(const T* from) {
  using Word = typename recsys_ops::cuda::WordOf<N * sizeof(T)>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Pack<T, N> elements;
  memcpy(&elements, &word, sizeof(word));
  return elements;
}

template <int N, class T>
__device__ void write_word(T* to, const Pack<T, N>& elements) {
  using Word = typename recsys_ops::cuda::WordOf<N * sizeof(T)>::type;
  Word word;
  memcpy(&word, &elements, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

// Rows of a tile where scores depend on more than products: each takes many instructions.
template <class T, int D, bool EXTRAS>
constexpr int tile_of_scores = EXTRAS && Shape<T, D>::tile > 32 ? 32 : Shape<T, D>::tile;

template <class T>
struct Rows {
  static constexpr bool by_pieces = false;
  const T* data;  // of position 0
  int64_t row_stride, column_stride;
  int columns;
  bool wide;

  __device__ Rows(const Matrix& matrix, int64_t first, int64_t head)
      : data(static_cast<const T*>(matrix.data) + first * matrix.row_stride + head * matrix.head_stride),
        row_stride(matrix.row_stride),
        column_stride(matrix.column_stride),
        columns(matrix.columns),
        wide(matrix.wide) {}

  // A word of row i, or zeros.
  template <bool WIDE>
  __device__ void fetch(T* to, int i, int column, bool wanted) const {
    fetch_from<WIDE>(to, data + (wanted ? i * row_stride : 0), column, wanted);
  }

  template <bool WIDE>
  __device__ void fetch_from(T* to, const T* row, int column, bool wanted) const {
    if constexpr (WIDE) {
      const bool inside = wanted && column < columns;
      __pipeline_memcpy_async(to, inside ? row + column : data, 16, inside ? 0 : 16);
    } else {
#pragma unroll
      for (int x = 0; x < 16 / static_cast<int>(sizeof(T)); ++x) {
        to[x] = wanted && column + x < columns ? row[(column + x) * column_stride] : T{};
      }
    }
  }
};

// Rows [first, first + N), those from `end` on as zeros, to a tile in shared memory.
template <class T, int D, int N, class Source>
__device__ void load_tile(T* to, const Source& source, int first, int end) {
  using S = Shape<T, D>;
  constexpr int words = D / S::together;
  const auto fetch = [&](int word, auto wide) {
    const int row = word / words, column = word % words * S::together;
    source.template fetch<wide.value>(to + row * S::stride + column, first + row, column, first + row < end);
  };
  // Element by element, it is not worth more instructions.
  if (!Source::by_pieces && source.wide) {
#pragma unroll 4
    for (int word = threadIdx.x; word < N * words; word += S::threads) {
      fetch(word, std::bool_constant<!Source::by_pieces>());
    }
  } else {
#pragma unroll 1
    for (int word = threadIdx.x; word < N * words; word += S::threads) {
      fetch(word, std::false_type());
    }
  }
}

// A warp's 16 rows from shared memory to rows [first, first + 16) before `end`, C columns from
// `column` on.
template <class T, int D, int C>
__device__ void store_rows(
    const T* from, const Matrix& matrix, int64_t row, int64_t head, int first, int end, int column) {
  using S = Shape<T, D>;
  constexpr int words = C / S::together;
  T* to = static_cast<T*>(matrix.data) + row * matrix.row_stride + head * matrix.head_stride;
#pragma unroll 2
  for (int word = threadIdx.x % warp_lanes; word < 16 * words; word += warp_lanes) {
    const int i = word / words, within = word % words * S::together;
    if (first + i >= end || column + within >= matrix.columns) {
      continue;
    }
    T* at = to + (first + i) * matrix.row_stride + (column + within) * matrix.column_stride;
    const Pack<T, S::together> elements = read_word<S::together>(from + i * S::stride + within);
    if (matrix.wide) {
      recsys_ops::cuda::store(at, elements);
    } else {
      for (int x = 0; x < S::together && column + within + x < matrix.columns; ++x) {
        at[x * matrix.column_stride] = elements[x];
      }
    }
  }
}

// Sums of 16 rows and N columns.
template <class T, int N>
using Sums = Accumulate<T>[N / 8][4];

// The places of a warp and a lane in a block's rows.
struct Lane {
  int warp, lane, row, column;  // row is that of the first of two, column that of every 8

  __device__ Lane()
      : warp(threadIdx.x / warp_lanes),
        lane(threadIdx.x % warp_lanes),
        row(warp * 16 + lane / 4),
        column(lane % 4 * 2) {}
};

// A warp's 16 rows as what products take them from: shared memory, or if HELD registers.
template <class T, int D, bool HELD>
class Left {
 public:
  using S = Shape<T, D>;
  static constexpr bool held = HELD && S::on_tensor_cores;

  __device__ explicit Left(const T* rows) : rows(rows) {}

  // Once the rows have arrived.
  __device__ void hold() {
    if constexpr (held) {
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        load(fragments[d], d);
      }
    }
  }

  __device__ void get(unsigned (&fragment)[4], int d) const {
    if constexpr (held) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragment[i] = fragments[d][i];
      }
    } else {
      load(fragment, d);
    }
  }

  const T* const rows;

 private:
  __device__ void load(unsigned (&fragment)[4], int d) const {
    const int lane = threadIdx.x % warp_lanes;
    recsys_ops::cuda::load_matrices<false>(fragment, rows + lane % 16 * S::stride + lane / 16 * 8 + d * 16);
  }

  unsigned fragments[held ? D / 16 : 1][4];
};

// sums [16, N] = a [16, D] b [N, D]^T, of rows in shared memory, zeros from some column on.
template <class T, int D, int N, bool HELD>
__device__ void multiply_rows(Sums<T, N>& sums, const Left<T, D, HELD>& a, const T* b, int columns) {
  using S = Shape<T, D>;
  const int lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[n][c] = 0;
    }
  }
  if constexpr (S::on_tensor_cores) {
    const T* row_of_b = b + (lane / 16 * 8 + lane % 8) * S::stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      unsigned left[4];
      a.get(left, d);
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        unsigned right[4];
        recsys_ops::cuda::load_matrices<false>(right, row_of_b + n * 16 * S::stride + d * 16);
        const unsigned low[2] = {right[0], right[1]}, high[2] = {right[2], right[3]};
        recsys_ops::cuda::multiply_add<T>(sums[2 * n], left, low);
        recsys_ops::cuda::multiply_add<T>(sums[2 * n + 1], left, high);
      }
    }
  } else {
    const T* row_of_a = a.rows + lane / 4 * S::stride;
    const T* row_of_b = b + lane % 4 * 2 * S::stride;
    using Word = Pack<T, S::together>;
    const auto word = [](const T* at) { return read_word<S::together>(at); };
#pragma unroll 1
    for (int d = 0; d < columns; d += S::together) {
      const Word left[2] = {word(row_of_a + d), word(row_of_a + 8 * S::stride + d)};
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Word right = word(row_of_b + (n * 8 + i) * S::stride + d);
#pragma unroll
          for (int x = 0; x < S::together; ++x) {
            sums[n][i] += left[0][x] * right[x];
            sums[n][2 + i] += left[1][x] * right[x];
          }
        }
      }
    }
  }
}

// Elements of shared memory that add_product needs of each warp.
template <class T, int N>
constexpr int scratch_of_warp = sizeof(T) == 2 ? 0 : 16 * (N + 1);

// sums [16, C] += weights [16, N] b [N, D], of b the columns from `first` on. Weights are rounded
// to T before.
template <class T, int D, int N, int C>
__device__ void add_product(Sums<T, C>& sums, const Sums<T, N>& weights, const T* b, int first, T* scratch) {
  using S = Shape<T, D>;
  const int lane = threadIdx.x % warp_lanes;
  if constexpr (S::on_tensor_cores) {
    const T* row_of_b = b + lane % 16 * S::stride + lane / 16 * 8 + first;
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      const auto& low = weights[2 * n];
      const auto& high = weights[2 * n + 1];
      using recsys_ops::cuda::pair_of;
      const unsigned left[4] = {
          pair_of<T>(low[0], low[1]), pair_of<T>(low[2], low[3]), pair_of<T>(high[0], high[1]),
          pair_of<T>(high[2], high[3])};
#pragma unroll
      for (int c = 0; c < C / 16; ++c) {
        unsigned right[4];
        recsys_ops::cuda::load_matrices<true>(right, row_of_b + n * 16 * S::stride + c * 16);
        const unsigned even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
        recsys_ops::cuda::multiply_add<T>(sums[2 * c], left, even);
        recsys_ops::cuda::multiply_add<T>(sums[2 * c + 1], left, odd);
      }
    }
  } else {
    const int row = lane / 4, column = lane % 4 * 2;
    scratch += threadIdx.x / warp_lanes * scratch_of_warp<T, N>;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scratch[(row + c / 2 * 8) * (N + 1) + n * 8 + column + c % 2] = weights[n][c];
      }
    }
    __syncwarp();
#pragma unroll 2
    for (int j = 0; j < N; ++j) {
      const T left[2] = {scratch[row * (N + 1) + j], scratch[(row + 8) * (N + 1) + j]};
#pragma unroll
      for (int c = 0; c < C / 8; ++c) {
        const Pack<T, 2> right = read_word<2>(b + j * S::stride + first + c * 8 + column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[c][i] += left[0] * right[i];
          sums[c][2 + i] += left[1] * right[i];
        }
      }
    }
    __syncwarp();
  }
}

// A warp's sums times a factor, to its rows in shared memory, [16, C].
template <class T, int D, int C>
__device__ void stage_sums(T* to, const Sums<T, C>& sums, const Accumulate<T> (&factor)[2]) {
  using S = Shape<T, D>;
  const int lane = threadIdx.x % warp_lanes;
#pragma unroll
  for (int c = 0; c < C / 8; ++c) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Pack<T, 2> both;
      recsys_ops::cuda::narrow(sums[c][2 * h] * factor[h], both[0]);
      recsys_ops::cuda::narrow(sums[c][2 * h + 1] * factor[h], both[1]);
      write_word(to + (lane / 4 + h * 8) * S::stride + c * 8 + lane % 4 * 2, both);
    }
  }
}

// Hands out the shared memory of a block; from null it only counts.
class Arena {
 public:
  RECSYS_OPS_INLINE explicit Arena(unsigned char* memory) : memory(memory) {}

  template <class U>
  RECSYS_OPS_INLINE U* take(int64_t count) {
    // Never by way of an integer, which would hide from the compiler that this is shared memory.
    U* piece = reinterpret_cast<U*>(memory + taken);
    taken += (count * sizeof(U) + 15) / 16 * 16;
    return piece;
  }

  RECSYS_OPS_INLINE int64_t bytes() const { return taken; }

 private:
  unsigned char* memory;
  int64_t taken = 0;
};

}  // namespace recsys_ops::hstu_attention::cuda
