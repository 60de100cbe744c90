// Weight decay as an L2 term of the loss, which many rules have.
#pragma once

#include "../core/platform.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

// g + lambda * theta. The test keeps an infinite parameter from making NaN of 0 * inf, as torch.optim does.
template <class T>
FUSEDOPT_HD T with_decay(T grad, T param, T weight_decay) {
  return weight_decay != T(0) ? grad + weight_decay * param : grad;
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
