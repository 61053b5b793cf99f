// Checks and allocation for torch.ops.recsys_ops.embedding_bag_collection_* on NVIDIA GPUs.
#include "embedding_bag_collection_cuda.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/cuda/tensors.h"
#include "../embedding_bag/embedding_bag_cuda.h"
#include "arguments.h"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

using recsys_ops::cuda::Memory;
using recsys_ops::cuda::OnDevice;

int64_t bytes_of(DType wide) { return is_double(wide) ? sizeof(double) : sizeof(float); }

// Output or gradient of it, [C].
Cells cells_of(const char* argument, const Tensor& tensor) {
  return {output_dtype(argument, tensor), tensor.mutable_data_ptr()};
}

void embedding_bag_collection_forward(
    Tensor output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets, MaybeTensor per_sample_weights,
    Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  const Cells cells = cells_of("output", output);
  const std::vector<Table> tables = tables_of(weights, cells.dtype);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  forward(
      tables, input, factors_of(per_sample_weights, input, cells.dtype).data, cells, argmax_of(argmax, output.numel()),
      device.stream);
}

void embedding_bag_collection_quantized_forward(
    Tensor output, Tensors codes, Tensors scales, int64_t bits, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  const Cells cells = cells_of("output", output);
  STD_TORCH_CHECK(!is_double(cells.dtype), op, ": expected output of float32, float16 or bfloat16");
  const auto [type, tables] = code_tables_of(codes, scales, bits);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, output.numel());
  quantized_forward(
      type, tables, input, factors_of(per_sample_weights, input, cells.dtype).data, cells, device.stream);
}

// Arrays that go to the GPU together.
class Upload {
 public:
  // Where the array begins, in words.
  template <class S>
  int64_t add(const std::vector<S>& array) {
    static_assert(sizeof(S) % sizeof(uint64_t) == 0);
    const size_t at = words.size();
    words.resize(at + array.size() * sizeof(S) / sizeof(uint64_t));
    if (!array.empty()) {
      std::memcpy(words.data() + at, array.data(), array.size() * sizeof(S));
    }
    return static_cast<int64_t>(at);
  }

  void send(const Tensor& like, cudaStream_t stream) {
    memory.emplace(like, static_cast<int64_t>(words.size() * sizeof(uint64_t)));
    upload(words, memory->as<uint64_t>(), stream);
  }

  template <class S>
  const S* at(int64_t word) {
    return reinterpret_cast<const S*>(memory->as<uint64_t>() + word);
  }

 private:
  std::vector<uint64_t> words;
  std::optional<Memory> memory;
};

// The sorted entries of the gradients of all tables, and the memory that they are in.
class CollectionGradient {
 public:
  CollectionGradient(
      const Tensor& grad_output, const MaybeTensor& argmax, const Tensors& weights, const Tensor& values,
      const Tensor& offsets, const MaybeTensor& per_sample_weights, const Tensor& lookups, bool drop_invalid,
      cudaStream_t stream)
      : like(grad_output), stream(stream) {
    const Backward given(grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid);
    terms = {cells_of("grad_output", grad_output), given.factors.data, given.argmax, given.input.offsets};
    sum_dtype = wide(given.dtype);
    plan = plan_gradients(given.tables, given.input, given.factors.data, bags_per_warp);
    sort(given.input);
  }

  // Calls f(round, its number, sums) for each round.
  template <class F>
  void each_round(const F& f) {
    const int64_t pieces = embedding_bag::cuda::piece_count(plan.num_entries);
    for (size_t i = 0; i < plan.rounds.size(); ++i) {
      const Round& round = plan.rounds[i];
      Memory sums(like, round.most_runs * round.dim * bytes_of(sum_dtype));
      Memory targets(like, pieces * sizeof(int64_t)), of_pieces(like, pieces * round.dim * bytes_of(sum_dtype));
      sum_round(
          plan, round, runs, terms, uploaded.at<RoundRange>(round_ranges[i]), sums.as<void>(), targets.as<int64_t>(),
          of_pieces.as<void>(), stream);
      f(round, i, sums.as<void>());
    }
  }

  // Writes the gradient of each table of a round to out[table], and its rows to rows[table] if there are any.
  void write(Tensors& out, Tensors& rows) {
    Upload targets;
    std::vector<int64_t> at;
    for (const Round& round : plan.rounds) {
      std::vector<GradientOut> of_round;
      for (const auto& [number, table] : round.tables) {
        int64_t* const list = rows.empty() ? nullptr : static_cast<int64_t*>(rows[table].mutable_data_ptr());
        of_round.push_back(
            {number, plan.first_row[number], dtype_of(op, "weights", out[table]), out[table].mutable_data_ptr(), list});
      }
      at.push_back(targets.add(of_round));
    }
    targets.send(like, stream);
    each_round([&](const Round& round, size_t i, const void* sums) {
      write_gradients(
          round, runs, sums, sum_dtype, targets.at<GradientOut>(at[i]), static_cast<int64_t>(round.tables.size()),
          stream);
    });
  }

  // Touched rows of the tables of each class. Waits for the GPU.
  std::vector<int64_t> count_touched() {
    std::vector<int64_t> first(plan.num_classes() + 1);
    read_back(runs.first_run, first, stream);
    for (int64_t number = 0; number < plan.num_classes(); ++number) {
      first[number] = first[number + 1] - first[number];
    }
    first.pop_back();
    return first;
  }

  GradientPlan plan;
  SortedRuns runs = {};
  DType sum_dtype;

 private:
  void sort(const Entries& input) {
    const int64_t size = plan.num_entries, classes = plan.num_classes();
    const int64_t ranges = uploaded.add(plan.ranges), first_row = uploaded.add(plan.first_row);
    for (const Round& round : plan.rounds) {
      round_ranges.push_back(uploaded.add(round.ranges));
    }
    uploaded.send(like, stream);

    const embedding_bag::KeyLayout layout = plan.layout();
    uint64_t* const unsorted = memory(2 * size * sizeof(uint64_t)).as<uint64_t>();
    uint32_t* const cell_of = plan.by_position ? memory(size * sizeof(uint32_t)).as<uint32_t>() : nullptr;
    double* const cell_scale = plan.has_mean ? memory(plan.num_cells * sizeof(double)).as<double>() : nullptr;
    find_entries(plan, uploaded.at<Range>(ranges), input, unsorted, cell_of, cell_scale, stream);

    Memory for_sort(like, embedding_bag::cuda::sort_bytes(layout, size));
    const uint64_t* const sorted = embedding_bag::cuda::sort_entries(
        layout, unsorted, unsorted + size, size, for_sort.as<void>(), for_sort.bytes, stream);
    uint64_t* const numbered = sorted == unsorted ? unsorted + size : unsorted;
    const embedding_bag::SortedEntries entries = {sorted, layout.source_bits, nullptr, nullptr, nullptr, {}, nullptr};
    int64_t* const counts = memory(embedding_bag::cuda::count_size(size) * sizeof(int64_t)).as<int64_t>();
    int64_t* const rows = memory(std::min(size, plan.num_rows()) * sizeof(int64_t)).as<int64_t>();
    Memory for_counts(like, embedding_bag::cuda::count_bytes(size));
    embedding_bag::cuda::count_runs(
        entries, size, plan.num_rows(), counts, for_counts.as<void>(), for_counts.bytes, stream);
    embedding_bag::cuda::number_runs(entries, size, plan.num_rows(), 0, counts, numbered, rows, stream);

    int64_t* const first = memory(2 * (classes + 1) * sizeof(int64_t)).as<int64_t>();
    find_classes(
        plan, uploaded.at<int64_t>(first_row), sorted, numbered, counts, first, first + classes + 1, stream);
    runs = {numbered, cell_of, cell_scale, rows, first, first + classes + 1};
  }

  Memory& memory(int64_t bytes) {
    kept.emplace_back(like, bytes);
    return kept.back();
  }

  const Tensor& like;
  cudaStream_t stream;
  Terms terms;
  Upload uploaded;
  std::vector<int64_t> round_ranges;
  std::vector<Memory> kept;
};

Tensors embedding_bag_collection_backward(
    Tensor grad_output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  CollectionGradient gradient(
      grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid, device.stream);
  Tensors out, rows;
  for (const Tensor& weight : weights) {
    const std::vector<int64_t> shape = {weight.size(0), weight.size(1)};
    out.push_back(torch::stable::new_empty(weight, {shape.data(), shape.size()}));
    embedding_bag::cuda::zero(
        {dtype_of(op, "weights", weight), nullptr, shape[1], nullptr, nullptr, false, false}, shape[0],
        out.back().mutable_data_ptr(), device.stream);
  }
  gradient.write(out, rows);
  return out;
}

Tensors embedding_bag_collection_backward_sparse(
    Tensor grad_output, MaybeTensor argmax, Tensors weights, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  CollectionGradient gradient(
      grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid, device.stream);
  std::vector<int64_t> touched(weights.size(), 0);
  const std::vector<int64_t> of_classes = gradient.count_touched();
  for (const Round& round : gradient.plan.rounds) {
    for (const auto& [number, table] : round.tables) {
      touched[table] = of_classes[number];
    }
  }
  Tensors out, rows, result;
  for (size_t table = 0; table < weights.size(); ++table) {
    const std::vector<int64_t> shape = {touched[table], weights[table].size(1)};
    rows.push_back(torch::stable::new_empty(values, {shape.data(), 1}, ScalarType::Long));
    out.push_back(torch::stable::new_empty(weights[table], {shape.data(), 2}));
  }
  gradient.write(out, rows);
  for (size_t table = 0; table < weights.size(); ++table) {
    result.push_back(rows[table]);
    result.push_back(out[table]);
  }
  return result;
}

Tensor embedding_bag_collection_backward_per_sample_weights(
    Tensor grad_output, Tensors weights, Tensor values, Tensor offsets, Tensor lookups,
    bool drop_invalid) {
  const OnDevice device(values);
  const Cells cells = cells_of("grad_output", grad_output);
  const std::vector<Table> tables = tables_of(weights, cells.dtype);
  const Input input = input_of(values, offsets, lookups, drop_invalid, tables, grad_output.numel());
  Tensor grad = new_empty(grad_output, {input.values.size}, wide_scalar(cells.dtype));
  backward_per_sample_weights(tables, input, cells, grad.mutable_data_ptr(), device.stream);
  return grad;
}

Parameter parameter_of(const char* argument, const Tensor& tensor, const Tensor& weight, DType sum_dtype) {
  const bool rowwise = tensor.dim() == 1;
  STD_TORCH_CHECK(
      (rowwise || (tensor.dim() == 2 && tensor.size(1) == weight.size(1))) && tensor.size(0) == weight.size(0), op,
      ": expected ", argument, " of shape [R] or [R, D] like its weight");
  const DType dtype = dtype_of(op, argument, tensor);
  check_width(argument, dtype, sum_dtype);
  return {dtype, tensor.mutable_data_ptr(), tensor.stride(0), rowwise ? 0 : tensor.stride(1)};
}

void embedding_bag_collection_update(
    Tensors weights, Tensors states, Tensor step, Tensor grad_output, MaybeTensor argmax, Tensor values, Tensor offsets,
    MaybeTensor per_sample_weights, Tensor lookups, bool drop_invalid, int64_t optimizer, Tensor hyperparameters,
    int64_t seed, bool stochastic_rounding) {
  const OnDevice device(values);
  const Step made = step_of(optimizer, hyperparameters, step, seed, stochastic_rounding);
  check_state_count(states, weights, made.optimizer);
  const int each = state_count(made.optimizer);
  CollectionGradient gradient(
      grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid, device.stream);
  Upload targets;
  std::vector<int64_t> at;
  std::vector<bool> aligned;
  for (const Round& round : gradient.plan.rounds) {
    std::vector<UpdatedTable> of_round;
    bool all_aligned = true;
    for (const auto& [number, table] : round.tables) {
      const Tensor& weight = weights[table];
      UpdatedTable updated = {number, gradient.plan.first_row[number], table, {}};
      updated.tensors[0] = parameter_of("weights", weight, weight, gradient.sum_dtype);
      all_aligned = all_aligned && is_aligned(updated.tensors[0], gradient.sum_dtype);
      for (int s = 0; s < each; ++s) {
        const Tensor& state = states[table * each + s];
        const bool rowwise = is_rowwise(made.optimizer, s);
        STD_TORCH_CHECK(
            state.dim() == (rowwise ? 1 : 2), op, ": expected states of ", rowwise ? "one dimension" : "two dimensions",
            ", got ", state.dim());
        updated.tensors[s + 1] = parameter_of("states", state, weight, gradient.sum_dtype);
        all_aligned = all_aligned && (rowwise || is_aligned(updated.tensors[s + 1], gradient.sum_dtype));
      }
      of_round.push_back(updated);
    }
    at.push_back(targets.add(of_round));
    aligned.push_back(all_aligned);
  }
  targets.send(grad_output, device.stream);
  gradient.each_round([&](const Round& round, size_t i, const void* sums) {
    update(
        round, gradient.runs, sums, gradient.sum_dtype, targets.at<UpdatedTable>(at[i]),
        static_cast<int64_t>(round.tables.size()), aligned[i], made, device.stream);
  });
  count_step(step);
}

STABLE_TORCH_LIBRARY_IMPL(RECSYS_OPS_CUDA_LIBRARY, RECSYS_OPS_CUDA_KEY, m) {
  m.impl("embedding_bag_collection_forward", TORCH_BOX(&embedding_bag_collection_forward));
  m.impl("embedding_bag_collection_quantized_forward", TORCH_BOX(&embedding_bag_collection_quantized_forward));
  m.impl("embedding_bag_collection_backward", TORCH_BOX(&embedding_bag_collection_backward));
  m.impl("embedding_bag_collection_backward_sparse", TORCH_BOX(&embedding_bag_collection_backward_sparse));
  m.impl(
      "embedding_bag_collection_backward_per_sample_weights",
      TORCH_BOX(&embedding_bag_collection_backward_per_sample_weights));
  m.impl("embedding_bag_collection_update", TORCH_BOX(&embedding_bag_collection_update));
}

}  // namespace
}  // namespace recsys_ops::embedding_bag_collection::cuda
