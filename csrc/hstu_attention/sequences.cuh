// Which sequence a block works on, and which keys its rows see.
#pragma once

#include "../common/cuda/group.cuh"
#include "hstu_attention_cuda.h"

namespace recsys_ops::hstu_attention::cuda {

// One sequence of n tokens, of which q has the last m.
struct Sequence {
  int64_t number, first_row, first_key;  // in the batch, in q, in k and v
  int rows, keys;                        // m and n
  int contextual;                        // where its prefix ends
  int history;                           // where its targets begin
  bool good;

  __device__ int position(int row) const { return keys - rows + row; }
};

// One whose values are refused has no tokens.
__device__ inline Sequence sequence_of(const Batch& batch, int64_t number) {
  const int64_t first_row = batch.query_offsets[number], end_row = batch.query_offsets[number + 1];
  const int64_t first_key = batch.offsets[number], end_key = batch.offsets[number + 1];
  const int64_t rows = end_row - first_row, keys = end_key - first_key;
  const int64_t prefix = batch.num_contextual.data ? batch.num_contextual[number] : 0;
  const int64_t targets = batch.num_targets.data ? batch.num_targets[number] : 0;
  const bool good = 0 <= first_row && first_row <= end_row && end_row <= batch.num_rows && 0 <= first_key &&
                    first_key <= end_key && end_key <= batch.num_keys && rows <= keys && keys <= largest_length &&
                    0 <= targets && targets <= keys && prefix >= 0;
  if (!good) {
    return {number, 0, 0, 0, 0, 0, 0, false};
  }
  const int history = static_cast<int>(keys - targets);
  const int contextual = prefix < history ? static_cast<int>(prefix) : history;
  return {number, first_row, first_key, static_cast<int>(rows), static_cast<int>(keys), contextual, history, true};
}

// Every sequence has at least one block of rows; block i checks sequence i, so that none is left out
// whatever the offsets are.
__device__ inline bool values_are_good(const Batch& batch, int64_t block) {
  bool good = block >= batch.num_sequences || sequence_of(batch, block).good;
  if (block == 0) {
    good = good && batch.offsets[0] == 0 && batch.query_offsets[0] == 0 &&
           batch.query_offsets[batch.num_sequences] == batch.num_rows;
    good = good && (batch.num_keys > INT64_MAX / 2 || batch.offsets[batch.num_sequences] == batch.num_keys);
  }
  return good;
}

// Blocks of a size that cover every sequence of a batch of this many rows, known without its offsets.
inline int64_t block_count(int64_t num_rows, int64_t num_sequences, int size) {
  return num_sequences == 0 ? 0 : num_rows / size + num_sequences;
}

// The blocks of sequence b start at offsets[b] / size + b.
__device__ inline int64_t first_block(const Integers& offsets, int64_t number, int size) {
  return offsets[number] / size + number;
}

// The last sequence whose blocks start at this one or before.
__device__ inline int64_t sequence_at(const Integers& offsets, int64_t num_sequences, int64_t block, int size) {
  int64_t low = 0, high = num_sequences - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (first_block(offsets, middle, size) <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Positions [begin, begin + count), and [group, group + members).
struct Seen {
  int begin, count, group, members;

  __device__ bool has(int key) const {
    return static_cast<unsigned>(key - begin) < static_cast<unsigned>(count) ||
           static_cast<unsigned>(key - group) < static_cast<unsigned>(members);
  }
};

// Whether a row has a window, see masks.py. Targets count as what comes next after the history.
__device__ inline bool has_window(const Mask& mask, const Sequence& sequence, int position) {
  const int place = position < sequence.history ? position : sequence.history;
  return mask.window > 0 && !(mask.full_window_tail > 0 && place >= sequence.history - mask.full_window_tail);
}

// The first key that a row after the prefix sees.
__device__ inline int first_seen(const Mask& mask, const Sequence& sequence, int position) {
  const int place = position < sequence.history ? position : sequence.history;
  const int first = has_window(mask, sequence, position) ? place - mask.window : 0;
  return first < sequence.contextual || first < 0 ? 0 : first;
}

__device__ inline Seen seen_by(const Mask& mask, const Sequence& sequence, int position) {
  if (position < sequence.contextual) {
    return {0, sequence.history, 0, 0};
  }
  const int begin = first_seen(mask, sequence, position);
  if (position < sequence.history) {
    int end = sequence.history;
    if (mask.causal) {
      end = position + 1;
    } else if (has_window(mask, sequence, position)) {
      end = min(end, position + mask.window + 1);
    }
    return {begin, end - begin, 0, 0};
  }
  const int size = mask.target_group_size;
  const int group = sequence.history + (position - sequence.history) / size * size;
  const int end = mask.causal ? position + 1 : min(group + size, sequence.keys);
  return {begin, max(sequence.history - begin, 0), group, end - group};
}

// Up to N ranges of tiles; empty where they end before they begin.
template <int N>
struct TileRanges {
  int begin[N], end[N];

  // The first tile from this one on that is in one of them, or after_all.
  __device__ int next(int tile) const {
    int found = after_all;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int candidate = max(tile, begin[i]);
      found = candidate < end[i] ? min(found, candidate) : found;
    }
    return found;
  }

  __device__ void set(int i, int first, int last, int size) {
    begin[i] = first / size;
    end[i] = first < last ? (last - 1) / size + 1 : 0;
  }

  static constexpr int none = -1, after_all = 0x7ffffffe;
};

// Tiles of rows of q that may see keys [begin, end) of their sequence: the prefix, the history within
// its window and past it, the targets.
__device__ inline void find_rows_that_see(
    TileRanges<4>& ranges, const Mask& mask, const Sequence& sequence, int begin, int end, int tile) {
  const int prefix = sequence.contextual, history = sequence.history, shift = sequence.keys - sequence.rows;
  const bool has_history = begin < history;
  const auto set = [&](int i, bool any, int first, int last) {
    ranges.set(i, max(first - shift, 0), any ? max(last - shift, 0) : 0, tile);
  };
  set(0, has_history, 0, prefix);
  int first = prefix, last = history;
  if (mask.window > 0) {
    last = min(history, max(min(end, history), prefix) + mask.window);
    first = max(first, begin - mask.window);
  }
  if (mask.causal) {
    first = max(prefix, begin);
  }
  set(1, has_history, first, last);
  const int tail = max(prefix, history - mask.full_window_tail);
  set(2, has_history && mask.window > 0 && mask.full_window_tail > 0, mask.causal ? max(tail, begin) : tail, history);
  if (has_history && end > first_seen(mask, sequence, history)) {
    set(3, true, history, sequence.keys);
  } else {
    const int size = mask.target_group_size, from = max(begin, history) - history;
    const int group = history + (mask.causal ? from : from / size * size);
    set(3, end > history, group, min(sequence.keys, history + ((end - 1 - history) / size + 1) * size));
  }
}

}  // namespace recsys_ops::hstu_attention::cuda
