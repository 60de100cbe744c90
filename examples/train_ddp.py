"""A copy of the model in each of several processes (DDP), on GPUs or CPUs. The loop is that of one process.

    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 100

DDP has averaged the gradients over the processes when ``backward`` returns. So all take the same norm and make the same
step: the optimizer need not know of them, and nothing but DDP's own all-reduce travels.
"""

import torch
from _data import new_model, parameter_groups, run, text_batches
from _processes import ROWS, join, leave
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fusedopt

MAX_GRAD_NORM = 1.0


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT in the processes of torchrun. Returns the losses of all, in nats per byte."""
    device = join(device)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = DistributedDataParallel(new_model(device), gradient_as_bucket_view=True)  # no second copy of the gradients
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=MAX_GRAD_NORM)
    losses, norms = [], []
    for batch in text_batches(steps, device, ROWS):
        rows = batch.chunk(world)[rank]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
        norms.append(opt.grad_norm)  # a tensor: .item() would wait
    return leave(losses, norms, steps)


if __name__ == "__main__":
    run(train)
