"""How much memory the bandwidth's measurement takes."""

import pytest
import torch

from fusedopt.bench import timing


@pytest.fixture
def taken(monkeypatch):
    """Sizes of the arrays that are made, in bytes."""

    def empty(numel, dtype, device):
        sizes.append(numel * dtype.itemsize)
        return make(16, dtype=dtype, device=device)

    sizes, make = [], torch.empty
    monkeypatch.setattr(timing.torch, "empty", empty)
    return sizes


def test_a_copy_takes_a_share_of_the_free_memory_with_all_processes_together(taken, device, monkeypatch):
    monkeypatch.setattr(timing, "free_bytes", lambda device: 8 << 30)
    assert timing.copy_gbps(device, 16 << 20, 1) > 0  # fits
    timing.copy_gbps(device, 2 << 30, 1)
    timing.copy_gbps(device, 2 << 30, 1, processes=8)
    timing.triad_gbps(device, 2 << 30, 1)
    assert taken[:6] == [16 << 20] * 2 + [1 << 30] * 2 + [1 << 27] * 2
    assert sum(taken[6:]) <= 2 << 30 and len(taken) == 9


def test_free_memory_is_known(device):
    assert 1 << 20 < timing.free_bytes(device) < 1 << 45
