"""Compiles the CUDA engine at run time, for one combination at a time, and keeps the result on disk.

The key of a cache entry is a hash of every source, the entry point, the options, the architecture and the compiler's
version, so an entry never has to be invalidated. Entries carry a checksum; one that is damaged, or that somebody
else put there, is compiled again. Files appear by renaming, so many processes may start at once.
"""

from __future__ import annotations

import ctypes.util
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..specs import CUDA_CHUNK, CUDA_CHUNK_BLOCKED, DTYPES, NORM_TYPES, PARAM_FORMATS, RULES, STATE_FORMATS

__all__ = [
    "ARCHITECTURES",
    "KernelSpec",
    "accumulated_gradient_kernels",
    "accumulation_kernels",
    "all_kernels",
    "cache_dir",
    "common_kernels",
    "compile_kernel",
    "get_cubin",
    "has_nvrtc",
    "require_compiler",
    "with_measuring",
]

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
"""What continuous integration compiles for. Any architecture that NVRTC knows works."""

ENTRY = "fusedopt_entry"
_MAGIC = b"fusedopt-cubin-1\n"

# Bytes of step table that a kernel parameter may carry beside PassArgs. 4,096 bytes of parameters is what every driver
# takes; 32,764 need CUDA 12.1 and sm_70. A launch copies all of it, which takes time: hence the one between.
SMALL_TABLE = 3840
MEDIUM_TABLE = 11776
LARGE_TABLE = 32256

DEFINES: dict[str, object] = {}
"""Macros for trying other tunings (``csrc/cuda/tuning.cuh``); ``benchmarks/variants.py`` sets them."""


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: the template and its arguments, and how it receives the step table.

    table_bytes: capacity of the step table as a kernel parameter; 0 for a table in device memory.
    chunk: elements of a chunk.
    """

    template: str
    arguments: tuple[str, ...] = ()
    table_bytes: int = SMALL_TABLE
    chunk: int = CUDA_CHUNK

    def _blocks(self) -> str:
        """Blocks per multiprocessor that the compiler must leave registers for."""
        if self.template in ("update_pass", "measure_pass"):
            return f"Update<{', '.join(self.arguments)}>::kBlocksPerMultiprocessor"
        return f"FUSEDOPT_NORM_BLOCKS({self.arguments[-1]})" if self.template == "norm_pass" else "1"

    def source(self) -> str:
        call = f"{self.template}<{', '.join(self.arguments)}>" if self.arguments else self.template
        parameters, table = "const __grid_constant__ PassArgs args", ""
        if self.template == "upload":
            parameters, arguments = "char* to, int bytes", "to, bytes, table"
        elif self.template == "finalize_pass":
            arguments = "args"
        else:
            arguments = "args, table"
        if self.template != "finalize_pass":
            if self.table_bytes:
                parameters += f", const __grid_constant__ StepTable<{self.table_bytes}> table"
            else:
                table = "const auto& table = *reinterpret_cast<const StepTable<16>*>(args.step_table);"
        return (
            f'#define FUSEDOPT_CHUNK {self.chunk}\n#include "cuda/engine.cuh"\n'
            "using namespace fusedopt;\nusing namespace fusedopt::cuda;\n"
            f'extern "C" __global__ void __launch_bounds__(kThreads, {self._blocks()}) {ENTRY}({parameters}) {{\n'
            f"  {table}\n  {call}({arguments});\n}}\n"
        )


def _tuning(latency_bound: bool) -> str:
    return "Tuning::kLatency" if latency_bound else "Tuning::kBandwidth"


def _main(main: str | None) -> str:
    return DTYPES[main].cpp if main else "NoMain"


def update_kernel(
    rule: str,
    param: str,
    grad: str,
    state: str,
    table_bytes: int = SMALL_TABLE,
    latency_bound: bool = False,
    main: str | None = None,
) -> KernelSpec:
    """The update pass of a rule.

    param, state: names of formats; grad, main: names of the dtypes of gradients and main gradients, the latter None
    where nobody accumulates. latency_bound: for models of a few million parameters. A rule without states has one
    kernel for all formats of states.
    """
    if not RULES[rule].states:
        state = "float64" if param == "float64" else "float32"
    formats = (PARAM_FORMATS[param].cpp, DTYPES[grad].cpp, STATE_FORMATS[state].cpp, _main(main))
    chunk = CUDA_CHUNK_BLOCKED if STATE_FORMATS[state].blocked else CUDA_CHUNK
    return KernelSpec("update_pass", (RULES[rule].cpp, *formats, _tuning(latency_bound)), table_bytes, chunk)


def measure_kernel(rule: str, *arguments: Any, **keywords: Any) -> KernelSpec:
    """The measure pass of a rule of two phases. Arguments: as ``update_kernel``."""
    return replace(update_kernel(rule, *arguments, **keywords), template="measure_pass")


def with_measuring(updates: Iterable[KernelSpec]) -> list[KernelSpec]:
    """Update kernels, each once, with the measure kernels of those whose rules have two phases."""
    measured = {spec.cpp for spec in RULES.values() if spec.norms}
    unique = list(dict.fromkeys(updates))
    return unique + [replace(each, template="measure_pass") for each in unique if each.arguments[0] in measured]


def norm_kernel(
    grad: str,
    norm_type: float,
    table_bytes: int = SMALL_TABLE,
    latency_bound: bool = False,
    chunk: int = CUDA_CHUNK,
    main: str | None = None,
) -> KernelSpec:
    """The norm pass for gradients of one dtype. latency_bound: for models of a few million parameters."""
    arguments = (DTYPES[grad].cpp, _main(main), f"NormType::{NORM_TYPES[norm_type][0]}", _tuning(latency_bound))
    return KernelSpec("norm_pass", arguments, table_bytes, chunk)


def accumulate_kernel(grad: str, main: str, table_bytes: int = SMALL_TABLE) -> KernelSpec:
    """Gradients added to main gradients."""
    return KernelSpec("accumulate_pass", (DTYPES[grad].cpp, DTYPES[main].cpp), table_bytes)


def scale_kernel(grad: str, table_bytes: int = SMALL_TABLE) -> KernelSpec:
    """Gradients scaled in place."""
    return KernelSpec("scale_pass", (DTYPES[grad].cpp,), table_bytes)


FINALIZE = KernelSpec("finalize_pass")


def upload_kernel(table_bytes: int) -> KernelSpec:
    """Copies a part of the step table to the device."""
    return KernelSpec("upload", (), table_bytes)


def combinations() -> list[tuple[str, str, str]]:
    """(parameter format, gradient dtype, state format) of every update that can be asked for."""
    return [
        (param, grad, state)
        for param, spec in PARAM_FORMATS.items()
        for grad in DTYPES
        for state, state_spec in STATE_FORMATS.items()
        if len({name == "float64" for name in (spec.dtype, grad, state)}) == 1
        and (state != "float16" or param == "float16")
        and (state not in ("bfloat16", "bfloat16+stochastic") or spec.random == (state != "bfloat16"))
    ]


def update_kernels(rule: str, table_bytes: int = SMALL_TABLE) -> list[KernelSpec]:
    """The update passes of a rule for every combination of formats, and its measure passes if it has two phases."""
    latency_bound = [formats for formats in combinations() if formats[0] == "float32"]
    return with_measuring(
        [
            *(update_kernel(rule, *formats, table_bytes) for formats in combinations()),
            *(update_kernel(rule, *formats, table_bytes, True) for formats in latency_bound),
        ]
    )


MAIN_DTYPES = ("float32", "bfloat16")
"""Of main gradients, except of float64 parameters."""


def _mains(dtype: str) -> tuple[str, ...]:
    return ("float64",) if dtype == "float64" else MAIN_DTYPES


def accumulation_kernels(rule: str, table_bytes: int = SMALL_TABLE) -> list[KernelSpec]:
    """As ``update_kernels`` where gradients are accumulated, for every dtype of main gradients."""
    return with_measuring(
        update_kernel(rule, param, grad, state, table_bytes, latency_bound, main)
        for param, grad, state in combinations()
        for latency_bound in ((False, True) if param == "float32" else (False,))
        for main in _mains(param)
    )


def accumulated_gradient_kernels(table_bytes: int = SMALL_TABLE) -> list[KernelSpec]:
    """The accumulate passes, and the norm passes over main gradients, for every dtype of both."""
    pairs = [(grad, main) for grad in DTYPES for main in _mains(grad)]
    norms = [
        norm_kernel(grad, norm_type, table_bytes, latency_bound, chunk, main)
        for grad, main in pairs
        for norm_type in NORM_TYPES
        for latency_bound in (False, True)
        for chunk in (CUDA_CHUNK, CUDA_CHUNK_BLOCKED)
    ]
    return norms + [accumulate_kernel(grad, main, table_bytes) for grad, main in pairs]


TABLE_SIZES = (SMALL_TABLE, MEDIUM_TABLE, LARGE_TABLE, 0)


def gradient_kernels(table_bytes: int = SMALL_TABLE) -> list[KernelSpec]:
    """The norm and scale passes for every gradient dtype."""
    norms = [
        norm_kernel(dtype, norm_type, table_bytes, latency_bound, chunk)
        for dtype in DTYPES
        for norm_type in NORM_TYPES
        for latency_bound in (False, True)
        for chunk in (CUDA_CHUNK, CUDA_CHUNK_BLOCKED)
    ]
    return norms + [scale_kernel(dtype, table_bytes) for dtype in DTYPES]


def common_kernels(table_sizes: tuple[int, ...] = TABLE_SIZES) -> list[KernelSpec]:
    """What models of one dtype ask for: plain formats with gradients and states of the parameter's dtype."""
    kernels = [FINALIZE, *(upload_kernel(size) for size in table_sizes if size)]
    for size in table_sizes:
        kernels += gradient_kernels(size)
        for rule in RULES:
            updates = [update_kernel(rule, dtype, dtype, dtype, size) for dtype in DTYPES]
            kernels += with_measuring([*updates, update_kernel(rule, "float32", "float32", "float32", size, True)])
    return kernels


def all_kernels() -> list[KernelSpec]:
    """Every kernel that can be asked for, with the smallest step table; and the common ones with all."""
    kernels = common_kernels()
    for rule in RULES:
        kernels += update_kernels(rule)
    return list(dict.fromkeys(kernels))


# ---- sources --------------------------------------------------------------------------------------------


@functools.cache
def source_dir() -> Path:
    """Where the headers are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "_csrc", package.parent / "csrc"):
        if (path / "cuda" / "engine.cuh").is_file():
            return path
    raise RuntimeError(f"fusedopt: the CUDA sources are missing from {package}; reinstall the package")


@functools.cache
def _source_hash() -> bytes:
    digest = hashlib.sha256()
    for folder in ("core", "cuda", "formats", "rules"):
        for path in sorted((source_dir() / folder).iterdir()):
            if path.suffix in (".h", ".cuh"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


@functools.cache
def _compiler_version() -> str:
    """Versions of the packages that compile. Read from metadata: importing them takes longer than loading a kernel."""
    versions = []
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "cuda-bindings", "cuda-core"):
        try:
            versions.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ",".join(versions)


# ---- compiler -------------------------------------------------------------------------------------------

_REMEDY = (
    "install it with `pip install 'fusedopt[cuda]'` (cuda-core) and, where torch did not bring NVRTC, "
    "`pip install nvidia-cuda-nvrtc` for the CUDA version of your torch; parameters on the CPU need neither"
)


_importing = threading.Lock()  # a thread may find the module half imported by another one


def _cuda_core() -> Any:
    """The module that holds Program: ``cuda.core``, or ``cuda.core.experimental`` before 1.0."""
    try:
        with _importing:
            import cuda.core as core

            if not hasattr(core, "Program"):
                import cuda.core.experimental as core
    except ImportError as error:
        raise RuntimeError(f"fusedopt: cuda-core could not be imported ({error}); {_REMEDY}") from error
    return core


def require_compiler() -> None:
    """RuntimeError with the remedy where cuda-core is missing. Does not import it: a warm cache can do without."""
    try:
        found = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise RuntimeError(f"fusedopt: CUDA kernels are compiled at run time, and cuda-core is missing; {_REMEDY}")


def has_nvrtc() -> bool:
    """Whether NVRTC is installed, as a package or on the system. Does not load it where a package says so."""
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu11"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return ctypes.util.find_library("nvrtc") is not None
    try:
        load_nvidia_dynamic_lib("nvrtc")
    except Exception:  # its exception types moved between its versions
        return False
    return True


def compile_kernel(kernel: KernelSpec, arch: str) -> bytes:
    """Compiles with NVRTC, without a GPU. arch: as "sm_90". RuntimeError with the compiler's log if it fails."""
    core = _cuda_core()
    options = core.ProgramOptions(
        arch=arch,
        std="c++17",
        fma=False,  # as the CPU engine: the same bits everywhere
        include_path=[str(source_dir())],
        define_macro=[(name, str(value)) for name, value in DEFINES.items()] or None,
    )
    try:
        return bytes(core.Program(kernel.source(), "c++", options).compile("cubin").code)
    except Exception as error:  # cuda-core's own exception types moved between its versions
        raise RuntimeError(
            f"fusedopt: NVRTC could not compile {kernel} for {arch}: {error}\nIf NVRTC itself is missing, {_REMEDY}"
        ) from error


# ---- cache ----------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """``$FUSEDOPT_CACHE_DIR``, else ``$XDG_CACHE_HOME/fusedopt``, else ``~/.cache/fusedopt``."""
    if path := os.environ.get("FUSEDOPT_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedopt"


def _cache_path(kernel: KernelSpec, arch: str) -> Path:
    text = "\0".join((kernel.source(), repr(sorted(DEFINES.items())), arch, _compiler_version()))
    key = hashlib.sha256(_source_hash() + text.encode()).hexdigest()
    return cache_dir() / f"{kernel.template}-{arch}-{key[:40]}.cubin"


def _header(path: Path, cubin: bytes) -> bytes:
    """What precedes the cubin: binds it to its key, which the file's name holds."""
    return _MAGIC + hashlib.sha256(path.name.encode() + b"\0" + cubin).digest()


def _read_entry(path: Path) -> bytes | None:
    """The cubin, or None where there is none, or none to be trusted."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_once(path.parent, f"could not be read ({error})")
        return None
    cubin = content[len(_MAGIC) + 32 :]
    if content[: len(_MAGIC) + 32] == _header(path, cubin):
        return cubin
    _warn_once(path.parent, f"holds a damaged or foreign entry, {path.name}")
    return None


def _write_entry(path: Path, cubin: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_header(path, cubin) + cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn_once(path.parent, f"could not be written ({error})")


_warned: set[Path] = set()


def _warn_once(folder: Path, problem: str) -> None:
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            f"fusedopt: the kernel cache {folder} {problem}; the kernel is compiled again. "
            "Set FUSEDOPT_CACHE_DIR to another folder if this persists.",
            stacklevel=2,
        )


def get_cubin(kernel: KernelSpec, arch: str) -> bytes:
    """From the cache, or compiled and put there."""
    path = _cache_path(kernel, arch)
    cubin = _read_entry(path)
    if cubin is None:
        cubin = compile_kernel(kernel, arch)
        _write_entry(path, cubin)
    return cubin
