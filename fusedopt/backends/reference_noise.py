"""Random bits, dither and what is rounded with them in plain torch, for the reference backend: ``csrc/core/random.h``,
``csrc/formats/``. uint32 arithmetic is done in int64, modulo 2^32.
"""

from __future__ import annotations

import torch

from ..specs import STATE_BLOCK

__all__ = ["Noise", "encode_int8", "round_stochastically"]

Tensor = torch.Tensor

_MASK = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower half of a product of two uint32. int64 overflows, to the same 64 bits."""
    product = x * (constant if constant < 2**63 else constant - 2**64)
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011)."""
    key0, key1 = seed & _MASK, seed >> 32
    for _ in range(10):
        a_high, a_low = _multiply(0xD2511F53, c0)
        b_high, b_low = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ key0, b_low, a_high ^ c3 ^ key1, a_low
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


class Noise:
    """Of one step of one tensor of ``numel`` elements, in memory order."""

    def __init__(self, seed: int, tensor: int, step: int, numel: int, device: torch.device) -> None:
        self.seed, self.tensor, self.step, self.numel, self.device = seed, tensor, step, numel, device

    def _groups(self) -> Tensor:
        return torch.arange(-(-self.numel // 8), device=self.device)

    def bits(self, shift: int) -> Tensor:
        """16 random bits for each element: those of element e + shift of the eight that share a draw."""
        groups = self._groups()
        zero = torch.zeros_like(groups)
        words = philox(self.seed, groups & _MASK, groups >> 32, zero + self.tensor, zero + self.step)
        halves = torch.stack([(word >> bits) & 0xFFFF for word in words for bits in (0, 16)], dim=1)
        return halves.roll(-shift, dims=1).reshape(-1)[: self.numel]

    def dither(self) -> Tensor:
        """24 bits for each element."""
        groups = self._groups()
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        key = philox(self.seed, zero + self.tensor, zero, zero, zero)[0]
        x = (groups & _MASK) ^ (((groups >> 32) * 0x9E3779B9) & _MASK) ^ key
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = _multiply(factor, x ^ (x >> shift))[1]
        base = (x ^ (x >> 16)) + self.step * 0x9E3779
        element = torch.arange(8, device=self.device) * 0x6A09E6
        return ((base[:, None] + element) & 0xFFFFFF).reshape(-1)[: self.numel]


def _bits(x: Tensor) -> Tensor:
    """Of float32, in [0, 2^32)."""
    return x.contiguous().view(torch.int32).to(torch.int64) & _MASK


def _float(bits: Tensor) -> Tensor:
    return ((bits + 2**31) % 2**32 - 2**31).to(torch.int32).view(torch.float32)


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """bfloat16: the neighbour below or above, the nearer the likelier."""
    word = torch.where(value.isnan(), 0x7FFF0000, _bits(value)) + bits
    return _float(word & 0xFFFF0000).to(torch.bfloat16)


def encode_int8(value: Tensor, moment: str, dither: Tensor, codes: Tensor, units: Tensor) -> None:
    """Writes codes and units as ``Int8State`` of ``csrc/formats/state.h``."""
    size = value.abs() if moment == "first" else value.double().sqrt().float()
    padded = size.new_zeros(units.numel() * STATE_BLOCK)
    padded[: size.numel()] = size
    largest = (_bits(padded) & 0x7FFFFFFF).view(-1, STATE_BLOCK)
    exponent = (largest.amax(1) if units.numel() else largest.new_zeros(0)) & 0x7F800000
    small = torch.where(exponent < (16 << 23), 0, exponent - (15 << 23))
    unit = _float(torch.where(exponent == 0x7F800000, 0x7FC00000, small))
    units.copy_(unit)
    reciprocal = _float(torch.where(unit > 0, 0x7F000000 - small, 0)).repeat_interleave(STATE_BLOCK)[: size.numel()]
    word = _bits(size * reciprocal + 2.0)
    if moment == "first":
        word = (((word << 4) + dither) & 0x7FFFFFFF) | (_bits(value) & 0x80000000)
    else:
        word = torch.maximum(((word << 5) + dither) & _MASK, _bits(value).clamp(max=1 << 24))
    codes.copy_(((word & _MASK) >> 24).to(torch.uint8).view(codes.dtype))
