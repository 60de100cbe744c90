"""The keyword arguments that all optimizers have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import torch

__all__ = ["STEP_OPTIONS", "Options"]


class Options(TypedDict, total=False):
    """The keyword arguments that all optimizers add to those of torch; see :class:`FusedOptimizer`."""

    max_grad_norm: float | None
    norm_type: float
    max_grad_value: float | None
    nonfinite: str
    master_weights: str | None
    state_dtype: str | torch.dtype | None
    stochastic_rounding: bool
    min_8bit_size: int
    seed: int | None
    backend: str | None
    offload: str | None
    norm_reduce: Callable[[torch.Tensor, Any], Any] | None


STEP_OPTIONS: dict[str, Any] = {
    "max_grad_norm": None,
    "norm_type": 2.0,
    "max_grad_value": None,
    "nonfinite": "propagate",
}
"""Those that every step reads, with their defaults."""
