// Pooling of bags from one table, and the gradient of the per-sample weights.
#include "../common/cuda/launch.h"
#include "bag_pooling.cuh"
#include "embedding_bag_cuda.h"

namespace recsys_ops::embedding_bag::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_forward_kernel(
    Table table, Bags bags, Tiles tiles, const T* per_sample_weights, bool mean, T* out) {
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t task = group.first_task(); any(task < bags.count * tiles.blocks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    const BagReader reader(bags, place.row, good);
    auto sum = sum_bag<RowsInFlight<T, N>>(table, reader, group, place.column, per_sample_weights);
    if (place.row < bags.count && place.column < table.dim) {
      if (mean) {
        sum.divide();
      }
      store<N>(out + place.row * table.dim + place.column, narrowed<T>(sum.columns));
    }
  }
  check_values(good);
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_max_forward_kernel(Table table, Bags bags, Tiles tiles, T* out, int32_t* argmax) {
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t task = group.first_task(); any(task < bags.count * tiles.blocks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    const BagReader reader(bags, place.row, good);
    const auto highest = maximum_of_bag<RowsInFlight<T, N>>(table, reader, group, place.column);
    if (place.row < bags.count && place.column < table.dim) {
      store<N>(out + place.row * table.dim + place.column, narrowed<T>(highest.columns));
      store<N>(argmax + place.row * table.dim + place.column, highest.position);
    }
  }
  check_values(good);
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_backward_per_sample_weights_kernel(
    Table table, Bags bags, Tiles tiles, const T* grad_output, bool mean, T* out) {
  using A = Accumulate<T>;
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t bag = group.first_task(); any(bag < bags.count); bag += group.stride()) {
    const BagReader reader(bags, bag, good);
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
          RowsInFlight<T, N> rows;
          rows.load_from(table, place.column, group, row, {}, i);
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
