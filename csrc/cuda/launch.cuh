// What a launch brings with it besides the tables in device memory, how its blocks find out which one is last, and how
// a pass begins while the norm pass before it runs.
#pragma once

#include "../core/gradient.h"
#include "args.h"
#include "tuning.cuh"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// The step table as a kernel parameter: no copy to the device, and a captured graph keeps it.
template <int kBytes>
struct StepTable {
  alignas(16) char bytes[kBytes];
};

template <int kBytes>
__device__ __forceinline__ GradSource grad_of(const PassArgs& args, const StepTable<kBytes>& table, int tensor) {
  const char* grads = table.bytes + args.num_groups * sizeof(Hyper);
  return grad_source(reinterpret_cast<const void* const*>(grads)[tensor]);
}

template <int kBytes>
__device__ __forceinline__ Hyper hyper_of(const PassArgs& args, const StepTable<kBytes>& table, int group) {
  Hyper hyper = reinterpret_cast<const Hyper*>(table.bytes)[group];
  if (hyper.lr)
    hyper.value[0] = hyper.lr_is_double ? *static_cast<const double*>(hyper.lr) : *static_cast<const float*>(hyper.lr);
  return hyper;
}

// Copies part of a step table that does not fit a kernel parameter to the device.
template <int kBytes>
__device__ __forceinline__ void upload(char* to, int bytes, const StepTable<kBytes>& table) {
  for (int i = threadIdx.x * 8; i < bytes; i += kThreads * 8)
    *reinterpret_cast<uint64*>(to + i) = *reinterpret_cast<const uint64*>(table.bytes + i);
}

// Whether this is the last of `parties` to come here; the counter is then 0 again.
__device__ __forceinline__ bool take_ticket(uint32* ticket, uint32 parties) {
  __threadfence();
  return atomicInc(ticket, parties - 1) == parties - 1;
}

// Programmatic dependent launch: the host may let the update, or measure, pass behind a norm pass begin as soon as all
// of that pass's blocks run (fusedopt/backends/cuda.py: _overlaps). Until `wait_for_norm` it may read what was final
// when the norm pass began (tables, gradients, parameters, states, counters, tensors that users gave), and write
// nothing at all. Every block must wait, also one that has nothing to do: a pass that has ended, and hence whatever is
// launched behind it, is ordered after the norm pass only by its wait. In other launches both do nothing.
#if __CUDA_ARCH__ >= 900
constexpr bool kOverlaps = true;
#else
constexpr bool kOverlaps = false;
#endif

__device__ __forceinline__ void let_next_pass_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Behind it the norm pass has ended, and what it wrote is visible to the calling thread, and to those that
// `__syncthreads` orders after it.
__device__ __forceinline__ void wait_for_norm() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
