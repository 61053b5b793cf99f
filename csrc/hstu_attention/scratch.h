// Memory of one thread's tasks; included by sources compiled once per SIMD level.
#pragma once

#include <type_traits>

#include "attention_tasks.h"

namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL {

// Memory of a task, in pieces.
class Pieces {
 public:
  explicit Pieces(Scratch& scratch) : scratch(scratch) {}

  // Says how much is needed before any is taken.
  template <class E>
  void want(int64_t count) {
    wanted += rounded(count * static_cast<int64_t>(sizeof(E)));
  }

  void allocate() {
    if (static_cast<int64_t>(scratch.size()) < wanted + alignment) {
      scratch.resize(wanted + alignment);
    }
    next = reinterpret_cast<char*>(rounded(reinterpret_cast<int64_t>(scratch.data())));
  }

  template <class E>
  E* take(int64_t count) {
    char* piece = next;
    next += rounded(count * static_cast<int64_t>(sizeof(E)));
    return reinterpret_cast<E*>(piece);
  }

 private:
  static constexpr int64_t alignment = 64;
  static int64_t rounded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

  Scratch& scratch;
  int64_t wanted = 0;
  char* next = nullptr;
};

// Takes the same pieces twice: first to count, then for real.
template <class F>
void with_memory(Scratch& scratch, const F& f) {
  Pieces pieces(scratch);
  f([&](auto*& piece, int64_t count) { pieces.want<std::remove_reference_t<decltype(*piece)>>(count); });
  pieces.allocate();
  f([&](auto*& piece, int64_t count) { piece = pieces.take<std::remove_reference_t<decltype(*piece)>>(count); });
}

}  // namespace recsys_ops::hstu_attention::RECSYS_OPS_SIMD_LEVEL
