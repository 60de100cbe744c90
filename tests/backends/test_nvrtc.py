"""Compiling, and the cache on disk: what it trusts, and what it survives. Every kernel: test_every_kernel.py."""

import ctypes.util
import hashlib
import importlib.metadata
import subprocess
import sys
import warnings
from types import ModuleType

import pytest

from fusedopt.backends import nvrtc

ARCH = "sm_90"  # kernels are tuned on it
KERNEL = nvrtc.FINALIZE  # the smallest
OTHER_KERNEL = nvrtc.upload_kernel(nvrtc.SMALL_TABLE)
CUBIN = b"\x7fELF" + bytes(range(256)) * 8


class Broken:
    """Where a ``KernelSpec`` is expected."""

    def source(self) -> str:
        return "__global__ void f() { no_such_function(); }"


def test_compiler_errors_are_shown():
    with pytest.raises(RuntimeError, match=r"NVRTC could not compile .* for sm_90.*(?s:.)*no_such_function"):
        nvrtc.compile_kernel(Broken(), ARCH)


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


def test_cuda_core_before_1_has_the_compiler_elsewhere(monkeypatch):
    cuda = importlib.import_module("cuda")
    old, compiler = ModuleType("cuda.core"), ModuleType("cuda.core.experimental")
    old.experimental, compiler.Program = compiler, object
    monkeypatch.setattr(cuda, "core", old, raising=False)
    for module in (old, compiler):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert nvrtc._cuda_core() is compiler


def test_missing_sources_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "__file__", str(tmp_path / "fusedopt" / "backends" / "nvrtc.py"))
    with pytest.raises(RuntimeError, match=r"the CUDA sources are missing from .*reinstall the package"):
        nvrtc.source_dir.__wrapped__()


def test_nvrtc_is_found_as_a_package_or_on_the_system(monkeypatch):
    """By its package; else by what looks for libraries, and by the linker's own search where that is missing."""
    assert nvrtc.has_nvrtc()

    def no_package(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def not_found(name):
        raise OSError(name)

    monkeypatch.setattr(importlib.metadata, "version", no_package)
    pathfinder = ModuleType("cuda.pathfinder")
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    for search, found in ((lambda name: name, True), (not_found, False)):
        pathfinder.load_nvidia_dynamic_lib = search
        assert nvrtc.has_nvrtc() is found
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    for library in ("libnvrtc.so.13", None):
        monkeypatch.setattr(ctypes.util, "find_library", lambda _, library=library: library)
        assert nvrtc.has_nvrtc() is (library is not None)


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
