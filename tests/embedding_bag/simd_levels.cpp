// Compares the kernels of one SIMD level with those of the scalar level, over lengths of rows
// around every block size. Built and run by ../test_simd_levels.py, also for machines other than this.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/embedding_bag/bag_pooling.h"
#include "../../csrc/embedding_bag/gradient_pooling.h"
#include "../simd_levels.h"

using namespace recsys_ops;
using namespace recsys_ops::embedding_bag;

namespace {

template <class T>
void compare(const char* what, int64_t dim, const std::vector<T>& expected, const std::vector<T>& got, double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(number(expected[i]) - number(got[i])) <= tolerance)) {
      std::printf("%s, dim %ld: element %zu: expected %g, got %g\n", what, static_cast<long>(dim), i,
                  number(expected[i]), number(got[i]));
      ++failures;
      return;
    }
  }
}

template <class T>
void check(const char* name, DType dtype, double tolerance) {
  const BagPooling<T>& bags_expected = embedding_bag::scalar::bag_pooling(static_cast<const T*>(nullptr));
  const BagPooling<T>& bags_got = embedding_bag::LEVEL::bag_pooling(static_cast<const T*>(nullptr));
  const GradientPooling<T>& gradients_expected = embedding_bag::scalar::gradient_pooling(static_cast<const T*>(nullptr));
  const GradientPooling<T>& gradients_got = embedding_bag::LEVEL::gradient_pooling(static_cast<const T*>(nullptr));
  using A = Accumulate<T>;
  for (int64_t dim = 1; dim < 300; dim += dim < 70 ? 1 : 13) {
    const int64_t rows = 50, entries = 60;
    const std::vector<int64_t> offsets = {0, 0, 1, 9, 60};
    const auto weight = random_elements<T>(rows * dim);
    const auto factors = random_elements<T>(entries);
    std::vector<int32_t> indices(entries);
    for (int32_t& index : indices) {
      index = static_cast<int32_t>(generator() % rows);
    }
    const Table table = {dtype, weight.data(), rows, dim, dim, 1};
    const Bags bags = {{indices.data(), false, entries}, {offsets.data(), true, 5}, 4, rows, 3, false};
    for (const T* weights : {static_cast<const T*>(nullptr), factors.data()}) {
      std::vector<T> expected(4 * dim), got(4 * dim);
      bags_expected.sum(true, table, bags, {dtype, weights}, {dtype, expected.data(), dim}, 0, 4);
      bags_got.sum(true, table, bags, {dtype, weights}, {dtype, got.data(), dim}, 0, 4);
      compare(name, dim, expected, got, tolerance);
    }
    std::vector<T> expected(4 * dim), got(4 * dim);
    std::vector<int32_t> at_expected(4 * dim), at_got(4 * dim);
    bags_expected.max(table, bags, {dtype, expected.data(), dim}, at_expected.data(), 0, 4);
    bags_got.max(table, bags, {dtype, got.data(), dim}, at_got.data(), 0, 4);
    compare(name, dim, expected, got, 0);
    if (at_expected != at_got) {
      std::printf("%s, dim %ld: positions of the maximum differ\n", name, static_cast<long>(dim));
      ++failures;
    }

    std::vector<T> dots_expected(entries), dots_got(entries);
    const Rows with = {dtype, const_cast<T*>(weight.data()), dim};
    bags_expected.dot(true, table, bags, with, {dtype, dots_expected.data(), 1}, 0, 4);
    bags_got.dot(true, table, bags, with, {dtype, dots_got.data(), 1}, 0, 4);
    compare(name, dim, dots_expected, dots_got, tolerance * (1 + dim));

    // Two rows: entries 0, 9 and 59 of one, 30 of the other.
    std::vector<uint32_t> bag_of(entries);
    for (int64_t bag = 0; bag < 4; ++bag) {
      std::fill(bag_of.begin() + offsets[bag], bag_of.begin() + offsets[bag + 1], static_cast<uint32_t>(bag));
    }
    const std::vector<uint64_t> keys = {2 << 8 | 0, 2 << 8 | 9, 2 << 8 | 59, 7 << 8 | 30};
    const std::vector<int64_t> runs = {0, 3, 4};
    const std::vector<double> bag_scale = {1, 1, 0.125, 0.25};
    SortedEntries sorted = {};
    sorted.keys = keys.data();
    sorted.source_bits = 8;
    sorted.bag_of = bag_of.data();
    sorted.bag_scale = bag_scale.data();
    sorted.offsets = bags.offsets;
    sorted.runs = runs.data();
    sorted.cell_stride = dim;
    std::vector<A> of_entries;
    for (const T& factor : factors) {
      of_entries.push_back(static_cast<A>(number(factor)));
    }
    const auto output = random_elements<T>(4 * dim);
    for (const int32_t* argmax : {static_cast<const int32_t*>(nullptr), static_cast<const int32_t*>(at_expected.data())}) {
      const Gradient gradient = {dtype, output.data(), dim, nullptr, argmax, !argmax, true};
      sorted.factors = argmax ? nullptr : of_entries.data();
      std::vector<T> values_expected(2 * dim), values_got(2 * dim);
      std::vector<int64_t> rows_of(2);
      gradients_expected.write(gradient, sorted, 0, 2, rows_of.data(), values_expected.data());
      gradients_got.write(gradient, sorted, 0, 2, rows_of.data(), values_got.data());
      compare(name, dim, values_expected, values_got, tolerance);
      if (rows_of != std::vector<int64_t>{2, 7}) {
        std::printf("%s, dim %ld: wrong rows\n", name, static_cast<long>(dim));
        ++failures;
      }
      std::vector<A> sums_expected(2 * dim), sums_got(2 * dim);
      gradients_expected.sum_runs(gradient, sorted, 0, 2, 4, sums_expected.data());
      gradients_got.sum_runs(gradient, sorted, 0, 2, 4, sums_got.data());
      for (int64_t i = 0; i < 2 * dim; ++i) {
        if (!(std::abs(sums_expected[i] - sums_got[i]) <= tolerance)) {
          std::printf("%s, dim %ld: sum of run %ld differs\n", name, static_cast<long>(dim), static_cast<long>(i / dim));
          ++failures;
          break;
        }
      }
      std::vector<A> sum_expected(dim), sum_got(dim);
      gradients_expected.sum(gradient, sorted, 0, 4, sum_expected.data());
      gradients_got.sum(gradient, sorted, 0, 4, sum_got.data());
      for (int64_t d = 0; d < dim; ++d) {
        if (!(std::abs(sum_expected[d] - sum_got[d]) <= tolerance)) {
          std::printf("%s, dim %ld: sum of element %ld differs\n", name, static_cast<long>(dim), static_cast<long>(d));
          ++failures;
        }
      }
    }
  }
}

// Every half, and floats at and between them, through both conversions.
void check_halves() {
  const GradientPooling<Half>& expected = embedding_bag::scalar::gradient_pooling(static_cast<const Half*>(nullptr));
  const GradientPooling<Half>& got = embedding_bag::LEVEL::gradient_pooling(static_cast<const Half*>(nullptr));
  const int64_t size = 0x10000;
  std::vector<Half> halves(size), narrow_expected(size), narrow_got(size);
  std::vector<float> floats(size), floats_got(size);
  for (int64_t i = 0; i < size; ++i) {
    halves[i].bits = static_cast<uint16_t>(i);
  }
  // The gradient of one row from one bag, as it is and times a factor.
  const uint64_t key = 0;
  const int64_t runs[2] = {0, 1};
  double factor = 1;
  int64_t row;
  SortedEntries entry = {};
  entry.keys = &key;
  entry.source_bits = 1;
  entry.bag_scale = &factor;
  entry.runs = runs;
  const Gradient gradient = {DType::float16, halves.data(), size, nullptr, nullptr, true, false};
  expected.sum(gradient, entry, 0, 1, floats.data());
  got.sum(gradient, entry, 0, 1, floats_got.data());
  for (int64_t i = 0; i < size; ++i) {
    if (!(floats[i] == floats_got[i]) && !(floats[i] != floats[i] && floats_got[i] != floats_got[i])) {
      std::printf("half %04lx: expected %g, got %g\n", static_cast<long>(i), floats[i], floats_got[i]);
      ++failures;
    }
  }
  for (const float nudge : {1.0f, 1.0f + 0x1p-11f, 1.0f + 0x1p-11f + 0x1p-20f, 1.0f - 0x1p-12f}) {
    factor = nudge;
    expected.write(gradient, entry, 0, 1, &row, narrow_expected.data());
    got.write(gradient, entry, 0, 1, &row, narrow_got.data());
    for (int64_t i = 0; i < size; ++i) {
      if (floats[i] == floats[i] && narrow_expected[i].bits != narrow_got[i].bits) {
        std::printf("float %a: expected half %04x, got %04x\n", static_cast<double>(floats[i] * nudge),
                    narrow_expected[i].bits, narrow_got[i].bits);
        ++failures;
      }
    }
  }
}

}  // namespace

int main() {
  check<float>("float32", DType::float32, 1e-5);
  check<double>("float64", DType::float64, 1e-13);
  check<Half>("float16", DType::float16, 2e-2);
  check<BFloat16>("bfloat16", DType::bfloat16, 2e-1);
  check_halves();
  return failures == 0 ? 0 : 1;
}
