// Checks and allocation for torch.ops.recsys_ops.embedding_bag_collection_* on NVIDIA GPUs.
#include "embedding_bag_collection_cuda.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>
#include <optional>

#include "../common/cuda/tensors.h"
#include "../embedding_bag/embedding_bag_cuda.h"

namespace recsys_ops::embedding_bag_collection::cuda {
namespace {

using recsys_ops::cuda::Memory;
using recsys_ops::cuda::OnDevice;

constexpr const char* op = "embedding_bag_collection";

DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
ScalarType scalar_type(DType wide) { return wide == DType::float64 ? ScalarType::Double : ScalarType::Float; }
int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

Input input_of(const Tensor& values, const Tensor& offsets, bool drop_invalid) {
  const Input input = {integers_of(op, "values", values), integers_of(op, "offsets", offsets), drop_invalid};
  STD_TORCH_CHECK(input.offsets.size > 0, op, ": expected offsets of shape [G + 1], got [0]");
  return input;
}

// Output or gradient of it, [C].
Cells cells_of(const char* argument, const Tensor& tensor) {
  const DType dtype = dtype_of(op, argument, tensor);
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.is_contiguous(), op, ": expected ", argument, " of one contiguous dimension");
  return {dtype, tensor.mutable_data_ptr()};
}

void check_width(const char* argument, DType dtype, DType cells) {
  STD_TORCH_CHECK(
      wide(dtype) == wide(cells), op, ": expected ", argument, " and output both float64 or neither, got one of them");
}

std::vector<Table> tables_of(const std::vector<Tensor>& weights, DType cells) {
  std::vector<Table> tables;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2, op, ": expected weights of shape [R, D], got ", weight.dim(), " dimensions");
    const DType dtype = dtype_of(op, "weights", weight);
    check_width("weights", dtype, cells);
    tables.push_back(
        {dtype, weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)});
  }
  return tables;
}

// The rows of a tensor [K, 6] on the CPU; each within its tables, bags and cells.
template <class TableLike>
std::vector<Lookup> lookups_of(
    const Tensor& tensor, const std::vector<TableLike>& tables, const Input& input, int64_t num_cells) {
  STD_TORCH_CHECK(
      !tensor.is_cuda() && tensor.dim() == 2 && tensor.size(1) == 6 && tensor.is_contiguous() &&
          tensor.scalar_type() == ScalarType::Long,
      op, ": expected lookups int64 [K, 6], contiguous and on the CPU");
  std::vector<Lookup> lookups(tensor.size(0));
  if (!lookups.empty()) {
    std::memcpy(lookups.data(), tensor.const_data_ptr(), lookups.size() * sizeof(Lookup));
  }
  std::vector<int64_t> modes(tables.size(), -1);
  for (const Lookup& lookup : lookups) {
    STD_TORCH_CHECK(
        0 <= lookup.table && lookup.table < static_cast<int64_t>(tables.size()) && sum <= lookup.mode &&
            lookup.mode <= maximum,
        op, ": expected lookups of tables and modes that there are, got table ", lookup.table, " and mode ",
        lookup.mode);
    int64_t& mode = modes[lookup.table];
    STD_TORCH_CHECK(mode < 0 || mode == lookup.mode, op, ": expected lookups of one mode for table ", lookup.table);
    mode = lookup.mode;
    STD_TORCH_CHECK(
        lookup.first_bag >= 0 && lookup.num_bags >= 0 && lookup.first_bag <= input.offsets.size - 1 - lookup.num_bags,
        op, ": expected lookups of the ", input.offsets.size - 1, " bags of offsets, got ", lookup.num_bags, " from ",
        lookup.first_bag);
    const int64_t dim = tables[lookup.table].dim;
    STD_TORCH_CHECK(
        lookup.num_bags == 0 || dim == 0 ||
            (lookup.start >= 0 && lookup.stride >= 0 && dim <= num_cells && lookup.start <= num_cells - dim &&
             (lookup.num_bags == 1 || lookup.stride <= (num_cells - dim - lookup.start) / (lookup.num_bags - 1))),
        op, ": expected lookups within the ", num_cells, " cells of the output, got start ", lookup.start,
        " and stride ", lookup.stride);
    STD_TORCH_CHECK(
        lookup.mode != maximum || input.values.size <= std::numeric_limits<int32_t>::max(), op,
        ": expected fewer than 2^31 values for maxima, got ", input.values.size);
  }
  return lookups;
}

const void* factors_of(const std::optional<Tensor>& per_sample_weights, const Input& input, DType cells) {
  if (!per_sample_weights) {
    return nullptr;
  }
  check_like(op, "per_sample_weights", *per_sample_weights, {input.values.size}, scalar_type(wide(cells)));
  return per_sample_weights->const_data_ptr();
}

int32_t* argmax_of(const std::optional<Tensor>& argmax, int64_t num_cells) {
  if (!argmax) {
    return nullptr;
  }
  check_like(op, "argmax", *argmax, {num_cells}, ScalarType::Int);
  return static_cast<int32_t*>(argmax->mutable_data_ptr());
}

void embedding_bag_collection_forward(
    Tensor output, std::optional<Tensor> argmax, std::vector<Tensor> weights, Tensor values, Tensor offsets,
    std::optional<Tensor> per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  const Input input = input_of(values, offsets, drop_invalid);
  const Cells cells = cells_of("output", output);
  const auto tables = tables_of(weights, cells.dtype);
  const auto checked = lookups_of(lookups, tables, input, output.numel());
  forward(
      tables, checked, input, factors_of(per_sample_weights, input, cells.dtype), cells,
      argmax_of(argmax, output.numel()), device.stream);
}

void embedding_bag_collection_quantized_forward(
    Tensor output, std::vector<Tensor> codes, std::vector<Tensor> scales, int64_t bits, Tensor values, Tensor offsets,
    std::optional<Tensor> per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  const Input input = input_of(values, offsets, drop_invalid);
  const Cells cells = cells_of("output", output);
  STD_TORCH_CHECK(bits == 8 || bits == 4, op, ": expected codes of 8 or 4 bits, got ", bits);
  STD_TORCH_CHECK(
      codes.size() == scales.size(), op, ": expected as many codes as scales, got ", codes.size(), " and ",
      scales.size());
  check_width("scales", DType::float32, cells.dtype);
  const bool floating = !codes.empty() && codes[0].scalar_type() == ScalarType::Float8_e4m3fn;
  std::vector<CodeTable> tables;
  for (size_t i = 0; i < codes.size(); ++i) {
    const Tensor& code = codes[i];
    STD_TORCH_CHECK(code.dim() == 2, op, ": expected codes of shape [R, D], got ", code.dim(), " dimensions");
    STD_TORCH_CHECK(
        code.scalar_type() == (floating ? ScalarType::Float8_e4m3fn : ScalarType::Byte) && !(floating && bits == 4), op,
        ": expected codes all of dtype uint8, or float8_e4m3fn and 8 bits");
    check_like(op, "scales", scales[i], {code.size(0), 2}, ScalarType::Float);
    tables.push_back(
        {static_cast<const uint8_t*>(code.const_data_ptr()), static_cast<const float*>(scales[i].const_data_ptr()),
         code.size(0), code.size(1) * 8 / bits, code.stride(0), code.stride(1)});
  }
  const Format format = floating ? Format::fp8 : bits == 4 ? Format::int4 : Format::int8;
  const auto checked = lookups_of(lookups, tables, input, output.numel());
  quantized_forward(
      tables, format, checked, input, factors_of(per_sample_weights, input, cells.dtype), cells, device.stream);
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
      const Tensor& grad_output, const std::optional<Tensor>& argmax, const std::vector<Tensor>& weights,
      const Tensor& values, const Tensor& offsets, const std::optional<Tensor>& per_sample_weights,
      const Tensor& lookups, bool drop_invalid, cudaStream_t stream)
      : like(grad_output), stream(stream) {
    const Input input = input_of(values, offsets, drop_invalid);
    const Cells cells = cells_of("grad_output", grad_output);
    terms = {
        cells, factors_of(per_sample_weights, input, cells.dtype), argmax_of(argmax, grad_output.numel()),
        input.offsets};
    sum_dtype = wide(cells.dtype);
    const auto tables = tables_of(weights, cells.dtype);
    const auto checked = lookups_of(lookups, tables, input, grad_output.numel());
    std::vector<int64_t> rows, dims;
    for (const Table& table : tables) {
      rows.push_back(table.rows);
      dims.push_back(table.dim);
    }
    plan = plan_gradients(checked, rows, dims, input.values.size, terms.per_sample_weights, bags_per_warp);
    for (const Round& round : plan.rounds) {
      STD_TORCH_CHECK(
          !round.is_maximum || argmax, op, ": expected argmax of lookups by maximum, got None");
    }
    sort(input);
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
  void write(std::vector<Tensor>& out, std::vector<Tensor>& rows) {
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
  void sort(const Input& input) {
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

std::vector<Tensor> embedding_bag_collection_backward(
    Tensor grad_output, std::optional<Tensor> argmax, std::vector<Tensor> weights, Tensor values, Tensor offsets,
    std::optional<Tensor> per_sample_weights, Tensor lookups, bool drop_invalid) {
  const OnDevice device(values);
  CollectionGradient gradient(
      grad_output, argmax, weights, values, offsets, per_sample_weights, lookups, drop_invalid, device.stream);
  std::vector<Tensor> out, rows;
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

std::vector<Tensor> embedding_bag_collection_backward_sparse(
    Tensor grad_output, std::optional<Tensor> argmax, std::vector<Tensor> weights, Tensor values, Tensor offsets,
    std::optional<Tensor> per_sample_weights, Tensor lookups, bool drop_invalid) {
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
  std::vector<Tensor> out, rows, result;
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
    Tensor grad_output, std::vector<Tensor> weights, Tensor values, Tensor offsets, Tensor lookups,
    bool drop_invalid) {
  const OnDevice device(values);
  const Input input = input_of(values, offsets, drop_invalid);
  const Cells cells = cells_of("grad_output", grad_output);
  const auto tables = tables_of(weights, cells.dtype);
  const auto checked = lookups_of(lookups, tables, input, grad_output.numel());
  Tensor grad = torch::stable::new_empty(grad_output, {&input.values.size, 1}, scalar_type(wide(cells.dtype)));
  backward_per_sample_weights(tables, checked, input, cells, grad.mutable_data_ptr(), device.stream);
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
    std::vector<Tensor> weights, std::vector<Tensor> states, Tensor step, Tensor grad_output,
    std::optional<Tensor> argmax, Tensor values, Tensor offsets, std::optional<Tensor> per_sample_weights,
    Tensor lookups, bool drop_invalid, int64_t optimizer, Tensor hyperparameters, int64_t seed,
    bool stochastic_rounding) {
  // Which states each optimizer has: whether one is a number for each row.
  static const std::vector<std::vector<bool>> states_of = {
      {}, {false}, {true}, {false, false}, {false, true}, {false, false}};
  const OnDevice device(values);
  STD_TORCH_CHECK(
      0 <= optimizer && optimizer < static_cast<int64_t>(states_of.size()), op, ": expected an optimizer below ",
      states_of.size(), ", got ", optimizer);
  const std::vector<bool>& rowwise = states_of[optimizer];
  STD_TORCH_CHECK(
      states.size() == rowwise.size() * weights.size(), op, ": expected ", rowwise.size(),
      " states for each of the weights, got ", states.size());
  STD_TORCH_CHECK(
      !step.is_cuda() && step.dim() == 0 && step.scalar_type() == ScalarType::Long, op,
      ": expected step an int64 scalar on the CPU");
  STD_TORCH_CHECK(
      !hyperparameters.is_cuda() && hyperparameters.numel() * sizeof(double) == sizeof(Hyperparameters) &&
          hyperparameters.is_contiguous() && hyperparameters.scalar_type() == ScalarType::Double,
      op, ": expected hyperparameters float64 [8], contiguous and on the CPU");
  Hyperparameters numbers;
  std::memcpy(&numbers, hyperparameters.const_data_ptr(), sizeof(numbers));

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
      for (size_t s = 0; s < rowwise.size(); ++s) {
        const Tensor& state = states[table * rowwise.size() + s];
        STD_TORCH_CHECK(
            state.dim() == (rowwise[s] ? 1 : 2), op, ": expected states of ",
            rowwise[s] ? "one dimension" : "two dimensions", ", got ", state.dim());
        updated.tensors[s + 1] = parameter_of("states", state, weight, gradient.sum_dtype);
      }
      for (size_t t = 0; t < rowwise.size() + 1; ++t) {
        all_aligned = all_aligned && ((t > 0 && rowwise[t - 1]) || is_aligned(updated.tensors[t], gradient.sum_dtype));
      }
      of_round.push_back(updated);
    }
    at.push_back(targets.add(of_round));
    aligned.push_back(all_aligned);
  }
  targets.send(grad_output, device.stream);
  int64_t* const count = static_cast<int64_t*>(step.mutable_data_ptr());
  ++*count;
  gradient.each_round([&](const Round& round, size_t i, const void* sums) {
    update(
        round, gradient.runs, sums, gradient.sum_dtype, targets.at<UpdatedTable>(at[i]),
        static_cast<int64_t>(round.tables.size()), aligned[i], static_cast<Optimizer>(optimizer), numbers, *count, seed,
        stochastic_rounding, device.stream);
  });
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
