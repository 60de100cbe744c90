// LAMB: Adam's update, with a learning rate for each tensor in proportion to the tensor's norm. You et al., "Large
// Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, https://arxiv.org/abs/1904.00962,
// algorithm 2, with phi(x) = x; the options are those of apex.optimizers.FusedLAMB.
#pragma once

#include "../core/moment.h"
#include "../core/norms.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Lamb {
  static constexpr const char* kName = "lamb";
  static constexpr const char* kStateNames = "exp_avg exp_avg_sq";
  static constexpr const char* kHyperNames =
      "lr beta1 beta2 eps weight_decay bias_correction adam_w_mode grad_averaging use_nvlamb";
  static constexpr int kStates = 2;
  static constexpr FUSEDOPT_HD Moment moment(int state) { return state == 0 ? Moment::kFirst : Moment::kSecond; }
  enum HyperIndex { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kBiasCorrection, kAdamWMode, kGradAveraging, kUseNvlamb };
  static constexpr int kNorms = 2;  // of the parameter, of its update

  template <class T>
  struct Coefficients {
    T beta1, beta3;  // beta3: 1 - beta1, 1 where gradients are not averaged
    T beta2, one_minus_beta2;
    T correction1;            // 1 / (1 - beta1^t), 1 without bias correction
    T bias_correction2_sqrt;  // sqrt(1 - beta2^t), likewise
    T reciprocal;             // 1 / bias_correction2_sqrt
    T eps;
    T coupled;    // lambda as an L2 term of the loss; 0 with adam_w_mode
    T decoupled;  // lambda as a term of the update; 0 without adam_w_mode
    T rate;       // eta * trust ratio
  };

  // step: t, counting from 1. `rate` comes from `scale`.
  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double step) {
    const bool corrects = hyper[kBiasCorrection] != 0.0, decouples = hyper[kAdamWMode] != 0.0;
    const TwoPowers beta_t = powers(hyper[kBeta1], hyper[kBeta2], uint64(step));  // beta1^t, beta2^t
    Coefficients<T> c;
    c.beta1 = T(hyper[kBeta1]);
    c.beta3 = T(hyper[kGradAveraging] != 0.0 ? 1.0 - hyper[kBeta1] : 1.0);
    c.beta2 = T(hyper[kBeta2]);
    c.one_minus_beta2 = T(1.0 - hyper[kBeta2]);
    c.correction1 = T(corrects ? 1.0 / (1.0 - beta_t.a) : 1.0);
    c.bias_correction2_sqrt = T(corrects ? square_root(1.0 - beta_t.b) : 1.0);
    c.reciprocal = T(1) / c.bias_correction2_sqrt;
    c.eps = T(hyper[kEps]);
    c.coupled = T(decouples ? 0.0 : hyper[kWeightDecay]);
    c.decoupled = T(decouples ? hyper[kWeightDecay] : 0.0);
    c.rate = T(0);
    return c;
  }

  // u_t; the moments become those of this step.
  template <class T>
  static FUSEDOPT_HD T direction(T param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    grad = with_decay(grad, param, c.coupled);
    T &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg = c.beta1 * exp_avg + c.beta3 * grad;                                                // m_t
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;                         // v_t
    const T root = divide_root(square_root(exp_avg_sq), c.bias_correction2_sqrt, c.reciprocal);  // sqrt(v_hat)
    const T ratio = c.correction1 * (exp_avg / (root + c.eps));                                  // r_t
    return with_decay(ratio, param, c.decoupled);                                                // r_t + lambda * x
  }

  template <class T>
  static FUSEDOPT_HD void measure(T param, T grad, T (&state)[kStates], const Coefficients<T>& c, T (&terms)[kNorms]) {
    terms[0] = param;
    terms[1] = direction(param, grad, state, c);
  }

  // The trust ratio is 1 where a norm is 0, and, but for NVLAMB, where nothing decays. A norm of NaN is passed on.
  template <class T>
  static FUSEDOPT_HD void scale(Coefficients<T>& c, const double* hyper, const double* norms) {
    const bool adapts = hyper[kWeightDecay] != 0.0 || hyper[kUseNvlamb] != 0.0;
    const double trust = adapts && norms[0] != 0.0 && norms[1] != 0.0 ? norms[0] / norms[1] : 1.0;
    c.rate = T(hyper[kLr] * trust);
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    param = param - c.rate * direction(param, grad, state, c);  // x_t
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
