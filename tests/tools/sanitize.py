"""Runs compute-sanitizer over steps of every kind of kernel, and says what it found in fusedopt's kernels.

    python tests/tools/sanitize.py --json sanitizer.json                    # all tools, CUDA and Triton kernels
    python tests/tools/sanitize.py --tool racecheck --limit 300 --backend cuda

Exit code 0: every tool finished all cases and found nothing in our kernels; 1: findings, or cases that failed or were
not reached within the limit; 2: it could not run. Findings in other kernels (torch's) are counted apart.

All tools run at the same time. Memory comes from cudaMalloc, tensor by tensor, not from torch's cache: only so are
tensors separate allocations, and fresh memory uninitialized, for the tools. Kernels are compiled before, without a
tool. memcheck and racecheck look at our kernels alone, which is faster; initcheck must see whoever writes memory, and
synccheck is fast anyway.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def run_cases(backends: list[str]) -> int:
    """The cases, one line each as it is done; the number that failed."""
    failed = 0
    for backend in backends:
        for name, run in jobs(backend):
            error = run()
            failed += bool(error)
            print(f"case: {backend} {name}: {error or 'passed'}", flush=True)
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


def command_for(sanitizer: str, tool: str, backends: list[str]) -> list[str]:
    options = ["--tool", tool, "--print-limit", "200", "--show-backtrace", "no"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # torch asks the driver about pointers that it may not know
    if tool in ("memcheck", "racecheck"):
        options += [part for name in OUR_KERNELS for part in ("--kernel-name", f"kns={name}")]
    return [sanitizer, *options, *child_command(backends)]


def child_command(backends: list[str]) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--run-cases", *(f"--backend={name}" for name in backends)]


def run_limited(command: list[str], limit: float) -> tuple[str, int | None, float]:
    """Output, exit code (None: the limit ended it, with all its children) and seconds."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return output.read(), code, time.monotonic() - start


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


def report_of(tool: str, command: list[str], limit: float, expected: int) -> dict[str, Any]:
    """One run of a tool, as it stands in the JSON."""
    output, code, seconds = run_limited(command, limit)
    findings = parse_findings(output)
    ours = [finding for finding in findings if is_ours(finding)]
    lines = [line for line in output.splitlines() if line.startswith("case: ")]
    summary = [line.removeprefix("=========").strip() for line in output.splitlines() if "SUMMARY:" in line]
    return {
        "tool": tool,
        "command": " ".join(command),
        "seconds": round(seconds, 1),
        "exit_code": code,
        "timed_out": code is None,
        "cases": expected,
        "cases_done": len(lines),
        "cases_failed": [line for line in lines if not line.endswith(": passed")],
        "findings": len(ours),
        "findings_elsewhere": len(findings) - len(ours),
        "summary": summary,
        "texts": ours[:50],
        "texts_elsewhere": sorted(set(findings) - set(ours))[:10],
        "last_output": output[-4000:] if len(lines) < expected else "",
    }


def is_clean(report: dict[str, Any]) -> bool:
    """Nothing found in our kernels, and everything was looked at by a tool that wrote its summary."""
    done = report["cases_done"] == report["cases"] and not report["cases_failed"]
    return not report["findings"] and done and bool(report["summary"])


def describe(report: dict[str, Any]) -> str:
    text = (
        f"{report['tool']}: {report['findings']} findings in our kernels, {report['findings_elsewhere']} elsewhere; "
        f"{report['cases_done']} of {report['cases']} cases in {report['seconds']:.0f} s"
    )
    if report["timed_out"]:
        text += "; stopped at the limit"
    problems = report["texts"][:5] + report["cases_failed"][:5]
    return "\n".join([text, *(f"  {line}" for problem in problems for line in problem.splitlines()), ""]).rstrip()


# ---- the command line ----------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only these (repeat); default: all four")
    parser.add_argument("--backend", action="append", choices=["cuda", "triton"], help="default: those that can run")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for the tools (default: %(default)s)")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer; default: PATH, CUDA_HOME, /usr/local/cuda")
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument("--run-cases", action="store_true", help=argparse.SUPPRESS)
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
        return min(run_cases(chosen.backend), 1)
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
    backends = chosen.backend or available_backends()
    expected = len(backends) * len(jobs(backends[0]))
    print(f"Compiling kernels, and {expected} cases without a tool", flush=True)
    output, code, seconds = run_limited(child_command(backends), 600.0)
    if code != 0:
        return fail(f"the cases fail without a tool too, exit code {code}:\n{output[-4000:]}")
    print(f"passed in {seconds:.0f} s", flush=True)
    reports = []
    with ThreadPoolExecutor() as pool:  # a tool waits for the host, not for the device, most of the time
        running = [
            pool.submit(report_of, tool, command_for(sanitizer, tool, backends), chosen.limit, expected)
            for tool in chosen.tool or TOOLS
        ]
        for report in as_completed(running):
            reports.append(report.result())
            print(describe(reports[-1]), flush=True)
            if chosen.json:
                write(chosen.json, sanitizer, reports)
    return 0 if all(map(is_clean, reports)) else 1


def write(path: Path, sanitizer: str, reports: list[dict[str, Any]]) -> None:
    """After each tool, so that a run that is cut off leaves what it has."""
    from fusedopt.testing import environment

    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout.strip()
    record = {"environment": {**environment("cuda"), "sanitizer": version.splitlines()[-1:]}, "tools": reports}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
