"""The plan of one optimizer: its state brought into order, its tables, and the watch over both."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count

import torch
from torch.autograd.graph import increment_version

from .. import _C, passes
from ..backends import for_device
from ..checks import check_grad, check_param
from ..control import Control
from ..formats import (
    check_entry,
    check_format_options,
    convert_master,
    convert_states,
    decode_states,
    param_format,
    scale_key,
    scale_shape,
    wanted_state_format,
)
from ..plan import Bucket, DeviceTables, TensorRow, build_tables, dtype_code, is_dense, like_parameter, same_layout
from ..specs import ParamFormatSpec, RuleSpec, StateFormatSpec

__all__ = ["OptimizerPlan"]


@dataclass
class _Tracked:
    """A parameter as the plan sees it."""

    param: torch.Tensor
    dense: torch.Tensor
    """``param``, or a dense copy of one with gaps, which each step fills and writes back."""
    where: str
    """In messages."""
    group: int
    id: int
    """Position among all parameters of the optimizer."""
    param_format: ParamFormatSpec
    main_grad: torch.Tensor | None
    """Its ``main_grad`` attribute, or None where it has no such attribute."""
    grad_dtype: torch.dtype | None = None
    """None while it never had a gradient."""
    state_format: StateFormatSpec | None = None
    place: tuple[Bucket, int] | None = None

    def row(self, states: dict, rule: RuleSpec) -> TensorRow:
        state = states[self.param]
        blocked = self.state_format.blocked
        return TensorRow(
            numel=self.param.numel(),
            device=self.param.device,
            grad_dtype=self.grad_dtype,
            param_format=self.param_format,
            state_format=self.state_format,
            param=self.dense,
            extra=state[self.param_format.extra[0]] if self.param_format.extra else None,
            states=[state[key] for key in rule.states],
            scales=[state[scale_key(key)] for key in rule.states] if blocked else (),
            step=state["step"],
            group=self.group,
            id=self.id,
        )

    @property
    def grad(self) -> torch.Tensor | None:
        """This step's gradient."""
        return self.param.grad if self.main_grad is None else self.main_grad


@dataclass
class OptimizerPlan:
    """Valid until ``refresh`` says otherwise."""

    tracked: list[_Tracked]
    tables: list[DeviceTables]
    watch: _C.Watch
    backend: str | None = None
    """What was asked for when the tables were built; see ``backends.wanted``."""
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(parameter with gaps, its dense copy)."""
    grads: list[torch.Tensor] = field(default_factory=list)
    """Gradients that were laid out anew for the step under way."""

    @classmethod
    def make(
        cls,
        optimizer: torch.optim.Optimizer,
        rule: RuleSpec,
        controls: dict[torch.device, Control],
        backend: str | None = None,
    ) -> OptimizerPlan:
        """Checks everything, then creates what state is missing and builds the tables. backend: as ``for_device``.

        Raises as ``check_grad`` and ``check_param``, and RuntimeError under graph capture; state is as it was then.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # A replay would copy the tables again, from memory that is gone.
            raise RuntimeError(
                "fusedopt: the first step of an optimizer, or one after its parameters or state changed, was run while "
                "a CUDA graph is being captured; call step() once before the capture"
            )
        tracked = list(_track(optimizer, rule))
        for each in tracked:
            if each.grad_dtype is not None:
                _check_state(optimizer.state.get(each.param, {}), rule, each.param)
        fresh = [each.param for each in tracked if each.grad_dtype is not None and not optimizer.state.get(each.param)]
        try:
            return cls._build(optimizer, rule, controls, tracked, backend)
        except BaseException:
            for param in fresh:
                optimizer.state.pop(param, None)
            raise

    @classmethod
    def _build(cls, optimizer, rule, controls, tracked, backend) -> OptimizerPlan:
        active = [each for each in tracked if each.grad_dtype is not None]
        _complete_state(optimizer.state, optimizer.param_groups, rule, active)
        backend_of = functools.partial(for_device, backend=backend)
        tables, places = build_tables(rule, [each.row(optimizer.state, rule) for each in active], backend_of, controls)
        seed = next((group["seed"] for group in optimizer.param_groups if "seed" in group), 0)
        for bucket in chain.from_iterable(device.buckets for device in tables):
            bucket.args.seed = seed
        for each, place in zip(active, places):
            each.place = place
        passes.prepare(tables)

        plan = cls(tracked, tables, _C.Watch(), backend)
        for each in tracked:
            bucket, slot = each.place or (None, -1)
            code = -1 if each.grad_dtype is None else dtype_code(each.grad_dtype)
            table = bucket.table if bucket else None
            plan.watch.add(each.param, each.dense, each.group, code, table, slot, hasattr(each.param, "main_grad"))
        plan.watch.remember_state(optimizer.state)
        plan.copies = [(each.param, each.dense) for each in active if each.dense is not each.param]
        return plan

    def refresh(self, optimizer: torch.optim.Optimizer) -> bool:
        """Finds this step's gradients. False if the plan is out of date."""
        relayout: list[int] = []
        self.grads.clear()
        if not self.watch.refresh(optimizer.param_groups, optimizer.state, relayout):
            return False
        for i in relayout:
            each = self.tracked[i]
            bucket, slot = each.place
            with torch.no_grad():
                grad = like_parameter(each.grad, each.dense)
            self.grads.append(grad)
            bucket.table.set_grad(slot, grad.data_ptr() or 1)
        return True

    def bump_versions(self) -> None:
        """Tells autograd that the parameters with a gradient were written."""
        if not self.watch.bump_versions():
            increment_version([each.param for each in self.tracked if each.grad is not None])

    def gather_copies(self) -> None:
        for param, dense in self.copies:
            dense.copy_(param.detach())

    def scatter_copies(self) -> None:
        for param, dense in self.copies:
            param.detach().copy_(dense)


def _track(optimizer: torch.optim.Optimizer, rule: RuleSpec) -> Iterator[_Tracked]:
    position = count()
    for g, group in enumerate(optimizer.param_groups):
        check_format_options(f"{type(optimizer).__name__}.step: param_groups[{g}]", group, rule)
        for i, param in enumerate(group["params"]):
            where = f"{type(optimizer).__name__}.step: param_groups[{g}]['params'][{i}]"
            check_param(where, param)
            dense = param if is_dense(param) else torch.empty_like(param, requires_grad=False)
            main_grad = _main_grad(where, param)
            each = _Tracked(param, dense, where, g, next(position), param_format(where, group, param.dtype), main_grad)
            if each.grad is not None:
                check_grad(f"{where}.{'grad' if main_grad is None else 'main_grad'}", each.grad, param)
                each.grad_dtype = each.grad.dtype
            elif optimizer.state.get(param):
                each.grad_dtype = param.dtype  # until a gradient of another dtype comes
            yield each


def _main_grad(where: str, param: torch.Tensor) -> torch.Tensor | None:
    """The gradient that Megatron and others keep in an attribute, in float32."""
    main_grad = getattr(param, "main_grad", None)
    if main_grad is None:
        return None
    if not isinstance(main_grad, torch.Tensor):
        raise TypeError(f"{where}.main_grad is a {type(main_grad).__name__}, expected a tensor; remove the attribute")
    if param.grad is not None:
        raise ValueError(
            f"{where} has both .grad and .main_grad, expected one; add .grad to .main_grad and set it to None"
        )
    return main_grad


def _check_state(state: dict, rule: RuleSpec, param: torch.Tensor) -> None:
    where = f"optimizer state of a parameter of shape {tuple(param.shape)}"
    check_entry(where, state, param, rule)
    for key, value in state.items():
        if key != "step" and isinstance(value, torch.Tensor) and value.device != param.device:
            raise ValueError(
                f"{where}: '{key}' is on {value.device}, expected the parameter's {param.device}; "
                "move the optimizer state together with the model"
            )


def _complete_state(states: dict, groups: list[dict], rule: RuleSpec, active: list[_Tracked]) -> None:
    """Creates missing state, and puts step counters, layouts and formats right.

    New counters are views of one tensor.
    """
    counters: dict[torch.device, list[tuple[dict, float]]] = {}
    for each in active:
        state = states[each.param]
        each.state_format = wanted_state_format(each.where, groups[each.group], each.param, state, rule)
        if state:
            _bring_into_layout(state, rule, each.dense)
            convert_states(state, rule, each.state_format)
        else:
            state["step"] = 0.0
            state.update(_zeros(rule, each))
        if each.dense is not each.param:
            each.dense.copy_(each.param.detach())
        convert_master(state, each.dense.detach(), each.param_format)
        step = state["step"]
        if not _is_counter(step, each.param.device):
            counters.setdefault(each.param.device, []).append((state, float(step)))
    for device, entries in counters.items():
        values = torch.tensor([value for _, value in entries], dtype=torch.float32).to(device)
        for (state, _), counter in zip(entries, values.unbind()):
            state["step"] = counter


def _zeros(rule: RuleSpec, each: _Tracked) -> dict[str, torch.Tensor]:
    entry = {}
    for key, moment in zip(rule.states, rule.moments):
        dtype = getattr(torch, each.state_format.dtype(moment))
        entry[key] = torch.zeros_like(each.dense, dtype=dtype, requires_grad=False)
        if each.state_format.blocked:
            entry[scale_key(key)] = torch.zeros(scale_shape(each.param.numel()), device=each.param.device)
    return entry


def _bring_into_layout(state: dict, rule: RuleSpec, dense: torch.Tensor) -> None:
    """Elements in the order of the parameter's in memory. Blocks are runs of memory, so they are taken apart first."""
    if not all(same_layout(state[key], dense) for key in rule.states):
        state.update(decode_states(state, rule))
        for key in rule.states:
            state.pop(scale_key(key), None)
            state[key] = like_parameter(state[key].detach(), dense)
    for key in ("master_param", "param_remainder"):
        if key in state and not same_layout(state[key], dense):
            state[key] = like_parameter(state[key].detach(), dense)


def _is_counter(step: object, device: torch.device) -> bool:
    return (
        isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.device == device and step.numel() == 1
    )
