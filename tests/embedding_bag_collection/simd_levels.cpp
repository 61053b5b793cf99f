// Compares the kernels of one SIMD level with those of the scalar level, over lengths of rows
// around every block size. Built and run by ../test_simd_levels.py, also for machines other than this.
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "../../csrc/embedding_bag_collection/quantized_pooling.h"
#include "../../csrc/embedding_bag_collection/row_update.h"
#include "../simd_levels.h"

using namespace recsys_ops;
using namespace recsys_ops::embedding_bag_collection;

namespace {

template <class T>
void compare(const char* what, int64_t dim, const std::vector<T>& expected, const std::vector<T>& got, double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = number(expected[i]), b = number(got[i]);
    if (!(std::abs(a - b) <= tolerance * std::max(1.0, std::abs(a)) || (a != a && b != b))) {
      std::printf("%s, dim %ld: element %zu: expected %g, got %g\n", what, static_cast<long>(dim), i, a, b);
      ++failures;
      return;
    }
  }
}

template <class T, class S>
void check_updates(const char* name, DType state_dtype, double tolerance) {
  using A = Accumulate<T>;
  const RowUpdate<T>& expected = embedding_bag_collection::scalar::row_update(static_cast<const T*>(nullptr));
  const RowUpdate<T>& got = embedding_bag_collection::LEVEL::row_update(static_cast<const T*>(nullptr));
  const double none = std::numeric_limits<double>::infinity();
  for (int64_t dim = 1; dim < 150; dim += dim < 40 ? 1 : 13) {
    for (int optimizer = 0; optimizer < 6; ++optimizer) {
      for (const bool stochastic : {false, true}) {
        const Step step = {static_cast<Optimizer>(optimizer), 0.1, 1e-3, 0.9, 0.95, stochastic ? 0.1 : 0.0, 0.2,
                           stochastic ? 0.5 : none, dim % 2 ? 1.0 : none, 0.3, 0.2, stochastic, 7, 3};
        const int64_t rows = 3;
        const auto weight = random_elements<T>(rows * dim);
        const auto first = random_elements<S>(rows * dim, 0.1), second = random_elements<S>(rows * dim, 0.1);
        const auto gradient = random_elements<A>(dim);
        std::vector<T> weights[2] = {weight, weight};
        std::vector<S> states[2][2] = {{first, second}, {first, second}};
        for (int side = 0; side < 2; ++side) {
          std::vector<A> sum = gradient;
          const TrainedTable table = {weights[side].data(), dim, dim, 1, 2, state_dtype,
                                      {states[side][0].data(), states[side][1].data()}};
          (side == 0 ? expected : got).update(step, table, 1, sum.data());
        }
        compare(name, dim, weights[0], weights[1], tolerance);
        compare(name, dim, states[0][0], states[1][0], tolerance);
        compare(name, dim, states[0][1], states[1][1], tolerance);
      }
    }
    std::vector<T> written[2] = {std::vector<T>(dim), std::vector<T>(dim)};
    const auto gradient = random_elements<A>(dim);
    expected.write(dim, gradient.data(), written[0].data());
    got.write(dim, gradient.data(), written[1].data());
    compare(name, dim, written[0], written[1], 0);
  }
}

template <class T>
void check_codes(const char* name) {
  const QuantizedPooling<T>& expected = embedding_bag_collection::scalar::quantized_pooling(static_cast<const T*>(nullptr));
  const QuantizedPooling<T>& got = embedding_bag_collection::LEVEL::quantized_pooling(static_cast<const T*>(nullptr));
  for (int64_t dim = 2; dim < 300; dim += dim < 70 ? 2 : 26) {
    const int64_t rows = 50, entries = 60, width = std::is_same_v<T, Code4> ? dim / 2 : dim;
    std::vector<T> codes(rows * width);
    for (T& code : codes) {
      code.bits = static_cast<uint8_t>(generator());
    }
    const auto scales = random_elements<float>(2 * rows), factors = random_elements<float>(entries);
    std::vector<int32_t> indices(entries);
    for (int32_t& index : indices) {
      index = static_cast<int32_t>(generator() % rows);
    }
    const std::vector<int64_t> offsets = {0, 0, 1, 9, 60};
    const Table table = {DType::float32, codes.data(), rows, dim, width, 1, scales.data()};
    const Bags bags = {{indices.data(), false, entries}, {offsets.data(), true, 5}, 4, rows, -1, false};
    std::vector<float> results[2] = {std::vector<float>(4 * dim), std::vector<float>(4 * dim)};
    for (int side = 0; side < 2; ++side) {
      const Rows out = {DType::float32, results[side].data(), dim};
      (side == 0 ? expected : got).sum(true, table, bags, {DType::float32, factors.data()}, out, 0, 4);
    }
    compare(name, dim, results[0], results[1], 1e-3);
    for (int side = 0; side < 2; ++side) {
      const Rows out = {DType::float32, results[side].data(), dim};
      (side == 0 ? expected : got).max(table, bags, out, nullptr, 0, 4);
    }
    compare(name, dim, results[0], results[1], 1e-5);
  }
}

}  // namespace

int main() {
  check_updates<float, float>("float32", DType::float32, 1e-4);
  check_updates<float, BFloat16>("float32 with bfloat16 states", DType::bfloat16, 2e-2);
  check_updates<double, double>("float64", DType::float64, 1e-12);
  check_updates<Half, float>("float16", DType::float32, 2e-3);
  check_updates<BFloat16, Half>("bfloat16 with float16 states", DType::float16, 2e-2);
  check_codes<Code8>("int8");
  check_codes<Code4>("int4");
  check_codes<Float8>("fp8");
  return failures == 0 ? 0 : 1;
}
