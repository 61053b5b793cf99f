// How sort keys of 64 bits hold a row, and where its gradient comes from.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "gradient.h"

namespace recsys_ops::embedding_bag {

// Above the source, a position [N] or a bag, stands the row.
struct KeyLayout {
  bool by_position;
  int source_bits;
  int row_bits;
};

inline int bits_for(uint64_t largest) {
  int bits = 1;
  while (bits < 64 && largest >> bits != 0) {
    ++bits;
  }
  return bits;
}

// Throws std::runtime_error where 64 bits do not suffice.
inline KeyLayout key_layout(bool by_position, int64_t num_indices, int64_t num_bags, int64_t num_embeddings) {
  const KeyLayout layout = {by_position, bits_for(by_position ? num_indices : num_bags), bits_for(num_embeddings)};
  if (layout.source_bits + layout.row_bits > 64 || num_bags > std::numeric_limits<uint32_t>::max()) {
    throw std::runtime_error(
        "embedding_bag: expected rows x indices below 2^63 and bags below 2^32, got " +
        std::to_string(num_embeddings) + " rows, " + std::to_string(num_indices) + " indices, " +
        std::to_string(num_bags) + " bags");
  }
  return layout;
}

inline KeyLayout key_layout(const Gradient& gradient, const Bags& bags) {
  const bool by_position = gradient.per_sample_weights || gradient.argmax;
  return key_layout(by_position, bags.indices.size, bags.count, bags.num_embeddings);
}

}  // namespace recsys_ops::embedding_bag
