// Tiles of tensors that sm_90 brings to shared memory by itself, and barriers in shared memory that tell
// when they are there. A tile is rows of 64 elements of 16 bits, whose 128 bytes are swizzled: the 16
// bytes of column group c of row r stand where those of c ^ (r % 8) would. See the PTX manual, "Tensor
// memory access" and "mbarrier".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace recsys_ops::cuda {

constexpr int tile_columns = 64;
constexpr int tile_alignment = 1024;  // of tiles in shared memory, in bytes: their swizzle repeats

#if defined(__CUDACC__)
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#else
inline unsigned shared_address(const void* pointer) { return cuda_host::shared_offset(pointer); }
#endif

// Threads arrive and bytes come in; when those expected have, a phase ends and the next begins.
// A wait is for the end of a phase, by its parity: 0 for the first.
class SharedBarrier {
 public:
  // By one thread; others may use it after fence_new_barriers and a barrier of the block.
  __device__ void begin(int arrivals) {
#if !defined(__CUDACC__)
    cuda_host::barrier_begin(&state, arrivals);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals) : "memory");
#endif
  }

  __device__ void arrive() {
#if !defined(__CUDACC__)
    cuda_host::barrier_arrive(&state, 0);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
#endif
  }

  // This phase ends not before so many bytes more have come.
  __device__ void arrive_and_expect(int bytes) {
#if !defined(__CUDACC__)
    cuda_host::barrier_arrive(&state, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
#endif
  }

  __device__ void wait(unsigned parity) {
#if !defined(__CUDACC__)
    cuda_host::barrier_wait(&state, parity);
#else
    unsigned done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(&state)), "r"(parity)
          : "memory");
    }
#endif
  }

  // A tile of as many rows as the map says, from this place of a tensor [rows, heads, columns]; what is
  // outside of the tensor comes as zeros. By one thread.
  __device__ void fetch(void* tile, const CUtensorMap& map, int column, int head, int row) {
#if !defined(__CUDACC__)
    cuda_host::fetch_tile(&state, tile, map, column, head, row);
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(tile)),
        "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(head), "r"(row), "r"(shared_address(&state))
        : "memory");
#endif
  }

 private:
  uint64_t state;
};

__device__ inline void fence_new_barriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Before tiles that threads wrote to are multiplied or fetched anew.
__device__ inline void fence_tiles() {
#if !defined(__CUDACC__)
  cuda_host::fence_tiles();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Waits until `threads` threads are at the barrier of this number, from 1 to 15.
__device__ inline void synchronize(int number, int threads) {
#if !defined(__CUDACC__)
  cuda_host::synchronize(number, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#endif
}

// Gives a warpgroup that needs few registers only so many, and those that need many the others'.
template <int REGISTERS>
__device__ void take_fewer_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}
template <int REGISTERS>
__device__ void take_more_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

// Describes tiles of a tensor [rows, heads, columns] of 16-bit elements, whose strides are in bytes and
// multiples of 16; false where the driver will not have it.
bool describe_tiles(
    CUtensorMap& map, const void* data, bool is_bfloat16, int64_t rows, int64_t heads, int64_t columns,
    int64_t row_stride, int64_t head_stride, int rows_of_tile);

// Whether the current device is of compute capability 9.0, and there is code for it here.
bool has_tensor_tiles();

}  // namespace recsys_ops::cuda
