// Kernels of an operator named toy, each of which shows one thing that can be read from a binary.
#include <cuda_pipeline.h>
#include <mma.h>

namespace {

template <class T, int N>
__global__ void __launch_bounds__(64) toy_indexed_kernel(const T* in, const int* at, int n, T* out) {
  T values[N] = {};
  for (int i = 0; i < n; ++i) {
    values[at[i] & (N - 1)] += in[i * 64 + threadIdx.x];
  }
  for (int i = 0; i < n; ++i) {
    out[i * 64 + threadIdx.x] = values[at[i + n] & (N - 1)];
  }
}

// Two blocks of 1024 threads leave 32 registers to each thread, which is fewer than the values.
template <class T, int N>
__global__ void __launch_bounds__(1024, 2) toy_crowded_kernel(const T* in, T* out) {
  T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = in[i * 1024 + threadIdx.x];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out[i * 1024 + threadIdx.x] = values[N - 1 - i] * values[i];
  }
}

template <class T, bool ADDS>
__global__ void __launch_bounds__(128) toy_shared_kernel(const float4* in, T* out) {
  __shared__ float4 values[128];
  __pipeline_memcpy_async(&values[threadIdx.x], &in[threadIdx.x], sizeof(float4));
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  if (ADDS) {
    atomicAdd(out, values[127 - threadIdx.x].x);
  } else {
    out[threadIdx.x] = values[127 - threadIdx.x].y;
  }
}

__global__ void toy_matrix_kernel(const half* a, const half* b, float* out) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, half, row_major> left;
  fragment<matrix_b, 16, 16, 16, half, col_major> right;
  fragment<accumulator, 16, 16, 16, float> sum;
  fill_fragment(sum, 0.0f);
  load_matrix_sync(left, a, 16);
  load_matrix_sync(right, b, 16);
  mma_sync(sum, left, right, sum);
  store_matrix_sync(out, sum, 16, mem_row_major);
}

__global__ void __launch_bounds__(128) toy_copy_kernel(const uint4* __restrict__ in, uint4* __restrict__ out, int n) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i * n + threadIdx.x] = in[i * n + threadIdx.x];
  }
}

}  // namespace

void launch_all() {
  toy_indexed_kernel<float, 64><<<1, 64>>>(nullptr, nullptr, 7, nullptr);
  toy_crowded_kernel<float, 64><<<1, 1024>>>(nullptr, nullptr);
  toy_shared_kernel<float, true><<<1, 128>>>(nullptr, nullptr);
  toy_shared_kernel<float, false><<<1, 128>>>(nullptr, nullptr);
  toy_matrix_kernel<<<1, 32>>>(nullptr, nullptr, nullptr);
  toy_copy_kernel<<<1, 128>>>(nullptr, nullptr, 7);
}
