"""DTensor parameters, norms over processes: checks that two and four processes run together."""

import pytest
import torch
from processes import assert_all_pass, run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import sharded_checks  # noqa: E402

# One test for many checks: parallel runs of the suite would start the processes again for each part of the checks.


@pytest.mark.parametrize(
    ("world", "checks"), [(2, sharded_checks.CHECKS), (4, sharded_checks.OF_FOUR)], ids=["two", "four"]
)
def test_on_cpus(world, checks, tmp_path):
    assert_all_pass(run_checks("sharded_checks", checks, world, "gloo", tmp_path))


@pytest.mark.gpu
def test_on_one_gpu(tmp_path):
    """Through NCCL, alone: what is launched before and after the exchange."""
    assert_all_pass(run_checks("sharded_checks", sharded_checks.OF_ONE, 1, "nccl", tmp_path))


@pytest.mark.multigpu
@pytest.mark.gpu
def test_on_gpus(tmp_path):
    assert_all_pass(run_checks("sharded_checks", sharded_checks.CHECKS, 2, "nccl", tmp_path))


@pytest.mark.parametrize("variable", ["FUSEDOPT_NO_TENSOR_LAYOUT", "FUSEDOPT_NO_TORCH_FUNCTIONS"])
def test_by_way_of_python(variable, tmp_path):
    """Where torch has moved what is read in place: the same steps, only slower."""
    assert_all_pass(run_checks("sharded_checks", ["not_in_place"], 1, "gloo", tmp_path, **{variable: "1"}))
