"""Gradients of another dtype than their parameter: `main_grad`, torch's `grad_dtype`, float16 under a scaler."""

import math
import re

import pytest
import torch
from cases import BY_NAME, ONE_EACH, assert_same_bits, memory, normal, parameter, parameters, train
from format_cases import BFLOAT16, FLOAT16, FLOAT32, assert_stepped, before_step

import fusedopt
from fusedopt import reference

SIZES = [5, 0, 4097, 300]
PAIRS = [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, FLOAT16), (FLOAT32, FLOAT16)]
HAS_GRAD_DTYPE = hasattr(torch.nn.Parameter(torch.zeros(1)), "grad_dtype")


def main_gradients(params, dtype, seed, scale=1.0):
    """Fresh tensors, unlike any value of a lower precision."""
    return [normal(p.shape, dtype, p.device, seed=100 * seed + i) * scale for i, p in enumerate(params)]


def set_main_gradients(params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.main_grad = grad


# ---- main_grad -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, grad_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_main_grad_replaced_every_step(case, dtype, grad_dtype, device):
    params = parameters(SIZES, dtype, device)
    opt = case.make(params)
    for step in range(3):
        set_main_gradients(params, main_gradients(params, grad_dtype, step))
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)


@pytest.mark.parametrize("dtype, grad_dtype", PAIRS, ids=str)
def test_main_grad_that_stays(dtype, grad_dtype, device):
    """One buffer for the whole training, as Megatron has it: the steps are those of fresh tensors, and none replans."""
    params, fresh = (parameters(SIZES, dtype, device) for _ in range(2))
    opt, expected = (ONE_EACH[1].make(ps) for ps in (params, fresh))
    buffers = main_gradients(params, grad_dtype, 0)
    set_main_gradients(params, buffers)
    plans = set()
    for step in range(4):
        grads = main_gradients(params, grad_dtype, step)
        for buffer, grad in zip(buffers, grads):
            buffer.copy_(grad)
        set_main_gradients(fresh, grads)
        opt.step()
        expected.step()
        plans.add(id(opt._plan))
    assert len(plans) == 1
    assert_same_bits(memory(opt), memory(expected))
    opt.zero_grad()
    assert all(p.main_grad is buffer for p, buffer in zip(params, buffers))


def test_main_grad_that_is_none_at_some_steps(device):
    """Such a parameter rests, as one whose .grad is None does; from the first step on as well."""
    params, plain = (parameters(SIZES, FLOAT32, device) for _ in range(2))
    opt, expected = (ONE_EACH[1].make(ps) for ps in (params, plain))
    for p in params:
        p.main_grad = None
    for step in range(6):
        for i, (p, q) in enumerate(zip(params, plain)):
            grad = None if (step + i) % 3 == 0 else normal(p.shape, device=device, seed=10 * step + i)
            p.main_grad = q.grad = grad
        opt.step()
        expected.step()
    assert_same_bits(memory(opt), memory(expected))
    assert sorted(float(opt.state[p]["step"]) for p in params) == [4.0] * 4


def test_grad_where_main_grad_is_none(device):
    """The attribute alone does not change where gradients are."""
    params, plain = (parameters(SIZES, BFLOAT16, device) for _ in range(2))
    opt, expected = (ONE_EACH[1].make(ps) for ps in (params, plain))
    for p in params:
        p.main_grad = None
    train(opt, params, 3)
    train(expected, plain, 3)
    assert_same_bits(memory(opt), memory(expected))


def test_some_parameters_with_main_grad_and_some_without(device):
    params = parameters([5, 300, 4097, 9], BFLOAT16, device)
    opt = ONE_EACH[1].make(params, master_weights="split8", state_dtype="int8", min_8bit_size=256)
    for step in range(3):
        for i, p in enumerate(params):
            if i % 2:
                p.grad = normal(p.shape, BFLOAT16, device, seed=10 * step + i)
            else:
                p.main_grad = normal(p.shape, FLOAT32, device, seed=10 * step + i)
        before = before_step(opt, "adamw")
        opt.step()
        assert_stepped(opt, "adamw", before)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_by_the_norm_of_main_gradients(norm_type, device):
    params = parameters(SIZES, BFLOAT16, device)
    opt = ONE_EACH[1].make(params, master_weights="split16", max_grad_norm=0.5, norm_type=norm_type)
    for step in range(3):
        grads = main_gradients(params, FLOAT32, step)
        set_main_gradients(params, grads)
        before = before_step(opt, "adamw")
        opt.step()
        norm = reference.total_norm(grads, norm_type).item()
        # The result is rounded to float32 once, its sum of float32 parts by less than one more ulp (numerics.md).
        assert opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23)
        assert_stepped(opt, "adamw", before, clip_coef=opt.clip_coef.item())


def test_infinity_in_a_main_gradient_skips_the_step(device):
    params = parameters(SIZES, BFLOAT16, device)
    opt = ONE_EACH[1].make(params, master_weights="split16", nonfinite="skip")
    set_main_gradients(params, main_gradients(params, FLOAT32, 0))
    opt.step()
    before = memory(opt)
    params[2].main_grad[4000] = math.inf
    opt.step()
    assert opt.step_was_skipped.item() is True
    assert_same_bits(memory(opt), before)


def test_both_gradients_at_once_are_refused(device):
    """In the first step and in a later one: nothing says which is meant."""
    params = parameters([5, 300], FLOAT32, device)
    opt = fusedopt.AdamW(params)
    for step in range(2):
        set_main_gradients(params, main_gradients(params, FLOAT32, step))
        params[1].grad = torch.ones_like(params[1])
        before = memory(opt)
        with pytest.raises(ValueError) as error:
            opt.step()
        assert re.search(r"params'\]\[1\].*\.grad.*main_grad", str(error.value))
        assert_same_bits(memory(opt), before)
        params[1].grad = None
        opt.step()
        assert {float(opt.state[p]["step"]) for p in params} == {step + 1.0}


BAD = {
    "not a tensor": (lambda p: [0.0] * p.numel(), TypeError, ["main_grad", "list"]),
    "other shape": (lambda p: torch.zeros(p.numel() + 1, device=p.device), ValueError, ["main_grad", "shape"]),
    "integers": (lambda p: torch.zeros(p.shape, dtype=torch.int32, device=p.device), TypeError, ["main_grad", "int32"]),
    "float64": (lambda p: torch.zeros(p.shape, dtype=torch.float64, device=p.device), TypeError, ["float64"]),
    "sparse": (lambda p: torch.zeros(p.shape, device=p.device).to_sparse(), RuntimeError, ["main_grad", "sparse"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_main_grad(name, device):
    make, exception, patterns = BAD[name]
    params = parameters([5, 300], BFLOAT16, device)
    opt = fusedopt.AdamW(params, master_weights="split8")
    set_main_gradients(params, main_gradients(params, FLOAT32, 0))
    opt.step()
    before, good = memory(opt), params[1].main_grad
    params[1].main_grad = make(params[1])
    with pytest.raises(exception) as error:
        opt.step()
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in: {error.value}"
    assert_same_bits(memory(opt), before)
    params[1].main_grad = good
    opt.step()
    assert float(opt.state[params[1]]["step"]) == 2


def test_backward_sees_new_weights_after_a_step_by_main_grad(device):
    """Version counters: a graph that used the old weights refuses to go backward."""
    p = parameter(normal((300,), FLOAT32, device))
    p.main_grad = normal((300,), FLOAT32, device)
    opt = fusedopt.AdamW([p])
    opt.step()
    loss = (p * p).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- Parameter.grad_dtype ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch has no grad_dtype")
@pytest.mark.parametrize("dtype, grad_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_grad_dtype(case, dtype, grad_dtype, device):
    """`.grad` itself in another dtype, from a first step in the parameter's own."""
    params = parameters(SIZES, dtype, device)
    opt = case.make(params)
    train(opt, params, 1)
    for p in params:
        p.grad, p.grad_dtype = None, grad_dtype
    for step in range(3):
        for p, grad in zip(params, main_gradients(params, grad_dtype, step)):
            p.grad = grad
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="this torch has no grad_dtype")
def test_grad_dtype_accumulates_what_bfloat16_would_lose(device):
    """backward() into a float32 gradient of bfloat16 parameters, over 512 micro-batches of one."""
    p = parameter(torch.zeros(300, dtype=BFLOAT16, device=device))
    p.grad_dtype = FLOAT32
    opt = fusedopt.Lion([p], lr=1.0, betas=(0.0, 0.0), master_weights="split16")
    for _ in range(512):
        p.sum().backward()
    assert p.grad.dtype == FLOAT32 and (p.grad == 512).all()  # bfloat16 would be at 256: 256 + 1 is a tie
    opt.step()
    assert (opt.state[p]["exp_avg"] == 512).all()


# ---- float16 under a scaler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"master_weights": "fp32"}, {"state_dtype": "fp32"}], ids=str)
def test_float16_under_a_scaler_with_clipping(options, device):
    """Where torch says "Attempting to unscale FP16 gradients."; an overflow is skipped, and halves the scale."""
    params = parameters(SIZES, FLOAT16, device)
    opt = BY_NAME["adamw-decay"].make(params, max_grad_norm=0.5, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for step in range(5):
        scaler.scale(torch.zeros((), device=device))
        scale = scaler.get_scale()
        for i, p in enumerate(params):
            p.grad = normal(p.shape, FLOAT16, device, seed=10 * step + i) * scale
        if step == 2:
            params[0].grad[1] = math.inf
        before, kept = before_step(opt, "adamw"), memory(opt)
        scaler.step(opt)
        scaler.update()
        if step == 2:
            assert_same_bits(memory(opt), kept)
            assert scaler.get_scale() == scale / 2 and opt.step_was_skipped.item() is True
            continue
        norm = reference.total_norm([p.grad for p in params]).item() / scale
        assert opt.grad_norm.item() == pytest.approx(norm, rel=2 * 2.0**-23)
        assert_stepped(opt, "adamw", before, grad_scale=scale, clip_coef=opt.clip_coef.item())


def test_torch_refuses_float16_under_a_scaler(device):
    """Why the test above is of use."""
    params = parameters([5], FLOAT16, device)
    opt, scaler = torch.optim.AdamW(params, foreach=False), torch.amp.GradScaler(device.type)
    scaler.scale(torch.zeros((), device=device))
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match="FP16"):
        scaler.unscale_(opt)
