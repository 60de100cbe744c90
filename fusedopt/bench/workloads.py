"""The parameter lists that are measured: shapes of real models, filled with random numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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

NORM_PIECE = 1 << 25
"""Elements that are squared at a time: in float64 all of a gradient may not fit into memory."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A named list of parameter shapes, in the order in which an optimizer receives them."""

    name: str
    shapes: tuple[Shape, ...]
    groups: int = 1
    """Param groups of neighbours that the optimizer receives."""
    offsets: tuple[int, int] = (0, 0)
    """Elements that parameters and gradients lie behind an aligned address, as views of larger buffers may."""

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
        def empty(shape: Shape, offset: int) -> torch.Tensor:
            return torch.empty(math.prod(shape) + offset, dtype=dtype, device=device)[offset:].view(shape)

        own, self.gradient_offset = workload.offsets
        self.params = [torch.nn.Parameter(empty(shape, own)) for shape in workload.shapes]
        self.gradients = [empty(shape, self.gradient_offset) for shape in workload.shapes]
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
            param.grad = gradient.clone() if not self.gradient_offset else self._offset_clone(gradient)

    def _offset_clone(self, gradient: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(gradient.numel() + self.gradient_offset, dtype=gradient.dtype, device=gradient.device)
        return buffer[self.gradient_offset :].view(gradient.shape).copy_(gradient)

    def used_gradient(self, i: int, part: slice) -> torch.Tensor:
        """What a step has to take for the gradient of a range of the elements of ``params[i]``, flat, float64."""
        return self.gradients[i].view(-1)[part].double()

    def gradient_error(self, i: int, part: slice) -> torch.Tensor | None:
        """How far rounding may put a step's gradient from that before anything else is done; None for not at all."""
        return None

    @functools.cached_property
    def norm(self) -> float:
        """Of all gradients that a step has to take, in float64."""
        sums = []
        for i, param in enumerate(self.params):
            for start in range(0, param.numel(), NORM_PIECE):
                piece = slice(start, min(start + NORM_PIECE, param.numel()))
                sums.append(self.used_gradient(i, piece).square().sum())
        return math.sqrt(torch.stack(sums).sum().item())

    @staticmethod
    def _fill(tensors: list[torch.Tensor], std: float, seed: int) -> None:
        generator = torch.Generator(tensors[0].device).manual_seed(seed)
        for tensor in tensors:
            tensor.normal_(0.0, std, generator=generator)


class BorrowedModel(Model):
    """Somebody's parameters, which are overwritten, with gradients of their own shapes."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.gradient_offset = 0
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


def llama(
    name: str, *, width: int, hidden: int, layers: int, vocab: int, key_value: int | None = None, shards: int = 1
) -> Workload:
    """LLaMA: 9 tensors a layer, embedding, final norm, untied head.

    Args:
        key_value: rows of the key's and the value's weight, fewer than ``width`` with grouped queries.
        shards: every tensor is divided by its rows, as FSDP does, and this is one part.
    """
    key_value = key_value or width
    layer = [
        (width, width), (key_value, width), (key_value, width), (width, width),  # query, key, value, output
        (hidden, width), (hidden, width), (width, hidden),                       # gate, up, down
        (width,), (width,),                                                      # the two norms
    ]  # fmt: skip
    shapes = ((vocab, width), *layer * layers, (width,), (vocab, width))
    return Workload(name, tuple((shape[0] // shards, *shape[1:]) for shape in shapes))


def bert(name: str, *, width: int, layers: int, vocab: int, context: int) -> Workload:
    """BERT with its pooler, without a head: 16 tensors a layer, three embeddings and their norm."""
    layer = [
        *[(width, width), (width,)] * 4,      # query, key, value, output
        (width,), (width,),                   # the attention's norm
        (4 * width, width), (4 * width,),     # feed-forward, in
        (width, 4 * width), (width,),         # feed-forward, out
        (width,), (width,),                   # its norm
    ]  # fmt: skip
    embeddings = [(vocab, width), (context, width), (2, width), (width,), (width,)]
    return Workload(name, (*embeddings, *layer * layers, (width, width), (width,)))


def vit(name: str, *, width: int, layers: int, patch: int, image: int, classes: int) -> Workload:
    """Vision transformer with a class token: 12 tensors a layer."""
    layer = [
        (width,), (width,),                          # layer norm 1
        (3 * width, width), (3 * width,),            # query, key, value
        (width, width), (width,),                    # attention output
        (width,), (width,),                          # layer norm 2
        (4 * width, width), (4 * width,),            # feed-forward, in
        (width, 4 * width), (width,),                # feed-forward, out
    ]  # fmt: skip
    first = [(1, 1, width), (width, 3, patch, patch), (width,), (1, (image // patch) ** 2 + 1, width)]
    return Workload(name, (*first, *layer * layers, (width,), (width,), (classes, width), (classes,)))


def resnet(name: str, *, blocks: tuple[int, ...], classes: int) -> Workload:
    """ResNet of bottlenecks: each convolution without bias and followed by a batch norm of two vectors."""

    def convolution(channels: int, inputs: int, size: int) -> list[Shape]:
        return [(channels, inputs, size, size), (channels,), (channels,)]

    shapes, inputs = convolution(64, 3, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            shapes += [*convolution(width, inputs, 1), *convolution(width, width, 3), *convolution(4 * width, width, 1)]
            shapes += convolution(4 * width, inputs, 1) if block == 0 else []  # the shortcut
            inputs = 4 * width
    return Workload(name, (*shapes, (classes, inputs), (classes,)))


def small(name: str, *, pairs: int, width: int, groups: int = 1) -> Workload:
    """Many small layers, a square weight and a bias each: host time and launches dominate."""
    return Workload(name, ((width, width), (width,)) * pairs, groups)


LLAMA_1B = {"width": 2048, "hidden": 5504, "layers": 24, "vocab": 32000}
LLAMA_8B = {"width": 4096, "hidden": 14336, "layers": 32, "vocab": 128256, "key_value": 1024}
GPT2 = {"width": 768, "layers": 12, "vocab": 50257, "context": 1024}

SIZES = (10**3, 10**5, 10**7, 10**9, 4 * 10**9, 10**8, 10**6, 10**4)
"""Elements of the workloads ``size-…``: of one tensor. In this order, since a time limit leaves out the last ones."""
COUNTS = (1, 10, 100, 1000, 10000, 3000, 300)
"""Tensors of the workloads ``tensors-…``, of 2,080 elements on average; likewise."""


def sized(numel: int) -> Workload:
    return Workload(f"size-{numel:.0e}".replace("e+0", "e").replace("e+", "e"), ((numel,),))


def counted(tensors: int) -> Workload:
    pairs = ((64, 64), (64,)) * (tensors // 2)
    return Workload(f"tensors-{tensors}", pairs or ((64, 64),))


WORKLOADS = {
    workload.name: workload
    for workload in (
        llama("llama-1.3B", **LLAMA_1B),
        gpt2("gpt2-124M", **GPT2),
        llama("llama-8B-shard", **LLAMA_8B, shards=8),
        resnet("resnet50", blocks=(3, 4, 6, 3), classes=1000),
        vit("vit-l", width=1024, layers=24, patch=16, image=224, classes=1000),
        bert("bert-large", width=1024, layers=24, vocab=30522, context=512),
        small("1000-small", pairs=500, width=64),
        small("10000-tiny", pairs=5000, width=16),
        Workload("one-huge", ((2_200_000_000,),)),
        small("10000-small", pairs=5000, width=64),
        small("10000-small-10-groups", pairs=5000, width=64, groups=10),
        replace(llama("llama-1.3B-misaligned", **LLAMA_1B), offsets=(1, 1)),
        replace(llama("llama-1.3B-misaligned-apart", **LLAMA_1B), offsets=(1, 2)),
        llama("llama-1.3B-odd", **(LLAMA_1B | {"width": 2047, "hidden": 5503, "vocab": 32001})),
        gpt2("cpu-100M", width=768, layers=12, vocab=18432, context=1024),
        gpt2("tiny", width=64, layers=2, vocab=256, context=64),
        small("tiny-4-groups", pairs=10, width=16, groups=4),
        *map(sized, SIZES),
        *map(counted, COUNTS),
    )
}
"""By name. Of ``-misaligned`` every tensor is a view one element behind an aligned address, parameters and gradients
alike; of ``-misaligned-apart`` gradients are two behind; of ``-odd`` no tensor's size is a multiple of 4."""
