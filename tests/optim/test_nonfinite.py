"""Gradients that are infinite or NaN: the whole step skipped on request, propagated as in torch by default."""

import math

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import (
    CASES,
    DTYPES,
    ONE_EACH,
    ONE_EACH_WITH_PEER,
    assert_same_bits,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

import fusedopt

SIZES = [4097, 0, 1, 17, 8193]
NONFINITE = [math.inf, -math.inf, math.nan]
# (tensor, element): the ends of the first and the last tensor, a tail, a middle, a tensor of one element
PLACES = [(0, 0), (0, 4096), (2, 0), (3, 8), (4, 4095), (4, 8192)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("value", NONFINITE)
@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 0.5}], ids=str)
def test_skipped_step_changes_nothing(limits, value, place, device):
    """Also where clipping by value would have made an infinity finite."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, nonfinite="skip", **limits)
    train(opt, params, 2)
    before = memory(opt)
    set_gradients(params, seed=2)
    tensor, element = place
    params[tensor].grad[element] = value
    grads = [p.grad.clone() for p in params]
    opt.step()
    assert_same_bits(memory(opt), before)
    assert_same_bits([p.grad for p in params], grads)
    assert opt.step_was_skipped.item() is True and opt.skipped_steps.item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_training_with_skipped_steps_is_training_without_them(case, dtype, device):
    """Bit for bit; the first step, before there are states, and two in a row are skipped."""
    params, clean = (parameters(SIZES, dtype, device) for _ in range(2))
    opt = case.make(params, nonfinite="skip", max_grad_norm=1.0)
    expected = case.make(clean, nonfinite="skip", max_grad_norm=1.0)
    skipped, good = 0, 0
    for bad in (True, False, False, True, True, False, True):
        set_gradients(params, seed=good)
        if bad:
            params[(0, 2, 4)[skipped % 3]].grad[-1] = NONFINITE[skipped % 3]
            skipped += 1
        else:
            set_gradients(clean, seed=good)
            expected.step()
            good += 1
        opt.step()
        assert opt.step_was_skipped.item() is bad
        assert opt.skipped_steps.item() == skipped
    assert_same_bits(memory(opt), memory(expected))
    assert expected.skipped_steps.item() == 0 and {float(opt.state[p]["step"]) for p in params} == {3.0}


def test_counters(device):
    """Tensors on the device of the first parameter, there before the first step."""
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params, nonfinite="skip")
    assert opt.skipped_steps.item() == 0 and opt.step_was_skipped.item() is False
    for value, skipped, count in ((math.nan, True, 1), (1.0, False, 1), (math.inf, True, 2)):
        params[0].grad = torch.full_like(params[0], value)
        opt.step()
        assert (opt.step_was_skipped.item(), opt.skipped_steps.item()) == (skipped, count)
        for tensor, dtype in ((opt.step_was_skipped, torch.bool), (opt.skipped_steps, torch.int64)):
            assert (tensor.dtype, tensor.shape, tensor.device) == (dtype, (), params[0].device)


def test_finite_gradients_with_an_infinite_norm_are_not_skipped(device):
    """It is the elements that count: a norm of 6e39 has nothing non-finite in it."""
    params = parameters([400], device=device)
    params[0].grad = torch.full_like(params[0], 3e38)
    opt = fusedopt.Lion(params, nonfinite="skip")
    opt.step()
    assert opt.step_was_skipped.item() is False and float(opt.state[params[0]]["step"]) == 1


def test_skipping_can_be_switched(device):
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params)
    opt.nonfinite = "skip"
    params[0].grad = torch.full_like(params[0], math.nan)
    opt.step()
    assert not params[0].isnan().any()
    opt.nonfinite = "propagate"
    opt.step()
    assert params[0].isnan().all() and opt.step_was_skipped.item() is False


@pytest.mark.parametrize("case", CASES, ids=str)
def test_propagation_follows_the_rule(case, device):
    """By default each element meets the rule's arithmetic, infinities and NaN included, and no other element notices.

    What the step after that makes of an infinite moment is open: inf in the papers' form, NaN in torch's lerp.
    """
    params = parameters(SIZES, device=device)
    opt = case.make(params)
    for step in range(2):
        set_gradients(params, seed=step)
        if step == 1:
            for (tensor, element), value in zip(PLACES, NONFINITE * 2, strict=True):
                params[tensor].grad[element] = value
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)
    assert opt.step_was_skipped.item() is False


@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_propagation_is_torchs(case, device):
    results = []
    for make in (case.make, case.make_peer):
        p = parameter(normal((33,), device=device))
        opt = make([p])
        train(opt, [p], 2)
        p.grad = torch.full_like(p, 0.5)
        p.grad[:3] = torch.tensor(NONFINITE)
        opt.step()
        results.append((p.detach(), *(opt.state[p][key] for key in case.rule_spec.states)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_norm_of_nonfinite_gradients_of_every_order(norm_type, device):
    """Wherever the element is among those that a vector, a block or a chunk adds up; larger ones come after it."""
    for place in (0, 40, 1100, 4999):
        grad = normal((5000,), device=device).abs()
        grad[4990:4998] = 1e3
        grad[place] = math.nan
        assert fusedopt.get_total_norm([grad, torch.full((70_000,), 9.0, device=device)], norm_type).isnan(), place
        grad[place] = -math.inf
        assert fusedopt.get_total_norm([grad], norm_type).item() == math.inf, place


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adam", "rmsprop", "adagrad", "radam"])
def test_infinite_parameter_without_decay(name, device):
    """A decay of 0 leaves it out of the gradient: 0 times infinity would be NaN in its states for good."""
    case = next(case for case in CASES if case.name == name)
    p = parameter(normal((33,), device=device))
    p.data[3], p.data[32] = math.inf, -math.inf
    opt = case.make([p], weight_decay=0.0)
    train(opt, [p], 2)
    assert (p[3].item(), p[32].item()) == (math.inf, -math.inf)
    assert all(value.isfinite().all() for value in opt.state[p].values())


def test_norm_of_nonfinite_gradients(device):
    """Propagated through the clip as torch.nn.utils.clip_grad_norm_ does: NaN clips to NaN, infinity to 0 or NaN."""
    for value in (math.nan, math.inf):
        p = parameter(normal((33,), device=device))
        p.grad = torch.ones_like(p)
        p.grad[7] = value
        opt = fusedopt.AdamW([p], max_grad_norm=1.0)
        before = before_step(opt, "adamw")
        opt.step()
        assert opt.grad_norm.isnan() if math.isnan(value) else opt.grad_norm.item() == math.inf
        assert opt.clip_coef.isnan() if math.isnan(value) else opt.clip_coef.item() == 0
        assert_stepped(opt, "adamw", before, clip_coef=opt.clip_coef.item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lion_does_not_hide_nan(dtype, device):
    """sign(NaN) is NaN: neither a step of lr nor a weight that silently never moves again."""
    p = parameter(normal((4097,), dtype, device))
    opt = fusedopt.Lion([p], lr=0.1)
    train(opt, [p], 1)
    set_gradients([p], seed=1)
    p.grad[[0, 5, 4096]] = math.nan
    opt.step()
    for t in (p.detach(), opt.state[p]["exp_avg"]):
        assert t.isnan().nonzero().flatten().tolist() == [0, 5, 4096]
