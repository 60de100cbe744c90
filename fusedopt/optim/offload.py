"""CPU offload: states and masters in host memory, updated there while gradients arrive and parameters return.

A step goes through the tensors in pieces of some megabytes. A piece's gradients and parameters are copied into a pinned
staging buffer, the CPU engine updates the parameters there and the states where they rest, and the parameters are
copied back. There are a few buffers, and a stream for each direction, so that while the engine works on one piece,
later ones arrive and the one before returns. Pieces are cut at the engine's chunks, and the engine is told where their
tensors would begin: so the bits are those of a step on the CPU, random ones and scales of blocks included.

What may change between steps, the parameters, stays on the device; what only the step needs, on the host. Only staging
buffers are pinned: states never cross the bus.

Of DTensors all this is about local tensors. The norm knows of other processes; it is taken on the device, before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import passes
from ..backends import cpu
from ..control import Control
from ..formats import in_memory_order
from ..plan import Bucket, DeviceTables, TensorRow, build_tables
from ..specs import CPU_CHUNK, RuleSpec

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from .base import FusedOptimizer

__all__ = ["Arrival", "GradientsOnly", "Lane", "Offload", "check_offload", "check_offloadable", "home_of"]

_HOST = torch.device("cpu")
_ALIGNMENT = 64  # bytes at whose multiples the parts of a staging buffer begin: a cache line, the widest vector
_LEAST_PIECE = 16 << 20  # bytes: less does not keep all cores busy
_LEAST_PIECES = 16  # of a step: the first one arrives, and the last one returns, while the engine waits


@dataclass(frozen=True)
class Offload:
    """What ``offload="cpu"`` stands for."""

    staging_bytes: int = 64 << 20
    """Of a staging buffer, unless something that must stay together needs more."""
    buffers: int = 4
    """Of each device: one is worked on, others arrive and return."""
    even_from_cpu: bool = False
    """Whether parameters on the CPU take the same way, as those of any other device: for tests."""

    def covers(self, device: torch.device) -> bool:
        """Whether parameters there are updated on the host: those on the CPU are anyway."""
        return self.even_from_cpu or device.type != "cpu"


def check_offload(where: str, value: str | None) -> Offload | None:
    """ValueError for what is neither None nor "cpu"."""
    if value not in (None, "cpu"):
        raise ValueError(f"{where}: got offload={value!r}, expected None or 'cpu'; choose one of them")
    return None if value is None else Offload()


def check_offloadable(where: str, param: DTensor, rule: RuleSpec) -> None:
    """ValueError where the host would need other processes' parts."""
    if rule.norms and not all(placement.is_replicate() for placement in param.placements):
        raise ValueError(
            f"{where} is a DTensor with placements {param.placements} beside offload='cpu', expected a parameter that "
            f"each process holds as a whole: the rule '{rule.name}' needs norms over whole tensors in the midst of the "
            "update; leave offload out, or use AdamW for this model"
        )


def home_of(optimizer: FusedOptimizer, device: torch.device) -> torch.device:
    """Where the states of parameters on a device are."""
    offload = optimizer._offload
    return _HOST if offload is not None and offload.covers(device) else device


class GradientsOnly:
    """A backend that takes the norm as another one does, and leaves the update to a :class:`Lane`."""

    def __init__(self, backend: ModuleType) -> None:
        self.chunk, self.prepare = backend.chunk, backend.prepare
        self.norm, self.finalize_norm = backend.norm, backend.finalize_norm
        self._begin = backend.begin

    def begin(self, tables: DeviceTables, names: tuple[str, ...]) -> None:
        if "norm" in names:
            self._begin(tables, ("norm",))

    def update(self, tables: DeviceTables) -> None:
        """Not here."""


class Arrival(NamedTuple):
    """What a step has for one parameter."""

    grad: torch.Tensor | None
    """Laid out as the parameter."""
    main_grad: torch.Tensor | None
    """Where it holds anything."""


@dataclass
class _Segment:
    """Elements [begin, end) of one tensor, and the parts of a staging buffer that they pass through."""

    slot: int
    """Of the tensor in its bucket."""
    row: int
    """Of the tensor in its lane."""
    begin: int
    end: int
    grad: torch.Tensor = field(init=False)
    param: torch.Tensor = field(init=False)
    main_grad: torch.Tensor = field(init=False)
    """Empty where nobody accumulates."""

    def stage(self, memory: torch.Tensor, offset: int, dtypes: Sequence[torch.dtype | None]) -> int:
        """Takes its parts of ``memory``, bytes, from ``offset`` on; returns where the next segment's begin."""
        parts = []
        for dtype in dtypes:
            size = 0 if dtype is None else (self.end - self.begin) * dtype.itemsize
            parts.append(memory[offset : offset + size].view(dtype or torch.uint8))
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.grad, self.param, self.main_grad = parts
        return offset

    def origin(self, part: torch.Tensor) -> int:
        """Where the tensor would begin if all of it were there; of an empty one an address that is never read."""
        return part.data_ptr() - self.begin * part.element_size() if part.numel() else _ALIGNMENT


@dataclass
class _Piece:
    """What passes through a staging buffer at a time: chunks [first, last) of a bucket."""

    bucket: Bucket
    first: int
    last: int
    bytes: int = 0
    """At most so many are staged."""
    segments: list[_Segment] = field(default_factory=list)

    @property
    def reads_param(self) -> bool:
        """Whether the update does not overwrite the parameter with a master that is on the host."""
        _, param_format, _ = self.bucket.formats
        extra = param_format.extra
        return extra is None or extra[0] != "master_param"

    def add(self, slot: int, row: int, begin: int, end: int, size: int) -> None:
        """The next chunks of the bucket."""
        self.bytes += size
        self.last += _chunks(end - begin)
        if self.segments and self.segments[-1].slot == slot:
            self.segments[-1].end = end
        else:
            self.segments.append(_Segment(slot, row, begin, end))


def _chunks(numel: int) -> int:
    """An empty tensor has one too."""
    return max(1, -(-numel // CPU_CHUNK))


def _units(numel: int, whole: bool) -> Iterator[tuple[int, int]]:
    """What must stay together of a tensor: chunks, or all of it."""
    step = max(numel, 1) if whole else CPU_CHUNK
    return ((begin, min(begin + step, numel)) for begin in range(0, max(numel, 1), step))


def _staged_dtypes(bucket: Bucket) -> tuple[torch.dtype | None, ...]:
    """Of gradients, parameters and main gradients."""
    _, param_format, _ = bucket.formats
    return bucket.grad_dtype, getattr(torch, param_format.dtype), bucket.main_dtype


def _staged_bytes(bucket: Bucket, numel: int) -> int:
    """Of so many elements, at most."""
    return sum(numel * dtype.itemsize + _ALIGNMENT for dtype in _staged_dtypes(bucket) if dtype is not None)


def _cut(bucket: Bucket, tensors: Iterable[tuple[int, int]], capacity: int) -> list[_Piece]:
    """Pieces of a bucket in the order of its chunks, each as large as fits ``capacity`` bytes, or a single unit.

    tensors: of each slot the row and the number of elements.
    """
    pieces = [_Piece(bucket, 0, 0)]
    for slot, (row, numel) in enumerate(tensors):
        for begin, end in _units(numel, bucket.norms > 0):
            size = _staged_bytes(bucket, end - begin)
            if pieces[-1].bytes and pieces[-1].bytes + size > capacity:
                pieces.append(_Piece(bucket, pieces[-1].last, pieces[-1].last))
            pieces[-1].add(slot, row, begin, end, size)
    return pieces


class _Queues:
    """The copies from and to one device, each way in a stream of its own; on the CPU they are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self.arriving: Any = self.module and self.module.Stream(device)
        self.returning: Any = self.module and self.module.Stream(device)

    def on(self, stream: Any) -> Any:
        """A context in which copies are enqueued to the stream."""
        return nullcontext() if stream is None else self.module.stream(stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """To the stream whose context this is."""
        target.copy_(source, non_blocking=True)

    def staging(self, size: int) -> torch.Tensor:
        """So many bytes of memory that copies need not wait for."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.module is not None)

    def begin(self) -> None:
        """Copies come behind what the current stream has been given: it computes gradients and reads parameters.

        Those that return do too: what returns has arrived before, and the host has waited for that.
        """
        if self.module:
            self.arriving.wait_stream(self.module.current_stream(self.device))

    def end(self) -> None:
        """What the current stream is given from now on comes behind the copies."""
        if self.module:
            current = self.module.current_stream(self.device)
            current.wait_stream(self.returning)
            current.wait_stream(self.arriving)

    def refuse_capture(self, where: str) -> None:
        """RuntimeError inside a graph capture: a replay would not do the host's part."""
        if self.module and getattr(self.module, "is_current_stream_capturing", bool)():
            raise RuntimeError(
                f"{where}: a step with offload='cpu' was run while a graph is being captured, which cannot hold what "
                "the host does; leave the step out of the graph, or offload out of the optimizer"
            )


class _Buffer:
    """Staging memory, and the copies into and out of it."""

    def __init__(self, size: int, queues: _Queues) -> None:
        self.memory = queues.staging(size)
        self.arrived: Any = queues.module and queues.module.Event()
        self.returned: Any = queues.module and queues.module.Event()

    def before_arrival(self, stream: Any) -> None:
        """An event that was never recorded holds nothing up."""
        if stream is not None:
            stream.wait_event(self.returned)

    def after_arrival(self, stream: Any) -> None:
        if stream is not None:
            self.arrived.record(stream)

    def wait_for_arrival(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()

    def after_return(self, stream: Any) -> None:
        if stream is not None:
            self.returned.record(stream)


class Lane:
    """The update of all offloaded parameters of one device."""

    def __init__(
        self, offload: Offload, control: Control, device: torch.device, rows: Sequence[TensorRow], seed: int
    ) -> None:
        """control: the device's results. rows: with parameters on the device and everything else on the host.

        Tensors are not held: those of parameters and main gradients come with each step.
        """
        self.control = control
        self.found_inf = self.takes_norm = self.running = False
        self.params: list[torch.Tensor] = []
        self.grads: list[torch.Tensor | None] = []
        self.mains: list[torch.Tensor | None] = []
        (self.tables,), places = build_tables(rows, lambda _: cpu)
        passes.prepare([self.tables])
        for bucket in self.tables.buckets:
            bucket.args.seed, bucket.args.lead = seed, 0
        self.queues = _Queues(device)
        self._cut(offload, rows, places)

    def _cut(self, offload: Offload, rows: Sequence[TensorRow], places: Sequence[tuple[Bucket, int]]) -> None:
        tensors: dict[int, list[tuple[int, int]]] = {}
        for i, (row, (bucket, _)) in enumerate(zip(rows, places)):
            tensors.setdefault(id(bucket), []).append((i, row.numel))
        total = sum(_staged_bytes(bucket, bucket.numel) for bucket in self.tables.buckets)
        capacity = min(offload.staging_bytes, max(_LEAST_PIECE, total // _LEAST_PIECES))
        self.pieces = [piece for bucket in self.tables.buckets for piece in _cut(bucket, tensors[id(bucket)], capacity)]
        size = max(piece.bytes for piece in self.pieces)
        self.buffers = [_Buffer(size, self.queues) for _ in range(min(offload.buffers, len(self.pieces)))]
        for i, piece in enumerate(self.pieces):
            offset = 0
            for segment in piece.segments:
                offset = segment.stage(self._buffer(i).memory, offset, _staged_dtypes(piece.bucket))

    def _buffer(self, i: int) -> _Buffer:
        """That the piece number ``i`` passes through."""
        return self.buffers[i % len(self.buffers)]

    @property
    def staging_bytes(self) -> int:
        """Of all staging buffers."""
        return sum(buffer.memory.numel() for buffer in self.buffers)

    # ---- the step -------------------------------------------------------------------------------------

    def begin(
        self, where: str, scalars: passes.StepScalars, names: tuple[str, ...], groups: list[dict[str, Any]]
    ) -> None:
        """As ``passes.begin``; waits for the device where a scalar is there. RuntimeError under graph capture."""
        self.queues.refuse_capture(where)
        passes.begin([self.tables], scalars, names, groups)
        self.takes_norm = "norm" in names
        self.found_inf = scalars.found_inf is not None and float(scalars.found_inf) != 0.0

    def start(self, params: Sequence[torch.Tensor], arrivals: Sequence[Arrival]) -> None:
        """Waits for the norm, if one is taken, and lets the first pieces arrive.

        By row: parameters on the device, dense, and what this step has for them.
        """
        if self.takes_norm:
            self.tables.control.buffer.copy_(self.control.buffer)  # the host waits
        skips = self.found_inf or (self.takes_norm and self.tables.control.norm_found_inf.item() != 0.0)
        self.control.skipped.fill_(float(skips))
        self.control.skipped_steps.add_(int(skips))
        self.params = [_flat(param) for param in params]
        self.grads, self.mains = (
            [None if each is None else _flat(each) for each in column] for column in zip(*arrivals)
        )
        self.started, self.running = 0, not skips
        self.queues.begin()
        self._let_arrive(len(self.buffers))

    def finish(self) -> None:
        """Updates all pieces. Returns when the last one has been enqueued to return."""
        if self.running:
            for i, piece in enumerate(self.pieces):
                self._let_arrive(i + len(self.buffers))
                self._update(piece, self._buffer(i))
                self._return(piece, self._buffer(i))

    def end(self) -> None:
        """Whatever became of the step: the current stream waits for all copies, and tensors are let go."""
        self.queues.end()
        self.params, self.grads, self.mains = [], [], []

    def _let_arrive(self, until: int) -> None:
        """Enqueues the pieces before number ``until``, as far as there are any."""
        while self.running and self.started < min(until, len(self.pieces)):
            self._fetch(self.pieces[self.started], self._buffer(self.started))
            self.started += 1

    def _fetch(self, piece: _Piece, buffer: _Buffer) -> None:
        stream = self.queues.arriving
        with self.queues.on(stream):
            buffer.before_arrival(stream)
            for segment in piece.segments:
                for staged, source in self._sources(piece, segment):
                    self.queues.copy(staged, source[segment.begin : segment.end])
            buffer.after_arrival(stream)

    def _sources(self, piece: _Piece, segment: _Segment) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is copied to the host, and where to."""
        grad, main = self.grads[segment.row], self.mains[segment.row]
        if grad is not None:
            yield segment.grad, grad
        if main is not None:
            yield segment.main_grad, main
        if piece.reads_param and self._is_updated(segment):
            yield segment.param, self.params[segment.row]

    def _is_updated(self, segment: _Segment) -> bool:
        return self.grads[segment.row] is not None or self.mains[segment.row] is not None

    def _update(self, piece: _Piece, buffer: _Buffer) -> None:
        """The engine, in this thread and its own."""
        for segment in piece.segments:
            grad, main = self.grads[segment.row], self.mains[segment.row]
            piece.bucket.table.set_memory(
                segment.slot,
                param=segment.origin(segment.param),
                grad=0 if grad is None else segment.origin(segment.grad),
                main_grad=segment.origin(segment.main_grad),
                has_main=main is not None,
            )
        buffer.wait_for_arrival()
        cpu.measure_chunks(piece.bucket, piece.first, piece.last)
        cpu.update_chunks(piece.bucket, piece.first, piece.last)

    def _return(self, piece: _Piece, buffer: _Buffer) -> None:
        stream = self.queues.returning
        with self.queues.on(stream):
            for segment in piece.segments:
                if self._is_updated(segment):
                    self.queues.copy(self.params[segment.row][segment.begin : segment.end], segment.param)
            buffer.after_return(stream)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as real numbers in memory order, without autograd."""
    tensor = tensor.detach()
    return in_memory_order(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
