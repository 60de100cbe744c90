// The passes as the CPU sees them: a job describes a pass over one table, an engine works on one chunk of
// it. One engine exists per instruction set; all give the same bits.
#pragma once

#include "../core/structs.h"

namespace fusedopt {

struct GradTable {
  const TensorEntry* tensors;
  const void* const* grads;  // by tensor: words, as GradSource; null where a parameter has no gradient in this step
  DType grad_dtype;
  DType main_dtype;  // of main gradients, where there are any
  int64 chunk_size;
};

// Σ x² of a part of one tensor, for a rule of two phases.
struct TensorNorms {
  double value[kMaxNorms];
};

struct UpdateJob {
  GradTable table;
  ParamFormat param_format;
  StateFormat state_format;
  int32 rule;   // index into FUSEDOPT_FOR_EACH_RULE
  uint64 seed;  // of random numbers
  const Hyper* hypers;
  Scaling scaling;
};

struct NormJob {
  GradTable table;
  Scaling scaling;  // clip_coef is not used
  NormType type;
};

// Adds the gradients to the main gradients.
struct AccumulateJob {
  GradTable table;
  Scaling scaling;
};

// Multiplies and clamps the gradients where they are.
struct ScaleJob {
  GradTable table;
  Scaling scaling;
  float* nonfinite_out;  // set to 1 if an element is inf or NaN; may be null
};

struct NormPartial {
  double sum;
  double nonfinite;
};

struct CpuEngine {
  const char* isa;
  void (*update)(const UpdateJob&, const Chunk&);
  TensorNorms (*measure)(const UpdateJob&, const Chunk&);
  NormPartial (*norm)(const NormJob&, const Chunk&);
  void (*accumulate)(const AccumulateJob&, const Chunk&);
  void (*scale)(const ScaleJob&, const Chunk&);
};

const CpuEngine& engine_baseline();
const CpuEngine& engine_avx2();
const CpuEngine& engine_avx512();

}  // namespace fusedopt
