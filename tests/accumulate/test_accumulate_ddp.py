"""GradAccumulator under DistributedDataParallel: two processes over gloo against one with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits, normal, parameters

import fusedopt

WORLD, COUNT, TURNS = 2, 3, 2
MODES = ["folded", "default", "hooks", "weighted", "synced"]
TESTS = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


class Model(torch.nn.Module):
    """In float64, so that the order of sums hardly shows. `unused` never gets a gradient, `rare` only in process 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()
        self.rare = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x, rare=False):
        return self.body(x) + (self.rare.sum() * x.sum(1, keepdim=True) if rare else 0.0)


def batch(turn: int, rank: int, k: int) -> torch.Tensor:
    """One micro-batch of a process. Sizes differ between all of them in the weighted case."""
    random = torch.Generator().manual_seed(100 * turn + 10 * rank + k)
    return torch.randn(2 + rank + k, 4, generator=random, dtype=torch.float64)


def optimizer(model):
    return fusedopt.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, max_grad_norm=0.5)


def train(mode: str, rank: int) -> list[torch.Tensor]:
    """One process' part."""
    model = Model()
    synced = mode == "synced"
    ddp = torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=synced, gradient_as_bucket_view=synced
    )
    opt = optimizer(model)
    acc = fusedopt.GradAccumulator(opt, hooks=mode == "hooks")
    for turn in range(TURNS):
        for k in range(COUNT):
            x = batch(turn, rank, k)
            if mode == "weighted":
                acc.weight = len(x)
            if synced and k + 1 == COUNT:
                ddp(x).square().mean().backward()
            else:
                with ddp.no_sync():
                    ddp(x, rare=rank == 1 and not synced).square().mean().backward()
                acc.accumulate()
        acc.all_reduce(find_unused_parameters=mode != "default")
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def worker(rank: int, port: int, out: str) -> None:
    """All modes in one process, because starting one takes longer than everything else."""
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, WORLD, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    torch.save({mode: train(mode, rank) for mode in MODES}, f"{out}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def alone(mode: str) -> list[torch.Tensor]:
    """The whole batch in one process, by autograd alone."""
    model = Model()
    opt = optimizer(model)
    for turn in range(TURNS):
        losses, weights = [], []
        for rank in range(WORLD):
            for k in range(COUNT):
                x = batch(turn, rank, k)
                losses.append(model(x, rare=rank == 1 and mode != "synced").square().mean())
                weights.append(float(len(x)) if mode == "weighted" else 1.0)
        sum(w * loss for w, loss in zip(weights, losses, strict=True)).div(sum(weights)).backward()
        if mode == "default":  # counts as 0
            model.unused.grad = torch.zeros_like(model.unused)
        opt.step()
        opt.zero_grad()
    return [p.detach() for p in model.parameters()]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[dict[str, list[torch.Tensor]]]:
    """The parameters of each process, by mode."""
    port, out = free_port(), str(tmp_path_factory.mktemp("ddp"))
    path = os.pathsep.join([str(TESTS), str(TESTS / "accumulate"), *sys.path])
    script = "import test_accumulate_ddp; test_accumulate_ddp.worker({}, {}, {!r})"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script.format(rank, port, out)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [torch.load(f"{out}/{rank}", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one_with_the_whole_batch(mode, trained):
    """All micro-batches in no_sync and all_reduce(); or the last one synchronised by DDP.

    At most eight roundings of float64 for a step of the sum, whose order differs, in gradients of about 1; the update
    of AdamW divides by |g| + eps, so that its relative error is that of g, within a factor of ten: 1e-12 is enough.
    """
    first, second = (each[mode] for each in trained)
    assert_same_bits(first, second)
    for got, expected in zip(first, alone(mode), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    decayed = not torch.equal(first[1], torch.ones(2, dtype=torch.float64))
    assert decayed is (mode == "default"), "an unused parameter counts as 0 if nobody asks"


def test_all_reduce_in_one_process():
    """A group of one changes nothing; so does a group where nobody holds anything."""
    distributed = torch.distributed
    if distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for reduce in (False, True):
            params = [torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(3))]
            opt = fusedopt.AdamW(params, lr=0.01)
            acc = fusedopt.GradAccumulator(opt)
            for k in range(2):
                params[0].grad = torch.full((5,), k + 1.0)
                acc.accumulate(k + 1.0)
            if reduce:
                acc.all_reduce(find_unused_parameters=True)
            opt.step()
            results.append([p.detach() for p in params])
            if reduce:
                acc.all_reduce(find_unused_parameters=True)
                opt.step()
                assert opt.state[params[0]]["step"].item() == 1 and params[1] not in opt.state
        assert_same_bits(*results)
    finally:
        distributed.destroy_process_group()


# ---- one process --------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_reduce_closes_what_hooks_have_folded(reduction, group_of_one):
    """Of one process it is the sum of two micro-batches, or their mean; the second one has not been ended by a call."""
    params = parameters([5, 3], device="cpu")
    acc = fusedopt.GradAccumulator(params, reduction=reduction, hooks=True)
    expected = [torch.zeros_like(p) for p in params]
    for seed in range(2):
        sum((p * normal(p.shape, seed=10 * seed + i)).sum() for i, p in enumerate(params)).backward()
        expected = [e + normal(p.shape, seed=10 * seed + i) for i, (e, p) in enumerate(zip(expected, params))]
        if seed == 0:
            acc.accumulate()
    acc.all_reduce()
    assert acc.micro_batches == 2
    assert_same_bits(list(acc.grads()), [e / 2 if reduction == "mean" else e for e in expected])
    acc.detach()
    assert not acc.holds


def test_all_reduce_of_frozen_parameters_is_nothing(group_of_one):
    acc = fusedopt.GradAccumulator([torch.zeros(3)])
    acc.all_reduce()
    assert acc.micro_batches == 0 and acc.buffers == []
