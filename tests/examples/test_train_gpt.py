"""The example that `make demo` runs, on a tiny model; and that its verdict can be negative."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fusedopt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_gpt.py"
TINY = {"steps": 40, "batch_size": 8, "context": 32, "width": 64, "layers": 1}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# float32: the losses are about 5, whose ulp is 4.8e-7, and the runs stay a few ulps apart. bfloat16 activations: flips
# of their last bit left the final losses up to 1e-4 apart where four seeds were tried (autocast on a CPU).
LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}


def run_example(*options: str) -> subprocess.CompletedProcess:
    """In a process of its own, as a user would, with the fusedopt that is under test."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1])}
    return subprocess.run([sys.executable, EXAMPLE, *options], capture_output=True, text=True, env=environment)


@pytest.fixture
def train_gpt(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import train_gpt

    return train_gpt


def test_trains_alike_and_reports(device, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    run = run_example(f"--device={device}", f"--out={tmp_path}", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Same training" in run.stdout

    report = json.loads((tmp_path / "train_gpt.json").read_text())
    ours, theirs = report["runs"]["fusedopt"], report["runs"]["torch"]
    assert report["settings"] == {**report["settings"], **TINY}
    assert report["within_rounding"]
    for key in ("train_loss", "validation_loss"):
        assert ours[key] == pytest.approx(theirs[key], abs=LOSS_TOLERANCE[device.type])
    for outcome in (ours, theirs):
        assert len(outcome["losses"]) == TINY["steps"]
        assert outcome["losses"][0] == pytest.approx(math.log(256), abs=0.3)  # every byte equally likely
        assert outcome["train_loss"] < outcome["losses"][0] - 0.5
        assert 0 < outcome["tail_ms"] < outcome["step_ms"]
    if device.type == "cuda":
        assert ours["kernels_per_step"] == 2 < theirs["kernels_per_step"]
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(PNG_SIGNATURE)


def without_clipping(train_gpt, model, lr):
    return fusedopt.AdamW(train_gpt.parameter_groups(model), lr=lr, betas=train_gpt.BETAS)


def without_weight_decay(train_gpt, model, lr):
    return fusedopt.AdamW(
        model.parameters(), lr=lr, betas=train_gpt.BETAS, weight_decay=0.0, max_grad_norm=train_gpt.MAX_GRAD_NORM
    )


def with_large_eps(train_gpt, model, lr):
    return fusedopt.AdamW(
        train_gpt.parameter_groups(model),
        lr=lr,
        betas=train_gpt.BETAS,
        eps=1e-7,
        max_grad_norm=train_gpt.MAX_GRAD_NORM,
    )


@pytest.mark.parametrize("wrong", [without_clipping, without_weight_decay, with_large_eps])
def test_a_wrong_optimizer_is_reported(train_gpt, monkeypatch, wrong):
    def contender(model, lr):
        optimizer = wrong(train_gpt, model, lr)
        return optimizer, lambda: optimizer.step()

    monkeypatch.setitem(train_gpt.CONTENDERS, "fusedopt", contender)
    settings = replace(train_gpt.PRESETS["cpu"], **TINY)
    device, console = torch.device("cpu"), Console(quiet=True)
    runs = train_gpt.train_all(train_gpt.Task.create(settings, device), console)
    report = train_gpt.Report.create(settings, device, runs)
    assert not report.within_rounding


def test_a_nan_loss_is_reported(train_gpt):
    settings = replace(train_gpt.PRESETS["cpu"], **{**TINY, "steps": 10})
    device = torch.device("cpu")
    runs = train_gpt.train_all(train_gpt.Task.create(settings, device), Console(quiet=True))
    runs["fusedopt"].losses[-1] = math.nan
    report = train_gpt.Report.create(settings, device, runs)
    assert not report.within_rounding
    console = Console(file=io.StringIO(), record=True)
    train_gpt.print_report(report, console)
    assert "NOT THE SAME TRAINING" in console.export_text()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [(["--width=100"], "use a multiple of 64"), (["--steps=3"], "x>=10"), (["--device=tpu"], "auto")],
)
def test_bad_options_are_explained(tmp_path, options, remedy):
    run = run_example(f"--out={tmp_path / 'out'}", *options)
    assert run.returncode == 2
    assert remedy in run.stderr
    assert not (tmp_path / "out").exists()
