"""optimi (torch-optimi): Adam, AdamW, RAdam, Lion, SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..optim import FusedOptimizer
from .common import (
    Place,
    convert,
    divided_decay,
    number,
    plain,
    plain_group,
    read_states,
    require_keys,
    settle_decay,
    step_count,
)

__all__ = ["from_optimi"]

_FAMILIES = ("adam", "adamw", "radam", "lion", "sgd", "sgdw")
_DROP = (
    *("beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "kahan_sum"),
    *("foreach", "triton", "gradient_release", "setup", "torch_init"),
)


def from_optimi(state_dict: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """An optimi checkpoint for ``optimizer.load_state_dict``.

    optimi keeps moments that are divided by 1 - βᵗ already; ours are not, so they are multiplied by it. Kahan sums, of
    bfloat16 and float16 parameters, become float32 masters: parameter + compensation. **Load the model's weights
    first**: they are read then. Decay that was decoupled from the learning rate (``decouple_lr``) becomes a weight
    decay divided by ``max_lr``.

    Args:
        state_dict: of Adam, AdamW, RAdam, Lion or SGD.
        optimizer: fusedopt's of the same algorithm (SGD with ``decouple_wd`` or ``decouple_lr``: SGDW), for the same
            parameters, and for Kahan sums with ``master_weights``. It is only read.

    Raises:
        ValueError: missing keys, other shapes, decay that the optimizer does not have.
    """

    def to_group(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        return _group(where, group, optimizer)

    return convert("from_optimi", state_dict, optimizer, _FAMILIES, to_group, _entry)


def _group(where: str, group: Mapping[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    ours = plain_group(where, group, _DROP)
    if optimizer.rule in ("sgd", "sgdw"):
        require_keys(where, group, ["momentum"], "build a fusedopt optimizer of the checkpoint's algorithm")
        ours["dampening"] = ours["momentum"] if group.get("dampening") else 0.0
    else:
        require_keys(where, group, ["beta1", "beta2"], "build a fusedopt optimizer of the checkpoint's algorithm")
        ours["betas"] = (number(f"{where}['beta1']", group["beta1"]), number(f"{where}['beta2']", group["beta2"]))
    if group.get("decouple_lr"):
        ours["weight_decay"] = divided_decay(where, group, group.get("max_lr"), "max_lr")
    decoupled = bool(group.get("decouple_wd") or group.get("decouple_lr")) or optimizer.rule == "lion"
    settle_decay(where, ours, optimizer, decoupled)
    return ours


def _entry(place: Place) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if place.rule.family in ("lion", "sgd", "sgdw"):
        if place.rule.states:
            names = {"momentum_buffer": "exp_avg"}
            entry = {"step": step_count(place.where, 1), **read_states(place, names)}
    else:
        entry = _corrected_entry(place)
    compensation = place.entry.get("kahan_comp")
    if isinstance(compensation, torch.Tensor) and compensation.shape == place.param.shape and place.group["kahan_sum"]:
        compensation = plain(f"{place.where}['kahan_comp']", compensation).to(place.param.device)
        entry["master_param"] = place.param.detach().float() + compensation.float()
        entry.setdefault("step", step_count(place.where, 1))
    return entry


def _corrected_entry(place: Place) -> dict[str, Any]:
    """Adam's: moments times 1 - βᵗ, in float32. t is the group's, or with gradient release the parameter's."""
    counted = place.entry if place.entry.get("step") is not None else place.group
    require_keys(f"{place.where}: its param group", counted, ["step"], "pass the state_dict() after a step")
    step = step_count(f"{place.where}: step", counted["step"])
    states = read_states(place)
    for key, beta in zip(("exp_avg", "exp_avg_sq"), ("beta1", "beta2")):
        correction = 1.0 - number(f"{place.where}: {beta}", place.group[beta]) ** float(step)
        wide = states[key] if states[key].dtype == torch.float64 else states[key].float()
        states[key] = wide * correction
    return {"step": step, **states}
