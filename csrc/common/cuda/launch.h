// Launches of kernels whose work is a list of tasks, each for a group of lanes of a warp.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

// Along x; tests lower it.
#ifndef RECSYS_OPS_MOST_BLOCKS
#define RECSYS_OPS_MOST_BLOCKS 0x7fffffff
#endif

namespace recsys_ops::cuda {

constexpr int threads_per_block = 128;

// Resident on a multiprocessor at least. Told nothing, the compiler spills for more of them than
// loads of 16 bytes, several at once, need.
constexpr int blocks_per_sm = 4;

inline void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("recsys_ops: CUDA: ") + cudaGetErrorString(error));
  }
}

// Makes a device the current one while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before));
    if (device != before) {
      check(cudaSetDevice(device));
      changed = true;
    }
  }
  ~CurrentDevice() {
    if (changed) {
      cudaSetDevice(before);
    }
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before = 0;
  bool changed = false;
};

// Starts kernel(arguments...) on a one-dimensional grid. Groups take tasks in turns where there
// are more of them than a grid can hold.
template <class... Parameters, class... Arguments>
void launch(
    cudaStream_t stream, void (*kernel)(Parameters...), int64_t tasks, int lanes, const Arguments&... arguments) {
  if (tasks == 0) {
    return;
  }
  const int64_t tasks_per_block = threads_per_block / lanes;
  const int64_t blocks = (tasks + tasks_per_block - 1) / tasks_per_block;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, RECSYS_OPS_MOST_BLOCKS)));
  config.blockDim = dim3(threads_per_block);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace recsys_ops::cuda
