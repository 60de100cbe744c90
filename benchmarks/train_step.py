"""How much of a whole training step the step tail is: GPT-2 124M and a GPT of 1.3 billion parameters on one device.

    python benchmarks/train_step.py --device cuda --json benchmarks/results/train-step-h100.json
    python benchmarks/train_step.py --quick                                     # does it run? a tiny model, CPU

The models are the GPT of ``examples/_gpt.py`` with GPT-2's vocabulary, float32 under bfloat16 autocast, random tokens
in sequences of 1024; a batch of one sequence, and a large one. The tail is clipping to a norm of 1.0 and AdamW:
``fusedopt``; ``torch-fused``: ``clip_grad_norm_`` and ``AdamW(fused=True)``; ``torch-grad-scale``: the same made to
clip in its kernel, the strongest of torch. All train the same parameters, in turns of some steps, after their updates
were checked against the float64 reference. Medians over steps:

* ``step_ms``: from one step's start to the next on the device (CUDA events; on a CPU the host's clock), gaps included;
* ``tail_ms``, ``tail_share``: from the end of the backward pass to the end of the update;
* ``tokens_per_s``; ``speedup``: of the whole step, over the better of torch's two;
* ``peak_bytes``: most memory in use during a step, without the states of the others; GPUs only.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from benchmarks.training import STEP_CELLS, Size, exit_code, gpt, print_table, step_columns
from fusedopt.bench import contracts
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case, Tail, reported_name
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.runner import free_memory, progress_bar
from fusedopt.bench.timing import start_clock, synchronize
from fusedopt.bench.workloads import BorrowedModel

CONTRACT = "train_step"
TITLE = "one training step, medians"
LIBRARIES = ("fusedopt", "torch-fused", "torch-grad-scale")

TAIL = Case("gpt2-124M", "adamw", "fp32", "clip_step")  # of the workload, the one param group alone matters

WARM_UP_STEPS = 2

SIZES = (
    Size("gpt2-124M", 50257, 1024, 768, 12, batches=(1, 32), rounds=3, steps=8),
    Size("gpt-1.3B", 50257, 1024, 2048, 24, batches=(1, 8), rounds=2, steps=6),
)
TINY = (Size("tiny", 256, 16, 64, 2, batches=(1, 2), rounds=2, steps=2),)


@dataclass
class Measured:
    """One library in training."""

    library: str
    tail: Tail | None = None
    check_error_ratio: float | None = None
    state_bytes: int = 0
    peak_bytes: int | None = None
    error: str | None = None
    step_ms: list[float] = field(default_factory=list)
    tail_ms: list[float] = field(default_factory=list)


class Training:
    """A model that several libraries train in turns."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        with device:
            self.model = gpt(size)
        self.params = list(self.model.parameters())
        self.entries = [Measured(library) for library in LIBRARIES]

    def prepare(self) -> None:
        """Makes the tails and checks them on random gradients; the parameters are then what they were."""
        kept = [param.detach().cpu() for param in self.params]
        borrowed = BorrowedModel(self.params)
        for entry in self.entries:
            self.attempt(entry, lambda entry=entry: self._build(entry, borrowed))
        for param, value in zip(self.params, kept):
            param.grad = None
            param.detach().copy_(value)
        free_memory()

    def _build(self, entry: Measured, borrowed: BorrowedModel) -> None:
        entry.tail = contracts.build(entry.library, TAIL, self.params)
        entry.check_error_ratio = check(TAIL, entry.tail, borrowed)
        entry.state_bytes = contracts.state_bytes(entry.tail.optimizer)

    def attempt(self, entry: Measured, run: Callable[[], object]) -> None:
        """An error, such as too little memory, costs the library its row."""
        if entry.error:
            return
        try:
            run()
            return
        except Exception as error:
            entry.error = f"{type(error).__name__}: {error}"
        entry.tail, entry.state_bytes = None, 0
        entry.step_ms, entry.tail_ms = [], []
        self.model.zero_grad()
        free_memory()

    def measure(self, batch: int, deadline: float = math.inf) -> list[Row]:
        """Rows of a batch size. After ``deadline`` (``time.monotonic``) no round begins but the first."""
        for entry in self.entries:
            entry.step_ms, entry.tail_ms, entry.peak_bytes = [], [], None
        tokens = torch.randint(self.size.vocabulary, (batch, self.size.context + 1), device=self.device)
        for turn in range(self.size.rounds):
            if turn and time.monotonic() > deadline:
                break
            for entry in self.entries:
                steps = self.size.steps + (WARM_UP_STEPS if turn == 0 else 0)
                self.attempt(entry, lambda entry=entry, steps=steps: self._train(entry, tokens, steps))
        rows = [self._row(entry, batch) for entry in self.entries]
        _add_speedups(rows)
        return rows

    def _train(self, entry: Measured, tokens: torch.Tensor, steps: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clocks = []
        for _ in range(steps):
            begin = start_clock(self.device)
            entry.tail.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model.loss(tokens)
            loss.backward()
            middle = start_clock(self.device)
            entry.tail()
            clocks.append((begin, middle))
        last = start_clock(self.device)
        synchronize(self.device)
        ends = [begin for begin, _ in clocks[1:]] + [last]
        timed = slice(steps - self.size.steps, None)
        entry.step_ms += [begin(end) for (begin, _), end in zip(clocks, ends)][timed]
        entry.tail_ms += [middle(end) for (_, middle), end in zip(clocks, ends)][timed]
        if not loss.isfinite():
            raise AssertionError(f"the loss is {loss.item()} after {steps} steps, expected a finite one")
        if self.device.type == "cuda":
            others = sum(other.state_bytes for other in self.entries if other is not entry)
            entry.peak_bytes = torch.cuda.max_memory_allocated(self.device) - others

    def _row(self, entry: Measured, batch: int) -> Row:
        return {
            "workload": f"{self.size.name}, batch {batch} x {self.size.context}",
            "optimizer": "adamw",
            "format": "fp32",
            "contract": CONTRACT,
            "library": reported_name(entry.library, self.device),
            "params": sum(param.numel() for param in self.params),
            "tensors": len(self.params),
            **step_columns(batch * self.size.context, entry.step_ms, entry.tail_ms),
            "state_bytes": entry.state_bytes,
            "peak_bytes": entry.peak_bytes,
            "check_error_ratio": entry.check_error_ratio,
            "error": entry.error,
        }


def _add_speedups(rows: list[Row]) -> None:
    """Of ours: how many times as many tokens a second as with the better of torch's ways."""
    torchs = [row["step_ms"] for row in rows if row["library"].startswith("torch") and not row["error"]]
    for row in rows:
        if row["library"].startswith("fusedopt") and torchs and not row["error"]:
            row["speedup"] = min(torchs) / row["step_ms"]


def measure(
    device: torch.device, sizes: tuple[Size, ...], deadline: float, console: Console, path: Path | None = None
) -> Row:
    """All sizes and batches. The JSON file is written after each, so that what was measured outlives the process."""
    result = environment(device) | {"rows": [], "left_out": []}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(len(size.batches) for size in sizes))
        for size in sizes:
            training = None
            for batch in size.batches:
                name = f"{size.name}, batch {batch} x {size.context}"
                progress.update(task, description=name)
                try:
                    if time.monotonic() > deadline:
                        result["left_out"].append(name)
                    else:
                        if training is None:
                            training = Training(size, device)
                            training.prepare()
                        result["rows"] += training.measure(batch, deadline)
                except KeyboardInterrupt:
                    deadline = 0.0
                    result["left_out"].append(name)
                write(path, result)
                progress.advance(task)
            training = None
            free_memory()
    return result


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="A smoke run: a tiny model, few steps.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--time-limit", type=float, default=240, show_default=True, help="Begin no round after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(device_type: str, quick: bool, threads: int | None, time_limit: float, path: Path | None) -> None:
    deadline = time.monotonic() + time_limit
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what has been measured is written then
    console = Console(width=None if sys.stdout.isatty() else 120)
    if threads:
        torch.set_num_threads(threads)
    result = measure(torch.device(device_type), TINY if quick else SIZES, deadline, console, path)
    print_table(console, TITLE, STEP_CELLS, result)
    sys.exit(exit_code(result))


if __name__ == "__main__":
    main()
