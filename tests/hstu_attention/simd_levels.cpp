// Compares the kernels of one SIMD level with those of the scalar level, over dimensions and lengths
// around every vector and block. Built and run by ../test_simd_levels.py, also for machines other than this.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/hstu_attention/attention_tasks.h"
#include "../simd_levels.h"

using namespace recsys_ops;
using namespace recsys_ops::hstu_attention;

namespace {

template <class T>
void compare(const std::string& what, const std::vector<T>& expected, const std::vector<T>& got, double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!(std::abs(number(expected[i]) - number(got[i])) <= tolerance)) {
      std::printf("%s: element %zu: expected %g, got %g\n", what.c_str(), i, number(expected[i]), number(got[i]));
      ++failures;
      return;
    }
  }
}

// One sequence, in all that a mask and a bias can do, or in none of it.
template <class T, class A>
void check(const char* name, DType dtype, double tolerance, int64_t dim, int64_t length, bool is_plain) {
  constexpr int64_t heads = 2, distances = 31, buckets = 6, num_intervals = 2;
  const int64_t value_dim = dim + 3, size = length * heads;
  const auto q = random_elements<T>(size * dim), k = random_elements<T>(size * dim);
  const auto v = random_elements<T>(size * value_dim), grad_output = random_elements<T>(size * value_dim);
  const auto positions = random_elements<A>(distances), times = random_elements<A>(heads * buckets);
  const auto scales = random_elements<A>(length);
  std::vector<int64_t> timestamps(length), boundaries = {2, 5, 11, 40, 100}, intervals;
  for (int64_t i = 0; i < length; ++i) {
    timestamps[i] = (i ? timestamps[i - 1] : 0) + static_cast<int64_t>(generator() % 9);
    intervals.insert(intervals.end(), {0, length / 2, i - 4, length});
  }
  const int64_t seed = 12345;
  const auto rows_of = [&](const std::vector<T>& data, int64_t columns) {
    return Tensor3{data.data(), heads * columns, columns, 1};
  };
  Attention attention = {};
  attention.dtype = dtype;
  attention.heads = heads;
  attention.dim = dim;
  attention.value_dim = value_dim;
  attention.q = rows_of(q, dim);
  attention.k = rows_of(k, dim);
  attention.v = rows_of(v, value_dim);
  attention.causal = attention.next_timestamps = true;
  attention.target_group_size = 1;
  attention.scale = 0.25;
  attention.alpha = 1 / std::sqrt(static_cast<double>(dim));
  Sequence sequence = {0, 0, length, 0, length, 0, 0};
  if (!is_plain) {
    sequence.contextual = std::min<int64_t>(2, length);
    sequence.targets = std::min<int64_t>(5, length - sequence.contextual);
    attention.causal = false;
    attention.window = 20;
    attention.target_group_size = 2;
    attention.intervals = {intervals.data(), true, static_cast<int64_t>(intervals.size())};
    attention.num_intervals = num_intervals;
    attention.position = {positions.data(), 1, distances};
    attention.time = {times.data(), heads, buckets};
    attention.timestamps = timestamps.data();
    attention.boundaries = boundaries.data();
    attention.row_scale = scales.data();
    attention.dropout = 0.3;
    attention.dropout_seed = &seed;
  }

  const int64_t reach = std::min<int64_t>(distances / 2, length - 1), num_distances = 2 * reach + 1;
  struct Results {
    std::vector<T> output, grad_q, grad_k, grad_v;
    std::vector<A> position, time;
  };
  const auto run = [&](const AttentionTasks<A>& kernels) {
    Results results = {
        std::vector<T>(size * value_dim), std::vector<T>(size * dim), std::vector<T>(size * dim),
        std::vector<T>(size * value_dim), std::vector<A>(num_distances), std::vector<A>(heads * buckets)};
    Scratch scratch;
    const Task task = {&sequence, 0, heads, 0, length, 0};
    kernels.forward(attention, task, results.output.data(), scratch);
    const Gradients gradients = {
        rows_of(grad_output, value_dim), rows_of(results.grad_q, dim), rows_of(results.grad_k, dim),
        rows_of(results.grad_v, value_dim), {}, {}};
    const Parts parts = {
        nullptr, results.position.data(), distances / 2 - reach, num_distances, results.time.data()};
    kernels.backward(attention, gradients, task, parts, scratch);
    return results;
  };
  const Results expected = run(hstu_attention::scalar::attention_tasks(static_cast<const A*>(nullptr)));
  const Results got = run(hstu_attention::LEVEL::attention_tasks(static_cast<const A*>(nullptr)));
  const std::string what = std::string(name) + (is_plain ? ", plain" : ", all of it") + ", dim " +
                           std::to_string(dim) + ", length " + std::to_string(length) + ", ";
  compare(what + "output", expected.output, got.output, tolerance);
  compare(what + "gradient of q", expected.grad_q, got.grad_q, tolerance);
  compare(what + "gradient of k", expected.grad_k, got.grad_k, tolerance);
  compare(what + "gradient of v", expected.grad_v, got.grad_v, tolerance);
  if (!is_plain) {
    compare(what + "gradient of positions", expected.position, got.position, tolerance * 10);
    compare(what + "gradient of times", expected.time, got.time, tolerance * 10);
  }
}

}  // namespace

int main() {
  for (const bool is_plain : {true, false}) {
    for (const int64_t length : {1, 7, 33, 130}) {
      for (const int64_t dim : {1, 4, 15, 16, 17, 40}) {
        check<float, float>("float32", DType::float32, 2e-4, dim, length, is_plain);
        check<double, double>("float64", DType::float64, 1e-11, dim, length, is_plain);
      }
      check<Half, float>("float16", DType::float16, 5e-2, 25, length, is_plain);
      check<BFloat16, float>("bfloat16", DType::bfloat16, 4e-1, 25, length, is_plain);
    }
  }
  return failures == 0 ? 0 : 1;
}
