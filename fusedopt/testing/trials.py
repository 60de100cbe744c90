"""Trials: one optimizer on one data set, each step judged. Ours, whose states are known, and anybody's."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference, specs
from ..accumulate import GradAccumulator
from .accumulated import Expected, compute_type
from .bounds import Bounded, Comparison, bounded_step, compare, concatenated, hyper_of
from .cases import Case
from .formats import in_order
from .judge import alike, before_step, block_of, check_norm, copies_of, judge_values, set_gradient
from .tensors import Copies, assert_same_bits, bits, check, on_cpu, storage

__all__ = [
    "MAX_NORM",
    "MAX_VALUE",
    "MICRO_BATCHES",
    "SCALE",
    "ForeignTrial",
    "FusedTrial",
    "LeftOut",
    "make_foreign",
    "threads",
]

SCALE = 1024.0
"""Transform "scale": gradients are this times too large, and divided by it, as a GradScaler has it."""
MAX_NORM = 1.0
"""Transform "clip": the total norm."""
MAX_VALUE = 0.5
"""Transform "value_clip": of each element."""
MICRO_BATCHES = 3
"""Transform "accumulate": the step is on the mean of so many gradients."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many threads of torch. The judge takes one: for its small tensors more are slower, and much slower where
    cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LeftOut(Exception):
    """The case means nothing for this optimizer; the message says why."""


class Trial:
    """Parameters, their optimizer, and steps with the gradients of the case."""

    opt: torch.optim.Optimizer

    def __init__(self, case: Case, num_threads: int) -> None:
        self.case = case
        self.params = case.data.make_params(case.format.dtype, case.device)
        self._indices = {id(p): i for i, p in enumerate(self.params)}
        several = sum(p.numel() for p in self.params) > specs.CPU_CHUNK  # else there is nothing to share out
        self.threads = num_threads if several else 1

    def step(self, number: int) -> list[Comparison]:
        """Step ``number`` (from 0): the parameters beside the reference's. AssertionError for what else is wrong."""
        count = MICRO_BATCHES if self.case.transform == "accumulate" else 1
        batches = [self.case.data.make_grads(self.params, self.case.grad_dtype, number, k) for k in range(count)]
        if number == 0:
            self._memory = self._memory_of(Copies(self.params))
        comparisons, after = self._judged_step(batches)
        self._check_elsewhere(after, [grad is not None for grad in batches[0]])
        self._memory = self._memory_of(after)
        if number == 0 and self.case.data.counter is not None:
            self._set_counters(self.case.data.counter)
        return comparisons

    def _memory_of(self, copies: Copies) -> list[Tensor]:
        """Of each parameter, what the storage that it is in holds: once for those that are slices of one."""
        memory: dict[int, Tensor] = {}
        for p in self.params:
            if (address := _address(p)) not in memory:
                memory[address] = storage(copies[p]).clone()
        return [memory[_address(p)] for p in self.params]

    def _check_elsewhere(self, after: Copies, moved: list[bool]) -> None:
        """No element changed since the step before but those of parameters with a gradient; several may share a
        storage."""
        filled = {_address(p) for p, own in zip(self.params, moved, strict=True) if own and _fills_storage(p)}
        others = [(i, p) for i, p in enumerate(self.params) if _address(p) not in filled]
        reached = {_address(p): torch.zeros(storage(p).numel(), dtype=torch.bool) for _, p in others}
        for i, p in others:
            if moved[i]:
                reached[_address(p)].as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
        for i, p in others:
            outside = ~reached[_address(p)]
            same = torch.equal(bits(storage(after[p]))[outside], bits(self._memory[i])[outside])
            check(same, f"wrote outside of the parameters that have a gradient, in the storage of parameter {i}")

    def _judged_step(self, batches: list[list[Tensor | None]]) -> tuple[list[Comparison], Copies]:
        """The parameters beside the reference's, and copies of at least the parameters after the step."""
        raise NotImplementedError

    def _set_counters(self, count: int) -> None:
        """Those of parameters, and of param groups, where some optimizers have them."""
        for entry in (*self.opt.state.values(), *self.opt.param_groups):
            if isinstance(entry.get("step"), Tensor):
                entry["step"].fill_(count)
            elif "step" in entry:
                entry["step"] = count

    def _index(self, p: Tensor) -> int:
        return self._indices[id(p)]


def _address(p: Tensor) -> int:
    return p.untyped_storage().data_ptr()


def _fills_storage(p: Tensor) -> bool:
    """Whether every element of its storage is its own: that of most parameters."""
    return p.numel() * p.element_size() == p.untyped_storage().nbytes()


# ---- optimizers of fusedopt ---------------------------------------------------------------------------------------


class FusedTrial(Trial):
    """An optimizer of fusedopt. Each step starts from what is stored, and states are judged too."""

    def __init__(self, case: Case, num_threads: int = 1) -> None:
        super().__init__(case, num_threads)
        chosen: dict[str, Any] = {"backend": case.backend, **case.format.options, **dict(case.data.hyper)}
        chosen |= {"clip": {"max_grad_norm": MAX_NORM}, "value_clip": {"max_grad_value": MAX_VALUE}}.get(
            case.transform, {}
        )
        if case.format.state_dtype == "int8":
            chosen["min_8bit_size"] = 1
        if case.format.is_random:
            chosen["seed"] = 1
        self.opt = case.variant.make(self.params, **chosen)
        self.accumulator = GradAccumulator(self.opt) if case.transform == "accumulate" else None

    def _judged_step(self, batches):
        rule, transform = self.case.variant.rule, {}
        expected = Expected(self.params)
        for k, grads in enumerate(batches):
            for p, grad in zip(self.params, grads, strict=True):
                self._give(p, grad)
            if k + 1 < len(batches):
                expected.fold()
                self.accumulator.accumulate()
        records = before_step(self.opt, rule)
        if self.accumulator is not None:
            self._put_sums(records, expected)
            transform["grad_scale"] = expected.divisor()
        elif self.case.transform == "scale":
            transform["grad_scale"] = SCALE
        elif self.case.transform == "value_clip":
            transform["max_grad_value"] = MAX_VALUE
        self._step()
        coefs: dict[str, float] = {}
        if records and self.case.transform == "clip":
            single, double = check_norm(self.opt, records, **transform)
            # Float64 parameters are scaled by the coefficient before it was rounded to float32.
            coefs = {"float32": single, "float64": double}
        after = copies_of(self.opt, self.params, (grad for grad in batches[-1] if grad is not None))
        given = [r for r in records if r.grad_bits is not None]
        assert_same_bits([after[batches[-1][self._index(r.tensor)]] for r in given], [r.grad_bits for r in given])
        return [self._judge(some, after, coefs, transform) for some in alike(self.opt, rule, records)], after

    def _give(self, p: Tensor, grad: Tensor | None) -> None:
        if grad is not None:
            set_gradient(p, grad)
        else:
            p.grad = None
            if hasattr(p, "main_grad"):
                p.main_grad = None

    def _put_sums(self, records: list, expected: Expected) -> None:
        totals = expected.total()
        for r in records:
            total = totals[r.tensor]
            value, error = (in_order(t, r.tensor) for t in (total.value, total.error))
            r.grad, r.grad_bits = Bounded(value, error, total.compute), None

    def _step(self) -> None:
        scaled = self.case.transform == "scale"
        if scaled:
            device = self.params[0].device
            self.opt.grad_scale, self.opt.found_inf = (torch.full((), x, device=device) for x in (SCALE, 0.0))
        with threads(self.threads):
            self.opt.step()
        if scaled:
            del self.opt.grad_scale, self.opt.found_inf

    def _judge(self, records: list, after: Copies, coefs: dict[str, float], transform: dict) -> Comparison:
        if coefs:
            wide = records[0].tensor.dtype == torch.float64
            transform = {**transform, "clip_coef": coefs["float64" if wide else "float32"]}
        comparison = judge_values(self.opt, self.case.variant.rule, records, after, **transform)
        block = block_of(self.opt, records)
        sizes = [r.tensor.numel() for r in records]
        padded = [n + -n % block for n in sizes]
        comparison.parts = list(zip(map(self._index, (r.tensor for r in records)), sizes, padded, strict=True))
        return comparison


# ---- anybody's ----------------------------------------------------------------------------------------------------


def _accepted(factory: Callable) -> set[str] | None:
    """Names of the keyword arguments; None where it takes any."""
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def make_foreign(factory: Callable, case: Case, params: list) -> tuple[torch.optim.Optimizer, dict]:
    """The optimizer ``factory(params, **kwargs)`` with the case's hyper-parameters, and those that it then has.

    All are named, since defaults differ; of those that it does not take, its param group tells the value.
    """
    rule, own = case.variant.rule, case.variant.make([torch.nn.Parameter(torch.zeros(1))])
    asked = {**case.variant.kwargs, **dict(case.data.hyper)}
    hyper = hyper_of(own.param_groups[0], rule) | dict(case.data.hyper)
    accepted = _accepted(factory)
    refused = [key for key in asked if accepted is not None and key not in accepted]
    if refused:
        raise LeftOut(f"it takes no argument {refused[0]!r}")
    # Flags that choose between rules are passed where the variant names them: not every class has all of them.
    wanted = hyper | asked
    opt = factory(params, **{key: value for key, value in wanted.items() if accepted is None or key in accepted})
    group = opt.param_groups[0]
    hyper |= {key: group[key] for key in hyper if accepted is not None and key not in accepted and key in group}
    return opt, {**hyper, "maximize": bool(asked.get("maximize", False))}


@dataclasses.dataclass
class _Known:
    """What the reference knows of one parameter: its states with bounds, and how many steps it made."""

    states: dict[str, Bounded]
    step: int = 0


class ForeignTrial(Trial):
    """Any torch-style optimizer. Only parameters are looked at: the reference keeps its own states, with bounds that
    grow by the roundings of each step, and starts each step from the parameter as it is.

    Gradients are transformed the torch way before the step, and the step is judged on what came out.
    """

    def __init__(self, case: Case, factory: Callable, num_threads: int = 1) -> None:
        super().__init__(case, num_threads)
        self.opt, self.hyper = make_foreign(factory, case, self.params)
        self.maximize = self.hyper.pop("maximize")
        self.known = {p: self._new_states(p) for p in self.params}

    def _new_states(self, p: Tensor) -> _Known:
        first = self.case.variant.kwargs.get("initial_accumulator_value", 0.0)
        first = torch.full((p.numel(),), first, dtype=p.dtype)
        return _Known(
            {name: Bounded.exact(first, compute_type(p)) for name in reference.STATES[self.case.variant.rule]}
        )

    def _judged_step(self, batches):
        for p, *grads in zip(self.params, *batches, strict=True):
            p.grad = None if grads[0] is None else self._sum(p, grads)
        self._transform()
        moved = [p for p in self.params if p.grad is not None]
        copies = on_cpu([*moved, *(p.grad for p in moved)])
        before, grads = (
            {p: copy.clone().reshape(-1) for p, copy in zip(moved, some, strict=True)}
            for some in (copies[: len(moved)], copies[len(moved) :])
        )
        with threads(self.threads):
            self.opt.step()
        groups: dict[tuple, list] = {}
        for p in moved:
            own = id(p) if specs.RULES[self.case.variant.rule].norms else 0
            groups.setdefault((p.dtype, self.known[p].step, own), []).append(p)
        after = Copies(self.params)
        return [self._judge(params, before, grads, after) for params in groups.values()], after

    def _sum(self, p: Tensor, grads: list[Tensor]) -> Tensor:
        if len(grads) == 1:
            return grads[0].to(p.dtype)
        return sum(g.to(p.dtype) for g in grads) / len(grads)

    def _transform(self) -> None:
        given = [p for p in self.params if p.grad is not None]
        if not given:  # torch's functions refuse empty lists
            return
        if self.case.transform == "scale":
            torch._foreach_mul_([p.grad for p in given], 1 / SCALE)
        elif self.case.transform == "clip":
            torch.nn.utils.clip_grad_norm_(given, MAX_NORM)
        elif self.case.transform == "value_clip":
            torch.nn.utils.clip_grad_value_(given, MAX_VALUE)

    def _judge(self, params: list, before: dict, grads: dict, after: Copies) -> Comparison:
        rule, known = self.case.variant.rule, [self.known[p] for p in params]
        names = reference.STATES[rule]
        start = torch.cat([before[p] for p in params])
        expected = bounded_step(
            rule,
            start,
            torch.cat([grads[p] for p in params]),
            {name: concatenated([k.states[name] for k in known]) for name in names},
            step=known[0].step + 1,
            maximize=self.maximize,
            hyper=self.hyper,
        )
        for name in names:
            self._keep(params, name, expected[name])
        for k in known:
            k.step += 1
        actual = torch.cat([after[p].reshape(-1) for p in params])
        comparison = compare(actual, expected["param"], f"param, {rule}")
        comparison.parts = [(self._index(p), p.numel(), p.numel()) for p in params]
        comparison.before = start
        return comparison

    def _keep(self, params: list, name: str, state: Bounded) -> None:
        """The state after the step of parameters of one dtype. States in 16 bits, as torch has them, are rounded once
        more at the store."""
        error, dtype, sizes = state.error, params[0].dtype, [p.numel() for p in params]
        if dtype.itemsize == 2:
            error = error + reference.ulp(state.value.abs() + error.nan_to_num(0.0), dtype) / 2
        for p, v, e in zip(params, state.value.split(sizes), error.split(sizes), strict=True):
            self.known[p].states[name] = Bounded(v, e, compute_type(p))

    def _set_counters(self, count: int) -> None:
        hidden = not any("step" in entry for entry in (*self.opt.state.values(), *self.opt.param_groups))
        keys = {key for _, key, _ in specs.RULES[self.case.variant.rule].hyper}
        if hidden and self.case.variant.rule != "lion" and keys & {"betas", "lr_decay"}:
            raise LeftOut("it has no step counter that can be set")
        super()._set_counters(count)
        for known in self.known.values():
            known.step = count
