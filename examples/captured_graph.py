"""A whole training step, forward, backward and optimizer, captured in a CUDA graph and replayed.

    python examples/captured_graph.py --steps 100

What changes from step to step stands in tensors: the batch is copied into the one that was captured, the learning rate
is a tensor that the schedule fills. Skipping and clipping are decided on the GPU, so they work in replays too. On a CPU
the same steps run one by one.
"""

import math

import torch
from _data import new_model, parameter_groups, run, text_batches

import fusedopt

PEAK_LR, FINAL_LR = 1e-3, 1e-4
WARM_UP_STEPS = 3  # before the capture, as torch's documentation asks for; they create the optimizer's state


def cosine(step: int, steps: int) -> float:
    return FINAL_LR + (PEAK_LR - FINAL_LR) * (1 + math.cos(math.pi * step / steps)) / 2


def train(steps: int, device: torch.device, captured: bool = True) -> list[float]:
    """Train a tiny GPT by replaying one captured step. Returns the losses, in nats per byte."""
    model = new_model(device)
    lr = torch.tensor(PEAK_LR, device=device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=lr, betas=(0.9, 0.95), max_grad_norm=1.0, nonfinite="skip")
    batches = list(text_batches(steps, device))
    batch, loss = batches[0].clone(), torch.zeros((), device=device)

    def step() -> None:
        opt.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            current = model.loss(batch)
        current.backward()
        opt.step()
        loss.copy_(current.detach())

    graph, losses = None, []
    for i, text in enumerate(batches):
        batch.copy_(text)
        lr.fill_(cosine(i, steps))
        if graph is not None:
            graph.replay()
        elif device.type == "cuda" and captured and i == WARM_UP_STEPS:
            graph = capture(step)
            graph.replay()
        else:
            step()
        losses.append(loss.clone())
    return torch.stack(losses).tolist()


def capture(step) -> torch.cuda.CUDAGraph:
    """Records the kernels of one step without running them."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


if __name__ == "__main__":
    run(train)
