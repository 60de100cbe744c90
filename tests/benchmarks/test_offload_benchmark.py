"""The offload benchmark on a small model, through the pipeline on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import offload, tables


def test_rows_and_limits(device, tmp_path):
    path = tmp_path / "offload.json"
    arguments = ["--device", device.type, "--quick", "--contract", "clip_step", "--json", str(path)]
    result = CliRunner().invoke(offload.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert (
        written["failed"] == {} and written["left_out"] == [] and all(value > 0 for value in written["limits"].values())
    )
    case = offload.Case(offload.QUICK, "fp32", "clip_step")
    expected = [name for name in offload.offered(case, device) if name not in written["missing_libraries"]]
    assert [row["library"] for row in written["rows"] if row["format"] == "fp32"] == expected
    assert {row["format"] for row in written["rows"]} == offload.FORMATS.keys()
    for row in written["rows"]:
        assert row["check_params"] <= offload.WORST_CHECK and row["samples"] == offload.FAST.steps
        assert row["library"] in row["together"] and (row["device_bytes"] is None) == (device.type == "cpu")
        if row["efficiency"] is not None:
            assert row["floor_ms"] == max(row["bus_ms"], row["host_ms"])
            assert row["efficiency"] == row["floor_ms"] / row["wall_ms"]
    assert f"{case.workload.name}/{case.format}/{case.contract}" in result.output
    page = tables.fill("<!-- table: offload.json format=fp32 -->\n<!-- end of table -->", tmp_path)
    assert page.count("| quick adamw fp32 clip_step |") == len(expected) and "share of the limit" in page
    assert f"`python benchmarks/offload.py --device {device.type} --workload quick --format fp32 " in page


def test_floors_by_hand():
    """A billion fp32 parameters: 8 bytes down at 40 GB/s are 200 ms, 40 bytes of host memory at 100 GB/s are 400."""
    limits = offload.Limits(host_gbps=100.0, down_gbps=40.0, up_gbps=50.0, down_alone_gbps=50.0, up_alone_gbps=50.0)
    case = offload.Case(offload.Workload("one", ((1000, 1000, 1000),)), "fp32", "step")
    row = offload._row("fusedopt-offload", case, [600.0, 500.0, 400.0], limits)
    assert (row["bus_ms"], row["host_ms"], row["wall_ms"]) == (pytest.approx(200), pytest.approx(400), 500.0)
    assert row["efficiency"] == pytest.approx(0.8)
    assert offload._row("fusedopt", case, [1.0], limits)["efficiency"] is None


CPU = torch.device("cpu")
CASE = offload.Case(offload.QUICK, "fp32", "step")


def measured(path, time_limit=None, names=("fusedopt", "torch-host")) -> dict:
    measurement = offload.Measurement(CPU, offload.FAST, path, time_limit)
    measurement.run([CASE], list(names))
    assert json.loads(path.read_text()) == measurement.result
    return measurement.result


def libraries(result: dict) -> list[str]:
    return [row["library"] for row in result["rows"]]


def test_a_wrong_step_is_noticed_and_the_rest_goes_on(monkeypatch, tmp_path):
    monkeypatch.setitem(offload.LIBRARIES, "torch-host", lambda params, case: lambda: None)
    result = measured(tmp_path / "offload.json")
    assert "learning rates after one step" in result["failed"][f"{CASE.name} torch-host"]
    assert libraries(result) == ["fusedopt"]


def test_a_library_that_fails_later(monkeypatch, tmp_path):
    """Its row goes: who took turns with the others is told."""
    real, steps = offload._torch_host, []

    def make(params, case):
        step = real(params, case)
        return lambda: (steps.append(1), step()) if len(steps) < 4 else 1 / 0

    monkeypatch.setitem(offload.LIBRARIES, "torch-host", make)
    result = measured(tmp_path / "offload.json")
    assert result["failed"] == {f"{CASE.name} torch-host": "ZeroDivisionError: division by zero"}
    assert libraries(result) == ["fusedopt"] and result["rows"][0]["together"] == ["fusedopt"]
    page = tables.fill("<!-- table: offload.json -->\n<!-- end of table -->", tmp_path)
    assert f"Failed: {CASE.name} torch-host, ZeroDivisionError: division by zero." in page


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "why_missing", lambda library: "not built" if library == "deepspeed" else None)
    result = measured(tmp_path / "offload.json", names=["deepspeed", "fusedopt"])
    assert result["missing_libraries"] == {"deepspeed": "not built"}
    assert libraries(result) == ["fusedopt"]


def test_time_limit(tmp_path):
    """Nothing new is begun; what has begun gives its row."""
    assert measured(tmp_path / "all.json", time_limit=1000)["left_out"] == []
    measurement = offload.Measurement(CPU, offload.FAST, None, 0)
    measurement.run([CASE], ["fusedopt"])
    assert measurement.result["left_out"] == [f"{CASE.name} fusedopt"] and measurement.result["rows"] == []


def test_batches_fit_into_memory():
    names = ["fusedopt-offload", "torch-host", "deepspeed", "torchao", "fusedopt-host"]
    case = offload.Case(offload.Workload("one", ((1000, 1000, 1000),)), "fp32", "step")
    together = list(offload.batches(names, case, CPU, 70e9))
    assert together == [["fusedopt-offload", "torch-host", "deepspeed"], ["torchao", "fusedopt-host"]]
    assert list(offload.batches(names, case, CPU, 1e12)) == [names]
    assert list(offload.batches(names, case, CPU, 1e9)) == [[name] for name in names]
