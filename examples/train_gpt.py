"""Train the same small GPT with torch's AdamW and with fusedopt's, and put the two side by side.

The text is the source of Python's standard library, so nothing is downloaded. Every run starts from the same seed and
sees the same batches; only the step tail (clip to a global norm of 1, then update) differs:

    torch       torch.nn.utils.clip_grad_norm_(...); torch.optim.AdamW(..., fused=True).step()
    fusedopt    fusedopt.AdamW(..., max_grad_norm=1.0).step()
    yardstick   as torch, with foreach=True in place of fused=True, and clipped to two float32 ulps more than 1

Training amplifies the last bits of a float, bfloat16 activations above all: two correct optimizers drift apart. The
yardstick, torch against itself with nothing but rounding changed, says how far. If the losses of fusedopt differ by
much more than that, the table's last line says so.

    python examples/train_gpt.py --out demo_out
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import matplotlib
import torch
from _gpt import GPT, HEAD_DIM, standard_library_text, windows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import fusedopt

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
WARMUP_FRACTION = 0.1  # of the steps, while the learning rate rises
FINAL_LR_FRACTION = 0.1  # of the peak, at the end of the cosine
UNTIMED_STEPS = 5  # the first ones allocate states and compile kernels
PROFILED_STEPS = 3
VALIDATION_BATCHES = 16
# How many times the yardstick's drift still counts as rounding. In tiny float32 trainings of several seeds, optimizers
# that differ by rounding stayed within 3; a left-out weight decay or clip, or a tenfold eps, exceeded 70.
DRIFT_FACTOR = 10.0


@dataclass(frozen=True)
class Settings:
    steps: int
    batch_size: int
    context: int
    width: int
    layers: int
    lr: float
    seed: int = 0


PRESETS = {
    "cpu": Settings(steps=400, batch_size=8, context=128, width=128, layers=5, lr=1e-3),
    "cuda": Settings(steps=600, batch_size=64, context=512, width=576, layers=8, lr=1e-3),
}


@dataclass(frozen=True)
class Task:
    """What every run shares: the text on the device, and where its batches start, ``[batches, batch_size]`` int64."""

    settings: Settings
    device: torch.device
    train: Tensor
    validation: Tensor
    train_starts: Tensor
    validation_starts: Tensor

    @classmethod
    def create(cls, settings: Settings, device: torch.device) -> "Task":
        generator = torch.Generator().manual_seed(settings.seed)

        def starts(text: Tensor, batches: int) -> Tensor:
            size = (batches, settings.batch_size)
            return torch.randint(len(text) - settings.context, size, generator=generator).to(device)

        train, validation = standard_library_text()
        return cls(
            settings=settings,
            device=device,
            train=train.to(device),
            validation=validation.to(device),
            train_starts=starts(train, settings.steps),
            validation_starts=starts(validation, VALIDATION_BATCHES),
        )

    def new_model(self) -> GPT:
        torch.manual_seed(self.settings.seed)
        return GPT(self.settings.context, self.settings.width, self.settings.layers).to(self.device)

    def loss(self, model: GPT, text: Tensor, starts: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model.loss(windows(text, starts, self.settings.context))

    @torch.no_grad()
    def validation_loss(self, model: GPT) -> float:
        losses = [self.loss(model, self.validation, starts) for starts in self.validation_starts]
        return torch.stack(losses).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: an optimizer, and the step tail it needs between backward() and the next forward.

Tail = Callable[[], None]


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay for matrices and embeddings, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def torch_tail(
    model: nn.Module, lr: float, max_norm: float, **implementation: bool
) -> tuple[torch.optim.Optimizer, Tail]:
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=lr, betas=BETAS, **implementation)
    parameters = list(model.parameters())

    def tail() -> None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return optimizer, tail


def torch_fused(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, Tail]:
    return torch_tail(model, lr, MAX_GRAD_NORM, fused=True)


def torch_yardstick(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, Tail]:
    ulp = torch.finfo(torch.float32).eps * MAX_GRAD_NORM
    return torch_tail(model, lr, MAX_GRAD_NORM + 2 * ulp, foreach=True)


def fusedopt_adamw(model: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, Tail]:
    optimizer = fusedopt.AdamW(parameter_groups(model), lr=lr, betas=BETAS, max_grad_norm=MAX_GRAD_NORM)

    def tail() -> None:
        optimizer.step()

    return optimizer, tail


CONTENDERS = {"torch": torch_fused, "fusedopt": fusedopt_adamw, "yardstick": torch_yardstick}


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: linear warmup, then half a cosine to ``FINAL_LR_FRACTION``."""
    warmup = max(1, round(steps * WARMUP_FRACTION))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


# ---------------------------------------------------------------------------------------------------------------------
# Measuring, without ever making the training loop wait for the device.


class StepClock:
    """Times steps and their tails: wall time on a CPU, the stream's time between CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple] = []  # of each step: its start, its tail's start, its end
        self._finished = 0

    def now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, start, tail_start, end) -> None:
        self._marks.append((start, tail_start, end))

    def finished(self) -> int:
        """How many steps the device has finished; the host may be many steps ahead of a GPU."""
        if not self._on_gpu:
            return len(self._marks)
        while self._finished < len(self._marks) and self._marks[self._finished][-1].query():
            self._finished += 1
        return self._finished

    def step_ms(self, step: int) -> float:
        start, _, end = self._marks[step]
        return self._elapsed_ms(start, end)

    def tail_ms(self, step: int) -> float:
        _, tail_start, end = self._marks[step]
        return self._elapsed_ms(tail_start, end)

    def _elapsed_ms(self, start, end) -> float:
        return start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3


def kernels_per_step(tail: Tail) -> float | None:
    """CUDA kernels that one tail launches, as the profiler records them; None if it records none at all."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            tail()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = sum(event.get("cat") == "kernel" for event in events)
    return kernels / PROFILED_STEPS or None


@dataclass(frozen=True)
class Run:
    """The outcome of one training. Losses in nats per byte, times are medians."""

    name: str
    losses: list[float]
    train_loss: float  # mean of the last tenth of the steps: one batch alone is noisy
    validation_loss: float
    tail_ms: float
    step_ms: float
    tokens_per_s: float
    kernels_per_step: float | None  # on a GPU
    parameters: list[Tensor]


class Training:
    def __init__(self, task: Task, name: str, progress: Progress) -> None:
        self.task = task
        self.name = name
        self.model = task.new_model()
        self.optimizer, self.tail = CONTENDERS[name](self.model, task.settings.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine(task.settings.steps))
        self.clock = StepClock(task.device)
        self.losses = torch.full((task.settings.steps,), math.nan, pin_memory=task.device.type == "cuda")
        self.progress = progress
        self.bar = progress.add_task(name, total=task.settings.steps, loss=math.nan, speed=math.nan)

    def step(self, index: int) -> None:
        task, clock = self.task, self.clock
        start = clock.now()
        self.optimizer.zero_grad()
        loss = task.loss(self.model, task.train, task.train_starts[index])
        loss.backward()
        self.losses[index].copy_(loss.detach(), non_blocking=True)
        tail_start = clock.now()
        self.tail()
        clock.add(start, tail_start, clock.now())
        self.scheduler.step()
        self.show_progress()

    def show_progress(self) -> None:
        """What has finished by now: asking for the newest loss would make the host wait for it."""
        if finished := self.clock.finished():
            latest = finished - 1
            speed = 1e3 / self.clock.step_ms(latest)
            self.progress.update(self.bar, completed=finished, loss=self.losses[latest].item(), speed=speed)

    def finish(self) -> Run:
        settings, on_gpu = self.task.settings, self.task.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        self.show_progress()
        timed = range(UNTIMED_STEPS, settings.steps)
        step_ms = statistics.median(map(self.clock.step_ms, timed))
        return Run(
            name=self.name,
            losses=self.losses.tolist(),
            train_loss=self.losses[-(settings.steps // 10) :].mean().item(),
            validation_loss=self.task.validation_loss(self.model),
            tail_ms=statistics.median(map(self.clock.tail_ms, timed)),
            step_ms=step_ms,
            tokens_per_s=settings.batch_size * settings.context / step_ms * 1e3,
            parameters=[p.detach().clone() for p in self.model.parameters()],
            kernels_per_step=kernels_per_step(self.tail) if on_gpu else None,  # last: the profiled steps train on
        )


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:5.1f} it/s"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def train_all(task: Task, console: Console) -> dict[str, Run]:
    """Every contender takes its step in turn, so that whatever else the machine does slows all of them alike."""
    with progress_bars(console) as progress:
        trainings = [Training(task, name, progress) for name in CONTENDERS]
        for index in range(task.settings.steps):
            for training in trainings:
                training.step(index)
        return {training.name: training.finish() for training in trainings}


# ---------------------------------------------------------------------------------------------------------------------
# Comparing.


@dataclass(frozen=True)
class Comparison:
    """How far a run is from the baseline run."""

    loss_differences: list[float]  # |loss - baseline loss| of every step
    largest_loss_difference: float
    largest_parameter_difference: float

    @classmethod
    def between(cls, run: Run, baseline: Run) -> "Comparison":
        losses = (
            torch.tensor(run.losses, dtype=torch.float64) - torch.tensor(baseline.losses, dtype=torch.float64)
        ).abs()
        pairs = zip(run.parameters, baseline.parameters, strict=True)
        parameters = torch.stack([(a - b).abs().max() for a, b in pairs])
        return cls(losses.tolist(), losses.max().item(), parameters.max().item())


def rounding_bound(baseline: Run, yardstick: Comparison) -> float:
    """Largest loss difference that rounding explains: a multiple of the yardstick's, or of a float32 ulp if larger."""
    ulp = torch.finfo(torch.float32).eps * baseline.losses[0]
    return DRIFT_FACTOR * max(yardstick.largest_loss_difference, ulp)


@dataclass(frozen=True)
class Report:
    settings: Settings
    device: str
    on_gpu: bool
    runs: dict[str, Run]
    comparisons: dict[str, Comparison]
    rounding_bound: float
    within_rounding: bool

    @classmethod
    def create(cls, settings: Settings, device: torch.device, runs: dict[str, Run]) -> "Report":
        baseline = runs["torch"]
        comparisons = {name: Comparison.between(run, baseline) for name, run in runs.items() if run is not baseline}
        bound = rounding_bound(baseline, comparisons["yardstick"])
        within = comparisons["fusedopt"].largest_loss_difference <= bound  # False for NaN as well
        return cls(settings, describe(device), device.type == "cuda", runs, comparisons, bound, within)

    def as_json(self) -> dict:
        def numbers(run: Run) -> dict:
            compared = self.comparisons.get(run.name)
            return {
                **{key: value for key, value in vars(run).items() if key not in ("name", "parameters")},
                "largest_loss_difference": compared.largest_loss_difference if compared else 0.0,
                "largest_parameter_difference": compared.largest_parameter_difference if compared else 0.0,
            }

        return {
            "torch": torch.__version__,
            "fusedopt": fusedopt.__version__,
            "device": self.device,
            "settings": asdict(self.settings),
            "parameters": sum(p.numel() for p in self.runs["torch"].parameters),
            "runs": {name: numbers(run) for name, run in self.runs.items()},
            "rounding_bound": self.rounding_bound,
            "within_rounding": self.within_rounding,
        }


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def print_report(report: Report, console: Console) -> None:
    runs, comparisons = report.runs.values(), report.comparisons

    def compared(attribute: str) -> list[str]:
        return ["" if run.name == "torch" else f"{getattr(comparisons[run.name], attribute):.2e}" for run in runs]

    table = Table(title="One GPT, one seed, the same batches", title_style="bold")
    table.add_column("")
    for header in ("torch\nfused", "fusedopt\nAdamW", "yardstick:\ntorch foreach"):
        table.add_column(header, justify="right")
    table.add_row("final training loss, nats/byte", *(f"{run.train_loss:.6f}" for run in runs))
    table.add_row("validation loss, nats/byte", *(f"{run.validation_loss:.6f}" for run in runs))
    table.add_row("largest loss difference", *compared("largest_loss_difference"))
    table.add_row("largest parameter difference", *compared("largest_parameter_difference"), end_section=True)
    table.add_row("step tail (clip + update), ms", *(f"{run.tail_ms:.3f}" for run in runs))
    if report.on_gpu:
        table.add_row("  CUDA kernels in it", *(str(run.kernels_per_step or "not recorded") for run in runs))
    table.add_row("whole training step, ms", *(f"{run.step_ms:.2f}" for run in runs))
    table.add_row("tokens (bytes) per second", *(f"{run.tokens_per_s:,.0f}" for run in runs))
    console.print(table)
    timer = "time between CUDA events, idle gaps included" if report.on_gpu else "wall time"
    console.print(
        f"Medians of the {timer}, without the first {UNTIMED_STEPS} steps. The three took their steps in turn, one "
        f"after another, on the same machine ({report.device}); whatever else it was doing is in the times."
    )
    drift = comparisons["fusedopt"].largest_loss_difference
    if report.within_rounding:
        console.print(
            f"Same training: the losses differ by at most {drift:.1e}, as rounding explains "
            f"(up to {report.rounding_bound:.1e}).",
            style="bold green",
        )
    else:
        console.print(
            f"NOT THE SAME TRAINING: the losses differ by up to {drift:.1e}; rounding explains up to "
            f"{report.rounding_bound:.1e} ({DRIFT_FACTOR:.0f} times the yardstick's).",
            style="bold red",
        )


def plot(report: Report, path: Path) -> None:
    runs = report.runs
    steps = range(1, report.settings.steps + 1)
    figure, (curves, drift) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    curves.plot(
        steps, runs["torch"].losses, color="#f2a65a", linewidth=4, label="torch: clip_grad_norm_ + AdamW(fused=True)"
    )
    curves.plot(steps, runs["fusedopt"].losses, color="#1d3557", linewidth=1, label="fusedopt: AdamW(max_grad_norm=1)")
    curves.set_ylabel("training loss (nats per byte)")
    curves.set_title(f"Byte-level GPT on the Python standard library ({report.device})")
    curves.legend()
    for name, label, style in (
        ("yardstick", "yardstick against torch fused: rounding alone", {"color": "#f2a65a", "markersize": 7}),
        ("fusedopt", "fusedopt against torch fused", {"color": "#1d3557", "markersize": 3}),
    ):
        differences = report.comparisons[name].loss_differences
        label += f" (zero at {differences.count(0.0)} of {len(differences)} steps)"  # which a log axis cannot show
        drift.plot(steps, differences, "o", markeredgewidth=0, label=label, **style)
    drift.axhline(report.rounding_bound, color="#c1121f", linestyle="--", label="above: more than rounding explains")
    drift.set_yscale("log")
    low, high = drift.get_ylim()
    drift.set_ylim(low / 2, high * 30)  # room for the legend
    drift.set_ylabel("difference in loss")
    drift.set_xlabel("step")
    drift.legend(loc="upper right")
    for axes in (curves, drift):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device here; use cpu", param_hint="--device")
    return torch.device(name)


@click.command(help=__doc__.split("\n")[0], context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="demo_out", help="folder of the results"
)
@click.option("--seed", type=int, default=0)
@click.option("--steps", type=click.IntRange(min=2 * UNTIMED_STEPS), help="default: by device, as all below")
@click.option("--batch-size", type=click.IntRange(min=1), help="sequences a step")
@click.option("--context", type=click.IntRange(min=2), help="bytes a sequence")
@click.option("--width", type=click.IntRange(min=HEAD_DIM), help=f"a multiple of {HEAD_DIM}")
@click.option("--layers", type=click.IntRange(min=1))
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="peak learning rate")
def main(device: str, out: Path, **options) -> None:
    device = choose_device(device)
    settings = replace(PRESETS[device.type], **{key: value for key, value in options.items() if value is not None})
    if settings.width % HEAD_DIM:
        raise click.BadParameter(f"got {settings.width}; use a multiple of {HEAD_DIM}", param_hint="--width")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    task = Task.create(settings, device)
    console.print(
        f"{sum(p.numel() for p in task.new_model().parameters()) / 1e6:.2f} M parameters, "
        f"{len(task.train) / 1e6:.1f} MB of Python to train on, {len(task.validation) / 1e6:.1f} MB held out, "
        f"{settings.steps} steps of {settings.batch_size} x {settings.context} bytes; {describe(device)}"
    )
    report = Report.create(settings, device, train_all(task, console))
    print_report(report, console)
    (out / "train_gpt.json").write_text(json.dumps(report.as_json(), indent=1))
    plot(report, out / "train_gpt.png")
    console.print(f"Wrote {out / 'train_gpt.json'} and {out / 'train_gpt.png'}")


if __name__ == "__main__":
    main()
