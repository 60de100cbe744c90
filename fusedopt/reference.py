"""The rules and the gradient transform once more, in float64 torch, written from the papers.

This is the judge of every backend, so it shares no code with them and imports torch only. Results are returned before
they are rounded to a storage dtype; `ulp` and `round_to` say what that rounding does.

The rules use nothing but arithmetic operators and the methods `sqrt`, `sign`, `clamp`, `maximum` and `norm` of their
operands, and compare norms with 0,
so they can also be evaluated on other number-like types (the tests do so with numbers that carry a bound on their
rounding error).
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


def adam_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, *, step, lr, betas, eps, weight_decay):
    """AMSGrad (Reddi et al. 2018, Algorithm 2, https://arxiv.org/abs/1904.09237) with Adam's bias corrections."""
    beta1, beta2 = betas
    if weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    v_max = v.maximum(max_exp_avg_sq)
    m_hat, v_hat = m / (1 - beta1**step), v_max / (1 - beta2**step)
    states = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}
    return param - lr * m_hat / (v_hat.sqrt() + eps), states


def adamw_amsgrad(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, *, step, lr, betas, eps, weight_decay):
    """AMSGrad with weight decay outside of the gradient."""
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    states = exp_avg, exp_avg_sq, max_exp_avg_sq
    return adam_amsgrad(param, grad, *states, step=step, lr=lr, betas=betas, eps=eps, weight_decay=0)


def sgd(param, grad, *, step, lr, weight_decay):
    """Gradient descent on the loss plus weight_decay / 2 |param|^2."""
    if weight_decay:
        grad = grad + weight_decay * param
    return param - lr * grad, {}


def sgdw(param, grad, *, step, lr, weight_decay):
    """SGD with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 1, https://arxiv.org/abs/1711.05101)."""
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    return param - lr * grad, {}


def sgd_momentum(param, grad, momentum_buffer, *, step, lr, momentum, dampening, weight_decay, nesterov):
    """SGD with momentum as torch.optim.SGD documents it: Sutskever et al. 2013, with lr outside of the momentum.

    `step` counts from the one that made the buffer, whose dampening is 0.
    """
    if weight_decay:
        grad = grad + weight_decay * param
    buffer = grad if step == 1 else momentum * momentum_buffer + (1 - dampening) * grad
    update = grad + momentum * buffer if nesterov else buffer
    return param - lr * update, {"momentum_buffer": buffer}


def sgdw_momentum(param, grad, momentum_buffer, *, step, lr, momentum, dampening, weight_decay, nesterov):
    """The same with decoupled weight decay."""
    hyper = dict(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
    if weight_decay:
        param = (1 - lr * weight_decay) * param
    return sgd_momentum(param, grad, momentum_buffer, step=step, weight_decay=0, **hyper)


def _root_mean_square(square_avg, grad, alpha):
    return alpha * square_avg + (1 - alpha) * grad * grad


def _centered(square_avg, grad_avg, grad, alpha):
    """Graves 2013 (https://arxiv.org/abs/1308.0850), equations 38 to 40: both averages and the variance, >= 0."""
    n = _root_mean_square(square_avg, grad, alpha)
    g = alpha * grad_avg + (1 - alpha) * grad
    return n, g, (n - g * g).clamp(min=0)


def rmsprop(param, grad, square_avg, *, step, lr, alpha, eps, weight_decay, momentum):
    """RMSprop (Tieleman & Hinton 2012, slide 29); eps beside the root. `step` is counted only; no momentum."""
    if weight_decay:
        grad = grad + weight_decay * param
    n = _root_mean_square(square_avg, grad, alpha)
    return param - lr * grad / (n.sqrt() + eps), {"square_avg": n}


def rmsprop_momentum(param, grad, square_avg, momentum_buffer, *, step, lr, alpha, eps, weight_decay, momentum):
    """RMSprop with momentum on the divided gradient."""
    if weight_decay:
        grad = grad + weight_decay * param
    n = _root_mean_square(square_avg, grad, alpha)
    buffer = momentum * momentum_buffer + grad / (n.sqrt() + eps)
    return param - lr * buffer, {"square_avg": n, "momentum_buffer": buffer}


def rmsprop_centered(param, grad, square_avg, grad_avg, *, step, lr, alpha, eps, weight_decay, momentum):
    """RMSprop divided by the standard deviation of gradients (Graves 2013); no momentum."""
    if weight_decay:
        grad = grad + weight_decay * param
    n, g, variance = _centered(square_avg, grad_avg, grad, alpha)
    return param - lr * grad / (variance.sqrt() + eps), {"square_avg": n, "grad_avg": g}


def rmsprop_centered_momentum(
    param, grad, square_avg, momentum_buffer, grad_avg, *, step, lr, alpha, eps, weight_decay, momentum
):
    """Graves 2013, equations 38 to 41, with lr outside of the momentum."""
    if weight_decay:
        grad = grad + weight_decay * param
    n, g, variance = _centered(square_avg, grad_avg, grad, alpha)
    buffer = momentum * momentum_buffer + grad / (variance.sqrt() + eps)
    return param - lr * buffer, {"square_avg": n, "momentum_buffer": buffer, "grad_avg": g}


def adagrad(param, grad, sum, *, step, lr, lr_decay, weight_decay, eps):
    """Adagrad (Duchi et al. 2011, Figure 1, https://jmlr.org/papers/v12/duchi11a.html), lr decaying as in torch."""
    if weight_decay:
        grad = grad + weight_decay * param
    total = sum + grad * grad
    return param - lr / (1 + (step - 1) * lr_decay) * grad / (total.sqrt() + eps), {"sum": total}


def radam(param, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay, decoupled_weight_decay):
    """RAdam (Liu et al. 2020, Algorithm 2, https://arxiv.org/abs/1908.03265), rectified where rho_t > 5, as torch."""
    beta1, beta2 = betas
    if weight_decay and decoupled_weight_decay:
        param = (1 - lr * weight_decay) * param
    elif weight_decay:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    m_hat = m / (1 - beta1**step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    states = {"exp_avg": m, "exp_avg_sq": v}
    if length <= 5:
        return param - lr * m_hat, states
    r = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    return param - lr * r * (1 - beta2**step) ** 0.5 * m_hat / (v.sqrt() + eps), states


def lamb(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    *,
    step,
    lr,
    betas,
    eps,
    weight_decay,
    bias_correction,
    adam_w_mode,
    grad_averaging,
    use_nvlamb,
):
    """LAMB (You et al. 2020, Algorithm 2, https://arxiv.org/abs/1904.00962), with the options of apex's FusedLAMB.

    Not elementwise: `param` must be one tensor of the model. A trust ratio of norms that are NaN is NaN.
    """
    beta1, beta2 = betas
    if weight_decay and not adam_w_mode:
        grad = grad + weight_decay * param
    m = beta1 * exp_avg + (1 - beta1 if grad_averaging else 1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    m_hat, v_hat = (m / (1 - beta1**step), v / (1 - beta2**step)) if bias_correction else (m, v)
    update = m_hat / (v_hat.sqrt() + eps)
    if weight_decay and adam_w_mode:
        update = update + weight_decay * param
    states = {"exp_avg": m, "exp_avg_sq": v}
    param_norm, update_norm = param.norm(), update.norm()
    if not (weight_decay or use_nvlamb) or param_norm == 0 or update_norm == 0:
        return param - lr * update, states
    return param - lr * (param_norm / update_norm) * update, states


_MOMENTS = ("exp_avg", "exp_avg_sq")
RULES = {
    rule.__name__: rule
    for rule in (
        adam,
        adamw,
        lion,
        adam_amsgrad,
        adamw_amsgrad,
        sgd,
        sgd_momentum,
        sgdw,
        sgdw_momentum,
        rmsprop,
        rmsprop_momentum,
        rmsprop_centered,
        rmsprop_centered_momentum,
        adagrad,
        radam,
        lamb,
    )
}
STATES: dict[str, tuple[str, ...]] = {
    "adam": _MOMENTS,
    "adamw": _MOMENTS,
    "lion": ("exp_avg",),
    "adam_amsgrad": (*_MOMENTS, "max_exp_avg_sq"),
    "adamw_amsgrad": (*_MOMENTS, "max_exp_avg_sq"),
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "sgdw": (),
    "sgdw_momentum": ("momentum_buffer",),
    "rmsprop": ("square_avg",),
    "rmsprop_momentum": ("square_avg", "momentum_buffer"),
    "rmsprop_centered": ("square_avg", "grad_avg"),
    "rmsprop_centered_momentum": ("square_avg", "momentum_buffer", "grad_avg"),
    "adagrad": ("sum",),
    "radam": _MOMENTS,
    "lamb": _MOMENTS,
}


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
    norm: Tensor = torch.linalg.vector_norm(
        torch.cat([zero, *(t.detach().double().cpu().flatten() for t in tensors)]), norm_type
    )
    return norm


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
    **hyper: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step of `rule` on one tensor.

    Args:
        rule: a key of `RULES`.
        param, grad: any shape and float dtype, the same shape.
        states: the tensors named in `STATES[rule]`, shaped like `param`; zeros before the first step.
        step: number of this step, counting from 1.
        hyper: the other keyword arguments of the rule.

    Returns:
        The new parameter and the new states, float64, before any rounding to a storage dtype.
    """
    param, grad = param.detach().double(), grad.detach().double()
    states = {name: states[name].detach().double() for name in STATES[rule]}
    grad = transform_gradient(grad, grad_scale=grad_scale, max_grad_value=max_grad_value, clip_coef=clip_coef)
    stepped: tuple[Tensor, dict[str, Tensor]] = RULES[rule](
        param, -grad if maximize else grad, **states, step=step, **hyper
    )
    return stepped


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
