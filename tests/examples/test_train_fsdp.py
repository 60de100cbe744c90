"""The FSDP example: as a user would run it, beside torch's AdamW in one process with the batches of all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedopt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 3

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import _data

    return _data


def torch_run(data, device, world) -> tuple[list[float], list[float]]:
    """Losses and norms."""
    model = data.new_model(device)
    opt = torch.optim.AdamW(data.parameter_groups(model), lr=1e-3, betas=(0.9, 0.95))
    losses, norms = [], []
    for batch in data.text_batches(STEPS, device, world * data.BATCH_SIZE):
        loss = model.loss(batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize(
    ("device", "world"),
    [
        ("cpu", 2),
        pytest.param("cuda", 1, marks=pytest.mark.gpu),
        pytest.param("cuda", 2, marks=[pytest.mark.gpu, pytest.mark.multigpu]),
    ],
)
def test_processes_are_one_with_all_batches(device, world, data):
    """Printed to four digits; on GPUs matrices are multiplied in another order for other batch sizes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    run = subprocess.run(
        [*command, EXAMPLES / "train_fsdp.py", f"--steps={STEPS}", f"--device={device}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    losses, norms = torch_run(data, torch.device(device), world)
    tolerance = 1e-4 if device == "cpu" else 2e-3
    got = re.findall(r"loss (\S+) -> (\S+) nats", run.stdout)
    assert len(got) == world
    for first, last in got:
        assert [float(first), float(last)] == pytest.approx([losses[0], losses[-1]], abs=tolerance)
    first, last = re.search(rf"gradient norm (\S+) -> (\S+), {world} processes", run.stdout).groups()
    assert [float(first), float(last)] == pytest.approx([norms[0], norms[-1]], rel=tolerance, abs=1e-4)


def test_example_is_small():
    assert len((EXAMPLES / "train_fsdp.py").read_text().splitlines()) <= 80
