"""Other libraries' step tails: measured where they are installed.

======================  =====================================================================================
``apex``                ``FusedAdam``, in fp16 with fp32 masters too; gradients clipped by apex's own clip
``transformer-engine``  ``FusedAdam``, in fp32 and for bf16 with fp32 masters
``deepspeed``           ``FusedAdam`` on GPUs, ``DeepSpeedCPUAdam`` on CPUs
``bitsandbytes``        ``AdamW8bit``, ``Lion8bit``: 8-bit states, no master; ``AdamW``, ``Lion`` with 32-bit states
``torchao``             ``AdamW8bit``, and ``_AdamW`` with stochastic rounding: compiled by ``torch.compile``
``flashoptim``          ``FlashAdamW``, ``FlashLion``: bf16 parameters, 8 more bits of a master, 8-bit states
``optimi``              ``AdamW`` and ``Lion``: Triton on GPUs, foreach on CPUs
``lion-pytorch``        ``Lion``: Triton on GPUs
======================  =====================================================================================

Those without a clip of their own are given torch's ``clip_grad_norm_``, as their users do. Nothing here installs
them; ``missing`` says which ones are not there, and why.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.utils import clip_grad_norm_

from .contracts import HYPER, MAX_NORM, STATES, Builder, Case, Kept, Params, Reader, Tail, clone, cut, grad_scaler
from .contracts import scaled as torch_scaled

MODULES = {
    "apex": ("amp_C", "apex.optimizers", "apex.contrib.clip_grad"),
    "transformer-engine": ("transformer_engine.pytorch.optimizers",),
    "deepspeed": ("deepspeed.ops.adam",),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao.optim",),
    "flashoptim": ("flashoptim",),
    "optimi": ("optimi",),
    "lion-pytorch": ("lion_pytorch",),
}
"""By library: what must be importable. Without ``amp_C`` apex falls back to torch's clip, and has no FusedAdam."""

DEVICES = {"apex": ("cuda",), "transformer-engine": ("cuda",), "flashoptim": ("cuda",)}
"""Of libraries that are not for both kinds."""


@dataclass(frozen=True)
class Limit:
    """Beyond it a library ends the process: nobody can catch that, so it is not run there."""

    elements: int
    """Most that one tensor may have."""
    reason: str


LIMITS = {
    "bitsandbytes": Limit(2**31 - 1, 'it counts them in 32 bits, and exits on CUDA\'s "invalid argument"'),
}
"""Known ones, by library."""


def _reader(
    opt: torch.optim.Optimizer, case: Case, master: str | None = None, counting: torch.nn.Parameter | None = None
) -> Reader:
    """For states under torch's names, and steps counted beside them or in the param group.

    Args:
        master: key of the full master in the state, if there is one.
        counting: the parameter whose state counts the steps of all, if not each one's does.
    """

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(None, cut(param, part).clone(), {})
        counter = entry if counting is None else opt.state[counting]
        steps = counter.get("step", opt.param_groups[0].get("step"))
        value = cut(entry[master] if master else param, part).clone()
        states = clone({key: cut(entry[key], part) for key in STATES[case.optimizer]})
        return Kept(None if steps is None else float(steps), value, states)

    return read


# ------------------------------------------------------------------------------------------------- apex and its kin


def _apex_step(case: Case, params: Params) -> Tail:
    from apex.optimizers import FusedAdam

    opt = FusedAdam(params, **HYPER["adamw"], adam_w_mode=True)
    return Tail(opt, opt.step, _reader(opt, case))


def _transformer_engine_step(case: Case, params: Params) -> Tail:
    from transformer_engine.pytorch.optimizers import FusedAdam

    masters = case.layout.dtype != torch.float32
    opt = FusedAdam(params, **HYPER["adamw"], adam_w_mode=True, master_weights=masters)
    return Tail(opt, opt.step, _reader(opt, case, "master_param" if masters else None))


def _deepspeed_step(case: Case, params: Params) -> Tail:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if params[0].device.type == "cuda":
        opt = FusedAdam(params, **HYPER["adamw"], adam_w_mode=True)  # counts in its last parameter's state alone
    else:
        opt = DeepSpeedCPUAdam(params, **HYPER["adamw"], adamw_mode=True)
    return Tail(opt, opt.step, _reader(opt, case, counting=params[-1]))


def _flashoptim_step(case: Case, params: Params) -> Tail:
    import flashoptim

    cls = {"adamw": flashoptim.FlashAdamW, "lion": flashoptim.FlashLion}[case.optimizer]
    opt = cls(params, **HYPER[case.optimizer], master_weight_bits=24)
    steps = 0  # FlashLion counts none

    def run() -> None:
        nonlocal steps
        steps += 1
        opt.step()

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0, cut(param, part).clone(), {})
        states = clone({key: cut(entry[key].materialize(), part) for key in STATES[case.optimizer]})
        master = flashoptim.reconstruct_fp32_param(param.detach(), entry["error_bits"])
        return Kept(float(entry.get("step", steps)), cut(master, part).clone(), states)

    return Tail(opt, run, read, own_states=True)


# ------------------------------------------------------------------------------- states in codes or of another meaning


def _bitsandbytes_step(case: Case, params: Params) -> Tail:
    import bitsandbytes

    name = {"adamw": "AdamW", "lion": "Lion"}[case.optimizer]
    codes = case.format.endswith("int8")
    cls = getattr(bitsandbytes.optim, name + ("8bit" if codes else ""))
    opt = cls(params, **HYPER[case.optimizer], **({} if codes else {"optim_bits": 32}))

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0, cut(param, part).clone(), {})
        states = {key: _dequantized(entry, i, part) for i, key in enumerate(STATES[case.optimizer], 1)}
        return Kept(float(entry["step"]), cut(param, part).clone(), states)

    return Tail(opt, opt.step, read, own_states=codes)


def _dequantized(entry: dict[str, torch.Tensor], number: int, part: slice) -> torch.Tensor:
    """State 1 or 2 of bitsandbytes: a table looked up by code, times the largest magnitude of each 256 elements."""
    codes = cut(entry[f"state{number}"], part)
    if codes.is_floating_point():  # a small tensor, or 32-bit states
        return codes.clone()
    scales = entry[f"absmax{number}"].repeat_interleave(256)[part]
    return entry[f"qmap{number}"][codes.int()] * scales


def _torchao_step(case: Case, params: Params) -> Tail:
    import torchao.optim

    torch._dynamo.reset()  # the graphs of other cases count towards its limit, beyond which it compiles no more
    cls = torchao.optim.AdamW8bit if case.format.endswith("int8") else torchao.optim._AdamW
    opt = cls(params, **HYPER["adamw"], bf16_stochastic_round=case.format == "bf16+sr")

    def value(state: torch.Tensor) -> torch.Tensor:
        return state.dequantize() if hasattr(state, "codes") else state

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0, cut(param, part).clone(), {})
        states = clone({key: cut(value(entry[key]), part) for key in STATES["adamw"]})
        return Kept(float(entry["step"]), cut(param, part).clone(), states)

    return Tail(opt, opt.step, read, own_states=case.format.endswith("int8"))


def _optimi_step(case: Case, params: Params) -> Tail:
    """Its Adam keeps averages that are divided by 1 - beta^t already."""
    import optimi

    cls = {"adamw": optimi.AdamW, "lion": optimi.Lion}[case.optimizer]
    opt = cls(params, **HYPER[case.optimizer], kahan_sum=False, triton=params[0].device.type == "cuda")
    betas = dict(zip(STATES["adamw"], HYPER["adamw"]["betas"])) if case.optimizer == "adamw" else {}

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(None, cut(param, part).clone(), {})
        states = clone({key: cut(entry[key], part) for key in STATES[case.optimizer]})
        steps = float(opt.param_groups[0]["step"]) if betas else None
        for key, beta in betas.items():
            states[key] = states[key].double() * (1 - beta**steps)
        return Kept(steps, cut(param, part).clone(), states)

    return Tail(opt, opt.step, read)


def _lion_pytorch_step(case: Case, params: Params) -> Tail:
    import lion_pytorch

    opt = lion_pytorch.Lion(params, **HYPER["lion"], use_triton=params[0].device.type == "cuda")
    return Tail(opt, opt.step, _reader(opt, case))


# ------------------------------------------------------------------------------------------------ clipping and scaling


def _clipped(library: str, tail: Tail, params: Params) -> Tail:
    """Clipping before the step: apex's own, torch's for the others."""
    clip: Callable[[Params, float], object] = clip_grad_norm_
    if library == "apex":
        clip = importlib.import_module("apex.contrib.clip_grad").clip_grad_norm_

    def run() -> None:
        clip(params, MAX_NORM)
        tail.run()

    return replace(tail, run=run, clips_in_place=True)


def _apex_fp32_scaler_clip_step(case: Case, params: Params) -> Tail:
    """GradScaler unscales, torch clips; FusedAdam then steps as any optimizer."""
    tail = _apex_step(case, params)
    return replace(tail, run=torch_scaled(tail.optimizer, params).run, clips_in_place=True)


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

    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        states = clone({key: cut(entry[key], part) for key in STATES["adamw"]}) if entry else {}
        steps = float(opt.param_groups[0].get("step", 0))
        return Kept(steps, cut(masters[id(param)], part).clone(), states)

    # GradScaler says in every step that it will hand itself over in another way one day.
    warnings.filterwarnings("ignore", message="GradScaler is going to stop passing itself", category=FutureWarning)
    return Tail(opt, run, read, clips_in_place=True)


STEPS: dict[str, tuple[Callable[[Case, Params], Tail], tuple[str, ...]]] = {
    "apex": (_apex_step, ("adamw/fp32",)),
    "transformer-engine": (_transformer_engine_step, ("adamw/fp32", "adamw/bf16+fp32 master")),
    "deepspeed": (_deepspeed_step, ("adamw/fp32",)),
    "bitsandbytes": (
        _bitsandbytes_step,
        ("adamw/bf16+int8", "adamw/fp32+int8", "adamw/fp32", "lion/fp32", "lion/bf16+int8"),
    ),
    "torchao": (_torchao_step, ("adamw/bf16+int8", "adamw/fp32+int8", "adamw/bf16+sr")),
    "flashoptim": (_flashoptim_step, ("adamw/bf16+split8+int8", "lion/bf16+split8+int8")),
    "optimi": (_optimi_step, ("adamw/fp32", "lion/fp32", "adamw/bf16", "lion/bf16")),
    "lion-pytorch": (_lion_pytorch_step, ("lion/fp32", "lion/bf16")),
}
"""By library: what builds its step, and the optimizers and formats that it has."""

SCALED: dict[tuple[str, str], Builder] = {
    ("apex", "adamw/fp16+fp32 master"): _apex_scaler_clip_step,
    ("apex", "adamw/fp32"): _apex_fp32_scaler_clip_step,
}
"""With a GradScaler and clipping, by library, optimizer and format."""


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
    """The libraries that can do the case, whether they are installed or not."""
    return [name for name in MODULES if device.type in DEVICES.get(name, ("cuda", "cpu")) and _can(name, case)]


def _can(library: str, case: Case) -> bool:
    kind = f"{case.optimizer}/{case.format}"
    if case.contract == "scaler_clip_step":
        return (library, kind) in SCALED
    return case.contract in ("step", "clip_step") and kind in STEPS[library][1]


def installed(case: Case, device: torch.device) -> list[str]:
    return [library for library in offered(case, device) if why_missing(library) is None]


def missing(cases: list[Case], device: torch.device, among: Iterable[str] = tuple(MODULES)) -> dict[str, str]:
    """Those of ``among`` that some case would be measured with if they were there, and what importing them raised."""
    wanted = _wanted(cases, device, among)
    return {library: reason for library in wanted if (reason := why_missing(library)) is not None}


def versions(cases: list[Case], device: torch.device, among: Iterable[str] = tuple(MODULES)) -> dict[str, str]:
    """Of those of ``among`` that the cases are measured with; "unknown" where a library does not say."""
    return {library: version(library) for library in _wanted(cases, device, among) if why_missing(library) is None}


def _wanted(cases: list[Case], device: torch.device, among: Iterable[str]) -> list[str]:
    can = {library for case in cases for library in offered(case, device)}
    return sorted(can & set(among))


def version(library: str) -> str:
    """Of an installed library; "unknown" where it does not say."""
    module = importlib.import_module(MODULES[library][-1].partition(".")[0])
    return getattr(module, "__version__", "unknown")


def refuse_beyond_limit(library: str, params: Params) -> None:
    """Raises: RuntimeError: a parameter is larger than the library can take without ending the process."""
    limit = LIMITS.get(library)
    for i, param in enumerate(params):
        if limit and param.numel() > limit.elements:
            raise RuntimeError(
                f"not run: {library} would end the process: params[{i}] has {param.numel():,} elements, expected at "
                f"most {limit.elements:,}; {limit.reason}"
            )


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one of ``installed(case)`` over ``params``; its optimizer has no state yet.

    Raises:
        RuntimeError: the library would end the process.
    """
    refuse_beyond_limit(library, params)
    if case.contract == "scaler_clip_step":
        return SCALED[library, f"{case.optimizer}/{case.format}"](case, params)
    tail = STEPS[library][0](case, params)
    return tail if case.contract == "step" else _clipped(library, tail, params)
