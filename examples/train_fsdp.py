"""A sharded model (FSDP2) in several processes, on GPUs or CPUs. The loop is that of one process.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 100

``fully_shard`` makes a DTensor of every parameter, of which each process holds a part; gradients and the optimizer's
states are spread in the same way. The optimizer steps each process' parts by themselves, in the two launches of an
ordinary step with clipping, and between them adds up the gradients' norm with one all-reduce of two numbers. Nothing
waits for the GPU.
"""

import torch
from _data import BATCH_SIZE, new_model, parameter_groups, run, text_batches
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import fusedopt

MAX_GRAD_NORM = 1.0


def shard(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Blocks are gathered one at a time, what is left with the model as a whole."""
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")  # which calls the model itself
    return model


def train(steps: int, device: torch.device) -> list[float]:
    """Train a tiny GPT, sharded over the processes of torchrun. Returns the losses of all, in nats per byte."""
    if device.type == "cuda":
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = shard(new_model(device), device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=MAX_GRAD_NORM)
    losses, norms = [], []
    for batch in text_batches(steps, device, world * BATCH_SIZE):
        loss = model.loss(batch.chunk(world)[rank])  # a batch for every process
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
        norms.append(opt.grad_norm)  # of the whole gradient, the same in every process
    total = torch.stack(losses)
    distributed.all_reduce(total)
    if rank == 0:
        print(f"gradient norm {norms[0]:.4f} -> {norms[-1]:.4f}, {world} processes")
    distributed.destroy_process_group()
    return (total / world).tolist()


if __name__ == "__main__":
    run(train)
