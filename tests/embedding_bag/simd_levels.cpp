// Compares the kernels of one SIMD level with those of the scalar level, over lengths of rows
// around every block size. Built and run by test_simd_levels.py, also for machines other than this.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/common/simd.h"
#include "../../csrc/embedding_bag/bag_pooling.h"
#include "../../csrc/embedding_bag/row_pooling.h"

using namespace recsys_ops;
using namespace recsys_ops::embedding_bag;

namespace {

std::mt19937 generator(7);

template <class T>
T element(double value) {
  T out;
  recsys_ops::scalar::store<1>(&out, recsys_ops::scalar::Vector<Accumulate<T>, 1>{static_cast<Accumulate<T>>(value)});
  return out;
}

template <class T>
double number(const T& value) {
  return recsys_ops::scalar::load<1>(&value)[0];
}

template <class T>
std::vector<T> random_elements(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> out(size);
  for (T& value : out) {
    value = element<T>(normal(generator));
  }
  return out;
}

int failures = 0;

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
  const RowPooling<T>& rows_expected = embedding_bag::scalar::row_pooling(static_cast<const T*>(nullptr));
  const RowPooling<T>& rows_got = embedding_bag::LEVEL::row_pooling(static_cast<const T*>(nullptr));
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
      bags_expected.sum(true, table, bags, weights, expected.data(), 0, 4);
      bags_got.sum(true, table, bags, weights, got.data(), 0, 4);
      compare(name, dim, expected, got, tolerance);
    }
    std::vector<T> expected(4 * dim), got(4 * dim);
    std::vector<int32_t> at_expected(4 * dim), at_got(4 * dim);
    bags_expected.max(table, bags, expected.data(), at_expected.data(), 0, 4);
    bags_got.max(table, bags, got.data(), at_got.data(), 0, 4);
    compare(name, dim, expected, got, 0);
    if (at_expected != at_got) {
      std::printf("%s, dim %ld: positions of the maximum differ\n", name, static_cast<long>(dim));
      ++failures;
    }

    std::vector<const T*> pointers;
    std::vector<const int32_t*> positions_of;
    std::vector<int32_t> positions;
    for (int64_t row = 0; row < 4; ++row) {
      pointers.push_back(weight.data() + row * dim);
      positions_of.push_back(at_expected.data() + row * dim);
      positions.push_back(static_cast<int32_t>(row));
    }
    std::vector<A> carry(dim, A{0.5}), dots_expected(4), dots_got(4);
    std::vector<T> row_expected(dim), row_got(dim);
    rows_expected.sum(pointers.data(), nullptr, 4, dim, carry.data(), nullptr, A{2}, row_expected.data());
    rows_got.sum(pointers.data(), nullptr, 4, dim, carry.data(), nullptr, A{2}, row_got.data());
    compare(name, dim, row_expected, row_got, tolerance);
    rows_expected.sum_where(pointers.data(), positions_of.data(), positions.data(), 4, dim, nullptr, nullptr, A{1},
                            row_expected.data());
    rows_got.sum_where(pointers.data(), positions_of.data(), positions.data(), 4, dim, nullptr, nullptr, A{1},
                       row_got.data());
    compare(name, dim, row_expected, row_got, tolerance);
    rows_expected.dot(pointers.data(), 4, dim, weight.data(), A{1}, dots_expected.data());
    rows_got.dot(pointers.data(), 4, dim, weight.data(), A{1}, dots_got.data());
    for (int i = 0; i < 4; ++i) {
      if (!(std::abs(dots_expected[i] - dots_got[i]) <= 1e-4 * (1 + dim))) {
        std::printf("%s, dim %ld: dot product %d differs\n", name, static_cast<long>(dim), i);
        ++failures;
      }
    }
  }
}

// Every half, and floats at and between them, through both conversions.
void check_halves() {
  const RowPooling<Half>& expected = embedding_bag::scalar::row_pooling(static_cast<const Half*>(nullptr));
  const RowPooling<Half>& got = embedding_bag::LEVEL::row_pooling(static_cast<const Half*>(nullptr));
  const int64_t size = 0x10000;
  std::vector<Half> halves(size), narrow_expected(size), narrow_got(size);
  std::vector<float> floats(size), floats_got(size);
  for (int64_t i = 0; i < size; ++i) {
    halves[i].bits = static_cast<uint16_t>(i);
  }
  const Half* row = halves.data();
  expected.sum(&row, nullptr, 1, size, nullptr, floats.data(), 1, nullptr);
  got.sum(&row, nullptr, 1, size, nullptr, floats_got.data(), 1, nullptr);
  for (int64_t i = 0; i < size; ++i) {
    if (!(floats[i] == floats_got[i]) && !(floats[i] != floats[i] && floats_got[i] != floats_got[i])) {
      std::printf("half %04lx: expected %g, got %g\n", static_cast<long>(i), floats[i], floats_got[i]);
      ++failures;
    }
  }
  for (const float nudge : {1.0f, 1.0f + 0x1p-11f, 1.0f + 0x1p-11f + 0x1p-20f, 1.0f - 0x1p-12f}) {
    std::vector<float> nudged(floats);
    for (float& value : nudged) {
      value *= nudge;
    }
    expected.sum(nullptr, nullptr, 0, size, nudged.data(), nullptr, 1, narrow_expected.data());
    got.sum(nullptr, nullptr, 0, size, nudged.data(), nullptr, 1, narrow_got.data());
    for (int64_t i = 0; i < size; ++i) {
      if (nudged[i] == nudged[i] && narrow_expected[i].bits != narrow_got[i].bits) {
        std::printf("float %a: expected half %04x, got %04x\n", static_cast<double>(nudged[i]),
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
