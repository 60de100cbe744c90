"""Mixed precision in float16 with a loss scale: autocast and ``fusedopt.GradScaler``.

    python examples/amp_fp16.py --steps 100

The loop is the one of torch's documentation. ``scaler.step(opt)`` takes two kernel launches: one finds inf and NaN and
the norm of the unscaled gradients, one unscales, clips and updates, or does nothing after an overflow. torch's scaler
passes over the gradients on its own before that, and asks the GPU whether to step.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches

import fusedopt

INITIAL_SCALE = 2.0**24  # far too large: the first steps overflow, are skipped, and halve it
GROWTH_INTERVAL = 50  # steps without overflow until it is doubled


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT in float16 with a loss scale. Returns the losses, in nats per byte."""
    model = new_model(device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    scaler = fusedopt.GradScaler(device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL)
    losses = []
    for batch in text_batches(steps, device):
        with torch.autocast(device.type, torch.float16):
            loss = model.loss(batch)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.detach())
    print(f"{opt.last_step.skipped_steps} of {steps} steps skipped, scale 2^{scaler.get_scale().hex().split('p')[1]}")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
