#include "state_guard.h"

#include <algorithm>
#include <unordered_map>

namespace py = pybind11;

namespace fusedopt {

#if PY_VERSION_HEX >= 0x030C0000

namespace {

// Under the GIL. Never destroyed: dicts may die after static destructors have run.
std::unordered_multimap<PyObject*, StateGuard*>& guards() {
  static auto* const map = new std::unordered_multimap<PyObject*, StateGuard*>;
  return *map;
}

}  // namespace

void note_change(PyObject* dict) {
  const auto [first, last] = guards().equal_range(dict);
  for (auto found = first; found != last; ++found) found->second->changed_ = true;
}

namespace {

int on_event(PyDict_WatchEvent, PyObject* dict, PyObject*, PyObject*) {
  note_change(dict);
  return 0;
}

int watcher_id() {
  static const int id = [] {
    const int made = PyDict_AddWatcher(&on_event);
    if (made < 0) throw py::error_already_set();  // all eight watchers of this interpreter are in use
    return made;
  }();
  return id;
}

}  // namespace

void StateGuard::remember(py::dict state) {
  clear();
  dicts_.push_back(state);
  for (const auto& item : state)
    if (PyDict_Check(item.second.ptr())) dicts_.push_back(py::reinterpret_borrow<py::object>(item.second));
  for (const py::object& dict : dicts_) {
    if (PyDict_Watch(watcher_id(), dict.ptr()) != 0) throw py::error_already_set();
    guards().emplace(dict.ptr(), this);
  }
  changed_ = false;
}

bool StateGuard::unchanged(PyObject* state) const { return !changed_ && dicts_.front().ptr() == state; }

void StateGuard::clear() {
  changed_ = true;
  for (const py::object& dict : dicts_) {
    const auto [first, last] = guards().equal_range(dict.ptr());
    const auto found = std::find_if(first, last, [this](const auto& entry) { return entry.second == this; });
    if (found != last) guards().erase(found);
    if (guards().count(dict.ptr()) == 0 && PyDict_Unwatch(watcher_id(), dict.ptr()) != 0) PyErr_Clear();
  }
  const auto dicts = std::move(dicts_);  // freed last, because freeing may call back into Python
  dicts_.clear();
}

#else

namespace {

uint64 version_of(const py::object& dict) { return reinterpret_cast<PyDictObject*>(dict.ptr())->ma_version_tag; }

}  // namespace

void StateGuard::remember(py::dict state) {
  clear();
  dicts_.push_back(state);
  for (const auto& item : state)
    if (PyDict_Check(item.second.ptr())) dicts_.push_back(py::reinterpret_borrow<py::object>(item.second));
  for (const py::object& dict : dicts_) versions_.push_back(version_of(dict));
  changed_ = false;
}

bool StateGuard::unchanged(PyObject* state) const {
  if (changed_ || dicts_.front().ptr() != state) return false;
  for (size_t i = 0; i < dicts_.size(); ++i)
    if (version_of(dicts_[i]) != versions_[i]) return false;
  return true;
}

void StateGuard::clear() {
  changed_ = true;
  versions_.clear();
  const auto dicts = std::move(dicts_);
  dicts_.clear();
}

#endif

int StateGuard::traverse(visitproc visit, void* arg) const {
  for (const py::object& dict : dicts_) Py_VISIT(dict.ptr());
  return 0;
}

}  // namespace fusedopt
