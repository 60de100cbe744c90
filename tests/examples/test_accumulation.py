"""The accumulation example: run as a user would, and beside torch's AdamW on whole batches."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "accumulation.py"
STEPS = 6

# As in test_small_examples.py: what rounding makes of two correct optimizers in so many steps.
LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}


@pytest.fixture
def accumulation(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return importlib.import_module("accumulation")


def test_runs_from_the_command_line(device):
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1])}
    command = [sys.executable, EXAMPLE, "--steps=3", f"--device={device}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    first, last = map(float, re.search(r"loss (\S+) -> (\S+) nats per byte, 3 steps", run.stdout).groups())
    assert first == pytest.approx(math.log(256), abs=0.4)  # every byte equally likely
    assert math.isfinite(last) and last < first


def whole_batch_losses(accumulation, device) -> list[float]:
    """One backward pass over all bytes of a batch, without an accumulator, and torch's optimizer."""
    data = importlib.import_module("_data")
    model = data.new_model(device)
    opt = torch.optim.AdamW(data.parameter_groups(model), lr=1e-3, betas=(0.9, 0.95))
    losses = []
    for batch in data.text_batches(STEPS, device):
        parts = list(accumulation.micro_batches(batch))
        sizes = [part[:, 1:].numel() for part in parts]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = sum(model.loss(part) * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def test_trains_as_on_whole_batches(accumulation, device):
    losses = accumulation.train(STEPS, device)
    assert losses == pytest.approx(whole_batch_losses(accumulation, device), abs=LOSS_TOLERANCE[device.type])


def test_weights_matter(accumulation, monkeypatch):
    """Without them the losses are out of the tolerance, so the test above sees them."""
    device = torch.device("cpu")
    monkeypatch.setattr(fusedopt.GradAccumulator, "_checked_weight", lambda self, weight: 1.0)
    losses = accumulation.train(STEPS, device)
    expected = whole_batch_losses(accumulation, device)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 10 * LOSS_TOLERANCE["cpu"]


def test_is_small():
    assert len(EXAMPLE.read_text().splitlines()) <= 80
