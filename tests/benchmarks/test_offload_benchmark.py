"""The offload benchmark on a small model, through the pipeline on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import offload


def test_rows_and_limits(device, tmp_path):
    path = tmp_path / "offload.json"
    arguments = ["--device", device.type, "--quick", "--contract", "clip_step", "--json", str(path)]
    result = CliRunner().invoke(offload.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert written["failed"] == {} and all(value > 0 for value in written["limits"].values())
    case = offload.Case(offload.QUICK, "fp32", "clip_step")
    expected = [name for name in offload.offered(case, device) if name not in written["missing_libraries"]]
    assert [row["library"] for row in written["rows"] if row["format"] == "fp32"] == expected
    assert {row["format"] for row in written["rows"]} == offload.FORMATS.keys()
    for row in written["rows"]:
        assert row["check_params"] <= offload.WORST_CHECK and row["samples"] == offload.FAST.steps
        if row["efficiency"] is not None:
            assert row["floor_ms"] == max(row["bus_ms"], row["host_ms"])
            assert row["efficiency"] == row["floor_ms"] / row["wall_ms"]
    assert f"{case.workload.name}/{case.format}/{case.contract}" in result.output


def test_floors_by_hand():
    """A billion fp32 parameters: 8 bytes down at 40 GB/s are 200 ms, 40 bytes of host memory at 100 GB/s are 400."""
    limits = offload.Limits(host_gbps=100.0, down_gbps=40.0, up_gbps=50.0, down_alone_gbps=50.0, up_alone_gbps=50.0)
    case = offload.Case(offload.Workload("one", ((1000, 1000, 1000),)), "fp32", "step")
    row = offload._row("fusedopt-offload", case, [600.0, 500.0, 400.0], limits)
    assert (row["bus_ms"], row["host_ms"], row["wall_ms"]) == (pytest.approx(200), pytest.approx(400), 500.0)
    assert row["efficiency"] == pytest.approx(0.8)
    assert offload._row("fusedopt", case, [1.0], limits)["efficiency"] is None


def test_a_wrong_step_is_noticed(monkeypatch):
    monkeypatch.setitem(offload.LIBRARIES, "torch-host", lambda params, case: lambda: None)
    case = offload.Case(offload.QUICK, "fp32", "step")
    limits = offload.Limits(1.0, 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(AssertionError, match="learning rates after one step"):
        offload.measure("torch-host", case, torch.device("cpu"), offload.FAST, limits)
