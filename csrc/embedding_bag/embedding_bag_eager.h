// Functions of the Python module recsys_ops._C that belong to the embedding bag.
#pragma once

#include <Python.h>

#include "bags.h"

namespace recsys_ops::embedding_bag {

// Pools bags on one kind of device, on one of these and in order with what its stream has to do.
using EagerForward = void (*)(
    const Table& table, const Bags& bags, const void* per_sample_weights, bool mean, void* out, int device,
    void* stream);
inline constexpr const char* eager_forward_capsule = "recsys_ops.embedding_bag.EagerForward";

// (DLPack's number of a kind of device, capsule of an EagerForward): who pools bags there.
PyObject* bind_eager_device(PyObject* self, PyObject* arguments);

// Sum or mean of bags without gradients, or None where an argument is not the plain case:
// then the caller checks it, and takes the way of torch.ops.
PyObject* eager_forward(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

}  // namespace recsys_ops::embedding_bag
