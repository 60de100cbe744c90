"""Line and branch coverage: of fusedopt/ by coverage.py, of the C++ engine by gcov. Reports go to build/coverage, the
figures to tests/results/coverage.json and docs/correctness.md.

The C++ part runs its tests on an extension of its own, built with gcc's instrumentation. CUDA kernels are not in either
figure: no tool counts their lines. Needs pytest-cov and gcovr, which ".[test]" brings.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "coverage"
RESULTS = ROOT / "tests" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "correctness.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"
LEFT_OUT = ["tests/examples", "tests/mutation"]
"""Of the tests for the Python figure: what is not about fusedopt/."""
SLOW = ["tests/backends/test_every_kernel.py::test_every_kernel_compiles"]
"""Not either: thousands of kernels, compiled one by one. The test that they are all there is run."""
GOAL = 95
"""Percent of the lines and of the branches of each file; files below are named."""
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
    "tests/accumulate/test_accumulate.py::test_weights",
    "tests/accumulate/test_accumulate.py::test_a_weight_tensor_may_be_written_to",
    "tests/optim/test_offload.py::test_any_number_of_buffers",
    "tests/test_clip_functions.py",
    "tests/cpu/test_engine.py::test_shares_of_several_devices",
    "tests/cpu/test_engine.py::test_unknown_instruction_set_is_an_error",
    "tests/cpu/test_engine.py::test_empty_instruction_set_is_none",
    "tests/cpu/test_engine.py::test_bfloat16_is_float32_rounded_after_each_step",
    "tests/cpu/test_engine.py::test_wrong_codes_are_refused",
    "tests/cpu/test_engine.py::test_what_measures_nothing_is_refused",
    "tests/cpu/test_engine.py::test_accumulation_without_main_gradients_is_refused",
    "tests/optim/test_variants.py",
    "tests/test_structure.py::test_specs_agree_with_cxx_rules",
]
"""A part of the suite that reaches every corner of the engine: instrumented code is slow."""
CXX_SLOW = ["tests/optim/test_int8.py::test_int8_updates_stay_small_on_heavy_tails"]
"""Not of them."""
CXX_FILES = ["csrc/core/", "csrc/rules/", "csrc/formats/", "csrc/cpu/"]


def run(*command: str, **environment: str) -> None:
    """In the root of the repository; ends the program where it fails, but not for tests that fail: see the output."""
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if code != 0 and not any("pytest" in part for part in command):
        sys.exit(code)


def measure_python(workers: int, sample: int) -> dict[str, Counter]:
    """Counts of every file of fusedopt/."""
    data = {"COVERAGE_FILE": str(OUT / "python")}
    pytest = (sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-m", "not slow", "--cov", "--cov-report=")
    chosen = [f"--ignore={path}" for path in LEFT_OUT] + [f"--deselect={name}" for name in SLOW]
    chosen += [f"--sample={sample}"] if sample else []
    run(*pytest, "--dist", "worksteal", *chosen, **data)
    mend_interpreted(OUT / "python")
    return report_python()


def mend_interpreted(path: Path) -> None:
    """Of branches that leave a kernel of Triton: its interpreter compiles kernels anew, without their decorators.

    Coverage names a way out of a function by the function's first line, which is that of a decorator; the copy's is
    that of ``def``. Without this no such branch would count as taken.
    """
    from coverage import CoverageData

    data = CoverageData(str(path))
    data.read()
    for name in data.measured_files():
        if name.startswith("fusedopt/triton/"):
            functions = [
                each for each in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(each, ast.FunctionDef)
            ]
            first = {-each.lineno: -each.decorator_list[0].lineno for each in functions if each.decorator_list}
            data.add_arcs({name: [(start, first[end]) for start, end in data.arcs(name) or () if end in first]})


def report_python() -> dict[str, Counter]:
    data = {"COVERAGE_FILE": str(OUT / "python")}
    coverage = (sys.executable, "-m", "coverage")
    run(*coverage, "report", "--skip-covered", "--show-missing", **data)
    run(*coverage, "html", "-q", "-d", str(OUT / "python-html"), **data)
    run(*coverage, "json", "-q", "-o", str(OUT / "python.json"), **data)
    files = json.loads((OUT / "python.json").read_text())["files"]
    names = {"covered_lines": "lines", "covered_branches": "branches"}
    names |= {"num_statements": "all_lines", "num_branches": "all_branches"}
    return {path: Counter({names[key]: file["summary"][key] for key in names}) for path, file in files.items()}


def measure_cxx() -> dict[str, Counter]:
    """Counts of every file of the engine, its rules and formats.

    In one process: workers of xdist end without leaving their counts. The package is copied beside its own extension;
    ``pytest`` as a program does not import from where it runs.
    """
    package, objects = OUT / "package", OUT / "objects"
    shutil.rmtree(OUT / "objects", ignore_errors=True)
    build = {
        "CXX": f"{os.environ.get('CXX', 'c++')} --coverage -fprofile-update=atomic -DFUSEDOPT_HD=inline",
        "CXXFLAGS": "-O0",
        "FUSEDOPT_BASELINE_ONLY": "1",
    }
    run(sys.executable, "setup.py", "-q", "build", "-b", str(objects), "--build-lib", str(package), **build)
    program = str(Path(sys.executable).parent / "pytest")
    chosen = ["-m", "not gpu and not slow", "--sample=1", *(f"--deselect={name}" for name in CXX_SLOW), *CXX_TESTS]
    one_thread = {"OMP_NUM_THREADS": "1"}  # several would wait for each other's counts
    run(program, "-q", "-p", "no:xdist", *chosen, PYTHONPATH=str(package), **one_thread)
    return report_cxx()


def report_cxx() -> dict[str, Counter]:
    gcovr = [sys.executable, "-m", "gcovr", "--root", str(ROOT), str(OUT / "objects")]
    gcovr += [f"--filter={path}" for path in CXX_FILES]
    gcovr += ["--exclude-throw-branches", "--exclude-unreachable-branches", "--merge-lines"]
    gcovr += ["--html-details", str(OUT / "cxx.html"), "--json-summary", str(OUT / "cxx.json")]
    run(*gcovr, "--txt", str(OUT / "cxx.txt"))
    click.echo((OUT / "cxx.txt").read_text())
    names = {"line_covered": "lines", "line_total": "all_lines", "branch_covered": "branches"}
    names["branch_total"] = "all_branches"
    files = json.loads((OUT / "cxx.json").read_text())["files"]
    return {file["filename"]: Counter({names[key]: file[key] for key in names}) for file in files}


# ---- the record ----------------------------------------------------------------------------------------------------


def left_out() -> dict[str, str]:
    """Files that pyproject.toml keeps out of the Python figure, with the reason that stands there."""
    listed = (ROOT / "pyproject.toml").read_text().partition("\nomit = [")[2].partition("\n]")[0]
    return dict(re.findall(r'"\*/([^"]+)",\s*# (.*)', listed))


def record(part: str, files: dict[str, Counter], how: str) -> None:
    """Puts one of the two parts into the JSON; the other stays as it is."""
    from fusedopt.testing.report import environment

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = os.environ.get("FUSEDOPT_COMMIT") or git.stdout.strip() or None
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    made = {**environment("cpu"), "commit": commit, "command": how}
    parts[part] = {**made, **total(files.values()), "files": dict(sorted(files.items()))}
    parts["left_out"] = left_out()
    RESULTS.write_text(json.dumps(parts, indent=1) + "\n")


def total(counts: Iterable[Counter]) -> Counter:
    whole: Counter = Counter()
    for count in counts:
        whole.update(count)
    return whole


def percent(covered: int, all_: int) -> str:
    return f"{100 * covered / all_:.1f} % of {all_:,}" if all_ else "–"


def table(parts: dict[str, Any]) -> list[str]:
    """Markdown: a line for each folder and for each of the two wholes."""
    lines = ["| | lines | branches |", "| --- | --- | --- |"]
    for part, name in (
        ("python", "`fusedopt/`, by coverage.py"),
        ("cxx", "`csrc/`: rules, formats, CPU engine, by gcov"),
    ):
        folders = defaultdict(list)
        for path, counts in parts.get(part, {}).get("files", {}).items():
            folders[str(Path(path).parent)].append(counts)
        rows = [(f"**{name}**", parts[part])] if part in parts else []
        rows += [(f"`{folder}/`", total(map(Counter, counts))) for folder, counts in sorted(folders.items())]
        for label, count in rows:
            cells = (percent(count[key], count[f"all_{key}"]) for key in ("lines", "branches"))
            lines.append("| " + " | ".join((label, *cells)) + " |")
    lines += [""]
    for part in ("python", "cxx"):
        if part in parts:
            made = parts[part]
            lines.append(
                f"`{made['command']}`: {made['device']}, Python {made['python']}, torch {made['torch']}, "
                f"Triton {made['triton']}, {made['date'][:10]}, commit {(made['commit'] or '?')[:7]}.  "
            )
    reasons = "; ".join(f"`{path}` ({reason})" for path, reason in parts.get("left_out", {}).items())
    return [*lines, f"Not counted: {reasons}."]


def below_goal(files: dict[str, Counter]) -> list[str]:
    """A line for each file with fewer lines or branches covered than the goal, those with most to do first."""
    found = []
    for path, count in files.items():
        shares = [100 * count[key] / (count[f"all_{key}"] or 1) for key in ("lines", "branches") if count[f"all_{key}"]]
        if shares and min(shares) < GOAL:
            missed = [count[f"all_{key}"] - count[key] for key in ("branches", "lines")]
            cells = (f"{percent(count[key], count[f'all_{key}'])} {key}" for key in ("lines", "branches"))
            found.append((missed, f"{path}: {', '.join(cells)}"))
    return [line for _, line in sorted(found, reverse=True)]


def tell(files: dict[str, Counter]) -> None:
    """The whole, and every file below the goal."""
    whole, below = total(files.values()), below_goal(files)
    click.echo(f"lines {percent(whole['lines'], whole['all_lines'])}, ", nl=False)
    click.echo(f"branches {percent(whole['branches'], whole['all_branches'])}")
    click.echo("\n".join([f"{len(below)} files below {GOAL} %:", *below] if below else [f"every file: {GOAL} %"]))


def write_table() -> None:
    """Between the marks of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    text = "\n".join(table(json.loads(RESULTS.read_text())))
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(["python", "cxx"]), help="One of the two.")
@click.option("--workers", default=2, show_default=True, help="Processes for the Python tests.")
@click.option("--sample", default=1, show_default=True, help="Combinations of each Python test; 0 for all.")
@click.option("--report", is_flag=True, help="Run nothing; count what the last runs have left.")
def main(only: str | None, workers: int, sample: int, report: bool) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    how = "python tests/measure_coverage.py --only"
    if only != "cxx":
        files = report_python() if report else measure_python(workers, sample)
        tell(files)
        record("python", files, f"{how} python --sample {sample}")
    if only != "python":
        files = report_cxx() if report else measure_cxx()
        tell(files)
        record("cxx", files, f"{how} cxx")
    write_table()


if __name__ == "__main__":
    main()
