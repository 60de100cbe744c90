"""What the tests of the trainers share: a tiny model of real text, and how far two right trainings may drift apart."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

import fusedopt

EXTRA = "needs the extra test-integrations: pip install 'fusedopt[test-integrations]'"

CONTEXT = 16
LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1

# In float64 trainings that differ by rounding alone drift apart by some 1e-15 in a few steps, since gradients that are
# nothing but noise, such as that of a key's bias, stay far below Adam's epsilon. The smallest mistakes that were tried,
# a bound that is off by a thousandth or a weight decay of 0.1001, make 3e-8.
DRIFT = 1e-12


def windows(count: int, seed: int = 0) -> torch.Tensor:
    """``[count, CONTEXT + 1]`` int64, bytes of a module of the standard library."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(CONTEXT + 1)].long()


class NextByte(torch.nn.Module):
    """Predicts the next byte of each of a window's bytes: ``loss`` of ``[batch, CONTEXT + 1]``."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(256, width)
        self.mix = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens[:, :-1])
        logits = self.head(self.norm(hidden + torch.tanh(self.mix(hidden)).cumsum(1)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def optimizer(cls: type, params, **options) -> torch.optim.Optimizer:
    return cls(params, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, **options)


def torch_adamw(params, **options) -> torch.optim.Optimizer:
    return optimizer(torch.optim.AdamW, params, **options)


def our_adamw(params, **options) -> fusedopt.AdamW:
    return optimizer(fusedopt.AdamW, params, **options)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = DRIFT) -> None:
    """Every element of every parameter."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def reset_accelerate() -> None:
    """Accelerate keeps its settings in the process."""
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def refuse_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on torch's own clipping fails the test."""

    def clip(*args, **kwargs):
        raise AssertionError("clipped outside of the step")

    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"):
        monkeypatch.setattr(torch.nn.utils, name, clip)
