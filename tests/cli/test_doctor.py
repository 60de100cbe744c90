"""`fusedopt doctor` says what there is, tries it, and fails when something does not work."""

import json

import pytest
import torch
from click.testing import CliRunner

import fusedopt
from fusedopt import doctor
from fusedopt.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(main, ("doctor", *arguments))


def test_a_machine_where_all_works(folder):
    result = run("--json", str(folder / "doctor.json"))
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    assert "ok  steps on cpu with backend cpu: 2 within the bounds" in result.output
    written = json.loads((folder / "doctor.json").read_text())
    assert written["healthy"]
    assert set(written["backends"]) == set(fusedopt.backends())
    assert written["cache"]["folder"] == str(folder / "cache")


def test_wrong_steps_are_found(folder, monkeypatch):
    from fusedopt.backends import cpu

    monkeypatch.setattr(cpu, "update", lambda tables: None)
    result = run()
    assert result.exit_code == 1
    assert "BAD steps on cpu with backend cpu" in result.output
    assert "ok  steps on cpu with backend reference" in result.output


def test_a_backend_that_raises_is_reported(folder, monkeypatch):
    from fusedopt.backends import cpu

    def begin(tables, passes):
        raise RuntimeError("the compiler fell over")

    monkeypatch.setattr(cpu, "begin", begin)
    result = run()
    assert result.exit_code == 1
    assert "the compiler fell over" in result.output


def test_a_cache_that_cannot_be_written(folder, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    result = run()
    assert result.exit_code == 1
    assert "Read-only file system" in result.output
    assert "FUSEDOPT_CACHE_DIR" in result.output


def test_a_file_that_cannot_be_written(folder):
    result = run("--json", str(folder / "missing" / "doctor.json"))
    assert result.exit_code == 2
    assert "cannot be written" in result.output


class OneGpu:
    """What torch says on a machine with a GPU."""

    name, major, minor, total_memory = "NVIDIA H100", 9, 0, 80 << 30


def test_gpus_and_their_driver_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: OneGpu)
    assert doctor._machine()["cuda:0"] == "NVIDIA H100, sm_90, 80 GiB"


def test_builds_for_amd_are_named(monkeypatch):
    assert "ROCm of torch" not in doctor._versions() or torch.version.hip
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert doctor._versions()["ROCm of torch"] == "6.4"


def test_a_package_of_this_version_is_no_checkout(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: fusedopt.__version__)
    assert doctor._versions()["fusedopt"] == fusedopt.__version__


def test_an_error_of_the_harness_is_part_of_the_report(monkeypatch):
    def fail(**_):
        raise RuntimeError("the driver fell over")

    monkeypatch.setattr("fusedopt.testing.verify", fail)
    result = run()
    assert result.exit_code == 1 and "the driver fell over" in result.output
