// Launchers of the embedding bag collection on NVIDIA GPUs: plain pointers and sizes, and a stream.
// What they start runs in order on the stream; where nothing else is said, nobody waits for it.
//
// The contract is that of recsys_ops/embedding_bag_collection/reference.py. Bad ids and offsets end
// the kernel by an assertion.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "../common/codes.h"
#include "gradient_plan.h"
#include "optimizer.h"

namespace recsys_ops::embedding_bag_collection::cuda {

// Elements of a dtype that lookups write to or gradients come from.
struct Cells {
  DType dtype;
  void* data;
};

// Pools all lookups. per_sample_weights [N] or null; argmax like the output, or null.
void forward(
    const std::vector<Table>& tables, const Input& input, const void* per_sample_weights, const Cells& output,
    int32_t* argmax, cudaStream_t stream);

// The same of tables of codes.
void quantized_forward(
    CodeType codes, const std::vector<Table>& tables, const Input& input, const void* per_sample_weights,
    const Cells& output, cudaStream_t stream);

// Gradient of the per-sample weights, [N] in the type that sums are formed in.
void backward_per_sample_weights(
    const std::vector<Table>& tables, const Input& input, const Cells& grad_output, void* out, cudaStream_t stream);

// Copies bytes to the GPU as arguments of kernels, so that nobody waits and a CUDA graph keeps them.
void upload(const std::vector<uint64_t>& words, uint64_t* to, cudaStream_t stream);

// Fills the numbers from the GPU. Waits for it.
void read_back(const int64_t* from, std::vector<int64_t>& numbers, cudaStream_t stream);

// The sorted entries of a gradient, all memory of the GPU. Runs are the entries of one row, numbered
// in the order of rows; classes of tables follow one another, see gradient_plan.h.
struct SortedRuns {
  const uint64_t* keys;       // [M] run << source_bits | source
  const uint32_t* cell_of;    // [M] by layer and position, where sources are these; null where they are cells
  const double* cell_scale;   // [cells] 1 / live entries; null where no lookup is a mean
  const int64_t* rows;        // the row of each run, counted from that of the first class
  const int64_t* first_entry; // of each class, and where the last ends
  const int64_t* first_run;   // likewise
};

// Whose entries a warp looks for at a time.
constexpr int bags_per_warp = 4;

// keys [M], cell_of and cell_scale as above or null.
void find_entries(
    const GradientPlan& plan, const Range* ranges, const Entries& input, uint64_t* keys, uint32_t* cell_of,
    double* cell_scale, cudaStream_t stream);

// first_entry and first_run [classes + 1], from the keys sorted by row, and numbered.
void find_classes(
    const GradientPlan& plan, const int64_t* first_row, const uint64_t* sorted, const uint64_t* numbered,
    const int64_t* counts, int64_t* first_entry, int64_t* first_run, cudaStream_t stream);

// What gradients are made of.
struct Terms {
  Cells grad_output;
  const void* per_sample_weights;
  const int32_t* argmax;
  Integers offsets;
};

// The sums of the runs of a round, [round.most_runs, D] in the type that sums are formed in. Memory
// for pieces as of sum_runs in ../embedding_bag/embedding_bag_cuda.h.
void sum_round(
    const GradientPlan& plan, const Round& round, const SortedRuns& runs, const Terms& terms, const RoundRange* ranges,
    void* sums, int64_t* targets, void* pieces, cudaStream_t stream);

// Where the gradient of a table goes: with rows, those that are touched, else all of them.
struct GradientOut {
  int64_t number;     // of its class
  int64_t first_row;  // of its class
  DType dtype;
  void* out;
  int64_t* rows;
};

void write_gradients(
    const Round& round, const SortedRuns& runs, const void* sums, DType sum_dtype, const GradientOut* tables,
    int64_t count, cudaStream_t stream);

// A weight, or a state with an element or a number for each row; any strides.
struct Parameter {
  DType dtype;
  void* data;
  int64_t row_stride, column_stride;
};

struct UpdatedTable {
  int64_t number;     // of its class
  int64_t first_row;  // of its class
  int64_t table;
  Parameter tensors[3];  // the weight and its states
};

// Whether its rows can be moved in the widest words that sums are moved in.
bool is_aligned(const Parameter& parameter, DType sum_dtype);

// Updates the touched rows of the tables of a round; formulas and rounding as in row_optimizers.py.
// aligned: all weights and states with an element for each are.
void update(
    const Round& round, const SortedRuns& runs, const void* sums, DType sum_dtype, const UpdatedTable* tables,
    int64_t count, bool aligned, const Step& step, cudaStream_t stream);

}  // namespace recsys_ops::embedding_bag_collection::cuda
