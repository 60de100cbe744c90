"""The step that is like the one before it, which most are: no more of the host's time than reading and launching."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim import optimizer as torch_optimizer

from .. import _C, backends

if TYPE_CHECKING:
    from .. import passes
    from .base import FusedOptimizer
    from .plan import OptimizerPlan

__all__ = ["repetition_of"]


def repetition_of(
    optimizer: FusedOptimizer, plan: OptimizerPlan, scalars: passes.StepScalars, names: tuple[str, ...]
) -> _C.RepeatedStep | None:
    """Of the step of these passes that has just been made, if it was on one GPU, without scalers or accumulation.

    Its ``run(optimizer.__dict__)`` makes the next one and returns True; or it does nothing and returns False because
    that one is different, asks for another backend, or because hooks or a profiler want to be told of it.
    """
    if len(plan.tables) > 1 or plan.copies or scalars is not optimizer._scalars:
        return None
    tables = plan.tables[0]
    launches_of = getattr(tables.backend, "launches", None)
    if launches_of is None or not _C.has_torch_functions() or not all(bucket.capacity for bucket in tables.buckets):
        return None
    hooks = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
    step = _C.RepeatedStep(
        plan.watch,
        scalars,
        hooks,
        torch.autograd._profiler_enabled,
        torch._C._cuda_getCurrentRawStream,
        tables.device.index,
        optimizer._backend,
        backends.context_backend,
    )
    for launch in launches_of(tables, names):
        step.add(*launch)
    return step
