// Pooling of bags from tables of codes, which become numbers on the way.
#include <map>

#include "../common/cuda/codes.cuh"
#include "lookups.cuh"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

using embedding_bag::cuda::rows_in_flight;

// Codes of the bag's entries [first, first + rows_in_flight) with their scales and offsets, which are
// zeros where a row is not live.
template <int N, int BITS, bool FLOATING>
struct CodesInFlight {
  using A = float;
  static constexpr int elements = N;
  static constexpr int bytes = N * BITS / 8 > 0 ? N * BITS / 8 : 1;
  struct Own {
    float scale, offset;
  };

  int64_t row[rows_in_flight];
  Raw<uint8_t, bytes> codes[rows_in_flight];
  float scale[rows_in_flight], offset[rows_in_flight];
  int shift;

  static __device__ Own look(const Table& table, int64_t row) {
    const Pack<float, 2> pair = load<2>(table.scales, 2 * row, row >= 0).unpacked();
    return {pair[0], pair[1]};
  }

  __device__ void load_from(
      const Table& table, int64_t column, const Group& group, int64_t lane_row, const Own& own, int first) {
    const int64_t byte = column * BITS / 8;
    shift = BITS == 4 && N == 1 ? 4 * static_cast<int>(column & 1) : 0;
#pragma unroll
    for (int u = 0; u < rows_in_flight; ++u) {
      row[u] = group.broadcast(lane_row, first + u);
      scale[u] = group.broadcast(own.scale, first + u);
      offset[u] = group.broadcast(own.offset, first + u);
      codes[u] = load<bytes>(
          static_cast<const uint8_t*>(table.data), row[u] * table.row_stride + byte,
          row[u] >= 0 && column < table.dim);
    }
  }

  __device__ Pack<float, N> widened(int u) const {
    const Pack<uint8_t, bytes> of_row = codes[u].unpacked();
    Pack<float, N> values;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const unsigned code = BITS == 4 ? of_row[k / 2] >> (N == 1 ? shift : k % 2 * 4) & 15 : of_row[k];
      values[k] = (FLOATING ? recsys_ops::cuda::from_e4m3(code) : static_cast<float>(code)) * scale[u] + offset[u];
    }
    return values;
  }
};

template <int N, int BITS, bool FLOATING>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_quantized_forward_kernel(
    const __grid_constant__ Batch batch, Entries input, const float* per_sample_weights, Cells output) {
  sum_lookups<CodesInFlight<N, BITS, FLOATING>>(batch, input, per_sample_weights, output);
}

template <int N, int BITS, bool FLOATING>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_collection_quantized_max_forward_kernel(
        const __grid_constant__ Batch batch, Entries input, Cells output) {
  maximum_of_lookups<CodesInFlight<N, BITS, FLOATING>>(batch, input, output, nullptr);
}

Tiles tile_codes(const Table& table, CodeType codes, const Lookup& lookup, const Cells& output) {
  const int64_t codes_per_byte = codes == CodeType::int4 ? 2 : 1;
  Tiles tiles;
  // Of the widths that there are kernels for.
  for (int64_t most = 8;; most = tiles.elements / 2) {
    tiles = tile_lookup(
        static_cast<const uint8_t*>(table.data), table.dim, table.row_stride * codes_per_byte, 1, lookup, output,
        nullptr, most);
    if (tiles.elements == 8 || tiles.elements == 4 || tiles.elements == 1) {
      return tiles;
    }
  }
}

template <class F>
void dispatch_codes(CodeType codes, const F& f) {
  if (codes == CodeType::int4) {
    f(std::integral_constant<int, 4>(), std::false_type());
  } else if (codes == CodeType::int8) {
    f(std::integral_constant<int, 8>(), std::false_type());
  } else {
    f(std::integral_constant<int, 8>(), std::true_type());
  }
}

template <class F>
void dispatch_width(int elements, const F& f) {
  if (elements == 8) {
    f(std::integral_constant<int, 8>());
  } else if (elements == 4) {
    f(std::integral_constant<int, 4>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

}  // namespace

void quantized_forward(
    CodeType codes, const std::vector<Table>& tables, const Input& input, const void* per_sample_weights,
    const Cells& output, cudaStream_t stream) {
  std::map<std::pair<int, bool>, std::vector<PooledLookup>> kinds;
  for (const Lookup& lookup : input) {
    const Table& table = tables[lookup.table];
    if (lookup.num_bags > 0 && table.dim > 0) {
      const Tiles tiles = tile_codes(table, codes, lookup, output);
      kinds[{tiles.elements, lookup.mode == Mode::maximum}].push_back(
          {table, tiles, lookup.first_bag, lookup.num_bags, lookup.start, lookup.stride, lookup.mode == Mode::mean});
    }
  }
  const auto tasks = [](const PooledLookup& lookup) { return lookup.num_bags * lookup.tiles.blocks; };
  for (const auto& [kind, of_kind] : kinds) {
    dispatch_codes(codes, [&, &kind = kind, &of_kind = of_kind](auto bits, auto floating) {
      dispatch_width(kind.first, [&](auto elements) {
        constexpr int N = elements.value, BITS = bits.value;
        constexpr bool FLOATING = floating.value;
        if (kind.second) {
          launch_batches(
              stream, of_kind, tasks, embedding_bag_collection_quantized_max_forward_kernel<N, BITS, FLOATING>, input,
              output);
        } else {
          launch_batches(
              stream, of_kind, tasks, embedding_bag_collection_quantized_forward_kernel<N, BITS, FLOATING>, input,
              static_cast<const float*>(per_sample_weights), output);
        }
      });
    });
  }
}

}  // namespace recsys_ops::embedding_bag_collection::cuda
