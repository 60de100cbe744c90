"""The rules as Triton functions: the update of one element, as in the paper and in ``csrc/rules/``, term by term.

A rule is two functions. The first makes its coefficients, once for a program's elements:

    prepare(hyper, lr, step, TYPE) -> ten scalars

``hyper`` points to the hyper-parameters of the tensor's group, doubles in the order of ``RuleSpec.hyper``; ``lr``, the
first of them, may live elsewhere and comes as a double; ``step``, a double, counts from 1. Coefficients are computed in
double and rounded once to TYPE, the compute type. Those that a rule does not need are 0: their number is fixed, because
Triton 3.2 cannot hand on tuples. The second is the update:

    rule(param, grad, <one argument for each state>, <the ten coefficients>) -> param, <each state>

Tiles are in the compute type, float32 or float64. Nothing here knows of pointers to tensors, dtypes at rest, scales,
clipping.

A rule of two phases (``csrc/core/norms.h``) has two more functions:

    measure(<the arguments of rule>) -> a term for each norm
    scale(hyper, lr, <each norm>) -> the last coefficient, for the second phase; a double

A new rule: its functions here and its row in ``RULES``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .target import divide, divide_root, square_root

__all__ = ["PHASES", "RULES"]


# ---- arithmetic -----------------------------------------------------------------------------------------------


@triton.jit
def powers(a, b, n):
    """a^n and b^n by squaring, in the order of ``powers`` in ``csrc/core/platform.h``. a, b: doubles; n: int32."""
    power_a, power_b = a * 0 + 1.0, b * 0 + 1.0
    while n != 0:
        odd = (n & 1) != 0
        power_a = tl.where(odd, power_a * a, power_a)
        power_b = tl.where(odd, power_b * b, power_b)
        a = a * a
        b = b * b
        n = n >> 1
    return power_a, power_b


@triton.jit
def with_decay(grad, param, weight_decay):
    """g + lambda * theta. The test keeps an infinite parameter from making NaN of 0 * inf, as torch.optim does."""
    return tl.where(weight_decay != 0.0, grad + weight_decay * param, grad)


# ---- Adam, AdamW, AMSGrad -------------------------------------------------------------------------------------


@triton.jit
def prepare_adam(hyper, lr, step, TYPE: tl.constexpr):
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    eps, weight_decay = tl.load(hyper + 3), tl.load(hyper + 4)
    beta1_t, beta2_t = powers(beta1, beta2, step.to(tl.int32))
    root = tl.sqrt(1.0 - beta2_t).to(TYPE)
    return (
        beta1.to(TYPE),
        (1.0 - beta1).to(TYPE),
        beta2.to(TYPE),
        (1.0 - beta2).to(TYPE),
        (lr / (1.0 - beta1_t)).to(TYPE),  # alpha / (1 - beta1^t)
        root,  # sqrt(1 - beta2^t)
        (1.0 / root.to(tl.float64)).to(TYPE),
        eps.to(TYPE),
        weight_decay.to(TYPE),  # lambda (coupled)
        (1.0 - lr * weight_decay).to(TYPE),  # 1 - alpha * lambda (decoupled)
    )


@triton.jit
def average(exp_avg, exp_avg_sq, grad, beta1, one_minus_beta1, beta2, one_minus_beta2):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad  # m_t
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad  # v_t
    return exp_avg, exp_avg_sq


@triton.jit
def move(param, exp_avg, exp_avg_sq, step_size, bias_correction2_sqrt, reciprocal, eps):
    denom = divide_root(square_root(exp_avg_sq), bias_correction2_sqrt, reciprocal) + eps  # sqrt(v_hat) + eps
    return param - step_size * divide(exp_avg, denom)  # theta_t


@triton.jit
def adam(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay):
    """Adam with coupled L2 regularisation (Kingma & Ba, ICLR 2015, https://arxiv.org/abs/1412.6980)."""
    grad = with_decay(grad, param, weight_decay)
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)
    return move(param, exp_avg, exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq


@triton.jit
def adamw(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101)."""
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)
    return move(param * decay, exp_avg, exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq


@triton.jit
def larger(a, b):
    """NaN if either is."""
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit
def adam_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay):
    """AMSGrad (Reddi, Kale & Kumar, ICLR 2018, https://arxiv.org/abs/1904.09237, algorithm 2), coupled decay."""
    grad = with_decay(grad, param, weight_decay)
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)
    max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq)  # v_hat_t
    return move(param, exp_avg, max_exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def adamw_amsgrad(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay
):
    """AMSGrad with decoupled decay."""
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, c0, c1, c2, c3)
    max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq)  # v_hat_t
    return move(param * decay, exp_avg, max_exp_avg_sq, c4, c5, c6, c7), exp_avg, exp_avg_sq, max_exp_avg_sq


# ---- RAdam ----------------------------------------------------------------------------------------------------


@triton.jit
def prepare_radam(hyper, lr, step, TYPE: tl.constexpr):
    beta1, beta2, eps = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    weight_decay, decoupled = tl.load(hyper + 4), tl.load(hyper + 5) != 0.0
    beta1_t, beta2_t = powers(beta1, beta2, step.to(tl.int32))
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2_t / (1.0 - beta2_t)  # rho_t
    rectified = rho > 5.0
    r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    scale = tl.where(rectified, tl.sqrt(tl.where(rectified, r, 1.0)) * tl.sqrt(1.0 - beta2_t), 1.0)
    return (
        beta1.to(TYPE),
        (1.0 - beta1).to(TYPE),
        beta2.to(TYPE),
        (1.0 - beta2).to(TYPE),
        (lr / (1.0 - beta1_t) * scale).to(TYPE),
        eps.to(TYPE),
        tl.where(decoupled, 0.0, weight_decay).to(TYPE),  # lambda, 0 where decoupled
        tl.where(decoupled, 1.0 - lr * weight_decay, 1.0).to(TYPE),  # 1 - alpha * lambda, 1 where coupled
        rectified.to(TYPE),
        (lr * 0.0).to(TYPE),
    )


@triton.jit
def radam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    weight_decay,
    decay,
    rectified,
    c9,
):
    """RAdam (Liu et al., ICLR 2020, https://arxiv.org/abs/1908.03265, algorithm 2)."""
    grad = with_decay(grad, param, weight_decay)
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, beta1, one_minus_beta1, beta2, one_minus_beta2)
    denom = tl.where(rectified != 0.0, square_root(exp_avg_sq) + eps, 1.0)
    return param * decay - step_size * divide(exp_avg, denom), exp_avg, exp_avg_sq  # theta_t


# ---- LAMB -----------------------------------------------------------------------------------------------------


@triton.jit
def prepare_lamb(hyper, lr, step, TYPE: tl.constexpr):
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    eps, weight_decay = tl.load(hyper + 3), tl.load(hyper + 4)
    corrects, decouples = tl.load(hyper + 5) != 0.0, tl.load(hyper + 6) != 0.0
    averages = tl.load(hyper + 7) != 0.0
    beta1_t, beta2_t = powers(beta1, beta2, step.to(tl.int32))
    return (
        beta1.to(TYPE),
        tl.where(averages, 1.0 - beta1, 1.0).to(TYPE),  # beta3
        beta2.to(TYPE),
        (1.0 - beta2).to(TYPE),
        tl.where(corrects, 1.0 / (1.0 - beta1_t), 1.0).to(TYPE),
        tl.where(corrects, tl.sqrt(1.0 - beta2_t), 1.0).to(TYPE),
        eps.to(TYPE),
        tl.where(decouples, 0.0, weight_decay).to(TYPE),  # lambda (coupled)
        tl.where(decouples, weight_decay, 0.0).to(TYPE),  # lambda (in the update)
        (lr * 0.0).to(TYPE),  # scale_lamb's
    )


@triton.jit
def scale_lamb(hyper, lr, param_norm, update_norm):
    """eta * trust ratio, which is 1 where a norm is 0, and, but for NVLAMB, where nothing decays."""
    adapts = (tl.load(hyper + 4) != 0.0) | (tl.load(hyper + 8) != 0.0)
    known = (param_norm != 0.0) & (update_norm != 0.0)  # NaN is passed on
    trust = param_norm / tl.where(update_norm != 0.0, update_norm, 1.0)
    return lr * tl.where(adapts & known, trust, 1.0)


@triton.jit
def lamb_direction(
    param, grad, exp_avg, exp_avg_sq, beta1, beta3, beta2, one_minus_beta2, correction1, root, eps, coupled, decoupled
):
    """u_t, and the moments."""
    grad = with_decay(grad, param, coupled)
    exp_avg, exp_avg_sq = average(exp_avg, exp_avg_sq, grad, beta1, beta3, beta2, one_minus_beta2)
    reciprocal = (1.0 / root.to(tl.float64)).to(root.dtype)
    denom = divide_root(square_root(exp_avg_sq), root, reciprocal) + eps  # sqrt(v_hat) + eps
    return with_decay(correction1 * divide(exp_avg, denom), param, decoupled), exp_avg, exp_avg_sq


@triton.jit
def measure_lamb(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, c8, rate):
    update, exp_avg, exp_avg_sq = lamb_direction(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, c8)
    return param, update


@triton.jit
def lamb(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, c8, rate):
    """LAMB (You et al., ICLR 2020, https://arxiv.org/abs/1904.00962, algorithm 2), as apex.optimizers.FusedLAMB."""
    update, exp_avg, exp_avg_sq = lamb_direction(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, c8)
    return param - rate * update, exp_avg, exp_avg_sq  # x_t


# ---- Lion -----------------------------------------------------------------------------------------------------


@triton.jit
def prepare_lion(hyper, lr, step, TYPE: tl.constexpr):
    beta1, beta2, weight_decay = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    zero = (lr * 0.0).to(TYPE)
    return (
        lr.to(TYPE),  # eta
        beta1.to(TYPE),
        (1.0 - beta1).to(TYPE),
        beta2.to(TYPE),
        (1.0 - beta2).to(TYPE),
        (1.0 - lr * weight_decay).to(TYPE),  # 1 - eta * lambda
        zero,
        zero,
        zero,
        zero,
    )


@triton.jit
def sign(x):
    """0 of 0, NaN of NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def lion(param, grad, exp_avg, lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, c6, c7, c8, c9):
    """Lion (Chen et al., NeurIPS 2023, https://arxiv.org/abs/2302.06675, algorithm 2)."""
    interpolated = beta1 * exp_avg + one_minus_beta1 * grad  # c_t
    param = param * decay - lr * sign(interpolated)  # theta_t
    return param, beta2 * exp_avg + one_minus_beta2 * grad  # m_t


# ---- SGD, SGDW ------------------------------------------------------------------------------------------------


@triton.jit
def prepare_sgd(hyper, lr, step, TYPE: tl.constexpr):
    weight_decay = tl.load(hyper + 1)
    zero = (lr * 0.0).to(TYPE)
    decay = (1.0 - lr * weight_decay).to(TYPE)  # 1 - gamma * lambda (decoupled)
    return lr.to(TYPE), weight_decay.to(TYPE), decay, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def sgd(param, grad, lr, weight_decay, decay, c3, c4, c5, c6, c7, c8, c9):
    """Gradient descent, coupled decay."""
    return param - lr * with_decay(grad, param, weight_decay)  # theta_t


@triton.jit
def sgdw(param, grad, lr, weight_decay, decay, c3, c4, c5, c6, c7, c8, c9):
    """Gradient descent, decoupled decay (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101)."""
    return param * decay - lr * grad  # theta_t


@triton.jit
def prepare_sgd_momentum(hyper, lr, step, TYPE: tl.constexpr):
    momentum, dampening = tl.load(hyper + 1), tl.load(hyper + 2)
    weight_decay, nesterov = tl.load(hyper + 3), tl.load(hyper + 4)
    first = step <= 1.0
    zero = (lr * 0.0).to(TYPE)
    return (
        lr.to(TYPE),  # gamma
        momentum.to(TYPE),  # mu
        tl.where(first, 0.0, momentum).to(TYPE),  # b_t = keep * b_{t-1} + gain * g_t: mu and 1 - tau,
        tl.where(first, 1.0, 1.0 - dampening).to(TYPE),  # in the first step 0 and 1
        weight_decay.to(TYPE),  # lambda (coupled)
        (1.0 - lr * weight_decay).to(TYPE),  # 1 - gamma * lambda (decoupled)
        (nesterov != 0.0).to(TYPE),
        zero,
        zero,
        zero,
    )


@triton.jit
def descend(param, grad, momentum_buffer, lr, momentum, keep, gain, nesterov):
    momentum_buffer = keep * momentum_buffer + gain * grad  # b_t
    return param - lr * tl.where(nesterov != 0.0, grad + momentum * momentum_buffer, momentum_buffer), momentum_buffer


@triton.jit
def sgd_momentum(param, grad, momentum_buffer, lr, momentum, keep, gain, weight_decay, decay, nesterov, c7, c8, c9):
    """Momentum as torch.optim.SGD: Sutskever et al., ICML 2013, with the learning rate outside of it."""
    return descend(param, with_decay(grad, param, weight_decay), momentum_buffer, lr, momentum, keep, gain, nesterov)


@triton.jit
def sgdw_momentum(param, grad, momentum_buffer, lr, momentum, keep, gain, weight_decay, decay, nesterov, c7, c8, c9):
    """The same with decoupled decay (Loshchilov & Hutter, ICLR 2019, algorithm 1)."""
    return descend(param * decay, grad, momentum_buffer, lr, momentum, keep, gain, nesterov)


# ---- RMSprop --------------------------------------------------------------------------------------------------


@triton.jit
def prepare_rmsprop(hyper, lr, step, TYPE: tl.constexpr):
    alpha, eps = tl.load(hyper + 1), tl.load(hyper + 2)
    weight_decay, momentum = tl.load(hyper + 3), tl.load(hyper + 4)
    zero = (lr * 0.0).to(TYPE)
    return (
        lr.to(TYPE),  # gamma
        alpha.to(TYPE),
        (1.0 - alpha).to(TYPE),
        eps.to(TYPE),
        weight_decay.to(TYPE),  # lambda
        momentum.to(TYPE),  # mu
        zero,
        zero,
        zero,
        zero,
    )


@triton.jit
def variance_of(square_avg, grad_avg):
    """v_t - m_t^2, not negative, which it is by rounding only; NaN stays NaN."""
    variance = square_avg - grad_avg * grad_avg
    return tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def rmsprop(param, grad, square_avg, lr, alpha, one_minus_alpha, eps, weight_decay, momentum, c6, c7, c8, c9):
    """RMSprop (Tieleman & Hinton, lecture 6.5, COURSERA, 2012), as torch.optim.RMSprop."""
    grad = with_decay(grad, param, weight_decay)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad  # v_t
    return param - lr * divide(grad, square_root(square_avg) + eps), square_avg  # theta_t


@triton.jit
def rmsprop_momentum(
    param, grad, square_avg, momentum_buffer, lr, alpha, one_minus_alpha, eps, weight_decay, momentum, c6, c7, c8, c9
):
    """With momentum (Graves, https://arxiv.org/abs/1308.0850)."""
    grad = with_decay(grad, param, weight_decay)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad  # v_t
    momentum_buffer = momentum * momentum_buffer + divide(grad, square_root(square_avg) + eps)  # b_t
    return param - lr * momentum_buffer, square_avg, momentum_buffer  # theta_t


@triton.jit
def rmsprop_centered(
    param, grad, square_avg, grad_avg, lr, alpha, one_minus_alpha, eps, weight_decay, momentum, c6, c7, c8, c9
):
    """Divided by the standard deviation (Graves, https://arxiv.org/abs/1308.0850)."""
    grad = with_decay(grad, param, weight_decay)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad  # v_t
    grad_avg = alpha * grad_avg + one_minus_alpha * grad  # m_t
    step = divide(grad, square_root(variance_of(square_avg, grad_avg)) + eps)
    return param - lr * step, square_avg, grad_avg  # theta_t


@triton.jit
def rmsprop_centered_momentum(
    param,
    grad,
    square_avg,
    momentum_buffer,
    grad_avg,
    lr,
    alpha,
    one_minus_alpha,
    eps,
    weight_decay,
    momentum,
    c6,
    c7,
    c8,
    c9,
):
    """Both."""
    grad = with_decay(grad, param, weight_decay)
    square_avg = alpha * square_avg + one_minus_alpha * grad * grad  # v_t
    grad_avg = alpha * grad_avg + one_minus_alpha * grad  # m_t
    step = divide(grad, square_root(variance_of(square_avg, grad_avg)) + eps)
    momentum_buffer = momentum * momentum_buffer + step  # b_t
    return param - lr * momentum_buffer, square_avg, momentum_buffer, grad_avg  # theta_t


# ---- Adagrad --------------------------------------------------------------------------------------------------


@triton.jit
def prepare_adagrad(hyper, lr, step, TYPE: tl.constexpr):
    lr_decay, weight_decay, eps = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    zero = (lr * 0.0).to(TYPE)
    rate = (lr / (1.0 + (step - 1.0) * lr_decay)).to(TYPE)  # gamma / (1 + (t - 1) * eta)
    return rate, weight_decay.to(TYPE), eps.to(TYPE), zero, zero, zero, zero, zero, zero, zero


@triton.jit
def adagrad(param, grad, sum, lr, weight_decay, eps, c3, c4, c5, c6, c7, c8, c9):
    """Adagrad (Duchi, Hazan & Singer, JMLR 12, 2011, https://jmlr.org/papers/v12/duchi11a.html, figure 1)."""
    grad = with_decay(grad, param, weight_decay)
    sum = sum + grad * grad  # s_t
    return param - lr * divide(grad, square_root(sum) + eps), sum  # theta_t


RULES = {
    "adam": (prepare_adam, adam),
    "adamw": (prepare_adam, adamw),
    "lion": (prepare_lion, lion),
    "adam_amsgrad": (prepare_adam, adam_amsgrad),
    "adamw_amsgrad": (prepare_adam, adamw_amsgrad),
    "sgd": (prepare_sgd, sgd),
    "sgd_momentum": (prepare_sgd_momentum, sgd_momentum),
    "sgdw": (prepare_sgd, sgdw),
    "sgdw_momentum": (prepare_sgd_momentum, sgdw_momentum),
    "rmsprop": (prepare_rmsprop, rmsprop),
    "rmsprop_momentum": (prepare_rmsprop, rmsprop_momentum),
    "rmsprop_centered": (prepare_rmsprop, rmsprop_centered),
    "rmsprop_centered_momentum": (prepare_rmsprop, rmsprop_centered_momentum),
    "adagrad": (prepare_adagrad, adagrad),
    "radam": (prepare_radam, radam),
    "lamb": (prepare_lamb, lamb),
}
"""By name, as ``fusedopt.specs.RULES``: what makes the coefficients, and the update."""

PHASES = {"lamb": (measure_lamb, scale_lamb)}
"""Of rules of two phases: what measures, and what makes the last coefficient."""
