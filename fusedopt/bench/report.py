"""What a run leaves behind: where it was made, and a table of its rows."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedopt

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where there is one."""

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- environment


def environment(device: torch.device) -> Row:
    """Device, versions and commit, as strings; None where there is none."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": os.environ.get("FUSEDOPT_COMMIT") or _commit(),
        "fusedopt": fusedopt.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def load_average() -> float | None:
    """Of the last minute: what else keeps the machine busy."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none


def _commit() -> str | None:
    """Of the checkout that the package is used from."""
    if not (ROOT / "csrc").is_dir():
        return None
    return _output("git", "-C", str(ROOT), "rev-parse", "HEAD")


def _output(*command: str) -> str | None:
    """First word a command prints, None if it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = result.stdout.split()
    return words[0] if result.returncode == 0 and words else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def write(path: Path | None, result: Row) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------ tables


def print_rows(console: Console, rows: list[Row]) -> None:
    table = Table(title="one step tail: medians, half of the interquartile range", box=None, pad_edge=False)
    table.add_column("case / library", no_wrap=True)
    columns = (
        "GPU ms",
        "",
        "floor",
        "share",
        "GB/s",
        "over best",
        "launches",
        "wall ms",
        "",
        "host ms",
        "",
        "state B/param",
        "peak GB",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    case = None
    for row in rows:
        title = f"{row['workload']} {row['optimizer']} {row['format']} {row['contract']}"
        if title != case:
            table.add_row(title, style="bold")
            case = title
        table.add_row(f"  {row['library']}", *_cells(row))
    console.print(table)
    for row in rows:
        if reason := row["error"] or row.get("skipped"):
            case = f"{row['workload']} {row['optimizer']} {row['format']} {row['contract']}"
            console.print(f"{'FAILED' if row['error'] else 'skipped'} {case} {row['library']}: {reason}", markup=False)


def _cells(row: Row) -> list[str]:
    if row["error"] or row.get("skipped"):
        return ["failed" if row["error"] else "skipped"]
    launches = "-" if row["launches"] is None else str(row["launches"])
    share = "-" if row["efficiency"] is None else f"{100 * row['efficiency']:.1f}%"
    floor = "-" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
    kept, peak = row.get("state_bytes"), row.get("peak_bytes")
    memory = ["-" if kept is None else f"{kept / row['params']:.2f}", "-" if peak is None else f"{peak / 1e9:.2f}"]
    gpu, wall, host = (_with_spread(row, key) for key in ("gpu_ms", "wall_ms", "host_ms"))
    rate = "-" if row.get("gbps") is None else f"{row['gbps']:,.1f}"
    best = "-" if row.get("over_best") is None else f"{row['over_best']:.2f}x"
    return [*gpu, floor, share, rate, best, launches, *wall, *host, *memory]


def _with_spread(row: Row, key: str) -> tuple[str, str]:
    if row[key] is None:
        return "-", ""
    low, high = row.get(f"{key}_q1"), row.get(f"{key}_q3")
    return f"{row[key]:.3f}", "" if low is None or high is None else f"±{(high - low) / 2:.3f}"
