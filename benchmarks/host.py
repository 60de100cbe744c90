"""Host time of a step right after a real backward pass, in a process that does nothing else.

    python benchmarks/host.py --device cuda --workload 1000-small --json host.json

Each library gets a fresh process: it makes a model with the tensors of the workload (GPT-2 of torch's own modules, or a
chain of small linear layers), trains it with ``zero_grad(set_to_none=True)``, and reads the clock around the tail when
``loss.backward()`` is through and the device is idle. Caches and heap are as training leaves them; nothing is evicted.

Contracts: ``step_after_backward`` is ``opt.step()``; ``clip_step_after_backward`` clips the total norm to 1.0 too
(torch: ``clip_grad_norm_``). Libraries: ``fusedopt``, ``torch-fused``, ``torch-foreach``. After the timing, the same
tail is checked against the float64 reference on the same parameters, and of ours the phases of a step are timed
(``phases_us``).

Processes are forked from one that has imported everything and has not touched the device yet.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns

import click
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

import fusedopt.optim.plan
from fusedopt import passes
from fusedopt.bench import contracts
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import MAX_NORM, Case, Params, Tail, torch_optimizer, torch_tail
from fusedopt.bench.report import Row, environment, write
from fusedopt.bench.timing import NS_PER_MS, synchronize
from fusedopt.bench.workloads import WORKLOADS, BorrowedModel

LIBRARIES = ("fusedopt", "torch-fused", "torch-foreach")
CONTRACTS = {"step": "step_after_backward", "clip_step": "clip_step_after_backward"}
"""By the contract of ``benchmarks/contracts.py`` that the tail fulfils."""

WARM_UP_STEPS = 3
MANY_TENSORS = 5000  # a backward pass of so many takes long: fewer steps, one contract
STEPS, STEPS_OF_MANY, QUICK_STEPS = 30, 10, 3
CHILD_SECONDS, EXIT_SECONDS = 60, 10

NS_PER_US = 1e3


def foreach_tail(case: Case, params: Params) -> Tail:
    """torch's default on CUDA: ``AdamW(foreach=True)``."""
    opt = torch_optimizer(case, params, foreach=True)

    def run() -> None:
        if case.clips:
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        opt.step()

    return torch_tail(opt, run, clips=case.clips)


def build(library: str, case: Case, params: Params) -> Tail:
    """The tail of one of ``LIBRARIES``."""
    return foreach_tail(case, params) if library == "torch-foreach" else contracts.build(library, case, params)


# ------------------------------------------------------------------------------------------------------------ models


class Chain(nn.Module):
    """x + layer(x) / depth, again and again: two tensors a layer."""

    def __init__(self, pairs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(pairs))
        self.width = width

    def loss(self) -> torch.Tensor:
        device = self.layers[0].weight.device
        x = torch.randn(8, self.width, device=device)
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return x.square().mean()


class GPT2(nn.Module):
    """Of torch's own modules, whose tensors are those of GPT-2 one for one."""

    def __init__(self, width: int, layers: int, vocab: int, context: int) -> None:
        super().__init__()
        self.vocab, self.context = vocab, min(context, 64)
        self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def loss(self) -> torch.Tensor:
        device = self.token.weight.device
        tokens = torch.randint(self.vocab, (1, self.context + 1), device=device)
        positions = torch.arange(self.context, device=device)
        hidden = self.blocks(self.token(tokens[:, :-1]) + self.position(positions))
        logits = nn.functional.linear(hidden, self.token.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-124M": functools.partial(GPT2, width=768, layers=12, vocab=50257, context=1024),
    "1000-small": functools.partial(Chain, pairs=500, width=64),
    "10000-small": functools.partial(Chain, pairs=5000, width=64),
    "10000-small-10-groups": functools.partial(Chain, pairs=5000, width=64),
    "tiny": functools.partial(GPT2, width=64, layers=2, vocab=256, context=64),
    "tiny-4-groups": functools.partial(Chain, pairs=10, width=16),
}
"""By workload: a model with tensors of its shapes."""


# ------------------------------------------------------------------------------------------------------------ timing


def time_training(model: nn.Module, tail: Tail, device: torch.device, steps: int) -> list[float]:
    """Milliseconds of each tail, until the call returns."""
    times = []
    for step in range(WARM_UP_STEPS + steps):
        tail.optimizer.zero_grad(set_to_none=True)
        model.loss().backward()
        synchronize(device)
        start = perf_counter_ns()
        tail()
        if step >= WARM_UP_STEPS:
            times.append((perf_counter_ns() - start) / NS_PER_MS)
    synchronize(device)
    return times


def measure_contract(library: str, case: Case, device: torch.device, steps: int) -> Row:
    """One library and contract, in a process of its own."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[case.workload]()
    params = list(model.parameters())
    tail = build(library, case, params)
    times = time_training(model, tail, device, steps)
    if not all(bool(param.isfinite().all()) for param in params):
        raise AssertionError(f"{case}: {library}: a parameter is not finite after {len(times)} steps")
    phases = phase_times(model, tail, device, min(steps, STEPS_OF_MANY)) if library == "fusedopt" else None
    del tail
    error_ratio = check(case, build(library, case, params), BorrowedModel(params))
    return {
        "params": sum(param.numel() for param in params),
        "tensors": len(params),
        "host_ms": statistics.median(times),
        "host_ms_min": min(times),
        "host_ms_max": max(times),
        "samples": len(times),
        "check_error_ratio": error_ratio,
        "phases_us": phases,
    }


# What a step of ours calls, by phase. Names of internals: a phase that is not found is counted as "rest".
PHASES = {
    "refresh": (fusedopt.optim.plan.OptimizerPlan, "refresh"),
    "scalars": (passes, "begin"),
    "norm": (passes, "norm"),
    "update": (passes, "run_update"),
    "versions": (fusedopt.optim.plan.OptimizerPlan, "bump_versions"),
}


@contextmanager
def watched_phases(spent: dict[str, int]) -> Iterator[None]:
    """Adds the nanoseconds of every phase to ``spent``."""

    def watch(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            start = perf_counter_ns()
            result = function(*args, **kwargs)
            spent[name] += perf_counter_ns() - start
            return result

        return timed

    found = {name: (owner, key) for name, (owner, key) in PHASES.items() if hasattr(owner, key)}
    originals = {name: getattr(owner, key) for name, (owner, key) in found.items()}
    for name, (owner, key) in found.items():
        setattr(owner, key, watch(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, key) in found.items():
            setattr(owner, key, originals[name])


def phase_times(model: nn.Module, tail: Tail, device: torch.device, steps: int) -> Row:
    """Median microseconds of each phase; the clocks in between cost some tenths of one.

    Of the long way, which a hook makes every step take: on a GPU a step that is like the one before is one call.
    """
    tail.optimizer.register_step_pre_hook(lambda *_: None)
    spent: dict[str, int] = dict.fromkeys(PHASES, 0)
    steps_spent: list[dict[str, float]] = []
    with watched_phases(spent):
        for _ in range(steps):
            spent.update(dict.fromkeys(PHASES, 0))
            total = time_training_once(model, tail, device)
            one = {name: nanoseconds / NS_PER_US for name, nanoseconds in spent.items()}
            steps_spent.append(one | {"rest": total / NS_PER_US - sum(one.values())})
    return {name: statistics.median(one[name] for one in steps_spent) for name in steps_spent[0]}


def time_training_once(model: nn.Module, tail: Tail, device: torch.device) -> int:
    """Nanoseconds of one tail."""
    tail.optimizer.zero_grad(set_to_none=True)
    model.loss().backward()
    synchronize(device)
    start = perf_counter_ns()
    tail()
    return perf_counter_ns() - start


# --------------------------------------------------------------------------------------------------------- processes


def steps_of(workload: str, quick: bool) -> int:
    many = len(WORKLOADS[workload].shapes) > MANY_TENSORS
    return QUICK_STEPS if quick else STEPS_OF_MANY if many else STEPS


def contracts_of(workload: str) -> dict[str, str]:
    many = len(WORKLOADS[workload].shapes) > MANY_TENSORS
    return {key: name for key, name in CONTRACTS.items() if key == "clip_step" or not many}


def _report(connection: Connection, library: str, case: Case, device: torch.device, steps: int) -> None:
    try:
        row = measure_contract(library, case, device, steps) | {"error": None}
    except Exception as error:  # the other rows still count
        row = {"error": f"{type(error).__name__}: {error}"}
    connection.send(row)


def in_fresh_process(library: str, case: Case, device: torch.device, steps: int) -> Row:
    """What ``measure_contract`` returns in a process of its own, with "error"."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, library, case, device, steps))
    process.start()
    there.close()
    try:
        row = here.recv() if here.poll(CHILD_SECONDS) else {"error": f"no answer within {CHILD_SECONDS} s"}
    except EOFError:
        row = {"error": "the process ended without an answer"}
    process.join(EXIT_SECONDS)
    process.kill()
    process.join()
    return row


def described(row: Row) -> str:
    """A line or two for people."""
    figures = row["error"] or f"{row['host_ms']:.4f} ms ({row['host_ms_min']:.4f} to {row['host_ms_max']:.4f})"
    text = f"{row['workload']} {row['contract']} {row['library']}: {figures}"
    if row.get("phases_us"):
        text += "\n  " + ", ".join(f"{name} {us:.1f}" for name, us in row["phases_us"].items()) + " us"
    return text


def measure_here(
    workloads: Iterable[str], device: torch.device, quick: bool, libraries: Iterable[str] = LIBRARIES
) -> Iterator[Row]:
    """Rows of all workloads, contracts and libraries; this process must not have used the device."""
    for workload in workloads:
        for contract, name in contracts_of(workload).items():
            case = Case(workload, "adamw", "fp32", contract)
            for library in libraries:
                row = in_fresh_process(library, case, device, steps_of(workload, quick))
                row = {"workload": workload, "contract": name, "library": library} | row
                print(described(row), file=sys.stderr, flush=True)
                yield row


def measure(
    workloads: Sequence[str],
    device: torch.device,
    quick: bool,
    libraries: Sequence[str] = LIBRARIES,
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The same by way of a fresh Python process, which tells of each row on the standard error stream.

    keep: called with all rows so far whenever there is one more, so that they outlive an interrupt.

    Raises:
        RuntimeError: it failed.
    """
    chosen = [argument for workload in workloads for argument in ("--workload", workload)]
    chosen += [argument for library in libraries for argument in ("--library", library)]
    command = [sys.executable, __file__, "--device", device.type, *chosen, "--child", *["--quick"] * quick]
    rows: list[Row] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            rows.append(json.loads(line))
            keep(rows)
    if child.returncode:
        raise RuntimeError(f"host.measure: exit status {child.returncode} from {' '.join(command)}")
    return rows


@click.command(help=__doc__.split("\n")[0])
@click.option("--device", "device_type", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--workload", "workloads", type=click.Choice(list(MODELS)), multiple=True, default=["1000-small"])
@click.option("--library", "libraries", type=click.Choice(LIBRARIES), multiple=True, default=LIBRARIES)
@click.option("--quick", is_flag=True, help="Few steps.")
@click.option("--json", "path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
@click.option("--child", is_flag=True, hidden=True)
def main(
    device_type: str,
    workloads: tuple[str, ...],
    libraries: tuple[str, ...],
    quick: bool,
    path: Path | None,
    child: bool,
) -> None:
    device = torch.device(device_type)
    if child:
        for row in measure_here(workloads, device, quick, libraries):
            print(json.dumps(row), flush=True)
        return
    facts = environment(device)
    measure(workloads, device, quick, libraries, lambda rows: write(path, facts | {"rows": rows}))


if __name__ == "__main__":
    main()
