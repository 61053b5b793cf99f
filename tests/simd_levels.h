// What the programs have in common that compare kernels of one SIMD level with scalar ones.
#pragma once

#include <algorithm>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/common/simd.h"

namespace recsys_ops {

inline std::mt19937 generator(7);
inline int failures = 0;

template <class T>
T element(double value) {
  T out;
  scalar::store<1>(&out, scalar::Vector<Accumulate<T>, 1>{static_cast<Accumulate<T>>(value)});
  return out;
}

template <class T>
double number(const T& value) {
  return scalar::load<1>(&value)[0];
}

template <class T>
std::vector<T> random_elements(int64_t size, double least = -std::numeric_limits<double>::infinity()) {
  std::normal_distribution<double> normal;
  std::vector<T> out(size);
  for (T& value : out) {
    value = element<T>(std::max(least, normal(generator)));
  }
  return out;
}

}  // namespace recsys_ops
