"""transformer_engine.pytorch.optimizers: FusedAdam, FusedSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..optim import FusedOptimizer
from .apex import momentum_entry
from .common import Place, convert, group_step, plain, plain_group, read_states, require_bias_correction

__all__ = ["from_transformer_engine"]

_FAMILIES = ("adam", "adamw", "sgd", "sgdw")


def from_transformer_engine(state_dict: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """A TransformerEngine checkpoint for ``optimizer.load_state_dict``.

    Its ``state_dict()`` unscales float16 and FP8 states to float32. Master weights are kept, those in 16-bit remainders
    to the bit (``master_weights="split16"`` has the same ones). Whether weight decay was decoupled (``adam_w_mode``) is
    not in the checkpoint: the optimizer decides it.

    Args:
        state_dict: of FusedAdam or FusedSGD.
        optimizer: fusedopt's Adam or AdamW, SGD or SGDW, for the same parameters, and for masters with
            ``master_weights``. It is only read.

    Raises:
        ValueError: missing keys, other shapes, states that are still scaled, ``bias_correction=False``.
    """
    sgd = optimizer.rule in ("sgd", "sgdw") if isinstance(optimizer, FusedOptimizer) else False

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        require_bias_correction(where, group)
        return plain_group(where, group, drop=("bias_correction",))

    to_entry = momentum_entry if sgd else _adam_entry
    return convert("from_transformer_engine", state_dict, optimizer, _FAMILIES, to_group, to_entry)


def _adam_entry(place: Place) -> dict[str, Any]:
    entry = {"step": group_step(place), **read_states(place, decode=_unscaled)}
    master = place.entry.get("master_param")
    if isinstance(master, torch.Tensor) and master.dtype == torch.int16:
        entry["param_remainder"] = master.detach()
    elif master is not None:
        entry["master_param"] = _unscaled(f"{place.where}['master_param']", master).float()
    return entry


def _unscaled(where: str, value: Any) -> torch.Tensor:
    """float16 and FP8 without their scales, which are no part of the state, mean nothing."""
    coded = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.uint8)
    if coded or type(value).__name__ == "Float8Tensor":
        raise ValueError(
            f"{where} is scaled ({type(value).__name__} of dtype {str(value.dtype).removeprefix('torch.')}), expected "
            "float32 or bfloat16: its scale is not in the checkpoint; save FusedAdam.state_dict(), which unscales"
        )
    return plain(where, value)
