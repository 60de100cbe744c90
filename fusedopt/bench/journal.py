"""Runs that outlive a library which ends its process (abort(), a segmentation fault, exit() in C++, a lost device) or
hangs.

Nothing in the process can prevent that. So ``fusedopt bench`` measures other projects' libraries in a child process,
which notes in a small file beside the JSON file, the journal, which library of which case it is about to run. Where a
child ends with an entry there, its parent starts another one: that goes on from the JSON file (``--resume``), and the
library's row of that case says how it ended the process.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1

ENOUGH = 2
"""Processes that a library may end: each start takes seconds."""

PATIENCE = 900.0
"""Seconds that a library may take for one turn, before it counts as hanging: torch.compile takes minutes."""


class DeviceLost(RuntimeError):
    """An error after which no kernel runs any more in this process."""


@dataclass(frozen=True)
class Turn:
    """A library that is being run, or that ended the process when it was."""

    case: str
    library: str
    """As it is reported."""
    how: str = "nobody saw how"
    """It ended the process."""

    @property
    def error(self) -> str:
        """For its row."""
        return f"it ended the process: {self.how}"


class Journal:
    """Which library is being run. beside: the JSON file; without one nothing is written down."""

    def __init__(self, beside: Path | None = None, ended: Sequence[Turn] = ()) -> None:
        self.path = beside and beside.with_name(beside.name + ".running")
        self.ended = list(ended)
        """Turns that ended earlier processes of this run."""

    def why_not(self, case: str, library: str) -> str | None:
        """Why a library is not to be run again in a case."""
        cases = {one.case: one for one in self.ended if one.library == library}
        if case in cases:
            return cases[case].error
        return f"not run: it ended the process in {', '.join(cases)}" if len(cases) >= ENOUGH else None

    @contextmanager
    def running(self, case: str, library: str) -> Iterator[None]:
        """Around a library's turn. The entry stays where the process ends, or the device is lost."""
        turn = Turn(case, library)
        self.write(turn)
        try:
            yield
        except DeviceLost as error:
            self.write(replace(turn, how=str(error)))
            raise
        except BaseException:
            self.clear()
            raise
        self.clear()

    def write(self, turn: Turn) -> None:
        if self.path:
            self.path.write_text(json.dumps(asdict(turn)))

    def clear(self) -> None:
        if self.path:
            self.path.unlink(missing_ok=True)

    def age(self) -> float:
        """Seconds since the entry was written; 0 without one."""
        try:
            return time.time() - self.path.stat().st_mtime if self.path else 0.0
        except FileNotFoundError:
            return 0.0

    def read(self) -> Turn | None:
        """The entry that an earlier process has left."""
        if not self.path or not self.path.exists():
            return None
        try:
            return Turn(**json.loads(self.path.read_text()))
        except (ValueError, TypeError):
            return None  # it ended while it wrote


def supervise(arguments: Sequence[str], path: Path, deadline: float, resume: bool) -> int:
    """Runs ``fusedopt`` with these arguments until it has come to its end. Returns its exit code.

    Args:
        path: the JSON file, which the arguments name too.
        deadline: of ``time.monotonic``, handed on as ``--time-limit``.
        resume: whether the first process goes on from an earlier run's file.
    """
    interrupts: list[int] = []
    ended: list[tuple[str, str]] = []
    if resume and (last := Journal(path).read()):
        ended.append((last.case, last.library))  # by an earlier run: a child that leaves the entry refuses that file

    def stop(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if number == signal.SIGTERM:  # a terminal's SIGINT has reached the child already
            child.terminate()

    # Handlers are not inherited, while SIG_IGN would be.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            limit = ["--time-limit", str(max(0.0, deadline - time.monotonic()))] if deadline < float("inf") else []
            child = subprocess.Popen(
                [sys.executable, "-m", "fusedopt", *arguments, *limit, *(["--resume"] if resume else [])]
            )
            code, how = _end_of(child, path)
            turn = Journal(path).read()
            if turn is None or interrupts or (turn.case, turn.library) in ended:
                return _own_exit_code(code)
            ended.append((turn.case, turn.library))
            if turn.how == Turn.how:
                turn = replace(turn, how=how)
                Journal(path).write(turn)
            print(f"{turn.case}: {turn.library}: {turn.error}; going on without it there", file=sys.stderr, flush=True)
            resume = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_of(child: subprocess.Popen[bytes], path: Path) -> tuple[int, str]:
    """Its exit code, and how it ended. A child that hangs in a library's turn is killed."""
    while True:
        try:
            code = child.wait(timeout=1)
            return code, _how(code)
        except subprocess.TimeoutExpired:
            if Journal(path).age() > PATIENCE:
                child.kill()
                return child.wait(), f"killed, since a turn took more than {PATIENCE:g} s"


def _own_exit_code(code: int) -> int:
    if code >= 0:
        return code
    print(f"the process ended ({_how(code)}) outside of every library's turn", file=sys.stderr)
    return 1


def _how(code: int) -> str:
    try:
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:  # of a real-time signal
        return f"signal {-code}"


def end_with_parent() -> None:
    """Has this process told to stop when its parent ends, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
