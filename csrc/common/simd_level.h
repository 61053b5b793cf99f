// The instruction sets that kernels are built for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "dtype.h"

namespace recsys_ops {

enum class SimdLevel { scalar, neon, avx2, avx512 };

// Levels that this binary contains and this machine can run, best first.
std::vector<SimdLevel> simd_levels();

// The level in use: RECSYS_OPS_SIMD where it is set, else the best.
SimdLevel simd_level();

// Throws std::runtime_error for a name that this machine cannot run.
void set_simd_level(const std::string& name);

const char* simd_level_name(SimdLevel level);

}  // namespace recsys_ops

// Declares FUNCTION<T>(), which returns the TABLE<T> of kernels of the level in use, and the
// functions that give it those of each level.
#define RECSYS_OPS_DECLARE_FOR_LEVEL(LEVEL, TABLE, FUNCTION) \
  namespace LEVEL {                                          \
  const TABLE<float>& FUNCTION(const float*);                \
  const TABLE<double>& FUNCTION(const double*);              \
  const TABLE<Half>& FUNCTION(const Half*);                  \
  const TABLE<BFloat16>& FUNCTION(const BFloat16*);          \
  }

#if defined(RECSYS_OPS_X86)
#define RECSYS_OPS_DECLARE_FOR_LEVELS(TABLE, FUNCTION)    \
  RECSYS_OPS_DECLARE_FOR_LEVEL(scalar, TABLE, FUNCTION)   \
  RECSYS_OPS_DECLARE_FOR_LEVEL(avx2, TABLE, FUNCTION)     \
  RECSYS_OPS_DECLARE_FOR_LEVEL(avx512, TABLE, FUNCTION)   \
  template <class T>                                      \
  const TABLE<T>& FUNCTION() {                            \
    const T* type = nullptr;                              \
    switch (simd_level()) {                               \
      case SimdLevel::avx512:                             \
        return avx512::FUNCTION(type);                    \
      case SimdLevel::avx2:                               \
        return avx2::FUNCTION(type);                      \
      default:                                            \
        return scalar::FUNCTION(type);                    \
    }                                                     \
  }
#elif defined(RECSYS_OPS_ARM)
#define RECSYS_OPS_DECLARE_FOR_LEVELS(TABLE, FUNCTION)                                                 \
  RECSYS_OPS_DECLARE_FOR_LEVEL(scalar, TABLE, FUNCTION)                                                \
  RECSYS_OPS_DECLARE_FOR_LEVEL(neon, TABLE, FUNCTION)                                                  \
  template <class T>                                                                                   \
  const TABLE<T>& FUNCTION() {                                                                         \
    const T* type = nullptr;                                                                           \
    return simd_level() == SimdLevel::neon ? neon::FUNCTION(type) : scalar::FUNCTION(type);            \
  }
#else
#define RECSYS_OPS_DECLARE_FOR_LEVELS(TABLE, FUNCTION)  \
  RECSYS_OPS_DECLARE_FOR_LEVEL(scalar, TABLE, FUNCTION) \
  template <class T>                                    \
  const TABLE<T>& FUNCTION() {                          \
    return scalar::FUNCTION(static_cast<const T*>(nullptr)); \
  }
#endif

// Defines them, in the namespace of the level that is being compiled.
#define RECSYS_OPS_DEFINE_FOR_LEVEL(TABLE, FUNCTION, KERNELS)                       \
  const TABLE<float>& FUNCTION(const float*) { return KERNELS<float>; }             \
  const TABLE<double>& FUNCTION(const double*) { return KERNELS<double>; }          \
  const TABLE<Half>& FUNCTION(const Half*) { return KERNELS<Half>; }                \
  const TABLE<BFloat16>& FUNCTION(const BFloat16*) { return KERNELS<BFloat16>; }
