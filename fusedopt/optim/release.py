"""Gradient release: each parameter is updated in the backward pass, as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ..backends import wanted
from ..hooks import on_gradient
from ..sharding import spread_of
from ..specs import RULES
from .plan import OptimizerPlan
from .wrappers import check_unwrapped

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["GradientRelease", "check_releasable", "releasable"]


def check_releasable(optimizer: FusedOptimizer) -> None:
    """ValueError where the step needs to know all gradients before it changes the first parameter."""
    where = f"{type(optimizer).__name__}.release_gradients"
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            f"{where}: got max_grad_norm={optimizer.max_grad_norm}, expected None: a parameter is updated before the "
            "total norm is known; use max_grad_value, which clamps elements, or do without release"
        )
    if optimizer.nonfinite == "skip":
        raise ValueError(
            f"{where}: got nonfinite='skip', expected 'propagate': a parameter is updated before all gradients have "
            "been looked at; do without one of them"
        )
    if optimizer.offload is not None:
        raise ValueError(
            f"{where}: got offload={optimizer.offload!r}, expected None: gradients would arrive on the host, and "
            "parameters return, one by one within the backward pass; do without one of them"
        )


def releasable(
    optimizer: FusedOptimizer, module: torch.nn.Module | Iterable[torch.Tensor] | None
) -> list[torch.Tensor]:
    """The parameters of the optimizer that ``release_gradients(module)`` means; raises as that."""
    where = f"{type(optimizer).__name__}.release_gradients"
    check_unwrapped(where, optimizer)
    check_releasable(optimizer)
    if optimizer._releases():
        raise RuntimeError(f"{where}: gradients are being released already; call remove() on the first handle")
    own = dict.fromkeys(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    given = own if module is None else module.parameters() if isinstance(module, torch.nn.Module) else module
    params = [param for param in given if param in own and param.requires_grad]
    if not params:
        raise ValueError(
            f"{where}: got no parameter of this optimizer that requires a gradient, expected one at least; pass the "
            "model that was given to the optimizer"
        )
    _check_whole(where, optimizer, params)
    return params


def _check_whole(where: str, optimizer: FusedOptimizer, params: Iterable[torch.Tensor]) -> None:
    """ValueError where an update needs other processes: one collective for each parameter, inside backward passes."""
    for group, rule in zip(optimizer.param_groups, optimizer._rule_names()):
        own = set(group["params"]) if RULES[rule].norms else ()
        for param in params:
            spread = spread_of(param) if param in own else None
            if spread is not None and spread.is_split:
                raise ValueError(
                    f"{where}: got a DTensor whose parts lie in several processes beside the rule '{rule}', expected a "
                    "whole tensor, or a rule that needs no norms of it: each update would wait for other processes "
                    "inside the backward pass; do without release, or use AdamW"
                )


class GradientRelease:
    """What :meth:`FusedOptimizer.release_gradients` returns: undoes it, or pauses it for some backward passes."""

    def __init__(self, optimizer: FusedOptimizer, params: Iterable[torch.Tensor]) -> None:
        self._optimizer = optimizer
        self._plans: dict[torch.Tensor, OptimizerPlan] = {}
        self._paused = False
        self._hooks: list[Any] = [on_gradient(param, self._update) for param in params]

    @property
    def active(self) -> bool:
        """Whether parameters are updated in backward passes: not after ``remove``."""
        return bool(self._hooks)

    def remove(self) -> None:
        """From now on, backward passes leave gradients in ``.grad`` for ``step()``, as usual."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._plans.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For the backward passes of all micro-batches but the last: gradients stay in ``.grad``."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def forget_plans(self) -> None:
        """Param groups or options have changed."""
        self._plans.clear()

    @torch.no_grad()
    def _update(self, param: torch.Tensor) -> None:
        optimizer = self._optimizer
        if self._paused:
            return
        plan = self._plans.get(param)
        backend = wanted(optimizer.backend)
        if plan is None or plan.backend != backend or not plan.refresh(optimizer):
            plan = self._plans[param] = OptimizerPlan.make(
                optimizer, optimizer._rule_names(), optimizer._controls, backend, param
            )
        optimizer._run_alone(plan, param)
        param.grad = None
