"""A fine-tuning step of transformers' Trainer: GPT-2 124M from a config, random weights, on one device.

    python benchmarks/trainer.py --device cuda --json benchmarks/results/trainer-h100.json
    python benchmarks/trainer.py --device cuda --wheels wheels/     # where transformers is not installed: from files
    python benchmarks/trainer.py --quick                            # does it run? a tiny model, CPU

Two trainers train copies of one model, in turns of some steps, with ``max_grad_norm=1.0`` and bfloat16 autocast:
``torch-fused`` is ``transformers.Trainer`` with ``optim="adamw_torch_fused"``, and ``fusedopt`` the Trainer of
``fusedopt.integrations.transformers`` with ``fusedopt.AdamW``. Once as the Trainer comes, and once with
``logging_nan_inf_filter=False``: by default it waits for the loss in every step, so that the GPU idles until the tail
is launched. Sequences of 1024 random tokens. Medians over steps:

* ``step_ms``: from one step's start to the next on the device (CUDA events; on a CPU the host's clock), gaps included;
* ``tail_ms``, ``tail_share``: from the end of the backward pass to the end of ``optimizer.step``: what the Trainer does
  with the loss, clipping, update, gaps included;
* ``tokens_per_s``; ``speedup``: of the whole step over torch's; ``tail_speedup``: of the tail;
* ``loss``: of the last step. The run fails where those of the two differ by more than a percent.

Without transformers a loop takes its place, named ``stand-in`` in every row, that makes those calls of the Trainer's
loop (5.23) that have effects on the device, in its order, on the GPT of ``examples/_gpt.py`` in the same size: forward
and backward, the filter's two looks at the loss, ``tr_loss += loss``, clipping, step, scheduler, ``zero_grad``. Left
out is what delays the host: callbacks, data loader, collator, copies of the batch. So a stand-in's gaps are shorter.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
from examples._gpt import GPT
from fusedopt.bench import contracts
from fusedopt.bench.contracts import reported_name
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.runner import free_memory, spread
from fusedopt.bench.timing import start_clock, synchronize
from fusedopt.integrations.clipping import set_bounds

CONTRACT = "trainer_step"
LIBRARIES = ("torch-fused", "fusedopt")
LR, MAX_NORM = 1e-5, 1.0
NEEDED = ("transformers", "accelerate")

WARM_UP_STEPS = 3  # of each turn: a train() of its own
SAME_LOSS = 0.01  # relative; autocast to bfloat16 and unordered sums in the backward pass make less than a thousandth


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


GPT2 = Size("gpt2-124M", 50257, 1024, 768, 12, batches=(1, 8), rounds=3, steps=10)
TINY = Size("tiny", 256, 16, 64, 2, batches=(2,), rounds=2, steps=3)


@dataclass
class Clocks:
    """When the parts of each step began."""

    device: torch.device
    begin: list = field(default_factory=list)
    after_backward: list = field(default_factory=list)
    after_step: list = field(default_factory=list)

    def mark(self, moments: list) -> None:
        moments.append(start_clock(self.device))

    def times(self) -> tuple[list[float], list[float]]:
        """Milliseconds of the steps but the first ones and the last, and of their tails."""
        synchronize(self.device)
        steps = [begin(end) for begin, end in zip(self.begin, self.begin[1:])]
        tails = [begin(end) for begin, end in zip(self.after_backward, self.after_step)][: len(steps)]
        return steps[WARM_UP_STEPS:], tails[WARM_UP_STEPS:]


def windows(size: Size, count: int) -> torch.Tensor:
    """``[count, context + 1]`` int64, random tokens, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size.vocabulary, (count, size.context + 1), generator=generator)


class WithTrainer:
    """One library in the Trainer of transformers."""

    def __init__(self, library: str, size: Size, batch: int, nan_filter: bool, device: torch.device) -> None:
        import transformers

        self.clocks, self.folder = Clocks(device), tempfile.TemporaryDirectory()
        steps = WARM_UP_STEPS + size.steps + 1
        args = transformers.TrainingArguments(
            self.folder.name,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=LR,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=device.type == "cpu",
            logging_nan_inf_filter=nan_filter,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
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
        data = [{"input_ids": window[:-1], "labels": window[:-1]} for window in windows(size, steps * batch)]
        self.trainer = _timed(_trainer_class(library), self.clocks)(
            transformers.GPT2LMHeadModel(config), args, train_dataset=data, **_optimizer(library, args)
        )
        self.model = self.trainer.model

    def train(self) -> tuple[list[float], list[float]]:
        """A turn; milliseconds of its steps and of their tails."""
        for moments in (self.clocks.begin, self.clocks.after_backward, self.clocks.after_step):
            moments.clear()
        self.trainer.train()
        return self.clocks.times()

    @property
    def loss(self) -> float:
        return self.trainer.last_loss.item()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer.optimizer


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


def _timed(trainer_class: type, clocks: Clocks) -> type:
    """A subclass that marks its steps, and keeps the last loss, on the device."""
    import transformers

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clocks.mark(clocks.begin)

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clocks.mark(clocks.after_step)

    class Timed(trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[Marks()], **kwargs)
            self.remove_callback(transformers.PrinterCallback)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            clocks.mark(clocks.after_backward)
            return self.last_loss

    return Timed


class StandIn:
    """One library in a loop with the Trainer's calls; see the top of this file."""

    def __init__(self, library: str, size: Size, batch: int, nan_filter: bool, device: torch.device) -> None:
        self.size, self.nan_filter, self.clocks = size, nan_filter, Clocks(device)
        torch.manual_seed(0)
        self.model = GPT(size.context, size.width, size.layers)
        self.model.token = torch.nn.Embedding(size.vocabulary, size.width)  # GPT's own is for bytes
        torch.nn.init.normal_(self.model.token.weight, std=0.02)
        self.model.to(device)
        self.batches = windows(size, batch * (WARM_UP_STEPS + size.steps + 1)).to(device).split(batch)
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

    def train(self) -> tuple[list[float], list[float]]:
        """As ``WithTrainer.train``."""
        clocks = self.clocks = Clocks(self.clocks.device)
        device_type = clocks.device.type
        total = torch.zeros((), device=clocks.device)
        for batch in self.batches:
            clocks.mark(clocks.begin)
            with torch.autocast(device_type, torch.bfloat16):
                loss = self.model.loss(batch)
            loss.backward()
            self.last_loss = loss.detach()
            clocks.mark(clocks.after_backward)
            if self.nan_filter and (torch.isnan(self.last_loss) or torch.isinf(self.last_loss)):
                raise AssertionError(f"the loss is {loss.item()}, expected a finite one")
            total += self.last_loss
            self.tail()
            clocks.mark(clocks.after_step)
            self.scheduler.step()
            self.model.zero_grad()
        return clocks.times()

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


def measure_case(size: Size, batch: int, nan_filter: bool, device: torch.device, stand_in: bool) -> list[Row]:
    """Rows of both libraries. An error, such as too little memory, costs the library its row."""
    entries = [Measured(library) for library in LIBRARIES]
    make = StandIn if stand_in else WithTrainer
    for turn in range(size.rounds):
        for entry in entries:
            if entry.error is not None:
                continue
            try:
                if turn == 0:
                    entry.run = make(entry.library, size, batch, nan_filter, device)
                step_ms, tail_ms = entry.run.train()
            except Exception as error:
                entry.error, entry.run = f"{type(error).__name__}: {error}", None
                free_memory()
                continue
            entry.step_ms += step_ms
            entry.tail_ms += tail_ms
    rows = [_row(entry, size, batch, nan_filter, device, stand_in) for entry in entries]
    _compare(rows)
    entries.clear()
    free_memory()
    return rows


def _row(entry: Measured, size: Size, batch: int, nan_filter: bool, device: torch.device, stand_in: bool) -> Row:
    run, step = entry.run, statistics.median(entry.step_ms) if entry.step_ms else None
    failed = entry.error is not None
    return {
        "workload": f"{size.name}, batch {batch} x {size.context}" + ("" if nan_filter else ", no loss filter"),
        "optimizer": "adamw",
        "format": "fp32",
        "contract": CONTRACT,
        "library": reported_name(entry.library, device),
        "driver_loop": "stand-in" if stand_in else "transformers.Trainer",
        "params": None if failed else sum(param.numel() for param in run.model.parameters()),
        "tensors": None if failed else len(list(run.model.parameters())),
        "tokens": batch * size.context,
        **spread("step_ms", [] if failed else entry.step_ms),
        **spread("tail_ms", [] if failed else entry.tail_ms),
        "tail_share": None if failed else statistics.median(entry.tail_ms) / step,
        "tokens_per_s": None if failed else batch * size.context / step * 1e3,
        "speedup": None,
        "tail_speedup": None,
        "state_bytes": None if failed else contracts.state_bytes(run.optimizer),
        "samples": 0 if failed else len(entry.step_ms),
        "loss": None if failed else run.loss,
        "error": entry.error,
    }


def _compare(rows: list[Row]) -> None:
    """Speedups of ours; an error in the place of its figures where the two did not train alike."""
    torchs, ours = rows
    if torchs["error"] or ours["error"]:
        return
    if not abs(torchs["loss"] - ours["loss"]) <= SAME_LOSS * abs(torchs["loss"]):
        ours["error"] = f"the loss is {ours['loss']}, expected that of torch-fused, {torchs['loss']}, to within 1%"
        return
    ours["speedup"] = torchs["step_ms"] / ours["step_ms"]
    ours["tail_speedup"] = torchs["tail_ms"] / ours["tail_ms"]


def cases(size: Size) -> Iterator[tuple[int, bool]]:
    """Batch sizes, each with and without the Trainer's filter of losses."""
    for batch in size.batches:
        yield from ((batch, True), (batch, False))


def measure(device: torch.device, size: Size, stand_in: bool, deadline: float, say: Callable[[str], None]) -> Row:
    rows: list[Row] = []
    left_out: list[str] = []
    for batch, nan_filter in cases(size):
        name = f"{size.name}, batch {batch}{'' if nan_filter else ', no loss filter'}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        say(name)
        rows += measure_case(size, batch, nan_filter, device, stand_in)
    versions = {} if stand_in else {name: importlib.metadata.version(name) for name in NEEDED}
    loop = "stand-in" if stand_in else "transformers.Trainer"
    return environment(device) | {"driver_loop": loop, "library_versions": versions, "rows": rows, "left_out": left_out}


def print_table(console: Console, result: Row) -> None:
    table = Table(title=f"one fine-tuning step ({result['driver_loop']}), medians", box=None, pad_edge=False)
    table.add_column("model / library", no_wrap=True)
    for column in ("step ms", "tail ms", "tail", "tokens/s", "over torch", "tail over torch's", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    workload = None
    for row in result["rows"]:
        if row["workload"] != workload:
            workload = row["workload"]
            table.add_row(workload, style="bold")
        cells = ["failed"]
        if not row["error"]:
            cells = [f"{row['step_ms']:.2f}", f"{row['tail_ms']:.3f}", f"{100 * row['tail_share']:.1f}%"]
            cells += [f"{row['tokens_per_s']:,.0f}"]
            cells += ["-" if row[key] is None else f"{row[key]:.3f}x" for key in ("speedup", "tail_speedup")]
            cells += [f"{row['loss']:.4f}"]
        table.add_row(f"  {row['library']}", *cells)
    console.print(table)
    for row in result["rows"]:
        if row["error"]:
            console.print(f"FAILED {row['workload']} {row['library']}: {row['error']}", markup=False)
    if result["left_out"]:
        console.print(f"left out by the time limit: {'; '.join(result['left_out'])}", markup=False)


def install_wheels(folder: Path) -> None:
    """Makes the packages in the wheels of a folder importable, behind those that are installed, for this process.

    Raises:
        click.ClickException: the folder has no wheels, or pip refuses them.
    """
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise click.ClickException(f"--wheels: {folder} has no .whl files; pip download transformers accelerate -d …")
    target = tempfile.mkdtemp()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, *wheels]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise click.ClickException(f"--wheels: pip failed: {run.stderr.strip().splitlines()[-1]}")
    sys.path.append(target)
    importlib.invalidate_caches()


def missing_library() -> str | None:
    """Why the Trainer cannot be used, or None."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option("--quick", is_flag=True, help="A smoke run: a tiny model, few steps.")
@click.option("--stand-in", is_flag=True, help="The loop that stands in for the Trainer, though that is installed.")
@click.option(
    "--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Install from this folder."
)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Sequences; may be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--time-limit", type=float, default=240, show_default=True, help="Start no case after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    device_type: str,
    quick: bool,
    stand_in: bool,
    wheels: Path | None,
    batches: tuple[int, ...],
    threads: int | None,
    time_limit: float,
    path: Path | None,
) -> None:
    deadline = time.monotonic() + time_limit
    console = Console(width=None if sys.stdout.isatty() else 130)
    if threads:
        torch.set_num_threads(threads)
    if wheels:
        install_wheels(wheels)
    reason = missing_library()
    if reason and not stand_in:
        console.print(f"{reason}: measuring a loop that stands in for the Trainer (--wheels takes it from files)")
    say = lambda name: console.print(f"measuring {name}", markup=False, highlight=False)  # noqa: E731
    size = TINY if quick else GPT2
    size = replace(size, batches=batches) if batches else size
    result = measure(torch.device(device_type), size, bool(stand_in or reason), deadline, say)
    write(path, result)
    print_table(console, result)
    sys.exit(1 if any(row["error"] and row["library"].startswith("fusedopt") for row in result["rows"]) else 0)


if __name__ == "__main__":
    main()
