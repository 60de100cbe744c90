"""Measures cases: every library on the same tensors, in turns, after its results were checked. See ``Runner``."""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import accumulation, contracts, graphs, peers, timing
from .accumulation import AccumulationCase, MicroBatches, StagedTail
from .checks import check
from .contracts import Case, Tail, reported_name
from .journal import DeviceLost, Journal
from .report import Row
from .workloads import WORKLOADS, Model

WARM_UP_STEPS = 2

CACHES = (
    "wall_ms, host_ms, gpu_ms: before each step a word of every cache line of a 256 MiB device buffer is read, "
    "and for wall_ms and host_ms one of a 64 MiB host buffer written; gpu_warm_ms, gpu_span_ms: step follows step"
)

# Of device memory, beside what is counted: the copy's and the caches' buffers, kernels, the check, fragmentation.
RESERVE_BYTES = {"cuda": 4 << 30, "cpu": 1 << 28}

# Of a training step, kept by all libraries of a case together: parameters, new and pristine gradients.
SHARED_TENSORS = 3


LEAST_STEPS = {"host_steps": 2, "traced_steps": 1, "span_steps": 1}
"""Of a round, however long a step takes."""


@dataclass(frozen=True)
class Repeats:
    """How often everything is measured at most; a library has ``rounds`` turns."""

    rounds: int
    host_steps: int  # a round
    traced_steps: int  # a round, cold and warm each
    span_steps: int
    copy_bytes: int
    copies: int
    processes: int  # for the first step, with a cold and with a warm kernel cache each
    round_seconds: float = math.inf  # of a library's turn: with slow steps there are fewer

    def within_time(self, step_seconds: float) -> Repeats:
        """With as many steps a round as ``round_seconds`` are enough for, at least ``LEAST_STEPS``."""
        wanted = {name: getattr(self, name) for name in LEAST_STEPS}
        share = self.round_seconds / max(step_seconds, 1e-9) / (sum(wanted.values()) + self.traced_steps)
        if share >= 1:
            return self
        fewer = {key: min(count, max(LEAST_STEPS[key], int(count * share))) for key, count in wanted.items()}
        return replace(self, **fewer)


FULL = Repeats(
    rounds=2,
    host_steps=12,
    traced_steps=6,
    span_steps=8,
    copy_bytes=2 << 30,
    copies=15,
    processes=2,
    round_seconds=0.4,
)
FULL_CPU = Repeats(
    rounds=10, host_steps=2, traced_steps=0, span_steps=0, copy_bytes=400_000_000, copies=15, processes=2
)
QUICK = Repeats(rounds=2, host_steps=2, traced_steps=2, span_steps=2, copy_bytes=16 << 20, copies=5, processes=1)


@dataclass
class Measured:
    """One library on one case."""

    library: str
    tail: Tail | None = None
    error_ratio: float | None = None  # largest error of the check, as a fraction of what rounding allows
    error: str | None = None
    host: timing.HostTimes = field(default_factory=timing.HostTimes)
    device: timing.DeviceTimes = field(default_factory=timing.DeviceTimes)
    span_ms: list[float] = field(default_factory=list)
    span_steps: int = 0  # that ``span_ms`` are the averages of
    step_seconds: float = 0.0  # of the last step of the warm-up, new gradients included
    seconds: list[float] = field(default_factory=list)  # that each of its turns took, the preparation first
    state_bytes: int | None = None  # that the optimizer keeps between steps
    temporary_bytes: int | None = None  # that a step takes for its own time


class Runner:
    """Measures cases on one device."""

    def __init__(self, device: torch.device, repeats: Repeats, chosen: tuple[str, ...] = ()) -> None:
        """chosen: the only libraries to run, as they are reported; empty for all."""
        self.device = device
        self.repeats = repeats
        self.chosen = chosen
        self.journal = Journal()
        forget_modules()
        self.copy_gbps = [self.measure_copy()]
        self.caches = timing.Caches(device)
        if device.type == "cuda":
            timing.start_profiler(self.caches)

    def measure_copy(self) -> float:
        return timing.copy_gbps(self.device, self.repeats.copy_bytes, self.repeats.copies)

    def run(self, case: Case, model: Model, deadline: float = math.inf) -> list[Row]:
        """One row a library, measured in turns. An error costs its library the row, and nobody else.

        Libraries whose states do not fit into memory together are measured in groups, the first one in each of them.
        After ``deadline`` (``time.monotonic``) nobody of the group gets another turn but those who have had none, and
        the other groups have no rows.
        """
        free_memory()
        entries = [Measured(name) for name in self.libraries(case) if self._is_chosen(name)]
        first, done = entries[:1], []
        for number, others in enumerate(self._groups(case, entries)):
            if number and time.monotonic() > deadline:
                break
            group = self._run_group(first + others, case, model, deadline)
            first, others = group[: len(first)], group[len(first) :]
            for entry in others:
                entry.tail = None  # the next group may need the room
            done += others
            free_memory()
        for param in model.params:
            param.grad = None
        return [self._row(case, entry) for entry in first + done]

    def _groups(self, case: Case, entries: list[Measured]) -> list[list[Measured]]:
        """All but the first, in groups whose states fit into memory beside the first one's."""
        room = total_bytes(self.device) - self._shared_bytes(case)
        room -= sum(self._library_bytes(case, entry.library) for entry in entries[:1])
        groups: list[list[Measured]] = [[]]
        left = room
        for entry in entries[1:]:
            needed = self._library_bytes(case, entry.library)
            if needed > left and groups[-1]:
                groups.append([])
                left = room
            groups[-1].append(entry)
            left -= needed
        return groups

    def _run_group(self, group: list[Measured], case: Case, model: Model, deadline: float) -> list[Measured]:
        stages = [self._prepare] + [self._measure] * self.repeats.rounds
        for number, stage in enumerate(stages):
            if number > 1 and time.monotonic() > deadline:
                break
            group = [entry if entry.error else self._attempt(stage, entry, case, model) for entry in group]
        return group

    def _attempt(self, stage: Callable[..., None], entry: Measured, case: Case, model: Model) -> Measured:
        turn = str(case), reported_name(entry.library, self.device)
        if reason := self.journal.why_not(*turn):
            return Measured(entry.library, error=reason)
        with self.journal.running(*turn):
            return self._turn(stage, entry, case, model)

    def _turn(self, stage: Callable[..., None], entry: Measured, case: Case, model: Model) -> Measured:
        begin = time.monotonic()
        try:
            stage(entry, case, model)
            entry.seconds.append(time.monotonic() - begin)
            return entry
        except (Exception, SystemExit) as error:  # whatever it is, the other libraries' figures still count
            text = f"{type(error).__name__}: {error}"
        entry.tail = None
        try:
            timing.synchronize(self.device)
            free_memory()
        except RuntimeError as error:
            library = reported_name(entry.library, self.device)
            raise DeviceLost(f"the device is lost since {library} raised {text}") from error
        return Measured(entry.library, error=text)

    def _is_chosen(self, library: str) -> bool:
        return not self.chosen or reported_name(library, self.device) in self.chosen

    # What is measured; a benchmark with cases of its own overrides these.

    def libraries(self, case: Case) -> list[str]:
        if isinstance(case, AccumulationCase):
            return list(accumulation.LIBRARIES)
        return self._own(case) + peers.installed(case, self.device)

    def build(self, library: str, case: Case, model: Model) -> Tail:
        if isinstance(case, AccumulationCase):
            assert isinstance(model, MicroBatches)
            return accumulation.build(library, case, model)
        if library in graphs.LIBRARIES:
            return graphs.build(library, case, model.params)
        build = contracts.build if library in self._own(case) else peers.build
        return build(library, case, model.params)

    def _own(self, case: Case) -> list[str]:
        """The libraries that are no peers."""
        return contracts.libraries(case, self.device) + contracts.other_backends(self.device)

    def check(self, case: Case, tail: Tail, model: Model) -> float:
        if isinstance(case, AccumulationCase):
            assert isinstance(model, MicroBatches) and isinstance(tail, StagedTail)
            return accumulation.check(case, tail, model)
        return check(case, tail, model)

    def model_key(self, case: Case) -> object:
        """Cases with the same one share a model."""
        return case.workload, case.layout.dtype, isinstance(case, AccumulationCase)

    def make_model(self, case: Case) -> Model:
        cls = MicroBatches if isinstance(case, AccumulationCase) else Model
        return cls(WORKLOADS[case.workload], case.layout.dtype, self.device)

    # Memory.

    def too_large(self, case: Case) -> str | None:
        """Why the case cannot be measured here: the memory that it needs; None if it fits."""
        needed = self._shared_bytes(case) + self._library_bytes(case, "fusedopt")
        there = total_bytes(self.device)
        if needed <= there:
            return None
        return f"needs {needed / 1e9:.1f} GB of memory, {self.device.type} has {there / 1e9:.1f} GB"

    def _shared_bytes(self, case: Case) -> int:
        """Of the tensors that all libraries work on, and of one in float32 that a step takes for a while."""
        tensors = SHARED_TENSORS + (accumulation.MICRO_BATCHES - 1) * isinstance(case, AccumulationCase)
        per_param = tensors * case.layout.dtype.itemsize + torch.float32.itemsize
        return WORKLOADS[case.workload].numel * per_param + RESERVE_BYTES[self.device.type]

    def _library_bytes(self, case: Case, library: str) -> int:
        """States as fusedopt keeps them, and the gradients of a step in a CUDA graph."""
        static = case.layout.dtype.itemsize if library.endswith("-captured") else 0
        return WORKLOADS[case.workload].numel * (case.state_bytes_per_param + static)

    def _memory(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    # The stages of a library.

    def _prepare(self, entry: Measured, case: Case, model: Model) -> None:
        if entry.tail is not None:  # for an earlier group
            return
        model.reset()  # some optimizers copy the parameters when they are made
        for param in model.params:
            param.grad = None
        before = self._memory()
        tail = entry.tail = self.build(entry.library, case, model)
        entry.error_ratio = self.check(case, tail, model)
        for _ in range(WARM_UP_STEPS):
            timing.synchronize(self.device)
            begin = time.monotonic()
            tail.backward(model)
            tail()
            timing.synchronize(self.device)
            entry.step_seconds = time.monotonic() - begin
        if tail.optimizer is not None:
            self._measure_memory(entry, tail, model, before)

    def _measure_memory(self, entry: Measured, tail: Tail, model: Model, before: int) -> None:
        if self.device.type == "cuda":
            self._measure_allocated(entry, tail, model, before)
        else:
            entry.state_bytes = contracts.state_bytes(tail.optimizer)

    def _measure_allocated(self, entry: Measured, tail: Tail, model: Model, before: int) -> None:  # on a GPU alone
        tail.backward(model)
        timing.synchronize(self.device)
        given = [] if isinstance(model, MicroBatches) else model.params  # whose gradients were there before
        gradients = sum(param.grad.nbytes for param in given if param.grad is not None)
        static = sum(gradient.nbytes for gradient in tail.gradients or ())
        begin = self._memory()
        torch.cuda.reset_peak_memory_stats(self.device)
        tail()
        timing.synchronize(self.device)
        entry.temporary_bytes = torch.cuda.max_memory_allocated(self.device) - begin
        entry.state_bytes = max(0, begin - before - max(gradients, static))

    def _measure(self, entry: Measured, case: Case, model: Model) -> None:
        tail, caches, repeats = entry.tail, self.caches, self.repeats.within_time(entry.step_seconds)
        assert tail is not None, "a turn before the preparation"

        def backward() -> None:
            tail.backward(model)

        if isinstance(tail, StagedTail):
            timing.time_stages(tail.stages, tail.before, backward, caches, repeats.host_steps, entry.host)
        else:
            timing.time_host(tail, backward, caches, repeats.host_steps, entry.host)
        if self.device.type == "cuda" and self._is_traced(case):
            timing.trace_device(tail, backward, caches, repeats.traced_steps, entry.device)
            entry.span_ms.append(timing.span_ms(tail, backward, repeats.span_steps))
            entry.span_steps += repeats.span_steps

    def _is_traced(self, case: Case) -> bool:
        return True

    def _row(self, case: Case, entry: Measured) -> Row:
        cold, warm = entry.device.cold, entry.device.warm
        row = self._subject(case, entry.library)
        row |= spread("gpu_ms", [step.ms for step in cold]) | spread("gpu_warm_ms", [step.ms for step in warm])
        row |= spread("wall_ms", entry.host.wall) | spread("host_ms", entry.host.host)
        row |= {
            "gpu_span_ms": _median(entry.span_ms),
            "launches": max((step.kernels for step in cold), default=None),
            "memory_operations": max((step.memory_operations for step in cold), default=None),
            "own_launches": max((sum("fusedopt" in name for name in step.names) for step in cold), default=None),
            "state_bytes": entry.state_bytes,
            "temporary_bytes": entry.temporary_bytes,
            "peak_bytes": self._peak_bytes(case, entry),
            "samples": len(entry.host.wall),
            "traced_samples": len(cold),
            "span_steps": entry.span_steps,
            "prepare_seconds": entry.seconds[0] if entry.seconds else None,
            "measure_seconds": sum(entry.seconds[1:]) if entry.seconds else None,
            "check_error_ratio": entry.error_ratio,
            "error": entry.error,
            "skipped": None,
        }
        return row

    def _peak_bytes(self, case: Case, entry: Measured) -> int | None:
        """In a step: parameters, one set of gradients, what the optimizer keeps, what the step takes for a while."""
        if entry.state_bytes is None or entry.temporary_bytes is None:
            return None
        own = 2 * WORKLOADS[case.workload].numel * case.layout.dtype.itemsize
        return own + entry.state_bytes + entry.temporary_bytes

    def skipped_row(self, case: Case, reason: str) -> Row:
        return self._row(case, Measured("fusedopt")) | {"skipped": reason}

    def _subject(self, case: Case, library: str) -> Row:
        workload = WORKLOADS[case.workload]
        return {
            "workload": case.workload,
            "contract": case.contract,
            "optimizer": case.optimizer,
            "format": case.format,
            "library": reported_name(library, self.device),
            "params": workload.numel,
            "tensors": len(workload.shapes),
            "bytes_per_param": case.bytes_per_param,
        }


def total_bytes(device: torch.device) -> int:
    """Memory of the device; of the host's, what is free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return timing.free_bytes(device)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def spread(key: str, values: list[float]) -> Row:
    """Median, smallest and largest, and the quartiles."""
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else (_median(values),) * 3
    return {
        key: _median(values),
        f"{key}_min": min(values, default=None),
        f"{key}_max": max(values, default=None),
        f"{key}_q1": low,
        f"{key}_q3": high,
    }


def measure_cases(
    runner: Runner,
    cases: list[Case],
    deadline: float,
    progress: Progress,
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> tuple[list[Row], list[str]]:
    """Rows of all cases, and the names of those that the time limit left out, or an interrupt, which ends the run.

    ``keep`` is given the rows so far after each case.
    """
    rows: list[Row] = []
    left_out: list[str] = []
    model: Model | None = None
    subject: object = None
    task = progress.add_task("", total=len(cases))
    for case in cases:
        progress.update(task, description=str(case))
        if time.monotonic() > deadline:
            left_out.append(str(case))
        elif reason := runner.too_large(case):
            rows.append(runner.skipped_row(case, reason))
        else:
            try:
                if model is None or subject != runner.model_key(case):
                    subject, model = runner.model_key(case), None  # two models might not fit into memory
                    free_memory()
                    model = runner.make_model(case)
                rows += runner.run(case, model, deadline)
            except torch.OutOfMemoryError as error:  # of the model itself: others are using the device
                subject, model = None, None
                rows.append(runner.skipped_row(case, f"the device is too full: {str(error).splitlines()[0]}"))
            except KeyboardInterrupt:
                deadline = 0.0
                left_out.append(str(case))
            except DeviceLost as error:
                deadline = 0.0
                rows.append(runner.skipped_row(case, "") | {"error": str(error), "skipped": None})
            keep(rows)
        progress.advance(task)
    model = None
    if deadline:
        free_memory()
    return rows, left_out


def add_speedups(rows: list[Row], measured: str) -> None:
    """``over_best``: of a row of ours, how many times as long the fastest other library takes; None without others."""
    best: dict[tuple[object, ...], float] = {}
    for row in rows:
        if not str(row["library"]).startswith("fusedopt") and row[measured] is not None:
            best[_case_key(row)] = min(row[measured], best.get(_case_key(row), math.inf))
    for row in rows:
        known = str(row["library"]).startswith("fusedopt") and row[measured] and _case_key(row) in best
        row["over_best"] = best[_case_key(row)] / row[measured] if known else None


def _case_key(row: Row) -> tuple[object, ...]:
    return tuple(row[key] for key in ("workload", "optimizer", "format", "contract"))


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def forget_modules() -> None:
    """Keeps what imports have made out of garbage collections, of which each would take a tenth of a second."""
    importlib.import_module("torch._dynamo")  # else the first optimizer imports it
    gc.collect()
    gc.freeze()


def free_memory() -> None:
    """Gives back what nobody holds any more; optimizers may sit in reference cycles, and they are large."""
    gc.collect()
    torch.cuda.empty_cache()


def add_floor(rows: list[Row], copy_gbps: float, measured: str) -> None:
    """The time a row's bytes take at the bandwidth of a copy, its share of the time ``measured``, and GB/s."""
    for row in rows:
        counted = row["bytes_per_param"] is not None
        row["floor_ms"] = row["params"] * row["bytes_per_param"] / copy_gbps / 1e6 if counted else None
        known = counted and not row["error"] and row[measured] is not None
        row["efficiency"] = row["floor_ms"] / row[measured] if known else None
        row["gbps"] = row["efficiency"] * copy_gbps if known else None
