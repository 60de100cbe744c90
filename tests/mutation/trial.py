"""Plants a mutant in a copy of the sources, builds what has changed, and runs the tests that should notice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from forker import Forker
from mutants import ROOT, Mutant

__all__ = ["KILLED", "Outcome", "Tree"]

KILLED = "killed"

COPIED = ("csrc", "fusedopt", "tests", "setup.py", "pyproject.toml", "README.md")
PYTEST = ("-q", "-x", "--no-header", "--tb=line", "-rfE", "-p", "no:cacheprovider", "--every-combination")
SECONDS = 300
"""That the tests of one mutant may take. A mutant that makes them hang is killed."""
SOME_FAILED = 1
"""Exit code of pytest; others mean that it could not run the tests."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    name: str
    path: str
    mistake: str
    gpu: bool
    result: str
    """"killed", "survived", "did not build", or "error" where the tests could not be run."""
    by: str
    """The first test that failed, or what else there is to say."""
    seconds: float

    @property
    def is_killed(self) -> bool:
        return self.result == KILLED


class Tree:
    """A copy of the sources in which mutants are planted one after the other.

    device: "cpu" or "cuda", where tests run. build: whether to build the extension there, quickly (the baseline
    instruction set, little optimisation: the same bits); else it is the one that the sources have.
    """

    def __init__(self, path: Path, device: str, build: bool) -> None:
        self.path, self.device = path, device
        leave_out = shutil.ignore_patterns("__pycache__", "results", *([] if not build else ["*.so"]))
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, path / name, ignore=leave_out)
            else:
                shutil.copy2(ROOT / name, path / name)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(path),
            "PYTHONDONTWRITEBYTECODE": "1",  # sources change within a second, which is as exactly as bytecode knows
            "FUSEDOPT_BASELINE_ONLY": "1",
            "CXXFLAGS": "-O1",
            "FUSEDOPT_CACHE_DIR": str(path / "kernels"),
        }
        if device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if build and (problem := self._build()):
            raise RuntimeError(f"mutation: the sources do not build in {path}: {problem}")
        self._forker = Forker(path, self.environment)

    def close(self) -> None:
        self._forker.close()

    def tests_of(self, mutants: Iterable[Mutant]) -> list[str]:
        """Node ids, each once."""
        return list(dict.fromkeys(t.replace("{device}", self.device) for mutant in mutants for t in mutant.tests))

    def check_unchanged(self, mutants: Iterable[Mutant]) -> None:
        """RuntimeError where a test of theirs fails without them, or does not exist: it would prove nothing."""
        code, output = self._pytest(self.tests_of(mutants), 10 * SECONDS)
        if code != 0 or " skipped" in output.splitlines()[-1]:
            raise RuntimeError(f"mutation: tests must pass, and none be skipped, without a mutant:\n{output[-3000:]}")

    def run(self, mutant: Mutant) -> Outcome:
        """Plants it, runs its tests, and puts the file right again."""
        file, start = self.path / mutant.path, time.monotonic()
        right = file.read_text()
        file.write_text(mutant.applied(right))
        try:
            problem = self._build() if mutant.is_compiled else None
            result, by = ("did not build", problem) if problem else self._verdict(mutant)
        finally:
            file.write_text(right)
        return Outcome(
            mutant.name, mutant.path, mutant.mistake, mutant.gpu, result, by, round(time.monotonic() - start, 1)
        )

    def _verdict(self, mutant: Mutant) -> tuple[str, str]:
        code, output = self._pytest(self.tests_of([mutant]))
        if code == -signal.SIGALRM:
            return KILLED, f"no end within {SECONDS} s"
        if code == 0:
            return "survived", ""
        if code < 0:
            return KILLED, f"crash, {signal.Signals(-code).name}"
        if code != SOME_FAILED:
            return "error", output[-300:]
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return KILLED, failed[1] if failed else "pytest"

    def _pytest(self, tests: list[str], seconds: int = SECONDS) -> tuple[int, str]:
        code, output = self._forker.pytest([*PYTEST, *tests], seconds)
        return code, output.strip() or "no output"

    def _build(self) -> str | None:
        """None, or the compiler's first error."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.path, env=self.environment, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        output = done.stdout + done.stderr
        error = re.search(r"^.*error: .*$", output, re.MULTILINE)
        return error[0] if error else output[-300:]
