"""A process that has torch and pytest loaded already, and runs tests in forks of itself: most of the time that a few
quick tests take is the import of torch.

Started as ``python forker.py``; see ``Forker``. Reads lines of JSON, each the arguments of one run of pytest, and
answers each with a line, the exit code (of a signal: negative) and the output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["Forker"]


class Forker:
    """From outside. folder: where tests run, and what they import first. Answers wait; one run at a time."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, arguments: list[str], seconds: int) -> tuple[int, str]:
        """Exit code, -SIGALRM where it took longer than that, and output."""
        print(json.dumps([seconds, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("mutation: the process that runs the tests is gone")
        code, output = json.loads(answer)
        return code, output

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _run(seconds: int, arguments: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            signal.alarm(seconds)
            code = 3  # of pytest: an internal error
            try:
                sys.path.insert(0, os.getcwd())
                code = int(pytest.main(arguments))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)
