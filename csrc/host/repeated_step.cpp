#include "repeated_step.h"

#include <utility>

namespace py = pybind11;

namespace fusedopt {
namespace {

// Interned once: to look a name up is then to compare pointers.
struct Names {
  PyObject* scalars = PyUnicode_InternFromString("_scalars");
  PyObject* backend = PyUnicode_InternFromString("_backend");
  PyObject* accumulator = PyUnicode_InternFromString("_accumulator");
  PyObject* groups = PyUnicode_InternFromString("param_groups");
  PyObject* state = PyUnicode_InternFromString("state");
  PyObject* hooks[2] = {PyUnicode_InternFromString("_optimizer_step_pre_hooks"),
                        PyUnicode_InternFromString("_optimizer_step_post_hooks")};
  // By these attributes scalers speak to one step.
  PyObject* given[3] = {PyUnicode_InternFromString("grad_scale"), PyUnicode_InternFromString("found_inf"),
                        PyUnicode_InternFromString("_nonfinite_found")};
};

const Names& names() {
  static const Names* const all = new Names;  // never freed: outlives the interpreter's own teardown
  return *all;
}

bool is_empty(PyObject* container) {
  if (!container) return false;
  const Py_ssize_t size = PyObject_Size(container);
  if (size < 0) throw py::error_already_set();
  return size == 0;
}

}  // namespace

RepeatedStep::RepeatedStep(Watch& watch, std::vector<Hypers*> hypers, Conditions conditions, py::object run_passes)
    : watch_(watch),
      hypers_(std::move(hypers)),
      conditions_(std::move(conditions)),
      asked_(conditions_.context_backend()),
      run_passes_(std::move(run_passes)) {}

void RepeatedStep::launch_on(py::object stream_of, py::object device) {
  stream_of_ = std::move(stream_of);
  device_ = std::move(device);
}

void RepeatedStep::add(Table& table, Hypers& hypers, void* args, void* context, void* function, uint32 grid,
                       size_t capacity) {
  Table::check_capacity(capacity);
  launches_.push_back({&table, &hypers, args, context, function, grid, capacity});
}

bool RepeatedStep::asks_as_before() const { return conditions_.context_backend().is(asked_); }

bool RepeatedStep::is_plain(PyObject* optimizer) const {
  const Names& name = names();
  if (PyDict_GetItem(optimizer, name.scalars) != conditions_.scalars.ptr() ||
      PyDict_GetItem(optimizer, name.accumulator) != Py_None ||
      PyDict_GetItem(optimizer, name.backend) != conditions_.backend.ptr())
    return false;
  for (PyObject* given : name.given)
    if (PyDict_GetItem(optimizer, given)) return false;
  for (PyObject* hooks : name.hooks)
    if (!is_empty(PyDict_GetItem(optimizer, hooks))) return false;
  for (const py::handle hooks : conditions_.hooks)
    if (!is_empty(hooks.ptr())) return false;
  return asks_as_before() && !conditions_.is_profiled().cast<bool>();
}

void RepeatedStep::launch() const {
  if (!stream_of_) throw std::logic_error("RepeatedStep.run: got no stream, expected launch_on() before");
  for (const Launch& each : launches_) each.table->pack(each.hypers->rows(), each.capacity);
  auto* const stream = reinterpret_cast<void*>(stream_of_(device_).cast<uint64>());
  for (const Launch& each : launches_) {
    if (!each.grid) continue;
    void* params[2] = {each.args, each.table->packed()};
    CudaDriver::instance().launch(each.context, each.function, each.grid, kCudaThreads, stream, params);
  }
}

bool RepeatedStep::run(py::dict optimizer) {
  if (cleared_) return false;
  watch_.summon();
  if (!is_plain(optimizer.ptr())) return false;
  PyObject* const found_groups = PyDict_GetItem(optimizer.ptr(), names().groups);
  PyObject* const found_state = PyDict_GetItem(optimizer.ptr(), names().state);
  if (!found_groups || !PyList_Check(found_groups) || !found_state || !PyDict_Check(found_state)) return false;
  const auto groups = py::reinterpret_borrow<py::list>(found_groups);
  const auto state = py::reinterpret_borrow<py::dict>(found_state);
  const py::list relayout;
  if (!watch_.refresh(groups, state, relayout, true) || !relayout.empty()) return false;
  for (Hypers* hypers : hypers_)
    if (groups.size() != hypers->rows().size() || !hypers->pack(groups).empty()) return false;
  if (run_passes_.is_none())
    launch();
  else
    run_passes_();
  return true;
}

int RepeatedStep::traverse(visitproc visit, void* arg) const {
  Py_VISIT(conditions_.scalars.ptr());
  Py_VISIT(conditions_.hooks.ptr());
  Py_VISIT(run_passes_.ptr());
  for (const py::object& object : owned_) Py_VISIT(object.ptr());
  return 0;
}

void RepeatedStep::clear() {
  hypers_.clear();
  launches_.clear();
  run_passes_ = py::none();
  cleared_ = true;
  const auto owned = std::move(owned_);  // freed last, because freeing may call back into Python
  owned_.clear();
}

}  // namespace fusedopt
