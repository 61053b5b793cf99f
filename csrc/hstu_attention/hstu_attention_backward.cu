// Gradients by two kernels: blocks of keys go through the rows that see them, blocks of rows through
// the keys that they see. So every sum has one owner, which adds in a fixed order.
#include "blocks.cuh"
#include "gradients.cuh"
#include "histograms.cuh"

namespace recsys_ops::hstu_attention::cuda {
namespace {

// Rows of a tile. Two products of a tile take twice the registers of one; where there are two sums as
// well, what scores depend on must make do with what is left.
template <class T, int D, bool EXTRAS>
constexpr int tile_of_rows = D * sizeof(T) <= 64 ? tile_of_scores<T, D, EXTRAS> : tile_of_scores<T, D, true>;
template <class T, int D, bool EXTRAS>
constexpr int tile_of_keys =
    EXTRAS && D == 128 ? std::min(Shape<T, D>::tile, 16) : tile_of_rows<T, D, EXTRAS>;

template <class T, int D, int N>
struct KeysMemory {
  using S = Shape<T, D>;
  static constexpr int tile_size = N * S::stride;
  T *k, *v;        // of the block
  T *q, *grad;     // two tiles each: one that is used and one that is on its way
  RowFacts<Accumulate<T>, 2 * N> rows;
  KeyFacts<S::block> keys;
  T* scratch;
  int* largest;
  TileRanges<4>* tiles;  // of rows that see any of the keys; not in registers, which are scarce
  int64_t bytes;

  RECSYS_OPS_INLINE explicit KeysMemory(Arena arena)
      : k(arena.take<T>(S::block * S::stride)),
        v(arena.take<T>(S::block * S::stride)),
        q(arena.take<T>(2 * tile_size)),
        grad(arena.take<T>(2 * tile_size)),
        rows(arena),
        keys(arena),
        scratch(arena.take<T>(S::warps * scratch_of_warp<T, N>)),
        largest(arena.take<int>(1)),
        tiles(arena.take<TileRanges<4>>(1)),
        bytes(arena.bytes()) {}
};

template <class T, int D, bool EXTRAS, int N>
__device__ void differentiate_keys(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_k, const Matrix& grad_v, const Item& item,
    int64_t head, const KeysMemory<T, D, N>& memory) {
  using S = Shape<T, D>;
  using A = Accumulate<T>;
  constexpr int C = S::columns_of_two;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  if (threadIdx.x == 0) {
    const int end = min(item.first + S::block, sequence.keys);
    find_rows_that_see(*memory.tiles, problem.mask, sequence, item.first, end, N);
  }
  __syncthreads();
  const TileRanges<4>& tiles = *memory.tiles;
  const A unit = EXTRAS ? unit_of_scales<WholeBlock, T>(problem, sequence, memory.largest) : A{1};
  const Rows<T> q(problem.q, sequence.first_row, head), grad(grad_output, sequence.first_row, head);

  bool sees_all = true;  // as far as this thread knows, every row of the next tile every key
  const auto fetch = [&](int tile, int stage) {
    if (tile != tiles.after_all) {
      load_tile<T, D, N>(memory.q + stage * memory.tile_size, q, tile * N, sequence.rows);
      load_tile<T, D, N>(memory.grad + stage * memory.tile_size, grad, tile * N, sequence.rows);
      sees_all = !(EXTRAS && problem.mask.intervals.data);
      for (int i = threadIdx.x; i < N; i += S::threads) {
        const Seen seen = memory.rows.of(stage).learn(problem, sequence, i, tile * N + i, EXTRAS);
        sees_all = sees_all && seen.begin <= item.first && item.first + S::block <= seen.begin + seen.count;
      }
    }
    __pipeline_commit();
  };
  load_tile<T, D, S::block>(
      memory.k, Rows<T>(problem.k, sequence.first_key, head), item.first, sequence.keys);
  load_tile<T, D, S::block>(
      memory.v, Rows<T>(problem.v, sequence.first_key, head), item.first, sequence.keys);
  for (int i = threadIdx.x; EXTRAS && i < S::block; i += S::threads) {
    memory.keys.learn(problem, sequence, i, item.first + i);
  }
  const Left<T, D, false> keys(memory.k + lane.warp * 16 * S::stride), values(memory.v + lane.warp * 16 * S::stride);
  Sums<T, C> sums_of_k = {}, sums_of_v = {};
  // The first time round there is nothing but to fetch.
  int tile = tiles.none, following = tiles.next(0), stage = 1;
  while (tile != tiles.after_all) {
    if (tile != tiles.none) {
      __pipeline_wait_prior(0);
    }
    const bool all = __syncthreads_and(sees_all);
    fetch(following, stage ^ 1);
    if (tile != tiles.none) {
      const T* rows_of_q = memory.q + stage * memory.tile_size;
      const T* rows_of_grad = memory.grad + stage * memory.tile_size;
      Sums<T, N> weights, grads;  // [16 keys, tile]
      multiply_rows<T, D, N>(weights, keys, rows_of_q, problem.q.columns);
      multiply_rows<T, D, N>(grads, values, rows_of_grad, problem.v.columns);
      const auto facts = memory.rows.of(stage);
      const Scores<T, N, true, EXTRAS> scores = {
          problem,    sequence,   head,       tile * N,          item.first,
          facts.seen, facts.place, facts.time, memory.keys.place, memory.keys.time};
      differentiate<T, N, EXTRAS>(weights, grads, scores, facts, lane, all, A{1} / unit);
      add_product<T, D, N, C>(sums_of_v, weights, rows_of_grad, item.column, memory.scratch);
      if (EXTRAS && S::on_tensor_cores && problem.row_scale) {
        // Rounded weights times scales have more digits than T, but not than two of them.
        keep_remainders<T, N>(weights);
        add_product<T, D, N, C>(sums_of_v, weights, rows_of_grad, item.column, memory.scratch);
      }
      add_product<T, D, N, C>(sums_of_k, grads, rows_of_q, item.column, memory.scratch);
    }
    tile = following;
    following = tiles.next(tile + 1);
    stage ^= 1;
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  const A alpha = static_cast<A>(problem.alpha), scale = static_cast<A>(problem.scale) * unit;
  const int first = item.first + lane.warp * 16;
  T* staged = memory.k + lane.warp * 16 * S::stride;
  stage_sums<T, D, C>(staged, sums_of_k, {alpha, alpha});
  __syncwarp();
  store_rows<T, D, C>(staged, grad_k, sequence.first_key, head, first, sequence.keys, item.column);
  staged = memory.v + lane.warp * 16 * S::stride;
  stage_sums<T, D, C>(staged, sums_of_v, {scale, scale});
  __syncwarp();
  store_rows<T, D, C>(staged, grad_v, sequence.first_key, head, first, sequence.keys, item.column);
  __syncthreads();
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(Shape<T, D>::threads, 2) hstu_attention_backward_keys_kernel(
    const __grid_constant__ Problem problem, const Matrix grad_output, const Matrix grad_k, const Matrix grad_v,
    int64_t num_items) {
  using S = Shape<T, D>;
  RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
  const KeysMemory<T, D, tile_of_keys<T, D, EXTRAS>> memory{Arena(shared)};
  const Items items(problem.batch.num_heads);
  bool good = true;
  for (int64_t i = items.first; i < num_items; i += items.stride) {
    good = (items.head != 0 || values_are_good(problem.batch, i)) && good;
    const Item item(problem.batch, problem.batch.offsets, i, S::block, S::parts_of_two, S::columns_of_two);
    good = good && item.sequence.good;
    if (item.first < item.sequence.keys) {
      differentiate_keys<T, D, EXTRAS>(problem, grad_output, grad_k, grad_v, item, items.head, memory);
    }
  }
  check_values(good);
}

template <class T, int D, int N>
struct RowsMemory {
  using S = Shape<T, D>;
  using A = Accumulate<T>;
  static constexpr int tile_size = N * S::stride;
  T *q, *grad;  // of the block
  T *k, *v;     // two tiles each: one that is used and one that is on its way
  RowFacts<A, S::block> rows;
  KeyFacts<N> keys;
  T* scratch;
  A* grads;       // of scores, [block, tile + 1], for the tables only
  A* histograms;  // of times
  int64_t bytes;

  RECSYS_OPS_INLINE RowsMemory(Arena arena, bool tables, int64_t histogram_size)
      : q(arena.take<T>(S::block * S::stride)),
        grad(arena.take<T>(S::block * S::stride)),
        k(arena.take<T>(2 * tile_size)),
        v(arena.take<T>(2 * tile_size)),
        rows(arena),
        keys(arena),
        scratch(arena.take<T>(S::warps * scratch_of_warp<T, N>)),
        grads(arena.take<A>(tables ? S::block * (N + 1) : 0)),
        histograms(arena.take<A>(histogram_size)),
        bytes(arena.bytes()) {}
};

template <class T, int D, bool EXTRAS, int N>
__device__ void differentiate_rows(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_q, const Item& item, int64_t head,
    const RowsMemory<T, D, N>& memory, Tables<WholeBlock, Accumulate<T>>& tables) {
  using S = Shape<T, D>;
  using A = Accumulate<T>;
  constexpr int C = S::columns;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  const Bounds bounds = learn_rows<WholeBlock, A, S::block>(problem, sequence, memory.rows, item.first, EXTRAS);
  const TileRanges<2> tiles = bounds.tiles(N);
  const Rows<T> k(problem.k, sequence.first_key, head), v(problem.v, sequence.first_key, head);

  const auto fetch = [&](int tile, int stage) {
    if (tile != tiles.after_all) {
      load_tile<T, D, N>(memory.k + stage * memory.tile_size, k, tile * N, sequence.keys);
      load_tile<T, D, N>(memory.v + stage * memory.tile_size, v, tile * N, sequence.keys);
      for (int i = threadIdx.x; EXTRAS && i < N; i += S::threads) {
        memory.keys.of(stage).learn(problem, sequence, i, tile * N + i);
      }
    }
    __pipeline_commit();
  };
  load_tile<T, D, S::block>(
      memory.q, Rows<T>(problem.q, sequence.first_row, head), item.first, sequence.rows);
  load_tile<T, D, S::block>(
      memory.grad, Rows<T>(grad_output, sequence.first_row, head), item.first, sequence.rows);
  const Left<T, D, false> rows_of_q(memory.q + lane.warp * 16 * S::stride);
  const Left<T, D, false> rows_of_grad(memory.grad + lane.warp * 16 * S::stride);
  Sums<T, C> sums = {};
  // The first time round there is nothing but to fetch.
  int tile = tiles.none, following = tiles.next(0), stage = 1;
  while (tile != tiles.after_all) {
    if (tile != tiles.none) {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    fetch(following, stage ^ 1);
    if (tile != tiles.none) {
      const T* rows_of_k = memory.k + stage * memory.tile_size;
      Sums<T, N> weights, grads;  // [16, tile]
      multiply_rows<T, D, N>(weights, rows_of_q, rows_of_k, problem.q.columns);
      multiply_rows<T, D, N>(grads, rows_of_grad, memory.v + stage * memory.tile_size, problem.v.columns);
      const KeyFacts<N> facts = memory.keys.of(stage);
      const Scores<T, N, false, EXTRAS> scores = {
          problem,          sequence,          head,             item.first, tile * N,
          memory.rows.seen, memory.rows.place, memory.rows.time, facts.place, facts.time};
      const bool all = !(EXTRAS && problem.mask.intervals.data) && bounds.is_seen_by_all(tile * N, N);
      differentiate<T, N, EXTRAS>(weights, grads, scores, memory.rows, lane, all, A{1});
      if constexpr (EXTRAS) {
        if (item.column == 0) {
          tables.template add<S::block, N>(grads, scores, memory.rows, bounds, lane, memory.grads);
        }
      }
      add_product<T, D, N, C>(sums, grads, rows_of_k, item.column, memory.scratch);
    }
    tile = following;
    following = tiles.next(tile + 1);
    stage ^= 1;
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  const A alpha = static_cast<A>(problem.alpha);
  T* staged = memory.q + lane.warp * 16 * S::stride;
  stage_sums<T, D, C>(staged, sums, {alpha, alpha});
  __syncwarp();
  store_rows<T, D, C>(
      staged, grad_q, sequence.first_row, head, item.first + lane.warp * 16, sequence.rows, item.column);
  __syncthreads();
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(Shape<T, D>::threads, D == 64 && !EXTRAS ? 3 : 2) hstu_attention_backward_rows_kernel(
    const __grid_constant__ Problem problem, const Matrix grad_output, const Matrix grad_q,
    const TablesAt<Accumulate<T>> at, int64_t num_items) {
  using S = Shape<T, D>;
  RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
  const RowsMemory<T, D, tile_of_rows<T, D, EXTRAS>> memory(Arena(shared), at.any(), at.shared_size());
  const Items items(problem.batch.num_heads);
  Tables<WholeBlock, Accumulate<T>> tables(at, memory.histograms);
  if constexpr (EXTRAS) {
    tables.clear();
  }
  bool good = true;
  for (int64_t i = items.first; i < num_items; i += items.stride) {
    good = (items.head != 0 || values_are_good(problem.batch, i)) && good;
    const Item item(problem.batch, problem.batch.query_offsets, i, S::block, S::parts, S::columns);
    good = good && item.sequence.good;
    if (item.first < item.sequence.rows) {
      differentiate_rows<T, D, EXTRAS>(problem, grad_output, grad_q, item, items.head, memory, tables);
    }
  }
  if constexpr (EXTRAS) {
    tables.finish(memory.grads);
  }
  check_values(good);
}

constexpr int summing_threads = 256;

// Each warp adds up some of the histograms for 32 buckets, then the first adds up what the warps have.
template <class A>
__global__ void __launch_bounds__(summing_threads) hstu_attention_sum_histograms_kernel(
    const A* partial, int64_t count, int64_t stride, int64_t size, A* out) {
  RECSYS_OPS_DYNAMIC_SHARED(A, sums);
  constexpr int warps = summing_threads / warp_lanes;
  const int64_t bucket = static_cast<int64_t>(blockIdx.x) * warp_lanes + threadIdx.x % warp_lanes;
  const int warp = threadIdx.x / warp_lanes;
  partial += blockIdx.y * size;
  A sum = 0;
  if (bucket < size) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += warps) {
      sum += partial[i * stride * size + bucket];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && bucket < size) {
    for (int other = 1; other < warps; ++other) {
      sum += sums[other * warp_lanes + threadIdx.x];
    }
    out[blockIdx.y * size + bucket] = sum;
  }
}

// Blocks of rows, and those of them that work at once where each leaves histograms.
struct RowBlocks {
  int64_t items, blocks;
};

template <class S>
RowBlocks row_blocks(const Problem& problem) {
  const int64_t heads = problem.batch.num_heads;
  const int64_t items = block_count(problem.batch.num_rows, problem.batch.num_sequences, S::block) * S::parts;
  const bool tables = problem.bias.position_weight || problem.bias.time_weight;
  if (items == 0 || heads == 0) {
    return {0, 0};
  }
  return {items, blocks_of_items(items, heads, tables ? std::max<int64_t>(most_histograms / heads, 1) : items)};
}

}  // namespace

void backward_keys(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_k, const Matrix& grad_v,
    cudaStream_t stream) {
  if (backward_keys_by_warpgroups(problem, grad_output, grad_k, grad_v, stream)) {
    return;
  }
  dispatch_shape(problem, [&](auto* type, auto dim) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int D = dim.value;
    using S = Shape<T, D>;
    const int64_t heads = problem.batch.num_heads;
    const int64_t items =
        block_count(problem.batch.num_keys, problem.batch.num_sequences, S::block) * S::parts_of_two;
    if (items == 0 || heads == 0) {
      return;
    }
    const auto with = [&](auto extras) {
      start(
          stream, hstu_attention_backward_keys_kernel<T, D, extras.value>, blocks_of_items(items, heads, items),
          S::threads, KeysMemory<T, D, tile_of_keys<T, D, extras.value>>(Arena(nullptr)).bytes, problem, grad_output,
          grad_k, grad_v, items);
    };
    if constexpr (sizeof(T) == 2) {
      if (!has_extras(problem) && !problem.row_scale) {
        return with(std::false_type());
      }
    }
    with(std::true_type());
  });
}

int64_t histogram_count(const Problem& problem) {
  int64_t count = 0;
  dispatch_shape(problem, [&](auto* type, auto dim) {
    using T = std::remove_pointer_t<decltype(type)>;
    count = row_blocks<Shape<T, dim.value>>(problem).blocks;
  });
  return count;
}

void backward_rows(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_q, void* positions, void* times,
    cudaStream_t stream) {
  if (backward_rows_by_warpgroups(problem, grad_output, grad_q, positions, times, stream)) {
    return;
  }
  dispatch_shape(problem, [&](auto* type, auto dim) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    constexpr int D = dim.value;
    using S = Shape<T, D>;
    const RowBlocks work = row_blocks<S>(problem);
    if (work.blocks == 0) {
      return;
    }
    const TablesAt<A> at = {
        static_cast<A*>(positions),
        static_cast<A*>(times),
        problem.bias.num_distances,
        problem.bias.num_buckets,
        histogram_copies(problem.bias.num_buckets, S::threads, sizeof(A), S::row_bytes > 1024)};
    const auto with = [&](auto extras) {
      start(
          stream, hstu_attention_backward_rows_kernel<T, D, extras.value>, work.blocks, S::threads,
          RowsMemory<T, D, tile_of_rows<T, D, extras.value>>(Arena(nullptr), at.any(), at.shared_size()).bytes,
          problem, grad_output, grad_q, at, work.items);
    };
    if constexpr (sizeof(T) == 2) {
      if (!has_extras(problem) && !problem.row_scale) {
        return with(std::false_type());
      }
    }
    with(std::true_type());
  });
}

void sum_histograms(
    const Problem& problem, const void* partial, int64_t size, bool by_head, void* out, cudaStream_t stream) {
  const int64_t count = histogram_count(problem), heads = problem.batch.num_heads;
  const auto sum = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const int64_t rows = by_head ? heads : 1;
    if (rows == 0) {
      return;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(static_cast<unsigned>((size + warp_lanes - 1) / warp_lanes), static_cast<unsigned>(rows));
    config.blockDim = dim3(summing_threads);
    config.dynamicSmemBytes = summing_threads * sizeof(A);
    config.stream = stream;
    recsys_ops::cuda::check(cudaLaunchKernelEx(
        &config, hstu_attention_sum_histograms_kernel<A>, static_cast<const A*>(partial), count / rows, rows, size,
        static_cast<A*>(out)));
  };
  if (problem.dtype == DType::float64) {
    sum(static_cast<double*>(nullptr));
  } else {
    sum(static_cast<float*>(nullptr));
  }
}

}  // namespace recsys_ops::hstu_attention::cuda
