"""Exceptions in code of the user's that runs inside of ours: hooks, closures, backward passes."""

import pytest
import torch
from cases import assert_same_bits, memory, normal, set_gradients, train

import fusedopt


class Planted(Exception):
    pass


def fail(*args, **kwargs):
    raise Planted


def make(device, cls=fusedopt.AdamW, **options):
    params = [torch.nn.Parameter(normal(shape, device=device, seed=i)) for i, shape in enumerate([(300,), (4, 5)])]
    return params, cls(params, lr=0.1, **options)


@pytest.mark.parametrize("repeated", [0, 3], ids=["first_step", "later_step"])
def test_step_pre_hook(repeated, device):
    """Nothing has happened; without the hook the step is made."""
    params, opt = make(device)
    expected_params, expected = make(device)
    train(opt, params, repeated)
    train(expected, expected_params, repeated)
    hook = opt.register_step_pre_hook(fail)
    before = memory(opt)
    set_gradients(params, seed=9)
    with pytest.raises(Planted):
        opt.step()
    assert_same_bits(memory(opt), before)
    hook.remove()
    opt.step()
    set_gradients(expected_params, seed=9)
    expected.step()
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.parametrize("repeated", [0, 3], ids=["first_step", "later_step"])
def test_step_post_hook(repeated, device):
    """The step has been made, as torch's."""
    params, opt = make(device)
    expected_params, expected = make(device)
    train(opt, params, repeated)
    train(expected, expected_params, repeated + 1)
    hook = opt.register_step_post_hook(fail)
    set_gradients(params, seed=repeated)
    with pytest.raises(Planted):
        opt.step()
    assert_same_bits(memory(opt), memory(expected))
    hook.remove()
    train(opt, params, 1, first=repeated + 1)
    train(expected, expected_params, 1, first=repeated + 1)
    assert_same_bits(memory(opt), memory(expected))
    assert opt.last_step.step == expected.last_step.step


def test_closure(device):
    """Nothing has happened, and gradients are enabled or not as before."""
    params, opt = make(device)
    train(opt, params, 2)
    before, last = memory(opt), opt.last_step
    with torch.no_grad(), pytest.raises(Planted):
        opt.step(fail)
    assert torch.is_grad_enabled()
    assert_same_bits(memory(opt), before)
    assert opt.last_step == last


@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_state_dict_hook(post, device):
    params, opt = make(device)
    train(opt, params, 2)
    before = memory(opt)
    hook = opt.register_state_dict_post_hook(fail) if post else opt.register_state_dict_pre_hook(fail)
    with pytest.raises(Planted):
        opt.state_dict()
    hook.remove()
    assert_same_bits(memory(opt), before)
    assert set(opt.state_dict()["state"]) == {0, 1}


def test_load_state_dict_hooks(device):
    """Before the checkpoint is loaded nothing has changed; after it, all of it has."""
    params, opt = make(device)
    train(opt, params, 2)
    checkpoint = opt.state_dict()
    other_params, other = make(device)
    train(other, other_params, 1, first=5)
    before = memory(other)
    hook = other.register_load_state_dict_pre_hook(fail)
    with pytest.raises(Planted):
        other.load_state_dict(checkpoint)
    assert_same_bits(memory(other), before)
    hook.remove()
    hook = other.register_load_state_dict_post_hook(fail)
    with pytest.raises(Planted):
        other.load_state_dict(checkpoint)
    hook.remove()
    with torch.no_grad():
        for p, trained in zip(other_params, params):
            p.copy_(trained)
    assert_same_bits(memory(other), memory(opt))
    train(opt, params, 1, first=2)
    train(other, other_params, 1, first=2)
    assert_same_bits(memory(other), memory(opt))


@pytest.mark.parametrize("first", [True, False], ids=["before_ours", "after_ours"])
def test_hook_beside_released_gradients(first, device):
    """The backward pass ends there. Each parameter has had its step, or has its gradient still and had none."""
    params, opt = make(device)
    if not first:
        opt.release_gradients()
    hook = params[0].register_post_accumulate_grad_hook(fail)
    if first:
        opt.release_gradients()
    before = [p.detach().clone() for p in params]
    with pytest.raises(Planted):
        sum(p.square().sum() for p in params).backward()
    for p, old in zip(params, before):
        stepped = p in opt.state and float(opt.state[p]["step"]) == 1
        assert torch.equal(p, old) != stepped
        assert not (stepped and p.grad is not None)
    assert (params[0] in opt.state) != first
    hook.remove()
    opt.zero_grad()
    sum(p.square().sum() for p in params).backward()
    assert all(p.grad is None for p in params)
    assert float(opt.state[params[0]]["step"]) == (1 if first else 2)


def test_backward_pass_beside_accumulation_hooks(device):
    """What has been folded before the exception is there until reset() or zero_grad() drop it."""
    params, opt = make(device)
    accumulator = fusedopt.GradAccumulator(opt, hooks=True)
    hook = params[0].register_post_accumulate_grad_hook(fail)
    with pytest.raises(Planted):
        sum(p.square().sum() for p in params).backward()
    hook.remove()
    opt.zero_grad()
    assert accumulator.micro_batches == 0 and not accumulator.holds
    expected_params, expected = make(device)
    for model, step in ((params, opt), (expected_params, expected)):
        sum(p.square().sum() for p in model).backward()
        step.step()
    assert_same_bits(memory(opt), memory(expected))


def test_use_backend_is_left(device):
    """An exception inside `use_backend` leaves it."""
    with pytest.raises(Planted), fusedopt.use_backend("reference"):
        raise Planted
    params, opt = make(device)
    train(opt, params, 1)
    assert opt._plan.backend is None
