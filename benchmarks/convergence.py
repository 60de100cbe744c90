"""Trains the same GPT with every format and several seeds, and says which formats end up elsewhere than fp32.

    python benchmarks/convergence.py --device cuda --jobs 2 --json benchmarks/results/convergence-h100.json \\
        --plot docs/images/convergence.png
    python benchmarks/convergence.py --from benchmarks/results/convergence-h100.json      # table and plot again
    python benchmarks/convergence.py --device cpu --quick                                 # does it run? a tiny model

The model is the byte-level GPT of ``examples/``, on the source text of Python's standard library. Of one seed, all
formats start from the same weights (rounded to bfloat16, so that every format holds them exactly) and see the same
batches; the held-out windows are the same for all seeds. Models with fp32 parameters run under bfloat16 autocast, the
others are bfloat16 altogether, norms and residual stream included: what ``bf16 + fp32 master`` loses to ``fp32`` is the
model's doing, what a format loses to ``bf16 + fp32 master`` its own.

* ``difference``: final loss minus that of the baseline with the same seed, mean over seeds and standard deviation;
* ``spread``: standard deviation of the baseline's final loss over seeds; the verdict of a format whose mean difference
  is not larger is "within the spread", otherwise "differs";
* ``bytes/param``: parameters and optimizer, gradients aside; ``checkpoint``: size of ``torch.save(opt.state_dict())``.

A run that did not stay finite differs. Repeating a run on a GPU changes its last digits, because the backward pass of
attention adds in no fixed order.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # the model and its text

from _gpt import GPT, standard_library_text, windows
from train_gpt import BETAS, MAX_GRAD_NORM, Settings, choose_device, parameter_groups, warmup_cosine

import fusedopt
from fusedopt.bench.report import Row, environment

FULL = Settings(steps=1000, batch_size=32, context=512, width=512, layers=8, lr=1e-3)
QUICK = Settings(steps=30, batch_size=8, context=32, width=64, layers=1, lr=3e-3)

VALIDATION_WINDOWS = {FULL.context: 512, QUICK.context: 64}
EVALUATIONS = 12

RESTING_ROLES = ("param", "master", "states", "scales", "steps")

WITHIN, DIFFERS, BASELINE, UNJUDGED = "within the spread", "differs", "baseline", "not judged"


# ----------------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Format:
    """What differs between two runs of the same seed."""

    label: str
    bf16: bool = False
    """The whole model, rather than its matrix products."""
    options: dict[str, object] = field(default_factory=dict)
    """Of the optimizer."""
    lion: bool = False
    baseline: str = "fp32"
    """Whose difference is judged."""

    def optimizer(self, model: GPT, settings: Settings) -> fusedopt.FusedOptimizer:
        groups = parameter_groups(model)
        options = {"max_grad_norm": MAX_GRAD_NORM, "seed": settings.seed, **self.options}
        if not self.lion:
            return fusedopt.AdamW(groups, lr=settings.lr, betas=BETAS, **options)
        for group in groups:  # Lion's paper: a learning rate 3 to 10 times less, so much more weight decay
            group["weight_decay"] *= LION_FACTOR
        return fusedopt.Lion(groups, lr=settings.lr / LION_FACTOR, **options)


LION_FACTOR = 7

FORMATS = {
    "fp32": Format("fp32"),
    "master": Format("bf16 + fp32 master", bf16=True, options={"master_weights": "fp32"}),
    "split16": Format("bf16 + split16", bf16=True, options={"master_weights": "split16"}),
    "split8": Format("bf16 + split8", bf16=True, options={"master_weights": "split8"}),
    "stochastic": Format(
        "bf16, stochastic rounding, bf16 m, v", bf16=True, options={"stochastic_rounding": True, "state_dtype": "bf16"}
    ),
    "int8": Format("fp32, int8 m, v", options={"state_dtype": "int8"}),
    "split8-int8": Format(
        "bf16 + split8, int8 m, v", bf16=True, options={"master_weights": "split8", "state_dtype": "int8"}
    ),
    "lion": Format("Lion fp32", lion=True, baseline="lion"),
    "lion-int8": Format("Lion fp32, int8 m", lion=True, options={"state_dtype": "int8"}, baseline="lion"),
}
BF16_REFERENCE = "master"  # exact arithmetic in a bfloat16 model: what the other formats of one should reach


# ---------------------------------------------------------------------------------------------------------- training


@cache
def texts(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation text, 1-D uint8 on the device, read once a process."""
    train, validation = standard_library_text()
    return train.to(device), validation.to(device)


class Training:
    """One run. Losses stay on the device until the end, so that the host never waits."""

    def __init__(self, settings: Settings, form: Format, device: torch.device) -> None:
        self.settings, self.form, self.device = settings, form, device
        self.train_text, self.validation_text = texts(device)
        torch.manual_seed(settings.seed)
        model = GPT(settings.context, settings.width, settings.layers).to(torch.bfloat16)
        self.model = model.to(device, torch.bfloat16 if form.bf16 else torch.float32)
        self.optimizer = form.optimizer(self.model, settings)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine(settings.steps))
        self.starts = self._train_starts()
        self.validation_starts = self._validation_starts()

    def _train_starts(self) -> torch.Tensor:
        """``[steps, batch_size]`` int64, by the seed alone."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        size = (self.settings.steps, self.settings.batch_size)
        last = len(self.train_text) - self.settings.context
        return torch.randint(last, size, generator=generator).to(self.device)

    def _validation_starts(self) -> tuple[torch.Tensor, ...]:
        """Of windows spread evenly over the held-out text, in batches."""
        last = len(self.validation_text) - self.settings.context - 1
        starts = torch.linspace(0, last, VALIDATION_WINDOWS[self.settings.context], dtype=torch.float64)
        return starts.long().to(self.device).split(self.settings.batch_size)

    def loss(self, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.form.bf16):
            return self.model.loss(windows(text, starts, self.settings.context))

    @torch.no_grad()
    def validation_loss(self) -> torch.Tensor:
        losses = torch.stack([self.loss(self.validation_text, starts) for starts in self.validation_starts])
        sizes = torch.tensor([len(starts) for starts in self.validation_starts], device=self.device)
        return (losses * sizes).sum() / sizes.sum()

    def step(self, index: int) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.train_text, self.starts[index])
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()

    def run(self) -> list[tuple[int, float, float]]:
        """Curve of (step, mean training loss since the last point, validation loss)."""
        steps = self.settings.steps
        ends = sorted({max(1, steps * (k + 1) // EVALUATIONS) for k in range(EVALUATIONS)})
        points, losses = [], []
        for index in range(steps):
            losses.append(self.step(index))
            if index + 1 in ends:
                points.append((index + 1, torch.stack(losses).mean(), self.validation_loss()))
                losses = []
        return [(step, train.item(), validation.item()) for step, train, validation in points]


class ByteCounter(io.RawIOBase):
    """A file that only counts."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.size += len(data)
        return len(data)


def train(settings: Settings, name: str, device: torch.device) -> Row:
    """One run as the JSON file holds it; losses that are not finite are None."""
    start = time.perf_counter()
    training = Training(settings, FORMATS[name], device)
    curve = [(step, *map(finite, losses)) for step, *losses in training.run()]
    wall_s = time.perf_counter() - start
    checkpoint = ByteCounter()
    torch.save(training.optimizer.state_dict(), checkpoint)
    memory = training.optimizer.memory_summary()
    return {
        "format": name,
        "seed": settings.seed,
        "curve": curve,
        "final_val_loss": curve[-1][2],
        "wall_s": wall_s,
        "parameters": memory.numel,
        "bytes_per_param": {role: memory.per_param(role) for role in memory.bytes},
        "checkpoint_bytes": checkpoint.size,
        "error": None,
    }


def train_or_report(settings: Settings, name: str, device: torch.device) -> Row:
    """``train``; where it fails, a row that says so: the other runs are worth having."""
    try:
        return train(settings, name, device)
    except Exception:
        return {"format": name, "seed": settings.seed, "error": traceback.format_exc()}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- running

Work = tuple[Settings, str]


def execute(pending: list[Work], device: torch.device, jobs: int, threads: int, deadline: float) -> Iterator[Row]:
    """Rows of all runs as they finish, ``jobs`` processes at a time; leaves in ``pending`` what was not started."""
    workers = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),  # a forked process cannot use CUDA
        initializer=torch.set_num_threads,
        initargs=(threads,),
    )
    with workers:
        running = set()
        while True:
            while pending and len(running) < jobs and time.monotonic() < deadline:
                running.add(workers.submit(train_or_report, *pending.pop(0), device))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()


def measure(
    settings: Settings,
    names: list[str],
    seeds: int,
    device: torch.device,
    jobs: int,
    threads: int,
    time_limit: float,
    console: Console,
    save: Callable[[Row], None],
    earlier: Row | None = None,
) -> Row:
    """The whole result, as the JSON file holds it; ``save`` gets it after every run. Runs of ``earlier`` are kept."""
    began = time.monotonic()
    result = environment(device) | {"settings": asdict(settings), "seeds": seeds, "jobs": jobs, "runs": []}
    if earlier is not None:
        result["runs"] = kept_runs(earlier, result)
    done = {(run["seed"], run["format"]) for run in result["runs"]}
    # Seed by seed: where time runs out, the seeds that are there are there for all formats.
    pending = [
        (replace(settings, seed=seed), name) for seed in range(seeds) for name in names if (seed, name) not in done
    ]
    result["threads"] = threads
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(pending))
        for row in execute(pending, device, jobs, threads, began + time_limit):
            result["runs"].append(row)
            save(complete(result, pending, began))
            progress.advance(bar)
            progress.console.print(describe_run(row), markup=False, highlight=False)
    save(complete(result, pending, began))
    return result


def kept_runs(earlier: Row, now: Row) -> list[Row]:
    """The runs of an earlier result that did not fail, with the commit that they were made at.

    Raises:
        click.ClickException: they were made with other settings or on another device.
    """
    for key in ("device", "settings"):
        if earlier[key] != now[key]:
            raise click.ClickException(f"--resume: the file has {key} {earlier[key]}, expected {now[key]}; start anew")
    return [{"commit": earlier["commit"], **run} for run in earlier["runs"] if not run["error"]]


def complete(result: Row, pending: list[Work], began: float) -> Row:
    """``result`` with what follows from the runs so far."""
    result["left_out"] = [f"{name}, seed {settings.seed}" for settings, name in pending]
    result["wall_s"] = time.monotonic() - began
    result["summary"] = summarize(result["runs"])
    return result


def describe_run(row: Row) -> str:
    if row["error"]:
        return f"{row['format']:<12} seed {row['seed']}  FAILED: {row['error'].splitlines()[-1]}"
    return f"{row['format']:<12} seed {row['seed']}  final loss {number(row['final_val_loss'])}  {row['wall_s']:.1f} s"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


# ----------------------------------------------------------------------------------------------------------- judging


def final_losses(runs: list[Row]) -> dict[str, dict[int, float]]:
    """By format and seed, of the runs that did not fail; NaN where the loss was not finite."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["error"] is None:
            value = run["final_val_loss"]
            losses.setdefault(run["format"], {})[run["seed"]] = math.nan if value is None else value
    return losses


def spread(values: list[float]) -> float:
    """Sample standard deviation; NaN of fewer than two values, or where one is NaN."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def paired_differences(losses: dict[int, float], reference: dict[int, float]) -> dict[int, float]:
    """By seed, where both have it."""
    return {seed: losses[seed] - reference[seed] for seed in losses if seed in reference}


def verdict(mean_difference: float, baseline_spread: float) -> str:
    if math.isnan(baseline_spread):
        return UNJUDGED
    return WITHIN if abs(mean_difference) <= baseline_spread else DIFFERS  # differs if NaN


def summarize(runs: list[Row]) -> list[Row]:
    """A row for each format that has runs, in the order of ``FORMATS``; None for what there is none of."""
    losses = final_losses(runs)
    return [_summary(name, losses, runs) for name in FORMATS if name in losses]


def _summary(name: str, losses: dict[str, dict[int, float]], runs: list[Row]) -> Row:
    form, own = FORMATS[name], losses[name]
    baseline = losses.get(form.baseline, {})
    differences = paired_differences(own, baseline)
    mean_difference = statistics.fmean(differences.values()) if differences else math.nan
    baseline_spread = spread(list(baseline.values())) if differences else math.nan
    reference = losses.get(BF16_REFERENCE, {}) if form.bf16 and name != BF16_REFERENCE else {}
    from_reference = paired_differences(own, reference)
    run = next(run for run in runs if run["format"] == name and run["error"] is None)
    values = {
        "mean": statistics.fmean(own.values()),
        "spread": spread(list(own.values())),
        "mean_difference": mean_difference,
        "difference_spread": spread(list(differences.values())),
        "baseline_spread": baseline_spread,
        "difference_in_spreads": mean_difference / baseline_spread if baseline_spread else math.nan,
        "difference_from_bf16_reference": statistics.fmean(from_reference.values()) if from_reference else math.nan,
        "difference_from_bf16_reference_spread": spread(list(from_reference.values())),
    }
    return {
        "format": name,
        "label": form.label,
        "baseline": form.baseline,
        "seeds": sorted(own),
        **{key: finite(value) for key, value in values.items()},
        "differences": {str(seed): finite(value) for seed, value in sorted(differences.items())},
        "verdict": BASELINE if name == form.baseline else verdict(mean_difference, baseline_spread),
        "bytes_per_param": sum(run["bytes_per_param"][role] for role in RESTING_ROLES),
        "checkpoint_bytes": run["checkpoint_bytes"],
    }


# --------------------------------------------------------------------------------------------------------- reporting


def print_result(console: Console, result: Row) -> None:
    summary = summarize(result["runs"])
    table = Table(title="held-out loss at the end, nats per byte", box=None, pad_edge=False)
    table.add_column("format", no_wrap=True)
    for column in (
        "loss",
        "difference\nfrom baseline",
        "in\nspreads",
        "from bf16 +\nfp32 master",
        "bytes/\nparam",
        "check-\npoint MB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in summary:
        table.add_row(row["label"], *_cells(row), style="dim" if row["verdict"] == UNJUDGED else None)
    console.print(table)
    for name in dict.fromkeys(row["baseline"] for row in summary):
        base = next((row for row in summary if row["format"] == name), None)
        if base and base["spread"] is not None:
            console.print(
                f"spread of {base['label']} over {len(base['seeds'])} seeds: {base['spread']:.5f}", highlight=False
            )
    model = result["settings"]
    console.print(
        f"{result['device']}, torch {result['torch']}, {result['date']}; {parameters(result) / 1e6:.1f} M parameters, "
        f"{model['steps']} steps of {model['batch_size']} x {model['context']} bytes, {result['wall_s']:.0f} s",
        highlight=False,
    )
    for run in result["runs"]:
        if run["error"]:
            console.print(describe_run(run), markup=False, highlight=False)
    if result["left_out"]:
        console.print(f"left out by the time limit: {'; '.join(result['left_out'])}")


def parameters(result: Row) -> int:
    return next((run["parameters"] for run in result["runs"] if run["error"] is None), 0)


def _cells(row: Row) -> list[str]:
    def with_spread(value: float | None, deviation: float | None, sign: str) -> str:
        return "-" if value is None else f"{value:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    is_baseline, ratio = row["verdict"] == BASELINE, row["difference_in_spreads"]
    colour = {WITHIN: "[green]", DIFFERS: "[red]"}.get(row["verdict"], "[default]")
    return [
        "not finite" if row["mean"] is None else with_spread(row["mean"], row["spread"], ""),
        "" if is_baseline else with_spread(row["mean_difference"], row["difference_spread"], "+"),
        "" if is_baseline else "-" if ratio is None else f"{ratio:+.2f}",
        with_spread(row["difference_from_bf16_reference"], row["difference_from_bf16_reference_spread"], "+"),
        f"{row['bytes_per_param']:.2f}",
        f"{row['checkpoint_bytes'] / 1e6:.2f}",
        f"{colour}{row['verdict']}[/]",
    ]


def plot(result: Row, path: Path) -> None:
    """Left: held-out loss over the steps, mean and range over seeds. Right: the end, by seed, from the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    summary = summarize(result["runs"])
    colours = dict(zip(FORMATS, plt.get_cmap("tab10").colors))
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(3, 2), layout="constrained")
    zoom = curves.inset_axes((0.42, 0.4, 0.56, 0.57))
    for row in summary:
        for axes in (curves, zoom):
            _plot_curve(axes, row, result["runs"], colours[row["format"]])
    _zoom_into_end(zoom, summary, result)
    curves.indicate_inset_zoom(zoom, edgecolor="0.4")
    curves.set(xlabel="step", ylabel="held-out loss, nats per byte")
    curves.set_title(f"{parameters(result) / 1e6:.1f} M parameters, Python source, {result['device']}")
    curves.grid(alpha=0.3)
    zoom.grid(alpha=0.3)
    _plot_ends(ends, summary, final_losses(result["runs"]), colours)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_curve(axes, row: Row, runs: list[Row], colour) -> None:
    by_step: dict[int, list[float]] = {}
    for run in runs:
        if run["format"] == row["format"] and run["error"] is None:
            for step, _, validation in run["curve"]:
                by_step.setdefault(step, []).append(math.nan if validation is None else validation)
    steps, values = list(by_step), list(by_step.values())
    style = "--" if FORMATS[row["format"]].lion else "-"
    axes.plot(steps, list(map(statistics.fmean, values)), style, color=colour, linewidth=1.3, label=row["label"])
    axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.06, linewidth=0)


def _zoom_into_end(axes, summary: list[Row], result: Row) -> None:
    """To the last fifth of the steps, and to the losses there of the runs that went well."""
    first_step = result["settings"]["steps"] * 0.8
    best = min((row["mean"] for row in summary if row["mean"] is not None), default=math.nan)
    losses = [
        validation
        for run in result["runs"]
        if run["error"] is None
        for step, _, validation in run["curve"]
        if step >= first_step and validation is not None and validation < 1.2 * best
    ]
    if losses:
        margin = 0.05 * (max(losses) - min(losses)) + 1e-4
        axes.set(xlim=(first_step, result["settings"]["steps"]), ylim=(min(losses) - margin, max(losses) + margin))
    axes.tick_params(labelsize=8)


def _plot_ends(axes, summary: list[Row], losses: dict[str, dict[int, float]], colours: dict) -> None:
    means = {row["format"]: row["mean"] for row in summary}
    for position, row in enumerate(summary):
        zero, deviation = means.get(row["baseline"]), row["baseline_spread"]
        if zero is None:
            continue
        if deviation is not None:
            axes.fill_betweenx([position - 0.5, position + 0.5], -deviation, deviation, color="0.88", linewidth=0)
        values = [value - zero for value in losses[row["format"]].values()]
        axes.plot(values, [position] * len(values), "o", color=colours[row["format"]], alpha=0.8, markersize=7)
        axes.plot([statistics.fmean(values)], [position], "|", color="black", markersize=18, markeredgewidth=1.5)
    axes.axvline(0, color="0.5", linewidth=0.8)
    labels = [f"{row['label']}\n{number(row['mean'])}, {row['verdict']}" for row in summary]
    axes.set_yticks(range(len(summary)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("final loss minus the mean of its fp32 baseline, nats per byte")
    axes.set_title("Dots: seeds. Bar: mean. Grey: ± spread of the baseline", fontsize=10)
    axes.grid(alpha=0.3, axis="x")


# ----------------------------------------------------------------------------------------------------------- command


@click.command(help=__doc__.split("\n")[0], context_settings={"show_default": True})
@click.option("--device", "device_type", type=click.Choice(["auto", "cuda", "cpu"]), default="auto")
@click.option("--quick", is_flag=True, help="A smoke run: a tiny model, two seeds.")
@click.option("--format", "names", type=click.Choice(list(FORMATS)), multiple=True, help="May be repeated; else all.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many; default 3, with --quick 2.")
@click.option("--steps", type=click.IntRange(min=1), help=f"Default {FULL.steps}, with --quick {QUICK.steps}.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Runs at a time, each in a process of its own.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of a run; default: torch's, shared by the jobs."
)
@click.option("--time-limit", type=float, default=480, help="Start no run after so many seconds.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
@click.option("--resume", is_flag=True, help="Keep the runs that the JSON file has, and do those that it lacks.")
@click.option("--plot", "image", type=click.Path(path_type=Path, dir_okay=False), help="Write curves here, as PNG.")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Run nothing, read this JSON.",
)
def main(
    device_type: str,
    quick: bool,
    names: tuple[str, ...],
    seeds: int | None,
    steps: int | None,
    jobs: int,
    threads: int | None,
    time_limit: float,
    path: Path | None,
    resume: bool,
    image: Path | None,
    source: Path | None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    if source:
        result = json.loads(source.read_text())
    else:
        settings = QUICK if quick else FULL
        settings = replace(settings, steps=steps or settings.steps)
        chosen = [name for name in FORMATS if not names or name in names]
        result = measure(
            settings,
            chosen,
            seeds or (2 if quick else 3),
            choose_device(device_type),
            jobs,
            threads or max(1, torch.get_num_threads() // jobs),
            time_limit,
            console,
            lambda row: write(path, row),
            json.loads(path.read_text()) if resume and path and path.exists() else None,
        )
    print_result(console, result)
    if image and final_losses(result["runs"]):
        plot(result, image)
    if any(run["error"] for run in result["runs"]):
        sys.exit(1)


def write(path: Path | None, result: Row) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
