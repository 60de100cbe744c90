"""Figures of ``benchmarks/fsdp.py``: what its rows come to. Runs of it: tests/distributed/fsdp_checks.py."""

import torch

from benchmarks import fsdp
from benchmarks.goals import FSDP_CASE, FSDP_GOALS, judge_ranks


def row(rank: int, workload: str, library: str, **figures) -> dict:
    optimizer, layout, contract = FSDP_CASE.split("/")
    about = {"workload": workload, "optimizer": optimizer, "format": layout, "contract": contract}
    return {**about, "library": library, "rank": rank, **figures}


def test_goals_are_judged_for_each_process():
    """Each over its own figures of the other library; rows of other benchmarks and of one library alone say nothing."""
    rows = [
        row(0, "1.3B", "fusedopt-cuda", wall_ms=5.0, efficiency=0.97),
        row(0, "1.3B", "torch-fused", wall_ms=10.0, efficiency=0.6),
        row(1, "1.3B", "fusedopt-cuda", wall_ms=8.0, efficiency=0.90),
        row(1, "1.3B", "torch-fused", wall_ms=10.0, efficiency=0.6),
        row(1, "1000-dtensors", "fusedopt-cuda", host_ms=0.3),
        {key: value for key, value in row(0, "1000-dtensors", "fusedopt-cuda", host_ms=9.0).items() if key != "rank"},
    ]
    judged = judge_ranks(FSDP_GOALS, rows)
    assert len(judged) == 2 * len(FSDP_GOALS) and {goal["rank"] for goal in judged} == {0, 1}
    values = {goal["name"]: (goal["value"], goal["reached"]) for goal in judged if goal["value"] is not None}
    assert values == {
        f"rank 0: 1.3B/{FSDP_CASE}: share of the floor": (0.97, True),
        f"rank 0: 1.3B/{FSDP_CASE}: wall, times faster than torch": (2.0, True),
        f"rank 1: 1.3B/{FSDP_CASE}: share of the floor": (0.90, False),
        f"rank 1: 1.3B/{FSDP_CASE}: wall, times faster than torch": (1.25, False),
        f"rank 1: 1000-dtensors/{FSDP_CASE}: host ms": (0.3, True),
    }
    assert judge_ranks(FSDP_GOALS, rows[-1:]) == []


def test_a_model_too_large_for_all_processes_of_a_host_says_what_it_needs(monkeypatch):
    """1.34e9 parameters of 4 bytes: eight times whole at first, or once in parts, 9 tensors of that size."""
    free = {"bytes": 42 * 10**9}
    monkeypatch.setattr(fsdp.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(fsdp.distributed, "broadcast_object_list", lambda answer, device: None)
    monkeypatch.setattr(fsdp.timing, "free_bytes", lambda device: free["bytes"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    model, cpu = fsdp.WORKLOADS["1.3B"], torch.device("cpu")
    assert model.numel == 20 * (8192**2 + 8192)
    assert fsdp.too_large(model, cpu, 2) == "needs 48.3 GB of memory, 42.0 GB are free"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # a host each
    assert fsdp.too_large(model, cpu, 2) is None
    free["bytes"] = 6 * 10**9
    assert fsdp.too_large(model, cpu, 2) == "needs 6.0 GB of memory, 6.0 GB are free"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert fsdp.sharing(cpu) == 8 and fsdp.sharing(torch.device("cuda")) == 1
