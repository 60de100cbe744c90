"""When a repeated step declines, without a GPU: one of no launches does nothing and says whether it would have."""

import pytest
from cases import parameters, set_gradients, train

import fusedopt
from fusedopt import _C, backends


@pytest.fixture
def repeated(monkeypatch):
    """(optimizer, its repeated step)."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    opt = fusedopt.AdamW(params := parameters([5, 300]))
    train(opt, params, 2)
    set_gradients(params, seed=2)
    step = _C.RepeatedStep(
        opt._plan.watch, opt._scalars, (), lambda: False, lambda _: 0, 0, opt._backend, backends.context_backend
    )
    return opt, step


def test_it_runs(repeated):
    opt, step = repeated
    assert step.run(opt.__dict__) and step.run(opt.__dict__)


@pytest.mark.parametrize("name", ["reference", "triton", "cpu", "auto"])
def test_another_context(name, repeated):
    opt, step = repeated
    with fusedopt.use_backend(name):
        assert not step.run(opt.__dict__)
    assert step.run(opt.__dict__)


@pytest.mark.parametrize("name", ["reference", "triton", "cpu", "nonsense"])
def test_another_environment(name, repeated, monkeypatch):
    opt, step = repeated
    monkeypatch.setenv("FUSEDOPT_BACKEND", name)
    assert not step.run(opt.__dict__)
    monkeypatch.setenv("FUSEDOPT_BACKEND", "")
    assert step.run(opt.__dict__)
    monkeypatch.delenv("FUSEDOPT_BACKEND")
    assert step.run(opt.__dict__)


def test_another_attribute(repeated):
    opt, step = repeated
    opt.backend = "reference"
    assert not step.run(opt.__dict__)
    opt.backend = None
    assert step.run(opt.__dict__)
