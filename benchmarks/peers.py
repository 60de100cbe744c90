"""Other libraries' step tails for the formats that torch does not have: measured where they are installed.

=================  ==========================================================================================
``flashoptim``     ``FlashAdamW``, ``FlashLion``: bf16 parameters, 8 more bits of a master, 8-bit states
``bitsandbytes``   ``AdamW8bit``: 8-bit states, no master
``apex``           ``FusedAdam(master_weights=True)`` under ``GradScaler``, gradients clipped by apex's own clip
=================  ==========================================================================================

Nothing here installs them; ``missing`` says which ones are not there, and why.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from benchmarks.contracts import HYPER, MAX_NORM, STATES, Builder, Case, Kept, Params, Tail, clone, grad_scaler

MODULES = {
    "flashoptim": ("flashoptim",),
    "bitsandbytes": ("bitsandbytes",),
    "apex": ("amp_C", "apex.optimizers", "apex.contrib.clip_grad"),
}
"""By library: what must be importable. Without ``amp_C`` apex falls back to torch's clip, and has no FusedAdam."""


def _flashoptim_step(case: Case, params: Params) -> Tail:
    import flashoptim

    cls = {"adamw": flashoptim.FlashAdamW, "lion": flashoptim.FlashLion}[case.optimizer]
    opt = cls(params, **HYPER[case.optimizer], master_weight_bits=24)
    steps = 0  # FlashLion counts none

    def run() -> None:
        nonlocal steps
        steps += 1
        opt.step()

    def read(param: torch.nn.Parameter) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0, param.detach().clone(), {})
        states = clone({key: entry[key].materialize() for key in STATES[case.optimizer]})
        master = flashoptim.reconstruct_fp32_param(param.detach(), entry["error_bits"])
        return Kept(float(entry.get("step", steps)), master, states)

    return Tail(opt, run, read, own_states=True)


def _bitsandbytes_step(case: Case, params: Params) -> Tail:
    import bitsandbytes

    opt = bitsandbytes.optim.AdamW8bit(params, **HYPER["adamw"])

    def read(param: torch.nn.Parameter) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0, param.detach().clone(), {})
        states = {key: _dequantized(entry, i) for i, key in enumerate(STATES["adamw"], 1)}
        return Kept(float(entry["step"]), param.detach().clone(), states)

    return Tail(opt, opt.step, read, own_states=True)


def _dequantized(entry: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    """State 1 or 2 of bitsandbytes: a table looked up by code, times the largest magnitude of each 256 elements."""
    codes = entry[f"state{number}"]
    if codes.is_floating_point():  # a small tensor
        return codes.detach().clone()
    scales = entry[f"absmax{number}"].repeat_interleave(256)[: codes.numel()]
    return (entry[f"qmap{number}"][codes.flatten().int()] * scales).view_as(codes)


def _apex_scaler_clip_step(case: Case, params: Params) -> Tail:
    """Gradients are clipped before they are unscaled, as fp16 gradients must: ``unscale_`` refuses them."""
    from apex.contrib.clip_grad import clip_grad_norm_
    from apex.optimizers import FusedAdam

    opt = FusedAdam(params, **HYPER["adamw"], adam_w_mode=True, capturable=True, master_weights=True)
    scaler = grad_scaler(params[0].device)
    masters = dict(zip(map(id, params), opt.param_groups_master[0]["params"]))

    def run() -> None:
        clip_grad_norm_(params, MAX_NORM * scaler.get_scale())
        scaler.step(opt)
        scaler.update()

    def read(param: torch.nn.Parameter) -> Kept:
        entry = opt.state.get(param)
        states = clone({key: entry[key] for key in STATES["adamw"]}) if entry else {}
        return Kept(float(opt.param_groups[0].get("step", 0)), masters[id(param)].clone(), states)

    # GradScaler says in every step that it will hand itself over in another way one day.
    warnings.filterwarnings("ignore", message="GradScaler is going to stop passing itself", category=FutureWarning)
    return Tail(opt, run, read, clips_in_place=True)


BUILDERS: dict[tuple[str, str], Builder] = {
    ("flashoptim", "adamw/bf16+split8+int8/step"): _flashoptim_step,
    ("flashoptim", "lion/bf16+split8+int8/step"): _flashoptim_step,
    ("bitsandbytes", "adamw/bf16+int8/step"): _bitsandbytes_step,
    ("bitsandbytes", "adamw/fp32+int8/step"): _bitsandbytes_step,
    ("apex", "adamw/fp16+fp32 master/scaler_clip_step"): _apex_scaler_clip_step,
}
"""By library and variant of a case."""


@functools.cache
def why_missing(library: str) -> str | None:
    """What importing the library raised; None if it is there."""
    try:
        for module in MODULES[library]:
            importlib.import_module(module)
    except Exception as error:  # half-installed libraries raise all sorts
        return f"{type(error).__name__}: {error}"
    return None


def offered(case: Case, device: torch.device) -> list[str]:
    """The libraries that can do the case, whether they are installed or not. All of them are for CUDA devices."""
    return [library for library, variant in BUILDERS if variant == case.variant and device.type == "cuda"]


def installed(case: Case, device: torch.device) -> list[str]:
    return [library for library in offered(case, device) if why_missing(library) is None]


def missing(cases: list[Case], device: torch.device) -> dict[str, str]:
    """Libraries that some case would be measured with if they were there, and what importing them raised."""
    wanted = dict.fromkeys(library for case in cases for library in offered(case, device))
    return {library: reason for library in wanted if (reason := why_missing(library)) is not None}


def versions(cases: list[Case], device: torch.device) -> dict[str, str]:
    """Of the libraries that the cases are measured with; "unknown" where a library does not say."""
    there = dict.fromkeys(library for case in cases for library in installed(case, device))
    return {library: getattr(importlib.import_module(library), "__version__", "unknown") for library in there}


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one of ``installed(case)`` over ``params``; its optimizer has no state yet."""
    return BUILDERS[library, case.variant](case, params)
