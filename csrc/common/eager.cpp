#include "eager.h"

namespace recsys_ops::eager {
namespace {

const DLPackExchangeAPI* torch_tensors = nullptr;
PyObject* tensor_type = nullptr;
PyObject* parameter_type = nullptr;

}  // namespace

PyObject* bind(PyObject*, PyObject* types) {
  PyObject *tensor, *parameter;
  if (!PyArg_ParseTuple(types, "OO", &tensor, &parameter)) {
    return nullptr;
  }
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (!capsule) {
    return nullptr;
  }
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) {
    return nullptr;
  }
  if (api->header.version.major != DLPACK_MAJOR_VERSION || !api->dltensor_from_py_object_no_sync) {
    PyErr_SetString(PyExc_RuntimeError, "torch exchanges tensors by another version of DLPack");
    return nullptr;
  }
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  tensor_type = tensor;
  parameter_type = parameter;
  torch_tensors = api;
  Py_RETURN_NONE;
}

bool is_bound() { return torch_tensors != nullptr; }

bool view(PyObject* object, int most_dims, DLTensor* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && type != parameter_type) {
    return false;
  }
  if (torch_tensors->dltensor_from_py_object_no_sync(object, tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return 1 <= tensor->ndim && tensor->ndim <= most_dims && tensor->dtype.lanes == 1;
}

bool contiguous(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) {
      return false;
    }
    expected *= tensor.shape[d];
  }
  return true;
}

bool as_integers(const DLTensor& tensor, Integers* integers) {
  if (tensor.dtype.code != kDLInt || (tensor.dtype.bits != 32 && tensor.dtype.bits != 64) || !contiguous(tensor)) {
    return false;
  }
  *integers = {data(tensor), tensor.dtype.bits == 64, tensor.ndim == 1 ? tensor.shape[0] : tensor.shape[0] * tensor.shape[1]};
  return true;
}

bool as_dtype(const DLDataType& type, DType* dtype) {
  if (type.code == kDLBfloat && type.bits == 16) {
    *dtype = DType::bfloat16;
  } else if (type.code == kDLFloat && (type.bits == 16 || type.bits == 32 || type.bits == 64)) {
    *dtype = type.bits == 16 ? DType::float16 : type.bits == 32 ? DType::float32 : DType::float64;
  } else {
    return false;
  }
  return true;
}

PyObject* allocate(const DLTensor& like, std::initializer_list<int64_t> shape, void** memory) {
  DLTensor prototype = like;
  prototype.ndim = static_cast<int32_t>(shape.size());
  prototype.shape = const_cast<int64_t*>(shape.begin());
  prototype.strides = nullptr;
  prototype.byte_offset = 0;
  DLManagedTensorVersioned* managed = nullptr;
  const auto failed = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  void* tensor = nullptr;
  if (torch_tensors->managed_tensor_allocator(&prototype, &managed, nullptr, failed) != 0 ||
      torch_tensors->managed_tensor_to_py_object_no_sync(managed, &tensor) != 0) {
    return nullptr;
  }
  *memory = data(managed->dl_tensor);
  return static_cast<PyObject*>(tensor);
}

bool current_stream(const DLTensor& tensor, void** stream) {
  if (!torch_tensors->current_work_stream ||
      torch_tensors->current_work_stream(tensor.device.device_type, tensor.device.device_id, stream) != 0) {
    PyErr_Clear();
    return false;
  }
  return true;
}

}  // namespace recsys_ops::eager
