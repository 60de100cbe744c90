"""Backends run a pass over the tables of one device. Each is a module with the same functions:

``chunk(state_format)``
    Elements of a chunk.
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
``measure(tables)``
    The first phase of rules of two, where there are any: sums of squares of every tensor to where its row says; zeros
    where it has no gradient. ``begin`` for "update" is for this one too: ``Bucket.phases`` names the kernels.
``update(tables)``
    The rule, for every tensor with a gradient, and the step counters.
``scale(tables)``
    Gradients multiplied and clamped where they are.

And, where a step that is like the one before can be made with less (``optim/repeat.py``), one of

``launches(tables, passes)``
    What it launches, for ``_C.RepeatedStep``; None if it is more than launches.
``repeat(tables, passes)``
    ``begin`` and the passes.

Scalars of the step (``grad_scale``, ``found_inf`` …) stand in each bucket's ``args``.

Which one runs on a device is decided by, in this order: the optimizer's ``backend=``; ``use_backend``; the environment
variable FUSEDOPT_BACKEND; what is best there. ``fusedopt.backends()`` says which there are.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

__all__ = ["NAMES", "Availability", "available", "check_name", "context_backend", "for_device", "use_backend", "wanted"]

NAMES = ("cpu", "cuda", "triton", "reference")
"""Modules of this package, one for each backend."""

_DEVICES = {
    "cpu": "the C++ engine, on CPUs",
    "cuda": "CUDA C++ compiled by NVRTC, on NVIDIA GPUs",
    "triton": "Triton kernels, on NVIDIA, AMD and Intel GPUs",
    "reference": "plain torch, slow, for debugging; on CPUs and CUDA devices",
}

_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("fusedopt_backend", default=None)
context_backend = _context.get
"""What ``use_backend`` asks for: a name, "auto", or None outside of it."""


class Availability(NamedTuple):
    """What ``fusedopt.backends()`` says of one backend."""

    available: bool
    """Whether it can run on some device of this machine."""
    description: str
    reason: str
    """Why not, and what to do about it; empty where it is available."""


def check_name(where: str, name: str | None) -> str | None:
    """The name, with None for "auto"; ValueError if there is no such backend."""
    if name is None or name == "auto":
        return None
    if name not in NAMES:
        raise ValueError(f"{where}: got {name!r}, expected 'auto' or one of {', '.join(NAMES)}; choose one of them")
    return NAMES[NAMES.index(name)]  # the same object each time: repeated steps compare identities


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Steps and functions inside ``with use_backend("triton"):`` run on that backend; "auto" or None: on the best one.

    Optimizers made with ``backend=`` keep theirs. Holds for the current thread. An optimizer that changes its backend
    makes its tables anew; states stay as they are.

    Raises:
        ValueError: there is no such backend. One that is not available raises RuntimeError when it is to run.
    """
    token = _context.set(check_name("use_backend", name) or "auto")
    try:
        yield
    finally:
        _context.reset(token)


def wanted(backend: str | None = None) -> str | None:
    """The backend asked for, by ``backend``, ``use_backend`` or FUSEDOPT_BACKEND; None where nobody asked."""
    if backend is not None:
        return backend
    chosen = context_backend()
    if chosen is None:
        return check_name("FUSEDOPT_BACKEND", os.environ.get("FUSEDOPT_BACKEND") or None)
    return None if chosen == "auto" else chosen


def for_device(device: torch.device, backend: str | None = None) -> ModuleType:
    """The backend that runs on a device; RuntimeError with the remedy if there is none.

    backend: a name, or None for the one asked for by ``use_backend`` or FUSEDOPT_BACKEND, else the best.
    """
    return _resolve(device, wanted(backend))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache  # of what was found; errors are found anew
def _resolve(device: torch.device, name: str | None) -> ModuleType:
    if name is None:
        return _best(device)
    module = _module(name)
    module.require_available(device)
    return module


def _best(device: torch.device) -> ModuleType:
    """C++ on CPUs, CUDA C++ on NVIDIA GPUs, Triton on others and where CUDA C++ cannot be compiled."""
    if device.type == "cpu":
        return _module("cpu")
    if device.type not in ("cuda", "xpu"):
        raise RuntimeError(
            f"fusedopt: got a tensor on device '{device}', expected 'cpu', 'cuda' or 'xpu'; "
            "move the model there, or use torch.optim for this device"
        )
    found, problems = [], []
    for name in ("cuda", "triton") if device.type == "cuda" and not torch.version.hip else ("triton",):
        module = _module(name)
        try:
            module.require_available(device)
            found.append(module)
        except RuntimeError as error:
            problems.append(str(error).removeprefix("fusedopt: "))
        if found and (name != "cuda" or module.can_compile()):
            break
    if not found:
        raise RuntimeError(f"fusedopt: no backend can run on '{device}'. " + ". Or: ".join(problems))
    return found[-1]  # CUDA without NVRTC if there is nothing else: its kernel cache may hold all that is needed


def available() -> dict[str, Availability]:
    """Which backends can run on this machine, and of those that cannot, why. Also ``fusedopt.backends()``."""
    return {name: _availability(name) for name in NAMES}


def _availability(name: str) -> Availability:
    module = _module(name)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.insert(0, torch.device("cuda", 0))
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        devices.insert(0, torch.device("xpu", 0))
    errors = [_why_not(module, device) for device in devices]
    if not all(errors):
        return Availability(True, _DEVICES[name], "")
    if len(devices) > 1:
        return Availability(False, _DEVICES[name], errors[0])  # of the device that suits it best
    missing = [_why_no_gpu(), _why_not(module, torch.device("cuda"))]  # what a GPU would need beside itself
    return Availability(False, _DEVICES[name], "; ".join(filter(None, missing)))


def _why_not(module: Any, device: torch.device) -> str:
    """What a backend has against a device; empty if nothing."""
    try:
        module.require_available(device)
        return ""
    except RuntimeError as error:
        return str(error).removeprefix("fusedopt: ")


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without GPUs; install a build with CUDA or ROCm where there are any"
    return "torch finds no GPU; see whether the driver does, with nvidia-smi or rocm-smi"


class CallableModule(ModuleType):
    """``fusedopt.backends`` is this package and, because it is the natural question, a function: ``available``."""

    def __call__(self) -> dict[str, Availability]:
        return available()


sys.modules[__name__].__class__ = CallableModule
