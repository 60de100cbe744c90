"""Loading optimizer checkpoints: as ``torch.optim.Optimizer.load_state_dict``, but dtypes are kept and shapes checked.

torch casts every state tensor to its parameter's dtype, integers included, and offers no way to override that.

States are brought into the format of the optimizer that loads them, rounded to nearest; where its param group leaves
``state_dtype`` open, plain states keep their dtype. Masters are converted by the next step, when the model's weights,
which hold half of a split one, are sure to be loaded too.

The state of a DTensor is saved element by element (``formats.to_elements``): ``torch.distributed.checkpoint`` cuts
tensors as the processes that load them need it, and knows nothing of blocks. What a state consists of then is a dict:
an optimizer of another format does not find what it asks for, and that is an error, where a tensor of another dtype
would be cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from .. import sharding
from ..formats import (
    OPTIONS,
    adopt_entry,
    check_entry,
    convert_states,
    decode_states,
    from_elements,
    to_elements,
    wanted_state_format,
)
from ..plan import is_dense
from ..specs import RULES, RuleSpec
from .offload import home_of

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["export", "load", "match_params", "require_dict", "save"]


def export(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.optim.Optimizer.state_dict`` returned, for torch: states in float32, no masters, no formats."""
    keys = {*OPTIONS, "seed"}
    groups = [{key: value for key, value in group.items() if key not in keys} for group in state_dict["param_groups"]]
    params, rules = _numbered(optimizer)
    state = {}
    for index, entry in state_dict["state"].items():
        states = sharding.on_locals(decode_states, entry, params[index], rules[index]) if entry else {}
        wide = {key: each.to(torch.promote_types(each.dtype, torch.float32)) for key, each in states.items()}
        counted = {"step": entry["step"]} if entry and rules[index].torch_counts else {}
        state[index] = {**counted, **wide}
    return {**state_dict, "state": state, "param_groups": groups}


def _numbered(optimizer: FusedOptimizer) -> tuple[dict[int, torch.Tensor], list[RuleSpec]]:
    """Parameters and their rules, by the numbers that state dicts have for them."""
    params = dict(enumerate(chain.from_iterable(group["params"] for group in optimizer.param_groups)))
    rules = [RULES[optimizer._rule_name(group)] for group in optimizer.param_groups for _ in group["params"]]
    return params, rules


def save(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.optim.Optimizer.state_dict`` returned, with the states of DTensors element by element."""
    params, rules = _numbered(optimizer)
    if not any(map(sharding.is_sharded, params.values())):
        return state_dict
    state = {}
    for index, entry in state_dict["state"].items():
        param = params.get(index)
        if entry and sharding.is_sharded(param):
            entry = dict(entry)
            local = sharding.local_entry(f"{type(optimizer).__name__}.state_dict: state[{index}]", entry, param)
            to_elements(local, rules[index])
            sharding.store_entry(entry, local, param)
            entry = _nested(entry)
        state[index] = entry
    return {**state_dict, "state": state}


def _nested(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with a dot as dicts in the dict."""
    nested: dict[str, Any] = {}
    for key, value in entry.items():
        outer, dot, inner = key.partition(".") if isinstance(key, str) else (key, "", "")
        if dot:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[key] = value
    return nested


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``_nested``. An empty dict stands for a key that the checkpoint does not have."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            flat[key] = value
    return flat


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError, with the optimizer as it was, if the checkpoint does not fit."""
    where = f"{type(optimizer).__name__}.load_state_dict"
    require_dict(where, state_dict, "a checkpoint")
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced

    params = match_params(where, optimizer.param_groups, state_dict)
    groups = [_merge(old, new) for old, new in zip(optimizer.param_groups, state_dict["param_groups"])]
    group_of = {param: group for group in groups for param in group["params"]}
    rules = [RULES[optimizer._rule_name({**optimizer.defaults, **group})] for group in groups]
    rule_of = {param: rule for group, rule in zip(groups, rules) for param in group["params"]}
    for g, (group, rule) in enumerate(zip(groups, rules)):
        _check_hyperparameters(f"{where}: param_groups[{g}]", {**optimizer.defaults, **group}, rule)
    state: dict[Any, Any] = {}
    for index, entry in state_dict["state"].items():
        require_dict(where, entry, f"state[{index}]")
        param = params.get(index)
        home = None if param is None else home_of(optimizer, param.device)
        copied = state[index if param is None else param] = _copy(_flat(entry) if param is not None else entry, home)
        if param is not None and copied:
            _bring_into_form(f"{where}: state[{index}]", copied, param, group_of[param], rule_of[param])

    kept = optimizer.state
    kept.clear()
    kept.update(state)
    optimizer.__setstate__({"state": kept, "param_groups": groups})
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _bring_into_form(
    where: str, entry: dict[str, Any], param: torch.Tensor, group: dict[str, Any], rule: RuleSpec
) -> None:
    """Checks the state of a parameter and converts it, in place."""
    tensor = sharding.local_of(param)
    # torch's full_state_dict leaves those without dimensions plain, and so they lie everywhere.
    if sharding.is_sharded(param) and param.dim() == 0:
        plain = [key for key, value in entry.items() if key != "step" and isinstance(value, torch.Tensor)]
        entry.update({key: sharding.wrap_like(sharding.local_of(entry[key]), param) for key in plain})
    local = sharding.local_entry(where, entry, param) if sharding.is_sharded(param) else entry
    from_elements(where, local, tensor if is_dense(tensor) else torch.empty_like(tensor), rule)
    check_entry(where, local, tensor, rule)
    adopt_entry(local, rule)
    convert_states(local, rule, wanted_state_format(where, group, param, local, rule))
    if sharding.is_sharded(param):
        sharding.store_entry(entry, local, param)


def match_params(where: str, groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[Any, torch.Tensor]:
    """Parameter by its index in the checkpoint."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"{where}: got keys {sorted(map(str, state_dict))}, expected '{key}'; pass opt.state_dict()"
            )
    saved = state_dict["param_groups"]
    require_dict(where, state_dict["state"], "'state'")
    if not isinstance(saved, list | tuple):
        raise ValueError(
            f"{where}: got 'param_groups' of type {type(saved).__name__}, expected a list; pass opt.state_dict()"
        )
    for g, group in enumerate(saved):
        require_dict(where, group, f"param_groups[{g}]")
        if not isinstance(group.get("params"), list | tuple):
            raise ValueError(
                f"{where}: got param_groups[{g}] without a list of 'params', expected one; pass opt.state_dict()"
            )
    got, expected = [len(g["params"]) for g in saved], [len(g["params"]) for g in groups]
    if got != expected:
        raise ValueError(
            f"{where}: the checkpoint's param groups hold {got} parameters, expected {expected}; "
            "build the optimizer as it was when the checkpoint was saved"
        )
    indices = chain.from_iterable(g["params"] for g in saved)
    return dict(zip(indices, chain.from_iterable(g["params"] for g in groups)))


def require_dict(where: str, value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: got {what} of type {type(value).__name__}, expected a dict; pass what opt.state_dict() returned"
        )


def _check_hyperparameters(where: str, group: dict[str, Any], rule: RuleSpec) -> None:
    """ValueError where a step could not read one of the rule's."""
    for _, key, index in rule.hyper:
        value = group.get(key)
        if index >= 0:
            value = value[index] if isinstance(value, list | tuple) and len(value) > index else None
        if not (value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, Real)):
            raise ValueError(
                f"{where}: got {key}={group.get(key)!r:.50}, expected numbers; load a checkpoint of this optimizer"
            )


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's hyper-parameters with the optimizer's own parameters, as torch merges them, and own formats."""
    merged = deepcopy({key: value for key, value in new.items() if key not in ("params", *OPTIONS)})
    merged.update({key: old[key] for key in OPTIONS if key in old})
    if "seed" in old:
        merged.setdefault("seed", old["seed"])
    if "param_names" in old:
        merged.setdefault("param_names", old["param_names"])
    return {**merged, "params": old["params"]}


def _copy(value: Any, home: torch.device | None) -> Any:
    """A copy that shares no memory with the checkpoint, tensors on the device ``home``, by default where they are, and
    in their own dtype."""
    if isinstance(value, torch.Tensor):
        device = value.device if home is None else home
        return value.detach().to(device=device, copy=True)
    if isinstance(value, dict):
        return {key: _copy(each, home) for key, each in value.items()}
    return deepcopy(value)
