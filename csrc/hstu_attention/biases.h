// The relative bias as the tasks of a sequence meet it; included by sources compiled once per SIMD level.
#pragma once

#include "attention_tasks.h"
#include "scores.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {

// Calls f(rows, key, keys, at) for the vectors of a group that see each tile of a block of keys; `at` is
// where their scores are in a block's.
template <class A, class F>
RECSYS_OPS_INLINE void for_seeing_vectors(RowGroup<A>& group, int64_t first_key, int64_t count, const F& f) {
  for_tiles(group, first_key, count, [&](int64_t t, int64_t keys, const Vectors& vectors) {
    for (int v = vectors.first; v < vectors.last; ++v) {
      f(group.vectors[v], first_key + t, keys, t * group_rows<A> + v * full_lanes<A>);
    }
  });
}

// The weights of the bias as a task meets them: those that its heads share, and those of each.
template <class A>
struct Biases {
  static constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  using V = Vector<A, lanes>;

  const Attention& attention;
  const Sequence& sequence;
  const int64_t first_head, num_heads;
  const bool is_placed = attention.position.data, is_timed = attention.time.data;
  const bool shares_position = is_placed && attention.position.heads == 1;
  const bool shares_time = is_timed && attention.time.heads == 1;
  const int64_t memory = is_placed ? ReversedWeights<A>::memory(reach()) : 0;

  A* positions;   // [1 or heads, memory], weights
  A* shared;      // [key_block, stride], what all heads add to their scores
  int32_t* buckets;  // [key_block, stride], of time, unless the weights are shared

  // Backward only:
  A* position_sums;  // [1 or heads, memory]
  A* time_sums;      // [1 or heads, T, lanes]
  A* shared_sums;    // [key_block, stride], gradients of what all heads add

  bool has_shared() const { return shares_position || shares_time; }
  bool has_any() const { return is_placed || is_timed; }
  int64_t reach() const { return ReversedWeights<A>::reach(attention.position, sequence.length); }
  int64_t position_tables() const { return !is_placed ? 0 : shares_position ? 1 : num_heads; }
  int64_t time_tables() const { return !is_timed ? 0 : shares_time ? 1 : num_heads; }

  template <class Take>
  void take_memory(const Take& take, bool is_backward) {
    take(positions, position_tables() * memory);
    take(shared, has_shared() ? key_block * stride : 0);
    take(buckets, is_timed && !shares_time ? key_block * stride : 0);
    if (is_backward) {
      take(position_sums, position_tables() * memory);
      take(time_sums, time_tables() * attention.time.size * lanes);
      take(shared_sums, has_shared() ? key_block * stride : 0);
    }
  }

  void prepare(bool is_backward) {
    for (int64_t table = 0; table < position_tables(); ++table) {
      position(table).load_head(attention.position, first_head + table);
      if (is_backward) {
        position_sum(table).zero();
      }
    }
    if (is_backward) {
      std::fill(time_sums, time_sums + time_tables() * attention.time.size * lanes, A{0});
    }
  }

  ReversedWeights<A> position(int64_t table) const {
    return {attention.position, sequence.length, positions + table * memory};
  }
  ReversedWeights<A> position_sum(int64_t table) const {
    return {attention.position, sequence.length, position_sums + table * memory};
  }
  const A* time(int64_t table) const {
    return static_cast<const A*>(attention.time.data) + (shares_time ? 0 : first_head + table) * attention.time.size;
  }
  A* time_sum(int64_t table) const { return time_sums + table * attention.time.size * lanes; }

  TimeBuckets<A> buckets_of(RowVector<A>& rows, int64_t key) const {
    return {attention, rows, attention.timestamps[sequence.first_token + key]};
  }

  // What depends on rows and keys only: to shared and buckets of a block of keys.
  void meet(RowGroup<A>& group, int64_t first_key, int64_t count) const {
    if (has_shared() || is_timed) {
      for_seeing_vectors(group, first_key, count, [&](RowVector<A>& rows, int64_t key, int64_t keys, int64_t at) {
        meet(rows, key, keys, at);
      });
    }
  }

  void meet(RowVector<A>& rows, int64_t first_key, int64_t keys, int64_t to) const {
    for (int64_t i = 0; i < keys; ++i) {
      V bias{};
      if (shares_position) {
        bias = position_weights(position(0), rows, first_key + i);
      }
      if (is_timed) {
        const TimeBuckets<A> of_key = buckets_of(rows, first_key + i);
        if (shares_time) {
          bias += of_key.weights(time(0));
        } else {
          const auto numbers = of_key.numbers();
          __builtin_memcpy(buckets + to + i * stride, &numbers, sizeof(numbers));
        }
      }
      if (has_shared()) {
        store<lanes>(shared + to + i * stride, bias);
      }
    }
  }

  void clear_shared(int64_t count) const {
    if (has_shared()) {
      std::fill(shared_sums, shared_sums + count * stride, A{0});
    }
  }

  // The gradients of what all heads added, to the sums of the weights.
  void part(RowGroup<A>& group, int64_t first_key, int64_t count) const {
    if (has_shared()) {
      for_seeing_vectors(group, first_key, count, [&](RowVector<A>& rows, int64_t key, int64_t keys, int64_t at) {
        part(rows, key, keys, at);
      });
    }
  }

  void part(RowVector<A>& rows, int64_t first_key, int64_t keys, int64_t from) const {
    for (int64_t i = 0; i < keys; ++i) {
      const V gradient = load<lanes>(shared_sums + from + i * stride);
      if (shares_position) {
        add_to_positions(position_sum(0), rows, first_key + i, gradient);
      }
      if (shares_time) {
        buckets_of(rows, first_key + i).add(gradient, time_sum(0));
      }
    }
  }

  // Where a vector of rows and a key meet in the reversed weights.
  RECSYS_OPS_INLINE int64_t meeting(const ReversedWeights<A>& weights, int64_t key) const {
    const int64_t last = weights.first + weights.size - 1, center = attention.position.size / 2;
    return last - center - sequence.place(key, attention.target_group_size);
  }

  RECSYS_OPS_INLINE V position_weights(const ReversedWeights<A>& weights, const RowVector<A>& rows, int64_t key) const {
    const int64_t x = meeting(weights, key);
    if (rows.is_consecutive) {
      return load<lanes>(weights.values + std::clamp<int64_t>(x + rows.place[0], -lanes, weights.size));
    }
    V found;
    for (int lane = 0; lane < lanes; ++lane) {
      found[lane] = weights.values[std::clamp<int64_t>(x + rows.place[lane], 0, weights.size - 1)];
    }
    return found;
  }

  RECSYS_OPS_INLINE void add_to_positions(
      const ReversedWeights<A>& sums, const RowVector<A>& rows, int64_t key, V numbers) const {
    const int64_t x = meeting(sums, key);
    if (rows.is_consecutive) {
      A* sum = sums.values + std::clamp<int64_t>(x + rows.place[0], -lanes, sums.size);
      return store<lanes>(sum, load<lanes>(sum) + numbers);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      sums.values[std::clamp<int64_t>(x + rows.place[lane], 0, sums.size - 1)] += numbers[lane];
    }
  }

  // What one head adds to its scores of a key, at `at` in shared and buckets.
  RECSYS_OPS_INLINE V of_head(int64_t head, const RowVector<A>& rows, int64_t key, int64_t at) const {
    V bias = has_shared() ? load<lanes>(shared + at) : V{};
    if (is_placed && !shares_position) {
      bias += position_weights(position(head), rows, key);
    }
    if (is_timed && !shares_time) {
      V weights;
      for (int lane = 0; lane < lanes; ++lane) {
        weights[lane] = time(head)[buckets[at + lane]];
      }
      bias += weights;
    }
    return bias;
  }

  RECSYS_OPS_INLINE void add_of_head(int64_t head, const RowVector<A>& rows, int64_t key, int64_t at, V gradient) const {
    if (has_shared()) {
      store<lanes>(shared_sums + at, load<lanes>(shared_sums + at) + gradient);
    }
    if (is_placed && !shares_position) {
      add_to_positions(position_sum(head), rows, key, gradient);
    }
    if (is_timed && !shares_time) {
      for (int lane = 0; lane < lanes; ++lane) {
        time_sum(head)[buckets[at + lane] * lanes + lane] += gradient[lane];
      }
    }
  }

  void write(const Parts& parts) const {
    for (int64_t table = 0; table < position_tables(); ++table) {
      position_sum(table).write(static_cast<A*>(parts.position) + table * parts.num_distances);
    }
    for (int64_t i = 0; i < time_tables() * attention.time.size; ++i) {
      static_cast<A*>(parts.time)[i] = sum_of<lanes, A>(load<lanes>(time_sums + i * lanes));
    }
  }
};

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
