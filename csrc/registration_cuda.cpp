// The Python module recsys_ops._C_cuda: importing it gives the operators of registration.cpp their
// kernels for GPUs.
#include <Python.h>

#include "embedding_bag/embedding_bag_cuda.h"
#include "embedding_bag/embedding_bag_eager.h"

namespace {

constexpr int dlpack_cuda = 2;

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

bool bind_eager_devices() {
  namespace embedding_bag = recsys_ops::embedding_bag;
  PyObject* cpu = PyImport_ImportModule("recsys_ops._C");
  PyObject* capsule = PyCapsule_New(
      reinterpret_cast<void*>(embedding_bag::cuda::eager_forward), embedding_bag::eager_forward_capsule, nullptr);
  PyObject* bound = cpu && capsule ? PyObject_CallMethod(cpu, "bind_eager_device", "iO", dlpack_cuda, capsule) : nullptr;
  Py_XDECREF(bound);
  Py_XDECREF(capsule);
  Py_XDECREF(cpu);
  return bound != nullptr;
}

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() { return bind_eager_devices() ? PyModule_Create(&module) : nullptr; }
