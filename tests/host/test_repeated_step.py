"""When a repeated step declines to be made, fails, and is freed."""

import gc
import weakref

import pytest
import torch
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


def test_what_it_is_given(repeated):
    step = repeated[1]
    with pytest.raises(TypeError, match="__dict__"):
        step.run([])
    with pytest.raises(TypeError):
        step.run()


def test_errors_of_the_passes(device, monkeypatch):
    """Arrive as they are, and the next step is made."""
    opt = fusedopt.AdamW(params := parameters([5, 300], device=device))
    backend = fusedopt.backends.for_device(device)
    with monkeypatch.context() as patch:
        failing = iter([None, KeyError("no launch")])
        patch.setattr(backend, "launches", lambda *_: None, raising=False)
        patch.setattr(backend, "repeat", lambda *_: fail(next(failing)), raising=False)
        train(opt, params, 2)
        with pytest.raises(KeyError, match="no launch"):
            train(opt, params, 1)
        assert opt._steps == 2


def fail(error):
    if error is not None:
        raise error


@pytest.mark.parametrize("accumulates", [False, True])
def test_it_is_freed_with_all_that_it_refers_to(accumulates, device):
    """What a scaler gave last is kept for the device's sake; it may refer to the optimizer."""
    params, scale = parameters([5, 300], device=device), torch.ones((), device=device)
    opt = fusedopt.AdamW(params)
    if accumulates:
        fusedopt.GradAccumulator(opt)
    for step in range(3):
        opt.grad_scale = opt.found_inf = scale * 0 if step == 2 else scale
        train(opt, params, 1)
    assert opt._plan.repetition is not None
    opt.found_inf.owner = opt
    gone = weakref.ref(opt)
    del opt, params, scale
    gc.collect()
    assert gone() is None
