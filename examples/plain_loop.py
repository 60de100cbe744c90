"""A training loop as most are: warmup and a cosine, clipping, logging. Nothing in it waits for the GPU.

    python examples/plain_loop.py --steps 100

Clipping is the optimizer's: no call of ``clip_grad_norm_``. ``opt.metrics()`` hands over what has arrived of the norm,
the clip coefficient and the learning rate of earlier steps, so the log lags a step or a few behind on a GPU.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR

import fusedopt

PEAK_LR, FINAL_LR = 1e-3, 1e-4
MAX_GRAD_NORM = 1.0
WARMUP_FRACTION = 0.1  # of the steps


def warmup_then_cosine(opt: torch.optim.Optimizer, steps: int) -> SequentialLR:
    warmup = max(1, round(steps * WARMUP_FRACTION))
    rise = LambdaLR(opt, lambda step: (step + 1) / warmup)
    fall = CosineAnnealingLR(opt, T_max=max(1, steps - warmup), eta_min=FINAL_LR)
    return SequentialLR(opt, [rise, fall], milestones=[warmup])


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT with clipping, a schedule and a log. Returns the losses, in nats per byte."""
    model = new_model(device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=PEAK_LR, betas=(0.9, 0.95), max_grad_norm=MAX_GRAD_NORM)
    schedule = warmup_then_cosine(opt, steps)
    losses, logged = [], 0
    for batch in text_batches(steps, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(batch)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())  # a tensor: .item() would wait

        metrics = opt.metrics()
        if metrics and metrics.step > logged:
            logged = metrics.step
            print(
                f"step {metrics.step:4d}  norm {metrics.grad_norm:7.4f}  clipped by {metrics.clip_coef:.4f}  "
                f"lr {metrics.lr[0]:.2e}"
            )
        schedule.step()
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
