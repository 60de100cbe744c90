"""Adversarial cases: named sets of parameters and gradients. To add one, add a row to ``DATA``."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import specs
from .tensors import GRAD_LAYOUTS, LARGEST, PARAM_LAYOUTS, generator, hard_values, normal, on_device

__all__ = ["BY_NAME", "DATA", "TRANSFORMS", "DataSet"]

TRANSFORMS = ("none", "scale", "clip", "value_clip", "accumulate")
"""What is done to gradients before the rule: see ``trials.py``."""

Shape = tuple[int, ...]
Values = Callable[..., Tensor]
"""(shape, dtype, device, seed) -> tensor, the same on every device."""
Layout = Callable[[Callable[[Shape], Tensor]], Tensor]
"""Makes a tensor from a function that makes dense ones of a shape."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Parameters, and their gradients in a few steps."""

    name: str
    about: str
    layouts: tuple[Layout, ...] = ()
    """One for each parameter: what makes it from a function that makes dense tensors of a shape."""
    params: Values = normal
    grads: Values = normal
    grad_layout: str = "dense"
    """A key of ``GRAD_LAYOUTS``."""
    place: tuple[int, int, float] | None = None
    """(tensor, element, value) of one element of every step's gradients."""
    present: Callable[[int, int], bool] = lambda step, i: True
    """Whether parameter ``i`` has a gradient in a step."""
    hyper: tuple[tuple[str, Any], ...] = ()
    """Pairs of hyper-parameters; rules that lack one are not tried."""
    steps: int = 3
    counter: int | None = None
    """What the step counters are set to after the first step."""
    transforms: tuple[str, ...] = TRANSFORMS
    mixed: bool = False
    """Whether every second parameter has ``other_dtype``, in the same param group."""
    shared: bool = False
    """Whether the parameters are slices of one storage, an odd number of elements apart."""
    heavy: bool = False
    """Takes seconds: each rule meets it once, samples leave it out."""

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], DataSet], tuple[str]]:
        return named, (self.name,)  # other processes look it up: layouts are functions

    def suits(self, rule: str, transform: str) -> bool:
        keys = {key for _, key, _ in specs.RULES[rule].hyper}
        return transform in self.transforms and {key for key, _ in self.hyper} <= keys

    def make_params(self, dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
        def maker(i: int) -> Callable[[Shape], Tensor]:
            own = other_dtype(dtype) if self.mixed and i % 2 else dtype
            return lambda shape: _values(self.params, tuple(shape), own, i).clone()

        params = [layout(maker(i)) for i, layout in enumerate(self.layouts)]
        params = slices_of_one_storage(params) if self.shared else params
        return [torch.nn.Parameter(p) for p in on_device(params, device)]

    def make_grads(
        self, params: Sequence[Tensor], dtype: torch.dtype, step: int, micro_batch: int = 0
    ) -> list[Tensor | None]:
        """Of one micro-batch of one step (from 0): in ``dtype``, of values that the parameters' states can square; of
        parameters of another dtype than the first one in theirs."""
        grads: list[Tensor | None] = []
        of_first = dtype
        for i, p in enumerate(params):
            if not self.present(step, i):
                grads.append(None)
                continue
            dtype = of_first if p.dtype == params[0].dtype else p.dtype
            values_of = torch.float16 if p.dtype == torch.float16 else dtype
            seed = 1000 * (step + 1) + 100_000 * micro_batch + i
            values = _values(self.grads, tuple(p.shape), values_of, seed).clone()
            if self.place is not None and self.place[0] == i:
                values.view(-1)[self.place[1]] = self.place[2]
            grads.append(GRAD_LAYOUTS[self.grad_layout](values.to(dtype)))
        moved = iter(on_device([grad for grad in grads if grad is not None], params[0].device) if params else ())
        return [None if grad is None else next(moved) for grad in grads]


@functools.lru_cache(maxsize=8192)  # tens of MB: all but the heavy data sets
def _values(make: Values, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """To be copied: cases differ in what is done with the same values, and random numbers take long to make."""
    return make(shape, dtype, "cpu", seed=seed)


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of every second parameter where dtypes are mixed: one that a step must not round to the first one's."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def slices_of_one_storage(params: list[Tensor]) -> list[Tensor]:
    """Copies of dense tensors, one after the other in one buffer, with an element before, between and after them."""
    buffer = params[0].new_full((sum(p.numel() + 1 for p in params) + 1,), 7.0)
    slices, start = [], 1
    for p in params:
        slices.append(buffer[start : start + p.numel()].view(p.shape).copy_(p))
        start += p.numel() + 1
    return slices


def named(name: str) -> DataSet:
    return BY_NAME[name]


# ---- layouts ------------------------------------------------------------------------------------------------------


def dense(*shapes: int | Shape) -> tuple[Layout, ...]:
    """Contiguous parameters of these shapes or sizes."""
    return tuple(lambda make, shape=s: make((shape,) if isinstance(shape, int) else shape) for s in shapes)


def laid(*names: str) -> tuple[Layout, ...]:
    return tuple(PARAM_LAYOUTS[name] for name in names)


def around(chunk: int) -> tuple[int, int]:
    return chunk - 1, chunk + 1


FEW = dense(257, (8, 8), 1031)


# ---- values -------------------------------------------------------------------------------------------------------


def mixed(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """All magnitudes of which the square is finite, zeros, -0, subnormal numbers."""
    values = hard_values(shape, dtype, device, seed)
    return values.clamp(-200, 200) if dtype == torch.float16 else values


def constant(value: float) -> Values:
    return lambda shape, dtype, device, seed: torch.full(shape, value, dtype=dtype, device=device)


def scaled(factor: Callable[[torch.dtype], float]) -> Values:
    """Normal values times a factor that depends on the dtype."""

    def values(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Tensor:
        return (normal(shape, torch.float64, seed=seed) * factor(dtype)).to(dtype).to(device)

    return values


def subnormal(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """-9 to 9 times the least subnormal number."""
    finfo = torch.finfo(dtype)
    multiples = torch.randint(-9, 10, tuple(shape), generator=generator(seed)).double()
    return (multiples * (finfo.smallest_normal * finfo.eps)).to(dtype).to(device)


def tiny(dtype: torch.dtype) -> float:
    return {torch.float16: 1e-6, torch.float64: 1e-200}.get(dtype, 1e-30)


def huge(dtype: torch.dtype) -> float:
    return 40.0 if dtype == torch.float16 else LARGEST[dtype] / 8  # normal values are below 6


def overflowing(dtype: torch.dtype) -> float:
    return {torch.float16: 1e4, torch.float64: 1e200}.get(dtype, 1e25)


# ---- the table ----------------------------------------------------------------------------------------------------

_FIRST, _MIDDLE, _LAST = (0, 0), (1, 31), (2, 1030)  # of FEW

DATA = (
    DataSet("mixed", "all magnitudes, zeros, -0, subnormal numbers", dense(1, 7, 8, 255, 256, 257, 1031), mixed, mixed),
    DataSet("zeros", "gradients of zero", FEW, grads=constant(0.0)),
    DataSet("negative_zeros", "parameters and gradients of -0", FEW, constant(-0.0), constant(-0.0)),
    DataSet("subnormals", "subnormal parameters and gradients", FEW, subnormal, subnormal),
    DataSet("tiny", "gradients whose squares underflow", FEW, grads=scaled(tiny)),
    DataSet("huge", "gradients whose squares are almost infinite", FEW, grads=scaled(huge)),
    DataSet("norm_1e5", "a norm of 1e5, which float16 cannot hold", dense(5000, 5000), grads=constant(1000.0),
            transforms=("clip",)),
    DataSet("overflowing_squares", "squares beyond the compute type, clipped", FEW, grads=scaled(overflowing),
            transforms=("clip",)),
    DataSet("inf_first", "inf in the first element", FEW, place=(*_FIRST, math.inf)),
    DataSet("inf_middle", "-inf in an element in the middle", FEW, place=(*_MIDDLE, -math.inf)),
    DataSet("inf_last", "inf in the last element", FEW, place=(*_LAST, math.inf)),
    DataSet("nan_first", "NaN in the first element", FEW, place=(*_FIRST, math.nan)),
    DataSet("nan_middle", "NaN in an element in the middle", FEW, place=(*_MIDDLE, math.nan)),
    DataSet("nan_last", "NaN in the last element", FEW, place=(*_LAST, math.nan)),
    DataSet("inf_chunk_end", "inf in the last element of a chunk", dense(33, specs.CUDA_CHUNK + 1), steps=2,
            place=(1, specs.CUDA_CHUNK - 1, math.inf)),
    DataSet("nan_chunk_start", "NaN in a chunk of one element", dense(33, specs.CUDA_CHUNK + 1), steps=2,
            place=(1, specs.CUDA_CHUNK, math.nan)),
    DataSet("empty_first", "the first tensor is empty", dense(0, 257, 33)),
    DataSet("empty_middle", "a tensor in the middle is empty", dense(257, (3, 0), 33)),
    DataSet("empty_last", "the last tensor is empty", dense(257, 33, 0)),
    DataSet("zero_dim", "tensors without dimensions", laid("zero_dim", "one_element", "zero_dim")),
    DataSet("non_contiguous", "transposed, permuted and with gaps; gradients with gaps",
            laid("transposed", "permuted_3d", "every_second", "columns"), grad_layout="gapped", steps=2),
    DataSet("channels_last", "four dimensions, channels last; gradients in another order",
            laid("channels_last", "dense"), grad_layout="reversed_dims"),
    DataSet("misaligned", "odd storage offsets", laid("odd_offset", "odd_offset"), grad_layout="misaligned", steps=2),
    DataSet("shared_storage", "slices of one storage", dense(33, (8, 8), 0, 257, 1031), shared=True),
    DataSet("mixed_dtypes", "a param group of two dtypes", dense(33, 257, (8, 8), 1031), mixed=True),
    DataSet("chunk_boundary", "one element less and more than a chunk of an engine",
            dense(*around(specs.CPU_CHUNK), *around(specs.CUDA_CHUNK)), steps=2),
    DataSet("one_tensor", "a model of one tensor", dense(1031), steps=2),
    DataSet("many_small", "300 tensors of 1 to 5 elements", dense(*(1 + i % 5 for i in range(300))), steps=2),
    DataSet("ten_thousand", "10,000 tensors of 1 to 3 elements", dense(*(1 + i % 3 for i in range(10_000))), steps=2,
            transforms=("clip",), heavy=True),
    DataSet("all_frozen", "no parameter has a gradient", FEW, present=lambda step, i: False, steps=2,
            transforms=("none", "scale", "clip", "value_clip")),
    DataSet("intermittent", "gradients come and go, so that step counters differ", dense(33, 257, 8, 100),
            present=lambda step, i: (step + i) % 3 != 0, steps=5),
    DataSet("lr_zero", "a learning rate of zero", FEW, hyper=(("lr", 0.0),)),
    DataSet("betas_zero", "no memory of earlier gradients", FEW, hyper=(("betas", (0.0, 0.0)),)),
    DataSet("large_decay", "a weight decay of 30", FEW, hyper=(("weight_decay", 30.0),)),
    DataSet("late_counters", "step counters at 2^24, beyond which float32 does not count", FEW, steps=5,
            counter=2**24 - 2),
)  # fmt: skip
BY_NAME = {data.name: data for data in DATA}
