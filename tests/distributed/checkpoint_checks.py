"""torch.distributed.checkpoint: saved by N processes, loaded by M. See test_checkpoints.py.

Gradients are small multiples of 1/8, as in ``pairs``: sharded runs have the bits of whole ones, but for 8-bit
states, whose blocks and random bits are counted in each part.
"""

import contextlib
import tempfile
import warnings

import fsdp_checks
import pytest
import torch
from cases import assert_same_bits
from pairs import full, spread, whole_of
from processes import Context
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fusedopt
from fusedopt import sharding

SHAPES = [(25, 47), (1, 3), (1024,), (3, 2, 4), ()]
"""Uneven parts whose blocks begin elsewhere; empty in some processes; of whole blocks; three dimensions; none."""

INT8 = {"state_dtype": "int8", "min_8bit_size": 0}
FORMATS = {
    "fp32": {"max_grad_norm": 1.0},
    "master": {"dtype": torch.bfloat16, "master_weights": "fp32", "state_dtype": "bf16"},
    "split16": {"dtype": torch.bfloat16, "master_weights": "split16"},
    "int8": INT8,
    "split8-int8": {"dtype": torch.bfloat16, "master_weights": "split8", **INT8},
}


class Run:
    """Parameters that are spread over a mesh (None: plain), as a module, with their optimizer."""

    def __init__(self, mesh: DeviceMesh | None, placements=None, dtype=torch.float32, device="cpu", **options):
        self.mesh, self.placements, self.dtype, self.device = mesh, placements or [Shard(0)], dtype, device
        self.model = nn.Module()
        for i, shape in enumerate(SHAPES):
            self.model.register_parameter(f"p{i}", nn.Parameter(self._spread(full(shape, i, dtype, device))))
        self.params = list(self.model.parameters())
        self.opt = fusedopt.AdamW(self.params, lr=0.1, weight_decay=0.01, seed=1, **options)

    def _spread(self, value):
        return value if self.mesh is None else spread(value, self.mesh, self.placements)

    def step(self, step: int):
        for i, param in enumerate(self.params):
            grad = self._spread(full(SHAPES[i], 100 + 10 * step + i, self.dtype, self.device))
            spec = None if self.mesh is None else param._spec
            param.grad = DTensor(grad._local_tensor, spec, requires_grad=False) if spec else grad
        self.opt.step()
        self.opt.zero_grad()

    def states(self) -> list[dict[str, torch.Tensor]]:
        """Whole ones, decoded."""
        entries = self.opt.torch_state_dict()["state"].values()
        return [{key: whole_of(value) for key, value in entry.items()} for entry in entries]

    def weights(self) -> list[torch.Tensor]:
        return [whole_of(value) for value in self.opt.master_params()]

    def assert_same(self, other):
        """Parameters to all their digits, and states: to the bit."""
        assert_same_bits([whole_of(p) for p in self.params], [whole_of(p) for p in other.params])
        assert_same_bits(self.weights(), other.weights())
        for mine, theirs in zip(self.states(), other.states(), strict=True):
            assert mine.keys() == theirs.keys()
            assert_same_bits([*mine.values()], [*theirs.values()])


@contextlib.contextmanager
def directory(ctx: Context):
    """A new one, the same in all processes, until all are done with it."""
    with tempfile.TemporaryDirectory() as own:
        told = [own]
        distributed.broadcast_object_list(told, src=0)
        yield told[0]
        distributed.barrier()


def meshes(ctx: Context) -> dict[int, DeviceMesh]:
    """Of the first 1, 2 and 4 processes. Every process must call it."""
    return {n: DeviceMesh(ctx.device.type, list(range(n))) for n in (1, 2, 4) if n <= ctx.world}


def save(runs: dict[str, Run], path: str, group=None, **options):
    how = StateDictOptions(**options)
    quietly(checkpoint.save, {name: parts(run, how) for name, run in runs.items()}, path, group)


def load(runs: dict[str, Run], path: str, group=None, **options):
    """As torch's documentation has it."""
    how = StateDictOptions(**options)
    state = {name: parts(run, how) for name, run in runs.items()}
    quietly(checkpoint.load, state, path, group)
    for name, run in runs.items():
        model, optimizer = (state[name][key] for key in ("model", "optimizer"))
        set_state_dict(run.model, run.opt, model_state_dict=model, optim_state_dict=optimizer, options=how)


def parts(run: Run, how: StateDictOptions) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(run.model, run.opt, options=how)))


def quietly(function, state, path, group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(state, checkpoint_id=path, process_group=group)


def trained(mesh: DeviceMesh | None, ctx: Context, name: str, steps: int = 2, placements=None) -> Run:
    run = Run(mesh, placements, device=ctx.device, **FORMATS[name])
    for step in range(steps):
        run.step(step)
    return run


# ---- between numbers of processes --------------------------------------------------------------------------------


N_TO_M = ["fp32", "split16", "int8", "split8-int8"]


def from_n_to_m(ctx):
    """Bit for bit on as many processes, and on others too, but for blocks that are put together anew."""
    by_size = meshes(ctx)
    with directory(ctx) as path:
        for n, mesh in by_size.items():
            if ctx.rank < n:
                runs = {name: trained(mesh, ctx, name) for name in N_TO_M}
                save(runs, f"{path}/{n}", mesh.get_group())
                torch.save(runs["int8"].states(), f"{path}/{n}-states-{ctx.rank}")
        distributed.barrier()
        unsharded = {name: trained(None, ctx, name, steps=3) for name in N_TO_M if "int8" not in name}
        for m, mesh in by_size.items():
            for n in by_size if ctx.rank < m else ():
                runs = {name: Run(mesh, device=ctx.device, **FORMATS[name]) for name in N_TO_M}
                load(runs, f"{path}/{n}", mesh.get_group())
                assert_states_are_close(runs["int8"], torch.load(f"{path}/{n}-states-0", map_location=ctx.device))
                check_a_step_from_blocks(ctx, runs.pop("int8") if n != m else copy_of_blocks(ctx, runs["int8"]))
                for name, run in runs.items():
                    run.step(2)
                    if name in unsharded:
                        run.assert_same(unsharded[name])
                    elif n == m:
                        run.assert_same(trained(mesh, ctx, name, steps=3))


def assert_states_are_close(run: Run, saved: list[dict[str, torch.Tensor]]):
    """One rounding to nearest, where blocks were put together anew; none where they were not.

    A code is 3 (square roots of second moments: 4) bits of mantissa of |x| / unit + 2. unit: at most 2^-15 of the
    largest. Code 0 is not given to a second moment > 0, which may take twice as much.
    """
    for i, (now, before) in enumerate(zip(run.states(), saved, strict=True)):
        if SHAPES[i] == (1024,):  # whose parts are whole blocks
            assert_same_bits([*now.values()], [*before.values()])
        for key, bits in (("exp_avg", 3), ("exp_avg_sq", 4)):
            got, want = (each[key].double() if bits == 3 else each[key].double().sqrt() for each in (now, before))
            unit = want.abs().max() * 2.0**-15
            assert ((got - want).abs() <= (want.abs() + (2 if bits == 3 else 4) * unit) * 2.0 ** -(bits + 1)).all()


def check_a_step_from_blocks(ctx: Context, run: Run):
    """The step of float32 states that are what the blocks say."""
    plain = Run(None, device=ctx.device)
    plain.opt.load_state_dict(
        {
            "state": {i: {"step": 2.0, **entry} for i, entry in enumerate(run.states())},
            "param_groups": plain.opt.state_dict()["param_groups"],
        }
    )
    for param, own in zip(plain.params, run.params):
        param.detach().copy_(whole_of(own))
    for each in (run, plain):
        each.step(2)
    assert_same_bits([whole_of(p) for p in run.params], [p.detach() for p in plain.params])


def copy_of_blocks(ctx: Context, run: Run) -> Run:
    twin = Run(run.mesh, device=ctx.device, **FORMATS["int8"])
    twin.opt.load_state_dict(run.opt.state_dict())
    for param, own in zip(twin.params, run.params):
        param.to_local().detach().copy_(own.to_local().detach())
    return twin


# ---- other meshes, whole state dicts -------------------------------------------------------------------------------


def other_meshes(ctx):
    """HSDP's replicas, tensor parallelism over another dimension, both; into one another."""
    square = ctx.mesh(2, ctx.world // 2, names=("a", "b"))
    layouts = {
        "fsdp": (ctx.mesh(), [Shard(0)]),
        "hsdp": (square, [Replicate(), Shard(0)]),
        "tensors": (ctx.mesh(), [Shard(1)]),
        "both": (square, [Shard(1), Shard(0)]),
    }
    names = ["split16", "split8-int8"]
    with directory(ctx) as path:
        unsharded = trained(None, ctx, "split16", steps=3)
        for kind, (mesh, placements) in layouts.items():
            save({name: trained(mesh, ctx, name, 2, placements) for name in names}, f"{path}/{kind}")
        for saved, kind in [*zip(layouts, layouts), ("fsdp", "hsdp"), ("hsdp", "tensors"), ("both", "fsdp")]:
            mesh, placements = layouts[kind]
            runs = {name: Run(mesh, placements, device=ctx.device, **FORMATS[name]) for name in names}
            load(runs, f"{path}/{saved}")
            for run in runs.values():
                run.step(2)
            runs["split16"].assert_same(unsharded)
            if saved == kind:
                runs["split8-int8"].assert_same(trained(mesh, ctx, "split8-int8", 3, placements))


def whole_state_dicts(ctx):
    """full_state_dict, cpu_offload, broadcast_from_rank0: to all processes, other placements, a plain model."""
    mesh = ctx.mesh()
    for name in ("master", "split16", "split8-int8"):
        options = FORMATS[name]
        saved, unbroken = trained(mesh, ctx, name), trained(mesh, ctx, name, steps=3)
        how = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = parts(saved, how).values()
        assert bool(optimizer) is (ctx.rank == 0)
        resumed = Run(mesh, device=ctx.device, **options)
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(resumed.model, model, options=how)
        set_optimizer_state_dict(resumed.model, resumed.opt, optimizer, options=how)
        resumed.step(2)
        resumed.assert_same(unbroken)

        how = StateDictOptions(full_state_dict=True)
        model, optimizer = parts(saved, how).values()
        columns = Run(mesh, [Shard(1)], device=ctx.device, **options), how
        plain = Run(None, device=ctx.device, **options), StateDictOptions()  # nothing to distribute
        for other, way in (columns, plain):
            set_model_state_dict(other.model, dict(model), options=way)  # which it writes to
            set_optimizer_state_dict(other.model, other.opt, optimizer, options=way)
            if "int8" in name:
                assert_states_are_close(other, saved.states())
            else:
                other.step(2)
                other.assert_same(unbroken)


def flattened(ctx):
    """flatten_optimizer_state_dict, as pipeline stages need it."""
    with directory(ctx) as path:
        for name in ("fp32", "split8-int8"):
            try:
                save({name: trained(ctx.mesh(), ctx, name)}, f"{path}/{name}", flatten_optimizer_state_dict=True)
            except NotImplementedError as error:  # of torch, which flattened no dicts once
                assert "only supports tensor" in str(error) and "int8" in name
                continue
            resumed = Run(ctx.mesh(), device=ctx.device, **FORMATS[name])
            load({name: resumed}, f"{path}/{name}", flatten_optimizer_state_dict=True)
            resumed.step(2)
            resumed.assert_same(trained(ctx.mesh(), ctx, name, steps=3))


def fully_sharded(ctx):
    """FSDP2's own parameters, on one mesh with tensor parallelism too, where parts of parts are strided."""
    mesh = ctx.mesh(2, ctx.world // 2, names=("data", "tensor"))

    def made(both: bool):
        model = fsdp_checks.Model(torch.float32).to(ctx.device)
        if both:
            parallelize_module(model, mesh["tensor"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        for part in (model.a, model.b, model.norm, model.c, model.d):
            fully_shard(part, mesh=mesh["data"] if both else ctx.mesh())
        model = fully_shard(model, mesh=mesh["data"] if both else ctx.mesh())
        return model, fusedopt.AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0, seed=1, **INT8)

    def locals_of(model, opt):
        states = [value for p in model.parameters() for value in opt.state[p].values()]
        return [sharding.local_of(each).detach() for each in (*model.parameters(), *states)]

    with directory(ctx) as path:
        for both in (False, True):
            model, opt = made(both)
            rows = fsdp_checks.batch(0, ctx, torch.float32).chunk(2 if both else ctx.world)
            for _ in range(2):
                fsdp_checks.loss_of(model, rows[mesh.get_local_rank("data") if both else ctx.rank]).backward()
                opt.step()
                opt.zero_grad()
            how = StateDictOptions()
            state = dict(zip(("model", "optimizer"), get_state_dict(model, opt, options=how)))
            quietly(checkpoint.save, state, f"{path}/{both}", None)
            twin, its = made(both)
            state = dict(zip(("model", "optimizer"), get_state_dict(twin, its, options=how)))
            quietly(checkpoint.load, state, f"{path}/{both}", None)
            set_state_dict(twin, its, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=how)
            assert_same_bits(locals_of(twin, its), locals_of(model, opt))


def from_torch(ctx):
    """A checkpoint of torch's AdamW."""
    with directory(ctx) as path:
        run = Run(ctx.mesh(), device=ctx.device)
        run.opt = torch.optim.AdamW(run.params, lr=0.1)
        run.step(0)
        save({"run": run}, f"{path}/torch")
        resumed = Run(ctx.mesh(), device=ctx.device)
        resumed.opt = fusedopt.AdamW(resumed.params, lr=0.5)
        load({"run": resumed}, f"{path}/torch")
        assert resumed.opt.param_groups[0]["lr"] == 0.1
        for param, theirs in zip(resumed.params, run.params):
            for key, value in run.opt.state[theirs].items():
                assert_same_bits(whole_of(resumed.opt.state[param][key]), whole_of(value))


def other_formats(ctx):
    """Never a silent cast."""
    with directory(ctx) as path:
        for name in ("int8", "split16", "fp32"):
            save({"run": trained(ctx.mesh(), ctx, name)}, f"{path}/{name}")
        for saved, options, missing in (
            ("int8", FORMATS["fp32"], "exp_avg"),
            ("fp32", FORMATS["int8"], "exp_avg.code"),
            ("split16", {**FORMATS["split16"], "master_weights": "split8"}, "param_remainder.bits8"),
            ("split16", FORMATS["master"], "master_param"),
            ("fp32", {"state_dtype": "bf16"}, "state_dtype"),
        ):
            with pytest.raises(checkpoint.CheckpointException, match=rf"Missing key.*{missing}"):
                load({"run": Run(ctx.mesh(), device=ctx.device, **options)}, f"{path}/{saved}")
        # The way from one format to another: load into the one it was saved in, and hand that over.
        source, target = (Run(ctx.mesh(), device=ctx.device, **FORMATS[name]) for name in ("int8", "fp32"))
        load({"run": source}, f"{path}/int8")
        target.opt.load_state_dict(source.opt.state_dict())
        assert_same_bits(
            [value for entry in source.states() for value in entry.values()],
            [value for entry in target.states() for value in entry.values()],
        )


CHECKS = [
    "from_n_to_m",
    "other_meshes",
    "whole_state_dicts",
    "flattened",
    "fully_sharded",
    "from_torch",
    "other_formats",
]
