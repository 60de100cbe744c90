"""opt.metrics() and opt.last_step: the results of a step as numbers, without a wait and with one."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from cases import ONE_EACH, assert_same_bits, memory, normal, parameters, set_gradients, train

import fusedopt
from fusedopt.control import Controls
from fusedopt.optim.metrics import Fetches

SIZES = [5, 0, 4097]


def same(a, b) -> bool:
    """Equal, NaN included."""
    return a == b or (math.isnan(a) and math.isnan(b))


def assert_agrees(metrics, opt, step):
    """With what the optimizer's tensors say of the same step."""
    assert metrics.step == step
    assert same(metrics.grad_norm, opt.grad_norm.item()) and same(metrics.clip_coef, opt.clip_coef.item())
    assert metrics.skipped is opt.step_was_skipped.item()
    assert metrics.skipped_steps == opt.skipped_steps.item()


def newest(opt):
    """What metrics() returns once the copy it asked for has arrived."""
    first = opt.metrics()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return opt.metrics()
    return first


@pytest.mark.parametrize(
    "kwargs", [{}, {"max_grad_norm": 0.5}, {"nonfinite": "skip"}, {"max_grad_norm": 1e9, "norm_type": 1.0}], ids=str
)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_what_the_tensors_say(case, kwargs, device):
    params = parameters(SIZES, device=device)
    opt = case.make(params, **kwargs)
    assert opt.metrics() is None and opt.last_step is None
    for step in range(1, 6):
        set_gradients(params, seed=step)
        if step in (2, 4):
            params[-1].grad[7] = math.inf
        opt.step()
        takes_norm, bad = bool(kwargs), step in (2, 4)
        for metrics in (opt.last_step, newest(opt)):
            assert_agrees(metrics, opt, step)
            assert metrics.found_inf is (takes_norm and bad)
            assert metrics.skipped is (bad and "nonfinite" in kwargs)
            assert metrics.lr == (opt.param_groups[0]["lr"],)
            assert math.isnan(metrics.grad_norm) is not takes_norm
        if not takes_norm:
            assert metrics.clip_coef == 1.0


def test_types(device):
    params = parameters(SIZES, device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    train(opt, params, 1)
    types = [type(value) for value in dataclasses.astuple(opt.last_step)]
    assert types == [int, float, float, bool, bool, int, tuple] and isinstance(opt.last_step, fusedopt.StepMetrics)
    with pytest.raises(dataclasses.FrozenInstanceError):
        opt.last_step.step = 2


def test_learning_rates_are_those_of_the_step(device):
    """Also where a scheduler has stepped since; numbers and CPU tensors, of all groups."""
    params = parameters([5, 7, 9], device=device)
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:2], "lr": torch.tensor(0.25)}]
    opt = fusedopt.AdamW([*groups, {"params": params[2:]}], lr=1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for step in range(4):
        train(opt, params, 1, first=step)
        scheduler.step()
        expected = tuple(rate * 0.5**step for rate in (0.1, 0.25, 1.0))
        assert opt.last_step.lr == newest(opt).lr == expected
    opt.add_param_group({"params": parameters([3], device=device), "lr": 0.5})  # no part of a step yet
    assert opt.last_step.lr == (0.1 * 0.5**4, 0.25 * 0.5**4, 0.5**4, 0.5)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learning_rate_on_the_device(dtype, shape, device):
    params = parameters([5, 7], device=device)
    lr = torch.full(shape, 0.1, dtype=dtype, device=device)
    opt = fusedopt.AdamW([{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": 0.2}])
    for step in range(3):
        train(opt, params, 1, first=step)
        assert opt.last_step.lr == newest(opt).lr == (lr.item(), 0.2)
        lr.mul_(0.5)


def test_steps_without_gradients_count(device):
    params = parameters([5], device=device)
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    opt.step()
    for metrics in (opt.last_step, newest(opt)):
        assert metrics.step == 1 and math.isnan(metrics.grad_norm) and metrics.clip_coef == 1.0
        assert not metrics.found_inf and metrics.lr == (opt.param_groups[0]["lr"],)


def test_under_a_scaler(device):
    """found_inf whoever found it: the norm pass, unscale_, torch's scaler."""
    for make, unscale in ((fusedopt.GradScaler, False), (fusedopt.GradScaler, True), (torch.amp.GradScaler, False)):
        params = parameters(SIZES, device=device)
        opt = fusedopt.AdamW(params, fused=True)
        scaler = make(device.type, init_scale=16.0)
        for step, bad in enumerate([False, True, False], start=1):
            scaler.scale(torch.zeros((), device=device))
            set_gradients(params, seed=step, scale=scaler.get_scale())
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params)) / scaler.get_scale()
            if bad:
                params[0].grad[0] = math.nan
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
            metrics = opt.last_step
            assert metrics == newest(opt) or math.isnan(metrics.grad_norm)
            assert metrics.found_inf is metrics.skipped is bad
            if make is fusedopt.GradScaler and not unscale and not bad:
                assert metrics.grad_norm == pytest.approx(norm, rel=1e-6)
        assert metrics.skipped_steps == 1


def test_copies_and_checkpoints_know_nothing_of_it(device):
    params = parameters([5], device=device)
    opt, plain = fusedopt.AdamW(params, max_grad_norm=1.0), fusedopt.AdamW(params, max_grad_norm=1.0)
    train(opt, params, 2)
    opt.metrics()
    assert opt.state_dict().keys() == plain.state_dict().keys()
    assert opt.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.metrics() is None and other.last_step is None
        train(other, other.param_groups[0]["params"], 1)
        assert other.last_step.step == 1
    opt.load_state_dict(opt.state_dict())
    assert opt.last_step.step == 2
    train(opt, params, 1)
    assert opt.last_step.step == 3


def test_asking_changes_nothing(device):
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(p, max_grad_norm=0.5) for p in (params, plain))
    for step in range(20):
        train(opt, params, 1, first=step)
        opt.metrics()
        train(expected, plain, 1, first=step)
    assert_same_bits(memory(opt), memory(expected))
    assert opt.grad_norm.item() == expected.grad_norm.item()


# ---- the ring of fetches, on its own -----------------------------------------------------------------------------


class Slot:
    """A copy that arrives when it is told to."""

    def start(self, control, about):
        self.about, self.arrived = about, False

    def done(self):
        return self.arrived

    def read(self):
        assert self.arrived
        return self.about


def test_a_full_ring_asks_for_nothing_new():
    slots = [Slot(), Slot(), Slot()]
    fetches = Fetches(slots)
    for step in range(5):
        fetches.start(None, step)
    assert [slot.about for slot in fetches.pending] == [0, 1, 2] and not fetches.free
    fetches.collect()
    assert fetches.newest is None
    for slot in list(fetches.pending)[:2]:
        slot.arrived = True
    fetches.collect()
    assert fetches.newest == 1 and len(fetches.free) == 2
    fetches.start(None, 5)
    assert [slot.about for slot in fetches.pending] == [2, 5]


def test_results_arrive_in_order():
    """A later copy that is done earlier, on another stream, waits for its turn: newest never goes back."""
    fetches = Fetches([Slot() for _ in range(3)])
    for step in range(3):
        fetches.start(None, step)
    first, second, third = fetches.pending
    third.arrived = True
    fetches.collect()
    assert fetches.newest is None
    first.arrived = True
    fetches.collect()
    assert fetches.newest == 0
    second.arrived = True
    fetches.collect()
    assert fetches.newest == 2 and len(fetches.free) == 3 and not fetches.pending
    fetches.collect()
    assert fetches.newest == 2


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_a_loop_that_logs_every_step_never_waits(lr_on_device):
    """A device that is kept busy: the host goes on, gets what is there, and the ring fills up."""
    params = parameters([5, 65537], device="cuda")
    lr = torch.tensor(0.01, device="cuda") if lr_on_device else 0.01
    opt = fusedopt.AdamW(params, lr=lr, max_grad_norm=0.5)
    train(opt, params, 2)
    opt.metrics()  # makes the ring
    torch.cuda.synchronize()
    assert opt.metrics().step == 2
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(400_000_000)
        seen = []
        for _ in range(20):
            opt.step()
            seen.append(opt.metrics().step)
        done.record()
        assert not done.query(), "the loop waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(seen) == {2}
    torch.cuda.synchronize()
    assert opt.metrics().step == 10  # eight copies were under way, the rest was left out
    torch.cuda.synchronize()
    assert opt.metrics().step == 22
    assert_agrees(opt.last_step, opt, 22)


@pytest.mark.gpu
def test_every_step_of_a_slow_loop_is_seen():
    params = parameters([5, 4097], device="cuda")
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    norms, logged = [], []
    for step in range(30):
        train(opt, params, 1, first=step)
        norms.append(opt.grad_norm.item())  # waits
        if metrics := opt.metrics():
            logged.append(metrics)
    torch.cuda.synchronize()
    logged.append(opt.metrics())
    assert [each.step for each in logged] == list(range(1, 31))
    assert [each.grad_norm for each in logged] == norms


@pytest.mark.gpu
def test_replays_report_what_they_wrote():
    """The count of steps stands still; the rest is the replay's."""
    params = parameters([5, 4097], device="cuda")
    lr = torch.tensor(0.1, device="cuda")
    opt = fusedopt.AdamW(params, lr=lr, max_grad_norm=0.5, nonfinite="skip")
    train(opt, params, 1)
    opt.metrics()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = opt.metrics()
        opt.step()
        during = opt.metrics()
    assert before is during is None or before == during  # nothing was enqueued
    for seed in range(1, 5):
        for i, p in enumerate(params):
            p.grad.copy_(normal(p.shape, device="cuda", seed=10 * seed + i))
        if seed == 3:
            params[0].grad[0] = math.nan
        lr.fill_(0.1 * seed)
        graph.replay()
        metrics = newest(opt)
        assert_agrees(metrics, opt, 2)
        assert metrics.skipped is (seed == 3) and metrics.skipped_steps == int(seed >= 3)
        assert metrics.lr == pytest.approx((0.1 * seed,), rel=1e-6)


@pytest.mark.gpu
def test_steps_on_a_side_stream():
    params = parameters([65537], device="cuda")
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            torch.cuda._sleep(20_000_000)
            train(opt, params, 1, first=step)
            opt.metrics()
    torch.cuda.synchronize()
    assert_agrees(opt.metrics(), opt, 3)


@pytest.mark.multigpu
def test_parameters_that_move_to_another_device():
    params = parameters([33], device="cuda:0")
    opt = fusedopt.AdamW(params, max_grad_norm=0.5)
    train(opt, params, 1)
    assert newest(opt).step == 1
    params[0].data = params[0].data.to("cuda:1")
    opt.state.clear()
    train(opt, params, 1, first=1)
    assert opt.metrics() is None
    torch.cuda.synchronize("cuda:1")
    assert_agrees(opt.metrics(), opt, 2)


def test_results_go_where_the_parameters_go():
    controls = Controls()
    first = controls.reported_on(torch.device("cpu"))
    first.skipped_steps.fill_(3), first.total_norm.fill_(0.5)
    assert controls.reported_on(torch.device("cpu")) is first
    moved = controls.reported_on(torch.device("cpu:0"))  # another name is another device here
    assert moved is not first and moved.skipped_steps == 3 and moved.total_norm == 0.5
    moved.skipped_steps.fill_(4)
    assert controls.reported_on(torch.device("cpu")) is first and first.skipped_steps == 4


@pytest.mark.gpu
def test_model_moved_between_steps():
    """As Lightning does after training: the results are those of the last step, wherever it was."""
    params = parameters(SIZES, device=torch.device("cuda"))
    opt = fusedopt.AdamW(params, max_grad_norm=0.5, nonfinite="skip")
    for step, place in enumerate(("cuda", "cpu", "cuda"), 1):
        move(params, place)
        opt.load_state_dict(opt.state_dict())  # the state follows
        set_gradients(params, seed=step)
        params[-1].grad[7] = math.inf
        opt.step()
        assert opt.skipped_steps.device.type == place and opt.last_step.skipped_steps == step == opt.last_step.step
    last = opt.last_step
    move(params, "cpu")
    assert opt.last_step == last and opt.grad_norm.device.type == "cpu" and opt.grad_norm.item() == last.grad_norm


def move(params, place):
    """As ``Module.to`` does."""
    for param in params:
        param.grad, param.data = None, param.data.to(place)
