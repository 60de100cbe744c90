"""Compares two results of ``fusedopt bench``, or of ``benchmarks/step.py``: what has become slower, or larger.

A time counts as changed where its median moved by more than both runs scatter together, that is the sum of their
interquartile ranges (their whole ranges in files without quartiles), and by more than ``tolerance`` of itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .report import Row

TIMES = {"gpu_ms": 0.01, "wall_ms": 0.05, "host_ms": 0.05}
"""Compared figures, and the relative change that is never a regression."""

COUNTS = ("launches", "state_bytes", "peak_bytes")
"""Compared too: anything more is a regression. Bytes may grow by a thousandth."""

SAME = ("device", "torch", "threads", "triton", "driver")
"""Facts about a run that should agree; only the device makes figures incomparable."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One figure of one row in both runs."""

    row: str
    figure: str
    before: float | None
    after: float | None
    threshold: float
    """Relative change that is within the scatter."""
    verdict: str
    """"slower", "faster", "same", "failed"."""

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "failed")


def load(path: Path) -> Row:
    """A result.

    Raises:
        ValueError: the file cannot be read, or holds no rows.
    """
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a file that --json wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); name a file that --json wrote") from error
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f'{path} has no "rows"; name a file that fusedopt bench --json wrote')
    return result


def warnings(before: Row, after: Row) -> list[str]:
    """Where the runs differ in what they were made with."""
    found = []
    for key in SAME:
        first, second = before.get(key), after.get(key)
        if first != second:
            effect = ": times of different devices say nothing about the code" if key == "device" else ""
            found.append(f"different {key}: {first} and {second}{effect}")
    return found


def compare(before: Row, after: Row, tolerance: float | None = None) -> tuple[list[Change], list[str]]:
    """Changes of the rows that both have, and the names of those that only one has.

    tolerance: in place of those in ``TIMES``.
    """
    first, second = _by_key(before), _by_key(after)
    changes = [change for key in first if key in second for change in _changes(key, first[key], second[key], tolerance)]
    only = [f"{'/'.join(key)}: only in the {'first' if key in first else 'second'}" for key in first.keys() ^ second]
    return changes, sorted(only)


def _by_key(result: Row) -> dict[Key, Row]:
    names = ("workload", "optimizer", "format", "contract", "library")
    return {tuple(str(row[name]) for name in names): row for row in result["rows"] if not row.get("skipped")}


def _changes(key: Key, before: Row, after: Row, tolerance: float | None) -> list[Change]:
    name = "/".join(key)
    if after.get("error") or before.get("error"):
        broke = bool(after.get("error")) and not before.get("error")
        return [Change(name, "runs", None, None, 0.0, "failed")] if broke else []
    found = []
    for figure, least in TIMES.items():
        if before.get(figure) and after.get(figure):
            least = least if tolerance is None else tolerance
            scatter = (_scatter(before, figure) + _scatter(after, figure)) / before[figure]
            found.append(_judge(name, figure, before[figure], after[figure], max(least, scatter)))
    for figure in COUNTS:
        if before.get(figure) is not None and after.get(figure) is not None:
            allowed = 0.001 if figure.endswith("bytes") else 0.0
            found.append(_judge(name, figure, before[figure], after[figure], allowed))
    return found


def _scatter(row: Row, figure: str) -> float:
    low, high = ("q1", "q3") if row.get(f"{figure}_q3") is not None else ("min", "max")
    least, most = row.get(f"{figure}_{low}"), row.get(f"{figure}_{high}")
    return 0.0 if least is None or most is None else float(most - least)


def _judge(name: str, figure: str, before: float, after: float, threshold: float) -> Change:
    change = (after - before) / before if before else math.copysign(math.inf, after) if after else 0.0
    verdict = "same" if abs(change) <= threshold else "slower" if change > 0 else "faster"
    return Change(name, figure, before, after, threshold, verdict)


def print_changes(console: Console, changes: list[Change], every: bool) -> None:
    """The changed figures, or all of them."""
    shown = [change for change in changes if every or change.verdict != "same"]
    table = Table(box=None, pad_edge=False)
    table.add_column("row", overflow="fold")
    for column in ("figure", "before", "after", "change", "scatter", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    colours = {"slower": "red", "failed": "red", "faster": "green", "same": "white"}
    for one in shown:
        cells = ["", "", "", ""]
        if one.before is not None and one.after is not None:
            change = f"{100 * (one.after / one.before - 1):+.1f}%" if one.before else "-"
            cells = [f"{one.before:.4g}", f"{one.after:.4g}", change, f"{100 * one.threshold:.1f}%"]
        verdict = {"slower": "REGRESSION", "failed": "FAILS NOW"}.get(one.verdict, one.verdict)
        table.add_row(one.row, one.figure, *cells, f"[{colours[one.verdict]}]{verdict}[/]")
    if shown:
        console.print(table)
