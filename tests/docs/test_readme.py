"""The figures of the README are those of the results that it names."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {3: "fusedopt-cuda", 5: "torch-fused", 6: "torch-grad-scale"}
"""Libraries by the place of their cells in a row of the table."""


def test_measured_figures():
    section = re.search(
        r"<!-- figures: (\S+) -->\n(.*?)<!-- end of figures -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    result = json.loads((ROOT / section[1]).read_text())
    facts = [
        result["device"],
        result["torch"],
        result["driver"],
        result["date"][:10],
        f"{result['copy_gbps'] / 1e3:.2f} TB/s",
    ]
    assert all(fact in section[2] for fact in facts)
    measured = {
        (row["workload"], row["bytes_per_param"], row["library"], f"{row['gpu_ms']:.3f} ({row['launches']:g})")
        for row in result["rows"]
        if not row["error"]
    }
    lines = [line for line in section[2].splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    shown = {(row[0], int(row[2]), library, row[i]) for row in rows for i, library in COLUMNS.items() if row[i] != "–"}
    assert len(rows) >= 5 and shown <= measured, shown - measured
    efficiencies = {f"{100 * row['efficiency']:.1f}%" for row in result["rows"] if row["library"] == "fusedopt-cuda"}
    assert {row[4] for row in rows} <= efficiencies


def test_images_are_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / image).is_file(), f"{page.name} shows {image}"
