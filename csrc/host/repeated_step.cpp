#include "repeated_step.h"

#include <algorithm>
#include <cstdlib>

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

std::string environment_backend() {
  const char* const name = std::getenv("FUSEDOPT_BACKEND");
  return name ? name : "";
}

bool is_empty(PyObject* container) { return container && PyObject_Size(container) == 0; }

}  // namespace

RepeatedStep::RepeatedStep(Watch& watch, Conditions conditions)
    : watch_(watch),
      conditions_(std::move(conditions)),
      asked_(conditions_.context_backend()),
      environment_(environment_backend()) {}

void RepeatedStep::add(Table& table, Hypers& hypers, void* args, void* context, void* function, uint32 grid,
                       size_t capacity) {
  if (std::find(hypers_.begin(), hypers_.end(), &hypers) == hypers_.end()) hypers_.push_back(&hypers);
  launches_.push_back({&table, &hypers, args, context, function, grid, capacity});
}

bool RepeatedStep::asks_as_before() const {
  return conditions_.context_backend().is(asked_) && environment_backend() == environment_;
}

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

bool RepeatedStep::run(py::dict optimizer) {
  if (!is_plain(optimizer.ptr())) return false;
  const auto groups = py::reinterpret_borrow<py::list>(PyDict_GetItem(optimizer.ptr(), names().groups));
  const auto state = py::reinterpret_borrow<py::dict>(PyDict_GetItem(optimizer.ptr(), names().state));
  const py::list relayout;
  if (!watch_.refresh(groups, state, relayout, true) || !relayout.empty()) return false;
  for (Hypers* hypers : hypers_)
    if (groups.size() != hypers->rows().size() || !hypers->pack(groups).empty()) return false;
  for (const Launch& launch : launches_) launch.table->pack(launch.hypers->rows(), launch.capacity);
  auto* const stream = reinterpret_cast<void*>(conditions_.stream_of(conditions_.device).cast<uint64>());
  for (const Launch& launch : launches_) {
    if (!launch.grid) continue;
    void* params[2] = {launch.args, launch.table->packed()};
    CudaDriver::instance().launch(launch.context, launch.function, launch.grid, kCudaThreads, stream, params);
  }
  return true;
}

}  // namespace fusedopt
