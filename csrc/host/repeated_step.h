// A step that differs from the one before it in gradients and hyper-parameters only: reads both and launches, in one
// call from Python. With caches that the backward pass has filled with other things, each Python function on the way
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
  // The plan's own; whoever holds this holds them.
  RepeatedStep(Watch& watch, Hypers& hypers) : watch_(watch), hypers_(hypers) {}

  // In the order in which the kernels are launched. args: PassArgs, as they were for the last step. capacity: bytes of
  // step table that the kernel takes as a parameter.
  void add(Table& table, void* args, void* context, void* function, uint32 grid, size_t capacity) {
    launches_.push_back({&table, args, context, function, grid, capacity});
  }

  // False, with nothing launched, where this step is not like the last one.
  bool run(pybind11::list param_groups, pybind11::dict state, void* stream) {
    const pybind11::list relayout;
    if (!watch_.refresh(param_groups, state, relayout, true) || !relayout.empty()) return false;
    if (size_t(PyList_GET_SIZE(param_groups.ptr())) != hypers_.rows().size() || !hypers_.pack(param_groups).empty())
      return false;
    for (const Launch& launch : launches_) launch.table->pack(hypers_.rows(), launch.capacity);
    for (const Launch& launch : launches_) {
      if (!launch.grid) continue;
      void* params[2] = {launch.args, launch.table->packed()};
      CudaDriver::instance().launch(launch.context, launch.function, launch.grid, kCudaThreads, stream, params);
    }
    return true;
  }

 private:
  struct Launch {
    Table* table;
    void* args;
    void* context;
    void* function;
    uint32 grid;
    size_t capacity;
  };

  Watch& watch_;
  Hypers& hypers_;
  std::vector<Launch> launches_;
};

}  // namespace fusedopt
