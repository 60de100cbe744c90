"""Markers, the `device` fixture, seeds, and the record of a GPU run."""

import datetime
import importlib.metadata
import json
import os
import subprocess

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    # Taken out of the environment: tests that run pytest themselves would write there too.
    config.gpu_results = os.environ.pop("FUSEDOPT_GPU_RESULTS", None)
    config.addinivalue_line("markers", "multigpu: needs two CUDA devices")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on the CPU
    if config.gpu_results and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config.gpu_results + ".failures"))
    if hasattr(config, "workerinput"):
        # Threads of parallel test processes that spin for each other's cores slow the suite down tenfold.
        torch.set_num_threads(max(1, torch.get_num_threads() // config.workerinput["workercount"]))


class FailuresAtOnce:
    """Writes each failure to a file when it happens: a run on a GPU may be cut off before its summary."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(self.path, "a") as file:
                file.write(f"{report.nodeid}\n{report.longreprtext}\n\n")


MOST = 32
"""Instances of one test on CUDA, but for those that are the first with some value of some parameter: the CPU runs all,
and compiling kernels takes time."""


def pytest_addoption(parser):
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="On CUDA too, run tests with every combination of their parameters, not with a sample.",
    )
    parser.addoption(
        "--sample", type=int, metavar="N", help="On the CPU, run at most about N combinations of each test."
    )


def leave_out(items, most: int) -> set:
    """Of tests with many combinations of parameters, those that are not run.

    Every value of every parameter is, and combinations evenly spread over all, so many as are asked for.
    """
    by_test, left_out = {}, set()
    for item in items:
        if hasattr(item, "callspec"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in by_test.values():
        seen = set()
        for i, item in enumerate(group):
            values = {(name, id(value)) for name, value in item.callspec.params.items()}
            spread = i * most // len(group) != (i - 1) * most // len(group)
            if spread or values - seen:
                seen |= values
            else:
                left_out.add(item)
    return left_out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    left_out, most_on_cpu = set(), config.getoption("--sample")
    if not config.getoption("--every-combination"):
        left_out |= leave_out([item for item in items if "gpu" in item.keywords], MOST)
    if most_on_cpu:
        left_out |= leave_out([item for item in items if "gpu" not in item.keywords], most_on_cpu)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needed = 2 if "multigpu" in item.keywords else 1 if "gpu" in item.keywords else 0
        if available < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), found {available}"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_terminal_summary(terminalreporter):
    """With FUSEDOPT_GPU_RESULTS=path, write what ran where, and how many tests passed, to that path as JSON."""
    path = terminalreporter.config.gpu_results
    if not path:
        return
    counts = {outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "skipped")}
    counts["failed"] += len(terminalreporter.stats.get("error", []))
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    record = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": driver.splitlines()[0] if driver else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": os.environ.get("FUSEDOPT_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **counts,
    }
    with open(path, "w") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
