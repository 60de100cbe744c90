"""What several processes check together, on gloo or NCCL alike: see test_sharded.py."""

import copy
import functools

import lamb_checks
import pytest
import torch
from cases import assert_same_bits
from pairs import SHAPES, Pair, all_sharded, full, mixed, spread, whole_of
from torch import distributed
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusedopt
from fusedopt import backends, convert, sharding

# ---- steps --------------------------------------------------------------------------------------------------------


def steps_are_those_of_whole_tensors(ctx):
    for placements in (all_sharded(), mixed()):
        for options in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "norm_type": 1.0}):
            pair = Pair(ctx, ctx.mesh(), placements, **options)
            for step in range(4):
                pair.step(step, skip=(2,) if step == 1 else ())
                assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
                assert_same_bits(pair.opt.clip_coef, pair.expected.clip_coef)
            pair.assert_same()


def maximum_norm(ctx):
    """And NaN in one process, which a maximum over processes would lose."""
    for placements in (all_sharded(), mixed()):
        pair = Pair(ctx, ctx.mesh(), placements, max_grad_norm=0.25, norm_type=float("inf"))
        for step in range(2):
            pair.step(step)
        pair.assert_same()
        assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
        for bad in (float("nan"), float("inf")):
            pair.set_grads(5)
            if ctx.rank == ctx.world - 1:
                pair.sharded[4].grad.to_local()[0] = bad
            norm = fusedopt.get_total_norm([p.grad for p in pair.sharded], float("inf"))
            assert norm.isnan() if bad != bad else norm == bad


def is_available(device, name) -> bool:
    try:
        return backends.for_device(device, name) is not None
    except RuntimeError:
        return False


def every_backend(ctx):
    """Each takes the parts of the norm, reduces, and finishes."""
    for name in filter(functools.partial(is_available, ctx.device), backends.NAMES):
        for norm_type in (2.0, float("inf")):
            pair = Pair(ctx, ctx.mesh(), mixed()[:4], max_grad_norm=1.0, norm_type=norm_type, backend=name)
            for step in range(2):
                pair.step(step)
            pair.assert_same()


def other_rules_and_formats(ctx):
    """In bfloat16 with masters; float64; SGD with a buffer; Lion."""
    mesh = ctx.mesh()
    for master in ("fp32", "split16", "split8"):
        pair = Pair(ctx, mesh, all_sharded(), dtype=torch.bfloat16, master_weights=master, max_grad_norm=1.0)
        for step in range(3):
            pair.step(step)
        pair.assert_same()
        for got, want in zip(pair.opt.master_params(), pair.expected.master_params()):
            assert_same_bits(whole_of(got), want)
    for opt_class, options in ((fusedopt.SGD, {"lr": 0.1, "momentum": 0.9}), (fusedopt.Lion, {"lr": 0.1})):
        pair = Pair(ctx, mesh, all_sharded(), opt_class, torch.float64, max_grad_norm=1.0, **options)
        for step in range(3):
            pair.step(step)
        pair.assert_same()


def two_dimensions(ctx):
    """A mesh of two dimensions: sharded over both, replicated in one (counted once), or both."""
    mesh = ctx.mesh(2, ctx.world // 2, names=("replicate", "shard"))
    rows, columns = [Shard(0), Shard(1)], [Replicate(), Shard(0)]
    placements = [rows, columns, columns, [Shard(2), Replicate()], [Shard(0), Shard(0)], [Replicate(), Replicate()]]
    for norm_type in (2.0, 1.0, float("inf")):
        pair = Pair(ctx, mesh, placements, max_grad_norm=1.0, norm_type=norm_type)
        for step in range(3):
            pair.step(step)
            assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
        pair.assert_same()


def meshes_side_by_side(ctx):
    """Parameters on the whole mesh and on one dimension of it (as experts are): one all-reduce for each mesh."""
    mesh = ctx.mesh(2, ctx.world // 2, names=("a", "b"))
    whole = [full(shape, i, device=ctx.device) for i, shape in enumerate([(8, 4), (6, 3)])]
    params = [spread(whole[0], mesh, [Shard(0), Shard(1)]), spread(whole[1], mesh["b"], [Shard(0)])]
    params = [torch.nn.Parameter(p) for p in params]
    for p, value in zip(params, whole):
        p.grad = spread(value, p.device_mesh, p.placements)
    expected = fusedopt.get_total_norm(whole)
    assert_same_bits(fusedopt.get_total_norm([p.grad for p in params]), expected)
    opt = fusedopt.AdamW(params, max_grad_norm=1.0)
    opt.step()
    assert_same_bits(opt.grad_norm, expected)
    params[1].grad = None  # of its mesh nothing is left to add up
    opt.step()
    assert_same_bits(opt.grad_norm, fusedopt.get_total_norm(whole[:1]))


# ---- non-finite values, scalers --------------------------------------------------------------------------------


def a_nonfinite_value_anywhere_skips_everywhere(ctx):
    for bad in (float("inf"), float("nan")):
        for placements in (all_sharded(), mixed()):
            pair = Pair(ctx, ctx.mesh(), placements, nonfinite="skip")
            pair.step(0)
            pair.set_grads(1)
            if ctx.rank == ctx.world - 1:
                pair.sharded[4].grad.to_local()[0] = bad
            before = [p.detach().clone() for p in map(sharding.local_of, pair.sharded)]
            pair.opt.step()
            assert pair.opt.step_was_skipped and pair.opt.skipped_steps == 1
            assert_same_bits([sharding.local_of(p).detach() for p in pair.sharded], before)
            pair.step(2)
            pair.assert_same()


def scalers(ctx):
    """Ours, with what the norm pass finds reduced; torch's, told by its own pass over the gradients."""
    for scaler_class in (fusedopt.GradScaler, torch.amp.GradScaler):
        pair = Pair(ctx, ctx.mesh(), all_sharded(), max_grad_norm=1.0)
        scaler = scaler_class(ctx.device.type, init_scale=4.0, growth_interval=100)
        for step in range(3):
            pair.set_grads(step)
            for whole in pair.whole:
                whole.grad = whole.grad / scaler.get_scale() if step else whole.grad / 4
            scaler.scale(torch.zeros((), device=ctx.device))
            if step == 1 and ctx.rank == 0:
                pair.sharded[4].grad.to_local()[0] = float("inf")
            if scaler_class is torch.amp.GradScaler:
                scaler.unscale_(pair.opt)
            scaler.step(pair.opt)
            scaler.update()
            if step != 1:
                pair.expected.step()
            assert scaler.get_scale() == (4.0 if step == 0 else 2.0)
        pair.assert_same()


# ---- functions -----------------------------------------------------------------------------------------------------


def functions(ctx):
    """Norms, clipping and unscaling of DTensors are those of the whole tensors, and torch's."""
    for placements in (all_sharded(), mixed()):
        for norm_type in (2.0, 1.0, float("inf")):
            pair = Pair(ctx, ctx.mesh(), placements)
            pair.set_grads(0)
            twins = [p.grad.detach().clone() for p in pair.whole]
            norm = fusedopt.clip_grad_norm_(pair.sharded, 1.0, norm_type)
            assert_same_bits(norm, fusedopt.clip_grad_norm_(pair.whole, 1.0, norm_type))
            for param, grad in zip(pair.whole, twins):
                param.grad = grad
            torch_norm = torch.nn.utils.clip_grad_norm_(pair.whole, 1.0, norm_type)
            torch.testing.assert_close(norm, torch_norm, rtol=1e-6, atol=0)
            for param, whole in zip(pair.sharded, pair.whole):
                torch.testing.assert_close(whole_of(param.grad), whole.grad, rtol=1e-6, atol=1e-7)
        pair.set_grads(1)
        fusedopt.clip_grad_value_(pair.sharded, 0.5)
        assert all(whole_of(p.grad).abs().max() <= 0.5 for p in pair.sharded)
        pair.set_grads(1)
        assert fusedopt.unscale_grads_(pair.sharded, 4.0) == 0
        assert_same_bits([whole_of(p.grad) for p in pair.sharded], [p.grad / 4 for p in pair.whole])
        if ctx.rank == 0:
            pair.sharded[4].grad.to_local()[0] = float("nan")
        assert fusedopt.unscale_grads_(pair.sharded, 4.0) == 1, "in every process"


def partial_sums(ctx):
    """Refused where a norm is taken of them; a parameter's gradient is added up, as torch.optim does unasked."""
    mesh = ctx.mesh()
    partial = DTensor.from_local(torch.ones(4, device=ctx.device), mesh, [Partial()])
    for call in (
        lambda: fusedopt.get_total_norm([partial]),
        lambda: fusedopt.AdamW([DTensor.from_local(torch.ones(4, device=ctx.device), mesh, [Partial()])]),
    ):
        with pytest.raises(ValueError, match=r"(?s)Partial.*redistribute"):
            call()
    param, whole = (torch.nn.Parameter(torch.zeros(4, device=ctx.device)) for _ in range(2))
    param = torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [Replicate()]))
    opts = [fusedopt.AdamW([p], lr=0.1, max_grad_norm=1.0) for p in (param, whole)]
    for _ in range(2):
        param.grad = DTensor.from_local(torch.ones(4, device=ctx.device), mesh, [Partial()])
        whole.grad = torch.full((4,), float(ctx.world), device=ctx.device)
        for opt in opts:
            opt.step()
        assert_same_bits(opts[0].grad_norm, opts[1].grad_norm)
    assert_same_bits(whole_of(param), whole.detach())


def bad_gradients(ctx):
    mesh = ctx.mesh()
    param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4, device=ctx.device), mesh, [Shard(0)]))
    opt = fusedopt.AdamW([param])
    with pytest.raises(TypeError, match="DTensor"):  # torch's own words differ with its version
        param.grad = torch.ones(4, 4, device=ctx.device)
        opt.step()
    param.grad = None
    other = ctx.mesh(1, ctx.world, names=("one", "all"))
    with pytest.raises(ValueError, match=r"lies on .*, expected the parameter's .*; redistribute it"):
        param.grad = distribute_tensor(torch.ones(4, 4, device=ctx.device), other, [Replicate(), Shard(0)])
        opt.step()
    param.grad = None
    with pytest.raises(ValueError, match=r"is a DTensor with a main_grad, expected its gradient in \.grad; remove"):
        param.main_grad = torch.ones(4, 4, device=ctx.device)
        opt.step()
    assert_same_bits(whole_of(param), torch.ones(4, 4, device=ctx.device))


# ---- accumulation -------------------------------------------------------------------------------------------------


def accumulated(ctx):
    """Main gradients of parts are parts of main gradients: sums, norms and steps have the bits of whole tensors."""
    for placements in (all_sharded(), mixed()):
        for weight in (1.0, 2.0):
            pair = Pair(ctx, ctx.mesh(), placements, max_grad_norm=1.0)
            accs = [fusedopt.GradAccumulator(opt, reduction="sum") for opt in (pair.opt, pair.expected)]
            for step in range(4):
                for micro_batch in range(3):
                    pair.set_grads(10 * step + micro_batch, skip=(2,) if micro_batch == 1 else ())
                    for acc in accs:
                        if micro_batch < 2:
                            acc.accumulate(weight)
                assert step == 0 or pair.opt._plan.repetition is not None
                pair.opt.step()
                pair.expected.step()
                assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
            pair.assert_same()


def accumulated_in_backward(ctx):
    """By hooks, as by calls."""
    updated = []
    for hooks in (False, True):
        params = [
            torch.nn.Parameter(spread(full(shape, i, device=ctx.device), ctx.mesh(), [Shard(0)]))
            for i, shape in enumerate(SHAPES[:3])
        ]
        opt = fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0)
        acc = fusedopt.GradAccumulator(opt, hooks=hooks)
        for _ in range(3):
            for micro_batch in range(2):
                sum((p * p).sum() * (micro_batch + 1) for p in params).backward()
                assert (params[0].grad is None) is hooks
                acc.accumulate()
            opt.step()
        updated.append([p.to_local().detach() for p in params])
    assert_same_bits(*updated)


def accumulated_for_others(ctx):
    """Checkpoints of a sum, and what is handed over: DTensors that lie as their parameters."""
    pair = Pair(ctx, ctx.mesh(), mixed())
    acc, expected = (fusedopt.GradAccumulator(params) for params in (pair.sharded, pair.whole))
    for micro_batch in range(2):
        pair.set_grads(micro_batch)
        acc.accumulate()
        expected.accumulate()
    with pytest.raises(ValueError, match=r"all_reduce.*DTensors"):
        acc.all_reduce()
    twin = fusedopt.GradAccumulator(pair.sharded)
    with pytest.raises(ValueError, match="placements"):
        twin.load_state_dict(expected.state_dict())
    twin.load_state_dict(acc.state_dict())
    whole = expected.grads()
    for each in (acc, twin):
        each.assign_grads()
        for param, grad in zip(pair.sharded, whole):
            assert isinstance(param.grad, DTensor) is isinstance(param, DTensor)
            assert getattr(param.grad, "placements", None) == getattr(param, "placements", None)
            assert_same_bits(whole_of(param.grad), grad)
            param.grad = None


# ---- processes that hold different parameters ------------------------------------------------------------------


def pipeline_stages(ctx):
    """Each process has parameters of its own, plain ones; the last one has none with a gradient."""
    values = [full((5, rank + 1), rank, device=ctx.device) for rank in range(ctx.world)]
    values[-1].zero_()
    expected = fusedopt.get_total_norm(values)
    for norm_type in (2.0, float("inf")):
        param = torch.nn.Parameter(torch.ones_like(values[ctx.rank]))
        if ctx.rank < ctx.world - 1:
            param.grad = values[ctx.rank].clone()
        opt = fusedopt.SGD([param], lr=1.0, max_grad_norm=0.5, norm_type=norm_type)
        opt.norm_reduce = functools.partial(distributed.all_reduce, group=distributed.group.WORLD)
        expected = fusedopt.get_total_norm(values, norm_type)
        for _ in range(3):  # the third one as the second
            opt.step()
        if param.grad is not None:
            assert_same_bits(opt.grad_norm, expected)
            coef = torch.full((), 0.5, dtype=torch.float64) / (expected.double().cpu() + 1e-6)
            torch.testing.assert_close(
                param.detach().cpu(), 1 - 3 * values[ctx.rank].cpu() * coef.float(), rtol=1e-6, atol=1e-6
            )
        norm = fusedopt.clip_grad_norm_([param], 0.5, norm_type, norm_reduce=distributed.all_reduce)
        assert_same_bits(norm.cpu(), expected.cpu())


def zero_redundancy(ctx):
    """ZeRO-1: each process updates its part; ``norm_reduce`` makes a norm of the parts'."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    values = [full(shape, i, device=ctx.device) for i, shape in enumerate(SHAPES[:3])]
    params, whole = ([torch.nn.Parameter(value.clone()) for value in values] for _ in range(2))
    options = {"lr": 0.1, "max_grad_norm": 0.5}
    opt = ZeroRedundancyOptimizer(params, fusedopt.AdamW, norm_reduce=distributed.all_reduce, **options)
    expected = fusedopt.AdamW(whole, **options)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, whole)):
            p.grad, q.grad = (full(p.shape, 10 * step + i, device=ctx.device) for _ in range(2))
        opt.step()
        expected.step()
    assert_same_bits([p.detach() for p in params], [q.detach() for q in whole])


# ---- the watch ---------------------------------------------------------------------------------------------------


def repeated_steps(ctx):
    """A step like the last one is made without Python for each tensor, and notices whatever is different."""
    for options in ({}, {"max_grad_norm": 1.0}):
        pair = Pair(ctx, ctx.mesh(), all_sharded(), **options)
        for step in range(2):
            pair.step(step)
        plan = pair.opt._plan
        for _ in range(4):
            pair.set_grads(2)
            assert plan.repetition.run(pair.opt.__dict__)
            pair.expected.step()
        assert pair.opt._plan is plan
        param = pair.sharded[4]
        local = param._local_tensor
        param._local_tensor = local.clone()  # the old memory must not be written any more
        before = local.clone()
        pair.step(3)
        assert pair.opt._plan is not plan
        assert_same_bits(local, before)
        pair.opt.state[param]["exp_avg"]._local_tensor = pair.opt.state[param]["exp_avg"]._local_tensor.clone()
        pair.step(4)
        pair.opt.param_groups[0]["params"][0] = pair.sharded[0] = torch.nn.Parameter(pair.sharded[0].detach())
        pair.opt.state[pair.sharded[0]] = pair.opt.state.pop(next(iter(pair.opt.state)))
        pair.step(5)
        pair.assert_same()


CHANGES = {
    "nothing": lambda opt: None,
    "lr": lambda opt: opt.param_groups[0].update(lr=0.03),
    "tensor lr": lambda opt: opt.param_groups[0].update(lr=torch.tensor(0.02)),
    "max_grad_norm": lambda opt: setattr(opt, "max_grad_norm", 0.25),
    "no norm": lambda opt: setattr(opt, "max_grad_norm", None),
    "norm_type": lambda opt: setattr(opt, "norm_type", float("inf")),
    "nonfinite": lambda opt: setattr(opt, "nonfinite", "skip"),
    "hooks": lambda opt: opt.register_step_post_hook(lambda *_: None),
    "norm_reduce": lambda opt: setattr(opt, "norm_reduce", lambda sums, op: sums.mul_(1.0)),
    "none": lambda opt: setattr(opt, "norm_reduce", None),
}
"""Between two steps, of which the first one was repeated."""


def changes_between_repeated_steps(ctx):
    """All of them one after the other, in two layouts: one all-reduce in place, and sums over several spreads."""
    for placements in (all_sharded(), mixed()):
        pair = Pair(ctx, ctx.mesh(), placements, max_grad_norm=1.0)
        for number, (name, change) in enumerate(CHANGES.items()):
            change(pair.opt), change(pair.expected)
            for step in range(3):
                pair.step(10 * number + step, skip=(1, 4) if step == 1 and number % 3 == 0 else ())
                assert_same_bits(pair.opt.grad_norm, pair.expected.grad_norm)
            pair.set_grads(10 * number + 3)
            repeated = pair.opt._plan.repetition.run(pair.opt.__dict__)
            assert repeated is (name == "nothing" or not (pair.opt._optimizer_step_post_hooks or name == "tensor lr"))
            if not repeated:
                pair.opt.step()
            pair.expected.step()
            pair.opt._optimizer_step_post_hooks.clear()
            pair.opt.param_groups[0]["lr"] = pair.expected.param_groups[0]["lr"] = 0.1
        pair.assert_same()


def repeated_steps_that_meet_nan(ctx):
    """In one process: none is updated, by a repeated step, and the next one goes on."""
    for placements in (all_sharded(), mixed()):
        pair = Pair(ctx, ctx.mesh(), placements, max_grad_norm=1.0, nonfinite="skip")
        for step in range(2):
            pair.step(step)
        for step, rank in enumerate((0, ctx.world - 1), 2):
            pair.set_grads(step)
            if ctx.rank == rank:
                pair.sharded[4].grad.to_local()[0] = float("nan")
            assert pair.opt._plan.repetition.run(pair.opt.__dict__)
            assert pair.opt.step_was_skipped and pair.opt.skipped_steps == step - 1 and pair.opt.grad_norm.isnan()
        pair.set_grads(5)
        assert pair.opt._plan.repetition.run(pair.opt.__dict__)
        pair.expected.step()
        pair.assert_same()


def not_in_place(ctx):
    from fusedopt import _C

    assert not _C.has_shard_layout()
    steps_are_those_of_whole_tensors(ctx)
    versions(ctx)
    partial_sums(ctx)


def released_gradients(ctx):
    """Parameters that are updated in the backward pass, as it is without release."""
    updated = []
    for release in (False, True):
        params = [
            torch.nn.Parameter(spread(full(shape, i, device=ctx.device), ctx.mesh(), [Shard(0)]))
            for i, shape in enumerate(SHAPES[:3])
        ]
        opt = fusedopt.AdamW(params, lr=0.1)
        if release:
            opt.release_gradients()
        for _ in range(3):
            sum((p * p).sum() for p in params).backward()
            assert (params[0].grad is None) is release
            opt.step()
            opt.zero_grad()
        updated.append([p.to_local().detach() for p in params])
    assert_same_bits(*updated)


def versions(ctx):
    """Autograd is told of the write, of the DTensor and of its part."""
    pair = Pair(ctx, ctx.mesh(), all_sharded(), max_grad_norm=1.0)
    for step in range(3):
        before = [(p._version, p._local_tensor._version) for p in pair.sharded]
        pair.step(step)
        after = [(p._version, p._local_tensor._version) for p in pair.sharded]
        assert all(a > b and c > d for (a, c), (b, d) in zip(after, before))


def checkpoints_of_one_process(ctx):
    """state_dict and load_state_dict, with 8-bit states and masters too: the same bits afterwards."""
    for options in ({}, {"state_dtype": "int8", "min_8bit_size": 0, "seed": 1}):
        pair = Pair(ctx, ctx.mesh(), all_sharded(), max_grad_norm=1.0, **options)
        twin = Pair(ctx, ctx.mesh(), all_sharded(), max_grad_norm=1.0, **options)
        for step in range(2):
            pair.step(step)
        for p, q in zip(twin.sharded, pair.sharded):
            p.detach().copy_(q.detach())
        twin.opt.load_state_dict(copy.deepcopy(pair.opt.state_dict()))
        for each in (pair, twin):
            each.set_grads(2)
            each.opt.step()
        for p, q in zip(twin.sharded, pair.sharded):
            assert_same_bits(p._local_tensor.detach(), q._local_tensor.detach())
            for key, value in pair.opt.state[q].items():
                assert_same_bits(whole_of(twin.opt.state[p][key]), whole_of(value))
    exported = pair.opt.torch_state_dict()  # of 8-bit states
    for p, entry in zip(pair.sharded, exported["state"].values()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert entry[key].dtype == torch.float32 and entry[key].placements == p.placements
            assert entry[key].shape == p.shape
    torch.optim.AdamW(pair.sharded).load_state_dict(exported)
    numel = sum(p.to_local().numel() for p in pair.sharded)
    summary = pair.opt.memory_summary()
    assert (summary.numel, summary.bytes["param"], summary.bytes["states"]) == (numel, 4 * numel, 2 * numel)
    with pytest.raises(ValueError, match="plain tensor"):
        saved = pair.opt.torch_state_dict()
        saved["state"] = {i: {k: whole_of(v) for k, v in e.items()} for i, e in saved["state"].items()}
        twin.opt.load_state_dict(saved)


def states_that_do_not_fit(ctx):
    """Of another model's shapes; of other libraries, whose checkpoints are converted whole."""
    pair = Pair(ctx, ctx.mesh(), all_sharded())
    pair.step(0)
    saved = copy.deepcopy(pair.opt.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][1]["exp_avg"]
    with pytest.raises(ValueError, match=r"\['exp_avg'\] has shape .*, expected .*; load the checkpoint of this model"):
        pair.opt.load_state_dict(saved)
    theirs = torch.optim.AdamW(pair.whole)
    for param in pair.whole:
        param.grad = torch.ones_like(param)
    theirs.step()
    for entry in theirs.state.values():
        entry["step"] = 1
    with pytest.raises(ValueError, match="got an optimizer with sharded parameters"):
        convert.from_deepspeed(theirs.state_dict(), pair.opt)
    parts = theirs.state_dict()
    parts["state"][0]["exp_avg"] = pair.opt.state[pair.sharded[0]]["exp_avg"]
    with pytest.raises(ValueError, match=r"is a shard \(DTensor\), expected a whole tensor; gather the checkpoint"):
        convert.from_deepspeed(parts, fusedopt.AdamW(pair.whole))


def local_blocks_and_noise(ctx):
    """8-bit blocks and random bits count the elements of each part by themselves: a plain tensor's step."""
    options = {"lr": 0.1, "seed": 3}
    for extra in ({"state_dtype": "int8", "min_8bit_size": 0}, {"stochastic_rounding": True}):
        pair = Pair(ctx, ctx.mesh(), all_sharded(), dtype=torch.bfloat16, **options, **extra)
        parts = [torch.nn.Parameter(p.to_local().detach().clone()) for p in pair.sharded]
        alone = fusedopt.AdamW(parts, weight_decay=0.01, **options, **extra)
        for step in range(3):
            pair.set_grads(step)
            for part, p in zip(parts, pair.sharded):
                part.grad = p.grad.to_local()
            pair.opt.step()
            alone.step()
        for part, p in zip(parts, pair.sharded):
            assert_same_bits(p.to_local().detach(), part.detach())


OF_FOUR = [
    "steps_are_those_of_whole_tensors",
    "maximum_norm",
    "two_dimensions",
    "meshes_side_by_side",
    "a_nonfinite_value_anywhere_skips_everywhere",
    "pipeline_stages",
    "zero_redundancy",
    *(f"lamb_checks.{name}" for name in lamb_checks.OF_FOUR),
]
"""That differ with the number of processes."""

OF_ONE = [
    "steps_are_those_of_whole_tensors",
    "maximum_norm",
    "repeated_steps",
    "changes_between_repeated_steps",
    "repeated_steps_that_meet_nan",
    "accumulated",
    "versions",
    *(f"lamb_checks.{name}" for name in lamb_checks.OF_ONE),
]
"""That say something where there is but one process, as on a machine with one GPU."""

CHECKS = [
    *OF_FOUR,
    "every_backend",
    "other_rules_and_formats",
    "scalers",
    "functions",
    "partial_sums",
    "bad_gradients",
    "repeated_steps",
    "changes_between_repeated_steps",
    "repeated_steps_that_meet_nan",
    "accumulated",
    "accumulated_in_backward",
    "accumulated_for_others",
    "released_gradients",
    "versions",
    "checkpoints_of_one_process",
    "states_that_do_not_fit",
    "local_blocks_and_noise",
    *(f"lamb_checks.{name}" for name in lamb_checks.OF_TWO),
]
