"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RMSprop"]


class RMSprop(FusedOptimizer):
    r"""RMSprop (Tieleman & Hinton, 2012); centered and with momentum as `Graves, 2013
    <https://arxiv.org/abs/1308.0850>`_, in the form of torch.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        \tilde v_t &= v_t \qquad \text{or, centered:} \quad
            m_t = \alpha m_{t-1} + (1 - \alpha) g_t, \quad \tilde v_t = v_t - m_t^2 \\
        b_t &= \mu b_{t-1} + g_t / (\sqrt{\tilde v_t} + \epsilon) \\
        \theta_t &= \theta_{t-1} - \gamma \, b_t

    Where rounding makes :math:`\tilde v_t` negative it is 0; torch takes the root of the negative number, NaN.

    State: ``square_avg`` (v), with momentum ``momentum_buffer`` (b), centered ``grad_avg`` (m), in the parameter's
    shape and, without formats, dtype; ``step``, 0-dim float32 (only counted).

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate γ, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        alpha: α, decay rate of the averages; >= 0.
        eps: ε, added to the denominator; >= 0.
        weight_decay: λ >= 0, coupled: added to the gradient.
        momentum: μ >= 0; may differ between param groups.
        centered: divide by the standard deviation of the gradients; may differ between param groups.
        maximize: ascend instead of descend.
        foreach, capturable: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "rmsprop"
    rule_keys = ("centered", "momentum")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            alpha=alpha,
            eps=eps,
            centered=centered,
            weight_decay=weight_decay,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)

    def _rule_name(self, group: dict[str, Any]) -> str:
        centered = "_centered" if group["centered"] else ""
        return f"{self.rule}{centered}{'_momentum' if group['momentum'] else ''}"
