// Optimizers; the formulas are those of recsys_ops/embedding_bag_collection/row_optimizers.py.
#pragma once

#include <cstdint>

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

}  // namespace recsys_ops::embedding_bag_collection
