"""SGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD"]


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent, with momentum as `Sutskever et al., 2013
    <https://proceedings.mlr.press/v28/sutskever13.html>`_ in the form of torch.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \qquad b_1 = g_1 \\
        \theta_t &= \theta_{t-1} - \gamma \, b_t \qquad
            \text{or, Nesterov:} \quad \theta_t = \theta_{t-1} - \gamma (g_t + \mu b_t)

    Without momentum, :math:`b_t = g_t`.

    State: with momentum ``momentum_buffer`` (b) in the parameter's shape and, without formats, dtype; and ``step``,
    0-dim float32, which counts steps since the buffer was made (torch's SGD has no such key and ignores it). Without
    momentum and formats no state at all. Momentum may be switched on and off between steps.

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate γ, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        momentum: μ >= 0; may differ between param groups.
        dampening: τ; not in the first step.
        weight_decay: λ >= 0, coupled: added to the gradient. For decoupled decay see :class:`SGDW`.
        nesterov: Nesterov's momentum; needs momentum > 0 and no dampening.
        maximize: ascend instead of descend.
        foreach, fused: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "sgd"
    rule_keys = ("momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **options)

    def _rule_name(self, group: dict[str, Any]) -> str:
        return f"{self.rule}_momentum" if group["momentum"] else self.rule
