// Watches the parameters of one optimizer: finds their gradients each step, and notices when the plan is stale.
//
// Other code replaces elements of group["params"], swaps .data, moves bucket views and rewrites state without
// notice, so every step compares all of it with what the plan was made from. Objects are held, not only
// their addresses: an address could be reused by another object.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "table.h"
#include "tensor_ref.h"

namespace fusedopt {

class Watch {
 public:
  // param: as found in param_groups. as_seen: the tensor whose layout the kernels see (param itself, or a dense copy of it).
  // table, slot: where its gradient pointer goes; table is None while it never had a gradient.
  void add(pybind11::object param, pybind11::object as_seen, int32 grad_dtype, pybind11::object table, int32 slot);

  // Remembers the optimizer's state as it is now.
  void remember_state(pybind11::dict state);

  // Fills the tables' gradient pointers. False: the plan is stale, or a gradient is not as expected; nothing else
  // may be assumed then. `relayout` receives the rows whose gradient is laid out unlike the parameter.
  bool refresh(pybind11::list param_groups, pybind11::dict state, pybind11::list relayout);

  // Tells autograd that the parameters in tables were written. False: torch must be asked in Python.
  bool bump_versions() const;

  size_t size() const { return rows_.size(); }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Row {
    TensorRef param;
    void* data;
    Table* table;
    int32 slot;
    int32 dtype, grad_dtype;
    int32 device_type, device_index;
    int32 ndim;
    size_t extents;  // where in extents_ its shape and then the strides that the kernels see begin
    pybind11::object table_object;
  };
  struct StateTensor {
    TensorRef tensor;
    void* data;
  };
  struct StateRow {
    pybind11::object param, entries;
    size_t first, last;  // of its values in state_tensors_
  };

  bool refresh_row(const Row& row, Py_ssize_t index, pybind11::list& relayout);
  bool state_unchanged(PyObject* state) const;

  std::vector<Row> rows_;
  std::vector<int64> extents_;
  std::vector<StateRow> state_rows_;
  std::vector<StateTensor> state_tensors_;
};

}  // namespace fusedopt
