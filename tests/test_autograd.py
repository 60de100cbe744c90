"""Raw writes to parameters must be visible to autograd, or backward silently uses overwritten weights."""

import pytest
import torch
from cases import ONE_EACH, normal, parameter

import fusedopt


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_step_between_forward_and_backward_is_noticed(case, device):
    w = parameter(normal((5, 5), device=device))
    opt = case.make([w])
    w.grad = torch.ones_like(w)
    opt.step()  # first steps may differ from later ones
    x = normal((2, 5), device=device).requires_grad_()
    y = (x @ w).square().sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_first_step_between_forward_and_backward_is_noticed(device):
    """And one that a hook sends the long way, which steps like the one before do not take."""
    w = parameter(normal((5, 5), device=device))
    opt = fusedopt.AdamW([w])
    w.grad = torch.ones_like(w)
    for _ in range(2):
        y = (normal((2, 5), device=device).requires_grad_() @ w).square().sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
        opt.register_step_pre_hook(lambda *_: None)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_only_what_was_written_counts_as_modified(case, device):
    """Parameters without a gradient keep their version, and so do gradients, which a step only reads."""
    trained, idle = (parameter(normal((5, 5), device=device)) for _ in range(2))
    opt = case.make([trained, idle])
    trained.grad = torch.ones_like(trained)
    opt.step()
    versions = [t._version for t in (trained, idle, trained.grad)]
    opt.step()
    after = [t._version for t in (trained, idle, trained.grad)]
    assert [a > v for a, v in zip(after, versions, strict=True)] == [True, False, False]


def test_step_leaves_no_graph(device):
    """Neither parameters nor states nor telemetry require grad or hold a graph, in any grad mode."""
    w = parameter(normal((5, 5), device=device))
    w.grad = torch.ones_like(w)
    opt = fusedopt.AdamW([w], max_grad_norm=1.0)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            opt.step()
        assert w.is_leaf and w.requires_grad and w.grad_fn is None
        assert not any(t.requires_grad for t in (*opt.state[w].values(), opt.grad_norm, opt.clip_coef))


def test_functions_on_gradients_are_noticed(device):
    """clip_grad_norm_, clip_grad_value_ and unscale_grads_ write gradients that another graph may hold."""
    for function in (
        lambda p: fusedopt.clip_grad_norm_([p], 0.1),
        lambda p: fusedopt.clip_grad_value_([p], 0.1),
        lambda p: fusedopt.unscale_grads_([p], 2.0),
    ):
        p = parameter(normal((5,), device=device))
        p.grad = normal((5,), device=device, seed=1)
        y = (normal((5,), device=device).requires_grad_() * p.grad).sum()
        function(p)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_functional_is_noticed(device):
    w, g, m = (normal((5, 5), device=device, seed=i) for i in range(3))
    step = torch.zeros((), device=device)
    x = normal((2, 5), device=device).requires_grad_()
    y = (x @ w).square().sum()
    fusedopt.functional.lion_([w], [g], [m], [step], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_hooks_and_backward_inside_step(device):
    """Optimizer in backward: a post-accumulate hook steps and frees the gradient, with grad mode off."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = {p: fusedopt.AdamW([p], lr=0.1) for p in model.parameters()}

    def step_and_free(p):
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_free)
    x = normal((4, 5), device=device)
    for _ in range(2):
        model(x).square().sum().backward()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert {float(opt.state[p]["step"]) for p, opt in optimizers.items()} == {2.0}
