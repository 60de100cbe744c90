"""Clipping inside the step: norms and coefficients against float64, and the update with them against the reference."""

import math
import subprocess
import sys

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import DTYPES, ONE_EACH, assert_same_bits, generator, memory, normal, parameter, parameters, set_gradients

import fusedopt
from fusedopt import reference
from fusedopt.testing.judge import COEF_RTOL, NORM_RTOL
from fusedopt.testing.trials import threads

SIZES = [1, 0, 17, 4097, 65537]
NORM_TYPES = [1.0, 2.0, math.inf]


def unscaled(grads, grad_scale=1.0, max_grad_value=None):
    return [
        reference.transform_gradient(g.double(), grad_scale=grad_scale, max_grad_value=max_grad_value) for g in grads
    ]


def assert_clipped_step(opt, rule, params, **transform):
    """grad_norm and clip_coef are right, and the update is the reference's with exactly this coefficient."""
    before = before_step(opt, rule)
    opt.step()
    norm = reference.total_norm(unscaled([b.grad for b in before], **transform), opt.norm_type)
    coef = reference.clip_coefficient(norm, opt.max_grad_norm) if opt.max_grad_norm else torch.tensor(1.0)
    for value in (opt.grad_norm, opt.clip_coef):
        assert (value.shape, value.dtype, value.device) == ((), torch.float32, params[0].device)
    if opt.max_grad_norm:
        assert opt.grad_norm.item() == pytest.approx(norm.item(), rel=NORM_RTOL)
    assert opt.clip_coef.item() == pytest.approx(coef.item(), rel=COEF_RTOL)
    # float64 parameters are scaled by the coefficient before it was rounded to float32; it is as exact as the norm is,
    # whose lower-precision gradients are summed in float over a few elements.
    wide = opt._control().clip_coef64.cpu()
    assert wide.item() == pytest.approx(coef.item(), rel=COEF_RTOL)
    double = [b for b in before if b.param.dtype == torch.float64]
    single = [b for b in before if b.param.dtype != torch.float64]
    for records, factor in ((double, wide), (single, opt.clip_coef)):
        if records:
            assert_stepped(opt, rule, records, clip_coef=factor.item(), **transform)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_clip(norm_type, dtype, device):
    """A limit that clips and one that does not, on the same optimizer."""
    params = parameters(SIZES, dtype, device)
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5, norm_type=norm_type)
    for step, max_norm in enumerate((0.5, 1e6, 0.25)):
        opt.max_grad_norm = max_norm
        set_gradients(params, seed=step)
        assert_clipped_step(opt, "adamw", params)
        assert (opt.clip_coef.item() < 1) == (max_norm < 1)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_unscale_value_clip_norm_clip(case, device):
    """All at once, in this order: the norm is that of unscaled, value-clipped gradients."""
    params = parameters(SIZES, device=device)
    opt = case.make(params, max_grad_norm=3.0, max_grad_value=0.75)
    for step in range(3):
        set_gradients(params, seed=step, scale=48.0)
        opt.grad_scale, opt.found_inf = (torch.tensor(x, device=device) for x in (48.0, 0.0))
        assert_clipped_step(opt, case.rule, params, grad_scale=48.0, max_grad_value=0.75)
        del opt.grad_scale, opt.found_inf


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_value_clip_alone(case, device):
    params = parameters(SIZES, device=device)
    opt = case.make(params, max_grad_value=0.3)
    for step in range(2):
        set_gradients(params, seed=step)
        assert_clipped_step(opt, case.rule, params, max_grad_value=0.3)
        assert opt.clip_coef.item() == 1


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_beside_torchs_clip_grad_norm(norm_type, device):
    """Ten steps with torch's clip_grad_norm_ and AdamW in float64; ours leaves the gradients alone."""
    ours, theirs = (parameters([5, 33, 4097], torch.float64, device) for _ in range(2))
    fused = fusedopt.AdamW(ours, lr=0.02, max_grad_norm=0.7, norm_type=norm_type)
    plain = torch.optim.AdamW(theirs, lr=0.02)
    for step in range(10):
        for params in (ours, theirs):
            set_gradients(params, seed=step, scale=0.01 if step % 3 == 0 else 1.0)
        grads = [p.grad.clone() for p in ours]
        fused.step()
        assert_same_bits([p.grad for p in ours], grads)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7, norm_type)
        plain.step()
        assert fused.grad_norm.item() == pytest.approx(norm.item(), rel=NORM_RTOL)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_beside_torchs_clip_grad_value(device):
    ours, theirs = (parameters([5, 33, 4097], torch.float64, device) for _ in range(2))
    fused = fusedopt.Adam(ours, lr=0.02, max_grad_value=0.4)
    plain = torch.optim.Adam(theirs, lr=0.02)
    for step in range(5):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        fused.step()
        torch.nn.utils.clip_grad_value_(theirs, 0.4)
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_value_clip_keeps_nan(device):
    """In a step and in the function; infinities become the bound."""
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 0.25, -2.0] * 1000, device=device)
    expected = torch.tensor([math.nan, 0.5, -0.5, 0.25, -0.5] * 1000, device=device)
    p = parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    fusedopt.SGD([p], lr=1.0, max_grad_value=0.5).step()
    torch.testing.assert_close(p.detach(), -expected, rtol=0, atol=0, equal_nan=True)
    fusedopt.clip_grad_value_([p], 0.5)
    torch.testing.assert_close(p.grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, 6e4), (torch.float32, 1e30), (torch.bfloat16, 1e30)])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("numel", [300, 5000])  # fewer and more than an engine adds up in float at a time
def test_large_gradients_do_not_overflow_the_norm(numel, norm_type, dtype, magnitude, device):
    """torch returns an infinite norm here, clips with 0 and makes a zero step without a word."""
    p = parameter(normal((numel,), dtype, device))
    p.grad = torch.full_like(p, magnitude)
    p.grad[1::2].neg_()
    opt = fusedopt.AdamW([p], lr=0.01, max_grad_norm=1.0, norm_type=norm_type)
    assert_clipped_step(opt, "adamw", [p])
    assert 0 < opt.clip_coef.item() < 1


@pytest.mark.parametrize("numel", [300, 5000])
def test_small_gradients_do_not_underflow_the_norm(numel, device):
    """Squares of 1e-30 vanish in float32."""
    p = parameter(normal((numel,), device=device))
    p.grad = torch.full_like(p, 1e-30)
    opt = fusedopt.AdamW([p], max_grad_norm=1.0)
    opt.step()
    assert opt.grad_norm.item() == pytest.approx(math.sqrt(numel) * 1e-30, rel=1e-6, abs=0)
    assert opt.clip_coef.item() == 1


def test_norm_beyond_float32(device):
    """Finite gradients whose norm float32 cannot hold: infinite norm, a coefficient of (almost) zero, and no NaN."""
    p = parameter(normal((300,), device=device))
    p.grad = torch.full_like(p, 3e38)
    opt = fusedopt.AdamW([p], lr=0.1, max_grad_norm=1.0)
    before = before_step(opt, "adamw")
    opt.step()
    assert opt.grad_norm.item() == math.inf and 0 <= opt.clip_coef.item() < 1e-38
    assert_stepped(opt, "adamw", before, clip_coef=opt.clip_coef.item())


def test_norm_at_the_limit(device):
    """Norm 5 exactly: torch's 1e-6 in the denominator clips by a hair at 5 and not at 5 + 2e-6."""
    for max_norm, clips in ((5.0, True), (5.000002, False)):
        p = parameter(normal((2,), device=device))
        p.grad = torch.tensor([3.0, -4.0], device=device)
        opt = fusedopt.AdamW([p], max_grad_norm=max_norm)
        opt.step()
        assert opt.grad_norm.item() == 5
        assert (opt.clip_coef.item() < 1) is clips
        assert opt.clip_coef.item() == pytest.approx(min(1, max_norm / (5 + 1e-6)), rel=COEF_RTOL)


def test_zero_gradients(device):
    """Norm 0 gives coefficient 1, and no NaN: torch.distributed.checkpoint makes such a step."""
    for opt_class in (fusedopt.Adam, fusedopt.AdamW, fusedopt.Lion):
        for norm_type in NORM_TYPES:
            p = parameter(normal((33,), device=device))
            opt = opt_class([p], lr=0.01, weight_decay=0.0, max_grad_norm=1.0, norm_type=norm_type)
            p.grad = torch.zeros_like(p)
            before = p.detach().clone()
            opt.step()
            assert (opt.grad_norm.item(), opt.clip_coef.item()) == (0, 1)
            assert torch.equal(p, before)


def test_norm_covers_all_dtypes_groups_and_layouts(device):
    """One norm over everything that has a gradient; parameters without one do not count, gaps in memory neither."""
    params = [p for i, dtype in enumerate(DTYPES) for p in parameters([5, 4099], dtype, device, seed=i)]
    odd = parameter(normal((64, 33), device=device))
    idle = parameter(normal((9,), device=device))
    opt = fusedopt.AdamW(
        [{"params": params[::2], "lr": 0.1}, {"params": [*params[1::2], idle, odd]}], max_grad_norm=0.5
    )
    for step in range(2):
        set_gradients(params, seed=step)
        gapped = torch.full((64, 66), 1e10, device=device)
        odd.grad = gapped[:, ::2].copy_(normal((64, 33), device=device, seed=step))
        assert_clipped_step(opt, "adamw", params)


def test_grad_norm_without_a_norm_pass(device):
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params)
    set_gradients(params)
    opt.step()
    assert opt.grad_norm.isnan() and opt.clip_coef.item() == 1
    assert not opt.step_was_skipped and opt.skipped_steps.item() == 0


def test_norm_is_measured_for_skipping_alone(device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, nonfinite="skip")
    set_gradients(params)
    opt.step()
    norm = reference.total_norm([p.grad for p in params]).item()
    assert opt.grad_norm.item() == pytest.approx(norm, rel=NORM_RTOL) and opt.clip_coef.item() == 1


def test_limit_can_be_changed_and_taken_away(device):
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = fusedopt.AdamW(params, max_grad_norm=0.1, max_grad_value=0.1), fusedopt.AdamW(plain)
    opt.max_grad_norm = opt.max_grad_value = None
    for p in (params, plain):
        set_gradients(p)
    opt.step()
    expected.step()
    assert_same_bits(memory(opt), memory(expected))


def test_limit_changes_between_steps(device):
    """Each step takes the limit that there is, after others with the same one, which leave it with the device."""
    params = parameters([300], device=device)
    opt = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
    for limit in (1.0, 1.0, 0.5, 0.5, 0.25):
        opt.max_grad_norm = limit
        params[0].grad = torch.full_like(params[0], 2.0)
        opt.step()
        assert opt.clip_coef.item() == pytest.approx(limit / (2.0 * math.sqrt(300)), rel=COEF_RTOL)


# ---- determinism --------------------------------------------------------------------------------------------------

NORM_SCRIPT = """
import sys, torch, fusedopt
device = sys.argv[1]

def norms(threads):
    torch.set_num_threads(threads)
    params = []
    for i, n in enumerate((100_003, 1, 17, 65_537)):
        random = torch.Generator().manual_seed(i)
        p = torch.nn.Parameter(torch.randn(n, generator=random).to(device))
        p.grad = torch.randn(n, generator=random).to(device) * 1.1
        params.append(p)
    for norm_type in (1.0, 2.0, float("inf")):
        opt = fusedopt.AdamW(params, max_grad_norm=1.0, norm_type=norm_type)
        opt.step()
        yield opt.grad_norm.item().hex()
        yield opt.clip_coef.item().hex()
    yield sum(p.double().sum().item() for p in params).hex()

for threads in (1, 2, 3):
    print(*norms(threads))
"""


def test_same_bits_in_every_process_and_for_any_number_of_threads(device):
    """Two processes, three numbers of threads."""
    command = [sys.executable, "-c", NORM_SCRIPT, str(device)]
    lines = [line for _ in range(2) for line in subprocess.check_output(command, text=True).splitlines()]
    assert len(lines) == 6 and len(set(lines)) == 1, "\n".join(lines)


def sums_of_many_magnitudes(device, seed):
    """Float64 tensors, a chunk each, of one to 2048 elements, the largest 2^40 times the smallest."""
    random = generator(seed)
    sizes = torch.tensor([1, 63, 500, 2048])[torch.randint(4, (1500,), generator=random)]
    exponents = torch.randint(-40, 1, (1500,), generator=random).repeat_interleave(sizes)
    values = torch.ldexp(normal((int(sizes.sum()),), torch.float64, seed=seed), exponents)
    return values.to(device).split(sizes.tolist())


def test_order_of_sums_is_always_the_same(device):
    """Whichever block or thread is done first: partial sums are added in one order.

    Seen in float64 and without a root, in the last place of the sum. Where the order is one of chance, at least every
    third sum of these magnitudes has other bits; on a GPU other work disturbs every other one.
    """
    side = torch.cuda.Stream() if device.type == "cuda" else None
    noise = torch.ones(1 << 20, device=device)
    for seed in range(4):
        tensors, sums = sums_of_many_magnitudes(device, seed), []
        with threads(4):
            for attempt in range(20):
                if side and attempt % 2:
                    with torch.cuda.stream(side):
                        noise = noise.cos()
                sums.append(fusedopt.get_total_norm(tensors, 1.0))
        assert sums[0].dtype == torch.float64
        assert sums[0].item() == pytest.approx(torch.cat(tensors).abs().sum().item(), rel=2.0**-40)
        assert_same_bits(sums, sums[:1] * 20)


def test_same_bits_every_time(device):
    """Gradients in other memory each time, other alignment too."""
    params = parameters([65537, 8193, 5], device=device)
    opt = fusedopt.AdamW(params, lr=0.0, max_grad_norm=1.0)
    norms = []
    for attempt in range(6):
        for i, p in enumerate(params):
            offset = attempt % 4
            buffer = torch.empty(p.numel() + offset, device=device)
            p.grad = buffer[offset:].copy_(normal(p.shape, device=device, seed=i))
        opt.step()
        norms.append(opt.grad_norm.clone())
    assert_same_bits(norms, norms[:1] * 6)
