"""Checks of what users hand us. Every message says where, what was got, what was expected, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from .sharding import check_spread, is_sharded, local_of
from .specs import COMPLEX_DTYPES, DTYPES, NORM_TYPES

__all__ = [
    "check_clipping",
    "check_complex_clipping",
    "check_dense",
    "check_grad",
    "check_hyperparameters",
    "check_norm_reduce",
    "check_param",
    "check_params",
    "overlaps",
]

_DTYPES = (*DTYPES, *COMPLEX_DTYPES)
NONFINITE = ("propagate", "skip")


def _number(value: Any) -> float | None:
    """The value of a number or of a one-element tensor on the CPU; None for a tensor elsewhere, which is not read."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"expected one element, got a tensor of shape {tuple(value.shape)}")
        return float(value) if value.device.type == "cpu" else None
    return float(value)


_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum", "alpha", "lr_decay", "initial_accumulator_value")


def check_hyperparameters(where: str, values: dict[str, Any]) -> None:
    """betas must be in [0, 1), dampening a number, what ``_NOT_NEGATIVE`` names >= 0. Absent keys are not checked."""
    for name in _NOT_NEGATIVE:
        if name in values:
            number = _number(values[name])
            if number is not None and not number >= 0.0:
                raise ValueError(f"{where}: got {name}={values[name]}, expected a number >= 0; pass a valid {name}")
    if math.isnan(_number(values.get("dampening", 0.0)) or 0.0):
        raise ValueError(f"{where}: got dampening={values['dampening']}, expected a number; pass a valid dampening")
    if values.get("nesterov") and not (values.get("momentum", 0.0) > 0.0 and values.get("dampening", 0.0) == 0.0):
        raise ValueError(
            f"{where}: got nesterov=True with momentum={values.get('momentum', 0.0)} and "
            f"dampening={values.get('dampening', 0.0)}, expected a momentum > 0 and no dampening; pass momentum=0.9"
        )
    if "betas" in values:
        betas = values["betas"]
        if len(betas) != 2:
            raise ValueError(f"{where}: got betas={betas}, expected two numbers; pass betas=(beta1, beta2)")
        if isinstance(betas[0], torch.Tensor) != isinstance(betas[1], torch.Tensor):
            raise ValueError(f"{where}: got betas={betas}, expected two floats or two tensors; make both alike")
        for i, beta in enumerate(betas):
            number = _number(beta)
            if number is not None and not 0.0 <= number < 1.0:
                raise ValueError(
                    f"{where}: got betas[{i}]={beta}, expected a number in [0, 1); pass a valid beta{i + 1}"
                )
    _check_implementation(where, values)


def _check_implementation(where: str, values: dict[str, Any]) -> None:
    """torch's choices between implementations: those that it refuses, with its types of exceptions."""
    if values.get("fused") and values.get("foreach"):
        raise RuntimeError(f"{where}: got fused=True and foreach=True, expected one of them; leave one out")
    if values.get("differentiable"):
        error = RuntimeError if values.get("fused") else ValueError
        raise error(
            f"{where}: got differentiable=True, expected False: the fused kernels have no such mode; "
            "use torch.optim for differentiable"
        )


def check_clipping(where: str, max_grad_norm: Any, norm_type: Any, max_grad_value: Any, nonfinite: Any) -> None:
    """The keyword-only additions to torch's signatures."""
    for name, value in (("max_grad_norm", max_grad_norm), ("max_grad_value", max_grad_value)):
        if value is not None and not float(value) > 0.0:
            raise ValueError(f"{where}: got {name}={value}, expected a number > 0; pass None to switch it off")
    if math.isnan(float(norm_type)) or float(norm_type) not in NORM_TYPES:
        raise ValueError(f"{where}: got norm_type={norm_type}, expected 1, 2 or inf; use torch.nn.utils for others")
    if nonfinite not in NONFINITE:
        raise ValueError(f"{where}: got nonfinite={nonfinite!r}, expected one of {NONFINITE}; choose one of them")


def check_norm_reduce(where: str, norm_reduce: Any) -> Any:
    """As it is; TypeError if it cannot be called."""
    if norm_reduce is not None and not callable(norm_reduce):
        raise TypeError(
            f"{where}: norm_reduce is a {type(norm_reduce).__name__}, expected a function of (sums, op); pass "
            "functools.partial(torch.distributed.all_reduce, group=…)"
        )
    return norm_reduce


def check_complex_clipping(where: str, max_grad_value: float | None, norm_type: float | None) -> None:
    """TypeError and ValueError for what complex gradients cannot have: limits, and norms other than of order 2.

    Only that norm is the same of the numbers as of their real and imaginary parts. norm_type: None where none is taken.
    """
    if max_grad_value is not None:
        raise TypeError(
            f"{where}: got max_grad_value={max_grad_value} and complex gradients, expected real ones: complex numbers "
            "have no order; pass torch.view_as_real of parameters or gradients to clamp real and imaginary parts"
        )
    if norm_type not in (None, 2.0):
        raise ValueError(
            f"{where}: got norm_type={norm_type} and complex gradients, expected norm_type=2; use that, or "
            "torch.nn.utils for others"
        )


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory. Exact for every layout that indexing, transposing or expand can make."""
    span = 1  # of memory, in elements, that the dimensions so far reach
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if size == 0:
            return False
        if stride < span:
            return True
        span += (size - 1) * stride
    return False


def check_dense(where: str, tensor: Any, written: bool = True) -> None:
    """A dense tensor of a supported dtype; if it is written, each element in memory of its own."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{where} is a {type(tensor).__name__}, expected a torch.Tensor; pass tensors such as model.parameters()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{where} has layout {tensor.layout}, expected a dense tensor; use torch.optim.SparseAdam")
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"{where} has dtype {name}, expected one of {', '.join(_DTYPES)}; leave it out or convert it")
    if tensor.numel() and not tensor.data_ptr():
        raise TypeError(
            f"{where} is a {type(tensor).__name__} on '{tensor.device}' without memory of its own, expected a plain "
            "tensor with data; of a sharded one (DTensor) pass its .to_local(), or use an optimizer's step, of "
            "fusedopt or torch.optim"
        )
    if written and overlaps(tensor):
        raise ValueError(
            f"{where} has strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected elements that do not "
            "share memory; pass the tensor that was expanded, or a .clone()"
        )


def check_param(where: str, param: Any, sharded: bool = False) -> None:
    """As ``check_dense``, and a leaf. sharded: a DTensor will do, if it holds no partial sums (else ValueError)."""
    if sharded and is_sharded(param):
        check_spread(where, param)
        check_dense(where, local_of(param))
    else:
        check_dense(where, param)
    if not (param.is_leaf or param.retains_grad):
        raise ValueError(f"{where} is not a leaf, expected a leaf tensor; pass the tensor that it was computed from")


def check_params(where: str, params: Iterable[Any], sharded: bool = False) -> None:
    """Every one of them, as ``check_param``, and none twice."""
    seen: dict[int, int] = {}
    for i, param in enumerate(params):
        check_param(f"{where}[{i}]", param, sharded)
        if id(param) in seen:
            raise ValueError(
                f"{where}[{i}] is the same parameter as {where}[{seen[id(param)]}], expected each once; "
                "remove the second one (tied weights are listed once by model.parameters())"
            )
        seen[id(param)] = i


def check_grad(where: str, grad: torch.Tensor, param: torch.Tensor) -> None:
    """Dense, of a supported dtype that fits the parameter's, and of the parameter's shape and device."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{where} has layout {grad.layout}, expected a dense gradient; "
            "use torch.optim.SparseAdam, or build the embedding with sparse=False"
        )
    name = str(grad.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"{where} has dtype {name}, expected one of {', '.join(_DTYPES)}; convert it")
    if (grad.is_complex() or param.is_complex()) and grad.dtype != param.dtype:
        raise TypeError(
            f"{where} has dtype {name}, expected the parameter's {str(param.dtype).removeprefix('torch.')}: complex "
            "gradients and complex parameters go together; convert the gradient"
        )
    if (grad.dtype == torch.float64) != (param.dtype == torch.float64):
        raise TypeError(
            f"{where} has dtype {name}, expected {'float64' if param.dtype == torch.float64 else 'a lower precision'} "
            f"beside a parameter of dtype {str(param.dtype).removeprefix('torch.')}; convert the gradient"
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{where} has shape {tuple(grad.shape)}, expected the parameter's {tuple(param.shape)}; "
            "assign a gradient of the parameter's shape"
        )
    if grad.device != param.device:
        raise ValueError(f"{where} is on {grad.device}, expected the parameter's {param.device}; move it there")
