"""The table that drives the tests, one row per optimizer and variant, and the tensors they are tried on."""

import dataclasses
import functools
import inspect

import torch
from torch import Tensor

import fusedopt
from fusedopt import reference, specs
from fusedopt.optim.base import Options


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: an optimizer of fusedopt, its keyword arguments, the reference rule it follows and its peer in torch."""

    name: str
    optimizer: str
    rule: str
    kwargs: dict
    peer: type | None

    def __str__(self) -> str:
        return self.name

    @property
    def rule_spec(self) -> specs.RuleSpec:
        return specs.RULES[self.rule]

    def takes(self, **kwargs) -> bool:
        """Whether the optimizer has these arguments: as in torch, not all have `fused`."""
        named = inspect.signature(getattr(fusedopt, self.optimizer)).parameters.keys() | Options.__annotations__.keys()
        return kwargs.keys() <= named

    def make(self, params, **extra) -> torch.optim.Optimizer:
        return getattr(fusedopt, self.optimizer)(params, **{**self.kwargs, **extra})

    def make_peer(self, params, **extra) -> torch.optim.Optimizer:
        return self.peer(params, **{**self.kwargs, **extra})

    @property
    def has_peer(self) -> bool:
        """Whether this torch has an optimizer that takes the same arguments (old ones lack decoupled_weight_decay)."""
        return self.peer is not None and self.kwargs.keys() <= inspect.signature(self.peer).parameters.keys()


ADAM, ADAMW, RADAM = torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam
SGD, RMSPROP, ADAGRAD = torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad

DECAY = {"lr": 1e-2, "weight_decay": 0.1}
UPHILL = {**DECAY, "maximize": True}
MOMENTUM = {"lr": 3e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
NESTEROV = {"lr": 1e-2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.3}
MEMORY = {"momentum": 0.8, "alpha": 0.9}
SUMS = {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-6, "weight_decay": 0.1}

CASES = [
    Case("adam", "Adam", "adam", {}, ADAM),
    Case("adam-l2", "Adam", "adam", {"lr": 1e-2, "weight_decay": 0.1}, ADAM),
    Case("adam-maximize", "Adam", "adam", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}, ADAM),
    Case("adam-eps", "Adam", "adam", {"lr": 0.1, "betas": (0.6, 0.8), "eps": 1e-2, "weight_decay": 0.01}, ADAM),
    Case("adam-decoupled", "Adam", "adamw", {"weight_decay": 0.1, "decoupled_weight_decay": True}, ADAM),
    Case("adam-amsgrad", "Adam", "adam_amsgrad", {"amsgrad": True, **UPHILL}, ADAM),
    Case("adamw", "AdamW", "adamw", {}, ADAMW),
    Case("adamw-decay", "AdamW", "adamw", {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}, ADAMW),
    Case("adamw-maximize", "AdamW", "adamw", {"lr": 1e-2, "eps": 1e-5, "maximize": True}, ADAMW),
    Case("adamw-amsgrad", "AdamW", "adamw_amsgrad", {"amsgrad": True, "betas": (0.7, 0.8), **DECAY}, ADAMW),
    Case("lion", "Lion", "lion", {}, None),
    Case("lion-decay", "Lion", "lion", {"lr": 3e-3, "betas": (0.95, 0.98), "weight_decay": 0.5}, None),
    Case("lion-maximize", "Lion", "lion", {"lr": 1e-2, "weight_decay": 0.1, "maximize": True}, None),
    Case("sgd", "SGD", "sgd", {}, SGD),
    Case("sgd-l2", "SGD", "sgd", {"lr": 0.1, "weight_decay": 0.1}, SGD),
    Case("sgd-maximize", "SGD", "sgd", UPHILL, SGD),
    Case("sgd-momentum", "SGD", "sgd_momentum", MOMENTUM, SGD),
    Case("sgd-nesterov", "SGD", "sgd_momentum", {**NESTEROV, "maximize": True}, SGD),
    Case("sgdw", "SGDW", "sgdw", {}, None),
    Case("sgdw-decay", "SGDW", "sgdw", UPHILL, None),
    Case("sgdw-momentum", "SGDW", "sgdw_momentum", {**MOMENTUM, "maximize": True}, None),
    Case("sgdw-nesterov", "SGDW", "sgdw_momentum", NESTEROV, None),
    Case("rmsprop", "RMSprop", "rmsprop", {}, RMSPROP),
    Case("rmsprop-l2", "RMSprop", "rmsprop", {"alpha": 0.7, "eps": 1e-5, **UPHILL}, RMSPROP),
    Case("rmsprop-momentum", "RMSprop", "rmsprop_momentum", {**MEMORY, **DECAY}, RMSPROP),
    Case("rmsprop-centered", "RMSprop", "rmsprop_centered", {"centered": True, **DECAY}, RMSPROP),
    Case("rmsprop-both", "RMSprop", "rmsprop_centered_momentum", {"centered": True, **MEMORY, **UPHILL}, RMSPROP),
    Case("adagrad", "Adagrad", "adagrad", {}, ADAGRAD),
    Case("adagrad-l2", "Adagrad", "adagrad", SUMS, ADAGRAD),
    Case("adagrad-maximize", "Adagrad", "adagrad", UPHILL, ADAGRAD),
    Case("radam", "RAdam", "radam", {}, RADAM),
    Case("radam-l2", "RAdam", "radam", {"betas": (0.8, 0.95), "eps": 1e-5, **DECAY}, RADAM),
    Case("radam-decoupled", "RAdam", "radam", {"decoupled_weight_decay": True, **UPHILL}, RADAM),
    Case("lamb", "LAMB", "lamb", {}, None),
    Case("lamb-decay", "LAMB", "lamb", {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}, None),
    Case("lamb-l2", "LAMB", "lamb", {"adam_w_mode": False, "grad_averaging": False, **UPHILL}, None),
    Case("lamb-nvlamb", "LAMB", "lamb", {"use_nvlamb": True, "weight_decay": 0, "bias_correction": False}, None),
]
BY_NAME = {case.name: case for case in CASES}
# One row per set of moments, and one of two phases, with weight decay, for what does not depend on the rule.
ONE_EACH = [
    BY_NAME[name]
    for name in ("adamw-amsgrad", "adamw-decay", "lion-decay", "rmsprop-momentum", "adagrad-l2", "lamb-decay")
]
# One row per rule with states, for what does not depend on the variant.
BY_RULE = [
    *ONE_EACH,
    *(BY_NAME[name] for name in ("adam-l2", "sgd-momentum", "sgdw-nesterov", "rmsprop-centered", "radam-l2")),
]
ELEMENTWISE = [case for case in ONE_EACH if not case.rule_spec.norms]
STATELESS = [BY_NAME["sgd-l2"], BY_NAME["sgdw-decay"]]
WITH_PEER = [case for case in CASES if case.has_peer]
ONE_EACH_WITH_PEER = [case for case in ONE_EACH if case.has_peer]

# Arguments of the functions, by rule.
VALUES = {
    "lr": 0.02,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "momentum": 0.7,
    "dampening": 0.2,
    "nesterov": False,
    "alpha": 0.8,
    "lr_decay": 0.3,
    "decoupled_weight_decay": True,
    "bias_correction": True,
    "adam_w_mode": True,
    "grad_averaging": False,
    "use_nvlamb": False,
}
FUNCTION_HYPER = {name: {key: VALUES[key] for _, key, _ in spec.hyper} for name, spec in specs.RULES.items()}
for plain in ("rmsprop", "rmsprop_centered"):
    FUNCTION_HYPER[plain]["momentum"] = 0.0


def call_function(rule, params, grads, states, steps, **kwargs):
    """The rule's function on lists of its states."""
    function = getattr(fusedopt.functional, f"{specs.RULES[rule].family}_")
    named = {f"{name}s": group for name, group in zip(reference.STATES[rule], states, strict=True)}
    if not named:
        named = {"momentum_buffers": None}
    function(params, grads, steps=steps, **named, **kwargs)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Around the vector widths (4 to 16 elements) and the chunk lengths (powers of two up to 65,536) of the engines.
SIZES = [0, 1, 3, 4, 7, 8, 15, 16, 17, 255, 1023, 4095, 4096, 4097, 8191, 8193, 16385, 65537]

# The largest magnitude tried: its square, which Adam stores, must stay finite in the compute type.
LARGEST = {torch.float32: 1e18, torch.bfloat16: 1e18, torch.float16: 6e4, torch.float64: 1e100}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Standard normal values, or real and imaginary parts, the same on every device."""
    if dtype.is_complex:
        return torch.view_as_complex(normal((*shape, 2), dtype.to_real(), device, seed))
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype).to(device)


def hard_values(shape, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    """Values of many magnitudes of which a quarter are zero, -0, subnormal, the least normal, one or huge."""
    random, finfo, n = generator(seed), torch.finfo(dtype), torch.Size(shape).numel()
    magnitude = torch.exp2(torch.randint(-20, 4, (n,), generator=random).double())
    values = torch.randn(n, generator=random, dtype=torch.float64) * magnitude
    subnormal, huge = finfo.smallest_normal * finfo.eps, LARGEST[dtype]
    special = [0.0, -0.0, subnormal, -3 * subnormal, finfo.smallest_normal, 1.0, -1.0, huge, -huge]
    special = torch.tensor(special, dtype=torch.float64)[torch.randint(len(special), (n,), generator=random)]
    chosen = torch.rand(n, generator=random) < 0.25
    return torch.where(chosen, special, values).to(dtype).reshape(shape).to(device)


# ---- layouts ------------------------------------------------------------------------------------------------------

PARAM_LAYOUTS = {
    "dense": lambda make: make((37, 29)),
    "transposed": lambda make: make((29, 37)).t(),
    "channels_last": lambda make: make((3, 5, 7, 11)).contiguous(memory_format=torch.channels_last),
    "permuted_3d": lambda make: make((9, 10, 11)).permute(2, 0, 1),
    "every_second": lambda make: make((8202,))[::2],
    "columns": lambda make: make((37, 31))[:, 1:30],
    "odd_offset": lambda make: make((8200,))[1:],
    "one_element": lambda make: make((1,)),
    "zero_dim": lambda make: make(()),
    "empty": lambda make: make((0,)),
    "empty_2d": lambda make: make((3, 0)),
}


def _reversed_dims(values: Tensor) -> Tensor:
    order = tuple(reversed(range(values.dim())))
    return values.permute(order).contiguous().permute(order)


def _gapped(values: Tensor) -> Tensor:
    return values.repeat_interleave(2, dim=-1)[..., ::2] if values.dim() else values


def _misaligned(values: Tensor) -> Tensor:
    buffer = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
    return buffer[1:].view(values.shape).copy_(values)


GRAD_LAYOUTS = {
    "dense": lambda values: values.contiguous(),
    "reversed_dims": _reversed_dims,
    "gapped": _gapped,
    "misaligned": _misaligned,
    "expanded": lambda values: values.new_full((), 0.375).expand(values.shape),
}


def parameter(values: Tensor) -> torch.nn.Parameter:
    """A parameter that keeps the strides and the storage of `values`."""
    return torch.nn.Parameter(values)


def parameters(sizes, dtype=torch.float32, device="cpu", seed=0, values=normal) -> list[torch.nn.Parameter]:
    return [parameter(values((n,), dtype, device, seed=100 * seed + i)) for i, n in enumerate(sizes)]


def set_gradients(params, seed=0, values=normal, scale=1.0) -> None:
    """Give every parameter a fresh gradient, the same for the same seed on every device."""
    for i, p in enumerate(params):
        p.grad = values(p.shape, p.dtype, p.device, seed=10_000 + 100 * seed + i) * scale


def train(opt, params, steps, first=0, scale=1.0) -> None:
    """Steps on gradients that depend on the number of the step alone."""
    for step in range(first, first + steps):
        set_gradients(params, seed=step, scale=scale)
        opt.step()


# ---- bits ---------------------------------------------------------------------------------------------------------


def parts(t: Tensor) -> Tensor:
    """Real and imaginary parts in a last dimension of their own, where `t` is complex: what kernels see of it."""
    t = t.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(t) if t.is_complex() else t


def bits(t: Tensor) -> Tensor:
    """The elements of `t`, or their parts, as integers, on the CPU."""
    t = parts(t)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().cpu().contiguous().view(integer)


def assert_same_bits(actual, expected) -> None:
    """Both a tensor, or lists of tensors: same dtype, shape and bits, so that 0 differs from -0."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), f"tensor {i}"
        a, e = parts(a), parts(e)
        different = (bits(a) != bits(e)).reshape(-1).nonzero().flatten().tolist()
        assert not different, (
            f"tensor {i}: {len(different)} of {a.numel()} elements differ, first at {different[0]}: "
            f"{a.reshape(-1)[different[0]].item()!r} != {e.reshape(-1)[different[0]].item()!r}"
        )


def comparer(same, rule: str, dtype, steps: int):
    """What compares two engines: `same`, which asserts same bits; float64 of rules of two phases only up to norms."""
    up_to_norms = bool(specs.RULES[rule].norms) and dtype == torch.float64
    return functools.partial(assert_same_up_to_norms, same, steps=steps) if up_to_norms else same


def assert_same_up_to_norms(same, actual, expected, steps: int) -> None:
    """After steps whose norms were added in another order. Where an engine adds a float32's squares, they are exact in
    double and the last place of a norm vanishes in the coefficient; a float64 coefficient shows it.

    In no engine does a square of the sizes tried meet more than 256 roundings in double on its way into the sum, so
    that two norms, and their ratio, are off by at most 2 * 256 roundings between two engines, in first order. The
    update of a step has a norm of lr times the parameter's, so that no element of it exceeds sqrt(n) times the largest
    one.
    """
    for a, e in zip(actual, expected, strict=True):
        if a.dtype != torch.float64:
            same([a], [e])
            continue
        a, e = a.detach().cpu(), e.detach().cpu()
        assert torch.equal(a.isnan(), e.isnan()) and torch.equal(a.isinf(), e.isinf())
        finite = e.isfinite()
        a, e = a[finite], e[finite]
        bound = steps * 2 * 256 * 2.0**-53 * e.numel() ** 0.5 * e.abs().max() if e.numel() else 0.0
        assert ((a - e).abs() <= bound).all()


def memory(opt) -> list[Tensor]:
    """Copies of everything that a step may write: parameters with their storage gaps, states, step counters."""
    tensors = []
    for group in opt.param_groups:
        for p in group["params"]:
            tensors.append(storage(p))
            tensors += [value for _, value in sorted(opt.state.get(p, {}).items())]
    return [torch.as_tensor(t).detach().clone() for t in tensors]


def storage(t: Tensor) -> Tensor:
    """Every element of the storage behind `t`, those that `t` does not reach included. Shares memory."""
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
