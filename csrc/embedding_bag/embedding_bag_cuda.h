// Launchers of the embedding bag on NVIDIA GPUs: plain pointers and sizes, and a stream. What they
// start runs in order on the stream; where nothing else is said, nobody waits for it.
//
// Bad ids and offsets end the kernel by an assertion, as in PyTorch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "key_layout.h"

namespace recsys_ops::embedding_bag::cuda {

// Sum or mean: out [B, D]; per_sample_weights [N] or null.
void forward(
    const Table& weight, const Bags& bags, const void* per_sample_weights, bool mean, void* out, cudaStream_t stream);

// The same from Python objects, past the dispatcher: an EagerForward.
void eager_forward(
    const Table& weight, const Bags& bags, const void* per_sample_weights, bool mean, void* out, int device,
    void* stream);

// Maximum, and the position in its bag of the first entry that has it, -1 in an empty bag: both [B, D].
void max_forward(const Table& weight, const Bags& bags, void* out, int32_t* argmax, cudaStream_t stream);

// Gradient of the per-sample weights, [N].
void backward_per_sample_weights(
    const Table& weight, const Bags& bags, const void* grad_output, bool mean, void* out, cudaStream_t stream);

// A key for every entry, keys [N]; one that is not live has the row num_embeddings. By position also
// the bag of each, bag_of [N]; for the mean 1 / live entries of each bag, bag_scale [B].
void find_entries(
    const KeyLayout& layout, const Bags& bags, uint64_t* keys, uint32_t* bag_of, double* bag_scale,
    cudaStream_t stream);

// Bytes of memory that sort_entries needs beside the keys.
int64_t sort_bytes(const KeyLayout& layout, int64_t size);

// Sorts keys [N] stably by row, with scratch [N]; returns whichever of the two holds the result.
uint64_t* sort_entries(
    const KeyLayout& layout, uint64_t* keys, uint64_t* scratch, int64_t size, void* memory, int64_t bytes,
    cudaStream_t stream);

// Entries whose runs are numbered together, and how many such parts there are.
constexpr int numbered_together = 32;
inline int64_t count_size(int64_t size) { return (size + numbered_together - 1) / numbered_together; }

// Bytes of memory that count_runs needs beside the counts.
int64_t count_bytes(int64_t size);

// The number of runs up to and including each part of the entries, counts [count_size(N)].
void count_runs(
    const SortedEntries& entries, int64_t size, int64_t num_embeddings, int64_t* counts, void* memory, int64_t bytes,
    cudaStream_t stream);

// The last of the counts of N entries, or 0. Waits for the GPU.
int64_t total_of(const int64_t* counts, int64_t size, cudaStream_t stream);

// Replaces rows by the numbers of their runs, from sorted keys to numbered ones [N], and lists rows [U].
void number_runs(
    const SortedEntries& entries, int64_t size, int64_t num_embeddings, int64_t num_runs, const int64_t* counts,
    uint64_t* numbered, int64_t* rows, cudaStream_t stream);

// For scale_grad_by_freq: 1 / the entries of each sorted entry's run, run_scale [N].
void scale_runs(const SortedEntries& entries, int64_t size, double* run_scale, cudaStream_t stream);

// Levels of sum_runs leave pieces of runs for the next: how many rows of D sums that are in all.
int64_t piece_count(int64_t size);

// out [rows, D] = for each row the sum of its run; other rows are left alone. Memory for pieces:
// targets [P], sums [P, D] in the type that sums are formed in.
void sum_runs(
    const Gradient& gradient, const SortedEntries& entries, int64_t size, int64_t rows, void* out, int64_t* targets,
    void* sums, cudaStream_t stream);

// The levels of sum_runs after the first, which has left pieces of N entries; out is of a dtype.
void sum_pieces(
    DType dtype, int64_t size, int64_t dim, void* out, int64_t* targets, void* sums, cudaStream_t stream);

// Fills a gradient [rows, D] with zeros.
void zero(const Gradient& gradient, int64_t rows, void* out, cudaStream_t stream);

}  // namespace recsys_ops::embedding_bag::cuda
