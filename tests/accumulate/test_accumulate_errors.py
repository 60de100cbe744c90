"""GradAccumulator and bad input: the type of the error, what it says, and that nothing changed."""

import copy
import math
import re

import pytest
import torch
from accumulated import backward, give
from cases import assert_same_bits, memory, normal, parameter, parameters

import fusedopt

SIZES = [5, 0, 4097]


def assert_message(error, *patterns):
    """Each pattern occurs, in any order and case; and there is a remedy after a semicolon."""
    for pattern in patterns:
        assert re.search(pattern, str(error.value), re.IGNORECASE), f"{pattern!r} is not in: {error.value}"
    assert "GradAccumulator" in str(error.value)
    assert re.search(r"; \w+", str(error.value)), f"no remedy in: {error.value}"


class Loop:
    """An accumulator that holds a micro-batch, and a judge of what an error must leave as it is."""

    def __init__(self, device, **options):
        self.params = parameters(SIZES, device=device)
        self.opt = fusedopt.AdamW(self.params, lr=0.01)
        self.acc = fusedopt.GradAccumulator(self.opt, **options)
        for seed in range(3):
            backward(self.params, seed)
            if seed != 1:
                self.acc.accumulate()
            else:
                self.opt.step()
                self.opt.zero_grad()
        self.before = self.contents()

    def contents(self):
        held = [(main.held.value, main.tensor.clone()) for main in self.acc._mains.values()]
        return memory(self.opt), held, self.acc.micro_batches, self.acc._total, self.acc.weight

    def assert_unchanged(self):
        (memory_before, held_before, *before), (memory_now, held, *now) = self.before, self.contents()
        assert_same_bits(memory_now, memory_before)
        assert [value for value, _ in held] == [value for value, _ in held_before] and now == before
        assert_same_bits([tensor for _, tensor in held], [tensor for _, tensor in held_before])

    def assert_goes_on(self):
        """The next micro-batch and the step are those of an accumulator that never saw an error."""
        other = Loop(self.params[0].device)
        for loop in (self, other):
            for p in loop.params:
                p.grad = None
            backward(loop.params, 7)
            loop.opt.step()
        assert_same_bits(memory(self.opt), memory(other.opt))


@pytest.fixture
def loop(device):
    return Loop(device)


# ---- construction --------------------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"dtype": torch.float16}, TypeError, ["float16", "float32", "bfloat16"]),
    ({"dtype": torch.float64}, TypeError, ["float64"]),
    ({"dtype": "float32"}, TypeError, ["float32"]),
    ({"reduction": "max"}, ValueError, ["'max'", "mean", "sum"]),
    ({"reduction": None}, ValueError, ["None", "mean"]),
]


@pytest.mark.parametrize("options, exception, patterns", BAD_ARGUMENTS, ids=str)
def test_bad_arguments(options, exception, patterns):
    """The optimizer can have a good one afterwards."""
    opt = fusedopt.AdamW(parameters(SIZES))
    with pytest.raises(exception) as error:
        fusedopt.GradAccumulator(opt, **options)
    assert_message(error, *patterns)
    fusedopt.GradAccumulator(opt)


TWICE = parameter(normal((3,)))
BAD_TARGETS = [
    (lambda: parameter(normal((3,))), TypeError, ["Tensor", r"\[param\]"]),
    (list, ValueError, ["no parameters"]),
    (lambda: [TWICE, TWICE], ValueError, ["same parameter"]),
    (lambda: [normal((3,)).numpy()], TypeError, ["ndarray"]),
    (lambda: [("weight", TWICE)], TypeError, ["tuple"]),
    (lambda: [torch.arange(3)], TypeError, ["int64"]),
    (lambda: [TWICE * 2], ValueError, ["leaf"]),
    (lambda: [torch.eye(3).to_sparse()], TypeError, ["sparse"]),
    (lambda: [torch.zeros(3, device="meta")], TypeError, ["meta"]),
    (lambda: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1).expand(4))]), ValueError, ["share memory"]),
]


@pytest.mark.parametrize("make, exception, patterns", BAD_TARGETS, ids=[str(row[2]) for row in BAD_TARGETS])
def test_bad_targets(make, exception, patterns):
    with pytest.raises(exception) as error:
        fusedopt.GradAccumulator(make())
    assert_message(error, *patterns)


def test_two_accumulators_on_one_optimizer(loop):
    with pytest.raises(ValueError) as error:
        fusedopt.GradAccumulator(loop.opt, hooks=True)
    assert_message(error, "AdamW", "accumulator already", r"detach\(\)")
    loop.assert_unchanged()
    loop.assert_goes_on()
    loop.acc.detach()
    fusedopt.GradAccumulator(loop.opt)


# ---- accumulate ----------------------------------------------------------------------------------------------------


def test_before_a_backward_pass(device):
    params = parameters(SIZES, device=device)
    acc = fusedopt.GradAccumulator(fusedopt.AdamW(params))
    for call in (acc.accumulate, acc.grads, acc.assign_grads):
        with pytest.raises(RuntimeError) as error:
            call()
        assert_message(error, "no gradients", r"after backward\(\)")
    assert not acc.holds and acc.micro_batches == 0


def test_twice_after_one_backward_pass(loop):
    with pytest.raises(RuntimeError) as error:
        loop.acc.accumulate(5.0)
    assert_message(error, "no gradients", r"after backward\(\)")
    loop.assert_unchanged()
    loop.assert_goes_on()


def test_after_a_step_without_gradients(device):
    """A step that has nothing to do is none, as in torch; accumulate() after it complains."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    before = memory(opt)
    opt.step()
    assert_same_bits(memory(opt), before)
    with pytest.raises(RuntimeError) as error:
        acc.accumulate()
    assert_message(error, "no gradients")
    give(params, 0)
    opt.step()
    opt.zero_grad()
    before = memory(opt)
    opt.step()
    assert_same_bits(memory(opt), before)
    with pytest.raises(RuntimeError) as error:
        acc.accumulate()


def test_sparse_gradients(loop):
    loop.params[0].grad = torch.ones_like(loop.params[0])
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    acc = fusedopt.GradAccumulator([*loop.params, embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError) as error:
        acc.accumulate()
    assert_message(error, r"params\[3\]", "sparse", "dense")
    assert not acc.holds and loop.params[0].grad is not None
    loop.assert_unchanged()


def spoil_shape(p):
    p.data = torch.zeros(6, device=p.device)
    p.grad = torch.zeros_like(p)


def spoil_dtype(p):
    p.data = p.data.double()
    p.grad = torch.zeros_like(p)


def spoil_layout(p):
    p.data = torch.zeros(10, device=p.device)[::2]
    p.grad = torch.zeros(5, device=p.device)


CHANGED = {spoil_shape: [r"\(6,\)", r"\(5,\)"], spoil_dtype: ["float64", "float32"], spoil_layout: [r"\(2,\)"]}


@pytest.mark.parametrize("spoil", CHANGED, ids=lambda f: f.__name__)
def test_parameters_that_change_while_gradients_are_held(spoil, device):
    """accumulate(), step() and grads() refuse; after reset() all is well."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    give(params, 0)
    acc.accumulate()
    spoil(params[0])
    held = [main.tensor.clone() for main in acc._mains.values()]
    before = memory(opt)
    for call in (acc.accumulate, opt.step, acc.grads):
        with pytest.raises(ValueError) as error:
            call()
        assert_message(error, r"params(\[0\]|'\]\[0\])", r"reset\(\)", *CHANGED[spoil])
    assert_same_bits(memory(opt), before)
    assert_same_bits([main.tensor for main in acc._mains.values()], held)
    assert acc.micro_batches == 1
    acc.reset()
    acc.accumulate()
    opt.step()


def test_gradients_of_another_shape_or_dtype(loop):
    p = loop.params[0]
    if hasattr(p, "grad_dtype"):
        p.grad_dtype = None
        p.grad = torch.zeros(5, dtype=torch.float64, device=p.device)
        with pytest.raises(TypeError) as error:
            loop.acc.accumulate()
        assert_message(error, r"params\[0\].grad", "float64")
        loop.assert_unchanged()
    loop.params[0].grad = None
    loop.assert_goes_on()


BAD_WEIGHTS = [
    (-1.0, ValueError, r"-1\.0"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    ("3", TypeError, "str"),
    ([1.0], TypeError, "list"),
    (torch.ones(2), ValueError, r"\(2,\)"),
    (torch.ones(0), ValueError, r"\(0,\)"),
]


@pytest.mark.parametrize("weight, exception, pattern", BAD_WEIGHTS, ids=str)
def test_bad_weights(weight, exception, pattern, loop):
    give(loop.params, 3)
    with pytest.raises(exception) as error:
        loop.acc.accumulate(weight)
    assert_message(error, "weight", pattern)
    with pytest.raises(exception) as error:
        loop.acc.weight = weight
    assert_message(error, "weight", pattern)
    assert all(p.grad is not None for p in loop.params)
    loop.assert_unchanged()
    loop.assert_goes_on()


def test_weights_that_are_all_zero(device):
    """The step refuses, and is as good as not called: gradients are where they were."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    give(params, 0)
    opt.step()
    before = memory(opt)
    acc.accumulate(0.0)
    for own in (True, False):
        if own:
            give(params, 1)
            acc.weight = 0
        else:
            opt.zero_grad()
            give(params, 0)
            acc.accumulate(0)
        with pytest.raises(ValueError) as error:
            opt.step()
        assert_message(error, "all 0", r"zero_grad\(\)")
        assert_same_bits(memory(opt), before)
        assert acc.micro_batches == 1
    with pytest.raises(ValueError) as error:
        acc.grads()
    assert_message(error, "all 0")
    summing = fusedopt.GradAccumulator(params, reduction="sum")
    give(params, 0)
    summing.accumulate(0.0)
    assert all(grad.count_nonzero() == 0 for grad in summing.grads())


def test_a_weight_after_hooks_have_used_another(device):
    params = parameters(SIZES, device=device)
    acc = fusedopt.GradAccumulator(fusedopt.AdamW(params), hooks=True)
    acc.weight = 2.0
    backward(params, 0)
    for call in (lambda: acc.accumulate(3.0), lambda: setattr(acc, "weight", torch.ones(()))):
        with pytest.raises(RuntimeError) as error:
            call()
        assert_message(error, "hooks", r"2\.0", "before the backward pass")
    acc.accumulate(2)
    assert acc.micro_batches == 1 and acc._total == 2.0


def test_bad_gradient_in_a_hook(device):
    embedding = torch.nn.Embedding(10, 3, sparse=True, device=device)
    acc = fusedopt.GradAccumulator(embedding.parameters(), hooks=True)
    with pytest.raises(RuntimeError) as error:
        embedding(torch.tensor([1, 2], device=device)).sum().backward()
    assert_message(error, "sparse", r"backward\(\)")
    assert not acc.holds and embedding.weight.grad is not None


def test_after_detach(loop):
    loop.acc.detach()
    give(loop.params, 0)
    with pytest.raises(RuntimeError) as error:
        loop.acc.accumulate()
    assert_message(error, "detached")
    assert all(p.grad is not None for p in loop.params)


def test_copying_an_accumulator(loop):
    with pytest.raises(TypeError) as error:
        copy.deepcopy(loop.acc)
    assert_message(error, r"state_dict\(\)")
    loop.assert_unchanged()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def key_missing(state):
    del state["weight"]


def no_dict(state):
    state.clear()


def other_shape(state):
    state["main_grads"][2] = torch.zeros(4098)


def parameter_unknown(state):
    state["main_grads"][3] = torch.zeros(5)


def key_unknown(state):
    state["main_grads"]["weight"] = torch.zeros(5)


def no_tensor(state):
    state["main_grads"][0] = [0.0] * 5


BAD_STATES = {
    key_missing: ["weight", "main_grads"],
    no_dict: ["main_grads"],
    other_shape: [r"main_grads\[2\]", r"\(4098,\)", r"\(4097,\)"],
    parameter_unknown: [r"main_grads\[3\]", "3 parameters"],
    key_unknown: [r"main_grads\[weight\]", "3 parameters"],
    no_tensor: [r"main_grads\[0\]", r"\(5,\)"],
}


@pytest.mark.parametrize("spoil", BAD_STATES, ids=lambda f: f.__name__)
def test_state_of_another_model(spoil, loop):
    state = copy.deepcopy(loop.acc.state_dict())
    for grad in state["main_grads"].values():
        grad.zero_()
    spoil(state)
    with pytest.raises(ValueError) as error:
        loop.acc.load_state_dict(state)
    assert_message(error, "load_state_dict", *BAD_STATES[spoil])
    loop.assert_unchanged()
    loop.assert_goes_on()


def test_state_within_a_micro_batch(device):
    """With hooks, between backward() and accumulate()."""
    params = parameters(SIZES, device=device)
    acc = fusedopt.GradAccumulator(params, hooks=True)
    backward(params, 0)
    with pytest.raises(RuntimeError) as error:
        acc.state_dict()
    assert_message(error, "has not ended", r"accumulate\(\)")
    acc.accumulate()
    acc.state_dict()


# ---- torch's scaler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("hooks", [False, True])
def test_torchs_scaler(hooks, options, unscale, device):
    """It looks at `.grad` alone, so neither its verdict nor its unscaling would be right. Nothing is lost."""
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, **options)
    acc = fusedopt.GradAccumulator(opt, hooks=hooks)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    scaler.scale(torch.zeros((), device=device))
    backward(params, 0)
    acc.accumulate()
    backward(params, 1)
    before, held = memory(opt), [main.tensor.clone() for main in acc._mains.values()]
    if unscale and not hooks:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError) as error:
        scaler.step(opt)
    assert_message(error, "AdamW.step", "torch.amp.GradScaler", "fusedopt.GradScaler")
    assert_same_bits(memory(opt), before)
    assert_same_bits([main.tensor for main in acc._mains.values()], held)
    assert acc.micro_batches == 1 and not hasattr(opt, "found_inf") and not hasattr(opt, "grad_scale")
    opt.zero_grad()
    if not hooks:  # else there is no .grad that the scaler could have looked at
        scaler.update()
        backward(params, 2)
        scaler.step(opt)  # nothing is accumulated any more
