"""The same parameters twice, spread over processes and whole, for what several processes check together.

Gradients are small multiples of 1/8, whose squares add up without rounding in any order: so steps of sharded parameters
have the very bits of steps of whole ones.
"""

import torch
from cases import assert_same_bits
from processes import Context
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedopt

SHAPES = [(7, 5), (1, 3), (16,), (3, 2, 4), (513,), ()]
"""Over two or four processes: uneven, empty in some, even, of three dimensions, none."""


def full(shape, seed: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=random) / 8).to(device=device, dtype=dtype)


def spread(tensor, mesh, placements) -> torch.Tensor:
    placements = [Replicate() if p.is_shard() and p.dim >= tensor.ndim else p for p in placements]
    return distribute_tensor(tensor.clone(), mesh, placements)


class Pair:
    """The same parameters twice: spread over a mesh as ``placements`` say (None: plain), and whole.

    twin: device of the whole ones; by default the mesh's.
    """

    def __init__(
        self, ctx: Context, mesh, placements, opt_class=fusedopt.AdamW, dtype=torch.float32, twin=None, **options
    ):
        self.ctx, self.mesh, self.dtype, self.placements = ctx, mesh, dtype, placements
        self.shapes = SHAPES[: len(placements)]
        values = [full(shape, seed, dtype, ctx.device) for seed, shape in enumerate(self.shapes)]
        self.sharded = [self._spread(value, p).requires_grad_() for value, p in zip(values, placements)]
        self.whole = [value.to(twin or ctx.device, copy=True).requires_grad_() for value in values]
        options = {"lr": 0.1, "weight_decay": 0.01, **options} if opt_class is fusedopt.AdamW else options
        self.opt = opt_class(self.sharded, **options)
        self.expected = opt_class(self.whole, **options)

    def _spread(self, value, placements):
        return value.clone() if placements is None else spread(value, self.mesh, placements)

    def set_grads(self, step: int, skip=()):
        """As FSDP does it: gradients share the object that says where the parts of their parameter are."""
        for i, (param, whole) in enumerate(zip(self.sharded, self.whole)):
            grad = full(whole.shape, 100 + 10 * step + i, self.dtype, self.ctx.device)
            whole.grad = None if i in skip else grad.to(whole.device)
            part = self._spread(grad, self.placements[i])
            if isinstance(param, DTensor):
                part = DTensor(part._local_tensor, param._spec, requires_grad=False)
            param.grad = None if i in skip else part

    def step(self, step: int, skip=()):
        self.set_grads(step, skip)
        self.opt.step()
        self.expected.step()

    def assert_same(self):
        for param, whole in zip(self.sharded, self.whole):
            assert_same_bits(whole_of(param), whole.detach())
            got, want = self.opt.state[param], self.expected.state[whole]
            assert got.keys() == want.keys()
            for key in got:
                if key == "step":
                    assert not isinstance(got[key], DTensor) and got[key].item() == want[key].item()
                else:
                    assert isinstance(got[key], DTensor) is isinstance(param, DTensor)
                    assert_same_bits(whole_of(got[key]), want[key])


def whole_of(tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    tensor = tensor.detach().to(tensor.device_mesh.device_type)  # what is offloaded to the host
    wide = tensor.int() if tensor.dtype == torch.int16 else tensor  # which gloo does not know
    return wide.full_tensor().to(tensor.dtype)


def all_sharded(dim: int = 0) -> list:
    return [[Shard(dim)]] * len(SHAPES)


def mixed() -> list:
    """Sharded in two ways, replicated, and plain."""
    return [[Shard(0)], [Replicate()], None, [Shard(1)], [Shard(0)], [Replicate()]]
