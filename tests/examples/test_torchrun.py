"""The examples of several processes: as users would run them, beside torch's AdamW in one with the batches of all."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port

import fusedopt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 7

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import _data

    return _data


def torch_run(data, device, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Losses and norms."""
    model = data.new_model(device)
    opt = torch.optim.AdamW(data.parameter_groups(model), lr=1e-3, betas=(0.9, 0.95))
    losses, norms = [], []
    for batch in data.text_batches(steps, device, 2 * data.BATCH_SIZE):
        loss = model.loss(batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, norms


AT_THE_END = "terminate called without an active exception"
"""Seen once, with torch 2.13 after a restart: a process had done and told everything, and aborted on its way out, where
a thread of gloo's had not ended. What was told is checked in any case."""


def torchrun(world: int, script: Path, *options: str, restarts: int = 0) -> str:
    """What the processes wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    run = subprocess.run(
        [*command, f"--max-restarts={restarts}", "--monitor-interval=0.1", script, *options],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(fusedopt.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        timeout=240,
    )
    assert run.returncode == 0 or AT_THE_END in run.stderr, run.stdout + run.stderr
    return run.stdout


def assert_run(out: str, begin: int, end: int, world: int, expected, tolerance: float):
    """That every process told the losses and norms of these steps, from 1. Printed to four digits."""
    losses, norms = expected
    got = re.findall(r"loss (\S+) -> (\S+) nats", out)
    assert len(got) == world
    for first, last in got:
        assert [float(first), float(last)] == pytest.approx([losses[begin - 1], losses[end - 1]], abs=tolerance)
    told = re.search(rf"steps {begin} to {end}: gradient norm (\S+) -> (\S+), {world} processes", out)
    first, last = map(float, told.groups())
    assert [first, last] == pytest.approx([norms[begin - 1], norms[end - 1]], rel=tolerance, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.multigpu)])
@pytest.mark.parametrize("name", ["train_ddp", "train_fsdp"])
def test_processes_are_one_with_all_batches(name, world, data):
    """On GPUs matrices are multiplied in another order for other batch sizes."""
    out = torchrun(world, EXAMPLES / f"{name}.py", f"--steps={STEPS}", "--device=cuda")
    assert_run(out, 1, STEPS, world, torch_run(data, torch.device("cuda")), 2e-3)


def test_data_parallel_alone(data, monkeypatch, capsys):
    """Without torchrun, whose processes take seconds to start: in one process, this one."""
    world = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    losses, norms = torch_run(data, torch.device("cpu"), steps=3)
    assert importlib.import_module("train_ddp").train(3, torch.device("cpu")) == pytest.approx(losses, abs=1e-4)
    assert f"gradient norm {norms[0]:.4f} -> {norms[-1]:.4f}, 1 processes" in capsys.readouterr().out


@pytest.mark.slow  # 10 s of processors to start the processes
def test_data_parallel(data):
    """FSDP on CPUs: the next one."""
    out = torchrun(2, EXAMPLES / "train_ddp.py", "--steps=3", "--device=cpu")
    assert_run(out, 1, 3, 2, torch_run(data, torch.device("cpu"), steps=3), 1e-4)


KILLED = """
import os, runpy, signal, sys
import fusedopt
step = fusedopt.AdamW.step
steps = []
def step_or_die(self, *args, **kwargs):
    steps.append(None)
    if len(steps) == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *args, **kwargs)
fusedopt.AdamW.step = step_or_die
sys.path.insert(0, {examples!r})
runpy.run_path({examples!r} + "/train_fsdp.py", run_name="__main__")
"""
"""The example, one of whose processes ends in its fourth step, while the other waits for its share in the norm."""


def test_a_killed_process(data, tmp_path):
    """All go on from the last checkpoint as one process with all batches that nothing happened to; then one alone."""
    expected = torch_run(data, torch.device("cpu"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(examples=str(EXAMPLES)))
    options = ["--device=cpu", f"--checkpoints={tmp_path / 'checkpoints'}", "--every=2"]
    assert_run(torchrun(2, script, "--steps=5", *options, restarts=1), 3, 5, 2, expected, 1e-4)
    (tmp_path / "checkpoints" / "6").mkdir()  # one that has not been finished
    assert_run(torchrun(1, EXAMPLES / "train_fsdp.py", "--steps=7", *options), 6, 7, 1, expected, 1e-4)


@pytest.mark.parametrize(("name", "lines"), [("train_ddp", 60), ("train_fsdp", 110)])
def test_examples_are_small(name, lines):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= lines
