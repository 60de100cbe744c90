"""apex.optimizers: FusedAdam, FusedLAMB, FusedSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..optim import FusedOptimizer
from .common import Place, convert, group_step, plain_group, read_states, require_bias_correction, step_count

__all__ = ["from_apex", "momentum_entry"]

_FAMILIES = ("adam", "adamw", "lamb", "sgd", "sgdw")


def from_apex(state_dict: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """An apex checkpoint for ``optimizer.load_state_dict``.

    Steps are counted per param group there, and per parameter here. The checkpoint does not say whether weight decay
    was decoupled (``adam_w_mode``, ``wd_after_momentum``), nor does it hold master weights: the optimizer decides the
    first, and the second begin as copies of the parameters.

    Args:
        state_dict: of FusedAdam, FusedLAMB or FusedSGD.
        optimizer: fusedopt's Adam or AdamW, LAMB, SGD or SGDW, for the same parameters. It is only read.

    Raises:
        ValueError: missing keys, other shapes, ``bias_correction=False`` of FusedAdam.
    """
    sgd = optimizer.rule in ("sgd", "sgdw") if isinstance(optimizer, FusedOptimizer) else False

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        if optimizer.rule != "lamb":
            require_bias_correction(where, group)
        drop = ("bias_correction",) if optimizer.rule != "lamb" else ()
        return plain_group(where, group, drop)

    return convert("from_apex", state_dict, optimizer, _FAMILIES, to_group, momentum_entry if sgd else _adam_entry)


def _adam_entry(place: Place) -> dict[str, Any]:
    return {"step": group_step(place), **read_states(place)}


def momentum_entry(place: Place) -> dict[str, Any]:
    """SGD's buffer, which apex keeps without momentum too, filled with zeros."""
    if not place.rule.states:
        return {}
    return {"step": step_count(place.where, 1), **read_states(place)}
