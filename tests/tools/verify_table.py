"""Writes the figures of `docs/correctness.md` from the JSON of one or several runs of `fusedopt verify`.

    fusedopt verify --json cpu.json
    fusedopt verify --device cuda --json cuda.json
    python tests/tools/verify_table.py cpu.json cuda.json

Each run and backend becomes a table between the two marks of the page. It replaces that of the same backend and device;
those of others stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fusedopt.testing.report import format_table

BEGIN, END = "<!-- verify: begin -->", "<!-- verify: end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "correctness.md"


def read_run(path: str | Path) -> dict[str, Any]:
    """ValueError where it is no report of fusedopt's own optimizers."""
    try:
        record = json.loads(Path(path).read_text())
        subject = record["environment"]["subject"]
        if not record["rows"]:
            raise ValueError("it has no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the JSON of `fusedopt verify --json`, got {type(error).__name__}: {error}"
        ) from error
    if subject != "fusedopt":
        raise ValueError(f"{path} is a report on {subject}, expected one on fusedopt; run verify without --optimizer")
    return record


def sections(record: dict[str, Any]) -> dict[str, list[str]]:
    """By heading, one for each backend of a run, the lines below it: where it ran, and its table."""
    environment, found = record["environment"], {}
    unreached = record["summary"]["unreached"]
    late = f" The time limit left out {unreached:,} cases of the run." if unreached else ""
    for backend in dict.fromkeys(row["backend"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["backend"] == backend and not row["left_out"]]
        failed = sum(not row["passed"] for row in rows)
        where = f"{environment['device']}, torch {environment['torch']}, {environment['date'][:10]}"
        made = f"`{environment['command']}`; {where}."
        counts = f"{len(rows):,} cases, {failed} failed.{late} {made}"
        found[f"### {backend}, {environment['device']}"] = ["", counts, "", *format_table(rows), ""]
    return found


def sections_of(lines: list[str]) -> dict[str, list[str]]:
    """The lines below each heading of those that stand between the marks."""
    found: dict[str, list[str]] = {}
    below: list[str] = []
    for line in lines:
        if line.startswith("### "):
            below = found[line] = []
        else:
            below.append(line)
    return found


def replaced(page: str, new: dict[str, list[str]]) -> str:
    """The page with these sections between its marks, in the place of those with their headings; others stay.
    ValueError where it has not both marks, once each, in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"expected one {BEGIN} and, after it, one {END}; put them where the tables are to be")
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    both = {**sections_of(old.splitlines()), **new}
    lines = [line for heading, below in both.items() for line in (heading, *below)]
    return before + "\n".join([BEGIN, "", *lines, END]) + after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reports", nargs="+", help="JSON files of fusedopt verify")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the marks (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        new = {heading: below for path in chosen.reports for heading, below in sections(read_run(path)).items()}
        chosen.page.write_text(replaced(chosen.page.read_text(), new))
    except (OSError, ValueError) as error:
        print(f"verify_table: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.page}: tables of {', '.join(chosen.reports)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
