"""What a GradAccumulator must hold, in float64 with a bound.

The sum over micro-batches is evaluated on `Bounded` numbers: each product and each addition may err by a
rounding of the compute type, each store into a bfloat16 main gradient by half an ulp of it. The first micro-batch is
written, not added, and the last one is added by the step, in the compute type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .bounds import Bounded
from .tensors import Copies


def compute_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class Expected:
    """The sum that an accumulator keeps, beside it: call `fold` with it, `total` before a step.

    dtype: of main gradients.
    """

    def __init__(self, params, dtype=torch.float32, reduction="mean") -> None:
        self.params, self.dtype, self.reduction = params, dtype, reduction
        self.reset()

    def reset(self) -> None:
        self.sums: dict[Tensor, Bounded] = {}
        self.weights = 0.0

    def _grads(self) -> Copies:
        return Copies(p.grad for p in self.params if p.grad is not None)

    def _with(self, p, weight, grads: Copies) -> Bounded | None:
        if p.grad is None:
            return self.sums.get(p)
        grad = Bounded.exact(grads[p.grad], compute_type(p))
        grad = grad if weight == 1.0 else grad * float(weight)
        return self.sums[p] + grad if p in self.sums else grad

    def fold(self, weight=1.0) -> None:
        grads = self._grads()
        for p in self.params:
            added = self._with(p, weight, grads)
            if added is not None:
                self.sums[p] = added if p.grad is None else self._stored(added)
        self.weights += float(weight)

    def _stored(self, added: Bounded) -> Bounded:
        if added.compute == torch.float64 or self.dtype == torch.float32:
            return added
        spacing = reference.ulp(added.value.abs() + added.error, self.dtype)
        return Bounded(added.value, added.error + spacing / 2, added.compute)

    def total(self, weight=1.0) -> dict[Tensor, Bounded]:
        """By parameter, with what is in `.grad`, before it is divided."""
        grads = self._grads()
        return {p: total for p in self.params if (total := self._with(p, weight, grads)) is not None}

    def divisor(self, weight=1.0) -> float:
        own = any(p.grad is not None for p in self.params)
        return self.weights + (float(weight) if own else 0.0) if self.reduction == "mean" else 1.0
