"""Gradient accumulation with unequal micro-batches: one large batch of text, a few sequences of it at a time.

    python examples/accumulation.py --steps 100

Each micro-batch's loss is the mean over its own bytes, so its gradient is weighted by how many there are: the step then
sees the gradient of the whole batch, as if it had fitted into memory. Main gradients are kept in float32, whatever the
gradients' dtype; all micro-batches but the last are folded into them in one launch each, and the step reads both.
"""

from collections.abc import Iterator

import torch
from _data import CONTEXT, new_model, parameter_groups, run, text_batches
from torch import Tensor

import fusedopt

# Of the micro-batches of a step: sequences, and bytes of each that are predicted. Padding would not count.
MICRO_BATCHES = [(1, CONTEXT), (3, CONTEXT), (4, CONTEXT // 2)]


def micro_batches(batch: Tensor) -> Iterator[Tensor]:
    """The parts of a batch ``[8, CONTEXT + 1]`` that go through the model together."""
    sequences = batch.split([count for count, _ in MICRO_BATCHES])
    for part, (_, length) in zip(sequences, MICRO_BATCHES):
        yield part[:, : length + 1]


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT on batches that are taken apart. Returns the losses of whole batches, in nats per byte."""
    model = new_model(device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    accumulator = fusedopt.GradAccumulator(opt)
    losses = []
    for batch in text_batches(steps, device):
        parts = list(micro_batches(batch))
        sizes = [part[:, 1:].numel() for part in parts]
        total = torch.zeros((), device=device)
        for i, (part, size) in enumerate(zip(parts, sizes)):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model.loss(part)
            loss.backward()
            total += loss.detach() * (size / sum(sizes))
            if i + 1 < len(parts):
                accumulator.accumulate(weight=size)
        accumulator.weight = sizes[-1]  # of the micro-batch whose gradients are still in .grad
        opt.step()
        opt.zero_grad()
        losses.append(total)
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
