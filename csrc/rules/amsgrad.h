// AMSGrad: Adam and AdamW divided by the largest second moment so far. Reddi, Kale & Kumar, "On the Convergence of Adam
// and Beyond", ICLR 2018, https://arxiv.org/abs/1904.09237, algorithm 2; the maximum is taken of v before its bias
// correction, as torch.optim does.
#pragma once

#include "adam.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct AdamAmsgrad : Adam {
  static constexpr const char* kName = "adam_amsgrad";
  static constexpr const char* kStateNames = "exp_avg exp_avg_sq max_exp_avg_sq";
  static constexpr int kStates = 3;

  // NaN if either is.
  template <class T>
  static FUSEDOPT_HD T larger(T a, T b) {
    return a >= b || a != a ? a : b;
  }

  template <class T>
  static FUSEDOPT_HD void descend(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    average(state[0], state[1], grad, c);
    state[2] = larger(state[2], state[1]);  // v_hat_t
    move(param, state[0], state[2], c);
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    descend(param, with_decay(grad, param, c.weight_decay), state, c);
  }
};

struct AdamWAmsgrad : AdamAmsgrad {
  static constexpr const char* kName = "adamw_amsgrad";

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    param = param * c.decay;  // theta - alpha * lambda * theta
    descend(param, grad, state, c);
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
