// Compiled once per SIMD level, with RECSYS_OPS_SIMD_LEVEL naming it.
#include "row_update.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "../common/simd_blocks.h"

namespace recsys_ops::embedding_bag_collection::RECSYS_OPS_SIMD_LEVEL {
namespace {

using namespace recsys_ops::RECSYS_OPS_SIMD_LEVEL;

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// Calls f(lanes, column) for parts of a row that do not overlap, as in-place work wants them.
template <int LANES, class F>
RECSYS_OPS_INLINE void for_each_part(int64_t dim, const F& f, int64_t column = 0) {
  for (; dim - column >= LANES; column += LANES) {
    f(std::integral_constant<int, LANES>{}, column);
  }
  if constexpr (LANES > 1) {
    for_each_part<LANES / 2>(dim, f, column);
  }
}

// A sum over the parts of a row.
template <class A, int LANES>
struct Sum {
  Vector<A, LANES> full{};
  A rest = 0;

  template <int N>
  RECSYS_OPS_INLINE void add(Vector<A, N> terms) {
    if constexpr (N == LANES) {
      full += terms;
    } else {
      rest += sum_of<N, A>(terms);
    }
  }

  RECSYS_OPS_INLINE A total() const { return sum_of<LANES, A>(full) + rest; }
};

// The finaliser of MurmurHash3.
template <class U>
RECSYS_OPS_INLINE U mix(U x) {
  x ^= x >> 16;
  x *= 0x85ebca6b;
  x ^= x >> 13;
  x *= 0xc2b2ae35;
  return x ^ x >> 16;
}

// Rounds to the halves up or down at random, so that the mean is what was rounded.
struct Rounding {
  bool on = false;
  uint32_t key = 0;

  Rounding(const Step& step, uint32_t tensor, int64_t row) : on(step.stochastic_rounding) {
    if (on) {
      const auto number = static_cast<uint64_t>(row);
      for (uint32_t word : {step.seed, step.count, tensor, static_cast<uint32_t>(number >> 32),
                            static_cast<uint32_t>(number)}) {
        key = mix(key + word);
      }
    }
  }

  template <class T, int LANES, class A>
  RECSYS_OPS_INLINE Vector<A, LANES> apply(Vector<A, LANES> x, int64_t column) const {
    if constexpr (is_half<T>) {
      if (on) {
        using Bits = Vector<uint32_t, LANES>;
        Bits columns;
        for (int lane = 0; lane < LANES; ++lane) {
          columns[lane] = static_cast<uint32_t>(column + lane);
        }
        constexpr bool is_bfloat16 = std::is_same_v<T, BFloat16>;
        const Bits random = mix(columns * 0x9e3779b9 + key) >> 20;
        const auto noise = (__builtin_convertvector(random, Vector<float, LANES>) - 2047.5f) * 0x1p-12f;
        const Bits exponent = bit_cast<Bits>(x) & 0x7f800000;
        const Vector<float, LANES> unit = bit_cast<Vector<float, LANES>>(exponent) * (is_bfloat16 ? 0x1p-7f : 0x1p-10f);
        const Vector<float, LANES> least = Vector<float, LANES>{} + (is_bfloat16 ? 0x1p-133f : 0x1p-24f);
        const Vector<float, LANES> step = unit > least ? unit : least;
        constexpr float integers = 0x1.8p23f;  // from here on floats are integers
        const Vector<float, LANES> rounded = ((x / step + noise) + integers - integers) * step;
        return exponent == 0x7f800000 ? x : rounded;
      }
    }
    return x;
  }
};

// A row of a weight or of a state.
template <class T, bool STRIDED>
struct Row {
  T* data;
  int64_t column_stride;
  Rounding rounding;

  template <int LANES>
  RECSYS_OPS_INLINE auto load_at(int64_t column) const {
    return load<LANES>(data + (STRIDED ? column * column_stride : column));
  }

  template <int LANES, class V>
  RECSYS_OPS_INLINE void store_at(int64_t column, V value) const {
    store<LANES>(
        data + (STRIDED ? column * column_stride : column),
        rounding.template apply<T, LANES, Accumulate<T>>(value, column));
  }
};

// A state has the type that sums of T are formed in where T is double, else any but double.
template <class T, class S, Optimizer OPTIMIZER, bool STRIDED>
void update_row(const Step& step, const TrainedTable& table, int64_t row, Accumulate<T>* g) {
  using A = Accumulate<T>;
  constexpr int lanes = STRIDED ? 1 : full_lanes<A>;
  constexpr bool has_moments = OPTIMIZER >= Optimizer::adam;
  constexpr bool has_sum = OPTIMIZER == Optimizer::adagrad || OPTIMIZER == Optimizer::rowwise_adagrad;
  constexpr bool rowwise = OPTIMIZER == Optimizer::rowwise_adagrad || OPTIMIZER == Optimizer::partial_rowwise_adam;
  const int64_t dim = table.dim;
  const auto state = [&](int number, bool per_row) {
    S* data = static_cast<S*>(table.states[number]) + (per_row ? row : row * dim);
    return Row<S, false>{data, 1, {step, 4 * table.number + 1 + number, row}};
  };
  const Row<T, STRIDED> w = {
      static_cast<T*>(table.weight) + row * table.row_stride, table.column_stride, {step, 4 * table.number, row}};
  const A lr = step.lr, eps = step.eps, decay = step.decoupled_weight_decay;
  const A rest1 = 1 - step.beta1, rest2 = 1 - step.beta2;
  const A correction1 = step.correction1, correction2 = step.correction2;

  // Clamp, scale down, and add the L2 decay.
  const bool is_clipped = std::isfinite(step.max_gradient) || std::isfinite(step.max_gradient_norm);
  if (is_clipped || step.weight_decay != 0) {
    const A most = step.max_gradient, most_norm = step.max_gradient_norm, l2 = step.weight_decay;
    const auto clamped = [&](auto n, int64_t d) __attribute__((always_inline)) {
      const auto value = load<n.value>(g + d);
      const Vector<A, n.value> low = Vector<A, n.value>{} - most, high = Vector<A, n.value>{} + most;
      const Vector<A, n.value> from_above = value > high ? high : value;
      return Vector<A, n.value>(from_above < low ? low : from_above);
    };
    A factor = 1;
    if (std::isfinite(step.max_gradient_norm)) {
      Sum<A, lanes> squares;
      for_each_part<lanes>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
        const auto value = clamped(n, d);
        squares.template add<n.value>(value * value);
      });
      const A norm = std::sqrt(squares.total());
      factor = norm <= most_norm ? A{1} : most_norm / norm;  // NaN if the norm is
    }
    for_each_part<lanes>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
      store<n.value>(g + d, clamped(n, d) * factor + w.template load_at<n.value>(d) * l2);
    });
  }

  A row_scale = 1;  // of a row-wise state
  if constexpr (rowwise) {
    Sum<A, lanes> squares;
    for_each_part<lanes>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
      const auto value = load<n.value>(g + d);
      squares.template add<n.value>(value * value);
    });
    const auto of_row = state(has_sum ? 0 : 1, true);
    const A before = of_row.template load_at<1>(0)[0], mean = squares.total() / static_cast<A>(dim > 0 ? dim : 1);
    const A after = has_sum ? before + mean : before + rest2 * (mean - before);
    of_row.template store_at<1>(0, Vector<A, 1>{after});
    row_scale = 1 / (std::sqrt(has_sum ? after : after / correction2) + eps);
  }

  const auto direction = [&](auto n, int64_t d) __attribute__((always_inline)) {
    using V = Vector<A, n.value>;
    V value = load<n.value>(g + d);
    if constexpr (OPTIMIZER == Optimizer::adagrad) {
      const auto sums = state(0, false);
      const V after = sums.template load_at<n.value>(d) + value * value;
      sums.template store_at<n.value>(d, after);
      value = value / (square_root<n.value>(after) + eps);
    } else if constexpr (has_moments) {
      const auto first = state(0, false);
      const V before = first.template load_at<n.value>(d);
      const V m = before + (value - before) * rest1;
      first.template store_at<n.value>(d, m);
      if constexpr (rowwise) {
        value = m / correction1 * row_scale;
      } else {
        const auto second = state(1, false);
        const V was = second.template load_at<n.value>(d);
        const V v = was + (value * value - was) * rest2;
        second.template store_at<n.value>(d, v);
        value = m / correction1 / (square_root<n.value>(V(v / correction2)) + eps);
      }
    } else {
      value = value * row_scale;
    }
    return V(value + w.template load_at<n.value>(d) * decay);
  };

  A rate = lr;
  if constexpr (OPTIMIZER == Optimizer::lamb) {
    Sum<A, lanes> weights, directions;
    for_each_part<lanes>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
      const auto value = w.template load_at<n.value>(d);
      const auto u = direction(n, d);
      store<n.value>(g + d, u);
      weights.template add<n.value>(value * value);
      directions.template add<n.value>(u * u);
    });
    const A of_weight = weights.total(), of_direction = directions.total();
    if (of_weight > 0 && of_direction > 0) {
      rate = lr * (std::sqrt(of_weight) / std::sqrt(of_direction));
    }
  }
  for_each_part<lanes>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
    Vector<A, n.value> u;
    if constexpr (OPTIMIZER == Optimizer::lamb) {
      u = load<n.value>(g + d);
    } else {
      u = direction(n, d);
    }
    w.template store_at<n.value>(d, w.template load_at<n.value>(d) - u * rate);
  });
}

template <class T, class S, Optimizer OPTIMIZER>
void update_any(const Step& step, const TrainedTable& table, int64_t row, Accumulate<T>* g) {
  if (table.column_stride == 1 || table.dim == 1) {
    return update_row<T, S, OPTIMIZER, false>(step, table, row, g);
  }
  update_row<T, S, OPTIMIZER, true>(step, table, row, g);
}

template <class T, class S>
void update_of(const Step& step, const TrainedTable& table, int64_t row, Accumulate<T>* g) {
  switch (step.optimizer) {
    case Optimizer::sgd: return update_any<T, S, Optimizer::sgd>(step, table, row, g);
    case Optimizer::adagrad: return update_any<T, S, Optimizer::adagrad>(step, table, row, g);
    case Optimizer::rowwise_adagrad: return update_any<T, S, Optimizer::rowwise_adagrad>(step, table, row, g);
    case Optimizer::adam: return update_any<T, S, Optimizer::adam>(step, table, row, g);
    case Optimizer::partial_rowwise_adam: return update_any<T, S, Optimizer::partial_rowwise_adam>(step, table, row, g);
    case Optimizer::lamb: return update_any<T, S, Optimizer::lamb>(step, table, row, g);
  }
}

template <class T>
void update(const Step& step, const TrainedTable& table, int64_t row, Accumulate<T>* g) {
  if constexpr (std::is_same_v<T, double>) {
    update_of<T, double>(step, table, row, g);
  } else {
    switch (table.state_dtype) {
      case DType::float16: return update_of<T, Half>(step, table, row, g);
      case DType::bfloat16: return update_of<T, BFloat16>(step, table, row, g);
      default: return update_of<T, float>(step, table, row, g);
    }
  }
}

template <class T>
void write(int64_t dim, const Accumulate<T>* gradient, T* to) {
  for_each_part<full_lanes<Accumulate<T>>>(dim, [&](auto n, int64_t d) __attribute__((always_inline)) {
    store<n.value>(to + d, load<n.value>(gradient + d));
  });
}

template <class T>
constexpr RowUpdate<T> kernels = {update<T>, write<T>};

}  // namespace

RECSYS_OPS_DEFINE_FOR_LEVEL(RowUpdate, row_update, kernels)

}  // namespace recsys_ops::embedding_bag_collection::RECSYS_OPS_SIMD_LEVEL
