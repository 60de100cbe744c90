"""The command ``fusedopt bench``: a smoke run on the CPU engine, comparing, plotting, bad input."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from fusedopt.cli import main

QUICK = ["bench", "--device", "cpu", "--quick", "--threads", "1"]


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "result.json"
    done = invoke(*QUICK, "--against", "torch-fused,apex", "--json", path, "--plots", folder / "plots")
    assert done.exit_code == 0, done.output
    return path, done.output


def test_a_quick_run_measures_the_cpu_engine(run):
    path, output = run
    result = json.loads(path.read_text())
    assert (result["device_type"], result["torch"]) == ("cpu", torch.__version__)
    cases = {(row["format"], row["contract"], row["library"]) for row in result["rows"]}
    assert {("fp32", "clip_step", "fusedopt-cpu"), ("fp32", "clip_step", "torch-fused")} <= cases
    assert {("bf16+split16", "step", "fusedopt-cpu"), ("bf16", "accumulate", "fusedopt-cpu")} <= cases
    assert all(row["error"] is None and row["wall_ms"] > 0 for row in result["rows"])
    assert result["left_out"] == [] and result["missing_libraries"] == {}  # apex is for GPUs
    assert "torch-fused" in output and "triad" in output
    assert "apex has nothing to compare with these cases on cpu" in output


def test_plots_are_drawn(run):
    path, _ = run
    assert (path.parent / "plots" / "memory-per-parameter.png").stat().st_size > 5000


def test_a_time_limit_leaves_out_every_case(tmp_path):
    path = tmp_path / "result.json"
    done = invoke(*QUICK, "--against", "none", "--time-limit", "0", "--json", path)
    assert done.exit_code == 0 and "left out by the time limit" in done.output
    assert len(json.loads(path.read_text())["left_out"]) == 3


def test_a_run_goes_on_with_what_an_earlier_one_has_left_out(tmp_path):
    path = tmp_path / "result.json"
    case = [*QUICK, "--against", "none", "--workload", "tiny", "--contract", "step"]
    done = invoke(*case, "--resume")
    assert done.exit_code == 2 and "name it with --json" in done.output
    done = invoke(*case, "--resume", "--json", path)
    assert done.exit_code == 2 and "cannot be read" in done.output
    assert invoke(*case, "--json", path).exit_code == 0
    first = json.loads(path.read_text())["rows"]
    assert invoke(*case, "--format", "bf16", "--format", "fp32", "--resume", "--json", path).exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["format"] for row in rows] == ["fp32", "bf16"] and rows[0]["wall_ms"] == first[0]["wall_ms"]


def test_names_are_listed():
    output = "".join(invoke("bench", "--list", "--device", "cpu").output.split())
    for name in ("gpt2-124M", "bf16+split16", "accumulate", "torch-captured", "apex"):
        assert name in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workload", "gpt5"], ["got 'gpt5'", "gpt2-124M"]),
        (["--format", "fp8"], ["got 'fp8'", "bf16+split16"]),
        (["--contract", "leap"], ["got 'leap'", "clip_step"]),
        (["--optimizer", "muon2"], ["got 'muon2'", "adamw"]),
        (["--against", "torch-fused,apx"], ["got 'apx'", "apex", "flashoptim"]),
        (["--suite", "standard", "--workload", "tiny"], ["has no such case", "leave out --suite"]),
        (["--rounds", "0"], ["--rounds"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(arguments, expected):
    done = invoke(*QUICK, *arguments)
    assert done.exit_code == 2
    assert all(text in done.output for text in expected), done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_cuda_without_a_gpu_is_refused():
    done = invoke("bench", "--device", "cuda", "--quick")
    assert done.exit_code == 2 and "torch finds no GPU here" in done.output


def test_outputs_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for option, expected in (("--json", "cannot be written"), ("--plots", "cannot be made")):
        done = invoke(*QUICK, option, tmp_path / "file" / "below")
        assert done.exit_code == 2 and expected in done.output, done.output


def test_compare_has_an_exit_code(run, tmp_path):
    path, _ = run
    same = invoke("bench", "compare", path, path)
    assert same.exit_code == 0 and " 0 regressed" in same.output
    slow = json.loads(path.read_text()) | {"device": "another"}
    for row in slow["rows"]:
        for key in ("wall_ms", "wall_ms_q1", "wall_ms_q3"):
            row[key] *= 1000
    other = tmp_path / "slow.json"
    other.write_text(json.dumps(slow))
    done = invoke("bench", "compare", path, other)
    assert done.exit_code == 1 and "REGRESSION" in done.output
    assert "WARNING: different device" in done.output
    back = invoke("bench", "compare", other, path)
    assert back.exit_code == 0 and "faster" in back.output


def test_compare_and_plot_refuse_what_they_cannot_use(run, tmp_path):
    path, _ = run
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": [], "device": "another"}))
    for arguments, expected in (
        (["compare", path, tmp_path / "none.json"], "cannot be read"),
        (["compare", path, other], "no row in common"),
        (["plot", path, other, "--out", tmp_path / "plots"], "different devices"),
    ):
        done = invoke("bench", *arguments)
        assert done.exit_code == 2 and expected in done.output.replace("\n", " "), done.output


def test_plot_reads_what_was_written(run, tmp_path):
    path, _ = run
    done = invoke("bench", "plot", path, "--out", tmp_path)
    assert done.exit_code == 0 and (tmp_path / "memory-per-parameter.svg").exists()


def test_rounds_are_those_that_were_asked_for(tmp_path):
    path = tmp_path / "result.json"
    asked = ("bench", "--device", "cpu", "--quick", "--workload", "tiny", "--contract", "step", "--rounds", "2")
    done = invoke(*asked, "--json", path)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert result["method"]["order"].startswith("libraries in turns, 2 rounds")
    assert {row["workload"] for row in result["rows"]} == {"tiny"}


def test_compare_writes_what_changed(run, tmp_path):
    path, _ = run
    fewer = json.loads(path.read_text())
    last = fewer["rows"].pop()
    other, out = tmp_path / "fewer.json", tmp_path / "changes.json"
    other.write_text(json.dumps(fewer))
    done = invoke("bench", "compare", path, other, "--all", "--json", out)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert f"{last['library']}: only in the first" in done.output.replace("\n", "")
    assert len(written["only"]) == 1 and {change["verdict"] for change in written["changes"]} == {"same"}


@pytest.mark.parametrize(("module", "arguments"), [("numpy", ("--list",)), ("matplotlib", ("--plots", "plots"))])
def test_what_is_not_installed_is_named_with_the_remedy(module, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    done = invoke(*QUICK, *arguments)
    assert done.exit_code == 2 and f"{module}, which is not installed" in done.output.replace("\n", " ")
    assert 'pip install "fusedopt[bench]"' in done.output


def test_a_file_that_cannot_be_plotted(tmp_path):
    done = invoke("bench", "plot", tmp_path / "none.json", "--out", tmp_path / "plots")
    assert done.exit_code == 2 and "cannot be read" in done.output.replace("\n", " ")
