// How blocks of sm_90a go through tiles: a warp fetches them, and two warpgroups of 64 rows each multiply.
#pragma once

#include "../common/cuda/warpgroup.cuh"
#include "blocks.cuh"

// Rows of a tile, if not what suits a GPU, and the least columns of rows that warpgroups are worth it for;
// tests lower them.
#ifndef RECSYS_OPS_ATTENTION_WARPGROUP_TILE
#define RECSYS_OPS_ATTENTION_WARPGROUP_TILE 128
#endif
#ifndef RECSYS_OPS_ATTENTION_WARPGROUP_COLUMNS
#define RECSYS_OPS_ATTENTION_WARPGROUP_COLUMNS 33
#endif

namespace recsys_ops::hstu_attention::cuda {

using recsys_ops::cuda::Operand;
using recsys_ops::cuda::SharedBarrier;
using recsys_ops::cuda::warpgroup_rows;

constexpr int block_of_warpgroups = 2 * warpgroup_rows;
constexpr int multiplying_threads = 2 * recsys_ops::cuda::warpgroup_threads;
constexpr int threads_of_warpgroups = multiplying_threads + recsys_ops::cuda::warpgroup_threads;
// Of a thread; what one kind does not need of all 65,536 the other takes.
constexpr int registers_to_fetch = 40, registers_to_multiply = 232;
constexpr int registers_to_fetch_with_extras = 56, registers_to_multiply_with_extras = 224;

constexpr int smaller_tile(int rows) {
  return rows < RECSYS_OPS_ATTENTION_WARPGROUP_TILE ? rows : RECSYS_OPS_ATTENTION_WARPGROUP_TILE;
}

// Scores of a row that are decided on together: a bit each, and many registers where there are extras.
template <int N, bool EXTRAS>
constexpr int scores_at_once = EXTRAS && N > 32 ? 32 : N > 64 ? 64 : N;

// Not by __syncthreads, which the two kinds of threads would call from different places.
struct AllThreads {
  __device__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int count() { return threads_of_warpgroups; }
  __device__ static void synchronize() { recsys_ops::cuda::synchronize(1, count()); }
};
struct MultiplyingThreads {
  __device__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int count() { return multiplying_threads; }
  __device__ static void synchronize() { recsys_ops::cuda::synchronize(2, count()); }
};

// Of warpgroups that fetch, and of those that multiply.
template <bool EXTRAS>
__device__ void share_registers(bool fetches) {
  if (fetches) {
    recsys_ops::cuda::take_fewer_registers<EXTRAS ? registers_to_fetch_with_extras : registers_to_fetch>();
  } else {
    recsys_ops::cuda::take_more_registers<EXTRAS ? registers_to_multiply_with_extras : registers_to_multiply>();
  }
}

// N rows of D columns in shared memory, as tiles of 64 columns one after the other.
template <class T, int N, int D>
struct Strips {
  static constexpr int strip = N * recsys_ops::cuda::tile_columns * sizeof(T), bytes = N * D * sizeof(T);
  T* data;

  // By one thread.
  __device__ void fetch(SharedBarrier& barrier, const CUtensorMap& map, int head, int64_t row) const {
#pragma unroll
    for (int column = 0; column < D; column += recsys_ops::cuda::tile_columns) {
      barrier.fetch(data + column * N, map, column, head, static_cast<int>(row));
    }
  }

  // Rows from `first` on become zeros; by a warp.
  __device__ void clear(int first) const {
    constexpr int words = recsys_ops::cuda::tile_columns * sizeof(T) / 16;  // the swizzle stays within a row
    for (int column = 0; column < D; column += recsys_ops::cuda::tile_columns) {
      for (int word = first * words + threadIdx.x % warp_lanes; word < N * words; word += warp_lanes) {
        write_word(data + column * N + word * (16 / static_cast<int>(sizeof(T))), Pack<T, 16 / sizeof(T)>{});
      }
    }
  }
};

// Two of them, one that is used and one that is on its way.
template <class T, int N, int D>
struct TwoStrips {
  T* data;

  RECSYS_OPS_INLINE explicit TwoStrips(Arena& arena) : data(arena.take<T>(2 * N * D)) {}
  __device__ Strips<T, N, D> of(int stage) const { return {data + stage * (N * D)}; }
};

// sums [64, N] = rows of a from `first` on times those of b, in D columns.
template <class T, int D, int M, int N>
__device__ void multiply_strips(Sums<T, N>& sums, const Strips<T, M, D>& a, int first, const Strips<T, N, D>& b) {
  constexpr int columns = recsys_ops::cuda::tile_columns;
  const Operand left = Operand::of_rows(a.data + first * columns), right = Operand::of_rows(b.data);
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    const int within = d % columns * sizeof(T);
    recsys_ops::cuda::multiply_rows_of_tiles<T, N>(
        sums, left.past(d / columns * a.strip + within), right.past(d / columns * b.strip + within), d > 0);
  }
}

// Sums rounded to T, as what warpgroups multiply.
template <class T, int N>
struct Fragments {
  unsigned of[N / 16][4];

  __device__ explicit Fragments(const Sums<T, N>& sums) {
    using recsys_ops::cuda::pair_of;
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      const auto& low = sums[2 * n];
      const auto& high = sums[2 * n + 1];
      of[n][0] = pair_of<T>(low[0], low[1]);
      of[n][1] = pair_of<T>(low[2], low[3]);
      of[n][2] = pair_of<T>(high[0], high[1]);
      of[n][3] = pair_of<T>(high[2], high[3]);
    }
  }
};

// sums [64, C] += weights [64, N] times C columns of b from `column` on.
template <class T, int C, int N, int D>
__device__ void add_strips(
    Sums<T, C>& sums, const Fragments<T, N>& weights, const Strips<T, N, D>& b, int column) {
  const Operand right = Operand::of_columns(b.data + column * N, b.strip);
#pragma unroll
  for (int n = 0; n < N / 16; ++n) {
    recsys_ops::cuda::multiply_columns_of_tiles<T, C>(
        sums, weights.of[n], right.past(n * 16 * recsys_ops::cuda::tile_columns * sizeof(T)));
  }
}

// Columns [first, first + W) of sums.
template <int W, int N>
__device__ auto part_of(float (&sums)[N][4], int first) -> float (&)[W / 8][4] {
  return reinterpret_cast<float(&)[W / 8][4]>(sums[first / 8]);
}

// Two places for tiles take turns; a tile's phase is over when both kinds of threads have had it.
class Turns {
 public:
  __device__ int stage() const { return static_cast<int>(turn % 2); }
  __device__ unsigned parity() const { return turn / 2 % 2; }
  __device__ void next() { ++turn; }

 private:
  unsigned turn = 0;
};

// The barriers of a block.
struct Arrivals {
  SharedBarrier* block;  // what the block keeps is there
  SharedBarrier* full;   // two: a stage's tiles are there
  SharedBarrier* empty;  // two: they are no longer needed
  SharedBarrier* ragged;  // tiles are there that end after their sequence

  RECSYS_OPS_INLINE explicit Arrivals(Arena& arena)
      : block(arena.take<SharedBarrier>(6)), full(block + 1), empty(block + 3), ragged(block + 5) {}

  // By all threads.
  __device__ void begin() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 6; ++i) {
        const bool by_multiplying = empty <= block + i && block + i < empty + 2;
        block[i].begin(by_multiplying ? multiplying_threads / warp_lanes : 1);
      }
      recsys_ops::cuda::fence_new_barriers();
      recsys_ops::cuda::fence_tiles();
    }
    __syncthreads();
  }

  // By all lanes of a warp that multiplies.
  __device__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % warp_lanes == 0) {
      empty[stage].arrive();
    }
  }
};

// Calls f(item) for each item of a block, by all threads, which all have left the one before. The item is in
// shared memory, as registers are scarce.
template <class F>
__device__ void each_item(
    const Batch& batch, const Integers& offsets, const Items& items, int64_t num_items, int parts, int columns,
    Item* shared_item, const F& f) {
  for (int64_t i = items.first; i < num_items; i += items.stride) {
    AllThreads::synchronize();
    if (AllThreads::index() == 0) {
      *shared_item = Item(batch, offsets, i, block_of_warpgroups, parts, columns);
    }
    AllThreads::synchronize();
    f(*shared_item);
  }
}

// Two kinds of rows that are needed together: of k and v, or of q and the gradients of results.
struct TileMaps {
  CUtensorMap block[2], tiles[2];
};

// What one warp does: it fetches what a block keeps, and tile after tile.
template <class T, int M, int N, int D>
class Fetcher {
 public:
  __device__ Fetcher(
      const Arrivals& arrivals, const TwoStrips<T, N, D>& first, const TwoStrips<T, N, D>& second)
      : arrivals(arrivals), first(first), second(second), lane(threadIdx.x % warp_lanes) {}

  // Rows of a block, and if there are two kinds the others.
  __device__ void keep(
      const TileMaps& maps, const Strips<T, M, D>& one, const Strips<T, M, D>* other, int head, int64_t row) const {
    if (lane == 0) {
      arrivals.block->arrive_and_expect((other ? 2 : 1) * one.bytes);
      one.fetch(*arrivals.block, maps.block[0], head, row);
      if (other) {
        other->fetch(*arrivals.block, maps.block[1], head, row);
      }
    }
  }

  // Tiles of a sequence's rows [row, row + end); learn(tile, stage) is called by all lanes before each.
  template <class Ranges, class Learn>
  __device__ void go_through(
      const TileMaps& maps, const Ranges& ranges, int head, int64_t row, int end, const Learn& learn) {
    for (int tile = ranges.next(0); tile != Ranges::after_all; tile = ranges.next(tile + 1)) {
      const int stage = turns.stage(), left = end - tile * N;
      arrivals.empty[stage].wait(turns.parity() ^ 1);
      learn(tile, stage);
      __syncwarp();
      SharedBarrier& barrier = left < N ? *arrivals.ragged : arrivals.full[stage];
      if (lane == 0) {
        barrier.arrive_and_expect(2 * Strips<T, N, D>::bytes);
        first.of(stage).fetch(barrier, maps.tiles[0], head, row + tile * N);
        second.of(stage).fetch(barrier, maps.tiles[1], head, row + tile * N);
      }
      if (left < N) {
        // What follows is another sequence's, and 0 times NaN would be NaN.
        barrier.wait(ragged_turn++ % 2);
        first.of(stage).clear(left);
        second.of(stage).clear(left);
        recsys_ops::cuda::fence_tiles();
        __syncwarp();
        if (lane == 0) {
          arrivals.full[stage].arrive();
        }
      }
      turns.next();
    }
  }

 private:
  const Arrivals& arrivals;
  const TwoStrips<T, N, D>&first, &second;
  const int lane;
  Turns turns;
  unsigned ragged_turn = 0;
};

// Calls f(item, what its rows see) for each block of rows.
template <class Memory, class F>
__device__ void each_block_of_rows(
    const Problem& problem, const Items& items, int64_t num_items, const Memory& memory, bool extras, const F& f) {
  const auto with = [&](const Item& item) {
    if (item.first < item.sequence.rows) {
      f(item, learn_rows<AllThreads>(problem, item.sequence, memory.rows, item.first, extras));
    }
  };
  each_item(problem.batch, problem.batch.query_offsets, items, num_items, 1, 0, memory.item, with);
}

// What the warpgroup that fetches does where blocks of rows go through keys and values; `other` are more rows
// of the blocks, if there are any.
template <class T, int N, int D, bool EXTRAS, class Memory>
__device__ void fetch_for_rows(
    const Problem& problem, const TileMaps& maps, const Items& items, int64_t num_items, const Memory& memory,
    const Strips<T, block_of_warpgroups, D>* other) {
  Fetcher<T, block_of_warpgroups, N, D> fetcher(memory.arrivals, memory.k, memory.v);
  each_block_of_rows(problem, items, num_items, memory, EXTRAS, [&](const Item& item, const Bounds& bounds) {
    if (threadIdx.x >= multiplying_threads + warp_lanes) {
      return;
    }
    const Sequence& sequence = item.sequence;
    const int head = static_cast<int>(items.head);
    fetcher.keep(maps, memory.q, other, head, sequence.first_row + item.first);
    const auto learn = [&](int tile, int stage) {
      for (int i = threadIdx.x % warp_lanes; EXTRAS && i < N; i += warp_lanes) {
        memory.keys.of(stage).learn(problem, sequence, i, tile * N + i);
      }
    };
    fetcher.go_through(maps, bounds.tiles(N), head, sequence.first_key, sequence.keys, learn);
  });
}

// A block's shared memory from where tiles may be.
__device__ inline unsigned char* aligned_for_tiles(unsigned char* shared) {
  constexpr unsigned alignment = recsys_ops::cuda::tile_alignment;
  return shared + (alignment - recsys_ops::cuda::shared_address(shared) % alignment) % alignment;
}

// Room for rows that are multiplied, and then for results on their way out, [rows, D + 8].
template <class T, int D>
constexpr int staged_elements = block_of_warpgroups * Shape<T, D>::stride;

// Results of a block's rows, by way of where strips were that nobody needs any more. By all threads that
// multiply.
template <class T, int D, int C>
__device__ void write_results(
    T* room, const Sums<T, C>& sums, const float (&factors)[2], const Matrix& matrix, int64_t row, int64_t head,
    int first, int end, int column) {
  const int warp = threadIdx.x / warp_lanes;
  T* staged = room + warp * 16 * Shape<T, D>::stride;
  stage_sums<T, D, C>(staged, sums, factors);
  __syncwarp();
  store_rows<T, D, C>(staged, matrix, row, head, first + warp * 16, end, column);
  __syncwarp();
}

// Calls f with a null pointer of the type, the columns, and whether there are extras, if warpgroups can and
// should compute a problem on this GPU; returns whether it did.
template <class F>
bool dispatch_warpgroups(const Problem& problem, bool extras, const F& f) {
  const int widest = std::max(problem.q.columns, problem.v.columns);
  constexpr int64_t most_rows = INT32_MAX;
  if (element_size(problem.dtype) != 2 || widest < RECSYS_OPS_ATTENTION_WARPGROUP_COLUMNS || !problem.q.wide ||
      !problem.k.wide || !problem.v.wide || problem.batch.num_rows == 0 || problem.batch.num_rows > most_rows ||
      problem.batch.num_keys > most_rows || problem.batch.num_heads == 0 || !recsys_ops::cuda::has_tensor_tiles()) {
    return false;
  }
  const auto with_columns = [&](auto* type) {
    const auto with = [&](auto dim) {
      return extras ? f(type, dim, std::true_type()) : f(type, dim, std::false_type());
    };
    return widest <= 64    ? with(std::integral_constant<int, 64>())
           : widest <= 128 ? with(std::integral_constant<int, 128>())
                           : with(std::integral_constant<int, 256>());
  };
  return problem.dtype == DType::float16 ? with_columns(static_cast<Half*>(nullptr))
                                         : with_columns(static_cast<BFloat16*>(nullptr));
}

// Tiles of some rows of a matrix; false where they cannot be fetched.
inline bool describe(
    CUtensorMap& map, const Problem& problem, const Matrix& matrix, int64_t num_rows, int rows_of_tile) {
  const int64_t bytes = element_size(problem.dtype);
  return matrix.wide && recsys_ops::cuda::describe_tiles(
                            map, matrix.data, problem.dtype == DType::bfloat16, num_rows, problem.batch.num_heads,
                            matrix.columns, matrix.row_stride * bytes, matrix.head_stride * bytes, rows_of_tile);
}

}  // namespace recsys_ops::hstu_attention::cuda
