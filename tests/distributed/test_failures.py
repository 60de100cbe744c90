"""A process that ends, hangs, or has other parameters: a clear error in the others, and no waiting past the timeout."""

import json
from pathlib import Path

import pytest
import torch
from processes import finish, start

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

TIMEOUT = 2
SLACK = 20
"""Seconds for everything else, on a busy machine."""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict]:
    """By scenario and rank."""
    out = tmp_path_factory.mktemp("failures")
    code = f"import failures; assert failures.TIMEOUT == {TIMEOUT}; failures.main({str(out)!r})"
    [(code, output)] = finish([start(code, Path(__file__).parent)], 120)
    assert code == 0, output
    return {path.name: json.loads(path.read_text()) for path in out.iterdir()}


GRADIENTS, TENSORS = "the gradients' norm", "the norms of single tensors"


@pytest.mark.parametrize(
    ("scenario", "what"),
    [("died-0", GRADIENTS), ("died_waiting-0", GRADIENTS), ("late-0", GRADIENTS), ("died_in_lamb-0", TENSORS)],
)
def test_a_process_that_does_not_come(scenario, what, told):
    result = told[scenario]
    assert result["error"].startswith(f"RuntimeError: fusedopt: the all-reduce of {what}")
    for word in ("nothing has been updated", "expected every process", "look for a process that ended"):
        assert word in result["error"]
    assert result["seconds"] < TIMEOUT + SLACK and not result["changed"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("more_parameters", "nothing more"),
        ("more_parameters_of_lamb", "nothing more"),
        ("other_options", "norm_type=1.0"),
        ("other_seeds", "seed 1"),
    ],
)
def test_processes_that_disagree(scenario, words, rank, told):
    """Every process says so, in its first step."""
    result = told[f"{scenario}-{rank}"]
    assert result["error"].startswith(
        ("ValueError: AdamW.step: the processes of ", "ValueError: LAMB.step: the processes of ")
    )
    for word in ("disagree", words, f"process {1 - rank} has", "build the same model"):
        assert word in result["error"]
    assert result["seconds"] < SLACK and not result["changed"]
