"""A fine-tuning step of transformers' Trainer: GPT-2 124M from a config, random weights, on one device.

    python benchmarks/trainer.py --device cuda --json benchmarks/results/trainer-h100.json
    python benchmarks/trainer.py --device cuda --batch 8 --time-limit 120     # one batch size, two minutes at most
    python benchmarks/trainer.py --quick                                      # does it run? a tiny model, CPU

Two trainers train copies of one model, in turns of some steps, with ``max_grad_norm=1.0`` and bfloat16 autocast:
``torch-fused`` is ``transformers.Trainer`` with ``optim="adamw_torch_fused"``, and ``fusedopt`` the Trainer of
``fusedopt.integrations.transformers`` with ``fusedopt.AdamW``. Once as the Trainer comes, and once with
``logging_nan_inf_filter=False``: by default it waits for the loss in every step, so that the GPU idles until the tail
is launched. Sequences of 1024 bytes of the standard library's sources. Medians over steps:

* ``step_ms``: from one step's start to the next on the device (CUDA events; on a CPU the host's clock), gaps included;
* ``tail_ms``, ``tail_share``: from the end of the backward pass to the end of ``optimizer.step``: what the Trainer does
  with the loss, clipping, update, gaps included;
* ``tail_gpu_ms``, ``tail_launches``: time of the kernels, copies and fills among that, and their number, from the
  profiler, in a last turn that is not timed otherwise; GPUs only;
* ``tokens_per_s``; ``speedup``: of the whole step over torch's; ``tail_speedup``, ``tail_gpu_speedup``: of the tail;
* ``peak_bytes``: most memory in use in the first turn, without what the other library holds; GPUs only;
* ``loss``: after the last turn that both finished. The run fails where those of the two differ by more than 2%.

The time limit stops training between two steps. Then, after an interrupt and after an error, what was measured counts.

Without transformers a loop takes its place, named ``stand-in`` in every row, that makes those calls of the Trainer's
loop (5.23) that have effects on the device, in its order, on the GPT of ``examples/_gpt.py`` in the same size: forward
and backward, the filter's two looks at the loss, ``tr_loss += loss``, clipping, step, scheduler, ``zero_grad``. Left
out is what delays the host: callbacks, data loader, collator, copies of the batch. So a stand-in's gaps are shorter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
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
from examples import _gpt
from fusedopt.bench import contracts
from fusedopt.bench.contracts import reported_name
from fusedopt.bench.report import Row, environment
from fusedopt.bench.runner import free_memory
from fusedopt.bench.timing import US_PER_MS, device_work, start_clock, synchronize, trace_events
from fusedopt.integrations.clipping import set_bounds

CONTRACT = "trainer_step"
LIBRARIES = ("torch-fused", "fusedopt")
LR, MAX_NORM = 5e-5, 1.0  # the Trainer's defaults
NEEDED = ("transformers", "accelerate")

WARM_UP_STEPS = 3  # of each turn: a train() of its own

CELLS = [
    *STEP_CELLS[:3],
    ("tail's kernels ms", number("tail_gpu_ms", "{:.3f}")),
    ("launches", number("tail_launches", "{:.0f}")),
    *STEP_CELLS[3:],
    ("tail over torch's", number("tail_speedup", "{:.2f}x")),
    ("loss", number("loss", "{:.4f}")),
]

GPT2 = Size("gpt2-124M", 50257, 1024, 768, 12, batches=(1, 8), rounds=4, steps=20)
TINY = Size("tiny", 256, 16, 64, 2, batches=(2,), rounds=2, steps=3)


@dataclass(frozen=True)
class Case:
    """What both libraries train, and until when."""

    size: Size
    batch: int
    nan_filter: bool
    device: torch.device
    stand_in: bool
    deadline: float = math.inf
    """As ``time.monotonic``: no step begins after it."""

    def __str__(self) -> str:
        return case_name(self) + ("" if self.nan_filter else ", no loss filter")

    @property
    def steps(self) -> int:
        """Of a turn. The last one ends the last but one."""
        return WARM_UP_STEPS + self.size.steps + 1

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def windows(self) -> torch.Tensor:
        """``[steps * batch, context + 1]`` int64, the same each time."""
        text = _text()
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(len(text) - self.size.context, (self.steps * self.batch,), generator=generator)
        return _gpt.windows(text, starts, self.size.context)


@functools.cache
def _text() -> torch.Tensor:
    return _gpt.standard_library_text()[0]


@dataclass
class Clocks:
    """When the parts of each step of a turn began; with ``tracing`` the device's work in the tails instead."""

    device: torch.device
    tracing: bool = False
    begin: list = field(default_factory=list)
    after_backward: list = field(default_factory=list)
    after_step: list = field(default_factory=list)
    traces: list[tuple[float, int]] = field(default_factory=list)
    """Milliseconds and launches of each tail."""

    profiler: torch.profiler.profile | None = None

    def reset(self) -> None:
        for moments in (self.begin, self.after_backward, self.after_step):
            moments.clear()

    def begin_step(self) -> None:
        self.begin.append(start_clock(self.device))

    def end_backward(self) -> None:
        if self.tracing:
            synchronize(self.device)
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        self.after_backward.append(start_clock(self.device))

    def end_step(self) -> None:
        self.after_step.append(start_clock(self.device))
        if self.profiler is not None:
            synchronize(self.device)
            self.profiler.stop()
            events, self.profiler = trace_events(self.profiler), None
            work = [us for _, us in device_work(events)]
            self.traces.append((sum(work) / US_PER_MS, len(work)))

    def times(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the steps but the first ones and the last, and of their tails."""
        synchronize(self.device)
        steps = [begin(end) for begin, end in zip(self.begin, self.begin[1:])]
        tails = [begin(end) for begin, end in zip(self.after_backward, self.after_step)][: len(steps)]
        return steps[WARM_UP_STEPS:], tails[WARM_UP_STEPS:]


class WithTrainer:
    """One library in the Trainer of transformers."""

    def __init__(self, library: str, case: Case) -> None:
        import transformers

        self.case, self.clocks = case, Clocks(case.device)
        self.folder = tempfile.TemporaryDirectory()
        args = transformers.TrainingArguments(
            self.folder.name,
            max_steps=case.steps,
            per_device_train_batch_size=case.batch,
            learning_rate=LR,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=case.device.type == "cpu",
            logging_nan_inf_filter=case.nan_filter,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        if case.device.type == "cuda":
            args._n_gpu = 1  # else, where there are several, the Trainer spreads the batch over them
        data = [{"input_ids": window[:-1], "labels": window[:-1]} for window in case.windows()]
        trainer_class = _timed(_trainer_class(library), self)
        self.trainer = trainer_class(_gpt2(case.size), args, train_dataset=data, **_optimizer(library, args))
        self.model = self.trainer.model

    def train(self) -> None:
        """A turn; ``clocks`` has its times."""
        self.clocks.reset()
        self.trainer.train()

    @property
    def loss(self) -> float:
        return self.trainer.last_loss.item()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer.optimizer


def _gpt2(size: Size) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.width // 64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,  # so that the two train alike
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def _trainer_class(library: str) -> type:
    if library == "fusedopt":
        from fusedopt.integrations.transformers import Trainer
    else:
        from transformers import Trainer
    return Trainer


def _optimizer(library: str, args: Any) -> dict[str, Any]:
    if library != "fusedopt":
        return {}
    from fusedopt.integrations.transformers import optimizer_cls_and_kwargs

    return {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs(args, fusedopt.AdamW)}


def _timed(trainer_class: type, run: WithTrainer) -> type:
    """A subclass that marks its steps, stops in time, and keeps the last loss, on the device."""
    import transformers

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            run.clocks.begin_step()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            run.clocks.end_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= run.case.is_over()

    class Timed(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Marks()], **kwargs)
            self.remove_callback(transformers.PrinterCallback)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            run.clocks.end_backward()
            return self.last_loss

    return Timed


class StandIn:
    """One library in a loop with the Trainer's calls; see the top of this file."""

    def __init__(self, library: str, case: Case) -> None:
        self.case, self.clocks = case, Clocks(case.device)
        self.model = gpt(case.size).to(case.device)
        self.batches = case.windows().to(case.device).split(case.batch)
        groups = [
            {"params": [param for param in self.model.parameters() if param.dim() >= 2]},
            {"params": [param for param in self.model.parameters() if param.dim() < 2]},
        ]
        settings = {"lr": LR, "weight_decay": 0.0}
        if library == "fusedopt":
            self.optimizer, self.tail = fusedopt.AdamW(groups, **settings), self._our_tail
        else:
            self.optimizer, self.tail = torch.optim.AdamW(groups, fused=True, **settings), self._torch_tail
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def _torch_tail(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters()), MAX_NORM, norm_type=2)
        self.optimizer.step()

    def _our_tail(self) -> None:
        """As ``fusedopt.integrations.accelerate`` does it."""
        norm = torch.full((), float("nan"), device=self.clocks.device)
        set_bounds("StandIn", self.optimizer, MAX_NORM, 2.0)
        self.optimizer.step()
        norm.copy_(self.optimizer._control().total_norm)

    def train(self) -> None:
        """As ``WithTrainer.train``."""
        self.clocks.reset()
        total = torch.zeros((), device=self.case.device)
        for batch in self.batches:
            self.clocks.begin_step()
            with torch.autocast(self.case.device.type, torch.bfloat16):
                loss = self.model.loss(batch)
            loss.backward()
            self.last_loss = loss.detach()
            self.clocks.end_backward()
            if self.case.nan_filter and (torch.isnan(self.last_loss) or torch.isinf(self.last_loss)):
                raise AssertionError(f"the loss is {loss.item()}, expected a finite one")
            total += self.last_loss
            self.tail()
            self.clocks.end_step()
            self.scheduler.step()
            self.model.zero_grad()
            if self.case.is_over():
                break

    @property
    def loss(self) -> float:
        return self.last_loss.item()


@dataclass
class Measured:
    """One library in training."""

    library: str
    run: WithTrainer | StandIn | None = None
    error: str | None = None
    step_ms: list[float] = field(default_factory=list)
    tail_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """After each turn that was finished."""

    peak_bytes: int | None = None
    tail_gpu_ms: float | None = None
    tail_launches: int | None = None
    trace_error: str | None = None

    def attempt(self, case: Case, timed: bool) -> None:
        """A turn. An error, such as too little memory, costs the library its row, or what the profiler would tell."""
        if self.error is not None or case.is_over():
            return
        try:
            self._turn(case) if timed else self._traced_turn()
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            if timed:
                self.error, self.run = text, None
            else:
                self.trace_error = text
            with contextlib.suppress(RuntimeError):  # the device is lost: the next turns will say so
                free_memory()

    def _turn(self, case: Case) -> None:
        cuda = case.device.type == "cuda"
        first = self.run is None
        before = torch.cuda.memory_allocated(case.device) if cuda else 0
        if first:
            if cuda:
                torch.cuda.reset_peak_memory_stats(case.device)
            self.run = (StandIn if case.stand_in else WithTrainer)(self.library, case)
        self.run.train()
        step_ms, tail_ms = self.run.clocks.times()
        self.step_ms += step_ms
        self.tail_ms += tail_ms
        if len(self.run.clocks.begin) == case.steps:
            self.losses.append(self.run.loss)
        if first and cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated(case.device) - before

    def _traced_turn(self) -> None:
        self.run.clocks.tracing = True
        self.run.train()
        traces = self.run.clocks.traces[WARM_UP_STEPS:]  # the profiler's first session may miss kernels
        if traces:
            self.tail_gpu_ms, self.tail_launches = (statistics.median(values) for values in zip(*traces))


def measure_case(case: Case, tell: Tell = lambda rows: None) -> tuple[list[Row], bool]:
    """Rows of both libraries, and whether an interrupt cut them short."""
    with contextlib.suppress(RuntimeError):  # of a device that an earlier case has lost
        free_memory()
    entries = [Measured(library) for library in LIBRARIES]
    timed = [True] * case.size.rounds
    interrupted = False
    try:
        for is_timed in timed + [False] * (case.device.type == "cuda"):
            for entry in entries:
                entry.attempt(case, is_timed)
            tell(_rows(entries, case))
    except KeyboardInterrupt:
        interrupted = True
    return _rows(entries, case), interrupted


def _rows(entries: list[Measured], case: Case) -> list[Row]:
    rows = [_row(entry, case) for entry in entries]
    _compare(rows, entries)
    return rows


def _row(entry: Measured, case: Case) -> Row:
    error = entry.error
    if error is None and not entry.step_ms:
        error = "the time limit or an interrupt left no step to measure"
    known = error is None
    return {
        "workload": str(case),
        "optimizer": "adamw",
        "format": "fp32",
        "contract": CONTRACT,
        "library": reported_name(entry.library, case.device),
        "driver_loop": "stand-in" if case.stand_in else "transformers.Trainer",
        "params": sum(param.numel() for param in entry.run.model.parameters()) if known else None,
        "tensors": len(list(entry.run.model.parameters())) if known else None,
        **step_columns(case.batch * case.size.context, *((entry.step_ms, entry.tail_ms) if known else ([], []))),
        "tail_gpu_ms": entry.tail_gpu_ms,
        "tail_launches": entry.tail_launches,
        "trace_error": entry.trace_error,
        "tail_speedup": None,
        "tail_gpu_speedup": None,
        "state_bytes": contracts.state_bytes(entry.run.optimizer) if known else None,
        "peak_bytes": entry.peak_bytes,
        "loss": None,
        "error": error,
    }


def _compare(rows: list[Row], entries: list[Measured]) -> None:
    """Speedups of ours; an error in the place of its figures where the two did not train alike."""
    torchs, ours = rows
    if torchs["error"] or ours["error"]:
        return
    turns = min(len(entry.losses) for entry in entries)
    if turns:
        torchs["loss"], ours["loss"] = (entry.losses[turns - 1] for entry in entries)
        compare_losses(ours, torchs)
        if ours["error"]:
            return
    ours["speedup"] = torchs["step_ms"] / ours["step_ms"]
    ours["tail_speedup"] = torchs["tail_ms"] / ours["tail_ms"]
    if torchs["tail_gpu_ms"] and ours["tail_gpu_ms"]:
        ours["tail_gpu_speedup"] = torchs["tail_gpu_ms"] / ours["tail_gpu_ms"]


def cases(size: Size, device: torch.device, stand_in: bool, deadline: float) -> Iterator[Case]:
    """Batch sizes, each with and without the Trainer's filter of losses."""
    for batch in size.batches:
        for nan_filter in (True, False):
            yield Case(size, batch, nan_filter, device, stand_in, deadline)


def measure(
    device: torch.device, size: Size, stand_in: bool, deadline: float, console: Console, path: Path | None = None
) -> Row:
    """All cases."""
    versions = {} if stand_in else {name: importlib.metadata.version(name) for name in NEEDED}
    loop = "stand-in" if stand_in else "transformers.Trainer"
    result = environment(device) | {"driver_loop": loop, "library_versions": versions}
    return run_cases(result, cases(size, device, stand_in, deadline), measure_case, console, path)


def missing_library() -> str | None:
    """Why the Trainer cannot be used, or None."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


@click.command(help=__doc__.split("\n")[0])
@training_options("Begin no step after so many seconds.")
@click.option("--stand-in", is_flag=True, help="The loop that stands in for the Trainer, though that is installed.")
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Sequences; may be repeated.")
def main(
    device_type: str,
    quick: bool,
    stand_in: bool,
    batches: tuple[int, ...],
    threads: int | None,
    time_limit: float,
    path: Path | None,
) -> None:
    deadline = time.monotonic() + time_limit
    console = Console(width=None if sys.stdout.isatty() else 160)
    device = prepare_device(device_type, threads)
    reason = missing_library()
    if reason and not stand_in:
        console.print(f"{reason}: measuring a loop that stands in for the Trainer")
    size = TINY if quick else GPT2
    size = replace(size, batches=batches) if batches else size
    result = measure(device, size, bool(stand_in or reason), deadline, console, path)
    title = f"one fine-tuning step ({result['driver_loop']}), {result['device']}, medians"
    print_table(console, title, CELLS, result)
    sys.exit(exit_code(result))


if __name__ == "__main__":
    main()
