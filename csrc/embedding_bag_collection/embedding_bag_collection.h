// Launchers of embedding bag collections on the CPU: plain pointers and sizes.
#pragma once

#include <cstdint>

#include "../common/codes.h"
#include "lookups.h"
#include "row_update.h"

namespace recsys_ops::embedding_bag_collection {

using embedding_bag::Rows;

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
