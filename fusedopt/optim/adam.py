"""Adam."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adam"]


def adam_defaults(values: dict[str, Any], decoupled_weight_decay: bool) -> dict[str, Any]:
    """The keys of a param group, exactly those of the running torch, so that checkpoints go both ways."""
    if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:  # torch >= 2.7
        return {**values, "decoupled_weight_decay": decoupled_weight_decay}
    return values


class Adam(FusedOptimizer):
    r"""Adam with coupled L2 regularisation (`Kingma & Ba, 2015 <https://arxiv.org/abs/1412.6980>`_).

    .. math::
        g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\alpha}{1 - \beta_1^t} \,
            \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    With ``amsgrad`` (`Reddi et al., 2018 <https://arxiv.org/abs/1904.09237>`_) the denominator has
    :math:`\max(v_1, \dots, v_t)` in the place of :math:`v_t`.

    State: ``exp_avg`` (m) and ``exp_avg_sq`` (v) in the parameter's shape and, without formats, dtype; with ``amsgrad``
    ``max_exp_avg_sq`` too; ``step`` (t), 0-dim float32.

    Args:
        params: as :class:`FusedOptimizer`.
        lr: learning rate α, per step; a float, or a 0-dim tensor, which may change between replays of a CUDA graph.
        betas: decay rates (β₁, β₂) of the moments, each in [0, 1).
        eps: ε, added to the denominator; >= 0.
        weight_decay: λ, coupled: added to the gradient; decoupled if ``decoupled_weight_decay``.
        amsgrad: divide by the largest second moment so far. May differ between param groups.
        differentiable: not supported; True raises ValueError.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for torch's sake. The step is always fused and always capturable;
            fused=True also asks GradScaler to leave unscaling to the step.
        decoupled_weight_decay: the rule of :class:`AdamW`.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "adam"
    rule_keys = ("amsgrad", "decoupled_weight_decay")
    _decoupled_by_default = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        values = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._decoupled_by_default = decoupled_weight_decay
        super().__init__(
            params,
            adam_defaults(values, decoupled_weight_decay),
            **options,
        )

    def _rule_name(self, group: dict[str, Any]) -> str:
        name = "adamw" if group.get("decoupled_weight_decay", self._decoupled_by_default) else "adam"
        return f"{name}_amsgrad" if group.get("amsgrad") else name

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decoupled_by_default": self._decoupled_by_default}
