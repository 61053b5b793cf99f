// What the gradients of a tile's scores are, and what rows are multiplied by for those of v.
#pragma once

#include "blocks.cuh"

namespace recsys_ops::hstu_attention::cuda {

template <class T>
__device__ Accumulate<T> rounded(Accumulate<T> value) {
  T narrow;
  recsys_ops::cuda::narrow(value, narrow);
  return recsys_ops::cuda::widen(narrow);
}

// What rounding to T leaves over.
template <class T, int N>
__device__ void keep_remainders(Sums<T, N>& values) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      values[n][c] -= rounded<T>(values[n][c]);
    }
  }
}

// A power of two near the largest of a sequence's row scales. Weights times scales are held in fp16
// after division by it, so that small scales do not end among the subnormals. Has barriers.
template <class Team, class T>
__device__ float unit_of_scales(const Problem& problem, const Sequence& sequence, int* largest) {
  if constexpr (!std::is_same_v<T, Half>) {
    return 1;
  } else {
    if (!problem.row_scale) {
      return 1;
    }
    if (Team::index() == 0) {
      *largest = 0;
    }
    Team::synchronize();
    int bits = 0;
    for (int row = Team::index(); row < sequence.rows; row += Team::count()) {
      const float scale = static_cast<const float*>(problem.row_scale)[sequence.first_row + row];
      bits = max(bits, static_cast<int>(__float_as_uint(fabsf(scale))));
    }
    atomicMax(largest, bits);
    Team::synchronize();
    const int exponent = *largest >> 23;
    return exponent == 255 ? 1.0f : __uint_as_float(static_cast<unsigned>(max(exponent, 1)) << 23);
  }
}

template <class T, int N, bool EXTRAS, class TileScores, class Facts>
__device__ void differentiate(
    Sums<T, N>& weights, Sums<T, N>& grads, const TileScores& scores, const Facts& rows, const Lane& lane, bool all,
    Accumulate<T> per_unit) {
  using A = Accumulate<T>;
  unsigned counts, stays;
  scores.decide(counts, stays, lane, all);
  scores.add_bias(weights, lane);
  const A factor = EXTRAS ? static_cast<A>(scores.problem.dropout.factor) : A{1};
  const A scale = static_cast<A>(scores.problem.scale);
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    A shares[4] = {weights[n][0], weights[n][1], weights[n][2], weights[n][3]};
    sigmoids<TileScores::fast>(shares[0], shares[1]);
    sigmoids<TileScores::fast>(shares[2], shares[3]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const A score = weights[n][c], slope = shares[c] * (A{1} + score * (A{1} - shares[c]));
      const A of_row = EXTRAS ? rows.scale[TileScores::row_of(lane, n, c)] : A{1};
      A weight = score * shares[c], grad = grads[n][c] * (of_row * scale) * slope;
      if constexpr (EXTRAS) {
        const A kept = TileScores::is_set(stays, n, c) ? factor : A{0};
        weight *= kept;
        grad *= kept;
      }
      const bool is_seen = TileScores::is_set(counts, n, c);
      weights[n][c] = is_seen ? rounded<T>(weight) * (of_row * per_unit) : A{0};
      grads[n][c] = is_seen ? grad : A{0};
    }
  }
}

}  // namespace recsys_ops::hstu_attention::cuda
