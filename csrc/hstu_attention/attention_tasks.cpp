// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
//
// Scores lie key by key, those of a group of neighbouring rows side by side: so mask, bias and SiLU
// take many rows at once, and the products with rows of k and v need no rows of them turned.
#include "attention_tasks.h"

#include "rows.h"
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

// What is the same for all rows and keys of a task.
template <class A>
struct Head {
  const Attention& attention;
  const Sequence& sequence;
  const int64_t head;
  const A* time;                           // weights, or null
  const ReversedWeights<A>* position;      // or null
  const ReversedWeights<A>* position_sum;  // of gradients, or null
  A* time_sum;                             // [T, lanes], or null
};

template <class A>
Head<A> head_of(const Attention& attention, const Task& task) {
  const Weights& time = attention.time;
  const A* weights = static_cast<const A*>(time.data);
  return {
      attention, *task.sequence, task.head, weights ? weights + (time.heads > 1 ? task.head : 0) * time.size : nullptr,
      nullptr, nullptr, nullptr};
}

// Where a vector of rows and a key meet in the reversed weights.
template <class A>
RECSYS_OPS_INLINE int64_t meeting(const Head<A>& head, const ReversedWeights<A>& weights, int64_t key) {
  const int64_t last = weights.first + weights.size - 1, center = head.attention.position.size / 2;
  return last - center - head.sequence.place(key, head.attention.target_group_size);
}

template <class A>
RECSYS_OPS_INLINE Vector<A, full_lanes<A>> position_weights(
    const Head<A>& head, const ReversedWeights<A>& weights, const RowVector<A>& rows, int64_t key) {
  constexpr int lanes = full_lanes<A>;
  const int64_t x = meeting(head, weights, key);
  if (rows.is_consecutive) {
    return load<lanes>(weights.values + std::clamp<int64_t>(x + rows.place[0], -lanes, weights.size));
  }
  Vector<A, lanes> found;
  for (int lane = 0; lane < lanes; ++lane) {
    found[lane] = weights.values[std::clamp<int64_t>(x + rows.place[lane], 0, weights.size - 1)];
  }
  return found;
}

template <class A>
RECSYS_OPS_INLINE void add_to_positions(
    const Head<A>& head, const ReversedWeights<A>& sums, const RowVector<A>& rows, int64_t key,
    Vector<A, full_lanes<A>> numbers) {
  constexpr int lanes = full_lanes<A>;
  const int64_t x = meeting(head, sums, key);
  if (rows.is_consecutive) {
    A* sum = sums.values + std::clamp<int64_t>(x + rows.place[0], -lanes, sums.size);
    return store<lanes>(sum, load<lanes>(sum) + numbers);
  }
  for (int lane = 0; lane < lanes; ++lane) {
    sums.values[std::clamp<int64_t>(x + rows.place[lane], 0, sums.size - 1)] += numbers[lane];
  }
}

// Scores [keys, group] become what rows of v are multiplied by. With gradients of these, [keys, group],
// those become gradients of the scores, and sums of the bias's weights get theirs.
template <bool BACKWARD, bool BIASED, class A>
RECSYS_OPS_INLINE void weigh_tile(
    const Head<A>& head, RowVector<A>& rows, int64_t first_key, int64_t keys, const A* dropped, A* scores,
    A* gradients) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  using V = Vector<A, lanes>;
  const V one = broadcast<lanes>(A{1});
  const bool sees_all = rows.sees_all(first_key, first_key + keys);
  for (int64_t i = 0; i < keys; ++i) {
    const int64_t key = first_key + i;
    V score = load<lanes>(scores + i * stride);
    if constexpr (BIASED) {
      if (head.position) {
        score += position_weights(head, *head.position, rows, key);
      }
    }
    const auto finish = [&](const TimeBuckets<A>* buckets) __attribute__((always_inline)) {
      if (BIASED && buckets) {
        score += buckets->weights(head.time);
      }
      const V sigmoid = one / (one + exp_of_minus<lanes>(score));
      V weight = score * sigmoid, factor = one;
      if (dropped) {
        factor = load<lanes>(dropped + i * stride);
        weight *= factor;
      }
      const auto seen = sees_all ? Vector<IntegerLike<A>, lanes>{} : rows.sees(key, head.attention.num_intervals);
      store<lanes>(scores + i * stride, sees_all ? weight : seen ? weight : V{});
      if constexpr (BACKWARD) {
        const V slope = multiply_add<lanes, A>(score * sigmoid, one - sigmoid, sigmoid);
        V gradient = load<lanes>(gradients + i * stride) * slope;
        gradient = dropped ? gradient * factor : gradient;
        gradient = sees_all ? gradient : seen ? gradient : V{};
        store<lanes>(gradients + i * stride, gradient);
        if constexpr (BIASED) {
          if (head.position_sum) {
            add_to_positions(head, *head.position_sum, rows, key, gradient);
          }
          if (buckets) {
            buckets->add(gradient, head.time_sum);
          }
        }
      }
    };
    if (BIASED && head.time) {
      const TimeBuckets<A> buckets(head.attention, rows, head.attention.timestamps[head.sequence.first_token + key]);
      finish(&buckets);
    } else {
      finish(nullptr);
    }
  }
}

template <bool BACKWARD, class A>
RECSYS_OPS_INLINE void weigh(
    const Head<A>& head, RowVector<A>& rows, int64_t first_key, int64_t keys, const A* dropped, A* scores,
    A* gradients) {
  if (head.position || head.time) {
    weigh_tile<BACKWARD, true>(head, rows, first_key, keys, dropped, scores, gradients);
  } else {
    weigh_tile<BACKWARD, false>(head, rows, first_key, keys, dropped, scores, gradients);
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

// Adds to the rows of a group, [rows, padded(columns)], the products of the keys' numbers for them,
// [keys, group], with the keys' rows [keys, padded(columns)].
template <class A>
void add_products(
    const RowGroup<A>& group, int64_t num_rows, int64_t first_key, const Span& computed, const A* numbers,
    const A* keys, int64_t columns, A* sums) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  const int64_t width = padded<A>(columns);
  for (int64_t row = 0; row < num_rows; row += tile_rows) {
    const Span& seen = group.spans[row / tile_rows];
    const int64_t from = std::max(computed.first, seen.first) - first_key;
    const int64_t to = std::min(computed.last, seen.last) - first_key;
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
  return static_cast<A>(attention.scale) * (scales ? scales[row] : A{1});
}

template <class A>
void forward(const Attention& attention, const Task& task, void* output, Scratch& scratch) {
  constexpr int stride = group_rows<A>;
  const Sequence& sequence = *task.sequence;
  const int64_t dim = attention.dim, value_dim = attention.value_dim;
  const int64_t width = padded<A>(dim), value_width = padded<A>(value_dim);
  const int64_t num_rows = task.last - task.first, num_groups = (num_rows + stride - 1) / stride;
  const bool is_placed = attention.position.data, is_dropped = attention.dropout_seed;
  const int64_t reach = is_placed ? ReversedWeights<A>::reach(attention.position, sequence.length) : 0;
  const int64_t intervals = group_vectors * attention.num_intervals * 2 * full_lanes<A>;

  RowGroup<A>* groups;
  IntegerLike<A>* interval_memory;
  A *rows, *turned, *sums, *keys, *values, *scores, *dropped, *positions;
  with_memory(scratch, [&](const auto& take) {
    take(groups, num_groups);
    take(interval_memory, num_groups * intervals);
    take(rows, stride * width);
    take(turned, num_groups * width * stride);
    take(sums, num_groups * stride * value_width);
    take(keys, key_block * width);
    take(values, key_block * value_width);
    take(scores, key_block * stride);
    take(dropped, is_dropped ? key_block * stride : 0);
    take(positions, is_placed ? ReversedWeights<A>::memory(reach) : 0);
  });
  Head<A> head = head_of<A>(attention, task);
  ReversedWeights<A> position(attention.position, sequence.length, positions);
  if (is_placed) {
    position.load_head(attention.position, task.head);
    head.position = &position;
  }

  Span seen = {sequence.length, 0};
  const A alpha = static_cast<A>(attention.alpha);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = task.first + g * stride, there = std::min<int64_t>(stride, task.last - first);
    groups[g].set(attention, sequence, sequence.first_position() + first, interval_memory + g * intervals);
    for (const Span& span : groups[g].spans) {
      seen.add(span.first, span.last);
    }
    unpack_rows<A>(attention.dtype, attention.q, task.head, sequence.first_row + first, there, dim, rows, [&](int64_t) {
      return alpha;
    });
    transpose_rows<group_vectors>(rows, there, width, turned + g * width * stride);
  }
  std::fill(sums, sums + num_groups * stride * value_width, A{0});

  for (int64_t j = seen.first / key_block * key_block; j < seen.last; j += key_block) {
    const int64_t count = std::min(key_block, sequence.length - j);
    bool is_unpacked = false;
    for (int64_t g = 0; g < num_groups; ++g) {
      RowGroup<A>& group = groups[g];
      if (!group.sees_any(j, j + count)) {
        continue;
      }
      if (!is_unpacked) {
        unpack_keys<A>(attention, attention.k, attention.key_cache, sequence, task.head, j, count, dim, keys);
        unpack_keys<A>(
            attention, attention.v, attention.value_cache, sequence, task.head, j, count, value_dim, values);
        is_unpacked = true;
      }
      if (is_dropped) {
        group.draw(attention, sequence, task.head, j, dropped);
      }
      Span computed = {sequence.length, 0};
      for (int64_t t = 0; t < count; t += tile_rows) {
        const int64_t there = std::min<int64_t>(tile_rows, count - t);
        const Vectors vectors = seeing(group, j + t, j + t + there);
        A* tile = scores + t * stride;
        if (vectors.count() < group_vectors) {
          clear_others(vectors, there, tile);
        }
        if (vectors.count() == 0) {
          continue;
        }
        computed.add(j + t, j + t + there);
        const int64_t column = vectors.first * full_lanes<A>;
        multiply<Left::by_row>(
            there, vectors.count(), dim, keys + t * width, width, turned + g * width * stride + column, stride,
            tile + column, stride, false);
        for (int v = vectors.first; v < vectors.last; ++v) {
          const int64_t at = v * full_lanes<A>;
          weigh<false>(
              head, group.vectors[v], j + t, there, is_dropped ? dropped + t * stride + at : nullptr, tile + at,
              static_cast<A*>(nullptr));
        }
      }
      const int64_t there = std::min<int64_t>(stride, num_rows - g * stride);
      add_products(group, there, j, computed, scores, values, value_dim, sums + g * stride * value_width);
    }
  }
  const Tensor3 out = {output, attention.heads * value_dim, value_dim, 1};
  const int64_t first = sequence.first_row + task.first;
  pack_rows(attention.dtype, out, task.head, first, num_rows, value_dim, sums, [&](int64_t i) {
    return row_scale<A>(attention, first + i);
  });
}

template <class A>
void backward(
    const Attention& attention, const Gradients& gradients, const Task& task, const Parts& parts, Scratch& scratch) {
  constexpr int lanes = full_lanes<A>, stride = group_rows<A>;
  const Sequence& sequence = *task.sequence;
  const int64_t dim = attention.dim, value_dim = attention.value_dim;
  const int64_t width = padded<A>(dim), value_width = padded<A>(value_dim);
  const int64_t num_groups = (sequence.rows + stride - 1) / stride;
  const bool is_placed = attention.position.data, is_timed = attention.time.data, is_dropped = attention.dropout_seed;
  const int64_t reach = is_placed ? ReversedWeights<A>::reach(attention.position, sequence.length) : 0;
  const int64_t intervals = group_vectors * attention.num_intervals * 2 * lanes;

  RowGroup<A>* groups;
  IntegerLike<A>* interval_memory;
  A *q, *turned_q, *out, *turned_out, *grad_q, *keys, *values, *grad_keys, *grad_values, *scores, *grad_scores,
      *dropped, *positions, *position_sums, *time_sums;
  with_memory(scratch, [&](const auto& take) {
    take(groups, num_groups);
    take(interval_memory, num_groups * intervals);
    take(q, num_groups * stride * width);
    take(turned_q, num_groups * width * stride);
    take(out, num_groups * stride * value_width);
    take(turned_out, num_groups * value_width * stride);
    take(grad_q, num_groups * stride * width);
    take(keys, key_block * width);
    take(values, key_block * value_width);
    take(grad_keys, key_block * width);
    take(grad_values, key_block * value_width);
    take(scores, key_block * stride);
    take(grad_scores, key_block * stride);
    take(dropped, is_dropped ? key_block * stride : 0);
    take(positions, is_placed ? ReversedWeights<A>::memory(reach) : 0);
    take(position_sums, is_placed ? ReversedWeights<A>::memory(reach) : 0);
    take(time_sums, is_timed ? attention.time.size * lanes : 0);
  });
  Head<A> head = head_of<A>(attention, task);
  ReversedWeights<A> position(attention.position, sequence.length, positions);
  ReversedWeights<A> position_sum(attention.position, sequence.length, position_sums);
  if (is_placed) {
    position.load_head(attention.position, task.head);
    position_sum.zero();
    head.position = &position;
    head.position_sum = &position_sum;
  }
  if (is_timed) {
    std::fill(time_sums, time_sums + attention.time.size * lanes, A{0});
    head.time_sum = time_sums;
  }

  const A alpha = static_cast<A>(attention.alpha);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t first = g * stride, there = std::min<int64_t>(stride, sequence.rows - first);
    const int64_t row = sequence.first_row + first;
    groups[g].set(attention, sequence, sequence.first_position() + first, interval_memory + g * intervals);
    if (!groups[g].sees_any(task.first, task.last)) {
      continue;
    }
    A *q_rows = q + first * width, *out_rows = out + first * value_width;
    unpack_rows<A>(attention.dtype, attention.q, task.head, row, there, dim, q_rows, [&](int64_t) { return alpha; });
    unpack_rows<A>(
        attention.dtype, gradients.grad_output, task.head, row, there, value_dim, out_rows,
        [&](int64_t i) { return row_scale<A>(attention, row + i); });
    std::fill(q_rows + there * width, q_rows + stride * width, A{0});
    std::fill(out_rows + there * value_width, out_rows + stride * value_width, A{0});
    transpose_rows<group_vectors>(q_rows, stride, width, turned_q + first * width);
    transpose_rows<group_vectors>(out_rows, stride, value_width, turned_out + first * value_width);
  }
  std::fill(grad_q, grad_q + num_groups * stride * width, A{0});

  for (int64_t j = task.first; j < task.last; j += key_block) {
    const int64_t count = std::min(key_block, task.last - j);
    std::fill(grad_keys, grad_keys + count * width, A{0});
    std::fill(grad_values, grad_values + count * value_width, A{0});
    unpack_keys<A>(attention, attention.k, attention.key_cache, sequence, task.head, j, count, dim, keys);
    unpack_keys<A>(attention, attention.v, attention.value_cache, sequence, task.head, j, count, value_dim, values);
    for (int64_t g = 0; g < num_groups; ++g) {
      RowGroup<A>& group = groups[g];
      if (!group.sees_any(j, j + count)) {
        continue;
      }
      if (is_dropped) {
        group.draw(attention, sequence, task.head, j, dropped);
      }
      Span computed = {sequence.length, 0};
      for (int64_t t = 0; t < count; t += tile_rows) {
        const int64_t there = std::min<int64_t>(tile_rows, count - t);
        const Vectors vectors = seeing(group, j + t, j + t + there);
        A *tile = scores + t * stride, *grad_tile = grad_scores + t * stride;
        if (vectors.count() < group_vectors) {
          clear_others(vectors, there, grad_tile);
        }
        if (vectors.count() == 0) {
          continue;
        }
        computed.add(j + t, j + t + there);
        const int64_t column = vectors.first * lanes, row = g * stride + column;
        multiply<Left::by_row>(
            there, vectors.count(), dim, keys + t * width, width, turned_q + g * stride * width + column, stride,
            tile + column, stride, false);
        multiply<Left::by_row>(
            there, vectors.count(), value_dim, values + t * value_width, value_width,
            turned_out + g * stride * value_width + column, stride, grad_tile + column, stride, false);
        for (int v = vectors.first; v < vectors.last; ++v) {
          const int64_t at = v * lanes;
          weigh<true>(
              head, group.vectors[v], j + t, there, is_dropped ? dropped + t * stride + at : nullptr, tile + at,
              grad_tile + at);
        }
        multiply<Left::by_row>(
            there, value_width / lanes, vectors.count() * lanes, tile + column, stride, out + row * value_width,
            value_width, grad_values + t * value_width, value_width, true);
        multiply<Left::by_row>(
            there, width / lanes, vectors.count() * lanes, grad_tile + column, stride, q + row * width, width,
            grad_keys + t * width, width, true);
      }
      const int64_t there = std::min<int64_t>(stride, sequence.rows - g * stride);
      add_products(group, there, j, computed, grad_scores, keys, dim, grad_q + g * stride * width);
    }
    const auto one = [](int64_t) { return A{1}; };  // rows of q were multiplied by alpha
    pack_rows(attention.dtype, gradients.k, task.head, sequence.first_token + j, count, dim, grad_keys, one);
    pack_rows(attention.dtype, gradients.v, task.head, sequence.first_token + j, count, value_dim, grad_values, one);
  }

  if (A* part = static_cast<A*>(parts.grad_q)) {
    for (int64_t i = 0; i < sequence.rows; ++i) {
      std::copy_n(grad_q + i * width, dim, part + i * dim);
    }
  } else {
    pack_rows(
        attention.dtype, gradients.q, task.head, sequence.first_row, sequence.rows, dim, grad_q,
        [&](int64_t) { return alpha; });
  }
  if (is_placed) {
    position_sum.write(static_cast<A*>(parts.position));
  }
  if (is_timed) {
    for (int64_t bucket = 0; bucket < attention.time.size; ++bucket) {
      static_cast<A*>(parts.time)[bucket] = sum_of<lanes, A>(load<lanes>(time_sums + bucket * lanes));
    }
  }
}

template <class A>
constexpr AttentionTasks<A> kernels = {forward<A>, backward<A>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_TYPE(AttentionTasks, attention_tasks, kernels, float)
RECSYS_OPS_DEFINE_FOR_TYPE(AttentionTasks, attention_tasks, kernels, double)

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
