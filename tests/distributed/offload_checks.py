"""Sharded parameters whose states are on the host, on gloo or NCCL alike: see test_sharded_offload.py.

On CPUs they take the same way as those of a GPU. Twins are on the CPU: whatever the device, the CPU engine's bits are
expected.
"""

import checkpoint_checks
import fsdp_checks
import pytest
import torch
from cases import assert_same_bits
from fsdp_checks import MAX_NORM, OPTIONS, STEPS, batch, expected, loss_of, sharded
from offload_cases import through_pipeline
from pairs import SHAPES, Pair, all_sharded, full, mixed, spread, whole_of
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fusedopt
from fusedopt import sharding

SMALL_PIECES = 512  # bytes: every unit is a piece, so that buffers are used again
CPU = torch.device("cpu")
INT8 = {"state_dtype": "int8", "min_8bit_size": 0}


def offloaded(opt):
    """The same optimizer; what is on the CPU goes through the pipeline too."""
    assert opt.offload == "cpu"
    through_pipeline(opt, SMALL_PIECES)
    return opt


def offloaded_pair(ctx, placements, **options) -> Pair:
    pair = Pair(ctx, ctx.mesh(), placements, twin=CPU, offload="cpu", **options)
    offloaded(pair.opt)
    return pair


def assert_on_host(opt) -> None:
    """States as DTensors that lie as their parameters, but in host memory; the parameters where they were."""
    assert opt._plan.lanes
    for param, entry in opt.state.items():
        for key, value in entry.items():
            assert sharding.local_of(value).device == CPU
            if isinstance(param, DTensor) and key != "step":
                assert value.device_mesh == param.device_mesh
                assert key.endswith("_scale") or (value.placements, value.shape) == (param.placements, param.shape)


def locals_of(opt) -> list[torch.Tensor]:
    """Parameters and states of this process."""
    values = [each for param, entry in opt.state.items() for each in (param, *(v for _, v in sorted(entry.items())))]
    return [sharding.local_of(value).detach() for value in values]


# ---- steps ---------------------------------------------------------------------------------------------------------


def steps_are_those_of_whole_tensors(ctx):
    """Uneven and empty parts, replicated and plain parameters beside them; one without a gradient for a step."""
    for placements in (all_sharded(), mixed()):
        for options in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 0.25, "norm_type": float("inf")}):
            pair = offloaded_pair(ctx, placements, **options)
            for step in range(3):
                pair.step(step, skip=(2,) if step == 1 else ())
                assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
                assert_same_bits(pair.opt.clip_coef, pair.expected.clip_coef)
            pair.assert_same()
            assert_on_host(pair.opt)
            assert pair.opt._plan.repetition is None


def two_dimensions(ctx):
    """Parts on a mesh of two dimensions; what is replicated counts once."""
    mesh = ctx.mesh(2, ctx.world // 2, names=("replicate", "shard"))
    placements = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(2), Shard(0)]]
    pair = Pair(ctx, mesh, placements, twin=CPU, offload="cpu", max_grad_norm=1.0)
    offloaded(pair.opt)
    for step in range(2):
        pair.step(step)
        assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
    pair.assert_same()
    assert_on_host(pair.opt)


def formats_are_those_of_the_parts(ctx):
    """Masters, remainders, blocks, scales and random bits: those of the CPU engine's step of the local tensors."""
    for dtype, options in (
        (torch.float32, INT8),
        (torch.bfloat16, {"master_weights": "fp32"}),
        (torch.bfloat16, {"master_weights": "split16", "state_dtype": "bf16"}),
        (torch.bfloat16, {"master_weights": "split8", **INT8}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ):
        shapes = [(25, 47), (1, 3), (1024,), (3, 2, 4)]
        values = [full(shape, i, dtype, ctx.device) for i, shape in enumerate(shapes)]
        params = [torch.nn.Parameter(spread(value, ctx.mesh(), [Shard(0)])) for value in values]
        parts = [torch.nn.Parameter(p.to_local().detach().to(CPU, copy=True)) for p in params]
        opt = offloaded(fusedopt.AdamW(params, lr=0.1, seed=3, offload="cpu", **options))
        twin = fusedopt.AdamW(parts, lr=0.1, seed=3, **options)
        for step in range(2):
            for i, (p, part) in enumerate(zip(params, parts)):
                p.grad = spread(full(p.shape, 10 * step + i, dtype, ctx.device), ctx.mesh(), [Shard(0)])
                part.grad = p.grad.to_local().to(CPU)
            opt.step(), twin.step()
        assert_on_host(opt)
        ours = [sharding.local_entry("state", opt.state[p], p) for p in params]
        for (p, got), part in zip(zip(params, ours), parts):
            want = twin.state[part]
            assert got.keys() == want.keys()
            assert_same_bits([p.to_local().detach(), *got.values()], [part.detach(), *(want[key] for key in got)])
        masters = [sharding.local_of(master) for master in opt.master_params()]
        assert_same_bits(masters, twin.master_params())


def a_nonfinite_value_anywhere_skips_everywhere(ctx):
    for bad in (float("inf"), float("nan")):
        pair = offloaded_pair(ctx, mixed(), nonfinite="skip")
        pair.step(0)
        pair.set_grads(1)
        if ctx.rank == ctx.world - 1:
            pair.sharded[4].grad.to_local()[0] = bad
        before = [value.clone() for value in locals_of(pair.opt)]
        pair.opt.step()
        assert pair.opt.step_was_skipped and pair.opt.skipped_steps == 1
        assert_same_bits(locals_of(pair.opt), before)
        pair.step(2)
        pair.assert_same()


def scalers(ctx):
    """Ours: what one process finds makes all skip and back off."""
    pair = offloaded_pair(ctx, all_sharded(), max_grad_norm=1.0)
    scaler = fusedopt.GradScaler(ctx.device.type, init_scale=4.0, growth_interval=100)
    scaler.scale(torch.zeros((), device=ctx.device))
    for step in range(3):
        pair.set_grads(step)
        for whole in pair.whole:
            whole.grad = whole.grad / scaler.get_scale()
        if step == 1 and ctx.rank == 0:
            pair.sharded[4].grad.to_local()[0] = float("inf")
        scaler.step(pair.opt)
        scaler.update()
        if step != 1:
            pair.expected.step()
        assert scaler.get_scale() == (4.0 if step == 0 else 2.0)
    pair.assert_same()


def accumulated(ctx):
    """Main gradients of parts arrive beside the last micro-batch's."""
    pair = offloaded_pair(ctx, mixed(), max_grad_norm=1.0)
    accs = [fusedopt.GradAccumulator(opt, reduction="sum") for opt in (pair.opt, pair.expected)]
    for step in range(2):
        for micro_batch in range(3):
            pair.set_grads(10 * step + micro_batch, skip=(2,) if micro_batch == 1 else ())
            if micro_batch < 2:
                for acc in accs:
                    acc.accumulate()
        pair.opt.step(), pair.expected.step()
        assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
    pair.assert_same()


def other_layouts(ctx):
    """Gradients that lie otherwise than their parameters: in memory, or on the mesh, as partial sums."""
    mesh = ctx.mesh()
    values = [full((6, 4), 1, device=ctx.device), full((8,), 2, device=ctx.device)]
    params = [torch.nn.Parameter(spread(value, mesh, [p])) for value, p in zip(values, (Shard(0), Replicate()))]
    wholes = [value.to(CPU, copy=True).requires_grad_() for value in values]
    opt = offloaded(fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0, offload="cpu"))
    twin = fusedopt.AdamW(wholes, lr=0.1, max_grad_norm=1.0)
    for step in range(2):
        grad = full((6, 4), 10 + step, device=ctx.device)
        local = spread(grad, mesh, [Shard(0)]).to_local()
        params[0].grad = DTensor.from_local(local.t().contiguous().t(), mesh, [Shard(0)])
        params[1].grad = DTensor.from_local(torch.ones(8, device=ctx.device), mesh, [Partial()])
        wholes[0].grad, wholes[1].grad = grad.to(CPU), torch.full((8,), float(ctx.world))
        opt.step(), twin.step()
        assert_same_bits(opt.grad_norm, twin.grad_norm)
        assert_same_bits([whole_of(p) for p in params], [whole.detach() for whole in wholes])


def norms_of_whole_tensors(ctx):
    """Of parameters that every process has all of; LAMB's update takes them on the host."""
    pair = offloaded_pair(ctx, [[Replicate()]] * 4, opt_class=fusedopt.LAMB, max_grad_norm=1.0)
    for step in range(2):
        pair.step(step)
    pair.assert_same()


def processes_that_disagree(ctx):
    """Which would let copies drift apart."""
    offload = "cpu" if ctx.rank == 0 else None
    pair = Pair(ctx, ctx.mesh(), mixed(), offload=offload, max_grad_norm=1.0)
    pair.set_grads(0)
    with pytest.raises(ValueError, match=r"processes of .* disagree.*offload="):
        pair.opt.step()


def norms_of_parts_are_refused(ctx):
    param = torch.nn.Parameter(spread(full((4, 4), 1, device=ctx.device), ctx.mesh(), [Shard(0)]))
    param.grad = spread(full((4, 4), 2, device=ctx.device), ctx.mesh(), [Shard(0)])
    before = param.to_local().detach().clone()
    opt = offloaded(fusedopt.LAMB([param], offload="cpu"))
    with pytest.raises(ValueError, match=r"(?s)Shard.*beside offload='cpu'.*'lamb' needs norms over whole tensors"):
        opt.step()
    assert_same_bits(param.to_local().detach(), before)
    assert not opt.state


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def fully_sharded_models(ctx):
    """As one process with the whole batch does it, by torch."""
    for norm_type in (2.0, float("inf")):
        model = sharded(ctx.mesh())
        options = {"max_grad_norm": MAX_NORM, "norm_type": norm_type, **OPTIONS}
        opt = offloaded(fusedopt.AdamW(model.parameters(), offload="cpu", **options))
        whole, norms = expected(ctx, norm_type)
        for step in range(STEPS):
            loss_of(model, batch(step, ctx).chunk(ctx.world)[ctx.rank]).backward()
            opt.step()
            torch.testing.assert_close(opt.grad_norm.double(), norms[step], rtol=1e-7, atol=0)
            opt.zero_grad()
        for got, want in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(whole_of(got), want, **fsdp_checks.CLOSE)
        assert any(p.to_local().numel() == 0 for p in model.parameters()) or ctx.rank == 0
        assert_on_host(opt)


def mixed_precision(ctx):
    """bfloat16 in forward and backward: gradients arrive in float32, and the next forward pass sees the new weights."""
    models = [
        sharded(ctx.mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        for _ in range(2)
    ]
    opts = [
        fusedopt.AdamW(model.parameters(), nonfinite="skip", **OPTIONS, **how)
        for model, how in zip(models, ({"offload": "cpu"}, {}))
    ]
    offloaded(opts[0])
    for step in range(STEPS):
        for model, opt in zip(models, opts):
            loss_of(model, batch(step, ctx).chunk(ctx.world)[ctx.rank]).backward()
            opt.step()
            opt.zero_grad()
    for got, want in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(whole_of(got), whole_of(want), **fsdp_checks.CLOSE)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def state_dicts(ctx):
    """torch's get_ and set_optimizer_state_dict, by parts and whole, with and without offload on either side."""
    models = [sharded(ctx.mesh()) for _ in range(3)]
    kinds = ({"offload": "cpu"}, {"offload": "cpu"}, {})
    opts = [
        fusedopt.AdamW(model.parameters(), max_grad_norm=MAX_NORM, **OPTIONS, **how)
        for model, how in zip(models, kinds)
    ]
    for opt in opts[:2]:
        offloaded(opt)

    def train(model, opt, step):
        loss_of(model, batch(step, ctx).chunk(ctx.world)[ctx.rank]).backward()
        opt.step()
        opt.zero_grad()

    for step in range(2):
        train(models[0], opts[0], step)
    for full_ones in (False, True):
        how = dcp.StateDictOptions(full_state_dict=full_ones)
        for source, target in ((0, 2), (2, 1)):
            saved = dcp.get_optimizer_state_dict(models[source], opts[source], options=how)
            dcp.set_model_state_dict(models[target], dcp.get_model_state_dict(models[source]))
            dcp.set_optimizer_state_dict(models[target], opts[target], saved, options=how)
            assert_same_bits(locals_of(opts[target]), locals_of(opts[source]))
        for i in (0, 1):
            train(models[i], opts[i], 2)
            assert_on_host(opts[i])
        assert_same_bits(locals_of(opts[0]), locals_of(opts[1]))


def saved_checkpoints(ctx):
    """Through files: an optimizer with offload goes on with the same bits, one without finds the same states."""
    made = checkpoint_checks.Run
    with checkpoint_checks.directory(ctx) as path:
        for name in ("fp32", "split16", "split8-int8"):
            options = {**checkpoint_checks.FORMATS[name], "device": ctx.device}
            saved, resumed = (made(ctx.mesh(), offload="cpu", **options) for _ in range(2))
            plain = made(ctx.mesh(), **options)
            offloaded(saved.opt), offloaded(resumed.opt)
            for step in range(2):
                saved.step(step)
            checkpoint_checks.save({name: saved}, f"{path}/{name}")
            for other in (resumed, plain):
                checkpoint_checks.load({name: other}, f"{path}/{name}")
                other.assert_same(saved)
            for run in (saved, resumed):
                run.step(2)
                assert_on_host(run.opt)
            resumed.assert_same(saved)


def memory(ctx):
    """What the summary counts is this process' part, and staging."""
    pair = offloaded_pair(ctx, all_sharded())
    pair.step(0)
    counted = pair.opt.memory_summary()
    assert counted.numel == sum(p.to_local().numel() for p in pair.sharded)
    assert counted.bytes["states"] == 8 * counted.numel and counted.bytes["staging"] > 0
    assert len(pair.sharded) == len(SHAPES)


CHECKS = [
    "steps_are_those_of_whole_tensors",
    "formats_are_those_of_the_parts",
    "a_nonfinite_value_anywhere_skips_everywhere",
    "scalers",
    "accumulated",
    "other_layouts",
    "norms_of_whole_tensors",
    "norms_of_parts_are_refused",
    "fully_sharded_models",
    "mixed_precision",
    "state_dicts",
    "saved_checkpoints",
    "memory",
]
OF_TWO = [*CHECKS, "two_dimensions", "processes_that_disagree"]
"""The last ones need an even number of processes."""
