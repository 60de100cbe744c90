"""FSDP2, HSDP, tensor parallelism, DDP, ZeRO: checks that two and four processes run together."""

import pytest
import torch
from processes import run_checks

pytest.importorskip("torch.distributed.tensor")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

import fsdp_checks  # noqa: E402


@pytest.fixture(scope="module", params=[2, 4])
def gloo(request, tmp_path_factory) -> dict[str, str]:
    return run_checks("fsdp_checks", fsdp_checks.CHECKS, request.param, "gloo", tmp_path_factory.mktemp("gloo"))


@pytest.fixture(scope="module")
def nccl(tmp_path_factory) -> dict[str, str]:
    return run_checks("fsdp_checks", fsdp_checks.CHECKS, 2, "nccl", tmp_path_factory.mktemp("nccl"))


@pytest.mark.parametrize("check", fsdp_checks.CHECKS)
def test_on_cpus(check, gloo):
    assert not gloo[check], gloo[check]


@pytest.mark.multigpu
@pytest.mark.gpu
@pytest.mark.parametrize("check", fsdp_checks.CHECKS)
def test_on_gpus(check, nccl):
    assert not nccl[check], nccl[check]
