"""What must hold whatever the tensors: exact invariances, bit for bit, and the reference on random input."""

import copy
import math

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import (
    CASES,
    DTYPES,
    ELEMENTWISE,
    GRAD_LAYOUTS,
    ONE_EACH,
    PARAM_LAYOUTS,
    STATELESS,
    assert_same_bits,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# Derandomised: a failure today is a failure tomorrow. The fixtures (device, seed) do not change between examples.
PROPERTY = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

sizes = st.lists(st.sampled_from([0, 1, 2, 7, 16, 31, 255, 4097, 8200]) | st.integers(0, 300), min_size=1, max_size=8)
# `max_examples` is per test and not per row, so rows are drawn as well.
one_each = st.sampled_from([*ONE_EACH, *STATELESS])


def finals(params, opt):
    """Parameters and states, in the order of `params`."""
    states = [value for p in params for key, value in opt.state.get(p, {}).items() if key != "step"]
    return [p.detach() for p in params] + states


@PROPERTY
@given(case=one_each, sizes=sizes, data=st.data())
def test_order_of_tensors_does_not_matter(case, sizes, data, device):
    order = data.draw(st.permutations(range(len(sizes))))
    params, shuffled = (parameters(sizes, device=device) for _ in range(2))
    opt, other = case.make(params), case.make([shuffled[i] for i in order])
    train(opt, params, 2)
    train(other, shuffled, 2)
    assert_same_bits(finals(shuffled, other), finals(params, opt))


@PROPERTY
@given(case=one_each, sizes=sizes, data=st.data())
def test_split_into_groups_does_not_matter(case, sizes, data, device):
    cut = data.draw(st.integers(0, len(sizes)))
    params, split = (parameters(sizes, device=device) for _ in range(2))
    opt, other = case.make(params), case.make([{"params": split[:cut]}, {"params": split[cut:]}])
    train(opt, params, 2)
    train(other, split, 2)
    assert_same_bits(finals(split, other), finals(params, opt))


@PROPERTY
@given(case=st.sampled_from([*ELEMENTWISE, *STATELESS]), size=st.integers(2, 20_000), data=st.data())
def test_a_tensor_and_its_parts_are_updated_alike(case, size, data, device):
    """Whatever the alignment and the chunk that an element falls into. Parts are views of one buffer, so unaligned."""
    cut = data.draw(st.integers(1, size - 1))
    whole = parameter(hard_values((size,), device=device))
    buffer = whole.detach().clone()
    parts = [parameter(buffer[:cut]), parameter(buffer[cut:])]
    opt, other = case.make([whole]), case.make(parts)
    for seed in range(2):
        whole.grad = hard_values((size,), device=device, seed=1 + seed)
        for p, grad in zip(parts, whole.grad.split([cut, size - cut]), strict=True):
            p.grad = grad
        opt.step()
        other.step()
    assert_same_bits(buffer, whole.detach())
    for key in case.rule_spec.states:
        assert_same_bits(torch.cat([other.state[p][key] for p in parts]), opt.state[whole][key])


@PROPERTY
@given(case=one_each, sizes=sizes, exponent=st.integers(-20, 20), clip=st.booleans())
def test_power_of_two_scaling_is_exact(case, sizes, exponent, clip, device):
    """Gradients times 2^k with grad_scale 2^k are the gradients, so the step has the same bits, the norm included."""
    extra = {"max_grad_norm": 0.5} if clip else {}
    params, scaled = (parameters(sizes, device=device) for _ in range(2))
    opt, other = case.make(params, **extra), case.make(scaled, **extra)
    other.grad_scale = torch.tensor(2.0**exponent, device=device)
    other.found_inf = torch.zeros((), device=device)
    for seed in range(2):
        set_gradients(params, seed)
        set_gradients(scaled, seed, scale=2.0**exponent)
        opt.step()
        other.step()
    assert_same_bits(finals(scaled, other), finals(params, opt))
    if clip:
        assert_same_bits([other.grad_norm, other.clip_coef], [opt.grad_norm, opt.clip_coef])


@PROPERTY
@given(case=one_each, sizes=sizes, dtype=st.sampled_from(DTYPES), done=st.integers(1, 3), clip=st.booleans())
def test_resumed_training_is_uninterrupted_training(case, sizes, dtype, done, clip, device):
    extra = {"max_grad_norm": 0.5} if clip else {}
    params = parameters(sizes, dtype, device)
    opt = case.make(params, **extra)
    train(opt, params, done)
    resumed_params = copy.deepcopy(params)
    resumed = case.make(resumed_params, **extra)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, 2, first=done)
    train(resumed, resumed_params, 2, first=done)
    assert_same_bits(memory(resumed), memory(opt))


@PROPERTY
@given(
    case=one_each,
    sizes=sizes.filter(any),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([math.inf, -math.inf, math.nan]),
    data=st.data(),
)
def test_skipped_step_is_the_identity(case, sizes, dtype, value, data, device):
    params = parameters(sizes, dtype, device)
    opt = case.make(params, nonfinite="skip", max_grad_norm=data.draw(st.sampled_from([None, 1.0])))
    train(opt, params, 1)
    before = memory(opt)
    set_gradients(params, seed=1)
    tensor = data.draw(st.sampled_from([i for i, n in enumerate(sizes) if n]))
    params[tensor].grad[data.draw(st.integers(0, sizes[tensor] - 1))] = value
    opt.step()
    assert_same_bits(memory(opt), before)
    assert opt.step_was_skipped.item() is True


@st.composite
def laid_out_parameters(draw, device):
    """A parameter of random shape and dtype, permuted, strided and offset at will, and a layout for its gradients."""
    dtype = draw(st.sampled_from(DTYPES))
    make = draw(st.sampled_from([*PARAM_LAYOUTS.values(), None]))
    if make is not None:
        p = make(lambda shape: normal(shape, dtype, device, seed=draw(st.integers(0, 9))))
    else:
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        stride, offset = draw(st.integers(1, 3)), draw(st.integers(0, 5))
        buffer = normal((offset + stride * max(1, math.prod(shape)),), dtype, device)
        p = buffer[offset::stride][: math.prod(shape)]
        p = p.unflatten(0, shape) if shape and p.numel() else p.reshape(shape)
        p = p.permute(draw(st.permutations(range(p.dim()))))
    return parameter(p), draw(st.sampled_from(list(GRAD_LAYOUTS.values())))


@PROPERTY
@given(case=st.sampled_from(CASES), data=st.data(), count=st.integers(1, 5), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_random_tensors_follow_the_reference(case, data, count, scale, device):
    pairs = [data.draw(laid_out_parameters(device)) for _ in range(count)]
    opt = case.make([p for p, _ in pairs])
    for step in range(2):
        for i, (p, lay) in enumerate(pairs):
            p.grad = lay(normal(p.shape, p.dtype, device, seed=10 * step + i) * scale)
        before = before_step(opt, case.rule)
        opt.step()
        assert_stepped(opt, case.rule, before)
