#include "shard.h"

#include <structmember.h>  // before Python 3.12 not part of Python.h

#include "tensor_layout.h"
#include "tensor_ref.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Of a slot that the class defines with __slots__; negative if it is something else.
Py_ssize_t slot_offset(py::handle type, const char* name) {
  const py::object slot = type.attr(name);
  if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) return -1;
  return reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
}

// Where the Python objects of two tensors hold what they stand for.
Py_ssize_t impl_offset(const py::object& one, const py::object& two) {
  const void *first = TensorRef(one).impl(), *second = TensorRef(two).impl();
  if (!first || !second) return -1;
  const Py_ssize_t end = Py_TYPE(one.ptr())->tp_basicsize - Py_ssize_t(sizeof(void*));
  for (Py_ssize_t at = Py_ssize_t(sizeof(PyObject)); at <= end; at += Py_ssize_t(sizeof(void*)))
    if (word_at<void>(one.ptr(), at) == first && word_at<void>(two.ptr(), at) == second) return at;
  return -1;
}

bool find_layout(ShardLayout& layout) {
  try {
    const py::module_ torch = py::module_::import("torch");
    const py::object shard = py::module_::import("torch.distributed.tensor").attr("DTensor");
    layout.shard = reinterpret_cast<PyTypeObject*>(py::object(shard).release().ptr());  // for ever
    layout.plain = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    layout.local = slot_offset(shard, "_local_tensor");
    layout.spec = slot_offset(shard, "_spec");
    layout.impl = impl_offset(torch.attr("zeros")(2), torch.attr("zeros")(3));
    return tensor_layout() && layout.local > 0 && layout.spec > 0 && layout.impl > 0;
  } catch (py::error_already_set&) {
    return false;
  }
}

}  // namespace

const ShardLayout* shard_layout() {
  static Once<ShardLayout> layout;
  return layout.get([]() -> const ShardLayout* {
    ShardLayout found = {};
    return find_layout(found) ? new ShardLayout(found) : nullptr;
  });
}

bool is_shard(py::handle tensor) {
  static PyObject* const names[] = {PyUnicode_InternFromString("_local_tensor"), PyUnicode_InternFromString("_spec")};
  return PyObject_HasAttr(tensor.ptr(), names[0]) && PyObject_HasAttr(tensor.ptr(), names[1]);
}

PyObject* local_of(PyObject* shard, const ShardLayout* layout) {
  if (layout && Py_TYPE(shard) == layout->shard) return word_at<PyObject>(shard, layout->local);
  PyObject* local = PyObject_GetAttrString(shard, "_local_tensor");
  if (!local) PyErr_Clear();
  Py_XDECREF(local);  // the DTensor holds it
  return local;
}

}  // namespace fusedopt
