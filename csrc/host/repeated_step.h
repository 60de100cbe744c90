// A step that differs from the one before it in gradients and hyper-parameters only: reads both and launches, in one
// call from Python. With caches that the backward pass has filled with other things, each Python function on the way
// costs microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "cuda_driver.h"
#include "hypers.h"
#include "watch.h"

namespace fusedopt {

class RepeatedStep {
 public:
  // The plan's own, as everything below; whoever holds this holds them.
  explicit RepeatedStep(Watch& watch) : watch_(watch) {}

  // In the order in which the kernels are launched. hypers: of the table's rule. args: PassArgs, as they were for the
  // last step. capacity: bytes of step table that the kernel takes as a parameter.
  void add(Table& table, Hypers& hypers, void* args, void* context, void* function, uint32 grid, size_t capacity) {
    if (std::find(hypers_.begin(), hypers_.end(), &hypers) == hypers_.end()) hypers_.push_back(&hypers);
    launches_.push_back({&table, &hypers, args, context, function, grid, capacity});
  }

  // False, with nothing launched, where this step is not like the last one.
  bool run(pybind11::list param_groups, pybind11::dict state, void* stream) {
    const pybind11::list relayout;
    if (!watch_.refresh(param_groups, state, relayout, true) || !relayout.empty()) return false;
    for (Hypers* hypers : hypers_)
      if (size_t(PyList_GET_SIZE(param_groups.ptr())) != hypers->rows().size() || !hypers->pack(param_groups).empty())
        return false;
    for (const Launch& launch : launches_) launch.table->pack(launch.hypers->rows(), launch.capacity);
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
    Hypers* hypers;
    void* args;
    void* context;
    void* function;
    uint32 grid;
    size_t capacity;
  };

  Watch& watch_;
  std::vector<Hypers*> hypers_;  // of the rules, each once
  std::vector<Launch> launches_;
};

}  // namespace fusedopt
