"""States in host memory, the update on the CPU: for models whose optimizer states do not fit on the GPU.

    python examples/cpu_offload.py --steps 100

The parameters are bfloat16; their float32 masters and both moments, 12 bytes per parameter, never touch the GPU. A step
takes as long as the bus and the host's memory let it, so it is made once for several micro-batches.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches

import fusedopt

MICRO_BATCHES = 4


def train(steps: int, device: torch.device, offload: str | None = "cpu") -> list[float]:
    """Train a tiny GPT in bfloat16 with states on the host. Returns the losses, in nats per byte."""
    model = new_model(device).to(torch.bfloat16)
    opt = fusedopt.AdamW(
        parameter_groups(model),
        lr=1e-3,
        betas=(0.9, 0.95),
        max_grad_norm=1.0,
        master_weights="fp32",
        offload=offload,
    )
    accumulator = fusedopt.GradAccumulator(opt)
    batches = text_batches(steps * MICRO_BATCHES, device)
    losses = []
    for _ in range(steps):
        total = torch.zeros((), device=device)
        for micro_batch in range(MICRO_BATCHES):
            loss = model.loss(next(batches))
            loss.backward()
            total += loss.detach().float() / MICRO_BATCHES
            if micro_batch + 1 < MICRO_BATCHES:
                accumulator.accumulate()
        opt.step()
        opt.zero_grad()
        losses.append(total)
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.1f} MiB")
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    run(train)
