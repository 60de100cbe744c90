"""Memory runs out while a step makes state: the state stays as it was, and the next step is as if nothing had been."""

import copy

import pytest
import torch
from cases import assert_same_bits, memory, normal
from planted import OutOfMemory

import fusedopt
from fusedopt import passes

FORMATS = {
    "plain": (torch.float32, {}),
    "masters": (torch.bfloat16, {"master_weights": "fp32"}),
    "split16-int8": (torch.bfloat16, {"master_weights": "split16", "state_dtype": "int8", "min_8bit_size": 0}),
    "int8": (torch.float32, {"state_dtype": "int8", "min_8bit_size": 0}),
}
BACKENDS = [
    "cpu",
    "reference",
    "triton",
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPES = [(300,), (4, 5)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def device_of(backend) -> torch.device:
    return torch.device("cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu")


def make(backend, dtype, options, gaps=False):
    device = device_of(backend)
    params = [torch.nn.Parameter(normal(shape, dtype, device, seed=i)) for i, shape in enumerate(SHAPES)]
    if gaps:
        params[1] = torch.nn.Parameter(normal((4, 10), dtype, device, seed=1)[:, ::2])
    opt = fusedopt.AdamW(params, lr=0.1, backend=backend, seed=1, max_grad_norm=1.0, **options)
    set_gradients(params)
    return params, opt


def set_gradients(params, seed=0) -> None:
    """The last one laid out unlike its parameter, so that it must be copied."""
    for i, p in enumerate(params):
        p.grad = normal(p.shape, p.dtype, p.device, seed=100 * seed + i)
    params[-1].grad = params[-1].grad.t().contiguous().t()


def fail_everywhere(step, unchanged, monkeypatch, most=200) -> int:
    """Calls `step` until no operation before its update is left to fail; `unchanged` after each failure."""
    update = passes.run_update
    for n in range(1, most):
        failing = OutOfMemory(n)

        def run_update(tables, norms, failing=failing):
            failing.left = 10**9  # from here on tensors are written
            update(tables, norms)

        monkeypatch.setattr(passes, "run_update", run_update)
        try:
            with failing:
                step()
        except torch.OutOfMemoryError:
            unchanged()
            continue
        assert not failing.happened, "an error was swallowed"
        return n - 1
    raise AssertionError(f"more than {most} operations")


@pytest.mark.parametrize("name", FORMATS)
def test_first_step(name, backend, monkeypatch):
    dtype, options = FORMATS[name]
    params, opt = make(backend, dtype, options)
    before = memory(opt)

    def unchanged():
        assert not opt.state
        assert_same_bits(memory(opt), before)

    assert fail_everywhere(opt.step, unchanged, monkeypatch) >= 4
    expected_params, expected = make(backend, dtype, options)
    expected.step()
    assert_same_bits(memory(opt), memory(expected))
    set_gradients(params, 1)
    set_gradients(expected_params, 1)
    opt.step()
    expected.step()
    assert_same_bits(memory(opt), memory(expected))


def test_some_state_is_there(backend, monkeypatch):
    """A parameter that gets its first gradient later: the others' state is kept, its own is not begun."""
    params, opt = make(backend, torch.bfloat16, FORMATS["masters"][1])
    late = params[0].grad
    params[0].grad = None
    opt.step()
    params[0].grad = late
    before = memory(opt)

    def unchanged():
        assert list(opt.state) == [params[1]]
        assert_same_bits(memory(opt), before)

    assert fail_everywhere(opt.step, unchanged, monkeypatch) >= 2
    assert len(opt.state) == 2 and opt.state[params[1]]["step"] == 2 and opt.state[params[0]]["step"] == 1


@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("saved, wanted", [("split16-int8", "masters"), ("masters", "split16-int8")])
def test_converting_a_checkpoint(saved, wanted, gaps, backend, monkeypatch):
    """Each parameter's state is converted completely or not at all, so the step that comes through is the same."""
    _, source = make(backend, *FORMATS[saved], gaps)
    source.step()
    checkpoint = copy.deepcopy(source.state_dict())
    results = []
    for fails in (True, False):
        params, opt = make(backend, *FORMATS[wanted], gaps)
        with torch.no_grad():
            for p, trained in zip(params, source.param_groups[0]["params"]):
                p.copy_(trained)
        opt.load_state_dict(checkpoint)
        masters = opt.master_params()

        def unchanged(opt=opt, masters=masters):
            assert_same_bits(opt.master_params(), masters)

        if fails:
            assert fail_everywhere(opt.step, unchanged, monkeypatch) >= 2
        else:
            opt.step()
        results.append(memory(opt))
    assert_same_bits(*results)


def test_loading_a_checkpoint(backend, monkeypatch):
    dtype, options = FORMATS["split16-int8"]
    _, source = make(backend, *FORMATS["masters"])
    source.step()
    checkpoint = source.state_dict()
    _, opt = make(backend, dtype, options)
    before = memory(opt)
    for n in range(1, 300):
        with OutOfMemory(n) as failing:
            try:
                opt.load_state_dict(checkpoint)
            except torch.OutOfMemoryError:
                assert not opt.state
                assert_same_bits(memory(opt), before)
                continue
        break
    assert n > 4 and not failing.happened and len(opt.state) == 2


# ---- accumulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hooks", [False, True], ids=["accumulate", "hooks"])
def test_main_gradients(hooks, backend, monkeypatch):
    """They are made by the first micro-batch; if that fails its gradients are still there, to be folded once more."""
    params, opt = make(backend, torch.bfloat16, {})
    accumulator = fusedopt.GradAccumulator(opt)
    grads = [p.grad.clone() for p in params]

    def fold():
        if hooks:  # what a backward pass calls for each parameter
            for p in params:
                if p.grad is not None:
                    accumulator._fold(p)
            accumulator.accumulate()
        else:
            accumulator.accumulate()

    for n in range(1, 200):
        with OutOfMemory(n) as failing:
            try:
                fold()
            except torch.OutOfMemoryError:
                assert not opt.state and accumulator.micro_batches == 0
                if not hooks:
                    assert_same_bits([p.grad for p in params], grads)
                continue
        break
    assert n > 2 and not failing.happened and accumulator.micro_batches == 1
    assert_same_bits(accumulator.grads(), [grad.float() for grad in grads])


def test_loading_accumulated_gradients(device):
    """What was held before is held still."""
    params = [torch.nn.Parameter(normal(shape, device=device)) for shape in SHAPES]
    accumulator = fusedopt.GradAccumulator(params)
    set_gradients(params, 1)
    accumulator.accumulate()
    held = [main.tensor.clone() for main in accumulator._mains.values()]
    other = fusedopt.GradAccumulator([torch.nn.Parameter(normal(shape, device=device)) for shape in SHAPES])
    set_gradients(other.params, 2)
    other.accumulate()
    state = {**other.state_dict(), "weight": torch.ones((), dtype=torch.float64)}
    params[0].data = params[0].data.view(10, 30)  # another shape, so its main gradient must be made anew
    state["main_grads"][0] = state["main_grads"][0].view(10, 30)
    with OutOfMemory(1) as failing, pytest.raises(torch.OutOfMemoryError):
        accumulator.load_state_dict(state)
    assert failing.happened and accumulator.micro_batches == 1
    assert_same_bits([main.tensor for main in accumulator._mains.values()], held)
    assert all(main.held.value for main in accumulator._mains.values())
    accumulator.load_state_dict(state)
    assert_same_bits(accumulator.grads(), list(state["main_grads"].values()))


# ---- release ------------------------------------------------------------------------------------------------------


def test_released_gradients(backend, monkeypatch):
    """The backward pass raises; the parameter that ran out of memory has neither been updated nor got a state."""
    params, opt = make(backend, torch.float32, {})
    opt.max_grad_norm = None
    opt.release_gradients()
    before = memory(opt)

    def backward():
        opt.zero_grad()
        (params[0].sum() * 2.0).backward()

    def unchanged():
        assert not opt.state
        assert_same_bits(memory(opt), before)

    assert fail_everywhere(backward, unchanged, monkeypatch) >= 4
    assert params[0].grad is None and opt.state[params[0]]["step"] == 1
