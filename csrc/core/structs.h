// The plain structs that the host and both engines exchange. No functions, no pointers to host objects.
#pragma once

#include "platform.h"

namespace fusedopt {

// Codes shared with fusedopt/specs.py (DTYPES, in this order).
enum class DType : int32 { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int32 kNumDTypes = 4;

// Codes shared with fusedopt/specs.py (PARAM_FORMATS and STATE_FORMATS, in this order); formats/{param,state}.h define
// them.
enum class ParamFormat : int32 {
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat64,
  kMasterBFloat16,
  kMasterFloat16,
  kSplit16,
  kSplit8,
  kStochastic,
};
constexpr int32 kNumParamFormats = 9;
enum class StateFormat : int32 { kFloat32, kBFloat16, kFloat16, kFloat64, kInt8, kStochastic };
constexpr int32 kNumStateFormats = 6;

constexpr int32 kMaxStates = 4;
constexpr int32 kMaxHyper = 10;
constexpr int32 kMaxNorms = 2;  // of rules of two phases

// One row per parameter: everything that stays the same from step to step.
struct TensorEntry {
  void* param;
  void* extra;  // what the parameter's format keeps beside it, or null
  void* states[kMaxStates];
  float* scales[kMaxStates];  // of blocked state formats
  float* step;                // number of steps taken so far, incremented by the update pass
  int64 numel;
  int32 group;      // index into the Hyper rows
  uint32 id;        // of the tensor in its optimizer, for random numbers
  int32 chunks;     // how many of the table's chunks are this tensor's; at least 1
  uint32 ticket;    // on the device: how many blocks have read `step`; 0 between launches
  void* main_grad;  // the sum of earlier micro-batches' gradients, or null where nobody accumulates
  // Of rules of two phases: Σ x² of the terms, kNorms numbers. The first phase leaves those of the elements that are
  // here, the second takes the roots of what it finds: by then other processes may have added theirs. Else null.
  double* norms;
};
static_assert(sizeof(TensorEntry) == 128, "read by the device as rows of whole cache lines");

// A run of consecutive elements of one tensor: the unit of work of a thread block or a CPU thread.
struct Chunk {
  int32 tensor;
  uint32 index;  // elements [index * chunk_size, (index + 1) * chunk_size)
  int64 numel;   // of the tensor: one row less to wait for
};
static_assert(sizeof(Chunk) == 16, "read by the device in one access");

// The hyper-parameters of one param group, in the order of the rule's kHyper.
struct Hyper {
  double value[kMaxHyper];
  const void* lr;       // if set, value[0] is read from here when the kernel runs (lr as a device tensor)
  uint32 lr_is_double;  // what `lr` points to: a double, else a float
  uint32 maximize;
};
static_assert(sizeof(Hyper) == 96, "travels in kernel parameters");

// Results of a step on one device. Its fields are what opt.grad_norm and friends are views of.
struct Control {
  double sum;        // of |g|^p, or max |g|, over the gradients of this device
  double nonfinite;  // > 0 if one of their elements is inf or NaN; beside `sum`, to be reduced together
  double total_norm;
  double clip_coef;
  float total_norm_f32;
  float clip_coef_f32;
  float found_inf;  // written by the norm pass: 1 if this step must be skipped
  float skipped;    // written by the update pass: 1 if this step was skipped, whoever asked for it
  int64 skipped_steps;
  uint32 ticket;  // of the norm pass: which block is last
  uint32 unused;
};
static_assert(sizeof(Control) == 64, "fusedopt/backends/control.py reads it at fixed offsets");

enum class NormType : int32 { kL2 = 0, kL1 = 1, kInf = 2 };

// How the norm pass ends.
struct NormOptions {
  double max_norm;  // inf: the coefficient is 1
  NormType type;
  int32 skip_nonfinite;  // nonfinite="skip"
};

// What every pass is told besides the tables. Null pointers mean "not given".
struct Scaling {
  const float* grad_scale;  // divides the gradients
  const float* found_inf;   // != 0: skip (a sum over devices, may be 2)
  const double* clip_coef;  // multiplies the gradients
  double max_grad_value;    // clamps the unscaled gradients; inf: no clamp
  // Of accumulation: the gradient is (main gradient + weight * this step's own) / divisor.
  double grad_weight;
  double grad_divisor;
  const float* grad_weight_at;  // read there instead, when the kernel runs
  const float* grad_divisor_at;
};

}  // namespace fusedopt
