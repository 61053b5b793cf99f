// Pooling of bags from many tables, and the gradient of the per-sample weights.
#include <map>
#include <tuple>

#include "lookups.cuh"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

using embedding_bag::cuda::rows_in_flight;
using embedding_bag::cuda::RowsInFlight;

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_forward_kernel(
    const __grid_constant__ Batch batch, Entries input, const Accumulate<T>* per_sample_weights, Cells output) {
  sum_lookups<RowsInFlight<T, N>>(batch, input, per_sample_weights, output);
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_max_forward_kernel(
    const __grid_constant__ Batch batch, Entries input, Cells output, int32_t* argmax) {
  maximum_of_lookups<RowsInFlight<T, N>>(batch, input, output, argmax);
}

template <int N>
__device__ Pack<float, N> load_as(const Cells& from, int64_t at, bool wanted, float) {
  if (from.dtype == DType::float32) {
    return load<N>(static_cast<const float*>(from.data), at, wanted).unpacked();
  }
  if (from.dtype == DType::float16) {
    return widened(load<N>(static_cast<const Half*>(from.data), at, wanted).unpacked());
  }
  return widened(load<N>(static_cast<const BFloat16*>(from.data), at, wanted).unpacked());
}
template <int N>
__device__ Pack<double, N> load_as(const Cells& from, int64_t at, bool wanted, double) {
  return load<N>(static_cast<const double*>(from.data), at, wanted).unpacked();
}

// No entry is in two lookups of a launch. What earlier launches found is added to.
template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_collection_backward_per_sample_weights_kernel(
        const __grid_constant__ Batch batch, Entries input, Cells grad_output, Accumulate<T>* out) {
  using A = Accumulate<T>;
  bool good = true;
  each_task(batch, [&](const PooledLookup& lookup, const Group& group, int64_t number) {
    const Bags bags = lookup.bags(input);
    const BagReader reader(bags, lookup.bag(number), good);
    int64_t size = 0;
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      size += __popc(group.vote(reader.row(first + group.lane) >= 0));
    }
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t row = reader.row(first + group.lane);
      for (int i = 0; i < group.lanes && any(first + i < reader.end); i += rows_in_flight) {
        A dots[rows_in_flight] = {};
        for (int64_t block = 0; block < lookup.tiles.blocks; ++block) {
          const Place place = place_of(number * lookup.tiles.blocks + block, lookup.tiles, N, group.lane);
          const bool inside = number < lookup.num_bags && place.column < lookup.table.dim;
          const Pack<A, N> gradient =
              load_as<N>(grad_output, lookup.start + number * lookup.stride + place.column, inside, A{});
          RowsInFlight<T, N> rows;
          rows.load_from(lookup.table, place.column, group, row, {}, i);
#pragma unroll
          for (int u = 0; u < rows_in_flight; ++u) {
            const Pack<A, N> values = rows.widened(u);
#pragma unroll
            for (int k = 0; k < N; ++k) {
              dots[u] += rows.row[u] >= 0 ? values[k] * gradient[k] : A{0};
            }
          }
        }
#pragma unroll
        for (int u = 0; u < rows_in_flight; ++u) {
          dots[u] = group.sum(dots[u]);
          if (group.lane == u && first + i + u < reader.end) {
            out[first + i + u] += lookup.mean && size > 0 ? dots[u] / static_cast<A>(size) : dots[u];
          }
        }
      }
    }
  });
  check_values(good);
}

// What one launch does.
struct Kind {
  int64_t layer;  // of lookups that have no entry in common, where that matters
  DType dtype;
  int elements;
  bool is_maximum;

  bool operator<(const Kind& other) const {
    return std::tie(layer, dtype, elements, is_maximum) <
           std::tie(other.layer, other.dtype, other.elements, other.is_maximum);
  }
};

std::map<Kind, std::vector<PooledLookup>> lookups_by_kind(
    const std::vector<Table>& tables, const std::vector<Lookup>& lookups, const std::vector<int64_t>& layers,
    const Cells& cells, const int32_t* argmax) {
  std::map<Kind, std::vector<PooledLookup>> found;
  for (size_t i = 0; i < lookups.size(); ++i) {
    const Lookup& lookup = lookups[i];
    const Table& table = tables[lookup.table];
    if (lookup.num_bags == 0 || table.dim == 0) {
      continue;
    }
    dispatch(table.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const Tiles tiles = tile_lookup(
          static_cast<const T*>(table.data), table.dim, table.row_stride, table.column_stride, lookup, cells, argmax,
          widest_word / sizeof(T));
      found[{layers.empty() ? 0 : layers[i], table.dtype, tiles.elements, lookup.mode == Mode::maximum}].push_back(
          {table, tiles, lookup.first_bag, lookup.num_bags, lookup.start, lookup.stride, lookup.mode == Mode::mean});
    });
  }
  return found;
}

// Calls f with the dtype and the elements of a kind as constants of types.
template <class F>
void dispatch_kind(const Kind& kind, const F& f) {
  dispatch(kind.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dispatch_elements<T>({kind.elements, 0, 0}, [&](auto elements) { f(type, elements); });
  });
}

int64_t pooled_tasks(const PooledLookup& lookup) { return lookup.num_bags * lookup.tiles.blocks; }

}  // namespace

void forward(
    const std::vector<Table>& tables, const Input& input, const void* per_sample_weights, const Cells& output,
    int32_t* argmax, cudaStream_t stream) {
  for (const auto& [kind, of_kind] : lookups_by_kind(tables, {input.begin(), input.end()}, {}, output, argmax)) {
    dispatch_kind(kind, [&, &kind = kind, &of_kind = of_kind](auto* type, auto elements) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (kind.is_maximum) {
        launch_batches(
            stream, of_kind, pooled_tasks, embedding_bag_collection_max_forward_kernel<T, elements.value>, input,
            output, argmax);
      } else {
        launch_batches(
            stream, of_kind, pooled_tasks, embedding_bag_collection_forward_kernel<T, elements.value>, input,
            static_cast<const Accumulate<T>*>(per_sample_weights), output);
      }
    });
  }
}

void backward_per_sample_weights(
    const std::vector<Table>& tables, const Input& input, const Cells& grad_output, void* out, cudaStream_t stream) {
  const bool wide = grad_output.dtype == DType::float64;
  check(cudaMemsetAsync(out, 0, input.values.size * (wide ? sizeof(double) : sizeof(float)), stream));
  std::vector<Lookup> weighted;
  std::vector<Range> ranges;
  for (const Lookup& lookup : input) {
    if (lookup.mode != Mode::maximum) {
      weighted.push_back(lookup);
      ranges.push_back({lookup.first_bag, lookup.num_bags, 0, 0, 0, 0, 0});
    }
  }
  plan_details::set_layers(ranges);
  std::vector<int64_t> layers;
  for (const Range& range : ranges) {
    layers.push_back(range.layer);
  }
  for (const auto& [kind, of_kind] : lookups_by_kind(tables, weighted, layers, grad_output, nullptr)) {
    dispatch_kind(kind, [&, &of_kind = of_kind](auto* type, auto elements) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch_batches(
          stream, of_kind, [](const PooledLookup& lookup) { return lookup.num_bags; },
          embedding_bag_collection_backward_per_sample_weights_kernel<T, elements.value>, input, grad_output,
          static_cast<Accumulate<T>*>(out));
    });
  }
}

}  // namespace recsys_ops::embedding_bag_collection::cuda
