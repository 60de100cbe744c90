"""What the host's memory and its bus to the device give, and how much memory a process has and takes."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import torch

from fusedopt.bench import timing

__all__ = [
    "Limits",
    "Repeats",
    "free_host_bytes",
    "peak_bytes",
    "pinned",
    "release_memory",
    "start_peak",
    "taken_bytes",
]


@dataclass(frozen=True)
class Repeats:
    """How often things are done, and with how much."""

    steps: int
    copy_bytes: int
    copies: int


@dataclass(frozen=True)
class Limits:
    """GB/s, 10^9 bytes."""

    host_gbps: float
    down_gbps: float
    up_gbps: float
    down_alone_gbps: float
    up_alone_gbps: float

    @classmethod
    def measure(cls, device: torch.device, repeats: Repeats) -> Limits:
        host = torch.device("cpu")
        rates = [timing.copy_gbps(host, repeats.copy_bytes, repeats.copies)]
        rates.append(timing.triad_gbps(host, repeats.copy_bytes, repeats.copies))
        rates.append(_scaling_gbps(repeats))
        return cls(max(rates), *_bus_gbps(device, repeats))


def _best_gbps(move: Callable[[], object], nbytes: int, device: torch.device, repeats: Repeats) -> float:
    times = []
    for _ in range(1 + repeats.copies):
        timing.synchronize(device)
        start = perf_counter_ns()
        move()
        timing.synchronize(device)
        times.append(perf_counter_ns() - start)
    return nbytes / min(times[1:])


def _scaling_gbps(repeats: Repeats) -> float:
    """Reads and writes the same lines: nothing is fetched only to be overwritten."""
    values = torch.ones(repeats.copy_bytes // 4)
    return _best_gbps(lambda: values.mul_(1.0), 2 * values.nbytes, values.device, repeats)


def _bus_gbps(device: torch.device, repeats: Repeats) -> tuple[float, float, float, float]:
    """Down and up at once, and each alone."""
    local = [pinned(repeats.copy_bytes, device) for _ in range(2)]
    remote = [torch.zeros(repeats.copy_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]

    def copy(way: int) -> None:
        target, source = (local[0], remote[0]) if way == 0 else (remote[1], local[1])
        with torch.cuda.stream(streams[way]):
            target.copy_(source, non_blocking=True)

    def both() -> None:
        copy(0)
        copy(1)

    nbytes = repeats.copy_bytes
    together = _best_gbps(both, nbytes, device, repeats)
    return (together, together, *(_best_gbps(lambda way=way: copy(way), nbytes, device, repeats) for way in range(2)))


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def taken_bytes(device: torch.device) -> int:
    """Of host memory by this process: what is resident, and pinned memory where the system does not count it there."""
    return _resident_bytes() + (0 if _is_pinned_memory_resident(device) else _pinned_bytes(device))


def _pinned_bytes(device: torch.device) -> int:
    """That torch has pinned, in use or not; 0 where this torch does not say."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)() if device.type == "cuda" else {}
    return int(stats.get("allocated_bytes.current", 0))


@functools.cache
def _is_pinned_memory_resident(device: torch.device) -> bool:
    """Drivers map it in more than one way."""
    if device.type != "cuda":
        return True
    release_memory(device)
    before = _resident_bytes()
    block = pinned(256 << 20, device)
    return _resident_bytes() - before > block.nbytes // 2


def _resident_bytes() -> int:
    """Of this process, in memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_host_bytes() -> float:
    """That the system, and the container that this may be, still give; infinity where they do not say."""
    free = float("inf")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # "max" is no number
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, float(limit - used))
    return free


def release_memory(device: torch.device) -> None:
    """What earlier cases leave in torch's caches: what comes is to be seen in the process' size."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", bool)()
