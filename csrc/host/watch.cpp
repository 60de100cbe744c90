#include "watch.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>

#include "tensor_layout.h"
#include "threads.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// The address of an empty tensor may be null, which would read as "no gradient". It has no elements, so any other
// even value does.
const void* gradient_address(const TensorInfo& info) {
  return info.data ? info.data : reinterpret_cast<const void*>(uint64(2));
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
  const int is_true = value ? PyObject_IsTrue(value) : 0;
  if (is_true < 0) throw py::error_already_set();
  return is_true == 1;
}

constexpr size_t kAhead = 8;           // tensors whose memory is fetched before it is looked at
constexpr size_t kPart = 32;           // tensors that a thread looks at in one go
constexpr size_t kPartsPerThread = 4;  // for fewer, calling a thread takes longer than it saves

struct Range {
  size_t begin, end;
};

Range range_of(size_t size, size_t part, size_t parts) { return {size * part / parts, size * (part + 1) / parts}; }

// That look at tensors. Measured: more than four wait for one another.
int threads_for(size_t parts) {
  static const int most = int(std::clamp(std::thread::hardware_concurrency() / 2, 1u, 4u));
  return std::min(most, int(parts / kPartsPerThread));
}

}  // namespace

// What a pass takes for granted where it walks the table.
void Watch::check_row(const TensorInfo& param, const TensorInfo& seen, const Table& table, int32 grad_dtype, int32 slot,
                      bool is_held) {
  if (slot < 0 || size_t(slot) >= table.entries().size())
    throw py::value_error("Watch.add: got a slot that the table does not have, expected one that Table.add returned");
  if (grad_dtype < 0 || grad_dtype >= kNumTensorDTypes)
    throw py::value_error("Watch.add: got an unknown grad_dtype, expected a code of fusedopt.specs");
  int64 numel = seen.dtype == kComplex64 || seen.dtype == kComplex128 ? 2 : 1;
  for (int32 d = 0; d < seen.ndim; ++d) numel *= seen.shape[d];
  const TensorEntry& entry = table.entries()[size_t(slot)];
  if (numel != entry.numel || !same_shape(seen, param.ndim, param.shape))
    throw py::value_error("Watch.add: got tensors of other sizes, expected those of the table's row");
  if (is_held && !entry.main_grad && numel)
    throw py::value_error("Watch.add: got `held` for a row without a main gradient, expected one with");
}

void Watch::add(py::object param, py::object as_seen, int32 group, int32 grad_dtype, py::object table, int32 slot,
                bool has_main_grad, std::shared_ptr<Held> held, py::object local) {
  TensorInfo info, seen;
  const bool is_shard = !local.is_none();
  const TensorRef listed(param), ref(is_shard ? local : param), seen_ref(as_seen);
  if (!ref.read(info)) throw py::type_error("Watch.add: param is not a dense tensor");
  const std::vector<int64> shape(info.shape, info.shape + info.ndim);  // borrowed until another tensor is read
  info.shape = shape.data();
  if (!seen_ref.read(seen)) throw py::type_error("Watch.add: as_seen is not a dense tensor");
  if (!py::isinstance<Table>(table) && !table.is_none())
    throw py::type_error("Watch.add: table is neither a Table nor None");
  Table* const rows_table = table.is_none() ? nullptr : table.cast<Table*>();
  if (group < 0 || (!rows_.empty() && group < rows_.back().group))
    throw py::value_error("Watch.add: got a group before the last row's, expected rows in the order of the groups");
  if (seen.ndim != info.ndim) throw py::value_error("Watch.add: as_seen has other dimensions than param");
  if (rows_table) check_row(info, seen, *rows_table, grad_dtype, slot, held != nullptr);
  Row row = {listed,
             ref,
             ref.memory(),
             GradLook{},
             rows_table,
             slot,
             group,
             info.dtype,
             grad_dtype,
             info.device_type,
             info.device_index,
             info.ndim,
             extents_.size(),
             has_main_grad,
             std::nullopt,
             std::move(held),
             is_shard,
             is_shard ? py::object(param.attr("_spec")) : py::none(),
             py::none()};
  if (has_main_grad) {
    py::object main_grad = param.attr("main_grad");
    if (!main_grad.is_none()) row.main_grad.emplace(main_grad);
    owned_.push_back(std::move(main_grad));
  }
  extents_.insert(extents_.end(), seen.shape, seen.shape + seen.ndim);
  extents_.insert(extents_.end(), seen.strides, seen.strides + seen.ndim);
  rows_.push_back(row);
  grads_.push_back(nullptr);
  shards_.emplace_back();
  relayout_.push_back(false);
  if (is_shard) note_shard(param.ptr());
  has_main_grads_ = has_main_grads_ || has_main_grad;
  owned_.push_back(std::move(param));
  owned_.push_back(std::move(local));
  owned_.push_back(std::move(table));
}

void Watch::remember_state(py::dict state) {
  state_tensors_.clear();
  for (const auto& [param, entries] : state) {
    if (!PyDict_Check(entries.ptr())) continue;
    for (const auto& item : py::reinterpret_borrow<py::dict>(entries)) {
      // Whoever moves the memory of a counter, a view of one tensor for all, moves that of the other state too.
      if (py::isinstance<py::str>(item.first) && item.first.cast<std::string>() == "step") continue;
      PyObject* const shard = is_shard(item.second) ? item.second.ptr() : nullptr;
      if (shard) note_shard(shard);
      const TensorRef tensor(shard ? py::handle(local_of(shard, shard_layout())) : item.second);
      if (const Memory memory = tensor.memory(); memory.data) state_tensors_.push_back({tensor, memory, shard});
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

// False if there are others, or other numbers of them, than there were. Which ones is for `same_addresses` to see.
bool Watch::find_params(PyObject* param_groups, std::vector<ParamList>& lists) const {
  static PyObject* const params_name = PyUnicode_InternFromString("params");
  size_t next = 0;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups); ++g) {
    PyObject* params = PyDict_GetItem(PyList_GET_ITEM(param_groups, g), params_name);
    if (!params || !PyList_Check(params)) return false;
    lists.push_back({PySequence_Fast_ITEMS(params), next});
    const auto size = size_t(PyList_GET_SIZE(params));
    next += size;
    if (next > rows_.size() || (size && (rows_[next - size].group != g || rows_[next - 1].group != g))) return false;
  }
  return next == rows_.size();
}

// Of one part of the parameters and states. Looks up the gradients on the way.
bool Watch::same_addresses(const std::vector<ParamList>& params, size_t part, size_t parts) {
  const Range rows = range_of(rows_.size(), part, parts);
  const ShardLayout* const layout = has_shards_ ? shard_layout() : nullptr;
  for (size_t i = rows.begin; i < rows.end; ++i) {
    if (i + 2 * kAhead < rows.end) rows_[i + 2 * kAhead].param.prefetch();
    if (i + kAhead < rows.end) rows_[i + kAhead].param.prefetch_all();
    if (layout && i + 2 * kAhead < rows.end) {
      rows_[i + 2 * kAhead].listed.prefetch();
      prefetch_local(rows_[i + 2 * kAhead].listed.object(), *layout);
    }
    if (layout && i + kAhead < rows.end) rows_[i + kAhead].listed.prefetch_all();
    const ParamList& list = params[size_t(rows_[i].group)];
    if (list.items[i - list.first_row] != rows_[i].listed.object()) return false;
    if (rows_[i].is_shard && local_of(rows_[i].listed.object(), layout) != rows_[i].param.object()) return false;
    if (!rows_[i].param.is_at(rows_[i].memory)) return false;
    grads_[i] = rows_[i].listed.find_grad();
  }
  const Range states = range_of(state_tensors_.size(), part, parts);
  for (size_t i = states.begin; i < states.end; ++i) {
    if (i + 2 * kAhead < states.end) state_tensors_[i + 2 * kAhead].tensor.prefetch();
    if (layout && i + 2 * kAhead < states.end) prefetch_local(state_tensors_[i + 2 * kAhead].shard, *layout);
    if (i + kAhead < states.end) state_tensors_[i + kAhead].tensor.prefetch_storage();
    const StateTensor& state = state_tensors_[i];
    if (state.shard && local_of(state.shard, layout) != state.tensor.object()) return false;
    if (!state.tensor.is_at(state.memory)) return false;
  }
  return true;
}

bool Watch::same_main_grads() const {
  static PyObject* const name = PyUnicode_InternFromString("main_grad");
  for (const Row& row : rows_) {
    if (!row.has_main_grad) continue;
    const auto now = py::reinterpret_steal<py::object>(PyObject_GetAttr(row.listed.object(), name));
    if (!now) PyErr_Clear();
    if (!now || now.ptr() != (row.main_grad ? row.main_grad->object() : Py_None)) return false;
  }
  return true;
}

bool Watch::read_grad(size_t index, const void* found) {
  Row& row = rows_[index];
  if (row.is_shard) return read_shard_grad(index, found);
  const bool holds = row.held && row.held->value();
  if (holds && !row.table) return false;
  const int64* shape = extents_.data() + row.extents;
  if (row.table && !row.main_grad) {
    const void* address =
        TensorRef::address_of_like(found, row.look, row.grad_dtype, row.ndim, shape, shape + row.ndim);
    if (address) {
      row.table->set_grad(row.slot, address, holds);
      return true;
    }
  }
  TensorInfo grad;
  switch (row.param.read_grad(found, grad)) {
    case TensorRef::Grad::kNone:
      if (row.main_grad) {
        if (!row.main_grad->read(grad)) return false;
        break;
      }
      if (row.table) row.table->set_grad(row.slot, nullptr, holds);
      return true;
    case TensorRef::Grad::kOther:
      return false;
    case TensorRef::Grad::kDense:
      if (row.main_grad) return false;  // which of the two is meant?
      break;
  }
  return take_grad(index, found, grad,
                   TensorRef::may_be_lazy(row.main_grad ? row.main_grad->impl() : found, grad.dtype));
}

bool Watch::take_grad(size_t index, const void* found, const TensorInfo& grad, bool lazy) {
  Row& row = rows_[index];
  const int64* shape = extents_.data() + row.extents;
  if (!row.table || grad.dtype != row.grad_dtype || grad.device_type != row.device_type ||
      grad.device_index != row.device_index || !same_shape(grad, row.ndim, shape))
    return false;
  const bool direct = same_strides(grad, shape + row.ndim) && !lazy;
  if (direct && grad.data && has_torch_functions()) row.look = TensorRef::look_of(found);
  row.table->set_grad(row.slot, direct ? gradient_address(grad) : nullptr, row.held && row.held->value());
  relayout_[index] = !direct;
  return true;
}

// Of a DTensor: what is not an ordinary gradient, on the mesh as the parameter is, is left to Python, which waits for
// collectives and moves parts.
bool Watch::read_shard_grad(size_t index, const void* found) {
  Row& row = rows_[index];
  const bool holds = row.held && row.held->value();
  if (holds && !row.table) return false;
  if (!row.listed.has_grad(found)) {
    if (row.table) row.table->set_grad(row.slot, nullptr, holds);
    return true;
  }
  if (!row.table) return false;
  const void* const impl = shards_[index].impl;
  const int64* shape = extents_.data() + row.extents;
  if (const void* address =
          TensorRef::address_of_like(impl, row.look, row.grad_dtype, row.ndim, shape, shape + row.ndim)) {
    row.table->set_grad(row.slot, address, holds);
    return true;
  }
  TensorInfo grad;
  if (impl && TensorRef::read_impl(impl, grad))
    return take_grad(index, impl, grad, TensorRef::may_be_lazy(impl, grad.dtype));
  row.table->set_grad(row.slot, nullptr, holds);
  relayout_[index] = true;
  return true;
}

// From the gradients of a part's rows to their local tensors.
void Watch::find_shard_grads(size_t begin, size_t end) {
  const ShardLayout* const layout = has_shards_ ? shard_layout() : nullptr;
  if (!layout) return;
  const int object_word = tensor_layout()->object;
  for (size_t i = begin; i < end; ++i) {
    const bool has_grad = rows_[i].is_shard && rows_[i].listed.has_grad(grads_[i]);
    shards_[i].find_object(*layout, object_word, has_grad ? grads_[i] : nullptr);
  }
  for (size_t i = begin; i < end; ++i) shards_[i].find_local(*layout, rows_[i].spec.ptr(), rows_[i].known_spec.ptr());
  for (size_t i = begin; i < end; ++i) shards_[i].find_impl(*layout);
  for (size_t i = begin; i < end; ++i) TensorRef::prefetch_storage_of(shards_[i].impl);
}

bool Watch::read_part(const std::vector<ParamList>& params, size_t part, size_t parts, bool bump) {
  if (!same_addresses(params, part, parts)) return false;
  const Range rows = range_of(rows_.size(), part, parts);
  find_shard_grads(rows.begin, rows.end);
  for (size_t i = rows.begin; i < rows.end; ++i) {
    if (i + kAhead < rows.end) TensorRef::prefetch_storage_of(grads_[i + kAhead]);
    relayout_[i] = false;
    if (!read_grad(i, grads_[i])) return false;
    if (bump && rows_[i].table && rows_[i].table->grad(rows_[i].slot)) bump_version(rows_[i]);
  }
  return true;
}

bool Watch::bump_version(const Row& row) {
  return row.param.bump_version() && (!row.is_shard || row.listed.bump_version());
}

void Watch::note_shard(PyObject* shard) {
  has_shards_ = true;
  has_odd_shards_ = has_odd_shards_ || !shard_layout() || Py_TYPE(shard) != shard_layout()->shard;
}

size_t Watch::num_parts() const {
  return has_torch_functions() && !has_odd_shards_ ? (rows_.size() + kPart - 1) / kPart : 1;
}

void Watch::summon() const { fusedopt::summon(threads_for(num_parts())); }

bool Watch::refresh(py::list param_groups, py::dict state, py::list relayout, bool bump) {
  std::vector<ParamList> params;
  if (!state_.unchanged(state.ptr()) || !same_flags(param_groups.ptr()) || !find_params(param_groups.ptr(), params))
    return false;
  if (has_main_grads_ && !same_main_grads()) return false;
  // Waiting for memory is most of the work, and several threads wait at the same time. They change no Python object.
  const size_t parts = num_parts();
  std::atomic<bool> fresh{true};
  parallel_for(threads_for(parts), int64(parts), [&](int64 part) {
    if (fresh.load(std::memory_order_relaxed) && !read_part(params, size_t(part), parts, bump)) fresh = false;
  });
  if (!fresh) return false;
  for (size_t i = 0; i < rows_.size(); ++i)
    if (relayout_[i]) relayout.append(Py_ssize_t(i));
  return true;
}

bool Watch::bump_versions() const {
  if (!has_torch_functions()) return false;
  for (const Row& row : rows_)
    if (row.table && row.table->grad(row.slot) && !bump_version(row)) return false;
  return true;
}

bool Watch::has_grads() const {
  for (const Row& row : rows_)
    if (row.table && row.table->has_own(row.slot)) return true;
  return false;
}

void Watch::hold() {
  for (const Row& row : rows_)
    if (row.table && row.held && row.table->has_own(row.slot)) row.held->set(true);
}

void Watch::drop_grads() {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  for (const Row& row : rows_)
    if (row.table && row.table->has_own(row.slot) && PyObject_SetAttr(row.listed.object(), name, Py_None) != 0)
      throw py::error_already_set();
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
