"""The parameter lists that are measured: shapes of real models, filled with random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Format:
    """How parameters, gradients and states rest in memory."""

    dtype: torch.dtype
    """Of parameters and gradients."""
    options: Mapping[str, object] = field(default_factory=dict)
    """What fusedopt's optimizers are told; without any, states are of the parameters' dtype, as torch's are."""


FORMATS = {
    "fp32": Format(torch.float32),
    "bf16": Format(torch.bfloat16),
    "bf16+split16": Format(torch.bfloat16, {"master_weights": "split16"}),
    "bf16+split16+bf16": Format(torch.bfloat16, {"master_weights": "split16", "state_dtype": "bf16"}),
    "bf16+split8+int8": Format(torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8"}),
    "bf16+sr": Format(torch.bfloat16, {"stochastic_rounding": True}),
    "bf16+int8": Format(torch.bfloat16, {"state_dtype": "int8"}),
    "bf16+fp32 master": Format(torch.bfloat16, {"master_weights": "fp32"}),
    "fp16+fp32 master": Format(torch.float16, {"master_weights": "fp32"}),
    "fp32+int8": Format(torch.float32, {"state_dtype": "int8"}),
}
"""By name: the parameters' dtype, what is kept beside them, and the states if they are not float32 beside a master."""

# Ordinary magnitudes: weights as after initialisation, gradients whose total norm is above the clipping limit.
PARAM_STD = 0.02
GRAD_STD = 0.01

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes, in the order in which an optimizer receives them."""

    name: str
    shapes: tuple[Shape, ...]
    groups: int = 1
    """Param groups of neighbours that the optimizer receives."""

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


class Model:
    """Parameters and gradients of a workload, shared by all libraries that are compared on it.

    Args:
        workload: the shapes.
        dtype: of parameters and gradients.
        device: where they live.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        def empty(shape: Shape) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.params = [torch.nn.Parameter(empty(shape)) for shape in workload.shapes]
        self.gradients = [empty(shape) for shape in workload.shapes]
        self._fill(self.gradients, GRAD_STD, seed=1)
        self.reset()

    def reset(self) -> None:
        """Puts every parameter back to its starting value."""
        self._fill([param.detach() for param in self.params], PARAM_STD, seed=0)

    def backward(self) -> None:
        """Gives every parameter a new gradient tensor, as backward does after ``zero_grad(set_to_none=True)``."""
        for param in self.params:
            param.grad = None
        for param, gradient in zip(self.params, self.gradients):
            param.grad = gradient.clone()

    def used_gradient(self, i: int) -> torch.Tensor:
        """What a step has to take for the gradient of ``params[i]``, float64."""
        return self.gradients[i].double()

    def gradient_error(self, i: int) -> torch.Tensor | None:
        """How far rounding may put a step's gradient from that before anything else is done; None for not at all."""
        return None

    @staticmethod
    def _fill(tensors: list[torch.Tensor], std: float, seed: int) -> None:
        generator = torch.Generator(tensors[0].device).manual_seed(seed)
        for tensor in tensors:
            tensor.normal_(0.0, std, generator=generator)


class BorrowedModel(Model):
    """Somebody's parameters, which are overwritten, with gradients of their own shapes."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.gradients = [torch.empty_like(param, requires_grad=False) for param in params]
        self._fill(self.gradients, GRAD_STD, seed=1)


def gpt2(name: str, *, width: int, layers: int, vocab: int, context: int) -> Workload:
    """GPT-2 with tied embeddings: 12 tensors a layer, 2 embeddings, final layer norm."""
    layer = [
        (width,), (width,),                        # layer norm 1
        (3 * width, width), (3 * width,),          # query, key, value
        (width, width), (width,),                  # attention output
        (width,), (width,),                        # layer norm 2
        (4 * width, width), (4 * width,),          # feed-forward, in
        (width, 4 * width), (width,),              # feed-forward, out
    ]  # fmt: skip
    return Workload(name, ((vocab, width), (context, width), *layer * layers, (width,), (width,)))


def llama(name: str, *, width: int, hidden: int, layers: int, vocab: int) -> Workload:
    """LLaMA without grouped queries: 9 tensors a layer, embedding, final norm, untied head."""
    layer = [
        *[(width, width)] * 4,                            # query, key, value, output
        (hidden, width), (hidden, width), (width, hidden),  # gate, up, down
        (width,), (width,),                               # the two norms
    ]  # fmt: skip
    return Workload(name, ((vocab, width), *layer * layers, (width,), (vocab, width)))


def small(name: str, *, pairs: int, width: int, groups: int = 1) -> Workload:
    """Many small layers, a square weight and a bias each: host time and launches dominate."""
    return Workload(name, ((width, width), (width,)) * pairs, groups)


WORKLOADS = {
    workload.name: workload
    for workload in (
        llama("llama-1.3B", width=2048, hidden=5504, layers=24, vocab=32000),
        gpt2("gpt2-124M", width=768, layers=12, vocab=50257, context=1024),
        small("1000-small", pairs=500, width=64),
        small("10000-small", pairs=5000, width=64),
        small("10000-small-10-groups", pairs=5000, width=64, groups=10),
        gpt2("cpu-100M", width=768, layers=12, vocab=18432, context=1024),
        gpt2("tiny", width=64, layers=2, vocab=256, context=64),
        small("tiny-4-groups", pairs=10, width=16, groups=4),
    )
}
