"""Every combination of formats, and the roundings that each adds to a step.

What a step may add to the reference's result, on top of the bound of the arithmetic (`bounds.py`), is the rounding of
the format at the store, and that is known:

- plain formats and fp32 masters: half an ulp of the dtype;
- split16: half an ulp of float32, because it is a float32; split8: half of 256 ulp of float32, the 8 bits it lacks;
- stochastic rounding: one of the two neighbours in bfloat16;
- int8: one of the two neighbouring codes of the block, see `assert_codes`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from .. import formats, reference, specs
from .bounds import Bounded, Comparison, compare
from .tensors import bits, check

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = specs.STATE_BLOCK


@dataclasses.dataclass(frozen=True)
class Combination:
    """Formats of one param group."""

    dtype: torch.dtype
    master_weights: str | None = None
    state_dtype: str | None = None
    stochastic_rounding: bool = False

    def __str__(self) -> str:
        main = str(self.dtype).removeprefix("torch.")
        extra = "stochastic" if self.stochastic_rounding else self.master_weights
        return "-".join([main, *([extra] if extra else []), f"{self.state_dtype}_states"])

    @property
    def options(self) -> dict[str, Any]:
        chosen = {key: getattr(self, key) for key in ("master_weights", "state_dtype", "stochastic_rounding")}
        return {key: value for key, value in chosen.items() if value}

    @property
    def state_format(self) -> torch.dtype:
        """Of a first moment that is not too small for it."""
        default = FLOAT32 if self.master_weights else self.dtype
        return {None: default, "fp32": FLOAT32, "bf16": BFLOAT16, "int8": torch.int8}[self.state_dtype]

    @property
    def keeps_more(self) -> bool:
        """Whether there is something to remember besides the states of the rule."""
        return bool(self.master_weights or self.stochastic_rounding)

    @property
    def is_random(self) -> bool:
        return self.stochastic_rounding or self.state_dtype == "int8"


PARAM_SIDES: list[dict[str, Any]] = [
    {"dtype": BFLOAT16},
    {"dtype": BFLOAT16, "master_weights": "fp32"},
    {"dtype": BFLOAT16, "master_weights": "split16"},
    {"dtype": BFLOAT16, "master_weights": "split8"},
    {"dtype": BFLOAT16, "stochastic_rounding": True},
    {"dtype": FLOAT16},
    {"dtype": FLOAT16, "master_weights": "fp32"},
    {"dtype": FLOAT32},
]
COMBINATIONS = [
    Combination(**side, state_dtype=states)
    for side, states in itertools.product(PARAM_SIDES, [None, "fp32", "bf16", "int8"])
]
BY_NAME = {str(c): c for c in COMBINATIONS}


def in_order(t: Tensor, like: Tensor) -> Tensor:
    """The elements of `t`, shaped like the parameter `like`, in the order of its memory. May share that of `t`."""
    if t.is_contiguous() and like.is_contiguous():
        return t.view(-1)
    dense = torch.empty_like(like.detach(), dtype=t.dtype, device=t.device).copy_(t)
    return formats.in_memory_order(dense)


def in_blocks(flat: Tensor, block: int) -> Tensor:
    """Padded to whole blocks with zeros, which every rule leaves zero, so that tensors end to end keep their blocks."""
    missing = -flat.numel() % block
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bfloat16 <= value and the least >= value. float64; equal where bfloat16 holds the value."""
    spacing = reference.ulp(value, BFLOAT16)
    return (value / spacing).floor() * spacing, (value / spacing).ceil() * spacing


def compare_neighbour(actual: Tensor, exact: Bounded, what: str) -> Comparison:
    """With one of the two bfloat16 numbers around the value, which is known to within the bound."""
    comparison = compare(actual, exact, what)
    low, _ = neighbours(exact.value - 2 * exact.error)
    _, high = neighbours(exact.value + 2 * exact.error)
    comparison.bound = torch.where(comparison.got > comparison.exact, high - exact.value, exact.value - low)
    return comparison


def compare_param(
    main: Tensor, value: Tensor, exact: Bounded, extra: torch.dtype | None, stochastic: bool, where: str
) -> Comparison:
    """`main` is the model's tensor, `value` what is kept in all, `extra` the dtype of what is kept beside `main`.

    AssertionError where `main` is not `value` rounded.
    """
    what = f"param, {where}"
    if stochastic:
        return compare_neighbour(main, exact, what)
    if extra is None:
        return compare(main, exact, what)
    if extra == FLOAT32:
        copy = value.to(main.dtype)
        same = (bits(main) == bits(copy)) | (main.isnan() & copy.isnan())
        check(same.all(), f"the model's tensor is not the rounded master, {where}")
    else:
        off = (main.double() - value.double()).abs()
        nearest = (off <= reference.ulp(value, main.dtype) / 2) | (main.double() == value.double())
        nearest |= main.isnan() & value.isnan()
        check(nearest.all(), f"the model's tensor is not the rounded value, {where}")
    if extra == torch.int8:
        # 128 ulp of float32 are half of the last place kept.
        places = 256 * reference.ulp(exact.value.abs() + 2 * exact.error.nan_to_num(0.0), FLOAT32)
        comparison = compare(value, exact, what, rounding=places / 2)
        comparison.spacing = places
        return comparison
    return compare(value, exact, what)


# ---- int8 ----------------------------------------------------------------------------------------------------------

MANTISSA = {"first": 3, "second": 4}
OCTAVES = 15  # from the unit to the power of two at or below the largest of a block
UNIT_ZERO = 2.0 ** (OCTAVES - 126)  # blocks whose largest is smaller would have a subnormal unit
MAY_VANISH = 2.0**-125  # second moments below it may get code 0

# Roundings of float32 between a moment in the compute type and its decoded code: the square root, 2 + y, and half of
# the square's. Powers of two are multiplied and divided by exactly.
ENCODING = 3 * 2.0**-24


def code_step(y: Tensor, moment: str) -> Tensor:
    """Distance from the code at or below `y` >= 0, in units, to the next: codes are the upper bits of 2 + y."""
    _, exponent = torch.frexp(2 + y)
    return torch.ldexp(torch.ones_like(y), exponent - 1 - MANTISSA[moment])


def unit_of(largest: Tensor) -> Tensor:
    """The unit of blocks with these largest magnitudes; inf where nothing is known of them."""
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1 - OCTAVES)
    return torch.where(largest < UNIT_ZERO, 0.0, torch.where(largest.isinf(), largest, unit))


def assert_codes(values: Tensor, scales: Tensor, exact: Bounded, moment: str, what: str, steps: float = 1.0) -> None:
    """Decoded values lie within `steps` code steps of the reference's, block by block; scales are those of the largest.

    In the domain of the code, which is the square root for second moments. A second moment > 0 has no code 0, which is
    a difference of one step at most.
    """
    exact = exact if moment == "first" else Bounded(exact.value, exact.error, FLOAT32).sqrt()
    got = values.double() if moment == "first" else values.double().sqrt()
    target, error = exact.value.view(-1, BLOCK), 2 * exact.error.view(-1, BLOCK)
    got, unit = got.view(-1, BLOCK), scales.double().view(-1, 1)

    # A block with an infinity or NaN is NaN altogether, by its scale.
    spoiled = ~target.isfinite().all(1)
    check(unit[spoiled].isnan().all(), f"a block with inf or NaN is not NaN, {what}")
    got, unit, target, error = (t[~spoiled] for t in (got, unit, target, error))
    most, least = ((target.abs() + sign * error).amax(1, keepdim=True) for sign in (1, -1))
    check((torch.frexp(unit)[0] * (unit != 0) * 2 % 1 == 0).all(), f"a scale is no power of two, {what}")
    check((unit <= unit_of(most)).all(), f"a scale is too large, {what}")
    check((unit >= unit_of(least)).all(), f"a scale is too small, {what}")

    y = (target.abs() + error) / unit
    # `y` is the upper end, so the step may be that of the octave above, where rounding reaches into it.
    bound = error + unit * (steps * code_step(y, moment) + (2 + y) * ENCODING)
    if moment == "second":
        bound += 2.0**-75  # the root of half of the smallest float32: squares are rounded to its multiples
    bound = torch.where(unit == 0, target.abs() + error, bound)
    wrong = (~((got - target).abs() <= bound)).reshape(-1).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        raise AssertionError(
            f"{what}: {len(wrong)} codes are wrong, first at {at}: got {got.reshape(-1)[at].item()!r}, expected "
            f"{target.reshape(-1)[at].item()!r} to within {bound.reshape(-1)[at].item()!r}"
        )
