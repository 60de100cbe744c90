#include "tensor_ref.h"

#include <string>

#include "dynamic_library.h"
#include "tensor_layout.h"

namespace py = pybind11;

namespace fusedopt {
namespace {

using Tensor = const void*;  // at::Tensor: one pointer, to a c10::TensorImpl

// ---- torch's own functions --------------------------------------------------------------------------------

#if defined(__APPLE__)
constexpr const char* kTorchLibraries[] = {"@rpath/libtorch_cpu.dylib", "@rpath/libc10.dylib"};
#elif defined(_WIN32)
// Names of C++ functions are others there, so not all are found: tensors are read through Python.
constexpr const char* kTorchLibraries[] = {"torch_cpu.dll", "c10.dll"};
#else
constexpr const char* kTorchLibraries[] = {"libtorch_cpu.so", "libc10.so"};
#endif

struct TorchFunctions {
  int32 (*get_data_ptr)(Tensor*, void**);
  int32 (*get_dim)(Tensor*, int64*);
  int32 (*get_sizes)(Tensor*, int64**);
  int32 (*get_strides)(Tensor*, int64**);
  int32 (*get_dtype)(Tensor*, int32*);
  int32 (*get_device_type)(Tensor*, int32*);
  int32 (*get_device_index)(Tensor*, int32*);
  int32 (*get_layout)(Tensor*, int32*);
  int32 (*is_defined)(Tensor*, bool*);
  int32 (*delete_tensor)(Tensor*);
  const Tensor& (*grad)(const void* impl);  // c10::TensorImpl::grad() const
  void (*bump_version)(const Tensor&);      // torch::autograd::impl::bump_version(at::Tensor const&)
  bool (*profiler_enabled)();               // torch::profiler::impl::profilerEnabled()
  int32 dtypes[kNumTensorDTypes];
  int32 strided;
  PyObject* make_handle;  // torch._C._aoti.unsafe_alloc_void_ptr_from_tensor
  const void* undefined;  // the one c10::TensorImpl of all undefined tensors
};

template <class Function>
bool find(Function& function, const char* name) {
  for (const char* library : kTorchLibraries) {
    function = reinterpret_cast<Function>(find_loaded_symbol(library, name));
    if (function) return true;
  }
  return false;
}

bool find_code(int32& code, const char* name) {
  int32 (*function)() = nullptr;
  if (!find(function, name)) return false;
  code = function();
  return true;
}

bool find_all(TorchFunctions& f) {
  return find(f.get_data_ptr, "aoti_torch_get_data_ptr") && find(f.get_dim, "aoti_torch_get_dim") &&
         find(f.get_sizes, "aoti_torch_get_sizes") && find(f.get_strides, "aoti_torch_get_strides") &&
         find(f.get_dtype, "aoti_torch_get_dtype") && find(f.get_device_type, "aoti_torch_get_device_type") &&
         find(f.get_device_index, "aoti_torch_get_device_index") && find(f.get_layout, "aoti_torch_get_layout") &&
         find(f.is_defined, "aoti_torch_is_defined") && find(f.delete_tensor, "aoti_torch_delete_tensor_object") &&
         find(f.grad, "_ZNK3c1010TensorImpl4gradEv") &&
         find(f.bump_version, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE") &&
         find(f.profiler_enabled, "_ZN5torch8profiler4impl15profilerEnabledEv") &&
         find_code(f.dtypes[int32(DType::kFloat32)], "aoti_torch_dtype_float32") &&
         find_code(f.dtypes[int32(DType::kBFloat16)], "aoti_torch_dtype_bfloat16") &&
         find_code(f.dtypes[int32(DType::kFloat16)], "aoti_torch_dtype_float16") &&
         find_code(f.dtypes[int32(DType::kFloat64)], "aoti_torch_dtype_float64") &&
         find_code(f.dtypes[kComplex64], "aoti_torch_dtype_complex64") &&
         find_code(f.dtypes[kComplex128], "aoti_torch_dtype_complex128") &&
         find_code(f.strided, "aoti_torch_layout_strided");
}

// The c10::TensorImpl of a Python tensor; null if torch does not give it.
void* impl_of(const TorchFunctions& f, py::handle tensor) {
  try {
    const py::object capsule = py::handle(f.make_handle)(tensor);
    auto* handle = static_cast<Tensor*>(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
    if (!handle) throw py::error_already_set();
    void* impl = const_cast<void*>(*handle);
    f.delete_tensor(handle);
    return impl;
  } catch (py::error_already_set& error) {
    pass_interrupts(error);
    return nullptr;
  }
}

bool read_through(const TorchFunctions& f, Tensor* tensor, TensorInfo& info) {
  int32 layout, dtype;
  int64 ndim, *shape, *strides;
  if (f.get_layout(tensor, &layout) != 0 || layout != f.strided) return false;
  if (f.get_data_ptr(tensor, &info.data) != 0 || f.get_dtype(tensor, &dtype) != 0 || f.get_dim(tensor, &ndim) != 0 ||
      f.get_sizes(tensor, &shape) != 0 || f.get_strides(tensor, &strides) != 0 ||
      f.get_device_type(tensor, &info.device_type) != 0 || f.get_device_index(tensor, &info.device_index) != 0)
    return false;
  info.dtype = kUnsupportedDType;
  for (int32 i = 0; i < kNumTensorDTypes; ++i)
    if (dtype == f.dtypes[i]) info.dtype = i;
  info.ndim = int32(ndim);
  info.shape = shape;
  info.strides = strides;
  return true;
}

// A transposed bfloat16 parameter with a gradient: every function must say of it what Python says.
bool answers_rightly(TorchFunctions& f) {
  try {
    const py::module_ torch = py::module_::import("torch");
    py::object make_handle = torch.attr("_C").attr("_aoti").attr("unsafe_alloc_void_ptr_from_tensor");
    f.make_handle = make_handle.release().ptr();  // lives for ever, as `f` does
    if (f.profiler_enabled() != torch.attr("autograd").attr("_profiler_enabled")().cast<bool>()) return false;
    const py::object make = torch.attr("zeros");
    const py::object param = make(2, 3, py::arg("dtype") = torch.attr("bfloat16")).attr("t")().attr("requires_grad_")();
    Tensor impl = impl_of(f, param);
    bool defined = true;
    if (!impl || f.is_defined(const_cast<Tensor*>(&f.grad(impl)), &defined) != 0 || defined) return false;
    f.undefined = f.grad(impl);
    const py::object grad = make(2, 3, py::arg("dtype") = torch.attr("bfloat16")).attr("t")();
    param.attr("grad") = grad;
    TensorInfo info, grad_info;
    Tensor found = f.grad(impl);
    if (f.is_defined(&found, &defined) != 0 || !defined) return false;
    if (!read_through(f, &impl, info) || !read_through(f, &found, grad_info)) return false;
    const auto before = param.attr("_version").cast<int64>();
    f.bump_version(impl);
    return param.attr("_version").cast<int64>() == before + 1 && info.dtype == int32(DType::kBFloat16) &&
           reinterpret_cast<uint64>(info.data) == param.attr("data_ptr")().cast<uint64>() &&
           reinterpret_cast<uint64>(grad_info.data) == grad.attr("data_ptr")().cast<uint64>() && info.ndim == 2 &&
           info.shape[0] == 3 && info.shape[1] == 2 && info.strides[0] == 1 && info.strides[1] == 3 &&
           info.device_type == 0;
  } catch (py::error_already_set& error) {
    pass_interrupts(error);
    return false;
  }
}

const TorchFunctions* torch_functions() {
  static Once<TorchFunctions> functions;
  return functions.get([]() -> const TorchFunctions* {
    TorchFunctions found = {};
    const char* off = std::getenv("FUSEDOPT_NO_TORCH_FUNCTIONS");  // for tests of the other way
    if (off && *off) return nullptr;
    return find_all(found) && answers_rightly(found) ? new TorchFunctions(found) : nullptr;
  });
}

// ---- Python attributes --------------------------------------------------------------------------------------

struct TorchNames {
  py::object dtypes[kNumTensorDTypes];
  py::object strided;
};

const TorchNames& torch_names() {
  static Once<TorchNames> names;
  return *names.get([] {
    const py::module_ torch = py::module_::import("torch");
    auto* made = new TorchNames;
    const char* dtype_names[kNumTensorDTypes] = {"float32", "bfloat16",  "float16",
                                                 "float64", "complex64", "complex128"};
    for (int32 i = 0; i < kNumTensorDTypes; ++i) made->dtypes[i] = torch.attr(dtype_names[i]);
    made->strided = torch.attr("strided");
    return made;
  });
}

bool read_attributes(py::handle tensor, TensorInfo& info) {
  static thread_local std::vector<int64> extents;
  const TorchNames& names = torch_names();
  try {
    if (!names.strided.is(tensor.attr("layout"))) return false;
    info.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uint64>());
    info.dtype = kUnsupportedDType;
    const py::object dtype = tensor.attr("dtype");
    for (int32 i = 0; i < kNumTensorDTypes; ++i)
      if (dtype.is(names.dtypes[i])) info.dtype = i;
    const py::object device = tensor.attr("device");
    const bool cuda = tensor.attr("is_cuda").cast<bool>();
    info.device_type = cuda ? 1 : (device.attr("type").cast<std::string>() == "cpu" ? 0 : -1);
    info.device_index = cuda ? device.attr("index").cast<int32>() : -1;
    const auto shape = tensor.attr("shape").cast<py::tuple>();
    const auto strides = tensor.attr("stride")().cast<py::tuple>();
    extents.clear();
    for (const py::handle extent : shape) extents.push_back(extent.cast<int64>());
    for (const py::handle stride : strides) extents.push_back(stride.cast<int64>());
    info.ndim = int32(shape.size());
    info.shape = extents.data();
    info.strides = extents.data() + info.ndim;
    return true;
  } catch (py::error_already_set& error) {
    pass_interrupts(error);
    return false;
  }
}

}  // namespace

bool has_torch_functions() { return torch_functions() != nullptr; }

bool is_profiled() { return torch_functions()->profiler_enabled(); }

const void* TensorRef::impl_of_torch_tensor(const PyObject* tensor) {
  const TensorLayout* layout = tensor_layout();
  return layout && layout->impl ? reinterpret_cast<const void* const*>(tensor)[layout->impl] : nullptr;
}

TensorRef::TensorRef(py::handle tensor) : object_(tensor.ptr()), impl_(nullptr) {
  if (const TorchFunctions* f = torch_functions()) impl_ = impl_of(*f, object_);
}

bool TensorRef::read(TensorInfo& info) const {
  if (!impl_) return read_attributes(object_, info);
  Tensor tensor = impl_;
  return read_through(*torch_functions(), &tensor, info);
}

void* TensorRef::data() const {
  if (!impl_) {
    try {
      return reinterpret_cast<void*>(py::handle(object_).attr("data_ptr")().cast<uint64>());
    } catch (py::error_already_set& error) {  // not a tensor, or one without memory
      pass_interrupts(error);
      return nullptr;
    }
  }
  Tensor tensor = impl_;
  void* data = nullptr;
  return torch_functions()->get_data_ptr(&tensor, &data) == 0 ? data : nullptr;
}

namespace {

// What the storage of a tensor points to; null where that is not known.
const uint64* storage_memory(const TensorLayout* layout, const void* impl) {
  if (!layout || !impl) return nullptr;
  const auto* storage = reinterpret_cast<const uint64*>(static_cast<const uint64*>(impl)[layout->storage]);
  return storage ? storage + layout->data : nullptr;
}

}  // namespace

Memory TensorRef::memory() const {
  Memory memory = {data(), 0, 0, 0, 0};
  const TensorLayout* layout = tensor_layout();
  const auto* words = static_cast<const uint64*>(impl_);
  if (const uint64* storage = storage_memory(layout, impl_))
    memory = {memory.data, storage[0], storage[1], words[layout->storage_offset], words[layout->object]};
  return memory;
}

bool TensorRef::is_at(const Memory& memory) const {
  const TensorLayout* layout = tensor_layout();
  const uint64* storage = storage_memory(layout, impl_);
  const auto* words = static_cast<const uint64*>(impl_);
  // torch.utils.swap_tensors gives a Python object another tensor's memory, and this memory to the other object.
  if (memory.object != 0 && words[layout->object] != memory.object) return false;
  // The owner too: memory that tensors share until one of them is written keeps its address.
  if (storage && storage[0] != 0 && storage[0] == memory.storage_data && storage[1] == memory.owner &&
      words[layout->storage_offset] == memory.offset)
    return true;
  return data() == memory.data;
}

GradLook TensorRef::look_of(const void* found) {
  const TensorLayout* layout = tensor_layout();
  if (!layout) return {};
  return {{type_word(*layout, found, 0), type_word(*layout, found, 1)}};
}

bool TensorRef::may_be_lazy(const void* found, int32 dtype) {
  const TensorLayout* layout = tensor_layout();
  if (!layout || !found) return dtype == kComplex64 || dtype == kComplex128;
  return type_word(*layout, found, 1) & layout->lazy;
}

const void* TensorRef::address_of_like(const void* found, const GradLook& look, int32 dtype, int32 ndim,
                                       const int64* shape, const int64* strides) {
  constexpr uint64 kSizes[kNumTensorDTypes] = {4, 2, 2, 8, 8, 16};
  const TensorLayout* layout = tensor_layout();
  const uint64* storage = storage_memory(layout, found);
  if (!storage || storage[0] == 0 || look.type[1] == 0 || ndim > kInlineDims) return nullptr;
  const auto* words = static_cast<const uint64*>(found);
  if (type_word(*layout, found, 0) != look.type[0] || type_word(*layout, found, 1) != look.type[1] ||
      words[layout->sizes - 1] != uint64(ndim))
    return nullptr;
  for (int32 d = 0; d < ndim; ++d)
    if (words[layout->sizes + d] != uint64(shape[d]) || words[layout->sizes + kInlineDims + d] != uint64(strides[d]))
      return nullptr;
  return reinterpret_cast<const void*>(storage[0] + words[layout->storage_offset] * kSizes[dtype]);
}

const void* TensorRef::find_grad() const {
  if (!impl_) return nullptr;
  const void* grad = torch_functions()->grad(impl_);
  prefetch_tensor(grad);
  return grad;
}

TensorRef::Grad TensorRef::read_grad(const void* found, TensorInfo& info) const {
  if (!impl_) {
    const py::object grad = py::handle(object_).attr("grad");
    if (grad.is_none()) return Grad::kNone;
    return read_attributes(grad, info) ? Grad::kDense : Grad::kOther;
  }
  const TorchFunctions& f = *torch_functions();
  if (found == f.undefined) return Grad::kNone;
  return read_through(f, &found, info) ? Grad::kDense : Grad::kOther;
}

bool TensorRef::has_grad(const void* found) const {
  if (!impl_) return !py::handle(object_).attr("grad").is_none();
  return found != torch_functions()->undefined;
}

bool TensorRef::read_impl(const void* impl, TensorInfo& info) {
  Tensor tensor = const_cast<void*>(impl);
  return read_through(*torch_functions(), &tensor, info);
}

bool TensorRef::bump_version() const {
  if (!impl_) return false;
  torch_functions()->bump_version(impl_);
  return true;
}

}  // namespace fusedopt
