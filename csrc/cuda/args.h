// What the host passes to the CUDA kernels.
#pragma once

#include "../core/structs.h"

namespace fusedopt {

// A block's part of the norm; the last block adds them up in order.
struct CudaPartial {
  double sum;
  double nonfinite;
};

struct PassArgs {
  TensorEntry* tensors;
  const Chunk* chunks;
  const char* step_table;  // Hyper rows, then gradient pointers; null where they are a kernel parameter
  Control* control;        // may be null in the update pass
  CudaPartial* partials;
  double* norms;  // of rules of two phases: a row of kNorms for each chunk, its part of the tensor's sums
  Scaling scaling;
  const float* norm_found_inf;  // the norm pass's own verdict, where it ran
  float* nonfinite_out;         // scale: set to 1 if an element is inf or NaN
  NormOptions norm;
  uint64 seed;  // of random numbers
  int32 num_groups;
  int32 num_chunks;
  int32 lead;           // update: this launch records in `control` whether the step was skipped
  int32 first_partial;  // norm: where this launch's blocks write
  int32 num_partials;   // norm: > 0 in the last launch of a device: how many to add up
  int32 finalize;       // norm: this device's gradients are all there are, so finish here
};

}  // namespace fusedopt
