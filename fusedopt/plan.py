"""The tables that a pass walks: which tensors, on which device, in which combination of dtypes.

A ``DeviceTables`` holds everything of one device; each of its ``Bucket`` s is one rule and one combination of formats,
hence one kernel launch per pass. What they are made from are addresses, so they are valid as long as the addresses are:
the optimizer checks that each step (``_C.Watch``), the functions look them up by the addresses themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from . import _C
from .control import Control
from .sharding import Spread
from .specs import COMPLEX_DTYPES, DTYPES, ParamFormatSpec, RuleSpec, StateFormatSpec

__all__ = [
    "Bucket",
    "DeviceTables",
    "TensorRow",
    "aligned_like",
    "build_tables",
    "dtype_code",
    "is_dense",
    "like_parameter",
    "same_layout",
]

SEGMENT = 256
"""Bytes: ``kSegment`` of ``csrc/cuda/vectors.cuh``."""

BucketKey = tuple[RuleSpec | None, torch.dtype, ParamFormatSpec | None, StateFormatSpec | None, torch.dtype | None]
"""Rule, dtype of gradients, formats of parameters and states, dtype of main gradients."""

_CODES = {getattr(torch, name): spec.code for name, spec in DTYPES.items()}
_CODES |= {getattr(torch, name): code for code, name in enumerate(COMPLEX_DTYPES, len(DTYPES))}


def dtype_code(dtype: torch.dtype) -> int:
    """The C++ code of a supported dtype; KeyError for others. Kernels know those of real numbers only."""
    return _CODES[dtype]


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether memory holds the conjugates or the negatives of the elements, as after ``conj()``."""
    return tensor.is_neg() or tensor.is_conj()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their span of memory, each exactly once and as it is, in any order of dimensions."""
    if _is_lazy(tensor):
        return False
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(tensor: torch.Tensor, dense: torch.Tensor) -> bool:
    """Whether ``tensor``, of the same shape as ``dense``, has its elements in the same order in memory, as they are."""
    if _is_lazy(tensor):
        return False
    return all(a == b for a, b, n in zip(tensor.stride(), dense.stride(), dense.shape) if n > 1) or not dense.numel()


def like_parameter(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A copy of ``grad`` in the memory layout of the dense tensor ``param``."""
    return torch.empty_like(param, dtype=grad.dtype, requires_grad=False).copy_(grad)


def aligned_like(tensor: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy that begins as many elements behind an aligned address as ``dense``, whose layout it has.

    Aligned to so many elements as fill one of the parameter's segments, where the vectors of CUDA kernels begin
    (``csrc/cuda/vectors.cuh``).
    """
    period = SEGMENT // dense.itemsize

    def missing(each: torch.Tensor) -> int:
        return (dense.data_ptr() // dense.itemsize - each.data_ptr() // each.itemsize) % period

    if not missing(tensor) or not tensor.numel():
        return tensor
    memory = torch.empty(period - 1 + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), missing(memory)).copy_(tensor)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclass
class TensorRow:
    """One tensor of a pass. ``param`` is dense; None, like its formats, where a pass only reads gradients.

    A complex tensor becomes what kernels see of it: as torch.optim treats it, real numbers, twice as many, in the same
    memory. Then all tensors given must be complex, and formats those of real numbers.
    """

    numel: int
    device: torch.device
    grad_dtype: torch.dtype
    rule: RuleSpec | None = None
    """None where a pass only reads gradients."""
    param_format: ParamFormatSpec | None = None
    state_format: StateFormatSpec | None = None
    param: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    """What the parameter's format keeps beside it."""
    states: Sequence[torch.Tensor] = ()
    scales: Sequence[torch.Tensor] = ()
    """Of blocked state formats, one for each state."""
    step: torch.Tensor | None = None
    main_grad: torch.Tensor | None = None
    """An accumulator's, laid out as ``param``; None where nobody accumulates."""
    group: int = 0
    id: int = 0
    """Of the parameter in its optimizer, for random numbers."""
    spread: Spread | None = None
    """Over which processes the whole tensor lies, of which this is the local part; None where it is all here."""
    norms: torch.Tensor | None = None
    """Where the sums of squares go that a rule of two phases takes of the tensor, ``(rule.norms,)`` float64; by default
    into memory of the tables' own."""

    def __post_init__(self) -> None:
        if self.grad_dtype.is_complex:
            self.numel *= 2
            self.grad_dtype = self.grad_dtype.to_real()
            self.states = [torch.view_as_real(state) for state in self.states]
            self.param, self.main_grad = (
                None if tensor is None else torch.view_as_real(tensor) for tensor in (self.param, self.main_grad)
            )

    @property
    def key(self) -> BucketKey:
        """What must be equal for two tensors to share a launch."""
        main_dtype = None if self.main_grad is None else self.main_grad.dtype
        return (self.rule, self.grad_dtype, self.param_format, self.state_format, main_dtype)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All memory that the update pass writes."""
        given = (self.param, self.extra, *self.states, *self.scales, self.step, self.norms)
        return [tensor for tensor in given if tensor is not None]


@dataclass
class Bucket:
    """The tensors of one device, one rule and one combination of formats."""

    rule: RuleSpec | None
    grad_dtype: torch.dtype
    param_format: ParamFormatSpec | None
    state_format: StateFormatSpec | None
    main_dtype: torch.dtype | None
    """Of main gradients; None where nobody accumulates."""
    table: _C.Table
    args: _C.PassArgs
    chunk: int
    """Elements of a chunk."""
    hypers: _C.Hypers
    """Of all param groups, in the order of the rule's."""
    device_memory: list[torch.Tensor] = field(default_factory=list)
    """Keeps alive what ``args`` points to."""
    step_table: torch.Tensor | None = None
    """CUDA: the step table, where it does not fit a kernel parameter."""
    num_chunks: int = 0
    numel: int = 0
    capacity: int = 0
    """CUDA: bytes of step table that the kernels take as a parameter; 0 if they read it from device memory."""
    launches: dict[str, Any] = field(default_factory=dict)
    """By pass. CUDA: context, kernel and number of blocks; Triton: what launches the kernel, and its constants."""
    launches_key: tuple[Any, ...] = ()
    """What ``launches`` were chosen for."""
    staging: Any = None
    """Triton: ``backends.staging.Staging``, how the step table reaches the device."""

    @property
    def formats(self) -> tuple[RuleSpec, ParamFormatSpec, StateFormatSpec]:
        """Rule and formats, where it is for an update."""
        assert self.rule is not None and self.param_format is not None and self.state_format is not None
        return self.rule, self.param_format, self.state_format

    @property
    def norms(self) -> int:
        """Of each tensor, that its rule needs before the update; 0 for rules of one phase."""
        return 0 if self.rule is None else self.rule.norms

    def phases(self, passes: tuple[str, ...]) -> tuple[str, ...]:
        """Names of kernels, in their order: an update of a rule of two phases begins with "measure"."""
        if not self.norms or "update" not in passes:
            return passes
        return tuple(phase for name in passes for phase in (("measure", name) if name == "update" else (name,)))


class DeviceTables:
    """All buckets of one device and one spread over processes (mostly there is one), with hyper-parameters and results.

    Results are those of its passes; the norm's are the same in all tables of a step.
    """

    def __init__(
        self, device: torch.device, backend: ModuleType, control: Control | None = None, spread: Spread | None = None
    ) -> None:
        self.device = device
        self.spread = spread
        """Of all its tensors."""
        self.backend = backend
        """Of ``fusedopt.backends``: what runs the passes."""
        self.buckets: list[Bucket] = []
        self.hypers: dict[RuleSpec | None, _C.Hypers] = {}
        """By rule: what its buckets share."""
        self.num_groups = 0
        self.stream = 0
        """CUDA: the stream of the step under way."""
        self.control = control or Control(device)
        self.told: tuple[Any, ...] | None = None
        """The scalars that the passes were last given, unless a tensor is among them."""
        self.keep_alive: list[torch.Tensor] = []
        """Tensors whose addresses the passes of this step were given."""
        self.norms: torch.Tensor | None = None
        """Sums of squares, ``(tensors, norms)`` float64, in the order of rows, of the tensors whose rule has two phases
        and whose row names no other memory; None where there are none."""

    @property
    def measures(self) -> bool:
        """Whether the update begins with a pass that measures tensors."""
        return any(bucket.norms for bucket in self.buckets)

    def add(self, rows: Iterable[TensorRow]) -> list[tuple[Bucket, int]]:
        """Adds rows; returns where each went: its bucket and its slot in the bucket's table."""
        buckets: dict[BucketKey, Bucket] = {}
        places = []
        rows = self._with_norms(list(rows))
        for row in rows:
            bucket = buckets.get(row.key)
            if bucket is None:
                chunk, hypers = self.backend.chunk(row.state_format), self._hypers_of(row.rule)
                bucket = buckets[row.key] = Bucket(*row.key, _C.Table(chunk), _C.PassArgs(), chunk, hypers)
            slot = bucket.table.add(
                param=_address(row.param),
                extra=_address(row.extra),
                states=[_address(state) for state in row.states],
                scales=[_address(scale) for scale in row.scales],
                step=_address(row.step),
                main_grad=_address(row.main_grad),
                numel=row.numel,
                group=row.group,
                id=row.id,
                norms=_address(row.norms),
            )
            places.append((bucket, slot))
            bucket.numel += row.numel
        self.buckets = list(buckets.values())
        for bucket in self.buckets:
            bucket.num_chunks = bucket.table.num_chunks
        return places

    def _with_norms(self, rows: list[TensorRow]) -> list[TensorRow]:
        """The rows, with memory for the norms of those that need it and have none."""
        counts = {i: row.rule.norms for i, row in enumerate(rows) if row.rule is not None and row.norms is None}
        most = max(counts.values(), default=0)
        if most:
            lacking = [i for i, count in counts.items() if count]
            self.norms = torch.zeros(len(lacking), most, dtype=torch.float64, device=self.device)
            for i, norms in zip(lacking, self.norms):
                rows[i] = replace(rows[i], norms=norms)
        return rows

    def _hypers_of(self, rule: RuleSpec | None) -> _C.Hypers:
        if rule not in self.hypers:
            self.hypers[rule] = _C.Hypers([(key, index) for _, key, index in rule.hyper] if rule else [])
        return self.hypers[rule]

    def learning_rates(self) -> list[float]:
        """Of all param groups, as last packed; every rule's hyper-parameters begin with it. None without an update."""
        hypers = next((hypers for rule, hypers in self.hypers.items() if rule is not None), None)
        return [] if hypers is None else hypers.learning_rates()

    def device_memory(self) -> list[torch.Tensor]:
        """All tensors that the passes need besides the model's and the state's, each once."""
        owned = [tensor for bucket in self.buckets for tensor in (*bucket.device_memory, bucket.step_table)]
        unique = {id(tensor): tensor for tensor in (*owned, self.norms, self.control.buffer) if tensor is not None}
        return list(unique.values())

    def pack_hypers(self, groups: Sequence[dict[str, Any]]) -> None:
        """Reads the hyper-parameters of all groups. A device lr stays on the device; other tensors are read here."""
        self.num_groups = len(groups)
        for rule, hypers in self.hypers.items():
            for group, position in hypers.pack(groups if isinstance(groups, list) else list(groups)):
                assert rule is not None  # else there are no hyper-parameters
                _, key, index = rule.hyper[position]
                value = groups[group][key] if index < 0 else groups[group][key][index]
                on_device = isinstance(value, torch.Tensor) and value.device.type == self.device.type != "cpu"
                if position == 0 and on_device:
                    is_double = value.dtype == torch.float64
                    address = self.scalar(value, torch.float64 if is_double else torch.float32)
                    hypers.set_lr_address(group, address.data_ptr(), is_double)
                else:
                    hypers.set_value(group, position, float(value))

    def scalar(self, value: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A one-element tensor on this device, kept alive until the next step. A copy only where needed."""
        moved = value.detach().to(device=self.device, dtype=dtype, non_blocking=self.device.type != "cpu")
        self.keep_alive.append(moved)
        return moved


def build_tables(
    rows: Sequence[TensorRow],
    backend_of: Callable[[torch.device], ModuleType],
    controls: dict[torch.device, Control] | None = None,
) -> tuple[list[DeviceTables], list[tuple[Bucket, int]]]:
    """Sorts rows by device, spread, rule and formats. Returns the tables, and each row's bucket and slot.

    backend_of: what runs the passes on a device.
    controls: where each device's results go; devices that it lacks are added. By default new ones. Further tables of a
        device, for other spreads, have one of their own, with the same results.
    """
    controls = {} if controls is None else controls
    by_device: dict[tuple[torch.device, Spread | None], list[int]] = {}
    for i, row in enumerate(rows):
        by_device.setdefault((row.device, row.spread), []).append(i)
    tables: list[DeviceTables] = []
    places: dict[int, tuple[Bucket, int]] = {}
    for (device, spread), indices in by_device.items():
        if device not in controls:
            controls[device] = Control(device)
        is_first = all(table.device != device for table in tables)
        control = controls[device] if is_first else Control(device)
        table = DeviceTables(device, backend_of(device), control, spread)
        for i, place in zip(indices, table.add(rows[i] for i in indices)):
            places[i] = place
        tables.append(table)
    return tables, [places[i] for i in range(len(rows))]
