// Kernels that are right, and wrong in one way on purpose: which, the launch says by a number.
// Compiled by nvcc too, so that they are CUDA.
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/cuda/group.cuh"
#include "common/cuda/matrix.cuh"
#include "common/cuda/shared.cuh"
#include "common/cuda/warpgroup.cuh"

namespace {

constexpr int threads = 64;

// Sum of each block's numbers, by a tree in shared memory.
enum BlockSum { no_fault, missing_barrier, divergent_barrier, off_by_one, unwritten, early_exit };

__global__ void block_sum_kernel(const float* in, float* out, int fault) {
  __shared__ float tile[threads];
  const int i = threadIdx.x;
  if (fault == early_exit && i == threads - 1) {
    return;
  }
  if (fault != unwritten || i != 5) {
    tile[i] = in[blockIdx.x * threads + i];
  }
  for (int distance = threads / 2; distance > 0; distance /= 2) {
    if (fault != missing_barrier || distance != threads / 4) {
      __syncthreads();
    }
    if (i < distance) {
      const float* other = tile + i + distance;
      tile[i] += other[fault == off_by_one && distance == threads / 2];
      if (fault == divergent_barrier) {
        __syncthreads();
      }
    }
  }
  if (i == 0) {
    out[blockIdx.x] = tile[0];
  }
}

// Each thread takes its neighbour's number through dynamic shared memory, as cp.async brings it.
enum Neighbour { no_neighbour_fault, not_waited, past_the_end, no_barrier_after };

__global__ void neighbour_kernel(const float* in, float* out, int fault) {
  RECSYS_OPS_DYNAMIC_SHARED(float, tile);
  const int i = threadIdx.x;
  __pipeline_memcpy_async(tile + i + (fault == past_the_end), in + i, sizeof(float));
  __pipeline_commit();
  if (fault != not_waited) {
    __pipeline_wait_prior(0);
  }
  if (fault != no_barrier_after) {
    __syncthreads();
  }
  out[i] = tile[(i + 1) % threads];
}

// The sum of each half of a warp, by shuffles.
enum WarpSum { no_warp_fault, wrong_mask, from_outside, lanes_disagree, own_lane_left_out, missing_syncwarp };

__global__ void warp_sum_kernel(const float* in, float* out, int fault) {
  __shared__ float sums[2];
  const int i = threadIdx.x;
  const recsys_ops::cuda::Group group(16);
  float sum = in[i];
  if (fault == wrong_mask && i < 16) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);  // the other half never comes
  }
  if (fault == from_outside && i < 16) {
    sum += __shfl_sync(0xffffu, sum, 20);
  }
  if (fault == lanes_disagree) {
    sum += i % 2 ? __shfl_sync(0xffffffffu, sum, 0) : __shfl_xor_sync(0xffffffffu, sum, 1);
  }
  if (fault == own_lane_left_out) {
    sum += __shfl_sync(0xffffu, sum, 0);
  }
  sum = group.sum(sum);
  if (group.lane == 0) {
    sums[i / 16] = sum;
  }
  if (fault != missing_syncwarp) {
    __syncwarp();
  }
  out[i] = sums[1 - i / 16];
}

// One number from each block: in the order of blocks, or by addition in any order.
enum Blocks { no_block_fault, read_from_another, past_the_array, misaligned };

__global__ void blocks_kernel(float* out, int fault) {
  if (fault == misaligned) {
    *reinterpret_cast<float4*>(out + blockIdx.x + 1) = float4{1, 2, 3, 4};
    return;
  }
  const int at = blockIdx.x + (fault == past_the_array);
  const bool before = fault == read_from_another && blockIdx.x > 0;
  out[at] = before ? out[at - 1] + 1 : static_cast<float>(blockIdx.x);
}

// Adds numbers whose sum depends on the order.
__global__ void order_kernel(float* out) {
  atomicAdd(out, blockIdx.x % 2 ? 1.0f : blockIdx.x % 4 ? 1e8f : -1e8f);
}

// C [16, 8] = A [16, 16] B [16, 8], B given by columns.
template <class T>
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const unsigned* rows = reinterpret_cast<const unsigned*>(a);
  const unsigned* columns = reinterpret_cast<const unsigned*>(b);
  const unsigned left[4] = {rows[g * 8 + t], rows[(g + 8) * 8 + t], rows[g * 8 + t + 4], rows[(g + 8) * 8 + t + 4]};
  const unsigned right[2] = {columns[g * 8 + t], columns[g * 8 + t + 4]};
  float sum[4] = {};
  if (fault == 0 || threadIdx.x < 31) {
    recsys_ops::cuda::multiply_add<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) {
    c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
  }
}

// Of a [64, 64] and b [32, 64], tiles of tensors: products [64, 32] = a b^T, and, with its columns rounded to
// T, sums [64, 64] = products b.
enum Tiles {
  no_tiles_fault,
  tiles_not_waited_for,
  tiles_nobody_waits_for,
  no_fence_before_products,
  products_not_waited_for,
  a_warp_without_products,
  no_fence_after_writing,
  too_many_arrivals,
  no_barrier_begun,
  too_few_bytes,
};

template <class T>
__global__ void tiles_kernel(
    const __grid_constant__ CUtensorMap of_a, const __grid_constant__ CUtensorMap of_b, float* products, float* sums,
    int fault) {
  if constexpr (recsys_ops::cuda::has_warpgroups) {
    using recsys_ops::cuda::Operand;
    RECSYS_OPS_DYNAMIC_SHARED(T, a);
    T* b = a + 64 * 64;
    auto* barrier = reinterpret_cast<recsys_ops::cuda::SharedBarrier*>(b + 32 * 64);
    if (threadIdx.x == 0) {
      if (fault != no_barrier_begun) {
        barrier->begin(1);
      }
      recsys_ops::cuda::fence_new_barriers();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      barrier->arrive_and_expect((fault == too_few_bytes ? 64 : 64 + 32) * 128);
      barrier->fetch(a, of_a, 0, 0, 0);
      barrier->fetch(b, of_b, 0, 0, 0);
      if (fault == too_many_arrivals) {
        barrier->arrive();
      }
    }
    if (fault == tiles_nobody_waits_for) {
      return;
    }
    if (fault != tiles_not_waited_for) {
      barrier->wait(0);
    }
    if (fault == no_fence_after_writing) {
      const_cast<volatile uint16_t&>(a[threadIdx.x].bits) = a[threadIdx.x].bits;
      __syncthreads();
    }
    float found[4][4], added[8][4] = {};
    if (fault != no_fence_before_products) {
      recsys_ops::cuda::begin_products();
    }
    const bool takes_part = fault != a_warp_without_products || threadIdx.x >= 32;
    for (int d = 0; takes_part && d < 64; d += 16) {
      recsys_ops::cuda::multiply_rows_of_tiles<T, 32>(found, Operand::of_rows(a, d), Operand::of_rows(b, d), d > 0);
    }
    recsys_ops::cuda::commit_products();
    if (fault != products_not_waited_for) {
      recsys_ops::cuda::wait_for_all_products_but<0>();
    }
    recsys_ops::cuda::settle(found);
    recsys_ops::cuda::begin_products();
    for (int n = 0; n < 2; ++n) {
      unsigned left[4];
      for (int i = 0; i < 4; ++i) {
        left[i] = recsys_ops::cuda::pair_of<T>(found[2 * n + i / 2][i % 2 * 2], found[2 * n + i / 2][i % 2 * 2 + 1]);
      }
      recsys_ops::cuda::multiply_columns_of_tiles<T, 64>(added, left, Operand::of_columns(b, 0).past(n * 16 * 128));
    }
    recsys_ops::cuda::commit_products();
    recsys_ops::cuda::wait_for_all_products_but<0>();
    recsys_ops::cuda::settle(added);
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int c = 0; c < 4; ++c) {
      for (int n = 0; n < 8; ++n) {
        sums[(row + c / 2 * 8) * 64 + n * 8 + column + c % 2] = added[n][c];
        if (n < 4) {
          products[(row + c / 2 * 8) * 32 + n * 8 + column + c % 2] = found[n][c];
        }
      }
    }
  }
}

std::string ended;

template <class... Parameters, class... Arguments>
const char* start(int blocks, int block, size_t shared, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  ended = error == cudaSuccess ? "" : cudaGetErrorString(error);
  return ended.c_str();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* block_sum(const float* in, float* out, int fault) {
  return start(3, threads, 0, block_sum_kernel, in, out, fault);
}
EXPORTED const char* neighbour(const float* in, float* out, int fault) {
  return start(1, threads, threads * sizeof(float), neighbour_kernel, in, out, fault);
}
EXPORTED const char* warp_sum(const float* in, float* out, int fault) {
  return start(1, 32, 0, warp_sum_kernel, in, out, fault);
}
EXPORTED const char* blocks(const float*, float* out, int fault) { return start(8, 1, 0, blocks_kernel, out, fault); }
EXPORTED const char* order(const float*, float* out, int) { return start(8, 1, 0, order_kernel, out); }
EXPORTED const char* half_product(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  return start(1, 32, 0, product_kernel<recsys_ops::Half>, a, b, c, fault);
}
EXPORTED const char* bfloat16_product(const uint16_t* a, const uint16_t* b, float* c, int fault) {
  return start(1, 32, 0, product_kernel<recsys_ops::BFloat16>, a, b, c, fault);
}

template <class T>
const char* start_tiles(const uint16_t* a, const uint16_t* b, float* products, float* sums, int fault) {
  // What is outside of a tensor comes as zeros: a has 50 columns, of rows of 64, and b 20 rows.
  CUtensorMap of_a, of_b;
  constexpr bool is_bfloat16 = std::is_same_v<T, recsys_ops::BFloat16>;
  if (!recsys_ops::cuda::describe_tiles(of_a, a, is_bfloat16, 64, 1, 50, 128, 128, 64) ||
      !recsys_ops::cuda::describe_tiles(of_b, b, is_bfloat16, 20, 1, 64, 128, 128, 32)) {
    return "not described";
  }
  return start(1, 128, (64 + 32) * 128 + 8, tiles_kernel<T>, of_a, of_b, products, sums, fault);
}
EXPORTED const char* half_tiles(const uint16_t* a, const uint16_t* b, float* products, float* sums, int fault) {
  return start_tiles<recsys_ops::Half>(a, b, products, sums, fault);
}
EXPORTED const char* bfloat16_tiles(const uint16_t* a, const uint16_t* b, float* products, float* sums, int fault) {
  return start_tiles<recsys_ops::BFloat16>(a, b, products, sums, fault);
}
