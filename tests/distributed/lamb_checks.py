"""LAMB of tensors whose parts lie in several processes: its norms are those of whole tensors. See sharded_checks.py.

Beside the float64 reference, with bounds that hold for sums in any order: sums of parts are added up in another one.
"""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from bounds import assert_within, bounded_step, hyper_of
from cases import assert_same_bits, normal
from pairs import Pair, all_sharded, mixed, spread, whole_of
from processes import Context
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fusedopt
from fusedopt import backends, sharding

OPTIONS = {"lr": 0.1, "weight_decay": 0.01}


class Lamb(Pair):
    """With gradients of any numbers, and a judge of each step."""

    def __init__(self, ctx: Context, mesh, placements, dtype=torch.float32, **options):
        super().__init__(ctx, mesh, placements, fusedopt.LAMB, dtype, **{**OPTIONS, **options})

    def set_grads(self, step: int, skip=()):
        super().set_grads(step, skip)
        for i, (param, whole) in enumerate(zip(self.sharded, self.whole)):
            if whole.grad is not None:
                whole.grad = normal(whole.shape, self.dtype, self.ctx.device, seed=100 + 10 * step + i)
                part = self._spread(whole.grad, self.placements[i])
                param.grad = (
                    DTensor(part._local_tensor, param._spec, requires_grad=False)
                    if isinstance(param, DTensor)
                    else part
                )

    def before(self) -> list[tuple]:
        """Whole parameters to all their digits, whole states, steps taken."""
        records = []
        for param, value in zip(self.sharded, self.opt.master_params()):
            entry = self.opt.state.get(param, {})
            states = {key: whole_of(entry[key]).clone() for key in ("exp_avg", "exp_avg_sq") if key in entry}
            zeros = {key: torch.zeros_like(whole_of(value)) for key in ("exp_avg", "exp_avg_sq")}
            records.append((whole_of(value).clone(), states or zeros, int(entry.get("step", 0))))
        return records

    def assert_stepped(self, records: list[tuple]):
        group = self.opt.param_groups[0]
        for param, master, whole, record in zip(self.sharded, self.opt.master_params(), self.whole, records):
            value, states, taken = record
            if whole.grad is None:
                assert_same_bits(whole_of(master), value)
                continue
            expected = bounded_step(
                "lamb", value, whole.grad.to(value.dtype), states, step=taken + 1, hyper=hyper_of(group, "lamb"),
                clip_coef=self.opt.clip_coef.item(),
            )  # fmt: skip
            assert_within(whole_of(master), expected["param"])
            for key in states:
                assert_within(whole_of(self.opt.state[param][key]), expected[key], key)
            assert self.opt.state[param]["step"] == taken + 1

    def train(self, first: int, last: int, skip=()):
        """Steps [first, last). skip: parameters without a gradient in the first one."""
        for step in range(first, last):
            self.set_grads(step, skip if step == first else ())
            records = self.before()
            self.opt.step()
            self.assert_stepped(records)
        assert_replicas_are_alike(self.sharded)


def assert_replicas_are_alike(params):
    """All processes that hold the same elements hold the same bits."""
    for param in params:
        split = ()
        if isinstance(param, DTensor):
            coordinate = param.device_mesh.get_coordinate()
            split = tuple(coordinate[i] for i, placement in enumerate(param.placements) if not placement.is_replicate())
        told = [None] * distributed.get_world_size()
        own = sharding.local_of(param).detach().cpu().contiguous().flatten().view(torch.uint8).tolist()
        distributed.all_gather_object(told, (split, own))
        assert all(bits == own for where, bits in told if where == split)


def lamb(ctx):
    """Uneven and empty parts, replicated and plain tensors; a step without some gradients; clipped and not."""
    clipped, unclipped = {"max_grad_norm": 1.0}, {"weight_decay": 0.0, "use_nvlamb": True}
    for placements, options in ((all_sharded(), clipped), (mixed(), unclipped)):
        pair = Lamb(ctx, ctx.mesh(), placements, **options)
        pair.train(0, 2, skip=(0, 4))
        pair.train(2, 4)
        repeated(pair)


def repeated(pair: Lamb):
    """Steps like the last one: norms are exchanged by these too."""
    pair.set_grads(50)
    records = pair.before()
    assert pair.opt._plan.repetition.run(pair.opt.__dict__)
    pair.assert_stepped(records)


def lamb_on_every_backend(ctx):
    for name in backends.NAMES:
        try:
            backends.for_device(ctx.device, name)
        except RuntimeError:
            continue
        pair = Lamb(ctx, ctx.mesh(), mixed()[:4], max_grad_norm=1.0, backend=name)
        pair.train(0, 2)
        pair.train(2, 3, skip=(0, 3))


def lamb_in_two_dimensions(ctx):
    """Norms over both dimensions of a mesh, or one of them, where replicas count once and end alike."""
    mesh = ctx.mesh(2, ctx.world // 2, names=("replicate", "shard"))
    rows, columns = [Shard(0), Shard(1)], [Replicate(), Shard(0)]
    placements = [rows, columns, columns, [Shard(2), Replicate()], [Shard(0), Shard(0)], [Replicate(), Replicate()]]
    for is_world in (True, False):
        pair = Lamb(ctx, mesh, placements, max_grad_norm=1.0)
        pair.set_grads(0)
        records = pair.before()
        # One all-reduce where the mesh is all there is; else one for each dimension, those that replicate last.
        with contextlib.nullcontext() if is_world else mock.patch("torch.distributed.get_world_size", lambda: 0):
            pair.opt.step()
        assert is_world or len(pair.opt._plan.peers[0].groups) == sum(size > 1 for size in mesh.shape)
        pair.assert_stepped(records)
        pair.train(1, 2)
        repeated(pair)


def lamb_formats(ctx):
    """float64; bfloat16 with masters, whose digits are those that are measured."""
    for dtype, options in ((torch.float64, {}), (torch.bfloat16, {"master_weights": "split16"})):
        pair = Lamb(ctx, ctx.mesh(), all_sharded(), dtype, **options)
        pair.train(0, 2)


def lamb_of_one_process(ctx):
    """On a mesh of one process the bits are those of whole tensors. Others have nothing of it and wait for nothing."""
    mesh = DeviceMesh(ctx.device.type, [0])
    for placements in ([[Shard(0)]] * 5, [[Replicate()], [Shard(0)], None]) if ctx.rank == 0 else ():
        pair = Pair(ctx, mesh, placements, fusedopt.LAMB, max_grad_norm=1.0, **OPTIONS)
        for step in range(4):
            pair.step(step)
        pair.assert_same()


def lamb_skips_everywhere(ctx):
    """Where one process meets NaN, and goes on."""
    pair = Lamb(ctx, ctx.mesh(), mixed(), nonfinite="skip")
    pair.train(0, 2)
    for step in (2, 3):
        pair.set_grads(step)
        if ctx.rank == ctx.world - 1:
            pair.sharded[4].grad.to_local()[0] = float("nan")
        before = [sharding.local_of(p).detach().clone() for p in pair.sharded]
        pair.opt.step()
        assert pair.opt.step_was_skipped
        assert_same_bits([sharding.local_of(p).detach() for p in pair.sharded], before)
    pair.train(4, 6)


def lamb_nan(ctx):
    """In one process' part: it spoils the whole tensor, and no other."""
    pair = Lamb(ctx, ctx.mesh(), all_sharded())
    pair.set_grads(0)
    if ctx.rank == 0:
        pair.sharded[4].grad.to_local()[0] = float("nan")
    pair.opt.step()
    assert whole_of(pair.sharded[4]).isnan().all()
    assert all(whole_of(p).isfinite().all() for i, p in enumerate(pair.sharded) if i != 4)


def lamb_without_gradients_here(ctx):
    """A process without any, or without one for some tensor, takes part, with nothing: no process waits for it."""
    for kept in ((), (1,)):
        params = [
            torch.nn.Parameter(spread(normal((9, 5), seed=i).to(ctx.device), ctx.mesh(), [Shard(0)])) for i in (0, 1)
        ]
        own = [p.to_local().detach().clone().requires_grad_() for p in params]
        opts = [fusedopt.LAMB(each, **OPTIONS) for each in (params, own)]
        for step in range(3):
            for i, (p, q) in enumerate(zip(params, own)):
                grad = spread(normal((9, 5), seed=10 * step + i).to(ctx.device), ctx.mesh(), [Shard(0)])
                has = ctx.rank == 0 or (i in kept and step != 1)
                p.grad, q.grad = (grad, grad.to_local()) if has else (None, None)
            opts[0].step()
            opts[1].step()
            if 0 not in kept and ctx.rank == 0:
                assert_same_bits(params[0].to_local().detach(), own[0].detach())  # the norms are those of its part


def lamb_checkpoints(ctx):
    """A twin that has loaded the state takes the same step."""
    pair, twin = (Lamb(ctx, ctx.mesh(), all_sharded(), max_grad_norm=1.0) for _ in range(2))
    pair.train(0, 2)
    for p, q in zip(twin.sharded, pair.sharded):
        p.detach().copy_(q.detach())
    twin.opt.load_state_dict(pair.opt.state_dict())
    for each in (pair, twin):
        each.set_grads(2)
        each.opt.step()
    for p, q in zip(twin.sharded, pair.sharded):
        assert_same_bits(p.to_local().detach(), q.to_local().detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(*(each.to_local() for each in (twin.opt.state[p][key], pair.opt.state[q][key])))


def lamb_not_in_backward(ctx):
    """Each update would be a collective inside the backward pass."""
    opt = Lamb(ctx, ctx.mesh(), all_sharded()).opt
    with pytest.raises(ValueError, match=r"'lamb'.*do without release"):
        opt.release_gradients()


# ---- functions of lists ------------------------------------------------------------------------------------------


def lists(pair: Pair, names=("exp_avg", "exp_avg_sq")) -> tuple[list, ...]:
    """Parameters, gradients, states, steps: of DTensors as they lie."""
    zeros = [[torch.zeros_like(p.detach()) for p in pair.sharded] for _ in names]
    return (
        pair.sharded,
        [p.grad for p in pair.sharded],
        *zeros,
        [torch.zeros((), device=pair.ctx.device) for _ in pair.sharded],
    )


def functions_of_lists(ctx):
    """The steps of optimizers of whole tensors; clipped by what another function says of them."""
    pairs = [Pair(ctx, ctx.mesh(), mixed(), fusedopt.AdamW), Lamb(ctx, ctx.mesh(), mixed())]
    functions = [fusedopt.functional.adamw_, functools.partial(fusedopt.functional.lamb_, weight_decay=0.01)]
    for pair, function, opt_class in zip(pairs, functions, (fusedopt.AdamW, fusedopt.LAMB)):
        opt = opt_class(pair.whole, lr=0.1, max_grad_norm=0.5, weight_decay=0.01)
        pair.set_grads(0)
        params, _, *states, steps = lists(pair)
        for step in range(3):
            pair.set_grads(step)
            grads = [p.grad for p in params]
            versions = [p._version for p in params]
            clip_coef = (0.5 / (fusedopt.get_total_norm(grads).double() + 1e-6)).clamp(max=1.0)
            function(params, grads, *states, steps, lr=0.1, clip_coef=clip_coef)
            nothing = {"found_inf": torch.ones((), device=ctx.device)}
            function(params, grads, *states, steps, lr=0.1, **nothing)
            opt.step()
            assert all(p._version > before for p, before in zip(params, versions))
            for got, want in zip(params, pair.whole):
                # A coefficient made of a norm in float32 is off by some 2^-23 of updates of at most 0.3.
                torch.testing.assert_close(whole_of(got), want.detach(), rtol=1e-6, atol=1e-6)
        assert_replicas_are_alike(params)
        assert [s.item() for s in steps] == [3.0] * len(steps)


def mismatched_lists(ctx):
    """Refused before anything is written, or anybody is waited for."""
    pair = Pair(ctx, ctx.mesh(), [[Shard(0)], None])
    pair.set_grads(0)
    params, grads, first, second, steps = lists(pair)
    partial = [grads[0].redistribute(placements=[Replicate()]), grads[1]]
    plain = [grads[0].to_local(), grads[1]]
    wrong = {
        "is a plain tensor beside a parameter that is a DTensor": (params, plain, first, second, steps),
        "placements": (params, partial, first, second, steps),
        r"exp_avg_sqs\[0\] .*redistribute": (params, grads, first, [partial[0], second[1]], steps),
        "is a DTensor beside a parameter that is a plain tensor": (plain, grads, plain, plain, steps),
        r"steps\[0\]": (params, grads, first, second, [spread(steps[0], ctx.mesh(), [Replicate()]), steps[1]]),
    }
    before = [sharding.local_of(p).detach().clone() for p in params]
    for function in (fusedopt.functional.adamw_, fusedopt.functional.lamb_):
        for match, given in wrong.items():
            with pytest.raises((TypeError, ValueError), match=match):
                function(*given, lr=0.1)
        norm = torch.nn.utils.get_total_norm([grads[0]])
        with pytest.raises(TypeError, match=r"clip_coef is a DTensor.*full_tensor"):
            function(params, grads, first, second, steps, lr=0.1, clip_coef=norm)
    assert_same_bits([sharding.local_of(p).detach() for p in params], before)
    assert all(step == 0 for step in steps)


# As those of sharded_checks.
OF_FOUR = ["lamb", "lamb_in_two_dimensions", "lamb_without_gradients_here", "functions_of_lists"]
OF_ONE = ["lamb", "lamb_of_one_process", "functions_of_lists"]
OF_TWO = [
    "lamb_on_every_backend",
    "lamb_formats",
    "lamb_of_one_process",
    "lamb_skips_everywhere",
    "lamb_nan",
    "lamb_checkpoints",
    "lamb_not_in_backward",
    "mismatched_lists",
]
