"""Comparing a step with the float64 reference, element by element, within a bound derived from rounding errors.

How the bound is derived: the reference rules are evaluated on `Bounded` numbers, pairs of a float64 value and a bound
on the error that the same chain of operations makes in the compute type (float32, or float64 for float64 parameters).
Every operation adds what IEEE arithmetic allows it to: u |result| with u = 2^-24 or 2^-53, and the least subnormal
where a product or a quotient may underflow; the errors of the operands travel along by the rule for that operation
(Wilkinson's running error analysis). Two terms come on top:

- the sum is doubled, because an engine may order the operations otherwise (m + (1 - beta1)(g - m) for the moment,
  p - lr wd p for the decay, one factor for unscaling and clipping). Each of those forms rounds at most as many
  intermediates of the same magnitudes again;
- half an ulp of the storage type, for the one rounding at the store.

A parameter is accepted when |stored - exact| is below that. Since `before` is exact in both, this bounds the error of
the step delta by the same absolute amount.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from .. import reference, specs

# Scalars such as 1 - beta**t are computed in double before they are rounded to the compute type. For beta <= 0.999
# the subtraction amplifies the last-place error of pow by up to 1 / (1 - beta) = 1000.
SCALAR_ERROR = 1000 * 2.0**-53
# RAdam's rho_t is a difference of two numbers near 2 / (1 - beta2). A last place of beta2**t is amplified by
# 1 / (t (1 - beta2)) in 1 - beta2**t and once more by 2 / (1 - beta2) in rho_t, of which rho_t - 4 > 1 is left and the
# root of the product with (rho_t - 2) / rho_t taken: for t >= 6 at most 1 / (1 - beta2)^2 last places, beta2 <= 0.999.
RADAM_ERROR = 1000**2 * 2.0**-53


Operand = Union["Bounded", Tensor, float]


@dataclasses.dataclass(eq=False)
class Bounded:
    """`value` (float64) and a bound on the error with which `compute` arithmetic knows it."""

    value: Tensor
    error: Tensor
    compute: torch.dtype

    @classmethod
    def exact(cls, t: Tensor, compute: torch.dtype) -> Bounded:
        value = t.detach().cpu().double()
        return cls(value, torch.zeros_like(value), compute)

    def _operand(self, other: Operand) -> Bounded:
        """Numbers stand for themselves if float32 holds them, else for their rounding to the compute type."""
        return other if isinstance(other, Bounded) else _scalar(float(other), self.compute)

    @functools.cached_property
    def magnitude(self) -> Tensor:
        return self.value.abs()

    @functools.cached_property
    def may_be_nonzero(self) -> Tensor:
        return (self.magnitude + self.error).bool()  # NaN says nothing here, its error is NaN

    def _rounded(self, value: Tensor, error: Tensor, *factors: Bounded) -> Bounded:
        """Adds the error of rounding `value` to `error`, in place; a product or quotient of `factors` not exactly zero
        may underflow."""
        unit, least = _roundoff(self.compute)
        rounded = Bounded(value, error, self.compute)
        rounded.magnitude = value.abs()
        error.add_(rounded.magnitude, alpha=unit)
        # Numbers other than zero leave it to the other factor; a mask of one element is slow beside a large one.
        masks = [f.may_be_nonzero for f in factors if f.value.dim() or not f.may_be_nonzero]
        if masks:
            error.add_(functools.reduce(torch.logical_and, masks), alpha=least)
        elif factors:
            error.add_(least)
        # Infinities come from infinite input only, so they are known. Most often there are none, a maximum says fast.
        if value.numel() and not rounded.magnitude.amax().item() < math.inf:
            error.masked_fill_(rounded.magnitude == math.inf, 0.0)
        return rounded

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.error, self.compute)

    def __add__(self, other: Operand) -> Bounded:
        other = self._operand(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Operand) -> Bounded:
        other = self._operand(other)
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Operand) -> Bounded:
        other = self._operand(other)
        a, b = self.magnitude, other.magnitude
        error = (a * other.error).add_(b * self.error).add_(self.error * other.error)
        return self._rounded(self.value * other.value, error, self, other)

    def __truediv__(self, other: Operand) -> Bounded:
        """|(a + da) / (b + db) - a / b| <= (|da| + |a / b| |db|) / (|b| - |db|)."""
        other = self._operand(other)
        value = self.value / other.value
        nearest_to_zero = other.magnitude - other.error
        error = (value.abs() * other.error).add_(self.error).div_(nearest_to_zero)
        if value.numel() and not nearest_to_zero.amin().item() > 0:
            error.masked_fill_(~(nearest_to_zero > 0), torch.inf)
        return self._rounded(value, error, self)

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self) -> Bounded:
        low, high = (self.value - self.error).clamp(min=0).sqrt(), (self.value + self.error).sqrt()
        return self._rounded(self.value.sqrt(), high - low)

    def norm(self) -> Bounded:
        """Of a tensor. It moves by no more than the norm of the errors.

        An engine sums squares in double, in whatever order: each term meets one rounding of the square and at most
        n - 1 of additions, so the sum is off by n * 2^-53 of it to first order, and the norm by half of that and the
        root's own rounding. `value`, in float64 too, is off by as much.
        """
        value = torch.linalg.vector_norm(self.value)
        return Bounded(
            value, torch.linalg.vector_norm(self.error) + (self.value.numel() + 2) * 2.0**-53 * value, self.compute
        )

    def __eq__(self, number: float) -> Tensor:  # type: ignore[override]  # of each element
        """Whether the value is this number; where it is 0 by cancellation, the error says so."""
        return self.value == number

    def sign(self) -> Bounded:
        """Known where the error cannot reach or leave zero, else anything from -1 to 1."""
        known = (self.magnitude > self.error) | (self.error == 0)
        return Bounded(self.value.sign(), torch.where(known, 0.0, 2.0).double(), self.compute)

    def clamp(self, low: float = -math.inf, high: float = math.inf, *, min: float | None = None) -> Bounded:
        if min is not None:
            return Bounded(self.value.clamp(min=min), self.error, self.compute)
        limits = self._operand(max(abs(low), abs(high)))
        beyond = self.magnitude - self.error > limits.value
        error = torch.where(beyond, limits.error, self.error + limits.error)
        return Bounded(self.value.clamp(low, high), error, self.compute)

    def maximum(self, other: Bounded) -> Bounded:
        """A maximum moves by no more than either of its arguments."""
        error = torch.maximum(self.error, other.error)
        return Bounded(torch.maximum(self.value, other.value), error, self.compute)


@functools.cache  # of two dtypes, and asked for at every operation
def _roundoff(compute: torch.dtype) -> tuple[float, float]:
    """The unit roundoff and the least subnormal number."""
    finfo = torch.finfo(compute)
    return finfo.eps / 2, finfo.smallest_normal * finfo.eps


@functools.lru_cache(maxsize=4096)
def _scalar(number: float, compute: torch.dtype) -> Bounded:
    """A hyper-parameter or what the host makes of some: exact if float32 holds it."""
    value = torch.tensor(number, dtype=torch.float64)
    unit = 0 if compute == torch.float64 else torch.finfo(compute).eps / 2
    held = value.float().double() == value
    return Bounded(value, value.abs() * (0 if held else unit + SCALAR_ERROR), compute)


def _bounded(t: Tensor | Bounded, compute: torch.dtype) -> Bounded:
    return t if isinstance(t, Bounded) else Bounded.exact(t, compute)


def bounded_step(
    rule: str,
    param: Any,
    grad: Any,
    states: Mapping[str, Any],
    *,
    step: int,
    maximize: bool = False,
    hyper: Mapping[str, Any],
    **transform: Any,
) -> dict[str, Bounded]:
    """As `reference.reference_step`, with bounds; the new parameter is called "param". `param`, `grad` and
    `states` may have bounds too."""
    if isinstance(param, Bounded):
        compute = param.compute
    else:
        compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    grad = reference.transform_gradient(_bounded(grad, compute), **transform)
    states = {name: _bounded(states[name], compute) for name in reference.STATES[rule]}
    before = _bounded(param, compute)
    param, states = reference.RULES[rule](before, -grad if maximize else grad, **states, step=step, **hyper)
    if rule == "radam":
        moved = (param.value - before.value).abs() + (hyper["lr"] * hyper["weight_decay"] * before.value).abs()
        error = param.error + torch.where(moved.isfinite(), RADAM_ERROR * moved, 0.0)
        param = Bounded(param.value, error, compute)
    return {"param": param, **states}


@dataclasses.dataclass(eq=False)
class Comparison:
    """Numbers beside the exact ones: how far off they are and how far they may be. 1-D float64 tensors."""

    what: str
    dtype: torch.dtype
    """Of the numbers."""
    got: Tensor
    exact: Tensor
    bound: Tensor
    spacing: Tensor
    """An ulp of each, the unit of what is reported."""
    parts: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Of tensors end to end: (index of the parameter, its elements, with those of padding)."""
    before: Tensor | None = None
    """What the elements were before the step, where that is known."""

    @functools.cached_property
    def off(self) -> Tensor:
        """|got - exact|; 0 where both are the same infinity or both NaN."""
        same = (self.got == self.exact) | (self.got.isnan() & self.exact.isnan())
        return torch.where(same, 0.0, (self.got - self.exact).abs())

    @functools.cached_property
    def wrong(self) -> Tensor:
        """Mask of the elements beyond their bound."""
        off = self.off
        return ~((off == 0) | (off <= self.bound))

    def check(self) -> None:
        """AssertionError with the first wrong element, if there is one."""
        wrong = self.wrong.nonzero().flatten()
        if wrong.numel():
            raise AssertionError(self.describe(int(wrong[0]), wrong.numel()))

    def describe(self, i: int, count: int) -> str:
        got, exact, bound, spacing = (t[i].item() for t in (self.got, self.exact, self.bound, self.spacing))
        return (
            f"{self.what}: {count} of {self.got.numel()} elements are wrong, first at {i}: got {got!r}, "
            f"expected {exact!r} to within {bound / spacing:.3g} ulp of {self.dtype}, "
            f"off by {abs(got - exact) / spacing:.3g} ulp"
        )


def compare(actual: Tensor, expected: Bounded, what: str = "value", rounding: Tensor | None = None) -> Comparison:
    """`actual` beside `expected`, each element within its bound plus `rounding`: half an ulp where none is given."""
    top = _beyond_largest(actual.dtype)
    got = actual.detach().cpu().double().reshape(-1).clamp(-top, top)
    exact = expected.value.reshape(-1).clamp(-top, top)
    error = expected.error.expand(expected.value.shape).reshape(-1)
    spacing = reference.ulp(exact.abs() + 2 * error.nan_to_num(0.0), actual.dtype)
    bound = 2 * error + (spacing / 2 if rounding is None else rounding.reshape(-1))
    got, exact, bound, spacing = torch.broadcast_tensors(got, exact, bound, spacing)
    return Comparison(what, actual.dtype, got, exact, bound, spacing)


@functools.cache  # of few dtypes
def _beyond_largest(dtype: torch.dtype) -> float:
    """Overflow to infinity is right from half an ulp above the largest number, so all is cut at one ulp above."""
    largest = torch.finfo(dtype).max
    return largest + reference.ulp(torch.tensor(largest), dtype).item()


def assert_within(actual: Tensor, expected: Bounded, what: str = "value") -> None:
    """Every element of `actual` lies in the bound of `expected` plus half an ulp of the dtype of `actual`."""
    compare(actual, expected, what).check()


def hyper_of(group: Mapping[str, Any], rule: str) -> dict[str, Any]:
    """The arguments of the reference rule."""
    return {key: group[key] for _, key, _ in specs.RULES[rule].hyper} | {"lr": float(group["lr"])}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().reshape(-1) for t in tensors])


def concatenated(grads: Sequence[Any]) -> Tensor | Bounded:
    """Gradients of one dtype in one tensor, with their bounds if they have any."""
    if not isinstance(grads[0], Bounded):
        return flat(grads)
    return Bounded(flat(g.value for g in grads), flat(g.error for g in grads), grads[0].compute)
