// A scalar that somebody hands to one step as a tensor, such as a scaler's grad_scale and found_inf.
#pragma once

#include <pybind11/pybind11.h>

#include "tensor_ref.h"

namespace fusedopt {

class GivenScalar {
 public:
  // like: a float32 tensor on the device where kernels will read the scalar.
  explicit GivenScalar(pybind11::handle like);

  // value: None or null for "not given". False, with nothing changed, where kernels cannot read it where it is:
  // anything but a torch.Tensor with one float32 on that device.
  bool take(PyObject* value);

  // Null where it was not given. What was last taken is kept until the next one is: kernels may not have read it yet.
  const float* address() const { return address_; }

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  PyTypeObject* type_;
  GradLook look_ = {};  // of tensors without dimensions that were found good
  int32 dtype_, device_type_, device_index_;
  pybind11::object kept_;
  const float* address_ = nullptr;
};

}  // namespace fusedopt
