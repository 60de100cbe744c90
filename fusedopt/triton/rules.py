"""The rules as Triton functions: the update of one element, as in the paper and in ``csrc/rules/``, term by term.

A rule is a function

    rule(param, grad, <one argument for each state>, hyper, lr, step) -> param, <each state>

Tiles are in the compute type, float32 or float64, which is ``param.dtype``. ``hyper`` points to the hyper-parameters
of the tensor's group, doubles in the order of ``RuleSpec.hyper``; ``lr``, the first of them, may live elsewhere and
comes as a double; ``step``, a double, counts from 1. Coefficients are computed in double and rounded once, by a
function beside the rule. Nothing here knows of pointers to tensors, dtypes at rest, scales, clipping.

A new rule: a function here and its row in ``RULES``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .target import divide, square_root

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
def adam_coefficients(hyper, lr, step, TYPE: tl.constexpr):
    """beta1, 1 - beta1, beta2, 1 - beta2, step size, sqrt(1 - beta2^t), eps."""
    beta1, beta2, eps = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
    beta1_t, beta2_t = powers(beta1, beta2, step.to(tl.int32))
    step_size = lr / (1.0 - beta1_t)  # alpha / (1 - beta1^t)
    root = tl.sqrt(1.0 - beta2_t)
    return (
        beta1.to(TYPE),
        (1.0 - beta1).to(TYPE),
        beta2.to(TYPE),
        (1.0 - beta2).to(TYPE),
        step_size.to(TYPE),
        root.to(TYPE),
        eps.to(TYPE),
    )


@triton.jit
def adam_descend(param, grad, exp_avg, exp_avg_sq, hyper, lr, step):
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps = adam_coefficients(
        hyper, lr, step, param.dtype
    )
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad  # m_t
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad  # v_t
    denom = divide(square_root(exp_avg_sq), bias_correction2_sqrt) + eps  # sqrt(v_hat) + eps
    return param - step_size * divide(exp_avg, denom), exp_avg, exp_avg_sq  # theta_t


@triton.jit
def adam(param, grad, exp_avg, exp_avg_sq, hyper, lr, step):
    """Adam with coupled L2 regularisation (Kingma & Ba, ICLR 2015, https://arxiv.org/abs/1412.6980)."""
    weight_decay = tl.load(hyper + 4).to(param.dtype)  # lambda
    # The test keeps an infinite parameter from making NaN of 0 * inf, as torch.optim does.
    grad = tl.where(weight_decay != 0.0, grad + weight_decay * param, grad)
    return adam_descend(param, grad, exp_avg, exp_avg_sq, hyper, lr, step)


@triton.jit
def adamw(param, grad, exp_avg, exp_avg_sq, hyper, lr, step):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101)."""
    param = param * (1.0 - lr * tl.load(hyper + 4)).to(param.dtype)  # theta - alpha * lambda * theta
    return adam_descend(param, grad, exp_avg, exp_avg_sq, hyper, lr, step)


# ---- Lion -----------------------------------------------------------------------------------------------------


@triton.jit
def sign(x):
    """0 of 0, NaN of NaN."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))


@triton.jit
def lion(param, grad, exp_avg, hyper, lr, step):
    """Lion (Chen et al., NeurIPS 2023, https://arxiv.org/abs/2302.06675, algorithm 2)."""
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    decay = (1.0 - lr * tl.load(hyper + 3)).to(param.dtype)  # 1 - eta * lambda
    interpolated = beta1.to(param.dtype) * exp_avg + (1.0 - beta1).to(param.dtype) * grad  # c_t
    param = param * decay - lr.to(param.dtype) * sign(interpolated)  # theta_t
    exp_avg = beta2.to(param.dtype) * exp_avg + (1.0 - beta2).to(param.dtype) * grad  # m_t
    return param, exp_avg


RULES = {"adam": adam, "adamw": adamw, "lion": lion}
"""By name, as ``fusedopt.specs.RULES``."""
