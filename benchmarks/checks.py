"""Nothing is timed that does not compute the right thing: every tail against a float64 reference, elementwise."""

from __future__ import annotations

import torch

from benchmarks.contracts import GRAD_SCALE, HYPER, MAX_NORM, STATES, Case, Tail
from benchmarks.workloads import Model
from fusedopt.reference import reference_step

STEPS = 2  # the second one starts from states that are not zero

# Relative error of a state or an update that rounding explains. fp32: torch sums norms in float32, and the second
# moment doubles the norm's error; with 10^8 elements on a CPU that came to 2^-12. bf16: the norm, the clipped gradient
# and each of two state updates rounded to 8 bits (2^-9 each), doubled in the second moment.
TOLERANCE = {"fp32": 2.0**-11, "bf16": 2.0**-5}


def check(case: Case, tail: Tail, model: Model) -> float:
    """Runs the first steps of a tail and returns its largest error, as a fraction of what rounding allows.

    Raises:
        AssertionError: an element is wrong, or not finite.
    """
    model.reset()
    sample = sampled_tensors(len(model.params))
    starts = [model.params[i].detach().double() for i in sample]
    gradients = clipped_gradients(case, model, sample)
    for _ in range(STEPS):
        model.backward()
        tail()
    return max(
        _largest_error(case, tail, model.params[i], _expected(case, start, gradient), where=f"params[{i}]")
        for i, start, gradient in zip(sample, starts, gradients)
    )


def sampled_tensors(count: int) -> list[int]:
    """Both ends and the middle of a list: matrices and vectors, first and last chunks."""
    return sorted({0, 1, count // 2, count // 2 + 1, count - 2, count - 1} & set(range(count)))


def clipped_gradients(case: Case, model: Model, sample: list[int]) -> list[torch.Tensor]:
    """float64 gradients of the sampled tensors as they enter the update."""
    scale = GRAD_SCALE if case.scales else 1.0
    coefficient = 1.0
    if case.clips:
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in model.gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item() / scale
        coefficient = min(1.0, MAX_NORM / (norm + 1e-6))
    return [model.gradients[i].double() * (coefficient / scale) for i in sample]


def _expected(case: Case, start: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter and its states after ``STEPS`` steps, float64."""
    param, states = start, {name: torch.zeros_like(start) for name in STATES[case.optimizer]}
    for step in range(1, STEPS + 1):
        param, states = reference_step(case.optimizer, param, gradient, states, step=step, **HYPER[case.optimizer])
    return {"param": param, **states}


def _largest_error(
    case: Case, tail: Tail, param: torch.nn.Parameter, expected: dict[str, torch.Tensor], where: str
) -> float:
    """Largest error over the bound, of a parameter and its states."""
    state = tail.optimizer.state[param]
    steps = float(state["step"])
    assert steps == STEPS, f"{case}: {where}: step counter is {steps}, expected {STEPS}"
    relative = TOLERANCE[case.format]
    errors = {}
    for name, target in expected.items():
        got = param.detach() if name == "param" else state[name]
        assert got.dtype == param.dtype, f"{case}: {where}: {name} is {got.dtype}, expected {param.dtype}"
        if name == "param":  # the update, and the parameter rounded once a step
            bound = STEPS * (relative * HYPER[case.optimizer]["lr"] + torch.finfo(got.dtype).eps * target.abs())
        else:
            bound = relative * target.abs() + torch.finfo(torch.float32).tiny
        errors[name] = ((got.double() - target).abs() / bound).nan_to_num(nan=float("inf")).max().item()
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1, f"{case}: {where}: {worst} is off by {errors[worst]:.3g} times what rounding explains"
    return errors[worst]
