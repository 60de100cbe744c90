"""fusedopt in the trainers of other libraries: ``transformers``, ``accelerate``, ``lightning``.

Each module imports the library that it is named after; ``import fusedopt`` imports none of them.
"""

from __future__ import annotations

from typing import Any

from ..optim import FusedOptimizer

__all__ = ["unwrap"]


def unwrap(optimizer: Any) -> FusedOptimizer | None:
    """The optimizer of ours inside the wrappers of Accelerate, Lightning and Fabric; None if it is not one of ours.

    Results and options are the optimizer's own: ``unwrap(opt).grad_norm``, ``unwrap(opt).max_grad_norm = 0.5``.
    """
    while True:
        # Lightning's wrappers are instances of a subclass of the optimizer's class, without the optimizer's attributes.
        if isinstance(optimizer, FusedOptimizer) and "param_groups" in optimizer.__dict__:
            return optimizer
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
