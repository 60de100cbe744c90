"""`fusedopt verify`: exit codes, tables, reports, and bad arguments before anything runs."""

import importlib
import json
import re

import pytest
from click.testing import CliRunner

from fusedopt.cli import main
from fusedopt.testing import harness

SMALL = ("verify", "--backend", "cpu", "--rule", "adamw-decay", "--format", "float32-None_states", "--case", "zeros")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no line of a message is broken


def command(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_passes(tmp_path):
    path = tmp_path / "r.json"
    result = command(*SMALL, "--json", str(path), "--markdown", str(tmp_path / "r.md"))
    assert result.exit_code == 0, result.output
    count = len(json.loads(path.read_text())["rows"])
    assert f"{count} of {count} cases passed" in result.output and "adamw" in result.output
    assert "other cases were not run (filtered" in result.output
    assert "| adamw | cpu |" in (tmp_path / "r.md").read_text()


def test_fails_with_the_element_that_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend("tests/testing")
    wrong = ("verify", "--optimizer", "wrong_optimizers:EpsInsideTheRoot", "--rule", "adamw", "--dtype", "float32")
    result = command(*wrong, "--case", "mixed", "--transform", "none")
    assert result.exit_code == 1
    assert "FAILED adamw" in result.output and ", element " in result.output


def test_many_failures_are_counted_and_the_page_has_them(monkeypatch, tmp_path):
    """The first are shown. Cases that mean nothing for an optimizer are counted too, with the reason."""
    monkeypatch.setattr(importlib.import_module("fusedopt.cli.verify"), "_SHOWN_FAILURES", 2)
    monkeypatch.syspath_prepend("tests/testing")
    wrong = ("verify", "--optimizer", "wrong_optimizers:EpsInsideTheRoot", "--rule", "adamw", "--dtype", "float32")
    path = tmp_path / "r.html"
    result = command(*wrong, "--transform", "none", "--case", "mixed", "--case", "zeros", "--html", str(path))
    assert result.exit_code == 1, result.output
    failed = int(re.search(r"and (\d+) more: --json or --html has all", result.output)[1]) + 2
    assert result.output.count("FAILED adamw") == 2 < failed
    assert path.read_text().count("/mixed") >= 1


def test_cases_that_mean_nothing(monkeypatch):
    """An optimizer without a counter that can be set is not judged at 2^24; where no other case is left, that is an
    error."""
    monkeypatch.syspath_prepend("tests/testing")
    optimizer = "wrong_optimizers:make_without_counter"
    without = ("verify", "--optimizer", optimizer, "--rule", "adamw", "--dtype", "float32", "--transform", "none")
    result = command(*without, "--case", "late_counters")
    assert result.exit_code == 2 and "no case means anything for" in result.output
    result = command(*without, "--case", "late_counters", "--case", "zeros")
    assert "cases were left out: it has no step counter that can be set" in result.output


def test_quick_says_what_it_left_out():
    result = command("verify", "--quick", "--optimizer", "torch.optim:SGD", "--rule", "sgd", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "other cases were not run (--quick runs a sample" in result.output


def test_list():
    result = command(*SMALL, "--list")
    assert result.exit_code == 0 and "adamw-decay/float32-None_states/cpu/" in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--case", "zeroes"), "case: got 'zeroes', which none of"),
        (("--optimizer", "no_such_module:X"), "no_such_module cannot be imported"),
        (("--optimizer", "torch.optim:LBFGS"), "no rule is known by that name"),
        (("--optimizer", "builtins:object", "--rule", "adamw"), "cannot be built"),
        (("--device", "nowhere"), "which torch cannot use here"),
        (("--json", "no/such/folder/r.json"), "no/such/folder/r.json cannot be written"),
        (("--html", "no/such/folder/r.html"), "no/such/folder/r.html cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_before_any_case_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(harness, "run_cases", lambda *_: pytest.fail("ran"))
    result = command("verify", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_html_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = command(*SMALL, "--html", str(tmp_path / "r.html"))
    assert result.exit_code == 2 and 'pip install "fusedopt[bench]"' in result.output
    assert not (tmp_path / "r.html").exists()


@pytest.mark.slow
def test_the_quick_sample_passes():
    result = command("verify", "--quick")
    assert result.exit_code == 0, result.output


def test_cases_that_were_not_reached_fail_the_run():
    result = command("verify", "--rule", "sgd", "--quick", "--jobs", "1", "--time-limit", "0")
    assert result.exit_code == 1
    assert "cases were not reached within the time limit" in result.output and "1 of 1 cases passed" in result.output


def test_processes_that_fail_are_told(monkeypatch):
    def fail(**_):
        raise RuntimeError("verify: 3 processes ended, one after the other; try jobs=1")

    monkeypatch.setattr(harness, "verify", fail)
    result = command(*SMALL)
    assert result.exit_code == 1 and "Error: verify: 3 processes ended" in result.output
