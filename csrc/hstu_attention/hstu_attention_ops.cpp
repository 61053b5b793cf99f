// Checks and allocation for torch.ops.recsys_ops.hstu_attention_* on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "hstu_attention.h"

namespace recsys_ops::hstu_attention {
namespace {

Tensor hstu_attention_forward(
    Tensor q, Tensor k, Tensor v, OptionalTensor query_offsets, Tensor offsets, OptionalTensor row_scale,
    OptionalTensor num_contextual, OptionalTensor num_targets, OptionalTensor intervals,
    OptionalTensor position_weight, OptionalTensor time_weight, OptionalTensor timestamps, OptionalTensor boundaries,
    OptionalTensor dropout_seed, double scale, double alpha, bool causal, int64_t window, int64_t target_group_size,
    int64_t full_window_tail, bool next_timestamps, double dropout) {
  const Attention attention = attention_of(
      q, k, v, query_offsets, offsets, row_scale, num_contextual, num_targets, intervals, position_weight, time_weight,
      timestamps, boundaries, dropout_seed, scale, alpha, causal, window, target_group_size, full_window_tail,
      next_timestamps, dropout);
  Tensor output = new_empty(q, {q.size(0), attention.heads, attention.value_dim});
  forward(attention, q.size(0), k.size(0), output.mutable_data_ptr());
  return output;
}

std::tuple<Tensor, Tensor> hstu_attention_backward(
    Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_output, Tensor q, Tensor k, Tensor v,
    OptionalTensor query_offsets, Tensor offsets, OptionalTensor row_scale, OptionalTensor num_contextual,
    OptionalTensor num_targets, OptionalTensor intervals, OptionalTensor position_weight, OptionalTensor time_weight,
    OptionalTensor timestamps, OptionalTensor boundaries, OptionalTensor dropout_seed, double scale, double alpha,
    bool causal, int64_t window, int64_t target_group_size, int64_t full_window_tail, bool next_timestamps,
    double dropout) {
  const Attention attention = attention_of(
      q, k, v, query_offsets, offsets, row_scale, num_contextual, num_targets, intervals, position_weight, time_weight,
      timestamps, boundaries, dropout_seed, scale, alpha, causal, window, target_group_size, full_window_tail,
      next_timestamps, dropout);
  const ScalarType dtype = q.scalar_type();
  const Weights &position = attention.position, &time = attention.time;
  Tensor grad_position = new_empty(q, {position.heads, position.size}, sum_type(dtype));
  Tensor grad_time = new_empty(q, {time.heads, time.size}, sum_type(dtype));
  const Gradients gradients = {
      tensor3_of("grad_output", grad_output, dtype),
      tensor3_of("grad_q", grad_q, dtype),
      tensor3_of("grad_k", grad_k, dtype),
      tensor3_of("grad_v", grad_v, dtype),
      {grad_position.mutable_data_ptr(), position.heads, position.size},
      {grad_time.mutable_data_ptr(), time.heads, time.size}};
  const Tensor* const like[] = {&q, &k, &v};
  const Tensor* const given[] = {&grad_q, &grad_k, &grad_v};
  for (int i = 0; i < 3; ++i) {
    for (int d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(
          given[i]->size(d) == like[i]->size(d), op, ": expected grad_q, grad_k and grad_v of the shapes of q, k and v");
    }
  }
  backward(attention, gradients, q.size(0), k.size(0));
  return {grad_position, grad_time};
}

Tensor hstu_attention_cached_forward(
    Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, OptionalTensor key_scales,
    OptionalTensor value_scales, OptionalTensor cache_starts, OptionalTensor page_table, Tensor query_offsets,
    Tensor offsets, OptionalTensor row_scale, OptionalTensor num_contextual, OptionalTensor num_targets,
    OptionalTensor intervals, OptionalTensor position_weight, OptionalTensor time_weight, OptionalTensor timestamps,
    OptionalTensor boundaries, double scale, double alpha, bool causal, int64_t window, int64_t target_group_size,
    int64_t full_window_tail, bool next_timestamps) {
  Attention attention = attention_of(
      q, k, v, query_offsets, offsets, row_scale, num_contextual, num_targets, intervals, position_weight, time_weight,
      timestamps, boundaries, std::nullopt, scale, alpha, causal, window, target_group_size, full_window_tail,
      next_timestamps, 0);
  add_cache(attention, q, key_cache, value_cache, key_scales, value_scales, cache_starts, page_table);
  Tensor output = new_empty(q, {q.size(0), attention.heads, attention.value_dim});
  forward(attention, q.size(0), k.size(0), output.mutable_data_ptr());
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(recsys_ops, CPU, m) {
  m.impl("hstu_attention_forward", TORCH_BOX(&hstu_attention_forward));
  m.impl("hstu_attention_backward", TORCH_BOX(&hstu_attention_backward));
  m.impl("hstu_attention_cached_forward", TORCH_BOX(&hstu_attention_cached_forward));
}

}  // namespace
}  // namespace recsys_ops::hstu_attention
