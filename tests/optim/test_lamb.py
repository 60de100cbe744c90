"""LAMB beside apex's FusedLAMB, written out: norms of tensors, where they count, what spoils them; and its launches."""

import math

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import assert_same_bits, memory, normal, parameter, parameters, set_gradients, train

import fusedopt

NUMELS = [1, 7, 4097, 200_003]  # the last one has several chunks in every engine


def apex_step(params, moments, group, step):
    """apex's two stages (csrc/multi_tensor_lamb.cu), of all tensors, in float64, without clipping."""
    beta1, beta2 = group["betas"]
    beta3 = 1 - beta1 if group["grad_averaging"] else 1.0
    bias1, bias2 = (1 - beta1**step, 1 - beta2**step) if group["bias_correction"] else (1.0, 1.0)
    decay = group["weight_decay"]
    for p, (m, v) in zip(params, moments):
        g = p.grad.double() + (0.0 if group["adam_w_mode"] else decay * p)
        m.mul_(beta1).add_(beta3 * g)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        update = (m / bias1) / ((v / bias2).sqrt() + group["eps"])
        update += decay * p if group["adam_w_mode"] else 0.0
        ratio = group["lr"]
        if group["use_nvlamb"] or decay != 0.0:
            param_norm, update_norm = p.norm().item(), update.norm().item()
            if param_norm != 0.0 and update_norm != 0.0:
                ratio *= param_norm / update_norm
        p.sub_(ratio * update)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "use_nvlamb": True},
        {"adam_w_mode": False, "weight_decay": 0.2},
        {"bias_correction": False, "grad_averaging": False, "betas": (0.7, 0.95)},
    ],
    ids=str,
)
def test_takes_apexs_steps(kwargs, device):
    """Tensors of very different sizes. To within 16 roundings a step at the magnitude of the largest element."""
    params = [parameter(normal((n,), device=device, seed=n) * 10.0 ** (i - 2)) for i, n in enumerate(NUMELS)]
    exact = [p.detach().double().cpu().requires_grad_() for p in params]
    opt = fusedopt.LAMB(params, lr=0.02, **kwargs)
    largest = [q.abs().max().item() for q in exact]
    moments = [(torch.zeros_like(p.detach()), torch.zeros_like(p.detach())) for p in exact]
    for step in range(1, 7):
        set_gradients(params, seed=step)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.double().cpu()
        opt.step()
        with torch.no_grad():
            apex_step(exact, moments, opt.param_groups[0], step)
        largest = [max(most, q.abs().max().item()) for most, q in zip(largest, exact, strict=True)]
    for p, q, most in zip(params, exact, largest, strict=True):
        atol = 6 * 16 * 2.0**-24 * most
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=0, atol=atol)


def test_defaults_are_apexs(device):
    """But for max_grad_norm, which is an attribute, and None."""
    opt = fusedopt.LAMB(parameters([3], device=device))
    group = opt.param_groups[0]
    given = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
    given |= {"bias_correction": True, "adam_w_mode": True, "grad_averaging": True, "use_nvlamb": False}
    assert {key: group[key] for key in given} == given and opt.max_grad_norm is None


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_may_leave_the_range_of_floats(scale, device):
    """Norms of elements whose squares are 0 or infinite in float32."""
    p = parameter(normal((9000,), device=device) * scale)
    opt = fusedopt.LAMB([p], lr=0.1, weight_decay=0.0, use_nvlamb=True)
    for step in range(2):
        set_gradients([p], seed=step)
        before = before_step(opt, "lamb")
        opt.step()
        assert_stepped(opt, "lamb", before)
    moved = (p.detach().cpu() - normal((9000,)) * scale).double().norm() / (normal((9000,)) * scale).double().norm()
    assert 0.1 < moved < 0.3  # two steps of 0.1


def test_where_a_norm_is_zero_the_ratio_is_one(device):
    """A new bias moves by lr times Adam's update; a tensor whose update is 0 does not move."""
    bias, still = (parameter(values.to(device)) for values in (torch.zeros(300), normal((300,))))
    start = still.detach().clone()
    opt = fusedopt.LAMB([{"params": [bias]}, {"params": [still], "weight_decay": 0.0, "use_nvlamb": True}], lr=0.5)
    bias.grad, still.grad = torch.ones_like(bias), torch.zeros_like(still)
    opt.step()
    torch.testing.assert_close(bias.detach(), torch.full_like(bias, -0.5), rtol=1e-5, atol=0)  # eps is 1e-6
    assert_same_bits(still.detach(), start)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_element_spoils_its_tensor_and_no_other(bad, device):
    """The norm is NaN, and so is every element that it multiplies: it shows, as with apex."""
    params, clean = (parameters(NUMELS, device=device) for _ in range(2))
    for own in (params, clean):
        set_gradients(own)
    params[2].grad[4000] = bad
    opt, expected = fusedopt.LAMB(params), fusedopt.LAMB(clean)
    opt.step()
    expected.step()
    assert params[2].isnan().all()
    for i in (0, 1, 3):
        assert_same_bits(params[i].detach(), clean[i].detach())


def test_norms_are_of_the_clipped_gradient(device):
    """Scale, clip and accumulate: what is measured is what is updated. Adam's update hardly knows scales; eps does."""
    params = parameters(NUMELS, device=device)
    opt = fusedopt.LAMB(params, lr=0.1, eps=0.3, max_grad_norm=0.5, max_grad_value=1.5, maximize=True)
    opt.grad_scale = torch.tensor(4.0, device=device)
    for step in range(2):
        set_gradients(params, seed=step, scale=4.0)
        before = before_step(opt, "lamb")
        opt.step()
        transform = {"grad_scale": 4.0, "max_grad_value": 1.5, "clip_coef": opt.clip_coef.item()}
        assert opt.clip_coef.item() < 1
        assert_stepped(opt, "lamb", before, **transform)


def test_other_tensors_do_not_matter(device):
    """Each tensor's step is the one that it takes alone, and tensors without a gradient come in between."""
    params, alone = (parameters(NUMELS, device=device) for _ in range(2))
    opt = fusedopt.LAMB(params)
    each = [fusedopt.LAMB([p]) for p in alone]
    for step in range(4):
        for own in (params, alone):
            set_gradients(own, seed=step)
            own[step].grad = None
        opt.step()
        for single in each:
            single.step()
    assert_same_bits(memory(opt), [tensor for single in each for tensor in memory(single)])


def test_runs_repeat_their_bits(device):
    results = []
    for _ in range(3):
        params = parameters(NUMELS, torch.float64, device)
        opt = fusedopt.LAMB(params)
        train(opt, params, 3)
        results.append(memory(opt))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(("kwargs", "expected"), [({}, 2), ({"max_grad_norm": 1.0}, 3)], ids=str)
def test_launches(kwargs, expected, backend):
    """One more than other rules have, for all tensors; repeated steps too."""
    params = parameters([1 + i % 37 for i in range(300)], device="cuda")
    opt = fusedopt.LAMB(params, backend=backend, **kwargs)
    train(opt, params, 2)
    for step in range(2):
        set_gradients(params, seed=step)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            opt.step()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) == expected, names
