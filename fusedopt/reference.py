"""The rules and the gradient transform once more, in float64 torch, written from the papers.

This is the judge of every backend, so it shares no code with them and imports torch only. Results are returned before
they are rounded to a storage dtype; `ulp` and `round_to` say what that rounding does.

The rules use nothing but arithmetic operators and the methods `sqrt`, `sign` and `clamp` of their operands, so they can
also be evaluated on other number-like types (the tests do so with numbers that carry a rounding-error bound).
"""

import torch
from torch import Tensor


def adam(param, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay):
    """Adam (Kingma & Ba 2015, Algorithm 1, https://arxiv.org/abs/1412.6980), with weight decay as an L2 term."""
    beta1, beta2 = betas
    if weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return param - lr * m_hat / (v_hat.sqrt() + eps), {"exp_avg": m, "exp_avg_sq": v}


def adamw(param, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay):
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2, https://arxiv.org/abs/1711.05101): decay outside the gradient."""
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    return adam(param, grad, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=0)


def lion(param, grad, exp_avg, *, step, lr, betas, weight_decay):
    """Lion (Chen et al. 2023, Program 1, https://arxiv.org/abs/2302.06675), sign(0) = 0 and sign(NaN) = NaN.

    `step` is counted for schedules and checkpoints; the rule itself has no bias correction.
    """
    beta1, beta2 = betas
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    c = beta1 * exp_avg + (1 - beta1) * grad
    # torch.sign maps NaN to 0. The second term is 0 for every number, infinities included, and NaN for NaN.
    sign = c.sign() + 0 * c.clamp(-1, 1)
    return param - lr * sign, {"exp_avg": beta2 * exp_avg + (1 - beta2) * grad}


RULES = {"adam": adam, "adamw": adamw, "lion": lion}
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}


def transform_gradient(grad, *, grad_scale=1.0, max_grad_value=None, clip_coef=1.0):
    """Unscale, clip by value, clip by norm, in this order. `grad_scale` divides, `clip_coef` multiplies."""
    grad = grad / grad_scale
    if max_grad_value is not None:
        grad = grad.clamp(-max_grad_value, max_grad_value)
    return grad * clip_coef


def total_norm(tensors: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """The `norm_type`-norm (1, 2 or inf) of all elements of all tensors: float64, 0-dim; 0 when there are none.

    Squares are taken in float64, so elements up to 1e154 do not overflow.
    """
    # The leading zero changes no norm and gives the norm of nothing.
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.linalg.vector_norm(
        torch.cat([zero, *(t.detach().double().cpu().flatten() for t in tensors)]), norm_type
    )


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it; NaN for NaN. float64, 0-dim."""
    return (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)


def reference_step(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    *,
    step: int,
    maximize: bool = False,
    grad_scale: float = 1.0,
    max_grad_value: float | None = None,
    clip_coef: float = 1.0,
    **hyper,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of `rule` on one tensor.

    Args:
        rule: a key of `RULES`.
        param, grad: any shape and float dtype, the same shape.
        states: the tensors named in `STATES[rule]`, shaped like `param`; zeros before the first step.
        step: number of this step, counting from 1.
        hyper: the keyword arguments of the rule: lr, betas, weight_decay and, for Adam and AdamW, eps.

    Returns:
        The new parameter and the new states, float64, before any rounding to a storage dtype.
    """
    param, grad = param.detach().double(), grad.detach().double()
    states = {name: states[name].detach().double() for name in STATES[rule]}
    grad = transform_gradient(grad, grad_scale=grad_scale, max_grad_value=max_grad_value, clip_coef=clip_coef)
    return RULES[rule](param, -grad if maximize else grad, **states, step=step, **hyper)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours in `dtype` at |value|, subnormal numbers included. float64, shaped like `value`."""
    finfo = torch.finfo(dtype)
    magnitude = value.detach().double().abs().clamp(finfo.tiny, finfo.max)
    mantissa, _ = torch.frexp(magnitude)  # in [0.5, 1)
    power_of_two = magnitude / 2 / mantissa  # the largest one <= magnitude
    return power_of_two * finfo.eps


def round_to(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `value` rounded once to the nearest number of `dtype`, ties to even, returned as `dtype`.

    `value.to(dtype)` would round twice for bfloat16 and float16, through float32.
    """
    spacing = ulp(value, dtype)
    return ((value.double() / spacing).round() * spacing).to(dtype)
