// What a launch brings with it besides the tables in device memory, and how its blocks find out which one is last.
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

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
