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
    """``python tests/mutation`` writes the file; it must be run again when the list changes."""
    path = result_path(device)
    if not path.exists():
        pytest.skip(f"tests/results has no {path.name} yet: python tests/mutation --device {device}")
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["mutants"]] == [m.name for m in MUTANTS if m.gpu == (device == "cuda")]
    assert {row["result"] for row in record["mutants"]} == {"killed"}
    assert record["planted"] == record["killed"] == len(record["mutants"])


def test_table_is_that_of_the_results():
    """``python tests/mutation --table`` writes it."""
    assert table() in PAGE.read_text()
