"""Tensors that steps are tried on: values, layouts, and their bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The largest magnitude tried: its square, which Adam stores, must stay finite in the compute type.
LARGEST = {torch.float32: 1e18, torch.bfloat16: 1e18, torch.float16: 6e4, torch.float64: 1e100}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Standard normal values, or real and imaginary parts, the same on every device."""
    if dtype.is_complex:
        return torch.view_as_complex(normal((*shape, 2), dtype.to_real(), device, seed))
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(device)


def hard_values(shape, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Values of many magnitudes of which a quarter are zero, -0, subnormal, the least normal, one or huge."""
    random, finfo, n = generator(seed), torch.finfo(dtype), torch.Size(shape).numel()
    magnitude = torch.exp2(torch.randint(-20, 4, (n,), generator=random).double())
    values = torch.randn(n, generator=random, dtype=torch.float64) * magnitude
    subnormal, huge = finfo.smallest_normal * finfo.eps, LARGEST[dtype]
    special = [0.0, -0.0, subnormal, -3 * subnormal, finfo.smallest_normal, 1.0, -1.0, huge, -huge]
    special = torch.tensor(special, dtype=torch.float64)[torch.randint(len(special), (n,), generator=random)]
    chosen = torch.rand(n, generator=random) < 0.25
    return torch.where(chosen, special, values).to(dtype).reshape(shape).to(device)


# ---- layouts ------------------------------------------------------------------------------------------------------

PARAM_LAYOUTS = {
    "dense": lambda make: make((37, 29)),
    "transposed": lambda make: make((29, 37)).t(),
    "channels_last": lambda make: make((3, 5, 7, 11)).contiguous(memory_format=torch.channels_last),
    "permuted_3d": lambda make: make((9, 10, 11)).permute(2, 0, 1),
    "every_second": lambda make: make((8202,))[::2],
    "columns": lambda make: make((37, 31))[:, 1:30],
    "odd_offset": lambda make: make((8200,))[1:],
    "one_element": lambda make: make((1,)),
    "zero_dim": lambda make: make(()),
    "empty": lambda make: make((0,)),
    "empty_2d": lambda make: make((3, 0)),
}


def _reversed_dims(values: Tensor) -> Tensor:
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def _gapped(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, dim=-1)[..., ::2] if values.dim() else values


def _misaligned(values: Tensor) -> Tensor:
    buffer = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    return buffer[1:].view(values.shape).copy_(values)


GRAD_LAYOUTS = {
    "dense": lambda values: values.contiguous(),
    "reversed_dims": _reversed_dims,
    "gapped": _gapped,
    "misaligned": _misaligned,
    "expanded": lambda values: values.new_full((), 0.375).expand(values.shape),
}


def parameter(values: Tensor) -> torch.nn.Parameter:
    """A parameter that keeps the strides and the storage of `values`."""
    return torch.nn.Parameter(values)


def parameters(sizes, dtype=torch.float32, device="cpu", seed=0, values=normal) -> list[torch.nn.Parameter]:
    return [parameter(values((n,), dtype, device, seed=100 * seed + i)) for i, n in enumerate(sizes)]


# ---- bits ---------------------------------------------------------------------------------------------------------


def check(condition, message: str) -> None:
    """AssertionError with this message if not; unlike `assert`, under `python -O` too."""
    if not condition:
        raise AssertionError(message)


def parts(t: Tensor) -> Tensor:
    """Real and imaginary parts in a last dimension of their own, where `t` is complex: what kernels see of it."""
    t = t.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """As ``on_device``, of tensors that may need gradients or be conjugates."""
    return on_device([t.detach().resolve_conj().resolve_neg() for t in tensors], torch.device("cpu"))


class Copies:
    """What tensors hold now, on the CPU, by one transfer from each device: ``copies[t]`` is the copy of ``t``."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._originals = {id(t): t for t in tensors}  # kept, so that no other tensor gets their ids
        self._copies = dict(zip(self._originals, on_cpu(list(self._originals.values())), strict=True))

    def __getitem__(self, t: Tensor) -> Tensor:
        return self._copies[id(t)]


def on_device(tensors: list[Tensor], device: torch.device | str) -> list[Tensor]:
    """Each with its strides and all of its storage, by one transfer from each device: a step has hundreds of small
    tensors. Those that are there already share their memory with the result; storages that are shared stay so."""
    device = torch.device(device)
    copies = _storages_on([t for t in tensors if t.device.type != device.type], device)
    if not copies:
        return tensors

    def copied(t: Tensor) -> Tensor:
        memory = copies[t.device, t.untyped_storage().data_ptr()]
        return torch.empty(0, dtype=t.dtype, device=device).set_(memory, t.storage_offset(), t.shape, t.stride())

    return [t if t.device.type == device.type else copied(t) for t in tensors]


def _storages_on(tensors: list[Tensor], wanted: torch.device) -> dict[tuple, torch.UntypedStorage]:
    """By device and address."""
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for t in tensors:
        memory = t.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=t.device).set_(memory)
        by_device.setdefault(t.device, {})[memory.data_ptr()] = raw
    copies = {}
    for device, raws in by_device.items():
        together = torch.cat(list(raws.values())).to(wanted)
        for address, piece in zip(raws, together.split([raw.numel() for raw in raws.values()]), strict=True):
            copies[device, address] = piece.clone().untyped_storage()  # its own: aligned for any dtype
    return copies


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    """The elements of `t`, or their parts, as integers, on the CPU."""
    t = parts(t).cpu().contiguous()
    return t.view(_INTEGER[t.element_size()])


def assert_same_bits(actual, expected) -> None:
    """Both a tensor, or lists of tensors: same dtype, shape and bits, so that 0 differs from -0."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    check(len(actual) == len(expected), f"{len(actual)} tensors, expected {len(expected)}")
    actual, expected = on_cpu(actual), on_cpu(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        check((a.dtype, a.shape) == (e.dtype, e.shape), f"tensor {i}: {a.dtype} {tuple(a.shape)}, expected {e.dtype}")
        if not torch.equal(bits(a), bits(e)):
            different = (bits(a) != bits(e)).reshape(-1).nonzero().flatten().tolist()
            a, e = parts(a), parts(e)
            raise AssertionError(
                f"tensor {i}: {len(different)} of {a.numel()} elements differ, first at {different[0]}: "
                f"{a.reshape(-1)[different[0]].item()!r} != {e.reshape(-1)[different[0]].item()!r}"
            )


def storage(t: Tensor) -> Tensor:
    """Every element of the storage behind `t`, those that `t` does not reach included. Shares memory."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def assert_gaps_untouched(p: Tensor, before: Tensor) -> None:
    """Elements of the storage that `p` does not reach have the bits of `before`, a copy of that storage."""
    gaps = torch.ones(before.numel(), dtype=torch.bool)
    gaps.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(False)
    check(torch.equal(bits(storage(p))[gaps], bits(before)[gaps]), "wrote between the elements of a parameter")
