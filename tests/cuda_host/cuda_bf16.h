// bfloat16 of cuda_runtime.h, by the conversions of the CPU kernels.
#pragma once

#include "../../csrc/common/simd.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  recsys_ops::BFloat16 rounded;
  recsys_ops::scalar::store<1>(&rounded, recsys_ops::scalar::Vector<float, 1>{value});
  return {rounded.bits};
}
