#include "sorted_bags.h"

#include <algorithm>

#include "../common/radix_sort.h"
#include "../common/simd.h"
#include "bag_tasks.h"
#include "key_layout.h"

namespace recsys_ops::embedding_bag {
namespace {

template <class A>
A factor_at(const Factors& factors, int64_t i) {
  return recsys_ops::scalar::load_as<1, A>(factors.dtype, factors.data, i)[0];
}

// What is written for every entry and bag; null for what nobody reads.
struct Numbering {
  KeyLayout layout;
  uint64_t rows;
  bool mean;
  Factors given;
  uint32_t* bag_of;
  double* bag_scale;
  double* factors;  // of float unless those given are of double
  int64_t* starts;

  // The row of an entry, or `rows` of one that is not live, above its source.
  template <class Key>
  Key key(uint64_t row, uint64_t source) const {
    return static_cast<Key>(row << layout.source_bits | source);
  }

  // Writes the keys of the entries [begin, end) of a bag from `source` on, and what else belongs to it.
  template <class Key, class Index>
  bool number(
      const Bags& bags, const Index* indices, int64_t begin, int64_t end, int64_t bag, int64_t source,
      Key* keys) const {
    bool good = true;
    int64_t live = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = indices[i], at = source + i - begin;
      const bool valid = static_cast<uint64_t>(index) < rows, counts = valid && index != bags.padding_idx;
      good &= valid || bags.drop_invalid;
      keys[at] = key<Key>(counts ? index : rows, layout.by_position ? at : bag);
      live += counts;
    }
    if (bag_of) {
      std::fill(bag_of + source, bag_of + source + end - begin, static_cast<uint32_t>(bag));
    }
    if (starts) {
      starts[bag] = source;
    }
    const double scale = mean && live > 0 ? 1.0 / static_cast<double>(live) : 1.0;
    if (bag_scale) {
      bag_scale[bag] = scale;
    }
    for (int64_t i = begin; factors && i < end; ++i) {
      const int64_t at = source + i - begin;
      if (given.dtype == DType::float64) {
        factors[at] = factor_at<double>(given, i) * scale;
      } else {
        reinterpret_cast<float*>(factors)[at] = factor_at<float>(given, i) * static_cast<float>(scale);
      }
    }
    return good;
  }

  // All bags of all sources; false where a value is refused.
  template <class Key>
  bool number_all(const BagSource* sources, int64_t count, int64_t tasks, Key* keys) const {
    int64_t source = 0, bags_before = 0;
    for (int64_t s = 0; s < count; ++s) {
      const Bags& bags = sources[s].bags;
      if (bags.count == 0) {
        continue;
      }
      const int64_t start = bags.begin(0), stop = bags.end(bags.count - 1);
      const bool good = for_bags(bags, tasks, [&](int64_t first, int64_t last) {
        bool good = true;
        for (int64_t b = first; b < last; ++b) {
          const int64_t begin = bags.begin(b), end = bags.end(b), to = source + begin - start;
          if (begin < start || end < begin || end > stop) {
            return false;
          }
          const void* indices = bags.indices.data;
          good &= bags.indices.wide
                      ? number(bags, static_cast<const int64_t*>(indices), begin, end, bags_before + b, to, keys)
                      : number(bags, static_cast<const int32_t*>(indices), begin, end, bags_before + b, to, keys);
        }
        return good;
      });
      if (!good) {
        return false;
      }
      source += stop - start;
      bags_before += bags.count;
    }
    return true;
  }
};

}  // namespace

bool SortedBags::sort(
    const BagSource* sources, int64_t count, bool mean, bool maximum, const Factors& given, int64_t tasks) {
  int64_t size = 0, num_bags = 0;
  for (int64_t s = 0; s < count; ++s) {
    const Bags& bags = sources[s].bags;
    if (bags.count > 0) {
      const int64_t begin = bags.begin(0), end = bags.end(bags.count - 1);
      if (begin < 0 || end < begin || end > bags.indices.size) {
        return false;
      }
      size += end - begin;
    }
    num_bags += bags.count;
  }
  const int64_t rows = count > 0 ? sources[0].bags.num_embeddings : 0;
  const bool weighted = given.data && !maximum, by_position = weighted || maximum;
  const int64_t factor_words = given.dtype == DType::float64 ? size : (size + 1) / 2;
  const Numbering numbering = {
      key_layout(by_position, size, num_bags, rows),
      static_cast<uint64_t>(rows),
      mean,
      given,
      by_position ? bag_of.of_size(size) : nullptr,
      mean && !weighted ? bag_scale.of_size(num_bags) : nullptr,
      weighted ? factors.of_size(factor_words) : nullptr,
      maximum ? starts.of_size(num_bags) : nullptr};
  const KeyLayout& layout = numbering.layout;

  uint64_t* sorted = keys.of_size(2 * size);
  if (layout.source_bits + layout.row_bits <= 32) {  // half the memory to move, beside the result
    uint32_t* const narrow = reinterpret_cast<uint32_t*>(sorted + size);
    if (!numbering.number_all(sources, count, tasks, narrow)) {
      return false;
    }
    const uint32_t* in_order =
        radix_sort(narrow, narrow + size, size, layout.source_bits, layout.row_bits, tasks);
    run_parts(tasks, size, [&](int64_t begin, int64_t end) {
      std::copy(in_order + begin, in_order + end, sorted + begin);
    });
  } else {
    if (!numbering.number_all(sources, count, tasks, sorted)) {
      return false;
    }
    sorted = radix_sort(sorted, sorted + size, size, layout.source_bits, layout.row_bits, tasks);
  }
  entries = {};
  entries.keys = sorted;
  entries.source_bits = layout.source_bits;
  entries.bag_of = numbering.bag_of;
  entries.bag_scale = numbering.bag_scale;
  entries.offsets = {numbering.starts, true, num_bags};
  entries.factors = numbering.factors;
  place(sources, count);
  find_runs(std::lower_bound(sorted, sorted + size, numbering.key<uint64_t>(rows, 0)) - sorted, tasks);
  return true;
}

void SortedBags::place(const BagSource* sources, int64_t count) {
  entries.cells = nullptr;
  if (count == 1) {
    entries.cell_start = sources[0].cell_start;
    entries.cell_stride = sources[0].cell_stride;
    return;
  }
  int64_t num_bags = 0;
  for (int64_t s = 0; s < count; ++s) {
    num_bags += sources[s].bags.count;
  }
  int64_t* cell = cells.of_size(num_bags);
  entries.cells = cell;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t bag = 0; bag < sources[s].bags.count; ++bag) {
      *cell++ = sources[s].cell_start + bag * sources[s].cell_stride;
    }
  }
}

// Each task leaves the starts of its runs where its entries are, without a branch; then they move
// together.
void SortedBags::find_runs(int64_t live, int64_t tasks) {
  int64_t* const starts_of = runs.of_size(live + 1);
  std::vector<int64_t> found(tasks);
  run_tasks(tasks, [&](int64_t task) {
    const int64_t begin = live * task / tasks, end = live * (task + 1) / tasks;
    int64_t* start = starts_of + begin;
    for (int64_t e = begin; e < end; ++e) {
      *start = e;
      start += e == 0 || entries.row(e) != entries.row(e - 1);
    }
    found[task] = start - (starts_of + begin);
  });
  num_runs = found[0];
  for (int64_t task = 1; task < tasks; ++task) {
    const int64_t* begin = starts_of + live * task / tasks;
    std::copy(begin, begin + found[task], starts_of + num_runs);
    num_runs += found[task];
  }
  starts_of[num_runs] = live;
  entries.runs = starts_of;
}

}  // namespace recsys_ops::embedding_bag
