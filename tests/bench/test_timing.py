"""Clocks: device work between the markers of a trace, host times of stages, bandwidths and the memory they take."""

import pytest
import torch

from fusedopt.bench import timing
from fusedopt.bench.timing import MARKER, Caches, HostTimes, split_steps

CPU = torch.device("cpu")


def event(ts, name, cat="kernel", dur=1.0):
    return {"ts": ts, "name": name, "cat": cat, "dur": dur}


def test_device_work_belongs_to_the_step_whose_marker_precedes_it():
    """Whatever the order of the events in the file; neither host work nor annotations count."""
    trace = [
        event(9000, f"{MARKER}_kernel"),
        event(1, "before any marker"),
        event(2, f"vectorized_{MARKER}_kernel"),
        event(3.5, "norm", dur=2000.0),
        event(2100, "update", dur=500.0),
        event(3000, "copy", cat="gpu_memcpy", dur=250.0),
        event(3300, "annotation", cat="gpu_user_annotation", dur=1e6),
        event(3400, "aten::add", cat="cpu_op", dur=1e6),
        {"ts": 8000, "name": "process_name"},
        event(10000, "update", dur=1000.0),
    ]
    first, second = split_steps(trace)
    assert (first.ms, first.kernels, first.memory_operations) == (2.75, 2, 1)
    assert first.names == ["norm", "update"]
    assert (second.ms, second.kernels, second.memory_operations, second.names) == (1.0, 1, 0, ["update"])
    assert split_steps([event(1, "update")]) == []


def test_events_of_a_profile_are_read_from_its_trace():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sqrt_()
    assert "aten::sqrt_" in {each["name"] for each in timing.trace_events(profile)}


def test_work_between_stages_is_no_host_time():
    calls, times = [], HostTimes()
    clock = iter(range(0, 1000, 10))

    def tick(name):
        return lambda *arguments: calls.append((name, *arguments)) or next(clock)

    stages = (tick("first"), tick("second"))
    timing.time_stages(stages, tick("before"), tick("prepare"), Caches(CPU), 2, times)
    one = [("prepare",), ("before", 0), ("first",), ("before", 1), ("second",)]
    assert calls == 2 * one
    assert len(times.host) == len(times.wall) == 2
    assert all(0 < host <= wall for host, wall in zip(times.host, times.wall))


def test_moments_are_milliseconds_apart(monkeypatch):
    now = iter([5_000_000, 7_500_000])
    monkeypatch.setattr(timing, "perf_counter_ns", lambda: next(now))
    earlier, later = timing.start_clock(CPU), timing.start_clock(CPU)
    assert earlier(later) == 2.5


@pytest.mark.parametrize(("measure", "arrays"), [(timing.copy_gbps, 2), (timing.triad_gbps, 3)])
def test_bandwidth_counts_what_is_read_and_written(measure, arrays, monkeypatch):
    now = iter(range(0, 10**9, 1000))  # each move takes a microsecond
    monkeypatch.setattr(timing, "perf_counter_ns", lambda: next(now))
    assert measure(CPU, 4000, 3) == pytest.approx(arrays * 4000 / 1e-6 / 1e9)


@pytest.fixture
def taken(monkeypatch):
    """Sizes of the arrays that are made, in bytes."""

    def empty(numel, dtype, device):
        sizes.append(numel * dtype.itemsize)
        return make(16, dtype=dtype, device=device)

    sizes, make = [], torch.empty
    monkeypatch.setattr(timing.torch, "empty", empty)
    return sizes


def test_a_copy_takes_a_share_of_the_free_memory_with_all_processes_together(taken, device, monkeypatch):
    monkeypatch.setattr(timing, "free_bytes", lambda device: 8 << 30)
    assert timing.copy_gbps(device, 16 << 20, 1) > 0  # fits
    timing.copy_gbps(device, 2 << 30, 1)
    timing.copy_gbps(device, 2 << 30, 1, processes=8)
    timing.triad_gbps(device, 2 << 30, 1)
    assert taken[:6] == [16 << 20] * 2 + [1 << 30] * 2 + [1 << 27] * 2
    assert sum(taken[6:]) <= 2 << 30 and len(taken) == 9


def test_free_memory_is_known(device):
    assert 1 << 20 < timing.free_bytes(device) < 1 << 45
