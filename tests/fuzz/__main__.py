"""Fuzzes the boundary of ``fusedopt._C``: ``python -m tests.fuzz --inputs 100000 --seed 0``.

Inputs are drawn from the seed and their number alone, so each can be run again: ``--first N --inputs 1``. They run in
processes of their own; one that dies is a finding, and the next input goes on in a new one. With ``--sanitized DIR``, a
build for gcc's sanitizers (docs/testing.md), a finding of theirs ends the process too.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
MOST_FINDINGS = 20
_LAST = 6000  # characters of a dead process's last words


def sanitized_environment(folder: Path) -> dict[str, str]:
    """For processes that load the build in ``folder``. The sanitizer's library must be there before all others."""
    if not list((folder / "fusedopt").glob("_C.*.so")):
        raise click.UsageError(
            f"--sanitized: got {folder}, expected a folder with fusedopt/_C.*.so; build it with `make sanitized`"
        )
    names = ("libasan.so", "libstdc++.so.6")
    compiler = os.environ.get("CXX", "c++")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return {
        "LD_PRELOAD": " ".join(paths),
        "PYTHONMALLOC": "malloc",  # so that Python's own objects are watched too
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python never frees all it has
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


class Job:
    """One share of the inputs, in one process after another."""

    def __init__(self, seed: int, first: int, stop: int, stride: int, sanitized: Path | None) -> None:
        self.arguments = [seed, first, stop, stride]
        self.sanitized = sanitized
        self.extension = ""
        self.done = 0
        self.findings: list[dict] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        seed, first, stop, stride = self.arguments
        begin = first
        with tempfile.NamedTemporaryFile() as marker:
            while first < stop and len(self.findings) < MOST_FINDINGS:
                marker.seek(0)
                marker.write(b"%-20d" % first)
                marker.flush()
                failed = self.run_process([seed, first, stop, stride, marker.name], begin)
                if failed is None:
                    self.done = len(range(begin, stop, stride))
                    return
                marker.seek(0)
                at = int(marker.read())
                self.findings.append({"input": at, "text": failed})
                first = at + stride
                self.done = len(range(begin, first, stride))

    def run_process(self, arguments: list, begin: int) -> str | None:
        """What a process said before it died; None where it did not die."""
        path = [str(self.sanitized), str(ROOT)] if self.sanitized else [str(ROOT)]
        code = f"import sys; sys.path[:0] = {path}; from tests.fuzz.worker import main; main(*{arguments})"
        command = [sys.executable, "-W", "ignore", "-c", code]
        environment = {**os.environ, **(sanitized_environment(self.sanitized) if self.sanitized else {})}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            for line in process.stdout:
                self.take(json.loads(line), begin, arguments[3])
            if process.wait() == 0:
                self.check_extension()
                return None
            errors.seek(0)
            return f"exit status {process.returncode}\n{errors.read()[-_LAST:]}"

    def check_extension(self) -> None:
        """That what was fuzzed was the build that was asked for."""
        if self.sanitized and not Path(self.extension).is_relative_to(self.sanitized):
            self.findings.append({"input": -1, "text": f"fuzzed {self.extension}, expected a file in {self.sanitized}"})

    def take(self, message: dict, begin: int, stride: int) -> None:
        if "at" in message:
            self.done = len(range(begin, message["at"], stride))
        elif "finding" in message:
            self.findings.append({"input": message["finding"], "text": message["text"]})
        elif "extension" in message:
            self.extension = message["extension"]
        else:
            self.counts = message["counts"]


def watch(jobs: list[Job], total: int, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fuzzing fusedopt._C", total=total)
        while any(job.thread.is_alive() for job in jobs):
            progress.update(task, completed=sum(job.done for job in jobs))
            time.sleep(0.2)
        progress.update(task, completed=sum(job.done for job in jobs))


def summary(jobs: list[Job], seed: int, seconds: float, sanitized: bool) -> dict:
    calls: dict[str, dict[str, int]] = {}
    for job in jobs:
        for name, row in job.counts.items():
            into = calls.setdefault(name, {"done": 0, "refused": 0})
            for outcome, count in row.items():
                into[outcome] += count
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "inputs": sum(job.done for job in jobs),
        "seed": seed,
        "sanitizers": "address, undefined" if sanitized else None,
        "findings": sorted((each for job in jobs for each in job.findings), key=lambda each: each["input"]),
        "calls": dict(sorted(calls.items())),
        "seconds": round(seconds, 1),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "commit": os.environ.get("FUSEDOPT_COMMIT") or git.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@click.command()
@click.option("--inputs", default=100_000, type=click.IntRange(1), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--first", default=0, type=click.IntRange(0), help="Number of the first input.", show_default=True)
@click.option("--jobs", default=2, type=click.IntRange(1), help="Processes at a time.", show_default=True)
@click.option("--sanitized", type=click.Path(path_type=Path), help="Folder of a build for sanitizers.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, writable=True), help="Where to write a summary.")
def main(inputs: int, seed: int, first: int, jobs: int, sanitized: Path | None, json_path: str | None) -> None:
    """Exit code 0 if there was no finding, 1 if there were, 2 for bad input."""
    console = Console(stderr=True)
    folder = sanitized.resolve() if sanitized else None
    if folder:
        sanitized_environment(folder)  # raises here, before a thread does
    begun = time.monotonic()
    running = [Job(seed, first + k, first + inputs, jobs, folder) for k in range(min(jobs, inputs))]
    watch(running, inputs, console)
    result = summary(running, seed, time.monotonic() - begun, sanitized is not None)
    if json_path:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    for each in result["findings"]:
        console.print(f"input {each['input']}:", style="bold red")
        console.print(each["text"], markup=False, highlight=False)
    calls = sum(sum(row.values()) for row in result["calls"].values())
    click.echo(f"{result['inputs']} inputs, {calls} calls, {len(result['findings'])} findings, {result['seconds']} s")
    sys.exit(1 if result["findings"] else 0)


if __name__ == "__main__":
    main()
