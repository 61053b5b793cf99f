// Attention of blocks of rows, which go through the tiles of keys that any of them sees.
#include "blocks.cuh"
#include "cached_rows.cuh"

namespace recsys_ops::hstu_attention::cuda {
namespace {

template <class T, int D, int N>
struct ForwardMemory {
  using S = Shape<T, D>;
  static constexpr int tile_size = N * S::stride;
  T* q;
  T* k;  // two tiles: one that is used and one that is on its way
  T* v;  // likewise
  RowFacts<Accumulate<T>, S::block> rows;
  KeyFacts<N> keys;
  T* scratch;
  int64_t bytes;

  RECSYS_OPS_INLINE explicit ForwardMemory(Arena arena)
      : q(arena.take<T>(S::block * S::stride)),
        k(arena.take<T>(2 * tile_size)),
        v(arena.take<T>(2 * tile_size)),
        rows(arena),
        keys(arena),
        scratch(arena.take<T>(S::warps * scratch_of_warp<T, N>)),
        bytes(arena.bytes()) {}
};

// One block's rows; k and v give a sequence's keys and values by their positions.
template <class T, int D, bool EXTRAS, int N, class Keys, class Values>
__device__ void attend(
    const Problem& problem, const Matrix& out, const Item& item, int64_t head, const ForwardMemory<T, D, N>& memory,
    const Keys& keys, const Values& values) {
  using S = Shape<T, D>;
  using A = Accumulate<T>;
  const Sequence& sequence = item.sequence;
  const Lane lane;
  const Bounds bounds = learn_rows<WholeBlock, A, S::block>(problem, sequence, memory.rows, item.first, EXTRAS);
  const TileRanges<2> tiles = bounds.tiles(N);

  const auto fetch = [&](int tile, int stage) {
    if (tile != tiles.after_all) {
      load_tile<T, D, N>(memory.k + stage * memory.tile_size, keys, tile * N, sequence.keys);
      load_tile<T, D, N>(memory.v + stage * memory.tile_size, values, tile * N, sequence.keys);
      for (int i = threadIdx.x; EXTRAS && i < N; i += S::threads) {
        memory.keys.of(stage).learn(problem, sequence, i, tile * N + i);
      }
    }
    __pipeline_commit();
  };
  load_tile<T, D, S::block>(memory.q, Rows<T>(problem.q, sequence.first_row, head), item.first, sequence.rows);
  Sums<T, S::columns> sums = {};
  Left<T, D, D <= 128> left(memory.q + lane.warp * 16 * S::stride);
  // The first time round there is nothing but to fetch.
  int tile = tiles.none, following = tiles.next(0), stage = 1;
  bool held = false;
  while (tile != tiles.after_all) {
    if (tile != tiles.none) {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    fetch(following, stage ^ 1);
    if (tile != tiles.none) {
      if (!held) {
        left.hold();
        held = true;
      }
      Sums<T, N> weights;  // [16, tile]
      multiply_rows<T, D, N>(weights, left, memory.k + stage * memory.tile_size, problem.q.columns);
      const KeyFacts<N> facts = memory.keys.of(stage);
      const Scores<T, N, false, EXTRAS> scores = {
          problem, sequence, head, item.first, tile * N, memory.rows.seen, memory.rows.place, memory.rows.time,
          facts.place, facts.time};
      const bool all = !(EXTRAS && problem.mask.intervals.data) && bounds.is_seen_by_all(tile * N, N);
      weigh<T, N, EXTRAS>(weights, scores, lane, all);
      add_product<T, D, N, S::columns>(
          sums, weights, memory.v + stage * memory.tile_size, item.column, memory.scratch);
    }
    tile = following;
    following = tiles.next(tile + 1);
    stage ^= 1;
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  const A scale = static_cast<A>(problem.scale);
  const A factors[2] = {scale * memory.rows.scale[lane.row], scale * memory.rows.scale[lane.row + 8]};
  T* staged = memory.q + lane.warp * 16 * S::stride;
  stage_sums<T, D, S::columns>(staged, sums, factors);
  __syncwarp();
  store_rows<T, D, S::columns>(
      staged, out, sequence.first_row, head, item.first + lane.warp * 16, sequence.rows, item.column);
  __syncthreads();
}

// Blocks of a multiprocessor that registers must suffice for.
template <class T, int D, bool EXTRAS>
constexpr int blocks_at_once = !EXTRAS && D <= 64 ? 3 : 2;

template <class T, int D, bool EXTRAS>
__global__ void __launch_bounds__(Shape<T, D>::threads, (blocks_at_once<T, D, EXTRAS>))
    hstu_attention_forward_kernel(const __grid_constant__ Problem problem, const Matrix out, int64_t num_items) {
  using S = Shape<T, D>;
  RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
  const ForwardMemory<T, D, tile_of_scores<T, D, EXTRAS>> memory{Arena(shared)};
  const Items items(problem.batch.num_heads);
  bool good = true;
  for (int64_t i = items.first; i < num_items; i += items.stride) {
    good = (items.head != 0 || values_are_good(problem.batch, i)) && good;
    const Item item(problem.batch, problem.batch.query_offsets, i, S::block, S::parts, S::columns);
    good = good && item.sequence.good;
    if (item.first < item.sequence.rows && item.column < problem.v.columns) {
      const Sequence& sequence = item.sequence;
      attend<T, D, EXTRAS>(
          problem, out, item, items.head, memory, Rows<T>(problem.k, sequence.first_key, items.head),
          Rows<T>(problem.v, sequence.first_key, items.head));
    }
  }
  check_values(good);
}

template <class T, int D>
__global__ void __launch_bounds__(Shape<T, D>::threads, 2) hstu_attention_cached_forward_kernel(
    const __grid_constant__ Problem problem, const __grid_constant__ Cache cache, const Matrix out,
    int64_t num_items) {
  using S = Shape<T, D>;
  RECSYS_OPS_DYNAMIC_SHARED(unsigned char, shared);
  const ForwardMemory<T, D, tile_of_scores<T, D, true>> memory{Arena(shared)};
  const Items items(problem.batch.num_heads);
  const int64_t heads = problem.batch.num_heads;
  bool good = true;
  for (int64_t i = items.first; i < num_items; i += items.stride) {
    if (items.head == 0) {
      good = values_are_good(problem.batch, i) && good;
      if (i < problem.batch.num_sequences) {
        good = CachePlaces(cache, sequence_of(problem.batch, i)).good() && good;
      }
    }
    const Item item(problem.batch, problem.batch.query_offsets, i, S::block, S::parts, S::columns);
    good = good && item.sequence.good;
    if (item.first < item.sequence.rows && item.column < problem.v.columns) {
      const Sequence& sequence = item.sequence;
      const CachedRows<T> keys(
          cache, cache.keys, cache.key_page_stride, cache.key_codes, cache.key_scales, problem.k, sequence, items.head,
          heads);
      const CachedRows<T> values(
          cache, cache.values, cache.value_page_stride, cache.value_codes, cache.value_scales, problem.v, sequence,
          items.head, heads);
      attend<T, D, true>(problem, out, item, items.head, memory, keys, values);
    }
  }
  check_values(good);
}

__global__ void __launch_bounds__(num_cells + 1)
    hstu_attention_cells_kernel(const int64_t* boundaries, int num_boundaries, int* cells) {
  const int cell = static_cast<int>(threadIdx.x);
  cells[cell] =
      cell == num_cells ? num_boundaries : count_boundaries(boundaries, first_of_cell(cell), 0, num_boundaries);
}

constexpr int checking_threads = 128;

// A thread for each sequence.
__global__ void __launch_bounds__(checking_threads) hstu_attention_check_kernel(const Batch batch) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * checking_threads + threadIdx.x;
  check_values(number >= batch.num_sequences || values_are_good(batch, number));
}

Matrix result_of(const Problem& problem, void* out) {
  const int64_t heads = problem.batch.num_heads, columns = problem.v.columns;
  const bool wide = columns * element_size(problem.dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  return {out, heads * columns, columns, 1, problem.v.columns, wide};
}

template <class T, int D, bool EXTRAS>
int64_t bytes_of_forward() {
  return ForwardMemory<T, D, tile_of_scores<T, D, EXTRAS>>(Arena(nullptr)).bytes;
}

template <class F>
void start_items(const Problem& problem, const F& f) {
  dispatch_shape(problem, [&](auto* type, auto dim) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int D = dim.value;
    using S = Shape<T, D>;
    const int64_t items =
        block_count(problem.batch.num_rows, problem.batch.num_sequences, S::block) * S::parts;
    if (items > 0 && problem.batch.num_heads > 0) {
      f(type, dim, items, blocks_of_items(items, problem.batch.num_heads, items), S::threads);
    }
  });
}

}  // namespace

void find_cells(const int64_t* boundaries, int num_buckets, int* cells, cudaStream_t stream) {
  start(stream, hstu_attention_cells_kernel, 1, num_cells + 1, 0, boundaries, num_buckets - 1, cells);
}

void check_batch(const Batch& batch, cudaStream_t stream) {
  const int64_t blocks = (batch.num_sequences + checking_threads - 1) / checking_threads;
  if (blocks > 0) {
    start(stream, hstu_attention_check_kernel, blocks, checking_threads, 0, batch);
  }
}

void forward(const Problem& problem, void* out, cudaStream_t stream) {
  const Matrix result = result_of(problem, out);
  if (forward_by_warpgroups(problem, result, stream)) {
    return;
  }
  start_items(problem, [&](auto* type, auto dim, int64_t items, int64_t blocks, int threads) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto with = [&](auto extras) {
      start(
          stream, hstu_attention_forward_kernel<T, dim.value, extras.value>, blocks, threads,
          bytes_of_forward<T, dim.value, extras.value>(), problem, result, items);
    };
    if constexpr (sizeof(T) == 2) {
      if (!has_extras(problem)) {
        return with(std::false_type());
      }
    }
    with(std::true_type());
  });
}

void cached_forward(const Problem& problem, const Cache& cache, void* out, cudaStream_t stream) {
  const Matrix result = result_of(problem, out);
  start_items(problem, [&](auto* type, auto dim, int64_t items, int64_t blocks, int threads) {
    using T = std::remove_pointer_t<decltype(type)>;
    start(
        stream, hstu_attention_cached_forward_kernel<T, dim.value>, blocks, threads,
        bytes_of_forward<T, dim.value, true>(), problem, cache, result, items);
  });
}

}  // namespace recsys_ops::hstu_attention::cuda
