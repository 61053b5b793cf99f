// Half precision of cuda_runtime.h, by the conversions of the CPU kernels.
#pragma once

#include "../../csrc/common/simd.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) { return recsys_ops::scalar::half_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {recsys_ops::scalar::float_to_half(value)}; }
