// The part of CUB that the operators use, on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <numeric>

namespace cub {

struct DeviceScan {
  template <class T>
  static cudaError_t InclusiveSum(
      void* memory, size_t& bytes, const T* from, T* to, int64_t size, cudaStream_t = nullptr) {
    if (!memory) {
      bytes = size + 1;
      return cudaSuccess;
    }
    std::memset(memory, 0xff, bytes);
    std::partial_sum(from, from + size, to);
    return cudaSuccess;
  }
};

}  // namespace cub
