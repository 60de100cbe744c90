"""The list of mutants cannot rot: every one still fits the sources, and what was recorded is about the same list."""

import json
from collections import Counter

import pytest
from mutants import ROOT, all_mutants
from mutation_report import PAGE, result_path, table

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fits_the_sources(mutant):
    """The text that it replaces occurs exactly once, and its tests are in files that exist."""
    assert mutant.applied((ROOT / mutant.path).read_text()) != (ROOT / mutant.path).read_text()
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_names_are_different():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_were_killed_when_they_were_last_run(device):
    """``python tests/mutation`` writes the file, with ``--only`` some rows of it."""
    path = result_path(device)
    rows = json.loads(path.read_text())["mutants"] if path.exists() else []
    assert all(row["result"] == "killed" for row in rows)
    names = [m.name for m in MUTANTS if m.gpu == (device == "cuda")]
    missing = set(names) - {row["name"] for row in rows}
    if missing:
        pytest.skip(f"{path.name} says nothing yet of {', '.join(sorted(missing))}: python tests/mutation --only …")
    assert [row["name"] for row in rows] == names


def test_table_is_that_of_the_results():
    """``python tests/mutation --table`` writes it."""
    assert table() in PAGE.read_text()
