"""torch.amp.GradScaler, on CPU and CUDA: its protocol, and training beside torch under the same scaler."""

import copy
import math
import pickle

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import ONE_EACH, ONE_EACH_WITH_PEER, assert_same_bits, memory, parameters, set_gradients, train

import fusedopt

SIZES = [5, 0, 4097]


def scaler_for(device, **kwargs):
    return torch.amp.GradScaler(device.type, **{"init_scale": 2.0**10, "growth_interval": 3} | kwargs)


def scaled_gradients(params, scaler, seed, overflow=False):
    """Gradients as backward() leaves them on a scaled loss; `overflow` puts an infinity into the last one."""
    scaler.scale(torch.zeros((), device=params[0].device))  # makes the scaler create its scale tensor
    set_gradients(params, seed=seed, scale=scaler.get_scale())
    if overflow:
        params[-1].grad[-1] = math.inf


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, False),
        ({"fused": False}, False),
        ({"fused": True}, True),
        ({"max_grad_norm": 1.0}, True),
        ({"max_grad_value": 1.0}, True),
        ({"nonfinite": "skip"}, True),
    ],
    ids=str,
)
def test_protocol_flag(kwargs, expected, device):
    """A property, so that copies keep it and changing a limit changes it."""
    opt = fusedopt.AdamW(parameters([5], device=device), **kwargs)
    assert opt._step_supports_amp_scaling is expected
    assert copy.deepcopy(opt)._step_supports_amp_scaling is expected
    assert pickle.loads(pickle.dumps(opt))._step_supports_amp_scaling is expected
    opt.max_grad_norm = 1.0
    assert opt._step_supports_amp_scaling is True


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_beside_torch_under_a_scaler(case, kwargs, unscale, device):
    """200 steps with random overflows: the same scale at every step, the same count of updates, the same parameters."""
    if not case.takes(**kwargs):
        pytest.skip("no such argument, as in torch")
    ours, theirs = (parameters(SIZES, device=device) for _ in range(2))
    opt, peer = case.make(ours, **kwargs), case.make_peer(theirs)
    scaler, peer_scaler = scaler_for(device), scaler_for(device)
    overflows = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.2
    for step, overflow in enumerate(overflows.tolist()):
        scaled_gradients(ours, scaler, step, overflow)
        scaled_gradients(theirs, peer_scaler, step, overflow)
        if unscale:
            scaler.unscale_(opt)
        peer_scaler.unscale_(peer)
        if "max_grad_norm" in kwargs:
            torch.nn.utils.clip_grad_norm_(theirs, kwargs["max_grad_norm"])
        for one, optimizer in ((scaler, opt), (peer_scaler, peer)):
            one.step(optimizer)
            one.update()
        assert scaler.get_scale() == peer_scaler.get_scale()
    assert {float(opt.state[p]["step"]) for p in ours} == {200.0 - overflows.sum().item()}
    for p, q in zip(ours, theirs, strict=True):
        # 160 updates, each with at most 16 roundings (test_torch_parity.py) at the largest parameter, about 4; the
        # coefficients of the two clips differ in the last places, which Adam's update hardly sees.
        torch.testing.assert_close(p, q, rtol=0, atol=160 * 16 * 2.0**-24 * 4)


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_one_step_under_a_scaler(case, unscale, device):
    """Divided by the scale exactly once; grad_norm is of unscaled gradients; both attributes are gone afterwards."""
    params = parameters(SIZES, device=device)
    opt, scaler = case.make(params, max_grad_norm=0.5), scaler_for(device)
    for step in range(2):
        scaled_gradients(params, scaler, step)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params)) / scaler.get_scale()
        if unscale:
            scaler.unscale_(opt)
        before = before_step(opt, case.rule)
        scale = 1.0 if unscale else scaler.get_scale()
        scaler.step(opt)
        assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        assert_stepped(opt, case.rule, before, grad_scale=scale, clip_coef=opt.clip_coef.item())
        assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")
        scaler.update()


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("kwargs", [{"fused": True}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_overflow_step_changes_nothing(case, kwargs, unscale, device):
    """Not the step counters either, and not on the first step, where states are made."""
    if not case.takes(**kwargs):
        pytest.skip("no such argument, as in torch")
    params, clean = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected, scaler = case.make(params, **kwargs), case.make(clean, **kwargs), scaler_for(device)
    for step, overflow in enumerate((True, False, True, True, False)):
        scaled_gradients(params, scaler, step, overflow)
        if not overflow:
            set_gradients(clean, seed=step)
            expected.step()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert opt.step_was_skipped.item() is overflow
    assert opt.skipped_steps.item() == 3
    assert_same_bits(memory(opt), memory(expected))  # scales are powers of two, so scaling is exact


@pytest.mark.parametrize("found_inf", [1.0, 2.0, [1.0], [2.0]], ids=str)
def test_any_found_inf_that_is_not_zero_skips(found_inf, device):
    """It is a sum over devices and ranks, and some code shapes it (1,)."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    train(opt, params, 1)
    before = memory(opt)
    set_gradients(params, seed=1)
    opt.found_inf, opt.grad_scale = torch.tensor(found_inf, device=device), None
    opt.step()
    assert_same_bits(memory(opt), before)
    assert opt.step_was_skipped.item() is True
    opt.found_inf.zero_()
    opt.step()
    assert opt.step_was_skipped.item() is False and float(opt.state[params[0]]["step"]) == 2


@pytest.mark.parametrize("grad_scale", [64.0, [64.0]], ids=str)
def test_grad_scale_divides(grad_scale, device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.Adam(params, fused=True)
    set_gradients(params, scale=64.0)
    opt.grad_scale, opt.found_inf = torch.tensor(grad_scale, device=device), torch.zeros((), device=device)
    before = before_step(opt, "adam")
    opt.step()
    assert_stepped(opt, "adam", before, grad_scale=64.0)


def test_float16_parameters_with_scaler_and_clip(device):
    """'Attempting to unscale FP16 gradients' elsewhere."""
    params = parameters(SIZES, torch.float16, device)
    opt, scaler = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5), scaler_for(device)
    for step in range(3):
        scaled_gradients(params, scaler, step)
        before, scale = before_step(opt, "adamw"), scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        assert_stepped(opt, "adamw", before, grad_scale=scale, clip_coef=opt.clip_coef.item())


def test_disabled_scaler(device):
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = fusedopt.AdamW(params, max_grad_norm=1.0), fusedopt.AdamW(plain, max_grad_norm=1.0)
    scaler = scaler_for(device, enabled=False)
    for p in (params, plain):
        set_gradients(p)
    scaler.step(opt)
    scaler.update()
    expected.step()
    assert_same_bits(memory(opt), memory(expected))


def test_autocast_training(device):
    """A whole loop: autocast, scaled loss, backward, fused unscale and clip."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).to(device)
    y = x.sum(1, keepdim=True).sin()
    opt, scaler = fusedopt.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0), scaler_for(device, init_scale=2.0**24)
    losses = []
    for _ in range(80):
        opt.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = (model(x).float() - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert float(opt.state[model[0].weight]["step"]) + opt.skipped_steps.item() == 80
    assert opt.skipped_steps.item() > 0, "the initial scale was meant to overflow"
