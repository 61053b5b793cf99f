// Launchers of HSTU attention on the CPU: plain pointers and sizes.
#pragma once

#include "attention_tasks.h"

namespace recsys_ops::hstu_attention {

// output [M, H, V], contiguous. Throws std::runtime_error for values that the contract refuses.
void forward(const Attention& attention, int64_t num_rows, int64_t num_keys, void* output);

// Writes the gradients of q, k, v, and of the weights of the bias.
void backward(const Attention& attention, const Gradients& gradients, int64_t num_rows, int64_t num_keys);

}  // namespace recsys_ops::hstu_attention
