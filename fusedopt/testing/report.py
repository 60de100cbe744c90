"""What a run of cases is reported as: rows, a summary, JSON, and the table of the documentation."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .runner import BINS, Result

__all__ = ["Run", "Summary", "environment", "markdown", "row_of", "summaries", "write_json"]


@dataclasses.dataclass
class Run:
    """Results, and what they are results of."""

    subject: str
    """"fusedopt", or the optimizer as the user named it."""
    device: str
    results: list[Result]
    skipped: int
    """Cases that were not run: of a sample, or filtered."""
    seconds: float
    command: str = ""
    unreached: int = 0
    """Cases that the time limit left out."""

    @property
    def judged(self) -> list[Result]:
        return [r for r in self.results if not r.left_out]

    @property
    def failed(self) -> list[Result]:
        return [r for r in self.judged if not r.passed]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Where and with what the cases ran."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(torch.device(device)) if cuda else platform.machine() + " CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "fusedopt": _version("fusedopt"),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _number(value: float) -> float | str:
    """JSON has no infinities."""
    return value if math.isfinite(value) else str(value)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_of(result: Result) -> dict[str, Any]:
    """One row of the JSON."""
    case = result.case
    return {
        "rule": case.variant.rule,
        "variant": case.variant.name,
        "format": str(case.format),
        "backend": case.backend,
        "device": case.device,
        "dtype": _dtype(case.format.dtype),
        "grad_dtype": _dtype(case.grad_dtype),
        "transform": case.transform,
        "case": case.data.name,
        "elements": result.elements,
        "worst_ulp": _number(result.worst_ulp),
        "bound_ulp": _number(result.bound_ulp),
        "worst": result.worst,
        "largest_ulp": _number(result.largest_ulp),
        "failed_elements": result.failed_elements,
        "passed": result.passed,
        "error": result.error or None,
        "left_out": result.left_out or None,
    }


def write_json(path: str | Path, run: Run) -> None:
    """Environment, counts, and one row for each case."""
    counts = {"cases": len(run.judged), "failed": len(run.failed), "not_run": run.skipped, "unreached": run.unreached}
    head = {"subject": run.subject, "command": run.command, **environment(run.device), "seconds": round(run.seconds, 1)}
    histogram = [sum(counts) for counts in zip(*(r.histogram for r in run.judged))]
    record = {
        "environment": head,
        "summary": counts,
        "histogram": {"edges_ulp": BINS, "elements": histogram},
        "rows": [row_of(result) for result in run.results],
    }
    Path(path).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


@dataclasses.dataclass
class Summary:
    """Of the cases that have some properties in common."""

    key: tuple[str, ...]
    cases: int = 0
    failed: int = 0
    worst_ulp: float = 0.0
    """The largest ``Result.largest_ulp``."""
    share: float = 0.0
    """The largest error beside its bound."""

    def add(self, result: Result) -> None:
        self.cases += 1
        self.failed += not result.passed
        self.worst_ulp = max(self.worst_ulp, result.largest_ulp)
        self.share = max(self.share, result.ratio)


_KEYS: dict[str, Callable[[Case], str]] = {
    "rule": lambda case: case.variant.rule,
    "format": lambda case: str(case.format),
    "parameters": lambda case: parameters_of(str(case.format)),
    "backend": lambda case: case.backend or "-",
}


def parameters_of(form: str) -> str:
    """Of the name of a format, how parameters are kept: the part before that of the states."""
    return form.rpartition("-")[0]


def summaries(results: Iterable[Result], *keys: str) -> list[Summary]:
    """One for each combination of the keys: "rule", "format", "parameters", "backend"; in the order of the results."""
    found: dict[tuple[str, ...], Summary] = {}
    for result in results:
        key = tuple(_KEYS[name](result.case) for name in keys)
        found.setdefault(key, Summary(key)).add(result)
    return list(found.values())


def states_of(form: str) -> str:
    """Of the name of a format, how states are kept: a dtype, or "" for the compute type, as everywhere by default."""
    states = form.rpartition("-")[2].removesuffix("_states")
    return "" if states == "None" else states


def ulp_text(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.2g}"


def format_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lines of Markdown from rows of ``row_of`` or of the JSON: cases and the worst error in ulp, with a line for each
    rule and format of states, a column for each way of keeping parameters."""
    cells: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        if row["left_out"]:
            continue
        cell = cells.setdefault((row["rule"], states_of(row["format"]), parameters_of(row["format"])), [0, 0.0, 0])
        cell[0] += 1
        cell[1] = max(cell[1], float(row["largest_ulp"]))
        cell[2] += not row["passed"]
    columns = list(dict.fromkeys(key[2] for key in cells))
    lines = ["| rule | states | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for rule, states in dict.fromkeys(key[:2] for key in cells):
        texts = [_cell_text(*cells.get((rule, states, column), (0, 0.0, 0))) for column in columns]
        lines.append(f"| {rule} | {states or 'default'} | " + " | ".join(texts) + " |")
    return lines


def _cell_text(cases: int, worst_ulp: float, failed: int) -> str:
    failures = f", **{failed} failed**" if failed else ""
    return f"{cases}: {ulp_text(worst_ulp)}{failures}" if cases else ""


def markdown(run: Run) -> str:
    """Cases and worst error per rule and backend, a column for each way of keeping parameters."""
    cells = {s.key: s for s in summaries(run.judged, "rule", "backend", "parameters")}
    rows = list(dict.fromkeys(key[:2] for key in cells))
    columns = list(dict.fromkeys(key[2] for key in cells))
    lines = ["| rule | backend | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for row in rows:
        texts = []
        for column in columns:
            s = cells.get((*row, column))
            texts.append(_cell_text(s.cases, s.worst_ulp, s.failed) if s else "")
        lines.append(f"| {row[0]} | {row[1]} | " + " | ".join(texts) + " |")
    where = environment(run.device)
    total = f"{len(run.judged):,} cases, {len(run.failed)} failed, {run.seconds:.0f} s"
    made = f"`{run.command}`: {total}; {where['device']}, torch {where['torch']}, {where['date'][:10]}."
    return "\n".join([made, "", *lines]) + "\n"
