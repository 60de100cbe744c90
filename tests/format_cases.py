"""Steps with formats: what `fusedopt.testing` says of their numbers, and of their keys, layouts and gradients here."""

import torch
from cases import assert_same_bits, hard_values, normal, parameter
from torch import Tensor

from fusedopt import specs
from fusedopt.testing.formats import (  # noqa: F401 - what tests import from here
    BFLOAT16,
    BLOCK,
    BY_NAME,
    COMBINATIONS,
    FLOAT16,
    FLOAT32,
    Combination,
    assert_codes,
    code_step,
    in_order,
    unit_of,
)
from fusedopt.testing.judge import (  # noqa: F401
    Before,
    alike,
    before_step,
    gradient,
    judge_values,
    set_gradient,
)
from fusedopt.testing.tensors import assert_gaps_untouched

GRAD_DTYPES = [FLOAT32, BFLOAT16, FLOAT16]

# Around vector widths, the 8 elements that share random bits, int8 blocks and the chunks of the engines.
SIZES = [0, 1, 7, 8, 9, 255, 256, 257, 1025, 8191, 8193]
# One for each way of keeping a parameter and each of keeping states.
TOGETHER = 128
"""How many full chunks share out their rounds: ``kTogether`` of ``csrc/cuda/vectors.cuh``."""

FEW = [
    Combination(BFLOAT16, "fp32"),
    Combination(BFLOAT16, "split16", "int8"),
    Combination(BFLOAT16, "split8", "bf16"),
    Combination(BFLOAT16, "split8", "int8"),
    Combination(BFLOAT16, None, "bf16", True),
    Combination(BFLOAT16, None, "int8", True),
    Combination(FLOAT16, "fp32", "int8"),
    Combination(FLOAT32, None, "int8"),
]


# ---- gradients ----------------------------------------------------------------------------------------------------


def hard_gradient(p, dtype, seed) -> Tensor:
    """As `hard_values`, within what float16 states can square where the parameter is float16."""
    values = hard_values(p.shape, FLOAT16 if p.dtype == FLOAT16 else dtype, p.device, seed)
    return values.clamp(-200, 200).to(dtype) if p.dtype == FLOAT16 else values


def assert_stepped(opt, rule: str, records: list[Before], **transform) -> None:
    """As `bounds.assert_stepped`, for parameters and states in any format."""
    assert records, "no parameter has a gradient: nothing was tested"
    for group in alike(opt, rule, records):
        judge_values(opt, rule, group, **transform).check()
    for r in records:
        _assert_kept(opt, rule, r)


def _assert_kept(opt, rule: str, r: Before) -> None:
    """Keys, dtypes and layouts of the state; the gradient and the gaps of the parameter are as they were."""
    p, state = r.tensor, opt.state.get(r.tensor, {})
    dense = torch.empty_like(p.detach())
    for key, value in state.items():
        if key == "step":
            assert (float(value), value.shape, value.dtype) == (r.step + 1, (), FLOAT32)
        elif key.endswith("_scale"):
            assert (value.dtype, value.shape) == (FLOAT32, (-(-p.numel() // BLOCK),))
        else:
            assert value.shape == p.shape and (value.stride() == dense.stride() or not p.numel())
    if r.grad_bits is not None:
        assert_same_bits(gradient(p), r.grad_bits)
    assert_gaps_untouched(p, r.storage)


def assert_state_formats(opt, combination: Combination, rule: str, min_8bit_size: int) -> None:
    """The state of every parameter has the keys and dtypes that its combination says."""
    for p, state in opt.state.items():
        first = combination.state_format
        blocked = first == torch.int8 and p.numel() >= min_8bit_size
        if first == torch.int8 and not blocked:
            first = FLOAT32
        wanted = {"step": FLOAT32} if specs.RULES[rule].states or combination.keeps_more else {}
        for name, moment in zip(specs.RULES[rule].states, specs.RULES[rule].moments):
            wanted[name] = torch.uint8 if blocked and moment == "second" else first
            if blocked:
                wanted[f"{name}_scale"] = FLOAT32
        if combination.master_weights == "fp32":
            wanted["master_param"] = FLOAT32
        elif combination.master_weights:
            wanted["param_remainder"] = {"split16": torch.int16, "split8": torch.int8}[combination.master_weights]
        assert {key: value.dtype for key, value in state.items()} == wanted


# ---- models -------------------------------------------------------------------------------------------------------


def make_params(combination: Combination, sizes=SIZES, device="cpu", seed=0, values=normal) -> list:
    return [parameter(values((n,), combination.dtype, device, seed=100 * seed + i)) for i, n in enumerate(sizes)]
