// Neighbouring elements of a row, moved by one lane in words as wide as their alignment allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../dtype.h"

namespace recsys_ops::cuda {

template <class T, int N>
struct Pack {
  T values[N];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int BYTES>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

constexpr int widest_word = 16;

// N elements as they come from memory. Unpacked only where they are used, so that elements of 16 bits
// on their way take half a register each.
template <class T, int N>
struct Raw {
  static constexpr int bytes = N * sizeof(T) < widest_word ? N * sizeof(T) : widest_word;
  static constexpr int count = N * sizeof(T) / bytes;
  using W = typename Word<bytes>::type;

  W words[count];

  __device__ Pack<T, N> unpacked() const {
    Pack<T, N> pack;
    memcpy(&pack, words, sizeof(pack));
    return pack;
  }
};

// From memory that no one writes during the kernel; aligned to all N elements, or to 16 bytes.
template <int N, class T>
__device__ Raw<T, N> load(const T* from) {
  using W = typename Raw<T, N>::W;
  Raw<T, N> raw;
#pragma unroll
  for (int w = 0; w < raw.count; ++w) {
    raw.words[w] = __ldg(reinterpret_cast<const W*>(from) + w);
  }
  return raw;
}

template <int N, class T>
__device__ void store(T* to, const Pack<T, N>& pack) {
  using W = typename Raw<T, N>::W;
  Raw<T, N> raw;
  memcpy(raw.words, &pack, sizeof(pack));
#pragma unroll
  for (int w = 0; w < raw.count; ++w) {
    reinterpret_cast<W*>(to)[w] = raw.words[w];
  }
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

// Rounded to nearest, ties to even.
__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(double value, double& to) { to = value; }
__device__ inline void narrow(float value, Half& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void narrow(float value, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

template <class T, int N>
__device__ Pack<T, N> narrowed(const Pack<Accumulate<T>, N>& pack) {
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    narrow(pack[i], result[i]);
  }
  return result;
}

}  // namespace recsys_ops::cuda
