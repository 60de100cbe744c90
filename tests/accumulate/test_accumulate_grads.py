"""Main gradients themselves: how exact they are, and GradAccumulator alone, for anybody's optimizer."""

import pytest
import torch
from accumulated import Expected, backward, give
from bounds import Bounded, assert_within
from cases import DTYPES, assert_same_bits, normal, parameter, parameters

import fusedopt

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZES = [0, 1, 3, 8, 17, 255, 1023, 4097, 8193, 65537]
SMALL = [5, 0, 4097, 300]


# ---- accuracy ------------------------------------------------------------------------------------------------------


def test_64_bfloat16_micro_batches_are_as_exact_as_float32(device):
    """Beside plain accumulation in bfloat16 `.grad`.

    Bound: addition k rounds the partial sum s_k, a relative error of u = 2^-24 at most, so by the triangle inequality
    ||error|| <= u (||s_2|| + ... + ||s_K||); the division adds u ||s_K||. In bfloat16, u = 2^-9, the same sum bounds
    the error from above. From below: the last addition alone leaves an error that is nearly uniform within half an
    ulp, and an ulp is u of an element at least, so its norm is near u / sqrt(12) ||s_K|| or more; 2^-11 is less.
    """
    count, n = 64, 20_000
    grads = [normal((n,), BFLOAT16, device, seed=k) for k in range(count)]
    partial = torch.stack([g.double() for g in grads]).cumsum(0)
    exact, steps = partial[-1], partial[1:].norm(dim=1).sum()
    p = parameter(torch.zeros(n, dtype=BFLOAT16, device=device))
    q = parameter(torch.zeros(n, dtype=BFLOAT16, device=device))
    opt = fusedopt.AdamW([p], betas=(0.5, 0.5), state_dtype="fp32")
    acc = fusedopt.GradAccumulator(opt)
    for k, grad in enumerate(grads):
        p.grad = grad.clone()
        if k + 1 < count:
            acc.accumulate()
        (q * grad).sum().backward()
    opt.step()
    ours = 2 * opt.state[p]["exp_avg"].double()  # (1 - beta1) of the mean, exactly
    ours_error = (ours - exact / count).norm() / (exact / count).norm()
    plain_error = (q.grad.double() - exact).norm() / exact.norm()
    assert ours_error <= 2.0**-24 * (steps / exact.norm() + 1)
    assert ours_error <= 64 * 2.0**-24
    assert 2.0**-11 <= plain_error <= 2.0**-9 * steps / exact.norm()
    assert plain_error >= 2**13 * ours_error


# ---- alone ---------------------------------------------------------------------------------------------------------


def gathered(acc, params, weights) -> tuple[list, Expected]:
    expected = Expected(params, acc.dtype, acc.reduction)
    for k, weight in enumerate(weights):
        give(params, k)
        if k + 1 < len(weights):
            expected.fold(weight)
            acc.accumulate(weight)
    acc.weight = weights[-1]
    expected.fold(weights[-1])
    return acc.grads(), expected


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [3.0, 0.5, 2.0]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grads_for_anybody(dtype, main, reduction, weights, device):
    params = parameters(SIZES, dtype, device)
    acc = fusedopt.GradAccumulator(params, main, reduction=reduction)
    grads, expected = gathered(acc, params, weights)
    divisor = expected.weights if reduction == "mean" else 1.0
    for p, grad in zip(params, grads, strict=True):
        assert (grad.shape, grad.device) == (p.shape, p.device) and p.grad is None
        assert grad.dtype == (torch.float64 if dtype == torch.float64 else main)
        assert_within(grad, expected.sums[p] / divisor)
    assert not acc.holds and acc.micro_batches == 0


def test_float32_sums_have_the_bits_of_torchs(device):
    params = parameters(SIZES, BFLOAT16, device)
    acc = fusedopt.GradAccumulator(iter(params), reduction="sum")
    sums = [torch.zeros(p.shape, device=device) for p in params]
    for k in range(5):
        give(params, k)
        for total, p in zip(sums, params, strict=True):
            total.add_(p.grad)
        acc.accumulate()
    assert_same_bits(acc.grads(), sums)


def test_torch_optimizer(device):
    """assign_grads() and torch's AdamW: the same as a `.grad` of the same values."""
    params, other = (parameters(SMALL, device=device) for _ in range(2))
    opt, expected = torch.optim.AdamW(params, lr=0.01), torch.optim.AdamW(other, lr=0.01)
    acc = fusedopt.GradAccumulator(opt)
    for turn in range(3):
        for k in range(2):
            backward(params, 2 * turn + k)
            acc.accumulate()
        acc.assign_grads()
        for i, q in enumerate(other):
            first, second = (normal(q.shape, device=device, seed=10_000 + 100 * (2 * turn + k) + i) for k in range(2))
            q.grad = (first + second) / 2
        assert_same_bits([p.grad for p in params], [q.grad for q in other])
        opt.step()
        expected.step()
        opt.zero_grad(set_to_none=turn != 1)  # the one after it adds to main gradients in place
    assert_same_bits([p.detach() for p in params], [q.detach() for q in other])


def test_assigned_gradients_have_the_parameters_dtype(device):
    params = [*parameters(SMALL, BFLOAT16, device), *parameters(SMALL, device=device)]
    acc = fusedopt.GradAccumulator(params)
    rests = params[3]
    for k in range(2):
        give(params, k)
        rests.grad = None
        acc.accumulate()
    acc.assign_grads()
    assert rests.grad is None
    for i, p in enumerate(params):
        if p is not rests:
            one, two = (normal(p.shape, p.dtype, device, seed=10_000 + 100 * k + i).float() for k in range(2))
            assert_same_bits(p.grad, ((one + two) / 2).to(p.dtype))


def test_main_gradients_of_a_list_may_be_any_tensors_parameters(device):
    """Not only parameters: leaves that require no gradient, whose `.grad` somebody sets."""
    leaf = torch.zeros(5, device=device)
    acc = fusedopt.GradAccumulator([leaf])
    for k in range(2):
        leaf.grad = torch.full_like(leaf, k + 1.0)
        acc.accumulate()
    assert_within(acc.grads()[0], Bounded.exact(torch.full((5,), 1.5), FLOAT32))
