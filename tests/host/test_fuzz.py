"""A small part of what ``python -m tests.fuzz`` does, without sanitizers; docs/testing.md says how to run all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.fuzz", "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def test_a_few_hundred_inputs(tmp_path):
    """No input crashes, or is answered with anything but an ordinary exception, or writes beside its memory."""
    done = fuzz("--inputs", 400, "--seed", 1, "--json", tmp_path / "fuzz.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "fuzz.json").read_text())
    assert result["inputs"] == 400 and result["findings"] == []
    passes = ("cpu_measure", "cpu_update", "cpu_norm", "cpu_accumulate", "cpu_scale")
    for name in (*passes, "pack_step", "Watch.add", "Table.add"):
        assert result["calls"][name]["done"] and result["calls"][name]["refused"], name


@pytest.mark.parametrize(
    "arguments, message", [(["--inputs", 0], "inputs"), (["--sanitized", "/nowhere"], "make sanitized")]
)
def test_bad_input(arguments, message):
    done = fuzz(*arguments)
    assert done.returncode == 2 and message in done.stderr
