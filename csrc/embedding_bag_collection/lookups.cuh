// Lookups as the kernels see them: the warps of one launch are shared out among many of them.
#pragma once

#include <algorithm>

#include "../common/cuda/group.cuh"
#include "../common/cuda/launch.h"
#include "../common/cuda/tiles.h"
#include "../embedding_bag/bag_pooling.cuh"
#include "embedding_bag_collection_cuda.h"

// Of one launch; tests lower it.
#ifndef RECSYS_OPS_MOST_LOOKUPS
#define RECSYS_OPS_MOST_LOOKUPS 64
#endif

namespace recsys_ops::embedding_bag_collection::cuda {

using namespace recsys_ops::cuda;
using embedding_bag::cuda::BagReader;

// Which of ascending ends is the first beyond a number; there is one.
template <class Ends>
__device__ int find_end(const Ends& end_of, int count, int64_t number) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end_of(middle) <= number) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The bags that one lookup pools from a table.
struct PooledLookup {
  Table table;
  Tiles tiles;
  int64_t first_bag, num_bags, start, stride;
  bool mean;

  __device__ Bags bags(const Entries& input) const {
    return {input.values, input.offsets, first_bag + num_bags, table.rows, -1, input.drop_invalid};
  }
  // The number of a bag among all, or of none.
  __device__ int64_t bag(int64_t number) const { return first_bag + (number < num_bags ? number : num_bags); }
};

// Lookups of one launch, by value: at most 4 KB, as many as every driver takes.
struct Batch {
  static constexpr int capacity =
      std::min<int>(RECSYS_OPS_MOST_LOOKUPS, (4096 - 256) / (sizeof(PooledLookup) + sizeof(int64_t)));
  int count;
  int64_t ends[capacity];  // warps up to and with each
  PooledLookup items[capacity];

  RECSYS_OPS_INLINE int64_t warps() const { return ends[count - 1]; }

  void add(const PooledLookup& item, int64_t tasks) {
    const int64_t tasks_per_warp = warp_lanes / item.tiles.lanes;
    ends[count] = (count > 0 ? ends[count - 1] : 0) + (tasks + tasks_per_warp - 1) / tasks_per_warp;
    items[count++] = item;
  }
};

// Calls f(lookup, group, task) for the tasks of this group; all groups of a warp have the same lookup.
template <class F>
__device__ void each_task(const Batch& batch, const F& f) {
  const int64_t warps_of_block = blockDim.x / warp_lanes;
  for (int64_t warp = blockIdx.x * warps_of_block + threadIdx.x / warp_lanes; warp < batch.warps();
       warp += gridDim.x * warps_of_block) {
    const int number = find_end([&](int i) { return batch.ends[i]; }, batch.count, warp);
    const PooledLookup& item = batch.items[number];
    const Group group(item.tiles.lanes);
    const int64_t before = number > 0 ? batch.ends[number - 1] : 0;
    const int in_warp = static_cast<int>(threadIdx.x) % warp_lanes;
    f(item, group, ((warp - before) * warp_lanes + in_warp) / group.lanes);
  }
}

// Starts kernel(batch, arguments...) for items with so many tasks each, as few times as their number allows.
template <class Kernel, class TasksOf, class... Arguments>
void launch_batches(
    cudaStream_t stream, const std::vector<PooledLookup>& items, const TasksOf& tasks_of, const Kernel& kernel,
    const Arguments&... arguments) {
  Batch batch;
  batch.count = 0;
  const auto start = [&] {
    if (batch.count > 0) {
      launch(stream, kernel, batch.warps(), warp_lanes, batch, arguments...);
      batch.count = 0;
    }
  };
  for (const PooledLookup& item : items) {
    batch.add(item, tasks_of(item));
    if (batch.count == Batch::capacity) {
      start();
    }
  }
  start();
}

// Ends the kernel if a value was refused: last of all, where a call costs no registers.
__device__ inline void check_values(bool good) {
  RECSYS_OPS_DEVICE_CHECK(
      good,
      "embedding_bag_collection: expected offsets from 0, never decreasing, within the values, "
      "and values in [0, R) of their tables");
}

// N neighbouring elements, rounded to a dtype. Sums of fp64 are of nothing but fp64.
template <int N>
__device__ void store_as(const Cells& to, int64_t at, const Pack<float, N>& pack) {
  if (to.dtype == DType::float32) {
    store<N>(static_cast<float*>(to.data) + at, pack);
  } else if (to.dtype == DType::float16) {
    store<N>(static_cast<Half*>(to.data) + at, narrowed<Half>(pack));
  } else {
    store<N>(static_cast<BFloat16*>(to.data) + at, narrowed<BFloat16>(pack));
  }
}
template <int N>
__device__ void store_as(const Cells& to, int64_t at, const Pack<double, N>& pack) {
  store<N>(static_cast<double*>(to.data) + at, pack);
}

// The output of lookups by sum and mean.
template <class Rows, class W>
__device__ void sum_lookups(
    const Batch& batch, const Entries& input, const W* per_sample_weights, const Cells& output) {
  bool good = true;
  each_task(batch, [&](const PooledLookup& lookup, const Group& group, int64_t task) {
    const Place place = place_of(task, lookup.tiles, Rows::elements, group.lane);
    const Bags bags = lookup.bags(input);
    const BagReader reader(bags, lookup.bag(place.row), good);
    auto sum = embedding_bag::cuda::sum_bag<Rows>(lookup.table, reader, group, place.column, per_sample_weights);
    if (place.row < lookup.num_bags && place.column < lookup.table.dim) {
      if (lookup.mean) {
        sum.divide();
      }
      store_as<Rows::elements>(output, lookup.start + place.row * lookup.stride + place.column, sum.columns);
    }
  });
  check_values(good);
}

// The output of lookups by maximum, and where each is from, unless argmax is null.
template <class Rows>
__device__ void maximum_of_lookups(
    const Batch& batch, const Entries& input, const Cells& output, int32_t* argmax) {
  bool good = true;
  each_task(batch, [&](const PooledLookup& lookup, const Group& group, int64_t task) {
    const Place place = place_of(task, lookup.tiles, Rows::elements, group.lane);
    const Bags bags = lookup.bags(input);
    const BagReader reader(bags, lookup.bag(place.row), good);
    const auto highest = embedding_bag::cuda::maximum_of_bag<Rows>(lookup.table, reader, group, place.column);
    if (place.row < lookup.num_bags && place.column < lookup.table.dim) {
      const int64_t at = lookup.start + place.row * lookup.stride + place.column;
      store_as<Rows::elements>(output, at, highest.columns);
      if (argmax) {
        store<Rows::elements>(argmax + at, highest.position);
      }
    }
  });
  check_values(good);
}

// Tiles of a lookup: those of the table's rows, as wide as the cells at start + b * stride allow.
template <class T>
Tiles tile_lookup(
    const T* table, int64_t dim, int64_t row_stride, int64_t column_stride, const Lookup& lookup, const Cells& cells,
    const int32_t* argmax, int64_t most_elements) {
  Tiles tiles = {};
  dispatch(cells.dtype, [&](auto* type) {
    // The strides are multiples of a power of two where all their bits together are.
    tiles = tile_rows<T>(
        dim, row_stride | lookup.start | lookup.stride, column_stride, most_elements, table,
        static_cast<decltype(type)>(cells.data), argmax);
  });
  return tiles;
}

}  // namespace recsys_ops::embedding_bag_collection::cuda
