// Element types of tensors, as the kernels see them.
#pragma once

#include <cstdint>

// Functions of headers that sources of several SIMD levels share: inlined always, so that the
// linker cannot pick the copy of a level that this machine lacks. CUDA kernels call them too.
#if defined(__CUDACC__)
#define RECSYS_OPS_INLINE inline __host__ __device__ __attribute__((always_inline))
#else
#define RECSYS_OPS_INLINE inline __attribute__((always_inline))
#endif

namespace recsys_ops {

enum class DType { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};

// The type in which sums of T are formed.
template <class T>
using Accumulate = typename AccumulateType<T>::type;

inline int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Calls f with a null pointer of the element type.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::float64:
      return f(static_cast<double*>(nullptr));
    case DType::float16:
      return f(static_cast<Half*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

// Integers of either width; the branch is the same for every element of a call.
struct Integers {
  const void* data;
  bool wide;
  int64_t size;

  RECSYS_OPS_INLINE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

}  // namespace recsys_ops
