// Attention by warpgroups, on sm_90a: two of them share the tiles of keys and values that a warp fetches.
#include "warpgroups.cuh"

namespace recsys_ops::hstu_attention::cuda {
namespace {

template <class T, int D, int N>
struct ForwardMemory {
  Strips<T, block_of_warpgroups, D> q;
  TwoStrips<T, N, D> k, v;
  RowFacts<float, block_of_warpgroups> rows;
  KeyFacts<N> keys;
  Arrivals arrivals;
  Item* item;
  int64_t bytes;

  RECSYS_OPS_INLINE explicit ForwardMemory(Arena arena)
      : q{arena.take<T>(staged_elements<T, D>)},
        k(arena),
        v(arena),
        rows(arena),
        keys(arena),
        arrivals(arena),
        item(arena.take<Item>(1)),
        bytes(arena.bytes() + recsys_ops::cuda::tile_alignment) {}
};

template <int D>
constexpr int tile_of_keys = smaller_tile(D <= 128 ? 128 : 64);

// What the two warpgroups do for one block's rows.
template <class T, int D, bool EXTRAS, int N>
__device__ void attend(
    const Problem& problem, const Matrix& out, const Item& item, int64_t head, const ForwardMemory<T, D, N>& memory,
    const Bounds& bounds, unsigned block_parity, Turns& turns) {
  constexpr int W = scores_at_once<N, EXTRAS>;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  const TileRanges<2> tiles = bounds.tiles(N);
  const int first = lane.warp / 4 * warpgroup_rows;
  Sums<T, D> sums = {};
  int held = -1;  // the stage whose values are being multiplied
  memory.arrivals.block->wait(block_parity);
  for (int tile = tiles.next(0); tile != tiles.after_all; tile = tiles.next(tile + 1)) {
    const int stage = turns.stage();
    memory.arrivals.full[stage].wait(turns.parity());
    Sums<T, N> weights;  // [64, tile]
    recsys_ops::cuda::begin_products();
    multiply_strips<T, D>(weights, memory.q, first, memory.k.of(stage));
    recsys_ops::cuda::commit_products();
    if (held >= 0) {
      recsys_ops::cuda::wait_for_all_products_but<1>();
      memory.arrivals.release(held);
    }
    recsys_ops::cuda::wait_for_all_products_but<0>();
    recsys_ops::cuda::settle(weights);
    const KeyFacts<N> facts = memory.keys.of(stage);
#pragma unroll
    for (int part = 0; part < N; part += W) {
      const int first_key = tile * N + part;
      const Scores<T, W, false, EXTRAS> scores = {
          problem,          sequence,          head,             item.first,         first_key,
          memory.rows.seen, memory.rows.place, memory.rows.time, facts.place + part, facts.time + part};
      const bool all = !(EXTRAS && problem.mask.intervals.data) && bounds.is_seen_by_all(first_key, W);
      weigh<T, W, EXTRAS>(part_of<W>(weights, part), scores, lane, all);
    }
    const Fragments<T, N> rounded(weights);
    recsys_ops::cuda::begin_products();
    add_strips<T, D>(sums, rounded, memory.v.of(stage), 0);
    recsys_ops::cuda::commit_products();
    held = stage;
    turns.next();
  }
  recsys_ops::cuda::wait_for_all_products_but<0>();
  recsys_ops::cuda::settle(sums);
  if (held >= 0) {
    memory.arrivals.release(held);
  }
  // Where q was, of which the other warpgroup may still need some.
  MultiplyingThreads::synchronize();
  const float scale = static_cast<float>(problem.scale);
  const float factors[2] = {scale * memory.rows.scale[lane.row], scale * memory.rows.scale[lane.row + 8]};
  write_results<T, D, D>(memory.q.data, sums, factors, out, sequence.first_row, head, item.first, sequence.rows, 0);
  recsys_ops::cuda::fence_tiles();
}

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(threads_of_warpgroups, 1) hstu_attention_forward_warpgroups_kernel(
    const __grid_constant__ Problem problem, const __grid_constant__ TileMaps maps, const Matrix out,
    int64_t num_items) {
  if constexpr (recsys_ops::cuda::has_warpgroups) {
    constexpr int N = tile_of_keys<D>;
    RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
    const ForwardMemory<T, D, N> memory{Arena(aligned_for_tiles(shared))};
    const Items items(problem.batch.num_heads);
    memory.arrivals.begin();
    if (threadIdx.x >= multiplying_threads) {
      share_registers<EXTRAS>(true);
      fetch_for_rows<T, N, D, EXTRAS>(problem, maps, items, num_items, memory, nullptr);
    } else {
      share_registers<EXTRAS>(false);
      Turns turns;
      unsigned blocks = 0;
      each_block_of_rows(problem, items, num_items, memory, EXTRAS, [&](const Item& item, const Bounds& bounds) {
        attend<T, D, EXTRAS>(problem, out, item, items.head, memory, bounds, blocks++ % 2, turns);
      });
    }
  }
}

}  // namespace

bool forward_by_warpgroups(const Problem& problem, const Matrix& out, cudaStream_t stream) {
  return dispatch_warpgroups(problem, has_extras(problem), [&](auto* type, auto dim, auto extras) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int D = dim.value, N = tile_of_keys<D>;
    const Batch& batch = problem.batch;
    TileMaps maps = {};
    if (!describe(maps.block[0], problem, problem.q, batch.num_rows, block_of_warpgroups) ||
        !describe(maps.tiles[0], problem, problem.k, batch.num_keys, N) ||
        !describe(maps.tiles[1], problem, problem.v, batch.num_keys, N)) {
      return false;
    }
    check_batch(batch, stream);
    const int64_t items = block_count(batch.num_rows, batch.num_sequences, block_of_warpgroups);
    start(
        stream, hstu_attention_forward_warpgroups_kernel<T, D, extras.value>,
        blocks_of_items(items, batch.num_heads, items), threads_of_warpgroups,
        ForwardMemory<T, D, N>(Arena(nullptr)).bytes, problem, maps, out, items);
    return true;
  });
}

}  // namespace recsys_ops::hstu_attention::cuda
