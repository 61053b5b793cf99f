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
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

constexpr int widest_word = 16;

// The word at an address that no one writes to during the kernel, or zeros. The load itself has the
// condition: behind a branch, it would be waited for at once.
#if defined(__CUDACC__)
__device__ inline void load_word(uint4& word, const uint4* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0; "
      "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(word.x), "=&r"(word.y), "=&r"(word.z), "=&r"(word.w)
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_word(uint2& word, const uint2* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0; "
      "@p ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
      : "=&r"(word.x), "=&r"(word.y)
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_word(unsigned int& word, const unsigned int* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1]; }"
      : "=&r"(word)
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_word(unsigned short& word, const unsigned short* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.b16 %0, [%1]; }"
      : "=&h"(word)
      : "l"(from), "r"(static_cast<int>(wanted)));
}
__device__ inline void load_word(unsigned char& word, const unsigned char* from, bool wanted) {
  unsigned short wide;
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.u8 %0, [%1]; }"
      : "=&h"(wide)
      : "l"(from), "r"(static_cast<int>(wanted)));
  word = static_cast<unsigned char>(wide);
}
#else
template <class W>
void load_word(W& word, const W* from, bool wanted) {
  word = wanted ? *from : W{};
}
#endif

// N elements as they come from memory. Unpacked only where they are used, so that elements of 16 bits
// on their way take half a register each.
template <class T, int N>
struct Raw {
  static constexpr int bytes = N * sizeof(T) < widest_word ? N * sizeof(T) : widest_word;
  static constexpr int count = N * sizeof(T) / bytes;
  using Word = typename WordOf<bytes>::type;

  Word words[count];

  __device__ Pack<T, N> unpacked() const {
    Pack<T, N> pack;
    memcpy(&pack, words, sizeof(pack));
    return pack;
  }
};

// From base + offset, which is aligned to all N elements or to 16 bytes, and may lie anywhere where it
// is not wanted: so the address is reckoned as a number.
template <int N, class T>
__device__ Raw<T, N> load(const T* base, int64_t offset, bool wanted) {
  using Word = typename Raw<T, N>::Word;
  const auto from = reinterpret_cast<uintptr_t>(base) + static_cast<uint64_t>(offset) * sizeof(T);
  Raw<T, N> raw;
#pragma unroll
  for (int w = 0; w < raw.count; ++w) {
    load_word(raw.words[w], reinterpret_cast<const Word*>(from + w * sizeof(Word)), wanted);
  }
  return raw;
}

template <int N, class T>
__device__ void store(T* to, const Pack<T, N>& pack) {
  using Word = typename Raw<T, N>::Word;
  Raw<T, N> raw;
  memcpy(raw.words, &pack, sizeof(pack));
#pragma unroll
  for (int w = 0; w < raw.count; ++w) {
    // As one instruction: an assignment is taken apart into elements.
    __stwb(reinterpret_cast<Word*>(to) + w, raw.words[w]);
  }
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

template <class T, int N>
__device__ Pack<Accumulate<T>, N> widened(const Pack<T, N>& pack) {
  Pack<Accumulate<T>, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    result[i] = widen(pack[i]);
  }
  return result;
}

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
