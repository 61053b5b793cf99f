// Gradients of the tables of the relative bias: sums of gradients of scores by bucket. Each block has
// histograms of its own, whose every bucket has one owner at a time, so that the order is fixed.
#pragma once

#include "blocks.cuh"

// Of shared memory, for histograms of times; tests lower it.
#ifndef RECSYS_OPS_ATTENTION_HISTOGRAM_BYTES
#define RECSYS_OPS_ATTENTION_HISTOGRAM_BYTES 34816
#endif

namespace recsys_ops::hstu_attention::cuda {

constexpr int64_t most_histograms = 512;

// Threads with a histogram of times each in shared memory, a power of two; 0 where there is no room for
// any. There is less of it beside rows that are large.
inline int histogram_copies(int num_buckets, int threads, int64_t bytes_of_sum, bool rows_are_large) {
  const int64_t most = RECSYS_OPS_ATTENTION_HISTOGRAM_BYTES / (rows_are_large ? 2 : 1);
  int copies = threads;
  while (copies > 0 && copies * num_buckets * bytes_of_sum > most) {
    copies /= 2;
  }
  return copies;
}

// Where the histograms of all blocks go; null where there is no such table.
template <class A>
struct TablesAt {
  A* positions;  // [blocks, P]
  A* times;      // [blocks, T]
  int num_distances, num_buckets;
  int copies;

  RECSYS_OPS_INLINE bool any() const { return positions || times; }
  RECSYS_OPS_INLINE int64_t shared_size() const { return times ? static_cast<int64_t>(copies) * num_buckets : 0; }
};

// Of a block, whose scores a team of its threads differentiates.
template <class Team, class A>
class Tables {
 public:
  __device__ Tables(const TablesAt<A>& at, A* shared)
      : at(at),
        positions(at.positions + static_cast<int64_t>(blockIdx.x) * at.num_distances),
        times(at.times + static_cast<int64_t>(blockIdx.x) * at.num_buckets),
        histograms(at.copies > 0 ? shared : times),
        copies(at.copies > 0 ? at.copies : 1) {}

  __device__ void clear() const {
    for (int64_t i = Team::index(); at.positions && i < at.num_distances; i += Team::count()) {
      positions[i] = 0;
    }
    for (int64_t i = Team::index(); at.times && i < static_cast<int64_t>(copies) * at.num_buckets; i += Team::count()) {
      histograms[i] = 0;
    }
    Team::synchronize();
  }

  // Adds the gradients of a tile of scores; `tile` [block, N + 1] is room for them. Before the next, there
  // must be a barrier.
  template <int BLOCK, int N, class TileScores, class Facts>
  __device__ void add(
      const A (&grads)[N / 8][4], const TileScores& scores, const Facts& rows, const Bounds& bounds, const Lane& lane,
      A* tile) {
    if (at.positions) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          tile[TileScores::row_of(lane, n, c) * (N + 1) + TileScores::key_of(lane, n, c)] = grads[n][c];
        }
      }
      Team::synchronize();
      add_diagonals<N, BLOCK>(scores, rows, bounds, tile);
    }
    if (at.times) {
      for (int first = 0; first < Team::count(); first += copies) {
        const int copy = Team::index() - first;
        if (0 <= copy && copy < copies) {
#pragma unroll
          for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const int bucket = scores.bucket(TileScores::row_of(lane, n, c), TileScores::key_of(lane, n, c));
              histograms[static_cast<int64_t>(bucket) * copies + copy] += grads[n][c];
            }
          }
        }
        if (copies < Team::count()) {
          Team::synchronize();
        }
      }
    }
  }

  // Completes the block's histograms; `room` has an element for each thread.
  __device__ void finish(A* room) {
    if (at.positions) {
      add_in_order(below, 0, room);
      add_in_order(above, at.num_distances - 1, room);
    }
    Team::synchronize();
    if (at.times && at.copies > 0) {
      for (int bucket = Team::index(); bucket < at.num_buckets; bucket += Team::count()) {
        A sum = 0;
        for (int copy = 0; copy < copies; ++copy) {
          sum += histograms[static_cast<int64_t>(bucket) * copies + copy];
        }
        times[bucket] = sum;
      }
    }
  }

 private:
  // Each thread has distances of its own: in every row at most one key is that far away. A target's
  // own group takes the places after the history.
  template <int N, int BLOCK, class TileScores, class Facts>
  __device__ void add_diagonals(const TileScores& scores, const Facts& rows, const Bounds& bounds, const A* tile) {
    const int history = scores.sequence.history, first = scores.first_key, last = first + N - 1;
    const int group_end = history + scores.problem.mask.target_group_size - 1;
    const int least = first < history ? first : max(history, first - bounds.largest_shift);
    const int most = last < history ? last : max(history - 1, min(group_end, last - bounds.least_shift));
    for (int distance = least - bounds.largest_place + Team::index();
         distance <= most - bounds.least_place; distance += Team::count()) {
      A sum = 0;
#pragma unroll 4
      for (int row = 0; row < BLOCK; ++row) {
        const int place = rows.place[row] + distance;
        const int key = (place < history ? place : place + rows.shift[row]) - first;
        if (static_cast<unsigned>(key) < static_cast<unsigned>(N)) {
          sum += tile[row * (N + 1) + key];
        }
      }
      const int bucket = distance + (at.num_distances - 1) / 2;
      if (bucket < 0) {
        below += sum;
      } else if (bucket >= at.num_distances) {
        above += sum;
      } else {
        positions[bucket] += sum;
      }
    }
  }

  __device__ void add_in_order(A sum, int bucket, A* room) const {
    Team::synchronize();
    room[Team::index()] = sum;
    Team::synchronize();
    if (Team::index() == 0) {
      for (int thread = 0; thread < Team::count(); ++thread) {
        positions[bucket] += room[thread];
      }
    }
  }

  const TablesAt<A> at;
  A* const positions;
  A* const times;
  A* const histograms;  // [T, copies], of threads that take turns
  const int copies;
  A below = 0, above = 0;  // of distances past either end of the table
};

}  // namespace recsys_ops::hstu_attention::cuda
