"""The plan of one optimizer: its state brought into order, its tables, and the watch over both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import increment_version

from .. import _C, passes
from ..checks import check_grad, check_param
from ..control import Control
from ..plan import Bucket, DeviceTables, TensorRow, build_tables, dtype_code, is_dense, like_parameter, same_layout
from ..specs import RuleSpec

__all__ = ["OptimizerPlan"]


@dataclass
class _Tracked:
    """A parameter as the plan sees it."""

    param: torch.Tensor
    dense: torch.Tensor
    """``param``, or a dense copy of one with gaps, which each step fills and writes back."""
    group: int
    grad_dtype: torch.dtype | None = None
    """None while it never had a gradient."""
    row: TensorRow | None = None
    place: tuple[Bucket, int] | None = None


@dataclass
class OptimizerPlan:
    """Valid until ``refresh`` says otherwise."""

    tracked: list[_Tracked]
    tables: list[DeviceTables]
    watch: _C.Watch
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(parameter with gaps, its dense copy)."""
    grads: list[torch.Tensor] = field(default_factory=list)
    """Gradients that were laid out anew for the step under way."""

    @classmethod
    def make(
        cls, optimizer: torch.optim.Optimizer, rule: RuleSpec, controls: dict[torch.device, Control]
    ) -> OptimizerPlan:
        """Checks everything, then creates what state is missing and builds the tables.

        Raises as ``check_grad`` and ``check_param``, and RuntimeError under graph capture; state is as it was then.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # A replay would copy the tables again, from memory that is gone.
            raise RuntimeError(
                "fusedopt: the first step of an optimizer, or one after its parameters or state changed, was run while "
                "a CUDA graph is being captured; call step() once before the capture"
            )
        tracked = list(_track(optimizer))
        for each in tracked:
            if each.grad_dtype is not None:
                _check_state(optimizer.state.get(each.param, {}), rule, each.param)
        fresh = [each.param for each in tracked if each.grad_dtype is not None and not optimizer.state.get(each.param)]
        try:
            return cls._build(optimizer, rule, controls, tracked)
        except BaseException:
            for param in fresh:
                optimizer.state.pop(param, None)
            raise

    @classmethod
    def _build(cls, optimizer, rule, controls, tracked) -> OptimizerPlan:
        active = [each for each in tracked if each.grad_dtype is not None]
        _complete_state(optimizer.state, rule, active)
        for each in active:
            state = optimizer.state[each.param]
            each.row = TensorRow(
                numel=each.param.numel(),
                device=each.param.device,
                grad_dtype=each.grad_dtype,
                param=each.dense,
                states=[state[key] for key in rule.states],
                step=state["step"],
                group=each.group,
            )
        tables, places = build_tables(rule, [each.row for each in active], controls)
        for each, place in zip(active, places):
            each.place = place
        passes.prepare(tables)

        plan = cls(tracked, tables, _C.Watch())
        for each in tracked:
            bucket, slot = each.place or (None, -1)
            code = -1 if each.grad_dtype is None else dtype_code(each.grad_dtype)
            plan.watch.add(each.param, each.dense, each.group, code, bucket.table if bucket else None, slot)
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
                grad = like_parameter(each.param.grad, each.dense)
            self.grads.append(grad)
            bucket.table.set_grad(slot, grad.data_ptr() or 1)
        return True

    def bump_versions(self) -> None:
        """Tells autograd that the parameters with a gradient were written."""
        if not self.watch.bump_versions():
            increment_version([each.param for each in self.tracked if each.param.grad is not None])

    def gather_copies(self) -> None:
        for param, dense in self.copies:
            dense.copy_(param.detach())

    def scatter_copies(self) -> None:
        for param, dense in self.copies:
            param.detach().copy_(dense)


def _track(optimizer: torch.optim.Optimizer) -> Iterator[_Tracked]:
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            where = f"{type(optimizer).__name__}.step: param_groups[{g}]['params'][{i}]"
            check_param(where, param)
            dense = param if is_dense(param) else torch.empty_like(param, requires_grad=False)
            each = _Tracked(param, dense, g)
            if param.grad is not None:
                check_grad(f"{where}.grad", param.grad, param)
                each.grad_dtype = param.grad.dtype
            elif optimizer.state.get(param):
                each.grad_dtype = param.dtype  # until a gradient of another dtype comes
            yield each


def _check_state(state: dict, rule: RuleSpec, param: torch.Tensor) -> None:
    if not state:
        return
    where = f"optimizer state of a parameter of shape {tuple(param.shape)}"
    for key in ("step", *rule.states):
        if key not in state:
            raise ValueError(
                f"{where}: got keys {sorted(state)}, expected '{key}' among them; load a complete checkpoint"
            )
    for key in rule.states:
        tensor = state[key]
        if not isinstance(tensor, torch.Tensor) or tensor.shape != param.shape:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{where}: '{key}' is {got}, expected the parameter's shape; load the matching checkpoint")
        if tensor.device != param.device:
            raise ValueError(
                f"{where}: '{key}' is on {tensor.device}, expected the parameter's {param.device}; "
                "move the optimizer state together with the model"
            )
    dtypes = {state[key].dtype for key in rule.states}
    if len(dtypes) > 1 or (torch.float64 in dtypes) != (param.dtype == torch.float64):
        raise ValueError(
            f"{where}: got states of dtype {sorted(map(str, dtypes))} beside {param.dtype}, expected one dtype, "
            "float64 only with float64; load a checkpoint of this model"
        )


def _complete_state(states: dict, rule: RuleSpec, active: list[_Tracked]) -> None:
    """Creates missing state, and puts step counters and layouts right. New counters are views of one tensor."""
    counters: dict[torch.device, list[tuple[dict, float]]] = {}
    for each in active:
        state = states[each.param]
        if not state:
            state["step"] = 0.0
            for key in rule.states:
                state[key] = torch.zeros_like(each.dense, memory_format=torch.preserve_format, requires_grad=False)
        for key in rule.states:
            if not same_layout(state[key], each.dense):
                state[key] = like_parameter(state[key].detach(), each.dense)
        step = state["step"]
        if not _is_counter(step, each.param.device):
            counters.setdefault(each.param.device, []).append((state, float(step)))
    for device, entries in counters.items():
        values = torch.tensor([value for _, value in entries], dtype=torch.float32).to(device)
        for (state, _), counter in zip(entries, values.unbind()):
            state["step"] = counter


def _is_counter(step: object, device: torch.device) -> bool:
    return (
        isinstance(step, torch.Tensor) and step.dtype == torch.float32 and step.device == device and step.numel() == 1
    )
