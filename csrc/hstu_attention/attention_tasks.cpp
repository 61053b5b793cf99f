// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
//
// Scores lie key by key, those of a group of neighbouring rows side by side: so mask, bias and SiLU
// take many rows at once, and the products with rows of k and v need no rows of them turned.
#include "attention_tasks.h"

#include "biases.h"
#include "operands.h"
#include "scratch.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {
namespace {

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
      biases.meet(group, j, count);
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
      biases.meet(group, j, count);
      biases.clear_shared(count);
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
      biases.part(group, j, count);
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
