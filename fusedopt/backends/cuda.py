"""The CUDA backend: kernels compiled by NVRTC, launched on the current stream, always capturable."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _C
from ..plan import Bucket, DeviceTables
from ..specs import CUDA_CHUNK, CUDA_CHUNK_BLOCKED, NORM_TYPES, StateFormatSpec
from . import nvrtc

__all__ = [
    "accumulate",
    "begin",
    "can_compile",
    "chunk",
    "finalize_norm",
    "measure",
    "norm",
    "prepare",
    "require_available",
    "scale",
    "update",
]

# A model of fewer elements is bound by the latency of a block, not by memory.
_LATENCY_BOUND = 1 << 23
# Blocks of the norm pass on a multiprocessor, by whether it is bound by latency.
_NORM_BLOCKS_PER_SM = {False: 4, True: 8}
_NORM_ORDERS = {code: order for order, (_, code) in NORM_TYPES.items()}


def require_available(device: torch.device) -> None:
    """RuntimeError with the remedy where CUDA kernels cannot run on the device."""
    if device.type != "cuda":
        raise RuntimeError(
            f"fusedopt: backend 'cuda' was asked for on '{device}', expected a CUDA device; move the model there, or "
            "choose another backend, or none"
        )
    if torch.version.hip:
        raise RuntimeError(
            "fusedopt: backend 'cuda' was asked for on a ROCm build of torch, expected a CUDA build; choose 'triton'"
        )
    nvrtc.require_compiler()


def can_compile() -> bool:
    """Whether NVRTC is there. A full kernel cache can do without."""
    return nvrtc.has_nvrtc()


def chunk(state_format: StateFormatSpec | None) -> int:
    return CUDA_CHUNK_BLOCKED if state_format is not None and state_format.blocked else CUDA_CHUNK


class Device:
    """What is fixed about one GPU in this process: its context, its kernels, its limits."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.multiprocessors = properties.multi_processor_count
        self.arch = f"sm_{properties.major}{properties.minor}"
        self.context = _C.cuda_primary_context(index)
        self.table_sizes: tuple[int, ...] = (nvrtc.SMALL_TABLE,)
        if _C.cuda_driver_version() >= 12010 and properties.major >= 7:
            self.table_sizes += (nvrtc.MEDIUM_TABLE, nvrtc.LARGE_TABLE)
        self.overlaps = _C.cuda_driver_version() >= 12030 and properties.major >= 9
        """Whether a launch may begin while the one before it runs, in captured graphs too."""
        self.functions: dict[nvrtc.KernelSpec, int] = {}

    def function(self, kernel: nvrtc.KernelSpec) -> int:
        function = self.functions.get(kernel)
        if function is None:
            cubin = nvrtc.get_cubin(kernel, self.arch)
            function = self.functions[kernel] = _C.cuda_load(self.context, cubin, nvrtc.ENTRY)
        return function


@functools.cache
def _device(index: int) -> Device:
    return Device(index)


def _on_device(content: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(device)


def prepare(tables: DeviceTables) -> None:
    """Copies the tables to the device."""
    for i, bucket in enumerate(tables.buckets):
        entries = _on_device(bucket.table.entries(), tables.device)
        chunks = _on_device(bucket.table.chunks(), tables.device)
        bucket.device_memory = [entries, chunks]
        args = bucket.args
        args.tensors, args.chunks = entries.data_ptr(), chunks.data_ptr()
        args.control = tables.control.address
        args.num_chunks = bucket.num_chunks
        args.lead = int(i == 0)
        if bucket.norms:
            norms = torch.zeros(bucket.num_chunks * bucket.norms, dtype=torch.float64, device=tables.device)
            bucket.device_memory.append(norms)
            args.norms = norms.data_ptr()


def _prepare_norm(tables: DeviceTables) -> None:
    """Memory for the partial sums of the norm pass, before the first one."""
    device = _device(tables.device.index)
    most = device.multiprocessors * max(_NORM_BLOCKS_PER_SM.values())
    partials = torch.zeros(2 * most * len(tables.buckets), dtype=torch.float64, device=tables.device)
    for i, bucket in enumerate(tables.buckets):
        bucket.device_memory.append(partials)
        args = bucket.args
        args.partials = partials.data_ptr()
        args.first_partial = i * most
        # The last launch adds all up. Partial sums of blocks that a small bucket does not have are zero from the start.
        args.num_partials = most * len(tables.buckets) if i + 1 == len(tables.buckets) else 0


def begin(tables: DeviceTables, passes: tuple[str, ...]) -> None:
    """Packs hyper-parameters and gradient addresses; those that fit no kernel parameter are sent to the device."""
    tables.stream = torch._C._cuda_getCurrentRawStream(tables.device.index)
    if "norm" in passes and not tables.buckets[0].args.partials:
        _prepare_norm(tables)
    for bucket in tables.buckets:
        key = (tables.num_groups, passes, bucket.args.norm_type)
        if key != bucket.launches_key:
            _choose_kernels(tables, bucket, passes)
            bucket.launches_key = key
        bucket.table.pack(bucket.hypers, bucket.capacity)
    for bucket in tables.buckets:
        if not bucket.capacity:
            _upload_step_table(bucket, tables)


def _choose_kernels(tables: DeviceTables, bucket: Bucket, passes: tuple[str, ...]) -> None:
    """Compiles or loads what the passes need, for the way in which the step table will travel."""
    device = _device(tables.device.index)
    needed = bucket.table.packed_bytes(tables.num_groups)
    bucket.args.num_groups = tables.num_groups
    bucket.capacity = next((size for size in device.table_sizes if size >= needed), 0)
    kernels = {name: _kernel(name, tables, bucket) for name in bucket.phases(passes)}
    norm_blocks = min(device.multiprocessors * _NORM_BLOCKS_PER_SM[_latency_bound(bucket)], bucket.num_chunks)
    bucket.launches = {
        name: (
            device.context,
            device.function(kernel),
            norm_blocks if name == "norm" else bucket.num_chunks,
        )
        for name, kernel in kernels.items()
    }


def _kernel(name: str, tables: DeviceTables, bucket: Bucket) -> nvrtc.KernelSpec:
    grad = str(bucket.grad_dtype).removeprefix("torch.")
    main = str(bucket.main_dtype).removeprefix("torch.") if bucket.main_dtype else None
    if name == "accumulate":
        assert main is not None
        return nvrtc.accumulate_kernel(grad, main, bucket.capacity)
    if name == "norm":
        order = _NORM_ORDERS[bucket.args.norm_type]
        return nvrtc.norm_kernel(grad, order, bucket.capacity, _latency_bound(bucket), bucket.chunk, main)
    if name == "scale":
        return nvrtc.scale_kernel(grad, bucket.capacity)
    rule, param_format, state_format = bucket.formats
    param, state = param_format.name, state_format.name
    low = param == "float32" and _latency_bound(bucket)
    make = nvrtc.measure_kernel if name == "measure" else nvrtc.update_kernel
    return make(rule.name, param, grad, state, bucket.capacity, low, main)


def _latency_bound(bucket: Bucket) -> bool:
    return bucket.numel < _LATENCY_BOUND


def _upload_step_table(bucket: Bucket, tables: DeviceTables) -> None:
    """Sends the step table in kernel parameters, piece by piece: in stream order, nothing to guard or to wait for."""
    device = _device(tables.device.index)
    needed = bucket.table.packed_bytes(tables.num_groups)
    if bucket.step_table is None or bucket.step_table.numel() < needed:
        bucket.step_table = torch.empty(needed, dtype=torch.uint8, device=tables.device)
    address = bucket.args.step_table = bucket.step_table.data_ptr()
    piece = device.table_sizes[-1]
    function = device.function(nvrtc.upload_kernel(piece))
    for offset in range(0, needed, piece):
        size = min(piece, needed - offset)
        _C.cuda_upload(device.context, function, tables.stream, address + offset, bucket.table, offset, size, piece)


def _launch(name: str, bucket: Bucket, tables: DeviceTables) -> None:
    context, function, grid = bucket.launches[name]
    if grid:
        table = bucket.table if bucket.capacity else None
        _C.cuda_launch(context, function, grid, tables.stream, bucket.args, table, _overlaps(name, bucket, tables))


def _overlaps(name: str, bucket: Bucket, tables: DeviceTables) -> bool:
    """Whether this launch of a step may begin while the norm pass runs (programmatic dependent launch).

    Its blocks load what they can, then wait for the end of the norm pass (``cuda/launch.cuh``). So the launch directly
    before it must be the norm pass's last one, and that one must finish the norm: nothing is exchanged in between. What
    they load early (tables, gradients, parameters, states, a tensor lr) was final before the norm pass began, which
    itself is launched in the order of the stream.
    """
    last = tables.buckets[-1]
    behind = ((each, phase) for phase in ("measure", "update") for each in tables.buckets if phase in each.launches)
    first, first_phase = next(behind, (None, ""))
    if bucket is not first or name != first_phase or "norm" not in last.launches:
        return False
    *_, norm_blocks = last.launches["norm"]
    return bool(norm_blocks and last.args.finalize) and _device(tables.device.index).overlaps


def launches(tables: DeviceTables, passes: tuple[str, ...]) -> list[tuple[Any, ...]] | None:
    """What the last step launched for these of its passes, in its order, for ``_C.RepeatedStep.add``.

    None if it did more than launch.
    """
    if not all(bucket.capacity for bucket in tables.buckets):
        return None
    return [
        (
            *(bucket.table, bucket.hypers, bucket.args, *bucket.launches[name], bucket.capacity),
            _overlaps(name, bucket, tables),
        )
        for name in passes
        for bucket in tables.buckets
        if name in bucket.launches
    ]


def norm(tables: DeviceTables, finalize: bool = True) -> None:
    for bucket in tables.buckets:
        bucket.args.finalize = int(finalize)
        _launch("norm", bucket, tables)


def finalize_norm(tables: DeviceTables, gathered: torch.Tensor) -> None:
    _, _, args, context, function, grid, *_ = finalize_launch(tables)
    args.partials, args.num_partials = gathered.data_ptr(), gathered.shape[0]
    _C.cuda_launch(context, function, grid, tables.stream, args, None, False)


def finalize_launch(tables: DeviceTables) -> tuple[Any, ...]:
    """Of ``finalize_norm``, for ``_C.RepeatedStep.add``; its PassArgs, a copy, lack where what was gathered stands."""
    device = _device(tables.device.index)
    return None, None, tables.buckets[0].args.copy(), device.context, device.function(nvrtc.FINALIZE), 1, 0, False


def measure(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        if bucket.norms:
            _launch("measure", bucket, tables)


def update(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        _launch("update", bucket, tables)


def accumulate(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        _launch("accumulate", bucket, tables)


def scale(tables: DeviceTables) -> None:
    for bucket in tables.buckets:
        _launch("scale", bucket, tables)
