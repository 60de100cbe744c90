"""Streams and threads on a GPU: gradients from a side stream, optimizers on streams and in threads of their own."""

import threading

import pytest
import torch
from cases import BY_NAME, assert_same_bits, memory, normal, parameters, set_gradients

import fusedopt

pytestmark = pytest.mark.gpu

SIZES = [5, 4097, 70_001, 300]
BACKENDS = ["cuda", "triton"]
ROWS = [BY_NAME[name] for name in ("adamw-decay", "lion-decay", "lamb-decay", "sgd-momentum")]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if not fusedopt.backends()[request.param].available:
        pytest.skip(fusedopt.backends()[request.param].reason)
    return request.param


def cuda_parameters(seed: int = 0) -> list:
    return parameters(SIZES, device="cuda", seed=seed)


def alone(case, backend, count: int, seed: int = 0) -> list[torch.Tensor]:
    """What steps on the current stream, one after the other, leave."""
    params = cuda_parameters(seed)
    opt = case.make(params, backend=backend, max_grad_norm=0.5)
    for step in range(count):
        set_gradients(params, seed=seed + step)
        opt.step()
    torch.cuda.synchronize()
    return [*memory(opt), opt.grad_norm.clone()]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_gradients_written_on_a_side_stream(case, backend):
    """The step's stream waits for theirs, as a training loop has it; stale ones are there until late."""
    params = cuda_parameters()
    opt = case.make(params, backend=backend, max_grad_norm=0.5)
    side = torch.cuda.Stream()
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    for step in range(3):
        fresh = [normal(p.shape, device="cuda", seed=10_000 + 100 * step + i) for i, p in enumerate(params)]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            for p, grad in zip(params, fresh, strict=True):
                p.grad.copy_(grad)
        torch.cuda.current_stream().wait_stream(side)
        opt.step()
    torch.cuda.synchronize()
    assert_same_bits([*memory(opt), opt.grad_norm], alone(case, backend, 3))


def test_a_backward_pass_on_a_side_stream(backend):
    def train(stream) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 7)).cuda()
        opt = fusedopt.AdamW(model.parameters(), lr=0.01, max_grad_norm=0.5, backend=backend)
        data = normal((20, 33), device="cuda")
        for _ in range(3):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(5_000_000)
                model(data).square().mean().backward()
            torch.cuda.current_stream().wait_stream(stream)
            opt.step()
            opt.zero_grad()
        torch.cuda.synchronize()
        return memory(opt)

    assert_same_bits(train(torch.cuda.Stream()), train(torch.cuda.current_stream()))


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_two_optimizers_on_two_streams(case, backend):
    """Steps of both are under way at once: neither knows anything of the other's tables, sums and counters."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    models = [cuda_parameters(seed) for seed in range(2)]
    opts = [case.make(params, backend=backend, max_grad_norm=0.5) for params in models]
    torch.cuda.synchronize()
    for step in range(4):
        for seed, (stream, params, opt) in enumerate(zip(streams, models, opts, strict=True)):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(3_000_000)
                set_gradients(params, seed=seed + step)
                opt.step()
    torch.cuda.synchronize()
    for seed, opt in enumerate(opts):
        assert_same_bits([*memory(opt), opt.grad_norm], alone(case, backend, 4, seed))


@pytest.mark.parametrize("own_streams", [True, False], ids=["own streams", "one stream"])
def test_threads_each_with_an_optimizer(own_streams, backend):
    """Four threads that start together, so that all look for their kernels at once."""
    case, count = BY_NAME["adamw-decay"], 4
    found, errors, start = {}, [], threading.Barrier(count)

    def train(seed: int) -> None:
        try:
            start.wait(60)
            stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                found[seed] = alone(case, backend, 5, seed)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=train, args=(seed,)) for seed in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors
    for seed in range(count):
        assert_same_bits(found[seed], alone(case, backend, 5, seed))
