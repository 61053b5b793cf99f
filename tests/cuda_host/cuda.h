// The part of CUDA's driver that describes tiles of tensors, and what sm_90 does with them; see
// common/cuda/tensor_tiles.cuh.
#pragma once

#include <cuda_runtime.h>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  const char* data;
  cuuint64_t sizes[3];    // columns, heads, rows
  cuuint64_t strides[3];  // in bytes
  cuuint32_t rows_of_tile;
  char opaque[68];
};
static_assert(sizeof(CUtensorMap) == 128, "as CUDA's own");

CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* tile, const cuuint32_t* steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, int, cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Of the GPU that the CPU stands for.
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}

namespace cuda_host {

// Addresses in shared memory count from the start of what is dynamic.
inline unsigned shared_offset(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - static_cast<const char*>(dynamic_shared());
  if (offset < 0 || static_cast<size_t>(offset) >= dynamic_shared_bytes()) {
    fail("an address that is not in dynamic shared memory");
  }
  return static_cast<unsigned>(offset);
}

// Where the swizzle puts the byte at an offset.
inline unsigned swizzled(unsigned offset) { return offset ^ (offset >> 7 & 7) << 4; }

void barrier_begin(void* barrier, int arrivals);
void barrier_arrive(void* barrier, int bytes);
void barrier_wait(void* barrier, unsigned parity);
void fetch_tile(void* barrier, void* tile, const CUtensorMap& map, int column, int head, int row);
void fence_tiles();

}  // namespace cuda_host
