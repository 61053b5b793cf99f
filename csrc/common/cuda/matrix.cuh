// Products of small matrices by the tensor cores of sm_80 and later: a warp multiplies A [16, 16] by
// B [16, 8] and adds C [16, 8]. Who holds what: the PTX manual, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../dtype.h"
#include "pack.cuh"

#if !defined(__CUDACC__)
#include <matrix_on_cpu.h>
#endif

namespace recsys_ops::cuda {

// With g = lane / 4 and t = lane % 4, a lane holds two neighbouring elements in each register:
//   a  rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8
//   b  rows 2t and 2t + 8, one under the other, of column g
//   c  columns 2t and 2t + 1 of row g, then of row g + 8
template <class T>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if !defined(__CUDACC__)
  cuda_host::multiply_add<T>(c, a, b);
#else
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "of 16 bits");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Four matrices of 8 x 8 elements from shared memory, a register each as multiply_add wants its fragments:
// lane l names the 16 bytes of row l % 8 of matrix l / 8, and gets elements 2t and 2t + 1 of their rows g;
// with TRANSPOSED of their columns g.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&fragments)[4], const void* row) {
#if !defined(__CUDACC__)
  cuda_host::load_matrices(fragments, row, TRANSPOSED);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address));
  }
#endif
}

// Two neighbouring elements of a fragment, rounded to nearest, ties to even.
template <class T>
__device__ inline unsigned pair_of(float first, float second) {
  unsigned pair;
#if !defined(__CUDACC__)
  T elements[2];
  narrow(first, elements[0]);
  narrow(second, elements[1]);
  memcpy(&pair, elements, sizeof(pair));
#else
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
  }
#endif
  return pair;
}

}  // namespace recsys_ops::cuda
