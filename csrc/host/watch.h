// Watches the parameters of one optimizer: finds their gradients each step, and notices when the plan is stale.
//
// Other code replaces elements of group["params"], swaps .data, moves bucket views and rewrites state without
// notice, so every step compares all of it with what the plan was made from. Parameters are held, not only
// their addresses: an address could be reused by another object.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "state_guard.h"
#include "table.h"
#include "tensor_ref.h"

namespace fusedopt {

class Watch {
 public:
  // param: as found in param_groups[group]. as_seen: the tensor whose layout the kernels see (param itself, or a dense
  // copy of it). table, slot: where its gradient pointer goes; table is None while it never had a gradient.
  // has_main_grad: whether param has an attribute main_grad, which is its gradient unless it is None.
  void add(pybind11::object param, pybind11::object as_seen, int32 group, int32 grad_dtype, pybind11::object table,
           int32 slot, bool has_main_grad);

  // Remembers the optimizer's state as it is now.
  void remember_state(pybind11::dict state);

  // Remembers whether group[key] is true, for each group and key: what decides on the groups' rules.
  void remember_flags(const std::vector<std::string>& keys, pybind11::list param_groups);

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
    int32 group;
    int32 dtype, grad_dtype;
    int32 device_type, device_index;
    int32 ndim;
    size_t extents;  // where in extents_ its shape and then the strides that the kernels see begin
    bool has_main_grad;
    std::optional<TensorRef> main_grad;  // empty where the attribute is None
  };
  struct StateTensor {
    TensorRef tensor;  // lives as long as state_ is unchanged
    void* data;
  };

  bool same_parameters(PyObject* param_groups) const;
  bool same_flags(PyObject* param_groups) const;
  bool same_addresses();
  bool same_main_grad(const Row& row) const;
  bool read_grad(const Row& row, const void* found, Py_ssize_t index, pybind11::list& relayout);

  std::vector<Row> rows_;
  std::vector<pybind11::object> owned_;  // parameters and tables of the rows
  std::vector<int64> extents_;
  std::vector<const void*> grads_;  // scratch, by row
  StateGuard state_;
  std::vector<StateTensor> state_tensors_;
  std::vector<pybind11::object> flag_keys_;
  std::vector<bool> flags_;  // by group, then key
};

}  // namespace fusedopt
