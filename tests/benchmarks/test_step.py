"""The step benchmark: a smoke run of the command, and the parts whose errors would go unnoticed in its figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the benchmarks are not installed with the package

from benchmarks.goals import FORMAT_GOALS, RULE_GOALS, STANDARD_CPU_GOALS, STANDARD_GOALS, judge_goals
from benchmarks.step import DEFAULT_WORKLOADS, VARIANTS, select_cases
from fusedopt import formats
from fusedopt.bench import contracts, peers
from fusedopt.bench.checks import check
from fusedopt.bench.contracts import Case, build
from fusedopt.bench.runner import measure_cases
from fusedopt.bench.suites import suites
from fusedopt.bench.timing import device_work, split_steps
from fusedopt.bench.workloads import FORMATS, WORKLOADS, Model

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "out" / "step.json"
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "--device", "cpu", "--quick", "--set", "all"]
    command += ["--threads", "1", "--json", path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text()) | {"stdout": run.stdout}


def test_result_says_where_it_was_made(result):
    assert result["torch"] == torch.__version__
    assert {"device", "driver", "torch", "triton", "cuda", "commit", "date", "copy_gbps", "rows"} <= result.keys()
    assert result["device"] and result["copy_gbps"] > 0
    assert result["left_out"] == []
    assert not result["missing_libraries"].keys() & {"flashoptim", "apex"}  # which are for GPUs


def test_every_case_is_measured_by_every_library_that_offers_it(result):
    measured = {(r["optimizer"], r["format"], r["contract"], r["library"]) for r in result["rows"]}
    assert len(measured) == len(result["rows"])
    assert {row[:3] for row in measured if row[3] == "fusedopt-cpu"} == set().union(*VARIANTS.values())
    for contract in ("clip_step", "scaler_clip_step"):
        libraries = {row[3] for row in measured if row[:3] == ("adamw", "fp32", contract)}
        assert libraries == {"fusedopt-cpu", "torch-fused", "torch-grad-scale"}
    for rule, fused in (("sgd_momentum", True), ("rmsprop", False), ("radam", False)):
        libraries = {row[3] for row in measured if row[:3] == (rule, "fp32", "step")}
        assert libraries == {"fusedopt-cpu", "torch-foreach", *(["torch-fused"] if fused else [])}


def test_figures_of_a_row_fit_together(result):
    workload = WORKLOADS["tiny"]
    for row in result["rows"]:
        assert row["error"] is None
        assert (row["params"], row["tensors"]) == (workload.numel, len(workload.shapes))
        assert 0 < row["wall_ms_min"] <= row["wall_ms"] <= row["wall_ms_max"]
        assert 0 < row["host_ms"] <= row["wall_ms_max"]
        assert row["gpu_ms"] is None and row["launches"] is None
        floor_ms = workload.numel * row["bytes_per_param"] / (result["copy_gbps"] * 1e9) * 1e3
        assert row["floor_ms"] == pytest.approx(floor_ms)
        assert row["efficiency"] == pytest.approx(floor_ms / row["wall_ms"])
        assert 0 <= row["check_error_ratio"] <= 1


def test_table_shows_every_library(result):
    for library in ("fusedopt-cpu", "torch-fused", "torch-grad-scale"):
        assert library in result["stdout"]


def test_a_failed_check_is_reported_and_fails_the_run(tmp_path):
    """A step that does nothing must not be timed."""
    path = tmp_path / "step.json"
    program = (
        "import sys; sys.argv[1:] = sys.argv[2:]\n"
        "import torch; torch.optim.AdamW.step = lambda self, closure=None: None\n"
        "from benchmarks.step import main; main()"
    )
    arguments = ["--device", "cpu", "--quick", "--select", "adamw/fp32/clip_step", "--json", str(path)]
    command = [sys.executable, "-c", program, "-", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, run.stdout + run.stderr
    failed = [row for row in json.loads(path.read_text())["rows"] if row["error"]]
    assert {row["library"] for row in failed} == {"torch-fused", "torch-grad-scale"}
    assert all(row["wall_ms"] is None and row["efficiency"] is None for row in failed)


@pytest.mark.parametrize(
    ("library", "format_"),
    [("fusedopt", name) for name in FORMATS] + [("torch-fused", "fp32"), ("torch-fused", "bf16")],
)
@pytest.mark.parametrize(
    ("built", "expected"),
    [("step", "clip_step"), ("clip_step", "step"), ("clip_step", "scaler_clip_step")],
)
def test_check_notices_a_tail_that_does_something_else(built, expected, format_, library):
    model = Model(WORKLOADS["tiny"], FORMATS[format_].dtype, CPU)
    for gradient in model.gradients:
        gradient.div_(2)  # a norm of 1.7: clipped, but no longer once it is unscaled by 2
    right, wrong = Case("tiny", "adamw", format_, built), Case("tiny", "adamw", format_, expected)
    assert check(right, build(library, right, model.params), model) <= 1
    model.reset()  # before a master is copied
    with pytest.raises(AssertionError, match="rounding explains"):
        check(wrong, build(library, right, model.params), model)


@pytest.mark.parametrize(
    ("built", "expected"),
    [
        ("bf16+split16", "bf16"),  # states and master in more bits than the case says
        ("bf16", "bf16+split16"),
        ("bf16+split8+int8", "bf16+split16"),
        ("bf16+int8", "bf16+sr"),
        ("fp32", "fp32+int8"),
    ],
)
def test_check_notices_another_format(built, expected):
    model = Model(WORKLOADS["tiny"], FORMATS[built].dtype, CPU)
    made, judged = (Case("tiny", "adamw", format_, "step") for format_ in (built, expected))
    with pytest.raises(AssertionError, match=r"expected torch|rounding explains"):
        check(judged, build("fusedopt", made, model.params), model)


@pytest.mark.parametrize("format_", ["bf16+split16", "bf16+split8+int8", "bf16+sr", "fp16+fp32 master"])
def test_check_notices_a_parameter_that_did_not_move(format_):
    model = Model(WORKLOADS["tiny"], FORMATS[format_].dtype, CPU)
    case = Case("tiny", "adamw", format_, "step")
    tail = build("fusedopt", case, model.params)

    def run():
        last = model.params[-1].detach().clone()
        tail.run()
        model.params[-1].data.copy_(last)

    with pytest.raises(AssertionError, match="rounding explains"):
        check(case, contracts.Tail(tail.optimizer, run, tail.read), model)


def test_check_allows_what_clipping_in_fp16_rounds_away(monkeypatch):
    """Clipped gradients of a large model are subnormal in fp16: apex, which clips in place, is not wrong for it."""
    for module in ("fusedopt.bench.contracts", "fusedopt.bench.checks"):
        monkeypatch.setattr(f"{module}.MAX_NORM", 0.005)
    model = Model(WORKLOADS["tiny"], torch.float16, CPU)
    case = Case("tiny", "adamw", "fp16+fp32 master", "scaler_clip_step")

    def in_place(clips_in_place):
        model.reset()
        ours = build("fusedopt", Case("tiny", "adamw", "fp16+fp32 master", "step"), model.params)

        def run():
            ours.optimizer.grad_scale = torch.tensor(contracts.GRAD_SCALE)
            norm = torch.stack([param.grad.float().norm() for param in model.params]).norm()
            for param in model.params:
                param.grad.copy_(param.grad.float() * (0.005 * contracts.GRAD_SCALE / norm))
            ours.optimizer.step()

        return contracts.Tail(ours.optimizer, run, ours.read, clips_in_place=clips_in_place)

    assert check(case, in_place(clips_in_place=True), model) <= 1
    with pytest.raises(AssertionError, match="rounding explains"):
        check(case, in_place(clips_in_place=False), model)


@pytest.mark.parametrize(
    ("optimizer", "format_", "contract", "expected"),
    [
        ("adamw", "fp32", "step", 28),
        ("adamw", "fp32", "clip_step", 32),
        ("adamw", "fp32", "scaler_clip_step", 32),
        ("adamw", "bf16", "step", 14),
        ("adamw", "bf16", "clip_step", 16),
        ("lion", "fp32", "step", 20),
        ("lion", "fp32", "clip_step", 24),
        ("adamw", "bf16+split16", "step", 26),
        ("adamw", "bf16+split16", "clip_step", 28),
        ("adamw", "bf16+split8+int8", "step", 12),
        ("adamw", "bf16+split8+int8", "clip_step", 14),
        ("adamw", "bf16+sr", "step", 14),
        ("adamw", "bf16+int8", "step", 10),
        ("adamw", "fp32+int8", "step", 16),
        ("adamw", "bf16+fp32 master", "step", 28),
        ("adamw", "fp16+fp32 master", "scaler_clip_step", 30),
        ("lion", "bf16+split16+bf16", "step", 14),
        ("lion", "bf16+split8+int8", "step", 10),
        ("lamb", "fp32", "step", 44),
        ("lamb", "fp32", "clip_step", 48),
        ("lamb", "bf16+split16", "step", 40),
    ],
)
def test_bytes_per_param(optimizer, format_, contract, expected):
    assert Case("tiny", optimizer, format_, contract).bytes_per_param == expected


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [("llama-1.3B", 219, 1.35e9), ("gpt2-124M", 148, 124e6), ("1000-small", 1000, 2.1e6), ("cpu-100M", 148, 100e6)],
)
def test_workload_sizes(name, tensors, numel):
    assert len(WORKLOADS[name].shapes) == tensors
    assert WORKLOADS[name].numel == pytest.approx(numel, rel=0.01)


def test_gradients_are_new_tensors_with_the_same_values():
    model = Model(WORKLOADS["tiny"], torch.float32, CPU)
    model.backward()
    before = [param.grad for param in model.params]
    for gradient in before:
        gradient.zero_()
    model.backward()
    for param, old, pristine in zip(model.params, before, model.gradients, strict=True):
        assert param.grad is not old
        assert torch.equal(param.grad, pristine)
        assert math.sqrt(pristine.square().mean()) > 0


def event(category, name, start_us, duration_us):
    return {"ph": "X", "cat": category, "name": name, "ts": start_us, "dur": duration_us}


def test_split_steps_counts_device_work_between_markers_only():
    marker = "void at::native::elementwise_kernel<128, 4, at::native::bitwise_not_kernel_cuda(at::TensorIteratorBase&)>"
    steps = split_steps(
        [
            event("kernel", "update", 1100, 4000),  # out of order, as traces are
            event("kernel", "clone", 0, 10),  # before the first marker
            event("kernel", marker, 20, 10),
            event("kernel", "norm", 50, 1000),
            event("gpu_memset", "Memset (Device)", 40, 2),
            event("gpu_user_annotation", "Optimizer.step#AdamW.step", 40, 9000),
            event("cuda_runtime", "cudaLaunchKernel", 30, 8),
            {"ph": "M", "name": "process_name"},
            event("kernel", marker, 6000, 500),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 6600, 3),
            event("kernel", "update", 6700, 4100),
        ]
    )
    assert [step.ms for step in steps] == pytest.approx([5.002, 4.103])
    assert [step.kernels for step in steps] == [2, 1]
    assert [step.memory_operations for step in steps] == [1, 1]


def test_time_in_which_kernels_overlap_counts_once():
    """As where the update waits for the norm pass, or ends before it."""
    begin = 1.7e15  # as traces count, in which half a microsecond is hardly left
    durations = ((0, 10), (4, 20), (5, 1), (30, 2))
    work = [event("kernel", f"{i}", begin + start, duration) for i, (start, duration) in enumerate(durations)]
    assert [us for _, us in device_work(work[::-1])] == [10, 14, 0, 2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_kept_as_the_case_says(name):
    case = Case("tiny", "adamw", name, "step")
    model = Model(WORKLOADS["tiny"], case.layout.dtype, CPU)
    tail = build("fusedopt", case, model.params)
    model.backward()
    tail()
    for param in model.params:
        entry = tail.optimizer.state[param]
        kept = {key: entry[key].dtype for key in case.at_rest(param)}
        assert kept == case.at_rest(param)
        scales = {formats.scale_key(key) for key in case.rule.states} if case.state_spec(param).blocked else set()
        assert entry.keys() == {"step", *kept, *scales}


def test_sets_choose_cases_and_workloads():
    assert {case.workload for case in select_cases(("formats",), "cuda", (), ())} == {"llama-1.3B"}
    both = select_cases(tuple(VARIANTS), "cuda", (), ())
    expected = sum(len(DEFAULT_WORKLOADS[name]["cuda"]) * len(VARIANTS[name]) for name in VARIANTS)
    assert len(set(both)) == len(both) == expected
    assert select_cases(("formats",), "cpu", ("tiny",), ("bf16+sr",)) == [Case("tiny", "adamw", "bf16+sr", "step")]


def test_goals_are_about_cases_that_are_run():
    names = {str(case) for name in VARIANTS for case in select_cases((name,), "cuda", (), ())}
    for goal in (*FORMAT_GOALS, *RULE_GOALS):
        assert goal.name.split(":")[0] in names


def row(variant, library, gpu_ms, efficiency=None):
    optimizer, format_, contract = variant.split("/")
    case = {"workload": "llama-1.3B", "optimizer": optimizer, "format": format_, "contract": contract}
    return {**case, "library": library, "gpu_ms": gpu_ms, "efficiency": efficiency}


def test_goals_of_the_formats():
    rows = [
        row("adamw/bf16+split8+int8/step", "fusedopt-cuda", 6.0, 0.89),
        row("adamw/bf16+split8+int8/step", "flashoptim", 12.0),
        row("adamw/bf16+int8/step", "fusedopt-cuda", 5.0, 0.9),
        row("adamw/bf16+int8/step", "bitsandbytes", 36.6),
    ]
    goals = {goal["name"].removeprefix("llama-1.3B/"): goal for goal in judge_goals(CUDA, ("formats",), rows, [])}
    step = "adamw/bf16+split8+int8/step"
    assert goals[f"{step}: share of the floor"]["reached"] is False
    assert goals[f"{step}: times faster than FlashAdamW"]["value"] == pytest.approx(2.0)
    assert goals[f"{step}: times faster than AdamW8bit"]["value"] == pytest.approx(6.1)
    apex = goals["adamw/fp16+fp32 master/scaler_clip_step: times faster than apex"]
    assert (apex["value"], apex["reached"]) == (None, None)


def standard_row(workload, variant, library="fusedopt-cuda", params=10**9, **figures):
    return row(variant, library, 1.0) | {"workload": workload, "params": params, "over_best": None} | figures


def test_goals_of_the_standard_suite():
    rows = [
        standard_row("llama-1.3B", "adamw/fp32/step", efficiency=0.995, over_best=1.2),
        standard_row("gpt2-124M", "adamw/fp32/step", efficiency=0.985, over_best=1.1),
        standard_row("llama-1.3B", "lion/fp32/step", efficiency=0.9849),
        standard_row("llama-1.3B", "adamw/bf16+int8/step", efficiency=0.93, over_best=1.9),
        standard_row("resnet50", "adamw/fp32/clip_step", params=25_000_000, efficiency=0.8),  # small: not asked
        standard_row("llama-1.3B", "adamw/fp32/step", "torch-fused", efficiency=0.8),
        standard_row("llama-1.3B-misaligned", "adamw/fp32/step", efficiency=0.95),
        standard_row("llama-1.3B-misaligned-apart", "adamw/fp32/step", efficiency=0.6),
    ]
    goals = {goal["name"]: goal for goal in judge_goals(CUDA, ("standard",), rows, [])}

    def least(name):
        goal = goals[f"{name}, least"]
        return goal["value"], goal["reached"], goal["where"]

    assert least("AdamW in fp32: share of the floor") == (0.985, False, "gpt2-124M/adamw/fp32/step")
    assert least("fp32 and split16: share of the floor") == (0.9849, False, "llama-1.3B/lion/fp32/step")
    assert least("8-bit states: share of the floor") == (0.93, True, "llama-1.3B/adamw/bf16+int8/step")
    assert least("bf16: share of the floor") == (None, None, None)
    assert least("8-bit states: times faster than the best other")[:2] == (1.9, False)
    assert least("every row: times faster than the best other")[:2] == (1.1, True)
    aligned = "adamw/fp32/step: over the aligned share"
    assert goals[f"llama-1.3B-misaligned/{aligned}"]["reached"] is True
    assert goals[f"llama-1.3B-misaligned-apart/{aligned}"]["reached"] is False
    assert goals[f"llama-1.3B-odd/{aligned}"]["value"] is None


def test_standard_goals_are_about_cases_of_the_suite():
    cases = {"/".join(case) for device_type in ("cuda", "cpu") for case in suites(device_type)["standard"]}
    named = [goal.name.split(":")[0] for goal in (*STANDARD_GOALS, *STANDARD_CPU_GOALS)]
    named = [name for name in named if "/" in name]
    assert len(named) > 8 and set(named) <= cases


def test_libraries_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(peers, "MODULES", {name: (f"no_{name}",) for name in peers.MODULES})
    peers.why_missing.cache_clear()
    cases = select_cases(("formats",), "cuda", (), ())
    missing = peers.missing(cases, CUDA)
    peers.why_missing.cache_clear()
    assert missing.keys() == {"flashoptim", "bitsandbytes", "torchao", "transformer-engine", "apex"}
    assert "no_apex" in missing["apex"]


@pytest.mark.parametrize("library", ["fusedopt", "torch-foreach", "torch-fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd_momentum", "rmsprop", "adagrad", "radam", "adamw_amsgrad", "lamb"])
def test_check_of_other_rules(optimizer, library):
    """It passes what is right, and notices a step that did not clip."""
    right, wrong = (Case("tiny", optimizer, "fp32", contract) for contract in ("clip_step", "step"))
    if library not in contracts.libraries(right, CPU):
        pytest.skip("torch has no such implementation")
    model = Model(WORKLOADS["tiny"], torch.float32, CPU)
    assert check(right, build(library, right, model.params), model) <= 1
    model.reset()
    with pytest.raises(AssertionError, match="rounding explains"):
        check(wrong, build(library, right, model.params), model)


def test_every_contract_is_built_for_the_device_it_names():
    assert contracts.reported_name("fusedopt", CPU) == "fusedopt-cpu"
    assert contracts.reported_name("fusedopt", torch.device("cuda")) == "fusedopt-cuda"
    assert contracts.reported_name("torch-fused", torch.device("cuda")) == "torch-fused"


def test_an_interrupted_run_keeps_what_it_has():
    class Interrupted:
        @staticmethod
        def run(case, model, deadline):
            if case == cases[1]:
                raise KeyboardInterrupt
            return [{"case": case}]

        @staticmethod
        def too_large(case):
            return None

        @staticmethod
        def model_key(case):
            return case.workload

        @staticmethod
        def make_model(case):
            return None

    cases = select_cases(("tail",), "cpu", ("tiny",), ())[:3]
    rows, left_out = measure_cases(Interrupted(), cases, math.inf, Progress(disable=True))
    assert rows == [{"case": cases[0]}]
    assert left_out == [str(case) for case in cases[1:]]
