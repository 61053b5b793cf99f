// The part of CUB that the operators use, on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

namespace cub {

template <class T>
struct DoubleBuffer {
  T* buffers[2];
  int selector = 0;

  DoubleBuffer(T* current, T* other) : buffers{current, other} {}
  T* Current() const { return buffers[selector]; }
};

struct DeviceRadixSort {
  template <class K>
  static cudaError_t SortKeys(
      void* memory, size_t& bytes, DoubleBuffer<K>& keys, int64_t size, int low, int high, cudaStream_t = nullptr) {
    if (!memory) {
      bytes = 8 * size + 1;  // for those who ask for the size of their memory
      return cudaSuccess;
    }
    std::memset(memory, 0xff, bytes);
    // As after an odd number of passes, so that the result is not where the keys were.
    K* result = keys.buffers[1 - keys.selector];
    std::copy_n(keys.Current(), size, result);
    const K mask = high - low == 64 ? ~K{0} : (K{1} << (high - low)) - 1;
    std::stable_sort(
        result, result + size, [&](K a, K b) { return (a >> low & mask) < (b >> low & mask); });
    std::fill_n(keys.Current(), size, ~K{0});
    keys.selector = 1 - keys.selector;
    return cudaSuccess;
  }
};

}  // namespace cub
