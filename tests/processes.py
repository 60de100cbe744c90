"""Checks that several processes run together: started once, each check a function of all of them.

A module of checks has functions ``name(ctx: Context)``; ``module.name`` is one of another module. In every process they
run in one order; the first one that fails in a process ends it there, and the others, whose collectives fail then, too.
The processes are forked from one that has imported torch and the checks, which takes longer than most of them.
"""

import contextlib
import datetime
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # DTensors import it with their first operation
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TESTS = Path(__file__).resolve().parent
TIMEOUT = 60
"""Seconds that a collective may take."""
GRACE = 5
"""Seconds in which the others may end by themselves, and say why, when one has failed."""


@dataclass
class Context:
    """What a check is told."""

    rank: int
    world: int
    device: torch.device

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
        """Of all processes, by default of one dimension."""
        return init_device_mesh(self.device.type, shape or (self.world,), mesh_dim_names=names)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join(rank: int, world: int, port: int, backend: str = "gloo", timeout: float = TIMEOUT) -> Context:
    """Makes this process one of ``world``."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    device = torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    store = distributed.TCPStore("127.0.0.1", port, world, rank == 0, timeout=datetime.timedelta(seconds=TIMEOUT))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return Context(rank, world, device)


def work(module: str, checks: list[str], rank: int, world: int, port: int, backend: str, out: str) -> None:
    """One process: writes the result of each check, an empty string or a traceback."""
    context = join(rank, world, port, backend)
    results = {}
    for name in checks:
        torch.manual_seed(0)
        try:
            owner, _, function = name.rpartition(".")
            getattr(importlib.import_module(owner or module), function)(context)
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        torch.save(results, f"{out}/{rank}")
        if results[name]:
            os._exit(1)
    distributed.barrier()
    os._exit(0)  # without the destructors of a forked process


def fork(module: str, checks: list[str], world: int, backend: str, out: str) -> None:
    """Imports everything once, then becomes the parent of ``world`` processes that ``work``."""
    importlib.import_module(module)
    port = free_port()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            work(module, checks, rank, world, port, backend, out)
        children.append(child)
    sys.exit(wait_for(children))


def wait_for(children: list[int]) -> int:
    """The first exit code that is not 0. Collectives of NCCL would wait minutes for a process that has failed."""
    for left in range(len(children), 0, -1):
        _, status = os.wait()
        if status == 0:
            continue
        time.sleep(GRACE if left > 1 else 0)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return abs(os.waitstatus_to_exitcode(status))
    return 0


def start(code: str, *paths: Path, **environment: str) -> subprocess.Popen:
    """A Python process that runs ``code`` and finds the modules of the tests."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *map(str, paths), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int | None, str]]:
    """Exit code, None if it took too long, and output of each."""
    ended = []
    try:
        for process in processes:
            try:
                out, errors = process.communicate(timeout=timeout)
                ended.append((process.returncode, out + errors))
            except subprocess.TimeoutExpired:
                process.kill()
                out, errors = process.communicate()
                ended.append((None, out + errors))
    finally:
        for process in processes:
            process.kill()
    return ended


def run_checks(
    module: str, checks: list[str], world: int, backend: str, out: Path, **environment: str
) -> dict[str, str]:
    """What went wrong in each check, in all processes; an empty string where nothing did."""
    code = f"import processes; processes.fork({module!r}, {checks!r}, {world}, {backend!r}, {str(out)!r})"
    [(_, output)] = finish([start(code, TESTS / "distributed", **environment)], 240)
    results = [torch.load(out / str(rank)) if (out / str(rank)).exists() else {} for rank in range(world)]
    told = {}
    for name in checks:
        wrong = [f"process {rank}:\n{each[name]}" for rank, each in enumerate(results) if each.get(name)]
        missing = [rank for rank, each in enumerate(results) if name not in each]
        if missing and not wrong:
            failed = {other for each in results for other, text in each.items() if text}
            wrong = [f"processes {missing} did not get there, after {failed or output}"]
        told[name] = "\n".join(wrong)
    return told


def assert_all_pass(told: dict[str, str]) -> None:
    """told: by ``run_checks``."""
    failed = {name: text for name, text in told.items() if text}
    assert not failed, "\n\n".join(f"==== {name}: {text}" for name, text in failed.items())
