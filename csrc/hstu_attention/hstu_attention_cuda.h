// Launchers of HSTU attention on NVIDIA GPUs: plain pointers, strides and sizes, and a stream. What
// they start runs in order on the stream; nobody waits for it.
//
// Values that the contract refuses are never used as addresses, and end the kernel by an assertion.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/codes.h"
#include "../common/dtype.h"

namespace recsys_ops::hstu_attention::cuda {

// Rows of all heads, [rows, H, columns]; strides in elements.
struct Matrix {
  void* data;
  int64_t row_stride, head_stride, column_stride;
  int columns;
  bool wide;  // columns may be moved 16 bytes at once
};

struct Batch {
  Integers query_offsets, offsets;        // [B + 1]
  Integers num_contextual, num_targets;   // [B], or null
  int64_t num_sequences, num_rows, num_keys, num_heads;
};

// Numbers are at most largest_length.
struct Mask {
  bool causal;
  int window, target_group_size, full_window_tail;
  Integers intervals;  // [M, R, 2]
  int64_t num_intervals;
};

// No sequence is longer, so that positions and their sums fit in an int.
constexpr int64_t largest_length = (int64_t{1} << 30) - 1;

struct Bias {
  const void* position_weight;  // [1 or H, P], or null
  int64_t position_stride;      // 0 where heads share it
  int num_distances;
  const void* time_weight;  // [1 or H, T], or null
  int64_t time_stride;
  int num_buckets;
  const int64_t* timestamps;
  const int64_t* boundaries;
  const int* cells;  // what find_cells writes
  bool next_timestamps;
};

struct Dropout {
  const int64_t* seed;  // or null
  uint32_t threshold;   // the least word that is kept
  double factor;        // of what is kept
};

struct Problem {
  DType dtype;
  Matrix q, k, v;
  Batch batch;
  Mask mask;
  Bias bias;
  Dropout dropout;
  const void* row_scale;  // [M] or null
  double scale, alpha;
};

// Earlier keys and values of each sequence.
struct Cache {
  enum class Codes { none, int8, float8 };
  Matrix keys, values;  // rows of a page where there are pages
  int64_t key_page_stride, value_page_stride;
  Codes key_codes, value_codes;
  const void* key_scales;  // [R, H] or [pages, page_size, H], or null
  const void* value_scales;
  Integers starts;      // [B], or
  Integers page_table;  // [B, P]
  int64_t pages_per_sequence, page_size;
  int64_t num_rows;  // or pages
};

// Cells of time differences, each of them with few boundaries.
constexpr int num_cells = 488;

// The number of boundaries up to the first difference of each cell and of what follows the last:
// cells [num_cells + 1].
void find_cells(const int64_t* boundaries, int num_buckets, int* cells, cudaStream_t stream);

// out [M, H, V]
void forward(const Problem& problem, void* out, cudaStream_t stream);

// The same where k and v have the rows of q only, and earlier ones are in a cache.
void cached_forward(const Problem& problem, const Cache& cache, void* out, cudaStream_t stream);

// Asserts what kernels by warpgroups take for granted: a call of the assertion among their products would make
// those wait for each other.
void check_batch(const Batch& batch, cudaStream_t stream);

// The same as `forward`, where this GPU has warpgroups that multiply and they suit the problem: else nothing
// is done, and the answer is false. Likewise below.
bool forward_by_warpgroups(const Problem& problem, const Matrix& out, cudaStream_t stream);
bool backward_keys_by_warpgroups(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_k, const Matrix& grad_v,
    cudaStream_t stream);
bool backward_rows_by_warpgroups(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_q, void* positions, void* times,
    cudaStream_t stream);

// Writes the gradients of k and v.
void backward_keys(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_k, const Matrix& grad_v,
    cudaStream_t stream);

// The largest number of histograms that backward_rows leaves behind.
int64_t histogram_count(const Problem& problem);

// Writes the gradient of q, and partial gradients of the tables where they are not null:
// positions [histogram_count, P], times [histogram_count, T].
void backward_rows(
    const Problem& problem, const Matrix& grad_output, const Matrix& grad_q, void* positions, void* times,
    cudaStream_t stream);

// Adds up partial gradients of a table [1 or H, size], in a fixed order.
void sum_histograms(
    const Problem& problem, const void* partial, int64_t size, bool by_head, void* out, cudaStream_t stream);

}  // namespace recsys_ops::hstu_attention::cuda
