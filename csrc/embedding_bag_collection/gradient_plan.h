// How the gradients of many tables are made of one sort: reckoned on the CPU from what lookups say,
// without looking at ids.
//
// Tables with equally many rows that the same bags are looked up in are a class: their entries are
// sorted once. The rows of all classes stand one after the other in one order of rows. Entries
// are kept by position in values; bags that several classes look up stand in several layers of
// them. The cells of a class are the bags of its lookups.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../embedding_bag/key_layout.h"
#include "lookups.h"

namespace recsys_ops::embedding_bag_collection {

// The bags of one lookup of a class.
struct Range {
  int64_t first_bag, num_bags;
  int64_t first_cell;
  int64_t first_row, rows;  // of the class
  int64_t layer;
  int64_t end_of_warps;  // that look for its entries, counted from the first range
};

// Where in the gradient of the output the cells of a range are, for the table of a round.
struct RoundRange {
  int64_t first_cell, first_bag;
  int64_t start, stride;  // start -1: the round has no table of this class
  int64_t mean;
};

// Tables of one width, one of each class, whose sums are formed by one launch.
struct Round {
  int64_t dim;
  bool is_maximum;
  std::vector<std::pair<int64_t, int64_t>> tables;  // class and table, ascending
  int64_t first_class, end_class;
  int64_t most_runs;
  std::vector<RoundRange> ranges;  // of all these classes, and one more: where the cells of the last end
};

struct GradientPlan {
  std::vector<Range> ranges;
  std::vector<int64_t> first_row;  // of each class, and the rows of all
  std::vector<Round> rounds;
  int64_t num_values, num_entries;  // as many for each layer
  int64_t num_cells;
  bool by_position;  // what sources are: layer << position_bits | position, or cells
  bool has_mean;
  int position_bits, source_bits, row_bits;

  int64_t num_classes() const { return static_cast<int64_t>(first_row.size()) - 1; }
  int64_t num_rows() const { return first_row.back(); }
  embedding_bag::KeyLayout layout() const { return {by_position, source_bits, row_bits}; }
};

namespace plan_details {

struct Class {
  int64_t rows;
  std::vector<int64_t> tables;
  std::vector<Lookup> lookups;  // of its first table
};

inline std::vector<Class> find_classes(
    const std::vector<std::vector<Lookup>>& lookups_of, const std::vector<Table>& tables) {
  std::map<std::vector<int64_t>, size_t> known;
  std::vector<Class> classes;
  for (size_t table = 0; table < tables.size(); ++table) {
    std::vector<int64_t> key = {tables[table].rows};
    for (const Lookup& lookup : lookups_of[table]) {
      key.insert(key.end(), {lookup.first_bag, lookup.num_bags});
    }
    if (key.size() == 1) {
      continue;
    }
    const auto [at, is_new] = known.emplace(key, classes.size());
    if (is_new) {
      classes.push_back({tables[table].rows, {}, lookups_of[table]});
    }
    classes[at->second].tables.push_back(static_cast<int64_t>(table));
  }
  // So that the tables of a width are neighbours.
  std::stable_sort(classes.begin(), classes.end(), [&](const Class& a, const Class& b) {
    return tables[a.tables[0]].dim < tables[b.tables[0]].dim;
  });
  return classes;
}

// Layers in which no entry is in two ranges, and how many there are. Offsets never decrease within a range,
// so ranges that touch are known to have different entries; of others, anything may be.
inline int64_t set_layers(std::vector<Range>& ranges) {
  std::vector<Range*> by_first;
  for (Range& range : ranges) {
    if (range.num_bags > 0) {
      by_first.push_back(&range);
    }
  }
  std::stable_sort(
      by_first.begin(), by_first.end(), [](const Range* a, const Range* b) { return a->first_bag < b->first_bag; });
  int64_t layers = 0, end_of_touching = -1;
  std::vector<int64_t> ends;  // of the layers of ranges that touch
  for (Range* range : by_first) {
    if (range->first_bag > end_of_touching) {
      layers += static_cast<int64_t>(ends.size());
      ends.clear();
    }
    const int64_t end = range->first_bag + range->num_bags;
    end_of_touching = std::max(end_of_touching, end);
    const auto free = std::find_if(ends.begin(), ends.end(), [&](int64_t e) { return e <= range->first_bag; });
    range->layer = layers + (free - ends.begin());
    if (free == ends.end()) {
      ends.push_back(end);
    } else {
      *free = end;
    }
  }
  return layers + static_cast<int64_t>(ends.size());
}

}  // namespace plan_details

// Throws std::runtime_error where keys of 64 bits do not suffice.
inline GradientPlan plan_gradients(
    const std::vector<Table>& tables, const Input& input, bool weighted, int64_t bags_per_warp) {
  std::vector<std::vector<Lookup>> lookups_of(tables.size());
  const int64_t num_values = input.values.size;
  GradientPlan plan = {};
  plan.by_position = weighted;
  for (const Lookup& lookup : input) {
    lookups_of[lookup.table].push_back(lookup);
    plan.by_position |= lookup.mode == Mode::maximum;
    plan.has_mean |= lookup.mode == Mode::mean;
  }
  const auto classes = plan_details::find_classes(lookups_of, tables);

  int64_t row = 0, warps = 0;
  std::vector<size_t> first_range = {0};
  for (const auto& of_class : classes) {
    plan.first_row.push_back(row);
    for (const Lookup& lookup : of_class.lookups) {
      warps += (lookup.num_bags + bags_per_warp - 1) / bags_per_warp;
      plan.ranges.push_back({lookup.first_bag, lookup.num_bags, plan.num_cells, row, of_class.rows, 0, warps});
      plan.num_cells += lookup.num_bags;
    }
    row += of_class.rows;
    first_range.push_back(plan.ranges.size());
  }
  plan.first_row.push_back(row);
  const int64_t layers = plan_details::set_layers(plan.ranges);
  plan.num_values = num_values;
  plan.num_entries = layers * num_values;
  plan.position_bits = embedding_bag::bits_for(num_values);
  plan.source_bits = plan.by_position ? plan.position_bits + embedding_bag::bits_for(layers)
                                      : embedding_bag::bits_for(plan.num_cells);
  plan.row_bits = embedding_bag::bits_for(row);
  if (plan.source_bits + plan.row_bits > 64 || plan.num_cells > std::numeric_limits<uint32_t>::max()) {
    throw std::runtime_error(
        "embedding_bag_collection: expected rows x values below 2^62 and bags below 2^32, got " + std::to_string(row) +
        " rows, " + std::to_string(num_values) + " values, " + std::to_string(plan.num_cells) + " bags");
  }

  // A table is in the round of its width that as many tables of its class went before.
  std::map<std::tuple<int64_t, bool, int64_t>, Round> rounds;
  for (size_t number = 0; number < classes.size(); ++number) {
    std::map<std::pair<int64_t, bool>, int64_t> seen;
    for (const int64_t table : classes[number].tables) {
      const bool is_maximum = lookups_of[table][0].mode == Mode::maximum;
      const int64_t dim = tables[table].dim, before = seen[{dim, is_maximum}]++;
      Round& round = rounds[{dim, is_maximum, before}];
      round.dim = dim;
      round.is_maximum = is_maximum;
      round.tables.push_back({static_cast<int64_t>(number), table});
    }
  }
  for (auto& [key, round] : rounds) {
    round.first_class = round.tables.front().first;
    round.end_class = round.tables.back().first + 1;
    round.most_runs =
        std::min(plan.num_entries, plan.first_row[round.end_class] - plan.first_row[round.first_class]);
    for (size_t r = first_range[round.first_class]; r < first_range[round.end_class]; ++r) {
      round.ranges.push_back({plan.ranges[r].first_cell, plan.ranges[r].first_bag, -1, 0, 0});
    }
    const Range& last = plan.ranges[first_range[round.end_class] - 1];
    round.ranges.push_back({last.first_cell + last.num_bags, 0, -1, 0, 0});
    for (const auto& [number, table] : round.tables) {
      RoundRange* range = &round.ranges[first_range[number] - first_range[round.first_class]];
      for (const Lookup& lookup : lookups_of[table]) {
        range->start = lookup.start;
        range->stride = lookup.stride;
        range->mean = lookup.mode == Mode::mean;
        ++range;
      }
    }
    plan.rounds.push_back(std::move(round));
  }
  return plan;
}

}  // namespace recsys_ops::embedding_bag_collection
