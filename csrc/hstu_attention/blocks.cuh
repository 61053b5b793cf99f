// How kernels are started, and the work of their blocks: 16 rows for each warp, of one head.
#pragma once

#include "../common/cuda/launch.h"
#include "../common/cuda/shared.cuh"
#include "scores.cuh"

namespace recsys_ops::hstu_attention::cuda {

// A block has one head and takes items of it in turns.
struct Items {
  int64_t head, first, stride;

  // Of 32 bits, since there is a block for each head: a division of 64 bits is a call.
  __device__ explicit Items(int64_t num_heads)
      : head(blockIdx.x % static_cast<unsigned>(num_heads)),
        first(blockIdx.x / static_cast<unsigned>(num_heads)),
        stride(gridDim.x / static_cast<unsigned>(num_heads)) {}
};

// Some rows of one sequence, and a part of the columns of results.
struct Item {
  Sequence sequence;
  int first;   // row or key, at or past the end of the sequence where there is nothing to do
  int column;  // of results

  // Later rows see more keys, so the blocks of a sequence go from its last to its first.
  __device__ Item(const Batch& batch, const Integers& offsets, int64_t item, int size, int parts, int columns)
      : sequence{}, first(0), column(static_cast<int>(item % parts) * columns) {
    const int64_t block = item / parts, number = sequence_at(offsets, batch.num_sequences, block, size);
    const int64_t last = first_block(offsets, number + 1, size) - 1;
    sequence = sequence_of(batch, number);
    const int64_t start = (last - block) * size;
    // Where offsets are bad there may be no such rows.
    first = 0 <= start && start < sequence.keys ? static_cast<int>(start) : sequence.keys;
  }
};

// What the rows of a block see between them.
struct Bounds {
  int begin, end, group, group_end;  // what any row sees
  int all_begin, all_end;            // what every row sees
  int least_place, largest_place, least_shift, largest_shift;

  __device__ static Bounds none() {
    return {INT32_MAX, 0, INT32_MAX, 0, 0, INT32_MAX, INT32_MAX, 0, INT32_MAX, 0};
  }

  __device__ void include(const Seen& seen) {
    if (seen.count > 0) {
      begin = min(begin, seen.begin);
      end = max(end, seen.begin + seen.count);
    }
    if (seen.members > 0) {
      group = min(group, seen.group);
      group_end = max(group_end, seen.group + seen.members);
    }
    all_begin = max(all_begin, seen.begin);
    all_end = min(all_end, seen.begin + seen.count);
  }

  __device__ void include_place(int place, int shift) {
    least_place = min(least_place, place);
    largest_place = max(largest_place, place);
    least_shift = min(least_shift, shift);
    largest_shift = max(largest_shift, shift);
  }

  // Those of a warp's lanes together.
  __device__ Bounds of_warp() const {
    const auto least = [](int value) { return __reduce_min_sync(~0u, value); };
    const auto largest = [](int value) { return __reduce_max_sync(~0u, value); };
    return {least(begin),     largest(end),       least(group),         largest(group_end), largest(all_begin),
            least(all_end),   least(least_place), largest(largest_place), least(least_shift), largest(largest_shift)};
  }

  __device__ TileRanges<2> tiles(int size) const {
    TileRanges<2> ranges;
    ranges.set(0, begin, end, size);
    ranges.set(1, group, group_end, size);
    return ranges;
  }

  __device__ bool is_seen_by_all(int first, int size) const { return all_begin <= first && first + size <= all_end; }
};

// Threads that work together: all of a block.
struct WholeBlock {
  __device__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ static int count() { return static_cast<int>(blockDim.x); }
  __device__ static void synchronize() { __syncthreads(); }
};

// Learns what there is to know of rows [first, first + N), for all threads, and returns what they see.
template <class Team, class A, int N>
__device__ Bounds learn_rows(
    const Problem& problem, const Sequence& sequence, const RowFacts<A, N>& facts, int first, bool extras) {
  Team::synchronize();
  for (int i = Team::index(); i < N; i += Team::count()) {
    facts.learn(problem, sequence, i, first + i, extras);
  }
  Team::synchronize();
  Bounds own = Bounds::none();
  for (int i = threadIdx.x % 32; i < N && first + i < sequence.rows; i += 32) {
    own.include(facts.seen[i]);
    if (extras && problem.bias.position_weight) {
      own.include_place(facts.place[i], facts.shift[i]);
    }
  }
  return own.of_warp();
}

// Whether a problem needs more than products and a mask of numbers.
inline bool has_extras(const Problem& problem) {
  return problem.bias.position_weight || problem.bias.time_weight || problem.dropout.seed ||
         problem.mask.intervals.data;
}

// Blocks of all heads that take items in turns, at most so many of each head.
inline int64_t blocks_of_items(int64_t items, int64_t num_heads, int64_t most) {
  return std::max<int64_t>(std::min(items, std::min(most, RECSYS_OPS_MOST_BLOCKS / num_heads)), 1) * num_heads;
}

template <class... Parameters, class... Arguments>
void start(
    cudaStream_t stream, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
    const Arguments&... arguments) {
  using recsys_ops::cuda::check;
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Calls f with null pointers of the type, and the columns of the rows that hold all of q, k and v.
template <class F>
void dispatch_shape(const Problem& problem, const F& f) {
  const int widest = std::max(problem.q.columns, problem.v.columns);
  dispatch(problem.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (widest <= 32) {
        return f(type, std::integral_constant<int, 32>());
      }
    }
    if (widest <= 64) {
      return f(type, std::integral_constant<int, 64>());
    }
    if constexpr (sizeof(T) < 8) {
      if (widest <= 128) {
        return f(type, std::integral_constant<int, 128>());
      }
    }
    return f(type, std::integral_constant<int, 256>());
  });
}

__device__ inline void check_values(bool good) {
  RECSYS_OPS_DEVICE_CHECK(
      good,
      "hstu_attention: expected offsets from 0 to the number of rows that never decrease, no more queries than "
      "keys, num_targets of at most as many, num_contextual of at least 0, and a cache that has all rows");
}

}  // namespace recsys_ops::hstu_attention::cuda
