"""Parameters that are spread over a mesh of processes (``torch.distributed.tensor.DTensor``), and sums over the mesh.

Everything else works on local tensors: each process has its part of every parameter, gradient and state, as a plain
tensor inside the DTensor. Only the norm of all gradients needs other processes. A tensor's *spread* says what that
takes: over which mesh it lies, and in which dimensions of the mesh all processes hold the same elements, which must be
counted once.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from .specs import STATE_BLOCK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from typing_extensions import TypeIs

__all__ = [
    "Gathering",
    "NormReduce",
    "Peers",
    "Spread",
    "all_reduce",
    "check_agreement",
    "check_spread",
    "dense_local",
    "home_of",
    "in_place_reduction",
    "is_sharded",
    "local_entry",
    "local_grad",
    "local_of",
    "on_locals",
    "peers_of",
    "reduce_flag",
    "reduce_norm",
    "spread_of",
    "store_entry",
    "wrap_like",
]

NormReduce = Callable[[torch.Tensor, Any], Any]
"""``norm_reduce(sums, op)``: combines a small tensor with other processes' in place, as
``torch.distributed.all_reduce`` does with ``op``."""


def is_sharded(tensor: Any) -> TypeIs[DTensor]:
    """Whether it is a DTensor. Imports nothing: who has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


# ---- local tensors --------------------------------------------------------------------------------------------


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This process' part of a DTensor, sharing memory; other tensors as they are."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


@torch.no_grad()
def dense_local(tensor: torch.Tensor) -> torch.Tensor:
    """As ``local_of``; the result of a collective that is under way is waited for, on the device."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_grad(where: str, grad: torch.Tensor, param: DTensor) -> torch.Tensor:
    """This process' part of the gradient of a DTensor ``param``, placed as the parameter.

    A gradient with other placements (sequence parallelism leaves partial sums for replicated parameters) is
    redistributed, as ``torch.optim`` does it unasked: a collective of its own.

    Raises:
        TypeError: a plain gradient beside a DTensor parameter.
        ValueError: a gradient on another mesh.
    """
    if not is_sharded(grad):
        raise TypeError(
            f"{where} is a plain tensor beside a DTensor parameter, expected a DTensor placed as the parameter; "
            "wrap it with DTensor.from_local, or leave the gradient that backward() made"
        )
    if grad.device_mesh != param.device_mesh:
        raise ValueError(
            f"{where} lies on {grad.device_mesh}, expected the parameter's {param.device_mesh}; redistribute it"
        )
    with torch.no_grad():
        if tuple(grad.placements) != tuple(param.placements):
            grad = grad.redistribute(placements=param.placements)
        return grad.to_local()


def wrap_like(local: torch.Tensor, param: DTensor) -> DTensor:
    """A DTensor of ``param``'s shape, mesh and placements around a local tensor of any dtype."""
    return _wrap(local, param, tuple(param.placements), param.shape, param.stride())


def _wrap(
    local: torch.Tensor, param: DTensor, placements: tuple[Any, ...], shape: Sequence[int], stride: Sequence[int]
) -> DTensor:
    """As DTensor.from_local, which would move parts that are offloaded to the host to the mesh's device."""
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    spec = DTensorSpec(param.device_mesh, placements, tensor_meta=meta)
    made: DTensor = sys.modules["torch.distributed.tensor"].DTensor(local, spec, requires_grad=False)
    return made


# ---- states ---------------------------------------------------------------------------------------------------


def local_entry(where: str, entry: Mapping[str, Any], param: DTensor) -> dict[str, Any]:
    """The state of one DTensor parameter as this process' plain tensors.

    Scales of blocks, of which every process keeps as many, are cut to those of its own elements.

    Raises:
        ValueError: a tensor that is not placed as the parameter.
    """
    local = {}
    for key, value in entry.items():
        if key == "step" or not isinstance(value, torch.Tensor):
            local[key] = value
            continue
        blocked = key.endswith("_scale")
        expected = _scale_placements(param) if blocked else tuple(param.placements)
        if not is_sharded(value) or value.device_mesh != param.device_mesh or tuple(value.placements) != expected:
            got = f"a DTensor with placements {value.placements}" if is_sharded(value) else "a plain tensor"
            raise ValueError(
                f"{where}['{key}'] is {got}, expected a DTensor with placements {expected} on the parameter's mesh; "
                "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        if not blocked and value.shape != param.shape:
            raise ValueError(
                f"{where}['{key}'] has shape {tuple(value.shape)}, expected {tuple(param.shape)}; load the checkpoint "
                "of this model"
            )
        part = value._local_tensor
        local[key] = part[: _blocks(param._local_tensor.numel())] if blocked else part
    return local


def store_entry(entry: dict[str, Any], local: Mapping[str, Any], param: DTensor) -> None:
    """Makes ``entry`` hold what ``local``, this process' plain tensors, holds: as DTensors, new ones where changed."""
    for key in [key for key in entry if key not in local]:
        del entry[key]
    for key, value in local.items():
        if key == "step" or not isinstance(value, torch.Tensor):
            entry[key] = value
        elif key not in entry or not _shares(entry[key], value):
            entry[key] = _wrap_scale(value, param) if key.endswith("_scale") else wrap_like(value, param)


def on_locals(function: Callable[..., Any], entry: Mapping[str, Any], param: torch.Tensor, *args: Any) -> Any:
    """``function(entry, *args)`` of a parameter's state; of a DTensor of its plain tensors, with results as DTensors.

    Results: a tensor, or a dict of them, of the parameter's shape. ``param`` among ``args`` becomes its local tensor.
    """
    if not is_sharded(param):
        return function(entry, *args)
    args = tuple(param._local_tensor if each is param else each for each in args)
    result = function(local_entry("optimizer state", entry, param), *args)
    if isinstance(result, dict):
        return {key: wrap_like(value, param) for key, value in result.items()}
    return wrap_like(result, param)


def _shares(kept: Any, local: torch.Tensor) -> bool:
    part = kept._local_tensor
    return part is local or (part.data_ptr() == local.data_ptr() and part.dtype == local.dtype and part.numel() > 0)


def _blocks(numel: int) -> int:
    return -(-numel // STATE_BLOCK)


def _scale_placements(param: DTensor) -> tuple[Any, ...]:
    """Of the scales of blocks: one after the other in the order of the processes that hold different elements."""
    module = sys.modules["torch.distributed.tensor"]
    return tuple(module.Replicate() if each.is_replicate() else module.Shard(0) for each in param.placements)


def _wrap_scale(scale: torch.Tensor, param: DTensor) -> DTensor:
    """A DTensor of equally many scales from each process, as many as the largest part of the parameter needs."""
    shape, mesh = list(param.shape), param.device_mesh
    processes = 1
    for dim, placement in enumerate(param.placements):
        if not placement.is_replicate():
            sharded = cast("Shard", placement).dim
            shape[sharded] = -(-shape[sharded] // mesh.size(dim))
            processes *= mesh.size(dim)
    rows = _blocks(torch.Size(shape).numel())
    padded = scale.new_zeros(rows)
    padded[: scale.numel()] = scale
    return _wrap(padded, param, _scale_placements(param), (rows * processes,), (1,))


# ---- spreads --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How a DTensor lies on a mesh, as far as sums over all its elements are concerned."""

    mesh: DeviceMesh
    replicated: tuple[int, ...]
    """Dimensions of the mesh in which every process holds the same elements."""

    @property
    def is_split(self) -> bool:
        """Whether processes hold different elements, this one among them."""
        return len(self.replicated) < self.mesh.ndim and self.mesh.get_coordinate() is not None

    def is_counted_here(self) -> bool:
        """Whether this process counts its elements: of those that hold the same ones the first does."""
        if not self.replicated:
            return True
        coordinate = self.mesh.get_coordinate()
        return coordinate is not None and all(coordinate[dim] == 0 for dim in self.replicated)


def spread_of(tensor: torch.Tensor) -> Spread | None:
    """None for a plain tensor, which counts in full in every process."""
    if not is_sharded(tensor):
        return None
    replicated = (dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
    return Spread(tensor.device_mesh, tuple(replicated))


def check_spread(where: str, tensor: torch.Tensor) -> None:
    """ValueError for a DTensor that holds partial sums: their squares do not add up to the square of the sum."""
    if is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{where} has placements {tensor.placements}, expected Shard and Replicate only: partial sums have to be "
            "added up first; call .redistribute(placements=…) on it, with Replicate() in place of Partial()"
        )


class Peers(NamedTuple):
    """The processes of a mesh."""

    mesh: DeviceMesh
    groups: tuple[ProcessGroup, ...]
    """Whose reductions, one after the other, cover the mesh."""

    @classmethod
    def of(cls, mesh: DeviceMesh, last: Sequence[int] = ()) -> Peers:
        """In a single group if the mesh is all processes; groups are never made here.

        last: dimensions of the mesh to be reduced after the others.
        """
        from torch import distributed

        if mesh.ndim > 1 and mesh.size() == distributed.get_world_size():
            world = distributed.group.WORLD
            if world and mesh.device_type in {device.type for device in getattr(world, "_device_types", ())}:
                return cls(mesh, (world,))
        dims = sorted(range(mesh.ndim), key=lambda dim: dim in last)
        return cls(mesh, tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1))


def peers_of(tensors: Iterable[torch.Tensor]) -> list[Peers]:
    """Of every mesh that a tensor lies on and this process is part of, in the order of the tensors."""
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    return [Peers.of(mesh) for mesh in meshes if mesh.get_coordinate() is not None]


# ---- sums over a mesh -----------------------------------------------------------------------------------------


_GRADIENTS = "the gradients' norm"


def all_reduce(values: torch.Tensor, op: Any, peers: Peers, what: str = _GRADIENTS) -> torch.Tensor:
    """Over all processes of the mesh, in place where ``values`` are where the mesh's processes communicate.

    what: of the update's ingredients, for the RuntimeError where a process does not come.
    """
    from torch import distributed

    mesh, device = peers.mesh, values.device
    if device.type != mesh.device_type:  # parameters that are offloaded to the host
        values = values.to(mesh.device_type)
    try:
        for group in peers.groups:
            distributed.all_reduce(values, op, group=group)
    except RuntimeError as error:
        raise _failed(mesh, what, error) from error
    return values.to(device)


def _failed(mesh: DeviceMesh, what: str, error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        f"fusedopt: the all-reduce of {what} over {mesh} failed, nothing has been updated: {error}; "
        "expected every process of the mesh to take this step too, with the same parameters and clipping: look "
        "for a process that ended, or that skipped the step"
    )


def _to_wire(sums: torch.Tensor, is_max: bool) -> tuple[torch.Tensor, Any]:
    """(sum or maximum, non-finite findings) as numbers to be reduced, and how: a maximum of NaN says nothing."""
    from torch.distributed import ReduceOp

    if not is_max:
        return sums, ReduceOp.SUM
    nan = sums[0].isnan()
    return torch.stack([torch.where(nan, 0.0, sums[0]), sums[1], nan.to(sums.dtype)]), ReduceOp.MAX


def _from_wire(wire: torch.Tensor, is_max: bool) -> torch.Tensor:
    return torch.stack([torch.where(wire[2] > 0, float("nan"), wire[0]), wire[1]]) if is_max else wire


def _combine(rows: torch.Tensor, is_max: bool) -> torch.Tensor:
    """Several (sum or maximum, findings), shape (n, 2), into one."""
    return torch.stack([rows[:, 0].max(), rows[:, 1].sum()]) if is_max else rows.sum(0)


def reduce_norm(
    shares: Sequence[tuple[Spread | None, torch.Tensor]],
    peers: Sequence[Peers],
    hook: NormReduce | None,
    norm_type: float,
    home: torch.device,
) -> torch.Tensor:
    """What the gradients of all processes add up to. Waits for nothing if all devices are GPUs.

    shares: of this process, by spread: float64 ``(2,)``, Σ|g|^p or max |g| and the number of non-finite findings; may
    be overwritten. peers: of all parameters, with gradients or without: the other processes wait for this one there.
    hook: combines the sums of all meshes with other processes'. home: where the result is wanted.

    Returns:
        float64 ``(n, 2)``, to be added up (their maximum taken) by the backends' ``finalize_norm``.

    Raises:
        RuntimeError: a process failed, or took too long.
    """
    is_max = norm_type == float("inf")
    rows = [share.to(home) for spread, share in shares if spread is None]
    for each in peers:
        own = [_counted(spread, share, is_max) for spread, share in shares if spread and spread.mesh == each.mesh]
        own = [share.to(home) for share in own]
        if not own:
            own = [torch.zeros(2, dtype=torch.float64, device=home)]
        sums = own[0] if len(own) == 1 else _combine(torch.stack(own), is_max)
        wire, op = _to_wire(sums, is_max)
        rows.append(_from_wire(all_reduce(wire, op, each), is_max))
    if not rows:
        rows = [torch.zeros(2, dtype=torch.float64, device=home)]
    gathered = rows[0].view(1, 2) if len(rows) == 1 else torch.stack(rows)
    if hook is None:
        return gathered
    wire, op = _to_wire(_combine(gathered, is_max), is_max)
    hook(wire, op)
    return _from_wire(wire, is_max).view(1, 2)


class Gathering(NamedTuple):
    """``reduce_norm`` of shares that each step writes anew, to be called in each."""

    run: Callable[[], torch.Tensor]
    result: torch.Tensor | None
    """Where it always leaves the result, calling nothing but builtins; None if the result is a new tensor each time."""

    @classmethod
    def of(
        cls,
        shares: Sequence[tuple[Spread | None, torch.Tensor]],
        peers: Sequence[Peers],
        hook: NormReduce | None,
        norm_type: float,
        home: torch.device,
    ) -> Gathering:
        """Arguments: of ``reduce_norm``.

        Where all parameters lie in one way on one mesh, and the norm is a sum, it is no more than the all-reduce, in
        place: with the caches of a training loop each operation of torch on the way takes the host 20 to 40
        microseconds.
        """
        is_one = len(shares) == len(peers) == 1 and hook is None and norm_type != float("inf")
        spread, share = shares[0]
        if is_one and spread and spread.mesh == peers[0].mesh and share.device.type == spread.mesh.device_type:
            clear = None if spread.is_counted_here() else share[0].zero_
            result = share.view(1, 2)
            return cls(in_place_reduction(share, result, peers[0], clear), result)
        return cls(partial(reduce_norm, shares, peers, hook, norm_type, home), None)


def in_place_reduction(
    values: torch.Tensor,
    result: torch.Tensor,
    peers: Peers,
    clear: Callable[[], object] | None = None,
    what: str = _GRADIENTS,
) -> Callable[[], torch.Tensor]:
    """As ``torch.distributed.all_reduce``, whose arguments have been checked and whose options are there already.

    Returns what adds up ``values``, which are where the mesh's processes communicate, and returns ``result``, a view of
    them. clear: takes from them, before, what is not to be counted. what: as for ``all_reduce``.
    """
    from torch.distributed import AllreduceOptions, ReduceOp

    options: Any = AllreduceOptions()
    options.reduceOp = ReduceOp.SUM
    if hasattr(options, "asyncOp"):  # before torch 2.8 there is but one way
        options.asyncOp = False
    reducers, given = [_all_reduce_of(group, values.device) for group in peers.groups], [values]

    def reduce() -> torch.Tensor:
        if clear is not None:
            clear()
        try:
            for reducer in reducers:
                work = reducer(given, options)
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise _failed(peers.mesh, what, error) from error
        return result

    return reduce


def _all_reduce_of(group: ProcessGroup, device: torch.device) -> Callable[..., Any]:
    """``(tensors, options) -> Work or None``: of what reduces tensors on the device for torch's own groups, which would
    call it through torch's dispatcher, 30 to 200 microseconds with cold caches; other libraries' groups are asked."""
    from torch.distributed import ProcessGroup

    reducer: Any = group._get_backend(device) if type(group) is ProcessGroup else group
    return cast(Callable[..., Any], reducer.allreduce)


def _counted(spread: Spread, share: torch.Tensor, is_max: bool) -> torch.Tensor:
    """A maximum may be counted often. Findings are: one is enough to skip a step."""
    if not is_max and not spread.is_counted_here():
        share[0] = 0.0
    return share


def home_of(groups: Iterable[Mapping[str, Any]]) -> torch.device:
    """Of a process without gradients: where its sums are wanted, that of its parameters, if there are any."""
    from torch import distributed

    for group in groups:
        for param in group["params"]:
            return cast(torch.device, param.device)
    on_gpu = torch.cuda.is_available() and distributed.is_initialized() and "nccl" in distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


# ---- agreement ------------------------------------------------------------------------------------------------


def check_agreement(where: str, peers: Sequence[Peers], options: str, params: Sequence[tuple[DeviceMesh, str]]) -> None:
    """Whether all processes of each mesh step with the same DTensors and options. Waits for them.

    options, params: in words; params with their meshes.

    Raises:
        ValueError: they differ; the message names the first difference.
        RuntimeError: a process failed, or took too long.
    """
    from torch.distributed import ReduceOp

    for each in peers:
        own = [options, *(text for mesh, text in params if mesh == each.mesh)]
        # 48 bits: float64 holds them exactly, and every backend reduces that dtype.
        digest = int.from_bytes(hashlib.sha256("\n".join(own).encode()).digest()[:6], "little")
        ends = torch.tensor([digest, -digest], dtype=torch.float64, device=each.mesh.device_type)
        highest, lowest = all_reduce(ends, ReduceOp.MAX, each).tolist()
        if highest != -lowest:
            _explain(where, each, own)


def _explain(where: str, peers: Peers, own: list[str]) -> None:
    """Raises ValueError with the first line in which a process of the mesh differs from this one."""
    from torch import distributed

    for group in peers.groups:
        everyone: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(everyone, own, group=group)
        for rank, other in enumerate(everyone):
            for here, there in zip_longest(own, other, fillvalue="nothing more"):
                if here != there:
                    raise ValueError(
                        f"{where}: the processes of {peers.mesh} disagree: this one has [{here}], process "
                        f"{distributed.get_global_rank(group, rank)} has [{there}], expected the same in all; build "
                        "the same model and optimizer in every process. Nothing has been updated"
                    )
    raise ValueError(
        f"{where}: some processes of {peers.mesh} disagree about parameters or options, expected the same in all; "
        "build the same model and optimizer in every process. Nothing has been updated"
    )


def reduce_flag(flag: torch.Tensor, peers: Sequence[Peers]) -> None:
    """Sets a float32 flag of one element wherever it is set in some process of the meshes."""
    from torch.distributed import ReduceOp

    for each in peers:
        flag.copy_(all_reduce(flag, ReduceOp.MAX, each))
