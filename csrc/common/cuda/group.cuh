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
constexpr unsigned whole_warp = 0xffffffff;

// The groups of a warp go through every loop together, so that shuffles and votes are those of whole
// warps: with masks known only at run time each of them takes a dozen instructions.
class Group {
 public:
  const int lanes;  // a power of two
  const int lane;

  __device__ explicit Group(int lanes)
      : lanes(lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        first_lane(static_cast<int>(threadIdx.x) & (warp_lanes - 1) & ~(lanes - 1)) {}

  // Tasks of this group: the first, and the distance from each to the next.
  __device__ int64_t first_task() const {
    return blockIdx.x * static_cast<int64_t>(blockDim.x / lanes) + threadIdx.x / lanes;
  }
  __device__ int64_t stride() const { return gridDim.x * static_cast<int64_t>(blockDim.x / lanes); }

  // The value that one of the lanes has.
  template <class V>
  __device__ V broadcast(V value, int from) const {
    return __shfl_sync(whole_warp, value, from, lanes);
  }

  // A bit for each lane.
  __device__ unsigned vote(bool yes) const {
    return __ballot_sync(whole_warp, yes) >> first_lane & whole_warp >> (warp_lanes - lanes);
  }

  // In a fixed order, for all lanes.
  template <class V>
  __device__ V sum(V value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(whole_warp, value, distance, lanes);
    }
    return value;
  }

 private:
  const int first_lane;
};

// Whether any lane of the warp says yes.
__device__ inline bool any(bool yes) { return __any_sync(whole_warp, yes); }

}  // namespace recsys_ops::cuda
