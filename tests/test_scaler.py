"""fusedopt.GradScaler beside torch's: the same scales, skipped steps and parameters, with no pass of its own."""

import copy
import inspect
import json
import math
import pickle

import pytest
import torch
from bounds import assert_stepped, before_step
from cases import (
    BY_NAME,
    ONE_EACH,
    ONE_EACH_WITH_PEER,
    assert_same_bits,
    generator,
    memory,
    parameters,
    set_gradients,
)
from scaler_cases import BAD, SCALE, SIZES, scaled_gradients, scalers
from torch.amp.grad_scaler import OptState

import fusedopt


def random_findings(steps, seed=0, share=0.2):
    """For each step None, or what some gradient holds."""
    random = generator(seed)
    bad = torch.rand(steps, generator=random) < share
    which = torch.randint(len(BAD), (steps,), generator=random)
    return [BAD[i] if found else None for found, i in zip(bad.tolist(), which.tolist(), strict=True)]


def test_what_is_relied_upon_in_torch():
    """Private names of torch.amp.GradScaler. If this fails, torch renamed them: fusedopt/scaler.py must follow."""
    assert list(inspect.signature(torch.amp.GradScaler.step).parameters) == ["self", "optimizer", "args", "kwargs"]
    scaler = torch.amp.GradScaler("cpu")
    assert scaler._enabled is True and scaler._scale is None and callable(scaler._get_scale_async)
    assert {"READY", "UNSCALED", "STEPPED"} <= {stage.name for stage in OptState}
    entry = scaler._per_optimizer_states[0]
    assert entry.keys() == {"stage", "found_inf_per_device"}
    assert entry["stage"] is OptState.READY and entry["found_inf_per_device"] == {}
    params = parameters([5])
    opt = torch.optim.AdamW(params)
    scaled_gradients(params, scaler)
    scaler.unscale_(opt)
    entry = scaler._per_optimizer_states[id(opt)]
    assert entry["stage"] is OptState.UNSCALED
    assert [(key.type, value.item()) for key, value in entry["found_inf_per_device"].items()] == [("cpu", 0.0)]
    scaler.step(opt)
    assert entry["stage"] is OptState.STEPPED
    scaler.update()
    assert not scaler._per_optimizer_states


# ---- histories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}, {"fused": True, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("case", ONE_EACH_WITH_PEER, ids=str)
def test_history_beside_torch(case, kwargs, device):
    """1,000 steps with random inf and NaN: the same scale after each, the same steps skipped, the same parameters."""
    if not case.takes(**kwargs):
        pytest.skip("no such argument, as in torch")
    ours, theirs = (parameters([5, 0, 33], device=device) for _ in range(2))
    opt, peer = case.make(ours, **kwargs), case.make_peer(theirs)
    scaler, peer_scaler = scalers(device, growth_interval=5)
    findings = random_findings(1000)
    for step, bad in enumerate(findings):
        scaled_gradients(ours, scaler, step, bad)
        scaled_gradients(theirs, peer_scaler, step, bad)
        if "max_grad_norm" in kwargs:
            peer_scaler.unscale_(peer)
            torch.nn.utils.clip_grad_norm_(theirs, kwargs["max_grad_norm"])
        for one, optimizer in ((scaler, opt), (peer_scaler, peer)):
            one.step(optimizer)
            one.update()
        assert scaler.state_dict() == peer_scaler.state_dict()
        assert opt.step_was_skipped.item() is (bad is not None)
    good = findings.count(None)
    assert opt.skipped_steps.item() == 1000 - good
    assert {float(opt.state[p]["step"]) for p in ours} == {float(good)}
    for p, q in zip(ours, theirs, strict=True):
        # At most 1,000 updates, each with at most 16 roundings (test_torch_parity.py) at the largest parameter, < 8.
        torch.testing.assert_close(p, q, rtol=0, atol=1000 * 16 * 2.0**-24 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_same_bits_with_either_scaler(case, dtype, device):
    """Ours and torch's drive the same optimizer: what changes is only who looks for inf and NaN.

    In float16 the scale grows until gradients overflow by themselves.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        pytest.skip("torch's scaler has no CUDA kernel for bfloat16 gradients")
    params, expected_params = (parameters([5, 0, 33], dtype, device) for _ in range(2))
    opt, expected = (case.make(p, max_grad_norm=0.5) for p in (params, expected_params))
    scaler, torchs = scalers(device, init_scale=2.0**6)
    for step, bad in enumerate(random_findings(300, seed=1)):
        for one, ps, o in ((scaler, params, opt), (torchs, expected_params, expected)):
            scaled_gradients(ps, one, step, bad)
            one.step(o)
            one.update()
        assert scaler.state_dict() == torchs.state_dict()
        assert opt.step_was_skipped.item() == expected.step_was_skipped.item()
        assert opt.step_was_skipped.item() is True or bad is None
    assert_same_bits(memory(opt), memory(expected))
    assert opt.skipped_steps.item() == expected.skipped_steps.item()


def test_gradients_are_only_read(device):
    params = parameters(SIZES, device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, max_grad_norm=0.5), scalers(device)
    for bad in (None, math.nan, None):
        scaled_gradients(params, scaler, bad=bad)
        grads = [p.grad.clone() for p in params]
        scaler.step(opt)
        scaler.update()
        assert_same_bits([p.grad for p in params], grads)


@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_one_step_against_the_reference(case, dtype, kwargs, device):
    """Divided by the scale exactly once; the norm is of unscaled gradients; nothing is left on the optimizer."""
    params = parameters(SIZES, dtype, device)
    opt, (scaler, _) = case.make(params, **kwargs), scalers(device, init_scale=2.0**7)
    for step in range(2):
        scaled_gradients(params, scaler, step)
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params)) / scaler.get_scale()
        before = before_step(opt, case.rule)
        assert scaler.step(opt) is None
        assert opt.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        assert_stepped(opt, case.rule, before, grad_scale=scaler.get_scale(), clip_coef=opt.clip_coef.item())
        assert not {"grad_scale", "found_inf", "_nonfinite_found"} & opt.__dict__.keys()
        scaler.update()


# ---- several optimizers -------------------------------------------------------------------------------------------


def test_several_optimizers(device):
    """Each skips by what is in its own gradients; the scale goes by all of them; results stay each optimizer's own."""
    cases = [BY_NAME["adam-l2"], BY_NAME["adamw-decay"], BY_NAME["lion-decay"]]
    params, expected_params = ([parameters([5, 33], device=device) for _ in cases] for _ in range(2))
    opts = [case.make(p, max_grad_norm=1.0) for case, p in zip(cases, params, strict=True)]
    expected = [case.make(p, max_grad_norm=1.0) for case, p in zip(cases, expected_params, strict=True)]
    scaler, torchs = scalers(device)
    for step in range(60):
        bad = [math.inf if torch.rand((), generator=generator(10 * step + i)) < 0.2 else None for i in range(3)]
        for one, all_params, optimizers in ((scaler, params, opts), (torchs, expected_params, expected)):
            for ps, o, value in zip(all_params, optimizers, bad, strict=True):
                scaled_gradients(ps, one, step, value)
                one.step(o)
            one.update()
        assert scaler.state_dict() == torchs.state_dict()
        for o, value in zip(opts, bad, strict=True):
            assert o.step_was_skipped.item() is (value is not None)
            assert o._control().norm_found_inf.item() == (value is not None), "update() wrote into the optimizer"
    for o, e in zip(opts, expected, strict=True):
        assert_same_bits(memory(o), memory(e))


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_an_optimizer_of_torch(ours_first, device):
    params, other_params, clean = (parameters([5, 33], device=device) for _ in range(3))
    opt, other = fusedopt.AdamW(params, max_grad_norm=1.0), torch.optim.AdamW(other_params)
    expected = torch.optim.AdamW(clean)
    scaler, torchs = scalers(device)
    for step in range(40):
        bad, other_bad = (math.nan if step % n == n - 1 else None for n in (3, 7))
        scaled_gradients(params, scaler, step, bad)
        scaled_gradients(other_params, scaler, step, other_bad)
        scaled_gradients(clean, torchs, step, other_bad)
        torchs.step(expected)
        for o in (opt, other) if ours_first else (other, opt):
            scaler.step(o)
        before = scaler.get_scale()
        scaler.update()
        torchs.update()
        if bad is not None or other_bad is not None:
            assert scaler.get_scale() == before / 2
        torchs.load_state_dict(scaler.state_dict())  # torch's did not see our optimizer
    assert_same_bits(memory(other), memory(expected))
    assert opt.skipped_steps.item() == 13


def test_optimizers_that_do_not_all_step(device):
    """As in torch, one that does not step in an iteration has no say in it."""
    params, others = (parameters([5], device=device) for _ in range(2))
    opt, other = fusedopt.AdamW(params), fusedopt.Lion(others)
    scaler, _ = scalers(device)
    for step in range(6):
        scaled_gradients(params, scaler, step)
        scaler.step(opt)
        if step % 2:
            scaled_gradients(others, scaler, step, math.inf)
            scaler.step(other)
        before = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == (before / 2 if step % 2 else before)


# ---- unscale_ -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_unscale_then_clip_by_hand(case, device):
    """What is found reaches the step without the host; the gradients are divided once."""
    params, expected_params = (parameters([5, 0, 33], device=device) for _ in range(2))
    opt, expected = case.make(params), case.make(expected_params)
    scaler, torchs = scalers(device)
    for step, bad in enumerate(random_findings(100, seed=2)):
        for one, ps, o in ((scaler, params, opt), (torchs, expected_params, expected)):
            scaled_gradients(ps, one, step, bad)
            one.unscale_(o)
            torch.nn.utils.clip_grad_norm_(ps, 0.5)
            one.step(o)
            one.update()
        assert scaler.state_dict() == torchs.state_dict()
        assert opt.step_was_skipped.item() is (bad is not None)
    assert_same_bits(memory(opt), memory(expected))


def test_step_after_unscale_always_calls_step(device):
    params = parameters([5], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params), scalers(device)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(opt.step_was_skipped.item()))
    for bad in (math.inf, None):
        scaled_gradients(params, scaler, bad=bad)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    assert calls == [True, False] and not hasattr(opt, "found_inf")


# ---- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, 0, 1, 2])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_accumulated_gradients(case, where, device):
    """Three micro-batches are one step on their sum, bit for bit; inf in any of them skips it and halves the scale."""
    params, expected_params = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (case.make(p, max_grad_norm=0.5) for p in (params, expected_params))
    accumulator = fusedopt.GradAccumulator(opt, reduction="sum")
    both = [scalers(device)[0] for _ in range(2)]
    for step in range(3):
        for micro in range(3):
            bad = math.inf if micro == where and step == 1 else None
            earlier = [p.grad for p in expected_params] if micro else None
            for ps, scaler in zip((params, expected_params), both, strict=True):
                scaled_gradients(ps, scaler, 10 * step + micro, bad)
            if earlier:
                for p, grad in zip(expected_params, earlier, strict=True):
                    p.grad = grad + p.grad
            if micro < 2:
                accumulator.accumulate()
        for o, scaler in zip((opt, expected), both, strict=True):
            scaler.step(o)
            scaler.update()
            o.zero_grad()
        assert both[0].state_dict() == both[1].state_dict()
        assert opt.step_was_skipped.item() is (step == 1 and where is not None)
    assert_same_bits(memory(opt), memory(expected))


# ---- checkpoints, settings ----------------------------------------------------------------------------------------


def test_state_dict_goes_both_ways(device):
    params = parameters([5], device=device)
    opt, (scaler, torchs) = fusedopt.AdamW(params), scalers(device)
    for step in range(5):
        scaled_gradients(params, scaler, step, math.inf if step == 2 else None)
        scaler.step(opt)
        scaler.update()
    torchs.load_state_dict(scaler.state_dict())
    assert torchs.state_dict() == scaler.state_dict() and scaler.state_dict()["_growth_tracker"] == 2
    again, _ = scalers(device)
    again.load_state_dict(torchs.state_dict())
    for one in (scaler, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        for step in range(2):
            scaled_gradients(params, one, step)
            one.step(opt)
            one.update()
        assert one.state_dict()["scale"] == 2 * torchs.state_dict()["scale"]
        assert one.state_dict()["_growth_tracker"] == 1


def test_settings(device):
    """Growth and backoff factors, the interval, a scale given by hand."""
    params = parameters([5], device=device)
    opt, both = fusedopt.AdamW(params), scalers(device, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
    for step, bad in enumerate([None, None, None, math.nan, None, None]):
        for one in both:
            scaled_gradients(params, one, step, bad)
            one.step(opt)
            one.update(7.0 if step == 4 else None)
        assert both[0].state_dict() == both[1].state_dict()
    assert both[0].get_scale() == 7.0 * (1 if both[0].state_dict()["_growth_tracker"] else 3)


def test_disabled(device):
    params, plain = (parameters(SIZES, device=device) for _ in range(2))
    opt, expected = (fusedopt.AdamW(p, max_grad_norm=1.0) for p in (params, plain))
    scaler, _ = scalers(device, enabled=False)
    for ps in (params, plain):
        set_gradients(ps)
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    expected.step()
    assert_same_bits(memory(opt), memory(expected))
    assert scaler.state_dict() == {} and scaler.get_scale() == 1.0


def test_a_scale_of_the_users_own(device):
    """Divides as well, and is used up, as with torch."""
    params = parameters(SIZES, device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, max_grad_norm=1.0), scalers(device)
    scaled_gradients(params, scaler)
    before = before_step(opt, "adamw")
    opt.grad_scale = torch.tensor(4.0, device=device)
    scaler.step(opt)
    assert_stepped(opt, "adamw", before, grad_scale=4 * scaler.get_scale(), clip_coef=opt.clip_coef.item())
    assert not hasattr(opt, "grad_scale")


def test_schedulers_and_hooks_see_the_step(device):
    params = parameters([5], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, lr=0.1), scalers(device)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(2):
        scaled_gradients(params, scaler, step)
        scaler.step(opt)
        scaler.update()
        scheduler.step()  # warns if it missed the step
    assert calls == ["pre", "post"] * 2 and opt.param_groups[0]["lr"] == 0.025


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale_, step"])
@pytest.mark.parametrize("kwargs", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_reads_nothing_back(kwargs, unscale):
    device = torch.device("cuda")
    params = parameters([5, 4097, 65537], device=device)
    opt, (scaler, _) = fusedopt.AdamW(params, **kwargs), scalers(device)
    for step in range(2):
        scaled_gradients(params, scaler, step)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    scaled_gradients(params, scaler, 2, math.inf)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(200_000_000)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        done.record()
        assert not done.query(), "the scaler waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.step_was_skipped.item() is True and scaler.get_scale() == SCALE["init_scale"] / 2


def device_operations(program, trace):
    """Names of the kernels and copies that `program` puts on the device."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # the first session may miss some
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        program()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizers", [1, 2])
def test_launches(optimizers, tmp_path):
    """Two of ours for each optimizer, and the update of the scale; findings of several are copied and added."""
    device = torch.device("cuda")
    params = [parameters([5, 4097, 65537], device=device) for _ in range(optimizers)]
    opts, (scaler, _) = [fusedopt.AdamW(p, max_grad_norm=0.5) for p in params], scalers(device)

    def step():
        for o in opts:
            scaler.step(o)
        scaler.update()

    for seed in range(2):
        for p in params:
            scaled_gradients(p, scaler, seed)
        step()
    torch.cuda.synchronize()
    names = device_operations(step, tmp_path / "trace.json")
    assert sum("amp_update_scale" in name for name in names) == 1
    extra = 0 if optimizers == 1 else 2  # a copy of the first finding, and its sum with the second
    assert len(names) == 2 * optimizers + 1 + extra, names


@pytest.mark.gpu
def test_captured_with_the_update_of_the_scale():
    """Nothing of it runs on the host, so step and update replay: the same bits and scales as eager."""
    device = torch.device("cuda")
    params, eager_params = (parameters([5, 4097], device=device) for _ in range(2))
    opt, eager = (fusedopt.AdamW(p, max_grad_norm=0.5) for p in (params, eager_params))
    scaler, eager_scaler = (scalers(device)[0] for _ in range(2))
    for one, o, ps in ((scaler, opt, params), (eager_scaler, eager, eager_params)):
        scaled_gradients(ps, one)
        one.step(o)
        one.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaler.step(opt)
        scaler.update()
    for step, bad in enumerate(random_findings(50, seed=3)):
        scaled_gradients(eager_params, eager_scaler, step, bad)
        for p, q in zip(params, eager_params, strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        eager_scaler.step(eager)
        eager_scaler.update()
        assert_same_bits(memory(opt), memory(eager))
        assert scaler.state_dict() == eager_scaler.state_dict()
        assert opt.step_was_skipped.item() is (bad is not None)


@pytest.mark.multigpu
def test_two_devices_in_one_optimizer():
    """inf on one of them skips both, and the scale backs off once."""
    params = parameters([5, 33], device="cuda:0") + parameters([7, 65], device="cuda:1")
    opt, (scaler, torchs) = fusedopt.AdamW(params, max_grad_norm=1.0), scalers(torch.device("cuda"))
    for step, bad in enumerate([None, math.inf, None, None, None]):
        before = memory(opt)
        scaled_gradients(params, scaler, step, bad)
        scale = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        if bad is not None:
            assert_same_bits(memory(opt), before)
            assert scaler.get_scale() == scale / 2
    assert scaler.get_scale() == SCALE["init_scale"] and torchs.is_enabled()
