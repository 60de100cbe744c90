"""DTensor parameters, norms over processes: checks that two and four processes run together."""

import pytest
import torch
from processes import run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import sharded_checks  # noqa: E402


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, str]:
    return run_checks("sharded_checks", sharded_checks.CHECKS, 2, "gloo", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, str]:
    return run_checks("sharded_checks", sharded_checks.OF_FOUR, 4, "gloo", tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def nccl(tmp_path_factory) -> dict[str, str]:
    return run_checks("sharded_checks", sharded_checks.CHECKS, 2, "nccl", tmp_path_factory.mktemp("nccl"))


@pytest.mark.parametrize("check", sharded_checks.CHECKS)
def test_on_two_cpus(check, two):
    assert not two[check], two[check]


@pytest.mark.parametrize("check", sharded_checks.OF_FOUR)
def test_on_four_cpus(check, four):
    assert not four[check], four[check]


@pytest.mark.parametrize("variable", ["FUSEDOPT_NO_TENSOR_LAYOUT", "FUSEDOPT_NO_TORCH_FUNCTIONS"])
def test_by_way_of_python(variable, tmp_path):
    """Where torch has moved what is read in place: the same steps, only slower."""
    told = run_checks("sharded_checks", ["not_in_place"], 1, "gloo", tmp_path, **{variable: "1"})
    assert not told["not_in_place"], told["not_in_place"]


@pytest.mark.multigpu
@pytest.mark.gpu
@pytest.mark.parametrize("check", sharded_checks.CHECKS)
def test_on_gpus(check, nccl):
    assert not nccl[check], nccl[check]
