"""The thread pool of the CPU engine under ThreadSanitizer, in a program without Python or torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "c++")


def build(folder: Path, *flags: str) -> Path:
    program = folder / "thread_pool"
    sources = [str(TESTS / "thread_pool.cpp"), str(CSRC / "host/threads.cpp")]
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-pthread", *flags, f"-I{CSRC}", *sources, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "sanitize" in done.stderr + " ".join(flags) and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_no_data_races(tmp_path):
    program = build(tmp_path, "-fsanitize=thread")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=120)
    if (
        "unexpected memory mapping" in done.stderr
    ):  # of kernels that place programs where this compiler's does not reach
        pytest.skip("ThreadSanitizer does not start on this kernel")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-4000:]
