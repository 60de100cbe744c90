"""What the benchmarks of whole training steps have in common: sizes, the model, running all cases, rows, a table."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from examples._gpt import GPT
from fusedopt.bench.report import Row, write
from fusedopt.bench.runner import spread

SAME_LOSS = 0.02  # relative; autocast to bfloat16 and unordered sums in the backward pass make a thousandth

Tell = Callable[[list[Row]], object]
"""Is given the rows of a case as far as they are known."""

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


class TrainedCase(Protocol):
    """What all libraries train, in the same way."""

    size: Size
    batch: int
    deadline: float


AnyCase = TypeVar("AnyCase", bound=TrainedCase)


def case_name(case: TrainedCase) -> str:
    return f"{case.size.name}, batch {case.batch} x {case.size.context}"


def run_cases(
    result: Row,
    cases: Iterable[AnyCase],
    measure_case: Callable[[AnyCase, Tell], tuple[list[Row], bool]],
    console: Console,
    path: Path | None,
) -> Row:
    """Adds the rows of all cases to a result, which is written whenever some are new: they outlive the process.

    measure_case: rows of a case, and whether an interrupt cut them short: then, and after a case's deadline
    (``time.monotonic``), the others are left out.
    """
    result |= {"rows": [], "left_out": []}
    interrupted = False
    for case in cases:
        if interrupted or time.monotonic() > case.deadline:
            result["left_out"].append(str(case))
            continue
        console.print(f"measuring {case}", markup=False, highlight=False)
        done = result["rows"]

        def tell(rows: list[Row], done: list[Row] = done) -> None:
            result["rows"] = done + rows
            write(path, result)

        rows, interrupted = measure_case(case, tell)
        tell(rows)
    write(path, result)
    return result


def compare_losses(row: Row, expected: Row) -> None:
    """Puts an error in the place of a row's figures where it did not train as another one has done.

    In another format the forward pass is rounded otherwise, so that the losses part where a batch is learnt by heart in
    a few steps: there it must only not be larger.
    """
    off = row["loss"] - expected["loss"]
    off = abs(off) if row.get("format") == expected.get("format") else max(off, 0.0)
    if not off <= SAME_LOSS * abs(expected["loss"]):
        row["error"] = (
            f"the loss is {row['loss']}, expected that of {expected['library']}, {expected['loss']}, "
            f"to within {SAME_LOSS:.0%}"
        )


Options = Callable[[Callable[..., None]], Callable[..., None]]


def training_options(text: str) -> Options:
    """--device, --quick, --threads, --time-limit, --json. text: of the help of --time-limit."""
    path = click.Path(path_type=Path, dir_okay=False)
    options = [
        click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True),
        click.option("--quick", is_flag=True, help="A smoke run: a tiny model, few steps."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise."),
        click.option("--time-limit", type=float, default=240, show_default=True, help=text),
        click.option("--json", "path", type=path, help="Write the results here."),
    ]

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def prepare_device(device_type: str, threads: int | None) -> torch.device:
    """The device that the command line names; an interrupt and SIGTERM let what has been measured be written."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if device_type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("got cuda, and torch finds no CUDA device here", param_hint="--device")
    if threads:
        torch.set_num_threads(threads)
    return torch.device(device_type)


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
        reason = "failed" if row["error"] else "skipped" if row.get("skipped") else None
        cells = [reason] if reason else [cell(row) for _, cell in columns]
        table.add_row(f"  {_who(row)}", *cells)
    console.print(table)
    for row in result["rows"]:
        if reason := row["error"] or row.get("skipped"):
            kind = "FAILED" if row["error"] else "skipped"
            console.print(f"{kind} {row['workload']} {_who(row)}: {reason}", markup=False)
    if result["left_out"]:
        console.print(f"left out by the time limit or an interrupt: {'; '.join(result['left_out'])}", markup=False)


def _who(row: Row) -> str:
    return str(row["library"]) + ("" if row["format"] == "fp32" else f", {row['format']}")


def exit_code(result: Row) -> int:
    """1 where a row of ours failed."""
    return int(any(row["error"] and row["library"].startswith("fusedopt") for row in result["rows"]))
