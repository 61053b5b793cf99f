// What the tensor cores of sm_90a do for a warpgroup, from its registers and from tiles in shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "matrix_on_cpu.h"

namespace cuda_host {

// An operand as its descriptor tells.
struct Described {
  unsigned start, leading, stride;
  bool transposed;

  explicit Described(uint64_t bits, bool transposed = false)
      : start(static_cast<unsigned>(bits & 0x3fff) << 4),
        leading(static_cast<unsigned>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<unsigned>(bits >> 32 & 0x3fff) << 4),
        transposed(transposed) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) {
      fail("wgmma of an operand that is not swizzled by 128 bytes from an aligned address");
    }
  }

  // Of element k of row or column i.
  unsigned offset(unsigned i, unsigned k) const {
    const unsigned linear = transposed ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                       : start + i / 8 * stride + i % 8 * 128 + k * 2;
    return swizzled(linear);
  }

  template <class T>
  __attribute__((no_sanitize("thread", "address", "undefined"))) float element(unsigned i, unsigned k) const {
    return recsys_ops::scalar::load<1>(reinterpret_cast<const T*>(static_cast<char*>(dynamic_shared()) + offset(i, k)))[0];
  }

  // The part that the thread which runs stands for of what a warpgroup reads of `count` rows or columns.
  void read(unsigned count) const {
    const unsigned words = transposed ? count / 8 * 16 : count * 2;
    for (unsigned word = thread_number() % 128; word < words; word += 128) {
      const unsigned at = transposed ? offset(word / 16 * 8, word % 16) : offset(word / 2, word % 2 * 8);
      const char* address = static_cast<char*>(dynamic_shared()) + at;
      if (at + 16 > dynamic_shared_bytes()) {
        fail("wgmma of an operand past the end of shared memory");
      }
      observer().product_reads(address, 16);
      const volatile uint64_t* halves = reinterpret_cast<const volatile uint64_t*>(address);
      static_cast<void>(halves[0]), static_cast<void>(halves[1]);
    }
  }
};

template <class T, int N>
__attribute__((no_sanitize("thread", "address", "undefined"))) void add_products(
    const Product& product, const Described& b) {
  const unsigned t = lane() % 4;
  for (unsigned n = 0; n < N / 8; ++n) {
    for (unsigned c = 0; c < 4; ++c) {
      float sum = 0;
      for (unsigned k = 0; k < 16; ++k) {
        sum += product.left[c / 2][k] * b.element<T>(n * 8 + t * 2 + c % 2, k);
      }
      product.sums[n][c] = product.add ? product.sums[n][c] + sum : sum;
    }
  }
}

template <class T, int N>
void multiply_rows_of_tiles(float (&sums)[N / 8][4], uint64_t a, uint64_t b, int add) {
  exchange({"wgmma", __FILE__, __LINE__}, 0xffffffffu, 0);
  const auto make = [](Product product) {
    const Described of_a(product.a), of_b(product.b);
    of_a.read(64);
    of_b.read(N);
    const unsigned row = thread_number() % 128 / 32 * 16 + lane() / 4;
    for (unsigned i = 0; i < 2; ++i) {
      for (unsigned k = 0; k < 16; ++k) {
        product.left[i][k] = of_a.element<T>(row + 8 * i, k);
      }
    }
    add_products<T, N>(product, of_b);
  };
  multiply_later({make, sums, a, b, {}, add != 0});
}

template <class T, int N>
void multiply_columns_of_tiles(float (&sums)[N / 8][4], const unsigned (&a)[4], uint64_t b) {
  const auto make = [](Product product) {
    const Described of_b(product.b, true);
    of_b.read(N);
    add_products<T, N>(product, of_b);
  };
  Product product = {make, sums, 0, b, {}, true};
  for (unsigned i = 0; i < 4; ++i) {
    const Exchange got = exchange({"wgmma", __FILE__, __LINE__}, 0xffffffffu, a[i]);
    for (unsigned x = 0; x < 8; ++x) {
      const uint64_t pair = got.values[lane() / 4 * 4 + x / 2];
      product.left[i % 2][i / 2 * 8 + x] = element<T>(static_cast<unsigned>(pair), x % 2);
    }
  }
  multiply_later(product);
}

}  // namespace cuda_host
