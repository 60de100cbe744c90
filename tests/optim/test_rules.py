"""Every row of the table takes the step that the float64 reference takes, element by element."""

import inspect

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import (
    BY_RULE,
    CASES,
    DTYPES,
    GRAD_LAYOUTS,
    PARAM_LAYOUTS,
    SIZES,
    assert_same_bits,
    hard_values,
    memory,
    normal,
    parameter,
    parameters,
    set_gradients,
    train,
)

import fusedopt
from fusedopt.optim.base import Options

OPTIMIZERS = list(dict.fromkeys(case.optimizer for case in CASES))
STEPS = 3  # the first creates the states, the second is the first to read them, the third has other bias corrections


def assert_steps(opt, rule, next_gradients, steps=STEPS):
    for step in range(steps):
        next_gradients(step)
        before = before_step(opt, rule)
        opt.step()
        assert_stepped(opt, rule, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes_and_hard_values(case, dtype, device):
    params = parameters(SIZES, dtype, device, values=hard_values)
    assert_steps(case.make(params), case.rule, lambda step: set_gradients(params, step, hard_values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_layouts_of_parameters_and_gradients(case, dtype, device):
    """All pairs. Gradients move to other memory and alignment every step."""
    layouts = [(make, lay) for make in PARAM_LAYOUTS.values() for lay in GRAD_LAYOUTS.values()]
    params = [parameter(make(lambda shape: normal(shape, dtype, device, seed=7))) for make, _ in layouts]

    def next_gradients(step):
        for i, (p, (_, lay)) in enumerate(zip(params, layouts, strict=True)):
            p.grad = lay(normal(p.shape, dtype, device, seed=100 * step + i))

    assert_steps(case.make(params), case.rule, next_gradients)


@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_dtypes_and_groups_in_one_optimizer(case, device):
    """A group per learning rate and direction, dtypes alternating inside each; one group has no parameters."""
    params = [p for i, dtype in enumerate(DTYPES * 2) for p in parameters([5, 4099], dtype, device, seed=i)]
    groups = [
        {"params": params[0::3]},
        {"params": []},
        {"params": params[1::3], "lr": 0.05, "weight_decay": 0.0},
        {"params": params[2::3], "lr": 0.2, "betas": (0.7, 0.9), "maximize": True},
    ]
    assert_steps(case.make(groups), case.rule, lambda step: set_gradients(params, step))


@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_late_step(case, device):
    """Bias corrections of step 1,000,001 (both 1 to float32) and of a parameter at step 12, in one launch."""
    params = parameters([100, 4097], device=device)
    opt = case.make(params)
    set_gradients(params)
    opt.step()
    opt.state[params[0]]["step"].fill_(1_000_000)
    opt.state[params[1]]["step"].fill_(11)
    assert_steps(opt, case.rule, lambda step: set_gradients(params, step), steps=2)


@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_zero_learning_rate_moves_states_only(case, device):
    """What torch.distributed.checkpoint does to create states."""
    params = parameters([4097], device=device)
    opt = case.make(params, lr=0.0)
    assert_steps(opt, case.rule, lambda step: set_gradients(params, step))
    assert torch.equal(params[0], parameters([4097], device=device)[0])


@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_number_of_threads_does_not_matter(case):
    """The same bits from one, two, three and five threads."""
    default, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        params = parameters(SIZES)
        opt = case.make(params)
        train(opt, params, 2)
        results.append(memory(opt))
    torch.set_num_threads(default)
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_lion_leaves_untouched_elements_alone(device):
    """Zero gradient and zero momentum, of either sign: no update, so rows of an embedding that is not used stay."""
    p = parameter(normal((4097,), device=device))
    before = p.detach().clone()
    opt = fusedopt.Lion([p], lr=0.1)
    for zero in (0.0, -0.0):
        p.grad = torch.full_like(p, zero)
        opt.step()
    assert torch.equal(p, before)


def test_parameter_without_gradient_gets_no_state(device):
    params = parameters([5, 6], device=device)
    opt = fusedopt.AdamW(params)
    params[1].grad = torch.ones_like(params[1])
    before = params[0].detach().clone()
    opt.step()
    assert not opt.state.get(params[0])
    assert torch.equal(params[0], before)
    assert opt.state[params[1]]["step"].item() == 1


def test_step_without_any_gradient_changes_nothing(device):
    params = parameters([5, 6], device=device)
    before = [p.detach().clone() for p in params]
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    assert opt.step() is None
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not any(opt.state.values())


def test_state_tensors(device):
    """Zeros-like the parameter; `step` a float32 scalar where the parameter lives."""
    for dtype in DTYPES:
        p = parameter(PARAM_LAYOUTS["channels_last"](lambda shape, dtype=dtype: normal(shape, dtype, device)))
        p.grad = torch.ones_like(p)
        opt = fusedopt.AdamW([p])
        opt.step()
        step, *moments = opt.state[p].values()
        assert list(opt.state[p]) == ["step", "exp_avg", "exp_avg_sq"]
        assert (step.dtype, step.shape, step.device) == (torch.float32, (), p.device)
        assert {(m.dtype, m.stride(), m.device) for m in moments} == {(dtype, p.stride(), p.device)}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "RAdam"])
def test_signature_is_torchs(name):
    """Same names, kinds, defaults and order; what we add is keyword-only and comes on top."""
    ours = inspect.signature(getattr(fusedopt, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    for key, parameter_ in theirs.items():
        assert ours[key].kind == parameter_.kind, key
        if key != "params":
            assert ours[key].default == parameter_.default, key
    added = [key for key in ours if key not in theirs and key != "decoupled_weight_decay"]
    assert added == ["options"] and ours["options"].kind == inspect.Parameter.VAR_KEYWORD


OPTIONS = {
    "max_grad_norm": 1.0,
    "norm_type": 2.0,
    "max_grad_value": 1.0,
    "nonfinite": "skip",
    "master_weights": "fp32",
    "state_dtype": "bf16",
    "stochastic_rounding": False,
    "min_8bit_size": 0,
    "seed": 1,
    "backend": "reference",
    "offload": "cpu",
    "norm_reduce": lambda sums, op: None,
}


def test_options_are_those_of_the_type():
    assert Options.__annotations__.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_are_keywords(name):
    """Each alone and all together; others raise a TypeError, as for any signature."""
    make = getattr(fusedopt, name)
    assert inspect.signature(make).parameters["options"].annotation == "Unpack[Options]"
    for options in ({}, OPTIONS, *({key: value} for key, value in OPTIONS.items())):
        make(parameters([5], torch.bfloat16), **options)
    for unknown in ("max_norm", "master_weight", "rule"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            make(parameters([5]), **{unknown: None})


def test_lion_signature():
    parameters_ = inspect.signature(fusedopt.Lion).parameters
    defaults = {key: parameters_[key].default for key in ("lr", "betas", "weight_decay", "maximize")}
    assert defaults == {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_keywords_are_accepted(name, device):
    """They choose between torch's own kernels and change no number here."""
    results = []
    taken = inspect.signature(getattr(fusedopt, name)).parameters.keys()
    for kwargs in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"capturable": True}):
        if not kwargs.keys() <= taken:
            continue
        params = parameters([17, 4097], device=device)
        opt = getattr(fusedopt, name)(params, **kwargs)
        set_gradients(params)
        opt.step()
        results.append(params)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))
