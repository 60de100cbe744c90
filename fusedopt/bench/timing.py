"""How a step tail is timed: kernel time from CUPTI, host and wall time from the host's clock, copy bandwidth."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

NS_PER_MS = 1e6
US_PER_MS = 1e3
BYTES_PER_MIB = 1 << 20

# Larger than the second-level cache of any GPU and of any core that runs the host code.
DEVICE_EVICTION_BYTES = 256 * BYTES_PER_MIB
HOST_EVICTION_BYTES = 64 * BYTES_PER_MIB
CACHE_LINE_BYTES = {"cuda": 128, "cpu": 64}

# Of the free memory, for the arrays of all processes that measure its bandwidth at once.
COPY_SHARE = 0.25

# Name of the kernel that goes before each step of a trace and tells steps apart. No optimizer uses it.
MARKER = "bitwise_not"

# Categories of device work in a Chrome trace. Not gpu_user_annotation: it spans kernels and would count them twice.
KERNEL, MEMORY_OPERATIONS = "kernel", ("gpu_memcpy", "gpu_memset")

Step = Callable[[], object]

Event = dict[str, Any]
"""Of a Chrome trace."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_clock(device: torch.device) -> Moment:
    """A point in the device's time; called with a later one it returns milliseconds, once the device is done."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Moment(event.elapsed_time, event)
    now = perf_counter_ns()
    return Moment(lambda later: (later - now) / NS_PER_MS, now)


@dataclass(frozen=True)
class Moment:
    """Of one device, in its own units."""

    until: Callable[[Any], float]
    at: Any

    def __call__(self, later: Moment) -> float:
        return self.until(later.at)


class Caches:
    """Empties the caches of host and device, so that a step meets memory as it is after a backward pass elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = np.zeros((HOST_EVICTION_BYTES // CACHE_LINE_BYTES["cpu"], CACHE_LINE_BYTES["cpu"]), np.uint8)
        if device.type == "cuda":
            lines = DEVICE_EVICTION_BYTES // CACHE_LINE_BYTES["cuda"]
            self.lines = torch.zeros((lines, CACHE_LINE_BYTES["cuda"] // 4), dtype=torch.int32, device=device)
            self.sink = torch.empty(lines, dtype=torch.int32, device=device)

    def evict_host(self) -> None:
        self.host[:, 0] += 1

    def evict_device(self) -> None:
        """Touches every cache line of a large buffer: a marker kernel too.

        It reads them: had it written them, they would be written back to memory while the timed step runs. Of the
        lines it leaves in the cache, one in 33 is of its small output.
        """
        if self.device.type == "cuda":
            torch.bitwise_not(self.lines[:, 0], out=self.sink)

    def mark(self) -> None:  # on a GPU alone
        """A marker kernel which leaves the cache alone."""
        torch.bitwise_not(self.sink[:1], out=self.sink[:1])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class HostTimes:
    """Per step, milliseconds on the host's clock."""

    host: list[float] = field(default_factory=list)  # until the call returns
    wall: list[float] = field(default_factory=list)  # until the device is done


def time_host(step: Step, prepare: Step, caches: Caches, repeats: int, times: HostTimes) -> None:
    """Adds ``repeats`` single steps to ``times``, each with new gradients, cold caches and an idle device."""
    time_stages([step], lambda _: None, prepare, caches, repeats, times)


def time_stages(
    stages: Sequence[Step],
    before: Callable[[int], object],
    prepare: Step,
    caches: Caches,
    repeats: int,
    times: HostTimes,
) -> None:
    """As ``time_host`` for a step in stages: ``before``, called with each one's number, counts in ``wall`` alone."""
    with no_garbage_collection():
        for _ in range(repeats):
            prepare()
            caches.evict_device()
            synchronize(caches.device)
            caches.evict_host()
            spent = 0
            begin = perf_counter_ns()
            for number, stage in enumerate(stages):
                before(number)
                start = perf_counter_ns()
                stage()
                spent += perf_counter_ns() - start
            synchronize(caches.device)
            times.host.append(spent / NS_PER_MS)
            times.wall.append((perf_counter_ns() - begin) / NS_PER_MS)


@dataclass
class DeviceStep:
    """The device work of one step."""

    ms: float = 0.0  # in which kernels, copies and fills ran: gaps are not in it, and where two overlap it counts once
    kernels: int = 0
    memory_operations: int = 0
    names: list[str] = field(default_factory=list)  # of the kernels


def device_work(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """Kernels, copies and fills of a Chrome trace in their order, each with the µs of it that none before it covers.

    A kernel may begin while the one before it runs (programmatic dependent launch), to wait for its end.
    """
    work = [event for event in events if event.get("cat") == KERNEL or event.get("cat") in MEMORY_OPERATIONS]
    end = -math.inf
    for event in sorted(work, key=lambda event: float(event["ts"])):
        begin, duration = float(event["ts"]), float(event["dur"])
        yield event, max(0.0, duration - max(0.0, end - begin))
        end = max(end, begin + duration)


def split_steps(events: list[Event]) -> list[DeviceStep]:
    """Device work between the markers of a Chrome trace; what precedes the first marker belongs to no step."""
    steps: list[DeviceStep] = []
    for event, us in device_work(events):
        if MARKER in event["name"]:
            steps.append(DeviceStep())
        elif steps:
            steps[-1].ms += us / US_PER_MS
            if event["cat"] == KERNEL:
                steps[-1].kernels += 1
                steps[-1].names.append(event["name"])
            steps[-1].memory_operations += event["cat"] in MEMORY_OPERATIONS
    return steps


def trace_events(prof: torch.profiler.profile) -> list[Event]:
    """The events of a finished profile, by way of its Chrome trace: a form that is alike in all torch versions."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        prof.export_chrome_trace(path)
        with open(path, encoding="utf-8", errors="replace") as file:
            events: list[Event] = json.loads(file.read(), strict=False)["traceEvents"]
            return events  # kernel names may hold control characters


@dataclass
class DeviceTimes:
    """Device work of the steps with an evicted second-level cache, and of those which follow one another directly."""

    cold: list[DeviceStep] = field(default_factory=list)
    warm: list[DeviceStep] = field(default_factory=list)


def trace_device(step: Step, prepare: Step, caches: Caches, repeats: int, times: DeviceTimes) -> None:  # on a GPU alone
    """Adds ``repeats`` cold and as many warm steps to ``times``, all over one set of new gradients.

    Raises:
        RuntimeError: the profiler saw other than the expected number of steps.
    """
    prepare()
    synchronize(caches.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for before in [caches.evict_device] * repeats + [caches.mark] * repeats:
            before()
            step()
        synchronize(caches.device)
    steps = split_steps(trace_events(prof))
    if len(steps) != 2 * repeats or not all(one.kernels for one in steps):
        raise RuntimeError(f"trace_device: the profiler recorded {len(steps)} of {2 * repeats} steps; is CUPTI usable?")
    times.cold += steps[:repeats]
    times.warm += steps[repeats:]


def start_profiler(caches: Caches) -> None:  # on a GPU alone
    """A session for nothing: the first one loads CUPTI and may miss kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        caches.mark()
        synchronize(caches.device)


def span_ms(step: Step, prepare: Step, repeats: int) -> float:  # on a GPU alone
    """Milliseconds a step of ``repeats`` back-to-back steps between two CUDA events: with gaps, if the host is slow."""
    prepare()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # the device is busy when the first event is recorded, so that it does not wait for the host
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats


def copy_gbps(device: torch.device, nbytes: int, repeats: int, processes: int = 1) -> float:
    """Copy bandwidth in GB/s (10^9 bytes), bytes read plus bytes written, median of ``repeats`` timings.

    nbytes: of one array, less where ``processes`` that share the memory would take more of it than ``COPY_SHARE``.
    """
    source, target = _arrays(device, nbytes, 2, processes)
    return _bandwidth(lambda: target.copy_(source), 2 * source.nbytes, device, repeats)


def triad_gbps(device: torch.device, nbytes: int, repeats: int) -> float:
    """Bandwidth of a = b + s c in GB/s as STREAM counts it: two arrays of ``nbytes`` read, one written."""
    first, second, target = _arrays(device, nbytes, 3, 1)
    return _bandwidth(lambda: torch.add(first, second, alpha=3.0, out=target), 3 * first.nbytes, device, repeats)


def _arrays(device: torch.device, nbytes: int, count: int, processes: int) -> list[torch.Tensor]:
    nbytes = min(nbytes, int(COPY_SHARE * free_bytes(device)) // (count * processes))
    return [torch.empty(nbytes // 4, dtype=torch.float32, device=device).normal_() for _ in range(count)]


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has taken yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bandwidth(move: Step, nbytes: int, device: torch.device, repeats: int) -> float:
    measure_ms = _device_ms if device.type == "cuda" else _host_ms
    move()
    return nbytes / statistics.median(measure_ms(move) for _ in range(repeats)) / 1e6


def _device_ms(move: Step) -> float:  # on a GPU alone
    moves = 8  # in a row, so that the launch of the first one does not count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(moves):
        move()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / moves


def _host_ms(move: Step) -> float:
    start = perf_counter_ns()
    move()
    return (perf_counter_ns() - start) / NS_PER_MS
