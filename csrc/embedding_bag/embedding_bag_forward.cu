// Pooling of bags straight from the table. A group of lanes has a bag, or some columns of one; its
// lanes look at one entry each and tell the others of it, then take the rows together, some rows at once.
#include "../common/cuda/group.cuh"
#include "../common/cuda/launch.h"
#include "../common/cuda/tiles.h"
#include "bag_reader.cuh"
#include "embedding_bag_cuda.h"

namespace recsys_ops::embedding_bag::cuda {
namespace {

using namespace recsys_ops::cuda;

constexpr int rows_in_flight = 8;
static_assert(rows_in_flight <= fewest_lanes);

// Rows of the bag's entries [first, first + rows_in_flight), zeros where a row is not live.
template <int N, class T>
struct RowsInFlight {
  int64_t row[rows_in_flight];
  Raw<T, N> values[rows_in_flight];

  __device__ void load_from(const Table& table, const Place& place, const Group& group, int64_t lane_row, int first) {
#pragma unroll
    for (int u = 0; u < rows_in_flight; ++u) {
      row[u] = group.broadcast(lane_row, first + u);
      const int64_t column = N == 1 ? place.column * table.column_stride : place.column;
      values[u] = load<N>(
          static_cast<const T*>(table.data), row[u] * table.row_stride + column,
          row[u] >= 0 && place.column < table.dim);
    }
  }
};

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_forward_kernel(
    Table table, Bags bags, Tiles tiles, const T* per_sample_weights, bool mean, T* out) {
  using A = Accumulate<T>;
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t task = group.first_task(); any(task < bags.count * tiles.blocks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    BagReader reader(bags, place.row, good);
    Pack<A, N> pooled = {};
    int64_t size = 0;
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t entry = first + group.lane;
      const int64_t row = reader.row(entry);
      const A weight = per_sample_weights && row >= 0 ? widen(per_sample_weights[entry]) : A{0};
      size += __popc(group.vote(row >= 0));
      for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
        RowsInFlight<N, T> rows;
        rows.load_from(table, place, group, row, i);
#pragma unroll
        for (int u = 0; u < rows_in_flight; ++u) {
          const A factor = per_sample_weights ? group.broadcast(weight, i + u) : A{1};
          const Pack<T, N> values = rows.values[u].unpacked();
#pragma unroll
          for (int k = 0; k < N; ++k) {
            pooled[k] += widen(values[k]) * factor;
          }
        }
      }
    }
    if (place.row < bags.count && place.column < table.dim) {
      if (mean && size > 0) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          pooled[k] /= static_cast<A>(size);
        }
      }
      store<N>(out + place.row * table.dim + place.column, narrowed<T>(pooled));
    }
  }
  check_values(good);
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_max_forward_kernel(Table table, Bags bags, Tiles tiles, T* out, int32_t* argmax) {
  using A = Accumulate<T>;
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t task = group.first_task(); any(task < bags.count * tiles.blocks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    BagReader reader(bags, place.row, good);
    Pack<A, N> highest = {};
    Pack<int32_t, N> position;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      position[k] = -1;
    }
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t row = reader.row(first + group.lane);
      for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
        RowsInFlight<N, T> rows;
        rows.load_from(table, place, group, row, i);
#pragma unroll
        for (int u = 0; u < rows_in_flight; ++u) {
          const Pack<T, N> values = rows.values[u].unpacked();
#pragma unroll
          for (int k = 0; k < N; ++k) {
            // A NaN compares as false, so it wins only where there is no maximum yet, and then stays.
            const A value = widen(values[k]);
            if (rows.row[u] >= 0 && (position[k] < 0 || value > highest[k])) {
              highest[k] = value;
              position[k] = static_cast<int32_t>(first - reader.begin) + i + u;
            }
          }
        }
      }
    }
    if (place.row < bags.count && place.column < table.dim) {
      store<N>(out + place.row * table.dim + place.column, narrowed<T>(highest));
      store<N>(argmax + place.row * table.dim + place.column, position);
    }
  }
  check_values(good);
}

// The gradient of an entry's weight is the dot product of its row and its bag's gradient.
template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_backward_per_sample_weights_kernel(
    Table table, Bags bags, Tiles tiles, const T* grad_output, bool mean, T* out) {
  using A = Accumulate<T>;
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t bag = group.first_task(); any(bag < bags.count); bag += group.stride()) {
    BagReader reader(bags, bag, good);
    int64_t size = 0;
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      size += __popc(group.vote(reader.row(first + group.lane) >= 0));
    }
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t row = reader.row(first + group.lane);
      for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
        A dots[rows_in_flight] = {};
        for (int64_t block = 0; block < tiles.blocks; ++block) {
          const Place place = place_of(bag * tiles.blocks + block, tiles, N, group.lane);
          const bool inside = bag < bags.count && place.column < table.dim;
          const Pack<T, N> gradient = load<N>(grad_output, bag * table.dim + place.column, inside).unpacked();
          RowsInFlight<N, T> rows;
          rows.load_from(table, place, group, row, i);
#pragma unroll
          for (int u = 0; u < rows_in_flight; ++u) {
            const Pack<T, N> values = rows.values[u].unpacked();
#pragma unroll
            for (int k = 0; k < N; ++k) {
              dots[u] += rows.row[u] >= 0 ? widen(values[k]) * widen(gradient[k]) : A{0};
            }
          }
        }
#pragma unroll
        for (int u = 0; u < rows_in_flight; ++u) {
          dots[u] = group.sum(dots[u]);
          if (group.lane == u && first + i + u < reader.end) {
            narrow(mean && size > 0 ? dots[u] / static_cast<A>(size) : dots[u], out[first + i + u]);
          }
        }
      }
    }
  }
  check_values(good);
}

template <class T, class... Elements>
Tiles tiles_of(const Table& table, const Elements*... others) {
  return tile_rows<T>(
      table.dim, table.row_stride, table.column_stride, widest_word / sizeof(T), static_cast<const T*>(table.data),
      others...);
}

}  // namespace

void forward(
    const Table& weight, const Bags& bags, const void* per_sample_weights, bool mean, void* out, cudaStream_t stream) {
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tiles tiles = tiles_of<T>(weight, static_cast<T*>(out));
    dispatch_elements<T>(tiles, [&](auto elements) {
      launch(
          stream, embedding_bag_forward_kernel<T, elements.value>, bags.count * tiles.blocks, tiles.lanes, weight, bags,
          tiles, static_cast<const T*>(per_sample_weights), mean, static_cast<T*>(out));
    });
  });
}

void eager_forward(
    const Table& weight, const Bags& bags, const void* per_sample_weights, bool mean, void* out, int device,
    void* stream) {
  const CurrentDevice current(device);
  forward(weight, bags, per_sample_weights, mean, out, static_cast<cudaStream_t>(stream));
}

void max_forward(const Table& weight, const Bags& bags, void* out, int32_t* argmax, cudaStream_t stream) {
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tiles tiles = tiles_of<T>(weight, static_cast<T*>(out), argmax);
    dispatch_elements<T>(tiles, [&](auto elements) {
      launch(
          stream, embedding_bag_max_forward_kernel<T, elements.value>, bags.count * tiles.blocks, tiles.lanes, weight,
          bags, tiles, static_cast<T*>(out), argmax);
    });
  });
}

void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out, cudaStream_t stream) {
  dispatch(weight.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    check(cudaMemsetAsync(out, 0, bags.indices.size * sizeof(T), stream));
    const Tiles tiles = tiles_of<T>(weight, static_cast<const T*>(grad_output));
    dispatch_elements<T>(tiles, [&](auto elements) {
      launch(
          stream, embedding_bag_backward_per_sample_weights_kernel<T, elements.value>, bags.count, tiles.lanes, weight,
          bags, tiles, static_cast<const T*>(grad_output), mean, static_cast<T*>(out));
    });
  });
}

}  // namespace recsys_ops::embedding_bag::cuda
