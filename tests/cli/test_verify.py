"""`fusedopt verify`: exit codes, tables, reports, and bad arguments before anything runs."""

import json

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
