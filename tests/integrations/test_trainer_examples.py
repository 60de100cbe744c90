"""The examples for trainers, some steps of each, beside torch's AdamW."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from models import EXTRA, refuse_clipping, reset_accelerate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 5


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def check(losses, steps=STEPS):
    assert len(losses) == steps and losses[0] == pytest.approx(math.log(256), abs=0.4)  # every byte equally likely
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("name", "library"),
    [("trainer_transformers", "transformers"), ("lightning_trainer", "lightning"), ("accelerate_loop", "accelerate")],
)
def test_clipping_is_the_steps(name, library, example, device, monkeypatch):
    pytest.importorskip(library, reason=EXTRA)
    module = example(name)
    refuse_clipping(monkeypatch)
    losses = module.train(STEPS, device)
    check(losses)
    assert losses[-1] < losses[0]


def test_fabric_loop_skips_overflows(example, device, capsys):
    pytest.importorskip("lightning", reason=EXTRA)
    losses = example("fabric_loop").train(STEPS, device)
    check(losses)
    skipped, _, rest = capsys.readouterr().out.strip().splitlines()[-1].partition(f" of {STEPS} steps skipped")
    assert 0 < int(skipped) < STEPS and rest


def test_accelerate_loop_beside_torch(example, device, monkeypatch):
    """The same example with torch's optimizer and Accelerate's own class: the learning rate, norms and losses."""
    accelerate = pytest.importorskip("accelerate", reason=EXTRA)
    module = example("accelerate_loop")
    if device.type == "cuda":
        pytest.skip("float16 activations differ by more than the step: compared on the CPU, in float32")
    ours = module.train(STEPS, device)
    monkeypatch.setattr(module.fusedopt, "AdamW", torch.optim.AdamW)
    monkeypatch.setattr(module, "Accelerator", accelerate.Accelerator)
    reset_accelerate()
    # Two correct optimizers drift apart by rounding: see LOSS_TOLERANCE in tests/examples/test_small_examples.py.
    assert ours == pytest.approx(module.train(STEPS, device), abs=1e-5)
