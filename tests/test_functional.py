"""The rules as functions over lists of tensors."""

import pytest
import torch
from bounds import assert_within, bounded_step
from cases import (
    BY_NAME,
    DTYPES,
    FUNCTION_HYPER,
    ONE_EACH,
    STATELESS,
    assert_same_bits,
    call_function,
    hard_values,
    normal,
    parameters,
    set_gradients,
)

import fusedopt
from fusedopt import reference, specs

SIZES = [0, 1, 17, 4097, 16385]


def tensors(rule, dtype, device, values=normal):
    """Lists of params, grads and every state (second moments positive), and steps that differ.

    Nothing is known of a momentum buffer before its first step, so it is zero.
    """
    params, grads, *states = (
        [values((n,), dtype, device, seed=10 * role + i) for i, n in enumerate(SIZES)]
        for role in range(2 + len(reference.STATES[rule]))
    )
    for k, moment in enumerate(specs.RULES[rule].moments):
        states[k] = [v.abs() for v in states[k]] if moment == "second" else states[k]
    if "momentum_buffer" in reference.STATES[rule]:
        states[reference.STATES[rule].index("momentum_buffer")][0].zero_()
    steps = [torch.tensor(float(i), device=device) for i in range(len(SIZES))]
    return params, grads, states, steps


def scalar(x, device):
    return None if x is None else torch.tensor(x, device=device)


@pytest.mark.parametrize(
    "maximize, transform",
    [
        (False, {}),
        (False, {"grad_scale": 8.0}),
        (True, {"clip_coef": 0.3}),
        (True, {"grad_scale": 3.0, "max_grad_value": 0.2, "clip_coef": 0.7}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", FUNCTION_HYPER)
def test_follows_the_reference(rule, dtype, maximize, transform, device):
    params, grads, states, steps = tensors(rule, dtype, device, values=hard_values)
    old_params, old_grads = [p.clone() for p in params], [g.clone() for g in grads]
    old_states = [[s.clone() for s in group] for group in states]
    given = {key: value if key == "max_grad_value" else scalar(value, device) for key, value in transform.items()}
    call_function(rule, params, grads, states, steps, maximize=maximize, **given, **FUNCTION_HYPER[rule])
    held = {key: value if key == "max_grad_value" else given[key].item() for key, value in transform.items()}
    for i, (param, grad) in enumerate(zip(old_params, old_grads, strict=True)):
        before = {name: group[i] for name, group in zip(reference.STATES[rule], old_states, strict=True)}
        expected = bounded_step(
            rule, param, grad, before, step=i + 1, maximize=maximize, hyper=FUNCTION_HYPER[rule], **held
        )
        assert_within(params[i], expected["param"], f"params[{i}]")
        for name, group in zip(reference.STATES[rule], states, strict=True):
            assert_within(group[i], expected[name], f"{name}s[{i}]")
    assert [step.item() for step in steps] == [1, 2, 3, 4, 5]
    assert_same_bits(grads, old_grads)


@pytest.mark.parametrize("case", [*ONE_EACH, *STATELESS], ids=str)
def test_same_bits_as_the_optimizer(case, device):
    params = parameters(SIZES, device=device)
    plain = [p.detach().clone() for p in params]
    start = case.kwargs.get("initial_accumulator_value", 0.0)
    states = [[torch.full_like(p, start) for p in plain] for _ in reference.STATES[case.rule]]
    steps = [torch.zeros((), device=device) for _ in plain]
    opt = case.make(params)
    hyper = {k: v for k, v in case.kwargs.items() if k not in ("amsgrad", "centered", "initial_accumulator_value")}
    for seed in range(3):
        set_gradients(params, seed=seed)
        opt.step()
        call_function(case.rule, plain, [p.grad for p in params], states, steps, **hyper)
    assert_same_bits(plain, [p.detach() for p in params])
    for name, group in zip(reference.STATES[case.rule], states, strict=True):
        assert_same_bits(group, [opt.state[p][name] for p in params])


def test_tensors_of_the_same_sizes_are_not_mixed_up(device):
    """Tables are kept for the next call, and belong to these tensors, not to others like them."""
    kept = [torch.ones(300, device=device) for _ in range(3)]
    for number, p in enumerate(kept, start=1):
        grad = torch.full_like(p, float(number))
        fusedopt.functional.sgd_([p], [grad], momentum_buffers=None, steps=[torch.zeros((), device=device)], lr=1.0)
    assert [p.unique().tolist() for p in kept] == [[0.0], [-1.0], [-2.0]]
    norms = [fusedopt.get_total_norm([torch.full((4,), float(k), device=device)]).item() for k in (1, 2, 3)]
    assert norms == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("found_inf", [1.0, 2.0])
@pytest.mark.parametrize("rule", FUNCTION_HYPER)
def test_found_inf_is_the_identity(rule, found_inf, device):
    params, grads, states, steps = tensors(rule, torch.float32, device)
    everything = [*params, *(s for group in states for s in group), *steps]
    before = [t.clone() for t in everything]
    flag = scalar(found_inf, device)
    call_function(rule, params, grads, states, steps, found_inf=flag, **FUNCTION_HYPER[rule])
    assert_same_bits(everything, before)
    call_function(rule, params, grads, states, steps, found_inf=flag.zero_(), **FUNCTION_HYPER[rule])
    assert [step.item() for step in steps] == [1, 2, 3, 4, 5]
    assert not torch.equal(params[-1], before[4])


def test_whole_tail_by_hand_is_the_optimizers_step(device):
    """get_total_norm and a clip coefficient of one's own, then the update: as AdamW(max_grad_norm=...) does it."""
    params = parameters(SIZES, device=device)
    plain = [p.detach().clone() for p in params]
    states = [[torch.zeros_like(p) for p in plain] for _ in range(2)]
    steps = [torch.zeros((), device=device) for _ in plain]
    set_gradients(params)
    opt = BY_NAME["adamw-decay"].make(params, max_grad_norm=0.5)
    opt.step()
    norm = fusedopt.get_total_norm([p.grad for p in params])
    torch.testing.assert_close(norm, opt.grad_norm, rtol=2.0**-22, atol=0)
    kwargs = BY_NAME["adamw-decay"].kwargs
    fusedopt.functional.adamw_(plain, [p.grad for p in params], *states, steps, clip_coef=opt.clip_coef, **kwargs)
    assert_same_bits(plain, [p.detach() for p in params])


def test_tensor_lr(device):
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor(0.25, device=device)):
        params, grads, states, steps = tensors("lion", torch.float32, device)
        fusedopt.functional.lion_(params, grads, *states, steps, **FUNCTION_HYPER["lion"] | {"lr": lr})
        results.append(params)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("rule", FUNCTION_HYPER)
def test_bad_lists(rule, device):
    """Lists of different lengths, other shapes, an integer parameter: refused before anything is written."""

    def shorter(params, grads, states, steps):
        grads.pop()

    def other_shape(params, grads, states, steps):
        grads[-1] = grads[-1][:-1]

    def state_of_other_shape(params, grads, states, steps):
        states[0][-1] = states[0][-1][:-1]

    def integer(params, grads, states, steps):
        params[-1] = params[-1].int()

    def state_of_another_dtype(params, grads, states, steps):
        states[-1][-1] = states[-1][-1].double()

    def step_of_another_dtype(params, grads, states, steps):
        steps[-1] = steps[-1].double()

    def gradient_elsewhere(params, grads, states, steps):
        grads[-1] = grads[-1].to("meta")

    for spoil, exception in (
        (shorter, ValueError),
        (other_shape, ValueError),
        (state_of_other_shape, ValueError),
        (integer, TypeError),
        (state_of_another_dtype, ValueError),
        (step_of_another_dtype, ValueError),
        (gradient_elsewhere, ValueError),
    ):
        params, grads, states, steps = tensors(rule, torch.float32, device)
        if spoil in (state_of_other_shape, state_of_another_dtype) and not states:
            continue
        spoil(params, grads, states, steps)
        everything = [*params, *(s for group in states for s in group), *steps]
        before = [t.clone() for t in everything]
        with pytest.raises(exception):
            call_function(rule, params, grads, states, steps, **FUNCTION_HYPER[rule])
        assert_same_bits(everything, before)


@pytest.mark.parametrize("rule", FUNCTION_HYPER)
def test_no_parameters_are_nothing_to_do(rule):
    """But hyper-parameters are looked at."""
    nothing = [[] for _ in specs.RULES[rule].states]
    call_function(rule, [], [], nothing, [], **FUNCTION_HYPER[rule])
    with pytest.raises(ValueError, match="lr"):
        call_function(rule, [], [], nothing, [], **FUNCTION_HYPER[rule] | {"lr": -1.0})


@pytest.mark.parametrize("rule", ["sgd_momentum", "sgdw_momentum", "rmsprop_momentum"])
def test_momentum_needs_buffers(rule, device):
    """A list that is missing is named; without momentum it is not looked at."""
    params, grads, states, steps = tensors(rule, torch.float32, device)
    before = [p.clone() for p in params]
    with pytest.raises(ValueError, match=r"momentum_buffers is None.*torch\.zeros_like"):
        call_function(rule, params, grads, [*states[:-1], None], steps, **FUNCTION_HYPER[rule])
    assert_same_bits(params, before)
    call_function(rule, params, grads, [*states[:-1], None], steps, **{**FUNCTION_HYPER[rule], "momentum": 0.0})
    assert not torch.equal(params[-1], before[-1])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_another_dtype(dtype, grad_dtype, device):
    """A gradient is widened exactly, so the step is the one of the same gradient in float32, in every bit."""
    grad = torch.linspace(2, -1, 5003).to(grad_dtype).to(device)

    def stepped(gradient):
        param = torch.linspace(-1, 1, 5003).to(dtype).to(device)
        states = torch.zeros_like(param), torch.zeros_like(param)
        step = torch.zeros((), device=device)
        fusedopt.functional.adamw_(
            [param], [gradient], [states[0]], [states[1]], [step], lr=0.01, weight_decay=0.1, clip_coef=0.3
        )
        return param, *states

    before = torch.linspace(-1, 1, 5003).to(dtype).to(device)
    results, expected = stepped(grad), stepped(grad.float())
    assert not torch.equal(results[0], before)
    for got, wanted in zip(results, expected):
        assert torch.equal(got, wanted)
