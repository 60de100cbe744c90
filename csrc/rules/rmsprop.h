// RMSprop. Tieleman & Hinton, "Lecture 6.5", COURSERA, 2012; centered and with momentum as in Graves, "Generating
// Sequences With Recurrent Neural Networks", https://arxiv.org/abs/1308.0850, equations 38 to 45, but with epsilon
// outside of the root and the learning rate outside of the momentum, as torch.optim.RMSprop.
#pragma once

#include "../core/moment.h"
#include "../core/platform.h"
#include "decay.h"

namespace fusedopt {
namespace FUSEDOPT_ISA {

template <bool kCentered, bool kWithMomentum>
struct RmspropVariant {
  static constexpr const char* kStateNames =
      kCentered ? (kWithMomentum ? "square_avg momentum_buffer grad_avg" : "square_avg grad_avg")
                : (kWithMomentum ? "square_avg momentum_buffer" : "square_avg");
  static constexpr const char* kHyperNames = "lr alpha eps weight_decay momentum";
  static constexpr int kStates = 1 + kCentered + kWithMomentum;
  static constexpr FUSEDOPT_HD Moment moment(int state) { return state == 0 ? Moment::kSecond : Moment::kFirst; }
  enum HyperIndex { kLr, kAlpha, kEps, kWeightDecay, kMomentum };

  template <class T>
  struct Coefficients {
    T lr;                      // gamma
    T alpha, one_minus_alpha;  // alpha
    T eps;
    T weight_decay;  // lambda
    T momentum;      // mu
  };

  template <class T>
  static FUSEDOPT_HD Coefficients<T> prepare(const double* hyper, double /*step*/) {
    Coefficients<T> c;
    c.lr = T(hyper[kLr]);
    c.alpha = T(hyper[kAlpha]);
    c.one_minus_alpha = T(1.0 - hyper[kAlpha]);
    c.eps = T(hyper[kEps]);
    c.weight_decay = T(hyper[kWeightDecay]);
    c.momentum = T(hyper[kMomentum]);
    return c;
  }

  template <class T>
  static FUSEDOPT_HD void update(T& param, T grad, T (&state)[kStates], const Coefficients<T>& c) {
    grad = with_decay(grad, param, c.weight_decay);
    T& square_avg = state[0];
    square_avg = c.alpha * square_avg + c.one_minus_alpha * grad * grad;  // v_t
    T variance = square_avg;
    if constexpr (kCentered) {
      T& grad_avg = state[kStates - 1];
      grad_avg = c.alpha * grad_avg + c.one_minus_alpha * grad;  // m_t
      variance = square_avg - grad_avg * grad_avg;
      variance = variance < T(0) ? T(0) : variance;  // by rounding only; NaN stays NaN
    }
    const T step = grad / (square_root(variance) + c.eps);
    if constexpr (kWithMomentum) {
      T& momentum_buffer = state[1];
      momentum_buffer = c.momentum * momentum_buffer + step;  // b_t
      param = param - c.lr * momentum_buffer;                 // theta_t
    } else {
      param = param - c.lr * step;  // theta_t
    }
  }
};

struct Rmsprop : RmspropVariant<false, false> {
  static constexpr const char* kName = "rmsprop";
};

struct RmspropMomentum : RmspropVariant<false, true> {
  static constexpr const char* kName = "rmsprop_momentum";
};

struct RmspropCentered : RmspropVariant<true, false> {
  static constexpr const char* kName = "rmsprop_centered";
};

struct RmspropCenteredMomentum : RmspropVariant<true, true> {
  static constexpr const char* kName = "rmsprop_centered_momentum";
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt
