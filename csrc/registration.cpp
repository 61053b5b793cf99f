// Every operator schema of the namespace recsys_ops, and the Python module recsys_ops._C.
//
// Schemas equal those that recsys_ops/<op>/reference.py implies.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>

#include "common/eager.h"
#include "common/huge_pages.h"
#include "common/simd_level.h"
#include "embedding_bag/embedding_bag_eager.h"
#include "embedding_bag_collection/embedding_bag_collection_eager.h"

STABLE_TORCH_LIBRARY(recsys_ops, m) {
  m.def(
      "embedding_bag_forward(Tensor weight, Tensor indices, Tensor offsets, Tensor? per_sample_weights, "
      "bool mean, SymInt padding_idx, bool include_last_offset, bool drop_invalid) -> Tensor");
  m.def(
      "embedding_bag_max_forward(Tensor weight, Tensor indices, Tensor offsets, SymInt padding_idx, "
      "bool include_last_offset, bool drop_invalid) -> (Tensor, Tensor)");
  m.def(
      "embedding_bag_backward(Tensor grad_output, Tensor indices, Tensor offsets, Tensor? per_sample_weights, "
      "Tensor? argmax, SymInt num_embeddings, bool mean, SymInt padding_idx, bool include_last_offset, "
      "bool drop_invalid, bool scale_grad_by_freq) -> Tensor");
  m.def(
      "embedding_bag_backward_sparse(Tensor grad_output, Tensor indices, Tensor offsets, "
      "Tensor? per_sample_weights, SymInt num_embeddings, bool mean, SymInt padding_idx, "
      "bool include_last_offset, bool drop_invalid, bool scale_grad_by_freq) -> (Tensor, Tensor)");
  m.def(
      "embedding_bag_backward_per_sample_weights(Tensor grad_output, Tensor weight, Tensor indices, "
      "Tensor offsets, bool mean, SymInt padding_idx, bool include_last_offset, bool drop_invalid) -> Tensor");
  m.def(
      "embedding_bag_collection_forward(Tensor(a0!) output, Tensor(a1!)? argmax, Tensor[] weights, Tensor values, "
      "Tensor offsets, Tensor? per_sample_weights, Tensor lookups, bool drop_invalid) -> ()");
  m.def(
      "embedding_bag_collection_quantized_forward(Tensor(a0!) output, Tensor[] codes, Tensor[] scales, SymInt bits, "
      "Tensor values, Tensor offsets, Tensor? per_sample_weights, Tensor lookups, bool drop_invalid) -> ()");
  m.def(
      "embedding_bag_collection_backward(Tensor grad_output, Tensor? argmax, Tensor[] weights, Tensor values, "
      "Tensor offsets, Tensor? per_sample_weights, Tensor lookups, bool drop_invalid) -> Tensor[]");
  m.def(
      "embedding_bag_collection_backward_sparse(Tensor grad_output, Tensor? argmax, Tensor[] weights, Tensor values, "
      "Tensor offsets, Tensor? per_sample_weights, Tensor lookups, bool drop_invalid) -> Tensor[]");
  m.def(
      "embedding_bag_collection_backward_per_sample_weights(Tensor grad_output, Tensor[] weights, Tensor values, "
      "Tensor offsets, Tensor lookups, bool drop_invalid) -> Tensor");
  m.def(
      "embedding_bag_collection_update(Tensor(a0!)[] weights, Tensor(a1!)[] states, Tensor(a2!) step, "
      "Tensor grad_output, Tensor? argmax, Tensor values, Tensor offsets, Tensor? per_sample_weights, "
      "Tensor lookups, bool drop_invalid, SymInt optimizer, Tensor hyperparameters, SymInt seed, "
      "bool stochastic_rounding) -> ()");
  m.def(
      "hstu_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? query_offsets, Tensor offsets, Tensor? "
      "row_scale, Tensor? num_contextual, Tensor? num_targets, Tensor? intervals, Tensor? position_weight, Tensor? "
      "time_weight, Tensor? timestamps, Tensor? boundaries, Tensor? dropout_seed, float scale, float alpha, bool "
      "causal, SymInt window, SymInt target_group_size, SymInt full_window_tail, bool next_timestamps, float "
      "dropout) -> Tensor");
  m.def(
      "hstu_attention_backward(Tensor(a0!) grad_q, Tensor(a1!) grad_k, Tensor(a2!) grad_v, Tensor grad_output, "
      "Tensor q, Tensor k, Tensor v, Tensor? query_offsets, Tensor offsets, Tensor? row_scale, Tensor? "
      "num_contextual, Tensor? num_targets, Tensor? intervals, Tensor? position_weight, Tensor? time_weight, "
      "Tensor? timestamps, Tensor? boundaries, Tensor? dropout_seed, float scale, float alpha, bool causal, SymInt "
      "window, SymInt target_group_size, SymInt full_window_tail, bool next_timestamps, float dropout) -> (Tensor, "
      "Tensor)");
  m.def(
      "hstu_attention_cached_forward(Tensor q, Tensor k, Tensor v, Tensor key_cache, Tensor value_cache, Tensor? "
      "key_scales, Tensor? value_scales, Tensor? cache_starts, Tensor? page_table, Tensor query_offsets, Tensor "
      "offsets, Tensor? row_scale, Tensor? num_contextual, Tensor? num_targets, Tensor? intervals, Tensor? "
      "position_weight, Tensor? time_weight, Tensor? timestamps, Tensor? boundaries, float scale, float alpha, "
      "bool causal, SymInt window, SymInt target_group_size, SymInt full_window_tail, bool next_timestamps) "
      "-> Tensor");
}

namespace {

PyObject* simd_levels(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (recsys_ops::SimdLevel level : recsys_ops::simd_levels()) {
    PyObject* name = PyUnicode_FromString(recsys_ops::simd_level_name(level));
    PyList_Append(names, name);
    Py_DECREF(name);
  }
  return names;
}

PyObject* simd_level(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(recsys_ops::simd_level_name(recsys_ops::simd_level()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* set_simd_level(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) {
    return nullptr;
  }
  try {
    recsys_ops::set_simd_level(PyBytes_AsString(bytes));
  } catch (const std::exception& error) {
    Py_DECREF(bytes);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_DECREF(bytes);
  Py_RETURN_NONE;
}

PyObject* ask_for_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address, bytes;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) {
    return nullptr;
  }
  recsys_ops::ask_for_huge_pages(static_cast<uintptr_t>(address), bytes);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"simd_levels", simd_levels, METH_NOARGS, "Levels that this machine can run, best first."},
    {"simd_level", simd_level, METH_NOARGS, "The level in use."},
    {"set_simd_level", set_simd_level, METH_O, "Use another level."},
    {"ask_for_huge_pages", ask_for_huge_pages, METH_VARARGS, "Of memory not used yet: its address and bytes."},
    {"bind_eager", recsys_ops::eager::bind, METH_VARARGS, "Name the types of plain tensors."},
    {"bind_eager_device",
     recsys_ops::embedding_bag::bind_eager_device,
     METH_VARARGS,
     "Say who pools bags on a kind of device."},
    {"embedding_bag_eager",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(recsys_ops::embedding_bag::eager_forward)),
     METH_FASTCALL,
     "Pool bags past the dispatcher, or return None."},
    {"embedding_bag_collection_eager",
     reinterpret_cast<PyCFunction>(
         reinterpret_cast<void (*)()>(recsys_ops::embedding_bag_collection::eager_forward)),
     METH_FASTCALL,
     "Pool bags of tables past the dispatcher, or return None."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
