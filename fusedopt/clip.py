"""Norms, clipping and unscaling of gradients, as ``torch.nn.utils`` has them, in one or two launches.

Norms are accumulated so that they are finite whenever the gradients are and the result fits its dtype; torch sums in
the gradients' own dtype, where a float16 norm of 1e5 becomes inf.

Of DTensors the whole is meant: their norm takes one all-reduce of a few numbers over their mesh, so every process of it
must make the call. Each process' part is written in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd.graph import increment_version

from . import passes
from .backends import for_device
from .checks import check_clipping, check_complex_clipping, check_dense, check_norm_reduce
from .plan import DeviceTables, TensorRow, is_dense
from .sharding import NormReduce, check_spread, dense_local, home_of, peers_of, reduce_flag, spread_of

__all__ = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "unscale_grads_"]

_tables = passes.TablesCache()


@torch.no_grad()
def get_total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_reduce: NormReduce | None = None,
) -> torch.Tensor:
    """Norm of all elements of all tensors together.

    Args:
        tensors: any shapes, layouts and supported dtypes; DTensors without partial sums.
        norm_type: 1, 2 or inf; only 2 for complex tensors.
        error_if_nonfinite: raise RuntimeError if the norm is inf or NaN; this waits for the device.
        foreach: accepted for torch's sake.
        norm_reduce: combines the sums with processes that hold other tensors; see :class:`FusedOptimizer`.

    Returns:
        0-dim plain tensor on the first tensor's device: float64 if any tensor is that or complex128, else float32.
    """
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    check_clipping("get_total_norm", None, norm_type, None, "propagate")
    processes = _processes("get_total_norm", tensors, norm_reduce)
    if not tensors:
        return _join_norm("get_total_norm", float(norm_type), processes, error_if_nonfinite)
    scalars = passes.StepScalars(norm_type=float(norm_type))
    tables, dense = _begin("get_total_norm", tensors, scalars, ("norm",))
    total_norm = _take_norm("get_total_norm", tensors, tables, error_if_nonfinite, scalars.norm_type, processes)
    del dense  # not earlier: the pass reads these copies
    return total_norm


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_reduce: NormReduce | None = None,
) -> torch.Tensor:
    """Scales all gradients in place so that their total norm is at most ``max_norm``.

    Gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``; where that is 1 their memory is not touched.

    Args:
        parameters: whose ``.grad`` to clip; those without one are passed over. Gradients that are DTensors must hold no
            partial sums.
        max_norm: > 0.
        norm_type: 1, 2 or inf; only 2 for complex gradients.
        error_if_nonfinite: raise RuntimeError, before any gradient is written, if the norm is inf or NaN; this waits
            for the device.
        foreach: accepted for torch's sake.
        norm_reduce: as in ``get_total_norm``.

    Returns:
        The norm before clipping, a 0-dim plain tensor: float64 if any gradient is that or complex128, else float32.
    """
    check_clipping("clip_grad_norm_", max_norm, norm_type, None, "propagate")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    processes = _processes("clip_grad_norm_", parameters, norm_reduce)
    grads = _grads(parameters)
    if not grads:
        return _join_norm("clip_grad_norm_", float(norm_type), processes, error_if_nonfinite)
    scalars = passes.StepScalars(max_grad_norm=float(max_norm), norm_type=float(norm_type))
    tables, dense = _begin("clip_grad_norm_", grads, scalars, ("norm", "scale"))
    total_norm = _take_norm("clip_grad_norm_", grads, tables, error_if_nonfinite, scalars.norm_type, processes)
    passes.scale(tables)
    _write_back(grads, dense)
    return total_norm


@torch.no_grad()
def clip_grad_value_(
    parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps every gradient element to ± ``clip_value`` (> 0), in place. NaN stays NaN. TypeError for complex ones."""
    check_clipping("clip_grad_value_", None, 2.0, clip_value, "propagate")
    grads = _grads(parameters)
    if not grads:
        return
    tables, dense = _begin("clip_grad_value_", grads, passes.StepScalars(max_grad_value=float(clip_value)), ("scale",))
    passes.scale(tables)
    _write_back(grads, dense)


@torch.no_grad()
def unscale_grads_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    grad_scale: torch.Tensor | float,
    found_inf: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divides every gradient by ``grad_scale``, in place, and says whether one was inf or NaN. One pass, no waiting.

    Args:
        parameters: whose ``.grad`` to unscale.
        grad_scale: a number or a one-element tensor.
        found_inf: a one-element float32 tensor on the device of the first gradient, set to 1 if an element is inf or
            NaN and else left as it is; made if not given.

    Returns:
        ``found_inf``, 0-dim float32 on the device of the first gradient; of DTensors in all processes of their mesh.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = _grads(parameters)
    home = grads[0].device if grads else torch.device("cpu")
    if found_inf is None:
        found_inf = torch.zeros((), dtype=torch.float32, device=home)
    if found_inf.dtype != torch.float32 or found_inf.numel() != 1 or (grads and found_inf.device != home):
        raise ValueError(
            f"unscale_grads_: found_inf is {found_inf.dtype} of shape {tuple(found_inf.shape)} on {found_inf.device}, "
            f"expected one float32 element on {home}; pass torch.zeros((), device=grad.device)"
        )
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, own in by_device.items():
        flag = found_inf if device == home else torch.zeros((), dtype=torch.float32, device=device)
        scalars = passes.StepScalars(grad_scale=grad_scale)
        tables, dense = _begin("unscale_grads_", own, scalars, ("scale",), out=flag.data_ptr())
        passes.scale(tables)
        _write_back(own, dense)
        if flag is not found_inf:
            found_inf.copy_(torch.maximum(found_inf, flag.to(home).reshape(found_inf.shape)))
    reduce_flag(found_inf, peers_of(parameters))
    return found_inf


# ---- what they share ----------------------------------------------------------------------------------------


def _grads(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    return [param.grad for param in parameters if param.grad is not None]


def _processes(where: str, tensors: Sequence[torch.Tensor], norm_reduce: NormReduce | None) -> passes.Processes | None:
    """With which others the norm is taken; None where there are none."""
    peers = peers_of(tensors)
    if not peers and check_norm_reduce(where, norm_reduce) is None:
        return None
    return passes.Processes(peers, norm_reduce)


def _join_norm(
    where: str, norm_type: float, processes: passes.Processes | None, error_if_nonfinite: bool
) -> torch.Tensor:
    """The norm where this process has nothing of it."""
    if processes is None:
        return torch.tensor(0.0)
    total = passes.join_norm(home_of([]), norm_type, processes)
    return _checked_norm(where, total, error_if_nonfinite)


def _begin(
    where: str, tensors: Sequence[torch.Tensor], scalars: passes.StepScalars, which: tuple[str, ...], out: int = 0
) -> tuple[list[DeviceTables], list[torch.Tensor]]:
    """Tables over the tensors, ready for the passes, and the dense tensors (copies of those with gaps) they hold."""
    spreads = [spread_of(tensor) for tensor in tensors]
    for i, tensor in enumerate(tensors):
        check_spread(f"{where}: tensor {i}", tensor)
    tensors = [dense_local(tensor) for tensor in tensors]
    for i, tensor in enumerate(tensors):
        check_dense(f"{where}: tensor {i}", tensor, written="scale" in which)
    if any(tensor.is_complex() for tensor in tensors):
        check_complex_clipping(where, scalars.max_grad_value, scalars.norm_type if "norm" in which else None)
    for device in {tensor.device for tensor in tensors}:
        for_device(device)
    dense = [t if is_dense(t) else torch.empty_like(t, requires_grad=False).copy_(t) for t in tensors]
    rows = [TensorRow(t.numel(), t.device, t.dtype, spread=spread) for t, spread in zip(dense, spreads)]
    tables, places = _tables.get(rows)
    for (bucket, slot), tensor in zip(places, dense):
        bucket.table.set_grad(slot, tensor.data_ptr() or 2)
    passes.begin(tables, scalars, which, nonfinite_out=out)
    return tables, dense


def _take_norm(
    where: str,
    tensors: Sequence[torch.Tensor],
    tables: Sequence[DeviceTables],
    error_if_nonfinite: bool,
    norm_type: float,
    processes: passes.Processes | None,
) -> torch.Tensor:
    passes.norm(tables, norm_type, processes)
    control = next(table.control for table in tables if table.device == tensors[0].device)
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return _checked_norm(where, (control.total_norm64 if wide else control.total_norm).clone(), error_if_nonfinite)


def _checked_norm(where: str, total_norm: torch.Tensor, error_if_nonfinite: bool) -> torch.Tensor:
    if error_if_nonfinite and not torch.isfinite(total_norm):
        raise RuntimeError(
            f"{where}: the total norm is {float(total_norm)}, expected a finite one; "
            "look for the cause, or pass error_if_nonfinite=False to clip by it all the same"
        )
    return total_norm


def _write_back(tensors: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> None:
    locals_ = [dense_local(tensor) for tensor in tensors]
    for local, used in zip(locals_, dense):
        if used is not local:
            local.copy_(used)
    increment_version([*tensors, *(local for local, tensor in zip(locals_, tensors) if local is not tensor)])
