"""The cache of CUDA kernels on disks that are full, and with many processes that start at once.

Damaged, truncated, foreign and read-only caches: tests/backends/test_nvrtc.py. Kernels compile without a GPU.
"""

import hashlib
import os
import subprocess
import sys

import pytest

from fusedopt.backends import nvrtc

pytest.importorskip("cuda.core")
ARCH = "sm_80"
PROCESSES = 8

COMPILE = f"""
import sys, warnings
from fusedopt.backends import nvrtc
cubin = bytes(range(256)) * 400
nvrtc.compile_kernel = lambda kernel, arch: cubin
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for kernel in (nvrtc.FINALIZE, nvrtc.upload_kernel(3840), nvrtc.FINALIZE):
        assert nvrtc.get_cubin(kernel, "{ARCH}") == cubin
print(len(caught), *(str(each.message) for each in caught))
"""


def run(prefix, folder, script=COMPILE):
    env = {**os.environ, "FUSEDOPT_CACHE_DIR": str(folder)}
    return subprocess.run([*prefix, sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)


def may_mount(folder) -> list[str]:
    """The command that runs another one with a full-to-be tmpfs of 64 KiB mounted there; [] where that is forbidden."""
    mount = f'mount -t tmpfs -o size=64k none "{folder}" && exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return prefix if done.returncode == 0 else []


LISTED = COMPILE + "import os; print(sorted(os.listdir(nvrtc.cache_dir())))\n"


def assert_one_warning(done):
    assert done.returncode == 0, done.stderr
    first, left = done.stdout.splitlines()
    assert first.startswith("1 ") and "could not be written" in first and "FUSEDOPT_CACHE_DIR" in first
    assert left == "[]", "something half-written was left behind"


def test_full_disk(tmp_path):
    """A tmpfs of 64 KiB for entries of 100: they are used without being kept, with one warning."""
    prefix = may_mount(tmp_path)
    if not prefix:
        pytest.skip("nothing may be mounted here; test_limited_file_size stands in")
    done = run(prefix, tmp_path, LISTED)
    assert_one_warning(done)
    assert "No space left" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_limited_file_size(tmp_path):
    """The same where a write fails half-way because files may not grow beyond 32 KiB."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))\n"
    assert_one_warning(run([], tmp_path, limit + LISTED))


FORKED = f"""
import hashlib, os, sys
from fusedopt.backends import nvrtc
read, write = os.pipe()
children = []
for _ in range({PROCESSES}):
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # until all are there: end of file for all at once
        nvrtc.warnings.simplefilter("error")
        cubin = nvrtc.get_cubin(nvrtc.FINALIZE, "{ARCH}")
        os.write(1, hashlib.sha256(cubin).hexdigest().encode() + b"\\n")
        os._exit(0)
    children.append(child)
os.close(write)
assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_eight_processes_start_cold_at_once(tmp_path, monkeypatch):
    """Each compiles, none fails or warns, and one entry is left that the next one trusts."""
    done = run([], tmp_path, FORKED)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".cubin"
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_kernel", None)  # it is not called
    expected = hashlib.sha256(nvrtc.get_cubin(nvrtc.FINALIZE, ARCH)).hexdigest()
    assert done.stdout.split() == [expected] * PROCESSES
