"""How much memory an optimizer and its parameters take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ..formats import scale_key
from ..sharding import local_of
from ..specs import PARAM_FORMATS, RuleSpec

if TYPE_CHECKING:
    from .plan import OptimizerPlan

__all__ = ["MemorySummary", "summarize"]

_EXTRAS = {spec.extra[0] for spec in PARAM_FORMATS.values() if spec.extra}


@dataclass(frozen=True)
class MemorySummary:
    """Bytes by role. ``print`` it for a table."""

    numel: int
    """Elements of all parameters; of sharded ones those of this process, as for all that follows."""
    bytes: dict[str, int]
    """param, master (what is kept beside the parameters), states, scales, steps, grad, main_grad, tables; with offload
    staging too: pinned buffers of the host, where master, states, scales and steps are then."""

    @property
    def total(self) -> int:
        """Bytes of all roles."""
        return sum(self.bytes.values())

    @property
    def checkpoint(self) -> int:
        """Bytes of the tensors in ``state_dict()``; there 8-bit states of DTensors take a byte more per element."""
        return sum(self.bytes[role] for role in ("master", "states", "scales", "steps"))

    def per_param(self, role: str | None = None) -> float:
        """Bytes per parameter element of one role, or of all."""
        return (self.total if role is None else self.bytes[role]) / max(self.numel, 1)

    def __str__(self) -> str:
        rows = [(role, count) for role, count in self.bytes.items() if count] + [("total", self.total)]
        lines = [
            f"{role:<10} {count:>16,} bytes {count / max(self.numel, 1):>8.3f} per parameter" for role, count in rows
        ]
        return "\n".join([f"{self.numel:,} parameters", *lines])


def summarize(
    optimizer: torch.optim.Optimizer, rules: Iterable[RuleSpec], plan: OptimizerPlan | None, accumulated: int
) -> MemorySummary:
    """As they are now: without state before the first step, without ``grad`` after ``zero_grad``.

    rules: those of the param groups. accumulated: bytes of an accumulator's main gradients.
    """
    params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    entries = [optimizer.state.get(param, {}) for param in params]
    states = {key for rule in rules for key in rule.states}
    scales = {scale_key(key) for key in states}
    tables: list[torch.Tensor] = []
    if plan is not None:
        tables = [*chain.from_iterable(device.device_memory() for device in plan.tables), *(n.sums for n in plan.norms)]
    return MemorySummary(
        sum(local_of(param).numel() for param in params),
        {
            "param": _bytes(params),
            "master": _bytes(entry.get(key) for entry in entries for key in _EXTRAS),
            "states": _bytes(entry.get(key) for entry in entries for key in states),
            "scales": _bytes(entry.get(key) for entry in entries for key in scales),
            "steps": _bytes(entry.get("step") for entry in entries),
            "grad": _bytes(param.grad for param in params),
            "main_grad": accumulated + _bytes(getattr(param, "main_grad", None) for param in params),
            "tables": _bytes(tables),
            **({"staging": plan.staging_bytes} if plan is not None and plan.lanes else {}),
        },
    )


def _bytes(tensors: Iterable[Any]) -> int:
    local = (local_of(each) for each in tensors if isinstance(each, torch.Tensor))
    return sum(each.numel() * each.element_size() for each in local)
