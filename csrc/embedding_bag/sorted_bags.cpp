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
  const uint64_t rows = count > 0 ? sources[0].bags.num_embeddings : 0;
  const bool weighted = given.data && !maximum, by_position = weighted || maximum;
  const KeyLayout layout = key_layout(by_position, size, num_bags, rows);
  const int source_bits = layout.source_bits;
  const auto key = [&](uint64_t row, uint64_t source) { return row << source_bits | source; };
  const bool is_double = given.dtype == DType::float64;

  uint64_t* const key_of = keys.of_size(2 * size);
  uint32_t* const bag_at = by_position ? bag_of.of_size(size) : nullptr;
  double* const scale_of = mean && !weighted ? bag_scale.of_size(num_bags) : nullptr;
  double* const factor_of = weighted ? factors.of_size(is_double ? size : (size + 1) / 2) : nullptr;
  int64_t* const start_of = maximum ? starts.of_size(num_bags) : nullptr;

  int64_t source = 0, first_of_source = 0;  // entries and bags of the sources before
  for (int64_t s = 0; s < count; ++s) {
    const Bags& bags = sources[s].bags;
    if (bags.count == 0) {
      continue;
    }
    const int64_t start = bags.begin(0), stop = bags.end(bags.count - 1);
    const bool good = for_bags(bags, tasks, [&](int64_t first, int64_t last) {
      bool good = true;
      for (int64_t b = first; b < last; ++b) {
        const int64_t begin = bags.begin(b), end = bags.end(b), bag = first_of_source + b;
        if (begin < start || end < begin || end > stop) {
          return false;
        }
        if (start_of) {
          start_of[bag] = source + begin - start;
        }
        const int64_t moved = source - start;
        int64_t live = 0;
        const auto number = [&](const auto* indices) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t index = indices[i];
            const bool valid = static_cast<uint64_t>(index) < rows, counts = valid && index != bags.padding_idx;
            good &= valid || bags.drop_invalid;
            key_of[i + moved] = key(counts ? index : rows, by_position ? i + moved : bag);
            live += counts;
          }
        };
        if (bags.indices.wide) {
          number(static_cast<const int64_t*>(bags.indices.data));
        } else {
          number(static_cast<const int32_t*>(bags.indices.data));
        }
        if (by_position) {
          std::fill(bag_at + begin + moved, bag_at + end + moved, static_cast<uint32_t>(bag));
        }
        const double scale = mean && live > 0 ? 1.0 / static_cast<double>(live) : 1.0;
        if (scale_of) {
          scale_of[bag] = scale;
        }
        for (int64_t i = begin; factor_of && i < end; ++i) {
          const int64_t at = i + moved;
          if (is_double) {
            factor_of[at] = factor_at<double>(given, i) * scale;
          } else {
            reinterpret_cast<float*>(factor_of)[at] = factor_at<float>(given, i) * static_cast<float>(scale);
          }
        }
      }
      return good;
    });
    if (!good) {
      return false;
    }
    source += stop - start;
    first_of_source += bags.count;
  }

  const uint64_t* sorted = radix_sort(key_of, key_of + size, size, source_bits, layout.row_bits, tasks);
  entries = {};
  entries.keys = sorted;
  entries.source_bits = source_bits;
  entries.bag_of = bag_at;
  entries.bag_scale = scale_of;
  entries.offsets = {start_of, true, num_bags};
  entries.factors = factor_of;
  place(sources, count);
  find_runs(std::lower_bound(sorted, sorted + size, key(rows, 0)) - sorted, tasks);
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
