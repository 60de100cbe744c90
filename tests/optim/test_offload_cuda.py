"""offload="cpu" on GPUs: memory, streams, captures, several devices."""

import pytest
import torch
from cases import BY_NAME, assert_same_bits, memory, parameter, parameters, train
from offload_cases import SIZES, assert_twins, give, offloaded, train_twins, twins, whole_numbers

import fusedopt

pytestmark = pytest.mark.gpu

ADAMW = BY_NAME["adamw-decay"]
CLIP = {"max_grad_norm": 0.5}
SLEEP = 50_000_000  # cycles: some 30 ms, longer than all that the host does in a step of these tests


def pair(device, buffers=2, **options):
    ours, theirs = twins(lambda where: parameters(SIZES, device=where), torch.device(device))
    return offloaded(ADAMW.make, ours, buffers=buffers, **options), ADAMW.make(theirs, **options)


def params_of(opt) -> list:
    return [p for group in opt.param_groups for p in group["params"]]


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CLIP], ids=str)
def test_states_take_no_memory_of_the_device(options):
    """Only tables do, and what the norm pass adds up: kilobytes, for parameters of 16 MiB."""
    p = parameter(torch.zeros(1 << 23, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    opt = fusedopt.AdamW([p], master_weights="fp32", offload="cpu", **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1 << 18
    assert torch.cuda.max_memory_allocated() - before < 1 << 18
    assert {value.device.type for value in opt.state[p].values()} == {"cpu"}
    assert opt.memory_summary().bytes["staging"] <= 4 * (64 << 20)


def test_staging_buffers_are_pinned():
    opt, _ = pair("cuda")
    train(opt, params_of(opt), 1)
    ((lane, _),) = opt._plan.lanes
    assert all(buffer.memory.is_pinned() for buffer in lane.buffers)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CLIP], ids=str)
@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "another stream"])
def test_gradients_just_before_and_parameters_right_after(own_stream, options):
    """Nobody waits but the step: gradients are computed late on the current stream, parameters are read at once."""
    opt, twin = pair("cuda", **options)
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    shapes = [p.shape for p in params_of(opt)]
    fresh = [
        [whole_numbers(shape, device="cuda", seed=10 * step + i) for i, shape in enumerate(shapes)] for step in (1, 2)
    ]
    seen = []
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for p in params_of(opt):
            p.grad = torch.full_like(p, torch.nan)
        for grads in fresh:
            torch.cuda._sleep(SLEEP)
            for p, grad in zip(params_of(opt), grads, strict=True):
                p.grad.copy_(grad)
            opt.step()
            seen.append([p.detach().clone() for p in params_of(opt)])
            for p in params_of(opt):
                p.grad.fill_(torch.nan)
    torch.cuda.synchronize()
    for grads, found in zip(fresh, seen, strict=True):
        for p, grad in zip(params_of(twin), grads, strict=True):
            p.grad = grad.cpu()
        twin.step()
        assert_same_bits(found, [p.detach() for p in params_of(twin)])


def test_parameters_are_read_before_they_return():
    """A kernel that was enqueued before the step, and runs late, reads the old parameters."""
    opt, _ = pair("cuda")
    give(params_of(opt), 0)
    opt.step()
    before = [p.detach().cpu() for p in params_of(opt)]
    torch.cuda._sleep(SLEEP)
    late = [p.detach().clone() for p in params_of(opt)]
    opt.step()
    torch.cuda.synchronize()
    assert_same_bits(late, before)


@pytest.mark.parametrize("buffers", [1, 2, 4])
@pytest.mark.parametrize("slow", ["arriving", "returning"])
def test_slow_copies_do_not_race(slow, buffers, monkeypatch):
    """Each copy in one direction is held up by some milliseconds; staging memory is garbage when the step begins."""
    from fusedopt.optim.offload import Lane

    opt, twin = pair("cuda", buffers=buffers)
    train_twins(opt, twin, 1)
    ((lane, _),) = opt._plan.lanes
    name = {"arriving": "_fetch", "returning": "_return"}[slow]
    real = getattr(Lane, name)

    def held_up(self, *args):
        with torch.cuda.stream(getattr(self.queues, slow)):
            torch.cuda._sleep(SLEEP // 10)
        real(self, *args)

    monkeypatch.setattr(Lane, name, held_up)
    for step in (1, 2):
        torch.cuda.synchronize()
        for buffer in lane.buffers:
            buffer.memory.fill_(0xFF)
        train_twins(opt, twin, 1, first=step)
    torch.cuda.synchronize()
    assert_twins(opt, twin)


def test_gradients_freed_right_after_the_step():
    """Their memory, given to others on the current stream, is not overwritten before it has been read."""
    opt, twin = pair("cuda")
    for step in range(3):
        give(params_of(opt), step), give(params_of(twin), step)
        opt.step(), twin.step()
        opt.zero_grad()
        garbage = [torch.full_like(p, torch.nan) for p in params_of(opt)]
        del garbage
    assert_twins(opt, twin)


# ---- what it is not for ----------------------------------------------------------------------------------------------


def test_captures_are_refused():
    opt, _ = pair("cuda")
    train(opt, params_of(opt), 2)
    before = memory(opt)
    refusal = pytest.raises(RuntimeError, match=r"AdamW\.step: a step with offload='cpu' was run while a graph")
    with refusal, torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()
    assert_same_bits(memory(opt), before)
    train(opt, params_of(opt), 1)


def test_state_that_was_moved_to_the_device():
    opt, _ = pair("cuda")
    train(opt, params_of(opt), 1)
    for entry in opt.state.values():
        entry["exp_avg"] = entry["exp_avg"].cuda()
    with pytest.raises(ValueError, match=r"'exp_avg' is on cuda:0, expected cpu, where it is offloaded to"):
        opt.step()


# ---- other ways around -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_backends_take_the_norm(backend):
    if not fusedopt.backends()[backend].available:
        pytest.skip(fusedopt.backends()[backend].reason)
    ours, theirs = twins(lambda where: parameters(SIZES, device=where), torch.device("cuda"))
    opt, twin = offloaded(ADAMW.make, ours, backend=backend, **CLIP), ADAMW.make(theirs, **CLIP)
    train_twins(opt, twin, 2)
    assert_twins(opt, twin)


def test_parameters_on_both():
    """Those on the CPU take the plain step; the norm is over all."""
    sizes = SIZES[1:4]
    ours = parameters(sizes, device="cuda") + parameters(sizes)
    opt, twin = (
        fusedopt.AdamW(ours, offload="cpu", **CLIP),
        fusedopt.AdamW(parameters(sizes) + parameters(sizes), **CLIP),
    )
    train_twins(opt, twin, 3)
    assert_twins(opt, twin)
    assert len(opt._plan.lanes) == 1 and len(opt._plan.tables) == 2


@pytest.mark.multigpu
def test_two_devices():
    sizes = SIZES[1:4]
    ours = parameters(sizes, device="cuda:0") + parameters(sizes, device="cuda:1")
    opt = offloaded(fusedopt.AdamW, ours, nonfinite="skip", **CLIP)
    twin = fusedopt.AdamW(parameters(sizes) + parameters(sizes), nonfinite="skip", **CLIP)
    for step in range(4):
        for each in (opt, twin):
            give(params_of(each), step)
            if step == 2:
                params_of(each)[-1].grad.view(-1)[0] = torch.inf
            each.step()
        assert_twins(opt, twin)
    assert opt.skipped_steps.item() == 1 and len(opt._plan.lanes) == 2


def test_checkpoint_of_a_step_on_the_device():
    """States that were on the device are loaded onto the host, and the other way around."""
    params = parameters(SIZES, device="cuda")
    on_device = ADAMW.make(params)
    train(on_device, params, 2)
    copies = [parameter(p.detach().clone()) for p in params]
    opt = offloaded(ADAMW.make, copies)
    opt.load_state_dict(on_device.state_dict())
    for each in (opt, on_device):
        train(each, params_of(each), 2, first=2)
    assert_same_bits(memory(opt), memory(on_device))
    on_device.load_state_dict(opt.state_dict())
    assert {value.device.type for entry in on_device.state.values() for value in entry.values()} == {"cuda"}
