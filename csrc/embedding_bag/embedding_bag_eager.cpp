// The forward from Python objects, past the dispatcher: for small calls that need no gradient.
#include "embedding_bag_eager.h"

#include <exception>
#include <vector>

#include "../common/eager.h"
#include "embedding_bag.h"

namespace recsys_ops::embedding_bag {
namespace {

using namespace recsys_ops::eager;

void forward_on_cpu(
    const Table& table, const Bags& bags, const void* per_sample_weights, bool mean, void* out, int, void*) {
  forward(mean ? Mode::mean : Mode::sum, table, bags, per_sample_weights, out, nullptr);
}

EagerForward on_cpu = forward_on_cpu, on_cuda = nullptr;

EagerForward* forward_on(int device_type) {
  return device_type == kDLCPU ? &on_cpu : device_type == kDLCUDA ? &on_cuda : nullptr;
}

// weight, input, offsets or None, per_sample_weights or None, and as integers mean,
// include_last_offset, padding_idx, drop_invalid
enum Argument { weight, input, offsets, factors, mean, include_last_offset, padding_idx, drop_invalid, argument_count };

}  // namespace

PyObject* bind_eager_device(PyObject*, PyObject* arguments) {
  int device_type;
  PyObject* capsule;
  if (!PyArg_ParseTuple(arguments, "iO", &device_type, &capsule)) {
    return nullptr;
  }
  void* forward = PyCapsule_GetPointer(capsule, eager_forward_capsule);
  if (!forward) {
    return nullptr;
  }
  if (!forward_on(device_type)) {
    return PyErr_Format(PyExc_ValueError, "embedding_bag: expected a CPU or CUDA device, got DLPack's %d", device_type);
  }
  *forward_on(device_type) = reinterpret_cast<EagerForward>(forward);
  Py_RETURN_NONE;
}

PyObject* eager_forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != argument_count) {
    return PyErr_Format(PyExc_TypeError, "embedding_bag_eager: expected %d arguments, got %zd", argument_count, count);
  }
  DLTensor rows, ids, starts, weights;
  Table table;
  Bags bags;
  if (!is_bound() || !view(given[weight], 2, &rows) || rows.ndim != 2 || !as_dtype(rows.dtype, &table.dtype) ||
      !view(given[input], 2, &ids) || !as_integers(ids, &bags.indices) || !same_device(ids, rows)) {
    Py_RETURN_NONE;
  }
  EagerForward* const on_device = forward_on(rows.device.device_type);
  if (!on_device || !*on_device) {
    Py_RETURN_NONE;
  }
  table.data = data(rows);
  table.rows = rows.shape[0];
  table.dim = rows.shape[1];
  table.row_stride = rows.strides[0];
  table.column_stride = rows.strides[1];

  const bool last = PyObject_IsTrue(given[include_last_offset]) == 1;
  std::vector<int64_t> row_starts;
  if (ids.ndim == 2 && given[offsets] == Py_None && rows.device.device_type == kDLCPU) {
    row_starts.resize(ids.shape[0]);
    for (int64_t bag = 0; bag < ids.shape[0]; ++bag) {
      row_starts[bag] = bag * ids.shape[1];
    }
    bags.offsets = {row_starts.data(), true, ids.shape[0]};
    bags.count = ids.shape[0];
  } else if (
      ids.ndim == 1 && view(given[offsets], 1, &starts) && as_integers(starts, &bags.offsets) &&
      same_device(starts, rows) && bags.offsets.size >= last) {
    bags.count = bags.offsets.size - last;
  } else {
    Py_RETURN_NONE;
  }
  bags.num_embeddings = table.rows;
  bags.padding_idx = given[padding_idx] == Py_None ? -1 : PyLong_AsLongLong(given[padding_idx]);
  bags.drop_invalid = PyObject_IsTrue(given[drop_invalid]) == 1;
  if (PyErr_Occurred() || bags.padding_idx >= table.rows || bags.padding_idx < -1 ||
      (bags.padding_idx == -1 && given[padding_idx] != Py_None)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const void* per_sample_weights = nullptr;
  if (given[factors] != Py_None) {
    DType dtype;
    if (!view(given[factors], 2, &weights) || !as_dtype(weights.dtype, &dtype) || dtype != table.dtype ||
        !contiguous(weights) || !same_device(weights, rows) || weights.ndim != ids.ndim || weights.shape[0] != ids.shape[0] ||
        (ids.ndim == 2 && weights.shape[1] != ids.shape[1])) {
      Py_RETURN_NONE;
    }
    per_sample_weights = data(weights);
  }

  void* stream = nullptr;
  if (rows.device.device_type != kDLCPU && !current_stream(rows, &stream)) {
    Py_RETURN_NONE;
  }
  void* memory = nullptr;
  PyObject* output = allocate(rows, {bags.count, table.dim}, &memory);
  if (!output) {
    return nullptr;
  }
  const bool is_mean = PyObject_IsTrue(given[mean]) == 1;
  PyThreadState* thread = PyEval_SaveThread();
  try {
    (*on_device)(table, bags, per_sample_weights, is_mean, memory, rows.device.device_id, stream);
  } catch (const std::exception& error) {
    PyEval_RestoreThread(thread);
    Py_DECREF(output);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  PyEval_RestoreThread(thread);
  return output;
}

}  // namespace recsys_ops::embedding_bag
