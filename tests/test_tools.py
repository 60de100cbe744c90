"""The tools of `tests/tools`: what they make of reports, and of things that are missing."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from fusedopt.testing import cases, data, variants

TOOLS = Path(__file__).parent / "tools"


def load(name: str, folder: Path = TOOLS):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sanitize, verify_table = load("sanitize"), load("verify_table")
coverage = load("measure_coverage", TOOLS.parent)


# ---- compute-sanitizer ---------------------------------------------------------------------------------------------

MEMCHECK = """========= COMPUTE-SANITIZER
case: cuda a: passed
========= Invalid __global__ write of size 4 bytes
=========     at fusedopt_entry+0x1a0
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: update_pass in libsomething.so
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<512, 1>(T3)+0x410
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: fusedopt_entry
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at norm_pass+0x150 in /x/norm.py:158
=========     and Read access at norm_pass+0x220 in /x/norm.py:160 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_findings_are_those_of_our_kernels():
    write, read = sanitize.parse_findings(MEMCHECK)
    assert write.splitlines()[0] == "Invalid __global__ write of size 4 bytes" and "out of bounds" in write
    assert sanitize.is_ours(write) and not sanitize.is_ours(read)
    (race,) = sanitize.parse_findings(RACECHECK)
    assert sanitize.is_ours(race) and "32 hazards" in race
    assert not sanitize.parse_findings("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")


def report(tmp_path, text: str, limit: float = 60.0, expected: int = 1):
    """Of a program that writes this text in place of a sanitizer."""
    (tmp_path / "output").write_text(text)
    script = "import sys, time; print(open(sys.argv[1]).read(), flush=True); time.sleep(float(sys.argv[2]))"
    seconds = "0" if limit > 30 else "60"
    command = [sys.executable, "-c", script, str(tmp_path / "output"), seconds]
    return sanitize.report_of("memcheck", sanitize.run_limited([("memcheck", command)], limit), expected)


def test_a_report_counts_findings_and_cases(tmp_path):
    found = report(tmp_path, MEMCHECK)
    assert (found["findings"], found["findings_elsewhere"], found["cases_done"]) == (1, 1, 1)
    assert found["summary"] == ["ERROR SUMMARY: 2 errors"] and not sanitize.is_clean(found)
    assert "1 findings in our kernels, 1 elsewhere" in sanitize.describe(found)
    clean = report(tmp_path, "case: cuda a: passed\n========= ERROR SUMMARY: 0 errors")
    assert sanitize.is_clean(clean)


@pytest.mark.parametrize(
    "text",
    [
        "========= ERROR SUMMARY: 0 errors",  # no case was reached
        "case: cuda a: passed",  # no tool has looked
        "case: cuda a: step 1, element 3 is wrong\n========= ERROR SUMMARY: 0 errors",
    ],
)
def test_a_run_that_shows_nothing_is_not_clean(text, tmp_path):
    assert not sanitize.is_clean(report(tmp_path, text))


def test_a_tool_is_stopped_at_its_limit(tmp_path):
    stopped = report(tmp_path, "case: cuda a: passed", limit=3.0, expected=2)
    assert not stopped["finished"] and stopped["cases_done"] == 1 and stopped["seconds"] < 30
    assert not sanitize.is_clean(stopped) and "stopped at the limit" in sanitize.describe(stopped)


FAKE = """\
import subprocess, sys, time
if "--version" in sys.argv:
    sys.exit(print("fake 1.0"))
tool = sys.argv[sys.argv.index("--tool") + 1]
if tool == "racecheck":
    time.sleep(60)
print("case: cuda a: passed")
print("========= ERROR SUMMARY: 0 errors")
"""


def test_every_tool_is_reported_when_it_ends_and_all_at_the_limit(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "fake"
    fake.write_text(f"#!{sys.executable}\n{FAKE}")
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize, "child_commands", lambda backends, shares: [["true"]] * shares)
    monkeypatch.setattr("fusedopt.testing.environment", lambda device: {"device": device})
    monkeypatch.setattr(sanitize, "jobs", lambda backend: [("a", None)] * 2)
    written = tmp_path / "sanitizer.json"
    chosen = sanitize.arguments(["--limit", "4", "--jobs", "8", "--json", str(written)])
    assert sanitize.sanitize(chosen, str(fake), ["cuda"]) == 1
    out = capsys.readouterr().out
    assert "memcheck: 0 findings in our kernels, 0 elsewhere; 2 of 2 cases" in out and "racecheck" in out
    found = {report["tool"]: report for report in json.loads(written.read_text())["tools"]}
    assert [tool for tool, report in found.items() if sanitize.is_clean(report)] == [
        "memcheck", "initcheck", "synccheck",
    ]  # fmt: skip
    assert not found["racecheck"]["finished"] and found["racecheck"]["processes"] == 2


def test_a_missing_sanitizer_is_said(capsys):
    assert sanitize.main(["--sanitizer", "/no/such/compute-sanitizer"]) == 2
    assert "was not found at /no/such/compute-sanitizer" in capsys.readouterr().err


def test_the_sanitized_cases_exist():
    formats = {str(form) for form in cases.FORMATS}
    for variant, form, transform, values in sanitize.KINDS:
        assert variant in variants.BY_NAME and form in formats
        assert data.BY_NAME[values].suits(variants.BY_NAME[variant].rule, transform)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_sanitized_cases_pass(backend, capsys):
    if backend not in sanitize.available_backends():
        pytest.skip(f"backend {backend!r} cannot run here")
    assert sanitize.run_cases([backend]) == 0, capsys.readouterr().out


# ---- the table of the documentation --------------------------------------------------------------------------------


def record(**changes) -> dict:
    row = {"rule": "adamw", "format": "bfloat16-split16-int8_states", "backend": "cpu", "largest_ulp": 1.5}
    row |= {"passed": True, "left_out": None, **changes}
    environment = {"subject": "fusedopt", "device": "x86_64 CPU", "torch": "2.13.0", "date": "2026-11-22T10:00:00"}
    summary = {"cases": 2, "failed": 0, "not_run": 0, "unreached": 0}
    made = {**environment, "command": "fusedopt verify", "seconds": 1.0}
    return {"environment": made, "summary": summary, "rows": [row, row]}


def write_table(tmp_path, page: str, *records: dict) -> int:
    (tmp_path / "page.md").write_text(page)
    paths = []
    for i, each in enumerate(records):
        paths.append(str(tmp_path / f"{i}.json"))
        Path(paths[-1]).write_text(json.dumps(each))
    return verify_table.main([*paths, "--page", str(tmp_path / "page.md")])


PAGE = f"before\n{verify_table.BEGIN}\nold\n{verify_table.END}\nafter\n"


def test_tables_replace_what_was_there(tmp_path):
    failed = record(backend="cuda", passed=False, largest_ulp="inf")
    assert write_table(tmp_path, PAGE, record(), failed) == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| adamw | int8 | 2: 1.50 |" in text and "| adamw | int8 | 2: inf, **2 failed** |" in text
    assert write_table(tmp_path, text, failed) == 0
    assert (tmp_path / "page.md").read_text() == text  # the other backend's table stays


def test_a_table_says_what_the_time_limit_left_out(tmp_path):
    late = record(backend="cuda")
    late["summary"]["unreached"] = 1234
    assert write_table(tmp_path, PAGE, late) == 0
    assert "2 cases, 0 failed. The time limit left out 1,234 cases of the run." in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("page", "found", "message"),
    [
        ("no marks", record(), "expected one <!-- verify: begin -->"),
        (PAGE, {}, "expected the JSON of `fusedopt verify --json`"),
        (PAGE, {**record(), "rows": []}, "it has no rows"),
        (PAGE, {**record(), "environment": {"subject": "torch.optim:AdamW"}}, "run verify without --optimizer"),
    ],
)
def test_bad_reports_leave_the_page_alone(page, found, message, tmp_path, capsys):
    assert write_table(tmp_path, page, found) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page


def test_the_page_has_the_marks():
    page = verify_table.PAGE.read_text()
    assert verify_table.BEGIN in verify_table.replaced(page, {})


# ---- coverage -------------------------------------------------------------------------------------------------------


def counts(lines, all_lines, branches, all_branches):
    return Counter(lines=lines, all_lines=all_lines, branches=branches, all_branches=all_branches)


def test_files_below_the_goal_are_named(capsys):
    """Those with most branches to do first; files without branches are judged by their lines."""
    files = {
        "a.py": counts(95, 100, 0, 0),
        "b.py": counts(94, 100, 20, 20),
        "c.py": counts(100, 100, 10, 20),
        "d.py": counts(0, 0, 0, 0),
    }
    coverage.tell(files)
    assert capsys.readouterr().out.splitlines() == [
        "lines 96.3 % of 300, branches 75.0 % of 40",
        "2 files below 95 %:",
        "c.py: 100.0 % of 100 lines, 50.0 % of 20 branches",
        "b.py: 94.0 % of 100 lines, 100.0 % of 20 branches",
    ]
    coverage.tell({"a.py": files["a.py"]})
    assert "every file: 95 %" in capsys.readouterr().out


def test_ways_out_of_interpreted_kernels_are_those_of_their_sources(tmp_path, monkeypatch):
    """The copy begins with `def`, in line 2, the source with its decorator."""
    data = pytest.importorskip("coverage").CoverageData(str(tmp_path / "data"))
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    kernel = tmp_path / "fusedopt" / "triton" / "kernel.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("@jit\ndef pass_(x):\n    if x:\n        x()\n\n\ndef plain(x):\n    x()\n")
    data.add_arcs({"fusedopt/triton/kernel.py": [(3, 4), (3, -2), (8, -7)], "fusedopt/plan.py": [(3, -2)]})
    coverage.mend_interpreted(tmp_path / "data")
    mended = type(data)(str(tmp_path / "data"))
    mended.read()
    assert set(mended.arcs("fusedopt/triton/kernel.py")) == {(3, 4), (3, -2), (3, -1), (8, -7)}
    assert mended.arcs("fusedopt/plan.py") == [(3, -2)]


def test_files_that_are_left_out_have_a_reason():
    assert coverage.left_out()["fusedopt/backends/cuda.py"].startswith("launches on a GPU")
