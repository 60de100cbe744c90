// DTensors: tensors without memory of their own, whose Python object holds the tensor with this process' part.
//
// A step looks at a thousand of them, so their two slots, and the tensor behind a Python object, are read where they
// stand. Where that is, is found out from a DTensor's class and from tensors of known addresses. No function here
// counts references or runs Python code but where it says so: threads may call them while one holds Python's lock.
#pragma once

#include <pybind11/pybind11.h>

#include "../core/structs.h"

namespace fusedopt {

struct ShardLayout {
  PyTypeObject* shard;  // torch.distributed.tensor.DTensor
  PyTypeObject* plain;  // torch.Tensor
  // In bytes, from the start of a Python object.
  Py_ssize_t local, spec;  // slots of a DTensor: the local tensor, and how the parts lie on the mesh
  Py_ssize_t impl;         // of any tensor: pointer to its c10::TensorImpl
};

template <class T>
T* word_at(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<T**>(reinterpret_cast<char*>(object) + offset);
}

// Null where it is not known. Runs Python code when called for the first time.
const ShardLayout* shard_layout();

// Whether a Python object is a DTensor. Imports nothing; runs Python code.
bool is_shard(pybind11::handle tensor);

// The local tensor of a DTensor, borrowed; null where there is none. Without a layout, or of another class, it runs
// Python code.
PyObject* local_of(PyObject* shard, const ShardLayout* layout);

// A hint, some tensors ahead of `local_of`. shard: may be null.
inline void prefetch_local(PyObject* shard, const ShardLayout& layout) {
  __builtin_prefetch(reinterpret_cast<const char*>(shard) + layout.local);
}

// One DTensor that was found as a gradient, in the steps by which its memory is reached: each reads what the one before
// has asked for, so that many can be on their way at once.
struct ShardGrad {
  PyObject* object = nullptr;  // the DTensor
  PyObject* local = nullptr;   // null where it is not as expected
  const void* impl = nullptr;  // of `local`

  // found: its c10::TensorImpl, or null. object_word: see TensorLayout.
  void find_object(const ShardLayout& layout, int object_word, const void* found) {
    const auto* words = static_cast<const uint64*>(found);
    object = words ? reinterpret_cast<PyObject*>(words[object_word] & ~uint64(7)) : nullptr;
    local = nullptr;
    impl = nullptr;
    if (object) __builtin_prefetch(reinterpret_cast<const char*>(object) + layout.local);
  }

  // spec, known_spec: one of them it must have.
  void find_local(const ShardLayout& layout, PyObject* spec, PyObject* known_spec) {
    if (!object || Py_TYPE(object) != layout.shard) return;
    PyObject* const own = word_at<PyObject>(object, layout.spec);
    if (!own || (own != spec && own != known_spec)) return;
    local = word_at<PyObject>(object, layout.local);
    if (local) __builtin_prefetch(reinterpret_cast<const char*>(local) + layout.impl);
  }

  // Not of another class: it may have to be waited for, the result of a collective that is under way.
  void find_impl(const ShardLayout& layout) {
    if (local && Py_TYPE(local) == layout.plain) impl = word_at<void>(local, layout.impl);
    if (impl)
      for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(impl) + 64 * line);
  }
};

}  // namespace fusedopt
