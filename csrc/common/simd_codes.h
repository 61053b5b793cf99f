// Codes of quantised rows, loaded as the numbers they are.
#pragma once

#include <type_traits>

#include "codes.h"
#include "simd.h"

namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL {

template <class T>
constexpr bool is_code = std::is_same_v<T, Code8> || std::is_same_v<T, Code4> || std::is_same_v<T, Float8>;

// Units of memory before a column, and columns left in it: two codes of 4 bits share a byte, so the
// rows of those are addressed as a whole.
template <class T>
RECSYS_OPS_INLINE int64_t units(int64_t column) {
  return std::is_same_v<T, Code4> ? 0 : column;
}

template <class T>
RECSYS_OPS_INLINE int64_t column_in_unit(int64_t column) {
  return std::is_same_v<T, Code4> ? column : 0;
}

template <int LANES>
inline Vector<float, LANES> load(const Code8* from) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(narrow)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(narrow)));
  }
#endif
  return __builtin_convertvector(load_raw<LANES>(&from->bits), Vector<float, LANES>);
}

template <int LANES>
inline Vector<float, LANES> load(const int8_t* from) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (LANES == 8) {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return bit_cast<Vector<float, LANES>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow)));
  }
#endif
  return __builtin_convertvector(load_raw<LANES>(from), Vector<float, LANES>);
}

// Columns [column, column + LANES) of a row.
template <int LANES>
inline Vector<float, LANES> load(const Code4* row, int64_t column) {
#if defined(__AVX2__)
  if constexpr (LANES == 8 || LANES == 16) {
    const auto* from = reinterpret_cast<const uint8_t*>(row) + column / 2;
    __m128i pairs;
    if constexpr (LANES == 16) {
      pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    } else {
      pairs = _mm_cvtsi32_si128(bit_cast<int>(load_raw<4>(from)));
    }
    const __m128i low = _mm_and_si128(pairs, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(pairs, 4), _mm_set1_epi8(15));
    const __m128i codes = _mm_unpacklo_epi8(low, high);
#if defined(__AVX512F__)
    if constexpr (LANES == 16) {
      return bit_cast<Vector<float, LANES>>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)));
    }
#endif
    if constexpr (LANES == 8) {
      return bit_cast<Vector<float, LANES>>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)));
    }
  }
#endif
  Vector<float, LANES> v;
  for (int lane = 0; lane < LANES; ++lane) {
    const int at = static_cast<int>(column + lane);
    v[lane] = static_cast<float>(row[at / 2].bits >> 4 * (at % 2) & 15);
  }
  return v;
}

// A half has the same fraction below three more bits of exponent, biased by 8 more.
inline float float8_to_float(uint8_t bits) {
  const bool is_nan = (bits & 0x7f) == 0x7f;
  const uint16_t half = static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7);
  return is_nan ? __builtin_nanf("") : half_to_float(half) * 256.0f;
}

template <int LANES>
inline Vector<float, LANES> load(const Float8* from) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
    const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
    const __m512 value = _mm512_mul_ps(
        _mm512_cvtph_ps(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7))), _mm512_set1_ps(256.0f));
    return bit_cast<Vector<float, LANES>>(_mm512_mask_blend_ps(is_nan, value, _mm512_set1_ps(__builtin_nanf(""))));
  }
#endif
#if defined(__F16C__)
  if constexpr (LANES == 8) {
    const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m128i magnitude = _mm_and_si128(bits, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m256 value =
        _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, _mm_slli_epi16(magnitude, 7))), _mm256_set1_ps(256.0f));
    const __m256 mask = _mm256_castsi256_ps(_mm256_cvtepi16_epi32(is_nan));
    return bit_cast<Vector<float, LANES>>(_mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")), mask));
  }
#endif
  Vector<float, LANES> v;
  for (int lane = 0; lane < LANES; ++lane) {
    v[lane] = float8_to_float(from[lane].bits);
  }
  return v;
}

}  // namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL
