// Asynchronous copies to shared memory: they arrive as late as they may, when they are waited for.
#pragma once

#include <cuda_runtime.h>

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeroed = 0) {
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    cuda_host::fail("__pipeline_memcpy_async of " + std::to_string(bytes) + " bytes: expected 4, 8 or 16");
  }
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    cuda_host::fail("__pipeline_memcpy_async of " + std::to_string(bytes) + " bytes that are not aligned to that");
  }
  cuda_host::copy_later({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeroed});
}

inline void __pipeline_commit() { cuda_host::commit_copies(); }

inline void __pipeline_wait_prior(size_t still_on_their_way) {
  // Here, where the sanitizers see the accesses.
  cuda_host::wait_for_copies(still_on_their_way, [](cuda_host::Copy copy) {
    for (size_t i = 0; i < copy.bytes; ++i) {
      copy.to[i] = i < copy.bytes - copy.zeroed ? copy.from[i] : 0;
    }
  });
}
