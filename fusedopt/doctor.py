"""What there is on this machine and whether it works: the text for a bug report, and ``fusedopt doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _C, __version__, backends
from .backends import Availability, nvrtc

__all__ = ["Check", "Report", "examine"]

_PACKAGES = ("fusedopt", "torch", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy")
# Of these cases of ``fusedopt verify``, one for each format.
_SELF_TEST: dict[str, Any] = {
    "rule": ("adamw",),
    "format": ("float32-None_states", "bfloat16-None_states"),
    "transform": ("clip",),
    "case": ("mixed",),
}


class Check(NamedTuple):
    """Something that was tried."""

    name: str
    passed: bool
    detail: str


class Report(NamedTuple):
    """What ``examine`` found."""

    versions: dict[str, str]
    machine: dict[str, str]
    backends: dict[str, Availability]
    cache: dict[str, Any]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self._asdict(),
            "backends": {name: entry._asdict() for name, entry in self.backends.items()},
            "checks": [check._asdict() for check in self.checks],
            "healthy": self.healthy,
        }


def examine() -> Report:
    """Looks at versions, devices, backends and the kernel cache, and makes a few steps on each backend of each device.

    The steps are compared with the float64 reference, as ``fusedopt verify`` does; one second for those of a CPU or of
    a GPU whose kernels are in the cache, some seconds where they have to be compiled.
    """
    checks = [_check_cache()]
    for device in _devices():
        for name in _backends_of(device):
            checks.append(_self_test(device, name))
    return Report(_versions(), _machine(), backends.available(), _cache(), checks)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    found["torch"] = torch.__version__  # says more than its package's
    if found["fusedopt"] != __version__:  # a checkout, perhaps beside another version
        found["fusedopt"] = f"{__version__} in {Path(__file__).parent} (as a package: {found['fusedopt']})"
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.version.hip:
        found["ROCm of torch"] = torch.version.hip
    if torch.cuda.is_available() and not torch.version.hip:
        driver = _C.cuda_driver_version()
        found["CUDA of the driver"] = f"{driver // 1000}.{driver % 1000 // 10}"
    return found


def _machine() -> dict[str, str]:
    found = {
        "system": platform.platform(),
        "CPU": f"{platform.machine()}, {_C.cpu_isa()} kernels, {torch.get_num_threads()} threads",
        "tensors are read": "in place"
        if _C.has_tensor_layout()
        else "through torch's C functions"
        if _C.has_torch_functions()
        else "through Python: slow, this version of torch is not known",
        "FUSEDOPT_BACKEND": os.environ.get("FUSEDOPT_BACKEND", "not set"),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def _cache() -> dict[str, Any]:
    folder = nvrtc.cache_dir()
    sizes = [entry.stat().st_size for entry in folder.glob("*.cubin")] if folder.is_dir() else []
    return {"folder": str(folder), "kernels": len(sizes), "bytes": sum(sizes)}


def _check_cache() -> Check:
    """Whether kernels can be kept: without it every process compiles its own."""
    folder = nvrtc.cache_dir()
    existing: Path = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{existing} cannot be written: {error.strerror}; set FUSEDOPT_CACHE_DIR to a folder that can"
        return Check("kernel cache", False, detail)
    return Check("kernel cache", True, f"{folder} can be written")


def _devices() -> list[str]:
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return found


def _backends_of(device: str) -> list[str]:
    from .testing.cases import own_backends

    return own_backends(device)


def _self_test(device: str, backend: str) -> Check:
    from .testing import plan, verify

    name, start = f"steps on {device} with backend {backend}", time.perf_counter()
    try:
        planned = plan(device=device, backend=(backend,), **_SELF_TEST)
        planned.cases = list({case.format: case for case in planned.cases}.values())
        run = verify(planned=planned)
    except RuntimeError as error:  # a compiler or a driver that fails: what the report is for
        return Check(name, False, str(error))
    seconds = time.perf_counter() - start
    if run.failed:
        return Check(name, False, run.failed[0].error)
    return Check(name, True, f"{len(run.judged)} within the bounds of the float64 reference, {seconds:.1f} s")
