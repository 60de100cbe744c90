"""The results of a step as numbers on the host, fetched without making the training loop wait for the device."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..control import Control

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["Fetches", "StepMetrics", "fetch", "wait"]

_SLOTS = 8  # fetches under way at a time: how far the host may run ahead of the device before some are left out


@dataclass(frozen=True)
class StepMetrics:
    """What a step did."""

    step: int
    """Calls of ``step()`` since the optimizer was made, skipped ones included. Replays of CUDA graphs do not count."""
    grad_norm: float
    """Total norm of the unscaled gradients before clipping; NaN if the step took none."""
    clip_coef: float
    """What the gradients were multiplied by to clip their norm; 1 if the step took none."""
    found_inf: bool
    """Whether the norm was inf or NaN, or a scaler or ``nonfinite="skip"`` found such an element."""
    skipped: bool
    """Whether the step changed nothing because of that."""
    skipped_steps: int
    """How many steps were skipped since the optimizer was made; skipped replays of CUDA graphs count."""
    lr: tuple[float, ...]
    """Learning rate of each param group. One that is a tensor on the device is read when it is asked for, so a
    scheduler that has stepped in the meantime shows."""

    @classmethod
    def read(cls, control: Control, about: _About, lr: list[float]) -> StepMetrics:
        """From results on the host."""
        norm = control.total_norm.item() if about.norm_taken else math.nan
        skipped = control.skipped.item() != 0
        return cls(
            step=about.step,
            grad_norm=norm,
            clip_coef=control.clip_coef.item() if about.norm_taken else 1.0,
            found_inf=skipped or (about.norm_taken and not math.isfinite(norm)),
            skipped=skipped,
            skipped_steps=int(control.skipped_steps.item()),
            lr=tuple(lr),
        )


@dataclass
class _About:
    """What the host knows of the last step."""

    step: int
    norm_taken: bool
    lr: list[float | torch.Tensor]
    """Tensors where they are on a device."""

    @classmethod
    def last_step(cls, optimizer: FusedOptimizer) -> _About:
        groups, plan = optimizer.param_groups, optimizer._plan
        used = [] if plan is None else plan.learning_rates()
        lr = []
        for i, group in enumerate(groups):
            value = group["lr"]
            on_device = isinstance(value, torch.Tensor) and value.device.type == "cuda"
            # The step's own, where the group's may have been changed since.
            lr.append(value.detach() if on_device else used[i] if i < len(used) else float(value))
        return cls(optimizer._steps, optimizer._norm_taken, lr)


class _Slot:  # on a GPU alone
    """Pinned memory for the results of one step, and the event behind the copy into it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.control = Control(device, torch.empty(8, dtype=torch.float64, pin_memory=True))
        self.lr = torch.empty(0)
        self.event = torch.cuda.Event()
        self.about: _About | None = None

    def start(self, control: Control, about: _About) -> None:
        """Copies on the current stream, behind what the step launched there."""
        self.about = about
        self.control.buffer.copy_(control.buffer, non_blocking=True)
        if any(isinstance(value, torch.Tensor) for value in about.lr):
            if self.lr.numel() != len(about.lr):
                self.lr = torch.empty(len(about.lr), dtype=torch.float64, pin_memory=True)
            for place, value in zip(self.lr.unbind(), about.lr):
                if isinstance(value, torch.Tensor):
                    place.copy_(value.reshape(()), non_blocking=True)
        self.event.record(torch.cuda.current_stream(self.device))

    def done(self) -> bool:
        return bool(self.event.query())

    def read(self) -> StepMetrics:
        assert self.about is not None  # it has been started
        copied = self.lr.tolist()
        lr = [copied[i] if isinstance(value, torch.Tensor) else value for i, value in enumerate(self.about.lr)]
        return StepMetrics.read(self.control, self.about, lr)


class Fetches:
    """Copies under way, in order, and what has arrived. Slots have the methods of ``_Slot``."""

    def __init__(self, slots: list[_Slot]) -> None:
        self.free = list(slots)
        self.pending: deque[_Slot] = deque()
        self.newest: StepMetrics | None = None

    def collect(self) -> None:
        """Takes in what has arrived. An older copy that is still under way holds up the younger ones."""
        arrived = None
        while self.pending and self.pending[0].done():
            if arrived is not None:
                self.free.append(arrived)
            arrived = self.pending.popleft()
        if arrived is not None:
            self.newest = arrived.read()
            self.free.append(arrived)

    def start(self, control: Control, about: _About) -> None:
        """Asks for the results of the last step, if a slot is free."""
        if self.free:
            slot = self.free.pop()
            slot.start(control, about)
            self.pending.append(slot)


def fetch(optimizer: FusedOptimizer) -> StepMetrics | None:
    """See ``FusedOptimizer.metrics``."""
    if not optimizer._steps:
        return None
    control = optimizer._control()
    device = control.buffer.device
    if device.type != "cuda":
        return wait(optimizer)
    fetches = optimizer._fetches
    if torch.cuda.is_current_stream_capturing():  # neither copies nor questions about events are allowed
        return fetches[1].newest if fetches else None
    if fetches is None or fetches[0] != device:  # on a GPU alone
        fetches = optimizer._fetches = (device, Fetches([_Slot(device) for _ in range(_SLOTS)]))
    fetches[1].collect()
    fetches[1].start(control, _About.last_step(optimizer))
    return fetches[1].newest


def wait(optimizer: FusedOptimizer) -> StepMetrics | None:
    """See ``FusedOptimizer.last_step``."""
    if not optimizer._steps:
        return None
    control, about = optimizer._control(), _About.last_step(optimizer)
    on_host = Control(torch.device("cpu"), control.buffer.cpu())
    return StepMetrics.read(on_host, about, [float(value) for value in about.lr])
