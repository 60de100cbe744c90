// RAdam: Adam whose first steps go without the second moment, and whose later ones are shortened by how little of it is
// known. Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020,
// https://arxiv.org/abs/1908.03265, algorithm 2; the threshold is 5 and epsilon is beside sqrt(v), as
// torch.optim.RAdam.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr const char* kStateNames = "exp_avg exp_avg_sq";
  static constexpr const char* kHyperNames = "lr beta1 beta2 eps weight_decay decoupled_weight_decay";
  static constexpr int kStates = 2;
  static constexpr FUSEDOPT_HD Moment moment(int state) { return state == 0 ? Moment::kFirst : Moment::kSecond; }
  enum HyperIndex { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled };

  template <class T>
  struct Coefficients {
    T beta1, one_minus_beta1;
    T beta2, one_minus_beta2;
    T step_size;  // alpha / (1 - beta1^t), and where rectified * r_t * sqrt(1 - beta2^t)
    T eps;
    T weight_decay;  // lambda, 0 where decoupled
    T decay;         // 1 - alpha * lambda, 1 where coupled
    bool rectified;
  };

  // step: t, counting from 1.
  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double step) {
    const bool decoupled = hyper[kDecoupled] != 0.0;
    const TwoPowers beta_t = powers(hyper[kBeta1], hyper[kBeta2], uint64(step));  // beta1^t, beta2^t
    const double rho_inf = 2.0 / (1.0 - hyper[kBeta2]) - 1.0;
    const double rho = rho_inf - 2.0 * step * beta_t.b / (1.0 - beta_t.b);  // rho_t
    Coefficients<T> c;
    c.beta1 = T(hyper[kBeta1]);
    c.one_minus_beta1 = T(1.0 - hyper[kBeta1]);
    c.beta2 = T(hyper[kBeta2]);
    c.one_minus_beta2 = T(1.0 - hyper[kBeta2]);
    c.rectified = rho > 5.0;
    double scale = 1.0;
    if (c.rectified) {
      const double r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
      scale = square_root(r) * square_root(1.0 - beta_t.b);
    }
    c.step_size = T(hyper[kLr] / (1.0 - beta_t.a) * scale);
    c.eps = T(hyper[kEps]);
    c.weight_decay = decoupled ? T(0) : T(hyper[kWeightDecay]);
    c.decay = decoupled ? T(1.0 - hyper[kLr] * hyper[kWeightDecay]) : T(1);
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    T& exp_avg = state[0];     // m
    T& exp_avg_sq = state[1];  // v
    grad = with_decay(grad, param, c.weight_decay);
    exp_avg = c.beta1 * exp_avg + c.one_minus_beta1 * grad;               // m_t
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;  // v_t
    const T denom = c.rectified ? square_root(exp_avg_sq) + c.eps : T(1);
    param = param * c.decay - c.step_size * (exp_avg / denom);  // theta_t
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
