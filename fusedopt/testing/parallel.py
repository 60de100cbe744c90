"""Cases in several processes. A case that kills its process, or spoils its GPU context, is one failed case."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait

import torch

from .cases import Case
from .runner import Result, run_case

__all__ = ["run_in_processes"]

PIECE = 128
"""Cases that a process is given at a time, at most: more than a rule has in most formats, so that no two processes
compile the same kernels at once."""


def run_in_processes(cases: list[Case], factory: Callable | None, jobs: int) -> Iterator[tuple[int, Result]]:
    """Each case's index with its result, as they come. Cases of one rule and format share a process, and its kernels.

    Raises:
        ValueError: a factory or a case that another process cannot be given, such as a lambda.
        RuntimeError: a process ended before it could read its first cases; or one after the other did in its first.
    """
    size = max(1, min(PIECE, len(cases) // (4 * jobs)))
    pieces = deque(_in_turn(list(_pieces(cases, size)), cases))
    if not pieces:
        return
    _require_pickling(factory, cases[0])
    workers: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    ends = 0  # since a case passed
    try:
        for _ in range(min(jobs, len(pieces))):
            _start(workers, factory, jobs).give(pieces.popleft(), cases)
        while workers:
            for connection in wait(list(workers)):
                worker = workers[connection]
                found = worker.receive(cases)
                if found is not None:
                    ends = 0 if found[1].passed else ends
                    yield found
                if worker.dead:
                    ends = _counted(ends, jobs, worker)
                    del workers[connection]
                    if worker.left:
                        pieces.append(worker.left)
                    if pieces:
                        worker = _start(workers, factory, jobs)
                if not worker.dead and not worker.left:
                    if pieces:
                        worker.give(pieces.popleft(), cases)
                    else:
                        idle.append(workers.pop(worker.connection))
                        worker.dismiss()
        for worker in idle:  # leaving a device takes each of them a while, all at once
            worker.process.join()
    finally:
        for worker in workers.values():
            worker.process.terminate()


def _counted(ends: int, jobs: int, worker: _Worker) -> int:
    """One more process that ended. RuntimeError if that goes on: none may be able to use the device."""
    if ends > 2 * jobs:
        raise RuntimeError(
            f"verify: {ends} processes ended, one after the other, and no case passed; the last exit code is "
            f"{worker.process.exitcode}, the last error: {worker.error or 'none'}; try jobs=1"
        )
    return ends + 1


def _pieces(cases: list[Case], size: int) -> Iterator[list[int]]:
    """Indices of cases that share kernels, so many at most."""
    groups: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        form = case.format
        states = str(form.state_format) if case.variant.rule_spec.states else ""  # named or by default
        kept = form.dtype, form.master_weights, form.stochastic_rounding, states
        groups.setdefault((case.backend, case.variant.rule, *kept), []).append(i)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _in_turn(pieces: list[list[int]], cases: list[Case]) -> list[list[int]]:
    """Backends in turn, so that while some processes compile, others use the device. Those that take long come first,
    so that nobody waits for them at the end: heavy cases, large pieces, and Triton's, which compile the longest."""
    backends: dict[str | None, list[list[int]]] = {}
    for piece in sorted(pieces, key=len, reverse=True):
        backends.setdefault(cases[piece[0]].backend, []).append(piece)
    order = []
    for backend, some in backends.items():
        for at, piece in enumerate(some):
            share = at / len(some) * (0.8 if backend == "triton" else 1.0)
            order.append((not any(cases[i].data.heavy for i in piece), share, piece))
    return [piece for *_, piece in sorted(order)]


def _require_pickling(factory: Callable | None, case: Case) -> None:
    try:
        pickle.dumps((factory, case))
    except Exception as error:  # pickle raises whatever the object raises
        raise ValueError(
            f"jobs: {factory!r} cannot be given to other processes ({error}); name it as package.module:attribute, or "
            "choose jobs=1"
        ) from error


@dataclasses.dataclass(eq=False)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    left: list[int] = dataclasses.field(default_factory=list)
    """Indices of cases that it was given and has not answered yet, in their order."""
    ready: bool = False
    """Whether it has read its first cases."""
    dead: bool = False
    error: str = ""
    """Of the last case."""

    def give(self, indices: list[int], cases: list[Case]) -> None:
        self.left = list(indices)
        self._send([cases[i] for i in indices])

    def dismiss(self) -> None:
        """It may end."""
        self._send(None)

    def _send(self, message: list[Case] | None) -> None:
        """To a process that has ended after its last case nothing: ``receive`` will notice."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def receive(self, cases: list[Case]) -> tuple[int, Result] | None:
        """What it found of the first case that is left; None where it has begun, or ended between two cases."""
        try:
            result = self.connection.recv()
            if result is None:
                self.ready = True
                return None
        except (EOFError, ConnectionResetError):
            self.dead = True
            self.process.join()
            if not self.ready:
                raise RuntimeError(
                    f"verify: a process ended with exit code {self.process.exitcode} before its first case; what it "
                    "wrote says why; jobs=1 does without"
                ) from None
            if self.process.exitcode == 0 or not self.left:
                return None
            case = cases[self.left[0]]
            result = Result(case, error=f"the process that ran it ended with exit code {self.process.exitcode}")
        index = self.left.pop(0)
        result.case, self.error = cases[index], result.error
        return index, result


def _start(workers: dict[Connection, _Worker], factory: Callable | None, jobs: int) -> _Worker:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    own, other = context.Pipe()
    # Two threads, so that there is something to share out where a case is large enough for it.
    threads = max(torch.get_num_threads() // jobs, min(2, torch.get_num_threads()))
    process = context.Process(target=_work, args=(other, factory, threads), daemon=True)
    process.start()
    other.close()
    workers[own] = _Worker(process, own)
    return workers[own]


def _work(connection: Connection, factory: Callable | None, threads: int) -> None:
    torch.set_num_threads(threads)
    first = True
    while (cases := connection.recv()) is not None:
        if first:
            connection.send(None)
            first = False
        for case in cases:
            result = run_case(case, factory)
            connection.send(result)
            if "CUDA error" in result.error:  # nothing else would work in this process
                return
