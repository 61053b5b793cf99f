// Functions of the Python module recsys_ops._C that belong to embedding bag collections.
#pragma once

#include <Python.h>

namespace recsys_ops::embedding_bag_collection {

// Pools bags of tables, quantised or not, on the CPU without gradients; or gives None where an argument
// is not the plain case: then the caller checks it, and takes the way of torch.ops.
PyObject* eager_forward(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recsys_ops::embedding_bag_collection
