"""Runs compute-sanitizer over steps of every kind of kernel, and says what it found in fusedopt's kernels.

    python tests/tools/sanitize.py --json sanitizer.json                    # all tools, CUDA and Triton kernels
    python tests/tools/sanitize.py --tool racecheck --limit 300 --backend cuda

Exit code 0: every tool finished all cases and found nothing in our kernels; 1: findings, or cases that failed or were
not reached within the limit; 2: it could not run. Findings in other kernels (torch's) are counted apart.

First the cases run without a tool, in as many processes as there are cores: they must pass, and what they compile is
in the caches afterwards. Then all tools run at the same time, each in some processes that share the cases. All of that
ends at the limit; the report has what was found until then, and is written whenever a process ends. Memory comes from
cudaMalloc, tensor by tensor, not from torch's cache: only so are tensors separate allocations, and fresh memory
uninitialized, for the tools. memcheck and racecheck look at our kernels alone, which is faster; initcheck must see
whoever writes memory, and synccheck is fast anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OUR_KERNELS = (
    "fusedopt_entry", "update_pass", "measure_pass", "norm_pass", "finalize_pass", "accumulate_pass", "scale_pass",
)  # fmt: skip
"""The entry point of what NVRTC compiles, and the Triton kernels."""

KINDS = (
    # variant, format, transform, data set
    ("adamw-decay", "float32-None_states", "clip", "mixed"),
    ("adamw-decay", "float32-None_states", "accumulate", "misaligned"),
    ("adam-amsgrad", "bfloat16-fp32-None_states", "scale", "intermittent"),
    ("adamw-decay", "bfloat16-split16-int8_states", "clip", "mixed"),
    ("adamw-decay", "bfloat16-split8-int8_states", "accumulate", "mixed"),
    ("adamw-decay", "bfloat16-stochastic-int8_states", "none", "misaligned"),
    ("adamw-decay", "bfloat16-split16-None_states", "none", "misaligned"),
    ("lion-decay", "bfloat16-stochastic-bf16_states", "value_clip", "mixed"),
    ("lion-decay", "float16-int8_states", "none", "shared_storage"),
    ("sgd-l2", "bfloat16-split8-None_states", "clip", "nan_chunk_start"),
    ("sgd-momentum", "float16-fp32-None_states", "none", "non_contiguous"),
    ("rmsprop-both", "float64-None_states", "clip", "mixed"),
    ("lamb-decay", "float32-None_states", "clip", "mixed"),
    ("lamb-decay", "bfloat16-split8-int8_states", "accumulate", "empty_middle"),
)
MANY = 4500
"""Tensors whose table no kernel parameter holds."""


# ---- what runs under a tool ----------------------------------------------------------------------------------------


def run_cases(backends: list[str], share: int = 0, shares: int = 1) -> int:
    """Every case whose turn it is, or all: one line each as it is done; the number that failed."""
    failed = 0
    for name, run in [(f"{backend} {name}", run) for backend in backends for name, run in jobs(backend)][share::shares]:
        error = run()
        failed += bool(error)
        print(f"case: {name}: {error or 'passed'}", flush=True)
    return failed


def jobs(backend: str) -> list[tuple]:
    """(name, function that returns an error or "") of each case of a backend."""
    from fusedopt.testing import cases, data, run_case, variants

    formats = {str(form): form for form in cases.FORMATS}

    def judged(variant, form, transform, values):
        chosen = formats[form]
        case = cases.Case(
            variants.BY_NAME[variant], chosen, backend, "cuda", chosen.dtype, transform, data.BY_NAME[values]
        )
        return case.name, lambda: run_case(case).error

    return [
        *(judged(*kind) for kind in KINDS),
        ("functions", lambda: clip_in_place(backend)),
        ("table in device memory", lambda: many_tensors(backend)),
    ]


def clip_in_place(backend: str) -> str:
    import torch

    import fusedopt

    params = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in (1, 257, 8195)]
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    with fusedopt.use_backend(backend):
        for norm_type in (1.0, 2.0, float("inf")):
            fusedopt.clip_grad_norm_(params, 1.0, norm_type)
        fusedopt.clip_grad_value_(params, 1e-6)
    return "" if all((p.grad <= 1e-6).all() for p in params) else "gradients were not clipped"


def many_tensors(backend: str) -> str:
    import torch

    import fusedopt

    memory = torch.ones(MANY, 3, device="cuda")  # one allocation: thousands take a sanitizer minutes
    params = [torch.nn.Parameter(row) for row in memory]
    for p, grad in zip(params, torch.ones_like(memory), strict=True):
        p.grad = grad
    opt = fusedopt.SGD(params, lr=0.5, max_grad_norm=1e9, backend=backend)
    for _ in range(2):
        opt.step()
    return "" if (memory == 0.0).all() else "parameters are wrong"


# ---- the tools -----------------------------------------------------------------------------------------------------


def find_sanitizer(wanted: str | None) -> str | None:
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    places = [f"{folder}/{sub}" for folder in folders if folder for sub in ("bin", "compute-sanitizer")]
    if wanted:
        return shutil.which(wanted)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command_for(sanitizer: str, tool: str) -> list[str]:
    """What the command of the cases is appended to."""
    options = ["--tool", tool, "--print-limit", "200", "--show-backtrace", "no"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks the driver about pointers that it may not know
    if tool in ("memcheck", "racecheck"):
        options += [part for name in OUR_KERNELS for part in ("--kernel-name", f"kns={name}")]
    return [sanitizer, *options]


def child_commands(backends: list[str], shares: int) -> list[list[str]]:
    """What runs the cases: so many processes, each its share."""
    start = [sys.executable, str(Path(__file__).resolve()), "--run-cases", *(f"--backend={name}" for name in backends)]
    return [[*start, f"--share={i}", f"--shares={shares}"] for i in range(shares)]


class Process:
    """A command, at work; what it writes goes to a file."""

    def __init__(self, name: str, command: list[str]) -> None:
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.name, self.command, self.start = name, command, time.monotonic()
        self.code: int | None = None
        """None while it runs, and where it was stopped."""
        self.seconds: float | None = None
        """That it took; None while it runs."""
        self._file = tempfile.NamedTemporaryFile("w")  # noqa: SIM115 - open as long as the process may write
        self._process = subprocess.Popen(
            command, stdout=self._file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def has_ended(self) -> bool:
        code = self._process.poll()
        if code is not None and self.seconds is None:
            self.code, self.seconds = code, time.monotonic() - self.start
        return code is not None

    def stop(self) -> None:
        """Ends it, with all its children, where it still runs."""
        if not self.has_ended():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.seconds = time.monotonic() - self.start

    def output(self) -> str:
        """What it has written so far."""
        return Path(self._file.name).read_text(errors="replace")


def run_limited(
    commands: list[tuple[str, list[str]]], limit: float, on_end: Callable[[list[Process]], None] = lambda all: None
) -> list[Process]:
    """Processes of these names and commands, all at once; those that still run after so many seconds are ended.

    on_end: called with all whenever some have ended, and in the end.
    """
    deadline = time.monotonic() + limit
    processes: list[Process] = []
    try:
        processes += (Process(name, command) for name, command in commands)
        running = list(processes)
        while running and time.monotonic() < deadline:
            time.sleep(0.1)
            ended = [process for process in running if process.has_ended()]
            running = [process for process in running if process not in ended]
            if ended and running:
                on_end(processes)
    finally:  # an interrupt too leaves none behind
        for process in processes:
            process.stop()
    on_end(processes)
    return processes


_NOT_FINDINGS = re.compile(r"COMPUTE-SANITIZER|.*SUMMARY:|Target application|Warning:|Note:|No attachable|Program hit")


def parse_findings(output: str) -> list[str]:
    """Each finding's text. One begins with text right after the marks and goes on in indented lines, of which those
    about the host are left out."""
    findings, open_, host = [], False, False
    for line in output.splitlines():
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========")
        if not text.strip():
            open_ = False
        elif text.startswith("  "):
            host = host or "backtrace" in text
            if open_ and not host:
                findings[-1] += "\n" + text.strip()
        else:
            open_, host = not _NOT_FINDINGS.match(text.strip()), False
            if open_:
                findings.append(text.strip())
    return findings


def is_ours(finding: str) -> bool:
    return any(re.search(rf"\b{name}\b", finding) for name in OUR_KERNELS)


def report_of(tool: str, processes: list[Process], expected: int) -> dict[str, Any]:
    """What the processes of a tool have written so far, as it stands in the JSON."""
    outputs = [process.output() for process in processes]
    output = "\n".join(outputs)
    findings = [finding for text in outputs for finding in parse_findings(text)]
    ours = [finding for finding in findings if is_ours(finding)]
    lines = [line for line in output.splitlines() if line.startswith("case: ")]
    unfinished = [text[-2000:] for process, text in zip(processes, outputs, strict=True) if process.code != 0]
    return {
        "tool": tool,
        "command": " ".join(processes[0].command),
        "processes": len(processes),
        "finished": all(process.code is not None for process in processes),
        "exit_codes": [process.code for process in processes],
        "seconds": round(max(process.seconds or time.monotonic() - process.start for process in processes), 1),
        "cases": expected,
        "cases_done": len(lines),
        "cases_failed": [line for line in lines if not line.endswith(": passed")],
        "findings": len(ours),
        "findings_elsewhere": len(findings) - len(ours),
        "summary": [summary for text in outputs for summary in _summaries(text)],
        "texts": ours[:50],
        "texts_elsewhere": sorted(set(findings) - set(ours))[:10],
        "last_output": "\n".join(unfinished)[-4000:] if len(lines) < expected else "",
    }


def _summaries(output: str) -> list[str]:
    return [line.removeprefix("=========").strip() for line in output.splitlines() if "SUMMARY:" in line][:1]


def is_clean(report: dict[str, Any]) -> bool:
    """Nothing found in our kernels, and everything was looked at by a tool that wrote its summary."""
    done = report["cases_done"] == report["cases"] and not report["cases_failed"] and report["finished"]
    return not report["findings"] and done and len(report["summary"]) == report["processes"]


def describe(report: dict[str, Any]) -> str:
    text = (
        f"{report['tool']}: {report['findings']} findings in our kernels, {report['findings_elsewhere']} elsewhere; "
        f"{report['cases_done']} of {report['cases']} cases in {report['seconds']:.0f} s"
    )
    if not report["finished"]:
        text += "; stopped at the limit"
    problems = report["texts"][:5] + report["cases_failed"][:5]
    return "\n".join([text, *(f"  {line}" for problem in problems for line in problem.splitlines()), ""]).rstrip()


# ---- the command line ----------------------------------------------------------------------------------------------


def _cores() -> int:
    """14 of 16, so that the system has some left."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(14, cores))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only these (repeat); default: all four")
    parser.add_argument("--backend", action="append", choices=["cuda", "triton"], help="default: those that can run")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes at a time (default: %(default)s)")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer; default: PATH, CUDA_HOME, /usr/local/cuda")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--run-cases", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shares", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def fail(message: str) -> int:
    print(f"sanitize: {message}", file=sys.stderr)
    return 2


def available_backends() -> list[str]:
    from fusedopt.testing.cases import own_backends

    return [name for name in own_backends("cuda") if name in ("cuda", "triton")]


def main(argv: list[str] | None = None) -> int:
    chosen = arguments(argv)
    if chosen.run_cases:
        return min(run_cases(chosen.backend, chosen.share, chosen.shares), 1)
    sanitizer = find_sanitizer(chosen.sanitizer)
    if sanitizer is None:
        where = f" at {chosen.sanitizer}" if chosen.sanitizer else ""
        return fail(
            f"compute-sanitizer was not found{where}; it comes with the CUDA toolkit (package cuda-sanitizer): install "
            "it, or name it with --sanitizer"
        )
    import torch

    if not torch.cuda.is_available():
        return fail("torch finds no CUDA device, expected one")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that processes are ended
    return sanitize(chosen, sanitizer, chosen.backend or available_backends())


def sanitize(chosen: argparse.Namespace, sanitizer: str, backends: list[str]) -> int:
    """The cases without a tool, then with all; the exit code."""
    expected, start = len(backends) * len(jobs(backends[0])), time.monotonic()
    workers = min(chosen.jobs, expected)
    print(f"Compiling kernels, and {expected} cases without a tool, in {workers} processes", flush=True)
    plain = run_limited([("plain", command) for command in child_commands(backends, workers)], chosen.limit)
    failed = next((process for process in plain if process.code != 0), None)
    if failed is not None:
        ending = f"they were not done within {chosen.limit:.0f} s" if failed.code is None else f"code {failed.code}"
        return fail(f"the cases fail without a tool too: {ending}:\n{failed.output()[-4000:]}")
    print(f"passed in {time.monotonic() - start:.0f} s", flush=True)
    tools = chosen.tool or list(TOOLS)
    shares = min(max(1, chosen.jobs // len(tools)), expected)
    commands = [
        (tool, [*command_for(sanitizer, tool), *child]) for child in child_commands(backends, shares) for tool in tools
    ]

    reports: dict[str, dict[str, Any]] = {}

    def keep(processes: list[Process]) -> None:
        for tool in tools:
            if not reports.get(tool, {}).get("finished"):
                reports[tool] = report_of(tool, [process for process in processes if process.name == tool], expected)
                if reports[tool]["finished"]:
                    print(describe(reports[tool]), flush=True)
        if chosen.json:
            write(chosen.json, sanitizer, list(reports.values()))

    run_limited(commands, chosen.limit - (time.monotonic() - start), keep)
    for report in reports.values():
        if not report["finished"]:
            print(describe(report), flush=True)
    return 0 if all(map(is_clean, reports.values())) else 1


def write(path: Path, sanitizer: str, reports: list[dict[str, Any]]) -> None:
    """Whenever a process has ended, so that a run that is cut off leaves what it has."""
    from fusedopt.testing import environment

    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout.strip()
    record = {"environment": {**environment("cuda"), "sanitizer": version.splitlines()[-1:]}, "tools": reports}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
