"""Accumulation on the Triton and the reference backend, beside the engine of the device, bit for bit.

On the CPU Triton's kernels are interpreted, a tenth of a second for a chunk, so sizes are small there.
"""

import math

import format_cases
import pytest
import torch
from accumulated import give
from cases import (
    BY_NAME,
    DTYPES,
    GRAD_LAYOUTS,
    ONE_EACH,
    STATELESS,
    assert_same_bits,
    comparer,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
)

import fusedopt
from fusedopt.backends import for_device
from fusedopt.specs import TRITON_CHUNK

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FEW_SIZES = [5, 0, 16, TRITON_CHUNK + 9]
SIZES = [5, 0, 16, 4097, 65537]


@pytest.fixture(params=["triton", "reference"])
def backend(request, device) -> str:
    try:
        for_device(device, request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def sizes_on(device) -> list[int]:
    return FEW_SIZES if device.type == "cpu" else SIZES


def params_of(opt) -> list[torch.Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def mains(acc) -> list[torch.Tensor]:
    """What holds anything."""
    found = [acc._mains.get(p) for p in acc.params]
    return [main.tensor for main in found if main is not None and main.held.value]


def assert_same_numbers(actual, expected):
    """Same bits, except that NaN may carry any payload and sign."""
    for a, e in zip(actual, expected, strict=True):
        if a.is_floating_point():
            assert torch.equal(a.isnan(), e.isnan())
            a, e = a.nan_to_num(7.0, math.inf, -math.inf), e.nan_to_num(7.0, math.inf, -math.inf)
        assert_same_bits(a, e)


def pair(make, params, backend, main=FLOAT32, reduction="mean", **options):
    """Two optimizers over copies of the parameters, each with an accumulator: on the backend, on the device's own."""
    own = [parameter(p.detach().clone()) for p in params]
    opts = make(own, backend=backend, **options), make(params, **options)
    return [(opt, fusedopt.GradAccumulator(opt, main, reduction=reduction)) for opt in opts]


def turn(opt, acc, seed, weights=(1.0, 0.3), own_weight=2.5, values=normal, missing=()) -> list[torch.Tensor]:
    """Micro-batches and a step. missing: (micro-batch, parameter) without a gradient. Returns main gradients."""
    params, seen = params_of(opt), []
    for k in range(len(weights) + 1):
        give(params, 10 * seed + k, values)
        for i in (i for batch, i in missing if batch == k):
            params[i].grad = None
        if k < len(weights):
            acc.accumulate(weights[k])
            seen += [main.clone() for main in mains(acc)]
    acc.weight = own_weight
    opt.step()
    opt.zero_grad()
    return seen


@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*ONE_EACH, *STATELESS], ids=str)
def test_rules(case, dtype, main, backend, device):
    """Hard values; the sum has a weight in every micro-batch, and is divided."""
    both = pair(case.make, parameters(sizes_on(device), dtype, device, values=hard_values), backend, main)
    for seed in range(2):
        seen = [turn(opt, acc, seed, values=hard_values) for opt, acc in both]
        assert_same_numbers(*seen)
        comparer(assert_same_numbers, case.rule, dtype, 2)(*(memory(opt) for opt, _ in both))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), "tensors"], ids=str)
def test_missing_gradients(weights, reduction, backend, device):
    """Only earlier micro-batches, only the last one, or none of them have a gradient for a parameter."""
    if weights == "tensors":
        weights = tuple(torch.tensor(w, device=device) for w in (0.5, 2.0, 3.25))
    missing = [(2, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2)]
    both = pair(fusedopt.AdamW, parameters([9, 33, 64, 17], device=device), backend, reduction=reduction)
    for seed in range(3):
        for opt, acc in both:
            turn(opt, acc, seed, weights[:2], weights[2], missing=missing if seed != 1 else ())
        assert_same_bits(*(memory(opt) for opt, _ in both))
    assert [int(both[0][0].state[p]["step"]) for p in params_of(both[0][0])] == [3, 3, 1, 3]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clipped_steps(dtype, norm_type, backend, device):
    """The norm is that of the sum, to two units in the last place of the engine's."""
    options = dict(max_grad_norm=0.5, norm_type=norm_type, max_grad_value=0.4)
    both = pair(fusedopt.AdamW, parameters(sizes_on(device), dtype, device), backend, **options)
    for opt, acc in both:
        turn(opt, acc, 0, missing=[(2, 0)])
    (ours, _), (theirs, _) = both
    assert ours.grad_norm.item() == pytest.approx(theirs.grad_norm.item(), rel=2 * 2.0**-23)
    view = "clip_coef64" if dtype == torch.float64 else "clip_coef"
    if torch.equal(*(getattr(opt._control(), view) for opt in (ours, theirs))):
        assert_same_numbers(memory(ours), memory(theirs))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_nonfinite_micro_batches_skip_the_step(batch, bad, backend, device):
    (opt, acc), _ = pair(fusedopt.AdamW, parameters([5, 20], device=device), backend, nonfinite="skip")
    turn(opt, acc, 0)
    before = memory(opt)
    for k in range(3):
        give(params := params_of(opt), k)
        if k == batch:
            params[1].grad[3] = bad
        if k < 2:
            acc.accumulate()
    opt.step()
    assert opt.step_was_skipped
    assert_same_bits(memory(opt), before)


@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("combination", format_cases.FEW, ids=str)
def test_formats(combination, main, backend, device):
    options = {**combination.options, "min_8bit_size": 0, "seed": 3}
    params = parameters([9, 257, TRITON_CHUNK + 250], combination.dtype, device)
    both = pair(BY_NAME["adamw-decay"].make, params, backend, main, **options)
    for seed in range(2):
        for opt, acc in both:
            turn(opt, acc, seed)
        assert_same_numbers(*(memory(opt) for opt, _ in both))


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_layouts_of_gradients(layout, backend, device):
    """Misaligned, expanded, transposed: read where they are, or laid out anew."""
    shapes = [(6, 8), (65,)]
    params = [parameter(normal(shape, BFLOAT16, device, seed=i)) for i, shape in enumerate(shapes)]
    both = pair(fusedopt.AdamW, params, backend)
    for opt, acc in both:
        for k in range(3):
            for i, p in enumerate(params_of(opt)):
                p.grad = GRAD_LAYOUTS[layout](normal(p.shape, p.dtype, device, seed=10 * k + i))
            if k < 2:
                acc.accumulate()
        opt.step()
    assert_same_bits(*(memory(opt) for opt, _ in both))


def test_backend_changes_between_micro_batches(backend, device):
    """What is held is the same on all, so who folds and who steps may differ."""
    (opt, acc), (expected, other) = pair(fusedopt.AdamW, parameters([40, 9], device=device), None)
    for step in range(2):
        for k in range(4):
            give(params_of(opt), 10 * step + k), give(params_of(expected), 10 * step + k)
            opt.backend = backend if k % 2 else None
            if k < 3:
                acc.accumulate(), other.accumulate()
        opt.step(), expected.step()
        opt.zero_grad(), expected.zero_grad()
    assert_same_bits(memory(opt), memory(expected))
