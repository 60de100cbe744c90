"""GradAccumulator on a GPU: the CPU's bits, launches, no waiting, streams, captured graphs."""

import json

import pytest
import torch
from accumulated import backward, give
from cases import DTYPES, ONE_EACH, assert_same_bits, comparer, hard_values, memory, normal, parameters

import fusedopt

pytestmark = pytest.mark.gpu

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZES = [5, 0, 4097, 65537]


def mains(acc) -> list[torch.Tensor]:
    return [acc._mains[p].tensor for p in acc.params]


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [normal, hard_values], ids=["normal", "hard"])
@pytest.mark.parametrize("main", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_the_cpus_bits(case, dtype, main, values):
    """Of main gradients, parameters and states; with weights. Norms may differ in the last place, so none is taken."""
    results = []
    for device in ("cpu", "cuda"):
        params = parameters(SIZES, dtype, device, values=values)
        opt = case.make(params)
        acc = fusedopt.GradAccumulator(opt, main)
        tensors = []
        for turn in range(2):
            for k, weight in enumerate((1.0, 0.3, 2.5)):
                give(params, 3 * turn + k, values)
                if k < 2:
                    acc.accumulate(weight)
                    tensors += [tensor.clone() for tensor in mains(acc)]
            acc.weight = weight
            opt.step()
        results.append([*tensors, *memory(opt)])
    comparer(assert_same_where_finite, case.rule, dtype, 2)(results[1], results[0])


def assert_same_where_finite(on_cuda, on_cpu):
    for cuda, cpu in zip(on_cuda, on_cpu, strict=True):
        finite = cpu.isfinite()
        assert torch.equal(cuda.cpu().isfinite(), finite)
        assert_same_bits(torch.where(finite, cuda.cpu(), 0), torch.where(finite, cpu, 0))


# ---- launches, waiting ---------------------------------------------------------------------------------------------


def kernels(work, folder) -> int:
    """How many kernels `work()` launches, as the profiler records them."""
    work()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    return sum(
        event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        for event in json.loads(path.read_text())["traceEvents"]
    )


@pytest.mark.parametrize("count", [4, 2000])
def test_one_launch_per_micro_batch_and_two_per_step(count, tmp_path):
    params = parameters([100 + i % 7 for i in range(count)], BFLOAT16, "cuda")
    opt = fusedopt.AdamW(params, master_weights="split16", max_grad_norm=1.0)
    acc = fusedopt.GradAccumulator(opt)
    grads = [torch.ones_like(p) for p in params]

    def give_same():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    def fold(weight=None):
        give_same()
        acc.accumulate(weight)

    def step():
        give_same()
        acc._count = 1  # as if more micro-batches had been folded
        opt.step()

    fold()
    opt.step()
    assert kernels(fold, tmp_path) == 1  # writes in the first call, adds in the second
    assert kernels(lambda: fold(3.0), tmp_path) == 1
    assert kernels(lambda: (fold(), give_same(), opt.step(), opt.zero_grad()), tmp_path) == 3
    assert kernels(step, tmp_path) == 2


@pytest.mark.parametrize("hooks", [False, True])
def test_nothing_waits(hooks):
    """Weights as tensors too: a whole accumulation is issued while the device works on what comes before it."""
    params = parameters(SIZES, BFLOAT16, "cuda")
    opt = fusedopt.AdamW(params, max_grad_norm=0.5, nonfinite="skip")
    acc = fusedopt.GradAccumulator(opt, hooks=hooks)
    weights = [2.5, torch.tensor(3.0, device="cuda"), torch.tensor([2], device="cuda"), 1.0]
    grads = [torch.ones_like(p) for p in params]

    def accumulation():
        for k, weight in enumerate(weights):
            acc.weight = weight
            sum((p * grad).sum() for p, grad in zip(params, grads, strict=True)).backward()
            if k + 1 < len(weights):
                acc.accumulate()
        opt.step()
        opt.zero_grad()

    for _ in range(2):
        accumulation()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(1_000_000_000)
        accumulation()
        done.record()
        assert not done.query(), "something waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped_steps.item() == 0


def test_gradients_freed_on_a_side_stream():
    """accumulate() frees gradients right after its launch; the next owner of their memory must not be read instead."""
    results = []
    for busy in (False, True):
        params = parameters(SIZES, device="cuda")
        opt = fusedopt.AdamW(params)
        acc = fusedopt.GradAccumulator(opt)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for turn in range(2):
                for k in range(3):
                    give(params, 3 * turn + k)
                    if busy:
                        torch.cuda._sleep(5_000_000)
                    acc.accumulate()
                    for p in params:
                        torch.empty_like(p).fill_(float("nan"))
                opt.step()
        torch.cuda.synchronize()
        results.append(memory(opt))
    assert_same_bits(*results)


# ---- graphs --------------------------------------------------------------------------------------------------------


class Program:
    """Forward and backward passes of a small model over static input, `count` micro-batches, and the step."""

    def __init__(self, dtype=FLOAT32, count=3, hooks=False, weighted=False):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
        self.model.to("cuda", dtype)
        self.lr = torch.tensor(0.01, device="cuda")
        self.opt = fusedopt.AdamW(self.model.parameters(), lr=self.lr, max_grad_norm=0.5, nonfinite="skip")
        self.acc = fusedopt.GradAccumulator(self.opt, hooks=hooks)
        self.inputs = torch.zeros(count, 8, 16, device="cuda", dtype=dtype)
        self.weights = torch.ones(count, device="cuda") if weighted else None

    def load(self, seed: int, bad=False) -> None:
        self.inputs.copy_(normal(self.inputs.shape, self.inputs.dtype, "cuda", seed=seed))
        if bad:
            self.inputs[1, 0, 0] = float("inf")
        if self.weights is not None:
            self.weights.copy_(normal(self.weights.shape, seed=seed).abs() + 0.1)
        self.lr.fill_(0.01 * (1 + seed % 3))

    def run(self) -> None:
        for k, x in enumerate(self.inputs):
            if self.weights is not None:
                self.acc.weight = self.weights[k]
            self.model(x).square().mean().backward()
            if k + 1 < len(self.inputs):
                self.acc.accumulate()
        self.opt.step()
        self.opt.zero_grad()

    def capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def contents(self):
        return [*memory(self.opt), self.opt.grad_norm, self.opt.skipped_steps]


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_captured_accumulation(dtype, weighted, hooks):
    """All backward passes, folds and the step in one graph: the bits of an eager loop, skipped steps included."""
    captured, eager = (Program(dtype, hooks=hooks, weighted=weighted) for _ in range(2))
    for program in (captured, eager):
        program.load(0)
    graph = captured.capture()
    eager.run()
    assert_same_bits(captured.contents(), eager.contents())
    for seed in range(1, 8):
        for program in (captured, eager):
            program.load(seed, bad=seed in (3, 4))
        graph.replay()
        eager.run()
        assert_same_bits(captured.contents(), eager.contents())
    assert captured.opt.skipped_steps.item() == 2


def test_eager_accumulations_between_replays():
    captured, eager = (Program() for _ in range(2))
    for program in (captured, eager):
        program.load(0)
    graph = captured.capture()
    eager.run()
    for seed in range(1, 5):
        for program in (captured, eager):
            program.load(seed)
        graph.replay() if seed % 2 else captured.run()
        eager.run()
        assert_same_bits(captured.contents(), eager.contents())


def test_the_first_call_cannot_be_captured():
    """Tables are copied in it; the accumulator goes on unharmed."""
    params = parameters(SIZES, device="cuda")
    opt = fusedopt.AdamW(params)
    acc = fusedopt.GradAccumulator(opt)
    give(params, 0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        acc.accumulate()
    assert not acc.holds and all(p.grad is not None for p in params)
    acc.accumulate()
    backward(params, 1)
    opt.step()


# ---- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [2.0, torch.tensor(2.0)], ids=str)
def test_cpu_and_cuda_parameters_in_one_optimizer(weight):
    results = []
    for devices in (("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu")):
        params = [p for device in devices for p in parameters([5, 4097], device=device)]
        opt = fusedopt.AdamW(params, lr=0.01)
        acc = fusedopt.GradAccumulator(opt)
        for turn in range(2):
            for k in range(3):
                give(params, 3 * turn + k)
                if k < 2:
                    acc.accumulate(weight)
            opt.step()
        results.append([p.detach().cpu() for p in params])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
