"""Line and branch coverage: of fusedopt/ by coverage.py, of the C++ engine by gcov. Reports go to build/coverage.

The C++ part runs its tests on an extension of its own, built with gcc's instrumentation. CUDA kernels are not in either
figure: no tool counts their lines. Needs pytest-cov and gcovr, which ".[test]" brings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "coverage"
LEFT_OUT = ["tests/backends/test_nvrtc.py", "tests/benchmarks", "tests/examples", "tests/mutation"]
"""Of the tests for the Python figure: thousands of kernels compiled one by one, and what is not in fusedopt/."""
CACHE_TESTS = ["tests/backends/test_nvrtc.py", "-k", "not every_kernel and not spill and not local_memory"]
"""What test_nvrtc.py has besides."""
CXX_TESTS = [
    "tests/optim/test_rules.py::test_sizes_and_hard_values",
    "tests/optim/test_rules.py::test_layouts_of_parameters_and_gradients",
    "tests/optim/test_clip.py",
    "tests/optim/test_conversions.py",
    "tests/optim/test_nonfinite.py",
    "tests/optim/test_amp.py::test_any_found_inf_that_is_not_zero_skips",
    "tests/optim/test_format_rounding.py::test_engine_rounds_as_numpy_does",
    "tests/optim/test_formats.py::test_formats_per_group",
    "tests/optim/test_formats.py::test_groups_with_formats_do_not_disturb_each_other",
    "tests/optim/test_format_exactness.py::test_split16_is_an_fp32_master_bit_for_bit",
    "tests/optim/test_int8.py",
    "tests/optim/test_lamb.py",
    "tests/accumulate/test_accumulate.py::test_step_follows_the_reference",
    "tests/accumulate/test_accumulate.py::test_parameters_without_gradients",
    "tests/test_clip_functions.py",
    "tests/cpu/test_engine.py::test_shares_of_several_devices",
    "tests/cpu/test_engine.py::test_unknown_instruction_set_is_an_error",
]
"""A part of the suite that reaches every corner of the engine: instrumented code is slow."""
CXX_FILES = ["csrc/core/", "csrc/rules/", "csrc/formats/", "csrc/cpu/"]


def run(*command: str, **environment: str) -> None:
    """In the root of the repository; ends the program where it fails, but not for tests that fail: see the output."""
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code != 0 and not any("pytest" in part for part in command):
        sys.exit(code)


def measure_python(workers: int) -> None:
    data = {"COVERAGE_FILE": str(OUT / "python")}
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-m", "not slow", "--cov", "--cov-report=")
    ignored = [f"--ignore={path}" for path in LEFT_OUT]
    run(*pytest, *ignored, **data)
    run(*pytest, "--cov-append", *CACHE_TESTS, **data)
    run(sys.executable, "-m", "coverage", "report", "--skip-covered", "--show-missing", **data)
    run(sys.executable, "-m", "coverage", "html", "-q", "-d", str(OUT / "python-html"), **data)


def measure_cxx() -> None:
    """In one process: workers of xdist end without leaving their counts.

    The package is copied beside its own extension; ``pytest`` as a program does not import from where it runs.
    """
    package, objects = OUT / "package", OUT / "objects"
    shutil.rmtree(OUT / "objects", ignore_errors=True)
    build = {
        "CXX": f"{os.environ.get('CXX', 'c++')} --coverage -fprofile-update=atomic",
        "CXXFLAGS": "-O0",
        "FUSEDOPT_BASELINE_ONLY": "1",
    }
    run(sys.executable, "setup.py", "-q", "build", "-b", str(objects), "--build-lib", str(package), **build)
    program = str(Path(sys.executable).parent / "pytest")
    run(program, "-q", "-p", "no:xdist", "-m", "not gpu and not slow", *CXX_TESTS, PYTHONPATH=str(package))
    gcovr = [sys.executable, "-m", "gcovr", "--root", str(ROOT), str(objects)]
    gcovr += [f"--filter={path}" for path in CXX_FILES]
    gcovr += ["--exclude-throw-branches", "--exclude-unreachable-branches", "--merge-lines"]
    run(*gcovr, "--txt-metric=line", "--txt", str(OUT / "cxx-lines.txt"), "--html-details", str(OUT / "cxx.html"))
    run(*gcovr, "--txt-metric=branch", "--txt", str(OUT / "cxx-branches.txt"))
    for name in ("cxx-lines.txt", "cxx-branches.txt"):
        click.echo((OUT / name).read_text())


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(["python", "cxx"]), help="One of the two.")
@click.option("--workers", default=2, show_default=True, help="Processes for the Python tests.")
def main(only: str | None, workers: int) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    if only != "cxx":
        measure_python(workers)
    if only != "python":
        measure_cxx()


if __name__ == "__main__":
    main()
