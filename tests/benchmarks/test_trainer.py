"""The benchmark of the Trainer on a tiny model: the Trainer itself where it is installed, and the loop in its place."""

import importlib.util
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import tables, trainer
from fusedopt.bench.contracts import reported_name

STAND_IN = pytest.param(True, id="stand-in")
REAL = pytest.param(
    False,
    id="Trainer",
    marks=pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in trainer.NEEDED),
        reason="needs the extra test-integrations: pip install 'fusedopt[test-integrations]'",
    ),
)
SIZE = replace(trainer.TINY, steps=2, rounds=2)
CASE = trainer.Case(SIZE, 2, nan_filter=True, device=torch.device("cpu"), stand_in=True)
QUIET = Console(file=io.StringIO())


@pytest.mark.parametrize("stand_in", [STAND_IN, REAL])
def test_both_libraries_train_alike_and_are_timed(stand_in, device, tmp_path):
    result = trainer.measure(device, SIZE, stand_in, math.inf, QUIET)
    assert len(result["rows"]) == len(trainer.LIBRARIES) * 2 * len(SIZE.batches) and not result["left_out"]
    for torchs, ours in zip(result["rows"][::2], result["rows"][1::2]):
        assert (torchs["library"], ours["library"]) == ("torch-fused", reported_name("fusedopt", device))
        for row in (torchs, ours):
            assert row["error"] is None and row["samples"] == SIZE.rounds * SIZE.steps
            assert 0 < row["tail_ms"] < row["step_ms"]
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_ms"] * 1e3)
            assert row["driver_loop"] == ("stand-in" if stand_in else "transformers.Trainer")
        assert all((row["peak_bytes"] is None) == (device.type == "cpu") for row in (torchs, ours))
        assert all((row["tail_launches"] is None) == (device.type == "cpu") for row in (torchs, ours))
        assert ours["params"] == torchs["params"] and ours["loss"] == pytest.approx(torchs["loss"], rel=1e-3)
        assert ours["tail_speedup"] == torchs["tail_ms"] / ours["tail_ms"]
        assert ours["state_bytes"] > 2 * 4 * ours["params"]
    (tmp_path / "trainer.json").write_text(json.dumps(result))
    page = tables.fill("<!-- table: trainer.json -->\n<!-- end of table -->", tmp_path)
    assert f"`python benchmarks/trainer.py --device {device.type}`" in page and "no loss filter" in page
    assert ("A loop that stands in for the Trainer's." in page) == stand_in


def test_another_training_is_an_error(monkeypatch):
    def without_update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    monkeypatch.setattr(trainer.StandIn, "_our_tail", without_update)
    monkeypatch.setattr(trainer, "LR", 0.1)
    (_, ours), _ = trainer.measure_case(CASE)
    assert "expected that of torch-fused" in ours["error"] and ours["speedup"] is None


def test_a_library_that_fails_costs_its_row(monkeypatch):
    def fails(self):
        raise MemoryError("no room")

    monkeypatch.setattr(trainer.StandIn, "_torch_tail", fails)
    (torchs, ours), interrupted = trainer.measure_case(CASE)
    assert torchs["error"] == "MemoryError: no room" and torchs["step_ms"] is None
    assert ours["error"] is None and ours["speedup"] is None and not interrupted


def test_what_was_measured_before_an_interrupt_counts(monkeypatch, tmp_path):
    def interrupted(self):
        if trained.append(self) or len(trained) > 3:
            raise KeyboardInterrupt
        train(self)

    trained, train = [], trainer.StandIn.train
    monkeypatch.setattr(trainer.StandIn, "train", interrupted)
    path = tmp_path / "trainer.json"
    result = trainer.measure(CASE.device, SIZE, True, math.inf, QUIET, path)
    assert json.loads(path.read_text()) == result
    assert [row["samples"] for row in result["rows"]] == [2 * SIZE.steps, SIZE.steps]
    assert result["rows"][1]["speedup"] > 0 and result["left_out"] == ["tiny, batch 2 x 16, no loss filter"]


@pytest.mark.parametrize("make", [STAND_IN, REAL])
def test_time_limit_ends_training_between_two_steps(make, monkeypatch):
    monkeypatch.setattr(trainer.Case, "is_over", lambda self: next(over, True))
    over = iter([False, *[False] * (trainer.WARM_UP_STEPS + 2)])  # before the turn, and after each step but the last
    rows, _ = trainer.measure_case(replace(CASE, stand_in=make))
    assert [row["samples"] for row in rows] == [SIZE.steps, 0] and rows[0]["error"] is None
    assert "left no step to measure" in rows[1]["error"]


def test_device_work_of_the_tails_is_added_up(monkeypatch):
    work = [{"cat": "kernel", "ts": 0, "dur": 20}, {"cat": "gpu_memset", "ts": 30, "dur": 5.5}]
    work += [{"cat": "cpu_op", "ts": 0, "dur": 100}, {}]
    monkeypatch.setattr(trainer, "trace_events", lambda profile: work)
    monkeypatch.setattr(torch.profiler, "profile", MagicMock())  # of a GPU
    entry = trainer.Measured("fusedopt", trainer.StandIn("fusedopt", CASE))
    entry.attempt(CASE, timed=False)
    assert (entry.tail_gpu_ms, entry.tail_launches, entry.step_ms) == (0.0255, 2, [])


def test_command_says_what_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "NEEDED", ("a_package_that_is_not_there",))
    run = CliRunner().invoke(trainer.main, ["--quick", "--json", str(tmp_path / "out.json")])
    assert run.exit_code == 0, run.output
    assert "a_package_that_is_not_there is not installed: measuring a loop that stands in" in run.output
    assert json.loads((tmp_path / "out.json").read_text())["driver_loop"] == "stand-in"
