"""The elementwise update has the same bits on CPU and CUDA: the CPU suite vouches for the CUDA arithmetic."""

import copy
import math

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import (
    CASES,
    DTYPES,
    FUNCTION_HYPER,
    ONE_EACH,
    SIZES,
    assert_same_bits,
    call_function,
    comparer,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

import fusedopt
from fusedopt import reference, specs

pytestmark = pytest.mark.gpu


def assert_same_numbers(cuda, cpu):
    """Same bits, except that NaN may carry any payload and sign."""
    for a, b in zip(cuda, cpu, strict=True):
        a = a.detach().cpu()
        assert torch.equal(a.isnan(), b.isnan())
        assert_same_bits(a.nan_to_num(7.0, math.inf, -math.inf), b.detach().nan_to_num(7.0, math.inf, -math.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_optimizers(case, dtype):
    """Hard values and sizes, five steps; one gradient with NaN and infinities on the way."""
    cpu = parameters(SIZES, dtype, values=hard_values)
    cuda = parameters(SIZES, dtype, "cuda", values=hard_values)
    on_cpu, on_cuda = case.make(cpu), case.make(cuda)
    for seed in range(5):
        for params, opt in ((cpu, on_cpu), (cuda, on_cuda)):
            set_gradients(params, seed, hard_values)
            if seed == 3:
                params[-1].grad[:3] = torch.tensor([math.inf, -math.inf, math.nan])
            opt.step()
        comparer(assert_same_numbers, case.rule, dtype, 5)(memory(on_cuda), memory(on_cpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", specs.RULES)
def test_functional_with_the_same_clip_coefficient(rule, dtype):
    """Unscale, value clip, norm clip and update, from random steps up to 100,000: pow must agree as well."""
    results = []
    for device in ("cpu", "cuda"):
        params, grads, *states = (
            [hard_values((n,), dtype, seed=20 * role + i).to(device) for i, n in enumerate(SIZES)]
            for role in range(2 + len(reference.STATES[rule]))
        )
        for k, moment in enumerate(specs.RULES[rule].moments):
            states[k] = [v.abs() for v in states[k]] if moment == "second" else states[k]
        random = torch.Generator().manual_seed(0)
        steps = [step.float().to(device) for step in torch.randint(0, 100_000, (len(SIZES),), generator=random)]
        grad_scale, clip_coef = (torch.tensor(x, device=device) for x in (3.0, 0.37))
        for _ in range(3):
            call_function(
                rule,
                params,
                grads,
                states,
                steps,
                **FUNCTION_HYPER[rule] | ({"betas": (0.9, 0.999)} if "betas" in FUNCTION_HYPER[rule] else {}),
                grad_scale=grad_scale,
                clip_coef=clip_coef,
                max_grad_value=1e3,
            )
        results.append([*params, *(s for group in states for s in group), *steps])
    comparer(assert_same_numbers, rule, dtype, 3)(results[1], results[0])


def test_bias_corrections_of_many_steps():
    """One element per step from 1 to 3,000, where 1 - beta**t is most sensitive, and larger ones."""
    steps = [*range(3000), *range(3000, 3_000_000, 29_989)]
    results = []
    for device in ("cpu", "cuda"):
        lists = [[torch.tensor([x], device=device) for _ in steps] for x in (0.0, 0.5, 0.25, 0.125)]
        counters = [torch.tensor(float(step), device=device) for step in steps]
        fusedopt.functional.adamw_(*lists, counters, lr=0.013, betas=(0.9, 0.999), weight_decay=0.0)
        results.append(torch.cat(lists[0]))
    assert_same_numbers([results[1]], [results[0]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipped_steps(dtype):
    """Norms may be summed in another order: they agree to two ulp, and with the same coefficient so do the bits."""
    cpu, cuda = parameters(SIZES, dtype), parameters(SIZES, dtype, "cuda")
    on_cpu, on_cuda = fusedopt.AdamW(cpu, max_grad_norm=1.0), fusedopt.AdamW(cuda, max_grad_norm=1.0)
    set_gradients(cpu)
    set_gradients(cuda)
    on_cpu.step()
    on_cuda.step()
    torch.testing.assert_close(on_cuda.grad_norm.cpu(), on_cpu.grad_norm, rtol=2 * 2.0**-23, atol=0)
    torch.testing.assert_close(on_cuda.clip_coef.cpu(), on_cpu.clip_coef, rtol=4 * 2.0**-23, atol=0)
    used = "clip_coef64" if dtype == torch.float64 else "clip_coef"
    if torch.equal(getattr(on_cuda._control(), used).cpu(), getattr(on_cpu._control(), used)):
        assert_same_numbers(memory(on_cuda), memory(on_cpu))


@pytest.mark.parametrize("count", [3999, 4000, 4097, 5000])
def test_thousands_of_tensors(count):
    """Around and past the number of gradient pointers that fit into kernel parameters; new memory every step."""
    cpu = parameters([1 + i % 37 for i in range(count)])
    cuda = [parameter(p.detach().cuda()) for p in cpu]
    on_cpu, on_cuda = fusedopt.AdamW(cpu, nonfinite="skip"), fusedopt.AdamW(cuda, nonfinite="skip")
    flat = sum(p.numel() for p in cpu)
    for seed in range(3):
        grads = normal((flat,), seed=seed)
        for params, gradient in ((cpu, grads), (cuda, grads.cuda())):
            for p, grad in zip(params, gradient.split([p.numel() for p in params]), strict=True):
                p.grad = grad
        on_cpu.step()
        on_cuda.step()
        assert on_cuda.grad_norm.item() == pytest.approx(grads.double().norm().item(), rel=1e-6)
    assert_same_numbers([p.detach() for p in cuda], [p.detach() for p in cpu])


def test_pointer_table_is_not_overwritten_in_flight():
    """Many steps issued at once, each with other gradient pointers, while the device is busy."""
    count = 5000
    cuda = [parameter(torch.zeros(3, device="cuda")) for _ in range(count)]
    opt = fusedopt.Lion(cuda, lr=1.0, betas=(0.0, 0.0))
    gradients = [torch.full((count, 3), value, device="cuda") for value in (1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0)]
    for p, g in zip(cuda, gradients[0], strict=True):
        p.grad = torch.zeros_like(g)
    opt.step()  # builds everything
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    for gradient in gradients:
        for p, g in zip(cuda, gradient, strict=True):
            p.grad = g
        opt.step()
    assert torch.equal(torch.stack([p.detach() for p in cuda]), torch.full((count, 3), -4.0, device="cuda"))


def test_more_elements_than_int32():
    """2^31 + 4,100 elements of bfloat16: both ends and the middle are what the CPU makes of them."""
    n = 2**31 + 4100
    if torch.cuda.mem_get_info()[0] < 4 * 2 * n:
        pytest.skip("needs 18 GB of free GPU memory")
    p = parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    slices = [slice(0, 5000), slice(2**30, 2**30 + 5000), slice(2**31 - 4096, n)]
    for i, s in enumerate(slices):
        p.data[s], p.grad[s] = (normal(p[s].shape, torch.bfloat16, "cuda", seed=i + k) for k in (0, 10))
    small = [parameter(p.detach()[s].cpu()) for s in slices]
    for q, s in zip(small, slices, strict=True):
        q.grad = p.grad[s].cpu()
    opt = fusedopt.Lion([p], lr=0.1, weight_decay=0.1, max_grad_norm=1e9)
    expected = fusedopt.Lion(small, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        opt.step()
        expected.step()
    for q, s in zip(small, slices, strict=True):
        assert_same_bits(p.detach()[s].cpu(), q.detach())
        assert_same_bits(opt.state[p]["exp_avg"][s].cpu(), expected.state[q]["exp_avg"])
    norm = math.sqrt(sum(q.grad.double().square().sum().item() for q in small))
    assert opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23)


@pytest.mark.multigpu
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_two_devices_in_one_optimizer(case):
    """Steps are issued from device 0; the clip is by the norm over both."""
    params = [p for device in ("cuda:0", "cuda:1") for p in parameters([5, 4097], device=device)]
    cpu = [parameter(p.detach().cpu()) for p in params]
    opt, on_cpu = case.make(params), case.make(cpu)
    train(opt, params, 3)
    train(on_cpu, cpu, 3)
    assert_same_numbers([p.detach() for p in params], [p.detach() for p in cpu])
    clipped = copy.deepcopy(params)
    opt = case.make(clipped, max_grad_norm=0.5, nonfinite="skip")
    for step in range(2):
        set_gradients(clipped, seed=step)
        before = before_step(opt, case.rule)
        opt.step()
        norm = reference.total_norm([p.grad for p in clipped]).item()
        assert (
            opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23) and opt.grad_norm.device == clipped[0].device
        )
        assert_stepped(opt, case.rule, before, clip_coef=opt.clip_coef.item())
    clipped[-1].grad[-1] = math.nan
    unchanged = memory(opt)
    opt.step()
    assert_same_bits(memory(opt), unchanged)


@pytest.mark.multigpu
def test_second_device_alone_while_the_first_is_current():
    params = parameters([5, 4097], device="cuda:1")
    cpu = parameters([5, 4097])
    opt, on_cpu = fusedopt.AdamW(params, fused=True), fusedopt.AdamW(cpu)
    with torch.cuda.device(0):
        train(opt, params, 3)
    train(on_cpu, cpu, 3)
    assert opt.skipped_steps.device == params[0].device
    assert_same_numbers([p.detach() for p in params], [p.detach() for p in cpu])


@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_cpu_and_cuda_parameters_in_one_optimizer(devices):
    params = [p for device in devices for p in parameters([5, 4097], device=device)]
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    for step in range(3):
        set_gradients(params, seed=step)
        before = before_step(opt, "adamw")
        opt.step()
        norm = reference.total_norm([p.grad for p in params]).item()
        assert (
            opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23) and opt.grad_norm.device == params[0].device
        )
        assert_stepped(opt, "adamw", before, clip_coef=opt.clip_coef.item())
