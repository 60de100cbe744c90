"""deepspeed: FusedAdam, DeepSpeedCPUAdam, their Lions, and ZeRO stages 1 and 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..optim import FusedOptimizer
from ..optim.checkpoint import require_dict
from .common import (
    Place,
    check_optimizer,
    convert,
    plain,
    plain_group,
    read_states,
    require_bias_correction,
    require_keys,
    step_count,
)

__all__ = ["from_deepspeed", "from_deepspeed_zero"]

_FAMILIES = ("adam", "adamw", "lion")


def from_deepspeed(state_dict: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """A checkpoint of an optimizer of ``deepspeed.ops`` for ``optimizer.load_state_dict``.

    FusedAdam advances the step counter of the last parameter of a group only, and takes bias correction from it: here
    all of the group get that count, the largest one. Whether weight decay was decoupled (``adam_w_mode``) is not in the
    checkpoint: the optimizer decides it.

    Args:
        state_dict: of FusedAdam, DeepSpeedCPUAdam, FusedLion or DeepSpeedCPULion, not of a ZeRO engine.
        optimizer: fusedopt's Adam, AdamW or Lion, for the same parameters. It is only read.

    Raises:
        ValueError: missing keys, other shapes, ``bias_correction=False``, ZeRO's layout.
    """
    where = "from_deepspeed"
    require_dict(where, state_dict, "a checkpoint")
    if "base_optimizer_state" in state_dict or "fp32_flat_groups" in state_dict:
        raise ValueError(
            f"{where}: got a rank's part of a ZeRO checkpoint, expected an optimizer's state_dict(); pass all ranks' "
            "parts to from_deepspeed_zero"
        )
    steps = _common_steps(where, state_dict) if isinstance(state_dict.get("state"), Mapping) else {}

    def to_entry(place: Place) -> dict[str, Any]:
        count = steps.get(id(place.group))
        require_keys(place.where, place.entry, ["step"], "pass the peer's whole state_dict()")
        return {
            "step": step_count(f"{place.where}['step']", place.entry["step"] if count is None else count),
            **read_states(place),
        }

    return convert(where, state_dict, optimizer, _FAMILIES, _group, to_entry)


def _group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
    require_bias_correction(where, group)
    return plain_group(where, group, drop=("bias_correction",))


def _common_steps(where: str, state_dict: Mapping[str, Any]) -> dict[int, float]:
    """The largest step count in a param group of FusedAdam, which alone has a 'step' there too, by the group's id."""
    steps = {}
    for group in state_dict.get("param_groups", ()):
        if isinstance(group, Mapping) and "step" in group and "bias_correction" in group:
            entries = [state_dict["state"].get(index) or {} for index in group.get("params", ())]
            counts = [float(step_count(f"{where}: step", e["step"])) for e in entries if e.get("step") is not None]
            if counts:
                steps[id(group)] = max(counts)
    return steps


# ---- ZeRO -----------------------------------------------------------------------------------------------------------


def from_deepspeed_zero(
    ranks: Sequence[Mapping[str, Any]],
    optimizer: FusedOptimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, Any]:
    """A ZeRO checkpoint, stage 1 or 2, or of DeepSpeed's BF16_Optimizer, for ``optimizer.load_state_dict``.

    DeepSpeed keeps every param group as one flat float32 tensor, of which each rank has a part, and saves which part of
    it is whose. Beside bfloat16 and float16 parameters the float32 weights become masters.

    Args:
        ranks: ``load_file(path)["optimizer_state_dict"]`` of each ``*_optim_states.pt``, in the order of their ranks.
        optimizer: fusedopt's Adam, AdamW or Lion, for the whole model, with as many param groups as the engine's
            optimizer had; for masters with ``master_weights``. It is only read.
        named_parameters: ``model.named_parameters()``, the names as in the engine's ``module``.

    Raises:
        ValueError: stage 3, missing ranks, other names and shapes, missing keys.
    """
    where = "from_deepspeed_zero"
    check_optimizer(where, optimizer, _FAMILIES)
    _check_ranks(where, ranks)
    name_of = {param: name for name, param in named_parameters}
    state: dict[int, dict[str, Any]] = {}
    groups, index = [], 0
    base = ranks[0]["base_optimizer_state"]
    theirs, ours = len(ranks[0]["param_slice_mappings"]), len(optimizer.param_groups)
    if theirs != ours:
        raise ValueError(
            f"{where}: the checkpoint has {theirs} param groups, expected the optimizer's {ours}; build its groups "
            "as the engine's were"
        )
    for g, own in enumerate(optimizer.param_groups):
        group = base["param_groups"][g] if isinstance(base, Mapping) else own
        indices = []
        for param in own["params"]:
            entry = _gathered(f"{where}: param group {g}", ranks, g, name_of.get(param), param)
            if entry:
                state[index] = entry
            indices.append(index)
            index += 1
        groups.append({**group, "params": indices})
    return convert(where, {"state": state, "param_groups": groups}, optimizer, _FAMILIES, _group, _zero_entry)


def _check_ranks(where: str, ranks: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(ranks, Mapping) or not ranks:
        raise ValueError(f"{where}: got {type(ranks).__name__}, expected a list of all ranks' optimizer_state_dict")
    for r, part in enumerate(ranks):
        require_dict(where, part, f"ranks[{r}]")
        if "fp32_flat_groups" in part:
            raise ValueError(
                f"{where}: ranks[{r}] is of ZeRO stage 3, expected stage 1 or 2; there is no importer: "
                "load the weights that DeepSpeed's zero_to_fp32.py makes, and begin with fresh states"
            )
        require_keys(
            f"{where}: ranks[{r}]",
            part,
            ["base_optimizer_state", "single_partition_of_fp32_groups", "param_slice_mappings", "partition_count"],
            "pass load_file(path)['optimizer_state_dict'] of a *_optim_states.pt",
        )
    counts = ranks[0]["partition_count"]
    expected = max(counts) if isinstance(counts, list | tuple) else counts
    if len(ranks) != expected:
        raise ValueError(
            f"{where}: got {len(ranks)} ranks, expected {expected}; pass the parts of all of them, in their order"
        )


def _gathered(
    where: str, ranks: Sequence[Mapping[str, Any]], group: int, name: str | None, param: torch.Tensor
) -> dict[str, Any]:
    """State and float32 weight of one parameter, put together from the parts of all ranks; empty if it has none."""
    if name is None:
        raise ValueError(
            f"{where}: a parameter of shape {tuple(param.shape)} is not among named_parameters, expected all of the "
            "optimizer's; pass model.named_parameters() of the model that it was built from"
        )
    pieces: dict[str, list[torch.Tensor]] = {}
    step = None
    for r, part in enumerate(ranks):
        at = f"{where}, rank {r}, '{name}'"
        mappings = part["param_slice_mappings"]
        address = mappings[group].get(name) if group < len(mappings) else None
        if address is None:
            continue
        flat = _flat_state(at, part["base_optimizer_state"], group)
        step = flat.get("step", step)
        tensors = {key: flat[key] for key in ("exp_avg", "exp_avg_sq") if key in flat}
        tensors["master_param"] = part["single_partition_of_fp32_groups"][group]
        for key, tensor in tensors.items():
            piece = plain(f"{at}: '{key}'", tensor)[address.start : address.start + address.numel]
            pieces.setdefault(key, []).append(piece)
    elements = sum(piece.numel() for piece in pieces.get("master_param", ()))
    if elements != param.numel() and param.requires_grad:
        raise ValueError(
            f"{where}: the ranks hold {elements} elements of '{name}', expected {param.numel()}; pass all ranks' parts "
            "of a checkpoint of this model, and build the param groups as they were"
        )
    joined = {key: torch.cat(parts).view(param.shape) for key, parts in pieces.items()}
    return {**joined, **({"step": step} if step is not None else {})}


def _flat_state(where: str, base: Any, group: int) -> Mapping[str, Any]:
    """Of one param group: a state_dict's, or with elastic checkpoints an element of a list."""
    state: Mapping[str, Any] = base["state"].get(group) if isinstance(base, Mapping) else base[group]
    require_dict(where, state, "its state")
    return state


def _zero_entry(place: Place) -> dict[str, Any]:
    count = place.entry.get("step", place.group.get("step"))
    require_keys(place.where, {"step": count}, ["step"], "pass a checkpoint of an engine that has stepped")
    entry = {"step": step_count(f"{place.where}['step']", count), **read_states(place)}
    if place.param.dtype in (torch.bfloat16, torch.float16):
        entry["master_param"] = place.entry["master_param"].float()
    return entry
