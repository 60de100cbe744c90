// Watches the parameters of one optimizer: finds their gradients each step, and notices when the plan is stale.
//
// Other code replaces elements of group["params"], swaps .data, moves bucket views and rewrites state without
// notice, so every step compares all of it with what the plan was made from. Parameters are held, not only
// their addresses: an address could be reused by another object.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "shard.h"
#include "state_guard.h"
#include "table.h"
#include "tensor_ref.h"

namespace fusedopt {

// Which step an accumulator is at: what its main gradients held before is dropped all at once when it goes on.
struct Epoch {
  int64 now = 0;
};

// Whether a main gradient holds anything: set by an accumulator, and read where its optimizer looks for gradients.
class Held {
 public:
  explicit Held(std::shared_ptr<Epoch> epoch) : epoch_(std::move(epoch)) {
    if (!epoch_) throw pybind11::type_error("Held: got None, expected an Epoch");
  }
  bool value() const { return since_ == epoch_->now; }
  void set(bool value) { since_ = value ? epoch_->now : -1; }

 private:
  std::shared_ptr<Epoch> epoch_;
  int64 since_ = -1;
};

class Watch {
 public:
  // param: as found in param_groups[group]. as_seen: the tensor whose layout the kernels see (param or local itself, or
  // a dense copy of it; complex where the parameter is, whatever kernels make of it). grad_dtype: see TensorInfo.
  // table, slot: where its gradient pointer goes; table is None while it never had a gradient. has_main_grad: whether
  // param has an attribute main_grad, which is its gradient unless it is None. held: of the accumulator's main gradient
  // for param; null where there is none. local: the tensor with its memory, where param is a DTensor; else None. Then
  // there must be no main_grad. Rows of a group follow one another. Python's TypeError or ValueError, with the watch as
  // it was, for tensors and tables that do not fit each other.
  void add(pybind11::object param, pybind11::object as_seen, int32 group, int32 grad_dtype, pybind11::object table,
           int32 slot, bool has_main_grad, std::shared_ptr<Held> held, pybind11::object local);

  // Of a DTensor: gradients that lie on the mesh as this object says lie as the parameter does. Others than those, and
  // than ones that share the parameter's own, are reported by `refresh` as laid out unlike the parameter.
  void know_spec(size_t row, pybind11::object spec) { rows_.at(row).known_spec = std::move(spec); }

  // Remembers the optimizer's state as it is now.
  void remember_state(pybind11::dict state);

  // Remembers whether group[key] is true, for each group and key: what decides on the groups' rules.
  void remember_flags(const std::vector<std::string>& keys, pybind11::list param_groups);

  // Fills the tables' gradient pointers. False: the plan is stale, or a gradient is not as expected; nothing else
  // may be assumed then. `relayout` receives the rows whose gradient is laid out unlike the parameter. bump: tell
  // autograd of the step at once, while the tensors are in the cache.
  bool refresh(pybind11::list param_groups, pybind11::dict state, pybind11::list relayout, bool bump);

  // To be called some microseconds before `refresh`.
  void summon() const;

  // Tells autograd that the parameters in tables were written. False: torch must be asked in Python.
  bool bump_versions() const;

  // Whether any parameter has a gradient of its own in this step.
  bool has_grads() const;

  // For an accumulator: the main gradients of all parameters that had a gradient hold something now.
  void hold();
  // Sets the attribute grad of those parameters to None.
  void drop_grads();

  size_t size() const { return rows_.size(); }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Row {
    TensorRef listed;  // what param_groups hold, and what has the gradient
    TensorRef param;   // what has the memory: the same, or the local tensor of a DTensor
    Memory memory;
    GradLook look;
    Table* table;
    int32 slot;
    int32 group;
    int32 dtype, grad_dtype;
    int32 device_type, device_index;
    int32 ndim;
    size_t extents;  // where in extents_ its shape and then the strides that the kernels see begin
    bool has_main_grad;
    std::optional<TensorRef> main_grad;  // empty where the attribute is None
    std::shared_ptr<Held> held;
    bool is_shard;
    pybind11::object spec, known_spec;  // of a DTensor, and of its gradients
  };
  struct StateTensor {
    TensorRef tensor;  // lives as long as state_ is unchanged, and `shard` holds it
    Memory memory;
    PyObject* shard;  // the DTensor in the state that it is the local tensor of; else null
  };

  // group["params"] of one group.
  struct ParamList {
    PyObject** items;
    size_t first_row;
  };

  static void check_row(const TensorInfo& param, const TensorInfo& seen, const Table& table, int32 grad_dtype,
                        int32 slot, bool is_held);
  bool find_params(PyObject* param_groups, std::vector<ParamList>& lists) const;
  bool same_flags(PyObject* param_groups) const;
  bool same_main_grads() const;
  bool same_addresses(const std::vector<ParamList>& params, size_t part, size_t parts);
  bool read_grad(size_t index, const void* found);
  bool read_shard_grad(size_t index, const void* found);
  void find_shard_grads(size_t begin, size_t end);
  // The gradient of a row whose tensor is known.
  bool take_grad(size_t index, const void* found, const TensorInfo& grad, bool lazy);
  bool read_part(const std::vector<ParamList>& params, size_t part, size_t parts, bool bump);
  size_t num_parts() const;
  static bool bump_version(const Row& row);
  void note_shard(PyObject* shard);

  std::vector<Row> rows_;
  std::vector<pybind11::object> owned_;  // parameters and tables of the rows
  std::vector<int64> extents_;
  std::vector<const void*> grads_;  // scratch, by row
  std::vector<ShardGrad> shards_;   // scratch, by row
  std::vector<char> relayout_;      // scratch, by row: whether its gradient is laid out unlike the parameter
  bool has_main_grads_ = false;
  bool has_shards_ = false;
  bool has_odd_shards_ = false;  // to look at which takes Python code
  StateGuard state_;
  std::vector<StateTensor> state_tensors_;
  std::vector<pybind11::object> flag_keys_;
  std::vector<bool> flags_;  // by group, then key
};

}  // namespace fusedopt
