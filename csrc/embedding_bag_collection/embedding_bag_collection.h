// Launchers of embedding bag collections on the CPU: plain pointers and sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/codes.h"
#include "../embedding_bag/bags.h"
#include "row_update.h"

namespace recsys_ops::embedding_bag_collection {

using embedding_bag::Bags;
using embedding_bag::Factors;
using embedding_bag::Rows;
using embedding_bag::Table;

enum class Mode : int64_t { sum, mean, maximum };

// One row of `lookups`, as reference.py describes it.
struct Lookup {
  int64_t table;
  Mode mode;
  int64_t first_bag, num_bags, start, stride;
};

// The ids of all bags, and what is looked up with them.
struct Input {
  Integers values;
  Integers offsets;  // [G + 1]
  const Lookup* lookups;
  int64_t num_lookups;
  bool drop_invalid;

  // The bags of a lookup in a table of so many rows.
  Bags bags(const Lookup& lookup, int64_t rows) const {
    const int64_t width = offsets.wide ? sizeof(int64_t) : sizeof(int32_t);
    const Integers own = {
        static_cast<const char*>(offsets.data) + lookup.first_bag * width, offsets.wide, lookup.num_bags + 1};
    return {values, own, lookup.num_bags, rows, -1, drop_invalid};
  }
};

// Whether a lookup is one of bags, tables and cells that there are.
inline bool is_consistent(const Lookup& l, const Input& input, const std::vector<Table>& tables, int64_t cells) {
  return 0 <= l.table && l.table < static_cast<int64_t>(tables.size()) && Mode::sum <= l.mode &&
         l.mode <= Mode::maximum && 0 <= l.first_bag && 0 <= l.num_bags &&
         l.num_bags < input.offsets.size - l.first_bag && 0 <= l.start && 0 <= l.stride &&
         (l.num_bags == 0 || l.start + (l.num_bags - 1) * l.stride + tables[l.table].dim <= cells);
}

// All throw std::runtime_error for values that the contract refuses.

// Pools into the cells of output [C], and unless argmax is null where maxima come from into those of argmax [C].
void forward(const Table* tables, const Input& input, const Factors& factors, DType dtype, void* output, int32_t* argmax);

// The same of tables of codes.
void quantized_forward(
    CodeType codes, const Table* tables, const Input& input, const Factors& factors, DType dtype, void* output);

// Of the gradient [C] of an output, the gradient of each table: dense [R, D] contiguous, zeroed before.
void backward(
    const Table* tables, int64_t num_tables, const Input& input, const Factors& factors, DType dtype,
    const void* grad_output, const int32_t* argmax, void* const* gradients);

// The same as touched rows: allocate(table, count, &rows, &gradients) gives memory [U] and [U, D] for them.
using Allocate = void (*)(void* context, int64_t table, int64_t count, int64_t** rows, void** gradients);
void backward_sparse(
    const Table* tables, int64_t num_tables, const Input& input, const Factors& factors, DType dtype,
    const void* grad_output, const int32_t* argmax, Allocate allocate, void* context);

// Adds the gradient of the per-sample weights to out [N].
void backward_per_sample_weights(
    const Table* tables, const Input& input, DType dtype, const void* grad_output, const Rows& out);

// Updates every touched row once. Nothing has changed where it throws.
void update(
    const Table* tables, const TrainedTable* trained, int64_t num_tables, const Input& input, const Factors& factors,
    DType dtype, const void* grad_output, const int32_t* argmax, const Step& step);

}  // namespace recsys_ops::embedding_bag_collection
