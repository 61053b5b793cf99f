#include "lookup_shares.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace recsys_ops::embedding_bag_collection {
namespace {

std::string text(int64_t value) { return std::to_string(value); }

}  // namespace

void refuse(const Table* tables, const Input& input) {
  const Integers &offsets = input.offsets, &values = input.values;
  const std::string op = "embedding_bag_collection: expected ";
  if (offsets[0] != 0) {
    throw std::runtime_error(op + "offsets[0] = 0, got " + text(offsets[0]));
  }
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    const Lookup& lookup = input.lookups[k];
    const int64_t first = lookup.first_bag, last = first + lookup.num_bags;
    for (int64_t i = first; i < last; ++i) {
      if (offsets[i + 1] < offsets[i]) {
        throw std::runtime_error(
            op + "offsets that never decrease, got offsets[" + text(i) + "] = " + text(offsets[i]) + ", offsets[" +
            text(i + 1) + "] = " + text(offsets[i + 1]));
      }
    }
    for (int64_t i : {first, last}) {
      if (offsets[i] < 0 || offsets[i] > values.size) {
        throw std::runtime_error(
            op + "offsets within the " + text(values.size) + " values, got offsets[" + text(i) + "] = " +
            text(offsets[i]));
      }
    }
    const int64_t rows = tables[lookup.table].rows;
    for (int64_t i = offsets[first]; i < offsets[last]; ++i) {
      if (static_cast<uint64_t>(values[i]) >= static_cast<uint64_t>(rows) && !input.drop_invalid) {
        throw std::runtime_error(
            op + "values in [0, " + text(rows) + ") for table " + text(lookup.table) + ", got values[" + text(i) +
            "] = " + text(values[i]));
      }
    }
  }
  throw std::runtime_error("embedding_bag_collection: values or offsets changed during the call");
}

bool all_good(const Table* tables, const Input& input) {
  std::atomic<bool> good{input.offsets[0] == 0};
  const Shares shares(tables, input);
  run_tasks(shares.tasks, [&](int64_t task) {
    const bool all = shares.for_each(task, [&](const Lookup& lookup, int64_t first, int64_t last) {
      const Bags bags = input.bags(lookup, tables[lookup.table].rows);
      bool fine = true;
      for (int64_t bag = first; bag < last; ++bag) {
        fine &= bags.well_formed(bag);
      }
      if (!fine || input.drop_invalid || first == last) {
        return fine;
      }
      const auto check = [&](const auto* values) {
        bool valid = true;
        for (int64_t i = bags.begin(first), end = bags.end(last - 1); i < end; ++i) {
          valid &= bags.valid(values[i]);
        }
        return valid;
      };
      return input.values.wide ? check(static_cast<const int64_t*>(input.values.data))
                               : check(static_cast<const int32_t*>(input.values.data));
    });
    if (!all) {
      good.store(false, std::memory_order_relaxed);
    }
  });
  return good.load();
}

}  // namespace recsys_ops::embedding_bag_collection
