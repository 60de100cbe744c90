"""A loop with Accelerate, gradient accumulation and clipping, which is a part of the optimizer's step.

    python examples/accelerate_loop.py --steps 100                      # float16 on a GPU
    accelerate launch examples/accelerate_loop.py --steps 100           # several processes, with DDP

The loop is the one of Accelerate's documentation. Needs accelerate.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches
from torch.nn.functional import cross_entropy

import fusedopt
from fusedopt.integrations.accelerate import Accelerator

ACCUMULATED = 2


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT with Accelerate. Returns the losses, in nats per byte."""
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="fp16" if device.type == "cuda" else "no",
        gradient_accumulation_steps=ACCUMULATED,
    )
    model = new_model(accelerator.device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    model, opt, scheduler = accelerator.prepare(model, opt, scheduler)
    losses, norms, skipped = [], [], 0
    for batch in text_batches(steps * ACCUMULATED, accelerator.device, seed=accelerator.process_index):
        with accelerator.accumulate(model):
            loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))  # the step writes it
                losses.append(loss.detach())
            opt.step()
            scheduler.step()  # waits after a skipped step
            opt.zero_grad()
        if accelerator.sync_gradients:
            skipped += accelerator.optimizer_step_was_skipped
    accelerator.print(f"{skipped} of {steps} steps skipped, the last norm was {norms[-1].item():.3f}")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
