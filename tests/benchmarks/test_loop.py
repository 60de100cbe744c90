"""The benchmark of the training loop: a smoke run of the command, and the parts whose errors would go unnoticed."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

import fusedopt
from benchmarks import captured, host, loop, release
from benchmarks.goals import LOOP_GOALS, judge_goals
from fusedopt.bench import accumulation, timing
from fusedopt.bench.accumulation import AccumulationCase, MicroBatches
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case, build
from fusedopt.bench.workloads import WORKLOADS, Model

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run_command(path, device_type, *options):
    command = [sys.executable, ROOT / "benchmarks" / "loop.py", "--device", device_type, "--quick", "--threads", "1"]
    run = subprocess.run(
        [*command, "--json", path, *options], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text()) | {"stdout": run.stdout}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_command(tmp_path_factory.mktemp("benchmark") / "out" / "loop.json", "cpu")


def test_result_says_where_it_was_made(result):
    assert result["torch"] == torch.__version__
    assert {
        "device",
        "driver",
        "torch",
        "triton",
        "cuda",
        "commit",
        "date",
        "copy_gbps",
        "rows",
        "goals",
    } <= result.keys()
    assert result["left_out"] == []


def test_every_contract_has_a_row_for_every_library(result):
    libraries = {}
    for row in result["rows"]:
        libraries.setdefault((row["workload"], row["format"], row["contract"]), []).append(row["library"])
    two, three = ["fusedopt-cpu", "torch-fused"], ["fusedopt-cpu", "torch-fused", "torch-foreach"]
    for _, format_, contract in loop.ACCUMULATION:
        assert libraries["tiny", format_, contract] == two
    for workload in loop.QUICK_HOST_WORKLOADS:
        for contract in ("clip_step", *host.CONTRACTS.values()):
            assert libraries[workload, "fp32", contract] == three
    assert libraries["tiny-model", "fp32", "captured_step"] == two
    assert libraries["tiny-model", "bf16", "release"] == ["fusedopt-cpu", *release.LIBRARIES[1:]]


def test_what_needs_a_gpu_says_why_it_was_skipped(result):
    skipped = {row["contract"]: row["skipped"] for row in result["rows"] if row["skipped"]}
    if not hasattr(fusedopt, "GradScaler"):
        assert "fusedopt.GradScaler" in skipped.pop("own_scaler_clip_step")
    assert skipped == {"captured_step": "CUDA graphs need a GPU", "release": "peak memory is measured on a GPU"}
    assert "skipped tiny-model adamw fp32 captured_step" in result["stdout"]


def test_figures_of_a_row_fit_together(result):
    for row in result["rows"]:
        assert row["error"] is None
        if row["skipped"]:
            assert row["host_ms"] is None and row["efficiency"] is None
            continue
        assert 0 < row["host_ms_min"] <= row["host_ms"] <= row["host_ms_max"]
        assert 0 <= row["check_error_ratio"] <= 1
        if row["bytes_per_param"]:
            floor_ms = row["params"] * row["bytes_per_param"] / (result["copy_gbps"] * 1e9) * 1e3
            assert row["floor_ms"] == pytest.approx(floor_ms)
            assert row["efficiency"] == pytest.approx(floor_ms / row["wall_ms"])
        assert bool(row.get("phases_us")) == (
            row["contract"] in host.CONTRACTS.values() and "fused" in row["library"][:5]
        )


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path):
    """All but the host's time: a process for each of its rows takes a minute."""
    chosen = [option for name in ("accumulate", "own_scaler", "captured", "release") for option in ("--select", name)]
    result = run_command(tmp_path / "loop.json", "cuda", *chosen)
    rows = {(row["workload"], row["format"], row["contract"], row["library"]): row for row in result["rows"]}
    for contract in accumulation.FOLDS:
        assert rows["tiny", "bf16", contract, "fusedopt-cuda"]["launches"] == 1
    assert rows["tiny", "bf16+split16", "accumulated_clip_step", "fusedopt-cuda"]["launches"] == 5
    assert rows["tiny-model", "fp32", "captured_step", "fusedopt-cuda"]["same_bits"] is True
    assert rows["tiny-model", "bf16", "release", "fusedopt-release"]["same_bits"] is True
    own_scaler = rows["tiny", "fp32", "own_scaler_clip_step", "fusedopt-cuda"]
    assert own_scaler["skipped"] or own_scaler["own_launches"] == 2


def test_a_failed_check_is_reported_and_fails_the_run(tmp_path):
    """A fold that does nothing must not be timed."""
    path = tmp_path / "loop.json"
    program = (
        "import sys, torch; sys.argv[1:] = sys.argv[2:]\n"
        "torch._foreach_add_ = lambda buffers, gradients: None\n"
        "from benchmarks.loop import main; main()"
    )
    arguments = ["--device", "cpu", "--quick", "--select", "/accumulate", "--json", str(path)]
    command = [sys.executable, "-c", program, "-", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    rows = json.loads(path.read_text())["rows"]
    failed = {(row["contract"], row["library"]) for row in rows if row["error"]}
    assert failed == {("accumulate", "torch-fused"), ("accumulated_clip_step", "torch-fused")}


# ------------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize(
    ("optimizer", "format_", "contract", "expected"),
    [
        ("none", "bf16", "accumulate_first", 6),
        ("none", "bf16", "accumulate", 10),
        ("adamw", "bf16+split16", "accumulated_clip_step", 6 + 10 + 10 + (2 + 4) + (4 + 4 + 8 + 8 + 4 + 2)),
        ("adamw", "fp32", "accumulated_clip_step", 8 + 12 + 12 + (4 + 4) + (8 + 8 + 8 + 4 + 4)),
    ],
)
def test_bytes_per_param(optimizer, format_, contract, expected):
    assert AccumulationCase("tiny", optimizer, format_, contract).bytes_per_param == expected


def accumulation_case(contract, format_="bf16"):
    return AccumulationCase("tiny", "none" if contract in accumulation.FOLDS else "adamw", format_, contract)


def made(case, library, device=CPU):
    model = MicroBatches(WORKLOADS["tiny"], case.layout.dtype, device)
    return model, accumulation.build(library, case, model)


@pytest.mark.parametrize("library", accumulation.LIBRARIES)
@pytest.mark.parametrize("variant", loop.ACCUMULATION, ids="/".join)
def test_check_accepts_what_is_right(variant, library, device):
    case = AccumulationCase("tiny", *variant)
    model, tail = made(case, library, device)
    assert accumulation.check(case, tail, model) <= 1


@pytest.mark.parametrize("library", accumulation.LIBRARIES)
@pytest.mark.parametrize(
    ("built", "expected"), [("accumulate_first", "accumulate"), ("accumulate", "accumulate_first")]
)
def test_check_notices_another_fold(built, expected, library):
    model, tail = made(accumulation_case(built), library)
    with pytest.raises(AssertionError, match="rounding explains"):
        accumulation.check(accumulation_case(expected), tail, model)


@pytest.mark.parametrize("library", accumulation.LIBRARIES)
@pytest.mark.parametrize("missing", range(accumulation.MICRO_BATCHES))
@pytest.mark.parametrize("format_", ["bf16+split16", "fp32"])
def test_check_notices_a_micro_batch_that_is_not_used(format_, missing, library):
    case = accumulation_case("accumulated_clip_step", format_)
    model, tail = made(case, library)

    def before(stage):
        model.give(stage)
        if stage == missing:
            for param in model.params:
                param.grad = torch.zeros_like(param.grad)

    wrong = accumulation.staged(before, tail.stages, tail)
    with pytest.raises(AssertionError, match="rounding explains"):
        accumulation.check(case, wrong, model)


def test_check_notices_gradients_that_are_kept():
    case = accumulation_case("accumulate_first")
    model, tail = made(case, "torch-fused")
    wrong = replace(tail, run=lambda: (tail.run(), model.give(0)))
    with pytest.raises(AssertionError, match="gradients were kept"):
        accumulation.check(case, wrong, model)


def test_micro_batches_differ_and_are_restored():
    model = MicroBatches(WORKLOADS["tiny"], torch.float32, CPU)
    values = [batch[0].clone() for batch in model.batches]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    model.batches[0][0].zero_()
    model.backward()
    assert model.params[0].grad is model.batches[0][0]
    assert torch.equal(model.params[0].grad, values[0])


def test_stages_count_in_host_time_and_what_is_between_them_does_not():
    times = timing.HostTimes()
    timing.time_stages(
        [lambda: time.sleep(0.002)] * 2, lambda stage: time.sleep(0.03), lambda: None, timing.Caches(CPU), 1, times
    )
    assert 4 <= times.host[0] < times.wall[0] - 50


# ------------------------------------------------------------------------------------------------------- our scaler


def test_own_scaler_is_measured_where_it_exists(monkeypatch):
    """With torch's in its place: what is driven is right, and is checked as unscaled by the scale."""
    monkeypatch.setattr(fusedopt, "GradScaler", torch.amp.GradScaler, raising=False)
    runner = loop.LoopRunner(CPU, loop.QUICK)
    case = Case("tiny", "adamw", "fp32", "own_scaler_clip_step")
    rows = loop.Units(runner, quick=True).case(case)
    assert [row["library"] for row in rows] == ["fusedopt-cpu", "torch-fused"]
    assert all(row["error"] is None and row["bytes_per_param"] == 32 for row in rows)
    model = Model(WORKLOADS["tiny"], torch.float32, CPU)
    for gradient in model.gradients:
        gradient.div_(2)  # a norm that is clipped, but no longer once it is unscaled
    with pytest.raises(AssertionError, match="rounding explains"):
        check(case, build("fusedopt", replace(case, contract="clip_step"), model.params), model)


# -------------------------------------------------------------------------------------------------------- host time


@pytest.mark.parametrize("name", host.MODELS)
def test_models_have_the_tensors_of_their_workloads(name):
    with torch.device("meta"):
        model = host.MODELS[name]()
    assert sorted(tuple(param.shape) for param in model.parameters()) == sorted(WORKLOADS[name].shapes)


def test_workloads_of_the_host_rows():
    sizes = {name: len(WORKLOADS[name].shapes) for name in loop.HOST_WORKLOADS["cuda"]}
    assert sizes == {"gpt2-124M": 148, "1000-small": 1000, "10000-small": 10_000, "10000-small-10-groups": 10_000}
    model = Model(WORKLOADS["tiny-4-groups"], torch.float32, CPU)
    for library in host.LIBRARIES:
        tail = host.build(library, Case("tiny-4-groups", "adamw", "fp32", "step"), model.params)
        assert [len(group["params"]) for group in tail.optimizer.param_groups] == [5, 5, 5, 5]
    assert WORKLOADS["10000-small-10-groups"].groups == 10


def test_phases_are_those_of_a_step():
    """Every phase is found, and the functions are put back."""
    before = {name: getattr(owner, key) for name, (owner, key) in host.PHASES.items()}
    model = host.Chain(4, 8)
    case = Case("tiny-4-groups", "adamw", "fp32", "clip_step")
    tail = host.build("fusedopt", case, list(model.parameters()))
    phases = host.phase_times(model, tail, CPU, steps=2)
    assert phases.keys() == {*host.PHASES, "rest"}
    assert all(microseconds > 0 for microseconds in phases.values())
    assert {name: getattr(owner, key) for name, (owner, key) in host.PHASES.items()} == before


def test_a_process_that_fails_is_an_error_of_its_row(monkeypatch):
    monkeypatch.setattr(host, "measure_contract", lambda *args: 1 / 0)
    row = host.in_fresh_process("fusedopt", Case("tiny", "adamw", "fp32", "step"), CPU, 1)
    assert row == {"error": "ZeroDivisionError: division by zero"}


# ------------------------------------------------------------------------------------------------- captured, release


@pytest.mark.parametrize("library", captured.LIBRARIES)
def test_training_repeats_itself_and_is_right(library, device):
    with captured.deterministic():
        one, other = (captured.Training(library, captured.TINY, device) for _ in range(2))
        captured.warm_up(one)
        captured.warm_up(other)
        assert captured.same_bits(one, other)
        other.lr.fill_(1e-3)  # seen by the next step, as from replay to replay
        one.step()
        other.step()
        assert not captured.same_bits(one, other)
        assert captured.check_tail(library, captured.TINY, device) <= 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_learning_rate_is_a_cosine():
    rates = [captured.cosine(step, 50) for step in range(51)]
    assert rates[0] == captured.PEAK_LR
    assert rates[25] == pytest.approx((captured.PEAK_LR + captured.LAST_LR) / 2)
    assert rates[50] == pytest.approx(captured.LAST_LR)
    assert rates == sorted(rates, reverse=True)


def test_captured_model_is_gpt2():
    size = captured.GPT2
    with torch.device("meta"):
        model = captured.GPT(size.positions, size.width, size.layers)
        model.token = torch.nn.Embedding(size.vocabulary, size.width)
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(124e6, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("library", captured.LIBRARIES)
def test_replays_are_eager_steps(library):
    with captured.deterministic():
        assert captured.Pair(library, captured.TINY, CUDA).same_bits


def test_release_leaves_what_a_normal_step_does(device):
    rows = release.measure(release.TINY, device)
    assert rows.keys() == {library for library in release.LIBRARIES if not release.why_missing(library)}
    assert rows["fusedopt"]["grad_bytes"] == 2 * rows["fusedopt"]["params"]
    assert (rows["fusedopt"]["peak_bytes"] is None) == (device.type == "cpu")
    if "fusedopt-release" in rows:
        assert rows["fusedopt-release"]["same_bits"] is True


def test_released_model_has_a_billion_parameters():
    with torch.device("meta"):
        model = release.Llama(release.LLAMA_1B.shape)
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(1.04e9, rel=0.01)


# ------------------------------------------------------------------------------------------------------------ goals


def gpu_units():
    runner = loop.LoopRunner(CPU, loop.QUICK)
    runner.device = CUDA  # nothing is run
    return loop.Units(runner, quick=False)


def test_goals_are_about_cases_that_are_run():
    units = gpu_units()
    names = {unit.name for unit in units._units()}
    names |= {name for workload in loop.HOST_WORKLOADS["cuda"] for name in units._host_names(workload)}
    for goal in LOOP_GOALS:
        assert goal.name.split(":")[0] in names


def test_units_are_selected_by_name():
    units = gpu_units()
    assert [unit.name for unit in units.selected(("captured",))] == ["gpt2-124M-model/adamw/fp32/captured_step"]
    names = [unit.name for unit in units.selected(("1000-small/",))]
    assert names == ["1000-small/adamw/fp32/clip_step", "host after backward: 1000-small"]
    assert len(list(units.selected(()))) == len(list(units._units())) + 1


def row(case, library, **figures):
    names = dict(zip(("workload", "optimizer", "format", "contract"), case.split("/")))
    return dict.fromkeys(loop.FIGURES) | {"efficiency": None, **names, "library": library, **figures}


def test_goals_of_the_loop():
    accumulated = "llama-1.3B/adamw/bf16+split16/accumulated_clip_step"
    captured_step = "gpt2-124M-model/adamw/fp32/captured_step"
    small = "1000-small/adamw/fp32/clip_step_after_backward"
    rows = [
        row(accumulated, "fusedopt-cuda", gpu_ms=29.0, efficiency=0.95),
        row(accumulated, "torch-fused", gpu_ms=43.5),
        row(captured_step, "fusedopt-cuda", same_bits=True),
        row(small, "fusedopt-cuda", host_ms=0.25),
    ]
    goals = {goal["name"]: goal for goal in judge_goals(CUDA, ("loop",), rows, [])}
    assert goals[f"{accumulated}: share of the floor"]["reached"] is True
    assert goals[f"{accumulated}: times faster than torch"]["value"] == pytest.approx(1.5)
    assert goals[f"{accumulated}: times faster than torch"]["reached"] is False
    assert goals[f"{captured_step}: same bits as eager"]["reached"] is True
    assert goals[f"{small}: host ms"]["reached"] is False
    assert goals["llama-1.3B/none/bf16/accumulate: launches"]["reached"] is None
    failed = judge_goals(CUDA, ("loop",), [row(captured_step, "fusedopt-cuda", error="no memory")], [])
    assert {goal["reached"] for goal in failed} == {None}
