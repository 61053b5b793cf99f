// What operators on tensors of a GPU have in common.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "launch.h"

// Tests register the operators elsewhere, for tensors on the CPU.
#ifndef RECSYS_OPS_CUDA_LIBRARY
#define RECSYS_OPS_CUDA_LIBRARY recsys_ops
#define RECSYS_OPS_CUDA_KEY CUDA
#endif

namespace recsys_ops::cuda {

// Makes the device of a tensor the current one, while it lives, and knows that device's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("recsys_ops: CUDA: expected PyTorch to name its current stream, got an error");
    }
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard;
};

// Uninitialised memory on the device of a tensor.
class Memory {
 public:
  Memory(const Tensor& like, int64_t bytes)
      : bytes(bytes), tensor(torch::stable::new_empty(like, {&bytes, 1}, ScalarType::Byte)) {}

  template <class T>
  T* as() {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  const int64_t bytes;

 private:
  Tensor tensor;
};

}  // namespace recsys_ops::cuda
