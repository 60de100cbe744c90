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
    pybind11::object scalars;      // the optimizer's `_scalars` in the last step
    pybind11::object hooks;        // tuple of the dicts with the hooks of all optimizers
    pybind11::object is_profiled;  // builtin functions: () -> bool
    pybind11::object stream_of;    // (device index) -> int, the current stream
    pybind11::object device;       // the index
  };

  // watch and hypers: the plan's own; whoever holds this holds them.
  RepeatedStep(Watch& watch, Hypers& hypers, Conditions conditions)
      : watch_(watch), hypers_(hypers), conditions_(std::move(conditions)) {}

  // In the order in which the kernels are launched. args: PassArgs, as they were for the last step. capacity: bytes of
  // step table that the kernel takes as a parameter.
  void add(Table& table, void* args, void* context, void* function, uint32 grid, size_t capacity) {
    launches_.push_back({&table, args, context, function, grid, capacity});
  }

  bool serves(pybind11::handle scalars) const { return conditions_.scalars.is(scalars); }

  // optimizer: its __dict__. False, with nothing launched, where this step is not like the last one.
  bool run(pybind11::dict optimizer);

 private:
  struct Launch {
    Table* table;
    void* args;
    void* context;
    void* function;
    uint32 grid;
    size_t capacity;
  };

  bool is_plain(PyObject* optimizer) const;

  Watch& watch_;
  Hypers& hypers_;
  Conditions conditions_;
  std::vector<Launch> launches_;
};

}  // namespace fusedopt
