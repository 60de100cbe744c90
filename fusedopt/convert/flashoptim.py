"""flashoptim: FlashAdam, FlashAdamW, FlashLion, FlashSGD, FlashSGDW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..optim import FusedOptimizer
from .common import Place, convert, divided_decay, keys_text, plain, plain_group, step_count
from .quantised import decode_softsign, error_corrected

__all__ = ["from_flashoptim"]

_FAMILIES = ("adam", "adamw", "lion", "sgd", "sgdw")
_GROUP_SIZE = 32
"""Elements to a scale."""
_ERROR_DTYPES = {1: torch.int8, 2: torch.int16}


def from_flashoptim(
    state_dict: Mapping[str, Any], optimizer: FusedOptimizer, *, decouple_lr: bool = False
) -> dict[str, Any]:
    """A flashoptim checkpoint, compressed or not, for ``optimizer.load_state_dict``: quantised states in float32.

    ``error_bits`` beside bfloat16 and float16 parameters become float32 masters. **Load the model's weights first**:
    they are read then. What flashoptim does not save (decoupled decay, ``nesterov``) the optimizer decides.

    Args:
        state_dict: of FlashAdam, FlashAdamW, FlashLion, FlashSGD or FlashSGDW.
        optimizer: fusedopt's of the same algorithm, for the same parameters, and for error bits with
            ``master_weights``. It is only read.
        decouple_lr: whether the peer was made with ``decouple_lr=True``: weight decay is divided by the param group's
            ``initial_lr``, as the peer does in each step.

    Raises:
        ValueError: unknown group sizes and error bits, missing keys, other shapes.
    """

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        ours = plain_group(where, group, drop=("master_bytewidth", "quantize"))
        if decouple_lr:
            ours["weight_decay"] = divided_decay(where, group, group.get("initial_lr"), "initial_lr")
        return ours

    return convert("from_flashoptim", state_dict, optimizer, _FAMILIES, to_group, _entry)


def _entry(place: Place) -> dict[str, Any]:
    if place.entry.get("step") is None and place.rule.family in ("adam", "adamw"):
        raise ValueError(
            f"{place.where} has keys {keys_text(place.entry)}, expected 'step' too; build a fusedopt optimizer of the "
            f"checkpoint's algorithm: this one is '{place.rule.name}'"
        )
    entry: dict[str, Any] = {}
    for key, moment in zip(place.rule.states, place.rule.moments):
        entry[key] = _state(place, key, moment)
    if place.entry.get("error_bits") is not None:
        entry["master_param"] = _master(place)
    if entry:
        entry["step"] = step_count(f"{place.where}['step']", place.entry.get("step", 1))
    return entry


def _state(place: Place, key: str, moment: str) -> torch.Tensor:
    codes, scale = place.entry.get(f"{key}::quantized"), place.entry.get(f"{key}::scales")
    at = f"{place.where}['{key}']"
    if key in place.entry:
        return plain(at, place.entry[key])
    if codes is None or scale is None:
        raise ValueError(
            f"{place.where} has keys {keys_text(place.entry)}, expected '{key}', or '{key}::quantized' and "
            f"'{key}::scales'; build a fusedopt optimizer of the checkpoint's algorithm, not '{place.rule.name}'"
        )
    scale = plain(f"{place.where}['{key}::scales']", scale)
    if scale.dtype == torch.bfloat16:  # float16 bits under another name, so that torch's casts leave them alone
        scale = scale.view(torch.float16)
    return decode_softsign(at, codes.detach(), scale, _GROUP_SIZE, moment)


def _master(place: Place) -> torch.Tensor:
    """float32. Error bits travel as the parameter's dtype: one byte by value, two by bits."""
    at, param = f"{place.where}['error_bits']", place.param
    bits, width = place.entry["error_bits"], place.group.get("master_bytewidth")
    dtype = _ERROR_DTYPES.get((width or 0) - param.element_size())
    if dtype is None or param.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{at} stands beside a parameter of dtype {str(param.dtype).removeprefix('torch.')} in a param group with "
            f"master_bytewidth={width}, expected bfloat16 or float16 with 3 or 4; use the model as it was saved"
        )
    if tuple(bits.shape) != tuple(param.shape):
        raise ValueError(
            f"{at} has shape {tuple(bits.shape)}, expected {tuple(param.shape)}; load the checkpoint of this model"
        )
    if bits.dtype != dtype:
        bits = bits.to(torch.int8) if dtype == torch.int8 else bits.view(torch.int16)
    return error_corrected(param, bits.to(param.device))
