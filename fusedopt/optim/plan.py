"""The plan of one optimizer: its state brought into order, its tables, and the watch over both."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.autograd.graph import increment_version

from .. import _C, passes, sharding
from ..backends import for_device
from ..checks import check_grad, check_param
from ..control import Control
from ..formats import (
    check_entry,
    check_format_options,
    param_format,
    scale_key,
)
from ..plan import (
    Bucket,
    DeviceTables,
    TensorRow,
    build_tables,
    dtype_code,
    is_dense,
    like_parameter,
    same_layout,
)
from ..specs import RULES, ParamFormatSpec, RuleSpec, StateFormatSpec
from ..tensor_norms import TensorNorms
from .offload import Arrival, GradientsOnly, Lane, check_offloadable, home_of
from .states import complete_states

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .base import FusedOptimizer

__all__ = ["OptimizerPlan"]


class AccumulatedGrad(Protocol):
    """The main gradient of one parameter, as an accumulator keeps it."""

    tensor: torch.Tensor
    held: _C.Held


@dataclass
class Tracked:
    """A parameter as the plan sees it."""

    param: torch.Tensor
    local: torch.Tensor
    """``param``, or the local tensor of a DTensor: what has the memory."""
    dense: torch.Tensor
    """``local``, or a dense copy of one with gaps, which each step fills and writes back."""
    where: str
    """In messages."""
    group: int
    id: int
    """Position among all parameters of the optimizer."""
    rule: RuleSpec
    param_format: ParamFormatSpec
    main_grad: torch.Tensor | None
    """Its ``main_grad`` attribute, or None where it has no such attribute."""
    accumulated: AccumulatedGrad | None
    """Its main gradient in the optimizer's accumulator."""
    home: torch.device
    """Where its state is: with its memory, or offloaded to the host."""
    is_offloaded: bool = False
    grad_dtype: torch.dtype | None = None
    """None while it never had a gradient."""
    state_format: StateFormatSpec | None = None
    norms: torch.Tensor | None = None
    """Where its sums of squares are added up with other processes'; None where its rule needs none, or has all here."""
    place: tuple[Bucket, int] | None = None
    scratch: dict[str, Any] = field(default_factory=dict)
    """Holds the step counter of a parameter that keeps no state: nobody asks for it, but kernels count."""

    @property
    def keeps_state(self) -> bool:
        """Whether its rule or its format have anything to remember; random bits depend on the step."""
        return bool(self.rule.states or self.param_format.extra or self.param_format.random)

    @property
    def is_grouped(self) -> bool:
        """Whether elements are encoded in groups, so that vectors begin at the first element, aligned or not."""
        assert self.state_format is not None  # its state is there
        return self.param_format.random or self.state_format.random or self.state_format.blocked

    def row(self, states: Mapping[torch.Tensor, dict[str, Any]]) -> TensorRow:
        state, rule = self.entry(states.get(self.param) or self.scratch), self.rule
        assert self.grad_dtype is not None and self.state_format is not None  # it has a gradient, and its state
        blocked = self.state_format.blocked
        return TensorRow(
            numel=self.local.numel(),
            device=self.home,
            grad_dtype=self.grad_dtype,
            rule=rule,
            param_format=self.param_format,
            state_format=self.state_format,
            param=self.dense,
            extra=state[self.param_format.extra[0]] if self.param_format.extra else None,
            states=[state[key] for key in rule.states],
            scales=[state[scale_key(key)] for key in rule.states] if blocked else (),
            step=state["step"],
            main_grad=None if self.accumulated is None else self.accumulated.tensor,
            group=self.group,
            id=self.id,
            spread=None if self.is_offloaded else sharding.spread_of(self.param),  # of the norm, taken elsewhere then
            norms=self.norms,
        )

    def gradient_row(self) -> TensorRow:
        """For passes that only read gradients."""
        assert self.grad_dtype is not None
        main_grad = None if self.accumulated is None else self.accumulated.tensor
        return TensorRow(
            numel=self.local.numel(),
            device=self.local.device,
            grad_dtype=self.grad_dtype,
            main_grad=main_grad,
            spread=sharding.spread_of(self.param),
        )

    def template(self) -> torch.Tensor:
        """A tensor of the layout and dtype of ``dense`` where the state is. Its values say nothing if it is offloaded:
        then its memory is only taken once it is written to."""
        if not self.is_offloaded:
            return self.dense
        return torch.empty_strided(self.dense.shape, self.dense.stride(), dtype=self.dense.dtype, device=self.home)

    @property
    def is_sharded(self) -> bool:
        return self.local is not self.param

    def entry(self, state: dict[str, Any]) -> dict[str, Any]:
        """Its state, as plain tensors."""
        if not sharding.is_sharded(self.param):
            return state
        return sharding.local_entry(f"{self.where}: state", state, self.param)

    def has_fitting_grad(self) -> bool:
        """Whether this step's gradient has the shape and dtype that the tables are for."""
        grad = self.grad
        return grad is not None and grad.dtype == self.grad_dtype and grad.shape == self.param.shape

    def local_grad(self) -> torch.Tensor:
        """This step's gradient as a plain tensor; it may take a collective where gradients lie on another mesh."""
        grad = self.grad
        assert grad is not None  # the watch has seen it
        return sharding.local_grad(f"{self.where}.grad", grad, self.param) if sharding.is_sharded(self.param) else grad

    @property
    def grad(self) -> torch.Tensor | None:
        """This step's gradient."""
        return self.param.grad if self.main_grad is None else self.main_grad

    @property
    def is_updated(self) -> bool:
        """Whether this step has a gradient for it, or earlier micro-batches had one."""
        return self.grad is not None or (self.accumulated is not None and self.accumulated.held.value)


@dataclass
class OptimizerPlan:
    """Valid until ``refresh`` says otherwise."""

    tracked: list[Tracked]
    tables: list[DeviceTables]
    watch: _C.Watch
    backend: str | None = None
    """What was asked for when the tables were built; see ``backends.wanted``."""
    copies: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(parameter with gaps, its dense copy)."""
    grads: dict[int, torch.Tensor] = field(default_factory=dict)
    """Gradients that were laid out anew for the step under way, by number of the tracked parameter."""
    lanes: list[tuple[Lane, list[Tracked]]] = field(default_factory=list)
    """The updates that are offloaded, and of which parameters each is."""
    repetition: _C.RepeatedStep | None = None
    """Of the last step, where the next one may be made like it."""
    alone: _Alone | None = None
    """Where the plan is for one parameter."""
    has_complex: bool = False
    """Whether a complex parameter has had a gradient."""
    fresh: list[torch.Tensor] = field(default_factory=list)
    """Parameters whose state is new, until a pass writes to it."""
    peers: list[sharding.Peers] = field(default_factory=list)
    """Of the meshes on which DTensors among the parameters lie."""
    norms: list[TensorNorms] = field(default_factory=list)
    """Of the DTensors whose rule needs norms over all their parts."""

    @classmethod
    def make(
        cls,
        optimizer: FusedOptimizer,
        rules: list[str],
        controls: dict[torch.device, Control],
        backend: str | None = None,
        only: torch.Tensor | None = None,
    ) -> OptimizerPlan:
        """Checks everything, then creates what state is missing, builds the tables and finds this step's gradients.

        rules: name of each param group's rule. backend: as ``for_device``. only: the one parameter of the optimizer
        that the plan is for; by default all.

        Raises as ``check_grad``, ``check_param`` and ``check_complex_clipping``, and RuntimeError under graph capture.
        Whatever is raised, memory that runs out included, no parameter has new state then; state that had to be
        converted has been, all of a parameter's or nothing.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # A replay would copy the tables again, from memory that is gone.
            raise RuntimeError(
                "fusedopt: the first step of an optimizer, or one after its parameters or state changed, was run while "
                "a CUDA graph is being captured; call step() once before the capture"
            )
        tracked = list(_track(optimizer, rules, only))
        if only is not None and not tracked:
            raise ValueError(
                f"{type(optimizer).__name__}: got a parameter that is in no param group any more, expected one of this "
                "optimizer's; remove() the release of gradients before its parameters are changed"
            )
        if any(each.grad_dtype is not None and each.grad_dtype.is_complex for each in tracked):
            optimizer._check_complex()
        for each in tracked:
            if each.grad_dtype is not None:
                _check_state(each.entry(optimizer.state.get(each.param, {})), each.rule, each.local, each.home)
        fresh = [each.param for each in tracked if each.grad_dtype is not None and not optimizer.state.get(each.param)]
        try:
            plan = cls._build(optimizer, controls, backend, tracked, only)
            if not plan.refresh(optimizer):
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step: parameters or gradients changed while they were being read"
                )
        except BaseException:
            _forget_state(optimizer, fresh)
            raise
        plan.fresh = fresh
        return plan

    @classmethod
    def _build(
        cls,
        optimizer: FusedOptimizer,
        controls: dict[torch.device, Control],
        backend: str | None,
        tracked: list[Tracked],
        only: torch.Tensor | None,
    ) -> OptimizerPlan:
        active = [each for each in tracked if each.grad_dtype is not None]
        complete_states(optimizer, active)
        norms = _tensor_norms(tracked)
        rows = [each.gradient_row() if each.is_offloaded else each.row(optimizer.state) for each in active]
        alone = None
        if only is not None:
            alone = _Alone.of(optimizer, tracked[0])
            for each in tracked:
                each.group = 0
            for row in rows:
                row.group = 0
        offloaded = {each.local.device for each in active if each.is_offloaded}
        tables, places = build_tables(rows, functools.partial(_backend_of, backend, offloaded), controls)
        seed = next((group["seed"] for group in optimizer.param_groups if "seed" in group), 0)
        for bucket in chain.from_iterable(device.buckets for device in tables):
            bucket.args.seed = seed
        for each, place in zip(active, places):
            each.place = place
        passes.prepare(tables)

        plan = cls(tracked, tables, _C.Watch(), backend, alone=alone, norms=norms)
        for each in tracked:
            table, slot = (each.place[0].table, each.place[1]) if each.place else (None, -1)
            code = -1 if each.grad_dtype is None else dtype_code(each.grad_dtype)
            held = None if each.accumulated is None else each.accumulated.held
            plan.watch.add(
                each.param,
                each.dense,
                each.group,
                code,
                table,
                slot,
                hasattr(each.param, "main_grad"),
                held,
                each.local if each.is_sharded else None,
            )
        groups, state = alone.found_in(optimizer) if alone else (optimizer.param_groups, optimizer.state)
        plan.watch.remember_state(state)
        plan.watch.remember_flags(optimizer.rule_keys, groups)
        plan.has_complex = any(each.param.is_complex() for each in active)
        plan.copies = [(each.local, each.dense) for each in active if each.dense is not each.local]
        plan.peers = sharding.peers_of(each.param for each in tracked)
        for device in offloaded:
            assert optimizer._offload is not None
            own = [each for each in active if each.local.device == device]
            lane_rows = [each.row(optimizer.state) for each in own]
            plan.lanes.append((Lane(optimizer._offload, controls[device], device, lane_rows, seed), own))
        return plan

    def refresh(self, optimizer: FusedOptimizer) -> bool:
        """Finds this step's gradients. False if the plan is out of date."""
        relayout: list[int] = []
        self.grads.clear()
        own = self.alone
        groups, state = own.found_in(optimizer) if own else (optimizer.param_groups, optimizer.state)
        if not self.watch.refresh(groups, state, relayout):
            return False
        if any(not self.tracked[i].has_fitting_grad() for i in relayout):
            return False
        for i in relayout:
            self._lay_out(i)
        return True

    @contextmanager
    def fresh_state_only_if_used(self, optimizer: FusedOptimizer) -> Iterator[None]:
        """Around a step: where it fails before its update pass, state is as it was before the plan was made."""
        try:
            yield
        except BaseException:
            _forget_state(optimizer, self.fresh)
            raise

    @torch.no_grad()
    def _lay_out(self, i: int) -> None:
        """Gives the passes a gradient that the watch could not."""
        each = self.tracked[i]
        assert each.place is not None  # the watch asks for none but gradients of tables
        bucket, slot = each.place
        grad, whole = each.local_grad(), each.grad
        if sharding.is_sharded(whole) and grad is sharding.local_of(whole):
            self.watch.know_spec(i, whole._spec)
        if not same_layout(grad, each.dense):
            grad = like_parameter(grad, each.dense)
        self.grads[i] = grad
        bucket.table.set_grad(slot, grad.data_ptr() or 2)

    def description(self, groups: list[dict[str, Any]]) -> list[tuple[Any, str]]:
        """Of each DTensor: its mesh, and what must be the same in all processes of the mesh."""
        described = []
        for each in self.tracked:
            param = each.param
            if sharding.is_sharded(param):
                where, spread = each.where.partition(": ")[2], sharding.spread_of(param)
                text = f"{where}: {param.dtype} {tuple(param.shape)} {param.placements}, on {each.local.device.type}"
                text += f", rule {each.rule.name}"
                # Copies of the same elements are rounded alike only with the same random bits.
                seed = groups[each.group].get("seed") if spread and spread.replicated else None
                text += f", format {each.param_format.name}" + ("" if seed is None else f", seed {seed}")
                described.append((param.device_mesh, text))
        return described

    def begin(
        self, where: str, scalars: passes.StepScalars, names: tuple[str, ...], groups: list[dict[str, Any]]
    ) -> None:
        """Gets everything ready for the passes ``names``; whatever can fail fails here. As ``passes.begin``."""
        passes.begin(self.tables, scalars, names, groups)
        for lane, _ in self.lanes:
            lane.begin(where, scalars, names, groups)

    def update(self) -> None:
        """The update pass, on devices and, for what is offloaded, on the host."""
        passes.run_update(self.tables, self.norms)
        if not self.lanes:
            return
        numbers = {id(each): i for i, each in enumerate(self.tracked)} if self.grads else {}
        try:
            for lane, own in self.lanes:
                lane.start([each.dense for each in own], [self._arrival(each, numbers) for each in own])
            for lane, _ in self.lanes:
                lane.finish()
        finally:
            for lane, _ in self.lanes:
                lane.end()

    def learning_rates(self) -> list[float]:
        """Of all param groups, in the last step; see ``DeviceTables``."""
        every = (*self.tables, *(lane.tables for lane, _ in self.lanes))
        return next((rates for tables in every if (rates := tables.learning_rates())), [])

    @property
    def staging_bytes(self) -> int:
        """Of pinned memory through which offloaded tensors pass."""
        return sum(lane.staging_bytes for lane, _ in self.lanes)

    def _arrival(self, each: Tracked, numbers: dict[int, int]) -> Arrival:
        """What this step has for a parameter that is offloaded."""
        main, grad = each.accumulated, self.grads.get(numbers.get(id(each), -1))
        if grad is None and each.grad is not None:
            grad = each.local_grad()
        return Arrival(grad, main.tensor if main is not None and main.held.value else None)

    def bump_versions(self) -> None:
        """Tells autograd that the parameters with a gradient were written."""
        if not self.watch.bump_versions():
            written = [each for each in self.tracked if each.is_updated]
            increment_version([each.param for each in written])
            increment_version([each.local for each in written if each.is_sharded])

    def gather_copies(self) -> None:
        for param, dense in self.copies:
            dense.copy_(param.detach())

    def scatter_copies(self) -> None:
        for param, dense in self.copies:
            param.detach().copy_(dense)


@dataclass
class _Alone:
    """One parameter as if it were all of an optimizer."""

    param: torch.Tensor
    state: dict[torch.Tensor, dict[str, Any]]
    """By parameter, as an optimizer's; empty where the parameter has none."""
    group: int
    """Of the optimizer."""

    @classmethod
    def of(cls, optimizer: FusedOptimizer, each: Tracked) -> _Alone:
        entry = optimizer.state.get(each.param)
        return cls(each.param, {} if entry is None else {each.param: entry}, each.group)

    def hyper(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The param groups whose hyper-parameters the tables refer to."""
        return groups[self.group : self.group + 1]

    def found_in(self, optimizer: FusedOptimizer) -> tuple[list[dict[str, Any]], dict[torch.Tensor, dict[str, Any]]]:
        """Its group, without others' parameters, and its state; another dict where the optimizer's was replaced."""
        groups = [{**group, "params": [self.param]} for group in self.hyper(optimizer.param_groups)]
        same = optimizer.state.get(self.param) is self.state.get(self.param)
        return groups, self.state if same else {}


def _track(optimizer: FusedOptimizer, rules: list[str], only: torch.Tensor | None) -> Iterator[Tracked]:
    position = count()
    for g, group in enumerate(optimizer.param_groups):
        rule = RULES[rules[g]]
        check_format_options(f"{type(optimizer).__name__}.step: param_groups[{g}]", group, rule)
        for i, param in enumerate(group["params"]):
            id = next(position)
            if only is not None and param is not only:
                continue
            where = f"{type(optimizer).__name__}.step: param_groups[{g}]['params'][{i}]"
            check_param(where, param, sharded=True)
            local = sharding.local_of(param)
            is_offloaded = optimizer._offload is not None and optimizer._offload.covers(local.device)
            if sharding.is_sharded(param):
                if is_offloaded:
                    check_offloadable(where, param, rule)
                _check_sharded(where, param)
            dense = local if is_dense(local) else torch.empty_like(local, requires_grad=False)
            each = Tracked(
                param=param,
                local=local,
                dense=dense,
                where=where,
                group=g,
                id=id,
                rule=rule,
                param_format=param_format(where, group, param.dtype),
                main_grad=_main_grad(where, param),
                accumulated=optimizer._accumulated_grad(where, param),
                home=home_of(optimizer, local.device),
                is_offloaded=is_offloaded,
            )
            if each.grad is not None:
                check_grad(f"{where}.{'grad' if each.main_grad is None else 'main_grad'}", each.grad, param)
                each.grad_dtype = each.grad.dtype
            elif optimizer.state.get(param) or each.is_updated:
                each.grad_dtype = param.dtype  # until a gradient of another dtype comes
            yield each


def _backend_of(backend: str | None, offloaded: set[torch.device], device: torch.device) -> Any:
    """What runs the passes on a device; of ``offloaded`` ones those over gradients."""
    found = for_device(device, backend)
    return GradientsOnly(found) if device in offloaded else found


def _tensor_norms(tracked: list[Tracked]) -> list[TensorNorms]:
    """Of those that have parts in other processes and a rule that needs their norms: with a gradient or without, for
    the rows must be the same in all processes. Tells each where its row is."""
    alike: dict[tuple[sharding.Spread, torch.device], list[Tracked]] = {}
    for each in tracked:
        spread = sharding.spread_of(each.param) if each.rule.norms else None
        if spread is not None and spread.is_split:
            alike.setdefault((spread, each.home), []).append(each)
    made = []
    for (spread, home), own in alike.items():
        most = max(each.rule.norms for each in own)
        sums = torch.zeros(len(own), most, dtype=torch.float64, device=home)
        for each, row in zip(own, sums):
            each.norms = row
        absent = [i for i, each in enumerate(own) if each.grad_dtype is None]
        made.append(TensorNorms.of(spread, sums, absent))
    return made


def _check_sharded(where: str, param: DTensor) -> None:
    """ValueError for one that keeps gradients elsewhere than in ``.grad``."""
    if getattr(param, "main_grad", None) is not None:
        raise ValueError(f"{where} is a DTensor with a main_grad, expected its gradient in .grad; remove the attribute")


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


def _check_state(state: dict[str, Any], rule: RuleSpec, param: torch.Tensor, home: torch.device) -> None:
    where = f"optimizer state of a parameter of shape {tuple(param.shape)}"
    check_entry(where, state, param, rule)
    for key, value in state.items():
        if key != "step" and isinstance(value, torch.Tensor) and value.device != home:
            expected = f"the parameter's {home}" if home == param.device else f"{home}, where it is offloaded to"
            raise ValueError(
                f"{where}: '{key}' is on {value.device}, expected {expected}; "
                "move the optimizer state together with the model, or load it with load_state_dict()"
            )


def _forget_state(optimizer: FusedOptimizer, params: list[torch.Tensor]) -> None:
    for param in params:
        optimizer.state.pop(param, None)
