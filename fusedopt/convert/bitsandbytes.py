"""bitsandbytes.optim: Adam, AdamW and Lion, in 32 and in 8 bits, paged or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..optim import FusedOptimizer
from .common import Place, convert, plain, plain_group, require_keys, settle_decay, step_count
from .quantised import check_map, decode_map

__all__ = ["from_bitsandbytes"]

_FAMILIES = ("adam", "adamw", "lion")
_NESTED = "__bnb_optimizer_quant_state__"
_BLOCK_SIZES = (256, 2048)
"""Elements to a scale: now, and in older versions."""


def from_bitsandbytes(
    state_dict: Mapping[str, Any], optimizer: FusedOptimizer, *, block_size: int | None = None
) -> dict[str, Any]:
    """A bitsandbytes checkpoint for ``optimizer.load_state_dict``: states in float32, those in 8 bits dequantised.

    Its Adam decouples weight decay, as its AdamW: with decay, take fusedopt's AdamW, or Adam, which then decouples it.

    Args:
        state_dict: of Adam, AdamW, Lion, their 8-bit (block-wise) and paged variants.
        optimizer: fusedopt's Adam, AdamW or Lion, for the same parameters; ``state_dtype="int8"`` keeps states in 8
            bits. It is only read.
        block_size: elements to a scale, where it is neither 256 nor 2048.

    Raises:
        ValueError: unknown block sizes and quantisation maps, per-tensor 8-bit states, missing keys, other shapes,
            states of its other algorithms as far as they can be told.
    """

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        return _group(where, group, optimizer)

    def to_entry(place: Place) -> dict[str, Any]:
        return _entry(place, block_size)

    return convert("from_bitsandbytes", state_dict, optimizer, _FAMILIES, to_group, to_entry)


def _group(where: str, group: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    ours = plain_group(where, group, drop=("alpha", "t_alpha", "t_beta3"), required=("lr", "betas"))
    if len(ours["betas"]) != 2:
        raise ValueError(
            f"{where} has betas={ours['betas']}, expected two: AdEMAMix keeps three; fusedopt has no equivalent"
        )
    if optimizer.rule == "lion":
        ours.pop("eps", None)
        if ours["betas"][1] == 0.0:
            raise ValueError(
                f"{where} has betas={ours['betas']}, expected Lion's two decay rates: these are those of SGD, RMSprop "
                "or Adagrad, which have no importer; begin with fresh states"
            )
    settle_decay(where, ours, optimizer, decoupled=True)
    return ours


def _entry(place: Place, block_size: int | None) -> dict[str, Any]:
    flat = {**place.entry, **place.entry.get(_NESTED, {})}
    names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
    names = {key: names[key] for key in place.rule.states if key in names}
    require_keys(
        place.where,
        flat,
        ["step", *names.values()],
        f"build a fusedopt optimizer of the checkpoint's algorithm: this one is '{place.rule.name}'",
    )
    if place.rule.family == "lion" and flat.get("state2") is not None:
        raise ValueError(
            f"{place.where} has keys {sorted(map(str, flat))}, expected no 'state2': an Adam's; use fusedopt.AdamW"
        )
    entry: dict[str, Any] = {"step": step_count(f"{place.where}['step']", flat["step"])}
    for ours, theirs in names.items():
        at = f"{place.where}['{theirs}']"
        coded = isinstance(flat[theirs], torch.Tensor) and flat[theirs].dtype == torch.uint8
        entry[ours] = _decoded(place.where, flat, theirs, block_size) if coded else plain(at, flat[theirs])
    return entry


def _decoded(where: str, flat: Mapping[str, Any], name: str, block_size: int | None) -> torch.Tensor:
    number = name[-1]
    codes, at = flat[name].detach(), f"{where}['{name}']"
    if flat.get(f"absmax{number}") is None:
        raise ValueError(
            f"{where} has keys {sorted(map(str, flat))}, expected 'absmax{number}': {name} is in 8 bits with one scale "
            "for the tensor, not one per block; save it again with block_wise=True"
        )
    require_keys(where, flat, [f"qmap{number}"], "an unknown quantisation map; pass the peer's state_dict() as it is")
    if not codes.is_contiguous():
        raise ValueError(
            f"{at} has strides {codes.stride()} for shape {tuple(codes.shape)}, expected a contiguous tensor: which "
            "elements its blocks hold differs between bitsandbytes' backends; begin with fresh states"
        )
    scale = plain(f"{where}['absmax{number}']", flat[f"absmax{number}"])
    block = _block_size(at, codes.numel(), scale.numel(), block_size)
    table = check_map(f"{where}['qmap{number}']", flat[f"qmap{number}"], 256, signed=number == "1")
    return decode_map(at, codes, table, scale, block)


def _block_size(where: str, elements: int, scales: int, given: int | None) -> int:
    sizes = _BLOCK_SIZES if given is None else (given,)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ValueError(f"from_bitsandbytes: got block_size={given!r}, expected elements >= 1; pass an int or None")
    for size in sizes:
        if -(-elements // size) == scales:
            return size
    expected = " or ".join(f"{-(-elements // size)} (blocks of {size})" for size in sizes)
    raise ValueError(
        f"{where} has {scales} scales for {elements} elements, expected {expected}: an unknown block size; "
        "pass block_size= with which it was quantised"
    )
