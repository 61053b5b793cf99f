// What the tensor cores do, from the fragments that the lanes of a warp hold.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../../csrc/common/simd.h"

namespace cuda_host {

template <class T>
float element(unsigned pair, int which) {
  T value;
  value.bits = static_cast<unsigned short>(pair >> (16 * which));
  return recsys_ops::scalar::load<1>(&value)[0];
}

template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  constexpr unsigned whole_warp = 0xffffffffu;
  const Site site = {"mma.sync", __FILE__, __LINE__};
  const auto both = [](unsigned low, unsigned high) { return static_cast<uint64_t>(high) << 32 | low; };
  const Exchange left = exchange(site, whole_warp, both(a[0], a[1]));
  const Exchange right = exchange(site, whole_warp, both(a[2], a[3]));
  const Exchange of_b = exchange(site, whole_warp, both(b[0], b[1]));
  if (left.present != whole_warp) {
    fail("mma.sync by a warp that is not whole");
  }
  for (int i = 0; i < 4; ++i) {
    const int row = static_cast<int>(lane()) / 4 + i / 2 * 8, column = static_cast<int>(lane()) % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint64_t pairs = (k < 8 ? left : right).values[row % 8 * 4 + k % 8 / 2];
      const uint64_t of_column = of_b.values[column * 4 + k % 8 / 2];
      sum += element<T>(static_cast<unsigned>(row < 8 ? pairs : pairs >> 32), k % 2) *
             element<T>(static_cast<unsigned>(k < 8 ? of_column : of_column >> 32), k % 2);
    }
    c[i] += sum;
  }
}

// As ldmatrix: each lane reads what it gets of the rows that all lanes name.
inline void load_matrices(unsigned (&fragments)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix of a row that is not aligned to 16 bytes");
  }
  const Exchange rows = exchange({"ldmatrix", __FILE__, __LINE__}, 0xffffffffu, reinterpret_cast<uintptr_t>(row));
  if (rows.present != 0xffffffffu) {
    fail("ldmatrix by a warp that is not whole");
  }
  const int g = static_cast<int>(lane()) / 4, t = static_cast<int>(lane()) % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[2];
    for (int i = 0; i < 2; ++i) {
      const int from = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      elements[i] = reinterpret_cast<const uint16_t*>(rows.values[matrix * 8 + from])[column];
    }
    std::memcpy(&fragments[matrix], elements, sizeof(elements));
  }
}

}  // namespace cuda_host
