"""The judge of a step: what parameters and states were before it, and what the reference makes of them.

The reference starts each step from what is stored, decoded: so each step is judged by itself, in any format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import formats, reference, specs
from .bounds import Bounded, Comparison, assert_within, bounded_step, concatenated, flat, hyper_of
from .formats import BFLOAT16, BLOCK, MAY_VANISH, assert_codes, compare_neighbour, compare_param, in_blocks, in_order
from .tensors import Copies, check, on_cpu, storage

# Of norms: sums are kept in float64 (or scaled so that they lose no more), then one square root, and one rounding to
# float32. Two ulp leave room for a rounding of the factors that unscale and scale.
NORM_RTOL = 2 * 2.0**-23
# The coefficient adds the rounding of norm + 1e-6, of the quotient and of max_norm.
COEF_RTOL = NORM_RTOL + 3 * 2.0**-24


def set_gradient(p, grad: Tensor) -> None:
    """In `.grad` where torch lets it, else in `main_grad`, which all of the parameter's gradients must then be in."""
    if grad.dtype == p.dtype and not hasattr(p, "main_grad"):
        p.grad = grad
    else:
        p.main_grad = grad


def gradient(p) -> Tensor | None:
    main_grad = getattr(p, "main_grad", None)
    return p.grad if main_grad is None else main_grad


@dataclasses.dataclass
class Before:
    """What a parameter, its gradient and its state were, as they are stored. Flat tensors as `in_order` has them."""

    tensor: Tensor
    main: Tensor
    grad: Tensor | Bounded
    state: dict[str, Tensor]
    storage: Tensor
    grad_bits: Tensor | None
    """None where `.grad` does not matter."""
    step: int
    group: dict
    """Of all records of a param group the same one."""


def copies_of(opt, params: list, others: Iterable[Tensor] = ()) -> Copies:
    """Of parameters, their states and other tensors."""
    states = (value for p in params for value in opt.state.get(p, {}).values() if isinstance(value, Tensor))
    return Copies([*params, *states, *others])


def _is_scale(key: str) -> bool:
    return key.endswith("_scale")


def _state_of(opt, p: Tensor, copies: Copies) -> dict[str, Tensor]:
    """The tensors of a parameter's state but its counter, on the CPU, flat."""
    return {
        key: copies[value] if _is_scale(key) else in_order(copies[value], p)
        for key, value in opt.state.get(p, {}).items()
        if isinstance(value, Tensor) and key != "step"
    }


@torch.inference_mode()  # autograd's bookkeeping costs more than it should where numbers are few
def before_step(opt, rule: str) -> list[Before]:
    """A record of every parameter that has a gradient, on the CPU. States that do not exist yet are zero."""
    groups = [(dict(group), group["params"]) for group in opt.param_groups]
    members = [(p, group) for group, params in groups for p in params if gradient(p) is not None]
    grads = [gradient(p) for p, _ in members]
    copies = copies_of(opt, [p for p, _ in members], grads)
    records = []
    for (p, group), given in zip(members, grads, strict=True):
        memory, grad = storage(copies[p]).clone(), copies[given].clone()
        main = in_order(memory.as_strided(p.shape, p.stride(), p.storage_offset()), p)
        state = {key: value.clone() for key, value in _state_of(opt, p, copies).items()}
        records.append(
            Before(
                tensor=p,
                main=main,
                grad=in_order(grad, p),
                state=state or {name: torch.zeros_like(main) for name in reference.STATES[rule]},
                storage=memory,
                grad_bits=grad,
                step=_step_of(opt, p, copies),
                group=group,
            )
        )
    return records


def _step_of(opt, p: Tensor, copies: Copies) -> int:
    step = opt.state.get(p, {}).get("step", 0)
    return int(copies[step] if isinstance(step, Tensor) else step)


# ---- after it -----------------------------------------------------------------------------------------------------


def random(group: dict) -> bool:
    return bool(group.get("stochastic_rounding"))


def alike(opt, rule: str, records: list[Before]) -> list[list[Before]]:
    """Records that are judged end to end: of one format, step and set of hyper-parameters.

    Rules are elementwise, but for those of two phases, whose tensors come one by one.
    """
    groups, two_phases = {}, specs.RULES[rule].norms
    shared = {id(r.group): r.group for r in records}
    options = {i: str((hyper_of(g, rule), g["maximize"], random(g))) for i, g in shared.items()}
    for r in records:
        dtypes = (_dtypes(state) for state in (r.state, opt.state.get(r.tensor, {})))
        own = id(r.tensor) if two_phases else 0
        key = (r.tensor.dtype, r.grad_bits is None, r.step, options[id(r.group)], *dtypes, own)
        groups.setdefault(key, []).append(r)
    return list(groups.values())


def _dtypes(state: dict) -> frozenset:
    return frozenset((key, value.dtype) for key, value in state.items() if isinstance(value, Tensor))


def _end_to_end(tensors: list, block: int) -> Any:
    """Flat tensors in one, with their bounds if they have any, each in whole blocks."""
    if isinstance(tensors[0], Bounded):
        padded = [Bounded(in_blocks(t.value, block), in_blocks(t.error, block), t.compute) for t in tensors]
        return concatenated(padded)
    return torch.cat([in_blocks(t, block) for t in tensors])


def block_of(opt, records: list[Before]) -> int:
    """Elements that records of one kind, end to end, must be padded to multiples of: those that share a scale."""
    return BLOCK if any(map(_is_scale, opt.state.get(records[0].tensor, {}))) else 1


class _Joined:
    """Parameters of one kind with their states, flat and end to end, each in whole blocks: as they are stored, and
    decoded. They are decoded at once, because a step has hundreds of small tensors."""

    def __init__(self, rule: str, mains: list[Tensor], states: list[dict[str, Tensor]], block: int) -> None:
        self.main, self.state = _end_to_end(mains, block), {}
        for key in states[0]:
            each = [state[key] for state in states]
            self.state[key] = torch.cat(each) if _is_scale(key) else _end_to_end(each, block)
        self.value = formats.decode_master(self.state, self.main)
        self.states = formats.decode_states(self.state, specs.RULES[rule])


def expected_after(rule: str, records: list[Before], before: _Joined, block: int, **transform) -> dict[str, Bounded]:
    """What the reference makes of records of one kind, end to end; the new parameter is called "param"."""
    first = records[0]
    expected = bounded_step(
        rule,
        before.value,
        _end_to_end([r.grad for r in records], block),
        before.states,
        step=first.step + 1,
        maximize=first.group["maximize"],
        hyper=hyper_of(first.group, rule),
        **transform,
    )
    if block > 1:
        real = torch.cat([in_blocks(torch.ones(r.main.numel(), dtype=torch.bool), block) for r in records])
        for name, each in expected.items():  # a clip coefficient of NaN would reach the padding
            value, error = (torch.where(real, t, 0.0) for t in (each.value, each.error))
            expected[name] = Bounded(value, error, each.compute)
    return expected


@torch.inference_mode()
def judge_values(opt, rule: str, records: list[Before], copies: Copies | None = None, **transform) -> Comparison:
    """The parameters of records of one kind beside the reference's, not yet checked. AssertionError for wrong states.

    copies: of the parameters and their states after the step; by default they are made.
    transform: the arguments of `reference.transform_gradient` that apply.
    """
    params, block = [r.tensor for r in records], block_of(opt, records)
    before = _Joined(rule, [r.main for r in records], [r.state for r in records], block)
    expected = expected_after(rule, records, before, block, **transform)
    copies = copies or copies_of(opt, params)
    mains, states = [in_order(copies[p], p) for p in params], [_state_of(opt, p, copies) for p in params]
    after, stochastic = _Joined(rule, mains, states, block), random(records[0].group)
    keys, sizes = list(opt.state.get(params[0], {})), [p.numel() for p in params]
    where = f"{rule}, {params[0].dtype} with {keys}, {sizes} end to end"
    for name, moment in zip(specs.RULES[rule].states, specs.RULES[rule].moments):
        _check_state(after, name, moment, expected[name], stochastic=stochastic, what=f"{name}, {where}")
    comparison = compare_param(
        after.main,
        after.value,
        expected["param"],
        extra=next((after.state[key].dtype for key in ("master_param", "param_remainder") if key in after.state), None),
        stochastic=stochastic,
        where=where,
    )
    comparison.before = before.value
    return comparison


def _check_state(after: _Joined, name: str, moment: str, exact: Bounded, *, stochastic: bool, what: str) -> None:
    codes = after.state[name]
    if codes.is_floating_point() and stochastic and codes.dtype == BFLOAT16:
        compare_neighbour(codes, exact, what).check()
    elif codes.is_floating_point():
        assert_within(codes, exact, what)
    else:
        assert_codes(after.states[name], after.state[f"{name}_scale"], exact, moment, what)
        if moment == "second":
            positive = exact.value - 2 * exact.error >= MAY_VANISH
            check(codes[positive].all(), f"code 0 for a second moment > 0, {what}")


def check_norm(opt, records: list, **transform) -> tuple[float, float]:
    """`opt.grad_norm` and `opt.clip_coef` are those of all gradients. AssertionError otherwise. Returns the
    coefficients of float32 and of float64 parameters.

    By the triangle inequality the norm may err by the norm of the errors of the gradients.
    """
    grads = [r.grad.value if isinstance(r.grad, Bounded) else r.grad for r in records]
    errors = [r.grad.error for r in records if isinstance(r.grad, Bounded)]
    exact, slack = (flat([torch.empty(0), *tensors]).double() for tensors in (grads, errors))
    exact, slack = reference.transform_gradient(exact, **transform), 2 * slack / transform.get("grad_scale", 1.0)
    norm, slack = (reference.total_norm([t], opt.norm_type) for t in (exact, slack))
    coef = reference.clip_coefficient(norm, opt.max_grad_norm)
    share = slack / norm if norm > 0 else torch.zeros(())
    # What float64 parameters are scaled by is not rounded to float32.
    got_norm, got_coef, wide = (t.double() for t in on_cpu([opt.grad_norm, opt.clip_coef, opt._control().clip_coef64]))
    for what, rtol, got, wanted in (
        ("grad_norm", NORM_RTOL, got_norm, norm),
        ("clip_coef", COEF_RTOL, got_coef, coef),
    ):
        most = wanted.abs() * (rtol + share) + 2.0**-150  # half of the least float32
        wanted = wanted.float().double() if wanted.abs() > torch.finfo(torch.float32).max else wanted  # overflows
        close = (got - wanted).abs() <= most or got == wanted or (got.isnan() and wanted.isnan())
        check(close, f"{what}: got {got.item()!r}, expected {wanted.item()!r} to within {most.item():.3g}")
    close = (wide - coef).abs() <= coef * (COEF_RTOL + share) or (wide.isnan() and coef.isnan())
    check(close, f"clip_coef in float64: got {wide.item()!r}, expected {coef.item()!r}")
    return got_coef.item(), wide.item()
