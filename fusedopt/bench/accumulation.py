"""Gradient accumulation as it is measured: contracts over several micro-batches, ours and torch's way to do them.

Gradients are in the parameters' dtype, main gradients in float32. Bytes that an element must move, with gradients of g
bytes, a parameter at rest of p with all its states, and K micro-batches:

=========================  ===================================================================================
``accumulate_first``       fold one micro-batch into main gradients that hold nothing: read g, write 4
``accumulate``             fold one micro-batch into main gradients that hold something: read g and 4, write 4
``accumulated_clip_step``  K = 4: K - 1 folds as above, then clip the total norm to 1.0 and step: the norm reads main
                           gradient and g, the update reads them again and reads and writes p
=========================  ===================================================================================

For bf16 parameters and gradients with ``split16`` masters that is 6, 10, and 6 + 10 + 10 + 6 + 30 = 62 bytes. Losses
are divided by K beforehand (``reduction="sum"``), so that nobody needs a pass for the mean.

Libraries: ``fusedopt``, with :class:`fusedopt.GradAccumulator`, and ``torch-fused``: ``torch._foreach_copy_`` and
``torch._foreach_add_`` into float32 buffers, the last micro-batch too, ``clip_grad_norm_``, ``AdamW(fused=True)`` on
float32 masters, and ``torch._foreach_copy_`` back to the parameters. With float32 parameters torch does what autograd
does: the first micro-batch's ``.grad`` is the buffer, there is neither master nor copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

import fusedopt

from . import checks
from .contracts import MAX_NORM, STATES, Case, Kept, Params, Tail, clone, cut, fusedopt_tail, gradients, torch_optimizer
from .workloads import GRAD_STD, Model, Workload

MICRO_BATCHES = 4
MAIN = torch.float32

FOLDS = ("accumulate_first", "accumulate")
CONTRACTS = (*FOLDS, "accumulated_clip_step")

LIBRARIES = ("fusedopt", "torch-fused")

HALF_ULP = torch.finfo(MAIN).eps / 2


@dataclass(frozen=True)
class AccumulationCase(Case):
    """A case of one of ``CONTRACTS``; ``optimizer`` is "none" where the contract has no step."""

    @property
    def state_bytes_per_param(self) -> int:
        """A main gradient, and the optimizer's states."""
        return MAIN.itemsize + (0 if self.contract in FOLDS else super().state_bytes_per_param)

    @property
    def bytes_per_param(self) -> int:
        first = self.layout.dtype.itemsize + MAIN.itemsize
        middle = first + MAIN.itemsize
        if self.contract in FOLDS:
            return {"accumulate_first": first, "accumulate": middle}[self.contract]
        tail = super().bytes_per_param + 2 * MAIN.itemsize  # both passes read the main gradient
        return first + (MICRO_BATCHES - 2) * middle + tail


class MicroBatches(Model):
    """A model with the gradients of several micro-batches, which are handed out as they are: nothing is copied."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        self.batches: list[list[torch.Tensor]] = []
        super().__init__(workload, dtype, device)
        self.batches = [self.gradients]
        for i in range(1, MICRO_BATCHES):
            self.batches.append([torch.empty_like(gradient) for gradient in self.gradients])
            self._fill(self.batches[i], GRAD_STD, seed=1 + i)

    def reset(self) -> None:
        super().reset()
        self._restore()

    def backward(self) -> None:
        """The gradients of the first micro-batch, whose tensors may have become somebody's buffers."""
        self._restore()
        self.give(0)

    def _restore(self) -> None:
        if self.batches:
            self._fill(self.batches[0], GRAD_STD, seed=1)

    def give(self, batch: int) -> None:
        """What the backward pass of a micro-batch leaves behind."""
        for param, gradient in zip(self.params, self.batches[batch]):
            param.grad = gradient

    def used_gradient(self, i: int, part: slice) -> torch.Tensor:
        return functools.reduce(torch.add, (cut(batch[i], part).double() for batch in self.batches))

    def gradient_error(self, i: int, part: slice) -> torch.Tensor:
        """Each of K - 1 additions rounds a partial sum by half an ulp at most."""
        sizes = functools.reduce(torch.add, (cut(batch[i], part).double().abs() for batch in self.batches))
        return sizes * ((len(self.batches) - 1) * HALF_ULP)


Mains = Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class StagedTail(Tail):
    """A tail in stages, one for each micro-batch, with work between them that is not the library's."""

    stages: tuple[Callable[[], object], ...] = ()
    before: Callable[[int], object] = lambda stage: None
    """Called with a stage's number before it: gives the gradients of its micro-batch."""
    mains: Mains = lambda: []
    """The main gradients, by parameter, of a contract without a step."""


def staged(
    before: Callable[[int], object],
    stages: tuple[Callable[[], object], ...],
    tail: Tail | None = None,
    mains: Mains = lambda: [],
) -> StagedTail:
    def run() -> None:
        for number, stage in enumerate(stages):
            before(number)
            stage()

    optimizer, read = (tail.optimizer, tail.read) if tail else (None, _nothing_kept)
    return StagedTail(optimizer, run, read, stages=stages, before=before, mains=mains)


def _nothing_kept(param: torch.nn.Parameter, part: slice) -> Kept:
    raise TypeError("a contract without a step keeps nothing of a parameter")


def build(library: str, case: AccumulationCase, model: MicroBatches) -> StagedTail:
    """The tail of one of ``LIBRARIES``."""
    builders = {"fusedopt": (_fusedopt_fold, _fusedopt_step), "torch-fused": (_torch_fold, _torch_step)}
    return builders[library][case.contract not in FOLDS](case, model)


# ---------------------------------------------------------------------------------------------------------- fusedopt


def _fusedopt_fold(case: AccumulationCase, model: MicroBatches) -> StagedTail:
    accumulator = fusedopt.GradAccumulator(model.params, MAIN, reduction="sum")
    first = case.contract == "accumulate_first"

    def before(stage: int) -> None:
        if first:
            accumulator.reset()
        model.give(0)

    model.give(1)
    accumulator.accumulate()  # what the first fold must overwrite, and the others add to
    return staged(before, (accumulator.accumulate,), mains=lambda: _main_grads(accumulator, model))


def _main_grads(accumulator: fusedopt.GradAccumulator, model: MicroBatches) -> list[torch.Tensor]:
    mains = [accumulator.main_grad("benchmark", param) for param in model.params]
    return [main.tensor for main in mains if main is not None]


def _fusedopt_step(case: AccumulationCase, model: MicroBatches) -> StagedTail:
    tail = fusedopt_tail(case, model.params, max_grad_norm=MAX_NORM)
    accumulator = fusedopt.GradAccumulator(tail.optimizer, MAIN, reduction="sum")
    stages = (accumulator.accumulate,) * (MICRO_BATCHES - 1) + (tail.run,)
    return staged(model.give, stages, tail)


# ------------------------------------------------------------------------------------------------------------- torch


def _taken(params: Params) -> list[torch.Tensor]:
    """The gradients, which the parameters give up."""
    given = gradients(params)
    for param in params:
        param.grad = None
    return given


def _torch_fold(case: AccumulationCase, model: MicroBatches) -> StagedTail:
    buffers = [torch.zeros_like(param, dtype=MAIN, requires_grad=False) for param in model.params]
    into = torch._foreach_copy_ if case.contract == "accumulate_first" else torch._foreach_add_
    return staged(lambda stage: model.give(0), (lambda: into(buffers, _taken(model.params)),), mains=lambda: buffers)


class _TorchAccumulation:
    """Four micro-batches in float32 with torch alone."""

    def __init__(self, case: AccumulationCase, model: MicroBatches) -> None:
        self.params = model.params
        self.has_masters = case.layout.dtype != MAIN
        self.masters, self.buffers = model.params, []
        if self.has_masters:
            self.masters = [torch.nn.Parameter(param.detach().to(MAIN)) for param in model.params]
            self.buffers = [torch.empty_like(master, requires_grad=False) for master in self.masters]
        self.optimizer = torch_optimizer(case, self.masters)
        self.master_of = dict(zip(model.params, self.masters))

    def first(self) -> None:
        gradients = _taken(self.params)
        if self.has_masters:
            torch._foreach_copy_(self.buffers, gradients)
        else:
            self.buffers = gradients  # as autograd does

    def add(self) -> None:
        torch._foreach_add_(self.buffers, _taken(self.params))

    @torch.no_grad()
    def add_and_step(self) -> None:
        self.add()
        for master, buffer in zip(self.masters, self.buffers):
            master.grad = buffer
        clip_grad_norm_(self.masters, MAX_NORM)
        self.optimizer.step()
        if self.has_masters:
            torch._foreach_copy_(self.params, self.masters)  # type: ignore[arg-type]  # lists of Parameter
        self.optimizer.zero_grad()

    def read(self, param: torch.nn.Parameter, part: slice) -> Kept:
        master = self.master_of[param]
        entry = self.optimizer.state.get(master)
        states = clone({key: cut(entry[key], part) for key in STATES["adamw"]}) if entry else {}
        return Kept(float(entry["step"]) if entry else 0, cut(master, part).clone(), states)


def _torch_step(case: AccumulationCase, model: MicroBatches) -> StagedTail:
    own = _TorchAccumulation(case, model)
    stages = (own.first, *(own.add,) * (MICRO_BATCHES - 2), own.add_and_step)
    return staged(model.give, stages, Tail(own.optimizer, own.add_and_step, own.read))


# ------------------------------------------------------------------------------------------------------------ checks


def check(case: AccumulationCase, tail: StagedTail, model: MicroBatches) -> float:
    """Largest error of the first steps, or folds, as a fraction of what rounding allows.

    Raises:
        AssertionError: an element is wrong or not finite, or gradients were kept.
    """
    worst = _check_folds(case, tail, model) if case.contract in FOLDS else checks.check(case, tail, model)
    kept = sum(param.grad is not None for param in model.params)
    if case.contract in FOLDS:  # a step leaves it to zero_grad()
        assert kept == 0, f"{case}: {kept} gradients were kept, expected none"
    return worst


def _check_folds(case: AccumulationCase, tail: StagedTail, model: MicroBatches) -> float:
    """A fold that writes is exact; one that adds rounds once."""
    worst = 0.0
    sample = {part.index for part in checks.sampled_parts(model.params, whole=False)}
    for fold in range(checks.STEPS):
        adds = case.contract == "accumulate"
        held = {i: tail.mains()[i].double() if adds else 0.0 for i in sample}
        model.backward()
        tail()
        mains = tail.mains()
        for i in sample:
            assert mains[i].dtype == MAIN, f"{case}: main gradients are {mains[i].dtype}, expected {MAIN}"
            expected = held[i] + model.batches[0][i].double()
            bound = HALF_ULP * expected.abs() + torch.finfo(MAIN).smallest_normal
            ratio = ((mains[i].double() - expected).abs() / bound).nan_to_num(nan=float("inf")).max().item()
            assert ratio <= 1, f"{case}: fold {fold}: params[{i}] is off by {ratio:.3g} times what rounding explains"
            worst = max(worst, ratio)
    return worst
