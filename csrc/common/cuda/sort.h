// Sorting and adding up long lists, by CUB.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace recsys_ops::cuda {

// Bytes of memory that sort_keys needs.
int64_t sort_bytes(int64_t size, int low, int high);

// Sorts keys [size] stably by the bits [low, high), with scratch [size]; returns whichever holds the result.
uint64_t* sort_keys(
    uint64_t* keys, uint64_t* scratch, int64_t size, int low, int high, void* memory, int64_t bytes,
    cudaStream_t stream);

// Bytes of memory that running_sum needs.
int64_t running_sum_bytes(int64_t size);

// Replaces each of the values [size] by the sum of those up to it.
void running_sum(int64_t* values, int64_t size, void* memory, int64_t bytes, cudaStream_t stream);

}  // namespace recsys_ops::cuda
