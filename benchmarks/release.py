"""Peak memory of a training step whose gradients are freed one by one in the backward pass, beside a normal step.

A Llama-shaped model of 1.0 B parameters (``examples/_llama.py``, 18 layers of width 2048), bfloat16 throughout, a small
batch, activations recomputed: gradients are a large part of what a normal step holds. The libraries:

==========================  =================================================================================
``fusedopt``                ``loss.backward(); opt.step(); opt.zero_grad()``
``fusedopt-release``        the same after ``opt.release_gradients(model)``
``torch-fused``             the normal step of ``AdamW(fused=True)``
``torch-in-backward``       an ``AdamW(fused=True)`` for each parameter, stepped by a post-accumulate hook
==========================  =================================================================================

``peak_bytes`` is the largest amount allocated in a step, ``resident_bytes`` what is allocated between steps,
``grad_bytes`` all gradients together; ``same_bits``: whether released steps left the parameters that normal ones did.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import torch

import fusedopt
from benchmarks.captured import deterministic
from examples._llama import Llama, Shape
from fusedopt.bench.contracts import HYPER
from fusedopt.bench.report import Row
from fusedopt.bench.timing import NS_PER_MS, synchronize

CONTRACT = "release"
LIBRARIES = ("fusedopt", "fusedopt-release", "torch-fused", "torch-in-backward")

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Size:
    name: str
    shape: Shape
    batch: int
    context: int
    steps: int


LLAMA_1B = Size(
    "llama-1.0B-model",
    Shape(vocabulary=32000, width=2048, ffn=5504, layers=18, heads=16, kv_heads=16),
    batch=2,
    context=512,
    steps=4,
)
TINY = Size(
    "tiny-model", Shape(vocabulary=256, width=64, ffn=128, layers=2, heads=2, kv_heads=2), batch=2, context=16, steps=2
)

Step = Callable[[], object]


def _fusedopt(model: Llama) -> tuple[object, Step]:
    opt = fusedopt.AdamW(model.parameters(), **HYPER["adamw"])
    return opt, _finish(opt)


def _fusedopt_release(model: Llama) -> tuple[object, Step]:
    opt = fusedopt.AdamW(model.parameters(), **HYPER["adamw"])
    return (opt, opt.release_gradients(model)), _finish(opt)


def _torch_fused(model: Llama) -> tuple[object, Step]:
    opt = torch.optim.AdamW(model.parameters(), **HYPER["adamw"], fused=True)
    return opt, _finish(opt)


def _finish(opt: torch.optim.Optimizer) -> Step:
    def finish() -> None:
        opt.step()
        opt.zero_grad()

    return finish


def _torch_in_backward(model: Llama) -> tuple[object, Step]:
    own = {param: torch.optim.AdamW([param], **HYPER["adamw"], fused=True) for param in model.parameters()}

    def update(param: torch.Tensor) -> None:
        own[param].step()
        own[param].zero_grad()

    for param in own:
        param.register_post_accumulate_grad_hook(update)
    return own, lambda: None


BUILDERS = dict(zip(LIBRARIES, (_fusedopt, _fusedopt_release, _torch_fused, _torch_in_backward), strict=True))


def why_missing(library: str) -> str | None:
    if library == "fusedopt-release" and not hasattr(fusedopt.FusedOptimizer, "release_gradients"):
        return "this version has no FusedOptimizer.release_gradients"
    return None


def train(library: str, size: Size, device: torch.device) -> tuple[Row, list[torch.Tensor]]:
    """The figures of one library and, of ours, the parameters that its steps left, in host memory."""
    gc.collect()
    base = _start_peak(device)
    model = Llama.create(size.shape, device, torch.bfloat16, seed=0)
    keep, finish = BUILDERS[library](model)
    generator = torch.Generator(device).manual_seed(1)
    shape = (size.batch, size.context + 1)
    resident, peaks, times = None, [], []
    for step in range(WARM_UP_STEPS + size.steps):
        tokens = torch.randint(size.shape.vocabulary, shape, generator=generator, device=device)
        resident = _start_peak(device)
        start = perf_counter_ns()
        model.loss(tokens).backward()
        finish()
        synchronize(device)
        if step >= WARM_UP_STEPS:  # before that states and tables are made
            times.append((perf_counter_ns() - start) / NS_PER_MS)
            peaks.append(_peak(device))
    params = list(model.parameters())
    if not all(bool(param.isfinite().all()) for param in params):
        raise AssertionError(f"{library}: a parameter is not finite after {WARM_UP_STEPS + size.steps} steps")
    row = {
        "params": sum(param.numel() for param in params),
        "tensors": len(params),
        "peak_bytes": max(peaks) - base if device.type == "cuda" else None,
        "resident_bytes": resident - base if device.type == "cuda" else None,
        "grad_bytes": sum(param.nbytes for param in params),
        "wall_ms": statistics.median(times),
        "wall_ms_min": min(times),
        "wall_ms_max": max(times),
        "samples": len(times),
    }
    left = [param.detach().cpu() for param in params] if library.startswith("fusedopt") else []
    del keep
    return row, left


def _start_peak(device: torch.device) -> int | None:
    """Bytes allocated now, from which the peak is watched."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure(size: Size, device: torch.device) -> dict[str, Row]:
    """Figures by library, one after the other: two would share the memory. Those that are missing are left out."""
    rows: dict[str, Row] = {}
    normal: list[torch.Tensor] = []
    with deterministic():
        for library in LIBRARIES:
            if why_missing(library):
                continue
            rows[library], left = train(library, size, device)
            if library == "fusedopt":
                normal = left
            elif library == "fusedopt-release":
                rows[library]["same_bits"] = all(map(torch.equal, left, normal))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows
