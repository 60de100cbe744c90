"""Writes tables in pages of docs/ from the results, between markers, and leaves the rest of the pages alone.

    python benchmarks/tables.py            # after new results were put into benchmarks/results/
    python benchmarks/tables.py --check    # exit code 1 if a page is not what this would write

A marker names a file of ``benchmarks/results/`` and may choose rows, by any of their names:

    <!-- table: step-h100.json workload=llama-1.3B,gpt2-124M contract=clip_step -->
    <!-- end of table -->

The word ``if-there`` in a marker allows for a file that does not exist yet. Every row is given the command that
measures it again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, when started as a file

from fusedopt.bench import suites
from fusedopt.bench.report import Row

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("performance.md", "offload.md")]
RESULTS = ROOT / "benchmarks" / "results"

MARKER = re.compile(r"(<!-- table: (?P<file>\S+)(?P<filters>[^>]*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

IF_THERE = "if-there"

NAMES = ("workload", "optimizer", "format", "contract", "library")

Column = tuple[str, str]
"""Title and key of a row."""

STEP_COLUMNS: list[Column] = [
    ("B/param", "bytes_per_param"),
    ("GPU ms", "gpu_ms"),
    ("launches", "launches"),
    ("share of the floor", "efficiency"),
    ("over the best other", "over_best"),
    ("wall ms", "wall_ms"),
    ("host ms", "host_ms"),
    ("state B/param", "state_bytes"),
    ("peak GB", "peak_bytes"),
]
TRAINING_COLUMNS: list[Column] = [
    ("step ms", "step_ms"),
    ("tail ms", "tail_ms"),
    ("tail's kernels ms", "tail_gpu_ms"),
    ("launches", "tail_launches"),
    ("tail's share", "tail_share"),
    ("tokens/s", "tokens_per_s"),
    ("over torch's best", "speedup"),
    ("tail over torch's", "tail_speedup"),
    ("state B/param", "state_bytes"),
    ("peak GB", "peak_bytes"),
]
OFFLOAD_COLUMNS: list[Column] = [
    ("ms", "wall_ms"),
    ("limit ms", "floor_ms"),
    ("share of the limit", "efficiency"),
    ("bus alone ms", "bus_ms"),
    ("GB on the GPU", "device_bytes"),
    ("GB on the host", "host_bytes"),
]


TRAINING = ("train_step", "trainer_step")
"""Contracts of whole training steps."""


def fill(page: str, results: Path = RESULTS) -> str:
    """The page with the tables that its markers ask for.

    Raises:
        click.ClickException: a marker names a file that is not there, or chooses by something that rows do not have.
    """

    def table(match: re.Match[str]) -> str:
        path = results / match["file"]
        filters = [word for word in match["filters"].split() if word != IF_THERE]
        if not path.is_file():
            if IF_THERE in match["filters"].split():
                return f"{match[1]}\nNot measured yet.\n\n{match[4]}"
            raise click.ClickException(f"a marker names {match['file']}, which is not in {results}")
        result = json.loads(path.read_text())
        rows = chosen(result["rows"], filters)
        return f"{match[1]}\n{header(result)}\n\n{markdown(rows, result)}\n\n{match[4]}"

    return MARKER.sub(table, page)


def chosen(rows: list[Row], filters: list[str]) -> list[Row]:
    """The rows that a marker chooses."""
    for part in filters:
        key, _, values = part.partition("=")
        if key not in NAMES or not values:
            raise click.ClickException(f"got {part!r} in a marker, expected {'=..., '.join(NAMES)}=...")
        rows = [row for row in rows if str(row[key]) in values.split(",")]
    return rows


def header(result: Row) -> str:
    """Where and when."""
    facts = [str(result["device"]), f"torch {result['torch']}"]
    facts += [f"driver {result['driver']}"] if result.get("driver") else []
    facts += [f"Triton {result['triton']}"] if result.get("triton") else []
    facts += [f"{name} {version}" for name, version in (result.get("library_versions") or {}).items()]
    facts += [f"{result['threads']} threads"] if not result.get("driver") else []
    facts += [str(result["date"])[:10], f"commit {str(result['commit'])[:7]}"]
    facts += [f"copy {result['copy_gbps']:,.1f} GB/s"] if result.get("copy_gbps") else []
    facts += [f"triad {result['triad_gbps']:,.1f} GB/s"] if result.get("triad_gbps") else []
    if limits := result.get("limits"):
        names = {"host_gbps": "host memory", "down_gbps": "bus down", "up_gbps": "bus up at the same time"}
        facts += [f"{name} {limits[key]:,.1f} GB/s" for key, name in names.items()]
    lines = [", ".join(facts) + "."]
    lines += [f"Failed: {name}, {_short(reason)}." for name, reason in (result.get("failed") or {}).items()]
    if missing := result.get("missing_libraries"):
        lines.append(f"Missing, so not compared with: {', '.join(missing)}.")
    if result.get("driver_loop") == "stand-in":
        lines.append("A loop that stands in for the Trainer's.")
    if result.get("left_out"):
        lines.append(f"Left out by the time limit: {', '.join(result['left_out'])}.")
    return " ".join(lines)


def markdown(rows: list[Row], result: Row) -> str:
    """One line a row, columns that no row fills left out."""
    training = any(row["contract"] in TRAINING for row in rows)
    possible = TRAINING_COLUMNS if training else OFFLOAD_COLUMNS if any(map(_is_offload, rows)) else STEP_COLUMNS
    columns = [one for one in possible if any(row.get(one[1]) for row in rows)]
    device_type = result.get("device_type") or ("cuda" if result.get("driver") else "cpu")
    titles = ["what", "library", *(title for title, _ in columns), "again"]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    for row in rows:
        what = _trained(row) if training else " ".join(str(row[name]) for name in NAMES[:-1])
        cells = _cells(row, [key for _, key in columns])
        lines.append(f"| {' | '.join([what, str(row['library']), *cells, f'`{command(row, device_type)}`'])} |")
    return "\n".join(lines)


def _is_offload(row: Row) -> bool:
    """Whether the row is of benchmarks/offload.py."""
    return "bus_ms" in row


def _short(reason: str) -> str:
    return " ".join(reason.replace("|", "/").split())[:120]


def _trained(row: Row) -> str:
    return str(row["workload"]) + ("" if row["format"] == "fp32" else f", {row['format']}")


def _cells(row: Row, keys: list[str]) -> list[str]:
    if row.get("error") or row.get("skipped"):
        reason = f"failed: {row['error']}" if row["error"] else f"skipped: {row['skipped']}"
        return [_short(reason)] + [""] * (len(keys) - 1)
    return [_cell(row, key) for key in keys]


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if key in ("efficiency", "tail_share"):
        return f"{100 * value:.1f}%"
    if key == "state_bytes":
        return f"{value / row['params']:.2f}"
    if key in ("peak_bytes", "host_bytes", "device_bytes"):
        return f"{value / 1e9:.{3 if key == 'device_bytes' else 2}f}"
    if key.endswith("_ms"):
        low, high = row.get(f"{key}_q1"), row.get(f"{key}_q3")
        return f"{value:.3f}" + ("" if low is None else f" ± {(high - low) / 2:.3f}")
    return f"{value:.3f}×" if key in ("speedup", "tail_speedup", "over_best") else f"{value:,.0f}"


def command(row: Row, device_type: str) -> str:
    """The one command that measures a row again."""
    if row["contract"] in TRAINING:
        return f"python benchmarks/{row['contract'].replace('trainer_step', 'trainer')}.py --device {device_type}"
    if _is_offload(row):
        case = " ".join(f"--{name} {row[name]}" for name in ("workload", "format", "contract"))
        return f"python benchmarks/offload.py --device {device_type} {case}"
    if suites.known(row):
        return suites.command_of(row, device_type)
    script = "step.py" if row["contract"] == "torch_scaler_clip_step" else "loop.py"
    case = "/".join(str(row[name]) for name in NAMES[:-1])
    return f"python benchmarks/{script} --device {device_type} --select {case}"


@click.command(help=__doc__.split("\n")[0])
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a page is out of date.")
def main(check: bool) -> None:
    for path in PAGES:
        before = path.read_text()
        after = fill(before)
        if check and before != after:
            raise click.ClickException(f"{path.name} is out of date; run python benchmarks/tables.py")
        if not check:
            path.write_text(after)


if __name__ == "__main__":
    main()
