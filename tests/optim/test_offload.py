"""offload="cpu": the step of the CPU engine, bit for bit, on states that are on the host, whatever the device."""

import copy
import math
import pickle

import pytest
import torch
from cases import (
    BY_NAME,
    BY_RULE,
    DTYPES,
    GRAD_LAYOUTS,
    ONE_EACH,
    PARAM_LAYOUTS,
    STATELESS,
    assert_same_bits,
    memory,
    parameter,
    parameters,
    train,
)
from format_cases import FEW
from late_streams import LateQueues
from offload_cases import (
    CHUNK,
    PIECE,
    SIZES,
    SMALL,
    assert_twins,
    give,
    offloaded,
    through_pipeline,
    train_twins,
    twins,
    whole_numbers,
)

import fusedopt

ADAMW = BY_NAME["adamw-decay"]
CLIP = {"max_grad_norm": 0.5}


def pair(case, device, sizes=SMALL, dtype=torch.float32, buffers=2, **options):
    """An offloaded optimizer, and its twin on the CPU."""
    ours, theirs = twins(lambda where: parameters(sizes, dtype, where), device)
    return offloaded(case.make, ours, buffers=buffers, **options), case.make(theirs, **options)


def params_of(opt) -> list:
    return [p for group in opt.param_groups for p in group["params"]]


def pieces_of(opt) -> list:
    return [piece for lane, _ in opt._plan.lanes for piece in lane.pieces]


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*BY_RULE, *STATELESS], ids=str)
def test_same_bits_as_on_the_cpu(case, device):
    opt, twin = pair(case, device, SIZES, **CLIP)
    train_twins(opt, twin, 2)
    assert_twins(opt, twin)
    assert len(pieces_of(opt)) > 2
    assert_same_bits([opt.grad_norm, opt.clip_coef], [twin.grad_norm, twin.clip_coef])


@pytest.mark.parametrize("combination", FEW, ids=str)
def test_formats(combination, device):
    """Masters, remainders, codes and scales are on the host; random bits are those of the whole tensor."""
    opt, twin = pair(ADAMW, device, SIZES, combination.dtype, seed=7, **combination.options)
    train_twins(opt, twin, 2)
    assert_twins(opt, twin)
    assert_same_bits(opt.master_params(), twin.master_params())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_dtypes(dtype, device):
    opt, twin = pair(ADAMW, device, SIZES, dtype, **CLIP)
    train_twins(opt, twin, 2)
    assert_twins(opt, twin)


@pytest.mark.parametrize("lay", GRAD_LAYOUTS.values(), ids=GRAD_LAYOUTS)
@pytest.mark.parametrize("make", PARAM_LAYOUTS.values(), ids=PARAM_LAYOUTS)
def test_layouts(make, lay, device):
    def on(where):
        return [parameter(make(lambda shape: whole_numbers(shape, device=where, seed=3)))]

    (ours, theirs) = twins(on, device)
    opt, twin = offloaded(ADAMW.make, ours, **CLIP), ADAMW.make(theirs, **CLIP)
    for step in range(2):
        for (p,) in (ours, theirs):
            p.grad = lay(whole_numbers(p.shape, device=p.device, seed=step))
        opt.step(), twin.step()
    assert_same_bits(memory(opt), memory(twin))


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(grad_dtype, device):
    opt, twin = pair(ADAMW, device, SIZES, **CLIP)
    for step in range(2):
        for each in (opt, twin):
            for i, p in enumerate(params_of(each)):
                p.grad = None
                p.main_grad = whole_numbers(p.shape, grad_dtype, p.device, 100 * step + i)
            each.step()
    assert_twins(opt, twin)


@pytest.mark.parametrize("options", [CLIP, {"max_grad_value": 0.7}, {"max_grad_norm": 2.0, "norm_type": math.inf}])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_clipping(case, options, device):
    opt, twin = pair(case, device, **options)
    train_twins(opt, twin, 3)
    assert_twins(opt, twin)


def test_groups_of_their_own(device):
    """Hyper-parameters, formats and a learning rate in a tensor, which changes between steps."""

    def make(where):
        params = parameters([4097, 300, CHUNK + 1], torch.bfloat16, where)
        lr = torch.tensor(0.25, device=where)
        groups = [
            {"params": params[:1], "lr": lr},
            {"params": params[1:2], "weight_decay": 0.5, "master_weights": "fp32"},
            {"params": params[2:], "lr": 0.125, "betas": (0.5, 0.75), "state_dtype": "int8", "amsgrad": True},
        ]
        return groups, lr

    ((ours, lr), (theirs, twin_lr)) = twins(make, device)
    opt, twin = offloaded(fusedopt.AdamW, ours, seed=3, **CLIP), fusedopt.AdamW(theirs, seed=3, **CLIP)
    train_twins(opt, twin, 2)
    for each in (lr, twin_lr):
        each.fill_(0.5)
    train_twins(opt, twin, 1, first=2)
    assert_twins(opt, twin)
    assert opt.last_step.lr == twin.last_step.lr == (0.5, 1e-3, 0.125)


def test_gradients_that_come_and_go(device):
    """A parameter without a gradient keeps its bits and its count, and what was staged for others is not for it."""
    opt, twin = pair(ADAMW, device, SIZES)
    for step, only in enumerate([(2, 3), (0, 1, 2, 4), (3,), (), (1, 2, 3, 4, 5)]):
        for each in (opt, twin):
            give(params_of(each), step, only)
            each.step()
        assert_twins(opt, twin)


@pytest.mark.parametrize("options", [{}, CLIP], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation(reduction, options, device):
    """Main gradients arrive beside the last micro-batch's; one parameter has none of its own, another no main one."""
    opt, twin = pair(ADAMW, device, [300, 2 * CHUNK + 1, 4097], **options)
    accumulators = [fusedopt.GradAccumulator(each, reduction=reduction) for each in (opt, twin)]
    for step in range(2):
        for accumulator, each in zip(accumulators, (opt, twin), strict=True):
            for k in range(3):
                give(params_of(each), 10 * step + k, (0, 1))
                accumulator.accumulate()
            give(params_of(each), 10 * step + 9, (1, 2))
            each.step()
        assert_twins(opt, twin)


# ---- skipped steps -------------------------------------------------------------------------------------------------


def overflow(opt) -> None:
    params_of(opt)[-1].grad.view(-1)[-1] = math.inf


@pytest.mark.parametrize("master_weights", [None, "fp32"])
def test_nonfinite_skip(master_weights, device):
    """Nothing returns: where a master is on the host, the buffers hold other parameters."""
    dtype = torch.bfloat16 if master_weights else torch.float32
    opt, twin = pair(ADAMW, device, SIZES, dtype, 1, nonfinite="skip", master_weights=master_weights)
    for step, bad in enumerate([False, True, False, True, False]):
        for each in (opt, twin):
            give(params_of(each), step)
            if bad:
                overflow(each)
            each.step()
        assert_twins(opt, twin)
        assert opt.step_was_skipped.item() is bad
    assert opt.skipped_steps.item() == 2 and opt.last_step == twin.last_step


@pytest.mark.parametrize("options", [{}, CLIP, {"fused": True}], ids=str)
@pytest.mark.parametrize("scaler", [fusedopt.GradScaler, torch.amp.GradScaler], ids=["ours", "torch"])
def test_scalers(scaler, options, device):
    opt, twin = pair(ADAMW, device, SMALL, **options)
    scalers = [scaler(each.type, init_scale=8.0, growth_interval=2) for each in (device, torch.device("cpu"))]
    for step, bad in enumerate([False, True, False, False]):
        for own, each in zip(scalers, (opt, twin), strict=True):
            own.scale(torch.zeros((), device=params_of(each)[0].device))  # makes it create its scale
            give(params_of(each), step)
            if bad:
                overflow(each)
            own.step(each)
            own.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_twins(opt, twin)


# ---- the pipeline --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [1, 2, 3, 100])
def test_any_number_of_buffers(buffers, device):
    """With garbage in them before each step: nothing is read before it arrives, nothing returns before it is made."""
    opt, twin = pair(ADAMW, device, SIZES, buffers=buffers, **CLIP)
    train_twins(opt, twin, 1)
    for step in range(1, 3):
        if device.type == "cuda":
            torch.cuda.synchronize()  # parameters of the step before may still be returning from the buffers
        for lane, _ in opt._plan.lanes:
            assert len(lane.buffers) == min(buffers, len(lane.pieces))
            for buffer in lane.buffers:
                buffer.memory.fill_(0xFF)
        train_twins(opt, twin, 1, first=step)
    assert_twins(opt, twin)


@pytest.mark.parametrize("case", [ADAMW, BY_NAME["lamb-decay"]], ids=str)
def test_pieces_cover_every_chunk_once(case, device):
    """And fit their buffers, unless a single chunk, or a tensor that a rule needs as a whole, does not."""
    opt, _ = pair(case, device, SIZES)
    give(params_of(opt), 0)
    opt.step()
    ((lane, _),) = opt._plan.lanes
    assert [piece.first for piece in lane.pieces[1:]] == [piece.last for piece in lane.pieces[:-1]]
    assert (lane.pieces[0].first, lane.pieces[-1].last) == (0, lane.tables.buckets[0].table.num_chunks)
    covered = {}
    for piece in lane.pieces:
        assert piece.bytes <= PIECE or len(piece.segments) == 1
        for segment in piece.segments:
            assert segment.begin == covered.get(segment.row, 0)
            covered[segment.row] = segment.end
    assert [covered[i] for i in range(len(SIZES))] == SIZES
    assert len(lane.pieces) >= 3


def test_a_failure_leaves_nothing_behind(device, monkeypatch):
    """The step after one that failed between two pieces goes through all of them again."""
    from fusedopt.backends import cpu

    opt, _ = pair(ADAMW, device, SIZES)
    give(params_of(opt), 0)
    opt.step()
    real, calls = cpu.update_chunks, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("planted")
        real(*args)

    monkeypatch.setattr(cpu, "update_chunks", fail)
    with pytest.raises(MemoryError, match="planted"):
        opt.step()
    monkeypatch.undo()
    for lane, _ in opt._plan.lanes:
        assert not (lane.params or lane.grads or lane.mains)
    before = [p.detach().clone() for p in params_of(opt)]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(params_of(opt), before, strict=True) if p.numel() > 1)


def test_weights_that_change_between_steps(device):
    """What is on the device counts: no copy on the host goes stale, whoever writes, and however."""
    opt, twin = pair(ADAMW, device, SIZES)
    train_twins(opt, twin, 1)
    for each in (opt, twin):
        params_of(each)[2].data.mul_(0.5)
        with torch.no_grad():
            params_of(each)[3].fill_(2.0)
        params_of(each)[4].data = params_of(each)[4].data + 1.0
    train_twins(opt, twin, 2, first=1)
    assert_twins(opt, twin)


def test_autograd_is_told(device):
    opt, _ = pair(ADAMW, device, [300])
    (p,) = params_of(opt)
    product = (p * p).sum()
    p.grad = torch.ones_like(p)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", [FEW[0], FEW[3]], ids=str)
def test_checkpoints_with_and_without_offload(combination, device):
    """Either loads the other's, and goes on with the same bits as on the CPU."""
    options = {"seed": 5, **combination.options}
    opt, twin = pair(ADAMW, device, SIZES, combination.dtype, **options)
    train_twins(opt, twin, 2)
    saved = opt.state_dict()
    assert all(value.device.type == "cpu" for entry in saved["state"].values() for value in entry.values())
    again, on_device = (
        [parameter(p.detach().clone()) for p in params_of(opt)],
        [parameter(p.detach().clone()) for p in params_of(opt)],
    )
    resumed = offloaded(ADAMW.make, again, **options)
    resumed.load_state_dict(saved)
    moved = ADAMW.make(on_device, **options)
    moved.load_state_dict(saved)
    assert all(value.device.type == device.type for e in moved.state.values() for value in e.values())
    back = offloaded(ADAMW.make, [parameter(p.detach().clone()) for p in params_of(opt)], **options)
    back.load_state_dict(moved.state_dict())
    train_twins(resumed, twin, 1, first=2)
    assert_twins(resumed, twin)
    for each in (back, moved):
        give(params_of(each), 2)
        each.step()
    assert_twins(back, twin)
    assert_same_bits(memory(moved), memory(twin))


def test_checkpoints_of_torch(device):
    opt, _ = pair(ADAMW, device)
    train(opt, params_of(opt), 2)
    peer = torch.optim.AdamW([parameter(p.detach().clone()) for p in params_of(opt)])
    peer.load_state_dict(opt.torch_state_dict())
    opt.load_state_dict(peer.state_dict())
    before = [entry["exp_avg"] for entry in opt.state.values()]
    assert_same_bits(before, [entry["exp_avg"].cpu() for entry in peer.state.values()])
    train(opt, params_of(opt), 1)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"]
)
def test_copies_are_offloaded_too(duplicate, device):
    opt, twin = pair(ADAMW, device, **CLIP)
    train_twins(opt, twin, 2)
    other = duplicate(opt)
    assert other.offload == "cpu"
    train_twins(other, twin, 2, first=2)
    assert_twins(other, twin)


def test_masters_begin_with_the_weights(device):
    """Also where a parameter has gaps or is converted from a format that rounds otherwise."""
    values = torch.randn(4098).bfloat16()

    def on(where):
        return [parameter(values.to(where, copy=True)[::2]), parameter(values.to(where, copy=True))]

    ours, theirs = twins(on, device)
    opt, twin = offloaded(ADAMW.make, ours, master_weights="split16"), ADAMW.make(theirs, master_weights="split16")
    train_twins(opt, twin, 2)
    converted = [
        make(params, master_weights="fp32")
        for make, params in ((lambda p, **kw: offloaded(ADAMW.make, p, **kw), ours), (ADAMW.make, theirs))
    ]
    for new, old in zip(converted, (opt, twin), strict=True):
        new.load_state_dict(old.state_dict())
    train_twins(*converted, 1, first=2)
    assert_same_bits(memory(converted[0]), memory(converted[1]))


def test_memory_summary(device):
    opt, _ = pair(ADAMW, device, SIZES)
    assert "staging" not in opt.memory_summary().bytes
    train(opt, params_of(opt), 1)
    counted, buffers = opt.memory_summary().bytes, opt._plan.lanes[0][0].buffers
    assert counted["staging"] == sum(buffer.memory.numel() for buffer in buffers) <= 2 * PIECE
    assert counted["states"] == 8 * sum(SIZES) and counted["steps"] == 4 * len(SIZES)


# ---- what it is not for --------------------------------------------------------------------------------------------


def test_errors(device):
    params = parameters([5], device=device)
    with pytest.raises(ValueError, match=r"AdamW: got offload='disk', expected None or 'cpu'"):
        fusedopt.AdamW(params, offload="disk")
    opt = fusedopt.AdamW(params, offload="cpu")
    assert opt.offload == "cpu" and fusedopt.AdamW(params).offload is None
    with pytest.raises(ValueError, match=r"release_gradients: got offload='cpu', expected None"):
        opt.release_gradients()


def test_parameters_on_the_cpu_take_the_plain_step():
    """They and their states are there already: no staging, no pieces."""
    (ours, theirs) = (parameters(SIZES) for _ in range(2))
    opt, twin = fusedopt.AdamW(ours, offload="cpu", **CLIP), fusedopt.AdamW(theirs, **CLIP)
    train_twins(opt, twin, 2)
    assert_same_bits(memory(opt), memory(twin))
    assert not opt._plan.lanes and opt._plan.repetition is not None


def test_turned_on_for_states_that_are_elsewhere(device):
    """State that somebody moved is not silently copied each step."""
    opt, _ = pair(ADAMW, device)
    train(opt, params_of(opt), 1)
    for entry in opt.state.values():
        entry["exp_avg"] = torch.empty_like(entry["exp_avg"], device="meta")
    with pytest.raises(ValueError, match=r"'exp_avg' is on meta, expected "):
        opt.step()


def test_a_parameter_that_moves_to_another_device(device):
    """As `model.to(device)` does it between two steps: states stay where they are."""
    opt = fusedopt.AdamW(parameters(SMALL), offload="cpu")
    twin = fusedopt.AdamW(parameters(SMALL))
    train_twins(opt, twin, 1)
    for p in params_of(opt):
        p.grad = None
        p.data = p.data.to(device)
    through_pipeline(opt)
    opt._forget_plan()
    train_twins(opt, twin, 2, first=1)
    assert_twins(opt, twin)
    assert opt._plan.lanes


# ---- copies that come late -----------------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr("fusedopt.optim.offload._Queues", LateQueues)


def current_stream(opt):
    ((lane, _),) = opt._plan.lanes
    return lane.queues.module.current


@pytest.mark.parametrize("case", [ADAMW, BY_NAME["lamb-decay"]], ids=str)
@pytest.mark.parametrize("buffers", [1, 2, 3, 100])
def test_every_copy_is_waited_for(case, buffers, late):
    """However late copies are made: the engine has its gradients, no buffer is overwritten that is still to return."""
    opt, twin = pair(case, torch.device("cpu"), SIZES, buffers=buffers)
    for step in range(3):
        train_twins(opt, twin, 1, first=step)
        for p in params_of(opt):
            p.grad.fill_(torch.nan)  # its memory is somebody else's now
        current_stream(opt).drain()  # who reads the parameters
        assert_twins(opt, twin)


def test_copies_come_behind_the_current_stream(late):
    """Gradients that it has yet to compute arrive; parameters that it has yet to read are as they were."""
    opt, twin = pair(ADAMW, torch.device("cpu"), SIZES)
    train_twins(opt, twin, 1)
    current_stream(opt).drain()
    before, read = [p.detach().clone() for p in params_of(opt)], []
    give(params_of(twin), 1)
    current = current_stream(opt)
    current.work.append(lambda: read.extend(p.detach().clone() for p in params_of(opt)))
    for p, source in zip(params_of(opt), params_of(twin), strict=True):
        current.work.append(lambda p=p, source=source: p.grad.copy_(source.grad))
    opt.step(), twin.step()
    current.drain()
    assert_same_bits(read, before)
    assert_twins(opt, twin)


def test_a_failure_leaves_no_copy_unwaited_for(late, monkeypatch):
    opt, twin = pair(ADAMW, torch.device("cpu"), SIZES)
    train_twins(opt, twin, 1)
    ((lane, _),) = opt._plan.lanes
    monkeypatch.setattr("fusedopt.backends.cpu.update_chunks", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    current_stream(opt).drain()
    for stream in (lane.queues.arriving, lane.queues.returning):
        assert stream.done == len(stream.work)
