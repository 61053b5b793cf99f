#include "plan.h"

#include <stdexcept>
#include <string>

namespace recsys_ops::hstu_attention {
namespace {

constexpr int64_t longest_part = 2048, most_parts = 8;  // of the keys of a sequence, backward
constexpr int64_t most_heads = 4;                       // of a task
constexpr int64_t held_bytes = 1 << 19;                 // by a forward task
constexpr int64_t tasks_per_thread = 4;

std::string text(int64_t value) { return std::to_string(value); }

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("hstu_attention: expected " + what); }

[[noreturn]] void refuse_cache(const std::string& what) {
  throw std::runtime_error("hstu_attention_cached: expected " + what);
}

void check_offsets(const std::string& name, const Integers& offsets, int64_t total) {
  if (offsets[0] != 0) {
    refuse(name + "[0] = 0, got " + text(offsets[0]));
  }
  for (int64_t i = 0; i + 1 < offsets.size; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      refuse(
          name + " that never decrease, got " + name + "[" + text(i) + "] = " + text(offsets[i]) + ", " + name + "[" +
          text(i + 1) + "] = " + text(offsets[i + 1]));
    }
  }
  if (const int64_t end = offsets[offsets.size - 1]; end != total) {
    refuse(name + "[-1] = " + text(total) + ", the number of rows, got " + text(end));
  }
}

void check_cache(const Attention& attention, const Sequence& sequence) {
  const int64_t cached = sequence.first_position();
  if (!attention.paged) {
    const int64_t start = attention.cache_starts[sequence.index];
    if (start < 0 || start + cached > attention.cache_rows) {
      refuse_cache(
          "the " + text(cached) + " cached tokens of sequence " + text(sequence.index) + " within the " +
          text(attention.cache_rows) + " rows of the cache, got cache_starts[" + text(sequence.index) + "] = " +
          text(start));
    }
    return;
  }
  const int64_t room = attention.pages_per_sequence * attention.page_size;
  if (cached > room) {
    refuse_cache(
        "at most " + text(room) + " cached tokens, as many as page_table has room for, got " + text(cached) +
        " in sequence " + text(sequence.index));
  }
  const int64_t num_pages = attention.cache_rows / attention.page_size;
  for (int64_t i = 0; i * attention.page_size < cached; ++i) {
    const int64_t page = attention.page_table[sequence.index * attention.pages_per_sequence + i];
    if (page < 0 || page >= num_pages) {
      refuse_cache(
          "page_table[" + text(sequence.index) + ", " + text(i) + "] in [0, " + text(num_pages) + "), got " +
          text(page));
    }
  }
}

// Heads that take the buckets of time, or a bias that they share, from one computation.
int64_t heads_together(const Attention& attention) {
  const bool is_shared = attention.time.data || attention.position.heads == 1;
  return is_shared ? std::min(attention.heads, most_heads) : 1;
}

// Pairs of a row and a key that it sees, about: as many for each as for the one in the middle.
double pairs(const Attention& attention, const Sequence& sequence, int64_t first_row, int64_t last_row) {
  if (sequence.length == 0) {
    return 0;
  }
  const int64_t middle = sequence.first_position() + (first_row + last_row) / 2;
  const Seen seen = seen_of(attention, sequence, std::min(middle, sequence.length - 1));
  const int64_t keys = std::max<int64_t>(seen.high - seen.low, 0) + seen.group_high - seen.group_low;
  return static_cast<double>(last_row - first_row) * static_cast<double>(keys + key_block / 2);
}

}  // namespace

std::vector<Sequence> sequences_of(const Attention& attention, int64_t num_rows, int64_t num_keys) {
  const bool has_queries = attention.query_offsets.data != nullptr;
  const Integers& queries = has_queries ? attention.query_offsets : attention.offsets;
  if (!attention.cached) {
    check_offsets("offsets", attention.offsets, num_keys);
  }
  if (has_queries || num_rows != num_keys) {
    check_offsets(attention.cached ? "offsets" : "query_offsets", queries, num_rows);
  }
  std::vector<Sequence> sequences(attention.num_sequences);
  for (int64_t b = 0; b < attention.num_sequences; ++b) {
    Sequence& sequence = sequences[b];
    sequence.index = b;
    sequence.first_row = queries[b];
    sequence.rows = queries[b + 1] - queries[b];
    sequence.first_token = attention.offsets[b];
    sequence.length = attention.offsets[b + 1] - attention.offsets[b];
    const std::string here = text(b);
    if (sequence.rows > sequence.length) {
      if (attention.cached) {
        refuse_cache(
            "cache_lengths of at least 0, got cache_lengths[" + here + "] = " +
            text(sequence.length - sequence.rows));
      }
      refuse(
          "no more queries than keys, got " + text(sequence.rows) + " queries and " + text(sequence.length) +
          " keys in sequence " + here);
    }
    const int64_t targets = attention.num_targets.data ? attention.num_targets[b] : 0;
    if (targets < 0 || targets > sequence.length) {
      refuse("num_targets in [0, " + text(sequence.length) + "] for sequence " + here + ", got " + text(targets));
    }
    const int64_t contextual = attention.num_contextual.data ? attention.num_contextual[b] : 0;
    if (contextual < 0) {
      refuse("num_contextual of at least 0 for sequence " + here + ", got " + text(contextual));
    }
    sequence.targets = targets;
    sequence.contextual = std::min(contextual, sequence.length - targets);
    if (attention.cached) {
      check_cache(attention, sequence);
    }
  }
  return sequences;
}

std::vector<Task> forward_tasks(
    const Attention& attention, const std::vector<Sequence>& sequences, int64_t threads) {
  const int64_t heads = attention.heads, wanted = tasks_per_thread * threads;
  // What a task holds of q and of sums should stay in second-level cache.
  const int64_t together = heads_together(attention);
  const int64_t row_size = together * (attention.dim + attention.value_dim) * static_cast<int64_t>(sizeof(float));
  int64_t rows = std::clamp<int64_t>(held_bytes / std::max<int64_t>(row_size, 1) / key_block * key_block, key_block, row_block);
  const auto count = [&] {
    int64_t blocks = 0;
    for (const Sequence& sequence : sequences) {
      blocks += (sequence.rows + rows - 1) / rows;
    }
    return blocks * (heads / std::max<int64_t>(together, 1));
  };
  while (rows > key_block && count() < wanted) {
    rows /= 2;
  }
  std::vector<Task> tasks;
  for (const Sequence& sequence : sequences) {
    for (int64_t first = 0; first < sequence.rows; first += rows) {
      const int64_t last = std::min(first + rows, sequence.rows);
      const double cost = pairs(attention, sequence, first, last);
      for (int64_t head = 0; head < heads; head += together) {
        const int64_t last_head = std::min(head + together, heads);
        tasks.push_back({&sequence, head, last_head, first, last, cost * static_cast<double>(last_head - head)});
      }
    }
  }
  return tasks;
}

std::vector<Task> backward_tasks(const Attention& attention, const std::vector<Sequence>& sequences) {
  const int64_t heads = attention.heads, together = heads_together(attention);
  std::vector<Task> tasks;
  for (const Sequence& sequence : sequences) {
    const int64_t length = sequence.length;
    const int64_t parts = std::min((length + longest_part - 1) / longest_part, most_parts);
    const int64_t blocks = (length + key_block - 1) / key_block;
    for (int64_t head = 0; head < heads; head += together) {
      const int64_t last_head = std::min(head + together, heads);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = blocks * part / parts * key_block;
        const int64_t last = std::min(blocks * (part + 1) / parts * key_block, length);
        const double rows = static_cast<double>(
            attention.causal ? std::min(sequence.rows, length - (first + last) / 2) : sequence.rows);
        const double of_sequence = pairs(attention, sequence, 0, sequence.rows);
        const double cost = std::min(static_cast<double>(last - first) * rows, of_sequence);
        tasks.push_back({&sequence, head, last_head, first, last, cost * static_cast<double>(last_head - head)});
      }
    }
  }
  return tasks;
}

}  // namespace recsys_ops::hstu_attention
