"""Compiling every CUDA kernel, which needs no GPU, and the cache on disk: what it trusts, and what it survives."""

import hashlib
import struct
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch

from fusedopt import formats
from fusedopt.backends import nvrtc
from fusedopt.specs import DTYPES, PARAM_FORMATS, RULES

ARCH = "sm_90"  # kernels are tuned on it
KERNEL = nvrtc.FINALIZE  # the smallest
OTHER_KERNEL = nvrtc.upload_kernel(nvrtc.SMALL_TABLE)
CUBIN = b"\x7fELF" + bytes(range(256)) * 8


# ---- every kernel -------------------------------------------------------------------------------------------------


def sections(cubin: bytes):
    """(name, content) of each section of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        yield cubin[start : cubin.index(b"\0", start)].decode(), cubin[offset : offset + length]


def frame_bytes(cubin: bytes) -> int:
    """The largest stack frame of a cubin's functions: spilled registers, and arrays with an index known at run time.

    The compiler records it in section .nv.info, a list of (format, attribute, value or length of a value). Attribute
    0x11, EIATTR_FRAME_SIZE, holds the function's number and its bytes.
    """
    frames = []
    for content in (content for name, content in sections(cubin) if name == ".nv.info"):
        at = 0
        while at < len(content):
            kind, attribute, value = struct.unpack_from("<2BH", content, at)
            length = value if kind == 4 else 0
            if attribute == 0x11:
                frames.append(struct.unpack_from("<2I", content, at + 4)[1])
            at += 4 + length
    return max(frames)


@dataclass(frozen=True)
class Source:
    """A kernel written out, where a ``KernelSpec`` is expected."""

    text: str

    def source(self) -> str:
        return self.text


# Rules, and formats of parameters and states, whose figures the benchmarks show.
MEASURED_RULES = ("adam", "adamw", "lion", "sgd", "sgd_momentum", "rmsprop", "adagrad")
MEASURED_FORMATS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16+master", "float32"),
    ("float16+master", "float32"),
    ("split16", "float32"),
    ("split16", "bfloat16"),
    ("bfloat16+stochastic", "bfloat16+stochastic"),
)
TWO_PHASES = {spec.cpp for spec in RULES.values() if spec.norms}
OTHER_STRUCTS = {spec.cpp for name, spec in RULES.items() if name not in MEASURED_RULES}


def measured_kernels(rule: str) -> list[nvrtc.KernelSpec]:
    return [nvrtc.update_kernel(rule, param, PARAM_FORMATS[param].dtype, state) for param, state in MEASURED_FORMATS]


# Where launch bounds leave too few registers, the compiler spills some; never whole vectors. Largest frame in bytes,
# with NVRTC 13.5, on the architecture that kernels are tuned on and on the others. All other kernels have none.
SPILLED_BYTES = {
    "norm of float64": (72, 96),
    "norm": (0, 56),
    "norm, small models": (16, 16),
    "update, small models": (16, 32),
    "accumulation of float64": (80, 104),
    "update, int8 states": (48, 48),
    "update, stochastic states": (0, 40),
    "update, other rules": (48, 48),
    "update, two phases": (56, 64),
}


def spills_as(kernel: nvrtc.KernelSpec) -> str | None:
    """The row of `SPILLED_BYTES`."""
    if kernel.template == "norm_pass":
        if "Float64" in kernel.arguments:
            return "norm of float64"
        return "norm, small models" if "Tuning::kLatency" in kernel.arguments else "norm"
    if kernel.template == "update_pass" and kernel.arguments[1] == "PlainFloat64" and "NoMain" not in kernel.arguments:
        return "accumulation of float64"
    if TWO_PHASES & set(kernel.arguments):
        return "update, two phases"
    if OTHER_STRUCTS & set(kernel.arguments):
        return "update, other rules"
    if "Int8State" in kernel.arguments:
        return "update, int8 states"
    if "StochasticState" in kernel.arguments:
        return "update, stochastic states"
    return "update, small models" if "Tuning::kLatency" in kernel.arguments else None


def allowed_frame_bytes(kernel: nvrtc.KernelSpec, arch: str) -> int:
    row = spills_as(kernel)
    return SPILLED_BYTES[row][arch != ARCH] if row else 0


def compile_all(kernels, arch) -> None:
    """Each must become a cubin that has its entry point and keeps its vectors in registers."""
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda kernel: nvrtc.compile_kernel(kernel, arch), kernels))
    assert all(cubin.startswith(b"\x7fELF") and nvrtc.ENTRY.encode() in cubin for cubin in cubins)
    frames = {kernel: frame_bytes(cubin) for kernel, cubin in zip(kernels, cubins, strict=True)}
    assert not {kernel: size for kernel, size in frames.items() if size > allowed_frame_bytes(kernel, arch)}


TABLES = {"small": nvrtc.SMALL_TABLE, "medium": nvrtc.MEDIUM_TABLE, "large": nvrtc.LARGE_TABLE, "device": 0}

# All kernels for all architectures would take an hour: five times some 1,800, a third of a second each. A kernel is
# made of formats, rules and tables, each written once, so it is enough that each of them meets each architecture. Every
# kernel is compiled for one, in turn; these for all of them:
EVERYWHERE = ("adamw", "lion")  # in all formats of parameters and states; other rules in plain ones


def plain_kernels(rule: str) -> list[nvrtc.KernelSpec]:
    """Parameters, gradients and states of one dtype, with the smallest table; all phases."""
    small_model = nvrtc.update_kernel(rule, "float32", "float32", "float32", latency_bound=True)
    return nvrtc.with_measuring([*(nvrtc.update_kernel(rule, dtype, dtype, dtype) for dtype in DTYPES), small_model])


def format_kernels(rule: str) -> list[nvrtc.KernelSpec]:
    """All formats of parameters and states, with gradients of the parameter's dtype."""
    chosen = [row for row in nvrtc.combinations() if row[1] == PARAM_FORMATS[row[0]].dtype]
    return [nvrtc.update_kernel(rule, *row) for row in chosen]


def accumulation_kernels() -> list[nvrtc.KernelSpec]:
    """The passes over main gradients: updates in all formats for one rule, in plain ones for the others."""
    kernels = [*nvrtc.accumulated_gradient_kernels(), *nvrtc.accumulation_kernels("adamw")]
    for rule in RULES:
        mains = {dtype: "float64" if dtype == "float64" else "float32" for dtype in DTYPES}
        updates = [nvrtc.update_kernel(rule, dtype, dtype, dtype, main=main) for dtype, main in mains.items()]
        kernels += nvrtc.with_measuring(updates)
    return list(dict.fromkeys(kernels))


@cache
def kernels_for(arch: str) -> list[nvrtc.KernelSpec]:
    """What is compiled for this architecture."""
    turn, turns = nvrtc.ARCHITECTURES.index(arch), len(nvrtc.ARCHITECTURES)
    chosen = []
    for r, rule in enumerate(RULES):  # shifted, so that a format meets another architecture with each rule
        kernels = nvrtc.update_kernels(rule)
        chosen += [kernel for i, kernel in enumerate(kernels) if (i + r) % turns == turn]
        chosen += plain_kernels(rule) + (format_kernels(rule) if rule in EVERYWHERE else [])
        chosen += measured_kernels(rule) if arch == ARCH and rule in MEASURED_RULES else []
    chosen += [kernel for i, kernel in enumerate(nvrtc.common_kernels()) if i % turns == turn]
    chosen += [kernel for kernel in nvrtc.common_kernels() if kernel.template in ("finalize_pass", "upload")]
    chosen += [kernel for i, kernel in enumerate(accumulation_kernels()) if i % turns == turn]
    chosen += nvrtc.gradient_kernels() if arch == ARCH else []
    return list(dict.fromkeys(chosen))


PARTS = 8  # of an architecture's kernels, so that processes can share the work


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_every_kernel_compiles(arch, part):
    """Without spilling more than `SPILLED_BYTES`."""
    compile_all(kernels_for(arch)[part::PARTS], arch)


def test_every_kernel_is_compiled():
    """For some architecture, every one; for every architecture, every rule, format, dtype and table."""
    compiled = [set(kernels_for(arch)) for arch in nvrtc.ARCHITECTURES]
    every = {*nvrtc.all_kernels(), *accumulation_kernels()}
    assert set.union(*compiled) == every
    parts = {part for kernel in every for part in parts_of(kernel)}
    assert {table for table in TABLES.values()} <= parts
    assert all({part for kernel in kernels for part in parts_of(kernel)} == parts for kernels in compiled)


def parts_of(kernel: nvrtc.KernelSpec) -> tuple:
    return (kernel.template, kernel.table_bytes, *kernel.arguments)


@pytest.mark.parametrize("rule", MEASURED_RULES)
def test_what_is_measured_may_not_spill(rule):
    """The figures of the benchmarks are those of kernels whose limit is 0, but for int8 states."""
    for kernel in measured_kernels(rule):
        assert kernel in kernels_for(ARCH) and allowed_frame_bytes(kernel, ARCH) == 0


@pytest.mark.parametrize("rule", MEASURED_RULES)
def test_float32_main_gradients_may_not_spill(rule):
    """Nor those of small models, where masters, splits and plain parameters have no 8-bit states."""
    kernels = [
        nvrtc.update_kernel(rule, param, PARAM_FORMATS[param].dtype, state, latency_bound=low, main="float32")
        for param, state, low in (
            ("float32", "float32", False),
            ("bfloat16", "bfloat16", False),
            ("bfloat16+master", "float32", False),
            ("float16+master", "float32", False),
            ("split16", "float32", False),
            ("split16", "bfloat16", False),
            ("split8", "float32", False),
        )
    ]
    assert set(kernels) <= set(nvrtc.accumulation_kernels(rule))
    assert all(allowed_frame_bytes(kernel, ARCH) == 0 for kernel in kernels)


def test_combinations_are_those_that_options_give():
    """Parameter and state formats that some param group asks for, each with gradients of every dtype that may be."""
    found, large = set(), 4096
    for dtype, master, state, stochastic in product(
        DTYPES, formats.MASTER_WEIGHTS, formats.STATE_DTYPES, (False, True)
    ):
        group = {"master_weights": master, "state_dtype": state, "stochastic_rounding": stochastic}
        param = torch.zeros(large, dtype=getattr(torch, dtype))
        try:
            formats.check_format_options("group", group, RULES["adamw"])
            chosen = formats.param_format("p", group, param.dtype).name, formats.state_format("p", group, param).name
        except ValueError:
            continue
        found |= {(chosen[0], grad, chosen[1]) for grad in DTYPES if (grad == "float64") == (dtype == "float64")}
    assert set(nvrtc.combinations()) == found
    assert len(nvrtc.combinations()) == len(found)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_local_memory_is_noticed(arch):
    """64 floats with an index known at run time."""
    kernel = Source(
        'extern "C" __global__ void fusedopt_entry(float* x, int n) {'
        "  float a[64];"
        "  for (int i = 0; i < n; ++i) a[i * 7 % 64] = x[i];"
        "  for (int i = 0; i < n; ++i) x[i] = a[i * 5 % 64];"
        "}"
    )
    assert frame_bytes(nvrtc.compile_kernel(kernel, arch)) == 64 * 4


def test_compiler_errors_are_shown():
    with pytest.raises(RuntimeError, match=r"NVRTC could not compile .* for sm_90.*(?s:.)*no_such_function"):
        nvrtc.compile_kernel(Source("__global__ void f() { no_such_function(); }"), ARCH)


def test_unknown_architecture_is_named():
    with pytest.raises(RuntimeError, match="for sm_1"):
        nvrtc.compile_kernel(KERNEL, "sm_1")


def test_threads_may_compile_at_once():
    """Also the first time in a process, when both import the compiler."""
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from fusedopt.backends import nvrtc\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        f"    cubins = list(pool.map(lambda _: nvrtc.compile_kernel(nvrtc.FINALIZE, '{ARCH}'), range(2)))\n"
        "assert cubins[0] == cubins[1]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- the compiler is missing --------------------------------------------------------------------------------------


@pytest.fixture
def no_cuda_core(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("cuda.core")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda.core", None)


@pytest.mark.parametrize("function", [nvrtc.require_compiler, lambda: nvrtc.compile_kernel(KERNEL, ARCH)])
def test_missing_cuda_core_names_the_remedy(no_cuda_core, function):
    with pytest.raises(RuntimeError, match=r"cuda-core .*pip install 'fusedopt\[cuda\]'.*nvidia-cuda-nvrtc"):
        function()


def test_missing_cuda_package_names_the_remedy(monkeypatch):
    """Not even the namespace package ``cuda``."""
    for name in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fusedopt\[cuda\]'"):
        nvrtc.require_compiler()


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache that has not warned yet."""
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "_warned", set())
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that returns `CUBIN`, and the list of what it was asked for."""
    calls = []

    def compile_kernel(kernel, arch):
        calls.append((kernel, arch))
        return CUBIN

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    return calls


@pytest.fixture
def entry(folder, compiled):
    """The file of `KERNEL`, written as ever."""
    nvrtc.get_cubin(KERNEL, ARCH)
    compiled.clear()
    (path,) = folder.iterdir()
    return path


def get_silently(kernel=KERNEL, arch=ARCH) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return nvrtc.get_cubin(kernel, arch)


def test_hit(entry, compiled):
    assert get_silently() == CUBIN
    assert not compiled


@pytest.mark.parametrize("kernel, arch", [(OTHER_KERNEL, ARCH), (KERNEL, "sm_80")], ids=["kernel", "architecture"])
def test_each_kernel_and_architecture_has_its_entry(entry, compiled, kernel, arch):
    assert get_silently(kernel, arch) == CUBIN
    assert compiled == [(kernel, arch)]
    assert len(list(entry.parent.iterdir())) == 2


@pytest.mark.parametrize("part", ["_source_hash", "_compiler_version"])
def test_other_sources_and_compilers_have_entries_of_their_own(entry, compiled, monkeypatch, part):
    known = getattr(nvrtc, part)()
    monkeypatch.setattr(nvrtc, part, lambda: known[:-1])
    assert get_silently() == CUBIN
    assert compiled == [(KERNEL, ARCH)]


def test_options_are_part_of_the_key(entry, compiled, monkeypatch):
    monkeypatch.setitem(nvrtc.DEFINES, "FUSEDOPT_OTHER_TUNING", 1)
    assert get_silently() == CUBIN
    assert compiled == [(KERNEL, ARCH)]


def test_every_header_is_part_of_the_key(tmp_path, monkeypatch):
    """One byte in any file that NVRTC may read."""
    hashes = set()
    for folder in ("core", "cuda", "formats", "rules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.h").write_text("// 0")
    monkeypatch.setattr(nvrtc, "source_dir", lambda: tmp_path)
    for folder in ("core", "cuda", "formats", "rules"):
        hashes.add(nvrtc._source_hash.__wrapped__())
        (tmp_path / folder / "a.h").write_text("// 1")
    assert len(hashes | {nvrtc._source_hash.__wrapped__()}) == 5


def assert_recompiled(entry, compiled):
    """A warning, once; then the entry is as good as new."""
    with pytest.warns(UserWarning, match="damaged or foreign.*compiled again.*FUSEDOPT_CACHE_DIR") as caught:
        assert nvrtc.get_cubin(KERNEL, ARCH) == CUBIN
    assert len(caught) == 1 and str(entry.parent) in str(caught[0].message)
    assert compiled == [(KERNEL, ARCH)]
    assert get_silently() == CUBIN
    assert compiled == [(KERNEL, ARCH)]


@pytest.mark.parametrize("at", [0, 20, 60, -1], ids=["magic", "checksum", "first_byte", "last_byte"])
def test_a_damaged_entry_is_compiled_again(entry, compiled, at):
    content = bytearray(entry.read_bytes())
    content[at] ^= 1
    entry.write_bytes(content)
    assert_recompiled(entry, compiled)


@pytest.mark.parametrize("length", [0, 5, 17, 48, 49, 1000, -1])
def test_a_truncated_entry_is_compiled_again(entry, compiled, length):
    entry.write_bytes(entry.read_bytes()[:length])
    assert_recompiled(entry, compiled)


@pytest.mark.parametrize("content", [CUBIN, CUBIN + b"longer", b"#!/bin/sh\n"], ids=["bare", "longer", "script"])
def test_a_foreign_entry_is_compiled_again(entry, compiled, content):
    entry.write_bytes(content)
    assert_recompiled(entry, compiled)


def test_an_intact_entry_of_another_kernel_is_compiled_again(entry, compiled):
    nvrtc.get_cubin(OTHER_KERNEL, ARCH)
    compiled.clear()
    (other,) = set(entry.parent.iterdir()) - {entry}
    entry.write_bytes(other.read_bytes())
    assert_recompiled(entry, compiled)


def test_a_second_damaged_entry_does_not_warn_again(entry, compiled):
    entry.write_bytes(b"")
    assert_recompiled(entry, compiled)
    entry.write_bytes(b"")
    assert get_silently() == CUBIN


def assert_works_unwritten(folder):
    """Compiles, warns once, and leaves nothing half-written behind."""
    with pytest.warns(UserWarning, match="could not be.*compiled again.*FUSEDOPT_CACHE_DIR") as caught:
        assert nvrtc.get_cubin(KERNEL, ARCH) == CUBIN
        assert nvrtc.get_cubin(OTHER_KERNEL, ARCH) == CUBIN
    assert len(caught) == 1 and str(folder) in str(caught[0].message)
    assert not folder.is_dir() or not list(folder.glob(".partial-*"))


def test_a_file_where_the_folder_should_be(folder, compiled):
    folder.write_text("in the way")
    assert_works_unwritten(folder)
    assert folder.read_text() == "in the way"


def test_a_folder_that_cannot_be_made(folder, compiled, monkeypatch):
    folder.write_text("in the way")
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(folder / "below"))
    assert_works_unwritten(folder / "below")


def test_a_folder_where_the_file_should_be(entry, compiled):
    entry.unlink()
    entry.mkdir()
    assert_works_unwritten(entry.parent)


def test_a_full_disk(folder, compiled, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.os, "replace", replace)
    assert_works_unwritten(folder)
    assert not list(folder.iterdir())


@pytest.fixture
def read_only(entry):
    entry.parent.chmod(0o500)
    yield entry
    entry.parent.chmod(0o700)


def test_a_read_only_cache_is_used(read_only, compiled):
    assert get_silently() == CUBIN
    assert not compiled


def test_a_read_only_cache_is_not_written(read_only, compiled):
    try:
        (read_only.parent / "probe").touch()
    except PermissionError:
        with pytest.warns(UserWarning, match="could not be written"):
            assert nvrtc.get_cubin(OTHER_KERNEL, ARCH) == CUBIN
    else:
        pytest.skip("this user may write anywhere")


def test_processes_may_start_cold_at_once(folder):
    """They all compile, none fails, and one entry is left that the next one trusts."""
    script = (
        "import hashlib\n"
        "from fusedopt.backends import nvrtc\n"
        "print('ready', flush=True)\n"
        "input()\n"
        f"print(hashlib.sha256(nvrtc.get_cubin(nvrtc.FINALIZE, '{ARCH}')).hexdigest())\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], results
    (path,) = folder.iterdir()
    assert path.suffix == ".cubin"
    expected = hashlib.sha256(get_silently()).hexdigest()
    assert [output for output, _ in results] == [f"{expected}\n"] * 3


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FUSEDOPT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert nvrtc.cache_dir() == tmp_path / "home" / ".cache" / "fusedopt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert nvrtc.cache_dir() == tmp_path / "xdg" / "fusedopt"
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path / "own"))
    assert nvrtc.cache_dir() == tmp_path / "own"
    for name in ("FUSEDOPT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert nvrtc.cache_dir() == tmp_path / "home" / ".cache" / "fusedopt"
