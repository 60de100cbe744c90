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

A new rule: its functions here and its row in ``RULES``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .target import divide, divide_root, square_root

__all__ = ["RULES"]


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


# ---- Adam, AdamW ----------------------------------------------------------------------------------------------


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
def descend(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    bias_correction2_sqrt,
    reciprocal,
    eps,
):
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad  # m_t
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad  # v_t
    denom = divide_root(square_root(exp_avg_sq), bias_correction2_sqrt, reciprocal) + eps  # sqrt(v_hat) + eps
    return param - step_size * divide(exp_avg, denom), exp_avg, exp_avg_sq  # theta_t


@triton.jit
def adam(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay):
    """Adam with coupled L2 regularisation (Kingma & Ba, ICLR 2015, https://arxiv.org/abs/1412.6980)."""
    # The test keeps an infinite parameter from making NaN of 0 * inf, as torch.optim does.
    grad = tl.where(weight_decay != 0.0, grad + weight_decay * param, grad)
    return descend(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def adamw(param, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7, weight_decay, decay):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101)."""
    return descend(param * decay, grad, exp_avg, exp_avg_sq, c0, c1, c2, c3, c4, c5, c6, c7)


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


RULES = {"adam": (prepare_adam, adam), "adamw": (prepare_adam, adamw), "lion": (prepare_lion, lion)}
"""By name, as ``fusedopt.specs.RULES``: what makes the coefficients, and the update."""
