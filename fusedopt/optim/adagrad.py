"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..formats import new_states, state_format
from ..specs import RULES
from .base import FusedOptimizer, Options
from .offload import home_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adagrad"]


class Adagrad(FusedOptimizer):
    r"""Adagrad (`Duchi et al., 2011 <https://jmlr.org/papers/v12/duchi11a.html>`_) with diagonal matrices.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        s_t &= s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \, \frac{g_t}{\sqrt{s_t} + \epsilon}

    State: ``sum`` (s) in the parameter's shape and, without formats, dtype; ``step`` (t), 0-dim float32. Made by the
    constructor, as in torch; for groups added later by the next step.

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate γ, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        lr_decay: η >= 0.
        weight_decay: λ >= 0, coupled: added to the gradient.
        initial_accumulator_value: s₀ >= 0, of the whole optimizer.
        eps: ε, added to the denominator; >= 0.
        maximize: ascend instead of descend.
        foreach, fused: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "adagrad"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            lr_decay=lr_decay,
            eps=eps,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **options)
        self._make_state()

    @torch.no_grad()
    def _make_state(self) -> None:
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                wanted = state_format(f"{type(self).__name__}: param_groups[{g}]['params'][{i}]", group, param)
                home = home_of(self, param.device)
                self.state[param]["step"] = torch.zeros((), dtype=torch.float32, device=home)
                template = torch.empty_like(param, device=home, requires_grad=False)
                self.state[param].update(new_states(RULES[self.rule], wanted, template, self._initial_state))

    @property
    def _initial_state(self) -> float:
        value: float = self.defaults["initial_accumulator_value"]
        return value

    def share_memory(self) -> None:
        """Moves the sums of squares to shared memory, as torch.optim.Adagrad."""
        for state in self.state.values():
            state["sum"].share_memory_()
