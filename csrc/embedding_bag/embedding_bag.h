// Launchers of the embedding bag on the CPU: plain pointers and sizes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bags.h"

namespace recsys_ops::embedding_bag {

enum class Mode { sum, mean, max };

// out [B, D]; per_sample_weights [N] or null; argmax [B, D] for max.
// Throws std::runtime_error for values that the contract refuses.
void forward(
    Mode mode, const Table& weight, const Bags& bags, const void* per_sample_weights, void* out, int32_t* argmax);

// What the gradient of the weight is made of.
struct Gradient {
  DType dtype;
  const void* output;              // [B, D] contiguous
  int64_t dim;
  const void* per_sample_weights;  // [N] or null
  const int32_t* argmax;           // [B, D] or null
  bool mean;
  bool scale_grad_by_freq;
};

// The gradient of the weight, once its entries are sorted by row.
class WeightGradient {
 public:
  WeightGradient(const Gradient& gradient, const Bags& bags);

  // How many rows have a gradient.
  int64_t touched() const { return static_cast<int64_t>(runs.size()) - 1; }

  // Touched row numbers, ascending [U], and their gradients [U, D].
  void write_sparse(int64_t* rows, void* values) const;

  // Every row, [R, D].
  void write_dense(void* out) const;

 private:
  template <class T, class Place>
  void write(const Place& place) const;
  template <class T>
  void write_run(int64_t first, int64_t last, T* out) const;
  template <class T>
  void sum_entries(int64_t first, int64_t last, Accumulate<T>* sum, Accumulate<T> scale, T* out) const;

  int64_t row(int64_t entry) const { return static_cast<int64_t>(entries[entry] >> position_bits); }
  int64_t position(int64_t entry) const {
    return static_cast<int64_t>(entries[entry] & ((uint64_t{1} << position_bits) - 1));
  }

  Gradient gradient;
  Bags bags;
  int position_bits;
  std::unique_ptr<uint64_t[]> storage;
  const uint64_t* entries;               // (row, position), sorted; those not live at the end
  std::vector<int64_t> runs;             // where each row's entries start, and where the last end
  std::unique_ptr<uint32_t[]> bag_of;    // [N]
  std::unique_ptr<double[]> bag_scale;   // [B], 1 / live entries, for the mean
};

// Gradient of the per-sample weights, [N].
void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out);

}  // namespace recsys_ops::embedding_bag
