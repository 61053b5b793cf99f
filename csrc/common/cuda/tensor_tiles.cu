#include "tensor_tiles.cuh"

#include "launch.h"

namespace recsys_ops::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver, which this library is not linked to.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

bool describe_tiles(
    CUtensorMap& map, const void* data, bool is_bfloat16, int64_t rows, int64_t heads, int64_t columns,
    int64_t row_stride, int64_t head_stride, int rows_of_tile) {
  static const Encode encode = find_encode();
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(head_stride), static_cast<cuuint64_t>(row_stride)};
  const cuuint32_t tile[] = {tile_columns, 1, static_cast<cuuint32_t>(rows_of_tile)}, steps[] = {1, 1, 1};
  return encode &&
         encode(
             &map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
             const_cast<void*>(data), sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool has_tensor_tiles() {
#if defined(RECSYS_OPS_SM90A)
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;
#else
  return false;
#endif
}

}  // namespace recsys_ops::cuda
