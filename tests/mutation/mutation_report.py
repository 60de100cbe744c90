"""What a run of all mutants is recorded as: JSON in tests/results, and the table in docs/correctness.md."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mutants import ROOT, all_mutants
from trial import KILLED, Outcome

__all__ = ["BEGIN", "END", "PAGE", "result_path", "table", "write_json", "write_table"]

PAGE = ROOT / "docs" / "correctness.md"
BEGIN = "<!-- mutants: written by `python tests/mutation --table` -->"
END = "<!-- end of mutants -->"
DEVICES = ("cpu", "cuda")


def result_path(device: str) -> Path:
    return ROOT / "tests" / "results" / ("mutants.json" if device == "cpu" else "mutants-gpu.json")


def _commit() -> str | None:
    if commit := os.environ.get("FUSEDOPT_COMMIT"):
        return commit
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def write_json(path: Path, device: str, outcomes: Sequence[Outcome]) -> None:
    """Rows of mutants that were not run this time stay as they are, those of mutants that are no more go."""
    from fusedopt.testing.report import environment

    here = {**environment(device), "commit": _commit()}
    old = json.loads(path.read_text())["mutants"] if path.exists() else []
    rows = {row["name"]: row for row in old}
    rows |= {each.name: {**asdict(each), "date": here["date"], "commit": here["commit"]} for each in outcomes}
    rows = [rows[m.name] for m in all_mutants() if m.name in rows and m.gpu == (device == "cuda")]
    killed = sum(row["result"] == KILLED for row in rows)
    record = {**here, "planted": len(rows), "killed": killed, "mutants": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _short(by: str) -> str:
    """A test's file and name, without folder and parameters."""
    return by.rpartition("/")[2].partition("[")[0].replace(".py::", ": ") if "::" in by else by


def table() -> str:
    """Of what stands in tests/results, in Markdown."""
    lines = []
    for device in DEVICES:
        path = result_path(device)
        if not path.exists():
            lines += [f"Not run yet: those that need a GPU (`python tests/mutation --device {device}`).", ""]
            continue
        record = json.loads(path.read_text())
        command = "python tests/mutation" + ("" if device == "cpu" else f" --device {device}")
        where = f"{record['device']}, torch {record['torch']}, {record['date'][:10]}"
        lines += [
            f"`{command}`: {record['killed']} of {record['planted']} mutants killed; "
            f"{where}, commit {(record['commit'] or '?')[:7]}.",
            "",
            "| mutant | mistake | file | killed by |",
            "| --- | --- | --- | --- |",
        ]
        for row in record["mutants"]:
            by = _short(row["by"]) if row["result"] == KILLED else f"**{row['result']}**"
            lines.append(f"| {row['name']} | {row['mistake']} | `{row['path']}` | {by} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def write_table() -> None:
    """Between its markers."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")
