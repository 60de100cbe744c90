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

import dataclasses
import math

import torch
from cases import assert_same_bits, bits, storage
from torch import Tensor

from fusedopt import reference, specs

# Scalars such as 1 - beta**t are computed in double before they are rounded to the compute type. For beta <= 0.999
# the subtraction amplifies the last-place error of pow by up to 1 / (1 - beta) = 1000.
SCALAR_ERROR = 1000 * 2.0**-53
# RAdam's rho_t is a difference of two numbers near 2 / (1 - beta2). A last place of beta2**t is amplified by
# 1 / (t (1 - beta2)) in 1 - beta2**t and once more by 2 / (1 - beta2) in rho_t, of which rho_t - 4 > 1 is left and the
# root of the product with (rho_t - 2) / rho_t taken: for t >= 6 at most 1 / (1 - beta2)^2 last places, beta2 <= 0.999.
RADAM_ERROR = 1000**2 * 2.0**-53


@dataclasses.dataclass(eq=False)
class Bounded:
    """`value` (float64) and a bound on the error with which `compute` arithmetic knows it."""

    value: Tensor
    error: Tensor
    compute: torch.dtype

    @classmethod
    def exact(cls, t: Tensor, compute: torch.dtype) -> "Bounded":
        value = t.detach().cpu().double()
        return cls(value, torch.zeros_like(value), compute)

    def _operand(self, other) -> "Bounded":
        """Numbers stand for themselves if float32 holds them, else for their rounding to the compute type."""
        if isinstance(other, Bounded):
            return other
        value = torch.tensor(float(other), dtype=torch.float64)
        unit = 0 if self.compute == torch.float64 else torch.finfo(self.compute).eps / 2
        held = value.float().double() == value
        return Bounded(value, value.abs() * (0 if held else unit + SCALAR_ERROR), self.compute)

    def _rounded(self, value: Tensor, error: Tensor, *factors: "Bounded") -> "Bounded":
        """Adds the error of rounding `value`; a product or quotient of `factors` not exactly zero may underflow."""
        finfo = torch.finfo(self.compute)
        error = error + finfo.eps / 2 * value.abs()
        if factors:
            underflows = math.prod((f.value.abs() + f.error > 0).double() for f in factors)
            error = error + underflows * (finfo.smallest_normal * finfo.eps)
        # Infinities come from infinite input only, so they are known.
        return Bounded(value, torch.where(value.isinf(), 0.0, error), self.compute)

    def __neg__(self):
        return Bounded(-self.value, self.error, self.compute)

    def __add__(self, other):
        other = self._operand(other)
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return self + -self._operand(other)

    def __mul__(self, other):
        other = self._operand(other)
        a, b = self.value.abs(), other.value.abs()
        error = a * other.error + b * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error, self, other)

    def __truediv__(self, other):
        """|(a + da) / (b + db) - a / b| <= (|da| + |a / b| |db|) / (|b| - |db|)."""
        other = self._operand(other)
        value = self.value / other.value
        nearest_to_zero = other.value.abs() - other.error
        error = (self.error + value.abs() * other.error) / nearest_to_zero
        return self._rounded(value, torch.where(nearest_to_zero > 0, error, torch.inf), self)

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self):
        low, high = (self.value - self.error).clamp(min=0).sqrt(), (self.value + self.error).sqrt()
        return self._rounded(self.value.sqrt(), high - low)

    def norm(self):
        """Of a tensor. It moves by no more than the norm of the errors.

        An engine sums squares in double, in whatever order: each term meets one rounding of the square and at most
        n - 1 of additions, so the sum is off by n * 2^-53 of it to first order, and the norm by half of that and the
        root's own rounding. `value`, in float64 too, is off by as much.
        """
        value = torch.linalg.vector_norm(self.value)
        return Bounded(
            value, torch.linalg.vector_norm(self.error) + (self.value.numel() + 2) * 2.0**-53 * value, self.compute
        )

    def __eq__(self, number):
        """Whether the value is this number; where it is 0 by cancellation, the error says so."""
        return self.value == number

    def sign(self):
        """Known where the error cannot reach or leave zero, else anything from -1 to 1."""
        known = (self.value.abs() > self.error) | (self.error == 0)
        return Bounded(self.value.sign(), torch.where(known, 0.0, 2.0).double(), self.compute)

    def clamp(self, low: float = -math.inf, high: float = math.inf, *, min: float | None = None):
        if min is not None:
            return Bounded(self.value.clamp(min=min), self.error, self.compute)
        limits = self._operand(max(abs(low), abs(high)))
        beyond = self.value.abs() - self.error > limits.value
        error = torch.where(beyond, limits.error, self.error + limits.error)
        return Bounded(self.value.clamp(low, high), error, self.compute)

    def maximum(self, other):
        """A maximum moves by no more than either of its arguments."""
        error = torch.maximum(self.error, other.error)
        return Bounded(torch.maximum(self.value, other.value), error, self.compute)


def bounded_step(rule, param, grad, states, *, step, maximize=False, hyper, **transform) -> dict[str, Bounded]:
    """As `reference.reference_step`, with bounds; the new parameter is called "param". `grad` may have a bound too."""
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    grad = grad if isinstance(grad, Bounded) else Bounded.exact(grad, compute)
    grad = reference.transform_gradient(grad, **transform)
    states = {name: Bounded.exact(states[name], compute) for name in reference.STATES[rule]}
    before = Bounded.exact(param, compute)
    param, states = reference.RULES[rule](before, -grad if maximize else grad, **states, step=step, **hyper)
    if rule == "radam":
        moved = (param.value - before.value).abs() + (hyper["lr"] * hyper["weight_decay"] * before.value).abs()
        param.error = param.error + torch.where(moved.isfinite(), RADAM_ERROR * moved, 0.0)
    return {"param": param, **states}


def assert_within(actual: Tensor, expected: Bounded, what: str = "value") -> None:
    """Every element of `actual` lies in the bound of `expected` plus half an ulp of the dtype of `actual`."""
    finfo = torch.finfo(actual.dtype)
    # Overflow to infinity is right from half an ulp above the largest number, so both sides are cut at one ulp above.
    top = finfo.max + reference.ulp(torch.tensor(finfo.max), actual.dtype).item()
    got, exact = actual.detach().cpu().double().clamp(-top, top), expected.value.clamp(-top, top)
    spacing = reference.ulp(exact.abs() + 2 * expected.error.nan_to_num(0.0), actual.dtype)
    bound = 2 * expected.error + spacing / 2
    close = ((got - exact).abs() <= bound) | (got == exact) | (got.isnan() & exact.isnan())
    wrong = (~close).reshape(-1).nonzero().flatten()
    if wrong.numel():
        i = wrong[0]
        got, exact, bound, spacing = (t.expand_as(got).reshape(-1)[i].item() for t in (got, exact, bound, spacing))
        raise AssertionError(
            f"{what}: {wrong.numel()} of {actual.numel()} elements are wrong, first at {i}: got {got!r}, "
            f"expected {exact!r} "
            f"to within {bound / spacing:.3g} ulp of {actual.dtype}, off by {abs(got - exact) / spacing:.3g} ulp"
        )


# ---- whole optimizers ---------------------------------------------------------------------------------------------


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


def hyper_of(group: dict, rule: str) -> dict:
    """The arguments of the reference rule."""
    return {key: group[key] for _, key, _ in specs.RULES[rule].hyper} | {"lr": float(group["lr"])}


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
        _assert_gaps_untouched(r)


def _flat(tensors) -> Tensor:
    return torch.cat([t.detach().cpu().reshape(-1) for t in tensors])


def concatenated(grads: list) -> Tensor | Bounded:
    """Gradients of one dtype in one tensor, with their bounds if they have any."""
    if not isinstance(grads[0], Bounded):
        return _flat(grads)
    return Bounded(_flat(g.value for g in grads), _flat(g.error for g in grads), grads[0].compute)


def _assert_values(opt, rule: str, records: list[Before], transform: dict) -> None:
    """Records of one dtype, step and set of hyper-parameters, end to end in one tensor.

    Rules are elementwise, but for those of two phases, whose tensors come one by one.
    """
    names, first = reference.STATES[rule], records[0]
    states = {name: _flat(r.states[name] for r in records) for name in names}
    param, grad = _flat(r.param for r in records), concatenated([r.grad for r in records])
    expected = bounded_step(
        rule, param, grad, states, step=first.step + 1, maximize=first.maximize, hyper=first.hyper, **transform
    )
    where = f"{rule}, {first.param.dtype}, numels {[r.param.numel() for r in records]} end to end"
    assert_within(_flat(r.tensor for r in records), expected["param"], f"param, {where}")
    for name in names:
        assert_within(_flat(opt.state[r.tensor][name] for r in records), expected[name], f"{name}, {where}")


def _assert_gaps_untouched(r: Before) -> None:
    """Elements of the storage that the parameter does not reach keep their bits."""
    gaps = torch.ones(r.storage.numel(), dtype=torch.bool)
    gaps.as_strided(r.tensor.shape, r.tensor.stride(), r.tensor.storage_offset()).fill_(False)
    assert torch.equal(bits(storage(r.tensor))[gaps], bits(r.storage)[gaps]), (
        "wrote between the elements of a parameter"
    )
