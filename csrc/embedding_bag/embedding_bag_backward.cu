// The gradient of the table: entries become keys of row and source, sorted; then the entries of one
// row, a run, are summed in a fixed order.
#include "../common/cuda/group.cuh"
#include "../common/cuda/launch.h"
#include "../common/cuda/sort.h"
#include "../common/cuda/tiles.h"
#include "bag_reader.cuh"
#include "embedding_bag_cuda.h"
#include "run_sums.cuh"

namespace recsys_ops::embedding_bag::cuda {
namespace {

// Bags, and as a last task the entries after the last bag.
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_entries_kernel(
    Bags bags, KeyLayout layout, uint64_t* keys, uint32_t* bag_of, double* bag_scale) {
  const Group group(fewest_lanes);
  const uint64_t dead = static_cast<uint64_t>(bags.num_embeddings) << layout.source_bits;
  bool good = true;
  for (int64_t bag = group.first_task(); any(bag <= bags.count); bag += group.stride()) {
    const BagReader reader(bags, bag, good);
    int64_t size = 0;
    for (int64_t first = reader.begin; any(first < reader.end); first += group.lanes) {
      const int64_t entry = first + group.lane;
      const int64_t row = reader.row(entry);
      if (entry < reader.end) {
        const uint64_t source = layout.by_position ? entry : bag;
        keys[entry] = row >= 0 ? static_cast<uint64_t>(row) << layout.source_bits | source : dead;
        if (bag_of) {
          bag_of[entry] = static_cast<uint32_t>(bag);
        }
      }
      size += __popc(group.vote(row >= 0));
    }
    if (bag_scale && bag < bags.count && group.lane == 0) {
      bag_scale[bag] = size > 0 ? 1.0 / static_cast<double>(size) : 1.0;
    }
    if (bag == bags.count) {
      const int64_t end = bag > 0 ? bags.end(bag - 1) : 0;
      for (int64_t entry = (end < 0 ? 0 : end) + group.lane; entry < bags.indices.size; entry += group.lanes) {
        keys[entry] = dead;
      }
    }
  }
  check_values(good);
}

__device__ bool starts_run(const SortedEntries& entries, int64_t entry, int64_t size, int64_t num_embeddings) {
  return entry < size && entries.row(entry) < num_embeddings &&
         (entry == 0 || entries.row(entry - 1) != entries.row(entry));
}

__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_count_runs_kernel(SortedEntries entries, int64_t size, int64_t num_embeddings, int64_t* counts) {
  const Group group(numbered_together);
  for (int64_t part = group.first_task(); part * numbered_together < size; part += group.stride()) {
    const int64_t entry = part * numbered_together + group.lane;
    const unsigned starts = group.vote(starts_run(entries, entry, size, num_embeddings));
    if (group.lane == 0) {
      counts[part] = __popc(starts);
    }
  }
}

__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_number_runs_kernel(
    SortedEntries entries, int64_t size, int64_t num_embeddings, int64_t num_runs, const int64_t* counts,
    uint64_t* numbered, int64_t* rows) {
  const Group group(numbered_together);
  for (int64_t part = group.first_task(); part * numbered_together < size; part += group.stride()) {
    const int64_t entry = part * numbered_together + group.lane;
    const unsigned starts = group.vote(starts_run(entries, entry, size, num_embeddings));
    if (entry >= size) {
      continue;
    }
    const unsigned up_to_here = whole_warp >> (warp_lanes - 1 - group.lane);
    const int64_t run = (part > 0 ? counts[part - 1] : 0) + __popc(starts & up_to_here) - 1;
    const int64_t row = entries.row(entry);
    const int64_t number = row < num_embeddings ? run : num_runs;
    numbered[entry] = static_cast<uint64_t>(number) << entries.source_bits | entries.source(entry);
    if (starts >> group.lane & 1) {
      rows[run] = row;
    }
  }
}

// 1 / the entries of each one's run, which two bisections count.
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm)
    embedding_bag_scale_runs_kernel(SortedEntries entries, int64_t size, double* run_scale) {
  const Group group(1);
  for (int64_t entry = group.first_task(); entry < size; entry += group.stride()) {
    const int64_t row = entries.row(entry);
    int64_t bounds[2];
    for (int side = 0; side < 2; ++side) {
      int64_t low = side == 0 ? 0 : entry, high = side == 0 ? entry : size;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (entries.row(middle) < row + side) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      bounds[side] = low;
    }
    run_scale[entry] = 1.0 / static_cast<double>(bounds[1] - bounds[0]);
  }
}

// The terms of sums, first those that entries stand for, then pieces of runs. With WHERE, a term
// counts where it is its bag's maximum.
template <class T, int N, bool WHERE>
struct EntryTerms {
  using A = Accumulate<T>;
  static constexpr int in_flight = WHERE ? loads_in_flight / 2 : loads_in_flight;
  const Gradient& gradient;
  const SortedEntries& entries;
  const int64_t size;
  const int64_t rows;

  // What a lane knows of its entry.
  struct Own {
    uint32_t bag;
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
    const int64_t row = entries.row(entry);
    return row < rows ? row : -1;
  }

  __device__ Own look(int64_t entry) const {
    const int64_t source = entries.source(entry), bag = entries.bag(source);
    Own own = {static_cast<uint32_t>(bag), A{1}, 0};
    if (gradient.per_sample_weights) {
      own.weight = widen(static_cast<const T*>(gradient.per_sample_weights)[source]);
    }
    if (entries.bag_scale) {
      own.weight *= static_cast<A>(entries.bag_scale[bag]);
    }
    if (entries.run_scale) {
      own.weight *= static_cast<A>(entries.run_scale[entry]);
    }
    if constexpr (WHERE) {
      own.position = static_cast<int32_t>(source - entries.offsets[bag]);
    }
    return own;
  }

  __device__ InFlight fetch(const Group& group, const Own& own, int from, bool wanted, int64_t column) const {
    InFlight term;
    const int64_t cell = group.broadcast(own.bag, from) * gradient.dim + column;
    term.values = load<N>(static_cast<const T*>(gradient.output), cell, wanted);
    const bool weighted = gradient.per_sample_weights || entries.bag_scale || entries.run_scale;
    term.weight = weighted ? group.broadcast(own.weight, from) : A{1};
    if constexpr (WHERE) {
      term.winner = load<N>(gradient.argmax, cell, wanted);
      term.position = group.broadcast(own.position, from);
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

template <class A, int N>
struct PieceTerms {
  static constexpr int in_flight = loads_in_flight;
  const int64_t* targets;
  const A* sums;
  const int64_t size;
  const int64_t dim;

  struct Own {
    int64_t entry;
  };

  struct InFlight {
    Raw<A, N> values;
  };

  __device__ int64_t target(int64_t entry) const { return targets[entry]; }
  __device__ Own look(int64_t entry) const { return {entry}; }

  __device__ InFlight fetch(const Group& group, const Own& own, int from, bool wanted, int64_t column) const {
    return {load<N>(sums, group.broadcast(own.entry, from) * dim + column, wanted)};
  }

  __device__ void add(Pack<A, N>& sum, const InFlight& term) const {
    const Pack<A, N> values = term.values.unpacked();
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sum[k] += values[k];
    }
  }
};

template <class T, int N, bool WHERE>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_sum_entries_kernel(
    Gradient gradient, SortedEntries entries, int64_t size, int64_t rows, Tiles tiles, T* out, int64_t* targets,
    Accumulate<T>* pieces) {
  const Group group(tiles.lanes);
  const EntryTerms<T, N, WHERE> terms = {gradient, entries, size, rows};
  const Results<T> to = {out, targets, pieces, gradient.dim};
  const int64_t tasks = chunks_of(size) * tiles.blocks;
  for (int64_t task = group.first_task(); any(task < tasks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    sum_chunk<T, N>(terms, to, group, place.row, place.column, place.column == 0);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_sum_pieces_kernel(
    const int64_t* from_targets, const Accumulate<T>* from, int64_t count, int64_t dim, Tiles tiles, T* out,
    int64_t* targets, Accumulate<T>* pieces) {
  const Group group(tiles.lanes);
  const PieceTerms<Accumulate<T>, N> terms = {from_targets, from, count, dim};
  const Results<T> to = {out, targets, pieces, dim};
  const int64_t tasks = chunks_of(count) * tiles.blocks;
  for (int64_t task = group.first_task(); any(task < tasks); task += group.stride()) {
    const Place place = place_of(task, tiles, N, group.lane);
    sum_chunk<T, N>(terms, to, group, place.row, place.column, place.column == 0);
  }
}

}  // namespace

void find_entries(
    const KeyLayout& layout, const Bags& bags, uint64_t* keys, uint32_t* bag_of, double* bag_scale,
    cudaStream_t stream) {
  launch(
      stream, embedding_bag_entries_kernel, bags.count + 1, fewest_lanes, bags, layout, keys, bag_of, bag_scale);
}

int64_t sort_bytes(const KeyLayout& layout, int64_t size) {
  return recsys_ops::cuda::sort_bytes(size, layout.source_bits, layout.source_bits + layout.row_bits);
}

uint64_t* sort_entries(
    const KeyLayout& layout, uint64_t* keys, uint64_t* scratch, int64_t size, void* memory, int64_t bytes,
    cudaStream_t stream) {
  return sort_keys(
      keys, scratch, size, layout.source_bits, layout.source_bits + layout.row_bits, memory, bytes, stream);
}

int64_t count_bytes(int64_t size) { return running_sum_bytes(count_size(size)); }

void count_runs(
    const SortedEntries& entries, int64_t size, int64_t num_embeddings, int64_t* counts, void* memory, int64_t bytes,
    cudaStream_t stream) {
  const int64_t parts = count_size(size);
  if (parts > 0) {
    launch(
        stream, embedding_bag_count_runs_kernel, parts, numbered_together, entries, size, num_embeddings, counts);
    running_sum(counts, parts, memory, bytes, stream);
  }
}

int64_t total_of(const int64_t* counts, int64_t size, cudaStream_t stream) {
  int64_t total = 0;
  if (size == 0) {
    return total;
  }
  check(cudaMemcpyAsync(&total, counts + count_size(size) - 1, sizeof(total), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return total;
}

void number_runs(
    const SortedEntries& entries, int64_t size, int64_t num_embeddings, int64_t num_runs, const int64_t* counts,
    uint64_t* numbered, int64_t* rows, cudaStream_t stream) {
  launch(
      stream, embedding_bag_number_runs_kernel, count_size(size), numbered_together, entries, size, num_embeddings,
      num_runs, counts, numbered, rows);
}

void scale_runs(const SortedEntries& entries, int64_t size, double* run_scale, cudaStream_t stream) {
  launch(stream, embedding_bag_scale_runs_kernel, size, 1, entries, size, run_scale);
}

int64_t piece_count(int64_t size) {
  int64_t total = 0;
  while (size > 0) {
    const int64_t pieces = 2 * chunks_of(size);
    total += pieces;
    size = pieces > 2 ? pieces : 0;
  }
  return total;
}

void sum_runs(
    const Gradient& gradient, const SortedEntries& entries, int64_t size, int64_t rows, void* out, int64_t* targets,
    void* sums, cudaStream_t stream) {
  if (size == 0 || gradient.dim == 0) {
    return;
  }
  dispatch(gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    T* to = static_cast<T*>(out);
    A* pieces = static_cast<A*>(sums);
    // A word of positions is as wide as one of four elements.
    const Tiles tiles = tile_rows<T>(
        gradient.dim, gradient.dim, 1, gradient.argmax ? 4 : widest_word / sizeof(T),
        static_cast<const T*>(gradient.output), gradient.argmax, to, pieces);
    dispatch_elements<T>(tiles, [&](auto elements) {
      const auto start = [&](auto kernel) {
        launch(
            stream, kernel, chunks_of(size) * tiles.blocks, tiles.lanes, gradient, entries, size, rows, tiles, to,
            targets, pieces);
      };
      if (!gradient.argmax) {
        return start(embedding_bag_sum_entries_kernel<T, elements.value, false>);
      }
      if constexpr (elements.value <= 4) {
        return start(embedding_bag_sum_entries_kernel<T, elements.value, true>);
      }
    });
  });
  sum_pieces(gradient.dtype, size, gradient.dim, out, targets, sums, stream);
}

void sum_pieces(
    DType dtype, int64_t size, int64_t dim, void* out, int64_t* targets, void* sums, cudaStream_t stream) {
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    T* to = static_cast<T*>(out);
    A* pieces = static_cast<A*>(sums);
    const Tiles tiles = tile_rows<A>(dim, dim, 1, widest_word / sizeof(A), to, pieces);
    for (int64_t count = 2 * chunks_of(size); count > 2; count = 2 * chunks_of(count)) {
      dispatch_elements<A>(tiles, [&](auto elements) {
        launch(
            stream, embedding_bag_sum_pieces_kernel<T, elements.value>, chunks_of(count) * tiles.blocks, tiles.lanes,
            targets, pieces, count, dim, tiles, to, targets + count, pieces + count * dim);
      });
      targets += count;
      pieces += count * dim;
    }
  });
}

void zero(const Gradient& gradient, int64_t rows, void* out, cudaStream_t stream) {
  dispatch(gradient.dtype, [&](auto* type) {
    check(cudaMemsetAsync(out, 0, rows * gradient.dim * sizeof(*type), stream));
  });
}

}  // namespace recsys_ops::embedding_bag::cuda
