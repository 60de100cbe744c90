"""Memory for functions that take addresses: of the exact size, between guards."""

from __future__ import annotations

import ctypes
import os
import random

__all__ = ["Memory"]

_GUARD = 0xA5
_BEFORE = (0, 8, 24, 64)
_BEHIND = 64


class Memory:
    """Blocks that live as long as this.

    Where addresses are watched by a sanitizer nothing follows a block, so that reading one byte too many is noticed
    too; elsewhere bytes of known contents do, so that writing is.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.behind = 0 if "libasan" in os.environ.get("LD_PRELOAD", "") else _BEHIND
        self.blocks: list[tuple[ctypes.Array, int, int]] = []

    def block(self, size: int, content: bytes | None = None) -> int:
        """The address of ``size`` bytes, a multiple of 8; by default of random contents."""
        before = self.rng.choice(_BEFORE)
        content = self.rng.randbytes(size) if content is None else content
        guarded = bytes([_GUARD]) * before + content + bytes([_GUARD]) * self.behind
        array = (ctypes.c_ubyte * len(guarded)).from_buffer_copy(guarded)
        self.blocks.append((array, before, size))
        return ctypes.addressof(array) + before

    def floats(self, *values: float) -> int:
        return self.block(4 * len(values), bytes((ctypes.c_float * len(values))(*values)))

    def doubles(self, *values: float) -> int:
        return self.block(8 * len(values), bytes((ctypes.c_double * len(values))(*values)))

    def check(self) -> None:
        """AssertionError where something was written beside a block."""
        for array, before, size in self.blocks:
            content = bytes(array)
            guards = content[:before] + content[before + size :]
            assert guards == bytes([_GUARD]) * len(guards), f"bytes beside a block of {size} were written"
