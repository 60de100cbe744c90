"""The rules in plain torch, in the order of operations of ``csrc/rules/``, for the reference backend.

``rule(param, grad, <states>, hyper, step)`` returns the new parameter and states. Tensors are in the compute type;
``hyper``: doubles in the order of ``RuleSpec.hyper``; ``step`` counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["RULES"]

Tensor = torch.Tensor


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded. torch's may be off by a unit in the last place, so float32 goes by way of float64."""
    if x.dtype == torch.float64:
        roots = [math.sqrt(value) if value >= 0.0 else math.nan for value in x.tolist()]
        return torch.tensor(roots, dtype=torch.float64, device=x.device)
    return x.double().sqrt().to(x.dtype)


def powers(a: float, b: float, n: int) -> tuple[float, float]:
    """a^n and b^n by squaring, as ``csrc/core/platform.h``."""
    power_a = power_b = 1.0
    while n:
        if n & 1:
            power_a, power_b = power_a * a, power_b * b
        a, b, n = a * a, b * b, n >> 1
    return power_a, power_b


def _rounder(like: Tensor):
    """Rounds coefficients, doubles, to the compute type."""
    return lambda value: torch.tensor(value, dtype=torch.float64).to(dtype=like.dtype, device=like.device)


def _descend(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: Sequence[float], step: int):
    lr, beta1, beta2, eps = hyper[:4]
    t = _rounder(param)
    beta1_t, beta2_t = powers(beta1, beta2, step)
    m = t(beta1) * m + t(1.0 - beta1) * grad
    v = t(beta2) * v + t(1.0 - beta2) * grad * grad
    denom = square_root(v) / t(math.sqrt(1.0 - beta2_t)) + t(eps)
    return param - t(lr / (1.0 - beta1_t)) * (m / denom), m, v


def adam(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int):
    weight_decay = _rounder(param)(hyper[4])
    if weight_decay != 0.0:
        grad = grad + weight_decay * param
    return _descend(param, grad, exp_avg, exp_avg_sq, hyper, step)


def adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int):
    param = param * _rounder(param)(1.0 - hyper[0] * hyper[4])
    return _descend(param, grad, exp_avg, exp_avg_sq, hyper, step)


def lion(param: Tensor, grad: Tensor, exp_avg: Tensor, hyper: Sequence[float], step: int):
    lr, beta1, beta2, weight_decay = hyper[:4]
    t = _rounder(param)
    interpolated = t(beta1) * exp_avg + t(1.0 - beta1) * grad
    sign = torch.where(interpolated == 0.0, interpolated, interpolated.sign())  # keeps -0, which torch's does not
    sign = torch.where(interpolated.isnan(), interpolated, sign)  # nor NaN
    param = param * t(1.0 - lr * weight_decay) - t(lr) * sign
    return param, t(beta2) * exp_avg + t(1.0 - beta2) * grad


RULES = {"adam": adam, "adamw": adamw, "lion": lion}
"""By name, as ``fusedopt.specs.RULES``."""
