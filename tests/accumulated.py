"""Micro-batches, and the judge of the step that reads what was accumulated (`fusedopt.testing.accumulated`)."""

import bounds
import format_cases
import torch
from cases import hard_values, normal
from torch import Tensor

from fusedopt import GradAccumulator
from fusedopt.testing.accumulated import Expected
from fusedopt.testing.bounds import Bounded
from fusedopt.testing.judge import check_norm


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
        check_norm(opt, records, grad_scale=scale, **transform)
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
