"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion"]


class Lion(FusedOptimizer):
    r"""Evolved sign momentum (`Chen et al., 2023 <https://arxiv.org/abs/2302.06675>`_).

    .. math::
        c_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        \theta_t &= \theta_{t-1} - \eta \lambda \theta_{t-1} - \eta \, \mathrm{sign}(c_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    sign(0) = 0, so that untouched rows of an embedding stay where they are, and sign(NaN) = NaN, so that a NaN shows.

    State: ``exp_avg`` (m) in the parameter's shape and, without formats, dtype; ``step``, 0-dim float32 (only counted).

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate η, per step; the paper advises 3 to 10 times less than for AdamW. A float, or a 0-dim tensor,
            which may change between replays of a CUDA graph.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: λ, per unit of learning rate; >= 0; the paper advises 3 to 10 times more than for AdamW.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted as for :class:`AdamW`.
        differentiable: not supported; True raises ValueError.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(
            params,
            defaults,
            **options,
        )
