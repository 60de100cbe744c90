"""What is measured: a contract says what one step tail has to do, a library says who does it.

Contracts, all on gradients that the backward pass has just left in ``.grad``:

=========================  =========================================================================
``step``                   the optimizer step alone
``clip_step``              clip the total norm to 1.0, step
``scaler_clip_step``       unscale, check for inf and NaN, clip to 1.0, step (or skip it, decided on the device)
``torch_scaler_clip_step`` the same, driven by ``torch.amp.GradScaler``, which makes its own pass over the gradients
``own_scaler_clip_step``   the same, driven by ``fusedopt.GradScaler``, its ``update()`` included
=========================  =========================================================================

Libraries: ``fusedopt`` (reported as fusedopt-cuda or fusedopt-cpu), ``fusedopt-triton`` (its Triton backend, on GPUs),
``torch-fused`` (``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW(fused=True)``, with ``GradScaler`` where the
contract unscales; its ``update()`` is part of the tail) and ``torch-grad-scale`` (the same optimizer made to clip in
its own kernel through ``grad_scale``, undocumented). For rules other than AdamW ``torch-foreach`` is there too, and
``torch-fused`` where this torch has it.
Torch has neither Lion nor formats beyond the parameters' dtype; for those there are the libraries of ``peers.py``,
and ``graphs.py`` has captured and compiled steps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

import fusedopt

from .. import formats
from ..specs import RULES, STATE_BLOCK, ParamFormatSpec, RuleSpec, StateFormatSpec
from .workloads import FORMATS, WORKLOADS, Format, Model

MAX_NORM = 1.0

# Small, because torch unscales and clips the gradients in place: a run of steps over the same gradients halves them
# each time, and they must stay far from underflow.
GRAD_SCALE = 2.0

HYPER: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "lion": {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 1e-2},
    "adamw_amsgrad": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "radam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "decoupled_weight_decay": True},
    "lamb": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 1e-2,
        "bias_correction": True,
        "adam_w_mode": True,
        "grad_averaging": True,
        "use_nvlamb": False,
    },
    "sgd": {"lr": 1e-2, "weight_decay": 1e-2},
    "sgd_momentum": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 1e-2, "nesterov": False},
    "rmsprop": {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, "weight_decay": 1e-2, "momentum": 0.0},
    "adagrad": {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 1e-2, "eps": 1e-10},
}
"""By rule, as the reference takes them."""

CLASSES = {
    "adamw": "AdamW",
    "lion": "Lion",
    "adamw_amsgrad": "AdamW",
    "radam": "RAdam",
    "lamb": "LAMB",
    "sgd": "SGD",
    "sgd_momentum": "SGD",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
}
"""Of fusedopt and, but for Lion and LAMB, of torch."""

CHOSEN: dict[str, dict[str, Any]] = {"adamw_amsgrad": {"amsgrad": True}}
"""Arguments that choose the rule, where hyper-parameters do not."""

COUPLED = ("sgd", "sgd_momentum", "rmsprop", "adagrad")
"""Whose weight decay is added to the gradient."""

STATES = {name: RULES[name].states for name in HYPER}

_LARGE = 1 << 20  # elements: more than the least number that is kept in 8 bits


@dataclass(frozen=True)
class Case:
    """One line of comparison: every library that can do it is measured on the same tensors."""

    workload: str
    optimizer: str
    format: str
    contract: str

    def __str__(self) -> str:
        return f"{self.workload}/{self.variant}"

    @property
    def variant(self) -> str:
        """All but the workload."""
        return f"{self.optimizer}/{self.format}/{self.contract}"

    @property
    def clips(self) -> bool:
        return self.contract != "step"

    @property
    def scales(self) -> bool:
        return self.contract in ("scaler_clip_step", "torch_scaler_clip_step", "own_scaler_clip_step")

    @property
    def layout(self) -> Format:
        return FORMATS[self.format]

    @property
    def rule(self) -> RuleSpec:
        return RULES[self.optimizer]

    @property
    def param_spec(self) -> ParamFormatSpec:
        return formats.param_format(str(self), self.layout.options, self.layout.dtype)

    def state_spec(self, param: torch.Tensor) -> StateFormatSpec:
        """Small tensors are kept in more bits than large ones."""
        return formats.state_format(str(self), self.layout.options, param)

    def at_rest(self, param: torch.Tensor) -> dict[str, torch.dtype]:
        """State keys and their dtypes for one parameter: its second tensor, and its moments without their scales."""
        state = self.state_spec(param)
        names = {key: state.dtype(moment) for key, moment in zip(self.rule.states, self.rule.moments)}
        if self.param_spec.extra:
            names |= dict([self.param_spec.extra])
        return {key: getattr(torch, name) for key, name in names.items()}

    @property
    def state_bytes_per_param(self) -> int:
        """What an optimizer keeps beside an element of a large parameter; of 8-bit states, without the scales."""
        param = torch.empty(_LARGE, dtype=self.layout.dtype, device="meta")
        return sum(dtype.itemsize for dtype in self.at_rest(param).values())

    @property
    def bytes_per_param(self) -> int:
        """The fewest bytes an element must move through memory: every tensor of a pass read or written once.

        A parameter with a full master beside it is only written. Rules of two phases read everything once more. Of
        8-bit states the codes are counted, not the scales (4 bytes for 256 of them, read and written: 1/32 of a byte a
        state).
        """
        param = torch.empty(_LARGE, dtype=self.layout.dtype, device="meta")
        kept = sum(dtype.itemsize for dtype in self.at_rest(param).values())
        reads = kept if "master_param" in self.at_rest(param) else kept + param.itemsize
        writes = kept + param.itemsize
        gradient_reads = 2 if self.clips else 1  # the norm must be known before the first element is updated
        measured = reads + param.itemsize if self.rule.norms else 0
        return measured + reads + writes + gradient_reads * param.itemsize


@dataclass(frozen=True)
class Kept:
    """What an optimizer knows of part of a parameter, decoded: new flat tensors, no states before the first step."""

    steps: float | None
    """None where nobody counts: torch's SGD."""
    master: torch.Tensor
    """The parameter to all the digits that are kept of it."""
    states: dict[str, torch.Tensor]
    """Under torch's names."""


@dataclass(frozen=True)
class Tail:
    """One library's way to do a case: calling it does one step tail."""

    optimizer: Any
    """Of torch.optim.Optimizer's interface, with attributes of its own; None where a contract has no step."""
    run: Callable[[], object]
    read: Callable[[torch.nn.Parameter, slice], Kept]
    """What is known of a range of a parameter's elements, whose ends are multiples of 256 or the tensor's."""
    clips_in_place: bool = False
    """Whether clipped gradients, or their norm, are rounded to the gradients' dtype."""
    own_states: bool = False
    """Whether states are in codes of the library's own: read, to know what a step starts from, but not judged."""
    gradients: list[torch.Tensor] | None = None
    """Of a step in a CUDA graph: the tensors that it reads gradients from."""

    def __call__(self) -> None:
        self.run()

    def backward(self, model: Model) -> None:
        """Gives the step new gradients, where it looks for them."""
        if self.gradients is None:
            model.backward()
        else:
            torch._foreach_copy_(self.gradients, model.gradients)


Params = list[torch.nn.Parameter]
Reader = Callable[[torch.nn.Parameter, slice], Kept]
Builder = Callable[[Case, Params], Tail]


def param_groups(case: Case, params: Params) -> list[dict[str, Params]]:
    """The parameters in as many param groups of neighbours as the workload has."""
    size = -(-len(params) // WORKLOADS[case.workload].groups)
    return [{"params": params[start : start + size]} for start in range(0, len(params), size)]


def arguments(case: Case) -> dict[str, Any]:
    """Of the optimizer's class, here or in torch."""
    return HYPER[case.optimizer] | CHOSEN.get(case.optimizer, {})


def gradients(params: Params) -> list[torch.Tensor]:
    """Which all have; asking each whether it has one would count in the time of torch's steps."""
    return [param.grad for param in params]  # type: ignore[misc]


def clone(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def cut(tensor: torch.Tensor, part: slice) -> torch.Tensor:
    """A view of a range of a contiguous tensor's elements."""
    return tensor.detach().view(-1)[part]


def cut_entry(entry: dict[str, Any], param: torch.Tensor, part: slice) -> dict[str, Any]:
    """The state of a range of a parameter's elements: of scales of blocks, those of its blocks."""
    blocks = slice(part.start // STATE_BLOCK, -(-part.stop // STATE_BLOCK))
    by_size = {param.numel(): part, -(-param.numel() // STATE_BLOCK): blocks}
    found = dict(entry)
    for key, value in entry.items():
        if key != "step" and torch.is_tensor(value) and value.numel() in by_size:
            found[key] = cut(value, by_size[value.numel()])
    return found


# ---------------------------------------------------------------------------------------------------------- fusedopt


def fusedopt_tail(
    case: Case, params: Params, run: Callable[[Any], Callable[[], object]] | None = None, **transform: object
) -> Tail:
    """``run(optimizer)`` makes what does the step; its ``step`` method if it is None."""
    cls = getattr(fusedopt, CLASSES[case.optimizer])
    opt = cls(param_groups(case, params), **arguments(case), **case.layout.options, **transform)
    return Tail(opt, run(opt) if run else opt.step, fusedopt_reader(opt, case))


def fusedopt_reader(opt: torch.optim.Optimizer, case: Case) -> Reader:
    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(0 if case.rule.states else None, cut(param, part).clone(), {})
        entry = cut_entry(entry, param, part)
        states = clone(formats.decode_states(entry, case.rule))
        return Kept(float(entry["step"]), formats.decode_master(entry, cut(param, part)), states)

    return read


def _fusedopt_step(case: Case, params: Params) -> Tail:
    return fusedopt_tail(case, params)


def _fusedopt_clip_step(case: Case, params: Params) -> Tail:
    return fusedopt_tail(case, params, max_grad_norm=MAX_NORM)


def _fusedopt_scaler_clip_step(case: Case, params: Params) -> Tail:
    scale = torch.full((), GRAD_SCALE, device=params[0].device)

    def unscaling(opt: Any) -> Callable[[], None]:
        def run() -> None:
            opt.grad_scale = scale
            opt.step()

        return run

    return fusedopt_tail(case, params, unscaling, max_grad_norm=MAX_NORM, nonfinite="skip")


def _fusedopt_torch_scaler_clip_step(case: Case, params: Params) -> Tail:
    return _driven_by(grad_scaler(params[0].device), case, params)


def _driven_by(scaler: torch.amp.GradScaler, case: Case, params: Params) -> Tail:
    def driven(opt: torch.optim.Optimizer) -> Callable[[], None]:
        def run() -> None:
            scaler.step(opt)
            scaler.update()

        return run

    return fusedopt_tail(case, params, driven, max_grad_norm=MAX_NORM)


def _fusedopt_own_scaler_clip_step(case: Case, params: Params) -> Tail:
    return _driven_by(grad_scaler(params[0].device, fusedopt.GradScaler), case, params)


# ------------------------------------------------------------------------------------------------------------- torch


def torch_optimizer(case: Case, params: Params, **options: Any) -> torch.optim.Optimizer:
    cls: type[torch.optim.Optimizer] = getattr(torch.optim, CLASSES[case.optimizer])
    return cls(param_groups(case, params), **arguments(case), **(options or {"fused": True}))


def torch_tail(opt: torch.optim.Optimizer, run: Callable[[], object], clips: bool) -> Tail:
    return Tail(opt, run, torch_reader(opt), clips_in_place=clips)


def torch_reader(opt: torch.optim.Optimizer, case: Case | None = None) -> Reader:
    def read(param: torch.nn.Parameter, part: slice) -> Kept:
        entry = opt.state.get(param)
        if not entry:
            return Kept(None if isinstance(opt, torch.optim.SGD) else 0, cut(param, part).clone(), {})
        entry = cut_entry(entry, param, part)
        states = clone({key: value for key, value in entry.items() if key != "step"})
        return Kept(float(entry["step"]) if "step" in entry else None, cut(param, part).clone(), states)

    return read


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Of all tensors in the states, each storage once, which step counters may share."""
    tensors = [value for entry in opt.state.values() for value in entry.values() if torch.is_tensor(value)]
    storages = [part.untyped_storage() for tensor in tensors for part in _plain_parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a wrapper such as torchao's 8-bit states is made of; any other tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain_parts(getattr(tensor, name))]


def grad_scaler(device: torch.device, cls: type[torch.amp.GradScaler] = torch.amp.GradScaler) -> torch.amp.GradScaler:
    scaler = cls(device.type, init_scale=GRAD_SCALE)
    scaler.scale(torch.zeros((), device=device))  # creates the scale tensor, as the first loss does
    return scaler


def _torch_step(case: Case, params: Params) -> Tail:
    opt = torch_optimizer(case, params)
    return torch_tail(opt, opt.step, clips=False)


def _torch_clip_step(case: Case, params: Params) -> Tail:
    return clipped(torch_optimizer(case, params), params)


def clipped(opt: torch.optim.Optimizer, params: Params) -> Tail:
    """Clipping and a step of torch."""

    def run() -> None:
        clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return torch_tail(opt, run, clips=True)


def _foreach_step(case: Case, params: Params) -> Tail:
    opt = torch_optimizer(case, params, foreach=True)
    return torch_tail(opt, opt.step, clips=False)


def _foreach_clip_step(case: Case, params: Params) -> Tail:
    return clipped(torch_optimizer(case, params, foreach=True), params)


def _foreach_scaler_clip_step(case: Case, params: Params) -> Tail:
    return scaled(torch_optimizer(case, params, foreach=True), params)


def _torch_scaler_clip_step(case: Case, params: Params) -> Tail:
    return scaled(torch_optimizer(case, params), params)


def scaled(opt: torch.optim.Optimizer, params: Params) -> Tail:
    """GradScaler, clipping and a step of torch."""
    scaler = grad_scaler(params[0].device)

    def run() -> None:
        scaler.unscale_(opt)
        clip_grad_norm_(params, MAX_NORM)
        scaler.step(opt)
        scaler.update()

    return torch_tail(opt, run, clips=True)


def _grad_scale_clip_step(case: Case, params: Params) -> Tail:
    opt: Any = torch_optimizer(case, params)

    def run() -> None:
        norm = get_total_norm(gradients(params))
        opt.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0).float()
        opt.step()

    return torch_tail(opt, run, clips=True)


def _grad_scale_scaler_clip_step(case: Case, params: Params) -> Tail:
    opt: Any = torch_optimizer(case, params)
    scale = torch.full((), GRAD_SCALE, device=params[0].device)

    def run() -> None:
        norm = get_total_norm(gradients(params)) / scale
        opt.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0).float() * scale
        opt.found_inf = norm.isfinite().logical_not().float()
        opt.step()

    return torch_tail(opt, run, clips=True)


BUILDERS: dict[tuple[str, str], Builder] = {
    ("fusedopt", "step"): _fusedopt_step,
    ("fusedopt", "clip_step"): _fusedopt_clip_step,
    ("fusedopt", "scaler_clip_step"): _fusedopt_scaler_clip_step,
    ("fusedopt", "torch_scaler_clip_step"): _fusedopt_torch_scaler_clip_step,
    ("fusedopt", "own_scaler_clip_step"): _fusedopt_own_scaler_clip_step,
    ("torch-fused", "step"): _torch_step,
    ("torch-fused", "clip_step"): _torch_clip_step,
    ("torch-fused", "scaler_clip_step"): _torch_scaler_clip_step,
    ("torch-fused", "own_scaler_clip_step"): _torch_scaler_clip_step,
    ("torch-foreach", "step"): _foreach_step,
    ("torch-foreach", "clip_step"): _foreach_clip_step,
    ("torch-foreach", "scaler_clip_step"): _foreach_scaler_clip_step,
    ("torch-grad-scale", "clip_step"): _grad_scale_clip_step,
    ("torch-grad-scale", "scaler_clip_step"): _grad_scale_scaler_clip_step,
}


def _on_triton(builder: Builder) -> Builder:
    def build(case: Case, params: Params) -> Tail:
        tail = builder(case, params)
        tail.optimizer.backend = "triton"  # before the first step, which makes the tables
        return tail

    return build


ON_TRITON = {
    contract: _on_triton(builder) for (library, contract), builder in BUILDERS.items() if library == "fusedopt"
}


def other_backends(device: torch.device) -> list[str]:
    """fusedopt on backends that are not the device's default."""
    if device.type != "cuda" or not fusedopt.backends()["triton"].available:
        return []
    return ["fusedopt-triton"]


def libraries(case: Case, device: torch.device) -> list[str]:
    """Those of ``offered`` without what is known to be slower: torch's foreach AdamW, and its GradScaler around one."""
    slower = {"torch-foreach"} if case.optimizer == "adamw" or case.scales else set()
    return [name for name in offered(case, device) if name not in slower]


def offered(case: Case, device: torch.device) -> list[str]:
    """Those of fusedopt and torch that offer the case. torch has no Lion, no LAMB, no formats but plain ones."""
    names = [library for library, contract in BUILDERS if contract == case.contract]
    return [name for name in names if name == "fusedopt" or torch_offers(name, case, device)]


def torch_offers(library: str, case: Case, device: torch.device) -> bool:
    if not hasattr(torch.optim, CLASSES[case.optimizer]) or case.layout.options:
        return False
    if library == "torch-grad-scale" and case.optimizer != "adamw":
        return False
    return library == "torch-foreach" or torch_fuses(CLASSES[case.optimizer], device.type)


@functools.cache
def torch_fuses(name: str, device_type: str) -> bool:
    """Whether this torch has a fused step of a class for a kind of device."""
    cls = getattr(torch.optim, name)
    if "fused" not in inspect.signature(cls).parameters:
        return False
    try:
        opt = cls([param := torch.nn.Parameter(torch.zeros(1, device=device_type))], fused=True)
        param.grad = torch.zeros_like(param)
        opt.step()
    except RuntimeError:
        return False
    return True


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one of ``libraries(case)`` or ``other_backends`` over ``params``; its optimizer has no state yet."""
    if library == "fusedopt-triton":
        return ON_TRITON[case.contract](case, params)
    return BUILDERS[library, case.contract](case, params)


def reported_name(library: str, device: torch.device) -> str:
    return f"fusedopt-{device.type}" if library == "fusedopt" else library
