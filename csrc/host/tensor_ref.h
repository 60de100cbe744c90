// A torch tensor that is looked at in every step, without linking libtorch.
//
// Asking a thousand tensors for their address through Python takes longer than the whole step may. So the few C
// functions of torch that answer in nanoseconds are looked up by name in the running process: those of its
// stable C interface (aoti_torch_*), and two of its C++ library. They are tried on a tensor of known contents first;
// where one is missing or answers wrongly, tensors are asked through their Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <vector>

#include "../core/structs.h"

namespace fusedopt {

// What is worked out once, with Python's help, and lives for ever. Not an ordinary static: Python may let another
// thread go on meanwhile, which would wait for the static while it holds the lock that the first thread needs. Two
// threads may work it out; the first one's counts. Later calls need no lock.
template <class T>
class Once {
 public:
  // make: returns a new T, or null.
  template <class Make>
  const T* get(Make make) {
    if (done_.load(std::memory_order_acquire)) return value_;
    const T* made = make();
    if (!done_.load(std::memory_order_acquire)) {  // nobody else runs here: this thread has Python's lock
      value_ = made;
      done_.store(true, std::memory_order_release);
    }
    return value_;
  }

 private:
  const T* value_ = nullptr;
  std::atomic<bool> done_{false};
};

// Throws what is no answer to a question about torch: an interrupt, memory that ran out.
inline void pass_interrupts(pybind11::error_already_set& error) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError) ||
      error.matches(pybind11::module_::import("torch").attr("OutOfMemoryError")))
    throw error;
}

constexpr int32 kUnsupportedDType = -1;
// Of tensors that kernels see as twice as many real numbers. Codes shared with fusedopt/specs.py (COMPLEX_DTYPES).
constexpr int32 kComplex64 = kNumDTypes, kComplex128 = kNumDTypes + 1, kNumTensorDTypes = kNumDTypes + 2;

// What a tensor's memory looks like. shape and strides are borrowed: valid until the tensor or the reader changes.
struct TensorInfo {
  void* data;
  int32 dtype;        // a DType, a complex one, or kUnsupportedDType
  int32 device_type;  // torch's codes: 0 CPU, 1 CUDA
  int32 device_index;
  int32 ndim;
  const int64* shape;
  const int64* strides;
};

// Whether torch's own functions are used.
bool has_torch_functions();

// Whether torch's profiler records what this thread does. Only where torch's own functions are used.
bool is_profiled();

// Where a tensor's elements are: its address, and what that was made from.
struct Memory {
  void* data;
  uint64 storage_data, owner, offset;  // of its storage; 0 where they could not be read
  uint64 object;                       // Python's, as torch notes it; 0 where it could not be read
};

// What the gradients of one parameter looked like when torch was last asked.
struct GradLook {
  uint64 type[2];  // 0 where they could not be read
};

// Does not own the tensor: whoever holds a TensorRef sees to it that the Python object lives.
class TensorRef {
  // After one or two words of reference counts come the pointers to the storage, to autograd's data, among them the
  // gradient, to rarer things, and to the version counter. A wrong guess fetches something else.
  static void prefetch_words(const void* impl, int end) {
    if (!impl) return;
    for (int word = 2; word < end; ++word) __builtin_prefetch(static_cast<const void* const*>(impl)[word]);
  }
  static void prefetch_tensor(const void* impl) {
    for (int line = 0; line < 3; ++line) __builtin_prefetch(static_cast<const char*>(impl) + 64 * line);
  }

 public:
  explicit TensorRef(pybind11::handle tensor);

  PyObject* object() const { return object_; }
  const void* impl() const { return impl_; }
  // False, with no Python error set, where this is not an ordinary dense tensor.
  bool read(TensorInfo& info) const;
  void* data() const;  // null where `read` fails
  Memory memory() const;
  bool is_at(const Memory& memory) const;
  enum class Grad { kNone, kDense, kOther };
  // In two halves, so that many tensors' gradients can be on their way from memory at once.
  const void* find_grad() const;
  Grad read_grad(const void* found, TensorInfo& info) const;
  bool has_grad(const void* found) const;  // whether that is a gradient
  // As `read`, of the c10::TensorImpl of a tensor.
  static bool read_impl(const void* impl, TensorInfo& info);
  // The address of a gradient that looks as `look`, and has this shape and these strides; null where it does not, or
  // where that cannot be told without asking torch.
  static const void* address_of_like(const void* found, const GradLook& look, int32 dtype, int32 ndim,
                                     const int64* shape, const int64* strides);
  static GradLook look_of(const void* found);
  // Of a Python object whose type is torch.Tensor itself; null where that cannot be told without asking torch.
  static const void* impl_of_torch_tensor(const PyObject* tensor);
  // Whether memory holds the negatives or the conjugates of its elements. Where that cannot be told: complex ones may.
  static bool may_be_lazy(const void* found, int32 dtype);
  // Hints, in this order and some tensors ahead: fetch the tensor's memory, then what it points to.
  void prefetch() const { prefetch_tensor(impl_); }
  void prefetch_storage() const { prefetch_storage_of(impl_); }
  void prefetch_all() const { prefetch_words(impl_, 7); }
  static void prefetch_storage_of(const void* impl) { prefetch_words(impl, 4); }
  // Tells autograd that the memory was written, as an in-place operation would. False: ask torch in Python.
  bool bump_version() const;

 private:
  PyObject* object_;
  void* impl_;  // its c10::TensorImpl, so that &impl_ can serve as an `at::Tensor*`; null: use attributes
};

}  // namespace fusedopt
