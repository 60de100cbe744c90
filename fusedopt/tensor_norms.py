"""Norms of single tensors whose parts lie in several processes, for rules of two phases (LAMB's trust ratio).

The measure pass leaves the sums of squares of this process' parts in rows of a tensor, one all-reduce makes them those
of the whole tensors, and the update pass takes their roots. Only where the numbers come from differs from the update of
whole tensors, so in one process the bits do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from .sharding import Peers, Spread, all_reduce, in_place_reduction

if TYPE_CHECKING:
    from .plan import DeviceTables

__all__ = ["TensorNorms"]

_WHAT = "the norms of single tensors"


class TensorNorms(NamedTuple):
    """Of the tensors that are spread alike."""

    sums: torch.Tensor
    """``(tensors, norms)`` float64; the same tensors in the same order in all processes of the mesh."""
    add_up: Callable[[], object]
    """Makes of this process' sums those of all processes, by one all-reduce on the current stream. Every process of the
    mesh must call it. The host waits only where sums are on the CPU. RuntimeError: a process failed, or took too long.
    """

    @classmethod
    def of(cls, spread: Spread, sums: torch.Tensor, absent: Sequence[int] = ()) -> TensorNorms:
        """absent: rows that no measure pass of this process writes to.

        Where several processes hold the same elements one of them counts, and where dimensions of the mesh are reduced
        one after the other those come last: what is added there is 0, so all of them end with the same bits.
        """
        peers, clear = Peers.of(spread.mesh, last=spread.replicated), _clearing(spread, sums, absent)
        if sums.device.type == spread.mesh.device_type:
            return cls(sums, in_place_reduction(sums, sums, peers, clear, _WHAT))
        return cls(sums, partial(_reduce_elsewhere, sums, peers, clear))

    @classmethod
    def of_tables(cls, tables: Sequence[DeviceTables]) -> list[TensorNorms]:
        """Of tables that hold all tensors there are, in every process."""
        found = [(each.spread, each.norms) for each in tables]
        return [cls.of(spread, sums) for spread, sums in found if spread and spread.is_split and sums is not None]


def _clearing(spread: Spread, sums: torch.Tensor, absent: Sequence[int]) -> Callable[[], object] | None:
    """What makes rows 0 that are not this process' to count; None where all are."""
    if not spread.is_counted_here():
        return sums.zero_
    if not absent:
        return None
    rows = torch.tensor(absent, dtype=torch.int64, device=sums.device)
    return partial(sums.index_fill_, 0, rows, 0.0)


def _reduce_elsewhere(sums: torch.Tensor, peers: Peers, clear: Callable[[], object] | None) -> None:
    """Of parameters that are offloaded to the host: by way of the device on which processes communicate."""
    from torch.distributed import ReduceOp

    if clear is not None:
        clear()
    sums.copy_(all_reduce(sums, ReduceOp.SUM, peers, _WHAT))
