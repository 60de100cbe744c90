"""What is measured: a contract says what one step tail has to do, a library says who does it.

Contracts, all on gradients that the backward pass has just left in ``.grad``:

=========================  =========================================================================
``step``                   the optimizer step alone
``clip_step``              clip the total norm to 1.0, step
``scaler_clip_step``       unscale, check for inf and NaN, clip to 1.0, step (or skip it, decided on the device)
``torch_scaler_clip_step`` the same, driven by ``torch.amp.GradScaler``, which makes its own pass over the gradients
=========================  =========================================================================

Libraries: ``fusedopt`` (reported as fusedopt-cuda or fusedopt-cpu), ``torch-fused`` (``torch.nn.utils.clip_grad_norm_``
and ``torch.optim.AdamW(fused=True)``, with ``GradScaler`` where the contract unscales; its ``update()`` is part of the
tail) and ``torch-grad-scale`` (the same optimizer made to clip in its own kernel through ``grad_scale``, undocumented).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from benchmarks.workloads import FORMATS

MAX_NORM = 1.0

# Small, because torch unscales and clips the gradients in place: a run of steps over the same gradients halves them
# each time, and they must stay far from underflow.
GRAD_SCALE = 2.0

HYPER = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2},
}

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}


@dataclass(frozen=True)
class Case:
    """One line of comparison: every library that can do it is measured on the same tensors."""

    workload: str
    optimizer: str
    format: str
    contract: str

    def __str__(self) -> str:
        return f"{self.workload}/{self.optimizer}/{self.format}/{self.contract}"

    @property
    def clips(self) -> bool:
        return self.contract != "step"

    @property
    def scales(self) -> bool:
        return self.contract in ("scaler_clip_step", "torch_scaler_clip_step")

    @property
    def bytes_per_param(self) -> int:
        """The fewest bytes an element must move through memory: every tensor of a pass read or written once."""
        states = len(STATES[self.optimizer])
        reads = 2 + states  # parameter, gradient, states
        writes = 1 + states  # parameter, states
        norm_reads = 1 if self.clips else 0  # the norm must be known before the first element is updated
        return (reads + writes + norm_reads) * FORMATS[self.format].itemsize


@dataclass(frozen=True)
class Tail:
    """One library's way to do a case: calling it does one step tail."""

    optimizer: torch.optim.Optimizer
    run: Callable[[], object]

    def __call__(self) -> None:
        self.run()


Params = list[torch.nn.Parameter]
Builder = Callable[[str, Params], Tail]


# ---------------------------------------------------------------------------------------------------------- fusedopt


def _fusedopt_optimizer(optimizer: str, params: Params, **transform: object) -> torch.optim.Optimizer:
    import fusedopt  # here, so that the baselines can be measured without it

    cls = {"adamw": fusedopt.AdamW, "lion": fusedopt.Lion}[optimizer]
    return cls(params, **HYPER[optimizer], **transform)


def _fusedopt_step(optimizer: str, params: Params) -> Tail:
    opt = _fusedopt_optimizer(optimizer, params)
    return Tail(opt, opt.step)


def _fusedopt_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _fusedopt_optimizer(optimizer, params, max_grad_norm=MAX_NORM)
    return Tail(opt, opt.step)


def _fusedopt_scaler_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _fusedopt_optimizer(optimizer, params, max_grad_norm=MAX_NORM, nonfinite="skip")
    scale = torch.full((), GRAD_SCALE, device=params[0].device)

    def run() -> None:
        opt.grad_scale = scale
        opt.step()

    return Tail(opt, run)


def _fusedopt_torch_scaler_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _fusedopt_optimizer(optimizer, params, max_grad_norm=MAX_NORM)
    scaler = _grad_scaler(params[0].device)

    def run() -> None:
        scaler.step(opt)
        scaler.update()

    return Tail(opt, run)


# ------------------------------------------------------------------------------------------------------------- torch


def _torch_adamw(params: Params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **HYPER["adamw"], fused=True)


def _grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device.type, init_scale=GRAD_SCALE)
    scaler.scale(torch.zeros((), device=device))  # creates the scale tensor, as the first loss does
    return scaler


def _torch_step(optimizer: str, params: Params) -> Tail:
    opt = _torch_adamw(params)
    return Tail(opt, opt.step)


def _torch_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _torch_adamw(params)

    def run() -> None:
        clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return Tail(opt, run)


def _torch_scaler_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _torch_adamw(params)
    scaler = _grad_scaler(params[0].device)

    def run() -> None:
        scaler.unscale_(opt)
        clip_grad_norm_(params, MAX_NORM)
        scaler.step(opt)
        scaler.update()

    return Tail(opt, run)


def _grad_scale_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _torch_adamw(params)

    def run() -> None:
        norm = get_total_norm([param.grad for param in params])
        opt.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0).float()
        opt.step()

    return Tail(opt, run)


def _grad_scale_scaler_clip_step(optimizer: str, params: Params) -> Tail:
    opt = _torch_adamw(params)
    scale = torch.full((), GRAD_SCALE, device=params[0].device)

    def run() -> None:
        norm = get_total_norm([param.grad for param in params]) / scale
        opt.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0).float() * scale
        opt.found_inf = norm.isfinite().logical_not().float()
        opt.step()

    return Tail(opt, run)


BUILDERS: dict[tuple[str, str], Builder] = {
    ("fusedopt", "step"): _fusedopt_step,
    ("fusedopt", "clip_step"): _fusedopt_clip_step,
    ("fusedopt", "scaler_clip_step"): _fusedopt_scaler_clip_step,
    ("fusedopt", "torch_scaler_clip_step"): _fusedopt_torch_scaler_clip_step,
    ("torch-fused", "step"): _torch_step,
    ("torch-fused", "clip_step"): _torch_clip_step,
    ("torch-fused", "scaler_clip_step"): _torch_scaler_clip_step,
    ("torch-grad-scale", "clip_step"): _grad_scale_clip_step,
    ("torch-grad-scale", "scaler_clip_step"): _grad_scale_scaler_clip_step,
}


def libraries(case: Case) -> list[str]:
    """The libraries that offer the case. torch has no Lion."""
    names = [library for library, contract in BUILDERS if contract == case.contract]
    return [name for name in names if name == "fusedopt" or case.optimizer == "adamw"]


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one library over ``params``; its optimizer has no state yet."""
    return BUILDERS[library, case.contract](case.optimizer, params)


def reported_name(library: str, device: torch.device) -> str:
    return f"fusedopt-{device.type}" if library == "fusedopt" else library
