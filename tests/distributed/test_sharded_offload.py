"""offload="cpu" for DTensors: checks that one or two processes run together."""

import pytest
import torch
from processes import assert_all_pass, run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import offload_checks  # noqa: E402


def test_on_cpus(tmp_path):
    assert_all_pass(run_checks("offload_checks", offload_checks.OF_TWO, 2, "gloo", tmp_path))


@pytest.mark.gpu
def test_on_one_gpu(tmp_path):
    """Through NCCL, alone: copies, streams, and where states are."""
    assert_all_pass(run_checks("offload_checks", offload_checks.CHECKS, 1, "nccl", tmp_path))


@pytest.mark.multigpu
@pytest.mark.gpu
def test_on_gpus(tmp_path):
    assert_all_pass(run_checks("offload_checks", offload_checks.OF_TWO, 2, "nccl", tmp_path))
