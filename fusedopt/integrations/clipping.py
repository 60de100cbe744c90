"""The bounds that a trainer asks for, put into the next step of an optimizer, which may have bounds of its own."""

from __future__ import annotations

import math
import warnings
import weakref
from dataclasses import dataclass
from typing import NamedTuple

from ..optim import FusedOptimizer

__all__ = ["set_bounds"]


class Bounds(NamedTuple):
    """As the attributes of :class:`fusedopt.FusedOptimizer`."""

    max_grad_norm: float | None
    norm_type: float
    max_grad_value: float | None


@dataclass
class _Record:
    """Of one optimizer. A trainer's bounds stay set after the step, so that the next step is like it: no new tables."""

    own: Bounds
    applied: Bounds
    warned: bool = False


_records: weakref.WeakKeyDictionary[FusedOptimizer, _Record] = weakref.WeakKeyDictionary()


def set_bounds(
    where: str,
    optimizer: FusedOptimizer,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    max_value: float | None = None,
) -> None:
    """Makes the next step clip to a trainer's bounds or to the optimizer's own, whichever are smaller.

    Without arguments the optimizer's own hold again. If both clip, a warning says so, once for each optimizer.

    Args:
        max_norm: of the norm of type ``norm_type``; > 0, inf to take the norm alone.
        max_value: of each element, before the norm is taken; > 0.

    Raises:
        ValueError: the optimizer itself clips a norm of another type.
    """
    current = Bounds(optimizer.max_grad_norm, optimizer.norm_type, optimizer.max_grad_value)
    record = _records.setdefault(optimizer, _Record(current, current))
    if current != record.applied:  # somebody has set them since
        record.own = record.applied = current
    own = record.own
    if max_norm is None or own.max_grad_norm is None:
        norm_type = own.norm_type if max_norm is None else float(norm_type)
    elif own.norm_type != norm_type:
        raise ValueError(
            f"{where}: got a clip of the norm of type {norm_type:g} for an {type(optimizer).__name__} with "
            f"max_grad_norm={own.max_grad_norm:g} and norm_type={own.norm_type:g}, expected one norm; set "
            "optimizer.max_grad_norm = None, or switch the trainer's clipping off"
        )
    wanted = Bounds(
        _smaller(record, where, "max_grad_norm", own.max_grad_norm, max_norm),
        float(norm_type),
        _smaller(record, where, "max_grad_value", own.max_grad_value, max_value),
    )
    if wanted != current:
        optimizer._set_options(**wanted._asdict())
    record.applied = wanted


def _smaller(record: _Record, where: str, name: str, own: float | None, asked: float | None) -> float | None:
    if own is None or asked is None:
        return own if asked is None else float(asked)
    if not record.warned and math.isfinite(own) and math.isfinite(asked):
        record.warned = True
        warnings.warn(
            f"{where}: the trainer clips to {asked:g}, and the optimizer has {name}={own:g}; gradients are "
            f"clipped once, in the step, to the smaller. Set optimizer.{name} = None, or switch the trainer's off",
            stacklevel=4,
        )
    return min(own, float(asked))
