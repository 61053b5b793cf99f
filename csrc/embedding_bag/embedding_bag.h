// Launchers of the embedding bag on the CPU: plain pointers and sizes.
#pragma once

#include <cstdint>

#include "gradient_pooling.h"
#include "sorted_bags.h"

namespace recsys_ops::embedding_bag {

enum class Mode { sum, mean, max };

// out [B, D]; per_sample_weights [N] or null; argmax [B, D] for max.
// Throws std::runtime_error for values that the contract refuses.
void forward(
    Mode mode, const Table& weight, const Bags& bags, const void* per_sample_weights, void* out, int32_t* argmax);

// The gradient of the weight, once its entries are sorted by row.
class WeightGradient {
 public:
  WeightGradient(const Gradient& gradient, const Bags& bags);

  // How many rows have a gradient.
  int64_t touched() const { return sorted.touched(); }

  // Touched row numbers, ascending [U], and their gradients [U, D].
  void write_sparse(int64_t* rows, void* values) const;

  // Every row, [R, D].
  void write_dense(void* out) const;

 private:
  void write(int64_t* rows, void* out) const;

  Gradient gradient;
  int64_t num_embeddings;
  SortedBags sorted;
};

// Gradient of the per-sample weights, [N].
void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out);

}  // namespace recsys_ops::embedding_bag
