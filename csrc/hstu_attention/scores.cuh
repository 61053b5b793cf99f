// What becomes of the products of q and k: bias, mask, dropout, and SiLU.
#pragma once

#include "../common/cuda/pack.cuh"
#include "sequences.cuh"
#include "tiles.cuh"

namespace recsys_ops::hstu_attention::cuda {

__device__ inline float exponential(float value) { return expf(value); }
__device__ inline double exponential(double value) { return exp(value); }

#if defined(__CUDACC__)
// Subnormal results are 0.
__device__ inline float fast_exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ inline float fast_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
#else
inline float fast_exp2(float value) { return std::exp2(value); }
inline float fast_reciprocal(float value) { return 1 / value; }
#endif

// FAST where results are rounded to 16 bits. Two share a reciprocal, since GPUs compute few of these at a time.
template <bool FAST, class A>
__device__ void sigmoids(A& first, A& second) {
  if constexpr (FAST) {
    constexpr float of_two = -1.4426950408889634f, most = 0x1p60f;  // so that their product is finite
    const float a = 1 + fminf(fast_exp2(first * of_two), most), b = 1 + fminf(fast_exp2(second * of_two), most);
    const float both = fast_reciprocal(a * b);
    first = b * both;
    second = a * both;
  } else {
    first = A{1} / (A{1} + exponential(-first));
    second = A{1} / (A{1} + exponential(-second));
  }
}

// Where a token counts as being for the position's bias: a target after the history, plus its place in
// its group.
__device__ inline int place_of(const Mask& mask, const Sequence& sequence, int position) {
  const int past = position - sequence.history;
  return past < 0 ? position : sequence.history + past % mask.target_group_size;
}

__device__ inline int64_t time_of_key(const Bias& bias, const Sequence& sequence, int position) {
  return bias.timestamps[sequence.first_key + position];
}

// The time at which what follows a row is asked for.
__device__ inline int64_t time_of_row(const Bias& bias, const Sequence& sequence, int position) {
  const bool followed = bias.next_timestamps && position < min(sequence.history, sequence.keys - 1);
  return bias.timestamps[sequence.first_key + position + followed];
}

// Differences up to 7 have a cell each, and those from 2^e to 2^(e + 1) eight.
__device__ inline int cell_of(int64_t difference) {
  if (difference < 8) {
    return static_cast<int>(difference);
  }
  const int exponent = 63 - __clzll(difference);
  return (exponent - 2) * 8 + (static_cast<int>(difference >> (exponent - 3)) & 7);
}

__device__ inline int64_t first_of_cell(int cell) {
  return cell < 8 ? cell : static_cast<int64_t>(8 + cell % 8) << (cell / 8 - 1);
}

// How many boundaries there are up to a difference, if they are [low, high].
__device__ inline int count_boundaries(const int64_t* boundaries, int64_t difference, int low, int high) {
  while (low < high) {
    const int middle = (low + high) / 2;
    if (boundaries[middle] <= difference) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int bucket_of(const Bias& bias, int64_t time, int64_t other) {
  // As whole numbers that wrap: differences past the largest are what they are in PyTorch.
  int64_t difference = static_cast<int64_t>(static_cast<uint64_t>(time) - static_cast<uint64_t>(other));
  difference = difference < 0 ? static_cast<int64_t>(-static_cast<uint64_t>(difference)) : difference;
  if (difference < 0) {
    return 0;
  }
  const int cell = cell_of(difference);
  return count_boundaries(bias.boundaries, difference, bias.cells[cell], bias.cells[cell + 1]);
}

// Philox4x32-10 of philox.py: the four words of a counter.
__device__ inline uint4 philox(int64_t seed, uint32_t c0, int64_t row, uint32_t head) {
  uint32_t c1 = static_cast<uint32_t>(row), c2 = head, c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

__device__ inline uint32_t word_of(const uint4& words, int which) {
  return which < 2 ? (which == 0 ? words.x : words.y) : (which == 2 ? words.z : words.w);
}

// What scores depend on besides products, of N rows of q.
template <class A, int N>
struct RowFacts {
  Seen* seen;
  A* scale;       // of the row's gradient
  int* place;
  int* shift;     // of its group, from places past the history to positions
  int64_t* time;

  RECSYS_OPS_INLINE explicit RowFacts(Arena& arena)
      : seen(arena.take<Seen>(N)),
        scale(arena.take<A>(N)),
        place(arena.take<int>(N)),
        shift(arena.take<int>(N)),
        time(arena.take<int64_t>(N)) {}

  __device__ RowFacts(Seen* seen, A* scale, int* place, int* shift, int64_t* time)
      : seen(seen), scale(scale), place(place), shift(shift), time(time) {}

  // Of one of two tiles of N / 2 rows.
  __device__ RowFacts of(int stage) const { return from(stage * (N / 2)); }

  // Those from row i on.
  __device__ RowFacts from(int i) const { return {seen + i, scale + i, place + i, shift + i, time + i}; }

  // Of a row of a sequence, which may be past its end; returns whom it sees.
  __device__ Seen learn(const Problem& problem, const Sequence& sequence, int i, int row, bool extras) const {
    const bool inside = row < sequence.rows;
    const int position = sequence.position(inside ? row : 0);
    const Seen found = inside ? seen_by(problem.mask, sequence, position) : Seen{0, 0, 0, 0};
    seen[i] = found;
    const auto* scales = static_cast<const A*>(problem.row_scale);
    scale[i] = scales && inside ? scales[sequence.first_row + row] : A{1};
    if (extras && problem.bias.position_weight) {
      place[i] = place_of(problem.mask, sequence, position);
      shift[i] = position < sequence.history ? 0 : position - place[i];
    }
    if (extras && problem.bias.time_weight) {
      time[i] = inside ? time_of_row(problem.bias, sequence, position) : 0;
    }
    return found;
  }
};

// The same of N keys, for two tiles: one that is used and one that is on its way.
template <int N>
struct KeyFacts {
  int* place;
  int64_t* time;

  RECSYS_OPS_INLINE explicit KeyFacts(Arena& arena)
      : place(arena.take<int>(2 * N)), time(arena.take<int64_t>(2 * N)) {}
  __device__ KeyFacts(int* place, int64_t* time) : place(place), time(time) {}

  __device__ KeyFacts of(int stage) const { return {place + stage * N, time + stage * N}; }

  __device__ void learn(const Problem& problem, const Sequence& sequence, int i, int position) const {
    if (problem.bias.position_weight) {
      place[i] = place_of(problem.mask, sequence, position);
    }
    if (problem.bias.time_weight) {
      time[i] = position < sequence.keys ? time_of_key(problem.bias, sequence, position) : 0;
    }
  }
};

// The scores of a warp's 16 rows and of N columns, which are of q and of k, or with BY_KEY of k and of q.
template <class T, int N, bool BY_KEY, bool EXTRAS>
struct Scores {
  using A = Accumulate<T>;
  static constexpr bool fast = sizeof(T) == 2;
  const Problem& problem;
  const Sequence& sequence;
  const int64_t head;
  const int first_row, first_key;  // of the tile: in the sequence's rows, and its position
  const Seen* seen;
  const int* row_place;
  const int64_t* row_time;
  const int* key_place;
  const int64_t* key_time;

  static __device__ int row_of(const Lane& lane, int n, int c) {
    return BY_KEY ? n * 8 + lane.column + c % 2 : lane.row + c / 2 * 8;
  }
  static __device__ int key_of(const Lane& lane, int n, int c) {
    return BY_KEY ? lane.row + c / 2 * 8 : n * 8 + lane.column + c % 2;
  }

  // A bit for each of a lane's scores: whether it counts.
  __device__ unsigned which_count(const Lane& lane) const {
    unsigned bits = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        bits |= static_cast<unsigned>(seen[row_of(lane, n, c)].has(first_key + key_of(lane, n, c))) << (n * 4 + c);
      }
    }
    if (EXTRAS && problem.mask.intervals.data && bits != 0) {
      unsigned within = 0;
      const int64_t count = problem.mask.num_intervals;
      for (int64_t interval = 0; interval < count; ++interval) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (bits >> (n * 4 + c) & 1) {
              const int64_t row = sequence.first_row + first_row + row_of(lane, n, c);
              const int64_t at = (row * count + interval) * 2, key = first_key + key_of(lane, n, c);
              within |= static_cast<unsigned>(
                            problem.mask.intervals[at] <= key && key < problem.mask.intervals[at + 1])
                        << (n * 4 + c);
            }
          }
        }
      }
      bits &= within;
    }
    return bits;
  }

  // The same: whether dropout keeps it.
  __device__ unsigned which_stay(const Lane& lane) const {
    const int64_t seed = *problem.dropout.seed;
    unsigned bits = 0;
    if constexpr (!BY_KEY && N % 16 == 0) {
      // 16 neighbouring keys take the same word, so each counter serves as many scores as N has words.
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = first_key + key_of(lane, half, c);
          const int64_t row = sequence.first_row + first_row + row_of(lane, 0, c);
          const uint4 words = philox(seed, key / 64 * 16 + key % 16, row, static_cast<uint32_t>(head));
#pragma unroll
          for (int n = 0; n < N / 16; ++n) {
            const uint32_t word = word_of(words, first_key / 16 % 4 + n);
            bits |= static_cast<unsigned>(word >= problem.dropout.threshold) << ((n * 2 + half) * 4 + c);
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first_key + key_of(lane, n, c);
          const int64_t row = sequence.first_row + first_row + row_of(lane, n, c);
          const uint4 words = philox(seed, key / 64 * 16 + key % 16, row, static_cast<uint32_t>(head));
          const uint32_t word = word_of(words, key % 64 / 16);
          bits |= static_cast<unsigned>(word >= problem.dropout.threshold) << (n * 4 + c);
        }
      }
    }
    return bits;
  }

  __device__ int distance_of(int row, int key) const {
    const int last = problem.bias.num_distances - 1;
    return min(max(key_place[key] - row_place[row] + last / 2, 0), last);
  }

  __device__ int bucket(int row, int key) const { return bucket_of(problem.bias, row_time[row], key_time[key]); }

  // Products become scores.
  __device__ void add_bias(Sums<T, N>& sums, const Lane& lane) const {
    const A alpha = static_cast<A>(problem.alpha);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        sums[n][c] *= alpha;
      }
    }
    if constexpr (EXTRAS) {
      if (problem.bias.position_weight) {
        const A* weights = static_cast<const A*>(problem.bias.position_weight) + head * problem.bias.position_stride;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[n][c] += weights[distance_of(row_of(lane, n, c), key_of(lane, n, c))];
          }
        }
      }
      if (problem.bias.time_weight) {
        const A* weights = static_cast<const A*>(problem.bias.time_weight) + head * problem.bias.time_stride;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            sums[n][c] += weights[bucket(row_of(lane, n, c), key_of(lane, n, c))];
          }
        }
      }
    }
  }

  __device__ static bool is_set(unsigned bits, int n, int c) { return bits >> (n * 4 + c) & 1; }

  // Bits of what counts and of what stays; `all` tells that every row sees every key.
  __device__ void decide(unsigned& counts, unsigned& stays, const Lane& lane, bool all) const {
    counts = all ? ~0u : which_count(lane);
    stays = EXTRAS && problem.dropout.seed ? which_stay(lane) : ~0u;
  }
};

// Products become what rows of v are multiplied by; `all` tells that every row sees every key.
template <class T, int N, bool EXTRAS, class TileScores>
__device__ void weigh(Sums<T, N>& sums, const TileScores& scores, const Lane& lane, bool all) {
  using A = Accumulate<T>;
  unsigned counts, stays;
  scores.decide(counts, stays, lane, all);
  scores.add_bias(sums, lane);
  const A factor = EXTRAS ? static_cast<A>(scores.problem.dropout.factor) : A{1};
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    A shares[4] = {sums[n][0], sums[n][1], sums[n][2], sums[n][3]};
    sigmoids<TileScores::fast>(shares[0], shares[1]);
    sigmoids<TileScores::fast>(shares[2], shares[3]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      A weight = sums[n][c] * shares[c];
      if constexpr (EXTRAS) {
        weight *= TileScores::is_set(stays, n, c) ? factor : A{0};
      }
      sums[n][c] = TileScores::is_set(counts, n, c) ? weight : A{0};
    }
  }
}

}  // namespace recsys_ops::hstu_attention::cuda
