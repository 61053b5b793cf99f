// Vectors of any number of lanes, loaded from and stored to every element type.
//
// Included by sources that are compiled once per SIMD level. Everything lives in a
// namespace of that level, so that the linker never merges code of two levels.
#pragma once

#include "dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

template <class E, int LANES>
struct VectorType {
  typedef E type __attribute__((vector_size(sizeof(E) * LANES)));
};

template <class E, int LANES>
using Vector = typename VectorType<E, LANES>::type;

// Lanes of a full register.
template <class E>
constexpr int full_lanes =
    RECSYS_OPS_VECTOR_BYTES > sizeof(E) ? RECSYS_OPS_VECTOR_BYTES / static_cast<int>(sizeof(E)) : 1;

// Brings memory that will be read soon on its way. Any address is good.
RECSYS_OPS_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + byte);
  }
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#elif defined(__ARM_NEON)
  return bit_cast<__fp16>(half);
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t rebiased = exponent == 0x1f ? 0xff : exponent + 112;
  return bit_cast<float>(sign | rebiased << 23 | fraction << 13);
#endif
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__ARM_NEON)
  return bit_cast<uint16_t>(static_cast<__fp16>(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) {
    return sign | 0x7e00;  // NaN
  }
  if (magnitude >= 0x477ff000) {
    return sign | 0x7c00;  // rounds past the largest half
  }
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves fraction * 2^24 in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(shifted) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
#endif
}

// LANES elements from memory of any alignment, in the type that they accumulate in.
template <int LANES, class E>
inline Vector<E, LANES> load_raw(const E* from) {
  Vector<E, LANES> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <int LANES>
inline Vector<float, LANES> load(const float* from) {
  return load_raw<LANES>(from);
}

template <int LANES>
inline Vector<double, LANES> load(const double* from) {
  return load_raw<LANES>(from);
}

template <int LANES>
inline Vector<float, LANES> load(const BFloat16* from) {
  // The compiler widens halves of a vector one by one; the instructions widen all of it.
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
#endif
  const auto narrow = load_raw<LANES>(reinterpret_cast<const uint16_t*>(from));
  return bit_cast<Vector<float, LANES>>(__builtin_convertvector(narrow, Vector<uint32_t, LANES>) << 16);
}

template <int LANES>
inline Vector<float, LANES> load(const Half* from) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    return bit_cast<Vector<float, LANES>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
#if defined(__F16C__)
  if constexpr (LANES == 8) {
    return bit_cast<Vector<float, LANES>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
#elif defined(__ARM_NEON)
  if constexpr (LANES == 4) {
    return bit_cast<Vector<float, LANES>>(
        vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)))));
  }
#endif
  Vector<float, LANES> v;
  for (int lane = 0; lane < LANES; ++lane) {
    v[lane] = half_to_float(from[lane].bits);
  }
  return v;
}

template <int LANES>
inline void store(float* to, Vector<float, LANES> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <int LANES>
inline void store(double* to, Vector<double, LANES> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// Rounds to nearest, ties to even; a NaN stays one.
template <int LANES>
inline void store(BFloat16* to, Vector<float, LANES> v) {
  const auto bits = bit_cast<Vector<uint32_t, LANES>>(v);
  const Vector<uint32_t, LANES> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Vector<uint32_t, LANES> quiet = bits >> 16 | 0x40;
  const auto nan = v != v;
  const Vector<uint32_t, LANES> chosen = nan ? quiet : rounded;
  const auto narrow = __builtin_convertvector(chosen, Vector<uint16_t, LANES>);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
}

template <int LANES>
inline void store(Half* to, Vector<float, LANES> v) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    const __m256i narrow = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
  }
#endif
#if defined(__F16C__)
  if constexpr (LANES == 8) {
    const __m128i narrow = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow);
  }
#elif defined(__ARM_NEON)
  if constexpr (LANES == 4) {
    const float16x4_t narrow = vcvt_f16_f32(bit_cast<float32x4_t>(v));
    return vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(narrow));
  }
#endif
  for (int lane = 0; lane < LANES; ++lane) {
    to[lane].bits = float_to_half(v[lane]);
  }
}

// Adds up halves, so that few sums wait for others.
template <int LANES, class A>
RECSYS_OPS_INLINE A sum_of(Vector<A, LANES> v) {
  if constexpr (LANES == 1) {
    return v[0];
  } else {
    Vector<A, LANES / 2> halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return sum_of<LANES / 2, A>(halves[0] + halves[1]);
  }
}

template <int LANES, class V>
inline V square_root(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && LANES == 16) {
    return bit_cast<V>(_mm512_sqrt_ps(bit_cast<__m512>(v)));
  } else if constexpr (sizeof(V) == 64) {
    return bit_cast<V>(_mm512_sqrt_pd(bit_cast<__m512d>(v)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && LANES == 8) {
    return bit_cast<V>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
  } else if constexpr (sizeof(V) == 32) {
    return bit_cast<V>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
  }
#endif
  for (int lane = 0; lane < LANES; ++lane) {
    v[lane] = sizeof(v[0]) == 4 ? __builtin_sqrtf(v[lane]) : __builtin_sqrt(v[lane]);
  }
  return v;
}

// The same where the element type is known at run time; the branch is the same for all of a call.
template <int LANES>
RECSYS_OPS_INLINE void store_as(DType dtype, void* to, int64_t at, Vector<float, LANES> v) {
  switch (dtype) {
    case DType::float16: return store<LANES>(static_cast<Half*>(to) + at, v);
    case DType::bfloat16: return store<LANES>(static_cast<BFloat16*>(to) + at, v);
    default: return store<LANES>(static_cast<float*>(to) + at, v);
  }
}

template <int LANES>
RECSYS_OPS_INLINE void store_as(DType, void* to, int64_t at, Vector<double, LANES> v) {
  store<LANES>(static_cast<double*>(to) + at, v);
}

// As float or, in tables of double, as double.
template <int LANES, class A>
RECSYS_OPS_INLINE Vector<A, LANES> load_as(DType dtype, const void* from, int64_t at) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return load<LANES>(static_cast<const double*>(from) + at);
  } else {
    switch (dtype) {
      case DType::float16: return load<LANES>(static_cast<const Half*>(from) + at);
      case DType::bfloat16: return load<LANES>(static_cast<const BFloat16*>(from) + at);
      default: return load<LANES>(static_cast<const float*>(from) + at);
    }
  }
}

}  // namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL
