#include "sort.h"

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "launch.h"

namespace recsys_ops::cuda {

int64_t sort_bytes(int64_t size, int low, int high) {
  size_t bytes = 0;
  cub::DoubleBuffer<uint64_t> keys(nullptr, nullptr);
  check(cub::DeviceRadixSort::SortKeys(nullptr, bytes, keys, size, low, high));
  return static_cast<int64_t>(bytes);
}

uint64_t* sort_keys(
    uint64_t* keys, uint64_t* scratch, int64_t size, int low, int high, void* memory, int64_t bytes,
    cudaStream_t stream) {
  size_t available = bytes;
  cub::DoubleBuffer<uint64_t> both(keys, scratch);
  check(cub::DeviceRadixSort::SortKeys(memory, available, both, size, low, high, stream));
  return both.Current();
}

int64_t running_sum_bytes(int64_t size) {
  size_t bytes = 0;
  int64_t* values = nullptr;
  check(cub::DeviceScan::InclusiveSum(nullptr, bytes, values, values, size));
  return static_cast<int64_t>(bytes);
}

void running_sum(int64_t* values, int64_t size, void* memory, int64_t bytes, cudaStream_t stream) {
  size_t available = bytes;
  check(cub::DeviceScan::InclusiveSum(memory, available, values, values, size, stream));
}

}  // namespace recsys_ops::cuda
