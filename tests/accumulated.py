"""What a GradAccumulator must hold, in float64 with a bound, and the judge of the step that reads it.

The sum over micro-batches is evaluated on `bounds.Bounded` numbers: each product and each addition may err by a
rounding of the compute type, each store into a bfloat16 main gradient by half an ulp of it. The first micro-batch is
written, not added, and the last one is added by the step, in the compute type.
"""

import bounds
import format_cases
import torch
from bounds import Bounded
from cases import hard_values, normal
from torch import Tensor

from fusedopt import GradAccumulator, reference


def give(params, seed: int, values=normal, lay=None) -> None:
    """Every parameter a gradient of one micro-batch; None where `seed` is None."""
    for i, p in enumerate(params):
        grad = values(p.shape, p.dtype, p.device, seed=10_000 + 100 * seed + i)
        if values is hard_values and p.dtype == torch.float16:
            grad = grad.clamp(-200, 200)  # what float16 states can square
        p.grad = lay(grad) if lay else grad


def backward(params, seed: int, values=normal) -> None:
    """The same gradients by a backward pass, exactly."""
    grads = [values(p.shape, p.dtype, p.device, seed=10_000 + 100 * seed + i) for i, p in enumerate(params)]
    sum((p * grad).sum() for p, grad in zip(params, grads, strict=True) if p.requires_grad).backward()


def compute_type(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


class Expected:
    """The sum that an accumulator keeps, beside it: call `fold` with it, `total` before a step.

    dtype: of main gradients.
    """

    def __init__(self, params, dtype=torch.float32, reduction="mean") -> None:
        self.params, self.dtype, self.reduction = params, dtype, reduction
        self.reset()

    def reset(self) -> None:
        self.sums: dict[Tensor, Bounded] = {}
        self.weights = 0.0

    def _with(self, p, weight) -> Bounded | None:
        if p.grad is None:
            return self.sums.get(p)
        grad = Bounded.exact(p.grad, compute_type(p))
        grad = grad if weight == 1.0 else grad * float(weight)
        return self.sums[p] + grad if p in self.sums else grad

    def fold(self, weight=1.0) -> None:
        for p in self.params:
            added = self._with(p, weight)
            if added is not None:
                self.sums[p] = added if p.grad is None else self._stored(added)
        self.weights += float(weight)

    def _stored(self, added: Bounded) -> Bounded:
        if added.compute == torch.float64 or self.dtype == torch.float32:
            return added
        spacing = reference.ulp(added.value.abs() + added.error, self.dtype)
        return Bounded(added.value, added.error + spacing / 2, added.compute)

    def total(self, weight=1.0) -> dict[Tensor, Bounded]:
        """By parameter, with what is in `.grad`, before it is divided."""
        return {p: total for p in self.params if (total := self._with(p, weight)) is not None}

    def divisor(self, weight=1.0) -> float:
        own = any(p.grad is not None for p in self.params)
        return self.weights + (float(weight) if own else 0.0) if self.reduction == "mean" else 1.0


def before_step(opt, rule: str, totals: dict[Tensor, Bounded], judge=bounds) -> list:
    """Records of all parameters with a sum. judge: `bounds`, or `format_cases` for optimizers with formats."""
    found = {p: p.grad for p in totals}
    for p, grad in found.items():  # both judges look for `.grad`
        p.grad = torch.zeros_like(p.detach()) if grad is None else grad
    records = [record for record in judge.before_step(opt, rule) if record.tensor in totals]
    for record in records:
        total = totals[record.tensor]
        record.tensor.grad = found[record.tensor]
        if judge is format_cases:
            value, error = (format_cases.in_order(t, record.tensor) for t in (total.value, total.error))
            total, record.grad_bits = Bounded(value, error, total.compute), None
        record.grad = total
    return records


def step(opt, acc: GradAccumulator, expected: Expected, rule: str, judge=bounds, weight=1.0, **transform) -> None:
    """`opt.step()` on what was accumulated and on `.grad`, judged element by element; `.grad` keeps its bits."""
    scale = transform.pop("grad_scale", 1.0) * expected.divisor(weight)
    records = before_step(opt, rule, expected.total(weight), judge)
    grads = {p: None if p.grad is None else p.grad.clone() for p in expected.params}
    opt.step()
    if opt.max_grad_norm is not None:
        assert_norm(opt, records, scale, transform)
    double = [r for r in records if r.tensor.dtype == torch.float64]
    single = [r for r in records if r.tensor.dtype != torch.float64]
    for some, coef in ((double, opt._control().clip_coef64), (single, opt.clip_coef)):
        if some:
            clip = {"clip_coef": coef.item()} if opt.max_grad_norm is not None else {}
            judge.assert_stepped(opt, rule, some, grad_scale=scale, **clip, **transform)
    for p, grad in grads.items():
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad) or grad.isnan().any()
    assert acc.micro_batches == 0 and not acc.holds
    expected.reset()


# Sums in float64, one rounding to float32, and one of each factor that unscales: see test_clip.py.
NORM_RTOL = 2 * 2.0**-23


def assert_norm(opt, records, scale: float, transform: dict) -> None:
    """grad_norm is that of the sums. By the triangle inequality it may err by the norm of their errors."""
    exact = [reference.transform_gradient(r.grad.value, grad_scale=scale, **transform) for r in records]
    norm, slack = reference.total_norm(exact), reference.total_norm([2 * r.grad.error / scale for r in records])
    assert abs(opt.grad_norm.item() - norm.item()) <= NORM_RTOL * norm.item() + slack.item()
    coef = reference.clip_coefficient(norm, opt.max_grad_norm).item()
    rtol = NORM_RTOL + slack.item() / norm.item() + 3 * 2.0**-24
    assert abs(opt.clip_coef.item() - coef) <= rtol * coef
