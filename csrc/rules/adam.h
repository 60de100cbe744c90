// Adam with coupled L2 regularisation. Kingma & Ba, "Adam: A Method for Stochastic Optimization",
// ICLR 2015, https://arxiv.org/abs/1412.6980, algorithm 1.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kStateNames = "exp_avg exp_avg_sq";
  static constexpr const char* kHyperNames = "lr beta1 beta2 eps weight_decay";
  static constexpr int kStates = 2;
  static constexpr FUSEDOPT_HD Moment moment(int state) { return state == 0 ? Moment::kFirst : Moment::kSecond; }
  enum HyperIndex { kLr, kBeta1, kBeta2, kEps, kWeightDecay };

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T step_size;              // alpha / (1 - beta1^t)
    T bias_correction2_sqrt;  // sqrt(1 - beta2^t)
    T reciprocal;             // 1 / bias_correction2_sqrt
    T eps;
    T weight_decay;  // lambda (coupled)
    T decay;         // 1 - alpha * lambda (decoupled)
  };

  // step: t, counting from 1.
  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double step) {
    const TwoPowers beta_t = powers(hyper[kBeta1], hyper[kBeta2], uint64(step));  // beta1^t, beta2^t
    Coefficients<T> c;
    c.beta1 = T(hyper[kBeta1]);
    c.one_minus_beta1 = T(1.0 - hyper[kBeta1]);
    c.beta2 = T(hyper[kBeta2]);
    c.one_minus_beta2 = T(1.0 - hyper[kBeta2]);
    c.step_size = T(hyper[kLr] / (1.0 - beta_t.a));
    c.bias_correction2_sqrt = T(square_root(1.0 - beta_t.b));
    c.reciprocal = T(1) / c.bias_correction2_sqrt;
    c.eps = T(hyper[kEps]);
    c.weight_decay = T(hyper[kWeightDecay]);
    c.decay = T(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void average(T& exp_avg, T& exp_avg_sq, T grad, const Coefficients<T>& c) {
    exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;               // m_t
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;  // v_t
  }

  template <class T>
  static FUSEDOPT_HD void move(T& param, T exp_avg, T exp_avg_sq, const Coefficients<T>& c) {
    const T root = divide_root(square_root(exp_avg_sq), c.bias_correction2_sqrt, c.reciprocal);  // sqrt(v_hat)
    const T denom = root + c.eps;
    param = param - c.step_size * (exp_avg / denom);  // theta_t
  }

  template <class T>
  static FUSEDOPT_HD void descend(T& param, T grad, T (&state)[2], const Coefficients<T>& c) {
    average(state[0], state[1], grad, c);
    move(param, state[0], state[1], c);
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    descend(param, with_decay(grad, param, c.weight_decay), state, c);
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
