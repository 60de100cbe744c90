"""The step that is like the one before it, which most are: no more of the host's time than reading and launching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import optimizer as torch_optimizer

from ..backends import asked

if TYPE_CHECKING:
    from .. import _C, passes
    from .base import FusedOptimizer
    from .plan import OptimizerPlan

__all__ = ["Repetition"]

_GIVEN = ("grad_scale", "found_inf", "_nonfinite_found")
"""Attributes by which scalers speak to one step."""


class Repetition:
    """Of a step on one GPU without scalers, accumulation, hooks or a profiler, all of which take the long way."""

    __slots__ = ("_asked", "_device", "_native", "_scalars")

    def __init__(self, native: _C.RepeatedStep, scalars: passes.StepScalars, device: int, asked: tuple) -> None:
        """asked: for which backend; see ``backends.asked``."""
        self._native, self._scalars, self._device, self._asked = native, scalars, device, asked

    @classmethod
    def of(
        cls, optimizer: FusedOptimizer, plan: OptimizerPlan, scalars: passes.StepScalars, names: tuple[str, ...]
    ) -> Repetition | None:
        """Of the step that has just been made; None if it cannot be repeated."""
        make = getattr(plan.tables[0].backend, "repeated_step", None)
        if make is None or len(plan.tables) > 1 or plan.copies or scalars is not optimizer._scalars:
            return None
        native = make(plan.tables[0], plan.watch, names)
        return native and cls(native, scalars, plan.tables[0].device.index, asked(optimizer._backend))

    def serves(self, scalars: passes.StepScalars) -> bool:
        """Whether it repeats a step that is told this."""
        return self._scalars is scalars

    def run(self, optimizer: FusedOptimizer) -> bool:
        """Makes the step. False, with nothing done, if this one is different."""
        given = optimizer.__dict__
        if not self.serves(optimizer._scalars) or optimizer._accumulator is not None or _is_observed(given):
            return False
        if any(name in given for name in _GIVEN) or asked(given["_backend"]) != self._asked:
            return False
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        return self._native.run(optimizer.param_groups, optimizer.state, stream)


def _is_observed(given: dict[str, Any]) -> bool:
    """Whether somebody wants to be told of the step: hooks of this optimizer, hooks of all, a profiler."""
    return bool(
        given["_optimizer_step_pre_hooks"]
        or given["_optimizer_step_post_hooks"]
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or torch.autograd._profiler_enabled()
    )
