// Stochastic gradient descent with momentum, as torch.optim.SGD: Sutskever et al., "On the importance of initialization
// and momentum in deep learning", ICML 2013, https://proceedings.mlr.press/v28/sutskever13.html, but with the learning
// rate outside of the momentum. Weight decay as an L2 term, or decoupled (SGDW): Loshchilov & Hutter, "Decoupled Weight
// Decay Regularization", ICLR 2019, https://arxiv.org/abs/1711.05101, algorithm 1.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kStateNames = "";
  static constexpr const char* kHyperNames = "lr weight_decay";
  static constexpr int kStates = 0;
  static constexpr FUSEDOPT_HD Moment moment(int) { return Moment::kFirst; }
  enum HyperIndex { kLr, kWeightDecay };

  template <class T>
  struct Coefficients {
    T lr;            // gamma
    T weight_decay;  // lambda (coupled)
    T decay;         // 1 - gamma * lambda (decoupled)
  };

  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double /*step*/) {
    Coefficients<T> c;
    c.lr = T(hyper[kLr]);
    c.weight_decay = T(hyper[kWeightDecay]);
    c.decay = T(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&)[1], const Coefficients<T>& c) {
    param = param - c.lr * with_decay(grad, param, c.weight_decay);  // theta_t
  }
};

struct Sgdw : Sgd {
  static constexpr const char* kName = "sgdw";

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&)[1], const Coefficients<T>& c) {
    param = param * c.decay - c.lr * grad;  // theta_t
  }
};

struct SgdMomentum {
  static constexpr const char* kName = "sgd_momentum";
  static constexpr const char* kStateNames = "momentum_buffer";
  static constexpr const char* kHyperNames = "lr momentum dampening weight_decay nesterov";
  static constexpr int kStates = 1;
  static constexpr FUSEDOPT_HD Moment moment(int) { return Moment::kFirst; }
  enum HyperIndex { kLr, kMomentum, kDampening, kWeightDecay, kNesterov };

  template <class T>
  struct Coefficients {
    T lr;            // gamma
    T momentum;      // mu
    T keep, gain;    // b_t = keep * b_{t-1} + gain * g_t: mu and 1 - tau; in the first step 0 and 1
    T weight_decay;  // lambda (coupled)
    T decay;         // 1 - gamma * lambda (decoupled)
    bool nesterov;
  };

  // step: t, counting from 1 since the buffer was made.
  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double step) {
    const bool first = step <= 1.0;
    Coefficients<T> c;
    c.lr = T(hyper[kLr]);
    c.momentum = T(hyper[kMomentum]);
    c.keep = first ? T(0) : c.momentum;
    c.gain = first ? T(1) : T(1.0 - hyper[kDampening]);
    c.weight_decay = T(hyper[kWeightDecay]);
    c.decay = T(1.0 - hyper[kLr] * hyper[kWeightDecay]);
    c.nesterov = hyper[kNesterov] != 0.0;
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void descend(T& param, T grad, T& momentum_buffer, const Coefficients<T>& c) {
    momentum_buffer = c.keep * momentum_buffer + c.gain * grad;  // b_t
    param = param - c.lr * (c.nesterov ? grad + c.momentum * momentum_buffer : momentum_buffer);
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    descend(param, with_decay(grad, param, c.weight_decay), state[0], c);
  }
};

struct SgdwMomentum : SgdMomentum {
  static constexpr const char* kName = "sgdw_momentum";

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    param = param * c.decay;  // theta - gamma * lambda * theta
    descend(param, grad, state[0], c);
  }
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
