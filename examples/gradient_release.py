"""Gradient release: each parameter is updated in the backward pass, and its gradient freed, as soon as it is ready.

    python examples/gradient_release.py --steps 100

Gradients never exist all at once, which saves as much memory as the parameters take. The price is that the total norm
is not known in time, so the gradients' elements are clamped instead of their norm clipped. The second micro-batch of
each step releases; the gradients of the first wait in float32.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches

import fusedopt

MICRO_BATCHES = 2


def train(steps: int, device: torch.device, released: bool = True) -> list[float]:
    """Train a tiny GPT with two micro-batches a step and gradient release. Returns the losses, in nats per byte."""
    model = new_model(device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_value=0.1)
    accumulator = fusedopt.GradAccumulator(opt, hooks=True)
    release = opt.release_gradients(model) if released else None
    batches = text_batches(steps * MICRO_BATCHES, device)
    losses = []
    for _ in range(steps):
        first = model.loss(next(batches))
        if released:
            with release.paused():
                first.backward()
        else:
            first.backward()
        accumulator.accumulate()

        last = model.loss(next(batches))
        last.backward()  # updates the parameters
        opt.step()  # the end of the step: learning rate schedules and the accumulator count it
        opt.zero_grad()
        losses.append((first.detach() + last.detach()) / 2)
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.1f} MiB")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
