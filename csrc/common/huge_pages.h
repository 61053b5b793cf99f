// Large pages for large memory: rows at random addresses then miss the TLB less often.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace recsys_ops {

// Asks for them where they are given on request, for whole pages within the memory; to be called
// before its first use. Nothing depends on the answer.
inline void ask_for_huge_pages(uintptr_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uint64_t page = uint64_t{1} << 21;
  const uint64_t first = (address + page - 1) / page * page, last = (address + bytes) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace recsys_ops
