"""RAdam."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RAdam"]


class RAdam(FusedOptimizer):
    r"""Rectified Adam (`Liu et al., 2020 <https://arxiv.org/abs/1908.03265>`_) in the form of torch.

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
            \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
            r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}
                            {(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        \theta_t &= \theta_{t-1} - \frac{\alpha}{1 - \beta_1^t} \, m_t \times
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
                           1 & \text{else} \end{cases}

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v) in the parameter's shape and, without formats, dtype; ``step`` (t),
    0-dim float32.

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate α, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        betas: decay rates (β₁, β₂) of the moments, each in [0, 1).
        eps: ε, added to the denominator; >= 0.
        weight_decay: λ >= 0, coupled: added to the gradient.
        decoupled_weight_decay: decay the parameter by 1 - αλ instead; may differ between param groups.
        maximize: ascend instead of descend.
        foreach, capturable: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "radam"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
            differentiable=differentiable,
        )
        super().__init__(params, defaults, **options)
