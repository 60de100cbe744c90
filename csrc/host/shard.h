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

// Null where it is not known. Runs Python code when called for the first time.
const ShardLayout* shard_layout();

// Whether a Python object is a DTensor. Imports nothing; runs Python code.
bool is_shard(pybind11::handle tensor);

// The local tensor of a DTensor, borrowed; null where there is none. Without a layout it runs Python code.
PyObject* local_of(PyObject* shard);

// One DTensor that was found as a gradient, in the steps by which its memory is reached: each reads what the one before
// has asked for, so that many can be on their way at once.
struct ShardGrad {
  PyObject* object = nullptr;  // the DTensor
  PyObject* local = nullptr;   // null where it is not as expected
  const void* impl = nullptr;  // of `local`

  void find_object(const void* found);
  // spec, known_spec: one of them it must have.
  void find_local(PyObject* spec, PyObject* known_spec);
  void find_impl();
};

}  // namespace fusedopt
