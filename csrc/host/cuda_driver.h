// The few functions of the CUDA driver that a step needs, found at run time: no toolkit to build, and no driver to
// import on a machine without a GPU.
#pragma once

#include <string>
#include <vector>

#include "../core/structs.h"

namespace fusedopt {

constexpr uint32 kCudaThreads = 256;  // kThreads of cuda/tuning.cuh

class CudaDriver {
 public:
  // Throws std::runtime_error if there is no driver.
  static const CudaDriver& instance();

  int version() const;  // 12040 for CUDA 12.4
  // The primary context of a device, which is the one that torch uses.
  void* primary_context(int device) const;
  // The kernel `name` of a cubin. Never unloaded: captured graphs may hold it.
  void* load(void* context, const std::string& cubin, const std::string& name) const;
  // shared_bytes: of shared memory, beside what the kernel declares. overlaps: the kernel may begin while the one
  // before it in the stream runs, if that allows it (programmatic dependent launch: cuda/launch.cuh). No effect with
  // drivers before CUDA 11.8; captured into a graph it needs CUDA 12.3.
  void launch(void* context, void* function, uint32 grid, uint32 block, void* stream, void** params,
              uint32 shared_bytes = 0, bool overlaps = false) const;

 private:
  struct LaunchConfig;

  CudaDriver();
  void check(int status, const char* what) const;

  int (*cuInit_)(unsigned);
  int (*cuDriverGetVersion_)(int*);
  int (*cuDeviceGet_)(int*, int);
  int (*cuDevicePrimaryCtxRetain_)(void**, int);
  int (*cuCtxGetCurrent_)(void**);
  int (*cuCtxPushCurrent_)(void*);
  int (*cuCtxPopCurrent_)(void**);
  int (*cuModuleLoadData_)(void**, const void*);
  int (*cuModuleGetFunction_)(void**, void*, const char*);
  int (*cuLaunchKernel_)(void*, uint32, uint32, uint32, uint32, uint32, uint32, uint32, void*, void**, void**);
  int (*cuLaunchKernelEx_)(const LaunchConfig*, void*, void**, void**);  // null where the driver has none
  int (*cuGetErrorString_)(int, const char**);
};

}  // namespace fusedopt
