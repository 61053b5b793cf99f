// The forward from Python objects, past the dispatcher: for small calls that need no argmax.
#include "embedding_bag_collection_eager.h"

#include <exception>

#include "../common/eager.h"
#include "embedding_bag_collection.h"

namespace recsys_ops::embedding_bag_collection {
namespace {

using namespace recsys_ops::eager;

// A list of weights; or of codes, with a list of scales and the bits of a code, else None and 0; values,
// offsets, per_sample_weights or None, lookups, the elements of the output, its dtype as an integer,
// drop_invalid as an integer, and the output or None
enum Argument {
  weights, scales, bits, values, offsets, factors, lookups, size, output_dtype, drop_invalid, output, argument_count
};

const DLDataType dlpack_types[] = {{kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}};

bool read_tables(PyObject* list, DType dtype, std::vector<Table>* tables) {
  const Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : 0;
  tables->reserve(count);
  for (Py_ssize_t t = 0; t < count; ++t) {
    DLTensor weight;
    DType own;
    if (!view(PyList_GetItem(list, t), 2, &weight) || weight.ndim != 2 || weight.device.device_type != kDLCPU ||
        !as_dtype(weight.dtype, &own) || (own == DType::float64) != (dtype == DType::float64)) {
      return false;
    }
    tables->push_back({own, data(weight), weight.shape[0], weight.shape[1], weight.strides[0], weight.strides[1]});
  }
  return count > 0;
}

// All of one type of codes.
bool read_codes(PyObject* list, PyObject* of_rows, long bits, CodeType* type, std::vector<Table>* tables) {
  const Py_ssize_t count = PyList_Check(list) ? PyList_Size(list) : 0;
  if (!PyList_Check(of_rows) || PyList_Size(of_rows) != count || (bits != 8 && bits != 4)) {
    return false;
  }
  tables->reserve(count);
  for (Py_ssize_t t = 0; t < count; ++t) {
    DLTensor codes, pairs;
    if (!view(PyList_GetItem(list, t), 2, &codes) || !view(PyList_GetItem(of_rows, t), 2, &pairs) || codes.ndim != 2 ||
        pairs.ndim != 2 || pairs.shape[0] != codes.shape[0] || pairs.shape[1] != 2 || !contiguous(codes) ||
        !contiguous(pairs) || codes.device.device_type != kDLCPU || !same_device(pairs, codes) ||
        codes.dtype.bits != 8 || pairs.dtype.code != kDLFloat || pairs.dtype.bits != 32) {
      return false;
    }
    const bool is_float8 = codes.dtype.code == kDLFloat8_e4m3fn && bits == 8;
    const CodeType own = is_float8 ? CodeType::float8 : bits == 8 ? CodeType::int8 : CodeType::int4;
    if ((!is_float8 && codes.dtype.code != kDLUInt) || (t > 0 && own != *type)) {
      return false;
    }
    *type = own;
    const int64_t width = codes.shape[1];
    tables->push_back(
        {DType::float32, data(codes), codes.shape[0], width * 8 / bits, width, 1,
         reinterpret_cast<const float*>(data(pairs))});
  }
  return count > 0;
}

}  // namespace

PyObject* eager_forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != argument_count) {
    return PyErr_Format(
        PyExc_TypeError, "embedding_bag_collection_eager: expected %d arguments, got %zd", argument_count, count);
  }
  const bool is_quantized = given[scales] != Py_None;
  const long number = PyLong_AsLong(given[output_dtype]), code_bits = PyLong_AsLong(given[bits]);
  const int64_t cells = PyLong_AsLongLong(given[size]);
  if (number < 0 || number > 3 || cells < 0 || (is_quantized && static_cast<DType>(number) == DType::float64)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const DType dtype = static_cast<DType>(number);
  std::vector<Table> tables;
  CodeType codes = CodeType::int8;
  DLTensor ids, starts, rows;
  Input input;
  if (!is_bound() || !view(given[values], 1, &ids) || !as_integers(ids, &input.values) ||
      ids.device.device_type != kDLCPU || !view(given[offsets], 1, &starts) || !as_integers(starts, &input.offsets) ||
      !same_device(starts, ids) || input.offsets.size == 0 || !view(given[lookups], 2, &rows) || rows.ndim != 2 ||
      rows.shape[1] != sizeof(Lookup) / sizeof(int64_t) || rows.dtype.bits != 64 || !contiguous(rows) ||
      rows.device.device_type != kDLCPU ||
      !(is_quantized ? read_codes(given[weights], given[scales], code_bits, &codes, &tables)
                     : read_tables(given[weights], dtype, &tables))) {
    Py_RETURN_NONE;
  }
  input.lookups = reinterpret_cast<const Lookup*>(data(rows));
  input.num_lookups = rows.shape[0];
  input.drop_invalid = PyObject_IsTrue(given[drop_invalid]) == 1;
  Factors weighted = {dtype == DType::float64 ? DType::float64 : DType::float32, nullptr};
  if (given[factors] != Py_None) {
    DLTensor weight;
    DType own;
    if (!view(given[factors], 1, &weight) || !as_dtype(weight.dtype, &own) || own != weighted.dtype ||
        !contiguous(weight) || !same_device(weight, ids) || weight.shape[0] != input.values.size) {
      Py_RETURN_NONE;
    }
    weighted.data = data(weight);
  }
  for (int64_t k = 0; k < input.num_lookups; ++k) {
    if (!is_consistent(input.lookups[k], input, tables, cells)) {
      Py_RETURN_NONE;
    }
  }
  void* memory = nullptr;
  PyObject* result = given[output];
  if (result != Py_None) {
    DLTensor to;
    DType own;
    if (!view(result, 2, &to) || !as_dtype(to.dtype, &own) || own != dtype || !contiguous(to) || !same_device(to, ids) ||
        (to.ndim == 1 ? to.shape[0] : to.shape[0] * to.shape[1]) != cells) {
      Py_RETURN_NONE;
    }
    memory = data(to);
    Py_INCREF(result);
  } else {
    DLTensor like = ids;
    like.dtype = dlpack_types[number];
    result = allocate(like, {cells}, &memory);
    if (!result) {
      return nullptr;
    }
  }
  PyThreadState* thread = PyEval_SaveThread();
  try {
    if (is_quantized) {
      quantized_forward(codes, tables.data(), input, weighted, dtype, memory);
    } else {
      forward(tables.data(), input, weighted, dtype, memory, nullptr);
    }
  } catch (const std::exception& error) {
    PyEval_RestoreThread(thread);
    Py_DECREF(result);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  PyEval_RestoreThread(thread);
  return result;
}

}  // namespace recsys_ops::embedding_bag_collection
