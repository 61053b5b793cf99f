// Functions of the Python module recsys_ops._C that belong to the embedding bag.
#pragma once

#include <Python.h>

namespace recsys_ops::embedding_bag {

// (torch.Tensor, torch.nn.Parameter): the types whose objects eager_forward reads.
PyObject* bind_eager(PyObject* self, PyObject* types);

// Sum or mean of bags without gradients, or None where an argument is not the plain case:
// then the caller checks it, and takes the way of torch.ops.
PyObject* eager_forward(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recsys_ops::embedding_bag
