// Notices any change to an optimizer's state dicts, at no cost per entry.
//
// Python >= 3.12 calls back when a watched dict changes; before that, dicts carry a version number that no other
// dict ever had. As long as nothing changed, the dicts keep their tensors alive, so their addresses may be kept
// without owning them: code that moves state away to free memory must not be thwarted by this library.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../core/structs.h"

namespace fusedopt {

class StateGuard {
 public:
  StateGuard() = default;
  StateGuard(const StateGuard&) = delete;
  StateGuard& operator=(const StateGuard&) = delete;
  ~StateGuard() { clear(); }

  // From now on `unchanged` speaks of this dict and of the dicts in it.
  void remember(pybind11::dict state);
  bool unchanged(PyObject* state) const;
  void clear();
  int traverse(visitproc visit, void* arg) const;

 private:
  friend void note_change(PyObject* dict);
  std::vector<pybind11::object> dicts_;  // the outer one first
  std::vector<uint64> versions_;         // before Python 3.12
  bool changed_ = true;
};

}  // namespace fusedopt
