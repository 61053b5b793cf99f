// HSTU attention as its kernels see it; the contract is that of recsys_ops/hstu_attention/reference.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/dtype.h"

namespace recsys_ops::hstu_attention {

// A tensor [rows, heads, columns] of any strides, in elements.
struct Tensor3 {
  const void* data;
  int64_t row, head, column;
};

// What elements of a cache are.
enum class CacheType { same, int8, float8 };

// Earlier rows of k or v: [R, H, D], or [pages, page_size, H, D] with a stride between pages.
struct Cache {
  CacheType type;
  Tensor3 rows;
  int64_t page;
  const void* scales;  // [R, H] or [pages, page_size, H], or null
};

// Weights [heads, size] of buckets of distances, heads being 1 for all.
struct Weights {
  const void* data;
  int64_t heads, size;
};

struct Attention {
  DType dtype;
  int64_t heads, dim, value_dim;
  Tensor3 q, k, v;

  int64_t num_sequences;
  Integers query_offsets, offsets;  // query_offsets.data is null where q has every token
  Integers num_contextual, num_targets;  // data may be null

  bool causal, next_timestamps;
  int64_t window, target_group_size, full_window_tail;
  Integers intervals;  // [M, num_intervals, 2], data may be null
  int64_t num_intervals;

  Weights position, time;
  const int64_t *timestamps, *boundaries;

  double scale, alpha;
  const void* row_scale;  // [M] or null
  double dropout;
  const int64_t* dropout_seed;  // or null

  // k and v have new rows only, those of the queries, where there is a cache.
  bool cached, paged;
  Cache key_cache, value_cache;
  Integers cache_starts, page_table;  // the latter if paged
  int64_t page_size, pages_per_sequence, cache_rows;
};

// One sequence: n tokens, of which q has the last m. Targets are its last tokens.
struct Sequence {
  int64_t index;
  int64_t first_row, rows;     // of q
  int64_t first_token, length;  // of timestamps, and of k and v unless there is a cache
  int64_t contextual, targets;

  RECSYS_OPS_INLINE int64_t history_end() const { return length - targets; }
  RECSYS_OPS_INLINE int64_t first_position() const { return length - rows; }

  // Where a token counts as standing for the relative bias.
  RECSYS_OPS_INLINE int64_t place(int64_t position, int64_t group_size) const {
    const int64_t end = history_end();
    return position < end ? position : end + (position - end) % group_size;
  }

  // The time at which the token after this one is asked for.
  RECSYS_OPS_INLINE int64_t asked(const Attention& attention, int64_t position) const {
    const bool is_followed = attention.next_timestamps && position < history_end() && position + 1 < length;
    return attention.timestamps[first_token + position + is_followed];
  }
};

// A row sees the keys [low, high) and [group_low, group_high), the latter among targets.
struct Seen {
  int64_t low, high, group_low, group_high;
};

RECSYS_OPS_INLINE Seen seen_of(const Attention& attention, const Sequence& sequence, int64_t position) {
  const int64_t end = sequence.history_end();
  if (position < sequence.contextual) {
    return {0, end, 0, 0};
  }
  const bool is_target = position >= end;
  const int64_t place = is_target ? end : position, window = attention.window, tail = attention.full_window_tail;
  const bool is_windowed = window > 0 && !(tail > 0 && place >= end - tail);
  int64_t low = is_windowed ? std::max<int64_t>(place - window, 0) : 0;
  low = low < sequence.contextual ? 0 : low;
  if (!is_target) {
    const int64_t last = attention.causal ? position : is_windowed ? position + window : end;
    return {low, std::min(last + 1, end), 0, 0};
  }
  const int64_t group = attention.target_group_size, first = end + (position - end) / group * group;
  return {low, end, first, attention.causal ? position + 1 : std::min(first + group, sequence.length)};
}

}  // namespace recsys_ops::hstu_attention
