"""A loop with Lightning Fabric in float16: the step unscales, clips, and skips after an overflow.

    python examples/fabric_loop.py --steps 100

Fabric's ``clip_gradients`` is not called: the bound is the optimizer's own. The scaler is handed over by the precision
plugin. Needs lightning.
"""

import lightning
import torch
from _data import new_model, parameter_groups, run, text_batches
from lightning.fabric.plugins import MixedPrecision
from torch.nn.functional import cross_entropy

import fusedopt


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT with Fabric. Returns the losses, in nats per byte."""
    scaler = fusedopt.GradScaler(device.type, init_scale=2.0**18)  # too large: the first steps overflow
    fabric = lightning.Fabric(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        plugins=[MixedPrecision("16-mixed", device.type, scaler=scaler)],
    )
    model = new_model(torch.device("cpu"))
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    model, opt = fabric.setup(model, opt)
    losses = []
    for batch in text_batches(steps, fabric.device):
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        fabric.backward(loss)
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    last = opt.last_step  # results can be read through Fabric's wrapper
    fabric.print(f"{last.skipped_steps} of {steps} steps skipped, the last norm was {last.grad_norm:.3f}")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
