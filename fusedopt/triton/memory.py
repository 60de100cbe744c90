"""How the kernels read structs and streams of elements. Addresses are 64-bit integers, as tables hold them.

A program works on one chunk as a tile of shape (chunk / 8, 8), in memory order. A row of the tile is a group of
elements that share a random draw, 32 rows are a block of 8-bit states.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["field", "field_or", "load", "pointers", "tile_offsets"]

ROW = tl.constexpr(8)


@triton.jit
def field(address, OFFSET: tl.constexpr, TYPE: tl.constexpr):
    """The value at ``address + OFFSET`` bytes."""
    return tl.load((address + OFFSET).to(tl.pointer_type(TYPE)))


@triton.jit
def field_or(address, TYPE: tl.constexpr, DEFAULT: tl.constexpr):
    """The value at ``address``; ``DEFAULT`` where that is null."""
    return tl.load(address.to(tl.pointer_type(TYPE)), mask=address != 0, other=DEFAULT)


@triton.jit
def tile_offsets(CHUNK: tl.constexpr):
    """Elements from the chunk's first one, shape (CHUNK / 8, 8)."""
    return tl.arange(0, CHUNK // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]


@triton.jit
def pointers(address, start, offsets, TYPE: tl.constexpr, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to elements ``start + offsets`` of the array at ``address``.

    SIZE: bytes of an element. VECTOR: elements of one access, where address and ``start`` are multiples of it; else 1.
    The hint stands on the scalar address of the chunk: Triton's axis analysis does not look through the conversion of
    an integer into a pointer, but begins anew with the addition behind it.
    """
    base = address.to(tl.pointer_type(TYPE)) + start
    if VECTOR > 1:
        base = tl.multiple_of(base, VECTOR * SIZE)
    return base + offsets


@triton.jit
def load(where, mask):
    """Elements, 0 where masked."""
    return tl.load(where, mask=mask, other=0)
