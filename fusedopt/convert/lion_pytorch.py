"""lion_pytorch.Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..optim import FusedOptimizer
from .common import Place, convert, divided_decay, plain_group, read_states, step_count

__all__ = ["from_lion_pytorch"]


def from_lion_pytorch(
    state_dict: Mapping[str, Any], optimizer: FusedOptimizer, *, decoupled_from_lr: float | None = None
) -> dict[str, Any]:
    """A lion-pytorch checkpoint for ``optimizer.load_state_dict``.

    Steps are not counted there, nor needed: ``step`` begins at 1.

    Args:
        state_dict: of Lion.
        optimizer: fusedopt's Lion, for the same parameters. It is only read.
        decoupled_from_lr: where Lion was made with ``decoupled_weight_decay=True``, the learning rate it was made with;
            weight decay is divided by it, as Lion does in each step.

    Raises:
        ValueError: missing keys, other shapes.
    """

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        ours = plain_group(where, group, required=("lr", "betas"))
        if decoupled_from_lr is not None:
            ours["weight_decay"] = divided_decay(where, group, decoupled_from_lr, "decoupled_from_lr")
        return ours

    return convert("from_lion_pytorch", state_dict, optimizer, ("lion",), to_group, _entry)


def _entry(place: Place) -> dict[str, Any]:
    return {"step": step_count(place.where, 1), **read_states(place)}
