"""How much of a whole training step the step tail is: GPT-2 124M and a GPT of 1.3 billion parameters on one device.

    python benchmarks/train_step.py --device cuda --json benchmarks/results/train-step-h100.json
    python benchmarks/train_step.py --device cuda --size gpt-1.3B --time-limit 90
    python benchmarks/train_step.py --quick                                     # does it run? a tiny model, CPU

The models are the GPT of ``examples/_gpt.py`` with GPT-2's vocabulary, random tokens in sequences of 1024; a batch of
one sequence, and a large one. The tail is clipping to a norm of 1.0 and AdamW. With float32 parameters under bfloat16
autocast: ``fusedopt``; ``torch-fused``: ``clip_grad_norm_`` and ``AdamW(fused=True)``; ``torch-grad-scale``: the same
made to clip in its kernel, the strongest of torch. ``fusedopt`` again with bfloat16 parameters, the other 16 bits of
float32 masters kept by the optimizer (``split16``), moments in float32; without autocast, which such a model needs not.

Libraries have turns. In each the model is made anew, with the same weights, and nothing of the others is in memory.
Before anything is timed the updates are checked against the float64 reference; the losses after as many steps must
agree to within 2% (with bfloat16 parameters: must not be larger by more). Medians over steps, after some to warm up:

* ``step_ms``: from one step's start to the next on the device (CUDA events; on a CPU the host's clock), gaps included;
* ``tail_ms``, ``tail_share``: from the end of the backward pass to the end of the update;
* ``tokens_per_s``; ``speedup``: of the whole step, over the better of torch's two; ``tail_speedup``: of the tail;
* ``peak_bytes``: most memory in use in a step; GPUs only; ``state_bytes``: what the optimizer keeps.

Where the memory is too small the row is skipped, and says so.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from benchmarks.training import (
    STEP_CELLS,
    Size,
    Tell,
    case_name,
    compare_losses,
    exit_code,
    gpt,
    number,
    prepare_device,
    print_table,
    run_cases,
    step_columns,
    training_options,
)
from examples._gpt import GPT
from fusedopt.bench import contracts
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Tail, reported_name
from fusedopt.bench.report import Row, environment
from fusedopt.bench.runner import free_memory, total_bytes
from fusedopt.bench.timing import start_clock, synchronize
from fusedopt.bench.workloads import BorrowedModel

CONTRACT = "train_step"
TITLE = "one training step, medians"
LR = 5e-5

WAYS = (("fusedopt", "fp32"), ("torch-fused", "fp32"), ("torch-grad-scale", "fp32"), ("fusedopt", "bf16+split16"))
"""Libraries, and the format in which each trains."""

WARM_UP_STEPS = 3  # of each turn: memory is taken anew, and the third step is the first that repeats another one

SIZES = (
    Size("gpt2-124M", 50257, 1024, 768, 12, batches=(1, 32), rounds=3, steps=8),
    Size("gpt-1.3B", 50257, 1024, 2048, 24, batches=(1, 8), rounds=2, steps=6),
)
TINY = (Size("tiny", 256, 16, 64, 2, batches=(1, 2), rounds=2, steps=2),)

CELLS = [*STEP_CELLS, ("tail over torch's", number("tail_speedup", "{:.2f}x"))]


@dataclass(frozen=True)
class Case:
    """What all libraries train, and until when."""

    size: Size
    batch: int
    device: torch.device
    deadline: float = math.inf
    """As ``time.monotonic``: no turn begins after it, but the first one of each library."""

    def __str__(self) -> str:
        return case_name(self)

    def tokens(self) -> torch.Tensor:
        """``[batch, context + 1]`` int64, the same each time."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.size.context + 1
        return torch.randint(self.size.vocabulary, shape, generator=generator).to(self.device)


def tail_case(format_: str) -> contracts.Case:
    """Of the workload the one param group alone matters."""
    return contracts.Case("gpt2-124M", "adamw", format_, "clip_step")


def new_model(size: Size, device: torch.device, format_: str) -> GPT:
    with device:
        model = gpt(size)
    return model.to(tail_case(format_).layout.dtype)


def params_of(size: Size) -> list[torch.nn.Parameter]:
    """Without memory behind them."""
    return list(new_model(size, torch.device("meta"), "fp32").parameters())


def least_bytes(size: Size, format_: str) -> int:
    """Of parameters, gradients and what the optimizer keeps: activations come on top."""
    case = tail_case(format_)
    own = 2 * case.layout.dtype.itemsize + case.state_bytes_per_param
    return own * sum(param.numel() for param in params_of(size))


@dataclass
class Measured:
    """One library in training, in one format."""

    library: str
    format: str
    check_error_ratio: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    """After the first turn's last step."""
    error: str | None = None
    skipped: str | None = None
    step_ms: list[float] = field(default_factory=list)
    tail_ms: list[float] = field(default_factory=list)

    def attempt(self, case: Case, turn: int) -> None:
        """A turn. An error costs the library its row, and too little memory."""
        if self.error or self.skipped or (turn and time.monotonic() > case.deadline):
            return
        needed, there = least_bytes(case.size, self.format), total_bytes(case.device)
        if needed > there:
            kind = case.device.type
            self.skipped = f"needs more than {needed / 1e9:.1f} GB of memory, {kind} has {there / 1e9:.1f} GB"
            return
        try:
            if turn == 0:
                self._check(case)
            self._train(case)
        except torch.OutOfMemoryError as error:
            self.skipped = f"out of memory: {str(error).splitlines()[0]}"
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
        free_memory()

    def _check(self, case: Case) -> None:
        """Updates of random gradients."""
        borrowed = BorrowedModel(list(new_model(case.size, case.device, self.format).parameters()))
        own = tail_case(self.format)
        self.check_error_ratio = check(own, contracts.build(self.library, own, borrowed.params), borrowed)
        del borrowed
        free_memory()

    def _train(self, case: Case) -> None:
        model = new_model(case.size, case.device, self.format)
        tail = contracts.build(self.library, tail_case(self.format), list(model.parameters()))
        for group in tail.optimizer.param_groups:
            group["lr"] = LR  # without a warm-up the check's would let the loss grow
        cuda = case.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(case.device)
        loss, clocks = steps(case, model, tail, autocast=self.format == "fp32")
        self.step_ms += clocks[0][WARM_UP_STEPS:]
        self.tail_ms += clocks[1][WARM_UP_STEPS:]
        self.loss = loss if self.loss is None else self.loss
        self.state_bytes = contracts.state_bytes(tail.optimizer)
        self.peak_bytes = torch.cuda.max_memory_allocated(case.device) if cuda else None


def steps(case: Case, model: GPT, tail: Tail, autocast: bool) -> tuple[float, tuple[list[float], list[float]]]:
    """The steps of a turn: the last loss, and milliseconds of steps and of their tails."""
    tokens, moments = case.tokens(), []
    for _ in range(WARM_UP_STEPS + case.size.steps):
        begin = start_clock(case.device)
        tail.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=autocast):
            loss = model.loss(tokens)
        loss.backward()
        moments.append((begin, start_clock(case.device)))
        tail()
    last = start_clock(case.device)
    synchronize(case.device)
    if not loss.isfinite():
        raise AssertionError(f"the loss is {loss.item()} after {len(moments)} steps, expected a finite one")
    ends = [begin for begin, _ in moments[1:]] + [last]
    step_ms = [begin(end) for (begin, _), end in zip(moments, ends)]
    return loss.item(), (step_ms, [middle(end) for (_, middle), end in zip(moments, ends)])


def measure_case(case: Case, tell: Tell = lambda rows: None) -> tuple[list[Row], bool]:
    """Rows of all libraries, and whether an interrupt cut them short."""
    entries = [Measured(*way) for way in WAYS]
    begun: list[Measured] = []
    try:
        for turn in range(case.size.rounds):
            for entry in entries:
                entry.attempt(case, turn)
                begun += [entry] if turn == 0 else []
                tell(_rows(begun, case))
    except KeyboardInterrupt:
        return _rows(begun, case), True
    return _rows(begun, case), False


def _rows(entries: list[Measured], case: Case) -> list[Row]:
    rows = [_row(entry, case) for entry in entries]
    _compare(rows)
    return rows


def _row(entry: Measured, case: Case) -> Row:
    failed = bool(entry.error or entry.skipped)
    params = params_of(case.size)
    return {
        "workload": str(case),
        "optimizer": "adamw",
        "format": entry.format,
        "contract": CONTRACT,
        "library": reported_name(entry.library, case.device),
        "params": sum(param.numel() for param in params),
        "tensors": len(params),
        **step_columns(case.batch * case.size.context, *(([], []) if failed else (entry.step_ms, entry.tail_ms))),
        "tail_speedup": None,
        "state_bytes": entry.state_bytes,
        "peak_bytes": entry.peak_bytes,
        "check_error_ratio": entry.check_error_ratio,
        "loss": entry.loss,
        "error": entry.error,
        "skipped": entry.skipped,
    }


def _compare(rows: list[Row]) -> None:
    """Of ours, how many times as fast as the better of torch's ways; an error where the loss is another one."""
    measured = [row for row in rows if row["step_ms"] is not None]
    torchs = [row for row in measured if row["library"].startswith("torch")]
    for row in measured:
        if torchs and row is not torchs[0]:
            compare_losses(row, torchs[0])
        if torchs and row not in torchs and not row["error"]:
            row["speedup"] = min(one["step_ms"] for one in torchs) / row["step_ms"]
            row["tail_speedup"] = min(one["tail_ms"] for one in torchs) / row["tail_ms"]


def cases(sizes: tuple[Size, ...], device: torch.device, deadline: float) -> Iterator[Case]:
    for size in sizes:
        for batch in size.batches:
            yield Case(size, batch, device, deadline)


def measure(
    device: torch.device, sizes: tuple[Size, ...], deadline: float, console: Console, path: Path | None = None
) -> Row:
    """All sizes and batches."""
    return run_cases(environment(device), cases(sizes, device, deadline), measure_case, console, path)


@click.command(help=__doc__.split("\n")[0])
@training_options("Begin no turn after so many seconds, but the first ones of a case that has begun.")
@click.option("--size", "names", multiple=True, type=click.Choice([size.name for size in SIZES]), help="Default: all.")
def main(
    device_type: str, quick: bool, threads: int | None, time_limit: float, path: Path | None, names: tuple[str, ...]
) -> None:
    deadline = time.monotonic() + time_limit
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = prepare_device(device_type, threads)
    sizes = TINY if quick else tuple(size for size in SIZES if not names or size.name in names)
    result = measure(device, sizes, deadline, console, path)
    print_table(console, TITLE, CELLS, result)
    sys.exit(exit_code(result))


if __name__ == "__main__":
    main()
