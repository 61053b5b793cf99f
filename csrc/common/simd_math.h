// Arithmetic that the compiler's vectors lack; included by sources compiled once per SIMD level.
#pragma once

#include <type_traits>

#include "simd.h"

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

// GCC 12 fills a vector of 16 lanes one by one.
template <int LANES, class A>
RECSYS_OPS_INLINE Vector<A, LANES> broadcast(A value) {
  using V [[maybe_unused]] = Vector<A, LANES>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && std::is_same_v<A, float>) {
    return bit_cast<V>(_mm512_set1_ps(value));
  } else if constexpr (sizeof(V) == 64 && sizeof(A) == 4) {
    return bit_cast<V>(_mm512_set1_epi32(static_cast<int>(value)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && std::is_same_v<A, float>) {
    return bit_cast<V>(_mm256_set1_ps(value));
  } else if constexpr (sizeof(V) == 32 && sizeof(A) == 4) {
    return bit_cast<V>(_mm256_set1_epi32(static_cast<int>(value)));
  }
#endif
  V v;
  for (int lane = 0; lane < LANES; ++lane) {
    v[lane] = value;
  }
  return v;
}

// a * b + c, rounded once where the machine has an instruction for it.
template <int LANES, class A>
RECSYS_OPS_INLINE Vector<A, LANES> multiply_add(Vector<A, LANES> a, Vector<A, LANES> b, Vector<A, LANES> c) {
  using V [[maybe_unused]] = Vector<A, LANES>;
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(A) == 4) {
    return bit_cast<V>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  } else if constexpr (sizeof(V) == 64) {
    return bit_cast<V>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
  }
#endif
#if defined(__FMA__)
  if constexpr (sizeof(V) == 32 && sizeof(A) == 4) {
    return bit_cast<V>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
  } else if constexpr (sizeof(V) == 32) {
    return bit_cast<V>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
  }
#elif defined(__ARM_NEON)
  if constexpr (sizeof(V) == 16 && sizeof(A) == 4) {
    return bit_cast<V>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b)));
  } else if constexpr (sizeof(V) == 16) {
    return bit_cast<V>(vfmaq_f64(bit_cast<float64x2_t>(c), bit_cast<float64x2_t>(a), bit_cast<float64x2_t>(b)));
  }
#endif
  return a * b + c;
}

// exp(-x), for x from -87 to 87; beyond, what exp gives there. NaN stays.
template <int LANES>
RECSYS_OPS_INLINE Vector<float, LANES> exp_of_minus(Vector<float, LANES> x) {
  using V = Vector<float, LANES>;
  using Bits = Vector<int32_t, LANES>;
  const V lowest = broadcast<LANES>(-126.0f), highest = broadcast<LANES>(126.0f);
  const V to_integer = broadcast<LANES>(12582912.0f);  // 1.5 * 2^23: the sum's last bits are the integer
  V y = x * broadcast<LANES>(-1.44269504088896341f);
  y = y > highest ? highest : y;
  y = y < lowest ? lowest : y;
  const V shifted = y + to_integer;
  const V r = y - (shifted - to_integer);  // [-0.5, 0.5]
  // 2^r, relative error below 2e-9 before rounding.
  V p = broadcast<LANES>(0.00015337576833986032f);
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(0.001339986036319868f));
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(0.009618519534348427f));
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(0.05550328997517494f));
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(0.24022646608714063f));
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(0.6931472056005101f));
  p = multiply_add<LANES, float>(p, r, broadcast<LANES>(1.0f));
  const Bits exponent = (bit_cast<Bits>(shifted) - 0x4b400000) << 23;
  return bit_cast<V>(bit_cast<Bits>(p) + exponent);
}

template <int LANES>
RECSYS_OPS_INLINE Vector<double, LANES> exp_of_minus(Vector<double, LANES> x) {
  for (int lane = 0; lane < LANES; ++lane) {
    x[lane] = __builtin_exp(-x[lane]);
  }
  return x;
}

}  // namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL
