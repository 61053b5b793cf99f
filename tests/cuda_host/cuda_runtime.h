// The part of CUDA that the kernels use, for an ordinary C++ compiler; see engine.h.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static __attribute__((section("cuda_shared")))
#define RECSYS_OPS_DYNAMIC_SHARED(T, NAME) T* NAME = static_cast<T*>(cuda_host::dynamic_shared())

#define __assert_fail(MESSAGE, FILE, LINE, FUNCTION) cuda_host::fail(MESSAGE)

using dim3 = cuda_host::Dim3;
inline const dim3& threadIdx = cuda_host::here.thread;
inline const dim3& blockIdx = cuda_host::here.block;
inline const dim3& blockDim = cuda_host::here.block_dim;
inline const dim3& gridDim = cuda_host::here.grid_dim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

template <class T>
T __ldg(const T* from) {
  return *from;
}

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int __clzll(long long bits) { return bits == 0 ? 64 : __builtin_clzll(static_cast<uint64_t>(bits)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
using std::max;
using std::min;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// Warps.

#define CUDA_HOST_SITE(OPERATION) \
  cuda_host::Site { OPERATION, file, line }
#define CUDA_HOST_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_host {

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "wider than a shuffle");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const Site& site, unsigned mask, T value, unsigned source) {
  const Exchange got = exchange(site, mask, pack(value));
  if (!(got.present >> source & 1)) {
    fail(std::string(site.operation) + " from lane " + std::to_string(source) + ", which takes no part (" + site.file +
         ":" + std::to_string(site.line) + ")");
  }
  return unpack<T>(got.values[source]);
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_CALLER) {
  const unsigned segment = cuda_host::lane() & ~(width - 1);
  return cuda_host::shuffle(CUDA_HOST_SITE("__shfl_sync"), mask, value, segment | (source & (width - 1)));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CUDA_HOST_CALLER) {
  const unsigned lane = cuda_host::lane(), source = lane ^ distance;
  const bool within = source < (lane & ~(width - 1)) + width;
  return cuda_host::shuffle(CUDA_HOST_SITE("__shfl_xor_sync"), mask, value, within ? source : lane);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CUDA_HOST_CALLER) {
  const unsigned lane = cuda_host::lane();
  const bool within = (lane & (width - 1)) >= distance;
  return cuda_host::shuffle(CUDA_HOST_SITE("__shfl_up_sync"), mask, value, within ? lane - distance : lane);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CUDA_HOST_CALLER) {
  const unsigned lane = cuda_host::lane();
  const bool within = (lane & (width - 1)) + distance < static_cast<unsigned>(width);
  return cuda_host::shuffle(CUDA_HOST_SITE("__shfl_down_sync"), mask, value, within ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, int yes, CUDA_HOST_CALLER) {
  const cuda_host::Exchange got = cuda_host::exchange(CUDA_HOST_SITE("__ballot_sync"), mask, yes != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(got.present >> lane & 1 && got.values[lane]) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int yes, CUDA_HOST_CALLER) { return __ballot_sync(mask, yes, file, line) != 0; }
inline int __all_sync(unsigned mask, int yes, CUDA_HOST_CALLER) { return __ballot_sync(mask, !yes, file, line) == 0; }

namespace cuda_host {

template <class T, class F>
T reduce(const Site& site, unsigned mask, T value, const F& combine) {
  const Exchange got = exchange(site, mask, pack(value));
  T total = value;
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (got.present >> lane & 1) {
      const T other = unpack<T>(got.values[lane]);
      total = first ? other : combine(total, other);
      first = false;
    }
  }
  return total;
}

}  // namespace cuda_host

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, CUDA_HOST_CALLER) {
  return cuda_host::reduce(CUDA_HOST_SITE("__reduce_add_sync"), mask, value, [](auto a, auto b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CUDA_HOST_CALLER) {
  return cuda_host::reduce(
      CUDA_HOST_SITE("__reduce_max_sync"), mask, value, [](auto a, auto b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CUDA_HOST_CALLER) {
  return cuda_host::reduce(
      CUDA_HOST_SITE("__reduce_min_sync"), mask, value, [](auto a, auto b) { return std::min(a, b); });
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_HOST_CALLER) {
  cuda_host::exchange(CUDA_HOST_SITE("__syncwarp"), mask, 0);
}
inline unsigned __activemask() = delete;  // what it gives is nobody's promise

// Blocks.

inline void __syncthreads(CUDA_HOST_CALLER) { cuda_host::barrier(CUDA_HOST_SITE("__syncthreads"), false); }
inline int __syncthreads_count(int yes, CUDA_HOST_CALLER) {
  return cuda_host::barrier(CUDA_HOST_SITE("__syncthreads_count"), yes != 0);
}
inline int __syncthreads_or(int yes, CUDA_HOST_CALLER) {
  return cuda_host::barrier(CUDA_HOST_SITE("__syncthreads_or"), yes != 0) != 0;
}
inline int __syncthreads_and(int yes, CUDA_HOST_CALLER) {
  return cuda_host::barrier(CUDA_HOST_SITE("__syncthreads_and"), yes == 0) == 0;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomics: a fiber is never interrupted.

namespace cuda_host {
template <class T, class F>
T atomically(T* at, const F& f);
}

template <class T>
T atomicAdd(T* at, T value) {
  return cuda_host::atomically(at, [&](T old) { return old + value; });
}
template <class T>
T atomicMax(T* at, T value) {
  return cuda_host::atomically(at, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* at, T value) {
  return cuda_host::atomically(at, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicExch(T* at, T value) {
  return cuda_host::atomically(at, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  return cuda_host::atomically(at, [&](T old) { return old == expected ? value : old; });
}

// Not watched for races: that they may meet is their purpose.
template <class T, class F>
__attribute__((no_sanitize("thread"))) T cuda_host::atomically(T* at, const F& f) {
  T old;
  std::memcpy(&old, at, sizeof(T));
  const T next = f(old);
  std::memcpy(at, &next, sizeof(T));
  return old;
}

// The host's side.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_host {
inline std::string last_error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_host::last_error.c_str();
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  // As on a GPU, every thread has the arguments as they were at the launch. On the heap: where locals are
  // filled with a pattern, GCC 12 clears more of an array of structures than its padding.
  const auto kept = std::make_unique<std::tuple<Parameters...>>(arguments...);
  cuda_host::last_error = cuda_host::run(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, *kept); });
  return cuda_host::last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) {
    std::memset(to, value, bytes);
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
