"""Runs passes over the tables of all devices: what the optimizers and the functions have in common."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import _C
from .backends import for_device, wanted
from .plan import Bucket, DeviceTables, TensorRow, build_tables
from .sharding import Gathering, NormReduce, Peers, reduce_norm
from .specs import NORM_TYPES
from .tensor_norms import TensorNorms

__all__ = [
    "Processes",
    "StepScalars",
    "TablesCache",
    "accumulate",
    "begin",
    "gather_norm",
    "gathering",
    "join_norm",
    "norm",
    "prepare",
    "run_update",
    "scale",
]


_INFINITY = float("inf")


class StepScalars(NamedTuple):
    """What a step is told besides tensors.

    grad_scale: divides the gradients; 0-dim or one-element float32 tensor, any device, or a number.
    found_inf: non-zero makes the step the identity; like ``grad_scale``.
    clip_coef: multiplies the gradients; ignored where the norm pass computes it.
    max_grad_value: bound of each unscaled element, or None.
    max_grad_norm, norm_type: of the norm pass; None takes the norm without clipping.
    skip_nonfinite: whether the norm pass makes the step the identity if it meets inf or NaN.
    grad_weight, grad_divisor: where gradients are accumulated, the gradient is (main gradient + weight * .grad) /
        divisor; numbers, or tensors like ``grad_scale``.
    """

    grad_scale: torch.Tensor | float | None = None
    found_inf: torch.Tensor | float | None = None
    clip_coef: torch.Tensor | float | None = None
    max_grad_value: float | None = None
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    skip_nonfinite: bool = False
    grad_weight: torch.Tensor | float = 1.0
    grad_divisor: torch.Tensor | float = 1.0


def _address(value: torch.Tensor | float | None, tables: DeviceTables, dtype: torch.dtype = torch.float32) -> int:
    """Where a scalar stands on the tables' device; 0 for None."""
    if value is None:
        return 0
    if not isinstance(value, torch.Tensor):
        value = torch.full((), float(value), dtype=dtype, device=tables.device)
    return tables.scalar(value, dtype).data_ptr()


def _number(value: torch.Tensor | float, tables: DeviceTables) -> tuple[float, int]:
    """A scalar as a number and, where it is a tensor, its address on the tables' device."""
    return (1.0, _address(value, tables)) if isinstance(value, torch.Tensor) else (float(value), 0)


def prepare(tables: Sequence[DeviceTables]) -> None:
    """Puts new tables where each device's passes read them."""
    for device in tables:
        device.backend.prepare(device)


def begin(
    tables: Sequence[DeviceTables],
    scalars: StepScalars,
    passes: tuple[str, ...],
    groups: Sequence[dict[str, Any]] = (),
    nonfinite_out: int = 0,
) -> None:
    """Gets every device ready for ``passes``; whatever can fail fails here.

    groups: param groups, whose hyper-parameters the update pass needs. nonfinite_out: address of the float32 that the
    scale pass sets to 1 if it meets inf or NaN; 0 for none.
    """
    for device in tables:
        device.keep_alive.clear()
        device.pack_hypers(groups)
        if _already_told(device, (scalars, passes, nonfinite_out)):
            device.backend.begin(device, passes)
            continue
        if "norm" in passes:
            clip_coef, norm_found_inf = device.control.clip_coef_address, device.control.norm_found_inf_address
        else:
            clip_coef, norm_found_inf = _address(scalars.clip_coef, device, torch.float64), 0
        for args, weight, divisor in _accumulation(device, scalars):
            _C.set_scalars(
                args,
                _address(scalars.grad_scale, device),
                _address(scalars.found_inf, device),
                clip_coef,
                norm_found_inf,
                _INFINITY if scalars.max_grad_value is None else scalars.max_grad_value,
                _INFINITY if scalars.max_grad_norm is None else scalars.max_grad_norm,
                NORM_TYPES[scalars.norm_type][1],
                scalars.skip_nonfinite,
                nonfinite_out,
                *_number(weight, device),
                *_number(divisor, device),
            )
        device.backend.begin(device, passes)


def _accumulation(
    device: DeviceTables, scalars: StepScalars
) -> list[tuple[list[_C.PassArgs], torch.Tensor | float, Any]]:
    """Weight and divisor of every bucket. Kernels that know no main gradient know no weight: they divide by less."""
    weight, divisor = scalars.grad_weight, scalars.grad_divisor
    every = [bucket.args for bucket in device.buckets]
    if not isinstance(weight, torch.Tensor) and weight == 1.0:
        return [(every, 1.0, divisor)]
    with_main = [bucket.args for bucket in device.buckets if bucket.main_dtype is not None]
    if len(with_main) == len(every):
        return [(every, weight, divisor)]
    without = [bucket.args for bucket in device.buckets if bucket.main_dtype is None]
    alone = divisor / weight if isinstance(weight, torch.Tensor) or weight else _INFINITY
    return [(with_main, weight, divisor), (without, 1.0, alone)]


def _already_told(device: DeviceTables, told: tuple[StepScalars, tuple[str, ...], int]) -> bool:
    """Whether the device's passes were given just this before: most steps of a loop are alike."""
    scalars = told[0]
    tensors = (*scalars[:3], *(value for value in scalars[-2:] if isinstance(value, torch.Tensor)))
    if any(value is not None for value in tensors):  # they may change
        device.told = None
        return False
    if device.told == told:
        return True
    device.told = told
    return False


class Processes(NamedTuple):
    """With which other processes a norm is taken."""

    peers: Sequence[Peers] = ()
    """Of all tensors, with gradients or without: see ``sharding.reduce_norm``."""
    hook: NormReduce | None = None


def gathering(tables: Sequence[DeviceTables], norm_type: float, processes: Processes | None) -> Gathering:
    """What combines the tables' shares in the norm, for ``gather_norm``, as often as is wanted."""
    shares = [(device.spread, device.control.local_sums) for device in tables]
    return Gathering.of(shares, *(processes or Processes()), norm_type, tables[0].device)


def norm(tables: Sequence[DeviceTables], norm_type: float = 2.0, processes: Processes | None = None) -> None:
    """The total norm over all devices into the ``control`` of each. Waits for nothing if all devices are GPUs.

    processes: where other processes have shares in it.
    """
    if len(tables) == 1 and processes is None:
        tables[0].backend.norm(tables[0], finalize=True)
        return
    gather_norm(tables, gathering(tables, norm_type, processes).run)


def gather_norm(tables: Sequence[DeviceTables], gather: Callable[[], torch.Tensor]) -> None:
    """The total norm over all devices and processes into the ``control`` of each. gather: see ``gathering``."""
    for device in tables:
        device.backend.norm(device, finalize=False)
    gathered = gather()
    for device in tables:
        here = gathered.to(device.device)
        device.keep_alive.append(here)
        device.backend.finalize_norm(device, here)


def join_norm(device: torch.device, norm_type: float, processes: Processes) -> torch.Tensor:
    """The part in other processes' norm of one that has no gradient itself; returns their norm, 0-dim float32.

    device: where processes communicate.
    """
    sums = reduce_norm((), *processes, norm_type, device)[:, 0]
    total = sums.max() if norm_type == _INFINITY else sums.sum()
    return (total.sqrt() if norm_type == 2.0 else total).float()


def run_update(tables: Sequence[DeviceTables], norms: Sequence[TensorNorms] = ()) -> None:
    """The update pass on every device, of rules of two phases both.

    norms: of tensors that have parts in other processes, which are waited for between the phases.
    """
    for device in tables:
        if device.measures:
            device.backend.measure(device)
    for each in norms:
        each.add_up()
    for device in tables:
        device.backend.update(device)


def accumulate(tables: Sequence[DeviceTables]) -> None:
    """Every gradient added to its main gradient, or written there where that holds nothing."""
    for device in tables:
        device.backend.accumulate(device)


def scale(tables: Sequence[DeviceTables]) -> None:
    """The gradients of every device, multiplied and clamped in place."""
    for device in tables:
        device.backend.scale(device)


class TablesCache:
    """The tables of the last calls, for functions, which have nowhere of their own to keep them.

    The key is all that tables are made of (addresses, sizes, dtypes, devices, the backend), so what is found is right
    whoever owns the memory now. One cache serves one thread at a time, hence the thread-local storage.
    """

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = capacity
        self.local = threading.local()

    def get(self, rows: Sequence[TensorRow]) -> tuple[list[DeviceTables], list[tuple[Bucket, int]]]:
        """As ``build_tables``, with the backends' ``prepare`` done."""
        entries: OrderedDict[tuple[Any, ...], tuple[list[DeviceTables], list[tuple[Bucket, int]]]] = (
            self.local.__dict__.setdefault("entries", OrderedDict())
        )
        key = (wanted(), *(self._key(row) for row in rows))
        found = entries.pop(key, None)
        if found is None:
            found = build_tables(rows, for_device)
            prepare(found[0])
            if len(entries) >= self.capacity:
                entries.popitem(last=False)
        entries[key] = found
        return found

    @staticmethod
    def _key(row: TensorRow) -> tuple[Any, ...]:
        return (row.device, row.spread, row.numel, row.key, *(tensor.data_ptr() for tensor in row.tensors))
