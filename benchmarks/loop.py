"""Times what a training loop does around the step: accumulation, our GradScaler, capture, gradient release, host time.

    python benchmarks/loop.py --device cuda --json benchmarks/results/loop-h100.json
    python benchmarks/loop.py --quick                                     # does it run? tiny models, CPU

The method, the figures and the JSON file are those of ``benchmarks/step.py``. A row is skipped, with the reason, where
the device or this version of the library does not have what it is about. The contracts:

=============================  ====================================================================================
``accumulate_first``,          one micro-batch folded; four of them, clipping and a step:
``accumulate``,                ``benchmarks/accumulation.py``. ``host_ms`` is of the library's calls alone, ``wall_ms``
``accumulated_clip_step``      includes handing out gradients
``own_scaler_clip_step``       ``fusedopt.GradScaler`` beside torch's; ``own_launches``: kernels of this library
``captured_step``              a training step in a CUDA graph: ``benchmarks/captured.py``
``release``                    memory of a step with gradients released in backward: ``benchmarks/release.py``
``clip_step``                  ``host_ms`` alone, with evicted caches, as ``step.py``; many tensors, many param groups
``step_after_backward``,       host time after a real backward pass in a fresh process: ``benchmarks/host.py``
``clip_step_after_backward``
=============================  ====================================================================================
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
from benchmarks import captured, host, release
from benchmarks.goals import judge_goals
from benchmarks.step import print_result
from fusedopt.bench import contracts, runner
from fusedopt.bench.accumulation import AccumulationCase
from fusedopt.bench.contracts import Case, Tail, reported_name
from fusedopt.bench.report import Row, environment, load_average, write
from fusedopt.bench.runner import CACHES, QUICK, Repeats, Runner, add_floor, free_memory, progress_bar
from fusedopt.bench.workloads import Model

FULL = Repeats(rounds=2, host_steps=6, traced_steps=5, span_steps=4, copy_bytes=2 << 30, copies=15, processes=1)
FULL_CPU = replace(runner.FULL_CPU, rounds=4)

WORKLOAD = {"cuda": "llama-1.3B", "cpu": "cpu-100M"}

HOST_WORKLOADS = {
    "cuda": ("gpt2-124M", "1000-small", "10000-small", "10000-small-10-groups"),
    "cpu": ("1000-small",),
}
QUICK_HOST_WORKLOADS = ("tiny", "tiny-4-groups")

ACCUMULATION = [
    ("none", "bf16", "accumulate_first"),
    ("none", "bf16", "accumulate"),
    ("adamw", "bf16+split16", "accumulated_clip_step"),
    ("adamw", "fp32", "accumulated_clip_step"),
]

# Everything that a row may say beside its subject.
FIGURES = (
    *("gpu_ms", "gpu_ms_min", "gpu_ms_max", "gpu_warm_ms", "gpu_warm_ms_min", "gpu_warm_ms_max", "gpu_span_ms"),
    *("wall_ms", "wall_ms_min", "wall_ms_max", "host_ms", "host_ms_min", "host_ms_max", "bytes_per_param"),
    *("launches", "own_launches", "memory_operations", "samples", "traced_samples", "check_error_ratio", "error"),
)


class LoopRunner(Runner):
    """Measures the cases that are timed on random gradients."""

    def libraries(self, case: Case) -> list[str]:
        if isinstance(case, AccumulationCase):
            return super().libraries(case)
        return contracts.libraries(case, self.device) if case.scales else list(host.LIBRARIES)

    def build(self, library: str, case: Case, model: Model) -> Tail:
        if isinstance(case, AccumulationCase):
            return super().build(library, case, model)
        return host.build(library, case, model.params)

    def _is_traced(self, case: Case) -> bool:
        """Of cases about the host, the host alone is timed."""
        return isinstance(case, AccumulationCase) or case.scales


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Unit:
    """What is run between two looks at the clock."""

    name: str
    run: Callable[[], list[Row]]


def subject(device: torch.device, workload: str, contract: str, library: str, format_: str = "fp32") -> Row:
    """A row without figures."""
    return dict.fromkeys(FIGURES) | {
        "workload": workload,
        "contract": contract,
        "optimizer": "adamw",
        "format": format_,
        "library": reported_name(library, device),
        "params": None,
        "tensors": None,
        "skipped": None,
    }


class Units:
    """All that this benchmark does on a device."""

    def __init__(self, runner: LoopRunner, quick: bool) -> None:
        self.runner, self.quick, self.device = runner, quick, runner.device
        self.model: Model | None = None
        self.key: object = None

    def selected(self, select: tuple[str, ...]) -> Iterator[Unit]:
        """Those whose name holds one of the texts; all if there are none."""

        def wanted(name: str) -> bool:
            return not select or any(text in name for text in select)

        yield from (unit for unit in self._units() if wanted(unit.name))
        names = {workload: self._host_names(workload) for workload in self._host_workloads()}
        workloads = tuple(workload for workload, cases in names.items() if any(map(wanted, cases)))
        if workloads:  # together: one process imports everything and makes the others
            yield Unit(f"host after backward: {' '.join(workloads)}", lambda: self.host(workloads))

    def _host_workloads(self) -> tuple[str, ...]:
        return QUICK_HOST_WORKLOADS if self.quick else HOST_WORKLOADS[self.device.type]

    @staticmethod
    def _host_names(workload: str) -> list[str]:
        return [f"{workload}/adamw/fp32/{contract}" for contract in host.contracts_of(workload).values()]

    def _units(self) -> Iterator[Unit]:
        workload = "tiny" if self.quick else WORKLOAD[self.device.type]
        cases = [AccumulationCase(workload, *variant) for variant in ACCUMULATION]
        cases += [Case(workload, "adamw", "fp32", "own_scaler_clip_step")]
        for case in cases:
            yield Unit(str(case), lambda case=case: self.case(case))
        yield Unit(f"{self.captured_size.name}/adamw/fp32/{captured.CONTRACT}", self.captured)
        yield Unit(f"{self.release_size.name}/adamw/bf16/{release.CONTRACT}", self.release)
        for workload in self._host_workloads():
            case = Case(workload, "adamw", "fp32", "clip_step")
            yield Unit(str(case), lambda case=case: self.case(case))

    @property
    def captured_size(self) -> captured.Size:
        return captured.TINY if self.quick else captured.GPT2

    @property
    def release_size(self) -> release.Size:
        return release.TINY if self.quick else release.LLAMA_1B

    def case(self, case: Case) -> list[Row]:
        if case.contract == "own_scaler_clip_step" and getattr(fusedopt, "GradScaler", None) is None:
            row = subject(self.device, case.workload, case.contract, "fusedopt")
            return [row | {"skipped": "this version has no fusedopt.GradScaler"}]
        if self.key != self.runner.model_key(case):
            self.drop_model()
            self.key, self.model = self.runner.model_key(case), self.runner.make_model(case)
        return [{"skipped": None} | row for row in self.runner.run(case, self.model)]

    def drop_model(self) -> None:
        self.key, self.model = None, None
        free_memory()

    def captured(self) -> list[Row]:
        return self._on_gpu(
            self.captured_size.name,
            captured.CONTRACT,
            "fp32",
            captured.LIBRARIES,
            "CUDA graphs need a GPU",
            lambda: captured.measure(self.captured_size, self.device, self.runner.caches, self.runner.repeats.rounds),
        )

    def release(self) -> list[Row]:
        return self._on_gpu(
            self.release_size.name,
            release.CONTRACT,
            "bf16",
            release.LIBRARIES,
            "peak memory is measured on a GPU",
            lambda: release.measure(self.release_size, self.device),
        )

    def _on_gpu(
        self,
        workload: str,
        contract: str,
        format_: str,
        libraries: tuple[str, ...],
        reason: str,
        measure: Callable[[], dict[str, Row]],
    ) -> list[Row]:
        """A row for each library: its figures, the error that all share, or why it was skipped."""
        self.drop_model()
        rows = {library: subject(self.device, workload, contract, library, format_) for library in libraries}
        if self.device.type != "cuda":
            return [row | {"skipped": reason} for row in rows.values()]
        try:
            found = measure()
        except Exception as error:  # the figures of other contracts still count
            return [row | {"error": f"{type(error).__name__}: {error}"} for row in rows.values()]
        finally:
            free_memory()
        missing = {"skipped": "this version of the library does not have it"}
        return [row | found.get(library, missing) for library, row in rows.items()]

    def host(self, workloads: tuple[str, ...]) -> list[Row]:
        self.drop_model()
        try:
            found = host.measure(workloads, self.device, self.quick)
        except Exception as error:
            failed = {"library": "fusedopt", "error": f"{type(error).__name__}: {error}"}
            names = [name.split("/") for workload in workloads for name in self._host_names(workload)]
            found = [failed | {"workload": parts[0], "contract": parts[-1]} for parts in names]
        rows = [subject(self.device, row["workload"], row["contract"], row["library"]) | row for row in found]
        return [row | {"library": reported_name(row["library"], self.device)} for row in rows]


# -------------------------------------------------------------------------------------------------------------- run


def measure(
    device: torch.device,
    repeats: Repeats,
    select: tuple[str, ...],
    quick: bool,
    deadline: float,
    console: Console,
    keep: Callable[[Row], None],
) -> Row:
    """The whole run, as the JSON file holds it. What there is after each unit is handed to ``keep``."""
    load = load_average()
    runner = LoopRunner(device, repeats)
    units = Units(runner, quick)
    chosen = list(units.selected(select))
    rows: list[Row] = []
    left_out: list[str] = []
    seconds: dict[str, float] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(chosen))
        for unit in chosen:
            progress.update(task, description=unit.name)
            start = time.monotonic()
            if start > deadline:
                left_out.append(unit.name)
            else:
                rows += unit.run()
                seconds[unit.name] = time.monotonic() - start
                keep(result_of(runner, rows, left_out) | {"load_average": load, "seconds": seconds})
            progress.advance(task)
    units.drop_model()
    runner.copy_gbps.append(runner.measure_copy())
    return result_of(runner, rows, left_out) | {"load_average": load, "seconds": seconds}


def result_of(runner: LoopRunner, rows: list[Row], left_out: list[str]) -> Row:
    """What has been measured so far."""
    device = runner.device
    add_floor(rows, max(runner.copy_gbps), measured="gpu_ms" if device.type == "cuda" else "wall_ms")
    return environment(device) | {
        "copy_gbps": max(runner.copy_gbps),
        "copy_gbps_start_end": runner.copy_gbps,
        "caches": CACHES,
        "rows": rows,
        "goals": judge_goals(device, ("loop",), rows, []),
        "left_out": left_out,
        "missing_libraries": {},
        "first_step_error": None,
    }


def print_more(console: Console, rows: list[Row]) -> None:
    """What the table of all rows has no columns for."""
    table = Table(title="training steps", box=None, pad_edge=False)
    table.add_column("library", no_wrap=True)
    for column in ("peak GB", "resident GB", "gradients GB", "same bits", "tail ms", "tail launches", "eager ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["contract"] not in (captured.CONTRACT, release.CONTRACT) or row["error"] or row["skipped"]:
            continue
        memory = [row.get(key) for key in ("peak_bytes", "resident_bytes", "grad_bytes")]
        cells = ["-" if nbytes is None else f"{nbytes / 1e9:.2f}" for nbytes in memory]
        cells += [{None: "-", True: "yes", False: "NO"}[row.get("same_bits")]]
        for key in ("tail_ms", "tail_launches", "eager_span_ms"):
            cells.append("-" if row.get(key) is None else f"{row[key]:.4g}")
        table.add_row(f"{row['contract']} {row['library']}", *cells)
    if table.row_count:
        console.print(table)
    for row in rows:
        if row.get("phases_us"):
            phases = ", ".join(f"{name} {us:.1f}" for name, us in row["phases_us"].items())
            console.print(f"{row['workload']} {row['contract']}, us: {phases}", highlight=False)


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option("--select", multiple=True, help="Only cases whose workload/optimizer/format/contract holds this text.")
@click.option("--quick", is_flag=True, help="A smoke run: tiny models, few repetitions.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--time-limit", type=float, default=240, show_default=True, help="Start no case after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    device_type: str, select: tuple[str, ...], quick: bool, threads: int | None, time_limit: float, path: Path | None
) -> None:
    deadline = time.monotonic() + time_limit
    os.environ.setdefault(*captured.CUBLAS)  # before anything uses cuBLAS
    console = Console(width=None if sys.stdout.isatty() else 120)
    if threads:
        torch.set_num_threads(threads)
    repeats = QUICK if quick else {"cuda": FULL, "cpu": FULL_CPU}[device_type]
    keep = functools.partial(write, path)
    result = measure(torch.device(device_type), repeats, select, quick, deadline, console, keep)
    write(path, result)
    print_result(console, result)
    print_more(console, result["rows"])
    if any(row["error"] for row in result["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
