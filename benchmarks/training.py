"""What the benchmarks of whole training steps have in common: sizes, the model, columns of a row, the table."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from examples._gpt import GPT
from fusedopt.bench.report import Row
from fusedopt.bench.runner import spread

Column = tuple[str, Callable[[Row], str]]
"""Title, and what a row has there."""


@dataclass(frozen=True)
class Size:
    """A model and its batches, in sequences."""

    name: str
    vocabulary: int
    context: int
    width: int
    layers: int
    batches: tuple[int, ...]
    rounds: int
    steps: int
    """Of a library in a round."""


def gpt(size: Size) -> GPT:
    """The GPT of ``examples/_gpt.py`` with another vocabulary than bytes, the same weights each time."""
    torch.manual_seed(0)
    model = GPT(size.context, size.width, size.layers)
    model.token = torch.nn.Embedding(size.vocabulary, size.width)
    torch.nn.init.normal_(model.token.weight, std=0.02)
    return model


def step_columns(tokens: int, step_ms: list[float], tail_ms: list[float]) -> Row:
    """Medians and spreads of the steps' times and of their tails', None without any; tokens: of a step."""
    step, tail = (statistics.median(times) if times else None for times in (step_ms, tail_ms))
    return {
        "tokens": tokens,
        **spread("step_ms", step_ms),
        **spread("tail_ms", tail_ms),
        "tail_share": tail / step if step_ms else None,
        "tokens_per_s": tokens / step * 1e3 if step_ms else None,
        "speedup": None,
        "samples": len(step_ms),
    }


def number(key: str, form: str, scale: float = 1.0) -> Callable[[Row], str]:
    """A cell with a figure of the row, "-" where it has none."""
    return lambda row: "-" if row.get(key) is None else form.format(scale * row[key])


STEP_CELLS: list[Column] = [
    ("step ms", number("step_ms", "{:.2f}")),
    ("tail ms", number("tail_ms", "{:.3f}")),
    ("tail", number("tail_share", "{:.1f}%", 100)),
    ("tokens/s", number("tokens_per_s", "{:,.0f}")),
    ("over torch", number("speedup", "{:.3f}x")),
    ("peak GB", number("peak_bytes", "{:.2f}", 1e-9)),
]


def print_table(console: Console, title: str, columns: list[Column], result: Row) -> None:
    """One line a row, under its workload; then errors, and what was left out."""
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("model / library", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    workload = None
    for row in result["rows"]:
        if row["workload"] != workload:
            workload = row["workload"]
            table.add_row(workload, style="bold")
        cells = ["failed"] if row["error"] else [cell(row) for _, cell in columns]
        table.add_row(f"  {row['library']}", *cells)
    console.print(table)
    for row in result["rows"]:
        if row["error"]:
            console.print(f"FAILED {row['workload']} {row['library']}: {row['error']}", markup=False)
    if result["left_out"]:
        console.print(f"left out by the time limit or an interrupt: {'; '.join(result['left_out'])}", markup=False)


def exit_code(result: Row) -> int:
    """1 where a row of ours failed."""
    return int(any(row["error"] and row["library"].startswith("fusedopt") for row in result["rows"]))
