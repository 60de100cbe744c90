// AdamW: Adam with decoupled weight decay. Loshchilov & Hutter, "Decoupled Weight Decay
// Regularization", ICLR 2019, https://arxiv.org/abs/1711.05101, algorithm 2 (decay scaled by the
// learning rate, as torch.optim.AdamW).
#pragma once

#include "adam.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct AdamW : Adam {
  static constexpr const char* kName = "adamw";

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    param = param * c.decay;  // theta - alpha * lambda * theta
    descend(param, grad, state, c);
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
