"""The convergence benchmark: a smoke run of the command, and its verdict on made-up losses."""

import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks import convergence
from benchmarks.convergence import BASELINE, DIFFERS, FORMATS, QUICK, UNJUDGED, WITHIN, Training, summarize

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Of parameters, master and states, for tensors large enough for 8 bits; the tiny model has smaller ones as well.
BYTES_PER_PARAM = {
    "fp32": 12,
    "master": 14,
    "split16": 12,
    "split8": 11,
    "stochastic": 6,
    "int8": 6,
    "split8-int8": 5,
    "lion": 8,
    "lion-int8": 5,
}


def command(*options) -> subprocess.CompletedProcess:
    program = [sys.executable, ROOT / "benchmarks" / "convergence.py", *map(str, options)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    path = tmp_path_factory.mktemp("convergence") / "out" / "convergence.json"
    run = command("--device", "cpu", "--quick", "--threads", 1, "--json", path)
    assert run.returncode == 0, run.stdout + run.stderr
    return path, json.loads(path.read_text()), run.stdout


def test_result_says_where_it_was_made_and_holds_every_run(outcome):
    _, result, _ = outcome
    assert result["torch"] == torch.__version__
    assert {"device", "driver", "commit", "date", "settings", "jobs", "wall_s"} <= result.keys()
    assert result["left_out"] == []
    assert sorted((run["format"], run["seed"]) for run in result["runs"]) == sorted(
        (name, seed) for name in FORMATS for seed in (0, 1)
    )


def test_every_format_learns_the_text(outcome):
    _, result, _ = outcome
    for run in result["runs"]:
        assert run["error"] is None
        steps = [point[0] for point in run["curve"]]
        assert steps == sorted(set(steps)) and steps[-1] == QUICK.steps
        assert run["final_val_loss"] == run["curve"][-1][2] < run["curve"][0][2] < math.log(256)
        assert run["wall_s"] > 0


def test_memory_is_that_of_the_format(outcome):
    _, result, _ = outcome
    for run in result["runs"]:
        resting = sum(run["bytes_per_param"][role] for role in convergence.RESTING_ROLES)
        assert BYTES_PER_PARAM[run["format"]] <= resting < BYTES_PER_PARAM[run["format"]] + 0.3
        beside_params = resting - run["bytes_per_param"]["param"]
        assert beside_params < run["checkpoint_bytes"] / run["parameters"] < beside_params + 0.5


def test_table_and_plot_come_from_the_json_alone(outcome, tmp_path):
    path, result, stdout = outcome
    image = tmp_path / "images" / "convergence.png"
    again = command("--from", path, "--plot", image)
    assert again.returncode == 0, again.stdout + again.stderr
    assert image.read_bytes().startswith(PNG_SIGNATURE)
    table = [line for line in again.stdout.splitlines() if line]
    assert table and all(line in stdout for line in table)
    for form in FORMATS.values():
        assert form.label in again.stdout
    assert result["summary"] == json.loads(json.dumps(summarize(result["runs"])))


def test_a_time_limit_leaves_out_what_it_names(tmp_path):
    path = tmp_path / "convergence.json"
    options = ("--device", "cpu", "--quick", "--format", "fp32", "--steps", 1, "--time-limit", 0, "--json", path)
    run = command(*options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "left out by the time limit: fp32, seed 0; fp32, seed 1" in run.stdout
    assert json.loads(path.read_text())["runs"] == []


# ---- what the runs of a seed share ------------------------------------------------------------------------------


def test_runs_of_a_seed_share_weights_and_batches():
    first = Training(QUICK, FORMATS["fp32"], CPU)
    for name in FORMATS:
        other = Training(QUICK, FORMATS[name], CPU)
        assert torch.equal(other.starts, first.starts)
        for ours, theirs in zip(other.model.parameters(), first.model.parameters(), strict=True):
            assert torch.equal(ours.float(), theirs.float())


def test_seeds_differ_but_are_judged_on_the_same_text():
    one, two = (Training(convergence.replace(QUICK, seed=seed), FORMATS["fp32"], CPU) for seed in (0, 1))
    assert not torch.equal(one.starts, two.starts)
    assert not torch.equal(one.model.token.weight, two.model.token.weight)
    assert torch.equal(torch.cat(one.validation_starts), torch.cat(two.validation_starts))


# ---- the verdict ------------------------------------------------------------------------------------------------


def made_up(name: str, losses: list[float | None]) -> list[dict]:
    return [
        {
            "format": name,
            "seed": seed,
            "curve": [[1, 3.0, 3.0], [2, loss, loss]],
            "final_val_loss": loss,
            "wall_s": 1.0,
            "parameters": 100,
            "bytes_per_param": {"param": 4, "master": 0, "states": 8, "scales": 0.5, "steps": 0.1, "grad": 4},
            "checkpoint_bytes": 1234,
            "error": None,
        }
        for seed, loss in enumerate(losses)
    ]


FP32 = [1.00, 1.02, 1.04]  # spread 0.02


def judged(*runs: list[dict]) -> dict[str, dict]:
    return {row["format"]: row for row in summarize(list(chain.from_iterable(runs)))}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.00, 1.02, 1.04], WITHIN),
        ([1.019, 1.039, 1.059], WITHIN),
        ([1.021, 1.041, 1.061], DIFFERS),
        ([0.97, 0.99, 1.01], DIFFERS),  # better is different too
        ([1.04, 1.02, 1.00], WITHIN),  # no difference in the mean
        ([1.00, 1.02, None], DIFFERS),  # not finite
    ],
)
def test_verdict_is_the_mean_difference_against_the_spread(losses, expected):
    row = judged(made_up("fp32", FP32), made_up("int8", losses))["int8"]
    assert row["verdict"] == expected


def test_summary_worked_out_by_hand():
    rows = judged(made_up("fp32", FP32), made_up("split8", [1.05, 1.06, 1.10]), made_up("master", [1.01, 1.03, 1.05]))
    base, split8, master = rows["fp32"], rows["split8"], rows["master"]
    assert base["verdict"] == BASELINE and base["mean"] == pytest.approx(1.02)
    assert base["spread"] == split8["baseline_spread"] == pytest.approx(0.02)
    assert list(split8["differences"].values()) == pytest.approx([0.05, 0.04, 0.06])
    assert split8["mean_difference"] == pytest.approx(0.05)
    assert split8["difference_spread"] == pytest.approx(0.01)
    assert split8["difference_in_spreads"] == pytest.approx(2.5)
    assert split8["verdict"] == DIFFERS
    assert split8["difference_from_bf16_reference"] == pytest.approx(0.04)
    assert master["verdict"] == WITHIN and master["difference_from_bf16_reference"] is None
    assert split8["bytes_per_param"] == pytest.approx(12.6)  # without gradients
    assert list(rows) == ["fp32", "master", "split8"]


def test_lion_is_judged_by_lion():
    rows = judged(made_up("fp32", FP32), made_up("lion", [2.0, 2.1, 2.2]), made_up("lion-int8", [2.01, 2.11, 2.21]))
    assert rows["lion"]["verdict"] == BASELINE
    assert rows["lion-int8"]["verdict"] == WITHIN
    assert rows["lion-int8"]["mean_difference"] == pytest.approx(0.01)


def test_only_seeds_that_both_have_are_compared():
    runs = made_up("split16", [9.0, 1.021, 1.041])[1:]
    row = judged(made_up("fp32", FP32), runs)["split16"]
    assert row["seeds"] == [1, 2]
    assert row["mean_difference"] == pytest.approx(0.001)
    assert row["verdict"] == WITHIN


@pytest.mark.parametrize("baseline", [[], [1.0], [1.0, None, 1.1]])
def test_without_a_spread_nothing_is_judged(baseline):
    row = judged(made_up("fp32", baseline), made_up("int8", [1.0, 1.1, 1.2]))["int8"]
    assert row["verdict"] == UNJUDGED


def test_failed_and_diverged_runs_are_shown(tmp_path):
    runs = made_up("fp32", FP32) + made_up("int8", [1.0, None, 1.1])
    runs.append({"format": "split8", "seed": 0, "error": "Traceback\nRuntimeError: no such thing"})
    result = {
        "device": "none",
        "torch": "none",
        "date": "today",
        "wall_s": 1.0,
        "settings": {"steps": 2, "batch_size": 1, "context": 1},
        "runs": runs,
        "left_out": ["lion, seed 2"],
    }
    path, image = tmp_path / "made_up.json", tmp_path / "made_up.png"
    path.write_text(json.dumps(result))
    run = command("--from", path, "--plot", image)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "not finite" in run.stdout and DIFFERS in run.stdout
    assert "FAILED: RuntimeError: no such thing" in run.stdout
    assert "left out by the time limit: lion, seed 2" in run.stdout
    assert image.read_bytes().startswith(PNG_SIGNATURE)
