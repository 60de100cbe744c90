"""Activation checkpointing: blocks keep their input only, and run again in the backward pass.

    python examples/activation_checkpointing.py --steps 100

The optimizer needs nothing for it: ``step`` comes after the last recomputation, and a backward pass that would run on
overwritten weights raises an error, as with torch's optimizers. The losses are those of ``plain`` training.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedopt


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


def train(steps: int, device: torch.device, checkpointed: bool = True) -> list[float]:
    """Train a tiny GPT whose blocks keep no activations. Returns the losses, in nats per byte."""
    model = new_model(device)
    if checkpointed:
        model.blocks = nn.Sequential(*(Checkpointed(block) for block in model.blocks))
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    losses = []
    for batch in text_batches(steps, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e6:.1f} MB")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
