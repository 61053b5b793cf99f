// What lies between the two products of attention: mask, bias, SiLU and dropout of a group of rows;
// included by sources compiled once per SIMD level. Lanes of a vector are neighbouring rows.
#pragma once

#include <limits>

#include "../common/simd_blocks.h"
#include "../common/simd_math.h"
#include "../common/simd_products.h"
#include "attention.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

constexpr int group_vectors = tile_vectors;

template <class A>
constexpr int group_rows = group_vectors * full_lanes<A>;

// Weights of the position bias from the farthest to the nearest key, as neighbouring rows meet them, for
// the distances within one sequence; its ends are repeated for a vector on either side.
template <class A>
class ReversedWeights {
 public:
  static constexpr int lanes = full_lanes<A>;

  // How many weights a sequence can reach, and how much memory they take.
  static int64_t reach(const Weights& weights, int64_t length) {
    const int64_t center = weights.size / 2;
    return std::min(center, std::max<int64_t>(length - 1, 0)) * 2 + 1;
  }
  static int64_t memory(int64_t size) { return size + 2 * lanes; }

  ReversedWeights(const Weights& weights, int64_t length, A* memory)
      : size(reach(weights, length)), first(weights.size / 2 - size / 2), values(memory + lanes) {}

  void load_head(const Weights& weights, int64_t head) {
    const A* from = static_cast<const A*>(weights.data) + (weights.heads > 1 ? head : 0) * weights.size + first;
    for (int64_t x = -lanes; x < size + lanes; ++x) {
      values[x] = from[std::clamp<int64_t>(size - 1 - x, 0, size - 1)];
    }
  }

  void zero() { std::fill(values - lanes, values + size + lanes, A{0}); }

  // Adds up what was added for each distance, from the first on.
  void write(A* to) const {
    for (int64_t x = 0; x < size; ++x) {
      to[size - 1 - x] = values[x];
    }
    for (int64_t x = 0; x < lanes; ++x) {
      to[size - 1] += values[-1 - x];
      to[0] += values[size + x];
    }
  }

  const int64_t size, first;
  A* const values;
};

// Neighbouring rows: what they see, where they stand, and when they are asked for.
template <class A>
struct RowVector {
  static constexpr int lanes = full_lanes<A>;
  using V = Vector<A, lanes>;
  using Integer = IntegerLike<A>;
  using I = Vector<Integer, lanes>;

  I low, high, group_low, group_high;
  int64_t least_low, most_low, least_high, most_high, group_first, group_last;
  int64_t interval_first, interval_last;
  const Integer* intervals;  // [R, 2, lanes]
  int64_t place[lanes];
  bool is_consecutive;
  int64_t asked[lanes], first_asked, last_asked;
  I since_first, until_last;  // from the first that is asked for and to the last, unless they are ages apart
  bool are_ages_apart;
  int64_t nearest, farthest;  // buckets of time

  // Row `lane` is the token `first + lane` of the sequence; those past the last see what the last sees.
  void set(const Attention& attention, const Sequence& sequence, int64_t first, Integer* interval_memory) {
    least_low = least_high = group_first = interval_first = sequence.length;
    most_low = most_high = group_last = interval_last = 0;
    is_consecutive = true;
    nearest = farthest = 0;
    intervals = interval_memory;
    const int64_t end = sequence.history_end(), last = sequence.length - 1;
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t position = std::min(first + lane, last);
      const Seen seen = seen_of(attention, sequence, position);
      low[lane] = static_cast<Integer>(seen.low);
      high[lane] = static_cast<Integer>(seen.high);
      group_low[lane] = static_cast<Integer>(seen.group_low);
      group_high[lane] = static_cast<Integer>(seen.group_high);
      least_low = std::min(least_low, seen.low);
      most_low = std::max(most_low, seen.low);
      least_high = std::min(least_high, seen.high);
      most_high = std::max(most_high, seen.high);
      if (seen.group_low < seen.group_high) {
        group_first = std::min(group_first, seen.group_low);
        group_last = std::max(group_last, seen.group_high);
      }
      place[lane] = first + lane <= last ? sequence.place(position, attention.target_group_size) : first + lane;
      is_consecutive &= position < end || first + lane > last;
      asked[lane] = attention.time.data ? sequence.asked(attention, position) : 0;
      const int64_t row = sequence.first_row + position - sequence.first_position();
      for (int64_t r = 0; r < attention.num_intervals; ++r) {
        for (int64_t side = 0; side < 2; ++side) {
          const int64_t bound = attention.intervals[(row * attention.num_intervals + r) * 2 + side];
          interval_memory[(r * 2 + side) * lanes + lane] =
              static_cast<Integer>(std::clamp<int64_t>(bound, 0, sequence.length));
        }
        const int64_t from = interval_memory[r * 2 * lanes + lane], to = interval_memory[(r * 2 + 1) * lanes + lane];
        if (from < to) {
          interval_first = std::min(interval_first, from);
          interval_last = std::max(interval_last, to);
        }
      }
    }
    if (!attention.intervals.data) {
      interval_first = 0;
      interval_last = sequence.length;
    }
    first_asked = *std::min_element(asked, asked + lanes);
    last_asked = *std::max_element(asked, asked + lanes);
    are_ages_apart = static_cast<uint64_t>(last_asked) - static_cast<uint64_t>(first_asked) >=
                     static_cast<uint64_t>(std::numeric_limits<Integer>::max());
    for (int lane = 0; lane < lanes; ++lane) {
      since_first[lane] = are_ages_apart ? 0 : static_cast<Integer>(asked[lane] - first_asked);
      until_last[lane] = are_ages_apart ? 0 : static_cast<Integer>(last_asked - asked[lane]);
    }
  }

  // Whether any row may see any of the keys [from, to).
  bool sees_any(int64_t from, int64_t to) const {
    return from < interval_last && to > interval_first &&
           ((from < most_high && to > least_low) || (from < group_last && to > group_first));
  }

  // Whether every row sees all of them.
  bool sees_all(int64_t from, int64_t to) const {
    return intervals == nullptr && from >= most_low && to <= least_high;
  }

  RECSYS_OPS_INLINE I sees(int64_t key, int64_t num_intervals) const {
    const I j = broadcast<lanes>(static_cast<Integer>(key));
    I seen = ((j >= low) & (j < high)) | ((j >= group_low) & (j < group_high));
    if (intervals) {
      I within{};
      for (int64_t r = 0; r < num_intervals; ++r) {
        within |= (j >= load_raw<lanes>(intervals + r * 2 * lanes)) & (j < load_raw<lanes>(intervals + (r * 2 + 1) * lanes));
      }
      seen &= within;
    }
    return seen;
  }
};

// The buckets of a key's differences of time to rows: from nearest to farthest, and how to tell them. Most
// keys have at most three, which are told apart without a branch.
template <class A>
struct TimeBuckets {
  static constexpr int lanes = full_lanes<A>;
  using V = Vector<A, lanes>;
  using Integer = IntegerLike<A>;
  using I = Vector<Integer, lanes>;
  static constexpr int64_t no_boundary = 0;

  const RowVector<A>& rows;
  const int64_t* boundaries;
  const int64_t time;
  int64_t least = 0;  // of the differences; they are so much more than what `beyond` says
  I beyond;
  int64_t nearest, second, third, farthest;  // second and third are neighbours of nearest, whoever has them

  // Starts from the buckets of the row's last key, which are seldom far away.
  RECSYS_OPS_INLINE TimeBuckets(const Attention& attention, RowVector<A>& rows, int64_t time)
      : rows(rows),
        boundaries(attention.time.size > 1 ? attention.boundaries : &no_boundary),
        time(time),
        nearest(rows.nearest),
        farthest(rows.farthest) {
    if (rows.first_asked >= time) {
      least = rows.first_asked - time;
      beyond = rows.since_first;
    } else if (rows.last_asked <= time) {
      least = time - rows.last_asked;
      beyond = rows.until_last;
    } else {
      beyond = rows.since_first - broadcast<lanes>(static_cast<Integer>(time - rows.first_asked));
      beyond = beyond < 0 ? -beyond : beyond;
    }
    const int64_t most = std::max(rows.last_asked - time, time - rows.first_asked), last = attention.time.size - 1;
    move(nearest, least, last);
    move(farthest, most, last);
    rows.nearest = nearest;
    rows.farthest = farthest;
    second = std::min(nearest + 1, last);
    third = std::min(nearest + 2, last);
  }

  RECSYS_OPS_INLINE V weights(const A* of_buckets) const {
    V weight = broadcast<lanes>(of_buckets[nearest]);
    weight = reaches(second) ? broadcast<lanes>(of_buckets[second]) : weight;
    weight = reaches(third) ? broadcast<lanes>(of_buckets[third]) : weight;
    for (int64_t bucket = nearest + 3; bucket <= farthest; ++bucket) {
      weight = reaches(bucket) ? broadcast<lanes>(of_buckets[bucket]) : weight;
    }
    return weight;
  }

  RECSYS_OPS_INLINE Vector<int32_t, lanes> numbers() const {
    Vector<int32_t, lanes> number = broadcast<lanes>(static_cast<int32_t>(nearest));
    for (int64_t bucket = nearest + 1; bucket <= farthest; ++bucket) {
      number -= __builtin_convertvector(reaches(bucket), Vector<int32_t, lanes>);  // -1 where it is
    }
    return number;
  }

  // Adds each lane's number to sums [T, lanes] of its bucket.
  RECSYS_OPS_INLINE void add(V numbers, A* sums) const {
    for (int64_t bucket = farthest; bucket > nearest + 2; --bucket) {
      add_where_reached(bucket, numbers, sums);
    }
    add_where_reached(third, numbers, sums);
    add_where_reached(second, numbers, sums);
    add_all(nearest, numbers, sums);
  }

 private:
  // The lanes whose bucket is this one or farther; of bucket 0, any.
  RECSYS_OPS_INLINE I reaches(int64_t bucket) const {
    const int64_t boundary = boundaries[std::max<int64_t>(bucket, 1) - 1];
    if (rows.are_ages_apart) {
      I here;
      for (int lane = 0; lane < lanes; ++lane) {
        here[lane] = -(std::max(rows.asked[lane] - time, time - rows.asked[lane]) >= boundary);
      }
      return here;
    }
    constexpr int64_t largest = std::numeric_limits<Integer>::max();
    return beyond >= broadcast<lanes>(static_cast<Integer>(std::clamp<int64_t>(boundary - least, 0, largest)));
  }

  RECSYS_OPS_INLINE void add_where_reached(int64_t bucket, V& numbers, A* sums) const {
    const I here = reaches(bucket);
    add_all(bucket, here ? numbers : V{}, sums);
    numbers = here ? V{} : numbers;
  }

  RECSYS_OPS_INLINE static void add_all(int64_t bucket, V numbers, A* sums) {
    store<lanes>(sums + bucket * lanes, load<lanes>(sums + bucket * lanes) + numbers);
  }

  RECSYS_OPS_INLINE void move(int64_t& bucket, int64_t difference, int64_t last) const {
    while (bucket < last && difference >= boundaries[bucket]) {
      ++bucket;
    }
    while (bucket > 0 && difference < boundaries[bucket - 1]) {
      --bucket;
    }
  }
};

// Four words for each lane's counter; see recsys_ops/hstu_attention/philox.py.
template <int LANES>
struct Philox {
  using Words = Vector<uint32_t, LANES>;
  using Products = Vector<uint64_t, LANES>;
  Words words[4];

  RECSYS_OPS_INLINE Philox(uint64_t seed, Words c0, Words c1, Words c2, Words c3) : words{c0, c1, c2, c3} {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Products first = __builtin_convertvector(words[0], Products) * uint64_t{0xD2511F53};
      const Products second = __builtin_convertvector(words[2], Products) * uint64_t{0xCD9E8D57};
      words[0] = __builtin_convertvector(second >> 32, Words) ^ words[1] ^ key0;
      words[2] = __builtin_convertvector(first >> 32, Words) ^ words[3] ^ key1;
      words[1] = __builtin_convertvector(second, Words);
      words[3] = __builtin_convertvector(first, Words);
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
  }
};

// From the first to the last of some keys.
struct Span {
  int64_t first, last;

  RECSYS_OPS_INLINE void add(int64_t from, int64_t to) {
    if (from < to) {
      first = std::min(first, from);
      last = std::max(last, to);
    }
  }
};

// A group of neighbouring rows of one head, and the keys that they see.
template <class A>
class RowGroup {
 public:
  static constexpr int lanes = full_lanes<A>, rows = group_rows<A>;
  using V = Vector<A, lanes>;
  using I = Vector<IntegerLike<A>, lanes>;

  // first: the position of the group's first row; interval_memory [group_vectors, R, 2, lanes].
  void set(const Attention& attention, const Sequence& sequence, int64_t first, IntegerLike<A>* interval_memory) {
    first_position = first;
    num_vectors = static_cast<int>(
        std::min<int64_t>(group_vectors, (sequence.length - first + lanes - 1) / lanes));
    for (int v = 0; v < num_vectors; ++v) {
      IntegerLike<A>* memory =
          attention.intervals.data ? interval_memory + v * attention.num_intervals * 2 * lanes : nullptr;
      vectors[v].set(attention, sequence, first + v * lanes, memory);
    }
    for (int tile = 0; tile * tile_rows < rows; ++tile) {
      spans[tile] = {sequence.length, 0};
      for (int row = tile * tile_rows; row < std::min((tile + 1) * tile_rows, num_vectors * lanes); ++row) {
        const RowVector<A>& vector = vectors[row / lanes];
        const int lane = row % lanes;
        spans[tile].add(vector.low[lane], vector.high[lane]);
        spans[tile].add(vector.group_low[lane], vector.group_high[lane]);
      }
    }
  }

  bool sees_any(int64_t from, int64_t to) const {
    for (int v = 0; v < num_vectors; ++v) {
      if (vectors[v].sees_any(from, to)) {
        return true;
      }
    }
    return false;
  }

  // What dropout multiplies the scores of a block of keys by: to [key_block, rows].
  void draw(const Attention& attention, const Sequence& sequence, int64_t head, int64_t first_key, A* factors) const {
    using Words = Vector<uint32_t, lanes>;
    const double least = __builtin_rint(attention.dropout * 0x1p32);
    const Words threshold = broadcast<lanes>(static_cast<uint32_t>(std::min(least, 4294967295.0)));
    const V kept = broadcast<lanes>(static_cast<A>(1 / (1 - attention.dropout)));
    for (int v = 0; v < num_vectors; ++v) {
      Words low, high;
      for (int lane = 0; lane < lanes; ++lane) {
        const uint64_t row = static_cast<uint64_t>(
            sequence.first_row + first_position - sequence.first_position() + v * lanes + lane);
        low[lane] = static_cast<uint32_t>(row);
        high[lane] = static_cast<uint32_t>(row >> 32);
      }
      for (int64_t i = 0; i < 16; ++i) {
        const Words counter = broadcast<lanes>(static_cast<uint32_t>(first_key / 64 * 16 + i));
        const Philox<lanes> drawn(
            static_cast<uint64_t>(*attention.dropout_seed), counter, low,
            broadcast<lanes>(static_cast<uint32_t>(head)), high);
        for (int64_t word = 0; word < 4; ++word) {
          const auto is_kept = __builtin_convertvector(drawn.words[word] >= threshold, I);
          store<lanes>(factors + (word * 16 + i) * rows + v * lanes, is_kept ? kept : V{});
        }
      }
    }
  }

  int64_t first_position;
  int num_vectors;
  RowVector<A> vectors[group_vectors];
  Span spans[(rows + tile_rows - 1) / tile_rows];  // of the keys that each tile of rows sees
};

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

// Calls f(t, keys, vectors) for the tiles of a block of keys, with the vectors of the group that see them.
template <class A, class F>
RECSYS_OPS_INLINE void for_tiles(const RowGroup<A>& group, int64_t first_key, int64_t count, const F& f) {
  for (int64_t t = 0; t < count; t += tile_rows) {
    const int64_t keys = std::min<int64_t>(tile_rows, count - t);
    f(t, keys, seeing(group, first_key + t, first_key + t + keys));
  }
}

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
