"""What an input is: a few calls of ``fusedopt._C``, drawn from a generator of random numbers.

Most functions check all they are given. Some are given addresses as integers, which nobody can check: that memory of
the right size and alignment is there is the caller's part, so here it is, to the byte; everything else may be wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fusedopt import _C, structs
from fusedopt.specs import PARAM_FORMATS, RULES, STATE_FORMATS

from .memory import Memory
from .values import hostile, integer, number, tensor

__all__ = ["EXPECTED", "run"]

EXPECTED = (TypeError, ValueError, IndexError, RuntimeError, OverflowError, AttributeError, ZeroDivisionError)
"""What a call may raise: the last one is of the objects in values.py."""

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_EXTRA_SIZES = {"float32": 4, "int16": 2, "int8": 1}
_DTYPES = tuple(_SIZES)
_RULES = tuple(RULES.values())
_TWO_PHASES = tuple(i for i, rule in enumerate(_RULES) if rule.norms)
_PARAMS = tuple(PARAM_FORMATS.values())
_STATES = tuple(STATE_FORMATS.values())
_NUMEL = (0, 1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 511, 513, 1000, 1023, 1024, 1025, 2049)


class Calls:
    """Makes calls, and counts by function which came back and which raised."""

    def __init__(self, counts: Counter) -> None:
        self.counts = counts

    def __call__(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except EXPECTED:
            self.counts[name, "refused"] += 1
            return None
        self.counts[name, "done"] += 1
        return result


def run(rng: random.Random, counts: Counter) -> None:
    """One input."""
    memory = Memory(rng)
    kind = rng.random()
    scenario = _any_calls if kind < 0.45 else _passes if kind < 0.8 else _watch if kind < 0.95 else _repetition
    scenario(rng, Calls(counts), memory)
    memory.check()
    if rng.random() < 0.001:
        gc.collect()


def _maybe(rng: random.Random, value: Any, chance: float = 0.03) -> Any:
    return hostile(rng) if rng.random() < chance else value


# ---- calls of anything with anything; nothing here follows an address --------------------------------------------


def _hypers(rng: random.Random, call: Calls) -> _C.Hypers:
    names = [rng.choice(("lr", "betas", "eps", "", "weight_decay")) for _ in range(rng.choice((0, 1, 3, 10, 11)))]
    keys = [(name, rng.choice((-1, 0, 1, 2**31 - 1, -5))) for name in names]
    return call("Hypers", _C.Hypers, _maybe(rng, keys)) or _C.Hypers([("lr", -1)])


def _table(rng: random.Random, call: Calls) -> _C.Table:
    size = rng.choice((1, 2, 256, 1000, 2**31 - 1)) if rng.random() < 0.7 else integer(rng)
    table = call("Table", _C.Table, size) or _C.Table(256)
    for _ in range(rng.randrange(4)):
        _add(rng, call, table)
    return table


def _add(rng: random.Random, call: Calls, table: _C.Table) -> None:
    """Sizes between these would take gigabytes of chunks."""
    numel = rng.choice((0, 1, 5, 300, -1, 2**62 + 7, 2**63 - 1, 2**64, -(2**63)))
    call(
        "Table.add",
        table.add,
        *(integer(rng) for _ in range(2)),
        _maybe(rng, [integer(rng) for _ in range(rng.choice((0, 1, 2, 4, 5)))]),
        _maybe(rng, [integer(rng) for _ in range(rng.choice((0, 0, 1, 5)))]),
        integer(rng),
        integer(rng),
        numel,
        rng.choice((0, 1, 5)) if rng.random() < 0.8 else integer(rng),
        integer(rng),
        *([] if rng.random() < 0.5 else [integer(rng)]),
    )


def _group(rng: random.Random) -> Any:
    group = {key: number(rng) for key in ("lr", "eps", "weight_decay", "maximize") if rng.random() < 0.8}
    group["betas"] = rng.choice(((0.9, 0.99), [0.9, 0.99], (0.9,), torch.zeros(2), None))
    return _maybe(rng, group, 0.1)


_ARGS_FIELDS = [name for name in dir(_C.PassArgs) if not name.startswith("_")]


def _any_call(rng: random.Random, call: Calls, table: _C.Table, hypers: _C.Hypers, args: _C.PassArgs) -> None:
    some = lambda value: _maybe(rng, value)  # noqa: E731
    ints = lambda count: [integer(rng) for _ in range(count)]  # noqa: E731
    groups = some([_group(rng) for _ in range(rng.randrange(4))])
    field = rng.choice(_ARGS_FIELDS)
    choices: dict[str, tuple] = {
        "Table.add": (lambda: _add(rng, call, table),),
        "Table.set_grad": (table.set_grad, *ints(2)),
        "Table.pack": (table.pack, some(hypers), rng.choice((0, 1, 3840, 32768, 32769, 2**40, -1))),
        "Table.packed_bytes": (table.packed_bytes, *ints(1)),
        "Table.entries": (table.entries,),
        "Table.chunks": (table.chunks,),
        "Hypers.pack": (hypers.pack, groups),
        "Hypers.set_value": (hypers.set_value, rng.choice((0, 1, *ints(2))), rng.choice((0, 9, *ints(2))), number(rng)),
        "Hypers.set_lr_address": (hypers.set_lr_address, rng.choice((0, 1, *ints(2))), *ints(1), some(True)),
        "Hypers.learning_rates": (hypers.learning_rates,),
        f"PassArgs.{field}": (setattr, args, field, integer(rng)),
        "getattr": (getattr, args, field),
        "set_scalars": (
            _C.set_scalars, some(rng.choice(([], [args], [args, args], [None], [args, None], [table]))), *ints(4),
            number(rng), number(rng), rng.choice((0, 1, 2, 3, -1, 2**31, 2**40)), some(False), *ints(1), number(rng),
            *ints(1), number(rng), *ints(1),
        ),
        "cuda_upload": (_C.cuda_upload, *ints(4), some(table), rng.choice((0, 8, 2**40, -1)), *ints(2)),
        "cuda_launch": (_C.cuda_launch, *ints(4), some(args), rng.choice((table, None, 5)), some(True)),
        "cuda_driver_version": (_C.cuda_driver_version,),
        "cuda_primary_context": (_C.cuda_primary_context, *ints(1)),
        "cuda_load": (_C.cuda_load, *ints(1), some("cubin"), some("entry")),
        "rules": (_C.rules,),
        "cpu_isa": (_C.cpu_isa,),
        "has_tensor_layout": (_C.has_tensor_layout,),
        "has_torch_functions": (_C.has_torch_functions,),
        "Epoch.advance": (_C.Epoch().advance, *[1][: rng.randrange(2)]),
        "Held": (_C.Held, some(rng.choice((_C.Epoch(), None)))),
        "Held.value": (setattr, _C.Held(_C.Epoch()), "value", some(True)),
    }  # fmt: skip
    name = rng.choice(list(choices))
    function, *arguments = choices[name]
    if arguments and rng.random() < 0.1:
        arguments = rng.choice((arguments[:-1], [*arguments, 1], [hostile(rng) for _ in arguments]))
    call(name, function, *arguments)


def _any_calls(rng: random.Random, call: Calls, memory: Memory) -> None:
    if _has_cuda():
        return  # any integer would be launched
    table, hypers, args = _table(rng, call), _hypers(rng, call), _C.PassArgs()
    call("Hypers.pack", hypers.pack, [_group(rng) for _ in range(rng.randrange(3))])
    for _ in range(rng.randrange(1, 6)):
        _any_call(rng, call, table, hypers, args)


def _has_cuda() -> bool:
    return torch.cuda.is_available()


# ---- passes over memory of the right sizes ------------------------------------------------------------------------


def _code(rng: random.Random, count: int, chance: float = 0.02) -> Any:
    return rng.choice((-1, count, count + 1, 99, 2**31 - 1, -(2**31), 2**31, None, "0")) if rng.random() < chance else (
        rng.randrange(count)
    )  # fmt: skip


def _of(table: tuple, code: Any) -> Any:
    """The row, or the first one where the code is none."""
    return table[code] if isinstance(code, int) and 0 <= code < len(table) else table[0]


class _Codes:
    """Of one combination, mostly one that exists."""

    def __init__(self, rng: random.Random) -> None:
        wide = rng.random() < 0.15
        wanted = lambda name: (name == "float64") == wide  # noqa: E731
        pick = lambda names: rng.choice([i for i, name in enumerate(names) if wanted(name)])  # noqa: E731
        kept = lambda code, count: _code(rng, count, 1.0) if rng.random() < 0.02 else code  # noqa: E731
        self.rule = rng.choice(_TWO_PHASES) if rng.random() < 0.2 else _code(rng, len(_RULES))
        self.grad = kept(pick(_DTYPES), 4)
        self.main = kept(pick(_DTYPES), 4)
        self.param = kept(pick([spec.dtype for spec in _PARAMS]), len(_PARAMS))
        self.state = kept(pick([spec.name for spec in _STATES]), len(_STATES))
        if rng.random() < 0.03:  # of different widths
            self.param, self.state = rng.randrange(len(_PARAMS)), rng.randrange(len(_STATES))


def _address(rng: random.Random, memory: Memory, size: int, chance: float = 0.01) -> int:
    """Missing, now and then."""
    missing = rng.random() < (0.5 if size == 0 else chance)
    return 0 if missing else memory.block(size)


def _add_memory(rng: random.Random, memory: Memory, call: Calls, table: _C.Table, codes: _Codes, groups: int) -> None:
    rule, param, state = _of(_RULES, codes.rule), _of(_PARAMS, codes.param), _of(_STATES, codes.state)
    numel = rng.choice(_NUMEL)
    extra = numel * _EXTRA_SIZES[param.extra[1]] if param.extra else 0
    element = 1 if state.blocked else _SIZES[state.dtype("first")]
    states = [_address(rng, memory, numel * element) for _ in rule.states]
    scales = [_address(rng, memory, 4 * -(-numel // 256)) for _ in rule.states] if state.blocked else []
    main = memory.block(numel * _SIZES[_of(_DTYPES, codes.main)]) if rng.random() < 0.5 else 0
    slot = call(
        "Table.add",
        table.add,
        _address(rng, memory, numel * _SIZES[param.dtype]),
        _address(rng, memory, extra) if param.extra else 0,
        states,
        scales[: len(scales) - (rng.random() < 0.01)],
        memory.floats(rng.choice((0.0, 1.0, 5.0, 2.0**24))) if rng.random() < 0.99 else 0,
        main,
        numel,
        rng.randrange(groups) if rng.random() < 0.98 else groups,
        rng.randrange(2**32),
        _address(rng, memory, 8 * rule.norms),
    )
    if slot is not None and rng.random() < 0.9:
        grad = memory.block(numel * _SIZES[_of(_DTYPES, codes.grad)])
        call("Table.set_grad", table.set_grad, slot, grad | (rng.random() < 0.005))


def _scalars(rng: random.Random, memory: Memory, call: Calls, args: _C.PassArgs) -> None:
    at = lambda *values: memory.floats(rng.choice(values)) if rng.random() < 0.3 else 0  # noqa: E731
    call(
        "set_scalars",
        _C.set_scalars,
        [args],
        at(1.0, 65536.0, 0.0, float("nan")),
        at(0.0, 0.0, 1.0),
        memory.doubles(rng.choice((1.0, 0.5, float("nan")))) if rng.random() < 0.3 else 0,
        at(0.0, 0.0, 1.0),
        rng.choice((float("inf"), 1.0, 0.0, -1.0)),
        rng.choice((float("inf"), 1.0, 0.0)),
        rng.choice((0, 1, 2)),
        rng.random() < 0.5,
        memory.floats(0.0) if rng.random() < 0.3 else 0,
        rng.choice((1.0, 1.0, 0.5)),
        at(1.0, 0.5),
        rng.choice((1.0, 1.0, 3.0)),
        at(1.0, 3.0),
    )


def _passes(rng: random.Random, call: Calls, memory: Memory) -> None:
    codes, groups = _Codes(rng), rng.choice((1, 1, 2, 3))
    rule = _of(_RULES, codes.rule)
    table = _C.Table(rng.choice((256, 512, 1024, 4096)) if rng.random() < 0.95 else rng.choice((1, 3, 100, 255, 257)))
    hypers, args = _C.Hypers([(key, index) for _, key, index in rule.hyper]), _C.PassArgs()
    hypers.pack([{key: rng.choice((0.0, 0.5, 0.9, 1e-8, 1.0)) for _, key, _ in rule.hyper} for _ in range(groups)])
    for _ in range(rng.randrange(5)):
        _add_memory(rng, memory, call, table, codes, groups)
    _scalars(rng, memory, call, args)
    args.control = memory.block(64) if rng.random() < 0.9 else 0
    args.lead, args.seed = rng.randrange(2), rng.randrange(2**64)
    threads = lambda: rng.choice((1, 2, 3, 8)) if rng.random() < 0.97 else rng.choice((0, -1, 10**6, 2**31, None))  # noqa: E731
    some = lambda value: _maybe(rng, value, 0.01)  # noqa: E731
    names = ("norm", "finalize", "measure", "update", "accumulate", "scale", "pack")
    for name in rng.choices(names, k=rng.randrange(1, 4)):
        if name == "norm":
            call("cpu_norm", _C.cpu_norm, some(table), codes.grad, codes.main, args, number(rng), 0.0, threads())
        elif name == "finalize":
            call("cpu_finalize_norm", _C.cpu_finalize_norm, some(args), number(rng), number(rng))
        elif name in ("measure", "update"):
            given = (codes.rule, codes.param, codes.grad, codes.main, codes.state)
            part = (rng.randrange(-1, 8), rng.randrange(-1, 8)) if rng.random() < 0.3 else ()
            function = getattr(_C, f"cpu_{name}")
            call(f"cpu_{name}", function, some(table), some(hypers), *given, some(args), threads(), *part)
        elif name == "accumulate":
            call("cpu_accumulate", _C.cpu_accumulate, some(table), codes.grad, codes.main, args, threads())
        elif name == "scale":
            call("cpu_scale", _C.cpu_scale, some(table), codes.grad, some(args), threads())
        else:
            to = memory.block(_ARGS_SIZE + table.packed_bytes(groups)) if rng.random() < 0.95 else 0
            previous = memory.block(_ARGS_SIZE + table.packed_bytes(groups)) if rng.random() < 0.5 else 0
            call("pack_step", _C.pack_step, to, previous, args, table, hypers)


_ARGS_SIZE = ctypes.sizeof(structs.PassArgs)


# ---- the watch over tensors ---------------------------------------------------------------------------------------


def _param(rng: random.Random) -> Any:
    value = tensor(rng) if rng.random() < 0.95 else hostile(rng)
    if isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad and rng.random() < 0.7:
        with contextlib.suppress(RuntimeError):  # of a layout that has no zeros
            value.grad = torch.zeros_like(value).detach()
    if isinstance(value, torch.Tensor) and rng.random() < 0.2:
        value.main_grad = rng.choice((None, torch.zeros(value.shape), hostile(rng)))
    return value


def _row(rng: random.Random, call: Calls, watch: _C.Watch, table: _C.Table, param: Any, group: Any) -> None:
    """Mostly one that fits."""
    numel, code = 0, -1
    if isinstance(param, torch.Tensor):
        numel = param.numel() * (2 if param.is_complex() else 1)
        code = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}.get(param.dtype, 4)
    main = rng.choice((0, 64))
    slot = table.add(1 << 40, 0, [], [], 0, main, numel if rng.random() < 0.97 else 3, 0, 0)
    call(
        "Watch.add",
        watch.add,
        param,
        param if rng.random() < 0.95 else _param(rng),
        group,
        code if rng.random() < 0.95 else rng.choice((-1, 6, 99, -(2**31), 2**40)),
        rng.choice((table, table, table, None)) if rng.random() < 0.97 else hostile(rng),
        slot if rng.random() < 0.95 else rng.choice((-1, 100, 2**31 - 1, 2**40)),
        isinstance(param, torch.Tensor) and (hasattr(param, "main_grad") if rng.random() < 0.9 else True),
        rng.choice((None, _C.Held(_C.Epoch()))) if rng.random() < 0.97 else hostile(rng),
    )


def _disturb(rng: random.Random, groups: list, params: list, state: dict) -> None:
    """What other code does between two steps."""
    kind = rng.randrange(9)
    param = rng.choice(params) if params else None
    plain = isinstance(param, torch.Tensor) and param.layout == torch.strided
    if kind == 0 and plain:
        param.data = torch.zeros(rng.choice((param.shape, (7,))), dtype=param.dtype, device=param.device)
    elif kind == 1 and plain and param.is_leaf:
        param.grad = None
    elif kind == 2 and plain and param.device.type == "cpu":
        param.detach().untyped_storage().resize_(0)
    elif kind == 3 and params:
        params[rng.randrange(len(params))] = _param(rng)
    elif kind == 4 and params:
        params.pop()
    elif kind == 5:
        state[rng.choice((1, "a", None))] = hostile(rng)
    elif kind == 6:
        groups.append(_maybe(rng, {"params": params}, 0.5))
    elif kind == 7 and groups and isinstance(groups[0], dict):
        groups[0][rng.choice(("params", "amsgrad"))] = hostile(rng)


class _Groups(list):
    """pybind11 prints what it refuses, and torch cannot print a tensor whose memory was given back."""

    def __repr__(self) -> str:
        return "param groups"


def _watched(rng: random.Random, call: Calls) -> tuple[_C.Watch, _C.Table, list, dict]:
    watch, table = _C.Watch(), _C.Table(256)
    groups = _Groups()
    for g in range(rng.choice((1, 1, 2))):
        params = [_param(rng) for _ in range(rng.choice((0, 1, 2, 3, 40)))]
        groups.append({"params": params, "amsgrad": _maybe(rng, False)})
        for param in params:
            _row(rng, call, watch, table, param, g if rng.random() < 0.98 else rng.choice((-1, 5, 2**31, None)))
    state = {1: {"step": 1.0, "exp_avg": tensor(rng)}, 2: hostile(rng), "a": {"b": {"c": tensor(rng)}}}
    if rng.random() < 0.9:
        call("Watch.remember_state", watch.remember_state, _maybe(rng, state))
    if rng.random() < 0.5:
        call("Watch.remember_flags", watch.remember_flags, _maybe(rng, ["amsgrad"]), _maybe(rng, groups))
    return watch, table, groups, state


def _watch(rng: random.Random, call: Calls, memory: Memory) -> None:
    watch, _, groups, state = _watched(rng, call)
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice(("refresh", "refresh", "bump_versions", "has_grads", "hold", "drop_grads", "__len__"))
        if name == "refresh":
            given = (_maybe(rng, groups), _maybe(rng, state), _maybe(rng, []), _maybe(rng, rng.random() < 0.5))
            if call("Watch.refresh", watch.refresh, *given) is True:
                call.counts["Watch.refresh: up to date", "done"] += 1
        else:
            call(f"Watch.{name}", getattr(watch, name))
        if rng.random() < 0.5:
            _disturb(rng, groups, groups[0]["params"] if isinstance(groups[0]["params"], list) else [], state)


def _repetition(rng: random.Random, call: Calls, memory: Memory) -> None:
    """Nothing but the step itself keeps what it is given."""
    watch, table, groups, state = _watched(rng, call)
    hypers, scalars = _C.Hypers([("lr", -1)]), object()
    step = call(
        "RepeatedStep", _C.RepeatedStep, _maybe(rng, watch), _maybe(rng, rng.choice(([], [hypers], [None]))), scalars,
        _maybe(rng, ({}, {})), None, _maybe(rng, lambda: False), _maybe(rng, lambda: None),
        _maybe(rng, lambda: hostile(rng), 0.1),
    )  # fmt: skip
    if step is None:
        return
    hypers.pack([group for group in groups if isinstance(group, dict)])
    if rng.random() < 0.2:
        call("RepeatedStep.launch_on", step.launch_on, *_maybe(rng, ((lambda index: 0), 0), 0))
        capacity = rng.choice((0, 3840, 32769, 2**63))
        call(
            "RepeatedStep.add",
            step.add,
            _maybe(rng, table),
            _maybe(rng, hypers),
            _C.PassArgs().copy(),
            0,
            0,
            0,
            capacity,
            rng.random() < 0.5,
        )
        call("RepeatedStep.exchange", step.exchange, _maybe(rng, lambda: hostile(rng), 0.1))
    del watch, table, hypers
    if rng.random() < 0.05:
        gc.collect()
    optimizer = {
        "_scalars": scalars, "_accumulator": None, "_backend": None,
        "param_groups": _maybe(rng, groups), "state": _maybe(rng, state),
        "_optimizer_step_pre_hooks": _maybe(rng, {}), "_optimizer_step_post_hooks": _maybe(rng, {}),
    }  # fmt: skip
    if rng.random() < 0.1:
        optimizer.pop(rng.choice(list(optimizer)))
    for _ in range(rng.randrange(1, 3)):
        if call("RepeatedStep.run", step.run, _maybe(rng, optimizer)) is True:
            call.counts["RepeatedStep.run: repeated", "done"] += 1
        call("RepeatedStep.serves", step.serves, rng.choice((scalars, None)))
