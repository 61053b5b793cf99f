// Python's tensors as kernels see them, without PyTorch's dispatcher: for small calls.
#pragma once

#include <Python.h>

// The DLPack header is plain C; only its guard takes it for something unstable.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <initializer_list>

#include "dtype.h"

namespace recsys_ops::eager {

// (torch.Tensor, torch.nn.Parameter): the types whose objects are read.
PyObject* bind(PyObject* self, PyObject* types);
bool is_bound();

// A dense tensor of one dimension up to so many, whose fields stay valid while the object does.
bool view(PyObject* object, int most_dims, DLTensor* tensor);

// False where the tensor is none of these.
bool as_integers(const DLTensor& tensor, Integers* integers);
bool as_dtype(const DLDataType& type, DType* dtype);

bool contiguous(const DLTensor& tensor);

inline bool same_device(const DLTensor& a, const DLTensor& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

inline char* data(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// A new tensor with the device and the dtype of another, and its memory; null with an exception set.
PyObject* allocate(const DLTensor& like, std::initializer_list<int64_t> shape, void** memory);

// What the tensor's device works on; false where that is not to be had.
bool current_stream(const DLTensor& tensor, void** stream);

}  // namespace recsys_ops::eager
