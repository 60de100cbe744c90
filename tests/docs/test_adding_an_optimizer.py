"""`docs/adding-an-optimizer.md` to the letter: its blocks go into a copy of the sources, which is built and tested."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-an-optimizer.md"
LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "dist",
    "demo_out",
    "*.so",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
)

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW_FILE = re.compile(r"(?://|#|<!--) file: (\S+)(?: -->)?\n(.*)", re.DOTALL)
CHANGE = re.compile(r"--- (\S+)\n(.*)", re.DOTALL)


@dataclass(frozen=True)
class Edit:
    """A block of the page: a new file's text, or a diff whose hunks have no line numbers."""

    path: str
    text: str
    is_new: bool

    def apply(self, folder: Path) -> None:
        file = folder / self.path
        if self.is_new:
            assert not file.exists(), f"{self.path} is there already"
            file.write_text(self.text)
            return
        text = file.read_text()
        for hunk in re.split(r"^@@\n", self.text, flags=re.MULTILINE)[1:]:
            before, after = _sides(hunk)
            # At the beginning of a line, and once: otherwise a reader would not know where either.
            assert f"\n{text}".count(f"\n{before}") == 1, f"{self.path} has not exactly one place for\n{before}"
            text = f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:]
        file.write_text(text)


def _sides(hunk: str) -> tuple[str, str]:
    """What a hunk finds, and what it puts there."""
    lines = hunk.splitlines(keepends=True)
    assert all(line[0] in " +-\n" for line in lines), hunk
    before = "".join(line[1:] or "\n" for line in lines if line[0] in " -\n")
    after = "".join(line[1:] or "\n" for line in lines if line[0] in " +\n")
    return before, after


def edits() -> list[Edit]:
    found = []
    for _, text in FENCE.findall(PAGE.read_text()):
        if match := NEW_FILE.match(text):
            found.append(Edit(match[1], match[2], True))
        elif match := CHANGE.match(text):
            found.append(Edit(match[1], match[2], False))
    return found


def copy_with_edits(folder: Path) -> None:
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    for edit in edits():
        edit.apply(folder)


def test_blocks_fit_the_sources(tmp_path):
    """Every diff finds its place, what comes out is Python, and the header compiles."""
    copy_with_edits(tmp_path)
    changed = {edit.path for edit in edits()}
    assert {"csrc/rules/signum.h", "fusedopt/optim/signum.py", "fusedopt/specs.py", "tests/cases.py"} <= changed
    for path in changed:
        if path.endswith(".py"):
            compile((tmp_path / path).read_text(), path, "exec")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    text = '#include "rules/all.h"\nusing namespace fusedopt::FUSEDOPT_ISA;\n'
    text += "void step(float& p, float g, float (&m)[1]) {\n"
    text += "  double hyper[3] = {1e-4, 0.9, 0.1};\n  Signum::update(p, g, m, Signum::prepare<float>(hyper, 1));\n}\n"
    command = [compiler, "-std=c++17", "-DFUSEDOPT_ISA=trial", "-fsyntax-only", f"-I{tmp_path / 'csrc'}", "-xc++", "-"]
    run = subprocess.run(command, input=text, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def commands() -> list[str]:
    """Of the section that builds and runs."""
    section = PAGE.read_text().partition("## 8. ")[2]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].strip().splitlines()


@pytest.mark.slow  # builds the extension and runs all tests of a rule: some ten minutes on two cores
@pytest.mark.timeout(3600)
def test_the_page_to_the_letter(tmp_path):
    copy_with_edits(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "FUSEDOPT_BASELINE_ONLY": "1",  # quick to build; the same bits
        "CXXFLAGS": "-O1",
        "FUSEDOPT_CACHE_DIR": str(tmp_path / "kernels"),
    }
    for command in commands():
        words = command.replace('"not gpu and not slow"', "not_gpu").split()
        words = ["not gpu and not slow" if word == "not_gpu" else word for word in words]
        words = [sys.executable, *(["-m"] if words[0] == "fusedopt" else []), *words[words[0] == "python" :]]
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout[-5000:]}{run.stderr[-3000:]}"
    kernels = list((tmp_path / "kernels").rglob("*"))
    assert kernels, "fusedopt warmup has compiled nothing"
