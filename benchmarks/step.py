"""Times the step tail of fusedopt beside other libraries' and writes every figure to a JSON file.

    python benchmarks/step.py --device cuda --first-step --json benchmarks/results/step-h100.json
    python benchmarks/step.py --device cuda --set formats --json benchmarks/results/formats-h100.json
    python benchmarks/step.py --device cpu --json benchmarks/results/step-cpu.json

All libraries of a case work on the same parameter and gradient tensors, in turns (A B A B); each is first checked
against a float64 reference. Reported are medians:

* ``gpu_ms``: kernels, copies and fills of a step, as CUPTI timed them, with an evicted second-level cache;
  ``gpu_warm_ms``: the same without eviction; ``launches``: kernels of a step; ``memory_operations``: copies and fills;
* ``gpu_span_ms``: a step of a run of steps between two CUDA events, gaps between kernels included;
* ``host_ms``, ``wall_ms``: host clock from the call until it returns, and until the device is done; the gradients are
  new tensors, host and device caches cold, the device idle;
* ``floor_ms``: ``bytes_per_param`` of all parameters at the bandwidth of a copy in the same run, the better of one
  before and one after the rows; ``efficiency``: the floor's share of ``gpu_ms`` (``wall_ms`` on a CPU).

Leave the machine alone meanwhile: torch's threads wait for one another, so on a busy CPU its times grow tenfold.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from benchmarks import contracts, peers, timing
from benchmarks import first_step as first_step_benchmark
from benchmarks.checks import check
from benchmarks.contracts import Case, Tail, reported_name
from benchmarks.report import Row, environment, judge_goals, print_goals, print_rows
from benchmarks.workloads import WORKLOADS, Model

DEFAULT_WORKLOADS = {
    "tail": {"cuda": ("llama-1.3B", "gpt2-124M", "1000-small"), "cpu": ("cpu-100M",)},
    "formats": {"cuda": ("llama-1.3B",), "cpu": ("cpu-100M",)},
    "rules": {"cuda": ("llama-1.3B",), "cpu": ("cpu-100M",)},
}

# What is run on each workload, the most important first: a run that meets its time limit leaves out the rest.
TAIL_VARIANTS = [
    ("adamw", "fp32", "clip_step"),
    ("adamw", "fp32", "scaler_clip_step"),
    ("adamw", "fp32", "step"),
    ("lion", "fp32", "step"),
    ("lion", "fp32", "scaler_clip_step"),
    ("adamw", "fp32", "torch_scaler_clip_step"),
    ("adamw", "bf16", "step"),
    ("adamw", "bf16", "clip_step"),
]

FORMAT_VARIANTS = [
    ("adamw", "bf16+split8+int8", "step"),
    ("adamw", "bf16+split8+int8", "clip_step"),
    ("adamw", "bf16+split16", "step"),
    ("adamw", "bf16+split16", "clip_step"),
    ("adamw", "bf16+int8", "step"),
    ("adamw", "bf16+sr", "step"),
    ("lion", "bf16+split16+bf16", "step"),
    ("lion", "bf16+split8+int8", "step"),
    ("adamw", "fp16+fp32 master", "scaler_clip_step"),
    ("adamw", "bf16+fp32 master", "step"),
    ("adamw", "fp32+int8", "step"),
]

RULE_VARIANTS = [
    ("sgd_momentum", "fp32", "step"),
    ("rmsprop", "fp32", "step"),
    ("adagrad", "fp32", "step"),
    ("sgd_momentum", "fp32", "clip_step"),
    ("rmsprop", "fp32", "clip_step"),
    ("adagrad", "fp32", "clip_step"),
    ("sgd", "fp32", "step"),
    ("radam", "fp32", "step"),
    ("radam", "fp32", "clip_step"),
    ("adamw_amsgrad", "fp32", "step"),
    ("adamw_amsgrad", "fp32", "clip_step"),
    ("lamb", "fp32", "step"),
    ("lamb", "fp32", "clip_step"),
    ("lamb", "bf16+split16", "step"),
]

VARIANTS = {"tail": TAIL_VARIANTS, "formats": FORMAT_VARIANTS, "rules": RULE_VARIANTS}
"""The sets of cases, by name."""

WARM_UP_STEPS = 2

STEADY = 0.9  # copies before and after the rows that differ by more mean that something else was running

CACHES = (
    "wall_ms, host_ms, gpu_ms: before each step a word of every cache line of a 256 MiB device buffer is read, "
    "and for wall_ms and host_ms one of a 64 MiB host buffer written; gpu_warm_ms, gpu_span_ms: step follows step"
)


@dataclass(frozen=True)
class Repeats:
    """How often everything is measured; a library has ``rounds`` turns."""

    rounds: int
    host_steps: int  # a round
    traced_steps: int  # a round, cold and warm each
    span_steps: int
    copy_bytes: int
    copies: int
    processes: int  # for the first step, with a cold and with a warm kernel cache each


FULL = Repeats(rounds=2, host_steps=12, traced_steps=6, span_steps=8, copy_bytes=2 << 30, copies=15, processes=2)
FULL_CPU = Repeats(
    rounds=10, host_steps=2, traced_steps=0, span_steps=0, copy_bytes=400_000_000, copies=15, processes=2
)
QUICK = Repeats(rounds=2, host_steps=2, traced_steps=2, span_steps=2, copy_bytes=16 << 20, copies=5, processes=1)


@dataclass
class Measured:
    """One library on one case."""

    library: str
    tail: Tail | None = None
    error_ratio: float | None = None  # largest error of the check, as a fraction of what rounding allows
    error: str | None = None
    host: timing.HostTimes = field(default_factory=timing.HostTimes)
    device: timing.DeviceTimes = field(default_factory=timing.DeviceTimes)
    span_ms: list[float] = field(default_factory=list)


class Runner:
    """Measures cases on one device."""

    def __init__(self, device: torch.device, repeats: Repeats, chosen: tuple[str, ...] = ()) -> None:
        """chosen: the only libraries to run, as they are reported; empty for all."""
        self.device = device
        self.repeats = repeats
        self.chosen = chosen
        self.copy_gbps = [self.measure_copy()]
        self.caches = timing.Caches(device)
        if device.type == "cuda":
            timing.start_profiler(self.caches)

    def measure_copy(self) -> float:
        return timing.copy_gbps(self.device, self.repeats.copy_bytes, self.repeats.copies)

    def run(self, case: Case, model: Model) -> list[Row]:
        """One row a library, measured in turns. An error costs its library the row, and nobody else."""
        free_memory()
        names = [name for name in self.libraries(case) if self._is_chosen(name)]
        entries = [Measured(library) for library in names]
        for stage in [self._prepare] + [self._measure] * self.repeats.rounds:
            entries = [entry if entry.error else self._attempt(stage, entry, case, model) for entry in entries]
        for param in model.params:
            param.grad = None  # the next case's optimizers may need the room
        return [self._row(case, entry) for entry in entries]

    @staticmethod
    def _attempt(stage: Callable[..., None], entry: Measured, case: Case, model: Model) -> Measured:
        try:
            stage(entry, case, model)
        except Exception as error:  # whatever it is, the other libraries' figures still count
            return Measured(entry.library, error=f"{type(error).__name__}: {error}")
        return entry

    def _is_chosen(self, library: str) -> bool:
        return not self.chosen or reported_name(library, self.device) in self.chosen

    # What is measured; a benchmark with cases of its own overrides these.

    def libraries(self, case: Case) -> list[str]:
        return self._own(case) + peers.installed(case, self.device)

    def build(self, library: str, case: Case, model: Model) -> Tail:
        build = contracts.build if library in self._own(case) else peers.build
        return build(library, case, model.params)

    def _own(self, case: Case) -> list[str]:
        """The libraries that are no peers."""
        return contracts.libraries(case, self.device) + contracts.other_backends(self.device)

    def check(self, case: Case, tail: Tail, model: Model) -> float:
        return check(case, tail, model)

    def model_key(self, case: Case) -> object:
        """Cases with the same one share a model."""
        return case.workload, case.layout.dtype

    def make_model(self, case: Case) -> Model:
        return Model(WORKLOADS[case.workload], case.layout.dtype, self.device)

    def _prepare(self, entry: Measured, case: Case, model: Model) -> None:
        model.reset()  # some optimizers copy the parameters when they are made
        entry.tail = self.build(entry.library, case, model)
        entry.error_ratio = self.check(case, entry.tail, model)
        for _ in range(WARM_UP_STEPS):
            model.backward()
            entry.tail()

    def _measure(self, entry: Measured, case: Case, model: Model) -> None:
        tail, caches, repeats = entry.tail, self.caches, self.repeats
        timing.time_host(tail, model.backward, caches, repeats.host_steps, entry.host)
        if self.device.type == "cuda":
            timing.trace_device(tail, model.backward, caches, repeats.traced_steps, entry.device)
            entry.span_ms.append(timing.span_ms(tail, model.backward, repeats.span_steps))

    def _row(self, case: Case, entry: Measured) -> Row:
        cold, warm = entry.device.cold, entry.device.warm
        row = self._subject(case, entry.library)
        row |= _spread("gpu_ms", [step.ms for step in cold]) | _spread("gpu_warm_ms", [step.ms for step in warm])
        row |= _spread("wall_ms", entry.host.wall) | _spread("host_ms", entry.host.host)
        row |= {
            "gpu_span_ms": _median(entry.span_ms),
            "launches": max((step.kernels for step in cold), default=None),
            "memory_operations": max((step.memory_operations for step in cold), default=None),
            "samples": len(entry.host.wall),
            "traced_samples": len(cold),
            "check_error_ratio": entry.error_ratio,
            "error": entry.error,
        }
        return row

    def _subject(self, case: Case, library: str) -> Row:
        workload = WORKLOADS[case.workload]
        return {
            "workload": case.workload,
            "contract": case.contract,
            "optimizer": case.optimizer,
            "format": case.format,
            "library": reported_name(library, self.device),
            "params": workload.numel,
            "tensors": len(workload.shapes),
            "bytes_per_param": case.bytes_per_param,
        }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _spread(key: str, values: list[float]) -> Row:
    """Median, smallest and largest."""
    return {
        key: _median(values),
        f"{key}_min": min(values, default=None),
        f"{key}_max": max(values, default=None),
    }


def select_cases(
    sets: tuple[str, ...], device_type: str, workloads: tuple[str, ...], select: tuple[str, ...]
) -> list[Case]:
    """Cases of the sets on the workloads, or on the sets' own, whose name holds one of ``select``."""
    cases = [
        Case(workload, *variant)
        for name in sets
        for workload in workloads or DEFAULT_WORKLOADS[name][device_type]
        for variant in VARIANTS[name]
    ]
    return [case for case in cases if not select or any(text in str(case) for text in select)]


def measure_cases(
    runner: Runner, cases: list[Case], deadline: float, progress: Progress
) -> tuple[list[Row], list[str]]:
    """Rows of all cases, and the names of those that the time limit left out, or an interrupt, which ends the run."""
    rows: list[Row] = []
    left_out: list[str] = []
    model, subject = None, None
    task = progress.add_task("", total=len(cases))
    for case in cases:
        progress.update(task, description=str(case))
        if time.monotonic() > deadline:
            left_out.append(str(case))
        else:
            if subject != runner.model_key(case):
                subject, model = runner.model_key(case), None  # two models might not fit into memory
                free_memory()
                model = runner.make_model(case)
            try:
                rows += runner.run(case, model)
            except KeyboardInterrupt:
                deadline = 0.0
                left_out.append(str(case))
        progress.advance(task)
    model = None
    free_memory()
    return rows, left_out


def free_memory() -> None:
    """Gives back what nobody holds any more; optimizers may sit in reference cycles, and they are large."""
    gc.collect()
    torch.cuda.empty_cache()


def measure(
    device: torch.device,
    repeats: Repeats,
    sets: tuple[str, ...],
    cases: list[Case],
    first_step: bool,
    deadline: float,
    console: Console,
    libraries: tuple[str, ...] = (),
) -> Row:
    """The whole run, as the JSON file holds it."""
    load_average = os.getloadavg()[0]
    runner = Runner(device, repeats, libraries)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        rows, left_out = measure_cases(runner, cases, deadline, progress)
    runner.copy_gbps.append(runner.measure_copy())
    add_floor(rows, max(runner.copy_gbps), measured="gpu_ms" if device.type == "cuda" else "wall_ms")
    starts, starts_error = measure_first_step(device, repeats) if first_step else ([], None)
    return environment(device) | {
        "copy_gbps": max(runner.copy_gbps),
        "copy_gbps_start_end": runner.copy_gbps,
        "load_average": load_average,
        "caches": CACHES,
        "rows": rows,
        "first_step": starts,
        "first_step_error": starts_error,
        "goals": judge_goals(device, sets, rows, starts),
        "left_out": left_out,
        "library_versions": peers.versions(cases, device),
        "missing_libraries": peers.missing(cases, device),
    }


def add_floor(rows: list[Row], copy_gbps: float, measured: str) -> None:
    """The time that the bytes of a row take at the bandwidth of a copy, and its share of the time ``measured``."""
    for row in rows:
        counted = row["bytes_per_param"] is not None
        row["floor_ms"] = row["params"] * row["bytes_per_param"] / copy_gbps / 1e6 if counted else None
        known = counted and not row["error"] and row[measured] is not None
        row["efficiency"] = row["floor_ms"] / row[measured] if known else None


def measure_first_step(device: torch.device, repeats: Repeats) -> tuple[list[Row], str | None]:
    """Rows, and the error if a child failed: the figures measured before are worth keeping."""
    try:
        return first_step_benchmark.measure(device, repeats.processes), None
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return [], str(error)


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option(
    "--set", "chosen", type=click.Choice([*VARIANTS, "all"]), default="tail", show_default=True, help="Which cases."
)
@click.option("--workload", "workloads", type=click.Choice(list(WORKLOADS)), multiple=True, help="May be repeated.")
@click.option("--select", multiple=True, help="Only cases whose workload/optimizer/format/contract holds this text.")
@click.option("--library", "libraries", multiple=True, help="Only these, as they are reported; may be repeated.")
@click.option("--quick", is_flag=True, help="A smoke run: a tiny workload, few repetitions.")
@click.option("--first-step/--no-first-step", help="Time the first step of fresh processes too.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--time-limit", type=float, default=240, show_default=True, help="Start no case after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    device_type: str,
    chosen: str,
    workloads: tuple[str, ...],
    select: tuple[str, ...],
    libraries: tuple[str, ...],
    quick: bool,
    first_step: bool,
    threads: int | None,
    time_limit: float,
    path: Path | None,
) -> None:
    deadline = time.monotonic() + time_limit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been measured is written then
    console = Console(width=None if sys.stdout.isatty() else 120)
    if threads:
        torch.set_num_threads(threads)
    repeats = QUICK if quick else {"cuda": FULL, "cpu": FULL_CPU}[device_type]
    sets = tuple(VARIANTS) if chosen == "all" else (chosen,)
    cases = select_cases(sets, device_type, workloads or (("tiny",) if quick else ()), select)
    result = measure(torch.device(device_type), repeats, sets, cases, first_step, deadline, console, libraries)
    write(path, result)
    print_result(console, result)
    if result["first_step_error"] or any(row["error"] for row in result["rows"]):
        sys.exit(1)


def write(path: Path | None, result: Row) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def print_result(console: Console, result: Row) -> None:
    """Everything that ``measure`` returned, for people."""
    print_rows(console, result["rows"])
    if result["goals"]:
        print_goals(console, result["goals"])
    console.print(f"{result['device']}, torch {result['torch']}, copy {result['copy_gbps']:.1f} GB/s", highlight=False)
    if min(result["copy_gbps_start_end"]) < STEADY * result["copy_gbps"]:
        first, last = result["copy_gbps_start_end"]
        console.print(
            f"NOT A QUIET MACHINE: copies ran at {first:.1f} GB/s before the rows and at {last:.1f} after them, "
            f"the load average at the start was {result['load_average']:.1f}; do not quote these figures"
        )
    for library, reason in result["missing_libraries"].items():
        console.print(f"not installed, so not compared with: {library} ({reason})", markup=False)
    if result["left_out"]:
        console.print(f"left out by the time limit or an interrupt: {', '.join(result['left_out'])}")
    if result["first_step_error"]:
        console.print(f"FAILED first step: {result['first_step_error']}", markup=False)


if __name__ == "__main__":
    main()
