// Pooling of one bag straight from its table. A group of lanes has a bag, or some columns of one; its
// lanes look at one entry each and tell the others of it, then take the rows together, some rows at once.
//
// Rows say how a table is read: Rows::Own is what a lane knows of the row of its own entry.
#pragma once

#include "../common/cuda/group.cuh"
#include "../common/cuda/tiles.h"
#include "bag_reader.cuh"

namespace recsys_ops::embedding_bag::cuda {

using namespace recsys_ops::cuda;

constexpr int rows_in_flight = 8;
static_assert(rows_in_flight <= fewest_lanes);

// Rows of the bag's entries [first, first + rows_in_flight), zeros where a row is not live.
template <class T, int N>
struct RowsInFlight {
  using A = Accumulate<T>;
  static constexpr int elements = N;
  struct Own {};

  int64_t row[rows_in_flight];
  Raw<T, N> values[rows_in_flight];

  static __device__ Own look(const Table&, int64_t) { return {}; }

  __device__ void load_from(
      const Table& table, int64_t place_column, const Group& group, int64_t lane_row, const Own&, int first) {
#pragma unroll
    for (int u = 0; u < rows_in_flight; ++u) {
      row[u] = group.broadcast(lane_row, first + u);
      const int64_t column = N == 1 ? place_column * table.column_stride : place_column;
      values[u] = load<N>(
          static_cast<const T*>(table.data), row[u] * table.row_stride + column,
          row[u] >= 0 && place_column < table.dim);
    }
  }

  __device__ Pack<A, N> widened(int u) const { return recsys_ops::cuda::widened(values[u].unpacked()); }
};

template <class A, int N>
struct Sum {
  Pack<A, N> columns;
  int64_t size;  // live entries

  __device__ void divide() {
    if (size > 0) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        columns[k] /= static_cast<A>(size);
      }
    }
  }
};

template <class Rows, class W, class A = typename Rows::A, int N = Rows::elements>
__device__ Sum<A, N> sum_bag(
    const Table& table, const BagReader& reader, const Group& group, int64_t column,
    const W* per_sample_weights) {
  Sum<A, N> sum = {};
  for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
    const int64_t entry = first + group.lane;
    const int64_t row = reader.row(entry);
    const typename Rows::Own own = Rows::look(table, row);
    const A weight = per_sample_weights && row >= 0 ? widen(per_sample_weights[entry]) : A{0};
    sum.size += __popc(group.vote(row >= 0));
    for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
      Rows rows;
      rows.load_from(table, column, group, row, own, i);
#pragma unroll
      for (int u = 0; u < rows_in_flight; ++u) {
        const A factor = per_sample_weights ? group.broadcast(weight, i + u) : A{1};
        const Pack<A, N> values = rows.widened(u);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          sum.columns[k] += values[k] * factor;
        }
      }
    }
  }
  return sum;
}

template <class A, int N>
struct Maximum {
  Pack<A, N> columns;
  Pack<int32_t, N> position;  // in the bag, -1 where there is no live entry
};

template <class Rows, class A = typename Rows::A, int N = Rows::elements>
__device__ Maximum<A, N> maximum_of_bag(
    const Table& table, const BagReader& reader, const Group& group, int64_t column) {
  Maximum<A, N> highest = {};
#pragma unroll
  for (int k = 0; k < N; ++k) {
    highest.position[k] = -1;
  }
  for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
    const int64_t row = reader.row(first + group.lane);
    const typename Rows::Own own = Rows::look(table, row);
    for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
      Rows rows;
      rows.load_from(table, column, group, row, own, i);
#pragma unroll
      for (int u = 0; u < rows_in_flight; ++u) {
        const Pack<A, N> values = rows.widened(u);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          // A NaN compares as false, so it wins only where there is no maximum yet, and then stays.
          if (rows.row[u] >= 0 && (highest.position[k] < 0 || values[k] > highest.columns[k])) {
            highest.columns[k] = values[k];
            highest.position[k] = static_cast<int32_t>(first - reader.begin) + i + u;
          }
        }
      }
    }
  }
  return highest;
}

}  // namespace recsys_ops::embedding_bag::cuda
