// The hyper-parameters of all param groups, read from the groups each step.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "../core/structs.h"

namespace fusedopt {

class Hypers {
 public:
  // keys: where each hyper-parameter of the rule stands in a group: (name, -1) or (name, index into a tuple).
  explicit Hypers(const std::vector<std::pair<std::string, int>>& keys) {
    if (keys.size() > size_t(kMaxHyper)) throw std::invalid_argument("Hypers: more hyper-parameters than kMaxHyper");
    for (const auto& [name, index] : keys)
      keys_.push_back({pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString(name.c_str())), index});
    maximize_ = pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString("maximize"));
  }

  // Returns (group, hyper-parameter) of every value that is not a plain number, for the caller to fill in.
  std::vector<std::pair<int, int>> pack(const pybind11::list& groups) {
    std::vector<std::pair<int, int>> others;
    rows_.resize(groups.size());
    for (size_t g = 0; g < rows_.size(); ++g) {
      PyObject* group = PyList_GET_ITEM(groups.ptr(), Py_ssize_t(g));
      rows_[g].lr = nullptr;
      for (size_t k = 0; k < keys_.size(); ++k)
        if (!number(find(group, keys_[k]), rows_[g].value[k])) others.emplace_back(int(g), int(k));
      PyObject* maximize = PyDict_GetItem(group, maximize_.ptr());
      const int is_true = maximize ? PyObject_IsTrue(maximize) : 0;
      if (is_true < 0) throw pybind11::error_already_set();
      rows_[g].maximize = uint32(is_true);
    }
    return others;
  }

  void set_value(int group, int k, double value) {
    if (k < 0 || k >= kMaxHyper) throw std::out_of_range("Hypers.set_value: got no hyper-parameter's index");
    rows_.at(size_t(group)).value[k] = value;
  }
  void set_lr_address(int group, uint64 address, bool is_double) {
    Hyper& row = rows_.at(size_t(group));
    row.lr = reinterpret_cast<const void*>(address);
    row.lr_is_double = is_double;
  }
  const std::vector<Hyper>& rows() const { return rows_; }

  // As last packed, one for each group; meaningless where the lr is read on the device.
  std::vector<double> learning_rates() const {
    std::vector<double> rates;
    for (const Hyper& row : rows_) rates.push_back(row.value[0]);
    return rates;
  }

 private:
  struct Key {
    pybind11::object name;
    int index;
  };

  static PyObject* find(PyObject* group, const Key& key) {
    PyObject* value = PyDict_GetItem(group, key.name.ptr());
    if (!value || key.index < 0) return value;
    if (PyTuple_Check(value) && key.index < PyTuple_GET_SIZE(value)) return PyTuple_GET_ITEM(value, key.index);
    if (PyList_Check(value) && key.index < PyList_GET_SIZE(value)) return PyList_GET_ITEM(value, key.index);
    return nullptr;
  }

  static bool number(PyObject* value, double& result) {
    if (!value || !(PyFloat_Check(value) || PyLong_Check(value))) return false;
    result = PyFloat_Check(value) ? PyFloat_AS_DOUBLE(value) : PyLong_AsDouble(value);
    if (result == -1.0 && PyErr_Occurred()) throw pybind11::error_already_set();  // an int beyond all doubles
    return true;
  }

  std::vector<Key> keys_;
  pybind11::object maximize_;
  std::vector<Hyper> rows_;
};

}  // namespace fusedopt
