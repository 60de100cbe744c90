"""torch.distributed.checkpoint: checks that four processes run together, in groups of one, two and four."""

import pytest
import torch
from processes import assert_all_pass, run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import checkpoint_checks  # noqa: E402


def test_on_cpus(tmp_path):
    assert_all_pass(run_checks("checkpoint_checks", checkpoint_checks.CHECKS, 4, "gloo", tmp_path))


@pytest.mark.multigpu
@pytest.mark.gpu
def test_on_gpus(tmp_path):
    assert_all_pass(run_checks("checkpoint_checks", checkpoint_checks.CHECKS, 2, "nccl", tmp_path))
