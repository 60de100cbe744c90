"""When a repeated step declines to be made: where somebody asks for another backend than for the one before."""

import pytest
from cases import parameters, set_gradients, train

import fusedopt


@pytest.fixture
def repeated(device, monkeypatch):
    """(optimizer, what repeats its step)."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    opt = fusedopt.AdamW(params := parameters([5, 300], device=device))
    train(opt, params, 2)
    set_gradients(params, seed=2)
    return opt, opt._plan.repetition


def test_it_runs(repeated):
    opt, step = repeated
    assert step.run(opt.__dict__) and step.run(opt.__dict__)


@pytest.mark.parametrize("name", ["reference", "triton", "cpu", "auto"])
def test_another_context(name, repeated):
    opt, step = repeated
    with fusedopt.use_backend(name):
        assert not step.run(opt.__dict__)
    assert step.run(opt.__dict__)


def test_another_attribute(repeated):
    opt, step = repeated
    opt.backend = "reference"
    assert not step.run(opt.__dict__)
    opt.backend = None
    assert step.run(opt.__dict__)
