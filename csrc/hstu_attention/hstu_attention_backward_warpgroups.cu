// Gradients by warpgroups, on sm_90a: as in hstu_attention_backward.cu, one kernel has blocks of keys, the
// other blocks of rows, and every sum one owner.
#include "gradients.cuh"
#include "histograms.cuh"
#include "warpgroups.cuh"

namespace recsys_ops::hstu_attention::cuda {
namespace {

template <int D, bool EXTRAS>
constexpr int tile_of_rows = smaller_tile(D <= 64 || (D <= 128 && !EXTRAS) ? 64 : D <= 128 || !EXTRAS ? 32 : 16);
// There is less room beside the gradients of tables.
template <int D, bool EXTRAS>
constexpr int tile_of_keys = smaller_tile(D <= 128 ? 64 : EXTRAS ? 16 : 32);

template <class T, int D, int N>
struct KeysMemory {
  Strips<T, block_of_warpgroups, D> k, v;  // of the block
  TwoStrips<T, N, D> q, grad;
  RowFacts<float, 2 * N> rows;
  KeyFacts<block_of_warpgroups> keys;
  Arrivals arrivals;
  Item* item;
  int* largest;
  int* all;  // two: whether every row of a tile sees every key
  TileRanges<4>* tiles;
  int64_t bytes;

  RECSYS_OPS_INLINE explicit KeysMemory(Arena arena)
      : k{arena.take<T>(staged_elements<T, D>)},
        v{arena.take<T>(block_of_warpgroups * D)},
        q(arena),
        grad(arena),
        rows(arena),
        keys(arena),
        arrivals(arena),
        item(arena.take<Item>(1)),
        largest(arena.take<int>(1)),
        all(arena.take<int>(2)),
        tiles(arena.take<TileRanges<4>>(1)),
        bytes(arena.bytes() + recsys_ops::cuda::tile_alignment) {}
};

// What the two warpgroups do for one block's keys.
template <class T, int D, bool EXTRAS, int N>
__device__ void differentiate_keys(
    const Problem& problem, const Matrix& grad_k, const Matrix& grad_v, const Item& item, int64_t head,
    const KeysMemory<T, D, N>& memory, unsigned block_parity, Turns& turns) {
  constexpr int C = Shape<T, D>::columns_of_two, W = EXTRAS && D == 128 ? 16 : scores_at_once<N, EXTRAS>;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  const int first = lane.warp / 4 * warpgroup_rows;
  const float unit = EXTRAS ? unit_of_scales<MultiplyingThreads, T>(problem, sequence, memory.largest) : 1.0f;
  const TileRanges<4>& tiles = *memory.tiles;
  Sums<T, C> sums_of_k = {}, sums_of_v = {};
  memory.arrivals.block->wait(block_parity);
  for (int tile = tiles.next(0); tile != tiles.after_all; tile = tiles.next(tile + 1)) {
    const int stage = turns.stage();
    memory.arrivals.full[stage].wait(turns.parity());
    Sums<T, N> weights, grads;  // [64 keys, tile]
    recsys_ops::cuda::begin_products();
    multiply_strips<T, D>(weights, memory.k, first, memory.q.of(stage));
    multiply_strips<T, D>(grads, memory.v, first, memory.grad.of(stage));
    recsys_ops::cuda::commit_products();
    recsys_ops::cuda::wait_for_all_products_but<0>();
    recsys_ops::cuda::settle(weights);
    recsys_ops::cuda::settle(grads);
    const bool all = memory.all[stage];
#pragma unroll
    for (int part = 0; part < N; part += W) {
      const auto facts = memory.rows.of(stage).from(part);
      const Scores<T, W, true, EXTRAS> scores = {
          problem,    sequence,    head,       tile * N + part,   item.first,
          facts.seen, facts.place, facts.time, memory.keys.place, memory.keys.time};
      differentiate<T, W, EXTRAS>(
          part_of<W>(weights, part), part_of<W>(grads, part), scores, facts, lane, all, 1.0f / unit);
    }
    const Fragments<T, N> of_v(weights), of_k(grads);
    recsys_ops::cuda::begin_products();
    add_strips<T, C>(sums_of_v, of_v, memory.grad.of(stage), item.column);
    add_strips<T, C>(sums_of_k, of_k, memory.q.of(stage), item.column);
    recsys_ops::cuda::commit_products();
    recsys_ops::cuda::wait_for_all_products_but<0>();
    if (EXTRAS && problem.row_scale) {
      // Rounded weights times scales have more digits than T, but not than two of them.
      keep_remainders<T, N>(weights);
      const Fragments<T, N> remainders(weights);
      recsys_ops::cuda::begin_products();
      add_strips<T, C>(sums_of_v, remainders, memory.grad.of(stage), item.column);
      recsys_ops::cuda::commit_products();
      recsys_ops::cuda::wait_for_all_products_but<0>();
    }
    recsys_ops::cuda::settle(sums_of_v);
    recsys_ops::cuda::settle(sums_of_k);
    memory.arrivals.release(stage);
    turns.next();
  }
  // Where k was, of which the other warpgroup may still need some.
  MultiplyingThreads::synchronize();
  const float alpha = static_cast<float>(problem.alpha), scale = static_cast<float>(problem.scale) * unit;
  write_results<T, D, C>(
      memory.k.data, sums_of_k, {alpha, alpha}, grad_k, sequence.first_key, head, item.first, sequence.keys, item.column);
  write_results<T, D, C>(
      memory.k.data, sums_of_v, {scale, scale}, grad_v, sequence.first_key, head, item.first, sequence.keys, item.column);
  recsys_ops::cuda::fence_tiles();
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(threads_of_warpgroups, 1) hstu_attention_backward_keys_warpgroups_kernel(
    const __grid_constant__ Problem problem, const __grid_constant__ TileMaps maps, const Matrix grad_k,
    const Matrix grad_v, int64_t num_items) {
  if constexpr (recsys_ops::cuda::has_warpgroups) {
    constexpr int N = tile_of_rows<D, EXTRAS>;
    using S = Shape<T, D>;
    RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
    const KeysMemory<T, D, N> memory{Arena(aligned_for_tiles(shared))};
    const Items items(problem.batch.num_heads);
    memory.arrivals.begin();
    const auto each = [&](const auto& f) {
      const auto with = [&](const Item& item) {
        if (item.first < item.sequence.keys) {
          if (AllThreads::index() == 0) {
            const int end = min(item.first + block_of_warpgroups, item.sequence.keys);
            find_rows_that_see(*memory.tiles, problem.mask, item.sequence, item.first, end, N);
          }
          for (int j = AllThreads::index(); EXTRAS && j < block_of_warpgroups; j += AllThreads::count()) {
            memory.keys.learn(problem, item.sequence, j, item.first + j);
          }
          AllThreads::synchronize();
          f(item);
        }
      };
      each_item(
          problem.batch, problem.batch.offsets, items, num_items, S::parts_of_two, S::columns_of_two, memory.item, with);
    };
    if (threadIdx.x >= multiplying_threads) {
      share_registers<EXTRAS>(true);
      Fetcher<T, block_of_warpgroups, N, D> fetcher(memory.arrivals, memory.q, memory.grad);
      each([&](const Item& item) {
        if (threadIdx.x >= multiplying_threads + warp_lanes) {
          return;
        }
        const Sequence& sequence = item.sequence;
        const int head = static_cast<int>(items.head);
        fetcher.keep(maps, memory.k, &memory.v, head, sequence.first_key + item.first);
        const auto learn = [&](int tile, int stage) {
          bool all = !(EXTRAS && problem.mask.intervals.data);
          for (int i = threadIdx.x % warp_lanes; i < N; i += warp_lanes) {
            const Seen seen = memory.rows.of(stage).learn(problem, sequence, i, tile * N + i, EXTRAS);
            all = all && seen.begin <= item.first && item.first + block_of_warpgroups <= seen.begin + seen.count;
          }
          all = __all_sync(recsys_ops::cuda::whole_warp, all);
          if (threadIdx.x % warp_lanes == 0) {
            memory.all[stage] = all;
          }
        };
        fetcher.go_through(maps, *memory.tiles, head, sequence.first_row, sequence.rows, learn);
      });
    } else {
      share_registers<EXTRAS>(false);
      Turns turns;
      unsigned blocks = 0;
      each([&](const Item& item) {
        differentiate_keys<T, D, EXTRAS>(
            problem, grad_k, grad_v, item, items.head, memory, blocks++ % 2, turns);
      });
    }
  }
}

template <class T, int D, bool EXTRAS, int N>
struct RowsMemory {
  Strips<T, block_of_warpgroups, D> q, grad;  // of the block
  TwoStrips<T, N, D> k, v;
  RowFacts<float, block_of_warpgroups> rows;
  KeyFacts<N> keys;
  Arrivals arrivals;
  Item* item;
  float* grads;       // of scores, [block, as many as are decided on at once + 1], for the tables only
  float* histograms;  // of times
  int64_t bytes;

  RECSYS_OPS_INLINE RowsMemory(Arena arena, bool tables, int64_t histogram_size)
      : q{arena.take<T>(staged_elements<T, D>)},
        grad{arena.take<T>(block_of_warpgroups * D)},
        k(arena),
        v(arena),
        rows(arena),
        keys(arena),
        arrivals(arena),
        item(arena.take<Item>(1)),
        grads(arena.take<float>(tables ? block_of_warpgroups * (scores_at_once<N, EXTRAS> + 1) : 0)),
        histograms(arena.take<float>(histogram_size)),
        bytes(arena.bytes() + recsys_ops::cuda::tile_alignment) {}
};

using TablesOfWarpgroups = Tables<MultiplyingThreads, float>;

// What the two warpgroups do for one block's rows.
template <class T, int D, bool EXTRAS, int N>
__device__ void differentiate_rows(
    const Problem& problem, const Matrix& grad_q, const Item& item, int64_t head,
    const RowsMemory<T, D, EXTRAS, N>& memory, const Bounds& bounds, TablesOfWarpgroups& tables, bool any_tables,
    unsigned block_parity, Turns& turns) {
  constexpr int W = scores_at_once<N, EXTRAS>;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  const TileRanges<2> tiles = bounds.tiles(N);
  const int first = lane.warp / 4 * warpgroup_rows;
  // What follows a sequence's last row is another's, which no table may learn from.
  const bool may_see_all =
      item.first + block_of_warpgroups <= sequence.rows && !(EXTRAS && problem.mask.intervals.data);
  Sums<T, D> sums = {};
  memory.arrivals.block->wait(block_parity);
  for (int tile = tiles.next(0); tile != tiles.after_all; tile = tiles.next(tile + 1)) {
    const int stage = turns.stage();
    memory.arrivals.full[stage].wait(turns.parity());
    Sums<T, N> weights, grads;  // [64, tile]
    recsys_ops::cuda::begin_products();
    multiply_strips<T, D>(weights, memory.q, first, memory.k.of(stage));
    multiply_strips<T, D>(grads, memory.grad, first, memory.v.of(stage));
    recsys_ops::cuda::commit_products();
    recsys_ops::cuda::wait_for_all_products_but<0>();
    recsys_ops::cuda::settle(weights);
    recsys_ops::cuda::settle(grads);
    const KeyFacts<N> facts = memory.keys.of(stage);
#pragma unroll
    for (int part = 0; part < N; part += W) {
      const int first_key = tile * N + part;
      const Scores<T, W, false, EXTRAS> scores = {
          problem,          sequence,          head,             item.first,         first_key,
          memory.rows.seen, memory.rows.place, memory.rows.time, facts.place + part, facts.time + part};
      const bool all = may_see_all && bounds.is_seen_by_all(first_key, W);
      auto& of_part = part_of<W>(grads, part);
      differentiate<T, W, EXTRAS>(part_of<W>(weights, part), of_part, scores, memory.rows, lane, all, 1.0f);
      if (EXTRAS && any_tables) {
        MultiplyingThreads::synchronize();
        tables.template add<block_of_warpgroups, W>(of_part, scores, memory.rows, bounds, lane, memory.grads);
      }
    }
    const Fragments<T, N> rounded(grads);
    recsys_ops::cuda::begin_products();
    add_strips<T, D>(sums, rounded, memory.k.of(stage), 0);
    recsys_ops::cuda::commit_products();
    recsys_ops::cuda::wait_for_all_products_but<0>();
    recsys_ops::cuda::settle(sums);
    memory.arrivals.release(stage);
    turns.next();
  }
  // Where q was, of which the other warpgroup may still need some.
  MultiplyingThreads::synchronize();
  const float alpha = static_cast<float>(problem.alpha);
  write_results<T, D, D>(
      memory.q.data, sums, {alpha, alpha}, grad_q, sequence.first_row, head, item.first, sequence.rows, 0);
  recsys_ops::cuda::fence_tiles();
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(threads_of_warpgroups, 1) hstu_attention_backward_rows_warpgroups_kernel(
    const __grid_constant__ Problem problem, const __grid_constant__ TileMaps maps, const Matrix grad_q,
    const TablesAt<float> at, int64_t num_items) {
  if constexpr (recsys_ops::cuda::has_warpgroups) {
    constexpr int N = tile_of_keys<D, EXTRAS>;
    RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
    const RowsMemory<T, D, EXTRAS, N> memory(Arena(aligned_for_tiles(shared)), at.any(), at.shared_size());
    const Items items(problem.batch.num_heads);
    memory.arrivals.begin();
    if (threadIdx.x >= multiplying_threads) {
      share_registers<EXTRAS>(true);
      fetch_for_rows<T, N, D, EXTRAS>(problem, maps, items, num_items, memory, &memory.grad);
    } else {
      share_registers<EXTRAS>(false);
      TablesOfWarpgroups tables(at, memory.histograms);
      if constexpr (EXTRAS) {
        tables.clear();
      }
      Turns turns;
      unsigned blocks = 0;
      each_block_of_rows(problem, items, num_items, memory, EXTRAS, [&](const Item& item, const Bounds& bounds) {
        differentiate_rows<T, D, EXTRAS>(
            problem, grad_q, item, items.head, memory, bounds, tables, at.any(), blocks++ % 2, turns);
      });
      if constexpr (EXTRAS) {
        tables.finish(memory.grads);
      }
    }
  }
}

}  // namespace

bool backward_keys_by_warpgroups(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_k, const Matrix& grad_v,
    cudaStream_t stream) {
  return dispatch_warpgroups(problem, has_extras(problem) || problem.row_scale, [&](auto* type, auto dim, auto extras) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int D = dim.value, N = tile_of_rows<D, extras.value>;
    const Batch& batch = problem.batch;
    TileMaps maps = {};
    if (!describe(maps.block[0], problem, problem.k, batch.num_keys, block_of_warpgroups) ||
        !describe(maps.block[1], problem, problem.v, batch.num_keys, block_of_warpgroups) ||
        !describe(maps.tiles[0], problem, problem.q, batch.num_rows, N) ||
        !describe(maps.tiles[1], problem, grad_output, batch.num_rows, N)) {
      return false;
    }
    check_batch(batch, stream);
    const int64_t items =
        block_count(batch.num_keys, batch.num_sequences, block_of_warpgroups) * Shape<T, D>::parts_of_two;
    start(
        stream, hstu_attention_backward_keys_warpgroups_kernel<T, D, extras.value>,
        blocks_of_items(items, batch.num_heads, items), threads_of_warpgroups,
        KeysMemory<T, D, N>(Arena(nullptr)).bytes, problem, maps, grad_k, grad_v, items);
    return true;
  });
}

bool backward_rows_by_warpgroups(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_q, void* positions, void* times,
    cudaStream_t stream) {
  return dispatch_warpgroups(problem, has_extras(problem) || problem.row_scale, [&](auto* type, auto dim, auto extras) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int D = dim.value, N = tile_of_keys<D, extras.value>;
    const Batch& batch = problem.batch;
    TileMaps maps = {};
    if (!describe(maps.block[0], problem, problem.q, batch.num_rows, block_of_warpgroups) ||
        !describe(maps.block[1], problem, grad_output, batch.num_rows, block_of_warpgroups) ||
        !describe(maps.tiles[0], problem, problem.k, batch.num_keys, N) ||
        !describe(maps.tiles[1], problem, problem.v, batch.num_keys, N)) {
      return false;
    }
    const TablesAt<float> at = {
        static_cast<float*>(positions),
        static_cast<float*>(times),
        problem.bias.num_distances,
        problem.bias.num_buckets,
        histogram_copies(problem.bias.num_buckets, multiplying_threads, sizeof(float), D > 128)};
    const int64_t items = block_count(batch.num_rows, batch.num_sequences, block_of_warpgroups);
    // Where there are tables, as many blocks as there are histograms.
    const int64_t blocks = at.any() ? histogram_count(problem) : blocks_of_items(items, batch.num_heads, items);
    start(
        stream, hstu_attention_backward_rows_warpgroups_kernel<T, D, extras.value>, blocks, threads_of_warpgroups,
        RowsMemory<T, D, extras.value, N>(Arena(nullptr), at.any(), at.shared_size()).bytes, problem, maps, grad_q,
        at, items);
    return true;
  });
}

}  // namespace recsys_ops::hstu_attention::cuda
