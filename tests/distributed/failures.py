"""Processes that fail together, each scenario with a process group of its own: see test_failures.py."""

import json
import os
import signal
import threading
import time

import torch
from processes import Context, free_port, join
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt

WORLD, TIMEOUT = 2, 2
"""TIMEOUT: seconds that a collective may take."""


def stepper(ctx: Context, count: int = 2, opt_class=fusedopt.AdamW, **options) -> tuple[list, torch.optim.Optimizer]:
    mesh = ctx.mesh()
    parts = [DTensor.from_local(torch.ones(2, 3 + i), mesh, [Shard(0)], run_check=False) for i in range(count)]
    params = [torch.nn.Parameter(part) for part in parts]  # so far without a collective
    for param in params:
        param.grad = DTensor(torch.ones_like(param.to_local()), param._spec, requires_grad=False)
    return params, opt_class(params, **{"lr": 0.1, "max_grad_norm": 1.0, **options})


def step_that_fails(params, opt) -> dict:
    """The error of a step, how long it took, and whether something was written."""
    before = [p.to_local().detach().clone() for p in params]
    begin = time.monotonic()
    try:
        opt.step()
        error = None
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    changed = any(not torch.equal(p.to_local(), old) for p, old in zip(params, before))
    return {"error": error, "seconds": time.monotonic() - begin, "changed": changed}


def died(ctx: Context) -> dict:
    """Process 1 ends after two steps."""
    params, opt = stepper(ctx)
    for _ in range(2):
        opt.step()
    if ctx.rank == 1:
        os._exit(0)
    return step_that_fails(params, opt)


LAMB = {"opt_class": fusedopt.LAMB, "max_grad_norm": None}
"""Whose norms of single tensors are all that is exchanged."""


def died_in_lamb(ctx: Context) -> dict:
    """Process 1 ends after two steps."""
    params, opt = stepper(ctx, **LAMB)
    for _ in range(2):
        opt.step()
    if ctx.rank == 1:
        os._exit(0)
    return step_that_fails(params, opt)


def died_waiting(ctx: Context) -> dict:
    """Process 1 ends in the all-reduce, before process 0 has come to it."""
    params, opt = stepper(ctx)
    opt.step()
    if ctx.rank == 1:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        opt.step()
    time.sleep(0.6)
    return step_that_fails(params, opt)


def late(ctx: Context) -> dict:
    """Process 1 takes no further step, but lives."""
    params, opt = stepper(ctx)
    opt.step()
    if ctx.rank == 1:
        time.sleep(2 * TIMEOUT)
        os._exit(0)
    return step_that_fails(params, opt)


def more_parameters(ctx: Context) -> dict:
    return step_that_fails(*stepper(ctx, count=2 + ctx.rank))


def more_parameters_of_lamb(ctx: Context) -> dict:
    return step_that_fails(*stepper(ctx, count=2 + ctx.rank, **LAMB))


def other_options(ctx: Context) -> dict:
    return step_that_fails(*stepper(ctx, norm_type=2.0 if ctx.rank else 1.0))


def other_seeds(ctx: Context) -> dict:
    """Of random bits for a parameter that both processes hold."""
    part = DTensor.from_local(torch.ones(4, dtype=torch.bfloat16), ctx.mesh(), [Replicate()], run_check=False)
    param = torch.nn.Parameter(part)
    param.grad = DTensor(torch.ones_like(param.to_local()), param._spec, requires_grad=False)
    opt = fusedopt.AdamW([param], stochastic_rounding=True, seed=ctx.rank, nonfinite="skip")
    return step_that_fails([param], opt)


SCENARIOS = [
    died,
    died_in_lamb,
    died_waiting,
    late,
    more_parameters,
    more_parameters_of_lamb,
    other_options,
    other_seeds,
]


def main(out: str) -> None:
    """Forks the processes of each scenario; writes what they tell, by scenario and rank."""
    for scenario in SCENARIOS:
        port, children = free_port(), []
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                told = scenario(join(rank, WORLD, port, timeout=TIMEOUT))
                with open(f"{out}/{scenario.__name__}-{rank}", "w") as file:
                    json.dump(told, file)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
