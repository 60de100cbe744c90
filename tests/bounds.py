"""Whole steps of optimizers without formats against `fusedopt.testing.bounds`: values, states, layouts, gaps."""

import dataclasses

import torch
from cases import assert_same_bits, storage
from torch import Tensor

from fusedopt import reference, specs
from fusedopt.testing.bounds import Bounded, assert_within, bounded_step, concatenated, flat, hyper_of
from fusedopt.testing.tensors import assert_gaps_untouched


@dataclasses.dataclass
class Before:
    """What a parameter, its gradient and its states were before a step."""

    tensor: Tensor
    param: Tensor
    storage: Tensor
    grad: Tensor | Bounded
    states: dict[str, Tensor]
    step: int
    maximize: bool
    hyper: dict


def before_step(opt, rule: str) -> list[Before]:
    """A record of every parameter that has a gradient. States that do not exist yet are zero."""
    records = []
    for group in opt.param_groups:
        hyper = hyper_of(group, rule)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = opt.state.get(p, {})
            states = {
                name: state[name].clone() if state else torch.zeros_like(p.data) for name in reference.STATES[rule]
            }
            step = int(state["step"]) if state else 0
            param, grad, memory = p.detach().clone(), p.grad.clone(), storage(p).clone()
            records.append(Before(p, param, memory, grad, states, step, group["maximize"], hyper))
    return records


def state_keys(rule: str) -> set[str]:
    """What a parameter keeps without formats: nothing where the rule has no states."""
    return {"step", *reference.STATES[rule]} if reference.STATES[rule] else set()


def assert_stepped(opt, rule: str, records: list[Before], **transform) -> None:
    """`opt.step()` did to every recorded parameter what the reference does, and nothing else.

    `transform` holds the arguments of `reference.transform_gradient` that apply.
    """
    assert records, "no parameter has a gradient: nothing was tested"
    alike = {}
    for r in records:
        own = id(r.tensor) if specs.RULES[rule].norms else 0
        alike.setdefault((r.param.dtype, r.step, r.maximize, tuple(r.hyper.items()), own), []).append(r)
    for group in alike.values():
        _assert_values(opt, rule, group, transform)
    for r in records:
        state = opt.state.get(r.tensor, {})
        assert state.keys() == state_keys(rule)
        for name in reference.STATES[rule]:
            assert (state[name].dtype, state[name].stride()) == (r.param.dtype, r.states[name].stride())
        if state:
            assert (float(state["step"]), state["step"].shape, state["step"].dtype) == (r.step + 1, (), torch.float32)
        if isinstance(r.grad, Tensor):
            assert_same_bits(r.tensor.grad, r.grad)
        assert_gaps_untouched(r.tensor, r.storage)


def _assert_values(opt, rule: str, records: list[Before], transform: dict) -> None:
    """Records of one dtype, step and set of hyper-parameters, end to end in one tensor.

    Rules are elementwise, but for those of two phases, whose tensors come one by one.
    """
    names, first = reference.STATES[rule], records[0]
    states = {name: flat(r.states[name] for r in records) for name in names}
    param, grad = flat(r.param for r in records), concatenated([r.grad for r in records])
    expected = bounded_step(
        rule, param, grad, states, step=first.step + 1, maximize=first.maximize, hyper=first.hyper, **transform
    )
    where = f"{rule}, {first.param.dtype}, numels {[r.param.numel() for r in records]} end to end"
    assert_within(flat(r.tensor for r in records), expected["param"], f"param, {where}")
    for name in names:
        assert_within(flat(opt.state[r.tensor][name] for r in records), expected[name], f"{name}, {where}")
