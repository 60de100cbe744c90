"""The states of an optimizer brought into order before tables are built over them: created, converted, laid out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import sharding
from ..formats import (
    adopt_entry,
    convert_master,
    convert_states,
    decode_states,
    lacks_master,
    new_states,
    scale_key,
    wanted_state_format,
)
from ..plan import aligned_like, like_parameter, same_layout
from ..specs import RuleSpec

if TYPE_CHECKING:
    from .base import FusedOptimizer
    from .plan import Tracked

__all__ = ["complete_states"]


def complete_states(optimizer: FusedOptimizer, active: list[Tracked]) -> None:
    """Creates missing state, and puts step counters, layouts and formats right, each parameter's completely or not.

    New counters are views of one tensor.
    """
    states, groups = optimizer.state, optimizer.param_groups
    counters: dict[torch.device, list[tuple[dict[str, Any], float]]] = {}
    for each in active:
        stored = states[each.param] if each.keeps_state or states.get(each.param) else each.scratch
        before = dict(stored)
        try:
            _complete_entry(stored, each, groups[each.group], optimizer._initial_state)
        except BaseException:
            stored.clear()
            stored.update(before)
            raise
        step = stored["step"]
        if not _is_counter(step, each.home):
            counters.setdefault(each.home, []).append((stored, float(step)))
    for device, entries in counters.items():
        values = torch.tensor([value for _, value in entries], dtype=torch.float32).to(device)
        for (state, _), counter in zip(entries, values.unbind()):
            state["step"] = counter


def _complete_entry(stored: dict[str, Any], each: Tracked, group: dict[str, Any], initial: float) -> None:
    state, rule, dense, template = each.entry(stored), each.rule, each.dense, each.template()
    adopt_entry(state, rule)
    each.state_format = wanted_state_format(each.where, group, each.param, state, rule)
    if state:
        _bring_into_layout(state, rule, template)
        convert_states(state, rule, each.state_format)
    if not state or not all(key in state for key in rule.states):
        state["step"] = 0.0
        state.update(new_states(rule, each.state_format, template, initial))
    if dense is not each.local:
        dense.copy_(each.local.detach())
    if template is not dense and lacks_master(state, each.param_format):
        template.copy_(dense.detach())
    if convert_master(state, template.detach(), each.param_format):
        for written, value in ((dense, template), (each.local, dense)):
            if written is not value:
                written.detach().copy_(value)
    if each.home.type == "cuda" and not each.is_grouped:
        for key in (*rule.states, *(each.param_format.extra or ())[:1]):
            state[key] = aligned_like(state[key], dense)
    if sharding.is_sharded(each.param):
        sharding.store_entry(stored, state, each.param)


def _bring_into_layout(state: dict[str, Any], rule: RuleSpec, dense: torch.Tensor) -> None:
    """Elements in the order of the parameter's in memory. Blocks are runs of memory, so they are taken apart first."""
    present = [key for key in rule.states if key in state]
    if not all(same_layout(state[key], dense) for key in present):
        state.update(decode_states(state, rule))
        for key in present:
            state.pop(scale_key(key), None)
            state[key] = like_parameter(state[key].detach(), dense)
    for key in ("master_param", "param_remainder"):
        if key in state and not same_layout(state[key], dense):
            state[key] = like_parameter(state[key].detach(), dense)


def _is_counter(step: object, device: torch.device) -> bool:
    return (
        isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.device == device and step.numel() == 1
    )
