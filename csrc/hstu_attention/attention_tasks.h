// Attention of one head of one sequence, block by block: one set of kernels per SIMD level.
#pragma once

#include <vector>

#include "../common/simd_level.h"
#include "attention.h"

namespace recsys_ops::hstu_attention {

constexpr int64_t row_block = 256;  // rows of q that a forward task takes at most
constexpr int64_t key_block = 64;   // keys whose scores are held at once

// The rows [first, last) of a sequence's queries, or backward the keys, of some heads. What heads have in
// common is computed once for all of a task.
struct Task {
  const Sequence* sequence;
  int64_t first_head, last_head;
  int64_t first, last;
  double cost;
};

// What tasks of one thread need, kept from one to the next.
using Scratch = std::vector<char>;

// What the backward writes, and what its tasks add up before.
struct Gradients {
  Tensor3 grad_output;
  Tensor3 q, k, v;  // written
  Weights position, time;
};

// What one backward task leaves for others to add up, in the type that sums are formed in.
struct Parts {
  void* grad_q;    // [heads of the task, m, D] where other tasks have the same queries, or null
  void* position;  // [1 or heads of the task, num_distances], or null
  int64_t first_distance, num_distances;
  void* time;  // [1 or heads of the task, T], or null
};

template <class A>
struct AttentionTasks {
  using Forward = void (*)(const Attention& attention, const Task& task, void* output, Scratch& scratch);
  using Backward = void (*)(
      const Attention& attention, const Gradients& gradients, const Task& task, const Parts& parts, Scratch& scratch);

  // Writes output [M, H, V], contiguous.
  Forward forward;

  // Writes the gradients of the task's keys, and of q unless parts.grad_q takes them.
  Backward backward;

  // The same of bfloat16, by products of pairs; null where the level has none.
  Forward forward_of_pairs;
  Backward backward_of_pairs;
};

RECSYS_OPS_DECLARE_FOR_LEVELS(AttentionTasks, attention_tasks)

}  // namespace recsys_ops::hstu_attention
