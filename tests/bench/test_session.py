"""A run of ``fusedopt bench``: peers that fail, miss or do not fit; time limits; what is checked before it is timed."""

import io
import json
import math
import platform
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fusedopt.bench import contracts, peers, report, runner, session
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case, Tail
from fusedopt.bench.report import print_rows
from fusedopt.bench.runner import Repeats
from fusedopt.bench.session import BenchRunner, measure, print_end, resolve_peers
from fusedopt.bench.suites import make_case
from fusedopt.bench.workloads import WORKLOADS, Model, Workload

CPU = torch.device("cpu")
SHORT = Repeats(rounds=2, host_steps=2, traced_steps=2, span_steps=2, copy_bytes=1 << 20, copies=3, processes=1)
CASES = [make_case("tiny", "lion", "fp32", "step"), make_case("tiny", "lion", "fp32", "clip_step")]


def run(cases, against, deadline=math.inf, path=None, repeats=SHORT):
    torch.set_num_threads(1)
    bench = BenchRunner(CPU, repeats, against, ())
    return measure(bench, cases, deadline, Console(file=io.StringIO()), "fusedopt bench", path)


def plant(monkeypatch, step):
    """A library named lion-pytorch whose step is what ``step(case, params)`` makes of ours."""
    monkeypatch.setitem(peers.MODULES, "lion-pytorch", ("json",))
    monkeypatch.setitem(peers.STEPS, "lion-pytorch", (step, ("lion/fp32",)))
    peers.why_missing.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_imports():
    yield
    peers.why_missing.cache_clear()


def test_a_peer_that_fails_in_the_middle_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path):
    def failing(case, params):
        tail = contracts.build("fusedopt", case, params)
        calls = iter(range(6))  # 2 are checked, 2 warm up, the rest are timed

        def step():
            if next(calls, None) is None:
                raise ZeroDivisionError("the peer broke")
            tail.run()

        return Tail(tail.optimizer, step, tail.read)

    plant(monkeypatch, failing)
    path = tmp_path / "new" / "result.json"
    result = run([*CASES[:1], make_case("tiny", "lion", "bf16", "step")], ("lion-pytorch",), path=path)
    rows = {(row["format"], row["library"]): row for row in result["rows"]}
    assert rows["fp32", "lion-pytorch"]["error"] == "ZeroDivisionError: the peer broke"
    assert rows["fp32", "lion-pytorch"]["wall_ms"] is None and rows["fp32", "lion-pytorch"]["efficiency"] is None
    for format_ in ("fp32", "bf16"):
        assert rows[format_, "fusedopt-cpu"]["error"] is None
        assert rows[format_, "fusedopt-cpu"]["samples"] == SHORT.rounds * SHORT.host_steps
    assert json.loads(path.read_text())["rows"] == result["rows"]
    text = io.StringIO()
    print_rows(Console(file=text, width=200), result["rows"])
    assert "FAILED tiny lion fp32 step lion-pytorch: ZeroDivisionError: the peer broke" in text.getvalue()


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    def idle(case, params):
        tail = contracts.build("fusedopt", case, params)
        return Tail(tail.optimizer, lambda: None, tail.read)

    plant(monkeypatch, idle)
    rows = run(CASES[:1], ("lion-pytorch",))["rows"]
    assert [row["error"] is None for row in rows] == [True, False]
    assert "rounding explains" in rows[1]["error"] or "step counter" in rows[1]["error"]


def test_a_peer_that_would_end_the_process_is_not_run(monkeypatch):
    def fatal(case, params):
        raise SystemExit("the peer was run")

    plant(monkeypatch, fatal)
    monkeypatch.setitem(peers.LIMITS, "lion-pytorch", peers.Limit(4 * 64 * 64 - 1, "it says so"))
    ours, theirs = run(CASES[:1], ("lion-pytorch",))["rows"]
    assert ours["error"] is None and ours["wall_ms"] > 0
    assert theirs["wall_ms"] is None
    assert theirs["error"] == (
        "RuntimeError: not run: lion-pytorch would end the process: params[0] has 16,384 elements, expected at most "
        "16,383; it says so"
    )


def test_bitsandbytes_is_not_run_on_one_huge_tensor():
    huge, fitting = (torch.empty(size, device="meta") for size in (2_200_000_000, 2**31 - 1))
    peers.refuse_beyond_limit("bitsandbytes", [fitting])
    peers.refuse_beyond_limit("apex", [huge])
    with pytest.raises(RuntimeError, match=r"not run: bitsandbytes .*params\[1\] has 2,200,000,000 elements"):
        peers.refuse_beyond_limit("bitsandbytes", [fitting, huge])


def test_a_slow_library_has_fewer_repetitions_and_the_result_says_so(monkeypatch):
    def slow(case, params):
        tail = contracts.build("fusedopt", case, params)

        def step():
            time.sleep(0.02)
            tail.run()

        return Tail(tail.optimizer, step, tail.read)

    plant(monkeypatch, slow)
    many = replace(SHORT, host_steps=40, traced_steps=0, span_steps=0, round_seconds=0.2)
    result = run(CASES[:1], ("lion-pytorch",), repeats=many)
    ours, theirs = (row["samples"] for row in result["rows"])
    assert theirs <= many.rounds * 10 < ours <= many.rounds * many.host_steps
    assert all(row["measure_seconds"] > 0 and row["prepare_seconds"] > 0 for row in result["rows"])
    assert result["method"]["samples"].endswith("more than 0.2 s, at least 2, 1, 1")


def test_repetitions_of_a_round_are_as_many_as_fit_into_its_time():
    full = replace(SHORT, host_steps=12, traced_steps=6, span_steps=8)
    assert full.within_time(1e3) == full  # no limit
    full = replace(full, round_seconds=0.32)
    for step_seconds, steps in ((0.0, (12, 6, 8)), (0.01, (12, 6, 8)), (0.02, (6, 3, 4)), (9.0, (2, 1, 1))):
        fewer = full.within_time(step_seconds)
        assert (fewer.host_steps, fewer.traced_steps, fewer.span_steps) == steps
    on_cpu = replace(full, host_steps=1, traced_steps=0)
    assert on_cpu.within_time(9.0).host_steps == 1 and on_cpu.within_time(9.0).traced_steps == 0


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(peers.MODULES, "lion-pytorch", ("no_such_module",))
    peers.why_missing.cache_clear()
    result = run(CASES[:1], ("lion-pytorch",))
    assert result["missing_libraries"].keys() == {"lion-pytorch"}
    assert [row["library"] for row in result["rows"]] == ["fusedopt-cpu"]
    text = io.StringIO()
    print_end(Console(file=text, width=200), result)
    assert "missing, so not compared with: lion-pytorch (ModuleNotFoundError: No module named" in text.getvalue()


def test_a_device_too_small_is_skipped_with_the_memory_it_needs(monkeypatch):
    monkeypatch.setattr(runner, "total_bytes", lambda device: 10 * 10**9)
    result = run([make_case("one-huge", "adamw", "fp32", "step"), *CASES[:1]], ())
    huge, tiny = result["rows"]
    # 3 tensors of 4 bytes, one for a while and two states for 2.2e9 elements, and the reserve
    assert huge["skipped"] == "needs 53.1 GB of memory, cpu has 10.0 GB"
    assert huge["error"] is None and huge["wall_ms"] is None
    assert tiny["skipped"] is None and tiny["wall_ms"] > 0


def test_states_that_do_not_fit_together_are_measured_in_groups_with_ours_in_each(monkeypatch):
    case = make_case("tiny", "adamw", "fp32", "step")
    names = ("torch-fused", "torch-foreach")
    bench = BenchRunner(CPU, SHORT, names, ())
    needed = bench._shared_bytes(case) + 2 * bench._library_bytes(case, "fusedopt")
    monkeypatch.setattr(runner, "total_bytes", lambda device: needed)
    result = measure(bench, [case], math.inf, Console(file=io.StringIO()), "fusedopt bench")
    samples = {row["library"]: row["samples"] for row in result["rows"]}
    one_group = SHORT.rounds * SHORT.host_steps
    assert samples == {"fusedopt-cpu": 2 * one_group, "torch-fused": one_group, "torch-foreach": one_group}


def test_a_time_limit_leaves_out_the_rest_and_keeps_what_there_is():
    assert run(CASES, (), deadline=0.0)["left_out"] == list(map(str, CASES))


def test_foreach_stands_in_where_torch_has_no_fused_step():
    bench = BenchRunner(CPU, SHORT, resolve_peers(("default",)), ())
    assert "torch-foreach" in bench.libraries(make_case("tiny", "rmsprop", "fp32", "step"))
    assert "torch-foreach" not in bench.libraries(make_case("tiny", "adamw", "fp32", "step"))


def test_steps_of_many_tensors_are_not_traced():
    bench = BenchRunner(CPU, SHORT, (), ())
    traced = [bench._is_traced(make_case(name, "adamw", "fp32", "step")) for name in ("tensors-1000", "size-1e3")]
    assert traced == [False, True]


def test_speedups_are_over_the_fastest_other_library():
    names = {"workload": "tiny", "optimizer": "adamw", "format": "fp32", "contract": "step"}
    times = {"fusedopt-cuda": 2.0, "torch-fused": 5.0, "apex": 3.0, "optimi": None}
    rows = [names | {"library": library, "gpu_ms": ms} for library, ms in times.items()]
    rows.append(names | {"format": "bf16", "library": "fusedopt-cuda", "gpu_ms": 2.0})
    runner.add_speedups(rows, "gpu_ms")
    assert [row["over_best"] for row in rows] == [1.5, None, None, None, None]


def test_result_says_how_it_was_measured():
    result = run(CASES[:1], ("torch-fused",))
    assert result["triad_gbps"] > 0 and len(result["copy_gbps_start_end"]) == 2
    assert {"order", "warm_up", "caches", "floor"} <= result["method"].keys()
    row = result["rows"][0]
    assert row["state_bytes"] >= 4 * row["params"]
    assert row["wall_ms_min"] <= row["wall_ms_q1"] <= row["wall_ms"] <= row["wall_ms_q3"] <= row["wall_ms_max"]
    assert row["gbps"] == pytest.approx(row["params"] * row["bytes_per_param"] / row["wall_ms"] / 1e6)


def test_peers_are_named_singly_in_lists_and_by_groups():
    assert resolve_peers(("torch-fused, apex", "apex")) == ("torch-fused", "apex")
    assert set(resolve_peers(("torch",))) == set(session.TORCH)
    assert set(resolve_peers(("all",))) == set(session.PEERS)
    assert resolve_peers(("none",)) == ()
    assert not set(resolve_peers(("default",))) & set(session.ON_REQUEST)
    with pytest.raises(ValueError, match=r"got 'apx', expected some of .*apex"):
        resolve_peers(("apx",))


@pytest.mark.parametrize("case", [*CASES, make_case("tiny", "adamw", "fp32", "clip_step")], ids=str)
def test_large_tensors_are_checked_in_pieces(monkeypatch, case):
    """Both ends and the middle, with the blocks of 8-bit states where they belong."""
    monkeypatch.setattr("fusedopt.bench.checks.WHOLE", 1 << 12)
    monkeypatch.setattr("fusedopt.bench.checks.PIECE", 1 << 10)
    workload = Workload("long", ((40_001,), (300,)))
    monkeypatch.setitem(WORKLOADS, "long", workload)
    for format_ in ("fp32", "fp32+int8", "bf16+split16"):
        own = Case("long", case.optimizer, format_, case.contract)
        model = Model(workload, own.layout.dtype, CPU)
        tail = contracts.build("fusedopt", own, model.params)
        assert check(own, tail, model) <= 1

        model.reset()
        broken = contracts.build("fusedopt", own, model.params)
        with pytest.raises(AssertionError, match="rounding explains"):
            check(own, Tail(broken.optimizer, without_the_last(broken, model.params[0]), broken.read), model)


def without_the_last(tail, param):
    """A step that leaves the parameter's last element as it was."""

    def step():
        last = param.detach()[-1].clone()
        tail.run()
        param.data[-1] = last

    return step


# ---- runs that are cut short ----------------------------------------------------------------------------------------


def test_a_deadline_in_the_middle_of_a_case_keeps_its_first_round(monkeypatch):
    """What a library has measured by then counts; those of the next group are left out."""
    case = CASES[0]
    bench = BenchRunner(CPU, SHORT, ("torch-foreach",), ())
    assert len(bench._groups(case, [runner.Measured(name) for name in bench.libraries(case)])) == 1
    rows = bench.run(case, bench.make_model(case), 0.0)
    assert [row["samples"] for row in rows] == [SHORT.host_steps]

    case = make_case("tiny", "adamw", "fp32", "step")
    bench = BenchRunner(CPU, SHORT, ("torch-fused", "torch-foreach"), ())
    needed = bench._shared_bytes(case) + 2 * bench._library_bytes(case, "fusedopt")
    monkeypatch.setattr(runner, "total_bytes", lambda device: needed)
    rows = bench.run(case, bench.make_model(case), 0.0)
    assert [row["library"] for row in rows] == ["fusedopt-cpu", "torch-fused"]


def test_a_lost_device_ends_the_run_and_keeps_what_there_is(monkeypatch):
    """A step fails, and then so does all else on the device."""
    lost = []

    def broken(case, params):
        lost.append(case)
        raise RuntimeError("CUDA error: unspecified launch failure")

    def synchronize(device):
        if lost:
            raise RuntimeError("CUDA error: the context is gone")

    plant(monkeypatch, broken)
    monkeypatch.setattr(runner.timing, "synchronize", synchronize)
    monkeypatch.setattr(BenchRunner, "measure_copy", lambda self: 1.0 if not lost else synchronize(CPU))
    result = run(CASES, ("lion-pytorch",))
    (row,) = result["rows"]
    assert row["error"].startswith("the device is lost since lion-pytorch raised RuntimeError: CUDA error")
    assert row["skipped"] is None and result["left_out"] == [str(CASES[1])]
    assert result["copy_gbps_start_end"] == [1.0]


def test_a_model_that_does_not_fit_is_skipped(monkeypatch):
    def full(self, case):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(BenchRunner, "make_model", full)
    (row,) = run(CASES[:1], ())["rows"]
    assert row["skipped"] == "the device is too full: CUDA out of memory." and row["error"] is None


def test_an_interrupt_ends_the_run(monkeypatch):
    def interrupted(self, case, model, deadline):
        raise KeyboardInterrupt

    monkeypatch.setattr(BenchRunner, "run", interrupted)
    result = run(CASES, ())
    assert result["rows"] == [] and result["left_out"] == list(map(str, CASES))


# ---- what a machine does not tell ----------------------------------------------------------------------------------


def test_facts_that_cannot_be_found_are_left_open(monkeypatch, tmp_path):
    assert report._output("no-such-program-anywhere") is None
    assert report._output("python3", "-c", "raise SystemExit(3)") is None
    assert report._version("no-such-distribution") is None
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report._commit() is None  # installed from a wheel

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(report.Path, "read_text", missing)
    assert report._cpu_name() == platform.processor() or platform.machine()
    monkeypatch.setattr(report.Path, "read_text", lambda path: "processor : 0\n")
    assert report._cpu_name()
    monkeypatch.setattr(runner.timing.Path, "read_text", missing)
    assert runner.total_bytes(CPU) > 1 << 20
