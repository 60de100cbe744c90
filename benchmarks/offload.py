"""Times training steps whose optimizer states are in host memory (``offload="cpu"``), beside what limits them.

    python benchmarks/offload.py --json benchmarks/results/offload-h100.json
    python benchmarks/offload.py --device cpu --quick

A step is a backward pass that costs next to nothing (each gradient is handed over as it is), then the clip, if any, and
the optimizer's step, until the device is done: so whatever a library copies while gradients appear counts too.

====================  =============================================================================================
``fusedopt-offload``  ``AdamW(offload="cpu")``
``fusedopt``          the same without ``offload``: all on the device
``fusedopt-host``     the model on the CPU too: the CPU engine alone, without copies
``torch-host``        pinned copies of parameters and gradients, ``torch.optim.AdamW(fused=True)`` on the CPU: copy all
                      gradients, step, copy all parameters, one after the other
``deepspeed``         the same with ``DeepSpeedCPUAdam``
``torchao``           ``CPUOffloadOptimizer`` over ``torch.optim.AdamW(fused=True)``; it cannot clip
====================  =============================================================================================

Limits, measured before the rows: ``down_gbps``, ``up_gbps``, copies between pinned memory and the device, each way
while the other one is busy too; ``host_gbps``, bytes read and written by all threads, the best of a copy, a triad and a
scaling in place. Of each case:

* ``bus_ms``: its bytes, the slower way. Down go gradients, and parameters that no master on the host overwrites; up go
  parameters;
* ``host_ms``: what the update reads and writes (gradient, parameter, master, states), and what the copies read and
  write in host memory;
* ``floor_ms``: the larger one; ``efficiency``: its share of ``wall_ms``, a step's median.

``device_bytes``: the most that is allocated in a step, beyond parameters and gradients; ``host_bytes``: what the
process takes more after the steps than before (resident set); ``check_params``: largest difference of a parameter from
torch's AdamW after the first step, in units of the learning rate.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter_ns

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
from benchmarks.goals import Goal, Rows
from fusedopt.bench import peers, timing
from fusedopt.bench.contracts import HYPER, MAX_NORM
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.workloads import WORKLOADS, Workload
from fusedopt.optim.offload import Offload

WARM_UP_STEPS = 2
CHECKED = 4096  # elements of each parameter
WORST_CHECK = 0.5  # of a learning rate: bfloat16 rounds, gradients near zero make Adam's first step a matter of eps
QUICK = Workload("quick", ((300, 1000), (1000,), (257, 129)))


@dataclass(frozen=True)
class Format:
    """Of parameters and states, and the bytes that a step moves of each element."""

    dtype: torch.dtype
    options: dict[str, str]
    down: int
    up: int
    update: int
    """That the engine reads and writes."""


FORMATS = {
    "fp32": Format(torch.float32, {}, down=8, up=4, update=28),
    "bf16-master": Format(torch.bfloat16, {"master_weights": "fp32"}, down=2, up=2, update=28),
    "bf16-split8-int8": Format(
        torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8"}, down=4, up=2, update=12
    ),
}


@dataclass(frozen=True)
class Case:
    workload: Workload
    format: str
    contract: str
    """"step" or "clip_step"."""

    @property
    def max_norm(self) -> float | None:
        return MAX_NORM if self.contract == "clip_step" else None

    @property
    def name(self) -> str:
        return f"{self.workload.name}/adamw/{self.format}/{self.contract}"


@dataclass(frozen=True)
class Repeats:
    steps: int
    copy_bytes: int
    copies: int


FULL = Repeats(steps=10, copy_bytes=1 << 30, copies=7)
FAST = Repeats(steps=2, copy_bytes=4 << 20, copies=3)


# ------------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limits:
    """GB/s, 10^9 bytes."""

    host_gbps: float
    down_gbps: float
    up_gbps: float
    down_alone_gbps: float
    up_alone_gbps: float

    @classmethod
    def measure(cls, device: torch.device, repeats: Repeats) -> Limits:
        host = torch.device("cpu")
        rates = [timing.copy_gbps(host, repeats.copy_bytes, repeats.copies)]
        rates.append(timing.triad_gbps(host, repeats.copy_bytes, repeats.copies))
        rates.append(_scaling_gbps(repeats))
        return cls(max(rates), *_bus_gbps(device, repeats))


def _best_gbps(move: Callable[[], object], nbytes: int, device: torch.device, repeats: Repeats) -> float:
    times = []
    for _ in range(1 + repeats.copies):
        timing.synchronize(device)
        start = perf_counter_ns()
        move()
        timing.synchronize(device)
        times.append(perf_counter_ns() - start)
    return nbytes / min(times[1:])


def _scaling_gbps(repeats: Repeats) -> float:
    """Reads and writes the same lines: nothing is fetched only to be overwritten."""
    values = torch.ones(repeats.copy_bytes // 4)
    return _best_gbps(lambda: values.mul_(1.0), 2 * values.nbytes, values.device, repeats)


def _bus_gbps(device: torch.device, repeats: Repeats) -> tuple[float, float, float, float]:
    """Down and up at once, and each alone."""
    pinned = [_pinned(repeats.copy_bytes, device) for _ in range(2)]
    remote = [torch.zeros(repeats.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]

    def copy(way: int) -> None:
        target, source = (pinned[0], remote[0]) if way == 0 else (remote[1], pinned[1])
        with torch.cuda.stream(streams[way]):
            target.copy_(source, non_blocking=True)

    def both() -> None:
        copy(0)
        copy(1)

    nbytes = repeats.copy_bytes
    together = _best_gbps(both, nbytes, device, repeats)
    return (together, together, *(_best_gbps(lambda way=way: copy(way), nbytes, device, repeats) for way in range(2)))


def _pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


# ---------------------------------------------------------------------------------------------------------- libraries

Params = list[torch.nn.Parameter]
Tail = Callable[[], object]
"""Clip and step, behind a backward pass."""


def _fusedopt(params: Params, case: Case, offload: str | None = None) -> Tail:
    options = FORMATS[case.format].options
    opt = fusedopt.AdamW(params, max_grad_norm=case.max_norm, offload=offload, **options, **HYPER["adamw"])
    if offload and params[0].device.type == "cpu":
        opt._offload = replace(Offload(), even_from_cpu=True)
    return opt.step


def _clipped(params: Params, case: Case, step: Tail) -> Tail:
    if case.max_norm is None:
        return step

    def tail() -> None:
        torch.nn.utils.clip_grad_norm_(params, case.max_norm)
        step()

    return tail


def _on_host(params: Params, make: Callable[[Params], torch.optim.Optimizer]) -> Tail:
    """Pinned twins of parameters and gradients, and an optimizer over them."""
    device = params[0].device
    twins = []
    for param in params:
        flat = [_pinned(param.nbytes, device).view(param.dtype) for _ in range(2)]
        twin = torch.nn.Parameter(flat[0].view(param.shape).copy_(param.detach()))
        twin.grad = flat[1].view(param.shape)
        twins.append(twin)
    opt = make(twins)

    @torch.no_grad()
    def tail() -> None:
        for twin, param in zip(twins, params):
            twin.grad.copy_(param.grad, non_blocking=True)
        timing.synchronize(device)
        opt.step()
        for twin, param in zip(twins, params):
            param.copy_(twin, non_blocking=True)

    return tail


def _torch_host(params: Params, case: Case) -> Tail:
    step = _on_host(params, lambda twins: torch.optim.AdamW(twins, fused=True, **HYPER["adamw"]))
    return _clipped(params, case, step)


def _deepspeed(params: Params, case: Case) -> Tail:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    step = _on_host(params, lambda twins: DeepSpeedCPUAdam(twins, adamw_mode=True, **HYPER["adamw"]))
    return _clipped(params, case, step)


def _torchao(params: Params, case: Case) -> Tail:
    from torchao.optim import CPUOffloadOptimizer

    return CPUOffloadOptimizer(params, torch.optim.AdamW, fused=True, **HYPER["adamw"]).step


LIBRARIES: dict[str, Callable[[Params, Case], Tail]] = {
    "fusedopt-offload": lambda params, case: _fusedopt(params, case, "cpu"),
    "fusedopt": _fusedopt,
    "fusedopt-host": _fusedopt,
    "torch-host": _torch_host,
    "deepspeed": _deepspeed,
    "torchao": _torchao,
}


def offered(case: Case, device: torch.device) -> list[str]:
    """Peers keep fp32 states beside fp32 parameters; torchao copies gradients before they could be clipped."""
    names = ["fusedopt-offload", "fusedopt", "fusedopt-host"]
    if case.format == "fp32":
        names += ["torch-host", "deepspeed"]
    if case.format == "fp32" and case.max_norm is None and device.type == "cuda":
        names.append("torchao")
    return names


def why_missing(library: str) -> str | None:
    return peers.why_missing(library) if library in peers.MODULES else None


# -------------------------------------------------------------------------------------------------------- measurement


class Training:
    """Parameters, and a backward pass that hands out gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.device, dtype = device, FORMATS[case.format].dtype
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)

        self.params = [torch.nn.Parameter(normal(shape, 0.02)) for shape in case.workload.shapes]
        self.given = [normal(shape, 1e-3) for shape in case.workload.shapes]

    def backward(self) -> None:
        for param in self.params:
            param.grad = None
        torch.autograd.backward([param.view_as(param) for param in self.params], self.given)

    def first_elements(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.detach().reshape(-1)[:CHECKED].clone().float().cpu() for tensor in tensors]

    def timed(self, tail: Tail) -> float:
        """Milliseconds from an idle device until it is idle again."""
        timing.synchronize(self.device)
        start = perf_counter_ns()
        self.backward()
        tail()
        timing.synchronize(self.device)
        return (perf_counter_ns() - start) / timing.NS_PER_MS


def expected_first_step(training: Training, case: Case) -> list[torch.Tensor]:
    """By torch, of some elements, from the gradients and the parameters as they are now."""
    coef = 1.0
    if case.max_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack([each.float().norm() for each in training.given]))
        coef = min(1.0, case.max_norm / (norm.item() + 1e-6))
    params = [torch.nn.Parameter(part) for part in training.first_elements(training.params)]
    for param, grad in zip(params, training.first_elements(training.given)):
        param.grad = grad * coef
    torch.optim.AdamW(params, **HYPER["adamw"]).step()
    return [param.detach().to(FORMATS[case.format].dtype).float() for param in params]


def measure(library: str, case: Case, device: torch.device, repeats: Repeats, limits: Limits) -> Row:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    training = Training(case, torch.device("cpu") if library == "fusedopt-host" else device)
    training.backward()
    timing.synchronize(device)
    before, resident = _start_peak(device), _resident_bytes()
    expected = expected_first_step(training, case)
    tail = LIBRARIES[library](training.params, case)
    training.timed(tail)
    differences = zip(training.first_elements(training.params), expected)
    check = max(float((got - want).abs().max()) for got, want in differences) / HYPER["adamw"]["lr"]
    if not check <= WORST_CHECK:
        raise AssertionError(f"{case.name} {library}: off by {check} learning rates after one step")
    with timing.no_garbage_collection():
        times = [training.timed(tail) for _ in range(WARM_UP_STEPS + repeats.steps)][WARM_UP_STEPS:]
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return _row(library, case, times, limits) | {
        "device_bytes": peak,
        "host_bytes": _resident_bytes() - resident,
        "check_params": check,
    }


def _row(library: str, case: Case, times: list[float], limits: Limits) -> Row:
    form, numel = FORMATS[case.format], case.workload.numel
    bus = max(form.down / limits.down_gbps, form.up / limits.up_gbps) * numel / 1e6
    host = (form.update + form.down + form.up) * numel / limits.host_gbps / 1e6
    wall = statistics.median(times)
    offloaded = library not in ("fusedopt", "fusedopt-host")
    return {
        "workload": case.workload.name,
        "optimizer": "adamw",
        "format": case.format,
        "contract": case.contract,
        "library": library,
        "tensors": len(case.workload.shapes),
        "params": numel,
        "wall_ms": wall,
        "wall_ms_min": min(times),
        "wall_ms_max": max(times),
        "samples": len(times),
        "bus_ms": bus if offloaded else None,
        "host_ms": host if offloaded else None,
        "floor_ms": max(bus, host) if offloaded else None,
        "efficiency": max(bus, host) / wall if offloaded else None,
    }


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _resident_bytes() -> int:
    """Of this process, in memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# -------------------------------------------------------------------------------------------------------------- goals

LARGE = "llama-1.3B/adamw"
OURS = "fusedopt-offload"


def _share(case: str) -> Goal:
    return Goal(f"{case}: share of the limit", lambda rows: rows.figure("efficiency", case, OURS), ">=", 0.85)


GOALS = [_share(f"{LARGE}/{form}/{contract}") for form in ("fp32", "bf16-master") for contract in ("step", "clip_step")]
"""8-bit states take the engine more arithmetic than memory: their rows are there to be read."""


def report(console: Console, result: Row) -> None:
    limits = "  ".join(f"{key} {value:.1f}" for key, value in result["limits"].items())
    console.print(f"{result['device']}, {result['threads']} threads: {limits}", highlight=False)
    for row in result["rows"]:
        figures = ("wall_ms", "floor_ms", "bus_ms", "host_ms", "efficiency", "device_bytes", "host_bytes")
        told = "  ".join(f"{key} {row[key]:.4g}" for key in figures if row[key] is not None)
        name = "/".join(str(row[key]) for key in ("workload", "format", "contract"))
        console.print(f"{name:<32} {row['library']:<17} {told}", highlight=False)
    for library, reason in result["missing_libraries"].items():
        console.print(f"missing, so not compared with: {library} ({reason})", markup=False)
    for name, reason in result["failed"].items():
        console.print(f"FAILED {name}: {reason}", markup=False)
    for goal in result["goals"]:
        console.print(f"{goal['name']}: {goal['value']:.4g} {goal['relation']} {goal['bound']}")


def run(cases: list[Case], device: torch.device, repeats: Repeats, path: Path | None, names: list[str]) -> Row:
    """The JSON file is written after each row, so that what was measured outlives the process."""
    limits = Limits.measure(device, repeats)
    wanted = {name for case in cases for name in offered(case, device) if not names or name in names}
    missing = {name: reason for name in sorted(wanted) if (reason := why_missing(name)) is not None}
    result = environment(device) | {"limits": vars(limits), "missing_libraries": missing, "rows": [], "failed": {}}
    for case in cases:
        for library in offered(case, device):
            if library in missing or library not in wanted:
                continue
            try:
                result["rows"].append(measure(library, case, device, repeats, limits))
            except Exception as error:  # of other libraries, which must not cost our rows
                if library.startswith("fusedopt"):
                    raise
                result["failed"][f"{case.name} {library}"] = f"{type(error).__name__}: {error}"
            judged = [goal.judge(Rows(result["rows"])) for goal in GOALS]
            result["goals"] = [goal for goal in judged if goal["value"] is not None]
            write(path, result)
    return result


@click.command(help=__doc__.partition("\n")[0], context_settings={"show_default": True})
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)), help="llama-1.3B if none.")
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), help="All if none.")
@click.option("--contract", "contracts", multiple=True, type=click.Choice(["step", "clip_step"]), help="Both if none.")
@click.option("--library", "libraries", multiple=True, type=click.Choice(list(LIBRARIES)), help="All if none.")
@click.option("--quick", is_flag=True, help="A small model, few steps.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where every figure is written.")
def main(device_type, workloads, formats, contracts, libraries, quick: bool, path: Path | None) -> None:
    chosen = [QUICK] if quick else [WORKLOADS[name] for name in workloads or ("llama-1.3B",)]
    cases = [
        Case(workload, form, contract)
        for workload in chosen
        for form in formats or FORMATS
        for contract in contracts or ("step", "clip_step")
    ]
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    report(Console(width=200), run(cases, device, FAST if quick else FULL, path, list(libraries)))


if __name__ == "__main__":
    main()
