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
