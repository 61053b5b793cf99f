// Codes of eight bits as numbers.
#pragma once

#include <cuda_runtime.h>

namespace recsys_ops::cuda {

// The number that four bits of exponent and three of mantissa stand for.
__device__ inline float from_e4m3(unsigned code) {
  const unsigned magnitude = code & 0x7f;
  // As a float with an exponent that is too small by 120, subnormal or not.
  const float scaled = __uint_as_float(magnitude << 20) * 0x1p120f;
  const float value = magnitude == 0x7f ? __uint_as_float(0x7fc00000) : scaled;
  return code & 0x80 ? -value : value;
}

}  // namespace recsys_ops::cuda
