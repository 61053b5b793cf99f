// What an optimizer does to one row of a table on the CPU.
#pragma once

#include <cstdint>

#include "../common/simd_level.h"
#include "optimizer.h"

namespace recsys_ops::embedding_bag_collection {

// A table, its number, and the states of its rows; those are contiguous.
struct TrainedTable {
  void* weight;
  int64_t dim, row_stride, column_stride;
  uint32_t number;
  DType state_dtype;
  void* states[2];
};

template <class T>
struct RowUpdate {
  // Updates a row by its summed gradient [D], which is overwritten.
  void (*update)(const Step& step, const TrainedTable& table, int64_t row, Accumulate<T>* gradient);

  // Writes a gradient [D] in the type of the table.
  void (*write)(int64_t dim, const Accumulate<T>* gradient, T* to);
};

RECSYS_OPS_DECLARE_FOR_LEVELS(RowUpdate, row_update)

}  // namespace recsys_ops::embedding_bag_collection
