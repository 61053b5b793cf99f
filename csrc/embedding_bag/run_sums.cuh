// Sums of runs, terms that follow one another and go to the same row: by chunks, in a fixed order.
//
// A group of lanes sums the runs in one chunk of the terms. What crosses chunks is left as
// pieces, two for each chunk, which are summed in the same way by the next launch, until one chunk
// holds all. So the longest run is spread over the whole GPU, and no sum depends on who was first.
//
// Terms have targets: the row of the result that a term belongs to, or -1.
#pragma once

#include "../common/cuda/group.cuh"
#include "../common/cuda/tiles.h"

namespace recsys_ops::embedding_bag::cuda {

using namespace recsys_ops::cuda;

constexpr int loads_in_flight = 8;
constexpr int chunk_length = 32;
static_assert(loads_in_flight <= fewest_lanes && chunk_length % warp_lanes == 0);

RECSYS_OPS_INLINE int64_t chunks_of(int64_t size) { return (size + chunk_length - 1) / chunk_length; }

// Where the sums of runs go, [rows, D], and for each chunk its two pieces of runs.
template <class T>
struct Results {
  T* out;
  int64_t* targets;
  Accumulate<T>* pieces;
  int64_t dim;
};

// Sums the runs in one chunk of the terms. A run that began before it or goes on after it is left
// as a piece: the first of the chunk's two, or the second; one that does both as the first, with
// zeros as the second, so that the pieces of a run stay neighbours.
template <class T, int N, class Terms>
__device__ void sum_chunk(
    const Terms& terms, const Results<T>& to, const Group& group, int64_t chunk, int64_t column, bool writes_targets) {
  using A = Accumulate<T>;
  const int64_t begin = chunk * chunk_length;
  const auto target_of = [&](int64_t entry) { return 0 <= entry && entry < terms.size ? terms.target(entry) : -1; };
  const bool inside = begin < terms.size && column < to.dim;
  const int64_t first_target = target_of(begin), last_target = target_of(begin + chunk_length - 1);
  const bool begins_before = first_target >= 0 && target_of(begin - 1) == first_target;
  const bool goes_on = last_target >= 0 && target_of(begin + chunk_length) == last_target;
  bool in_first_run = begins_before;
  Pack<A, N> sum = {};
  for (int64_t first = begin; first < begin + chunk_length; first += group.lanes) {
    const int64_t entry = first + group.lane;
    const int64_t target = target_of(entry), next = target_of(entry + 1);
    typename Terms::Own own = {};
    if (target >= 0) {
      own = terms.look(entry);
    }
    const unsigned live = group.vote(target >= 0), ends = group.vote(target >= 0 && target != next);
    for (int i = 0; i < group.lanes && any(live >> i != 0); i += Terms::in_flight) {
      typename Terms::InFlight in_flight[Terms::in_flight];
#pragma unroll
      for (int u = 0; u < Terms::in_flight; ++u) {
        in_flight[u] = terms.fetch(group, own, i + u, (live >> (i + u) & 1) && inside, column);
      }
#pragma unroll
      for (int u = 0; u < Terms::in_flight; ++u) {
        if (live >> (i + u) & 1) {
          terms.add(sum, in_flight[u]);
        }
        const bool ends_here = ends >> (i + u) & 1;
        if (any(ends_here)) {
          const int64_t ended = group.broadcast(target, i + u);
          if (ends_here) {
            if (inside && in_first_run) {
              store<N>(to.pieces + 2 * chunk * to.dim + column, sum);
            } else if (inside) {
              store<N>(to.out + ended * to.dim + column, narrowed<T>(sum));
            }
            in_first_run = false;
            sum = {};
          }
        }
      }
    }
  }
  if (writes_targets && inside) {
    to.targets[2 * chunk] = begins_before ? first_target : -1;
    to.targets[2 * chunk + 1] = goes_on ? last_target : -1;
  }
  if (goes_on && inside) {
    A* pieces = to.pieces + 2 * chunk * to.dim + column;
    if (in_first_run) {
      store<N>(pieces, sum);
      sum = {};
    }
    store<N>(pieces + to.dim, sum);
  }
}

}  // namespace recsys_ops::embedding_bag::cuda
