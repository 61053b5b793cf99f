// Optimizers: a group of lanes updates one touched row of a table by its summed gradient. Formulas,
// rounding and names are those of recsys_ops/embedding_bag_collection/row_optimizers.py.
#include <cmath>

#include "lookups.cuh"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

// A step in the type that sums are formed in.
template <class A>
struct StepIn {
  Optimizer optimizer;
  A lr, eps, rate1, rate2;  // rates: 1 - beta
  A correction1, correction2;
  A weight_decay, decoupled_weight_decay;
  A max_gradient, max_gradient_norm;
  bool clips_norm, rounds_stochastically;
  unsigned seed, count;

  __device__ bool is_adagrad() const {
    return optimizer == Optimizer::adagrad || optimizer == Optimizer::rowwise_adagrad;
  }
  __device__ bool is_adam() const { return optimizer >= Optimizer::adam; }
  __device__ bool is_rowwise() const {
    return optimizer == Optimizer::rowwise_adagrad || optimizer == Optimizer::partial_rowwise_adam;
  }
};

// The finaliser of MurmurHash3.
__device__ inline unsigned mix(unsigned x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// How one row of a parameter is rounded.
struct Rounding {
  bool stochastic;
  unsigned key;

  template <class A>
  __device__ Rounding(const StepIn<A>& step, const Parameter& of, int64_t tensor, int64_t row)
      : stochastic(step.rounds_stochastically && (of.dtype == DType::float16 || of.dtype == DType::bfloat16)), key(0) {
    if (stochastic) {
      key = mix(static_cast<unsigned>(tensor) + mix(step.count + mix(step.seed)));
      key = mix(static_cast<unsigned>(row) + mix(static_cast<unsigned>(row >> 32) + key));
    }
  }

  // The nearest multiple of the value's unit in the last place, with a random part of one added before.
  __device__ float rounded(float value, DType dtype, int64_t column) const {
    const bool half = dtype == DType::float16;
    const float magnitude = __uint_as_float(__float_as_uint(value) & 0x7f800000);  // a power of two, or 0
    const float unit = fmaxf(magnitude * (half ? 0x1p-10f : 0x1p-7f), half ? 0x1p-24f : 0x1p-133f);
    const unsigned bits = mix(key + static_cast<unsigned>(column) * 0x9e3779b9u) >> 20;
    const float noise = (static_cast<float>(bits) - 2047.5f) / 4096.0f;
    return magnitude < INFINITY ? rintf(value / unit + noise) * unit : value;
  }
};

// Of what the kernel itself writes: not through the cache of what nobody writes.
template <class T, int N>
__device__ Pack<T, N> load_changing(const void* base, int64_t offset) {
  using Word = typename Raw<T, N>::Word;
  Raw<T, N> raw;
  const Word* from = reinterpret_cast<const Word*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int w = 0; w < raw.count; ++w) {
    raw.words[w] = from[w];
  }
  return raw.unpacked();
}

template <int N>
__device__ Pack<float, N> read(const Parameter& from, int64_t at, float) {
  if (from.dtype == DType::float32) {
    return load_changing<float, N>(from.data, at);
  }
  if (from.dtype == DType::float16) {
    return widened(load_changing<Half, N>(from.data, at));
  }
  return widened(load_changing<BFloat16, N>(from.data, at));
}
template <int N>
__device__ Pack<double, N> read(const Parameter& from, int64_t at, double) {
  return load_changing<double, N>(from.data, at);
}

template <int N>
__device__ void write(
    const Parameter& to, int64_t at, Pack<float, N> values, const Rounding& rounding, int64_t column) {
  if (rounding.stochastic) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = rounding.rounded(values[k], to.dtype, column + k);
    }
  }
  store_as<N>({to.dtype, to.data}, at, values);
}
template <int N>
__device__ void write(const Parameter& to, int64_t at, const Pack<double, N>& values, const Rounding&, int64_t) {
  store_as<N>({to.dtype, to.data}, at, values);
}

// A touched row as the lanes of a group see it, some columns at a time.
template <class A, int N>
struct TouchedRow {
  const StepIn<A>& step;
  const UpdatedTable& table;
  const A* gradient;
  const int64_t row;
  A scale = 1;       // of the gradient, for its norm
  A row_second = 0;  // the state of a row that has one number, updated

  struct Columns {
    Pack<A, N> weight, first, second, change;
  };

  __device__ int64_t at(int tensor, int64_t column) const {
    return row * table.tensors[tensor].row_stride + column * table.tensors[tensor].column_stride;
  }

  __device__ Pack<A, N> clamped(int64_t column) const {
    Pack<A, N> g = load<N>(gradient, column, true).unpacked();
#pragma unroll
    for (int k = 0; k < N; ++k) {
      g[k] = g[k] > step.max_gradient ? step.max_gradient : g[k] < -step.max_gradient ? -step.max_gradient : g[k];
    }
    return g;
  }

  __device__ Pack<A, N> decayed(int64_t column, const Pack<A, N>& weight) const {
    Pack<A, N> g = clamped(column);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      g[k] = g[k] * scale + step.weight_decay * weight[k];
    }
    return g;
  }

  __device__ Pack<A, N> weight(int64_t column) const { return read<N>(table.tensors[0], at(0, column), A{}); }

  // The states afterwards, and what the weight changes by but for the learning rate.
  __device__ Columns columns(int64_t column) const {
    Columns c = {weight(column), {}, {}, {}};
    const bool has_first = step.is_adam(), has_second = !step.is_rowwise() && step.optimizer != Optimizer::sgd;
    const int second = has_first ? 2 : 1;
    if (has_first) {
      c.first = read<N>(table.tensors[1], at(1, column), A{});
    }
    if (has_second) {
      c.second = read<N>(table.tensors[second], at(second, column), A{});
    }
    const Pack<A, N> g = decayed(column, c.weight);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A u = g[k];
      if (has_second) {
        c.second[k] = accumulated(c.second[k], g[k] * g[k]);
      } else {
        c.second[k] = row_second;
      }
      if (step.is_adagrad()) {
        u = g[k] / (std::sqrt(c.second[k]) + step.eps);
      } else if (step.is_adam()) {
        c.first[k] += step.rate1 * (g[k] - c.first[k]);
        u = c.first[k] / step.correction1 / (std::sqrt(c.second[k] / step.correction2) + step.eps);
      }
      c.change[k] = u + step.decoupled_weight_decay * c.weight[k];
    }
    return c;
  }

  // The sum or the moving average of squares after one more.
  __device__ A accumulated(A before, A square) const {
    return step.is_adam() ? before + step.rate2 * (square - before) : before + square;
  }

  __device__ void write_columns(int64_t column, const Columns& c, A rate) const {
    const auto put = [&](int tensor, const Pack<A, N>& values) {
      const Parameter& to = table.tensors[tensor];
      write<N>(to, at(tensor, column), values, Rounding(step, to, 4 * table.table + tensor, row), column);
    };
    Pack<A, N> weight = c.weight;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      weight[k] -= rate * c.change[k];
    }
    put(0, weight);
    if (step.is_adam()) {
      put(1, c.first);
    }
    if (!step.is_rowwise() && step.optimizer != Optimizer::sgd) {
      put(step.is_adam() ? 2 : 1, c.second);
    }
  }
};

template <class A, int N>
__global__ void __launch_bounds__(threads_per_block, blocks_per_sm) embedding_bag_collection_update_kernel(
    SortedRuns runs, int64_t first_class, int64_t end_class, const UpdatedTable* tables, int count, int64_t dim,
    Tiles tiles, const __grid_constant__ StepIn<A> step, const A* sums) {
  const Group group(tiles.lanes);
  const int64_t before = runs.first_run[first_class], touched = runs.first_run[end_class] - before;
  for (int64_t task = group.first_task(); any(task < touched); task += group.stride()) {
    const int64_t run = before + task;
    const int number = find_end([&](int i) { return runs.first_run[tables[i + 1].number]; }, count, run);
    const UpdatedTable& table = tables[number];
    const bool exists = task < touched && run < runs.first_run[table.number + 1];
    TouchedRow<A, N> row = {step, table, sums + task * dim, exists ? runs.rows[run] - table.first_row : 0};
    const auto each_column = [&](const auto& f) {
      for (int64_t block = 0; block < tiles.blocks; ++block) {
        const int64_t column = (block * group.lanes + group.lane) * N;
        if (exists && column < dim) {
          f(column);
        }
      }
    };
    const auto sum_of_squares = [&](const auto& values_at) {
      A sum = 0;
      each_column([&](int64_t column) {
        const Pack<A, N> values = values_at(column);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          sum += values[k] * values[k];
        }
      });
      return group.sum(sum);
    };
    if (step.clips_norm) {
      const A norm = std::sqrt(sum_of_squares([&](int64_t column) { return row.clamped(column); }));
      row.scale = step.max_gradient_norm / (norm < step.max_gradient_norm ? step.max_gradient_norm : norm);
    }
    if (step.is_rowwise()) {
      const A squares = sum_of_squares([&](int64_t column) { return row.decayed(column, row.weight(column)); });
      const int tensor = step.is_adam() ? 2 : 1;
      const bool has_state = exists && group.lane == 0;
      const A state = has_state ? read<1>(table.tensors[tensor], row.at(tensor, 0), A{})[0] : A{0};
      row.row_second = row.accumulated(group.broadcast(state, 0), squares / static_cast<A>(dim > 0 ? dim : 1));
      if (has_state) {
        const Parameter& to = table.tensors[tensor];
        write<1>(
            to, row.at(tensor, 0), Pack<A, 1>{{row.row_second}}, Rounding(step, to, 4 * table.table + tensor, row.row),
            0);
      }
    }
    A rate = step.lr;
    if (step.optimizer == Optimizer::lamb) {
      const A of_weight = std::sqrt(sum_of_squares([&](int64_t column) { return row.weight(column); }));
      const A of_change = std::sqrt(sum_of_squares([&](int64_t column) { return row.columns(column).change; }));
      rate *= of_weight > 0 && of_change > 0 ? of_weight / of_change : A{1};
    }
    each_column([&](int64_t column) { row.write_columns(column, row.columns(column), rate); });
  }
}

template <class A>
StepIn<A> step_in(const Step& step) {
  return {
      step.optimizer,
      static_cast<A>(step.lr),
      static_cast<A>(step.eps),
      static_cast<A>(1 - step.beta1),
      static_cast<A>(1 - step.beta2),
      static_cast<A>(step.correction1),
      static_cast<A>(step.correction2),
      static_cast<A>(step.weight_decay),
      static_cast<A>(step.decoupled_weight_decay),
      static_cast<A>(step.max_gradient),
      static_cast<A>(step.max_gradient_norm),
      step.max_gradient_norm < INFINITY,
      step.stochastic_rounding,
      step.seed,
      step.count};
}

}  // namespace

bool is_aligned(const Parameter& parameter, DType sum_dtype) {
  bool aligned = false;
  dispatch(parameter.dtype, [&](auto* type) {
    const int64_t elements = widest_word / (sum_dtype == DType::float64 ? sizeof(double) : sizeof(float));
    aligned = parameter.column_stride == 1 && parameter.row_stride % elements == 0 &&
              reinterpret_cast<uintptr_t>(parameter.data) % (elements * sizeof(*type)) == 0;
  });
  return aligned;
}

void update(
    const Round& round, const SortedRuns& runs, const void* sums, DType sum_dtype, const UpdatedTable* tables,
    int64_t count, bool aligned, const Step& step, cudaStream_t stream) {
  const auto start = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const Tiles tiles =
        tile_rows<A>(round.dim, 0, 1, aligned ? widest_word / sizeof(A) : 1, static_cast<const A*>(sums));
    dispatch_elements<A>(tiles, [&](auto elements) {
      launch(
          stream, embedding_bag_collection_update_kernel<A, elements.value>, round.most_runs, tiles.lanes, runs,
          round.first_class, round.end_class, tables, static_cast<int>(count), round.dim, tiles, step_in<A>(step),
          static_cast<const A*>(sums));
    });
  };
  if (sum_dtype == DType::float64) {
    start(static_cast<double*>(nullptr));
  } else {
    start(static_cast<float*>(nullptr));
  }
}

}  // namespace recsys_ops::embedding_bag_collection::cuda
