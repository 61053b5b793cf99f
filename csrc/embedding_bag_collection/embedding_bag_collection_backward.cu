// The gradients of many tables: their entries become keys of row and source, sorted at once; then the
// entries of one row, a run, are summed in a fixed order, for the tables of one width at once.
#include <cstring>

#include "../embedding_bag/embedding_bag_cuda.h"
#include "../embedding_bag/run_sums.cuh"
#include "lookups.cuh"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

using embedding_bag::cuda::chunks_of;
using embedding_bag::cuda::loads_in_flight;

constexpr int most_words = 480;
static_assert(bags_per_warp == warp_lanes / fewest_lanes);

struct Words {
  uint64_t words[most_words];
};

__global__ void __launch_bounds__(threads_per_block)
    embedding_bag_collection_upload_kernel(const __grid_constant__ Words from, int count, uint64_t* to) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    to[i] = from.words[i];
  }
}

__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_entries_kernel(
    const Range* ranges, int count, Entries input, bool by_position, int position_bits, int source_bits, uint64_t* keys,
    uint32_t* cell_of, double* cell_scale) {
  const Group group(fewest_lanes);
  const int64_t warps_of_block = blockDim.x / warp_lanes, warps = ranges[count - 1].end_of_warps;
  bool good = true;
  for (int64_t warp = blockIdx.x * warps_of_block + threadIdx.x / warp_lanes; warp < warps;
       warp += gridDim.x * warps_of_block) {
    const int number = find_end([&](int i) { return ranges[i].end_of_warps; }, count, warp);
    const Range range = ranges[number];
    const int64_t before = number > 0 ? ranges[number - 1].end_of_warps : 0;
    const int in_warp = static_cast<int>(threadIdx.x) % warp_lanes;
    const int64_t bag = ((warp - before) * warp_lanes + in_warp) / fewest_lanes, cell = range.first_cell + bag;
    const bool exists = bag < range.num_bags;
    const Bags bags = {input.values, input.offsets, range.first_bag + range.num_bags, range.rows, -1,
                       input.drop_invalid};
    const BagReader reader(bags, range.first_bag + (exists ? bag : range.num_bags), good);
    int64_t size = 0;
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t entry = first + group.lane, at = range.layer * input.values.size + entry;
      const int64_t row = reader.row(entry);
      if (row >= 0) {
        const uint64_t source = by_position ? static_cast<uint64_t>(range.layer) << position_bits | entry : cell;
        keys[at] = static_cast<uint64_t>(range.first_row + row) << source_bits | source;
        if (cell_of) {
          cell_of[at] = static_cast<uint32_t>(cell);
        }
      }
      size += __popc(group.vote(row >= 0));
    }
    if (cell_scale && exists && group.lane == 0) {
      cell_scale[cell] = size > 0 ? 1.0 / static_cast<double>(size) : 1.0;
    }
  }
  check_values(good);
}

// By bisection, where the entries of each class start among the sorted ones, and their runs.
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_classes_kernel(
    const int64_t* first_row, int64_t classes, int source_bits, const uint64_t* sorted, const uint64_t* numbered,
    int64_t size, const int64_t* counts, int64_t* first_entry, int64_t* first_run) {
  const Group group(1);
  for (int64_t number = group.first_task(); number <= classes; number += group.stride()) {
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (static_cast<int64_t>(sorted[middle] >> source_bits) < first_row[number]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    first_entry[number] = low;
    const bool live = low < size && static_cast<int64_t>(sorted[low] >> source_bits) < first_row[classes];
    const int64_t last_count = (size - 1) / embedding_bag::cuda::numbered_together;
    first_run[number] = live ? numbered[low] >> source_bits : size > 0 ? counts[last_count] : 0;
  }
}

// The entries of a round's classes as terms of sums; targets are runs, from that of the first class on.
// With WHERE, a term counts where it is its bag's maximum.
template <class T, int N, bool WHERE>
struct RoundTerms {
  using A = Accumulate<T>;
  static constexpr int in_flight = WHERE ? loads_in_flight / 2 : loads_in_flight;
  const Terms& terms;
  const SortedRuns& runs;
  const RoundRange* ranges;  // and one more, where the cells of the last end
  const int num_ranges, position_bits, source_bits;
  const int64_t num_values;
  const int64_t first_entry, first_run, size;
  mutable int near = 0;  // the range of the last entry, which is often that of the next

  // What a lane knows of its entry.
  struct Own {
    int64_t cell;  // of the gradient, or -1
    A weight;
    int32_t position;
  };

  struct InFlight {
    Raw<T, N> values;
    Raw<int32_t, WHERE ? N : 1> winner;
    A weight;
    int32_t position;
  };

  __device__ int64_t target(int64_t entry) const {
    return static_cast<int64_t>(runs.keys[first_entry + entry] >> source_bits) - first_run;
  }

  __device__ Own look(int64_t entry) const {
    const uint64_t source = runs.keys[first_entry + entry] & ((uint64_t{1} << source_bits) - 1);
    int64_t position = 0, cell = static_cast<int64_t>(source);
    if (runs.cell_of) {
      position = static_cast<int64_t>(source & ((uint64_t{1} << position_bits) - 1));
      cell = runs.cell_of[static_cast<int64_t>(source >> position_bits) * num_values + position];
    }
    if (cell < ranges[near].first_cell || cell >= ranges[near + 1].first_cell) {
      near = find_end([&](int i) { return ranges[i + 1].first_cell; }, num_ranges, cell);
    }
    const RoundRange& range = ranges[near];
    const int64_t bag = cell - range.first_cell;
    Own own = {range.start < 0 ? -1 : range.start + bag * range.stride, A{1}, 0};
    if constexpr (WHERE) {
      own.position = static_cast<int32_t>(position - terms.offsets[range.first_bag + bag]);
    } else {
      if (terms.per_sample_weights) {
        own.weight = static_cast<const A*>(terms.per_sample_weights)[position];
      }
      if (range.mean) {
        own.weight *= static_cast<A>(runs.cell_scale[cell]);
      }
    }
    return own;
  }

  __device__ InFlight fetch(const Group& group, const Own& own, int from, bool wanted, int64_t column) const {
    InFlight term;
    const int64_t cell = group.broadcast(own.cell, from);
    wanted = wanted && cell >= 0;
    term.values = load<N>(static_cast<const T*>(terms.grad_output.data), cell + column, wanted);
    if constexpr (WHERE) {
      term.winner = load<N>(terms.argmax, cell + column, wanted);
      term.position = group.broadcast(own.position, from);
    } else {
      term.weight = terms.per_sample_weights || runs.cell_scale ? group.broadcast(own.weight, from) : A{1};
    }
    return term;
  }

  __device__ void add(Pack<A, N>& sum, const InFlight& term) const {
    const Pack<T, N> values = term.values.unpacked();
    if constexpr (WHERE) {
      const Pack<int32_t, N> winner = term.winner.unpacked();
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sum[k] += winner[k] == term.position ? widen(values[k]) : A{0};
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        sum[k] += widen(values[k]) * term.weight;
      }
    }
  }
};

// What a launch knows of a round; how many entries it has, only the GPU knows.
struct RoundOnDevice {
  const RoundRange* ranges;
  int num_ranges, position_bits, source_bits;
  int64_t num_values, most_entries;
  int64_t first_class, end_class;
  int64_t dim;
};

template <class T, int N, bool WHERE>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_sum_entries_kernel(
    RoundOnDevice round, SortedRuns runs, Terms terms, Tiles tiles, Accumulate<T>* sums, int64_t* targets,
    Accumulate<T>* pieces) {
  using A = Accumulate<T>;
  const Group group(tiles.lanes);
  const int64_t first_entry = runs.first_entry[round.first_class];
  const RoundTerms<T, N, WHERE> entries = {
      terms,
      runs,
      round.ranges,
      round.num_ranges,
      round.position_bits,
      round.source_bits,
      round.num_values,
      first_entry,
      runs.first_run[round.first_class],
      runs.first_entry[round.end_class] - first_entry};
  const embedding_bag::cuda::Results<A> to = {sums, targets, pieces, round.dim};
  const int64_t tasks = chunks_of(round.most_entries) * tiles.blocks;
  for (int64_t task = group.first_task(); any(task < tasks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    embedding_bag::cuda::sum_chunk<A, N>(entries, to, group, place.row, place.column, place.column == 0);
  }
}

template <class A, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_write_gradients_kernel(
    SortedRuns runs, int64_t first_class, int64_t end_class, const GradientOut* tables, int count, int64_t dim,
    Tiles tiles, const A* sums) {
  const Group group(tiles.lanes);
  const int64_t before = runs.first_run[first_class], touched = runs.first_run[end_class] - before;
  for (int64_t task = group.first_task(); task < touched * tiles.blocks; task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    const int64_t run = before + place.row;
    const int number = find_end([&](int i) { return runs.first_run[tables[i + 1].number]; }, count, run);
    const GradientOut table = tables[number];
    if (run >= runs.first_run[table.number + 1]) {
      continue;  // of a class without a table in this round
    }
    int64_t row = runs.rows[run] - table.first_row;
    if (table.rows) {
      const int64_t touched_row = run - runs.first_run[table.number];
      if (place.column == 0) {
        table.rows[touched_row] = row;
      }
      row = touched_row;
    }
    if (place.column < dim) {
      store_as<N>(
          {table.dtype, table.out}, row * dim + place.column,
          load<N>(sums, place.row * dim + place.column, true).unpacked());
    }
  }
}

}  // namespace

void upload(const std::vector<uint64_t>& words, uint64_t* to, cudaStream_t stream) {
  for (size_t first = 0; first < words.size(); first += most_words) {
    Words part = {};
    const int count = static_cast<int>(std::min<size_t>(most_words, words.size() - first));
    std::memcpy(part.words, words.data() + first, count * sizeof(uint64_t));
    launch(stream, embedding_bag_collection_upload_kernel, 1, threads_per_block, part, count, to + first);
  }
}

void read_back(const int64_t* from, std::vector<int64_t>& numbers, cudaStream_t stream) {
  check(cudaMemcpyAsync(
      numbers.data(), from, numbers.size() * sizeof(int64_t), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
}

void find_entries(
    const GradientPlan& plan, const Range* ranges, const Entries& input, uint64_t* keys, uint32_t* cell_of,
    double* cell_scale, cudaStream_t stream) {
  // Whoever writes no key is not live: all bits set are a row beyond all.
  check(cudaMemsetAsync(keys, 0xff, plan.num_entries * sizeof(uint64_t), stream));
  if (!plan.ranges.empty()) {
    launch(
        stream, embedding_bag_collection_entries_kernel, plan.ranges.back().end_of_warps, warp_lanes, ranges,
        static_cast<int>(plan.ranges.size()), input, plan.by_position, plan.position_bits, plan.source_bits, keys,
        cell_of, cell_scale);
  }
}

void find_classes(
    const GradientPlan& plan, const int64_t* first_row, const uint64_t* sorted, const uint64_t* numbered,
    const int64_t* counts, int64_t* first_entry, int64_t* first_run, cudaStream_t stream) {
  launch(
      stream, embedding_bag_collection_classes_kernel, plan.num_classes() + 1, 1, first_row, plan.num_classes(),
      plan.source_bits, sorted, numbered, plan.num_entries, counts, first_entry, first_run);
}

void sum_round(
    const GradientPlan& plan, const Round& round, const SortedRuns& runs, const Terms& terms, const RoundRange* ranges,
    void* sums, int64_t* targets, void* pieces, cudaStream_t stream) {
  if (plan.num_entries == 0 || round.dim == 0) {
    return;
  }
  const RoundOnDevice on_device = {
      ranges,           static_cast<int>(round.ranges.size()) - 1,
      plan.position_bits, plan.source_bits,
      plan.num_values,  plan.num_entries,
      round.first_class, round.end_class,
      round.dim};
  // The cells of all bags begin at multiples of a power of two where all their bits together do.
  int64_t strides = round.dim;
  for (const RoundRange& range : round.ranges) {
    strides |= range.start < 0 ? 0 : range.start | range.stride;
  }
  // Chunks beyond the entries that there are leave no pieces.
  check(cudaMemsetAsync(targets, 0xff, 2 * chunks_of(plan.num_entries) * sizeof(int64_t), stream));
  dispatch(terms.grad_output.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    A* const to = static_cast<A*>(sums);
    A* const of_pieces = static_cast<A*>(pieces);
    const int32_t* argmax = round.is_maximum ? terms.argmax : nullptr;
    const Tiles tiles = tile_rows<T>(
        round.dim, strides, 1, argmax ? 4 : widest_word / sizeof(T), static_cast<const T*>(terms.grad_output.data),
        argmax, to, of_pieces);
    dispatch_elements<T>(tiles, [&](auto elements) {
      const auto start = [&](auto kernel) {
        launch(
            stream, kernel, chunks_of(plan.num_entries) * tiles.blocks, tiles.lanes, on_device, runs, terms, tiles, to,
            targets, of_pieces);
      };
      if (!argmax) {
        return start(embedding_bag_collection_sum_entries_kernel<T, elements.value, false>);
      }
      if constexpr (elements.value <= 4) {
        return start(embedding_bag_collection_sum_entries_kernel<T, elements.value, true>);
      }
    });
  });
  const DType sum_dtype = terms.grad_output.dtype == DType::float64 ? DType::float64 : DType::float32;
  embedding_bag::cuda::sum_pieces(sum_dtype, plan.num_entries, round.dim, sums, targets, pieces, stream);
}

void write_gradients(
    const Round& round, const SortedRuns& runs, const void* sums, DType sum_dtype, const GradientOut* tables,
    int64_t count, cudaStream_t stream) {
  const auto start = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    Tiles tiles = tile_rows<A>(round.dim, 0, 1, widest_word / sizeof(A), static_cast<const A*>(sums));
    tiles.blocks = std::max<int64_t>(1, tiles.blocks);  // rows without columns are listed, too
    dispatch_elements<A>(tiles, [&](auto elements) {
      launch(
          stream, embedding_bag_collection_write_gradients_kernel<A, elements.value>, round.most_runs * tiles.blocks,
          tiles.lanes, runs, round.first_class, round.end_class, tables, static_cast<int>(count), round.dim, tiles,
          static_cast<const A*>(sums));
    });
  };
  if (sum_dtype == DType::float64) {
    start(static_cast<double*>(nullptr));
  } else {
    start(static_cast<float*>(nullptr));
  }
}

}  // namespace recsys_ops::embedding_bag_collection::cuda
