"""The rules as functions over lists of tensors, for training loops of your own.

All are in place, take one launch per dtype, wait for nothing, and write nothing if they raise. On CUDA they can be
captured in a graph once they have run with the same tensors outside of it.

Common arguments:
    params: tensors of dtype float32, bfloat16, float16, float64, complex64 or complex128, any shape and layout.
    grads: as many tensors of the same shapes and devices, of any of these dtypes (float64 and complex ones only with
        themselves).
    exp_avgs, exp_avg_sqs: the moments; tensors of the parameters' shapes.
    steps: 0-dim float32 tensors on the parameters' devices: how many steps were taken; incremented.
    lr: per step; a float or a 0-dim tensor.
    grad_scale: divides the gradients; a float or 0-dim tensor.
    found_inf: non-zero makes the call do nothing; a float or 0-dim tensor.
    clip_coef: multiplies the unscaled, clamped gradients; a float or 0-dim tensor, as ``max_norm / norm``.
    max_grad_value: clamps each unscaled gradient element.

DTensors (FSDP2, tensor parallelism) are updated where their parts are, beside plain tensors or alone. The gradient and
the moments of one must lie on its mesh, placed as it is; ``steps`` are plain. ``get_total_norm`` and ``unscale_grads_``
make a ``clip_coef`` and a ``found_inf`` that are those of the whole tensors. ``lamb_`` takes norms over all parts, so
all processes of the mesh must call it with the same tensors in the same order and the same ``found_inf``; the others
send nothing.

Raises:
    ValueError: lists of different lengths, shapes, devices or placements that do not fit, bad hyper-parameters.
    TypeError: a dtype that is not supported; DTensors beside plain tensors that belong to the same parameter.
    RuntimeError: ``lamb_`` of DTensors: a process failed, or took too long. Nothing has been updated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from . import passes
from .backends import for_device
from .checks import check_clipping, check_complex_clipping, check_dense, check_grad, check_hyperparameters
from .plan import Bucket, TensorRow, is_dense, like_parameter, same_layout
from .sharding import Spread, check_spread, dense_local, is_sharded, spread_of
from .specs import PARAM_FORMATS, RULES, STATE_FORMATS, RuleSpec
from .tensor_norms import TensorNorms

__all__ = ["adagrad_", "adam_", "adamw_", "lamb_", "lion_", "radam_", "rmsprop_", "sgd_", "sgdw_"]

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
    max_exp_avg_sqs: Tensors | None = None,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.Adam` (Kingma & Ba, 2015). Arguments and errors: see the module.

    max_exp_avg_sqs: the largest second moments so far; makes it AMSGrad.
    """
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs}
    _apply("adam" if max_exp_avg_sqs is None else "adam_amsgrad", params, grads, states, steps, hyper, scalars)


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
    max_exp_avg_sqs: Tensors | None = None,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.AdamW` (Loshchilov & Hutter, 2019). Arguments and errors: see the module.

    max_exp_avg_sqs: the largest second moments so far; makes it AMSGrad.
    """
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs}
    _apply("adamw" if max_exp_avg_sqs is None else "adamw_amsgrad", params, grads, states, steps, hyper, scalars)


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
    _apply("lion", params, grads, {"exp_avg": exp_avgs}, steps, hyper, scalars)


def sgd_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None,
    steps: Tensors,
    *,
    lr: Scalar,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.SGD` (Sutskever et al., 2013). Arguments and errors: see the module.

    momentum_buffers: None where momentum is 0. Zeros beside a step of 0: then the buffer becomes the gradient.
    """
    hyper = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    rule = "sgd_momentum" if momentum else "sgd"
    states = {"momentum_buffer": momentum_buffers}
    _apply(rule, params, grads, states, steps, {**hyper, "maximize": maximize}, scalars)


def sgdw_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors | None,
    steps: Tensors,
    *,
    lr: Scalar,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.SGDW` (Loshchilov & Hutter, 2019). Arguments and errors: see the module.

    momentum_buffers: None where momentum is 0. Zeros beside a step of 0: then the buffer becomes the gradient.
    """
    hyper = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    rule = "sgdw_momentum" if momentum else "sgdw"
    states = {"momentum_buffer": momentum_buffers}
    _apply(rule, params, grads, states, steps, {**hyper, "maximize": maximize}, scalars)


def rmsprop_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    momentum_buffers: Tensors | None = None,
    grad_avgs: Tensors | None = None,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.RMSprop` (Tieleman & Hinton, 2012). Arguments and errors: see the module.

    momentum_buffers: None where momentum is 0. grad_avgs: the averages of gradients; makes it centered.
    """
    hyper = dict(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    rule = f"rmsprop{'' if grad_avgs is None else '_centered'}{'_momentum' if momentum else ''}"
    states = {"square_avg": square_avgs, "momentum_buffer": momentum_buffers, "grad_avg": grad_avgs}
    _apply(rule, params, grads, states, steps, hyper, scalars)


def adagrad_(
    params: Tensors,
    grads: Tensors,
    sums: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.Adagrad` (Duchi et al., 2011). Arguments and errors: see the module.

    sums: of squared gradients.
    """
    hyper = dict(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    _apply("adagrad", params, grads, {"sum": sums}, steps, hyper, scalars)


def radam_(
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
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.RAdam` (Liu et al., 2020). Arguments and errors: see the module."""
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    states = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    hyper["decoupled_weight_decay"] = decoupled_weight_decay
    _apply("radam", params, grads, states, steps, hyper, scalars)


def lamb_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: Scalar,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    adam_w_mode: bool = True,
    grad_averaging: bool = True,
    use_nvlamb: bool = False,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Scalar | None = None,
    clip_coef: Scalar | None = None,
    max_grad_value: float | None = None,
) -> None:
    """One step of :class:`fusedopt.LAMB` (You et al., 2020). Arguments and errors: see the module.

    Takes two launches per dtype. Norms are those of each tensor of ``params``; of DTensors over all their parts, with
    one all-reduce for all that lie alike between the launches.
    """
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    hyper |= dict(bias_correction=bias_correction, adam_w_mode=adam_w_mode)
    hyper |= dict(grad_averaging=grad_averaging, use_nvlamb=use_nvlamb)
    scalars = passes.StepScalars(grad_scale, found_inf, clip_coef, max_grad_value)
    _apply("lamb", params, grads, {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}, steps, hyper, scalars)


# ---- one step -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _apply(
    name: str,
    params: Tensors,
    grads: Tensors,
    named_states: Mapping[str, Tensors | None],
    steps: Tensors,
    hyper: dict[str, Any],
    scalars: passes.StepScalars,
) -> None:
    """named_states: those of all variants; the rule ``name`` takes its own."""
    rule = RULES[name]
    where, states = f"{rule.family}_", [_given(name, key, named_states[key]) for key in rule.states]
    _check_lengths(where, rule, params, grads, states, steps)
    wholes, spreads = [params, *states], [spread_of(param) for param in params]
    params, grads, *states = _local_lists(where, rule, params, grads, states)
    _check_lists(where, rule, params, grads, states, steps)
    _check_scalars(where, scalars)
    check_hyperparameters(where, hyper)
    check_clipping(where, None, 2.0, scalars.max_grad_value, "propagate")
    if any(param.is_complex() for param in params):
        check_complex_clipping(where, scalars.max_grad_value, None)
    if not params:
        return

    staged = [
        _stage(rule, param, grad, [tensors[i] for tensors in states], step, spread)
        for i, (param, grad, step, spread) in enumerate(zip(params, grads, steps, spreads))
    ]
    tables, places = _tables.get([row for row, _, _ in staged])
    _set_grads(places, [grad for _, grad, _ in staged])
    passes.begin(tables, scalars, ("update",), [hyper])
    passes.run_update(tables, TensorNorms.of_tables(tables))
    for i, (_, _, written) in enumerate(staged):
        for kept, used in zip((params[i], *(tensors[i] for tensors in states)), written):
            if used is not kept:
                kept.copy_(used)
    for whole, local in zip(wholes, (params, *states)):
        increment_version([*local, *(each for each in whole if is_sharded(each))])


def _given(rule: str, key: str, tensors: Tensors | None) -> Tensors:
    if tensors is None:
        family = RULES[rule].family
        raise ValueError(
            f"{family}_: {key}s is None, expected one tensor for each parameter, as the hyper-parameters ask for; make "
            "them with torch.zeros_like(param)"
        )
    return tensors


def _stage(
    rule: RuleSpec,
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Tensors,
    step: torch.Tensor,
    spread: Spread | None,
) -> tuple[TensorRow, torch.Tensor, Tensors]:
    """The row of one parameter, its gradient, and the parameter and its states as written.

    All in the layout of the (dense) parameter; copies where needed.
    """
    dense = param if is_dense(param) else torch.empty_like(param, requires_grad=False).copy_(param)
    written = [dense, *(state if same_layout(state, dense) else like_parameter(state, dense) for state in states)]
    row = TensorRow(
        numel=param.numel(),
        device=param.device,
        grad_dtype=grad.dtype,
        rule=rule,
        param_format=PARAM_FORMATS[_name(param.dtype.to_real())],
        state_format=STATE_FORMATS[_name((states[0] if states else param).dtype.to_real())],
        param=dense,
        states=written[1:],
        step=step,
        spread=spread,
    )
    return row, grad if same_layout(grad, dense) else like_parameter(grad, dense), written


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_grads(places: Sequence[tuple[Bucket, int]], grads: Tensors) -> None:
    for (bucket, slot), grad in zip(places, grads):
        bucket.table.set_grad(slot, grad.data_ptr() or 2)  # 0 would read as "no gradient"; an empty tensor has one


_tables = passes.TablesCache()


# ---- checks -------------------------------------------------------------------------------------------------


def _check_lengths(
    where: str, rule: RuleSpec, params: Tensors, grads: Tensors, states: Sequence[Tensors], steps: Tensors
) -> None:
    names = ("grads", *(f"{key}s" for key in rule.states), "steps")
    for name, tensors in zip(names, (grads, *states, steps)):
        if len(tensors) != len(params):
            raise ValueError(
                f"{where}: {name} holds {len(tensors)} tensors, expected {len(params)} as params; "
                "pass one per parameter"
            )


def _local_lists(
    where: str, rule: RuleSpec, params: Tensors, grads: Tensors, states: Sequence[Tensors]
) -> list[Tensors]:
    """Parameters, gradients and states with this process' parts in the places of DTensors."""
    lists = [params, grads, *states]
    if not any(is_sharded(each) for tensors in lists for each in tensors):
        return lists
    for name, tensors in zip(("grads", *(f"{key}s" for key in rule.states)), lists[1:]):
        for i, (tensor, param) in enumerate(zip(tensors, params)):
            _check_alike(f"{where}: {name}[{i}]", tensor, param)
    for i, param in enumerate(params):
        check_spread(f"{where}: params[{i}]", param)
    return [[dense_local(each) for each in tensors] for tensors in lists]


def _check_alike(where: str, tensor: torch.Tensor, param: torch.Tensor) -> None:
    """TypeError or ValueError where only one of them is a DTensor, or they have different parts here."""
    if is_sharded(tensor) != is_sharded(param):
        kinds = {True: "a DTensor", False: "a plain tensor"}
        raise TypeError(
            f"{where} is {kinds[is_sharded(tensor)]} beside a parameter that is {kinds[is_sharded(param)]}, expected "
            "both alike; pass DTensors everywhere, or .to_local() of all of them"
        )
    if not is_sharded(tensor) or not is_sharded(param):
        return
    got, expected = ((each.device_mesh, tuple(each.placements), each.shape) for each in (tensor, param))
    if got != expected:
        raise ValueError(
            f"{where} has shape {tuple(got[2])} and placements {got[1]} on {got[0]}, expected those of its parameter, "
            f"{tuple(expected[2])} and {expected[1]} on {expected[0]}; call .redistribute(placements=…) on it"
        )


def _check_scalars(where: str, scalars: passes.StepScalars) -> None:
    """TypeError for a DTensor, as torch's norms of DTensors are: it has no memory to be read."""
    for name, value in scalars._asdict().items():
        if is_sharded(value):
            raise TypeError(f"{where}: {name} is a DTensor, expected a plain tensor or a number; call .full_tensor()")


def _check_lists(
    where: str, rule: RuleSpec, params: Tensors, grads: Tensors, states: Sequence[Tensors], steps: Tensors
) -> None:
    for i, (param, grad, step) in enumerate(zip(params, grads, steps)):
        check_dense(f"{where}: params[{i}]", param)
        check_grad(f"{where}: grads[{i}]", grad, param)
        own = [tensors[i] for tensors in states]
        for key, state in zip(rule.states, own):
            _check_state(f"{where}: {key}s[{i}]", state, param, own[0])
        if step.dtype != torch.float32 or step.numel() != 1 or step.device != param.device or is_sharded(step):
            raise ValueError(
                f"{where}: steps[{i}] is {step.dtype}, a {type(step).__name__} of shape {tuple(step.shape)} on "
                f"{step.device}, expected a plain float32 scalar on {param.device}; make it with "
                "torch.zeros((), device=param.device)"
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
    if (state.is_complex() or param.is_complex()) and state.dtype != param.dtype:
        raise ValueError(
            f"{where} is {state.dtype} beside a parameter of {param.dtype}, expected the parameter's dtype; create it "
            "with torch.zeros_like(param)"
        )
    if state.dtype != first.dtype or (state.dtype == torch.float64) != (param.dtype == torch.float64):
        raise ValueError(
            f"{where} is {state.dtype} beside a parameter of {param.dtype}, expected one dtype for all states, float64 "
            "only with float64; create it with torch.zeros_like(param)"
        )
