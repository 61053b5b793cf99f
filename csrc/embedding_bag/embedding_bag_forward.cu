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
  const Group group(tiles.lanes);
  bool good = true;
  for (int64_t bag = group.first_task(); any(bag < bags.count); bag += group.stride()) {
    const BagReader reader(bags, bag, good);
    dot_rows_of_bag<RowsInFlight<T, N>>(
        table, reader, bag, group, tiles, mean,
        [&](const Place& place) {
          const bool inside = bag < bags.count && place.column < table.dim;
          return load<N>(grad_output, bag * table.dim + place.column, inside).unpacked();
        },
        [&](int64_t entry, Accumulate<T> dot) { narrow(dot, out[entry]); });
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
