"""A sharded model (FSDP2) in several processes, on GPUs or CPUs. The loop is that of one process.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 100
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_fsdp.py --steps 1000 --checkpoints runs/fsdp

``fully_shard`` makes a DTensor of every parameter, of which each process holds a part; gradients and the optimizer's
states are spread in the same way. The optimizer steps each process' parts by themselves, in the two launches of an
ordinary step with clipping, and between them adds up the gradients' norm with one all-reduce of two numbers. Nothing
waits for the GPU.

With ``--checkpoints`` each process writes its parts to a shared directory now and then. When a process ends, torchrun
starts all anew, and they go on from the last checkpoint; so they do if it is started again, with any number of
processes that divides the batch. Without the variable, restarted processes may be told of the ports of those before
them (https://github.com/pytorch/pytorch/issues/135712), and fail.
"""

from itertools import islice
from pathlib import Path

import click
import torch
from _data import new_model, parameter_groups, run, text_batches
from _processes import ROWS, join, leave
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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


def state_of(model: torch.nn.Module, opt: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(model, opt)))


def resume(model: torch.nn.Module, opt: torch.optim.Optimizer, directory: Path) -> int:
    """Loads the last complete checkpoint, if there is one. Returns the steps it has made."""
    found = [max((int(path.parent.name) for path in directory.glob("*/.metadata")), default=0)]
    distributed.broadcast_object_list(found)  # a shared disk may not show the same to all at once
    if found[0]:
        state = state_of(model, opt)
        checkpoint.load(state, checkpoint_id=directory / str(found[0]))
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return found[0]


def train(steps: int, device: torch.device, checkpoints: Path | None, every: int) -> list[float]:
    """Train a tiny GPT, sharded over the processes of torchrun. Returns the losses of all, in nats per byte."""
    device = join(device)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = shard(new_model(device), device)
    opt = fusedopt.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=MAX_GRAD_NORM)
    start = resume(model, opt, checkpoints) if checkpoints else 0
    if start >= steps:
        raise SystemExit(f"{checkpoints} has step {start}, expected one before {steps}; ask for more --steps")
    losses, norms = [], []
    for step, batch in enumerate(islice(text_batches(steps, device, ROWS), start, None), start + 1):
        loss = model.loss(batch.chunk(world)[rank])
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
        norms.append(opt.grad_norm)  # of the whole gradient, the same in every process
        if checkpoints and (step % every == 0 or step == steps):
            checkpoint.save(state_of(model, opt), checkpoint_id=checkpoints / str(step))
    return leave(losses, norms, steps)


if __name__ == "__main__":
    run(
        train,
        click.option("--checkpoints", type=click.Path(path_type=Path), help="A directory that all processes share."),
        click.option("--every", type=click.IntRange(min=1), default=100, help="Steps from checkpoint to checkpoint."),
    )
