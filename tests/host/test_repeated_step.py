"""When a repeated step declines to be made, fails, and is freed."""

import gc
import weakref

import pytest
import torch
from cases import parameters, set_gradients, train

import fusedopt
from fusedopt import _C
from fusedopt.backends import context_backend


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


def with_launches(params, exchange):
    """A repeated step of kernels that launch no blocks, on any machine, and an exchange between them."""
    opt = fusedopt.AdamW(params)
    train(opt, params, 2)
    plan, [tables] = opt._plan, opt._plan.tables
    step = _C.RepeatedStep(
        watch=plan.watch,
        hypers=list(tables.hypers.values()),
        args=[bucket.args for bucket in tables.buckets],
        finding=(tables.device, tables.control.norm_found_inf),
        scalars=opt._scalars,
        hooks=({}, {}),
        backend=opt._backend,
        context_backend=context_backend,
        reports=False,
        accumulator=None,
        divisor=None,
        has_own_grads=True,
        run_passes=None,
    )
    step.launch_on(lambda index: 0, tables.device.index)
    [bucket] = tables.buckets
    step.add(bucket.table, bucket.hypers, bucket.args, 0, 0, 0, 3840, False)
    step.exchange(exchange)
    step.add(None, None, bucket.args.copy(), 0, 0, 0, 0, False)
    return opt, step, bucket


def test_an_exchange(device, monkeypatch):
    """Once a step; what it raises arrives, and the next step is made."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    calls, failing = [], []
    opt, step, _ = with_launches(
        parameters([5, 300], device=device), lambda: calls.append(1) or fail(*failing or [None])
    )
    assert step.run(opt.__dict__) and step.run(opt.__dict__) and len(calls) == 2
    failing.append(RuntimeError("a process ended"))
    with pytest.raises(RuntimeError, match="a process ended"):
        step.run(opt.__dict__)
    failing.clear()
    assert step.run(opt.__dict__) and len(calls) == 4
    opt.param_groups[0]["params"].pop()
    assert not step.run(opt.__dict__) and len(calls) == 4


def test_several_exchanges(device, monkeypatch):
    """In the order in which they were added; one that fails is the step's last."""
    monkeypatch.delenv("FUSEDOPT_BACKEND", raising=False)
    calls, failing = [], []
    opt, step, _ = with_launches(
        parameters([5, 300], device=device), lambda: calls.append("first") or fail(*failing or [None])
    )
    step.exchange(lambda: calls.append("second"))
    assert step.run(opt.__dict__) and calls == ["first", "second"]
    failing.append(RuntimeError("a process ended"))
    with pytest.raises(RuntimeError, match="a process ended"):
        step.run(opt.__dict__)
    assert calls == ["first", "second", "first"]


def test_launches_that_do_not_fit(device):
    _, step, bucket = with_launches(parameters([5, 300], device=device), lambda: None)
    for pair in ((bucket.table, None), (None, bucket.hypers)):
        with pytest.raises(ValueError, match="expected both or neither"):
            step.add(*pair, bucket.args, 0, 0, 0, 0, False)


def test_copies_of_arguments():
    args = _C.PassArgs()
    args.partials, args.num_partials = 64, 3
    copy = args.copy()
    copy.partials = 128
    assert (args.partials, copy.partials, copy.num_partials) == (64, 128, 3)


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


def test_an_exchange_that_refers_to_the_optimizer_is_freed(device):
    kept = []
    opt, step, _ = with_launches(parameters([5, 300], device=device), lambda: kept)
    opt.own_step = step
    kept.append(opt)
    gone = weakref.ref(opt)
    del opt, step, _
    kept = None
    gc.collect()
    assert gone() is None
