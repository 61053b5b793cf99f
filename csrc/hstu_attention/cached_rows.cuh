// Keys or values of a sequence of which the first are in a cache.
#pragma once

#include "../common/cuda/codes.cuh"
#include "sequences.cuh"
#include "tiles.cuh"

namespace recsys_ops::hstu_attention::cuda {

// Where the cached rows of a sequence are.
class CachePlaces {
 public:
  const int count;  // of cached rows

  __device__ CachePlaces(const Cache& cache, const Sequence& sequence)
      : count(sequence.keys - sequence.rows), cache(cache), number(sequence.number) {}

  // Page and row in it, or row; whether there is none is for `good` to tell.
  __device__ bool find(int i, int64_t& page, int64_t& row) const {
    if (cache.page_table.data) {
      const int size = static_cast<int>(cache.page_size), entry = i / size;
      page = entry < cache.pages_per_sequence ? cache.page_table[number * cache.pages_per_sequence + entry] : -1;
      row = i % size;
      return 0 <= page && page < cache.num_rows;
    }
    page = 0;
    row = cache.starts[number];
    const bool good = 0 <= row && row <= cache.num_rows - count;
    row += i;
    return good;
  }

  // Every page of the sequence, by all threads of a block.
  __device__ bool good() const {
    bool all = true;
    int64_t page, row;
    const int64_t step = cache.page_table.data ? cache.page_size : count;
    for (int64_t i = threadIdx.x * step; i < count; i += blockDim.x * step) {
      all = find(static_cast<int>(i), page, row) && all;
    }
    return all;
  }

 private:
  const Cache& cache;
  const int64_t number;
};

template <class T>
class CachedRows {
 public:
  using A = Accumulate<T>;
  static constexpr bool wide = false;
  static constexpr bool by_pieces = true;  // each row may be anywhere

  __device__ CachedRows(
      const Cache& cache, const Matrix& cached, int64_t page_stride, Cache::Codes codes, const void* scales,
      const Matrix& fresh, const Sequence& sequence, int64_t head, int64_t num_heads)
      : places(cache, sequence),
        old(cached, 0, head),
        fresh(fresh, sequence.first_row, head),
        page_stride(page_stride),
        page_size(cache.page_table.data ? cache.page_size : 0),
        codes(codes),
        bytes(static_cast<const uint8_t*>(cached.data) + head * cached.head_stride),
        scales(static_cast<const A*>(scales)),
        head(head),
        num_heads(num_heads) {}

  template <bool>
  __device__ void fetch(T* to, int i, int column, bool wanted) const {
    if (!wanted || i >= places.count) {
      fetch_of(fresh, to, wanted ? fresh.data + (i - places.count) * fresh.row_stride : fresh.data, column, wanted);
      return;
    }
    int64_t page, row;
    const bool good = places.find(i, page, row);
    const int64_t at = good ? page * page_stride + row * old.row_stride : 0;
    if (codes == Cache::Codes::none && !scales) {
      fetch_of(old, to, old.data + at, column, good);
      return;
    }
    constexpr int together = 16 / sizeof(T);
    const A scale = good && scales ? scales[(page * page_size + row) * num_heads + head] : A{1};
    Pack<uint8_t, together> read = {};
    if (codes != Cache::Codes::none) {
      if (old.wide) {
        read = recsys_ops::cuda::load<together>(bytes, at + column, good && column < old.columns).unpacked();
      } else {
#pragma unroll
        for (int x = 0; x < together; ++x) {
          const bool wanted = good && column + x < old.columns;
          read[x] = wanted ? bytes[at + (column + x) * old.column_stride] : uint8_t{0};
        }
      }
    }
    Pack<T, together> elements;
#pragma unroll
    for (int x = 0; x < together; ++x) {
      A value;
      if (codes == Cache::Codes::int8) {
        value = static_cast<A>(static_cast<int8_t>(read[x]));
      } else if (codes == Cache::Codes::float8) {
        value = static_cast<A>(recsys_ops::cuda::from_e4m3(read[x]));
      } else {
        const bool wanted = good && column + x < old.columns;
        value = wanted ? recsys_ops::cuda::widen(old.data[at + (column + x) * old.column_stride]) : A{0};
      }
      // Past the last column a scale that is not finite must leave zeros.
      recsys_ops::cuda::narrow(column + x < old.columns ? value * scale : A{0}, elements[x]);
    }
    write_word(to, elements);
  }

 private:
  static __device__ void fetch_of(const Rows<T>& rows, T* to, const T* row, int column, bool wanted) {
    if (rows.wide) {
      rows.template fetch_from<true>(to, row, column, wanted);
    } else {
      rows.template fetch_from<false>(to, row, column, wanted);
    }
  }

  const CachePlaces places;
  const Rows<T> old, fresh;
  const int64_t page_stride, page_size;
  const Cache::Codes codes;
  const uint8_t* bytes;  // of codes
  const A* scales;
  const int64_t head, num_heads;
};

}  // namespace recsys_ops::hstu_attention::cuda
