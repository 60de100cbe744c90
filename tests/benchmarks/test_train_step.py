"""The training-step benchmark on a tiny model, and the generated tables of the performance page."""

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import goals, tables, train_step
from fusedopt.bench import suites
from fusedopt.bench.contracts import reported_name


@pytest.fixture
def result(device):
    return train_step.measure(device, train_step.TINY, math.inf, Console(file=io.StringIO()))


def test_share_of_the_tail_is_measured_for_every_library_and_batch(result, device):
    (size,) = train_step.TINY
    ways = [(reported_name(library, device), format_) for library, format_ in train_step.WAYS]
    assert [(row["library"], row["format"]) for row in result["rows"]] == ways * len(size.batches)
    for row in result["rows"]:
        assert row["error"] is None and row["skipped"] is None and row["check_error_ratio"] <= 1
        assert row["state_bytes"] >= (8 if row["format"] == "fp32" else 10) * row["params"]
        assert row["loss"] == pytest.approx(result["rows"][0 if row["tokens"] == 16 else 4]["loss"], rel=0.01)
        assert row["samples"] == size.rounds * size.steps
        assert 0 < row["tail_ms"] <= row["step_ms"] and row["tail_share"] == row["tail_ms"] / row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_ms"] * 1e3)
        for key in ("speedup", "tail_speedup"):
            assert (row[key] is not None) == row["library"].startswith("fusedopt")
        assert (row["peak_bytes"] is None) == (device.type == "cpu")


ONE_BATCH = replace(train_step.TINY[0], batches=(1,), rounds=1)
SMALL_CASE = train_step.Case(ONE_BATCH, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "key", "text"),
    [
        (MemoryError("no room"), "error", "MemoryError: no room"),
        (torch.OutOfMemoryError("CUDA out of memory.\nand more"), "skipped", "out of memory: CUDA out of memory."),
    ],
)
def test_a_library_that_fails_costs_its_row(monkeypatch, error, key, text):
    build = train_step.contracts.build

    def failing(library, case, params):
        if library == "torch-fused":
            raise error
        return build(library, case, params)

    monkeypatch.setattr(train_step.contracts, "build", failing)
    rows, interrupted = train_step.measure_case(SMALL_CASE)
    failed = [row for row in rows if row[key]]
    assert [row["library"] for row in failed] == ["torch-fused"] and not interrupted
    assert failed[0][key] == text and failed[0]["tokens_per_s"] is None
    assert all(row["tokens_per_s"] for row in rows if row is not failed[0])
    out = io.StringIO()
    train_step.print_table(Console(file=out, width=160), "", train_step.CELLS, {"rows": rows, "left_out": []})
    assert (
        f"tiny, batch 1 x 16 torch-fused: {text}" in out.getvalue() and "fusedopt-cpu, bf16+split16" in out.getvalue()
    )


def test_a_model_that_cannot_fit_is_skipped_with_the_memory_it_needs(monkeypatch):
    monkeypatch.setattr(train_step, "total_bytes", lambda device: 15 * 10**9)
    large = train_step.SIZES[-1]
    entries = [train_step.Measured(*way) for way in train_step.WAYS]
    for entry in entries:
        entry.attempt(train_step.Case(large, 1, torch.device("cpu")), 0)
    params = sum(param.numel() for param in train_step.params_of(large))
    assert 1.30e9 < params < 1.32e9
    needed = [train_step.least_bytes(large, format_) / params for _, format_ in train_step.WAYS]
    assert needed == [16, 16, 16, 14]  # parameters, gradients and states
    assert entries[0].skipped == f"needs more than {16 * params / 1e9:.1f} GB of memory, cpu has 15.0 GB"
    assert all(entry.skipped and not entry.error for entry in entries)


def test_another_training_is_an_error(monkeypatch):
    def without_update(library, case, params):
        tail = build(library, case, params)
        return replace(tail, run=int) if (library, case.format) == train_step.WAYS[0] else tail

    build = train_step.contracts.build
    monkeypatch.setattr(train_step, "LR", 1e-2)
    monkeypatch.setattr(train_step, "check", lambda *_: 0.0)
    monkeypatch.setattr(train_step.contracts, "build", without_update)
    (ours, *_, in_bf16), _ = train_step.measure_case(SMALL_CASE)
    assert "expected that of torch-fused" in ours["error"] and ours["speedup"] is None
    assert in_bf16["error"] is None


def test_what_was_measured_before_an_interrupt_counts(monkeypatch, tmp_path):
    def interrupted(self, case, turn):
        if turns.append(self) or len(turns) == 2 * len(train_step.WAYS):
            raise KeyboardInterrupt
        attempt(self, case, turn)

    turns, attempt = [], train_step.Measured.attempt
    monkeypatch.setattr(train_step.Measured, "attempt", interrupted)
    path, quiet = tmp_path / "train.json", Console(file=io.StringIO())
    result = train_step.measure(torch.device("cpu"), train_step.TINY, math.inf, quiet, path)
    assert json.loads(path.read_text()) == result
    steps = train_step.TINY[0].steps
    assert [row["samples"] for row in result["rows"]] == [2 * steps] * 3 + [steps]
    assert result["left_out"] == ["tiny, batch 2 x 16"]


def test_time_limit(monkeypatch):
    result = train_step.measure(torch.device("cpu"), train_step.TINY, 0.0, Console(file=io.StringIO()))
    assert result["rows"] == [] and len(result["left_out"]) == len(train_step.TINY[0].batches)


# ---- goals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_goals_are_about_cases_of_the_standard_suite(device_type):
    names = set(map(str, suites.select_cases("standard", device_type)))
    of_cases = [goal.name for goal in goals.GOALS[device_type]["standard"] if not goal.name.endswith(", least")]
    assert {name.split(":")[0] for name in of_cases} <= names


def test_goals_of_the_standard_suite():
    def row(case, library, **figures):
        return (
            dict(zip(("workload", "optimizer", "format", "contract"), case.split("/")))
            | {"library": library, "params": 1000}  # too few for the goals of large rows
            | figures
        )

    small, step = "1000-small/adamw/fp32/scaler_clip_step", "llama-1.3B/adamw/fp32/step"
    rows = [
        row(small, "fusedopt-cuda", wall_ms=0.5),
        row(small, "torch-fused", wall_ms=20.0),
        row(small, "torch-grad-scale", wall_ms=14.0),
        row(small, "torch-captured", wall_ms=0.1),  # no eager way
        row(step, "fusedopt-cuda", efficiency=0.98),
        row(step.replace("1.3B", "1.3B-odd"), "fusedopt-cuda", efficiency=0.95),
    ]
    judged = goals.judge_goals(torch.device("cuda"), ("standard",), rows, [])
    found = {goal["name"]: (goal["value"], goal["reached"]) for goal in judged if goal["value"] is not None}
    assert found == {
        f"{small}: wall, times faster than torch's best eager way": (28.0, False),
        "llama-1.3B-odd/adamw/fp32/step: over the aligned share": (0.95 / 0.98, True),
    }
    cpu = "cpu-100M/adamw/fp32/"
    rows = [row(f"{cpu}clip_step", "fusedopt-cpu", wall_ms=2.0, gbps=18.0)]
    rows += [row(f"{cpu}clip_step", "torch-fused", wall_ms=3.0), row(f"{cpu}step", "torch-fused", gbps=20.0)]
    judged = goals.judge_goals(torch.device("cpu"), ("standard",), rows, [])
    assert [(goal["value"], goal["reached"]) for goal in judged] == [(0.9, False), (1.5, True)]


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_results_say(path):
    """After new results: python benchmarks/tables.py."""
    page = path.read_text()
    assert tables.fill(page) == page


def test_a_table_says_where_it_was_made_and_how_to_measure_again(tmp_path, result, device):
    row = {
        **{"workload": "gpt2-124M", "optimizer": "lion", "format": "fp16+fp32 master", "contract": "step"},
        **{"library": "apex", "params": 1000, "bytes_per_param": 20, "gpu_ms": 1.5, "gpu_ms_q1": 1.4, "gpu_ms_q3": 1.6},
        **{"launches": 3, "efficiency": 0.5, "state_bytes": 4000, "error": None},
    }
    failed = row | {"workload": "1000-small", "library": "fusedopt-triton", "error": "RuntimeError: a | b\nc"}
    facts = {"device": "a GPU", "torch": "2.11", "driver": "580", "triton": "3.6", "date": "2026-11-22T01:02:03"}
    facts |= {"commit": "0123456789", "copy_gbps": 3010.14, "missing_libraries": {"optimi": "ModuleNotFoundError"}}
    (tmp_path / "one.json").write_text(json.dumps(facts | {"rows": [row, failed]}))
    (tmp_path / "train.json").write_text(json.dumps(result))
    marker = "text\n<!-- table: one.json{} -->\nold\n<!-- end of table -->\nmore\n"
    page = tables.fill(marker.format(""), tmp_path)
    assert page.startswith("text\n<!-- table: one.json -->\n") and page.endswith("<!-- end of table -->\nmore\n")
    assert "old" not in page and tables.fill(page, tmp_path) == page
    assert "a GPU, torch 2.11, driver 580, Triton 3.6, 2026-11-22, commit 0123456, copy 3,010.1 GB/s." in page
    assert "Missing, so not compared with: optimi." in page
    cells = "| gpt2-124M lion fp16+fp32 master step | apex | 20 | 1.500 ± 0.100 | 3 | 50.0% | 4.00 | "
    again = "--workload gpt2-124M --optimizer lion --format 'fp16+fp32 master' --contract step --against apex`"
    assert f"{cells}`fusedopt bench {again}" in page
    assert "failed: RuntimeError: a / b c" in page and "--backend triton" in page
    assert "1000-small" not in tables.fill(marker.format(" library=apex"), tmp_path)
    trained = tables.fill("<!-- table: train.json -->\n<!-- end of table -->", tmp_path)
    assert "tail's share" in trained and f"`python benchmarks/train_step.py --device {device.type}`" in trained


@pytest.mark.parametrize(
    ("marker", "message"),
    [("<!-- table: none.json -->", "names none.json"), ("<!-- table: one.json colour=red -->", "got 'colour=red'")],
)
def test_markers_are_checked(tmp_path, marker, message):
    (tmp_path / "one.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(click.ClickException, match=message):
        tables.fill(f"{marker}\n<!-- end of table -->\n", tmp_path)


def test_a_marker_may_name_a_file_that_is_not_there_yet(tmp_path):
    page = tables.fill("<!-- table: none.json if-there -->\n<!-- end of table -->\n", tmp_path)
    assert "Not measured yet." in page and tables.fill(page, tmp_path) == page
    (tmp_path / "none.json").write_text(json.dumps({"device": "a", "torch": "2", "threads": 1, "date": "", "rows": []}))
    (tmp_path / "none.json").write_text((tmp_path / "none.json").read_text().replace("}", ', "commit": "c"}'))
    assert "Not measured yet." not in tables.fill(page, tmp_path)
