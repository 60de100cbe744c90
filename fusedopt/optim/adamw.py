"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .adam import adam_defaults
from .base import FusedOptimizer, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdamW"]


class AdamW(FusedOptimizer):
    r"""Adam with decoupled weight decay (`Loshchilov & Hutter, 2019 <https://arxiv.org/abs/1711.05101>`_).

    .. math::
        \theta_t &\leftarrow \theta_{t-1} - \alpha \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &\leftarrow \theta_t - \frac{\alpha}{1 - \beta_1^t} \,
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
        weight_decay: λ, per unit of learning rate; >= 0.
        amsgrad: divide by the largest second moment so far. May differ between param groups.
        differentiable: not supported; True raises ValueError.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for torch's sake. The step is always fused and always capturable;
            fused=True also asks GradScaler to leave unscaling to the step.
        options: clipping, non-finite gradients and formats, as :class:`FusedOptimizer`.

    Raises:
        ValueError, TypeError, RuntimeError: as :class:`FusedOptimizer`.
    """

    rule = "adamw"
    rule_keys = ("amsgrad",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
        super().__init__(
            params,
            adam_defaults(values, decoupled_weight_decay=True),
            **options,
        )

    def _rule_name(self, group: dict[str, Any]) -> str:
        return "adamw_amsgrad" if group.get("amsgrad") else "adamw"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam does not turn AdamW into it
            if "decoupled_weight_decay" in self.defaults:
                group["decoupled_weight_decay"] = True
