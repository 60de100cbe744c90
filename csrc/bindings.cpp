// The extension module fusedopt._C: the CPU engine and the host side of both engines. Addresses travel as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>

#include "cpu/checks.h"
#include "cpu/passes.h"
#include "cuda/args.h"
#include "host/cuda_driver.h"
#include "host/hypers.h"
#include "host/repeated_step.h"
#include "host/shard.h"
#include "host/table.h"
#include "host/tensor_layout.h"
#include "host/watch.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

template <class T>
T* address(uint64 value) {
  return reinterpret_cast<T*>(value);
}

// The Python object of something that came from Python.
template <class T>
py::object owner(T& value) {
  return py::cast(&value, py::return_value_policy::reference);
}

// ---- rules ----------------------------------------------------------------------------------------------

py::list rules() {
  py::list result;
  for (const RuleInfo& rule : rule_infos()) {
    py::list moments;
    for (const Moment moment : rule.moments) moments.append(moment == Moment::kFirst ? "first" : "second");
    result.append(py::dict(py::arg("struct_name") = rule.struct_name, py::arg("name") = rule.name,
                           py::arg("states") = py::str(rule.states).attr("split")(),
                           py::arg("num_states") = rule.moments.size(), py::arg("moments") = moments,
                           py::arg("norms") = rule.norms, py::arg("hyper") = py::str(rule.hyper).attr("split")()));
  }
  return result;
}

// ---- tables ---------------------------------------------------------------------------------------------

int32 table_add(Table& table, uint64 param, uint64 extra, const std::vector<uint64>& states,
                const std::vector<uint64>& scales, uint64 step, uint64 main_grad, int64 numel, int32 group, uint32 id,
                uint64 norms) {
  if (states.size() > size_t(kMaxStates) || scales.size() > states.size())
    throw std::invalid_argument("Table.add: more states than kMaxStates, or more scales than states");
  TensorEntry entry = {};
  entry.param = address<void>(param);
  entry.extra = address<void>(extra);
  for (size_t k = 0; k < states.size(); ++k) entry.states[k] = address<void>(states[k]);
  for (size_t k = 0; k < scales.size(); ++k) entry.scales[k] = address<float>(scales[k]);
  entry.step = address<float>(step);
  entry.main_grad = address<void>(main_grad);
  entry.numel = numel;
  entry.group = group;
  entry.id = id;
  entry.norms = address<double>(norms);
  return table.add(entry);
}

template <class Row>
py::bytes as_bytes(const std::vector<Row>& rows) {
  return py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(Row));
}

// ---- CPU passes -----------------------------------------------------------------------------------------

GradTable grad_table(Table& table, int32 grad_dtype, int32 main_dtype) {
  return {table.entries().data(), table.grads().data(), DType(grad_dtype), DType(main_dtype), table.chunk_size()};
}

bool nonzero(const float* flag) { return flag && *flag != 0.0f; }

Range part_of(const char* where, const Table& table, int64 begin, int64 end) {
  const Range part = {begin, end < 0 ? int64(table.chunks().size()) : end};
  if (part.begin < 0 || part.begin > part.end || part.end > int64(table.chunks().size()))
    throw std::invalid_argument(std::string(where) + ": got chunks [" + std::to_string(part.begin) + ", " +
                                std::to_string(part.end) + "), expected a part of the table's " +
                                std::to_string(table.chunks().size()) + "; see Table.num_chunks");
  return part;
}

UpdateJob update_job(const char* where, Table& table, const Hypers& hypers, int32 rule, int32 param_format,
                     int32 grad_dtype, int32 main_dtype, int32 state_format, const PassArgs& args) {
  check_update(where, table, hypers.rows().size(), rule, param_format, grad_dtype, main_dtype, state_format);
  return {grad_table(table, grad_dtype, main_dtype),
          ParamFormat(param_format),
          StateFormat(state_format),
          rule,
          args.seed,
          hypers.rows().data(),
          args.scaling};
}

bool must_skip(const PassArgs& args) { return nonzero(args.scaling.found_inf) || nonzero(args.norm_found_inf); }

void bind_cpu_measure(Table& table, const Hypers& hypers, int32 rule, int32 param_format, int32 grad_dtype,
                      int32 main_dtype, int32 state_format, const PassArgs& args, int threads, int64 begin, int64 end) {
  const py::gil_scoped_release release;
  const Range part = part_of("cpu_measure", table, begin, end);
  check_measure(rule);
  const UpdateJob job =
      update_job("cpu_measure", table, hypers, rule, param_format, grad_dtype, main_dtype, state_format, args);
  if (!must_skip(args)) cpu_measure(job, table.chunks(), part, threads);
}

void bind_cpu_update(Table& table, const Hypers& hypers, int32 rule, int32 param_format, int32 grad_dtype,
                     int32 main_dtype, int32 state_format, const PassArgs& args, int threads, int64 begin, int64 end) {
  const py::gil_scoped_release release;
  const Range part = part_of("cpu_update", table, begin, end);
  const UpdateJob job =
      update_job("cpu_update", table, hypers, rule, param_format, grad_dtype, main_dtype, state_format, args);
  const bool skip = must_skip(args);
  cpu_update(job, table.chunks(), part, int64(table.entries().size()), skip, threads);
  if (args.lead && args.control) {
    args.control->skipped = skip ? 1.0f : 0.0f;
    args.control->skipped_steps += skip;
  }
}

std::pair<double, double> bind_cpu_norm(Table& table, int32 grad_dtype, int32 main_dtype, const PassArgs& args,
                                        double sum, double nonfinite, int threads) {
  const py::gil_scoped_release release;
  check_dtypes("cpu_norm", grad_dtype, main_dtype);
  const NormJob job = {grad_table(table, grad_dtype, main_dtype), args.scaling, args.norm.type};
  cpu_norm(job, table.chunks(), threads, sum, nonfinite);
  return {sum, nonfinite};
}

void bind_cpu_accumulate(Table& table, int32 grad_dtype, int32 main_dtype, const PassArgs& args, int threads) {
  const py::gil_scoped_release release;
  check_accumulate(table, grad_dtype, main_dtype);
  cpu_accumulate({grad_table(table, grad_dtype, main_dtype), args.scaling}, table.chunks(), threads);
}

void bind_cpu_scale(Table& table, int32 grad_dtype, const PassArgs& args, int threads) {
  const py::gil_scoped_release release;
  check_dtypes("cpu_scale", grad_dtype, grad_dtype);
  cpu_scale({grad_table(table, grad_dtype, grad_dtype), args.scaling, args.nonfinite_out}, table.chunks(), threads);
}

// ---- the scalars of a step --------------------------------------------------------------------------------

void set_scalars(const std::vector<std::reference_wrapper<PassArgs>>& all, uint64 grad_scale, uint64 found_inf,
                 uint64 clip_coef, uint64 norm_found_inf, double max_grad_value, double max_norm, int32 norm_type,
                 bool skip_nonfinite, uint64 nonfinite_out, double grad_weight, uint64 grad_weight_at,
                 double grad_divisor, uint64 grad_divisor_at) {
  if (norm_type < 0 || norm_type > int32(NormType::kInf))
    throw std::invalid_argument("set_scalars: got norm_type=" + std::to_string(norm_type) +
                                ", expected 0 to 2; pass a code of fusedopt.specs");
  for (PassArgs& args : all) {
    args.scaling = {address<float>(grad_scale),
                    address<float>(found_inf),
                    address<double>(clip_coef),
                    max_grad_value,
                    grad_weight,
                    grad_divisor,
                    address<float>(grad_weight_at),
                    address<float>(grad_divisor_at)};
    args.norm_found_inf = address<float>(norm_found_inf);
    args.norm = {max_norm, NormType(norm_type), skip_nonfinite};
    args.nonfinite_out = address<float>(nonfinite_out);
  }
}

// ---- the step table, for engines that read it from memory ---------------------------------------------------

// Writes PassArgs, the Hyper rows and the gradient pointers to the host address `to`, unless `previous` (may be null)
// holds the same. Returns whether it wrote.
bool pack_step(uint64 to, uint64 previous, const PassArgs& args, Table& table, const Hypers& hypers) {
  table.pack(hypers.rows(), 0);
  const size_t bytes = table.packed_bytes(hypers.rows().size());
  const char* last = address<char>(previous);
  if (last && std::memcmp(last, &args, sizeof(args)) == 0 &&
      std::equal(table.packed(), table.packed() + bytes, last + sizeof(args)))
    return false;
  if (!to) throw std::invalid_argument("pack_step: got no address to write to, expected a host address");
  std::memcpy(address<char>(to), &args, sizeof(args));
  std::copy_n(table.packed(), bytes, address<char>(to) + sizeof(args));
  return true;
}

// ---- CUDA passes ----------------------------------------------------------------------------------------

void cuda_launch(uint64 context, uint64 function, uint32 grid, uint64 stream, PassArgs& args, Table* table,
                 bool overlaps) {
  if (table && table->packed_size() == 0)
    throw std::invalid_argument("cuda_launch: got a table that was not packed, expected Table.pack before");
  void* params[2] = {&args, table ? table->packed() : nullptr};
  CudaDriver::instance().launch(address<void>(context), address<void>(function), grid, kCudaThreads,
                                address<void>(stream), params, 0, overlaps);
}

// Writes `bytes` bytes of the packed step table, from `offset` on, to the device address `to`.
void cuda_upload(uint64 context, uint64 function, uint64 stream, uint64 to, Table& table, size_t offset, int32 bytes,
                 size_t capacity) {
  Table::check_capacity(capacity);
  if (bytes < 0 || size_t(bytes) > capacity || offset > table.packed_size() ||
      size_t(bytes) > table.packed_size() - offset)
    throw std::invalid_argument("cuda_upload: got a part that the packed table or the capacity does not hold");
  std::vector<char> part(capacity);
  std::copy_n(table.packed() + offset, size_t(bytes), part.data());
  void* params[3] = {&to, &bytes, part.data()};
  CudaDriver::instance().launch(address<void>(context), address<void>(function), 1, kCudaThreads, address<void>(stream),
                                params);
}

// For kernels whose parameters are 64-bit words, as Triton's are. They may have parameters of their own behind `words`,
// which they do not use (scratch memory): those are null.
void cuda_launch_words(uint64 context, uint64 function, uint32 grid, uint32 threads, uint32 shared_bytes, uint64 stream,
                       std::vector<uint64> words) {
  constexpr size_t kUnused = 8;
  words.resize(words.size() + kUnused);
  std::vector<void*> params;
  for (uint64& word : words) params.push_back(&word);
  CudaDriver::instance().launch(address<void>(context), address<void>(function), grid, threads, address<void>(stream),
                                params.data(), shared_bytes);
}

// A field that is a pointer, seen from Python as an integer.
#define FUSEDOPT_ADDRESS(name, member)                                                  \
  def_property(                                                                         \
      name, [](const PassArgs& args) { return reinterpret_cast<uint64>(args.member); }, \
      [](PassArgs& args, uint64 value) {                                                \
        args.member = address<std::remove_pointer_t<decltype(args.member)>>(value);     \
      })
#define FUSEDOPT_VALUE(name, member)                          \
  def_property(                                               \
      name, [](const PassArgs& args) { return args.member; }, \
      [](PassArgs& args, decltype(PassArgs().member) value) { args.member = value; })

void bind_pass_args(py::module_& m) {
  py::class_<PassArgs>(m, "PassArgs")
      .def(py::init([] {
        PassArgs args = {};
        args.scaling.max_grad_value = __builtin_inf();
        args.scaling.grad_weight = args.scaling.grad_divisor = 1.0;
        args.norm.max_norm = __builtin_inf();
        return args;
      }))
      .def("copy", [](const PassArgs& args) { return args; })
      .FUSEDOPT_ADDRESS("tensors", tensors)
      .FUSEDOPT_ADDRESS("chunks", chunks)
      .FUSEDOPT_ADDRESS("step_table", step_table)
      .FUSEDOPT_ADDRESS("control", control)
      .FUSEDOPT_ADDRESS("partials", partials)
      .FUSEDOPT_ADDRESS("norms", norms)
      .def_property_readonly("norm_type", [](const PassArgs& args) { return int32(args.norm.type); })
      .def_property_readonly("max_grad_value", [](const PassArgs& args) { return args.scaling.max_grad_value; })
      .FUSEDOPT_VALUE("seed", seed)
      .FUSEDOPT_VALUE("num_groups", num_groups)
      .FUSEDOPT_VALUE("num_chunks", num_chunks)
      .FUSEDOPT_VALUE("lead", lead)
      .FUSEDOPT_VALUE("first_partial", first_partial)
      .FUSEDOPT_VALUE("num_partials", num_partials)
      .FUSEDOPT_VALUE("finalize", finalize);
}

// ---- the watch --------------------------------------------------------------------------------------------

// Lets Python's collector see through an object: a parameter's hook may hold the optimizer that holds the object.
template <class T>
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<T&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) -> int {
    if (py::detail::is_holder_constructed(self)) py::cast<T&>(py::handle(self)).clear();
    return 0;
  };
}

// ---- repeated steps -----------------------------------------------------------------------------------------

PyObject* run_repeated_step(PyObject* self, PyObject* optimizer) {
  try {
    auto* const instance = reinterpret_cast<py::detail::instance*>(self);
    auto* const step = instance->get_value_and_holder().value_ptr<RepeatedStep>();
    if (!PyDict_Check(optimizer)) throw py::type_error("RepeatedStep.run: got something else than a __dict__");
    return PyBool_FromLong(step->run(py::reinterpret_borrow<py::dict>(optimizer)));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The method that every step calls. Python calls it directly: with cold caches pybind11's own way takes microseconds.
void add_run(const py::object& repeated_step) {
  static PyMethodDef method = {"run", &run_repeated_step, METH_O, "(optimizer's __dict__) -> bool"};
  auto* const type = reinterpret_cast<PyTypeObject*>(repeated_step.ptr());
  repeated_step.attr("run") = py::reinterpret_steal<py::object>(PyDescr_NewMethod(type, &method));
}

}  // namespace
}  // namespace fusedopt

PYBIND11_MODULE(_C, m) {
  using namespace fusedopt;
  m.doc() = R"(CPU engine and host side of fusedopt.

Addresses are integers, 0 for none. Table.add, Table.set_grad, Hypers.set_lr_address, set_scalars and PassArgs keep
them and read nothing there; the functions cpu_*, pack_step and cuda_* do. That they are those of memory in the named
dtype, as large as the tensor, aligned to its elements, on the device, and alive until then, nobody can check: it is
the caller's part. Everything else is checked: ValueError, TypeError, IndexError or OverflowError for what does not fit,
before anything is written. tests/fuzz holds it to that.)";
  m.def("rules", &rules, "What csrc/rules/all.h lists.");
  m.def("cpu_isa", [] { return cpu_engine().isa; }, "The instruction set that the CPU engine uses.");
  m.def("has_tensor_layout", [] { return tensor_layout() != nullptr; }, "Whether tensors are read in place.");
  m.def("finds_tensor_layout", &finds_tensor_layout, "Whether it is found out now how to read them. For tests.");
  m.def("has_shard_layout", [] { return shard_layout() != nullptr; }, "Whether DTensors are read in place.");
  m.def("has_torch_functions", &has_torch_functions, "Whether tensors are read through torch's own C functions.");

  py::class_<Table>(m, "Table")
      .def(py::init<int64>(), py::arg("chunk_size"))
      .def(
          "add", &table_add, py::arg("param"), py::arg("extra"), py::arg("states"), py::arg("scales"), py::arg("step"),
          py::arg("main_grad"), py::arg("numel"), py::arg("group"), py::arg("id"), py::arg("norms") = 0,
          "A tensor of numel elements; returns its slot. Addresses: param, extra, states (up to 4), main_grad of numel "
          "elements, scales of one float32 for 256 of them, step of one float32, norms of as many float64 as its rule "
          "has norms.")
      .def(
          "set_grad",
          [](Table& table, int32 index, uint64 grad) {
            if (grad & 1) throw std::invalid_argument("Table.set_grad: got an odd address, expected that of elements");
            table.set_grad(index, address<void>(grad), table.has_main(index));
          },
          "The gradient of a slot: the address of numel elements, or 0 where it has none in this step.")
      .def(
          "set_memory",
          [](Table& table, int32 index, uint64 param, uint64 grad, uint64 main_grad, bool has_main) {
            if (grad & 1)
              throw std::invalid_argument("Table.set_memory: got an odd address, expected that of elements");
            table.set_memory(index, address<void>(param), address<void>(main_grad));
            table.set_grad(index, address<void>(grad), has_main);
          },
          py::arg("slot"), py::arg("param"), py::arg("grad"), py::arg("main_grad") = 0, py::arg("has_main") = false,
          "Where a slot's parameter, gradient and main gradient are from now on. Addresses of their first elements, "
          "whether or not those are there: a pass over some chunks looks at the elements of these alone.")
      .def("entries", [](const Table& table) { return as_bytes(table.entries()); })
      .def("chunks", [](const Table& table) { return as_bytes(table.chunks()); })
      .def("pack", [](Table& table, const Hypers& hypers, size_t capacity) { table.pack(hypers.rows(), capacity); })
      .def_property_readonly("num_tensors", [](const Table& table) { return table.entries().size(); })
      .def_property_readonly("num_chunks", [](const Table& table) { return table.chunks().size(); })
      .def("packed_bytes", &Table::packed_bytes, py::arg("num_groups"));

  py::class_<Hypers>(m, "Hypers")
      .def(py::init<const std::vector<std::pair<std::string, int>>&>(), py::arg("keys"))
      .def("pack", &Hypers::pack)
      .def("set_value", &Hypers::set_value)
      .def("set_lr_address", &Hypers::set_lr_address)
      .def("learning_rates", &Hypers::learning_rates);

  py::class_<Epoch, std::shared_ptr<Epoch>>(m, "Epoch").def(py::init<>()).def("advance", [](Epoch& epoch) {
    ++epoch.now;
  });
  py::class_<Held, std::shared_ptr<Held>>(m, "Held")
      .def(py::init<std::shared_ptr<Epoch>>(), py::arg("epoch"))
      .def_property("value", &Held::value, &Held::set);

  py::class_<Watch>(m, "Watch", py::custom_type_setup(&make_collectable<Watch>))
      .def(py::init<>())
      .def("add", &Watch::add, py::arg("param"), py::arg("as_seen"), py::arg("group"), py::arg("grad_dtype"),
           py::arg("table"), py::arg("slot"), py::arg("has_main_grad"), py::arg("held") = nullptr,
           py::arg("local") = py::none())
      .def("know_spec", &Watch::know_spec, py::arg("row"), py::arg("spec"))
      .def("remember_state", &Watch::remember_state)
      .def("remember_flags", &Watch::remember_flags)
      .def("refresh", &Watch::refresh, py::arg("param_groups"), py::arg("state"), py::arg("relayout"),
           py::arg("bump") = false)
      .def("bump_versions", &Watch::bump_versions)
      .def("has_grads", &Watch::has_grads)
      .def("hold", &Watch::hold)
      .def("drop_grads", &Watch::drop_grads)
      .def("__len__", &Watch::size);

  bind_pass_args(m);
  m.def("set_scalars", &set_scalars,
        "What passes are told besides tables; addresses of one float32, clip_coef float64.");
  m.def(
      "pack_step", &pack_step, py::arg("to"), py::arg("previous"), py::arg("args"), py::arg("table"), py::arg("hypers"),
      "Writes PassArgs, hyper-parameters and gradient addresses to `to`, unless `previous` (or 0) holds the same: host "
      "addresses of sizeof(PassArgs) + table.packed_bytes(groups) bytes. Returns whether it wrote.");
  py::class_<RepeatedStep>(m, "RepeatedStep", py::custom_type_setup(&make_collectable<RepeatedStep>))
      .def(py::init([](Watch& watch, const std::vector<std::reference_wrapper<Hypers>>& hypers,
                       const std::vector<std::reference_wrapper<PassArgs>>& all_args, py::tuple finding,
                       py::object scalars, py::object hooks, py::object backend, py::object context_backend,
                       bool reports, py::object accumulator, py::object divisor, bool has_own_grads,
                       py::object run_passes) {
             std::vector<Hypers*> pointers;
             for (Hypers& each : hypers) pointers.push_back(&each);
             std::vector<Scaling*> scalings;
             for (PassArgs& args : all_args) scalings.push_back(&args.scaling);
             auto step =
                 std::make_unique<RepeatedStep>(watch, pointers, RepeatedStep::Scalers{std::move(scalings), finding},
                                                RepeatedStep::Conditions{scalars, hooks, backend, context_backend,
                                                                         reports, accumulator, divisor, has_own_grads},
                                                run_passes);
             step->own(owner(watch));
             for (Hypers& each : hypers) step->own(owner(each));
             for (PassArgs& args : all_args) step->own(owner(args));
             return step;
           }),
           py::arg("watch"), py::arg("hypers"), py::arg("args"), py::arg("finding"), py::arg("scalars"),
           py::arg("hooks"), py::arg("backend"), py::arg("context_backend"), py::arg("reports"), py::arg("accumulator"),
           py::arg("divisor"), py::arg("has_own_grads"), py::arg("run_passes"))
      .def("launch_on", &RepeatedStep::launch_on)
      .def("add",
           [](RepeatedStep& step, Table* table, Hypers* hypers, PassArgs& args, uint64 context, uint64 function,
              uint32 grid, size_t capacity, bool overlaps) {
             step.add(table, hypers, &args, address<void>(context), address<void>(function), grid, capacity, overlaps);
             if (table) step.own(owner(*table)), step.own(owner(*hypers));
             step.own(owner(args));
           })
      .def("exchange", &RepeatedStep::exchange)
      .def("serves", &RepeatedStep::serves);
  add_run(m.attr("RepeatedStep"));
  m.def("cpu_measure", &bind_cpu_measure, py::arg("table"), py::arg("hypers"), py::arg("rule"), py::arg("param_format"),
        py::arg("grad_dtype"), py::arg("main_dtype"), py::arg("state_format"), py::arg("args"), py::arg("threads"),
        py::arg("begin") = 0, py::arg("end") = -1,
        "The first phase of a rule of two, as cpu_update: sums of squares to where the tensors' `norms` are. A part "
        "must hold whole tensors.");
  m.def("cpu_update", &bind_cpu_update, py::arg("table"), py::arg("hypers"), py::arg("rule"), py::arg("param_format"),
        py::arg("grad_dtype"), py::arg("main_dtype"), py::arg("state_format"), py::arg("args"), py::arg("threads"),
        py::arg("begin") = 0, py::arg("end") = -1,
        "The update pass over a table's memory, which must be in these formats, or over its chunks [begin, end): steps "
        "are counted with the last one. Of a rule of two phases the second.");
  m.def("cpu_norm", &bind_cpu_norm,
        "(table, grad_dtype, main_dtype, args, sum, nonfinite, threads): `sum` and `nonfinite` with the gradients' "
        "added.");
  m.def("cpu_accumulate", &bind_cpu_accumulate,
        "(table, grad_dtype, main_dtype, args, threads): gradients added to main gradients.");
  m.def("cpu_scale", &bind_cpu_scale, "(table, grad_dtype, args, threads): gradients multiplied and clamped in place.");
  m.def("cpu_finalize_norm", [](const PassArgs& args, double sum, double nonfinite) {
    if (!args.control)
      throw std::invalid_argument("cpu_finalize_norm: got no `control` to write to, expected its address in `args`");
    cpu_finalize_norm(*args.control, sum, nonfinite, args.norm);
  });
  m.def("cuda_driver_version", [] { return CudaDriver::instance().version(); });
  m.def("cuda_primary_context",
        [](int device) { return reinterpret_cast<uint64>(CudaDriver::instance().primary_context(device)); });
  m.def("cuda_load", [](uint64 context, const std::string& cubin, const std::string& name) {
    return reinterpret_cast<uint64>(CudaDriver::instance().load(address<void>(context), cubin, name));
  });
  m.def(
      "cuda_launch", &cuda_launch,
      "(context, function, grid, stream, args, table or None, overlaps): handles of the driver; the table packed with "
      "as many bytes as the kernel takes. overlaps: the kernel may begin while the one before it runs.");
  m.def("cuda_launch_words", &cuda_launch_words,
        "(context, function, grid, threads, shared_bytes, stream, words): of a kernel whose parameters are 64-bit "
        "integers.");
  m.def("cuda_upload", &cuda_upload,
        "(context, function, stream, to, table, offset, bytes, capacity): a part of the packed table to the device "
        "address `to`.");
}
