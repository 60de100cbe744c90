"""The table that drives the tests, in parts of them, and helpers around `fusedopt.testing`."""

import functools

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import reference, specs
from fusedopt.backends import for_device
from fusedopt.testing.tensors import (  # noqa: F401 - what tests import from here
    GRAD_LAYOUTS,
    LARGEST,
    PARAM_LAYOUTS,
    assert_same_bits,
    bits,
    generator,
    hard_values,
    normal,
    parameter,
    parameters,
    parts,
    storage,
)
from fusedopt.testing.variants import BY_NAME
from fusedopt.testing.variants import VARIANTS as CASES

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


def set_gradients(params, seed=0, values=normal, scale=1.0) -> None:
    """Give every parameter a fresh gradient, the same for the same seed on every device."""
    for i, p in enumerate(params):
        p.grad = values(p.shape, p.dtype, p.device, seed=10_000 + 100 * seed + i) * scale


def train(opt, params, steps, first=0, scale=1.0) -> None:
    """Steps on gradients that depend on the number of the step alone."""
    for step in range(first, first + steps):
        set_gradients(params, seed=step, scale=scale)
        opt.step()


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


def backend_or_skip(name: str, device: torch.device) -> str | None:
    """``backend=`` of an optimizer on the device: None for "best". Skips the test where that one cannot run there."""
    if name == "best":
        return None
    try:
        for_device(device, name)
    except RuntimeError as error:
        pytest.skip(str(error))
    return name
