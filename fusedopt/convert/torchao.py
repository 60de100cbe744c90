"""torchao.optim: Adam and AdamW in 8 bits, 4 bits and FP8, and CPUOffloadOptimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from ..optim import FusedOptimizer
from ..optim.checkpoint import require_dict
from .common import Place, check_optimizer, convert, plain, plain_group, read_states, require_keys, step_count
from .quantised import check_map, decode_map, scaled

__all__ = ["from_torchao"]

_FAMILIES = ("adam", "adamw")


def from_torchao(
    state_dict: Mapping[str, Any], optimizer: FusedOptimizer, *, minimal_size: int = 4096
) -> dict[str, Any]:
    """A torchao checkpoint for ``optimizer.load_state_dict``: quantised states dequantised to float32.

    States are read by their attributes (``codes``, ``scale``, ``qmap``), so torchao need not be installed:
    :func:`load_file` reads a file without it. Whether weight decay was decoupled is not in the checkpoint: the
    optimizer decides it.

    Args:
        state_dict: of an Adam or AdamW of ``torchao.optim``, or of ``CPUOffloadOptimizer`` around one of them or of
            ``torch.optim``'s.
        optimizer: fusedopt's Adam or AdamW, for the same parameters. It is only read.
        minimal_size: of CPUOffloadOptimizer: tensors of fewer elements stayed on the GPU.

    Raises:
        ValueError: unknown state classes, block sizes and quantisation maps, missing keys, other shapes.
    """
    where = "from_torchao"
    require_dict(where, state_dict, "a checkpoint")
    check_optimizer(where, optimizer, _FAMILIES)
    if "offloaded" in state_dict:
        state_dict = _joined(where, state_dict, optimizer, minimal_size)
    return convert(where, state_dict, optimizer, _FAMILIES, plain_group, _entry)


def _entry(place: Place) -> dict[str, Any]:
    require_keys(place.where, place.entry, ["step"], "pass the peer's whole state_dict()")
    return {"step": step_count(f"{place.where}['step']", place.entry["step"]), **read_states(place, decode=_decoded)}


# ---- quantised states -----------------------------------------------------------------------------------------------


def _decoded(where: str, value: Any) -> torch.Tensor:
    kind = type(value).__name__
    decode = {"OptimState8bit": _decoded_8bit, "OptimState4bit": _decoded_4bit, "OptimStateFp8": _decoded_fp8}.get(kind)
    if decode is not None:
        return decode(where, value)
    if hasattr(value, "codes"):
        raise ValueError(
            f"{where} is of class {kind}, expected OptimState8bit, OptimState4bit or OptimStateFp8: an unknown format; "
            "replace it by its dequantize() before"
        )
    return plain(where, value)


def _block_size(where: str, elements: int, scale: torch.Tensor) -> int:
    scales = scale.numel()
    if scales == 0 or elements % scales:
        raise ValueError(
            f"{where} has {scales} scales for {elements} elements, expected a divisor of them: an unknown block size; "
            "replace the state by its dequantize() before"
        )
    return elements // scales


def _decoded_8bit(where: str, value: Any) -> torch.Tensor:
    table = check_map(f"{where}.qmap", value.qmap, 256, value.signed)
    return decode_map(where, value.codes, table, value.scale, _block_size(where, value.codes.numel(), value.scale))


def _decoded_4bit(where: str, value: Any) -> torch.Tensor:
    """Two codes to a byte, the first one in its upper half."""
    table = check_map(f"{where}.qmap", value.qmap, 16, value.signed)
    codes = torch.stack([value.codes >> 4, value.codes & 0b1111], dim=-1).view(-1)
    block = _block_size(where, codes.numel(), value.scale)
    return decode_map(where, codes, table, value.scale, block).view(value._shape)


def _decoded_fp8(where: str, value: Any) -> torch.Tensor:
    if value.codes.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"{where} has codes of dtype {str(value.codes.dtype).removeprefix('torch.')}, expected float8_e4m3fn: an "
            "unknown format; replace it by its dequantize() before"
        )
    return scaled(where, value.codes.float(), value.scale, _block_size(where, value.codes.numel(), value.scale))


# ---- CPUOffloadOptimizer --------------------------------------------------------------------------------------------


def _joined(where: str, state_dict: Mapping[str, Any], optimizer: FusedOptimizer, minimal_size: int) -> dict[str, Any]:
    """Its optimizers' checkpoints, one for each large parameter and one for all small ones, as one.

    It leaves out parameters that require no gradient; those get no state.
    """
    large = iter(state_dict["offloaded"])
    small = _in_order(where, state_dict.get("on-device", {"state": {}, "param_groups": []}))
    state, groups, index = {}, [], 0
    for own in optimizer.param_groups:
        hyper: Mapping[str, Any] | None = None
        indices = []
        for param in own["params"]:
            indices.append(index)
            if param.requires_grad:
                part = next(large, None) if param.numel() >= minimal_size else next(small, None)
                if part is None:
                    raise ValueError(
                        f"{where}: the checkpoint ends before parameter {index}, of {param.numel()} elements, expected "
                        f"a state for it; pass parameters in the peer's order, and its minimal_size={minimal_size}"
                    )
                entry, group = _single(where, part)
                hyper = hyper or group
                if entry:
                    state[index] = entry
            index += 1
        groups.append({**(hyper or own), "params": indices})
    left = len(list(chain(large, small)))
    if left:
        raise ValueError(
            f"{where}: the checkpoint has {left} parameters more than the optimizer, expected {index}; pass the "
            f"optimizer of the same model, and its minimal_size={minimal_size}"
        )
    return {"state": state, "param_groups": groups}


def _in_order(where: str, state_dict: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Parameter by parameter: its state and its param group."""
    for group in state_dict["param_groups"]:
        for index in group["params"]:
            yield state_dict["state"].get(index, {}), group


def _single(where: str, part: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """State and param group of one parameter."""
    if isinstance(part, tuple):
        entry, group = part
        return entry, group
    pairs = list(_in_order(where, part))
    if len(pairs) != 1:
        raise ValueError(
            f"{where}: an 'offloaded' optimizer has {len(pairs)} parameters, expected one; "
            "pass CPUOffloadOptimizer.state_dict()"
        )
    return pairs[0]
