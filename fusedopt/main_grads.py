"""Main gradients, the sums that a :class:`fusedopt.GradAccumulator` keeps, and the plan of the pass that adds."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import _C, passes
from .backends import for_device
from .checks import check_dense, check_grad
from .plan import Bucket, DeviceTables, TensorRow, build_tables, dtype_code, like_parameter, same_layout
from .sharding import is_sharded, local_grad, local_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["AccumulatePlan", "MainGrad", "check_grads", "make_main_grads"]

_ALIGNMENT = 256
"""Bytes at whose multiples main gradients begin."""


@dataclass
class MainGrad:
    """Of one parameter."""

    buffer: torch.Tensor
    tensor: torch.Tensor
    """A part of ``buffer``, in the parameter's shape and, if that is dense, layout; of a DTensor its local tensor's."""
    strides: tuple[int, ...]
    """Of the parameter, or of its local tensor."""
    held: _C.Held
    """Whether it holds anything; shared with the optimizer's plan."""
    grad_dtype: torch.dtype | None = None
    """Of the gradients seen last; None before the first."""

    def fits(self, param: torch.Tensor) -> bool:
        """Whether the parameter is as it was when this was made."""
        param = local_of(param)
        alike = self.tensor.shape == param.shape and self.strides == param.stride()
        same_kind = _main_dtype(param, torch.float32) == _main_dtype(self.tensor, torch.float32)
        return alike and same_kind and self.tensor.device == param.device

    def check(self, where: str, param: torch.Tensor) -> None:
        """ValueError where the parameter has changed while this holds something."""
        if self.held.value and not self.fits(param):
            param = local_of(param)
            was, now = (
                f"shape {tuple(tensor.shape)}, strides {strides}, dtype {tensor.dtype}, on {tensor.device}"
                for tensor, strides in ((self.tensor, self.strides), (param, param.stride()))
            )
            raise ValueError(
                f"{where}: got a parameter of {now}, beside a main gradient for {was}, expected no change while "
                "gradients are accumulated; call GradAccumulator.reset() before a parameter is moved or resized"
            )


def _main_dtype(param: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of the main gradient: that of float64 and complex parameters, else ``dtype``."""
    return param.dtype if param.dtype == torch.float64 or param.is_complex() else dtype


def make_main_grads(
    params: Iterable[torch.Tensor], dtype: torch.dtype, epoch: _C.Epoch
) -> dict[torch.Tensor, MainGrad]:
    """Zeros, in one buffer of real numbers for each device and dtype: float64, float32 for complex64, else ``dtype``.

    epoch: of the accumulator; to advance it empties all of its main gradients.
    """
    by_buffer: dict[tuple[torch.device, torch.dtype], dict[torch.Tensor, None]] = {}
    for param in params:
        local = local_of(param)
        by_buffer.setdefault((local.device, _main_dtype(param, dtype).to_real()), {})[param] = None
    made = {}
    for (device, wide), own in by_buffer.items():
        step = _ALIGNMENT // wide.itemsize
        starts, locals_ = [0], [local_of(param) for param in own]
        for local in locals_:
            numel = 2 * local.numel() if local.is_complex() else local.numel()
            starts.append(starts[-1] + -(-numel // step) * step)
        buffer = torch.zeros(starts[-1], dtype=wide, device=device)
        for param, local, start, end in zip(own, locals_, starts, starts[1:]):
            strides = torch.empty_like(local, device="meta").stride()
            part = buffer[start:end]
            if local.is_complex():
                part = torch.view_as_complex(part.view(-1, 2))
            made[param] = MainGrad(buffer, part.as_strided(local.shape, strides), local.stride(), _C.Held(epoch))
    return made


_NO_STATE: dict[torch.Tensor, dict[str, Any]] = {}


@dataclass
class AccumulatePlan:
    """Tables and watch of the accumulate pass. Valid until ``refresh`` says otherwise."""

    tables: list[DeviceTables]
    watch: _C.Watch
    groups: list[dict[str, Any]]
    """What the watch compares the parameters with."""
    backend: str | None = None
    """What was asked for when the tables were built; see ``backends.wanted``."""
    rows: list[tuple[torch.Tensor, MainGrad | None, Bucket | None, int]] = field(default_factory=list)
    """Parameter, main gradient, and where its gradient's address goes."""
    staged: list[torch.Tensor] = field(default_factory=list)
    """Gradients of the micro-batch under way that had to be laid out as their parameter."""

    @classmethod
    def make(
        cls, params: Sequence[torch.Tensor], mains: Sequence[MainGrad | None], backend: str | None = None
    ) -> AccumulatePlan:
        """params: all that may get gradients; mains: their main gradients, None for those without a gradient so far.

        backend: as ``for_device``.
        """
        active = []
        for param, main in zip(params, mains):
            if main and param.grad is not None:
                main.grad_dtype = param.grad.dtype
            if main and main.grad_dtype:
                active.append((param, main, main.grad_dtype))
        rows = [
            TensorRow(main.tensor.numel(), main.tensor.device, dtype, main_grad=main.tensor)
            for _, main, dtype in active
        ]
        tables, places = build_tables(rows, functools.partial(for_device, backend=backend))
        passes.prepare(tables)
        found = {param: place for (param, _, _), place in zip(active, places)}
        plan = cls(tables, _C.Watch(), [{"params": params}], backend)
        for param, main in zip(params, mains):
            plan._add(param, main, *found.get(param, (None, -1)))
        plan.watch.remember_state(_NO_STATE)
        return plan

    def _add(self, param: torch.Tensor, main: MainGrad | None, bucket: Bucket | None, slot: int) -> None:
        local = local_of(param)
        self.watch.add(
            param,
            main.tensor if main else local,
            0,
            dtype_code(main.grad_dtype) if bucket and main and main.grad_dtype else -1,
            bucket.table if bucket else None,
            slot,
            False,
            main.held if bucket and main else None,
            None if local is param else local,
        )
        self.rows.append((param, main, bucket, slot))

    def refresh(self, params: list[torch.Tensor]) -> bool:
        """Finds the gradients. False if the plan is out of date."""
        relayout: list[int] = []
        self.staged.clear()
        self.groups[0]["params"] = params
        if not self.watch.refresh(self.groups, _NO_STATE, relayout):
            return False
        for i in relayout:
            param, main, bucket, slot = self.rows[i]
            assert param.grad is not None and main is not None and bucket is not None  # the watch has seen them
            grad = self._local_grad(i, param) if is_sharded(param) else param.grad.detach()
            if not same_layout(grad, main.tensor):
                grad = like_parameter(grad, main.tensor)
            self.staged.append(grad)
            bucket.table.set_grad(slot, grad.data_ptr() or 2)
        return True

    def _local_grad(self, row: int, param: DTensor) -> torch.Tensor:
        """Of a DTensor, what the watch could not read; it can the next one, if this one lies as the parameter does."""
        grad = param.grad
        assert grad is not None  # the watch has seen it
        local = local_grad(f"GradAccumulator.accumulate: params[{row}].grad", grad, param)
        if is_sharded(grad) and local is local_of(grad):
            self.watch.know_spec(row, grad._spec)
        return local

    def run(self, weight: float | torch.Tensor) -> None:
        """Adds up, and frees the gradients."""
        passes.begin(self.tables, passes.StepScalars(grad_weight=weight), ("accumulate",))
        passes.accumulate(self.tables)
        self.watch.hold()
        self.watch.drop_grads()
        self.staged.clear()


def check_grads(where: str, params: Sequence[torch.Tensor]) -> None:
    """Parameters with memory of their own, gradients that fit. Raises as ``check_dense`` and ``check_grad``."""
    for i, param in enumerate(params):
        check_dense(f"{where}: params[{i}]", local_of(param))
        if param.grad is not None:
            check_grad(f"{where}: params[{i}].grad", param.grad, param)
