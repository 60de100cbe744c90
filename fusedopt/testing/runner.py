"""Runs cases, and what is known of each afterwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .bounds import Comparison
from .cases import Case
from .trials import ForeignTrial, FusedTrial, LeftOut, threads

__all__ = ["BINS", "Result", "run_case", "run_cases"]

BINS = [2.0**k for k in range(-12, 11)]
"""Edges of the histogram of errors, in ulp. Below the first: smaller ones; beyond the last: larger, inf, NaN."""

_EDGES = torch.tensor(BINS, dtype=torch.float64)

WELL_CONDITIONED = 16.0
"""In ulp, of float64 1000 times as many: where the bound is wider, cancellation amplifies errors, ulp say little."""


@dataclasses.dataclass
class Result:
    """What one case showed. Errors are of parameters, in ulp of the dtype in which they are kept, at the larger of what
    they were and what they should be; the element is the one nearest to its bound, or farthest beyond it."""

    case: Case
    elements: int = 0
    worst_ulp: float = 0.0
    bound_ulp: float = 0.0
    worst: str = ""
    """Where that element is."""
    largest_ulp: float = 0.0
    """The largest error of the elements whose bound is below ``WELL_CONDITIONED``, and of those that failed."""
    failed_elements: int = 0
    error: str = ""
    """Of the first thing that was wrong, or what was raised."""
    left_out: str = ""
    """Why the case means nothing for this optimizer."""
    histogram: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(BINS) + 1))
    ratio: float = -1.0
    """Error / bound of the worst element."""

    @property
    def passed(self) -> bool:
        return not self.error and not self.left_out


def run_case(case: Case, factory: Callable[..., Any] | None = None) -> Result:
    """One case: of fusedopt, or of the optimizer that ``factory(params, **kwargs)`` makes. Never raises: errors of the
    optimizer become those of the result."""
    num_threads = torch.get_num_threads()
    with threads(1):
        return _run_case(case, factory, num_threads)


def _run_case(case: Case, factory: Callable[..., Any] | None, num_threads: int) -> Result:
    result = Result(case)
    try:
        trial = FusedTrial(case, num_threads) if factory is None else ForeignTrial(case, factory, num_threads)
        for number in range(case.data.steps):
            for comparison in trial.step(number):
                _record(result, comparison, number)
    except LeftOut as reason:
        result.left_out = str(reason)
    except AssertionError as error:
        result.error = result.error or str(error)
    except Exception as error:  # whatever an optimizer raises is a finding
        result.error = result.error or f"{type(error).__name__}: {error}"
    return result


def run_cases(cases: Iterable[Case], factory: Callable[..., Any] | None = None) -> Iterator[Result]:
    """As ``run_case``, one after the other."""
    for case in cases:
        yield run_case(case, factory)


@torch.inference_mode()
def _record(result: Result, comparison: Comparison, step: int) -> None:
    if not any(n for _, n, _ in comparison.parts):
        return
    off, wrong, bound, unit = comparison.off, comparison.wrong, comparison.bound, _unit(comparison)
    real = None
    if any(n != padded for _, n, padded in comparison.parts):
        real = torch.cat([torch.arange(padded) < n for _, n, padded in comparison.parts])
        off, wrong, bound, unit = (t[real] for t in (off, wrong, bound, unit))
    ulps = (off / unit).nan_to_num(math.inf, math.inf)
    ratio = torch.where(wrong, (off / bound).nan_to_num(math.inf, math.inf).clamp(min=1), (off / bound).nan_to_num(0.0))
    i = int(ratio.argmax())
    if ratio[i] > result.ratio:
        result.ratio, result.worst_ulp, result.bound_ulp = ratio[i].item(), ulps[i].item(), (bound / unit)[i].item()
        result.worst = _place(comparison, i if real is None else int(real.nonzero()[i]), step)
    result.elements += off.numel()
    result.failed_elements += int(wrong.sum())
    # Bounds in float64 allow powers of beta 1000 roundings: see `bounds.SCALAR_ERROR`.
    limit = WELL_CONDITIONED * (1000 if comparison.dtype == torch.float64 else 1)
    telling = torch.where(wrong | (bound / unit < limit), ulps, 0.0)
    result.largest_ulp = max(result.largest_ulp, telling.amax().item())
    for at, count in enumerate(_histogram(ulps)):
        result.histogram[at] += count
    if wrong.any() and not result.error:
        where = comparison.wrong if real is None else real & comparison.wrong
        at = int(where.nonzero()[0])
        result.error = f"{_place(comparison, at, step)}: {comparison.describe(at, int(wrong.sum()))}"


def _unit(comparison: Comparison) -> Tensor:
    """An ulp at the larger of the exact value and the one before: of the step's result, or of what it moved."""
    places = comparison.spacing / reference.ulp(comparison.exact, comparison.dtype)  # 256 for split8
    assert comparison.before is not None
    before = comparison.before.double().abs().nan_to_num(0.0, 0.0)
    largest = torch.maximum(comparison.exact.abs().nan_to_num(0.0, 0.0), before)
    return reference.ulp(largest, comparison.dtype) * places.clamp(min=1).nan_to_num(1.0)


def _place(comparison: Comparison, at: int, step: int) -> str:
    for index, _, padded in comparison.parts:
        if at < padded:
            return f"step {step + 1}, parameter {index}, element {at}"
        at -= padded
    raise IndexError(at)


def _histogram(ulps: Tensor) -> list[int]:
    bins = torch.bucketize(ulps, _EDGES, right=True)
    return torch.bincount(bins, minlength=len(BINS) + 1).tolist()
