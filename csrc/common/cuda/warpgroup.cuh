// Products of warpgroups, by the tensor cores of sm_90a: four warps multiply A [64, 16] by B [16, N] and
// add them to sums that a warp holds as those of matrix.cuh, of 16 rows. They go on while the threads do
// other things. Operands in shared memory are tiles of tensor_tiles.cuh. See the PTX manual,
// "Asynchronous warpgroup level matrix instructions".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../dtype.h"
#include "tensor_tiles.cuh"

#if !defined(__CUDACC__)
#include <warpgroup_on_cpu.h>
#endif

namespace recsys_ops::cuda {

constexpr int warpgroup_threads = 128, warpgroup_rows = 64;

// Whether the GPU that is compiled for has them.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool has_warpgroups = true;
#else
constexpr bool has_warpgroups = false;
#endif

// What tells where an operand is: addresses and distances in units of 16 bytes, and the swizzle.
class Operand {
 public:
  // Rows of A or columns of B whose 16 elements stand side by side; they start at a column of a tile that
  // is a multiple of 16.
  __device__ static Operand of_rows(const void* tile, int column = 0) { return Operand(tile, 16).past(column * 2); }

  // 16 rows of B, as they stand in tiles beside each other, which are so many bytes apart.
  __device__ static Operand of_columns(const void* tile, int bytes_of_tile) { return Operand(tile, bytes_of_tile); }

  // One so many bytes further on.
  __device__ Operand past(int bytes) const {
    Operand other = *this;
    other.bits += static_cast<uint64_t>(bytes >> 4);
    return other;
  }

  uint64_t bits;

 private:
  __device__ Operand(const void* tile, int leading_bytes)
      : bits(
            (shared_address(tile) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
            static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62) {}
};

// Before the first product of some, so that they see what registers hold.
__device__ inline void begin_products() {
#if !defined(__CUDACC__)
  cuda_host::begin_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Products so far, since the last call, are a batch.
__device__ inline void commit_products() {
#if !defined(__CUDACC__)
  cuda_host::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int BATCHES>
__device__ void wait_for_all_products_but() {
#if !defined(__CUDACC__)
  cuda_host::wait_for_products(BATCHES);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BATCHES) : "memory");
#endif
}

// Sums that have been waited for: the compiler reads them no earlier.
template <int N>
__device__ void settle(float (&sums)[N][4]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      asm volatile("" : "+f"(sums[n][c])::"memory");
    }
  }
#endif
}

#if defined(__CUDACC__)
#define RECSYS_OPS_SUMS_8(N) \
  "+f"(sums[N][0]), "+f"(sums[N][1]), "+f"(sums[N][2]), "+f"(sums[N][3]), "+f"(sums[N + 1][0]), \
      "+f"(sums[N + 1][1]), "+f"(sums[N + 1][2]), "+f"(sums[N + 1][3])
#define RECSYS_OPS_SUMS_16(N) RECSYS_OPS_SUMS_8(N), RECSYS_OPS_SUMS_8(N + 2)
#define RECSYS_OPS_SUMS_32(N) RECSYS_OPS_SUMS_16(N), RECSYS_OPS_SUMS_16(N + 4)
#define RECSYS_OPS_SUMS_64(N) RECSYS_OPS_SUMS_32(N), RECSYS_OPS_SUMS_32(N + 8)
#define RECSYS_OPS_SUMS_128(N) RECSYS_OPS_SUMS_64(N), RECSYS_OPS_SUMS_64(N + 16)
#define RECSYS_OPS_NAMES_8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define RECSYS_OPS_NAMES_16 \
  RECSYS_OPS_NAMES_8 ", " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define RECSYS_OPS_NAMES_32 \
  RECSYS_OPS_NAMES_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RECSYS_OPS_NAMES_64 \
  RECSYS_OPS_NAMES_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RECSYS_OPS_NAMES_128 \
  RECSYS_OPS_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// SUMS is the number of sums that a thread holds, ADD the operand that tells whether they are added to.
#define RECSYS_OPS_MULTIPLY(N, SUMS, TYPE, OPERANDS, ADD, TRANSPOSED, ...)                               \
  asm volatile(                                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                              \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" RECSYS_OPS_NAMES_##SUMS "}, " \
      OPERANDS ", add, 1, 1, " TRANSPOSED ";\n}"                                                         \
      : RECSYS_OPS_SUMS_##SUMS(0)                                                                        \
      : __VA_ARGS__)
#define RECSYS_OPS_MULTIPLY_ROWS(N, SUMS, TYPE, A, B, ADD) \
  RECSYS_OPS_MULTIPLY(N, SUMS, TYPE, A ", " B, ADD, "0, 0", "l"(a.bits), "l"(b.bits), "r"(add))
#define RECSYS_OPS_MULTIPLY_COLUMNS(N, SUMS, TYPE, A, B, ADD) \
  RECSYS_OPS_MULTIPLY(                                        \
      N, SUMS, TYPE, "{" A "}, " B, ADD, "1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(add))
#endif

// sums [64, N] = a [64, 16] b [N, 16]^T, both in shared memory, or are added to where `add` is not 0.
template <class T, int N>
__device__ void multiply_rows_of_tiles(float (&sums)[N / 8][4], const Operand& a, const Operand& b, int add) {
#if !defined(__CUDACC__)
  cuda_host::multiply_rows_of_tiles<T, N>(sums, a.bits, b.bits, add);
#else
  constexpr bool half = std::is_same_v<T, Half>;
  if constexpr (N == 16 && half) {
    RECSYS_OPS_MULTIPLY_ROWS(16, 8, "f16", "%8", "%9", "%10");
  } else if constexpr (N == 16 && !half) {
    RECSYS_OPS_MULTIPLY_ROWS(16, 8, "bf16", "%8", "%9", "%10");
  } else if constexpr (N == 32 && half) {
    RECSYS_OPS_MULTIPLY_ROWS(32, 16, "f16", "%16", "%17", "%18");
  } else if constexpr (N == 32 && !half) {
    RECSYS_OPS_MULTIPLY_ROWS(32, 16, "bf16", "%16", "%17", "%18");
  } else if constexpr (N == 64 && half) {
    RECSYS_OPS_MULTIPLY_ROWS(64, 32, "f16", "%32", "%33", "%34");
  } else if constexpr (N == 64 && !half) {
    RECSYS_OPS_MULTIPLY_ROWS(64, 32, "bf16", "%32", "%33", "%34");
  } else if constexpr (N == 128 && half) {
    RECSYS_OPS_MULTIPLY_ROWS(128, 64, "f16", "%64", "%65", "%66");
  } else if constexpr (N == 128 && !half) {
    RECSYS_OPS_MULTIPLY_ROWS(128, 64, "bf16", "%64", "%65", "%66");
  } else {
    static_assert(N == 0, "columns of B");
  }
#endif
}

// sums [64, N] += a [64, 16] b [16, N], a in the registers of each warp as in matrix.cuh.
template <class T, int N>
__device__ void multiply_columns_of_tiles(float (&sums)[N / 8][4], const unsigned (&a)[4], const Operand& b) {
#if !defined(__CUDACC__)
  cuda_host::multiply_columns_of_tiles<T, N>(sums, a, b.bits);
#else
  constexpr bool half = std::is_same_v<T, Half>;
  constexpr int add = 1;
  if constexpr (N == 64 && half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(64, 32, "f16", "%32, %33, %34, %35", "%36", "%37");
  } else if constexpr (N == 64 && !half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(64, 32, "bf16", "%32, %33, %34, %35", "%36", "%37");
  } else if constexpr (N == 128 && half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(128, 64, "f16", "%64, %65, %66, %67", "%68", "%69");
  } else if constexpr (N == 128 && !half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(128, 64, "bf16", "%64, %65, %66, %67", "%68", "%69");
  } else if constexpr (N == 256 && half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(256, 128, "f16", "%128, %129, %130, %131", "%132", "%133");
  } else if constexpr (N == 256 && !half) {
    RECSYS_OPS_MULTIPLY_COLUMNS(256, 128, "bf16", "%128, %129, %130, %131", "%132", "%133");
  } else {
    static_assert(N == 0, "columns of B");
  }
#endif
}

}  // namespace recsys_ops::cuda
