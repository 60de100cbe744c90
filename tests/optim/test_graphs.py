"""CUDA graphs and streams: a captured step does what an eager one does, bit for bit, and runs where it is told to."""

import math

import pytest
import torch
from cases import ONE_EACH, assert_same_bits, memory, normal, parameters, set_gradients, train

import fusedopt

pytestmark = pytest.mark.gpu

SIZES = [5, 0, 4097, 65537]


def cuda_parameters(dtype=torch.float32):
    return parameters(SIZES, dtype, "cuda")


def give(params, seed, scale=1.0, bad=False):
    """New values in the same gradient memory, which a graph has the address of."""
    for i, p in enumerate(params):
        value = normal(p.shape, p.dtype, "cuda", seed=100 * seed + i) * scale
        p.grad = value if p.grad is None else p.grad.copy_(value)
    if bad:
        params[-1].grad[-1] = math.inf


def captured(*optimizers):
    """Warm up on a side stream, as torch's documentation has it, then capture one step of each optimizer."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for opt in optimizers:
            opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for opt in optimizers:
            opt.step()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_replays_are_eager_steps(case, kwargs, dtype):
    """Learning rate, gradients and, with nonfinite="skip", skipping change between replays."""
    params, eager_params = cuda_parameters(dtype), cuda_parameters(dtype)
    lr, eager_lr = (torch.tensor(0.01, device="cuda") for _ in range(2))
    opt, eager = case.make(params, lr=lr, **kwargs), case.make(eager_params, lr=eager_lr, **kwargs)
    give(params, seed=0)
    give(eager_params, seed=0)
    graph = captured(opt)
    eager.step()
    for seed in range(1, 8):
        bad = seed in (3, 4) and "nonfinite" in kwargs
        for one in (params, eager_params):
            give(one, seed, scale=10.0 ** (seed % 3 - 1), bad=bad)
        for one in (lr, eager_lr):
            one.fill_(0.01 * seed)
        graph.replay()
        eager.step()
        assert_same_bits(memory(opt), memory(eager))
        assert opt.step_was_skipped.item() is bad
        assert_same_bits(
            [opt.grad_norm, opt.clip_coef, opt.skipped_steps], [eager.grad_norm, eager.clip_coef, eager.skipped_steps]
        )
    assert float(opt.state[params[0]]["step"]) == 8 - opt.skipped_steps.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_tensors_of_both_dtypes(dtype):
    """Read on the device, each to all its digits."""
    lr = torch.tensor(0.1, dtype=dtype, device="cuda")
    results = []
    for given in (lr, lr.item()):
        params = parameters([17, 4097], torch.float64, "cuda")
        opt = fusedopt.AdamW(params, lr=given)
        train(opt, params, 3)
        results.append(memory(opt))
    assert_same_bits(*results)


def test_scale_and_found_inf_change_between_replays():
    params, eager_params = cuda_parameters(), cuda_parameters()
    opt, eager = (fusedopt.AdamW(p, lr=0.02, max_grad_norm=1.0) for p in (params, eager_params))
    for o in (opt, eager):
        o.grad_scale, o.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    give(params, seed=0)
    give(eager_params, seed=0)
    graph = captured(opt)
    eager.step()
    for seed, (scale, found_inf) in enumerate(
        [(8.0, 0.0), (1024.0, 0.0), (1024.0, 1.0), (3.0, 0.0), (3.0, 2.0)], start=1
    ):
        for o, ps in ((opt, params), (eager, eager_params)):
            give(ps, seed, scale=scale)
            o.grad_scale.fill_(scale)
            o.found_inf.fill_(found_inf)
        graph.replay()
        eager.step()
        assert_same_bits(memory(opt), memory(eager))
    assert opt.skipped_steps.item() == 2


def test_first_step_cannot_be_captured():
    """It makes states and tables, which a replay would not repeat: refused, and the optimizer goes on unharmed."""
    params, eager_params = cuda_parameters(), cuda_parameters()
    opt, eager = fusedopt.AdamW(params, max_grad_norm=1.0), fusedopt.AdamW(eager_params, max_grad_norm=1.0)
    give(params, seed=0)
    give(eager_params, seed=0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in eager_params])
    graph = captured(opt)
    eager.step()
    give(params, seed=1)
    give(eager_params, seed=1)
    graph.replay()
    eager.step()
    assert_same_bits(memory(opt), memory(eager))


def test_two_optimizers_in_one_graph():
    params, eager_params = ([cuda_parameters() for _ in range(2)] for _ in range(2))
    optimizers = [fusedopt.AdamW(params[0], max_grad_norm=0.5), fusedopt.Lion(params[1], max_grad_norm=2.0)]
    eager = [fusedopt.AdamW(eager_params[0], max_grad_norm=0.5), fusedopt.Lion(eager_params[1], max_grad_norm=2.0)]
    for ps in (*params, *eager_params):
        give(ps, seed=0)
    graph = captured(*optimizers)
    for o in eager:
        o.step()
    for seed in range(1, 4):
        for i in range(2):
            give(params[i], seed + i)
            give(eager_params[i], seed + i)
        graph.replay()
        for o in eager:
            o.step()
    for one, other in zip(optimizers, eager, strict=True):
        assert_same_bits(memory(one), memory(other))


def test_eager_steps_between_replays():
    """The graph keeps the addresses that it was captured with, whatever eager steps did to the plan since."""
    params, eager_params = cuda_parameters(), cuda_parameters()
    opt, eager = fusedopt.AdamW(params, max_grad_norm=0.5), fusedopt.AdamW(eager_params, max_grad_norm=0.5)
    give(params, seed=0)
    give(eager_params, seed=0)
    graph = captured(opt)
    eager.step()
    static = [p.grad for p in params]
    for seed in range(1, 5):
        give(eager_params, seed)
        eager.step()
        if seed % 2:
            for p, g in zip(params, static, strict=True):
                p.grad = g
            give(params, seed)
            graph.replay()
        else:
            set_gradients(params, seed=0)  # new memory
            for p, q in zip(params, eager_params, strict=True):
                p.grad.copy_(q.grad)
            opt.step()
        assert_same_bits(memory(opt), memory(eager))


def test_step_reads_nothing_back():
    """No synchronisation: a step is issued while the device still works on what comes before it."""
    params = cuda_parameters()
    opt = fusedopt.AdamW(params, max_grad_norm=0.5, nonfinite="skip")
    for seed in range(2):
        give(params, seed)
        opt.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(200_000_000)
        opt.step()
        norm, skipped, count, coef = opt.grad_norm, opt.step_was_skipped, opt.skipped_steps, opt.clip_coef
        done.record()
        assert not done.query(), "the step waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() > 0 and not skipped.item() and count.item() == 0 and coef.item() < 1


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_runs_on_the_current_stream(case):
    """Gradients that a slow side stream writes late are read late."""
    params, expected_params = cuda_parameters(), cuda_parameters()
    opt, expected = case.make(params, max_grad_norm=0.5), case.make(expected_params, max_grad_norm=0.5)
    stream = torch.cuda.Stream()
    for seed in range(3):
        give(params, seed=50)  # stale values that a step on another stream would read
        fresh = [normal(p.shape, device="cuda", seed=100 * seed + i) for i, p in enumerate(params)]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for p, g in zip(params, fresh, strict=True):
                p.grad.copy_(g)
            opt.step()
        stream.synchronize()
        give(expected_params, seed)
        expected.step()
        assert_same_bits(memory(opt), memory(expected))


def test_gradients_freed_after_a_step_on_a_side_stream():
    """Memory of gradients goes back to the allocator after the step; its next owner must not be read instead."""
    params, expected_params = cuda_parameters(), cuda_parameters()
    opt, expected = fusedopt.AdamW(params), fusedopt.AdamW(expected_params)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for seed in range(4):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            set_gradients(params, seed)
            opt.step()
            opt.zero_grad()
            for p in params:
                torch.empty_like(p).fill_(math.nan)
        set_gradients(expected_params, seed)
        expected.step()
    torch.cuda.synchronize()
    assert_same_bits(memory(opt), memory(expected))


# ---- whole training steps -----------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 7)).cuda()


@pytest.mark.parametrize("warm_up", [1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_training_steps(compiled, set_to_none, warm_up):
    """Forward, backward and step in one graph; learning rate, loss scale and data change; some replays are skipped."""

    def run(captured):
        model = network()
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        lr, scale = (torch.tensor(value, device="cuda") for value in (0.01, 1.0))
        opt = fusedopt.AdamW(model.parameters(), lr=lr, max_grad_norm=0.05, nonfinite="skip")
        x, graph = torch.empty(4, 33, device="cuda"), None

        def step():
            opt.zero_grad(set_to_none)
            (forward(x).square().mean() * scale).backward()
            opt.grad_scale = scale
            opt.step()

        for i in range(12):
            x.copy_(normal((4, 33), device="cuda", seed=i))
            x[0, 0] = math.nan if i in (5, 6) else x[0, 0]
            lr.fill_(0.01 / (i + 1))
            scale.fill_(2.0**i)
            if captured and i == warm_up:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
            graph.replay() if graph else step()
        return opt

    opt, expected = run(captured=True), run(captured=False)
    assert_same_bits(memory(opt), memory(expected))
    assert opt.skipped_steps.item() == 2
