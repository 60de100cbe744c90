"""LAMB."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB"]


class LAMB(FusedOptimizer):
    r"""Adam with a learning rate for each tensor (`You et al., 2020 <https://arxiv.org/abs/1904.00962>`_).

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda \theta_{t-1} \\
        \theta_t &= \theta_{t-1} - \eta \, \frac{\lVert \theta_{t-1} \rVert}{\lVert u_t \rVert} \, u_t

    Norms are those of the tensor; where one of them is 0, and where λ is 0 without ``use_nvlamb``, their ratio counts
    as 1. A step goes through the tensors twice: once for the norms, without writing, and once for the update.

    Arguments and results are those of ``apex.optimizers.FusedLAMB``, but that gradients are clipped only where
    ``max_grad_norm`` is given (apex: 1.0 by default).

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v) in the parameter's shape and, without formats, dtype; ``step`` (t),
    0-dim float32.

    Args:
        params: as :class:`FusedOptimizer`. Norms of a DTensor are those of the whole tensor, by an all-reduce over its
            mesh; every other one is a tensor of its own to the norms.
        lr: learning rate η, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        bias_correction: divide by 1 - βᵗ; without it, both divisors are 1.
        betas: decay rates (β₁, β₂) of the moments, each in [0, 1).
        eps: ε, added to the denominator; >= 0.
        weight_decay: λ >= 0, a term of the update.
        adam_w_mode: False makes the decay an L2 term of the loss: added to the gradient, not to the update.
        grad_averaging: False puts 1 in the place of 1 - β₁.
        use_nvlamb: take the norms into account where λ is 0 too.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "lamb"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        use_nvlamb: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            adam_w_mode=adam_w_mode,
            grad_averaging=grad_averaging,
            use_nvlamb=use_nvlamb,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults, **options)
