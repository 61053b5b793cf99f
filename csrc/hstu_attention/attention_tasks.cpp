// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
//
// Scores lie key by key, those of a group of neighbouring rows side by side: so mask, bias and SiLU
// take many rows at once, and the products with rows of k and v need no rows of them turned.
#include "attention_tasks.h"

#include "operands.h"
#include "scores.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {
namespace {

// Memory of a task, in pieces.
class Pieces {
 public:
  explicit Pieces(Scratch& scratch) : scratch(scratch) {}

  // Says how much is needed before any is taken.
  template <class E>
  void want(int64_t count) {
    wanted += rounded(count * static_cast<int64_t>(sizeof(E)));
  }

  void allocate() {
    if (static_cast<int64_t>(scratch.size()) < wanted + alignment) {
      scratch.resize(wanted + alignment);
    }
    next = reinterpret_cast<char*>(rounded(reinterpret_cast<int64_t>(scratch.data())));
  }

  template <class E>
  E* take(int64_t count) {
    char* piece = next;
    next += rounded(count * static_cast<int64_t>(sizeof(E)));
    return reinterpret_cast<E*>(piece);
  }

 private:
  static constexpr int64_t alignment = 64;
  static int64_t rounded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

  Scratch& scratch;
  int64_t wanted = 0;
  char* next = nullptr;
};

// Takes the same pieces twice: first to count, then for real.
template <class F>
void with_memory(Scratch& scratch, const F& f) {
  Pieces pieces(scratch);
  f([&](auto*& piece, int64_t count) { pieces.want<std::remove_reference_t<decltype(*piece)>>(count); });
  pieces.allocate();
  f([&](auto*& piece, int64_t count) { piece = pieces.take<std::remove_reference_t<decltype(*piece)>>(count); });
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

  // What depends on rows and keys only: to shared and buckets of the keys, at `to`.
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

  // The gradients of what all heads added, to the sums of the weights.
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

// Products of q and k, [keys, group], become what rows of v are multiplied by. Backward, those of v and the
// output's gradient become gradients of the scores, sums of the bias's weights get theirs, and both are
// multiplied by the scales of the rows, [lanes]; the gradients, which are rounded, by that of all rows, too.
template <bool BACKWARD, bool BIASED, class A>
RECSYS_OPS_INLINE void weigh_tile(
    const Biases<A>& biases, int64_t head, const RowVector<A>& rows, int64_t first_key, int64_t keys, int64_t at,
    const A* dropped, const A* scales, A* scores, A* gradients) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  using V = Vector<A, lanes>;
  const V one = broadcast<lanes>(A{1}), alpha = broadcast<lanes>(static_cast<A>(biases.attention.alpha));
  const V scale = BACKWARD ? load<lanes>(scales) : one, common = broadcast<lanes>(static_cast<A>(biases.attention.scale));
  const bool sees_all = rows.sees_all(first_key, first_key + keys);
  for (int64_t i = 0; i < keys; ++i, at += stride) {
    const int64_t key = first_key + i;
    V score = load<lanes>(scores + at) * alpha;
    if constexpr (BIASED) {
      score += biases.of_head(head, rows, key, at);
    }
    const V sigmoid = one / (one + exp_of_minus<lanes>(score));
    const V factor = dropped ? load<lanes>(dropped + at) * scale : scale;
    const auto seen =
        sees_all ? Vector<IntegerLike<A>, lanes>{} : rows.sees(key, biases.attention.num_intervals);
    const V weight = score * sigmoid * factor;
    store<lanes>(scores + at, sees_all ? weight : seen ? weight : V{});
    if constexpr (BACKWARD) {
      const V slope = multiply_add<lanes, A>(score * sigmoid, one - sigmoid, sigmoid);
      V gradient = load<lanes>(gradients + at) * (factor * common) * slope;
      gradient = sees_all ? gradient : seen ? gradient : V{};
      store<lanes>(gradients + at, gradient);
      if constexpr (BIASED) {
        biases.add_of_head(head, rows, key, at, gradient);
      }
    }
  }
}

template <bool BACKWARD, class A>
RECSYS_OPS_INLINE void weigh(
    const Biases<A>& biases, int64_t head, const RowVector<A>& rows, int64_t first_key, int64_t keys, int64_t at,
    const A* dropped, const A* scales, A* scores, A* gradients) {
  if (biases.has_any()) {
    weigh_tile<BACKWARD, true>(biases, head, rows, first_key, keys, at, dropped, scales, scores, gradients);
  } else {
    weigh_tile<BACKWARD, false>(biases, head, rows, first_key, keys, at, dropped, scales, scores, gradients);
  }
}

// The vectors of a group that see any of some keys, from the first to the last.
struct Vectors {
  int first, last;
  int count() const { return last - first; }
};

template <class A>
Vectors seeing(const RowGroup<A>& group, int64_t from, int64_t to) {
  Vectors found = {0, 0};
  for (int v = 0; v < group.num_vectors; ++v) {
    if (group.vectors[v].sees_any(from, to)) {
      found = {found.last == 0 ? v : found.first, v + 1};
    }
  }
  return found;
}

// Zeros in the columns of vectors that take no part.
template <class A>
void clear_others(const Vectors& vectors, int64_t keys, A* numbers) {
  constexpr int lanes = full_lanes<A>;
  for (int64_t i = 0; i < keys; ++i) {
    for (int v = 0; v < group_vectors; ++v) {
      if (v < vectors.first || v >= vectors.last) {
        store<lanes>(numbers + i * group_rows<A> + v * lanes, Vector<A, lanes>{});
      }
    }
  }
}

// Adds to the rows of a group, [rows, width], the products of the keys' numbers for them with rows of keys;
// both begin with the first key of a block.
template <class E, class A>
void add_products(
    const RowGroup<A>& group, int64_t num_rows, int64_t first_key, const Span& computed, const E* numbers,
    const E* keys, int64_t width, A* sums) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  for (int64_t row = 0; row < num_rows; row += tile_rows) {
    const Span& seen = group.spans[row / tile_rows];
    const int64_t from = (std::max(computed.first, seen.first) - first_key) / packed<E>;
    const int64_t to = elements_of<E>(std::min(computed.last, seen.last) - first_key);
    if (from < to) {
      multiply<Left::by_column>(
          std::min<int64_t>(tile_rows, stride - row), width / lanes, to - from, numbers + from * stride + row, stride,
          keys + from * width, width, sums + row * width, width, true);
    }
  }
}

template <class A>
A row_scale(const Attention& attention, int64_t row) {
  const A* scales = static_cast<const A*>(attention.row_scale);
  return scales ? scales[row] : A{1};
}

// Whichever of two is of type E: elements made of numbers, or the numbers themselves.
template <class E, class A>
RECSYS_OPS_INLINE const E* of_type(const E* elements, const A* numbers) {
  if constexpr (std::is_same_v<E, A>) {
    return numbers;
  } else {
    return elements;
  }
}

// Calls f(t, keys, vectors) for the tiles of a block of keys, with the vectors of the group that see them.
template <class A, class F>
RECSYS_OPS_INLINE void for_tiles(const RowGroup<A>& group, int64_t first_key, int64_t count, const F& f) {
  for (int64_t t = 0; t < count; t += tile_rows) {
    const int64_t keys = std::min<int64_t>(tile_rows, count - t);
    f(t, keys, seeing(group, first_key + t, first_key + t + keys));
  }
}

template <class E, class A>
void forward(const Attention& attention, const Task& task, void* output, Scratch& scratch) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  const Sequence& sequence = *task.sequence;
  const int64_t dim = attention.dim, value_dim = attention.value_dim;
  const int64_t width = width_of<E, A>(dim), value_width = width_of<E, A>(value_dim);
  const int64_t num_rows = task.last - task.first, num_groups = (num_rows + stride - 1) / stride;
  const int64_t num_heads = task.last_head - task.first_head;
  const int64_t query_size = num_groups * stride * width / packed<E>, sum_size = num_groups * stride * value_width;
  const int64_t key_size = key_block * width / packed<E>, value_size = key_block * value_width / packed<E>;
  const int64_t intervals = group_vectors * attention.num_intervals * 2 * lanes;
  const bool is_dropped = attention.dropout_seed;

  Biases<A> biases = {attention, sequence, task.first_head, num_heads};
  RowGroup<A>* groups;
  IntegerLike<A>* interval_memory;
  A *rows, *sums, *scores, *dropped;
  E *turned, *turning, *keys, *values, *numbers;
  with_memory(scratch, [&](const auto& take) {
    take(groups, num_groups);
    take(interval_memory, num_groups * intervals);
    take(rows, std::max<int64_t>(stride, key_block) * std::max(width, value_width));
    take(turning, stride * width / packed<E>);
    take(turned, num_heads * query_size);
    take(sums, num_heads * sum_size);
    take(keys, num_heads * key_size);
    take(values, num_heads * value_size);
    take(scores, key_block * stride);
    take(numbers, key_block * stride / packed<E>);
    take(dropped, is_dropped ? key_block * stride : 0);
    biases.take_memory(take, false);
  });
  biases.prepare(false);
  std::fill(sums, sums + num_heads * sum_size, A{0});

  Span seen = {sequence.length, 0};
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = task.first + g * stride, there = std::min<int64_t>(stride, task.last - first);
    groups[g].set(attention, sequence, sequence.first_position() + first, interval_memory + g * intervals);
    for (const Span& span : groups[g].spans) {
      seen.add(span.first, span.last);
    }
    for (int64_t h = 0; h < num_heads; ++h) {
      unpack_rows(
          attention.dtype, attention.q, task.first_head + h, sequence.first_row + first, there, dim, width, rows);
      turn_rows<group_vectors>(
          rows, there, width, turning, turned + h * query_size + g * stride * width / packed<E>);
    }
  }

  for (int64_t j = seen.first / key_block * key_block; j < seen.last; j += key_block) {
    const int64_t count = std::min(key_block, sequence.length - j);
    bool is_unpacked = false;
    for (int64_t g = 0; g < num_groups; ++g) {
      RowGroup<A>& group = groups[g];
      if (!group.sees_any(j, j + count)) {
        continue;
      }
      for (int64_t h = 0; h < num_heads && !is_unpacked; ++h) {
        const int64_t head = task.first_head + h;
        A* to = std::is_same_v<E, A> ? reinterpret_cast<A*>(keys + h * key_size) : rows;
        unpack_keys(attention, attention.k, attention.key_cache, sequence, head, j, count, dim, width, to);
        left_rows(to, count, width, keys + h * key_size);
        to = std::is_same_v<E, A> ? reinterpret_cast<A*>(values + h * value_size) : rows;
        unpack_keys(
            attention, attention.v, attention.value_cache, sequence, head, j, count, value_dim, value_width, to);
        right_rows(to, count, value_width, values + h * value_size);
      }
      const int64_t next = !is_unpacked && !attention.cached ? j + count : sequence.length;  // to be fetched
      is_unpacked = true;
      if (biases.has_shared() || biases.is_timed) {
        for_tiles(group, j, count, [&](int64_t t, int64_t there, const Vectors& vectors) {
          for (int v = vectors.first; v < vectors.last; ++v) {
            biases.meet(group.vectors[v], j + t, there, t * stride + v * lanes);
          }
        });
      }
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t head = task.first_head + h;
        const E* of_queries = turned + h * query_size + g * stride * width / packed<E>;
        if (is_dropped) {
          group.draw(attention, sequence, head, j, dropped);
        }
        Span computed = {sequence.length, 0};
        for_tiles(group, j, count, [&](int64_t t, int64_t there, const Vectors& vectors) {
          A* tile = scores + t * stride;
          if (next + t + there <= seen.last) {
            const int64_t row = sequence.first_token + next + t;
            prefetch_rows(attention.dtype, attention.k, head, row, there, dim);
            prefetch_rows(attention.dtype, attention.v, head, row, there, value_dim);
          }
          clear_others(vectors, there, tile);
          if (vectors.count() > 0) {
            computed.add(j + t, j + t + there);
            const int64_t column = vectors.first * lanes;
            multiply<Left::by_row>(
                there, vectors.count(), elements_of<E>(dim), keys + h * key_size + t * width / packed<E>,
                width / packed<E>, of_queries + column, stride, tile + column, stride, false);
            for (int v = vectors.first; v < vectors.last; ++v) {
              weigh<false>(
                  biases, h, group.vectors[v], j + t, there, t * stride + v * lanes, is_dropped ? dropped : nullptr,
                  static_cast<const A*>(nullptr), scores, static_cast<A*>(nullptr));
            }
          }
          scores_over_keys<stride>(tile, there, numbers + t * stride / packed<E>);
        });
        add_products(
            group, std::min<int64_t>(stride, num_rows - g * stride), j, computed, of_type<E>(numbers, scores),
            values + h * value_size, value_width, sums + h * sum_size + g * stride * value_width);
      }
    }
  }
  const Tensor3 out = {output, attention.heads * value_dim, value_dim, 1};
  const int64_t first = sequence.first_row + task.first;
  for (int64_t h = 0; h < num_heads; ++h) {
    pack_rows(
        attention.dtype, out, task.first_head + h, first, num_rows, value_dim, value_width, sums + h * sum_size,
        [&](int64_t i) { return static_cast<A>(attention.scale) * row_scale<A>(attention, first + i); });
  }
}

template <class E, class A>
void backward(
    const Attention& attention, const Gradients& gradients, const Task& task, const Parts& parts, Scratch& scratch) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  const Sequence& sequence = *task.sequence;
  const int64_t dim = attention.dim, value_dim = attention.value_dim;
  const int64_t width = width_of<E, A>(dim), value_width = width_of<E, A>(value_dim);
  const int64_t num_groups = (sequence.rows + stride - 1) / stride, num_heads = task.last_head - task.first_head;
  const int64_t group_size = stride * width, value_group_size = stride * value_width;
  const int64_t query_size = num_groups * group_size / packed<E>, out_size = num_groups * value_group_size / packed<E>;
  const int64_t key_size = key_block * width, value_size = key_block * value_width;
  const int64_t intervals = group_vectors * attention.num_intervals * 2 * lanes;
  const bool is_dropped = attention.dropout_seed;

  Biases<A> biases = {attention, sequence, task.first_head, num_heads};
  RowGroup<A>* groups;
  IntegerLike<A>* interval_memory;
  A *rows, *scales, *grad_q, *grad_keys, *grad_values, *scores, *grad_scores, *dropped;
  E *turning, *q, *turned_q, *out, *turned_out, *left_keys, *right_keys, *left_values, *weights, *grads, *numbers;
  with_memory(scratch, [&](const auto& take) {
    take(groups, num_groups);
    take(interval_memory, num_groups * intervals);
    take(rows, std::max<int64_t>(stride, key_block) * std::max(width, value_width));
    take(scales, num_groups * stride);
    take(turning, stride * std::max(width, value_width) / packed<E>);
    take(q, num_heads * query_size);
    take(turned_q, num_heads * query_size);
    take(out, num_heads * out_size);
    take(turned_out, num_heads * out_size);
    take(grad_q, num_heads * num_groups * group_size);
    take(left_keys, num_heads * key_size / packed<E>);
    take(right_keys, num_heads * key_size / packed<E>);
    take(left_values, num_heads * value_size / packed<E>);
    take(grad_keys, num_heads * key_size);
    take(grad_values, num_heads * value_size);
    take(scores, key_block * stride);
    take(grad_scores, key_block * stride);
    take(weights, tile_rows * stride / packed<E>);
    take(grads, tile_rows * stride / packed<E>);
    take(numbers, key_block * stride / packed<E>);
    take(dropped, is_dropped ? key_block * stride : 0);
    biases.take_memory(take, true);
  });
  biases.prepare(true);
  std::fill(grad_q, grad_q + num_heads * num_groups * group_size, A{0});

  // Rows of q or of the output's gradient as both products take them.
  const auto hold = [&](const Tensor3& tensor, int64_t head, int64_t row, int64_t there, int64_t columns,
                        int64_t columns_held, E* held, E* turned) {
    unpack_rows(attention.dtype, tensor, head, row, there, columns, columns_held, rows);
    std::fill(rows + there * columns_held, rows + stride * columns_held, A{0});
    turn_rows<group_vectors>(rows, stride, columns_held, turning, turned);
    if (right_rows(rows, stride, columns_held, held) != held) {
      std::copy_n(reinterpret_cast<const E*>(rows), stride * columns_held, held);
    }
  };
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = g * stride, there = std::min<int64_t>(stride, sequence.rows - first);
    const int64_t row = sequence.first_row + first;
    groups[g].set(attention, sequence, sequence.first_position() + first, interval_memory + g * intervals);
    if (!groups[g].sees_any(task.first, task.last)) {
      continue;
    }
    for (int64_t i = 0; i < stride; ++i) {
      scales[first + i] = i < there ? row_scale<A>(attention, row + i) : A{0};
    }
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t head = task.first_head + h;
      const int64_t at = h * query_size + g * group_size / packed<E>;
      const int64_t out_at = h * out_size + g * value_group_size / packed<E>;
      hold(attention.q, head, row, there, dim, width, q + at, turned_q + at);
      hold(gradients.grad_output, head, row, there, value_dim, value_width, out + out_at, turned_out + out_at);
    }
  }

  for (int64_t j = task.first; j < task.last; j += key_block) {
    const int64_t count = std::min(key_block, task.last - j);
    std::fill(grad_keys, grad_keys + num_heads * key_size, A{0});
    std::fill(grad_values, grad_values + num_heads * value_size, A{0});
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t head = task.first_head + h, at = h * key_size / packed<E>, value_at = h * value_size / packed<E>;
      A* to = std::is_same_v<E, A> ? reinterpret_cast<A*>(left_keys + at) : rows;
      unpack_keys(attention, attention.k, attention.key_cache, sequence, head, j, count, dim, width, to);
      left_rows(to, count, width, left_keys + at);
      right_rows(to, count, width, right_keys + at);
      to = std::is_same_v<E, A> ? reinterpret_cast<A*>(left_values + value_at) : rows;
      unpack_keys(
          attention, attention.v, attention.value_cache, sequence, head, j, count, value_dim, value_width, to);
      left_rows(to, count, value_width, left_values + value_at);
    }
    for (int64_t g = 0; g < num_groups; ++g) {
      RowGroup<A>& group = groups[g];
      if (!group.sees_any(j, j + count)) {
        continue;
      }
      if (biases.has_shared() || biases.is_timed) {
        for_tiles(group, j, count, [&](int64_t t, int64_t there, const Vectors& vectors) {
          for (int v = vectors.first; v < vectors.last; ++v) {
            biases.meet(group.vectors[v], j + t, there, t * stride + v * lanes);
          }
        });
      }
      if (biases.has_shared()) {
        std::fill(biases.shared_sums, biases.shared_sums + count * stride, A{0});
      }
      for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t of_queries = h * query_size + g * group_size / packed<E>;
        const int64_t of_outs = h * out_size + g * value_group_size / packed<E>;
        if (is_dropped) {
          group.draw(attention, sequence, task.first_head + h, j, dropped);
        }
        Span computed = {sequence.length, 0};
        for_tiles(group, j, count, [&](int64_t t, int64_t there, const Vectors& vectors) {
          A *tile = scores + t * stride, *grad_tile = grad_scores + t * stride;
          clear_others(vectors, there, grad_tile);
          if (vectors.count() > 0) {
            computed.add(j + t, j + t + there);
            const int64_t column = vectors.first * lanes, of_tile = h * key_block + t;
            const int64_t depth = vectors.count() * lanes / packed<E>, from = column / packed<E>;
            multiply<Left::by_row>(
                there, vectors.count(), elements_of<E>(dim), left_keys + of_tile * width / packed<E>,
                width / packed<E>, turned_q + of_queries + column, stride, tile + column, stride, false);
            multiply<Left::by_row>(
                there, vectors.count(), elements_of<E>(value_dim), left_values + of_tile * value_width / packed<E>,
                value_width / packed<E>, turned_out + of_outs + column, stride, grad_tile + column, stride, false);
            for (int v = vectors.first; v < vectors.last; ++v) {
              weigh<true>(
                  biases, h, group.vectors[v], j + t, there, t * stride + v * lanes, is_dropped ? dropped : nullptr,
                  scales + g * stride + v * lanes, scores, grad_scores);
            }
            const E* left = left_rows(tile, there, stride, weights);
            multiply<Left::by_row>(
                there, value_width / lanes, depth, left + from, stride / packed<E>, out + of_outs + from * value_width,
                value_width, grad_values + of_tile * value_width, value_width, true);
            left = left_rows(grad_tile, there, stride, grads);
            multiply<Left::by_row>(
                there, width / lanes, depth, left + from, stride / packed<E>, q + of_queries + from * width, width,
                grad_keys + of_tile * width, width, true);
          }
          scores_over_keys<stride>(grad_tile, there, numbers + t * stride / packed<E>);
        });
        const E* keys = std::is_same_v<E, A> ? left_keys : right_keys;
        add_products(
            group, std::min<int64_t>(stride, sequence.rows - g * stride), j, computed,
            of_type<E>(numbers, grad_scores), keys + h * key_size / packed<E>, width,
            grad_q + (h * num_groups + g) * group_size);
      }
      if (biases.has_shared()) {
        for_tiles(group, j, count, [&](int64_t t, int64_t there, const Vectors& vectors) {
          for (int v = vectors.first; v < vectors.last; ++v) {
            biases.part(group.vectors[v], j + t, there, t * stride + v * lanes);
          }
        });
      }
    }
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t head = task.first_head + h, row = sequence.first_token + j;
      pack_rows(attention.dtype, gradients.k, head, row, count, dim, width, grad_keys + h * key_size, [&](int64_t) {
        return static_cast<A>(attention.alpha);
      });
      pack_rows(
          attention.dtype, gradients.v, head, row, count, value_dim, value_width, grad_values + h * value_size,
          [&](int64_t) { return static_cast<A>(attention.scale); });
    }
  }

  for (int64_t h = 0; h < num_heads; ++h) {
    const A* sums = grad_q + h * num_groups * group_size;
    if (A* part = static_cast<A*>(parts.grad_q)) {
      for (int64_t i = 0; i < sequence.rows; ++i) {
        std::copy_n(sums + i * width, dim, part + (h * sequence.rows + i) * dim);
      }
    } else {
      pack_rows(
          attention.dtype, gradients.q, task.first_head + h, sequence.first_row, sequence.rows, dim, width, sums,
          [&](int64_t) { return static_cast<A>(attention.alpha); });
    }
  }
  biases.write(parts);
}

template <class A>
constexpr AttentionTasks<A> kernels = {forward<A, A>, backward<A, A>, nullptr, nullptr};

#if defined(__AVX512F__)
template <>
constexpr AttentionTasks<float> kernels<float> = {
    forward<float, float>, backward<float, float>, forward<Pair, float>, backward<Pair, float>};
#endif

}  // namespace

RECSYS_OPS_DEFINE_FOR_TYPE(AttentionTasks, attention_tasks, kernels, float)
RECSYS_OPS_DEFINE_FOR_TYPE(AttentionTasks, attention_tasks, kernels, double)

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
