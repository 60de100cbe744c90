"""What all importers share: walking through a checkpoint beside the optimizer it is for, and reading its parts.

Nothing is ever written: neither the peer's checkpoint nor the optimizer. What is returned may share memory with the
checkpoint; ``load_state_dict`` copies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import sharding
from ..formats import OPTIONS, check_entry
from ..optim import FusedOptimizer
from ..optim.checkpoint import match_params, require_dict
from ..specs import RULES, RuleSpec

__all__ = [
    "Place",
    "check_optimizer",
    "convert",
    "divided_decay",
    "group_step",
    "keys_text",
    "number",
    "plain",
    "plain_group",
    "read_states",
    "require_bias_correction",
    "require_keys",
    "settle_decay",
    "step_count",
]


@dataclass(frozen=True)
class Place:
    """One parameter and what a peer's checkpoint has for it."""

    where: str
    """For errors: the function and the index."""
    entry: Mapping[str, Any]
    """The peer's state; never empty."""
    group: Mapping[str, Any]
    """The peer's param group."""
    param: torch.Tensor
    """Of the optimizer that will load the result."""
    rule: RuleSpec
    """Of that optimizer, for this param group."""


ToGroup = Callable[[str, Mapping[str, Any]], dict[str, Any]]
ToEntry = Callable[[Place], dict[str, Any]]


def convert(
    where: str,
    state_dict: Mapping[str, Any],
    optimizer: FusedOptimizer,
    families: Collection[str],
    to_group: ToGroup,
    to_entry: ToEntry,
) -> dict[str, Any]:
    """The checkpoint as ``optimizer.load_state_dict`` takes it.

    Args:
        where: the importer's name, for errors.
        state_dict: the peer's, with ``state`` and ``param_groups`` as every ``torch.optim.Optimizer`` has them.
        optimizer: what will load the result; built for the same parameters, in the same order and param groups.
        families: of rules that can take this peer's state.
        to_group: from the peer's param group to our hyper-parameters.
        to_entry: from the peer's state of a parameter to ours.

    Raises:
        ValueError: what does not fit, before anything is written.
    """
    check_optimizer(where, optimizer, families)
    require_dict(where, state_dict, "a checkpoint")
    param_of = match_params(where, optimizer.param_groups, dict(state_dict))
    unknown = [index for index in state_dict["state"] if index not in param_of]
    if unknown:
        raise ValueError(
            f"{where}: state[{unknown[0]!r}] belongs to no parameter of param_groups, expected indices "
            f"0 to {len(param_of) - 1}; pass the peer's whole state_dict()"
        )
    groups, state = [], {}
    for g, group in enumerate(state_dict["param_groups"]):
        converted = to_group(f"{where}: param_groups[{g}]", group)
        rule = RULES[optimizer._rule_name({**optimizer.defaults, **converted})]
        groups.append({**converted, "params": list(group["params"])})
        for index in group["params"]:
            entry = state_dict["state"].get(index)
            at = f"{where}: state[{index}]"
            if entry is not None:
                require_dict(where, entry, f"state[{index}]")
            if entry:
                place = Place(at, entry, group, param_of[index], rule)
                state[index] = to_entry(place)
                check_entry(at, state[index], place.param, rule)
    return {"state": {index: entry for index, entry in state.items() if entry}, "param_groups": groups}


def check_optimizer(where: str, optimizer: Any, families: Collection[str]) -> None:
    """ValueError or TypeError unless it is one of ours, of these families, with whole parameters."""
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{where}: got an optimizer of type {type(optimizer).__name__}, expected one of fusedopt's; "
            "build the one that shall go on, and pass it"
        )
    if optimizer.rule not in families:
        raise ValueError(
            f"{where}: got an optimizer of type {type(optimizer).__name__}, expected one with the rule "
            f"{' or '.join(repr(family) for family in families)}; build one of the checkpoint's algorithm"
        )
    if any(sharding.is_sharded(param) for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            f"{where}: got an optimizer with sharded parameters (DTensor), expected whole ones; convert with an "
            "optimizer of the model before it is sharded, and distribute the result with torch.distributed.checkpoint"
        )


# ---- values ---------------------------------------------------------------------------------------------------------


def keys_text(entry: Mapping[str, Any]) -> str:
    return str(sorted(map(str, entry)))


def require_keys(where: str, entry: Mapping[str, Any], keys: Collection[str], remedy: str) -> None:
    """ValueError if one of them is missing or None."""
    missing = [key for key in keys if entry.get(key) is None]
    if missing:
        raise ValueError(f"{where} has keys {keys_text(entry)}, expected {missing} too; {remedy}")


def plain(where: str, tensor: Any) -> torch.Tensor:
    """The tensor, detached; ValueError unless it is one, whole and of a floating-point dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{where} is a {type(tensor).__name__}, expected a tensor; pass a complete checkpoint")
    if sharding.is_sharded(tensor):
        raise ValueError(
            f"{where} is a shard (DTensor), expected a whole tensor; gather the checkpoint with "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict and full_state_dict=True"
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"{where} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected a floating-point dtype: a foreign "
            "format; take the importer of the package that wrote it"
        )
    return tensor.detach()


def number(where: str, value: Any) -> float:
    """A float; ValueError unless it is a finite number or a tensor of one element."""
    try:
        result = float(value)
    except (TypeError, ValueError, RuntimeError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{where} is {value!r:.50}, expected a number; pass the peer's state_dict() as it is")
    return result


def step_count(where: str, value: Any) -> torch.Tensor:
    """0-dim float32."""
    count = number(where, value)
    if count < 0:
        raise ValueError(f"{where} is {count}, expected steps >= 0; pass the peer's state_dict() as it is")
    return torch.tensor(count, dtype=torch.float32)


def group_step(place: Place) -> torch.Tensor:
    """0-dim float32: the counter of a peer that has one for each param group."""
    where = f"{place.where}: its param group"
    require_keys(where, place.group, ["step"], "pass the state_dict() of an optimizer that has stepped")
    return step_count(f"{place.where}: step of its param group", place.group["step"])


def read_states(
    place: Place, names: Mapping[str, str] | None = None, decode: Callable[[str, Any], torch.Tensor] = plain
) -> dict[str, torch.Tensor]:
    """The rule's states, under our names.

    Args:
        names: the peer's name of a state by ours, where they differ.
        decode: from what the peer stores, with a text for errors, to a floating-point tensor.
    """
    theirs = {key: (names or {}).get(key, key) for key in place.rule.states}
    require_keys(
        place.where,
        place.entry,
        list(theirs.values()),
        f"build a fusedopt optimizer of the checkpoint's algorithm: this one is '{place.rule.name}'",
    )
    return {ours: decode(f"{place.where}['{key}']", place.entry[key]) for ours, key in theirs.items()}


# ---- param groups ---------------------------------------------------------------------------------------------------


def plain_group(
    where: str, group: Mapping[str, Any], drop: Collection[str] = (), required: Collection[str] = ("lr",)
) -> dict[str, Any]:
    """Hyper-parameters that bear our names, numbers as numbers; others, such as a scheduler's, as they are.

    Args:
        drop: the peer's keys that mean nothing here.
        required: keys that must be there.
    """
    require_keys(where, group, required, "pass the peer's whole state_dict()")
    left_out = {"params", "max_grad_norm", "step", *OPTIONS, *drop}
    ours = {key: value for key, value in group.items() if key not in left_out}
    for key in ("lr", "initial_lr", "eps", "weight_decay", "momentum", "dampening"):
        if isinstance(ours.get(key), torch.Tensor):
            ours[key] = number(f"{where}['{key}']", ours[key])
    if "betas" in ours:
        ours["betas"] = tuple(number(f"{where}['betas']", beta) for beta in ours["betas"])
    return ours


def require_bias_correction(where: str, group: Mapping[str, Any]) -> None:
    """ValueError for Adam without it, which is another algorithm."""
    if not group.get("bias_correction", True):
        raise ValueError(
            f"{where} has bias_correction=False, expected True: fusedopt's Adam and AdamW always correct; "
            "there is no equivalent (LAMB has the option)"
        )


def divided_decay(where: str, group: Mapping[str, Any], lr: Any, what: str) -> float:
    """The weight decay λ/η₀ that, times the learning rate η, decays by (η/η₀) λ: "fully decoupled" decay.

    Args:
        lr: η₀, from the checkpoint or the caller.
        what: how η₀ is called, for errors.
    """
    base = number(f"{where}: {what}", lr)
    if base <= 0:
        raise ValueError(f"{where}: got {what}={base}, expected a number > 0; it divides the weight decay")
    return number(f"{where}['weight_decay']", group.get("weight_decay", 0.0)) / base


def settle_decay(where: str, ours: dict[str, Any], optimizer: FusedOptimizer, decoupled: bool) -> None:
    """Has the param group decay as the checkpoint's; ValueError where the optimizer cannot."""
    if optimizer.rule in ("adam", "radam"):
        ours["decoupled_weight_decay"] = decoupled
        return
    own = {"adamw": True, "sgdw": True, "lion": True}.get(optimizer.rule, False)
    if ours.get("weight_decay") and own != decoupled:
        kind, other = ("decoupled", "AdamW or SGDW") if decoupled else ("coupled (L2)", "Adam or SGD")
        raise ValueError(
            f"{where} has weight_decay={ours['weight_decay']}, {kind} in that package, expected an optimizer with such "
            f"decay instead of {type(optimizer).__name__}; use fusedopt's {other}"
        )
