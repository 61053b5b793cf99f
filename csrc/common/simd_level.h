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
  template <class T>                                         \
  const TABLE<T>& FUNCTION(const T*);                        \
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

// Defines it for one type, in the namespace of the level that is being compiled.
#define RECSYS_OPS_DEFINE_FOR_TYPE(TABLE, FUNCTION, KERNELS, T) \
  template <>                                                   \
  const TABLE<T>& FUNCTION<T>(const T*) {                       \
    return KERNELS<T>;                                          \
  }

// The same for the types of DType.
#define RECSYS_OPS_DEFINE_FOR_LEVEL(TABLE, FUNCTION, KERNELS)     \
  RECSYS_OPS_DEFINE_FOR_TYPE(TABLE, FUNCTION, KERNELS, float)     \
  RECSYS_OPS_DEFINE_FOR_TYPE(TABLE, FUNCTION, KERNELS, double)    \
  RECSYS_OPS_DEFINE_FOR_TYPE(TABLE, FUNCTION, KERNELS, Half)      \
  RECSYS_OPS_DEFINE_FOR_TYPE(TABLE, FUNCTION, KERNELS, BFloat16)
