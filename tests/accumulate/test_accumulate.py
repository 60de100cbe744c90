"""GradAccumulator: the step after several micro-batches against the float64 reference, element by element."""

import math

import format_cases
import pytest
import torch
from accumulated import Expected, backward, give, step
from cases import (
    DTYPES,
    GRAD_LAYOUTS,
    ONE_EACH,
    PARAM_LAYOUTS,
    assert_same_bits,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
)

import fusedopt

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
MAIN_DTYPES = [FLOAT32, BFLOAT16]

# Around vectors and chunks of the engines, of the elements of one round, and an empty one.
SIZES = [0, 1, 3, 8, 17, 255, 1023, 4097, 8193, 65537]
SMALL = [5, 0, 4097, 300]

TRANSFORMS = [
    {},
    {"max_grad_norm": 0.5},
    {"max_grad_value": 0.4},
    {"max_grad_norm": 0.5, "max_grad_value": 0.4, "nonfinite": "skip"},
]


def micro_batches(acc, expected, params, count, first=0, weights=None, **how) -> None:
    """All but the last of `count` are folded; the last one stays in `.grad`."""
    for k in range(count):
        give(params, first + k, **how)
        if k + 1 < count:
            weight = 1.0 if weights is None else weights[k]
            expected.fold(float(weight))
            acc.accumulate(weight)
            assert all(p.grad is None for p in params) and acc.micro_batches == k + 1


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", MAIN_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_step_follows_the_reference(case, dtype, main, device):
    params = parameters(SIZES, dtype, device)
    opt = case.make(params)
    acc, expected = fusedopt.GradAccumulator(opt, main), Expected(params, main)
    for first in (0, 4):
        micro_batches(acc, expected, params, 4, first)
        step(opt, acc, expected, case.rule)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 3.0])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transform_is_of_the_whole_sum(dtype, options, scale, device):
    """Unscaled, clamped and clipped is the mean over the micro-batches; a loss scale was in all of them."""
    params = parameters(SMALL, dtype, device)
    opt = fusedopt.AdamW(params, lr=0.01, weight_decay=0.1, **options)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    if scale != 1.0:
        opt.grad_scale = torch.tensor(scale, device=device)
    for first in (0, 3):
        micro_batches(acc, expected, params, 3, first)
        limits = {key: value for key, value in options.items() if key == "max_grad_value"}
        step(opt, acc, expected, "adamw", grad_scale=scale, **limits)
    assert opt.skipped_steps.item() == 0


@pytest.mark.parametrize("main", MAIN_DTYPES, ids=str)
@pytest.mark.parametrize("combination", [*format_cases.FEW, format_cases.BY_NAME["bfloat16-fp32_states"]], ids=str)
def test_formats(combination, main, device):
    params = format_cases.make_params(combination, SIZES, device)
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5, seed=1, **combination.options)
    acc, expected = fusedopt.GradAccumulator(opt, main), Expected(params, main)
    for first in (0, 3):
        micro_batches(acc, expected, params, 3, first)
        step(opt, acc, expected, "adamw", format_cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_hard_values(case, dtype, device):
    """Subnormal and huge numbers, zeros of both signs."""
    params = parameters(SMALL, dtype, device, values=hard_values)
    opt = case.make(params)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    micro_batches(acc, expected, params, 3, values=hard_values)
    step(opt, acc, expected, case.rule)


@pytest.mark.parametrize("main", MAIN_DTYPES, ids=str)
@pytest.mark.parametrize("grads", GRAD_LAYOUTS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_layouts(dtype, grads, main, device):
    """Parameters of every layout, and gradients that are laid out unlike them, misaligned or expanded."""
    params = [
        parameter(make(lambda shape, i=i: normal(shape, dtype, device, seed=i)))
        for i, make in enumerate(PARAM_LAYOUTS.values())
    ]
    opt = fusedopt.AdamW(params, lr=0.01, weight_decay=0.1, max_grad_norm=0.5)
    acc, expected = fusedopt.GradAccumulator(opt, main), Expected(params, main)
    for first in (0, 3):
        micro_batches(acc, expected, params, 3, first, lay=GRAD_LAYOUTS[grads])
        step(opt, acc, expected, "adamw")


def test_layout_of_gradients_changes(device):
    """From one micro-batch to the next, and between the folded ones and the last."""
    params = [parameter(normal((37, 29), device=device)), parameter(normal((29, 37), device=device).t())]
    opt = fusedopt.AdamW(params, lr=0.01)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    layouts = list(GRAD_LAYOUTS.values())[:4]
    for first in (0, 10):
        for k, lay in enumerate([*layouts, *layouts[::-1], layouts[1]]):
            give(params, first + k, lay=lay)
            expected.fold()
            acc.accumulate()
        give(params, first + 9, lay=layouts[2])
        step(opt, acc, expected, "adamw")


def test_several_dtypes_in_one_optimizer(device):
    params = [p for dtype in DTYPES for p in parameters(SMALL, dtype, device)]
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for first in (0, 3):
        micro_batches(acc, expected, params, 3, first)
        step(opt, acc, expected, "adamw")
    assert sorted({str(buffer.dtype) for buffer in acc.buffers}) == ["torch.float32", "torch.float64"]


def test_gradients_of_another_dtype(device):
    """`Parameter.grad_dtype`, where torch has it."""
    params = parameters(SMALL, BFLOAT16, device)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no Parameter.grad_dtype")
    for p in params:
        p.grad_dtype = FLOAT32
    opt = fusedopt.AdamW(params, lr=0.01, master_weights="fp32")
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for first in (0, 3):
        for k in range(3):
            for i, p in enumerate(params):
                p.grad = normal(p.shape, FLOAT32, device, seed=100 * (first + k) + i)
            if k < 2:
                expected.fold()
                acc.accumulate()
        step(opt, acc, expected, "adamw", format_cases)


# ---- number and weights of micro-batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction, count, device):
    params = parameters(SMALL, device=device)
    opt = fusedopt.AdamW(params, lr=0.01)
    acc, expected = fusedopt.GradAccumulator(opt, reduction=reduction), Expected(params, reduction=reduction)
    for first in (0, count):
        micro_batches(acc, expected, params, count, first)
        step(opt, acc, expected, "adamw")


@pytest.mark.parametrize("kind", ["number", "tensor", "int64", "one_dim", "on_the_cpu"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [[3.0, 1.0, 2.5], [0.0, 7.0, 0.1], [512, 511, 0], [4]], ids=str)
def test_weights(weights, reduction, kind, device):
    """The last micro-batch's is set on the accumulator; also where it is the only one, and no main gradient exists."""
    if kind != "number":  # tensors are read as float32, and so is their sum
        weights = [math.ceil(weight) if kind == "int64" else round(8 * weight) / 8 for weight in weights]
    make = {
        "number": lambda weight: weight,
        "tensor": lambda weight: torch.tensor(float(weight), device=device),
        "int64": lambda weight: torch.tensor(weight, device=device),
        "one_dim": lambda weight: torch.tensor([float(weight)], device=device),
        "on_the_cpu": lambda weight: torch.tensor(float(weight)),
    }[kind]
    params = [*parameters(SMALL, device=device), *parameters(SMALL, torch.float64, device)]
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
    acc, expected = fusedopt.GradAccumulator(opt, reduction=reduction), Expected(params, reduction=reduction)
    for first in (0, 3):
        micro_batches(acc, expected, params, len(weights), first, [make(weight) for weight in weights])
        acc.weight = make(weights[-1])
        step(opt, acc, expected, "adamw", weight=weights[-1])
        assert acc.weight == 1.0
    assert bool(acc.buffers) is (len(weights) > 1)


def test_a_weight_tensor_may_be_written_to(device):
    """One tensor for all micro-batches: each counts what it held when it was folded."""
    params = parameters(SMALL, device=device)
    opt = fusedopt.AdamW(params, lr=0.01)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    weight = torch.zeros((), device=device)
    for k, value in enumerate((3.0, 1.0, 2.0)):
        give(params, k)
        weight.fill_(value)
        if k < 2:
            expected.fold(value)
            acc.accumulate(weight)
    acc.weight = weight
    step(opt, acc, expected, "adamw", weight=2.0)


def test_equal_weights_are_none(device):
    """Bit for bit, where they are powers of two."""
    results = []
    for weight in (None, 1.0, 4.0, torch.tensor(0.5, device=device)):
        params = parameters(SMALL, device=device)
        opt = fusedopt.AdamW(params, lr=0.01)
        acc = fusedopt.GradAccumulator(opt)
        for k in range(2):
            give(params, k)
            acc.accumulate(weight)
        give(params, 2)
        if weight is not None:
            acc.weight = weight
        opt.step()
        results.append(memory(opt))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_one_micro_batch_is_the_optimizer_alone(device):
    params, alone = (parameters(SMALL, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(each, max_grad_norm=0.5) for each in (params, alone))
    fusedopt.GradAccumulator(opt)
    for seed in range(3):
        for each, optimizer in ((params, opt), (alone, expected)):
            give(each, seed)
            optimizer.step()
    assert_same_bits(memory(opt), memory(expected))


def test_folding_the_last_one_too(device):
    """Allowed: the step then reads main gradients only. A float32 sum has the same bits either way."""
    results = []
    for last in (False, True):
        params = parameters(SMALL, device=device)
        opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
        acc = fusedopt.GradAccumulator(opt)
        for first in (0, 3):
            for k in range(3):
                give(params, first + k)
                if k < 2 or last:
                    acc.accumulate()
            opt.step()
            opt.zero_grad()
        results.append([*memory(opt), opt.grad_norm])
    assert_same_bits(*results)


# ---- parameters without a gradient ---------------------------------------------------------------------------------

# By parameter: in which of four micro-batches it has a gradient.
PATTERNS = ["1111", "0111", "1110", "0110", "1000", "0001", "1010", "0000"]


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_parameters_without_gradients(case, device):
    """They count as 0 in such a micro-batch; those that have none in all are left alone, step counters too."""
    params = parameters([300] * len(PATTERNS), device=device)
    opt = case.make(params, max_grad_norm=0.5)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for turn in range(3):
        for k in range(4):
            give(params, 4 * turn + k)
            for i, p in enumerate(params):
                if PATTERNS[(i + turn) % len(PATTERNS)][k] == "0":
                    p.grad = None
            if k < 3:
                expected.fold()
                acc.accumulate()
        rests = params[(PATTERNS.index("0000") - turn) % len(PATTERNS)]
        before, steps = rests.detach().clone(), opt.state.get(rests, {}).get("step")
        steps = 0.0 if steps is None else float(steps)
        step(opt, acc, expected, case.rule)
        assert_same_bits(rests.detach(), before)
        assert rests not in opt.state or float(opt.state[rests]["step"]) == steps
        opt.zero_grad()


def test_weight_beside_parameters_without_main_gradient(device):
    """One that gets its first gradient in the last micro-batch is a launch of its own, which knows no weight."""
    old, new = (parameter(torch.zeros(300, device=device)) for _ in range(2))
    opt = fusedopt.SGD([old, new.requires_grad_(False)], lr=1.0)
    acc = fusedopt.GradAccumulator(opt)
    old.grad = torch.full_like(old, 2.0)
    acc.accumulate(1.0)
    new.requires_grad_()
    old.grad, new.grad = torch.full_like(old, 6.0), torch.full_like(new, 4.0)
    acc.weight = 3.0
    opt.step()
    assert (old.unique().tolist(), new.unique().tolist()) == ([-5.0], [-3.0])


def test_a_parameter_frozen_later(device):
    """It stops where it was; thawed, it goes on."""
    params = parameters(SMALL, device=device)
    opt = fusedopt.AdamW(params, lr=0.01)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for turn, frozen in enumerate((False, True, True, False)):
        params[2].requires_grad_(not frozen)
        before = params[2].detach().clone()
        for k in range(3):
            backward(params, 3 * turn + k)
            if k < 2:
                expected.fold()
                acc.accumulate()
        step(opt, acc, expected, "adamw")
        opt.zero_grad()
        assert torch.equal(params[2].detach(), before) is frozen


def test_a_param_group_added_between_micro_batches(device):
    params, more = parameters(SMALL, device=device), parameters([7, 4097], BFLOAT16, device, seed=1)
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
    acc = fusedopt.GradAccumulator(opt)
    expected = Expected([*params, *more])
    for turn in range(2):
        for k in range(4):
            if (turn, k) == (0, 1):
                opt.add_param_group({"params": more, "lr": 0.1})
            give(params, 4 * turn + k)
            if len(opt.param_groups) > 1:
                give(more, 50 + 4 * turn + k)
            if k < 3:
                expected.fold()
                acc.accumulate()
        step(opt, acc, expected, "adamw")
        opt.zero_grad()


# ---- inf and NaN ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("main", MAIN_DTYPES, ids=str)
def test_nonfinite_in_any_micro_batch_skips(main, at, value, device):
    params = parameters(SMALL, BFLOAT16, device)
    opt = fusedopt.AdamW(params, nonfinite="skip", max_grad_value=0.5)
    acc, expected = fusedopt.GradAccumulator(opt, main), Expected(params, main)
    micro_batches(acc, expected, params, 3)
    step(opt, acc, expected, "adamw", max_grad_value=0.5)
    before = memory(opt)
    for k in range(3):
        give(params, k)
        if k == at:
            params[2].grad[-1] = value
        if k < 2:
            acc.accumulate()
    opt.step()
    assert_same_bits(memory(opt), before)
    assert opt.step_was_skipped.item() is True and opt.skipped_steps.item() == 1
    micro_batches(acc, expected, params, 3, first=3)  # and nothing of it is left
    step(opt, acc, expected, "adamw", max_grad_value=0.5)
    assert opt.step_was_skipped.item() is False


@pytest.mark.parametrize("at", range(3))
def test_nonfinite_propagates(at, device):
    """To its own element; the norm tells."""
    params = parameters(SMALL, device=device)
    opt = fusedopt.AdamW(params)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for k in range(3):
        give(params, k)
        if k == at:
            params[2].grad[[0, 77]] = torch.tensor([math.nan, math.inf], device=device)
        if k < 2:
            expected.fold()
            acc.accumulate()
    step(opt, acc, expected, "adamw")
    assert params[2].isnan().nonzero().flatten().tolist() == [0, 77]

    opt.max_grad_norm = 1.0
    for value in (math.inf, math.nan):
        for k in range(3):
            give(params, k)
            if k == at:
                params[3].grad[5] = value
            if k < 2:
                acc.accumulate()
        opt.step()
        assert opt.grad_norm.isnan() if math.isnan(value) else opt.grad_norm.item() == math.inf


def test_opposite_infinities_are_nan(device):
    params = parameters(SMALL, device=device)
    opt = fusedopt.AdamW(params, nonfinite="skip")
    acc = fusedopt.GradAccumulator(opt)
    for value in (math.inf, -math.inf):
        give(params, 0)
        params[2].grad[3] = value
        acc.accumulate()
    assert acc._mains[params[2]].tensor.isnan().nonzero().flatten().tolist() == [3]
    opt.step()
    assert opt.step_was_skipped.item() is True
