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
from .bounds import Bounded, Comparison, assert_within, bounded_step, concatenated, hyper_of
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
    """What a parameter, its gradient and its decoded states were. Flat tensors as `in_order` has them."""

    tensor: Tensor
    value: Tensor
    grad: Tensor | Bounded
    states: dict[str, Tensor | Bounded]
    storage: Tensor
    grad_bits: Tensor | None
    """None where `.grad` does not matter."""
    step: int
    group: dict


def copies_of(opt, params: list, others: Iterable[Tensor] = ()) -> Copies:
    """Of parameters, their states and other tensors."""
    states = (value for p in params for value in opt.state.get(p, {}).values() if isinstance(value, Tensor))
    return Copies([*params, *states, *others])


def _kept(opt, p: Tensor, copies: Copies) -> tuple[Tensor, dict]:
    """A parameter and its state, on the CPU."""
    state = opt.state.get(p, {})
    return copies[p], {key: copies[value] if isinstance(value, Tensor) else value for key, value in state.items()}


def before_step(opt, rule: str) -> list[Before]:
    """A record of every parameter that has a gradient, on the CPU. States that do not exist yet are zero."""
    members = [(p, group) for group in opt.param_groups for p in group["params"] if gradient(p) is not None]
    grads = [gradient(p) for p, _ in members]
    copies = copies_of(opt, [p for p, _ in members], grads)
    records = []
    for (p, group), given in zip(members, grads, strict=True):
        grad, (main, state) = copies[given], _kept(opt, p, copies)
        value = formats.decode_master(state, main)
        zeros = {name: torch.zeros_like(value) for name in reference.STATES[rule]}
        states = formats.decode_states(state, specs.RULES[rule]) if state else zeros
        flat = {name: in_order(states[name], main) for name in reference.STATES[rule]}
        records.append(
            Before(
                tensor=p,
                value=in_order(value, main),
                grad=in_order(grad, main),
                states=flat,
                storage=storage(main).clone(),
                grad_bits=grad.clone(),
                step=int(state.get("step", 0)),
                group=dict(group),
            )
        )
    return records


# ---- after it -----------------------------------------------------------------------------------------------------


def random(group: dict) -> bool:
    return bool(group.get("stochastic_rounding"))


def alike(opt, rule: str, records: list[Before]) -> list[list[Before]]:
    """Records that are judged end to end: of one format, step and set of hyper-parameters.

    Rules are elementwise, but for those of two phases, whose tensors come one by one.
    """
    groups = {}
    for r in records:
        dtypes = sorted((key, v.dtype) for key, v in opt.state.get(r.tensor, {}).items() if isinstance(v, Tensor))
        own = id(r.tensor) if specs.RULES[rule].norms else 0
        hyper = sorted(hyper_of(r.group, rule).items())
        key = (r.tensor.dtype, r.grad_bits is None, r.step, hyper, r.group["maximize"], dtypes, random(r.group), own)
        groups.setdefault(str(key), []).append(r)
    return list(groups.values())


def _end_to_end(tensors: list, block: int) -> Any:
    """Flat tensors in one, with their bounds if they have any, each in whole blocks."""
    if isinstance(tensors[0], Bounded):
        padded = [Bounded(in_blocks(t.value, block), in_blocks(t.error, block), t.compute) for t in tensors]
        return concatenated(padded)
    return torch.cat([in_blocks(t, block) for t in tensors])


def block_of(opt, records: list[Before]) -> int:
    """Elements that records of one kind, end to end, must be padded to multiples of: those that share a scale."""
    state = opt.state.get(records[0].tensor, {})
    return BLOCK if any(key.endswith("_scale") for key in state) else 1


def expected_after(rule: str, records: list[Before], block: int, **transform) -> dict[str, Bounded]:
    """What the reference makes of records of one kind, end to end; the new parameter is called "param"."""
    first = records[0]
    expected = bounded_step(
        rule,
        _end_to_end([r.value for r in records], block),
        _end_to_end([r.grad for r in records], block),
        {name: _end_to_end([r.states[name] for r in records], block) for name in first.states},
        step=first.step + 1,
        maximize=first.group["maximize"],
        hyper=hyper_of(first.group, rule),
        **transform,
    )
    if block > 1:
        real = torch.cat([in_blocks(torch.ones(r.value.numel(), dtype=torch.bool), block) for r in records])
        for name, each in expected.items():  # a clip coefficient of NaN would reach the padding
            value, error = (torch.where(real, t, 0.0) for t in (each.value, each.error))
            expected[name] = Bounded(value, error, each.compute)
    return expected


def judge_values(opt, rule: str, records: list[Before], copies: Copies | None = None, **transform) -> Comparison:
    """The parameters of records of one kind beside the reference's, not yet checked. AssertionError for wrong states.

    copies: of the parameters and their states after the step; by default they are made.
    transform: the arguments of `reference.transform_gradient` that apply.
    """
    params, block = [r.tensor for r in records], block_of(opt, records)
    expected = expected_after(rule, records, block, **transform)
    after = copies or copies_of(opt, params)
    kept = [_kept(opt, p, after) for p in params]
    state, stochastic = kept[0][1], random(records[0].group)
    where = f"{rule}, {kept[0][0].dtype} with {list(state)}, {[p.numel() for p, _ in kept]} end to end"
    for name, moment in zip(specs.RULES[rule].states, specs.RULES[rule].moments):
        _check_state(
            rule, kept, name, moment, expected[name], block=block, stochastic=stochastic, what=f"{name}, {where}"
        )
    comparison = compare_param(
        _end_to_end([in_order(p, p) for p, _ in kept], block),
        _end_to_end([in_order(formats.decode_master(state, p), p) for p, state in kept], block),
        expected["param"],
        extra=next((state[key].dtype for key in ("master_param", "param_remainder") if key in state), None),
        stochastic=stochastic,
        where=where,
    )
    comparison.before = _end_to_end([r.value for r in records], block)
    return comparison


def _check_state(
    rule: str,
    kept: list[tuple[Tensor, dict]],
    name: str,
    moment: str,
    exact: Bounded,
    *,
    block: int,
    stochastic: bool,
    what: str,
) -> None:
    codes = _end_to_end([in_order(state[name], p) for p, state in kept], block)
    if codes.is_floating_point() and stochastic and codes.dtype == BFLOAT16:
        compare_neighbour(codes, exact, what).check()
    elif codes.is_floating_point():
        assert_within(codes, exact, what)
    else:
        scales = torch.cat([state[f"{name}_scale"] for _, state in kept])
        decoded = [in_order(formats.decode_states(state, specs.RULES[rule])[name], p) for p, state in kept]
        decoded = _end_to_end(decoded, block)
        assert_codes(decoded, scales, exact, moment, what)
        if moment == "second":
            positive = exact.value - 2 * exact.error >= MAY_VANISH
            check(codes[positive].all(), f"code 0 for a second moment > 0, {what}")


def check_norm(opt, records: list, **transform) -> tuple[float, float]:
    """`opt.grad_norm` and `opt.clip_coef` are those of all gradients. AssertionError otherwise. Returns the
    coefficients of float32 and of float64 parameters.

    By the triangle inequality the norm may err by the norm of the errors of the gradients.
    """
    exact, slack = [], []
    for r in records:
        grad, error = (r.grad.value, r.grad.error) if isinstance(r.grad, Bounded) else (r.grad, None)
        exact.append(reference.transform_gradient(grad.double(), **transform))
        if error is not None:
            slack.append(2 * error / transform.get("grad_scale", 1.0))
    norm, slack = (reference.total_norm(tensors, opt.norm_type) for tensors in (exact, slack))
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
