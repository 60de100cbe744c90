#include "given_scalar.h"

#include <utility>

namespace py = pybind11;

namespace fusedopt {
namespace {

bool has_one_element(const TensorInfo& info) {
  for (int32 d = 0; d < info.ndim; ++d)
    if (info.shape[d] != 1) return false;
  return true;
}

}  // namespace

GivenScalar::GivenScalar(py::handle like) : type_(Py_TYPE(like.ptr())) {
  TensorInfo info;
  if (!TensorRef(like).read(info)) throw py::type_error("GivenScalar: like is not a dense tensor");
  dtype_ = info.dtype;
  device_type_ = info.device_type;
  device_index_ = info.device_index;
}

bool GivenScalar::take(PyObject* value) {
  if (!value || value == Py_None) {
    address_ = nullptr;
    return true;
  }
  if (Py_TYPE(value) != type_) return false;
  const void* impl = TensorRef::impl_of_torch_tensor(value);
  if (const void* address = impl ? TensorRef::address_of_like(impl, look_, dtype_, 0, nullptr, nullptr) : nullptr) {
    kept_ = py::reinterpret_borrow<py::object>(value);
    address_ = static_cast<const float*>(address);
    return true;
  }
  const TensorRef tensor(value);
  TensorInfo info;
  if (!tensor.impl() || !tensor.read(info) || info.dtype != dtype_ || info.device_type != device_type_ ||
      info.device_index != device_index_ || !has_one_element(info))
    return false;
  kept_ = py::reinterpret_borrow<py::object>(value);
  address_ = static_cast<const float*>(info.data);
  if (info.ndim == 0) look_ = TensorRef::look_of(tensor.impl());
  return true;
}

int GivenScalar::traverse(visitproc visit, void* arg) const {
  Py_VISIT(kept_.ptr());
  return 0;
}

void GivenScalar::clear() {
  address_ = nullptr;
  const py::object kept = std::move(kept_);  // freed last, because freeing may call back into Python
}

}  // namespace fusedopt
