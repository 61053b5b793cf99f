// What the products of attention take, made of rows of numbers: those themselves, or pairs of bfloat16;
// included by sources compiled once per SIMD level.
#pragma once

#include "../common/simd_products.h"
#include "rows.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {

// Columns of rows in memory: so many that vectors of them are full, of elements E, too.
template <class E, class A>
RECSYS_OPS_INLINE int64_t width_of(int64_t columns) {
  constexpr int64_t unit = full_lanes<A> * packed<E>;
  return (columns + unit - 1) / unit * unit;
}

// Elements that hold so many numbers.
template <class E>
RECSYS_OPS_INLINE int64_t elements_of(int64_t numbers) {
  return (numbers + packed<E> - 1) / packed<E>;
}

// Numbers rounded to bfloat16, those of `low` before those of `high`.
template <int LANES>
RECSYS_OPS_INLINE Vector<uint32_t, LANES> pairs_of(Vector<float, LANES> low, Vector<float, LANES> high) {
  Vector<uint32_t, LANES> pairs{};
#if defined(__AVX512F__)
  __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(high), "v"(low));
#endif
  return pairs;
}

// Each number of `low` beside that of `high`.
template <int LANES>
RECSYS_OPS_INLINE Vector<uint32_t, LANES> interleaved(Vector<float, LANES> low, Vector<float, LANES> high) {
#if defined(__AVX512BW__)
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return bit_cast<Vector<uint32_t, LANES>>(
      _mm512_permutexvar_epi16(_mm512_load_si512(order), bit_cast<__m512i>(pairs_of<LANES>(low, high))));
#else
  return {};
#endif
}

// Rows as the left side of a product that sums over columns: [count, width / packed].
template <class E, class A>
RECSYS_OPS_INLINE const E* left_rows(const A* rows, int64_t count, int64_t width, E* memory) {
  if constexpr (std::is_same_v<E, A>) {
    return rows;
  } else {
    constexpr int lanes = full_lanes<A>;
    for (int64_t i = 0; i < count * width; i += 2 * lanes) {
      const auto pairs = pairs_of<lanes>(load<lanes>(rows + i), load<lanes>(rows + i + lanes));
      __builtin_memcpy(memory + i / 2, &pairs, sizeof(pairs));
    }
    return memory;
  }
}

// As the right side of a product that sums over rows: [count / packed, width].
template <class E, class A>
RECSYS_OPS_INLINE const E* right_rows(const A* rows, int64_t count, int64_t width, E* memory) {
  if constexpr (std::is_same_v<E, A>) {
    return rows;
  } else {
    constexpr int lanes = full_lanes<A>;
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t d = 0; d < width; d += lanes) {
        const auto second = i + 1 < count ? load<lanes>(rows + (i + 1) * width + d) : Vector<A, lanes>{};
        const auto pairs = interleaved<lanes>(load<lanes>(rows + i * width + d), second);
        __builtin_memcpy(memory + i / 2 * width + d, &pairs, sizeof(pairs));
      }
    }
    return memory;
  }
}

// As the right side of a product that sums over columns: [width / packed, lanes * VECTORS], zeros for
// rows after `count`. Scratch [lanes * VECTORS, width / packed].
template <int VECTORS, class E, class A>
RECSYS_OPS_INLINE void turn_rows(const A* rows, int64_t count, int64_t width, E* scratch, E* memory) {
  if constexpr (std::is_same_v<E, A>) {
    transpose_rows<VECTORS>(rows, count, width, memory);
  } else {
    left_rows<E>(rows, count, width, scratch);
    transpose_rows<VECTORS>(
        reinterpret_cast<const float*>(scratch), count, width / 2, reinterpret_cast<float*>(memory));
  }
}

// Scores of keys [keys, STRIDE], even where there are fewer in a tile, as the left side of products that
// sum over keys: [tile_rows / packed, STRIDE].
template <int STRIDE, class E, class A>
RECSYS_OPS_INLINE void scores_over_keys(const A* scores, int64_t keys, E* memory) {
  if constexpr (!std::is_same_v<E, A>) {
    constexpr int lanes = full_lanes<A>;
    for (int64_t i = 0; i < keys; i += 2) {
      for (int d = 0; d < STRIDE; d += lanes) {
        const auto second = i + 1 < keys ? load<lanes>(scores + (i + 1) * STRIDE + d) : Vector<A, lanes>{};
        const auto pairs = interleaved<lanes>(load<lanes>(scores + i * STRIDE + d), second);
        __builtin_memcpy(memory + i / 2 * STRIDE + d, &pairs, sizeof(pairs));
      }
    }
  }
}

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
