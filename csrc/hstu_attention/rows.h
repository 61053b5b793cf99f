// Rows of q, k and v, as the numbers that are summed; included by sources compiled once per SIMD level.
#pragma once

#include "../common/simd_codes.h"
#include "../common/simd_math.h"
#include "attention.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

constexpr int64_t rows_ahead = 8;  // of the one that is read, on their way

// A row of `columns` numbers from memory of type T; zeros up to the width.
template <class A, class T>
RECSYS_OPS_INLINE void unpack_row(const T* from, int64_t stride, int64_t columns, int64_t width, A* to) {
  constexpr int lanes = full_lanes<A>;
  int64_t d = 0;
  if (stride == 1) {
    for (; d + lanes <= columns; d += lanes) {
      store<lanes>(to + d, load<lanes>(from + d));
    }
  }
  for (; d < columns; ++d) {
    to[d] = load<1>(from + d * stride)[0];
  }
  for (; d < width; ++d) {
    to[d] = 0;
  }
}

// Calls f with a pointer of the type of elements that sums of A are formed of.
template <class A, class F>
RECSYS_OPS_INLINE void dispatch_elements(DType dtype, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<const double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::float16: return f(static_cast<const Half*>(nullptr));
      case DType::bfloat16: return f(static_cast<const BFloat16*>(nullptr));
      default: return f(static_cast<const float*>(nullptr));
    }
  }
}

// Rows [first, first + count) of a head: to [count, width].
template <class A>
RECSYS_OPS_INLINE void unpack_rows(
    DType dtype, const Tensor3& tensor, int64_t head, int64_t first, int64_t count, int64_t columns, int64_t width,
    A* to) {
  dispatch_elements<A>(dtype, [&](auto* type) __attribute__((always_inline)) {
    const auto* data = static_cast<decltype(type)>(tensor.data) + head * tensor.head;
    for (int64_t i = 0; i < count; ++i) {
      const auto* row = data + (first + i) * tensor.row;
      prefetch(row + rows_ahead * tensor.row, columns * sizeof(*type));
      unpack_row<A>(row, tensor.column, columns, width, to + i * width);
    }
  });
}

// The same the other way round, row i times factor_of(i).
template <class A, class Factor>
RECSYS_OPS_INLINE void pack_rows(
    DType dtype, const Tensor3& tensor, int64_t head, int64_t first, int64_t count, int64_t columns, int64_t width,
    const A* from, const Factor& factor_of) {
  constexpr int lanes = full_lanes<A>;
  dispatch_elements<A>(dtype, [&](auto* type) __attribute__((always_inline)) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* data = const_cast<T*>(static_cast<const T*>(tensor.data)) + head * tensor.head;
    for (int64_t i = 0; i < count; ++i) {
      T* row = data + (first + i) * tensor.row;
      const A* numbers = from + i * width;
      const A factor = factor_of(i);
      int64_t d = 0;
      if (tensor.column == 1) {
        for (; d + lanes <= columns; d += lanes) {
          store<lanes>(row + d, load<lanes>(numbers + d) * broadcast<lanes>(factor));
        }
      }
      for (; d < columns; ++d) {
        store<1>(row + d * tensor.column, Vector<A, 1>{numbers[d] * factor});
      }
    }
  });
}

// A square of LANES rows of LANES numbers, columns in the place of rows.
template <int LANES, class A>
RECSYS_OPS_INLINE void transpose_square(const A* from, int64_t from_stride, A* to, int64_t to_stride) {
#if defined(__clang__)
  for (int i = 0; i < LANES; ++i) {
    for (int d = 0; d < LANES; ++d) {
      to[d * to_stride + i] = from[i * from_stride + d];
    }
  }
#else
  using V = Vector<A, LANES>;
  using Index = Vector<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, LANES>;
  V rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    rows[i] = load<LANES>(from + i * from_stride);
  }
  // Swaps the off-diagonal blocks of squares, of half a row, a quarter, and so on.
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) {
    Index first{}, second{};
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) {
      const bool upper = lane & half;
      first[lane] = upper ? LANES + lane - half : lane;
      second[lane] = upper ? LANES + lane : lane + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (!(i & half)) {
        const V a = rows[i], b = rows[i + half];
        rows[i] = __builtin_shuffle(a, b, first);
        rows[i + half] = __builtin_shuffle(a, b, second);
      }
    }
  }
#pragma GCC unroll 16
  for (int d = 0; d < LANES; ++d) {
    store<LANES>(to + d * to_stride, rows[d]);
  }
#endif
}

// Rows [count, width] with columns in the place of rows: [width, lanes * VECTORS], zeros after `count`.
template <int VECTORS, class A>
RECSYS_OPS_INLINE void transpose_rows(const A* from, int64_t count, int64_t width, A* to) {
  constexpr int lanes = full_lanes<A>, group = VECTORS * lanes;
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t there = std::clamp<int64_t>(count - v * lanes, 0, lanes);
    for (int64_t d = 0; d < width; d += lanes) {
      if (there == lanes) {
        transpose_square<lanes>(from + v * lanes * width + d, width, to + d * group + v * lanes, group);
        continue;
      }
      for (int64_t column = d; column < d + lanes; ++column) {
        for (int64_t i = 0; i < lanes; ++i) {
          to[column * group + v * lanes + i] = i < there ? from[(v * lanes + i) * width + column] : A{0};
        }
      }
    }
  }
}

// Rows that will be read soon, on their way.
RECSYS_OPS_INLINE void prefetch_rows(
    DType dtype, const Tensor3& tensor, int64_t head, int64_t first, int64_t count, int64_t columns) {
  const int64_t size = element_size(dtype);
  const char* data = static_cast<const char*>(tensor.data) + head * tensor.head * size;
  for (int64_t i = first; i < first + count; ++i) {
    prefetch(data + i * tensor.row * size, columns * size);
  }
}

// The row of a cache that holds a token of a sequence, in elements of its memory, and that of its scale.
struct CachePlace {
  int64_t element, scale;
};

RECSYS_OPS_INLINE CachePlace place_in_cache(
    const Attention& attention, const Cache& cache, int64_t sequence, int64_t token) {
  if (!attention.paged) {
    const int64_t row = attention.cache_starts[sequence] + token;
    return {row * cache.rows.row, row};
  }
  const int64_t size = attention.page_size, place = token % size;
  const int64_t page = attention.page_table[sequence * attention.pages_per_sequence + token / size];
  return {page * cache.page + place * cache.rows.row, page * size + place};
}

// Rows of k or v of the tokens [first, first + count) of a sequence: to [count, width].
template <class A>
RECSYS_OPS_INLINE void unpack_keys(
    const Attention& attention, const Tensor3& fresh, const Cache& cache, const Sequence& sequence, int64_t head,
    int64_t first, int64_t count, int64_t columns, int64_t width, A* to) {
  if (!attention.cached) {
    return unpack_rows(attention.dtype, fresh, head, sequence.first_token + first, count, columns, width, to);
  }
  const int64_t cached = std::clamp<int64_t>(sequence.first_position() - first, 0, count);
  const auto unpack = [&](auto* type) __attribute__((always_inline)) {
    using Source = std::conditional_t<std::is_same_v<decltype(type), const double*>, double, float>;
    const auto* data = static_cast<decltype(type)>(cache.rows.data) + head * cache.rows.head;
    for (int64_t i = 0; i < cached; ++i) {
      const CachePlace place = place_in_cache(attention, cache, sequence.index, first + i);
      const auto* row = data + place.element;
      A* numbers = to + i * width;
      if constexpr (std::is_same_v<Source, A>) {
        unpack_row<A>(row, cache.rows.column, columns, width, numbers);
      } else {
        for (int64_t d = 0; d < width; ++d) {
          numbers[d] = d < columns ? load<1>(row + d * cache.rows.column)[0] : 0;
        }
      }
      if (cache.scales) {
        const A factor = static_cast<const A*>(cache.scales)[place.scale * attention.heads + head];
        for (int64_t d = 0; d < columns; ++d) {
          numbers[d] *= factor;
        }
      }
    }
  };
  switch (cache.type) {
    case CacheType::int8: unpack(static_cast<const int8_t*>(nullptr)); break;
    case CacheType::float8: unpack(static_cast<const Float8*>(nullptr)); break;
    case CacheType::same: dispatch_elements<A>(attention.dtype, unpack); break;
  }
  const int64_t row = sequence.first_row + first + cached - sequence.first_position();
  unpack_rows(attention.dtype, fresh, head, row, count - cached, columns, width, to + cached * width);
}

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
