"""Nothing is timed that does not compute the right thing: every tail against a float64 reference, elementwise.

Each step is checked alone: what the optimizer knew before it, decoded, goes through the reference, and what it knows
afterwards may differ from that by what rounding explains: that is float32 arithmetic, one rounding to the format of
each tensor and, for libraries that clip in place, the rounding of the clipped gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..formats import decode_states, scale_key
from ..reference import reference_step
from ..specs import STATE_BLOCK
from .contracts import COUPLED, GRAD_SCALE, HYPER, MAX_NORM, STATES, Case, Kept, Params, Tail, cut
from .workloads import Model

STEPS = 2  # the second one starts from states that are not zero

# Relative error of a state or an update from float32 arithmetic: torch sums norms in float32, the second moment doubles
# the norm's error, and with 10^8 elements on a CPU that came to 2^-12.
ARITHMETIC = 2.0**-11

# Elements: tensors with more are checked in three pieces, since float64 copies of all of it may not fit into memory.
WHOLE = 1 << 25
PIECE = 1 << 22

# Relative error of clipped gradients in units of their dtype's eps: torch takes the norm of each tensor, the norm of
# those and the product in that dtype.
CLIPPED = 4

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gradient:
    """Of one parameter as it enters the update, float64, and how far a tail may be off."""

    value: torch.Tensor
    error: torch.Tensor | None
    """None for what ``ARITHMETIC`` covers."""


@dataclass(frozen=True)
class Part:
    """A range of the elements of ``params[index]``."""

    index: int
    elements: slice


def check(case: Case, tail: Tail, model: Model) -> float:
    """Runs the first steps of a tail and returns its largest error, as a fraction of what rounding allows.

    Raises:
        AssertionError: an element is wrong, or not finite.
    """
    model.reset()
    sample = sampled_parts(model.params, whole=bool(case.rule.norms))
    gradients = clipped_gradients(case, tail, model, sample)
    before = [tail.read(model.params[part.index], part.elements) for part in sample]
    worst = 0.0
    for step in range(1, STEPS + 1):
        tail.backward(model)
        tail()
        for k, part in enumerate(sample):
            param = model.params[part.index]
            after = tail.read(param, part.elements)
            where = f"{case}: step {step}: params[{part.index}]"
            worst = max(worst, _largest_error(case, tail, param, part, before[k], after, gradients[k], step, where))
            before[k] = after
    return worst


def sampled_parts(params: Params, whole: bool) -> list[Part]:
    """Tensors at both ends and in the middle of a list: matrices and vectors, first and last chunks.

    Of tensors of more than ``WHOLE`` elements there are three pieces, unless ``whole`` says otherwise.
    """
    count = len(params)
    indices = sorted({0, 1, count // 2, count // 2 + 1, count - 2, count - 1} & set(range(count)))
    return [Part(i, elements) for i in indices for elements in _pieces(params[i].numel(), whole)]


def _pieces(numel: int, whole: bool) -> list[slice]:
    if whole or numel <= WHOLE:
        return [slice(0, numel)]
    starts = (0, numel // 2 // STATE_BLOCK * STATE_BLOCK, (numel - PIECE) // STATE_BLOCK * STATE_BLOCK)
    return [slice(start, min(start + PIECE, numel)) for start in starts[:2]] + [slice(starts[2], numel)]


def clipped_gradients(case: Case, tail: Tail, model: Model, sample: list[Part]) -> list[Gradient]:
    """Of the sampled parts."""
    scale = GRAD_SCALE if case.scales else 1.0
    coefficient = 1.0
    if case.clips:
        norm = model.norm / scale
        coefficient = min(1.0, MAX_NORM / (norm + 1e-6))
    coefficient /= scale

    def clipped(part: Part) -> Gradient:
        own = part.index, part.elements
        return _clipped(case, tail, model.used_gradient(*own), model.gradient_error(*own), coefficient)

    return [clipped(part) for part in sample]


def _clipped(
    case: Case, tail: Tail, gradient: torch.Tensor, error: torch.Tensor | None, coefficient: float
) -> Gradient:
    value = gradient * coefficient
    error = None if error is None else error * coefficient
    if tail.clips_in_place and case.clips:  # rounded to the gradients' dtype
        finfo = torch.finfo(case.layout.dtype)
        smallest = finfo.smallest_normal * finfo.eps  # fp16 gradients of a large model are that small once clipped
        error = CLIPPED * finfo.eps * value.abs() + smallest + (0.0 if error is None else error)
    return Gradient(value, error)


def _largest_error(
    case: Case,
    tail: Tail,
    param: torch.nn.Parameter,
    part: Part,
    before: Kept,
    after: Kept,
    gradient: Gradient,
    step: int,
    where: str,
) -> float:
    """Largest error over the bound, of a parameter and its states."""
    assert after.steps in (None, step), f"{where}: step counter is {after.steps}, expected {step}"
    _check_dtypes(case, tail, param, where)
    gradient = _beside_decay(case, tail, before, gradient)
    expected = _expected(case, before, gradient.value, step)
    spread = _spread(case, before, gradient, step, expected)
    moved = (expected["master"] - before.master.double()).abs() + _term_size(case, before, gradient.value, expected)
    errors = {}
    for name, target in expected.items():
        if name != "master" and tail.own_states:
            assert after.states[name].isfinite().all(), f"{where}: {name} is not finite"
            continue
        bound = ARITHMETIC * (moved if name == "master" else target.abs()) + spread.get(name, 0.0)
        got = after.master if name == "master" else after.states[name]
        errors[name] = _ratio(got, target, bound + _rounding(case, name, param, target))
        if name == "master":
            errors["param"] = _ratio(cut(param, part.elements), target, bound + _float_rounding(target, param.dtype))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1, f"{where}: {worst} is off by {errors[worst]:.3g} times what rounding explains"
    return errors[worst]


def _beside_decay(case: Case, tail: Tail, before: Kept, gradient: Gradient) -> Gradient:
    """With what remains of the rounding errors of g + lambda * theta where the two cancel.

    The clipped gradient, the decay and their sum are rounded, four times half a unit in the last place in all; torch's
    norm, and so all of the clipped gradient, may be off by as much as ``ARITHMETIC``.
    """
    if case.optimizer not in COUPLED:
        return gradient
    size = gradient.value.abs()
    error = 2.0**-22 * (size + HYPER[case.optimizer]["weight_decay"] * before.master.double().abs())
    if tail.clips_in_place and case.clips:
        error = error + ARITHMETIC * size
    return Gradient(gradient.value, error if gradient.error is None else error + gradient.error)


def _term_size(case: Case, before: Kept, gradient: torch.Tensor, expected: Values) -> torch.Tensor | float:
    """How large the terms of an update are whose rounding errors remain if they cancel.

    Rules that divide by a root or take a sign move by about the learning rate.
    """
    hyper = HYPER[case.optimizer]
    if "second" in case.rule.moments or case.optimizer == "lion":
        return float(hyper["lr"])
    terms = [gradient, hyper["weight_decay"] * before.master.double(), *(expected[key] for key in case.rule.states)]
    size: torch.Tensor = functools.reduce(torch.add, (term.abs() for term in terms))
    return size * float(hyper["lr"])


def _check_dtypes(case: Case, tail: Tail, param: torch.nn.Parameter, where: str) -> None:
    """A state in more bits than the case says would be compared with the wrong floor, and the wrong peers."""
    entry = tail.optimizer.state.get(param, {})
    for key, dtype in case.at_rest(param).items():
        if key in entry and not tail.own_states:
            assert entry[key].dtype == dtype, f"{where}: {key} is {entry[key].dtype}, expected {dtype}"


def _ratio(got: torch.Tensor, target: torch.Tensor, bound: torch.Tensor) -> float:
    bound = bound + torch.finfo(torch.float32).tiny  # where nothing but 0 is right
    return ((got.double() - target).abs() / bound).nan_to_num(nan=float("inf")).max().item()


# ------------------------------------------------------------------------------------------------- what is expected


def _expected(case: Case, before: Kept, gradient: torch.Tensor, step: int) -> Values:
    """A parameter ("master") and its states after a step, float64."""
    states = before.states or {name: torch.zeros_like(gradient) for name in STATES[case.optimizer]}
    master, states = reference_step(case.optimizer, before.master, gradient, states, step=step, **HYPER[case.optimizer])
    return {"master": master, **states}


def _spread(case: Case, before: Kept, gradient: Gradient, step: int, expected: Values) -> Values:
    """How far each result moves when the gradient does by its error."""
    if gradient.error is None:
        return {}
    moved = [_expected(case, before, gradient.value + sign * gradient.error, step) for sign in (1, -1)]
    return {name: torch.maximum(*((each[name] - target).abs() for each in moved)) for name, target in expected.items()}


# --------------------------------------------------------------------------------------------------------- rounding


def _float_rounding(target: torch.Tensor, dtype: torch.dtype, more_bits: int = 0) -> torch.Tensor:
    """At most one unit in the last place, as random rounding errs, of ``dtype`` with ``more_bits`` beside it."""
    finfo = torch.finfo(dtype)
    return finfo.eps * 2.0**-more_bits * (target.abs() + finfo.smallest_normal)


def _rounding(case: Case, name: str, param: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Error of keeping ``target`` in the format of a master or state."""
    if name != "master":
        return _state_rounding(case, name, param, target)
    if case.param_spec.extra is None:
        return _float_rounding(target, param.dtype)
    key, dtype = case.param_spec.extra
    if key == "master_param":
        return _float_rounding(target, getattr(torch, dtype))
    return _float_rounding(target, param.dtype, 8 * getattr(torch, dtype).itemsize)


def _state_rounding(case: Case, name: str, param: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    spec, moment = case.state_spec(param), case.rule.moments[case.rule.states.index(name)]
    if not spec.blocked:
        return _float_rounding(target, getattr(torch, spec.dtype(moment)))
    values = _code_values(case, name, getattr(torch, spec.dtype(moment))).to(target.device)
    magnitude = target.abs() if moment == "first" else target.sqrt()
    unit = _unit(_block_maxima(magnitude))
    steps = torch.cat([values.diff(), values.diff()[-1:]])
    error = unit * steps[(torch.bucketize(magnitude / unit, values, right=True) - 1).clamp(min=0)]
    return error if moment == "first" else (magnitude + error).square() - target


def _code_values(case: Case, name: str, dtype: torch.dtype) -> torch.Tensor:
    """What the 8-bit codes of a state stand for, in units of a block's scale: magnitudes, ascending, float64."""
    codes = torch.arange(128 if dtype == torch.int8 else 256, dtype=torch.uint8).view(dtype)
    entry = dict.fromkeys(case.rule.states, codes) | {scale_key(key): torch.ones(1) for key in case.rule.states}
    values = decode_states(entry, case.rule)[name].double()
    return values.sqrt() if dtype == torch.uint8 else values


def _unit(largest: torch.Tensor) -> torch.Tensor:
    """2^-15 of the power of two at or below the largest of a block, the higher one where arithmetic may reach it."""
    _, exponent = torch.frexp(largest.clamp(min=torch.finfo(torch.float32).tiny) * (1 + ARITHMETIC))
    return torch.ldexp(torch.ones_like(largest), exponent - 16)


def _block_maxima(magnitude: torch.Tensor) -> torch.Tensor:
    """Each element's block's largest value."""
    blocks = -(-magnitude.numel() // STATE_BLOCK)
    padded = magnitude.new_zeros(blocks * STATE_BLOCK)
    padded[: magnitude.numel()] = magnitude.flatten()
    maxima = padded.view(blocks, STATE_BLOCK).amax(1).repeat_interleave(STATE_BLOCK)
    return maxima[: magnitude.numel()].view_as(magnitude)
