// A step that differs from the one before it in gradients, hyper-parameters and what a scaler hands over only: reads
// them and launches, in one call from Python. With caches that the backward pass has filled with other things, each
// line of Python on the way costs microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "cuda_driver.h"
#include "given_scalar.h"
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
    pybind11::object context_backend;  // () -> str or None, what `use_backend` asks for
    // Whether our own scaler asked to be told what the norm pass found, by the dict `_nonfinite_found`.
    bool reports;
    pybind11::object accumulator;  // the optimizer's `_accumulator`
    // () -> what divides the gradients of this step as a float; None where the accumulator tells it anything else that
    // is new. Empty without an accumulator.
    pybind11::object divisor;
    bool has_own_grads;  // beside what is accumulated
  };

  // What scalers exchange with a step by attributes of the optimizer.
  struct Scalers {
    std::vector<Scaling*> scalings;  // where the passes look for grad_scale and found_inf; none are given between steps
    pybind11::tuple finding;         // (device, tensor): where the norm pass leaves whether it met inf or NaN
  };

  // watch, hypers, scalings: the plan's own. hypers: of every rule. run_passes: () -> None, the passes, when gradients
  // and hyper-parameters have been read; None where there are launches instead.
  RepeatedStep(Watch& watch, std::vector<Hypers*> hypers, Scalers scalers, Conditions conditions,
               pybind11::object run_passes);

  // stream_of: builtin function, (device index) -> int, the current stream.
  void launch_on(pybind11::object stream_of, pybind11::object device);
  // In the order in which the kernels are launched. table, hypers: null for a kernel that takes no step table; else
  // hypers are of the table's rule. args: PassArgs, as they were for the last step. capacity: bytes of step table that
  // the kernel takes as a parameter. overlaps: as CudaDriver::launch.
  void add(Table* table, Hypers* hypers, void* args, void* context, void* function, uint32 grid, size_t capacity,
           bool overlaps);
  // exchange: () -> None, what this process does with others on the current stream when all kernels added so far have
  // been launched, and before any added later is.
  void exchange(pybind11::object exchange);

  // Keeps what the others are given by reference or by pointer.
  void own(pybind11::object object) { owned_.push_back(std::move(object)); }

  // Whether it may repeat a step that is told these scalars, and to report or not.
  bool serves(pybind11::handle scalars, bool reports) const {
    return conditions_.scalars.is(scalars) && conditions_.reports == reports && asks_as_before();
  }

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
    bool overlaps;
  };

  bool asks_as_before() const;  // for the same backend
  bool is_like_the_last(PyObject* optimizer) const;
  bool take_what_scalers_give(PyObject* optimizer);
  bool take_divisor();
  void report(PyObject* optimizer) const;
  void run_passes() const;
  void launch() const;
  void launch_range(size_t begin, size_t end, void* stream) const;

  Watch& watch_;
  std::vector<Hypers*> hypers_;
  Scalers scalers_;
  GivenScalar grad_scale_, found_inf_;
  double divisor_ = 1.0;
  Conditions conditions_;
  pybind11::object asked_;  // what `context_backend` said of the last step
  pybind11::object run_passes_;
  pybind11::object stream_of_, device_;
  std::vector<Launch> launches_;
  struct Exchange {
    size_t launches;  // before it
    pybind11::object run;
  };
  std::vector<Exchange> exchanges_;
  std::vector<pybind11::object> owned_;
  bool cleared_ = false;  // by Python's collector
};

}  // namespace fusedopt
