"""Times clip + step of a model under FSDP2 (``fully_shard``), after real backward passes, beside torch's.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py --json benchmarks/results/fsdp-2xh200.json
    torchrun --nproc-per-node 2 benchmarks/fsdp.py --device cpu --quick

Models are chains of linear layers, wrapped by ``fully_shard`` in runs of 50: every parameter becomes a DTensor, half of
whose rows lie in each of two processes. Libraries, in turns, on the same parameters:

* ``fusedopt``: ``AdamW(max_grad_norm=1.0).step()``;
* ``torch-fused``: ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW(fused=True)``;
* ``torch-foreach``, where it is asked for: the same with ``foreach=True``, torch's default on GPUs;
* ``all-reduce``: ``torch.distributed.all_reduce`` of two numbers alone, which is part of every tail that clips.

Reported are medians for each process:

* ``host_ms``, ``wall_ms``: host clock from the call until it returns, and until the device is done. Before it the
  backward pass is through, the device idle, and all processes leave a barrier with nothing more to do: what one enters
  late the other one waits for. Caches are as training leaves them;
* ``repeated``: whether steps were made like the one before, without Python for each tensor;
* ``gpu_ms``: kernels, copies and fills of a tail, as CUPTI timed them, without those of NCCL, of which ``nccl_ms`` is
  the time, waiting for other processes included; ``launches``, ``collectives``: how many of each;
* ``floor_ms``: 32 bytes of each parameter of this process at the bandwidth of a copy in the same run;
  ``efficiency``: the floor's share of ``gpu_ms``;
* ``check_norm``, ``check_params``: relative difference of the norm, and largest difference of a parameter in units of
  the learning rate, from torch's after one step with the same gradients.

Rows are printed, and the file is written, whenever a library has been through a round: a run that is cut short, by
``--time-limit`` or from outside, leaves what it has measured.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter_ns

import click
import torch
from rich.console import Console
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt
from benchmarks.goals import FSDP_CASE, FSDP_GOALS, judge_ranks
from fusedopt.bench import timing
from fusedopt.bench.report import Row, environment

MAX_NORM = 1.0
OPTIONS = {"lr": 1e-3, "weight_decay": 1e-2}
BYTES_PER_PARAM = 32  # parameter and two moments read and written, the gradient read twice
LAYERS_PER_GROUP = 50
ROWS = 8  # of a batch
WARM_UP_STEPS = 2  # of each library, one of which is its check


@dataclass(frozen=True)
class Workload:
    """A chain of linear layers with biases."""

    name: str
    layers: int
    width: int

    @property
    def numel(self) -> int:
        return self.layers * self.width * (self.width + 1)


WORKLOADS = {
    each.name: each
    for each in (Workload("1000-dtensors", 500, 64), Workload("1.3B", 20, 8192), Workload("quick", 6, 16))
}


@dataclass(frozen=True)
class Repeats:
    rounds: int
    host_steps: int
    """A round."""
    traced_steps: int
    """In the first round."""
    copy_bytes: int


FULL = Repeats(rounds=5, host_steps=5, traced_steps=5, copy_bytes=2 << 30)
QUICK = Repeats(rounds=1, host_steps=2, traced_steps=2, copy_bytes=16 << 20)


class Chain(nn.Module):
    """Residual layers: gradients neither vanish nor explode."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Linear(workload.width, workload.width, device=device) for _ in range(workload.layers)
        )
        self.register_buffer("x", torch.randn(ROWS, workload.width, device=device), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # without arguments torch 2.11's fully_shard raises
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x.square().mean()


def sharded_model(workload: Workload, device: torch.device) -> Chain:
    model = Chain(workload, device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for start in range(0, workload.layers, LAYERS_PER_GROUP):
        fully_shard(list(model.layers[start : start + LAYERS_PER_GROUP]), mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ---------------------------------------------------------------------------------------------------------- libraries


Tail = Callable[[], Callable[[], torch.Tensor]]
"""Clips and steps; returns what tells the norm before clipping."""


@dataclass
class Entry:
    """One library on one model, and what was measured."""

    library: str
    tail: Tail
    repeats: Callable[[], bool] | None = None
    """Makes a step like the one before, or says that it would take another way."""
    repeated: bool | None = None
    host_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    steps: list[TracedStep] = field(default_factory=list)
    check_norm: float | None = None
    check_params: float | None = None


@dataclass
class TracedStep:
    """The device work of one tail."""

    gpu_ms: float = 0.0
    nccl_ms: float = 0.0
    launches: int = 0
    collectives: int = 0


def fusedopt_entry(params: list[nn.Parameter]) -> Entry:
    opt = fusedopt.AdamW(params, max_grad_norm=MAX_NORM, **OPTIONS)

    def tail() -> Callable[[], torch.Tensor]:
        opt.step()
        return lambda: opt.grad_norm

    return Entry("fusedopt", tail, lambda: opt._plan.repetition.run(opt.__dict__))


def torch_entry(library: str, params: list[nn.Parameter], **implementation: bool) -> Entry:
    opt = torch.optim.AdamW(params, **implementation, **OPTIONS)

    def tail() -> Callable[[], torch.Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()
        return lambda: norm.full_tensor()

    return Entry(library, tail)


LIBRARIES = {
    "torch-fused": lambda params: torch_entry("torch-fused", params, fused=True),
    "torch-foreach": lambda params: torch_entry("torch-foreach", params, foreach=True),
    "fusedopt": fusedopt_entry,
}
DEFAULT_LIBRARIES = ("torch-fused", "fusedopt")
"""The first one is what the others are compared with."""


def all_reduce_entry(device: torch.device) -> Entry:
    sums = torch.zeros(2, dtype=torch.float64, device=device)

    def tail() -> Callable[[], torch.Tensor]:
        distributed.all_reduce(sums)
        return lambda: sums

    return Entry("all-reduce", tail)


# -------------------------------------------------------------------------------------------------------- measurement


def backward(model: Chain, device: torch.device) -> None:
    """New gradients; then all processes wait for one another."""
    model.zero_grad(set_to_none=True)
    model(model.x).backward()
    timing.synchronize(device)
    distributed.barrier()
    timing.synchronize(device)


def local_params(model: nn.Module) -> list[torch.Tensor]:
    return [param.to_local().detach() for param in model.parameters()]


def check(entries: list[Entry], model: Chain, device: torch.device) -> None:
    """One step of each library from the same parameters."""
    start = [param.clone() for param in local_params(model)]
    norms, ends = [], []
    for entry in entries:
        backward(model, device)
        norms.append(float(entry.tail()()))
        ends.append([param.clone() for param in local_params(model)])
        for param, value in zip(local_params(model), start):
            param.copy_(value)
    for entry, norm, end in zip(entries, norms, ends):
        entry.check_norm = abs(norm - norms[0]) / norms[0]
        differences = [float((a - b).abs().max()) for a, b in zip(end, ends[0]) if a.numel()]
        entry.check_params = max(differences, default=0.0) / OPTIONS["lr"]


def time_tails(entry: Entry, model: Chain, device: torch.device, repeats: int) -> None:
    with timing.no_garbage_collection():  # collects first: milliseconds, not as many in every process
        for _ in range(repeats):
            backward(model, device)
            begin = perf_counter_ns()
            entry.tail()
            end = perf_counter_ns()
            timing.synchronize(device)
            done = perf_counter_ns()
            entry.host_ms.append((end - begin) / timing.NS_PER_MS)
            entry.wall_ms.append((done - begin) / timing.NS_PER_MS)
    if entry.repeats is not None:
        backward(model, device)
        entry.repeated = entry.repeats()
        if not entry.repeated:
            entry.tail()  # which the other processes may wait for


def trace_tails(entry: Entry, model: Chain, caches: timing.Caches, repeats: int) -> None:
    """Cold steps, all over the gradients of one backward pass."""
    backward(model, caches.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            caches.evict_device()
            entry.tail()
        timing.synchronize(caches.device)
    steps = split_steps(timing.trace_events(prof))
    if len(steps) != repeats:
        raise RuntimeError(f"trace_tails: the profiler recorded {len(steps)} of {repeats} steps; is CUPTI usable?")
    entry.steps += steps


def split_steps(events: list[dict]) -> list[TracedStep]:
    """As ``timing.split_steps``, with NCCL's kernels apart."""
    work = [event for event in events if event.get("cat") in (timing.KERNEL, *timing.MEMORY_OPERATIONS)]
    steps: list[TracedStep] = []
    for event in sorted(work, key=lambda event: float(event["ts"])):
        ms = float(event["dur"]) / timing.US_PER_MS
        if timing.MARKER in event["name"]:
            steps.append(TracedStep())
        elif steps and "nccl" in event["name"].lower():
            steps[-1].nccl_ms += ms
            steps[-1].collectives += 1
        elif steps:
            steps[-1].gpu_ms += ms
            steps[-1].launches += event["cat"] == timing.KERNEL
    return steps


def measure(
    workload: Workload,
    device: torch.device,
    repeats: Repeats,
    tell: Callable[[Row], None] = lambda row: None,
    deadline: float = math.inf,
    libraries: Sequence[str] = DEFAULT_LIBRARIES,
) -> list[Row]:
    """Rows of this process.

    tell: called by all processes with each row that is new, or of more samples than before. deadline: of
    ``time.monotonic``; rounds that would begin later are left out, but for the first one.
    """
    progress(f"{workload.name}: sharding the model")
    model = sharded_model(workload, device)
    params = list(model.parameters())
    if not all(isinstance(param, DTensor) for param in params):
        raise RuntimeError("benchmarks/fsdp.py: fully_shard left a parameter that is no DTensor")
    caches = timing.Caches(device)
    if device.type == "cuda":
        timing.start_profiler(caches)
    gbps = timing.copy_gbps(device, repeats.copy_bytes, 15, sharing(device))
    entries = [LIBRARIES[library](params) for library in libraries]
    progress(f"{workload.name}: one step of each library, to compare them")
    check(entries, model, device)
    entries.append(all_reduce_entry(device))
    rows: dict[str, Row] = {}
    for entry in entries * repeats.rounds:
        is_new = entry.library not in rows
        if not is_new and is_over(deadline, device):
            break
        if is_new:
            warm_up(entry, model, device)
        time_tails(entry, model, device, repeats.host_steps)
        if device.type == "cuda" and not entry.steps:
            trace_tails(entry, model, caches, repeats.traced_steps)
        rows[entry.library] = row_of(entry, workload, params, gbps, device)
        tell(rows[entry.library])
    return list(rows.values())


def sharing(device: torch.device) -> int:
    """Processes that share this one's memory: those of its host, but GPUs belong to one each."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))


def too_large(workload: Workload, device: torch.device, libraries: int) -> str | None:
    """Why a workload cannot be measured, the same in all processes: the memory that those of a host need; None if it
    fits.

    Each has the whole model before it is sharded; then parts of parameters and gradients and, of each library, two
    moments and a copy of the parameters.
    """
    parts = torch.float32.itemsize * workload.numel * sharing(device) // distributed.get_world_size()
    whole = torch.float32.itemsize * workload.numel * sharing(device)
    needed, there = max(whole, (3 + 3 * libraries) * parts), timing.free_bytes(device)
    answer = [f"needs {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are free" if needed > there else None]
    distributed.broadcast_object_list(answer, device=device)
    return answer[0]


def warm_up(entry: Entry, model: Chain, device: torch.device) -> None:
    for _ in range(WARM_UP_STEPS - 1):
        backward(model, device)
        entry.tail()


def progress(line: str) -> None:
    if distributed.get_rank() == 0:
        click.echo(line, err=True)


def is_over(deadline: float, device: torch.device) -> bool:
    """By the clock of the first process, for all."""
    over = torch.tensor([float(monotonic() > deadline)], device=device)
    distributed.broadcast(over, src=0)
    return bool(over)


def row_of(entry: Entry, workload: Workload, params: list[DTensor], gbps: float, device: torch.device) -> Row:
    own = sum(param.to_local().numel() for param in params)
    floor = BYTES_PER_PARAM * own / gbps / 1e6
    gpu = _median([step.gpu_ms for step in entry.steps])
    optimizer, layout, contract = FSDP_CASE.split("/")
    return {
        "workload": workload.name,
        "optimizer": optimizer,
        "format": layout,
        "contract": contract,
        "library": f"{entry.library}-{device.type}" if entry.library == "fusedopt" else entry.library,
        "rank": distributed.get_rank(),
        "world_size": distributed.get_world_size(),
        "tensors": len(params),
        "params": sum(param.numel() for param in params),
        "params_of_this_process": own,
        "bytes_per_param": BYTES_PER_PARAM,
        "copy_gbps": gbps,
        "host_ms": _median(entry.host_ms),
        "host_ms_min": min(entry.host_ms),
        "host_ms_max": max(entry.host_ms),
        "wall_ms": _median(entry.wall_ms),
        "wall_ms_min": min(entry.wall_ms),
        "wall_ms_max": max(entry.wall_ms),
        "gpu_ms": gpu,
        "nccl_ms": _median([step.nccl_ms for step in entry.steps]),
        "launches": max((step.launches for step in entry.steps), default=None),
        "collectives": max((step.collectives for step in entry.steps), default=None),
        "floor_ms": floor,
        "efficiency": floor / gpu if gpu else None,
        "repeated": entry.repeated,
        "samples": len(entry.host_ms),
        "traced_samples": len(entry.steps),
        "check_norm": entry.check_norm,
        "check_params": entry.check_params,
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def gather(own: list[Row]) -> list[Row]:
    everyone: list[list[Row]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, own)
    return [row for rows in everyone for row in rows]


def start(device_type: str) -> torch.device:
    """Joins the processes that torchrun has started."""
    if "RANK" not in os.environ:
        raise click.ClickException("started alone, expected torchrun --nproc-per-node N benchmarks/fsdp.py")
    if device_type == "cpu":
        torch.set_num_threads(1)
        distributed.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl")
    return device


@click.command(help=__doc__.partition("\n")[0], context_settings={"show_default": True})
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--workload", "names", multiple=True, type=click.Choice(list(WORKLOADS)), help="Default: all but quick.")
@click.option("--quick", is_flag=True, help="A small model, few steps.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Where every figure is written.")
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Choice(list(LIBRARIES)),
    default=DEFAULT_LIBRARIES,
    help="The first one is what the others are compared with.",
)
@click.option("--time-limit", type=float, default=45, help="Seconds after which no further round begins.")
def main(
    device: str, names: tuple[str, ...], quick: bool, path: Path | None, libraries: tuple[str, ...], time_limit: float
) -> None:
    names = names or (("quick",) if quick else ("1000-dtensors", "1.3B"))
    begin = monotonic()
    report = Report(start(device), path)
    for i, name in enumerate(names, 1):
        deadline = begin + time_limit * i / len(names)  # each workload its share, and what those before it have left
        if is_over(deadline, report.device):
            continue
        if reason := too_large(WORKLOADS[name], report.device, len(libraries)):
            report.skip(name, reason)
        else:
            measure(WORKLOADS[name], report.device, QUICK if quick else FULL, report.add, deadline, libraries)
        gc.collect()
    report.finish(completely=monotonic() < begin + time_limit)
    distributed.barrier()
    distributed.destroy_process_group()


class Report:
    """What the first process tells of all."""

    def __init__(self, device: torch.device, path: Path | None) -> None:
        self.device, self.path = device, path
        self._rows: dict[tuple, Row] = {}
        self._skipped: dict[str, str] = {}
        self._console = Console()
        self._is_first = distributed.get_rank() == 0

    def add(self, own: Row) -> None:
        """A row of this process, in place of the one of fewer samples; called by all of them."""
        for row in gather([own]):
            self._rows[row["workload"], row["library"], row["rank"]] = row
            figures = {key: row[key] for key in ("host_ms", "wall_ms", "gpu_ms", "nccl_ms", "floor_ms", "launches")}
            told = "  ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None)
            self._print(f"{row['workload']}  rank {row['rank']}  {row['library']:<14} {told}, {row['samples']} samples")
        self._write(finished=False)

    def skip(self, workload: str, reason: str) -> None:
        self._skipped[workload] = reason
        self._print(f"skipped {workload}: {reason}")
        self._write(finished=False)

    def finish(self, completely: bool) -> None:
        for goal in self._goals():
            if goal["value"] is not None:
                self._print(f"{goal['name']}: {goal['value']:.4g} {goal['relation']} {goal['bound']}")
        self._write(finished=completely)

    def _goals(self) -> list[Row]:
        return judge_ranks(FSDP_GOALS, list(self._rows.values()))

    def _print(self, line: str) -> None:
        if self._is_first:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _write(self, finished: bool) -> None:
        """At once, so that there is never half a file."""
        if not self._is_first or self.path is None:
            return
        content = environment(self.device) | {"world_size": distributed.get_world_size(), "finished": finished}
        content |= {"skipped": self._skipped, "goals": self._goals(), "rows": list(self._rows.values())}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(content, indent=2) + "\n")
        new.replace(self.path)


if __name__ == "__main__":
    main()
