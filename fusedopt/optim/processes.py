"""With which other processes an optimizer takes norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import passes, sharding

if TYPE_CHECKING:
    from ..tensor_norms import TensorNorms
    from .base import FusedOptimizer
    from .plan import OptimizerPlan

__all__ = ["join_norms", "processes_of", "tensor_norms_of"]

_ALIKE = ("max_grad_norm", "norm_type", "max_grad_value", "nonfinite", "offload")
"""Options that the processes of a mesh must have in common."""


def processes_of(optimizer: FusedOptimizer, plan: OptimizerPlan) -> passes.Processes | None:
    """None where there are no others.

    The first time, the processes of each mesh find out whether they have the same parameters and options: raises as
    ``sharding.check_agreement``, and waits for them.
    """
    if not plan.peers and optimizer.norm_reduce is None:
        return None
    _agree(optimizer, plan)
    return passes.Processes(plan.peers, optimizer.norm_reduce)


def tensor_norms_of(optimizer: FusedOptimizer, plan: OptimizerPlan) -> list[TensorNorms]:
    """Of the tensors that have parts in other processes, for rules of two phases. Raises as ``processes_of``."""
    if plan.norms:
        _agree(optimizer, plan)
    return plan.norms


def _agree(optimizer: FusedOptimizer, plan: OptimizerPlan) -> None:
    if not optimizer._agreed:
        options = ", ".join(f"{key}={getattr(optimizer, key)}" for key in _ALIKE)
        where = f"{type(optimizer).__name__}.step"
        sharding.check_agreement(where, plan.peers, options, plan.description(optimizer.param_groups))
        optimizer._agreed = True


def join_norms(optimizer: FusedOptimizer, plan: OptimizerPlan) -> None:
    """Where no parameter has a gradient here: other processes may still wait for this one's share in norms."""
    takes_norm = optimizer._takes_norm or "_nonfinite_found" in optimizer.__dict__
    processes = processes_of(optimizer, plan) if takes_norm else None
    if processes is not None:
        passes.join_norm(sharding.home_of(optimizer.param_groups), optimizer.norm_type, processes)
    for each in tensor_norms_of(optimizer, plan):
        each.add_up()
