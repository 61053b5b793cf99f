// Shared memory whose size the launch tells.
#pragma once

#include <cuda_runtime.h>

// Declares NAME, a pointer to it; aligned to 16 bytes.
#ifndef RECSYS_OPS_DYNAMIC_SHARED
#define RECSYS_OPS_DYNAMIC_SHARED(T, NAME)                  \
  extern __shared__ __align__(16) unsigned char NAME##_bytes[]; \
  T* NAME = reinterpret_cast<T*>(NAME##_bytes)
#endif
