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
  PyObject* release = PyUnicode_InternFromString("_release");
  // By these attributes scalers speak to one step.
  PyObject* grad_scale = PyUnicode_InternFromString("grad_scale");
  PyObject* found_inf = PyUnicode_InternFromString("found_inf");
  PyObject* nonfinite_found = PyUnicode_InternFromString("_nonfinite_found");
};

const Names& names() {
  static const Names* const all = new Names;  // never freed: outlives the interpreter's own teardown
  return *all;
}

bool is_empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_Size(dict) == 0; }

// Tells the passes of a scaler's tensors and an accumulator's divisor for a scope. Outside of it they are told of no
// tensors, and of the divisor of before: the long way tells them of scalars only where these have changed since it did.
class GivenForOneStep {
 public:
  GivenForOneStep(const std::vector<Scaling*>& scalings, const float* grad_scale, const float* found_inf,
                  double divisor)
      : scalings_(scalings), divisor_before_(scalings.front()->grad_divisor) {
    set(grad_scale, found_inf, divisor);
  }
  ~GivenForOneStep() { set(nullptr, nullptr, divisor_before_); }
  GivenForOneStep(const GivenForOneStep&) = delete;
  GivenForOneStep& operator=(const GivenForOneStep&) = delete;

 private:
  void set(const float* grad_scale, const float* found_inf, double divisor) {
    for (Scaling* scaling : scalings_) {
      scaling->grad_scale = grad_scale;
      scaling->found_inf = found_inf;
      scaling->grad_divisor = divisor;
    }
  }

  const std::vector<Scaling*>& scalings_;
  const double divisor_before_;
};

}  // namespace

RepeatedStep::RepeatedStep(Watch& watch, std::vector<Hypers*> hypers, Scalers scalers, Conditions conditions,
                           py::object run_passes)
    : watch_(watch),
      hypers_(std::move(hypers)),
      scalers_(std::move(scalers)),
      grad_scale_(scalers_.finding[1]),
      found_inf_(scalers_.finding[1]),
      conditions_(std::move(conditions)),
      asked_(conditions_.context_backend()),
      run_passes_(std::move(run_passes)) {}

void RepeatedStep::launch_on(py::object stream_of, py::object device) {
  stream_of_ = std::move(stream_of);
  device_ = std::move(device);
}

void RepeatedStep::add(Table* table, Hypers* hypers, void* args, void* context, void* function, uint32 grid,
                       size_t capacity, bool overlaps) {
  if (!table != !hypers)
    throw std::invalid_argument("RepeatedStep.add: got one of table and hypers, expected both or neither");
  Table::check_capacity(capacity);
  launches_.push_back({table, hypers, args, context, function, grid, capacity, overlaps});
}

void RepeatedStep::exchange(py::object exchange) { exchanges_.push_back({launches_.size(), std::move(exchange)}); }

bool RepeatedStep::asks_as_before() const { return conditions_.context_backend().is(asked_); }

bool RepeatedStep::is_like_the_last(PyObject* optimizer) const {
  const Names& name = names();
  if (PyDict_GetItem(optimizer, name.scalars) != conditions_.scalars.ptr() ||
      PyDict_GetItem(optimizer, name.accumulator) != conditions_.accumulator.ptr() ||
      PyDict_GetItem(optimizer, name.backend) != conditions_.backend.ptr())
    return false;
  for (PyObject* hooks : name.hooks)
    if (!is_empty(PyDict_GetItem(optimizer, hooks))) return false;
  for (const py::handle hooks : conditions_.hooks)
    if (!is_empty(hooks.ptr())) return false;
  return asks_as_before() && !is_profiled();
}

bool RepeatedStep::take_what_scalers_give(PyObject* optimizer) {
  const Names& name = names();
  PyObject* const grad_scale = PyDict_GetItem(optimizer, name.grad_scale);
  PyObject* const found_inf = PyDict_GetItem(optimizer, name.found_inf);
  PyObject* const nonfinite_found = PyDict_GetItem(optimizer, name.nonfinite_found);
  if (bool(nonfinite_found) != conditions_.reports) return false;
  // While gradients are released no scaler may be there.
  if ((grad_scale || found_inf || nonfinite_found) && PyDict_GetItem(optimizer, name.release) != Py_None) return false;
  // Torch's scaler has not seen what is accumulated, and must be told so.
  if (found_inf && found_inf != Py_None && !nonfinite_found && !conditions_.accumulator.is_none()) return false;
  return grad_scale_.take(grad_scale) && found_inf_.take(found_inf);
}

bool RepeatedStep::take_divisor() {
  if (conditions_.accumulator.is_none()) return true;
  const py::object divisor = conditions_.divisor();
  if (divisor.is_none()) return false;
  divisor_ = divisor.cast<double>();
  return true;
}

// Where the scaler finds, when the device has come to it, whether to lower its scale.
void RepeatedStep::report(PyObject* optimizer) const {
  if (!conditions_.reports) return;
  const py::object& accumulator = conditions_.accumulator;
  if (!watch_.has_grads() && (accumulator.is_none() || !accumulator.attr("holds").cast<bool>())) return;
  PyObject* const found = PyDict_GetItem(optimizer, names().nonfinite_found);
  py::reinterpret_borrow<py::dict>(found)[scalers_.finding[0]] = scalers_.finding[1];
}

void RepeatedStep::run_passes() const {
  const GivenForOneStep given(scalers_.scalings, grad_scale_.address(), found_inf_.address(), divisor_);
  if (run_passes_.is_none())
    launch();
  else
    run_passes_();
}

void RepeatedStep::launch() const {
  if (!stream_of_) throw std::logic_error("RepeatedStep.run: got no stream, expected launch_on() before");
  for (const Launch& each : launches_)
    if (each.table) each.table->pack(each.hypers->rows(), each.capacity);
  auto* const stream = reinterpret_cast<void*>(stream_of_(device_).cast<uint64>());
  size_t done = 0;
  for (const Exchange& exchange : exchanges_) {
    launch_range(done, exchange.launches, stream);
    exchange.run();
    done = exchange.launches;
  }
  launch_range(done, launches_.size(), stream);
}

void RepeatedStep::launch_range(size_t begin, size_t end, void* stream) const {
  for (size_t i = begin; i < end; ++i) {
    const Launch& each = launches_[i];
    if (!each.grid) continue;
    void* params[2] = {each.args, each.table ? each.table->packed() : nullptr};
    CudaDriver::instance().launch(each.context, each.function, each.grid, kCudaThreads, stream, params, 0,
                                  each.overlaps);
  }
}

bool RepeatedStep::run(py::dict optimizer) {
  if (cleared_) return false;
  watch_.summon();
  if (!is_like_the_last(optimizer.ptr()) || !take_what_scalers_give(optimizer.ptr()) || !take_divisor()) return false;
  PyObject* const found_groups = PyDict_GetItem(optimizer.ptr(), names().groups);
  PyObject* const found_state = PyDict_GetItem(optimizer.ptr(), names().state);
  if (!found_groups || !PyList_Check(found_groups) || !found_state || !PyDict_Check(found_state)) return false;
  const auto groups = py::reinterpret_borrow<py::list>(found_groups);
  const auto state = py::reinterpret_borrow<py::dict>(found_state);
  const py::list relayout;
  if (!watch_.refresh(groups, state, relayout, true) || !relayout.empty()) return false;
  for (Hypers* hypers : hypers_)
    if (groups.size() != hypers->rows().size() || !hypers->pack(groups).empty()) return false;
  const bool accumulates = !conditions_.accumulator.is_none();
  if (accumulates && watch_.has_grads() != conditions_.has_own_grads) return false;
  report(optimizer.ptr());
  run_passes();
  if (accumulates) conditions_.accumulator.attr("reset")();
  return true;
}

int RepeatedStep::traverse(visitproc visit, void* arg) const {
  Py_VISIT(conditions_.scalars.ptr());
  Py_VISIT(conditions_.hooks.ptr());
  Py_VISIT(conditions_.accumulator.ptr());
  Py_VISIT(conditions_.divisor.ptr());
  Py_VISIT(run_passes_.ptr());
  for (const Exchange& exchange : exchanges_) Py_VISIT(exchange.run.ptr());
  for (const py::object& object : owned_) Py_VISIT(object.ptr());
  const int stop = grad_scale_.traverse(visit, arg);
  return stop ? stop : found_inf_.traverse(visit, arg);
}

void RepeatedStep::clear() {
  hypers_.clear();
  launches_.clear();
  scalers_.scalings.clear();
  grad_scale_.clear();
  found_inf_.clear();
  exchanges_.clear();
  run_passes_ = py::none();
  conditions_.accumulator = conditions_.divisor = py::none();
  cleared_ = true;
  const auto owned = std::move(owned_);  // freed last, because freeing may call back into Python
  owned_.clear();
}

}  // namespace fusedopt
