// Lets a test bind the eager forward of CUDA to tensors on the CPU.
#include "embedding_bag/embedding_bag_cuda.h"

extern "C" __attribute__((visibility("default"))) void* embedding_bag_eager_forward() {
  return reinterpret_cast<void*>(recsys_ops::embedding_bag::cuda::eager_forward);
}
