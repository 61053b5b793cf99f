// The entries of bags sorted by the row that they name, for gradients and updates on the CPU.
#pragma once

#include <memory>
#include <vector>

#include "gradient.h"

namespace recsys_ops::embedding_bag {

// Memory that is kept for the next use, its content undefined.
template <class T>
class Buffer {
 public:
  T* of_size(int64_t size) {
    if (size > capacity) {
      data.reset();
      data.reset(new T[size]);
      capacity = size;
    }
    return data.get();
  }

 private:
  std::unique_ptr<T[]> data;
  int64_t capacity = 0;
};

// Bags of a table, and where the rows of the output's gradient that belong to them begin.
struct BagSource {
  Bags bags;
  int64_t cell_start, cell_stride;
};

class SortedBags {
 public:
  // Sorts the live entries of bags of one table, in so many tasks; the result does not depend on how
  // many. Needs to know of the mode and the factors. False where a value is refused; throws
  // std::runtime_error where there are more entries than keys can number.
  bool sort(const BagSource* sources, int64_t count, bool mean, bool maximum, const Factors& factors, int64_t tasks);

  // Says anew where the rows of the output's gradient begin: of other lookups by the same bags.
  void place(const BagSource* sources, int64_t count);

  // How many rows have a gradient.
  int64_t touched() const { return num_runs; }

  // How many entries are live.
  int64_t live() const { return entries.runs[num_runs]; }

  SortedEntries entries;

 private:
  void find_runs(int64_t live, int64_t tasks);

  int64_t num_runs = 0;
  Buffer<uint64_t> keys;     // [2, N], sorted or scratch; those not live at the end
  Buffer<uint32_t> bag_of;   // [N]
  Buffer<double> bag_scale;  // [B]
  Buffer<double> factors;    // [N], of float or double
  Buffer<int64_t> cells;     // [B]
  Buffer<int64_t> starts;    // [B], the first source of each bag
  Buffer<int64_t> runs;      // [N + 1]
};

}  // namespace recsys_ops::embedding_bag
