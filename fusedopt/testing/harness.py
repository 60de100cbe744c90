"""``verify``: cases chosen, run and counted, for the command line and for other people's tests."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .cases import Case, foreign_cases, full_cases, guess_optimizer, own_backends, quick_cases, select
from .parallel import run_in_processes
from .report import Run
from .runner import Result, run_cases
from .trials import LeftOut, make_foreign
from .variants import VARIANTS, Variant

__all__ = ["Plan", "load_optimizer", "plan", "verify"]

FOREIGN_DTYPES = ("float32", "float64")


@dataclasses.dataclass
class Plan:
    """Which cases are to run, of how many."""

    subject: str
    device: str
    cases: list[Case]
    total: int
    factory: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()


def load_optimizer(name: str) -> Callable[..., Any]:
    """The class or factory that ``package.module:attribute`` names.

    Raises:
        ValueError: the name has no colon; it cannot be imported; there is no such thing in it, or nothing callable.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"got {name!r}, expected package.module:class, such as torch.optim:AdamW")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module may raise anything while it is imported
        raise ValueError(
            f"{module} cannot be imported: {type(error).__name__}: {error}; install it, or correct the name"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {attribute!r}; correct the name")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"{name} is a {type(found).__name__}, expected an optimizer class or a function that makes one"
        )
    return found


def plan(
    optimizer: str | Callable[..., Any] | None = None,
    *,
    quick: bool = False,
    device: str = "cpu",
    backend: Iterable[str] = (),
    rule: Iterable[str] = (),
    format: Iterable[str] = (),
    dtype: Iterable[str] = (),
    transform: Iterable[str] = (),
    case: Iterable[str] = (),
) -> Plan:
    """The cases that ``verify`` runs with these arguments.

    Raises:
        ValueError: an optimizer that cannot be imported or built, or whose rule is not known; a filter that matches
            nothing; a backend that cannot run on the device.
    """
    given = {"format": format, "dtype": dtype, "transform": transform, "case": case}
    filters = {key: tuple(values) for key, values in given.items()}
    if optimizer is None:
        best, *others = _checked_backends(device, tuple(backend))
        cases = full_cases(device, [best])
        more = [full_cases(device, [name]) for name in others]
        # Of backends that nobody asked for a sample: all of them would take as long as the best one, each.
        sampled = [each if backend else quick_cases(each) for each in more]
        made = Plan("fusedopt", device, sum(sampled, cases), len(cases) + sum(map(len, more)))
        filters = {"rule": tuple(rule), **filters}
    else:
        made = _foreign_plan(optimizer, tuple(rule), filters["dtype"] or FOREIGN_DTYPES, device)
    made.cases = select(made.cases, **filters)
    if quick:
        made.cases = quick_cases(made.cases)
    return made


def _checked_backends(device: str, wanted: tuple[str, ...]) -> list[str]:
    found = own_backends(device)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"backend: got {missing[0]!r}, expected one of {', '.join(found)} on {device}; fusedopt.backends() says why"
        )
    return list(wanted) or found


def _foreign_plan(
    optimizer: str | Callable[..., Any], rules: tuple[str, ...], dtypes: tuple[str, ...], device: str
) -> Plan:
    factory = load_optimizer(optimizer) if isinstance(optimizer, str) else optimizer
    name = optimizer if isinstance(optimizer, str) else getattr(factory, "__qualname__", repr(factory))
    variants, notes = _buildable(factory, name, _variants_of(factory, name, rules))
    known = {"float32", "float64", "bfloat16", "float16"}
    if not set(dtypes) <= known:
        raise ValueError(f"dtype: got {sorted(set(dtypes) - known)[0]!r}, expected one of {', '.join(sorted(known))}")
    cases = foreign_cases(variants, [getattr(torch, dtype) for dtype in dtypes], device)
    return Plan(name, device, cases, len(cases), factory, notes)


def _variants_of(factory: Callable[..., Any], name: str, rules: tuple[str, ...]) -> list[Variant]:
    """The rows that an optimizer is to follow: those of the rules, else those of the class its name tells of."""
    if not rules:
        guess = guess_optimizer(factory)
        if guess is None:
            raise ValueError(f"{name}: no rule is known by that name; say which it is to follow, such as --rule adamw")
        return [v for v in VARIANTS if v.optimizer == guess]
    found = [v for v in VARIANTS if set(rules) & {v.rule, v.optimizer} and v.optimizer.lower() == v.rule_spec.family]
    if not found:
        known = ", ".join(sorted({v.rule for v in VARIANTS}))
        raise ValueError(f"rule: got {rules[0]!r}, expected one of {known}")
    return found


def _buildable(
    factory: Callable[..., Any], name: str, variants: list[Variant]
) -> tuple[list[Variant], tuple[str, ...]]:
    """The rows whose arguments it takes. ValueError if it cannot be built with any."""
    left, notes, problem = [], [], None
    for variant in variants:
        probe = foreign_cases([variant], [torch.float32], "cpu")[0]
        try:
            opt, _ = make_foreign(factory, probe, [torch.nn.Parameter(torch.zeros(1))])
            if not hasattr(opt, "step") or not hasattr(opt, "param_groups"):
                raise ValueError(f"{name} made a {type(opt).__name__}, expected a torch.optim.Optimizer")
            left.append(variant)
        except LeftOut as reason:
            notes.append(f"{variant.name} is left out: {reason}")
        except Exception as error:  # whatever its constructor raises
            problem = error
            notes.append(f"{variant.name} is left out: {type(error).__name__}: {error}")
    if not left:
        why = f"{type(problem).__name__}: {problem}" if problem else "; ".join(notes)
        raise ValueError(f"{name} cannot be built: {why}; pass a factory (params, **kwargs) -> Optimizer")
    return left, tuple(notes)


def verify(
    optimizer: str | Callable[..., Any] | None = None,
    *,
    command: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
    jobs: int = 1,
    time_limit: float | None = None,
    planned: Plan | None = None,
    **choice: Any,
) -> Run:
    """Runs the cases and returns what they showed; ``run.failed`` lists those that failed.

    Args:
        optimizer: None for fusedopt's own; else a class, a factory ``(params, **kwargs) -> Optimizer``, or the name of
            one as ``package.module:attribute``.
        planned: what ``plan`` returned, instead of the other arguments.
        on_result: called with each result, for progress bars.
        jobs: processes that share the cases. An optimizer given as a class or factory must then be one that can be
            pickled.
        time_limit: seconds after which no further result is waited for; ``run.unreached`` counts the cases left.
        choice: ``quick``, ``device``, ``backend``, ``rule``, ``format``, ``dtype``, ``transform``, ``case`` as for
            ``plan``.

    Raises:
        ValueError: as ``plan``; an optimizer that other processes cannot be given.
    """
    planned = planned or plan(optimizer, **choice)
    start, found = time.monotonic(), dict[int, Result]()
    indexed: Iterable[tuple[int, Result]]
    if jobs > 1:
        indexed = run_in_processes(planned.cases, planned.factory, jobs)
    else:
        indexed = enumerate(run_cases(planned.cases, planned.factory))
    for i, result in indexed:
        found[i] = result
        on_result(result)
        if time_limit is not None and time.monotonic() - start > time_limit:
            break
    results = [found[i] for i in sorted(found)]
    seconds = time.monotonic() - start
    skipped, unreached = planned.total - len(planned.cases), len(planned.cases) - len(results)
    return Run(planned.subject, planned.device, results, skipped, seconds, command, unreached)
