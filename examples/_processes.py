"""What the examples of several processes share: joining those that torchrun has started, and leaving them."""

import torch
from _data import BATCH_SIZE
from torch import distributed

ROWS = 2 * BATCH_SIZE
"""Of a batch, of which every process takes as many: the run is the same for any number of processes."""


def join(device: torch.device) -> torch.device:
    """This process' own device, once all have met."""
    if device.type == "cuda":
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave(losses: list[torch.Tensor], norms: list[torch.Tensor], last_step: int) -> list[float]:
    """The losses of all processes' rows. losses: of this one's; norms: of the whole gradient; both to the last step."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    total = torch.stack(losses)
    distributed.all_reduce(total)
    if rank == 0:
        steps = f"steps {last_step - len(losses) + 1} to {last_step}"
        print(f"{steps}: gradient norm {norms[0]:.4f} -> {norms[-1]:.4f}, {world} processes")
    distributed.destroy_process_group()
    return (total / world).tolist()
