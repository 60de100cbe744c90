"""The training-step benchmark on a tiny model, and the generated tables of the performance page."""

import io
import json
import math
import sys
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
    assert len(result["rows"]) == len(size.batches) * len(train_step.LIBRARIES)
    assert {row["library"] for row in result["rows"]} == {reported_name(name, device) for name in train_step.LIBRARIES}
    for row in result["rows"]:
        assert row["error"] is None and row["check_error_ratio"] <= 1
        assert row["samples"] == size.rounds * size.steps
        assert 0 < row["tail_ms"] <= row["step_ms"] and row["tail_share"] == row["tail_ms"] / row["step_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_ms"] * 1e3)
        assert (row["speedup"] is not None) == row["library"].startswith("fusedopt")
        assert (row["peak_bytes"] is None) == (device.type == "cpu")


def test_a_library_that_fails_costs_its_row(monkeypatch):
    build = train_step.contracts.build

    def failing(library, case, params):
        if library == "torch-fused":
            raise MemoryError("no room")
        return build(library, case, params)

    monkeypatch.setattr(train_step.contracts, "build", failing)
    size = train_step.TINY[0]
    rows = train_step.measure(torch.device("cpu"), (size,), math.inf, Console(file=io.StringIO()))["rows"]
    failed = [row for row in rows if row["error"]]
    assert [row["library"] for row in failed] == ["torch-fused"] * len(size.batches)
    assert failed[0]["error"] == "MemoryError: no room" and failed[0]["tokens_per_s"] is None
    text = io.StringIO()
    train_step.print_table(Console(file=text, width=160), "", train_step.STEP_CELLS, {"rows": rows, "left_out": []})
    assert "FAILED tiny, batch 1 x 16 torch-fused: MemoryError: no room" in text.getvalue()


def test_what_was_measured_before_an_interrupt_counts(monkeypatch, tmp_path):
    def interrupted(self, batch, deadline):
        if batch == train_step.TINY[0].batches[-1]:
            raise KeyboardInterrupt
        return [{"library": "fusedopt", "error": None}]

    monkeypatch.setattr(train_step.Training, "measure", interrupted)
    path, quiet = tmp_path / "train.json", Console(file=io.StringIO())
    result = train_step.measure(torch.device("cpu"), train_step.TINY, math.inf, quiet, path)
    assert json.loads(path.read_text()) == result
    assert len(result["rows"]) == 1 and result["left_out"] == ["tiny, batch 2 x 16"]


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
