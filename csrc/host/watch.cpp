#include "watch.h"

#include <string>

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

// Whether a param group has the key, with a value that counts as true.
bool is_set(PyObject* group, const py::object& key) {
  PyObject* value = PyDict_GetItem(group, key.ptr());
  return value && PyObject_IsTrue(value) == 1;
}

constexpr size_t kAhead = 8;  // tensors whose memory is fetched before it is looked at

}  // namespace

void Watch::add(py::object param, py::object as_seen, int32 group, int32 grad_dtype, py::object table, int32 slot,
                bool has_main_grad) {
  TensorInfo info, seen;
  const TensorRef ref(param), seen_ref(as_seen);
  if (!ref.read(info)) throw py::type_error("Watch.add: param is not a dense tensor");
  Table* const rows_table = table.is_none() ? nullptr : table.cast<Table*>();
  Row row = {ref,         info.data,        rows_table,        slot,      group,           info.dtype,
             grad_dtype,  info.device_type, info.device_index, info.ndim, extents_.size(), has_main_grad,
             std::nullopt};
  if (has_main_grad) {
    py::object main_grad = param.attr("main_grad");
    if (!main_grad.is_none()) row.main_grad.emplace(main_grad);
    owned_.push_back(std::move(main_grad));
  }
  if (!seen_ref.read(seen)) throw py::type_error("Watch.add: as_seen is not a dense tensor");
  extents_.insert(extents_.end(), seen.shape, seen.shape + seen.ndim);
  extents_.insert(extents_.end(), seen.strides, seen.strides + seen.ndim);
  rows_.push_back(row);
  grads_.push_back(nullptr);
  owned_.push_back(std::move(param));
  owned_.push_back(std::move(table));
}

void Watch::remember_state(py::dict state) {
  state_tensors_.clear();
  for (const auto& [param, entries] : state) {
    if (!PyDict_Check(entries.ptr())) continue;
    for (const auto& item : py::reinterpret_borrow<py::dict>(entries)) {
      // Whoever moves the memory of a counter, a view of one tensor for all, moves that of the other state too.
      if (py::isinstance<py::str>(item.first) && item.first.cast<std::string>() == "step") continue;
      const TensorRef tensor(item.second);
      if (void* data = tensor.data()) state_tensors_.push_back({tensor, data});
    }
  }
  state_.remember(state);
}

void Watch::remember_flags(const std::vector<std::string>& keys, py::list param_groups) {
  flag_keys_.clear();
  flags_.clear();
  for (const std::string& key : keys)
    flag_keys_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str())));
  for (const py::handle group : param_groups)
    for (const py::object& key : flag_keys_) flags_.push_back(is_set(group.ptr(), key));
}

bool Watch::same_flags(PyObject* param_groups) const {
  if (flag_keys_.empty()) return true;
  if (size_t(PyList_GET_SIZE(param_groups)) * flag_keys_.size() != flags_.size()) return false;
  size_t next = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g)
    for (const py::object& key : flag_keys_)
      if (is_set(PyList_GET_ITEM(param_groups, g), key) != flags_[next++]) return false;
  return true;
}

bool Watch::same_parameters(PyObject* param_groups) const {
  static PyObject* const params_name = PyUnicode_InternFromString("params");
  size_t next = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), params_name);
    if (!params || !PyList_Check(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++next)
      if (next >= rows_.size() || rows_[next].group != g || PyList_GET_ITEM(params, i) != rows_[next].param.object())
        return false;
  }
  return next == rows_.size();
}

// Of parameters and state. Looks up the gradients on the way.
bool Watch::same_addresses() {
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (i + 2 * kAhead < rows_.size()) rows_[i + 2 * kAhead].param.prefetch();
    if (i + kAhead < rows_.size()) rows_[i + kAhead].param.prefetch_storage();
    if (rows_[i].param.data() != rows_[i].data) return false;
    grads_[i] = rows_[i].param.find_grad();
  }
  for (size_t i = 0; i < state_tensors_.size(); ++i) {
    if (i + 2 * kAhead < state_tensors_.size()) state_tensors_[i + 2 * kAhead].tensor.prefetch();
    if (i + kAhead < state_tensors_.size()) state_tensors_[i + kAhead].tensor.prefetch_storage();
    if (state_tensors_[i].tensor.data() != state_tensors_[i].data) return false;
  }
  return true;
}

bool Watch::same_main_grad(const Row& row) const {
  static PyObject* const name = PyUnicode_InternFromString("main_grad");
  const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(row.param.object(), name));
  if (!now) PyErr_Clear();
  return now && now.ptr() == (row.main_grad ? row.main_grad->object() : Py_None);
}

bool Watch::read_grad(const Row& row, const void* found, Py_ssize_t index, py::list& relayout) {
  if (row.has_main_grad && !same_main_grad(row)) return false;
  TensorInfo grad;
  switch (row.param.read_grad(found, grad)) {
    case TensorRef::Grad::kNone:
      if (row.main_grad) {
        if (!row.main_grad->read(grad)) return false;
        break;
      }
      if (row.table) row.table->set_grad(row.slot, nullptr);
      return true;
    case TensorRef::Grad::kOther:
      return false;
    case TensorRef::Grad::kDense:
      if (row.main_grad) return false;  // which of the two is meant?
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
  PyObject* const groups = param_groups.ptr();
  if (!state_.unchanged(state.ptr()) || !same_parameters(groups) || !same_flags(groups) || !same_addresses())
    return false;
  for (size_t i = 0; i < rows_.size(); ++i) {
    if (i + kAhead < rows_.size()) TensorRef::prefetch_storage_of(grads_[i + kAhead]);
    if (!read_grad(rows_[i], grads_[i], Py_ssize_t(i), relayout)) return false;
  }
  return true;
}

bool Watch::bump_versions() const {
  if (!has_torch_functions()) return false;
  for (const Row& row : rows_)
    if (row.table && row.table->grad(row.slot) && !row.param.bump_version()) return false;
  return true;
}

int Watch::traverse(visitproc visit, void* arg) const {
  for (const py::object& object : owned_) Py_VISIT(object.ptr());
  return state_.traverse(visit, arg);
}

void Watch::clear() {
  rows_.clear();
  state_tensors_.clear();
  state_.clear();
  const auto owned = std::move(owned_);  // freed last, because freeing may call back into Python
  owned_.clear();
}

}  // namespace fusedopt
