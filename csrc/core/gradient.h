// Where a gradient comes from, what happens to it before a rule sees it, and how the norm becomes a clip coefficient.
#pragma once

#include "structs.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// One tensor's gradient in one step: what the last backward pass left (null: nothing) and, added to it, what the
// tensor's main gradient holds of earlier micro-batches.
//
// It travels as one word, an address whose lowest bit stands for the main gradient: elements have at least two bytes.
struct GradSource {
  const void* grad;
  bool has_main;

  FUSEDOPT_HD bool any() const { return grad || has_main; }

  template <class T>
  FUSEDOPT_HD T sum(T own, T main, T weight) const {
    const T weighted = weight * own;
    return has_main ? (grad ? main + weighted : main) : weighted;
  }
};

FUSEDOPT_HD GradSource grad_source(const void* word) {
  const uint64 bits = reinterpret_cast<uint64>(word);
  return {reinterpret_cast<const void*>(bits & ~uint64(1)), (bits & 1) != 0};
}

// unscale -> clamp -> clip: the order of GradScaler.unscale_, clip_grad_value_, clip_grad_norm_.
// With nothing to do it multiplies by 1 and clamps at infinity, which changes no bit.
template <class T>
struct GradientTransform {
  T weight;     // of this step's own gradient beside the main gradient
  T inv_scale;  // of their sum
  T max_value;
  T clip_coef;  // negative where the rule maximises

  FUSEDOPT_HD bool clamps() const { return max_value - max_value == T(0); }  // it is finite

  FUSEDOPT_HD bool is_identity() const { return !clamps() && inv_scale == T(1) && clip_coef == T(1); }

  FUSEDOPT_HD T clamp(T grad) const {
    grad = grad * inv_scale;
    // Comparisons, not fmin: NaN must stay NaN.
    return grad > max_value ? max_value : (grad < -max_value ? -max_value : grad);
  }

  FUSEDOPT_HD T operator()(T grad) const { return clamp(grad) * clip_coef; }

  // The same where `clamps()` is false, for engines that choose once for many elements.
  FUSEDOPT_HD T without_clamp(T grad) const { return grad * inv_scale * clip_coef; }
};

template <class T>
FUSEDOPT_HD GradientTransform<T> gradient_transform(const Scaling& scaling) {
  GradientTransform<T> transform;
  const double divisor = scaling.grad_divisor_at ? double(*scaling.grad_divisor_at) : scaling.grad_divisor;
  const double scale = scaling.grad_scale ? double(*scaling.grad_scale) : 1.0;
  transform.weight = T(scaling.grad_weight_at ? double(*scaling.grad_weight_at) : scaling.grad_weight);
  transform.inv_scale = T(1.0 / (scale * divisor));
  transform.max_value = T(scaling.max_grad_value);
  transform.clip_coef = scaling.clip_coef ? T(*scaling.clip_coef) : T(1);
  return transform;
}

// One element's contribution to Σ|g|^p (kL2, kL1) or max |g| (kInf).
template <class A>
FUSEDOPT_HD A accumulate(A total, A magnitude, NormType type) {
  if (type == NormType::kInf) return magnitude > total || magnitude != magnitude ? magnitude : total;  // keeps NaN
  return total + (type == NormType::kL2 ? magnitude * magnitude : magnitude);
}

// Two partial results into one.
FUSEDOPT_HD double combine(double a, double b, NormType type) {
  if (type == NormType::kInf) return b > a || b != b ? b : a;
  return a + b;
}

FUSEDOPT_HD bool is_finite(double x) { return x - x == 0.0; }

// coefficient = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_.
// Leaves control.sum and control.nonfinite alone: other devices may still have to read this device's share.
FUSEDOPT_HD void finalize_norm(Control& control, double sum, double nonfinite, const NormOptions& options) {
  const double norm = options.type == NormType::kL2 ? square_root(sum) : sum;
  double coef = 1.0;
  if (options.max_norm <= 1.7976931348623157e308) {  // finite
    coef = options.max_norm / (norm + 1e-6);
    coef = coef > 1.0 ? 1.0 : coef;  // NaN stays NaN
  }
  control.total_norm = norm;
  control.clip_coef = coef;
  control.total_norm_f32 = float(norm);
  control.clip_coef_f32 = float(coef);
  control.found_inf = options.skip_nonfinite && nonfinite > 0.0 ? 1.0f : 0.0f;
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
