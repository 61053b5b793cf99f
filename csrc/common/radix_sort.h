// Stable, parallel, least-significant-digit radix sort of unsigned keys by some of their bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "parallel.h"

namespace recsys_ops {

// Sorts keys[0:size) by bits [low, low + bits), keeping the order of equal ones; scratch is as
// large as keys. Returns whichever of the two holds the result. The result does not depend on
// the number of tasks.
template <class Key>
Key* radix_sort(Key* keys, Key* scratch, int64_t size, int low, int bits, int64_t tasks) {
  constexpr int largest_digit = 11;
  const int passes = (bits + largest_digit - 1) / largest_digit;
  std::vector<int64_t> places;
  for (int pass = 0, done = 0; pass < passes; ++pass) {
    const int digit = (bits - done) / (passes - pass);
    const int shift = low + done;
    const int64_t buckets = int64_t{1} << digit;
    const Key mask = static_cast<Key>(buckets - 1);
    places.assign(tasks * buckets, 0);
    run_tasks(tasks, [&](int64_t task) {
      int64_t* const counts = places.data() + task * buckets;
      const int64_t end = size * (task + 1) / tasks;
      for (int64_t i = size * task / tasks; i < end; ++i) {
        ++counts[keys[i] >> shift & mask];
      }
    });
    int64_t place = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t count = places[task * buckets + bucket];
        places[task * buckets + bucket] = place;
        place += count;
      }
    }
    run_tasks(tasks, [&](int64_t task) {
      int64_t* const next = places.data() + task * buckets;
      const Key* const from = keys;
      Key* const to = scratch;
      const int64_t end = size * (task + 1) / tasks;
      for (int64_t i = size * task / tasks; i < end; ++i) {
        const Key key = from[i];
        to[next[key >> shift & mask]++] = key;
      }
    });
    std::swap(keys, scratch);
    done += digit;
  }
  return keys;
}

}  // namespace recsys_ops
