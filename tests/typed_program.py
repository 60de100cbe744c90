"""What users write, for mypy; never run. Lines with `type: ignore` must be errors: mypy reports those that are not."""

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import assert_type

import fusedopt
from fusedopt import functional
from fusedopt.backends import Availability
from fusedopt.optim import StepMetrics


def groups(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    yield {"params": list(model.parameters()), "weight_decay": 0.0, "state_dtype": "int8"}


def train(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    optimizer = fusedopt.AdamW(
        groups(model), lr=3e-4, betas=(0.9, 0.95), max_grad_norm=1.0, nonfinite="skip", state_dtype=torch.bfloat16
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = fusedopt.GradScaler("cuda", init_scale=2.0**10, enabled=True)
    accumulator = fusedopt.GradAccumulator(optimizer, torch.float32, reduction="sum")
    for batch in batches:
        scaler.scale(model(batch).sum()).backward()
        accumulator.accumulate(weight=2.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scheduler.step()
    with fusedopt.use_backend("reference"):
        optimizer.step()
    with optimizer.release_gradients(model).paused():
        pass
    assert_type(optimizer.grad_norm, torch.Tensor)
    assert_type(optimizer.step_was_skipped, torch.Tensor)
    assert_type(optimizer.metrics(), StepMetrics | None)
    assert_type(optimizer.max_grad_norm, float | None)
    assert_type(optimizer.master_params(), list[torch.Tensor])
    assert_type(optimizer.state_dict(), dict[str, Any])
    assert_type(accumulator.grads(), list[torch.Tensor | None])
    metrics = optimizer.last_step
    return 0.0 if metrics is None else metrics.grad_norm


def others(params: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    made: list[torch.optim.Optimizer] = [
        fusedopt.SGD(params, momentum=0.9, max_grad_value=1.0),
        fusedopt.Lion(params, master_weights="split16"),
        fusedopt.Adam(iter(params), lr=torch.tensor(1e-3), amsgrad=True),
        fusedopt.LAMB([{"params": params}], backend="triton"),
        fusedopt.RMSprop(params, stochastic_rounding=True, seed=0),
    ]
    fusedopt.AdamW(params, max_grad_norm="1")  # type: ignore[arg-type]
    fusedopt.AdamW(params, max_norm=1.0)  # type: ignore[call-arg]
    fusedopt.SGD(params).steps()  # type: ignore[attr-defined]
    return made


def by_hand(tensors: list[torch.Tensor]) -> torch.Tensor:
    steps = [torch.zeros(()) for _ in tensors]
    functional.lion_(tensors, tensors, tensors, steps, lr=1e-4, clip_coef=torch.tensor(1.0))
    functional.lion_(tensors, tensors, tensors, steps)  # type: ignore[call-arg]
    assert_type(fusedopt.backends(), dict[str, Availability])
    assert_type(fusedopt.get_total_norm(tensors), torch.Tensor)
    fusedopt.clip_grad_value_(tensors, 1.0)
    return fusedopt.clip_grad_norm_(tensors, max_norm=1.0)
