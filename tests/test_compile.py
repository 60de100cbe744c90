"""torch.compile: functions that hold a whole training step, and compiled models beside eager steps."""

import contextlib
import inspect
import subprocess
import sys
import timeit

import pytest
import torch
from cases import ONE_EACH, assert_same_bits, memory
from torch._dynamo.utils import counters

import fusedopt

BACKENDS = ["eager", "aot_eager", "inductor"]
WARM_UP, STEPS = 3, 8
KEPT_OUT = [(fusedopt.AdamW, name) for name in ("step", "zero_grad", "metrics")] + [(fusedopt.GradScaler, "step")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def no_compilation():
    """An error for every recompilation, and for every graph that is compiled anew."""
    before = dict(counters["stats"]), dict(counters["frames"])
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert (dict(counters["stats"]), dict(counters["frames"])) == before


def model_for(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)


class Recorder:
    """The gradients and learning rates that the steps of an optimizer saw."""

    def __init__(self, opt):
        self.steps = []
        opt.register_step_pre_hook(self.record)

    def record(self, opt, args, kwargs):
        params = [p for group in opt.param_groups for p in group["params"]]
        self.steps.append(([p.grad.clone() for p in params], [float(group["lr"]) for group in opt.param_groups]))

    def repeat(self, opt):
        """The same steps with `opt`, outside of any compiled function."""
        params = [p for group in opt.param_groups for p in group["params"]]
        for grads, rates in self.steps:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate
            opt.step()


def train(step, scheduler, device):
    """Compiles in the first steps only, though the learning rate changes in each."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for i in range(STEPS):
        with no_compilation() if i >= WARM_UP else contextlib.nullcontext():
            losses.append(step(x, x.sum(1, keepdim=True)).item())
            scheduler.step()
    assert losses[-1] < losses[0]


def check_repeats(recorder, opt, case, device, **kwargs):
    assert len(recorder.steps) == STEPS
    assert len({tuple(rates) for _, rates in recorder.steps}) == STEPS
    expected = case.make(model_for(device).parameters(), **kwargs)
    recorder.repeat(expected)
    assert_same_bits(memory(opt), memory(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_a_compiled_training_step(case, backend, device):
    """Graph breaks, no error, no compilation after the first steps; bit for bit the steps of the eager optimizer."""
    model = model_for(device)
    opt = case.make(model.parameters(), max_grad_norm=1.0)
    recorder, scheduler = Recorder(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    @torch.compile(backend=backend)
    def step(x, y):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    train(step, scheduler, device)
    assert counters["stats"]["unique_graphs"] == 1, "something of the step was traced"
    check_repeats(recorder, opt, case, device, max_grad_norm=1.0)


def test_without_a_scheduler(device, recwarn):
    """Which puts a wrapper of its own around step, where the others have theirs. No warnings either."""
    model = model_for(device)
    opt = fusedopt.AdamW(model.parameters(), lr=0.01)

    @torch.compile(backend="eager")
    def step(x):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad(set_to_none=False)

    x = torch.ones(2, 4, device=device)
    for i in range(STEPS):
        opt.param_groups[0]["lr"] *= 0.9
        with no_compilation() if i >= WARM_UP else contextlib.nullcontext():
            step(x)
    assert opt.last_step.step == STEPS
    assert not [each for each in recwarn if "dynamo" in str(each.message).lower()]


def test_everything_in_one_compiled_function(device):
    """Scaler, metrics, results and a second optimizer, with the learning rate as a tensor."""
    model = model_for(device)
    first, last = list(model[0].parameters()), list(model[2].parameters())
    opts = [fusedopt.AdamW(first, lr=torch.tensor(0.05, device=device), max_grad_norm=1.0), fusedopt.Lion(last)]
    scaler = fusedopt.GradScaler(device.type, init_scale=16.0, growth_interval=2)
    seen = []

    @torch.compile(backend="eager")
    def step(x, y):
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        for opt in opts:
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        seen.append(opts[0].metrics())
        return loss

    scheduler = torch.optim.lr_scheduler.ExponentialLR(opts[0], 0.9)
    train(step, scheduler, device)
    assert scaler.get_scale() == 16.0 * 2.0 ** (STEPS // 2)
    assert opts[0].last_step.step == opts[1].last_step.step == STEPS
    if device.type == "cpu":
        assert [metrics.step for metrics in seen] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_with_eager_steps(backend, device):
    case, model = ONE_EACH[1], model_for(device)
    opt = case.make(model.parameters(), max_grad_norm=1.0)
    recorder, scheduler = Recorder(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    compiled = torch.compile(model, backend=backend)

    def step(x, y):
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    train(step, scheduler, device)
    check_repeats(recorder, opt, case, device, max_grad_norm=1.0)


@pytest.mark.gpu
def test_a_model_compiled_into_cuda_graphs():
    """mode="reduce-overhead": parameters are read, and gradients left, where the recorded graphs have them."""
    device, case = torch.device("cuda"), ONE_EACH[1]
    model = model_for(device)
    opt = case.make(model.parameters(), max_grad_norm=1.0)
    recorder = Recorder(opt)
    compiled = torch.compile(model, mode="reduce-overhead")
    x = torch.randn(16, 4, device=device)
    losses = []
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        loss = (compiled(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        opt.param_groups[0]["lr"] *= 0.9
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    check_repeats(recorder, opt, case, device, max_grad_norm=1.0)


# ---- what is around step stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "name"), KEPT_OUT, ids=lambda value: getattr(value, "__name__", value))
def test_methods_are_kept_out_once(cls, name):
    """However many instances there are."""
    make = {fusedopt.AdamW: lambda: cls([torch.nn.Parameter(torch.zeros(3))]), fusedopt.GradScaler: lambda: cls("cpu")}
    make[cls]()
    method = getattr(cls, name)
    assert method._torchdynamo_disable
    make[cls]()
    assert getattr(cls, name) is method


def test_step_is_still_a_method_with_its_signature():
    """Schedulers ask for step.__func__, torch's GradScaler for the names of its parameters."""
    opt = fusedopt.AdamW([torch.nn.Parameter(torch.zeros(3))])
    assert opt.step.__func__ is fusedopt.AdamW.step and fusedopt.AdamW.step.hooked
    assert list(inspect.signature(opt.step).parameters) == ["closure"]
    assert opt.step.__doc__ == fusedopt.FusedOptimizer.step.__doc__
    signatures = [inspect.signature(cls) for cls in (fusedopt.GradScaler, torch.amp.GradScaler)]
    assert signatures[0] == signatures[1]


def test_hooks_and_profiler_see_one_step():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fusedopt.AdamW([p])
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    @torch.compile(backend="eager")
    def step():
        opt.step()

    p.grad = torch.ones(3)
    with torch.profiler.profile() as profiler:
        step()
    assert calls == ["pre", "post"]
    assert [e.count for e in profiler.key_averages() if e.key == "Optimizer.step#AdamW.step"] == [1]


def test_subclasses_are_kept_out_too():
    class Loud(fusedopt.AdamW):
        def step(self, closure=None):
            self.called = True
            return super().step(closure)

    p = torch.nn.Parameter(torch.zeros(3))
    opt = Loud([p])

    @torch.compile(backend="eager")
    def step():
        opt.step()

    for i in range(STEPS):
        p.grad = torch.ones(3)
        with no_compilation() if i >= WARM_UP else contextlib.nullcontext():
            step()
    assert opt.called and opt.last_step.step == STEPS


def test_import_does_not_load_the_compiler():
    """It takes a second. Making an optimizer does, in torch.optim as well."""
    program = "import sys, fusedopt; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_cost_of_keeping_a_method_out():
    """About 1 microsecond a step; the bound leaves room for a slow or busy machine."""

    def nothing():
        pass

    kept_out = torch.compiler.disable(nothing)
    number = 10_000
    plain, wrapped = (min(timeit.repeat(f, number=number, repeat=7)) / number for f in (nothing, kept_out))
    assert wrapped - plain < 10e-6
