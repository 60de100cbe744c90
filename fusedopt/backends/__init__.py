"""Backends run a pass over the tables of one device. Each is a module with the same functions:

``prepare(tables)``
    Once, after the tables are built: put them where the passes read them.
``begin(tables, passes)``
    Once per step, after gradient addresses and hyper-parameters are set. Everything that can fail (compiling a
    kernel, above all) fails here, before anything is written. ``passes``: which of "accumulate", "norm", "update",
    "scale" follow.
``accumulate(tables)``
    Gradients added to main gradients.
``norm(tables, finalize)``
    Total norm into ``tables.control``; with ``finalize=False`` only this device's share (``control.local_sums``).
``finalize_norm(tables, gathered)``
    The end of the norm from the shares of several devices, float64 of shape (devices, 2).
``update(tables)``
    The rule, for every tensor with a gradient, and the step counters.
``scale(tables)``
    Gradients multiplied and clamped where they are.

Scalars of the step (``grad_scale``, ``found_inf`` …) stand in each bucket's ``args``.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

__all__ = ["for_device"]


@functools.cache
def for_device(device: torch.device) -> ModuleType:
    """The backend of a device; RuntimeError with the remedy if there is none."""
    if device.type == "cpu":
        from . import cpu

        return cpu
    if device.type == "cuda":
        from . import cuda

        cuda.require_available()
        return cuda
    raise RuntimeError(
        f"fusedopt: got a tensor on device '{device}', expected 'cpu' or 'cuda'; "
        "move the model there, or use torch.optim for this device"
    )
