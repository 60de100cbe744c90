"""Arguments, right and wrong, by what a function of the boundary expects."""

from __future__ import annotations

import random
from typing import Any

import torch

__all__ = ["HOSTILE", "hostile", "integer", "number", "tensor"]


class Liar:
    """Claims to be anything and is nothing."""

    def __bool__(self):
        raise ZeroDivisionError("asked for its truth")

    def __len__(self):
        raise ZeroDivisionError("asked for its length")

    def __index__(self):
        raise ZeroDivisionError("asked for its index")

    def __getattr__(self, name):
        raise ZeroDivisionError(f"asked for {name}")


class Endless(list):
    """A list that grows while it is read."""

    def __iter__(self):
        for i in range(100):
            self.append(i)
            yield i


INTEGERS = (0, 1, 2, -1, 3, 4, 7, 255, 256, 1023, 2**15, 2**31 - 1, 2**31, 2**32, -(2**31), 2**62, 2**63 - 1, 2**63)
INTEGERS += (2**64 - 1, 2**64, -(2**63), -(2**64), 10**40)
NUMBERS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), 5e-324)
HOSTILE: tuple[Any, ...] = (
    None, True, "", "lr", "\ud800", "x" * 5000, b"bytes", (), [], {}, [None], [[]], [1, "a"], (1, 2, 3), {1: 2},
    {"params": 1}, object, object(), len, 1j, range(3), float("nan"), 2**70, -1, Ellipsis, NotImplemented,
)  # fmt: skip

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
_OTHER_DTYPES = (torch.int32, torch.int8, torch.bool, torch.uint8)


def integer(rng: random.Random) -> Any:
    return rng.choice(INTEGERS) + rng.choice((0, 0, 0, 1, -1)) if rng.random() < 0.9 else hostile(rng)


def number(rng: random.Random) -> Any:
    return rng.choice((*NUMBERS, rng.random(), 10**400)) if rng.random() < 0.9 else hostile(rng)


def hostile(rng: random.Random) -> Any:
    """Anything at all."""
    kind = rng.random()
    if kind < 0.1:
        return tensor(rng)
    if kind < 0.14:
        return rng.choice((Liar, Liar(), Endless([1])))
    return rng.choice(HOSTILE)


def shape(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 6, 7))))


def _views(rng: random.Random, value: torch.Tensor) -> torch.Tensor:
    kind = rng.randrange(8)
    if kind == 0 and value.dim() > 1:
        return value.transpose(0, 1)
    if kind == 1:
        return torch.cat([value.reshape(-1), value.reshape(-1)])[::2]
    if kind == 2 and value.dim():
        return value.unsqueeze(0).expand(3, *value.shape)
    if kind == 3:
        return torch._neg_view(value) if value.is_floating_point() or value.is_complex() else value
    if kind == 4 and value.is_complex():
        return value.conj()
    if kind == 5:
        return value.to_sparse() if value.dim() else value
    if kind == 6:
        return value.to("meta")
    return value


def tensor(rng: random.Random) -> torch.Tensor:
    """Of any dtype, shape and layout."""
    dtype = rng.choice(_DTYPES if rng.random() < 0.9 else _OTHER_DTYPES)
    value = torch.zeros(shape(rng), dtype=dtype)
    if rng.random() < 0.4:
        value = _views(rng, value)
    if rng.random() < 0.5 and (value.is_floating_point() or value.is_complex()) and value.is_leaf:
        return torch.nn.Parameter(value, requires_grad=rng.random() < 0.8)
    return value
