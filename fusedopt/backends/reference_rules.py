"""The rules in plain torch, in the order of operations of ``csrc/rules/``, for the reference backend.

``rule(param, grad, <states>, hyper, step)`` returns the new parameter and states. Tensors are in the compute type;
``hyper``: doubles in the order of ``RuleSpec.hyper``; ``step`` counts from 1. Rules of two phases are given the norms
of the tensor's terms too, doubles; the terms are what the function of that name in ``TERMS`` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["RULES", "TERMS"]

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


def _rounder(like: Tensor) -> Callable[[float], Tensor]:
    """Rounds coefficients, doubles, to the compute type."""
    return lambda value: torch.tensor(value, dtype=torch.float64).to(dtype=like.dtype, device=like.device)


def _with_decay(grad: Tensor, param: Tensor, weight_decay: float) -> Tensor:
    """As an L2 term of the loss."""
    decay = _rounder(param)(weight_decay)
    return grad + decay * param if decay != 0.0 else grad


def _shrink(param: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Decoupled decay."""
    return param * _rounder(param)(1.0 - lr * weight_decay)


# ---- Adam, AdamW, AMSGrad, RAdam --------------------------------------------------------------------------------


def _average(m: Tensor, v: Tensor, grad: Tensor, hyper: Sequence[float]) -> tuple[Tensor, Tensor]:
    t, (beta1, beta2) = _rounder(grad), hyper[1:3]
    return t(beta1) * m + t(1.0 - beta1) * grad, t(beta2) * v + t(1.0 - beta2) * grad * grad


def _move(param: Tensor, m: Tensor, v: Tensor, hyper: Sequence[float], step: int) -> Tensor:
    lr, beta1, beta2, eps = hyper[:4]
    t = _rounder(param)
    beta1_t, beta2_t = powers(beta1, beta2, step)
    denom = square_root(v) / t(math.sqrt(1.0 - beta2_t)) + t(eps)
    return param - t(lr / (1.0 - beta1_t)) * (m / denom)


def adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    m, v = _average(exp_avg, exp_avg_sq, _with_decay(grad, param, hyper[4]), hyper)
    return _move(param, m, v, hyper, step), m, v


def adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    m, v = _average(exp_avg, exp_avg_sq, grad, hyper)
    return _move(_shrink(param, hyper[0], hyper[4]), m, v, hyper, step), m, v


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a >= b) | a.isnan(), a, b)


def adam_amsgrad(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    hyper: Sequence[float],
    step: int,
) -> tuple[Tensor, ...]:
    m, v = _average(exp_avg, exp_avg_sq, _with_decay(grad, param, hyper[4]), hyper)
    largest = _larger(max_exp_avg_sq, v)
    return _move(param, m, largest, hyper, step), m, v, largest


def adamw_amsgrad(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor,
    hyper: Sequence[float],
    step: int,
) -> tuple[Tensor, ...]:
    m, v = _average(exp_avg, exp_avg_sq, grad, hyper)
    largest = _larger(max_exp_avg_sq, v)
    return _move(_shrink(param, hyper[0], hyper[4]), m, largest, hyper, step), m, v, largest


def radam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    lr, beta1, beta2, eps, weight_decay, decoupled = hyper[:6]
    t = _rounder(param)
    beta1_t, beta2_t = powers(beta1, beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2_t / (1.0 - beta2_t)
    m, v = _average(exp_avg, exp_avg_sq, _with_decay(grad, param, 0.0 if decoupled else weight_decay), hyper)
    scale, denom = 1.0, torch.ones_like(v)
    if rho > 5.0:
        r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
        scale, denom = math.sqrt(r) * math.sqrt(1.0 - beta2_t), square_root(v) + t(eps)
    decayed = _shrink(param, lr, weight_decay) if decoupled else param
    return decayed - t(lr / (1.0 - beta1_t) * scale) * (m / denom), m, v


# ---- LAMB -------------------------------------------------------------------------------------------------------


def _lamb_direction(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """u_t and the new moments."""
    _, beta1, beta2, eps, weight_decay, bias_correction, adam_w_mode, grad_averaging = hyper[:8]
    t = _rounder(param)
    beta1_t, beta2_t = powers(beta1, beta2, step) if bias_correction else (0.0, 0.0)
    grad = _with_decay(grad, param, 0.0 if adam_w_mode else weight_decay)
    m = t(beta1) * exp_avg + t(1.0 - beta1 if grad_averaging else 1.0) * grad
    v = t(beta2) * exp_avg_sq + t(1.0 - beta2) * grad * grad
    denom = square_root(v) / t(math.sqrt(1.0 - beta2_t)) + t(eps)
    update = t(1.0 / (1.0 - beta1_t)) * (m / denom)
    return _with_decay(update, param, weight_decay if adam_w_mode else 0.0), m, v


def lamb_terms(param: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return param, _lamb_direction(param, *given)[0]


def lamb(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Sequence[float],
    step: int,
    param_norm: float,
    update_norm: float,
) -> tuple[Tensor, ...]:
    lr, weight_decay, use_nvlamb, t = hyper[0], hyper[4], hyper[8], _rounder(param)
    update, m, v = _lamb_direction(param, grad, exp_avg, exp_avg_sq, hyper, step)
    adapts = (weight_decay or use_nvlamb) and param_norm != 0.0 and update_norm != 0.0
    return param - t(lr * (param_norm / update_norm if adapts else 1.0)) * update, m, v


# ---- Lion -------------------------------------------------------------------------------------------------------


def lion(param: Tensor, grad: Tensor, exp_avg: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, beta1, beta2, weight_decay = hyper[:4]
    t = _rounder(param)
    interpolated = t(beta1) * exp_avg + t(1.0 - beta1) * grad
    sign = torch.where(interpolated == 0.0, interpolated, interpolated.sign())  # keeps -0, which torch's does not
    sign = torch.where(interpolated.isnan(), interpolated, sign)  # nor NaN
    param = param * t(1.0 - lr * weight_decay) - t(lr) * sign
    return param, t(beta2) * exp_avg + t(1.0 - beta2) * grad


# ---- SGD, SGDW --------------------------------------------------------------------------------------------------


def sgd(param: Tensor, grad: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, weight_decay = hyper[:2]
    return (param - _rounder(param)(lr) * _with_decay(grad, param, weight_decay),)


def sgdw(param: Tensor, grad: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, weight_decay = hyper[:2]
    return (_shrink(param, lr, weight_decay) - _rounder(param)(lr) * grad,)


def _descend(param: Tensor, grad: Tensor, buffer: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, momentum, dampening, _, nesterov = hyper[:5]
    t = _rounder(param)
    keep, gain = (0.0, 1.0) if step == 1 else (momentum, 1.0 - dampening)
    buffer = t(keep) * buffer + t(gain) * grad
    return param - t(lr) * (grad + t(momentum) * buffer if nesterov else buffer), buffer


def sgd_momentum(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    return _descend(param, _with_decay(grad, param, hyper[3]), momentum_buffer, hyper, step)


def sgdw_momentum(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    return _descend(_shrink(param, hyper[0], hyper[3]), grad, momentum_buffer, hyper, step)


# ---- RMSprop, Adagrad -------------------------------------------------------------------------------------------


def _running(average: Tensor, value: Tensor, alpha: float, times: Tensor | None = None) -> Tensor:
    """alpha * average + (1 - alpha) * value, times another factor."""
    t = _rounder(value)
    new = t(1.0 - alpha) * value
    return t(alpha) * average + (new if times is None else new * times)


def _normalized(grad: Tensor, square_avg: Tensor, grad_avg: Tensor | None, eps: float) -> Tensor:
    """Divided by the root of v_t, or of v_t - m_t^2, which is negative by rounding only."""
    variance = square_avg
    if grad_avg is not None:
        variance = square_avg - grad_avg * grad_avg
        variance = torch.where(variance < 0.0, 0.0, variance)
    return grad / (square_root(variance) + _rounder(grad)(eps))


def rmsprop(param: Tensor, grad: Tensor, square_avg: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, alpha, eps, weight_decay, _ = hyper[:5]
    grad = _with_decay(grad, param, weight_decay)
    square_avg = _running(square_avg, grad, alpha, grad)
    return param - _rounder(param)(lr) * _normalized(grad, square_avg, None, eps), square_avg


def rmsprop_momentum(
    param: Tensor, grad: Tensor, square_avg: Tensor, momentum_buffer: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    lr, alpha, eps, weight_decay, momentum = hyper[:5]
    t = _rounder(param)
    grad = _with_decay(grad, param, weight_decay)
    square_avg = _running(square_avg, grad, alpha, grad)
    momentum_buffer = t(momentum) * momentum_buffer + _normalized(grad, square_avg, None, eps)
    return param - t(lr) * momentum_buffer, square_avg, momentum_buffer


def rmsprop_centered(
    param: Tensor, grad: Tensor, square_avg: Tensor, grad_avg: Tensor, hyper: Sequence[float], step: int
) -> tuple[Tensor, ...]:
    lr, alpha, eps, weight_decay, _ = hyper[:5]
    grad = _with_decay(grad, param, weight_decay)
    square_avg, grad_avg = _running(square_avg, grad, alpha, grad), _running(grad_avg, grad, alpha)
    return param - _rounder(param)(lr) * _normalized(grad, square_avg, grad_avg, eps), square_avg, grad_avg


def rmsprop_centered_momentum(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor,
    grad_avg: Tensor,
    hyper: Sequence[float],
    step: int,
) -> tuple[Tensor, ...]:
    lr, alpha, eps, weight_decay, momentum = hyper[:5]
    t = _rounder(param)
    grad = _with_decay(grad, param, weight_decay)
    square_avg, grad_avg = _running(square_avg, grad, alpha, grad), _running(grad_avg, grad, alpha)
    momentum_buffer = t(momentum) * momentum_buffer + _normalized(grad, square_avg, grad_avg, eps)
    return param - t(lr) * momentum_buffer, square_avg, momentum_buffer, grad_avg


def adagrad(param: Tensor, grad: Tensor, sum: Tensor, hyper: Sequence[float], step: int) -> tuple[Tensor, ...]:
    lr, lr_decay, weight_decay, eps = hyper[:4]
    grad = _with_decay(grad, param, weight_decay)
    sum = sum + grad * grad
    rate = _rounder(param)(lr / (1.0 + (step - 1.0) * lr_decay))
    return param - rate * _normalized(grad, sum, None, eps), sum


RULES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "adam_amsgrad": adam_amsgrad,
    "adamw_amsgrad": adamw_amsgrad,
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "sgdw": sgdw,
    "sgdw_momentum": sgdw_momentum,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop_momentum,
    "rmsprop_centered": rmsprop_centered,
    "rmsprop_centered_momentum": rmsprop_centered_momentum,
    "adagrad": adagrad,
    "radam": radam,
    "lamb": lamb,
}
"""By name, as ``fusedopt.specs.RULES``."""

TERMS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lamb": lamb_terms}
"""Of rules of two phases, given what the rule is given, but for the norms."""
