"""fusedopt.GradScaler used wrongly: torch's errors where torch has one, and nothing lost."""

import re

import pytest
import torch
from cases import assert_same_bits, memory, parameters, set_gradients, train
from scaler_cases import scaled_gradients, scalers

import fusedopt


def errors_of(program, device):
    """What `program` raises with each scaler."""
    raised = []
    for scaler in scalers(device):
        params = parameters([5, 33], device=device)
        opt = fusedopt.AdamW(params, max_grad_norm=1.0)
        with pytest.raises((RuntimeError, AssertionError, ValueError)) as info:
            program(scaler, opt, params)
        raised.append((type(info.value), str(info.value)))
    return raised


def step_twice(scaler, opt, params):
    scaled_gradients(params, scaler)
    scaler.step(opt)
    before = memory(opt)
    try:
        scaler.step(opt)
    finally:
        assert_same_bits(memory(opt), before)


def step_before_scale(scaler, opt, params):
    set_gradients(params)
    scaler.step(opt)


def closure_by_name(scaler, opt, params):
    scaled_gradients(params, scaler)
    scaler.step(opt, closure=lambda: None)


def unscale_twice(scaler, opt, params):
    scaled_gradients(params, scaler)
    scaler.unscale_(opt)
    scaler.unscale_(opt)


def unscale_after_step(scaler, opt, params):
    scaled_gradients(params, scaler)
    scaler.step(opt)
    scaler.unscale_(opt)


def no_gradients(scaler, opt, params):
    scaler.scale(torch.zeros((), device=params[0].device))
    scaler.step(opt)
    scaler.update()


def no_gradients_after_a_step(scaler, opt, params):
    train(opt, params, 1)
    opt.zero_grad()
    before = memory(opt)
    scaler.scale(torch.zeros((), device=params[0].device))
    scaler.step(opt)
    assert_same_bits(memory(opt), before)
    scaler.update()


def update_without_step(scaler, opt, params):
    scaled_gradients(params, scaler)
    scaler.update()


@pytest.mark.parametrize(
    "program",
    [
        step_twice,
        step_before_scale,
        closure_by_name,
        unscale_twice,
        unscale_after_step,
        no_gradients,
        no_gradients_after_a_step,
        update_without_step,
    ],
    ids=lambda program: program.__name__,
)
def test_errors_are_torchs(program, device):
    ours, theirs = errors_of(program, device)
    assert ours == theirs


@pytest.mark.parametrize("growth", [{"growth_factor": 1.0}, {"backoff_factor": 1.0}], ids=str)
def test_constructor_is_torchs(growth):
    with pytest.raises(AssertionError):
        fusedopt.GradScaler("cpu", **growth)


def test_a_step_that_fails_leaves_nothing_behind(device):
    """And can be done again."""
    params = parameters([5, 33], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, max_grad_norm=1.0), scalers(device)
    scaled_gradients(params, scaler)
    grad, params[1].grad = params[1].grad, params[1].grad.to_sparse()
    opt.grad_scale = own = torch.tensor(2.0, device=device)
    with pytest.raises(RuntimeError, match="dense"):
        scaler.step(opt)
    assert opt.grad_scale is own and not {"found_inf", "_nonfinite_found"} & opt.__dict__.keys()
    params[1].grad = grad
    scaler.step(opt)
    scaler.update()
    assert float(opt.state[params[0]]["step"]) == 1


def test_unscale_needs_plain_gradients(device):
    params = parameters([5, 33], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params), scalers(device)
    scaled_gradients(params, scaler)
    params[1].main_grad, params[1].grad = params[1].grad, None
    before = [params[0].grad.clone(), params[1].main_grad.clone()]
    with pytest.raises(RuntimeError, match=re.escape("scaler.step(optimizer) without unscale_")):
        scaler.unscale_(opt)
    assert_same_bits([params[0].grad, params[1].main_grad], before)
    scaler.step(opt)
    scaler.update()
    assert {float(opt.state[p]["step"]) for p in params} == {1.0}


def test_unscale_refuses_accumulated_gradients(device):
    params = parameters([5], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params), scalers(device)
    accumulator = fusedopt.GradAccumulator(opt)
    for seed in range(2):
        scaled_gradients(params, scaler, seed)
        if not seed:
            accumulator.accumulate()
    before = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="accumulated main gradients"):
        scaler.unscale_(opt)
    assert_same_bits(params[0].grad, before)
    scaler.step(opt)  # the gradients are still there
    scaler.update()
    scaled_gradients(params, scaler)
    scaler.unscale_(opt)  # nothing accumulated now
