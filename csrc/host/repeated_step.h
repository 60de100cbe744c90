// A step that differs from the one before it in gradients and hyper-parameters only: reads both and launches, in one
// call from Python. With caches that the backward pass has filled with other things, each line of Python on the way
// costs microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cuda_driver.h"
#include "hypers.h"
#include "watch.h"

namespace fusedopt {

class RepeatedStep {
 public:
  // What makes a step different, or observed, so that it has to take the long way.
  struct Conditions {
    pybind11::object scalars;          // the optimizer's `_scalars` in the last step
    pybind11::object hooks;            // tuple of the dicts with the hooks of all optimizers
    pybind11::object backend;          // the optimizer's `_backend`
    pybind11::object is_profiled;      // builtin function: () -> bool
    pybind11::object context_backend;  // () -> str or None, what `use_backend` asks for
  };

  // watch, hypers: the plan's own. hypers: of every rule. run_passes: () -> None, the passes, when gradients and
  // hyper-parameters have been read; None where there are launches instead.
  RepeatedStep(Watch& watch, std::vector<Hypers*> hypers, Conditions conditions, pybind11::object run_passes);

  // stream_of: builtin function, (device index) -> int, the current stream.
  void launch_on(pybind11::object stream_of, pybind11::object device);
  // In the order in which the kernels are launched. hypers: of the table's rule. args: PassArgs, as they were for the
  // last step. capacity: bytes of step table that the kernel takes as a parameter.
  void add(Table& table, Hypers& hypers, void* args, void* context, void* function, uint32 grid, size_t capacity);

  // Keeps what the others are given by reference or by pointer.
  void own(pybind11::object object) { owned_.push_back(std::move(object)); }

  // Whether it may repeat a step that is told these scalars.
  bool serves(pybind11::handle scalars) const { return conditions_.scalars.is(scalars) && asks_as_before(); }

  // optimizer: its __dict__. False, with nothing launched, where this step is not like the last one.
  bool run(pybind11::dict optimizer);

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Launch {
    Table* table;
    Hypers* hypers;
    void* args;
    void* context;
    void* function;
    uint32 grid;
    size_t capacity;
  };

  bool asks_as_before() const;  // for the same backend
  bool is_plain(PyObject* optimizer) const;
  void launch() const;

  Watch& watch_;
  std::vector<Hypers*> hypers_;
  Conditions conditions_;
  pybind11::object asked_;  // what `context_backend` said of the last step
  pybind11::object run_passes_;
  pybind11::object stream_of_, device_;
  std::vector<Launch> launches_;
  std::vector<pybind11::object> owned_;
  bool cleared_ = false;  // by Python's collector
};

}  // namespace fusedopt
