#include "cuda_driver.h"

#include <stdexcept>

#include "dynamic_library.h"

namespace fusedopt {
namespace {

#if defined(_WIN32)
constexpr const char* kCudaLibrary = "nvcuda.dll";
#else
constexpr const char* kCudaLibrary = "libcuda.so.1";
#endif

// Makes a context current for a scope: a step may run in a thread (backward hooks) where none is yet.
class CurrentContext {
 public:
  CurrentContext(int (*get)(void**), int (*push)(void*), int (*pop)(void**), void* context) : pop_(pop) {
    void* current = nullptr;
    if (get(&current) == 0 && current == context) return;
    status_ = push(context);
    pushed_ = status_ == 0;
  }
  ~CurrentContext() {
    void* ignored;
    if (pushed_) pop_(&ignored);
  }
  int status() const { return status_; }

 private:
  int (*pop_)(void**);
  int status_ = 0;
  bool pushed_ = false;
};

// CUlaunchAttribute of cuda.h, of an attribute that is an int.
struct LaunchAttribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};
static_assert(sizeof(LaunchAttribute) == 72, "as in cuda.h");
constexpr int kProgrammaticStreamSerialization = 6;

}  // namespace

// CUlaunchConfig.
struct CudaDriver::LaunchConfig {
  uint32 grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  uint32 num_attributes;
};

const CudaDriver& CudaDriver::instance() {
  static const CudaDriver driver;
  return driver;
}

CudaDriver::CudaDriver() {
  std::string problem;
  void* library = load_library(kCudaLibrary, problem);
  if (!library) throw std::runtime_error("fusedopt: the CUDA driver could not be loaded: " + problem);
  const auto find = [&](auto& pointer, const char* name) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(find_symbol(library, name));
    if (!pointer) throw std::runtime_error(std::string("fusedopt: the CUDA driver has no ") + name + "; update it");
  };
  find(cuInit_, "cuInit");
  find(cuDriverGetVersion_, "cuDriverGetVersion");
  find(cuDeviceGet_, "cuDeviceGet");
  find(cuDevicePrimaryCtxRetain_, "cuDevicePrimaryCtxRetain");
  find(cuCtxGetCurrent_, "cuCtxGetCurrent");
  find(cuCtxPushCurrent_, "cuCtxPushCurrent_v2");
  find(cuCtxPopCurrent_, "cuCtxPopCurrent_v2");
  find(cuModuleLoadData_, "cuModuleLoadData");
  find(cuModuleGetFunction_, "cuModuleGetFunction");
  find(cuLaunchKernel_, "cuLaunchKernel");
  find(cuGetErrorString_, "cuGetErrorString");
  cuLaunchKernelEx_ = reinterpret_cast<decltype(cuLaunchKernelEx_)>(find_symbol(library, "cuLaunchKernelEx"));
  check(cuInit_(0), "cuInit");
}

void CudaDriver::check(int status, const char* what) const {
  if (status == 0) return;
  const char* message = nullptr;
  cuGetErrorString_(status, &message);
  // 3: CUDA_ERROR_NOT_INITIALIZED, which is what a process sees that was forked from one that uses CUDA.
  const char* remedy =
      status == 3 ? "; a process that was forked from one that uses CUDA cannot use it: start it with 'spawn'" : "";
  throw std::runtime_error(std::string("fusedopt: ") + what + " failed: " + (message ? message : "unknown error") +
                           " (CUDA error " + std::to_string(status) + ")" + remedy);
}

int CudaDriver::version() const {
  int version = 0;
  check(cuDriverGetVersion_(&version), "cuDriverGetVersion");
  return version;
}

void* CudaDriver::primary_context(int device) const {
  int handle = 0;
  void* context = nullptr;
  check(cuDeviceGet_(&handle, device), "cuDeviceGet");
  check(cuDevicePrimaryCtxRetain_(&context, handle), "cuDevicePrimaryCtxRetain");
  return context;
}

void* CudaDriver::load(void* context, const std::string& cubin, const std::string& name) const {
  const CurrentContext current(cuCtxGetCurrent_, cuCtxPushCurrent_, cuCtxPopCurrent_, context);
  check(current.status(), "cuCtxPushCurrent");
  void *module = nullptr, *function = nullptr;
  check(cuModuleLoadData_(&module, cubin.data()), "cuModuleLoadData");
  check(cuModuleGetFunction_(&function, module, name.c_str()), "cuModuleGetFunction");
  return function;
}

void CudaDriver::launch(void* context, void* function, uint32 grid, uint32 block, void* stream, void** params,
                        uint32 shared_bytes, bool overlaps) const {
  const CurrentContext current(cuCtxGetCurrent_, cuCtxPushCurrent_, cuCtxPopCurrent_, context);
  check(current.status(), "cuCtxPushCurrent");
  if (overlaps && cuLaunchKernelEx_) {
    static_assert(sizeof(LaunchConfig) == 56, "as in cuda.h");
    LaunchAttribute attribute = {kProgrammaticStreamSerialization, {}, 1, {}};
    const LaunchConfig config = {{grid, 1, 1}, {block, 1, 1}, shared_bytes, stream, &attribute, 1};
    check(cuLaunchKernelEx_(&config, function, params, nullptr), "cuLaunchKernelEx");
    return;
  }
  check(cuLaunchKernel_(function, grid, 1, 1, block, 1, 1, shared_bytes, stream, params, nullptr), "cuLaunchKernel");
}

}  // namespace fusedopt
