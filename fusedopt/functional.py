"""The rules as functions over lists of tensors, for training loops of your own.

All are in place, take one launch per dtype, wait for nothing, and write nothing if they raise. On CUDA they can be
captured in a graph once they have run with the same tensors outside of it.

Common arguments:
    params: tensors of dtype float32, bfloat16, float16 or float64, any shape and layout.
    grads: as many tensors of the same shapes and devices, of any of these dtypes (float64 only with float64).
    exp_avgs, exp_avg_sqs: the moments; tensors of the parameters' shapes.
    steps: 0-dim float32 tensors on the parameters' devices: how many steps were taken; incremented.
    lr: per step; a float or a 0-dim tensor.
    grad_scale: divides the gradients; a float or 0-dim tensor.
    found_inf: non-zero makes the call do nothing; a float or 0-dim tensor.
    clip_coef: multiplies the unscaled, clamped gradients; a float or 0-dim tensor, as ``max_norm / norm``.
    max_grad_value: clamps each unscaled gradient element.

Raises:
    ValueError: lists of different lengths, shapes or devices that do not fit, bad hyper-parameters.
    TypeError: a dtype that is not supported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from . import passes
from .backends import for_device
from .checks import check_clipping, check_dense, check_grad, check_hyperparameters
from .plan import Bucket, TensorRow, is_dense, like_parameter, same_layout
from .specs import PARAM_FORMATS, RULES, STATE_FORMATS, RuleSpec

__all__ = ["adam_", "adamw_", "lion_"]

Tensors = Sequence[torch.Tensor]
Scalar = torch.Tensor | float


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.Adam` (Kingma & Ba, 2015). Arguments and errors: see the module."""
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    _apply("adam", params, grads, (exp_avgs, exp_avg_sqs), steps, hyper, scalars)


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.AdamW` (Loshchilov & Hutter, 2019). Arguments and errors: see the module."""
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    _apply("adamw", params, grads, (exp_avgs, exp_avg_sqs), steps, hyper, scalars)


def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.Lion` (Chen et al., 2023). Arguments and errors: see the module."""
    hyper = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    _apply("lion", params, grads, (exp_avgs,), steps, hyper, scalars)


# ---- one step -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _apply(
    name: str,
    params: Tensors,
    grads: Tensors,
    states: tuple[Tensors, ...],
    steps: Tensors,
    hyper: dict,
    scalars: passes.StepScalars,
) -> None:
    where, rule = f"{name}_", RULES[name]
    _check_lists(where, rule, params, grads, states, steps)
    check_hyperparameters(where, hyper)
    check_clipping(where, None, 2.0, scalars.max_grad_value, "propagate")
    if not params:
        return

    staged = [_stage(*tensors) for tensors in zip(params, grads, zip(*states), steps)]
    tables, places = _tables.get(rule, [row for row, _ in staged])
    _set_grads(places, [grad for _, grad in staged])
    passes.begin(tables, scalars, ("update",), [hyper])
    passes.run_update(tables)
    for (row, _), param, *own_states in zip(staged, params, *states):
        for kept, used in zip((param, *own_states), (row.param, *row.states)):
            if used is not kept:
                kept.copy_(used)
    increment_version([*params, *(tensor for tensors in states for tensor in tensors)])


def _stage(
    param: torch.Tensor, grad: torch.Tensor, states: tuple[torch.Tensor, ...], step: torch.Tensor
) -> tuple[TensorRow, torch.Tensor]:
    """The row of one parameter and its gradient, all in the layout of the (dense) parameter; copies where needed."""
    dense = param.detach() if is_dense(param) else torch.empty_like(param, requires_grad=False).copy_(param)
    row = TensorRow(
        numel=param.numel(),
        device=param.device,
        grad_dtype=grad.dtype,
        param_format=PARAM_FORMATS[_name(param.dtype)],
        state_format=STATE_FORMATS[_name(states[0].dtype)],
        param=dense if dense.data_ptr() != param.data_ptr() else param,
        states=[state if same_layout(state, dense) else like_parameter(state, dense) for state in states],
        step=step,
    )
    return row, grad if same_layout(grad, dense) else like_parameter(grad, dense)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_grads(places: Sequence[tuple[Bucket, int]], grads: Tensors) -> None:
    for (bucket, slot), grad in zip(places, grads):
        bucket.table.set_grad(slot, grad.data_ptr() or 2)  # 0 would read as "no gradient"; an empty tensor has one


_tables = passes.TablesCache()


# ---- checks -------------------------------------------------------------------------------------------------


def _check_lists(
    where: str, rule: RuleSpec, params: Tensors, grads: Tensors, states: tuple[Tensors, ...], steps: Tensors
) -> None:
    names = ("grads", *(f"{key}s" for key in rule.states), "steps")
    for name, tensors in zip(names, (grads, *states, steps)):
        if len(tensors) != len(params):
            raise ValueError(
                f"{where}: {name} holds {len(tensors)} tensors, expected {len(params)} as params; "
                "pass one per parameter"
            )
    for i, (param, grad, step) in enumerate(zip(params, grads, steps)):
        check_dense(f"{where}: params[{i}]", param)
        check_grad(f"{where}: grads[{i}]", grad, param)
        own = [tensors[i] for tensors in states]
        for key, state in zip(rule.states, own):
            _check_state(f"{where}: {key}s[{i}]", state, param, own[0])
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != param.device:
            raise ValueError(
                f"{where}: steps[{i}] is {step.dtype} of shape {tuple(step.shape)} on {step.device}, expected a "
                f"float32 scalar on {param.device}; make it with torch.zeros((), device=param.device)"
            )
    for device in {param.device for param in params}:
        for_device(device)


def _check_state(where: str, state: torch.Tensor, param: torch.Tensor, first: torch.Tensor) -> None:
    check_dense(where, state)
    if state.shape != param.shape or state.device != param.device:
        raise ValueError(
            f"{where} has shape {tuple(state.shape)} on {state.device}, expected the parameter's "
            f"{tuple(param.shape)} on {param.device}; create it with torch.zeros_like(param)"
        )
    if state.dtype != first.dtype or (state.dtype == torch.float64) != (param.dtype == torch.float64):
        raise ValueError(
            f"{where} is {state.dtype} beside a parameter of {param.dtype}, expected one dtype for all states, float64 "
            "only with float64; create it with torch.zeros_like(param)"
        )
