"""Offloaded optimizers and their twins on the CPU. Parameters on the CPU take the same way as those of a device."""

import torch
from cases import assert_same_bits, generator, memory

from fusedopt.optim.offload import Offload

CHUNK = 1 << 16
# Of several chunks and pieces, and small ones that share a piece.
SIZES = [0, 5, 2 * CHUNK + 4097, 300, 3 * CHUNK, 1]
SMALL = [5, 0, 4097, 300]
PIECE = 1 << 20  # bytes: two chunks of float32


def offloaded(make, params, staging_bytes=PIECE, buffers=2, **options):
    """An optimizer with offload="cpu" and small staging buffers."""
    opt = make(params, offload="cpu", **options)
    through_pipeline(opt, staging_bytes, buffers)
    return opt


def through_pipeline(opt, staging_bytes=PIECE, buffers=2) -> None:
    opt._offload = Offload(staging_bytes, buffers, even_from_cpu=True)


def twins(make_params, device) -> tuple[list, list]:
    """The same parameters on the device and on the CPU."""
    return make_params(device), make_params(torch.device("cpu"))


def whole_numbers(shape, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """Gradients whose squares add up exactly, in any order: so every engine finds the same norm, to the last bit."""
    if dtype.is_complex:
        return torch.view_as_complex(whole_numbers((*shape, 2), dtype.to_real(), device, seed))
    return torch.randint(-3, 4, shape, generator=generator(seed)).to(dtype).to(device)


def give(params, seed: int, only=None) -> None:
    """Gradients of this step; None for parameters that are not among ``only``, positions."""
    for i, p in enumerate(params):
        got_one = only is None or i in only
        p.grad = whole_numbers(p.shape, p.dtype, p.device, 10_000 + 100 * seed + i) if got_one else None


def assert_twins(opt, twin) -> None:
    """Parameters, states and counters, bit for bit; states of the first one are on the host."""
    for entry in opt.state.values():
        assert all(value.device.type == "cpu" for value in entry.values())
    assert_same_bits(memory(opt), memory(twin))


def train_twins(opt, twin, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for each in (opt, twin):
            give([p for group in each.param_groups for p in group["params"]], step)
            each.step()
