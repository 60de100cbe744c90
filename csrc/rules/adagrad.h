// Adagrad. Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
// 12, 2011, https://jmlr.org/papers/v12/duchi11a.html, figure 1 with a diagonal matrix; the learning rate decays as in
// torch.optim.Adagrad.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kStateNames = "sum";
  static constexpr const char* kHyperNames = "lr lr_decay weight_decay eps";
  static constexpr int kStates = 1;
  static constexpr FUSEDOPT_HD Moment moment(int) { return Moment::kSecond; }
  enum HyperIndex { kLr, kLrDecay, kWeightDecay, kEps };

  template <class T>
  struct Coefficients {
    T lr;            // gamma / (1 + (t - 1) * eta)
    T weight_decay;  // lambda
    T eps;
  };

  // step: t, counting from 1.
  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double step) {
    Coefficients<T> c;
    c.lr = T(hyper[kLr] / (1.0 + (step - 1.0) * hyper[kLrDecay]));
    c.weight_decay = T(hyper[kWeightDecay]);
    c.eps = T(hyper[kEps]);
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    grad = with_decay(grad, param, c.weight_decay);
    T& sum = state[0];
    sum = sum + grad * grad;                                     // s_t
    param = param - c.lr * (grad / (square_root(sum) + c.eps));  // theta_t
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
