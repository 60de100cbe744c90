"""Ctrl-C in the middle of a step, at every line of Python that the library runs there."""

import signal
import subprocess
import sys

import pytest
import torch
from cases import memory, normal
from planted import Interrupt

import fusedopt


def make(device, options):
    params = [torch.nn.Parameter(normal(shape, device=device, seed=i)) for i, shape in enumerate([(300,), (4, 5)])]
    opt = fusedopt.AdamW(params, lr=0.1, **options)
    for i, p in enumerate(params):
        p.grad = normal(p.shape, device=device, seed=10 + i)
    return params, opt


def snapshots(device, options, steps):
    """Of all memory, and of the parameters, after each of so many steps, without an interrupt."""
    params, opt = make(device, options)
    taken, parameters = [memory(opt)], [[p.detach().clone() for p in params]]
    for _ in range(steps):
        opt.step()
        taken.append(memory(opt))
        parameters.append([p.detach().clone() for p in params])
    return taken, parameters


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "int8": {"state_dtype": "int8", "min_8bit_size": 0, "seed": 1},
}


@pytest.mark.parametrize("before", [0, 2], ids=["first_step", "third_step"])
@pytest.mark.parametrize("name", OPTIONS)
def test_step_is_made_or_not_made(name, before, device):
    """Parameters, states and counters are those before the step, or those after it; and training goes on from there.

    A first step that was not made may have left the states that it begins with.
    """
    options = OPTIONS[name]
    taken, parameters = snapshots(device, options, before + 2)
    made = {0: 0, 1: 0}
    for n in range(1, 100_000, 1 if before else 3):
        params, opt = make(device, options)
        for _ in range(before):
            opt.step()
        interrupt = Interrupt(n)
        try:
            with interrupt:
                opt.step()
        except KeyboardInterrupt:
            pass
        if interrupt.where is None:
            break
        steps = before + int(same(memory(opt), taken[before + 1]))
        if steps == before and before:
            assert same(memory(opt), taken[before]), interrupt.where
        assert same([p.detach() for p in params], parameters[steps]), interrupt.where
        made[steps - before] += 1
        opt.step()
        assert same(memory(opt), taken[steps + 1]), interrupt.where
    assert made[0] and (made[1] or before)  # a repeated step is made in one call


LOOP = """
import signal, torch, fusedopt

def interrupt(*arguments):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(40_000)) for _ in range(6)]
opt = fusedopt.AdamW(params, lr=1e-3, max_grad_norm=1.0)
interrupts = 0
while interrupts < 20:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0037 * interrupts)  # once
        while True:
            opt.zero_grad()
            sum(p.square().sum() for p in params).backward()
            opt.step()
    except KeyboardInterrupt:
        interrupts += 1
opt.zero_grad()
sum(p.square().sum() for p in params).backward()
opt.step()
steps = {int(state["step"]) for state in opt.state.values()}
assert len(steps) == 1, steps
assert all(p.isfinite().all() for p in params)
assert all(float(state["exp_avg_sq"].min()) > 0 for state in opt.state.values())
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this platform")
def test_signals_at_any_time():
    """A training loop that is interrupted 20 times by a signal, and goes on after each."""
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
