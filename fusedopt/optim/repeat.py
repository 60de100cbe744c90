"""The step that is like the one before it, which most are: no more of the host's time than reading and launching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import optimizer as torch_optimizer

from .. import _C, passes
from ..backends import context_backend
from .processes import processes_of

if TYPE_CHECKING:
    from ..plan import DeviceTables
    from ..sharding import Gathering
    from ..tensor_norms import TensorNorms
    from .base import Accumulator, FusedOptimizer
    from .plan import OptimizerPlan

__all__ = ["repetition_of"]


def repetition_of(
    optimizer: FusedOptimizer, plan: OptimizerPlan, names: tuple[str, ...], reports: bool
) -> _C.RepeatedStep | None:
    """Of the step of these passes that has just been made, if it was on one device.

    A norm that is taken with other processes is too: its exchange is a call into Python between launches.

    Its ``run(optimizer.__dict__)`` makes the next one and returns True; or it does nothing and returns False because
    that one is different, asks for another backend, or because hooks or a profiler want to be told of it. A scaler's
    ``grad_scale`` and ``found_inf`` may be there or not, and be other tensors each time; of an accumulator the number
    may differ that divides its sum.

    reports: whether ``fusedopt.GradScaler`` was told what the norm pass found.
    """
    if plan.copies or plan.lanes or not _C.has_torch_functions() or len({each.device for each in plan.tables}) > 1:
        return None
    processes = processes_of(optimizer, plan) if "norm" in names else None
    accumulator, has_own_grads = optimizer._accumulator, plan.watch.has_grads()
    divisor = None if accumulator is None else partial(_divisor, accumulator, has_own_grads)
    if divisor is not None and divisor() is None:
        return None
    tables, norms, gathering = plan.tables[0], plan.norms, None
    if "norm" in names and (processes is not None or len(plan.tables) > 1):
        gathering = passes.gathering(plan.tables, optimizer._scalars.norm_type, processes)
    launches = _launches(plan.tables, names)
    if gathering is not None or norms or len(plan.tables) > 1:
        repeat = partial(_run_with_others, plan.tables, names, gathering, norms)
    else:
        repeat = partial(getattr(tables.backend, "repeat", _run_passes), tables, names)
    step = _C.RepeatedStep(
        watch=plan.watch,
        hypers=[hypers for each in plan.tables for hypers in each.hypers.values()],
        args=[bucket.args for each in plan.tables for bucket in each.buckets],
        finding=(tables.device, tables.control.norm_found_inf),
        scalars=optimizer._scalars,
        hooks=(torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks),
        backend=optimizer._backend,
        context_backend=context_backend,
        reports=reports,
        accumulator=accumulator,
        divisor=divisor,
        has_own_grads=has_own_grads,
        run_passes=torch.compiler.disable(repeat) if launches is None else None,
    )
    if launches is not None:  # on a GPU
        step.launch_on(torch._C._cuda_getCurrentRawStream, tables.device.index)
        _add_launches(step, plan.tables, launches, gathering, norms)
    return step


_UPDATE = ("measure", "update")
"""What the last pass of a step is made of, as far as its rules need it."""

Launches = list[tuple[Any, ...]]
"""Each as ``_C.RepeatedStep.add`` takes it."""


def _launches(tables: list[DeviceTables], names: tuple[str, ...]) -> dict[str, Launches] | None:
    """By pass, in their order, on all tables of one device.

    None where the backend cannot tell, or the step did more than launch.
    """
    if not hasattr(tables[0].backend, "launches"):
        return None
    by_pass = {name: [each.backend.launches(each, (name,)) for each in tables] for name in (*names[:-1], *_UPDATE)}
    if any(launches is None for of_pass in by_pass.values() for launches in of_pass):
        return None
    return {name: list(chain.from_iterable(of_pass)) for name, of_pass in by_pass.items()}


def _add_launches(
    step: _C.RepeatedStep,
    tables: list[DeviceTables],
    launches: dict[str, Launches],
    gathering: Gathering | None,
    norms: Sequence[TensorNorms],
) -> None:
    """launches: by pass. gathering: what combines the shares that the norm pass leaves; None where it finishes. norms:
    what the measure pass leaves a part of."""
    for name, of_pass in launches.items():
        for launch in of_pass:
            step.add(*launch)
        if name == "norm" and gathering is not None:
            finals = [each.backend.finalize_launch(each) for each in tables]
            step.exchange(_exchange(gathering, [args for _, _, args, *_ in finals]))
            for launch in finals:
                step.add(*launch)
        if name == "measure":
            for each in norms:
                step.exchange(torch.compiler.disable(each.add_up))


def _exchange(gathering: Gathering, finals: list[_C.PassArgs]) -> Callable[[], object]:
    """Gathers, and tells the launches that finish the norm where the result is."""

    def tell(gathered: torch.Tensor) -> None:
        for args in finals:
            args.partials, args.num_partials = gathered.data_ptr(), gathered.shape[0]

    if gathering.result is not None:
        tell(gathering.result)
        run: Callable[[], object] = torch.compiler.disable(gathering.run, recursive=False)  # which adds no call to it
        return run
    kept: list[torch.Tensor] = []

    def exchange() -> None:
        kept[:] = [gathering.run()]
        tell(kept[0])

    disabled: Callable[[], object] = torch.compiler.disable(exchange)
    return disabled


def _divisor(accumulator: Accumulator, own: bool) -> float | None:
    """Of the sum in the step under way; None where it is a tensor, or the step's own gradients have a weight but 1.

    own: whether there are any.
    """
    weight, divisor = accumulator.step_scalars(own).values()
    plain = not isinstance(weight, torch.Tensor) and not isinstance(divisor, torch.Tensor) and weight == 1.0
    return float(divisor) if plain else None


def _run_with_others(
    tables: list[DeviceTables], names: tuple[str, ...], gathering: Gathering | None, norms: Sequence[TensorNorms]
) -> None:
    """Where there are several spreads over processes, or other processes have shares in norms."""
    for each in tables:
        each.keep_alive.clear()
        each.backend.begin(each, names)
    if gathering is not None:
        passes.gather_norm(tables, gathering.run)
    passes.run_update(tables, norms)


def _run_passes(tables: DeviceTables, names: tuple[str, ...]) -> None:
    """For backends that have nothing quicker."""
    tables.backend.begin(tables, names)
    if "norm" in names:
        tables.backend.norm(tables)
    passes.run_update([tables])
