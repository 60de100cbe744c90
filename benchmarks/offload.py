"""Times training steps whose optimizer states are in host memory (``offload="cpu"``), beside what limits them.

    python benchmarks/offload.py --json benchmarks/results/offload-h100.json
    python benchmarks/offload.py --device cpu --quick

A step is a backward pass that costs next to nothing (each gradient is handed over as it is), then the clip, if any, and
the optimizer's step, until the device is done: so whatever a library copies while gradients appear counts too. The
libraries of a case are all there at once, as far as memory goes, and take turns: a step of each, a step of each.

====================  =============================================================================================
``fusedopt-offload``  ``AdamW(offload="cpu")``
``torch-host``        pinned copies of parameters and gradients, ``torch.optim.AdamW(fused=True)`` on the CPU: copy all
                      gradients, step, copy all parameters, one after the other
``deepspeed``         the same with ``DeepSpeedCPUAdam``
``torchao``           ``CPUOffloadOptimizer`` over ``torch.optim.AdamW(fused=True)``; it cannot clip
``fusedopt``          ``AdamW`` without ``offload``: all on the device
``fusedopt-host``     the model on the CPU too: the CPU engine alone, without copies
====================  =============================================================================================

A library that is missing or fails is named, with its error, and the others go on.

Limits, measured before the rows: ``down_gbps``, ``up_gbps``, copies between pinned memory and the device, each way
while the other one is busy too; ``host_gbps``, bytes read and written by all threads, the best of a copy, a triad and a
scaling in place. Of each case:

* ``bus_ms``: its bytes, the slower way. Down go gradients, and parameters that no master on the host overwrites; up go
  parameters;
* ``host_ms``: what the update reads and writes (gradient, parameter, master, states), and what the copies read and
  write in host memory;
* ``floor_ms``: the larger one; ``efficiency``: its share of ``wall_ms``, a step's median.

``device_bytes``: the most that is allocated in a step, beyond parameters and gradients; ``host_bytes``: what the
process takes more after the library's first step than before, pinned memory included, parameters and gradients of
``fusedopt-host`` not; ``together``: with which libraries it took turns; ``check_params``: largest
difference of a parameter from torch's AdamW after the first step, in units of the learning rate.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, perf_counter_ns, sleep
from typing import Any

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
from benchmarks.goals import Goal, Rows
from benchmarks.host_memory import (
    Limits,
    Repeats,
    free_host_bytes,
    peak_bytes,
    pinned,
    release_memory,
    start_peak,
    taken_bytes,
)
from fusedopt.bench import peers, timing
from fusedopt.bench.contracts import HYPER, MAX_NORM
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.workloads import WORKLOADS, Workload
from fusedopt.optim.offload import Offload

WARM_UP_STEPS = 2
PAUSE = 0.01  # seconds before a step, in which the threads of the library before it stop looking for work
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


FULL = Repeats(steps=10, copy_bytes=1 << 30, copies=7)
FAST = Repeats(steps=2, copy_bytes=4 << 20, copies=3)


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
        flat = [pinned(param.nbytes, device).view(param.dtype) for _ in range(2)]
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
    "torch-host": _torch_host,
    "deepspeed": _deepspeed,
    "torchao": _torchao,
    "fusedopt": _fusedopt,
    "fusedopt-host": _fusedopt,
}

HOST_BYTES = {"fusedopt-offload": 9, "fusedopt": 0, "fusedopt-host": 20}
"""Of host memory for each parameter, in float32. Others: 8 of states, 8 pinned, and what torch rounds those up by."""
DEVICE_BYTES = {"fusedopt": 16, "fusedopt-host": 0}
"""Of the device's memory; others have parameters and gradients there."""
MOST_OF_MEMORY = 0.8


def offered(case: Case, device: torch.device) -> list[str]:
    """Peers keep fp32 states beside fp32 parameters; torchao copies gradients before they could be clipped."""
    names = ["fusedopt-offload"]
    if case.format == "fp32":
        names += ["torch-host", "deepspeed"]
    if case.format == "fp32" and case.max_norm is None and device.type == "cuda":
        names.append("torchao")
    return [*names, "fusedopt", "fusedopt-host"]


def why_missing(library: str) -> str | None:
    return peers.why_missing(library) if library in peers.MODULES else None


# -------------------------------------------------------------------------------------------------------- measurement


class Training:
    """Parameters, and a backward pass that hands out gradients."""

    def __init__(self, case: Case, device: torch.device, made_on: torch.device) -> None:
        """made_on: where random numbers come from: one thread of the host takes seconds for a billion."""
        self.device, dtype = device, FORMATS[case.format].dtype
        generator = torch.Generator(made_on).manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=made_on, dtype=dtype).mul_(scale).to(device)

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


class Contender:
    """A library in a case: parameters of its own, its optimizer, which has passed its first step, times."""

    def __init__(self, library: str, case: Case, device: torch.device) -> None:
        self.library, self.case, self.device = library, case, device
        self.times: list[float] = []
        own = torch.device("cpu") if library == "fusedopt-host" else device
        self.training = training = Training(case, own, device)
        training.backward()
        timing.synchronize(device)
        expected = expected_first_step(training, case)
        allocated, taken = start_peak(device), taken_bytes(device)
        self.tail = LIBRARIES[library](training.params, case)
        training.timed(self.tail)
        self.host_bytes = taken_bytes(device) - taken
        self.device_bytes = peak_bytes(device) - allocated
        self.held_bytes = start_peak(device) - allocated
        differences = zip(training.first_elements(training.params), expected)
        self.check = max(float((got - want).abs().max()) for got, want in differences) / HYPER["adamw"]["lr"]
        if not self.check <= WORST_CHECK:
            raise AssertionError(f"{case.name} {library}: off by {self.check} learning rates after one step")

    def step(self, is_timed: bool) -> None:
        sleep(PAUSE)
        allocated = start_peak(self.device)
        taken = self.training.timed(self.tail)
        self.device_bytes = max(self.device_bytes, self.held_bytes + peak_bytes(self.device) - allocated)
        if is_timed:
            self.times.append(taken)

    def row(self, limits: Limits, together: list[str]) -> Row:
        return _row(self.library, self.case, self.times, limits) | {
            "together": together,
            "device_bytes": self.device_bytes if self.device.type == "cuda" else None,
            "host_bytes": self.host_bytes,
            "check_params": self.check,
        }


def _needs(library: str) -> tuple[int, int]:
    return HOST_BYTES.get(library, 20), DEVICE_BYTES.get(library, 8)


def batches(libraries: list[str], case: Case, device: torch.device, host_bytes: float) -> Iterator[list[str]]:
    """Libraries that fit into so much host memory, and into the device's, side by side: at least one at a time."""
    device_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes
    room = [MOST_OF_MEMORY * free / case.workload.numel for free in (host_bytes, device_bytes)]
    batch: list[str] = []
    for library in libraries:
        taken = [sum(each) for each in zip(*map(_needs, [*batch, library]))]
        if batch and any(total > most for total, most in zip(taken, room)):
            yield batch
            batch = []
        batch.append(library)
    if batch:
        yield batch


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
    for name in result["left_out"]:
        console.print(f"left out by the time limit: {name}", markup=False)
    for library, reason in result["missing_libraries"].items():
        console.print(f"missing, so not compared with: {library} ({reason})", markup=False)
    for name, reason in result["failed"].items():
        console.print(f"FAILED {name}: {reason}", markup=False)
    for goal in result["goals"]:
        console.print(f"{goal['name']}: {goal['value']:.4g} {goal['relation']} {goal['bound']}")


class Measurement:
    """What is being written: the JSON file is complete after each turn, so that what was measured outlives us."""

    def __init__(self, device: torch.device, repeats: Repeats, path: Path | None, time_limit: float | None) -> None:
        self.device, self.repeats, self.path = device, repeats, path
        self.end = float("inf") if time_limit is None else monotonic() + time_limit
        self.limits = Limits.measure(device, repeats)
        told = {"limits": vars(self.limits), "missing_libraries": {}, "rows": [], "failed": {}, "left_out": []}
        self.result = environment(device) | {"library_versions": {}} | told

    @property
    def is_over(self) -> bool:
        return monotonic() > self.end

    def run(self, cases: list[Case], names: list[str]) -> None:
        wanted = {name for case in cases for name in offered(case, self.device) if not names or name in names}
        missing = {name: reason for name in sorted(wanted) if (reason := why_missing(name)) is not None}
        self.result["missing_libraries"] = missing
        self.result["library_versions"] = {
            name: peers.version(name) for name in sorted(wanted) if name in peers.MODULES and name not in missing
        }
        for case in cases:
            libraries = [name for name in offered(case, self.device) if name in wanted and name not in missing]
            release_memory(self.device)
            for batch in list(batches(libraries, case, self.device, free_host_bytes())):
                self.take_turns(case, batch)
                release_memory(self.device)

    def take_turns(self, case: Case, libraries: list[str]) -> None:
        before = self.result["rows"]
        contenders = []
        for library in libraries:
            if self.is_over:
                self.result["left_out"].append(f"{case.name} {library}")
            elif made := self._attempt(case, library, lambda library=library: Contender(library, case, self.device)):
                contenders.append(made)
        with timing.no_garbage_collection():
            for turn in range(WARM_UP_STEPS + self.repeats.steps):
                if self.is_over and turn > WARM_UP_STEPS:
                    break
                contenders = [each for each in contenders if self._steps(each, turn >= WARM_UP_STEPS)]
                together = [each.library for each in contenders]
                self.result["rows"] = before + [each.row(self.limits, together) for each in contenders if each.times]
                self._write()

    def _steps(self, contender: Contender, is_timed: bool) -> bool:
        """Whether it could make a step."""
        return self._attempt(contender.case, contender.library, lambda: contender.step(is_timed) or True) is not None

    def _attempt(self, case: Case, library: str, work: Callable[[], Any]) -> Any:
        """None where it fails; whoever fails must not cost the others their rows."""
        try:
            return work()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self.result["failed"][f"{case.name} {library}"] = reason
        self._write()
        return None

    def _write(self) -> None:
        judged = [goal.judge(Rows(self.result["rows"])) for goal in GOALS]
        self.result["goals"] = [goal for goal in judged if goal["value"] is not None]
        write(self.path, self.result)


@click.command(help=__doc__.partition("\n")[0], context_settings={"show_default": True})
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--workload", "workloads", multiple=True, type=click.Choice(list(WORKLOADS)), help="llama-1.3B if none.")
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), help="All if none.")
@click.option("--contract", "contracts", multiple=True, type=click.Choice(["step", "clip_step"]), help="Both if none.")
@click.option("--library", "libraries", multiple=True, type=click.Choice(list(LIBRARIES)), help="All if none.")
@click.option("--quick", is_flag=True, help="A small model, few steps.")
@click.option("--time-limit", type=float, help="Seconds after which nothing new is begun; none if not given.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where every figure is written.")
def main(device_type, workloads, formats, contracts, libraries, quick: bool, time_limit, path: Path | None) -> None:
    chosen = [QUICK] if quick else [WORKLOADS[name] for name in workloads or ("llama-1.3B",)]
    cases = [
        Case(workload, form, contract)
        for workload in chosen
        for contract in contracts or ("step", "clip_step")
        for form in formats or FORMATS
    ]
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    measurement = Measurement(device, FAST if quick else FULL, path, time_limit)
    measurement.run(cases, list(libraries))
    report(Console(width=200), measurement.result)
    sys.exit(any(" fusedopt" in name for name in measurement.result["failed"]))


if __name__ == "__main__":
    main()
