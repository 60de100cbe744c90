"""The recipe of docs/integrations.md in torchtitan's own container: beside torch's AdamW, and its checkpoints."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from models import NextByte, assert_close, state_of, windows

import fusedopt

REASON = "needs torchtitan, which is not in the extra test-integrations: it brings wandb, datasets and more"
optimizers = pytest.importorskip("torchtitan.components.optimizer", reason=REASON)
clip_grad_norm_ = pytest.importorskip("torchtitan.distributed.utils", reason=REASON).clip_grad_norm_

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
STEPS = 4


@pytest.fixture(scope="module")
def recipe():
    """The settings that the page's block makes."""
    (block,) = re.findall(r"^```python\n(# needs torchtitan\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {"__name__": __name__, "fusedopt": fusedopt}
    exec(block, names)
    return names["optimizer"]


def train(config, model, steps=range(STEPS), state=None):
    """torchtitan's loop around its optimizers, in short; the container."""
    container = config.build(model_parts=[model])
    if state is not None:
        container.load_state_dict(state)
    device = next(model.parameters()).device
    for step in steps:
        container.zero_grad()
        model(windows(4, seed=step).to(device)).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        container.step()
    return container


def test_recipe_trains_with_ours(recipe, device):
    model = NextByte().to(device)
    (optimizer,) = train(recipe, model)
    assert isinstance(optimizer, fusedopt.AdamW)
    assert {optimizer.state[param]["exp_avg"].dtype for param in model.parameters()} == {torch.bfloat16}


def test_parameters_are_those_of_torchs_adamw(recipe, device):
    ours, theirs = (NextByte().double().to(device) for _ in range(2))
    train(dataclasses.replace(recipe, optimizer_factory_kwargs_by_name={}), ours)
    train(optimizers.OptimizersContainer.Config(param_groups=recipe.param_groups, implementation="for-loop"), theirs)
    assert_close(state_of(ours), state_of(theirs))


def test_checkpoint_goes_on_bit_for_bit(recipe, device):
    model = NextByte().to(device)
    saved = train(recipe, model, range(2)).state_dict()
    resumed = NextByte().to(device)
    resumed.load_state_dict(model.state_dict())
    train(recipe, resumed, range(2, STEPS), state=saved)
    expected = NextByte().to(device)
    train(recipe, expected)
    assert_close(state_of(resumed), state_of(expected), atol=0)
