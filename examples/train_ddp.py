"""A copy of the model in each of several processes (DDP), on GPUs or CPUs. The loop is that of one process.

    torchrun --nproc-per-node 2 examples/train_ddp.py --steps 100

DDP has averaged the gradients over the processes when ``backward`` returns. So all take the same norm and make the same
step: the optimizer need not know of them, and nothing but DDP's own all-reduce travels.
"""

import torch
from _data import BATCH_SIZE, new_model, parameter_groups, run, text_batches
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fusedopt

MAX_GRAD_NORM = 1.0
ROWS = 2 * BATCH_SIZE
"""Of a batch, of which every process takes as many: the run is the same for any number of processes."""


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT in the processes of torchrun. Returns the losses of all, in nats per byte."""
    if device.type == "cuda":
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    total = torch.stack(losses)
    distributed.all_reduce(total)
    if rank == 0:
        print(f"steps 1 to {steps}: gradient norm {norms[0]:.4f} -> {norms[-1]:.4f}, {world} processes")
    distributed.destroy_process_group()
    return (total / world).tolist()


if __name__ == "__main__":
    run(train)
