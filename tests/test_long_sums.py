"""Sums over more elements than 32 bits count, and errors over thousands of steps."""

import math

import pytest
import torch
from cases import BY_RULE, normal, parameters

import fusedopt
from fusedopt import reference, specs
from fusedopt.testing.bounds import Bounded, bounded_step, compare, hyper_of
from fusedopt.testing.judge import NORM_RTOL


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_a_norm_over_more_than_2_to_the_31_elements(norm_type, device):
    """32 MB that stand in the list 129 times. One tensor of so many elements: `optim/test_cpu_cuda_bits.py`."""
    grad, times = normal((2**12,), torch.float16, seed=1).repeat(2**12).to(device), 129
    assert grad.numel() * times > 2**31
    total = fusedopt.get_total_norm([grad] * times, norm_type)
    magnitudes = grad[: 2**12].double().abs()
    sums = {1.0: magnitudes.sum(), 2.0: magnitudes.square().sum()}
    exact = magnitudes.max() if norm_type == math.inf else (sums[norm_type] * 2**12 * times) ** (1 / norm_type)
    assert total.item() == pytest.approx(exact.item(), rel=NORM_RTOL)


# Decay that joins the gradient feeds errors of the parameter back into its own moments: a bound that assumes the worst
# of every rounding grows exponentially then, and says nothing. Decoupled decay does not, nor does a small lr for LAMB.
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow, id="10000 (20 s a rule)")])
@pytest.mark.parametrize("case", BY_RULE, ids=str)
def test_errors_of_many_steps_stay_within_their_sum(case, count, device):
    """The reference goes its own way from the first parameter on, with a bound on what roundings of float32 add up to
    in parameter and states. Gradients have a mean, so that parameters move much farther than that."""
    decay = case.rule in ("adamw", "adamw_amsgrad", "lion", "sgdw_momentum")
    params = parameters([33], device=device)
    lr = {"lamb": 1e-4, "adagrad": 0.1}.get(case.rule, 1e-3)
    opt = case.make(params, lr=lr, **({} if decay else {"weight_decay": 0.0}))
    start = params[0].detach().cpu().clone()
    param, states = Bounded.exact(start, torch.float32), {}
    hyper = hyper_of(opt.param_groups[0], case.rule)
    first = torch.full((33,), case.kwargs.get("initial_accumulator_value", 0.0))
    states = {name: Bounded.exact(first, torch.float32) for name in reference.STATES[case.rule]}
    for step in range(count):
        grad = normal((33,), seed=step) + 0.5
        params[0].grad = grad.to(device)
        opt.step()
        expected = bounded_step(
            case.rule, param, grad, states, step=step + 1, maximize=opt.param_groups[0]["maximize"], hyper=hyper
        )
        param, states = expected["param"], {name: expected[name] for name in states}
    compare(params[0].detach().cpu(), param, "param").check()
    for name in specs.RULES[case.rule].states:
        compare(opt.state[params[0]][name].cpu(), states[name], name).check()
    moved = (param.value - start).abs().median()
    assert (2 * param.error).median() < 0.01 * moved
