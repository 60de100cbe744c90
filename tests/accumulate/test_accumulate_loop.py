"""GradAccumulator in training loops: hooks, scalers, checkpoints, copies, memory, autograd; and random programs."""

import copy
import io
import math
import pickle

import pytest
import torch
from accumulated import Expected, backward, give, step
from bounds import assert_within
from cases import DTYPES, ONE_EACH, assert_same_bits, memory, normal, parameter, parameters

import fusedopt

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZES = [5, 0, 4097, 300]


def run(opt, acc, params, count, first=0, weights=None, hooks=False) -> None:
    """`count` micro-batches and a step. With hooks the weight is set before the backward pass."""
    for k in range(count):
        weight = 1.0 if weights is None else weights[k]
        if hooks:
            acc.weight = weight
        backward(params, first + k)
        if k + 1 < count:
            acc.accumulate(weight)
    acc.weight = weights[-1] if weights else 1.0
    opt.step()
    opt.zero_grad()


# ---- hooks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.3]], ids=str)
@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hooks_give_the_same_bits(dtype, main, weights, device):
    """Of the main gradients, in which the last micro-batch is folded too. In float32 the steps are the same as well."""
    results = []
    for hooks in (False, True):
        params = parameters(SIZES, dtype, device)
        opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
        acc = fusedopt.GradAccumulator(opt, main, hooks=hooks)
        for first in (0, 3):
            for k in range(3):
                acc.weight = weights[k] if weights else 1.0
                backward(params, first + k)
                assert all((p.grad is None) is hooks for p in params)
                acc.accumulate()
            results.append([acc._mains[p].tensor.clone() for p in params])
            opt.step()
        results.append(memory(opt))
    for without, with_hooks in zip(results[:3], results[3:], strict=True):
        assert_same_bits(with_hooks, without)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5], [torch.tensor([w]) for w in (3.0, 1.0, 0.5)]], ids=str)
def test_hooks_and_a_step_without_a_last_call(weights, device):
    """The last micro-batch ends with the step. All is in main gradients then, with the same bits as a read of both."""
    results = []
    for hooks in (False, True):
        params = parameters(SIZES, device=device)
        opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
        acc = fusedopt.GradAccumulator(opt, hooks=hooks)
        for first in (0, 3, 6):
            run(opt, acc, params, 3, first, weights, hooks)
        results.append([*memory(opt), opt.grad_norm])
    assert_same_bits(*results)


def test_hooks_free_each_gradient_at_once(device):
    """No other parameter has one when a gradient is complete."""
    layers = [torch.nn.Linear(16, 16) for _ in range(4)]
    model = torch.nn.Sequential(*layers).to(device)
    opt = fusedopt.AdamW(model.parameters())
    acc = fusedopt.GradAccumulator(opt, hooks=True)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    for _ in range(2):
        model(torch.randn(3, 16, device=device)).sum().backward()
        acc.accumulate()
    assert alive == [0] * 16 and acc.micro_batches == 2


def test_hooks_and_parameters_that_come_later(device):
    """A new group, and a parameter thawed later, have no hook: accumulate() and step() find their gradients."""
    results = []
    for hooks in (False, True):
        params, more = parameters(SIZES, device=device), parameters([7], device=device, seed=1)
        params[0].requires_grad_(False)
        opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
        acc = fusedopt.GradAccumulator(opt, hooks=hooks)
        opt.add_param_group({"params": more})
        for turn in range(3):
            run(opt, acc, [*params, *more], 3, 3 * turn, [1.0, 3.0, 0.5], hooks)
            params[0].requires_grad_()
        results.append([*memory(opt), opt.grad_norm])
    assert_same_bits(*results)


@pytest.mark.parametrize("hooks", [False, True])
def test_main_gradients_fit_a_model_that_moves(hooks, device):
    """Between steps, when nothing is held: another dtype, another memory layout."""
    model = torch.nn.Conv2d(3, 4, 3).to(device)
    params = list(model.parameters())
    opt = fusedopt.AdamW(params, lr=0.01)
    acc = fusedopt.GradAccumulator(opt, hooks=hooks)
    for turn, change in enumerate((model.float, model.double, lambda: model.to(memory_format=torch.channels_last))):
        change()
        opt.state.clear()
        expected = Expected(params)
        for k in range(2):
            give(params, 2 * turn + k)
            expected.fold()
            for p in params:
                p.grad = None
            backward(params, 2 * turn + k)
            acc.accumulate()
        step(opt, acc, expected, "adamw")


# ---- beginning anew ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["zero_grad", "zero_grad, kept", "reset"])
@pytest.mark.parametrize("hooks", [False, True])
def test_dropped_gradients_leave_no_trace(drop, hooks, device):
    params, clean = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(each, lr=0.01, max_grad_norm=0.5) for each in (params, clean))
    acc, other = fusedopt.GradAccumulator(opt, hooks=hooks), fusedopt.GradAccumulator(expected, hooks=hooks)
    for turn in range(3):
        backward(params, 90 + turn)
        params[2].grad = torch.full_like(params[2], math.nan)
        acc.accumulate(7.0) if not hooks else acc.accumulate()
        backward(params, 95 + turn)
        acc.reset() if drop == "reset" else opt.zero_grad(set_to_none=drop == "zero_grad")
        if drop == "reset":
            opt.zero_grad()
        assert not acc.holds and acc.micro_batches == 0 and acc.weight == 1.0
        run(opt, acc, params, 3, 3 * turn)
        run(expected, other, clean, 3, 3 * turn)
    assert_same_bits([*memory(opt), opt.grad_norm], [*memory(expected), expected.grad_norm])


def test_main_gradients_stay_where_they_are(device):
    """Over steps, skipped ones, and zero_grad; nothing is allocated after the first micro-batch."""
    params = parameters(SIZES, BFLOAT16, device)
    opt = fusedopt.AdamW(params, nonfinite="skip")
    acc = fusedopt.GradAccumulator(opt)
    run(opt, acc, params, 2)
    addresses, buffers = [acc._mains[p].tensor.data_ptr() for p in params], acc.buffers
    plans = {id(opt._plan), id(acc._plan)}
    for turn in range(4):
        if turn == 2:
            params[2].grad = torch.full_like(params[2], math.inf)
            acc.accumulate()
        if turn == 3:
            opt.zero_grad()
        run(opt, acc, params, 3, turn)
    assert [acc._mains[p].tensor.data_ptr() for p in params] == addresses
    assert [id(b) for b in acc.buffers] == [id(b) for b in buffers]
    assert {id(opt._plan), id(acc._plan)} == plans
    assert all(address % 256 == addresses[0] % 256 for address, n in zip(addresses, SIZES) if n)


def test_detach(device):
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    acc = fusedopt.GradAccumulator(opt, hooks=True)
    backward(params, 0)
    acc.accumulate()
    acc.detach()
    assert acc.buffers == [] and acc.bytes() == 0 and not acc.holds
    for seed in range(2):
        for each, optimizer in ((params, opt), (plain, expected)):
            backward(each, seed)
            assert all(p.grad is not None for p in each)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(memory(opt), memory(expected))
    again = fusedopt.GradAccumulator(opt)
    run(opt, again, params, 2)


# ---- scalers -------------------------------------------------------------------------------------------------------


def test_grad_scale_by_hand(device):
    """A user's own loss scale, without found_inf."""
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(each, lr=0.01, max_grad_norm=0.5) for each in (params, plain))
    acc, other = fusedopt.GradAccumulator(opt), fusedopt.GradAccumulator(expected)
    opt.grad_scale = torch.tensor(256.0, device=device)
    for turn in range(2):
        for k in range(2):
            give(plain, 2 * turn + k)
            give(params, 2 * turn + k)
            for p in params:
                p.grad *= 256.0
            if k == 0:
                acc.accumulate()
                other.accumulate()
        opt.step()
        expected.step()
    assert_same_bits(memory(opt), memory(expected))


def test_torchs_scaler_with_one_micro_batch(device):
    """Nothing is in main gradients, so `.grad` is all there is."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    fusedopt.GradAccumulator(opt)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    for seed in range(2):
        scaler.scale(torch.zeros((), device=device))
        give(params, seed)
        scaler.step(opt)
        scaler.update()
    assert float(opt.state[params[0]]["step"]) == 2


# ---- checkpoints, copies -------------------------------------------------------------------------------------------


def saved(state):
    """Through a file, as torch.save and torch.load with weights_only have it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.3, 2.0], "tensors"], ids=str)
@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
def test_resumed_between_micro_batches(main, hooks, weights, device):
    """Bit for bit, in another process' place: parameters, optimizer and accumulator from a file."""
    if weights == "tensors":
        weights = [torch.tensor(w, device=device) for w in (3.0, 1.0, 0.3, 2.0)]
    params = parameters(SIZES, BFLOAT16, device)
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5, master_weights="split16")
    acc = fusedopt.GradAccumulator(opt, main, hooks=hooks)
    run(opt, acc, params, 4, 0, weights, hooks)

    def micro_batch(acc, params, k):
        if weights is not None:
            acc.weight = weights[k]
        backward(params, 10 + k)

    for k in range(2):
        micro_batch(acc, params, k)
        if k == 0:
            params[3].grad = None
        acc.accumulate()
    state = saved({"params": params, "opt": opt.state_dict(), "acc": acc.state_dict()})
    resumed = [torch.nn.Parameter(p.detach()) for p in state["params"]]
    other = fusedopt.AdamW(resumed, lr=0.01, max_grad_norm=0.5, master_weights="split16")
    other.load_state_dict(state["opt"])
    again = fusedopt.GradAccumulator(other, main, hooks=hooks)
    again.load_state_dict(state["acc"])
    assert again.micro_batches == 2
    for optimizer, accumulator, each in ((opt, acc, params), (other, again, resumed)):
        micro_batch(accumulator, each, 2)
        accumulator.accumulate()
        micro_batch(accumulator, each, 3)
        optimizer.step()
        optimizer.zero_grad()
        run(optimizer, accumulator, each, 3, 20, hooks=hooks)
    assert_same_bits([*memory(other), other.grad_norm], [*memory(opt), opt.grad_norm])


def test_checkpoint_of_nothing(device):
    """After a step there is nothing to save; loading it drops what is held."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    run(opt, acc, params, 2)
    state = saved(acc.state_dict())
    assert state == {"main_grads": {}, "weight": 0.0, "micro_batches": 0}
    backward(params, 5)
    acc.accumulate()
    acc.load_state_dict(state)
    assert not acc.holds


def test_checkpoint_in_another_dtype(device):
    params, resumed = (parameters(SIZES, device=device) for _ in range(2))
    acc, other = fusedopt.GradAccumulator(params), fusedopt.GradAccumulator(resumed, BFLOAT16)
    give(params, 0)
    acc.accumulate()
    other.load_state_dict(acc.state_dict())
    assert_same_bits(other.grads(), [grad.bfloat16() for grad in acc.grads()])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("hooks", [False, True])
def test_copies_of_the_optimizer_have_no_accumulator(hooks, duplicate, device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    acc = fusedopt.GradAccumulator(opt, hooks=hooks)
    backward(params, 0)
    acc.accumulate()
    twin = duplicate(opt)
    twins = twin.param_groups[0]["params"]
    other = fusedopt.GradAccumulator(twin)
    other.load_state_dict(acc.state_dict())
    for optimizer, each in ((opt, params), (twin, twins)):
        backward(each, 1)
        optimizer.step()
    assert_same_bits(memory(twin), memory(opt))


# ---- memory, autograd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main, size", [(FLOAT32, 4), (BFLOAT16, 2)], ids=str)
def test_memory_summary_counts_main_gradients(main, size, device):
    """Each begins at a multiple of 256 bytes."""
    params = [*parameters(SIZES, BFLOAT16, device), *parameters([3, 65], torch.float64, device)]
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt, main)
    assert opt.memory_summary().bytes["main_grad"] == 0
    give(params, 0)
    acc.accumulate()
    expected = sum(-(-n * size // 256) * 256 for n in SIZES) + sum(-(-n * 8 // 256) * 256 for n in (3, 65))
    assert opt.memory_summary().bytes["main_grad"] == expected == acc.bytes() and len(acc.buffers) == 2
    assert opt.memory_summary().bytes["grad"] == 0
    acc.detach()
    assert opt.memory_summary().bytes["main_grad"] == 0


@pytest.mark.parametrize("hooks", [False, True])
def test_version_counters(hooks, device):
    """accumulate() writes no parameter; the step counts those that it writes, also without a `.grad`."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt, hooks=hooks)
    for turn in range(3):
        versions = [p._version for p in params]
        for k in range(2):
            backward(params[:2] if k == 0 else params[1:3], k)
            acc.accumulate()
        assert [p._version for p in params] == versions
        opt.step()
        assert [p._version - v for p, v in zip(params, versions)] == [1, 1, 1, 0], turn


def test_backward_through_overwritten_weights_raises(device):
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    loss = (params[0] * params[0]).sum()
    loss.backward(retain_graph=True)
    acc.accumulate()
    loss.backward(retain_graph=True)  # nothing was written
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_with_a_graph_of_their_own(device):
    """create_graph=True: values count, and nothing is recorded."""
    params = parameters([5, 7], device=device)
    acc = fusedopt.GradAccumulator(fusedopt.AdamW(params), reduction="sum")
    for _ in range(2):
        grads = torch.autograd.grad(sum((p**3).sum() for p in params), params, create_graph=True)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        acc.accumulate()
    for grad, p in zip(acc.grads(), params, strict=True):
        assert not grad.requires_grad
        torch.testing.assert_close(grad, 6 * p.detach() ** 2)


def test_many_tensors(device):
    """Past the number of gradients that fit into kernel parameters."""
    count = 5000 if device.type == "cuda" else 600
    params = parameters([1 + i % 37 for i in range(count)], device=device)
    opt = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for turn in range(2):
        for k in range(3):
            give(params, 3 * turn + k)
            params[turn + k].grad = None
            if k < 2:
                expected.fold()
                acc.accumulate()
        step(opt, acc, expected, "adamw")


# ---- random programs -----------------------------------------------------------------------------------------------

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
shapes = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6)
# Powers of two up to 2^20 and token counts, as people have them, and fractions that float32 does not hold.
a_weight = st.integers(0, 5000) | st.floats(0.0, 1e3, allow_subnormal=False) | st.sampled_from([1.0, 2.0**20, 0.1])


@PROPERTY
@given(
    shapes=shapes,
    weights=st.lists(a_weight, min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from(DTYPES),
    main=st.sampled_from([FLOAT32, BFLOAT16]),
    reduction=st.sampled_from(["mean", "sum"]),
    data=st.data(),
)
def test_any_accumulation_is_the_weighted_mean(shapes, weights, dtype, main, reduction, data, device):
    params = [torch.nn.Parameter(normal(shape, dtype, device, seed=i)) for i, shape in enumerate(shapes)]
    acc, expected = fusedopt.GradAccumulator(params, main, reduction=reduction), Expected(params, main, reduction)
    for k, weight in enumerate(weights):
        give(params, k)
        for p in params[1:]:
            if data.draw(st.integers(0, 4)) == 0:
                p.grad = None
        expected.fold(weight)
        acc.accumulate(weight)
    grads = acc.grads()
    for p, grad in zip(params, grads, strict=True):
        assert (grad is None) == (p not in expected.sums)
        if grad is not None:
            assert_within(grad, expected.sums[p] / (expected.weights if reduction == "mean" else 1.0))


@PROPERTY
@given(
    case=st.sampled_from(ONE_EACH),
    dtype=st.sampled_from(DTYPES),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    clip=st.booleans(),
    data=st.data(),
)
def test_any_loop_follows_the_reference(case, dtype, counts, clip, data, device):
    """Steps of random numbers of micro-batches, parameters without gradients, weights, sums dropped on the way."""
    params = parameters([0, 1, 31, 300], dtype, device)
    opt = case.make(params, max_grad_norm=0.5 if clip else None)
    acc, expected = fusedopt.GradAccumulator(opt), Expected(params)
    for turn, count in enumerate(counts):
        if data.draw(st.booleans()):
            give(params, 90 + turn)
            acc.accumulate(3.0)
            opt.zero_grad()
        for k in range(count):
            give(params, 10 * turn + k)
            for p in params[:-1]:
                if data.draw(st.integers(0, 3)) == 0:
                    p.grad = None
            weight = data.draw(st.sampled_from([1.0, 2.0, 0.3, 511]))
            if k + 1 < count:
                expected.fold(weight)
                acc.accumulate(weight)
        acc.weight = weight
        step(opt, acc, expected, case.rule, weight=weight)


# ---- beside other hooks --------------------------------------------------------------------------------------------


def test_a_gradient_that_another_hook_takes_is_not_folded():
    """As ``release_gradients`` does, which steps inside the backward pass and frees it."""
    param = parameter(torch.tensor([1.0, 2.0]))

    def take(p):
        p.grad = None

    handle = param.register_post_accumulate_grad_hook(take)
    acc = fusedopt.GradAccumulator([param], hooks=True)
    param.sum().backward()
    assert not acc.holds and param.grad is None
    handle.remove()
    param.sum().backward()
    assert_same_bits(list(acc.grads()), [torch.ones(2)])
