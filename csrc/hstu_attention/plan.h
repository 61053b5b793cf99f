// The sequences of a batch, once their values are known to be good, and the tasks that they make.
#pragma once

#include <vector>

#include "attention_tasks.h"

namespace recsys_ops::hstu_attention {

// Throws std::runtime_error for the first value that the contract refuses, in the words of reference.py.
std::vector<Sequence> sequences_of(const Attention& attention, int64_t num_rows, int64_t num_keys);

// Blocks of rows of q, for each head, or for several of which something is computed together; enough
// for a number of threads.
std::vector<Task> forward_tasks(
    const Attention& attention, const std::vector<Sequence>& sequences, int64_t threads);

// Keys, all of a sequence or, where it is long, parts of them, for each head or for several. Tasks of one
// sequence and head follow each other. They do not depend on the number of threads.
std::vector<Task> backward_tasks(const Attention& attention, const std::vector<Sequence>& sequences);

}  // namespace recsys_ops::hstu_attention
