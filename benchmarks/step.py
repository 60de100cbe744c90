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

import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from benchmarks import first_step as first_step_benchmark
from benchmarks.goals import judge_goals, print_goals
from fusedopt.bench import peers
from fusedopt.bench.contracts import Case
from fusedopt.bench.report import Row, environment, load_average, print_rows, write
from fusedopt.bench.runner import CACHES, FULL, FULL_CPU, QUICK, Repeats, Runner, add_floor, measure_cases, progress_bar
from fusedopt.bench.session import print_end
from fusedopt.bench.workloads import WORKLOADS

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
    load = load_average()
    runner = Runner(device, repeats, libraries)
    with progress_bar(console) as progress:
        rows, left_out = measure_cases(runner, cases, deadline, progress)
    runner.copy_gbps.append(runner.measure_copy())
    add_floor(rows, max(runner.copy_gbps), measured="gpu_ms" if device.type == "cuda" else "wall_ms")
    starts, starts_error = measure_first_step(device, repeats) if first_step else ([], None)
    return environment(device) | {
        "copy_gbps": max(runner.copy_gbps),
        "copy_gbps_start_end": runner.copy_gbps,
        "load_average": load,
        "caches": CACHES,
        "rows": rows,
        "first_step": starts,
        "first_step_error": starts_error,
        "goals": judge_goals(device, sets, rows, starts),
        "left_out": left_out,
        "library_versions": peers.versions(cases, device),
        "missing_libraries": peers.missing(cases, device),
    }


def measure_first_step(device: torch.device, repeats: Repeats) -> tuple[list[Row], str | None]:
    """Rows, and the error if a child failed or was interrupted: the figures measured before are worth keeping."""
    try:
        return first_step_benchmark.measure(device, repeats.processes), None
    except (RuntimeError, subprocess.TimeoutExpired, KeyboardInterrupt) as error:
        return [], str(error) or "interrupted"


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


def print_result(console: Console, result: Row) -> None:
    """Everything that ``measure`` returned, for people."""
    print_rows(console, result["rows"])
    if result["goals"]:
        print_goals(console, result["goals"])
    print_end(console, result)
    if result["first_step_error"]:
        console.print(f"FAILED first step: {result['first_step_error']}", markup=False)


if __name__ == "__main__":
    main()
