"""A run of ``fusedopt bench``: the libraries that were asked for on the chosen cases, and what the JSON file holds."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from . import accumulation, contracts, graphs, peers, timing
from .accumulation import AccumulationCase
from .compare import load
from .contracts import Case
from .journal import Journal, Turn
from .report import Row, environment, load_average, write
from .runner import (
    CACHES,
    LEAST_STEPS,
    WARM_UP_STEPS,
    Repeats,
    Runner,
    add_floor,
    add_speedups,
    forget_modules,
    measure_cases,
    progress_bar,
)

TORCH = ("torch-fused", "torch-foreach", "torch-grad-scale", "torch-captured", "torch-compiled")
PEERS = (*TORCH, *peers.MODULES)
"""That ``--against`` takes, beside "torch", "all", "default" and "none"."""

ON_REQUEST = ("torch-compiled", "torchao", "torch-foreach")
"""Not of the default: two compile for minutes; foreach is slower than fused, and runs where there is no fused step."""

STEADY = 0.9  # copies at the start and at the end that differ by more mean that something else was running


def resolve_peers(names: Iterable[str]) -> tuple[str, ...]:
    """What ``--against`` names, each also as a list with commas.

    Raises:
        ValueError: there is no such library.
    """
    groups = {
        "torch": TORCH,
        "all": PEERS,
        "default": tuple(name for name in PEERS if name not in ON_REQUEST),
        "none": (),
    }
    found: list[str] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        if name not in groups and name not in PEERS:
            raise ValueError(f"got {name!r}, expected some of {', '.join([*groups, *PEERS])}")
        found += groups.get(name, (name,))
    return tuple(dict.fromkeys(found))


class BenchRunner(Runner):
    """Measures fusedopt, and beside it those of ``against`` that offer a case and are installed."""

    def __init__(self, device: torch.device, repeats: Repeats, against: tuple[str, ...], backends: tuple[str, ...]):
        super().__init__(device, repeats)
        self.against, self.backends = against, backends
        self.triad_gbps = timing.triad_gbps(device, repeats.copy_bytes, repeats.copies)

    def libraries(self, case: Case) -> list[str]:
        if isinstance(case, AccumulationCase):
            return [name for name in accumulation.LIBRARIES if name == "fusedopt" or name in self.against]
        ours = ["fusedopt", *[f"fusedopt-{name}" for name in self.backends]]
        ours = [name for name in ours if name == "fusedopt" or name in contracts.other_backends(self.device)]
        plain, captured = contracts.offered(case, self.device), graphs.offered(case, self.device)
        ours += [name for name in captured if name == "fusedopt-captured" and "torch-captured" in self.against]
        wanted = set(self.against)
        if "torch-fused" in wanted and "torch-fused" not in plain:
            wanted.add("torch-foreach")
        return ours + [name for name in (*plain, *captured, *self._installed(case)) if name in wanted]

    def _installed(self, case: Case) -> list[str]:
        wanted = [name for name in peers.offered(case, self.device) if name in self.against]
        return [name for name in wanted if peers.why_missing(name) is None]

    def _is_traced(self, case: Case) -> bool:
        """Not where the number of tensors varies: that is about the host, and traces of 10,000 tensors take long."""
        return not case.workload.startswith("tensors-")

    def _own(self, case: Case) -> list[str]:
        return [*contracts.offered(case, self.device), *contracts.other_backends(self.device)]


def measure(
    runner: BenchRunner,
    cases: list[Case],
    deadline: float,
    console: Console,
    command: str,
    path: Path | None = None,
    earlier: Row | None = None,
) -> Row:
    """Runs the cases; the JSON file is written after each one, so that what was measured outlives the process.

    earlier: the result of ``resumed``, whose rows are taken over and whose cases are not run again.
    """
    start = time.monotonic()
    earlier = earlier or {"rows": [], "copy_gbps_start_end": [], "ended_the_process": [], "seconds": 0.0}
    done = {_case_of(row) for row in earlier["rows"]}
    cases = [case for case in cases if str(case) not in done]
    runner.copy_gbps[:0] = earlier["copy_gbps_start_end"]
    runner.journal = Journal(path, [Turn(**turn) for turn in earlier["ended_the_process"]])
    facts = environment(runner.device) | {
        "command": command,
        "load_average": load_average(),
        "library_versions": peers.versions(cases, runner.device, runner.against),
        "missing_libraries": peers.missing(cases, runner.device, runner.against),
        "ended_the_process": earlier["ended_the_process"],
    }
    for key in ("library_versions", "missing_libraries"):
        facts[key] = earlier.get(key, {}) | facts[key]
    forget_modules()  # those of the other libraries too

    def keep(rows: list[Row], left_out: Iterable[str] = ()) -> Row:
        result = facts | _result(runner, earlier["rows"] + rows, list(left_out))
        result["seconds"] = earlier["seconds"] + time.monotonic() - start
        write(path, result)
        return result

    keep([])  # nobody is to go on from what an older run has left there
    runner.journal.clear()  # its entry is in the file now
    with progress_bar(console) as progress:
        rows, left_out = measure_cases(runner, cases, deadline, progress, keep)
    try:
        runner.copy_gbps.append(runner.measure_copy())
    except RuntimeError as error:  # the device was lost, or is too full: what was measured counts
        console.print(f"no copy could be timed at the end: {error}", markup=False)
    return keep(rows, left_out)


def resumed(path: Path, device: torch.device) -> Row:
    """What a run has left that ended before its end, to go on from. Who ended its process is in "ended_the_process".

    Raises:
        ValueError: there is no such file, or it is of another device, torch or commit.
    """
    result: Row = {"copy_gbps_start_end": [], "ended_the_process": [], "seconds": 0.0} | load(path)
    here = environment(device)
    for key in ("device", "torch", "commit", "fusedopt"):
        if result.get(key) != here[key]:
            raise ValueError(f"{path} is of {key} {result.get(key)}, expected {here[key]}; leave out --resume")
    if turn := Journal(path).read():
        result["ended_the_process"].append(asdict(turn))
        result["rows"] = [row for row in result["rows"] if _case_of(row) != turn.case]
    return result


def _case_of(row: Row) -> str:
    return "/".join(str(row[key]) for key in ("workload", "optimizer", "format", "contract"))


def of_others(cases: list[Case], device: torch.device, against: Iterable[str]) -> list[str]:
    """Those libraries of other projects than torch that are to be run and look installed.

    None is imported, and the device not touched: that is for the process that measures.
    """
    wanted = {name for case in cases for name in peers.offered(case, device)} & set(against)
    modules = {name: peers.MODULES[name][0].partition(".")[0] for name in peers.MODULES if name in wanted}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def _result(runner: BenchRunner, rows: list[Row], left_out: list[str]) -> Row:
    device = runner.device
    copy_gbps = max(runner.copy_gbps)
    measured = "gpu_ms" if device.type == "cuda" else "wall_ms"
    add_floor(rows, copy_gbps, measured)
    add_speedups(rows, measured)
    return {
        "device_type": device.type,
        "copy_gbps": copy_gbps,
        "copy_gbps_start_end": list(runner.copy_gbps),
        "triad_gbps": runner.triad_gbps,
        "method": _method(runner),
        "rows": rows,
        "left_out": left_out,
    }


def without_case(cases: list[Case], device: torch.device, against: Iterable[str]) -> list[str]:
    """Those of ``against`` that have nothing to compare with any of the cases on this kind of device."""
    offered: set[str] = set()
    for case in cases:
        if isinstance(case, AccumulationCase):
            offered |= set(accumulation.LIBRARIES)
        else:
            for module in (contracts, graphs, peers):
                offered |= set(module.offered(case, device))
    return [name for name in against if name not in offered]


def _method(runner: BenchRunner) -> Row:
    repeats = runner.repeats
    return {
        "order": f"libraries in turns, {repeats.rounds} rounds of at most {repeats.host_steps} steps for wall and host "
        f"time, {repeats.traced_steps} traced ones, cold and warm each, and a run of {repeats.span_steps}",
        "samples": _samples(repeats),
        "figures": "medians; _q1 and _q3 are quartiles, _min and _max extremes",
        "warm_up": f"2 checked steps against the float64 reference and {WARM_UP_STEPS} more before anything is timed",
        "caches": CACHES,
        "floor": "bytes_per_param of all parameters at the best copy of the run (bytes read and written)",
    }


def _samples(repeats: Repeats) -> str:
    counts = "of a row: samples for wall_ms and host_ms, traced_samples for gpu_ms and gpu_warm_ms, span_steps"
    if math.isinf(repeats.round_seconds):
        return counts
    least = ", ".join(str(count) for count in LEAST_STEPS.values())
    return f"{counts}; fewer where a library's turn would take more than {repeats.round_seconds} s, at least {least}"


def print_end(console: Console, result: Row) -> None:
    """What the table does not say."""
    facts = f"{result['device']}, torch {result['torch']}, copy {result['copy_gbps']:.1f} GB/s"
    facts += f", triad {result['triad_gbps']:.1f} GB/s" if "triad_gbps" in result else ""
    console.print(facts, highlight=False)
    if min(result["copy_gbps_start_end"]) < STEADY * result["copy_gbps"]:
        first, last = result["copy_gbps_start_end"][0], result["copy_gbps_start_end"][-1]
        console.print(
            f"NOT A QUIET MACHINE: copies ran at {first:.1f} GB/s before the rows and at {last:.1f} after them, "
            f"the load average at the start was {result['load_average']:.1f}; do not quote these figures"
        )
    for library, reason in result["missing_libraries"].items():
        console.print(f"missing, so not compared with: {library} ({reason})", markup=False)
    if result["left_out"]:
        console.print(f"left out by the time limit or an interrupt: {', '.join(result['left_out'])}", markup=False)


def failed_rows(result: Row, own: bool) -> list[Row]:
    """Rows with an error: fusedopt's, or other libraries'."""
    return [row for row in result["rows"] if row["error"] and str(row["library"]).startswith("fusedopt") == own]
