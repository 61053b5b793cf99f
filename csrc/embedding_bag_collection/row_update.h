// What an optimizer does to one row of a table; the formulas are those of
// recsys_ops/embedding_bag_collection/row_optimizers.py.
#pragma once

#include <cstdint>

#include "../common/simd_level.h"

namespace recsys_ops::embedding_bag_collection {

enum class Optimizer { sgd, adagrad, rowwise_adagrad, adam, partial_rowwise_adam, lamb };

// How many states an optimizer has for each table, and whether one has a number for each row.
inline int state_count(Optimizer optimizer) {
  return optimizer == Optimizer::sgd ? 0 : optimizer < Optimizer::adam ? 1 : 2;
}

inline bool is_rowwise(Optimizer optimizer, int state) {
  return optimizer == Optimizer::rowwise_adagrad || (optimizer == Optimizer::partial_rowwise_adam && state == 1);
}

// One step of an optimizer; the order of the numbers is that of HYPERPARAMETERS.
struct Step {
  Optimizer optimizer;
  double lr, eps, beta1, beta2, weight_decay, decoupled_weight_decay, max_gradient, max_gradient_norm;
  double correction1, correction2;  // 1 - beta1^t, 1 - beta2^t
  bool stochastic_rounding;
  uint32_t seed, count;
};

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
