"""clip_grad_norm_, get_total_norm, clip_grad_value_ and unscale_grads_ against float64, with torch's semantics."""

import inspect
import math

import pytest
import torch
from cases import DTYPES, GRAD_LAYOUTS, PARAM_LAYOUTS, assert_same_bits, normal, parameter, parameters, set_gradients

import fusedopt
from fusedopt import reference

SIZES = [1, 0, 17, 4097, 65537]
NORM_TYPES = [1.0, 2.0, math.inf]
NORM_RTOL = {torch.float64: 1e-13}  # else two ulp of float32, as in optim/test_clip.py
FLOAT32_RTOL = 2 * 2.0**-23


def gradients(dtype, device, scale=1.0):
    return [normal((n,), dtype, device, seed=i) * scale for i, n in enumerate(SIZES)]


def assert_scaled(grads, before, factor):
    """grads = before * factor to within half an ulp of storage and two roundings of the float32 product.

    The factor itself is known to within five roundings of float32.
    """
    for g, b in zip(grads, before, strict=True):
        exact = b.double() * factor
        bound = reference.ulp(exact.cpu(), g.dtype).to(g.device) / 2 + 7 * 2.0**-24 * exact.abs()
        assert ((g.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_total_norm(norm_type, dtype, device):
    grads = gradients(dtype, device)
    before = [g.clone() for g in grads]
    norm = fusedopt.get_total_norm(grads, norm_type)
    assert (norm.shape, norm.device) == ((), grads[0].device)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.item() == pytest.approx(
        reference.total_norm(grads, norm_type).item(), rel=NORM_RTOL.get(dtype, FLOAT32_RTOL)
    )
    assert_same_bits(grads, before)


def test_total_norm_of_mixed_dtypes_and_layouts(device):
    tensors = [normal((n,), dtype, device, seed=n) for n in (5, 4097) for dtype in DTYPES[:3]]
    makers = [
        PARAM_LAYOUTS[name] for name in ("transposed", "every_second", "columns", "odd_offset", "zero_dim", "empty")
    ]
    tensors += [make(lambda shape: normal(shape, device=device)) for make in makers]
    tensors += [lay(normal((9, 8), device=device)) for lay in GRAD_LAYOUTS.values()]
    norm = fusedopt.get_total_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(reference.total_norm(tensors).item(), rel=FLOAT32_RTOL)
    with_double = fusedopt.get_total_norm([*tensors, normal((3,), torch.float64, device)])
    assert with_double.dtype == torch.float64


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 6e4), (torch.float32, 1e30), (torch.bfloat16, 1e30)])
def test_total_norm_does_not_overflow(dtype, magnitude, device):
    t = torch.full((300,), magnitude, dtype=dtype, device=device)
    assert fusedopt.get_total_norm([t]).item() == pytest.approx(math.sqrt(300) * t[0].item(), rel=FLOAT32_RTOL)


def test_total_norm_of_nothing_and_of_one_tensor(device):
    assert fusedopt.get_total_norm([]).item() == 0
    assert fusedopt.get_total_norm([torch.empty(0, device=device)]).item() == 0
    one = normal((33,), device=device)
    assert fusedopt.get_total_norm(one).item() == fusedopt.get_total_norm([one]).item() > 0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_error_if_nonfinite(value, device):
    params = parameters(SIZES, device=device)
    set_gradients(params)
    params[-1].grad[-1] = value
    grads = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match="finite"):
        fusedopt.get_total_norm([p.grad for p in params], error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="finite"):
        fusedopt.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert_same_bits([p.grad for p in params], grads)
    norm = fusedopt.get_total_norm([p.grad for p in params])
    assert norm.isnan() if math.isnan(value) else norm.item() == math.inf


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_clip_grad_norm(norm_type, dtype, max_norm, device):
    params = [*parameters(SIZES, dtype, device), parameter(normal((3,), dtype, device))]
    set_gradients(params[:-1])
    before = [p.grad.clone() for p in params[:-1]]
    norm = fusedopt.clip_grad_norm_(params, max_norm, norm_type)
    exact = reference.total_norm(before, norm_type)
    assert norm.item() == pytest.approx(exact.item(), rel=NORM_RTOL.get(dtype, FLOAT32_RTOL))
    coef = reference.clip_coefficient(exact, max_norm).item()
    if coef == 1:
        assert_same_bits([p.grad for p in params[:-1]], before)
    assert_scaled([p.grad for p in params[:-1]], before, coef)
    assert params[-1].grad is None


def test_clip_grad_norm_takes_what_torch_takes(device):
    """A single tensor, a generator, no gradients at all, an integer limit, an infinite one."""
    p = parameter(normal((33,), device=device))
    p.grad = torch.ones_like(p)
    assert fusedopt.clip_grad_norm_(p, 1).item() == pytest.approx(math.sqrt(33))
    assert p.grad.norm().item() == pytest.approx(1, rel=1e-6)
    assert fusedopt.clip_grad_norm_((q for q in [p]), 2.0).item() == pytest.approx(1, rel=1e-6)
    unclipped = p.grad.clone()
    assert fusedopt.clip_grad_norm_([p], math.inf).item() == pytest.approx(1, rel=1e-6)  # to read the norm only
    assert torch.equal(p.grad, unclipped)
    p.grad = None
    assert fusedopt.clip_grad_norm_([p], 1.0).item() == 0
    for name in ("clip_grad_norm_", "get_total_norm", "clip_grad_value_"):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (fusedopt, torch.nn.utils))
        ours = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]  # our addition: norm_reduce
        assert [p.name for p in ours] == list(theirs)
        assert [p.default for p in ours] == [p.default for p in theirs.values()]


# Elements that share memory cannot be scaled in place.
@pytest.mark.parametrize("layout", [name for name in GRAD_LAYOUTS if name != "expanded"])
def test_clip_grad_norm_in_place_in_any_layout(layout, device):
    p = parameter(normal((64, 33), device=device))
    p.grad = grad = GRAD_LAYOUTS[layout](normal((64, 33), device=device, seed=1))
    before = grad.clone()
    norm = fusedopt.clip_grad_norm_([p], 1.0)
    assert p.grad is grad
    assert_scaled([grad], [before], reference.clip_coefficient(norm.cpu(), 1.0).item())


def test_clip_grad_norm_of_float16_with_a_large_norm(device):
    p = parameter(normal((300,), torch.float16, device))
    p.grad = torch.full_like(p, 6e4)
    fusedopt.clip_grad_norm_([p], 1.0)
    assert p.grad.float().norm().item() == pytest.approx(1, rel=2.0**-10)  # one rounding to float16 per element


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_grad_value(dtype, device):
    ours, theirs = ([*parameters(SIZES, dtype, device), parameter(normal((3,), dtype, device))] for _ in range(2))
    for params in (ours, theirs):
        set_gradients(params[:-1])
        params[0].grad.fill_(math.nan)
        params[2].grad[:2] = torch.tensor([math.inf, -math.inf])
    assert fusedopt.clip_grad_value_(ours, 0.25) is None
    torch.nn.utils.clip_grad_value_(theirs, 0.25)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(p.grad.nan_to_num(9), q.grad.nan_to_num(9))
    assert ours[-1].grad is None


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unscale_grads(dtype, as_tensor, device):
    for scale in (64.0, 3.0):
        params = [*parameters(SIZES, dtype, device), parameter(normal((3,), dtype, device))]
        set_gradients(params[:-1])
        before = [p.grad.clone() for p in params[:-1]]
        found_inf = fusedopt.unscale_grads_(params, torch.tensor(scale, device=device) if as_tensor else scale)
        assert (found_inf.shape, found_inf.dtype, found_inf.item()) == ((), torch.float32, 0)
        assert_scaled([p.grad for p in params[:-1]], before, 1 / scale)


@pytest.mark.parametrize("place", [(0, 0), (2, 16), (4, 32768), (4, 65536)], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_unscale_grads_finds_nonfinite(value, place, device):
    params = parameters(SIZES, device=device)
    set_gradients(params)
    params[place[0]].grad[place[1]] = value
    assert fusedopt.unscale_grads_(params, 2.0).item() == 1


@pytest.mark.parametrize(
    "flag", [torch.zeros(()).double(), torch.zeros(2), torch.zeros((), device="meta")], ids=["dtype", "shape", "device"]
)
def test_unscale_grads_into_another_kind_of_flag(flag, device):
    params = parameters(SIZES, device=device)
    set_gradients(params)
    before = [p.grad.clone() for p in params]
    with pytest.raises(ValueError, match=f"unscale_grads_: found_inf is .*expected one float32 element on {device}"):
        fusedopt.unscale_grads_(params, 2.0, flag)
    assert_same_bits([p.grad for p in params], before)


def test_unscale_grads_keeps_a_flag_that_is_set(device):
    """A flag collects over several calls, as over several optimizers or micro-batches."""
    params = parameters(SIZES, device=device)
    set_gradients(params)
    for given in (1.0, 2.0, 0.0):
        flag = torch.tensor(given, device=device)
        assert fusedopt.unscale_grads_(params, 2.0, flag) is flag
        assert flag.item() == given
    params[-1].grad[0] = math.inf
    fusedopt.unscale_grads_(params, 2.0, flag)
    assert flag.item() == 1


def test_value_clipping_of_nothing():
    fusedopt.clip_grad_value_([], 1.0)
    param = torch.nn.Parameter(torch.ones(2))
    fusedopt.clip_grad_value_([param], 1.0)
    assert param.grad is None
