// Lion. Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023,
// https://arxiv.org/abs/2302.06675, algorithm 2.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr const char* kStateNames = "exp_avg";
  static constexpr const char* kHyperNames = "lr beta1 beta2 weight_decay";
  static constexpr int kStates = 1;
  static constexpr FUSEDOPT_HD Moment moment(int) { return Moment::kFirst; }
  enum HyperIndex { kLr, kBeta1, kBeta2, kWeightDecay };

  template <class T>
  struct Coefficients {
    T lr;  // eta
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T decay;  // 1 - eta * lambda
  };

  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double /*step*/) {
    Coefficients<T> c;
    c.lr = T(hyper[kLr]);
    c.beta1 = T(hyper[kBeta1]);
    c.one_minus_beta1 = T(1.0 - hyper[kBeta1]);
    c.beta2 = T(hyper[kBeta2]);
    c.one_minus_beta2 = T(1.0 - hyper[kBeta2]);
    c.decay = T(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    return c;
  }

  // sign(0) = 0, so that untouched rows do not drift; sign(NaN) = NaN, so that NaN is not hidden.
  template <class T>
  static FUSEDOPT_HD T sign(T x) {
    return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    T& exp_avg = state[0];                                                // m
    const T update = sign(c.beta1 * exp_avg + c.one_minus_beta1 * grad);  // sign(c_t)
    param = param * c.decay - c.lr * update;                              // theta_t
    exp_avg = c.beta2 * exp_avg + c.one_minus_beta2 * grad;               // m_t
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
