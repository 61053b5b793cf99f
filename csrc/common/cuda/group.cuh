// Neighbouring lanes of a warp that work on one task together.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>

// Ends the kernel with a message, as PyTorch's own kernels do.
#define RECSYS_OPS_DEVICE_CHECK(CONDITION, MESSAGE)         \
  do {                                                      \
    if (!(CONDITION)) {                                     \
      __assert_fail(MESSAGE, __FILE__, __LINE__, __func__); \
    }                                                       \
  } while (0)

namespace recsys_ops::cuda {

constexpr int warp_lanes = 32;

class Group {
 public:
  const int lanes;  // a power of two
  const int lane;

  __device__ explicit Group(int lanes)
      : lanes(lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        first_lane(static_cast<int>(threadIdx.x) & (warp_lanes - 1) & ~(lanes - 1)),
        mask((0xffffffffu >> (warp_lanes - lanes)) << first_lane) {}

  // Tasks of this group: the first, and the distance from each to the next.
  __device__ int64_t first_task() const {
    return blockIdx.x * static_cast<int64_t>(blockDim.x / lanes) + threadIdx.x / lanes;
  }
  __device__ int64_t stride() const { return gridDim.x * static_cast<int64_t>(blockDim.x / lanes); }

  // The value that one of the lanes has.
  template <class V>
  __device__ V broadcast(V value, int from) const {
    return __shfl_sync(mask, value, from, lanes);
  }

  // A bit for each lane.
  __device__ unsigned vote(bool yes) const { return __ballot_sync(mask, yes) >> first_lane; }

  // In a fixed order, for all lanes.
  template <class V>
  __device__ V sum(V value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(mask, value, distance, lanes);
    }
    return value;
  }

 private:
  const int first_lane;
  const unsigned mask;
};

}  // namespace recsys_ops::cuda
