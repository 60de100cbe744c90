"""FSDP2, HSDP, tensor parallelism, DDP, ZeRO: checks that two and four processes run together."""

import pytest
import torch
from processes import assert_all_pass, run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import fsdp_checks  # noqa: E402

# One test for many checks: parallel runs of the suite would start the processes again for each part of the checks.


@pytest.mark.parametrize(("world", "checks"), [(2, fsdp_checks.CHECKS), (4, fsdp_checks.OF_FOUR)], ids=["two", "four"])
def test_on_cpus(world, checks, tmp_path):
    assert_all_pass(run_checks("fsdp_checks", checks, world, "gloo", tmp_path))


@pytest.mark.multigpu
@pytest.mark.gpu
def test_on_gpus(tmp_path):
    assert_all_pass(run_checks("fsdp_checks", fsdp_checks.CHECKS, 2, "nccl", tmp_path))
