"""The Triton backend: NVIDIA, AMD and Intel GPUs, launched on the current stream, always capturable.

With TRITON_INTERPRET=1 set before triton is imported it runs on CPU tensors, in Triton's interpreter, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from ctypes import sizeof
from typing import Any, NamedTuple

import torch

from .. import _C
from ..plan import Bucket, DeviceTables
from ..specs import DTYPES, TRITON_CHUNK, TRITON_CHUNK_BLOCKED, ParamFormatSpec, RuleSpec, StateFormatSpec
from ..structs import Hyper, PassArgs
from .staging import Staging

__all__ = [
    "accumulate",
    "begin",
    "chunk",
    "finalize_norm",
    "measure",
    "norm",
    "prepare",
    "repeat",
    "require_available",
    "scale",
    "update",
]

_OLDEST = (3, 2)
_REMEDY = "install it with `pip install 'triton>=3.2'`, in the version that fits your torch"

# Programs of the norm pass on a multiprocessor.
_NORM_PROGRAMS_PER_SM = 8
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}  # a*b+c rounds twice, as everywhere else


def require_available(device: torch.device) -> None:
    """RuntimeError with the remedy where Triton kernels cannot run on the device."""
    if not _is_installed():
        raise RuntimeError(f"fusedopt: backend 'triton' needs triton, which is missing; {_REMEDY}")
    if _version() < _OLDEST:
        raise RuntimeError(
            f"fusedopt: backend 'triton' got triton {'.'.join(map(str, _version()))}, expected 3.2 or newer; {_REMEDY}"
        )
    if device.type == "cpu" and not _is_interpreted():
        raise RuntimeError(
            f"fusedopt: backend 'triton' was asked for on '{device}', expected a GPU; move the model there, choose "
            "another backend, or, to try kernels out in Triton's interpreter, start with TRITON_INTERPRET=1"
        )
    if device.type not in ("cpu", "cuda", "xpu"):
        raise RuntimeError(
            f"fusedopt: backend 'triton' was asked for on '{device}', expected 'cuda' or 'xpu'; use torch.optim there"
        )
    if device.type != "cpu" and _is_interpreted():
        raise RuntimeError(
            f"fusedopt: backend 'triton' was asked for on '{device}' with TRITON_INTERPRET=1, which runs on the CPU; "
            "unset it, or choose another backend"
        )


@functools.cache
def _is_installed() -> bool:
    try:  # a folder of that name beside the program would be found as "triton", hence the submodule
        return importlib.util.find_spec("triton.language") is not None
    except ImportError:
        return False


@functools.cache
def _version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _is_interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":  # importing our kernels takes time
        return False
    from ..triton.target import INTERPRETED

    return INTERPRETED


def chunk(state_format: StateFormatSpec | None) -> int:
    return TRITON_CHUNK_BLOCKED if state_format is not None and state_format.blocked else TRITON_CHUNK


class Tile(NamedTuple):
    """What a program works on at once: all of it is loaded before the first element is used."""

    elements: int
    warps: int
    registers: int | None
    """The most that a thread may have on NVIDIA GPUs, where 65,536 are shared; Triton allows itself 255."""


TILES = {"norm": Tile(8192, 8, None), "accumulate": Tile(4096, 8, None), "scale": Tile(4096, 8, None)}
"""By pass, but for updates."""


def update_tile(state_format: StateFormatSpec) -> Tile:
    """The best of those measured on an H100 (docs/performance.md). Aligned float32 and bfloat16 tiles spill nothing."""
    if state_format.name == "float64":
        return Tile(4096, 8, None)
    if state_format.name == "float32":
        return Tile(4096, 8, 128)
    if state_format.blocked or state_format.random:  # the more arithmetic, the more programs should take turns
        return Tile(1024, 4, 80)
    return Tile(2048, 8, 64)


# ---- tables ---------------------------------------------------------------------------------------------------


@functools.cache
def _norm_programs(device: torch.device) -> int:
    """How many programs of the norm pass run at once."""
    if device.type == "cpu":
        return 3
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", 0) or getattr(properties, "max_compute_units", 64)
    return processors * _NORM_PROGRAMS_PER_SM


def _on_device(content: bytes, device: torch.device) -> torch.Tensor:
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8).to(device)


def prepare(tables: DeviceTables) -> None:
    """Copies the tables to the device."""
    most = _norm_programs(tables.device)
    partials = torch.zeros(2 * most * len(tables.buckets), dtype=torch.float64, device=tables.device)
    for i, bucket in enumerate(tables.buckets):
        entries = _on_device(bucket.table.entries(), tables.device)
        chunks = _on_device(bucket.table.chunks(), tables.device)
        bucket.device_memory = [entries, chunks, partials]
        args = bucket.args
        args.tensors, args.chunks = entries.data_ptr(), chunks.data_ptr()
        args.partials, args.control = partials.data_ptr(), tables.control.address
        args.num_chunks = bucket.num_chunks
        args.lead = int(i == 0)
        args.first_partial = i * most
        # The last launch adds all up. Partial sums of programs that a small bucket lacks are zero from the start.
        args.num_partials = most * len(tables.buckets) if i + 1 == len(tables.buckets) else 0
        if bucket.norms:
            norms = torch.zeros(bucket.num_chunks * bucket.norms, dtype=torch.float64, device=tables.device)
            bucket.device_memory.append(norms)
            args.norms = norms.data_ptr()


def begin(tables: DeviceTables, passes: tuple[str, ...]) -> None:
    """Compiles what is missing, and sends hyper-parameters and gradient addresses to the device."""
    with _current(tables.device):
        for bucket in tables.buckets:
            args = bucket.args
            key = (tables.num_groups, passes, args.norm_type, math.isinf(args.max_grad_value))
            if key != bucket.launches_key:
                args.num_groups = tables.num_groups
                size = sizeof(PassArgs) + bucket.table.packed_bytes(tables.num_groups)
                if bucket.staging is None or bucket.staging.size < size:
                    bucket.staging = Staging(tables.device, size)
                    bucket.step_table = bucket.staging.table
                bucket.launches = {name: _prepare_launch(name, tables, bucket) for name in bucket.phases(passes)}
                bucket.launches_key = key
        for bucket in tables.buckets:
            args = bucket.args
            args.step_table = bucket.staging.send(bucket)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device the current one, which Triton launches on."""
    if device.type == "cpu":
        return _NOTHING_TO_DO
    module = _device_module(device.type)
    return _NOTHING_TO_DO if module.current_device() == device.index else module.device(device)


_NOTHING_TO_DO = nullcontext()
_device_module = functools.cache(torch.get_device_module)


# ---- launches -------------------------------------------------------------------------------------------------


def _prepare_launch(name: str, tables: DeviceTables, bucket: Bucket) -> Callable[..., None]:
    """What launches a pass, given its run-time arguments. The kernel is compiled now."""
    grad = str(bucket.grad_dtype).removeprefix("torch.")
    main = str(bucket.main_dtype).removeprefix("torch.") if bucket.main_dtype else NO_MAIN
    constants: dict[str, Any] = {"G": grad, "CHUNK": bucket.chunk, "CLAMP": not math.isinf(bucket.args.max_grad_value)}
    programs, sizes = bucket.num_chunks, [DTYPES[grad].size, *([DTYPES[main].size] if bucket.main_dtype else [])]
    tile = TILES.get(name) or update_tile(bucket.formats[2])
    if name == "accumulate":
        constants = {"G": grad, "M": main, "CHUNK": bucket.chunk, "V": _vector(max(sizes))}
        return _launcher("accumulate_pass", programs, 4, constants, tile)
    if name == "norm":
        constants |= {"M": main, "TYPE": bucket.args.norm_type, "V": _vector(max(sizes))}
        return _launcher("norm_pass", min(_norm_programs(tables.device), programs), 4, constants, tile)
    if name == "scale":
        return _launcher("scale_pass", programs, 3, constants | {"V": _vector(DTYPES[grad].size)}, tile)
    constants |= update_constants(*bucket.formats, grad, main, name)
    return _launcher(f"{name}_pass", programs, 4, constants, tile)


NO_MAIN = "none"
"""In place of a dtype of main gradients where nobody accumulates."""


def update_constants(
    rule: RuleSpec,
    param: ParamFormatSpec,
    state: StateFormatSpec,
    grad: str,
    main: str = NO_MAIN,
    name: str = "update",
) -> dict[str, Any]:
    """The constants of ``update_pass``, or ``measure_pass``, that the rule and the formats decide."""
    from ..triton.rules import PHASES, RULES

    sizes = [DTYPES[param.dtype].size, DTYPES[grad].size]
    sizes += [_SIZES[param.extra[1]]] if param.extra else []
    sizes += [_SIZES[state.dtype(moment)] for moment in rule.moments]
    sizes += [] if main == NO_MAIN else [DTYPES[main].size]
    prepare_rule, update_rule = RULES[rule.name]
    measure_rule, scale_rule = PHASES.get(rule.name, (update_rule, prepare_rule))  # neither is called without norms
    return {
        "PREPARE": prepare_rule,
        "RULE": measure_rule if name == "measure" else update_rule,
        "SCALE": scale_rule,
        "NORMS": rule.norms,
        "CHUNK": chunk(state),
        "N": len(rule.states),
        "SECOND": sum(1 << k for k, moment in enumerate(rule.moments) if moment == "second"),
        "P": param.name,
        "G": grad,
        "M": main,
        "S": state.name,
        "V": _vector(max(sizes)),
    }


_SIZES = {**{name: spec.size for name, spec in DTYPES.items()}, "int8": 1, "uint8": 1, "int16": 2}


def _vector(largest: int) -> int:
    """Elements of one access: as many of the largest as 16 bytes hold. Every stream takes as many.

    Were they of different lengths, Triton would exchange stored elements between threads.
    """
    return min(8, 16 // largest)


def options_of(tile: Tile) -> dict[str, Any]:
    """What Triton's compiler for NVIDIA GPUs is told."""
    registers = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {**_OPTIONS, "num_warps": tile.warps, **registers}


def _launcher(
    name: str, programs: int, num_arguments: int, constants: dict[str, Any], tile: Tile
) -> Callable[..., None]:
    """Launches a kernel, which is compiled for the current device, without going through Triton's dispatcher."""
    from ..triton import kernels
    from ..triton.target import INTERPRETED, NVIDIA

    kernel, grid = getattr(kernels, name), (programs, 1, 1)
    if "TILE" in kernel.arg_names:
        constants = {**constants, "TILE": tile.elements}
    if INTERPRETED:
        return lambda *args: kernel[grid](*args, **constants)
    options = options_of(tile if NVIDIA.value else tile._replace(registers=None))
    compiled = kernel.warmup(*([1 << 40] * num_arguments), grid=grid, **constants, **options)
    run = compiled[grid]  # loads it too
    if NVIDIA.value and _takes_words_alone(compiled.metadata):
        return _by_the_driver(compiled, programs)
    in_order = [constants[key] for key in kernel.arg_names[num_arguments:]]
    rest = in_order if _version() >= (3, 3) else []  # the generated launchers take constants too, and ignore them
    return lambda *args: run(*args, *rest)


def _takes_words_alone(metadata: Any) -> bool:
    """Whether a compiled kernel's launch needs nothing but its arguments: no scratch memory, no clusters."""
    unused = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    return not any(getattr(metadata, name, 0) for name in unused) and getattr(metadata, "num_ctas", 1) == 1


def _by_the_driver(compiled: Any, programs: int) -> Callable[..., None]:  # on a GPU alone
    """Launches on the current device without Triton's launcher, whose Python code takes long where caches are cold."""
    device, metadata = torch.cuda.current_device(), compiled.metadata
    launch = functools.partial(
        _C.cuda_launch_words,
        _C.cuda_primary_context(device),
        compiled.function,
        programs,
        metadata.num_warps * metadata.target.warp_size,
        metadata.shared,
    )
    stream_of = torch._C._cuda_getCurrentRawStream
    return lambda *words: launch(stream_of(device), words)


def _grads(bucket: Bucket) -> int:
    """Where the device reads gradient addresses."""
    return bucket.args.step_table + sizeof(PassArgs) + bucket.args.num_groups * sizeof(Hyper)


def _arguments(name: str, bucket: Bucket) -> tuple[int, ...]:
    """What a pass is launched with."""
    args = bucket.args
    if name in ("norm", "scale"):
        return args.step_table, args.chunks, _grads(bucket)
    return args.step_table, args.tensors, args.chunks, _grads(bucket)


def _launch(name: str, tables: DeviceTables, *more: int) -> None:
    for bucket in tables.buckets:
        if name in bucket.launches:
            bucket.launches[name](*_arguments(name, bucket), *more)


def norm(tables: DeviceTables, finalize: bool = True) -> None:
    with _current(tables.device):
        _launch("norm", tables, int(finalize))


def finalize_norm(tables: DeviceTables, gathered: torch.Tensor) -> None:
    bucket = tables.buckets[0]
    with _current(tables.device):
        launch = _finalizer(tables.device, bucket.args.norm_type)
        launch(bucket.args.step_table, gathered.data_ptr(), gathered.shape[0])


@functools.cache
def _finalizer(device: torch.device, norm_type: int) -> Callable[..., None]:
    return _launcher("finalize_pass", 1, 3, {"TYPE": norm_type}, TILES["norm"])


def measure(tables: DeviceTables) -> None:
    with _current(tables.device):
        _launch("measure", tables)


def update(tables: DeviceTables) -> None:
    with _current(tables.device):
        _launch("update", tables)


def accumulate(tables: DeviceTables) -> None:
    with _current(tables.device):
        _launch("accumulate", tables)


def scale(tables: DeviceTables) -> None:
    with _current(tables.device):
        _launch("scale", tables)


def repeat(tables: DeviceTables, passes: tuple[str, ...]) -> None:
    """``begin`` and the passes, where nothing but gradients and hyper-parameters differs from the step before."""
    with _current(tables.device):
        for bucket in tables.buckets:
            bucket.args.step_table = bucket.staging.send(bucket)
        for name in ("norm", "measure", "update"):
            if name == "measure" or name in passes:
                _launch(name, tables, *((1,) if name == "norm" else ()))
