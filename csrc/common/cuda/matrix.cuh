// Products of small matrices by the tensor cores of sm_80 and later: a warp multiplies A [16, 16] by
// B [16, 8] and adds C [16, 8]. Who holds what: the PTX manual, "Matrix fragments for mma.m16n8k16".
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../dtype.h"

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

}  // namespace recsys_ops::cuda
