// Lookups of many tables as the kernels see them: plain pointers and sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "../embedding_bag/bags.h"

namespace recsys_ops::embedding_bag_collection {

using embedding_bag::Bags;
using embedding_bag::Factors;
using embedding_bag::Table;

enum class Mode : int64_t { sum, mean, maximum };

// One row of `lookups`, as reference.py describes it.
struct Lookup {
  int64_t table;
  Mode mode;
  int64_t first_bag, num_bags, start, stride;
};

// The ids of all bags.
struct Entries {
  Integers values;
  Integers offsets;  // [G + 1]
  bool drop_invalid;
};

// And what is looked up with them.
struct Input : Entries {
  const Lookup* lookups;
  int64_t num_lookups;

  const Lookup* begin() const { return lookups; }
  const Lookup* end() const { return lookups + num_lookups; }

  // The bags of a lookup in a table of so many rows.
  Bags bags(const Lookup& lookup, int64_t rows) const {
    const int64_t width = offsets.wide ? sizeof(int64_t) : sizeof(int32_t);
    const Integers own = {
        static_cast<const char*>(offsets.data) + lookup.first_bag * width, offsets.wide, lookup.num_bags + 1};
    return {values, own, lookup.num_bags, rows, -1, drop_invalid};
  }
};

// Whether a lookup is one of bags, tables and cells that there are.
inline bool is_consistent(const Lookup& l, const Input& input, const std::vector<Table>& tables, int64_t cells) {
  if (l.table < 0 || l.table >= static_cast<int64_t>(tables.size()) || l.mode < Mode::sum || l.mode > Mode::maximum ||
      l.first_bag < 0 || l.num_bags < 0 || l.num_bags >= input.offsets.size - l.first_bag || l.start < 0 ||
      l.stride < 0) {
    return false;
  }
  const int64_t left = cells - tables[l.table].dim - l.start;  // beyond the first bag; may be large, so no products
  return l.num_bags == 0 || (left >= 0 && (l.num_bags == 1 || l.stride <= left / (l.num_bags - 1)));
}

}  // namespace recsys_ops::embedding_bag_collection
