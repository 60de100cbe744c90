"""Train all 8 billion parameters of a Llama-3-8B-shaped model on one 80 GB GPU.

Random weights, the source of Python's standard library as text, nothing downloaded. torch.optim.AdamW takes 16 bytes
per parameter, 128 GB, before the first activation. Here bfloat16 parameters and gradients take 2 each, the other 8 bits
of 24-bit master weights 1, and both 8-bit moments 2:

    fusedopt.AdamW(parameters, master_weights="split8", state_dtype="int8", max_grad_norm=1.0)

Blocks are computed again in the backward pass (activation checkpointing), logits exist for 1,024 tokens at a time. With
--release-gradients each parameter is updated, and its gradient freed, in the backward pass; no norm is known then, so
nothing is clipped.

    python examples/train_8b_one_gpu.py --json train_8b.json
    python examples/train_8b_one_gpu.py --release-gradients --json train_8b_release.json
    python examples/train_8b_one_gpu.py --size tiny --device cpu       # the same code in seconds
"""

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from _gpt import standard_library_text, windows
from _llama import LLAMA_3_8B, TINY, Llama, Shape, Tokenizer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from train_gpt import StepClock, choose_device, describe

import fusedopt

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 4
LAST_STEPS = 3  # whose mean loss is compared with the first loss
UNTIMED_STEPS = 2  # the first ones make the states, load kernels and fill the allocator's pools


@dataclass(frozen=True)
class Settings:
    shape: Shape
    batch_size: int
    context: int
    steps: int
    lr: float
    text_bytes: int
    seed: int = 0
    release_gradients: bool = False


SIZES = {
    "8b": Settings(LLAMA_3_8B, batch_size=4, context=2048, steps=16, lr=1e-4, text_bytes=1 << 24),
    "tiny": Settings(TINY, batch_size=4, context=64, steps=20, lr=4e-3, text_bytes=1 << 18),
}

# Bytes per parameter that torch.optim.AdamW takes, by the roles of opt.memory_summary(). Beside bfloat16 parameters its
# float32 masters want float32 gradients too; they are left out, since a careful loop can make them one by one.
TORCH_NEEDS = {
    "float32": {"param": 4, "grad": 4, "states": 8},
    "bf16 + fp32 master": {"param": 2, "grad": 2, "master": 4, "states": 8},
}
ROLES = {
    "param": "parameters",
    "grad": "gradients",
    "master": "master weights",
    "states": "moments",
    "scales": "scales of the moments",
    "steps": "step counters",
    "main_grad": "main gradients",
    "tables": "tables of the optimizer",
}


@dataclass(frozen=True)
class Peak:
    """Largest sums of bytes allocated on the GPU: in the first step, which makes the states, and after it."""

    first_step: int
    later_steps: int

    @property
    def overall(self) -> int:
        return max(self.first_step, self.later_steps)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]  # nats per token
    grad_norms: list[float]  # none where gradients are released
    step_ms: float  # medians
    tail_ms: float
    first_tail_ms: float
    bytes_by_role: dict[str, int]
    numel: int
    peak: Peak | None  # None on a CPU

    @property
    def falls(self) -> bool:
        return statistics.mean(self.losses[-LAST_STEPS:]) < self.losses[0]  # False for NaN as well

    @property
    def activations(self) -> int | None:
        """Bytes by which the later steps' peak exceeds what the parameters and their optimizer take."""
        return None if self.peak is None else self.peak.later_steps - sum(self.bytes_by_role.values())


class Training:
    def __init__(self, settings: Settings, tokens: Tensor, device: torch.device) -> None:
        self.settings, self.tokens, self.device = settings, tokens, device
        self.model = Llama.create(settings.shape, device, torch.bfloat16, settings.seed)
        # The largest first: making the state of a tensor takes temporary memory, and at first there is most left.
        matrices = sorted((p for p in self.model.parameters() if p.dim() >= 2), key=Tensor.numel, reverse=True)
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = fusedopt.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=None if settings.release_gradients else MAX_GRAD_NORM,
            master_weights="split8",
            state_dtype="int8",
            seed=settings.seed,
        )
        if settings.release_gradients:
            self.optimizer.release_gradients(self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
        )
        self.clock = StepClock(device)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def step(self) -> tuple[float, float | None]:
        """Loss before the step, and the gradients' norm, which nobody knows if they are released."""
        start = self.clock.now()
        self.optimizer.zero_grad()
        loss = self.model.loss(self.next_batch())
        loss.backward()
        tail_start = self.clock.now()
        self.optimizer.step()
        self.clock.add(start, tail_start, self.clock.now())
        self.scheduler.step()
        return loss.item(), None if self.settings.release_gradients else self.optimizer.grad_norm.item()

    def next_batch(self) -> Tensor:
        """``[batch_size, context + 1]`` int64."""
        size = (self.settings.batch_size,)
        starts = torch.randint(len(self.tokens) - self.settings.context, size, generator=self.generator)
        return windows(self.tokens, starts.to(self.device), self.settings.context)

    def run(self, console: Console) -> Outcome:
        losses, grad_norms, peaks = [], [], []
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            for step in progress.track(range(self.settings.steps)):
                loss, grad_norm = self.step()
                losses.append(loss)
                grad_norms += [] if grad_norm is None else [grad_norm]
                step_ms, tail_ms = self.clock.step_ms(step), self.clock.tail_ms(step)
                progress.console.print(
                    f"step {step + 1:2}  loss {loss:7.4f}  "
                    + ("" if grad_norm is None else f"gradient norm {grad_norm:8.3f}  ")
                    + f"{self.tokens_per_second(step_ms):9,.0f} tokens/s  step tail {tail_ms:8.2f} ms",
                    highlight=False,
                )
                if step in (0, self.settings.steps - 1):
                    peaks.append(self.take_peak())
        timed = range(UNTIMED_STEPS, self.settings.steps)
        summary = self.optimizer.memory_summary()  # gradients are still there
        return Outcome(
            losses=losses,
            grad_norms=grad_norms,
            step_ms=statistics.median(map(self.clock.step_ms, timed)),
            tail_ms=statistics.median(map(self.clock.tail_ms, timed)),
            first_tail_ms=self.clock.tail_ms(0),
            bytes_by_role=dict(summary.bytes),
            numel=summary.numel,
            peak=Peak(*peaks) if self.device.type == "cuda" else None,
        )

    def tokens_per_second(self, step_ms: float) -> float:
        return self.settings.batch_size * self.settings.context / step_ms * 1e3

    def take_peak(self) -> int:
        """Bytes of the peak since the last call; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


# ---------------------------------------------------------------------------------------------------------------------


def memory_table(outcome: Outcome) -> Table:
    """Bytes by role, ours as measured, torch's as its bytes per parameter say."""
    needed = list(TORCH_NEEDS.values())
    unit, divisor = ("GB", 1e9) if outcome.numel >= 1e9 else ("MB", 1e6)
    table = Table(title=f"Memory of {outcome.numel:,} parameters, {unit}", title_style="bold")
    table.add_column("", no_wrap=True)
    for header in (
        "fusedopt\nsplit8 + int8",
        "bytes per\nparameter",
        *(f"torch AdamW\n{name}" for name in TORCH_NEEDS),
    ):
        table.add_column(header, justify="right", no_wrap=True)

    def row(name: str, ours: int, theirs: list[str], **style) -> None:
        table.add_row(name, f"{ours / divisor:.2f}", f"{ours / outcome.numel:.3f}", *theirs, **style)

    for role, name in ROLES.items():
        ours, bytes_each = outcome.bytes_by_role.get(role, 0), [needs.get(role) for needs in needed]
        if ours or any(bytes_each):
            row(name, ours, ["" if each is None else f"{outcome.numel * each / divisor:.2f}" for each in bytes_each])
    totals = [f"{outcome.numel * sum(needs.values()) / divisor:.2f}" for needs in needed]
    row("sum", sum(outcome.bytes_by_role.values()), totals, style="bold")
    if outcome.peak is not None:
        row("activations and temporaries", outcome.activations, ["as many"] * len(needed))
        row("peak of the later steps", outcome.peak.later_steps, [], style="bold")
        row("peak of the first step", outcome.peak.first_step, [])
    return table


def print_report(training: Training, outcome: Outcome, build_s: float, console: Console) -> None:
    console.print(memory_table(outcome))
    if outcome.peak is not None:
        available = torch.cuda.get_device_properties(training.device).total_memory
        reserved = torch.cuda.max_memory_reserved(training.device)
        console.print(
            f"{describe(training.device)} has {available / 1e9:.2f} GB, of which torch's allocator took "
            f"{reserved / 1e9:.2f} GB."
        )
    console.print(
        f"Built in {build_s:.1f} s. Medians from step {UNTIMED_STEPS + 1} on: {outcome.step_ms:,.1f} ms a step, "
        f"{training.tokens_per_second(outcome.step_ms):,.0f} tokens/s; norm, clip and update {outcome.tail_ms:.2f} ms "
        f"({outcome.first_tail_ms:,.0f} ms in the first step, which makes the states)."
    )
    first, last = outcome.losses[0], statistics.mean(outcome.losses[-LAST_STEPS:])
    uniform = math.log(training.settings.shape.vocabulary)
    verdict, style = ("The loss falls", "bold green") if outcome.falls else ("THE LOSS DOES NOT FALL", "bold red")
    console.print(
        f"{verdict}: {first:.3f} nats per token at first (ln of the vocabulary: {uniform:.3f}), {last:.3f} in the mean "
        f"of the last {LAST_STEPS} of {len(outcome.losses)} steps.",
        style=style,
    )


def as_json(training: Training, outcome: Outcome, build_s: float) -> dict:
    on_gpu = training.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "device": describe(training.device),
        "device_bytes": torch.cuda.get_device_properties(training.device).total_memory if on_gpu else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(training.device) if on_gpu else None,
        "settings": asdict(training.settings),
        "parameters": outcome.numel,
        "build_s": build_s,
        "tokens_per_s": training.tokens_per_second(outcome.step_ms),
        **asdict(outcome),
        "activation_bytes": outcome.activations,
        "torch_needs_bytes": {
            name: {role: outcome.numel * need for role, need in needs.items()} for name, needs in TORCH_NEEDS.items()
        },
        "loss_falls": outcome.falls,
    }


@click.command(help=__doc__.split("\n")[0], context_settings={"show_default": True})
@click.option("--size", type=click.Choice(list(SIZES)), default="8b")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--steps", type=click.IntRange(min=UNTIMED_STEPS + LAST_STEPS), help="default: by size, as all below")
@click.option("--batch-size", type=click.IntRange(min=1), help="sequences a step")
@click.option("--context", type=click.IntRange(min=2), help="tokens a sequence")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="learning rate after the warmup")
@click.option("--seed", type=int)
@click.option("--release-gradients", is_flag=True, help="update in the backward pass, without clipping")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="write the results here")
def main(size: str, device: str, path: Path | None, **options) -> None:
    changes = {key: value for key, value in options.items() if value is not None}
    settings = Settings(**{**vars(SIZES[size]), **changes})
    console = Console(width=None if sys.stdout.isatty() else 120)
    began = time.perf_counter()
    device = choose_device(device)
    with console.status("reading the text"):
        text = standard_library_text()[0][: settings.text_bytes].numpy().tobytes()
        tokens = Tokenizer(text, settings.shape.vocabulary).encode(text).to(device)
    training = Training(settings, tokens, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    build_s = time.perf_counter() - began
    console.print(
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters in bfloat16; "
        f"{len(text) / 1e6:.1f} MB of Python are {len(tokens):,} tokens, {len(tokens.unique()):,} of "
        f"{settings.shape.vocabulary:,} different ones; {settings.steps} steps of {settings.batch_size} x "
        f"{settings.context} tokens; {describe(device)}"
    )
    outcome = training.run(console)
    print_report(training, outcome, build_s, console)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_json(training, outcome, build_s), indent=1) + "\n")
    if not outcome.falls:
        sys.exit(1)


if __name__ == "__main__":
    main()
