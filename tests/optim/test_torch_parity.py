"""The same program beside torch.optim: each scenario runs with either optimizer and must leave the same numbers."""

import copy

import pytest
import torch
from cases import BY_RULE, ONE_EACH_WITH_PEER, WITH_PEER, normal, parameter, parameters, set_gradients, train
from parity import assert_same_numbers, torch_adagrad_takes_new_groups
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


# Each scenario gets `make(params, **kwargs)` and fresh parameters, trains, and returns the optimizer.


@scenario
def constant(make, params):
    opt = make(params)
    train(opt, params, 12)
    return opt


@scenario
def warmup_and_cosine(make, params):
    opt = make(params, lr=0.02)
    warmup = lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=4)
    schedule = lr_scheduler.SequentialLR(opt, [warmup, lr_scheduler.CosineAnnealingLR(opt, 8)], milestones=[4])
    for step in range(12):
        train(opt, params, 1, first=step)
        schedule.step()
    return opt


@scenario
def one_cycle(make, params):
    """Rewrites lr, and betas or momentum, every step."""
    opt = make(params)
    cycles = bool({"betas", "momentum"} & opt.defaults.keys())
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=12, cycle_momentum=cycles)
    for step in range(12):
        train(opt, params, 1, first=step)
        schedule.step()
    return opt


@scenario
def tensor_lr(make, params):
    lr = torch.tensor(0.02, dtype=torch.float64)
    opt = make(params, lr=lr)
    schedule = lr_scheduler.ExponentialLR(opt, 0.8)
    for step in range(6):
        train(opt, params, 1, first=step)
        schedule.step()
    lr.fill_(0.1)
    train(opt, params, 3, first=6)
    assert opt.param_groups[0]["lr"] is lr
    return opt


@scenario
def tensor_lr_on_the_device(make, params):
    opt = make(params, lr=torch.tensor(0.02, dtype=params[0].dtype, device=params[0].device))
    train(opt, params, 5)
    return opt


@scenario
def closure(make, params):
    opt = make(params)
    targets = [normal(p.shape, p.dtype, p.device, seed=50 + i) for i, p in enumerate(params)]

    def loss():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        value = sum((p - t).square().sum() for p, t in zip(params, targets, strict=True))
        value.backward()
        return value

    values = [opt.step(loss).item() for _ in range(8)] + [opt.step(closure=loss).item()]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]
    return opt


@scenario
def groups(make, params):
    opt = make(
        [
            {"params": params[:1], "lr": 0.1},
            {"params": []},
            {"params": params[1:3], "weight_decay": 0.0, "betas": (0.5, 0.7)},
            {"params": params[3:], "eps": 1e-3, "maximize": True},
        ]
    )
    train(opt, params, 6)
    return opt


@scenario
def hyper_parameters_changed_by_hand(make, params):
    opt = make(params)
    train(opt, params, 3)
    opt.param_groups[0].update(lr=0.3, betas=(0.7, 0.8), eps=1e-2, weight_decay=0.0, maximize=True)
    train(opt, params, 3, first=3)
    opt.param_groups[0].update(weight_decay=0.5, maximize=False)
    train(opt, params, 3, first=6)
    return opt


@scenario
def frozen_then_trained(make, params):
    params[0].requires_grad_(False)
    opt = make(params)
    train(opt, params[1:], 4)
    params[0].requires_grad_(True)
    train(opt, params, 4, first=4)
    return opt


@scenario
def intermittent_gradients(make, params):
    """Every parameter has its own step counter, so its own bias correction."""
    opt = make(params)
    for step in range(9):
        set_gradients(params, seed=step)
        for i, p in enumerate(params):
            if (step + i) % 3 == 0:
                p.grad = None
        opt.step()
    assert len({float(state.get("step", 0)) for state in opt.state.values()}) == 1
    return opt


@scenario
def late_first_gradient(make, params):
    opt = make(params)
    train(opt, params[:1], 5)
    train(opt, params, 5, first=5)
    assert sorted({float(state["step"]) for state in opt.state.values() if "step" in state}) in ([5, 10], [])
    return opt


@scenario
def group_added_in_training(make, params):
    opt = make(params[:2])
    train(opt, params[:2], 4)
    opt.add_param_group({"params": params[2:], "lr": 0.05})
    train(opt, params, 4, first=4)
    return opt


@scenario
def hooks(make, params):
    """A pre-hook that changes gradients, a post-hook, and the global ones: each is called once a step."""
    opt, calls = make(params), []

    def halve(optimizer, args, kwargs):
        calls.append("pre")
        for p in params:
            p.grad = p.grad / 2

    opt.register_step_pre_hook(halve)
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    train(opt, params, 3)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(["pre", "post", "global pre", "global post"] * 3)
    return opt


@scenario
def gradients_zeroed_in_place(make, params):
    opt = make(params)
    train(opt, params, 3)
    addresses = [p.grad.data_ptr() for p in params]
    opt.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    opt.step()
    assert [p.grad.data_ptr() for p in params] == addresses
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    opt.step()
    train(opt, params, 2, first=4)
    return opt


@scenario
def named_parameters(make, params):
    opt = make([(f"layer.{i}", p) for i, p in enumerate(params)])
    train(opt, params, 3)
    assert opt.param_groups[0]["param_names"] == [f"layer.{i}" for i in range(len(params))]
    return opt


def params_for(device, dtype=torch.float32):
    return parameters([5, 0, 33, 4097], dtype, device, seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_same_numbers_as_torch(scenario, case, dtype, device):
    ours = scenario(case.make, params_for(device, dtype))
    if scenario is group_added_in_training and case.optimizer == "Adagrad" and not torch_adagrad_takes_new_groups():
        pytest.skip("this torch's Adagrad cannot step after add_param_group")
    theirs = scenario(
        lambda params, **kwargs: case.make_peer(params, foreach=False, **kwargs), params_for(device, dtype)
    )
    assert_same_numbers(ours, theirs)


@pytest.mark.parametrize("case", WITH_PEER, ids=str)
def test_every_row_beside_foreach(case, device):
    params = [parameters([5, 0, 33, 4097], dtype, device) for dtype in (torch.float32, torch.float64)]
    mixed = [p for pair in zip(*params, strict=True) for p in pair]
    twins = copy.deepcopy(mixed)
    ours, theirs = case.make(mixed), case.make_peer(twins, foreach=True)
    train(ours, mixed, 30)
    train(theirs, twins, 30)
    assert_same_numbers(ours, theirs, steps=30)


@pytest.mark.parametrize(
    "scenario", [one_cycle, intermittent_gradients, group_added_in_training, hooks], ids=lambda s: s.__name__
)
def test_lion_programs_run(scenario, device):
    """Lion has no peer in torch: the scenarios that depend on the optimizer's class run, and reach every parameter."""
    params = params_for(device)
    before = copy.deepcopy(params)
    scenario(lambda params, **kwargs: fusedopt.Lion(params, **{"lr": 1e-2} | kwargs), params)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True) if p.numel())


def test_huge_gradients_overflow_as_in_torch(device):
    """A square beyond float32 makes exp_avg_sq infinite and the update zero: no NaN, no jump."""
    results = []
    for optimizer in (fusedopt.AdamW, torch.optim.AdamW):
        p = parameter(normal((33,), device=device))
        opt = optimizer([p], lr=0.1)
        for scale in (1.0, 1e30, 1.0):
            p.grad = normal((33,), device=device) * scale
            opt.step()
        results.append((p.detach(), opt.state[p]["exp_avg_sq"]))
    (ours, ours_sq), (theirs, theirs_sq) = results
    assert theirs_sq.isinf().all()
    assert torch.equal(ours_sq, theirs_sq)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_trains_a_model(case, device):
    """Losses fall, and are torch's where torch has the optimizer. In float64: training amplifies every rounding."""
    losses = train_model(case.make, device)
    assert losses[-1] < losses[0] * 2 / 3
    if case.has_peer:
        torch.testing.assert_close(losses, train_model(case.make_peer, device), rtol=1e-9, atol=0)


def train_model(make, device):
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 1))
    model = torch.nn.ModuleDict({"body": body, "unused": torch.nn.Linear(3, 3)}).double().to(device)
    x = normal((64, 8), torch.float64, device)
    y = x.sum(1, keepdim=True).sin()
    opt, losses = make(model.parameters(), weight_decay=0.01), []
    for _ in range(80):
        loss = (model["body"](x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return torch.stack(losses)
