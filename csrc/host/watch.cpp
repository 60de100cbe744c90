#include "watch.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// The address of an empty tensor may be null, which would read as "no gradient". It has no chunk, so any other
// value does.
const void* gradient_address(const TensorInfo& info) {
  return info.data ? info.data : reinterpret_cast<const void*>(uint64(1));
}

bool same_shape(const TensorInfo& info, int32 ndim, const int64* shape) {
  if (info.ndim != ndim) return false;
  for (int32 d = 0; d < ndim; ++d)
    if (info.shape[d] != shape[d]) return false;
  return true;
}

// Dimensions of size 1 may have any stride.
bool same_strides(const TensorInfo& info, const int64* strides) {
  for (int32 d = 0; d < info.ndim; ++d)
    if (info.strides[d] != strides[d] && info.shape[d] > 1) return false;
  return true;
}

}  // namespace

void Watch::add(py::object param, py::object as_seen, int32 grad_dtype, py::object table, int32 slot) {
  TensorInfo info, seen;
  TensorRef ref(param);
  const TensorRef seen_ref(as_seen);
  if (!ref.read(info)) throw py::type_error("Watch.add: param is not a dense tensor");
  Row row = {std::move(ref),   info.data,         table.is_none() ? nullptr : table.cast<Table*>(),
             slot,             info.dtype,        grad_dtype,
             info.device_type, info.device_index, info.ndim,
             extents_.size(),  table};
  if (!seen_ref.read(seen)) throw py::type_error("Watch.add: as_seen is not a dense tensor");
  extents_.insert(extents_.end(), seen.shape, seen.shape + seen.ndim);
  extents_.insert(extents_.end(), seen.strides, seen.strides + seen.ndim);
  rows_.push_back(std::move(row));
}

void Watch::remember_state(py::dict state) {
  state_rows_.clear();
  state_tensors_.clear();
  for (const auto& [param, entries] : state) {
    const size_t first = state_tensors_.size();
    if (PyDict_Check(entries.ptr()))
      for (const auto& item : py::reinterpret_borrow<py::dict>(entries)) {
        TensorRef tensor(py::reinterpret_borrow<py::object>(item.second));
        void* data = tensor.data();
        state_tensors_.push_back({std::move(tensor), data});
      }
    state_rows_.push_back({py::reinterpret_borrow<py::object>(param), py::reinterpret_borrow<py::object>(entries), first,
                           state_tensors_.size()});
  }
}

bool Watch::state_unchanged(PyObject* state) const {
  if (PyDict_Size(state) != Py_ssize_t(state_rows_.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (const StateRow& row : state_rows_) {
    if (!PyDict_Next(state, &position, &key, &value)) return false;
    if (key != row.param.ptr() || value != row.entries.ptr()) return false;
    if (!PyDict_Check(value)) continue;
    PyObject* const entries = value;
    if (PyDict_Size(entries) != Py_ssize_t(row.last - row.first)) return false;
    Py_ssize_t inner = 0;
    for (size_t i = row.first; i < row.last; ++i) {
      const StateTensor& each = state_tensors_[i];
      if (!PyDict_Next(entries, &inner, &key, &value) || value != each.tensor.object()) return false;
      if (each.data && each.tensor.data() != each.data) return false;
    }
  }
  return true;
}

bool Watch::refresh_row(const Row& row, Py_ssize_t index, py::list& relayout) {
  if (row.param.data() != row.data) return false;
  TensorInfo grad;
  switch (row.param.read_grad(grad)) {
    case TensorRef::Grad::kNone:
      if (row.table) row.table->set_grad(row.slot, nullptr);
      return true;
    case TensorRef::Grad::kOther:
      return false;
    case TensorRef::Grad::kDense:
      break;
  }
  const int64* shape = extents_.data() + row.extents;
  if (!row.table || grad.dtype != row.grad_dtype || grad.device_type != row.device_type ||
      grad.device_index != row.device_index || !same_shape(grad, row.ndim, shape))
    return false;
  if (same_strides(grad, shape + row.ndim))
    row.table->set_grad(row.slot, gradient_address(grad));
  else
    relayout.append(index);
  return true;
}

bool Watch::refresh(py::list param_groups, py::dict state, py::list relayout) {
  static PyObject* const params_name = PyUnicode_InternFromString("params");
  size_t next = 0;
  for (const py::handle group : param_groups) {
    PyObject* params = PyDict_GetItem(group.ptr(), params_name);
    if (!params || !PyList_Check(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++next)
      if (next >= rows_.size() || PyList_GET_ITEM(params, i) != rows_[next].param.object()) return false;
  }
  if (next != rows_.size() || !state_unchanged(state.ptr())) return false;
  for (size_t i = 0; i < rows_.size(); ++i)
    if (!refresh_row(rows_[i], Py_ssize_t(i), relayout)) return false;
  return true;
}

bool Watch::bump_versions() const {
  if (!has_torch_functions()) return false;
  for (const Row& row : rows_)
    if (row.table && row.table->grad(row.slot) && !row.param.bump_version()) return false;
  return true;
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const Row& row : rows_) {
    Py_VISIT(row.param.object());
    Py_VISIT(row.table_object.ptr());
  }
  for (const StateRow& row : state_rows_) {
    Py_VISIT(row.param.ptr());
    Py_VISIT(row.entries.ptr());
  }
  for (const StateTensor& each : state_tensors_) Py_VISIT(each.tensor.object());
  return 0;
}

void Watch::clear() {
  // Freed only after the members are empty, because freeing may call back into Python.
  const auto rows = std::move(rows_);
  const auto state_rows = std::move(state_rows_);
  const auto state_tensors = std::move(state_tensors_);
  rows_.clear();
  state_rows_.clear();
  state_tensors_.clear();
}

}  // namespace fusedopt
