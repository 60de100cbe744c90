#include "repeated_step.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

// Interned once: to look a name up is then to compare pointers.
struct Names {
  PyObject* scalars = PyUnicode_InternFromString("_scalars");
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

bool is_empty(PyObject* container) { return container && PyObject_Size(container) == 0; }

}  // namespace

bool RepeatedStep::is_plain(PyObject* optimizer) const {
  const Names& name = names();
  if (PyDict_GetItem(optimizer, name.scalars) != conditions_.scalars.ptr() ||
      PyDict_GetItem(optimizer, name.accumulator) != Py_None)
    return false;
  for (PyObject* given : name.given)
    if (PyDict_GetItem(optimizer, given)) return false;
  for (PyObject* hooks : name.hooks)
    if (!is_empty(PyDict_GetItem(optimizer, hooks))) return false;
  for (const py::handle hooks : conditions_.hooks)
    if (!is_empty(hooks.ptr())) return false;
  return !conditions_.is_profiled().cast<bool>();
}

bool RepeatedStep::run(py::dict optimizer) {
  if (!is_plain(optimizer.ptr())) return false;
  const auto groups = py::reinterpret_borrow<py::list>(PyDict_GetItem(optimizer.ptr(), names().groups));
  const auto state = py::reinterpret_borrow<py::dict>(PyDict_GetItem(optimizer.ptr(), names().state));
  const py::list relayout;
  if (!watch_.refresh(groups, state, relayout, true) || !relayout.empty()) return false;
  if (groups.size() != hypers_.rows().size() || !hypers_.pack(groups).empty()) return false;
  for (const Launch& launch : launches_) launch.table->pack(hypers_.rows(), launch.capacity);
  auto* const stream = reinterpret_cast<void*>(conditions_.stream_of(conditions_.device).cast<uint64>());
  for (const Launch& launch : launches_) {
    if (!launch.grid) continue;
    void* params[2] = {launch.args, launch.table->packed()};
    CudaDriver::instance().launch(launch.context, launch.function, launch.grid, kCudaThreads, stream, params);
  }
  return true;
}

}  // namespace fusedopt
