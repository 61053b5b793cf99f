#include "hstu_attention.h"

#include <atomic>
#include <cstring>
#include <numeric>

#include "../common/parallel.h"
#include "../common/simd.h"
#include "plan.h"

namespace recsys_ops::hstu_attention {
namespace {

// Pairs of a row and a key that a thread handles in the time that it takes to wake another, times columns.
constexpr double products_per_thread = 100000;

// Calls f(task, scratch) for every task, the dearest first, on as many threads as are worth it.
template <class F>
void run(const Attention& attention, const std::vector<Task>& tasks, const F& f) {
  std::vector<int64_t> order(tasks.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return tasks[a].cost > tasks[b].cost; });
  double cost = 0;
  for (const Task& task : tasks) {
    cost += task.cost * static_cast<double>(attention.dim + attention.value_dim);
  }
  const int64_t worth = static_cast<int64_t>(std::min(cost / products_per_thread, 1e6)) + 1;
  const int64_t threads = std::min<int64_t>(
      {worth, static_cast<int64_t>(torch::stable::get_num_threads()), std::max<int64_t>(1, tasks.size())});
  std::atomic<size_t> next{0};
  run_tasks(threads, [&](int64_t) {
    Scratch scratch;
    for (size_t i = next++; i < order.size(); i = next++) {
      f(order[i], scratch);
    }
  });
}

// Whether this machine can multiply pairs of bfloat16, and they are what it is given.
bool multiplies_pairs(const Attention& attention) {
#if defined(RECSYS_OPS_X86)
  static const bool has_instruction = __builtin_cpu_supports("avx512bf16");
  return has_instruction && attention.dtype == DType::bfloat16;
#else
  return false;
#endif
}

template <class F>
void dispatch_sums(DType dtype, const F& f) {
  if (dtype == DType::float64) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

// What the tasks of a backward pass leave to be added up, in the order of the tasks.
template <class A>
class Remainders {
 public:
  Remainders(const Attention& attention, const Gradients& gradients, const std::vector<Task>& tasks)
      : attention(attention), gradients(gradients), tasks(tasks), parts(tasks.size()) {
    int64_t size = 0;
    for (const bool is_allocated : {false, true}) {
      size = 0;
      for (size_t i = 0; i < tasks.size(); ++i) {
        const Sequence& sequence = *tasks[i].sequence;
        Parts& part = parts[i];
        const auto take = [&](bool wanted, int64_t count) -> void* {
          A* memory = wanted && is_allocated ? numbers.data() + size : nullptr;
          size += wanted ? count : 0;
          return memory;
        };
        const int64_t heads = tasks[i].last_head - tasks[i].first_head;
        part.grad_q = take(is_shared(i), heads * sequence.rows * attention.dim);
        const int64_t center = attention.position.size / 2;
        const int64_t reach = std::min(center, sequence.length - 1);
        part.first_distance = center - reach;
        part.num_distances = 2 * reach + 1;
        part.position = take(attention.position.data != nullptr, tables(attention.position, heads) * part.num_distances);
        part.time = take(attention.time.data != nullptr, tables(attention.time, heads) * attention.time.size);
      }
      numbers.resize(size);
    }
  }

  const Parts& of(size_t task) const { return parts[task]; }

  void add_up() const {
    for (size_t first = 0; first < tasks.size(); ++first) {
      if (is_shared(first) && (first == 0 || !together(first - 1, first))) {
        write_grad_q(first);
      }
    }
    add_up_weights(attention.position, gradients.position, [](const Parts& part) {
      return Numbers{static_cast<const A*>(part.position), part.first_distance, part.num_distances};
    });
    add_up_weights(attention.time, gradients.time, [&](const Parts& part) {
      return Numbers{static_cast<const A*>(part.time), 0, attention.time.size};
    });
  }

 private:
  struct Numbers {
    const A* data;
    int64_t first, count;
  };

  // Of weights, that a task of some heads has.
  static int64_t tables(const Weights& weights, int64_t heads) { return weights.heads > 1 ? heads : 1; }

  // Whether two tasks have the same queries.
  bool together(size_t a, size_t b) const {
    return tasks[a].sequence == tasks[b].sequence && tasks[a].first_head == tasks[b].first_head;
  }

  bool is_shared(size_t i) const {
    return (i > 0 && together(i - 1, i)) || (i + 1 < tasks.size() && together(i, i + 1));
  }

  void write_grad_q(size_t first) const {
    const Sequence& sequence = *tasks[first].sequence;
    const Tensor3& grad_q = gradients.q;
    const int64_t dim = attention.dim, heads = tasks[first].last_head - tasks[first].first_head;
    dispatch(attention.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* to = const_cast<T*>(static_cast<const T*>(grad_q.data));
      run_parts(task_count(heads * sequence.rows * dim), heads * sequence.rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t head = tasks[first].first_head + row / sequence.rows;
          T* of_row = to + (sequence.first_row + row % sequence.rows) * grad_q.row + head * grad_q.head;
          for (int64_t d = 0; d < dim; ++d) {
            A sum = 0;
            for (size_t i = first; i < tasks.size() && together(first, i); ++i) {
              sum += static_cast<const A*>(parts[i].grad_q)[row * dim + d];
            }
            store_number(of_row + d * grad_q.column, sum);
          }
        }
      });
    });
  }

  template <class T>
  void store_number(T* to, A number) const {
    using namespace recsys_ops::scalar;
    store<1>(to, Vector<Accumulate<T>, 1>{static_cast<Accumulate<T>>(number * static_cast<A>(attention.alpha))});
  }

  template <class NumbersOf>
  void add_up_weights(const Weights& weights, const Weights& sums, const NumbersOf& numbers_of) const {
    if (weights.data == nullptr) {
      return;
    }
    A* to = const_cast<A*>(static_cast<const A*>(sums.data));
    std::fill(to, to + weights.heads * weights.size, A{0});
    run_parts(task_count(static_cast<int64_t>(numbers.size())), weights.size, [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < tasks.size(); ++i) {
        const Numbers of_task = numbers_of(parts[i]);
        const int64_t first_table = weights.heads > 1 ? tasks[i].first_head : 0;
        const int64_t num_tables = tables(weights, tasks[i].last_head - tasks[i].first_head);
        const int64_t first = std::max(begin, of_task.first), last = std::min(end, of_task.first + of_task.count);
        for (int64_t table = 0; table < num_tables; ++table) {
          A* row = to + (first_table + table) * weights.size;
          const A* part = of_task.data + table * of_task.count;
          for (int64_t x = first; x < last; ++x) {
            row[x] += part[x - of_task.first];
          }
        }
      }
    });
  }

  const Attention& attention;
  const Gradients& gradients;
  const std::vector<Task>& tasks;
  std::vector<Parts> parts;
  std::vector<A> numbers;
};

}  // namespace

void forward(const Attention& attention, int64_t num_rows, int64_t num_keys, void* output) {
  const std::vector<Sequence> sequences = sequences_of(attention, num_rows, num_keys);
  const std::vector<Task> tasks = forward_tasks(attention, sequences, torch::stable::get_num_threads());
  dispatch_sums(attention.dtype, [&](auto* type) {
    const auto& kernels = attention_tasks<std::remove_pointer_t<decltype(type)>>();
    const auto kernel =
        multiplies_pairs(attention) && kernels.forward_of_pairs ? kernels.forward_of_pairs : kernels.forward;
    run(attention, tasks, [&](int64_t i, Scratch& scratch) { kernel(attention, tasks[i], output, scratch); });
  });
}

void backward(const Attention& attention, const Gradients& gradients, int64_t num_rows, int64_t num_keys) {
  const std::vector<Sequence> sequences = sequences_of(attention, num_rows, num_keys);
  const std::vector<Task> tasks = backward_tasks(attention, sequences);
  dispatch_sums(attention.dtype, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const auto& kernels = attention_tasks<A>();
    // With scales of rows, weights would be rounded once more than the contract has it.
    const bool takes_pairs = multiplies_pairs(attention) && kernels.backward_of_pairs && !attention.row_scale;
    const auto kernel = takes_pairs ? kernels.backward_of_pairs : kernels.backward;
    const Remainders<A> remainders(attention, gradients, tasks);
    run(attention, tasks, [&](int64_t i, Scratch& scratch) {
      kernel(attention, gradients, tasks[i], remainders.of(i), scratch);
    });
    remainders.add_up();
  });
}

}  // namespace recsys_ops::hstu_attention
